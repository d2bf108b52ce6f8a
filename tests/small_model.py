"""Small random models of the script's class, and what it makes of them: batches, clips, decoders, trainers."""

import functools

import numpy as np
import pandas
import torch
from conftest import CORPUS, MODEL
from datasets import Dataset
from helpers import sound
from transformers import AutoConfig, AutoProcessor, LasrForCTC

import finetune_medasr as script


@functools.cache
def processor():
    return AutoProcessor.from_pretrained(MODEL)


def random_model(**encoder_config):
    """A LASR of the small model's shape with the same random weights each time, in eval mode, without dropout."""
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
    return script.LabelEncoder(processor().tokenizer, AutoConfig.from_pretrained(MODEL).vocab_size, target_text)


def inputs_of(rows, **options):
    """What CTCCollator(..., **options) makes of rows, as the model's inputs on the CPU."""
    extractor = processor().feature_extractor
    return script.model_inputs(script.CTCCollator(extractor, **options)(rows), extractor, "cpu")


def frames_of(ids):
    """The script's Emissions of a model that is sure of the id of each frame."""
    return script.Emissions(np.reshape(ids, (-1, 1)).astype(np.int32), np.zeros((len(ids), 1), np.float32))


def make_clips(split, *texts_and_samples):
    """The script's Clips of (text, samples) pairs, in its order: the longest first."""
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
    return script.Decoder(model or random_model(), processor(), settings)


def make_trainer(place, clips, *flags, model=None, half=False, **options):
    """The script's trainer on (train, dev) clips, with a Decoder or for a new one in an output folder; with `half` in
    float16, under the CPU's autocast and scaler."""
    decoder = place if isinstance(place, script.Decoder) else make_decoder(place, *flags, model=model)
    settings, (train, dev) = decoder.settings, clips
    if half:
        settings.fp16, settings.mixed_precision = True, "fp16"  # which parsing refuses without a GPU
    trainer = script.make_trainer(settings, decoder, label_encoder(), train.audio, dev, **options)
    if half:
        # accelerate offers neither on a CPU, and uses both when they are there.
        trainer.accelerator.native_amp, trainer.accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=256)
    return trainer
