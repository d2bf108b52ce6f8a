#!/usr/bin/env python3
"""Whole runs, killed at random moments and started again until they finish, against one that nothing disturbs.

    python tests/kills.py --kills 25

Each ends with the undisturbed run's weights, texts and scores, bit for bit, or the command exits with 1. Then SIGTERM
ends five runs in training, and the seconds from it to the exit are given."""

import argparse
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "finetune_medasr.py"
FLAGS = f"""--model {HERE}/fixtures/model --dataset {HERE}/fixtures/corpus --per_device_train_batch_size 4
    --gradient_accumulation_steps 1 --max_steps 8 --eval_steps 2 --save_steps 2 --save_total_limit 9 --logging_steps 1
    --warmup_steps 2 --max_train_samples 16 --max_eval_samples 2 --max_test_samples 3 --dataloader_num_workers 0
    --early_stopping_patience 0 --use_cpu true""".split()
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def flags(data_dir, output, *more):
    return [*FLAGS, "--data_dir", str(data_dir), "--output_dir", str(output), *map(str, more)]


def start(*arguments):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, SCRIPT, *flags(*arguments)], env=ENV, start_new_session=True, **pipes)


def result(output):
    """What a run has to end with: checksums of its weights, best and last, and texts, and its scores."""
    metrics = json.loads((output / "results" / "metrics.json").read_text())
    names = ("final/model.safetensors", "checkpoint-8/model.safetensors", "results/predictions_test.jsonl")
    files = [output / name for name in names]
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return [*sums, *(metrics[name] for name in ("baseline", "finetuned", "delta"))]


def run_with_kills(data_dir, output, generator=random, kills=0, longest=0.0):
    """Kill runs into `output` after random times, up to `kills` of them, then let one finish; returns the kills."""
    for made in itertools.count():
        process = start(data_dir, output)
        try:
            printed, _ = process.communicate(timeout=generator.uniform(0, longest) if made < kills else 600)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            continue
        assert process.returncode == 0, f"after {made} kills: {printed[-2000:]}"
        return made


def survive(folder, straight, longest, kills, seed=0):
    """(kills survived, up to `longest` seconds after a start, runs finished), each with the result of `straight`."""
    generator, made, runs = random.Random(seed), 0, 0
    while made < kills:
        output = folder / f"killed-{runs}"
        made += run_with_kills(folder / "audio", output, generator, min(4, kills - made), longest)
        runs += 1
        assert result(output) == result(straight), f"{output} ended otherwise after {made} kills"
    return made, runs


def seconds_to_stop(data_dir, output, evaluations, wait=0.0):
    """Seconds from SIGTERM, after so many evaluations of a long run and `wait` more, to an exit with a checkpoint."""
    process = start(data_dir, output, "--max_steps", 5000, "--skip_baseline")
    for line in process.stdout:
        evaluations -= "dev WER" in line
        if evaluations <= 0:
            break
    time.sleep(wait)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "written" in rest, rest
    return time.monotonic() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=25)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        run_with_kills(folder / "audio", folder / "straight")  # prepares the audio too
        began = time.monotonic()
        run_with_kills(folder / "audio", folder / "timed")
        made, runs = survive(folder, folder / "straight", time.monotonic() - began, options.kills)
        print(f"{made} kills in {runs} runs: all ended with the undisturbed run's weights, texts and scores")
        moments = enumerate(random.Random(0).choices([0.1, 0.3, 0.5, 0.7, 0.9], k=5), 1)
        stops = [seconds_to_stop(folder / "audio", folder / f"stopped-{n}", n, wait) for n, wait in moments]
        print(f"SIGTERM to exit in 5 runs: {min(stops):.1f} to {max(stops):.1f} s")


if __name__ == "__main__":
    main()
