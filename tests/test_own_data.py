"""People's own recordings as the corpus: folders of audio with metadata, and parquet files, here and on a Hub."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import pyarrow.parquet
import pytest
from conftest import (
    CORPUS,
    MODEL,
    SCRIPT,
    SPLITS,
    corpus_audio,
    corpus_rows,
    error_line,
    load_json,
    load_predictions,
    run_script,
)
from loopback_hub import LoopbackHub

import finetune_medasr as script

FOLDERS = {"train": "train", "dev": "validation", "test": "test"}
NAMES = {"transcript": "sentence", "user_ids": "client_id", "accent": "accent", "country": "country"}
NAMES |= {"domain": "domain", "gender": "gender", "age_group": "age_group"}
HUB_NAME = "clinic/dictations"


def own_rows(split, limit=None):
    """[(clip, audio, row under other people's names)] of the fixture corpus."""
    audio, rows = corpus_audio(split), corpus_rows(split)
    found = [
        (clip, audio[clip], {NAMES[name]: row[name] for name in NAMES}) for clip, row in rows.items() if clip in audio
    ]
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

    features = Features(
        {"audio": Audio(sampling_rate=16000, decode=False), **dict.fromkeys(NAMES.values(), Value("string"))}
    )
    (folder / prefix).mkdir(parents=True, exist_ok=True)
    for split in splits:
        rows = [
            {"audio": {"bytes": audio, "path": clip.split("/")[1]}, **row}
            for clip, audio, row in own_rows(split, limit)
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


# ---------------------------------------------------------------- the same clips as from archives


@pytest.mark.parametrize("make", [audio_folder, parquet_folder])
def test_own_recordings_give_the_texts_and_scores_that_archives_give(make, tmp_path, archives_results):
    assert run(tmp_path, make(tmp_path / "own", splits=["test"]), "--eval_only") == 0
    assert by_text(tmp_path / "out/results") == by_text(archives_results)
    assert scores(tmp_path / "out/results") == scores(archives_results)


def test_a_folder_is_divided_as_datasets_divides_it(tmp_path):
    """The convention is AudioFolder's own; to read the rows `datasets` would need torchcodec."""
    from datasets import load_dataset_builder

    folder = audio_folder(tmp_path / "own", suffix="jsonl", limit=4)
    assert run(tmp_path, folder, "--prepare_only") == 0
    builder = load_dataset_builder("audiofolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    theirs = {split: set(map(str, paths)) for split, paths in builder.config.data_files.items()}
    ours = {split: {str(folder / FOLDERS[split] / "metadata.jsonl")} for split in SPLITS}
    for clip, row in prepared(tmp_path / "audio").items():
        ours[row["split"]].add(str(folder / clip))
    assert {script.SPLIT_NAMES[split]: paths for split, paths in theirs.items()} == ours


def prepared(data_dir):
    """{clip: row} of all prepared files."""
    from datasets import Dataset

    files = [Dataset.from_file(str(path)) for path in sorted(data_dir.glob("clips/*.arrow"))]
    return {row["clip"]: row for rows in files for row in rows}


def test_splits_come_from_a_column_and_columns_under_other_names(tmp_path, capsys):
    words = {"train": "training", "dev": "valid", "test": "eval"}
    folder = one_table(tmp_path / "own", limit=4, split=lambda split, _: words[split], sex=lambda *_: "X")
    assert run(tmp_path, folder, "--prepare_only") == 0
    assert "made" not in capsys.readouterr().out
    rows = prepared(tmp_path / "audio").values()
    assert Counter(row["split"] for row in rows) == {"train": 4, "dev": 4, "test": 4}
    assert all(row["speaker"] and row["domain"] and row["gender"] in ("Female", "Male") for row in rows)


def test_a_clip_is_of_the_split_of_its_folder_whatever_its_own_name(tmp_path):
    clips = own_rows("train", 4)
    names = ["ada/stress-test.wav", "ada/val_1.wav", "eval/train.wav", "eval/2.wav"]
    write_audio(tmp_path / "own", [(name, audio, {}) for name, (_, audio, _) in zip(names, clips)])
    write_table(tmp_path / "own/metadata.csv", [{"file_name": name, "text": "fever"} for name in names[1:]])
    args, _ = script.parse_arguments(["--dataset", str(tmp_path / "own"), "--data_dir", str(tmp_path / "audio")])
    rows = [row for rows in script.open_corpus(args).listed.values() for row in rows]
    assert {row["clip"]: row["split"] for row in rows} == dict(zip(names, ["", "", "test", "test"]))


def test_links_to_folders_are_followed_and_never_for_ever(tmp_path):
    folder = audio_folder(tmp_path / "elsewhere", splits=["test"], limit=4)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/test").symlink_to(folder / "test")
    for link, target in ("own/again", "own"), ("elsewhere/test/back", "own"), ("elsewhere/test/up", "/"):
        (tmp_path / link).symlink_to(tmp_path / target)
    (tmp_path / "elsewhere/test/gone").symlink_to(tmp_path / "nowhere")
    assert run(tmp_path, tmp_path / "own", "--eval_only") == 0
    assert len(load_predictions(tmp_path / "out/results")) == 4
    assert len((tmp_path / "out/results/skipped_clips.csv").read_text().splitlines()) == 1


def test_the_country_code_of_namibia_and_texts_that_look_like_numbers_stay_texts(tmp_path):
    write_audio(tmp_path / "own", own_rows("test", 3))
    names = [clip for clip, _, _ in own_rows("test", 3)]
    rows = [{"file_name": name, "text": text, "country": "NA"} for name, text in zip(names, ("NA", "007", "null"))]
    write_table(tmp_path / "own/test/metadata.csv", [{**row, "file_name": f"../{row['file_name']}"} for row in rows])
    assert run(tmp_path, tmp_path / "own", "--eval_only") == 0
    assert [row["text"] for row in prepared(tmp_path / "audio").values()] == ["NA", "007", "null"]


# ---------------------------------------------------------------- made splits


def splits_used(tmp_path, dataset, *flags):
    """{split: (clips, speakers)} of a run's selections."""
    args, training = script.parse_arguments(["--model", str(MODEL), "--dataset", str(dataset), *map(str, flags)])
    args.data_dir = str(tmp_path / "audio")
    corpus = script.open_corpus(args)
    corpus.make_splits(SPLITS, training.seed)
    script.prepare_corpus(corpus, SPLITS, args)
    rows = {split: script.load_split(corpus, split)[0].remove_columns("audio").to_list() for split in SPLITS}
    assert all(row["split"] == split for split in SPLITS for row in rows[split])
    return {split: ({row["clip"] for row in rows[split]}, {row["speaker"] for row in rows[split]}) for split in SPLITS}


def test_missing_splits_are_made_by_speaker(tmp_path, capsys):
    folder = one_table(tmp_path / "own", splits=["train"])
    used = splits_used(tmp_path, folder)
    assert "dev and test made of the train split by speaker, by --seed 42" in capsys.readouterr().out
    clips = {split: len(found) for split, (found, _) in used.items()}
    total = len(own_rows("train"))
    assert sum(clips.values()) == total
    assert all(0.03 * total <= clips[split] <= 0.1 * total for split in ("dev", "test")), clips
    speakers = [people for _, people in used.values()]
    assert sum(map(len, speakers)) == len(set.union(*speakers))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "audio/clips").iterdir()}
    assert splits_used(tmp_path, folder) == used
    other = splits_used(tmp_path, folder, "--seed", 7)
    assert other["test"][1] != used["test"][1]
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "audio/clips").iterdir()}  # not again


def test_one_missing_split_leaves_the_others_as_they_are(tmp_path, capsys):
    folder = audio_folder(tmp_path / "own", splits=["train", "test"], limit=60)
    used = splits_used(tmp_path, folder)
    assert "  dev made of the train split by speaker, by --seed 42" in capsys.readouterr().out
    assert len(used["test"][0]) == 60 and len(used["train"][0]) + len(used["dev"][0]) == 60
    assert used["dev"][1] and not used["dev"][1] & used["train"][1]


def test_recordings_without_a_speaker_are_in_no_made_split_and_named(tmp_path):
    folder = one_table(tmp_path / "own", splits=["train"], limit=60)
    rows = list(csv.DictReader((folder / "metadata.csv").open(newline="", encoding="utf-8")))
    rows[3]["client_id"] = ""
    write_table(folder / "metadata.csv", rows)
    assert run(tmp_path, folder, "--prepare_only") == 0
    skipped = (tmp_path / "out/results/skipped_clips.csv").read_text()
    assert f"train,{rows[3]['file_name']},no speaker to make a split by," in skipped


def test_a_run_on_made_splits_says_so_in_its_results_and_card(tmp_path):
    folder = one_table(tmp_path / "own", splits=["train"], limit=80)
    assert run(tmp_path, folder, "--max_steps", 2, "--gradient_accumulation_steps", 1, "--skip_baseline") == 0
    results = tmp_path / "out/results"
    data = load_json(results / "metrics.json")["data"]
    assert data["made_splits"] == ["dev", "test"] and data["speakers_in_train_too"] == {}
    assert "dev and test made of the train split by speaker, by --seed 42." in (results / "report.md").read_text()
    card = (tmp_path / "out/final/README.md").read_text()
    assert "whose speakers are not in training" in card
    assert "AfriSpeech-200" not in card and "frican" not in card


@pytest.mark.slow
def test_two_processes_make_the_same_splits_and_train_on_them(tmp_path, run_two):
    folder = one_table(tmp_path / "own", splits=["train"], limit=80)
    used = splits_used(tmp_path / "alone", folder)
    flags = ["--model", MODEL, "--dataset", folder, "--data_dir", tmp_path / "audio", "--output_dir", tmp_path / "out"]
    flags += "--max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --skip_baseline".split()
    flags += ["--per_device_eval_batch_size", "2"]  # so that both have clips to score
    done = run_two(*flags, "--use_cpu", "true", "--ddp_backend", "gloo")
    assert [process.returncode for process in done] == [0, 0], done[1].stderr
    assert not done[1].stdout, "the second process is silent"
    assert load_json(tmp_path / "out/run.json")["identity"]["clips_an_update"] == 4
    assert run(tmp_path / "alone", folder, "--eval_only", "--model", tmp_path / "out/final") == 0
    written, alone = (
        {row["audio_filepath"]: row["pred_text"] for row in load_predictions(place / "out/results")}
        for place in (tmp_path, tmp_path / "alone")
    )
    assert written == alone
    left_out = {row["clip"] for row in csv.DictReader((tmp_path / "out/results/skipped_clips.csv").open(newline=""))}
    assert set(written) == used["test"][0] - left_out
    assert load_json(tmp_path / "out/results/metrics.json")["data"]["made_splits"] == ["dev", "test"]


def test_speakers_in_two_given_splits_are_counted_in_a_warning_and_the_results(tmp_path, capfd):
    folder = one_table(tmp_path / "own", splits=["train"], limit=40, split=lambda _, row: "")
    rows = list(csv.DictReader((folder / "metadata.csv").open(newline="", encoding="utf-8")))
    for number, row in enumerate(rows):
        row.update(split=SPLITS[number % 3], client_id=f"speaker {number % 2}")
        del row["accent"]  # pictures and curves by accent have to do without
    write_table(folder / "metadata.csv", rows)
    assert run(tmp_path, folder, "--max_steps", 1, "--gradient_accumulation_steps", 1, "--skip_baseline") == 0
    note = "2 speakers of test in train too: its scores are not those of new speakers."
    assert f"warning: {note}" in capfd.readouterr().err
    results = tmp_path / "out/results"
    assert load_json(results / "metrics.json")["data"]["speakers_in_train_too"] == {"dev": 2, "test": 2}
    assert note in (results / "report.md").read_text()
    assert "whose speakers are not in training" not in (tmp_path / "out/final/README.md").read_text()


def test_without_speakers_the_report_says_what_its_intervals_are_of(tmp_path):
    write_audio(tmp_path / "own/test", own_rows("test", 6))
    rows = [{"file_name": clip, "text": row["sentence"]} for clip, _, row in own_rows("test", 6)]
    write_table(tmp_path / "own/test/metadata.jsonl", rows)
    assert run(tmp_path, tmp_path / "own", "--eval_only") == 0
    assert "No clip names its speaker: each one counts as a speaker" in (tmp_path / "out/results/report.md").read_text()
    metrics = load_json(tmp_path / "out/results/metrics.json")
    assert metrics["data"]["test"]["speakers"] == metrics["data"]["test"]["accents"] == 0
    assert {kind: [*metrics["baseline"]["groups"][kind]] for kind in ("accent", "domain", "seen_accent")} == {
        "accent": ["unknown"],
        "domain": ["unknown"],
        "seen_accent": ["unknown"],
    }


# ---------------------------------------------------------------- bad recordings


def test_what_cannot_be_used_is_named_and_the_rest_is_used(tmp_path):
    folder = audio_folder(tmp_path / "own", splits=["test"], limit=8)
    table = folder / "test/metadata.csv"
    rows = list(csv.DictReader(table.open(newline="", encoding="utf-8")))
    names = [row["file_name"] for row in rows]
    (folder / "test" / names[0]).unlink()
    (folder / "test" / names[1]).write_bytes(b"no audio at all")
    rows[2]["sentence"] = " "
    rows.append({**rows[3], "file_name": "../../etc/passwd"})
    rows.append({**rows[3], "file_name": ""})
    write_table(table, rows)
    shutil.copy(folder / "test" / names[4], folder / "test/forgotten.wav")
    assert run(tmp_path, folder, "--eval_only") == 0
    with (tmp_path / "out/results/skipped_clips.csv").open(newline="") as file:
        reasons = {row["clip"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons.pop(f"test/{names[1]}").startswith("undecodable audio (")
    assert reasons == {
        f"test/{names[0]}": "no audio",
        f"test/{names[2]}": "empty text",
        "../etc/passwd": "refused: its path climbs out of the folder",
        "test/metadata.csv, row 10": "no file_name",
        "test/forgotten.wav": "no transcript",
    }
    assert len(load_predictions(tmp_path / "out/results")) == 5


def test_a_row_that_ends_before_its_file_name_is_named(tmp_path):
    write_audio(tmp_path / "own/test", own_rows("test", 1))
    (tmp_path / "own/test/metadata.csv").write_text(f"text,file_name\nfever\nfever,{own_rows('test', 1)[0][0]}\n")
    args, _ = script.parse_arguments(["--dataset", str(tmp_path / "own"), "--data_dir", str(tmp_path / "audio")])
    corpus = script.open_corpus(args)
    assert [row["problem"] for rows in corpus.listed.values() for row in rows] == ["no file_name", ""]


def test_a_text_with_commas_outside_quotes_is_named_and_not_cut(tmp_path, capfd):
    clips = own_rows("test", 3)
    write_audio(tmp_path / "own/test", clips)
    texts = "fever, cough and chills", "fever", '"fever, cough"'
    lines = [f"{clip},{text},ada,," for (clip, *_), text in zip(clips, texts)]
    (tmp_path / "own/test/metadata.csv").write_text("\n".join(["file_name,text,speaker", *lines]))
    assert run(tmp_path, tmp_path / "own", "--eval_only") == 0
    assert "1 row with more cells than columns, the first in line 2: not used" in capfd.readouterr().err
    with (tmp_path / "out/results/skipped_clips.csv").open(newline="") as file:
        left_out = [(row["clip"], row["reason"], row["text"]) for row in csv.DictReader(file)]
    reason = "more cells than columns (line 2): its text needs quotes"
    assert left_out == [(f"test/{clips[0][0]}", reason, "fever")]
    assert sorted(row["text"] for row in load_predictions(tmp_path / "out/results")) == ["fever", "fever, cough"]


def test_rows_of_other_splits_are_counted(tmp_path, capfd):
    folder = one_table(tmp_path / "own", splits=["test"], limit=6, split=lambda *_: "test")
    rows = list(csv.DictReader((folder / "metadata.csv").open(newline="", encoding="utf-8")))
    rows[0]["split"] = "invalidated"
    write_table(folder / "metadata.csv", rows)
    assert run(tmp_path, folder, "--eval_only") == 0
    assert "warning: 1 clip, such as clips/" in capfd.readouterr().err
    assert len(load_predictions(tmp_path / "out/results")) == 5


def test_a_damaged_parquet_file_costs_its_own_clips(tmp_path):
    folder = parquet_folder(tmp_path / "own", splits=["test"], limit=12)
    good = folder / "data/test-00000-of-00001.parquet"
    (folder / "data/test-00001-of-00002.parquet").write_bytes(good.read_bytes()[:-500])
    assert run(tmp_path, folder, "--eval_only") == 0
    assert len(load_predictions(tmp_path / "out/results")) == 12
    assert (
        "test,data/test-00001-of-00002.parquet,damaged file ("
        in (tmp_path / "out/results/skipped_clips.csv").read_text()
    )


@pytest.mark.parametrize("make", [audio_folder, parquet_folder])
def test_a_damaged_prepared_file_is_named_and_made_again_when_deleted(tmp_path, capfd, make):
    folder = make(tmp_path / "own", splits=["test"], limit=3)
    assert run(tmp_path, folder, "--eval_only") == 0
    (file,) = (tmp_path / "audio/clips").iterdir()
    for content in b"", file.read_bytes()[:-2_000]:
        file.write_bytes(content)
        capfd.readouterr()
        line = refusal(capfd, tmp_path, folder, "--eval_only")
        assert line.startswith(f"{file} is damaged (") and line.endswith(": delete it, the same command makes it again")
    file.unlink()
    assert run(tmp_path, folder, "--eval_only") == 0


def test_files_whose_names_are_not_utf_8_are_passed_over(tmp_path, capfd):
    folder = audio_folder(tmp_path / "own", splits=["test"], limit=3)
    audio = next(folder.rglob("*.ogg"))
    shutil.copy(audio, os.fsencode(folder) + b"/test/caf\xe9.ogg")
    assert run(tmp_path, folder, "--eval_only") == 0
    assert f"1 file of {folder}, such as test/caf\ufffd.ogg, passed over" in capfd.readouterr().err
    assert len(load_predictions(tmp_path / "out/results")) == 3


def test_changed_recordings_are_converted_again_and_others_are_not(tmp_path):
    folder = audio_folder(tmp_path / "own", splits=["dev", "test"], limit=4)
    assert run(tmp_path, folder, "--eval_only") == 0
    first, files = prepared(tmp_path / "audio"), sorted((tmp_path / "audio/clips").iterdir())
    assert [path.name for path in files] == ["test-00000.arrow"]
    clips = sorted(clip for clip in first)
    shutil.copy(folder / clips[0], folder / clips[1])
    assert run(tmp_path, folder, "--eval_only") == 0
    second = prepared(tmp_path / "audio")
    assert second[clips[1]]["audio"] == first[clips[0]]["audio"] != first[clips[1]]["audio"]
    changed = files[0].stat().st_mtime_ns
    assert run(tmp_path, folder, "--eval_only") == 0
    assert files[0].stat().st_mtime_ns == changed


def test_an_interrupted_preparation_goes_on_with_the_groups_that_are_left(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "GROUP_CLIPS", 3)
    folder = audio_folder(tmp_path / "own", splits=["test"], limit=8)
    assert run(tmp_path, folder, "--eval_only") == 0
    files = sorted((tmp_path / "audio/clips").iterdir())
    assert len(files) == 3
    times = [path.stat().st_mtime_ns for path in files]
    whole = by_text(tmp_path / "out/results")
    files[1].unlink()
    assert run(tmp_path, folder, "--eval_only") == 0
    assert [path.stat().st_mtime_ns == time for path, time in zip(files, times)] == [True, False, True]
    assert by_text(tmp_path / "out/results") == whole


def test_texts_corrected_after_an_interrupted_preparation_are_taken(tmp_path, monkeypatch):
    import concurrent.futures

    def interrupted(jobs):
        jobs[0].result()
        raise script.Stopped(2)

    monkeypatch.setattr(script, "GROUP_CLIPS", 3)
    folder = audio_folder(tmp_path / "own", splits=["test"], limit=6)
    with monkeypatch.context() as patch:
        patch.setattr(concurrent.futures, "as_completed", interrupted)
        assert run(tmp_path, folder, "--eval_only") == 130
    assert (tmp_path / "audio/clips/test-00000.arrow").exists()
    table = folder / "test/metadata.csv"
    rows = list(csv.DictReader(table.open(newline="", encoding="utf-8")))
    write_table(table, [{**row, "sentence": "the corrected text"} for row in rows])
    assert run(tmp_path, folder, "--eval_only") == 0
    assert {row["text"] for row in load_predictions(tmp_path / "out/results")} == {"the corrected text"}


def test_of_two_processes_that_see_a_change_one_converts_it(tmp_path):
    folder = audio_folder(tmp_path / "own", splits=["test"], limit=3)
    assert run(tmp_path, folder, "--eval_only") == 0
    shutil.copy(*(folder / "test" / clip for clip, *_ in own_rows("test", 2)))
    flags = ["--dataset", folder, "--data_dir", tmp_path / "audio", "--num_proc", 1, "--eval_only"]
    args, _ = script.parse_arguments(list(map(str, flags)))
    first, second = script.open_corpus(args), script.open_corpus(args)
    file, times = tmp_path / "audio/clips/test-00000.arrow", []
    for corpus in first, second:
        corpus.make_splits(["test"], 42)
        assert len(corpus.unprepared(corpus.archives("test"))) == 1
        script.prepare_corpus(corpus, ["test"], args)
        times.append(file.stat().st_mtime_ns)
    assert times[0] == times[1]


def test_files_of_others_in_the_data_folder_stay(tmp_path):
    folder = audio_folder(tmp_path / "own", splits=["test"], limit=3)
    others = tmp_path / "audio/notes/letter.tmp"
    others.parent.mkdir(parents=True)
    others.write_text("of somebody else")
    (tmp_path / "audio/clips").mkdir()
    (tmp_path / "audio/clips/test-00000.arrow.1.tmp").write_text("half")
    assert run(tmp_path, folder, "--eval_only") == 0
    assert others.exists() and len(list((tmp_path / "audio/clips").iterdir())) == 1


# ---------------------------------------------------------------- selection


def test_accents_and_countries_choose_by_their_columns(tmp_path, capfd):
    folder = audio_folder(tmp_path / "own")
    rows = [row for _, _, row in own_rows("test")]
    assert run(tmp_path, folder, "--eval_only", "--accents", "Akan (Fante)", "igbo") == 0
    accents = Counter(row["accent"] for row in load_predictions(tmp_path / "out/results"))
    assert accents == Counter(row["accent"] for row in rows if row["accent"] in ("akan (fante)", "igbo"))
    assert run(tmp_path, folder, "--eval_only", "--countries", "NA") == 0
    countries = Counter(row["country"] for row in load_predictions(tmp_path / "out/results"))
    assert countries == {"NA": sum(row["country"] == "NA" for row in rows)}
    capfd.readouterr()
    line = refusal(capfd, tmp_path, folder, "--eval_only", "--accents", "klingon", status=2)
    assert line.startswith(f"--accents has 'klingon', which {folder} does not have; did you mean igbo?")


# ---------------------------------------------------------------- refusals


def test_countries_and_domains_are_chosen_however_they_are_written(tmp_path, capfd):
    folder = audio_folder(tmp_path / "own", splits=["test"], limit=30)
    table = folder / "test/metadata.csv"
    rows = list(csv.DictReader(table.open(newline="", encoding="utf-8")))
    country = rows[0]["country"]
    chosen = [row for row in rows if (row["country"], row["domain"]) == (country, "clinical")]
    write_table(table, [{**row, "country": row["country"].lower(), "domain": row["domain"].title()} for row in rows])
    assert run(tmp_path, folder, "--eval_only", "--countries", country, "--domains", "clinical") == 0
    assert 0 < len(load_predictions(tmp_path / "out/results")) == len(chosen) < len(rows)


def test_of_a_further_set_the_test_files_alone_are_read(tmp_path):
    folder = parquet_folder(tmp_path / "own", limit=3)
    args, training = script.parse_arguments(["--data_dir", str(tmp_path), "--also_score", str(folder), "--eval_only"])
    args.tune_lm = True
    ((_, corpus, _),) = script.open_further(args, training).values()
    assert list(corpus.listed) == ["data/test-00000-of-00001.parquet"]


def test_columns_that_cannot_be_told_are_refused_with_those_found(tmp_path, capfd):
    folder = one_table(tmp_path / "own", limit=4, split=lambda split, _: split, text=lambda *_: "another")
    line = refusal(capfd, tmp_path, folder, status=2)
    columns = ", ".join(["file_name", *NAMES.values(), "split", "text"])
    advice = f"name the column of the texts with --text_column: its columns are {columns}"
    assert line == f"metadata.csv has both sentence and text; {advice}"
    line = refusal(capfd, tmp_path, folder, "--dry_run", "--text_column", "words", status=2)
    assert line == f"--text_column is words, which metadata.csv does not have; its columns are {columns}"
    assert run(tmp_path, folder, "--prepare_only", "--text_column", "text") == 0
    assert {row["text"] for row in prepared(tmp_path / "audio").values()} == {"another"}
    assert run(tmp_path, folder, "--prepare_only", "--text_column", "sentence") == 0
    assert "another" not in {row["text"] for row in prepared(tmp_path / "audio").values()}
    write_table(folder / "metadata.csv", [{"file_name": "a.wav", "words": "one"}])
    line = refusal(capfd, tmp_path, folder, status=2)
    assert line.startswith(
        "metadata.csv has no column text or sentence or transcript or transcription; name the column"
    )
    write_table(folder / "metadata.csv", [{"path": "a.wav", "text": "one"}])
    assert refusal(capfd, tmp_path, folder).endswith("has no column file_name; its columns are path, text")


def test_tables_and_folders_of_another_kind_are_refused(tmp_path, capfd):
    folder = tmp_path / "own"
    folder.mkdir()
    layouts = "has no audio/<accent>/<split>/*.tar.gz, no metadata.csv or metadata.jsonl beside recordings"
    assert layouts in (line := refusal(capfd, tmp_path, folder)) and line.endswith("it has 0 files")
    write_audio(folder, own_rows("test", 1))
    assert refusal(capfd, tmp_path, folder).endswith(f"it has 1 file, such as {own_rows('test', 1)[0][0]}")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.wav"\n')
    assert "metadata.jsonl is not lines of JSON (JSONDecodeError: " in refusal(capfd, tmp_path, folder)
    (folder / "metadata.jsonl").write_text('{"path": "a.wav", "text": "one"}\n')
    line = refusal(capfd, tmp_path, folder)
    assert line.endswith("metadata.jsonl has 1 row without a file_name, the first with path, text")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.wav", "text": "one"}\n')
    line = refusal(capfd, tmp_path, folder)
    assert line == "metadata.jsonl names no file that is there among 1 row, such as a.wav"
    (folder / "metadata.jsonl").write_text("")
    assert refusal(capfd, tmp_path, folder, status=2).startswith("metadata.jsonl has no column text or ")


def test_numbers_of_classes_are_read_as_their_names(tmp_path):
    from datasets import Audio, ClassLabel, Features, Value

    features = Features(
        {"audio": Audio(decode=False), "text": Value("string"), "gender": ClassLabel(names=["Female", "Male"])}
    )
    rows = [{"audio": {"bytes": b"", "path": "a.wav"}, "text": "one", "gender": cell} for cell in (1, 0, None, -1)]
    (tmp_path / "own").mkdir()
    table = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, tmp_path / "own/test.parquet")
    args, _ = script.parse_arguments(["--dataset", str(tmp_path / "own"), "--data_dir", str(tmp_path / "audio")])
    corpus = script.open_corpus(args)
    assert [row["gender"] for row in corpus.listed["test.parquet"]] == ["Male", "Female", "", ""]


def test_parquet_files_without_one_audio_column_are_refused(tmp_path, capfd):
    folder = tmp_path / "own"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"], "sound": ["a.wav"]}), folder / "test.parquet")
    line = "test.parquet has no audio column (of bytes and path); its columns are text, sound"
    assert refusal(capfd, tmp_path, folder) == line
    cell = {"bytes": b"", "path": "a.wav"}
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["one"], "left": [cell], "right": [cell]}), folder / "test.parquet"
    )
    assert refusal(capfd, tmp_path, folder).startswith("test.parquet has more than one: left, right; ")


def test_splits_that_cannot_be_made_are_refused(tmp_path, capfd):
    folder = one_table(tmp_path / "own", splits=["train"], limit=12)
    rows = list(csv.DictReader((folder / "metadata.csv").open(newline="", encoding="utf-8")))
    write_table(folder / "metadata.csv", [{**row, "client_id": "one"} for row in rows])
    given = "give it in train, dev and test folders or in a column split"
    line = f"{folder} has no dev and no test split, and 1 speaker cannot be divided to make it: {given}"
    assert refusal(capfd, tmp_path, folder) == line
    write_table(folder / "metadata.csv", [{"file_name": row["file_name"], "text": row["sentence"]} for row in rows])
    line = refusal(capfd, tmp_path, folder)
    assert line.startswith(f"{folder} has no dev and no test split, and no column speaker, speaker_id, user_ids or ")
    (folder / "metadata.csv").unlink()
    audio_folder(folder, splits=["test"], limit=4)
    assert refusal(capfd, tmp_path, folder) == f"{folder} has no train split; it has test"


def test_flags_of_another_layout_are_refused(tmp_path, capfd):
    folder = audio_folder(tmp_path / "own", limit=2)
    line = refusal(capfd, tmp_path, folder, "--streaming", "--max_steps", "2", status=2)
    assert line == f"--streaming is for AfriSpeech-200's layout, which {folder} is not in; leave it out"
    line = refusal(capfd, tmp_path, CORPUS, "--dry_run", "--text_column", "text", status=2)
    assert line.startswith("--text_column is text; ") and line.endswith("has none to choose: leave it out")


# ---------------------------------------------------------------- on a Hub


def test_a_parquet_dataset_of_the_hub_is_fine_tuned_on(tmp_path):
    folder = parquet_folder(tmp_path / "repository", limit=30)
    with LoopbackHub(datasets={HUB_NAME: folder}) as hub:
        flags = "--max_steps 2 --gradient_accumulation_steps 1 --data_dir audio --output_dir out --num_proc 1".split()
        command = ["--model", MODEL, "--dataset", HUB_NAME, *flags]
        done = run_script(*command, cwd=tmp_path, env=hub.env(tmp_path))
        assert done.returncode == 0, done.stderr[-3000:]
        for path in (tmp_path / "audio/hub").rglob("*.parquet"):
            raise AssertionError(f"{path} was kept")
        fetched = hub.count("*.parquet", "GET")
        again = run_script(*command[:-2], "--eval_only", cwd=tmp_path, env=hub.env(tmp_path))
        assert again.returncode == 0 and hub.count("*.parquet", "GET") == fetched
    assert len(load_predictions(tmp_path / "out/results")) == 30
    clip = own_rows("test", 1)[0][0].split("/")[1]
    names = {row["audio_filepath"] for row in load_predictions(tmp_path / "out/results")}
    assert f"data/test-00000-of-00001/00000-{clip}" in names
    source = load_json(tmp_path / "audio/source.json")
    assert source["dataset"] == HUB_NAME and len(source["stamps"]) == 4
    assert f"datasets:\n- {HUB_NAME}\n" in (tmp_path / "out/final/README.md").read_text()


def test_a_prepared_dataset_without_a_revision_needs_no_hub(tmp_path):
    main = parquet_folder(tmp_path / "main", splits=["test"], limit=3)
    also = audio_folder(tmp_path / "also", splits=["test"], limit=3)
    command = ["--model", MODEL, "--dataset", HUB_NAME, "--also_score", "us/english", "--eval_only", "--num_proc", 1]
    with LoopbackHub(datasets={HUB_NAME: main, "us/english": also}) as hub:
        env = hub.env(tmp_path)
        done = [run_script(*command, "--data_dir", "audio", "--output_dir", "first", cwd=tmp_path, env=env)]
    env["HF_HUB_OFFLINE"] = "1"
    done += [
        run_script(*command, "--data_dir", folder, "--output_dir", "second", cwd=tmp_path, env=env)
        for folder in ("audio", "other")
    ]
    assert [part.returncode for part in done] == [0, 0, 1], [part.stderr[-300:] for part in done]
    assert [part.stdout.count("the Hub cannot be reached: taken as") for part in done] == [0, 2, 0]
    assert "cannot be reached: go online" in error_line(done[2].stderr)
    assert load_predictions(tmp_path / "first/results") == load_predictions(tmp_path / "second/results")


def test_an_audio_folder_of_the_hub_is_prepared(tmp_path):
    folder = audio_folder(tmp_path / "repository", limit=4)
    with LoopbackHub(datasets={HUB_NAME: folder}) as hub:
        flags = ["--dataset", HUB_NAME, "--data_dir", "audio", "--output_dir", "out", "--num_proc", 1]
        done = run_script(*flags, "--prepare_only", cwd=tmp_path, env=hub.env(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    clips = prepared(tmp_path / "audio")
    assert len(clips) == 12 and not any(row["problem"] for row in clips.values())
    assert not [path for path in (tmp_path / "audio/hub").rglob("*") if script.is_audio_name(path)]


def test_no_file_outside_is_deleted_for_a_metadata_that_names_it(tmp_path):
    folder = audio_folder(tmp_path / "repository", limit=4)
    outside = [tmp_path / "beside.wav", tmp_path / "absolute.wav"]
    rows = list(csv.DictReader((folder / "test/metadata.csv").open(newline="", encoding="utf-8")))
    rows += [{**rows[0], "file_name": name} for name in (f"../../../{outside[0].name}", str(outside[1]))]
    write_table(folder / "test/metadata.csv", rows)
    for path in outside:
        path.write_bytes(own_rows("test", 1)[0][1])
    with LoopbackHub(datasets={HUB_NAME: folder}) as hub:
        flags = ["--dataset", HUB_NAME, "--data_dir", "audio", "--output_dir", "out", "--num_proc", 1]
        done = run_script(*flags, "--prepare_only", cwd=tmp_path, env=hub.env(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["problem"] for row in prepared(tmp_path / "audio").values() if row["problem"]] == 2 * [
        "refused: its path climbs out of the folder"
    ]
    assert all(path.is_file() for path in outside)


def test_configurations_are_chosen_by_name(tmp_path):
    folder = tmp_path / "repository"
    for name in ("en", "fr"):
        parquet_folder(folder, limit=3, prefix=name)
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        f"  - split: validation\n    path: {name}/validation-*\n  - split: test\n    path: {name}/test-*\n"
        for name in ("en", "fr")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# Dictations\n")
    with LoopbackHub(datasets={HUB_NAME: folder}) as hub:
        names = [HUB_NAME, f"{HUB_NAME}:de", f"{HUB_NAME}:fr"]
        code = f"import finetune_medasr as script\nfor number, name in enumerate({names}):\n"
        code += "    status = script.main(['--dataset', name, '--data_dir', str(number), '--dry_run'])\n"
        code += "    print('status', status)"
        env = {**hub.env(tmp_path), "PYTHONPATH": str(SCRIPT.parent)}
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert re.findall("status (.)", done.stdout) == ["2", "2", "0"], done.stderr
    several, unknown = (line.removeprefix("finetune_medasr.py: error: ") for line in done.stderr.splitlines())
    assert several == f"--dataset {HUB_NAME} has the configurations en, fr: choose one, as {HUB_NAME}:en"
    assert unknown == f"--dataset names 'de'; the configurations of {HUB_NAME} are en, fr"
    assert run(tmp_path, f"{folder}:fr", "--dry_run") == 0 and run(tmp_path, f"{folder}:en", "--dry_run") == 2
    assert done.stdout.count(" 3 clips") == 3 + 3 and "in 4 archives" in done.stdout  # each split, and its one accent
    assert not hub.count("*/en/*", "GET") and hub.count("*/fr/*.parquet", "GET")


@pytest.mark.parametrize(
    "head, message",
    [
        ("configs: [{config_name: no, data_files: x}, {config_name: 5, data_files: x}]", "configurations False, 5:"),
        ("configs: [{config_name: a, data_files: [{split: 1, path: x}]}]", "no parquet files"),
        ("made: 2023-02-30", "does not begin with YAML (ValueError: day is out of range"),
        ("x: " + "[" * 2_000, "does not begin with YAML (RecursionError"),
    ],
)
def test_a_readme_that_means_nothing_is_refused_in_one_line(tmp_path, capfd, head, message):
    folder = parquet_folder(tmp_path / "own", splits=["test"], limit=2)
    (folder / "README.md").write_text(f"---\n{head}\n---\n")
    assert message in refusal(capfd, tmp_path, folder, status=2 if "configurations" in message else 1)
