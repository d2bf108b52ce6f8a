"""The README against the program: its commands and its snippet run as they stand there."""

import ast
import dataclasses
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import DEMO_COMMAND, SCRIPT, run_script, succeeded
from helpers import run_main, write, write_wav
from transformers import TrainingArguments

from finetune_medasr import ScriptFlags, TrainingFlags, parse_settings

ROOT = SCRIPT.parent
README, SOURCE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", SCRIPT.name))
FLAGS = {item.name: item for kind in (ScriptFlags, TrainingFlags) for item in dataclasses.fields(kind)}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands():
    """Each command of the bash blocks as it stands, without its comment."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return [shlex.join(shlex.split(line, comments=True)).replace("'&&'", "&&") for line in lines]


PARTS = [part for command in commands() for part in command.split(" && ")]
OURS = [part for part in PARTS if re.match(r"(python|torchrun\b.*) finetune_medasr\.py", part)]


def table(first_column):
    """The rows below the header that begins with `first_column`, as lists of cells."""
    rows = re.search(rf"^\| *{first_column} *\|.*\n\|[-| :]+\|\n((?:\|.*\n)+)", README, re.MULTILINE)[1]
    rows = rows.replace("|  |", "| . |").splitlines()
    return [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows]


def test_the_two_commands_that_set_up_are_there_to_copy_and_the_readme_is_short():
    assert f"pip install -r requirements.txt && {DEMO_COMMAND}" in commands()
    packages = "pytest pytest-xdist hypothesis flashlight-text"
    assert f"pip install -r requirements.txt {packages} && python -m pytest tests" in commands()
    assert len(README.splitlines()) <= 250


def test_an_older_python_is_told_in_a_line():
    ast.parse(SOURCE, feature_version=(3, 9))  # no SyntaxError before the line
    code = f"import sys; sys.version_info = (3, 10, 0); exec(compile(open({str(SCRIPT)!r}).read(), 'script', 'exec'))"
    done = run_script(code, script="-c", cwd=ROOT)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Python 3.11 or newer" in done.stderr


@pytest.mark.parametrize("command", OURS)
def test_a_command_is_accepted(tmp_path, monkeypatch, command):
    """With the files it names there; it is not run."""
    monkeypatch.chdir(tmp_path)
    for name in ("medasr-afrispeech-200/final", "recordings", "dictation-us", "ward"):
        Path(name).mkdir(parents=True)
    Path("run.yaml").write_text("seed: 7\n")
    for name in ("visit.wav", "predictions.jsonl", "ward/round.mp3"):
        Path(name).touch()
    words = shlex.split(command)
    words = words[words.index("finetune_medasr.py") + 1 :]
    settings = parse_settings([*words, "--use_cpu", "true"])
    assert all(hasattr(settings, word[2:]) for word in words if word.startswith("--"))


def test_the_option_table_has_each_flag_with_its_default_and_help():
    rows = {re.search(r"--(\w+)", row[0])[1]: row[1:] for row in table("flag")}
    assert set(rows) == {name for name, item in FLAGS.items() if item.metadata}
    for name, (default, text) in rows.items():
        written, real = default.strip("`"), FLAGS[name].default
        assert text == FLAGS[name].metadata["help"]
        if real is None or isinstance(real, bool):
            assert written == ("on" if real else "."), name
        else:
            assert type(real)(written) == real, name


def test_every_flag_that_the_readme_mentions_exists():
    known = {*FLAGS, *(item.name for item in dataclasses.fields(TrainingArguments)), "help_all", "no_spec_augment"}
    ours = "\n".join(line for line in README.splitlines() if "ruff" not in line)
    assert set(re.findall(r"--([a-z_0-9]+)", ours)) <= known | {"nproc_per_node", "logdir"}


def test_each_message_in_the_readme_is_one_of_the_program():
    """Of its string constants; an f-string is one with a gap for each value."""
    nodes, messages = list(ast.walk(ast.parse(SOURCE))), []
    for parts in [node.values for node in nodes if isinstance(node, ast.JoinedStr)] + [[node] for node in nodes]:
        messages.append("".join(str(getattr(part, "value", "\0")) for part in parts))
    quoted = [re.search("`([^`]+)`", row[0])[1] for row in table("message")]
    assert len(quoted) > 5
    assert not [text for text in quoted if not any(text in message for message in messages)]


def test_a_yaml_file_sets_flags_and_flags_on_top_of_it_win(tmp_path):
    text = "learning_rate: 1e-5\nseed: 7\naccents: [yoruba, 'akan (fante)']\nspec_augment: false\nskip_baseline: true\n"
    text += "max_steps: null\nweight_decay: 0.25\nlr_scheduler_kwargs:\n  min_lr_rate: 0.1\n"
    write(tmp_path / "run.yaml", text)
    settings = parse_settings([str(tmp_path / "run.yaml"), "--learning_rate", "2e-4", "--weight_decay", "0.5"])
    assert (settings.learning_rate, settings.weight_decay) == (2e-4, 0.5)
    assert (settings.seed, settings.max_steps, settings.lr_scheduler_kwargs) == (7, -1, {"min_lr_rate": 0.1})
    assert settings.accents == ["yoruba", "akan (fante)"] and settings.skip_baseline and not settings.spec_augment


@pytest.mark.parametrize("flag", ["--help", "--help_all"])
def test_help_names_every_flag(flag, tmp_path):
    """--help on two screens those of the script and what people change, --help_all those of the Trainer too."""
    out = succeeded(run_main(tmp_path, flag)).stdout
    kinds = [ScriptFlags, TrainingFlags, *([TrainingArguments] if flag == "--help_all" else [])]
    named = {item.name for kind in kinds for item in dataclasses.fields(kind) if item.init} | {"help_all"}
    assert named <= set(re.findall(r"(?<![\w-])--(\w+)", out))
    assert flag == "--help_all" or (len(out.splitlines()) <= 110 and max(map(len, out.splitlines())) <= 150)
    assert "(default: 3e-05)" in out and "(default: None)" not in out


@pytest.mark.slow
def test_the_command_and_the_snippets_of_readme_and_model_card_print_what_was_said(demo, known_clip, tmp_path):
    (tmp_path / "medasr-afrispeech-200").symlink_to(demo.output)
    shutil.copytree(demo.final, tmp_path / "final")
    write_wav(tmp_path / "visit.wav", known_clip[0])
    command = next(command for command in OURS if "--transcribe" in command)
    assert succeeded(run_main(tmp_path, *shlex.split(command)[2:])).stdout.strip() == known_clip[1]
    card = (demo.final / "README.md").read_text(encoding="utf-8")
    for snippet in [*blocks("python"), *re.findall(r"```python\n(.*?)```", card, re.DOTALL)]:
        assert succeeded(run_script(snippet, script="-c", cwd=tmp_path)).stdout.strip() == known_clip[1]


@pytest.mark.slow
def test_the_files_that_the_readme_lists_are_written(demo):
    for row in table("in `./medasr-afrispeech-200`"):
        for name in re.findall(r"`([\w./*-]+)`", row[0]):
            assert list(demo.output.glob(name.rstrip("/"))), name
    folder = next(re.search(r"--logdir \./medasr-afrispeech-200/(\S+)", part)[1] for part in PARTS if "logdir" in part)
    assert list((demo.output / folder).glob("events.out.tfevents.*"))
