"""The reader of audio: every container and codec that libsndfile writes, whole and damaged, and what people record."""

import contextlib
import io
import itertools
import json
import os
import re
from unittest import mock

import librosa
import numpy as np
import pytest
import soundfile
from conftest import MODEL
from helpers import RATE, TEXT, heard, one_table, rows_in, run_main, skipped, sound, write
from hypothesis import given, settings, strategies

import finetune_medasr as script

SECONDS = 3
# SD2 keeps its format in a second file and RAW nowhere; XI and 8-bit VOC keep rates of their own.
CODECS = [(kind, codec) for kind in soundfile.available_formats() for codec in soundfile.available_subtypes(kind)]
CODECS = [pair for pair in CODECS if pair[0] not in ("RAW", "SD2", "XI") and pair != ("VOC", "PCM_U8")]
# What libsndfile cannot open when it is cut, and where no header tells that something is missing.
UNREADABLE_CUT = {"CAF", "HTK"}
SILENT_CUT = {"AVR", "MAT4", "MAT5", "MPC2K", "OGG", "PAF", "PVF", "SDS", "IRCAM", "VOC", "NIST", "WVE"}


def speech_like(rate):
    """Tones whose loudness changes, which codecs of speech keep."""
    time = np.arange(SECONDS * rate) / rate
    return (0.4 + 0.3 * np.sin(9 * time)) * np.sin(2 * np.pi * 220 * time)


def alike(samples, expected):
    """The correlation of two signals, whose lengths may differ by the padding of a codec's blocks."""
    size = min(len(samples), len(expected))
    assert abs(len(samples) - len(expected)) <= 1_000
    return np.corrcoef(samples[:size], expected[:size])[0, 1]


def encoded(kind, codec, channels):
    """A recording in a format, None where libsndfile does not write it with so many channels."""
    rate = 8_000 if codec.startswith(("GSM", "G72")) or kind == "WVE" else RATE
    samples = speech_like(rate) if channels == 1 else np.stack([speech_like(rate), speech_like(rate) / 2], axis=1)
    with contextlib.suppress(soundfile.SoundFileError):
        return sound(samples, rate, format=kind, subtype=codec)


def prepared(folder, files):
    """{name: (samples, problem)} of files in a folder of recordings after --prepare_only, and what the program said."""
    rows = [{"file_name": name, "text": TEXT, "speaker": number} for number, name in enumerate(files)]
    one_table(folder / "corpus", rows, files)
    done = run_main(folder, *"--prepare_only --dataset corpus --num_proc 2 --data_dir data --output_dir out".split())
    rows = rows_in(folder / "data")
    return {row["clip"]: (heard(row["audio"]) if row["audio"] else (), row["problem"]) for row in rows}, done


def test_every_format_is_read_whole_and_what_is_cut_is_named(tmp_path):
    files = {}
    for (kind, codec), channels in [(format, channels) for format in CODECS for channels in (1, 2)]:
        if data := encoded(kind, codec, channels):
            files[f"{kind}-{codec}-{channels}-whole.x"] = data
            files[f"{kind}-{codec}-{channels}-cut.x"] = data[: len(data) * 4 // 5]
    clips, done = prepared(tmp_path, files)
    assert len(files) > 400 and clips.keys() == files.keys(), done.stderr
    for name, (samples, problem) in clips.items():
        kind, codec, channels, state = name.removesuffix(".x").split("-")
        expected = speech_like(RATE) * (1 if channels == "1" else 0.75)
        if state == "whole":
            assert not problem and alike(samples, expected) > 0.95, name  # some keep four bits a sample
        elif kind in UNREADABLE_CUT:
            assert "undecodable audio" in problem, name
        elif kind in SILENT_CUT:
            assert "no audio samples" in problem or (not problem and len(samples) <= SECONDS * RATE), name
        else:
            assert re.match(r"cut off \(it ends after [\d.]+ s, [\d.]+ s before what its header says", problem), name


def unknown_length(flac):
    """FLAC as a program writes it into a pipe: with no number of samples in its header."""
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]


SPEECH = speech_like(RATE)
OPPOSITE = np.stack([SPEECH, -0.8 * SPEECH], axis=1)
PEOPLE = {  # name: (recording, what is made of it, what is said of it in a corpus)
    "streamed.flac": (unknown_length(sound(SPEECH, format="FLAC")), SPEECH, ""),
    "telephone.wav": (sound(speech_like(8_000), 8_000, subtype="GSM610"), SPEECH, ""),
    "phase.wav": (sound(OPPOSITE), SPEECH, "phase.wav: its channels cancel each other; the loudest was taken"),
    "integers.wav": (sound(SPEECH * 32_768, subtype="FLOAT"), SPEECH, "integers.wav: its samples are far beyond"),
    "beyond.wav": (sound(SPEECH * 2, subtype="FLOAT"), np.clip(SPEECH * 2, -1, 1), ""),
}
DEAD = sound(SPEECH)
DEAD = DEAD[:4] + bytes(4) + DEAD[8:40] + bytes(4) + DEAD[44:]  # the recorder wrote no sizes


def test_what_people_record_is_heard_and_what_is_odd_is_said(tmp_path):
    clips, done = prepared(tmp_path, {name: data for name, (data, *_) in PEOPLE.items()} | {"dead.wav": DEAD})
    for name, (_, expected, said) in PEOPLE.items():
        samples, problem = clips[name]
        assert not problem and alike(samples, expected) > 0.99, name
        assert np.abs(samples).max() == pytest.approx(np.abs(expected).max(), abs=0.2), name
        assert said in done.stderr if said else name not in done.stderr
    reasons = {clip: why for _, clip, why in skipped(tmp_path / "out")}
    assert "none in 96,044 bytes; if they are audio, ffmpeg -ignore_length 1" in reasons["dead.wav"]


@pytest.mark.parametrize("through", ["file", "pipe"])
def test_a_recording_is_transcribed_to_the_last_frame_that_decodes(tmp_path, through):
    """70 s: more than is decoded at once."""
    whole = np.tile(np.concatenate([speech_like(RATE), np.zeros(RATE // 2)]), 20)
    flac = sound(whole, format="FLAC")
    words = {}
    for name, data in {"whole": flac, "streamed": unknown_length(flac), "cut": flac[: len(flac) * 4 // 5]}.items():
        write(tmp_path / f"{name}.flac", data)
        path, flags = tmp_path / f"{name}.flac", ("--model", MODEL, "--transcript_format", "json")
        if through == "pipe":
            os.mkfifo(path := tmp_path / f"{name}.fifo")
            if not os.fork():
                path.write_bytes(data)
                os._exit(0)
        done = run_main(tmp_path, "--transcribe", path, *flags)
        assert done.returncode == 0, done.stderr
        words[name] = [word for part in json.loads(done.stdout)["segments"] for word in part["words"]]
        assert ("s before what its header says" in done.stderr) == (name == "cut")
        heard = float(re.search(r"([\d.]+) s of audio", done.stderr)[1])
        assert heard == pytest.approx(70 if name != "cut" else 56, abs=1)
    assert words["whole"] == words["streamed"] and words["cut"][:10] == words["whole"][:10]


@settings(deadline=None, max_examples=60)
@given(
    rate=strategies.sampled_from([8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 12_345]),
    frames=strategies.integers(1, 30_000),
    block=strategies.integers(500, 20_000),
    cuts=strategies.lists(strategies.integers(1, 60_000), max_size=4),
    channels=strategies.integers(1, 3),
)
def test_blocks_and_windows_of_any_size_are_the_whole(rate, frames, block, cuts, channels):
    samples = np.random.default_rng(frames).normal(scale=0.1, size=(frames, channels))
    data = sound(samples, rate, format="FLAC")
    mono = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0].mean(axis=1)
    expected = librosa.resample(mono, orig_sr=rate, target_sr=RATE) if rate != RATE else mono
    with mock.patch.object(script, "BLOCK_SAMPLES", block):
        found = script.decode_audio(data)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == np.float32
    ends = sorted({0, len(expected), *(cut for cut in cuts if cut < len(expected))})
    windows = script.Windows([{"audio": data}])
    spans = [script.Span(0, start, stop, 0, 0, False) for start, stop in zip(ends, ends[1:])]
    np.testing.assert_allclose(np.concatenate([windows[span]["samples"] for span in spans]), expected, atol=1e-6)


def test_damage_where_a_block_begins_ends_the_reading():
    damaged = bytearray(sound(np.random.default_rng(0).normal(scale=0.1, size=4 * RATE), format="FLAC"))
    damaged[27_700:27_760] = b"\xff" * 60
    with mock.patch.object(script, "BLOCK_SAMPLES", 4_096):  # as many as a frame of FLAC
        blocks = list(itertools.islice(script.read_audio(bytes(damaged), []), 100))
    assert 0 < sum(map(len, blocks)) < 4 * RATE and len(blocks) < 20
