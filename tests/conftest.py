"""What several test files run once: the demo, the Hub's copy of the small corpus, the program as a user starts it."""

import csv
import functools
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import filelock
import kills
import pytest
import soundfile
from warm import WarmStarts, run_ranks

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "finetune_medasr.py"
MODEL, CORPUS = HERE / "fixtures/model", HERE / "fixtures/corpus"
DEMO_COMMAND = "python finetune_medasr.py --demo"
SPLITS = ("train", "dev", "test")
NOWHERE = "http://127.0.0.1:9"  # nothing answers there
IN_TWO = ["--per_device_train_batch_size", "2", "--ddp_backend", "gloo"]
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: models this small wait for further threads
sys.path.insert(0, str(HERE.parent))  # so that `pytest tests` finds the script as `python -m pytest tests` does


def run_script(*arguments, cwd, env=None, launcher=(sys.executable,), timeout=900, script=SCRIPT):
    """The finished process of `python finetune_medasr.py ARGUMENTS`, its output as text."""
    command = [*launcher, script, *arguments]
    return subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def error_line(stderr):
    """The message of the program on a stderr that holds nothing else but progress bars and the Hub client announcing
    retries.
    """
    lines = [
        line
        for line in re.split(r"[\r\n]+", stderr)
        if line.strip() and not re.search(r"\d+%\||^HTTP Error 503|^Retrying in", line)
    ]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("finetune_medasr.py: error: "), stderr
    return lines[0].removeprefix("finetune_medasr.py: error: ")


def load_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def load_predictions(results):
    return [
        json.loads(line) for line in (Path(results) / "predictions_test.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def tensorboard(path):
    """What a folder's, or a file's, curves and texts are."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(path)).Reload()


def corpus_rows(split):
    """{clip: CSV row} of the fixture corpus, the first of rows with the same path."""
    rows = {}
    for path in sorted(CORPUS.glob(f"transcripts/*/{split}.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rows.setdefault("/".join((row.get("audio_paths") or row["audio_path"]).split("/")[-2:]), row)
    return rows


def corpus_audio(split):
    """{clip: encoded audio} of the fixture corpus."""
    clips = {}
    for path in sorted(CORPUS.glob(f"audio/*/{split}/*.tar.gz")):
        with tarfile.open(path) as tar:
            clips |= {"/".join(member.name.split("/")[-2:]): tar.extractfile(member).read() for member in tar}
    return clips


def write_wav(path, clip):
    """Decode a test clip of the fixture corpus to a 16-bit WAV file."""
    samples, rate = soundfile.read(io.BytesIO(corpus_audio("test")[clip]))
    soundfile.write(path, samples, rate, subtype="PCM_16")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """shared_folder(name, make) -> a folder that make(folder) has filled, once for all processes of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def shared_folder(name, make):
        folder = base / name
        with filelock.FileLock(base / f"{name}.lock"):
            if not (base / f"{name}.made").exists():  # a process whose make() fails leaves it to the next, to fail too
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                (base / f"{name}.made").touch()
        return folder

    return shared_folder


@pytest.fixture(scope="session")
def hub_corpus(shared_folder):
    """The fixture corpus with the Hub's kind of audio: 44.1 kHz stereo WAV."""
    from loopback_hub import hub_copy

    return shared_folder("hub", lambda folder: hub_copy(CORPUS, folder / "corpus")) / "corpus"


@pytest.fixture(scope="session")
def warm():
    """Starts the program, offline, in a process of its own each time."""
    with WarmStarts(kills.ENV) as warm:
        yield warm


@pytest.fixture(scope="session")
def run_two(warm):
    """run_two(flag, ...) -> the two processes of a run, as a cluster starts them, without torchrun."""
    with WarmStarts(kills.ENV) as second:
        yield functools.partial(run_ranks, (warm, second))


def run_demo(folder):
    """The demo in a new folder, on a machine that reaches no network; what it printed is in files beside it."""
    folder.mkdir()
    offline = dict.fromkeys(("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY"), NOWHERE)
    env = {**os.environ, **offline, "HF_HOME": f"{folder}-hf_home"}
    done = run_script(*shlex.split(DEMO_COMMAND)[2:], cwd=folder, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("stdout", "stderr"):
        folder.with_name(f"{folder.name}.{name}").write_text(getattr(done, name), encoding="utf-8")


@pytest.fixture(scope="session")
def demo(shared_folder):
    """The demo, run once; tests only read its folder."""
    folder = shared_folder("demo", run_demo)
    output = folder / "medasr-demo"
    return SimpleNamespace(
        folder=folder,
        output=output,
        results=output / "results",
        final=output / "final",
        audio=output / "audio",
        stdout=folder.with_name("demo.stdout").read_text(encoding="utf-8"),
        stderr=folder.with_name("demo.stderr").read_text(encoding="utf-8"),
        metrics=load_json(output / "results/metrics.json"),
        predictions=load_predictions(output / "results"),
    )


@pytest.fixture(scope="session")
def known_clip(demo):
    """(clip, text) of a test clip that the demo's model writes down in several words."""
    row = next(row for row in reversed(demo.predictions) if len(row["pred_text"].split()) >= 4)
    return row["audio_filepath"], row["pred_text"]
