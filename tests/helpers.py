"""The script in the test's own process: its command line, small random models, sounds, clips and trainers."""

import contextlib
import csv
import functools
import io
import json
import subprocess

import numpy as np
import soundfile
from conftest import CORPUS, MODEL, read_csv

import finetune_medasr as script

RATE = 16_000


def run_main(cwd, *arguments):
    """What the program ended with and printed, as of a process, in this process and on the CPU."""
    arguments, out, errors = [*map(str, arguments), "--use_cpu", "true"], io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = script.main(arguments)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), errors.getvalue())


@functools.cache
def small_processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(MODEL)


def random_model(**encoder_config):
    """A LASR of the small model's shape with the same random weights each time, in eval mode; no dropout unless asked
    for.
    """
    import torch
    from transformers import AutoConfig, LasrForCTC

    config = AutoConfig.from_pretrained(MODEL)
    settings = dict.fromkeys(("dropout", "activation_dropout", "attention_dropout", "layerdrop"), 0.0)
    for name, value in {**settings, "num_hidden_layers": 2, **encoder_config}.items():
        setattr(config.encoder_config, name, value)
    torch.manual_seed(0)
    model = LasrForCTC(config).eval()
    with torch.no_grad():
        # Far apart logits, so that the texts of two computations differ only if something is wrong.
        model.ctc_head.weight *= 20
    return model


def label_encoder(target_text="as_written"):
    from transformers import AutoConfig

    return script.LabelEncoder(small_processor().tokenizer, AutoConfig.from_pretrained(MODEL).vocab_size, target_text)


def inputs_of(rows, **options):
    """What CTCCollator(..., **options) makes of rows, as the model's inputs on the CPU."""
    extractor = small_processor().feature_extractor
    return script.model_inputs(script.CTCCollator(extractor, **options)(rows), extractor, "cpu")


def noise(seconds, seed=0):
    """Noise whose colour changes all the time: a model hears something else in each frame."""
    samples = np.random.default_rng(seed).normal(size=round(seconds * RATE)).astype(np.float32)
    time = np.arange(len(samples)) / RATE
    tone = np.sin(2 * np.pi * (400 + 300 * np.sin(5 * time)) * time)
    return (0.05 * samples * np.sin(2 * np.pi * 3 * time) + 0.15 * tone).astype(np.float32)


def frames_of(ids):
    """The script's Emissions of a model that is sure of the id of each frame."""
    return script.Emissions(np.reshape(ids, (-1, 1)).astype(np.int32), np.zeros((len(ids), 1), np.float32))


def sound(samples, rate=RATE, **options):
    """An encoded recording: a WAV file of 16 bits unless asked otherwise."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **{"format": "WAV", "subtype": "PCM_16", **options})
    return buffer.getvalue()


def tone(seconds=3.0, rate=RATE):
    return 0.1 * np.sin(np.arange(round(seconds * rate)) * 2 * np.pi * 440 / rate)


GOOD, TEXT = sound(tone()), "The patient has a fever."


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_table(path, rows):
    """Write rows as JSON lines or CSV, by the ending of the name."""
    text = io.StringIO()
    if path.suffix == ".jsonl":
        text.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    write(path, text.getvalue())


def skipped(output_dir):
    """[(split, clip, reason)] of a run's skipped_clips.csv."""
    rows = read_csv(output_dir / "results/skipped_clips.csv")
    return [(row["split"], row["clip"], row["reason"]) for row in rows]


def make_clips(split, *texts_and_samples):
    """The script's Clips of (text, samples) pairs, in its order: the longest first."""
    import pandas
    from datasets import Dataset

    groups = {"accent": "igbo", "country": "NG", "domain": "clinical", "gender": "", "age_group": ""}
    rows = [
        {"audio": sound(samples, subtype="FLOAT"), "clip": f"session/{split}-{number}", "text": text, "problem": "",
         "num_samples": len(samples), "speaker": f"speaker-{number}", "split": split, **groups}
        for number, (text, samples) in enumerate(texts_and_samples)
    ]  # fmt: skip
    rows.sort(key=lambda row: -row["num_samples"])
    return script.Clips(Dataset.from_list(rows), pandas.DataFrame(rows).drop(columns="audio"))


def make_decoder(output_dir, *flags, model=None):
    """The script's Decoder on the CPU, without evaluation, checkpoints, TensorBoard."""
    paths = ["--model", MODEL, "--dataset", CORPUS, "--output_dir", output_dir, "--data_dir", f"{output_dir}/audio"]
    quiet = """--use_cpu true --dataloader_num_workers 0 --dataloader_pin_memory false --report_to none --disable_tqdm
        true --eval_strategy no --save_strategy no --load_best_model_at_end false""".split()
    settings = script.parse_settings([*map(str, [*paths, *quiet, *flags])])
    return script.Decoder(model or random_model(), small_processor(), settings)


def trainer_of(decoder, clips, half=False, **options):
    """The script's trainer on (train, dev) clips; with `half` in float16, under the CPU's autocast and scaler."""
    import torch

    settings, (train, dev) = decoder.settings, clips
    if half:
        settings.fp16, settings.mixed_precision = True, "fp16"  # which parsing refuses without a GPU
    trainer = script.make_trainer(settings, decoder, label_encoder(), train.audio, dev, **options)
    if half:
        # accelerate offers neither on a CPU, and uses both when they are there.
        trainer.accelerator.native_amp, trainer.accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=256)
    return trainer


def make_trainer(output_dir, clips, *flags, model=None, half=False, **options):
    return trainer_of(make_decoder(output_dir, *flags, model=model), clips, half, **options)
