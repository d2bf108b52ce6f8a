"""`python tests/benchmark.py trials`: known ways to a better adapted model, each beside the program's own way.

Every trial is the demo's run (small model, synthesised corpus, 120 updates) with one thing changed, on the same seeds.
It is scored on dev, on test clips of accents that it was trained on and of the one that it was not, and on US-English
voices, which the model was pre-trained on: what it forgets of them.
"""

import contextlib
import functools
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import finetune_medasr as script  # noqa: E402

CORPUS, MODEL, US_ENGLISH = (HERE / "fixtures" / name for name in ("corpus", "model", "us_english"))
SETS = {"dev": "dev", "seen": "seen accents", "unseen": "unseen accent", "us": "US English"}
AVERAGED = 3  # checkpoints
SPEEDS = (0.9, 1.0, 1.1)
# Checkpoints every 20 updates in all of them, for the averages; without early stopping all do the same work.
FLAGS = """--demo --eval_steps 20 --save_steps 20 --save_total_limit 10 --early_stopping_patience 0 --report_to none
    --use_cpu""".split()


def opened(flags, also=()):
    """What a run has before it trains; its clips are those of the splits and of `also`, {name: further test set}."""
    settings = script.parse_settings([*map(str, flags), "--disable_tqdm", "true"])
    (processor, model), sources = script.load_model(settings), {}
    for name, place in {"": settings.dataset, **dict(also)}.items():
        splits = ("test",) if name else script.SPLITS
        sources[name] = script.Source(str(place), settings, splits, is_extra=bool(name))
        script.prepare(sources[name], splits, settings)
    encoder = script.LabelEncoder(processor.tokenizer, model.config.vocab_size, settings.target_text)
    clips = script.select_all(sources, settings, lambda table: table["problem"])
    decoder = script.Decoder(model, processor, settings)
    return SimpleNamespace(settings=settings, processor=processor, clips=clips, encoder=encoder, decoder=decoder)


@dataclass
class PerturbedSpeed(script.CTCCollator):
    """Plays each clip at one of SPEEDS, drawn from seed, epoch and clip; as it is where its labels would not fit."""

    def __call__(self, rows):
        return super().__call__([{**row, "samples": self.played(row)} for row in rows])

    def played(self, row):
        import soxr

        samples, labels = script.decode_audio(row["audio"]), self.encoder([row["text"]])[0]
        speed = np.random.default_rng((self.seed, self.epoch, crc32(row["clip"].encode()), 1)).choice(SPEEDS)
        played = soxr.resample(samples, script.SAMPLE_RATE * speed, script.SAMPLE_RATE).astype(np.float32)
        # A logit every 640 samples, the first after 2,320; CTC puts a blank between two equal labels.
        needed = len(labels) + sum(left == right for left, right in zip(labels, labels[1:]))
        return played if needed <= 1 + (len(played) - 2_320) // 640 else samples


def perturb_speed(trainer):
    trainer.data_collator = PerturbedSpeed(**vars(trainer.data_collator))


def freeze(trainer, layers):
    """Keep the subsampler and so many of the lowest layers as they are (BatchNorm's statistics move)."""
    for module in (trainer.model.encoder.subsampler, *trainer.model.encoder.layers[:layers]):
        module.requires_grad_(False)


BASE = "as it is"
TRIALS = {BASE: lambda trainer: None, "speed perturbed": perturb_speed}
TRIALS["subsampler frozen"] = functools.partial(freeze, layers=0)
TRIALS |= {f"subsampler, {count} of 4 layers frozen": functools.partial(freeze, layers=count) for count in (1, 2)}


def scores(run, model):
    """{set: WER in %} of a model."""
    run.decoder.model, accents, found = model, set(run.clips["train"].table["accent"]), {}
    for name in ("dev", "test", "us"):
        texts = {"finetuned": run.decoder.texts(run.decoder.emissions(run.clips[name])[0])}
        metrics = script.Scores(run.clips[name].table, texts, accents).metrics()["finetuned"]
        found |= metrics["groups"]["seen_accent"] if name == "test" else {name: metrics}
    return {name: 100 * found[name]["wer"] for name in SETS}


def average(run, trainer):
    """The mean of the checkpoints with the best dev WER, its BatchNorm statistics those of the training clips."""
    import torch
    from transformers import AutoModelForCTC

    evaluated = [(entry["eval_wer"], entry["step"]) for entry in trainer.state.log_history if "eval_wer" in entry]
    folders = [f"{run.settings.output_dir}/checkpoint-{step}" for _, step in sorted(evaluated)[:AVERAGED]]
    models = [AutoModelForCTC.from_pretrained(folder, dtype="float32") for folder in folders]
    states, model = [model.state_dict() for model in models], models[0]
    mean = {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}
    model.load_state_dict({name: value.to(states[0][name].dtype) for name, value in mean.items()})
    for module in model.eval().modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.reset_running_stats()
            module.train().momentum = None  # the mean over all batches
    clips, extractor = run.clips["train"].audio, run.decoder.extractor
    with torch.no_grad():
        for start in range(0, len(clips), 8):  # they are sorted by length
            batch = script.CTCCollator(extractor)([clips[at] for at in range(start, min(start + 8, len(clips)))])
            model(**script.model_inputs(batch, extractor, "cpu"))
    return model


def run_trial(name, seed, folder):
    """{system: {set: WER in %}} of a training run: its best checkpoint and its average; before it, of the base."""
    flags = [*FLAGS, "--seed", seed, "--output_dir", f"{folder}/run", "--data_dir", f"{folder}/audio"]
    script.transformers.set_seed(seed)
    run = opened(flags, {"us": US_ENGLISH})
    found = {"before": scores(run, run.decoder.model)} if name == BASE else {}
    trainer = script.make_trainer(run.settings, run.decoder, run.encoder, run.clips["train"].audio, run.clips["dev"])
    TRIALS[name](trainer)
    trainer.train()
    found[name] = scores(run, trainer.model)
    return found | {f"{name}; best {AVERAGED} averaged": scores(run, average(run, trainer))}


def table(results):
    """Markdown of {(system, seed): {set: WER}}: mean and standard deviation, and those of the changes from the base on
    the same seeds, with the number of seeds on which the WER is lower.
    """

    def with_spread(values, form=".1f"):
        return f"{statistics.mean(values):{form}}" + f" ± {statistics.stdev(values):.1f}" * (len(values) > 1)

    rows = [["WER in %", "seeds", *SETS.values(), *(f"{label}, change" for label in SETS.values())], ["---"] * 10]
    for system in dict.fromkeys(system for system, _ in results):
        seeds = [seed for name, seed in results if name == system and (BASE, seed) in results]
        cells, changes = [], []
        for part in SETS:
            cells.append(with_spread([results[system, seed][part] for seed in seeds]))
            change = [results[system, seed][part] - results[BASE, seed][part] for seed in seeds]
            lower = f"{with_spread(change, '+.1f')} ({sum(value < 0 for value in change)}/{len(seeds)})"
            changes.append("" if system in ("before", BASE) else lower)
        rows.append([system, str(len(seeds)), *cells, *changes])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def run_trials(options):
    """Each trial with each seed, but for those that `options.results` holds already; prints the table."""
    path = options.results or Path(tempfile.mkdtemp()) / "trials.jsonl"
    known = list(map(json.loads, path.read_text().splitlines())) if path.exists() else []
    names = [name for name in TRIALS if name == BASE or options.only in name]
    done = {(entry["trial"], entry["seed"]) for entry in known}
    for seed, name in [(seed, name) for seed in options.seeds for name in names if (name, seed) not in done]:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            known.append({"trial": name, "seed": seed, "found": run_trial(name, seed, folder)})
        with path.open("a") as file:
            file.write(json.dumps(known[-1]) + "\n")
    chosen = [entry for name in names for entry in known if entry["trial"] == name]
    print(table({(system, entry["seed"]): wers for entry in chosen for system, wers in entry["found"].items()}))
    return 0
