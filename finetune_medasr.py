#!/usr/bin/env python3
"""Fine-tune Google's MedASR on AfriSpeech-200, African-accented clinical and general English.

    python finetune_medasr.py --demo                                    # the whole job in small: offline, on a CPU, in minutes
    python finetune_medasr.py                                           # MedASR on all of AfriSpeech-200
    python finetune_medasr.py --accents yoruba igbo --domains clinical  # a part of it
    python finetune_medasr.py run.yaml --learning_rate 1e-5             # a YAML file, flags on top of it
    python finetune_medasr.py --eval_only --model ./medasr-afrispeech-200/final
    python finetune_medasr.py --transcribe visit.wav --model ./medasr-afrispeech-200/final
    torchrun --nproc_per_node 8 finetune_medasr.py

The path of the data: archives of the Hub repository -> 16 kHz mono FLAC in memory-mapped Arrow files -> length-grouped
batches of log-mels -> LasrForCTC -> greedy CTC text -> word error rates by group -> report, TensorBoard, model card.

torch, transformers and datasets are imported inside the functions that use them: they take seconds to load, and --help,
usage errors and the worker processes that convert audio should not wait for them.
"""

import argparse
import contextlib
import csv
import dataclasses
import difflib
import functools
import html
import io
import itertools
import json
import os
import re
import shutil
import sys
import tarfile
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

PROGRAM = "finetune_medasr.py"
HERE = Path(__file__).resolve().parent

DEFAULT_MODEL = "google/medasr"
DEFAULT_DATASET = "intronhealth/afrispeech-200"
# Earlier revisions of the repository leave out the transcripts of dev and test.
DEFAULT_DATASET_REVISION = "b538c6e111914a812af28ff677f8cffc9b404b7d"

SAMPLE_RATE = 16_000  # Hz, what MedASR's feature extractor expects
SPLITS = ("train", "dev", "test")
DOMAINS = ("clinical", "general")
SILENCE = float(np.log(1e-5))  # LasrFeatureExtractor floors its mel energies at 1e-5, so a frame of 0.0 would be loud
IGNORED_LABEL = -100  # the label id that losses leave out, by convention in torch and transformers
WINDOW_OVERLAP_SECONDS = 2.0  # on each side, as in the model card's pipeline call (chunk_length_s=20, stride_length_s=2)
CLIP_BYTES_LIMIT = 1_000_000_000  # a clip that decodes to more than this is a bomb, not speech
BOOTSTRAP_DRAWS = 10_000


class UsageError(Exception):
    """A flag or combination that cannot work: exit status 2."""


class RunError(Exception):
    """Something that went wrong while running: exit status 1."""


# ---------------------------------------------------------------- configuration


def flag(default, text, **more):
    return field(default=default, metadata={"help": text, **more})


@dataclass
class ScriptArguments:
    """The script's own flags."""

    _argument_group_name = "this script"

    model: str = flag(DEFAULT_MODEL, "Hub id or local folder of the model")
    model_revision: str | None = flag(None, "branch, tag or commit of the model")
    dataset: str = flag(DEFAULT_DATASET, "Hub id of the corpus, or a local folder in the Hub repository's layout")
    dataset_revision: str | None = flag(None, f"commit of the corpus; for AfriSpeech-200 {DEFAULT_DATASET_REVISION[:7]} is pinned")
    data_dir: str = flag("./afrispeech-200-16khz", "where the prepared 16 kHz audio is kept")
    accents: list[str] | None = flag(None, "only these accents, e.g. yoruba 'akan (fante)'")
    domains: list[str] | None = flag(None, "only these domains: clinical, general")
    countries: list[str] | None = flag(None, "only these countries, two-letter codes, e.g. NG KE")
    max_train_seconds: float = flag(30.0, "leave longer clips out of training, in seconds")
    max_train_samples: int | None = flag(None, "train on a random choice of so many clips")
    max_eval_samples: int | None = flag(None, "evaluate on a random choice of so many dev clips")
    max_test_samples: int | None = flag(None, "score a random choice of so many test clips")
    target_text: Literal["as_written", "words"] = flag("as_written", "train on the transcript as written, or on lower-case words alone")
    spec_augment: bool = flag(True, "mask stretches of time and frequency in training (--no_spec_augment to switch off)")
    early_stopping_patience: int = flag(3, "stop after so many evaluations without a better dev WER; 0 never stops early")
    skip_baseline: bool = flag(False, "do not score the untouched model first")
    window_seconds: float = flag(20.0, f"score longer clips in windows of so many seconds, overlapping by {WINDOW_OVERLAP_SECONDS:g} s a side")
    num_proc: int | None = flag(None, "processes that prepare audio; all cores if not given")
    keep_archives: bool = flag(False, "keep the downloaded archives after they are converted")
    prepare_only: bool = flag(False, "download and convert the audio, then stop")
    eval_only: bool = flag(False, "score --model on the test split, then stop")
    transcribe: list[str] | None = flag(None, "print the text of these audio files, then stop")
    demo: bool = flag(False, "run the whole job on the small model and corpus in tests/fixtures, offline")


@dataclass
class CommonTrainingArguments:
    """The `TrainingArguments` fields that people change, with this script's defaults."""

    _argument_group_name = "training (any other field of transformers' TrainingArguments works too: --help_all)"

    output_dir: str = flag("./medasr-afrispeech-200", "where checkpoints, results, TensorBoard logs and the final model go")
    learning_rate: float = flag(3e-5, "peak learning rate of AdamW")
    per_device_train_batch_size: int = flag(8, "clips a step and device")
    per_device_eval_batch_size: int = flag(8, "clips or windows a device when scoring")
    gradient_accumulation_steps: int = flag(4, "steps whose gradients make one update")
    num_train_epochs: float = flag(10.0, "passes over the training clips")
    max_steps: int = flag(-1, "updates in all; overrides the epochs if positive")
    warmup_steps: float = flag(500, "updates (or, below 1, share of all updates) over which the learning rate rises")
    eval_steps: int = flag(500, "updates between two evaluations on dev")
    save_steps: int = flag(500, "updates between two checkpoints; a multiple of --eval_steps")
    logging_steps: int = flag(25, "updates between two logged training losses")
    save_total_limit: int = flag(4, "checkpoints kept, the best among them")
    # Declared bool so that a bare --fp16 works; None means: where there is a CUDA GPU and no --bf16.
    fp16: bool = flag(None, "float16 on a CUDA GPU, with the modules that overflow it in float32; on there unless --bf16")
    bf16: bool = flag(False, "bfloat16 mixed precision instead of float16")
    gradient_checkpointing: bool = flag(False, "recompute activations to save GPU memory")
    dataloader_num_workers: int | None = flag(None, "processes that decode audio for training; up to 8, by cores, if not given")
    resume_from_checkpoint: str | None = flag(None, "'true' for the newest checkpoint in --output_dir, or a checkpoint's folder")
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
)

DEMO_ARGUMENTS = f"""
    --model {HERE / "tests/fixtures/model"} --dataset {HERE / "tests/fixtures/corpus"}
    --output_dir ./medasr-demo --data_dir ./medasr-demo/audio
    --learning_rate 1e-3 --per_device_train_batch_size 8 --gradient_accumulation_steps 2 --max_steps 100 --warmup_steps 15
    --eval_steps 25 --save_steps 25 --logging_steps 5 --save_total_limit 2 --dataloader_num_workers 0
"""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling a flag, and a default only where there is one."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=min(150, shutil.get_terminal_size().columns))

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return super()._format_action_invocation(action)
        value = "" if action.const is True or action.nargs == 0 else " " + self._format_args(action, action.dest.upper())
        return action.option_strings[0] + value

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, argparse.SUPPRESS) else super()._get_help_string(action)


def make_parser(*dataclass_types):
    """An HfArgumentParser over `dataclass_types` that raises UsageError instead of printing its usage."""
    from transformers.hf_argparser import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message):
            raise UsageError(message)

    parser = Parser(dataclass_types, prog=PROGRAM, usage="%(prog)s [FILE.yaml] [flags]", allow_abbrev=False,
                    formatter_class=HelpFormatter, description=__doc__.split("\n\n")[0])
    parser.add_argument("--help_all", action="store_true", help="show every flag, those of TrainingArguments included")
    return parser


def config_file_flags(path):
    """The flags that a YAML file stands for: `learning_rate: 1e-5` is `--learning_rate 1e-5`."""
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the configuration file {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{path} holds a {type(settings).__name__}; it must hold lines of the form 'flag: value'")
    flags = []
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{name}", *map(str, values)]
    return flags


def parse_arguments(argv):
    """(ScriptArguments, TrainingArguments) for a command line; raises UsageError.

    The script's own flags are checked first, before torch is imported.
    """
    quiet_libraries()
    if argv and not argv[0].startswith("-"):
        argv = config_file_flags(argv[0]) + argv[1:]
    if "--demo" in argv:
        argv = DEMO_ARGUMENTS.split() + argv
    parser = make_parser(ScriptArguments, CommonTrainingArguments)
    namespace, rest = parser.parse_known_args(argv)
    if namespace.help_all:
        from transformers import TrainingArguments

        make_parser(ScriptArguments, TrainingArguments).print_help()
        raise SystemExit(0)
    script = ScriptArguments(**{item.name: getattr(namespace, item.name) for item in dataclasses.fields(ScriptArguments)})
    common = {item.name: getattr(namespace, item.name) for item in dataclasses.fields(CommonTrainingArguments)}
    check_arguments(script, common)
    return script, make_training_arguments(common, rest, script)


def check_arguments(script, common):
    """Refuse what cannot work, in one line that names the flag, the value found and the valid ones."""
    positive = ["max_train_seconds", "window_seconds", "max_train_samples", "max_eval_samples", "max_test_samples", "num_proc"]
    positive_common = ["learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size",
                       "gradient_accumulation_steps", "num_train_epochs", "eval_steps", "save_steps", "logging_steps"]
    values = [(name, getattr(script, name)) for name in positive] + [(name, common[name]) for name in positive_common]
    for name, value in values:
        if value is not None and not value > 0:
            raise UsageError(f"--{name} is {value:g}; it must be above 0")
    if script.window_seconds < 3 * WINDOW_OVERLAP_SECONDS:
        raise UsageError(f"--window_seconds is {script.window_seconds:g}; it must be at least {3 * WINDOW_OVERLAP_SECONDS:g}")
    if script.early_stopping_patience < 0:
        raise UsageError(f"--early_stopping_patience is {script.early_stopping_patience}; it must be 0 or more")
    for domain in script.domains or []:
        if domain not in DOMAINS:
            raise UsageError(f"--domains has '{domain}'; the domains are {' and '.join(DOMAINS)}")
    modes = [name for name in ("prepare_only", "eval_only", "transcribe") if getattr(script, name)]
    if len(modes) > 1:
        raise UsageError(f"--{modes[0]} and --{modes[1]} cannot be used together; choose one")
    if common["fp16"] and common["bf16"]:
        raise UsageError("--fp16 and --bf16 cannot be used together; choose one")
    for name, value in (("model", script.model), ("dataset", script.dataset)):
        if re.match(r"[./~]", value) and not Path(value).expanduser().is_dir():
            raise UsageError(f"--{name} is {value}: there is no such folder; give a folder or a Hub id such as {DEFAULT_MODEL}")
    for path in script.transcribe or []:
        if not Path(path).is_file():
            raise UsageError(f"--transcribe has {path}: there is no such file")


def make_training_arguments(common, rest, script):
    """`TrainingArguments` from the common flags and the remaining ones; raises UsageError for what it does not know."""
    from transformers import TrainingArguments

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    script.num_proc = script.num_proc or cores
    if common["dataloader_num_workers"] is None:
        common["dataloader_num_workers"] = min(8, cores - 1)
    parser = make_parser(TrainingArguments)
    parser.set_defaults(**TRAINING_DEFAULTS, **common)
    values, unknown = parser.parse_known_args(rest)
    if unknown:
        known = [item.name for kind in (ScriptArguments, TrainingArguments) for item in dataclasses.fields(kind)]
        near = difflib.get_close_matches(unknown[0].lstrip("-"), known, n=3)
        hint = f"did you mean {' or '.join('--' + name for name in near)}?" if near else "see --help"
        raise UsageError(f"unknown flag or stray value {unknown[0]}; {hint}")
    del values.help_all
    if values.fp16 is None:
        import torch

        values.fp16 = torch.cuda.is_available() and not values.bf16 and not values.use_cpu
    try:
        return TrainingArguments(**vars(values))
    except (ValueError, TypeError) as error:
        raise UsageError(" ".join(str(error).split())) from error


def quiet_libraries():
    """Keep the libraries' advice off the screen: the script says itself what a user needs to know."""
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    from transformers.utils import logging

    logging.disable_progress_bar()


# ---------------------------------------------------------------- Hub


@contextlib.contextmanager
def explained_hub_errors(repo, kind):
    """Turn the Hub client's exceptions about `repo` (a "model" or "dataset") into one line that says what to do."""
    import httpx2
    from huggingface_hub import constants, errors, get_token

    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        if get_token() is None:
            raise RunError(f"{repo} is gated and you are not logged in: accept its terms at {page}, then run 'hf auth login' "
                           "(or set HF_TOKEN)") from error
        raise RunError(f"{repo} is gated and your account has no access to it: accept its terms at {page} with the account "
                       "of your token ('hf auth whoami')") from error
    except errors.RepositoryNotFoundError as error:
        raise RunError(f"there is no {kind} '{repo}' on the Hub, or it is private: check --{kind}, or run 'hf auth login'") from error
    except (errors.RevisionNotFoundError, errors.RevisionResolutionError) as error:
        raise RunError(f"{kind} {repo} has no such revision: check --{kind}_revision") from error
    except errors.LocalEntryNotFoundError as error:
        raise RunError(f"{kind} {repo} is not on this machine and {constants.ENDPOINT} cannot be reached: go online, or give "
                       f"--{kind} a local folder") from error
    except errors.EntryNotFoundError as error:
        raise RunError(f"{kind} {repo} lacks a file that it should have: {str(error).splitlines()[0]}") from error
    except (httpx2.HTTPError, errors.HfHubHTTPError, ConnectionError) as error:
        raise RunError(f"{kind} {repo} could not be read from {constants.ENDPOINT} ({one_line(error)}): try again later; "
                       "what is finished is kept") from error
    except errors.HFValidationError as error:
        raise RunError(f"--{kind} is '{repo}': neither a local folder nor a Hub id of the form owner/name") from error


def one_line(error):
    """An exception as one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def load_processor_and_model(args):
    """The processor and the float32 CTC model that `args.model` names; raises RunError that says what to do."""
    from transformers import AutoModelForCTC, AutoProcessor

    name, revision = str(Path(args.model).expanduser()) if Path(args.model).expanduser().is_dir() else args.model, args.model_revision
    with explained_hub_errors(args.model, "model"):
        if name == args.model and not Path(name).is_dir():
            from huggingface_hub import hf_hub_download

            # The first file asked for is where a gated or missing model shows with an exception that says which.
            hf_hub_download(name, "config.json", revision=revision)
        try:
            processor = AutoProcessor.from_pretrained(name, revision=revision)
            model = AutoModelForCTC.from_pretrained(name, revision=revision, dtype="float32")
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"{name} cannot be loaded as a CTC model with a processor: {one_line(error)}") from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "feature_extractor"):
        raise RunError(f"{name} has no feature extractor and tokenizer together; --model needs both")
    return processor, model


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

    `files` maps each path in the repository to its size in bytes.
    """

    name: str
    revision: str | None
    folder: Path | None
    data_dir: Path
    keep_archives: bool
    files: dict[str, int] = field(default_factory=dict)

    def archives(self, split, accents=None):
        """[(accent folder, path)] of the audio archives of a split, only of `accents` (folders) if given."""
        found = []
        for path in sorted(self.files):
            match = re.fullmatch(rf"audio/([^/]+)/{split}/[^/]+\.tar\.gz", path)
            if match and (accents is None or match[1] in accents):
                found.append((match[1], path))
        return found

    def accents(self):
        return sorted({path.split("/")[1] for path in self.files if re.match(r"(audio|transcripts)/[^/]+/", path)})

    def prepared_path(self, archive):
        return self.data_dir / archive.split("/")[2] / (Path(archive).name.removesuffix(".tar.gz") + ".arrow")

    def fetch(self, path):
        """The local path of a file of the repository, downloaded if need be: (path, whether it is ours to delete)."""
        if self.folder:
            return self.folder / path, False
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        cached = try_to_load_from_cache(self.name, path, repo_type="dataset", revision=self.revision)
        if isinstance(cached, str):
            return Path(cached), False
        with explained_hub_errors(self.name, "dataset"):
            local = hf_hub_download(self.name, path, repo_type="dataset", revision=self.revision, local_dir=self.data_dir / "download")
        return Path(local), path.endswith(".tar.gz") and not self.keep_archives

    def transcripts(self, accent, split):
        """{clip key: row} of one accent's CSV in a split; the first of rows with the same path counts."""
        path = f"transcripts/{accent}/{split}.csv"
        if path not in self.files:
            return {}
        local, _ = self.fetch(path)
        rows = {}
        with open(local, newline="", encoding="utf-8-sig") as file:
            # csv, not pandas: the country code NA is Namibia, and no cell may turn into a NaN.
            for row in csv.DictReader(file):
                audio_path = row.get("audio_paths") or row.get("audio_path")
                if audio_path:
                    rows.setdefault(clip_key(audio_path), row)
        return rows


def open_corpus(args):
    """The `Corpus` of `args`, with its files listed; raises RunError or UsageError."""
    folder = Path(args.dataset).expanduser()
    folder = folder.resolve() if folder.is_dir() else None
    revision = args.dataset_revision or (DEFAULT_DATASET_REVISION if args.dataset == DEFAULT_DATASET else None)
    corpus = Corpus(args.dataset, revision, folder, Path(args.data_dir).expanduser(), args.keep_archives)
    corpus.data_dir.mkdir(parents=True, exist_ok=True)
    source_file = corpus.data_dir / "source.json"
    source = {"dataset": str(folder or args.dataset), "revision": revision}
    stored = json.loads(source_file.read_text()) if source_file.exists() else None
    if stored and {key: stored.get(key) for key in source} != source:
        raise UsageError(f"--data_dir {args.data_dir} holds audio of {stored['dataset']} at revision {stored['revision']}, not of "
                         f"{source['dataset']} at {revision}; choose another --data_dir")
    if folder:
        corpus.files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    elif stored and re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        corpus.files = stored["files"]  # a commit never changes: no network is needed to go on
    else:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        with explained_hub_errors(args.dataset, "dataset"):
            tree = HfApi().list_repo_tree(args.dataset, recursive=True, revision=revision, repo_type="dataset")
            corpus.files = {item.path: item.size for item in tree if isinstance(item, RepoFile)}
    if not corpus.archives("(train|dev|test)"):
        raise RunError(f"{args.dataset} has no audio/<accent>/<split>/*.tar.gz: it is not in the layout of {DEFAULT_DATASET}")
    write_text(source_file, json.dumps({**source, "files": {} if folder else corpus.files}, indent=1))
    return corpus


def write_text(path, text):
    """Write a text file so that it is complete or absent, whatever happens meanwhile."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def chosen_accents(corpus, accents):
    """The folders of the accents named by the user (None: all); raises UsageError with the nearest names."""
    if not accents:
        return None
    known = corpus.accents()
    for accent in accents:
        if slugify(accent) not in known:
            near = difflib.get_close_matches(slugify(accent), known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the accents are {', '.join(known)}"
            raise UsageError(f"--accents has '{accent}', which {corpus.name} does not have; {hint}")
    return {slugify(accent) for accent in accents}


def decode_audio(data):
    """Encoded audio (bytes or a path) -> 16 kHz mono float32 samples, shape (samples,); raises ValueError."""
    import librosa
    import soundfile

    try:
        source = io.BytesIO(data) if isinstance(data, bytes) else str(data)
        info = soundfile.info(source)
        if info.frames * info.channels * 4 > CLIP_BYTES_LIMIT:
            raise ValueError(f"decodes to over {CLIP_BYTES_LIMIT / 1e9:g} GB")
        if isinstance(source, io.BytesIO):
            source.seek(0)
        samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        raise ValueError(one_line(error)) from error
    samples = samples.mean(axis=1)
    if not np.isfinite(samples).all():
        raise ValueError("holds samples that are not numbers")
    if rate != SAMPLE_RATE and len(samples):
        samples = librosa.resample(samples, orig_sr=rate, target_sr=SAMPLE_RATE)  # soxr HQ
    return samples


def encode_flac(samples):
    """16 kHz mono samples -> FLAC bytes, lossless at 16 bits and about half the size of PCM."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(samples, -1.0, 1.0), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def clip_features():
    """The columns of a prepared file. `problem` is why a clip cannot be used, empty for a good one."""
    from datasets import Features, Value

    names = ["clip", "text", "speaker", "accent", "country", "domain", "gender", "age_group", "split", "problem"]
    return Features({"audio": Value("binary"), "num_samples": Value("int32"), **{name: Value("string") for name in names}})


def make_clip(key, split, accent, row, audio=None, problem=""):
    """One row of a prepared file from a row of the transcripts (None if there is none)."""
    row = row or {}
    samples = np.zeros(0, np.float32)
    if audio is not None and not problem:
        try:
            samples = decode_audio(audio)
            problem = "" if len(samples) else "no audio samples"
        except ValueError as error:
            problem = f"undecodable audio ({error})"
    return {
        "audio": b"" if problem else encode_flac(samples),
        "num_samples": len(samples),
        "clip": key,
        "text": row.get("transcript") or "",
        "speaker": row.get("user_ids") or "",
        "accent": row.get("accent") or accent,
        "country": row.get("country") or "",
        "domain": row.get("domain") or "",
        "gender": row.get("gender") or "",
        "age_group": row.get("age_group") or "",
        "split": split,
        "problem": problem,
    }


def archive_members(path):
    """Yield (name, bytes, problem) for each member of a tar.gz, read as a stream; raises EOFError or OSError if corrupt.

    gzip.open under tarfile, not tarfile's own "r|gz": only the former checks the checksum at the end.
    """
    import gzip

    with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            if member.isdir():
                continue
            problem = ""
            if not member.isreg():
                problem = "refused: not a regular file in the archive"
            elif member.name.startswith("/") or ".." in member.name.split("/"):
                problem = "refused: its path climbs out of the archive"
            elif member.size > CLIP_BYTES_LIMIT:
                problem = f"refused: over {CLIP_BYTES_LIMIT / 1e9:g} GB"
            yield member.name, b"" if problem else tar.extractfile(member).read(), problem
        while stream.read(1 << 20):  # to the end, where a cut or corrupt file shows
            pass


def prepare_archive(corpus, accent, archive):
    """Convert one archive to its prepared file, complete or absent; returns (clips, hours)."""
    from datasets.arrow_writer import ArrowWriter

    split, out = archive.split("/")[2], corpus.prepared_path(archive)
    rows = corpus.transcripts(accent, split)
    local, ours = corpus.fetch(archive)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    clips, samples = 0, 0
    try:
        with ArrowWriter(path=str(partial), features=clip_features(), writer_batch_size=50) as writer:
            for name, audio, problem in archive_members(local):
                key = clip_key(name)
                if not problem and key not in rows:
                    problem = "no transcript"
                clip = make_clip(key, split, accent, rows.get(key), audio, problem)
                writer.write(clip)
                clips, samples = clips + 1, samples + clip["num_samples"]
            writer.finalize()
        os.replace(partial, out)
    except (EOFError, OSError, tarfile.TarError, zlib_error()) as error:
        raise RunError(f"archive {archive} is damaged or cannot be read ({one_line(error)}): delete it and run again") from error
    finally:
        partial.unlink(missing_ok=True)
    if ours:
        local.unlink(missing_ok=True)
    return clips, samples / SAMPLE_RATE / 3600


def zlib_error():
    import zlib

    return zlib.error


def prepare_corpus(corpus, splits, accents, num_proc):
    """Convert every archive that the run needs and that is not converted yet.

    Several processes may call this at once: one works, the others wait at the lock, without a time-out.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    from filelock import FileLock
    from tqdm import tqdm

    with FileLock(corpus.data_dir / "prepare.lock"):
        todo = [(accent, path) for split in splits for accent, path in corpus.archives(split, accents)
                if not corpus.prepared_path(path).exists()]
        if not todo:
            return
        for stale in corpus.data_dir.glob("*/*.tmp"):
            stale.unlink()
        todo.sort(key=lambda item: -corpus.files[item[1]])  # the largest first, so that none is left alone at the end
        clips, hours = 0, 0.0
        # spawn: forked workers inherit locks of threads (tokenizers, torch) and can hang.
        with ProcessPoolExecutor(min(num_proc, len(todo)), multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(prepare_archive, corpus, accent, path) for accent, path in todo]
            try:
                with tqdm(total=len(jobs), desc="preparing audio", unit="archive") as bar:
                    for job in as_completed(jobs):
                        more_clips, more_hours = job.result()
                        clips, hours = clips + more_clips, hours + more_hours
                        bar.set_postfix_str(f"{clips:,} clips, {hours:.2f} h")
                        bar.update()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def load_split(corpus, split, accents):
    """(Dataset of every clip of a split, rows of transcripts without audio): memory-mapped, nothing copied."""
    from datasets import Dataset, concatenate_datasets

    archives = corpus.archives(split, accents)
    parts = [Dataset.from_file(str(corpus.prepared_path(path))) for _, path in archives]
    clips = concatenate_datasets(parts) if parts else Dataset.from_dict({name: [] for name in clip_features()}, features=clip_features())
    found = set(clips["clip"])
    folders = sorted(path.split("/")[1] for path in corpus.files if re.fullmatch(rf"transcripts/[^/]+/{split}\.csv", path))
    missing = []
    for accent in folders:
        if accents is None or accent in accents:
            rows = corpus.transcripts(accent, split)
            missing += [make_clip(key, split, accent, row, problem="no audio") for key, row in rows.items() if key not in found]
    return clips, missing


@dataclass
class Selection:
    """The clips of a split that a run uses, and those that it had to leave out (`skipped`: clip, split, reason, ...)."""

    clips: object
    rows: list[dict]
    skipped: list[dict]

    def hours(self):
        return sum(row["num_samples"] for row in self.rows) / SAMPLE_RATE / 3600


def select_clips(clips, missing, split, args, unusable, max_samples, seed):
    """The `Selection` of a split: of the domains and countries asked for, and without what cannot be used.

    `unusable(row)` gives the reason against a good clip, or "". The result is ordered by falling length, so that the
    longest batch comes first when scoring.
    """
    columns = [name for name in clips.column_names if name != "audio"]
    rows = clips.select_columns(columns).to_list()
    countries = {code.upper() for code in args.countries or []}
    kept, skipped = [], []
    for index, row in enumerate(itertools.chain(rows, missing)):
        if (args.domains and row["domain"] not in args.domains) or (countries and row["country"] not in countries):
            continue
        reason = row["problem"] or unusable(row)
        if reason:
            skipped.append({"split": split, "clip": row["clip"], "reason": reason, "accent": row["accent"],
                            "seconds": round(row["num_samples"] / SAMPLE_RATE, 2), "text": row["text"]})
        else:
            kept.append(index)
    if max_samples and max_samples < len(kept):
        kept = np.random.default_rng(seed).permutation(kept)[:max_samples].tolist()
    kept.sort(key=lambda index: (-rows[index]["num_samples"], rows[index]["clip"]))
    # The number that joins a batch to its transcripts: samplers and processes may reorder clips.
    chosen = clips.add_column("row", list(range(len(clips)))).select(kept, keep_in_memory=True)
    return Selection(chosen, [{**rows[index], "row": index} for index in kept], skipped)


def write_skipped(path, selections):
    """skipped_clips.csv: every clip that was left out, from which split, and why; returns the counts by split and reason."""
    skipped = [row for selection in selections for row in selection.skipped]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["split", "clip", "reason", "accent", "seconds", "text"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(skipped)
    write_text(path, buffer.getvalue())
    # A reason may carry detail in brackets or numbers; the count goes by its kind.
    return Counter((row["split"], re.split(r"[:(]", row["reason"])[0].strip()) for row in skipped)


# ---------------------------------------------------------------- text

# What a character becomes that the tokenizer lacks and that Unicode does not decompose; symbols become the words that
# a reader voices. A character neither here nor decomposable is dropped, and counted.
FOLDS = {
    "‘": "'", "’": "'", "‚": "'", "‛": "'", "`": "'", "´": "'", "ʼ": "'", "′": "'", "“": '"', "”": '"', "„": '"', "″": '"',
    "«": '"', "»": '"', "&": " and ", "@": " at ", "=": " equals ", "<": " less than ", ">": " greater than ",
    "≤": " less than or equal to ", "≥": " greater than or equal to ", "°": " degrees ", "±": "+/-", "×": "x", "÷": "/", "µ": "u",
    "μ": "u", "⁄": "/", "\\": "/", "|": "/", "~": "-", "−": "-", "•": "-", "·": ".", "…": "...", "—": "-", "$": " dollars ",
    "£": " pounds ", "€": " euros ", "₦": " naira ", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ß": "ss",
    "ɛ": "e", "Ɛ": "E", "ɔ": "o", "Ɔ": "O", "ŋ": "n", "Ŋ": "N", "ɓ": "b", "Ɓ": "B", "ɗ": "d", "Ɗ": "D", "ƙ": "k", "Ƙ": "K", "ƴ": "y",
    "ɣ": "g", "ł": "l", "đ": "d", "ı": "i",
}  # fmt: skip
# "5 µg" is read as micrograms and written mcg in prescriptions; "ug" is on the lists of error-prone abbreviations.
MICROGRAM = re.compile(r"[µμ]g\b")
CONTROL_TOKEN = re.compile(r"\{[a-z ]+\}|</?s>|<epsilon>")  # MedASR writes dictated punctuation and layout as {period}, {new paragraph}


def tidy(text):
    """Resolve HTML entities (&apos;) and any run of whitespace (NBSP, newline, tab) to one space, strip."""
    return " ".join(html.unescape(text).split())


class LabelEncoder:
    """Transcripts -> label ids that the model's head can emit: never `<unk>`, no `</s>`."""

    def __init__(self, tokenizer, vocab_size, target_text):
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.target_text = target_text
        self.covered = functools.cache(self._covers)
        self.dropped = Counter()

    def _covers(self, character):
        """Whether the tokenizer has a piece that the head can emit for `character`, inside a word and on its own."""
        ids = self.tokenizer(f"{character}a{character}", add_special_tokens=False).input_ids
        return self.tokenizer.unk_token_id not in ids and max(ids) < self.vocab_size

    def fold_character(self, character):
        if self.covered(character):
            return character
        if character in FOLDS:
            return "".join(map(self.fold_character, FOLDS[character])) if len(FOLDS[character]) == 1 else FOLDS[character]
        decomposed = [part for part in unicodedata.normalize("NFKD", character) if not unicodedata.combining(part)]
        if decomposed and decomposed != [character]:
            return "".join(map(self.fold_character, decomposed))
        kind, name = unicodedata.category(character), unicodedata.name(character, "")
        if kind == "Pd":
            return "-"
        if name.startswith("GREEK") and "LETTER" in name:
            return name.split("LETTER ")[1].split()[0].lower()
        if kind[0] != "C" and kind != "Mn":  # zero-width and control characters are not text: nothing is lost with them
            self.dropped[character] += 1
        return ""

    def fold(self, text):
        """The transcript in the characters that the tokenizer covers; what had to be dropped is counted in `dropped`."""
        text = normalize_wer(text) if self.target_text == "words" else tidy(text)
        text = MICROGRAM.sub("mcg", text)
        if not self.covered("("):
            # MedASR has ")" without "(": a pair goes together, and "1)" keeps its own.
            text = re.sub(r"\(([^()]*)\)", r" \1 ", text)
        text = unicodedata.normalize("NFC", text)
        return " ".join("".join(character if character == " " else self.fold_character(character) for character in text).split())

    def __call__(self, text):
        """Label ids, a list of int, of a transcript."""
        ids = self.tokenizer(self.fold(text), add_special_tokens=False).input_ids
        return [token for token in ids if token != self.tokenizer.unk_token_id and token < self.vocab_size]


def normalize_wer(text):
    """The text that `wer` compares: lower-case words without punctuation, apostrophes inside words kept.

    Entities, `{period}`-style tokens, NBSP, curly quotes and accents on letters are resolved first.
    """
    text = CONTROL_TOKEN.sub(" ", html.unescape(text)).translate(str.maketrans("‘’ʼ`´", "'''''"))
    decomposed = unicodedata.normalize("NFKD", text.lower())
    plain = "".join(character for character in decomposed if not unicodedata.combining(character) and unicodedata.category(character) != "Cf")
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)*", plain))


def normalize_paper(text):
    """The text that `wer_paper` compares: the AfriSpeech authors' own steps, in their order.

    Source: the evaluation code of github.com/intron-innovation/AfriSpeech-200 (Olatunji et al. 2023, arXiv 2310.00274). A lone
    newline glues two words, and punctuation counts: the published figures depend on both.
    """
    text = re.sub(r"\s{2,}", " ", text).strip()
    text = text.replace(">", "").replace("\t", " ").replace("\n", "")
    text = text.lower()
    for spoken, written in ((" comma,", ","), (" koma,", " "), (" coma,", " "), (" full stop.", "."), (" full stop", "."), (",.", "."), (",,", ",")):
        text = text.replace(spoken, written)
    text = re.sub(r" +", " ", text.strip())
    return re.sub(r"[^a-zA-Z0-9\s.,\-?:'/()\[\]+%]", "", text)


def normalize_raw(text):
    """The text that `wer_raw` compares: as written."""
    return text.strip()


NORMALIZERS = {"wer": normalize_wer, "wer_paper": normalize_paper, "wer_raw": normalize_raw}


# ---------------------------------------------------------------- batches


def count_logits(model, extractor, samples):
    """How many logits the model gives for a clip of `samples` at 16 kHz; below 1 it cannot be run.

    LASR: frames = 1 + (samples - window) // hop without centring, then two convolutions of stride 2.
    """
    import torch

    if hasattr(extractor, "hop_length"):
        samples = 1 + (samples - extractor.win_length) // extractor.hop_length
    return int(logit_lengths(model, torch.tensor([samples]))[0])


def logit_lengths(model, input_lengths):
    """Lengths of the logits for lengths of the inputs (frames, or samples for models on waveforms), shape (clips,)."""
    method = getattr(model, "_get_subsampling_output_length", None) or model._get_feat_extract_output_lengths
    return method(input_lengths)


def shortest_clip(model, extractor):
    """The fewest samples that the model can be run on, to a hop; 2,320 (0.145 s) for MedASR."""
    samples = step = getattr(extractor, "hop_length", 80)
    samples = getattr(extractor, "win_length", step)
    while count_logits(model, extractor, samples) < 1:
        samples += step
    return samples


def unusable_in(split, model, processor, encoder, args):
    """The function that says why a clip of `split` cannot be used, "" if it can.

    Dev and test clips are never left out for their length: short ones are padded, long ones scored in windows.
    """
    shortest = shortest_clip(model, processor.feature_extractor)

    def reason(row):
        if not tidy(row["text"]):
            return "empty text"
        if split != "train":
            return ""
        seconds = row["num_samples"] / SAMPLE_RATE
        if row["num_samples"] < shortest:
            return f"too short: {seconds:.2f} s, the model needs {shortest / SAMPLE_RATE:.3f} s"
        if seconds > args.max_train_seconds:
            return f"over --max_train_seconds: {seconds:.1f} s"
        labels = encoder(row["text"])
        if not labels:
            return "no text left that the tokenizer covers"
        # CTC puts a blank between two equal labels.
        needed = len(labels) + sum(left == right for left, right in zip(labels, labels[1:]))
        logits = count_logits(model, processor.feature_extractor, row["num_samples"])
        return f"more labels than frames: {needed} labels, {logits} logits" if needed > logits else ""

    return reason


# SpecAugment (Park et al. 2019, arXiv 1904.08779), moderate: of 128 mel bins up to 2 x 20 are masked, of the time one
# stretch of up to 0.3 s (less than most words) in every 2.5 s.
FREQUENCY_MASKS, FREQUENCY_MASK_BINS = 2, 20
TIME_MASK_EVERY_FRAMES, TIME_MASK_FRAMES = 250, 30


def spec_augment(features, lengths):
    """Mask log-mels of shape (clips, frames, bins) in place, with the value of silence, inside each clip's length."""
    import torch

    def mask_span(longest, size):
        width = int(torch.randint(0, min(longest, size) + 1, ()))
        start = int(torch.randint(0, size - width + 1, ()))
        return slice(start, start + width)

    for clip, length in zip(features, lengths.tolist()):
        for _ in range(FREQUENCY_MASKS):
            clip[:length, mask_span(FREQUENCY_MASK_BINS, clip.shape[1])] = SILENCE
        for _ in range(-(-length // TIME_MASK_EVERY_FRAMES)):
            clip[mask_span(min(TIME_MASK_FRAMES, length // 5), length)] = SILENCE
    return features


@dataclass
class CTCCollator:
    """Rows of a prepared split -> a padded batch, in the worker processes of the DataLoader.

    input_features (clips, frames, bins) float32 and attention_mask (clips, frames) for LASR, or what the model's own
    feature extractor gives; labels (clips, longest) padded with -100; for dev and test clips `row`, their row's number.
    """

    extractor: object
    encoder: LabelEncoder | None = None
    augment: bool = False
    shortest: int = 0

    def __call__(self, rows):
        import torch

        waveforms = [row["samples"] if "samples" in row else decode_audio(row["audio"]) for row in rows]
        waveforms = [np.pad(samples, (0, max(0, self.shortest - len(samples)))) for samples in waveforms]
        # The extractor pads the waveforms, so that padded frames come out as silence. Audio and text go through it and
        # the tokenizer apart: LasrProcessor drops the attention mask when it is given both.
        batch = dict(self.extractor(waveforms, sampling_rate=SAMPLE_RATE, padding="longest", return_attention_mask=True, return_tensors="pt"))
        if self.encoder:
            labels = [torch.tensor(self.encoder(row["text"])) for row in rows]
            batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL).long()
        if any(row.get("split") != "train" for row in rows):
            batch["row"] = torch.tensor([row["row"] for row in rows])
        elif self.augment:
            spec_augment(batch["input_features"], batch["attention_mask"].sum(-1))
        return batch


def greedy_ids(model, logits, attention_mask):
    """The best token of each frame, shape (clips, frames), blank on padding: `forward` leaves garbage in its logits there."""
    import torch

    ids = logits.argmax(-1)
    if attention_mask is not None:
        lengths = logit_lengths(model, attention_mask.sum(-1))
        ids[torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]] = blank_id(model)
    return ids


def blank_id(model):
    """CTC models in transformers use the padding token as the blank."""
    return model.config.pad_token_id


def decode_ids(processor, ids, blank):
    """Greedy CTC text of frame ids (clips, frames): repeats collapsed, blanks and special tokens dropped."""
    ids = np.where(np.asarray(ids) == IGNORED_LABEL, blank, ids)
    return [" ".join(text.split()) for text in processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]


# ---------------------------------------------------------------- scoring


@dataclass
class Windows:
    """The clips of a dataset as (row, first sample, last sample) windows, decoded when asked for."""

    clips: object
    spans: list

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, index):
        row, start, stop = self.spans[index]
        return {"samples": decode_audio(self.clips[row]["audio"])[start:stop], "row": row}


def window_spans(num_samples, window, overlap):
    """[(first, last sample)] of windows of `window` samples whose inner parts, without `overlap` a side, tile the clip."""
    step = window - 2 * overlap
    spans = [(0, min(window, num_samples))]
    while spans[-1][1] < num_samples:
        start = spans[-1][0] + step
        spans.append((start, min(start + window, num_samples)))
    return spans


def transcribe_clips(model, processor, clips, num_samples, args, training):
    """The greedy text of each clip, a list of str; in float32, on every process's device.

    `clips` holds encoded 16 kHz audio, `num_samples` its lengths. Clips longer than `args.window_seconds` are run in
    overlapping windows, whose logits are kept from the middle of the overlap.
    """
    import torch
    from accelerate.utils import gather_object
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    extractor = processor.feature_extractor
    samples_per_logit = model.config.inputs_to_logits_ratio * getattr(extractor, "hop_length", 1)
    overlap = round(WINDOW_OVERLAP_SECONDS * SAMPLE_RATE / samples_per_logit) * samples_per_logit
    window = round(args.window_seconds * SAMPLE_RATE / samples_per_logit) * samples_per_logit
    spans = [(row, *span) for row, length in enumerate(num_samples) for span in window_spans(length, window, overlap)]
    spans.sort(key=lambda span: (span[1] - span[2], span))  # the longest first: what does not fit shows at once
    mine = spans[training.process_index :: training.world_size]
    collator = CTCCollator(extractor, shortest=shortest_clip(model, extractor))
    loader = DataLoader(Windows(clips, mine), training.per_device_eval_batch_size, collate_fn=collator,
                        num_workers=min(training.dataloader_num_workers, len(mine)))
    model = model.to(training.device).eval()
    pieces = []
    with torch.inference_mode(), tqdm(total=len(mine), desc="scoring", unit="clip", disable=training.process_index > 0 or training.disable_tqdm) as bar:
        for batch in loader:
            done = len(pieces)
            batch.pop("row")
            for ids, (row, start, stop) in zip(batch_ids(model, batch, training.device), mine[done:]):
                first = overlap // samples_per_logit if start else 0
                last = (window - overlap) // samples_per_logit if stop < num_samples[row] else len(ids)
                pieces.append((row, start, ids[first:last]))
            bar.update(len(pieces) - done)
    joined = {row: [] for row in range(len(num_samples))}
    for row, _, ids in sorted(gather_object(pieces) if training.world_size > 1 else pieces, key=lambda piece: piece[:2]):
        joined[row] += ids
    return [decode_ids(processor, [joined[row]], blank_id(model))[0] for row in range(len(num_samples))]


def batch_ids(model, batch, device):
    """Greedy ids of a batch, a list of lists; a batch that does not fit on the GPU is halved and tried again."""
    import torch

    try:
        inputs = {name: value.to(device) for name, value in batch.items()}
        return greedy_ids(model, model(**inputs).logits, inputs.get("attention_mask")).tolist()
    except torch.cuda.OutOfMemoryError:
        size = len(next(iter(batch.values())))
        if size == 1:
            raise
    torch.cuda.empty_cache()
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(0, size // 2), slice(size // 2, None))]
    return [ids for half in halves for ids in batch_ids(model, half, device)]


@functools.cache
def error_rates_metric():
    """jiwer's corpus-level WER and CER as an `evaluate` metric; evaluate.load("wer") would download its script."""
    import datasets
    import evaluate
    import jiwer

    class ErrorRates(evaluate.Metric):
        def _info(self):
            features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
            return evaluate.MetricInfo(description="corpus-level WER and CER", citation="", inputs_description="", features=features)

        def _compute(self, predictions, references):
            return {"wer": jiwer.wer(references, predictions), "cer": jiwer.cer(references, predictions)}

    return ErrorRates(experiment_id=f"medasr-{os.getpid()}", keep_in_memory=True)


def error_counts(references, hypotheses, characters=False):
    """Errors of each pair, an int array (pairs, 4): substitutions, deletions, insertions, words (or characters) of the reference."""
    import jiwer

    process = jiwer.process_characters if characters else jiwer.process_words
    output = process(list(references), list(hypotheses))
    counts = np.zeros((len(references), 4), dtype=np.int64)
    column = {"substitute": 0, "delete": 1, "insert": 2}
    for index, (alignment, words) in enumerate(zip(output.alignments, output.references)):
        counts[index, 3] = len(words)
        for chunk in alignment:
            if chunk.type in column:
                span = (chunk.ref_end_idx - chunk.ref_start_idx) or (chunk.hyp_end_idx - chunk.hyp_start_idx)
                counts[index, column[chunk.type]] += span
    return counts


def rate(counts):
    """Corpus-level error rate of an array of `error_counts`; None without a single reference word."""
    return float(counts[:, :3].sum() / counts[:, 3].sum()) if counts[:, 3].sum() else None


def bootstrap_rates(counts, speakers, draws=BOOTSTRAP_DRAWS, seed=0):
    """WERs of `draws` resamplings of the speakers, shape (draws,).

    Whole speakers are drawn because their clips are not independent (Bisani & Ney 2004, doi 10.1109/ICASSP.2004.1326009;
    blocks: arXiv 1912.09508). The same seed and speakers draw the same speakers, which pairs two systems.
    """
    names, block = np.unique(speakers, return_inverse=True)
    errors = np.bincount(block, counts[:, :3].sum(axis=1), len(names))
    words = np.bincount(block, counts[:, 3], len(names))
    weights = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return weights @ errors / np.maximum(weights @ words, 1)


def interval(values):
    """The middle 95 % of `values`."""
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


DURATION_BINS = ((0, 5), (5, 10), (10, 20), (20, float("inf")))  # seconds


def group_keys(row, train_accents):
    """The groups that a clip belongs to: {kind: name}."""
    seconds = row["num_samples"] / SAMPLE_RATE
    low, high = next(edges for edges in DURATION_BINS if seconds < edges[1])
    return {
        "domain": row["domain"] or "unknown",
        "accent": row["accent"],
        "country": row["country"] or "unknown",
        "gender": row["gender"] or "unknown",
        "age_group": row["age_group"] or "unknown",
        "seen_accent": "unknown" if train_accents is None else "seen" if row["accent"] in train_accents else "unseen",
        "duration": f"{low}-{high} s" if high < float("inf") else f"over {low} s",
    }


def score_texts(rows, hypotheses, train_accents):
    """(SCORES, errors of each clip) of `hypotheses` against the transcripts of `rows`, with groups and intervals."""
    references = [row["text"] for row in rows]
    counts = {name: error_counts(map_list(normalize, references), map_list(normalize, hypotheses)) for name, normalize in NORMALIZERS.items()}
    characters = error_counts(map_list(normalize_wer, references), map_list(normalize_wer, hypotheses), characters=True)
    speakers = np.array([row["speaker"] for row in rows])
    keys = [group_keys(row, train_accents) for row in rows]

    def scores(chosen):
        words = counts["wer"][chosen]
        return {
            **{name: rate(counts[name][chosen]) for name in NORMALIZERS},
            "cer": rate(characters[chosen]),
            "clips": int(len(words)),
            "speakers": int(len(np.unique(speakers[chosen]))),
            "words": int(words[:, 3].sum()),
            "wer_ci95": interval(bootstrap_rates(words, speakers[chosen])),
            **dict(zip(("substitutions", "deletions", "insertions"), map(int, words[:, :3].sum(axis=0)))),
        }

    groups = {}
    for kind in keys[0] if keys else ():
        names = np.array([key[kind] for key in keys])
        groups[kind] = {str(name): scores(names == name) for name in np.unique(names)}
    return {**scores(np.ones(len(rows), bool)), "groups": groups}, counts["wer"]


def map_list(function, items):
    return [function(item) for item in items]


# ---------------------------------------------------------------- training

# float16 ends at 65,504. A module whose inputs or outputs come within a factor of 8 of that is run in float32, so that
# activations may still grow while training.
HALF_PRECISION_LIMIT = 65_504 / 8


def activation_peaks(model, batches, device):
    """The largest absolute input or output of each leaf module and subsampler over `batches`, in float32: {name: peak}."""
    import torch

    peaks = {}

    def watch(name):
        def hook(module, inputs, output):
            tensors = [item for item in (*inputs, output) if torch.is_tensor(item) and item.is_floating_point()]
            peaks[name] = max([peaks.get(name, 0.0), *(float(tensor.abs().max()) for tensor in tensors if tensor.numel())])

        return hook

    watched = [(name, module) for name, module in model.named_modules() if not any(module.children()) or name.endswith("subsampler")]
    handles = [module.register_forward_hook(watch(name)) for name, module in watched]
    model.to(device).eval()
    try:
        with torch.no_grad():
            for batch in batches:
                model(**{name: value.to(device) for name, value in batch.items() if name != "labels"})
    finally:
        for handle in handles:
            handle.remove()
    return peaks


def run_in_float32(module, device_type):
    """Make `module` compute in float32 where autocast would use half precision."""
    import torch

    forward = module.forward

    @functools.wraps(forward)
    def float32_forward(*inputs, **options):
        inputs = [item.float() if torch.is_tensor(item) and item.is_floating_point() else item for item in inputs]
        with torch.autocast(device_type, enabled=False):
            return forward(*inputs, **options)

    module.forward = float32_forward


def guard_half_precision(model, batches, device):
    """Make `model` safe under float16 autocast, by measuring it on `batches`; returns {module: peak} of those in float32.

    MedASR's subsampler reaches about 1.1e5 and other activations more: plain float16 gives inf, then NaN. Raises RunError if
    the outputs are not finite all the same.
    """
    import torch

    peaks = activation_peaks(model, batches, device)
    guarded = {name: peak for name, peak in peaks.items() if peak > HALF_PRECISION_LIMIT or name.endswith("subsampler")}
    for name in guarded:
        run_in_float32(model.get_submodule(name), torch.device(device).type)
    with torch.no_grad(), torch.autocast(torch.device(device).type, torch.float16):
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            if not torch.isfinite(model(**inputs).logits).all():
                raise RunError("the model overflows float16 even with its large activations in float32: use --bf16")
    return guarded


class DevScores:
    """The Trainer's `compute_metrics`: WER and CER of the dev clips against their transcripts as written.

    `samples` holds a few transcriptions of the last evaluation as a Markdown table.
    """

    def __init__(self, rows, processor, blank):
        self.rows = {row["row"]: row for row in rows}
        self.processor = processor
        self.blank = blank
        self.samples = ""

    def __call__(self, prediction):
        texts = dict(zip(prediction.label_ids.tolist(), decode_ids(self.processor, prediction.predictions, self.blank)))
        rows = [self.rows[number] for number in texts]
        references = [normalize_wer(row["text"]) for row in rows]
        hypotheses = [normalize_wer(text) for text in texts.values()]
        metrics = error_rates_metric().compute(predictions=hypotheses, references=references)
        counts = error_counts(references, hypotheses)
        domains = np.array([row["domain"] for row in rows])
        metrics |= {f"wer_by_domain/{domain}": rate(counts[domains == domain]) for domain in np.unique(domains) if domain}
        shown = sorted(texts)[:: max(1, len(texts) // 5)][:5]
        lines = [f"| {self.rows[number]['accent']} | {tidy(self.rows[number]['text'])} | {texts[number]} |" for number in shown]
        self.samples = "\n".join(["| accent | reference | hypothesis |", "|---|---|---|", *lines])
        return metrics


@functools.cache
def training_classes():
    """(CTCTrainer, TensorBoard, Progress): made on first use, because their bases take seconds to import."""
    import torch
    from transformers import Trainer
    from transformers.integrations import TensorBoardCallback
    from transformers.trainer_callback import ProgressCallback

    class CTCTrainer(Trainer):
        """The Trainer, with greedy ids as predictions, the clips' row numbers as their labels, and speed in the logs."""

        frames = None
        mark = None

        def training_step(self, model, inputs, num_items_in_batch=None):
            mask = inputs["attention_mask"]
            counts = torch.stack([mask.sum(), torch.tensor(mask.numel(), device=mask.device)]).to(self.args.device)
            self.frames = counts if self.frames is None else self.frames + counts
            self.mark = self.mark or time.monotonic()
            return super().training_step(model, inputs, num_items_in_batch)

        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            inputs = self._prepare_inputs(inputs)
            rows = inputs.pop("row")
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            # Ids, not logits: gathered logits of the dev split alone would take 16 GB.
            ids = greedy_ids(self.accelerator.unwrap_model(self.model), outputs.logits, inputs["attention_mask"])
            return loss.detach().mean(), ids, rows

        def log(self, logs, start_time=None):
            if "loss" in logs and self.frames is not None:
                real, padded = self.accelerator.reduce(self.frames.float(), "sum").tolist()
                extractor = self.processing_class.feature_extractor
                seconds = real * extractor.hop_length / SAMPLE_RATE
                logs["audio_seconds_per_second"] = round(seconds / max(time.monotonic() - self.mark, 1e-3), 1)
                logs["padding_percent"] = round(100 * (1 - real / padded), 2)
                self.frames, self.mark = None, time.monotonic()
            elif self.mark is not None:
                self.mark += logs.get("eval_runtime", 0.0)
            if not np.isfinite(logs.get("grad_norm", 0.0)) and not self.args.fp16:
                raise RunError(f"the gradient is not finite at step {self.state.global_step}: lower --learning_rate, or raise --warmup_steps")
            super().log(logs, start_time)

    class TensorBoard(TensorBoardCallback):
        """TensorBoard under `<output_dir>/runs`, with a few dev transcriptions as text at each evaluation."""

        def __init__(self, folder, scores):
            super().__init__()
            self.logging_dir = str(folder)
            self.scores = scores

        def on_evaluate(self, args, state, control, **kwargs):
            if self.tb_writer is not None:
                self.tb_writer.add_text("eval/transcriptions", self.scores.samples, state.global_step)

    class Progress(ProgressCallback):
        """The Trainer's progress bar, with one readable line a log instead of a dict."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            if not state.is_world_process_zero or self.training_bar is None:
                return
            if "loss" in logs:
                self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}, {logs['audio_seconds_per_second']:.0f} audio s/s")
            elif "eval_wer" in logs:
                self.training_bar.write(f"  step {state.global_step:>6}: dev WER {percent(logs['eval_wer'])}, CER {percent(logs['eval_cer'])}")

    return CTCTrainer, TensorBoard, Progress


def fit_schedule(training, clips):
    """Shorten the default warm-up and evaluation interval where a run is too short for them; returns the updates planned."""
    batches = -(-clips // (training.per_device_train_batch_size * training.world_size))
    an_epoch = max(1, -(-batches // training.gradient_accumulation_steps))
    updates = training.max_steps if training.max_steps > 0 else int(np.ceil(training.num_train_epochs * an_epoch))
    defaults = {item.name: item.default for item in dataclasses.fields(CommonTrainingArguments)}
    if updates < training.eval_steps == defaults["eval_steps"] and training.save_steps == defaults["save_steps"]:
        training.eval_steps = training.save_steps = max(1, updates // 5)
        say(f"  {updates} updates in all: evaluating and saving every {training.eval_steps}")
    if updates < 2 * training.warmup_steps and training.warmup_steps == defaults["warmup_steps"]:
        training.warmup_steps = max(1, updates // 10)
        say(f"  {updates} updates in all: warming up over {training.warmup_steps}")
    return updates


def make_trainer(args, training, processor, model, encoder, train, dev):
    """The CTCTrainer for `train` and `dev` (datasets); raises RunError if float16 cannot be made safe."""
    from transformers import EarlyStoppingCallback
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    CTCTrainer, TensorBoard, Progress = training_classes()
    extractor = processor.feature_extractor
    # "As written" is the default for a reason: the head keeps the case and punctuation that dictation needs.
    collator = CTCCollator(extractor, encoder, augment=args.spec_augment, shortest=shortest_clip(model, extractor))
    if training.gradient_checkpointing:
        # Under DDP checkpointing forbids unused parameters, which a dropped layer would leave.
        model.encoder.layerdrop = 0.0
    if training.fp16:
        calibration = CTCCollator(extractor, shortest=collator.shortest)
        chosen = [train[int(index)] for index in np.linspace(0, len(train) - 1, 16)]
        batches = [calibration([{**row, "split": "train"} for row in chosen[start : start + 4]]) for start in range(0, 16, 4)]
        guarded = guard_half_precision(model, batches, training.device)
        largest = max(guarded, key=guarded.get)
        say(f"  float16, with {len(guarded)} modules in float32 (the largest activation is {guarded[largest]:.3g}, in {largest})")
    scores = DevScores(dev.rows, processor, blank_id(model))
    callbacks = []
    if training.report_to and "tensorboard" in training.report_to:
        training.report_to = [name for name in training.report_to if name != "tensorboard"]
        callbacks.append(TensorBoard(Path(training.output_dir) / "runs", scores))
    if args.early_stopping_patience and training.load_best_model_at_end:
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
    trainer = CTCTrainer(
        model=model,
        args=training,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=dev.clips,
        processing_class=processor,  # the whole processor: with the feature extractor alone checkpoints lack the tokenizer
        compute_metrics=scores,
        callbacks=callbacks,
    )
    # LasrForCTC.forward takes **kwargs, from which the Trainer concludes that it averages over accumulated batches by itself.
    # It does not: without this line, 4 accumulation steps give 4 times the loss and the gradient (transformers issue 47688).
    trainer.model_accepts_loss_kwargs = False
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(Progress)
    trainer.remove_callback(PrinterCallback)
    return trainer


def checkpoint_to_resume(training):
    """The checkpoint folder that `--resume_from_checkpoint` means, or None; refuses to mix with an earlier run's checkpoints."""
    from transformers.trainer_utils import get_last_checkpoint

    output = Path(training.output_dir)
    newest = get_last_checkpoint(str(output)) if output.is_dir() else None
    wanted = training.resume_from_checkpoint
    if not wanted or str(wanted).lower() == "false":
        if newest:
            raise UsageError(f"--output_dir {output} holds checkpoints of an earlier run, the newest {Path(newest).name}; add "
                             "--resume_from_checkpoint true to go on from it, or choose another --output_dir")
        return None
    if str(wanted).lower() == "true":
        if not newest:
            say(f"  no checkpoint in {output} yet: training from the start")
        return newest
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise UsageError(f"--resume_from_checkpoint is {wanted}: no checkpoint of a Trainer is there")
    return wanted


def train_model(trainer, checkpoint, updates):
    """Train, from `checkpoint` if given, and leave the best model loaded; raises RunError with what to change."""
    import torch

    if checkpoint:
        done = json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"]
        say(f"  going on from {checkpoint}, update {done} of {updates}")
        if done >= updates:
            say("  nothing is left to train: raise --num_train_epochs or --max_steps to train further")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except torch.cuda.OutOfMemoryError as error:
        batch, steps = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
        raise RunError(f"the GPU's memory is full: try --per_device_train_batch_size {max(1, batch // 2)} "
                       f"--gradient_accumulation_steps {steps * 2}, --gradient_checkpointing, or a lower --max_train_seconds") from error


# ---------------------------------------------------------------- report


def percent(value):
    return "-" if value is None else f"{100 * value:.1f} %"


def say(text=""):
    """Print once, not once a process."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def side_by_side(baseline, finetuned):
    """Lines of a table with the scores before and after, all clips first, then by domain."""
    rows = [("all", baseline, finetuned)]
    after = finetuned or baseline
    rows += [(name, ((baseline or {}).get("groups", {}).get("domain", {}).get(name)), ((finetuned or {}).get("groups", {}).get("domain", {}).get(name)))
             for name in after["groups"].get("domain", {})]
    lines = [f"{'test clips':<12}{'clips':>7}{'words':>8}   {'baseline':>10}{'fine-tuned':>12}{'change':>10}"]
    for name, before, now in rows:
        shown = now or before
        change = f"{100 * (now['wer'] / before['wer'] - 1):+.1f} %" if before and now and before["wer"] and now["wer"] is not None else "-"
        lines.append(f"{name:<12}{shown['clips']:>7,}{shown['words']:>8,}   {percent(before and before['wer']):>10}"
                     f"{percent(now and now['wer']):>12}{change:>10}")
    for name in ("wer_paper", "wer_raw", "cer"):
        lines.append(f"{name:<27}   {percent(baseline and baseline[name]):>10}{percent(finetuned and finetuned[name]):>12}")
    return lines


def library_versions():
    from importlib.metadata import version

    names = ("torch", "transformers", "datasets", "evaluate", "jiwer", "librosa", "soundfile", "accelerate", "tensorboard")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}


def write_predictions(path, rows, texts, baseline_texts, counts):
    """One JSON object a test clip, in the keys that NeMo's Speech Data Explorer reads, and ours."""
    lines = []
    for row, text, before, errors in zip(rows, texts, baseline_texts or [None] * len(rows), counts):
        lines.append(json.dumps({
            "audio_filepath": row["clip"],
            "duration": round(row["num_samples"] / SAMPLE_RATE, 3),
            "text": row["text"],
            "pred_text": text,
            "baseline_text": before,
            **{name: row[name] for name in ("speaker", "accent", "country", "domain", "gender", "age_group")},
            "wer": rate(errors[None]),
        }, ensure_ascii=False))  # fmt: skip
    write_text(path, "".join(line + "\n" for line in lines))


def score_delta(baseline, finetuned):
    """Fine-tuned minus baseline of each rate; negative is better."""
    names = (*NORMALIZERS, "cer")
    return {name: finetuned[name] - baseline[name] for name in names if finetuned[name] is not None and baseline[name] is not None}


def model_card(args, corpus_name, metrics):
    """The README.md of the final model."""
    table = "\n".join(side_by_side(metrics["baseline"], metrics["finetuned"]))
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    return f"""---
language: en
base_model: {args.model}
datasets:
- {corpus_name}
pipeline_tag: automatic-speech-recognition
library_name: transformers
tags: [medical, african-accents, ctc]
license: other
license_name: health-ai-developer-foundations
license_link: https://developers.google.com/health-ai-developer-foundations/terms
---
# {args.model} adapted to African-accented English

Fine-tuned on {corpus_name} by `{PROGRAM}`: {metrics["data"]["train"]["clips"]:,} clips, {metrics["data"]["train"]["hours"]:.1f} h.

```
{table}
```
Corpus-level rates on the test split. `wer`: lower-case words without punctuation; `wer_paper`: the AfriSpeech authors' own
normalisation; `wer_raw`: as written.

```python
import librosa
from transformers import AutoModelForCTC, AutoProcessor

processor, model = AutoProcessor.from_pretrained("."), AutoModelForCTC.from_pretrained(".")
audio, _ = librosa.load("visit.wav", sr=16000)
ids = model.generate(**processor(audio, sampling_rate=16000))
print(processor.batch_decode(ids, skip_special_tokens=True)[0])
```

The base model stays under Google's Health AI Developer Foundations terms, which a derivative inherits; AfriSpeech-200 is
CC-BY-NC-SA-4.0. Not a medical device: check every transcript that a decision rests on.

Command: `{metrics["config"]["command"]}`. Versions: {versions}.
"""


# ---------------------------------------------------------------- phases


def transcribe_files(args, training):
    """Print the text of each file of --transcribe; a file that cannot be read is named on stderr. Returns the exit status."""
    processor, model = load_processor_and_model(args)
    names, clips, status = [], [], 0
    for path in args.transcribe:
        try:
            samples = decode_audio(Path(path))
            if not len(samples):
                raise ValueError("no audio samples")
            names, clips = [*names, path], [*clips, {"audio": encode_flac(samples), "num_samples": len(samples)}]
        except ValueError as error:
            print(f"{PROGRAM}: error: {path} cannot be read as audio: {error}", file=sys.stderr)
            status = 1
    training.disable_tqdm = True
    for name, text in zip(names, transcribe_clips(model, processor, clips, [clip["num_samples"] for clip in clips], args, training)):
        print(text if len(args.transcribe) == 1 else f"{name}\t{text}")
    return status


def select_splits(args, corpus, accents, splits, model, processor, encoder, training):
    """{split: Selection}, with what was left out written to skipped_clips.csv and said; raises RunError for an empty split."""
    limits = {"train": args.max_train_samples, "dev": args.max_eval_samples, "test": args.max_test_samples}
    selections = {}
    for split in splits:
        clips, missing = load_split(corpus, split, accents)
        unusable = unusable_in(split, model, processor, encoder, args)
        selections[split] = select_clips(clips, missing, split, args, unusable, limits[split], training.seed)
        rows = selections[split].rows
        people, spoken = len({row["speaker"] for row in rows}), len({row["accent"] for row in rows})
        say(f"  {split:<5} {len(rows):>7,} clips {selections[split].hours():>7.2f} h {people:>6,} speakers {spoken:>4} accents")
        if not rows:
            raise RunError(f"no {split} clip is left for these --accents, --domains and --countries: choose more of them")
    path = Path(training.output_dir) / "results" / "skipped_clips.csv"
    counts = write_skipped(path, selections.values()) if training.process_index == 0 else {}
    for (split, reason), count in sorted(counts.items()):
        say(f"  left out of {split}: {count:,} x {reason}")
    if counts:
        say(f"  each one is named in {path}")
    return selections


def data_summary(selections, encoder):
    summary = {split: {
        "clips": len(selection.rows),
        "hours": round(selection.hours(), 4),
        "speakers": len({row["speaker"] for row in selection.rows}),
        "accents": len({row["accent"] for row in selection.rows}),
        "skipped": dict(Counter(re.split(r"[:(]", row["reason"])[0].strip() for row in selection.skipped)),
    } for split, selection in selections.items()}  # fmt: skip
    return {**summary, "characters_dropped_from_labels": dict(encoder.dropped)}


def score_split(model, processor, selection, args, training, train_accents):
    """(texts, SCORES, errors of each clip) of the model on a selection."""
    texts = transcribe_clips(model, processor, selection.clips, [row["num_samples"] for row in selection.rows], args, training)
    return (texts, *score_texts(selection.rows, texts, train_accents))


def write_results(args, training, selections, encoder, baseline, finetuned):
    """results/metrics.json and predictions_test.jsonl; `baseline` and `finetuned` are what score_split gave, or None."""
    texts, scores, counts = finetuned or baseline
    config = {"command": " ".join(["python", PROGRAM, *args.command]), **{name: value for name, value in vars(args).items() if name != "command"},
              "training": json.loads(training.to_json_string())}
    metrics = {
        "config": config,
        "versions": library_versions(),
        "data": data_summary(selections, encoder),
        "baseline": baseline and baseline[1],
        "finetuned": finetuned and scores,
        "delta": score_delta(baseline[1], scores) if baseline and finetuned else None,
    }
    results = Path(training.output_dir) / "results"
    write_text(results / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False, default=str))
    write_predictions(results / "predictions_test.jsonl", selections["test"].rows, texts, baseline and finetuned and baseline[0], counts)
    say()
    for line in side_by_side(metrics["baseline"], metrics["finetuned"]):
        say("  " + line)
    return metrics


def run(args, training):
    """The whole job, phase by phase; returns the exit status."""
    from transformers import set_seed

    if args.transcribe:
        return transcribe_files(args, training)
    set_seed(training.seed)
    checkpoint = None if args.prepare_only or args.eval_only else checkpoint_to_resume(training)
    splits = ("test",) if args.eval_only else SPLITS
    if not args.prepare_only:
        say(f"model: {args.model}")
        processor, model = load_processor_and_model(args)
    say(f"corpus: {args.dataset}")
    corpus = open_corpus(args)
    accents = chosen_accents(corpus, args.accents)
    prepare_corpus(corpus, splits, accents, args.num_proc)
    if args.prepare_only:
        say(f"  ready in {args.data_dir}")
        return 0
    encoder = LabelEncoder(processor.tokenizer, model.config.vocab_size, args.target_text)
    selections = select_splits(args, corpus, accents, splits, model, processor, encoder, training)
    train_accents = None if args.eval_only else {row["accent"] for row in selections["train"].rows}
    baseline = None
    if args.eval_only or not args.skip_baseline:
        say("scoring the model as it is on the test split")
        baseline = score_split(model, processor, selections["test"], args, training, train_accents)
        say(f"  WER {percent(baseline[1]['wer'])}")
    if args.eval_only:
        write_results(args, training, selections, encoder, baseline, None)
        return 0
    say("training")
    updates = fit_schedule(training, len(selections["train"].rows))
    trainer = make_trainer(args, training, processor, model, encoder, selections["train"].clips, selections["dev"])
    train_model(trainer, checkpoint, updates)
    say("scoring the fine-tuned model on the test split")
    model = trainer.accelerator.unwrap_model(trainer.model)
    finetuned = score_split(model, processor, selections["test"], args, training, train_accents)
    final = Path(training.output_dir) / "final"
    trainer.save_model(str(final))
    if training.process_index == 0:
        metrics = write_results(args, training, selections, encoder, baseline, finetuned)
        write_text(final / "README.md", model_card(args, args.dataset, metrics))
        say(f"\nmodel: {final}\nresults: {Path(training.output_dir) / 'results'}\ncurves: tensorboard --logdir {Path(training.output_dir) / 'runs'}")
    return 0


def main(argv=None):
    """Run the command line `argv` (sys.argv's if None); returns 0, 2 for a usage error, 1 for an error while running."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args, training = parse_arguments(argv)
        args.command = argv
        return run(args, training)
    except UsageError as error:
        status, message = 2, str(error)
    except RunError as error:
        status, message = 1, str(error)
    except KeyboardInterrupt:
        status, message = 130, "interrupted; the same command goes on with prepared audio, --resume_from_checkpoint true with training"
    except SystemExit as error:  # argparse's --help
        return error.code or 0
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
