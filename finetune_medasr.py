#!/usr/bin/env python3
"""Fine-tune Google's MedASR on AfriSpeech-200, African-accented clinical and general English.

    python finetune_medasr.py --demo                                    # the whole job in small, offline, in minutes
    python finetune_medasr.py                                           # MedASR on all of AfriSpeech-200
    python finetune_medasr.py --accents yoruba igbo --domains clinical  # a part of it
    python finetune_medasr.py --dataset ./recordings                    # your own recordings
    python finetune_medasr.py --transcribe visit.wav recordings/        # with the model that a run has made
    torchrun --nproc_per_node 8 finetune_medasr.py

Archives, audio or parquet -> FLAC in Arrow files -> batches of log-mels -> LasrForCTC -> text -> error rates -> report
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("finetune_medasr.py: error: this needs Python 3.11 or newer, not Python " + sys.version.split()[0])

import argparse
import contextlib
import copy
import csv
import dataclasses
import difflib
import errno
import functools
import glob
import gzip
import hashlib
import html
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import tarfile
import tempfile
import textwrap
import threading
import time
import unicodedata
import warnings
import zlib
from collections import Counter, namedtuple
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_type_hints

try:
    import numpy as np
except ImportError as missing:
    sys.exit(f"finetune_medasr.py: error: {missing}: pip install -r requirements.txt")


@dataclass(frozen=True)
class Lazy:
    """A module that is imported when it is first used: the processes that convert audio should not pay for torch."""

    name: str

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self.name), attribute)


accelerate, datasets, evaluate, filelock, httpx2 = map(Lazy, "accelerate datasets evaluate filelock httpx2".split())
jiwer, librosa, medwer, pandas, soundfile = map(Lazy, "jiwer librosa medwer pandas soundfile".split())
arrow_writer, torch, tqdm, transformers, yaml = map(Lazy, "datasets.arrow_writer torch tqdm transformers yaml".split())
hub, hub_errors, parquet = map(Lazy, "huggingface_hub huggingface_hub.errors pyarrow.parquet".split())

PROGRAM = "finetune_medasr.py"
FIXTURES = Path(__file__).resolve().parent / "tests" / "fixtures"
DEFAULT_MODEL = "google/medasr"
DEFAULT_DATASET = "intronhealth/afrispeech-200"
DEFAULT_DATASET_REVISION = "b538c6e111914a812af28ff677f8cffc9b404b7d"  # earlier ones lack texts of dev and test
LM_FILE = "lm_6.kenlm"  # in MedASR's repository: a 6-gram of its tokenizer's pieces
SAMPLE_RATE = 16_000  # Hz, what MedASR's feature extractor expects
SPLITS = ("train", "dev", "test")
WINDOW_OVERLAP_SECONDS = 2.0  # a side, as in the model card's pipeline call (chunk_length_s=20, stride_length_s=2)
ROOM_ADVICE = "free some disk; the same command goes on"
# What gloo and NCCL say in the processes that are left.
LOST_PROCESS = re.compile(r"Connection (closed|reset) by peer|remote process exited|NCCL communicator was aborted")


class RunError(Exception):
    """Something that went wrong, in words for the user: exit status 1."""


class UsageError(RunError):
    """A flag or combination that cannot work: exit status 2."""


class Stopped(KeyboardInterrupt):
    """A signal that ends the program, where it may: exit status 128 and its number."""


def say(text="", stream=None):
    """Print once, not once a process; to standard output if no `stream` is given."""
    if os.environ.get("RANK", "0") == "0":
        print(redact(text), file=stream, flush=True)


def warn(text, kind="warning"):
    say(f"{PROGRAM}: {kind}: {' '.join(redact(text).split())}", sys.stderr)


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")


def plural(count, noun):
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


@contextlib.contextmanager
def explained(what, advice="", kind=RunError):
    """Turn exceptions that are not explained yet into a `kind` in one line: `what`, the exception, `advice` if any."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RunError) or is_full_memory(error) or LOST_PROCESS.search(str(error)):
            raise
        raise kind(f"{what} ({one_line(error)}){advice and ': '}{advice}") from error


def is_full_memory(error):
    """Whether an exception says, in any library's words, that a GPU's memory is full."""
    return isinstance(error, RuntimeError) and bool(re.search("out of memory|_ALLOC_FAILED", str(error)))


def is_full_disk(error):
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def redact(text):
    """`text` without tokens (of the environment, URLs and flags, what looks like the Hub's), harmless to print."""
    text = text.replace(os.environ.get("HF_TOKEN") or "\0", "***")
    text = re.sub(r"(?<=://)[^/@\s]+(?=@)|\bhf_\w{4,}|(?:(?<=[_-]token[= ])|(?<=[_-]token: ))\S+", "***", text)
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)  # they could move a terminal's cursor


def public(value):
    """`value` (JSON, or text) without tokens, and with absolute paths cut to their names: people publish it."""
    if isinstance(value, dict):
        return {name: public(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(item) for item in value]
    return re.sub(r"^(--[\w-]+=)?(?:[/~].*/|/)(?=.)", r"\1", redact(value)) if isinstance(value, str) else value


def digest(content):
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def slugify(name):
    """A name as part of a path, an accent's in the Hub repository too: 'Akan (Fante)' -> 'akan-fante'."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def file_stem(name):
    """What a dataset is called in files and folders; a slug alone leaves nothing of other alphabets."""
    return f"{slugify(name)}-{'' if name.isascii() else digest(name)[:8]}".strip("-")


def read_json(path):
    """What a JSON object that this program or the Trainer wrote holds; None if it is not there, or not whole."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))


@contextlib.contextmanager
def complete(target):
    """The name of a file or folder to write, which takes the place of `target` when complete; no half is left."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        shutil.rmtree(target, ignore_errors=True)  # nothing where it is a file
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)


def write_text(path, text):
    with explained(f"{path} cannot be written", ROOM_ADVICE), complete(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8")


class StopSignals:
    """SIGTERM and Ctrl-C raise Stopped; inside of `with` they leave their `number`, for all processes to agree."""

    depth, number, since, process = 0, 0, 0.0, 0  # `since` and `process`: when the first came, and whom it concerns

    def install(self):
        self.depth, self.number, self.process = 0, 0, os.getpid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        # torchrun and Slurm pass on a signal that the processes may have got themselves.
        is_passed_on = self.number and "RANK" in os.environ and time.monotonic() - self.since < 5
        if is_passed_on or os.getpid() != self.process:  # a worker of ours, which inherits this
            return
        if self.number:
            os.write(2, f"\n{PROGRAM}: error: ended by a second {signal.Signals(number).name}\n".encode())
            os._exit(128 + number)
        self.number, self.since = number, time.monotonic()
        if not self.depth:
            raise Stopped(number)

    def __enter__(self):
        self.depth += 1

    def __exit__(self, *_):
        self.depth -= 1


STOP_SIGNALS = StopSignals()


def agreed(number, choose=min):
    """The smallest (or what `choose` takes) of the processes' integers, the same in each of them."""
    return choose(accelerate.utils.gather_object([int(number)]))


@functools.cache
def mixed(*kinds):
    """A class of `kinds`, mixins first, named as the last: how classes here extend bases that are slow to import."""
    return type(kinds[-1].__name__, kinds, {})


# ---------------------------------------------------------------- settings

# What the value of a flag must be, in words and as a test.
Number, MIN_WINDOW = TypeVar("Number"), 3 * WINDOW_OVERLAP_SECONDS
Positive = Annotated[Number, "above 0", lambda value: 0 < value < math.inf]
NotNegative = Annotated[Number, "0 or more", lambda value: 0 <= value < math.inf]
WindowSeconds = Annotated[float, f"at least {MIN_WINDOW:g}", lambda value: MIN_WINDOW <= value < math.inf]
Share = Annotated[float, "from 0 to 1", lambda value: 0 <= value <= 1]
Batch = Annotated[str, "a number of clips above 0, or auto", re.compile(r"auto|0*[1-9]\d*").fullmatch]
Updates = Annotated[int, "above 0, or -1 for --num_train_epochs", lambda value: value > 0 or value == -1]
Seed = Annotated[int, "from 0 to 2**32 - 1", range(2**32).__contains__]
# Of TrainingArguments' other flags: the collator reads columns that are not arguments of the model.
FIXED = {"remove_unused_columns": False, "length_column_name": "num_samples", "label_smoothing_factor": 0.0}
# These would give an update fewer clips, or none.
FIXED |= dict.fromkeys(("auto_find_batch_size", "dataloader_drop_last"), False)
BEST_METRICS = ("wer", "cer", "loss", "wer_by_domain/clinical", "wer_by_domain/general")
OTHER_RULES = {name: (f"{value}: leave the flag out", value.__eq__) for name, value in FIXED.items()}
OTHER_RULES["metric_for_best_model"] = ", ".join(BEST_METRICS), lambda name: name.removeprefix("eval_") in BEST_METRICS
# What the Trainer needs for this job. disable_tqdm's default follows the libraries' log level.
TRAINING_DEFAULTS = dict(eval_strategy="steps", save_strategy="steps", load_best_model_at_end=True, disable_tqdm=False)
TRAINING_DEFAULTS |= dict(metric_for_best_model="wer", greater_is_better=False, report_to=["tensorboard"])
TRAINING_DEFAULTS |= dict(train_sampling_strategy="group_by_length", **FIXED)
AUTO_BATCH_SIZE = 8  # clips a step without a GPU; times the accumulation steps, what an update has on each device
MODES = ("prepare_only", "dry_run", "eval_only", "score_file", "transcribe")  # without training
EXCLUSIVE = [MODES, ("also_score", "score_file", "transcribe"), ("lm", "score_file"), ("tune_lm", "transcribe")]
EXCLUSIVE += [("max_train_samples", "streaming"), ("replay", "streaming")]
EXCLUSIVE += [("interpolate", mode) for mode in MODES[2:]]
NEEDS = dict.fromkeys(("transcript_dir", "transcript_format", "format_dictation"), "transcribe")
NEEDS |= {"tune_lm": "lm", "streaming": "max_steps"}  # a stream has no epochs to count
# What a run makes in --output_dir: it replaces these, and --overwrite_output_dir deletes them.
MADE_BY_A_RUN = re.compile(r"(?:final|results|runs|run\.json|checkpoint-\d+)(?:/|$)")
DEMO_FLAGS = ["--model", f"{FIXTURES}/model", "--dataset", f"{FIXTURES}/corpus"]
DEMO_FLAGS += """--output_dir ./medasr-demo --data_dir ./medasr-demo/audio --learning_rate 2e-3 --max_steps 120
    --gradient_accumulation_steps 2 --warmup_steps 15 --eval_steps 40 --save_steps 40 --logging_steps 5
    --dataloader_num_workers 0 --spec_augment false""".split()  # a model this small underfits masked audio


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class TrainingFlags:
    """The `TrainingArguments` fields that people change, with this script's defaults."""

    _argument_group_name = "training (any other field of transformers' TrainingArguments works too: --help_all)"
    output_dir: str = flag("./medasr-afrispeech-200", "where checkpoints, results, logs and the final model go")
    learning_rate: Positive[float] = flag(3e-5, "peak learning rate of AdamW")
    per_device_train_batch_size: Batch = flag("auto", "clips a step and device; auto: 32 an update, in steps that fit")
    per_device_eval_batch_size: Batch = flag("auto", "clips or windows when scoring; auto: as many seconds as fit")
    gradient_accumulation_steps: Positive[int] = flag(4, "steps whose gradients make one update")
    num_train_epochs: Positive[float] = flag(10.0, "passes over the training clips")
    max_steps: Updates = flag(-1, "updates in all; overrides the epochs if positive")
    warmup_steps: NotNegative[float] = flag(500, "updates (below 1: share of them) over which the learning rate rises")
    eval_steps: Positive[int] = flag(500, "updates between two evaluations on dev")
    save_steps: Positive[int] = flag(500, "updates between two checkpoints; a multiple of --eval_steps")
    logging_steps: Positive[int] = flag(25, "updates between two logged training losses")
    save_total_limit: NotNegative[int] = flag(4, "checkpoints kept, the best among them")
    # Declared bool so that a bare --fp16 works; None means: where there is a CUDA GPU and no --bf16.
    fp16: bool = flag(None, "float16 where that is safe, float32 elsewhere; on where there is a CUDA GPU")
    bf16: bool = flag(False, "bfloat16 mixed precision instead of float16")
    gradient_checkpointing: bool = flag(False, "recompute activations to save GPU memory")
    dataloader_num_workers: NotNegative[int | None] = flag(None, "processes that decode audio; up to 8, by cores")
    resume_from_checkpoint: str | None = flag(None, "a checkpoint's folder; the newest complete one if not given")
    seed: Seed = flag(42, "seed of everything random")


@dataclass
class ScriptFlags:
    """The script's own flags; with `TrainingFlags` and `TrainingArguments` as bases, all settings of a run, checked."""

    _argument_group_name = "this script"
    model: str = flag(DEFAULT_MODEL, "Hub id or local folder of the model")
    model_revision: str | None = flag(None, "branch, tag or commit of the model")
    dataset: str = flag(DEFAULT_DATASET, "Hub id or local folder, AfriSpeech-200's layout or your own; :NAME a config")
    dataset_revision: str | None = flag(None, f"commit of the corpus; {DEFAULT_DATASET_REVISION[:7]} of AfriSpeech-200")
    text_column: str | None = flag(None, "the column of your own recordings' texts, where it cannot be told")
    data_dir: str = flag("./afrispeech-200-16khz", "where prepared 16 kHz audio is kept, of any number of corpora")
    accents: list[str] | None = flag(None, "only these accents, e.g. yoruba 'akan (fante)'")
    domains: list[str] | None = flag(None, "only these domains: clinical, general")
    countries: list[str] | None = flag(None, "only these countries, two-letter codes, e.g. NG KE")
    max_train_seconds: Positive[float] = flag(30.0, "leave longer clips out of training, in seconds")
    max_train_samples: Positive[int | None] = flag(None, "train on a random choice of so many clips")
    max_eval_samples: Positive[int | None] = flag(None, "evaluate on a random choice of so many dev clips")
    max_test_samples: Positive[int | None] = flag(None, "score a random choice of so many test clips")
    target_text: Literal["as_written", "words"] = flag("as_written", "train on the transcript, or on lower-case words")
    spec_augment: bool = flag(True, "mask stretches of time and frequency in training (--no_spec_augment: do not)")
    overwrite_output_dir: bool = flag(False, "start anew: delete what an earlier run left in --output_dir")
    early_stopping_patience: NotNegative[int] = flag(3, "stop after so many evaluations without a better WER; 0 never")
    skip_baseline: bool = flag(False, "do not score the untouched model first")
    window_seconds: WindowSeconds = flag(20.0, "score longer clips in overlapping windows of so many seconds")
    num_proc: Positive[int | None] = flag(None, "processes that prepare audio; all cores if not given")
    keep_archives: bool = flag(False, "keep the downloaded archives after they are converted")
    also_score: list[str] | None = flag(None, "test sets, Hub datasets or folders, scored too: what the model forgets")
    replay: str | None = flag(None, "mix this corpus into training too, DATASET or DATASET:SHARE (0.25): forgets less")
    interpolate: Share = flag(1.0, "share of the fine-tuned in the final model, the rest is the base: forgets less")
    streaming: bool = flag(False, "train on audio straight from the Hub, keeping none of it; needs --max_steps")
    prepare_only: bool = flag(False, "download and convert the audio, then stop")
    dry_run: bool = flag(False, "say what a run would do: clips, hours, disk, updates; no audio is fetched")
    eval_only: bool = flag(False, "score --model on the test split, then stop")
    score_file: str | None = flag(None, "report on any system's texts: JSON lines or CSV with text and pred_text")
    transcribe: list[str] | None = flag(None, "print the text of audio files, folders, patterns or - (standard input)")
    transcript_format: Literal["text", "json", "srt", "vtt"] = flag("text", "of --transcribe; json: words with times")
    transcript_dir: str | None = flag(None, "write --transcribe's texts into this folder; those that are there stay")
    format_dictation: bool = flag(False, "write dictated {period}, {new paragraph} ... as what they stand for")
    lm: str | None = flag(None, f"decode with this n-gram of the model's tokens too; auto: {LM_FILE} of the model")
    lm_weight: NotNegative[float] = flag(0.5, "what a log-probability of --lm counts beside one of the model")
    lm_word_score: float = flag(1.5, "what each token adds to a text's score: --lm alone prefers short ones")
    lm_beam: Positive[int] = flag(8, "hypotheses that the search with --lm keeps at each frame")
    tune_lm: bool = flag(False, "choose --lm_weight and --lm_word_score on dev before the test clips are scored")
    demo: bool = flag(False, "run the whole job on the small model and corpus in tests/fixtures, offline")

    def __post_init__(self):
        for problem in filter(None, self.problems()):
            raise UsageError(problem)
        self.is_first = os.environ.get("RANK", "0") == "0"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.num_proc = self.num_proc or cores
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = min(8, cores - 1)
        train, evaluation = self.per_device_train_batch_size, self.per_device_eval_batch_size
        self.auto_train_batch, self.auto_eval_batch = train == "auto", evaluation == "auto"
        self.per_device_train_batch_size = AUTO_BATCH_SIZE if train == "auto" else int(train)
        self.per_device_eval_batch_size = AUTO_BATCH_SIZE if evaluation == "auto" else int(evaluation)
        if self.fp16 is None:
            self.fp16 = torch.cuda.is_available() and not (self.use_cpu or self.bf16)
        super().__post_init__()
        self.upload, self.push_to_hub = self.push_to_hub, False  # at the end, and what is complete
        if self.hub_token:
            # Kept in the environment alone: the Trainer pickles its arguments into every checkpoint.
            os.environ["HF_TOKEN"], self.hub_token = self.hub_token, None
        if (count := self.n_gpu) > 1:  # nn.DataParallel, the Trainer's way, is slower than one process a GPU
            say(f"{count} GPUs are here and one is used; for all: torchrun --nproc_per_node {count} {PROGRAM}")
            self._n_gpu = 1

    def __reduce__(self):
        """As a plain TrainingArguments, in training_args.bin, which can be read without this script."""
        plain = transformers.TrainingArguments
        return object.__new__, (plain,), {item.name: getattr(self, item.name) for item in dataclasses.fields(plain)}

    def to_dict(self):
        return public(super().to_dict())

    @property
    def clips_an_update(self):
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def splits(self, on_disk=False):
        """The splits of a run; `on_disk` those whose audio has to lie there: a stream keeps none of the training's."""
        splits = SPLITS[1 if self.tune_lm else 2 :] if self.eval_only else SPLITS
        return splits[1:] if on_disk and self.streaming and "train" in splits else splits

    @property
    def replayed(self):
        """(the dataset of --replay, its share of the training clips), (None, 0) without the flag."""
        found = re.fullmatch(r"(.+):(0?\.\d*[1-9]\d*)", self.replay or "")
        return (found[1], float(found[2])) if found else (self.replay, 0.25 if self.replay else 0)

    def problems(self):
        """Yield for each check a line with the flag, the value and the valid ones, or something false if it passes."""
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value, rule = getattr(self, name), getattr(hint, "__metadata__", None) or OTHER_RULES.get(name)
            words, is_good = rule or ("finite", lambda value: not isinstance(value, float) or math.isfinite(value))
            yield value is not None and not is_good(value) and f"--{name} is {value}; it must be {words}"
        for name in ("fsdp", "deepspeed"):
            is_on = getattr(self, name) or os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true"
            yield is_on and f"--{name} is not supported: this model needs no sharding; torchrun gives each GPU a copy"
        by_length = self.train_sampling_strategy == "group_by_length"
        yield self.replay and not by_length and "--replay mixes clips by length: leave --train_sampling_strategy out"
        sets = Counter([*SPLITS, "replay", *map(file_stem, map(public, self.also_score or ()))])
        name, count = sets.most_common(1)[0]
        yield count > 1 and f"--also_score has {name} twice, or it is the name of a split or replay; give another path"

        output, written = Path(self.output_dir).expanduser().resolve(), ("output_dir", "data_dir", "transcript_dir")
        read = ("model", "dataset", "resume_from_checkpoint") if self.overwrite_output_dir else ()
        for name in [name for name in (*written, *read) if getattr(self, name) is not None]:
            path = Path(given := getattr(self, name)).expanduser().resolve()
            found = next(parent for parent in (path, *path.parents) if parent.exists())
            if name in written and not (given.strip() and found.is_dir() and os.access(found, os.W_OK | os.X_OK)):
                yield f"--{name} is '{given}': {found} is no folder that can be written to; choose another"
            if MADE_BY_A_RUN.match(os.path.relpath(path, output)):
                yield f"--{name} {given} is what a run under --output_dir {output} replaces or deletes"
        given = {item.name for item in dataclasses.fields(self) if getattr(self, item.name) != item.default}
        for together in [[f"--{name}" for name in names if name in given] for names in EXCLUSIVE]:
            yield len(together) > 1 and f"{' and '.join(together)} cannot be used together; choose one"
        for name, needed in NEEDS.items():
            yield name in given and needed not in given and f"--{name} needs --{needed}: give both, or neither"
        yield self.lm not in (None, "auto") and not Path(self.lm).is_file() and f"--lm is {self.lm}: no such file"
        yield self.lm and not importlib.util.find_spec("flashlight") and "--lm needs: pip install flashlight-text"
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        yield self.fp16 and not on_gpu and "--fp16 needs a CUDA GPU; leave it out"
        yield self.full_determinism and on_gpu and "--full_determinism: a GPU has none for CTC's loss; leave it out"
        if self.transcribe:
            find_recordings(self)


def as_flags(settings):
    """The command line that a dict stands for: {"learning_rate": 1e-5} is --learning_rate 1e-5."""
    flags = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{name}", *map(str, values)] if value is not None else []
    return flags


def parse_settings(argv):
    """The settings of a command line, one object over transformers' own; raises UsageError."""
    command = redact(shlex.join(["python", PROGRAM, *map(public, argv)]))
    if argv and not argv[0].startswith("-"):
        with explained(f"{argv[0]} is no YAML file of lines 'flag: value'", kind=UsageError):
            argv = as_flags(dict(yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8")) or {})) + argv[1:]
    quiet = "TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_PROGRESS_BARS=1"
    warnings.simplefilter("ignore")  # the script says itself what a user needs to know
    # TensorBoard writes in a thread, and raises the same in the program itself.
    threading.excepthook = lambda failed: is_full_disk(failed.exc_value) or threading.__excepthook__(failed)
    # OpenMP's waiting threads spin: many times slower where another process wants the core. The demo's needs but one.
    threads = "OMP_WAIT_POLICY=PASSIVE" + " OMP_NUM_THREADS=1" * ("--demo" in argv)
    for variable in f"{quiet} {threads}".split():
        os.environ.setdefault(*variable.split("="))
    transformers.logging.disable_progress_bar()
    argv = DEMO_FLAGS * ("--demo" in argv) + argv
    texts = {"prog": PROGRAM, "usage": "%(prog)s [FILE.yaml] [flags]", "description": __doc__.split("\n\n")[0]}
    layout = functools.partial(argparse.HelpFormatter, max_help_position=36, width=150)
    training = dataclass(mixed(TrainingFlags, transformers.TrainingArguments))
    options = dict(allow_abbrev=False, exit_on_error=False, formatter_class=layout, **texts)
    parser = transformers.HfArgumentParser([ScriptFlags, training], **options)
    parser.add_argument("--help_all", action="help", help="show every flag, those of TrainingArguments included")
    parser.set_defaults(**TRAINING_DEFAULTS)
    shown = {"help", "help_all", *vars(ScriptFlags), *vars(TrainingFlags)}
    for action in parser._actions:
        action.option_strings = [max(action.option_strings, key=len)]
        if "--help_all" not in argv and action.dest not in shown:
            action.help = argparse.SUPPRESS
        elif action.default not in (None, False, argparse.SUPPRESS):
            action.help = f"{action.help} (default: {action.default})"
    with explained("these flags cannot be used", kind=UsageError):
        values, unknown = parser.parse_known_args(argv)
        if unknown:
            found = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(found, parser._option_string_actions)
            raise UsageError(f"unknown flag or stray value {found}; try {' or '.join(near) or '--help'}")
        made = Path(values.output_dir).expanduser() / "final"
        if values.transcribe and (made / "config.json").is_file() and not re.search("--model(=| |$)", " ".join(argv)):
            values.model = str(made)
            say(f"transcribing with {made}; --model chooses another", sys.stderr)
        settings = dataclass(mixed(*parser.dataclass_types), repr=False)(**vars(values))
        for callback in transformers.integrations.get_reporting_integration_callbacks(settings.report_to):
            type("", (callback,), {"__del__": lambda _: None})()  # raises without its package; __del__ needs it
    settings.command = command
    return settings


# ---------------------------------------------------------------- Hub


@contextlib.contextmanager
def explained_hub_errors(repo, kind, advice=""):
    """Turn the Hub client's exceptions about `repo` (a "model" or "dataset") into one line that says what to do."""
    try:
        yield
    except (httpx2.HTTPError, OSError, hub_errors.RevisionResolutionError, hub_errors.HFValidationError) as error:
        endpoint, of = Lazy("huggingface_hub.constants").ENDPOINT, "datasets/" * (kind == "dataset")
        account = "your account has no access to it:" if hub.get_token() else "you are not logged in: 'hf auth login',"
        absent = hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError
        unreachable = hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, httpx2.ConnectError
        lacking = hub_errors.RevisionNotFoundError, hub_errors.RevisionResolutionError, hub_errors.EntryNotFoundError
        meanings = {  # some exceptions are kinds of others below them
            hub_errors.GatedRepoError: f"is gated and {account} accept its terms at {endpoint}/{of}{repo}",
            absent: f"is neither a local folder nor on the Hub, or it is private: check --{kind}, or log in",
            unreachable: f"is not on this machine and {endpoint} cannot be reached: try again, or give a local folder",
            lacking: f"has no such revision, or no such file ({one_line(error)}): check --{kind}_revision",
            Exception: f"could not be read ({one_line(error)}): run the same command again, what is finished is kept; "
            "if your token is not valid, 'hf auth login' first, or unset HF_TOKEN",
        }
        meaning = next(meaning for kinds, meaning in meanings.items() if isinstance(error, kinds))
        raise RunError(f"{kind} {repo} {meaning}{advice}") from error


@dataclass
class Repository:
    name: str  # of a dataset on the Hub
    revision: str | None
    folder: Path | None  # that holds it instead
    cache: Path  # of what is downloaded
    files: dict[str, list] = field(default_factory=dict)  # {path: [bytes, sha256 on the Hub, or time of change]}

    def list(self):
        """Have `files`, from the Hub once for each commit; raises RunError."""
        if self.folder:
            with explained(f"{self.folder} cannot be read"):
                for path in filter(Path.is_file, files_below(self.folder)):
                    status = path.stat()
                    self.files[path.relative_to(self.folder).as_posix()] = [status.st_size, status.st_mtime_ns]
            return
        listing = self.cache / "files.json"
        self.files = read_json(listing) or {}
        if self.files and re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            return  # a commit never changes: no network is needed to go on
        bearable = (hub_errors.OfflineModeIsEnabled, httpx2.ConnectError) if self.files else ()
        with explained_hub_errors(self.name, "dataset"), contextlib.suppress(*bearable):
            tree = hub.list_repo_tree(self.name, recursive=True, revision=self.revision, repo_type="dataset")
            files = [one for one in tree if hasattr(one, "size") and not re.search(r"(^|/)\.", one.path)]
            self.files = {one.path: [one.size, one.lfs and one.lfs.sha256] for one in files}
            return write_text(listing, json.dumps(self.files, indent=1))
        say("  the Hub cannot be reached: taken as it was when it was listed last")

    def local(self, path):
        """Where a file lies on this machine, None if it does not, or is of another version."""
        if self.folder:
            return self.folder / path
        cached = hub.try_to_load_from_cache(self.name, path, repo_type="dataset", revision=self.revision)
        places = [place for place in (Path(str(cached)), self.cache / "hub" / path) if place.is_file()]
        return next((place for place in places if place.stat().st_size == self.files[path][0]), None)

    def open(self, path, **options):
        """A file of the repository to read: the local one, or as much of the Hub's as is read of it."""
        place, local = f"datasets/{self.name}@{self.revision or 'main'}/{path}", self.local(path)
        return open(local, "rb") if local else hub.HfFileSystem().open(place, **options)

    def download(self, path, file):
        """Append what `file` lacks of the Hub's, through dropped connections; the client waits out 5xx and 429."""
        stream, size = self.open(path, block_size=0), self.files[path][0]
        stream.loc = file.tell()
        while stream.loc < size:
            for seconds in (1, 2, 4, 8, 16, 0):  # to wait, while the connection drops without a byte of progress
                with contextlib.suppress(httpx2.TransportError):
                    if data := stream.read(1 << 16):
                        break
                stream.response = None  # it connects again, and goes on from the byte reached
                time.sleep(seconds)
            else:
                raise OSError(f"the connection ends after {stream.loc:,} of {size:,} bytes")
            file.write(data)

    def fetch(self, path):
        """The local path of a file, downloaded if need be, going on where that stopped; raises RunError."""
        if local := self.local(path):
            return local
        target, (size, checksum) = self.cache / "hub" / path, self.files[path]
        partial = target.with_name(target.name + ".partial")
        with explained_hub_errors(self.name, "dataset"), filelock.FileLock(f"{partial}.lock"):
            for _ in range(2):
                if self.local(path):  # by another process, meanwhile
                    return target
                with open(partial, "a+b") as file:
                    self.download(path, file)
                    file.seek(0)
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if size == partial.stat().st_size and checksum in (None, found):
                    os.replace(partial, target)
                    return target
                partial.unlink()
        raise RunError(f"{path} was fetched twice and is not what the Hub announces: sha256 {checksum}")


def files_below(folder):
    """The paths of all files below a folder but hidden ones, sorted; raises OSError where a part cannot be read."""
    paths = sorted(path for path in Path(folder).iterdir() if not path.name.startswith("."))
    return [file for path in paths for file in (files_below(path) if path.is_dir() else [path])]


def load_model(settings):
    """The processor and the float32 LasrForCTC that --model names; raises RunError that says what to do."""
    name, folder = settings.model, Path(settings.model).expanduser()
    what, place = f"model {name} cannot be loaded", str(folder) if folder.is_dir() else name
    # trust_remote_code: by default it asks on the terminal. use_safetensors: a pickle runs what it holds.
    options = dict(revision=settings.model_revision, trust_remote_code=False)
    weights = dict(dtype="float32", use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True)
    if not folder.is_dir():
        with explained_hub_errors(name, "model"):  # a gated model shows at its first file
            hub.hf_hub_download(name, "config.json", revision=settings.model_revision)
    with explained(what, "give a folder or Hub id with config.json, *.safetensors and processor"):
        kind = transformers.AutoConfig.from_pretrained(place, **options).model_type
        processor = transformers.AutoProcessor.from_pretrained(place, **options)
        extractor = processor.feature_extractor
        kind += f" with a {type(extractor).__name__} of {extractor.sampling_rate:,} Hz"
        if kind != (expected := f"lasr_ctc with a LasrFeatureExtractor of {SAMPLE_RATE:,} Hz"):
            raise RunError(f"{what}: it is {kind}, not {expected} as MedASR")
        model, loading = transformers.AutoModelForCTC.from_pretrained(place, **options, **weights)
        silence = CTCCollator(extractor)([{"samples": np.zeros(SAMPLE_RATE, np.float32)}])
        model.eval()(**model_inputs(silence, extractor, "cpu"))  # shows what does not fit together
        labels = LabelEncoder(processor.tokenizer, model.config.vocab_size, "as_written")(["patient PATIENT"])[0]
    if unfit := [key for key, *_ in loading["mismatched_keys"]] + sorted(loading["missing_keys"]):  # filled with noise
        raise RunError(f"{what}: it lacks weights of its config.json, such as {unfit[:1]}")
    if broken := not_finite(model):
        raise RunError(f"{what}: it holds weights that are not finite, in {broken}")
    if not decode_ids(processor, labels):
        raise RunError(f"{what}: its tokenizer is not for its vocabulary")
    return processor, model


def not_finite(model):
    """The name of a floating-point weight or statistic of `model` that is not finite, "" if there is none."""
    tensors = model.state_dict().items()
    return next((name for name, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()), "")


def push_to_hub(settings, final=None):
    """Make the repository that --push_to_hub means, and upload the folder `final`, if given, in one commit."""
    name = settings.hub_model_id or Path(settings.output_dir).resolve().name
    advice = f"the model is complete in {final}, 'hf upload' sends it" if final else "run 'hf auth login' to write"
    with explained(f"--push_to_hub: {name} cannot be written on the Hub", advice):
        repo = hub.create_repo(name, private=settings.hub_private_repo, exist_ok=True)
        if final:
            hub.upload_folder(repo_id=repo.repo_id, folder_path=final, commit_message="Upload the final model")
            say(f"uploaded to {repo}")


# ---------------------------------------------------------------- tables

GROUP_COLUMNS = ("speaker", "accent", "country", "domain", "gender", "age_group")
# The columns of every table of clips, beside num_samples, the length at 16 kHz. `problem` is why one cannot be used.
CLIP_COLUMNS = ("clip", "text", *GROUP_COLUMNS, "split", "problem")
# What a table says of a clip -> the names that its column may have: AfriSpeech-200's, NeMo's and other people's.
COLUMNS = {name: (name,) for name in (*GROUP_COLUMNS, "split", "pred_text", "baseline_text")} | {
    "clip": ("file_name", "audio_paths", "audio_path", "audio_filepath", "path"),
    "text": ("text", "sentence", "transcript", "transcription"),
    "speaker": ("speaker", "speaker_id", "user_ids", "user_id", "client_id"),
    "accent": ("accent", "accents"),
    "gender": ("gender", "sex"),
    "age_group": ("age_group", "age"),
    "start": ("start", "start_time", "offset", "begin"),
    "end": ("end", "end_time", "stop"),
    "duration": ("duration", "seconds"),
}
TIMES = ["start", "end"]  # in seconds, of a clip that is a stretch of a recording
SPLIT_NAMES = {"train": "train training", "dev": "dev validation valid val", "test": "test testing eval evaluation"}


@functools.cache
def split_in(path):
    """The split that a folder of a path, or a word in it as datasets takes them, stands for; "" if none does."""
    words = [*path.lower().split("/")[:-1], *re.split(r"[-._ \d/]+", path.lower())]
    return next((split for word in words for split, names in SPLIT_NAMES.items() if word in names.split()), "")


def read_table(path, text_column=None, needed=("clip", "text"), name=None):
    """(`clip_table` of a CSV or of lines of JSON, notes on its defects); raises RunError or UsageError."""
    notes, name = [], name or path
    with explained(f"{name} cannot be read"):
        data = Path(path).read_bytes()
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text, notes = data.decode("cp1252", "replace"), ["it is not UTF-8 and was read as Latin-1 (Windows-1252)"]
    if Path(path).suffix.lower() in (".csv", ".tsv"):
        text = re.sub(r'\A"?sep=."?\r?\n', "", text.replace("\0", ""))  # Excel's line before the header
        number, lines = 0, list(io.StringIO(text, newline=""))
        options = {"delimiter": max(",;\t", key=text.partition("\n")[0].count)}
        if text.startswith("client_id\tpath\t"):  # in Common Voice's tables quotes are the sentence's
            options["quoting"] = csv.QUOTE_NONE
        csv.field_size_limit(2**31 - 1)  # an unclosed quote swallows what follows
        reader = csv.DictReader(lines, **options)  # pandas takes NA, Namibia, for an empty cell
        rows = [row for row in reader if any(cell and "".join(cell).strip() for cell in row.values())]  # none is blank
        names = reader.fieldnames or []
        try:
            for _ in csv.reader(lines, strict=True, **options):
                number += 1
        except csv.Error:
            notes.append(f"an unclosed quote in row {number}: look at the rows after it, its text may have taken some")
    else:
        with explained(f"{name} is not lines of JSON"):
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        if wrong := [number for number, row in enumerate(rows, start=1) if not isinstance(row, dict)]:
            raise RunError(f"{name}: row {wrong[0]} is not an object with keys such as {' and '.join(needed)}")
        names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    columns = choose_columns(names, text_column, name, needed)
    table = clip_table(rows, columns, name)
    # The csv module's key for cells beyond the columns is None. Their row may have lost its order before them.
    surplus = [number for number, row in enumerate(rows) if any(map(str.strip, row.get(None, ())))]
    table.loc[surplus, [*GROUP_COLUMNS, "split"]] = ""
    table.loc[surplus, "problem"] = [f"more cells than columns (row {row + 1}): quote its text" for row in surplus]
    return table, notes


def choose_columns(names, text_column, table, needed):
    """{what COLUMNS calls a column: its name among `names`}; raises UsageError without one column of texts."""
    lower = {name.lower(): name for name in reversed(names) if name}
    found = {ours: [lower[name] for name in theirs if name in lower] for ours, theirs in COLUMNS.items()}
    if text_column:
        found["text"] = [text_column] * (text_column in names)
    listed = f"its columns are {' '.join(', '.join(names)[:200].split()) or 'none'}"
    if len(found["text"]) != 1:
        problem = " and ".join(found["text"]) or f"no column {text_column or ' or '.join(COLUMNS['text'])}"
        raise UsageError(f"{table} has {problem}; name the column of the texts with --text_column: {listed}")
    for ours in [ours for ours in needed if not found[ours]]:
        raise RunError(f"{table} has no column {' or '.join(COLUMNS[ours])}; {listed}")
    # What is not called by its file has been cut to its times already.
    return {ours: theirs[0] for ours, theirs in found.items() if theirs and (ours not in TIMES or "clip" in needed)}


def clip_table(rows=(), columns=None, name="", split=""):
    """The table of clips of `rows`, by choose_columns' `columns`; `split` stands for empty ones. Raises UsageError."""
    cells = {ours: [row.get(theirs) for row in rows] for ours, theirs in (columns or {}).items()}
    for ours in {"text", "pred_text", "baseline_text", "clip"}.intersection(cells):
        if odd := [cell for cell in cells[ours] if isinstance(cell, (list, dict, bytes))]:
            raise UsageError(f"{name}: column {columns[ours]} holds a {type(odd[0]).__name__}: {str(odd[0])[:80]}")

    def as_text(cell):  # JSON can hold halves of characters, no file can
        return None if cell is None or cell != cell else str(cell).encode(errors="replace").decode()

    def as_name(cell):  # one for what spreadsheets and keyboards write in several ways, as 12 and 12.0
        name = unicodedata.normalize("NFC", as_text(cell) or "").strip()
        return re.sub(r"^(-?\d+)\.0+$", r"\1", name) if name.endswith("0") else name

    blank = dict.fromkeys([*CLIP_COLUMNS, "start"], "")
    texts = {name: list(map(as_text if "text" in name else as_name, column)) for name, column in cells.items()}
    names = list(dict.fromkeys([*blank, "end", "duration", *cells]))
    table = pandas.DataFrame(texts, columns=names, dtype="str").fillna(blank)
    table["split"] = table["split"].map(split_in).replace("", split).astype("str")
    is_timed = (table["start"] != "").any()  # then the text of a row without times is of no whole recording
    decimal = (table[name].str.replace(",", ".", regex=False) for name in (*TIMES, "duration"))
    start, end, duration = (pandas.to_numeric(column, errors="coerce").astype(float) for column in decimal)
    end = end.fillna(start + duration)
    is_stretch = (start >= 0) & (start < end) & (end < math.inf)
    table["problem"] = table["problem"].mask(~is_stretch & is_timed, "no stretch of a recording: see its start and end")
    table["start"], table["end"] = start.where(is_stretch), end.where(is_stretch)
    seconds = (table["end"] - table["start"]).fillna(duration)
    table["num_samples"] = (seconds.where((seconds > 0) & (seconds < 86_400), 0) * SAMPLE_RATE).astype("int64")
    return table.drop(columns="duration")


def with_one_spelling(table):
    """`table` with groups that differ in case alone as one."""
    for column in GROUP_COLUMNS[1:]:
        cells = table[column].value_counts().index.to_series()  # the most frequent first
        table[column] = table[column].map(cells.groupby(cells.str.casefold()).transform("first"))
    return table


# ---------------------------------------------------------------- sources

# What becomes one prepared file, `path`: `files`, of `size` bytes, with the clips that table number `part` tells of.
Shard = namedtuple("Shard", "name path files size part splits")
ARCHIVE = re.compile(r"audio/(?P<accent>[^/]+)/(?P<split>[^/]+)/[^/]+\.tar\.gz")
LAYOUTS = [  # of a corpus: its kind, and files of which it has one
    ("archives", ARCHIVE),
    ("parquet", re.compile(r".*\.parquet")),
    ("tables", re.compile(r"(.*/)?metadata\.(csv|jsonl)")),
    ("tables", re.compile(r"(.*/)?(train|dev|test)\.tsv")),  # Common Voice's
    ("tables", re.compile(r"(.*/)?((train|dev|valid|test)[^/]*|[^/]*manifest[^/]*)\.jsonl?")),  # NeMo's
]


class Source:
    """A corpus as `shards`, or a RunError. `rows` is the table of all clips with their `part`, `announced` the same by
    planned splits: those `made` come from train. Flags on the corpus are not for one beside it (`is_extra`)."""

    def __init__(self, dataset, settings, splits, is_extra=False):
        is_folder = Path(dataset).expanduser().is_dir()  # :NAME is a configuration of what is not in a folder's name
        name, _, self.config = (dataset, "", "") if is_folder else dataset.partition(":")
        revision = None if is_extra else settings.dataset_revision
        revision = DEFAULT_DATASET_REVISION if name == DEFAULT_DATASET and not revision else revision
        self.text_column, self.asked = (None, None) if is_extra else (settings.text_column, settings.accents)
        self.dataset, self.keep, self.made, self.accents = dataset, settings.keep_archives, (), set()
        self.shards, self.notes = [], {}  # what should be said of clips that are converted: their names
        place = Path(name).expanduser().resolve() if Path(name).expanduser().is_dir() else None
        identity = digest([str(place or name), revision, self.config, self.text_column])
        self.folder = Path(settings.data_dir).expanduser() / f"{file_stem(public(dataset))}-{identity[:8]}"
        self.repository = Repository(name, revision, place, self.folder)
        self.repository.list()

        paths = sorted(self.repository.files)
        layouts = ((kind, list(filter(pattern.fullmatch, paths))) for kind, pattern in LAYOUTS)
        self.kind, found = next((layout for layout in layouts if layout[1]), ("", []))
        self.layout = "archives" if self.kind == "archives" else "recordings"
        if self.config and self.kind != "parquet":
            raise UsageError(f"--dataset names '{self.config}'; {name} has no configurations: leave it out")
        if settings.streaming and self.kind != "archives" and not is_extra:
            raise UsageError(f"--streaming is for AfriSpeech-200's layout, which {name} is not in; leave it out")
        if not self.kind:
            kinds = "no audio/<accent>/<split>/*.tar.gz, metadata.csv, metadata.jsonl, train.tsv, manifest or *.parquet"
            raise RunError(f"{name} has {kinds}: it has {plural(len(paths), 'file')}, such as {(paths or ['none'])[0]}")
        parts = enumerate(getattr(self, f"add_{self.kind}")(found, splits))
        tables = [table.assign(part=part) for part, table in parts if len(table)]  # empty ones make concat slow
        table = pandas.concat(tables or [clip_table().assign(part=0)], ignore_index=True)
        self.announced = self.rows = with_one_spelling(table)
        folded = Counter(map(str.casefold, people := self.rows["speaker"].unique()))
        if alike := [name for name in people if folded[name.casefold()] > 1]:
            warn(f"{len(alike)} speakers, such as {' and '.join(alike[:2])}, differ in case alone: kept apart")
        self.names = {*found, *(shard.name for shard in self.shards)}  # also of those that are not needed
        if self.kind != "archives":
            self.plan_splits(splits, settings.seed, splits[0] if is_extra else "train")
            for part, found in self.announced.groupby("part")["split"]:
                self.shards[part].splits.update(found)

    def add_shard(self, name, files, part, listed="", splits=()):
        """A `Shard` whose prepared file is another one where what is `listed` for it, or one of its files, changes."""
        size = sum(self.repository.files[path][0] for path in files)
        mark = digest([listed, *([path, *self.repository.files[path]] for path in files)])[:12]
        self.shards.append(Shard(name, self.folder / f"{self.stem(name)}.{mark}.arrow", files, size, part, set(splits)))

    @staticmethod
    def stem(name):
        return f"{slugify(name)[-80:]}-{digest(name)[:6]}"

    def read(self, path):
        """The table of clips of a file of the repository, an empty one if it is not there; warns of its defects."""
        if path not in self.repository.files:
            return clip_table()
        table, notes = read_table(self.repository.fetch(path), self.text_column, name=path)
        for note in notes:
            warn(f"{path}: {note}")
        return table[[*CLIP_COLUMNS, "num_samples", *TIMES]]

    @staticmethod
    def second_rows(table):
        """Which rows are of a clip that a row before them is of; warns where their texts differ."""
        copies = table["clip"].duplicated()
        is_other = copies & ~table.duplicated(["clip", "text"]) & (table["problem"] == "")
        if others := table["clip"][is_other].tolist():
            warn(f"{plural(len(others), 'row')}, such as of {others[0]}, with another text than a row before: not used")
        return copies

    def add_archives(self, archives, splits):
        """AfriSpeech-200's layout, audio/ACCENT/SPLIT/*.tar.gz and transcripts/ACCENT/SPLIT.csv. Yields each table."""
        files = self.repository.files
        self.accents = {path.split("/")[1] for path in files if re.match("(audio|transcripts)/[^/]+/", path)}
        accents = self.accents.intersection(map(slugify, self.asked or self.accents))
        parts = sorted(itertools.product(accents, splits), key="/".join)
        with ThreadPoolExecutor(8) as pool:  # some hundred small files on the Hub, so several at once
            tables = list(pool.map(self.read, ("transcripts/{}/{}.csv".format(*part) for part in parts)))
        for number, ((accent, split), table) in enumerate(zip(parts, tables)):
            table["clip"], table["split"] = table["clip"].map(clip_key).astype("str"), split
            table["accent"] = table["accent"].replace("", accent)
            table = table[table["clip"] != ""].drop(columns=TIMES)
            table = table[~self.second_rows(table)]
            listed = table.to_csv(index=False)
            for path in [path for path in archives if path.startswith(f"audio/{accent}/{split}/")]:
                self.add_shard(path, [path], number, listed, [split])
            yield table

    def add_tables(self, paths, splits):
        """Audio files in folders, with tables beside or above them. Yields the table of each 256 of them."""
        files, tables, normal = list(self.repository.files), [], functools.partial(unicodedata.normalize, "NFC")
        known = {normal(path): path for path in files}
        root, given = f"{self.repository.folder}/", f"{Path(self.dataset).expanduser().absolute()}/"
        for path in paths:
            table, (folder, file) = self.read(path), os.path.split(normal(path))
            folder = os.path.join(folder, "clips") if path.endswith(".tsv") else folder
            names = (os.path.join(folder, name or f"{file}, row {row}") for row, name in enumerate(table["clip"], 1))
            names = (os.path.normpath(name.replace("\\", "/")) for name in names)
            names = (name.removeprefix(root).removeprefix(given) for name in names)
            table["file"] = [known.get(name, name) for name in names]
            tables.append(table.assign(split=table["split"].replace("", split_in(path))))
        table = pandas.concat(tables, ignore_index=True)
        times = zip(table["start"], table["end"])
        table["clip"] = table["file"] + [f"#t={start:.10g},{end:.10g}" if start >= 0 else "" for start, end in times]
        is_there = table["file"].isin(files)
        if not is_there.any():
            example = f"{plural(len(table), 'row')}, such as {next(iter(table['clip']), 'none')}"
            raise RunError(f"{paths[0]} names no file that is there among {example}")
        for problem, is_bad in (("no audio", ~is_there), ("a second row of this clip", self.second_rows(table))):
            table["problem"] = table["problem"].mask(is_bad & (table["problem"] == ""), problem)
        rest = [{"clip": file} for file in sorted(set(files) - set(table["file"])) if is_audio_name(file)]
        rest = clip_table(rest, {"clip": "clip"}).assign(problem="no transcript", file=[row["clip"] for row in rest])
        table = pandas.concat([table, rest], ignore_index=True)
        of_folders = [split_in(f"{os.path.dirname(file)}/") for file in table["file"]]  # "stress-test.wav" is of none
        table["split"] = table["split"].mask(table["split"] == "", of_folders)
        # A file is of one shard, whatever splits its stretches are of: it is released when that is converted.
        homes = table.assign(number=table.groupby("split").cumcount() // 256).groupby("file")
        for (split, number), group in table.groupby([homes[name].transform("first") for name in ("split", "number")]):
            present = group["file"][group["problem"] == ""].unique().tolist()
            listed = group.drop(columns=["file", *TIMES]).to_csv(index=False)
            self.add_shard(f"{split or 'clips'}-{number:05d}", present, len(self.shards), listed)
            yield group

    def add_parquet(self, paths, splits):
        """Parquet files as `push_to_hub` writes them, divided into splits as datasets does. Yields their tables."""
        repository, place = self.repository, str(self.repository.folder or self.repository.name)
        noted = self.folder / f"parquet-{digest(repository.files)[:12]}.json"
        if not (named := read_json(noted) or {}):
            with explained(f"--dataset {self.dataset} cannot be used", kind=UsageError):
                builder = datasets.load_dataset_builder(place, self.config or None, revision=repository.revision)
            found = builder.config.data_files
            for split, file in [(split, str(file)) for split, files in found.items() for file in files]:
                path = os.path.relpath(file, place) if repository.folder else re.sub("^hf://([^/]+/){3}", "", file)
                if path in repository.files:  # what names no split is "train" for datasets
                    named[path] = split_in(path) if list(found) == ["train"] else split_in(str(split))
            write_text(noted, json.dumps(named, indent=1))
        if set(splits) <= set(named.values()):  # a corpus may be large beside its test split
            named = {path: split for path, split in named.items() if split in splits}
        for number, path in enumerate(named):
            self.add_shard(path, [path], number)
        with ThreadPoolExecutor(8) as pool:
            yield from pool.map(self.read_parquet, self.shards, named.values())

    @contextlib.contextmanager
    def open_parquet(self, path):
        """(a pyarrow ParquetFile, the name of its column of audio, structs of bytes and path); raises RunError."""
        with explained(f"{path} cannot be read as parquet"), self.repository.open(path) as stream:
            file = parquet.ParquetFile(stream)
            names = [item.name for item in file.schema_arrow if re.match(r"struct<(.*, )?bytes: ", str(item.type))]
            names = ["audio"] if "audio" in names else names
            if len(names) != 1:
                problem = f"more than one: {', '.join(names)}" if names else "no audio column (of bytes and path)"
                raise RunError(f"{path} has {problem}; its columns are {', '.join(file.schema_arrow.names)}")
            yield file, names[0]

    def read_parquet(self, shard, split):
        """The table of a parquet file's clips; of one that is not converted yet, what is no audio is read."""
        if shard.path.exists():
            return load_prepared([shard.path])[1]
        with self.open_parquet(shard.name) as (file, audio):
            features = datasets.Features.from_arrow_schema(file.schema_arrow)
            columns = choose_columns(list(filter(audio.__ne__, features)), self.text_column, shard.name, ["text"])
            rows = file.read([*columns.values(), f"{audio}.path"]).to_pylist()
        for column in set(columns.values()):
            if isinstance(kind := features[column], datasets.ClassLabel):
                for row in rows:
                    row[column] = kind.int2str(row[column]) if row[column] not in (None, -1) else None
        for number, row in enumerate(rows):
            name = os.path.basename((row[audio] or {}).get("path") or "")
            row[audio] = f"{shard.name[:-8]}/{number:05d}-{name}".rstrip("-")
        return clip_table(rows, columns | {"clip": audio}, shard.name, split)[[*CLIP_COLUMNS, "num_samples"]]

    def plan_splits(self, splits, seed, unnamed):
        """Draw speakers of train, a tenth of the clips each, for a dev or test that `splits` lack; raises RunError."""
        table = self.announced = self.rows.copy(deep=False)
        if not (table["split"] != "").any():
            table["split"] = unnamed
        if lost := table["clip"][table["split"] == ""].tolist():
            warn(f"{plural(len(lost), 'clip')}, such as {lost[0]}, of no split that is named: left out")
        found, is_train = set(table["split"]), table["split"] == "train"
        if set(splits) <= found:
            return
        self.made = tuple(split for split in SPLITS if split not in found)
        sizes = Counter(filter(None, table["speaker"][is_train]))
        if "train" in self.made or len(sizes) <= len(self.made):
            lacking = f"no {' and no '.join(self.made)} split, and {plural(len(sizes), 'speaker')} of train for it"
            raise RunError(f"{self.dataset} has {lacking}: name a speaker, such as speaker, or a split in a column")
        # The order is one of checksums, so that more recordings later move few speakers.
        order = sorted(sizes, key=lambda speaker: hashlib.sha256(f"{seed} {speaker}".encode()).digest())
        room, homes = dict.fromkeys(self.made, sum(sizes.values()) // 10), dict.fromkeys(order, "train")
        for speaker in order:
            if split := next((split for split in self.made if sizes[speaker] <= room[split]), None):
                homes[speaker], room[split] = split, room[split] - sizes[speaker]
        for split in [split for split in self.made if split not in homes.values()]:  # each has more than a tenth
            homes[min((one for one in order if homes[one] == "train"), key=sizes.get)] = split
        table["split"] = table["speaker"].where(is_train).map(homes).fillna(table["split"])
        speakerless = is_train & (table["speaker"] == "") & (table["problem"] == "")
        table["problem"] = table["problem"].mask(speakerless, "no speaker to make a split by")
        say(f"  {' and '.join(self.made)} made of the train split by speaker, by --seed {seed}")

    def needed(self, splits):
        return [shard for shard in self.shards if shard.splits & set(splits)]

    def part(self, shards):
        part = copy.copy(self)  # what a worker process needs
        part.announced, part.shards = None, []
        part.rows = self.rows[self.rows["part"].isin([shard.part for shard in shards])]
        files = {path: self.repository.files[path] for shard in shards for path in shard.files}
        part.repository = dataclasses.replace(self.repository, files=files)
        return part

    def clips(self, shard):
        """Yield the clips of a shard as rows of its prepared file; damage to an archive ends it with a row too."""
        rows = self.rows[self.rows["part"] == shard.part].drop(columns="part").to_dict("records")
        if self.kind == "tables":
            for row in rows:
                file, *times = (row.pop(name) for name in ("file", *TIMES))
                yield make_clip(row, self.repository.local(file), self.notes, *times)
        elif self.kind == "parquet":
            with self.open_parquet(shard.name) as (file, audio):
                batches = file.iter_batches(batch_size=50, columns=[audio])
                cells = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
                for row, cell in zip(rows, cells):
                    yield make_clip(row, (cell or {}).get("bytes"), self.notes)
        else:
            rows, seen = {row["clip"]: row for row in rows}, set()
            nothing = dict.fromkeys(CLIP_COLUMNS, "") | ARCHIVE.fullmatch(shard.name).groupdict()
            with self.repository.open(shard.name, block_size=2**24) as stream:  # of the Hub's as much at once
                for clip, audio, problem in archive_members(stream, shard.name):
                    row = rows.get(clip) or {**nothing, "clip": clip, "problem": "no transcript"}
                    problem = problem or row["problem"] or ("a second copy" if clip in seen else "")
                    yield make_clip({**row, "problem": problem}, audio, self.notes)
                    seen.add(clip)


def clip_key(path):
    """'<session>/<file>', the last two components: a file name alone occurs in more than one session."""
    return "/".join(unicodedata.normalize("NFC", path).replace("\\", "/").strip("/").split("/")[-2:])


# ---------------------------------------------------------------- audio

CLIP_BYTES_LIMIT = 1_000_000_000  # a clip that decodes to more than this is a bomb, not speech
BLOCK_SAMPLES = 2**20  # at 16 kHz that are decoded at once, 65 s
CUT_OFF = "it ends"  # how a note begins of a recording that its header says to be longer
# Of audio and video, dictation machines' too, also what libsndfile cannot read: that should be said.
AUDIO_SUFFIXES = """3g2 3ga 3gp 3gpp 3gpp2 aac ac3 adts aif aifc aiff amr ape au avi avr awb caf ds2 dss dvf flac gsm
    htk ircam loas m1v m4a m4b mat4 mat5 mka mkv mov movie mp2 mp3 mp4 mpa mpc2k mpe mpeg mpg msv nist oga ogg ogv opus
    paf pvf qcp qt ra rf64 sd2 sds snd sph spx svx voc w64 wav wave wavex webm wma wmv wv wve xi""".split()


def is_audio_name(path):
    return os.path.splitext(path)[1][1:].lower() in AUDIO_SUFFIXES


def decoded_blocks(source):
    """Yield (SoundFile, float32 (frames, channels)) of all that decodes, whatever a header says; raises ValueError."""
    try:
        # Opened here: of a path that cannot be read libsndfile says "System error".
        stream = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")
        with stream, soundfile.SoundFile(stream) as file:
            file.seekable = lambda: False  # it seeks after each read where a file can: some codecs lose the rest by it
            size = count = min(file.frames + 1, max(1, BLOCK_SAMPLES * file.samplerate // SAMPLE_RATE))
            while count == size:
                block = np.full((size, file.channels), np.nan, np.float32)
                try:
                    count = len(file.read(out=block))
                except soundfile.SoundFileError:
                    decoded = np.flatnonzero(~np.isnan(block[:, 0]))  # before the damage
                    size, count = -1, decoded[-1] + 1 if len(decoded) else 0
                yield file, block[:count]
    except (soundfile.SoundFileError, OSError) as error:
        # libsndfile's own words: the exception's text holds a memory address, by which no prepared file may differ.
        problem = getattr(error, "error_string", None) or one_line(error)
        raise ValueError(problem.replace("not recognised.", "not recognised: convert it with ffmpeg")) from error


def read_audio(source, notes):
    """Yield the 16 kHz mono float32 samples of audio, bytes or a path, in blocks; `notes` grow; raises ValueError."""
    blocks, count, made, products, peak = decoded_blocks(source), 0, 0, 0.0, 0.0
    file, block = next(blocks)
    rate, log, head = file.samplerate, file.extra_info, [(file, block), *itertools.islice(blocks, 1)]
    if not len(block):
        size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
        mend = "if they are audio, ffmpeg -ignore_length 1 -i FILE new.wav mends it"
        raise ValueError(f"no audio samples: its header tells of none in {size:,} bytes; {mend}")
    channels, weights = file.channels, np.full(file.channels, 1 / file.channels, np.float32)  # what each counts in mono
    if channels > 1 or file.subtype in ("FLOAT", "DOUBLE"):
        for _, block in decoded_blocks(source) if len(head) == 2 else head:  # the whole tells how they go together
            highest = max(float(block.max(initial=0)), -float(block.min(initial=0)))
            if not highest < 1e30:  # full scale is 1; near float32's limit it overflows when it is resampled
                raise ValueError("it holds samples that are not numbers, or absurdly large")
            products, peak = products + block.T.astype(float) @ block, max(peak, highest)  # of each channel with each
        energies = np.diag(products)
        if np.sum(products) / channels**2 < 0.01 * energies.max():  # the mean has lost the signal
            notes.append("its channels cancel each other; the loudest was taken")
            weights = np.eye(channels, dtype=np.float32)[energies.argmax()]
        if peak > 16:  # no loud recording, but floats at the scale of 16-bit integers
            notes.append("its samples are far beyond full scale, and were divided by 32,768")
            weights /= 32_768

    resampler = Lazy("soxr").ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
    for _, block in itertools.chain(head, blocks):
        samples = block @ weights if rate == SAMPLE_RATE else resampler.resample_chunk(block @ weights)
        count, made = count + len(block), made + len(samples)
        yield samples
    if rate != SAMPLE_RATE:
        rest = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        yield librosa.util.fix_length(rest, size=math.ceil(count * SAMPLE_RATE / rate) - made)
    # libsndfile's log says which header it corrected. A WAV out of a pipe claims 2**31 - 2**16 bytes or more.
    claimed, found = map(int, (re.findall(r": (\d+) \(should be (\d+)\)", log) or [(0, 1)])[-1])
    promised = count * claimed / found if 0 < claimed < 2**31 - 2**16 and found else file.frames
    if 0.1 < (missing := (promised - count) / rate) < 1e7:  # s: less is a codec's padding, more an unknown length
        notes.append(f"{CUT_OFF} after {count / rate:,.1f} s, {missing:,.1f} s before what its header says")


def decode_audio(source, notes=None):
    """The 16 kHz mono float32 samples of a clip, bytes or a path; raises ValueError."""
    most = CLIP_BYTES_LIMIT // (4 * BLOCK_SAMPLES)
    blocks = list(itertools.islice(read_audio(source, [] if notes is None else notes), most + 1))
    if len(blocks) > most:
        raise ValueError(f"it decodes to over {CLIP_BYTES_LIMIT / 1e9:g} GB")
    return np.concatenate(blocks)


@functools.lru_cache(1)  # one after the other, stretches are of one recording
def decode_noted(source):
    return decode_audio(source, notes := []), notes


def make_clip(row, audio, notes, start=math.nan, end=math.nan):
    """A row of a prepared file: a table's, with `audio` (`start` to `end` s) as FLAC; `notes` {note: clips} grow."""
    samples, found, flac, problem = (), [], io.BytesIO(), row["problem"] or ("" if audio else "no audio")
    try:
        samples, found = (samples, found) if problem else decode_noted(audio)
    except ValueError as error:
        problem = f"undecodable audio ({error})"
    if start >= 0 and not problem:
        length, found = len(samples) / SAMPLE_RATE, [note for note in found if not note.startswith(CUT_OFF)]
        samples = samples[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
        if length + 0.5 < end:  # people round
            found.append(f"{CUT_OFF} after {length:,.1f} s, its stretch is {start:,.1f} to {end:,.1f} s")
    for note in found:
        if note.startswith(CUT_OFF):  # its text says more than its audio
            samples, problem = (), f"cut off ({note})"
        else:
            notes.setdefault(note, []).append(row["clip"])
    if len(samples):
        soundfile.write(flac, np.clip(samples, -1.0, 1.0), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return {**row, "audio": flac.getvalue(), "num_samples": len(samples), "problem": problem}


def archive_members(stream, path):
    """Yield (clip, bytes, problem) for each member of a tar.gz read as a stream, and for damage that ends it."""
    count = 0
    try:
        # Not tarfile's own "r|gz": only gzip checks the checksum at the end. "replace": names are written as UTF-8.
        with gzip.open(stream) as plain, tarfile.open(fileobj=plain, mode="r|", errors="replace") as tar:
            for member in (member for member in tar if not member.isdir()):
                problem = "" if member.isreg() else "refused: it is a link or a device"
                if member.size > CLIP_BYTES_LIMIT:
                    problem = f"refused: it is over {CLIP_BYTES_LIMIT / 1e9:g} GB"
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    problem = "refused: its path climbs out of the archive"
                yield clip_key(member.name), b"" if problem else tar.extractfile(member).read(), problem
                count += 1
            while plain.read(1 << 20):  # tarfile takes a header that it cannot read for the end; the checksum is behind
                pass
    # Numbers in headers that are none are a ValueError or an OverflowError of tarfile's.
    except (EOFError, tarfile.TarError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError) as error:
        damage = one_line(error).replace("(b've')", "but a Git LFS pointer: run 'git lfs pull'")
        yield path, b"", f"damaged archive ({damage}): {plural(count, 'clip')} of it kept"


# ---------------------------------------------------------------- preparation


def clip_features():
    texts = dict.fromkeys(CLIP_COLUMNS, datasets.Value("string"))
    return datasets.Features(audio=datasets.Value("binary"), num_samples=datasets.Value("int32"), **texts)


def prepare_shard(source, shard):
    """Convert a shard to its prepared file, complete or absent; returns its size, and notes. Raises RunError."""
    lengths, options = [], dict(features=clip_features(), writer_batch_size=50)
    with explained(f"{shard.name} cannot be prepared"):
        for path in shard.files:
            source.repository.fetch(path)
        with complete(shard.path) as partial, arrow_writer.ArrowWriter(path=str(partial), **options) as writer:
            for clip in source.clips(shard):
                writer.write(clip)
                lengths.append(clip["num_samples"])
            writer.finalize()
        # What lies in the user's folder or Hub cache is never touched.
        done = () if source.keep or source.repository.folder else shard.files
        for path, ending in itertools.product(done, ("", ".partial.lock")):
            (source.folder / "hub" / f"{path}{ending}").unlink(missing_ok=True)
    return np.array([len(lengths), sum(lengths) / SAMPLE_RATE / 3600]), source.notes


def start_worker(connection):
    """Let this worker process end with the program, at whose death the other end of `connection` is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the program tells its workers
    threading.Thread(target=lambda: connection.poll(None) and os._exit(1), daemon=True).start()


def prepare(source, splits, settings):
    """Convert the shards of `splits` that are not converted yet; raises RunError. Other programs wait at the lock."""
    with filelock.FileLock(source.folder / "prepare.lock"):
        if not (todo := [shard for shard in source.needed(splits) if not shard.path.exists()]):
            return
        good = set(map(source.stem, source.names)) - {source.stem(shard.name) for shard in todo}
        for path in source.folder.glob("*.arrow*"):  # what is half-written, or made of the corpus as it was before
            if path.suffix == ".tmp" or path.name.partition(".")[0] not in good:
                path.unlink()
        need, free = disk_needed(source, todo, settings.num_proc)[1], shutil.disk_usage(source.folder).free
        if need > free:
            what = f"preparing needs {need / 1e9:.1f} GB in {source.folder} and {free / 1e9:.1f} GB are free"
            raise RunError(f"{what}: choose another --data_dir, fewer --accents, or a lower --num_proc")
        done, failures, notes = np.zeros(2), [], {}
        context = multiprocessing.get_context("spawn")  # forked workers inherit the locks of threads and can hang
        ours, theirs = context.Pipe()
        pool = ProcessPoolExecutor(min(settings.num_proc, len(todo)), context, start_worker, (theirs,))
        with tqdm.tqdm(total=len(todo), desc="preparing audio", unit="archive") as bar, pool, contextlib.closing(ours):
            todo.sort(key=lambda shard: -shard.size)  # none is left alone at the end
            for job in as_completed([pool.submit(prepare_shard, source.part([shard]), shard) for shard in todo]):
                try:
                    with explained("a process was killed, most likely for want of memory", "try a lower --num_proc"):
                        sizes, found = job.result()
                    done += sizes
                    for note, names in found.items():
                        notes.setdefault(note, []).extend(names)
                except RunError as error:
                    failures.append(error)
                bar.set_postfix_str("{:,.0f} clips, {:.2f} h".format(*done))
                bar.update()
        for note, names in notes.items():
            warn(f"{plural(len(names), 'clip')}, such as {names[0]}: {note}")
        if failures:
            raise RunError(f"{len(failures)} of {len(todo)} archives could not be prepared; the first: {failures[0]}")


def disk_needed(source, todo, num_proc):
    """The bytes that preparing the shards `todo` fetches, needs at its peak and leaves, by the tables' durations."""
    sizes = sorted((shard.size for shard in todo), reverse=True)
    share = sum(sizes) / max(1, sum(shard.size for shard in source.shards))
    stays = share * sizes_of(source.announced)["hours"] * 59e6 or sum(sizes)  # FLAC; not every table has durations
    fetched = sizes if not source.repository.folder else []
    return sum(fetched), stays + sum(fetched if source.keep else fetched[:num_proc]), stays + sum(fetched) * source.keep


def sizes_of(table):
    people, spoken = (table[name][table[name] != ""].nunique() for name in ("speaker", "accent"))
    hours = round(float(table["num_samples"].sum()) / SAMPLE_RATE / 3600, 4)
    return {"clips": len(table), "hours": hours, "speakers": people, "accents": spoken}


def size_line(table):
    """How much a table of clips is, in columns; own tables may not tell the hours before the audio is converted."""
    clips, hours, speakers, accents = sizes_of(table).values()
    hours = f"{hours:.2f}" if hours or not clips else "?"
    return f"{plural(clips, 'clip'):>14}{hours:>9} h{plural(speakers, 'speaker'):>16}{plural(accents, 'accent'):>12}"


def dry_run(source, settings):
    """Say what a run would do, from the tables alone: clips, hours and speakers, downloads, disk and updates."""
    for split in SPLITS:
        table = source.announced[(source.announced["split"] == split) & is_wanted(source.announced, settings)]
        if split == "train":
            table = table[table["num_samples"] <= settings.max_train_seconds * SAMPLE_RATE]
            train = min(len(table), settings.max_train_samples or len(table))
        say(f"  {split:<5}{size_line(table)}")
        refuse_empty(split, table["text"])
        for accent in table["accent"].value_counts().index:
            say(f"    {accent:<24}{size_line(table[table['accent'] == accent])[:-12]}")
    todo = [shard for shard in source.needed(settings.splits(on_disk=True)) if not shard.path.exists()]
    fetched, peak, kept = (size / 1e9 for size in disk_needed(source, todo, settings.num_proc))
    say(f"  to fetch {fetched:.2f} GB in {plural(len(todo), 'archive')}; keep {kept:.2f} GB, at the peak {peak:.2f} GB")
    updates, an_epoch = planned_updates(settings, train)
    say(f"  {plural(updates, 'update')}, {an_epoch:,} an epoch, of {plural(settings.clips_an_update, 'clip')}")
    return 0


# ---------------------------------------------------------------- clips

SKIPPED_FILE = "results/skipped_clips.csv"
SKIPPED_COLUMNS = ["split", "clip", "reason", "accent", "seconds", "text"]
FILTERS = {"accents": ("accent", slugify), "domains": ("domain", str.lower), "countries": ("country", str.upper)}
SOME_CLIPS = 500  # of a set, for what is scored many times
NOT_WANTED = "not asked for"  # the problem of a stream's clips that are of none of the --accents, ... asked for


@dataclass
class Clips:
    """Clips to train on or score: `audio`, a Dataset of prepared rows, and their `table`; `skipped` with a `reason`."""

    audio: object
    table: object
    skipped: object = None

    def __len__(self):
        return len(self.table)

    def some(self):
        """Up to SOME_CLIPS of them, of all lengths, for what is scored many times."""
        chosen = range(0, len(self), math.ceil(len(self) / SOME_CLIPS))
        return Clips(self.audio.select(chosen), self.table.iloc[list(chosen)])

    @property
    def reasons(self):
        return Counter(re.split(r"[:(]", reason)[0].strip() for reason in self.skipped["reason"])


def load_prepared(paths):
    """(Dataset of the clips in prepared files, their table): memory-mapped, no audio is read; raises RunError."""
    prepared = [datasets.Dataset(clip_features().arrow_schema.empty_table())]
    for path in paths:
        with explained(f"{path} is damaged", "delete it, the same command makes it again"):
            prepared.append(datasets.Dataset.from_file(str(path)))
    audio = datasets.concatenate_datasets(prepared)
    return audio, audio.data.select([*CLIP_COLUMNS, "num_samples"]).to_pandas()


def is_wanted(table, settings):
    """Which clips are of the --accents, --domains and --countries asked for, or of none and with a problem anyway."""
    wanted = pandas.Series(True, table.index)
    for flag_name, (column, fold) in FILTERS.items():
        if asked := getattr(settings, flag_name):
            cells = [cell for cell in table[column].unique() if fold(cell) in set(map(fold, asked))]
            wanted &= table[column].isin(cells) | (table[column] == "") & (table["problem"] != "")
    return wanted


def check_announced(source, settings):
    """Refuse, before any audio is converted, what the tables show to be without a clip."""
    announced = source.announced
    for flag_name, (column, fold) in FILTERS.items():
        known = (column == "accent" and source.accents) or set(map(fold, announced[column].unique())) - {""}
        for asked in [asked for asked in getattr(settings, flag_name) or () if known and fold(asked) not in known]:
            near = difflib.get_close_matches(fold(asked), sorted(known), n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"they are {', '.join(sorted(known))}"
            raise UsageError(f"--{flag_name} has '{asked}', which {source.dataset} does not have; {hint}")
    wanted = is_wanted(announced, settings)
    for split in () if settings.prepare_only else settings.splits():
        refuse_empty(split, announced["text"][wanted & (announced["split"] == split)])


def refuse_empty(split, texts, reasons=None):
    """Raise RunError, with the `reasons` of its `Clips`, if a split has no clip, or none of dev or test a word."""
    if not len(texts):
        why = ", ".join(f"{count:,} x {reason}" for reason, count in (reasons or Counter()).most_common())
        raise RunError(f"no {split} clip is left: {why or 'these --accents, --domains and --countries have none'}")
    if split != "train" and not any(map(normalize_wer, texts)):
        raise RunError(f"no {split} transcript has a word to score: {plural(len(texts), 'clip')} of punctuation")


def splits_of(extra, settings):
    """The splits of a run's source that have to lie on the disk: of the corpus, "", a further test set or "replay"."""
    return ("train",) if extra == "replay" else ("test",) if extra else settings.splits(on_disk=True)


def load_clips(source, splits):
    """(Dataset of prepared clips, table of them and of what has no audio; its `row` is the place in it, or -1)."""
    shards, announced = source.needed(splits), source.announced
    audio, table = load_prepared(shard.path for shard in shards)
    table = with_one_spelling(table).assign(row=np.arange(len(table)))
    if source.kind == "archives":
        announced = announced.assign(num_samples=0, problem=announced["problem"].replace("", "no audio"), row=-1)
        table = pandas.concat([table, announced[table.columns]], ignore_index=True)
        table = table[(table["row"] >= 0) | ~table.duplicated(["split", "clip"])]
    else:  # a prepared file has the rows of its table, in their order, and does not know of the plan
        announced = announced[announced["part"].isin([shard.part for shard in shards])].reset_index()
        table["split"], is_good = announced["split"], table["problem"] == ""
        table["problem"] = table["problem"].mask(is_good, announced["problem"])
    return audio, table


def select_all(sources, settings, check):
    """{split or name: Clips, longest first} of {"" or name: Source}; raises RunError. `check` gives reasons."""
    limits = dict(zip(SPLITS, (settings.max_train_samples, settings.max_eval_samples, settings.max_test_samples)))
    selected, path = {}, Path(settings.output_dir, SKIPPED_FILE)
    for extra, source in sources.items():
        splits = splits_of(extra, settings)
        audio, table = load_clips(source, splits)
        wanted = True if extra else is_wanted(table, settings)
        if settings.streaming and not extra and not settings.prepare_only:
            train = source.announced[(source.announced["split"] == "train") & is_wanted(source.announced, settings)]
            selected["train"] = Clips(None, train, table.iloc[:0].assign(reason=""))
        parts = [table[wanted & (table["split"] == split)] for split in splits]
        if not settings.streaming:
            source.rows = source.announced = table = None  # a million clips are some hundred megabytes
        for split, table in zip(splits, parts):
            reasons = pandas.Series(check(table), table.index, "str")
            reasons = reasons.mask((reasons == "") & table["clip"].where(reasons == "").duplicated(), "a second copy")
            skipped = table.assign(reason=reasons, split=extra or split)[reasons != ""]
            kept = table[reasons == ""]
            kept = kept.iloc[np.random.default_rng(settings.seed).permutation(len(kept))[: limits[split]]]
            kept = kept.sort_values(["num_samples", "clip"], ascending=[False, True], ignore_index=True)
            chosen = audio.select(kept.pop("row").tolist(), keep_in_memory=True)
            selected[extra or split] = Clips(chosen, kept, skipped)
    skipped = pandas.concat([clips.skipped for clips in selected.values()])
    if settings.local_process_index == 0:  # on each node: streaming workers add to it, and folders need not be shared
        write_text(path, ",".join(SKIPPED_COLUMNS) + "\n" + csv_lines(skipped))
    for name, clips in selected.items():
        say(f"  {name:<5}{size_line(clips.table)}")
        for reason, count in sorted(clips.reasons.items()):
            say(f"    left out of {name}: {count:,} x {reason}")
    if len(skipped):
        say(f"  each one is named in {path}")
    for note in shared_speakers(selected, settings)[1]:
        warn(note)
    for name, clips in sorted(selected.items(), key=lambda item: not len(item[1].skipped)):  # what is known first
        # Not every accent has every split: what is only prepared may lack one.
        if not settings.prepare_only or len(clips.skipped) or not any(map(len, selected.values())):
            refuse_empty(name, clips.table["text"], clips.reasons)
    return selected


def shared_speakers(selected, settings):
    """({test set: speakers of it, or clips without one, that are trained on too}, a note on each)"""
    counts, replayed = {}, public(settings.replayed[0])
    for name, trained in (("dev", "train"), ("test", "train"), (replayed, "replay")):  # others have other names
        if name in selected and trained in selected:
            tables = (selected[part].table for part in (name, trained))
            people, others = (set(table["speaker"].where(table["speaker"] != "", table["clip"])) for table in tables)
            counts |= {name: len(people & others)} if people & others else {}
    note = "{} of {} in training too: its scores are not those of new speakers.".format
    return counts, [note(plural(count, "speaker"), name) for name, count in counts.items()]


def csv_lines(skipped):
    """Lines of skipped_clips.csv, where a spreadsheet finds no formula, and no row that begins at a carriage return."""
    cells = skipped.assign(seconds=(skipped["num_samples"] / SAMPLE_RATE).round(2))[SKIPPED_COLUMNS].astype("str")
    cells = cells.map(lambda cell: re.sub(r"^(?=[=+\-@\t\r\n＝＋－＠])", "'", cell).replace("\r", " "))
    return cells.to_csv(header=False, index=False, lineterminator="\n")


class TrainingStream:
    """The training clips of this process as endless batches, pass after pass, mixed with torch's IterableDataset."""

    def __init__(self, source, settings, check, seed):
        shards = sorted(source.needed(["train"]), key=lambda shard: -shard.size)
        if len(shards) < settings.world_size:
            raise UsageError(f"--streaming has {plural(len(shards), 'archive')} for {settings.world_size} processes")
        shards = shards[settings.process_index :: settings.world_size]
        self.source, self.check, self.skipped_file = source.part(shards), check, Path(settings.output_dir, SKIPPED_FILE)
        self.source.rows.loc[~is_wanted(self.source.rows, settings), "problem"] = NOT_WANTED
        self.clips = datasets.IterableDataset.from_generator(self.usable, gen_kwargs={"shards": shards})
        self.seed, self.workers = seed, min(settings.dataloader_num_workers, len(shards))

    def usable(self, shards):
        """Yield the clips of `shards`, in the DataLoader's workers; the first pass names others in `skipped_file`."""
        with explained_hub_errors(self.source.repository.name, "dataset"):
            for clip in itertools.chain.from_iterable(map(self.source.clips, shards)):
                table = pandas.DataFrame([{**clip, "audio": None}])
                if not (reason := self.check(table)[0]):
                    yield clip
                elif reason != NOT_WANTED and self.epoch == 0:
                    writing = explained(f"{self.skipped_file} cannot be written", ROOM_ADVICE)
                    with writing, open(self.skipped_file, "a", encoding="utf-8") as file:
                        file.write(csv_lines(table.assign(reason=reason)))  # at once, as other workers do

    def __iter__(self):
        for self.epoch in itertools.count():
            batch = None
            self.loader_options["collate_fn"].epoch.fill_(self.epoch)
            clips = self.clips.shuffle(self.seed + self.epoch, buffer_size=1_000)  # about 100 MB a worker
            for batch in torch.utils.data.DataLoader(clips, num_workers=self.workers, **self.loader_options):
                yield batch
            if batch is None:
                raise RunError(f"no training clip of the stream can be used: see {self.skipped_file}")


# ---------------------------------------------------------------- text

GREEK = "ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩαβγδεζηθικλμνξοπρςστυφχψω"
# What a character becomes that the tokenizer lacks and Unicode does not decompose, in labels and in scored texts alike.
FOLDS = str.maketrans({
    **dict.fromkeys("‘’‚‛`´ʼ′", "'"), **dict.fromkeys("“”„″«»", '"'), **dict.fromkeys("~−—", "-"), "·": ".", "…": "...",
    **dict.fromkeys("÷⁄\\|", "/"), "×": "x", "±": "+/-", "&": " and ", "@": " at ", "=": " equals ", "°": " degrees ",
    "<": " less than ", ">": " greater than ", "≤": " less than or equal to ", "≥": " greater than or equal to ",
    "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", **dict(zip("øØɛƐɔƆŋŊɓƁɗƊƙƘƴƳɣƔłŁđĐı", "oOeEoOnNbBdDkKyYgGlLdDi")),
    # Greek letters are read by their names, but for the micro of units.
    **{letter: unicodedata.name(letter).split()[-1].lower() for letter in GREEK},
    "µ": "u", "μ": "u", "㎍": "mcg", "ß": "ss", "ẞ": "SS", "≠": " not equal to ",
})  # fmt: skip
ENTITY = re.compile(r"&(?:(#\d+|#[xX][0-9a-fA-F]+)|\w+);")  # only with its semicolon: "patients&notes" holds none
LAYOUT = re.compile(r"<?-+>|=+>(?!\s*\d)|<-+(?!\d)|[←-⇿➔-➾•▪●◦‣∙]")  # "<-5" and "=> 5" are comparisons
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)")


def tidy(text):
    """Resolve entities, compose accents, drop arrows and bullets, make whitespace single spaces; part 1½ (not 11/2)."""
    text = ENTITY.sub(lambda it: html.unescape(it[0]) if it[1] else html.entities.html5.get(it[0][1:], it[0]), text)
    text = re.sub(r"[µμ]g\b", "mcg", LAYOUT.sub(" ", unicodedata.normalize("NFC", text)))  # "ug" is error-prone
    return " ".join(re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞⁰¹²³⁴-⁹])", " ", text).split())


class LabelEncoder:
    """Transcripts -> label ids that the model's head can emit: never `<unk>`, no `</s>`."""

    def __init__(self, tokenizer, vocab_size, target_text):
        self.tokenizer, self.vocab_size, self.target_text = tokenizer, vocab_size, target_text
        self.covered = {" ", *tokenizer.convert_ids_to_tokens(range(vocab_size))}  # characters, and longer pieces
        self.dropped, self.unknown = Counter(), tokenizer.unk_token_id

    def fold_character(self, character):
        if character in self.covered:
            return character
        decomposed = [part for part in unicodedata.normalize("NFKD", character) if not unicodedata.combining(part)]
        folded = FOLDS.get(ord(character), "".join(decomposed)) or character
        if folded != character:
            return "".join(map(self.fold_character, folded))
        category = unicodedata.category(character)
        return "-" if category == "Pd" else " " if category[0] in "PSZ" else ""  # a lost sign still parts words

    def fold(self, text):
        """The transcript in the characters that the tokenizer covers; what is lost is counted in `dropped`."""
        text = normalize_wer(text) if self.target_text == "words" else tidy(text)
        # MedASR has ")" without "(": a pair goes together, and "1)" keeps its own.
        while "(" not in self.covered and re.search(r"\([^()]*\)", text):
            text = re.sub(r"\(([^()]*)\)", r" \1 ", text)
        folded = {ord(character): self.fold_character(character) for character in set(text)}
        for character in set(text) - {" "}:
            # Zero-width, control and combining characters are no text of their own: nothing is lost with them.
            if not folded[ord(character)].strip() and unicodedata.category(character) not in ("Cf", "Cc", "Mn"):
                self.dropped[character] += text.count(character)
        return " ".join(text.translate(folded).split())

    def __call__(self, texts):
        all_ids = self.tokenizer(list(map(self.fold, texts)), add_special_tokens=False).input_ids
        return [[token for token in ids if token != self.unknown and token < self.vocab_size] for ids in all_ids]


@functools.cache
def word_sign(sign):
    """What a character of a text in NFKD is among words: itself, "" where it is an accent or invisible, or a space."""
    category, kind = unicodedata.category(sign), unicodedata.combining(sign)
    if category in ("Mn", "Mc") and (kind in (0, 6, 7, 8, 9) or 84 <= kind <= 132):  # vowel signs of Indic scripts, ...
        return "" if re.search("SELECTOR|JOINER", unicodedata.name(sign)) else sign
    return "" if category[0] in "CM" else sign if sign.isalnum() or sign == "'" else " "


def normalize_wer(text):
    """The text that `wer` compares: lower-case words, & ° α spelled out: MedASR can only write the word."""
    text = re.sub(r"\{[a-z ]+\}|</?s>|<epsilon>", " ", tidy(text)).translate(FOLDS)
    text = unicodedata.normalize("NFKD", text).translate(FOLDS).lower()  # at the end: of ™ come capitals
    text = "".join(map(word_sign, THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)))
    return unicodedata.normalize("NFC", " ".join(re.findall(r"[^\W_][^\s']*(?:'[^\W_][^\s']*)*", text)))


def normalize_paper(text):
    """What `wer_paper` compares, by its authors: github.com/intron-innovation/AfriSpeech-200, arXiv 2310.00274."""
    text = re.sub(r"\s{2,}", " ", text).strip().replace(">", "").replace("\t", " ").replace("\n", "").lower()
    spoken = {" comma,": ",", " koma,": " ", " coma,": " ", " full stop.": ".", " full stop": ".", ",.": ".", ",,": ","}
    for words, sign in spoken.items():
        text = text.replace(words, sign)
    return re.sub(r"[^a-zA-Z0-9\s.,\-?:'/()\[\]+%]", "", " ".join(text.split()))


def decode_ids(processor, ids):
    """Greedy CTC text of a clip's frame ids: repeats collapsed, blanks (padding) and special tokens dropped."""
    return " ".join(processor.tokenizer.decode(ids, skip_special_tokens=True).split())


# ---------------------------------------------------------------- batches


def logit_count(config, extractor, samples):
    """Logits of clips of so many samples, a number or an array; below 1 for those that the model cannot be run on."""
    count, encoder = 1 + (samples - extractor.win_length) // extractor.hop_length, config.encoder_config
    for _ in range(2):  # the subsampler's convolutions, without padding
        count = (count - encoder.subsampling_conv_kernel_size) // encoder.subsampling_conv_stride + 1
    return count


def skip_reasons(config, extractor, encoder, max_train_seconds, table):
    """Why each clip of a table cannot be used, or ""; dev and test clips are never left out for their length."""

    def reason(problem, split, text, samples, room, is_roomy, labels):
        needed = len(labels) + sum(left == right for left, right in zip(labels, labels[1:]))  # a blank parts equal ones
        reasons = (
            (problem, problem),
            ("empty text", not tidy(text)),
            ("", split != "train"),
            (f"too short: {samples / SAMPLE_RATE:.2f} s", room < 1),
            (f"over --max_train_seconds: {samples / SAMPLE_RATE:.1f} s", samples / SAMPLE_RATE > max_train_seconds),
            (f"more labels than frames: {needed} labels, {room} logits", needed > room),
            ("no text left that the tokenizer covers", not labels and not is_roomy),
        )
        return next((words for words, applies in reasons if applies), "")

    columns = [table[name] for name in ("problem", "split", "text", "num_samples")]
    columns.append(logit_count(config, extractor, table["num_samples"]))
    # Of these characters each is a label at most: most texts need no tokenizer to show that they fit.
    is_plain, doubles = re.compile(r"[a-zA-Z0-9][^&@=<>\x80-\U0010ffff]*").fullmatch, re.compile(r"(.)(?=\1)").findall
    roomy = [bool(is_plain(text)) and len(text) < room - len(doubles(text)) for text, room in zip(*columns[2::2])]
    texts = table["text"].where((table["split"] == "train") & (table["problem"] == "") & ~np.array(roomy, bool), "")
    # A thousand at a time: the tokenizer takes one almost as long.
    labels = (ids for start in range(0, len(texts), 1000) for ids in encoder(texts.iloc[start : start + 1000]))
    return list(map(reason, *columns, roomy, labels))


def spec_augment(mels, seed):
    """SpecAugment (arXiv 1904.08779) in place: 2 x up to 20 bins and, in every 2.5 s, up to 0.3 s become silence."""
    generator, (frames, bins) = np.random.default_rng(seed), mels.shape
    for axis, size, longest in [(1, bins, 20)] * 2 + [(0, frames, min(30, frames // 5))] * math.ceil(frames / 250):
        width = int(generator.integers(min(longest, size) + 1))
        mels.narrow(axis, int(generator.integers(size - width + 1)), width).fill_(math.log(1e-5))  # as in `log_mels`


def log_mels(waveforms, lengths, extractor):
    """(log-mels (clips, frames, bins), mask (clips, frames)): LasrFeatureExtractor's but for float32, within 1e-3."""
    window = torch.hann_window(extractor.win_length, False, dtype=torch.float64).to(waveforms)
    # On a GPU in float64, because TF32, where a user has it on, would keep three digits.
    filters = extractor.mel_filters.to(waveforms.device, torch.float64 if waveforms.is_cuda else torch.float32)
    features = []
    for part in waveforms.split(len(waveforms) if waveforms.is_cuda else 1):  # a CPU's cache holds one clip's frames
        frames = part.unfold(-1, extractor.win_length, extractor.hop_length) * window
        spectrum = torch.fft.rfft(frames, n=extractor.n_fft)
        power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)  # abs() would take a root
        features.append((power.to(filters.dtype) @ filters).float().clamp_(min=1e-5).log_())
    features = torch.cat(features)
    ends = torch.arange(features.shape[1], device=features.device) * extractor.hop_length + extractor.win_length
    return features, ends <= lengths[:, None]


def model_inputs(batch, extractor, device):
    """What the model's forward takes, on `device`, of a batch of CTCCollator: the log-mels are computed there."""
    tensors, is_cuda = {name: batch[name] for name in batch if torch.is_tensor(batch[name])}, "cuda" in str(device)
    inputs = accelerate.utils.send_to_device(tensors, device, non_blocking=is_cuda)
    with torch.no_grad():
        features, mask = log_mels(inputs.pop("waveforms"), inputs.pop("num_samples"), extractor)
        for mels, is_real, seed in zip(features, mask, batch.get("mask_seeds", ())):
            spec_augment(mels[: int(is_real.sum())], seed)
    return {**inputs, "input_features": features, "attention_mask": mask}


@dataclass
class CTCCollator:
    """Rows -> a batch for `model_inputs`; its `counts` are samples without and with padding, its `clips` names."""

    extractor: object
    encoder: LabelEncoder | None = None
    shortest: int = 0
    seed: int | None = None  # of SpecAugment
    # In memory that a worker shares: it has its own copy of this object, for all epochs if it is persistent.
    epoch: object = field(default_factory=lambda: torch.zeros((), dtype=torch.int64).share_memory_())

    def __call__(self, rows):
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        waveforms = [row["samples"] if "samples" in row else decode_audio(row["audio"]) for row in rows]
        waveforms = [np.pad(samples, (0, max(0, self.shortest - len(samples)))) for samples in waveforms]
        lengths = [len(samples) for samples in waveforms]
        # Waveforms are padded, not features, so that padded frames come out as silence.
        batch = {"waveforms": pad(list(map(torch.from_numpy, waveforms))), "num_samples": torch.tensor(lengths)}
        batch |= {"counts": (sum(lengths), batch["waveforms"].numel()), "clips": [row.get("clip", "") for row in rows]}
        if self.encoder:
            labels = [torch.tensor(ids).long() for ids in self.encoder([row["text"] for row in rows])]
            batch["labels"] = pad(labels, padding_value=-100)
        if self.seed is not None:
            batch["mask_seeds"] = [(self.seed, int(self.epoch), zlib.crc32(row["clip"].encode())) for row in rows]
        return batch


# ---------------------------------------------------------------- decoding

# The most probable `ids` of each frame of a clip and their natural `log_probs`, both (frames, ids a frame).
Emissions = namedtuple("Emissions", "ids log_probs")
# A clip, or a window of a long one: samples `start` to `stop`, of whose logits `first` to `last` are kept.
Span = namedtuple("Span", "row start stop first last is_whole")


@dataclass
class Windows:
    """The samples of `Span`s of `clips`."""

    clips: object

    def __getitem__(self, span):
        clip = self.clips[span.row]
        samples = clip["samples"] if "samples" in clip else decode_noted(clip["audio"])[0]
        return {"samples": samples[span.start : span.stop], "text": clip.get("text")}


class Decoder:
    """One way from audio to text, for test sets and files, in all processes together."""

    def __init__(self, model, processor, settings, lm=None):
        self.model, self.processor, self.settings, self.lm = model, processor, settings, lm
        self.extractor, self.in_bfloat16 = processor.feature_extractor, False
        self.is_silent = not settings.is_first or settings.disable_tqdm
        self.step = model.config.inputs_to_logits_ratio * self.extractor.hop_length  # samples a logit
        # The fewest samples that the model can be run on, to a hop; 2,320 (0.145 s) for MedASR.
        candidates = range(self.extractor.win_length, SAMPLE_RATE, self.extractor.hop_length)
        self.shortest = next(count for count in candidates if logit_count(model.config, self.extractor, count) >= 1)

    def batches(self, lengths):
        """`Span`s of clips of so many samples, in batches, those of windows apart; windows meet in mid-overlap."""
        overlap = round(WINDOW_OVERLAP_SECONDS * SAMPLE_RATE / self.step)  # in logits, as the next
        window = round(self.settings.window_seconds * SAMPLE_RATE / self.step)
        spans, size, stride = [], window * self.step, (window - 2 * overlap) * self.step
        for row, length in enumerate(lengths):
            for start in range(0, max(0, length - size) + stride, stride):
                stop, last = min(start + size, length), window - overlap
                if stop == length:  # what comes after a clip's own logits is padding, where `forward` leaves garbage
                    last = logit_count(self.model.config, self.extractor, max(stop - start, self.shortest))
                spans.append(Span(row, start, stop, overlap if start else 0, last, length <= size))
        # The longest first: what does not fit in memory shows at once.
        spans.sort(key=lambda span: (span.is_whole, span.start - span.stop, span.row, span.start))
        batches, start, count = [], 0, self.settings.per_device_eval_batch_size
        budget = (3_600 if self.settings.device.type == "cuda" else 160) * SAMPLE_RATE  # 3,600 s take some 5 GB
        while start < len(spans):
            if self.settings.auto_eval_batch:
                count = max(1, budget // (spans[start].stop - spans[start].start))
            batches.append([span for span in spans[start : start + count] if span.is_whole == spans[start].is_whole])
            start += len(batches[-1])
        return batches

    def emissions(self, clips, encoder=None, doing="scoring"):
        """(the `Emissions` of each of `clips`, the mean CTC loss of those without windows; 0 without an `encoder`)."""
        settings, self.model = self.settings, self.model.to(self.settings.device).eval()
        mine = self.batches(clips.table["num_samples"].tolist())[settings.process_index :: settings.world_size]
        collator, pieces, loss = CTCCollator(self.extractor, encoder, shortest=self.shortest), [], 0.0
        options = {"batch_sampler": mine, "collate_fn": collator, "pin_memory": settings.device.type == "cuda"}
        # A generator of its own: scoring must not move what training draws next.
        options |= {"num_workers": min(settings.dataloader_num_workers, len(mine)), "generator": torch.Generator()}
        with tqdm.tqdm(total=sum(map(len, mine)), desc=doing, unit="clip", disable=self.is_silent) as bar, STOP_SIGNALS:
            for spans, batch in zip(mine, torch.utils.data.DataLoader(Windows(clips.audio), **options)):
                if STOP_SIGNALS.number:
                    break
                if not spans[0].is_whole:
                    batch.pop("labels", None)
                made, batch_loss = self.run(batch)
                loss += batch_loss
                pieces += [(span, [each[span.first : span.last] for each in found]) for span, found in zip(spans, made)]
                bar.update(len(spans))
            pieces, losses = accelerate.utils.gather_object(pieces), accelerate.utils.gather_object([loss])
            if stopped := agreed(STOP_SIGNALS.number, max):
                raise Stopped(stopped)
        of_clips = itertools.groupby(sorted(pieces, key=lambda piece: piece[0]), lambda piece: piece[0].row)
        joined = [Emissions(*map(np.concatenate, zip(*(found for _, found in parts)))) for _, parts in of_clips]
        return joined, sum(losses) / max(1, sum(span.is_whole for span, *_ in pieces))

    def run(self, batch):
        """(the `Emissions` of each clip, the sum of their losses) of a batch, halved where it fills the memory."""
        size = len(batch["waveforms"])
        try:
            with torch.inference_mode():
                inputs = model_inputs(batch, self.extractor, self.settings.device)
                with torch.autocast(self.settings.device.type, torch.bfloat16, enabled=self.in_bfloat16):
                    output = self.model(**inputs)
            count = min(16 if self.lm else 1, output.logits.shape[-1])  # the search takes less probable ids too
            best = output.logits.float().log_softmax(-1).topk(count)
            ids, log_probs = best.indices.int().cpu().numpy(), best.values.cpu().numpy()
            return list(map(Emissions, ids, log_probs)), float(output.loss) * size if "labels" in batch else 0.0
        except RuntimeError as error:
            if not is_full_memory(error):
                raise
            if size == 1:
                raise RunError("a single clip fills the GPU's memory: lower --window_seconds, or --use_cpu") from error
        torch.cuda.empty_cache()
        halves = slice(size // 2), slice(size // 2, size)
        (first, loss), (second, more) = (self.run({name: batch[name][half] for name in batch}) for half in halves)
        return first + second, loss + more

    def texts(self, emissions, lm=None):
        """The text of each clip: greedy, or that of the search with `lm`, of which each process makes its share."""
        if not lm:
            return [decode_ids(self.processor, found.ids[:, 0].tolist()) for found in emissions]
        mine = range(self.settings.process_index, len(emissions), self.settings.world_size)
        bar = tqdm.tqdm(mine, desc="language model", unit="clip", disable=self.is_silent)
        texts = [(index, decode_ids(self.processor, beam_search(emissions[index], lm)[0])) for index in bar]
        return [text for _, text in sorted(accelerate.utils.gather_object(texts))]


# ---------------------------------------------------------------- language model

# The defaults are pyctcdecode's: less probable ids of a frame are left out, hypotheses so far behind the best one too.
LM_FIELDS = "name kenlm words counts_as blank weight word_score beam min_log_prob max_behind"


class LanguageModel(namedtuple("LanguageModel", LM_FIELDS, defaults=(-5.0, 10.0))):
    """A KenLM n-gram of tokens. Each token adds weight x its natural log-probability + word_score to a text's score. In
    the n-gram id i has the number words[i]. It counts as counts_as[i]: itself, or for special tokens the blank."""

    @property
    def settings(self):
        return {name: getattr(self, name) for name in ("name", "weight", "word_score", "beam")}


def beam_search(emissions, lm):
    """(the id of each frame, the score) of the best text by a prefix beam search (Graves & Jaitly 2014)."""

    def add(hypotheses, key, score, path):  # sums two alignments of one text, and keeps the path of the likelier one
        known, kept = hypotheses.get(key, (-math.inf, None))
        hypotheses[key] = float(np.logaddexp(score, known)), path if score > known else kept

    ids, log_probs = lm.counts_as[emissions.ids].tolist(), emissions.log_probs.tolist()
    counts = np.maximum(1, (emissions.log_probs >= lm.min_log_prob).sum(axis=1)).tolist()
    # (text, id of the last frame) -> (score, the ids so far as nested pairs); the last id tells repeats from doubles.
    # A text is the n-gram's state after it, which is one object, however often it is asked for.
    hypotheses = {(lm.kenlm.start(False), lm.blank): (0.0, ())}
    for frame_ids, frame_log_probs, count in zip(ids, log_probs, counts):
        grown = {}
        for (text, last), (score, path) in hypotheses.items():
            for token, log_prob in zip(frame_ids[:count], frame_log_probs):
                longer, added = text, 0.0
                if token != lm.blank and token != last:
                    longer, log10 = lm.kenlm.score(text, lm.words[token])
                    added = lm.weight * log10 * math.log(10) + lm.word_score
                add(grown, (longer, token), score + log_prob + added, (path, token))
        best = sorted(grown.items(), key=lambda item: -item[1][0])[: lm.beam]
        hypotheses = {key: item for key, item in best if item[0] >= best[0][1][0] - lm.max_behind}
    ended = {}
    for (text, _), (score, path) in hypotheses.items():
        add(ended, text, score + lm.weight * lm.kenlm.finish(text)[1] * math.log(10), path)
    score, path = max(ended.values(), key=lambda item: item[0])
    frames = []
    while path:
        path, token = path
        frames.append(token)
    return frames[::-1], score


def load_lm(settings, processor, vocab_size):
    """The `LanguageModel` of --lm for the model's tokens, None without the flag; raises RunError."""
    if not settings.lm:
        return None
    tokenizer, folder, path = processor.tokenizer, Path(settings.model).expanduser(), Path(settings.lm)
    if settings.lm == "auto" and not (path := folder / LM_FILE).is_file():  # a fine-tuned model is served by MedASR's
        repo, revision = (DEFAULT_MODEL, None) if folder.is_dir() else (settings.model, settings.model_revision)
        with explained_hub_errors(repo, "model", f"; --lm auto needs its {LM_FILE}: give --lm a file instead"):
            path = Path(hub.hf_hub_download(repo, LM_FILE, revision=revision))
    names = enumerate(tokenizer.convert_ids_to_tokens(range(vocab_size)))
    pieces = {id: name for id, name in names if name not in (None, *tokenizer.all_special_tokens)}
    # "▁" is written as itself, or as pyctcdecode's users have to (MedASR's lm_6.kenlm).
    spellings = [{id: piece.replace("▁", mark) for id, piece in pieces.items()} for mark in "▁#"]
    words = ["no/such/piece", *{*spellings[0].values(), *spellings[1].values()}]
    with explained(f"--lm {path} cannot be loaded", "it must be ARPA's or KenLM's binary format"):
        dictionary = Lazy("flashlight.lib.text.dictionary").Dictionary(words)
        kenlm = Lazy("flashlight.lib.text.decoder.kenlm").KenLM(str(path), dictionary)
    # What the n-gram knows has another probability than nonsense. One of whole words knows no piece with a word mark.
    probabilities = [kenlm.score(kenlm.start(False), dictionary.get_index(word))[1] for word in words]
    known = {word for word, probability in zip(words, probabilities) if probability != probabilities[0]}
    spelling = max(spellings, key=lambda spelling: len(known & set(spelling.values())))
    found, starts = known & set(spelling.values()), {spelling[id] for id in pieces if pieces[id].startswith("▁")}
    share = f"{len(found):,} of the model's {len(pieces):,} tokens"
    if len(found & starts) < len(starts) / 2:
        raise RunError(f"--lm {path} knows {share}: it must be an n-gram of the tokens of this model, not of words")
    numbers = [dictionary.get_index(spelling.get(id, words[0])) for id in range(vocab_size)]
    counts_as = np.array([id if id in pieces else tokenizer.pad_token_id for id in range(vocab_size)])
    weights = settings.lm_weight, settings.lm_word_score, settings.lm_beam
    return LanguageModel(path.name, kenlm, numbers, counts_as, tokenizer.pad_token_id, *weights)


# ---------------------------------------------------------------- transcribing


def clip_words(decoder, emissions):
    """The words of a clip as in the json of a transcript: times in seconds, the mean probability of their frames."""
    tokenizer, lm = decoder.processor.tokenizer, decoder.lm
    path = beam_search(emissions, lm)[0] if lm else emissions.ids[:, 0].tolist()
    pieces, before, words = tokenizer.convert_ids_to_tokens(path), [None, *path], []
    frames = np.flatnonzero(np.isin(path, tokenizer.all_special_ids, invert=True))
    begins = [pieces[frame].startswith("▁") and path[frame] != before[frame] for frame in frames]
    is_chosen = emissions.ids == np.reshape(path, (-1, 1))
    probabilities = np.exp(np.where(is_chosen, emissions.log_probs, -np.inf).max(axis=1, initial=-np.inf))
    # The first logit sees the shortest clip, and stands for its middle: MedASR's 0.04 s from 0.0525 s on.
    first, step = (decoder.shortest - decoder.step) / 2 / SAMPLE_RATE, decoder.step / SAMPLE_RATE
    for part in filter(len, np.split(frames, np.flatnonzero(begins))):
        if text := decode_ids(decoder.processor, path[part[0] : part[-1] + 1]):
            start, end = (round(first + int(frame) * step, 3) for frame in (part[0], part[-1] + 1))
            probability = round(float(probabilities[part].mean()), 4)
            words.append({"word": text, "start": start, "end": end, "probability": probability})
    return words


# What MedASR writes for what is dictated, and what it stands for; line breaks are last: they take spaces away.
DICTATED = {
    "period": ". ", "full stop": ". ", "comma": ", ", "colon": ": ", "semicolon": "; ", "question mark": "? ",
    "exclamation mark": "! ", "exclamation point": "! ", "hyphen": "-", "slash": "/", "open parenthesis": " (",
    "close parenthesis": ") ", "new line": "\n", "next line": "\n", "new paragraph": "\n\n", "next paragraph": "\n\n",
}  # fmt: skip


def text_of(words, formatted):
    """The text of words; if `formatted` with what dictated punctuation and layout stand for."""
    text = " ".join(word["word"] for word in words)
    for name in [name for name in DICTATED if formatted and f"{{{name}}}" in text]:
        # A token however often in a row, with the whitespace around it and its sign before it, as in "5. {period}".
        text = re.sub(rf"{re.escape(DICTATED[name][0])}?(?:\s*\{{{name}\}})+\s*", DICTATED[name], text)
    return text.strip()


def transcript(kind, words, formatted, name=""):
    """The words of a recording as a file of --transcript_format `kind`, with `name` if given; json as of Whisper."""
    text, parts = text_of(words, formatted), []
    wrap = textwrap.TextWrapper(42, break_long_words=False, break_on_hyphens=False).wrap  # as usual in television
    if kind == "text":
        name = re.sub(r"[\0-\x1f\x7f-\x9f\u2028\u2029]", " ", name)  # one line a file, whatever its name
        return f"{name}\t{' '.join(text.split())}\n" if name else text + "\n"
    for word in words:  # each part is a subtitle: 7 s and two lines at most, parted at pauses and dictated line breaks
        ends = not parts or word["start"] - parts[-1][-1]["end"] >= 1.0 or word["end"] - parts[-1][0]["start"] > 7.0
        ends = ends or (formatted and parts[-1][-1]["word"] in ("line}", "paragraph}"))
        if ends or len(wrap(text_of([*parts[-1], word], formatted))) > 2:
            parts.append([])
        parts[-1].append(word)
    if kind == "json":
        segments = []
        for number, part in enumerate(parts):
            span = {"id": number, "start": part[0]["start"], "end": part[-1]["end"]}
            segments.append({**span, "text": text_of(part, formatted), "words": part})
        content = ({"file": name} if name else {}) | {"text": text, "segments": segments, "language": "en"}
        return json.dumps(content) + "\n"  # in ASCII, which every terminal can show
    cues, following = [], [*(part[0]["start"] for part in parts[1:]), math.inf]
    for number, (part, limit) in enumerate(zip(parts, following), start=1):
        times = part[0]["start"], min(part[-1]["end"] + 0.5, limit)  # it stays for half a second where there is room
        times = " --> ".join(str(np.datetime64(round(seconds * 1000), "ms"))[11:] for seconds in times)
        lines = "\n".join(wrap(text_of(part, formatted)))
        srt = f"{number}\n{times.replace('.', ',')}\n{lines}\n"
        cues.append(srt if kind == "srt" else f"{times}\n{html.escape(lines, quote=False)}\n")
    return "\n".join(cues if kind == "srt" else ["WEBVTT\n", *cues])


def find_recordings(settings):
    """{path of a recording of --transcribe: its file in --transcript_dir, if that is given}; raises UsageError."""
    found, recordings, keeps = {}, {}, settings.transcript_dir is not None
    for path in settings.transcribe:
        matches = [path] if path == "-" or os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        parts = [filter(is_audio_name, files_below(match)) if os.path.isdir(match) else [match] for match in matches]
        files = [file for part in parts for file in sorted(map(str, part))]
        if not files:
            raise UsageError(f"--transcribe is {path}: there is no such file, or no audio file in this folder")
        # What is below the fixed part of a pattern tells files of one name apart.
        fixed = os.path.dirname(path) if os.path.isfile(path) else re.split(r"[^/\\]*[*?\[]", path)[0]
        for file in files:
            below = "stdin" if file == "-" else os.path.relpath(file, fixed or ".")
            found.setdefault(os.path.abspath(file), (file, below, os.path.splitext(below)[0]))
    if settings.transcript_format in ("srt", "vtt") and not keeps and len(found) > 1:
        raise UsageError("--transcript_format srt and vtt need --transcript_dir for several files: each starts at 0")
    folder, suffix = Path(settings.transcript_dir or "").expanduser(), settings.transcript_format.replace("text", "txt")
    stems, owners = Counter(stem.casefold() for *_, stem in found.values()), {}
    for file, below, stem in found.values():
        stem = below if stems[stem.casefold()] > 1 else stem
        if keeps and (other := owners.setdefault(stem.casefold(), file)) != file:
            raise UsageError(f"--transcript_dir: {other} and {file} have one name; give the folder that both are in")
        recordings[file] = folder / f"{stem}.{suffix}" if keeps else None
    return recordings


def decode_recording(name):
    """A row of `Clips`, its samples mapped from a file that has no name; None where the recording cannot be read."""
    source, notes = name, []
    try:
        if name == "-" or Path(name).is_fifo():  # libsndfile reads headers back and forth
            source = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        with tempfile.TemporaryFile() as file:
            for block in read_audio(source, notes):
                block.tofile(file)
            samples = np.memmap(file, np.float32)
        return {"samples": samples, "num_samples": len(samples)}
    except (ValueError, OSError) as error:
        if is_full_disk(error):
            raise
        warn(f"{name} cannot be read as audio: {one_line(error)}", "error")
    finally:
        for note in notes:
            warn(f"{name}: {note}")


def transcribe(settings):
    """Print or write the text of each file of --transcribe, name unreadable ones on stderr; returns the exit status."""
    started, recordings, folder = time.monotonic(), find_recordings(settings), settings.transcript_dir
    names = [name for name, target in recordings.items() if not (target and target.exists())]
    if kept := len(recordings) - len(names):  # somebody may have corrected them
        say(f"{plural(kept, 'transcript')} in {folder} kept as they are; what is deleted is made again", sys.stderr)
    if not names:
        return 0
    processor, model = load_model(settings)
    loaded, settings.disable_tqdm = time.monotonic(), not sys.stderr.isatty()
    decoder = Decoder(model, processor, settings, load_lm(settings, processor, model.config.vocab_size))
    # In bfloat16 where that is asked for and not emulated; MedASR's activations overflow float16.
    has_bfloat16 = settings.device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    decoder.in_bfloat16 = bool(settings.bf16 or settings.fp16) and has_bfloat16
    kind, formatted = settings.transcript_format, settings.format_dictation
    with_names = folder is None and [*recordings] != settings.transcribe[:1]  # a single file needs none
    todo, done, heard = len(names), 0, 0.0
    at_once, settings.dataloader_num_workers = max(1, settings.dataloader_num_workers), 0  # its workers decode clips
    try:
        while names:
            part, seconds = {}, 0.0
            with ThreadPoolExecutor(at_once) as pool:
                while names and seconds < 3_600 * settings.world_size:  # enough to fill batches, little to lose
                    some, names = names[:at_once], names[at_once:]
                    part |= {name: row for name, row in zip(some, pool.map(decode_recording, some)) if row}
                    seconds = sum(row["num_samples"] for row in part.values()) / SAMPLE_RATE
            clips = Clips([*part.values()], pandas.DataFrame(part.values(), columns=["num_samples"]))
            emissions, _ = decoder.emissions(clips, doing="transcribing")
            for name, found in zip(part, emissions) if settings.is_first else ():
                text = transcript(kind, clip_words(decoder, found), formatted, name if with_names else "")
                if recordings[name]:
                    write_text(recordings[name], text)
                else:
                    print(text, end="", flush=True)
            done, heard = done + len(part), heard + seconds
    except BrokenPipeError:  # `| head` has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if heard:
        took = time.monotonic() - loaded
        speed = f"{took:,.1f} s, {heard / took:,.1f} times as fast as it was spoken"
        say(f"{heard:,.1f} s of audio in {speed}; loading took {loaded - started:.1f} s", sys.stderr)
    return 0 if done == todo else 1


# ---------------------------------------------------------------- scores

PAPER_SECONDS = 17  # the AfriSpeech authors' tables are of test clips shorter than this
# A smaller group is shown, and marked, but neither ranked nor averaged: its figure says more about its few speakers.
MIN_GROUP_SPEAKERS, MIN_GROUP_WORDS = 5, 500
GROUP_KINDS = ("domain", "accent", "country", "gender", "age_group", "seen_accent", "duration")
ERROR_KINDS = {"substitute": "substitutions", "delete": "deletions", "insert": "insertions"}  # jiwer's names: ours
SHARES = ("probability_of_improvement", "clips_better", "clips_equal", "clips_worse")
DURATIONS = {"0-5 s": 5, "5-10 s": 10, "10-20 s": 20, "over 20 s": float("inf")}  # group -> its end, in seconds
# What readers say for punctuation and layout. Many AfriSpeech speakers voice it although the prompt has only the sign.
SPOKEN_PUNCTUATION = re.compile(
    r"\b(?:full stop|period|comma|semi ?colon|colon|question mark|exclamation mark|hyphen|dash|slash|apostrophe|"
    r"(?:open|close)d? (?:brackets?|parenthesis|quotes?)|(?:next|new) (?:line|paragraph))\b"
)
NEGATIONS = re.compile(r"no|not|nor|none|never|without|negative|denie[sd]|deny|absent|cannot|\w+n't")
NUMBERS = re.compile(
    r"\w*\d\w*|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty|thirty|forty|fifty|"
    r"sixty|seventy|eighty|ninety|hundred|thousand|million|half|once|twice"
)
# medwer's normaliser, which is Whisper's for English, and the medical terms on which its medical WER is.
protocol = functools.cache(lambda: medwer.Scorer())
normalize_whisper = functools.lru_cache(2**16)(lambda text: protocol().norm(text))  # two rates ask for each text


def keep(pattern):
    return lambda text: " ".join(filter(pattern.fullmatch, normalize_wer(text).split()))


def keep_medical(text):
    """The medical terms of a text, each phrase one word."""
    return medwer.keep_medical(normalize_whisper(text), protocol().entries, protocol().max_tokens)


# A rate is a normaliser, text in and words to be compared out, and its name in tables.
RATES = {
    "wer": (normalize_wer, "WER"),
    "wer_whisper": (normalize_whisper, "WER, Whisper's normalisation"),
    "wer_medical": (keep_medical, "WER of medical terms alone, by medwer"),
    "wer_spoken": (normalize_wer, "WER, spoken punctuation set aside"),
    "wer_paper": (normalize_paper, "WER, the AfriSpeech authors' normalisation"),
    "wer_paper_short": (normalize_paper, f"the same, clips under {PAPER_SECONDS} s, as in their tables"),
    "wer_raw": (lambda text: " ".join(unicodedata.normalize("NFC", text).split()), "WER as written"),
    "wer_numbers": (keep(NUMBERS), "WER of numbers alone"),
    "wer_negations": (keep(NEGATIONS), "WER of negations alone"),
    "cer": (normalize_wer, "CER"),
}
WITH_INTERVALS = ("wer", "wer_whisper", "wer_medical")
# What is scored on a set of clips, and its name in tables: texts before and after training, greedy and with the LM.
SYSTEMS = dict(baseline="before", finetuned="fine-tuned", baseline_lm="before, LM", finetuned_lm="fine-tuned, LM")


def count_errors(rate, references, hypotheses):
    """(ints (clips, 4): substitutions, deletions, insertions, the reference's length; {kind: Counter of them})"""
    normalize, process = RATES[rate][0], jiwer.process_characters if rate == "cer" else jiwer.process_words
    if rate in ("wer_whisper", "wer_medical"):  # their protocol: a reference without a word does not count
        hypotheses = [text * bool(normalize_whisper(before)) for before, text in zip(references, hypotheses)]
    references, hypotheses = list(map(normalize, references)), list(map(normalize, hypotheses))
    for index, text in enumerate(hypotheses if rate == "wer_spoken" else ()):
        written = set(SPOKEN_PUNCTUATION.findall(references[index]))  # what the reference lacks is no error
        hypotheses[index] = SPOKEN_PUNCTUATION.sub(lambda sign, kept=written: sign[0] * (sign[0] in kept), text)
    output, errors = process(references, hypotheses), {kind: Counter() for kind in ERROR_KINDS}
    counts = np.zeros((len(references), len(errors) + 1), np.int64)
    for row, before, after, chunks in zip(counts, output.references, output.hypotheses, output.alignments):
        row[-1] = len(before)
        for chunk in [chunk for chunk in chunks if chunk.type != "equal"]:
            sides = before[chunk.ref_start_idx : chunk.ref_end_idx], after[chunk.hyp_start_idx : chunk.hyp_end_idx]
            pairs = [" -> ".join(filter(None, pair)) for pair in itertools.zip_longest(*sides)]
            row[list(errors).index(chunk.type)] += len(pairs)
            errors[chunk.type].update(pairs)
    return counts, errors


def corpus_rate(references, hypotheses):
    """The WER of all texts together; None where the references have no word."""
    *errors, length = count_errors("wer", references, hypotheses)[0].sum(axis=0)
    return float(sum(errors) / length) if length else None


class Scores:
    """`counts` of a test set's errors, a row a clip: (system, rate or kind of error), and ("of", rate), its length."""

    def __init__(self, table, texts, train_accents=None):
        table, columns = table.reset_index(drop=True), {}
        seconds = table["num_samples"].astype(float) / SAMPLE_RATE
        is_seen = table["accent"].str.casefold().isin(train_accents or ()).map({True: "seen", False: "unseen"})
        table["seen_accent"] = is_seen.where((table["accent"] != "") & (train_accents is not None), "")
        durations = pandas.cut(seconds, [0, *DURATIONS.values()], right=False, labels=list(DURATIONS))
        table["duration"] = durations.astype("str").fillna("")
        table["speaker_or_clip"] = table["speaker"].where(table["speaker"] != "", table["clip"])
        table[list(GROUP_KINDS)] = table[list(GROUP_KINDS)].replace("", "unknown")
        for system, rate in itertools.product(texts, RATES):
            counts = count_errors(rate, table["text"], texts[system])[0]
            if rate == "wer_paper_short":
                counts[~(seconds < PAPER_SECONDS)] = 0
            columns[system, rate], columns["of", rate] = counts[:, :3].sum(axis=1), counts[:, 3]
            if rate == "wer":
                columns |= {(system, kind): errors for kind, errors in zip(ERROR_KINDS.values(), counts.T)}
        self.table, self.texts, self.counts = table, texts, pandas.DataFrame(columns)
        self.endings = [ending for ending in ("", "_lm") if any(system.endswith(ending) for system in texts)]

    def metrics(self, part=None, kinds=GROUP_KINDS):
        """metrics.json's part of a test set, or of a part of it: {system, or "delta": rates, and "groups" of `kinds`}.
        Intervals resample whole speakers, paired (doi 10.1109/ICASSP.2004.1326009)."""
        part, generator, found = self.table if part is None else part, np.random.default_rng(0), {}
        counts = self.counts.loc[part.index]
        columns = list(itertools.product((*self.texts, "of"), WITH_INTERVALS))
        people, sums = counts[columns].groupby(part["speaker_or_clip"]).sum().to_numpy(float), counts.sum()
        draw = functools.partial(generator.integers, len(people), size=(100, len(people)), dtype=np.int32)
        # 100 at a time: where no clip names its speaker, all together would take gigabytes.
        drawn = dict(zip(columns, np.concatenate([people[draw()].sum(axis=1) for _ in range(100)]).T))
        drawn = {name: drawn[name] / np.maximum(drawn["of", name[1]], 1) for name in columns}
        sizes = {"clips": len(part), "speakers": len(people), "words": int(sums["of", "wer"])}
        sizes["small"] = sizes["speakers"] < MIN_GROUP_SPEAKERS or sizes["words"] < MIN_GROUP_WORDS
        for ending in self.endings:
            before, after, delta = (f"{name}{ending}" for name in ("baseline", "finetuned", "delta"))
            found |= dict.fromkeys((before, after, delta))
            for system in [system for system in (before, after) if system in self.texts]:
                rates = {rate: float(sums[system, rate] / of) if of else None for rate, of in sums["of"].items()}
                found[system] = {**rates, **sizes, **{kind: int(sums[system, kind]) for kind in ERROR_KINDS.values()}}
            if found[before] and found[after]:
                drawn |= {(delta, rate): drawn[after, rate] - drawn[before, rate] for rate in WITH_INTERVALS}
                more = counts[after, "wer"] - counts[before, "wer"]
                shares = (float(share.mean()) for share in (drawn[delta, "wer"] < 0, more < 0, more == 0, more > 0))
                found[delta] = {rate: found[after][rate] - found[before][rate] for rate in RATES if sums["of", rate]}
                found[delta] |= dict(zip(SHARES, shares))
        for system, rate in [key for key in drawn if key[0] != "of"]:
            ends = np.percentile(drawn[system, rate], (2.5, 97.5)).tolist()
            found[system][f"{rate}_ci95"] = ends if sums["of", rate] else None
        for kind in kinds:
            for name, group in part.groupby(kind):
                for system, figures in self.metrics(group, kinds=()).items():
                    if figures:
                        found[system].setdefault("groups", {}).setdefault(kind, {})[name] = figures
        return found


# ---------------------------------------------------------------- report


def percent(value):
    return "-" if value is None else f"{100 * value:.1f} %"


def points(delta, rate="wer", has_interval=True):
    """A change in percentage points, "-" where there is none, with its interval if it `has_interval`."""
    if rate not in delta:
        return "-"
    ends = "[{:+.1f}, {:+.1f}]".format(*(100 * end for end in delta[f"{rate}_ci95"])) if has_interval else ""
    return f"{100 * delta[rate]:+.1f} {ends}".rstrip()


def markdown_text(text):
    """Text of a corpus or a user as Markdown that shows it as it is: no markup, HTML or link in it comes alive."""
    return re.sub(r"([\\`*_\[\]|!~$])", r"\\\1", html.escape(" ".join(redact(str(text)).split()), quote=False))


def markdown_table(header, rows):
    rows = [header, *(list(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows] + [""]


def last_of(found, ending=""):
    """What {system: something or None} has of the fine-tuned model, else of the baseline; with "_lm" of the LM's."""
    return found.get(f"finetuned{ending}") or found.get(f"baseline{ending}")


def score_lines(metrics):
    last, delta, header, rows = last_of(metrics), metrics["delta"], ["rate"], [[name] for _, name in RATES.values()]
    for ending in [ending for ending in ("", "_lm") if last_of(metrics, ending)]:
        systems = f"baseline{ending}", f"finetuned{ending}"
        header += [*map(SYSTEMS.get, systems), "change, points"]
        for row, rate in zip(rows, RATES):
            rates = (percent((metrics.get(system) or {}).get(rate)) for system in systems)
            row += [*rates, points(metrics.get(f"delta{ending}") or {}, rate, rate in WITH_INTERVALS)]
    change = f"WER {percent(last['wer'])}, 95 % interval over speakers {' to '.join(map(percent, last['wer_ci95']))}."
    if delta:
        change = f"WER changes by {points(delta)} points (95 % interval over speakers, paired); "
        change += "probability of improvement {}. {} of the clips are better, {} equal, {} worse."
        change = change.format(*(percent(delta[name]) for name in SHARES))
    sizes = ", ".join(plural(last[f"{noun}s"], noun) for noun in ("clip", "speaker", "word"))
    return [f"{sizes}. All rates are corpus-level.\n", *markdown_table(header, rows), change + "\n"]


def path_lines(path):
    """A table of WERs of the models on the way from the base (share 0) to the fine-tuned one (share 1)."""
    rows = [[f"{point['share']:g}", *map(percent, point["wer"].values())] for point in path]
    how = f"WER of up to {SOME_CLIPS} clips of each; --interpolate SHARE makes such a model of a finished run.\n"
    return [*markdown_table(["share", *map(markdown_text, path[0]["wer"])], rows), how]


def group_lines(metrics, heading="##", fewest=1, most=None):
    """Markdown lines: a table, and what it comes to, for the first `most` kinds of at least `fewest` groups."""
    with_lm, delta, lines = last_of(metrics, "_lm"), metrics["delta"], []
    kinds = [(kind, groups) for kind, groups in last_of(metrics)["groups"].items() if len(groups) >= fewest]
    for kind, groups in kinds[:most]:
        rows = []
        for name, now in sorted(groups.items(), key=lambda item: -item[1]["words"]):
            has_interval = now["words"] and now["speakers"] >= MIN_GROUP_SPEAKERS
            ends = "[{}, {}]".format(*map(percent, now["wer_ci95"])) if has_interval else "-"
            change = points(delta["groups"][kind][name], has_interval=has_interval) if delta and now["words"] else "-"
            row = [markdown_text(name) + "\\*" * now["small"], f"{now['clips']:,}", f"{now['speakers']:,}"]
            row += [f"{now['words']:,}", percent(delta and metrics["baseline"]["groups"][kind][name]["wer"])]
            row += [percent(now["wer"]), ends, change, percent(now["wer_whisper"]), percent(now["wer_medical"])]
            rows.append(row + ([percent(with_lm["groups"][kind][name]["wer"])] if with_lm else []))
        label, large = kind.replace("_", " "), {name: now["wer"] for name, now in groups.items() if not now["small"]}
        header = "clips|speakers|words|before|WER|95 % interval|change, points|Whisper's|medical".split("|")
        header = [label, *header, *["WER, LM"] * bool(with_lm)]
        lines += [f"{heading} By {label}\n", *markdown_table(header, rows)]
        summary = f"Fewer than two groups have {MIN_GROUP_SPEAKERS} speakers and {MIN_GROUP_WORDS} words: no ranking."
        if len(large) > 1:
            worst, mean = max(large, key=large.get), percent(np.mean(list(large.values())))
            summary = f"Macro average over {len(large)} groups that are large enough: {mean}"
            summary += f"; the worst is {markdown_text(worst)}, {percent(large[worst])}."
        lines.append(summary + "\n")
    return lines


def show_scores(metrics):
    """Print the scores, by domain, or where there is but one by the next kind of group that tells something."""
    lines = ["", *score_lines(metrics), *group_lines(metrics, fewest=2, most=1)]
    for name, part in metrics.get("also", {}).items():
        lines += [f"{name}:", *score_lines(part)]
    lines += path_lines(metrics["path"]) if metrics.get("path") else []
    say("\n".join(lines))


def draw_pictures(folder, metrics, history):
    """PNGs beside the report, of what the data allows; returns the Markdown lines that show them."""
    figure_of, pictures = functools.partial(Lazy("matplotlib.figure").Figure, dpi=110, layout="tight"), {}
    groups = last_of(metrics)["groups"]["accent"]
    order = sorted((group for group in groups if groups[group]["words"]), key=lambda group: groups[group]["wer"])
    if len(order) > 30:
        order = [group for group in order if not groups[group]["small"]] or order[-30:]
    axes = pictures["wer_by_accent.png"] = figure_of(figsize=(8, 1.5 + 0.32 * len(order))).subplots()
    for offset, system in zip((0.16, -0.16), [system for system in ("baseline", "finetuned") if metrics[system]]):
        chosen = [metrics[system]["groups"]["accent"][group] for group in order]
        rates, ends = (100 * np.array([group[name] for group in chosen]).T for name in ("wer", "wer_ci95"))
        errors = np.abs(ends - rates) * [group["speakers"] >= MIN_GROUP_SPEAKERS for group in chosen]
        axes.errorbar(rates, np.arange(len(order)) + offset, xerr=errors, fmt="o", capsize=2, label=SYSTEMS[system])
    axes.set_yticks(range(len(order)), [name[:40] + " *" * groups[name]["small"] for name in order], parse_math=False)
    axes.set(xlabel="WER, % (95 % interval over speakers; * too small to rank)", xlim=(0, None), title="WER by accent")
    if evaluations := [(entry["step"], 100 * entry["eval_wer"]) for entry in history if "eval_wer" in entry]:
        axes = pictures["training.png"] = figure_of(figsize=(8, 3.5)).subplots()
        axes.plot(*zip(*evaluations), "o-", label="dev WER")
        axes.set(xlabel="update", ylabel="dev WER, %", ylim=(0, None), title="Dev WER and training loss")
        losses = axes.twinx()
        losses.plot(*zip(*((entry["step"], entry["loss"]) for entry in history if "loss" in entry)), color="0.6")
        losses.set(ylabel="training loss (grey)", ylim=(0, None))
    if path := metrics.get("path"):
        axes = pictures["path.png"] = figure_of(figsize=(8, 5)).subplots()
        for name in list(path[0]["wer"])[1:]:
            wers = 100 * np.array([[point["wer"]["dev"], point["wer"][name]] for point in path], float)
            axes.plot(*wers.T, "o-", label=name[-40:].replace("$", "\\$"))
            for point, place in zip(path, wers):
                axes.annotate(f" {point['share']:g}", place)
        axes.set(xlabel="dev WER, %", ylabel="WER of what is also scored, %", title="From base (0) to fine-tuned (1)")
    for name, axes in pictures.items():
        axes.grid(alpha=0.3)
        axes.legend()
        with complete(folder / name) as partial:
            axes.figure.savefig(partial, format="png")
    return [f"![{axes.get_title()}]({name})\n" for name, axes in pictures.items()]


def write_results(folder, content, scores, title, notes=(), history=()):
    """Write results/, metrics.json last, of {"test" or a name of --also_score: Scores}; returns the metrics."""
    packages = "torch transformers datasets evaluate jiwer librosa soundfile accelerate tensorboard".split()
    versions = {"python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in packages}}
    parts = {name: part.metrics() for name, part in scores.items()}
    metrics = {"versions": versions, **content, **parts.pop("test")} | ({"also": parts} if parts else {})
    last, before = ("finetuned", "baseline") if "finetuned" in scores["test"].texts else ("baseline", "none")
    for name, part in scores.items():  # the predictions in the keys that NeMo's Speech Data Explorer reads, and ours
        table, seconds = part.table, [round(count / SAMPLE_RATE, 3) for count in part.table["num_samples"]]
        entries = {"audio_filepath": table["clip"], "duration": seconds, "text": table["text"]}
        for ending in part.endings:
            entries[f"pred_text{ending}"] = part.texts[last + ending]
            entries[f"baseline_text{ending}"] = part.texts.get(before + ending)
        entries |= {name: table[name].replace("unknown", "") for name in GROUP_COLUMNS}
        entries["wer"] = part.counts[last, "wer"] / part.counts["of", "wer"].replace(0, np.nan)
        entries = pandas.DataFrame(entries).astype("object").replace(np.nan, None).to_dict("records")
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
        write_text(folder / f"predictions_{file_stem(name)}.jsonl", "".join(lines))
    if (scores["test"].table["speaker"] == "").all():
        notes = [*notes, "No clip names its speaker: each counts as one of its own; the intervals are too narrow."]
    lines = [f"# {markdown_text(title)}\n", *score_lines(metrics), *(markdown_text(note) + "\n" for note in notes)]
    lines += draw_pictures(folder, metrics, history) + group_lines(metrics)
    lines.append(f"\\* under {MIN_GROUP_SPEAKERS} speakers or {MIN_GROUP_WORDS} words: neither ranked nor averaged.\n")
    lines += ["## Between the base and the fine-tuned\n", *path_lines(metrics["path"])] if metrics.get("path") else []
    for name, part in parts.items():
        lines += [f"## Also scored: {markdown_text(name)}\n", *score_lines(part), *group_lines(part, "###", fewest=2)]

    lines.append("## What goes wrong\n")
    test, table, texts = scores["test"], scores["test"].table, scores["test"].texts[last]
    errors = count_errors("wer", table["text"], texts)[1]
    for kind, label in (("substitute", "confusions"), ("insert", "insertions"), ("delete", "deletions")):
        common = ", ".join(f"{words} ({count})" for words, count in errors[kind].most_common(15))
        lines.append(f"Commonest {label}: {common or 'none'}.\n")
    lengths = np.array([len(normalize_wer(text).split()) for text in texts])
    empty, runaway = sum(lengths == 0), sum(lengths > 2 * test.counts["of", "wer"] + 5)
    lines.append(f"Empty outputs: {empty}. Runaway outputs (over twice the reference's words): {runaway}.\n")
    if before in test.texts:
        more = test.counts[last, "wer"] - test.counts[before, "wer"]
        worst = more[more > 0].nlargest(10).map("+{}".format)
        told = table.assign(errors=worst, reference=table["text"], before=test.texts[before], now=texts)
        told = told.loc[worst.index, ["errors", "accent", "reference", "before", "now"]]
        told = told.map(lambda cell: markdown_text(tidy(cell)[:200]))
        lines += ["Clips that got worse most:\n", *markdown_table(list(told), told.to_numpy())] if len(told) else []
    write_text(folder / "report.md", "\n".join(lines) + "\n")
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False, default=str))
    show_scores(metrics)
    return metrics


def write_model_card(final, results, settings, metrics):
    model, dataset, data = public(settings.model), public(settings.dataset), metrics["data"]
    is_own, train, task = data["layout"] == "recordings", data["train"], "automatic-speech-recognition"
    found, decoding, sets = [], "", {dataset: metrics, **metrics.get("also", {})}
    for (name, part), rate in itertools.product(sets.items(), RATES):
        if part["finetuned"][rate] is not None:  # as some are of texts in another script
            value = round(100 * part["finetuned"][rate], 2)
            found.append(hub.EvalResult(task, name, name, rate[:3], value, metric_name=rate, dataset_split="test"))
    named = settings.model, settings.dataset.partition(":")[0]
    base, corpus = (None if Path(name).expanduser().is_dir() else name for name in named)  # of the Hub
    header = dict(language="en", license="other", license_name="health-ai-developer-foundations", pipeline_tag=task)
    header |= dict(license_link="https://developers.google.com/health-ai-developer-foundations/terms")
    header |= dict(base_model=base, datasets=corpus and [corpus], library_name="transformers", eval_results=found)
    header["tags"] = ["medical", "ctc", *["african-accents"] * (not is_own)]
    header["model_name"] = Path(settings.output_dir).resolve().name
    new_speakers = data["test"]["speakers"] and "test" not in data["speakers_in_train_too"]
    if lm := metrics.get("lm"):
        flags = {"lm": public(settings.lm), **{f"lm_{name}": lm[name] for name in ("weight", "word_score", "beam")}}
        command = shlex.join(["python", PROGRAM, "--transcribe", "visit.wav", "--model", "final", *as_flags(flags)])
        decoding = f"\nWith the language model {markdown_text(lm['name'])}:\n\n```\n{command}\n```\n"
    card = f"""---
{hub.ModelCardData(**header).to_yaml()}
---
# {markdown_text(model)} adapted to {markdown_text(dataset) if is_own else "African-accented English"}

Fine-tuned on {markdown_text(dataset)}, {plural(train["clips"], "clip")} and {train["hours"]:.1f} hours,
by `{PROGRAM}`. The scores below are of its test split{", whose speakers are not in training" * bool(new_speakers)}.

```python
import librosa
from transformers import AutoModelForCTC, AutoProcessor

processor, model = AutoProcessor.from_pretrained("final"), AutoModelForCTC.from_pretrained("final")
audio, _ = librosa.load("visit.wav", sr=16000)
ids = model.generate(**processor(audio, sampling_rate=16000))
print(processor.batch_decode(ids, skip_special_tokens=True)[0])
```
{decoding}
The base model's terms (Health AI Developer Foundations) hold for this derivative too, and those of the data:
{"see where it comes from" if is_own else "AfriSpeech-200 is CC-BY-NC-SA-4.0, for non-commercial use"}.
Not a medical device: a person checks every transcript that a decision rests on.

Made with `{settings.command}`; {", ".join(map(" ".join, metrics["versions"].items()))}.

"""
    write_text(final / "README.md", card + (results / "report.md").read_text(encoding="utf-8").replace("# ", "## ", 1))
    for picture in results.glob("*.png"):
        shutil.copy(picture, final)


def score_file(settings):
    """The whole report for the texts in --score_file, made by any system; returns the exit status."""
    path, folder = Path(settings.score_file), Path(settings.output_dir) / "results"
    try:
        table, defects = read_table(path, "text", ("text", "pred_text"), f"--score_file {path}")
    except RunError as error:
        raise UsageError(str(error)) from error
    table, notes = with_one_spelling(table), [f"{path.name}: {defect}" for defect in defects]
    table["clip"] = table["clip"].where(table["clip"] != "", [f"row {index + 1}" for index in table.index])
    table["num_samples"] = table["num_samples"].replace(0, np.nan)
    for lacking, what in ((table["text"].map(tidy) == "", "no text"), (table["pred_text"].isna(), "no pred_text")):
        table.loc[lacking & (table["problem"] == ""), "problem"] = what
    bad, table = table[table["problem"] != ""], table[table["problem"] == ""]
    for reason, rows in bad.groupby(bad["problem"].str.split(r" *[:(]", regex=True).str[0]):
        notes.append(f"{plural(len(rows), 'row')} left out: {reason}, such as {rows['clip'].iloc[0]}.")
    if not any(map(normalize_wer, table["text"])):
        raise UsageError(f"--score_file {path} has no text with a word to score and a pred_text")
    if unknown := int(table["num_samples"].isna().sum()):
        notes.append(f"{plural(unknown, 'row')} without a duration: not among clips under {PAPER_SECONDS} s.")
    texts, before = {"baseline": table["pred_text"].tolist()}, table.get("baseline_text")
    if before is not None and before.notna().all():
        texts = {"baseline": before.tolist(), "finetuned": texts["baseline"]}
    elif before is not None and before.fillna("").any():
        notes.append("Some rows have no baseline_text: no comparison is made.")
    for note in notes:
        warn(note)
    content = {"config": public({"command": settings.command, "score_file": settings.score_file})}
    content["data"] = {"test": {"clips": len(table), "hours": sizes_of(table)["hours"], "left_out": len(bad)}}
    write_results(folder, content, {"test": Scores(table, texts)}, f"Scores of {path.name}", notes)
    say(f"\nresults: {folder}")
    return 0


# ---------------------------------------------------------------- training


def guard_half_precision(model, batches, device):
    """Make `model` safe under float16, measured on `batches` (MedASR's subsampler reaches 1.1e5), or raise RunError."""
    peaks, kind = Counter(), torch.device(device).type

    def watch(module, inputs, output):
        tensors = [item for item in (*inputs, output) if torch.is_tensor(item) and item.is_floating_point()]
        peaks[module] = max([peaks[module], *(float(tensor.abs().max()) for tensor in tensors if tensor.numel())])

    model.to(device).eval()
    with torch.nn.modules.module.register_module_forward_hook(watch), torch.no_grad():
        for batch in batches:
            model(**batch)
    for name, module in model.named_modules():
        is_large = peaks[module] > 65_504 / 8 and list(module.parameters(recurse=False))  # float16's end, room to grow
        if is_large or name == "encoder.subsampler":
            in_float32 = torch.amp.custom_fwd(type(module).forward, device_type=kind, cast_inputs=torch.float32)
            module.forward = functools.partial(in_float32, module)
    with torch.no_grad(), torch.autocast(kind, torch.float16):
        if not all(model(**batch).logits.isfinite().all() for batch in batches):
            raise RunError("the model overflows float16 even with its large activations in float32: use --bf16")


@dataclass
class TrainingOrder:
    """A sampler: an epoch has all of the first `own` clips and, drawn anew, as many others as --replay asks for."""

    lengths: list  # in samples, of all clips
    own: int
    settings: ScriptFlags
    generator: object

    def __len__(self):
        return round(self.own / (1 - self.settings.replayed[1]))

    def __iter__(self):
        others, chosen = len(self.lengths) - self.own, list(range(self.own))
        while len(chosen) < len(self):  # more than once through a small corpus
            drawn = self.own + torch.randperm(others, generator=self.generator)
            chosen += drawn[: len(self) - len(chosen)].tolist()
        grouped, lengths = Lazy("transformers.trainer_pt_utils").get_length_grouped_indices, self.lengths
        order = grouped([lengths[clip] for clip in chosen], self.settings.clips_an_update, generator=self.generator)
        return (chosen[place] for place in order)


class CTCTrainer:
    """Mixed with the Trainer and TrainerCallback: it is its own callback. `make_trainer` sets its other attributes."""

    loss_is_scaled_for_ga = True  # compute_loss has divided it among an update's batches
    clips, bar = (), None  # of the update under way; of the progress
    # Since the last log: samples without and with padding; when that was, pauses aside; seconds of waiting for data.
    heard, started, waited = np.zeros(2), 0.0, 0.0
    skipped, skipped_in_a_row = 0, 0  # updates that overflowed float16, in all and just now

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = (train_dataset or self.train_dataset)[self.args.length_column_name][:]  # [:]: a column takes minutes
        # The order is the same for any division of an update's clips into batches, steps and processes.
        return TrainingOrder(lengths, self.own, self.args, self.order)

    def get_train_dataloader(self):
        if not isinstance(self.train_dataset, TrainingStream):
            return super().get_train_dataloader()
        options = {"batch_size": self.args.train_batch_size, "pin_memory": self.args.dataloader_pin_memory}
        self.train_dataset.loader_options = {**options, "collate_fn": self.data_collator}
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=None)  # accelerate would divide it again

    def on_train_begin(self, args, state, control, **kwargs):
        looks = {"desc": "training", "unit": "update", "disable": self.decoder.is_silent}
        self.bar = tqdm.tqdm(total=state.max_steps, initial=state.global_step, **looks)
        self.begun, self.third = time.monotonic(), state.global_step + 3
        self.skipped = max((entry.get("skipped_updates", 0) for entry in state.log_history), default=0)
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"  # the folder may have been moved
        state.best_model_checkpoint = str(best) if best.exists() else state.best_model_checkpoint
        self.stop_early()

    def stop_early(self):
        """Early stopping counts in the history of the run, which a resumption keeps."""
        best, patience = self.state.best_global_step or 0, self.args.early_stopping_patience
        late = sum("eval_wer" in entry and entry["step"] > best for entry in self.state.log_history)
        if self.args.load_best_model_at_end and 0 < patience <= late and not self.control.should_training_stop:
            self.control.should_training_stop, more = True, "a higher --early_stopping_patience goes on"
            say(f"  stopped early: {plural(late, 'evaluation')} without a better dev WER; {more}")

    def _run_epoch(self, epoch, **options):
        self.order.manual_seed(self.args.seed + epoch)  # the Trainer restores its state only after the first batch
        self.data_collator.epoch.fill_(epoch)
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(epoch=epoch, **options)  # which would make one more update at the end

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        start = time.monotonic()
        self.started = self.started or start
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.waited += time.monotonic() - start
        self.heard = self.heard + np.sum([batch["counts"] for batch in batches], axis=0)
        self.clips = [clip for batch in batches for clip in batch["clips"]]
        self.statistics = [values.clone() for values in self.model.buffers()]  # BatchNorm's
        return [model_inputs(batch, self.decoder.extractor, device) for batch in batches], items

    def compute_loss(self, model, inputs, **options):
        """The batch's part in the mean over the update's clips; the Trainer's is over batches, also of other sizes."""
        return super().compute_loss(model, inputs, **options) * (len(inputs["labels"]) / len(self.clips))

    def _get_grad_norm(self, model, grad_norm=None):
        """Here a gradient that is not finite shows; accelerate sees no skipped update of the default, fused AdamW."""
        norm = super()._get_grad_norm(model, grad_norm)
        if np.isfinite(float(norm)):
            self.skipped_in_a_row = 0
            return norm
        for values, before in zip(self.model.buffers(), self.statistics):  # infinite ones would stay so
            values.copy_(before)
        # The gradient scaler halves its scale at each skipped update, so a run starts with a few; ten are overflow.
        most = 10 if self.args.fp16 else 1
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row == most:
            problem = f"float16 overflowed in {most} updates in a row" if most > 1 else "the gradient is not finite"
            self.refuse(f"{problem} (clips: {', '.join(self.clips)})")
        return norm

    def refuse(self, problem):
        advice = f"{'use --bf16, or ' * self.args.fp16}lower --learning_rate, or raise --warmup_steps"
        raise RunError(f"{problem} at update {self.state.global_step + 1}: {advice}; earlier checkpoints are good")

    def _maybe_log_save_evaluate(self, *inputs, **options):
        """What follows an update. A signal ends the run here, or in the evaluation, with a checkpoint."""
        start = time.monotonic()
        try:
            if stopped := agreed(STOP_SIGNALS.number, max):
                raise Stopped(stopped)
            super()._maybe_log_save_evaluate(*inputs, **options)
        except Stopped:
            self.control.should_save, self.control.should_evaluate = True, False
            super()._maybe_log_save_evaluate(*inputs, **options)
            say(f"  checkpoint-{self.state.global_step} written")
            raise
        self.started += time.monotonic() - start
        if self.state.global_step == self.third:  # the third update of this start
            hours, self.third = (self.state.max_steps - self.third) * (time.monotonic() - self.begun) / 3 / 3600, None
            if hours > 1 and self.args.device.type == "cpu":
                say(f"  training takes {hours:,.0f} h more here; a GPU, --accents or --max_train_samples shorten it")
        self.bar.update(self.state.global_step - self.bar.n)
        self.stop_early()

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the first process writes trainer_state.json next, and last

    def _save_checkpoint(self, model, trial):
        """A checkpoint, complete once its trainer_state.json is there; never one of a model that is not finite."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if broken := not_finite(self.model):
            self.refuse(f"the model is not finite, in {broken},")
        (folder / "trainer_state.json").unlink(missing_ok=True)
        with explained(f"{folder} cannot be written", ROOM_ADVICE):
            try:
                super()._save_checkpoint(model, trial)
            except BaseException:  # what is half-written takes the room that is asked for
                shutil.rmtree(folder if self.args.should_save else "", ignore_errors=True)
                raise
        self.accelerator.wait_for_everyone()  # a process that stops here would have its launcher end the others

    def evaluation_loop(self, *inputs, metric_key_prefix="eval", **options):
        """What the Trainer's `evaluate` asks for and logs; the dev clips are decoded as test sets are."""
        accelerate.utils.broadcast(dict(self.model.named_buffers()))  # each process has BatchNorm statistics of its own
        emissions, loss = self.decoder.emissions(self.dev, self.encoder)
        if not np.isfinite(loss):
            self.refuse("the dev loss is not finite")
        table = self.dev.table.assign(hypothesis=self.decoder.texts(emissions))
        pairs = {"reference": table["text"].map(normalize_wer), "hypothesis": table["hypothesis"].map(normalize_wer)}
        texts = datasets.Features(dict.fromkeys(pairs, datasets.Value("string")))
        methods = {"_info": lambda _: evaluate.MetricInfo("WER and CER", citation="", features=texts)}
        methods["_compute"] = lambda _, **pairs: {"wer": jiwer.wer(**pairs), "cer": jiwer.cer(**pairs)}
        metric = type("ErrorRates", (evaluate.Metric,), methods)  # evaluate.load("wer") would download its script
        scores = metric(keep_in_memory=True).compute(**pairs)
        for domain, part in table[table["domain"] != ""].groupby("domain"):
            scores[f"wer_by_domain/{domain}"] = corpus_rate(part["text"], part["hypothesis"])
        shown = table.iloc[:: max(1, len(table) // 5)][:5][["accent", "text", "hypothesis"]].map(markdown_text)
        scores["transcriptions"] = "\n".join(markdown_table(["accent", "reference", "hypothesis"], shown.to_numpy()))
        if not self.decoder.is_silent:
            step, wer, cer = self.state.global_step, percent(scores["wer"]), percent(scores["cer"])
            tqdm.tqdm.write(f"  step {step:>6}: dev WER {wer}, CER {cer}")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in {**scores, "loss": loss}.items()}
        return Lazy("transformers.trainer_utils").EvalLoopOutput(None, None, metrics, len(table))

    def log(self, logs, start_time=None):
        if "loss" in logs:
            real, padded = np.sum(accelerate.utils.gather_object([self.heard]), axis=0).tolist()
            seconds = max((now := time.monotonic()) - self.started, 1e-3)
            speed, wait = round(real / SAMPLE_RATE / seconds, 1), round(100 * self.waited / seconds, 1)
            logs |= {"audio_seconds_per_second": speed, "data_wait_percent": wait}
            logs["padding_percent"] = round(100 * (1 - real / padded), 2)
            self.heard, self.started, self.waited = np.zeros(2), now, 0.0
            shown = f"loss {logs['loss']:.3f}, {speed:.0f} audio s/s, {wait:.0f} % waiting for data"
            logs |= {"skipped_updates": self.skipped} if self.args.fp16 else {}
            self.bar.set_postfix_str(shown + f", {plural(self.skipped, 'update')} skipped" * bool(self.skipped))
        super().log(logs, start_time)


def planned_updates(settings, clips):
    """(updates in all, updates an epoch) of a run on so many training clips, --replay's aside."""
    with_replay = round(clips / (1 - settings.replayed[1]))
    batches = -(-with_replay // (settings.per_device_train_batch_size * settings.world_size))
    an_epoch = max(1, -(-batches // settings.gradient_accumulation_steps))
    return settings.max_steps if settings.max_steps > 0 else math.ceil(settings.num_train_epochs * an_epoch), an_epoch


def choose_batch_size(model, collator, train, settings, limit):
    """Split an update's clips into the largest steps, up to `limit` if given, that fit the GPU at the longest clip."""
    device, half = settings.device, torch.float16 if settings.fp16 else torch.bfloat16
    clips = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    largest = min(limit or clips, clips if device.type == "cuda" else AUTO_BATCH_SIZE)
    sizes = [size for size in (32, 16, 8, 4, 2, 1) if clips % size == 0 and size <= largest]
    seconds = settings.max_train_seconds if settings.streaming else max(train["num_samples"][:]) / SAMPLE_RATE
    longest = {"samples": np.zeros(round(seconds * SAMPLE_RATE), np.float32), "text": "the " * int(2 * seconds)}

    def fits(size):
        # AdamW keeps two averages, one in place of the trial's weights; processes exchange gradients in buckets.
        trial, copies = copy.deepcopy(model).train(), 1 + (settings.world_size > 1)
        trial.encoder.layerdrop = 0.0
        try:
            kept = [torch.empty_like(weight) for weight in model.parameters() for _ in range(copies)]
            spare = int(0.05 * torch.cuda.get_device_properties(device).total_memory)  # other lengths leave pieces
            kept.append(torch.empty(spare, dtype=torch.uint8, device=device))
            with torch.autocast(device.type, half, enabled=settings.fp16 or settings.bf16):
                loss = trial(**model_inputs(collator([longest] * size), collator.extractor, device)).loss
            loss.backward()
            return True
        except RuntimeError as error:
            if not is_full_memory(error):
                raise

    size = agreed(next(size for size in sizes if size == 1 or device.type != "cuda" or fits(size)))
    torch.cuda.empty_cache()  # nothing where there is no GPU
    settings.per_device_train_batch_size, settings.gradient_accumulation_steps = size, clips // size
    say(f"  {plural(clips, 'clip')} an update and device: {size} a step x {plural(clips // size, 'accumulation step')}")


def make_trainer(settings, decoder, encoder, train, dev, batch_limit=None, own=None):
    """The Trainer of training clips, those from `own` on replayed, and the dev `Clips`; raises RunError."""
    model, extractor, device = decoder.model, decoder.extractor, settings.device
    plain = CTCCollator(extractor, encoder, shortest=decoder.shortest)
    if device.type == "mps":  # Apple's GPUs have no CTC
        compute, to_cpu = model.loss_function, functools.partial(accelerate.utils.send_to_device, device="cpu")
        model.loss_function = lambda **inputs: compute(**to_cpu(inputs)).to(device)
    if settings.gradient_checkpointing:
        model.encoder.layerdrop = 0.0  # under DDP it forbids unused parameters, which a dropped layer would leave
        model.activation_checkpointing_enable()  # now, for the trial of batch sizes; the Trainer does when it starts
    if settings.ddp_find_unused_parameters is None:
        settings.ddp_find_unused_parameters = model.encoder.layerdrop > 0
    if settings.fp16:  # measured on dev clips: a stream has none
        chosen = np.linspace(0, len(dev) - 1, 16).astype(int).reshape(4, 4).tolist()
        batches = [plain([dev.audio[index] for index in indices]) for indices in chosen]
        guard_half_precision(model, [model_inputs(batch, extractor, device) for batch in batches], device)
    if settings.auto_train_batch:
        choose_batch_size(model.to(device), plain, train, settings, batch_limit)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(settings.output_dir) / "runs")
    collator = dataclasses.replace(plain, seed=getattr(train, "seed", settings.seed) if settings.spec_augment else None)
    kind = mixed(CTCTrainer, transformers.TrainerCallback, transformers.Trainer)
    trainer = kind(model, settings, collator, train, dev.audio, decoder.processor)  # whose tokenizer is saved too
    trainer.dev, trainer.decoder, trainer.encoder, trainer.order = dev, decoder, encoder, torch.Generator()
    trainer.own = len(train) if own is None else own
    trainer.model_accepts_loss_kwargs = False  # concluded from the **kwargs of LasrForCTC.forward, which ignores them
    trainer.remove_callback(transformers.PrinterCallback if settings.disable_tqdm else transformers.ProgressCallback)
    trainer.add_callback(trainer)
    return trainer


# ---------------------------------------------------------------- the run

# What a run is of: with another of these, what is in --output_dir is of no use.
IDENTITY = """model model_revision dataset dataset_revision text_column accents domains countries max_train_seconds
    max_train_samples max_eval_samples max_test_samples target_text spec_augment streaming window_seconds
    replay learning_rate seed weights clips_an_update""".split()
NO_FLAGS = {"weights": "weights of checksum", "clips_an_update": "batch x accumulation steps x processes of"}
PATH_SHARES = (0, 0.25, 0.5, 0.75, 1)  # of the fine-tuned, of the models that are scored with --also_score
GOAL = "max_steps num_train_epochs early_stopping_patience also_score interpolate".split()  # these and OF_LM may change
OF_LM = "lm lm_weight lm_word_score lm_beam tune_lm lm_bytes".split()


class Run:
    """A run in --output_dir. `notes`, in run.json: "identity"; "baseline", texts {test set: {system: texts}}, "lm" and
    a checksum of what they are "of"; "reached", the `goal` of the start that finished; "batch_limit", clips a step."""

    def __init__(self, settings):
        self.settings, self.output = settings, Path(settings.output_dir)
        self.results, self.final, self.path = (self.output / name for name in ("results", "final", "run.json"))
        weights = Path(settings.model).expanduser() / "model.safetensors"  # tells models in folders of one name apart
        values = {**vars(settings), "clips_an_update": settings.clips_an_update}
        values["weights"] = zlib.crc32(weights.open("rb").read(1 << 20)) if weights.is_file() else None
        values["lm_bytes"] = os.path.getsize(settings.lm) if os.path.isfile(settings.lm or "") else None
        identity, goal, lm = (public({name: values[name] for name in names}) for names in (IDENTITY, GOAL, OF_LM))
        self.lm_asked = lm if settings.lm else {}
        self.goal = goal | self.lm_asked
        self.notes = {"identity": identity, "baseline": None, "reached": None, "batch_limit": None}

    def open(self):
        """Take up what earlier starts left: returns the metrics of a run that has finished, else finds `checkpoint`."""
        output, anew = self.output, self.settings.overwrite_output_dir
        for path in [*self.results.glob("*.tmp"), *output.glob("*")] if self.settings.is_first else ():
            if path.suffix == ".tmp" or (anew and MADE_BY_A_RUN.match(path.name)):  # half-written by a killed start
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        found = [*output.glob("final"), *output.glob("checkpoint-*")]
        foreign = [str(path) for path in found if not (path / "trainer_state.json").exists()]  # others can be resumed
        metrics = (self.final / "config.json").is_file() and read_json(self.results / "metrics.json")
        # The first process's, because all have to do the same.
        notes, foreign, metrics = accelerate.utils.gather_object([(read_json(self.path), foreign, metrics)])[0]
        advice = "choose another --output_dir, or --overwrite_output_dir to delete what is there"
        if foreign and not notes:
            raise UsageError(f"{foreign[0]} is of no run of this program, and this one would delete it; {advice}")
        for name, value in self.notes["identity"].items() if notes else ():
            if (found := notes["identity"].get(name)) != value:
                what = f"holds a run with {NO_FLAGS.get(name, f'--{name}')} {found}, not {value}"
                raise UsageError(f"--output_dir {output} {what}; {advice}")
        self.notes |= notes or {}
        if metrics and self.notes["reached"] == self.goal:
            return metrics
        asked, self.checkpoint, self.done = self.settings.resume_from_checkpoint, None, 0
        found = Lazy("transformers.trainer_utils").sort_checkpoints(str(output))[::-1]
        for path in found if not asked or asked.lower() in ("true", "false") else [asked]:
            if state := read_json(Path(path, "trainer_state.json")):  # the Trainer writes it last
                self.checkpoint, self.done = path, state["global_step"]
                if not Path(path, "optimizer.pt").is_file():
                    raise UsageError(f"{path} has no optimizer.pt, as of --save_only_model, to go on with; delete it")
                break
            if path == asked:
                raise UsageError(f"--resume_from_checkpoint is {asked}: no finished checkpoint; choose another")
            warn(f"{path} is left aside: it was not finished")
        if agreed(self.done) != agreed(self.done, max):
            raise RunError(f"the processes find different checkpoints in {output}, which nodes have to share")

    def save(self, **notes):
        self.notes |= notes
        if self.settings.is_first:
            write_text(self.path, json.dumps(self.notes, ensure_ascii=False, indent=1))

    def finish(self):
        if self.settings.upload and self.settings.is_first:
            push_to_hub(self.settings, self.final)
        say(f"\nmodel: {self.final}\nresults: {self.results}\ncurves: tensorboard --logdir {self.output / 'runs'}")

    def select(self, processor, model, lm, sources):
        settings, self.source = self.settings, sources[""]
        self.encoder = LabelEncoder(processor.tokenizer, model.config.vocab_size, settings.target_text)
        what = model.config, processor.feature_extractor, self.encoder, settings.max_train_seconds
        self.check = functools.partial(skip_reasons, *what)  # without the model: a stream's workers get it too
        self.clips = select_all(sources, settings, self.check)
        self.tests = {name or "test": self.clips[name or "test"] for name in sources if name != "replay"}
        self.decoder = Decoder(model, processor, settings, lm)

    def decode_tests(self, system):
        """{test set: {system: the model's text of each clip, with a language model system_lm: those with it}}."""
        decoder, texts, tried = self.decoder, {}, []
        if self.settings.tune_lm:  # the weight and word score of the lowest WER on dev
            clips = self.clips["dev"].some()
            say(f"choosing --lm_weight and --lm_word_score on {plural(len(clips), 'dev clip')}")
            emissions, references = decoder.emissions(clips)[0], clips.table["text"]
            for weight, word_score in itertools.product((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), (0.0, 0.5, 1.0, 1.5, 2.0)):
                lm = decoder.lm._replace(weight=weight, word_score=word_score)
                tried.append([weight, word_score, corpus_rate(references, decoder.texts(emissions, lm))])
            weight, word_score, wer = min(tried, key=lambda entry: entry[-1])  # the first of equals
            decoder.lm = decoder.lm._replace(weight=weight, word_score=word_score)
            greedy = corpus_rate(references, decoder.texts(emissions))
            shown = f"--lm_weight {weight:g} --lm_word_score {word_score:g}"
            say(f"  {shown}: dev WER {percent(wer)}, greedy {percent(greedy)}")
            record = {**decoder.lm.settings, "clips": len(clips), "wer": wer, "wer_greedy": greedy, "tried": tried}
            if self.settings.is_first:
                write_text(self.results / "lm.json", json.dumps(record, indent=1))
        for name, clips in self.tests.items():
            emissions = decoder.emissions(clips)[0]
            texts[name] = {system: decoder.texts(emissions)}
            if decoder.lm:
                texts[name][f"{system}_lm"] = decoder.texts(emissions, decoder.lm)
        return texts

    def interpolate(self, base):
        """Give the model --interpolate's share of the way from the state_dict `base` to it (WiSE-FT, arXiv 2109.01903).
        Returns [{"share": ..., "wer": {"dev" or further test set: ...}}] of that way, empty without --also_score."""
        model, decoder, chosen, path = self.decoder.model, self.decoder, self.settings.interpolate, []
        tuned = {name: value.cpu().clone() for name, value in model.state_dict().items() if value.is_floating_point()}
        sets = {name: self.clips[name].some() for name in ["dev", *self.tests] if name != "test"}
        has_path = len(sets) > 1
        for share in [*sorted({*PATH_SHARES} - {chosen} if has_path else ()), chosen]:  # the model stays at the last
            model.load_state_dict({name: base[name].lerp(tuned[name], share) for name in tuned}, strict=False)
            if has_path:
                texts = {name: decoder.texts(decoder.emissions(clips)[0]) for name, clips in sets.items()}
                wers = {name: corpus_rate(clips.table["text"], texts[name]) for name, clips in sets.items()}
                say(f"  share {share:g}: " + ", ".join(f"{name} {percent(wer)}" for name, wer in wers.items()))
                path.append({"share": share, "wer": wers})
        return sorted(path, key=lambda point: point["share"])

    def write_results(self, texts, history=(), path=()):
        settings, made, clips, lm = self.settings, self.source.made, self.clips, self.decoder.lm
        seen = None if settings.eval_only else set(clips["train"].table["accent"].str.casefold())
        scores = {name: Scores(self.tests[name].table, part, seen) for name, part in texts.items()}
        training = settings.to_dict()
        config = {name: training.pop(name) for name in ScriptFlags.__annotations__}
        data = {name: {**sizes_of(part.table), "skipped": part.reasons} for name, part in clips.items()}
        shared, notes = shared_speakers(clips, settings)
        data |= {"made_splits": made, "speakers_in_train_too": shared}
        data |= {"layout": self.source.layout, "characters_dropped_from_labels": self.encoder.dropped}
        content = {"config": {**config, "command": settings.command, "training": training}, "data": data}
        content |= {"path": path} if path else {}
        longer = int((clips["test"].table["num_samples"] > settings.window_seconds * SAMPLE_RATE).sum())
        windows = f"{plural(longer, 'clip')} over {settings.window_seconds:g} s scored in overlapping windows"
        notes = [f"{windows}; none left out for its length.", *notes]
        if settings.replay and not settings.eval_only:
            notes += ["{1:.0%} of the training clips are of {0} (--replay).".format(*public(settings.replayed))]
        if not settings.eval_only and settings.interpolate < 1:
            notes += [f"The final model is {settings.interpolate:g} of the way from the base to the fine-tuned one."]
        notes += [f"{' and '.join(made)} made of the train split by speaker."] * bool(made)
        if lm:
            before = (self.notes["baseline"] or {}).get("lm") or lm.settings  # each model is tuned by itself
            content["lm"] = {**lm.settings, "baseline": before}
            notes += [f"LM (now): {lm.settings}", f"LM (before): {before}"]
        title = f"{public(settings.model)} on {public(settings.dataset)}"
        return write_results(self.results, content, scores, title, notes, history)

    def train(self, updates):
        settings, default, trainer, checkpoint = self.settings, TrainingFlags, None, self.checkpoint
        train, dev, own = self.clips["train"].audio, self.clips["dev"], len(self.clips["train"])
        if settings.replay:
            train = datasets.concatenate_datasets([train, self.clips["replay"].audio])
        say(f"training: {plural(updates, 'update')}")
        if updates < settings.eval_steps == default.eval_steps and settings.save_steps == default.save_steps:
            settings.eval_steps = settings.save_steps = max(1, updates // 5)
            say(f"  evaluating and saving every {settings.eval_steps}")
        if updates < 2 * settings.warmup_steps and settings.warmup_steps == default.warmup_steps:
            settings.warmup_steps = max(1, updates // 10)
            say(f"  warming up over {settings.warmup_steps}")
        if settings.streaming:
            seed, settings.ignore_data_skip = settings.seed + self.done, True  # it starts anew, with other clips
            train = mixed(TrainingStream, torch.utils.data.IterableDataset)(self.source, settings, self.check, seed)
        greedy, advice = Decoder(self.decoder.model, self.decoder.processor, settings), "an older one is taken then"
        loading = explained(f"{checkpoint} cannot be loaded", f"delete it: {advice}")
        try:
            trainer = make_trainer(settings, greedy, self.encoder, train, dev, self.notes["batch_limit"], own)
            if checkpoint:
                say(f"  going on from {checkpoint}, update {self.done} of {updates}")
            for name in ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_scaler", "_load_rng_state"):
                setattr(trainer, name, loading(getattr(trainer, name)))
            with STOP_SIGNALS:
                trainer.train(resume_from_checkpoint=checkpoint)
        except Exception as error:
            if not (trainer and trainer.started):
                with explained("the Trainer does not take these flags", kind=UsageError):  # say --optim
                    raise
            if is_full_memory(error):
                batch, steps = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
                less = f"--per_device_train_batch_size {max(1, batch // 2)} --gradient_accumulation_steps {steps * 2}"
                if settings.auto_train_batch and batch > 1:
                    less = f"the same command, which goes on with {batch // 2} a step"
                    self.save(batch_limit=batch // 2)
                advice = f"try {less}, --gradient_checkpointing, or a lower --max_train_seconds"
                raise RunError(f"the GPU's memory is full with {plural(batch, 'clip')} a step: {advice}") from error
            raise
        finally:
            if trainer and trainer.bar:
                trainer.bar.close()  # no message belongs behind it
        return trainer

    def fit_and_score(self):
        """The main job. The untouched model is scored once a run: a later start takes its texts of the same clips."""
        updates, _ = planned_updates(self.settings, len(self.clips["train"]))  # raises if there are none
        clips = {name: part.table["clip"].tolist() for name, part in self.tests.items()}
        made_of, baseline = digest([self.lm_asked, clips]), self.notes["baseline"] or {}
        self.save()
        if baseline.get("of") != made_of and not self.settings.skip_baseline:
            say(f"scoring {self.settings.model} as it is on the test split")
            baseline, lm = {"of": made_of, "texts": self.decode_tests("baseline")}, self.decoder.lm
            self.save(baseline={**baseline, "lm": lm and lm.settings})
        texts = {} if self.settings.skip_baseline else baseline["texts"]
        for name, system in [(name, system) for name, part in texts.items() for system in part]:
            wer = percent(corpus_rate(self.tests[name].table["text"], texts[name][system]))
            say(f"  WER {wer} on {name} {SYSTEMS[system]} training")
        base = {name: value.cpu().clone() for name, value in self.decoder.model.state_dict().items()}
        trainer = self.train(updates)
        say("scoring the fine-tuned model on the test split")
        # Without the wrapper that autocasts: before and after are scored alike, in float32.
        self.decoder.model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        accelerate.utils.broadcast(self.decoder.model.state_dict())  # in place: the first process's is the best model
        path = self.interpolate(base)
        texts = {name: texts.get(name, {}) | found for name, found in self.decode_tests("finetuned").items()}
        if not self.settings.is_first:
            return
        metrics = self.write_results(texts, trainer.state.log_history, path)
        with explained(f"{self.final} cannot be written", ROOM_ADVICE), complete(self.final) as final:
            trainer.save_model(str(final))
            write_model_card(final, self.results, self.settings, metrics)
        with Lazy("torch.utils.tensorboard").SummaryWriter(str(self.output / "runs")) as writer:
            step, parts = trainer.state.global_step, {"test": metrics, **metrics.get("also", {})}
            for (name, part), system, rate in itertools.product(parts.items(), SYSTEMS, RATES):
                if part.get(system) and part[system][rate] is not None:
                    writer.add_scalar(f"{file_stem(name)}_{system}/{rate}", part[system][rate], step)
            for point in path:
                for name, wer in point["wer"].items():
                    writer.add_scalar(f"interpolated_by_percent/{file_stem(name)}", wer, round(100 * point["share"]))
        self.save(reached=self.goal)
        self.finish()


def computer(settings, trains):
    """What the model is run on, and in which precision, in words."""
    device, name = settings.device, {"mps": "Apple's GPU"}.get(settings.device.type)
    if device.type == "cuda":
        name = torch.cuda.get_device_properties(device).name
        if settings.bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            warn(f"{name} emulates bfloat16, which is slow: leave --bf16 out")
    precision = "float16" if settings.fp16 else "bfloat16" if settings.bf16 else "float32"
    processes = f"{settings.world_size} x " if settings.world_size > 1 else ""
    return f"{processes}{name or f'the {device.type.upper()}'}, {precision if trains else 'float32'}"


def run(settings):
    """The whole job, phase by phase; returns the exit status."""
    if (settings.eval_only or settings.score_file) and (Path(settings.output_dir) / "run.json").is_file():
        kept, settings.output_dir = settings.output_dir, str(Path(settings.output_dir) / "scores")
        say(f"the results of the run in {kept} stay: these go to {settings.output_dir}")
    if settings.score_file:
        return score_file(settings)
    if settings.transcribe:
        return transcribe(settings)
    transformers.set_seed(settings.seed)
    this, trains = Run(settings), not any(getattr(settings, mode) for mode in MODES)
    if trains and (metrics := this.open()):
        say(f"{this.output} holds this run, finished; more --max_steps or epochs, or --overwrite_output_dir, train on")
        show_scores(metrics)
        this.finish()
        return 0
    say(f"corpus: {settings.dataset}")
    if trains or settings.eval_only:
        say(f"computing on {computer(settings, trains)}")
        processor, model = load_model(settings)  # before the audio: if it is of no use, hours of preparation are too
        lm = load_lm(settings, processor, model.config.vocab_size)
    if trains and settings.upload and settings.is_first:
        push_to_hub(settings)
    sources = {"": Source(settings.dataset, settings, settings.splits())}
    check_announced(sources[""], settings)
    if settings.dry_run:
        return dry_run(sources[""], settings)
    for name in settings.also_score or ():
        say(f"also scored: {public(name)}")
        sources[public(name)] = Source(name, settings, ("test",), is_extra=True)
    if settings.replay and not settings.eval_only:
        say(f"replayed: {public(settings.replayed[0])}")
        sources["replay"] = Source(settings.replayed[0], settings, ("train",), is_extra=True)
    for name, source in sources.items():
        prepare(source, splits_of(name, settings), settings)
    if settings.prepare_only:
        select_all(sources, settings, lambda table: table["problem"])
        say(f"  ready in {settings.data_dir}")
        return 0
    this.select(processor, model, lm, sources)
    if trains:
        this.fit_and_score()
    else:
        say(f"scoring {settings.model} on the test split")
        texts = this.decode_tests("baseline")
        if settings.is_first:
            this.write_results(texts)
            say(f"\nresults: {this.results}")
    return 0


def main(argv=None):
    """Run the command line `argv` (sys.argv's if None); returns 0, 2 for a usage error, 1 for one while running."""
    argv, rank = sys.argv[1:] if argv is None else list(argv), os.environ.get("RANK", "0")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        STOP_SIGNALS.install()
        return run(parse_settings(argv))
    except Stopped as error:
        status = 128 + error.args[0]
        message = f"stopped by {signal.Signals(error.args[0]).name}: the same command goes on with what is left"
    except SystemExit as error:  # argparse's --help
        return error.code or 0
    except Exception as error:
        if os.environ.get("MEDASR_TRACEBACK"):
            raise
        message = f"unexpected {one_line(error)}; run with MEDASR_TRACEBACK=1 to see where, and report it"
        if isinstance(error, RunError):  # a DataLoader's worker adds its traceback, which ends with the message
            message = " ".join(str(error).rpartition("RunError: ")[2].split())
        elif is_full_memory(error):
            message = "the GPU's memory is full: nvidia-smi shows what else uses it, --use_cpu true does without"
        elif is_full_disk(error):
            message = f"a file cannot be written ({one_line(error)}): {ROOM_ADVICE}"
        elif LOST_PROCESS.search(str(error)):
            message = "another process has ended; its own message says why, the same command goes on from here"
        status = 2 if isinstance(error, UsageError) else 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if status != 2 or rank == "0":  # each process refuses the same flags
        print(f"{PROGRAM}: error{'' if rank == '0' else f' (process {rank})'}: {redact(message)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal can show every name and text
    sys.exit(main())
