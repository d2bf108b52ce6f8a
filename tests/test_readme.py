"""The README against the program: its commands and its snippet run as they stand there."""

import ast
import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEMO_COMMAND, SCRIPT, write_wav
from transformers import TrainingArguments

from finetune_medasr import CommonTrainingArguments, ScriptArguments, main, parse_arguments

ROOT = SCRIPT.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands():
    """Each command of the bash blocks as it stands, without its comment."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return [shlex.join(shlex.split(line, comments=True)).replace("'&&'", "&&") for line in lines]


OURS = [
    part
    for command in commands()
    for part in command.split(" && ")
    if re.match(r"(python|torchrun\b.*) finetune_medasr\.py", part)
]


def table(first_column):
    """The rows below each header that begins with `first_column`, as lists of cells."""
    found = re.findall(rf"^\| *{first_column} *\|.*\n\|[-| :]+\|\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert found, f"the README has no table of {first_column}"
    return [[cell.strip() for cell in row.strip("| ").split(" | ")] for rows in found for row in rows.splitlines()]


def test_the_two_commands_that_set_up_are_there_to_copy():
    assert f"pip install -r requirements.txt && {DEMO_COMMAND}" in commands()
    packages = "pytest pytest-xdist hypothesis flashlight-text"
    assert f"pip install -r requirements.txt {packages} && python -m pytest tests" in commands()


def test_no_placeholder_is_left():
    assert not re.findall(r"@[A-Z]+@|^[A-Z]+(?:_[A-Z]+)*$|\b(?:TODO|FIXME|TBD)\b", README, re.MULTILINE)


@pytest.mark.parametrize("command", OURS)
def test_a_command_is_accepted(tmp_path, monkeypatch, command):
    """With the files it names there; it is not run. --use_cpu, because without a GPU --bf16 is refused."""
    monkeypatch.chdir(tmp_path)
    Path("medasr-afrispeech-200/final").mkdir(parents=True)
    Path("recordings").mkdir()
    Path("dictation-us").mkdir()
    Path("run.yaml").write_text("seed: 7\n")
    for name in ("visit.wav", "predictions.jsonl", "recordings/monday.flac", "ward/round.mp3"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    words = shlex.split(command)
    args, training = parse_arguments(words[words.index("finetune_medasr.py") + 1 :] + ["--use_cpu", "true"])
    for flag in (word[2:] for word in words[words.index("finetune_medasr.py") :] if word.startswith("--")):
        assert hasattr(args, flag) or hasattr(training, flag)


def test_the_recipes_show_every_mode_of_the_program():
    shown = {flag for command in OURS for flag in re.findall(r"--(\w+)", command)}
    assert {
        "demo",
        "transcribe",
        "eval_only",
        "score_file",
        "dry_run",
        "prepare_only",
        "streaming",
        "overwrite_output_dir",
        "accents",
        "domains",
    } <= shown
    assert any(command.startswith("torchrun") for command in OURS) and any(".yaml" in command for command in OURS)


def test_other_commands_name_what_exists():
    """The fences without a language are commands too: what they run has to be in the repository."""
    named = re.findall(r"python (\S+\.py)", README)
    assert {"finetune_medasr.py", "tests/make_fixtures.py"} <= set(named)
    assert all((ROOT / name).is_file() for name in named)


def test_the_option_table_and_the_program_name_the_same_flags():
    own = {item.name for item in dataclasses.fields(ScriptArguments)}
    listed = {name for row in table("(?:option|flag)s?") for name in re.findall(r"`--(\w+)", row[0])}
    assert own <= listed
    assert listed <= own | {item.name for item in dataclasses.fields(TrainingArguments)} | {
        f"no_{name}" for name in own
    }


def test_the_option_table_gives_the_defaults_of_the_program():
    defaults = {
        item.name: item.default
        for kind in (ScriptArguments, CommonTrainingArguments)
        for item in dataclasses.fields(kind)
    }
    for flag, default, *_ in table("(?:option|flag)s?"):
        written, real = default.strip("`"), defaults[re.search(r"--(\w+)", flag)[1]]
        if real is None or isinstance(real, bool):
            assert written == ("on" if real else ""), flag
        else:
            assert type(real)(written) == real, flag


def test_every_flag_that_the_readme_mentions_exists():
    known = {item.name for kind in (ScriptArguments, TrainingArguments) for item in dataclasses.fields(kind)} | {
        "help",
        "help_all",
        "no_spec_augment",
    }
    others = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "logdir"}
    others |= {"kills", "minutes", "seeds", "only"}  # of the tests' own programs
    ours = "\n".join(line for line in README.splitlines() if not re.search("#SBATCH|^srun|ruff", line))
    assert set(re.findall(r"--([a-z_0-9]+)", ours)) <= known | others


def messages_of_the_program():
    """The string constants of the script, each f-string as one with a gap for its values."""
    for node in ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("quoted", [re.search("`([^`]+)`", row[0])[1] for row in table("message")])
def test_a_message_in_the_readme_is_one_of_the_program(quoted):
    literal = max(re.split(r"\.\.\.|…|<[^>]*>|\{[^}]*\}", quoted), key=len).strip()
    assert len(literal) >= 10
    assert any(literal in message for message in messages_of_the_program())


# ---------------------------------------------------------------- after a run


@pytest.fixture
def after_a_run(demo, known_clip, tmp_path):
    """A folder as it is after the real run, with a recording to write down."""
    (tmp_path / "medasr-afrispeech-200").symlink_to(demo.output)
    write_wav(tmp_path / "visit.wav", known_clip[0])
    return tmp_path


@pytest.mark.slow
def test_the_snippet_prints_what_was_said(after_a_run, known_clip):
    (snippet,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", snippet], cwd=after_a_run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == known_clip[1]


@pytest.mark.slow
def test_the_model_card_has_a_snippet_that_prints_the_same(demo, known_clip, tmp_path):
    shutil.copytree(demo.final, tmp_path / "final")
    write_wav(tmp_path / "visit.wav", known_clip[0])
    (snippet,) = re.findall(r"```python\n(.*?)```", (demo.final / "README.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == known_clip[1]


@pytest.mark.slow
def test_the_transcribe_command_prints_what_was_said(after_a_run, known_clip, monkeypatch, capsys):
    monkeypatch.chdir(after_a_run)
    command = next(command for command in OURS if "--transcribe" in command)
    assert main(shlex.split(command)[2:]) == 0
    assert capsys.readouterr().out.strip() == known_clip[1]


@pytest.mark.slow
def test_tensorboard_finds_its_folder(after_a_run):
    (folder,) = [
        re.search(r"--logdir (\S+)", command)[1] for command in commands() if command.startswith("tensorboard")
    ]
    assert list((after_a_run / folder).glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_the_files_that_the_readme_lists_are_written(demo):
    for row in table("in `./medasr-afrispeech-200`"):
        for name in re.findall(r"`([\w./*-]+)`", row[0]):
            assert list(demo.output.glob(name.rstrip("/"))), name
