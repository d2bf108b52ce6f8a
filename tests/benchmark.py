#!/usr/bin/env python3
"""Measurements behind the README's figures, each one command.

    python tests/benchmark.py gpu       # float16 and bfloat16 at MedASR's size and activation range, 50 updates each
    python tests/benchmark.py prepare   # converting an archive of 300 MB, and the usual way: unpack, then datasets.map

Figures are ratios or come from one run on one machine; run them on yours.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

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
    finetune_medasr.prepare_corpus(corpus, ("dev",), None, args)
    clips = finetune_medasr.load_split(corpus, "dev", None)
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
    import csv

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
    usual = commands.add_parser("usual", help="the way that 'prepare' compares with; it runs this itself")
    usual.add_argument("corpus", type=Path)
    usual.add_argument("out", type=Path)
    usual.set_defaults(run=prepare_the_usual_way)
    options = parser.parse_args()
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
