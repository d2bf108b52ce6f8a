"""What others give to the program (models, checkpoints, archives, texts), and tokens that nobody else may read."""

import csv
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kills
import pytest
import soundfile
import yaml
from conftest import MODEL, SCRIPT, error_line, load_json
from helpers import label_encoder, make_selection, noise, small_processor
from warm import WarmStarts

import finetune_medasr as script
from finetune_medasr import MANIFEST, main

# ---------------------------------------------------------------- tokens

TOKENS = {
    "environment": "s3cret-of-the-environment",
    "file": "s3cret-of-the-file",
    "flag": "s3cret-of-the-flag",
    "yaml": "s3cret-of-the-yaml-file",
    "url": "s3cret-of-the-url",
    "hub": "hf_AbCdEfGhIjKl",
}


def found_tokens(folder, *printed):
    """[(file or text, token)] of the tokens in any file below a folder, whatever its kind, or in what was printed."""
    contents = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    contents |= {text[:200]: text.encode() for text in printed}
    assert len(contents) > len(printed)
    return [(name, token) for name, data in contents.items() for token in TOKENS.values() if token.encode() in data]


@pytest.fixture(scope="module")
def with_tokens(tmp_path_factory):
    """Starts the program with tokens in the environment and in the file of `hf auth login`."""
    home = tmp_path_factory.mktemp("home")
    (home / "token").write_text(TOKENS["file"])
    with WarmStarts({**kills.ENV, "HF_HOME": str(home), "HF_TOKEN": TOKENS["environment"]}) as starts:
        yield starts


GIVEN = {
    "as a flag": [f"--hub-token={TOKENS['flag']}"],
    "in a YAML file": [],
}


@pytest.fixture(scope="module")
def finished(demo, tmp_path_factory, with_tokens):
    """{way to give a token: the folder of a complete run with it, what the run printed}."""
    runs = {}
    for way, flags in GIVEN.items():
        folder = tmp_path_factory.mktemp("tokens")
        (folder.parent / "run.yaml").write_text(f"hub_token: {TOKENS['yaml']}\n")
        settings = [] if flags else [folder.parent / "run.yaml"]
        arguments = kills.command(demo.audio, folder / "out", *flags)[2:]
        done = with_tokens.run(*settings, *arguments, cwd=folder)
        assert done.returncode == 0, done.stderr
        runs[way] = folder, done.stdout, done.stderr
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("way", GIVEN)
def test_no_file_and_no_line_of_a_run_holds_a_token(finished, way):
    folder, out, errors = finished[way]
    names = [path.name for path in folder.rglob("*")]
    for name in ("training_args.bin", "metrics.json", "README.md", "run.json", "trainer_state.json"):
        assert name in names
    assert any("tfevents" in name for name in names)
    assert found_tokens(folder, out, errors) == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", f"https://user:{TOKENS['url']}@example.org/google/medasr"],
        ["--dataset", f"https://user:{TOKENS['url']}@example.org/data"],
        ["--model", f"owner/{TOKENS['hub']}"],
        ["--hub_token", TOKENS["flag"], "--hub_tokn", "x"],
        [f"--hub_tokn={TOKENS['flag']}"],
        ["--hub_token", TOKENS["flag"], "--model", "nobody/nothing"],
    ],
    ids=lambda flags: " ".join(flags)[:24],
)
def test_no_message_of_a_refused_run_holds_a_token(tmp_path, with_tokens, flags):
    (tmp_path / "kept").touch()
    model = [] if "--model" in flags else ["--model", MODEL]
    folders = ["--output_dir", "out", "--data_dir", "audio"]
    done = with_tokens.run(*folders, "--use_cpu", "true", *model, *flags, cwd=tmp_path)
    assert done.returncode in (1, 2), done.stdout
    assert error_line(done.stderr)
    assert found_tokens(tmp_path, done.stdout, done.stderr) == []


@pytest.mark.parametrize(
    "line", ["hub_token: {}: wrong", "hub_token: '{}", "[hub_token: {}", "hub_token:\n  - {}\n  x"]
)
def test_no_message_about_a_yaml_file_holds_its_token(tmp_path, line, capfd):
    (tmp_path / "run.yaml").write_text(line.format(TOKENS["hub"]) + "\n")
    assert main([str(tmp_path / "run.yaml")]) == 2
    assert TOKENS["hub"] not in "".join(capfd.readouterr())
    (tmp_path / "run.yaml").write_text(f"hub_token: {TOKENS['yaml']}: wrong\n")
    assert main([str(tmp_path / "run.yaml")]) == 2
    assert TOKENS["yaml"] not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "flag", ["--hub_token=s3cret", "--hub_token s3cret", "--hub-token s3cret", "--hub-token=s3cret"]
)
def test_a_token_on_the_command_line_is_not_written_down(tmp_path, monkeypatch, capfd, flag):
    monkeypatch.setenv("HF_TOKEN", "another")  # so that what the run sets does not outlive the test
    (tmp_path / "texts.jsonl").write_text('{"text": "No fever.", "pred_text": "no fever"}\n')
    arguments = ["--score_file", str(tmp_path / "texts.jsonl"), "--output_dir", str(tmp_path / "out"), *flag.split()]
    assert main(arguments) == 0
    assert "s3cret" not in "".join(capfd.readouterr())
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert written and not any(b"s3cret" in content for content in written)
    assert "--hub" in load_json(tmp_path / "out/results/metrics.json")["config"]["command"]


def test_the_token_of_the_command_line_is_the_one_that_is_used(tmp_path, monkeypatch):
    from huggingface_hub import get_token

    monkeypatch.setenv("HF_TOKEN", "another")
    script.parse_arguments(["--hub_token", "s3cret", "--output_dir", str(tmp_path), "--use_cpu", "true"])
    assert get_token() == "s3cret"


# ---------------------------------------------------------------- models and checkpoints


class Bomb:
    """Pickled, a file that appears when somebody loads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


CODE = """
from pathlib import Path

Path({canary!r}).touch()
from transformers import LasrCTCConfig as Config, LasrForCTC as Model
from transformers import LasrProcessor as Processor, LasrTokenizer as Tokenizer
"""
AUTO_MAPS = {
    "config.json": {"AutoConfig": "evil.Config", "AutoModelForCTC": "evil.Model"},
    "tokenizer_config.json": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
    "processor_config.json": {"AutoProcessor": "evil.Processor"},
}


def hostile_model(folder, changes):
    """A copy of the small model whose JSON files are changed: {file: {key: value}}."""
    shutil.copytree(MODEL, folder)
    for name, settings in changes.items():
        (folder / name).write_text(json.dumps({**load_json(folder / name), **settings}))
    (folder / "evil.py").write_text(CODE.format(canary=str(folder / "canary")))
    return folder


@pytest.mark.parametrize("known", [True, False], ids=["a known class", "an unknown class"])
@pytest.mark.parametrize("name", AUTO_MAPS)
def test_no_code_of_a_model_is_run(tmp_path, name, known, monkeypatch, capfd):
    """Not even where the terminal says yes to a question of the libraries."""
    unknown = {"config.json": {"model_type": "evil"}, "tokenizer_config.json": {"tokenizer_class": "Evil"},
               "processor_config.json": {"processor_class": "Evil"}}  # fmt: skip
    model = hostile_model(tmp_path / "model", {name: {"auto_map": AUTO_MAPS[name], **({} if known else unknown[name])}})
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, noise(1.0), 16_000)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))
    status = main(["--transcribe", str(clip), "--model", str(model), "--use_cpu", "true"])
    out, errors = capfd.readouterr()
    assert not (model / "canary").exists() and "[y/N]" not in out
    assert status in (0, 1) and "unexpected" not in errors
    if status:
        assert "no code of a model is run" in error_line(errors) or not known


def test_weights_in_a_pickle_are_not_loaded(tmp_path, capfd):
    model = hostile_model(tmp_path / "model", {})
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    (tmp_path / "clip.wav").touch()
    assert main(["--transcribe", str(tmp_path / "clip.wav"), "--model", str(model), "--use_cpu", "true"]) == 1
    assert "its weights as safetensors" in error_line(capfd.readouterr().err)
    assert not (tmp_path / "canary").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin"]
)
def test_no_pickle_in_a_checkpoint_is_run(finished, demo, tmp_path, capfd, name):
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(finished["as a flag"][0] / "out/checkpoint-4", checkpoint)
    (checkpoint / name).write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.name != MANIFEST}
    (checkpoint / MANIFEST).write_text(json.dumps(sizes))
    flags = ["--resume_from_checkpoint", str(checkpoint), "--skip_baseline", "--max_steps", "5"]
    status = main(kills.command(demo.audio, tmp_path / "out", *flags)[2:])
    errors = capfd.readouterr().err
    assert not (tmp_path / "canary").exists()
    if name == "training_args.bin":  # nothing reads it
        assert status == 0, errors
    else:
        assert status == 1 and f"{checkpoint} cannot be loaded" in error_line(errors)


@pytest.mark.slow
def test_preparation_writes_nothing_but_its_own_files(demo):
    kinds = {re.sub(r".*(?=\.)", "", path.name) for path in demo.audio.rglob("*") if path.is_file()}
    assert kinds <= {".arrow", ".json", ".lock"}


# ---------------------------------------------------------------- texts

EVIL = (
    "[click](javascript:alert(1)) ![x](http://127.0.0.1/x) <script>alert(1)</script> | `a` *b* $x$ =1+1\n# head\n"
    "---\nlicense: mit"
)
MARKUP = ("<script", "[click](", "![x](", " `a`", "*b*", "$x$", "\n# head", "\n---\nlicense")


def assert_harmless(markdown):
    """Whether EVIL, which is shown, is text alone."""
    for markup in MARKUP:
        assert markup not in markdown.replace("\\", "\0"), markup
    assert "javascript" in markdown, "it is shown"


def test_texts_of_others_stay_texts_in_the_report(tmp_path, capfd):
    """No link, image, HTML, formula or heading of a transcript or name comes alive, and no control of a terminal."""
    people = [f"speaker {number}" for number in range(5)]
    rows = [
        {"text": "word " * 120 + EVIL, "pred_text": "no" if accent == EVIL else "word " * 120,
         "baseline_text": EVIL, "accent": accent, "domain": EVIL,
         "country": EVIL, "gender": EVIL, "age_group": EVIL, "speaker": person, "audio_filepath": "=cmd()\x1b[31m"}
        for accent in (EVIL, "zulu", r"$\frac$ \x1b[31m") for person in people
    ]  # fmt: skip
    rows[7]["text"] = ""
    rows.append({"audio_filepath": EVIL + "\x1b[31m", "text": ""})
    file = tmp_path / "$x$ *b* `a`.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert main(["--score_file", str(file), "--output_dir", str(tmp_path / "out")]) == 0
    report = (tmp_path / "out/results/report.md").read_text()
    assert_harmless(report)
    assert "the worst is \\[click\\]" in report
    assert "\x1b" not in report and "\x1b" not in "".join(capfd.readouterr())
    assert (tmp_path / "out/results/wer_by_accent.png").is_file()


def test_names_of_others_stay_names_in_the_model_card(tmp_path):
    """The front matter of the card holds what the program puts there, whatever a model or a corpus is called."""
    row = {"clip": "a/b", "text": EVIL, "num_samples": 16_000, "speaker": "s", "accent": EVIL, "country": EVIL,
           "domain": EVIL, "gender": EVIL, "age_group": EVIL}  # fmt: skip
    scored, worse = (script.score_texts([row], [text], {EVIL}) for text in (EVIL, "no"))
    data = {"train": {"clips": 1, "hours": 1.0}, "test": {"speakers": 1}, "speakers_in_train_too": {}}
    data["layout"] = "recordings"
    results, final = tmp_path / "results", tmp_path / "final"
    final.mkdir()
    metrics = script.write_results(results, {}, data, {"test": {"baseline": scored, "finetuned": worse}}, EVIL)
    args = script.ScriptArguments(model=EVIL, dataset=EVIL)
    args.command = "python finetune_medasr.py"
    script.write_model_card(final, results, args, metrics)
    card = (final / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    header = yaml.safe_load(front)
    assert header["license"] == "other" and header["model-index"][0]["results"][0]["dataset"]["name"] == EVIL
    assert_harmless(body)


def test_texts_of_others_stay_texts_in_tensorboard():
    dev = script.DevSet(
        make_selection([(EVIL, noise(1.0))], "dev"), small_processor(), label_encoder(), script.ScriptArguments()
    )
    dev.rates([EVIL])
    assert len(dev.samples.splitlines()) == 3, "a header and one row"
    assert_harmless(dev.samples)


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@x", "\t=1", "\n=1", "\r=1", "＝1+1", "＠x"])
def test_no_cell_of_the_skip_list_is_a_formula(cell):
    row = dict.fromkeys(script.SKIPPED_COLUMNS, cell)
    cells = next(csv.reader(io.StringIO(script.csv_lines([row]), newline="")))
    assert all(found == "'" + cell.replace("\r", " ") for found in cells)


def test_a_name_that_the_terminal_cannot_show_does_not_end_the_program(tmp_path):
    for name in ("first", "second"):
        soundfile.write(tmp_path / f"{name}.wav", noise(0.5), 16_000)
    odd = os.fsdecode(bytes(tmp_path) + b"/\xff\xc3\xa9.wav")
    os.rename(tmp_path / "second.wav", odd)
    command = [
        sys.executable,
        SCRIPT,
        "--transcribe",
        tmp_path / "first.wav",
        odd,
        "--model",
        MODEL,
        "--use_cpu",
        "true",
    ]
    done = subprocess.run(command, env={**kills.ENV, "PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
