"""The program as a user runs it: exit status, what it prints, what it writes."""

import re
import shutil

import jiwer
import pytest
import soundfile
import torch
import yaml
from conftest import CORPUS, MODEL, corpus_audio, corpus_rows, load_json, scored_clips, succeeded, tensorboard
from helpers import cells, modified, one_table, read_csv, run_main, write, write_table, write_wav
from safetensors.torch import load_file
from transformers import AutoModelForCTC, AutoProcessor, TrainingArguments, pipeline

import finetune_medasr as script

pytestmark = pytest.mark.slow
US_ENGLISH = CORPUS.parent / "us_english"


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def log(demo):
    """The Trainer's log of the demo, up to its last checkpoint."""
    return load_json(demo.output / "checkpoint-120/trainer_state.json")["log_history"]


STEPS = [40, 80, 120]  # at which the demo evaluates


def test_the_demo_writes_the_files_that_it_promises(demo):
    assert names(demo.folder) == {"medasr-demo"}
    whole, checkpoints = {"audio", "runs", "final", "results", "run.json"}, {f"checkpoint-{step}" for step in STEPS}
    assert names(demo.output) == whole | checkpoints
    pictures = {"wer_by_accent.png", "training.png"}
    texts = {"metrics.json", "predictions_test.jsonl", "report.md", "skipped_clips.csv"}
    assert names(demo.results) == texts | pictures
    archives = len(list(CORPUS.rglob("*.tar.gz")))
    assert len(list(demo.audio.glob("corpus-*/*.arrow"))) == len(list(demo.audio.rglob("*.arrow"))) == archives
    model = {"config.json", "generation_config.json", "model.safetensors", "processor_config.json", "tokenizer.json",
             "tokenizer_config.json", "training_args.bin"}  # fmt: skip
    assert names(demo.final) == model | {"README.md"} | pictures
    resumed = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert {tuple(sorted(names(demo.output / name))) for name in checkpoints} == {tuple(sorted(model | resumed))}
    report = (demo.results / "report.md").read_text()
    assert set(re.findall(r"!\[[^]]+\]\(([^)]+)\)", report)) == pictures
    assert all((demo.results / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    for name in ("baseline", "finetuned"):
        assert f"{100 * demo.metrics[name]['wer']:.1f} %" in report


def test_what_is_published_names_no_folder_of_the_machine_and_needs_no_script(demo):
    """The demo's model and corpus are given as absolute paths."""
    for path in (*demo.results.glob("*.*"), *demo.final.glob("*.md"), *demo.final.glob("*.json")):
        content = path.read_bytes()
        assert not [folder for folder in (MODEL.parent, demo.folder) if str(folder).encode() in content], path
    pickled = demo.output / "checkpoint-120/training_args.bin"
    assert type(torch.load(pickled, weights_only=False)) is TrainingArguments
    assert b"finetune_medasr" not in pickled.read_bytes()
    assert AutoProcessor.from_pretrained(demo.output / "checkpoint-40").tokenizer("fever").input_ids

    card = (demo.final / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "other" and header["license_name"] == "health-ai-developer-foundations"
    assert header["license_link"] == "https://developers.google.com/health-ai-developer-foundations/terms"
    (result,) = header["model-index"][0]["results"]
    assert result["dataset"] == {"name": CORPUS.name, "type": CORPUS.name, "split": "test"}
    found = {metric["name"]: (metric["type"], metric["value"]) for metric in result["metrics"]}
    for name in ("wer", "wer_paper", "wer_raw", "cer"):
        assert found[name] == (name[:3], round(100 * demo.metrics["finetuned"][name], 2))
    assert f"# {MODEL.name} adapted" in card and f"Fine-tuned on {CORPUS.name}, 280 clips" in card
    assert names(demo.results) & set(re.findall(r"!\[[^]]+\]\(([^)]+)\)", card)) <= names(demo.final)


def test_the_metrics_have_the_keys_that_programs_read_and_the_rates_of_the_predictions(demo):
    metrics, rows = demo.metrics, demo.predictions
    assert set(metrics) == {"config", "versions", "data", "baseline", "finetuned", "delta"}
    kinds = {"domain", "accent", "country", "gender", "age_group", "seen_accent", "duration"}
    for field, system in (("pred_text", "finetuned"), ("baseline_text", "baseline")):
        scores = metrics[system]
        assert set(scores["groups"]) == kinds and set(scores["groups"]["domain"]) == {"clinical", "general"}
        assert scores["wer_ci95"][0] < scores["wer"] < scores["wer_ci95"][1]
        errors = scores["substitutions"] + scores["deletions"] + scores["insertions"]
        assert errors == round(scores["wer"] * scores["words"])
        for kind, groups in scores["groups"].items():
            assert sum(group["clips"] for group in groups.values()) == scores["clips"] == len(rows), kind
        normalizers = {"wer_paper": script.normalize_paper, "wer_raw": lambda text: " ".join(text.split())}
        for name, normalize in {**normalizers, "wer": script.normalize_wer}.items():
            texts = [tuple(normalize(row[key]) for key in ("text", field)) for row in rows]
            assert scores[name] == pytest.approx(jiwer.wer(*map(list, zip(*texts)))), name
        assert scores["cer"] == pytest.approx(jiwer.cer(*map(list, zip(*texts))))
        assert scores["words"] == sum(len(reference.split()) for reference, _ in texts)
        for domain, group in scores["groups"]["domain"].items():
            chosen = [pair for pair, row in zip(texts, rows) if row["domain"] == domain]
            assert group["wer"] == pytest.approx(jiwer.wer(*map(list, zip(*chosen))))
    assert metrics["delta"]["wer"] == pytest.approx(metrics["finetuned"]["wer"] - metrics["baseline"]["wer"])
    assert metrics["config"]["training"]["max_steps"] == 120 and metrics["config"]["model"] == MODEL.name
    assert {"torch", "transformers", "datasets"} <= set(metrics["versions"])


def test_there_is_one_prediction_for_each_scored_test_clip(demo):
    rows, audio = corpus_rows("test"), corpus_audio("test")
    keys = "audio_filepath duration text pred_text baseline_text speaker accent country domain gender age_group wer"
    assert {tuple(row) for row in demo.predictions} == {tuple(keys.split())}
    predicted = {row["audio_filepath"]: row for row in demo.predictions}
    assert len(predicted) == len(demo.predictions) and set(predicted) == set(rows) & set(audio)
    for clip, row in predicted.items():
        of_csv = rows[clip]
        assert (row["text"], row["speaker"]) == (of_csv["transcript"], of_csv["user_ids"])
        assert row["duration"] == pytest.approx(float(of_csv["duration"]), abs=0.02)
        for key in ("accent", "country", "domain", "gender", "age_group"):
            assert row[key] == of_csv[key]
    groups, seen = demo.metrics["finetuned"]["groups"], {row["accent"] for row in corpus_rows("train").values()}
    assert "NA" in groups["country"], "Namibia, not a missing value"
    unseen = sum(row["accent"] not in seen for row in demo.predictions)
    assert groups["seen_accent"]["unseen"]["clips"] == unseen > 0


def test_no_clip_is_lost_without_a_reason(demo):
    skipped = read_csv(demo.results / "skipped_clips.csv")
    planted = [("test", "no audio"), ("train", "empty text"), ("train", "over --max_train_seconds"),
               ("train", "too short"), ("train", "undecodable audio")]  # fmt: skip
    reasons = [(row["split"], re.split(r" ?[:(]", row["reason"])[0]) for row in skipped]
    assert sorted(reasons) == planted
    assert all(f"left out of {split}: 1 x {why}" in demo.stdout for split, why in reasons)
    for split in script.SPLITS:
        rows, data = corpus_rows(split), demo.metrics["data"][split]
        named = {row["clip"] for row in skipped if row["split"] == split}
        assert data["clips"] + len(named) == len(set(rows) | set(corpus_audio(split)))
        seconds = sum(float(rows[clip]["duration"]) for clip in rows if clip not in named)
        assert data["hours"] == pytest.approx(seconds / 3600, abs=0.001)


def test_fine_tuning_takes_at_least_40_percent_of_the_errors_away_on_new_speakers(demo):
    trained_on = {row["user_ids"] for split in ("train", "dev") for row in corpus_rows(split).values()}
    scored = {corpus_rows("test")[row["audio_filepath"]]["user_ids"] for row in demo.predictions}
    assert len(scored) >= 10 and not scored & trained_on
    before, after = demo.metrics["baseline"]["wer"], demo.metrics["finetuned"]["wer"]
    assert before < 1 and after <= 0.6 * before
    assert any(f"{100 * before:.1f} %" in line and f"{100 * after:.1f} %" in line for line in demo.stdout.splitlines())
    said = re.split(r"[\r\n]+", demo.stdout + "\n" + demo.stderr)
    for step in STEPS:
        assert [line for line in said if re.search(rf"\b{step}\b.*dev WER [\d.]+ %", line)], step
    assert [line for line in said if "120/120" in line and "loss" in line and "audio s/s" in line]


def test_tensorboard_has_the_curves_and_transcriptions(demo, log):
    events = tensorboard(demo.output / "runs")
    tags = "loss grad_norm learning_rate audio_seconds_per_second padding_percent data_wait_percent".split()
    evaluated = "eval/loss eval/wer eval/cer eval/wer_by_domain/clinical eval/wer_by_domain/general".split()
    for tag in [*(f"train/{name}" for name in tags), *evaluated]:
        key = tag.removeprefix("train/").replace("eval/", "eval_")
        logged = {entry["step"]: entry[key] for entry in log if key in entry}
        assert {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(logged, rel=1e-5), tag
        assert list(logged) == (STEPS if tag.startswith("eval") else list(range(5, 121, 5)))
    assert {"test_baseline/wer", "test_finetuned/wer"} <= set(events.Tags()["scalars"])
    values = {name: [entry[name] for entry in log if name in entry] for name in log[0]}
    assert values["loss"][-1] < values["loss"][0] and max(values["learning_rate"]) <= 2e-3
    assert min(values["audio_seconds_per_second"]) > 0 and all(0 <= value < 60 for value in values["padding_percent"])
    assert all(0 <= wait <= 100 for wait in values["data_wait_percent"]) and max(values["data_wait_percent"]) > 0
    texts = events.Tensors("eval/transcriptions/text_summary")
    assert [event.step for event in texts] == STEPS
    shown = texts[-1].tensor_proto.string_val[0].decode()
    assert sum(" ".join(row["transcript"].split()) in shown for row in corpus_rows("dev").values()) >= 3


def test_the_final_model_is_the_best_on_dev_and_writes_the_same_text_everywhere(demo, log, known_clip, tmp_path):
    best = min((entry for entry in log if "eval_wer" in entry), key=lambda entry: entry["eval_wer"])["step"]
    weights = [path / "model.safetensors" for path in (demo.final, demo.output / f"checkpoint-{best}")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    clip, expected = known_clip
    write_wav(tmp_path / "visit.wav", clip)
    audio, rate = soundfile.read(tmp_path / "visit.wav", dtype="float32")
    processor, model = AutoProcessor.from_pretrained(demo.final), AutoModelForCTC.from_pretrained(demo.final)
    ids = model.generate(**processor(audio, sampling_rate=rate))
    generated = processor.batch_decode(ids, skip_special_tokens=True)[0]
    recognise = pipeline("automatic-speech-recognition", model=str(demo.final))
    piped = recognise({"raw": audio, "sampling_rate": rate})["text"]
    done = succeeded(run_main(tmp_path, "--transcribe", "visit.wav", "--model", demo.final))
    assert "warning" not in done.stderr
    assert generated.strip() == piped.strip() == done.stdout.strip() == expected
    assert not re.search(r"[<>{}]", expected)


def scores_of(results, system):
    """The scores of a system in a folder of results, without what --eval_only and --score_file cannot know."""
    scores = load_json(results / "metrics.json")[system]
    scores["groups"].pop("seen_accent", None)
    return scores


def test_eval_only_and_score_file_give_the_figures_again_and_leave_those_of_a_run(demo, tmp_path):
    out, results = tmp_path / "out", tmp_path / "out/scores/results"
    shutil.copytree(demo.results, out / "results")
    shutil.copy(demo.output / "run.json", out)
    before = modified(out / "results")
    flags = ["--eval_only", "--model", demo.final, "--dataset", CORPUS, "--data_dir", demo.audio, "--output_dir", "out"]
    done = succeeded(run_main(tmp_path, *flags))
    metrics = load_json(results / "metrics.json")
    assert "results: out/scores/results" in done.stdout and f"{100 * metrics['baseline']['wer']:.1f} %" in done.stdout
    assert metrics["finetuned"] is None and metrics["delta"] is None
    assert scores_of(results, "baseline") == scores_of(demo.results, "finetuned")
    again = {row["audio_filepath"]: row["pred_text"] for row in scored_clips(results)}
    assert again == {row["audio_filepath"]: row["pred_text"] for row in demo.predictions}
    for name in ("predictions.jsonl", "predictions.csv"):
        write_table(tmp_path / name, demo.predictions)
        done = succeeded(run_main(tmp_path, "--score_file", name, "--output_dir", "out"))
        assert done.stderr == ""
        for system in ("baseline", "finetuned"):
            assert scores_of(results, system) == scores_of(demo.results, system)
    assert modified(out / "results") == before and names(out) == {"results", "run.json", "scores"}


@pytest.fixture(scope="module")
def forgetting(demo, tmp_path_factory):
    """(folder, flags, metrics) of a run that also scored US English and a folder of four clips, one of them damaged."""
    folder = tmp_path_factory.mktemp("also")
    shutil.copytree(demo.audio, folder / "audio")
    rows = read_csv(US_ENGLISH / "test/metadata.csv")[:4]
    audio = {row["file_name"]: (US_ENGLISH / "test" / row["file_name"]).read_bytes() for row in rows}
    one_table(folder / "clinic", rows, audio | {rows[3]["file_name"]: b"fLaC, but nothing else"})
    flags = f"""--model {MODEL} --dataset {CORPUS} --data_dir {folder}/audio --accents zulu
        --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --max_steps 2 --eval_steps 2 --save_steps 2
        --warmup_steps 0 --learning_rate 2e-3 --max_test_samples 6 --dataloader_num_workers 0 --disable_tqdm true
        --also_score {US_ENGLISH} {folder}/clinic""".split()
    succeeded(run_main(folder, *flags, "--output_dir", "out"))
    return folder, flags, load_json(folder / "out/results/metrics.json")


def test_each_further_test_set_has_its_scores_before_and_after(forgetting, tmp_path):
    folder, flags, metrics = forgetting
    out = folder / "out"
    clips = {name: part["finetuned"]["clips"] for name, part in metrics["also"].items()}
    assert clips == {"us_english": 6, "clinic": 3}
    for part in (metrics, *metrics["also"].values()):
        assert set(part["baseline"]) == set(part["finetuned"]) and part["delta"]["wer_ci95"]
    forgotten = metrics["also"]["us_english"]
    assert forgotten["baseline"]["wer"] < 0.1 < metrics["baseline"]["wer"], "it was trained on US English"
    assert forgotten["baseline"]["groups"]["accent"].keys() == {"american"}
    report, card = ((out / name).read_text(encoding="utf-8") for name in ("results/report.md", "final/README.md"))
    for text in (report, card):
        assert "# Also scored: us\\_english" in text and "# Also scored: clinic" in text
    assert card.count("type: automatic-speech-recognition") == 3
    assert [row["accent"] for row in scored_clips(out / "results")] == ["zulu"] * 6
    assert (out / "results/predictions_us-english.jsonl").read_text(encoding="utf-8").count("\n") == 6
    (damaged,) = [row for row in read_csv(out / "results/skipped_clips.csv") if row["split"] == "clinic"]
    assert damaged["reason"].startswith("undecodable audio")
    assert metrics["data"]["clinic"]["skipped"] == {"undecodable audio": 1}
    assert names(out / "results") >= {"path.png"}
    tags = "test_finetuned/wer us-english_baseline/wer us-english_finetuned/wer clinic_finetuned/cer".split()
    assert {*tags, "interpolated_by_percent/dev"} <= set(tensorboard(out / "runs").Tags()["scalars"])

    succeeded(run_main(tmp_path, *flags, "--eval_only", "--model", out / "final", "--output_dir", "."))
    for name, part in load_json(tmp_path / "results/metrics.json")["also"].items():
        assert part["delta"] is None and part["baseline"]["wer"] == metrics["also"][name]["finetuned"]["wer"]
        assert part["baseline"]["wer_ci95"] == metrics["also"][name]["finetuned"]["wer_ci95"]


def test_a_finished_run_gives_the_models_between_the_base_and_the_fine_tuned(forgetting, tmp_path):
    folder, flags, metrics = forgetting
    shutil.copytree(folder / "out", tmp_path / "out")
    base, tuned = (load_file(path / "model.safetensors") for path in (MODEL, folder / "out/final"))
    path = metrics["path"]
    for name in ("us_english", "clinic"):
        ends = [metrics["also"][name][system]["wer"] for system in ("baseline", "finetuned")]
        assert [path[0]["wer"][name], path[-1]["wer"][name]] == ends
    assert [point["share"] for point in path] == [0, 0.25, 0.5, 0.75, 1] and list(path[0]["wer"])[0] == "dev"
    report = (folder / "out/results/report.md").read_text(encoding="utf-8")
    assert cells(report, "0.25") == [f"{100 * wer:.1f} %" for wer in path[1]["wer"].values()]
    for share in (0.75, 0, 1):
        done = succeeded(run_main(tmp_path, *flags, "--output_dir", "out", "--interpolate", share))
        assert "update 2 of 2" in done.stdout
        found = load_file(tmp_path / "out/final/model.safetensors")
        again = load_json(tmp_path / "out/results/metrics.json")
        rounding = share * (1 - share)  # nothing is rounded where a model is the base, or the fine-tuned one
        for name in [name for name in base if base[name].is_floating_point()]:
            between = base[name].double() + share * (tuned[name].double() - base[name].double())
            torch.testing.assert_close(found[name], between.float(), rtol=5e-5 * rounding, atol=1e-7 * rounding)
        (point,) = [point for point in path if point["share"] == share]
        assert again["also"]["us_english"]["finetuned"]["wer"] == point["wer"]["us_english"] and again["path"] == path
        texts = [(row["pred_text"], row["baseline_text"]) for row in scored_clips(tmp_path / "out/results")]
        assert all(ours == before for ours, before in texts) == (share == 0)
        note = f"is {share:g} of the way from the base"
        for name in ("final/README.md", "results/report.md"):
            assert (note in (tmp_path / "out" / name).read_text(encoding="utf-8")) == (share < 1), name
        if share == 0.75:
            clip = US_ENGLISH / "test/00.flac"
            raw, rate = soundfile.read(clip, dtype="float32")
            recognise = pipeline("automatic-speech-recognition", model=str(tmp_path / "out/final"))
            done = succeeded(run_main(tmp_path, "--transcribe", clip, "--model", "out/final"))
            text = recognise({"raw": raw, "sampling_rate": rate})["text"].replace("</s>", "")  # which the base writes
            assert text.strip() == done.stdout.strip() != ""
    assert scored_clips(tmp_path / "out/results") == scored_clips(folder / "out/results")


def test_a_finished_run_scores_another_set_without_training(forgetting, tmp_path):
    """Of a set in another script the rates that drop its letters are missing."""
    folder, flags, metrics = forgetting
    shutil.copytree(folder / "out", tmp_path / "out")
    write(tmp_path / "arabic/00.flac", (US_ENGLISH / "test/00.flac").read_bytes())
    write(tmp_path / "arabic/metadata.csv", "file_name,text\n00.flac,المريض بخير\n")
    assert "finished" in succeeded(run_main(tmp_path, *flags, "--output_dir", "out")).stdout
    done = succeeded(run_main(tmp_path, *flags[:-1], tmp_path / "arabic", "--output_dir", "out"))
    assert "update 2 of 2" in done.stdout
    again = load_json(tmp_path / "out/results/metrics.json")
    assert list(again["also"]) == ["us_english", "arabic"]
    for part in ("baseline", "finetuned"):
        assert again[part] == metrics[part] and again["also"]["us_english"][part] == metrics["also"]["us_english"][part]
    card = (tmp_path / "out/final/README.md").read_text(encoding="utf-8")
    *_, of_arabic = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]
    rates = {metric["name"] for metric in of_arabic["metrics"]}
    assert {"wer", "wer_raw", "cer"} <= rates and not rates & {"wer_paper", "wer_paper_short"}
