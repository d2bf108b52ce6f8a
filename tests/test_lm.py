"""Decoding with a language model of tokens: the search, what is refused, what a run makes of it."""

import gzip
import itertools
import json
import math
import shutil
import sys
import tracemalloc

import jiwer
import numpy as np
import pytest
from conftest import CORPUS, MODEL, SCRIPT, load_json, refused, run_script, scored_clips, succeeded, tensorboard
from helpers import run_main, write_wav
from loopback_hub import HUB_MODEL, LoopbackHub
from make_lm import estimate, make_lm, write_arpa
from small_model import processor

from finetune_medasr import Emissions, LanguageModel, beam_search, normalize_wer

LETTERS = "abc"  # ids 1, 2, 3; 0 is the blank, 4 a special token
SENTENCES = [list(text) for text in ("abab", "abc", "ca", "bbc", "aab", "cabb")]


def log_probability(text, probabilities, back_off):
    """The natural logarithm of a text's probability by the definition of a back-off trigram."""

    def probability(word, context):
        found = probabilities.get((*context, word))
        return found or back_off.get(context, 1) * probability(word, context[1:])

    words = ["<s>", *text, "</s>"]
    return sum(math.log(probability(word, tuple(words[max(0, at - 2) : at]))) for at, word in enumerate(words) if at)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """(the n-gram of SENTENCES as (probabilities, back-off weights), the exact search's LanguageModel of it)."""
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    path, ngram = str(tmp_path_factory.mktemp("letters") / "letters.arpa"), estimate(SENTENCES, LETTERS, 3)
    write_arpa(path, *ngram)
    kenlm, names = KenLM(path, Dictionary(["<unk>", *LETTERS])), [0, 1, 2, 3, 0]
    return ngram, LanguageModel("letters", kenlm, names, np.array(names), 0, 1.0, 0.0, 10_000, -math.inf, math.inf)


def random_emissions(frames, seed, sharpness=1.5):
    logits = np.random.default_rng(seed).normal(size=(frames, 5)) * sharpness
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-log_probs, axis=1)
    return log_probs, Emissions(ids.astype(np.int32), np.take_along_axis(log_probs, ids, 1).astype(np.float32))


def collapsed(path):
    """The text of an alignment: repeats once, then no blanks and special tokens."""
    return "".join(LETTERS[id - 1] for id, _ in itertools.groupby(0 if id == 4 else id for id in path) if id)


@pytest.mark.parametrize("weight, word_score", [(0, 0), (1, 0), (0.5, 1.5), (2, -1), (0.3, 3)])
def test_the_search_finds_the_best_of_all_texts(letters, weight, word_score):
    ngram, lm = letters
    lm = lm._replace(weight=weight, word_score=word_score)
    for seed in range(6):
        (log_probs, emissions), sums = random_emissions(5, seed), {}
        for path in itertools.product(range(5), repeat=5):  # every alignment there is
            text = collapsed(path)
            sums[text] = sums.get(text, 0) + math.exp(sum(log_probs[frame, id] for frame, id in enumerate(path)))
        scores = {}
        for text, total in sums.items():
            scores[text] = math.log(total) + weight * log_probability(text, *ngram) + word_score * len(text)
        path, score = beam_search(emissions, lm)
        assert len(path) == 5 and collapsed(path) == max(scores, key=scores.get)
        assert score == pytest.approx(max(scores.values()), abs=1e-3)


def test_a_double_letter_needs_a_blank_and_special_tokens_and_silence_are_not_written(letters):
    lm = letters[1]._replace(word_score=2.0, min_log_prob=-5.0)
    emissions = Emissions(np.array([[1, 0], [1, 0], [0, 1], [1, 0], [2, 0]]), np.log([[0.9, 0.1]] * 5))
    assert beam_search(emissions, letters[1]._replace(weight=0.0))[0] == [1, 1, 0, 1, 2]
    emissions = Emissions(np.array([[1, 0], [4, 2], [4, 0]]), np.log([[0.99, 0.01], [0.95, 0.05], [0.99, 0.01]]))
    assert 4 not in beam_search(emissions, lm)[0]
    assert beam_search(Emissions(np.array([[4, 2], [4, 2]]), np.log([[0.999, 0.001]] * 2)), lm)[0] == [0, 0]
    assert beam_search(Emissions(np.zeros((0, 5), np.int32), np.zeros((0, 5), np.float32)), lm)[0] == []


def test_memory_does_not_grow_with_the_texts_that_a_search_has_left(letters):
    lm = letters[1]._replace(beam=8, min_log_prob=-5.0, max_behind=10.0)
    emissions = random_emissions(4000, 1, sharpness=4)[1]
    tracemalloc.start()
    try:
        beam_search(emissions, lm)
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def arpa(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm") / "tokens.arpa"
    make_lm(path)
    return path


@pytest.fixture
def transcribe(demo, known_clip, tmp_path):
    """transcribe(--lm's value, flag, ...) -> the program's run on a clip with the demo's model."""
    write_wav(tmp_path / "clip.wav", known_clip[0])
    return lambda lm, *flags: run_main(tmp_path, "--transcribe", "clip.wav", "--model", demo.final, "--lm", lm, *flags)


def evaluation(demo, *flags):
    """The command line that scores the demo's model on the test clips."""
    return ["--eval_only", "--model", demo.final, "--dataset", CORPUS, "--data_dir", demo.audio, *flags]


def test_the_language_model_lowers_the_wer_of_speakers_never_trained_on(demo, arpa, tmp_path):
    out = succeeded(run_main(tmp_path, *evaluation(demo, "--lm", arpa, "--output_dir", "out"))).stdout
    metrics, predictions = load_json(tmp_path / "out/results/metrics.json"), scored_clips(tmp_path / "out/results")
    assert metrics["baseline"] == demo.metrics["finetuned"] | {"groups": metrics["baseline"]["groups"]}
    assert metrics["baseline_lm"]["wer"] < 0.6 * metrics["baseline"]["wer"]
    assert metrics["baseline_lm"]["groups"].keys() == metrics["baseline"]["groups"].keys()
    assert metrics["lm"].items() >= {"name": "tokens.arpa", "weight": 0.5, "word_score": 1.5, "beam": 8}.items()
    assert set(metrics) == set(demo.metrics) | {"baseline_lm", "finetuned_lm", "delta_lm", "lm"}
    assert [row["pred_text"] for row in predictions] == [row["pred_text"] for row in demo.predictions]
    texts = [[normalize_wer(row[key]) for row in predictions] for key in ("text", "pred_text_lm")]
    assert jiwer.wer(*texts) == pytest.approx(metrics["baseline_lm"]["wer"]), "of these texts"
    report, rate = (tmp_path / "out/results/report.md").read_text(), f"{100 * metrics['baseline_lm']['wer']:.1f} %"
    assert rate in report and rate in out and "before, LM" in report and "tokens.arpa" in report


def test_pieces_may_have_number_signs_and_files_be_packed_or_beside_the_model(arpa, transcribe, demo, tmp_path):
    """As in MedASR's own file and repository."""
    make_lm(tmp_path / "signs.arpa", spell=lambda piece: piece.replace("\u2581", "#"))
    (tmp_path / "packed.arpa.gz").write_bytes(gzip.compress((tmp_path / "signs.arpa").read_bytes()))
    model = shutil.copytree(demo.final, tmp_path / "model")
    shutil.copy(arpa, model / "lm_6.kenlm")
    found = [succeeded(transcribe(path)) for path in (arpa, "signs.arpa", "packed.arpa.gz")]
    found.append(succeeded(transcribe("auto", "--model", model)))
    ((text, is_warned),) = {(done.stdout, "warning" in done.stderr) for done in found}
    assert text.strip() and not is_warned
    short = transcribe("auto", "--model", model, "--lm_weight", "20", "--lm_word_score", "-20").stdout
    assert len(short) < len(text), "weights that want short texts"


def test_auto_is_asked_of_the_hub(arpa, known_clip, tmp_path):
    """From MedASR's repository for a folder without the file; from its own for another model of the Hub."""
    with_lm = shutil.copytree(MODEL, tmp_path / "with_lm")
    shutil.copy(arpa, with_lm / "lm_6.kenlm")
    write_wav(tmp_path / "clip.wav", known_clip[0])
    command = ["--transcribe", "clip.wav", "--use_cpu", "true", "--lm", "auto", "--model"]
    starts = f"import finetune_medasr as script\nfor model in {str(MODEL)!r}, 'clinic/other':"
    with LoopbackHub({HUB_MODEL: with_lm, "clinic/other": MODEL}, {}) as hub:
        env = {**hub.env(tmp_path), "PYTHONPATH": str(SCRIPT.parent)}
        code = f"{starts} print(script.main([*{command}, model]))"
        done = run_script(code, script="-c", cwd=tmp_path, env=env)
    assert [line for line in done.stdout.splitlines() if line.isdigit()] == ["0", "1"], done.stderr
    message = [line for line in done.stderr.splitlines() if " error: " in line][-1]
    assert all(part in message for part in ("--lm auto", "lm_6.kenlm", "clinic/other", "give --lm a file")), message


def test_a_file_that_is_no_model_of_tokens_is_refused(transcribe, arpa, tmp_path):
    pieces = processor().tokenizer.convert_ids_to_tokens(range(4, 172))
    content, letters = arpa.read_bytes(), [piece for piece in pieces if len(piece.strip("\u2581")) == 1]
    words_arpa = lambda path, words: write_arpa(path, *estimate([words], words, 2))  # noqa: E731
    for number, (bad, message) in enumerate({
        b"": "cannot be loaded",
        b"the patient has malaria\n" * 100: "cannot be loaded",
        bytes(range(256)) * 300: "cannot be loaded",
        content[:3000]: "cannot be loaded.*End of file",
        content.replace(b"\\2-grams:", b"\\7-grams:"): "cannot be loaded",
        b"mmap lm http://kheafield.com/code format version 5\n\0" + bytes(40): "cannot be loaded",
        gzip.compress(content)[:500]: "cannot be loaded.*zlib",
        ("the", "patient", *letters): "knows .* of the model's 168 tokens.*not of words",
        ("with", *(piece.strip("\u2581") for piece in pieces[1:])): "knows .* of the model's 168 tokens.*not of words",
        (*"abcdefghij", "##ing", "##ed"): "knows 10 of the model's 168 tokens",
    }.items()):  # fmt: skip
        path = tmp_path / f"{number}.lm"
        path.write_bytes(bad) if isinstance(bad, bytes) else words_arpa(path, list(dict.fromkeys(bad)))
        done = transcribe(path, "--model", MODEL)
        assert refused(done, 1, message) and done.stdout == ""


def test_without_its_package_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashlight", None)
    refused(run_main(tmp_path, "--eval_only", "--lm", "auto"), 2, "pip install flashlight-text")


def test_tuning_takes_the_best_weights_on_dev_and_says_what_it_tried(demo, arpa, tmp_path):
    few = ["--lm_beam", "4", "--max_eval_samples", "12", "--max_test_samples", "4", "--output_dir", "out"]
    out = succeeded(run_main(tmp_path, *evaluation(demo, "--lm", arpa, "--tune_lm", *few))).stdout
    record, metrics = (load_json(tmp_path / "out/results" / name) for name in ("lm.json", "metrics.json"))
    assert record["clips"] == metrics["data"]["dev"]["clips"] == 12
    best = min((wer, weight, word_score) for weight, word_score, wer in record["tried"])
    assert (record["wer"], record["weight"], record["word_score"]) == best and best[0] < record["wer_greedy"]
    assert len({wer for *_, wer in record["tried"]}) > 3
    assert all(metrics["lm"][name] == record[name] for name in ("name", "weight", "word_score", "beam"))
    assert f"--lm_weight {record['weight']:g} --lm_word_score {record['word_score']:g}: dev WER" in out


def test_a_run_scores_both_models_with_it_and_keeps_the_baselines_texts(demo, arpa, tmp_path):
    flags = f"""--model {demo.final} --dataset {CORPUS} --data_dir {demo.audio} --output_dir out --lm {arpa}
        --max_train_samples 8 --max_eval_samples 2 --max_test_samples 6 --eval_steps 1 --save_steps 1
        --gradient_accumulation_steps 1 --warmup_steps 0 --dataloader_num_workers 0 --max_steps""".split()
    results, first = tmp_path / "out/results", "as it is on the test split"
    out = succeeded(run_main(tmp_path, *flags, 1)).stdout
    assert first in out
    metrics, (row, *_) = load_json(results / "metrics.json"), scored_clips(results)
    assert metrics["baseline_lm"]["wer"] < metrics["baseline"]["wer"]
    assert metrics["finetuned_lm"]["words"] == metrics["finetuned"]["words"]
    before, after = metrics["baseline_lm"]["wer"], metrics["finetuned_lm"]["wer"]
    assert metrics["delta_lm"]["wer"] == pytest.approx(after - before) and metrics["delta_lm"]["wer_ci95"]
    assert {"pred_text", "baseline_text", "pred_text_lm", "baseline_text_lm"} <= set(row)
    for column in ("before, LM", "fine-tuned, LM", "WER, LM"):
        assert column in out and column in (results / "report.md").read_text()
    card = (tmp_path / "out/final/README.md").read_text()
    assert "--lm tokens.arpa --lm_weight 0.5 --lm_word_score 1.5 --lm_beam 8" in card and str(tmp_path) not in card
    tags = tensorboard(tmp_path / "out/runs").Tags()["scalars"]
    assert {"test_baseline_lm/wer", "test_finetuned_lm/cer"} <= set(tags)
    # What the next start shows for the baseline comes from run.json: these words are in no other place.
    kept = load_json(tmp_path / "out/run.json")
    texts = kept["baseline"]["texts"]["test"]
    texts["baseline_lm"] = ["from the first start"] * len(texts["baseline"])
    (tmp_path / "out/run.json").write_text(json.dumps(kept))
    assert first not in succeeded(run_main(tmp_path, *flags, 2)).stdout
    assert {row["baseline_text_lm"] for row in scored_clips(results)} == {"from the first start"}
    assert first in succeeded(run_main(tmp_path, *flags, 2, "--lm_weight", "0.4")).stdout
    assert load_json(results / "metrics.json")["lm"]["weight"] == 0.4
    assert {row["baseline_text_lm"] for row in scored_clips(results)} != {"from the first start"}


def test_two_processes_write_what_one_writes(demo, arpa, run_two, tmp_path):
    (tmp_path / "in").mkdir()
    for number, row in enumerate(demo.predictions[:4]):
        write_wav(tmp_path / f"in/{number}.wav", row["audio_filepath"])
    flags, two = ["--lm", arpa, "--per_device_eval_batch_size", 1], ["--use_cpu", "true", "--ddp_backend", "gloo"]
    transcribe = ["--transcribe", "in", "--model", demo.final, *flags]
    score = evaluation(demo, "--max_test_samples", 9, *flags, "--output_dir")
    for command in ((*score, "two"), transcribe):
        first, second = run_two(*command, *two, cwd=tmp_path)
        assert succeeded(first) and succeeded(second)
    succeeded(run_main(tmp_path, *score, "one"))
    assert run_main(tmp_path, *transcribe).stdout == first.stdout != second.stdout == ""
    one, both = (scored_clips(tmp_path / name / "results") for name in ("one", "two"))
    assert one == both and len(one) == 9
