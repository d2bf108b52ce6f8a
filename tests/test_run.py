"""The program as a user runs it: exit status, what it prints, what it writes."""

import csv
import dataclasses
import re
import shutil

import jiwer
import pytest
import soundfile
import yaml
from conftest import (
    CORPUS,
    MODEL,
    corpus_audio,
    corpus_rows,
    error_line,
    load_json,
    load_predictions,
    tensorboard,
    write_wav,
)

import finetune_medasr as script
from finetune_medasr import main, normalize_paper, normalize_wer, parse_settings

FIXTURE_FLAGS = ("--model", MODEL, "--dataset", CORPUS)
US_ENGLISH = CORPUS.parent / "us_english"


@pytest.fixture
def run(capfd):
    """run(flag, ...) -> (exit status, stdout, stderr) of the program in this process, on the small model and corpus."""

    def run(*arguments):
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    return run


def names(folder):
    return {path.name for path in folder.iterdir()}


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- the demo


@pytest.fixture(scope="module")
def log(demo):
    """The Trainer's log of the demo, up to its last checkpoint."""
    return load_json(demo.output / "checkpoint-120/trainer_state.json")["log_history"]


STEPS = [40, 80, 120]  # at which the demo evaluates


@pytest.mark.slow
def test_the_demo_writes_the_files_that_it_promises(demo):
    assert names(demo.folder) == {"medasr-demo"}
    whole, checkpoints = {"audio", "runs", "final", "results", "run.json"}, {f"checkpoint-{step}" for step in STEPS}
    assert names(demo.output) == whole | checkpoints
    pictures = {"wer_by_accent.png", "wer_by_duration.png", "training.png"}
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


@pytest.mark.slow
def test_what_is_published_names_no_folder_of_the_machine_and_needs_no_script(demo):
    """The demo's model and corpus are given as absolute paths."""
    import torch
    from transformers import AutoProcessor, TrainingArguments

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


@pytest.mark.slow
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
        texts = {}
        for name, normalize in (("wer_paper", normalize_paper), ("wer_raw", str.strip), ("wer", normalize_wer)):
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_every_bad_clip_is_named_with_its_reason_and_no_other_clip_is_lost(demo):
    skipped = read_csv(demo.results / "skipped_clips.csv")
    planted = [("test", "no audio"), ("train", "empty text"), ("train", "over --max_train_seconds"),
               ("train", "too short"), ("train", "undecodable audio")]  # fmt: skip
    assert sorted((row["split"], re.split(r" ?[:(]", row["reason"])[0]) for row in skipped) == planted
    for split in script.SPLITS:
        rows, audio, data = corpus_rows(split), corpus_audio(split), demo.metrics["data"][split]
        named = {row["clip"]: row["reason"] for row in skipped if row["split"] == split}
        assert data["clips"] + len(named) == len(set(rows) | set(audio)) and set(named) <= set(rows) | set(audio)
        assert {clip for clip, reason in named.items() if reason == "no audio"} == set(rows) - set(audio)
        for clip, reason in named.items():
            assert (reason == "empty text") == (not rows[clip]["transcript"].strip())
            assert ("max_train" in reason) == (float(rows[clip]["duration"]) > 30)
            assert f"left out of {split}: 1 x {re.split(r' ?[:(]', reason)[0]}" in demo.stdout
        seconds = sum(float(rows[clip]["duration"]) for clip in rows if clip not in named)
        assert data["hours"] == pytest.approx(seconds / 3600, abs=0.001)


@pytest.mark.slow
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


@pytest.mark.slow
def test_tensorboard_has_the_curves_and_transcriptions(demo, log):
    events = tensorboard(demo.output / "runs")
    for tag, key in (
        ("train/loss", "loss"),
        ("train/grad_norm", "grad_norm"),
        ("train/learning_rate", "learning_rate"),
        ("train/audio_seconds_per_second", "audio_seconds_per_second"),
        ("train/padding_percent", "padding_percent"),
        ("train/data_wait_percent", "data_wait_percent"),
        ("eval/loss", "eval_loss"),
        ("eval/wer", "eval_wer"),
        ("eval/cer", "eval_cer"),
        ("eval/wer_by_domain/clinical", "eval_wer_by_domain/clinical"),
        ("eval/wer_by_domain/general", "eval_wer_by_domain/general"),
    ):
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


@pytest.mark.slow
def test_the_final_model_is_the_best_on_dev_and_writes_the_same_clean_text_everywhere(
    demo, log, known_clip, tmp_path, run
):
    from transformers import AutoModelForCTC, AutoProcessor, pipeline

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
    status, transcribed, errors = run("--transcribe", tmp_path / "visit.wav", "--model", demo.final)
    assert status == 0 and "warning" not in errors
    assert generated.strip() == piped.strip() == transcribed.strip() == expected
    assert not re.search(r"[<>{}]", expected)


def scores_of(folder, system="baseline"):
    """The scores of a system in a folder of results, without what --eval_only and --score_file cannot know."""
    scores = load_json(folder / "results/metrics.json")[system]
    scores["groups"].pop("seen_accent", None)
    return scores


@pytest.mark.slow
def test_eval_only_and_score_file_give_the_figures_again_and_leave_those_of_a_run(demo, tmp_path, run):
    out, scores = tmp_path / "out", tmp_path / "out/scores"
    shutil.copytree(demo.results, out / "results")
    shutil.copy(demo.output / "run.json", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    corpus = ("--dataset", CORPUS, "--data_dir", demo.audio)
    status, said, _ = run("--eval_only", "--model", demo.final, *corpus, "--output_dir", out)
    metrics = load_json(scores / "results/metrics.json")
    assert status == 0 and f"results: {scores}/results" in said and f"{100 * metrics['baseline']['wer']:.1f} %" in said
    assert metrics["finetuned"] is None and metrics["delta"] is None
    assert scores_of(scores) == scores_of(demo.output, "finetuned")
    again = {row["audio_filepath"]: row["pred_text"] for row in load_predictions(scores / "results")}
    assert again == {row["audio_filepath"]: row["pred_text"] for row in demo.predictions}
    with open(tmp_path / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(demo.predictions[0]))
        writer.writeheader()
        writer.writerows(demo.predictions)
    for source in (demo.results / "predictions_test.jsonl", tmp_path / "predictions.csv"):
        status, _, errors = run("--score_file", source, "--output_dir", out)
        assert (status, errors) == (0, "")
        for system in ("baseline", "finetuned"):
            assert scores_of(scores, system) == scores_of(demo.output, system)
    assert {path: path.read_bytes() for path in before} == before and names(out) == {"results", "run.json", "scores"}


# ---------------------------------------------------------------- --also_score


@pytest.fixture(scope="module")
def forgetting(demo, tmp_path_factory):
    """A run of two updates that also scored US English and four clips of it in a folder without splits, one of them
    damaged: its folder, its command line and its metrics.
    """
    folder = tmp_path_factory.mktemp("also")
    shutil.copytree(demo.audio, folder / "audio")
    rows = read_csv(US_ENGLISH / "test/metadata.csv")[:4]
    (folder / "clinic").mkdir()
    for row in rows:
        shutil.copy(US_ENGLISH / "test" / row["file_name"], folder / "clinic")
    (folder / "clinic" / rows[3]["file_name"]).write_bytes(b"fLaC, but nothing else")
    lines = [",".join(f'"{cell}"' for cell in cells) for cells in (rows[0], *(row.values() for row in rows))]
    (folder / "clinic/metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    flags = f"""--model {MODEL} --dataset {CORPUS} --data_dir {folder}/audio --accents zulu --use_cpu true
        --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --max_steps 2 --eval_steps 2 --save_steps 2
        --warmup_steps 0 --learning_rate 2e-3 --max_test_samples 6 --dataloader_num_workers 0 --disable_tqdm true
        --output_dir {folder}/out --also_score {US_ENGLISH} {folder}/clinic""".split()
    assert main(flags) == 0
    return folder, flags, load_json(folder / "out/results/metrics.json")


@pytest.mark.slow
def test_each_further_test_set_has_its_scores_before_and_after(forgetting, tmp_path, capfd):
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
    assert [row["accent"] for row in load_predictions(out / "results")] == ["zulu"] * 6
    assert (out / "results/predictions_us-english.jsonl").read_text(encoding="utf-8").count("\n") == 6
    (damaged,) = [row for row in read_csv(out / "results/skipped_clips.csv") if row["split"] == "clinic"]
    assert damaged["reason"].startswith("undecodable audio")
    assert metrics["data"]["clinic"]["skipped"] == {"undecodable audio": 1}
    tags = {"test_finetuned/wer", "us-english_baseline/wer", "us-english_finetuned/wer", "clinic_finetuned/cer"}
    assert tags <= set(tensorboard(out / "runs").Tags()["scalars"])

    eval_only = ["--eval_only", "--model", str(out / "final"), "--output_dir", str(tmp_path)]
    assert main([*flags, *eval_only]) == 0
    for name, part in load_json(tmp_path / "results/metrics.json")["also"].items():
        assert part["delta"] is None and part["baseline"]["wer"] == metrics["also"][name]["finetuned"]["wer"]
        assert part["baseline"]["wer_ci95"] == metrics["also"][name]["finetuned"]["wer_ci95"]


@pytest.mark.slow
def test_a_finished_run_scores_another_set_without_training(forgetting, tmp_path, run):
    """Of a set in another script the rates that drop its letters are missing."""
    folder, flags, metrics = forgetting
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "arabic").mkdir()
    shutil.copy(US_ENGLISH / "test/00.flac", tmp_path / "arabic")
    (tmp_path / "arabic/metadata.csv").write_text("file_name,text\n00.flac,المريض بخير\n", encoding="utf-8")
    flags = [flag.replace(f"{folder}/out", f"{tmp_path}/out") for flag in flags]
    status, out, _ = run(*flags)
    assert status == 0 and "finished" in out
    status, out, errors = run(*flags[:-1], tmp_path / "arabic")
    assert status == 0 and "update 2 of 2" in out, errors
    again = load_json(tmp_path / "out/results/metrics.json")
    assert list(again["also"]) == ["us_english", "arabic"]
    for part in ("baseline", "finetuned"):
        assert again[part] == metrics[part] and again["also"]["us_english"][part] == metrics["also"]["us_english"][part]
    card = (tmp_path / "out/final/README.md").read_text(encoding="utf-8")
    *_, of_arabic = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]
    rates = {metric["name"] for metric in of_arabic["metrics"]}
    assert {"wer", "wer_raw", "cer"} <= rates and not rates & {"wer_paper", "wer_paper_short"}


@pytest.mark.parametrize(
    "flags, status, message",
    [
        ("./nowhere", 1, "./nowhere"),
        (str(MODEL), 1, "model"),  # no recordings
        ("a/b a/b", 2, "--also_score has 'a.b'"),
        ("us/en us_en", 2, "--also_score has 'us.en'"),
        ("_Test", 2, "(?i)--also_score has '_?test'"),
        (f"a/b --transcribe {US_ENGLISH}/test", 2, "--also_score"),
    ],
)
def test_further_test_sets_that_cannot_be_scored_are_refused_before_any_audio(flags, status, message, tmp_path, run):
    place = ["--output_dir", tmp_path / "out", "--data_dir", tmp_path / "audio", "--accents", "zulu"]
    found, _, errors = run(*FIXTURE_FLAGS, *place, "--also_score", *flags.split())
    assert found == status and re.search(message, error_line(errors))
    assert not list(tmp_path.rglob("*.arrow"))


# ---------------------------------------------------------------- choosing clips, and the command line


def chosen_rows(split, **choice):
    """{clip: CSV row} of those with one of the values that are given for a column."""
    return {clip: row for clip, row in corpus_rows(split).items() if all(row[name] in choice[name] for name in choice)}


@pytest.mark.parametrize(
    "flags, choice",
    [
        ("", {}),
        ("--accents Yoruba luo-swahili", {"accent": ["yoruba", "luo, swahili"]}),
        ("--domains clinical", {"domain": ["clinical"]}),
        ("--countries ke NA", {"country": ["KE", "NA"]}),
        (
            "--accents igbo swahili --domains general --countries KE",
            {"accent": ["igbo", "swahili"], "domain": ["general"], "country": ["KE"]},
        ),
    ],
)
def test_a_dry_run_counts_what_was_chosen_and_prepares_nothing(tmp_path, run, flags, choice):
    place = ["--data_dir", tmp_path / "audio", "--output_dir", tmp_path / "out"]
    status, out, errors = run("--dry_run", *FIXTURE_FLAGS, *place, *flags.split())
    assert (status, errors) == (0, "")
    for split in script.SPLITS:
        rows = chosen_rows(split, **choice).values()
        rows = [row for row in rows if split != "train" or float(row["duration"]) <= 30]
        line = rf"^ *{split} +([\d,]+) clips? +([\d.]+) h +([\d,]+) speakers? +([\d,]+) accents?$"
        ((clips, hours, speakers, accents),) = re.findall(line, out, re.MULTILINE)
        people, spoken = ({row[name] for row in rows} for name in ("user_ids", "accent"))
        assert [int(clips), int(speakers), int(accents)] == [len(rows), len(people), len(spoken)]
        assert float(hours) == pytest.approx(sum(float(row["duration"]) for row in rows) / 3600, abs=0.006)
    assert not list(tmp_path.rglob("*.arrow")) and not (tmp_path / "out").exists()


def test_a_dry_run_plans_the_updates_and_names_the_nearest_accents(tmp_path, run):
    flags = "--max_train_samples 100 --num_train_epochs 3 --per_device_train_batch_size 4".split()
    flags += ["--gradient_accumulation_steps", "2", "--use_cpu", "true", "--data_dir", tmp_path / "audio"]
    status, out, _ = run("--dry_run", *FIXTURE_FLAGS, *flags)
    assert status == 0 and re.search(r"\b39 updates\b.*\b13 an epoch", out)
    status, _, errors = run("--dry_run", *FIXTURE_FLAGS, *flags, "--accents", "igbo", "yorba")
    assert status == 2
    assert all(part in error_line(errors) for part in ("--accents", "'yorba'", "yoruba")) and "igbo" not in errors


def test_a_yaml_file_sets_flags_and_flags_on_top_of_it_win(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "learning_rate: 1e-5\nseed: 7\naccents: [yoruba, 'akan (fante)']\nspec_augment: false\nskip_baseline: true\n"
        "max_steps: null\nweight_decay: 0.25\nlr_scheduler_kwargs:\n  min_lr_rate: 0.1\n"
    )
    settings = parse_settings([str(tmp_path / "run.yaml"), "--learning_rate", "2e-4", "--weight_decay", "0.5"])
    assert (settings.learning_rate, settings.weight_decay) == (2e-4, 0.5)
    assert (settings.seed, settings.max_steps, settings.lr_scheduler_kwargs) == (7, -1, {"min_lr_rate": 0.1})
    assert settings.accents == ["yoruba", "akan (fante)"] and settings.skip_baseline and not settings.spec_augment


@pytest.mark.parametrize("flag", ["--help", "--help_all"])
def test_help_names_every_flag(flag, run):
    """--help on two screens those of the script and what people change, --help_all those of the Trainer too."""
    from transformers import TrainingArguments

    status, out, errors = run(flag)
    assert (status, errors) == (0, "")
    kinds = [script.ScriptFlags, script.TrainingFlags, *([TrainingArguments] if flag == "--help_all" else [])]
    named = {item.name for kind in kinds for item in dataclasses.fields(kind) if item.init} | {"help_all"}
    assert named <= set(re.findall(r"(?<![\w-])--(\w+)", out))
    assert flag == "--help_all" or (len(out.splitlines()) <= 110 and max(map(len, out.splitlines())) <= 150)
    assert "(default: 3e-05)" in out and "(default: None)" not in out
