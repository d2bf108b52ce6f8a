"""What several test files need: the small processor, small random models of its class, sounds, and the script's own
arguments.
"""

import contextlib
import functools
import io
from pathlib import Path

import numpy as np
import soundfile

import finetune_medasr as script

FIXTURES = Path(__file__).resolve().parent / "fixtures"
MODEL = FIXTURES / "model"
CORPUS = FIXTURES / "corpus"
RATE = 16_000


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


def noise(seconds, seed=0):
    """Noise whose colour changes all the time: a model hears something else in each frame."""
    samples = np.random.default_rng(seed).normal(size=round(seconds * RATE)).astype(np.float32)
    time = np.arange(len(samples)) / RATE
    return (
        0.1 * samples * np.sin(2 * np.pi * 3 * time) + 0.3 * np.sin(2 * np.pi * (400 + 300 * np.sin(5 * time)) * time)
    ).astype(np.float32) / 2


def frames_of(ids):
    """The script's Emissions of a model that is sure of the id of each frame."""
    return script.Emissions(np.reshape(ids, (-1, 1)).astype(np.int32), np.zeros((len(ids), 1), np.float32))


def wav_bytes(samples, rate=RATE):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def make_clips(texts_and_samples, split):
    """The script's Clips of (text, samples) pairs, in its order: the longest first."""
    import pandas
    from datasets import Dataset

    groups = {"accent": "igbo", "country": "NG", "domain": "clinical", "gender": "", "age_group": ""}
    rows = [
        {"audio": wav_bytes(samples), "clip": f"session/{split}-{number}", "text": text, "num_samples": len(samples),
         "speaker": f"speaker-{number}", **groups, "split": split, "problem": ""}
        for number, (text, samples) in enumerate(texts_and_samples)
    ]  # fmt: skip
    rows.sort(key=lambda row: -row["num_samples"])
    return script.Clips(Dataset.from_list(rows), pandas.DataFrame(rows).drop(columns="audio"))


def parse(output_dir, *flags):
    """The settings of a command line on the small model and the CPU, without evaluation, checkpoints, TensorBoard."""
    quiet = (
        "--use_cpu true --dataloader_num_workers 0 --dataloader_pin_memory false --report_to none --disable_tqdm true"
    )
    still = "--eval_strategy no --save_strategy no --load_best_model_at_end false"
    corpus = ["--model", MODEL, "--dataset", CORPUS, "--output_dir", output_dir, "--data_dir", f"{output_dir}/audio"]
    return script.parse_settings([str(word) for word in (*corpus, *quiet.split(), *still.split(), *flags)])


def run_main(cwd, *arguments):
    """(exit status, stdout, stderr) of the program in this process, in the folder `cwd`, on the CPU."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = script.main([*map(str, arguments), "--use_cpu", "true"])
    return status, out.getvalue(), errors.getvalue()
