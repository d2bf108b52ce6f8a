"""The program as a user runs it: exit status, what it prints, what it writes."""

import csv
import dataclasses
import json
import os
import re
import sys

import jiwer
import pytest
import soundfile
from conftest import (
    CORPUS,
    MODEL,
    SPLITS,
    corpus_audio,
    corpus_rows,
    error_line,
    load_json,
    load_predictions,
    run_script,
    write_wav,
)

from finetune_medasr import (
    CommonTrainingArguments,
    ScriptArguments,
    main,
    normalize_paper,
    normalize_wer,
    parse_arguments,
)

FIXTURE_FLAGS = ("--model", MODEL, "--dataset", CORPUS)


@pytest.fixture
def run(capfd):
    """run(flag, ...) -> (exit status, stdout, stderr) of the program in this process, on the small model and corpus."""

    def run(*arguments):
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    return run


# ---------------------------------------------------------------- the demo


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def log(demo):
    """The Trainer's log of the demo, up to its last checkpoint."""
    return load_json(
        max(demo.output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])) / "trainer_state.json"
    )["log_history"]


def evaluated_steps(demo):
    training = demo.metrics["config"]["training"]
    return list(range(training["eval_steps"], training["max_steps"] + 1, training["eval_steps"]))


@pytest.mark.slow
def test_the_demo_writes_the_files_that_it_promises(demo):
    assert names(demo.folder) == {"medasr-demo"}
    whole = {"audio", "runs", "final", "results", "run.json"}
    checkpoints = names(demo.output) - whole
    assert whole <= names(demo.output)
    assert checkpoints <= {f"checkpoint-{step}" for step in evaluated_steps(demo)}
    assert (
        f"checkpoint-{evaluated_steps(demo)[-1]}" in checkpoints
        and len(checkpoints) <= demo.metrics["config"]["training"]["save_total_limit"]
    )
    pictures = {name for name in names(demo.results) if name.endswith(".png")}
    assert names(demo.results) - pictures == {
        "metrics.json",
        "predictions_test.jsonl",
        "report.md",
        "skipped_clips.csv",
    }
    assert {path.parent.name for path in demo.audio.rglob("*.arrow")} == set(SPLITS)
    assert not [path for path in demo.output.rglob("*") if path.suffix in (".tmp", ".partial")]


@pytest.mark.slow
def test_the_report_shows_every_picture(demo):
    report = (demo.results / "report.md").read_text()
    linked = re.findall(r"!\[[^]]+\]\(([^)]+)\)", report)
    assert sorted(linked) == sorted(path.name for path in demo.results.glob("*.png"))
    assert {"wer_by_accent.png", "wer_by_duration.png", "training.png"} <= set(linked)
    for name in linked:
        assert (demo.results / name).read_bytes().startswith(b"\x89PNG")
    for name in ("baseline", "finetuned"):
        assert f"{100 * demo.metrics[name]['wer']:.1f} %" in report


@pytest.mark.slow
def test_the_metrics_have_the_keys_that_programs_read(demo):
    metrics = demo.metrics
    assert {"config", "versions", "data", "baseline", "finetuned", "delta"} == set(metrics)
    rates = {"wer", "wer_paper", "wer_raw", "cer"}
    for system in (metrics["baseline"], metrics["finetuned"]):
        assert rates | {"clips", "words", "wer_ci95", "substitutions", "deletions", "insertions", "groups"} <= set(
            system
        )
        assert set(system["groups"]) == {
            "domain",
            "accent",
            "country",
            "gender",
            "age_group",
            "seen_accent",
            "duration",
        }
        assert set(system["groups"]["domain"]) == {"clinical", "general"}
        assert all(0 < system[name] < 1.5 for name in rates)
        assert system["wer_ci95"][0] < system["wer"] < system["wer_ci95"][1]
        assert system["substitutions"] + system["deletions"] + system["insertions"] == round(
            system["wer"] * system["words"]
        )
        for kind, groups in system["groups"].items():
            assert sum(group["clips"] for group in groups.values()) == system["clips"], kind
    assert metrics["delta"]["wer"] == pytest.approx(metrics["finetuned"]["wer"] - metrics["baseline"]["wer"])
    assert metrics["config"]["training"]["max_steps"] > 0 and metrics["config"]["model"] == MODEL.name
    assert {"torch", "transformers", "datasets"} <= set(metrics["versions"])


@pytest.mark.slow
def test_what_people_publish_names_no_folder_of_the_machine(demo):
    """The demo's model and corpus are given as absolute paths."""
    for path in (*demo.results.glob("*.*"), *demo.final.glob("*.md"), *demo.final.glob("*.json")):
        content = path.read_bytes()
        assert not [folder for folder in (MODEL.parent, demo.folder) if str(folder).encode() in content], path
    card = (demo.final / "README.md").read_text()
    assert f"# {MODEL.name} adapted" in card and f"Fine-tuned on {CORPUS.name}, " in card


@pytest.mark.slow
def test_there_is_one_prediction_for_each_scored_test_clip(demo):
    rows, audio = corpus_rows("test"), corpus_audio("test")
    keys = "audio_filepath duration text pred_text baseline_text speaker accent country domain gender age_group wer"
    assert {tuple(row) for row in demo.predictions} == {tuple(keys.split())}
    predicted = {row["audio_filepath"]: row for row in demo.predictions}
    assert len(predicted) == len(demo.predictions)
    assert set(predicted) == set(rows) & set(audio)
    for clip, row in predicted.items():
        of_csv = rows[clip]
        assert row["text"] == of_csv["transcript"]
        assert row["duration"] == pytest.approx(float(of_csv["duration"]), abs=0.02)
        assert row["speaker"] == of_csv["user_ids"]
        assert [row[key] for key in ("accent", "country", "domain", "gender", "age_group")] == [
            of_csv[key] for key in ("accent", "country", "domain", "gender", "age_group")
        ]


@pytest.mark.slow
def test_every_bad_clip_is_named_with_its_reason_and_no_other_clip_is_lost(demo):
    with open(demo.results / "skipped_clips.csv", newline="", encoding="utf-8") as file:
        skipped = list(csv.DictReader(file))
    assert all(re.fullmatch(r"[^\0-\x1f]+", row["reason"]) for row in skipped)
    planted = {
        ("test", "no audio"),
        ("train", "undecodable audio"),
        ("train", "too short"),
        ("train", "empty text"),
        ("train", "over --max_train_seconds"),
    }
    assert sorted((row["split"], re.split(r" ?[:(]", row["reason"])[0]) for row in skipped) == sorted(planted)
    for split in SPLITS:
        rows, audio, data = corpus_rows(split), corpus_audio(split), demo.metrics["data"][split]
        named = {row["clip"]: row["reason"] for row in skipped if row["split"] == split}
        assert data["clips"] + len(named) == len(set(rows) | set(audio))
        assert set(named) <= set(rows) | set(audio)
        assert {clip for clip, reason in named.items() if reason == "no audio"} == set(rows) - set(audio)
        assert {clip for clip, reason in named.items() if reason == "empty text"} == {
            clip for clip in rows if not rows[clip]["transcript"].strip()
        }
        assert {clip for clip, reason in named.items() if "max_train" in reason} == {
            clip for clip in rows if split == "train" and float(rows[clip]["duration"]) > 30
        }
        assert data["hours"] == pytest.approx(
            sum(float(rows[clip]["duration"]) for clip in rows if clip not in named) / 3600, abs=0.001
        )
        for reason in named.values():
            assert f"left out of {split}: 1 x {re.split(r' ?[:(]', reason)[0]}" in demo.stdout


@pytest.mark.slow
def test_fine_tuning_takes_at_least_40_percent_of_the_errors_away_on_new_speakers(demo):
    trained_on = {row["user_ids"] for split in ("train", "dev") for row in corpus_rows(split).values()}
    scored = {corpus_rows("test")[row["audio_filepath"]]["user_ids"] for row in demo.predictions}
    assert len(scored) >= 10 and not scored & trained_on
    before, after = demo.metrics["baseline"]["wer"], demo.metrics["finetuned"]["wer"]
    assert before < 1 and after <= 0.6 * before
    assert any(f"{100 * before:.1f} %" in line and f"{100 * after:.1f} %" in line for line in demo.stdout.splitlines())


@pytest.mark.slow
def test_namibia_is_a_country_not_a_missing_value(demo):
    countries = {row["country"] for row in corpus_rows("test").values()}
    assert set(demo.metrics["finetuned"]["groups"]["country"]) == countries and "NA" in countries


@pytest.mark.slow
def test_accents_that_were_not_in_training_are_told_apart(demo):
    seen = {row["accent"] for row in corpus_rows("train").values()}
    groups = demo.metrics["finetuned"]["groups"]["seen_accent"]
    assert groups["unseen"]["clips"] == sum(row["accent"] not in seen for row in demo.predictions) > 0
    assert groups["seen"]["clips"] == sum(row["accent"] in seen for row in demo.predictions)


@pytest.mark.slow
@pytest.mark.parametrize("field, system", [("pred_text", "finetuned"), ("baseline_text", "baseline")])
def test_the_rates_are_those_of_the_predictions(demo, field, system):
    scores, rows = demo.metrics[system], demo.predictions
    for name, normalize in (("wer", normalize_wer), ("wer_paper", normalize_paper), ("wer_raw", str.strip)):
        references, hypotheses = ([normalize(row[key]) for row in rows] for key in ("text", field))
        assert scores[name] == pytest.approx(jiwer.wer(references, hypotheses)), name
    references, hypotheses = ([normalize_wer(row[key]) for row in rows] for key in ("text", field))
    assert scores["cer"] == pytest.approx(jiwer.cer(references, hypotheses))
    assert scores["words"] == sum(len(text.split()) for text in references)
    for domain, group in scores["groups"]["domain"].items():
        chosen = [
            (reference, hypothesis)
            for reference, hypothesis, row in zip(references, hypotheses, rows)
            if row["domain"] == domain
        ]
        assert group["wer"] == pytest.approx(jiwer.wer(*map(list, zip(*chosen))))


@pytest.mark.slow
def test_tensorboard_has_the_curves_and_transcriptions(demo, log):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(demo.output / "runs"))
    events.Reload()
    scalars = {
        "train/loss",
        "train/learning_rate",
        "train/grad_norm",
        "train/audio_seconds_per_second",
        "train/padding_percent",
        "train/data_wait_percent",
        "eval/loss",
        "eval/wer",
        "eval/cer",
        "eval/wer_by_domain/clinical",
        "eval/wer_by_domain/general",
    }
    assert scalars <= set(events.Tags()["scalars"])
    for tag, key in (
        ("train/loss", "loss"),
        ("train/grad_norm", "grad_norm"),
        ("eval/wer", "eval_wer"),
        ("eval/cer", "eval_cer"),
    ):
        logged = {entry["step"]: entry[key] for entry in log if key in entry}
        assert {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(logged, rel=1e-5), tag
    assert [event.step for event in events.Scalars("eval/wer")] == evaluated_steps(demo)
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses[-1] < losses[0]
    assert (
        max(event.value for event in events.Scalars("train/learning_rate"))
        <= demo.metrics["config"]["training"]["learning_rate"] * 1.0001
    )
    assert all(0 <= event.value < 60 for event in events.Scalars("train/padding_percent"))
    assert all(event.value > 0 for event in events.Scalars("train/audio_seconds_per_second"))
    waits = [event.value for event in events.Scalars("train/data_wait_percent")]
    assert all(0 <= wait <= 100 for wait in waits) and max(waits) > 0
    (text,) = [tag for tag in events.Tags()["tensors"] if "transcriptions" in tag]
    assert [event.step for event in events.Tensors(text)] == evaluated_steps(demo)
    shown = events.Tensors(text)[-1].tensor_proto.string_val[0].decode()
    dev = {" ".join(row["transcript"].split()) for row in corpus_rows("dev").values()}
    assert sum(reference in shown for reference in dev) >= 3


@pytest.mark.slow
def test_training_says_how_it_goes(demo):
    """Updates, loss, speed and the dev WER of each evaluation reach the terminal."""
    said = re.split(r"[\r\n]+", demo.stdout + "\n" + demo.stderr)
    for step in (steps := evaluated_steps(demo)):
        assert [line for line in said if re.search(rf"\b{step}\b.*dev WER [\d.]+ %", line)], step
    assert [line for line in said if f"{steps[-1]}/{steps[-1]}" in line and "loss" in line]


@pytest.mark.slow
def test_the_end_says_how_fast_it_was_and_where_the_time_went(demo, log):
    (hours, rate, shares) = re.search(
        r"trained on ([\d.]+) audio hours at (\d+) an hour; time: (.*)", demo.stdout
    ).groups()
    passes = max(entry["epoch"] for entry in log)
    assert float(hours) == pytest.approx(passes * demo.metrics["data"]["train"]["hours"], rel=0.1)
    logged = [entry["audio_seconds_per_second"] for entry in log if "audio_seconds_per_second" in entry]
    assert min(logged) * 0.9 <= int(rate) <= max(logged) * 1.1
    shares = dict(re.findall(r"([a-z ]+) (\d+) %", shares))
    parts = {"forward and backward", "waiting for data", "evaluation", "scoring", "saving"}
    assert {name.strip() for name in shares} == parts and 97 <= sum(map(int, shares.values())) <= 103


@pytest.mark.slow
def test_checkpoints_can_be_used_and_resumed(demo):
    from transformers import AutoProcessor

    for checkpoint in demo.output.glob("checkpoint-*"):
        assert {
            "model.safetensors",
            "optimizer.pt",
            "scheduler.pt",
            "trainer_state.json",
            "tokenizer.json",
            "processor_config.json",
        } <= names(checkpoint)
        processor = AutoProcessor.from_pretrained(checkpoint)
        assert processor.tokenizer("fever").input_ids and processor.feature_extractor.sampling_rate == 16000


@pytest.mark.slow
def test_the_final_model_is_the_best_on_dev(demo, log):
    from safetensors.torch import load_file

    best = min((entry for entry in log if "eval_wer" in entry), key=lambda entry: entry["eval_wer"])
    saved, final = (
        load_file(demo.output / f"checkpoint-{best['step']}/model.safetensors"),
        load_file(demo.final / "model.safetensors"),
    )
    assert saved.keys() == final.keys() and all(saved[name].equal(final[name]) for name in saved)


# ---------------------------------------------------------------- the final model


@pytest.mark.slow
def test_the_final_model_writes_the_same_clean_text_everywhere(demo, known_clip, tmp_path, run):
    from transformers import AutoModelForCTC, AutoProcessor, pipeline

    clip, expected = known_clip
    write_wav(tmp_path / "visit.wav", clip)
    audio, rate = soundfile.read(tmp_path / "visit.wav", dtype="float32")
    processor, model = AutoProcessor.from_pretrained(demo.final), AutoModelForCTC.from_pretrained(demo.final)
    assert type(model).__name__ == "LasrForCTC"
    generated = processor.batch_decode(
        model.generate(**processor(audio, sampling_rate=rate)), skip_special_tokens=True
    )[0]
    recognise = pipeline("automatic-speech-recognition", model=str(demo.final))
    piped = recognise({"raw": audio, "sampling_rate": rate})["text"]
    status, transcribed, errors = run("--transcribe", tmp_path / "visit.wav", "--model", demo.final)
    assert status == 0 and "warning" not in errors
    assert generated.strip() == piped.strip() == transcribed.strip() == expected
    assert not re.search(r"[<>{}]", expected)


@pytest.mark.slow
def test_eval_only_gives_the_fine_tuned_figures_again(demo, tmp_path, run):
    status, out, _ = run(
        "--eval_only",
        "--model",
        demo.final,
        "--dataset",
        CORPUS,
        "--data_dir",
        demo.audio,
        "--output_dir",
        tmp_path / "scores",
    )
    assert status == 0
    metrics = load_json(tmp_path / "scores/results/metrics.json")
    assert metrics["finetuned"] is None and metrics["delta"] is None
    for name in ("wer", "wer_paper", "wer_raw", "cer", "clips", "words", "wer_ci95"):
        assert metrics["baseline"][name] == demo.metrics["finetuned"][name], name
    again = {row["audio_filepath"]: row["pred_text"] for row in load_predictions(tmp_path / "scores/results")}
    assert again == {row["audio_filepath"]: row["pred_text"] for row in demo.predictions}
    assert names(tmp_path / "scores") == {"results"}
    assert f"{100 * metrics['baseline']['wer']:.1f} %" in out


@pytest.fixture
def wav2vec2(tmp_path):
    """A folder with a tiny random Wav2Vec2 CTC model and its processor."""
    import json

    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
        Wav2Vec2Processor,
    )

    folder = tmp_path / "wav2vec2"
    folder.mkdir()
    vocabulary = {
        token: number
        for number, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz'"])
    }
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(return_attention_mask=True), tokenizer).save_pretrained(folder)
    config = Wav2Vec2Config(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        pad_token_id=0,
    )
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_eval_only_scores_a_model_of_another_family(demo, wav2vec2, tmp_path, run):
    status, _, errors = run(
        "--eval_only",
        "--model",
        wav2vec2,
        "--dataset",
        CORPUS,
        "--data_dir",
        demo.audio,
        "--output_dir",
        tmp_path / "scores",
        "--max_test_samples",
        6,
    )
    assert status == 0, errors
    assert (
        load_json(tmp_path / "scores/results/metrics.json")["baseline"]["clips"]
        == len(load_predictions(tmp_path / "scores/results"))
        == 6
    )
    assert (tmp_path / "scores/results/report.md").read_text().startswith("# ")


# ---------------------------------------------------------------- going on


@pytest.mark.slow
def test_two_processes_do_the_work_of_one_and_print_once(demo, tmp_path):
    flags = f"""--accents zulu damara --use_cpu true --ddp_backend gloo --gradient_checkpointing --max_steps 2
        --eval_steps 2 --save_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1
        --max_train_samples 16 --max_eval_samples 5 --dataloader_num_workers 0
        --data_dir {tmp_path}/audio --output_dir {tmp_path}/out""".split()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run_script(
        *FIXTURE_FLAGS, *flags, cwd=tmp_path, launcher=launcher, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert len(lines) == len(set(lines)), done.stdout
    assert f"corpus: {CORPUS}" in lines
    assert len(re.findall(r"preparing audio: 100%.* 6/6 ", done.stderr)) >= 1
    assert len({path.stat().st_ino for path in (tmp_path / "audio").rglob("*.arrow")}) == 6
    expected = {clip for clip, row in corpus_rows("test").items() if row["accent"] in ("zulu", "damara")} & set(
        corpus_audio("test")
    )
    predictions = load_predictions(tmp_path / "out/results")
    assert sorted(row["audio_filepath"] for row in predictions) == sorted(expected)
    alone = {row["audio_filepath"]: row["baseline_text"] for row in demo.predictions}
    assert [row["baseline_text"] for row in predictions] == [alone[row["audio_filepath"]] for row in predictions]
    metrics = load_json(tmp_path / "out/results/metrics.json")
    assert metrics["baseline"]["clips"] == metrics["finetuned"]["clips"] == len(expected)
    evaluated = [
        entry
        for entry in load_json(tmp_path / "out/checkpoint-2/trainer_state.json")["log_history"]
        if "eval_wer" in entry
    ]
    assert [entry["step"] for entry in evaluated] == [2]


# ---------------------------------------------------------------- choosing clips


def chosen_rows(split, accents=None, domains=None, countries=None):
    return [
        row
        for row in corpus_rows(split).values()
        if (accents is None or row["accent"] in accents)
        and (domains is None or row["domain"] in domains)
        and (countries is None or row["country"] in countries)
    ]


@pytest.mark.parametrize(
    "flags, choice",
    [
        ([], {}),
        (["--accents", "yoruba", "luo, swahili"], {"accents": ["yoruba", "luo, swahili"]}),
        (["--accents", "Yoruba", "luo-swahili"], {"accents": ["yoruba", "luo, swahili"]}),
        (["--domains", "clinical"], {"domains": ["clinical"]}),
        (["--countries", "ke", "NA"], {"countries": ["KE", "NA"]}),
        (
            ["--accents", "igbo", "swahili", "--domains", "general", "--countries", "KE"],
            {"accents": ["igbo", "swahili"], "domains": ["general"], "countries": ["KE"]},
        ),
    ],
)
def test_a_dry_run_counts_what_was_chosen_and_prepares_nothing(tmp_path, run, flags, choice):
    status, out, errors = run(
        "--dry_run", *FIXTURE_FLAGS, "--data_dir", tmp_path / "audio", "--output_dir", tmp_path / "out", *flags
    )
    assert (status, errors) == (0, "")
    for split in SPLITS:
        rows = [row for row in chosen_rows(split, **choice) if split != "train" or float(row["duration"]) <= 30]
        (found,) = re.findall(
            rf"^ *{split} +([\d,]+) clips? +([\d.]+) h +([\d,]+) speakers? +([\d,]+) accents?$", out, re.MULTILINE
        )
        assert [int(found[0]), int(found[2]), int(found[3])] == [
            len(rows),
            len({row["user_ids"] for row in rows}),
            len({row["accent"] for row in rows}),
        ]
        assert float(found[1]) == pytest.approx(sum(float(row["duration"]) for row in rows) / 3600, abs=0.006)
    assert not list(tmp_path.rglob("*.arrow")) and not (tmp_path / "out").exists()


def test_a_dry_run_plans_the_updates(tmp_path, run):
    status, out, _ = run(
        "--dry_run",
        *FIXTURE_FLAGS,
        "--data_dir",
        tmp_path / "audio",
        "--max_train_samples",
        100,
        "--num_train_epochs",
        3,
        "--per_device_train_batch_size",
        4,
        "--gradient_accumulation_steps",
        2,
        "--use_cpu",
        "true",
    )
    assert status == 0
    assert re.search(r"\b39 updates\b.*\b13 an epoch", out)


@pytest.mark.slow
def test_only_the_chosen_clips_are_scored(demo, tmp_path, run):
    choice = {"domains": ["clinical"], "countries": ["KE", "NA"]}
    status, _, errors = run(
        "--eval_only",
        *FIXTURE_FLAGS,
        "--data_dir",
        demo.audio,
        "--output_dir",
        tmp_path,
        "--domains",
        "clinical",
        "--countries",
        "KE",
        "NA",
    )
    assert status == 0, errors
    chosen = {row["audio_paths"].split("/")[-1] for row in chosen_rows("test", **choice)}
    assert {row["audio_filepath"].split("/")[-1] for row in load_predictions(tmp_path / "results")} == chosen


# ---------------------------------------------------------------- --score_file


def rate_of(folder, system="baseline"):
    return load_json(folder / "results/metrics.json")[system]


@pytest.mark.slow
def test_score_file_gives_the_demo_its_own_scores(demo, tmp_path, run):
    rows = demo.predictions
    with open(tmp_path / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for source in (demo.results / "predictions_test.jsonl", tmp_path / "predictions.csv"):
        output = tmp_path / source.suffix[1:]
        status, _, errors = run("--score_file", source, "--output_dir", output)
        assert (status, errors) == (0, "")
        assert len(load_predictions(output / "results")) == len(rows)
        for system in ("baseline", "finetuned"):
            for name in ("wer", "wer_paper", "wer_raw", "cer", "clips", "speakers", "words", "wer_ci95"):
                assert rate_of(output, system)[name] == pytest.approx(demo.metrics[system][name]), (
                    source,
                    system,
                    name,
                )
            domains = demo.metrics[system]["groups"]["domain"]
            assert {
                name: group["wer"] for name, group in rate_of(output, system)["groups"]["domain"].items()
            } == pytest.approx({name: group["wer"] for name, group in domains.items()})
        assert "![" in (output / "results/report.md").read_text()


def test_a_row_without_text_is_named_and_the_others_are_scored(tmp_path, run):
    (tmp_path / "texts.jsonl").write_text(
        '{"audio_filepath": "a.wav", "text": "No fever.", "pred_text": "no fever"}\n'
        '{"audio_filepath": "b.wav", "text": "No cough."}\n\n'
        '{"audio_filepath": "c.wav", "text": " \\n", "pred_text": "no"}\n'
        '{"audio_filepath": "d.wav", "text": "Chest pain today", "pred_text": ""}\n'
    )
    status, out, errors = run("--score_file", tmp_path / "texts.jsonl", "--output_dir", tmp_path)
    assert status == 0
    warnings = errors.splitlines()
    assert len(warnings) == 3 and "b.wav" in warnings[0] and "pred_text" in warnings[0] and "c.wav" in warnings[1]
    assert "2 rows without a duration" in warnings[2]
    assert load_json(tmp_path / "results/metrics.json")["data"]["test"]["left_out"] == 2
    assert list(rate_of(tmp_path)["groups"]["duration"]) == ["unknown"] and rate_of(tmp_path)["wer_paper_short"] is None
    assert rate_of(tmp_path)["clips"] == 2 and rate_of(tmp_path)["wer"] == pytest.approx(3 / 5)
    assert [row["audio_filepath"] for row in load_predictions(tmp_path / "results")] == ["a.wav", "d.wav"]
    assert "b.wav" in (tmp_path / "results/report.md").read_text()


def test_a_speaker_may_be_a_number_and_0(tmp_path, run):
    rows = [{"text": "no fever", "pred_text": "no fever", "duration": 2, "speaker": count % 2} for count in range(6)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run("--score_file", tmp_path / "texts.jsonl", "--output_dir", tmp_path)[0] == 0
    assert rate_of(tmp_path)["speakers"] == 2
    assert [row["speaker"] for row in load_predictions(tmp_path / "results")] == ["0", "1"] * 3


@pytest.mark.parametrize("mode", ["score_file", pytest.param("eval_only", marks=pytest.mark.slow)])
def test_the_results_of_a_run_stay_when_something_else_is_scored(mode, tmp_path, run):
    (tmp_path / "out/results").mkdir(parents=True)
    files = [tmp_path / "out" / name for name in ("run.json", "results/metrics.json", "results/predictions_test.jsonl")]
    for file in files:
        file.write_text('{"text": "no fever", "pred_text": "fever"}\n')
    flags = {
        "score_file": ["--score_file", files[2]],
        "eval_only": ["--eval_only", *FIXTURE_FLAGS, "--data_dir", tmp_path / "audio", "--max_test_samples", "2"],
    }
    status, out, _ = run(*flags[mode], "--output_dir", tmp_path / "out")
    assert status == 0 and f"results: {tmp_path}/out/scores/results" in out
    assert {file.read_text() for file in files} == {'{"text": "no fever", "pred_text": "fever"}\n'}
    assert names(tmp_path / "out/results") == {"metrics.json", "predictions_test.jsonl"}
    assert (tmp_path / "out/scores/results/report.md").is_file()


def test_a_duration_without_a_word_is_left_out_of_the_picture_alone(tmp_path, run):
    (tmp_path / "texts.jsonl").write_text(
        '{"text": "...", "pred_text": "so it", "duration": 3}\n{"text": "No", "pred_text": "no", "duration": 12}\n'
    )
    status, _, errors = run("--score_file", tmp_path / "texts.jsonl", "--output_dir", tmp_path)
    assert (status, errors) == (0, "")
    groups = rate_of(tmp_path)["groups"]["duration"]
    assert {name: group["wer"] for name, group in groups.items()} == {"0-5 s": None, "10-20 s": 0}
    assert (tmp_path / "results/wer_by_duration.png").is_file()


# ---------------------------------------------------------------- the command line


def test_an_unknown_accent_is_refused_with_the_nearest_names(tmp_path, run):
    status, _, errors = run("--dry_run", *FIXTURE_FLAGS, "--data_dir", tmp_path, "--accents", "igbo", "yorba")
    assert status == 2
    assert all(part in error_line(errors) for part in ("--accents", "'yorba'", "yoruba")) and "igbo" not in errors


def test_an_absolute_path_is_cut_to_its_name_in_what_is_published(tmp_path, run):
    (tmp_path / "texts.csv").write_bytes("text,pred_text\nNo caf\u00e9,no\n".encode("latin-1"))
    status, _, errors = run("--score_file", tmp_path / "texts.csv", f"--output_dir={tmp_path}")
    assert status == 0 and "texts.csv" in errors
    for name in ("metrics.json", "report.md"):
        content = (tmp_path / "results" / name).read_text()
        assert "texts.csv" in content and str(tmp_path) not in content, name
    command = load_json(tmp_path / "results/metrics.json")["config"]["command"]
    assert command == f"python finetune_medasr.py --score_file texts.csv --output_dir={tmp_path.name}"


@pytest.mark.parametrize("flags, status", [(["--domains", "clinicl"], 2), (["--help"], 0)])
def test_answers_that_need_no_library_do_not_wait_for_one(tmp_path, flags, status):
    done = run_script(*flags, cwd=tmp_path, launcher=[sys.executable, "-X", "importtime"])
    assert done.returncode == status
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in imported
    assert not imported & {"torch", "datasets", "librosa", "pandas", "matplotlib"}
    assert not list(tmp_path.iterdir())


def test_a_yaml_file_sets_flags_and_flags_on_top_of_it_win(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "learning_rate: 1e-5\nseed: 7\naccents: [yoruba, 'akan (fante)']\nspec_augment: false\nskip_baseline: "
        "true\nmax_steps: null\n"
        f"output_dir: {tmp_path}/out\nweight_decay: 0.25\nlr_scheduler_type: "
        f"cosine_with_min_lr\nlr_scheduler_kwargs:\n  min_lr_rate: 0.1\n"
    )
    args, training = parse_arguments([str(tmp_path / "run.yaml"), "--learning_rate", "2e-4", "--weight_decay", "0.5"])
    assert (training.learning_rate, training.weight_decay) == (2e-4, 0.5)
    assert (training.seed, training.output_dir, training.max_steps) == (7, f"{tmp_path}/out", -1)
    assert training.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert (args.accents, args.spec_augment, args.skip_baseline) == (["yoruba", "akan (fante)"], False, True)


def test_the_defaults_are_those_of_the_design():
    args, training = parse_arguments(["--use_cpu", "true"])
    assert (args.model, args.dataset) == ("google/medasr", "intronhealth/afrispeech-200")
    assert (args.data_dir, training.output_dir) == ("./afrispeech-200-16khz", "./medasr-afrispeech-200")
    assert (training.learning_rate, training.num_train_epochs, training.warmup_steps) == (3e-5, 10, 500)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (8, 4)
    assert (training.eval_steps, training.save_steps, args.early_stopping_patience, training.metric_for_best_model) == (
        500,
        500,
        3,
        "wer",
    )
    assert (training.fp16, training.bf16, training.seed) == (False, False, 42)


def flags_in(text):
    return set(re.findall(r"(?<![\w-])--(\w+)", text))


def test_help_fits_on_two_screens_and_names_every_flag_of_the_script(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 110 and max(map(len, out.splitlines())) <= 120
    own = {item.name for kind in (ScriptArguments, CommonTrainingArguments) for item in dataclasses.fields(kind)}
    assert own | {"help_all"} <= flags_in(out)
    assert "(default: 3e-05)" in out and "None" not in out


def test_help_all_names_every_training_argument(capsys):
    from transformers import TrainingArguments

    assert main(["--help_all"]) == 0
    names = {
        item.name for kind in (ScriptArguments, TrainingArguments) for item in dataclasses.fields(kind) if item.init
    }
    assert names <= flags_in(capsys.readouterr().out)
