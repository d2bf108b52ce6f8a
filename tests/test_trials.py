"""The trials of benchmark.py: the US-English clips that they score forgetting on, and their table."""

import csv
import json
import subprocess
import sys

import trials
from conftest import HERE, MODEL

from finetune_medasr import error_counts, main, normalize_wer, rate


def test_the_model_knows_the_us_english_voices(monkeypatch, capfd):
    """It was pre-trained on others of their kind: what it forgets shows against a low WER."""
    monkeypatch.chdir(trials.US_ENGLISH / "test")
    with open("metadata.csv", newline="", encoding="utf-8") as file:
        clips = list(csv.DictReader(file))
    names, references = ([clip[column] for clip in clips] for column in ("file_name", "text"))
    assert main(["--transcribe", *names, "--model", str(MODEL), "--use_cpu", "true"]) == 0
    texts = dict(line.split("\t") for line in capfd.readouterr().out.splitlines())
    counts = error_counts(list(map(normalize_wer, references)), [normalize_wer(texts[name]) for name in names])
    assert len(names) == 60 and len({clip["speaker_id"] for clip in clips}) == 4
    assert rate(counts) < 0.03


def test_the_table_compares_a_trial_and_the_base_on_the_seeds_of_both(tmp_path):
    results, wers = tmp_path / "results.jsonl", {1: 10.0, 2: 20.0, 3: 90.0}
    lines = []
    for trial in trials.TRIALS:
        better = 0.0 if trial == trials.BASE else 2.0
        for seed in wers if trial == trials.BASE else (1, 2):
            found = {trial: dict.fromkeys(trials.SETS, wers[seed] - better * seed)}
            lines.append(json.dumps({"trial": trial, "seed": seed, "found": found}))
    results.write_text("\n".join(reversed(lines)) + "\n")
    command = [sys.executable, HERE / "benchmark.py", "trials", "--seeds", "1", "2", "--results", results]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in done.stdout.splitlines()[2:] if line]
    assert [row[0] for row in rows] == list(trials.TRIALS)
    assert rows[0][1:3] == ["3", "40.0 ± 43.6"] and rows[0][6:] == [""] * 4
    assert rows[1][1:3] == ["2", "12.0 ± 5.7"] and rows[1][6:] == ["-3.0 ± 1.4 (2/2)"] * 4
    assert len(results.read_text().splitlines()) == len(lines)
