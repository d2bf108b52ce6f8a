#!/usr/bin/env python3
"""Measurements behind the figures of tests/README.md, each one command.

python tests/benchmark.py gpu       # float16 and bfloat16 at MedASR's size and activation range, 50 updates each
python tests/benchmark.py prepare   # converting an archive of 300 MB, and the usual way: unpack, then datasets.map
python tests/benchmark.py speed     # data path, evaluation, start, long audio, training"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path
from types import SimpleNamespace

import jiwer
import librosa
import numpy as np
import soundfile
import soxr
import torch
from conftest import CORPUS, HERE, MODEL, SCRIPT, corpus_audio
from datasets import Dataset
from helpers import RATE, read_csv, script, sound, tar, write, write_table
from small_model import inputs_of, label_encoder, make_trainer, processor
from transformers import LasrCTCConfig, LasrForCTC, Trainer, TrainingArguments

SUBSAMPLER_PEAK = 1.1e5  # what the released checkpoint's subsampler reaches; float16 ends at 65,504


def opened(flags):
    """What a run has before it trains."""
    settings = script.parse_settings([*map(str, flags), "--disable_tqdm", "true"])
    (processor, model), source = script.load_model(settings), script.Source(settings.dataset, settings, script.SPLITS)
    script.prepare(source, script.SPLITS, settings)
    clips = script.select_all({"": source}, settings, lambda table: table["problem"])
    return SimpleNamespace(settings=settings, clips=clips, decoder=script.Decoder(model, processor, settings))


def full_size_model(folder, layers):
    """A LasrForCTC in MedASR's configuration with random weights and its activation range, saved with a processor."""
    torch.manual_seed(0)
    model = LasrForCTC(LasrCTCConfig(encoder_config={"model_type": "lasr_encoder", "num_hidden_layers": layers})).eval()
    subsampler, samples = model.encoder.subsampler, 0.1 * torch.randn(1, 4 * RATE)
    features = script.log_mels(samples, torch.tensor([4 * RATE]), processor().feature_extractor)[0]
    with torch.no_grad():
        scale = (SUBSAMPLER_PEAK / subsampler(features).abs().max()) ** 0.5
        for values in (*subsampler.conv_0.parameters(), *subsampler.conv_1.parameters()):
            values.mul_(scale)  # ReLU passes a positive scale through
        reached = float(subsampler(features).abs().max())
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    size = sum(weight.numel() for weight in model.parameters()) / 1e6
    print(f"model: MedASR's configuration, {layers} layers, {size:.2f} M parameters, subsampler up to {reached:.3g}")


def logged(output):
    """The entries with a training loss in the Trainer's log of the only checkpoint in a folder."""
    state = json.loads(next(output.glob("checkpoint-*/trainer_state.json")).read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def train_on_cpu(flags):
    """The log of the program's trainer in float16, which it leaves to GPUs."""
    run = opened([*flags, *"--max_eval_samples 4 --report_to none --dataloader_num_workers 0".split()])
    model, train = run.decoder.model, run.clips["train"]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        batch = inputs_of([train.audio[0], train.audio[1]], encoder=label_encoder())
        print(f"plain float16: loss {float(model.train()(**batch).loss)} at the first update")
    model.load_state_dict(weights)  # the forward pass has moved its BatchNorms
    trainer = make_trainer(run.decoder, (train, run.clips["dev"]), half=True)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def is_good(name, log):
    """Whether the losses of a log are finite and fall, which is printed."""
    losses, skipped = [entry["loss"] for entry in log], log[-1].get("skipped_updates", 0)
    first, last = statistics.mean(losses[:5]), statistics.mean(losses[-5:])
    good = np.isfinite(losses).all() and last < first
    speed = statistics.median(entry["audio_seconds_per_second"] for entry in log)
    change = f"{len(losses)} updates, {skipped} of them skipped, loss {first:.2f} -> {last:.2f}"
    print(f"{name}: {change}, {'finite and falling' if good else 'FAILED'}, {speed:.0f} audio s/s (median)", flush=True)
    return good


def benchmark_gpu(folder):
    """Runs of the program on a CUDA GPU: prints a table of what they have shown, returns whether all is well."""
    # float16 is emulated on a CPU and takes minutes an update at full depth; what overflows is in the first layers.
    gpus, shown = torch.cuda.device_count(), {}
    full_size_model(folder / "model", layers=17 if gpus else 2)
    flags = f"""--model {folder}/model --dataset {CORPUS} --data_dir {folder}/audio --max_steps 50 --warmup_steps 5
        --logging_steps 1 --eval_steps 50 --save_steps 50 --save_total_limit 1 --learning_rate 3e-4 --skip_baseline
        --max_test_samples 8 --output_dir""".split()
    eight = ["--per_device_train_batch_size", 8 if gpus else 2, "--gradient_accumulation_steps", 1]
    if not gpus:
        print("no CUDA GPU: the same trainer under float16 autocast on the CPU")
        return is_good("guarded float16", train_on_cpu([*flags, folder / "out", *eight]))
    print(gpus, "x", torch.cuda.get_device_name(), torch.__version__)

    def run(output, *more, count=1, **env):
        launcher = f"-m torch.distributed.run --standalone --nproc_per_node {count}".split() if count > 1 else []
        command = map(str, [sys.executable, *launcher, SCRIPT, *flags, folder / output, *more])
        done = subprocess.run(command, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True)
        print(done.stdout, file=sys.stderr)
        return done.returncode == 0, done.stdout

    def trained(output, *more, says="computing on", **options):
        done, said = run(output, *more, **options)
        where = re.search("computing on (.*)", said)
        return done and says in said and is_good(f"{output} on {where[1]}", logged(folder / output))

    shown["float16, with its guards and scaler"] = trained("float16", *eight)
    shown["bfloat16"] = trained("bfloat16", *eight, "--bf16")
    shown["going on from a checkpoint"] = trained("float16", *eight, "--max_steps", 60, says="going on from")
    sizes, a_step = {}, re.compile(r"(\d+) a step x")
    for memory in (1.0, 0.15):  # shares of the card's
        limits = {"PYTORCH_ALLOC_CONF": f"per_process_memory_fraction:{memory}"}
        done, said = run(f"auto-{memory}", "--max_steps", 3, "--eval_steps", 3, "--save_steps", 3, **limits)
        sizes[memory] = done and int(a_step.search(said)[1])
    shown[f"clips a step in all its memory and in 15 %: {sizes[1.0]} and {sizes[0.15]}"] = sizes[1.0] >= sizes[0.15] > 0
    scores = []
    for output, more in (("scored", []), ("scored-cpu", ["--use_cpu", "true"])):
        run(output, "--eval_only", "--model", MODEL, *more)
        scores.append(json.loads((folder / output / "results/metrics.json").read_text())["baseline"]["cer"])
    shown["scores of the small model: CER {:.4f}, on the CPU {:.4f}".format(*scores)] = (
        abs(scores[0] - scores[1]) < 0.005
    )
    done, said = run("text", "--transcribe", next((HERE / "fixtures/us_english/test").glob("*.flac")), "--model", MODEL)
    shown[f"--transcribe: {said.strip()[:40]}"] = done and bool(said.strip())
    samples, extractor = 0.1 * torch.randn(2, 10 * RATE), processor().feature_extractor
    ours, theirs = (
        script.log_mels(samples.to(device), torch.tensor([10 * RATE] * 2, device=device), extractor)[0].cpu()
        for device in ("cuda", "cpu")
    )
    shown[f"log-mels within {float((ours - theirs).abs().max()):.1g} of the CPU's"] = torch.allclose(
        ours, theirs, atol=1e-3
    )
    if gpus > 1:
        shown["two GPUs"] = trained("two", *eight, count=2)
    for name, is_shown in {**shown, **({} if gpus > 1 else {"two GPUs": None})}.items():
        print(f"{name:<60}", {True: "shown", None: "not run"}.get(is_shown, "FAILED"))
    return all(shown.values())


def speech():
    """The fixture's clips as 16 kHz samples, one after the other."""
    clips = []
    for audio in itertools.chain.from_iterable(corpus_audio(split).values() for split in script.SPLITS):
        with contextlib.suppress(ValueError):
            clips.append(script.decode_audio(audio))
    return np.concatenate(clips)


def corpus_lengths(count):
    """Seconds of clips as AfriSpeech-200 has them."""
    return np.random.default_rng(0).lognormal(np.log(8.4), 0.7, count).clip(1, 30)


WORDS = "the patient has a fever and no cough give two hundred milligrams twice a day for seven days".split()


def write_part(folder, accent, split, lengths, encoded=None):
    """Transcripts of clips of so many seconds in AfriSpeech-200's form, and their archive, empty without `encoded`."""
    generator = np.random.default_rng(len(lengths))
    words, rows = generator.choice(WORDS, 100_000), []
    for number, length in enumerate(lengths):
        start, name = generator.integers(90_000), f"{accent}-{split}/{number:032x}.wav"
        text, speaker = " ".join(words[start : start + round(2.2 * length)]), f"speaker{number % 1466}"
        rows.append({"audio_paths": f"/AfriSpeech-100/{split}/{name}", "transcript": text, "duration": f"{length:.3f}",
                     "accent": accent, "domain": "clinical", "user_ids": speaker, "country": "NG"})  # fmt: skip
    write_table(folder / f"transcripts/{accent}/{split}.csv", rows)
    names = (row["audio_paths"].replace(f"/AfriSpeech-100/{split}", "data/data/intron") for row in rows)
    archive = tar(zip(names, encoded), compresslevel=6) if encoded else b""
    write(folder / f"audio/{accent}/{split}/{split}_{accent}_0.tar.gz", archive)


def make_corpus(folder, as_on_hub=False, **lengths):
    """A corpus of speech, the clips of each split of so many seconds, as FLAC or `as_on_hub`, 44.1 kHz stereo WAV."""
    generator, samples = np.random.default_rng(0), speech()

    def encoded(seconds):
        start = generator.integers(len(samples) - 30 * RATE)
        mono = samples[start : start + int(seconds * RATE)]
        if not as_on_hub:
            return sound(mono, format="FLAC")
        mono = soxr.resample(mono, RATE, 44_100)
        mono += generator.normal(scale=1e-3, size=len(mono))  # a room's noise, which gzip cannot remove
        return sound(np.stack([mono, 0.9 * mono], axis=1), 44_100)

    for split, seconds in lengths.items():
        write_part(folder / "corpus", "igbo", split, seconds, map(encoded, seconds))


def make_silent_corpus(folder, count):
    """A corpus of 100 archives as --prepare_only leaves it, whose audio takes no room."""
    lengths, corpus, silence = corpus_lengths(count), folder / "corpus", sound(np.zeros(1600), format="FLAC")
    for number in range(100):
        write_part(corpus, f"accent{number}", "train", lengths[number::100])
    for split in ("dev", "test"):
        write_part(corpus, "accent0", split, lengths[:8])
    settings = script.parse_settings(corpus_flags(folder))
    source = script.Source(settings.dataset, settings, script.SPLITS)
    source.keep = True
    for shard in source.shards:
        table = source.rows.loc[source.rows["part"] == shard.part, [*script.CLIP_COLUMNS, "num_samples"]]
        clips = table.assign(audio=silence).to_dict("records")
        source.clips = lambda shard, clips=clips: clips
        script.prepare_shard(source, shard)


def prepare_the_usual_way(corpus, out):
    """Unpack the archive, then `datasets.map` with librosa into cached features."""
    shutil.unpack_archive(next(corpus.glob("audio/*/*/*.tar.gz")), out / "wav", filter="data")
    rows = read_csv(next(corpus.glob("transcripts/*/*.csv")))

    def samples(row):
        name = row["audio_paths"].removeprefix("/AfriSpeech-100/train/")
        return librosa.load(out / "wav/data/data/intron" / name, sr=RATE)[0]

    cached_features(Dataset.from_list(rows).rename_column("transcript", "text"), out, samples)


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
    """{"wall" and "cpu" in seconds, "memory" in bytes at the peak} of a Python command."""
    memory, began = 0, time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, *map(str, command)]
        process = subprocess.Popen(command, cwd=HERE, stdout=log, stderr=log, start_new_session=True)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            memory = max(memory, memory_of_group(process.pid))
            time.sleep(0.1)
        log.seek(0)
        if ended[1]:
            sys.exit(log.read())
    return {"wall": time.monotonic() - began, "cpu": ended[2].ru_utime + ended[2].ru_stime, "memory": memory}


def preparation(folder):
    """Converting an archive as the Hub has them, of 300 MB, in a single process; beside it the usual way, which caches
    log-mels: this script computes them when it makes a batch."""
    lengths, figures = np.random.default_rng(0).uniform(10, 20, 158), []
    make_corpus(folder / "one", as_on_hub=True, train=lengths[:1])  # what starting the program costs
    make_corpus(folder / "full", as_on_hub=True, train=lengths)
    for way, name in itertools.product(("ours", "usual"), ("one", "full")):
        corpus, out = folder / name / "corpus", folder / f"{way}-{name}"
        out.mkdir()
        ours = [SCRIPT, *"--prepare_only --num_proc 1 --dataset".split(), corpus, "--data_dir", out]
        usual = ["-c", f"import benchmark as b; b.prepare_the_usual_way(b.Path('{corpus}'), b.Path('{out}'))"]
        taken = measured(*(usual if way == "usual" else [*ours, "--output_dir", folder / "output"]))
        figures.append(taken | {"kept": sum(path.stat().st_size for path in out.rglob("*") if path.is_file())})
    one, ours, one_usual, usual = figures
    for full, alone in ((ours, one), (usual, one_usual)):
        full["cost"] = (full["cpu"] - alone["cpu"]) / (len(lengths) - 1)
    scales = {"cost": ("ms a clip on one core", 1e3), "memory": ("memory at the peak, MB", 1e-6)}
    scales["kept"] = "disk that stays, MB an hour", 3600e-6 / lengths.sum()
    return [
        (label, scale * ours[name], scale * usual[name], usual[name] / ours[name])
        for name, (label, scale) in scales.items()
    ]


def corpus_flags(folder, *more):
    flags = f"--model {MODEL} --dataset {folder}/corpus --data_dir {folder}/audio_16khz --output_dir {folder}/out"
    return [*f"{flags} --overwrite_output_dir --skip_baseline --report_to none".split(), *more]


def usual_collator(rows):
    """A batch of the usual CTC notebooks: cached features and labels, each padded by its own class."""
    inputs, labels = ([{name: row[name]} for row in rows] for name in ("input_features", "labels"))
    batch = processor().feature_extractor.pad(inputs, return_attention_mask=True, return_tensors="pt")
    labels = [{"input_ids": row["labels"]} for row in labels]
    labels = processor().tokenizer.pad(labels, return_tensors="pt")
    return {**batch, "labels": labels["input_ids"].masked_fill(labels["attention_mask"].ne(1), -100)}


def cached_features(audio, folder, samples=lambda row: script.decode_audio(row["audio"])):
    """What the usual way trains on: log-mels and labels that datasets.map has cached."""

    def features(row):
        inputs = processor().feature_extractor([samples(row)], sampling_rate=RATE)
        return {"input_features": inputs.input_features[0], "labels": processor().tokenizer(row["text"]).input_ids}

    return audio.map(features, remove_columns=audio.column_names, cache_file_name=str(folder / "features.arrow"))


def usual_trainer(folder, model, audio, **extra):
    """The usual recipe: cached features, random batches of 8 x 4."""

    def rates(prediction):
        labels = np.where(prediction.label_ids == -100, processor().tokenizer.pad_token_id, prediction.label_ids)
        texts, references = map(processor().tokenizer.batch_decode, (prediction.predictions.argmax(-1), labels))
        return {"wer": jiwer.wer(references, texts), "cer": jiwer.cer(references, texts)}

    sizes = dict(per_device_train_batch_size=8, per_device_eval_batch_size=8, gradient_accumulation_steps=4)
    quiet = dict(report_to="none", save_strategy="no", disable_tqdm=True, remove_unused_columns=False)
    training = TrainingArguments(output_dir=str(folder / "usual"), **sizes, **quiet, **extra)
    clips = cached_features(audio, folder)
    data = dict(data_collator=usual_collator, train_dataset=clips, eval_dataset=clips)
    return Trainer(model=model, args=training, compute_metrics=rates, **data)


def paired(repeats, *calls):
    """The median seconds of each of `calls`, made in turn. Each is called twice and the second time counts: after
    another's large arrays the first finds its memory given back to the system, and pays for every page anew."""
    times = [[] for _ in calls]
    for call, taken in [*zip(calls, times)] * (repeats + 1):
        call()
        taken.append(timeit.timeit(call, number=1))
    return [statistics.median(taken[1:]) for taken in times]


def data_path(folder):
    """From finished file to padded batch, clips of 10 s, on one core."""
    torch.set_num_threads(1)
    make_corpus(folder, train=[10.0] * 32, dev=[10.0], test=[10.0])
    run, indices = opened(corpus_flags(folder)), list(range(8))
    clips, extractor = run.clips["train"].audio, run.decoder.extractor
    usual, collator = cached_features(clips, folder), script.CTCCollator(extractor, label_encoder())
    audio = [clip["audio"] for clip in clips.select(indices)]
    calls = (
        lambda: script.model_inputs(collator(clips.__getitems__(indices)), extractor, "cpu"),
        lambda: usual_collator(usual.__getitems__(indices)),
        lambda: list(map(script.decode_audio, audio)),
        lambda: extractor(list(map(script.decode_audio, audio)), sampling_rate=RATE, return_attention_mask=True),
        lambda: collator(clips.__getitems__(indices)),
    )
    assert calls[0]()["input_features"].shape == calls[1]()["input_features"].shape
    ours, theirs, decoding, extracting, for_a_gpu = (1e3 * seconds / 8 for seconds in paired(20, *calls))
    return [
        ("finished file to padded batch, ms a clip of 10 s", ours, theirs, theirs / ours),
        ("  on a core whose GPU makes the log-mels", for_a_gpu, theirs, theirs / for_a_gpu),
        ("  of it FLAC to samples", decoding),
        ("  with LasrFeatureExtractor instead of the script's log-mels", extracting),
    ]


def evaluation(folder):
    """The dev scores of clips of the corpus's lengths: the script's, and Trainer.evaluate with gathered logits."""
    make_corpus(folder, train=[5.0], dev=corpus_lengths(256), test=[5.0])
    run = opened(corpus_flags(folder, "--early_stopping_patience", 0))
    clips = run.clips["dev"]
    trainer = make_trainer(run.decoder, (run.clips["train"], clips))
    usual = usual_trainer(folder, run.decoder.model, clips.audio.shuffle(seed=0))
    ours, theirs = paired(5, trainer.evaluate, usual.evaluate)
    audio = clips.table["num_samples"].sum() / RATE
    return [("evaluation, audio seconds a second", audio / ours, audio / theirs, theirs / ours)]


def start(folder):
    """From the command to one update with many prepared clips, beyond what 100 clips take; padding of an epoch."""
    flags = "--max_steps 1 --eval_strategy no --save_strategy no --load_best_model_at_end false".split()
    counts, found, rows = [100, 58_000, 400_000], {}, []
    for count in counts:
        make_silent_corpus(folder / str(count), count)
    for count in counts * 3:
        found.setdefault(count, []).append(measured(SCRIPT, *corpus_flags(folder / str(count), *flags)))
    few, *many = (min(found[count], key=lambda run: run["wall"]) for count in counts)
    for count, best in zip(counts[1:], many):
        rows.append((f"start with {count:,} clips beyond that with 100, s", best["wall"] - few["wall"]))
        rows.append(("  of it on the CPU, s", best["cpu"] - few["cpu"]))
        rows.append(("  memory beyond it, MB", (best["memory"] - few["memory"]) / 1e6))
    run = opened(corpus_flags(folder / "58000", *flags))
    trainer = make_trainer(run.decoder, (run.clips["train"], run.clips["dev"]))
    lengths, epoch = np.array(run.clips["train"].audio["num_samples"][:]), list(trainer._get_train_sampler())
    for size in (8, 32):
        padded = []
        for order in (epoch, np.random.default_rng(0).permutation(len(lengths))):
            batches = [lengths[order[first : first + size]] for first in range(0, len(lengths), size)]
            padded.append(100 * (1 - lengths.sum() / sum(len(batch) * batch.max() for batch in batches)))
        rows.append((f"padding in batches of {size}, % (random order beside it)", *padded, padded[1] / padded[0]))
    return rows


def long_audio(folder):
    """--transcribe of 1, 10 and 60 minutes."""
    samples, rows = speech(), []
    for minutes in (1, 10, 60):
        path = folder / f"{minutes}.flac"
        soundfile.write(path, np.resize(samples, minutes * 60 * RATE), RATE)
        flags = ["--transcribe", path, "--model", MODEL, "--use_cpu", "true", "--output_dir", folder / "out"]
        taken = measured(SCRIPT, *flags)
        rows.append((f"{minutes} min of audio to text, s", taken["wall"]))
        rows.append((f"  memory at {minutes} min, MB", taken["memory"] / 1e6))
    return rows


def training(folder):
    """Audio seconds a second in training: the small model on a CPU, MedASR's configuration on a GPU."""
    has_gpu = torch.cuda.is_available()
    updates, lengths = (30, corpus_lengths(1500)) if has_gpu else (8, corpus_lengths(128))
    make_corpus(folder, train=lengths, dev=lengths[:8], test=lengths[:8])
    flags = corpus_flags(folder, "--no_spec_augment")
    if has_gpu:
        full_size_model(folder / "model", layers=17)
        flags += ["--model", str(folder / "model")]
    run = f"--max_steps {updates} --save_steps {updates} --logging_steps 1 --eval_strategy no --max_test_samples 1"
    run = [sys.executable, SCRIPT, *flags, *run.split(), "--load_best_model_at_end", "false"]
    subprocess.run(run, check=True, capture_output=True)
    log, names = logged(folder / "out")[updates // 3 :], ("audio_seconds_per_second", "data_wait_percent")
    ours, wait = (statistics.median(entry[name] for entry in log) for name in names)

    run, precision = opened(flags), {"bf16": True} if has_gpu else {"use_cpu": True}
    audio = run.clips["train"].audio
    usual = usual_trainer(folder, run.decoder.model, audio, max_steps=updates, dataloader_num_workers=2, **precision)
    usual.model_accepts_loss_kwargs = False
    usual.train()  # the first time is for warming up
    theirs = usual.train().metrics["train_samples_per_second"] * np.mean(audio["num_samples"]) / RATE
    where = "MedASR's size, GPU" if has_gpu else "small model, CPU"
    rows = [(f"training, {where}, audio s a second", ours, theirs, ours / theirs)]
    return [*rows, ("  share of time waiting for data, %", wait)]


def print_table(*parts):
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'':<60}{'this script':>12}{'usual way':>12}{'ratio':>8}")
    for part in parts:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            rows = part(Path(folder))
        for label, *figures in rows:
            print(f"{label:<60}", *(f"{figure:>{width},.1f}" for figure, width in zip(figures, (11, 11, 7))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("gpu", "prepare", "speed"))
    command = parser.parse_args().command
    if command == "gpu":
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(not benchmark_gpu(Path(folder)))
    print_table(*([preparation] if command == "prepare" else [data_path, evaluation, start, long_audio, training]))
