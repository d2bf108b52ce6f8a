#!/usr/bin/env python3
"""Fine-tune Google's MedASR on AfriSpeech-200, African-accented clinical and general English.

    python finetune_medasr.py --demo                                    # the whole job in small, offline, in minutes
    python finetune_medasr.py                                           # MedASR on all of AfriSpeech-200
    python finetune_medasr.py --accents yoruba igbo --domains clinical  # a part of it
    python finetune_medasr.py --dataset ./recordings                    # your own recordings
    python finetune_medasr.py --transcribe visit.wav recordings/        # with the model that a run has made
    torchrun --nproc_per_node 8 finetune_medasr.py

The path of the data: archives, audio files or parquet files, on the Hub or in a folder -> 16 kHz mono FLAC in Arrow
files -> length-grouped batches of log-mels -> LasrForCTC -> CTC text -> word error rates by group -> report and card.
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
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import stat
import string
import tarfile
import tempfile
import textwrap
import threading
import time
import typing
import unicodedata
import warnings
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

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
jiwer, librosa, pandas, soundfile, torch = map(Lazy, "jiwer librosa pandas soundfile torch".split())
tqdm, transformers, yaml = map(Lazy, "tqdm transformers yaml".split())
hub, hub_errors, parquet = map(Lazy, "huggingface_hub huggingface_hub.errors pyarrow.parquet".split())

PROGRAM = "finetune_medasr.py"
FIXTURES = Path(__file__).resolve().parent / "tests" / "fixtures"
DEFAULT_MODEL = "google/medasr"
DEFAULT_DATASET = "intronhealth/afrispeech-200"
# Earlier revisions of the repository leave out the transcripts of dev and test.
DEFAULT_DATASET_REVISION = "b538c6e111914a812af28ff677f8cffc9b404b7d"
LM_FILE = "lm_6.kenlm"  # in MedASR's repository: a 6-gram of its tokenizer's pieces
SAMPLE_RATE = 16_000  # Hz, what MedASR's feature extractor expects
SPLITS = ("train", "dev", "test")
DOMAINS = ("clinical", "general")
WINDOW_OVERLAP_SECONDS = 2.0  # a side, as in the model card's pipeline call (chunk_length_s=20, stride_length_s=2)
ROOM_ADVICE = "free some disk; the same command goes on"


class UsageError(Exception):
    """A flag or combination that cannot work: exit status 2."""


class RunError(Exception):
    """Something that went wrong while running: exit status 1."""


class Stopped(KeyboardInterrupt):
    """A signal that ends the program, where it may: exit status 128 and its number."""

    advice = "the same command goes on from here"


def say(text="", stream=None):
    """Print once, not once a process; to standard output if no `stream` is given."""
    if os.environ.get("RANK", "0") == "0":
        print(redact(text), file=stream, flush=True)


def warn(text):
    """A warning on stderr, in one line."""
    say(f"{PROGRAM}: warning: {' '.join(redact(text).split())}", sys.stderr)


def one_line(error):
    """An exception as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")


def plural(count, noun):
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# What gloo and NCCL say in the processes that are left.
LOST_PROCESS = re.compile(r"Connection (closed|reset) by peer|remote process exited|NCCL communicator was aborted")


@contextlib.contextmanager
def explained(what, errors=OSError, advice=""):
    """Turn exceptions of the kinds `errors` into a RunError in one line: `what`, the exception, and `advice` if any."""
    try:
        yield
    except errors as error:
        if LOST_PROCESS.search(str(error)):
            raise
        raise RunError(f"{what} ({one_line(error)}){advice and ': '}{advice}") from error


def checkpoint_errors():
    """What the libraries raise for models and checkpoints that they cannot read or write."""
    unreadable = pickle.UnpicklingError, Lazy("safetensors").SafetensorError
    return OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, EOFError, ImportError, *unreadable


def is_full_disk(error):
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


SECRET = re.compile(r"(?<=://)[^/@\s]+(?=@)|\bhf_\w{4,}|(?:(?<=[_-]token[= ])|(?<=[_-]token: ))\S+")
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # characters that could move a terminal's cursor


def redact(text):
    """`text` without tokens (of the environment, URLs and flags, what looks like the Hub's), harmless to print."""
    text = text.replace(os.environ.get("HF_TOKEN") or "\0", "***")
    return STEERING.sub("\ufffd", SECRET.sub("***", text))


def public(value):
    """`value` (JSON, or text) without tokens, and with absolute paths cut to their names: people publish it."""
    if isinstance(value, dict):
        return {name: public(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(item) for item in value]
    return re.sub(r"^(--[\w-]+=)?(?:[/~].*/|/)(?=.)", r"\1", redact(value)) if isinstance(value, str) else value


def slugify(name):
    """A name as part of a path, an accent's in the Hub repository too: 'Akan (Fante)' -> 'akan-fante'."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def file_stem(name):
    """What a dataset is called in files and folders; a slug alone leaves nothing of other alphabets."""
    return f"{slugify(name)}-{'' if name.isascii() else digest(name)[:8]}".strip("-")


def digest(content):
    """A checksum of JSON."""
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def read_json(path):
    """What a JSON object that this program or the Trainer wrote holds; None if it is not there, or not whole."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


@contextlib.contextmanager
def complete(target):
    """The name of a file or folder to write, which takes the place of `target` when complete; no half is left."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(partial, target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file so that it is complete or absent."""
    with explained(f"{path} cannot be written", advice=ROOM_ADVICE), complete(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8")


LAUNCHER_SECONDS = 5  # in which torchrun or Slurm passes on a signal that the processes have got themselves


class StopSignals:
    """SIGTERM and Ctrl-C raise Stopped at once, or, where `deferred`, leave their `number` to be looked at: in training
    and scoring several processes have to stop after the same update or batch. A second one ends the program."""

    deferred, number, since, process = False, 0, 0.0, 0

    def install(self):
        self.deferred, self.number, self.process = False, 0, os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self.receive)

    def receive(self, number, frame):
        is_passed_on = "RANK" in os.environ and time.monotonic() - self.since < LAUNCHER_SECONDS
        if os.getpid() != self.process or (self.number and is_passed_on):  # another process is a worker of ours
            return
        if self.number:
            os.write(2, f"\n{PROGRAM}: error: ended by a second {signal.Signals(number).name}\n".encode())
            os._exit(128 + number)
        self.number, self.since = number, time.monotonic()
        if not self.deferred:
            raise Stopped(number)

    @contextlib.contextmanager
    def deferring(self):
        before, self.deferred = self.deferred, True
        try:
            yield
        finally:
            self.deferred = before


STOP_SIGNALS = StopSignals()


def agreed(number, settings, choice="MIN"):
    """The smallest (or with "MAX" the largest) of the processes' integers, the same in each of them."""
    if settings.world_size == 1:
        return int(number)
    number = torch.tensor(int(number), device=settings.device)
    torch.distributed.all_reduce(number, getattr(torch.distributed.ReduceOp, choice))
    return int(number)


@functools.cache
def mixed(*kinds):
    """A class of `kinds`, mixins first, named as the last: how classes here extend bases that are slow to import."""
    return type(kinds[-1].__name__, kinds, {"kinds": kinds})


# ---------------------------------------------------------------- settings

Number = typing.TypeVar("Number")
Positive, NotNegative = Annotated[Number, "above 0"], Annotated[Number, "0 or more"]


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class ScriptFlags:
    """The script's own flags."""

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
    window_seconds: Positive[float] = flag(20.0, "score longer clips in overlapping windows of so many seconds")
    num_proc: Positive[int | None] = flag(None, "processes that prepare audio; all cores if not given")
    keep_archives: bool = flag(False, "keep the downloaded archives after they are converted")
    also_score: list[str] | None = flag(None, "test sets, Hub datasets or folders, scored too: what the model forgets")
    streaming: bool = flag(False, "train on audio straight from the Hub, keeping none of it; needs --max_steps")
    prepare_only: bool = flag(False, "download and convert the audio, then stop")
    dry_run: bool = flag(False, "say what a run would do: clips, hours, disk, updates; no audio is fetched")
    eval_only: bool = flag(False, "score --model on the test split, then stop")
    score_file: str | None = flag(None, "report on any system's texts: JSON lines or CSV with text and pred_text")
    transcribe: list[str] | None = flag(None, "print the text of audio files, folders, patterns or - (standard input)")
    transcript_format: Literal["text", "json", "srt", "vtt"] = flag("text", "of --transcribe; json: words with times")
    transcript_dir: str | None = flag(None, "write --transcribe's texts into this folder, a file for each")
    format_dictation: bool = flag(False, "write dictated {period}, {new paragraph} ... as what they stand for")
    lm: str | None = flag(None, f"decode with this n-gram of the model's tokens too; auto: {LM_FILE} of the model")
    lm_weight: NotNegative[float] = flag(0.5, "what a log-probability of --lm counts beside one of the model")
    lm_word_score: float = flag(1.5, "what each token adds to a text's score: --lm alone prefers short ones")
    lm_beam: Positive[int] = flag(8, "hypotheses that the search with --lm keeps at each frame")
    tune_lm: bool = flag(False, "choose --lm_weight and --lm_word_score on dev before the test clips are scored")
    demo: bool = flag(False, "run the whole job on the small model and corpus in tests/fixtures, offline")


@dataclass
class TrainingFlags:
    """The `TrainingArguments` fields that people change, with this script's defaults."""

    _argument_group_name = "training (any other field of transformers' TrainingArguments works too: --help_all)"

    output_dir: str = flag("./medasr-afrispeech-200", "where checkpoints, results, logs and the final model go")
    learning_rate: Positive[float] = flag(3e-5, "peak learning rate of AdamW")
    per_device_train_batch_size: str = flag("auto", "clips a step and device; auto: 32 an update, in steps that fit")
    per_device_eval_batch_size: str = flag("auto", "clips or windows when scoring; auto: as many seconds as fit")
    gradient_accumulation_steps: Positive[int] = flag(4, "steps whose gradients make one update")
    num_train_epochs: Positive[float] = flag(10.0, "passes over the training clips")
    max_steps: int = flag(-1, "updates in all; overrides the epochs if positive")
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
    seed: NotNegative[int] = flag(42, "seed of everything random")


# What the Trainer needs for this job beside the fields above; each can still be set by its own flag. disable_tqdm's
# default follows the libraries' log level, which quiet_libraries lowers.
TRAINING_DEFAULTS = dict(eval_strategy="steps", save_strategy="steps", load_best_model_at_end=True, disable_tqdm=False)
TRAINING_DEFAULTS |= dict(metric_for_best_model="wer", greater_is_better=False, report_to=["tensorboard"])
TRAINING_DEFAULTS["train_sampling_strategy"] = "group_by_length"
# What the code relies on: the collator reads columns that are not arguments of the model, one of them the lengths.
FIXED = {"remove_unused_columns": False, "length_column_name": "num_samples", "label_smoothing_factor": 0.0}
DEMO_FLAGS = [
    *("--model", str(FIXTURES / "model"), "--dataset", str(FIXTURES / "corpus"), "--output_dir", "./medasr-demo"),
    *"--data_dir ./medasr-demo/audio --learning_rate 2e-3 --max_steps 120 --gradient_accumulation_steps 2".split(),
    *"--warmup_steps 15 --eval_steps 40 --save_steps 40 --logging_steps 5 --dataloader_num_workers 0".split(),
    *"--spec_augment false".split(),  # a model this small underfits masked audio
]
AUTO_BATCH_SIZE = 8  # clips a step without a GPU; times the accumulation steps, what an update has on each device
BATCH_SIZES = ("per_device_train_batch_size", "per_device_eval_batch_size")
MODES = ("prepare_only", "dry_run", "eval_only", "score_file", "transcribe")  # without training
# Of what a run makes in --output_dir; it replaces these, and --overwrite_output_dir deletes them.
MADE_BY_A_RUN = re.compile(r"(?:final|results|runs|run\.json|checkpoint-\d+)(?:/|$)")


class CheckedSettings:
    """Mixed before the flags and `TrainingArguments`: checks of what they say, before torch looks for devices. Beside
    its fields the object has `auto_train_batch` and `auto_eval_batch`, whether these sizes are "auto", `upload`,
    whether --push_to_hub is given, and `command`, the command line as it may be published."""

    def __post_init__(self):
        for problem in self.problems():
            raise UsageError(problem)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.num_proc = self.num_proc or cores
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = min(8, cores - 1)
        self.auto_train_batch, self.auto_eval_batch = (getattr(self, name) == "auto" for name in BATCH_SIZES)
        for name in BATCH_SIZES:
            setattr(self, name, AUTO_BATCH_SIZE if getattr(self, name) == "auto" else int(getattr(self, name)))
        has_gpu = torch.cuda.is_available() and not self.use_cpu
        if self.fp16 and not has_gpu:
            raise UsageError("--fp16 needs a CUDA GPU, and there is none; leave it out")
        self.fp16 = has_gpu and not self.bf16 if self.fp16 is None else self.fp16
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
    def is_first(self):
        """Whether this is the first of the processes, which writes what is written once."""
        return self.process_index == 0

    @property
    def clips_an_update(self):
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def splits(self, on_disk=False):
        """The splits of a run; `on_disk` those whose audio has to lie there: a stream keeps none of the training's."""
        splits = SPLITS[1 if self.tune_lm else 2 :] if self.eval_only else SPLITS
        return tuple(split for split in splits if not (on_disk and self.streaming and split == "train"))

    def problems(self):
        """Yield what cannot work, each in a line that names the flag, the value and the valid ones."""
        for name in BATCH_SIZES:
            if not re.fullmatch(r"auto|0*[1-9]\d*", str(getattr(self, name))):
                yield f"--{name} is {getattr(self, name)}; it must be a number of clips above 0, or auto"
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            for bound in getattr(hint, "__metadata__", ()):
                value = getattr(self, name)
                if value is not None and not (0 <= value < np.inf and (value or bound == "0 or more")):
                    yield f"--{name} is {value:g}; it must be {bound}, and finite"
        for name, needed in FIXED.items():
            if getattr(self, name) != needed:
                yield f"--{name} is {getattr(self, name)}; this program needs {needed}: leave the flag out"
        if self.window_seconds < 3 * WINDOW_OVERLAP_SECONDS:
            yield f"--window_seconds is {self.window_seconds:g}; it must be at least {3 * WINDOW_OVERLAP_SECONDS:g}"
        best = str(self.metric_for_best_model or "wer").removeprefix("eval_")
        if best not in ("wer", "cer", "loss", *(f"wer_by_domain/{domain}" for domain in DOMAINS)):
            yield f"--metric_for_best_model is {best}; it must be wer, cer, loss or wer_by_domain/clinical"
        for name in ("fsdp", "deepspeed"):
            if getattr(self, name) or os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true":
                yield f"--{name} is not supported: this model needs no sharding; torchrun gives each GPU a copy"
        stems = [file_stem(public(name)) for name in self.also_score or ()]
        for name, stem in zip(self.also_score or (), stems):
            if stem in SPLITS or stems.count(stem) > 1:
                yield f"--also_score has '{name}', a split's name or there twice (as '{stem}'); give another path"
        yield from self.problems_of_folders()
        modes, scores_texts = [name for name in MODES if getattr(self, name)], self.score_file or self.transcribe
        has_flashlight = importlib.util.find_spec("flashlight")
        is_transcript_flag = self.transcript_dir or self.format_dictation or self.transcript_format != "text"
        for is_bad, problem in (
            (len(modes) > 1, f"--{' and --'.join(modes)} cannot be used together; choose one"),
            (self.tune_lm and not self.lm, "--tune_lm needs --lm: there is nothing to tune without a language model"),
            (self.tune_lm and self.transcribe, "--tune_lm needs the dev clips of a corpus: use it with --eval_only"),
            (
                self.lm and self.score_file,
                "--lm needs a model to decode, and --score_file has texts alone: leave it out",
            ),
            (self.lm and not has_flashlight, "--lm needs a package that is not installed: pip install flashlight-text"),
            (self.streaming and self.max_steps <= 0, "--streaming needs --max_steps: a stream has no epochs to count"),
            (self.streaming and self.max_train_samples, "--max_train_samples cannot be used with --streaming"),
            (self.also_score and scores_texts, "--also_score is of use in a run and with --eval_only alone"),
            (is_transcript_flag and not self.transcribe, "--transcript_* and --format_dictation need --transcribe"),
        ):
            if is_bad:
                yield problem
        if self.transcribe:
            find_recordings(self)

    def problems_of_folders(self):
        """Yield folders that cannot be written to, and those that a run would delete."""
        for name in ("output_dir", "data_dir", "transcript_dir"):
            if (folder := getattr(self, name)) is None:
                continue
            path = Path(folder).expanduser().absolute()
            found = next(parent for parent in (path, *path.parents) if parent.exists())
            if not folder.strip() or not (found.is_dir() and os.access(found, os.W_OK | os.X_OK)):
                yield f"--{name} is '{folder}': {found} is no folder that can be written to; choose another"
        output = Path(self.output_dir).expanduser().resolve()
        read = {name: getattr(self, name) for name in ("model", "dataset", "resume_from_checkpoint")}
        for name, folder in {"data_dir": self.data_dir, **(read if self.overwrite_output_dir else {})}.items():
            path = Path(folder or "").expanduser().resolve()
            if folder and path.is_relative_to(output) and MADE_BY_A_RUN.match(path.relative_to(output).as_posix()):
                yield f"--{name} {folder} is what a run under --output_dir {output} replaces or deletes; choose another"


def make_parser(show_all):
    """An argparse parser of every flag, whose --help shows the script's own and what people change, or all of them."""

    class Parser(transformers.HfArgumentParser):
        def error(self, message):
            raise UsageError(message)

    layout = functools.partial(argparse.HelpFormatter, max_help_position=36, width=150)
    texts = {"prog": PROGRAM, "usage": "%(prog)s [FILE.yaml] [flags]", "description": __doc__.split("\n\n")[0]}
    training = dataclass(type("Training", (TrainingFlags, transformers.TrainingArguments), {}))
    parser = Parser([ScriptFlags, training], allow_abbrev=False, formatter_class=layout, **texts)
    parser.add_argument("--help_all", action="help", help="show every flag, those of TrainingArguments included")
    parser.set_defaults(**TRAINING_DEFAULTS, **FIXED)
    shown = {"--help", "--help_all", *(f"--{name}" for kind in (ScriptFlags, TrainingFlags) for name in vars(kind))}
    for action in parser._actions:
        action.option_strings = action.option_strings[-1:] if action.dest == "help" else action.option_strings[:1]
        if not show_all and action.option_strings[0].replace("--no_", "--") not in shown:
            action.help = argparse.SUPPRESS
        elif action.default not in (None, False, argparse.SUPPRESS):
            action.help = f"{action.help} (default: {action.default})"
    return parser


def as_flags(settings):
    """The command line that a dict stands for: {"learning_rate": 1e-5} is --learning_rate 1e-5."""
    flags = []
    for name, value in [item for item in settings.items() if item[1] is not None]:
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{name}", *map(str, values)]
    return flags


def parse_settings(argv):
    """The settings of a command line; raises UsageError."""
    quiet_libraries()
    command = redact(shlex.join(["python", PROGRAM, *map(public, argv)]))
    if argv and not argv[0].startswith("-"):
        try:
            argv = as_flags(dict(yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8")) or {})) + argv[1:]
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise UsageError(f"{argv[0]} is no YAML file of lines 'flag: value' ({one_line(error)})") from error
    if "--demo" in argv:
        # A model this small gains nothing from a second thread, and loses much where it has to wait for one.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        argv = DEMO_FLAGS + argv
    parser = make_parser("--help_all" in argv)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        found = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(found, parser._option_string_actions, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see --help"
        raise UsageError(f"unknown flag or stray value {found}; {hint}")
    made = Path(values.output_dir).expanduser() / "final"
    if values.transcribe and (made / "config.json").is_file() and not re.search("--model(=| |$)", " ".join(argv)):
        values.model = str(made)
        say(f"transcribing with {made}; --model chooses another", sys.stderr)
    try:
        # The one object of settings: this script's flags over transformers' own.
        kinds = CheckedSettings, ScriptFlags, TrainingFlags, transformers.TrainingArguments
        settings = dataclass(type("Settings", kinds, {}), repr=False)(**vars(values))
        transformers.integrations.get_reporting_integration_callbacks(settings.report_to)  # raises for unknown names
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    settings.command = command
    return settings


def quiet_libraries():
    """Keep the libraries' advice off the screen: the script says itself what a user needs to know."""
    # TensorBoard writes in a thread, and raises the same in the program itself.
    threading.excepthook = lambda failed: is_full_disk(failed.exc_value) or threading.__excepthook__(failed)
    # OpenMP's threads spin while they wait for each other, by default. Where another process wants a core too, be it a
    # worker that decodes audio, the small steps of a model then take many times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("TRANSFORMERS_VERBOSITY=error", "TOKENIZERS_PARALLELISM=false", "HF_HUB_DISABLE_PROGRESS_BARS=1"):
        os.environ.setdefault(*name.split("="))
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    warnings.filterwarnings("ignore", message="Glyph|Tight layout")  # matplotlib's, of names in the pictures
    Lazy("transformers.utils.logging").disable_progress_bar()


# ---------------------------------------------------------------- Hub


def unreachable_errors():
    """The exceptions that say that the Hub cannot be reached."""
    return hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, httpx2.ConnectError


@contextlib.contextmanager
def explained_hub_errors(repo, kind):
    """Turn the Hub client's exceptions about `repo` (a "model" or "dataset") into one line that says what to do."""
    try:
        yield
    except (httpx2.HTTPError, OSError, hub_errors.RevisionResolutionError, hub_errors.HFValidationError) as error:
        # A server that answers 5xx comes out as "not found locally", with the answer as its cause.
        behind = error.__cause__ if isinstance(error, hub_errors.LocalEntryNotFoundError) else None
        error = behind if isinstance(behind, hub_errors.HfHubHTTPError) else error
        endpoint, of = Lazy("huggingface_hub.constants").ENDPOINT, "datasets/" * (kind == "dataset")
        account = "your account has no access to it:" if hub.get_token() else "you are not logged in: 'hf auth login',"
        no_revision = hub_errors.RevisionNotFoundError, hub_errors.RevisionResolutionError
        invalid_token = "cannot be read, because your token is not valid: run 'hf auth login' again, or unset HF_TOKEN"
        later = f"could not be read ({one_line(error)}): run the same command again, what is finished is kept"
        is_invalid = getattr(getattr(error, "response", None), "status_code", None) == 401
        for kinds, meaning in (  # some exceptions are kinds of others below them
            (hub_errors.GatedRepoError, f"is gated and {account} accept its terms at {endpoint}/{of}{repo}"),
            (hub_errors.RepositoryNotFoundError, f"is not on the Hub, or is private: check --{kind}, or log in"),
            (hub_errors.HFValidationError, f"is neither a local folder nor a Hub id owner/name: check --{kind}"),
            (no_revision, f"has no such revision: check --{kind}_revision"),
            (unreachable_errors(), f"is not on this machine and {endpoint} cannot be reached: give a local folder"),
            (hub_errors.EntryNotFoundError, f"lacks a file ({one_line(error)}): check --{kind}_revision"),
            (Exception, invalid_token if is_invalid else later),
        ):
            if isinstance(error, kinds):
                raise RunError(f"{kind} {repo} {meaning}") from error


RETRIES = 6  # drops of a connection in a row without a byte of progress, waited for 1, 2, 4, ... seconds


class HubStream(io.RawIOBase):
    """A file of `size` bytes on the Hub as a stream from `position` on, through dropped connections. The Hub client
    waits out answers of 5xx and 429 by itself."""

    def __init__(self, path, size, position=0):
        self.file, self.size = hub.HfFileSystem().open(path, block_size=0), size
        self.file.loc = position

    def readable(self):
        return True

    def readinto(self, buffer):
        for attempt in range(RETRIES):
            if self.file.loc >= self.size:
                return 0
            if attempt:
                self.file.response = None  # it connects again, and goes on from the byte reached
                time.sleep(2 ** (attempt - 1))
            try:
                if data := self.file.read(min(len(buffer), 1 << 16)):
                    buffer[: len(data)] = data
                    return len(data)
            except httpx2.TransportError:
                if attempt == RETRIES - 1:
                    raise
        raise OSError(f"it ends after {self.file.loc:,} of {self.size:,} bytes")


@dataclass
class Repository:
    """A dataset on the Hub or in a local `folder`. `files` are {path: [bytes, sha256 on the Hub, or time of change]}.
    `cache` is the folder for what is downloaded of it."""

    name: str
    revision: str | None
    folder: Path | None
    cache: Path
    files: dict[str, list] = field(default_factory=dict)

    def list(self):
        """Have `files`, from the Hub once for each commit; raises RunError."""
        if self.folder:
            with explained(f"{self.folder} cannot be read"):
                found = [(path, path.stat()) for path in files_below(self.folder) if path.is_file()]
            for path, status in found:
                self.files[path.relative_to(self.folder).as_posix()] = [status.st_size, status.st_mtime_ns]
            return
        listing = self.cache / "files.json"
        self.files = read_json(listing) or {}
        if self.files and re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            return  # a commit never changes: no network is needed to go on
        try:
            with explained_hub_errors(self.name, "dataset"):
                tree = list(hub.list_repo_tree(self.name, recursive=True, revision=self.revision, repo_type="dataset"))
        except RunError as error:
            if not self.files or not isinstance(error.__cause__, unreachable_errors()):
                raise
            say("  the Hub cannot be reached: taken as it was when it was listed last")
            return
        found = [item for item in tree if hasattr(item, "size")]
        self.files = {file.path: [file.size, file.lfs.sha256 if file.lfs else None] for file in found}
        write_text(listing, json.dumps(self.files, indent=1))

    def size(self, paths):
        """Bytes of files of the repository."""
        return sum(self.files[path][0] for path in paths)

    def local(self, path):
        """Where a file lies on this machine, None if it does not, or is of another version."""
        if self.folder:
            return self.folder / path
        cached = hub.try_to_load_from_cache(self.name, path, repo_type="dataset", revision=self.revision)
        places = [Path(cached)] if isinstance(cached, str) else []
        places.append(self.cache / "hub" / path)
        return next((place for place in places if place.exists() and place.stat().st_size == self.files[path][0]), None)

    def on_hub(self, path):
        """The path of a file for `HfFileSystem`."""
        return f"datasets/{self.name}@{self.revision or 'main'}/{path}"

    @contextlib.contextmanager
    def open(self, path):
        """A file of the repository as a stream of bytes: the local file, or as much of the Hub's as is read."""
        if local := self.local(path):
            with open(local, "rb") as stream:
                yield stream
            return
        with explained_hub_errors(self.name, "dataset"):
            with io.BufferedReader(HubStream(self.on_hub(path), self.files[path][0]), 1 << 16) as stream:
                yield stream

    def fetch(self, path):
        """The local path of a file, downloaded if need be, going on where that stopped; raises RunError."""
        if local := self.local(path):
            return local
        (size, checksum), target = self.files[path], self.cache / "hub" / path
        partial = target.with_name(target.name + ".partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        with explained_hub_errors(self.name, "dataset"), filelock.FileLock(f"{partial}.lock"):
            for _ in range(2):
                if self.local(path):  # by another process, meanwhile
                    return target
                with open(partial, "ab") as file, HubStream(self.on_hub(path), size, file.tell()) as stream:
                    shutil.copyfileobj(stream, file, 1 << 20)
                with open(partial, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if partial.stat().st_size == size and checksum in (None, found):
                    os.replace(partial, target)
                    return target
                partial.unlink()
        raise RunError(f"{path} was fetched twice and is not what the Hub announces: sha256 {checksum}")

    def release(self, path):
        """Delete what was downloaded of a file; one in the user's folder or Hub cache is never touched."""
        for ending in () if self.folder else ("", ".partial.lock"):
            (self.cache / "hub" / f"{path}{ending}").unlink(missing_ok=True)


def files_below(folder):
    """The paths of all files in a folder and below it, sorted; raises OSError where rglob would pass over a part."""
    found, folders = [], [Path(folder)]
    for place in folders:
        for path in sorted(place.iterdir()):
            (folders if path.is_dir() else found).append(path)
    return sorted(found)


# All that decides what LasrFeatureExtractor computes, and what decides nothing.
EXTRACTOR_SETTINGS = """feature_size sampling_rate hop_length n_fft win_length padding_value padding_side
    return_attention_mask feature_extractor_type processor_class""".split()


def load_model(settings):
    """The processor and the float32 LasrForCTC that --model names; raises RunError that says what to do."""
    name, folder = settings.model, Path(settings.model).expanduser()
    source = dict(pretrained_model_name_or_path=str(folder) if folder.is_dir() else name)
    # trust_remote_code: by default it asks on the terminal. use_safetensors: a pickle runs what it holds.
    source |= dict(revision=settings.model_revision, trust_remote_code=False)
    options = dict(dtype="float32", use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True)
    if not folder.is_dir():
        with explained_hub_errors(name, "model"):  # a gated model shows at its first file
            hub.hf_hub_download(name, "config.json", revision=settings.model_revision)
    what = f"model {name} cannot be loaded"
    with explained(what, checkpoint_errors(), "give a folder or Hub id with config.json, *.safetensors and processor"):
        kind = transformers.AutoConfig.from_pretrained(**source).model_type
        if kind != "lasr_ctc":
            raise RunError(f"{what}: it is a {kind} model, not of MedASR's kind (lasr_ctc)")
        processor = transformers.AutoProcessor.from_pretrained(**source)
        model, loading = transformers.AutoModelForCTC.from_pretrained(**source, **options)
        extractor = processor.feature_extractor
        encoder = LabelEncoder(processor.tokenizer, model.config.vocab_size, "as_written")
    features = {name: value for name, value in extractor.to_dict().items() if name not in EXTRACTOR_SETTINGS}
    unfit = [key for key, *_ in loading["mismatched_keys"]] + sorted(loading["missing_keys"])  # filled with noise
    for is_bad, problem in (
        (unfit, f"it lacks weights of its config.json, such as {unfit[:1]}"),
        (broken := not_finite(model), f"it holds weights that are not finite, in {broken}"),
        (features, f"its features are not MedASR's: {features}"),
        (extractor.sampling_rate != SAMPLE_RATE, f"it takes audio of {extractor.sampling_rate:,} Hz"),
        (not decode_ids(processor, encoder(["patient PATIENT"])[0]), "its tokenizer is not for its vocabulary"),
    ):
        if is_bad:
            raise RunError(f"{what}: {problem}")
    return processor, model


def not_finite(model):
    """The name of a floating-point weight or statistic of `model` that is not finite, "" if there is none."""
    tensors = model.state_dict().items()
    return next((name for name, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()), "")


def push_to_hub(settings, final=None):
    """Make the repository that --push_to_hub means, and upload the folder `final`, if given, in one commit."""
    name = settings.hub_model_id or Path(settings.output_dir).resolve().name
    advice = f"the model is complete in {final}, 'hf upload' sends it"
    advice = advice if final else "run 'hf auth login' with a token that may write"
    failures = httpx2.HTTPError, OSError, ValueError
    with explained(f"--push_to_hub: {name} cannot be written on the Hub", failures, advice):
        repo = hub.create_repo(name, private=settings.hub_private_repo, exist_ok=True)
        if final:
            hub.upload_folder(repo_id=repo.repo_id, folder_path=final, commit_message="Upload the final model")
            say(f"uploaded to {repo}")


# ---------------------------------------------------------------- tables

# What a table says of a clip -> the names that its column may have: AfriSpeech-200's, NeMo's and other people's.
COLUMNS = {
    "clip": ("file_name", "audio_paths", "audio_path", "audio_filepath"),
    "text": ("text", "sentence", "transcript", "transcription"),
    "speaker": ("speaker", "speaker_id", "user_ids", "user_id", "client_id"),
    "accent": ("accent", "accents"),
    "country": ("country",),
    "domain": ("domain",),
    "gender": ("gender", "sex"),
    "age_group": ("age_group", "age"),
    "split": ("split",),
    "duration": ("duration", "seconds"),
    "pred_text": ("pred_text",),
    "baseline_text": ("baseline_text",),
}
GROUP_COLUMNS = ("speaker", "accent", "country", "domain", "gender", "age_group")
# The columns of every table of clips, beside num_samples, the length at 16 kHz. `problem` is why one cannot be used.
CLIP_COLUMNS = ("clip", "text", *GROUP_COLUMNS, "split", "problem")
SPLIT_NAMES = {"train": "train training", "dev": "dev validation valid val", "test": "test testing eval evaluation"}


def split_in(path):
    """The split that a folder of a path, or a word of its file's name, stands for; "" if none does."""
    *folders, name = path.lower().split("/")
    words = [*folders, *re.split("[^a-z]+", name)]
    return next((split for word in words for split, names in SPLIT_NAMES.items() if word in names.split()), "")


def read_table(path, text_column=None, needed=("clip", "text"), name=None):
    """(a DataFrame of a CSV or of lines of JSON, notes on its defects); raises RunError or UsageError. Its columns are
    those of COLUMNS that the table has, `text` being `text_column` if given, and `problem`; its cells are str, or
    missing. `name` is what the table is called in messages. csv, not pandas: the country code NA is Namibia, and after
    an unclosed quote pandas loses most rows."""
    notes, name = [], name or path
    with explained(f"{name} cannot be read"):
        data = Path(path).read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise RunError(f"{name} is a Git LFS pointer, not the file: run 'git lfs pull'")
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text, notes = data.decode("cp1252", "replace"), ["it is not UTF-8 and was read as Latin-1 (Windows-1252)"]

    if Path(path).suffix.lower() in (".csv", ".tsv"):
        text, number = text.replace("\0", ""), 0
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        csv.field_size_limit(2**31 - 1)  # an unclosed quote swallows what follows
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        names = rows.fieldnames or []
        try:
            for _ in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True):
                number += 1
        except csv.Error:
            notes.append(f"an unclosed quote in row {number}: look at the rows after it, its text may have taken some")
    else:
        with explained(f"{name} is not lines of JSON", (ValueError, RecursionError)):
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        if wrong := [number for number, row in enumerate(rows, start=1) if not isinstance(row, dict)]:
            raise RunError(f"{name}: row {wrong[0]} is not an object with keys such as {' and '.join(needed)}")
        names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    columns = choose_columns(names, text_column, name, needed)
    values, problems = {ours: [] for ours in columns}, []
    for number, row in enumerate(rows, start=1):
        is_surplus = any(map(str.strip, row.get(None, ())))  # the csv module's key for them
        problems.append(f"more cells than columns (row {number}): its text needs quotes" if is_surplus else "")
        for ours, theirs in columns.items():
            values[ours].append(None if is_surplus and ours not in ("clip", "text") else cell_text(row.get(theirs)))
    if count := sum(map(bool, problems)):
        notes.append(f"{plural(count, 'row')} with more cells than columns: not used")
    return pandas.DataFrame({**values, "problem": problems}, dtype="str"), notes


def choose_columns(names, text_column, table, needed):
    """{what COLUMNS calls a column: its name among `names`}; raises UsageError without one column of texts."""
    lower = {name.lower(): name for name in reversed(names) if name}
    found = {ours: [lower[name] for name in theirs if name in lower] for ours, theirs in COLUMNS.items()}
    if text_column:
        found["text"] = [text_column] * (text_column in names)
    listed = f"its columns are {' '.join(', '.join(names)[:200].split()) or 'none'}"
    if len(found["text"]) != 1:
        problem = f"no column {text_column or ' or '.join(COLUMNS['text'])}"
        problem = f"both {' and '.join(found['text'])}" if found["text"] else problem
        raise UsageError(f"{table} has {problem}; name the column of the texts with --text_column: {listed}")
    for ours in needed:
        if not found[ours]:
            raise RunError(f"{table} has no column {' or '.join(COLUMNS[ours])}; {listed}")
    return {ours: theirs[0] for ours, theirs in found.items() if theirs}


def cell_text(cell):
    """A cell of any table as text, None for one that is missing; JSON can hold halves of characters, no file can."""
    return None if cell is None or cell != cell else str(cell).encode(errors="replace").decode()


def clip_samples(cell):
    """Samples at 16 kHz of the duration in a cell; 0 if it holds none, or none that a clip can have."""
    try:
        return int(float(cell) * SAMPLE_RATE) if 0 < float(cell) < 86_400 else 0
    except (TypeError, ValueError):
        return 0


def clip_table(cells, split="", accent=""):
    """The table of clips, with every column, of what `read_table` gives; `split` and `accent` stand for empty cells."""
    table = pandas.DataFrame({name: cells.get(name) for name in CLIP_COLUMNS}, cells.index, dtype="str").fillna("")
    named = {cell: split_in(cell) or split for cell in table["split"].unique()}
    table["split"] = table["split"].map(named).astype("str")
    table["accent"] = table["accent"].replace("", accent)
    table["num_samples"] = list(map(clip_samples, cells["duration"])) if "duration" in cells else 0
    return table


# ---------------------------------------------------------------- sources


@dataclass
class Shard:
    """What becomes one prepared file, `path`: an archive, a group of audio files, or a parquet file. `rows` are the
    table of the clips that are announced for it; `files` are what it is made of; `split` is "" where the rows name
    several."""

    name: str
    path: Path
    rows: object
    files: list[str]
    split: str = ""


def split_config(dataset):
    """(folder or Hub id, configuration or "") that a --dataset names."""
    name, _, config = (dataset, "", "") if Path(dataset).expanduser().is_dir() else dataset.partition(":")
    return name, config


ARCHIVE = re.compile(r"audio/([^/]+)/([^/]+)/[^/]+\.tar\.gz")
METADATA = re.compile(r"(.*/)?metadata\.(csv|jsonl)")
GROUP_CLIPS = 256  # recordings of a folder that are converted to one prepared file


class Source:
    """A corpus as `shards` of clips: AfriSpeech-200's archives, audio files with tables, or parquet files. `announced`
    is the table of the clips that its tables tell of, `names` are those of all its shards, `accents` the slugs of all
    its accents. `folder` holds its prepared files. The splits `made`, which it lacks, are taken from train by
    `assignment`, {speaker: split}."""

    def __init__(self, dataset, settings, splits, is_extra=False):
        """The corpus, its tables read as far as `splits` need them; raises RunError or UsageError. `is_extra` is one of
        --also_score, to which the flags on the corpus and its parts do not apply."""
        name, config = split_config(dataset)
        revision = None if is_extra else settings.dataset_revision
        revision = DEFAULT_DATASET_REVISION if name == DEFAULT_DATASET and not revision else revision
        self.text_column, asked = (None, None) if is_extra else (settings.text_column, settings.accents)
        self.dataset, self.is_extra, self.keep = dataset, is_extra, settings.keep_archives
        self.made, self.assignment, self.unnamed, self.names = (), {}, "", []
        place = Path(name).expanduser()
        place = place.resolve() if place.is_dir() else None
        identity = digest([str(place or name), revision, config, self.text_column])
        self.folder = Path(settings.data_dir).expanduser() / f"{file_stem(public(dataset))}-{identity[:8]}"
        self.repository = Repository(name, revision, place, self.folder)
        self.repository.list()
        paths = sorted(self.repository.files)
        archives = list(filter(ARCHIVE.fullmatch, paths))
        self.layout, has_parquet = (
            "archives" if archives else "recordings",
            any(path.endswith(".parquet") for path in paths),
        )
        if config and (archives or not has_parquet):
            raise UsageError(f"--dataset names '{config}'; {name} has no configurations: leave it out")
        if archives:
            self.accents = {path.split("/")[1] for path in paths if re.match(r"(audio|transcripts)/[^/]+/", path)}
            self.add_archives(archives, splits, self.accents & set(map(slugify, asked)) if asked else self.accents)
            return
        if settings.streaming and not is_extra:
            raise UsageError(f"--streaming is for AfriSpeech-200's layout, which {name} is not in; leave it out")
        if has_parquet:
            self.add_parquet_files(name, config, splits)
        elif tables := list(filter(METADATA.fullmatch, paths)):
            self.add_audio_files(tables)
        else:
            kinds = "no audio/<accent>/<split>/*.tar.gz, no metadata.csv or metadata.jsonl and no parquet files"
            raise RunError(f"{name} has {kinds}: it has {plural(len(paths), 'file')}, such as {(paths or ['none'])[0]}")
        self.names = self.names or [shard.name for shard in self.shards]
        tables = [shard.rows.assign(shard=number) for number, shard in enumerate(self.shards)]
        self.announced = pandas.concat(tables, ignore_index=True)
        self.accents = set(map(slugify, self.announced["accent"].unique())) - {""}
        self.plan_splits(splits, settings.seed)

    def new_shard(self, name, rows, files, made_of=None, split=""):
        """A `Shard` whose prepared file is another one where anything that it is made of has changed."""
        mark = digest([made_of, *([path, *self.repository.files[path]] for path in files)])[:12]
        return Shard(name, self.folder / f"{self.stem(name)}.{mark}.arrow", rows, files, split)

    @staticmethod
    def stem(name):
        """What the names of all prepared files of a shard begin with."""
        return f"{slugify(name)[-80:]}-{digest(name)[:6]}"

    def read(self, path):
        """`read_table` of a file of the repository; warns of its defects."""
        cells, notes = read_table(self.repository.fetch(path), self.text_column, name=path)
        for note in notes:
            warn(f"{path}: {note}")
        return cells

    def add_archives(self, archives, splits, accents):
        """AfriSpeech-200's layout: audio/<accent>/<split>/*.tar.gz and transcripts/<accent>/<split>.csv."""
        tables, self.shards, self.names = {}, [], archives
        for accent, split in itertools.product(sorted(accents), splits):
            if f"transcripts/{accent}/{split}.csv" in self.repository.files:
                tables[accent, split] = f"transcripts/{accent}/{split}.csv"
        with ThreadPoolExecutor(8) as pool:  # some hundred small files on the Hub, so several at once
            list(pool.map(self.repository.fetch, tables.values()))
        for (accent, split), path in tables.items():
            cells = self.read(path).dropna(subset="clip")
            cells["clip"], cells["split"] = cells["clip"].map(clip_key), split
            tables[accent, split] = clip_table(cells.drop_duplicates("clip"), split, accent)
        nothing = clip_table(pandas.DataFrame())
        self.announced = pandas.concat([nothing, *tables.values()], ignore_index=True)
        for path in archives:
            accent, split = ARCHIVE.fullmatch(path).groups()
            if accent in accents and split in splits:
                rows = tables.get((accent, split), nothing)
                made_of = [accent, *rows[["clip", "text", *GROUP_COLUMNS, "problem"]].to_numpy().ravel()]
                self.shards.append(self.new_shard(path, rows, [path], made_of, split))

    def add_audio_files(self, tables):
        """Audio files in folders, with a metadata.csv or metadata.jsonl beside or above them."""
        files, found = self.repository.files, []
        for path in tables:
            table = clip_table(self.read(path))
            keys, problems = [], []
            for number, (name, problem) in enumerate(zip(table["clip"], table["problem"]), start=1):
                key = os.path.normpath(os.path.join(os.path.dirname(path), name))
                if not name.strip():
                    key, problem = f"{path}, row {number}", "no file_name"
                elif key not in files:
                    outside = key.startswith(("/", "../"))
                    problem = "refused: its path climbs out of the folder" if outside else problem or "no audio"
                keys.append(key)
                problems.append(problem)
            # "stress-test.wav" is of no test split.
            splits = [split_in(path) or split_in(f"{os.path.dirname(key)}/") for key in keys]
            splits = table["split"].where(table["split"] != "", splits)
            found.append(table.assign(clip=keys, split=splits, problem=problems))
        listed = pandas.concat(found).drop_duplicates("clip")
        if not listed["clip"].isin(files).any():
            example = f"{plural(len(listed), 'row')}, such as {next(iter(listed['clip']), 'none')}"
            raise RunError(f"{tables[0]} names no file that is there among {example}")
        rest = [path for path in sorted(files.keys() - set(listed["clip"])) if is_audio_name(path)]
        rest = pandas.DataFrame({"clip": rest, "split": [os.path.dirname(path) + "/" for path in rest]}, dtype="str")
        table = pandas.concat([listed, clip_table(rest.assign(problem="no transcript"))])
        self.shards = []
        for split, rows in table.groupby("split"):
            for start in range(0, len(rows), GROUP_CLIPS):
                group = rows.iloc[start : start + GROUP_CLIPS]
                present, made_of = group["clip"][group["problem"] == ""], group.astype("str").to_numpy().ravel()
                name = f"{split or 'clips'}-{start // GROUP_CLIPS:05d}"
                self.shards.append(self.new_shard(name, group, present.tolist(), made_of.tolist()))

    def add_parquet_files(self, name, config, splits):
        """Parquet files as `push_to_hub` writes them, divided into splits as datasets does."""
        repository, named = self.repository, {}
        noted = self.folder / f"parquet-{digest(repository.files)[:12]}.json"
        if not (named := read_json(noted) or {}):
            try:
                place = str(repository.folder or name)
                builder = datasets.load_dataset_builder(place, config or None, revision=repository.revision)
                found = builder.config.data_files
            except (ValueError, OSError, yaml.YAMLError) as error:
                raise UsageError(f"--dataset {self.dataset}: {one_line(error)}") from error
            for split, file in [(split, str(file)) for split, files in found.items() for file in files]:
                path = os.path.relpath(file, place) if repository.folder else re.sub("^hf://([^/]+/){3}", "", file)
                # What names no split is "train" for datasets.
                if path in repository.files:
                    named[path] = split_in(path) if list(found) == ["train"] else split_in(split)
            write_text(noted, json.dumps(named, indent=1))
        self.names = list(named)
        if set(splits) <= set(named.values()):  # a corpus may be large beside its test split
            named = {path: split for path, split in named.items() if split in splits}
        with ThreadPoolExecutor(8) as pool:
            tables = pool.map(self.parquet_rows, named, named.values())
            self.shards = [self.new_shard(path, table, [path]) for path, table in zip(named, tables)]
        if not self.shards:
            raise RunError(f"{self.dataset} has no parquet file in its configuration")

    @contextlib.contextmanager
    def open_parquet(self, path):
        """(a pyarrow ParquetFile, the name of its column of audio, structs of bytes and path); raises RunError."""
        local = self.repository.local(path)
        problems = OSError, ValueError, NotImplementedError  # pyarrow's own exceptions are kinds of these
        with explained(f"{path} cannot be read as parquet", problems):
            stream = open(local, "rb") if local else hub.HfFileSystem().open(self.repository.on_hub(path))
            with stream, parquet.ParquetFile(stream) as file:
                structs = [item for item in file.schema_arrow if str(item.type).startswith("struct<")]
                names = [item.name for item in structs if item.type.get_field_index("bytes") >= 0]
                names = ["audio"] if "audio" in names else names
                if len(names) != 1:
                    problem = f"more than one: {', '.join(names)}" if names else "no audio column (of bytes and path)"
                    raise RunError(f"{path} has {problem}; its columns are {', '.join(file.schema_arrow.names)}")
                yield file, names[0]

    def parquet_rows(self, path, split):
        """The table of a parquet file's clips; of one that is not converted yet, what is no audio is read."""
        prepared = self.new_shard(path, None, [path]).path
        if prepared.exists():
            return prepared_rows(open_prepared(prepared))
        with self.open_parquet(path) as (file, audio):
            features = datasets.Features.from_arrow_schema(file.schema_arrow)
            names = [name for name in features if name != audio]
            columns = choose_columns(names, self.text_column, path, ("text",))
            columns.pop("clip", None)
            rows = file.read([*columns.values(), f"{audio}.path"]).to_pylist()
        cells = {}
        for ours, theirs in columns.items():
            kind, values = features[theirs], [row[theirs] for row in rows]
            if isinstance(kind, datasets.ClassLabel):
                values = [kind.int2str(value) if value is not None and value >= 0 else None for value in values]
            cells[ours] = list(map(cell_text, values))
        names = [os.path.basename((row.get(audio) or {}).get("path") or "") for row in rows]
        keys = [f"{number:05d}{'-' if name else ''}{name}" for number, name in enumerate(names)]
        cells["clip"] = [f"{path.removesuffix('.parquet')}/{key}" for key in keys]
        return clip_table(pandas.DataFrame(cells, dtype="str"), split)

    def plan_splits(self, splits, seed):
        """Draw speakers of the train split for dev and test, about a tenth of the clips each, where `splits` lack one.
        Where no clip names a split, all are of train, or of the test set that is scored too. Raises RunError where it
        cannot be done."""
        table = self.announced
        self.unnamed = "" if (table["split"] != "").any() else ("test" if self.is_extra else "train")
        self.assign_splits(table)
        if lost := table["clip"][table["split"] == ""].tolist():
            warn(f"{plural(len(lost), 'clip')}, such as {lost[0]}, of no split that is named: left out")
        found = set(table["split"])
        if set(splits) <= found:
            return
        self.made = tuple(split for split in SPLITS if split not in found)
        what = f"{self.dataset} has no {' and no '.join(self.made)} split"
        speakers = table["speaker"][(table["split"] == "train") & (table["speaker"] != "")]
        sizes = speakers.value_counts(sort=False).to_dict()
        if "train" in self.made or len(sizes) <= len(self.made):
            advice = "name speakers in a column such as speaker, or give it in folders or a column split"
            raise RunError(f"{what}, and {plural(len(sizes), 'speaker')} of train to make it of: {advice}")
        # The order is one of checksums, so that more recordings later move few speakers.
        left = sorted(sizes, key=lambda speaker: hashlib.sha256(f"{seed} {speaker}".encode()).digest())
        for split in self.made:
            room, drawn = sum(sizes.values()) // 10, []
            for speaker in left:
                if sizes[speaker] <= room:
                    drawn.append(speaker)
                    room -= sizes[speaker]
            drawn = drawn or [min(left, key=sizes.get)]
            left = [speaker for speaker in left if speaker not in drawn]
            self.assignment |= dict.fromkeys(drawn, split)
        self.assign_splits(table)
        say(f"  {' and '.join(self.made)} made of the train split by speaker, by --seed {seed}")

    def assign_splits(self, table):
        """Give the clips of a table the splits that are planned, in place."""
        table["split"] = table["split"].replace("", self.unnamed)
        if self.assignment:
            drawn = table["speaker"].map(self.assignment).fillna("train").astype("str")
            table["split"] = table["split"].where(table["split"] != "train", drawn)
            speakerless = (table["split"] == "train") & (table["speaker"] == "") & (table["problem"] == "")
            table["problem"] = table["problem"].mask(speakerless, "no speaker to make a split by")

    def needed(self, splits):
        """The shards that have clips of `splits`."""
        if self.layout == "archives":
            return [shard for shard in self.shards if shard.split in splits]
        numbers = self.announced["shard"][self.announced["split"].isin(splits)].unique()
        return [self.shards[number] for number in sorted(numbers)]

    def part(self, shards):
        """What a worker process needs to convert `shards`."""
        part = copy.copy(self)
        part.announced, part.shards, part.names = None, [], []
        files = {path: self.repository.files[path] for shard in shards for path in shard.files}
        part.repository = dataclasses.replace(self.repository, files=files)
        return part

    def clips(self, shard):
        """Yield the clips of a shard as rows of its prepared file."""
        rows = shard.rows.to_dict("records")
        if self.layout == "archives":
            pairs = self.archive_clips(shard, {row["clip"]: row for row in rows})
        elif shard.name.endswith(".parquet"):
            pairs = zip(rows, self.parquet_audio(shard.name))
        else:
            pairs = ((row, self.repository.local(row["clip"])) for row in rows)
        for row, audio in pairs:
            yield make_clip(row, audio)

    def parquet_audio(self, path):
        """Yield the encoded audio of each row, None where there is none."""
        with self.open_parquet(path) as (file, audio):
            for batch in file.iter_batches(batch_size=50, columns=[audio]):
                yield from ((cell or {}).get("bytes") for cell in batch.column(0).to_pylist())

    def archive_clips(self, shard, rows):
        """Yield (row, encoded audio) of an archive; damage ends it with a row that says so."""
        nothing = dict.fromkeys(CLIP_COLUMNS, "") | {"split": shard.split, "accent": shard.name.split("/")[1]}
        seen = set()
        with self.repository.open(shard.name) as stream:
            try:
                for name, audio, problem in archive_members(stream):
                    row = rows.get(key := clip_key(name)) or {**nothing, "clip": key, "problem": "no transcript"}
                    problem = problem or row["problem"] or ("a second copy" if key in seen else "")
                    yield {**row, "problem": problem}, audio
                    seen.add(key)
            except DAMAGE as error:
                problem = f"damaged archive ({one_line(error)}): {plural(len(seen), 'clip')} of it kept"
                yield {**nothing, "clip": shard.name, "problem": problem}, None


def clip_key(path):
    """'<session>/<file>', the last two components: a file name alone occurs in more than one session."""
    return "/".join(path.strip("/").split("/")[-2:])


# ---------------------------------------------------------------- audio

CLIP_BYTES_LIMIT = 1_000_000_000  # a clip that decodes to more than this is a bomb, not speech
LOUDEST = 1e30  # full scale is 1; what comes near float32's limit overflows when it is resampled
# Samples at 16 kHz read on each side of a window, more than the resampler's filter is long. Windows begin at multiples
# of 640, and with a margin of such a multiple at a sample of every common rate.
RESAMPLING_MARGIN = 3 * 640
MOST_FRAMES = 2**40  # more is how libsndfile says that it does not know
# Of the files in a folder those are taken that libsndfile can read, or that are audio which it should be said not to.
MORE_SUFFIXES = "aif aifc oga opus wave snd sph m4a mp4 aac wma amr webm mka mov 3gp".split()


def is_audio_name(path):
    """Whether a file is taken for audio where a folder is searched."""
    name, suffixes = os.path.basename(path), {*map(str.lower, soundfile.available_formats()), *MORE_SUFFIXES} - {"raw"}
    return os.path.splitext(name)[1][1:].lower() in suffixes and not name.startswith(".")


class AudioBytes(io.BytesIO):
    """Encoded audio. A corrupt header may seek to before its beginning, of which soundfile would print a traceback."""

    def seek(self, offset, whence=io.SEEK_SET):
        with contextlib.suppress(ValueError):
            super().seek(offset, whence)
        return self.tell()


@contextlib.contextmanager
def open_audio(source):
    """A soundfile.SoundFile of encoded audio, bytes or a path; raises ValueError, also for what it raises in use."""
    try:
        # Opened here: soundfile refuses names that are not UTF-8.
        stream = AudioBytes(source) if isinstance(source, bytes) else open(source, "rb")
        with stream, soundfile.SoundFile(stream) as file:
            yield file
    except (soundfile.SoundFileError, OSError) as error:
        # libsndfile's own words: the exception's text holds a memory address, by which no prepared file may differ.
        raise ValueError(getattr(error, "error_string", None) or one_line(error)) from error


def decode_audio(source, start=0, stop=None):
    """Encoded audio (bytes or a path) -> 16 kHz mono float32 samples `start` to `stop` of it; raises ValueError. Only
    what is asked for is decoded: a window of an hour costs what a window of a minute does."""
    with open_audio(source) as file:
        rate = file.samplerate
        margin = 0 if rate == SAMPLE_RATE else RESAMPLING_MARGIN
        first, last = max(0, start - margin), None if stop is None else stop + margin
        first_frame = round(first * rate / SAMPLE_RATE)
        count = (file.frames if last is None else round(last * rate / SAMPLE_RATE)) - first_frame
        if count * max(file.channels, SAMPLE_RATE / rate) * 4 > CLIP_BYTES_LIMIT:
            raise ValueError(f"it decodes to over {CLIP_BYTES_LIMIT / 1e9:g} GB")
        file.seek(min(first_frame, file.frames))
        samples = file.read(count, dtype="float32", always_2d=True)
        samples = samples[:, 0] if file.channels == 1 else samples.mean(axis=1)
    if not np.abs(samples).max(initial=0) < LOUDEST:
        raise ValueError("it holds samples that are not numbers, or absurdly large")
    if rate != SAMPLE_RATE and len(samples):
        samples = librosa.resample(samples, orig_sr=rate, target_sr=SAMPLE_RATE)  # soxr HQ
    return samples[start - first :][: None if stop is None else stop - start]


def audio_length(path):
    """(samples that an audio file has at 16 kHz, seconds that its header promises beyond them); raises ValueError. A
    header may name no length, as of a stream, or that of a recording that was cut off: the last sample is tried, and if
    it is not there all are counted. Raises it for a file without any sample too."""
    with open_audio(path) as file:
        rate, promised = file.samplerate, file.frames
        with contextlib.suppress(soundfile.SoundFileError):
            file.seek(promised - 1)
            if promised and len(file.read(1)) == 1:
                return int(np.ceil(promised * SAMPLE_RATE / rate)), 0
    with open_audio(path) as file, contextlib.suppress(soundfile.SoundFileError):
        count, block = 0, max(1, 2**20 // file.channels)
        while found := len(file.read(block, dtype="float32")):
            count += found
    if not count:
        raise ValueError("no audio samples")
    return int(np.ceil(count * SAMPLE_RATE / rate)), 0 if promised > MOST_FRAMES else (promised - count) / rate


def make_clip(row, audio):
    """A row of a prepared file: that of a table of clips, with its `audio` as FLAC, lossless at 16 bits; its length is
    the audio's own, 0 with a problem."""
    samples, flac, problem = (), io.BytesIO(), row["problem"] or ("" if audio else "no audio")
    if not problem:
        try:
            samples = decode_audio(audio)
            problem = "" if len(samples) else "no audio samples"
        except ValueError as error:
            problem = f"undecodable audio ({error})"
    if not problem:
        soundfile.write(flac, np.clip(samples, -1.0, 1.0), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return {**row, "audio": flac.getvalue(), "num_samples": len(samples), "problem": problem}


# tarfile raises ValueError and its kin for numbers in headers that are none.
DAMAGE = (EOFError, tarfile.TarError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError)


def archive_members(stream):
    """Yield (name, bytes, problem) for each member of a tar.gz read as a stream; raises DAMAGE if it is corrupt. gzip
    under tarfile, not tarfile's own "r|gz": only gzip checks the checksum at the end."""
    if stream.peek(64).startswith(b"version https://git-lfs"):
        raise tarfile.ReadError("a Git LFS pointer, not the file: run 'git lfs pull'")
    options = {"encoding": "utf-8", "errors": "replace"}  # other names could not be written anywhere
    with gzip.open(stream) as plain, tarfile.open(fileobj=plain, mode="r|", **options) as tar:
        for member in (member for member in tar if not member.isdir()):
            problem = ""
            if member.name.startswith("/") or ".." in member.name.split("/"):
                problem = "refused: its path climbs out of the archive"
            elif not member.isreg() or member.size > CLIP_BYTES_LIMIT:
                what = f"it is over {CLIP_BYTES_LIMIT / 1e9:g} GB" if member.isreg() else "it is a link or a device"
                problem = f"refused: {what}"
            yield member.name, b"" if problem else tar.extractfile(member).read(), problem
        # tarfile takes a header that it cannot read for the end; the checksum is behind what follows.
        while plain.read(1 << 20):
            pass


# ---------------------------------------------------------------- preparation

FLAC_BYTES_AN_HOUR = 59e6  # of 16 kHz mono speech


def clip_features():
    """The columns of a prepared file."""
    texts = dict.fromkeys(CLIP_COLUMNS, datasets.Value("string"))
    return datasets.Features(audio=datasets.Value("binary"), num_samples=datasets.Value("int32"), **texts)


def prepare_shard(source, shard):
    """Convert a shard to its prepared file, complete or absent; returns (clips, hours) of it. Raises RunError."""
    clips, samples, writer_of = 0, 0, Lazy("datasets.arrow_writer").ArrowWriter
    with explained(f"{shard.name} cannot be prepared"):
        for path in shard.files:
            source.repository.fetch(path)
        with complete(shard.path) as partial:
            with writer_of(path=str(partial), features=clip_features(), writer_batch_size=50) as writer:
                for clip in source.clips(shard):
                    writer.write(clip)
                    clips, samples = clips + 1, samples + clip["num_samples"]
                writer.finalize()
        for path in () if source.keep else shard.files:
            source.repository.release(path)
    return clips, samples / SAMPLE_RATE / 3600


def start_worker(connection):
    """Let this worker process end when the other end of `connection` is closed, by the program or by its death. It
    would wait for work for ever otherwise, or convert to its end an archive that nobody wants any more."""

    def watch():
        with contextlib.suppress(EOFError, OSError):
            connection.recv()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the program tells its workers
    threading.Thread(target=watch, daemon=True).start()


def prepare(source, splits, settings):
    """Convert every shard of `splits` that is not converted yet, with a progress bar; raises RunError if one cannot be.
    Several programs may call this at once: one works, the others wait at the lock, without a time-out."""
    source.folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(source.folder / "prepare.lock"):
        todo, ready = [], []
        for shard in source.needed(splits):
            (ready if shard.path.exists() else todo).append(shard)
        # What was left: half-written files, archives of finished shards, and by an earlier state of the corpus other
        # versions of these shards and shards that it has no more.
        for stale in source.folder.glob("*.arrow.*.tmp"):
            stale.unlink()
        for path in [path for shard in ready for path in shard.files if not source.keep]:
            source.repository.release(path)
        if not todo:
            return
        current = dict.fromkeys(map(source.stem, source.names))
        current |= {source.stem(shard.name): shard.path for shard in todo}
        for path in source.folder.glob("*.arrow"):
            if current.get(path.name.partition(".")[0], "none") not in (None, path):
                path.unlink()
        need, free = disk_needed(source, todo, settings.num_proc)[0], shutil.disk_usage(source.folder).free
        if need > free:
            what = f"preparing {plural(len(todo), 'archive')} needs {need / 1e9:.1f} GB in {source.folder}"
            advice = "choose another --data_dir, fewer --accents, or a lower --num_proc"
            raise RunError(f"{what} and {free / 1e9:.1f} GB are free: {advice}")
        clips, hours, failures = 0, 0.0, []
        # spawn: forked workers inherit locks of threads (tokenizers, torch) and can hang.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        pool = ProcessPoolExecutor(min(settings.num_proc, len(todo)), context, start_worker, (theirs,))
        # However this ends, the workers end with it.
        with tqdm.tqdm(total=len(todo), desc="preparing audio", unit="archive") as bar, pool, contextlib.closing(ours):
            # The largest first, so that none is left alone at the end.
            todo.sort(key=lambda shard: -source.repository.size(shard.files))
            for job in as_completed([pool.submit(prepare_shard, source.part([shard]), shard) for shard in todo]):
                try:
                    more_clips, more_hours = job.result()
                    clips, hours = clips + more_clips, hours + more_hours
                except RunError as error:
                    failures.append(error)
                except BrokenProcessPool as error:
                    advice = "most likely for want of memory: run the same command again with a lower --num_proc"
                    raise RunError(f"a process that prepares audio was killed, {advice}") from error
                bar.set_postfix_str(f"{clips:,} clips, {hours:.2f} h")
                bar.update()
        if failures:
            failed = f"{len(failures)} of {len(todo)} archives could not be prepared, the others are ready"
            raise RunError(f"{failed}; the first: {failures[0]}")


def disk_needed(source, todo, num_proc):
    """(bytes that preparing the shards `todo` needs at its peak, bytes that stay), from the durations in the tables."""
    sizes = sorted((source.repository.size(shard.files) for shard in todo), reverse=True)
    share = sum(sizes) / max(1, sum(source.repository.size(shard.files) for shard in source.shards))
    stays = share * hours_of(source.announced) * FLAC_BYTES_AN_HOUR or sum(sizes)  # where nobody noted durations down
    if source.repository.folder:
        return stays, stays
    return (stays + sum(sizes),) * 2 if source.keep else (stays + sum(sizes[:num_proc]), stays)


def hours_of(table):
    return float(table["num_samples"].sum()) / SAMPLE_RATE / 3600


def sizes_of(table):
    """How much a table of clips is, for metrics.json."""
    people, spoken = (table[name][table[name] != ""].nunique() for name in ("speaker", "accent"))
    return {"clips": len(table), "hours": round(hours_of(table), 4), "speakers": people, "accents": spoken}


def size_line(table):
    """How much a table of clips is, in columns; own tables may not tell the hours before the audio is converted."""
    hours, sizes = f"{hours_of(table):.2f}" if not len(table) or table["num_samples"].any() else "?", sizes_of(table)
    counts = [plural(sizes[f"{noun}s"], noun) for noun in ("clip", "speaker", "accent")]
    return f"{counts[0]:>14}{hours:>9} h{counts[1]:>16}{counts[2]:>12}"


def dry_run(source, settings):
    """Say what a run would do, from the tables alone: clips, hours and speakers, downloads, disk and updates."""
    train = 0
    for split in SPLITS:
        table = source.announced[source.announced["split"] == split]
        table = table[is_wanted(table, settings)]
        if split == "train":
            table = table[table["num_samples"] <= settings.max_train_seconds * SAMPLE_RATE]
            train = min(len(table), settings.max_train_samples or len(table))
        say(f"  {split:<5}{size_line(table)}")
        refuse_empty(split, table)
        for accent in table["accent"].value_counts().index:
            say(f"    {accent:<24}{size_line(table[table['accent'] == accent])[:-12]}")
    todo = [shard for shard in source.needed(settings.splits(on_disk=True)) if not shard.path.exists()]
    fetched = 0 if source.repository.folder else sum(source.repository.size(shard.files) for shard in todo)
    peak, kept = (size / 1e9 for size in disk_needed(source, todo, settings.num_proc))
    disk = f"to keep {kept:.2f} GB in {settings.data_dir}, at the peak {peak:.2f} GB"
    say(f"  to fetch {fetched / 1e9:.2f} GB in {plural(len(todo), 'archive')}; {disk}")
    updates, an_epoch = planned_updates(settings, train)
    steps = plural(settings.gradient_accumulation_steps, "accumulation step"), plural(settings.world_size, "device")
    steps = " x ".join((plural(settings.per_device_train_batch_size, "clip"), *steps))
    say(f"  {plural(updates, 'update')}, {an_epoch:,} an epoch, of {steps}")
    return 0


# ---------------------------------------------------------------- clips

SHUFFLE_CLIPS = 1_000  # clips that wait in the shuffling buffer of each streaming worker, about 100 MB
SKIPPED_COLUMNS = ("split", "clip", "reason", "accent", "seconds", "text")


@dataclass
class Clips:
    """Clips that are trained on or scored: their `audio`, a Dataset of prepared rows, and their `table` in its order.
    `skipped` is the table of those that were left out, with a `reason`."""

    audio: object
    table: object
    skipped: object = None

    def __len__(self):
        return len(self.table)

    @property
    def reasons(self):
        """{reason without its detail: clips left out for it}"""
        return Counter(re.split(r"[:(]", reason)[0].strip() for reason in self.skipped["reason"])


def open_prepared(path):
    """The Dataset of a prepared file; raises RunError for one that a bad disk or a power cut has damaged."""
    damaged = OSError, Lazy("pyarrow").ArrowInvalid
    with explained(f"{path} is damaged", damaged, "delete it, the same command makes it again"):
        return datasets.Dataset.from_file(str(path))


def prepared_rows(prepared):
    """The table of the clips of a prepared Dataset: memory-mapped, no audio is read."""
    return prepared.data.select([*CLIP_COLUMNS, "num_samples"]).to_pandas()


FILTERS = {"accents": ("accent", slugify), "domains": ("domain", str.lower), "countries": ("country", str.upper)}


def is_wanted(table, settings):
    """Which clips are of the --accents, --domains and --countries asked for, a bool Series. A damaged archive or a file
    without a transcript has none to ask for, and counts as wanted."""
    wanted = pandas.Series(True, table.index)
    for flag_name, (column, fold) in FILTERS.items():
        if asked := getattr(settings, flag_name):
            folded = table[column].map({cell: fold(cell) for cell in table[column].unique()})
            unknown = (table[column] == "") & (table["problem"] != "")
            wanted &= folded.isin(set(map(fold, asked))) | unknown
    return wanted


def check_announced(source, settings):
    """Refuse, before any audio is converted, what the tables show to be without a clip."""
    announced = source.announced
    for flag_name, (column, fold) in FILTERS.items():
        known = source.accents if column == "accent" else set(map(fold, announced[column].unique())) - {""}
        for asked in [asked for asked in getattr(settings, flag_name) or () if known and fold(asked) not in known]:
            near = difflib.get_close_matches(fold(asked), sorted(known), n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"they are {', '.join(sorted(known))}"
            raise UsageError(f"--{flag_name} has '{asked}', which {source.dataset} does not have; {hint}")
    for split in () if settings.prepare_only else settings.splits():
        table = announced[announced["split"] == split]
        if len(table):
            refuse_empty(split, table[is_wanted(table, settings)])


def refuse_empty(split, table, reasons=None):
    """Raise RunError, with the `reasons` of its `Clips`, if a split has no clip, or none of dev or test a word."""
    if not len(table):
        why = ", ".join(f"{count:,} x {reason}" for reason, count in (reasons or Counter()).most_common())
        raise RunError(f"no {split} clip is left: {why or 'these --accents, --domains and --countries have none'}")
    if split != "train" and not any(map(normalize_wer, table["text"])):
        raise RunError(f"no {split} transcript has a word to score: {plural(len(table), 'clip')} of punctuation")


def load_clips(source, splits):
    """(Dataset of all prepared clips of the shards of `splits`, table of these splits). `row` of the table is the
    clip's place in the Dataset, -1 for those that are announced and have no audio."""
    prepared = [open_prepared(shard.path) for shard in source.needed(splits)]
    audio = datasets.concatenate_datasets(prepared) if prepared else None
    announced = source.announced[source.announced["split"].isin(splits)]
    table = prepared_rows(audio) if prepared else announced.iloc[:0].copy()
    source.assign_splits(table)
    table = table.assign(row=np.arange(len(table)))[table["split"].isin(splits)]
    missing = announced[~(announced["split"] + "/" + announced["clip"]).isin(table["split"] + "/" + table["clip"])]
    missing = missing.assign(num_samples=0, problem=missing["problem"].replace("", "no audio"), row=-1)
    return audio, pandas.concat([table, missing[table.columns]], ignore_index=True)


def select_clips(audio, table, settings, check, limit=None):
    """The `Clips` of a `table` of `load_clips` without what cannot be used, a random choice of `limit` if given.
    `check(table)` gives the reason against each clip, or "". The result is ordered by falling length, so that the
    longest batch comes first when scoring."""
    reasons = pandas.Series(check(table), table.index, "str")
    copies = (reasons == "") & table["clip"].where(reasons == "").duplicated()
    reasons = reasons.mask(copies, "a second copy")
    kept, skipped = table[reasons == ""], table[reasons != ""].assign(reason=reasons[reasons != ""])
    if limit and limit < len(kept):
        kept = kept.iloc[np.random.default_rng(settings.seed).permutation(len(kept))[:limit]]
    kept = kept.sort_values(["num_samples", "clip"], ascending=[False, True], ignore_index=True)
    audio = audio.select(kept["row"].tolist(), keep_in_memory=True) if audio else None
    return Clips(audio, kept.drop(columns="row"), skipped)


def select_all(sources, settings, check):
    """{split, or name of --also_score: Clips} of `sources`, {"": the corpus, name: test set of --also_score}. Says what
    was left out and writes skipped_clips.csv. Raises RunError for an empty part."""
    limits = dict(zip(SPLITS, (settings.max_train_samples, settings.max_eval_samples, settings.max_test_samples)))
    selected = {}
    for extra, source in sources.items():
        splits = ("test",) if extra else settings.splits(on_disk=True)
        audio, table = load_clips(source, splits)
        table = table if extra else table[is_wanted(table, settings)]
        if settings.streaming and not extra and not settings.prepare_only:
            train = source.announced[source.announced["split"] == "train"]
            selected["train"] = Clips(None, train[is_wanted(train, settings)], table.iloc[:0].assign(reason=""))
        for split in splits:
            part = table[table["split"] == split].reset_index(drop=True)
            clips = select_clips(audio, part, settings, check, None if extra else limits[split])
            clips.skipped["split"] = extra or split
            selected[extra or split] = clips
    skipped, path = pandas.concat([clips.skipped for clips in selected.values()]), skipped_path(settings)
    if settings.local_process_index == 0:  # on each node: streaming workers add to it, and folders need not be shared
        write_text(path, ",".join(SKIPPED_COLUMNS) + "\n" + csv_lines(skipped))
    for name, clips in selected.items():
        say(f"  {name:<5}{size_line(clips.table)}")
        for reason, count in sorted(clips.reasons.items()):
            say(f"    left out of {name}: {count:,} x {reason}")
    if len(skipped):
        say(f"  each one is named in {path}")
    for note in shared_speaker_notes(selected):
        warn(note)
    for name, clips in sorted(selected.items(), key=lambda item: not len(item[1].skipped)):  # what is known first
        # Not every accent has every split: what is only prepared may lack one.
        if not settings.prepare_only or len(clips.skipped) or not any(map(len, selected.values())):
            refuse_empty(name, clips.table, clips.reasons)
    return selected


def shared_speakers(selected):
    """{split: speakers of it who are in train too}"""
    people = {split: set(selected[split].table["speaker"]) - {""} for split in SPLITS if split in selected}
    trained = people.pop("train", set())
    return {split: len(found & trained) for split, found in people.items() if found & trained}


def shared_speaker_notes(selected):
    note = "{} of {} in train too: its scores are not those of new speakers.".format
    return [note(plural(count, "speaker"), split) for split, count in shared_speakers(selected).items()]


def skipped_path(settings):
    return Path(settings.output_dir) / "results" / "skipped_clips.csv"


def csv_lines(skipped):
    """Lines of skipped_clips.csv; a cell that a spreadsheet would take for a formula gets an apostrophe before it. csv
    puts no quotes around a carriage return, at which a spreadsheet begins another row."""
    lines, skipped = io.StringIO(), skipped.assign(seconds=(skipped["num_samples"] / SAMPLE_RATE).round(2))
    for row in skipped[list(SKIPPED_COLUMNS)].itertuples(index=False):
        cells = [re.sub(r"^(?=[=+\-@\t\r\n＝＋－＠])", "'", str(cell)).replace("\r", " ") for cell in row]
        csv.writer(lines, lineterminator="\n").writerow(cells)
    return lines.getvalue()


def streamed_clips(shards, source, unwanted, check, seed, epoch, skipped_file):
    """Yield the training clips of `shards`, straight from there, in another order in each `epoch`. Runs in the
    DataLoader's workers, each with shards of its own. `unwanted` are the names of clips that were not asked for; what
    cannot be used is added to `skipped_file`, once a clip."""
    for index in np.random.default_rng((seed, epoch)).permutation(len(shards)):
        with explained_hub_errors(source.repository.name, "dataset"):
            for clip in (clip for clip in source.clips(shards[index]) if clip["clip"] not in unwanted):
                table = pandas.DataFrame([{**clip, "audio": None}])
                if not (reason := check(table)[0]):
                    yield clip
                    continue
                line = csv_lines(table.assign(reason=reason))
                with explained(f"{skipped_file} cannot be written", advice=ROOM_ADVICE):
                    if line not in skipped_file.read_text(encoding="utf-8"):
                        with open(skipped_file, "a", encoding="utf-8") as file:  # one write, which is whole
                            file.write(line)


class TrainingStream:
    """The training clips of this process as endless batches, pass after pass over its share of the shards. Mixed with
    torch's IterableDataset; `loader_options` are those of the DataLoader that makes the batches. The shards are dealt
    out, the largest first, to the processes, and by datasets to the DataLoader's workers, which wait for each other at
    the end of a pass."""

    def __init__(self, source, settings, check, seed):
        shards = sorted(source.needed(["train"]), key=lambda shard: -source.repository.size(shard.files))
        if len(shards) < settings.world_size:
            found = f"{plural(len(shards), 'training archive')} for {settings.world_size} processes"
            raise UsageError(f"--streaming has {found}; use fewer, or leave it out")
        train, mine = (
            source.announced[source.announced["split"] == "train"],
            shards[settings.process_index :: settings.world_size],
        )
        self.arguments = {"shards": mine, "source": source.part(mine), "check": check, "seed": seed}
        self.arguments["unwanted"] = set(train["clip"][~is_wanted(train, settings)])
        self.arguments["skipped_file"] = skipped_path(settings)
        self.workers = min(settings.dataloader_num_workers, len(mine))

    def __iter__(self):
        for epoch in itertools.count():
            batch, self.loader_options["collate_fn"].epoch = None, epoch
            clips = datasets.IterableDataset.from_generator(
                streamed_clips, gen_kwargs={**self.arguments, "epoch": epoch}
            )
            clips = clips.shuffle(self.arguments["seed"] + epoch, buffer_size=SHUFFLE_CLIPS)
            for batch in torch.utils.data.DataLoader(clips, num_workers=self.workers, **self.loader_options):
                yield batch
            if batch is None:
                raise RunError(f"no training clip of the stream can be used: see {self.arguments['skipped_file']}")


# ---------------------------------------------------------------- text

GREEK = "ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩαβγδεζηθικλμνξοπρςστυφχψω"
# What a character becomes that the tokenizer lacks and that Unicode does not decompose; symbols become the words that a
# reader voices. Labels and scored texts share this one mapping: the model can only write what its labels had. A
# character neither here nor decomposable is dropped from labels, and counted.
FOLDS = {
    "‘": "'", "’": "'", "‚": "'", "‛": "'", "`": "'", "´": "'", "ʼ": "'", "′": "'", "“": '"', "”": '"', "„": '"',
    "″": '"', "«": '"', "»": '"', "&": " and ", "@": " at ", "=": " equals ", "<": " less than ", ">": " greater than ",
    "≤": " less than or equal to ", "≥": " greater than or equal to ", "°": " degrees ", "±": "+/-", "×": "x", "÷": "/",
    "⁄": "/", "\\": "/", "|": "/", "~": "-", "−": "-", "·": ".", "…": "...", "—": "-",
    "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ß": "ss", "ɛ": "e", "Ɛ": "E", "ɔ": "o", "Ɔ": "O",
    "ŋ": "n", "Ŋ": "N", "ɓ": "b", "Ɓ": "B", "ɗ": "d", "Ɗ": "D", "ƙ": "k", "Ƙ": "K", "ƴ": "y", "ɣ": "g", "ł": "l",
    "đ": "d", "ı": "i",
    # Greek letters are read by their names, but for the micro of units.
    **{letter: unicodedata.name(letter).split()[-1].lower() for letter in GREEK},
    "µ": "u", "μ": "u",
}  # fmt: skip
FOLD_TABLE = str.maketrans(FOLDS)
ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|(\w+));")  # only with its semicolon: "patients&notes" holds none
# Arrows and bullets; "<-5" and "=> 5" are comparisons.
LAYOUT = re.compile(r"<?-+>|=+>(?!\s*\d)|<-+(?!\d)|[←-⇿➔-➾•▪●◦‣∙]")
# "5 µg" is read as micrograms and written mcg in prescriptions; "ug" is on the lists of error-prone abbreviations.
MICROGRAM = re.compile(r"[µμ]g\b")
# MedASR writes dictated punctuation and layout as {period}, {new paragraph}.
CONTROL_TOKEN = re.compile(r"\{[a-z ]+\}|</?s>|<epsilon>")


def resolve(text):
    """The text with HTML entities resolved, without arrows and bullets, fractions and powers parted from the digit
    before them: 1½ is not 11/2, and 10⁹ is not 109."""
    text = ENTITY.sub(
        lambda match: html.entities.html5.get(f"{match[1]};", match[0]) if match[1] else html.unescape(match[0]), text
    )
    text = MICROGRAM.sub("mcg", LAYOUT.sub(" ", text))
    return re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞⁰¹²³⁴-⁹])", " ", text)


def tidy(text):
    """The resolved text with any run of whitespace (NBSP, newline, tab) as one space, stripped."""
    return " ".join(resolve(text).split())


class LabelEncoder:
    """Transcripts -> label ids that the model's head can emit: never `<unk>`, no `</s>`."""

    def __init__(self, tokenizer, vocab_size, target_text):
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.target_text = target_text
        self.opens = self.covered("(")
        self.table = {}  # code point -> what it becomes, for str.translate
        self.dropped = Counter()
        plain = "".join(filter(self.covered, string.ascii_letters + string.digits + ".,'-"))
        self.plain = re.compile(f"[ {re.escape(plain)}]*")  # most transcripts: nothing in them is folded

    def covered(self, character):
        """Whether the tokenizer has a piece that the head can emit for `character`, inside a word and on its own."""
        ids = self.tokenizer(f"{character}a{character}", add_special_tokens=False).input_ids
        return self.tokenizer.unk_token_id not in ids and max(ids) < self.vocab_size

    def fold_character(self, character):
        if self.covered(character):
            return character
        if character in FOLDS:
            return "".join(map(self.fold_character, FOLDS[character]))
        decomposed = [part for part in unicodedata.normalize("NFKD", character) if not unicodedata.combining(part)]
        if decomposed and decomposed != [character]:
            return "".join(map(self.fold_character, decomposed))
        category = unicodedata.category(character)
        return "-" if category == "Pd" else " " if category[0] in "PSZ" else ""  # a lost sign still parts words

    def fold(self, text):
        """The transcript in the characters that the tokenizer covers; what is dropped is counted in `dropped`."""
        if self.target_text != "words" and self.plain.fullmatch(text):
            return " ".join(text.split())
        text = normalize_wer(text) if self.target_text == "words" else tidy(text)
        if not self.opens:
            # MedASR has ")" without "(": a pair goes together, and "1)" keeps its own.
            while re.search(r"\([^()]*\)", text):
                text = re.sub(r"\(([^()]*)\)", r" \1 ", text)
        text = unicodedata.normalize("NFC", text)
        for character in set(text) - {" "}:
            if ord(character) not in self.table:
                self.table[ord(character)] = self.fold_character(character)
            # Zero-width, control and combining characters are no text of their own: nothing is lost with them.
            if not self.table[ord(character)].strip() and unicodedata.category(character) not in ("Cf", "Cc", "Mn"):
                self.dropped[character] += text.count(character)
        return " ".join(text.translate(self.table).split())

    def __call__(self, texts):
        """Label ids, a list of int, of each transcript."""
        all_ids = self.tokenizer(list(map(self.fold, texts)), add_special_tokens=False).input_ids
        unknown = self.tokenizer.unk_token_id
        return [[token for token in ids if token != unknown and token < self.vocab_size] for ids in all_ids]


def normalize_wer(text):
    """The text that `wer` compares: lower-case words without punctuation, apostrophes inside words kept. Entities,
    `{period}`-style tokens, NBSP, curly quotes, accents on letters and what `FOLDS` spells out (& ° µg α) are resolved
    first: MedASR has no token for them and can only write the word."""
    text = CONTROL_TOKEN.sub(" ", resolve(text)).translate(FOLD_TABLE).lower()
    decomposed = unicodedata.normalize("NFKD", text).lower().translate(FOLD_TABLE)  # of ™ come capitals
    kept = (sign for sign in decomposed if not unicodedata.combining(sign) and unicodedata.category(sign) != "Cf")
    plain = "".join(kept)
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)*", plain))


def normalize_paper(text):
    """The text that `wer_paper` compares: the AfriSpeech authors' own steps, in their order. Source: the evaluation
    code of github.com/intron-innovation/AfriSpeech-200 (Olatunji et al. 2023, arXiv 2310.00274). A lone newline glues
    two words, and punctuation counts: the published figures depend on both."""
    text = re.sub(r"\s{2,}", " ", text).strip()
    text = text.replace(">", "").replace("\t", " ").replace("\n", "")
    text = text.lower()
    punctuation = {
        " comma,": ",",
        " koma,": " ",
        " coma,": " ",
        " full stop.": ".",
        " full stop": ".",
        ",.": ".",
        ",,": ",",
    }
    for spoken, written in punctuation.items():
        text = text.replace(spoken, written)
    text = " ".join(text.split())
    return re.sub(r"[^a-zA-Z0-9\s.,\-?:'/()\[\]+%]", "", text)


def decode_ids(processor, ids):
    """Greedy CTC text of a clip's frame ids: repeats collapsed, blanks (padding) and special tokens dropped."""
    return " ".join(processor.tokenizer.decode(ids, skip_special_tokens=True).split())


# ---------------------------------------------------------------- batches

SILENCE = float(np.log(1e-5))  # LasrFeatureExtractor floors its mel energies at 1e-5, so a frame of 0.0 would be loud


def frame_count(extractor, samples):
    """Frames of log-mels of so many samples, without centring."""
    return 1 + (samples - extractor.win_length) // extractor.hop_length


def logit_lengths(model, extractor, samples):
    """Lengths of the logits of clips of so many samples, an array of ints."""
    frames = torch.from_numpy(np.atleast_1d(frame_count(extractor, np.asarray(samples))))
    return model._get_subsampling_output_length(frames).numpy()


def shortest_clip(model, extractor):
    """The fewest samples that the model can be run on, to a hop; 2,320 (0.145 s) for MedASR."""
    candidates = itertools.count(extractor.win_length, extractor.hop_length)
    return next(samples for samples in candidates if logit_lengths(model, extractor, samples)[0] >= 1)


class ClipCheck:
    """Says why the clips of a table cannot be used, "" for one that can: check(table). Dev and test clips are never
    left out for their length: short ones are padded, long ones scored in windows. It holds no model, because streaming
    hands it to worker processes."""

    def __init__(self, model, extractor, encoder, max_train_seconds):
        self.encoder, self.max_train_seconds, self.hop = encoder, max_train_seconds, extractor.hop_length
        self.shortest = shortest_clip(model, extractor)
        longest = round(min(max_train_seconds * SAMPLE_RATE, CLIP_BYTES_LIMIT / 4))
        self.logits = logit_lengths(model, extractor, np.arange(self.shortest, longest + 1, self.hop)).tolist()

    def __call__(self, table):
        reasons, limit = table["problem"].tolist(), self.max_train_seconds * SAMPLE_RATE
        for index, (split, text, samples) in enumerate(zip(table["split"], table["text"], table["num_samples"])):
            seconds, is_train = samples / SAMPLE_RATE, split == "train"
            if reasons[index]:
                continue
            if not (text[:1].isalnum() or tidy(text)):
                reasons[index] = "empty text"
            elif is_train and samples < self.shortest:
                reasons[index] = f"too short: {seconds:.2f} s, the model needs {self.shortest / SAMPLE_RATE:.3f} s"
            elif is_train and samples > limit:
                reasons[index] = f"over --max_train_seconds: {seconds:.1f} s"
            elif is_train:
                folded, room = self.encoder.fold(text), self.logits[(samples - self.shortest) // self.hop]
                # CTC puts a blank between two equal labels. Labels are made where there may be too many: each is of one
                # character at least, the space before a word included.
                if not folded.isascii() or not 0 < len(folded) < room - len(re.findall(r"(.)(?=\1)", folded)):
                    labels = self.encoder([folded])[0]
                    needed = len(labels) + sum(left == right for left, right in zip(labels, labels[1:]))
                    reason = "" if labels else "no text left that the tokenizer covers"
                    reasons[index] = (
                        f"more labels than frames: {needed} labels, {room} logits" * (needed > room) or reason
                    )
        return reasons


# SpecAugment (Park et al. 2019, arXiv 1904.08779), moderate: of 128 mel bins up to 2 x 20 are masked, of the time one
# stretch of up to 0.3 s (less than most words) in every 2.5 s.
FREQUENCY_MASKS, FREQUENCY_MASK_BINS = 2, 20
TIME_MASK_EVERY_FRAMES, TIME_MASK_FRAMES = 250, 30


def draw_masks(frames, bins, seed):
    """The [start, stop) of SpecAugment's masks of a clip: (those of its frames, those of its mel bins). The seed alone
    decides them, whichever process makes the batch: a resumed run draws the same ones."""
    generator = np.random.default_rng(seed)
    wanted = [(FREQUENCY_MASK_BINS, bins)] * FREQUENCY_MASKS
    wanted += [(min(TIME_MASK_FRAMES, frames // 5), frames)] * -(-frames // TIME_MASK_EVERY_FRAMES)
    spans = []
    for longest, size in wanted:
        width = generator.integers(min(longest, size) + 1)
        start = generator.integers(size - width + 1)
        spans.append((start, start + width))
    return spans[FREQUENCY_MASKS:], spans[:FREQUENCY_MASKS]


MEL_BANDS = 8  # each filter spans a few of the spectrum's bins: bands of filters leave most zeros out of the product


@functools.cache
def mel_constants(extractor, device):
    """The window (win_length,), float32, of a LasrFeatureExtractor and its mel filters, on `device`. The filters come
    in bands: (slice of the spectrum that a band spans, with real and imaginary parts side by side; weights (that many,
    bins))."""
    # On a GPU in float64, because TF32, where a user has it on, would keep three digits.
    exact = torch.float64 if torch.device(device).type == "cuda" else torch.float32
    window = torch.hann_window(extractor.win_length, periodic=False, dtype=torch.float64)
    filters, bands = extractor.mel_filters.float().repeat_interleave(2, 0), []
    for band in filters.tensor_split(MEL_BANDS, 1):
        spanned = band.any(1).nonzero()
        span = slice(int(spanned.min()), int(spanned.max()) + 1) if len(spanned) else slice(0, 0)
        bands.append((span, band[span].contiguous().to(device, exact)))
    return window.float().to(device), bands


def log_mels(waveforms, lengths, extractor):
    """(log-mels (clips, frames, bins), mask (clips, frames)) of padded waveforms (clips, samples), on their device.
    LasrFeatureExtractor's computation with its own window, filters and floor, in float32 instead of float64, which
    differs by less than 1e-3."""
    window, bands = mel_constants(extractor, waveforms.device)
    features = []
    # On a CPU clip by clip, whose frames fit into the cache.
    for part in waveforms.split(len(waveforms) if waveforms.is_cuda else 1):
        frames = part.unfold(-1, extractor.win_length, extractor.hop_length) * window
        # Real and imaginary parts side by side: the filters sum their squares.
        squares = torch.view_as_real(torch.fft.rfft(frames, n=extractor.n_fft)).flatten(-2).square_()
        mels = [squares[..., span].to(band.dtype) @ band for span, band in bands]
        features.append(torch.cat(mels, -1).float().clamp_(min=1e-5).log_())
    features = torch.cat(features)
    ends = torch.arange(features.shape[1], device=features.device) * extractor.hop_length + extractor.win_length
    return features, ends <= lengths[:, None]


def model_inputs(batch, extractor, device):
    """What the model's forward takes, on `device`, of a batch of CTCCollator: the log-mels are computed there."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    inputs = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}

    def inside(spans, size):
        position = torch.arange(size, device=spans.device)
        return ((spans[..., :1] <= position) & (position < spans[..., 1:])).any(1)

    with torch.no_grad():
        features, real = log_mels(inputs.pop("waveforms"), inputs.pop("num_samples"), extractor)
        if "stretches" in inputs:
            masked = inside(inputs.pop("stretches"), features.shape[1])[:, :, None]
            masked = masked | inside(inputs.pop("bands"), features.shape[2])[:, None]
            features.masked_fill_(masked & real[..., None], SILENCE)
    return {**inputs, "input_features": features, "attention_mask": real}


@dataclass
class CTCCollator:
    """Rows of a prepared split -> a padded batch for `model_inputs`, in the worker processes of the DataLoader.
    waveforms (clips, samples) float32 and num_samples (clips,); with an `encoder` labels (clips, longest) padded with
    -100; with `augment` the spans to mask, stretches and bands (clips, spans, 2). For prepared clips `clips`, their
    names, and `counts`, samples without and with padding; for windows `problems`."""

    extractor: object
    encoder: LabelEncoder | None = None
    augment: bool = False
    shortest: int = 0
    seed: int = 0
    epoch: int = 0

    def __call__(self, rows):
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        waveforms = [row["samples"] if "samples" in row else decode_audio(row["audio"]) for row in rows]
        lacking = [max(0, self.shortest - len(samples)) for samples in waveforms]  # padding by none copies all the same
        waveforms = [np.pad(samples, (0, count)) if count else samples for samples, count in zip(waveforms, lacking)]
        lengths = [len(samples) for samples in waveforms]
        # Waveforms are padded, not features, so that padded frames come out as silence.
        batch = {"waveforms": pad(list(map(torch.from_numpy, waveforms))), "num_samples": torch.tensor(lengths)}
        if self.encoder:
            labels = [torch.tensor(ids).long() for ids in self.encoder([row["text"] for row in rows])]
            batch["labels"] = pad(labels, padding_value=-100)
        if self.augment:
            masks = []
            for row, length in zip(rows, lengths):
                seed = self.seed, self.epoch, zlib.crc32(row["clip"].encode())
                masks.append(draw_masks(frame_count(self.extractor, length), self.extractor.feature_size, seed))
            batch["stretches"], batch["bands"] = (pad(list(map(torch.tensor, spans))) for spans in zip(*masks))
        if "clip" in rows[0]:
            batch["clips"] = [row["clip"] for row in rows]
            batch["counts"] = (sum(lengths), len(lengths) * max(lengths))
        if "problem" in rows[0]:
            batch["problems"] = [row["problem"] for row in rows]
        return batch


# ---------------------------------------------------------------- decoding


class Emissions(NamedTuple):
    """What a model says of a clip or window: the most probable `ids` of each of its frames and their natural
    `log_probs`, both (frames, how many were asked for), the most probable first."""

    ids: np.ndarray
    log_probs: np.ndarray


class Span(NamedTuple):
    """A clip, or a window of a long one: samples `start` to `stop`, of whose logits `first` to `last` are kept."""

    row: int
    start: int
    stop: int
    first: int
    last: int
    is_whole: bool


@dataclass
class Windows:
    """The spans of clips, decoded when asked for; `problem` is why one cannot be."""

    clips: object
    spans: list[Span]
    row, clip = None, None  # at hand for the next window of it

    def __getitem__(self, index):
        span, problem = self.spans[index], ""
        if span.row != self.row:
            self.row, self.clip = span.row, self.clips[span.row]
        try:
            samples = decode_audio(self.clip["audio"], span.start, span.stop)
        except ValueError as error:
            samples, problem = np.zeros(0, np.float32), str(error)
        return {"samples": samples, "text": self.clip.get("text", ""), "problem": problem}


EVAL_SECONDS = (160, 3_600)  # of audio in a scoring batch without a GPU, and at the most


class Decoder:
    """One way from audio to text: for dev, test and further test sets and for files, in all processes together. `lm` is
    the LanguageModel that `texts` decodes with, or None."""

    def __init__(self, model, processor, settings, lm=None):
        self.model, self.processor, self.settings, self.lm = model, processor, settings, lm
        self.extractor, self.in_bfloat16 = processor.feature_extractor, False
        self.is_silent = not settings.is_first or settings.disable_tqdm
        self.shortest = shortest_clip(model, self.extractor)
        self.step = model.config.inputs_to_logits_ratio * self.extractor.hop_length  # samples a logit

    def spans(self, lengths):
        """The `Span`s of clips of so many samples, the longest first: what does not fit in memory shows at once. Clips
        over --window_seconds are in overlapping windows, whose logits are kept from the middle of the overlap."""
        overlap = round(WINDOW_OVERLAP_SECONDS * SAMPLE_RATE / self.step)  # in logits, as the next
        window = round(self.settings.window_seconds * SAMPLE_RATE / self.step)
        spans = []
        for row, length in enumerate(lengths):
            start = 0
            while True:
                stop, first = min(start + window * self.step, length), overlap if start else 0
                last = window - overlap
                if stop == length:  # what comes after a clip's own logits is padding, where `forward` leaves garbage
                    last = int(logit_lengths(self.model, self.extractor, max(stop - start, self.shortest))[0])
                spans.append(Span(row, start, stop, first, last, length <= window * self.step))
                if stop == length:
                    break
                start += (window - 2 * overlap) * self.step
        return sorted(spans, key=lambda span: (span.is_whole, span.start - span.stop, span.row, span.start))

    def batches(self, spans):
        """Indices of `spans` in batches, of windows or of whole clips: --per_device_eval_batch_size of them, or, if
        that is auto, as many as fit with their padding; on a GPU into half of its free memory, as measured."""
        settings, budget = self.settings, EVAL_SECONDS[0] * SAMPLE_RATE
        if settings.auto_eval_batch and settings.device.type == "cuda":
            rows = [{"samples": np.zeros(round(settings.window_seconds * SAMPLE_RATE), np.float32)}] * 4
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.run(CTCCollator(self.extractor)(rows))
            a_second = (torch.cuda.max_memory_allocated() - before) / (len(rows) * settings.window_seconds)
            seconds = torch.cuda.mem_get_info()[0] / 2 / max(a_second, 1)
            budget = agreed(min(seconds, EVAL_SECONDS[1]) * SAMPLE_RATE, settings)
        batches, start = [], 0
        while start < len(spans):
            longest = spans[start]  # of its batch, because `spans` are sorted
            fitting = max(1, budget // max(1, longest.stop - longest.start))
            stop = start + (fitting if settings.auto_eval_batch else settings.per_device_eval_batch_size)
            alike = [span for span in spans[start:stop] if span.is_whole == longest.is_whole]
            batches.append(list(range(start, start + len(alike))))
            start += len(alike)
        return batches

    def emissions(self, clips, encoder=None, doing="scoring"):
        """(the `Emissions` of each clip of a `Clips`, {clip's place: why it cannot be read}, the mean CTC loss). Of
        each frame the most probable id is kept, or as many as a search with `lm` needs. With an `encoder` of the clips'
        labels there is a loss, of those that need no windows; otherwise it is 0."""
        settings, self.model = self.settings, self.model.to(self.settings.device).eval()
        lengths = clips.table["num_samples"].tolist()
        spans = self.spans(lengths)
        mine = self.batches(spans)[settings.process_index :: settings.world_size]
        loader = torch.utils.data.DataLoader(
            Windows(clips.audio, spans),
            batch_sampler=mine,
            collate_fn=CTCCollator(self.extractor, encoder, shortest=self.shortest),
            num_workers=min(settings.dataloader_num_workers, len(mine)),
            pin_memory=settings.device.type == "cuda",
            # Its own: a DataLoader draws a seed, and scoring must not move what training draws next.
            generator=torch.Generator(),
        )
        pieces, loss, counted = [], 0.0, 0
        bar = tqdm.tqdm(total=sum(map(len, mine)), desc=doing, unit="clip", disable=self.is_silent)
        with bar, STOP_SIGNALS.deferring():
            for indices, batch in zip(mine, loader):
                if STOP_SIGNALS.number:
                    break
                problems, is_whole = batch.pop("problems"), spans[indices[0]].is_whole
                if not is_whole:
                    batch.pop("labels", None)
                emitted, batch_loss = self.run(batch)
                loss, counted = loss + batch_loss, counted + len(indices) * is_whole
                for span, problem, found in zip([spans[index] for index in indices], problems, emitted):
                    kept = Emissions(*(values[span.first : span.last] for values in found))
                    pieces.append((span.row, span.start, problem, kept))
                bar.update(len(indices))
            pieces, losses, counts = zip(*accelerate.utils.gather_object([(pieces, loss, counted)]))
            if stopped := agreed(STOP_SIGNALS.number, settings, "MAX"):
                raise Stopped(stopped)
        joined, problems = [[] for _ in lengths], {}
        for row, _, problem, found in sorted(itertools.chain(*pieces), key=lambda piece: piece[:2]):
            joined[row].append(found)
            if problem:
                problems[row] = problem
        joined = [Emissions(*map(np.concatenate, zip(*parts))) for parts in joined]
        return joined, problems, sum(losses) / max(1, sum(counts))

    def run(self, batch):
        """(the `Emissions` of each clip, the sum of their losses) of a batch, halved where it fills the memory."""
        size = len(batch["waveforms"])
        try:
            with torch.inference_mode():
                inputs = model_inputs(batch, self.extractor, self.settings.device)
                with torch.autocast(self.settings.device.type, torch.bfloat16, enabled=self.in_bfloat16):
                    output = self.model(**inputs)
            count = min(LM_CANDIDATES if self.lm else 1, output.logits.shape[-1])
            best = output.logits.float().log_softmax(-1).topk(count)
            ids, log_probs = best.indices.int().cpu().numpy(), best.values.cpu().numpy()
            return list(map(Emissions, ids, log_probs)), float(output.loss) * size if "labels" in batch else 0.0
        except torch.OutOfMemoryError as error:
            if size == 1:
                advice = "try a lower --window_seconds, or --use_cpu true"
                raise RunError(f"the GPU's memory is full with a single clip to transcribe: {advice}") from error
        torch.cuda.empty_cache()
        first, first_loss = self.run({name: value[: size // 2] for name, value in batch.items()})
        second, second_loss = self.run({name: value[size // 2 :] for name, value in batch.items()})
        return first + second, first_loss + second_loss

    def path(self, emissions):
        """The id of each frame of a clip, blanks and repeats included: the most probable, or with `lm` the search's."""
        return beam_search(emissions, self.lm)[0] if self.lm else emissions.ids[:, 0].tolist()

    def greedy(self, emissions):
        """The greedy text of each clip."""
        return [decode_ids(self.processor, found.ids[:, 0].tolist()) for found in emissions]

    def texts(self, emissions):
        """The text of each clip with `lm`, of which each process searches its share: it takes longer than the model."""
        mine = range(self.settings.process_index, len(emissions), self.settings.world_size)
        bar = tqdm.tqdm(mine, desc="language model", unit="clip", disable=self.is_silent)
        texts = [(index, decode_ids(self.processor, self.path(emissions[index]))) for index in bar]
        return [text for _, text in sorted(accelerate.utils.gather_object(texts))]


# ---------------------------------------------------------------- language model

LM_CANDIDATES = 16  # the most probable ids of a frame, which the search chooses from
KENLM_MAGIC = b"mmap lm http://kheafield.com/code"
# What stands for "▁" in an n-gram's file: itself, or what pyctcdecode's users have to write (MedASR's lm_6.kenlm).
LM_WORD_MARKS = "▁#"
LM_NONSENSE = "no/such/piece"
LM_WORDS = ["the", "and", "with", "that", "from", "this", "THE", "AND", "WITH", "THAT", "FROM", "THIS"]


@dataclass(eq=False, slots=True)
class Prefix:
    """A text so far: the language model's `state` after it, what its last token `added` to the score, and {token:
    `longer` text} of those that were tried."""

    state: object
    added: float = 0.0
    longer: dict = field(default_factory=dict)


@dataclass
class LanguageModel:
    """A KenLM n-gram of tokens. Each token adds weight x its natural log-probability + word_score to a text's score.
    `words` are the numbers of the ids' names in the n-gram; `counts_as` (ids,) each id itself, or the blank where it is
    a special token, which no text shows."""

    name: str
    kenlm: object
    words: list[int]
    counts_as: np.ndarray
    blank: int
    weight: float
    word_score: float
    beam: int
    # pyctcdecode's defaults: less probable ids of a frame are left out, hypotheses so far behind the best one too.
    min_log_prob: float = -5.0
    max_behind: float = 10.0

    @property
    def settings(self):
        return {name: getattr(self, name) for name in ("name", "weight", "word_score", "beam")}

    def extend(self, prefix, token):
        if token not in prefix.longer:
            state, log10 = self.kenlm.score(prefix.state, self.words[token])
            prefix.longer[token] = Prefix(state, self.weight * log10 * math.log(10) + self.word_score)
        return prefix.longer[token]


def beam_search(emissions, lm):
    """(the id of each frame, the score) of the best text: the log of its alignments' summed probability + lm's part. A
    prefix beam search (Graves & Jaitly 2014) in Python: flashlight's decoder knows no score for a token and asks a
    language model that adds one for every id of every frame, which took ten times as long."""

    def add(hypotheses, key, score, path):
        # Sums the probabilities of two alignments of one text, and keeps the path of the more probable one.
        if known := hypotheses.get(key):
            (high, path), (low, _) = (known, (score, path)) if known[0] >= score else ((score, path), known)
            score = high + math.log1p(math.exp(low - high))
        hypotheses[key] = score, path

    ids, log_probs = lm.counts_as[emissions.ids].tolist(), emissions.log_probs.tolist()
    counts = np.maximum(1, (emissions.log_probs >= lm.min_log_prob).sum(axis=1)).tolist()
    # (text, id of the last frame) -> (score, the ids so far as nested pairs); the last id tells repeats from doubles.
    hypotheses = {(Prefix(lm.kenlm.start(False)), lm.blank): (0.0, ())}
    for frame_ids, frame_log_probs, count in zip(ids, log_probs, counts):
        grown = {}
        for (prefix, last), (score, path) in hypotheses.items():
            for token, log_prob in zip(frame_ids[:count], frame_log_probs):
                if token == lm.blank or token == last:
                    add(grown, (prefix, token), score + log_prob, (path, token))
                else:
                    longer = lm.extend(prefix, token)
                    add(grown, (longer, token), score + log_prob + longer.added, (path, token))
        best = sorted(grown.items(), key=lambda item: -item[1][0])[: lm.beam]
        hypotheses = {key: item for key, item in best if item[0] >= best[0][1][0] - lm.max_behind}
    ended = {}
    for (prefix, _), (score, path) in hypotheses.items():
        add(ended, prefix, score + lm.weight * lm.kenlm.finish(prefix.state)[1] * math.log(10), path)
    score, path = max(ended.values(), key=lambda item: item[0])
    frames = []
    while path:
        path, token = path
        frames.append(token)
    return frames[::-1], score


def lm_path(settings):
    """The file that --lm means, fetched if need be; raises RunError if it is none that KenLM reads."""
    folder, path = Path(settings.model).expanduser(), settings.lm
    if path == "auto" and (folder / LM_FILE).is_file():
        path = str(folder / LM_FILE)
    elif path == "auto":
        # A fine-tuned model's folder has none: MedASR's serves it too.
        repo, revision = (DEFAULT_MODEL, None) if folder.is_dir() else (settings.model, settings.model_revision)
        try:
            with explained_hub_errors(repo, "model"):
                path = hub.hf_hub_download(repo, LM_FILE, revision=revision)
        except RunError as error:
            raise RunError(f"--lm auto looks for {LM_FILE} of {repo}; give --lm a file, or: {error}") from error
    with explained(f"--lm {path} cannot be read", (OSError, EOFError, zlib.error)):
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(path, "rb") as file:
            head = file.read(1 << 16).lstrip()
    if not (head.startswith(KENLM_MAGIC) or re.search(rb"^\\data\\\s*$", head, re.MULTILINE)):
        raise RunError(f"--lm {path} is no language model: neither ARPA (\\data\\) nor KenLM's binary format")
    return path


def load_lm(settings, processor, vocab_size):
    """The `LanguageModel` of --lm for the model's tokens, None without the flag; raises RunError."""
    if not settings.lm:
        return None
    path, tokenizer = lm_path(settings), processor.tokenizer
    blank, special = tokenizer.pad_token_id, {None, *tokenizer.all_special_tokens}
    pieces = dict(enumerate(tokenizer.convert_ids_to_tokens(range(vocab_size))))
    pieces = {id: piece for id, piece in pieces.items() if piece not in special and id != blank}
    spellings = [{id: piece.replace("▁", mark) for id, piece in pieces.items()} for mark in LM_WORD_MARKS]
    words = list(dict.fromkeys([LM_NONSENSE, *LM_WORDS, *itertools.chain(*(names.values() for names in spellings))]))
    numbers = {word: number for number, word in enumerate(words)}
    try:
        dictionary = importlib.import_module("flashlight.lib.text.dictionary").Dictionary(words)
        kenlm = importlib.import_module("flashlight.lib.text.decoder.kenlm").KenLM(str(path), dictionary)
    except (RuntimeError, ValueError, MemoryError, ImportError) as error:
        raise RunError(f"--lm {path} cannot be loaded ({one_line(error)})") from error

    # A word that the n-gram knows has another probability than nonsense.
    start = kenlm.start(False)
    unknown = kenlm.score(start, numbers[LM_NONSENSE])[1]
    known = {word for word, number in numbers.items() if kenlm.score(start, number)[1] != unknown}
    spelling = max(spellings, key=lambda names: len(known & set(names.values())))
    found = len(known & set(spelling.values()))
    share = f"{found:,} of the model's {len(spelling):,} tokens"
    whole = [word for word in LM_WORDS if word in known - set(spelling.values())]
    if whole or found < len(spelling) / 2:
        problem = f"whole words, such as '{whole[0]}'" if whole else share
        raise RunError(f"--lm {path} knows {problem}: it must be an n-gram of the tokens of this model")
    if found < 0.9 * len(spelling):
        warn(f"--lm {path} knows only {share}")
    words = [numbers[spelling.get(id, LM_NONSENSE)] for id in range(vocab_size)]
    counts_as = np.array([id if id in pieces else blank for id in range(vocab_size)])
    weights = settings.lm_weight, settings.lm_word_score, settings.lm_beam
    return LanguageModel(Path(path).name, kenlm, words, counts_as, blank, *weights)


TUNING_CLIPS = 500  # of dev at the most: the search is run some thirty times
TUNING_GRID = list(itertools.product((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), (0.0, 0.5, 1.0, 1.5, 2.0)))


def tune_lm(decoder, dev):
    """Give the decoder's `lm` the weight and word score of the lowest WER on `dev` clips; returns a dict of what was
    tried: the smaller values among equals."""
    chosen = range(0, len(dev), math.ceil(len(dev) / TUNING_CLIPS))
    clips = Clips(dev.audio.select(chosen), dev.table.iloc[list(chosen)])
    say(f"choosing --lm_weight and --lm_word_score on {plural(len(clips), 'dev clip')}")
    emissions, tried = decoder.emissions(clips)[0], {}
    wer = functools.partial(corpus_rate, clips.table["text"])
    for weight, word_score in TUNING_GRID:
        decoder.lm = dataclasses.replace(decoder.lm, weight=weight, word_score=word_score)
        tried[weight, word_score] = wer(decoder.texts(emissions))
    weight, word_score = min(tried, key=lambda pair: (tried[pair], *pair))
    decoder.lm = dataclasses.replace(decoder.lm, weight=weight, word_score=word_score)
    record = {"clips": len(clips), "wer": tried[weight, word_score], "wer_greedy": wer(decoder.greedy(emissions))}
    scores = f"dev WER {percent(record['wer'])}, greedy {percent(record['wer_greedy'])}"
    say(f"  --lm_weight {weight:g} --lm_word_score {word_score:g}: {scores}")
    return {**decoder.lm.settings, **record, "tried": [[*pair, found] for pair, found in tried.items()]}


# ---------------------------------------------------------------- transcribing


class Word(NamedTuple):
    """A word of a transcript, `start` and `end` in seconds; `probability` is the mean of those of its frames."""

    text: str
    start: float
    end: float
    probability: float


def clip_words(decoder, emissions):
    """The `Word`s of a clip, whose texts, joined by spaces, are its text."""
    tokenizer, path = decoder.processor.tokenizer, decoder.path(emissions)
    # The first frame of the logits sees the shortest clip; in the middle of what it sees lies what it stands for.
    # 0.0525 s and 0.04 s a frame for MedASR.
    first, step = (decoder.shortest - decoder.step) / 2 / SAMPLE_RATE, decoder.step / SAMPLE_RATE
    special, frames_of_words, before = set(tokenizer.all_special_ids), [[]], None
    for frame, (token, piece) in enumerate(zip(path, tokenizer.convert_ids_to_tokens(path))):
        if piece.startswith("▁") and token not in (before, *special):
            frames_of_words.append([])
        if token not in special:
            frames_of_words[-1].append(frame)
        before = token
    found = np.where(emissions.ids == np.reshape(path, (-1, 1)), emissions.log_probs, -np.inf)
    probabilities, words = np.exp(found.max(axis=1, initial=-np.inf)), []
    for frames in filter(None, frames_of_words):
        start, stop = frames[0], frames[-1] + 1
        if text := decode_ids(decoder.processor, path[start:stop]):
            words.append(Word(text, first + start * step, first + stop * step, float(probabilities[frames].mean())))
    return words


# What MedASR writes for dictated punctuation and layout, and what it stands for.
DICTATED = {
    "period": ".", "full stop": ".", "comma": ",", "colon": ":", "semicolon": ";", "question mark": "?",
    "exclamation mark": "!", "exclamation point": "!", "new line": "\n", "next line": "\n", "new paragraph": "\n\n",
    "next paragraph": "\n\n", "hyphen": "-", "slash": "/", "open parenthesis": "(", "close parenthesis": ")",
}  # fmt: skip
# One of these, however often in a row, with the whitespace around it.
DICTATED_TOKEN = re.compile(r"\s*\{(" + "|".join(DICTATED) + r")\}(?:\s*\{\1\})*\s*")


def format_dictation(text):
    """`text` with dictated punctuation and layout as what they stand for; tokens not known stay as they are."""

    def sign_of(match):
        sign = DICTATED[match[1]]
        is_there = text[: match.start()].endswith(sign)
        after = "" if sign in "-/\n\n(" else " "
        return " (" if sign == "(" else ("" if is_there and after else sign) + after

    text = re.sub(r" +(?=\n)", "", DICTATED_TOKEN.sub(sign_of, text))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


LINE_CHARACTERS, CUE_LINES, CUE_SECONDS = 42, 2, 7.0  # of subtitles, as usual in television
LINGER_SECONDS = 0.5  # that a subtitle stays after its last word's last frame, where there is room
PAUSE_SECONDS = 1.0  # between the written frames of two words, at which a sentence is taken to end


@dataclass
class Transcript:
    """The words of a recording, as the content of a file of any --transcript_format; `clean` makes a text of theirs."""

    name: str
    words: list[Word]
    clean: object = str

    def text_of(self, words):
        return self.clean(" ".join(word.text for word in words))

    def lines(self, words):
        """The lines of a subtitle, none longer than LINE_CHARACTERS but of a single word."""
        text = " ".join(self.text_of(words).split())
        return textwrap.wrap(text, LINE_CHARACTERS, break_long_words=False, break_on_hyphens=False)

    def segments(self):
        """The words in lists, each of a subtitle, parted at pauses and dictated line breaks and where it is full."""
        parts = []
        for word in self.words:
            ends = not parts or word.start - parts[-1][-1].end >= PAUSE_SECONDS
            ends = ends or word.end - parts[-1][0].start > CUE_SECONDS
            ends = ends or len(self.lines([*parts[-1], word])) > CUE_LINES
            if ends or (self.clean is not str and parts[-1][-1].text in ("line}", "paragraph}")):
                parts.append([])
            parts[-1].append(word)
        return parts

    def text(self, with_name):
        text = self.text_of(self.words)
        return f"{self.name}\t{' '.join(text.split())}\n" if with_name else text + "\n"

    def json(self, with_name):
        """Whisper's keys, in one line, and "file" before them if `with_name`."""
        content = {"file": self.name} if with_name else {}
        content |= {"text": self.text_of(self.words), "segments": [], "language": "en"}
        for number, part in enumerate(self.segments()):
            words = []
            for word in part:
                times = {"start": round(word.start, 3), "end": round(word.end, 3)}
                words.append({"word": word.text, **times, "probability": round(word.probability, 4)})
            times = {"start": words[0]["start"], "end": words[-1]["end"]}
            content["segments"].append({"id": number, **times, "text": self.text_of(part), "words": words})
        return json.dumps(content, ensure_ascii=False) + "\n"

    def cues(self, decimal_mark):
        """Yield (times, text) of each subtitle."""
        parts = self.segments()
        for part, following in itertools.zip_longest(parts, parts[1:]):
            end = min(part[-1].end + LINGER_SECONDS, following[0].start if following else np.inf)
            times = []
            for seconds in (part[0].start, end):
                minutes, thousandths = divmod(round(seconds * 1000), 60_000)
                clock = f"{minutes // 60:02}:{minutes % 60:02}:{thousandths // 1000:02}"
                times.append(f"{clock}{decimal_mark}{thousandths % 1000:03}")
            yield " --> ".join(times), "\n".join(self.lines(part))

    def srt(self, with_name):
        return "\n".join(f"{number}\n{times}\n{text}\n" for number, (times, text) in enumerate(self.cues(","), start=1))

    def vtt(self, with_name):
        return "\n".join(["WEBVTT\n", *(f"{times}\n{html.escape(text, False)}\n" for times, text in self.cues("."))])


@dataclass
class Recording:
    """A file to transcribe: the `name` that it is called by, and its place `under` --transcript_dir, without suffix."""

    name: str
    under: str
    path: str = ""  # what is read
    length: int = 0  # samples at 16 kHz
    failed: bool = False

    def give_up(self, reason):
        """Say on stderr why it cannot be read."""
        self.length, self.failed = 0, True
        say(f"{PROGRAM}: error: {self.name} cannot be read as audio: {reason}", sys.stderr)

    def open(self, spool):
        """Have its path and length; a pipe is copied into the folder `spool`, because libsndfile seeks."""
        self.path = self.name
        if self.name == "-" or stat.S_ISFIFO(os.stat(self.name).st_mode):
            self.path, given = os.path.join(spool, str(len(os.listdir(spool)))), 0 if self.name == "-" else self.name
            if given == 0 and os.isatty(0):
                raise ValueError("standard input is a terminal; pipe audio into it")
            with open(given, "rb", closefd=given != 0) as source, open(self.path, "wb") as file:
                shutil.copyfileobj(source, file, 2**20)
        self.length, missing = audio_length(self.path)
        if missing > 0:
            have = f"ends after {self.length / SAMPLE_RATE:,.1f} s, {missing:,.1f} s before what its header says"
            warn(f"{self.name} {have}")


def find_recordings(settings):
    """The `Recording`s of --transcribe, each once, in order; raises UsageError, also where two would be one file."""
    found = {}
    for path in settings.transcribe:
        matches = [path] if path == "-" or os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        # What is below the fixed part of a pattern tells files of one name apart.
        fixed = os.path.dirname(path) if os.path.isfile(path) else re.split(r"[^/\\]*[*?\[]", path)[0]
        for match in matches:
            try:
                files = sorted(map(str, filter(is_audio_name, files_below(match)))) if os.path.isdir(match) else [match]
            except OSError as error:
                raise UsageError(f"--transcribe is {path}, which cannot be read ({one_line(error)})") from error
            if not files:
                raise UsageError(f"--transcribe is {path}: no audio file is in this folder")
            for file in files:
                below = "stdin" if file == "-" else os.path.relpath(file, fixed or ".")
                found.setdefault(os.path.abspath(file) if file != "-" else file, (file, below))
        if not matches:
            raise UsageError(f"--transcribe is {path}: there is no such file or folder")
    stems, recordings, places = Counter(os.path.splitext(below)[0].casefold() for _, below in found.values()), [], {}
    for file, below in found.values():
        stem = os.path.splitext(below)[0]
        recordings.append(Recording(file, below if stems[stem.casefold()] > 1 else stem))
        other = places.setdefault(recordings[-1].under.casefold(), file)
        if settings.transcript_dir is not None and other != file:
            what = f"{other} and {file} would both be {below}'s transcript"
            raise UsageError(f"--transcript_dir: {what}; give the folder that both are in, whose parts are kept apart")
    if settings.transcript_format in ("srt", "vtt") and settings.transcript_dir is None and len(recordings) > 1:
        kind = settings.transcript_format
        raise UsageError(f"--transcript_format {kind} of several files needs --transcript_dir: their times start anew")
    return recordings


PART_SECONDS = 3_600  # of audio whose texts are made together: enough to fill batches, and little to lose


def transcribe(settings):
    """Print or write the text of each file of --transcribe, name unreadable ones on stderr; returns the exit status."""
    started, recordings, part = time.monotonic(), find_recordings(settings), []
    if "-" in settings.transcribe and settings.world_size > 1:
        raise UsageError("--transcribe - cannot be read by several processes; start it without torchrun")
    processor, model = load_model(settings)
    loaded, settings.disable_tqdm = time.monotonic(), not sys.stderr.isatty()
    decoder = Decoder(model, processor, settings, load_lm(settings, processor, model.config.vocab_size))
    # In bfloat16 where that is asked for and not emulated; MedASR's activations overflow float16.
    has_bfloat16 = settings.device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    decoder.in_bfloat16 = bool(settings.bf16 or settings.fp16) and has_bfloat16
    clean = format_dictation if settings.format_dictation else str
    kind, folder = settings.transcript_format, settings.transcript_dir
    # One PATH that is a file has one text, which needs no name.
    with_names = folder is None and [recording.name for recording in recordings] != settings.transcribe[:1]
    try:
        with tempfile.TemporaryDirectory() as spool:
            for recording in recordings:
                try:
                    recording.open(spool)
                    part.append(recording)
                except (ValueError, OSError) as error:
                    if is_full_disk(error):
                        raise
                    recording.give_up(one_line(error))
                lengths = [recording.length for recording in part]
                if recording is not recordings[-1] and sum(lengths) < PART_SECONDS * SAMPLE_RATE * settings.world_size:
                    continue
                clips = Clips([{"audio": member.path} for member in part], pandas.DataFrame({"num_samples": lengths}))
                emissions, unreadable, _ = decoder.emissions(clips, doing="transcribing") if part else ([], {}, 0)
                for row, member in enumerate(part):
                    if row in unreadable:
                        member.give_up(unreadable[row])
                    elif settings.is_first:
                        made = Transcript(member.name, clip_words(decoder, emissions[row]), clean)
                        text, suffix = getattr(made, kind)(with_names), "txt" if kind == "text" else kind
                        if folder is None:
                            print(text, end="", flush=True)
                        else:
                            write_text(Path(folder).expanduser() / f"{member.under}.{suffix}", text)
                part = []
    except Stopped as error:
        error.advice = "what is finished is kept"
        raise
    except BrokenPipeError:  # `| head` has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if seconds := sum(recording.length for recording in recordings) / SAMPLE_RATE:
        took = time.monotonic() - loaded
        speed = f"{took:,.1f} s, {seconds / took:,.1f} times as fast as it was spoken"
        say(f"{seconds:,.1f} s of audio in {speed}; loading took {loaded - started:.1f} s", sys.stderr)
    return 1 if any(recording.failed for recording in recordings) else 0


# ---------------------------------------------------------------- scores

PAPER_SECONDS = 17  # the AfriSpeech authors' tables are of test clips shorter than this
BOOTSTRAP_DRAWS = 10_000
DRAWN_AT_ONCE = 2**20  # speakers: all draws of a corpus whose clips name none would take gigabytes
# A smaller group is shown, and marked, but neither ranked nor averaged: its figure says more about its few speakers.
MIN_GROUP_SPEAKERS, MIN_GROUP_WORDS = 5, 500
GROUP_KINDS = ("domain", "accent", "country", "gender", "age_group", "seen_accent", "duration")
ERROR_KINDS = ("substitutions", "deletions", "insertions")
DURATIONS = {"0-5 s": 5, "5-10 s": 10, "10-20 s": 20, "over 20 s": float("inf")}  # group -> its end, in seconds
# What readers say for punctuation and layout. Many AfriSpeech speakers voice it although the prompt has only the sign.
SPOKEN_PUNCTUATION = re.compile(
    r"\b(?:full stop|period|comma|semi ?colon|colon|question mark|exclamation mark|hyphen|dash|slash|apostrophe|"
    r"(?:open|close)(?:d)? (?:bracket|brackets|parenthesis|quote|quotes)|"
    r"next line|new line|next paragraph|new paragraph)\b"
)
NEGATIONS = re.compile(r"no|not|nor|none|never|without|negative|denie[sd]|deny|absent|cannot|\w+n't")
NUMBERS = re.compile(
    r"\w*\d\w*|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty|thirty|forty|fifty|"
    r"sixty|seventy|eighty|ninety|hundred|thousand|million|half|once|twice"
)


def keep(pattern):
    """A normaliser that keeps the words of one kind."""
    return lambda text: " ".join(filter(pattern.fullmatch, normalize_wer(text).split()))


# A rate is a normaliser, text in and words to be compared out, and its name in tables.
RATES = {
    "wer": (normalize_wer, "WER"),
    "wer_spoken": (normalize_wer, "WER, spoken punctuation set aside"),
    "wer_paper": (normalize_paper, "WER, the AfriSpeech authors' normalisation"),
    "wer_paper_short": (normalize_paper, f"the same, clips under {PAPER_SECONDS} s, as in their tables"),
    "wer_raw": (str.strip, "WER as written"),
    "wer_numbers": (keep(NUMBERS), "WER of numbers alone"),
    "wer_negations": (keep(NEGATIONS), "WER of negations alone"),
    "cer": (normalize_wer, "CER"),
}
# What is scored on one set of clips, and its name in tables: the greedy text and that with the language model, of the
# model before and after.
SYSTEMS = dict(baseline="before", finetuned="fine-tuned", baseline_lm="before, LM", finetuned_lm="fine-tuned, LM")


def align(rate, references, hypotheses):
    """jiwer's alignment of texts as normalised for a rate: of characters for "cer", otherwise of words."""
    normalize, process = RATES[rate][0], jiwer.process_characters if rate == "cer" else jiwer.process_words
    references, hypotheses = list(map(normalize, references)), list(map(normalize, hypotheses))
    for index, reference in enumerate(references if rate == "wer_spoken" else ()):
        # Spoken punctuation that the reference has not got is no error.
        written = set(SPOKEN_PUNCTUATION.findall(reference))
        words = SPOKEN_PUNCTUATION.sub(lambda match, kept=written: match[0] * (match[0] in kept), hypotheses[index])
        hypotheses[index] = " ".join(words.split())
    return process(references, hypotheses)


def count_errors(rate, references, hypotheses):
    """An int array (clips, 4) of a rate: substitutions, deletions, insertions, length of the reference."""
    output, kinds = align(rate, references, hypotheses), ("substitute", "delete", "insert")
    counts = np.zeros((len(output.references), 4), np.int64)
    for index, chunks in enumerate(output.alignments):
        counts[index, 3] = len(output.references[index])
        for chunk in [chunk for chunk in chunks if chunk.type != "equal"]:
            longer = max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
            counts[index, kinds.index(chunk.type)] += longer
    return counts


def corpus_rate(references, hypotheses):
    """The WER of all texts together; None without a single reference word."""
    counts = count_errors("wer", references, hypotheses).sum(axis=0)
    return float(counts[:3].sum() / counts[3]) if counts[3] else None


@dataclass
class Scores:
    """The `texts` {system: hypotheses} of one test set and how they differ from its references; systems as in SYSTEMS.
    `table` has a row a clip: its groups, and for each system and rate two columns, "<system>/<rate>", its errors, and
    "<system>/<rate>/of", the reference's length. Every figure is a sum of its columns over some of its rows."""

    table: object
    texts: dict[str, list[str]]

    @classmethod
    def of(cls, table, texts, train_accents=None):
        """The scores of `texts` against the transcripts of a table of clips; `train_accents` are those in training."""
        table = table.reset_index(drop=True)
        seconds = table["num_samples"].astype(float) / SAMPLE_RATE
        is_seen = table["accent"].isin(train_accents or ()).map({True: "seen", False: "unseen"})
        table["seen_accent"] = is_seen.where((table["accent"] != "") & (train_accents is not None), "")
        places = np.searchsorted(list(DURATIONS.values()), seconds, side="right")
        table["duration"] = [[*DURATIONS, ""][place] for place in places]  # NaN comes last
        table["speaker_or_clip"] = table["speaker"].where(table["speaker"] != "", table["clip"])
        table[list(GROUP_KINDS)] = table[list(GROUP_KINDS)].replace("", "unknown")
        is_short, columns = (seconds < PAPER_SECONDS).to_numpy()[:, None], {}
        for system, rate in itertools.product(texts, RATES):
            counts = count_errors(rate, table["text"], texts[system]) * (is_short if rate == "wer_paper_short" else 1)
            columns[f"{system}/{rate}"], columns[f"{system}/{rate}/of"] = counts[:, :3].sum(axis=1), counts[:, 3]
            if rate == "wer":
                columns |= {f"{system}/{kind}": counts[:, place] for place, kind in enumerate(ERROR_KINDS)}
        return cls(pandas.concat([table, pandas.DataFrame(columns)], axis=1), texts)

    @property
    def last(self):
        """The system that the report is of: the fine-tuned model's greedy text, else the baseline's."""
        return "finetuned" if "finetuned" in self.texts else "baseline"

    def metrics(self):
        """metrics.json's part of a test set: {system, or "delta": rates of all clips, and "groups": of each group}."""
        everything = self.metrics_of(self.table)
        for kind, (name, part) in [(one, group) for one in GROUP_KINDS for group in self.table.groupby(one)]:
            for key, figures in self.metrics_of(part).items():
                if figures:
                    everything[key].setdefault("groups", {}).setdefault(kind, {})[name] = figures
        return everything

    def metrics_of(self, part):
        """{system: rates on some rows of the table, and their sizes; "delta": the fine-tuned's minus the baseline's}.
        Intervals are of 10,000 resamplings of whole speakers, because their clips are not independent (Bisani & Ney
        2004, doi 10.1109/ICASSP.2004.1326009; blocks: arXiv 1912.09508); systems get the same ones, which pairs
        them."""
        columns = [*(f"{system}/wer" for system in self.texts), f"{self.last}/wer/of"]
        *errors, words = part.groupby("speaker_or_clip")[columns].sum().to_numpy(float).T
        generator, drawn, at_once = np.random.default_rng(0), [], max(1, DRAWN_AT_ONCE // len(words))
        for done in range(0, BOOTSTRAP_DRAWS, at_once):
            size = min(at_once, BOOTSTRAP_DRAWS - done), len(words)
            chosen = generator.integers(len(words), size=size, dtype=np.int32)
            total = np.maximum(words[chosen].sum(axis=1), 1)
            drawn.append([counts[chosen].sum(axis=1) / total for counts in errors])
        drawn, sums, found = dict(zip(self.texts, np.concatenate(drawn, axis=1))), part.sum(numeric_only=True), {}
        sizes = {"clips": len(part), "speakers": len(words), "words": int(words.sum())}
        is_small = sizes["speakers"] < MIN_GROUP_SPEAKERS or sizes["words"] < MIN_GROUP_WORDS
        for ending in ("", "_lm") if f"{self.last}_lm" in self.texts else ("",):
            baseline, finetuned = f"baseline{ending}", f"finetuned{ending}"
            found |= dict.fromkeys((baseline, finetuned, f"delta{ending}"))
            for system in {baseline, finetuned} & set(self.texts):
                lengths = {rate: sums[f"{system}/{rate}/of"] for rate in RATES}
                rates = {rate: float(sums[f"{system}/{rate}"] / of) if of else None for rate, of in lengths.items()}
                counts = {kind: int(sums[f"{system}/{kind}"]) for kind in ERROR_KINDS}
                ends = np.percentile(drawn[system], (2.5, 97.5)).tolist()
                found[system] = {**rates, **sizes, "wer_ci95": ends, **counts, "small": is_small}
            if {baseline, finetuned} <= set(self.texts):
                before, after = found[baseline], found[finetuned]
                errors = (part[f"{finetuned}/wer"] - part[f"{baseline}/wer"]).to_numpy()
                change = drawn[finetuned] - drawn[baseline]
                delta = {rate: after[rate] - before[rate] for rate in RATES if after[rate] is not None}
                delta |= {"wer_ci95": np.percentile(change, (2.5, 97.5)).tolist()}
                shares = {"probability_of_improvement": change < 0, "clips_better": errors < 0}
                shares |= {"clips_equal": errors == 0, "clips_worse": errors > 0}
                found[f"delta{ending}"] = delta | {name: float(share.mean()) for name, share in shares.items()}
        return found

    def predictions(self):
        """Yield a JSON line a clip, in the keys that NeMo's Speech Data Explorer reads, and ours."""
        table, before = self.table, "baseline" if self.last == "finetuned" else ""
        seconds, nothing = [round(count / SAMPLE_RATE, 3) for count in table["num_samples"]], [None] * len(table)
        entries = {"audio_filepath": table["clip"], "duration": seconds, "text": table["text"]}
        for ending in ("", "_lm") if f"{self.last}_lm" in self.texts else ("",):
            entries[f"pred_text{ending}"] = self.texts[f"{self.last}{ending}"]
            entries[f"baseline_text{ending}"] = self.texts.get(f"{before}{ending}", nothing)
        entries |= {name: table[name].replace("unknown", "") for name in GROUP_COLUMNS}
        entries["wer"] = table[f"{self.last}/wer"] / table[f"{self.last}/wer/of"].replace(0, np.nan)
        for entry in pandas.DataFrame(entries).to_dict("records"):
            known = {name: None if value != value else value for name, value in entry.items()}
            yield json.dumps(known, ensure_ascii=False) + "\n"


@functools.cache
def error_rates_metric():
    """jiwer's corpus-level WER and CER as an `evaluate` metric; evaluate.load("wer") would download its script."""

    class ErrorRates(evaluate.Metric):
        def _info(self):
            texts = datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("string")))
            return evaluate.MetricInfo("corpus-level WER and CER", citation="", features=texts)

        def _compute(self, predictions, references):
            return {"wer": jiwer.wer(references, predictions), "cer": jiwer.cer(references, predictions)}

    return ErrorRates(experiment_id=f"medasr-{os.getpid()}", keep_in_memory=True)


# ---------------------------------------------------------------- report


def percent(value):
    return "-" if value is None else f"{100 * value:.1f} %"


def points(delta):
    """A difference of rates in percentage points with its interval."""
    low, high = delta["wer_ci95"]
    return f"{100 * delta['wer']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def markdown_text(text):
    """Text of a corpus or a user as Markdown that shows it as it is: no markup, HTML or link in it comes alive."""
    return re.sub(r"([\\`*_\[\]|!~$])", r"\\\1", html.escape(" ".join(redact(str(text)).split()), quote=False))


def markdown_table(header, rows):
    """Lines of a Markdown table, padded so that it reads well in a terminal too."""
    rows = [header, *(list(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows] + [""]


def last_of(metrics, ending=""):
    """The fine-tuned model's scores of a test set's metrics, else the baseline's; of the LM's with the ending "_lm"."""
    return metrics.get(f"finetuned{ending}") or metrics.get(f"baseline{ending}")


def summary_table(metrics):
    """Markdown lines: every rate before and after, all clips."""
    rows, endings = [], ["", "_lm"] if last_of(metrics, "_lm") else [""]
    for rate in RATES:
        cells = [RATES[rate][1]]
        for ending in endings:
            then, now = ((metrics.get(f"{system}{ending}") or {}).get(rate) for system in ("baseline", "finetuned"))
            cells += [percent(then), percent(now), "-" if None in (then, now) else f"{100 * (now - then):+.1f}"]
        rows.append(cells)
    labels = [[SYSTEMS[f"baseline{ending}"], SYSTEMS[f"finetuned{ending}"], "change, points"] for ending in endings]
    return markdown_table(["rate", *itertools.chain(*labels)], rows)


def group_table(kind, metrics):
    """Markdown lines: each group of `kind` before and after, the largest first; small groups are marked with *. Too few
    speakers make no interval."""
    rows, before, with_lm, delta = [], metrics["baseline"], last_of(metrics, "_lm"), metrics["delta"]
    for name, now in sorted(last_of(metrics)["groups"][kind].items(), key=lambda item: -item[1]["words"]):
        has_interval = now["words"] and now["speakers"] >= MIN_GROUP_SPEAKERS
        change = delta and now["words"] and delta["groups"][kind][name]
        row = [markdown_text(name) + "\\*" * now["small"]]
        row += [f"{now[size]:,}" for size in ("clips", "speakers", "words")]
        row += [percent(before["groups"][kind][name]["wer"]) if delta else "-", percent(now["wer"])]
        row += ["[{}, {}]".format(*map(percent, now["wer_ci95"])) if has_interval else "-"]
        row += [(points(change) if has_interval else f"{100 * change['wer']:+.1f}") if change else "-"]
        rows.append(row + ([percent(with_lm["groups"][kind][name]["wer"])] if with_lm else []))
    columns = ["clips", "speakers", "words", "before", "WER", "95 % interval", "change, points"]
    return markdown_table([kind.replace("_", " "), *columns, *(["WER, LM"] if with_lm else [])], rows)


def group_lines(metrics, heading, fewest=1):
    """Markdown lines: a table of each kind of groups, where there are at least `fewest`, and what it comes to."""
    lines = []
    for kind, groups in last_of(metrics)["groups"].items():
        if len(groups) < fewest:
            continue
        lines += [f"{heading} By {kind.replace('_', ' ')}\n", *group_table(kind, metrics)]
        large = {name: scores["wer"] for name, scores in groups.items() if not scores["small"]}
        limits = f"{MIN_GROUP_SPEAKERS} speakers and {MIN_GROUP_WORDS} words"
        summary = f"Fewer than two groups have {limits}: none is ranked."
        if len(large) > 1:
            worst, mean = max(large, key=large.get), percent(np.mean(list(large.values())))
            summary = f"Macro average over {len(large)} groups that are large enough: {mean}"
            summary += f"; the worst is {markdown_text(worst)}, {percent(large[worst])}."
        lines.append(summary + "\n")
    return lines


def change_line(metrics):
    """A sentence on the WER of a test set, or on its change, with its interval."""
    last, delta = last_of(metrics), metrics["delta"]
    if not delta:
        interval = " to ".join(map(percent, last["wer_ci95"]))
        return f"WER {percent(last['wer'])}, 95 % interval over speakers {interval}."
    improvement = f"probability of improvement {percent(delta['probability_of_improvement'])}"
    better, equal, worse = (percent(delta[f"clips_{how}"]) for how in ("better", "equal", "worse"))
    change = f"WER changes by {points(delta)} points (95 % interval over speakers, paired); {improvement}"
    return f"{change}. {better} of the clips are better, {equal} equal, {worse} worse."


def score_lines(metrics):
    """Markdown lines on one test set: its size, its rates, their change."""
    sizes = ", ".join(plural(last_of(metrics)[f"{noun}s"], noun) for noun in ("clip", "speaker", "word"))
    return [f"{sizes}. All rates are corpus-level.\n", *summary_table(metrics), change_line(metrics) + "\n"]


def show_scores(metrics):
    """Print the scores, by domain, or where there is but one by the next kind of group that tells something."""
    groups = last_of(metrics)["groups"]
    kind = next((kind for kind in GROUP_KINDS if len(groups[kind]) > 1), None)
    say("\n".join(["", *summary_table(metrics), *(group_table(kind, metrics) if kind else [])]))
    for name, part in metrics.get("also", {}).items():
        say("\n".join([f"{name}: {change_line(part)}", *summary_table(part)]))


def error_lines(scores):
    """Markdown lines on what goes wrong: commonest errors, empty and runaway texts, clips that got worse."""
    lines, table, texts = ["## What goes wrong\n"], scores.table, scores.texts[scores.last]
    errors = {"substitute": Counter(), "insert": Counter(), "delete": Counter()}
    output = align("wer", table["text"], texts)
    for before, after, chunks in zip(output.references, output.hypotheses, output.alignments):
        for chunk in [chunk for chunk in chunks if chunk.type != "equal"]:
            sides = before[chunk.ref_start_idx : chunk.ref_end_idx], after[chunk.hyp_start_idx : chunk.hyp_end_idx]
            errors[chunk.type].update(" -> ".join(filter(None, pair)) for pair in itertools.zip_longest(*sides))
    for kind, label in (("substitute", "confusions"), ("insert", "insertions"), ("delete", "deletions")):
        common = ", ".join(f"{words} ({count})" for words, count in errors[kind].most_common(15))
        lines.append(f"Commonest {label}: {common or 'none'}.\n")
    lengths = np.array(list(map(len, output.hypotheses)))
    empty, runaway = sum(lengths == 0), sum(lengths > 2 * table[f"{scores.last}/wer/of"] + 5)
    lines.append(f"Empty outputs: {empty}. Runaway outputs (over twice the reference's words): {runaway}.\n")
    if {"baseline", "finetuned"} <= set(scores.texts):
        worse, cells = (table["finetuned/wer"] - table["baseline/wer"]).to_numpy(), []
        for index in [index for index in np.argsort(-worse, kind="stable")[:10] if worse[index] > 0]:
            shown = [tidy(text)[:200] for text in (table["text"][index], scores.texts["baseline"][index], texts[index])]
            cells.append([f"+{worse[index]}", *map(markdown_text, (table["accent"][index], *shown))])
        lines += ["Clips that got worse most:\n"] * bool(cells)
        lines += markdown_table(["errors", "accent", "reference", "before", "now"], cells) if cells else []
    return lines


def draw_pictures(folder, metrics, history):
    """PNGs beside the report: {file name: label} of those that the data allows."""

    def save(figure, name):
        with complete(folder / name) as partial:
            figure.savefig(partial, format="png")

    figure_of = functools.partial(Lazy("matplotlib.figure").Figure, dpi=110, layout="tight")
    pictures = {"wer_by_accent.png": "WER by accent", "wer_by_duration.png": "WER by duration of the clip"}
    for (name, label), kind in zip(pictures.items(), ("accent", "duration")):
        groups = last_of(metrics)["groups"][kind]
        order = sorted((group for group in groups if groups[group]["words"]), key=lambda group: groups[group]["wer"])
        if kind == "accent" and len(order) > 30:
            order = [group for group in order if not groups[group]["small"]] or order[-30:]
        if kind == "duration":
            order = [group for group in ("unknown", *reversed(DURATIONS)) if group in order]
        figure = figure_of(figsize=(8, 1.5 + 0.32 * len(order)))
        axes = figure.subplots()
        for offset, system in zip((0.16, -0.16), [system for system in ("baseline", "finetuned") if metrics[system]]):
            chosen = [metrics[system]["groups"][kind][group] for group in order]
            rates = 100 * np.array([group["wer"] for group in chosen])
            errors = np.abs(100 * np.array([group["wer_ci95"] for group in chosen]).T - rates)
            errors *= [group["speakers"] >= MIN_GROUP_SPEAKERS for group in chosen]
            places = np.arange(len(order)) + offset
            axes.errorbar(rates, places, xerr=errors, fmt="o", capsize=2, label=SYSTEMS[system])
        labels = [f"{group[:40]} *" if groups[group]["small"] else group[:40] for group in order]
        axes.set_yticks(range(len(order)), labels, parse_math=False)
        axes.grid(axis="x", alpha=0.3)
        axes.set(xlabel="WER, % (95 % interval over speakers; * too small to rank)", xlim=(0, None), title=label)
        axes.legend()
        save(figure, name)
    if evaluations := [(entry["step"], 100 * entry["eval_wer"]) for entry in history if "eval_wer" in entry]:
        pictures["training.png"] = "Dev WER and training loss"
        figure = figure_of(figsize=(8, 3.5))
        axes = figure.subplots()
        axes.plot(*zip(*evaluations), "o-")
        axes.grid(alpha=0.3)
        axes.set(xlabel="update", ylabel="dev WER, %", ylim=(0, None), title="Training")
        losses = axes.twinx()
        losses.plot(*zip(*((entry["step"], entry["loss"]) for entry in history if "loss" in entry)), color="0.6")
        losses.set(ylabel="training loss (grey)", ylim=(0, None))
        save(figure, "training.png")
    return pictures


def write_results(folder, content, scores, title, notes=(), history=()):
    """metrics.json, predictions_*.jsonl, report.md and its pictures into `folder`, metrics.json last. `scores` are
    {"test" and the names of --also_score: Scores}; `content` is the beginning of metrics.json. Returns the metrics."""
    parts = {name: part.metrics() for name, part in scores.items()}
    packages = "torch transformers datasets evaluate jiwer librosa soundfile accelerate tensorboard".split()
    versions = {"python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in packages}}
    metrics = {"versions": versions, **content, **parts.pop("test")} | ({"also": parts} if parts else {})
    for name, part in scores.items():
        write_text(folder / f"predictions_{file_stem(name)}.jsonl", "".join(part.predictions()))
    lines = [f"# {markdown_text(title)}\n", *score_lines(metrics), *(markdown_text(note) + "\n" for note in notes)]
    lines += [f"![{label}]({name})\n" for name, label in draw_pictures(folder, metrics, history).items()]
    lines += group_lines(metrics, "##")
    limits = f"{MIN_GROUP_SPEAKERS} speakers or {MIN_GROUP_WORDS} words"
    lines.append(f"\\* under {limits}: not ranked and not in the macro average.\n")
    for name, part in metrics.get("also", {}).items():
        lines += [f"## Also scored: {markdown_text(name)}\n", *score_lines(part), *group_lines(part, "###", 2)]
    write_text(folder / "report.md", "\n".join([*lines, *error_lines(scores["test"])]) + "\n")
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False, default=str))
    show_scores(metrics)
    return metrics


def write_model_card(final, results, settings, metrics):
    """README.md of the final model, with the Hub's evaluation metadata, the report and its pictures."""
    on_hub = lambda name: re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()  # noqa: E731
    model, dataset, data = public(settings.model), public(settings.dataset), metrics["data"]
    is_own = data["layout"] == "recordings"
    found = []
    for name, part in {dataset: metrics, **metrics.get("also", {})}.items():
        shown = {"dataset_name": "AfriSpeech-200" if name == DEFAULT_DATASET else name, "dataset_type": name}
        shown |= {"task_type": "automatic-speech-recognition", "dataset_split": "test"}
        for rate in [rate for rate in RATES if part["finetuned"][rate] is not None]:  # None: of another script
            value = round(100 * part["finetuned"][rate], 2)
            found.append(hub.EvalResult(metric_type=rate[:3], metric_name=rate, metric_value=value, **shown))
    header = hub.ModelCardData(
        language="en",
        license="other",
        license_name="health-ai-developer-foundations",
        license_link="https://developers.google.com/health-ai-developer-foundations/terms",
        base_model=model if on_hub(settings.model) else None,
        datasets=[dataset.partition(":")[0]] if on_hub(settings.dataset.partition(":")[0]) else None,
        tags=["medical", *([] if is_own else ["african-accents"]), "ctc"],
        library_name="transformers",
        pipeline_tag="automatic-speech-recognition",
        model_name="medasr-own-data" if is_own else "medasr-afrispeech-200",
        eval_results=found,
    )
    train, new_speakers = data["train"], data["test"]["speakers"] and "test" not in data["speakers_in_train_too"]
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    decoding = ""
    if metrics.get("finetuned_lm"):
        lm = metrics["lm"]
        greedy, searched = (percent(metrics[system]["wer"]) for system in ("finetuned", "finetuned_lm"))
        flags = {"lm": public(settings.lm), **{f"lm_{name}": lm[name] for name in ("weight", "word_score", "beam")}}
        command = shlex.join(["python", PROGRAM, "--transcribe", "visit.wav", "--model", "final", *as_flags(flags)])
        decoding = f"\nThis is the greedy text (WER {greedy}). With the language model {markdown_text(lm['name'])} "
        decoding += f"(WER {searched}):\n\n```\n{command}\n```\n"
    card = f"""---
{header.to_yaml()}
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

Made with `{settings.command}`; {versions}.

"""
    report = (results / "report.md").read_text(encoding="utf-8")
    write_text(final / "README.md", card + report.replace("# ", "## ", 1))
    for picture in results.glob("*.png"):
        shutil.copy(picture, final)


def speaker_note(table):
    """What the report has to say of intervals for clips without speakers, in a list."""
    note = "No clip names its speaker: each one counts as a speaker of its own, which makes the intervals too narrow."
    return [] if (table["speaker"] != "").any() else [note]


def score_file(settings):
    """The whole report for the texts in --score_file, made by any system; returns the exit status."""
    path = Path(settings.score_file)
    try:
        cells, notes = read_table(path, "text", ("text", "pred_text"), f"--score_file {path}")
    except RunError as error:
        raise UsageError(str(error)) from error
    notes = [f"{path.name}: {note}" for note in notes]
    table = clip_table(cells).assign(number=range(1, len(cells) + 1))
    table["clip"] = table["clip"].where(table["clip"] != "", [f"row {number}" for number in table["number"]])
    table["num_samples"] = table["num_samples"].replace(0, np.nan)
    for lacking, what in ((table["text"].map(tidy) == "", "no text"), (cells["pred_text"].isna(), "no pred_text")):
        table["problem"] = table["problem"].mask(lacking & (table["problem"] == ""), what)
    good = table["problem"] == ""
    for row in table[~good].itertuples():
        notes.append(f"Row {row.number} ({row.clip}) has {row.problem}: left out.")
    if not good.any():
        raise UsageError(f"--score_file {path} has no row with both text and pred_text among {len(table)}")
    table, cells, left_out = table[good], cells[good], int((~good).sum())
    if not any(map(normalize_wer, table["text"])):
        raise UsageError(f"--score_file {path} has no text with a word to score among {plural(len(table), 'row')}")
    if unknown := int(table["num_samples"].isna().sum()):
        effect = f"in the group 'unknown', and not among clips under {PAPER_SECONDS} s"
        notes.append(f"{plural(unknown, 'row')} without a duration: {effect}.")
    texts, before = {"baseline": cells["pred_text"].tolist()}, cells.get("baseline_text")
    if before is not None and before.notna().all():
        texts = {"baseline": before.tolist(), "finetuned": texts["baseline"]}
    elif before is not None and before.fillna("").any():
        notes.append("Some rows have no baseline_text: no comparison is made.")
    for note in notes:
        warn(note)
    content = {"config": public({"command": settings.command, "score_file": settings.score_file})}
    content["data"] = {"test": {"clips": len(table), "hours": round(hours_of(table), 4), "left_out": left_out}}
    folder = Path(settings.output_dir) / "results"
    scores = {"test": Scores.of(table, texts)}
    write_results(folder, content, scores, f"Scores of {path.name}", [*notes, *speaker_note(table)])
    say(f"\nresults: {folder}")
    return 0


# ---------------------------------------------------------------- half precision

# float16 ends at 65,504. A module whose inputs or outputs come within a factor of 8 of that is run in float32, so that
# activations may still grow while training.
HALF_PRECISION_LIMIT = 65_504 / 8
# The gradient scaler halves its scale at each skipped update, so a run starts with a few; so many are overflow.
MAX_SKIPPED_UPDATES = 10


def wrap_forward(module, wrapper):
    """Have `wrapper(forward, *inputs, **options)` called in place of the forward of a module."""
    module.forward = functools.partial(wrapper, module.forward)


def in_float32(forward, *inputs, **options):
    """A forward in float32 where autocast would use half precision."""

    def widen(value):
        return value.float() if torch.is_tensor(value) and value.is_floating_point() else value

    with torch.autocast([*inputs, *options.values()][0].device.type, enabled=False):
        return forward(*map(widen, inputs), **{name: widen(value) for name, value in options.items()})


def with_finite_statistics(forward, *inputs, **options):
    """A forward of a BatchNorm that keeps what overflows out of its running statistics. The gradient scaler skips the
    update of a batch that overflows, but the forward pass has moved the statistics by then: from one infinity on, every
    evaluation would give blank text while the training loss looks normal."""
    module = forward.__self__
    # The batch moves copies, because autograd holds on to what a forward pass has moved.
    kept = {name: getattr(module, name) for name in ("running_mean", "running_var")} if module.training else {}
    for name, values in kept.items():
        setattr(module, name, values.clone())
    output = forward(*inputs, **options)
    for name, values in kept.items():
        moved = getattr(module, name)
        values.copy_(torch.where(moved.isfinite(), moved, values))
        setattr(module, name, values)
    return output


def guard_half_precision(model, batches, device):
    """Make `model` safe under float16 autocast, by measuring it on `batches`; returns {module in float32: its peak}.
    MedASR's subsampler reaches about 1.1e5 and other activations more: plain float16 gives inf, then NaN. Raises
    RunError if the outputs are not finite all the same."""
    peaks, watched = Counter(), {}
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)) or name.endswith("subsampler"):
            watched[module] = name

    def watch(module, inputs, output):
        if name := watched.get(module):
            tensors = [item for item in (*inputs, output) if torch.is_tensor(item) and item.is_floating_point()]
            peaks[name] = max([peaks[name], *(float(tensor.abs().max()) for tensor in tensors if tensor.numel())])

    model.to(device).eval()
    with torch.nn.modules.module.register_module_forward_hook(watch), torch.no_grad():
        for batch in batches:
            model(**batch)
    guarded = {name: peak for name, peak in peaks.items() if peak > HALF_PRECISION_LIMIT or name.endswith("subsampler")}
    for name in guarded:
        wrap_forward(model.get_submodule(name), in_float32)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            wrap_forward(module, with_finite_statistics)
    with torch.no_grad(), torch.autocast(torch.device(device).type, torch.float16):
        for batch in batches:
            if not torch.isfinite(model(**batch).logits).all():
                raise RunError("the model overflows float16 even with its large activations in float32: use --bf16")
    return guarded


# ---------------------------------------------------------------- training


class EpochOrder:
    """Mixed with LengthGroupedSampler: an order from the seed and the epoch alone, so that a resumed run goes on in it.
    The Trainer restores its random state only after the first batch has been drawn, and accelerate's wrappers hide a
    sampler from set_epoch: `epoch()` is asked instead. The order is the same for any division of an update's clips into
    batches, accumulation steps and processes."""

    def __init__(self, clips_an_update, lengths, seed, epoch):
        super().__init__(clips_an_update, lengths=lengths)
        self.seed, self.epoch = seed, epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return super().__iter__()


class CTCTrainer:
    """Mixed with the Trainer: its order of clips, the stream, dev scores, and speed and overflow in the logs. `dev` are
    the dev `Clips`, `decoder` transcribes them, `encoder` makes labels, `samples` are a few of the texts."""

    dev = decoder = encoder = None
    samples, clips = "", ()  # of the last evaluation, of the update under way
    # Since the last log: samples without and with padding, when that was, seconds of waiting for data, of other work.
    heard, started, waited, paused = np.zeros(2), None, 0.0, 0.0
    skipped, skipped_in_a_row = 0, 0  # updates that overflowed float16 since the last log, and just now
    is_catching_up = False  # with an evaluation that was due at the checkpoint that is gone on from

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        # [:] makes a list: from the column each length is read apart, which takes minutes for the training split.
        lengths = (train_dataset or self.train_dataset)[self.args.length_column_name][:]
        sampler = mixed(EpochOrder, Lazy("transformers.trainer_pt_utils").LengthGroupedSampler)
        return sampler(self.args.clips_an_update, lengths, self.args.seed, lambda: int(self.state.epoch or 0))

    def get_train_dataloader(self):
        if not isinstance(self.train_dataset, TrainingStream):
            return super().get_train_dataloader()
        # The stream makes the batches of this process's own share; accelerate would divide it again.
        options = {"batch_size": self.args.train_batch_size, "pin_memory": self.args.dataloader_pin_memory}
        self.train_dataset.loader_options = {**options, "collate_fn": self.data_collator}
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=None)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of an update, each with its share of the update's clips, timed."""
        start = time.monotonic()
        self.started = self.started or start
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.waited += time.monotonic() - start
        for batch in batches:
            batch["share"] = len(batch["clips"]) / sum(len(batch["clips"]) for batch in batches)
        return batches, items

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.clips, self.heard = (*self.clips, *inputs["clips"]), self.heard + inputs["counts"]
        self.share = inputs["share"]
        inputs = model_inputs(inputs, self.decoder.extractor, self.args.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, **options):
        """The batch's part in the mean over the update's clips; the Trainer's is over batches, also of other sizes."""
        return super().compute_loss(model, inputs, **options) * self.share * self.current_gradient_accumulation_steps

    def _get_grad_norm(self, model, grad_norm=None):
        """Where a gradient that is not finite shows, before the optimizer sees it: in float16 the update is skipped.
        accelerate's own account of skipped updates sees none of them with the fused AdamW, the Trainer's default."""
        norm, clips, self.clips = super()._get_grad_norm(model, grad_norm), self.clips, ()
        is_finite = bool(np.isfinite(float(norm)))
        self.skipped += not is_finite
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        if not is_finite and not self.args.fp16:
            self.refuse(f"the gradient is not finite (clips: {', '.join(clips)})")
        if self.skipped_in_a_row == MAX_SKIPPED_UPDATES:
            self.refuse(f"float16 overflowed in {MAX_SKIPPED_UPDATES} updates in a row (clips: {', '.join(clips)})")
        return norm

    def refuse(self, problem):
        """Raise RunError for numbers that are not finite."""
        advice = "use --bf16, or lower --learning_rate" if self.args.fp16 else "lower --learning_rate"
        advice += ", or raise --warmup_steps; earlier checkpoints are good"
        raise RunError(f"{problem} at update {self.state.global_step + 1}: {advice}")

    def _run_epoch(self, **options):
        """Nothing, where a run that is gone on with is at its end already: the Trainer would make one more update."""
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        if not self.control.should_training_stop:
            super()._run_epoch(**options)

    def _load_rng_state(self, checkpoint):
        with explained(f"{checkpoint} cannot be loaded", checkpoint_errors(), "delete it: an older one is taken then"):
            super()._load_rng_state(checkpoint)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the first process writes trainer_state.json next, and last

    def _save_checkpoint(self, model, trial):
        """A checkpoint, complete once its trainer_state.json is there; never one of a model that is not finite."""
        start, folder = time.monotonic(), Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if broken := not_finite(self.model):
            self.refuse(f"the model is not finite, in {broken},")
        if self.args.should_save:
            (folder / "trainer_state.json").unlink(missing_ok=True)
        with explained(f"{folder} cannot be written", checkpoint_errors(), ROOM_ADVICE):
            try:
                super()._save_checkpoint(model, trial)
            except BaseException:  # what is half-written takes the room that is asked for
                shutil.rmtree(folder if self.args.should_save else "", ignore_errors=True)
                raise
        self.accelerator.wait_for_everyone()  # a process that stops here would have its launcher end the others
        self.paused += time.monotonic() - start

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The dev scores, made as the test scores are: Trainer.evaluate would gather logits, and cut no windows."""
        start, table = time.monotonic(), self.dev.table
        try:
            emissions, _, loss = self.decoder.emissions(self.dev, self.encoder)
        except Stopped:
            if not self.is_catching_up:
                self._save_checkpoint(self.model, None)  # from which it is caught up with
            raise
        if not np.isfinite(loss):
            self.refuse("the dev loss is not finite")
        table = table.assign(hypothesis=self.decoder.greedy(emissions))
        pairs = {name: list(map(normalize_wer, table[name])) for name in ("text", "hypothesis")}
        scores = error_rates_metric().compute(references=pairs["text"], predictions=pairs["hypothesis"])
        for domain, part in table[table["domain"] != ""].groupby("domain"):
            scores[f"wer_by_domain/{domain}"] = corpus_rate(part["text"], part["hypothesis"])
        shown = table.iloc[:: max(1, len(table) // 5)][:5][["accent", "text", "hypothesis"]]
        cells = [map(markdown_text, row) for row in shown.itertuples(index=False)]
        self.samples = "\n".join(markdown_table(["accent", "reference", "hypothesis"], cells))
        scores |= {"loss": loss, "runtime": round(time.monotonic() - start, 2)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.paused += time.monotonic() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs, start_time=None):
        if "loss" in logs and self.started:
            heard, now = torch.tensor(self.heard, dtype=torch.float32, device=self.args.device), time.monotonic()
            real, padded = self.accelerator.reduce(heard, "sum").tolist()
            seconds = max(now - self.started - self.paused, 1e-3)
            logs["audio_seconds_per_second"] = round(real / SAMPLE_RATE / seconds, 1)
            logs["padding_percent"] = round(100 * (1 - real / padded), 2)
            logs["data_wait_percent"] = round(100 * self.waited / seconds, 1)
            self.heard, self.started, self.waited, self.paused = np.zeros(2), now, 0.0, 0.0
        if "loss" in logs and self.args.fp16:
            earlier = [entry["skipped_updates"] for entry in self.state.log_history if "skipped_updates" in entry]
            logs["skipped_updates"], self.skipped = self.skipped + sum(earlier[-1:]), 0
        super().log(logs, start_time)


class RunCallback:
    """Mixed with TrainerCallback: what happens to `trainer` when its run begins, goes on, evaluates or is told to stop.
    `writer` is TensorBoard's, `patience` the Trainer's early stopping; either may be None."""

    stopping = 0

    def __init__(self, trainer, writer, patience):
        self.trainer, self.writer, self.patience = trainer, writer, patience

    def on_train_begin(self, args, state, control, **kwargs):
        """After a resumption: catch up with an evaluation that is due, and with what early stopping and best are."""
        evaluated = [entry["step"] for entry in state.log_history if "eval_wer" in entry]
        due = args.eval_strategy == "steps" and state.global_step and state.global_step % state.eval_steps == 0
        if self.patience:
            late = sum(step > (state.best_global_step or 0) for step in evaluated)
            self.patience.early_stopping_patience_counter = late
            control.should_training_stop |= late >= self.patience.early_stopping_patience
        if due and state.global_step not in evaluated:
            # Without saving: the random state of the checkpoint is restored only later.
            control.should_evaluate = self.trainer.is_catching_up = True
            self.trainer._maybe_log_save_evaluate(None, None, self.trainer.model_wrapped, None, 0, None, None)
            self.trainer.is_catching_up = False
        if state.best_global_step:  # the folder may have been moved
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.data_collator.epoch = int(state.epoch or 0)

    def on_step_end(self, args, state, control, **kwargs):
        self.stopping = agreed(STOP_SIGNALS.number, args, "MAX")
        if self.stopping:  # the evaluation, which may take minutes, is caught up with
            control.should_save, control.should_evaluate = True, False

    def on_save(self, args, state, control, **kwargs):
        if self.stopping:
            say(f"  checkpoint-{state.global_step} written")
            raise Stopped(self.stopping)

    def on_evaluate(self, args, state, control, **kwargs):
        if self.writer:
            self.writer.add_text("eval/transcriptions", self.trainer.samples, state.global_step)
            self.writer.flush()  # a run that is killed does not write them again

    def on_train_end(self, args, state, control, **kwargs):
        late = self.patience.early_stopping_patience_counter if self.patience else 0
        if late and late >= self.patience.early_stopping_patience:
            more = "a higher --early_stopping_patience goes on"
            say(f"  stopped early: {plural(late, 'evaluation')} without a better dev WER; {more}")


class ProgressLines:
    """Mixed with ProgressCallback: one readable line a log instead of a dict."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "loss" in logs:
            skipped = f", {plural(count, 'update')} skipped" if (count := logs.get("skipped_updates")) else ""
            speed, wait = logs["audio_seconds_per_second"], logs["data_wait_percent"]
            speed = f"{speed:.0f} audio s/s, {wait:.0f} % waiting for data"
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}, {speed}{skipped}")
        elif "eval_wer" in logs:
            scores = f"dev WER {percent(logs['eval_wer'])}, CER {percent(logs['eval_cer'])}"
            self.training_bar.write(f"  step {state.global_step:>6}: {scores}")


def planned_updates(settings, clips):
    """(updates in all, updates an epoch) of a run on so many training clips."""
    batches = -(-clips // (settings.per_device_train_batch_size * settings.world_size))
    an_epoch = max(1, -(-batches // settings.gradient_accumulation_steps))
    return settings.max_steps if settings.max_steps > 0 else math.ceil(settings.num_train_epochs * an_epoch), an_epoch


TRIED_BATCH_SIZES = (32, 16, 8, 4, 2, 1)
SPARE_MEMORY = 0.05  # of the GPU's, left over in a trial for what batches of other lengths leave in pieces


def choose_batch_size(model, collator, train, settings, limit):
    """Split the clips of an update into steps that fit the GPU with the longest clips of the run. Larger steps are
    tried first, down from `limit` if given, beside what optimizer and processes keep in memory. The model comes out as
    it went in."""
    device, half = settings.device, torch.float16 if settings.fp16 else torch.bfloat16
    clips = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    largest = min(limit or clips, clips if device.type == "cuda" else AUTO_BATCH_SIZE)
    sizes = [size for size in TRIED_BATCH_SIZES if clips % size == 0 and size <= largest]
    sizes = sizes if device.type == "cuda" else sizes[:1]
    seconds, text = settings.max_train_seconds, "the " * int(2 * settings.max_train_seconds)
    if not settings.streaming:
        seconds, text = train[0]["num_samples"] / SAMPLE_RATE, train[0]["text"]  # they are sorted
    longest = {"samples": np.zeros(round(seconds * SAMPLE_RATE), np.float32), "text": text}
    smaller = iter(sizes[1:])

    @accelerate.utils.find_executable_batch_size(
        starting_batch_size=sizes[0], reduce_batch_size_fn=lambda: next(smaller)
    )
    def try_step(size):
        if size == sizes[-1]:
            return size
        # AdamW's two averages, and the buckets in which processes exchange gradients.
        copies = 2 + (settings.world_size > 1)
        kept = [torch.empty_like(weight) for weight in model.parameters() for _ in range(copies)]
        spare = int(SPARE_MEMORY * torch.cuda.get_device_properties(device).total_memory)
        kept.append(torch.empty(spare, dtype=torch.uint8, device=device))
        inputs = model_inputs(collator([longest] * size), collator.extractor, device)
        with torch.autocast(device.type, half, enabled=settings.fp16 or settings.bf16):
            loss = model.train()(**inputs).loss
        loss.backward()
        return size

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    layerdrop, model.encoder.layerdrop = model.encoder.layerdrop, 0.0
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        size = agreed(try_step(), settings)
    model.encoder.layerdrop = layerdrop
    model.zero_grad()
    for name, buffer in model.named_buffers():
        buffer.data.copy_(buffers[name])
    torch.cuda.empty_cache()  # nothing where there is no GPU
    settings.per_device_train_batch_size, settings.gradient_accumulation_steps = size, clips // size
    say(f"  {plural(clips, 'clip')} an update and device: {size} a step x {plural(clips // size, 'accumulation step')}")


def make_trainer(settings, decoder, encoder, train, dev, seed=None, batch_limit=None):
    """The Trainer for the training clips `train` and the dev `Clips`; raises RunError if float16 cannot be made safe.
    `seed` is SpecAugment's, that of the settings if not given."""
    model, extractor, device = decoder.model, decoder.extractor, settings.device
    plain = CTCCollator(extractor, encoder, shortest=decoder.shortest)
    seed = settings.seed if seed is None else seed
    if settings.streaming:
        settings.train_sampling_strategy, settings.ignore_data_skip = "random", True
    if settings.gradient_checkpointing:
        # Under DDP checkpointing forbids unused parameters, which a dropped layer would leave.
        model.encoder.layerdrop = 0.0
        model.activation_checkpointing_enable()  # now, for the trial of batch sizes; the Trainer does when it starts
    if settings.ddp_find_unused_parameters is None:
        settings.ddp_find_unused_parameters = model.encoder.layerdrop > 0
    if settings.fp16:
        # Measured on dev clips: a stream has none.
        chosen = np.linspace(0, len(dev) - 1, 16).astype(int).reshape(4, 4).tolist()
        batches = [plain([dev.audio[index] for index in indices]) for indices in chosen]
        guard_half_precision(model, [model_inputs(batch, extractor, device) for batch in batches], device)
    if settings.auto_train_batch:
        choose_batch_size(model.to(device), plain, train, settings, batch_limit)
    trainer = mixed(CTCTrainer, transformers.Trainer)(
        model=model,
        args=settings,
        data_collator=dataclasses.replace(plain, augment=settings.spec_augment, seed=seed),
        train_dataset=train,
        eval_dataset=dev.audio,
        processing_class=decoder.processor,  # whole: with the feature extractor alone checkpoints lack the tokenizer
    )
    trainer.dev, trainer.decoder, trainer.encoder = dev, decoder, encoder
    # LasrForCTC.forward takes **kwargs, from which the Trainer concludes that it averages over accumulated batches by
    # itself. It does not: without this line, 4 accumulation steps give 4 times the loss and the gradient (transformers
    # issue 47688).
    trainer.model_accepts_loss_kwargs = False
    kinds, tensorboard = Lazy("transformers.trainer_callback"), transformers.integrations.TensorBoardCallback
    writer = patience = None
    if trainer.pop_callback(tensorboard) and settings.should_save:
        writer = Lazy("torch.utils.tensorboard").SummaryWriter(str(Path(settings.output_dir) / "runs"))
        trainer.add_callback(tensorboard(writer))
    if settings.early_stopping_patience and settings.load_best_model_at_end:
        patience = kinds.EarlyStoppingCallback(settings.early_stopping_patience)
        trainer.add_callback(patience)
    trainer.add_callback(mixed(RunCallback, kinds.TrainerCallback)(trainer, writer, patience))
    if trainer.pop_callback(kinds.ProgressCallback):
        trainer.add_callback(mixed(ProgressLines, kinds.ProgressCallback))
    trainer.remove_callback(kinds.PrinterCallback)
    return trainer


def checkpoint_to_resume(settings):
    """(the complete checkpoint to go on from, None for none; its updates): the newest, or --resume_from_checkpoint's.
    Raises UsageError if the one asked for is not complete, RunError if the processes find different ones."""
    asked, output, done = settings.resume_from_checkpoint, Path(settings.output_dir), {}
    found = [path for path in output.glob("checkpoint-*") if path.name[11:].isdecimal()]
    found.sort(key=lambda path: -int(path.name[11:]))
    is_asked = asked and asked.lower() not in ("true", "false")
    for path in [Path(asked)] if is_asked else found:
        state = read_json(path / "trainer_state.json")  # the Trainer writes it last
        if state:
            done[str(path)] = state["global_step"]
            break
        if is_asked:
            raise UsageError(f"--resume_from_checkpoint is {asked}: no checkpoint that was finished; choose another")
        warn(f"{path} is left aside: it was not finished")
    checkpoint, updates = next(iter(done.items()), (None, 0))
    if agreed(updates, settings) != agreed(updates, settings, "MAX"):
        what = f"the processes find different checkpoints in {output}, which nodes have to share"
        raise RunError(f"{what}; --overwrite_output_dir starts anew")
    return checkpoint, updates


# ---------------------------------------------------------------- the run

# What a run is of: with another of these, what is in --output_dir is of no use.
IDENTITY = """model model_revision dataset dataset_revision text_column accents domains countries max_train_seconds
    max_train_samples max_eval_samples max_test_samples target_text spec_augment streaming window_seconds
    learning_rate seed weights clips_an_update""".split()
NO_FLAGS = {"weights": "weights of checksum", "clips_an_update": "batch x accumulation steps x processes of"}
# These may change from one start of a run to the next; the texts with a language model are made again.
GOAL = "max_steps num_train_epochs early_stopping_patience also_score".split()
LM_FLAGS = "lm lm_weight lm_word_score lm_beam tune_lm".split()
RUN_NOTES = "baseline reached batch_limit".split()


class Run:
    """A run in --output_dir, and what it notes down there in run.json: what it is of, the baseline's texts, its end.
    `baseline` has "texts" {test set: {system: {clip: text}}}, the language model "asked" for, and "lm", what was used;
    `reached` is the `goal` of the start that finished; `batch_limit` are the clips a step that still fit, where more
    have filled the GPU's memory."""

    baseline = reached = batch_limit = None

    def __init__(self, settings):
        self.settings, self.output, self.lm_settings = settings, Path(settings.output_dir), {}  # of the systems decoded
        self.results, self.final, self.path = self.output / "results", self.output / "final", self.output / "run.json"
        weights = Path(settings.model).expanduser() / "model.safetensors"  # tells models in folders of one name apart
        values = {**vars(settings), "clips_an_update": settings.clips_an_update, "weights": None}
        if weights.is_file():
            values["weights"] = zlib.crc32(weights.open("rb").read(1 << 20))
        self.identity, self.goal = (public({name: values[name] for name in names}) for names in (IDENTITY, GOAL))
        self.lm_asked = public({name: values[name] for name in LM_FLAGS}) if settings.lm else {}
        if settings.lm and settings.lm != "auto":
            self.lm_asked["lm_bytes"] = Path(settings.lm).stat().st_size
        self.goal |= self.lm_asked

    def open(self):
        """Take up what an earlier start of the run has left; raises UsageError where it is of another run."""
        settings, output = self.settings, self.output
        if settings.overwrite_output_dir and settings.is_first:
            for path in [path for path in output.glob("*") if MADE_BY_A_RUN.match(path.name)]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in (
            [*output.glob("*.tmp"), *self.results.glob("*.tmp")] if settings.is_first else ()
        ):  # of a killed start
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        stored, foreign = None if settings.overwrite_output_dir else read_json(self.path), []
        if not stored:  # a checkpoint that was copied can be gone on from
            strange = [path for path in output.glob("checkpoint-*") if not (path / "trainer_state.json").exists()]
            foreign = [str(path) for path in [self.final, *strange] if path.exists()]
        # The first one's, because all have to do the same.
        stored, foreign = accelerate.utils.gather_object([(stored, foreign)])[0]
        advice = "choose another --output_dir, or --overwrite_output_dir to delete what is there"
        if foreign:
            raise UsageError(f"{foreign[0]} is of no run of this program, and this one would delete it; {advice}")
        for name, value in self.identity.items() if stored else ():
            if (found := stored["identity"].get(name)) != value:
                what = f"holds a run with {NO_FLAGS.get(name, f'--{name}')} {found}, not {value}"
                raise UsageError(f"--output_dir {output} {what}; {advice}")
        vars(self).update({name: stored.get(name) for name in RUN_NOTES} if stored else {})

    def save(self):
        if self.settings.is_first:
            content = {name: getattr(self, name) for name in ("identity", *RUN_NOTES)}
            write_text(self.path, json.dumps(content, ensure_ascii=False, indent=1))

    def show_finished(self):
        """Show the scores of a run that is finished; returns whether it is, with its results there."""
        metrics = read_json(self.results / "metrics.json")
        complete = self.reached == self.goal and metrics and (self.final / "config.json").is_file()
        if not agreed(bool(complete), self.settings, "MAX"):
            return False
        if self.settings.is_first:
            more = "--overwrite_output_dir starts anew, more --max_steps or --num_train_epochs go on"
            say(f"{self.output} holds this run, finished; {more}")
            show_scores(metrics)
            say(f"\nmodel: {self.final}\nresults: {self.results}")
            if self.settings.upload:
                push_to_hub(self.settings, self.final)
        return True

    def select(self, processor, model, lm, sources):
        """Select the clips of `sources`, {"": the corpus, name: test set of --also_score}; raises RunError."""
        settings, self.source = self.settings, sources[""]
        self.encoder = LabelEncoder(processor.tokenizer, model.config.vocab_size, settings.target_text)
        self.check = ClipCheck(model, processor.feature_extractor, self.encoder, settings.max_train_seconds)
        self.clips = select_all(sources, settings, self.check)
        self.tests = {name or "test": self.clips[name or "test"] for name in sources}
        self.decoder = Decoder(model, processor, settings, lm)

    def decode_tests(self, system):
        """{test set: {system: the model's text of each clip, with a language model system_lm: those with it}}."""
        decoder, texts = self.decoder, {}
        if self.settings.tune_lm:
            record = tune_lm(decoder, self.clips["dev"])
            if self.settings.is_first:
                write_text(self.results / "lm.json", json.dumps(record, indent=1))
        for name, clips in self.tests.items():
            emissions = decoder.emissions(clips)[0]
            texts[name] = {system: decoder.greedy(emissions)}
            if decoder.lm:
                texts[name][f"{system}_lm"] = decoder.texts(emissions)
        self.lm_settings |= {system: decoder.lm.settings} if decoder.lm else {}
        return texts

    def decode_baseline(self):
        """`decode_tests` of the untouched model, whose texts an earlier start of the run may have noted down."""
        clips, noted = {name: clips.table["clip"].tolist() for name, clips in self.tests.items()}, self.baseline or {}
        kept = {(name, system): part for name in clips for system, part in noted.get("texts", {}).get(name, {}).items()}
        is_known = kept and noted["asked"] == self.lm_asked and set(noted["texts"]) == set(clips)
        if not is_known or any(set(part) != set(clips[name]) for (name, _), part in kept.items()):
            say(f"scoring {self.settings.model} as it is on the test split")
            texts, noted = (
                self.decode_tests("baseline"),
                {"asked": self.lm_asked, "lm": self.lm_settings.get("baseline")},
            )
            for name, part in texts.items():
                part.update({system: dict(zip(clips[name], found)) for system, found in part.items()})
            self.baseline = {**noted, "texts": texts}
            self.save()
        self.lm_settings["baseline"] = self.baseline["lm"]
        texts = {}
        for name, system in [(test, system) for test in clips for system in self.baseline["texts"][test]]:
            found = [self.baseline["texts"][name][system][clip] for clip in clips[name]]
            texts.setdefault(name, {})[system] = found
            wer = percent(corpus_rate(self.tests[name].table["text"], found))
            say(f"  WER {wer} on {name} {SYSTEMS[system]} training")
        return texts

    def write_results(self, texts, history=()):
        """The results of `decode_tests`' texts; returns the metrics."""
        settings, source, test = self.settings, self.source, self.clips["test"].table
        seen = None if settings.eval_only else set(self.clips["train"].table["accent"])
        scores = {name: Scores.of(self.tests[name].table, part, seen) for name, part in texts.items()}
        values, own = settings.to_dict(), [item.name for item in dataclasses.fields(ScriptFlags)]
        config = {name: values.pop(name) for name in own} | {"command": settings.command, "training": values}
        data = {name: {**sizes_of(clips.table), "skipped": clips.reasons} for name, clips in self.clips.items()}
        data |= {"made_splits": source.made, "speakers_in_train_too": shared_speakers(self.clips)}
        data |= {"layout": source.layout, "characters_dropped_from_labels": self.encoder.dropped}
        longer = plural(int((test["num_samples"] > settings.window_seconds * SAMPLE_RATE).sum()), "clip")
        windows = f"{longer} over {settings.window_seconds:g} s scored in overlapping windows"
        notes = [f"{windows}; none left out for its length."]
        notes += [*speaker_note(test), *shared_speaker_notes(self.clips)]
        notes += [f"{' and '.join(source.made)} made of the train split by speaker."] * bool(source.made)
        content = {"config": config, "data": data}
        if lm := self.lm_settings.get("finetuned") or self.lm_settings.get("baseline"):
            lm = {**lm, "baseline": self.lm_settings.get("baseline") or lm}  # each model is tuned by itself
            notes += [f"LM ({name}): {used}" for name, used in (("now", lm), ("before", lm["baseline"]))]
            content["lm"] = lm
        title = f"{public(settings.model)} on {public(settings.dataset)}"
        return write_results(self.results, content, scores, title, notes, history)

    def score(self):
        """--eval_only; returns the exit status."""
        say(f"scoring {self.settings.model} on the test split")
        texts = self.decode_tests("baseline")
        if self.settings.is_first:
            self.write_results(texts)
            say(f"\nresults: {self.results}")
        return 0

    def train(self, checkpoint, done):
        """Train, from `checkpoint` with its updates `done` if given, and leave the best model; returns the trainer. The
        default warm-up and evaluation interval are shortened where a run is too short for them. Raises RunError that
        says what to change."""
        settings, default, trainer = self.settings, TrainingFlags, None
        train, seed = self.clips["train"].audio, settings.seed
        updates, _ = planned_updates(settings, len(self.clips["train"]))
        say(f"training: {plural(updates, 'update')}")
        if updates < settings.eval_steps == default.eval_steps and settings.save_steps == default.save_steps:
            settings.eval_steps = settings.save_steps = max(1, updates // 5)
            say(f"  evaluating and saving every {settings.eval_steps}")
        if updates < 2 * settings.warmup_steps and settings.warmup_steps == default.warmup_steps:
            settings.warmup_steps = max(1, updates // 10)
            say(f"  warming up over {settings.warmup_steps}")
        if settings.streaming:
            seed += done  # the stream starts anew, and should not with the same clips and masks
            train = mixed(TrainingStream, torch.utils.data.IterableDataset)(self.source, settings, self.check, seed)
        greedy = Decoder(self.decoder.model, self.decoder.processor, settings)
        try:
            trainer = make_trainer(settings, greedy, self.encoder, train, self.clips["dev"], seed, self.batch_limit)
            if checkpoint:
                say(f"  going on from {checkpoint}, update {done} of {updates}")
            with STOP_SIGNALS.deferring():
                trainer.train(resume_from_checkpoint=checkpoint)
        except torch.OutOfMemoryError as error:
            batch, steps = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
            less = f"--per_device_train_batch_size {max(1, batch // 2)} --gradient_accumulation_steps {steps * 2}"
            if settings.auto_train_batch and batch > 1:
                self.batch_limit, less = batch // 2, f"the same command, which goes on with {batch // 2} a step"
                self.save()
            advice = f"try {less}, --gradient_checkpointing, or a lower --max_train_seconds"
            raise RunError(f"the GPU's memory is full with {plural(batch, 'clip')} a step: {advice}") from error
        except checkpoint_errors() as error:  # before the first batch: of flags such as --optim, or of the checkpoint
            if (trainer and trainer.started) or LOST_PROCESS.search(str(error)):
                raise
            if checkpoint:
                what = f"{checkpoint} cannot be loaded ({one_line(error)})"
                raise RunError(f"{what}: delete it, an older one is taken then") from error
            raise UsageError(f"the Trainer does not take these flags ({one_line(error)})") from error
        finally:
            if settings.is_first and not settings.disable_tqdm:
                print(file=sys.stderr)  # no message belongs behind the progress bar
        return trainer

    def fit_and_score(self, checkpoint, done):
        """The main job; returns the exit status."""
        settings = self.settings
        self.save()
        texts = {} if settings.skip_baseline else self.decode_baseline()
        trainer = self.train(checkpoint, done)
        say("scoring the fine-tuned model on the test split")
        # Without the wrapper that autocasts: before and after are scored alike, in float32.
        self.decoder.model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        accelerate.utils.broadcast(self.decoder.model.state_dict())  # in place: the first process's is the best model
        texts = {name: texts.get(name, {}) | found for name, found in self.decode_tests("finetuned").items()}
        if settings.is_first:
            metrics = self.write_results(texts, trainer.state.log_history)
            with explained(f"{self.final} cannot be written", checkpoint_errors(), ROOM_ADVICE):
                with complete(self.final) as final:
                    trainer.save_model(str(final))
                    write_model_card(final, self.results, settings, metrics)
            # The test scores and the picture by accent go to TensorBoard, beside the curves of the training.
            with Lazy("torch.utils.tensorboard").SummaryWriter(str(self.output / "runs")) as writer:
                step, parts = trainer.state.global_step, {"test": metrics, **metrics.get("also", {})}
                for (name, part), system, rate in itertools.product(parts.items(), SYSTEMS, RATES):
                    if part.get(system) and part[system][rate] is not None:
                        writer.add_scalar(f"{file_stem(name)}_{system}/{rate}", part[system][rate], step)
                picture = Lazy("matplotlib.image").imread(self.results / "wer_by_accent.png")
                writer.add_image("test/wer_by_accent", picture[..., :3], step, dataformats="HWC")
            self.reached = self.goal
            self.save()
            if settings.upload:
                push_to_hub(settings, self.final)
            say(f"\nmodel: {self.final}\nresults: {self.results}\ncurves: tensorboard --logdir {self.output / 'runs'}")
        return 0


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
    this, processor, trains = Run(settings), None, not any(getattr(settings, mode) for mode in MODES)
    if trains:
        this.open()
        if this.show_finished():
            return 0
        checkpoint, done = checkpoint_to_resume(settings)
    say(f"corpus: {settings.dataset}")
    if trains or settings.eval_only:
        # Before the audio: what cannot be used should not be found out after hours of preparation.
        processor, model = load_model(settings)
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
    for name, source in sources.items():
        prepare(source, ("test",) if name else settings.splits(on_disk=True), settings)
    if settings.prepare_only:
        select_all(sources, settings, lambda table: table["problem"])
        say(f"  ready in {settings.data_dir}")
        return 0
    this.select(processor, model, lm, sources)
    return this.fit_and_score(checkpoint, done) if trains else this.score()


def main(argv=None):
    """Run the command line `argv` (sys.argv's if None); returns 0, 2 for a usage error, 1 for one while running."""
    argv, rank = sys.argv[1:] if argv is None else list(argv), os.environ.get("RANK", "0")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        STOP_SIGNALS.install()
        return run(parse_settings(argv))
    except UsageError as error:
        status, message = 2, str(error)
        if rank != "0":
            return status  # each process refuses the same flags
    except RunError as error:
        # One that comes from a DataLoader's worker carries the worker's traceback; its last line is the message.
        status, message = 1, str(error).strip().splitlines()[-1].removeprefix(f"{__name__}.RunError: ")
    except Stopped as error:
        status = 128 + error.args[0]
        message = f"stopped by {signal.Signals(error.args[0]).name}: {error.advice}"
    except SystemExit as error:  # argparse's --help
        return error.code or 0
    except Exception as error:
        if os.environ.get("MEDASR_TRACEBACK"):
            raise
        status, message = 1, f"unexpected {one_line(error)}; run with MEDASR_TRACEBACK=1 to see where, and report it"
        if is_full_disk(error):
            message = f"a file cannot be written ({one_line(error)}): {ROOM_ADVICE}"
        elif LOST_PROCESS.search(str(error)):
            message = "another process has ended; its own message says why, the same command goes on from here"
    finally:
        for number, handler in handlers.items():
            # Not the main thread, or a handler that Python did not set.
            with contextlib.suppress(ValueError, TypeError):
                signal.signal(number, handler)
    print(f"{PROGRAM}: error{'' if rank == '0' else f' (process {rank})'}: {redact(message)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal can show every name and text
    sys.exit(main())
