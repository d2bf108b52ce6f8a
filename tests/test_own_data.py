"""People's own recordings as the corpus: folders of audio with metadata, and parquet files, here and on a Hub."""

import csv
import io
import json
import shutil
from collections import Counter

import pyarrow.parquet
import pytest
import soundfile
from conftest import CORPUS, MODEL, SPLITS, corpus_audio, corpus_rows, error_line, load_json, load_predictions
from loopback_hub import LoopbackHub

import finetune_medasr as script

FOLDERS = {"train": "train", "dev": "validation", "test": "test"}
NAMES = {"transcript": "sentence", "user_ids": "client_id", "accent": "accent", "country": "country"}
NAMES |= {"domain": "domain", "gender": "gender", "age_group": "age_group"}
HUB_NAME = "clinic/dictations"


def own_rows(split, limit=None):
    """[(clip, audio, row under other people's names)] of the fixture corpus."""
    audio, rows = corpus_audio(split), corpus_rows(split)
    found = [(clip, audio[clip], {NAMES[name]: row[name] for name in NAMES}) for clip, row in rows.items() if clip in audio]
    return found[:limit]


def write_table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["file_name"])
            writer.writeheader()
            writer.writerows(rows)


def write_audio(folder, clips):
    for clip, audio, _ in clips:
        (folder / clip).parent.mkdir(parents=True, exist_ok=True)
        (folder / clip).write_bytes(audio)


def audio_folder(folder, splits=SPLITS, suffix="csv", limit=None):
    """An AudioFolder of the fixture corpus with a folder and a table for each split; returns `folder`."""
    for split in splits:
        clips = own_rows(split, limit)
        write_audio(folder / FOLDERS[split], clips)
        table = folder / FOLDERS[split] / f"metadata.{suffix}"
        write_table(table, [{"file_name": clip, **row} for clip, _, row in clips])
    return folder


def one_table(folder, splits=SPLITS, suffix="csv", limit=None, **more):
    """The same in one folder with one table, with `more` columns of (split, row) each; returns `folder`."""
    rows = []
    for split in splits:
        clips = own_rows(split, limit)
        write_audio(folder / "clips", clips)
        rows += [
            {"file_name": f"clips/{clip}", **row, **{name: of(split, row) for name, of in more.items()}}
            for clip, _, row in clips
        ]
    write_table(folder / f"metadata.{suffix}", rows)
    return folder


def parquet_folder(folder, splits=SPLITS, limit=None, prefix="data"):
    """The fixture corpus as `datasets` pushes it to the Hub, two files for training; returns `folder`."""
    from datasets import Audio, Features, Value

    features = Features({"audio": Audio(sampling_rate=16000, decode=False), **dict.fromkeys(NAMES.values(), Value("string"))})
    (folder / prefix).mkdir(parents=True, exist_ok=True)
    for split in splits:
        rows = [
            {"audio": {"bytes": audio, "path": clip.split("/")[1]}, **row} for clip, audio, row in own_rows(split, limit)
        ]
        count = 2 if split == "train" else 1
        for number in range(count):
            # Dataset.from_list would need torchcodec to encode the column of audio.
            part = pyarrow.Table.from_pylist(rows[number::count], schema=features.arrow_schema)
            path = folder / prefix / f"{FOLDERS[split]}-{number:05d}-of-{count:05d}.parquet"
            pyarrow.parquet.write_table(part, path, row_group_size=16)
    return folder


def run(tmp_path, dataset, *flags):
    """The exit status of the program in this process."""
    paths = ["--model", MODEL, "--dataset", dataset, "--data_dir", tmp_path / "audio", "--output_dir", tmp_path / "out"]
    return script.main([*map(str, [*paths, "--num_proc", 1, "--disable_tqdm", "true", *flags])])


def refusal(capfd, tmp_path, dataset, *flags, status=1):
    """The one line in which the program refuses a dataset."""
    assert run(tmp_path, dataset, *(flags or ["--dry_run"])) == status
    return error_line("\n".join(line for line in capfd.readouterr().err.splitlines() if "warning:" not in line))


def by_text(results):
    """What was written down of each test clip, by what does not depend on where the clip came from."""
    rows = load_predictions(results)
    return sorted((row["text"], row["speaker"], row["accent"], row["country"], row["pred_text"]) for row in rows)


SCORES = ("wer", "wer_paper", "wer_raw", "cer", "clips", "words", "wer_ci95", "speakers")


def scores(results):
    found = load_json(results / "metrics.json")["baseline"]
    return {name: found[name] for name in SCORES}, {
        (kind, name): group["wer"] for kind, groups in found["groups"].items() for name, group in groups.items()
    }


@pytest.fixture(scope="module")
def archives_results(tmp_path_factory):
    """The scores of the test split from AfriSpeech-200's layout."""
    folder = tmp_path_factory.mktemp("archives")
    assert run(folder, CORPUS, "--eval_only") == 0
    return folder / "out/results"
