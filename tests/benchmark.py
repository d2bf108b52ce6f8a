#!/usr/bin/env python3
"""Measurements behind the figures of tests/README.md, each one command.

python tests/benchmark.py gpu       # float16 and bfloat16 at MedASR's size and activation range, 50 updates each
python tests/benchmark.py prepare   # converting an archive of 300 MB, and the usual way: unpack, then datasets.map
python tests/benchmark.py speed     # data path, evaluation, start, long audio, training"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import jiwer
import librosa
import numpy as np
import pyarrow
import soundfile
import soxr
import torch
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from transformers import AutoProcessor, LasrCTCConfig, LasrForCTC, Trainer, TrainingArguments

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import finetune_medasr as script  # noqa: E402

CORPUS, MODEL, RATE = HERE / "fixtures/corpus", HERE / "fixtures/model", script.SAMPLE_RATE
PROGRAM = [sys.executable, script.__file__]
SUBSAMPLER_PEAK = 1.1e5  # what the released checkpoint's subsampler reaches; float16 ends at 65,504


def opened(flags):
    """What a run has before it trains."""
    settings = script.parse_settings([*map(str, flags), "--disable_tqdm", "true"])
    (processor, model), source = script.load_model(settings), script.Source(settings.dataset, settings, script.SPLITS)
    script.prepare(source, script.SPLITS, settings)
    encoder = script.LabelEncoder(processor.tokenizer, model.config.vocab_size, settings.target_text)
    clips = script.select_all({"": source}, settings, lambda table: table["problem"])
    decoder = script.Decoder(model, processor, settings)
    return SimpleNamespace(settings=settings, processor=processor, clips=clips, encoder=encoder, decoder=decoder)


def full_size_model(folder, layers):
    """A LasrForCTC in MedASR's configuration with random weights and its activation range, saved with a processor."""
    torch.manual_seed(0)
    model = LasrForCTC(LasrCTCConfig(encoder_config={"model_type": "lasr_encoder", "num_hidden_layers": layers})).eval()
    processor, subsampler = AutoProcessor.from_pretrained(MODEL), model.encoder.subsampler
    features = script.log_mels(0.1 * torch.randn(1, 4 * RATE), torch.tensor([4 * RATE]), processor.feature_extractor)[0]
    with torch.no_grad():
        scale = (SUBSAMPLER_PEAK / subsampler(features).abs().max()) ** 0.5
        for values in (*subsampler.conv_0.parameters(), *subsampler.conv_1.parameters()):
            values.mul_(scale)  # ReLU passes a positive scale through
        reached = float(subsampler(features).abs().max())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    size = sum(weight.numel() for weight in model.parameters()) / 1e6
    print(f"model: MedASR's configuration, {layers} layers, {size:.2f} M parameters, subsampler up to {reached:.3g}")


def logged(output):
    """The entries with a training loss in the Trainer's log of the only checkpoint in a folder."""
    state = json.loads(next(output.glob("checkpoint-*/trainer_state.json")).read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def train_on_cpu(flags):
    """The log of the program's trainer in float16, with autocast and scaler, which accelerate leaves out on a CPU."""
    run = opened([*flags, *"--max_eval_samples 4 --report_to none --dataloader_num_workers 0".split()])
    settings, extractor, train = run.settings, run.decoder.extractor, run.clips["train"].audio
    batch = script.model_inputs(script.CTCCollator(extractor, run.encoder)([train[0], train[1]]), extractor, "cpu")
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        print(f"plain float16: loss {float(run.decoder.model.train()(**batch).loss)} at the first update")
    run.decoder.model = script.load_model(settings)[1]  # the forward pass above has moved its BatchNorms
    settings.fp16, settings.mixed_precision = True, "fp16"
    trainer = script.make_trainer(settings, run.decoder, run.encoder, train, run.clips["dev"])
    trainer.accelerator.native_amp, trainer.accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=64)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def report_losses(name, log):
    losses, skipped = [entry["loss"] for entry in log], log[-1].get("skipped_updates", 0)
    first, last = statistics.mean(losses[:5]), statistics.mean(losses[-5:])
    verdict = "finite and falling" if np.isfinite(losses).all() and last < first else "FAILED"
    speed = statistics.median(entry["audio_seconds_per_second"] for entry in log)
    change = f"{len(losses)} updates, {skipped} of them skipped, loss {first:.2f} -> {last:.2f}"
    print(f"{name}: {change}, {verdict}, {speed:.0f} audio s/s (median)", flush=True)
    return verdict != "FAILED"


def benchmark_gpu(options):
    gpus, good = torch.cuda.device_count(), True
    with tempfile.TemporaryDirectory() as folder:
        # float16 is emulated on a CPU and takes minutes an update at full depth; what overflows is in the first layers.
        full_size_model(Path(folder, "model"), layers=17 if gpus else 2)
        flags = f"""--model {folder}/model --dataset {CORPUS} --data_dir {folder}/audio --max_steps 50 --warmup_steps 5
            --logging_steps 1 --eval_steps 50 --save_steps 50 --save_total_limit 1 --gradient_accumulation_steps 1
            --per_device_train_batch_size {8 if gpus else 2} --learning_rate 3e-4 --skip_baseline --max_test_samples 8
            --output_dir {folder}/""".split()
        if not gpus:
            print("no CUDA GPU: the same trainer under float16 autocast on the CPU")
            return 0 if report_losses("guarded float16", train_on_cpu(flags)) else 1
        print(gpus, "x", torch.cuda.get_device_name(), torch.__version__)
        for precision, count in [("fp16", 1), ("bf16", 1)] + [("fp16", 2)] * (gpus > 1):
            launcher = f"-m torch.distributed.run --standalone --nproc_per_node {count}".split() if count > 1 else []
            flags[-1] = f"{folder}/{precision}-{count}"
            subprocess.run([sys.executable, *launcher, script.__file__, *flags, f"--{precision}"], check=True)
            good &= report_losses(f"{precision} on {count}", logged(Path(flags[-1])))
    return 0 if good else 1


def sound(samples, rate=RATE, form="FLAC"):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form, subtype="PCM_16")
    return buffer.getvalue()


def write_transcripts(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow("audio_paths transcript duration accent domain user_ids country".split())
        table.writerows([*row, "clinical", f"speaker{number % 1466}", "NG"] for number, row in enumerate(rows))


def speech():
    """The fixture's clips as 16 kHz samples, one after the other."""
    clips = []
    for archive in sorted(CORPUS.glob("audio/*/*/*.tar.gz")):
        with tarfile.open(archive) as tar:
            for member in tar:
                with contextlib.suppress(ValueError):
                    clips.append(script.decode_audio(tar.extractfile(member).read()))
    return np.concatenate(clips)


def make_corpus(folder, megabytes):
    """A corpus of one archive in AfriSpeech-200's form, 44.1 kHz stereo WAV clips of 10 to 20 s: (clips, seconds)."""
    generator, samples, rows = np.random.default_rng(0), speech(), []
    archive = folder / "audio/igbo/train/train_igbo_0.tar.gz"
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz", compresslevel=6) as tar:
        while not rows or archive.stat().st_size < megabytes * 1e6:
            start, count = generator.integers(len(samples) - 20 * RATE), int(generator.uniform(10, 20) * RATE)
            mono = soxr.resample(samples[start : start + count], RATE, 44_100)
            mono += generator.normal(scale=1e-3, size=len(mono))  # a room's noise, which gzip cannot remove
            audio, key = sound(np.stack([mono, 0.9 * mono], axis=1), 44_100, "WAV"), f"session/{len(rows)}.wav"
            member = tarfile.TarInfo(f"data/data/intron/{key}")
            member.size = len(audio)
            tar.addfile(member, io.BytesIO(audio))
            rows.append([f"/AfriSpeech-100/train/{key}", "The patient has a fever.", len(mono) / 44_100, "igbo"])
    write_transcripts(folder / "transcripts/igbo/train.csv", rows)
    return len(rows), sum(row[2] for row in rows)


def prepare_the_usual_way(options):
    """Unpack the archive, then `datasets.map` with librosa into cached features; run in a process of its own."""
    processor, (corpus, out) = AutoProcessor.from_pretrained(MODEL), options.folders
    with tarfile.open(next(corpus.glob("audio/*/*/*.tar.gz"))) as tar:
        tar.extractall(out / "wav", filter="data")
    with next(corpus.glob("transcripts/*/*.csv")).open(newline="") as file:
        rows = [{"name": row["audio_paths"], "text": row["transcript"]} for row in csv.DictReader(file)]

    def samples(row):
        return librosa.load(out / "wav/data/data/intron" / row["name"].split("train/")[1], sr=RATE)[0]

    cached_features(Dataset.from_list(rows), processor, out, samples)


def memory_of_group(group):
    """Bytes that all processes of a group hold together, what they share counted once, without the pages of files."""
    total = 0
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if int((place / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                lines = map(str.split, (place / "smaps_rollup").read_text().splitlines())
                total += sum(int(line[1]) * 1024 for line in lines if line[0] in ("Pss_Anon:", "Pss_Shmem:"))
    return total


def measured(*command):
    """{"wall" and "cpu" in seconds, "memory" in bytes at the peak} of a command."""
    memory, began = 0, time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, start_new_session=True)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            memory = max(memory, memory_of_group(process.pid))
            time.sleep(0.1)
        log.seek(0)
        if ended[1]:
            sys.exit(log.read())
    return {"wall": time.monotonic() - began, "cpu": ended[2].ru_utime + ended[2].ru_stime, "memory": memory}


def benchmark_prepare(options):
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_corpus(folder / "one", 0)  # one clip: what starting the program costs
        clips, seconds = make_corpus(folder / "full", 300)
        hours = seconds / 3600
        print(f"one archive of 300 MB: {clips} clips, {hours:.2f} h; a single process converts it")
        for name, corpus in itertools.product(("ours", "usual"), ("one", "full")):
            out = folder / f"{name}-{corpus}"
            out.mkdir()
            flags = ["--dataset", folder / corpus, "--data_dir", out, "--output_dir", folder / "output"]
            usual = [sys.executable, __file__, "usual", folder / corpus, out]
            taken = measured(*(usual if name == "usual" else [*PROGRAM, "--prepare_only", "--num_proc", 1, *flags]))
            figures.append(taken | {"kept": sum(path.stat().st_size for path in out.rglob("*") if path.is_file())})
    for label, key, scale in (
        ("ms a clip on one core, without start-up", "cpu", 1e3 / (clips - 1)),
        ("memory at the peak, MB", "memory", 1e-6),
        ("disk that stays, MB an hour", "kept", 1e-6 / hours),
    ):
        one_clip, ours, one_usual, usual = (found[key] * scale for found in figures)
        if key == "cpu":
            ours, usual = ours - one_clip, usual - one_usual
        print(f"{label:<50}{ours:>12,.1f}, the usual way {usual:,.1f}, ratio {usual / ours:.1f}")
    print("The usual way caches log-mels; this script computes them when it makes a batch.")
    return 0


WORDS = "the patient has a fever and no cough give two hundred milligrams twice a day for seven days".split()


def corpus_flags(folder, *more):
    flags = f"--model {MODEL} --dataset {folder}/corpus --data_dir {folder}/audio_16khz --output_dir {folder}/out"
    return [*f"{flags} --overwrite_output_dir --skip_baseline --report_to none".split(), *more]


def make_prepared_corpus(folder, train_clips, seconds=None, silent=False):
    """A corpus as --prepare_only leaves it: clips of AfriSpeech-200's lengths, or of `seconds` each, with speech, or
    `silent` ones of 100 archives, whose audio takes no room."""
    generator, numbers = np.random.default_rng(0), itertools.count()
    words, accents = generator.choice(WORDS, 100_000), [f"accent{index}" for index in range(100 if silent else 1)]
    for split, accent in [("train", accent) for accent in accents] + [("dev", "accent0"), ("test", "accent0")]:
        rows, archive = [], folder / "corpus/audio" / accent / split / f"{split}_{accent}_0.tar.gz"
        for number in itertools.islice(numbers, train_clips // len(accents) if split == "train" else 8):
            length = seconds or float(np.clip(generator.lognormal(np.log(8.4), 0.7), 1, 30))
            start = generator.integers(90_000)
            text = " ".join(words[start : start + round(2.2 * length)])
            rows.append([f"session-{number:08d}/{number:032x}.wav", text, f"{length:.3f}", accent])
        write_transcripts(folder / "corpus/transcripts" / accent / f"{split}.csv", rows)
        archive.parent.mkdir(parents=True)
        archive.touch()
    settings, features = script.parse_settings(corpus_flags(folder)), script.clip_features()
    samples = None if silent else speech()
    source = script.Source(settings.dataset, settings, script.SPLITS)
    for shard in source.shards:
        table = source.rows[source.rows["part"] == shard.part].drop(columns="part")
        audio = [sound(np.zeros(1600))] * len(table)
        for place, count in enumerate(() if silent else table["num_samples"]):
            start = generator.integers(len(samples) - count)
            audio[place] = sound(samples[start : start + count])
        shard.path.parent.mkdir(parents=True, exist_ok=True)
        rows = pyarrow.Table.from_pandas(table.assign(audio=audio), features.arrow_schema, preserve_index=False)
        with ArrowWriter(path=str(shard.path), features=features) as writer:
            writer.write_table(rows, 50)  # in batches of so many rows, as the program writes it
            writer.finalize()


def usual_collator(processor):
    """The collator of the usual CTC notebooks: cached features and labels, each padded by its own class."""

    def collate(rows):
        inputs = [{"input_features": row["input_features"]} for row in rows]
        batch = processor.feature_extractor.pad(inputs, return_attention_mask=True, return_tensors="pt")
        labels = processor.tokenizer.pad([{"input_ids": row["labels"]} for row in rows], return_tensors="pt")
        return {**batch, "labels": labels["input_ids"].masked_fill(labels["attention_mask"].ne(1), -100)}

    return collate


def cached_features(audio, processor, folder, samples=lambda row: script.decode_audio(row["audio"])):
    """What the usual way trains on: log-mels and labels that datasets.map has cached."""

    def features(row):
        inputs = processor.feature_extractor([samples(row)], sampling_rate=RATE)
        return {"input_features": inputs.input_features[0], "labels": processor.tokenizer(row["text"]).input_ids}

    return audio.map(features, remove_columns=audio.column_names, cache_file_name=str(folder / "features.arrow"))


def usual_trainer(folder, run, clips, steps=1, extra=()):
    def rates(prediction):
        labels = np.where(prediction.label_ids == -100, run.processor.tokenizer.pad_token_id, prediction.label_ids)
        texts, references = map(run.processor.tokenizer.batch_decode, (prediction.predictions.argmax(-1), labels))
        return {"wer": jiwer.wer(references, texts), "cer": jiwer.cer(references, texts)}

    sizes = dict(per_device_train_batch_size=8, per_device_eval_batch_size=8, gradient_accumulation_steps=4)
    quiet = dict(report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1, remove_unused_columns=False)
    training = TrainingArguments(output_dir=str(folder / "usual"), max_steps=steps, **sizes, **quiet, **dict(extra))
    data = dict(data_collator=usual_collator(run.processor), train_dataset=clips, eval_dataset=clips)
    return Trainer(model=run.decoder.model, args=training, compute_metrics=rates, **data)


def paired(repeats, *calls):
    """The median seconds of each of `calls`, made in turn. Each is called twice and the second time counts: after
    another's large arrays the first finds its memory given back to the system, and pays for every page anew."""
    times = [[] for _ in calls]
    for call, taken in itertools.chain.from_iterable(zip(calls, times) for _ in range(repeats + 1)):
        call()
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return [statistics.median(taken[1:]) for taken in times]


def data_path(folder):
    """From finished file to padded batch, clips of 10 s, on one core."""
    torch.set_num_threads(1)
    make_prepared_corpus(folder, 32, seconds=10.0)
    run, indices = opened(corpus_flags(folder)), list(range(8))
    clips, extractor = run.clips["train"].audio, run.decoder.extractor
    usual, collate = cached_features(clips, run.processor, folder), usual_collator(run.processor)
    collator, audio = script.CTCCollator(extractor, run.encoder), [clip["audio"] for clip in clips.select(indices)]
    calls = (
        lambda: script.model_inputs(collator(clips.__getitems__(indices)), extractor, "cpu"),
        lambda: collate(usual.__getitems__(indices)),
        lambda: list(map(script.decode_audio, audio)),
        lambda: extractor(list(map(script.decode_audio, audio)), sampling_rate=RATE, return_attention_mask=True),
        lambda: collator(clips.__getitems__(indices)),
    )
    assert calls[0]()["input_features"].shape == calls[1]()["input_features"].shape
    times = (1e3 * seconds / 8 for seconds in paired(20, *calls))
    ours, theirs, decoding, extracting, for_a_gpu = times
    return [
        ("finished file to padded batch, ms a clip of 10 s", ours, theirs, theirs / ours),
        ("  on a core whose GPU makes the log-mels", for_a_gpu, theirs, theirs / for_a_gpu),
        ("  of it FLAC to samples", decoding),
        ("  with LasrFeatureExtractor instead of the script's log-mels", extracting),
    ]


def evaluation(folder):
    """The dev scores of clips of the corpus's lengths: the script's, and Trainer.evaluate with gathered logits."""
    make_prepared_corpus(folder, 256)
    run = opened(corpus_flags(folder, "--early_stopping_patience", 0))
    clips = run.clips["train"]
    trainer = script.make_trainer(run.settings, run.decoder, run.encoder, clips.audio, clips)
    usual = usual_trainer(folder, run, cached_features(clips.audio.shuffle(seed=0), run.processor, folder))
    ours, theirs = paired(5, trainer.evaluate, usual.evaluate)
    audio = clips.table["num_samples"].sum() / RATE
    return [("evaluation, audio seconds a second", audio / ours, audio / theirs, theirs / ours)]


def start(folder):
    """From the command to one update with many prepared clips, beyond what 100 clips take; padding of an epoch."""
    flags = "--max_steps 1 --eval_strategy no --save_strategy no --load_best_model_at_end false".split()
    counts, found, rows = [100, 58_000, 400_000, 1_000_000], {}, []
    for count in counts:
        make_prepared_corpus(folder / str(count), count, silent=True)
    for count in counts * 3:
        found.setdefault(count, []).append(measured(*PROGRAM, *corpus_flags(folder / str(count), *flags)))
    few, *many = (min(found[count], key=lambda run: run["wall"]) for count in counts)
    for count, best in zip(counts[1:], many):
        rows.append((f"start with {count:,} clips beyond that with 100, s", best["wall"] - few["wall"]))
        rows.append(("  of it on the CPU, s", best["cpu"] - few["cpu"]))
        rows.append(("  memory beyond it, MB", (best["memory"] - few["memory"]) / 1e6))
    run = opened(corpus_flags(folder / "58000", *flags))
    train = run.clips["train"]
    trainer = script.make_trainer(run.settings, run.decoder, run.encoder, train.audio, run.clips["dev"])
    lengths, epoch = np.array(train.audio["num_samples"][:]), list(trainer._get_train_sampler())
    for size in (8, 32):
        padded = []
        for order in (epoch, np.random.default_rng(0).permutation(len(lengths))):
            batches = [lengths[order[first : first + size]] for first in range(0, len(lengths), size)]
            padded.append(100 * (1 - lengths.sum() / sum(len(batch) * batch.max() for batch in batches)))
        rows.append((f"padding in batches of {size}, % (random order beside it)", *padded, padded[1] / padded[0]))
    return rows


def long_audio(folder):
    """--transcribe of 1, 10 and 60 minutes."""
    samples, found = speech(), {}
    for minutes in (1, 10, 60):
        path = folder / f"{minutes}.flac"
        with soundfile.SoundFile(path, "w", RATE, 1, format="FLAC") as file:
            for _ in range(minutes):
                file.write(np.resize(samples, 60 * RATE))
        flags = ["--transcribe", path, "--model", MODEL, "--use_cpu", "true", "--output_dir", folder / "out"]
        found[minutes] = measured(*PROGRAM, *flags)
    rows = [(f"{minutes} min of audio to text, s", one["wall"]) for minutes, one in found.items()]
    return rows + [(f"  memory at {minutes} min, MB", one["memory"] / 1e6) for minutes, one in found.items()]


def train_usual(run, folder, updates):
    """Audio seconds a second of the usual recipe: cached features, random batches of 8 x 4, bf16 on a GPU."""
    precision = {"bf16": True} if torch.cuda.is_available() else {"use_cpu": True}
    clips = cached_features(run.clips["train"].audio, run.processor, folder)
    trainer = usual_trainer(folder, run, clips, updates, {**precision, "dataloader_num_workers": 2})
    trainer.model_accepts_loss_kwargs = False
    heard, step = [], trainer.training_step

    def timed(model, inputs, *rest):
        heard.append((time.monotonic(), inputs["attention_mask"].sum().item() * 160 / RATE))
        return step(model, inputs, *rest)

    trainer.training_step = timed
    trainer.train()
    warm = len(heard) // 3
    return sum(seconds for _, seconds in heard[warm:-1]) / (heard[-1][0] - heard[warm][0])


def training(folder):
    """Audio seconds a second in training: the small model on a CPU, MedASR's configuration on a GPU."""
    has_gpu = torch.cuda.is_available()
    updates = 30 if has_gpu else 8
    make_prepared_corpus(folder, 1500 if has_gpu else 128)
    flags = corpus_flags(folder, "--no_spec_augment")
    if has_gpu:
        full_size_model(folder / "model", layers=17)
        flags += ["--model", str(folder / "model")]
    run = f"--max_steps {updates} --save_steps {updates} --logging_steps 1 --eval_strategy no --max_test_samples 1"
    run = [*PROGRAM, *flags, *run.split(), "--load_best_model_at_end", "false"]
    subprocess.run(run, check=True, capture_output=True)
    log, names = logged(folder / "out")[updates // 3 :], ("audio_seconds_per_second", "data_wait_percent")
    ours, wait = (statistics.median(entry[name] for entry in log) for name in names)
    usual, where = train_usual(opened(flags), folder, updates), "MedASR's size, GPU" if has_gpu else "small model, CPU"
    rows = [(f"training, {where}, audio s a second", ours, usual, ours / usual)]
    return [*rows, ("  share of time waiting for data, %", wait)]


SPEED = data_path, evaluation, start, long_audio, training


def benchmark_speed(options):
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'':<60}{'this script':>12}{'usual way':>12}{'ratio':>8}")
    for part in SPEED:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            rows = part(Path(folder))
        for label, *figures in rows:
            print(f"{label:<60}", *(f"{figure:>{width},.1f}" for figure, width in zip(figures, (11, 11, 7))))
    return 0


COMMANDS = dict(gpu=benchmark_gpu, prepare=benchmark_prepare, speed=benchmark_speed)
COMMANDS["usual"] = prepare_the_usual_way  # which "prepare" runs itself


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("folders", nargs="*", type=Path, help="of 'usual': the corpus, and where to write")
    options = parser.parse_args()
    return COMMANDS[options.command](options)


if __name__ == "__main__":
    sys.exit(main())
