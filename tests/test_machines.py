"""What differs between machines: float16 and its overflow, several GPUs, several processes, memory that runs out.

Without a GPU the mechanism runs on the CPU: its autocast and GradScaler, DataParallel's replicas, gloo processes.
"""

import copy
import itertools
import json
import os
import pickle
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CORPUS, MODEL, error_line, load_json, load_predictions
from helpers import label_encoder, make_selection, noise, parse, random_model, small_processor
from transformers import TrainerCallback, TrainingArguments

import finetune_medasr as script


@pytest.fixture(scope="module")
def clips():
    """(train, dev) selections of a few short clips."""
    train = make_selection([("No fever.", noise(0.8, seed)) for seed in range(4)], "train")
    return train, make_selection([("No cough.", noise(0.9, 5)), ("Give 200 mg.", noise(0.7, 6))], "dev")


def make_trainer(output_dir, clips, *flags, model=None, half=False):
    """The script's trainer; with `half` in float16, under the CPU's autocast and gradient scaler."""
    train, dev = clips
    args, training = parse(output_dir, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1, *flags)
    if half:
        training.fp16, training.mixed_precision = True, "fp16"
    dev_set = script.DevSet(dev, small_processor(), label_encoder(), args)
    trainer = script.make_trainer(args, training, model or random_model(), train.clips, dev_set)
    if half:
        # accelerate offers neither on a CPU, and uses both when they are there.
        trainer.accelerator.native_amp, trainer.accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=256)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---------------------------------------------------------------- the guard against float16


class Halving(torch.nn.Linear):
    """A linear layer that says in which type it computed."""

    def forward(self, values, scale=None):
        self.kind = (super().forward(values) * (1 if scale is None else scale)).dtype
        return super().forward(values)


def guarded_layer():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(Halving(4, 4, bias=False))
    script.Float32.guard(layer[0])
    return layer


def computed_in(layer, module=None):
    with torch.autocast("cpu", torch.float16):
        layer(torch.ones(1, 4, dtype=torch.float16))
    return (module or layer[0]).kind


def test_a_guarded_module_computes_in_float32_and_the_others_do_not():
    layer = guarded_layer()
    assert computed_in(layer) == torch.float32
    with torch.autocast("cpu", torch.float16):
        layer[0](values=torch.ones(1, 4).half(), scale=torch.ones(1).half())
        assert layer[0].kind == torch.float32
        assert torch.is_autocast_enabled("cpu"), "the guard has to leave autocast as it was"
    assert computed_in(torch.nn.Sequential(Halving(4, 4))) == torch.float16


def test_a_guard_uses_the_weights_of_its_replica():
    """nn.DataParallel copies modules like this and then gives the copies weights of their own."""
    layer = guarded_layer()[0]
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.weight.detach() * 2, None
    ones = torch.ones(1, 4)
    torch.testing.assert_close(replica(ones), 2 * layer(ones))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_guard_survives_copies_and_pickles(copied):
    layer = torch.nn.Sequential(guarded_layer()[0], torch.nn.BatchNorm1d(4))
    for guard in (script.Float32, script.FiniteStatistics):  # two guards on one module
        guard.guard(layer[1])
    twin = copied(layer)
    with torch.no_grad():
        twin[0].weight.zero_()
    assert computed_in(twin.eval()) == torch.float32
    assert not twin(torch.ones(1, 4)).any() and layer.eval()(torch.ones(1, 4)).any()
    twin.train()(torch.full((2, 4), float("inf")))
    assert torch.isfinite(twin[1].running_mean).all()


def test_a_guard_survives_compilation():
    """torch.compile traces forward; eager is its backend that needs no compiler."""
    layer = guarded_layer()
    assert computed_in(torch.compile(layer, backend="eager", fullgraph=True), layer[0]) == torch.float32


def test_gradients_are_the_same_through_a_guard_and_gradient_checkpointing():
    model, extractor = random_model(), small_processor().feature_extractor
    batch = script.CTCCollator(extractor, label_encoder())([{"text": "No.", "samples": noise(0.5)}])
    batch = script.model_inputs(batch, extractor, "cpu")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    gradients = {}
    for name in ("plain", "guarded", "checkpointed"):
        model.zero_grad()
        if name == "guarded":
            assert script.guard_half_precision(model, [inputs], "cpu")
        if name == "checkpointed":
            model.gradient_checkpointing_enable()
        model.train()
        model(**batch).loss.backward()
        gradients[name] = {parameter: value.grad.clone() for parameter, value in model.named_parameters()}
    for name in ("guarded", "checkpointed"):
        for parameter, value in gradients["plain"].items():
            torch.testing.assert_close(gradients[name][parameter], value)


def test_nothing_of_the_guard_is_in_the_saved_model(tmp_path, clips):
    from transformers import AutoModelForCTC

    plain = random_model()
    plain.save_pretrained(tmp_path / "plain")
    trainer = make_trainer(tmp_path / "out", clips, half=True)
    trainer.save_model(tmp_path / "final")
    expected = {**load_json(tmp_path / "plain/config.json"), "use_cache": False}
    assert load_json(tmp_path / "final/config.json") == expected
    saved = AutoModelForCTC.from_pretrained(tmp_path / "final")
    assert not [module for module in saved.modules() if isinstance(module, script.Guarded)]
    assert saved.state_dict().keys() == plain.state_dict().keys()


# ---------------------------------------------------------------- overflow


def overflow_at(trainer, *updates):
    """Let the first encoder layer overflow float16 in the forward passes of these updates."""

    def grow(module, inputs, output):
        if module.training and trainer.state.global_step + 1 in updates:
            return output * torch.tensor(float("inf"), dtype=output.dtype)
        return output

    trainer.model.encoder.layers[0].feed_forward1.linear1.register_forward_hook(grow)


def statistics(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "running_" in name}


def test_an_overflow_is_skipped_counted_and_leaves_the_running_statistics_finite(tmp_path, clips):
    trainer = make_trainer(tmp_path, clips, "--max_steps", 6, "--logging_steps", 1, half=True)
    before, weights, scales = statistics(trainer.model), [], []
    overflow_at(trainer, 2, 3)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights.append(trainer.model.ctc_head.weight.detach().clone())
            scales.append(trainer.accelerator.scaler.get_scale())

    trainer.add_callback(Watch)
    trainer.train()
    assert scales == [256, 128, 64, 64, 64, 64]
    counts = [entry["skipped_updates"] for entry in trainer.state.log_history if "skipped_updates" in entry]
    assert counts == [0, 1, 2, 2, 2, 2]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[2], weights[3])
    after = statistics(trainer.model)
    assert after and all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items()), "finite batches still move them"
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_without_the_guard_one_overflow_would_poison_the_running_statistics(tmp_path, clips):
    model = random_model().train()
    layer = model.encoder.layers[0].conv.norm
    layer(torch.full((1, layer.num_features, 4), float("inf")))
    assert not torch.isfinite(layer.running_mean).all()
    script.FiniteStatistics.guard(layer)
    before = layer.running_mean.clone()
    layer(torch.full((1, layer.num_features, 4), float("nan")))
    assert torch.equal(layer.running_mean.isfinite(), before.isfinite())


def test_overflow_upon_overflow_ends_the_run_with_advice(tmp_path, clips):
    trainer = make_trainer(tmp_path, clips, "--max_steps", 40, half=True)
    overflow_at(trainer, *range(3, 40))
    with pytest.raises(script.RunError, match=r"10 updates in a row, up to update 12: use --bf16"):
        trainer.train()


def test_overflows_with_updates_between_them_do_not_end_the_run(tmp_path, clips):
    trainer = make_trainer(tmp_path, clips, "--max_steps", 12, "--logging_steps", 12, half=True)
    overflow_at(trainer, *range(1, 6), *range(7, 12))
    trainer.train()
    assert trainer.state.log_history[0]["skipped_updates"] == 10


def test_a_gradient_that_is_not_finite_ends_a_float32_run_before_the_update(tmp_path, clips):
    trainer = make_trainer(tmp_path, clips, "--max_steps", 9)
    overflow_at(trainer, 3)
    with pytest.raises(script.RunError, match=r"not finite at update 3: lower --learning_rate"):
        trainer.train()
    assert all(torch.isfinite(value).all() for value in trainer.model.parameters())


@pytest.mark.parametrize("half, advice", [(True, "--bf16"), (False, "--learning_rate")])
def test_a_dev_loss_that_is_not_finite_ends_the_run(tmp_path, clips, half, advice):
    trainer = make_trainer(tmp_path, clips, half=half)
    with torch.no_grad():
        trainer.model.ctc_head.bias.fill_(float("nan"))
    with pytest.raises(script.RunError, match=rf"dev loss is not finite.*{advice}"):
        trainer.evaluate()


def test_running_statistics_that_are_not_finite_are_never_saved(tmp_path, clips):
    """An infinite variance makes text blank and no loss infinite."""
    trainer = make_trainer(tmp_path, clips)
    trainer.model.encoder.layers[0].conv.norm.running_var.fill_(float("inf"))
    with pytest.raises(script.RunError, match=r"not finite at update 0, in .*running_var: lower --learning_rate"):
        trainer._save_checkpoint(trainer.model, None)
    assert not list(tmp_path.glob("checkpoint-*/*"))


def test_skipped_updates_are_drawn_in_tensorboard(tmp_path, clips):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--max_steps", 3, "--logging_steps", 1, "--report_to", "tensorboard"]
    trainer = make_trainer(tmp_path, clips, *flags, half=True)
    overflow_at(trainer, 2)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert [event.value for event in events.Scalars("train/skipped_updates")] == [0, 1, 1]


@pytest.mark.parametrize("flags, half", [([], True), (["--bf16"], False), (["--fp16", "false"], False)])
def test_float16_is_the_default_on_a_gpu(tmp_path, monkeypatch, flags, half):
    """torch and the library are told of a GPU; what they would do with it is left out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda training: setattr(training, "_n_gpu", 1))
    _, training = script.parse_arguments(["--output_dir", str(tmp_path), *flags])
    assert training.fp16 is half


# ---------------------------------------------------------------- several GPUs


def test_one_of_several_gpus_is_used_and_the_way_to_the_others_is_said(tmp_path, clips, monkeypatch, capsys):
    finish = TrainingArguments.__post_init__

    def two_gpus(training):
        finish(training)
        training._n_gpu = 2  # what the library counts where two GPUs are visible to one process

    monkeypatch.setattr(TrainingArguments, "__post_init__", two_gpus)
    trainer = make_trainer(tmp_path, clips, "--per_device_train_batch_size", 2)
    assert "torchrun --nproc_per_node 2 finetune_medasr.py" in capsys.readouterr().out
    assert trainer._wrap_model(trainer.model) is trainer.model
    assert trainer.args.train_batch_size == 2 and script.planned_updates(trainer.args, 8) == (40, 4)
    trainer.args._n_gpu = 2
    assert isinstance(trainer._wrap_model(trainer.model), torch.nn.DataParallel), "what the Trainer does with two"


# ---------------------------------------------------------------- several processes

RECORDED = """
import os, sys
import finetune_medasr as script

collate = script.CTCCollator.__call__

def recorded(self, rows):
    if "clip" in rows[0]:  # of training: windows that are scored have no names
        with open(f"drawn-{os.environ['RANK']}-{'resume' in ' '.join(sys.argv)}.txt", "a") as file:
            file.write(" ".join(row["clip"] for row in rows) + "\\n")
    return collate(self, rows)

script.CTCCollator.__call__ = recorded
sys.exit(script.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_draw_each_clip_once_an_epoch_across_an_interruption(demo, tmp_path, run_two):
    """Four updates an epoch; stopped after six, in the second epoch, and resumed for the rest of three."""
    flags = f"""--model {MODEL} --dataset {CORPUS} --data_dir {demo.audio} --use_cpu true --ddp_backend gloo
        --skip_baseline --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --eval_steps 6 --save_steps 6
        --logging_steps 1 --max_train_samples 16 --max_eval_samples 2 --max_test_samples 2
        --dataloader_num_workers 0 --warmup_steps 2""".split()
    (tmp_path / "recorded.py").write_text(RECORDED)
    drawn = {}
    for name, runs in (("straight", [["12"]]), ("stopped", [["6"], ["12", "--resume_from_checkpoint", "true"]])):
        folder = tmp_path / name
        folder.mkdir()
        for max_steps, *more in runs:
            arguments = [*flags, "--max_steps", max_steps, "--output_dir", "out", *more]
            for done in run_two(*arguments, program=tmp_path / "recorded.py", cwd=folder):
                assert done.returncode == 0, done.stderr[-3000:]
        drawn[name] = [[], []]
        for rank, resumed in itertools.product(range(2), (False, True)[: len(runs)]):
            lines = (folder / f"drawn-{rank}-{resumed}.txt").read_text().splitlines()
            drawn[name][rank] += lines[: 12 // len(runs)]  # one batch is collated ahead, and lost in an interruption
    assert drawn["straight"] == drawn["stopped"]
    assert [len(lines) for lines in drawn["stopped"]] == [12, 12]
    epochs = []
    for epoch in range(3):
        lines = [line for rank in drawn["stopped"] for line in rank[4 * epoch : 4 * epoch + 4]]
        names = " ".join(lines).split()
        assert len(names) == len(set(names)) == 16
        epochs.append(lines)
    assert epochs[0] != epochs[1] != epochs[2]


def model_with(folder, **encoder_config):
    """A copy of the small model with other settings of its encoder."""
    shutil.copytree(MODEL, folder)
    config = load_json(folder / "config.json")
    config["encoder_config"] |= encoder_config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def short_run(demo, output, model, *flags):
    """The command line of a run of sizes that neither batches nor processes divide."""
    common = f"""--model {model} --dataset {CORPUS} --data_dir {demo.audio} --output_dir {output} --use_cpu true
        --skip_baseline --eval_steps 6 --save_steps 6 --max_steps 6 --logging_steps 1 --warmup_steps 2
        --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --max_train_samples 17 --max_eval_samples 3
        --max_test_samples 5 --dataloader_num_workers 0 --learning_rate 1e-3 --ddp_backend gloo""".split()
    return [*common, *flags]


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_the_same_batches(demo, tmp_path, warm, run_two):
    """One process takes the batches of both by accumulation, so that BatchNorm normalises each batch by itself in both.

    Its running statistics, which training does not read, are those of the first process's batches, and left out here.
    """
    from safetensors.torch import load_file

    model = model_with(tmp_path / "model", dropout=0.0, activation_dropout=0.0, attention_dropout=0.0, layerdrop=0.0)
    flags = ["--no_spec_augment", "--max_train_samples", 24, "--max_steps", 8, "--eval_steps", 8, "--save_steps", 8]
    both = run_two(*short_run(demo, tmp_path / "two", model, *flags))
    single = [
        flag for flag in short_run(demo, tmp_path / "one", model, *flags) if flag not in ("--ddp_backend", "gloo")
    ]
    alone = warm.run(*single, "--gradient_accumulation_steps", 2)
    assert [done.returncode for done in (*both, alone)] == [0, 0, 0], both[0].stderr + alone.stderr
    histories = [
        load_json(tmp_path / name / "checkpoint-8/trainer_state.json")["log_history"] for name in ("one", "two")
    ]
    for name in ("loss", "grad_norm", "learning_rate"):
        one, two = ([entry[name] for entry in history if name in entry] for history in histories)
        assert len(one) == 8 and one == pytest.approx(two, rel=1e-4), name
    before = load_file(model / "model.safetensors")
    one, two = (load_file(tmp_path / name / "checkpoint-8/model.safetensors") for name in ("one", "two"))
    learnt = [name for name in one if "running_" not in name and "num_batches" not in name]
    assert len(learnt) > 20 and not torch.equal(one["ctc_head.weight"], before["ctc_head.weight"])
    for name in learnt:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--gradient_checkpointing"]])
def test_two_processes_with_uneven_shares_write_everything_once(demo, tmp_path, warm, run_two, flags):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = model_with(tmp_path / "model", layerdrop=0.5)
    both = run_two(*short_run(demo, tmp_path / "out", model, *flags))
    out, errors = "".join(done.stdout for done in both), "".join(done.stderr for done in both)
    assert [done.returncode for done in both] == [0, 0], errors
    assert out.count("model: ") == 1 and "Warning" not in errors
    clips = [row["audio_filepath"] for row in load_predictions(tmp_path / "out/results")]
    assert len(clips) == len(set(clips)) == load_json(tmp_path / "out/results/metrics.json")["finetuned"]["clips"] == 5
    events = [EventAccumulator(str(path)).Reload() for path in (tmp_path / "out/runs").glob("events*")]
    assert sum("train/loss" in log.Tags()["scalars"] for log in events) == 1
    steps = [
        event.step for log in events if "train/loss" in log.Tags()["scalars"] for event in log.Scalars("train/loss")
    ]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert len((tmp_path / "out/results/skipped_clips.csv").read_text().splitlines()) > 1
    transcribed = warm.run("--eval_only", "--model", "out/final", "--dataset", CORPUS, "--data_dir", demo.audio,
                           "--output_dir", "again", "--max_test_samples", 5, "--use_cpu", "true",
                           "--dataloader_num_workers", 0, cwd=tmp_path)  # fmt: skip
    assert transcribed.returncode == 0, transcribed.stderr
    texts = [[row["pred_text"] for row in load_predictions(tmp_path / name / "results")] for name in ("out", "again")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "flag, variable", [("--fsdp", "ACCELERATE_USE_FSDP"), ("--deepspeed", "ACCELERATE_USE_DEEPSPEED")]
)
def test_sharding_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capfd, flag, variable):
    assert script.main([flag, "full_shard", "--output_dir", str(tmp_path)]) == 2
    assert f"{flag} is not supported" in error_line(capfd.readouterr().err)
    monkeypatch.setenv(variable, "true")  # as `accelerate launch` does
    assert script.main(["--output_dir", str(tmp_path)]) == 2
    assert f"{flag} is not supported" in error_line(capfd.readouterr().err)


def test_patience_goes_on_after_a_resumption(tmp_path, clips, capsys):
    """The dev WER never changes, so each evaluation after the first is one without a better score."""
    common = ["--eval_strategy", "steps", "--eval_steps", 1, "--save_strategy", "steps", "--save_steps", 1,
              "--load_best_model_at_end", "true", "--learning_rate", "1e-12"]  # fmt: skip
    common += ["--early_stopping_patience", 3]
    straight = make_trainer(tmp_path / "straight", clips, *common, "--max_steps", 9)
    straight.train()
    assert straight.state.global_step == 4
    assert "stopped early: 3 evaluations without a better dev WER" in capsys.readouterr().out
    make_trainer(tmp_path / "stopped", clips, *common, "--max_steps", 2).train()
    resumed = make_trainer(tmp_path / "stopped", clips, *common, "--max_steps", 9)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped/checkpoint-2"))
    assert resumed.state.global_step == 4
    more = make_trainer(tmp_path / "straight", clips, *common, "--max_steps", 12)
    capsys.readouterr()
    more.train(resume_from_checkpoint=str(tmp_path / "straight/checkpoint-4"))
    assert more.state.global_step == 4 and "--early_stopping_patience goes on" in capsys.readouterr().out


# ---------------------------------------------------------------- streams


def test_shares_of_a_stream_are_balanced_by_bytes():
    sizes = {f"{number}.tar.gz": [size] for number, size in enumerate([839, 839, 90, 80, 70, 60, 50, 40, 30, 20, 10])}
    archives = list(sizes)
    for count in (1, 2, 3, 11):
        shares = script.balanced_shares(archives, sizes, count)
        assert sorted(sum(shares, [])) == sorted(archives)
        loads = [sum(sizes[path][0] for path in share) for share in shares]
        assert max(loads) - min(loads) <= 839 if count > 2 else max(loads) - min(loads) <= 10
    assert script.balanced_shares(archives, sizes, 4) == script.balanced_shares(archives[::1], sizes, 4)


def test_processes_and_their_workers_have_shares_of_nearly_equal_bytes(tmp_path):
    from torch.utils.data import IterableDataset

    sizes = [800, 100, 500, 100, 500]  # every other archive would be 1,800 of 2,000
    files = {f"audio/igbo/train/train_igbo_{number}.tar.gz": [size, None] for number, size in enumerate(sizes)}
    corpus = script.Corpus("somebody/corpus", None, None, tmp_path, False, files)
    args, _ = parse(tmp_path, "--streaming", "--max_steps", 1)
    seen, loads = [], []
    for rank in range(2):
        place = SimpleNamespace(world_size=2, process_index=rank, dataloader_num_workers=2, output_dir=str(tmp_path))
        stream = script.mixed(script.TrainingStream, IterableDataset)(corpus, args, None, place, 0)
        shares = [list(share) for share in stream.arguments["shares"]]
        loads.append([sum(files[path][0] for path in share) for share in shares])
        seen += sum(shares, [])
    assert loads == [[800, 200], [500, 500]] and sorted(seen) == sorted(files)


@pytest.mark.slow
def test_two_nodes_that_share_no_folder_train_from_a_stream(tmp_path):
    """Each node has a bad clip of its own to note down, and its own folders; the model is the first one's best."""
    import subprocess

    flags = f"""--model {MODEL} --dataset {CORPUS} --accents swahili damara --streaming --max_steps 2 --eval_steps 1
        --save_steps 1 --data_dir audio --output_dir out --use_cpu true --ddp_backend gloo --skip_baseline
        --max_eval_samples 2 --max_test_samples 3 --per_device_train_batch_size 2 --gradient_accumulation_steps 1
        --num_proc 1 --dataloader_num_workers 1""".split()
    port, nodes = 29_500 + os.getpid() % 400, []
    for rank in range(2):
        folder = tmp_path / f"node-{rank}"
        folder.mkdir()
        launch = ["-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", rank, "--nproc_per_node", "1",
                  "--master_addr", "127.0.0.1", "--master_port", port]  # fmt: skip
        command = list(map(str, [sys.executable, *launch, script.__file__, *flags]))
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        nodes.append(subprocess.Popen(command, cwd=folder, env=env, **output))
    outputs = [node.communicate(timeout=400)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert (tmp_path / "node-0/out/final/model.safetensors").exists() and not (tmp_path / "node-1/out/final").exists()
    assert load_json(tmp_path / "node-0/out/results/metrics.json")["finetuned"]["clips"] == 3
    lines = [(tmp_path / f"node-{rank}/out/results/skipped_clips.csv").read_text().splitlines() for rank in range(2)]
    bad = [line for node in lines for line in node if re.search("undecodable|too short", line)]
    assert len(bad) >= 1 and lines[0][0] == lines[1][0] == ",".join(script.SKIPPED_COLUMNS)


# ---------------------------------------------------------------- memory


class Cramped:
    """Mixed with LasrForCTC: a GPU that holds so many clips at a time."""

    limit = 1

    def forward(self, *inputs, **options):
        if len(options["input_features"]) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(*inputs, **options)


def cramped_model(limit):
    model = random_model()
    model.__class__ = script.mixed(Cramped, type(model))
    model.limit = limit
    return model


def test_the_dev_evaluation_halves_batches_that_do_not_fit(tmp_path, clips):
    roomy = make_trainer(tmp_path, clips, "--per_device_eval_batch_size", 1).evaluate()
    cramped = make_trainer(tmp_path, clips, "--per_device_eval_batch_size", 8, model=cramped_model(1)).evaluate()
    for name in ("eval_loss", "eval_wer", "eval_cer"):
        assert cramped[name] == pytest.approx(roomy[name], rel=1e-4)


def test_a_single_clip_that_does_not_fit_is_no_matter_of_training_batches(tmp_path, clips):
    trainer = make_trainer(tmp_path, clips, model=cramped_model(0))
    with pytest.raises(script.RunError, match="--window_seconds") as error:
        trainer.evaluate()
    assert "batch_size" not in str(error.value)


def test_long_dev_clips_are_written_down_in_windows(tmp_path, clips):
    long = make_selection([("No cough.", noise(14.0, 1)), ("Give 200 mg.", noise(0.7, 6))], "dev")
    lengths = []

    class Measured:
        def forward(self, *inputs, **options):
            lengths.append(options["input_features"].shape[1])
            return super().forward(*inputs, **options)

    model = random_model()
    model.__class__ = script.mixed(Measured, type(model))
    trainer = make_trainer(tmp_path, (clips[0], long), "--window_seconds", 6, model=model)
    scores = trainer.evaluate()
    assert max(lengths) <= 600 and scores["eval_loss"] > 0
    short = make_selection([("Give 200 mg.", noise(0.7, 6))], "dev")
    alone = make_trainer(tmp_path, (clips[0], short), model=random_model()).evaluate()
    assert scores["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-4), "the loss is that of clips in one piece"


def test_out_of_memory_with_a_number_of_clips_names_the_flags_to_try(tmp_path, clips):
    flags = ("--max_steps", 1, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1)
    trainer = make_trainer(tmp_path, clips, *flags, model=cramped_model(1))
    with pytest.raises(script.RunError, match="--per_device_train_batch_size 1 --gradient_accumulation_steps 2"):
        script.train_model(trainer, None, 1, script.RunState(tmp_path / "run.json", {}, {}))
    assert not (tmp_path / "run.json").exists(), "a number that was asked for stays"


@pytest.mark.parametrize("limit, chosen", [(32, 32), (5, 4), (1, 1), (0, 1)])
def test_the_largest_step_that_fits_is_chosen_and_the_trials_leave_no_trace(tmp_path, clips, limit, chosen, capsys):
    model, processor = cramped_model(limit), small_processor()
    args, training = parse(tmp_path, "--gradient_accumulation_steps", "4")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    collator = script.CTCCollator(processor.feature_extractor, label_encoder())
    longest = script.longest_clip(clips[0].clips, args)
    assert len(longest["samples"]) == max(row["num_samples"] for row in clips[0].rows)
    script.choose_batch_size(model, collator, longest, training, script.TRIED_BATCH_SIZES)
    split = training.per_device_train_batch_size, training.gradient_accumulation_steps
    assert split == (chosen, 32 // chosen)
    assert f"32 clips an update and device: {chosen} a step" in capsys.readouterr().out
    assert torch.equal(torch.rand(1), expected), "random numbers were drawn"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("lengths, batches", [([9, 5, 4, 4, 1], [[0], [1, 2], [3, 4]]), ([30], [[0]]), ([], [])])
def test_scoring_batches_are_filled_by_seconds_with_their_padding(tmp_path, lengths, batches):
    _, training = parse(tmp_path)
    spans = [script.Span(row, 0, length, 0, 0, True) for row, length in enumerate(lengths)]
    assert script.pack_spans(spans, training, 10) == batches
