#!/usr/bin/env python3
"""Ways to learn the accents and forget less, each the demo's run with a few flags, on the same seeds.

    python tests/forgetting.py --seeds 42 43 44 45 --results forgetting.jsonl

The base was pre-trained on synthesised US-English voices. Each way hears the accents in 120 updates, unless its name
says otherwise, and replays voices that the base was trained on, never those that are scored. Printed are, for each
way, test WERs on accents and on US English along the models between the base and the fine-tuned one, then those on US
English where those on accents are the same, beside interpolation alone. Needs espeak-ng for the replayed voices."""

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import make_fixtures  # noqa: E402

import finetune_medasr as script  # noqa: E402

CORPUS, US_ENGLISH = HERE / "fixtures/corpus", HERE / "fixtures/us_english"
SHARES = (0, 0.5, 0.7, 0.8, 0.85, 0.9, 1)
TARGETS = (18, 20, 22, 25, 30)  # WER on accents in %
ALONE = "as it is"
WAYS = {  # name: (updates, further flags)
    ALONE: (120, []),
    **{
        f"--replay {share}": (round(120 / (1 - share) / 6) * 6, [f"--replay=POOL:{share}"])
        for share in (0.25, 0.5, 0.1)
    },
    "240 updates": (240, []),
    "240 updates of 1e-3": (240, ["--learning_rate=1e-3"]),
    "300 updates of 5e-4": (300, ["--learning_rate=5e-4"]),
}


def path_of(way, seed, folder):
    """[(share, test WER on accents, WER on US English)] in % of a run."""
    (updates, flags), pool = WAYS[way], folder / "replayed"
    if not pool.exists():
        clips = [clip for clip in make_fixtures.make_us_clips() if clip.split == "train"]
        make_fixtures.write_hub(pool, make_fixtures.record(clips, "period"))
    steps = f"--max_steps {updates} --eval_steps {updates // 6} --save_steps {updates // 6}".split()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        places = ["--data_dir", f"{folder}/audio", "--output_dir", out, "--also_score", str(US_ENGLISH), str(CORPUS)]
        flags = [flag.replace("POOL", str(pool)) for flag in flags]
        once = "--skip_baseline --early_stopping_patience 0 --disable_tqdm true --report_to none --use_cpu true".split()
        assert script.main(["--demo", *steps, *places, *flags, *once, "--seed", str(seed)]) == 0
        path = json.loads(Path(out, "results/metrics.json").read_text())["path"]
    return [(point["share"], *(100 * point["wer"][name] for name in (CORPUS.name, US_ENGLISH.name))) for point in path]


def us_wer(path, target):
    """The lowest US-English WER on a path where its WER on accents is `target`; None where it does not get there."""
    found = []
    for (_, accents, us), (_, accents_next, us_next) in itertools.pairwise(path):
        if min(accents, accents_next) <= target <= max(accents, accents_next):
            way = (target - accents) / (accents_next - accents or 1)
            found.append(us + way * (us_next - us))
    return min(found, default=None)


def with_spread(values, form=".1f"):
    return f"{statistics.mean(values):{form}}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45])
    parser.add_argument("--results", type=Path, default="forgetting.jsonl", help="kept: what is in it is not run again")
    options, script.PATH_SHARES = parser.parse_args(), SHARES
    known = map(json.loads, options.results.read_text().splitlines() if options.results.exists() else ())
    paths = {(way, seed): path for way, seed, path in known}
    with tempfile.TemporaryDirectory() as folder:
        for seed, way in itertools.product(options.seeds, WAYS):
            if (way, seed) not in paths:
                paths[way, seed] = path_of(way, seed, Path(folder))
                with options.results.open("a") as file:
                    print(json.dumps([way, seed, paths[way, seed]]), file=file)
    rows = []
    for way in WAYS:
        places = zip(*(paths[way, seed] for seed in options.seeds))
        rows.append([way, *(" / ".join(map(with_spread, list(zip(*points))[1:])) for points in places)])
    print("\n".join(script.markdown_table(["accents / US English, WER in %", *map(str, SHARES)], rows)))
    rows = []
    for way in WAYS:
        rows.append([way])
        for target in TARGETS:
            pairs = [[us_wer(paths[name, seed], target) for name in (way, ALONE)] for seed in options.seeds]
            pairs = [pair for pair in pairs if None not in pair]
            cell = with_spread([here for here, _ in pairs]) if pairs else "not reached"
            if pairs and way != ALONE:
                cell += f"; {with_spread([here - there for here, there in pairs], '+.1f')} ({len(pairs)})"
            rows[-1].append(cell)
    print("\n".join(script.markdown_table(["US English where accents are at", *map(str, TARGETS)], rows)))


if __name__ == "__main__":
    main()
