"""Decoding with a language model of tokens: the search, what is refused, what a run makes of it."""

import dataclasses
import gc
import gzip
import itertools
import json
import math
import shutil
import sys
import warnings

import numpy as np
import pytest
from conftest import (
    CORPUS,
    MODEL,
    TWO_PROCESSES,
    corpus_audio,
    error_line,
    load_json,
    load_predictions,
    run_script,
    write_wav,
)
from helpers import parse, small_processor
from loopback_hub import MODEL as HUB_MODEL
from loopback_hub import LoopbackHub
from make_lm import estimate, make_lm, write_arpa

import finetune_medasr as script

LETTERS = "abc"  # ids 1, 2, 3; 0 is the blank, 4 a special token
SENTENCES = [list(text) for text in ("abab", "abc", "ca", "bbc", "aab", "cabb")]


def probability_of(word, context, probabilities, back_off):
    """P(word | context) by the definition of a back-off n-gram."""
    if (*context, word) in probabilities:
        return probabilities[*context, word]
    return back_off.get(context, 1) * probability_of(word, context[1:], probabilities, back_off)


def log_probability(text, probabilities, back_off, order=3):
    words = ["<s>", *text, "</s>"]
    return sum(
        math.log(probability_of(words[end], tuple(words[max(0, end - order + 1) : end]), probabilities, back_off))
        for end in range(1, len(words))
    )


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """(the n-gram of SENTENCES as (probabilities, back-off weights), the exact search's LanguageModel of it)."""
    path = tmp_path_factory.mktemp("letters") / "letters.arpa"
    ngram = estimate(SENTENCES, LETTERS, 3)
    write_arpa(path, *ngram)
    lm = script.LanguageModel(
        name="letters",
        kenlm=script.open_kenlm(path, ["<unk>", *LETTERS]),
        words=[0, 1, 2, 3, 0],
        counts_as=np.array([0, 1, 2, 3, 0]),
        blank=0,
        weight=1.0,
        word_score=0.0,
        beam=10_000,
        min_log_prob=-math.inf,
        max_behind=math.inf,
    )
    return ngram, lm


def random_emissions(frames, seed, sharpness=1.5):
    logits = np.random.default_rng(seed).normal(size=(frames, 5)) * sharpness
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-log_probs, axis=1)
    return log_probs, script.Emissions(ids.astype(np.int32), np.take_along_axis(log_probs, ids, 1).astype(np.float32))


def collapsed(path):
    """The text of an alignment: repeats once, then no blanks and special tokens."""
    return "".join(LETTERS[id - 1] for id, _ in itertools.groupby(0 if id == 4 else id for id in path) if id)


def scores_of_all_texts(log_probs, ngram, weight, word_score):
    """{text: score} by summing every alignment there is."""
    sums = {}
    for path in itertools.product(range(5), repeat=len(log_probs)):
        text = collapsed(path)
        sums[text] = sums.get(text, 0) + math.exp(sum(log_probs[frame, id] for frame, id in enumerate(path)))
    return {
        text: math.log(total) + weight * log_probability(text, *ngram) + word_score * len(text)
        for text, total in sums.items()
    }


# ---------------------------------------------------------------- the n-gram of the tests


@pytest.mark.parametrize("context", [(), ("a",), ("c",), ("<s>",), ("a", "b"), ("<s>", "c"), ("c", "c"), ("b", "a")])
def test_the_probabilities_after_any_context_sum_to_1(context):
    ngram = estimate(SENTENCES, [*LETTERS, "never"], 3)
    total = sum(probability_of(word, context, *ngram) for word in [*LETTERS, "never", "</s>", "<unk>"])
    assert total == pytest.approx(1)


def test_kenlm_reads_the_probabilities_that_were_written(letters):
    ngram, lm = letters
    for text in ("", "ab", "abab", "cccc", "bca"):
        prefix, total = lm.start(), 0.0
        for letter in text:
            prefix = lm.extend(prefix, 1 + LETTERS.index(letter))
            total += prefix.added
        assert total + lm.end(prefix) == pytest.approx(log_probability(text, *ngram), abs=1e-4)


# ---------------------------------------------------------------- the search


@pytest.mark.parametrize("weight, word_score", [(0, 0), (1, 0), (0.5, 1.5), (2, -1), (0.3, 3)])
def test_the_search_finds_the_best_of_all_texts(letters, weight, word_score):
    ngram, lm = letters
    lm = dataclasses.replace(lm, weight=weight, word_score=word_score)
    for seed in range(6):
        log_probs, emissions = random_emissions(5, seed)
        everything = scores_of_all_texts(log_probs, ngram, weight, word_score)
        best = max(everything, key=everything.get)
        path, score = script.beam_search(emissions, lm)
        assert len(path) == 5 and collapsed(path) == best
        assert score == pytest.approx(everything[best], abs=1e-3)


def test_a_double_letter_needs_a_blank_and_a_held_one_is_one(letters):
    lm = dataclasses.replace(letters[1], weight=0.0)
    ids = np.array([[1, 0], [1, 0], [0, 1], [1, 0], [2, 0]])
    emissions = script.Emissions(ids, np.log([[0.9, 0.1]] * 5))
    assert script.beam_search(emissions, lm)[0] == [1, 1, 0, 1, 2]


def test_special_tokens_are_never_written(letters):
    lm = dataclasses.replace(letters[1], word_score=2.0, min_log_prob=-5.0)
    emissions = script.Emissions(np.array([[1, 0], [4, 2], [4, 0]]), np.log([[0.99, 0.01], [0.95, 0.05], [0.99, 0.01]]))
    assert 4 not in script.beam_search(emissions, lm)[0]
    alone = script.Emissions(np.array([[4, 2], [4, 2]]), np.log([[0.999, 0.001]] * 2))
    assert script.beam_search(alone, lm)[0] == [0, 0]


def test_nothing_said_is_nothing_written(letters):
    empty = script.Emissions(np.zeros((0, 5), np.int32), np.zeros((0, 5), np.float32))
    assert script.beam_search(empty, letters[1])[0] == []


@dataclasses.dataclass
class CountingLM(script.LanguageModel):
    """Counts the texts in memory at the end of a search."""

    alive: int = 0

    def end(self, prefix):
        self.alive = max(self.alive, sum(isinstance(thing, script.Prefix) for thing in gc.get_objects()))
        return super().end(prefix)


def test_memory_does_not_grow_with_the_length_of_a_clip(letters):
    alive = {}
    for frames in (200, 4000):
        lm = CountingLM(**{**vars(letters[1]), "beam": 8, "min_log_prob": -5.0, "max_behind": 10.0})
        gc.collect()
        script.beam_search(random_emissions(frames, 1, sharpness=4)[1], lm)
        alive[frames] = lm.alive
    assert alive[4000] < 2 * alive[200] + 100


# ---------------------------------------------------------------- on the small model and corpus


@pytest.fixture(scope="session")
def arpa(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm") / "tokens.arpa"
    make_lm(path)
    return path


@pytest.fixture
def run(capfd):
    """run(flag, ...) -> (exit status, stdout, stderr) of the program in this process, on the CPU."""

    def run(*arguments):
        capfd.readouterr()
        quiet = ["--use_cpu", "true", "--disable_tqdm", "true"]
        status = script.main([str(argument) for argument in (*arguments, *quiet)])
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def evaluate(demo, run, tmp_path):
    """evaluate(flag, ...) of the demo's model on the test clips -> the folder of results."""

    def evaluate(*flags):
        corpus = ["--dataset", CORPUS, "--data_dir", demo.audio, "--output_dir", tmp_path / "out"]
        status, out, err = run("--eval_only", "--model", demo.final, *corpus, *flags)
        assert status == 0, err
        return tmp_path / "out/results", out

    return evaluate


@pytest.mark.slow
def test_the_language_model_lowers_the_wer_of_speakers_never_trained_on(demo, arpa, evaluate):
    results, out = evaluate("--lm", arpa)
    metrics, predictions = load_json(results / "metrics.json"), load_predictions(results)
    assert metrics["baseline"] == demo.metrics["finetuned"] | {"groups": metrics["baseline"]["groups"]}
    assert metrics["baseline_lm"]["wer"] < 0.6 * metrics["baseline"]["wer"]
    assert metrics["finetuned_lm"] is None
    assert metrics["lm"] == {"name": "tokens.arpa", "weight": 0.5, "word_score": 1.5, "beam": 8}
    assert set(metrics) == set(demo.metrics) | {"baseline_lm", "finetuned_lm", "delta_lm", "lm"}
    assert metrics["baseline_lm"]["groups"].keys() == metrics["baseline"]["groups"].keys()
    assert [row["pred_text"] for row in predictions] == [row["pred_text"] for row in demo.predictions]
    counts = script.error_counts(
        *([script.normalize_wer(row[key]) for row in predictions] for key in ("text", "pred_text_lm"))
    )
    assert script.rate(counts) == metrics["baseline_lm"]["wer"]
    rate = f"{100 * metrics['baseline_lm']['wer']:.1f} %"
    report = (results / "report.md").read_text()
    assert "before, LM" in report and "tokens.arpa, weight 0.5, word score 1.5, beam 8" in report
    assert rate in report and rate in out


@pytest.mark.slow
def test_the_pieces_may_be_spelled_with_number_signs_and_the_file_compressed(arpa, run, demo, known_clip, tmp_path):
    """As in MedASR's own file. The words are those of predictions' column, which --transcribe prints."""
    signs = tmp_path / "signs.arpa"
    make_lm(signs, spell=lambda piece: piece.replace("\u2581", "#"))
    (tmp_path / "packed.arpa.gz").write_bytes(gzip.compress(signs.read_bytes()))
    write_wav(tmp_path / "clip.wav", known_clip[0])
    printed = set()
    for path in (arpa, signs, tmp_path / "packed.arpa.gz"):
        status, out, err = run("--transcribe", tmp_path / "clip.wav", "--model", demo.final, "--lm", path)
        assert status == 0 and "warning" not in err
        printed.add(out)
    assert len(printed) == 1 and printed.pop().strip()


@pytest.mark.slow
def test_auto_is_the_file_in_the_models_folder(arpa, run, demo, known_clip, tmp_path):
    shutil.copytree(demo.final, tmp_path / "model")
    shutil.copy(arpa, tmp_path / "model/lm_6.kenlm")
    write_wav(tmp_path / "clip.wav", known_clip[0])
    clip = ["--transcribe", tmp_path / "clip.wav", "--lm_weight", "20", "--lm_word_score", "-20", "--model"]
    status, out, err = run(*clip, tmp_path / "model", "--lm", "auto")
    assert status == 0 and "warning" not in err
    assert len(out) < len(known_clip[1]), "weights that want short texts"


@pytest.mark.slow
def test_auto_is_asked_of_the_hub(arpa, tmp_path):
    """From the model's repository; for a local folder without the file, from MedASR's."""
    with_lm = tmp_path / "with_lm"
    shutil.copytree(MODEL, with_lm)
    shutil.copy(arpa, with_lm / "lm_6.kenlm")
    shutil.copytree(MODEL, tmp_path / "local")
    write_wav(tmp_path / "clip.wav", min(corpus_audio("test")))
    command = ["--transcribe", "clip.wav", "--use_cpu", "true", "--lm", "auto", "--model"]
    with LoopbackHub({HUB_MODEL: with_lm, "clinic/other": MODEL}, {}) as hub:
        env = hub.env(tmp_path)
        for model in (HUB_MODEL, "local"):
            done = run_script(*command, model, cwd=tmp_path, env=env)
            assert done.returncode == 0, done.stderr
        done = run_script(*command, "clinic/other", cwd=tmp_path, env=env)
        assert done.returncode == 1
        assert error_line(done.stderr) == "--lm auto: model clinic/other has no lm_6.kenlm; give --lm a file"
    done = run_script(
        *command, "local", cwd=tmp_path, env={**env, "HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 1
    assert "lm_6.kenlm of google/medasr; give --lm a file" in error_line(done.stderr)


# ---------------------------------------------------------------- what is refused


def words_arpa(path, words):
    write_arpa(path, *estimate([words], words, 2))


def file_of(kind, path, arpa):
    """Make a file for --lm that cannot be used."""
    pieces = small_processor().tokenizer.convert_ids_to_tokens(range(4, 172))
    content = {
        "empty": b"",
        "text": b"the patient has malaria\n" * 100,
        "cut ARPA": arpa.read_bytes()[:3000],
        "cut binary": script.KENLM_MAGIC + b" format version 5\n\0" + bytes(40),
        "another end": arpa.read_bytes().replace(b"\\2-grams:", b"\\7-grams:"),
        "cut gzip": gzip.compress(arpa.read_bytes())[:500],
        "binary": bytes(range(256)) * 300,
    }
    if kind in content:
        path.write_bytes(content[kind])
    elif kind == "words":
        words_arpa(path, ["the", "patient", "has", "malaria", "and", *"abcdefghijklmnopqrstuvwxyz"])
    elif kind == "words and every letter":
        words_arpa(path, ["with", *dict.fromkeys(piece.strip("\u2581") for piece in pieces if piece != "\u2581")])
    elif kind == "another tokenizer":
        words_arpa(path, [*"abcdefghij", "##ing", "##ed"])


@pytest.mark.parametrize(
    "kind, message",
    {
        "empty": "is empty",
        "text": "is no language model: it begins neither as ARPA",
        "binary": "is no language model: it begins neither as ARPA",
        "cut ARPA": "cannot be loaded: End of file",
        "another end": "cannot be loaded: ",
        "cut binary": "cannot be loaded: ",
        "cut gzip": "cannot be read (EOFError",
        "words": "knows whole words, such as 'the': it must be an n-gram of the model's tokens, not of words",
        "words and every letter": "knows whole words, such as 'the'",
        "another tokenizer": "knows 10 of the model's 168 tokens: it is for another tokenizer",
    }.items(),
)
def test_a_file_that_is_no_model_of_tokens_is_refused(kind, message, run, arpa, tmp_path):
    path = tmp_path / "bad.lm"
    file_of(kind, path, arpa)
    write_wav(tmp_path / "clip.wav", min(corpus_audio("test")))
    status, out, err = run("--transcribe", tmp_path / "clip.wav", "--model", MODEL, "--lm", path)
    assert (status, out) == (1, "")
    assert message in error_line(err) and "/tmp/pip-req" not in err


@pytest.mark.parametrize("kind", ["text", "cut gzip"])
def test_the_file_is_closed_whatever_it_is(kind, arpa, tmp_path):
    file_of(kind, tmp_path / "bad.lm", arpa)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        assert script.lm_file_problem(tmp_path / "bad.lm")
        gc.collect()
    assert not [warning for warning in caught if "bad.lm" in str(warning.message)]


def test_few_tokens_left_unknown_are_warned_of(run, arpa, tmp_path):
    pieces = small_processor().tokenizer.convert_ids_to_tokens(range(4, 140))
    words_arpa(tmp_path / "part.arpa", pieces)
    write_wav(tmp_path / "clip.wav", min(corpus_audio("test")))
    status, _, err = run("--transcribe", tmp_path / "clip.wav", "--model", MODEL, "--lm", tmp_path / "part.arpa")
    assert status == 0
    assert "warning" in err and "knows only 136 of the model's 168 tokens" in err


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--lm nowhere.arpa --eval_only", "--lm is nowhere.arpa: there is no such file"),
        ("--lm . --eval_only", "--lm is .: there is no such file"),
        ("--tune_lm", "--tune_lm needs --lm"),
        ("--lm auto --tune_lm --transcribe here", "--tune_lm needs the dev clips of a corpus"),
        ("--lm auto --score_file here", "--lm needs a model to decode"),
        ("--lm auto --lm_weight -1", "--lm_weight is -1; it must be 0 or more"),
        ("--lm auto --lm_weight nan", "--lm_weight is nan"),
        ("--lm auto --lm_word_score inf", "--lm_word_score is inf; it must be a finite number"),
        ("--lm auto --lm_beam 0", "--lm_beam is 0; it must be above 0"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").touch()
    status, out, err = run(*flags.split())
    assert (status, out) == (2, "")
    assert error_line(err).startswith(message)


def test_a_missing_package_is_named(run, arpa, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashlight", None)
    status, _, err = run("--eval_only", "--lm", arpa)
    assert status == 2
    assert error_line(err) == "--lm needs a package that is not installed: pip install flashlight-text"


# ---------------------------------------------------------------- runs


@pytest.mark.slow
def test_tuning_takes_the_best_weights_on_dev_and_says_what_it_tried(demo, arpa, evaluate):
    few = ["--max_eval_samples", "12", "--max_test_samples", "4"]
    results, out = evaluate("--lm", arpa, "--tune_lm", "--lm_beam", "4", *few)
    record, metrics = load_json(results / "lm.json"), load_json(results / "metrics.json")
    assert record["clips"] == metrics["data"]["dev"]["clips"] == 12
    assert record["wer"] == min(wer for *_, wer in record["tried"]) < record["wer_greedy"]
    assert [record["weight"], record["word_score"], record["wer"]] in record["tried"]
    assert metrics["lm"] == {name: record[name] for name in ("name", "weight", "word_score", "beam")}
    assert f"--lm_weight {record['weight']:g} --lm_word_score {record['word_score']:g}: dev WER" in out
    again, _ = evaluate(
        "--lm", arpa, "--lm_beam", "4", *few, "--lm_weight", record["weight"], "--lm_word_score", record["word_score"]
    )
    assert load_json(again / "metrics.json")["baseline_lm"] == metrics["baseline_lm"]


@pytest.mark.slow
def test_a_run_scores_both_models_with_it_and_keeps_the_baselines_texts(demo, arpa, run, tmp_path):
    flags = f"""--model {demo.final} --dataset {CORPUS} --data_dir {demo.audio} --output_dir {tmp_path / "out"}
        --max_train_samples 8 --max_eval_samples 2 --max_test_samples 6 --eval_steps 1 --save_steps 1
        --gradient_accumulation_steps 1 --warmup_steps 0 --dataloader_num_workers 0 --max_steps""".split()
    results = tmp_path / "out/results"
    status, out, err = run(*flags, 1)
    assert status == 0 and "LM" not in out, err
    plain = load_json(results / "metrics.json")
    assert not {"lm", "baseline_lm"} & set(plain)
    status, out, err = run(*flags, 1, "--lm", arpa)
    assert status == 0, err
    metrics, (row, *_) = load_json(results / "metrics.json"), load_predictions(results)
    assert (metrics["baseline"], metrics["finetuned"]) == (plain["baseline"], plain["finetuned"]), "nothing is trained"
    assert metrics["baseline_lm"]["wer"] < metrics["baseline"]["wer"]
    assert metrics["finetuned_lm"]["words"] == metrics["finetuned"]["words"]
    before, after = metrics["baseline_lm"]["wer"], metrics["finetuned_lm"]["wer"]
    assert metrics["delta_lm"]["wer"] == pytest.approx(after - before) and metrics["delta_lm"]["wer_ci95"]
    assert {"pred_text", "baseline_text", "pred_text_lm", "baseline_text_lm"} <= set(row)
    for column in ("before, LM", "fine-tuned, LM", "WER, LM"):
        assert column in out and column in (results / "report.md").read_text()
    card = (tmp_path / "out/final/README.md").read_text()
    assert "--lm tokens.arpa --lm_weight 0.5 --lm_word_score 1.5 --lm_beam 8" in card and str(tmp_path) not in card
    assert tensorboard_tags(tmp_path / "out/runs") >= {"test_baseline_lm/wer", "test_finetuned_lm/cer"}
    kept = load_json(tmp_path / "out/run.json")
    assert kept["baseline_lm"]["texts"].keys() == kept["baseline"].keys()
    # Its texts come from run.json: these words are in no other place.
    kept["baseline_lm"]["texts"] = dict.fromkeys(kept["baseline"], "from the first start")
    (tmp_path / "out/run.json").write_text(json.dumps(kept))
    status, out, err = run(*flags, 2, "--lm", arpa)
    assert status == 0 and "as it is on the test split" not in out, err
    assert {row["baseline_text_lm"] for row in load_predictions(results)} == {"from the first start"}
    status, out, err = run(*flags, 2, "--lm", arpa)
    assert status == 0 and "holds this run, finished" in out and "fine-tuned, LM" in out, err
    status, out, err = run(*flags, 2, "--lm", arpa, "--lm_weight", "0.4")
    assert status == 0 and "as it is on the test split" in out, err
    assert load_json(results / "metrics.json")["lm"]["weight"] == 0.4


def tensorboard_tags(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return set(accumulator.Tags()["scalars"])


@pytest.mark.slow
def test_two_processes_write_what_one_writes(demo, arpa, evaluate, tmp_path):
    one = load_predictions(evaluate("--lm", arpa, "--max_test_samples", "9")[0])
    flags = f"--eval_only --model {demo.final} --dataset {CORPUS} --data_dir {demo.audio} --output_dir two --lm {arpa}"
    more = "--max_test_samples 9 --use_cpu true --ddp_backend gloo --disable_tqdm true".split()
    done = run_script(*flags.split(), *more, cwd=tmp_path, launcher=TWO_PROCESSES)
    assert done.returncode == 0, done.stderr
    assert load_predictions(tmp_path / "two/results") == one


def test_a_path_is_the_same_kind_of_thing_with_and_without(arpa, tmp_path):
    args, _ = parse(tmp_path, "--lm", arpa)
    lm = script.load_lm(args, small_processor(), 172)
    emissions = script.Emissions(np.array([[10, 0], [10, 0], [0, 10]]), np.log([[0.9, 0.1]] * 3).astype(np.float32))
    assert script.best_path(emissions) == script.best_path(emissions, lm) == [10, 10, 0]
    assert script.clip_text(small_processor(), emissions, lm) == "a"
