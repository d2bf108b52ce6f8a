"""What differs between machines: float16 and its overflow, several GPUs, several processes, memory that runs out.
Without a GPU the mechanism runs on the CPU: its autocast and GradScaler, gloo processes."""

import json
import shutil

import kills
import numpy as np
import pytest
import torch
from conftest import IN_TWO, MODEL, load_json, refused, scored_clips, succeeded, tensorboard
from helpers import noise, run_main
from small_model import inputs_of, label_encoder, make_clips, make_trainer, random_model, watched_model
from transformers import AutoModelForCTC, TrainerCallback, TrainingArguments

import finetune_medasr as script

TWO_A_STEP = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1]


@pytest.mark.parametrize("flags, half", [([], True), (["--bf16"], False), (["--fp16", "false"], False)])
def test_float16_is_the_default_on_a_gpu(tmp_path, monkeypatch, flags, half):
    """torch and the library are told of a GPU; what they would do with it is left out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda training: setattr(training, "_n_gpu", 1))
    assert script.parse_settings(["--output_dir", str(tmp_path), *flags]).fp16 is half


@pytest.mark.parametrize("flags, half", [([], True), (["--gradient_checkpointing", "true"], False)])
def test_gradients_are_the_same_through_a_guard_and_gradient_checkpointing(tmp_path, clips, flags, half):
    batch, gradients = inputs_of([{"text": "No.", "samples": noise(0.5)}], encoder=label_encoder()), []
    for model in (random_model(), make_trainer(tmp_path, clips, *flags, half=half).model):
        model.train()(**batch).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def overflow_at(trainer, *updates):
    """Let the first encoder layer overflow float16 in the forward passes of these updates."""

    def grow(module, inputs, output):
        if module.training and trainer.state.global_step + 1 in updates:
            return output * torch.tensor(float("inf"), dtype=output.dtype)
        return output

    trainer.model.encoder.layers[0].feed_forward1.linear1.register_forward_hook(grow)


def test_an_overflow_is_skipped_counted_and_leaves_the_running_statistics_finite(tmp_path, clips):
    flags = [*TWO_A_STEP, "--max_steps", 6, "--logging_steps", 1, "--report_to", "tensorboard"]
    trainer = make_trainer(tmp_path, clips, *flags, half=True)
    encoder, kinds, weights, scales = trainer.model.encoder, {}, [], []
    statistics = {name: value for name, value in trainer.model.state_dict().items() if "running_" in name}
    before = {name: value.clone() for name, value in statistics.items()}
    overflow_at(trainer, 2, 3)
    for module in (encoder.subsampler.dense_0, encoder.layers[1].feed_forward1.linear1):
        module.register_forward_hook(lambda module, inputs, output: kinds.update({module: output.dtype}))

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights.append(trainer.model.ctc_head.weight.detach().clone())
            scales.append(trainer.accelerator.scaler.get_scale())

    trainer.add_callback(Watch)
    trainer.train()
    assert list(kinds.values()) == [torch.float32, torch.float16]
    assert scales == [256, 128, 64, 64, 64, 64]
    counts = [event.value for event in tensorboard(tmp_path / "runs").Scalars("train/skipped_updates")]
    assert counts == [0, 1, 2, 2, 2, 2]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[2], weights[3])
    assert statistics and all(torch.isfinite(value).all() for value in statistics.values())
    assert any(not torch.equal(value, before[name]) for name, value in statistics.items()), "finite batches move them"
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    trainer.save_model(str(tmp_path / "final"))
    saved = AutoModelForCTC.from_pretrained(tmp_path / "final").state_dict()
    assert saved.keys() == random_model().state_dict().keys(), "nothing of the guard is in the saved model"


@pytest.mark.parametrize("half, advice", [(True, "--bf16"), (False, "--learning_rate")])
def test_what_is_not_finite_ends_the_run_with_advice_and_is_never_saved(tmp_path, clips, half, advice):
    flags = [*TWO_A_STEP, *"--max_steps 20 --save_strategy steps --save_steps 1 --learning_rate 1e-3".split()]
    trainer = make_trainer(tmp_path, clips, *flags, "--save_strategy", "no", half=half)
    overflow_at(trainer, 1, 2, 3, *range(5, 40))  # in half precision skipped but for one, then skipped ten times
    with pytest.raises(script.RunError, match=f"at update {14 if half else 1}: .*{advice}"):
        trainer.train()
    assert all(torch.isfinite(value).all() for value in trainer.model.parameters())
    with torch.no_grad():
        trainer.model.ctc_head.bias.fill_(float("nan"))
    with pytest.raises(script.RunError, match=rf"dev loss is not finite.*{advice}"):
        trainer.evaluate()
    trainer = make_trainer(tmp_path, clips, *flags, half=half)  # an infinite variance makes no loss infinite
    trainer.model.encoder.layers[0].conv.norm.running_var.fill_(float("inf"))
    with pytest.raises(script.RunError, match=r"not finite, in .*running_var"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*/*"))


def test_one_of_several_gpus_is_used_and_the_way_to_the_others_is_said(tmp_path, clips, monkeypatch, capsys):
    finish = TrainingArguments.__post_init__

    def two_gpus(training):
        finish(training)
        training._n_gpu = 2  # what the library counts where two GPUs are visible to one process

    monkeypatch.setattr(TrainingArguments, "__post_init__", two_gpus)
    trainer = make_trainer(tmp_path, clips, *TWO_A_STEP)
    assert "torchrun --nproc_per_node 2 finetune_medasr.py" in capsys.readouterr().out
    assert trainer._wrap_model(trainer.model) is trainer.model and trainer.args.train_batch_size == 2


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_sharding_that_accelerate_asks_for_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    refused(run_main(tmp_path), 2, f"--{name} is not supported")
    monkeypatch.setenv("RANK", "1")
    done = run_main(tmp_path)
    assert (done.returncode, done.stderr) == (2, ""), "one process says it"


def test_the_dev_evaluation_halves_batches_that_do_not_fit(tmp_path, clips):
    roomy = make_trainer(tmp_path, clips, "--per_device_eval_batch_size", 1).evaluate()
    model, shapes = watched_model(1)
    cramped = make_trainer(tmp_path, clips, model=model).evaluate()
    assert [size for size, _ in shapes] == [3, 1, 1, 1], "clips are scored together where they fit"
    for name in ("eval_loss", "eval_wer", "eval_cer"):
        assert cramped[name] == pytest.approx(roomy[name], rel=1e-4)
    with pytest.raises(script.RunError, match="single clip.*--window_seconds"):
        make_trainer(tmp_path, clips, model=watched_model(0)[0]).evaluate()


def test_long_dev_clips_are_scored_in_windows(tmp_path, clips):
    long = make_clips("dev", ("No cough.", noise(14.0, 1)), ("Give 200 mg.", noise(0.7, 6)))
    model, shapes = watched_model(9)
    scores = make_trainer(tmp_path, (clips[0], long), "--window_seconds", 6, model=model).evaluate()
    assert len(shapes) > 1 and max(frames for _, frames in shapes) <= 600
    alone = make_trainer(tmp_path, (clips[0], make_clips("dev", ("Give 200 mg.", noise(0.7, 6))))).evaluate()
    assert scores["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-4), "the loss is that of clips in one piece"


# Notes down the clips that a process draws. No time passes, so that speeds are a thousand times the seconds of audio.
RECORDED = """
import types

collate = script.CTCCollator.__call__

def recorded(self, rows):
    if "clip" in rows[0]:  # of training: windows that are scored have no names
        with open(f"drawn-{os.environ.get('RANK')}.txt", "a") as file:
            file.write(" ".join(row["clip"] for row in rows) + "\\n")
    return collate(self, rows)

script.CTCCollator.__call__ = recorded
script.time = types.SimpleNamespace(monotonic=lambda: 1.0)"""


def model_with(folder, layerdrop, **encoder_config):
    """A copy of the small model with other settings of its encoder."""
    shutil.copytree(MODEL, folder)
    config = load_json(folder / "config.json")
    config["encoder_config"] |= {"layerdrop": layerdrop, **encoder_config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_the_same_batches(demo, tmp_path, warm, run_two):
    """One process takes the batches of both by accumulation: BatchNorm normalises each batch by itself. Its running
    statistics, which training does not read, are those of the first process's batches, and left out here."""
    from safetensors.torch import load_file

    model = model_with(tmp_path / "model", 0.0, dropout=0.0, activation_dropout=0.0, attention_dropout=0.0)
    flags = f"--model {model} --learning_rate 1e-3 --eval_steps 8 --save_steps 8 --skip_baseline".split()
    one, two = (kills.flags(demo.audio, tmp_path / name, *flags) for name in ("one", "two"))
    place = {"patch": RECORDED, "cwd": tmp_path}
    both = run_two(*two, *IN_TWO, **place)
    alone = warm.run(*one, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, **place)
    assert [done.returncode for done in (*both, alone)] == [0, 0, 0], both[0].stderr + alone.stderr

    drawn = {rank: (tmp_path / f"drawn-{rank}.txt").read_text().splitlines() for rank in ("0", "1", "None")}
    updates = [set(f"{first} {second}".split()) for first, second in zip(drawn["0"], drawn["1"])]
    assert updates[:8] == [set(" ".join(drawn["None"][at : at + 2]).split()) for at in range(0, 16, 2)]
    epochs = [set().union(*updates[start : start + 4]) for start in (0, 4)]
    assert [len(names) for names in epochs] == [16, 16] and updates[:4] != updates[4:8]

    states = [load_json(tmp_path / name / "checkpoint-8/trainer_state.json") for name in ("one", "two")]
    for name in ("loss", "grad_norm", "learning_rate", "padding_percent", "audio_seconds_per_second"):
        first, second = ([entry[name] for entry in state["log_history"] if name in entry] for state in states)
        assert len(first) == 8 and first == pytest.approx(second, rel=1e-4), name
    seconds = 3600 * load_json(tmp_path / "two/results/metrics.json")["data"]["train"]["hours"]
    assert sum(second[:4]) / 1000 == pytest.approx(seconds, abs=0.2), "the last of them: what both have heard"
    before = load_file(model / "model.safetensors")
    one, two = (load_file(tmp_path / name / "checkpoint-8/model.safetensors") for name in ("one", "two"))
    learnt = [name for name in one if "running_" not in name and "num_batches" not in name]
    assert len(learnt) > 20 and not torch.equal(one["ctc_head.weight"], before["ctc_head.weight"])
    for name in learnt:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-5)


@pytest.mark.slow
def test_two_processes_with_uneven_shares_in_bfloat16_write_everything_once(demo, tmp_path, warm, run_two):
    """Sizes that neither batches nor processes divide, and layers that one process drops and the other does not. The
    texts are those of final/, scored in float32 by one process."""
    model, out = model_with(tmp_path / "model", 0.5), tmp_path / "out"
    flags = """--max_train_samples 17 --max_eval_samples 3 --max_test_samples 25 --max_steps 6 --eval_steps 6
        --save_steps 6 --learning_rate 1e-3 --bf16 --skip_baseline""".split()
    both = run_two(*kills.flags(demo.audio, out, *flags, "--model", model, *IN_TWO))
    said, errors = "".join(done.stdout for done in both), "".join(done.stderr for done in both)
    assert [done.returncode for done in both] == [0, 0], errors
    assert said.count("model: ") == 1 and "Warning" not in errors
    clips = [row["audio_filepath"] for row in scored_clips(out / "results")]
    metrics = load_json(out / "results/metrics.json")
    assert len(clips) == len(set(clips)) == metrics["finetuned"]["clips"] == 25
    assert metrics["baseline"] is metrics["delta"] is None
    curves = [tensorboard(path) for path in (out / "runs").glob("events*")]
    curves = [log.Scalars("train/loss") for log in curves if "train/loss" in log.Tags()["scalars"]]
    assert [[event.step for event in losses] for losses in curves] == [[1, 2, 3, 4, 5, 6]]
    assert len((out / "results/skipped_clips.csv").read_text().splitlines()) > 1
    again = ["--eval_only", "--model", out / "final", "--max_test_samples", 25]
    succeeded(warm.run(*kills.flags(demo.audio, tmp_path / "again", *again)))
    texts = [[row["pred_text"] for row in scored_clips(tmp_path / name / "results")] for name in ("out", "again")]
    assert texts[0] == texts[1]
