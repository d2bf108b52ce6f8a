#!/usr/bin/env python3
"""Measurements behind the README's figures, each one command.

    python tests/benchmark.py gpu       # float16 and bfloat16 at MedASR's size and activation range, 50 updates each
    python tests/benchmark.py prepare   # converting an archive of 300 MB, and the usual way: unpack, then datasets.map
    python tests/benchmark.py speed     # data path, start, training, evaluation, long audio; --quick in two minutes
    python tests/benchmark.py trials    # what makes a better adapted model, on the demo's corpus: 5 runs a seed

Figures are ratios or come from one run on one machine; run them on yours.
"""

import argparse
import csv
import io
import itertools
import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import trials  # noqa: E402

import finetune_medasr  # noqa: E402

CORPUS = HERE / "fixtures" / "corpus"
MODEL = HERE / "fixtures" / "model"
SUBSAMPLER_PEAK = 1.1e5  # what the released checkpoint's subsampler reaches; float16 ends at 65,504


def full_size_model(folder, layers):
    """A LasrForCTC in MedASR's configuration with random weights and its activation range, saved with a processor."""
    import torch
    from transformers import AutoProcessor, LasrCTCConfig, LasrForCTC

    torch.manual_seed(0)
    model = LasrForCTC(LasrCTCConfig(encoder_config={"model_type": "lasr_encoder", "num_hidden_layers": layers})).eval()
    processor = AutoProcessor.from_pretrained(MODEL)
    waveform = 0.1 * torch.randn(4 * finetune_medasr.SAMPLE_RATE).numpy()
    features = processor.feature_extractor(
        [waveform], sampling_rate=finetune_medasr.SAMPLE_RATE, return_attention_mask=True, return_tensors="pt"
    )
    subsampler = model.encoder.subsampler
    with torch.no_grad():
        peak = subsampler(features["input_features"]).abs().max()
        for layer in (subsampler.conv_0, subsampler.conv_1):  # ReLU passes a positive scale through
            layer.weight.mul_((SUBSAMPLER_PEAK / peak) ** 0.5)
            layer.bias.mul_((SUBSAMPLER_PEAK / peak) ** 0.5)
        reached = float(subsampler(features["input_features"]).abs().max())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(
        f"model: MedASR's configuration, {layers} layers, {parameters / 1e6:.2f} M parameters, subsampler output up "
        f"to {reached:.3g}"
    )


def training_flags(folder, name, steps, batch_size):
    return f"""--model {folder}/model --dataset {CORPUS} --data_dir {folder}/audio --output_dir {folder}/{name}
        --max_steps {steps} --warmup_steps 5 --logging_steps 1 --eval_steps {steps} --save_steps {steps}
        --save_total_limit 1 --per_device_train_batch_size {batch_size} --gradient_accumulation_steps 1
        --learning_rate 3e-4 --skip_baseline --max_test_samples 8""".split()


def train_on_gpus(folder, precision, gpus, options):
    """Run the program itself; returns its log."""
    name = f"{precision}-{gpus}"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)] if gpus > 1 else []
    flags = [*training_flags(folder, name, options.steps, options.batch_size), f"--{precision}"]
    subprocess.run([sys.executable, *launcher, finetune_medasr.__file__, *flags], check=True)
    state = max((folder / name).glob("checkpoint-*/trainer_state.json"))
    return json.loads(state.read_text())["log_history"]


def train_on_cpu(folder, options):
    """The program's own trainer in float16 on the CPU, with the autocast and gradient scaler that accelerate leaves out
    there; returns (the first loss of plain float16, the log).
    """
    import torch

    flags = [*training_flags(folder, "cpu", options.steps, options.batch_size), "--max_eval_samples", "4"]
    args, training = finetune_medasr.parse_arguments([*flags, "--report_to", "none", "--dataloader_num_workers", "0"])
    processor, model = finetune_medasr.load_processor_and_model(args)
    corpus = finetune_medasr.open_corpus(args)
    finetune_medasr.prepare_corpus(corpus, ("dev",), args)
    clips = finetune_medasr.load_split(corpus, "dev")
    dev = finetune_medasr.select_clips(*clips, args, lambda rows: [""] * len(rows), 4, training.seed)
    train = finetune_medasr.select_clips(*clips, args, lambda rows: [""] * len(rows), options.batch_size, training.seed)
    encoder = finetune_medasr.LabelEncoder(processor.tokenizer, model.config.vocab_size, "as_written")
    batch = finetune_medasr.CTCCollator(processor.feature_extractor, encoder)(list(train.clips))
    batch = finetune_medasr.model_inputs(batch, processor.feature_extractor, "cpu")
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        plain = float(model.train()(**batch).loss)
    model = finetune_medasr.load_processor_and_model(args)[1]  # the forward pass above has moved its BatchNorms
    training.fp16, training.mixed_precision = True, "fp16"
    dev = finetune_medasr.DevSet(dev, processor, encoder, args)
    trainer = finetune_medasr.make_trainer(args, training, model, train.clips, dev)
    trainer.accelerator.native_amp, trainer.accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=64)
    trainer.train()
    return plain, trainer.state.log_history


def report_losses(name, log):
    entries = [entry for entry in log if "loss" in entry]
    losses = [entry["loss"] for entry in entries]
    finite = all(abs(loss) < float("inf") for loss in losses)
    first, last = sum(losses[:5]) / len(losses[:5]), sum(losses[-5:]) / len(losses[-5:])
    verdict = "finite and falling" if finite and last < first else "FAILED"
    speed = sorted(entry["audio_seconds_per_second"] for entry in entries)[len(entries) // 2]
    skipped = f", {entries[-1]['skipped_updates']} updates skipped" if "skipped_updates" in entries[-1] else ""
    print(
        f"{name}: {len(losses)} updates, loss {first:.2f} -> {last:.2f}, {verdict}{skipped}, "
        f"{speed:.0f} audio s/s (median)",
        flush=True,
    )
    return verdict != "FAILED"


def benchmark_gpu(options):
    import torch

    has_gpu, good = torch.cuda.is_available(), True
    options.batch_size = options.batch_size or (8 if has_gpu else 2)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        # float16 is emulated on a CPU and takes minutes an update at full depth; what overflows is in the first layers.
        full_size_model(folder / "model", layers=17 if has_gpu else 2)
        if not has_gpu:
            print("no CUDA GPU: the same trainer under float16 autocast on the CPU")
            plain, log = train_on_cpu(folder, options)
            print(f"plain float16: loss {plain} at the first update")
            return 0 if report_losses("guarded float16", log) else 1
        print(torch.cuda.device_count(), "x", torch.cuda.get_device_name(), torch.__version__)
        runs = [("fp16", 1), ("bf16", 1)] + [("fp16", 2)] * (torch.cuda.device_count() > 1)
        for precision, gpus in runs:
            start = time.monotonic()
            good &= report_losses(f"{precision} on {gpus}", train_on_gpus(folder, precision, gpus, options))
            print(f"  {time.monotonic() - start:.0f} s with loading and scoring")
        if torch.cuda.device_count() < 2:
            print("two GPUs: not run, there is one")
    return 0 if good else 1


# ---- prepare ---------------------------------------------------------------------------------------------------------


def fixture_speech():
    """The fixture's clips as 16 kHz samples, one after the other, for ever."""
    import soundfile

    while True:
        for archive in sorted(CORPUS.glob("audio/*/*/*.tar.gz")):
            with tarfile.open(archive) as tar:
                for member in tar:
                    try:
                        yield soundfile.read(io.BytesIO(tar.extractfile(member).read()), dtype="float32")[0]
                    except soundfile.SoundFileError:
                        continue


def make_corpus(folder, megabytes):
    """A corpus of one archive in AfriSpeech-200's form, 44.1 kHz stereo WAV clips of 10 to 20 s; returns (clips,
    seconds).
    """
    import numpy as np
    import soundfile
    import soxr

    generator, speech = np.random.default_rng(0), fixture_speech()
    archive = folder / "audio" / "igbo" / "train" / "train_igbo_0.tar.gz"
    transcripts = folder / "transcripts" / "igbo" / "train.csv"
    archive.parent.mkdir(parents=True)
    transcripts.parent.mkdir(parents=True)
    rows, seconds = ["user_ids,accent,transcript,audio_paths,duration,domain"], 0.0
    with tarfile.open(archive, "w:gz", compresslevel=6) as tar:
        while not rows[1:] or archive.stat().st_size < megabytes * 1e6:
            samples, wanted = np.zeros(0, np.float32), generator.uniform(10, 20) * finetune_medasr.SAMPLE_RATE
            while len(samples) < wanted:
                samples = np.concatenate([samples, next(speech)])
            mono = soxr.resample(samples, finetune_medasr.SAMPLE_RATE, 44_100)
            mono += generator.normal(scale=1e-3, size=len(mono))  # a room's noise, which gzip cannot remove
            buffer = io.BytesIO()
            soundfile.write(buffer, np.stack([mono, 0.9 * mono], axis=1), 44_100, format="WAV", subtype="PCM_16")
            member = tarfile.TarInfo(f"data/data/intron/session/{len(rows)}.wav")
            member.size = buffer.tell()
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
            rows.append(
                f"speaker,igbo,The patient has a "
                f"fever.,/AfriSpeech-100/train/session/{len(rows)}.wav,{len(mono) / 44_100:.3f},clinical"
            )
            seconds += len(mono) / 44_100
    transcripts.write_text("\n".join(rows) + "\n")
    return len(rows) - 1, seconds


def prepare_the_usual_way(options):
    """Unpack the archive, then `datasets.map` with librosa into cached features; run in a process of its own."""
    import librosa
    from datasets import Dataset
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(MODEL)
    archive, transcripts = (
        next(options.corpus.glob("audio/*/*/*.tar.gz")),
        next(options.corpus.glob("transcripts/*/*.csv")),
    )
    with tarfile.open(archive) as tar:
        tar.extractall(options.out / "wav", filter="data")
    rows = [
        {
            "path": row["audio_paths"].replace("/AfriSpeech-100/train", str(options.out / "wav/data/data/intron")),
            "text": row["transcript"],
        }
        for row in csv.DictReader(transcripts.open(newline=""))
    ]

    def features(row):
        samples, _ = librosa.load(row["path"], sr=finetune_medasr.SAMPLE_RATE)
        inputs = processor.feature_extractor(samples, sampling_rate=finetune_medasr.SAMPLE_RATE)
        return {"input_features": inputs.input_features[0], "labels": processor.tokenizer(row["text"]).input_ids}

    Dataset.from_list(rows).map(
        features, remove_columns=["path", "text"], cache_file_name=str(options.out / "features.arrow")
    )


def bytes_below(folder):
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # deleted meanwhile
            continue
    return total


def memory_of_group(group):
    """Resident bytes of all processes of a group together (Linux)."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE") if int(fields[2]) == group else 0
    return total


def measured(command, folder):
    """{"wall", "cpu" in seconds, "memory", "disk" in bytes at the peak, "kept" in bytes} of a command that writes to
    `folder`.
    """
    peaks, stop = {"memory": 0, "disk": 0}, threading.Event()
    start = time.monotonic()
    with open(folder.with_suffix(".log"), "w") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log, start_new_session=True)

        def watch():
            while not stop.wait(0.1):
                peaks["memory"] = max(peaks["memory"], memory_of_group(process.pid))
                peaks["disk"] = max(peaks["disk"], bytes_below(folder))

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        stop.set()
        watcher.join()
    if status:
        sys.exit(folder.with_suffix(".log").read_text())
    kept = bytes_below(folder)
    return {
        "wall": time.monotonic() - start,
        "cpu": usage.ru_utime + usage.ru_stime,
        "kept": kept,
        **peaks,
        "disk": max(peaks["disk"], kept),
    }


def benchmark_prepare(options):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        clips, seconds = make_corpus(folder / "full", options.megabytes)
        make_corpus(folder / "one", 0)  # one clip: what starting the program costs
        archive = sum(path.stat().st_size for path in folder.glob("full/audio/*/*/*.tar.gz"))
        print(
            f"one archive of {archive / 1e6:.0f} MB: {clips} clips, {seconds / 3600:.2f} h; a single process converts "
            f"it"
        )
        figures = []
        for name in ("ours", "usual"):
            for corpus in ("one", "full"):
                out = folder / f"{name}-{corpus}"
                out.mkdir()
                command = [
                    sys.executable,
                    HERE.parent / "finetune_medasr.py",
                    "--prepare_only",
                    "--num_proc",
                    1,
                    "--dataset",
                    folder / corpus,
                    "--data_dir",
                    out,
                    "--output_dir",
                    folder / "output",
                ]
                if name == "usual":
                    command = [sys.executable, __file__, "usual", folder / corpus, out]
                figures.append(measured(command, out))
        ours, usual = (
            {**full, "clip": (full["cpu"] - one["cpu"]) / (clips - 1)} for one, full in (figures[:2], figures[2:])
        )
        hours = seconds / 3600
        rows = [
            ("wall time with start-up, s", "wall", 1),
            ("ms a clip on one core, without start-up", "clip", 1e3),
            ("memory at the peak, MB", "memory", 1e-6),
            ("disk at the peak beside the archive, MB an hour", "disk", 1e-6 / hours),
            ("disk that stays, MB an hour", "kept", 1e-6 / hours),
        ]
        print(f"{'':<50}{'this script':>12}{'usual way':>12}{'ratio':>8}")
        for label, key, scale in rows:
            print(f"{label:<50}{ours[key] * scale:>12.1f}{usual[key] * scale:>12.1f}{usual[key] / ours[key]:>8.1f}")
        print(
            f"{'clips an hour on one core':<50}{3600 / ours['clip']:>12,.0f}{3600 / usual['clip']:>12,.0f}"
            f"{usual['clip'] / ours['clip']:>8.1f}"
        )
        print(
            "The usual way caches log-mels; this script computes them when it makes a batch, in the workers that feed "
            "the GPU."
        )
    return 0


# ---- speed -----------------------------------------------------------------------------------------------------------

WORDS = "the patient has a fever and no cough give two hundred milligrams twice a day for seven days".split()


def make_prepared_corpus(folder, train_clips, seconds=None, silent=False):
    """A corpus as --prepare_only leaves it: clips of AfriSpeech-200's lengths (or of `seconds` each), with speech,
    or `silent` ones, whose audio takes no room, of 100 archives.
    """
    import numpy as np
    from datasets.arrow_writer import ArrowWriter

    generator, speech = np.random.default_rng(0), np.concatenate(list(itertools.islice(fixture_speech(), 100)))
    silence, number = finetune_medasr.encode_flac(np.zeros(1600, np.float32)), 0
    accents = [f"accent{index}" for index in range(100 if silent else 1)]
    for split, accent in [("train", accent) for accent in accents] + [("dev", "accent0"), ("test", "accent0")]:
        out = folder / "audio_16khz" / split / f"{split}_{accent}_0.arrow"
        archive = folder / "corpus" / "audio" / accent / split / f"{split}_{accent}_0.tar.gz"
        transcripts = folder / "corpus" / "transcripts" / accent / f"{split}.csv"
        for path in (out, archive, transcripts):
            path.parent.mkdir(parents=True, exist_ok=True)
        archive.touch()
        columns = "audio_paths,transcript,duration,accent,domain,user_ids,country,gender,age_group".split(",")
        with (
            open(transcripts, "w", newline="") as file,
            ArrowWriter(path=str(out), features=finetune_medasr.clip_features(), writer_batch_size=50) as writer,
        ):
            table = csv.DictWriter(file, columns)
            table.writeheader()
            for _ in range(train_clips // len(accents) if split == "train" else 8):
                length = seconds or float(np.clip(generator.lognormal(np.log(8.4), 0.7), 1, 30))
                count, number = round(length * finetune_medasr.SAMPLE_RATE), number + 1
                start = generator.integers(len(speech) - count)
                audio = silence if silent else finetune_medasr.encode_flac(speech[start : start + count])
                text = " ".join(generator.choice(WORDS, round(2.2 * length)))
                key = f"session-{number:08d}/{number:032x}.wav"
                row = {"audio_paths": key, "transcript": text, "duration": f"{length:.3f}", "accent": accent}
                row |= {"domain": "clinical", "user_ids": f"speaker{number % 1466}", "country": "NG"}
                table.writerow(row)
                clip = {**finetune_medasr.clip_row(key, split, accent, row), "num_samples": count, "audio": audio}
                writer.write(clip)
            writer.finalize()


def corpus_flags(folder, *more):
    flags = f"--model {MODEL} --dataset {folder}/corpus --data_dir {folder}/audio_16khz --output_dir {folder}/out"
    return [*f"{flags} --overwrite_output_dir --skip_baseline".split(), *more]


def opened(folder, *more):
    """(args, training, processor, model, encoder, {split: Selection}) of a prepared corpus, as a run opens them."""
    args, training = finetune_medasr.parse_arguments(corpus_flags(folder, "--report_to", "none", *more))
    training.disable_tqdm = True
    processor, model = finetune_medasr.load_processor_and_model(args)
    encoder = finetune_medasr.LabelEncoder(processor.tokenizer, model.config.vocab_size, args.target_text)
    check = finetune_medasr.ClipCheck(model, processor.feature_extractor, encoder, args.max_train_seconds)
    corpus, selections = finetune_medasr.open_corpus(args), {}
    for split in ("train", "dev"):
        clips = finetune_medasr.load_split(corpus, split)
        selections[split] = finetune_medasr.select_clips(*clips, args, check, None, 0)
    return args, training, processor, model, encoder, selections


def cached_features(clips, processor, folder):
    """What the usual way trains on: log-mels and labels that datasets.map has cached."""

    def features(row):
        samples = finetune_medasr.decode_audio(row["audio"])
        inputs = processor.feature_extractor([samples], sampling_rate=finetune_medasr.SAMPLE_RATE)
        return {"input_features": inputs.input_features[0], "labels": processor.tokenizer(row["text"]).input_ids}

    name = str(folder / f"features-{len(clips)}.arrow")
    return clips.map(features, remove_columns=clips.column_names, cache_file_name=name)


class UsualCollator:
    """The collator of the usual CTC notebooks: cached features and labels, each padded by its own class."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, rows):
        inputs = [{"input_features": row["input_features"]} for row in rows]
        batch = self.processor.feature_extractor.pad(inputs, return_attention_mask=True, return_tensors="pt")
        labels = self.processor.tokenizer.pad([{"input_ids": row["labels"]} for row in rows], return_tensors="pt")
        batch["labels"] = labels["input_ids"].masked_fill(labels["attention_mask"].ne(1), -100)
        return batch


def paired(repeats, *calls):
    """The median seconds of each of `calls`, made in turn.

    Each is called twice and the second time counts, as in a loop of its own: after another's large arrays the first
    finds its memory given back to the system, and pays for every page anew.
    """
    times = [[] for _ in calls]
    for call, taken in itertools.chain.from_iterable(zip(calls, times) for _ in range(repeats + 1)):
        call()
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in times]


def measure_data_path(folder, options):
    """From finished file to padded batch, clips of 10 s, on one core."""
    import torch

    torch.set_num_threads(1)
    make_prepared_corpus(folder, 32, seconds=10.0)
    _, _, processor, _, encoder, selections = opened(folder)
    clips, extractor = selections["train"].clips, processor.feature_extractor
    usual = cached_features(clips, processor, folder)
    collator, usual_collator = finetune_medasr.CTCCollator(extractor, encoder), UsualCollator(processor)
    indices = list(range(8))

    def ours():
        return finetune_medasr.model_inputs(collator(clips.__getitems__(indices)), extractor, "cpu")

    def theirs():
        return usual_collator(usual.__getitems__(indices))

    audio = [clip["audio"] for clip in clips.select(indices)]

    def decode():
        return [finetune_medasr.decode_audio(data) for data in audio]

    def extract():
        options = dict(padding="longest", return_attention_mask=True, return_tensors="pt")
        return extractor(decode(), sampling_rate=finetune_medasr.SAMPLE_RATE, **options)

    def for_a_gpu():
        return collator(clips.__getitems__(indices))

    torch.testing.assert_close(ours()["input_features"].shape, theirs()["input_features"].shape)
    calls = ours, theirs, decode, extract, for_a_gpu
    a, b, c, d, e = paired(5 if options.quick else 20, *calls)
    return [
        ("finished file to padded batch, ms a clip of 10 s", 1e3 * a / 8, 1e3 * b / 8, b / a),
        ("  on a core whose GPU makes the log-mels", 1e3 * e / 8, 1e3 * b / 8, b / e),
        ("  of it FLAC to samples", 1e3 * c / 8, None, None),
        ("  with LasrFeatureExtractor instead of the script's log-mels", 1e3 * d / 8, None, None),
    ]


def usual_trainer(folder, model, processor, train, dev, steps, extra=()):
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    def rates(prediction):
        ids = prediction.predictions.argmax(-1)
        labels = np.where(prediction.label_ids == -100, processor.tokenizer.pad_token_id, prediction.label_ids)
        texts, references = (processor.tokenizer.batch_decode(part) for part in (ids, labels))
        return finetune_medasr.error_rates_metric().compute(predictions=texts, references=references)

    import numpy as np

    settings = dict(per_device_train_batch_size=8, per_device_eval_batch_size=8, gradient_accumulation_steps=4)
    training = TrainingArguments(
        output_dir=str(folder / "usual"),
        **settings,
        max_steps=steps,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        logging_steps=1,
        **dict(extra),
    )
    trainer = Trainer(
        model=model, args=training, data_collator=UsualCollator(processor), train_dataset=train, eval_dataset=dev,
        compute_metrics=rates,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure_evaluation(folder, options):
    """The dev scores of clips of the corpus's lengths: the script's, and Trainer.evaluate with gathered logits."""
    make_prepared_corpus(folder, 64 if options.quick else 256)
    args, training, processor, model, encoder, selections = opened(folder)
    clips = selections["train"]
    dev = finetune_medasr.DevSet(clips, processor, encoder, args)
    usual = cached_features(clips.clips.shuffle(seed=0), processor, folder)
    trainer = usual_trainer(folder, model, processor, usual, usual, 1)
    a, b = paired(2 if options.quick else 5, lambda: dev.score(model, training), trainer.evaluate)
    audio = finetune_medasr.hours(clips.rows) * 3600
    return [("evaluation, audio seconds a second", audio / a, audio / b, b / a)]


def padding_of(selection, clips):
    """Percent of padding in batches of so many clips in the order of an epoch, and in random order."""
    import numpy as np
    from transformers.trainer_pt_utils import LengthGroupedSampler

    lengths = np.array([row["num_samples"] for row in selection.rows])
    sampler = finetune_medasr.mixed(finetune_medasr.EpochOrder, LengthGroupedSampler)(32, lengths.tolist(), 42, int)
    found = []
    for order in (list(sampler), np.random.default_rng(0).permutation(len(lengths))):
        batches = [lengths[order[start : start + clips]] for start in range(0, len(lengths), clips)]
        found.append(100 * (1 - lengths.sum() / sum(len(batch) * batch.max() for batch in batches)))
    return found


def measure_start(folder, options):
    """From the command to one update with 58,000 prepared clips, beyond what a few clips take."""
    flags = "--max_steps 1 --eval_strategy no --save_strategy no --load_best_model_at_end false --report_to none"
    found = {"few": [], "many": []}
    for name, count in (("few", 100), ("many", 58_000)):
        make_prepared_corpus(folder / name, count, silent=True)
    for name in ["few", "many"] * (1 if options.quick else 3):
        command = [sys.executable, finetune_medasr.__file__, *corpus_flags(folder / name), *flags.split()]
        found[name].append(measured(command, folder / name / "out"))
    few, many = (min(runs, key=lambda run: run["wall"]) for runs in found.values())
    clips = opened(folder / "many")[-1]["train"]
    grouped, shuffled = padding_of(clips, 8)
    grouped32, shuffled32 = padding_of(clips, 32)
    return [
        ("start with 58,000 clips beyond that with 100, s", many["wall"] - few["wall"], None, None),
        ("  memory beyond it, MB", (many["memory"] - few["memory"]) / 1e6, None, None),
        ("  the pickled training clips, MB", len(pickle.dumps(clips.clips)) / 1e6, None, None),
        ("padding in batches of 8, % (random order beside it)", grouped, shuffled, shuffled / grouped),
        ("padding in batches of 32, %", grouped32, shuffled32, shuffled32 / grouped32),
    ]


def measure_long_audio(folder, options):
    """--transcribe of 1, 10 and 60 minutes."""
    import numpy as np
    import soundfile

    speech, rows = np.concatenate(list(itertools.islice(fixture_speech(), 100))), []
    for minutes in (1, 10, 60):
        path, out = folder / f"{minutes}.flac", folder / f"out-{minutes}"
        with soundfile.SoundFile(path, "w", finetune_medasr.SAMPLE_RATE, 1, format="FLAC") as file:
            for _ in range(minutes):
                file.write(np.resize(speech, 60 * finetune_medasr.SAMPLE_RATE))
        command = [sys.executable, finetune_medasr.__file__, "--transcribe", path, "--model", MODEL]
        rows.append((minutes, measured([*command, "--use_cpu", "true", "--output_dir", out], out)))
    first = rows[0][1]
    lines = [(f"{minutes} min of audio to text, s", found["wall"], None, None) for minutes, found in rows]
    memory = [(f"  memory at {minutes} min, MB", found["memory"] / 1e6, None, None) for minutes, found in rows]
    a_minute = [(found["wall"] - first["wall"]) / (minutes - 1) for minutes, found in rows[1:]]
    linear = [("  s a minute beyond the first, at 10 and 60 min", *a_minute, a_minute[1] / a_minute[0])]
    return lines + memory + linear


def train_usual(folder, options):
    """Audio seconds a second of the usual recipe: cached features, random batches of 8 x 4, bf16 on a GPU."""
    import torch

    args, training, processor, model, encoder, selections = opened(folder, *options.model)
    train = cached_features(selections["train"].clips, processor, folder)
    steps, extra = options.updates, {"bf16": True} if torch.cuda.is_available() else {"use_cpu": True}
    trainer = usual_trainer(folder, model, processor, train, None, steps, {**extra, "dataloader_num_workers": 2})
    trainer.model_accepts_loss_kwargs = False
    heard = []
    step = trainer.training_step

    def timed(model, inputs, *rest):
        heard.append((time.monotonic(), inputs["attention_mask"].sum().item() * 160 / 16_000))
        return step(model, inputs, *rest)

    trainer.training_step = timed
    trainer.train()
    warm = len(heard) // 3
    return sum(seconds for _, seconds in heard[warm:-1]) / (heard[-1][0] - heard[warm][0])


def train_ours(folder, options):
    flags = [*corpus_flags(folder, *options.model), "--max_steps", options.updates, "--logging_steps", 1]
    flags += ["--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", options.updates]
    flags += ["--load_best_model_at_end", "false", "--no_spec_augment", "--max_test_samples", 1, "--report_to", "none"]
    subprocess.run(list(map(str, [sys.executable, finetune_medasr.__file__, *flags])), check=True, capture_output=True)
    state = json.loads(next((folder / "out").glob("checkpoint-*/trainer_state.json")).read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    logged = logged[len(logged) // 3 :]
    return [
        statistics.median(entry[name] for entry in logged) for name in ("audio_seconds_per_second", "data_wait_percent")
    ]


def train_resident(folder, options):
    """Audio seconds a second of forward, backward and AdamW on one batch that stays on the GPU, float16."""
    import torch

    args, training, processor, model, encoder, selections = opened(folder, *options.model)
    collator = finetune_medasr.CTCCollator(processor.feature_extractor, encoder)
    middle = len(selections["train"].clips) // 2
    rows = [selections["train"].clips[index] for index in range(middle - 16, middle + 16)]
    batch, device = collator(rows), training.device
    seconds = sum(row["num_samples"] for row in rows) / finetune_medasr.SAMPLE_RATE
    inputs = finetune_medasr.model_inputs(batch, processor.feature_extractor, device)
    model = model.to(device).train()
    finetune_medasr.guard_half_precision(model, [inputs], device)
    model.train()
    optimizer, scaler = torch.optim.AdamW(model.parameters(), fused=True), torch.amp.GradScaler()
    for step in range(options.updates):
        if step == options.updates // 3:
            torch.cuda.synchronize()
            start = time.monotonic()
        with torch.autocast("cuda", torch.float16):
            loss = model(**inputs).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    return seconds * (options.updates - options.updates // 3) / (time.monotonic() - start)


def measure_training(folder, options):
    """Audio seconds a second in training: the small model on a CPU, MedASR's configuration on a GPU."""
    import torch

    has_gpu = torch.cuda.is_available()
    options.updates = 30 if has_gpu else 4 if options.quick else 8
    options.model = ["--max_train_seconds", "30"]
    make_prepared_corpus(folder, 1500 if has_gpu else 128)
    if has_gpu:
        full_size_model(folder / "model", layers=17)
        options.model += ["--model", str(folder / "model")]
    ours, wait = train_ours(folder, options)
    usual = train_usual(folder, options)
    where = "MedASR's size, GPU" if has_gpu else "the small model, CPU"
    rows = [
        (f"training, {where}, audio s a second", ours, usual, ours / usual),
        ("  share of time waiting for data, %", wait, None, None),
    ]
    if not has_gpu:
        return rows + [("training, MedASR's size, GPU: not run, there is none", None, None, None)]
    resident = train_resident(folder, options)
    return rows + [("  on one resident batch (this script beside it)", resident, ours, ours / resident)]


def measure_threads(folder, options):
    """The demo's training with so many threads and workers, and with threads that spin while they wait."""
    rows = []
    flags = "--max_steps 16 --eval_strategy no --save_strategy no --load_best_model_at_end false --skip_baseline"
    flags += f" --max_test_samples 1 --overwrite_output_dir --output_dir {folder}/out --data_dir {folder}/audio_16khz"
    settings = [(1, 0, "PASSIVE"), (1, 1, "PASSIVE"), (2, 0, "PASSIVE"), (2, 1, "PASSIVE"), (2, 1, "ACTIVE")]
    for threads, workers, policy in settings[:: 4 if options.quick else 1]:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": policy}
        command = [sys.executable, finetune_medasr.__file__, "--demo", *flags.split()]
        command += ["--dataloader_num_workers", str(workers)]
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        speed = float(re.search(r"at (\d+) an hour", done.stdout)[1])
        waiting = "spinning" if policy == "ACTIVE" else "sleeping"
        rows.append((f"demo's training, {threads} threads {waiting}, {workers} workers, audio s/s", speed, None, None))
    return rows


def benchmark_speed(options):
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    parts = [
        measure_data_path,
        measure_evaluation,
        measure_start,
        measure_long_audio,
        measure_training,
        measure_threads,
    ]
    print(f"{'':<58}{'this script':>12}{'usual way':>12}{'ratio':>8}")
    for part in [part for part in parts if options.only in part.__name__]:
        with tempfile.TemporaryDirectory() as folder:
            for label, *figures in part(Path(folder), options):
                print(
                    f"{label:<58}"
                    + "".join(f"{'' if x is None else f'{x:,.1f}':>{w}}" for x, w in zip(figures, (12, 12, 8))),
                    flush=True,
                )
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    gpu = commands.add_parser("gpu", help="half precision at full size")
    gpu.add_argument("--steps", type=int, default=50)
    gpu.add_argument("--batch_size", type=int, help="8 on a GPU, 2 without one")
    gpu.set_defaults(run=benchmark_gpu)
    prepare = commands.add_parser("prepare", help="time, memory and disk of the preparation")
    prepare.add_argument("--megabytes", type=float, default=300)
    prepare.set_defaults(run=benchmark_prepare)
    speed = commands.add_parser("speed", help="data path, start, training, evaluation and long audio")
    speed.add_argument("--quick", action="store_true", help="fewer repetitions")
    speed.add_argument("--only", default="", help="one part, e.g. data_path")
    speed.set_defaults(run=benchmark_speed)
    tried = commands.add_parser("trials", help="averaged checkpoints, speed perturbation and freezing, by WER")
    tried.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45])
    tried.add_argument("--only", default="", help="one change beside the base, e.g. speed")
    tried.add_argument("--results", type=Path, help="JSON lines to go on from, and to add to")
    tried.set_defaults(run=trials.run_trials)
    usual = commands.add_parser("usual", help="the way that 'prepare' compares with; it runs this itself")
    usual.add_argument("corpus", type=Path)
    usual.add_argument("out", type=Path)
    usual.set_defaults(run=prepare_the_usual_way)
    options = parser.parse_args()
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
