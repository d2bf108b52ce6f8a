"""--transcribe: what it finds, what it writes, and when each word was said."""

import json
import re
import struct
import subprocess
import sys

import jiwer
import numpy as np
import pytest
import torch
from conftest import MODEL, SCRIPT, corpus_audio, refused, succeeded
from helpers import RATE, heard, noise, run_main, sound, write
from small_model import frames_of, label_encoder

import finetune_medasr as script

SPEED = r"[\d,.]+ s of audio in [\d,.]+ s, [\d,.]+ times as fast as it was spoken; loading took [\d.]+ s"


@pytest.fixture(scope="module")
def spoken(demo):
    """[(samples, text by the demo's model)] of the test clips that it writes down in three words and more."""
    audio, rows = corpus_audio("test"), [row for row in demo.predictions if len(row["pred_text"].split()) >= 3]
    return [(heard(audio[row["audio_filepath"]]), row["pred_text"]) for row in rows]


def record(path, samples):
    write(path, sound(samples, format=path.suffix[1:].upper(), subtype=None))


def test_folders_patterns_and_files_are_found_once_and_in_order(demo, spoken, tmp_path):
    for name, (samples, _) in zip(("z.wav", "in/b/one.flac", "in/two.OGG", "in/.hidden.wav"), spoken):
        record(tmp_path / name, samples)
    (tmp_path / "in/notes.txt").write_text("not audio")
    texts, model = [text for _, text in spoken[:3]], ["--model", demo.final]
    done = succeeded(run_main(tmp_path, "--transcribe", "z.wav", "in", "in/*/*.flac", *model))
    *expected, ogg = done.stdout.splitlines()
    assert expected == [f"z.wav\t{texts[0]}", f"in/b/one.flac\t{texts[1]}"]
    assert ogg.startswith("in/two.OGG\t") and re.fullmatch(SPEED, done.stderr.strip())  # Ogg Vorbis is lossy
    done = run_main(tmp_path, "--transcribe", "in/**/*.flac", *model)  # a pattern can stand for many
    assert done.stdout == expected[1] + "\n"
    # A single file is its bare text. The last run's model is the default.
    (tmp_path / "medasr-afrispeech-200").symlink_to(demo.output)
    done = succeeded(run_main(tmp_path, "--transcribe", "in/b/one.flac"))
    assert done.stdout == texts[1] + "\n" and "transcribing with medasr-afrispeech-200/final" in done.stderr


def test_standard_input_is_read_and_the_pipe_stays_clean(demo, spoken, tmp_path):
    command = [sys.executable, SCRIPT, "--transcribe", "-", "--model", demo.final]
    done = subprocess.run(command, input=sound(spoken[0][0]), capture_output=True, timeout=300)
    assert (done.returncode, done.stdout.decode()) == (0, spoken[0][1] + "\n")
    assert re.fullmatch(SPEED, done.stderr.decode().strip())
    done = run_main(tmp_path, "--transcribe", "-", "--model", demo.final)  # nothing is in it
    assert done.stdout == "" and refused(done, 1, "- cannot be read as audio")


def test_each_recording_gets_one_line_and_broken_ones_are_named(demo, spoken, tmp_path):
    """All are done to their ends, and a line is what every terminal can show."""
    content, whole = sound(spoken[0][0]), sound(noise(180), format="FLAC")
    at = content.index(b"data") + 4
    files = {
        "two\nlines and a\ttab.wav": content,
        "two  spaces é.wav": sound(spoken[1][0]),
        "broken\n.wav": b"RIFF, but nothing else",
        "empty.wav": b"",
        "lying.wav": content[:at] + struct.pack("<I", len(content) * 10) + content[at + 4 :],
        "cut.flac": whole[: len(whole) // 2],
    }
    for name, data in files.items():
        write(tmp_path / name, data)
    flags, odd = ["--model", demo.final], list(files)[:3]
    done = run_main(tmp_path, "--transcribe", *files, *flags)
    *good, long = done.stdout.splitlines()
    texts = {"two lines and a tab.wav": spoken[0][1], odd[1]: spoken[1][1], "lying.wav": spoken[0][1]}
    assert done.returncode == 1 and good == [f"{name}\t{text}" for name, text in texts.items()]
    assert long.startswith("cut.flac\t") and len(long.split()) > 50
    assert re.findall(r"error: (\w+ ?.wav) cannot be read as audio", done.stderr) == ["broken .wav", "empty.wav"]
    assert re.search(r"cut.flac: it ends after [\d.]+ s, [\d.]+ s before what its header says", done.stderr)
    assert {path.name for path in tmp_path.iterdir()} == set(files)
    assert refused(run_main(tmp_path, "--transcribe", "a\nb.wav"), 2, "--transcribe is a b.wav")
    done = run_main(tmp_path, "--transcribe", *odd, *flags, "--transcript_format", "json")
    assert [json.loads(line)["file"] for line in done.stdout.splitlines()] == odd[:2] and done.stdout.isascii()


def test_each_recording_gets_a_file_of_its_own_which_is_never_overwritten(demo, spoken, tmp_path, monkeypatch):
    for name, (samples, _) in zip(("in/monday/visit.wav", "in/tuesday/visit.wav", "in/tuesday/visit.flac"), spoken):
        record(tmp_path / name, samples)
    flags, decoded, decode = ["--transcribe", "in", "--transcript_dir", "out/texts"], [], script.decode_recording
    done = run_main(tmp_path, *flags, "--model", demo.final)
    found = {path.relative_to(tmp_path / "out/texts").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert succeeded(done).stdout == ""
    assert found == {"monday/visit.txt", "tuesday/visit.wav.txt", "tuesday/visit.flac.txt"}
    texts = [tmp_path / f"out/texts/{name}.txt" for name in ("monday/visit", "tuesday/visit.wav", "tuesday/visit.flac")]
    assert texts[0].read_text() == spoken[0][1] + "\n" and "kept" not in done.stderr
    texts[0].write_text("corrected by a person")
    texts[1].unlink()
    monkeypatch.setattr(script, "decode_recording", lambda name: decoded.append(name) or decode(name))
    done = run_main(tmp_path, *flags, "--model", demo.final)
    assert "2 transcripts in out/texts kept" in succeeded(done).stderr and decoded == ["in/tuesday/visit.wav"]
    assert [path.read_text() for path in texts] == ["corrected by a person", *(f"{text}\n" for _, text in spoken[1:3])]
    done = run_main(tmp_path, *flags, "--model", "not/loaded")
    assert "3 transcripts in out/texts kept" in succeeded(done).stderr and len(decoded) == 1


def words_of(content):
    return [word for segment in content["segments"] for word in segment["words"]]


def test_words_of_a_long_recording_are_neither_lost_nor_doubled_nor_late(demo, spoken, tmp_path):
    """The small model hears a clip among others less well than alone; where two windows meet it hears it no worse."""
    parts, places, length = [], [], 0  # clips with silence between them: where each begins and ends, in seconds
    for samples, text in spoken * 2:
        places.append((length / RATE, (length + len(samples)) / RATE, text))
        parts += [samples, np.zeros(RATE * 3 // 2, np.float32)]
        length += len(samples) + RATE * 3 // 2
    record(tmp_path / "ward round.flac", np.concatenate(parts))
    flags = ["--transcript_format", "json", "--model", demo.final]
    words = words_of(json.loads(succeeded(run_main(tmp_path, "--transcribe", "ward round.flac", *flags)).stdout))
    assert all(before["end"] <= after["start"] for before, after in zip(words, words[1:]))
    inside = [word for word in words if any(start - 0.1 < word["start"] < end for start, end, _ in places)]
    assert len(inside) > 0.99 * len(words), "words are heard in the clips, not in the silence between them"
    seams = np.arange(18, places[-1][1], 16)  # the middles of the overlaps of windows of 20 s that begin every 16 s
    texts, late = {True: ([], []), False: ([], [])}, []
    for start, end, text in places:
        found = [word for word in words if start - 0.1 < word["start"] < end + 0.1]
        late += [word["start"] - start for word in found[:1]]
        references, hypotheses = texts[bool(((start < seams) & (seams < end)).any())]
        references.append(text)
        hypotheses.append(" ".join(word["word"] for word in found))
    assert np.median(late) < 0.08, "each clip begins with speech"
    across, between = (jiwer.process_words(*texts[kind]) for kind in (True, False))
    assert len(texts[True][0]) > 30 and across.wer < between.wer + 0.05
    assert across.insertions < 0.05 * (across.hits + across.substitutions)


def test_bfloat16_is_for_the_model_alone(tmp_path, monkeypatch):
    """As on a GPU: matrices in bfloat16, log-mels in float32."""
    record(tmp_path / "visit.wav", noise(3))
    kinds, features, made = set(), [], script.model_inputs

    def watch(module, inputs, output):
        kinds.update([output.dtype] if isinstance(module, torch.nn.Linear) else [])

    monkeypatch.setattr(script, "model_inputs", lambda *batch: features.append(made(*batch)) or features[-1])
    with torch.nn.modules.module.register_module_forward_hook(watch):
        succeeded(run_main(tmp_path, "--transcribe", "visit.wav", "--model", MODEL))
        assert kinds == {torch.float32}
        exact = features[-1]["input_features"]
        succeeded(run_main(tmp_path, "--transcribe", "visit.wav", "--model", MODEL, "--bf16", "true"))
        assert torch.bfloat16 in kinds
    assert exact.dtype == torch.float32 and torch.equal(features[-1]["input_features"], exact)


@pytest.fixture
def say(tmp_path, monkeypatch):
    """say([(text, seconds of silence after it), ...], flag, ...) -> what --transcribe writes for a recording in which
    the model hears these texts, a label and a blank in each two frames of 0.04 s."""
    record(tmp_path / "visit.wav", noise(1))

    def say(parts, *flags):
        ids = []
        for text, pause in parts:
            ids += [id for label in label_encoder()([text])[0] for id in (label, 0)] + [0] * round(pause / 0.04)
        monkeypatch.setattr(script.Decoder, "emissions", lambda *_, **__: ([frames_of(ids)], 0.0))
        return succeeded(run_main(tmp_path, "--transcribe", "visit.wav", "--model", MODEL, *flags)).stdout

    return say


def test_words_have_the_times_of_their_frames(say):
    """The first frame stands for what begins at 0.0525 s: the middle 0.04 s of the 0.145 s that it hears."""
    content = json.loads(say([("the", 1.0), ("patient has", 0.0)], "--transcript_format", "json"))
    assert list(content) == ["text", "segments", "language"] and content["text"] == "the patient has"
    assert [segment["text"] for segment in content["segments"]] == ["the", "patient has"]
    # Each is one token here, in one frame, and followed by a frame of nothing.
    for word, name, start in zip(words_of(content), ("the", "patient", "has"), (0.0525, 1.1325, 1.2125), strict=True):
        assert word["word"] == name and word["probability"] == 1
        assert (word["start"], word["end"]) == pytest.approx((start, start + 0.04), abs=1e-3)
    for segment in content["segments"]:
        assert (segment["start"], segment["end"]) == (segment["words"][0]["start"], segment["words"][-1]["end"])


@pytest.mark.parametrize("kind, mark", [("srt", ","), ("vtt", ".")])
def test_subtitles_break_between_words_and_at_pauses_and_follow_each_other(say, kind, mark):
    long = "pneumonoultramicroscopicsilicovolcanoconiosis-and-more"
    parts = [("no fever and the child has malaria " * 9, 1.2), (f"then {long} was ruled out", 3600), ("bye", 0)]
    blocks = [block.split("\n") for block in say(parts, "--transcript_format", kind).strip().split("\n\n")]
    head = blocks.pop(0) if kind == "vtt" else [block.pop(0) for block in blocks]
    assert head == (["WEBVTT"] if kind == "vtt" else [str(number + 1) for number in range(len(blocks))])
    clock = rf"(\d\d):(\d\d):(\d\d)\{mark}(\d\d\d)"
    times = [list(map(int, re.fullmatch(f"{clock} --> {clock}", block[0]).groups())) for block in blocks]
    spans = np.reshape(times, (-1, 2, 4)) @ [3600, 60, 1, 0.001]
    assert spans[0, 0] == pytest.approx(0.0525, abs=1e-3) and spans[-1, 0] > 3600
    assert (np.diff(spans) > 0).all() and np.diff(spans).max() < 7.6, "7 s and what lingers"
    assert (np.diff(spans.ravel()) >= 0).all(), "they follow each other"
    lines = [line for block in blocks for line in block[1:]]
    assert " ".join(lines) == " ".join(text.strip() for text, _ in parts) and lines.count(long) == 1
    assert max(map(len, blocks)) == 3 and max(len(line) for line in lines if line != long) <= 42
    assert any(block[1] == "then" for block in blocks), "a pause of a second parts subtitles"


DICTATED = {
    "Chest is clear {period} No fever {comma} no cough {period}": "Chest is clear. No fever, no cough.",
    "{new paragraph} Findings {colon} normal {new paragraph} Plan {new line} rest": "Findings: normal\n\nPlan\nrest",
    "pain {question mark} no {period} {period} so. {period} then": "pain? no. so. then",
    "seen {open parenthesis} left {close parenthesis} today": "seen (left) today",
    "follow {hyphen} up in 5{period}Then stop": "follow-up in 5. Then stop",
    "{no token} stays and so do {braces": "{no token} stays and so do {braces",
}


def test_dictated_punctuation_is_written_as_such_where_asked_for(say):
    for said, formatted in DICTATED.items():
        assert say([(said, 0)], "--format_dictation") == formatted + "\n"
        assert say([(said, 0)]) == said + "\n"
    said = [("No fever {period} {new paragraph} Rest", 0)]
    content = json.loads(say(said, "--transcript_format", "json", "--format_dictation"))
    assert content["text"] == "No fever.\n\nRest"
    assert [segment["text"] for segment in content["segments"]] == ["No fever.", "Rest"], "line breaks part subtitles"
    assert "No fever.\n\n2\n" in say(said, "--transcript_format", "srt", "--format_dictation")
    assert "No fever {period}" in say(said, "--transcript_format", "srt")
