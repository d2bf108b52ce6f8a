"""The program against a Hub: the default command line from nothing to a final model, and what the Hub may refuse."""

import csv
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from conftest import MODEL, corpus_audio, corpus_rows, error_line, load_json, load_predictions, run_script
from loopback_hub import DATASET, LoopbackHub
from loopback_hub import MODEL as HUB_MODEL

GOOD, DENIED, INVALID = "hf_good", "hf_denied", "hf_invalid"
FEW = "--max_steps 2 --gradient_accumulation_steps 1 --data_dir audio --output_dir out".split()


def open_hub(hub_corpus, **options):
    return LoopbackHub(
        {HUB_MODEL: MODEL},
        {DATASET: hub_corpus},
        token_required={HUB_MODEL},
        denied_tokens={DENIED},
        invalid_tokens={INVALID},
        **options,
    )


def modified(folder, pattern):
    return {path: path.stat().st_mtime_ns for path in folder.rglob(pattern)}


# ---------------------------------------------------------------- from nothing to a model


@pytest.fixture(scope="module")
def first_run(hub_corpus, tmp_path_factory):
    """The default command line with fewer updates, in an empty folder, by someone who is logged in; the Hub goes away
    after it.
    """
    folder = tmp_path_factory.mktemp("first_run")
    with open_hub(hub_corpus) as hub:
        env = hub.env(folder, HF_TOKEN=GOOD)
        done = run_script(*FEW, "--push_to_hub", "--hub_model_id", "clinic/medasr-accents", cwd=folder, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(folder=folder, hub=hub, env=env, stdout=done.stdout)


@pytest.mark.slow
def test_the_default_command_runs_from_nothing_to_a_final_model(first_run, hub_corpus):
    from transformers import AutoModelForCTC, AutoProcessor

    final, results = first_run.folder / "out/final", first_run.folder / "out/results"
    assert AutoProcessor.from_pretrained(final).tokenizer and AutoModelForCTC.from_pretrained(final).config.vocab_size
    card = (final / "README.md").read_text()
    assert f"base_model: {HUB_MODEL}\n" in card and f"- {DATASET}\n" in card
    assert {"metrics.json", "predictions_test.jsonl", "report.md", "skipped_clips.csv"} <= {
        path.name for path in results.iterdir()
    }
    metrics = load_json(results / "metrics.json")
    assert (metrics["config"]["model"], metrics["config"]["dataset"]) == (HUB_MODEL, DATASET)
    ogg = {row["audio_filepath"].replace(".wav", ".ogg") for row in load_predictions(results)}
    assert ogg == set(corpus_rows("test")) & set(corpus_audio("test"))
    with open(results / "skipped_clips.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 5


@pytest.mark.slow
def test_the_final_model_is_pushed_once_and_complete(first_run):
    final = first_run.folder / "out/final"
    ((name, files),) = first_run.hub.uploads
    assert name == "clinic/medasr-accents"
    assert files == {
        path.relative_to(final).as_posix(): path.read_bytes() for path in final.rglob("*") if path.is_file()
    }
    assert {"README.md", "model.safetensors", "tokenizer.json", "wer_by_accent.png"} <= set(files)
    assert "uploaded to" in first_run.stdout


@pytest.mark.slow
def test_a_finished_run_is_pushed_without_training_again(first_run, hub_corpus, tmp_path):
    shutil.copytree(first_run.folder / "out", tmp_path / "out")
    with open_hub(hub_corpus) as hub:
        done = run_script(*FEW, "--push_to_hub", cwd=tmp_path, env=hub.env(tmp_path, HF_TOKEN=GOOD))
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout and "training" not in done.stdout.split() and "uploaded to" in done.stdout
    assert len(hub.uploads) == 1 and hub.uploads[0][1] == first_run.hub.uploads[0][1]


@pytest.mark.slow
def test_a_repository_that_may_not_be_written_is_refused_before_the_corpus_is_fetched(hub_corpus, tmp_path):
    with LoopbackHub({HUB_MODEL: MODEL}, {DATASET: hub_corpus}, denied_tokens={DENIED}) as hub:
        done = run_script(*FEW, "--push_to_hub", cwd=tmp_path, env=hub.env(tmp_path, HF_TOKEN=DENIED))
    assert done.returncode == 1
    message = error_line(done.stderr)
    assert "--push_to_hub: out cannot be written" in message and "hf auth login" in message
    assert hub.count("*datasets*") == 0 and hub.uploads == []


@pytest.mark.slow
def test_the_hubs_audio_scores_as_the_small_copy_of_it(first_run, demo):
    """44.1 kHz stereo or 16 kHz mono: the untouched model hears the same but for a few words."""
    here = load_json(first_run.folder / "out/results/metrics.json")["baseline"]
    assert here["words"] == demo.metrics["baseline"]["words"]
    assert here["wer"] == pytest.approx(demo.metrics["baseline"]["wer"], abs=0.05)


@pytest.mark.slow
def test_each_file_of_the_corpus_is_fetched_once_at_the_pinned_revision(first_run, hub_corpus):
    fetched = [
        request
        for request in first_run.hub.requests
        if request.method == "GET" and f"/datasets/{DATASET}/resolve/" in request.path
    ]
    assert all(f"/resolve/{first_run.hub.commit(DATASET)}/" in request.path for request in fetched)
    archives = [path.name for path in hub_corpus.rglob("*.tar.gz")]
    assert sorted(request.path.split("/")[-1] for request in fetched if request.path.endswith(".tar.gz")) == sorted(
        archives
    )
    assert len({request.path for request in fetched}) == len(fetched)
    assert first_run.hub.count(f"/api/datasets/{DATASET}/tree/*") == 1


@pytest.mark.slow
def test_archives_are_gone_afterwards_and_transcripts_are_kept(first_run, hub_corpus):
    audio = first_run.folder / "audio"
    assert not [path for path in audio.rglob("*") if ".tar.gz" in path.name or path.suffix in (".partial", ".tmp")]
    kept = {path.relative_to(audio / "hub").as_posix(): path.read_bytes() for path in audio.rglob("*.csv")}
    assert kept == {
        path.relative_to(hub_corpus).as_posix(): path.read_bytes() for path in hub_corpus.glob("transcripts/*/*.csv")
    }
    assert len(list(audio.rglob("*.arrow"))) == len(list(hub_corpus.rglob("*.tar.gz")))


@pytest.mark.slow
def test_a_second_run_needs_no_hub_and_prepares_nothing_again(first_run):
    prepared = modified(first_run.folder / "audio", "*.arrow")
    flags = """--max_steps 1 --skip_baseline --max_train_samples 8 --max_eval_samples 2 --max_test_samples 3
        --data_dir audio --output_dir again""".split()
    done = run_script(*flags, cwd=first_run.folder, env={**first_run.env, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "preparing audio" not in done.stderr
    assert modified(first_run.folder / "audio", "*.arrow") == prepared
    assert load_json(first_run.folder / "again/results/metrics.json")["finetuned"]["clips"] == 3


# ---------------------------------------------------------------- what the Hub refuses

NO_ACCESS = {  # case: (flags, environment, words of the advice)
    "no token": (
        [],
        {},
        [
            "google/medasr is gated and you are not logged in",
            "accept its terms at {url}/google/medasr",
            "hf auth login",
        ],
    ),
    "no access": (
        [],
        {"HF_TOKEN": DENIED},
        ["google/medasr is gated and your account has no access", "accept its terms at {url}/google/medasr"],
    ),
    "invalid token": ([], {"HF_TOKEN": INVALID}, ["google/medasr", "token is not valid", "hf auth login", "HF_TOKEN"]),
    "unknown model": (
        ["--model", "google/medasrr"],
        {"HF_TOKEN": GOOD},
        ["google/medasrr", "not on the Hub, or is private", "--model"],
    ),
    "not an id": (
        ["--model", "google/medasr/large"],
        {"HF_TOKEN": GOOD},
        ["google/medasr/large", "owner/name", "--model"],
    ),
    "unknown revision": (
        ["--model_revision", "v9"],
        {"HF_TOKEN": GOOD},
        ["google/medasr", "no such revision", "--model_revision"],
    ),
    "offline": (
        [],
        {"HF_TOKEN": GOOD, "HF_HUB_OFFLINE": "1"},
        ["google/medasr", "not on this machine", "cannot be reached", "--model"],
    ),
}
REFUSED_LATER = {
    "unknown dataset": (
        ["--dataset", "intronhealth/afrispeech-2000"],
        {"HF_TOKEN": GOOD},
        ["dataset intronhealth/afrispeech-2000", "not on the Hub, or is private", "--dataset"],
    ),
    "unknown dataset revision": (
        ["--dataset_revision", "v9"],
        {"HF_TOKEN": GOOD},
        ["dataset intronhealth/afrispeech-200", "no such revision", "--dataset_revision"],
    ),
    "listing answers 503": (
        [],
        {"HF_TOKEN": GOOD},
        ["dataset intronhealth/afrispeech-200", "could not be read", "503", "run the same command again"],
    ),
}
LOAD_DATASET = f"import datasets; datasets.load_dataset({DATASET!r})"


@pytest.fixture(scope="module")
def refused(hub_corpus, tmp_path_factory):
    """{case: what happened}; three at a time, because the client retries a 503 for half a minute."""

    def attempt(case):
        flags, environment, _ = {**NO_ACCESS, **REFUSED_LATER}.get(case, ([], {}, []))
        folder = tmp_path_factory.mktemp("refused")
        with open_hub(hub_corpus) as hub:
            if case == "listing answers 503":
                hub.fault("/api/datasets/*", "status", 503)
            env = hub.env(folder, **environment)
            if case == "load_dataset":
                done = subprocess.run(
                    [sys.executable, "-c", LOAD_DATASET],
                    cwd=folder,
                    env=env,
                    capture_output=True,
                    text=True,
                    timeout=300,
                )
            else:
                done = run_script(*FEW, *flags, cwd=folder, env=env)
            return SimpleNamespace(
                status=done.returncode, stdout=done.stdout, stderr=done.stderr, hub=hub, folder=folder
            )

    cases = ["listing answers 503", "load_dataset", *NO_ACCESS, "unknown dataset", "unknown dataset revision"]
    with ThreadPoolExecutor(3) as pool:
        return dict(zip(cases, pool.map(attempt, cases)))


@pytest.mark.slow
@pytest.mark.parametrize("case", [*NO_ACCESS, *REFUSED_LATER])
def test_a_refusal_is_one_line_that_says_what_to_do(refused, case):
    happened = refused[case]
    assert happened.status == 1, happened.stderr
    message = error_line(happened.stderr)
    for part in {**NO_ACCESS, **REFUSED_LATER}[case][2]:
        assert part.format(url=happened.hub.url) in message
    assert not list(happened.folder.rglob("*.arrow")) and not (happened.folder / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", NO_ACCESS)
def test_nothing_of_the_corpus_is_fetched_for_a_model_that_cannot_be_had(refused, case):
    assert refused[case].hub.count("*datasets*") == 0
    assert refused[case].hub.count("*medasr*") >= (case not in ("offline", "not an id"))


@pytest.mark.slow
def test_the_datasets_library_cannot_load_the_repository(refused):
    """Why the program reads the repository itself."""
    assert refused["load_dataset"].status != 0
    assert re.search("Dataset scripts are no longer supported", refused["load_dataset"].stderr)


@pytest.mark.slow
def test_a_dry_run_fetches_the_transcripts_but_no_audio(hub_corpus, tmp_path):
    with open_hub(hub_corpus) as hub:
        done = run_script("--dry_run", "--accents", "igbo", "--data_dir", "audio", cwd=tmp_path, env=hub.env(tmp_path))
    assert done.returncode == 0, done.stderr
    assert hub.count("*.tar.gz") == 0
    assert hub.count("*/resolve/*/transcripts/igbo/*.csv", "GET") == 3 == hub.count("*/resolve/*", "GET")
    train = [row for row in corpus_rows("train").values() if row["accent"] == "igbo"]
    assert re.search(rf"train +{len(train)} clips", done.stdout)
    size = sum(path.stat().st_size for path in hub_corpus.glob("audio/igbo/*/*.tar.gz"))
    assert f"to fetch {size / 1e9:.2f} GB in 3 archives" in done.stdout
