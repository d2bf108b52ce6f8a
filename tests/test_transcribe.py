"""--transcribe: what it finds, what it writes, and when each word was said."""

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
import torch
from conftest import MODEL, SCRIPT, corpus_audio, error_line
from helpers import RATE, frames_of, label_encoder, noise, run_main

import finetune_medasr as script

SPEED = r"[\d,.]+ s of audio in [\d,.]+ s, [\d,.]+ times as fast as it was spoken; loading took [\d.]+ s"


def transcribe(folder, *arguments):
    """(exit status, stdout, lines of stderr)"""
    status, out, errors = run_main(folder, "--transcribe", *arguments)
    return status, out, errors.splitlines()


@pytest.fixture(scope="module")
def spoken(demo):
    """[(samples, text by the demo's model)] of the test clips that it writes down in three words and more."""
    audio, clips = corpus_audio("test"), []
    for row in demo.predictions:
        samples, rate = soundfile.read(io.BytesIO(audio[row["audio_filepath"]]), dtype="float32")
        if len(row["pred_text"].split()) >= 3 and rate == RATE and samples.ndim == 1:
            clips.append((samples, row["pred_text"]))
    return clips


def write(path, samples, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, RATE, **options)
    return path


def test_folders_patterns_and_files_are_found_once_and_in_order(demo, spoken, tmp_path):
    for name, (samples, _) in zip(("z.wav", "in/b/one.flac", "in/two.OGG", "in/.hidden.wav"), spoken):
        write(tmp_path / name, samples, format=name.split(".")[-1].upper())
    (tmp_path / "in/notes.txt").write_text("not audio")
    texts, model = [text for _, text in spoken[:3]], ["--model", demo.final]
    status, out, errors = transcribe(tmp_path, "z.wav", "in", "in/*/*.flac", *model)
    expected = [f"z.wav\t{texts[0]}", f"in/b/one.flac\t{texts[1]}"]
    assert status == 0 and out.splitlines()[:2] == expected
    assert out.splitlines()[2].startswith("in/two.OGG\t") and len(out.splitlines()) == 3  # Ogg Vorbis is lossy
    assert len(errors) == 1 and re.fullmatch(SPEED, errors[0])
    assert transcribe(tmp_path, "in/**/*.flac", *model)[1] == expected[1] + "\n"  # a pattern can stand for many
    # A single file is its bare text. The last run's model is the default.
    shutil.copytree(demo.final, tmp_path / "medasr-afrispeech-200/final")
    status, out, errors = transcribe(tmp_path, "in/b/one.flac")
    assert (status, out) == (0, texts[1] + "\n") and "transcribing with medasr-afrispeech-200/final" in errors[0]


def test_standard_input_is_read_and_the_pipe_stays_clean(demo, spoken, tmp_path):
    given, flags = write(tmp_path / "visit.wav", spoken[0][0]).read_bytes(), ["--model", demo.final]
    command = [sys.executable, SCRIPT, "--transcribe", "-", *flags]
    done = subprocess.run(command, input=given, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout.decode()) == (0, spoken[0][1] + "\n")
    assert re.fullmatch(SPEED, done.stderr.decode().strip())
    status, out, errors = transcribe(tmp_path, "-", *flags)  # nothing is in it
    assert (status, out) == (1, "") and "- cannot be read as audio" in error_line("\n".join(errors))


def test_broken_files_are_named_and_the_others_are_done_to_their_ends(demo, spoken, tmp_path):
    content = write(tmp_path / "first.wav", spoken[0][0]).read_bytes()
    (tmp_path / "broken.wav").write_bytes(b"RIFF, but nothing else")
    (tmp_path / "empty.wav").touch()
    at = content.index(b"data") + 4
    (tmp_path / "lying.wav").write_bytes(content[:at] + struct.pack("<I", len(content) * 10) + content[at + 4 :])
    whole = write(tmp_path / "cut.flac", noise(180)).read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    before = set(tmp_path.iterdir())
    names = ["first.wav", "broken.wav", "empty.wav", "lying.wav", "cut.flac"]
    status, out, errors = transcribe(tmp_path, *names, "--model", demo.final)
    assert status == 1 and out.splitlines()[:2] == [f"{name}.wav\t{spoken[0][1]}" for name in ("first", "lying")]
    assert out.splitlines()[2].startswith("cut.flac\t") and len(out.splitlines()[2].split()) > 50
    assert sorted(re.findall(r"error: (\w+.wav) cannot be read", "\n".join(errors))) == ["broken.wav", "empty.wav"]
    assert re.search(r"cut.flac ends after [\d.]+ s, [\d.]+ s before what its header says", "\n".join(errors))
    assert set(tmp_path.iterdir()) == before


def test_each_recording_gets_a_file_of_its_own(demo, spoken, tmp_path):
    for name, (samples, _) in zip(("in/monday/visit.wav", "in/tuesday/visit.wav", "in/tuesday/visit.flac"), spoken):
        write(tmp_path / name, samples)
    status, out, _ = transcribe(tmp_path, "in", "--transcript_dir", "out/texts", "--model", demo.final)
    found = {path.relative_to(tmp_path / "out/texts").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert (status, out) == (0, "")
    assert found == {"monday/visit.txt", "tuesday/visit.wav.txt", "tuesday/visit.flac.txt"}
    assert (tmp_path / "out/texts/monday/visit.txt").read_text() == spoken[0][1] + "\n"


REFUSED = {
    "--transcribe nowhere.wav": "nowhere.wav.*no such file",
    "--transcribe *.wav": r"\*.wav.*no such file",
    "--transcribe texts": "texts.*no audio file",
    "--transcribe visit.flac --transcript_format docx": "docx.*text.*json.*srt.*vtt",
    "--transcribe visit.flac other/visit.flac --transcript_format srt": "srt.*--transcript_dir",
    "--transcribe visit.flac other/visit.flac --transcript_dir out": "visit.flac and other/visit.flac",
    "--transcribe visit.flac --transcript_dir texts/notes.md": "--transcript_dir.*notes.md",
    "--transcribe visit.flac --transcript_dir=": "--transcript_dir",
    "--transcribe visit.flac --transcript_dir /proc/texts": "/proc",
    **dict.fromkeys(("--transcript_format srt", "--transcript_dir x", "--format_dictation"), "--transcribe"),
}


def test_what_cannot_be_done_is_said_in_a_line(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/notes.md").write_text("no audio")
    for name in ("visit.flac", "other/visit.flac"):
        write(tmp_path / name, noise(1))
    for flags, message in REFUSED.items():
        status, out, errors = run_main(tmp_path, *flags.split(), "--model", MODEL)
        assert status in (1, 2) and out == "" and re.search(message, error_line(errors)), (flags, errors)


def words_of(content):
    return [word for segment in content["segments"] for word in segment["words"]]


def test_words_of_a_long_recording_are_neither_lost_nor_doubled_nor_late(demo, spoken, tmp_path):
    """The small model hears a clip among others less well than alone; where two windows meet it hears it no worse."""
    parts, places, length = [], [], 0  # clips with silence between them: where each begins and ends, in seconds
    for samples, text in spoken * 2:
        places.append((length / RATE, (length + len(samples)) / RATE, text))
        parts += [samples, np.zeros(RATE * 3 // 2, np.float32)]
        length += len(samples) + RATE * 3 // 2
    write(tmp_path / "ward round.flac", np.concatenate(parts))
    status, out, _ = transcribe(tmp_path, "ward round.flac", "--transcript_format", "json", "--model", demo.final)
    words = words_of(json.loads(out))
    assert status == 0 and all(before["end"] <= after["start"] for before, after in zip(words, words[1:]))
    inside = [word for word in words if any(start - 0.1 < word["start"] < end for start, end, _ in places)]
    assert len(inside) > 0.99 * len(words), "words are heard in the clips, not in the silence between them"
    seams = np.arange(18, places[-1][1], 16)  # the middles of the overlaps of windows of 20 s that begin every 16 s
    texts, late = {True: ([], []), False: ([], [])}, []
    for start, end, text in places:
        heard = [word for word in words if start - 0.1 < word["start"] < end + 0.1]
        late += [word["start"] - start for word in heard[:1]]
        references, hypotheses = texts[bool(((start < seams) & (seams < end)).any())]
        references.append(text)
        hypotheses.append(" ".join(word["word"] for word in heard))
    assert np.median(late) < 0.08, "each clip begins with speech"
    across, between = (jiwer.process_words(*texts[kind]) for kind in (True, False))
    assert len(texts[True][0]) > 30 and across.wer < between.wer + 0.05
    assert across.insertions < 0.05 * (across.hits + across.substitutions)


def test_bfloat16_is_for_the_model_alone(tmp_path, monkeypatch):
    """As on a GPU: matrices in bfloat16, log-mels in float32."""
    write(tmp_path / "visit.wav", noise(3))
    kinds, features, made = set(), [], script.model_inputs

    def watch(module, inputs, output):
        kinds.update([output.dtype] if isinstance(module, torch.nn.Linear) else [])

    monkeypatch.setattr(script, "model_inputs", lambda *batch: features.append(made(*batch)) or features[-1])
    with torch.nn.modules.module.register_module_forward_hook(watch):
        assert transcribe(tmp_path, "visit.wav", "--model", MODEL)[0] == 0 and kinds == {torch.float32}
        exact = features[-1]["input_features"]
        assert transcribe(tmp_path, "visit.wav", "--model", MODEL, "--bf16", "true")[0] == 0 and torch.bfloat16 in kinds
    assert exact.dtype == torch.float32 and torch.equal(features[-1]["input_features"], exact)


@pytest.fixture
def say(tmp_path, monkeypatch):
    """say([(text, seconds of silence after it), ...], flag, ...) -> what --transcribe writes for a recording in which
    the model hears these texts, a label and a blank in each two frames of 0.04 s.
    """
    write(tmp_path / "visit.wav", noise(1))

    def say(parts, *flags):
        ids = []
        for text, pause in parts:
            ids += [id for label in label_encoder()([text])[0] for id in (label, 0)] + [0] * round(pause / 0.04)
        monkeypatch.setattr(script.Decoder, "emissions", lambda *_, **__: ([frames_of(ids)], {}, 0.0))
        status, out, _ = transcribe(tmp_path, "visit.wav", "--model", MODEL, *flags)
        assert status == 0
        return out

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
    ends = [(segment["start"], segment["end"]) for segment in content["segments"]]
    assert ends == [
        (part[0]["start"], part[-1]["end"]) for part in (segment["words"] for segment in content["segments"])
    ]


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
