#!/usr/bin/env python3
"""Broken archives, transcripts, audio and score files, made at random, and what the program has to do with each.

    python tests/fuzz.py --minutes 10

Nothing but the program's own errors may come out, and no clip may be lost in silence: else the command prints the
place of the smallest input that it found, and exits with 1. tests/test_fuzz.py tries a few of the same inputs.
"""

import argparse
import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import os
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import soundfile
from hypothesis import HealthCheck, Phase, example, given, seed, settings
from hypothesis import strategies as st

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "fixtures/corpus"
sys.path.insert(0, str(HERE.parent))

import finetune_medasr as script  # noqa: E402

# ---------------------------------------------------------------- what is common to all inputs

ANY_BYTES = st.binary(max_size=3000)
ANY_TEXT = st.one_of(
    st.text(max_size=60),
    # Lone surrogates: JSON can escape them, names of files can hold bytes that are no UTF-8.
    st.text(st.characters(codec=None), max_size=12),
    st.sampled_from(
        ["", " ", "...", "No fever.", "a,b;c\td", '"', 'say "no', "$x$ $", "=1+1", "\0", "a\r\nb", "\x85\u2028"]
    ),
)
EDITS = st.lists(
    st.tuples(st.sampled_from(["flip", "insert", "delete", "repeat", "cut"]), st.floats(0, 1), st.binary(max_size=8)),
    max_size=6,
)


def edited(data, edits):
    """`data` with bytes changed at places given as shares of its length."""
    for kind, share, new in edits:
        place = int(share * len(data))
        if kind == "flip":
            data = data[:place] + new + data[place + len(new) :]
        elif kind == "insert":
            data = data[:place] + new + data[place:]
        elif kind == "delete":
            data = data[:place] + data[place + 1 + 40 * len(new) :]
        elif kind == "repeat":
            data = data[:place] + data[place : place + 1 + 200 * len(new)] * 2 + data[place + 1 + 200 * len(new) :]
        else:
            data = data[:place]
    return data


@contextlib.contextmanager
def workplace():
    """An empty folder, and silence on stdout and stderr."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield Path(folder)


@functools.cache
def corpus_clips():
    """[(name in the archive, encoded audio)] of a real archive, the shortest first."""
    with tarfile.open(CORPUS / "audio/damara/dev/dev_damara_0.tar.gz") as tar:
        clips = [(member.name, tar.extractfile(member).read()) for member in tar if member.isfile()]
    return sorted(clips, key=lambda clip: len(clip[1]))


REAL_CSV = (CORPUS / "transcripts/damara/dev.csv").read_bytes()
COLUMNS = next(csv.reader(io.StringIO(REAL_CSV.decode())))

# ---------------------------------------------------------------- audio


@functools.cache
def sound(container, subtype, rate, channels, frames):
    """A short sound in a format of libsndfile's."""
    buffer = io.BytesIO()
    samples = 0.3 * np.random.default_rng(0).normal(size=(frames, channels)).clip(-1, 1)
    soundfile.write(buffer, samples, rate, format=container, subtype=subtype)
    return buffer.getvalue()


FORMATS = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "DOUBLE"), ("WAV", "ULAW"), ("WAV", "MS_ADPCM"),
           ("WAV", "GSM610"), ("WAVEX", "PCM_24"), ("AIFF", "PCM_16"), ("AU", "FLOAT"), ("FLAC", "PCM_16"),
           ("OGG", "VORBIS"), ("OGG", "OPUS"),
           ("W64", "PCM_16"), ("RF64", "PCM_16"), ("CAF", "PCM_16"), ("VOC", "PCM_16"), ("NIST", "PCM_16"),
           ("MP3", "MPEG_LAYER_III"), ("SVX", "PCM_16"), ("IRCAM", "PCM_16"), ("PAF", "PCM_16"), ("MAT5", "PCM_16"),
           ("AVR", "PCM_16"), ("HTK", "PCM_16"), ("MPC2K", "PCM_16")]  # fmt: skip


@st.composite
def sounds(draw):
    container, subtype = draw(st.sampled_from(FORMATS))
    rate = draw(st.sampled_from([8000, 16000, 22050, 44100, 48000, 1, 3, 96000, 2_000_000_000]))
    rate = draw(st.sampled_from([8000, 16000, 48000])) if container in ("OGG", "MP3") else rate
    try:
        data = sound(
            container, subtype, rate, draw(st.sampled_from([1, 1, 2, 8])), draw(st.sampled_from([0, 1, 7, 400]))
        )
    except soundfile.SoundFileError:
        data = corpus_clips()[0][1]
    return edited(data, draw(EDITS))


MAGIC = [b"RIFF\0\1\0\0WAVEfmt ", b"OggS", b"fLaC", b"FORM", b".snd", b"ID3\4", b"\xff\xfb", b"caff", b"riff", b""]


def seeking_back():
    """An AIFF without samples, twice, whose damaged chunk of sound lets libsndfile seek to before the beginning."""
    whole = b"FORM\0\0\0.AIFFCOMM\0\0\0\x12\0\1\0\0\0\0\0\x10@\x0b\xfa" + bytes(6) + b"SSND\0\0\0\x08" + bytes(8)
    return whole.replace(b"SSND", b"SS\0D") + whole


def huge_samples(value):
    """Samples that overflow when they are resampled, or are refused by librosa itself."""
    buffer = io.BytesIO()
    samples = np.tile([value, -value, value], 100).astype(np.float32)
    soundfile.write(buffer, samples, 8000, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


AUDIO = st.one_of(sounds(), st.builds(bytes.__add__, st.sampled_from(MAGIC), ANY_BYTES))


def check_audio(data):
    """Finite mono samples or a ValueError, and no traceback; a prepared clip that has its length, or a problem."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            samples = script.decode_audio(data)
        except ValueError:
            samples = None
        clip = script.make_clip(script.clip_row("session/clip", "dev", "damara", {"transcript": "a"}), data)
    assert not printed.getvalue()
    assert bool(clip["problem"]) == (samples is None or not len(samples))
    if not clip["problem"]:
        assert samples.dtype == np.float32 and samples.ndim == 1 and np.isfinite(samples).all()
        assert len(script.decode_audio(clip["audio"])) == clip["num_samples"] == len(samples)


# ---------------------------------------------------------------- transcripts


@st.composite
def tables(draw):
    """(bytes of a CSV, its rows as written or None where they were damaged)."""
    cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30) | st.sampled_from(
        ["", '"', "a, b", "a\nb", "x\r\ny", "\r", ";;;;", "NA", "nan", "1e30", "-1", "é"]
    )
    names = draw(st.permutations(COLUMNS)) if draw(st.booleans()) else COLUMNS
    rows = [{name: draw(cells) for name in names} for _ in range(draw(st.integers(0, 4)))]
    if draw(st.booleans()):
        rows += csv.DictReader(io.StringIO(REAL_CSV.decode()))
    text = io.StringIO()
    delimiter = draw(st.sampled_from(",,;\t"))
    line_end = draw(st.sampled_from(["\n", "\r\n"]))
    writer = csv.DictWriter(text, names, delimiter=delimiter, lineterminator=line_end, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])))
    edits = draw(st.just([]) | EDITS)
    return edited(data, edits), None if edits else [dict(row) for row in rows]


CSV = st.one_of(
    tables(),
    st.builds(lambda edits: (edited(REAL_CSV, edits), None), EDITS),
    st.builds(lambda data: (data, None), ANY_BYTES),
    st.builds(lambda head, data: (head + data, None), st.just(b"transcript,audio_paths,duration\n"), ANY_BYTES),
)


def check_csv(table):
    """The rows as they were written; where they were damaged, rows of text or a RunError."""
    data, expected = table
    with workplace() as folder:
        path = folder / "transcripts/damara/dev.csv"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        corpus = script.Corpus("corpus", None, folder, folder / "audio", False, {"transcripts/damara/dev.csv": [1, 1]})
        try:
            rows, notes = script.read_transcripts(path)
            prepared = corpus.rows("dev")
        except script.RunError as error:
            assert expected is None and "\n" not in str(error)
            return
        assert expected in (None, rows)
        assert all(isinstance(cell, str) for row in rows for cell in row.items() for cell in cell)
        assert all(0 <= row["num_samples"] < 2**31 for row in prepared)
        json.dumps([prepared, notes], ensure_ascii=False).encode()


# ---------------------------------------------------------------- archives

KINDS = [tarfile.REGTYPE] * 6 + [tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE,
         tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, b"V", b"Z"]  # fmt: skip
NAMES = st.one_of(
    st.integers(0, 3).map(lambda index: corpus_clips()[index][0]),
    st.sampled_from(["../../evil.ogg", "/etc/evil.ogg", "a/../b/c.ogg", "", ".", "a" * 200 + "/clip.ogg", "é/é.ogg"]),
    st.text(st.characters(codec=None), max_size=20),
    st.binary(min_size=1, max_size=20).map(lambda name: name.replace(b"\0", b"_").decode("utf-8", "surrogateescape")),
)
CONTENTS = st.one_of(
    st.integers(0, 3).map(lambda index: corpus_clips()[index][1]),
    sounds(),
    ANY_BYTES,
    st.just(b""),
    st.builds(lambda edits: edited(corpus_clips()[0][1], edits), EDITS),
)
PAX = st.dictionaries(
    st.sampled_from(
        ["path", "size", "linkpath", "hdrcharset", "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.major", "x"]
    ),
    st.sampled_from(["a/b.ogg", "0", "-1", "9" * 30, "BINARY", "1,2,3", "nan", "é"]),
    max_size=2,
)


def tar_of(members, form, pax):
    """(bytes of a tar with (name, type, content) members, how many of them are no folders)."""
    buffer, count = io.BytesIO(), 0
    with tarfile.open(fileobj=buffer, mode="w", format=form, errors="surrogateescape", pax_headers=pax) as tar:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "target"
            member.size = len(content) if member.isreg() else 0
            with contextlib.suppress(ValueError):  # a name that this form of tar cannot hold
                tar.addfile(member, io.BytesIO(content))
                count += not member.isdir() and not (kind == tarfile.AREGTYPE and name.endswith("/"))
    return buffer.getvalue(), count


@st.composite
def archives(draw):
    """(bytes of an archive, the clips that were put in or None where some may have gone, whether it is undamaged)."""
    members = st.lists(st.tuples(NAMES, st.sampled_from(KINDS), CONTENTS), max_size=5)
    form, pax = (
        draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])),
        draw(st.just({}) | PAX),
    )
    parts = [tar_of(draw(members), form, pax) for _ in range(draw(st.sampled_from([1, 1, 1, 2])))]
    edits = draw(st.just([]) | EDITS)
    tar, count = edited(b"".join(part[0] for part in parts), edits), sum(part[1] for part in parts)
    packed_edits = draw(st.just([]) | EDITS)
    if draw(st.booleans()):
        tar = gzip.compress(tar, 1)
    changed = edits + packed_edits
    # Bytes that are other ones leave a trace; cut at its end a member goes without any.
    known = not pax and all(kind == "flip" for kind, *_ in changed)
    known = known and not parts[0][0].startswith(b"\x1f\x8b")  # a name that makes a tar look like gzip
    return edited(tar, packed_edits), count if known else None, not changed


@functools.cache
def real_archive():
    return (CORPUS / "audio/damara/dev/dev_damara_0.tar.gz").read_bytes()


GZIP_HEAD = b"\x1f\x8b\x08\0\0\0\0\0\0\3"
ARCHIVE = st.one_of(
    archives(),
    archives(),
    st.builds(lambda edits: (edited(real_archive(), edits), None, False), EDITS),
    st.builds(lambda edits: (gzip.compress(edited(gzip.decompress(real_archive()), edits), 1), None, False), EDITS),
    st.builds(lambda head, data: (head + data, None, False), st.sampled_from([b"", GZIP_HEAD]), ANY_BYTES),
)


def clip_archive(*names, pax=None):
    """A tar of real audio under other names."""
    form = tarfile.PAX_FORMAT if pax else tarfile.USTAR_FORMAT
    return tar_of([(name, tarfile.REGTYPE, corpus_clips()[0][1]) for name in names], form, pax or {})[0]


def broken_header():
    """The header of the second of three members is no header."""
    data = clip_archive("a/1.ogg", "a/2.ogg", "a/3.ogg")
    place = data.index(b"a/2.ogg")
    return data[:place] + b"X" + data[place + 1 :]


def oversized():
    """A member that claims more than could ever be skipped; its own header, for the é, makes tarfile believe it."""
    return clip_archive("é/1.ogg", pax={"size": "9" * 30})


def check_archive(archive):
    """A row for each clip of a whole archive; of a damaged one all that is there, and a row that says if any lacks."""
    data, count, whole = archive
    name = "audio/damara/dev/dev_damara_0.tar.gz"
    with workplace() as folder:
        for path, content in ((name, data), ("transcripts/damara/dev.csv", REAL_CSV)):
            (folder / path).parent.mkdir(parents=True)
            (folder / path).write_bytes(content)
        before = set(folder.rglob("*"))
        corpus = script.Corpus(
            "corpus", None, folder, folder / "prepared", False, {"transcripts/damara/dev.csv": [1, 1]}
        )
        clips, hours = script.prepare_archive(corpus, name)
        assert set(folder.rglob("*")) - before == {
            folder / "prepared",
            *folder.glob("prepared/dev"),
            corpus.prepared_path(name),
        }
        from datasets import Dataset

        rows = Dataset.from_file(str(corpus.prepared_path(name))).to_list()
    assert len(rows) == clips and hours >= 0
    damaged = [row for row in rows if row["problem"].startswith("damaged archive")]
    assert len(damaged) <= 1 and damaged == rows[len(rows) - len(damaged) :]
    assert all(bool(row["problem"]) != bool(row["audio"]) for row in rows)
    found = [(row["clip"], row["problem"]) for row in rows]
    if count is not None and whole:
        assert len(rows) - len(damaged) == count, (count, found)
    elif count is not None:
        assert damaged or len(rows) >= count, (count, found)


# ---------------------------------------------------------------- score files

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.sampled_from([10**400, 1e300, "1e400", -1]),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(st.text(max_size=5), value, max_size=2),
    max_leaves=4,
)
KEYS = ("audio_filepath", "duration", "text", "pred_text", "baseline_text", *script.CLIP_COLUMNS)
ENTRIES = st.lists(
    st.fixed_dictionaries(
        {"text": ANY_TEXT, "pred_text": ANY_TEXT},
        optional={
            "baseline_text": ANY_TEXT,
            "duration": st.floats() | st.integers(0, 40),
            "domain": ANY_TEXT,
            "accent": ANY_TEXT,
            "speaker": ANY_TEXT,
            "audio_filepath": ANY_TEXT,
        },
    )  # fmt: skip
    | st.dictionaries(st.sampled_from(KEYS), JSON, max_size=8)
    | JSON,
    max_size=5,
)


@st.composite
def score_files(draw):
    """(ending, bytes, how many rows they hold or None where they were damaged)."""
    entries = draw(ENTRIES)
    edits = draw(st.just([]) | EDITS)
    if draw(st.booleans()):
        ascii_only = draw(st.booleans())
        lines = [json.dumps(entry, ensure_ascii=ascii_only) for entry in entries]
        return ".jsonl", edited("\n".join(lines).encode("utf-8", "replace"), edits), None if edits else len(lines)
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerow(KEYS)
    rows = [entry for entry in entries if isinstance(entry, dict)]
    writer.writerows([entry.get(key, "") for key in KEYS] for entry in rows)
    return ".csv", edited(text.getvalue().encode("utf-8", "replace"), edits), None if edits else len(rows)


ENDINGS = st.sampled_from([".jsonl", ".csv"])
SCORES = st.one_of(score_files(), st.builds(lambda ending, data: (ending, data, None), ENDINGS, ANY_BYTES))


def check_scores(file):
    """Each row among the texts or left out with a note, or a UsageError."""
    ending, data, count = file
    with workplace() as folder:
        path = folder / f"texts{ending}"
        path.write_bytes(data)
        try:
            rows, written, notes, left_out = script.read_score_file(path)
        except script.UsageError as error:
            assert "\n" not in str(error) and (count is None or "neither" not in str(error)), error
            return
    assert list(written) in (["baseline"], ["baseline", "finetuned"])
    assert all(len(texts) == len(rows) for texts in written.values())
    assert count in (None, len(rows) + left_out) and len(notes) >= left_out
    json.dumps([rows, written, notes], ensure_ascii=False).encode()
    assert all(row["num_samples"] is None or 0 < row["num_samples"] < 2**31 for row in rows)


def check_report(file):
    """The whole of --score_file: a report, or a message of its own."""
    with workplace() as folder:
        path = folder / f"texts{file[0]}"
        path.write_bytes(file[1])
        status = script.main(["--score_file", str(path), "--output_dir", str(folder / "out")])
        errors = sys.stderr.getvalue()
        assert status in (0, 2) and "error: unexpected" not in errors, errors
        assert (folder / "out/results/report.md").is_file() == (status == 0)


# ---------------------------------------------------------------- the search

TARGETS = {  # name: (inputs, the check of one, inputs that once broke it)
    "archive": (
        ARCHIVE,
        check_archive,
        [
            (clip_archive("a/1.ogg") + clip_archive("a/2.ogg"), 2, True),
            (clip_archive("a/\udce9.ogg"), 1, True),
            (broken_header(), 3, False),
            (oversized(), None, False),
        ],
    ),
    "csv": (CSV, check_csv, [(b'","","","","","","","",""\r\n', None)]),
    "audio": (AUDIO, check_audio, [seeking_back(), huge_samples(3e38), huge_samples(np.nan)]),
    "scores": (
        SCORES,
        check_scores,
        [
            (".jsonl", b'{"text": "a", "pred_text": "b", "duration": 134218.0}', 1),
            (".jsonl", b'{"text": "a", "pred_text": "b", "duration": 1' + b"0" * 400 + b"}", 1),
            (".jsonl", b'{"text": "a", "pred_text": "\\ud800", "audio_filepath": [1]}', 1),
            (".jsonl", '{"text": "a\u2028b\x85", "pred_text": "b"}'.encode(), 1),
            (".jsonl", b"[" * 100_000, None),
            (".csv", b'text,pred_text\n"' + b"a" * 200_000, None),
        ],
    ),
    "report": (
        score_files(),
        check_report,
        [
            (".jsonl", b'{"text": "...", "pred_text": "a"}', 1),
            (".jsonl", b'{"text": "a", "pred_text": "a"}\n{"text": "...", "pred_text": "a", "duration": 1}', 2),
            (".jsonl", b'{"text": "a", "pred_text": "a", "accent": "$\\\\frac$", "audio_filepath": {"a": 1}}', 1),
        ],
    ),
}
TRIED, LAST = Counter(), {}


def search(name, count, fixed=True, number=0):
    """Try the examples of a target and `count` more inputs, always the same ones if `fixed`; raises what breaks."""
    inputs, check, examples = TARGETS[name]

    def counted(item):
        TRIED[name] += 1
        LAST[name] = item
        check(item)

    test = given(inputs)(counted)
    for item in examples:
        test = example(item)(test)
    phases = [Phase.explicit, Phase.generate] + ([] if fixed else [Phase.shrink])
    quick = dict(
        max_examples=count, deadline=None, database=None, phases=phases, suppress_health_check=list(HealthCheck)
    )
    settings(**quick, derandomize=fixed)(test if fixed else seed(number)(test))()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    end = time.monotonic() + 60 * options.minutes
    for number in itertools.count(options.seed):
        for name in options.targets:
            try:
                search(name, 20 if name == "report" else 200, fixed=False, number=number)
            except Exception as error:  # the last input is the smallest that breaks
                trace = "".join(traceback.format_tb(error.__traceback__)[-4:])
                found = Path(tempfile.mkdtemp()) / f"{name}.txt"
                found.write_text(repr(LAST[name]), encoding="utf-8")
                sys.exit(f"{trace}{type(error).__name__}: {str(error)[:2000]}\nthe {name} that breaks it is in {found}")
            if time.monotonic() > end:
                tried = ", ".join(f"{count:,} of {name}" for name, count in TRIED.items())
                print(f"{sum(TRIED.values()):,} inputs: {tried}; nothing but the program's own errors")
                return


if __name__ == "__main__":
    main()
