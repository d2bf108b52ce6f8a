"""The trials of benchmark.py: the US-English clips that they score forgetting on, and their table."""

import json

import benchmark
import jiwer
import trials
from conftest import read_csv, succeeded
from helpers import run_main

from finetune_medasr import normalize_wer


def test_the_model_knows_the_us_english_voices():
    """It was pre-trained on others of their kind: what it forgets shows against a low WER."""
    clips = read_csv(trials.US_ENGLISH / "test/metadata.csv")
    names, references = ([clip[column] for clip in clips] for column in ("file_name", "text"))
    done = succeeded(run_main(trials.US_ENGLISH / "test", "--transcribe", *names, "--model", trials.MODEL))
    texts = dict(line.split("\t") for line in done.stdout.splitlines())
    assert len(names) == 60 and len({clip["speaker_id"] for clip in clips}) == 4
    assert jiwer.wer(list(map(normalize_wer, references)), [normalize_wer(texts[name]) for name in names]) < 0.03


def test_the_table_compares_a_trial_and_the_base_on_the_seeds_of_both(tmp_path, monkeypatch, capsys):
    results, entries = tmp_path / "results.jsonl", []
    for trial in trials.TRIALS:
        for seed, wer in (
            {1: 10.0, 2: 20.0, 3: 90.0}.items() if trial == trials.BASE else {1: 8.0, 2: 16.0, 4: 1.0}.items()
        ):
            entries.append({"trial": trial, "seed": seed, "found": {trial: dict.fromkeys(trials.SETS, wer)}})
    results.write_text("\n".join(map(json.dumps, reversed(entries))) + "\n")
    monkeypatch.setattr("sys.argv", ["benchmark.py", "trials", "--seeds", "1", "2", "--results", str(results)])
    assert benchmark.main() == 0
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == list(trials.TRIALS)
    assert rows[0][1:3] == ["3", "40.0 ± 43.6"] and rows[0][6:] == [""] * 4
    assert rows[1][1:3] == ["2", "12.0 ± 5.7"] and rows[1][6:] == ["-3.0 ± 1.4 (2/2)"] * 4
    assert len(results.read_text().splitlines()) == len(entries)
