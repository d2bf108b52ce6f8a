"""--transcribe: what it finds, what it writes, and when each word was said."""

import difflib
import io
import json
import re
import shutil
import struct
import subprocess
import sys

import jiwer
import numpy as np
import pytest
import soundfile
from conftest import SCRIPT, TWO_PROCESSES, corpus_audio, error_line, run_script
from helpers import RATE, parse, random_model, small_processor

import finetune_medasr as script
from finetune_medasr import Word, decode_ids, format_dictation, main, segments, transcript

SPEED = r"[\d,.]+ s of audio in [\d,.]+ s, [\d,.]+ times as fast as it was spoken; loading took [\d.]+ s"


@pytest.fixture
def transcribe(demo, tmp_path, monkeypatch, capfd):
    """transcribe(argument, ...) -> (exit status, stdout, lines of stderr) of the demo's model, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def transcribe(*arguments):
        capfd.readouterr()
        status = main(["--transcribe", *map(str, arguments), "--model", str(demo.final), "--use_cpu", "true"])
        out, errors = capfd.readouterr()
        return status, out, errors.splitlines()

    return transcribe


@pytest.fixture(scope="module")
def spoken(demo):
    """[(samples, text by the demo's model)] of the test clips that it writes down in three words and more."""
    audio = corpus_audio("test")
    rows = [row for row in demo.predictions if len(row["pred_text"].split()) >= 3]
    clips = [
        (*soundfile.read(io.BytesIO(audio[row["audio_filepath"]]), dtype="float32"), row["pred_text"]) for row in rows
    ]
    return [(samples, text) for samples, rate, text in clips if rate == RATE and samples.ndim == 1]


@pytest.fixture(scope="module")
def recording(spoken, tmp_path_factory):
    """(path, [(seconds where a clip begins, its end, its text)]) of minutes of clips with silence between them."""
    parts, places, length = [], [], 0
    for samples, text in spoken * 2:
        places.append((length / RATE, (length + len(samples)) / RATE, text))
        parts += [samples, np.zeros(RATE * 3 // 2, np.float32)]
        length += len(samples) + RATE * 3 // 2
    path = tmp_path_factory.mktemp("recording") / "ward round.flac"
    soundfile.write(path, np.concatenate(parts), RATE)
    return path, places


def words_of(content):
    return [word for segment in content["segments"] for word in segment["words"]]


# ---------------------------------------------------------------- what is found


def test_folders_patterns_and_files_are_found_once_and_in_order(transcribe, spoken, tmp_path):
    (tmp_path / "in/b").mkdir(parents=True)
    for name, (samples, _) in zip(("z.wav", "in/b/one.flac", "in/two.OGG", "in/.hidden.wav"), spoken):
        soundfile.write(tmp_path / name, samples, RATE, format=name.split(".")[-1].upper())
    (tmp_path / "in/notes.txt").write_text("not audio")
    texts = [text for _, text in spoken[:3]]
    status, out, errors = transcribe("z.wav", "in", "in/*/*.flac")
    expected = [f"z.wav\t{texts[0]}", f"in/b/one.flac\t{texts[1]}", f"in/two.OGG\t{texts[2]}"]
    assert status == 0 and out.splitlines()[:2] == expected[:2]
    assert out.splitlines()[2].startswith("in/two.OGG\t") and len(out.splitlines()) == 3  # Ogg Vorbis is lossy
    assert len(errors) == 1 and re.fullmatch(SPEED, errors[0])
    assert transcribe("in/**/*.flac")[1] == expected[1] + "\n", "a pattern can stand for many: the name is there"
    assert transcribe("in/b/one.flac")[1] == texts[1] + "\n", "a single file is its bare text"


@pytest.mark.parametrize("rate, channels, kind", [(48_000, 2, "WAV"), (44_100, 1, "FLAC"), (16_000, 3, "CAF")])
def test_any_rate_and_channels_are_read(transcribe, spoken, tmp_path, rate, channels, kind):
    import librosa

    samples, text = spoken[0]
    samples = librosa.resample(samples, orig_sr=RATE, target_sr=rate) if rate != RATE else samples
    soundfile.write(tmp_path / "visit", np.stack([samples] * channels, axis=1), rate, format=kind)
    status, out, _ = transcribe("visit")
    assert status == 0 and difflib.SequenceMatcher(None, text, out.strip()).ratio() > 0.8


@pytest.mark.slow
def test_standard_input_is_read_and_the_pipe_stays_clean(demo, spoken, tmp_path):
    soundfile.write(tmp_path / "visit.wav", spoken[0][0], RATE)
    command = [sys.executable, str(SCRIPT), "--transcribe", "-", "--model", str(demo.final)]
    given = (tmp_path / "visit.wav").read_bytes()
    done = subprocess.run(command, input=given, capture_output=True, cwd=tmp_path, timeout=300)
    assert (done.returncode, done.stdout.decode()) == (0, spoken[0][1] + "\n")
    assert re.fullmatch(SPEED, done.stderr.decode().strip())
    done = subprocess.run(command, input=b"", capture_output=True, cwd=tmp_path, timeout=300)
    assert (done.returncode, done.stdout) == (1, b"")
    assert "- cannot be read as audio: ValueError: nothing came" in error_line(done.stderr.decode())


def test_a_broken_file_is_named_and_the_others_are_done(transcribe, spoken, tmp_path):
    soundfile.write(tmp_path / "first.wav", spoken[0][0], RATE)
    (tmp_path / "broken.wav").write_bytes(b"RIFF, but nothing else")
    (tmp_path / "empty.wav").touch()
    soundfile.write(tmp_path / "last.wav", spoken[1][0], RATE)
    before = set(tmp_path.iterdir())
    status, out, errors = transcribe("first.wav", "broken.wav", "empty.wav", "last.wav")
    assert status == 1 and out.splitlines() == [f"first.wav\t{spoken[0][1]}", f"last.wav\t{spoken[1][1]}"]
    assert [line.split(": ")[2].split()[0] for line in errors[:2]] == ["broken.wav", "empty.wav"]
    assert len(errors) == 3 and set(tmp_path.iterdir()) == before


def test_a_recording_shorter_than_its_header_says_is_done_to_its_end(transcribe, recording, spoken, tmp_path):
    samples, text = spoken[0]
    soundfile.write(tmp_path / "whole.wav", samples, RATE)
    content = (tmp_path / "whole.wav").read_bytes()
    at = content.index(b"data") + 4
    lying = content[:at] + struct.pack("<I", len(content) * 10) + content[at + 4 :]
    (tmp_path / "lying.wav").write_bytes(lying)
    assert transcribe("lying.wav")[:2] == (0, text + "\n")
    whole = recording[0].read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    status, out, errors = transcribe("cut.flac")
    assert status == 0 and len(out.split()) > 20
    assert re.search(r"cut.flac ends after [\d.]+ s, [\d.]+ s before what its header says", errors[0])


def test_the_last_run_s_model_is_the_default(demo, spoken, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    soundfile.write("visit.wav", spoken[0][0], RATE)
    shutil.copytree(demo.final, "medasr-afrispeech-200/final")
    assert main(["--transcribe", "visit.wav", "--use_cpu", "true"]) == 0
    out, errors = capfd.readouterr()
    assert out == spoken[0][1] + "\n" and "transcribing with medasr-afrispeech-200/final" in errors


@pytest.mark.slow
def test_of_several_processes_the_first_writes(demo, spoken, tmp_path):
    for number, (samples, _) in enumerate(spoken[:5]):
        soundfile.write(tmp_path / f"{number}.wav", samples, RATE)
    flags = ["--model", demo.final, "--use_cpu", "true", "--ddp_backend", "gloo", "--per_device_eval_batch_size", "1"]
    done = run_script("--transcribe", tmp_path, *flags, cwd=tmp_path, launcher=TWO_PROCESSES)
    assert done.returncode == 0, done.stderr
    assert [line.split("\t")[1] for line in done.stdout.splitlines()] == [text for _, text in spoken[:5]]


# ---------------------------------------------------------------- long audio and times


def test_no_word_of_a_long_recording_is_lost_or_doubled_at_a_seam(transcribe, recording):
    """The small model hears a clip among others less well than alone; where two windows meet it hears it no worse."""
    path, places = recording
    status, out, _ = transcribe(path, "--transcript_format", "json")
    words = words_of(json.loads(out))
    seams = np.arange(18, places[-1][1], 16)  # the middles of the overlaps of windows of 20 s that begin every 16 s
    texts = {True: ([], []), False: ([], [])}
    for start, end, text in places:
        across = bool(((start < seams) & (seams < end)).any())
        heard = [word["word"] for word in words if start - 0.1 < word["start"] < end + 0.1]
        for kind, side in zip(texts[across], (text, " ".join(heard))):
            kind.append(side)
    scores = {across: jiwer.process_words(*sides) for across, sides in texts.items()}
    assert status == 0 and len(texts[True][0]) > 30
    assert scores[True].wer < scores[False].wer + 0.05
    assert scores[True].insertions < 0.05 * (scores[True].hits + scores[True].substitutions)


def test_words_have_the_times_at_which_they_are_said(transcribe, recording):
    path, places = recording
    status, out, _ = transcribe(path, "--transcript_format", "json")
    content = json.loads(out)
    words = words_of(content)
    assert status == 0 and list(content) == ["text", "segments", "language"]
    assert " ".join(word["word"] for word in words) == content["text"] == transcribe(path)[1].strip()
    assert all(0 < word["probability"] <= 1 and word["start"] < word["end"] for word in words)
    assert all(before["end"] <= after["start"] for before, after in zip(words, words[1:]))
    inside = [word for word in words if any(start - 0.1 < word["start"] < end for start, end, _ in places)]
    assert len(inside) > 0.99 * len(words), "words are heard in the clips, not in the silence between them"
    first = [[word["start"] - start for word in words if start - 0.1 < word["start"] < end] for start, end, _ in places]
    assert np.median([times[0] for times in first if times]) < 0.08, "each clip begins with speech"
    for segment in content["segments"]:
        assert segment["text"] == " ".join(word["word"] for word in segment["words"])
        assert (segment["start"], segment["end"]) == (segment["words"][0]["start"], segment["words"][-1]["end"])


def seconds(timestamp):
    hours, minutes, rest = timestamp.replace(",", ".").split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)


@pytest.mark.parametrize("kind, mark", [("srt", ","), ("vtt", ".")])
def test_subtitles_break_between_words_and_follow_each_other(transcribe, recording, kind, mark):
    path, places = recording
    status, out, _ = transcribe(path, "--transcript_format", kind)
    blocks = out.strip().split("\n\n")
    if kind == "vtt":
        assert blocks.pop(0) == "WEBVTT"
    else:
        assert [block.split("\n")[0] for block in blocks] == [str(number + 1) for number in range(len(blocks))]
        blocks = [block.split("\n", 1)[1] for block in blocks]
    cues = [block.split("\n") for block in blocks]
    times = [re.fullmatch(rf"(\d\d:\d\d:\d\d\{mark}\d\d\d) --> (\d\d:\d\d:\d\d\{mark}\d\d\d)", cue[0]) for cue in cues]
    spans = [(seconds(match[1]), seconds(match[2])) for match in times]
    assert status == 0 and all(start < end for start, end in spans)
    assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:]))
    assert all(1 <= len(cue) - 1 <= 2 and max(map(len, cue[1:])) <= 42 for cue in cues)
    assert " ".join(line for cue in cues for line in cue[1:]).split() == transcribe(path)[1].split()
    words = words_of(json.loads(transcribe(path, "--transcript_format", "json")[1]))
    for before, after in zip(words, words[1:]):
        if after["start"] - before["end"] > 1.01:
            across = [start < before["end"] and after["start"] < end for start, end in spans]
            assert not any(across), "a pause of a second parts subtitles"


def test_words_of_any_path_of_ids_join_to_its_text():
    processor, generator = small_processor(), np.random.default_rng(0)
    for _ in range(200):
        path = np.repeat(generator.integers(0, 60, 30), generator.integers(1, 4, 30)).tolist()
        emissions = script.Emissions(np.array(path)[:, None], np.zeros((len(path), 1)))
        words = script.clip_words(processor, emissions, path, 0.0, 0.04)
        assert " ".join(word.text for word in words) == decode_ids(processor, path)


# ---------------------------------------------------------------- dictated punctuation


def said(text, seconds_apart=0.2):
    return [Word(word, place, place + 0.1, 0.5) for place, word in enumerate(text.split())]


@pytest.mark.parametrize(
    "written, formatted",
    [
        ("Chest is clear {period} No fever {comma} no cough {period}", "Chest is clear. No fever, no cough."),
        (
            "{new paragraph} Findings {colon} normal {new paragraph} Plan {new line} rest",
            "Findings: normal\n\nPlan\nrest",
        ),
        ("pain {question mark} no {period} {period}", "pain? no."),
        ("seen {open parenthesis} left {close parenthesis} today", "seen (left) today"),
        ("follow {hyphen} up in 5{period}Then stop", "follow-up in 5. Then stop"),
        ("{unknown token} stays and so do {braces", "{unknown token} stays and so do {braces"),
        ("", ""),
    ],
)
def test_dictated_punctuation_is_written_as_such(written, formatted):
    assert transcript(format_dictation(said(written)), "text") == formatted + "\n"


def test_dictated_punctuation_is_left_alone_unless_asked_for():
    words = said("No fever {period} {new paragraph} Rest")
    assert transcript(words, "text") == "No fever {period} {new paragraph} Rest\n"
    shown = json.loads(transcript(format_dictation(words), "json"))
    assert [segment["text"] for segment in shown["segments"]] == ["No fever.", "Rest"]
    assert "No fever.\n" in transcript(format_dictation(words), "srt")


def test_a_subtitle_is_never_broken_inside_a_word():
    words = said("pneumonoultramicroscopicsilicovolcanoconiosis-and-more was ruled out " * 3)
    assert all(len(part) for part in segments(words))
    assert [word for part in segments(words) for word in part] == words
    lines = transcript(words, "vtt").split("\n")
    assert lines.count("pneumonoultramicroscopicsilicovolcanoconiosis-and-more") == 3


# ---------------------------------------------------------------- files of their own


def test_each_recording_gets_a_file_of_its_own(transcribe, spoken, tmp_path):
    for name, (samples, _) in zip(("in/monday/visit.wav", "in/tuesday/visit.wav", "in/tuesday/visit.flac"), spoken):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / name, samples, RATE)
    status, out, _ = transcribe("in", "--transcript_dir", "out/texts")
    found = {path.relative_to(tmp_path / "out/texts").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert (status, out) == (0, "")
    assert found == {"monday/visit.txt", "tuesday/visit.wav.txt", "tuesday/visit.flac.txt"}
    assert (tmp_path / "out/texts/monday/visit.txt").read_text() == spoken[0][1] + "\n"
    status, out, _ = transcribe("in/monday/visit.wav", "--transcript_dir", "out", "--transcript_format", "srt")
    assert status == 0 and (tmp_path / "out/visit.srt").read_text().startswith("1\n00:00:00,")


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["nowhere.wav"], 2, "--transcribe is nowhere.wav: there is no such file or folder"),
        (["*.wav"], 2, r"--transcribe is \*.wav: there is no such file or folder"),
        (["texts"], 2, "--transcribe is texts: no audio file is in this folder"),
        (["visit.flac", "--transcript_format", "docx"], 2, "docx.*text.*json.*srt.*vtt"),
        (
            ["visit.flac", "texts/visit.flac", "--transcript_format", "srt"],
            2,
            "srt of several files needs --transcript_dir",
        ),
        (["a/visit.flac", "b/visit.flac", "--transcript_dir", "out"], 2, "a/visit.flac and b/visit.flac would both be"),
        (["visit.flac", "--transcript_dir", "texts/notes.md"], 2, "--transcript_dir is .*notes.md is a file"),
        (["visit.flac", "--transcript_dir", ""], 2, "--transcript_dir is empty"),
        (["visit.flac", "--transcript_dir", "/proc/texts"], (1, 2), "/proc.*cannot be written"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(transcribe, spoken, tmp_path, arguments, status, message):
    for folder in ("texts", "a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "texts/notes.md").write_text("no audio")
    for name in ("visit.flac", "a/visit.flac", "b/visit.flac"):
        soundfile.write(tmp_path / name, spoken[0][0], RATE)
    if "texts/visit.flac" in arguments:
        soundfile.write(tmp_path / "texts/visit.flac", spoken[1][0], RATE)
    found, out, errors = transcribe(*arguments)
    assert found in (status if isinstance(status, tuple) else (status,)) and out == ""
    assert re.search(message, error_line("\n".join(errors))), errors


@pytest.mark.parametrize("flags", [["--transcript_format", "srt"], ["--transcript_dir", "x"], ["--format_dictation"]])
def test_flags_of_transcripts_need_transcribe(flags, capfd):
    assert main(flags) == 2
    assert f"{flags[0]} is of use with --transcribe only" in error_line(capfd.readouterr().err)


# ---------------------------------------------------------------- half precision


def test_bfloat16_is_for_the_model_alone(tmp_path):
    """As on a GPU: matrices in bfloat16, log-mels and what comes out in float32."""
    import torch

    _, training = parse(tmp_path)
    model, processor = random_model(), small_processor()
    batch = script.CTCCollator(processor.feature_extractor)(
        [{"samples": np.random.default_rng(0).normal(size=RATE).astype("f4")}]
    )
    inputs = script.model_inputs(batch, processor.feature_extractor, "cpu")
    kinds = []
    model.eval().get_submodule("encoder.layers.0").register_forward_hook(lambda *_: kinds.append("layer"))
    linear = next(module for module in model.encoder.layers.modules() if isinstance(module, torch.nn.Linear))
    linear.register_forward_hook(lambda module, given, output: kinds.append(output.dtype))
    with torch.inference_mode():
        exact = model(**inputs).logits.log_softmax(-1)
        script.use_bfloat16(model, training)
        near = model(**inputs).logits.float().log_softmax(-1)
    assert inputs["input_features"].dtype == torch.float32
    assert torch.float32 in kinds and torch.bfloat16 in kinds
    assert 0 < (near - exact).abs().max() < 0.5
