"""The program on a GPU: each run is main(), in a process whose tensors lie on fake_gpu.cpp's cuda:0 or mps:0.
It shows what is computed where, in which precision and in how much memory; no speed, no GPU's rounding."""

import contextlib
import json
import shutil

import fake_gpu
import kills
import pytest
import torch
import warm as starts
from conftest import CORPUS, MODEL, SCRIPT, corpus_rows, load_json, refused, scored_clips, succeeded
from helpers import model_with, write, write_wav
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow
FLAGS = f"""--model {MODEL} --dataset {CORPUS} --max_train_seconds 3 --max_train_samples 16 --max_eval_samples 2
    --max_test_samples 3 --max_steps 2 --eval_steps 2 --save_steps 2 --logging_steps 1 --warmup_steps 1
    --lr_scheduler_type constant --dataloader_num_workers 0 --gradient_accumulation_steps 2 --skip_baseline""".split()
FEW = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"]
MODEL_ALONE = "--model", MODEL
WEIGHTS = (MODEL / "model.safetensors").stat().st_size
UNTESTED = "--eval_strategy no --save_strategy no --load_best_model_at_end false".split()
# The program with scales that the small model's steep gradients allow, each update's twice that of the last.
CALM = """
import sys, torch
import finetune_medasr as script

name, scale, growth, backoff, interval, enabled = torch.amp.GradScaler.__init__.__defaults__
assert (scale, growth, interval) == (65_536, 2, 2_000)
torch.amp.GradScaler.__init__.__defaults__ = (name, 16.0, growth, backoff, 1, enabled)
sys.exit(script.main(sys.argv[1:]))
"""
# From a certain call of a method of the Trainer on, the GPU holds what it holds and no more.
FILLED = """
import os, sys
import torch, transformers
import finetune_medasr as script

name, calls = os.environ["FULL_FROM"].split()
method, left = getattr(transformers.Trainer, name), [int(calls)]

def method_of_a_full_gpu(*inputs, **options):
    left[0] -= 1
    if left[0] == 0:
        torch.ops.fake_gpu.limit(torch.cuda.memory_allocated() + 100_000)
    return method(*inputs, **options)

setattr(transformers.Trainer, name, method_of_a_full_gpu)
sys.exit(script.main(sys.argv[1:]))
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("the fake GPU is built with g++, and there is none")
    folder = tmp_path_factory.mktemp("gpu") / "library"
    fake_gpu.build_in(folder)
    return folder / fake_gpu.LIBRARY


@contextlib.contextmanager
def machine_with(kind, library, demo, folder):
    """run(flag, ...) -> the CompletedProcess on such a GPU, --output_dir as `out`, FAKE_GPU_LOG's lines as `log`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starts, "STARTER", fake_gpu.INSTALL + starts.STARTER)
        with starts.WarmStarts(kills.ENV | {"FAKE_GPU": kind, "FAKE_GPU_LIBRARY": str(library)}) as warm:

            def run(*flags, out=None, mode=(*FLAGS, "--data_dir", demo.audio), program=SCRIPT, **env):
                log = folder / f"{len(list(folder.glob('*.log')))}.log"
                out = out or log.with_suffix("")
                env = {name: str(value) for name, value in {"FAKE_GPU_LOG": log, **env}.items()}
                done = warm.run(*mode, "--output_dir", out, *flags, program=program, cwd=folder, env=env)
                done.out, done.log = out, [json.loads(line) for line in log.read_text().splitlines()]
                return done

            yield run


@pytest.fixture(scope="module")
def cuda(library, demo, tmp_path_factory):
    with machine_with("cuda", library, demo, tmp_path_factory.mktemp("cuda")) as run:
        yield run


@pytest.fixture(scope="module")
def apple(library, demo, tmp_path_factory):
    with machine_with("mps", library, demo, tmp_path_factory.mktemp("mps")) as run:
        yield run


def losses(out, step):
    return [entry["loss"] for entry in load_json(out / f"checkpoint-{step}/trainer_state.json")["log_history"]
            if "loss" in entry]  # fmt: skip


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    return write(tmp_path_factory.mktemp("calm") / "calm.py", CALM)


@pytest.fixture(scope="module")
def straight(cuda, calm):
    """Four updates in float16, which is what a GPU gets unasked, that nothing disturbs."""
    return succeeded(cuda(*FEW, "--max_steps", "4", program=calm))


def test_float16_goes_on_with_its_scaler_and_the_gpus_random_numbers(cuda, calm, straight):
    half = succeeded(cuda(*FEW, program=calm))
    assert "computing on Fake GPU, float16" in half.stdout
    assert half.log[-1]["Half"] > 100 and "BFloat16" not in half.log[-1]
    checkpoint = half.out / "checkpoint-2"
    assert torch.load(checkpoint / "scaler.pt")["scale"] == 64
    assert "cuda" in torch.load(checkpoint / "rng_state.pth", weights_only=False)
    whole = succeeded(cuda(*FEW, "--max_steps", "4", program=calm, out=half.out))
    assert f"going on from {checkpoint}" in whole.stdout
    assert losses(half.out, 4) == losses(straight.out, 4)
    assert torch.load(half.out / "checkpoint-4/scaler.pt")["scale"] == 256
    ours, theirs = (load_file(done.out / "checkpoint-4/model.safetensors") for done in (half, straight))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    before = load_file(MODEL / "model.safetensors")
    assert not any(torch.equal(ours[name], before[name]) for name in ours if name.endswith("weight"))


def test_activations_that_overflow_float16_are_in_float32_and_gradients_that_do_are_skipped(cuda, straight, tmp_path):
    """Activations a million times larger, and the next weights a million times smaller."""
    shutil.copytree(MODEL, tmp_path / "model")
    weights = load_file(MODEL / "model.safetensors")
    for name, factor in {"dense_0.weight": 1e6, "dense_0.bias": 1e6, "conv_0.weight": 1e-6}.items():
        weights[f"encoder.subsampler.{name}"] *= factor
    save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    done = succeeded(cuda(*FEW, "--model", tmp_path / "model"))
    assert losses(done.out, 2)[0] == pytest.approx(losses(straight.out, 4)[0], rel=1e-2)
    assert torch.load(done.out / "checkpoint-2/scaler.pt")["scale"] == 65_536 / 4
    history = load_json(done.out / "checkpoint-2/trainer_state.json")["log_history"]
    assert [entry["skipped_updates"] for entry in history if "skipped_updates" in entry] == [1, 2]


@pytest.mark.parametrize("capability", ["7.5", "8.0"])
def test_bfloat16_with_a_worker_that_decodes_and_pinned_memory(cuda, capability):
    done = succeeded(cuda(*FEW, "--bf16", "--dataloader_num_workers", "1", FAKE_GPU_CAPABILITY=capability))
    assert done.log[-1]["BFloat16"] > 100 and "Half" not in done.log[-1] and done.log[-1]["pinned"] > 5
    assert not (done.out / "checkpoint-2/scaler.pt").exists()
    assert "computing on Fake GPU, bfloat16" in done.stdout
    assert ("Fake GPU emulates bfloat16" in done.stderr) == (capability == "7.5")
    assert load_json(done.out / "results/metrics.json")["finetuned"]["clips"] == 3


def test_the_batch_size_is_the_largest_that_fits_and_nothing_of_its_trial_is_kept(cuda):
    flags = "--bf16", "--gradient_accumulation_steps", "2", *UNTESTED
    eight = succeeded(cuda(*flags, "--per_device_train_batch_size", "8"))
    roomy, tight = (round(share * eight.log[-1]["peak"]) for share in (1.15, 0.97))
    for limit, size in ((roomy, 8), (tight, 4)):
        done = succeeded(cuda(*flags, FAKE_GPU_BYTES=limit))
        assert f"16 clips an update and device: {size} a step x {16 // size} accumulation steps" in done.stdout
        for after in done.log[-3:-1]:  # the trial, and as the Trainer starts
            assert after["allocated"] < 1.1 * WEIGHTS and after["reserved"] < 1.1 * WEIGHTS + (2 << 20)
        learnt = [(out / "final/model.safetensors").read_bytes() for out in (done.out, eight.out)]
        assert (learnt[0] == learnt[1]) == (size == 8), "a trial moves no random numbers"
    full = cuda(*flags, "--per_device_train_batch_size", "8", FAKE_GPU_BYTES=tight)
    advice = "try --per_device_train_batch_size 4 --gradient_accumulation_steps 4, --gradient_checkpointing"
    refused(full, 1, f"memory is full with 8 clips a step: {advice}")


FULL = {  # from where on: (what is advised, clips a step when it goes on)
    "training_step 3": ("memory is full with 16 clips a step: try the same command, which goes on with 8 a step", 8),
    "_maybe_log_save_evaluate 3": ("a single clip fills the GPU's memory: lower --window_seconds", 16),
}


@pytest.mark.parametrize("full", FULL)
def test_memory_that_fills_up_in_training_or_evaluation_ends_the_run_and_it_goes_on(cuda, tmp_path, full):
    advice, size = FULL[full]
    flags = "--bf16", "--max_steps", "4"
    done = cuda(*flags, program=write(tmp_path / "filled.py", FILLED), FULL_FROM=full)
    refused(done, 1, advice)
    more = succeeded(cuda(*flags, out=done.out))
    assert f"device: {size} a step x {16 // size} acc" in more.stdout
    assert ("going on from" in more.stdout) == (size == 8), "a checkpoint follows an evaluation"


def test_scoring_halves_batches_that_do_not_fit_and_says_what_helps_a_single_clip(cuda):
    flags = "--eval_only", "--max_test_samples", "6"
    roomy = succeeded(cuda(*flags))
    needed = roomy.log[-1]["peak"] - WEIGHTS
    tight = succeeded(cuda(*flags, FAKE_GPU_BYTES=WEIGHTS + needed // 2))
    assert len(tight.log) > len(roomy.log), "the cache is emptied before the halves"
    texts = [scored_clips(done.out / "results") for done in (roomy, tight)]
    assert texts[0] == texts[1]
    full = cuda(*flags, FAKE_GPU_BYTES=WEIGHTS + needed // 20)
    refused(full, 1, "single clip fills the GPU's memory: lower --window_seconds")


@pytest.fixture(scope="module")
def spoken(cuda, tmp_path_factory):
    """(a folder of recordings, their texts by the CPU)"""
    folder = tmp_path_factory.mktemp("spoken")
    for number, clip in enumerate(sorted(corpus_rows("test"))[:4]):
        write_wav(folder / f"{number}.wav", clip)
    return folder, succeeded(cuda("--transcribe", folder, "--use_cpu", "true", mode=MODEL_ALONE)).stdout


def test_transcribing_is_in_float32_or_in_bfloat16_where_the_gpu_has_it(cuda, spoken):
    folder, texts = spoken
    assert texts.count(".wav") == 4
    for flags, capability, half in (([], "8.0", True), ([], "7.5", False), (["--fp16", "false"], "8.0", False)):
        done = succeeded(cuda("--transcribe", folder, *flags, mode=MODEL_ALONE, FAKE_GPU_CAPABILITY=capability))
        assert ("BFloat16" in done.log[-1]) == half and "Half" not in done.log[-1] and done.log[-1]["pinned"] > 0
        assert done.stdout == texts or half
    needed = done.log[-1]["peak"] - WEIGHTS
    tight = succeeded(cuda("--transcribe", folder, *flags, mode=MODEL_ALONE, FAKE_GPU_BYTES=WEIGHTS + needed // 2))
    assert tight.stdout == texts
    full = cuda("--transcribe", folder, *flags, mode=MODEL_ALONE, FAKE_GPU_BYTES=WEIGHTS + needed // 20)
    refused(full, 1, "lower --window_seconds, or --use_cpu")


def test_apples_gpu_transcribes_what_the_cpu_does(apple, spoken):
    folder, texts = spoken
    done = succeeded(apple("--transcribe", folder, mode=MODEL_ALONE))
    assert done.stdout == texts and done.log[-1]["peak"] > 0 and "pinned" not in done.log[-1]
    assert "Double" not in done.log[-1]


def test_apples_gpu_trains_with_a_loss_of_the_cpu(apple, cuda, tmp_path):
    """Which has no CTC, no float64 and no pinned memory; the losses are those of another machine."""
    still = dict.fromkeys(("dropout", "activation_dropout", "attention_dropout"), 0.0)  # devices draw their own
    flags = [*FEW, "--spec_augment", "false", "--model", model_with(tmp_path / "model", 0.0, **still)]
    done = succeeded(apple(*flags))
    assert "computing on Apple's GPU, float32" in done.stdout and "Double" not in done.log[-1]
    on_cpu = succeeded(cuda(*flags, "--fp16", "false", "--use_cpu", "true"))
    assert losses(done.out, 2) == pytest.approx(losses(on_cpu.out, 2), rel=1e-4)
    texts = [scored_clips(run.out / "results") for run in (done, on_cpu)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"])
def test_full_memory_beneath_pytorch_lowers_the_batch_size_too(cuda, text):
    done = cuda("--bf16", *UNTESTED, FAKE_GPU_BYTES=13 * WEIGHTS, FAKE_GPU_ERROR=text)
    assert "4 a step x 4" in succeeded(done).stdout


def test_full_memory_while_a_checkpoint_loads_costs_no_checkpoint(cuda, straight, tmp_path):
    out = shutil.copytree(straight.out, tmp_path / "out")
    filled = {"program": write(tmp_path / "filled.py", FILLED), "FULL_FROM": "_load_optimizer_and_scheduler 1"}
    done = cuda(*FEW, "--max_steps", "6", out=out, **filled)
    refused(done, 1, "memory is full: nvidia-smi shows")


def test_a_gpu_that_another_program_has_filled_is_named(cuda, spoken):
    done = cuda("--transcribe", spoken[0], mode=MODEL_ALONE, FAKE_GPU_BYTES=WEIGHTS // 2)
    refused(done, 1, "memory is full: nvidia-smi shows")


@pytest.mark.parametrize("flag", ["full_determinism", "auto_find_batch_size"])
def test_flags_that_a_gpu_cannot_follow_are_refused(cuda, flag):
    refused(cuda(*FEW, f"--{flag}", "true"), 2, f"--{flag}.* leave (it|the flag) out")
