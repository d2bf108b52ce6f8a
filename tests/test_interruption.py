"""A run that is killed, stopped, starved of disk or misled, and the same command again."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import kills
import pytest
import warm as starts
from conftest import IN_TWO, MODEL, load_json, refused, run_script, succeeded, tensorboard
from helpers import modified, run_main, write

pytestmark = pytest.mark.slow
# At the nth call of a function of the program it does what $MOMENT says.
AT_A_MOMENT = """
import json, signal
import torch.utils.tensorboard, transformers

(function, count, action), calls = json.loads(os.environ["MOMENT"]), 0
original, (owner, _, name) = eval(function), function.rpartition(".")

def counted(*inputs, **options):
    global calls
    calls += 1
    if calls == count:
        exec(action, globals())
    return original(*inputs, **options)

setattr(eval(owner), name, counted)"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
TERM = "os.kill(os.getpid(), signal.SIGTERM)"
STEP = "transformers.Trainer.training_step"
DECODE = "script.Decoder.emissions"
SAVE = "transformers.Trainer._save_optimizer_and_scheduler"
QUICK = ["--skip_baseline", "--max_test_samples", "1"]  # where the texts are of no interest


@pytest.fixture(scope="module")
def folder(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "audio").symlink_to(demo.audio)
    return folder


@pytest.fixture(scope="module")
def run_at(folder, warm):
    """run_at(output, moment, flag, ...) -> the process of a run in which something happens at a moment, if one is
    given; `start` starts it, or several."""

    def run_at(output, moment=None, *flags, start=warm.run, **env):
        words = kills.flags(folder / "audio", output, *flags)
        return start(*words, cwd=folder, env={**env, "MOMENT": json.dumps(moment)}, patch=moment and AT_A_MOMENT)

    return run_at


@pytest.fixture(scope="module")
def straight(folder):
    """The output folder of a run that nothing disturbs, SpecAugment and dropout on, in a Python of its own."""
    kills.run_with_kills(folder / "audio", folder / "straight")
    return folder / "straight"


def state_of(output, step=8):
    return load_json(output / f"checkpoint-{step}/trainer_state.json")


def assert_same(output, straight):
    """Bit for bit the same weights, texts, scores, and what was seen on the way."""
    assert kills.result(output) == kills.result(straight)
    states = [state_of(path) for path in (output, straight)]
    assert states[0]["best_global_step"] == states[1]["best_global_step"]
    for name in ("loss", "eval_loss", "eval_wer"):
        seen = [[(entry["step"], entry[name]) for entry in state["log_history"] if name in entry] for state in states]
        assert seen[0] == seen[1] and len(seen[0]) >= 4
    assert not list(output.rglob("*.tmp"))


def curves(output):
    """Steps of the losses, of the dev WERs and of the dev texts in TensorBoard, of the newest start."""
    events = tensorboard(max((output / "runs").glob("events*"), key=lambda path: path.stat().st_mtime))
    texts = events.Tensors("eval/transcriptions/text_summary")
    return [[event.step for event in found] for found in (*map(events.Scalars, ("train/loss", "eval/wer")), texts)]


def test_random_kills_do_not_change_the_result_and_a_stopped_run_exits_in_seconds(folder, straight, tmp_path):
    """In Pythons of their own, in which the first moments are those of the imports."""
    (tmp_path / "audio").symlink_to(folder / "audio")
    assert kills.survive(tmp_path, straight, longest=8, kills=2, seed=1)[0] == 2
    assert kills.seconds_to_stop(folder / "audio", tmp_path / "timed", 1) < 20


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(folder, straight, run_at):
    output = folder / "killed"
    for moment, checkpoints in (
        ((DECODE, 1), []),  # the baseline
        ((STEP, 6), [2, 4]),
        ((SAVE, 1), [2, 4]),  # gone on from checkpoint-2, and in checkpoint-4 once more
        ((DECODE, 3), [2, 4, 6]),  # the evaluation after update 8
        ((DECODE, 2), [2, 4, 6, 8]),  # the final scoring
        (("script.write_model_card", 1), [2, 4, 6, 8]),  # into final/
    ):
        older = ["--resume_from_checkpoint", output / "checkpoint-2"] if moment[0] == SAVE else []
        killed = run_at(output, [*moment, KILL], *older)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert [step for step in range(10) if (output / f"checkpoint-{step}").exists()] == checkpoints, moment
        assert not (output / "final").exists(), "a half-written folder has its name"
        if moment[0] == STEP:
            assert curves(output) == [[1, 2, 3, 4, 5], [2, 4], [2, 4]], "what was logged is lost"
        if moment[0] == SAVE:
            assert curves(output) == [[3, 4], [4], [4]]
            assert "checkpoint-4 is left aside: it was not finished" in run_at(output, [STEP, 1, KILL]).stderr
    assert "as it is on the test split" not in succeeded(run_at(output)).stdout
    assert_same(output, straight)


def test_a_killed_run_replays_the_same_clips_and_scores_the_same_models_on_the_way(folder, run_at):
    """A corpus without a split is one of test clips where it is also scored, and of training clips where replayed."""
    voices = shutil.copytree(MODEL.parent / "us_english/test", folder / "voices")
    audio = shutil.copytree(folder / "audio", folder / "audio-and-voices")
    flags, whole, output = ["--also_score", voices, "--data_dir", audio], folder / "whole", folder / "replaying"
    flags += ["--replay", f"{voices}:0.5"]
    done = succeeded(run_at(whole, None, *flags))
    assert "3 speakers of voices in training too" in done.stderr
    metrics, state = load_json(whole / "results/metrics.json"), state_of(whole)
    assert metrics["data"]["replay"]["clips"] == 16 and state["epoch"] == 1, "8 updates of 4, half of them replayed"
    assert "50% of the training clips are of voices" in (whole / "final/README.md").read_text()
    for moment in ((STEP, 6), (DECODE, 5)):  # with a checkpoint amid an epoch; of the first model on the way
        killed = run_at(output, [*moment, KILL], *flags)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "checkpoint-8, update 8 of 8" in succeeded(run_at(output, None, *flags)).stdout
    assert_same(output, whole)
    assert load_json(output / "results/metrics.json")["path"] == metrics["path"] != []
    refused(run_at(whole, None, *flags[:-1], voices), 2, "holds a run with --replay .*voices:0.5, not .*voices;")


def test_a_signal_ends_the_program_at_once_where_the_same_command_goes_on(folder, straight, run_at):
    for output, number, moment, written in (
        (folder / "stopped", signal.SIGTERM, (DECODE, 1), None),  # the baseline
        (folder / "stopped", signal.SIGINT, (STEP, 3), 3),
        (folder / "stopped", signal.SIGTERM, (DECODE, 4), None),  # the final scoring, after three of dev
        (folder / "evaluating", signal.SIGTERM, (DECODE, 2), 2),  # after update 2: this evaluation is lost
    ):
        stopped = run_at(output, [*moment, f"os.kill(os.getpid(), {int(number)})"])
        refused(stopped, 128 + number, f"stopped by {number.name}: the same command goes on")
        assert not written or (output / f"checkpoint-{written}/trainer_state.json").exists()
        assert not (output / "final").exists()
    assert "checkpoint-2, update 2 of 8" in succeeded(run_at(folder / "evaluating")).stdout
    assert "checkpoint-8, update 8 of 8" in succeeded(run_at(folder / "stopped")).stdout
    shutil.rmtree(folder / "stopped/checkpoint-3")
    assert_same(folder / "stopped", straight)


@pytest.mark.parametrize("rank", [None, 0])
def test_a_second_signal_ends_the_program_unless_a_launcher_passes_it_on(rank, tmp_path, run_at):
    """Of several processes each gets a signal twice, from its terminal or cluster and from torchrun."""
    env = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    twice = "os.kill(os.getpid(), signal.SIGINT);" * 2
    stopped = run_at(tmp_path / "out", [STEP, 1, twice], *QUICK, **({} if rank is None else env))
    assert stopped.returncode == 130, stopped.stderr
    assert (tmp_path / "out/checkpoint-1").exists() == (rank is not None)
    assert ("stopped by SIGINT" if rank is not None else "ended by a second SIGINT") in stopped.stderr


def test_a_finished_run_says_so_more_updates_go_on_and_overwrite_starts_anew(folder, straight, run_at):
    before = modified(straight)
    done = run_at(straight)
    assert (done.returncode, done.stderr) == (0, "")
    assert "finished" in done.stdout and "| WER " in done.stdout and modified(straight) == before
    output = folder / "more"
    shutil.copytree(straight, output)
    assert "checkpoint-8, update 8 of 9" in succeeded(run_at(output, None, "--max_steps", 9)).stdout
    assert state_of(output, 9)["global_step"] == 9
    assert "going on" not in succeeded(run_at(output, None, "--overwrite_output_dir")).stdout
    assert_same(output, straight)
    assert not (output / "checkpoint-9").exists()


def test_patience_and_the_best_checkpoint_survive_a_kill_and_a_low_limit(tmp_path, run_at):
    """The weights hardly move, so each evaluation after the first is one without a better score."""
    flags = "--learning_rate 1e-12 --eval_steps 1 --save_steps 1 --save_total_limit 2 --early_stopping_patience 3"
    output, flags = tmp_path / "out", [*QUICK, *flags.split()]
    # The file that makes a checkpoint complete: until then the one before has to stay.
    killed = run_at(output, ["transformers.TrainerState.save_to_json", 3, KILL], *flags)
    assert killed.returncode == -signal.SIGKILL
    assert {path.parent.name for path in output.glob("*/trainer_state.json")} == {"checkpoint-1", "checkpoint-2"}
    for patience, last, found in ((3, 4, "update 2 of 8"), (3, 4, "finished"), (4, 5, "update 4 of 8")):
        done = succeeded(run_at(output, None, *flags, "--early_stopping_patience", patience))
        assert found in done.stdout
        assert found == "finished" or f"stopped early: {patience} evaluations without a better" in done.stdout
        assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-1", f"checkpoint-{last}"}
        best, final = (output / name / "model.safetensors" for name in ("checkpoint-1", "final"))
        assert best.read_bytes() == final.read_bytes()


DIFFERENCES = """model:model:somebody/model model_revision:None:main dataset:corpus:somebody/speech seed:42:7
    dataset_revision:None:main text_column:None:said accents:None:['zulu'] domains:None:['clinical']
    countries:None:['NG'] max_train_seconds:30.0:20.0 max_train_samples:16:12 max_eval_samples:2:3 max_test_samples:3:4
    target_text:as_written:words spec_augment:True:False window_seconds:20.0:10.0 learning_rate:3e-05:1e-05"""
DIFFERENCES = [difference.split(":") for difference in DIFFERENCES.split()]  # (flag, of the run, asked for)


def test_another_run_is_refused_with_the_difference(folder, straight, tmp_path):
    command, before = kills.flags(folder / "audio", straight), modified(straight)
    shutil.copytree(MODEL, tmp_path / "model")
    weights = (MODEL / "model.safetensors").read_bytes()
    (tmp_path / "model/model.safetensors").write_bytes(weights[: 1 << 19] + b"another" + weights[(1 << 19) + 7 :])
    for flags, difference in (
        (f"--model {tmp_path}/model", "weights of checksum "),
        ("--gradient_accumulation_steps 2", "batch x accumulation steps x processes of 4, not 8"),
        *(("--" + flag + " " + new.strip("[']"), f"--{flag} {old}, not {new}") for flag, old, new in DIFFERENCES),
    ):
        message = re.escape(f"holds a run with {difference}")
        refused(run_main(tmp_path, *command, *flags.split()), 2, message, "--overwrite_output_dir")
    assert modified(straight) == before
    # A stream has no choice of so many clips.
    at = command.index("--max_train_samples")
    identity = load_json(straight / "run.json")
    identity["identity"]["max_train_samples"] = None
    (tmp_path / "run.json").write_text(json.dumps(identity))
    done = run_main(tmp_path, *command[:at], *command[at + 2 :], "--streaming", "--output_dir", ".")
    refused(done, 2, "holds a run with --streaming False, not True")


@pytest.mark.parametrize("name", ["final/notes.txt", "checkpoint-500/pytorch_model.bin"])
def test_what_no_run_has_made_is_not_deleted(name, tmp_path):
    file = write(tmp_path / "out" / name, "mine")
    done = run_main(tmp_path, *kills.flags("audio", "out"))
    refused(done, 2, f"out/{file.parent.name} .*--overwrite_output_dir")
    assert file.read_text() == "mine" and os.listdir(tmp_path / "out") == [file.parent.name]


def test_damaged_checkpoints_of_a_moved_run(folder, straight, run_at):
    """One that was not finished is passed over, one that was cut is named, and the best one is found in its place."""
    output = folder / "elsewhere"
    shutil.copytree(straight, output)
    shutil.rmtree(output / "final")
    (output / "checkpoint-8/trainer_state.json").write_text('{"epoch"')
    hidden = straight.rename(folder / "hidden")
    try:
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            whole = (output / "checkpoint-6" / name).read_bytes()
            (output / "checkpoint-6" / name).write_bytes(whole[: len(whole) // 2])
            done = run_at(output)
            assert "checkpoint-8 is left aside: it was not finished" in done.stderr
            refused(done, 1, "checkpoint-6 cannot be loaded.*delete it")
            (output / "checkpoint-6" / name).write_bytes(whole)
        shutil.rmtree(output / "checkpoint-6")
        done = run_at(output)
        output = output.rename(folder / "once-more")
        shutil.rmtree(output / "final")
        last = run_at(output)
    finally:
        hidden.rename(straight)
    assert "checkpoint-4, update 4 of 8" in succeeded(done).stdout
    assert "checkpoint-8, update 8 of 8" in succeeded(last).stdout
    assert_same(output, straight)


def test_a_disk_that_is_full_from_a_moment_on_is_named(folder, straight, run_at):
    """From each of these moments on no file can grow, as on a full disk; afterwards there is room again."""
    output = folder / "full"
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))"
    for moment in (  # run.json, the baseline's texts in it, TensorBoard's file, a checkpoint after its weights, ...
        ("script.Run.save", 1), ("script.Run.save", 2), ("transformers.Trainer.log", 3), (SAVE, 1),
        ("script.write_results", 1), ("script.draw_pictures", 1), ("script.write_model_card", 1),
        ("script.Run.save", 2),  # that it is done
    ):  # fmt: skip
        done = run_at(output, [*moment, full])
        refused(done, 1, "cannot be written.*free some disk; the same command goes on")
        written = [path / "trainer_state.json" for path in output.glob("checkpoint-*")]
        assert all(map(Path.exists, written)) and not list(output.rglob("*.tmp")), "what is half-written takes room"
    succeeded(run_at(output))
    assert_same(output, straight)


@pytest.mark.parametrize("steps", [1, 8])
def test_a_model_that_is_not_finite_is_never_saved(folder, tmp_path, steps):
    flags = f"--learning_rate 1e300 --warmup_steps 0 --max_steps {steps} --eval_steps 8 --save_steps 8 --skip_baseline"
    done = run_main(tmp_path, *kills.flags(folder / "audio", "out", *flags.split()))
    message = refused(done, 1, "not finite.* at update .*--learning_rate")
    assert steps == 1 or len(re.findall(r"[0-9a-f-]{36}/[0-9a-f]{32}\.ogg", message)) == 4, "the clips of the update"
    assert not (tmp_path / "out/final").exists() and not list((tmp_path / "out").glob("checkpoint-*/model.safetensors"))


def test_two_processes_stopped_and_killed_past_the_first_epoch_end_as_if_they_had_not_been(folder, run_at, run_two):
    """Stopped as Slurm does it: by a signal to the launcher, which passes it on, and to a process itself."""
    straight, output = folder / "two", folder / "two-killed"
    assert [done.returncode for done in run_at(straight, None, *IN_TWO, start=run_two)] == [0, 0]

    def torchrun(*words, patch, cwd, env):
        env = {**kills.ENV, **env, "PYTHONPATH": str(kills.SCRIPT.parent), "PATCH": patch}
        launcher = f"torch.distributed.run --standalone --nproc_per_node 2 {starts.__file__}".split()
        return run_script(*launcher, *words, script="-m", cwd=cwd, env=env)

    stop = f'if os.environ["RANK"] == "0": {TERM}; os.kill(os.getppid(), signal.SIGTERM)'
    fresh = ["--data_dir", folder / "prepared-by-two"]
    stopped = run_at(output, [STEP, 5, stop], *IN_TWO, *fresh, start=torchrun)
    assert "error: stopped by SIGTERM: the same command goes on" in stopped.stderr
    said = [line for line in stopped.stdout.splitlines() if line.strip()]
    assert any("checkpoint-5 written" in line for line in said) and len(said) == len(set(said)), "said once"
    assert len(re.findall(r"preparing audio: .* 0/\d+ \[00:00<", stopped.stderr)) == 1, "by one of them"
    killed = run_at(output, [STEP, 2, KILL], *IN_TWO, start=run_two)  # in update 7 of 4 an epoch
    assert [done.returncode for done in killed] == [-signal.SIGKILL] * 2, killed
    done, second = run_at(output, None, *IN_TWO, start=run_two)
    assert (done.returncode, second.returncode, second.stdout) == (0, 0, "") and "update 6 of 8" in done.stdout
    shutil.rmtree(output / "checkpoint-5")
    assert_same(output, straight)


def test_no_process_leaves_before_a_checkpoint_is_complete(tmp_path, run_at, run_two):
    """The second process writes its part late, the first one what completes it: neither may go ahead alone."""
    stop = f"""import atexit, time
save, write = transformers.Trainer._save_rng_state, transformers.TrainerState.save_to_json

def save_late(*inputs):
    time.sleep(2 * int(os.environ["RANK"]))
    save(*inputs)

def write_late(*inputs):
    open("{tmp_path}/all", "w").write(str(os.path.exists(names[1])))
    time.sleep(2)
    write(*inputs)

transformers.Trainer._save_rng_state, transformers.TrainerState.save_to_json = save_late, write_late
names = "{tmp_path}/out/checkpoint-1/trainer_state.json", "{tmp_path}/out/checkpoint-1/rng_state_1.pth"
atexit.register(lambda: open("{tmp_path}/" + os.environ["RANK"], "w").write(str(all(map(os.path.exists, names)))))
{TERM}"""
    stopped = run_at(tmp_path / "out", [STEP, 1, stop], *IN_TWO, *QUICK, start=run_two)
    assert [done.returncode for done in stopped] == [143, 143], stopped[0].stderr
    assert "checkpoint-1 written" in stopped[0].stdout
    assert [(tmp_path / name).read_text() for name in ("0", "1", "all")] == ["True"] * 3


@pytest.mark.parametrize(
    "moment, error, says",
    [
        ([STEP, 2], "torch.OutOfMemoryError('CUDA out of memory')", "memory is full with 2 clips a step: try"),
        (["transformers.Trainer._save_rng_state", 1], "script.RunError('it cannot go on')", "it cannot go on"),
    ],
)
def test_when_one_process_fails_all_end_with_its_message(moment, error, says, tmp_path, run_at, run_two):
    fail = f'if os.environ["RANK"] == "1": raise {error}'
    start = time.monotonic()
    first, second = run_at(tmp_path / "out", [*moment, fail], *IN_TWO, *QUICK, start=run_two)
    assert (first.returncode, second.returncode) == (1, 1) and time.monotonic() - start < 60
    assert "error (process 1): " in second.stderr and says in second.stderr
    assert "another process has ended; its own message says why" in first.stderr


def test_nodes_that_share_no_folder_train_from_a_stream_and_do_the_same(tmp_path, run_two):
    """Each node has a bad clip of its own to note down, and its own folders; the model is the first one's best."""
    for rank in "01":
        (tmp_path / rank).mkdir()
    flags = kills.flags("audio", "out", *IN_TWO, *QUICK, "--max_steps", 2, "--dataloader_num_workers", 1)
    at = flags.index("--max_train_samples")
    flags[at : at + 2] = "--streaming --accents swahili damara --num_proc 1 --gradient_checkpointing".split()

    def start():
        done = run_two(*flags, env={"LOCAL_RANK": 0}, cwd=tmp_path / "{rank}")
        return [process.returncode for process in done], done[0].stdout, done[0].stderr + done[1].stderr

    status, _, errors = start()
    assert status == [0, 0] and (tmp_path / "0/out/final/model.safetensors").exists(), errors
    assert not (tmp_path / "1/out/final").exists()
    noted = [(tmp_path / rank / "out/results/skipped_clips.csv").read_text().splitlines() for rank in "01"]
    assert noted[0][0] == noted[1][0] and re.search("undecodable|too short", "".join(noted[0] + noted[1]))
    status, said, errors = start()
    assert status == [0, 0] and "finished" in said, errors
    shutil.rmtree(tmp_path / "0/out/final")
    status, _, errors = start()
    assert status == [1, 1] and "find different checkpoints in out, which nodes have to share" in errors
