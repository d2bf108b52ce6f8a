"""Kinds of bad input, each through the command line: exit status, message, and what is used of it all the same."""

import ctypes
import gzip
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import CORPUS, MODEL, SCRIPT, error_line, load_json, load_predictions, run_script

from finetune_medasr import MANIFEST, main

RATE = 16_000
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(capfd, *arguments):
    """(exit status, stdout, stderr) of the program in this process."""
    capfd.readouterr()
    status = main([str(argument) for argument in arguments])
    return status, *capfd.readouterr()


def refused(capfd, arguments, status, message):
    """Assert that a command line ends with `status` and one line that matches `message`; returns its stdout."""
    found, out, errors = run(capfd, *arguments)
    assert re.search(message, error_line(errors)), errors
    assert found == status and "unexpected" not in errors
    return out


# ---------------------------------------------------------------- flags


FLAGS = [  # (flags, what the message says)
    ("--domains clinicl", "--domains.*'clinicl'.*clinical.*general"),
    ("--countries XXX", "--countries has 'XXX'"),
    ("--max_train_samples -3", "--max_train_samples is -3"),
    ("--streaming --max_steps 2 --max_train_samples 3", "--max_train_samples cannot be used with --streaming"),
    ("--max_eval_samples 0", "--max_eval_samples is 0"),
    ("--max_train_samples many", "--max_train_samples.*'many'"),
    ("--max_train_seconds nan", "--max_train_seconds is nan"),
    ("--max_train_seconds inf", "--max_train_seconds is inf"),
    ("--num_proc 0", "--num_proc is 0"),
    ("--learning_rate 0", "--learning_rate is 0"),
    ("--learning_rate nan", "--learning_rate is nan"),
    ("--learning_rate inf", "--learning_rate is inf.*finite"),
    ("--learning_rate=-1e-5", "--learning_rate is -1e-05"),
    ("--learning_rate", "--learning_rate"),
    ("--num_train_epochs inf", "--num_train_epochs is inf.*finite"),
    ("--num_train_epochs 0", "--num_train_epochs is 0"),
    ("--max_steps 0", "--max_steps is 0"),
    ("--max_steps -7", "--max_steps is -7"),
    ("--warmup_steps nan", "--warmup_steps is nan"),
    ("--warmup_steps -1", "--warmup_steps is -1"),
    ("--weight_decay nan", "--weight_decay is nan"),
    ("--max_grad_norm inf", "--max_grad_norm is inf"),
    ("--adam_epsilon nan", "--adam_epsilon is nan"),
    ("--weight_decay heavy", "--weight_decay.*'heavy'"),
    ("--per_device_train_batch_size 0", "--per_device_train_batch_size is 0"),
    ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps is 0"),
    ("--eval_steps 0", "--eval_steps is 0"),
    ("--logging_steps 0.5", "--logging_steps.*'0.5'"),
    ("--save_total_limit -1", "--save_total_limit is -1"),
    ("--save_steps 300 --eval_steps 200", "--save_steps 300.*--eval_steps 200"),
    ("--save_steps 300 --eval_steps 200 --eval_strategy steps", "300 is not a.*multiple|round multiple"),
    ("--window_seconds 1", "--window_seconds is 1.*6"),
    ("--window_seconds nan", "--window_seconds"),
    ("--early_stopping_patience -1", "--early_stopping_patience is -1"),
    ("--dataloader_num_workers -1", "--dataloader_num_workers is -1"),
    ("--seed -1", "--seed is -1"),
    ("--seed 4294967296", r"--seed is 4294967296.*2\*\*32"),
    ("--target_text spoken", "'spoken'.*as_written.*words"),
    ("--report_to foo", "foo is not supported.*tensorboard"),
    ("--metric_for_best_model foo", "--metric_for_best_model is foo.*wer"),
    ("--remove_unused_columns true", "--remove_unused_columns is True.*leave"),
    ("--length_column_name foo", "--length_column_name is foo.*leave"),
    ("--label_smoothing_factor 0.1", "--label_smoothing_factor is 0.1.*leave"),
    ("--accelerator_config foo", "foo"),
    ("--deepspeed foo.json", "deepspeed"),
    ("--lr_scheduler_type foo", "--lr_scheduler_type.*'foo'"),
    ("--eval_strategy epoch", "strategy"),
    ("--use_cpu perhaps", "--use_cpu"),
    ("--fp16 --bf16", "--fp16 and --bf16"),
    ("--streaming", "--streaming needs --max_steps"),
    ("--dry_run --prepare_only", "--dry_run|--prepare_only"),
    ("--eval_only --transcribe {corpus}/accents.json", "--eval_only and --transcribe"),
    ("--learnin_rate 3", "--learnin_rate.*--learning_rate"),
    ("--acents yoruba", "--acents.*--accents"),
    ("--weight_decai=3", "--weight_decai.*--weight_decay"),
    ("--dataset ./nowhere", "--dataset is ./nowhere"),
    ("--dataset=", "--dataset is empty"),
    ("--model ~/nowhere-at-all", "--model is ~/nowhere-at-all"),
    ("--model=", "--model is empty"),
    ("--transcribe nowhere.wav", "--transcribe is nowhere.wav"),
    ("--transcribe {corpus}/transcripts", "--transcribe is .*no audio file"),
    ("--score_file nowhere.csv", "--score_file is nowhere.csv"),
    ("--score_file=", "--score_file is .*no such file"),
    ("--output_dir=", "--output_dir is empty"),
    ("--data_dir=", "--data_dir is empty"),
    ("--output_dir {tmp}/file", "--output_dir is .*is a file"),
    ("--output_dir {tmp}/file/below", "--output_dir is .*is a file"),
    ("--data_dir {tmp}/file", "--data_dir is .*is a file"),
    ("--output_dir {tmp} --data_dir {tmp}/results/audio", "--data_dir is .*replaces"),
    ("--output_dir {tmp} --data_dir {tmp}/final", "--data_dir is .*replaces"),
    ("--output_dir {tmp} --data_dir {tmp}/checkpoint-7", "--data_dir is .*replaces"),
    ("--output_dir {tmp} --model {tmp}/final --overwrite_output_dir", "would delete --model"),
    ("--output_dir {tmp} --dataset {tmp}/runs --overwrite_output_dir", "would delete --dataset"),
    ("--output_dir {tmp} --resume_from_checkpoint {tmp}/checkpoint-7 --overwrite_output_dir", "would delete --resume"),
    ("--resume_from_checkpoint nowhere", "--resume_from_checkpoint is nowhere: there is no such folder"),
    ("--resume_from_checkpoint {tmp}/file", "--resume_from_checkpoint.*no such folder"),
    ("--resume_from_checkpoint {tmp}/final", "--resume_from_checkpoint.*not finished"),
    ("nowhere.yaml", "nowhere.yaml"),
    ("{tmp}/broken.yaml", "broken.yaml"),
    ("{tmp}/list.yaml", "list.yaml holds a list"),
    ("{tmp}/text.yaml", "text.yaml holds a str"),
    ("{tmp}/typo.yaml", "learnin_rate.*--learning_rate"),
    ("{tmp}/nested.yaml", "training"),
    ("{tmp}/binary.yaml", "binary.yaml cannot be read"),
    ("{tmp}/python.yaml", "python.yaml cannot be read"),
    ("{tmp}", "cannot be read as a YAML file"),
]
YAML = {
    "broken": b"accents: [yoruba,\nseed: }",
    "list": b"- seed\n- 7\n",
    "text": b"just words",
    "typo": b"learnin_rate: 1e-5\n",
    "nested": b"training:\n  seed: 7\n",
    "binary": b"\xff\xfe\0\x80",
    "python": b"seed: !!python/object/apply:os.system ['true']\n",
}


@pytest.mark.parametrize("flags, message", FLAGS, ids=[flags for flags, _ in FLAGS])
def test_flags_that_cannot_work_are_refused(tmp_path, capfd, flags, message):
    (tmp_path / "file").write_text("not a folder")
    for folder in ("final", "runs", "checkpoint-7"):
        (tmp_path / folder).mkdir()
    for name, content in YAML.items():
        (tmp_path / f"{name}.yaml").write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    assert refused(capfd, flags.format(tmp=tmp_path, corpus=CORPUS).split(), 2, message) == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flags", ["--seed -1", "--learnin_rate 3", "--save_steps 300 --eval_steps 200", "{tmp}/no"])
def test_a_refusal_does_not_wait_for_torch(tmp_path, flags):
    launcher = [sys.executable, "-X", "importtime"]
    done = run_script(*flags.format(tmp=tmp_path).split(), cwd=tmp_path, launcher=launcher, env=OFFLINE)
    assert done.returncode == 2
    assert not re.search(r"\| +(torch|datasets|librosa)$", done.stderr, re.MULTILINE)


# ---------------------------------------------------------------- score files

ROW = '{"text": "No fever.", "pred_text": "no fever"}\n'
SCORE_FILES = [  # (name, content, exit status, what is said)
    ("x.jsonl", "not JSON\n", 2, "neither JSON lines nor CSV"),
    ("x.jsonl", ROW + '{"text": "a", "pred', 2, "neither JSON lines nor CSV"),
    ("x.jsonl", "[" * 100_000, 2, "neither JSON lines nor CSV"),
    ("x.jsonl", "[1, 2]\n", 2, "row 1 is not an object"),
    ("x.jsonl", '"text"\n', 2, "row 1 is not an object"),
    ("x.jsonl", "", 2, "no row with both text and pred_text among 0"),
    ("x.jsonl", b"\xff\xfe\0\1", 2, "neither JSON lines nor CSV"),
    ("x.jsonl", b"\xff\xfe" + b"\1", 2, "--score_file"),
    ("x.jsonl", '{"text": "a"}\n', 2, "no row with both text and pred_text among 1"),
    ("x.jsonl", '{"text": 1, "pred_text": 2}\n', 2, "no row with both"),
    ("x.jsonl", '{"text": "...", "pred_text": "a"}\n', 2, "no text with a word"),
    ("x.csv", "reference,hypothesis\na,b\n", 2, "no column text; its columns are reference, hypothesis"),
    ("x.csv", "text,hypothesis\na,b\n", 2, "no column pred_text"),
    ("x.csv", "", 2, "no column text; its columns are none"),
    ("x.csv", "text,pred_text\n", 2, "no row with both text and pred_text among 0"),
    ("x.csv", "version https://git-lfs.github.com/spec/v1\n", 2, "Git LFS pointer"),
    ("x.jsonl", ROW + '{"text": "a", "pred_text": "a", "duration": -5}', 0, "2 rows without a duration"),
    ("x.jsonl", ROW + '{"text": "a", "pred_text": "a", "duration": 1e306}', 0, "2 rows without a duration"),
    ("x.jsonl", ROW + '{"text": "a", "pred_text": "a", "duration": NaN}', 0, "2 rows without a duration"),
    ("x.jsonl", ROW + '{"text": "a", "pred_text": "a", "duration": [1]}', 0, "2 rows without a duration"),
    ("x.jsonl", ROW + '{"text": "a\\ud800", "pred_text": "a"}', 0, "2 rows without a duration"),
    ("x.jsonl", ROW + '{"text": "שלום 😀", "pred_text": "a"}', 0, "2 rows without a duration"),
    ("x.jsonl", b"\xef\xbb\xbf" + ROW.encode(), 0, "1 row without a duration"),
    ("x.jsonl", ROW.encode("utf-16"), 0, "1 row without a duration"),
    ("x.jsonl", ROW + '{"text": "", "pred_text": "a"}', 0, "Row 2 .*no text: left out"),
    ("x.jsonl", ROW + '{"text": "a", "pred_text": "a", "baseline_text": "b"}', 0, "no comparison is made"),
    ("x.CSV", "text,pred_text\r\na,b\r\n", 0, "1 row without a duration"),
    ("x.tsv", "text\tpred_text\na\tb\n", 0, "1 row without a duration"),
    ("x.csv", "text;pred_text\na;b\n", 0, "1 row without a duration"),
    ("x.csv", "text,pred_text\na\nc,d\n", 0, "Row 1 .*no pred_text: left out"),
    ("x.csv", "text,pred_text\nfever, cough,fever\nc,d,\n", 0, "Row 1 .*more cells than columns: left out"),
    ("x.csv", 'text,pred_text\n"a,b\nc,d\n', 0, "1 unclosed quote, the first in line 2"),
    ("x.csv", "text,pred_text\na\0,b\n", 0, "1 row without a duration"),
    ("x.csv", b"text,pred_text\ncaf\xe9,b\n", 0, "it is not UTF-8"),
    ("x.csv", "text,pred_text\n" + "a " * 100_000 + ",b\n", 0, "1 row without a duration"),
]


@pytest.mark.parametrize("name, content, status, message", SCORE_FILES, ids=range(len(SCORE_FILES)))
def test_score_files(tmp_path, capfd, name, content, status, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = ["--score_file", path, "--output_dir", tmp_path / "out"]
    if status:
        refused(capfd, arguments, status, message)
        assert str(path) in run(capfd, *arguments)[2] and not (tmp_path / "out").exists()
        return
    found, _, warnings = run(capfd, *arguments)
    assert found == 0 and re.search(message, warnings), warnings
    scored = load_json(tmp_path / "out/results/metrics.json")["data"]["test"]
    assert scored["left_out"] == warnings.count("left out") and scored["hours"] == 0
    assert scored["clips"] == len(load_predictions(tmp_path / "out/results"))


# ---------------------------------------------------------------- audio and texts

TEXT = "The patient has a fever."


def sound(samples, rate=RATE, format="WAV", subtype="PCM_16"):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def tone(seconds=3.0, rate=RATE):
    return 0.1 * np.sin(np.arange(round(seconds * rate)) * 2 * np.pi * 440 / rate)


def with_rate(audio, rate):
    """A WAV file whose header claims another rate."""
    return audio[:24] + struct.pack("<II", rate, 2 * rate) + audio[32:]


def flac_bomb():
    """270 kB of FLAC that decode to 1 GB of float32: silence in 8 channels."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", RATE, 8, format="FLAC", subtype="PCM_16") as file:
        silence = np.zeros((1 << 20, 8), np.int16)
        for _ in range(30):
            file.write(silence)
    return buffer.getvalue()


GOOD = sound(tone())
NO_TEXT = "no text left that the tokenizer covers"
CLIPS = {  # name: (audio, text, why it is left out of training, why out of the test; "" where it is used)
    "good": (GOOD, TEXT, "", ""),
    "empty-file": (b"", TEXT, "undecodable audio", "undecodable audio"),
    "html": (b"<html>Service unavailable</html>", TEXT, "undecodable audio", "undecodable audio"),
    "zip": (b"PK\3\4" + bytes(200), TEXT, "undecodable audio", "undecodable audio"),
    "header-alone": (GOOD[:44], TEXT, "no audio samples", "no audio samples"),
    "zero-samples": (sound(tone(0)), TEXT, "no audio samples", "no audio samples"),
    "half-a-header": (GOOD[:20], TEXT, "undecodable audio", "undecodable audio"),
    "truncated": (GOOD[: len(GOOD) // 2], TEXT, "", ""),
    "one-sample": (sound(tone(1 / RATE)), TEXT, "too short: 0.00 s", ""),
    "8-khz": (sound(tone(rate=8_000), 8_000), TEXT, "", ""),
    "96-khz": (sound(tone(rate=96_000), 96_000), TEXT, "", ""),
    "8-channels": (sound(np.tile(tone()[:, None], 8)), TEXT, "", ""),
    "float": (sound(tone(), subtype="FLOAT"), TEXT, "", ""),
    "8-bit": (sound(tone(), subtype="PCM_U8"), TEXT, "", ""),
    "nan": (sound(tone() * np.nan, subtype="FLOAT"), TEXT, "samples that are not numbers", "that are not numbers"),
    "infinite": (sound(tone() + np.inf, subtype="FLOAT"), TEXT, "samples that are not numbers", "that are not numbers"),
    "loud": (sound(tone() * 1e30, subtype="FLOAT"), TEXT, "", ""),
    "dc": (sound(np.full(3 * RATE, 0.5)), TEXT, "", ""),
    "silence": (sound(np.zeros(3 * RATE)), TEXT, "", ""),
    "clipped": (sound(np.sign(tone())), TEXT, "", ""),
    "302-seconds": (sound(tone(302), format="FLAC"), TEXT, "over --max_train_seconds: 302.0 s", ""),
    "bomb": (flac_bomb(), TEXT, "undecodable audio .*1 GB", "undecodable audio .*1 GB"),
    "1-hz": (with_rate(sound(tone(1.25)), 1), TEXT, "undecodable audio", "undecodable audio"),  # 1.3 GB at 16 kHz
    "0-hz": (with_rate(GOOD, 0), TEXT, "undecodable audio", "undecodable audio"),
    "empty-text": (GOOD, "", "empty text", "empty text"),
    "blank-text": (GOOD, " \u00a0\n\t", "empty text", "empty text"),
    "punctuation": (GOOD, "?!...", "", ""),
    "uncovered": (GOOD, "漢字", NO_TEXT, ""),
    "right-to-left": (GOOD, "שלום", NO_TEXT, ""),
    "emoji": (GOOD, "😀 😷", NO_TEXT, ""),
    "zero-width": (GOOD, "\u200b\u200d", NO_TEXT, ""),
    "10000-characters": (GOOD, "a fever " * 1_250, "more labels than frames", ""),
    "html-text": (GOOD, "<b>fever</b>", "", ""),
    "formula": (GOOD, "=1+1", "", ""),
    "no-audio": (None, TEXT, "no audio", "no audio"),
    "no-transcript": (GOOD, None, "no transcript", "no transcript"),
}

# ---------------------------------------------------------------- archives

HEADER = "user_ids,accent,transcript,audio_paths,duration,domain,country,split"


def member(name):
    return f"data/data/intron/{name}.wav"


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


def csv_row(name, text=TEXT, split="train", duration="3"):
    accent = name.split("/")[0]
    return f"someone,{accent},{quoted(text)},/AfriSpeech-100/{split}/{name}.wav,{duration},clinical,NG,{split}\n"


def tar(members, mode="w:gz"):
    """A tar archive of (name, bytes or the letter of a kind of member) pairs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content.encode(), "/etc/hostname"
                file.addfile(info)
    return buffer.getvalue()


def noisy(accent):
    """Ten clips that gzip cannot make small, so that damage in the middle falls between clips."""
    generator = np.random.default_rng(0)
    clips = [(member(f"{accent}/{index}"), sound(generator.uniform(-0.5, 0.5, 8_000))) for index in range(10)]
    return tar(clips)


def two(accent, *more):
    """Members of an archive: two good clips, the others between them."""
    return [(member(f"{accent}/first"), GOOD), *more, (member(f"{accent}/second"), GOOD)]


def huge():
    """A member that claims 2 GB, and an archive that ends there."""
    info = tarfile.TarInfo(member("huge/second"))
    info.size = 2_000_000_000
    return gzip.compress(tar(two("huge"), "w")[: 512 + (len(GOOD) + 511) // 512 * 512] + info.tobuf())


def spoiled(archive, how):
    middle = len(archive) // 2
    return {
        "cut": archive[:middle],
        "corrupt": archive[:middle] + bytes(100) + archive[middle + 100 :],
        "trailer": archive[:-8] + struct.pack("<I", ~zlib.crc32(b"") & 0xFFFFFFFF) + archive[-4:],
    }[how]


def bad_header(accent):
    """A tar whose second header holds no number where the size should be."""
    data = bytearray(tar(two(accent), "w"))
    second = 512 + (len(GOOD) + 511) // 512 * 512
    data[second + 124 : second + 136] = b"not a number"
    return gzip.compress(bytes(data))


BOTH = ["first", "second"]
DAMAGED = "^damaged archive"
ARCHIVES = {  # accent: (archive, clips used, {clip or archive: why it is left out})
    "climbs": (tar(two("climbs", ("../../../outside/climbs.wav", GOOD))), BOTH, {"outside/climbs.wav": "climbs out"}),
    "absolute": (tar(two("absolute", ("/tmp/outside/absolute.wav", GOOD))), BOTH, {"outside/absolute": "climbs out"}),
    "symlink": (tar(two("symlink", (member("symlink/x"), "2"))), BOTH, {"symlink/x.wav": "link or a device"}),
    "hardlink": (tar(two("hardlink", (member("hardlink/x"), "1"))), BOTH, {"hardlink/x.wav": "link or a device"}),
    "fifo": (tar(two("fifo", (member("fifo/x"), "6"))), BOTH, {"fifo/x.wav": "link or a device"}),
    "device": (tar(two("device", (member("device/x"), "3"))), BOTH, {"device/x.wav": "link or a device"}),
    "nested": (tar(two("nested", ("data/inner.tar.gz", tar([])))), BOTH, {"data/inner.tar.gz": "no transcript"}),
    "folders": (tar(two("folders", ("data/data", "5"))), BOTH, {}),
    "twice": (tar(two("twice", (member("twice/first"), GOOD))), BOTH, {"twice/first.wav": "a second copy"}),
    "plain-tar": (tar(two("plain-tar"), "w"), BOTH, {}),
    "no-members": (tar([]), [], {"no-members/first.wav": "no audio", "no-members/second.wav": "no audio"}),
    "nothing": (b"", [], {"train_nothing_0": DAMAGED, "nothing/first.wav": "no audio"}),
    "html-page": (b"<html>Service unavailable</html>", [], {"train_html-page_0": DAMAGED}),
    "gzip-of-text": (gzip.compress(b"text" * 999), [], {"train_gzip-of-text_0": DAMAGED}),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", [], {"train_lfs_0": DAMAGED + ".*git lfs pull"}),
    "huge": (huge(), ["first"], {"huge/second.wav": "over 1 GB|no audio", "train_huge_0": DAMAGED}),
    "bad-header": (bad_header("bad-header"), ["first"], {"train_bad-header_0": DAMAGED + ".*1 clip of it kept"}),
    **{
        how: (spoiled(noisy(how), how), [str(index) for index in range(used)], {f"train_{how}_0": DAMAGED})
        for how, used in (("cut", 4), ("corrupt", 4), ("trailer", 10))
    },
}

# ---------------------------------------------------------------- CSVs that are read


def two_rows(accent, first=TEXT, second=TEXT):
    return HEADER + "\n" + csv_row(f"{accent}/first", first) + csv_row(f"{accent}/second", second)


def bare(accent, quote=""):
    """A CSV whose first text has no quotes but an opening one that nothing closes."""
    return two_rows(accent).replace(quoted(TEXT), quote + "text", 1)


CSVS = {  # accent: (CSV, texts of its clips, what is warned of)
    "crlf": (two_rows("crlf").replace("\n", "\r\n"), [TEXT, TEXT], ""),
    "bom": ("\ufeff" + two_rows("bom"), [TEXT, TEXT], ""),
    "utf-16": (two_rows("utf-16", "café").encode("utf-16"), ["café", TEXT], ""),
    "latin-1": (two_rows("latin-1", "café").encode("latin-1"), ["café", TEXT], "it is not UTF-8"),
    "semicolons": (bare("semicolons").replace(",", ";"), ["text", TEXT], ""),
    "tabs": (two_rows("tabs").replace(",", "\t"), [TEXT, TEXT], ""),
    "extra-column": (re.sub(r"(?m)$(?=\n)", ",more", two_rows("extra-column")), [TEXT, TEXT], ""),
    "no-domain": (two_rows("no-domain").replace(",domain", ",x"), [TEXT, TEXT], ""),
    "old-name": (two_rows("old-name").replace("audio_paths", "audio_path"), [TEXT, TEXT], ""),
    "nul-bytes": (two_rows("nul-bytes").replace("fever", "fe\0ver"), [TEXT, TEXT], ""),
    "short-row": (re.sub(r",3,clinical.*\n$", "\n", two_rows("short-row")), [TEXT, TEXT], ""),
    "blank-lines": (two_rows("blank-lines").replace("\n", "\n\n"), [TEXT, TEXT], ""),
    "duplicates": (two_rows("duplicates") + csv_row("duplicates/first", "another"), [TEXT, TEXT], ""),
    "quoted-newline": (two_rows("quoted-newline", 'He said "no"\nto it'), ['He said "no"\nto it', TEXT], ""),
    "unclosed": (bare("unclosed", '"'), ["text", TEXT], "1 unclosed quote, the first in line 2"),
    "unclosed-last": (
        two_rows("unclosed-last", second="words").replace('"words"', '"words'),
        [TEXT, "words"],
        "1 unclosed quote, the first in line 3",
    ),
    "quote-inside": (two_rows("quote-inside").replace(quoted(TEXT), '"no" fever', 1), ["no fever", TEXT], ""),
    # More text after the quote than the csv module takes by default.
    "unclosed-long": (
        bare("unclosed-long", '"') + csv_row("unclosed-long/x").replace('"', "") * 3_000,
        ["text", TEXT],
        "unclosed quote",
    ),
    **{
        name: (two_rows(name).replace(",3,", f",{number},"), [TEXT, TEXT], "")
        for name, number in (("nan-seconds", "nan"), ("infinite-seconds", "inf"), ("1e30-seconds", "1e30"))
    },
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def add_accent(corpus, accent, archive, table, split="train"):
    write(corpus / "audio" / accent / split / f"{split}_{accent}_0.tar.gz", archive)
    write(corpus / "transcripts" / accent / f"{split}.csv", table)


def rows_of(accent, names, split="train"):
    return HEADER + "\n" + "".join(csv_row(f"{accent}/{name}", split=split) for name in names)


@pytest.fixture(scope="module")
def horrors(tmp_path_factory, warm):
    """One whole run, in a process of its own, on a corpus in which next to everything is bad."""
    folder = tmp_path_factory.mktemp("horrors")
    corpus = folder / "corpus"
    for split in ("train", "dev", "test"):
        clips = CLIPS if split != "dev" else {"good": CLIPS["good"]}
        members = [(member(f"clips/{name}"), audio) for name, (audio, *_) in clips.items() if audio is not None]
        texts = {name: text for name, (_, text, *_) in clips.items() if text is not None}
        table = HEADER + "\n" + "".join(csv_row(f"clips/{name}", text, split) for name, text in texts.items())
        add_accent(corpus, "clips", tar(members), table, split)
    for accent, (archive, *_) in ARCHIVES.items():
        names = [str(index) for index in range(10)] if accent in ("cut", "corrupt", "trailer") else [*BOTH, "x"]
        add_accent(corpus, accent, archive, rows_of(accent, names))
    for accent, (table, *_) in CSVS.items():
        add_accent(corpus, accent, tar(two(accent)), table)
    before = {path: path.read_bytes() for path in corpus.rglob("*") if path.is_file()}
    flags = f"""--dataset {corpus} --data_dir audio --output_dir out --model {MODEL} --max_steps 1 --num_proc 2
        --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --eval_steps 1 --save_steps 1 --skip_baseline
        --dataloader_num_workers 0 --use_cpu true""".split()
    done = warm.run(*flags, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    from datasets import Dataset

    prepared = {}
    for path in (folder / "audio").glob("*/*.arrow"):
        for clip in Dataset.from_file(str(path)):
            prepared.setdefault((clip["split"], clip["clip"]), clip)
    return SimpleNamespace(
        folder=folder, corpus=corpus, before=before, stderr=done.stderr, prepared=prepared, skipped=skipped(folder)
    )


def skipped(folder):
    """[(split, clip, reason)] of skipped_clips.csv."""
    import csv

    with open(folder / "out/results/skipped_clips.csv", newline="", encoding="utf-8") as file:
        return [(row["split"], row["clip"], row["reason"]) for row in csv.DictReader(file)]


def reasons(horrors, split, clip):
    return [reason for of, name, reason in horrors.skipped if of == split and clip in name]


@pytest.mark.slow
@pytest.mark.parametrize("split, column", [("train", 2), ("test", 3)])
@pytest.mark.parametrize("name", CLIPS)
def test_each_bad_clip_is_left_out_for_its_reason_or_used(horrors, name, split, column):
    expected = CLIPS[name][column]
    found = reasons(horrors, split, f"clips/{name}.wav")
    if expected:
        assert len(found) == 1 and re.search(expected, found[0]), found
        return
    assert found == []
    clip = horrors.prepared[split, f"clips/{name}.wav"]
    assert not clip["problem"] and soundfile.info(io.BytesIO(clip["audio"])).frames == clip["num_samples"] > 0
    if split == "test":
        results = load_predictions(horrors.folder / "out/results")
        assert [row["text"] for row in results if row["audio_filepath"] == f"clips/{name}.wav"] == [CLIPS[name][1]]


@pytest.mark.slow
@pytest.mark.parametrize("accent", ARCHIVES)
def test_each_bad_archive_gives_what_can_be_had(horrors, accent):
    _, used, left_out = ARCHIVES[accent]
    names = [name for _, name in horrors.prepared if name.startswith(f"{accent}/")]
    found = {name for name in names if not reasons(horrors, "train", name)}
    if accent in ("cut", "corrupt"):  # where gzip stops decoding is its own affair
        assert 2 <= len(found) <= 6
        assert reasons(horrors, "train", f"audio/{accent}/")[0].endswith(f"{len(found)} clips of it kept")
    elif accent == "twice":  # the first copy is used
        assert not horrors.prepared["train", "twice/first.wav"]["problem"]
    else:
        assert found == {f"{accent}/{name}.wav" for name in used}
    for name, reason in left_out.items():
        assert any(re.search(reason, text) for text in reasons(horrors, "train", name)), horrors.skipped
    if accent in ("cut", "corrupt", "trailer"):
        absent = {f"{accent}/{index}.wav" for index in range(10)} - found
        assert all(reasons(horrors, "train", name) == ["no audio"] for name in absent)


@pytest.mark.slow
@pytest.mark.parametrize("accent", CSVS)
def test_each_odd_csv_is_read_and_said_to_be_odd(horrors, accent):
    _, texts, warning = CSVS[accent]
    clips = [horrors.prepared["train", f"{accent}/{name}.wav"] for name in BOTH]
    assert [clip["text"] for clip in clips] == texts and not any(clip["problem"] for clip in clips)
    assert clips[0]["domain"] == ("" if accent == "no-domain" else "clinical")
    warnings = [line for line in horrors.stderr.splitlines() if f"transcripts/{accent}/train.csv" in line]
    assert len(warnings) == bool(warning) and all(warning in line for line in warnings)


@pytest.mark.slow
def test_nothing_is_written_but_what_was_asked_for(horrors):
    assert {path: path.read_bytes() for path in horrors.before} == horrors.before
    assert {path.name for path in horrors.folder.iterdir()} == {"corpus", "audio", "out"}
    assert not list(horrors.folder.parent.rglob("climbs.wav")) and not Path("/tmp/outside").exists()


# ---------------------------------------------------------------- CSVs and corpora that leave nothing

REFUSED_CSVS = {
    "no transcript": (two_rows("x").replace("transcript", "words"), "no column transcript; its columns are user_ids, "),
    "no path": (two_rows("x").replace("audio_paths", "file"), "no column audio_paths or audio_path; its columns are"),
    "capitals": (two_rows("x").replace(HEADER, HEADER.upper()), "no column transcript; its columns are USER_IDS"),
    "empty": ("", "no column transcript; its columns are none"),
    "a page": ("<html>Service unavailable</html>", "no column transcript; its columns are <html>"),
    "no header": (csv_row("x/first"), "no column transcript; its columns are someone"),
    "binary": (bytes(range(256)) * 9, "no column transcript"),
    "LFS": ("version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer.*git lfs pull"),
    "other separator": (two_rows("x").replace(",", "|"), "no column transcript"),
    "no rows": (HEADER + "\n", "no train clip is left"),
}


@pytest.mark.parametrize("name", REFUSED_CSVS)
def test_a_csv_of_another_kind_is_refused(tmp_path, capfd, name):
    table, message = REFUSED_CSVS[name]
    add_accent(tmp_path / "corpus", "x", tar(two("x")), table)
    folders = ["--data_dir", tmp_path / "audio", "--output_dir", tmp_path / "out"]
    refused(capfd, ["--dry_run", "--dataset", tmp_path / "corpus", *folders], 1, message)


EMPTY_SPLITS = {  # kind: (archive of the test clips, their text, flags, what the message says)
    "an empty file": (b"", TEXT, "--prepare_only", "no test clip is left: 2 x no audio, 1 x damaged archive"),
    "no members": (tar([]), TEXT, "--prepare_only", "no test clip is left: 2 x no audio"),
    "not audio": (tar([(name, b"x") for name, _ in two("x")]), TEXT, "--eval_only", "left: 2 x undecodable audio"),
    "no texts": (tar(two("x")), "", "--eval_only", "no test transcript has a word to score: 2 clips"),
    "punctuation": (tar(two("x")), "?!", "--eval_only", "no test transcript has a word to score: 2 clips"),
    "a domain": (tar(two("x")), TEXT, "--eval_only --domains general", "no test clip is left.*--domains"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", EMPTY_SPLITS)
def test_a_split_without_a_clip_ends_with_the_reasons(tmp_path, capfd, kind):
    archive, text, flags, message = EMPTY_SPLITS[kind]
    corpus = tmp_path / "corpus"
    add_accent(corpus, "x", archive, rows_of("x", BOTH, "test").replace(TEXT, text), "test")
    more = ["--data_dir", tmp_path / "audio", "--output_dir", tmp_path / "out", "--model", MODEL, "--use_cpu", "true"]
    found, _, errors = run(capfd, *flags.split(), "--dataset", corpus, "--num_proc", 1, *more)
    assert found == 1 and re.search(f"error: .*{message}", errors), errors


def test_a_country_that_no_clip_is_of_is_refused_before_any_audio(tmp_path, capfd):
    folders = ["--data_dir", tmp_path / "audio", "--output_dir", tmp_path / "out", "--use_cpu", "true"]
    arguments = ["--eval_only", "--model", MODEL, "--dataset", CORPUS, *folders, "--countries", "XX"]
    refused(capfd, arguments, 2, "--countries has 'XX'.*the countries are GH, KE, NA, NG, ZA")
    assert not list(tmp_path.rglob("*.arrow"))


def test_a_folder_of_another_layout_is_refused(tmp_path, capfd):
    write(tmp_path / "corpus/train/clip.wav", GOOD)
    arguments = ["--dry_run", "--dataset", tmp_path / "corpus", "--data_dir", tmp_path / "audio"]
    refused(capfd, [*arguments, "--output_dir", tmp_path / "out"], 1, "has no audio/<accent>/<split>")


# ---------------------------------------------------------------- models


def edit_json(path, **changes):
    content = load_json(path)
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = content
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(content))


def edit_weights(folder, change):
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def to_pickle(folder, keep_as=None):
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    if keep_as:
        (folder / "model.safetensors").rename(folder / keep_as)
    else:
        (folder / "model.safetensors").unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(folder, *names):
    for name in names:
        (folder / name).unlink()


def strange_code(folder):
    """A model that brings code of its own, which writes a file when it is run."""
    edit_json(folder / "config.json", auto_map={"AutoConfig": "evil.C"}, model_type="evil")
    (folder / "evil.py").write_text(f"open({str(folder / 'code-was-run')!r}, 'w')\n")


LOADED = "cannot be loaded as a CTC model with its processor"
MODELS = {  # kind: (what is done to a copy of the small model, what the message says)
    "nothing in it": (lambda folder: remove(folder, *os.listdir(folder)), "has no config.json"),
    "no config": (lambda folder: remove(folder, "config.json"), "has no config.json"),
    "no weights": (lambda folder: remove(folder, "model.safetensors"), r"has no \*.safetensors"),
    "pickled weights": (to_pickle, r"has no \*.safetensors.*not loaded"),
    "pickled weights beside others": (lambda folder: to_pickle(folder, "adapter.safetensors"), LOADED),
    "no processor": (lambda folder: remove(folder, "processor_config.json"), LOADED),
    "no tokenizer": (lambda folder: remove(folder, "tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), LOADED),
    "cut weights": (lambda folder: cut(folder / "model.safetensors"), LOADED),
    "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), LOADED),
    "LFS weights": (lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs"), LOADED),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), LOADED),
    "another class": (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), LOADED),
    "another size": (
        lambda folder: edit_json(folder / "config.json", encoder_config__hidden_size=192),
        "do not fit its config.json",
    ),
    "another vocabulary": (
        lambda folder: edit_json(folder / "config.json", vocab_size=179),
        r"do not fit its config.json: ctc_head.bias is \(172,\), not \(179,\)",
    ),
    "weights missing": (
        lambda folder: edit_weights(folder, lambda weights: dict(list(weights.items())[:-5])),
        "lacks 5 weights",
    ),
    "weights of others": (
        lambda folder: edit_weights(folder, lambda weights: {f"x.{name}": value for name, value in weights.items()}),
        "lacks .* weights",
    ),
    "NaN": (
        lambda folder: edit_weights(folder, lambda weights: {name: value / 0 * 0 for name, value in weights.items()}),
        "weights that are not finite",
    ),
    "8 kHz": (
        lambda folder: edit_json(folder / "processor_config.json", feature_extractor__sampling_rate=8_000),
        "8,000 Hz",
    ),
    "64 mel bins": (
        lambda folder: edit_json(folder / "processor_config.json", feature_extractor__feature_size=64),
        "does not fit its processor",
    ),
    "code of its own": (strange_code, "needs code of its own, and no code of a model is run"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_cannot_be_used_is_refused(tmp_path, capfd, kind):
    change, message = MODELS[kind]
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    change(folder)
    write(tmp_path / "visit.wav", GOOD)
    arguments = ["--transcribe", tmp_path / "visit.wav", "--model", folder, "--use_cpu", "true"]
    refused(capfd, arguments, 1, f"model {re.escape(str(folder))} .*{message}")
    assert not (folder / "code-was-run").exists()


# ---------------------------------------------------------------- runs that go on from bad checkpoints


@pytest.fixture
def again(horrors, tmp_path):
    """The horrors' run on its good clip, in a folder of its own: again(flag, ...) is its command line."""
    shutil.copytree(horrors.folder / "audio", tmp_path / "audio")
    flags = f"""--dataset {horrors.corpus} --accents clips --max_steps 2 --eval_steps 1 --save_steps 1 --skip_baseline
        --model {MODEL} --num_proc 1 --per_device_train_batch_size 4 --gradient_accumulation_steps 1
        --max_test_samples 2 --max_train_samples 2 --dataloader_num_workers 0 --use_cpu true""".split()
    return lambda *more: [*flags, "--data_dir", tmp_path / "audio", "--output_dir", tmp_path / "out", *more]


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def doubled(weights):
    return {
        name: value.repeat(2, *[1] * (value.dim() - 1)) if value.dim() else value for name, value in weights.items()
    }


CHECKPOINTS = {  # kind: (what is done to a copy of a good checkpoint, exit status, what the message says)
    "optimizer missing": (lambda folder: remove(folder, "optimizer.pt"), 2, "optimizer.pt is missing"),
    "weights cut": (lambda folder: cut(folder / "model.safetensors"), 2, "model.safetensors is cut"),
    "not finished": (lambda folder: remove(folder, MANIFEST), 2, "it was not finished"),
    "state not JSON": (lambda folder: (folder / "trainer_state.json").write_text("{"), 2, "trainer_state.json is"),
    "another size": (lambda folder: edit_weights(folder, doubled), 1, "cannot be loaded"),
    "optimizer of zeros": (lambda folder: (folder / "optimizer.pt").write_bytes(bytes(999)), 1, "cannot be loaded"),
    "optimizer with code": (
        lambda folder: (folder / "optimizer.pt").write_bytes(pickle.dumps(Evil(folder / "code-was-run"))),
        1,
        "cannot be loaded",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_used_is_refused(horrors, again, tmp_path, capfd, kind):
    change, status, message = CHECKPOINTS[kind]
    folder = tmp_path / "checkpoint"
    shutil.copytree(horrors.folder / "out/checkpoint-1", folder)
    change(folder)
    if status == 1:  # whole, as far as its manifest knows
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST}
        (folder / MANIFEST).write_text(json.dumps(sizes))
    found, _, errors = run(capfd, *again("--resume_from_checkpoint", folder))
    assert found == status and re.search(f"error: .*{message}", errors) and "unexpected" not in errors, errors
    assert not (folder / "code-was-run").exists() and not (tmp_path / "out/final").exists()


TRAINING_FLAGS = [
    ("--optim adamw_bnb_8bit", "bitsandbytes"),
    ("--lr_scheduler_kwargs foo", "mapping"),
    ('--lr_scheduler_kwargs {"foo":1}', "foo"),
    ("--adam_beta1 2", "Invalid beta"),
    ("--optim_args foo", "not enough values"),
    ("--neftune_noise_alpha 5", "get_input_embeddings"),
]


@pytest.mark.slow
@pytest.mark.parametrize("flags, message", TRAINING_FLAGS)
def test_what_the_trainer_alone_can_judge_is_a_usage_error(again, capfd, flags, message):
    found, _, errors = run(capfd, *again(*flags.split()))
    assert found == 2 and re.search(f"the Trainer does not take these flags .*{message}", errors), errors


@pytest.mark.slow
def test_what_cannot_be_compiled_is_said_in_a_line(again, capfd):
    """Without a package of its backend torch.compile fails as it does where a model is beyond it, but at once."""
    found, _, errors = run(capfd, *again(*"--torch_compile_backend tvm --max_steps 1".split()))
    assert found == 1 and "--torch_compile: the model cannot be compiled (" in errors and "tvm" in errors, errors
    assert "leave it out" in errors and "Traceback" not in errors


# ---------------------------------------------------------------- folders in one another


@pytest.mark.slow
@pytest.mark.parametrize("data_dir, output_dir", [("out/audio", "out"), ("audio", "audio/out"), ("all", "all")])
def test_audio_survives_a_new_start_wherever_it_lies(horrors, again, tmp_path, capfd, data_dir, output_dir):
    shutil.copytree(horrors.folder / "audio", tmp_path / data_dir, dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / data_dir).rglob("*.arrow")}
    folders = ["--data_dir", tmp_path / data_dir, "--output_dir", tmp_path / output_dir]
    for more in ([], ["--overwrite_output_dir"]):
        status, out, errors = run(capfd, *again(*folders, "--max_steps", 1, *more))
        assert status == 0 and "preparing audio" not in errors and "finished" not in out, errors
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / data_dir).rglob("*.arrow")} == before
        assert (tmp_path / output_dir / "final/config.json").is_file()


# ---------------------------------------------------------------- folders and files without permission


def give_up_root_powers():
    """Before exec: root without CAP_DAC_OVERRIDE (1) and CAP_DAC_READ_SEARCH (2) is refused what others are."""
    for capability in (1, 2):
        LIBC.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; refused to those who have no such powers


LIBC = ctypes.CDLL(None)
SEVERAL = """
import json, sys
sys.path.insert(0, sys.argv[1])
import finetune_medasr
for argv in json.loads(sys.argv[2]):
    print("STATUS", finetune_medasr.main(argv), flush=True)
    print("END", file=sys.stderr, flush=True)
"""
CLOSED = {  # kind: (what is closed, its mode, flags, exit status, what the message says)
    "--output_dir": ("shut", 0o555, "--output_dir {0}/out", 2, "--output_dir is .*cannot be written to"),
    "--data_dir": ("shut", 0o555, "--data_dir {0}/audio", 2, "--data_dir is .*cannot be written to"),
    "--dataset": ("corpus/audio/x", 0, "--dry_run --dataset {0}/../..", 1, "corpus cannot be read .*Permission"),
    "a CSV": ("corpus/transcripts/x/train.csv", 0, "--dry_run --dataset {0}/../../..", 1, "train.csv cannot be read"),
    "--score_file": ("scores.jsonl", 0, "--score_file {0}", 2, "--score_file: .*cannot be read .*Permission"),
    "a YAML file": ("run.yaml", 0, "{0}", 2, "run.yaml cannot be read .*Permission"),
    "--model": ("model/model.safetensors", 0, "--transcribe {0}/../../visit.wav --model {0}/..", 1, "model .*cannot"),
    "--transcribe": ("visit.wav", 0, f"--transcribe {{0}} --model {MODEL}", 1, "visit.wav cannot be read as audio"),
}


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    """{kind: (exit status, stderr)} of the command lines of CLOSED, in one process that root's powers do not help."""
    commands = []
    for name, mode, flags, *_ in CLOSED.values():
        folder = tmp_path_factory.mktemp("closed")
        add_accent(folder / "corpus", "x", tar(two("x")), two_rows("x"))
        shutil.copytree(MODEL, folder / "model")
        for file, content in (("scores.jsonl", ROW), ("run.yaml", "seed: 7"), ("visit.wav", GOOD)):
            write(folder / file, content)
        (folder / "shut").mkdir()
        (folder / name).chmod(mode)
        extra = [] if "--output_dir" in flags else ["--output_dir", folder / "out2"]
        extra += [] if "--data_dir" in flags else ["--data_dir", folder / "audio2"]
        flags = [os.path.normpath(part) if "/.." in part else part for part in flags.format(folder / name).split()]
        commands.append(list(map(str, [*flags, *extra, "--use_cpu", "true"])))
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, str(SCRIPT.parent), json.dumps(commands)],
        env=OFFLINE, capture_output=True, text=True, preexec_fn=give_up_root_powers, timeout=300,
    )  # fmt: skip
    statuses = re.findall(r"STATUS (\d+)", done.stdout)
    assert len(statuses) == len(commands), done.stderr
    return dict(zip(CLOSED, zip(map(int, statuses), done.stderr.split("END\n"))))


@pytest.mark.parametrize("kind", CLOSED)
def test_what_may_not_be_opened_is_named(closed, kind):
    *_, status, message = CLOSED[kind]
    found, errors = closed[kind]
    assert found == status and re.search(message, error_line(errors)), errors
