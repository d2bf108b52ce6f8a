"""Where clips come from: every kind of source, in a folder and on a Hub, and what may be wrong with it."""

import contextlib
import functools
import hashlib
import io
import os
import re
import shutil
import signal
import struct
import time
from collections import Counter
from types import SimpleNamespace

import helpers
import numpy as np
import psutil
import pyarrow.parquet
import pytest
import soundfile
import soxr
from conftest import MODEL, corpus_audio, corpus_rows, load_json, refused, run_script, scored_clips, succeeded
from datasets import Audio, ClassLabel, Dataset, Features, Value
from helpers import GOOD, RATE, TEXT, modified, one_table, run_main, skipped, sound, tar, tone, write, write_table
from loopback_hub import DATASET, HUB_MODEL, LoopbackHub
from transformers import AutoModelForCTC, AutoProcessor
from warm import WarmStarts

SPLITS = ("train", "dev", "test")


BOMB = GOOD[:24] + struct.pack("<II", 1, 2) + GOOD[32:]  # at a claimed rate of 1 Hz it is 3 GB at 16 kHz
NO_TEXT = "no text left that the tokenizer covers"
NO_NUMBER = "undecodable audio .*not numbers"
BAD_CLIPS = {  # name: (audio, text, why it is left out of training, why out of the test; "" where it is used)
    "html": (b"<html>Service unavailable</html>", TEXT, "undecodable audio", "undecodable audio"),
    "empty-file": (b"", TEXT, "no audio|undecodable audio", "no audio|undecodable audio"),
    "half-a-header": (GOOD[:20], TEXT, "undecodable audio", "undecodable audio"),
    "header-alone": (GOOD[:44], TEXT, *["undecodable audio .no audio samples"] * 2),
    "bomb": (BOMB, TEXT, "undecodable audio .*1 GB", "undecodable audio .*1 GB"),
    "nan": (sound(tone() * np.nan, subtype="FLOAT"), TEXT, NO_NUMBER, NO_NUMBER),
    "infinite": (sound(tone() + np.inf, subtype="FLOAT"), TEXT, NO_NUMBER, NO_NUMBER),
    "loud": (sound(tone() * 1e29, subtype="FLOAT"), TEXT, "", ""),
    "truncated": (GOOD[: len(GOOD) // 2], TEXT, "cut off", "cut off"),
    "8-khz": (sound(tone(rate=8_000), 8_000), TEXT, "", ""),
    "96-khz-8-channels": (sound(np.tile(tone(rate=96_000)[:, None], 8), 96_000), TEXT, "", ""),
    "mp3": (sound(tone(), format="MP3", subtype="MPEG_LAYER_III"), TEXT, "", ""),
    "silence": (sound(np.zeros(3 * RATE)), TEXT, "", ""),
    "one-sample": (sound(tone(1 / RATE)), TEXT, r"too short: 0\.00 s", ""),
    "long": (sound(tone(21)), TEXT, r"over --max_train_seconds: 21\.0 s", ""),
    "blank-text": (GOOD, " \u00a0\n\t", "empty text", "empty text"),
    "punctuation": (GOOD, "?!...", "", ""),
    "uncovered": (GOOD, "漢字 😀", NO_TEXT, ""),
    "much-text": (GOOD, "a fever " * 1_250, "more labels than frames", ""),
    "formula": (GOOD, "=1+1", "", ""),
    "no-audio": (None, TEXT, "no audio", "no audio"),
    "no-transcript": (GOOD, None, "no transcript", "no transcript"),
}
GROUPS = ("speaker", "accent", "country", "domain", "gender", "age_group")
THEIRS = {"speaker": "user_ids"}  # what AfriSpeech-200 calls it
SIZES = {("damara", "train"): 12, ("damara", "dev"): 4, ("damara", "test"): 6, ("akan (fante)", "test"): 4}


def make_clips(sizes=SIZES, bad=BAD_CLIPS):
    """[{split, name, audio, text, speaker, ...}] of the fixture corpus, of an accent and split as many as `sizes` says,
    and of bad clips; file names are unique."""
    clips = []
    for split in SPLITS:
        audio, rows = corpus_audio(split), corpus_rows(split)
        for accent in ("damara", "akan (fante)"):
            for name in [name for name in audio if rows[name]["accent"] == accent][: sizes.get((accent, split))]:
                groups = {group: rows[name][THEIRS.get(group, group)] for group in GROUPS}
                clip = {"name": name, "audio": audio[name], "text": rows[name]["transcript"], "split": split}
                clips.append(clip | groups | {"duration": rows[name]["duration"]})
        for number, (name, (audio, text, *_)) in enumerate(bad.items() if split != "dev" else ()):
            groups = dict.fromkeys(GROUPS, "") | {"accent": "damara", "domain": "clinical"}
            clip = {"name": f"bad/{name}.wav", "audio": audio, "text": text, "split": split}
            clips.append(clip | groups | {"speaker": f"{split}-{number % 4}"})
    return clips


def write_archives(folder, clips):
    """AfriSpeech-200's layout; its training clips in two archives."""
    parts = {}
    for clip in clips:
        parts.setdefault((clip["accent"], clip["split"]), []).append(clip)
    for (accent, split), part in parts.items():
        rows = [
            {"audio_paths": f"/AfriSpeech-100/{split}/{clip['name']}", "transcript": clip["text"],
             "duration": clip.get("duration", 3)}
            | {THEIRS.get(group, group): clip[group] for group in GROUPS}
            for clip in part if clip["text"] is not None
        ]  # fmt: skip
        members = [(f"data/data/intron/{clip['name']}", clip["audio"]) for clip in part if clip["audio"] is not None]
        count = 2 if split == "train" else 1
        archives = [tar(members[number::count], compresslevel=1) for number in range(count)]
        helpers.write_part(folder, accent, split, helpers.as_csv(rows), *archives)
    return folder


FOLDERS = {"train": "train", "dev": "validation", "test": "test"}
OTHER_NAMES = {"text": "sentence", "speaker": "client_id", "gender": "sex"}


def other_row(clip):
    return {OTHER_NAMES.get(name, name): clip[name] for name in ("text", *GROUPS)}


def write_audio_folder(folder, clips):
    """datasets' AudioFolder, with a table in each split's folder, under other people's column names."""
    for split in dict.fromkeys(clip["split"] for clip in clips):
        part = [clip for clip in clips if clip["split"] == split]
        for clip in part:
            if clip["audio"] is not None:
                write(folder / FOLDERS[split] / clip["name"], clip["audio"])
        rows = [{"file_name": clip["name"], **other_row(clip)} for clip in part if clip["text"] is not None]
        write_table(folder / FOLDERS[split] / f"metadata.{'csv' if split == 'train' else 'jsonl'}", rows)
    return folder


def write_parquet(folder, clips):
    """What `datasets` pushes to the Hub, with two files for training."""
    columns = dict.fromkeys(other_row(clips[0]), Value("string"))
    columns["domain"] = ClassLabel(names=["general", "clinical"])
    features = Features(audio=Audio(sampling_rate=RATE, decode=False), **columns)
    for split in dict.fromkeys(clip["split"] for clip in clips):
        rows = [
            {"audio": {"bytes": clip["audio"], "path": clip["name"].split("/")[1]}, **other_row(clip)}
            | {"domain": features["domain"].str2int(clip["domain"])}
            for clip in clips if clip["split"] == split
        ]  # fmt: skip
        for number in range(count := 2 if split == "train" else 1):
            # Dataset.from_list would need torchcodec to encode the column of audio.
            part = pyarrow.Table.from_pylist(rows[number::count], schema=features.arrow_schema)
            path = folder / "data" / f"{FOLDERS[split]}-{number:05d}-of-{count:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(part, path, row_group_size=8)
    return folder


KINDS = {"archives": write_archives, "audio-folder": write_audio_folder, "parquet": write_parquet}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """{kind: a folder of the same clips}"""
    folder, clips = tmp_path_factory.mktemp("corpora"), make_clips()
    return {kind: write_kind(folder / kind, clips) for kind, write_kind in KINDS.items()}


def clip_file(name):
    """What a clip of any kind of source is called alike: the name of its file. Parquet rows have a number before it."""
    return re.sub(r"^\d{5}-", "", name.split("/")[-1])


def digests(data_dir):
    """{prepared file, without the mark of what it is made of: SHA-256}"""
    files = {path.name.split(".")[0]: path.read_bytes() for path in data_dir.rglob("*.arrow")}
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


TRAINING = """--max_steps 1 --eval_steps 1 --save_steps 1 --per_device_train_batch_size 4 --max_train_seconds 20
    --gradient_accumulation_steps 1 --dataloader_num_workers 0""".split()


def flags_of(dataset, *flags):
    folders = "--data_dir audio --output_dir out --num_proc 1 --use_cpu true".split()
    return ["--model", MODEL, "--dataset", dataset, *folders, *flags]


@pytest.fixture(scope="module")
def runs(corpora, warm, tmp_path_factory):
    """runs(kind) -> a whole run on a folder of that kind: {(split, file): row} of what it prepared, results."""

    @functools.cache
    def run_once(kind):
        folder = tmp_path_factory.mktemp(kind)
        succeeded(warm.run(*flags_of(corpora[kind], *TRAINING), cwd=folder))
        return SimpleNamespace(
            folder=folder, skipped=skipped(folder / "out"), metrics=load_json(folder / "out/results/metrics.json"),
            clips={(row["split"], clip_file(row["clip"])): row for row in helpers.rows_in(folder / "audio")},
            texts={clip_file(row["audio_filepath"]): row for row in scored_clips(folder / "out/results")},
        )  # fmt: skip

    return run_once


@pytest.mark.parametrize("kind", KINDS)
def test_bad_clips_are_named_with_their_reasons_and_the_others_are_used(runs, kind):
    found = Counter((split, clip_file(clip)) for split, clip, _ in runs(kind).skipped)
    assert set(found.values()) == {1}, "a clip is named twice"
    reasons = {(split, clip_file(clip)): reason for split, clip, reason in runs(kind).skipped}
    for name, (_, _, *expected) in BAD_CLIPS.items():
        for split, reason in zip(("train", "test"), expected):
            key, is_null = (split, f"{name}.wav"), (kind, name) == ("parquet", "no-transcript")
            reason = "empty text" if is_null else reason
            assert bool(reason) == (key in reasons) and re.match(reason, reasons.pop(key, "")), (key, found)
    assert reasons == {}
    used = {f"{name}.wav" for name, row in BAD_CLIPS.items() if not row[3]}
    assert {name for name in runs(kind).texts if name.endswith(".wav")} == used


@pytest.mark.parametrize("kind", list(KINDS)[1:])
def test_all_kinds_give_the_same_audio_texts_and_scores(runs, kind):
    """The FLAC is the same byte for byte; the untouched model hears the same."""
    audio, texts, columns = [], [], ("audio", "num_samples", "text", *GROUPS)
    for run in map(runs, (kind, "archives")):
        used = {key: row for key, row in run.clips.items() if row["audio"] and row["text"]}
        audio.append({key: [row[name] for name in columns] for key, row in used.items()})
        texts.append({name: (row["text"], row["baseline_text"], row["duration"]) for name, row in run.texts.items()})
    assert audio[0] == audio[1] and texts[0] == texts[1]
    assert runs(kind).metrics["baseline"] == runs("archives").metrics["baseline"]


def test_prepared_audio_is_the_corpus_in_16_khz_mono_flac(runs):
    originals = {clip_file(clip["name"]): clip for clip in make_clips() if not clip["name"].startswith("bad/")}
    assert len(originals) == sum(SIZES.values())
    for (split, name), clip in runs("archives").clips.items():
        if clip["problem"]:
            assert clip["audio"] == b"" and clip["num_samples"] == 0
            continue
        with soundfile.SoundFile(io.BytesIO(clip["audio"])) as flac:
            form = flac.format, flac.subtype, flac.samplerate, flac.channels, flac.frames
            assert form == ("FLAC", "PCM_16", RATE, 1, clip["num_samples"])
            samples = flac.read()
        if name in originals:
            assert split == originals[name]["split"] and clip["text"] == originals[name]["text"]
            assert np.abs(samples - helpers.heard(originals[name]["audio"])).max() < 1e-4
    clips = runs("archives").clips
    loud, eight = (helpers.heard(clips["test", f"{name}.wav"]["audio"]) for name in ("loud", "8-khz"))
    assert np.abs(loud).max() == pytest.approx(1, abs=1e-3), "what is over full scale is clipped"
    assert np.abs(eight - tone())[500:-500].max() < 1e-3, "resampled"


def hub_form(clip):
    """The clip with the Hub's kind of audio, 44.1 kHz stereo WAV."""
    mono = soxr.resample(helpers.heard(clip["audio"]), RATE, 44_100)
    return clip | {"audio": sound(np.stack([mono, 0.9 * mono], axis=1), 44_100)}


@pytest.fixture(scope="module")
def the_hub(corpora, tmp_path_factory):
    """A Hub with each kind of source, and AfriSpeech-200 in part: five archives of 2 to 6 MB."""
    afrispeech = write_archives(tmp_path_factory.mktemp("hub") / "corpus", map(hub_form, make_clips({}, {})))
    write(afrispeech / "afrispeech-200.py", "import datasets\n")  # `datasets` refuses a repository with a script
    datasets = {DATASET: afrispeech, "clinic/gated": corpora["audio-folder"]}
    datasets |= {f"clinic/{kind}": corpora[kind] for kind in KINDS}
    gated = {HUB_MODEL, "clinic/gated", "clinic/gated-model"}
    with LoopbackHub({HUB_MODEL: MODEL, "clinic/gated-model": MODEL}, datasets, gated) as hub:
        yield hub


@pytest.fixture(scope="module")
def online(the_hub, tmp_path_factory):
    """Starts the program where there is no network but the Hub."""
    home = tmp_path_factory.mktemp("home")
    env = the_hub.env(home, HF_HUB_DOWNLOAD_TIMEOUT="2", OMP_NUM_THREADS="1")
    with WarmStarts(env) as online:
        online.home = home
        yield online


@pytest.fixture
def hub(the_hub):
    """The Hub as it is at first."""
    the_hub.clear()
    return the_hub


PREPARE = "--prepare_only --num_proc 1 --data_dir audio --output_dir out".split()
FAULTS = [  # of the four largest files of a source, the largest first: [(kind, value), ...]
    [("drop_after", 9_000)] * 4,
    [("reset_after", 5_000), ("reset_after", 5_000), ("corrupt", None)],
    [("status", 429), ("stall", 2_000)],
    [("status", 503), ("truncate", None), ("drop_after", 0)],
]


def left_behind(data_dir):
    """Files of a data folder that should be gone when all is prepared."""
    kept = re.compile(r"\.(arrow|json|jsonl|csv|lock)$")
    return [path for path in data_dir.rglob("*") if path.is_file() and not kept.search(path.name)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_hub_gives_what_a_folder_does_and_then_is_not_needed(kind, hub, online, warm, runs, corpora, tmp_path):
    files = sorted((path for path in corpora[kind].rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)
    for path, faults in zip(files, FAULTS):
        for fault, value in faults:
            # What is asked for in parts, as the texts of parquet files, has no checksum.
            if (kind, fault) != ("parquet", "truncate"):
                place, wait = path.relative_to(corpora[kind]).as_posix(), {"Retry-After": "0"} if value == 429 else {}
                hub.fault(f"*/resolve/*/{place}", fault, value, times=1, **wait)
    dataset = f"clinic/{kind}"
    succeeded(online.run(*PREPARE, "--dataset", dataset, cwd=tmp_path))
    assert not any(fault.times > 0 for fault in hub._faults), "a fault was not met"
    assert digests(tmp_path / "audio") == digests(runs(kind).folder / "audio")
    assert left_behind(tmp_path / "audio") == []

    made = modified(tmp_path / "audio", "*.arrow")
    hub.requests.clear()
    done = succeeded(online.run(*PREPARE, "--dataset", dataset, cwd=tmp_path))
    assert "preparing audio" not in done.stderr
    assert [request.path for request in hub.requests] == [f"/api/datasets/{dataset}/tree/main"]  # "main" may change
    succeeded(warm.run(*flags_of(dataset, "--eval_only"), cwd=tmp_path))
    texts = {clip_file(row["audio_filepath"]): row["pred_text"] for row in scored_clips(tmp_path / "out/results")}
    assert texts == {name: row["baseline_text"] for name, row in runs(kind).texts.items()}
    assert modified(tmp_path / "audio", "*.arrow") == made


def archive_requests(hub):
    """{archive: [(the byte that a GET request begins at, the bytes sent)], the oldest first}"""
    found = {}
    for log in hub.requests:
        if log.method == "GET" and log.path.endswith(".tar.gz"):
            start = int(re.match(r"bytes=(\d+)-", log.range)[1]) if log.range else 0
            found.setdefault(log.path.split("/")[-1].split(".")[0], []).append((start, log.sent))
    return found


def test_a_download_goes_on_at_the_byte_reached_however_often_it_drops(hub, online, tmp_path):
    hub.fault("*/test_damara_0.tar.gz", "drop_after", 700_000)
    succeeded(online.run(*PREPARE, "--accents", "damara", cwd=tmp_path))
    starts, sent = zip(*archive_requests(hub)["test_damara_0"])
    assert len(starts) == 5
    assert all(sum(sent[:n]) - n * 70_000 <= start <= sum(sent[:n]) for n, start in enumerate(starts))


def test_archives_that_cannot_be_had_do_not_stop_the_others(hub, online, runs, tmp_path):
    hub.fault("*/test_damara_0.tar.gz", "corrupt")
    hub.fault("*/dev_damara_0.tar.gz", "missing")
    prepare_all = [*PREPARE, "--dataset", "clinic/archives"]
    done = online.run(*prepare_all, cwd=tmp_path)
    assert done.returncode == 1 and "2 of 5 archives could not be prepared" in done.stderr.splitlines()[-1]
    assert re.search("(test|dev)_damara_0.tar.gz", done.stderr.splitlines()[-1])
    assert len(archive_requests(hub)["test_damara_0"]) == 2, "a corrupt archive is fetched once more"
    good = digests(tmp_path / "audio")
    assert len(good) == 3 and good.items() < digests(runs("archives").folder / "audio").items()
    hub.clear()
    succeeded(online.run(*prepare_all, cwd=tmp_path))
    assert digests(tmp_path / "audio") == digests(runs("archives").folder / "audio")
    assert archive_requests(hub).keys() == {"test_damara_0", "dev_damara_0"}


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def workers_of(pid):
    """The processes of a program that convert audio; none of them has paid for torch."""
    workers = [child for child in psutil.Process(pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert not [part.path for worker in workers for part in worker.memory_maps() if "libtorch" in part.path]
    return [worker.pid for worker in workers]


def test_a_preparation_that_was_ended_goes_on_and_a_finished_one_needs_no_hub(hub, online, warm, tmp_path):
    audio, flags = tmp_path / "audio", [*PREPARE, "--accents", "damara"]

    def start_and_end(number, whom, is_converting=None):
        """Send a signal to the processes whom(pid) of a new start amid a download, or when it is converting audio; what
        it ended with."""
        before = sum(log.sent for log in hub.requests)
        pid = online.start(*flags, cwd=tmp_path)
        wait_until(is_converting or (lambda: sum(log.sent for log in hub.requests) > before + 1_500_000))
        for process in whom(pid):
            os.kill(process, number)
        ended = online.wait()
        with contextlib.suppress(ProcessLookupError):  # none of its processes outlives the program for long
            wait_until(lambda: os.killpg(pid, 0), 10)
        return ended

    hub.fault("*.tar.gz", "slow", 4_000_000)  # so that they are ended in a download
    assert start_and_end(signal.SIGKILL, lambda pid: [pid]).returncode == -signal.SIGKILL
    stopped = start_and_end(signal.SIGINT, lambda pid: [-pid])  # as Ctrl-C does
    assert stopped.returncode == 130 and "Traceback" not in stopped.stderr
    assert "stopped by SIGINT: the same command goes on" in stopped.stderr.splitlines()[-1]
    killed = start_and_end(signal.SIGKILL, workers_of)  # as the kernel does for want of memory
    assert killed.returncode == 1 and "--num_proc" in killed.stderr.splitlines()[-1]
    hub._faults.clear()
    start_and_end(signal.SIGKILL, lambda pid: [-pid], lambda: list(audio.rglob("*.arrow.*.tmp")))
    succeeded(online.run(*flags, cwd=tmp_path))
    for requests in archive_requests(hub).values():
        for (before, sent), (start, _) in zip(requests, requests[1:]):
            # What was sent and did not reach the disk before a kill is asked for again.
            assert before + sent - 2_000_000 <= start <= before + sent, "a download started anew"
    assert any(start > 0 for requests in archive_requests(hub).values() for start, _ in requests), "all started anew"
    assert left_behind(audio) == []

    made = modified(audio, "*.arrow")
    hub.requests.clear()
    for more in ([], ["--accents", "Damara", "--domains", "clinical", "--seed", 7, "--max_train_seconds", 5]):
        assert "preparing audio" not in succeeded(online.run(*flags, *more, cwd=tmp_path)).stderr
    assert hub.requests == [] and modified(audio, "*.arrow") == made
    folder = [*PREPARE, "--dataset", hub.folders["datasets", DATASET], "--accents", "damara", "--data_dir", "other"]
    succeeded(warm.run(*folder, cwd=tmp_path))
    assert digests(audio) == digests(tmp_path / "other")


def test_a_stream_gives_each_clip_once_a_pass_and_other_ones_after_a_resumption(hub, online, tmp_path):
    hub.fault("*/train_damara_0.tar.gz", "drop_after", 300_000, times=2)
    used = {f"{name}.wav" for name, row in BAD_CLIPS.items() if not row[2]}
    used |= {clip_file(clip["name"]) for clip in make_clips(bad={}) if clip["split"] == "train"}
    flags = flags_of("clinic/archives", "--streaming", *TRAINING, "--skip_baseline", "--dataloader_num_workers", 2)
    flags += "--per_device_train_batch_size 5 --save_steps 8 --eval_steps 8 --max_test_samples 1 --max_steps".split()
    runs = [online.run(*flags, updates, patch=helpers.WATCHED, cwd=tmp_path) for updates in (8, 12)]
    first, second = ([(clip_file(clip), crc) for batch in helpers.seen(run) for clip, crc in batch] for run in runs)
    passes = [first[: len(used)], first[len(used) :], second]
    for found in passes:
        assert sorted(clip for clip, _ in found) == sorted(used)
    assert len({tuple(clip for clip, _ in found) for found in passes}) == 3, "two passes have the same order"
    masked = Counter(clip for clip, _ in {*first, *second})
    assert masked.pop("silence.wav") == 1  # a mask is silence too
    assert set(masked.values()) == {3}, "a clip has the same masks in two passes"
    named = Counter(clip_file(clip) for split, clip, _ in skipped(tmp_path / "out") if split == "train")
    # A stream does not know of a row without audio before its end, and it has none.
    assert named == {f"{name}.wav": 1 for name, row in BAD_CLIPS.items() if row[2] and name != "no-audio"}
    assert not [path for path in tmp_path.rglob("*") if "train" in path.name and path.suffix in (".arrow", ".gz")]


def test_the_main_command_goes_from_nothing_to_a_final_model_on_the_hub(hub, online, tmp_path):
    flags = """--max_steps 2 --gradient_accumulation_steps 1 --num_proc 1 --data_dir audio --output_dir out
        --push_to_hub --hub_model_id clinic/medasr-accents --accents akan-fante damara""".split()
    logged_in = {"HF_TOKEN": "hf_good"}
    succeeded(online.run(*flags, cwd=tmp_path, env=logged_in))
    final, results = tmp_path / "out/final", tmp_path / "out/results"
    assert AutoProcessor.from_pretrained(final).tokenizer and AutoModelForCTC.from_pretrained(final).config.vocab_size
    card = (final / "README.md").read_text()
    assert f"base_model: {HUB_MODEL}\n" in card and f"- {DATASET}\n" in card
    config = load_json(results / "metrics.json")["config"]
    assert (config["model"], config["dataset"]) == (HUB_MODEL, DATASET)
    rows = corpus_rows("test")
    test = {name for name in corpus_audio("test") if rows[name]["accent"] in ("akan (fante)", "damara")}
    assert {row["audio_filepath"] for row in scored_clips(results)} == test

    fetched = Counter(log.path for log in hub.requests if log.method == "GET" and f"{DATASET}/resolve/" in log.path)
    assert set(fetched.values()) == {1} and all(f"/resolve/{hub.commit(DATASET)}/" in path for path in fetched)
    assert archive_requests(hub).keys() == {
        "train_damara_0", "train_damara_1", "dev_damara_0", "test_damara_0", "test_akan-fante_0"
    }  # fmt: skip
    assert left_behind(tmp_path / "audio") == []

    ((name, files),) = hub.uploads
    assert name == "clinic/medasr-accents" and {"README.md", "model.safetensors", "tokenizer.json"} <= set(files)
    whole = {path.relative_to(final).as_posix(): path.read_bytes() for path in final.rglob("*") if path.is_file()}
    assert files == whole
    done = succeeded(online.run(*flags, cwd=tmp_path, env=logged_in))
    assert "finished" in done.stdout and "uploaded to" in done.stdout
    assert len(hub.uploads) == 2 and hub.uploads[1] == hub.uploads[0]

    # On a machine that is offline, with the cache that the model went to.
    offline = {**hub.env(online.home, HF_HUB_OFFLINE="1"), "OMP_NUM_THREADS": "1"}
    flags = "--eval_only --max_test_samples 3 --accents damara --data_dir audio --output_dir again".split()
    assert "preparing audio" not in succeeded(run_script(*flags, cwd=tmp_path, env=offline)).stderr
    assert len(scored_clips(tmp_path / "again/results")) == 3


GATED, NO_DATA = "--model clinic/gated-model", "--dataset clinic/no"
REFUSED = {  # what a Hub refuses: (flags, token, pattern of the message)
    "no token": (GATED, "", "gated-model is gated and you are not logged in.*hf auth login.*http.*/clinic/gated-model"),
    "no access": (GATED, "hf_denied", "clinic/gated-model is gated and your account has no access.*terms at http"),
    "invalid token": (GATED, "hf_bad", "clinic/gated-model.*token is not valid.*hf auth login.*HF_TOKEN"),
    "unknown model": ("--model a/b", "hf_good", "a/b is neither .* on the Hub, or it is private.*--model"),
    "not an id": ("--model google/medasr/large", "", "google/medasr/large is neither a local folder nor"),
    "model revision": (f"{GATED} --model_revision v9", "hf_good", "no such revision.*--model_revision"),
    "unknown dataset": (NO_DATA, "hf_good", "dataset clinic/no is neither .* on the Hub, or it is private"),
    "gated dataset": ("--dataset clinic/gated", "", "dataset clinic/gated is gated.*/datasets/clinic/gated"),
    "dataset revision": ("--dataset_revision v9", "", f"{DATASET} has no such revision.*--dataset_revision"),
    "answers of 503": ("", "", f"dataset {DATASET} could not be read.*503.*run the same command again"),
    "upload": ("--push_to_hub", "hf_denied", "--push_to_hub: out cannot be written.*hf auth login"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_refuses_is_one_line_before_any_audio_is_fetched(case, hub, online, tmp_path):
    flags, token, message = REFUSED[case]
    flags = f"{flags} --data_dir audio --output_dir out" + ("" if "--model " in flags else f" --model {MODEL}")
    if case == "answers of 503":
        hub.fault("/api/datasets/*", "status", 503, **{"Retry-After": "0"})
    refused(online.run(*flags.split(), cwd=tmp_path, env={"HF_TOKEN": token} if token else {}), 1, message)
    assert not list(tmp_path.rglob("*.arrow")) and not (tmp_path / "out").exists()
    assert hub.count("*.tar.gz") == 0 and (str(MODEL) in flags or hub.count("*datasets*") == 0)


def test_without_a_network_one_line_says_what_is_missing(warm, tmp_path):
    for kind, flags in (("model", ["--model", "nobody/nothing"]), ("dataset", flags_of("nobody/nothing"))):
        refused(warm.run(*flags, cwd=tmp_path), 1, f"{kind} nobody/nothing is not on this machine", "reached")


def test_a_data_folder_holds_several_corpora_and_only_what_changed_is_made_again(warm, tmp_path):
    few = {("damara", split): 4 for split in SPLITS} | {("akan (fante)", "test"): 0}
    clips, audio = make_clips(few, {}), tmp_path / "audio"

    def prepare(kind, *flags):
        """(prepared files that are gone, new ones, those that stayed) after a run."""
        before = modified(audio, "*.arrow")
        succeeded(warm.run(*flags_of(tmp_path / kind, *flags), cwd=tmp_path))
        after = modified(audio, "*.arrow")
        return before.keys() - after.keys(), after.keys() - before.keys(), dict(before.items() & after.items())

    total = 0
    for kind, write_kind in KINDS.items():
        write_kind(tmp_path / kind, clips)
        gone, made, stayed = prepare(kind, "--prepare_only")
        assert not gone and len(made) >= 3 and len(stayed) == total
        total += len(made)
    write(audio / "notes/letter.tmp", "somebody else's")
    (folder,) = {path.parent for path in made}
    write(folder / f"{min(made).name}.1.tmp", "half a file")

    test = [clip for clip in clips if clip["split"] == "test"]
    changed, file = test[2], clip_file(test[2]["name"])
    texts = [tmp_path / "archives/transcripts/damara/test.csv", tmp_path / "audio-folder/test/metadata.jsonl"]
    for path in [*texts, tmp_path / "audio-folder/test" / changed["name"], tmp_path / "parquet/data"]:
        kind = path.relative_to(tmp_path).parts[0]
        if path in texts:
            write(path, path.read_text(encoding="utf-8").replace(changed["text"], "Another text."))
        elif path.is_dir():
            write_parquet(tmp_path / kind, [clip | {"audio": GOOD} for clip in test])
        else:
            write(path, GOOD)
        gone, made, stayed = prepare(kind, "--eval_only")  # of the test split alone
        assert len(gone) == len(made) == 1 and len(stayed) == total - 1, (path, gone, made)
        (row,) = [row for row in Dataset.from_file(str(*made)) if clip_file(row["clip"]) == file]
        assert row["text"] == "Another text." if path in texts else row["num_samples"] == 3 * RATE
    assert (audio / "notes/letter.tmp").exists() and not list(folder.glob("*.tmp"))


def test_of_two_programs_that_prepare_the_same_audio_one_works(warm, online, corpora, runs, tmp_path):
    flags = [*PREPARE, "--dataset", corpora["audio-folder"]]
    for number, starts in enumerate((warm, online)):
        starts.start(*flags, "--output_dir", f"out{number}", cwd=tmp_path)
    both = [starts.wait() for starts in (warm, online)]
    assert [done.returncode for done in both] == [0, 0], both
    assert sum("preparing audio" in done.stderr for done in both) == 1, "both did the work"
    assert digests(tmp_path / "audio") == digests(runs("audio-folder").folder / "audio")


def test_a_full_disk_is_foreseen(online, hub, tmp_path):
    # The largest archive has 6 MB, and the audio at 16 kHz 2 MB.
    full = "usage = script.shutil.disk_usage; script.shutil.disk_usage = lambda path: usage(path)._replace(free=7e6)"
    done = online.run(*PREPARE, "--accents", "damara", patch=full, cwd=tmp_path)
    refused(done, 1, r"needs 0\.0 GB in audio/.* and 0\.0 GB are free", "--data_dir")
    assert hub.count("*.tar.gz") == 0


def test_a_damaged_prepared_file_is_named(runs, corpora, tmp_path):
    shutil.copytree(runs("parquet").folder / "audio", tmp_path / "audio")
    file = next(path for path in (tmp_path / "audio").rglob("*.arrow") if "test" in path.name)
    for content in (b"", file.read_bytes()[:-2_000]):
        file.write_bytes(content)
        done = run_main(tmp_path, *flags_of(corpora["parquet"], "--eval_only"))
        refused(done, 1, f"audio/.*{re.escape(file.name)} is damaged .*: delete it")


def splits_of(folder, dataset, *flags):
    """({split: [clips, speakers]} by a dry run, what it printed)"""
    done = succeeded(run_main(folder, *flags_of(dataset, "--dry_run", *flags)))
    found = re.findall(r"^ *(train|dev|test) +(\d+) clips? .* (\d+) speakers?", done.stdout, re.MULTILINE)
    return {split: [int(clips), int(speakers)] for split, clips, speakers in found}, done.stdout + done.stderr


def test_missing_splits_are_made_by_speaker_and_a_run_says_so(tmp_path, warm):
    """So that the speakers of all splits are as many as there are."""
    rows = [{"file_name": f"{number}.wav", "text": TEXT, "speaker_id": f"s{number // 2}"} for number in range(40)]
    rows.append({"file_name": "nobody.wav", "text": TEXT, "speaker_id": ""})
    folder, test = one_table(tmp_path / "own", rows), {}
    found, said = splits_of(tmp_path, folder)
    assert found == {"train": [33, 16], "dev": [4, 2], "test": [4, 2]}
    assert "dev and test made of the train split by speaker, by --seed 42" in said
    for seed in (42, 7, 42):
        succeeded(run_main(tmp_path, *flags_of(folder, "--eval_only", "--seed", seed)))
        made = modified(tmp_path / "audio", "*.arrow")
        scored = scored_files(tmp_path)
        assert len(scored) == 4 and scored == test.setdefault(seed, scored)
    assert test[42] != test[7]

    succeeded(warm.run(*flags_of(folder, *TRAINING, "--skip_baseline"), cwd=tmp_path))
    data = load_json(tmp_path / "out/results/metrics.json")["data"]
    assert data["made_splits"] == ["dev", "test"] and data["speakers_in_train_too"] == {}
    assert "dev and test made of the train split by speaker" in (tmp_path / "out/results/report.md").read_text()
    card = (tmp_path / "out/final/README.md").read_text()
    assert "whose speakers are not in training" in card and "frican" not in card
    assert skipped(tmp_path / "out") == [("train", "nobody.wav", "no speaker to make a split by")]

    one_table(folder, [row | {"split": "test" if number < 10 else "train"} for number, row in enumerate(rows)])
    found, said = splits_of(tmp_path, folder)
    assert found == {"train": [29, 14], "dev": [2, 1], "test": [10, 5]} and "  dev made of the train split" in said
    assert modified(tmp_path / "audio", "*.arrow") == made, "audio is converted once for all splits"


def test_speakers_of_two_given_splits_are_counted(tmp_path, warm):
    people = [(number, SPLITS[number % 3], f"speaker {number % 2}") for number in range(12)]
    rows = [{"file_name": f"{name}.wav", "text": TEXT, "split": split, "client_id": who} for name, split, who in people]
    done = warm.run(*flags_of(one_table(tmp_path / "own", rows), *TRAINING, "--skip_baseline"), cwd=tmp_path)
    note = "2 speakers of test in training too: its scores are not those of new speakers."
    assert f"warning: {note}" in succeeded(done).stderr
    assert load_json(tmp_path / "out/results/metrics.json")["data"]["speakers_in_train_too"] == {"dev": 2, "test": 2}
    assert note in (tmp_path / "out/results/report.md").read_text()
    assert "whose speakers are not in training" not in (tmp_path / "out/final/README.md").read_text()


def test_splits_come_from_columns_and_folders_under_many_names(tmp_path):
    """A "stress-test" is a word of a file's name and no split; what has none, where others have, is left out."""
    names = ["training", *["Valid"] * 2, *["eval"] * 4, "", "invalidated"]
    files = [*(f"ada/{number}-stress-test.wav" for number in range(len(names))), "eval/train.wav"]
    rows = [{"file_name": file, "text": TEXT, "split": name} for file, name in zip(files, [*names, ""])]
    found, said = splits_of(tmp_path, one_table(tmp_path / "own", rows))
    assert {split: clips for split, (clips, _) in found.items()} == {"train": 1, "dev": 2, "test": 5}
    assert "2 clips, such as ada/7-stress-test.wav, of no split that is named: left out" in said


LONG = np.random.default_rng(0).uniform(-0.1, 0.1, 8 * RATE)
ODE, HEAD = "Ad\u00e9", "file_name,text,speaker,gender,accent\n"
LEFT_OUT = "undecodable audio .*convert it with ffmpeg.*"
NEMO = '{{"audio_filepath": "{}", "offset": {}, "duration": 2.0, "text": "{}"}}\n'.format
VOICE = "client_id\tpath\tsentence\taccents\tage\n{}\tcv_{}.mp3\t{}\tEast Africa\tthirties\n".format
OTHERS = "f.DSS", "g.m4b", "h.3ga", "i.spx", "j.mp2", "k.avi"
LAYOUTS = "nemo", "common voice"  # those of other programs, each a corpus of its own
OWN_SPLITS = *LAYOUTS, "train-clean-100", "dev_clean"  # the others lie in a folder "test"


def good(*names):
    return dict.fromkeys(names, GOOD)


# folder: ({file: content, {DIR} in it the folder}, {clip of test, or split and clip: text, or text, speaker, gender and
# accent}, {clip: why it is left out})
ODD = {
    "parts": ({"metadata.csv": "file_name,start,end,text\nlong.wav,0.0,2.0,one\nlong.wav,6,8,two\nlong.wav,,1.5,x\n"
               "long.wav,7,8.4,four\nlong.wav,7,9,late\nlong.wav,9,,later\nlong.wav,0:01,3,x\nlong.wav,3,3,y\n"
               "long.wav,,,z\nlong.wav,0,2,again\nlong.wav,-1,2,before\n", "long.wav": sound(LONG)},
              {"long.wav#t=0,2": "one", "long.wav#t=6,8": "two", "long.wav#t=7,8.4": "four"},
              {"long.wav#t=7,9": "cut off .*after 8.0 s, its stretch is 7.0 to 9.0 s.*",
               "long.wav": "no stretch of a recording: .*", "long.wav#t=0,2": "a second row of this clip"}),
    "offsets": ({"metadata.csv": "sep=;\nfile_name;offset;duration;text\nlong.wav;0,5;1,5;one\nlong.wav;2;1;two",
                 "long.wav": sound(LONG)}, {"long.wav#t=0.5,2": "one", "long.wav#t=2,3": "two"}, {}),
    "twice": ({"metadata.csv": f"{HEAD}a.wav,old\nb.wav,same\na.wav,new\nb.wav,same", **good("a.wav", "b.wav")},
              {"a.wav": "old", "b.wav": "same"}, dict.fromkeys(("a.wav", "b.wav"), "a second row of this clip")),
    "excel": ({"metadata.csv": '"sep=;"\r\nfile_name;text\r\na.wav;one, two', **good("a.wav")},
              {"a.wav": "one, two"}, {}),
    "blank": ({"metadata.csv": HEAD + "a.wav,one\n" + " ,,,\n" * 500, **good("a.wav")}, {"a.wav": "one"}, {}),
    "names": ({"metadata.csv": f"{HEAD}{ODE}.wav,one\nb\\c.wav,two\n{{DIR}}/d.wav,three\n/etc/hostname,x\n"
               "../../../x.wav,x", **good("Ade\u0301.wav", "b/c.wav", "d.wav")},
              {"Ade\u0301.wav": "one", "b/c.wav": "two", "d.wav": "three"}, {}),
    "kinds": ({"metadata.csv": f"{HEAD}a.ds2,one\n.b.wav,two\n.c/d.wav,three\n", "a.ds2": b"\x03ds2" * 99,
               **good(".b.wav", ".c/d.wav", ".Trash-1000/e.wav"), "notes.ass": b"", "more/script.ts": b"",
               **dict.fromkeys(OTHERS, b"x" * 99)},
              {}, {"a.ds2": LEFT_OUT, **dict.fromkeys((".b.wav", ".c/d.wav"), "no audio"),
                   **dict.fromkeys(OTHERS, "no transcript")}),
    "cells": ({"metadata.csv": f"{HEAD}a.wav ,x,anna ,Male,Igbo\nb.wav,x,anna,male,igbo \nc.wav,x,12,male,igbo\n"
               f"d.wav,x,12.0,MALE,IGBO\ne.wav,x,Ade\u0301,\u00a0,\nf.wav,12.0,{ODE},,\n", "g/metadata.jsonl":
               '{"file_name": "g.wav", "text": "x", "speaker": 12.0}\n'
               '{"file_name": "h.wav", "text": "x", "speaker": "ANNA"}',
               **good("a.wav", "b.wav", "c.wav", "d.wav", "e.wav", "f.wav", "g/g.wav", "g/h.wav")},
              {**dict.fromkeys(("a.wav", "b.wav"), ("x", "anna", "male", "igbo")), "e.wav": ("x", ODE, "", ""),
               **dict.fromkeys(("c.wav", "d.wav"), ("x", "12", "male", "igbo")), "f.wav": ("12.0", ODE, "", ""),
               "g/g.wav": ("x", "12"), "g/h.wav": ("x", "ANNA")}, {}),
    "train-clean-100": ({"metadata.csv": f"{HEAD}a.wav,one", **good("a.wav")}, {"train a.wav": "one"}, {}),
    "dev_clean": ({"metadata.csv": f"{HEAD}a.wav,one", **good("a.wav")}, {"dev a.wav": "one"}, {}),
    "nemo": ({"train_manifest.json": NEMO("wav/long.wav", 0, "one") + NEMO("wav/long.wav", 2.5, "two"),
              "lists/dev.jsonl": NEMO("{DIR}/wav/a.wav", 0.5, "three"), "lists/test.json": NEMO("../wav/a.wav", 0, "x"),
              "results/predictions_test.jsonl": '{"audio_filepath": "wav/a.wav", "text": "y", "pred_text": "z"}',
              "package.json": '{"name": "x", "path": "y"}', "wav/long.wav": sound(LONG), **good("wav/a.wav")},
             {"train wav/long.wav#t=0,2": "one", "train wav/long.wav#t=2.5,4.5": "two",
              "dev wav/a.wav#t=0.5,2.5": "three", "wav/a.wav#t=0,2": "x"}, {}),
    "common voice": ({**{f"en/{split}.tsv": VOICE(split, split, f'"A {split}') for split in SPLITS},
                      **{f"en/{name}.tsv": VOICE(name, "test", "not this") for name in ("validated", "invalidated")},
                      **{f"en/clips/cv_{split}.mp3": BAD_CLIPS["mp3"][0] for split in SPLITS}},
                     {f"{split} en/clips/cv_{split}.mp3".removeprefix("test "): (f'"A {split}', split)
                      for split in SPLITS}, {}),
}  # fmt: skip
WARNINGS = ["2 rows, such as of parts/test/long.wav(?:#t=0,2)?, with another text than a row before",
            "2 speakers, such as (?:anna and ANNA|ANNA and anna), differ in case alone"]  # fmt: skip


@pytest.fixture(scope="module")
def odd_tables(tmp_path_factory):
    """A preparation of a folder of odd tables, and of other programs' layouts."""
    folder, left_out, said = tmp_path_factory.mktemp("odd"), [], ""
    for name, (files, *_) in ODD.items():
        place = folder / (name if name in LAYOUTS else "own") / name / ("" if name in OWN_SPLITS else "test")
        for file, content in files.items():
            write(place / file, content.replace("{DIR}", str(place)) if isinstance(content, str) else content)
    for corpus in ("own", *LAYOUTS):
        said += succeeded(run_main(folder, *PREPARE, "--dataset", corpus)).stderr
        left_out += skipped(folder / "out")
    rows = [row for row in helpers.rows_in(folder / "audio") if not row["problem"]]
    return SimpleNamespace(rows=rows, skipped=left_out, stderr=said)


@pytest.mark.parametrize("name", ODD)
def test_an_odd_table_gives_the_clips_that_it_means(odd_tables, name):
    def short(split, clip):
        return f"{split} {clip.removeprefix(f'{name}/')}".removeprefix("test ").removeprefix("test/")

    _, used, left_out = ODD[name]
    rows = [row for row in odd_tables.rows if row["clip"].startswith(f"{name}/")]
    mine = {short(row["split"], row["clip"]): row for row in rows}
    assert mine.keys() == used.keys() and len(mine) == len(rows)
    for clip, row in mine.items():
        expected = (used[clip],) if isinstance(used[clip], str) else used[clip]
        assert tuple(row[column] for column in ("text", "speaker", "gender", "accent"))[: len(expected)] == expected
        if "long.wav#t=" in clip:
            start, end = clip.split("=")[1].split(",")
            stretch = LONG[round(float(start) * RATE) : round(float(end) * RATE)]
            assert np.abs(helpers.heard(row["audio"]) - stretch).max() < 1e-4
    found = [(short(split, clip), why) for split, clip, why in odd_tables.skipped if clip.startswith(f"{name}/")]
    assert {clip for clip, _ in found} == left_out.keys()
    assert all(re.fullmatch(left_out[clip], why) for clip, why in found), found


def test_what_is_odd_is_said_once(odd_tables):
    for pattern in WARNINGS:
        assert len(re.findall(pattern, odd_tables.stderr)) == 1, odd_tables.stderr
    assert {("test", clip, "no audio") for clip in ("/etc/hostname", "../x.wav")} <= set(odd_tables.skipped)


def scored_files(folder):
    return {clip_file(row["audio_filepath"]) for row in scored_clips(folder / "out/results")}


@pytest.mark.parametrize("kind", KINDS)
def test_flags_choose_clips_and_a_limit_draws_them_by_the_seed(kind, runs, corpora, tmp_path):
    test = runs(kind).texts

    def scored(*flags):
        paths = ["--eval_only", "--data_dir", runs(kind).folder / "audio"]
        succeeded(run_main(tmp_path, *flags_of(corpora[kind], *paths, *flags)))
        return scored_files(tmp_path)

    for flags, columns in (
        (["--accents", "Akan (Fante)"], {"accent": "akan (fante)"}),
        (["--countries", "na", "--domains", "Clinical"], {"country": "NA", "domain": "clinical"}),
    ):
        of_each = [{file for file, row in test.items() if row[column] == name} for column, name in columns.items()]
        chosen = set.intersection(*of_each)
        assert 0 < len(chosen) < len(test) and scored(*flags) == chosen
        assert len(of_each) == 1 or chosen not in of_each, "each of the flags leaves clips out"
    first, second, again = (scored("--max_test_samples", 5, "--seed", seed) for seed in (1, 2, 1))
    assert len(first) == len(second) == 5 and first == again != second, "another start draws others"
    assert all(drawn not in (set(list(test)[:5]), set(list(test)[-5:])) for drawn in (first, second))


def test_a_clip_in_two_archives_is_used_once_the_first_and_listed(tmp_path):
    archives = []
    for lengths in ({"a": 2}, {"a": 3, "b": 3}, {"b": 2}):  # of the clips, in seconds
        members = [(f"data/data/intron/x/{name}.wav", sound(tone(seconds))) for name, seconds in lengths.items()]
        archives.append(tar(members))
    rows = helpers.as_csv([{"audio_paths": f"/x/{name}.wav", "transcript": TEXT} for name in "ab"])
    folder = helpers.write_part(tmp_path / "own", "zulu", "test", rows, *archives)
    succeeded(run_main(tmp_path, *flags_of(folder, "--eval_only")))
    lengths = {row["audio_filepath"]: row["duration"] for row in scored_clips(tmp_path / "out/results")}
    assert lengths == {"x/a.wav": 2, "x/b.wav": 3}
    assert skipped(tmp_path / "out") == [("test", f"x/{name}.wav", "a second copy") for name in "ab"]


def test_a_dry_run_counts_without_fetching_audio(hub, online, tmp_path):
    flags = ["--dry_run", "--accents", "damara", "akan-fante", "--output_dir", "out", "--max_train_samples", 20]
    done = succeeded(online.run(*flags, cwd=tmp_path))
    assert hub.count("*.tar.gz") == 0
    corpus = hub.folders["datasets", DATASET]
    size = sum(path.stat().st_size for path in corpus.rglob("*.tar.gz"))
    assert f"to fetch {size / 1e9:.2f} GB in 5 archives" in done.stdout
    for split, count in (("train", 30), ("dev", 6), ("test", 18)):
        seconds = sum(
            float(row["duration"]) for path in corpus.rglob(f"*/{split}.csv") for row in helpers.read_csv(path)
        )
        assert re.search(rf"{split} +{count} clips +{seconds / 3600:.2f} h", done.stdout), done.stdout
    assert re.search("akan .fante. +10 clips", done.stdout)
    assert re.search("10 updates, 1 an epoch, of 32 clips", done.stdout)
    assert not list(tmp_path.rglob("*.arrow")) and not (tmp_path / "out").exists()
