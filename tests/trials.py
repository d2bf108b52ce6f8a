"""`python tests/benchmark.py trials`: known ways to a better adapted model, each beside the program's own way.

Every trial is the demo's run (small model, synthesised corpus, 120 updates) with one thing changed, on the same seeds.
It is scored on dev, on test clips of accents that it was trained on and of the one that it was not, and on US-English
voices, which the model was pre-trained on: what it forgets of them.
"""

import contextlib
import csv
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import finetune_medasr  # noqa: E402

US_ENGLISH = HERE / "fixtures" / "us_english"
SETS = {"dev": "dev", "seen": "seen accents", "unseen": "unseen accent", "us": "US English"}
AVERAGED = 3  # checkpoints
SPEEDS = (0.9, 1.0, 1.1)
# Checkpoints every 20 updates in all of them, for the averages; without early stopping all do the same work.
FLAGS = "--eval_steps 20 --save_steps 20 --save_total_limit 10 --early_stopping_patience 0 --report_to none --use_cpu"


@dataclass
class PerturbedSpeed(finetune_medasr.CTCCollator):
    """Plays each clip at one of SPEEDS, drawn from seed, epoch and clip; as it is where its labels would not fit."""

    check: object = None

    def __call__(self, rows):
        return super().__call__([{**row, "samples": self.played(row)} for row in rows])

    def played(self, row):
        import soxr

        samples = finetune_medasr.decode_audio(row["audio"])
        speed = np.random.default_rng((self.seed, self.epoch, crc32(row["clip"].encode()), 1)).choice(SPEEDS)
        played = soxr.resample(samples, finetune_medasr.SAMPLE_RATE * speed, finetune_medasr.SAMPLE_RATE)
        fits = not self.check([{**row, "num_samples": len(played)}])[0]
        return played.astype(np.float32) if fits else samples


def perturb_speed(job, trainer):
    collator = trainer.data_collator
    trainer.data_collator = PerturbedSpeed(**{**vars(collator), "check": job.check})


def freeze(layers):
    """A change that keeps the subsampler and so many of the lowest layers as they are (BatchNorm's statistics move)."""

    def change(job, trainer):
        encoder = trainer.model.encoder
        for module in (encoder.subsampler, *encoder.layers[:layers]):
            module.requires_grad_(False)

    return change


TRIALS = {
    "as it is": lambda job, trainer: None,
    "speed perturbed": perturb_speed,
    "subsampler frozen": freeze(0),
    "subsampler, 1 of 4 layers frozen": freeze(1),
    "subsampler, 2 of 4 layers frozen": freeze(2),
}
BASE = next(iter(TRIALS))


def us_english_clips(job):
    """The Selection of the US-English test clips."""
    from datasets import Dataset

    clips = []
    with (US_ENGLISH / "test" / "metadata.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            columns = {**row, "transcript": row["text"], "user_ids": row["speaker_id"]}
            audio = (US_ENGLISH / "test" / row["file_name"]).read_bytes()
            clip = finetune_medasr.clip_row(row["file_name"], "test", row["accent"], columns)
            clips.append(finetune_medasr.make_clip(clip, audio))
    clips = Dataset.from_list(clips, features=finetune_medasr.clip_features())
    return finetune_medasr.select_clips(clips, [], job.args, job.check, None, 0)


def scores(job, model):
    """{set: WER in %} of a model."""
    dev = finetune_medasr.DevSet(job.selections["dev"], job.processor, job.encoder, job.args)
    found = {"dev": dev.score(model, job.training)["wer"]}
    written = job.write_down(model, "finetuned")
    test, us_english = (scored["finetuned"].scores for scored in job.score_texts(written).values())
    found |= {name: test["groups"]["seen_accent"][name]["wer"] for name in ("seen", "unseen")}
    found["us"] = us_english["wer"]
    return {name: 100 * wer for name, wer in found.items()}


def average(job, trainer):
    """The mean of the checkpoints with the best dev WER, its BatchNorm statistics those of the training clips."""
    import torch
    from transformers import AutoModelForCTC

    evaluated = [(entry["eval_wer"], entry["step"]) for entry in trainer.state.log_history if "eval_wer" in entry]
    folders = [job.output / f"checkpoint-{step}" for _, step in sorted(evaluated)[:AVERAGED]]
    models = [AutoModelForCTC.from_pretrained(folder, dtype="float32") for folder in folders]
    states, model = [model.state_dict() for model in models], models[0]
    mean = {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}
    model.load_state_dict({name: value.to(states[0][name].dtype) for name, value in mean.items()})
    model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.reset_running_stats()
            module.train()
            module.momentum = None  # the mean over all batches
    collator, clips = finetune_medasr.CTCCollator(job.processor.feature_extractor), job.selections["train"].clips
    with torch.no_grad():
        for start in range(0, len(clips), 8):  # they are sorted by length
            batch = collator([clips[index] for index in range(start, min(start + 8, len(clips)))])
            model(**finetune_medasr.model_inputs(batch, job.processor.feature_extractor, "cpu"))
    return model


def run_trial(name, seed, folder):
    """{system: {set: WER in %}} of a training run: its best checkpoint and its average; before it, of the base."""
    from transformers import set_seed

    flags = f"--demo {FLAGS} --seed {seed} --output_dir {folder}/run --data_dir {folder}/audio"
    args, training = finetune_medasr.parse_arguments(flags.split())
    training.disable_tqdm = True
    set_seed(seed)
    processor, model = finetune_medasr.load_processor_and_model(args, trains=True)
    corpus = finetune_medasr.open_corpus(args)
    finetune_medasr.prepare_corpus(corpus, finetune_medasr.SPLITS, args)
    parts = {split: (args, corpus, split) for split in finetune_medasr.SPLITS}
    job = finetune_medasr.Job(args, training, processor, model, parts)
    job.tests["us"] = us_english_clips(job)
    found = {"before": scores(job, model)} if name == BASE else {}
    dev = finetune_medasr.DevSet(job.selections["dev"], processor, job.encoder, args)
    trainer = finetune_medasr.make_trainer(args, training, model, job.training_clips(None), dev)
    TRIALS[name](job, trainer)
    trainer.train()
    found[name] = scores(job, trainer.model)
    averaged = f"{name}; best {AVERAGED} averaged"
    return found | {averaged: scores(job, average(job, trainer))}


def with_spread(values, form):
    """Mean and standard deviation, the mean as `form` writes it."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def difference(values, base):
    """Mean and standard deviation of the paired differences, and on how many seeds the WER is lower."""
    changes = [value - other for value, other in zip(values, base)]
    return f"{with_spread(changes, '+.1f')} ({sum(change < 0 for change in changes)}/{len(changes)})"


def table(results):
    """Markdown of {(system, seed): {set: WER}}: the WERs, and their differences to the base on the same seeds."""
    rows = []
    for system in dict.fromkeys(system for system, _ in results):
        seeds = [seed for name, seed in results if name == system and (BASE, seed) in results]
        wers = {name: [results[system, seed][name] for seed in seeds] for name in SETS}
        base = {name: [results[BASE, seed][name] for seed in seeds] for name in SETS}
        changes = ["" if system in ("before", BASE) else difference(wers[name], base[name]) for name in SETS]
        rows.append([system, len(seeds), *(with_spread(wers[name], ".1f") for name in SETS), *changes])
    header = ["WER in %", "seeds", *SETS.values(), *(f"{label}, change" for label in SETS.values())]
    return finetune_medasr.markdown_table(header, rows)


def known_results(path, names):
    """{(system, seed): {set: WER}} of the trials `names`, in their order."""
    entries = list(map(json.loads, path.read_text().splitlines())) if path.exists() else []
    chosen = [entry for name in names for entry in entries if entry["trial"] == name]
    return {(system, entry["seed"]): wers for entry in chosen for system, wers in entry["found"].items()}


def run_trials(options):
    """Each trial with each seed, but for those that `options.results` holds already; prints the table."""
    path = options.results or Path(tempfile.mkdtemp()) / "trials.jsonl"
    names = [name for name in TRIALS if name == BASE or options.only in name]
    for seed in options.seeds:
        for name in names:
            if (name, seed) in known_results(path, [name]):
                continue
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
                found = run_trial(name, seed, Path(folder))
            with path.open("a") as file:
                file.write(json.dumps({"trial": name, "seed": seed, "found": found}) + "\n")
    print("\n".join(table(known_results(path, names))))
    return 0
