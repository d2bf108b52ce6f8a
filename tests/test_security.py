"""What others give to the program (models, checkpoints, texts), and tokens that nobody else may read."""

import dataclasses
import io
import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import kills
import pytest
import yaml
from conftest import MODEL, load_json, refused, run_script, succeeded, tensorboard
from helpers import GOOD, TEXT, read_csv, run_main, sound, tone, write, write_table
from huggingface_hub import get_token
from warm import WarmStarts

TOKENS = {"environment": "s3cret-of-the-environment", "file": "s3cret-of-the-file", "flag": "s3cret-of-the-flag",
          "yaml": "s3cret-of-the-yaml-file", "url": "s3cret-of-the-url", "hub": "hf_AbCdEfGhIjKl"}  # fmt: skip


def found_tokens(folder, *printed):
    """[(file or text, token)] of the tokens in any file below a folder, whatever its kind, or in what was printed."""
    contents = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert contents
    contents |= {text[:200]: text.encode() for text in printed}
    return [(name, token) for name, data in contents.items() for token in TOKENS.values() if token.encode() in data]


@pytest.fixture(scope="module")
def with_tokens(tmp_path_factory):
    """Starts the program with tokens in the environment and in the file of `hf auth login`."""
    home = tmp_path_factory.mktemp("home")
    write(home / "token", TOKENS["file"])
    with WarmStarts({**kills.ENV, "HF_HOME": str(home), "HF_TOKEN": TOKENS["environment"]}) as starts:
        yield starts


@pytest.fixture(scope="module")
def finished(demo, tmp_path_factory, with_tokens):
    """The folder of a complete run that was given tokens as a flag and in a YAML file, and what it printed."""
    folder = tmp_path_factory.mktemp("tokens")
    write(folder.parent / "run.yaml", f"hub_token: {TOKENS['yaml']}\n")
    flags = kills.flags(demo.audio, "out", "--max_steps", 2, "--skip_baseline", f"--hub-token={TOKENS['flag']}")
    done = succeeded(with_tokens.run(folder.parent / "run.yaml", *flags, cwd=folder))
    return folder, done.stdout, done.stderr


def test_no_file_and_no_line_of_a_run_holds_a_token(finished):
    folder, out, errors = finished
    names = [path.name for path in folder.rglob("*")]
    for name in ("training_args.bin", "metrics.json", "README.md", "run.json", "trainer_state.json"):
        assert name in names
    assert any("tfevents" in name for name in names)
    assert found_tokens(folder, out, errors) == []


LEAKS = [
    f"--model https://user:{TOKENS['url']}@example.org/google/medasr",
    f"--dataset https://user:{TOKENS['url']}@example.org/data",
    f"--model owner/{TOKENS['hub']}",
    f"--hub_token {TOKENS['flag']} --hub_tokn x",
    f"--hub_tokn={TOKENS['flag']}",
    f"--hub_token {TOKENS['flag']} --model nobody/nothing",
    f"--model nobody/{TOKENS['environment']}",
]


@pytest.mark.parametrize("flags", LEAKS)
def test_no_message_of_a_refused_run_holds_a_token(tmp_path, with_tokens, flags):
    (tmp_path / "kept").touch()
    model = [] if "--model" in flags else ["--model", MODEL]
    done = with_tokens.run("--output_dir", "out", "--data_dir", "audio", *model, *flags.split(), cwd=tmp_path)
    assert done.returncode in (1, 2) and refused(done, done.returncode), done.stdout
    assert found_tokens(tmp_path, done.stdout, done.stderr) == []


BAD_YAML = ["hub_token: {}: wrong", "hub_token: '{}", "[hub_token: {}", "hub_token:\n  - {}\n  x"]


@pytest.mark.parametrize("line", BAD_YAML)
@pytest.mark.parametrize("token", ["hub", "yaml"])
def test_no_message_about_a_yaml_file_holds_its_token(tmp_path, line, token):
    write(tmp_path / "run.yaml", line.format(TOKENS[token]) + "\n")
    assert TOKENS[token] not in refused(run_main(tmp_path, "run.yaml"), 2)


@pytest.mark.parametrize("flag", ["--hub_token=", "--hub_token ", "--hub-token ", "--hub-token="])
def test_a_token_of_the_command_line_is_used_and_not_written_anywhere(tmp_path, monkeypatch, flag):
    monkeypatch.setenv("HF_TOKEN", "another")  # so that what the run sets does not outlive the test
    write(tmp_path / "texts.jsonl", '{"text": "No fever.", "pred_text": "no fever"}\n')
    flags = ["--score_file", "texts.jsonl", "--output_dir", "out", *f"{flag}{TOKENS['flag']}".split()]
    done = succeeded(run_main(tmp_path, *flags))
    assert get_token() == TOKENS["flag"] and found_tokens(tmp_path, done.stdout, done.stderr) == []
    assert "--hub" in load_json(tmp_path / "out/results/metrics.json")["config"]["command"]


@dataclasses.dataclass
class Bomb:
    """Pickled, a file that appears when somebody loads it."""

    path: Path

    def __reduce__(self):
        return Path.touch, (self.path,)


CODE = """
from pathlib import Path

Path({canary!r}).touch()
from transformers import LasrCTCConfig as Config, LasrForCTC as Model
from transformers import LasrProcessor as Processor, LasrTokenizer as Tokenizer"""
AUTO_MAPS = {  # file: (what names code, and a class that the libraries do not know)
    "config.json": ({"AutoConfig": "evil.Config", "AutoModelForCTC": "evil.Model"}, {"model_type": "evil"}),
    "tokenizer_config.json": ({"AutoTokenizer": ["evil.Tokenizer"] * 2}, {"tokenizer_class": "Evil"}),
    "processor_config.json": ({"AutoProcessor": "evil.Processor"}, {"processor_class": "Evil"}),
}


@pytest.mark.parametrize("known", [True, False], ids=["a known class", "an unknown class"])
@pytest.mark.parametrize("name", AUTO_MAPS)
def test_no_code_of_a_model_is_run(tmp_path, name, known, monkeypatch):
    """Not even where the terminal says yes to a question of the libraries."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    auto_map, unknown = AUTO_MAPS[name]
    changes = {"auto_map": auto_map, **({} if known else unknown)}
    write(model / name, json.dumps({**load_json(model / name), **changes}))
    write(model / "evil.py", CODE.format(canary=str(model / "canary")))
    write(tmp_path / "clip.wav", GOOD)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))
    done = run_main(tmp_path, "--transcribe", "clip.wav", "--model", model)
    assert not (model / "canary").exists() and "[y/N]" not in done.stdout
    assert "report it" not in done.stderr
    assert done.returncode == 0 or refused(done, 1, "cannot be loaded")


def test_weights_in_a_pickle_are_not_loaded(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    write(tmp_path / "model/pytorch_model.bin", pickle.dumps(Bomb(tmp_path / "canary")))
    write(tmp_path / "clip.wav", GOOD)
    refused(run_main(tmp_path, "--transcribe", "clip.wav", "--model", "./model"), 1, "safetensors")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_no_pickle_in_a_checkpoint_is_run(finished, demo, tmp_path, name):
    shutil.copytree(finished[0] / "out/checkpoint-2", tmp_path / "checkpoint-2")
    write(tmp_path / "checkpoint-2" / name, pickle.dumps(Bomb(tmp_path / "canary")))
    flags = ["--max_steps", 3, "--skip_baseline", "--resume_from_checkpoint", "checkpoint-2"]
    done = run_main(tmp_path, *kills.flags(demo.audio, "out", *flags))
    assert not (tmp_path / "canary").exists()
    if name == "training_args.bin":  # nothing reads it
        succeeded(done)
    else:
        refused(done, 1, "checkpoint-2")


EVIL = "[click](javascript:alert(1)) ![x](http://127.0.0.1/x) <script>alert(1)</script> | `a` *b* $x$ =1+1"
EVIL += "\n# head\n---\nlicense: mit"
MARKUP = ("<script", "[click](", "![x](", " `a`", "*b*", "$x$", "\n# head", "\n---\nlicense")


def assert_harmless(markdown):
    """That EVIL, which is shown, is text alone."""
    for markup in MARKUP:
        assert markup not in markdown.replace("\\", "\0"), markup
    assert "javascript" in markdown, "it is shown"


def test_texts_of_others_stay_texts_in_the_report(tmp_path):
    """No link, image, HTML, formula or heading of a transcript or name comes alive, and no control of a terminal."""
    rows = [
        {"text": "word " * 120 + EVIL, "pred_text": "no" if accent == EVIL else "word " * 120, "baseline_text": EVIL,
         "accent": accent, "speaker": person, "audio_filepath": "=cmd()\x1b[31m",
         **dict.fromkeys(("domain", "country", "gender", "age_group"), EVIL)}
        for accent in (EVIL, "zulu", r"$\frac$ \x1b[31m") for person in "abcde"
    ]  # fmt: skip
    rows[7]["text"] = ""
    rows.append({"audio_filepath": EVIL + "\x1b[31m", "text": ""})
    write_table(tmp_path / "$x$ *b* `a`.jsonl", rows)
    done = succeeded(run_main(tmp_path, "--score_file", "$x$ *b* `a`.jsonl", "--output_dir", "out"))
    report = (tmp_path / "out/results/report.md").read_text()
    assert_harmless(report)
    assert "\x1b" not in report and "\x1b" not in done.stdout + done.stderr
    assert (tmp_path / "out/results/wer_by_accent.png").is_file()


def test_texts_and_names_of_others_stay_so_in_the_card_tensorboard_and_skip_list(tmp_path, warm):
    """The front matter of the card holds what the program puts there, whatever a model or a corpus is called."""
    name = EVIL.replace("/", "_").replace("\n", " ")
    shutil.copytree(MODEL, tmp_path / name)
    cells = {"text": f"{TEXT} {EVIL}", **dict.fromkeys(("accent", "country", "domain", "gender"), EVIL)}
    formulas = ["=1+1", "+1", "-1", "@x", "\t=1", "\n=1", "\r=1", "＝1+1", "＠x"]
    splits = ("train", "dev", "test")
    rows = [{"file_name": f"{split}.wav", "split": split, "speaker": split, **cells} for split in splits]
    rows += [{"file_name": f"{number}.wav", "split": "train", "speaker": "a", "accent": cell, "text": cell}
             for number, cell in enumerate(formulas)]  # fmt: skip
    write_table(tmp_path / "own" / name / "metadata.csv", rows)
    for row in rows[:3]:
        write(tmp_path / "own" / name / row["file_name"], sound(tone(20)))
    flags = """--max_steps 1 --eval_steps 1 --save_steps 1 --gradient_accumulation_steps 1 --num_proc 1 --use_cpu true
        --dataloader_num_workers 0 --data_dir audio --output_dir out""".split()
    succeeded(warm.run(*flags, "--model", name, "--dataset", f"own/{name}", cwd=tmp_path))
    card = (tmp_path / "out/final/README.md").read_text()
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    header = yaml.safe_load(front)
    assert header["license"] == "other" and "click" in header["model-index"][0]["results"][0]["dataset"]["name"]
    assert_harmless(re.sub("(?m)^Made with.*", "", body))  # the command, in a block of code
    events = tensorboard(tmp_path / "out/runs")
    shown = [event.tensor_proto.string_val for tag in events.Tags()["tensors"] for event in events.Tensors(tag)]
    texts = [text.decode() for texts in shown for text in texts if b"javascript" in text]
    assert_harmless(next(text for text in texts if not text.startswith("{")))  # those are settings, as JSON
    texts = [row["text"] for row in read_csv(tmp_path / "out/results/skipped_clips.csv")]
    assert texts == ["'" + cell.replace("\r", " ") for cell in formulas]


def test_a_name_that_the_terminal_cannot_show_does_not_end_the_program(tmp_path):
    for name in ("a.wav", "é.wav"):
        write(tmp_path / name, GOOD)
    flags = ["--transcribe", tmp_path / "a.wav", tmp_path / "é.wav", "--model", MODEL, "--use_cpu", "true"]
    done = run_script(*flags, cwd=tmp_path, env={**kills.ENV, "PYTHONIOENCODING": "ascii"})
    assert "\\xe9.wav" in succeeded(done).stdout
