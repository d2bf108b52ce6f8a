"""--also_score: other test sets beside the main one, and what a model forgets."""

import csv
import re
import shutil

import pytest
import yaml
from conftest import CORPUS, HERE, MODEL, error_line, load_json, load_predictions

import finetune_medasr as script
from finetune_medasr import main

US_ENGLISH = HERE / "fixtures/us_english"
FLAGS = f"""--model {MODEL} --dataset {CORPUS} --accents zulu --per_device_train_batch_size 8 --use_cpu true
    --gradient_accumulation_steps 1 --max_steps 2 --eval_steps 2 --save_steps 2 --warmup_steps 0 --learning_rate 2e-3
    --max_test_samples 6 --dataloader_num_workers 0 --disable_tqdm true""".split()


@pytest.fixture(scope="module")
def clinic(tmp_path_factory):
    """Four of the US-English clips in a folder without splits, one of them damaged."""
    folder = tmp_path_factory.mktemp("own") / "clinic"
    folder.mkdir()
    rows = list(csv.DictReader((US_ENGLISH / "test/metadata.csv").open(encoding="utf-8")))[:4]
    for row in rows:
        shutil.copy(US_ENGLISH / "test" / row["file_name"], folder)
    (folder / rows[3]["file_name"]).write_bytes(b"fLaC, but nothing else")
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def finished(demo, clinic, tmp_path_factory):
    """The folder of a run of two updates that also scored US English and the clinic's clips; what it printed."""
    folder = tmp_path_factory.mktemp("also")
    shutil.copytree(demo.audio, folder / "audio")
    flags = [*FLAGS, "--data_dir", str(folder / "audio"), "--output_dir", str(folder / "out")]
    return folder, [*flags, "--also_score", str(US_ENGLISH), str(clinic)]


@pytest.fixture(scope="module")
def metrics(finished):
    assert main(finished[1]) == 0
    return load_json(finished[0] / "out/results/metrics.json")


@pytest.mark.slow
def test_each_set_has_its_scores_before_and_after(metrics, finished):
    out = finished[0] / "out"
    assert {name: part["finetuned"]["clips"] for name, part in metrics["also"].items()} == {
        "us_english": 6,
        "clinic": 3,
    }
    for part in (metrics, *metrics["also"].values()):
        assert set(part["baseline"]) == set(part["finetuned"]) and part["delta"]["wer_ci95"]
    forgotten = metrics["also"]["us_english"]
    assert forgotten["baseline"]["wer"] < 0.1 < metrics["baseline"]["wer"], "it was trained on US English"
    assert forgotten["baseline"]["groups"]["accent"].keys() == {"american"}
    report, card = ((out / name).read_text(encoding="utf-8") for name in ("results/report.md", "final/README.md"))
    for text in (report, card):
        assert "# Also scored: us\\_english" in text and "# Also scored: clinic" in text
    assert card.count("type: automatic-speech-recognition") == 3
    assert len(load_predictions(out / "results")) == 6
    assert (out / "results/predictions_us-english.jsonl").read_text(encoding="utf-8").count("\n") == 6


@pytest.mark.slow
def test_what_a_further_set_leaves_out_is_listed(metrics, finished, clinic):
    rows = list(csv.DictReader((finished[0] / "out/results/skipped_clips.csv").open(encoding="utf-8")))
    (damaged,) = [row for row in rows if row["split"] == "clinic"]
    assert damaged["reason"].startswith("undecodable audio")
    assert metrics["data"]["clinic"]["skipped"] == {"undecodable audio": 1}


@pytest.mark.slow
def test_tensorboard_has_the_further_sets(metrics, finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = EventAccumulator(str(finished[0] / "out/runs")).Reload().Tags()["scalars"]
    assert {"test_finetuned/wer", "us-english_baseline/wer", "us-english_finetuned/wer", "clinic_finetuned/cer"} <= set(
        tags
    )


@pytest.mark.slow
def test_a_finished_run_scores_another_set_without_training(metrics, finished, tmp_path, capfd):
    shutil.copytree(finished[0] / "out", tmp_path / "out")
    flags = [flag.replace(str(finished[0] / "out"), str(tmp_path / "out")) for flag in finished[1]]
    assert main(flags) == 0 and "finished" in capfd.readouterr().out
    assert main(flags[:-1]) == 0
    assert "update 2 of 2" in capfd.readouterr().out
    again = load_json(tmp_path / "out/results/metrics.json")
    assert list(again["also"]) == ["us_english"]
    for part in ("baseline", "finetuned"):
        assert again[part] == metrics[part] and again["also"]["us_english"][part] == metrics["also"]["us_english"][part]


@pytest.mark.slow
def test_a_set_in_another_script_lacks_the_rates_that_drop_its_letters(metrics, finished, tmp_path):
    shutil.copytree(finished[0] / "out", tmp_path / "out")
    (tmp_path / "arabic").mkdir()
    shutil.copy(US_ENGLISH / "test/00.flac", tmp_path / "arabic")
    (tmp_path / "arabic/metadata.csv").write_text("file_name,text\n00.flac,المريض بخير\n", encoding="utf-8")
    flags = [flag.replace(str(finished[0] / "out"), str(tmp_path / "out")) for flag in finished[1][:-2]]
    assert main([*flags, str(tmp_path / "arabic")]) == 0
    card = (tmp_path / "out/final/README.md").read_text(encoding="utf-8")
    _, of_arabic = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]
    assert [metric["name"] for metric in of_arabic["metrics"]] == ["wer", "wer_spoken", "wer_raw", "cer"]


@pytest.mark.slow
def test_eval_only_gives_the_same_scores(metrics, finished, tmp_path):
    model, out = str(finished[0] / "out/final"), str(tmp_path / "out")
    assert main([*finished[1], "--eval_only", "--model", model, "--output_dir", out]) == 0
    scored = load_json(tmp_path / "out/results/metrics.json")
    for name, part in scored["also"].items():
        after = metrics["also"][name]["finetuned"]
        assert part["delta"] is None and part["baseline"]["wer"] == after["wer"]
        assert part["baseline"]["wer_ci95"] == after["wer_ci95"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--also_score", "./nowhere"], "--also_score is ./nowhere: there is no such folder"),
        (["--also_score", "a/b", "a/b"], "--also_score has 'a/b', which names a split or is there twice"),
        (["--also_score", "test"], "--also_score has 'test', which names a split"),
        (["--also_score", "./test"], "--also_score has './test', which names a split"),
        (["--also_score", "a/b", "a-b"], "--also_score has 'a/b', which names a split or is there twice"),
        (["--also_score", "_Test"], "--also_score has '_Test', which names a split or is there twice (as 'test')"),
        (["--also_score", "us/en", "us_en"], "or is there twice (as 'us-en'); give it another path"),
        (["--also_score", "a/b", "--transcribe", "x.wav"], "--also_score is of use in a run and with --eval_only"),
    ],
)
def test_what_cannot_be_scored_is_refused(flags, message, capfd):
    assert main(flags) == 2
    assert message in error_line(capfd.readouterr().err)


def test_sets_named_in_other_alphabets_have_files_of_their_own():
    stems = [script.file_stem(name) for name in ("./тест", "./данные", "./us данные", "openslr/librispeech_asr:clean")]
    assert len(set(stems)) == 4 and stems[3] == "openslr-librispeech-asr-clean"
    assert all(re.fullmatch("[a-z0-9-]+", stem) for stem in stems)


def test_a_folder_without_recordings_is_refused_before_anything_is_converted(tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    flags = [*FLAGS, "--data_dir", str(tmp_path / "audio"), "--output_dir", str(tmp_path / "out")]
    assert main([*flags, "--also_score", str(tmp_path / "empty")]) == 1
    assert "empty has no audio/<accent>/<split>/*.tar.gz, no metadata.csv" in error_line(capfd.readouterr().err)
    assert not list((tmp_path / "audio").rglob("*.arrow"))
