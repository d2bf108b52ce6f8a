"""The program in the test's own process, and the files that it is given and writes."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import tarfile

import numpy as np
import pandas
import soundfile
from conftest import MODEL, corpus_audio, load_json, read_csv, succeeded
from datasets import Dataset

import finetune_medasr as script

RATE = 16_000


def run_main(cwd, *arguments):
    """What the program ended with and printed, as of a process, in this process and on the CPU."""
    arguments, out, errors = [*map(str, arguments), "--use_cpu", "true"], io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = script.main(arguments)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), errors.getvalue())


def noise(seconds, seed=0):
    """Noise whose colour changes all the time: a model hears something else in each frame."""
    samples = np.random.default_rng(seed).normal(size=round(seconds * RATE)).astype(np.float32)
    time = np.arange(len(samples)) / RATE
    tone = np.sin(2 * np.pi * (400 + 300 * np.sin(5 * time)) * time)
    return (0.05 * samples * np.sin(2 * np.pi * 3 * time) + 0.15 * tone).astype(np.float32)


def sound(samples, rate=RATE, **options):
    """An encoded recording: a WAV file of 16 bits unless asked otherwise."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **{"format": "WAV", "subtype": "PCM_16", **options})
    return buffer.getvalue()


def heard(audio):
    """The samples of an encoded recording."""
    return soundfile.read(io.BytesIO(audio))[0]


def tone(seconds=3.0, rate=RATE):
    return 0.1 * np.sin(np.arange(round(seconds * rate)) * 2 * np.pi * 440 / rate)


GOOD, TEXT = sound(tone()), "The patient has a fever."


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def tar(members, mode="w:gz", **options):
    """A tar archive of (name, bytes or the letter of a kind of member) pairs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            else:
                info.type, info.linkname = content.encode(), "/etc/hostname"
            file.addfile(info, io.BytesIO(content) if info.size else None)
    return buffer.getvalue()


def as_csv(rows, end="\r\n"):
    return pandas.DataFrame(rows).to_csv(index=False, lineterminator=end)


def write_table(path, rows):
    """Write rows as JSON lines or CSV, by the ending of the name."""
    lines = (json.dumps(row) + "\n" for row in rows)
    write(path, "".join(lines) if path.suffix == ".jsonl" else as_csv(rows))


def write_part(corpus, accent, split, table, *archives):
    """Write the table and the archives of an accent's split as they lie in AfriSpeech-200; returns `corpus`."""
    place = re.sub(r"\W+", "-", accent).strip("-")
    write(corpus / f"transcripts/{place}/{split}.csv", table)
    for number, archive in enumerate(archives):
        write(corpus / f"audio/{place}/{split}/{split}_{place}_{number}.tar.gz", archive)
    return corpus


def one_table(folder, rows, audio=None, end="\r\n"):
    """A folder with one table of `rows`, and {file: audio} or all the same recordings; returns `folder`."""
    write(folder / "metadata.csv", as_csv(rows, end))
    for row in rows:
        write(folder / row["file_name"], audio[row["file_name"]] if audio else GOOD)
    return folder


def rows_in(data_dir):
    """The rows of all prepared files."""
    return [row for path in sorted(data_dir.rglob("*.arrow")) for row in Dataset.from_file(str(path))]


def modified(folder, pattern="*"):
    return {path: path.stat().st_mtime_ns for path in folder.rglob(pattern)}


def write_wav(path, clip):
    """Decode a test clip of the fixture corpus to a 16-bit WAV file."""
    write(path, sound(heard(corpus_audio("test")[clip])))


# A patch of the program that prints the clips of each training batch, and checksums of their masked log-mels.
WATCHED = """
import zlib

inputs_of = script.model_inputs

def watched(batch, extractor, device):
    inputs = inputs_of(batch, extractor, device)
    if "mask_seeds" in batch:  # a training batch
        mels = [mels[real].numpy() for mels, real in zip(inputs["input_features"], inputs["attention_mask"])]
        print("SEEN", *(f"{clip}:{zlib.crc32(mels.tobytes())}" for clip, mels in zip(batch["clips"], mels)))
    return inputs

script.model_inputs = watched"""


def seen(done):
    """[[(clip, checksum), ...] of each batch that a run of WATCHED was trained on]"""
    batches = re.findall("^SEEN (.*)$", succeeded(done).stdout, re.MULTILINE)
    return [[tuple(clip.rsplit(":", 1)) for clip in batch.split()] for batch in batches]


def skipped(output_dir):
    """[(split, clip, reason)] of a run's skipped_clips.csv."""
    rows = read_csv(output_dir / "results/skipped_clips.csv")
    return [(row["split"], row["clip"], row["reason"]) for row in rows]


def cells(table, first):
    """The cells of the row of a table that begins so."""
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {first} ")]
    return [cell.strip() for cell in line.strip("|").split(" | ")][1:]


def model_with(folder, layerdrop, **encoder_config):
    """A copy of the small model with other settings of its encoder."""
    shutil.copytree(MODEL, folder)
    config = load_json(folder / "config.json")
    config["encoder_config"] |= {"layerdrop": layerdrop, **encoder_config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
