"""Error rates, their groups and intervals, and what the report makes of them."""

import json
import tracemalloc

import medwer.cli
import numpy as np
import pandas
import pytest
from conftest import load_json, succeeded
from helpers import cells, run_main, write_table

from finetune_medasr import Scores

KINDS = {"country": "NG", "domain": "clinical", "gender": "Female", "age_group": "19-25"}


def row(text, speaker, accent="igbo", seconds=3.0, **columns):
    clip = {"clip": f"{speaker}/{text[:9]}", "text": text, "speaker": speaker, "num_samples": seconds * 16_000}
    return {**clip, "accent": accent, **KINDS, **columns}


def score(rows, before, after=None, train_accents=None):
    """metrics.json's part of a test set."""
    texts = {"baseline": before} | ({"finetuned": after} if after else {})
    return Scores(pandas.DataFrame(rows), texts, train_accents).metrics()


# Each with what a recogniser wrote.
PAIRS = [
    (row("Give 200 mg.", "ada"), "give 20 mg"),
    (row("Don’t stop the drip", "ada", domain="general"), "don't stop"),
    (row("No\u00a0fever", "bem", "zulu", seconds=5.0, country="NA"), "no high fever {period}"),
    (row("Yes", "cat", "zulu", seconds=20.0, domain="general", gender=""), ""),
    (row("A, B.", "cat", "hausa", seconds=9.99, country="", age_group=""), "a b"),
]
ROWS, TEXTS = [list(column) for column in zip(*PAIRS)]


def test_rates_are_of_the_corpus_and_not_means_of_clips():
    scores = score(ROWS, TEXTS)["baseline"]
    counts = ("substitutions", "deletions", "insertions", "words", "clips", "speakers")
    assert [scores[name] for name in counts] == [1, 3, 1, 12, 5, 3]
    assert scores["wer"] == pytest.approx(5 / 12)  # the mean of the clips' rates would be 0.467
    # "give 200 mg": -1; "don't stop the drip": -9; "no fever": +5; "yes": -3
    assert scores["cer"] == pytest.approx(18 / (11 + 19 + 8 + 3 + 3))
    # As written, split at whitespace: all wrong; "Don’t" 1 and 2 lost; 1 wrong, 2 more; lost; both wrong
    assert scores["wer_raw"] == pytest.approx((3 + 3 + 3 + 1 + 2) / (3 + 4 + 2 + 1 + 2))
    # The authors': "200" and "mg." wrong; "dont" 1 and 2 lost; 2 words more; 1 lost; "a," and "b." wrong
    assert scores["wer_paper"] == pytest.approx((2 + 3 + 2 + 1 + 2) / (3 + 4 + 2 + 1 + 2))
    # Their tables leave out the clip of 20 s.
    assert scores["wer_paper_short"] == pytest.approx((2 + 3 + 2 + 2) / (3 + 4 + 2 + 2))


def test_every_group_has_its_own_rates():
    groups = score(ROWS, TEXTS, train_accents={"igbo", "hausa"})["baseline"]["groups"]
    for kind, rates in {
        "domain": {"clinical": 2 / 7, "general": 3 / 5},
        "accent": {"igbo": 3 / 7, "zulu": 2 / 3, "hausa": 0},
        "country": {"NG": 4 / 8, "NA": 1 / 2, "unknown": 0},
        "gender": {"Female": 4 / 11, "unknown": 1},
        "age_group": {"19-25": 5 / 10, "unknown": 0},
        "seen_accent": {"seen": 3 / 9, "unseen": 2 / 3},
        "duration": {"0-5 s": 3 / 7, "5-10 s": 1 / 4, "over 20 s": 1},
    }.items():
        assert {name: group["wer"] for name, group in groups[kind].items()} == pytest.approx(rates), kind
        sizes = [(group["words"], group["clips"]) for group in groups[kind].values()]
        assert np.sum(sizes, axis=0).tolist() == [12, 5]


def test_what_is_not_known_is_a_group_of_its_own():
    groups = score([row("a b", "ada"), row("c d", "bem", seconds=np.nan)], ["a b", "x y"])["baseline"]["groups"]
    assert {name: group["clips"] for name, group in groups["duration"].items()} == {"0-5 s": 1, "unknown": 1}
    assert groups["duration"]["unknown"]["wer_paper_short"] is None, "nobody knows whether it is short"
    assert set(groups["seen_accent"]) == {"unknown"}, "nothing was trained"


def test_texts_that_are_perfect_or_empty_and_references_without_words():
    metrics = score(ROWS, [""] * 5, [row["text"] for row in ROWS])
    before, after = metrics["baseline"], metrics["finetuned"]
    assert [after[name] for name in ("wer", "wer_spoken", "wer_paper", "wer_raw", "cer")] == [0] * 5
    assert [before["wer"], before["deletions"], before["wer_ci95"], after["wer_ci95"]] == [1, 12, [1, 1], [0, 0]]
    scores = score([row("...", "ada"), row("yes no", "bem", domain="general")], ["so it", "yes no"])["baseline"]
    assert [scores["wer"], scores["insertions"], scores["words"]] == [1, 2, 2], "what is written for nothing counts"
    assert scores["groups"]["domain"]["clinical"]["wer"] is None


def test_spoken_punctuation_is_forgiven_in_wer_spoken_alone():
    for reference, text, *rates in (
        ("No fever, no cough.", "no fever comma no cough full stop", 3 / 4, 0),
        ("No fever, no cough.", "no fever coma no cough period", 2 / 4, 1 / 4),
        ("The period was late.", "the period was late", 0, 0),
        ("The period was late.", "the period was late period", 1 / 4, 1 / 4),  # it has the word: nothing is forgiven
        ("No fever", "no comma", 1 / 2, 1 / 2),
    ):
        scores = score([row(reference, "ada")], [text])["baseline"]
        assert [scores["wer"], scores["wer_spoken"]] == pytest.approx(rates), text


def test_numbers_and_negations_have_rates_of_their_own():
    rows = [row("No malaria tested at twelve, denied", "ada"), row("the story at 12 of the day", "bem")]
    scores = score(rows, ["malaria test at twelve or 11 denied", "the story of the day"])["baseline"]
    assert (scores["wer_numbers"], scores["wer_negations"]) == (2 / 2, 1 / 2)
    assert score(rows[:1], [""])["baseline"]["groups"]["accent"]["igbo"]["wer_numbers"] == 1
    assert score(rows[1:], [""])["baseline"]["wer_negations"] is None, "there is none"


MEDICAL = [  # (reference, hypotheses before and after)
    ("Start insulin glargine 10 units, for diabetes mellitus.", "start insulin large in ten units for diabetes", ""),
    ("She has haemoglobin of twelve and no fever", "she has hemoglobin of 12 and a fever", "no fever"),
    ("( CCAM ).", "malaria and fever", "seek malaria"),  # without a word for Whisper: not counted
    ("I went to the market.", "eye went to malaria market", "I'm going to the market"),
    ("Give paracetamol, amoxicillin and metformin", "give paracetamol a moxy sealing and met for men",
     "Give metformin"),
]  # fmt: skip


def test_whispers_and_the_medical_rate_are_those_of_medwers_command(tmp_path, capsys):
    references, *texts = map(list, zip(*MEDICAL * 3))
    rows = [row(text, f"speaker {number}") for number, text in enumerate(references)]
    metrics = score(rows, *texts)
    for system, hypotheses in zip(("baseline", "finetuned"), texts):
        for name, lines in (("refs", references), ("hyps", hypotheses)):
            write_table(tmp_path / f"{name}.jsonl", [{"id": at, "text": text} for at, text in enumerate(lines)])
        files = (f"--{name}={tmp_path}/{name}.jsonl" for name in ("refs", "hyps"))
        assert medwer.cli.main(["score", *files]) == 0
        theirs = json.loads(capsys.readouterr().out)
        assert 0 < theirs["medical_wer"] != theirs["wer"] > 0 and theirs["utts"] == 4 * 3
        ours = [metrics[system][name] for name in ("wer_whisper", "wer_medical")]
        assert ours == pytest.approx([theirs["wer"], theirs["medical_wer"]], abs=1e-9)
    for name in ("wer_whisper", "wer_medical"):
        change, ends = metrics["delta"][name], metrics["delta"][f"{name}_ci95"]
        assert ends[0] < change < ends[1] and change == metrics["finetuned"][name] - metrics["baseline"][name]
        assert metrics["delta"]["groups"]["accent"]["igbo"][f"{name}_ci95"] == ends
    nothing = score(rows[3:4], ["the market"])["baseline"]
    assert nothing["wer_medical"] is None and nothing["wer_medical_ci95"] is None


def test_intervals_are_of_whole_speakers():
    """A few speakers with many clips, each as good or bad throughout."""
    generator, rows, texts, people = np.random.default_rng(1), [], [], []  # (errors, words) of each
    for number, clips in enumerate([15, 12, 8, 6, 5, 4, 3, 2, 2, 1, 1, 1]):
        quality, words = generator.uniform(0.05, 0.8), generator.integers(4, 30, clips)
        errors = generator.binomial(words, quality)
        people.append([sum(errors), sum(words)])
        rows += [row("a " * count, f"speaker-{number}") for count in words]
        texts += ["x " * wrong + "a " * (count - wrong) for wrong, count in zip(errors, words)]
    drawn = generator.integers(len(people), size=(6000, len(people)))
    errors, words = np.array(people)[drawn].sum(axis=1).T
    order = generator.permutation(len(rows))
    interval = score([rows[at] for at in order], [texts[at] for at in order])["baseline"]["wer_ci95"]
    expected = np.percentile(errors / words, [2.5, 97.5])
    # Clips drawn one by one would give an interval of half the width, which the tolerance tells apart.
    np.testing.assert_allclose(interval, expected, atol=0.015)
    assert np.ptp(expected) > 0.2


def test_memory_does_not_grow_with_the_speakers():
    """Clips that name no speaker count as one each: 58,000 of them took 8 GB."""
    rows = [{**row("a", ""), "clip": str(number)} for number in range(1_000)]
    tracemalloc.start()
    try:
        scores = score(rows, ["b"] * len(rows))["baseline"]
        assert (scores["wer_ci95"], scores["speakers"]) == ([1, 1], 1_000)
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


def test_the_change_is_paired():
    """Every speaker has one word of four made good: the change is certain, the levels are not."""
    rows = [row("a b c d", f"speaker-{number}") for number in range(10)]
    before = ["a b c x" if number < 5 else "x x x x" for number in range(10)]
    after = ["a b c d" if number < 5 else "a x x x" for number in range(10)]
    metrics = score(rows, before, after)
    delta = metrics["delta"]
    assert delta["wer"] == pytest.approx(-0.25) and delta["wer_ci95"] == pytest.approx([-0.25, -0.25])
    assert (delta["probability_of_improvement"], delta["clips_better"], delta["clips_worse"]) == (1, 1, 0)
    assert np.ptp(metrics["baseline"]["wer_ci95"]) > 0.3
    same, worse = score(rows, before, before)["delta"], score(rows, after, before)["delta"]
    assert (same["wer_ci95"], same["clips_equal"]) == ([0, 0], 1)
    assert worse["clips_worse"] == 1 and worse["groups"]["accent"]["igbo"]["wer"] == pytest.approx(0.25)


def test_groups_with_few_speakers_or_few_words_are_marked_and_not_ranked(tmp_path):
    speakers = {"large": [100] * 5, "few people": [200] * 4, "few words": [100] * 4 + [99], "vast": [101] * 5}
    rows = []
    for wrong, (accent, counts) in zip((10, 20, 30, 40), speakers.items()):
        for number, words in enumerate(counts):
            text = "x " * wrong + "a " * (words - wrong)
            rows.append({"text": "a " * words, "pred_text": text, "accent": accent, "user_id": f"{accent} {number}"})
    write_table(tmp_path / "texts.jsonl", [{**row, "domain": "general"} for row in rows])
    printed = succeeded(run_main(tmp_path, "--score_file", "texts.jsonl", "--output_dir", ".")).stdout
    groups = load_json(tmp_path / "results/metrics.json")["baseline"]["groups"]["accent"]
    assert {name for name, group in groups.items() if group["small"]} == {"few people", "few words"}
    text = (tmp_path / "results/report.md").read_text()
    for table in (text, printed):  # there is one domain, so the next kind of group is shown
        assert cells(table, "large")[:2] == ["5", "5"] and "%, " in cells(table, "large")[5]
        assert "%, " in cells(table, "few words\\*")[5]
        assert cells(table, "few people\\*")[3:] == ["-", "10.0 %", "-", "-", "10.0 %", "-"], "too few for an interval"
    assert "| domain" in text and "| domain" not in printed
    # 10 of 100 and 40 of 101
    assert "Macro average over 2 groups that are large enough: 24.8 %; the worst is vast, 39.6 %." in text
