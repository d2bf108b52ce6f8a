#!/usr/bin/env python3
"""Fine-tune Google's MedASR on AfriSpeech-200, African-accented clinical and general English.

    python finetune_medasr.py --demo                                    # the whole job in small, offline, in minutes
    python finetune_medasr.py                                           # MedASR on all of AfriSpeech-200
    python finetune_medasr.py --accents yoruba igbo --domains clinical  # a part of it
    python finetune_medasr.py --dataset ./recordings --data_dir ./16khz # your own recordings
    python finetune_medasr.py run.yaml --learning_rate 1e-5             # a YAML file, flags on top of it
    python finetune_medasr.py --eval_only --model ./medasr-afrispeech-200/final
    python finetune_medasr.py --transcribe visit.wav recordings/        # with the model that a run has made
    torchrun --nproc_per_node 8 finetune_medasr.py

The path of the data: archives of the Hub repository, or your own recordings -> 16 kHz mono FLAC in memory-mapped Arrow
files -> length-grouped batches of log-mels -> LasrForCTC -> greedy CTC text -> word error rates by group -> report,
TensorBoard, model card.

torch, transformers and datasets are imported inside the functions that use them: they take seconds to load, and --help,
usage errors and the worker processes that convert audio should not wait for them.
"""

import argparse
import codecs
import contextlib
import csv
import dataclasses
import difflib
import errno
import functools
import glob
import gzip
import hashlib
import html
import html.entities
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import stat
import sys
import tarfile
import tempfile
import textwrap
import time
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

PROGRAM = "finetune_medasr.py"
HERE = Path(__file__).resolve().parent

DEFAULT_MODEL = "google/medasr"
DEFAULT_DATASET = "intronhealth/afrispeech-200"
# Earlier revisions of the repository leave out the transcripts of dev and test.
DEFAULT_DATASET_REVISION = "b538c6e111914a812af28ff677f8cffc9b404b7d"

LM_FILE = "lm_6.kenlm"  # in MedASR's repository: a 6-gram of its tokenizer's pieces

SAMPLE_RATE = 16_000  # Hz, what MedASR's feature extractor expects
SPLITS = ("train", "dev", "test")
DOMAINS = ("clinical", "general")
SILENCE = float(np.log(1e-5))  # LasrFeatureExtractor floors its mel energies at 1e-5, so a frame of 0.0 would be loud
IGNORED_LABEL = -100  # the label id that losses leave out, by convention in torch and transformers
WINDOW_OVERLAP_SECONDS = 2.0  # a side, as in the model card's pipeline call (chunk_length_s=20, stride_length_s=2)
CLIP_BYTES_LIMIT = 1_000_000_000  # a clip that decodes to more than this is a bomb, not speech
LOUDEST = 1e30  # full scale is 1; what comes near float32's limit overflows when it is resampled
FLAC_BYTES_AN_HOUR = 59e6  # of 16 kHz mono speech
SHUFFLE_CLIPS = 1_000  # clips that wait in the shuffling buffer of each streaming worker, about 100 MB
BOOTSTRAP_DRAWS = 10_000
ROOM_ADVICE = "free some disk; the same command goes on"
PAPER_SECONDS = 17  # the AfriSpeech authors' tables are of test clips shorter than this


class UsageError(Exception):
    """A flag or combination that cannot work: exit status 2."""


class RunError(Exception):
    """Something that went wrong while running: exit status 1."""


def say(text="", stream=None):
    """Print once, not once a process; to standard output if no `stream` is given."""
    if os.environ.get("RANK", "0") == "0":
        print(redact(text), file=stream, flush=True)


def warn(text):
    """A warning on stderr, in one line."""
    say(f"{PROGRAM}: warning: {' '.join(redact(text).split())}", sys.stderr)


def printable(name):
    """The name of a file, which need not be text, as some."""
    return os.fsencode(name).decode(errors="replace")


def one_line(error):
    """An exception as one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@contextlib.contextmanager
def explained(what, errors=OSError, advice=""):
    """Turn exceptions of the kinds `errors` into a RunError in one line: `what`, the exception, and `advice` if any."""
    try:
        yield
    except errors as error:
        raise RunError(f"{what} ({one_line(error)}){advice and ': '}{advice}") from error


# What gloo and NCCL say in the processes that are left.
LOST_PROCESS = re.compile(r"Connection (closed|reset) by peer|remote process exited|NCCL communicator was aborted")


def is_full_disk(error):
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def plural(count, noun):
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


SECRET = re.compile(r"(?<=://)[^/@\s]+(?=@)|\bhf_\w{4,}|(?:(?<=[_-]token[= ])|(?<=[_-]token: ))\S+")
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # characters that could move a terminal's cursor


def public(value):
    """`value` (JSON, or text) without tokens, and with absolute paths cut to their names: people publish it."""
    if isinstance(value, dict):
        return {name: public(item) for name, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    return re.sub(r"^(--[\w-]+=)?(?:[/~].*/|/)(?=.)", r"\1", redact(value)) if isinstance(value, str) else value


def redact(text):
    """`text` without tokens (of the environment, URLs and flags, what looks like the Hub's), harmless to print."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        text = text.replace(os.environ.get(name) or "\0", "***")
    return STEERING.sub("\ufffd", SECRET.sub("***", text))


class Stopped(KeyboardInterrupt):
    """A signal that ends the program, where it may: exit status 128 and its number."""

    advice = "the same command goes on from here"


LAUNCHER_SECONDS = 5  # in which torchrun or Slurm passes on a signal that the processes have got themselves


@dataclass
class StopSignals:
    """SIGTERM and Ctrl-C. They raise Stopped at once, or, where `deferred`, leave their `number` to be looked at.

    Training and scoring look after each update and batch, because several processes have to stop at the same one. A
    second signal ends the program at once, but for one that a launcher passes on to processes that have got it already.
    Worker processes leave signals to the program itself.
    """

    deferred: bool = False
    number: int | None = None
    since: float = 0.0
    process: int | None = None

    def install(self):
        import threading

        self.deferred, self.number, self.process = False, None, os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self.receive)

    def receive(self, number, frame):
        if os.getpid() != self.process:
            return
        if self.number and "RANK" in os.environ and time.monotonic() - self.since < LAUNCHER_SECONDS:
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

    def among_all(self, training):
        """The number of a signal that any of the processes has got, the same in each of them; 0 for none."""
        return agreed(self.number or 0, training, "MAX")


STOP_SIGNALS = StopSignals()


def agreed(number, training, choice="MIN"):
    """The smallest (or with "MAX" the largest) of the processes' integers, the same in each of them."""
    if training.world_size == 1:
        return int(number)
    import torch

    number = torch.tensor(int(number), device=training.device)
    torch.distributed.all_reduce(number, getattr(torch.distributed.ReduceOp, choice))
    return int(number)


SPENT = Counter()  # seconds of this start of the program, by what they were spent on


@contextlib.contextmanager
def spending(what):
    """Add the time of a block to SPENT."""
    start = time.monotonic()
    try:
        yield
    finally:
        SPENT[what] += time.monotonic() - start


@functools.cache
def mixed(*kinds):
    """A class of `kinds`, mixins first, named as the last: how classes here extend bases that are slow to import."""
    return type(kinds[-1].__name__, kinds, {"kinds": kinds})


# ---------------------------------------------------------------- configuration


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class ScriptArguments:
    """The script's own flags."""

    _argument_group_name = "this script"

    model: str = flag(DEFAULT_MODEL, "Hub id or local folder of the model")
    model_revision: str | None = flag(None, "branch, tag or commit of the model")
    dataset: str = flag(
        DEFAULT_DATASET,
        "Hub id or local folder, NAME:CONFIG for one of its configurations: AfriSpeech-200's layout, or your own",
    )
    dataset_revision: str | None = flag(
        None, f"commit of the corpus; for AfriSpeech-200 {DEFAULT_DATASET_REVISION[:7]} is pinned"
    )
    text_column: str | None = flag(None, "the column of your own recordings' texts, where the program cannot tell")
    data_dir: str = flag("./afrispeech-200-16khz", "where the prepared 16 kHz audio is kept")
    accents: list[str] | None = flag(None, "only these accents, e.g. yoruba 'akan (fante)'")
    domains: list[str] | None = flag(None, "only these domains: clinical, general")
    countries: list[str] | None = flag(None, "only these countries, two-letter codes, e.g. NG KE")
    max_train_seconds: float = flag(30.0, "leave longer clips out of training, in seconds")
    max_train_samples: int | None = flag(None, "train on a random choice of so many clips")
    max_eval_samples: int | None = flag(None, "evaluate on a random choice of so many dev clips")
    max_test_samples: int | None = flag(None, "score a random choice of so many test clips")
    target_text: Literal["as_written", "words"] = flag(
        "as_written", "train on the transcript as written, or on lower-case words alone"
    )
    spec_augment: bool = flag(
        True, "mask stretches of time and frequency in training (--no_spec_augment to switch off)"
    )
    overwrite_output_dir: bool = flag(False, "start anew: delete what an earlier run left in --output_dir")
    early_stopping_patience: int = flag(
        3, "stop after so many evaluations without a better dev WER; 0 never stops early"
    )
    skip_baseline: bool = flag(False, "do not score the untouched model first")
    window_seconds: float = flag(
        20.0, f"score longer clips in windows of so many seconds, overlapping by {WINDOW_OVERLAP_SECONDS:g} s a side"
    )
    num_proc: int | None = flag(None, "processes that prepare audio; all cores if not given")
    keep_archives: bool = flag(False, "keep the downloaded archives after they are converted")
    also_score: list[str] | None = flag(
        None, "score these test sets too, each a Hub dataset or a folder, before and after: what the model forgets"
    )
    streaming: bool = flag(False, "train on audio straight from the Hub, keeping none of it; needs --max_steps")
    prepare_only: bool = flag(False, "download and convert the audio, then stop")
    dry_run: bool = flag(False, "say what a run would do: clips, hours, disk, updates; no audio is fetched")
    eval_only: bool = flag(False, "score --model on the test split, then stop")
    score_file: str | None = flag(
        None, "write the report for any system's texts: JSON lines or CSV with text and pred_text"
    )
    transcribe: list[str] | None = flag(
        None, "print the text of these audio files, folders, patterns or - for standard input, then stop"
    )
    transcript_format: Literal["text", "json", "srt", "vtt"] = flag(
        "text", "write --transcribe's texts plain, with each word's time and confidence, or as subtitles"
    )
    transcript_dir: str | None = flag(None, "write --transcribe's texts into this folder, a file for each")
    format_dictation: bool = flag(
        False, "write dictated {period}, {comma}, {new paragraph} of --transcribe's texts as what they stand for"
    )
    lm: str | None = flag(
        None, f"decode with this n-gram of the model's tokens (ARPA or KenLM) too; auto: {LM_FILE} of the model"
    )
    lm_weight: float = flag(0.5, "what a natural log-probability of --lm counts beside one of the model")
    lm_word_score: float = flag(1.5, "what each token adds to a text's score: --lm alone prefers short ones")
    lm_beam: int = flag(8, "hypotheses that the search with --lm keeps at each frame")
    tune_lm: bool = flag(False, "choose --lm_weight and --lm_word_score on dev before the test clips are scored")
    demo: bool = flag(False, "run the whole job on the small model and corpus in tests/fixtures, offline")


@dataclass
class CommonTrainingArguments:
    """The `TrainingArguments` fields that people change, with this script's defaults."""

    _argument_group_name = "training (any other field of transformers' TrainingArguments works too: --help_all)"

    output_dir: str = flag(
        "./medasr-afrispeech-200", "where checkpoints, results, TensorBoard logs and the final model go"
    )
    learning_rate: float = flag(3e-5, "peak learning rate of AdamW")
    per_device_train_batch_size: str = flag(
        "auto", "clips a step and device; auto: 8 x --gradient_accumulation_steps an update, in steps that fit the GPU"
    )
    per_device_eval_batch_size: str = flag(
        "auto", "clips or windows a device when scoring; auto: as many seconds of audio as fit"
    )
    gradient_accumulation_steps: int = flag(4, "steps whose gradients make one update")
    num_train_epochs: float = flag(10.0, "passes over the training clips")
    max_steps: int = flag(-1, "updates in all; overrides the epochs if positive")
    warmup_steps: float = flag(500, "updates (or, below 1, share of all updates) over which the learning rate rises")
    eval_steps: int = flag(500, "updates between two evaluations on dev")
    save_steps: int = flag(500, "updates between two checkpoints; a multiple of --eval_steps")
    logging_steps: int = flag(25, "updates between two logged training losses")
    save_total_limit: int = flag(4, "checkpoints kept, the best among them")
    # Declared bool so that a bare --fp16 works; None means: where there is a CUDA GPU and no --bf16.
    fp16: bool = flag(
        None, "float16 on a CUDA GPU, with the modules that overflow it in float32; on there unless --bf16"
    )
    bf16: bool = flag(False, "bfloat16 mixed precision instead of float16")
    gradient_checkpointing: bool = flag(False, "recompute activations to save GPU memory")
    dataloader_num_workers: int | None = flag(
        None, "processes that decode audio for training; up to 8, by cores, if not given"
    )
    resume_from_checkpoint: str | None = flag(None, "a checkpoint's folder; the newest complete one if not given")
    seed: int = flag(42, "seed of everything random")


# What the Trainer needs for this job beside the fields above; each can still be set by its own flag.
TRAINING_DEFAULTS = dict(
    eval_strategy="steps",
    save_strategy="steps",
    load_best_model_at_end=True,
    metric_for_best_model="wer",
    greater_is_better=False,
    report_to=["tensorboard"],
    # Lengths come from a column: without one the sampler would decode every clip before the first step.
    train_sampling_strategy="group_by_length",
    length_column_name="num_samples",
    # The collator reads columns that are not arguments of the model.
    remove_unused_columns=False,
    # Its default follows the libraries' log level, which quiet_libraries lowers.
    disable_tqdm=False,
)

DEMO_SETTINGS = {
    "model": HERE / "tests/fixtures/model",
    "dataset": HERE / "tests/fixtures/corpus",
    "output_dir": "./medasr-demo",
    "data_dir": "./medasr-demo/audio",
    "learning_rate": 2e-3,
    "gradient_accumulation_steps": 2,
    "max_steps": 120,
    "warmup_steps": 15,
    "eval_steps": 40,
    "save_steps": 40,
    "logging_steps": 5,
    "spec_augment": False,  # a model this small underfits masked audio
    "dataloader_num_workers": 0,
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling a flag, and a default only where there is one."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=min(150, shutil.get_terminal_size().columns))

    def _format_action_invocation(self, action):
        is_switch = action.const is True or action.nargs == 0
        return action.option_strings[0] + ("" if is_switch else f" {self._format_args(action, action.dest.upper())}")

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, argparse.SUPPRESS) else super()._get_help_string(action)


def make_parser(*dataclass_types):
    """An HfArgumentParser over `dataclass_types` that raises UsageError instead of printing its usage."""
    from transformers.hf_argparser import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message):
            raise UsageError(message)

    texts = {"prog": PROGRAM, "usage": "%(prog)s [FILE.yaml] [flags]", "description": __doc__.split("\n\n")[0]}
    parser = Parser(dataclass_types, allow_abbrev=False, formatter_class=HelpFormatter, **texts)
    parser.add_argument("--help_all", action="store_true", help="show every flag, those of TrainingArguments included")
    return parser


def read_config_file(path):
    """The settings in a YAML file, a dict; raises UsageError."""
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as a YAML file of flags ({one_line(error)})") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{path} holds a {type(settings).__name__}; it must hold lines of the form 'flag: value'")
    return settings


def as_flags(settings):
    """The command line that a dict stands for: {"learning_rate": 1e-5} is --learning_rate 1e-5."""
    flags = []
    for name, value in settings.items():
        if value is not None:
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            flags += [f"--{name}", *map(str, values)]
    return flags


def parse_arguments(argv):
    """(ScriptArguments, TrainingArguments) for a command line; raises UsageError.

    The script's own flags are checked first, before torch is imported.
    """
    quiet_libraries()
    if argv and not argv[0].startswith("-"):
        argv = as_flags(read_config_file(argv[0])) + argv[1:]
    if "--demo" in argv:
        # A model this small gains nothing from a second thread, and loses much where it has to wait for one.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        argv = as_flags(DEMO_SETTINGS) + argv
    parser = make_parser(ScriptArguments, CommonTrainingArguments)
    script, common, others, rest = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if others.help_all:
        from transformers import TrainingArguments

        make_parser(ScriptArguments, TrainingArguments).print_help()
        raise SystemExit(0)
    given = {token.partition("=")[0][2:].replace("-", "_") for token in rest if token.startswith("--")}
    own = Path(common.output_dir).expanduser() / "final"
    if (
        script.transcribe
        and (own / "config.json").is_file()
        and not any(re.match("--model(=|$)", token) for token in argv)
    ):
        script.model = str(own)
        say(f"transcribing with {own}; --model chooses another", sys.stderr)
    for problem in refusals(script, common, given):
        raise UsageError(problem)
    return script, make_training_arguments(vars(common), rest, script)


AUTO_BATCH_SIZE = 8  # clips a step without a GPU; times the accumulation steps, what an update has on each device
BATCH_SIZES = ("per_device_train_batch_size", "per_device_eval_batch_size")
BOUNDS = {
    "above 0": """max_train_seconds window_seconds max_train_samples max_eval_samples max_test_samples num_proc
        learning_rate per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps
        num_train_epochs eval_steps save_steps logging_steps lm_beam""",
    "0 or more": "lm_weight early_stopping_patience warmup_steps dataloader_num_workers save_total_limit seed",
}
MODES = ("prepare_only", "dry_run", "eval_only", "score_file", "transcribe")
STRATEGIES = {"eval_strategy", "save_strategy", "load_best_model_at_end"}  # the Trainer checks them itself
# What the code relies on; another value breaks the training, or the loss, half-way.
FIXED = {"remove_unused_columns": False, "length_column_name": "num_samples", "label_smoothing_factor": 0.0}


@functools.cache
def known_flags():
    """The names of all flags, TrainingArguments' from its source: importing it takes too long for a typing error."""
    from importlib.util import find_spec

    source = Path(find_spec("transformers").origin).with_name("training_args.py").read_text(encoding="utf-8")
    own = [item.name for item in dataclasses.fields(ScriptArguments)]
    return own + re.findall(r"^    (\w+): .*=", source, re.MULTILINE)


def unknown_flag(found):
    near = difflib.get_close_matches(found.lstrip("-"), known_flags(), n=3)
    hint = f"did you mean {' or '.join('--' + name for name in near)}?" if near else "see --help"
    return f"unknown flag or stray value {found}; {hint}"


# Of what a run makes in --output_dir; it replaces these, and --overwrite_output_dir deletes them.
MADE_BY_A_RUN = re.compile(r"(?:final|results|runs|run\.json|checkpoint-\d+)(?:/|$)")


def made_by_a_run(path, output_dir):
    """Whether `path` lies in what a run replaces or deletes in `output_dir`."""
    path, output = (Path(folder).expanduser().resolve() for folder in (path, output_dir))
    return path.is_relative_to(output) and bool(MADE_BY_A_RUN.match(path.relative_to(output).as_posix()))


def folder_refusals(script, common):
    """Yield folders that cannot be written to, and those that a run would delete with what it makes itself."""
    output, resumed = common.output_dir, common.resume_from_checkpoint
    folders = ("output_dir", output), ("data_dir", script.data_dir), ("transcript_dir", script.transcript_dir)
    for name, folder in folders if script.transcript_dir is not None else folders[:2]:
        path = Path(folder).expanduser().absolute()
        found = next(parent for parent in (path, *path.parents) if parent.exists())
        if not folder.strip():
            yield f"--{name} is empty; give a folder"
        if not found.is_dir():
            yield f"--{name} is {folder}: {found} is a file, not a folder; choose another"
        if not os.access(found, os.W_OK | os.X_OK):
            yield f"--{name} is {folder}: {found} cannot be written to; choose another"
    if made_by_a_run(script.data_dir, output):
        advice = "choose another, such as a folder beside it"
        yield f"--data_dir is {script.data_dir}, which a run under --output_dir {output} replaces; {advice}"
    if resumed and resumed.lower() not in ("true", "false") and not Path(resumed).is_dir():
        yield f"--resume_from_checkpoint is {resumed}: there is no such folder; give a complete checkpoint"
    for name, value in (("model", script.model), ("dataset", script.dataset), ("resume_from_checkpoint", resumed)):
        if script.overwrite_output_dir and value and made_by_a_run(value, output):
            yield f"--overwrite_output_dir would delete --{name} {value}; choose another --output_dir"


def lm_refusals(script):
    """Yield what cannot work with a language model."""
    from importlib.util import find_spec

    if not np.isfinite(script.lm_word_score):
        yield f"--lm_word_score is {script.lm_word_score:g}; it must be a finite number"
    if script.tune_lm and not script.lm:
        yield "--tune_lm needs --lm: there is nothing to tune without a language model"
    if script.tune_lm and script.transcribe:
        yield "--tune_lm needs the dev clips of a corpus: use it with --eval_only, and what it finds with --transcribe"
    if script.lm and script.score_file:
        yield "--lm needs a model to decode, and --score_file has texts alone; leave one of them out"
    if script.lm and not find_spec("flashlight"):
        yield "--lm needs a package that is not installed: pip install flashlight-text"
    if script.lm not in (None, "auto") and not Path(script.lm).is_file():
        yield f"--lm is {script.lm}: there is no such file; give an n-gram in ARPA or KenLM format, or auto"


def refusals(script, common, given):
    """Yield what cannot work, each in a line that names the flag, the value found and the valid ones.

    `given` holds the names of the other flags on the command line.
    """
    for name in BATCH_SIZES:
        if re.fullmatch(r"-?\d+", text := getattr(common, name)):
            setattr(common, name, int(text))
        elif text != "auto":
            yield f"--{name} is {text}; it must be a number of clips, or auto"
    settings = {**vars(script), **vars(common)}
    for name in sorted(given):
        if name.removeprefix("no_") not in known_flags():
            yield unknown_flag(f"--{name}")
    for bound, name in [(bound, name) for bound, names in BOUNDS.items() for name in names.split()]:
        value = settings[name]
        if value not in (None, "auto") and not (0 <= value < float("inf") and (value or bound == "0 or more")):
            yield f"--{name} is {value:g}; it must be {bound}, and finite"
    if common.seed >= 2**32:
        yield f"--seed is {common.seed}; it must be below 2**32"
    if script.window_seconds < 3 * WINDOW_OVERLAP_SECONDS:
        yield f"--window_seconds is {script.window_seconds:g}; it must be at least {3 * WINDOW_OVERLAP_SECONDS:g}"
    if common.max_steps != -1 and common.max_steps < 1:
        yield f"--max_steps is {common.max_steps}; it must be above 0, or -1 for --num_train_epochs"
    if common.save_steps % common.eval_steps and not given & STRATEGIES:
        what = f"--save_steps {common.save_steps} is not a multiple of --eval_steps {common.eval_steps}"
        yield f"{what}, so the best model could not be kept"
    yield from folder_refusals(script, common)
    for country in script.countries or []:
        if not re.fullmatch("[A-Za-z]{2}", country):
            yield f"--countries has '{country}'; countries are two letters, such as NG, KE or ZA"
    for domain in script.domains or []:
        if domain not in DOMAINS:
            yield f"--domains has '{domain}'; the domains are {' and '.join(DOMAINS)}"
    for names in (MODES, ("fp16", "bf16")):
        chosen = [name for name in names if settings[name]]
        if len(chosen) > 1:
            yield f"--{chosen[0]} and --{chosen[1]} cannot be used together; choose one"
    yield from lm_refusals(script)
    if script.streaming and common.max_steps <= 0:
        yield "--streaming needs --max_steps: a stream has no length, so its epochs cannot be counted"
    if script.streaming and script.max_train_samples:
        yield "--max_train_samples cannot be used with --streaming: choose a part by --accents or --domains"
    if script.also_score and (script.score_file or script.transcribe):
        yield "--also_score is of use in a run and with --eval_only, not with --score_file or --transcribe"
    stems = [file_stem(name) for name in further_names(script)]
    for name, stem in zip(further_names(script), stems):
        if stem in SPLITS or stems.count(stem) > 1:
            what = f"which names a split or is there twice (as '{stem}')"
            yield f"--also_score has '{name}', {what}; give it another path"
    named = [(name, settings[name]) for name in ("model", "dataset")]
    for name, value in named + [("also_score", value) for value in script.also_score or ()]:
        if not value.strip():
            yield f"--{name} is empty; give a folder or a Hub id such as {DEFAULT_MODEL}"
        folder = value if name == "model" else split_config(value)[0]
        if re.match(r"[./~]", value) and not Path(folder).expanduser().is_dir():
            yield f"--{name} is {value}: there is no such folder; give a folder or a Hub id such as {DEFAULT_MODEL}"
    if script.score_file is not None and not Path(script.score_file).is_file():
        yield f"--score_file is {script.score_file}: there is no such file"
    if script.transcribe:
        find_recordings(script)
    for name in ("transcript_format", "transcript_dir", "format_dictation"):
        if not script.transcribe and settings[name] not in ("text", None, False):
            yield f"--{name} is of use with --transcribe only"


def make_training_arguments(common, rest, script):
    """`TrainingArguments` from the common flags and the remaining ones; raises UsageError for what it does not know."""
    from transformers import TrainingArguments
    from transformers.integrations import get_reporting_integration_callbacks

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    script.num_proc = script.num_proc or cores
    if common["dataloader_num_workers"] is None:
        common["dataloader_num_workers"] = min(8, cores - 1)
    automatic = {name for name in BATCH_SIZES if common[name] == "auto"}
    common |= dict.fromkeys(automatic, AUTO_BATCH_SIZE)
    parser = make_parser(TrainingArguments)
    parser.set_defaults(**TRAINING_DEFAULTS, **common)
    values, unknown = parser.parse_known_args(rest)
    if unknown:
        raise UsageError(unknown_flag(unknown[0].partition("=")[0]))
    del values.help_all
    for name in ("fsdp", "deepspeed"):
        if getattr(values, name) or os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true":
            raise UsageError(
                f"--{name} is not supported: a model of this size needs no sharding; torchrun gives each GPU a copy"
            )
    check_training_values(values)
    import torch

    has_gpu = torch.cuda.is_available() and not values.use_cpu
    if values.fp16 and not has_gpu:
        raise UsageError("--fp16 needs a CUDA GPU, and there is none; leave it out")
    values.fp16 = has_gpu and not values.bf16 if values.fp16 is None else values.fp16
    try:
        training = TrainingArguments(**vars(values))
        get_reporting_integration_callbacks(training.report_to)  # raises for a name that it does not know
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    script.push_to_hub, training.push_to_hub = training.push_to_hub, False  # at the end, and what is complete
    if training.hub_token:
        # Kept in the environment alone: the Trainer pickles its arguments into every checkpoint.
        os.environ["HF_TOKEN"], training.hub_token = training.hub_token, None
    training.auto_train_batch, training.auto_eval_batch = (name in automatic for name in BATCH_SIZES)
    training.batch_limit = None  # clips a step that still fit, where an earlier start of the run has filled the memory
    use_one_gpu(training)
    return training


def check_training_values(values):
    """Refuse values of TrainingArguments' fields that it takes itself and that fail only later, or go unnoticed."""
    for name, value in vars(values).items():
        if isinstance(value, float) and not np.isfinite(value):
            raise UsageError(f"--{name} is {value:g}; it must be a finite number")
    for name, needed in FIXED.items():
        if getattr(values, name) != needed:
            raise UsageError(f"--{name} is {getattr(values, name)}; this program needs {needed}: leave the flag out")
    best = values.metric_for_best_model
    if not re.fullmatch(r"(eval_)?(wer|cer|loss|wer_by_domain/(clinical|general))", best or "wer"):
        raise UsageError(
            f"--metric_for_best_model is {best}; it must be wer, cer, loss, wer_by_domain/clinical or "
            "wer_by_domain/general"
        )


def use_one_gpu(training):
    """Keep the Trainer from wrapping the model in nn.DataParallel, which is slower than one process a GPU."""
    if (count := training.n_gpu) > 1:
        say(f"{count} GPUs are here and one is used; for all start torchrun --nproc_per_node {count} {PROGRAM}")
        training._n_gpu = 1


def quiet_libraries():
    """Keep the libraries' advice off the screen: the script says itself what a user needs to know."""
    import threading
    import warnings

    # TensorBoard writes in a thread, and raises the same in the program itself.
    threading.excepthook = lambda failed: is_full_disk(failed.exc_value) or threading.__excepthook__(failed)

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # OpenMP's threads spin while they wait for each other, by default. Where another process wants a core too, be it a
    # worker that decodes audio, the small steps of a model then take many times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    warnings.filterwarnings("ignore", message="Glyph|Tight layout")  # matplotlib's, of names in the pictures
    from transformers.utils import logging

    logging.disable_progress_bar()


# ---------------------------------------------------------------- Hub


@contextlib.contextmanager
def explained_hub_errors(repo, kind):
    """Turn the Hub client's exceptions about `repo` (a "model" or "dataset") into one line that says what to do."""
    import httpx2
    from huggingface_hub import errors

    known = errors.EntryNotFoundError, errors.RevisionResolutionError, errors.HFValidationError
    try:
        yield
    except (httpx2.HTTPError, OSError, *known) as error:
        # A server that answers 5xx comes out as "not found locally", with the answer as its cause.
        behind = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
        cause = behind if isinstance(behind, errors.HfHubHTTPError) else error
        raise RunError(f"{kind} {repo} {hub_advice(cause, repo, kind)}") from cause


def unreachable_errors():
    """The exceptions that say that the Hub cannot be reached."""
    import httpx2
    from huggingface_hub import errors

    return errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx2.ConnectError


def hub_advice(error, repo, kind):
    """What an exception of the Hub client means, and what to do."""
    from huggingface_hub import constants, errors, get_token

    terms = f"accept its terms at {constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    denied = f"is gated and your account has no access to it: {terms} with the account that 'hf auth whoami' names"
    anonymous = f"is gated and you are not logged in: {terms}, then run 'hf auth login' (or set HF_TOKEN)"
    absent = f"is not on this machine and {constants.ENDPOINT} cannot be reached"
    no_revision = errors.RevisionNotFoundError, errors.RevisionResolutionError
    meanings = (  # some exceptions are kinds of others below them
        (errors.GatedRepoError, anonymous if get_token() is None else denied),
        (errors.RepositoryNotFoundError, f"is not on the Hub, or is private: check --{kind}, or run 'hf auth login'"),
        (errors.HFValidationError, f"is neither a local folder nor a Hub id of the form owner/name: check --{kind}"),
        (no_revision, f"has no such revision: check --{kind}_revision"),
        (unreachable_errors(), f"{absent}: go online, or give --{kind} a local folder"),
        (errors.EntryNotFoundError, f"lacks a file that it should have ({one_line(error)}): check --{kind}_revision"),
    )
    for exceptions, meaning in meanings:
        if isinstance(error, exceptions):
            return meaning
    if getattr(getattr(error, "response", None), "status_code", None) == 401:
        return "cannot be read, because your token is not valid: run 'hf auth login' again, or unset HF_TOKEN"
    return f"could not be read ({one_line(error)}): run the same command again, what is finished is kept"


def model_source(args):
    """The folder or Hub id of the model; raises RunError if its first file, where a gated model shows, is not there."""
    from huggingface_hub import hf_hub_download

    folder = Path(args.model).expanduser()
    if not folder.is_dir():
        with explained_hub_errors(args.model, "model"):
            hf_hub_download(args.model, "config.json", revision=args.model_revision)
        return args.model
    for pattern in ("config.json", "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise RunError(
                f"model {args.model} has no {pattern}: give a folder with a model's config.json, its weights as "
                "safetensors (others can hold code and are not loaded) and its processor"
            )
    return str(folder)


def not_finite(model):
    """The name of a floating-point weight or statistic of `model` that is not finite, "" if there is none."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return name
    return ""


def load_processor_and_model(args, trains=False):
    """The processor and the float32 CTC model that `args.model` names; raises RunError that says what to do.

    Raises UsageError if the run `trains` and the model is of a kind that cannot be trained.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCTC, AutoProcessor

    source, revision = model_source(args), args.model_revision
    # trust_remote_code: by default it asks on the terminal. use_safetensors: a pickle runs what it holds.
    options = dict(dtype="float32", use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True)
    refusals = OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError
    try:
        processor = AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
        model, loading = AutoModelForCTC.from_pretrained(source, revision=revision, trust_remote_code=False, **options)
    except refusals as error:
        problem = f"cannot be loaded as a CTC model with its processor ({one_line(error)})"
        if "trust_remote_code" in str(error):
            problem = "needs code of its own, and no code of a model is run"
        raise RunError(f"model {args.model} {problem}") from error
    if problem := model_problem(processor, model, loading):
        raise RunError(f"model {args.model} {problem}; it cannot be used")
    if trains and model.config.model_type != "lasr_ctc":
        raise UsageError(
            f"--model {args.model} is a {model.config.model_type} model: only MedASR's kind (lasr_ctc) can be "
            "fine-tuned; any CTC model can be scored with --eval_only"
        )
    return processor, model


def model_problem(processor, model, loading):
    """Why a model that was loaded cannot be used, "" if it can; `loading` is what transformers says of its weights."""
    import torch

    if not hasattr(processor, "tokenizer") or not hasattr(processor, "feature_extractor"):
        return "has no feature extractor and tokenizer together, and needs both"
    for name, found, needed in sorted(loading["mismatched_keys"]):
        return f"has weights that do not fit its config.json: {name} is {tuple(found)}, not {tuple(needed)}"
    # The library fills them with noise. wav2vec2's mask is used in its own pre-training alone.
    if missing := sorted(name for name in loading["missing_keys"] if "masked_spec_embed" not in name):
        return f"lacks {plural(len(missing), 'weight')} of its kind, such as {missing[0]}"
    if broken := not_finite(model):
        return f"holds weights that are not finite, in {broken}"
    rate = processor.feature_extractor.sampling_rate
    if rate != SAMPLE_RATE:
        return f"takes audio of {rate:,} Hz, not {SAMPLE_RATE:,} Hz"
    encoder = LabelEncoder(processor.tokenizer, model.config.vocab_size, "as_written")
    if not decode_ids(processor, encoder(["patient PATIENT"])[0]):
        return "has a tokenizer without letters, or for another vocabulary than its head's"
    try:
        batch = CTCCollator(processor.feature_extractor)([{"samples": np.zeros(SAMPLE_RATE, np.float32)}])
        with torch.inference_mode():
            model.eval()(**model_inputs(batch, processor.feature_extractor, "cpu"))
    except (RuntimeError, ValueError, TypeError) as error:
        return f"does not fit its processor ({one_line(error)})"
    return ""


def push_to_hub(training, final=None):
    """Make the repository that --push_to_hub means, and upload the folder `final`, if given, in one commit."""
    import httpx2
    from huggingface_hub import create_repo, upload_folder

    name = training.hub_model_id or Path(training.output_dir).resolve().name
    sending = f"the model is complete in {final}, 'hf upload' sends it"
    advice = sending if final else "run 'hf auth login' with a token that may write"
    failures = httpx2.HTTPError, OSError, ValueError
    with explained(f"--push_to_hub: {name} cannot be written on the Hub", failures, advice):
        repo = create_repo(name, private=training.hub_private_repo, exist_ok=True)
        if final:
            upload_folder(repo_id=repo.repo_id, folder_path=final, commit_message="Upload the final model")
            say(f"uploaded to {repo}")


RETRIES = 6  # drops of a connection in a row without a byte of progress, waited for 1, 2, 4, ... seconds


class HubStream(io.RawIOBase):
    """A file of a dataset on the Hub as a stream of bytes from `position` on, through dropped connections.

    After resets, time-outs and stalls it goes on from the byte reached, which hf_hub_download does by 10 MiB chunks and
    not across processes; answers of 5xx and 429 (with its Retry-After) are the Hub client's to wait for. Raises the
    client's exceptions when nothing more arrives.
    """

    def __init__(self, corpus, path, position=0):
        from huggingface_hub import hf_hub_url

        self.url = hf_hub_url(corpus.name, path, repo_type="dataset", revision=corpus.revision)
        self.size = corpus.files[path][0]
        self.position = position
        self.chunks, self.rest = self._chunks(), b""

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        if position != self.position:
            self.chunks.close()
            self.position, self.chunks, self.rest = position, self._chunks(), b""
        return position

    def _chunks(self):
        """Yield the bytes from `position` on, over a connection that ends with this generator."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status
        from huggingface_hub.utils._http import http_stream_backoff

        headers = {**build_hf_headers(), "Range": f"bytes={self.position}-", "Accept-Encoding": "identity"}
        options = dict(headers=headers, follow_redirects=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        with http_stream_backoff("GET", self.url, retry_on_exceptions=(), **options) as response:
            hf_raise_for_status(response)
            if self.position and response.status_code != 206:
                raise OSError(f"{self.url} ignores byte ranges")
            yield from response.iter_raw(1 << 16)

    def readinto(self, buffer):
        import httpx2

        if self.position >= self.size:
            return 0
        for attempt in range(RETRIES):
            if attempt:
                time.sleep(2 ** (attempt - 1))
                self.chunks = self._chunks()
            try:
                self.rest = self.rest or next(self.chunks, b"")
            except httpx2.TransportError:
                if attempt == RETRIES - 1:
                    raise
            if self.rest:
                count = min(len(buffer), len(self.rest))
                buffer[:count], self.rest = self.rest[:count], self.rest[count:]
                self.position += count
                return count
        raise OSError(f"{self.url} ends after {self.position:,} of {self.size:,} bytes")

    def close(self):
        self.chunks.close()
        super().close()


def download(corpus, path, target):
    """Fetch a file of the corpus to `target`, complete with the Hub's checksum, or absent; goes on where it stopped."""
    from filelock import FileLock

    size, checksum = corpus.files[path]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    with FileLock(f"{partial}.lock"):
        for _ in range(2):
            if target.exists() and target.stat().st_size == size:  # by another process, meanwhile
                return
            with open(partial, "ab") as file, HubStream(corpus, path, file.tell()) as stream:
                shutil.copyfileobj(stream, file, 1 << 20)
            with open(partial, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if partial.stat().st_size == size and checksum in (None, found):
                os.replace(partial, target)
                return
            partial.unlink()
    raise RunError(f"{path} was fetched twice and is not what the Hub announces ({size:,} bytes, sha256 {checksum})")


# ---------------------------------------------------------------- corpus


def slugify(accent):
    """The folder of an accent in the Hub repository: 'Akan (Fante)' -> 'akan-fante'."""
    return re.sub(r"[^a-z0-9]+", "-", accent.lower()).strip("-")


def clip_key(path):
    """'<session>/<file>', the last two components: a file name alone occurs in more than one session."""
    return "/".join(path.strip("/").split("/")[-2:])


@dataclass
class Corpus:
    """The AfriSpeech-200 repository, on the Hub or as a local folder, and its prepared form under `data_dir`.

    `files` maps each path in the repository to [its size in bytes, its sha256 on the Hub or its time of change in a
    folder]; `stamps` each archive of a folder to what `files` said of it and its transcripts when it was converted.
    `chosen` are the folders of the accents that a run is of, None for all. `made` are the splits that the program made
    itself, which AfriSpeech-200 needs none of.
    """

    layout = "archives"
    made = ()

    name: str
    revision: str | None
    folder: Path | None
    data_dir: Path
    keep_archives: bool
    files: dict[str, list] = field(default_factory=dict)
    stamps: dict[str, list] = field(default_factory=dict)
    chosen: set[str] | None = None
    config: str = ""

    def find(self, pattern, splits):
        """The paths of `splits` that match `pattern`, whose groups are the accent and the split."""
        found = [match for match in map(re.compile(pattern).fullmatch, sorted(self.files)) if match]
        chosen = [match for match in found if self.chosen is None or match[1] in self.chosen]
        return [match[0] for split in splits for match in chosen if match[2] == split]

    def archives(self, *splits):
        return self.find(r"audio/([^/]+)/([^/]+)/[^/]+\.tar\.gz", splits)

    def tables(self, *splits):
        """The paths of the transcripts."""
        return self.find(r"transcripts/([^/]+)/([^/]+)\.csv", splits)

    def size(self, paths):
        """Bytes of files of the repository."""
        return sum(self.files[path][0] for path in paths)

    def prepared_path(self, archive):
        return self.data_dir / archive.split("/")[2] / (Path(archive).name.removesuffix(".tar.gz") + ".arrow")

    def stamp(self, archive):
        _, accent, split, _ = archive.split("/")
        return [self.files[archive], self.files.get(f"transcripts/{accent}/{split}.csv")]

    def unprepared(self, archives):
        """Those of `archives` that are not converted, or have changed since then, they or their transcripts."""
        return [
            path
            for path in archives
            if not self.prepared_path(path).exists() or self.stamps.get(path, self.stamp(path)) != self.stamp(path)
        ]

    def read_stamps(self):
        """Have the `stamps` as another process may have written them since."""
        self.stamps = (read_json(self.data_dir / "source.json") or {}).get("stamps", {})

    def write_source(self, converted=()):
        """Note down what the prepared files come from, those of the archives `converted` as these are now."""
        self.read_stamps()
        self.stamps |= {path: self.stamp(path) for path in converted}
        source = {"dataset": self.identity(), "revision": self.revision, "stamps": self.stamps}
        source["files"] = {} if self.folder else self.files
        write_text(self.data_dir / "source.json", json.dumps(source, indent=1))

    def identity(self):
        """The folder or Hub id, with its configuration, that the prepared files come from."""
        return f"{self.folder or self.name}{self.config and ':'}{self.config}"

    def find_local(self, path):
        """Where a file of the repository lies on this machine, None if it does not, or is of another version."""
        if self.folder:
            return self.folder / path
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.name, path, repo_type="dataset", revision=self.revision)
        places = [*([Path(cached)] if isinstance(cached, str) else []), self.data_dir / "hub" / path]
        return next((place for place in places if place.exists() and place.stat().st_size == self.files[path][0]), None)

    @contextlib.contextmanager
    def open(self, path):
        """A file of the repository as a stream of bytes: the local file, or as much of the Hub's as is asked for."""
        local = self.find_local(path)
        with (
            contextlib.nullcontext() if local else explained_hub_errors(self.name, "dataset"),
            open(local, "rb") if local else io.BufferedReader(HubStream(self, path), 1 << 16) as stream,
        ):
            yield stream

    def fetch(self, path):
        """The local path of a file of the repository, downloaded if need be; raises RunError."""
        if local := self.find_local(path):
            return local
        target = self.data_dir / "hub" / path
        with explained_hub_errors(self.name, "dataset"):
            download(self, path, target)
        return target

    def files_of(self, archive):
        """The paths of the files that an archive is made of."""
        return [archive]

    def release(self, archive):
        """Delete what we downloaded of an archive; a file in the user's folder or cache is never touched."""
        if self.keep_archives or self.folder:
            return
        for path in self.files_of(archive):
            target = self.data_dir / "hub" / path
            target.unlink(missing_ok=True)
            target.with_name(target.name + ".partial.lock").unlink(missing_ok=True)

    def transcripts(self, accent, split):
        """{clip key: row} of one accent's CSV in a split; the first of rows with the same path counts."""
        path = f"transcripts/{accent}/{split}.csv"
        rows = {}
        for row in read_transcripts(self.fetch(path))[0] if path in self.files else ():
            if audio_path := row.get("audio_paths") or row.get("audio_path"):
                rows.setdefault(clip_key(audio_path), row)
        return rows

    def rows(self, split):
        """The rows of a split as its transcripts announce them, without audio."""
        return [
            clip_row(key, split, accent, row)
            for accent in [path.split("/")[1] for path in self.tables(split)]
            for key, row in self.transcripts(accent, split).items()
        ]

    def accents(self):
        """The folders of the accents."""
        return {path.split("/")[1] for path in self.files if re.match(r"(audio|transcripts)/[^/]+/", path)}

    def make_splits(self, splits, seed, unnamed="train"):
        """AfriSpeech-200 has all of them."""

    def part(self, archive):
        """What a worker process needs to convert an archive."""
        return self

    def clips(self, archive):
        """Yield the rows of an archive's prepared file; damage ends it with a row that says so."""
        _, accent, split, _ = archive.split("/")
        rows, count, seen = self.transcripts(accent, split), 0, set()
        with self.open(archive) as stream:
            try:
                for name, audio, problem in archive_members(stream):
                    key = clip_key(name)
                    row = clip_row(key, split, accent, rows.get(key))
                    absent = row["problem"] if key in rows else "no transcript"
                    problem = problem or absent or ("a second copy" if key in seen else "")
                    seen.add(key)
                    yield make_clip(row, audio, problem)
                    count += 1
            except DAMAGE as error:
                problem = f"damaged archive ({one_line(error)}): {plural(count, 'clip')} of it kept"
                yield make_clip(clip_row(archive, split, accent, None), None, problem)

    def split_clips(self, clips, split):
        """Those of the prepared `clips`, a Dataset, that are of a split and of the accents chosen."""
        return clips

    def fetch_transcripts(self, splits):
        """Have every CSV of `splits` here, some hundred, so several at once; warns of defects."""
        from concurrent.futures import ThreadPoolExecutor

        paths = self.tables(*splits)
        with ThreadPoolExecutor(8) as pool:
            for path, local in zip(paths, pool.map(self.fetch, paths)):
                for note in read_transcripts(local)[1]:
                    warn(f"{path}: {note}")


MENDED_QUOTES = 100  # in a file with more unclosed quotes than these none is taken for one
SURPLUS = "more cells than columns"  # the key, in such a row of a CSV, of why it is not used


def read_text(path):
    """(text, notes on what was mended) of a file of text; raises RunError if it cannot be read or is none."""
    with explained(f"{path} cannot be read"):
        data = Path(path).read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise RunError(f"{path} is a Git LFS pointer, not the file: run 'git lfs pull'")
    try:
        utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return data.decode("utf-16" if utf_16 else "utf-8-sig"), []
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace"), ["it is not UTF-8 and was read as Latin-1 (Windows-1252)"]


def json_lines(text):
    """What each line of a text holds as JSON, but for blank ones; raises ValueError or RecursionError."""
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def read_transcripts(path, columns=(("transcript",), ("audio_paths", "audio_path"))):
    """(rows, a dict each; notes on what was mended) of a CSV that has one of each of `columns`; raises RunError.

    csv, not pandas: the country code NA is Namibia, and no cell may turn into a NaN.
    """
    (text, notes), rows, start, quoting = read_text(path), [], 1, csv.QUOTE_MINIMAL
    lines = list(io.StringIO(text.replace("\0", ""), newline=""))
    header = lines[0] if lines else ""
    delimiter = max(",;\t", key=header.count)
    names = next(csv.reader([header], delimiter=delimiter), [])
    for needed in columns:
        if not set(needed) & set(names):
            found = " ".join(", ".join(names)[:200].split()) or "none"
            raise RunError(f"{path} has no column {' or '.join(needed)}; its columns are {found}")
    csv.field_size_limit(2**31 - 1)  # an unclosed quote swallows what follows, which is found below
    broken, surplus = [], []
    while start < len(lines):
        # Strict: otherwise an unclosed quote may join two rows into one with the right number of cells.
        rest = map(lines.__getitem__, range(start, len(lines)))
        reader = csv.reader(rest, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            cells = next(reader)
            closed = reader.line_num == 1 or len(cells) in (0, len(names))
        except csv.Error:
            cells = next(csv.reader(lines[start : start + 1], delimiter=delimiter, quoting=quoting), [])
            closed = reader.line_num == 1 and len(cells) == len(names)
        if not closed:
            # A quote that is not: its line is taken as it stands, and reading goes on behind it.
            broken.append(start + 1)
            cells = [cell.strip('"') for cell in lines[start].rstrip("\r\n").split(delimiter)]
            quoting = csv.QUOTE_NONE if len(broken) > MENDED_QUOTES else quoting
        rows += [dict(zip(names, cells))] if cells else []
        if any(cell.strip() for cell in cells[len(names) :]):
            surplus.append(start + 1)
            rows[-1][SURPLUS] = f"{SURPLUS} (line {start + 1}): its text needs quotes"
        start += reader.line_num if closed else 1
    if broken:
        notes.append(f"{plural(len(broken), 'unclosed quote')}, the first in line {broken[0]}: read as they stand")
    if surplus:
        notes.append(f"{plural(len(surplus), 'row')} with {SURPLUS}, the first in line {surplus[0]}: not used")
    return rows, notes


def split_config(dataset):
    """(folder or Hub id, configuration or "") that a --dataset names."""
    if Path(dataset).expanduser().is_dir():
        return dataset, ""
    name, _, config = dataset.partition(":")
    return name, config


def open_corpus(args):
    """The `Corpus` of `args`, with its files listed; raises RunError or UsageError."""
    name, config = split_config(args.dataset)
    folder = Path(name).expanduser()
    folder = folder.resolve() if folder.is_dir() else None
    revision = args.dataset_revision or (DEFAULT_DATASET_REVISION if args.dataset == DEFAULT_DATASET else None)
    corpus = Corpus(name, revision, folder, Path(args.data_dir).expanduser(), args.keep_archives, config=config)
    stored = read_json(corpus.data_dir / "source.json") or {}
    held, asked = [stored.get("dataset"), stored.get("revision")], [corpus.identity(), revision]
    if stored and held != asked:
        raise UsageError(
            f"--data_dir {args.data_dir} holds audio of {held[0]} at revision {held[1]}, not of {asked[0]} at "
            f"{asked[1]}; choose another --data_dir"
        )
    if folder:
        corpus.files = list_folder(folder)
    elif stored and re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        corpus.files = stored["files"]  # a commit never changes: no network is needed to go on
    else:
        try:
            corpus.files = list_hub_files(name, revision)
        except RunError as error:
            if not stored or not isinstance(error.__cause__, unreachable_errors()):
                raise
            say("  the Hub cannot be reached: taken as it was when it was listed last")
            corpus.files = stored["files"]
    corpus.stamps = stored.get("stamps", {})
    if not corpus.archives(*SPLITS):
        corpus = open_recordings(corpus, args)
    elif config or args.text_column:
        what = f"--text_column is {args.text_column}" if args.text_column else f"--dataset names '{config}'"
        raise UsageError(f"{what}; {name} is in AfriSpeech-200's layout, which has none to choose: leave it out")
    corpus.write_source()
    corpus.chosen = chosen_accents(corpus, args.accents)
    return corpus


def files_below(folder):
    """The paths of all files in a folder and below it; raises OSError where rglob would pass over a part.

    Links to folders elsewhere are followed, each of these folders once and none that holds another: links may go round.
    """
    top = Path(folder).resolve()
    roots, above, found = {top}, set(top.parents), []

    def refuse(error):
        raise error

    def is_new(path):
        if os.path.islink(path):
            real = Path(path).resolve()
            if real in above or roots & {real, *real.parents}:
                return False
            roots.add(real)
            above.update(real.parents)
        return True

    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        found += [os.path.join(parent, name) for name in names]
        folders[:] = [name for name in folders if is_new(os.path.join(parent, name))]
    return found


def list_folder(folder):
    """{path: [size in bytes, time of change]} of a folder; raises RunError."""
    with explained(f"{folder} cannot be read"):
        paths = list(map(Path, files_below(folder)))
    found = [(path.relative_to(folder).as_posix(), path.stat()) for path in paths if path.is_file()]
    files = {path: [status.st_size, status.st_mtime_ns] for path, status in found}
    if strange := [path for path in files if printable(path) != path]:
        names = f"such as {printable(strange[0])}"
        warn(f"{plural(len(strange), 'file')} of {folder}, {names}, passed over: their names are not UTF-8")
    for path in strange:
        del files[path]
    return files


def list_hub_files(name, revision):
    """{path: [size in bytes, sha256 or None]} of a dataset repository, in one call."""
    from huggingface_hub import list_repo_tree
    from huggingface_hub.hf_api import RepoFile

    with explained_hub_errors(name, "dataset"):
        tree = list_repo_tree(name, recursive=True, revision=revision, repo_type="dataset")
        files = [item for item in tree if isinstance(item, RepoFile)]
    return {file.path: [file.size, file.lfs.sha256 if file.lfs else None] for file in files}


def read_json(path):
    """What a JSON object that this program wrote holds; None if it is not there, or not whole."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


@contextlib.contextmanager
def complete_file(path):
    """The name of a file to write, which takes the place of `path` when complete; whatever happens, no half is left."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file so that it is complete or absent."""
    with explained(f"{path} cannot be written", advice=ROOM_ADVICE), complete_file(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8")


def chosen_accents(corpus, accents):
    """The folders of the accents named by the user (None: all); raises UsageError with the nearest names."""
    known = sorted(corpus.accents())
    for accent in accents or []:
        if slugify(accent) not in known:
            near = difflib.get_close_matches(slugify(accent), known, n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else f"the accents are {', '.join(known) or 'not given'}"
            )
            raise UsageError(f"--accents has '{accent}', which {corpus.name} does not have; {hint}")
    return {slugify(accent) for accent in accents} if accents else None


class AudioBytes(io.BytesIO):
    """Encoded audio. A corrupt header may seek to before its beginning, of which soundfile would print a traceback."""

    def seek(self, offset, whence=io.SEEK_SET):
        with contextlib.suppress(ValueError):
            super().seek(offset, whence)
        return self.tell()


# Of the files in a folder those are taken that libsndfile can read, or that are audio which it should be said not to.
MORE_SUFFIXES = "aif aifc oga opus wave snd sph m4a mp4 aac wma amr webm mka mov 3gp".split()


@functools.cache
def audio_suffixes():
    import soundfile

    return {kind.lower() for kind in soundfile.available_formats()} - {"raw"} | set(MORE_SUFFIXES)


def is_audio_name(path):
    """Whether a file is taken for audio where a folder is searched."""
    name = os.path.basename(path)
    return os.path.splitext(name)[1][1:].lower() in audio_suffixes() and not name.startswith(".")


@contextlib.contextmanager
def open_audio(source):
    """A soundfile.SoundFile of encoded audio, bytes or a path; raises ValueError, also for what it raises in use."""
    import soundfile

    try:
        # Opened here: soundfile refuses names that are not UTF-8.
        stream = AudioBytes(source) if isinstance(source, bytes) else open(source, "rb")
        with stream, soundfile.SoundFile(stream) as file:
            yield file
    except (soundfile.SoundFileError, OSError) as error:
        # libsndfile's own words: the exception's text holds a memory address, by which no prepared file may differ.
        raise ValueError(getattr(error, "error_string", None) or one_line(error)) from error


# Samples at 16 kHz read on each side of a window, more than the resampler's filter is long. Windows begin at multiples
# of 640, and with a margin of such a multiple at a sample of every common rate.
RESAMPLING_MARGIN = 3 * 640
MOST_FRAMES = 2**40  # more is how libsndfile says that it does not know


def decode_audio(source, start=0, stop=None):
    """Encoded audio (bytes or a path) -> 16 kHz mono float32 samples `start` to `stop` of it; raises ValueError.

    Only what is asked for is decoded: a window of an hour costs what a window of a minute does.
    """
    import librosa

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
    """(samples that an audio file has at 16 kHz, seconds that its header promises beyond them); raises ValueError.

    A header may name no length, as of a stream, or that of a recording that was cut off: the last sample is tried, and
    if it is not there all are counted. Raises it for a file without any sample too.
    """
    import soundfile

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
    unknown = promised > MOST_FRAMES
    return int(np.ceil(count * SAMPLE_RATE / rate)), 0 if unknown else (promised - count) / rate


def encode_flac(samples):
    """16 kHz mono samples -> FLAC bytes, lossless at 16 bits and about half the size of PCM."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(samples, -1.0, 1.0), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def clip_features():
    """The columns of a prepared file. `problem` is why a clip cannot be used, empty for a good one."""
    from datasets import Features, Value

    texts = dict.fromkeys(("clip", "text", *CLIP_COLUMNS, "split", "problem"), Value("string"))
    return Features({"audio": Value("binary"), "num_samples": Value("int32"), **texts})


def clip_row(key, split, accent, row):
    """The columns of a prepared file but for the audio, from a row of the transcripts (None if there is none)."""
    row = row or {}
    problem = row.get(SURPLUS, "")
    cells = {name: cell for name, cell in row.items() if cell and (name == "transcript" or not problem)}
    return {
        "clip": key,
        "text": cells.get("transcript", ""),
        "speaker": cells.get("user_ids", ""),
        "accent": cells.get("accent", accent),
        **{name: cells.get(name, "") for name in ("country", "domain", "gender", "age_group")},
        "num_samples": int(clip_seconds(cells.get("duration")) * SAMPLE_RATE),
        "split": split,
        "problem": problem,
    }


def make_clip(row, audio, problem=""):
    """One row of a prepared file, from that of `clip_row`; its length is the audio's own, 0 with a `problem`."""
    samples = ()
    if not problem:
        try:
            samples = decode_audio(audio)
            problem = "" if len(samples) else "no audio samples"
        except ValueError as error:
            problem = f"undecodable audio ({error})"
    flac = b"" if problem else encode_flac(samples)
    return {**row, "audio": flac, "num_samples": len(samples), "problem": problem}


class Header(tarfile.TarInfo):
    """One that cannot be read is damage: tarfile would take it for the end of the archive."""

    @classmethod
    def frombuf(cls, buffer, encoding, errors):
        if buffer and not buffer.strip(b"\0"):
            raise tarfile.EOFHeaderError("zeros")  # fewer than a block at the very end too
        try:
            return super().frombuf(buffer, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            raise tarfile.ReadError(str(error)) from error


# Zeros end a tar: what was appended to it comes behind them. Names that are not UTF-8 could not be written anywhere.
TAR_OPTIONS = {"tarinfo": Header, "ignore_zeros": True, "encoding": "utf-8", "errors": "replace"}


def archive_members(stream):
    """Yield (name, bytes, problem) for each member of a tar.gz or tar read as a stream; raises DAMAGE if it is corrupt.

    gzip under tarfile, not tarfile's own "r|gz": only gzip checks the checksum at the end.
    """
    head = stream.peek(64)
    if head.startswith(b"version https://git-lfs"):
        raise tarfile.ReadError("a Git LFS pointer, not the file: run 'git lfs pull'")
    plain = gzip.open(stream) if head.startswith(b"\x1f\x8b") else stream
    with plain, tarfile.open(fileobj=plain, mode="r|", **TAR_OPTIONS) as tar:
        for member in tar:
            problem = ""
            if member.isdir():
                continue
            if member.name.startswith("/") or ".." in member.name.split("/"):
                problem = "refused: its path climbs out of the archive"
            elif not member.isreg():
                problem = "refused: it is a link or a device, not a file"
            elif member.size > CLIP_BYTES_LIMIT:
                problem = f"refused: it is over {CLIP_BYTES_LIMIT / 1e9:g} GB"
            yield member.name, b"" if problem else tar.extractfile(member).read(), problem
            if member.size > 100 * CLIP_BYTES_LIMIT:
                raise tarfile.ReadError("a member claims a size that would take for ever to skip")


# tarfile raises ValueError and its kin for numbers in headers that are none.
DAMAGE = (EOFError, tarfile.TarError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError)


def prepare_archive(corpus, archive):
    """Convert one archive to its prepared file, complete or absent; returns (clips, hours) of it. Raises RunError."""
    from datasets.arrow_writer import ArrowWriter

    clips, samples = 0, 0
    with explained(f"{archive} cannot be prepared"):
        for path in corpus.files_of(archive):
            corpus.fetch(path)
        with (
            complete_file(corpus.prepared_path(archive)) as partial,
            ArrowWriter(path=str(partial), features=clip_features(), writer_batch_size=50) as writer,
        ):
            for clip in corpus.clips(archive):
                writer.write(clip)
                clips, samples = clips + 1, samples + clip["num_samples"]
            writer.finalize()
        corpus.release(archive)
    return clips, samples / SAMPLE_RATE / 3600


def start_worker(connection):
    """Let this worker process end when the other end of `connection` is closed, by the program or by its death.

    It would wait for work for ever otherwise, or convert to its end an archive that nobody wants any more.
    """
    import threading

    def watch():
        with contextlib.suppress(EOFError, OSError):
            connection.recv()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the program tells its workers
    threading.Thread(target=watch, daemon=True).start()


def disk_needed(corpus, todo, splits, num_proc):
    """(bytes that preparing `todo` needs at its peak, bytes that stay), from the durations in the transcripts."""
    share = corpus.size(todo) / max(1, corpus.size(corpus.archives(*splits)))
    stays = share * sum(hours(corpus.rows(split)) for split in splits) * FLAC_BYTES_AN_HOUR
    stays = stays or corpus.size(todo)  # of recordings whose durations nobody noted down
    if corpus.folder:
        return stays, stays
    if corpus.keep_archives:
        return (stays + corpus.size(todo),) * 2
    sizes = sorted((corpus.files[path][0] for path in todo), reverse=True)
    return stays + sum(sizes[:num_proc]), stays


def hours(rows):
    return sum(row["num_samples"] or 0 for row in rows) / SAMPLE_RATE / 3600


def clip_seconds(cell):
    """The duration in a CSV or JSON cell, in seconds; 0.0 if it holds none, or none that a clip can have."""
    try:
        return float(cell) if 0 < float(cell) < 86_400 else 0.0
    except (TypeError, ValueError, OverflowError):
        return 0.0


def prepare_corpus(corpus, splits, args):
    """Convert every archive that the run needs and that is not converted yet; raises RunError when some could not be.

    Several processes may call this at once: one works, the others wait at the lock, without a time-out.
    """
    from filelock import FileLock

    with FileLock(corpus.data_dir / "prepare.lock"):
        corpus.fetch_transcripts(SPLITS if args.streaming else splits)
        check_selection(args, corpus)
        archives = corpus.archives(*splits)
        corpus.read_stamps()
        todo = corpus.unprepared(archives)
        # What a killed preparation left: half-written files, and the archives of finished ones.
        for stale in corpus.data_dir.glob("*/*.arrow.*.tmp"):
            stale.unlink()
        for archive in set(archives).difference(todo):
            corpus.release(archive)
        if not todo:
            return
        need, _ = disk_needed(corpus, todo, splits, args.num_proc)
        free = shutil.disk_usage(corpus.data_dir).free
        if need > free:
            raise RunError(
                f"preparing {plural(len(todo), 'archive')} needs {need / 1e9:.1f} GB in {corpus.data_dir} and "
                f"{free / 1e9:.1f} GB are free: choose another --data_dir, fewer --accents, or a lower --num_proc"
            )
        prepare_archives(corpus, todo, args.num_proc)


def prepare_archives(corpus, todo, num_proc):
    """Convert archives in parallel, with a progress bar; raises RunError when some could not be."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    from tqdm import tqdm

    for archive in todo:
        corpus.prepared_path(archive).unlink(missing_ok=True)  # of a changed archive
    corpus.write_source(todo)  # before the work: what a killed preparation leaves is known by its stamps
    clips, spoken_hours, failures = 0, 0.0, []
    # spawn: forked workers inherit locks of threads (tokenizers, torch) and can hang.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with (
        tqdm(total=len(todo), desc="preparing audio", unit="archive") as bar,
        ProcessPoolExecutor(min(num_proc, len(todo)), context, start_worker, (theirs,)) as pool,
        contextlib.closing(ours),  # however this ends, the workers end with it
    ):
        # The largest first, so that none is left alone at the end.
        largest_first = sorted(todo, key=lambda archive: -corpus.files[archive][0])
        jobs = [pool.submit(prepare_archive, corpus.part(archive), archive) for archive in largest_first]
        for job in as_completed(jobs):
            try:
                more_clips, more_hours = job.result()
                clips, spoken_hours = clips + more_clips, spoken_hours + more_hours
            except RunError as error:
                failures.append(error)
            except BrokenProcessPool as error:
                raise RunError(
                    "a process that prepares audio was killed, most likely for want of memory: run the same command "
                    "again with a lower --num_proc"
                ) from error
            bar.set_postfix_str(f"{clips:,} clips, {spoken_hours:.2f} h")
            bar.update()
    if failures:
        failed = f"{len(failures)} of {len(todo)} archives could not be prepared, the others are ready"
        raise RunError(f"{failed}; the first: {failures[0]}")


def open_prepared(corpus, archive):
    """The Dataset of an archive's prepared file; raises RunError for one that a bad disk or a power cut has damaged."""
    import pyarrow
    from datasets import Dataset

    path = corpus.prepared_path(archive)
    with explained(f"{path} is damaged", (OSError, pyarrow.ArrowInvalid), "delete it, the same command makes it again"):
        return Dataset.from_file(str(path))


def load_split(corpus, split):
    """(Dataset of every clip of a split, rows of transcripts without audio): memory-mapped, nothing copied."""
    from datasets import Dataset, concatenate_datasets

    parts = [open_prepared(corpus, path) for path in corpus.archives(split)]
    empty = Dataset.from_dict({name: [] for name in clip_features()}, features=clip_features())
    clips = corpus.split_clips(concatenate_datasets(parts or [empty]), split)
    found, rows = set(clips["clip"]), corpus.rows(split)
    missing = [row for row in rows if row["clip"] not in found]
    return clips, [{**row, "num_samples": 0, "problem": row["problem"] or "no audio"} for row in missing]


def balanced_shares(archives, sizes, count):
    """`archives` dealt out to `count` shares of nearly equal bytes: the largest first, each to the smallest share."""
    shares = [[] for _ in range(count)]
    for archive in sorted(archives, key=lambda archive: -sizes[archive][0]):
        min(shares, key=lambda share: sum(sizes[path][0] for path in share)).append(archive)
    return shares


def streamed_clips(shares, corpus, args, check, seed, turn, skipped_file):
    """Yield the training clips of the archives in `shares`, straight from there, one pass in an order of the `turn`.

    Runs in the DataLoader's workers, each with shares of its own. What cannot be used is added to `skipped_file`.
    """
    archives = sorted(itertools.chain.from_iterable(shares))
    for archive in np.random.default_rng((seed, turn)).permutation(archives).tolist():
        with explained_hub_errors(corpus.name, "dataset"):
            for clip in corpus.clips(archive):
                if reason := check([clip])[0]:
                    append_skipped(skipped_file, clip, reason)
                elif wanted(clip, args):
                    yield clip


class TrainingStream:
    """The training clips of this process as endless batches: pass after pass over its share of the archives. Mixed with
    torch's IterableDataset; `loader_options` are those of the DataLoader that makes the batches.

    Shares are balanced by bytes among the processes and among their workers; a worker that is through waits for the
    others, so nothing comes again before all of the process's share was seen.
    """

    def __init__(self, corpus, args, check, training, seed):
        archives = corpus.archives("train")
        if len(archives) < training.world_size:
            found = f"{plural(len(archives), 'training archive')} for {training.world_size} processes"
            raise UsageError(f"--streaming has {found}; use fewer, or leave it out")
        mine = balanced_shares(archives, corpus.files, training.world_size)[training.process_index]
        self.workers = min(training.dataloader_num_workers, len(mine))
        # datasets deals the items of a list out to the workers.
        shares = balanced_shares(mine, corpus.files, max(1, self.workers))
        self.arguments = dict(shares=shares, corpus=corpus, args=args, check=check, seed=seed)
        self.arguments["skipped_file"] = skipped_path(training)

    def __iter__(self):
        from datasets import IterableDataset
        from torch.utils.data import DataLoader

        for turn in itertools.count():
            batch, self.loader_options["collate_fn"].epoch = None, turn
            clips = IterableDataset.from_generator(streamed_clips, clip_features(), {**self.arguments, "turn": turn})
            clips = clips.shuffle(seed=self.arguments["seed"] + turn, buffer_size=SHUFFLE_CLIPS)
            for batch in DataLoader(clips, num_workers=self.workers, **self.loader_options):
                yield batch
            if batch is None:
                raise RunError(f"no training clip of the stream can be used: see {self.arguments['skipped_file']}")


@dataclass
class Selection:
    """The clips of a split that a run uses, and those left out (`skipped`: columns of skipped_clips.csv)."""

    clips: object
    rows: list[dict]
    skipped: list[dict]

    @functools.cached_property
    def reasons(self):
        """{reason without its detail: clips left out for it}"""
        return Counter(re.split(r"[:(]", row["reason"])[0].strip() for row in self.skipped)


def wanted(row, args):
    """Whether a clip is of the --domains and --countries asked for."""
    countries = {code.upper() for code in args.countries or []}
    domain, country = row["domain"].lower(), row["country"].upper()  # as somebody's own table may not have them
    return (not args.domains or domain in args.domains) and (not countries or country in countries)


def select_clips(clips, missing, args, check, max_samples, seed):
    """The `Selection` of a split: what the user asked for, without what cannot be used.

    `check(rows)` gives the reason against each clip, or "". The result is ordered by falling length, so that the
    longest batch comes first when scoring.
    """
    rows = clips.remove_columns("audio").to_list() + missing
    # A damaged archive or a file without a transcript has no domain to ask for.
    asked_for = [index for index, row in enumerate(rows) if wanted(row, args) or row["problem"] and not row["domain"]]
    kept, skipped = {}, []  # {name: index} of clips
    for index, reason in zip(asked_for, check([rows[index] for index in asked_for])):
        clip = rows[index]["clip"]
        if reason := reason or ("a second copy" if clip in kept else ""):
            skipped.append(skipped_row(rows[index], reason))
        else:
            kept[clip] = index
    kept = list(kept.values())
    if max_samples and max_samples < len(kept):
        kept = np.random.default_rng(seed).permutation(kept)[:max_samples].tolist()
    kept.sort(key=lambda index: (-rows[index]["num_samples"], rows[index]["clip"]))
    return Selection(clips.select(kept, keep_in_memory=True), [rows[index] for index in kept], skipped)


def skipped_path(training):
    return Path(training.output_dir) / "results" / "skipped_clips.csv"


SKIPPED_COLUMNS = ("split", "clip", "reason", "accent", "seconds", "text")


def skipped_row(row, reason):
    return {**row, "reason": reason, "seconds": round(row["num_samples"] / SAMPLE_RATE, 2)}


def csv_lines(rows):
    """Lines of skipped_clips.csv; a cell that a spreadsheet would take for a formula gets an apostrophe before it.

    csv puts no quotes around a carriage return, at which a spreadsheet begins another row.
    """
    lines = io.StringIO()
    for row in rows:
        cells = [re.sub(r"^(?=[=+\-@\t\r\n＝＋－＠])", "'", str(row[column])) for column in SKIPPED_COLUMNS]
        csv.writer(lines, lineterminator="\n").writerow([cell.replace("\r", " ") for cell in cells])
    return lines.getvalue()


def append_skipped(path, clip, reason):
    """Add a line to skipped_clips.csv, once a clip, from any process: a single write in append mode is whole."""
    line = csv_lines([skipped_row(clip, reason)])
    with explained(f"{path} cannot be written", advice=ROOM_ADVICE):
        if line not in path.read_text(encoding="utf-8"):
            with open(path, "a", encoding="utf-8") as file:
                file.write(line)


# ---------------------------------------------------------------- own recordings

TEXT_COLUMNS = ("text", "sentence", "transcript", "transcription")
# What `clip_row` knows a cell as -> the names that its column may have in other people's tables.
OWN_COLUMNS = {
    "user_ids": ("speaker", "speaker_id", "user_ids", "user_id", "client_id"),
    "accent": ("accent", "accents"),
    "country": ("country",),
    "gender": ("gender", "sex"),
    "age_group": ("age_group", "age"),
    "domain": ("domain",),
    "duration": ("duration", "seconds"),
    "split": ("split",),
}
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "validation", "valid", "val"), "dev"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
METADATA = re.compile(r"(.*/)?metadata\.(csv|jsonl)")
GROUP_CLIPS = 256  # recordings of a folder that are converted to one prepared file


def split_in(path):
    """The split that a folder of a path, or a word of its file's name, stands for; "" if none does."""
    *folders, name = path.lower().split("/")
    return next((SPLIT_NAMES[word] for word in [*folders, *re.split("[^a-z]+", name)] if word in SPLIT_NAMES), "")


def choose_columns(names, text_column, table):
    """{what `clip_row` knows a cell as: its column among `names`}; raises UsageError without one column of texts."""
    found = f"its columns are {', '.join(names) or 'none'}"
    if text_column and text_column not in names:
        raise UsageError(f"--text_column is {text_column}, which {table} does not have; {found}")
    texts = [text_column] if text_column else [name for name in names if name.lower() in TEXT_COLUMNS]
    if len(texts) != 1:
        problem = f"both {' and '.join(texts)}" if texts else f"no column {' or '.join(TEXT_COLUMNS)}"
        raise UsageError(f"{table} has {problem}; name the column of the texts with --text_column: {found}")
    lower = {name.lower(): name for name in reversed(names)}
    matches = {ours: [lower[name] for name in theirs if name in lower] for ours, theirs in OWN_COLUMNS.items()}
    return {"transcript": texts[0], **{ours: names[0] for ours, names in matches.items() if names}}


def own_row(key, split, cells, columns):
    """`clip_row` of a row of somebody's table, with the split that a column of it names, or else `split`."""
    known = {
        ours: str(cell).encode(errors="replace").decode()  # JSON can hold halves of characters, which no file can
        for ours, column in {**columns, SURPLUS: SURPLUS}.items()
        if (cell := cells.get(column)) is not None and cell == cell
    }
    named = "" if SURPLUS in known else known.get("split", "")
    return clip_row(key, split_in(named) or split, "", known)


def read_metadata(path):
    """The rows of a metadata.csv or metadata.jsonl, a dict each; raises RunError."""
    if path.suffix == ".csv":
        rows, notes = read_transcripts(path, (("file_name",),))
    else:
        text, notes = read_text(path)
        with explained(f"{path} is not lines of JSON", (ValueError, RecursionError)):
            rows = json_lines(text)
        if wrong := [row for row in rows if not isinstance(row, dict) or not isinstance(row.get("file_name"), str)]:
            keys = ", ".join(wrong[0]) if isinstance(wrong[0], dict) else type(wrong[0]).__name__
            raise RunError(f"{path} has {plural(len(wrong), 'row')} without a file_name, the first with {keys}")
    for note in notes:
        warn(f"{path}: {note}")
    return rows


def readme_settings(path):
    """The YAML at the head of a dataset's README.md, a dict."""
    import yaml

    head = re.match(r"---\s*\n(.*?)\n---", read_text(path)[0], re.DOTALL)
    # A date that is none raises ValueError.
    with explained(f"{path} does not begin with YAML", (yaml.YAMLError, ValueError, RecursionError)):
        settings = yaml.safe_load(head[1]) if head else None
    return settings if isinstance(settings, dict) else {}


def file_patterns(config):
    """[(split, pattern of paths)] of one of the `configs` in a README.md; "" for a split that has no name."""
    files = config.get("data_files") or f"{config.get('data_dir') or ''}*".lstrip("./")
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    pairs = []
    for item in [files] if isinstance(files, str) else files:
        split, paths = (item.get("split", ""), item["path"]) if isinstance(item, dict) else ("", item)
        pairs += [(str(split), path.removeprefix("./")) for path in ([paths] if isinstance(paths, str) else paths)]
    return pairs


def divide_speakers(sizes, splits, seed):
    """{speaker: split} of those drawn for `splits`, for each about a tenth of the clips; `sizes` are {speaker: clips}.

    The order is one of checksums, so that more recordings later move few speakers.
    """
    left = sorted(sizes, key=lambda speaker: hashlib.sha256(f"{seed} {speaker}".encode()).digest())
    assignment = {}
    for split in splits:
        room, drawn = sum(sizes.values()) // 10, []
        for speaker in left:
            if sizes[speaker] <= room:
                drawn.append(speaker)
                room -= sizes[speaker]
        drawn = drawn or [min(left, key=sizes.get)]
        left = [speaker for speaker in left if speaker not in drawn]
        assignment |= dict.fromkeys(drawn, split)
    return assignment


@dataclass
class Recordings(Corpus):
    """Somebody's recordings, on the Hub or in a local folder: parquet files, or audio files with metadata beside them.

    Its archives are the parquet files, or else groups of audio files, which have entries in `files` too; `listed` holds
    the `own_row` of each clip of an archive. Splits that are missing are `made` of the train split by `assignment`,
    {speaker: split}; `unnamed` is the split of the clips that name none.
    """

    text_column: str | None = None
    listed: dict[str, list] = field(default_factory=dict)
    made: tuple = ()
    assignment: dict[str, str] = field(default_factory=dict)
    unnamed: str = ""

    layout = "recordings"

    def archives(self, *splits):
        return [name for name, rows in self.listed.items() if any(self.split_of(row) in splits for row in rows)]

    def prepared_path(self, archive):
        from urllib.parse import quote

        return self.data_dir / "clips" / f"{quote(archive, safe='')}.arrow"

    def stamp(self, archive):
        return [self.files[archive], self.text_column]

    def accents(self):
        return {slugify(row["accent"]) for rows in self.listed.values() for row in rows} - {""}

    def fetch_transcripts(self, splits):
        """They are `listed`."""

    def files_of(self, archive):
        if archive.endswith(".parquet"):
            return [archive]
        # Rows of metadata may name files anywhere; those that are not among `files` have a problem.
        return [row["clip"] for row in self.listed[archive] if not row["problem"]]

    def part(self, archive):
        needed = {path: self.files[path] for path in (archive, *self.files_of(archive))}
        listed = {archive: self.listed[archive]}
        return dataclasses.replace(self, files=needed, stamps={}, listed=listed, assignment={})

    # ---- splits

    def split_of(self, row):
        given = row["split"] or self.unnamed
        return self.assignment.get(row["speaker"], given) if given == "train" else given

    def problem_of(self, row):
        """Why a clip cannot be used, as far as its row tells, "" if it can."""
        no_speaker = self.assignment and self.split_of(row) == "train" and not row["speaker"]
        return row["problem"] or ("no speaker to make a split by" if no_speaker else "")

    def is_chosen(self, row, split):
        """Whether a clip is of a split and of the --accents; one with a problem may have no accent to ask for."""
        accent = slugify(row["accent"])
        return self.split_of(row) == split and (
            self.chosen is None or accent in self.chosen or bool(row["problem"] and not accent)
        )

    def rows(self, split):
        return [
            {**row, "split": split, "problem": self.problem_of(row)}
            for rows in self.listed.values()
            for row in rows
            if self.is_chosen(row, split)
        ]

    def split_clips(self, clips, split):
        rows = clips.remove_columns("audio").to_list()
        usable = [self.is_chosen(row, split) and self.problem_of(row) == row["problem"] for row in rows]
        clips = clips.remove_columns("split").add_column("split", [split] * len(rows))
        return clips.select(np.flatnonzero(usable), keep_in_memory=True)

    def make_splits(self, splits, seed, unnamed="train"):
        """Draw speakers of the train split for dev and test, where `splits` need one that is missing.

        Where no clip names a split, all are of the `unnamed` one.
        """
        rows = [row for rows in self.listed.values() for row in rows]
        named = {row["split"] for row in rows} - {""}
        self.unnamed = "" if named else unnamed
        if lost := [row for row in rows if not self.split_of(row)]:
            warn(f"{plural(len(lost), 'clip')}, such as {lost[0]['clip']}, of no split that is named: left out")
        found = {self.split_of(row) for row in rows}
        if not set(splits) - found:
            return
        if "train" not in found:
            raise RunError(f"{self.identity()} has no train split; it has {' and '.join(sorted(named))}")
        made = tuple(split for split in ("dev", "test") if split not in found)
        what = f"{self.identity()} has no {' and no '.join(made)} split"
        given = "give it in train, dev and test folders or in a column split"
        sizes = Counter(row["speaker"] for row in rows if row["speaker"] and self.split_of(row) == "train")
        if not sizes:
            advice = "and no column speaker, speaker_id, user_ids or client_id to make one by: name the speakers"
            raise RunError(f"{what}, {advice}, or {given}")
        if len(sizes) <= len(made):
            raise RunError(f"{what}, and {plural(len(sizes), 'speaker')} cannot be divided to make it: {given}")
        self.made, self.assignment = made, divide_speakers(sizes, made, seed)
        say(f"  {self.made_note(seed)}")

    def made_note(self, seed):
        return f"{' and '.join(self.made)} made of the train split by speaker, by --seed {seed}"

    # ---- audio files with metadata

    def list_folder(self, tables):
        """List the clips of the audio files that `tables`, paths of metadata, and the folders hold, group by group."""
        rows = {}
        for table in tables:
            cells = read_metadata(self.fetch(table))
            names = [name for name in dict.fromkeys(itertools.chain.from_iterable(cells)) if name != SURPLUS]
            columns = choose_columns(names, self.text_column, table)
            for number, row in enumerate(cells, start=1):
                name, problem = row.get("file_name", ""), ""  # the rows of a CSV can be short
                key = os.path.normpath(os.path.join(os.path.dirname(table), name))
                if not name.strip():
                    key, problem = f"{table}, row {number}", "no file_name"
                elif key not in self.files:
                    outside = key.startswith(("/", "../"))
                    problem = "refused: its path climbs out of the folder" if outside else "no audio"
                split = split_in(table) or split_in(f"{os.path.dirname(key)}/")  # "stress-test.wav" is of no test split
                listed = own_row(key, split, row, columns)
                rows.setdefault(key, {**listed, "problem": problem or listed["problem"]})
        if not any(key in self.files for key in rows):
            count = plural(len(rows), "row")
            raise RunError(f"{tables[0]} names no file that is there among {count}, such as {next(iter(rows))}")
        for path in self.files:
            if path not in rows and is_audio_name(path):
                split = split_in(f"{os.path.dirname(path)}/")
                rows[path] = {**own_row(path, split, {}, {}), "problem": "no transcript"}
        for split in sorted({row["split"] for row in rows.values()}):
            members = [row for row in rows.values() if row["split"] == split]
            for number, start in enumerate(range(0, len(members), GROUP_CLIPS)):
                name, group = f"{split or 'clips'}-{number:05d}", members[start : start + GROUP_CLIPS]
                files = [self.files.get(row["clip"]) for row in group]
                mark = hashlib.sha256(json.dumps([group, files]).encode()).hexdigest()
                self.listed[name], self.files[name] = group, [sum(file[0] for file in files if file), mark]

    # ---- parquet

    def parquet_files(self):
        """{path: split, "" for none that is named} of the parquet files of the configuration; raises UsageError."""
        import fnmatch

        settings = readme_settings(self.fetch("README.md")) if "README.md" in self.files else {}
        unreadable = TypeError, KeyError, AttributeError
        with explained(f"README.md of {self.name} has configs that cannot be read", unreadable):
            configs = settings.get("configs") or [{"config_name": ""}]
            patterns = {str(config["config_name"]): file_patterns(config) for config in configs}
            default = next((str(config["config_name"]) for config in configs if config.get("default")), "default")
        names = ", ".join(patterns) or "none"
        name = self.config or (default if default in patterns else "")
        if name and name not in patterns:
            raise UsageError(f"--dataset names '{name}'; the configurations of {self.name} are {names}")
        if not name and len(patterns) > 1:
            example = f"choose one, as {self.name}:{next(iter(patterns))}"
            raise UsageError(f"--dataset {self.name} has the configurations {names}: {example}")
        return {
            path: split_in(split or path)
            for path in sorted(self.files)
            for split, pattern in reversed(patterns[name or next(iter(patterns))])
            if path.endswith(".parquet") and fnmatch.fnmatch(path, pattern)
        }

    def list_parquet(self, splits):
        """List the clips of parquet files, {path: split}: of those not converted, what is no audio is read."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(8) as pool:
            self.listed = dict(zip(splits, pool.map(self.parquet_rows, splits, splits.values())))

    def parquet_rows(self, path, split):
        import pyarrow.parquet

        if not self.unprepared([path]):
            return open_prepared(self, path).remove_columns("audio").to_list()
        try:
            with self.open(path) as stream, pyarrow.parquet.ParquetFile(stream) as file:
                audio, labels = audio_column(file, path), class_names(file)
                names = [name for name in file.schema_arrow.names if name != audio]
                columns = choose_columns(names, self.text_column, path)
                cells = file.read([*columns.values(), f"{audio}.path"]).to_pylist()
        except DAMAGED_PARQUET as error:
            return [{**clip_row(path, split, "", None), "problem": f"damaged file ({one_line(error)})"}]
        rows = []
        for number, row in enumerate(cells):
            name = os.path.basename((row.pop(audio, None) or {}).get("path") or "")
            key = f"{path.removesuffix('.parquet')}/{number:05d}{'-' if name else ''}{name}"
            row = {column: labels[column].get(cell) if column in labels else cell for column, cell in row.items()}
            rows.append(own_row(key, split, row, columns))
        return rows

    def parquet_audio(self, path):
        """Yield the encoded audio of each row, None where there is none; raises DAMAGED_PARQUET."""
        import pyarrow.parquet

        with self.open(path) as stream, pyarrow.parquet.ParquetFile(stream) as file:
            for batch in file.iter_batches(batch_size=50, columns=[audio_column(file, path)]):
                yield from ((cell or {}).get("bytes") for cell in batch.column(0).to_pylist())

    # ---- conversion

    def clips(self, archive):
        rows, damage = self.listed[archive], ""
        if archive.endswith(".parquet"):
            audio = self.parquet_audio(archive)
        else:
            audio = map(self.find_local, self.files_of(archive))
        for row in rows:
            problem, encoded = row["problem"] or damage, None
            if not problem:
                try:
                    encoded = next(audio, None)
                    problem = "" if encoded else "no audio"
                except DAMAGED_PARQUET as error:
                    problem = damage = f"damaged file ({one_line(error)})"
            yield make_clip(row, encoded, problem)


DAMAGED_PARQUET = (OSError, ValueError, NotImplementedError)  # pyarrow's own exceptions are kinds of these


def audio_column(file, path):
    """The column of a parquet file that holds audio, structs of bytes and path; raises RunError."""
    import pyarrow

    fields = [item for item in file.schema_arrow if pyarrow.types.is_struct(item.type)]
    names = [item.name for item in fields if item.type.get_field_index("bytes") >= 0]
    names = ["audio"] if "audio" in names else names
    if len(names) != 1:
        problem = f"more than one: {', '.join(names)}" if names else "no audio column (of bytes and path)"
        raise RunError(f"{path} has {problem}; its columns are {', '.join(file.schema_arrow.names)}")
    return names[0]


def class_names(file):
    """{column: {number: name}} of a parquet file that `datasets` wrote, for columns of classes; -1 has no name."""
    try:
        features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
        classes = {name: feature for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
        return {name: dict(enumerate(feature["names"])) for name, feature in classes.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def open_recordings(corpus, args):
    """The `Recordings` in the files of a corpus that is not in AfriSpeech-200's layout; raises RunError, UsageError."""
    own = Recordings(**vars(corpus), text_column=args.text_column)
    if args.streaming:
        raise UsageError(f"--streaming is for AfriSpeech-200's layout, which {own.name} is not in; leave it out")
    if any(path.endswith(".parquet") for path in own.files):
        files = own.parquet_files()
        # A corpus may be large beside its test split.
        only_test = args.eval_only and not args.tune_lm and "test" in files.values()
        own.list_parquet({path: split for path, split in files.items() if split == "test" or not only_test})
    elif tables := [path for path in sorted(own.files) if METADATA.fullmatch(path)]:
        if own.config:
            raise UsageError(f"--dataset names '{own.config}'; {own.name} has no configurations: leave it out")
        own.list_folder(tables)
    if not own.listed:
        example = f", such as {min(own.files)}" if own.files else ""
        raise RunError(
            f"{own.identity()} has no audio/<accent>/<split>/*.tar.gz, no metadata.csv or metadata.jsonl beside "
            f"recordings and no parquet files: it has {plural(len(own.files), 'file')}{example}"
        )
    return own


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
    before them: 1½ is not 11/2, and 10⁹ is not 109.
    """
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
        unknown, labels = self.tokenizer.unk_token_id, []
        for start in range(0, len(texts), 1_000):  # the tokenizer keeps a kilobyte and more for each text of a call
            folded = [self.fold(text) for text in texts[start : start + 1_000]]
            all_ids = self.tokenizer(folded, add_special_tokens=False).input_ids
            labels += [[token for token in ids if token != unknown and token < self.vocab_size] for ids in all_ids]
        return labels


def normalize_wer(text):
    """The text that `wer` compares: lower-case words without punctuation, apostrophes inside words kept.

    Entities, `{period}`-style tokens, NBSP, curly quotes, accents on letters and what `FOLDS` spells out (& ° µg α) are
    resolved first: MedASR has no token for them and can only write the word.
    """
    text = CONTROL_TOKEN.sub(" ", resolve(text)).translate(FOLD_TABLE).lower()
    decomposed = unicodedata.normalize("NFKD", text).translate(FOLD_TABLE)
    plain = "".join(
        character
        for character in decomposed
        if not unicodedata.combining(character) and unicodedata.category(character) != "Cf"
    )
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)*", plain))


def normalize_paper(text):
    """The text that `wer_paper` compares: the AfriSpeech authors' own steps, in their order.

    Source: the evaluation code of github.com/intron-innovation/AfriSpeech-200 (Olatunji et al. 2023, arXiv 2310.00274).
    A lone newline glues two words, and punctuation counts: the published figures depend on both.
    """
    text = re.sub(r"\s{2,}", " ", text).strip()
    text = text.replace(">", "").replace("\t", " ").replace("\n", "")
    text = text.lower()
    for spoken, written in (
        (" comma,", ","),
        (" koma,", " "),
        (" coma,", " "),
        (" full stop.", "."),
        (" full stop", "."),
        (",.", "."),
        (",,", ","),
    ):
        text = text.replace(spoken, written)
    text = " ".join(text.split())
    return re.sub(r"[^a-zA-Z0-9\s.,\-?:'/()\[\]+%]", "", text)


def normalize_raw(text):
    """The text that `wer_raw` compares: as written."""
    return text.strip()


NORMALIZERS = {"wer": normalize_wer, "wer_paper": normalize_paper, "wer_raw": normalize_raw}


# ---------------------------------------------------------------- batches


def logit_lengths(model, input_lengths):
    """Lengths of the logits for lengths of the inputs (frames, or samples for models on waveforms), shape (clips,)."""
    method = getattr(model, "_get_subsampling_output_length", None) or model._get_feat_extract_output_lengths
    return method(input_lengths)


def input_length(extractor, samples):
    """Frames of `samples`, without centring: 1 + (samples - window) // hop; samples for models on waveforms."""
    return 1 + (samples - extractor.win_length) // extractor.hop_length if hasattr(extractor, "hop_length") else samples


def shortest_clip(model, extractor):
    """The fewest samples that the model can be run on, to a hop; 2,320 (0.145 s) for MedASR."""
    import torch

    samples, step = getattr(extractor, "win_length", 80), getattr(extractor, "hop_length", 80)
    while logit_lengths(model, torch.tensor([input_length(extractor, samples)])) < 1:
        samples += step
    return samples


class ClipCheck:
    """Says why clips cannot be used, "" for one that can: check(rows).

    Dev and test clips are never left out for their length: short ones are padded, long ones scored in windows. It holds
    no model, because streaming hands it to worker processes.
    """

    def __init__(self, model, extractor, encoder, max_train_seconds):
        import torch

        self.extractor, self.encoder, self.max_train_seconds = extractor, encoder, max_train_seconds
        self.shortest = shortest_clip(model, extractor)
        longest = input_length(extractor, round(min(max_train_seconds * SAMPLE_RATE, CLIP_BYTES_LIMIT / 4)))
        self.logits = logit_lengths(model, torch.arange(max(0, longest) + 1)).tolist()

    def __call__(self, rows):
        reasons = [self.without_labels(row) for row in rows]
        train = [index for index, row in enumerate(rows) if row["split"] == "train" and not reasons[index]]
        # All at once: a call of the tokenizer for each of 58,000 texts takes several times as long.
        for index, labels in zip(train, self.encoder([rows[index]["text"] for index in train])):
            reasons[index] = self.with_labels(rows[index], labels)
        return reasons

    def without_labels(self, row):
        seconds = row["num_samples"] / SAMPLE_RATE
        if row["problem"] or not tidy(row["text"]):
            return row["problem"] or "empty text"
        if row["split"] == "train" and row["num_samples"] < self.shortest:
            return f"too short: {seconds:.2f} s, the model needs {self.shortest / SAMPLE_RATE:.3f} s"
        if row["split"] == "train" and seconds > self.max_train_seconds:
            return f"over --max_train_seconds: {seconds:.1f} s"
        return ""

    def with_labels(self, row, labels):
        # CTC puts a blank between two equal labels.
        needed = len(labels) + sum(left == right for left, right in zip(labels, labels[1:]))
        logits = self.logits[input_length(self.extractor, row["num_samples"])]
        if needed > logits:
            return f"more labels than frames: {needed} labels, {logits} logits"
        return "" if labels else "no text left that the tokenizer covers"


# SpecAugment (Park et al. 2019, arXiv 1904.08779), moderate: of 128 mel bins up to 2 x 20 are masked, of the time one
# stretch of up to 0.3 s (less than most words) in every 2.5 s.
FREQUENCY_MASKS, FREQUENCY_MASK_BINS = 2, 20
TIME_MASK_EVERY_FRAMES, TIME_MASK_FRAMES = 250, 30


def draw_masks(frames, bins, seed):
    """The [start, stop) of SpecAugment's masks of a clip: (those of its frames, those of its mel bins).

    The seed alone decides them, whichever process makes the batch: a resumed run draws the same ones.
    """

    def mask_span(longest, size):
        width = generator.integers(min(longest, size) + 1)
        start = generator.integers(size - width + 1)
        return start, start + width

    generator = np.random.default_rng(seed)
    bands = [mask_span(FREQUENCY_MASK_BINS, bins) for _ in range(FREQUENCY_MASKS)]
    stretches = -(-frames // TIME_MASK_EVERY_FRAMES)
    return [mask_span(min(TIME_MASK_FRAMES, frames // 5), frames) for _ in range(stretches)], bands


def inside(spans, size):
    """Which of `size` positions lie in one of a clip's `spans` (clips, spans, 2), a bool tensor (clips, size)."""
    import torch

    position = torch.arange(size, device=spans.device)
    return ((spans[..., :1] <= position) & (position < spans[..., 1:])).any(1)


# All that decides what LasrFeatureExtractor computes, and what decides nothing.
KNOWN_EXTRACTOR_SETTINGS = """feature_size sampling_rate hop_length n_fft win_length padding_value padding_side
    return_attention_mask feature_extractor_type processor_class""".split()


def knows_log_mels(extractor):
    """Whether `log_mels` gives what the extractor does; one with other settings is called itself."""
    from transformers import LasrFeatureExtractor

    return (
        type(extractor) is LasrFeatureExtractor
        and set(extractor.to_dict()) <= set(KNOWN_EXTRACTOR_SETTINGS)
        and (extractor.padding_value, extractor.padding_side) == (0.0, "right")
    )


MEL_BANDS = 8  # each filter spans a few of the spectrum's bins: bands of filters leave most zeros out of the product


@functools.cache
def mel_constants(extractor, device):
    """The window (win_length,), float32, of a LasrFeatureExtractor and its mel filters, on `device`.

    The filters come in bands: (slice of the spectrum that a band spans, with real and imaginary parts side by side;
    weights (that many, bins)).
    """
    import torch

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
    differs by less than 1e-3.
    """
    import torch

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
    import torch

    inputs = {
        name: value.to(device, non_blocking=True) for name, value in batch.items() if isinstance(value, torch.Tensor)
    }
    with torch.no_grad():
        if "waveforms" in inputs:
            made = log_mels(inputs.pop("waveforms"), inputs.pop("num_samples"), extractor)
            inputs["input_features"], inputs["attention_mask"] = made
        if "stretches" in inputs:
            features, real = inputs["input_features"], inputs["attention_mask"].bool()
            masked = inside(inputs.pop("stretches"), features.shape[1])[:, :, None]
            masked = masked | inside(inputs.pop("bands"), features.shape[2])[:, None]
            features.masked_fill_(masked & real[..., None], SILENCE)
    return inputs


@dataclass
class CTCCollator:
    """Rows of a prepared split -> a padded batch for `model_inputs`, in the worker processes of the DataLoader.

    waveforms (clips, samples) float32 and num_samples (clips,) for LASR, or what the model's own feature extractor
    gives; with an `encoder` labels (clips, longest) padded with -100; with `augment` the spans to mask, stretches and
    bands (clips, spans, 2). For prepared clips `clips`, their names, and `counts`, samples without and with padding;
    for windows `problems`.
    """

    extractor: object
    encoder: LabelEncoder | None = None
    augment: bool = False
    shortest: int = 0
    seed: int = 0
    epoch: int = 0

    def __call__(self, rows):
        import torch

        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        waveforms = [row["samples"] if "samples" in row else decode_audio(row["audio"]) for row in rows]
        lacking = [max(0, self.shortest - len(samples)) for samples in waveforms]  # padding by none copies all the same
        waveforms = [np.pad(samples, (0, count)) if count else samples for samples, count in zip(waveforms, lacking)]
        lengths = [len(samples) for samples in waveforms]
        # Waveforms are padded, not features, so that padded frames come out as silence.
        if knows_log_mels(self.extractor):
            batch = {"waveforms": pad([torch.from_numpy(samples) for samples in waveforms])}
            batch["num_samples"] = torch.tensor(lengths)
        else:
            # Some wav2vec2 models were trained without a mask and say so in their extractor.
            masked = getattr(self.extractor, "return_attention_mask", True)
            options = dict(padding="longest", return_attention_mask=masked, return_tensors="pt")
            batch = dict(self.extractor(waveforms, sampling_rate=SAMPLE_RATE, **options))
        if self.encoder:
            labels = [torch.tensor(ids).long() for ids in self.encoder([row["text"] for row in rows])]
            batch["labels"] = pad(labels, padding_value=IGNORED_LABEL)
        if self.augment:
            masks = []
            for row, length in zip(rows, lengths):
                seed = self.seed, self.epoch, zlib.crc32(row["clip"].encode())
                masks.append(draw_masks(input_length(self.extractor, length), self.extractor.feature_size, seed))
            batch["stretches"], batch["bands"] = (pad(list(map(torch.tensor, spans))) for spans in zip(*masks))
        if "clip" in rows[0]:
            batch["clips"] = [row["clip"] for row in rows]
            batch["counts"] = (sum(lengths), len(lengths) * max(lengths))
        if "problem" in rows[0]:
            batch["problems"] = [row["problem"] for row in rows]
        return batch


def decode_ids(processor, ids):
    """Greedy CTC text of a clip's frame ids: repeats collapsed, blanks (padding) and special tokens dropped."""
    return " ".join(processor.tokenizer.decode(ids, skip_special_tokens=True).split())


# ---------------------------------------------------------------- transcribing


@dataclass
class Span:
    """A clip, or a window of a long one: samples `start` to `stop`, of whose logits `first` to `last` count."""

    row: int
    start: int
    stop: int
    first: int
    last: int
    whole: bool


class Emissions(NamedTuple):
    """What a model says of a clip or window: the most probable `ids` of each of its frames and their natural
    `log_probs`, both (frames, how many were asked for), the most probable first.
    """

    ids: np.ndarray
    log_probs: np.ndarray


@dataclass
class Windows:
    """The spans of a dataset's clips, decoded when asked for; `problem` is why one cannot be."""

    clips: object
    spans: list[Span]
    row: int | None = None  # that of `clip`, at hand for the next window
    clip: dict | None = None

    def __getitem__(self, index):
        span, problem = self.spans[index], ""
        if span.row != self.row:
            self.clip, self.row = self.clips[span.row], span.row
        try:
            samples = decode_audio(self.clip["audio"], span.start, span.stop)
        except ValueError as error:
            samples, problem = np.zeros(0, np.float32), str(error)
        return {"samples": samples, "text": self.clip.get("text", ""), "problem": problem}


def window_spans(num_samples, window, overlap):
    """[(first, last sample)] of windows of `window` samples; without `overlap` a side they tile the clip."""
    step = window - 2 * overlap
    spans = [(0, min(window, num_samples))]
    while spans[-1][1] < num_samples:
        start = spans[-1][0] + step
        spans.append((start, min(start + window, num_samples)))
    return spans


def plan_spans(model, extractor, num_samples, window_seconds):
    """The `Span`s of clips of `num_samples`, the longest first, so that what does not fit in memory shows at once.

    Clips longer than `window_seconds` are cut into overlapping windows, whose logits are kept from the middle of the
    overlap.
    """
    import torch

    samples_per_logit = model.config.inputs_to_logits_ratio * getattr(extractor, "hop_length", 1)
    overlap = round(WINDOW_OVERLAP_SECONDS * SAMPLE_RATE / samples_per_logit) * samples_per_logit
    window = round(window_seconds * SAMPLE_RATE / samples_per_logit) * samples_per_logit
    shortest = shortest_clip(model, extractor)
    spans = []
    for row, length in enumerate(num_samples):
        for start, stop in window_spans(length, window, overlap):
            first = overlap // samples_per_logit if start else 0
            spans.append(Span(row, start, stop, first, (window - overlap) // samples_per_logit, length <= window))
    # What comes after a clip's own logits is padding, where `forward` leaves garbage.
    ends = [span for span in spans if span.stop == num_samples[span.row]]
    lengths = torch.tensor([max(span.stop - span.start, shortest) for span in ends])
    for span, last in zip(ends, logit_lengths(model, input_length(extractor, lengths)).tolist()):
        span.last = last
    return sorted(spans, key=lambda span: (span.whole, span.start - span.stop, span.row, span.start))


def pack_spans(spans, training, budget):
    """Indices of `spans` in batches, of windows or of whole clips: --per_device_eval_batch_size of them, or, if that is
    auto, as many as come to `budget` samples with their padding.
    """
    batches, start = [], 0
    while start < len(spans):
        longest = spans[start]  # of its batch, because `spans` are sorted
        fitting = max(1, budget // max(1, longest.stop - longest.start))
        stop = start + (fitting if training.auto_eval_batch else training.per_device_eval_batch_size)
        batches.append([start + place for place, span in enumerate(spans[start:stop]) if span.whole == longest.whole])
        start += len(batches[-1])
    return batches


EVAL_BUDGET_SECONDS = (160, 3_600)  # without a GPU, and at the most


def eval_budget(model, extractor, window_seconds, training):
    """Samples with padding that a scoring batch may hold: on a GPU what half of its free memory takes, as measured."""
    import torch

    if not (training.auto_eval_batch and training.device.type == "cuda"):
        return EVAL_BUDGET_SECONDS[0] * SAMPLE_RATE
    rows = [{"samples": np.zeros(round(window_seconds * SAMPLE_RATE), np.float32)}] * 4
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        run_batch(model, extractor, CTCCollator(extractor)(rows), training.device)
    a_second = (torch.cuda.max_memory_allocated() - before) / (len(rows) * window_seconds)
    seconds = torch.cuda.mem_get_info()[0] / 2 / max(a_second, 1)
    return agreed(min(seconds, EVAL_BUDGET_SECONDS[1]) * SAMPLE_RATE, training)


def best_path(emissions, lm=None):
    """The id of each frame of a clip, blanks and repeats included: the most probable one, or the search's with `lm`."""
    return beam_search(emissions, lm)[0] if lm else emissions.ids[:, 0].tolist()


def clip_text(processor, emissions, lm=None):
    return decode_ids(processor, best_path(emissions, lm))


def clip_texts(processor, emitted, lm, training):
    """The text of each clip with `lm`, of which each process searches its share: it takes longer than the model."""
    from accelerate.utils import gather_object
    from tqdm import tqdm

    mine = range(training.process_index, len(emitted), training.world_size)
    silent = training.process_index > 0 or training.disable_tqdm
    bar = tqdm(mine, desc="language model", unit="clip", disable=silent)
    texts = [(index, clip_text(processor, emitted[index], lm)) for index in bar]
    return [text for _, text in sorted(gather_object(texts))]


def emit_clips(model, processor, selection, args, training, encoder=None, lm=None, doing="scoring"):
    """(the `Emissions` of each clip, {clip: why it cannot be read}, the mean CTC loss), by all processes together.

    Of each frame the most probable id is kept, or as many as a search with `lm` needs. With an `encoder` of the clips'
    labels there is a loss, of those that need no windows; otherwise it is 0.
    """
    import torch
    from accelerate.utils import gather_object
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    extractor, model = processor.feature_extractor, model.to(training.device).eval()
    lengths = [row["num_samples"] for row in selection.rows]
    spans = plan_spans(model, extractor, lengths, args.window_seconds)
    batches = pack_spans(spans, training, eval_budget(model, extractor, args.window_seconds, training))
    mine = batches[training.process_index :: training.world_size]
    loader = DataLoader(
        Windows(selection.clips, spans),
        batch_sampler=mine,
        collate_fn=CTCCollator(extractor, encoder, shortest=shortest_clip(model, extractor)),
        num_workers=min(training.dataloader_num_workers, len(mine)),
        pin_memory=training.device.type == "cuda",
        # Its own: a DataLoader draws a seed, and scoring must not move what training draws next.
        generator=torch.Generator(),
    )
    silent = training.process_index > 0 or training.disable_tqdm
    pieces, loss, counted = [], 0.0, 0
    bar = tqdm(total=sum(map(len, mine)), desc=doing, unit="clip", disable=silent)
    with torch.inference_mode(), bar, STOP_SIGNALS.deferring():
        for indices, batch in zip(mine, loader):
            if STOP_SIGNALS.number:
                break
            batch_spans, problems = [spans[index] for index in indices], batch.pop("problems")
            whole = batch_spans[0].whole
            if not whole:
                batch.pop("labels", None)
            emitted, batch_loss = run_batch(model, extractor, batch, training.device, LM_CANDIDATES if lm else 1)
            loss, counted = loss + batch_loss, counted + len(indices) * whole
            for span, problem, emissions in zip(batch_spans, problems, emitted):
                kept = Emissions(*(values[span.first : span.last] for values in emissions))
                pieces.append((span.row, span.start, problem, kept))
            bar.update(len(indices))
        pieces, losses, counts = zip(*gather_object([(pieces, loss, counted)]))
        if stopped := STOP_SIGNALS.among_all(training):
            raise Stopped(stopped)
    joined, problems = [[] for _ in lengths], {}
    for row, _, problem, emissions in sorted(itertools.chain(*pieces), key=lambda piece: piece[:2]):
        joined[row].append(emissions)
        if problem:
            problems[row] = problem
    joined = [Emissions(*map(np.concatenate, zip(*parts))) for parts in joined]
    return joined, problems, sum(losses) / max(1, sum(counts))


def run_batch(model, extractor, batch, device, count=1):
    """(the `Emissions` of each clip, the sum of their losses) of a batch, halved where it does not fit on the GPU."""
    import torch

    size = len(next(iter(batch.values())))
    try:
        output = model(**model_inputs(batch, extractor, device))
        best = output.logits.float().log_softmax(-1).topk(min(count, output.logits.shape[-1]))
        ids, log_probs = best.indices.int().cpu().numpy(), best.values.cpu().numpy()
        return list(map(Emissions, ids, log_probs)), float(output.loss) * size if "labels" in batch else 0.0
    except torch.OutOfMemoryError as error:
        if size == 1:
            raise RunError(
                "the GPU's memory is full with a single clip to write down: try a lower --window_seconds, or "
                "--use_cpu true"
            ) from error
    torch.cuda.empty_cache()
    emitted, loss = [], 0.0
    for part in (slice(0, size // 2), slice(size // 2, None)):
        halved = {name: value[part] for name, value in batch.items()}
        more, more_loss = run_batch(model, extractor, halved, device, count)
        emitted, loss = emitted + more, loss + more_loss
    return emitted, loss


# ---------------------------------------------------------------- transcripts


@dataclass
class Word:
    """A word of a transcript, `start` and `end` in seconds; `probability` is the mean of those of its frames."""

    text: str
    start: float
    end: float
    probability: float


def frame_seconds(model, extractor):
    """(seconds where the first frame of the logits begins, and that one frame lasts).

    The first sees the shortest clip; in the middle of what it sees lies what it stands for. 0.0525 and 0.04 for MedASR.
    """
    step = model.config.inputs_to_logits_ratio * getattr(extractor, "hop_length", 1)
    return (shortest_clip(model, extractor) - step) / 2 / SAMPLE_RATE, step / SAMPLE_RATE


def word_frames(tokenizer, path):
    """Lists of the frames of a clip's path of ids in which each word is written, without blanks and special tokens."""
    skipped, between = set(tokenizer.all_special_ids), getattr(tokenizer, "word_delimiter_token", None)
    pieces, words, before = tokenizer.convert_ids_to_tokens(path), [[]], None
    for frame, (token, piece) in enumerate(zip(path, pieces)):
        if piece == between or (piece.startswith("▁") and token not in (before, *skipped)):
            words.append([])
        if piece != between and token not in skipped:
            words[-1].append(frame)
        before = token
    return [frames for frames in words if frames]


def clip_words(processor, emissions, path, first, step):
    """The `Word`s of a clip's `path` of ids, whose texts, joined by spaces, are `decode_ids` of it.

    `first` and `step` are the `frame_seconds`.
    """
    found = np.where(emissions.ids == np.reshape(path, (-1, 1)), emissions.log_probs, -np.inf)
    probabilities, words = np.exp(found.max(axis=1, initial=-np.inf)), []
    for frames in word_frames(processor.tokenizer, path):
        start, stop = frames[0], frames[-1] + 1
        if text := decode_ids(processor, path[start:stop]):
            words.append(Word(text, first + start * step, first + stop * step, float(probabilities[frames].mean())))
    return words


def join_words(words):
    """The text of words, some of which may end in line breaks."""
    return re.sub(r"(?<=\n) ", "", " ".join(word.text for word in words)).strip()


# What MedASR writes for dictated punctuation and layout, and what it stands for.
DICTATED = {
    "period": ".", "full stop": ".", "comma": ",", "colon": ":", "semicolon": ";", "question mark": "?",
    "exclamation mark": "!", "exclamation point": "!", "new line": "\n", "next line": "\n", "new paragraph": "\n\n",
    "next paragraph": "\n\n", "hyphen": "-", "slash": "/", "open parenthesis": "(", "close parenthesis": ")",
}  # fmt: skip
DICTATED_TOKEN = r"\{(" + "|".join(DICTATED) + r")\}"
DICTATED_OR_WORD = re.compile(rf"{DICTATED_TOKEN}|(?:(?!{DICTATED_TOKEN})\S)+")


def format_dictation(words):
    """`words` with dictated punctuation and layout written at the end of the word before, without a space.

    Signs that open or join take the next word too. Tokens that are not known stay as they are.
    """
    owners = [word for word in words for _ in word.text + " "]  # of each character
    formatted, joins = [], False
    for match in DICTATED_OR_WORD.finditer(" ".join(word.text for word in words)):
        owner, sign = owners[match.start()], DICTATED.get(match[1])
        if not sign:
            word = dataclasses.replace(owner, text=match[0])
            if joins:
                before = formatted.pop()
                chance = min(before.probability, word.probability)
                word = Word(before.text + word.text, before.start, word.end, chance)
            formatted.append(word)
        elif sign.isspace():
            if formatted:
                formatted[-1].text = formatted[-1].text.rstrip("\n") + sign
        elif sign == "(" or not formatted:
            formatted.append(dataclasses.replace(owner, text=sign))
        elif not formatted[-1].text.endswith(sign):
            formatted[-1].text += sign
        joins = sign in ("(", "-", "/")
    return formatted


LINE_CHARACTERS, CUE_LINES, CUE_SECONDS = 42, 2, 7.0  # of subtitles, as usual in television
LINGER_SECONDS = 0.5  # that a subtitle stays after its last word's last frame, where there is room
PAUSE_SECONDS = 1.0  # between the written frames of two words, at which a sentence is taken to end


def cue_lines(words):
    """The lines of a subtitle, none longer than LINE_CHARACTERS but of a single word."""
    return textwrap.wrap(
        join_words(words).replace("\n", " "), LINE_CHARACTERS, break_long_words=False, break_on_hyphens=False
    )


def segments(words):
    """The words of a clip in lists, each of a subtitle, parted at pauses and line breaks and where it is full."""
    parts = []
    for word in words:
        if (
            not parts
            or parts[-1][-1].text.endswith("\n")
            or word.start - parts[-1][-1].end >= PAUSE_SECONDS
            or word.end - parts[-1][0].start > CUE_SECONDS
            or len(cue_lines([*parts[-1], word])) > CUE_LINES
        ):
            parts.append([])
        parts[-1].append(word)
    return parts


def timestamp(seconds, decimal_mark):
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{decimal_mark}{milliseconds % 1000:03}"


def transcript(words, kind, name=None):
    """The words of a recording as the content of a file of `kind`, a --transcript_format.

    json has the keys of Whisper's, in one line, and "file" before them if there is a `name`.
    """
    if kind == "text":
        return join_words(words) + "\n"
    parts = segments(words)
    if kind == "json":
        content = {"file": name} if name is not None else {}
        content |= {"text": join_words(words), "segments": [], "language": "en"}
        for number, part in enumerate(parts):
            times = {"start": round(part[0].start, 3), "end": round(part[-1].end, 3)}
            listed = [
                {"word": word.text, "start": round(word.start, 3), "end": round(word.end, 3)}
                | {"probability": round(word.probability, 4)}
                for word in part
            ]
            content["segments"].append({"id": number, **times, "text": join_words(part), "words": listed})
        return json.dumps(content, ensure_ascii=False) + "\n"
    cues, following = [], [part[0].start for part in parts[1:]] + [float("inf")]
    for number, (part, next_start) in enumerate(zip(parts, following), start=1):
        times = part[0].start, min(part[-1].end + LINGER_SECONDS, next_start)
        times = " --> ".join(timestamp(seconds, "," if kind == "srt" else ".") for seconds in times)
        lines = "\n".join(cue_lines(part))
        cues.append(f"{number}\n{times}\n{lines}\n" if kind == "srt" else f"{times}\n{html.escape(lines, False)}\n")
    return "\n".join(cues if kind == "srt" else ["WEBVTT\n", *cues])


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
        say(f"{PROGRAM}: error: {printable(self.name)} cannot be read as audio: {reason}", sys.stderr)


def found_in(path):
    """[(path, place below it)] of what one PATH of --transcribe stands for; raises UsageError if that is nothing."""
    if path == "-" or (os.path.exists(path) and not os.path.isdir(path)):
        return [(path, "stdin" if path == "-" else os.path.basename(path))]
    if os.path.isdir(path):
        try:
            found = sorted(filter(is_audio_name, files_below(path)))
        except OSError as error:
            raise UsageError(f"--transcribe is {path}, which cannot be read ({one_line(error)})") from error
        if not found:
            raise UsageError(f"--transcribe is {path}: no audio file is in this folder")
        return [(file, os.path.relpath(file, path)) for file in found]
    matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []
    if not matches:
        raise UsageError(f"--transcribe is {path}: there is no such file or folder")
    fixed = re.split(r"[^/\\]*[*?\[]", path)[0] or "."
    files = [found_in(match) if os.path.isdir(match) else [(match, "")] for match in matches]
    return [(file, os.path.relpath(file, fixed)) for part in files for file, _ in part]


def find_recordings(args):
    """The `Recording`s of --transcribe, each once, in order; raises UsageError, also where two would be one file."""
    found = {}
    for path in args.transcribe:
        for file, below in found_in(path):
            found.setdefault(os.path.abspath(file) if file != "-" else file, (file, below))
    kind, places = args.transcript_format, {}
    stems = Counter(os.path.splitext(below)[0].casefold() for _, below in found.values())
    recordings = []
    for file, below in found.values():
        stem = os.path.splitext(below)[0]
        recordings.append(Recording(file, below if stems[stem.casefold()] > 1 else stem))
        other = places.setdefault(recordings[-1].under.casefold(), file)
        if args.transcript_dir is not None and other != file:
            advice = "give the folder that both are in, whose parts are kept apart"
            raise UsageError(f"--transcript_dir: {other} and {file} would both be {below}'s transcript; {advice}")
    if kind in ("srt", "vtt") and several(args, recordings) and args.transcript_dir is None:
        raise UsageError(f"--transcript_format {kind} of several files needs --transcript_dir: their times start anew")
    return recordings


def several(args, recordings):
    """Whether the texts need their names beside them: one PATH that is a file has one text."""
    return [recording.name for recording in recordings] != args.transcribe or len(recordings) > 1


def spooled(recording, folder):
    """The path of a file in `folder` with what comes through a pipe, because libsndfile seeks in what it reads."""
    if recording.name == "-" and os.isatty(0):
        raise ValueError("standard input is a terminal; pipe audio into it")
    target = os.path.join(folder, str(len(os.listdir(folder))))
    given = 0 if recording.name == "-" else recording.name
    with open(given, "rb", closefd=given != 0) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, 2**20)
    if not os.path.getsize(target):
        raise ValueError("nothing came")
    return target


PART_SECONDS = 3_600  # of audio whose texts are made together: enough to fill batches, and little to lose


def recording_parts(recordings, folder, seconds):
    """Yield lists of `recordings` of about `seconds` of audio together, without those that cannot be read."""
    part = []
    for recording in recordings:
        try:
            piped = recording.name == "-" or stat.S_ISFIFO(os.stat(recording.name).st_mode)
            recording.path = spooled(recording, folder) if piped else recording.name
            recording.length, missing = audio_length(recording.path)
        except (ValueError, OSError) as error:
            if is_full_disk(error):
                raise
            recording.give_up(one_line(error))
            continue
        if missing > 0:
            have = recording.length / SAMPLE_RATE
            warn(f"{recording.name} ends after {have:,.1f} s, {missing:,.1f} s before what its header says")
        part.append(recording)
        if sum(recording.length for recording in part) >= seconds * SAMPLE_RATE:
            yield part
            part = []
    if part:
        yield part


# ---------------------------------------------------------------- language model

LM_CANDIDATES = 16  # the most probable ids of a frame, which the search chooses from
KENLM_MAGIC = b"mmap lm http://kheafield.com/code"


class Prefix:
    """A text so far: the language model's `state` after it, what its last token has `added` to the score, and
    {token: `longer` text} of those that were tried.
    """

    __slots__ = ("state", "added", "longer")

    def __init__(self, state, added=0.0):
        self.state, self.added, self.longer = state, added, {}


@dataclass
class LanguageModel:
    """A KenLM n-gram of tokens. Each token adds weight x its natural log-probability + word_score to a text's score.

    `words` are the numbers of the ids' names in the n-gram; `counts_as` (ids,) each id itself, or the blank where it is
    a special token, which no text shows.
    """

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
        """ "lm" of metrics.json."""
        return {name: getattr(self, name) for name in ("name", "weight", "word_score", "beam")}

    def start(self):
        return Prefix(self.kenlm.start(False))

    def extend(self, prefix, token):
        longer = prefix.longer.get(token)
        if longer is None:
            state, log10 = self.kenlm.score(prefix.state, self.words[token])
            longer = prefix.longer[token] = Prefix(state, self.weight * log10 * math.log(10) + self.word_score)
        return longer

    def end(self, prefix):
        """What the end of the text adds to its score."""
        return self.weight * self.kenlm.finish(prefix.state)[1] * math.log(10)


def beam_search(emissions, lm):
    """(the id of each frame, the score) of the best text: the log of its alignments' summed probability + lm's part.

    A prefix beam search (Graves & Jaitly 2014) in Python: flashlight's decoder knows no score for a token and asks a
    language model that adds one for every id of every frame, which took ten times as long.
    """
    ids, log_probs = lm.counts_as[emissions.ids].tolist(), emissions.log_probs.tolist()
    counts = np.maximum(1, (emissions.log_probs >= lm.min_log_prob).sum(axis=1)).tolist()
    # (text, id of the last frame) -> (score, the ids so far as nested pairs); the last id tells repeats from doubles.
    hypotheses = {(lm.start(), lm.blank): (0.0, ())}
    for frame_ids, frame_log_probs, count in zip(ids, log_probs, counts):
        grown = {}
        for (prefix, last), (score, path) in hypotheses.items():
            for token, log_prob in zip(frame_ids[:count], frame_log_probs):
                if token == lm.blank or token == last:
                    add_hypothesis(grown, (prefix, token), score + log_prob, (path, token))
                else:
                    longer = lm.extend(prefix, token)
                    add_hypothesis(grown, (longer, token), score + log_prob + longer.added, (path, token))
        best = sorted(grown.items(), key=lambda item: -item[1][0])[: lm.beam]
        hypotheses = {key: item for key, item in best if item[0] >= best[0][1][0] - lm.max_behind}
    ended = {}
    for (prefix, _), (score, path) in hypotheses.items():
        add_hypothesis(ended, prefix, score + lm.end(prefix), path)
    score, path = max(ended.values(), key=lambda item: item[0])
    frames = []
    while path:
        path, token = path
        frames.append(token)
    return frames[::-1], score


def add_hypothesis(hypotheses, key, score, path):
    """Sum the probabilities of two alignments of one text, and keep the path of the more probable one."""
    if known := hypotheses.get(key):
        (high, path), (low, _) = (known, (score, path)) if known[0] >= score else ((score, path), known)
        score = high + math.log1p(math.exp(low - high))
    hypotheses[key] = score, path


def lm_path(args):
    """The file that --lm means, fetched if need be; raises RunError."""
    from huggingface_hub import errors, hf_hub_download

    folder = Path(args.model).expanduser()
    if args.lm != "auto":
        return args.lm
    if (folder / LM_FILE).is_file():
        return str(folder / LM_FILE)
    # A fine-tuned model's folder has none: MedASR's serves it too.
    repo, revision = (DEFAULT_MODEL, None) if folder.is_dir() else (args.model, args.model_revision)
    try:
        with explained_hub_errors(repo, "model"):
            return hf_hub_download(repo, LM_FILE, revision=revision)
    except RunError as error:
        if isinstance(error.__cause__, errors.RemoteEntryNotFoundError):
            raise RunError(f"--lm auto: model {repo} has no {LM_FILE}; give --lm a file") from error
        raise RunError(f"--lm auto looks for {LM_FILE} of {repo}; give --lm a file, or: {error}") from error


def lm_file_problem(path):
    """Why `path` is no n-gram that KenLM reads, "" if it begins like one."""
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(path, "rb") as file:
            head = file.read(1 << 16)
    except (OSError, EOFError, zlib.error) as error:
        return f"cannot be read ({one_line(error)})"
    lines = (line.strip() for line in head.split(b"\n") if line.strip() and not line.startswith(b"#"))
    if not head:
        return "is empty"
    if not head.startswith(KENLM_MAGIC) and next(lines, b"") != b"\\data\\":
        return "is no language model: it begins neither as ARPA (\\data\\) nor as KenLM's binary format"
    return ""


@contextlib.contextmanager
def silent_stderr():
    """KenLM draws on stderr while it reads an ARPA file."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def open_kenlm(path, words):
    """The n-gram in a file, which scores the numbers of these `words`; raises RunError."""
    if problem := lm_file_problem(path):
        raise RunError(f"--lm {path} {problem}")
    try:
        from flashlight.lib.text.decoder.kenlm import KenLM
        from flashlight.lib.text.dictionary import Dictionary

        with silent_stderr():
            return KenLM(str(path), Dictionary(words))
    except (RuntimeError, ValueError, MemoryError, ImportError) as error:
        # KenLM says first in which of its source files.
        what = re.sub(r"^.* threw \w+( because `.*?')?\.", "", " ".join(str(error).split()))
        raise RunError(f"--lm {path} cannot be loaded: {what.strip()[:300]}") from error


def load_lm(args, processor, vocab_size):
    """The `LanguageModel` of --lm for the model's tokens, None without the flag; raises RunError."""
    if not args.lm:
        return None
    path, tokenizer = lm_path(args), processor.tokenizer
    blank, special = tokenizer.pad_token_id, {None, *tokenizer.all_special_tokens}
    pieces = dict(enumerate(tokenizer.convert_ids_to_tokens(range(vocab_size))))
    pieces = {id: piece for id, piece in pieces.items() if piece not in special and id != blank}
    spellings = [{id: piece.replace("▁", mark) for id, piece in pieces.items()} for mark in LM_WORD_MARKS]
    words = list(dict.fromkeys([LM_NONSENSE, *LM_WORDS, *itertools.chain(*(names.values() for names in spellings))]))
    numbers = {word: number for number, word in enumerate(words)}
    kenlm = open_kenlm(path, words)
    known = known_words(kenlm, numbers)
    spelling = max(spellings, key=lambda names: len(known & set(names.values())))
    check_lm_vocabulary(path, known, set(spelling.values()))
    return LanguageModel(
        name=Path(path).name,
        kenlm=kenlm,
        words=[numbers[spelling.get(id, LM_NONSENSE)] for id in range(vocab_size)],
        counts_as=np.array([id if id in pieces else blank for id in range(vocab_size)]),
        blank=blank,
        weight=args.lm_weight,
        word_score=args.lm_word_score,
        beam=args.lm_beam,
    )


# What stands for "▁" in an n-gram's file: itself, or what pyctcdecode's users have to write (MedASR's lm_6.kenlm).
LM_WORD_MARKS = "▁#"
LM_NONSENSE = "no/such/piece"
LM_WORDS = ["the", "and", "with", "that", "from", "this", "THE", "AND", "WITH", "THAT", "FROM", "THIS"]


def known_words(kenlm, numbers):
    """Those of the words {word: its number} that an n-gram knows: it gives another probability than to nonsense."""
    start = kenlm.start(False)
    unknown = kenlm.score(start, numbers[LM_NONSENSE])[1]
    return {word for word, number in numbers.items() if kenlm.score(start, number)[1] != unknown}


def check_lm_vocabulary(path, known, pieces):
    """Raise RunError if an n-gram that knows the words `known` cannot score texts of `pieces`, warn if not all."""
    found = len(known & pieces)
    share = f"{found:,} of the model's {len(pieces):,} tokens"
    if words := [word for word in LM_WORDS if word in known - pieces]:
        what = f"knows whole words, such as '{words[0]}'"
        raise RunError(f"--lm {path} {what}: it must be an n-gram of the model's tokens, not of words")
    if found < len(pieces) / 2:
        raise RunError(f"--lm {path} knows {share}: it is for another tokenizer")
    if found < 0.9 * len(pieces):
        warn(f"--lm {path} knows only {share}")


TUNING_CLIPS = 500  # of dev at the most: the search is run some thirty times
TUNING_WEIGHTS, TUNING_WORD_SCORES = (0.2, 0.4, 0.6, 0.8, 1.0), (0.0, 0.5, 1.0, 1.5, 2.0)


def tuned_lm(lm, emitted, references, processor, training):
    """(`lm` with the weight and word score of the lowest WER, a dict of what was tried): a grid, then half its steps
    around the best of it, the smaller values among equals.
    """
    references, tried = list(map(normalize_wer, references)), {}

    def best_with(pairs):
        for weight, word_score in pairs:
            if weight >= 0 and (weight, word_score) not in tried:
                trial = dataclasses.replace(lm, weight=weight, word_score=word_score)
                texts = clip_texts(processor, emitted, trial, training)
                tried[weight, word_score] = rate(error_counts(references, list(map(normalize_wer, texts))))
        return min(tried, key=lambda pair: (tried[pair], *pair))

    greedy = [normalize_wer(clip_text(processor, emissions)) for emissions in emitted]
    weight, word_score = best_with([(0.0, 0.0), *itertools.product(TUNING_WEIGHTS, TUNING_WORD_SCORES)])
    around = itertools.product((weight - 0.1, weight, weight + 0.1), (word_score - 0.25, word_score, word_score + 0.25))
    weight, word_score = best_with([(round(weight, 2), round(word_score, 2)) for weight, word_score in around])
    best = dataclasses.replace(lm, weight=weight, word_score=word_score)
    record = {
        **best.settings,
        "clips": len(references),
        "wer": tried[weight, word_score],
        "wer_greedy": rate(error_counts(references, greedy)),
        "tried": [[*pair, wer] for pair, wer in tried.items()],
    }
    return best, record


# ---------------------------------------------------------------- scores

# What readers say for punctuation and layout. Many AfriSpeech speakers voice it although the prompt has only the sign.
SPOKEN_PUNCTUATION = re.compile(
    r"\b(?:full stop|period|comma|semi ?colon|colon|question mark|exclamation mark|hyphen|dash|slash|apostrophe|"
    r"(?:open|close)(?:d)? (?:bracket|brackets|parenthesis|quote|quotes)|"
    r"next line|new line|next paragraph|new paragraph)\b"
)


def drop_spoken_punctuation(reference, hypothesis):
    """The normalised hypothesis without the spoken-punctuation words that its reference lacks, for `wer_spoken`."""
    written = set(SPOKEN_PUNCTUATION.findall(reference))
    return " ".join(SPOKEN_PUNCTUATION.sub(lambda match: match[0] if match[0] in written else " ", hypothesis).split())


@functools.cache
def error_rates_metric():
    """jiwer's corpus-level WER and CER as an `evaluate` metric; evaluate.load("wer") would download its script."""
    import datasets
    import evaluate
    import jiwer

    class ErrorRates(evaluate.Metric):
        def _info(self):
            texts = datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("string")))
            return evaluate.MetricInfo("corpus-level WER and CER", citation="", features=texts)

        def _compute(self, predictions, references):
            return {"wer": jiwer.wer(references, predictions), "cer": jiwer.cer(references, predictions)}

    return ErrorRates(experiment_id=f"medasr-{os.getpid()}", keep_in_memory=True)


def aligned(references, hypotheses, characters=False):
    """Yield (index of the pair, "equal" or a kind of error, stretch of the reference, of the hypothesis), all in turn.

    A stretch is a list of words, or of `characters`.
    """
    import jiwer

    output = (jiwer.process_characters if characters else jiwer.process_words)(references, hypotheses)
    for index, chunks in enumerate(output.alignments):
        before, after = output.references[index], output.hypotheses[index]
        for chunk in chunks:
            stretches = before[chunk.ref_start_idx : chunk.ref_end_idx], after[chunk.hyp_start_idx : chunk.hyp_end_idx]
            yield index, chunk.type, *stretches


ERROR_KINDS = ("substitute", "delete", "insert")  # jiwer's names


def error_counts(references, hypotheses, characters=False):
    """Errors of each pair, an int array (pairs, 4): substitutions, deletions, insertions, length of the reference."""
    counts = np.zeros((len(references), 4), dtype=np.int64)
    for index, kind, before, after in aligned(references, hypotheses, characters):
        counts[index, 3] += len(before)
        if kind != "equal":
            counts[index, ERROR_KINDS.index(kind)] += max(len(before), len(after))
    return counts


def rate(counts):
    """Corpus-level error rate of an array of `error_counts`; None without a single reference word."""
    return float(counts[:, :3].sum() / counts[:, 3].sum()) if counts[:, 3].sum() else None


DRAWN_AT_ONCE = 2**20  # speakers: all draws of a corpus whose clips name none would take gigabytes


def bootstrap_rates(counts, speakers, draws=BOOTSTRAP_DRAWS, seed=0):
    """WERs of `draws` resamplings of the speakers, shape (draws,).

    Whole speakers are drawn because their clips are not independent (Bisani & Ney 2004, doi
    10.1109/ICASSP.2004.1326009; blocks: arXiv 1912.09508). The same seed and speakers draw the same speakers, which
    pairs two systems.
    """
    names, block = np.unique(speakers, return_inverse=True)
    errors = np.bincount(block, counts[:, :3].sum(axis=1), len(names))
    words = np.bincount(block, counts[:, 3], len(names))
    generator, rates, at_once = np.random.default_rng(seed), [], max(1, DRAWN_AT_ONCE // len(names))
    for done in range(0, draws, at_once):
        drawn = generator.integers(len(names), size=(min(at_once, draws - done), len(names)), dtype=np.int32)
        rates.append(errors[drawn].sum(axis=1) / np.maximum(words[drawn].sum(axis=1), 1))
    return np.concatenate(rates)


def interval(values):
    """The middle 95 % of `values`."""
    return np.percentile(values, [2.5, 97.5]).tolist()


RATES = ("wer", "wer_spoken", "wer_paper", "wer_raw", "cer")
DURATIONS = {"0-5 s": 5, "5-10 s": 10, "10-20 s": 20, "over 20 s": float("inf")}  # group -> its end, in seconds
GROUP_KINDS = ("domain", "accent", "country", "gender", "age_group", "seen_accent", "duration")
# A smaller group is shown, and marked, but neither ranked nor averaged: its figure says more about its few speakers.
MIN_GROUP_SPEAKERS, MIN_GROUP_WORDS = 5, 500


def group_name(row, kind, train_accents):
    """The name of the group of `kind` that a clip belongs to."""
    if kind == "seen_accent":
        if train_accents is None or not row["accent"]:
            return "unknown"
        return "seen" if row["accent"] in train_accents else "unseen"
    if kind == "duration" and row["num_samples"] is not None:
        return next(name for name, end in DURATIONS.items() if row["num_samples"] < end * SAMPLE_RATE)
    return row.get(kind) or "unknown"


@dataclass
class Scored:
    """A system's `texts` on the clips `rows`; `plain` are (references, texts) as normalised for WER.

    `counts` are {rate: error_counts}, `groups` {kind: the group of each clip, shape (clips,)}.
    """

    rows: list[dict]
    texts: list[str]
    plain: tuple
    counts: dict[str, np.ndarray]
    groups: dict[str, np.ndarray]

    @functools.cached_property
    def speakers(self):
        return np.array([row["speaker"] or row["clip"] for row in self.rows])

    @functools.cached_property
    def short(self):
        """Whether each clip is under PAPER_SECONDS; one of unknown duration (NaN) is not."""
        return np.array([row["num_samples"] for row in self.rows], float) < PAPER_SECONDS * SAMPLE_RATE

    @functools.cached_property
    def scores(self):
        """What metrics.json has of a system."""
        return for_each_group(self.groups, self.scores_of)

    def scores_of(self, chosen):
        words, speakers = self.counts["wer"][chosen], self.speakers[chosen]
        people, total = len(np.unique(speakers)), int(words[:, 3].sum())
        return {
            **{name: rate(counts[chosen]) for name, counts in self.counts.items()},
            "wer_paper_short": rate(self.counts["wer_paper"][self.short & chosen]),
            "clips": len(words),
            "speakers": people,
            "words": total,
            "wer_ci95": interval(bootstrap_rates(words, speakers)),
            **dict(zip(("substitutions", "deletions", "insertions"), words[:, :3].sum(axis=0).tolist())),
            "small": people < MIN_GROUP_SPEAKERS or total < MIN_GROUP_WORDS,
        }


def for_each_group(groups, measure):
    """The dict measure(bool array of the clips to measure) for all clips, with that of each group under "groups"."""
    by_group = {
        kind: {str(name): measure(names == name) for name in np.unique(names)} for kind, names in groups.items()
    }
    return {**measure(np.ones(len(groups["domain"]), bool)), "groups": by_group}


def score_texts(rows, texts, train_accents):
    """The `Scored` of hypotheses `texts` against the transcripts of `rows`."""
    sides = [row["text"] for row in rows], texts
    pairs = {name: [list(map(normalize, side)) for side in sides] for name, normalize in NORMALIZERS.items()}
    references, hypotheses = plain = pairs["wer"]
    pairs["wer_spoken"] = references, list(map(drop_spoken_punctuation, references, hypotheses))
    counts = {name: error_counts(*pair) for name, pair in pairs.items()}
    counts["cer"] = error_counts(*plain, characters=True)
    groups = {kind: np.array([group_name(row, kind, train_accents) for row in rows]) for kind in GROUP_KINDS}
    return Scored(rows, texts, plain, counts, groups)


# What is scored on one set of clips, and its name in tables: the greedy text and that with the language model, of the
# model before and after. Results are made of a dict with some of these, each `Scored`, and metrics with their scores.
SYSTEMS = {
    "baseline": "before",
    "finetuned": "fine-tuned",
    "baseline_lm": "before, LM",
    "finetuned_lm": "fine-tuned, LM",
}


def before_and_after(systems, kind=""):
    """(the baseline's, the fine-tuned model's) of `systems` or metrics, None for none; "_lm" for those with the LM."""
    return systems.get("baseline" + kind), systems.get("finetuned" + kind)


def last_of(systems, kind=""):
    """The fine-tuned model's of `systems`, else the baseline's, else None."""
    before, after = before_and_after(systems, kind)
    return after or before


def text_kinds(systems):
    """The endings of names in `systems`: "" of greedy texts, and "_lm" if there are texts with a language model."""
    return ["", "_lm"] if last_of(systems, "_lm") else [""]


def compare(baseline, finetuned):
    """The "delta" of metrics.json: fine-tuned minus baseline on the same clips, for all of them and each group."""

    def difference(chosen):
        before, after = baseline.counts["wer"][chosen], finetuned.counts["wer"][chosen]
        then, now = ({name: rate(side.counts[name][chosen]) for name in side.counts} for side in (baseline, finetuned))
        speakers = baseline.speakers[chosen]
        change = bootstrap_rates(after, speakers) - bootstrap_rates(before, speakers)
        errors = (after - before)[:, :3].sum(axis=1)
        return {
            **{name: now[name] - then[name] for name in now if now[name] is not None},
            "wer_ci95": interval(change),
            "probability_of_improvement": float((change < 0).mean()),
            "clips_better": float((errors < 0).mean()),
            "clips_equal": float((errors == 0).mean()),
            "clips_worse": float((errors > 0).mean()),
        }

    return for_each_group(baseline.groups, difference)


# ---------------------------------------------------------------- report

NEGATIONS = re.compile(r"no|not|nor|none|never|without|negative|denie[sd]|deny|absent|cannot|\w+n't")
NUMBERS = re.compile(
    r"\w*\d\w*|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty|thirty|forty|fifty|"
    r"sixty|seventy|eighty|ninety|hundred|thousand|million|half|once|twice"
)


def clinical_words(scored):
    """Words that clinical references have at least 5 times and, by frequency, 10 times as often as general ones; none
    without general ones to compare with.
    """
    references, domains = np.array(scored.plain[0], object), scored.groups["domain"]
    clinical, general = (Counter(" ".join(references[domains == domain]).split()) for domain in DOMAINS)
    if not general:
        return set()
    scale = clinical.total() / general.total()
    return {
        word for word, count in clinical.items() if count >= 5 and count >= 10 * general[word] * scale and len(word) > 2
    }


def word_errors(scored):
    """({kind of word: its recall in words}, {kind of error: Counter of the words}) of a `Scored`."""
    kinds_of_words = {
        "numbers": NUMBERS.fullmatch,
        "negations": NEGATIONS.fullmatch,
        "clinical words": clinical_words(scored).__contains__,
    }
    found, total, errors = Counter(), Counter(), {kind: Counter() for kind in ERROR_KINDS}
    for _, kind, before, after in aligned(*scored.plain):
        if kind != "equal":
            pairs = itertools.zip_longest(before, after)
            errors[kind].update(" -> ".join(filter(None, pair)) for pair in pairs)
        for name, belongs in kinds_of_words.items():
            count = sum(bool(belongs(word)) for word in before)
            total[name] += count
            found[name] += count if kind == "equal" else 0
    recall = {name: f"{percent(found[name] / count)} of {count:,}" if count else "-" for name, count in total.items()}
    return recall, errors


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


def group_table(kind, metrics):
    """Markdown lines: each group of `kind` before and after, the largest first; small groups are marked with *."""
    rows, before, with_lm, delta = [], metrics["baseline"], last_of(metrics, "_lm"), metrics["delta"]
    for name, now in sorted(last_of(metrics)["groups"][kind].items(), key=lambda item: -item[1]["words"]):
        low, high = map(percent, now["wer_ci95"])
        rows.append(
            [
                markdown_text(name) + "\\*" * now["small"],
                *(f"{now[size]:,}" for size in ("clips", "speakers", "words")),
                percent(before["groups"][kind][name]["wer"]) if delta else "-",
                percent(now["wer"]),
                f"[{low}, {high}]" if now["words"] else "-",
                points(delta["groups"][kind][name]) if delta and now["words"] else "-",
                *([percent(with_lm["groups"][kind][name]["wer"])] if with_lm else []),
            ]
        )
    columns = ["clips", "speakers", "words", "before", "WER", "95 % interval", "change, points"]
    columns += ["WER, LM"] if with_lm else []
    return markdown_table([kind.replace("_", " "), *columns], rows)


def group_summary(kind, metrics):
    """One line: macro average over the groups that are large enough, and the worst of them."""
    groups = last_of(metrics)["groups"][kind]
    large = {name: scores["wer"] for name, scores in groups.items() if not scores["small"]}
    if len(large) < 2:
        return f"Fewer than two groups have {MIN_GROUP_SPEAKERS} speakers and {MIN_GROUP_WORDS} words: none is ranked."
    worst = max(large, key=large.get)
    mean = percent(np.mean(list(large.values())))
    average = f"Macro average over {len(large)} groups that are large enough: {mean}"
    return f"{average}; the worst is {markdown_text(worst)}, {percent(large[worst])}."


def error_sections(systems):
    """Markdown lines on what goes wrong: recalls, commonest errors, clips that got worse, empty and runaway outputs."""
    (baseline, finetuned), last = before_and_after(systems), last_of(systems)
    recall, errors = word_errors(last)
    before = word_errors(baseline)[0] if finetuned and baseline else {}
    lines = ["## What goes wrong\n", "Recall, the share of the reference's words that come out right:\n"]
    cells = [[name, before.get(name, "-"), now] for name, now in recall.items()]
    lines += markdown_table(["words", "before", "now"], cells)
    for kind, label in (("substitute", "confusions"), ("insert", "insertions"), ("delete", "deletions")):
        common = ", ".join(f"{words} ({count})" for words, count in errors[kind].most_common(15))
        lines.append(f"Commonest {label}: {common or 'none'}.\n")
    words = np.array([len(text.split()) for text in last.plain[1]])
    empty, runaway = sum(words == 0), sum(words > 2 * last.counts["wer"][:, 3] + 5)
    lines.append(f"Empty outputs: {empty}. Runaway outputs (over twice the reference's words): {runaway}.\n")
    if finetuned and baseline:
        worse = (finetuned.counts["wer"] - baseline.counts["wer"])[:, :3].sum(axis=1)
        cells = []
        for index in np.argsort(-worse, kind="stable")[:10]:
            texts = [tidy(text)[:200] for text in (last.rows[index]["text"], baseline.texts[index], last.texts[index])]
            if worse[index] > 0:
                cells.append([f"+{worse[index]}", *map(markdown_text, (last.rows[index]["accent"], *texts))])
        if cells:
            lines.append("Clips that got worse most:\n")
            lines += markdown_table(["errors", "accent", "reference", "before", "now"], cells)
    return lines


RATE_LABELS = {
    "wer": "WER",
    "wer_spoken": "WER, spoken punctuation set aside",
    "wer_paper": "WER, the AfriSpeech authors' normalisation",
    "wer_paper_short": f"the same, clips under {PAPER_SECONDS} s, as in their tables",
    "wer_raw": "WER as written",
    "cer": "CER",
}


def summary_table(metrics):
    """Markdown lines: every rate before and after, all clips."""
    rows, kinds = [], text_kinds(metrics)
    for name, label in RATE_LABELS.items():
        cells = [label]
        for kind in kinds:
            then, now = (system and system[name] for system in before_and_after(metrics, kind))
            cells += [percent(then), percent(now), "-" if None in (then, now) else f"{100 * (now - then):+.1f}"]
        rows.append(cells)
    labels = [[*before_and_after(SYSTEMS, kind), "change, points"] for kind in kinds]
    return markdown_table(["rate", *itertools.chain(*labels)], rows)


def change_line(metrics):
    """A sentence on the WER of a `metrics_of`, or on its change, with its interval."""
    last, delta = last_of(metrics), metrics["delta"]
    if not delta:
        low, high = map(percent, last["wer_ci95"])
        return f"WER {percent(last['wer'])}, 95 % interval over speakers {low} to {high}."
    shares = ("probability_of_improvement", "clips_better", "clips_equal", "clips_worse")
    improvement, better, equal, worse = (percent(delta[share]) for share in shares)
    change = f"WER changes by {points(delta)} points (95 % interval over speakers, paired)"
    change += f"; probability of improvement {improvement}. {better} of the clips are better"
    return f"{change}, {equal} equal, {worse} worse."


def score_lines(metrics):
    """Markdown lines on one test set: its size, its rates, their change."""
    sizes = ", ".join(plural(last_of(metrics)[f"{noun}s"], noun) for noun in ("clip", "speaker", "word"))
    return [f"{sizes}. All rates are corpus-level.\n", *summary_table(metrics), change_line(metrics) + "\n"]


def group_lines(metrics, heading, fewest=1):
    """Markdown lines: a table of each kind of groups, where there are at least `fewest`."""
    lines = []
    for kind in GROUP_KINDS:
        if len(last_of(metrics)["groups"][kind]) >= fewest:
            lines += [f"{heading} By {kind.replace('_', ' ')}\n", *group_table(kind, metrics)]
            lines.append(group_summary(kind, metrics) + "\n")
    return lines


def report_lines(title, systems, metrics, notes, pictures):
    """results/report.md as lines."""
    lines = [f"# {markdown_text(title)}\n", *score_lines(metrics)]
    lines += [markdown_text(note) + "\n" for note in notes]
    lines += [f"![{label}]({name})\n" for name, label in pictures.items()]
    lines += group_lines(metrics, "##")
    limits = f"{MIN_GROUP_SPEAKERS} speakers or {MIN_GROUP_WORDS} words"
    lines.append(f"\\* under {limits}: not ranked and not in the macro average.\n")
    for name, part in metrics.get("also", {}).items():
        lines += [f"## Also scored: {markdown_text(name)}\n", *score_lines(part), *group_lines(part, "###", 2)]
    return lines + error_sections(systems)


def new_axes(height):
    """The axes of a new picture, `height` inches high."""
    from matplotlib.figure import Figure

    return Figure(figsize=(8, height), dpi=110, layout="tight").subplots()


def draw_pictures(folder, systems, history):
    """PNGs beside the report: {file name: label} of those that the data allows."""
    greedy = {SYSTEMS[name]: scored.scores for name, scored in systems.items() if not name.endswith("_lm")}
    pictures = {"wer_by_accent.png": "WER by accent", "wer_by_duration.png": "WER by duration of the clip"}
    for (name, label), kind in zip(pictures.items(), ("accent", "duration")):
        draw_groups(folder / name, label, kind, greedy)
    evaluations = [(entry["step"], 100 * entry["eval_wer"]) for entry in history if "eval_wer" in entry]
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if evaluations:
        pictures["training.png"] = "Dev WER and training loss"
        axes = new_axes(3.5)
        axes.plot(*zip(*evaluations), "o-")
        axes.grid(alpha=0.3)
        axes.set(xlabel="update", ylabel="dev WER, %", ylim=(0, None), title="Training")
        other = axes.twinx()
        other.plot(*zip(*losses), color="0.6")
        other.set(ylabel="training loss (grey)", ylim=(0, None))
        axes.figure.savefig(folder / "training.png")
    return pictures


def draw_groups(path, title, kind, systems):
    """A picture of the WER of each group of `kind`, a dot and its interval for each of `systems` {name: scores}."""
    groups = list(systems.values())[-1]["groups"][kind]
    order = sorted((group for group in groups if groups[group]["words"]), key=lambda group: groups[group]["wer"])
    if kind == "accent" and len(order) > 30:
        order = [group for group in order if not groups[group]["small"]] or order[-30:]
    if kind == "duration":
        order = [group for group in ("unknown", *reversed(DURATIONS)) if group in order]
    axes = new_axes(1.5 + 0.32 * len(order))
    for offset, (system, scores) in zip((0.16, -0.16), systems.items()):
        chosen = [scores["groups"][kind][group] for group in order]
        rates = 100 * np.array([group["wer"] for group in chosen])
        errors = np.abs(100 * np.array([group["wer_ci95"] for group in chosen]).T - rates)
        axes.errorbar(rates, np.arange(len(order)) + offset, xerr=errors, fmt="o", capsize=2, label=system)
    labels = [f"{group[:40]} *" if groups[group]["small"] else group[:40] for group in order]
    axes.set_yticks(range(len(order)), labels, parse_math=False)
    axes.grid(axis="x", alpha=0.3)
    axes.set(xlabel="WER, % (95 % interval over speakers; * too small to rank)", xlim=(0, None), title=title)
    axes.legend()
    axes.figure.savefig(path)


def library_versions():
    from importlib.metadata import version

    names = "torch transformers datasets evaluate jiwer librosa soundfile accelerate tensorboard".split()
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}


CLIP_COLUMNS = ("speaker", "accent", "country", "domain", "gender", "age_group")


def prediction_lines(systems):
    """One JSON object a clip, in the keys that NeMo's Speech Data Explorer reads, and ours."""
    last, kinds = last_of(systems), text_kinds(systems)
    texts = {f"pred_text{kind}": last_of(systems, kind).texts for kind in kinds}
    for kind in kinds:
        before, after = before_and_after(systems, kind)
        texts[f"baseline_text{kind}"] = before.texts if before and after else [None] * len(last.rows)
    for index, row in enumerate(last.rows):
        entry = {
            "audio_filepath": row["clip"],
            "duration": row["num_samples"] and round(row["num_samples"] / SAMPLE_RATE, 3),
            "text": row["text"],
            **{name: written[index] for name, written in texts.items()},
            **{name: row[name] for name in CLIP_COLUMNS},
            "wer": rate(last.counts["wer"][index : index + 1]),
        }
        yield json.dumps(entry, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def complete_folder(target, keep=False):
    """A folder to write into, which takes the place of `target` when complete; with `keep`, with its other files."""
    partial, old = (target.with_name(target.name + ending) for ending in (".partial", ".old"))
    with explained_checkpoint(f"{target} cannot be written", ROOM_ADVICE, partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in target.iterdir() if keep and target.is_dir() else ():
            if not (partial / path.name).exists():
                shutil.copy(path, partial) if path.is_file() else shutil.copytree(path, partial / path.name)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(partial, target)
        shutil.rmtree(old, ignore_errors=True)


def metrics_of(systems):
    """What metrics.json has of one test set: the scores of its {name of SYSTEMS: Scored}, and "delta", their change."""
    metrics = {}
    for kind in text_kinds(systems):
        before, after = before_and_after(systems, kind)
        metrics |= {"baseline" + kind: before and before.scores, "finetuned" + kind: after and after.scores}
        metrics["delta" + kind] = compare(before, after) if before and after else None
    return metrics


def write_results(target, config, data, scored, title, notes=(), history=(), lm=None):
    """metrics.json, predictions_test.jsonl, report.md and its pictures into the folder `target`, all or none.

    `scored` are {"test" and the names of --also_score: {name of SYSTEMS: Scored}}, `lm` the settings of a language
    model. Returns the metrics.
    """
    systems, parts = scored["test"], {name: metrics_of(systems) for name, systems in scored.items()}
    metrics = {"config": config, "versions": library_versions(), "data": data, **parts.pop("test")}
    metrics |= {name: value for name, value in (("lm", lm), ("also", parts)) if value}
    with complete_folder(Path(target), keep=True) as folder:
        write_text(folder / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False, default=str))
        for name, its_systems in scored.items():
            write_text(folder / f"predictions_{file_stem(name)}.jsonl", "".join(prediction_lines(its_systems)))
        pictures = draw_pictures(folder, systems, history)
        lines = report_lines(title, systems, metrics, notes, pictures)
        write_text(folder / "report.md", "\n".join(lines) + "\n")
    show_scores(metrics)
    return metrics


def show_scores(metrics):
    say("\n".join(["", *summary_table(metrics), *group_table("domain", metrics)]))
    for name, part in metrics.get("also", {}).items():
        say("\n".join([f"{name}: {change_line(part)}", *summary_table(part)]))


def write_model_card(final, results, args, metrics):
    """README.md of the final model, with the Hub's evaluation metadata, the report and its pictures."""
    import yaml

    on_hub = lambda name: re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()  # noqa: E731
    model, dataset = public(args.model), public(args.dataset)
    data, is_own = metrics["data"], metrics["data"]["layout"] == "recordings"
    results_index = [
        {
            "task": {"type": "automatic-speech-recognition"},
            "dataset": {"name": "AfriSpeech-200" if name == DEFAULT_DATASET else name, "type": name, "split": "test"},
            "metrics": [
                {"type": rate.partition("_")[0], "name": rate, "value": round(100 * part["finetuned"][rate], 2)}
                for rate in RATES
                if part["finetuned"][rate] is not None  # texts of another script are nothing to wer_paper
            ],
        }
        for name, part in {dataset: metrics, **metrics.get("also", {})}.items()
    ]
    header = {
        "language": "en",
        **({"base_model": model} if on_hub(args.model) else {}),
        **({"datasets": [dataset.partition(":")[0]]} if on_hub(args.dataset.partition(":")[0]) else {}),
        "pipeline_tag": "automatic-speech-recognition",
        "library_name": "transformers",
        "tags": ["medical", *([] if is_own else ["african-accents"]), "ctc"],
        "license": "other",
        "license_name": "health-ai-developer-foundations",
        "license_link": "https://developers.google.com/health-ai-developer-foundations/terms",
        "model-index": [{"name": "medasr-own-data" if is_own else "medasr-afrispeech-200", "results": results_index}],
    }
    train = data["train"]
    new_speakers = data["test"]["speakers"] and "test" not in data["speakers_in_train_too"]
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    card = f"""---
{yaml.safe_dump(header, sort_keys=False)}---
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
{lm_paragraph(metrics, args)}
The base model's terms (Health AI Developer Foundations) hold for this derivative too, and those of the data:
{"see where it comes from" if is_own else "AfriSpeech-200 is CC-BY-NC-SA-4.0, for non-commercial use"}.
Not a medical device: a person checks every transcript that a decision rests on.

Made with `{args.command}`; {versions}.

"""
    report = (results / "report.md").read_text(encoding="utf-8")
    write_text(final / "README.md", card + report.replace("# ", "## ", 1))
    for picture in results.glob("*.png"):
        shutil.copy(picture, final)


def lm_paragraph(metrics, args):
    """The model card's lines on decoding with the language model that the test clips were scored with, if any."""
    if not metrics.get("finetuned_lm"):
        return ""
    lm = metrics["lm"]
    greedy, searched = (percent(metrics[system]["wer"]) for system in ("finetuned", "finetuned_lm"))
    flags = {"lm": public(args.lm), "lm_weight": lm["weight"], "lm_word_score": lm["word_score"], "lm_beam": lm["beam"]}
    return f"""
This is the greedy text (WER {greedy}). With the language model {markdown_text(lm["name"])} (WER {searched}):

```
{shlex.join(["python", PROGRAM, "--transcribe", "visit.wav", "--model", "final", *as_flags(flags)])}
```
"""


def read_score_file(path):
    """(rows, {name of SYSTEMS: its texts}, notes, rows left out) of JSON lines or CSV.

    The keys are those of `prediction_lines`; without a baseline_text in each row the texts are the baseline's. A row
    without a reference or a text is left out and noted. Raises UsageError for a file of another kind.
    """
    try:
        if Path(path).suffix.lower() in (".csv", ".tsv"):
            entries, notes = read_transcripts(path, (("text",), ("pred_text",)))
        else:
            content, notes = read_text(path)
            entries = json_lines(content)
    except RunError as error:
        raise UsageError(f"--score_file: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--score_file {path} is neither JSON lines nor CSV ({one_line(error)})") from error
    notes = [f"{Path(path).name}: {note}" for note in notes]
    rows, texts, before = [], [], []
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise UsageError(f"--score_file {path}: row {number} is not an object with keys such as text and pred_text")
        # JSON can hold halves of characters, which no file can.
        entry = {
            key: cell.encode(errors="replace").decode() if isinstance(cell, str) else cell
            for key, cell in entry.items()
        }
        clip, seconds = entry.get("audio_filepath"), clip_seconds(entry.get("duration"))
        lacking = [key for key in ("text", "pred_text") if not isinstance(entry.get(key), str)]
        if "text" not in lacking and not tidy(entry["text"]):
            lacking.insert(0, "text")
        if lacking or SURPLUS in entry:
            problem = f"no {' and no '.join(lacking)}" if lacking else SURPLUS
            notes.append(f"Row {number} ({clip or 'no audio_filepath'}) has {problem}: left out.")
            continue
        length = int(seconds * SAMPLE_RATE) or None
        row = {"clip": clip or f"row {number}", "text": entry["text"], "num_samples": length}
        cells = {name: entry.get(name) for name in CLIP_COLUMNS}  # a speaker may be 0
        rows.append(row | {name: "" if cell is None else str(cell) for name, cell in cells.items()})
        texts.append(entry["pred_text"])
        before.append(entry.get("baseline_text"))
    if not rows:
        raise UsageError(f"--score_file {path} has no row with both text and pred_text among {len(entries)}")
    if not any(normalize_wer(row["text"]) for row in rows):
        raise UsageError(f"--score_file {path} has no text with a word to score among {plural(len(rows), 'row')}")
    if unknown := sum(row["num_samples"] is None for row in rows):
        effect = f"in the group 'unknown', and not among clips under {PAPER_SECONDS} s"
        notes.append(f"{plural(unknown, 'row')} without a duration: {effect}.")
    written = {"baseline": before, "finetuned": texts}
    if not all(isinstance(text, str) for text in before):
        written = {"baseline": texts}
        if any(isinstance(text, str) and text for text in before):
            notes.append("Some rows have no baseline_text: no comparison is made.")
    return rows, written, notes, len(entries) - len(rows)


# ---------------------------------------------------------------- half precision

# float16 ends at 65,504. A module whose inputs or outputs come within a factor of 8 of that is run in float32, so that
# activations may still grow while training.
HALF_PRECISION_LIMIT = 65_504 / 8
# The gradient scaler halves its scale at each skipped update, so a run starts with a few; so many are overflow.
MAX_SKIPPED_UPDATES = 10


def new_mixed(kinds):
    """An empty instance of `mixed`, for copies and pickles."""
    return mixed(*kinds).__new__(mixed(*kinds))


class Guarded:
    """Mixed in before the class of a module that is there already.

    A class, not a replaced `forward` or a hook with state: it survives replication, deep copies, pickling, gradient
    checkpointing and torch.compile, and nothing of it is in the state dict or the config.
    """

    def __reduce_ex__(self, protocol):
        return new_mixed, (type(self).kinds,), self.__dict__

    @classmethod
    def guard(cls, module):
        module.__class__ = mixed(cls, *getattr(type(module), "kinds", (type(module),)))


class Float32(Guarded):
    """A module that computes in float32 where autocast would use half precision."""

    def forward(self, *inputs, **options):
        import torch

        def widen(value):
            return value.float() if torch.is_tensor(value) and value.is_floating_point() else value

        with torch.autocast([*inputs, *options.values()][0].device.type, enabled=False):
            return super().forward(*map(widen, inputs), **{name: widen(value) for name, value in options.items()})


class BFloat16(Guarded):
    """A model that computes in bfloat16 where autocast takes that for good enough; its inputs are made outside."""

    def forward(self, *inputs, **options):
        import torch

        with torch.autocast(self.device.type, torch.bfloat16):
            return super().forward(*inputs, **options)


def use_bfloat16(model, training):
    """Compute in bfloat16 where a GPU can; MedASR's activations overflow float16."""
    import torch

    if training.device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False):
        BFloat16.guard(model)


class FiniteStatistics(Guarded):
    """A BatchNorm that keeps what overflows out of its running statistics.

    The gradient scaler skips the update of a batch that overflows, but the forward pass has moved the statistics by
    then: from one infinity on, every evaluation would give blank text while the training loss looks normal.
    """

    def forward(self, *inputs, **options):
        import torch

        # The batch moves copies, because autograd holds on to what a forward pass has moved.
        kept = {name: getattr(self, name) for name in ("running_mean", "running_var")} if self.training else {}
        for name, values in kept.items():
            setattr(self, name, values.clone())
        output = super().forward(*inputs, **options)
        for name, values in kept.items():
            moved = getattr(self, name)
            values.copy_(torch.where(moved.isfinite(), moved, values))
            setattr(self, name, values)
        return output


def activation_peaks(model, batches):
    """{name: largest absolute input or output} of the subsampler and modules with weights, in float32 on `batches`."""
    import torch

    peaks = Counter()
    watched = {
        module: name
        for name, module in model.named_modules()
        if list(module.parameters(recurse=False)) or name.endswith("subsampler")
    }

    def watch(module, inputs, output):
        if module in watched:
            tensors = [item for item in (*inputs, output) if torch.is_tensor(item) and item.is_floating_point()]
            found = [float(tensor.abs().max()) for tensor in tensors if tensor.numel()]
            peaks[watched[module]] = max([peaks[watched[module]], *found])

    model.eval()
    with torch.nn.modules.module.register_module_forward_hook(watch), torch.no_grad():
        for batch in batches:
            model(**batch)
    return peaks


def guard_half_precision(model, batches, device):
    """Make `model` safe under float16 autocast, by measuring it on `batches`; returns {module in float32: its peak}.

    MedASR's subsampler reaches about 1.1e5 and other activations more: plain float16 gives inf, then NaN. Raises
    RunError if the outputs are not finite all the same.
    """
    import torch

    peaks = activation_peaks(model.to(device), batches)
    guarded = {name: peak for name, peak in peaks.items() if peak > HALF_PRECISION_LIMIT or name.endswith("subsampler")}
    for name in guarded:
        Float32.guard(model.get_submodule(name))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            FiniteStatistics.guard(module)
    with torch.no_grad(), torch.autocast(torch.device(device).type, torch.float16):
        for batch in batches:
            if not torch.isfinite(model(**batch).logits).all():
                raise RunError("the model overflows float16 even with its large activations in float32: use --bf16")
    return guarded


# ---------------------------------------------------------------- training


@dataclass
class DevSet:
    """The dev clips and how the model does on them; `samples` holds a few texts of the last evaluation, as Markdown."""

    selection: Selection
    processor: object
    encoder: LabelEncoder
    args: ScriptArguments
    samples: str = ""

    def score(self, model, training):
        """Loss and rates of `model`, with the clips written down as the test clips are."""
        emitted, _, loss = emit_clips(model, self.processor, self.selection, self.args, training, self.encoder)
        return {"loss": loss, **self.rates([clip_text(self.processor, emissions) for emissions in emitted])}

    def rates(self, texts):
        """WER and CER, all and WER by domain, of a text for each clip."""
        rows = self.selection.rows
        references = [normalize_wer(row["text"]) for row in rows]
        hypotheses = [normalize_wer(text) for text in texts]
        counts, domains = error_counts(references, hypotheses), np.array([row["domain"] for row in rows])
        by_domain = {f"wer_by_domain/{name}": rate(counts[domains == name]) for name in np.unique(domains) if name}
        shown = list(zip(rows, texts))[:: max(1, len(rows) // 5)][:5]
        cells = [map(markdown_text, (row["accent"], tidy(row["text"]), text)) for row, text in shown]
        self.samples = "\n".join(markdown_table(["accent", "reference", "hypothesis"], cells))
        return {**error_rates_metric().compute(predictions=hypotheses, references=references), **by_domain}


class EpochOrder:
    """Mixed with LengthGroupedSampler: an order from the seed and the epoch alone, so that a resumed run goes on in it.

    The Trainer restores the state of its random generator only after the first batch has been drawn, and accelerate's
    wrappers for several processes hide a sampler from set_epoch: `epoch()` is asked instead. The order is the same for
    any division of an update's clips into batches, accumulation steps and processes.
    """

    def __init__(self, clips_an_update, lengths, seed, epoch):
        super().__init__(clips_an_update, lengths=lengths)
        self.seed, self.epoch = seed, epoch

    def __iter__(self):
        import torch

        self.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return super().__iter__()


class CTCTraining:
    """Mixed with the Trainer: its order of clips, the stream, dev texts, and speed and overflow in the logs.

    `dev` is a DevSet.
    """

    dev = None
    counts = np.zeros(2)  # samples without and with padding since the last log,
    mark = None  # which was at this time, with this much SPENT until then
    heard = 0  # samples trained on, in this process
    clips = ()  # of the update under way
    making_up = False  # for an evaluation that was due at the checkpoint that is gone on from
    skipped, skipped_in_a_row = 0, 0  # updates that overflowed float16 since the last log, and just now

    def _get_train_sampler(self, train_dataset=None):
        from transformers.trainer_pt_utils import LengthGroupedSampler

        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        # [:] makes a list: from the column each length is read apart, which takes minutes for the training split.
        lengths = (train_dataset or self.train_dataset)[self.args.length_column_name][:]
        sampler = mixed(EpochOrder, LengthGroupedSampler)
        return sampler(clips_an_update(self.args), lengths, self.args.seed, lambda: int(self.state.epoch or 0))

    def get_train_dataloader(self):
        from torch.utils.data import DataLoader

        if not isinstance(self.train_dataset, TrainingStream):
            return super().get_train_dataloader()
        # The stream makes the batches of this process's own share; accelerate would divide it again.
        self.train_dataset.loader_options = {
            "batch_size": self.args.train_batch_size,
            "collate_fn": self.data_collator,
            "pin_memory": self.args.dataloader_pin_memory,
        }
        return DataLoader(self.train_dataset, batch_size=None)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of an update, each with its share of the update's clips, timed."""
        self.mark = self.mark or (time.monotonic(), Counter(SPENT))
        with spending("waiting for data"):
            batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        clips = sum(len(batch["clips"]) for batch in batches)
        for batch in batches:
            batch["share"] = len(batch["clips"]) / clips
        return batches, items

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.clips += tuple(inputs["clips"])
        self.counts = self.counts + inputs["counts"]
        self.heard += inputs["counts"][0]
        self.share = inputs["share"]
        inputs = model_inputs(inputs, self.processing_class.feature_extractor, self.args.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, **options):
        """The batch's part in the mean over the update's clips; the Trainer would take that over its batches, of which
        the last of an epoch is smaller.
        """
        return super().compute_loss(model, inputs, **options) * self.share * self.current_gradient_accumulation_steps

    def _get_grad_norm(self, model, grad_norm=None):
        """Where a gradient that is not finite shows, before the optimizer sees it: in float16 the update is skipped.

        accelerate's own account of skipped updates sees none of them with the fused AdamW, the Trainer's default.
        """
        norm, clips, self.clips = super()._get_grad_norm(model, grad_norm), self.clips, ()
        if np.isfinite(float(norm)):
            self.skipped_in_a_row = 0
            return norm
        step = self.state.global_step + 1
        if not self.args.fp16:
            raise RunError(
                f"the gradient is not finite at update {step}: lower --learning_rate, or raise --warmup_steps; earlier "
                f"checkpoints are good. Its clips: {', '.join(clips)}"
            )
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row == MAX_SKIPPED_UPDATES:
            raise RunError(
                f"float16 overflowed in {MAX_SKIPPED_UPDATES} updates in a row, up to update {step}: use --bf16, or "
                f"lower --learning_rate; earlier checkpoints are good. The last clips: {', '.join(clips)}"
            )
        return norm

    @property
    def calmer(self):
        """What to do against numbers that are not finite."""
        return "use --bf16, or lower --learning_rate" if self.args.fp16 else "lower --learning_rate"

    def _run_epoch(self, **options):
        """Nothing, where a run that is gone on with is at its end already: the Trainer would make one more update."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(**options)

    def _load_from_checkpoint(self, checkpoint, model=None):
        with explained_checkpoint(f"{checkpoint} cannot be loaded", "choose another, or --overwrite_output_dir"):
            super()._load_from_checkpoint(checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with explained_checkpoint(f"{checkpoint} cannot be loaded", "choose another, or --overwrite_output_dir"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with explained_checkpoint(f"{checkpoint} cannot be loaded", "choose another, or --overwrite_output_dir"):
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, model, trial):
        """A checkpoint that is complete once its MANIFEST is there, and never one of a model that is not finite."""
        from transformers.trainer_utils import rotate_checkpoints

        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if broken := not_finite(self.model):
            raise RunError(f"the model is not finite at update {self.state.global_step}, in {broken}: {self.calmer}")
        (folder / MANIFEST).unlink(missing_ok=True)
        # Older ones are deleted here, when this one is complete: the Trainer does it before.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        removed = folder if self.args.should_save else None  # the other processes write into it too
        with spending("saving"), explained_checkpoint(f"{folder} cannot be written", ROOM_ADVICE, removed):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            self.args.save_total_limit = limit
            if self.args.should_save:
                sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
                write_text(folder / MANIFEST, json.dumps(sizes, indent=1))
                rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()  # a process that stops here would have its launcher end the others

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The dev scores, made as the test scores are: Trainer.evaluate would gather logits, and cut no windows."""
        from transformers.trainer_utils import speed_metrics

        start = time.time()
        try:
            with spending("evaluation"):
                scores = self.dev.score(self.model, self.args)
        except Stopped:
            if not self.making_up:
                self._save_checkpoint(self.model, None)  # from which the evaluation is made up for
            raise
        if not np.isfinite(scores["loss"]):
            step = self.state.global_step
            raise RunError(f"the dev loss is not finite at update {step}: {self.calmer}; earlier checkpoints are good")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(self.dev.selection.rows))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs, start_time=None):
        if "loss" in logs and self.mark:
            import torch

            counts = torch.tensor(self.counts, dtype=torch.float32, device=self.args.device)
            real, padded = self.accelerator.reduce(counts, "sum").tolist()
            now, spent = (time.monotonic(), Counter(SPENT)), SPENT - self.mark[1]
            seconds = max(now[0] - self.mark[0] - spent["evaluation"] - spent["saving"], 1e-3)
            logs["audio_seconds_per_second"] = round(real / SAMPLE_RATE / seconds, 1)
            logs["padding_percent"] = round(100 * (1 - real / padded), 2)
            logs["data_wait_percent"] = round(100 * spent["waiting for data"] / seconds, 1)
            self.counts, self.mark = np.zeros(2), now
        if "loss" in logs and self.args.fp16:
            earlier = [entry["skipped_updates"] for entry in self.state.log_history if "skipped_updates" in entry]
            logs["skipped_updates"], self.skipped = self.skipped + sum(earlier[-1:]), 0
        super().log(logs, start_time)


class Lifecycle:
    """Mixed with TrainerCallback: what happens to `trainer` when its run begins, goes on, or is told to stop."""

    stopping = 0

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """After a resumption: make up for an evaluation that is due, and find the best checkpoint where it is now."""
        evaluated = any("eval_wer" in entry and entry["step"] == state.global_step for entry in state.log_history)
        due = args.eval_strategy == "steps" and state.global_step and state.global_step % state.eval_steps == 0
        if due and not evaluated:
            # Without saving: the random state of the checkpoint is restored only later.
            control.should_evaluate = self.trainer.making_up = True
            self.trainer._maybe_log_save_evaluate(None, None, self.trainer.model_wrapped, None, 0, None, None)
            self.trainer.making_up = False
        if state.best_global_step:
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.data_collator.epoch = int(state.epoch or 0)

    def on_step_end(self, args, state, control, **kwargs):
        self.stopping = STOP_SIGNALS.among_all(args)
        if self.stopping:  # the evaluation, which may take minutes, is made up for
            control.should_save, control.should_evaluate = True, False

    def on_save(self, args, state, control, **kwargs):
        if self.stopping:
            say(f"  checkpoint-{state.global_step} written")
            raise Stopped(self.stopping)


class TensorBoardTexts:
    """Mixed with TensorBoardCallback: under `<output_dir>/runs`, with a few dev transcriptions at each evaluation."""

    def __init__(self, folder, dev):
        super().__init__()
        self.logging_dir, self.dev = str(folder), dev

    def on_evaluate(self, args, state, control, **kwargs):
        if self.tb_writer is not None:
            self.tb_writer.add_text("eval/transcriptions", self.dev.samples, state.global_step)
            self.tb_writer.flush()  # a run that is killed does not write them again


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


class Patience:
    """Mixed with EarlyStoppingCallback: counts on after a resumption, from what the log says of earlier evaluations."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        evaluated = [entry["step"] for entry in state.log_history if "eval_wer" in entry]
        self.early_stopping_patience_counter = sum(step > (state.best_global_step or 0) for step in evaluated)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            say(
                f"  stopped early: {plural(self.early_stopping_patience_counter, 'evaluation')} without a better dev "
                "WER; a higher --early_stopping_patience goes on"
            )


def clips_an_update(training):
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size


def planned_updates(training, clips):
    """(updates in all, updates an epoch) of a run on so many training clips."""
    batches = -(-clips // (training.per_device_train_batch_size * training.world_size))
    an_epoch = max(1, -(-batches // training.gradient_accumulation_steps))
    updates = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * an_epoch)
    return updates, an_epoch


def fit_schedule(training, clips):
    """The updates planned; shortens the default warm-up and evaluation interval where a run is too short for them."""
    updates, _ = planned_updates(training, clips)
    default = CommonTrainingArguments
    if updates < training.eval_steps == default.eval_steps and training.save_steps == default.save_steps:
        training.eval_steps = training.save_steps = max(1, updates // 5)
        say(f"  {plural(updates, 'update')} in all: evaluating and saving every {training.eval_steps}")
    if updates < 2 * training.warmup_steps and training.warmup_steps == default.warmup_steps:
        training.warmup_steps = max(1, updates // 10)
        say(f"  {plural(updates, 'update')} in all: warming up over {training.warmup_steps}")
    return updates


def guard_trained_model(model, clips, collator, training):
    """Make the model safe in float16, measured on dev clips (a stream has none), and say what was done."""
    chosen = np.linspace(0, len(clips) - 1, 16).astype(int).reshape(4, 4)
    batches = [collator([clips[index] for index in indices]) for indices in chosen.tolist()]
    batches = [model_inputs(batch, collator.extractor, training.device) for batch in batches]
    guarded = guard_half_precision(model, batches, training.device)
    name, peak = max(guarded.items(), key=lambda item: item[1])
    say(f"  float16, with {len(guarded)} modules in float32 (the largest activation is {peak:.3g}, in {name})")


TRIED_BATCH_SIZES = (32, 16, 8, 4, 2, 1)
SPARE_MEMORY = 0.05  # of the GPU's, left over in a trial for what batches of other lengths leave in pieces


def step_fits(model, collator, rows, training):
    """Whether a training step on `rows` fits into the GPU's memory, beside what optimizer and processes keep there.

    The model comes out as it went in.
    """
    import torch

    device, half = training.device, torch.float16 if training.fp16 else torch.bfloat16
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    layerdrop, model.encoder.layerdrop = model.encoder.layerdrop, 0.0
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # AdamW's two averages, and the buckets in which processes exchange gradients.
            kept = [
                torch.empty_like(weight) for weight in model.parameters() for _ in range(2 + (training.world_size > 1))
            ]
            if device.type == "cuda":
                total = torch.cuda.get_device_properties(device).total_memory
                kept.append(torch.empty(int(SPARE_MEMORY * total), dtype=torch.uint8, device=device))
            inputs = model_inputs(collator(rows), collator.extractor, device)
            with torch.autocast(device.type, half, enabled=training.fp16 or training.bf16):
                loss = model.train()(**inputs).loss
            loss.backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.encoder.layerdrop = layerdrop
        model.zero_grad()
        kept = inputs = loss = None
        for name, buffer in model.named_buffers():
            buffer.data.copy_(buffers[name])
        if device.type == "cuda":
            torch.cuda.empty_cache()


def longest_clip(train, args):
    """A silent clip as long as the longest that the run can draw, with a text as long as its."""
    if args.streaming:
        seconds, text = args.max_train_seconds, "the " * int(2 * args.max_train_seconds)
    else:
        seconds, text = train[0]["num_samples"] / SAMPLE_RATE, train[0]["text"]  # they are sorted
    return {"samples": np.zeros(round(seconds * SAMPLE_RATE), np.float32), "text": text}


def possible_batch_sizes(training):
    """Clips a step into which those of an update can be split, the largest first; a single one without a GPU."""
    clips = training.per_device_train_batch_size * training.gradient_accumulation_steps
    sizes = [size for size in TRIED_BATCH_SIZES if clips % size == 0 and size <= (training.batch_limit or clips)]
    return sizes if training.device.type == "cuda" else [size for size in sizes if size <= AUTO_BATCH_SIZE][:1]


def choose_batch_size(model, collator, longest, training, sizes):
    """Split the clips of an update into steps of the largest of `sizes` that fits the GPU with clips like `longest`."""
    clips = training.per_device_train_batch_size * training.gradient_accumulation_steps
    for size in sizes:
        if agreed(size == sizes[-1] or step_fits(model, collator, [longest] * size, training), training):
            break
    training.per_device_train_batch_size, training.gradient_accumulation_steps = size, clips // size
    say(f"  {plural(clips, 'clip')} an update and device: {size} a step x {plural(clips // size, 'accumulation step')}")


def make_trainer(args, training, model, train, dev):
    """The Trainer for the training clips `train` and a `DevSet`; raises RunError if float16 cannot be made safe."""
    from transformers import EarlyStoppingCallback, Trainer
    from transformers.integrations import TensorBoardCallback
    from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

    extractor = dev.processor.feature_extractor
    plain = CTCCollator(extractor, dev.encoder, shortest=shortest_clip(model, extractor))
    collator = dataclasses.replace(plain, augment=args.spec_augment, seed=training.seed)
    if args.streaming:
        training.train_sampling_strategy, training.ignore_data_skip = "random", True
    if training.gradient_checkpointing:
        # Under DDP checkpointing forbids unused parameters, which a dropped layer would leave.
        model.encoder.layerdrop = 0.0
        model.activation_checkpointing_enable()  # now, for the trial of batch sizes; the Trainer does when it starts
    if training.ddp_find_unused_parameters is None:
        training.ddp_find_unused_parameters = model.encoder.layerdrop > 0
    if training.fp16:
        guard_trained_model(model, dev.selection.clips, plain, training)
    if training.auto_train_batch:
        sizes = possible_batch_sizes(training)
        choose_batch_size(model.to(training.device), plain, longest_clip(train, args), training, sizes)
    try:
        trainer = mixed(CTCTraining, Trainer)(
            model=model,
            args=training,
            data_collator=collator,
            train_dataset=train,
            eval_dataset=dev.selection.clips,
            processing_class=dev.processor,  # whole: with the feature extractor alone checkpoints lack the tokenizer
        )
    except TRAINER_REFUSALS as error:
        raise UsageError(f"the Trainer does not take these flags ({one_line(error)})") from error
    trainer.dev = dev
    # LasrForCTC.forward takes **kwargs, from which the Trainer concludes that it averages over accumulated batches by
    # itself. It does not: without this line, 4 accumulation steps give 4 times the loss and the gradient (transformers
    # issue 47688).
    trainer.model_accepts_loss_kwargs = False
    if trainer.pop_callback(TensorBoardCallback):
        trainer.add_callback(mixed(TensorBoardTexts, TensorBoardCallback)(Path(training.output_dir) / "runs", dev))
    if args.early_stopping_patience and training.load_best_model_at_end:
        trainer.add_callback(mixed(Patience, EarlyStoppingCallback)(args.early_stopping_patience))
    trainer.add_callback(mixed(Lifecycle, TrainerCallback)(trainer))
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(mixed(ProgressLines, ProgressCallback))
    trainer.remove_callback(PrinterCallback)
    return trainer


MANIFEST = "files.json"  # of a checkpoint: the size in bytes of each of its files, written last


@contextlib.contextmanager
def explained_checkpoint(what, advice, folder=None):
    """Turn what the libraries raise for files that they cannot read or write into one line; a half-written one goes."""
    from safetensors import SafetensorError

    unreadable = pickle.UnpicklingError, SafetensorError
    try:
        yield
    except (RunError, OSError, RuntimeError, ValueError, KeyError, EOFError, *unreadable) as error:
        shutil.rmtree(folder or "", ignore_errors=True)
        if isinstance(error, RunError) or LOST_PROCESS.search(str(error)):  # which say what it was themselves
            raise
        raise RunError(f"{what} ({one_line(error)}): {advice}") from error


def checkpoint_problem(folder):
    """What a checkpoint lacks, "" if it is complete."""
    sizes = read_json(folder / MANIFEST)
    if sizes is None:
        return "it was not finished"
    found = {path.name: path.stat().st_size for path in folder.iterdir()}
    broken = [f"{name} is {'cut' if name in found else 'missing'}" for name in sizes if found.get(name) != sizes[name]]
    if not broken and read_json(folder / "trainer_state.json") is None:
        return "trainer_state.json is not JSON"
    return ", ".join(broken)


def numbered_checkpoints(output):
    """The folders checkpoint-NUMBER in `output`, the newest first."""
    found = [path for path in Path(output).glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: -int(path.name[11:]))


def checkpoint_to_resume(training):
    """The complete checkpoint to go on from, the newest or the one of --resume_from_checkpoint; None: there is none.

    Raises UsageError if the one asked for is not complete, RunError if the processes find different ones.
    """
    wanted = training.resume_from_checkpoint
    if wanted and wanted.lower() not in ("true", "false"):
        if problem := checkpoint_problem(Path(wanted)):
            raise UsageError(f"--resume_from_checkpoint is {wanted}: {problem}; give a complete checkpoint")
        found = str(Path(wanted))
    else:
        found = newest_complete(training.output_dir)
    done = updates_done(found)
    if agreed(done, training) != agreed(done, training, "MAX"):
        raise RunError(
            f"the processes find different checkpoints in {training.output_dir}: nodes have to share it to go on from "
            "one; share it, or --overwrite_output_dir starts anew"
        )
    return found


def newest_complete(output):
    """The newest complete checkpoint in `output`, None if there is none; warns of newer ones."""
    for folder in numbered_checkpoints(output):
        problem = checkpoint_problem(folder)
        if not problem:
            return str(folder)
        warn(f"{folder} is left aside: {problem}")
    return None


# What a run is of: with another of these, what is in --output_dir is of no use.
IDENTITY = """model model_revision dataset dataset_revision text_column accents domains countries max_train_seconds
    max_train_samples max_eval_samples max_test_samples target_text spec_augment streaming window_seconds
    learning_rate seed weights clips_an_update""".split()
NO_FLAGS = {"weights": "weights of checksum", "clips_an_update": "batch x accumulation steps x processes of"}
GOAL = "max_steps num_train_epochs early_stopping_patience".split()  # may change from one start of a run to the next
LM_FLAGS = "lm lm_weight lm_word_score lm_beam tune_lm".split()  # so may these: the texts are made again
RUN_NOTES = "baseline baseline_lm reached batch_limit".split()


@dataclass
class RunState:
    """What a run notes down in `<output_dir>/run.json`: what it is of, the baseline's texts, what it reached.

    `baseline_lm` has those with a language model: "asked" (its file and flags), "lm" (what was used), "texts".
    """

    path: Path
    identity: dict
    goal: dict
    baseline: dict | None = None  # clip -> text
    reached: dict | None = None  # the goal of the run that finished
    baseline_lm: dict | None = None
    batch_limit: int | None = None  # clips a step that still fit, where more have filled the GPU's memory

    def save(self):
        content = {name: getattr(self, name) for name in ("identity", *RUN_NOTES)}
        write_text(self.path, json.dumps(content, ensure_ascii=False, indent=1))


def weights_mark(name):
    """A checksum of the beginning of a local model's weights, which tells two models in folders of one name apart."""
    file = Path(name).expanduser() / "model.safetensors"
    return zlib.crc32(file.open("rb").read(1 << 20)) if file.is_file() else None


def lm_asked(args):
    """What of the command line makes the texts with a language model; {} without one."""
    if not args.lm:
        return {}
    size = Path(args.lm).stat().st_size if args.lm != "auto" else None
    return public({**{name: getattr(args, name) for name in LM_FLAGS}, "lm_bytes": size})


def open_run(args, training):
    """The `RunState` of --output_dir; raises UsageError where what is there is of another run."""
    from accelerate.utils import gather_object

    output = Path(training.output_dir)
    if args.overwrite_output_dir and training.process_index == 0:
        for path in [path for path in output.glob("*") if MADE_BY_A_RUN.match(path.name)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    settings = {**vars(training), **vars(args)}
    settings |= {"weights": weights_mark(args.model), "clips_an_update": clips_an_update(training)}
    identity = public({name: settings[name] for name in IDENTITY})
    goal = {name: settings[name] for name in GOAL} | lm_asked(args)
    goal |= {"also_score": further_names(args)} if args.also_score else {}
    state = RunState(output / "run.json", identity, goal)
    foreign = "" if state.path.exists() else next(foreign_parts(output), "")
    stored = None if args.overwrite_output_dir else read_json(state.path)
    # The first one's, because nodes need not share the folder, and all have to do the same.
    stored, foreign = gather_object([(stored, foreign)])[0]
    if stored is None:
        if foreign:
            raise UsageError(
                f"--output_dir {output} holds {foreign}, which no run of this program has made and this one would "
                "delete; choose another --output_dir, or --overwrite_output_dir to delete it"
            )
        return state
    different = [name for name in identity if stored["identity"].get(name) != identity[name]]
    if different:
        name = different[0]
        raise UsageError(
            f"--output_dir {output} holds a run with {NO_FLAGS.get(name, f'--{name}')} "
            f"{stored['identity'].get(name)}, not {identity[name]}; choose another --output_dir, "
            "or --overwrite_output_dir to start anew"
        )
    for name in RUN_NOTES:
        setattr(state, name, stored.get(name))
    return state


def foreign_parts(output):
    """Yield the names of what a run replaces or deletes in a folder without run.json, which is written before them."""
    if (output / "final").exists():
        yield "final"
    for folder in numbered_checkpoints(output):
        if not (folder / MANIFEST).exists():  # a checkpoint that was copied can be gone on from
            yield folder.name


def show_finished(state, training):
    """Show the scores of a run that is finished; returns whether it is, with its results there."""
    output = state.path.parent
    metrics = read_json(output / "results" / "metrics.json")
    complete = state.reached == state.goal and metrics and (output / "final" / "config.json").is_file()
    if not agreed(bool(complete), training, "MAX"):
        return False
    if training.process_index:
        return True
    say(
        f"{output} holds this run, finished; --overwrite_output_dir starts anew, more --max_steps or "
        "--num_train_epochs go on"
    )
    show_scores(metrics)
    say(f"\nmodel: {output / 'final'}\nresults: {output / 'results'}")
    return True


def updates_done(checkpoint):
    """The updates that the Trainer had made when it wrote `checkpoint`; 0 for None."""
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"] if checkpoint else 0


# What the Trainer raises, before the first batch, for flags such as --optim whose packages or values it cannot use.
TRAINER_REFUSALS = (ValueError, TypeError, ImportError, NotImplementedError)


def train_model(trainer, checkpoint, updates, state):
    """Train, from `checkpoint` if given, and leave the best model loaded; raises RunError with what to change."""
    import torch
    from torch._dynamo.exc import TorchDynamoException

    if checkpoint:
        say(f"  going on from {checkpoint}, update {updates_done(checkpoint)} of {updates}")
    try:
        with STOP_SIGNALS.deferring(), spending("training"):
            trainer.train(resume_from_checkpoint=checkpoint)
    except TRAINER_REFUSALS as error:
        if trainer.mark is not None:
            raise
        raise UsageError(f"the Trainer does not take these flags ({one_line(error)})") from error
    except (RunError, Stopped, torch.OutOfMemoryError, TorchDynamoException) as error:
        if trainer.args.process_index == 0 and not trainer.args.disable_tqdm:
            print(file=sys.stderr)  # the message does not belong behind the progress bar
        if isinstance(error, torch.OutOfMemoryError):
            raise RunError(full_memory(trainer, state)) from error
        if isinstance(error, TorchDynamoException):
            what = f"the model cannot be compiled ({one_line(error)})"
            raise RunError(f"--torch_compile: {what}: leave it out") from error
        raise


def full_memory(trainer, state):
    """What to do where a training step has filled the GPU's memory; with auto, noted down for the next start."""
    batch, steps = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
    advice = f"try --per_device_train_batch_size {max(1, batch // 2)} --gradient_accumulation_steps {steps * 2}, "
    if trainer.args.auto_train_batch and batch > 1:
        state.batch_limit = batch // 2
        state.save()
        advice = f"the same command goes on with {batch // 2} a step and {steps * 2} accumulation steps; or try "
    advice += "--gradient_checkpointing, or a lower --max_train_seconds"
    return f"the GPU's memory is full with {plural(batch, 'clip')} a step: {advice}"


def where_time_went(trainer):
    """A line on the speed of the training and what the time of this start of the program was spent on."""
    spent = Counter(SPENT)
    steps = spent.pop("training") - spent["evaluation"] - spent["saving"]
    audio = trainer.heard * trainer.args.world_size / SAMPLE_RATE
    spent["forward and backward"] = steps - spent["waiting for data"]
    with_final = sum(spent.values())
    shares = ", ".join(f"{what} {100 * seconds / with_final:.0f} %" for what, seconds in spent.most_common())
    return f"trained on {audio / 3600:.2f} audio hours at {audio / max(steps, 1e-3):.0f} an hour; time: {shares}"


# ---------------------------------------------------------------- phases


def transcribe_files(args, training):
    """Print or write the text of each file of --transcribe, name unreadable ones on stderr; returns the exit status."""
    started, recordings = time.monotonic(), find_recordings(args)
    named = several(args, recordings)
    if "-" in args.transcribe and training.world_size > 1:
        raise UsageError("--transcribe - cannot be read by several processes; start it without torchrun")
    processor, model = load_processor_and_model(args)
    if training.bf16 or training.fp16:
        use_bfloat16(model, training)
    lm = load_lm(args, processor, model.config.vocab_size)
    loaded = time.monotonic()
    training.disable_tqdm = not sys.stderr.isatty()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for part in recording_parts(recordings, folder, PART_SECONDS * training.world_size):
                for recording, words in part_words(part, processor, model, lm, args, training):
                    write_transcript(recording, words, named, args)
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


def part_words(part, processor, model, lm, args, training):
    """Yield each recording of a `part` that can be read and its `Word`s, in the first of several processes."""
    frames = frame_seconds(model, processor.feature_extractor)
    clips = [{"audio": recording.path, "num_samples": recording.length} for recording in part]
    selection = Selection(clips, clips, [])
    emitted, unreadable, _ = emit_clips(model, processor, selection, args, training, lm=lm, doing="transcribing")
    for row, (recording, emissions) in enumerate(zip(part, emitted)):
        if row in unreadable:
            recording.give_up(unreadable[row])
        elif training.process_index == 0:
            words = clip_words(processor, emissions, best_path(emissions, lm), *frames)
            yield recording, format_dictation(words) if args.format_dictation else words


def write_transcript(recording, words, named, args):
    """Print the text of a recording, after its name where it is `named`, or write it into --transcript_dir."""
    kind, folder = args.transcript_format, args.transcript_dir
    if folder is not None:
        suffix = "txt" if kind == "text" else kind
        write_text(Path(folder).expanduser() / f"{recording.under}.{suffix}", transcript(words, kind))
        return
    text = transcript(words, kind, recording.name if named else None)
    if named and kind == "text":  # one line a file
        text = f"{printable(recording.name)}\t{' '.join(text.split())}\n"
    print(text, end="", flush=True)


def speaker_note(rows):
    """What the report has to say of intervals for clips without speakers, in a list."""
    if any(row["speaker"] for row in rows):
        return []
    return ["No clip names its speaker: each one counts as a speaker of its own, which makes the intervals too narrow."]


def score_file(args, training):
    """The whole report for the texts in --score_file, made by any system; returns the exit status."""
    rows, written, notes, left_out = read_score_file(args.score_file)
    for note in notes:
        warn(note)
    scored = {system: score_texts(rows, texts, None) for system, texts in written.items()}
    notes += speaker_note(rows)
    folder, title = Path(training.output_dir) / "results", f"Scores of {Path(args.score_file).name}"
    config = public({"command": args.command, "score_file": args.score_file})
    data = {"test": {"clips": len(rows), "hours": round(hours(rows), 4), "left_out": left_out}}
    write_results(folder, config, data, {"test": scored}, title, notes)
    say(f"\nresults: {folder}")
    return 0


def dry_run(args, training, corpus):
    """Say what a run would do, from the transcripts alone: clips, hours and speakers, downloads, disk and updates."""
    corpus.fetch_transcripts(SPLITS)
    train = 0
    for split in SPLITS:
        rows = [row for row in corpus.rows(split) if wanted(row, args)]
        if split == "train":
            rows = [row for row in rows if row["num_samples"] <= args.max_train_seconds * SAMPLE_RATE]
            train = min(len(rows), args.max_train_samples or len(rows))
        say(split_line(split, rows))
        if not rows:
            refuse_empty(split, rows)
        for accent, _ in Counter(row["accent"] for row in rows).most_common():
            say(f"    {accent:<24}{size_columns([row for row in rows if row['accent'] == accent])}")
    splits = splits_of(args, on_disk=True)
    todo = corpus.unprepared(corpus.archives(*splits))
    fetched = 0 if corpus.folder else corpus.size(todo)
    peak, kept = (size / 1e9 for size in disk_needed(corpus, todo, splits, args.num_proc))
    say(
        f"  to fetch {fetched / 1e9:.2f} GB in {plural(len(todo), 'archive')}; to keep {kept:.2f} GB in "
        f"{args.data_dir}, at the peak {peak:.2f} GB"
    )
    updates, an_epoch = planned_updates(training, train)
    sizes = (training.per_device_train_batch_size, "clip"), (training.gradient_accumulation_steps, "accumulation step")
    steps = " x ".join(plural(*size) for size in (*sizes, (training.world_size, "device")))
    say(f"  {plural(updates, 'update')}, {an_epoch:,} an epoch, of {steps}")
    return 0


def splits_of(args, on_disk=False):
    """The splits of a run; with `on_disk` those whose audio has to lie there: a stream keeps none of the training's."""
    splits = SPLITS[1 if args.tune_lm else 2 :] if args.eval_only else SPLITS
    return tuple(split for split in splits if not (on_disk and args.streaming and split == "train"))


def totals(rows):
    people, spoken = ({row[name] for row in rows} - {""} for name in ("speaker", "accent"))
    return {"clips": len(rows), "hours": round(hours(rows), 4), "speakers": len(people), "accents": len(spoken)}


def size_columns(rows):
    """How much `rows` are, in columns."""
    speakers = plural(totals(rows)["speakers"], "speaker")
    known = not rows or any(row["num_samples"] for row in rows)  # own tables may not tell, before audio is converted
    return f"{plural(len(rows), 'clip'):>14}{f'{hours(rows):.2f}' if known else '?':>9} h{speakers:>16}"


def split_line(split, rows):
    return f"  {split:<5}{size_columns(rows)}{plural(totals(rows)['accents'], 'accent'):>12}"


def refuse_empty(split, rows, reasons=None):
    """Raise RunError, with the `reasons` of its `Selection`, if a split has no clip, or none of dev or test a word."""
    if not rows:
        why = ", ".join(f"{count:,} x {reason}" for reason, count in (reasons or Counter()).most_common())
        raise RunError(f"no {split} clip is left: {why or 'these --accents, --domains and --countries have none'}")
    if split != "train" and not any(normalize_wer(row["text"]) for row in rows):
        raise RunError(f"no {split} transcript has a word to score: {plural(len(rows), 'clip')} of punctuation")


def further_names(args):
    """The names of the test sets of --also_score in results."""
    return [public(name) for name in args.also_score or ()]


def file_stem(name):
    """What a test set is called in files and folders; a slug alone leaves nothing of other alphabets."""
    mark = "" if name.isascii() else hashlib.sha256(name.encode(errors="replace")).hexdigest()[:8]
    return f"{slugify(name)}-{mark}".strip("-")


def open_further(args, training):
    """{name: (arguments, Corpus, split)} of --also_score; prepared audio has folders of its own under --data_dir."""
    further = {}
    for name, dataset in zip(further_names(args), args.also_score or ()):
        say(f"also scored: {name}")
        chosen = dict.fromkeys(("dataset_revision", "accents", "domains", "countries", "text_column"))
        data_dir = str(Path(args.data_dir) / "also" / file_stem(name))
        own = dict(dataset=dataset, data_dir=data_dir, streaming=False, eval_only=True, tune_lm=False)
        own = dataclasses.replace(args, **chosen, **own)
        corpus = open_corpus(own)
        corpus.make_splits(splits_of(own), training.seed, unnamed="test")
        further[name] = own, corpus, "test"
    return further


def select_splits(args, parts, check, training):
    """{name: Selection} of `parts`, {split, or name of --also_score: (arguments, Corpus, split)}.

    Says what was left out and writes skipped_clips.csv. Raises RunError for an empty part.
    """
    limits = {"train": args.max_train_samples, "dev": args.max_eval_samples, "test": args.max_test_samples}
    selections = {}
    for name, (own, corpus, split) in parts.items():
        if own.streaming and split == "train":
            part = Selection(None, [row for row in corpus.rows(split) if wanted(row, own)], [])
        else:
            part = select_clips(*load_split(corpus, split), own, check, limits[split], training.seed)
        part.skipped = [{**row, "split": name} for row in part.skipped]
        selections[name] = part
        say(split_line(name, part.rows))
    skipped = [row for selection in selections.values() for row in selection.skipped]
    if training.local_process_index == 0:  # on each node: streaming workers add to it, and folders need not be shared
        write_text(skipped_path(training), ",".join(SKIPPED_COLUMNS) + "\n" + csv_lines(skipped))
    for split in sorted(selections):
        for reason, count in sorted(selections[split].reasons.items()):
            say(f"  left out of {split}: {count:,} x {reason}")
    if skipped:
        say(f"  each one is named in {skipped_path(training)}")
    for note in shared_speaker_notes(selections):
        warn(note)
    for split, selection in sorted(selections.items(), key=lambda item: not item[1].skipped):  # what is known first
        # Not every accent has every split: what is only prepared may lack one.
        if not args.prepare_only or selection.skipped or not any(other.rows for other in selections.values()):
            refuse_empty(split, selection.rows, selection.reasons)
    return selections


def shared_speakers(selections):
    """{split: speakers of it who are in train too}"""
    rows = {split: selections[split].rows for split in SPLITS if split in selections}
    people = {split: {row["speaker"] for row in rows[split]} - {""} for split in rows}
    trained = people.pop("train", set())
    return {split: len(found & trained) for split, found in people.items() if found & trained}


def shared_speaker_notes(selections):
    return [
        f"{plural(count, 'speaker')} of {split} in train too: its scores are not those of new speakers."
        for split, count in shared_speakers(selections).items()
    ]


def check_selection(args, corpus):
    """Refuse, before any audio is converted, what the transcripts show to be without a clip."""
    rows = {split: corpus.rows(split) for split in splits_of(args)}
    known = {row["country"].upper() for split in rows for row in rows[split]}
    unknown = {code.upper() for code in args.countries or []} - known
    if unknown and known:
        countries = ", ".join(sorted(known - {""})) or "not given"
        raise UsageError(f"--countries has '{min(unknown)}', of which no clip is; the countries are {countries}")
    for split in rows:
        if rows[split] and not args.prepare_only:
            refuse_empty(split, [row for row in rows[split] if wanted(row, args)])


def run(args, training):
    """The whole job, phase by phase; returns the exit status."""
    from transformers import set_seed

    output = Path(training.output_dir)
    if (args.eval_only or args.score_file) and (output / "run.json").is_file():
        training.output_dir = str(output / "scores")
        say(f"the results of the run in {output} stay: these go to {training.output_dir}")
    if args.score_file:
        return score_file(args, training)
    if args.transcribe:
        return transcribe_files(args, training)
    set_seed(training.seed)
    trains = not (args.prepare_only or args.eval_only or args.dry_run)
    pushes = trains and args.push_to_hub and training.process_index == 0
    state = open_run(args, training) if trains else None
    if state and show_finished(state, training):
        if pushes:
            push_to_hub(training, Path(training.output_dir) / "final")
        return 0
    checkpoint = checkpoint_to_resume(training) if trains else None
    say(f"corpus: {args.dataset}")
    # Before the audio: what cannot be used should not be found out after hours of preparation.
    processor, model = load_processor_and_model(args, trains) if trains or args.eval_only else (None, None)
    lm = load_lm(args, processor, model.config.vocab_size) if model else None
    if lm:
        say(f"language model: {lm.name}")
    if pushes:
        push_to_hub(training)
    corpus = open_corpus(args)
    corpus.make_splits(splits_of(args), training.seed)
    if args.dry_run:
        return dry_run(args, training, corpus)
    further = open_further(args, training)
    prepare_corpus(corpus, splits_of(args, on_disk=True), args)
    for own, its_corpus, split in further.values():
        prepare_corpus(its_corpus, (split,), own)
    parts = {split: (args, corpus, split) for split in splits_of(args, on_disk=args.prepare_only)} | further
    if args.prepare_only:
        select_splits(args, parts, lambda rows: [row["problem"] for row in rows], training)
        say(f"  ready in {args.data_dir}")
        return 0
    job = Job(args, training, processor, model, parts, lm)
    return job.fit_and_score(state, checkpoint) if trains else job.score()


class Job:
    """A loaded model and prepared audio, on the way to results and a final model."""

    def __init__(self, args, training, processor, model, parts, lm=None):
        self.args, self.training, self.corpus = args, training, parts["test"][1]
        self.processor, self.model, self.lm = processor, model, lm
        self.lm_settings = {}  # of the systems that were written down
        self.encoder = LabelEncoder(processor.tokenizer, model.config.vocab_size, args.target_text)
        self.check = ClipCheck(model, processor.feature_extractor, self.encoder, args.max_train_seconds)
        self.selections = select_splits(args, parts, self.check, training)
        self.tests = {name: self.selections[name] for name, (_, _, split) in parts.items() if split == "test"}
        self.output = Path(training.output_dir)
        self.is_first = training.process_index == 0

    def emit(self, model, split):
        return emit_clips(model, self.processor, split, self.args, self.training, lm=self.lm)[0]

    def write_down(self, model, system):
        """{system: the model's text of each clip of `tests`}, and with a language model {system_lm: those with it}."""
        from datasets import concatenate_datasets

        if self.args.tune_lm:
            self.tune_lm(model)
        with spending("scoring"):
            parts = self.tests.values()
            rows = [row for part in parts for row in part.rows]
            emitted = self.emit(model, Selection(concatenate_datasets([part.clips for part in parts]), rows, []))
            texts = {system: [clip_text(self.processor, emissions) for emissions in emitted]}
            if self.lm:
                texts[f"{system}_lm"] = clip_texts(self.processor, emitted, self.lm, self.training)
                self.lm_settings[system] = self.lm.settings
        return texts

    def tune_lm(self, model):
        """Take the weight and word score of the lowest dev WER, and note in results/lm.json what was tried."""
        dev = self.selections["dev"]
        chosen = range(0, len(dev.rows), math.ceil(len(dev.rows) / TUNING_CLIPS))
        dev = Selection(dev.clips.select(chosen), [dev.rows[index] for index in chosen], [])
        say(f"choosing --lm_weight and --lm_word_score on {plural(len(dev.rows), 'dev clip')}")
        with spending("tuning the language model"):
            references = [row["text"] for row in dev.rows]
            self.lm, record = tuned_lm(self.lm, self.emit(model, dev), references, self.processor, self.training)
        if self.is_first:
            write_text(self.output / "results" / "lm.json", json.dumps(record, indent=1))
        weights = f"--lm_weight {self.lm.weight:g} --lm_word_score {self.lm.word_score:g}"
        say(f"  {weights}: dev WER {percent(record['wer'])}, greedy {percent(record['wer_greedy'])}")

    def score_texts(self, texts):
        """{test set: {system: Scored}} of {system: its text of each clip of `tests`}."""
        seen = None if self.args.eval_only else {row["accent"] for row in self.selections["train"].rows}
        scored, start = {}, 0
        for name, part in self.tests.items():
            chosen = slice(start, start := start + len(part.rows))
            scored[name] = {system: score_texts(part.rows, written[chosen], seen) for system, written in texts.items()}
        return scored

    def write_results(self, scored, history=()):
        args, lm = self.args, last_of(self.lm_settings)
        config = public({**vars(args), "training": json.loads(self.training.to_json_string())})
        data = {split: {**totals(part.rows), "skipped": part.reasons} for split, part in self.selections.items()}
        data |= {"made_splits": list(self.corpus.made), "speakers_in_train_too": shared_speakers(self.selections)}
        data |= {"layout": self.corpus.layout, "characters_dropped_from_labels": self.encoder.dropped}
        longer = sum(row["num_samples"] > args.window_seconds * SAMPLE_RATE for row in self.selections["test"].rows)
        windows = f"{plural(longer, 'clip')} over {args.window_seconds:g} s scored in overlapping windows"
        title = f"{public(args.model)} on {public(args.dataset)}"
        notes = [f"{windows}; none left out for its length.", *speaker_note(self.selections["test"].rows)]
        notes += shared_speaker_notes(self.selections)
        if self.corpus.made:
            notes.append(f"{self.corpus.made_note(self.training.seed)}.")
        if lm:
            notes.append("LM: {name}, weight {weight:g}, word score {word_score:g}, beam {beam}.".format(**lm))
            before = self.lm_settings.get("baseline", lm)
            if before != lm:  # each model is tuned by itself
                notes.append("LM before: weight {weight:g}, word score {word_score:g}.".format(**before))
                lm = {**lm, "baseline": before}
        return write_results(self.output / "results", config, data, scored, title, notes, history, lm)

    def score(self):
        """--eval_only; returns the exit status."""
        say(f"scoring {self.args.model} on the test split")
        scored = self.score_texts(self.write_down(self.model, "baseline"))
        if self.is_first:
            self.write_results(scored)
            say(f"\nresults: {self.output / 'results'}")
        return 0

    def score_baseline(self, state):
        """`score_texts` of the untouched model, whose texts an earlier start of the run may have left in `state`."""
        tests = {"" if name == "test" else f"{name}: ": part for name, part in self.tests.items()}
        clips = [f"{prefix}{row['clip']}" for prefix, part in tests.items() for row in part.rows]
        kept, asked = {"baseline": state.baseline}, lm_asked(self.args)
        if self.lm:
            noted = state.baseline_lm or {}
            kept["baseline_lm"] = noted["texts"] if noted.get("asked") == asked else None
        if any(set(texts or ()) != set(clips) for texts in kept.values()):
            say(f"scoring {self.args.model} as it is on the test split")
            written = self.write_down(self.model, "baseline")
            kept = {name: dict(zip(clips, texts)) for name, texts in written.items()}
            state.baseline = kept["baseline"]
            if self.lm:
                state.baseline_lm = {"asked": asked, "lm": self.lm.settings, "texts": kept["baseline_lm"]}
            if self.is_first:
                state.save()
        if self.lm:
            self.lm_settings["baseline"] = state.baseline_lm["lm"]
        scored = self.score_texts({name: [texts[clip] for clip in clips] for name, texts in kept.items()})
        for name, systems in scored.items():
            place = "" if name == "test" else f" on {name}"
            for system, how in zip(systems.values(), ("", " with the language model")):
                say(f"  WER {percent(system.scores['wer'])} before training{place}{how}")
        return scored

    def training_clips(self, checkpoint):
        if not self.args.streaming:
            return self.selections["train"].clips
        from torch.utils.data import IterableDataset

        # Another seed after a resumption: the stream starts anew, and should not start with the same clips.
        seed = self.training.seed + updates_done(checkpoint)
        stream = mixed(TrainingStream, IterableDataset)
        return stream(self.corpus, self.args, self.check, self.training, seed)

    def fit_and_score(self, state, checkpoint):
        """The main job; returns the exit status."""
        from accelerate.utils import broadcast

        if self.is_first:
            state.save()
        self.training.batch_limit = state.batch_limit
        baseline = {} if self.args.skip_baseline else self.score_baseline(state)
        say("training")
        updates = fit_schedule(self.training, len(self.selections["train"].rows))
        dev = DevSet(self.selections["dev"], self.processor, self.encoder, self.args)
        trainer = make_trainer(self.args, self.training, self.model, self.training_clips(checkpoint), dev)
        train_model(trainer, checkpoint, updates, state)
        say("scoring the fine-tuned model on the test split")
        # Without the wrapper that autocasts: before and after are scored alike, in float32.
        tuned = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        broadcast(tuned.state_dict())  # in place: nodes without the first's folder could not load the best checkpoint
        finetuned = self.score_texts(self.write_down(tuned, "finetuned"))
        if self.is_first:
            scored = {name: baseline.get(name, {}) | systems for name, systems in finetuned.items()}
            self.finish(state, trainer, scored)
        return 0

    def finish(self, state, trainer, scored):
        """Write the final model, its results and its card, each complete or not at all."""
        metrics = self.write_results(scored, trainer.state.log_history)
        with spending("saving"), complete_folder(self.output / "final") as final:
            trainer.save_model(str(final))
            write_model_card(final, self.output / "results", self.args, metrics)
        write_test_scores_to_tensorboard(self.output, metrics, trainer.state.global_step)
        state.reached = state.goal
        state.save()
        if self.args.push_to_hub:
            push_to_hub(self.training, self.output / "final")
        say(f"\nmodel: {self.output / 'final'}\nresults: {self.output / 'results'}")
        say(f"curves: tensorboard --logdir {self.output / 'runs'}\n{where_time_went(trainer)}")


def write_test_scores_to_tensorboard(output, metrics, step):
    """The test scores and the picture by accent, under the same `runs` as the training curves."""
    import matplotlib.image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(output / "runs")) as writer:
        for label, part in {"test": metrics, **metrics.get("also", {})}.items():
            for system in [system for system in SYSTEMS if part.get(system)]:
                for name in [name for name in RATES if part[system][name] is not None]:
                    writer.add_scalar(f"{file_stem(label)}_{system}/{name}", part[system][name], step)
        picture = matplotlib.image.imread(output / "results" / "wer_by_accent.png")
        writer.add_image("test/wer_by_accent", picture[..., :3], step, dataformats="HWC")


def main(argv=None):
    """Run the command line `argv` (sys.argv's if None); returns 0, 2 for a usage error, 1 for one while running."""
    argv = sys.argv[1:] if argv is None else list(argv)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        STOP_SIGNALS.install()
        SPENT.clear()
        args, training = parse_arguments(argv)
        # It is written into the model card, which people publish.
        args.command = redact(shlex.join(["python", PROGRAM, *map(public, argv)]))
        return run(args, training)
    except UsageError as error:
        status, message = 2, str(error)
        if os.environ.get("RANK", "0") != "0":
            return status  # each process refuses the same flags
    except RunError as error:
        # One that comes from a DataLoader's worker carries the worker's traceback; its last line is the message.
        status, message = 1, str(error).strip().splitlines()[-1].removeprefix(f"{__name__}.RunError: ")
    except Stopped as error:
        status, name = 128 + error.args[0], signal.Signals(error.args[0]).name
        message = f"stopped by {name}: {error.advice}"
    except SystemExit as error:  # argparse's --help
        return error.code or 0
    except Exception as error:
        if os.environ.get("MEDASR_TRACEBACK"):
            raise
        status = 1
        if is_full_disk(error):
            message = f"a file cannot be written ({one_line(error)}): {ROOM_ADVICE}"
        elif LOST_PROCESS.search(str(error)):
            message = "another process has ended; its own message says why, the same command goes on from here"
        else:
            message = f"unexpected {one_line(error)}; run with MEDASR_TRACEBACK=1 to see where, and report it"
    finally:
        for number, handler in handlers.items():
            # Not the main thread, or a handler that Python did not set.
            with contextlib.suppress(ValueError, TypeError):
                signal.signal(number, handler)
    rank = os.environ.get("RANK", "0")
    place = "" if rank == "0" else f" (process {rank})"
    print(f"{PROGRAM}: error{place}: {redact(message)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal can show every name and text
    sys.exit(main())
