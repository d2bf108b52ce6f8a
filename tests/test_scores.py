import random
import tracemalloc

import numpy as np
import pytest

from finetune_medasr import bootstrap_rates, compare, error_counts, interval, score_texts, word_errors


def row(text, speaker, accent="igbo", seconds=3.0, **columns):
    kinds = {"country": "NG", "domain": "clinical", "gender": "Female", "age_group": "19-25"}
    return {
        "clip": f"{speaker}/{text[:9]}",
        "text": text,
        "speaker": speaker,
        "accent": accent,
        "num_samples": round(seconds * 16_000),
        **kinds,
        **columns,
    }


# Each with what a recogniser wrote, and the substitutions, deletions, insertions and words of normalised text.
PAIRS = [
    (row("Give 200 mg.", "ada"), "give 20 mg", (1, 0, 0, 3)),
    (row("Don’t stop the drip", "ada", domain="general"), "don't stop", (0, 2, 0, 4)),
    (row("No\u00a0fever", "bem", "zulu", seconds=5.0, country="NA"), "no high fever {period}", (0, 0, 1, 2)),
    (row("Yes", "cat", "zulu", seconds=20.0, domain="general", gender=""), "", (0, 1, 0, 1)),
    (row("A, B.", "cat", "hausa", seconds=9.99, country="", age_group=""), "a b", (0, 0, 0, 2)),
]
ROWS, TEXTS, ERRORS = [list(column) for column in zip(*PAIRS)]


def test_errors_of_each_clip_are_counted_by_kind():
    assert score_texts(ROWS, TEXTS, {"igbo"}).counts["wer"].tolist() == [list(errors) for errors in ERRORS]


def test_rates_are_of_the_corpus_and_not_means_of_clips():
    scores = score_texts(ROWS, TEXTS, {"igbo"}).scores
    assert (scores["substitutions"], scores["deletions"], scores["insertions"]) == (1, 3, 1)
    assert (scores["words"], scores["clips"], scores["speakers"]) == (12, 5, 3)
    assert scores["wer"] == pytest.approx(5 / 12)  # the mean of the clips' rates would be 0.467
    # "give 200 mg": -1; "don't stop the drip": -9; "no fever": +5; "yes": -3; "a b": 0; of 11 + 19 + 8 + 3 + 3
    # characters
    assert scores["cer"] == pytest.approx(18 / 44)
    # As written, split at spaces: "Give"/"mg." 3 wrong; "Don’t" 1 and 2 lost; "No\u00a0fever" one word against 4; 1
    # lost; both wrong
    assert scores["wer_raw"] == pytest.approx((3 + 3 + 4 + 1 + 2) / (3 + 4 + 1 + 1 + 2))
    # The authors': "200" and "mg." wrong; "dont" 1 and 2 lost; "no fever" against "no high fever period" 2
    # more; 1 lost; "a," and "b." wrong
    assert scores["wer_paper"] == pytest.approx((2 + 3 + 2 + 1 + 2) / (3 + 4 + 2 + 1 + 2))


@pytest.mark.parametrize(
    "kind, rates",
    [
        ("domain", {"clinical": 2 / 7, "general": 3 / 5}),
        ("accent", {"igbo": 3 / 7, "zulu": 2 / 3, "hausa": 0}),
        ("country", {"NG": 4 / 8, "NA": 1 / 2, "unknown": 0}),
        ("gender", {"Female": 4 / 11, "unknown": 1}),
        ("age_group", {"19-25": 5 / 10, "unknown": 0}),
        ("seen_accent", {"seen": 3 / 9, "unseen": 2 / 3}),
        ("duration", {"0-5 s": 3 / 7, "5-10 s": 1 / 4, "over 20 s": 1}),
    ],
)
def test_every_group_has_its_own_rates(kind, rates):
    groups = score_texts(ROWS, TEXTS, {"igbo", "hausa"}).scores["groups"][kind]
    assert {name: group["wer"] for name, group in groups.items()} == pytest.approx(rates)
    assert sum(group["words"] for group in groups.values()) == 12
    assert sum(group["clips"] for group in groups.values()) == 5


def test_a_clip_of_unknown_duration_is_in_no_group_of_durations():
    rows = [row("a b", "ada"), {**row("c d", "bem"), "num_samples": None}]
    scores = score_texts(rows, ["a b", "x y"], None).scores
    assert {name: group["clips"] for name, group in scores["groups"]["duration"].items()} == {"0-5 s": 1, "unknown": 1}
    assert (scores["wer_paper"], scores["wer_paper_short"]) == (0.5, 0)


def test_accents_are_neither_seen_nor_unseen_when_nothing_was_trained():
    assert set(score_texts(ROWS, TEXTS, None).scores["groups"]["seen_accent"]) == {"unknown"}


def test_perfect_texts_have_no_errors():
    scores = score_texts(ROWS, [row["text"] for row in ROWS], None).scores
    assert [scores[name] for name in ("wer", "wer_spoken", "wer_paper", "wer_raw", "cer")] == [0] * 5
    assert scores["wer_ci95"] == [0, 0]


def test_empty_texts_lose_every_word():
    scores = score_texts(ROWS, [""] * 5, None).scores
    assert (scores["wer"], scores["deletions"], scores["wer_ci95"]) == (1, 12, [1, 1])


def test_a_reference_without_words_counts_what_is_written_for_it():
    scores = score_texts([row("...", "ada"), row("yes no", "bem", domain="general")], ["so it", "yes no"], None).scores
    assert (scores["wer"], scores["insertions"], scores["words"]) == (1.0, 2, 2)
    assert scores["groups"]["domain"]["clinical"]["wer"] is None


@pytest.mark.parametrize(
    "reference, text, spoken",
    [
        ("No fever, no cough.", "no fever comma no cough full stop", 0),
        ("No fever, no cough.", "no fever coma no cough period", 1 / 4),
        ("The period was late.", "the period was late", 0),
        ("The period was late.", "the period was late period", 1 / 4),  # it has the word itself: nothing is forgiven
        ("No fever", "no comma", 1 / 2),
    ],
)
def test_spoken_punctuation_is_forgiven_in_wer_spoken_alone(reference, text, spoken):
    scores = score_texts([row(reference, "ada")], [text], None).scores
    assert scores["wer_spoken"] == pytest.approx(spoken)
    assert scores["wer"] >= scores["wer_spoken"]


@pytest.mark.parametrize(
    "reference, text, errors",
    [
        ("a b c d", "a x c d", (1, 0, 0, 4)),
        ("a b c d", "", (0, 4, 0, 4)),
        ("", "a b", (0, 0, 2, 0)),
        ("", "", (0, 0, 0, 0)),
        ("a b c d", "b c d e f", (0, 1, 2, 4)),
        ("a b", "x y z", (2, 0, 1, 2)),
        ("200 mg", "20 mg", (1, 0, 0, 2)),
    ],
)
def test_word_errors_of_one_pair(reference, text, errors):
    assert error_counts([reference], [text]).tolist() == [list(errors)]


def test_character_errors_count_spaces():
    assert error_counts(["the rapist"], ["therapist"], characters=True).tolist() == [[0, 1, 0, 10]]


# ---------------------------------------------------------------- intervals


def clips_of_speakers():
    """Error counts and speakers of 60 clips: a few speakers with many clips, each as good or bad throughout."""
    rng = np.random.default_rng(1)
    speakers = np.repeat([f"speaker-{number}" for number in range(12)], [15, 12, 8, 6, 5, 4, 3, 2, 2, 1, 1, 1])
    quality = dict(zip(np.unique(speakers), rng.uniform(0.05, 0.8, 12)))
    words = rng.integers(4, 30, len(speakers))
    errors = rng.binomial(words, [quality[name] for name in speakers])
    order = rng.permutation(len(speakers))
    return np.stack([errors, 0 * errors, 0 * errors, words], axis=1)[order], speakers[order]


def test_bootstrap_draws_whole_speakers():
    counts, speakers = clips_of_speakers()
    people = [
        [(int(line[:3].sum()), int(line[3])) for line in counts[speakers == name]] for name in np.unique(speakers)
    ]
    generator = random.Random(5)
    rates = []
    for _ in range(6000):
        clips = [clip for person in generator.choices(people, k=len(people)) for clip in person]
        rates.append(sum(errors for errors, _ in clips) / sum(words for _, words in clips))
    drawn = bootstrap_rates(counts, speakers, draws=6000)
    assert drawn.shape == (6000,)
    shares = [2.5, 25, 50, 75, 97.5]
    np.testing.assert_allclose(np.percentile(drawn, shares), np.percentile(rates, shares), atol=0.012)
    # Clips drawn one by one would give an interval of half the width, which the tolerance above tells apart.
    assert np.ptp(np.percentile(rates, [2.5, 97.5])) > 0.2


def test_memory_of_the_bootstrap_does_not_grow_with_the_speakers():
    # Clips that name no speaker count as one each: a corpus of 58,000 took 8 GB.
    tracemalloc.start()
    try:
        assert bootstrap_rates(np.ones((10_000, 4), int), np.arange(10_000), draws=3_000).tolist() == [3] * 3_000
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_no_word_is_clinical_where_no_general_ones_are_to_compare_with():
    clinical = [row("the malaria test of the day", "ada")] * 6
    general = [row("the story of the day", "bem", domain="general")] * 6
    for rows, recall in ((clinical, "-"), (clinical + general, "100.0 % of 12")):  # malaria, test
        assert word_errors(score_texts(rows, [row["text"] for row in rows], None))[0]["clinical words"] == recall


def test_interval_in_the_scores_is_that_of_the_speakers():
    # Of two speakers, one all wrong and one all right, a quarter of the draws takes only the one, a quarter only the
    # other.
    rows = [row(text, speaker) for speaker in ("ada", "bem") for text in ("a b", "c d", "e f", "g h")]
    scores = score_texts(rows, ["x y"] * 4 + ["a b", "c d", "e f", "g h"], None).scores
    assert (scores["wer"], scores["wer_ci95"]) == (0.5, [0, 1])


def test_interval_is_the_middle_95_percent():
    assert interval(np.arange(1001)) == [25, 975]


def test_two_systems_are_drawn_with_the_same_speakers():
    counts, speakers = clips_of_speakers()
    better = counts.copy()
    better[:, 0] //= 2
    difference = counts.copy()
    difference[:, 0] -= better[:, 0]
    before, after = bootstrap_rates(counts, speakers), bootstrap_rates(better, speakers)
    np.testing.assert_allclose(before - after, bootstrap_rates(difference, speakers))
    assert np.array_equal(before, bootstrap_rates(counts, speakers))
    assert not np.array_equal(before, bootstrap_rates(counts, speakers, seed=1))


def test_comparison_is_paired():
    # Every speaker has the same one word of four made good, whatever else is wrong: the change is certain, the levels
    # are not.
    rows = [row("a b c d", f"speaker-{number}") for number in range(10)]
    before = ["a b c x" if number < 5 else "x x x x" for number in range(10)]
    after = ["a b c d" if number < 5 else "a x x x" for number in range(10)]
    baseline, finetuned = score_texts(rows, before, None), score_texts(rows, after, None)
    delta = compare(baseline, finetuned)
    assert delta["wer"] == pytest.approx(-0.25)
    assert delta["wer_ci95"] == pytest.approx([-0.25, -0.25])
    assert delta["probability_of_improvement"] == 1
    assert (delta["clips_better"], delta["clips_equal"], delta["clips_worse"]) == (1, 0, 0)
    assert baseline.scores["wer_ci95"][1] - baseline.scores["wer_ci95"][0] > 0.3
    assert compare(baseline, baseline)["wer_ci95"] == [0, 0] and compare(baseline, baseline)["clips_equal"] == 1
    assert compare(finetuned, baseline)["groups"]["accent"]["igbo"]["wer"] == pytest.approx(0.25)
