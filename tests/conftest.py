"""What several test files share: paths, the program as a user starts it, what it ended with and wrote, the demo."""

import csv
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import filelock
import kills
import pytest
from warm import WarmStarts

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "finetune_medasr.py"
MODEL, CORPUS = HERE / "fixtures/model", HERE / "fixtures/corpus"
DEMO_COMMAND = "python finetune_medasr.py --demo"
IN_TWO = ["--per_device_train_batch_size", "2", "--ddp_backend", "gloo"]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: models this small wait for further threads
sys.path.insert(0, str(HERE.parent))  # so that `pytest tests` finds the script as `python -m pytest tests` does


def run_script(*arguments, cwd, env=None, script=SCRIPT):
    """The finished process of `python finetune_medasr.py ARGUMENTS`, its output as text."""
    command = list(map(str, [sys.executable, script, *arguments]))
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900)


def succeeded(done):
    """A process that has ended as it should."""
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def refused(done, status, *patterns):
    """The message of a process that has ended with `status`, which has something for each of the patterns; its stderr
    has nothing else but progress bars, warnings and the Hub client's retries."""
    others = r"\d+%\||warning: |HTTP Error|Rate limited|Retrying|thrown while requesting"
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip() and not re.search(others, line)]
    assert done.returncode == status and len(lines) == 1 and "report it" not in lines[0], done.stderr
    program, message = lines[0].split(" error: ", 1)
    assert program == "finetune_medasr.py:" and all(re.search(pattern, message) for pattern in patterns), lines[0]
    return message


def load_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def scored_clips(results):
    lines = (Path(results) / "predictions_test.jsonl").read_text(encoding="utf-8").splitlines()
    return list(map(json.loads, lines))


def tensorboard(path):
    """What a folder's, or a file's, curves and texts are."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(path)).Reload()


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def corpus_rows(split):
    """{clip: CSV row} of the fixture corpus, the first of rows with the same path."""
    rows = {}
    for path in sorted(CORPUS.glob(f"transcripts/*/{split}.csv")):
        for row in read_csv(path):
            rows.setdefault("/".join((row.get("audio_paths") or row["audio_path"]).split("/")[-2:]), row)
    return rows


def corpus_audio(split):
    """{clip: encoded audio} of the fixture corpus."""
    clips = {}
    for path in sorted(CORPUS.glob(f"audio/*/{split}/*.tar.gz")):
        with tarfile.open(path) as tar:
            clips |= {"/".join(member.name.split("/")[-2:]): tar.extractfile(member).read() for member in tar}
    return clips


@pytest.fixture(scope="session")
def warm():
    """Starts the program, offline, in a process of its own each time."""
    with WarmStarts(kills.ENV) as warm:
        yield warm


@pytest.fixture(scope="session")
def run_two(warm):
    """run_two(flag, ...) -> the CompletedProcesses of a run in two, as a cluster starts them, without torchrun, in the
    folder `cwd`, in which {rank} stands for their numbers."""
    with WarmStarts(kills.ENV) as second:

        def run_two(*arguments, env=(), cwd=".", **options):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
            for rank, start in enumerate((warm, second)):
                variables = {**place, "RANK": rank, "LOCAL_RANK": rank, **dict(env)}
                start.start(*arguments, **options, env=variables, cwd=str(cwd).replace("{rank}", str(rank)))
            return [start.wait() for start in (warm, second)]

        yield run_two


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo, run once for all processes of pytest-xdist where no network is reached; tests only read its folder."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, printed = base / "demo", base / "demo.json"
    with filelock.FileLock(base / "demo.lock"):
        if not printed.exists():
            folder.mkdir(exist_ok=True)
            nowhere = dict.fromkeys(("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
            env = {**os.environ, **nowhere, "HF_HOME": f"{folder}-hf_home"}
            done = succeeded(run_script(*shlex.split(DEMO_COMMAND)[2:], cwd=folder, env=env))
            printed.write_text(json.dumps({"stdout": done.stdout, "stderr": done.stderr}))
    output = folder / "medasr-demo"
    return SimpleNamespace(
        **load_json(printed), folder=folder, output=output, results=output / "results", final=output / "final",
        audio=output / "audio", metrics=load_json(output / "results/metrics.json"),
        predictions=scored_clips(output / "results"),
    )  # fmt: skip


@pytest.fixture(scope="session")
def known_clip(demo):
    """(clip, text) of a test clip that the demo's model writes down in several words."""
    row = next(row for row in reversed(demo.predictions) if len(row["pred_text"].split()) >= 4)
    return row["audio_filepath"], row["pred_text"]
