"""A run that is killed, stopped, starved of disk or misled, and the same command again."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import kills
import pytest
from conftest import TWO_PROCESSES, error_line, load_json, run_script

from finetune_medasr import MANIFEST, checkpoint_problem, main

# Runs the program; at the nth call of a function the process kills itself, or does what `action` says.
AT_A_MOMENT = """
import os, signal, sys
import finetune_medasr as script
import transformers

calls = 0

def act():
    {action}

def at(owner, name, count):
    original = getattr(owner, name)
    def replaced(*inputs, **options):
        global calls
        calls += 1
        if calls == count:
            act()
        return original(*inputs, **options)
    setattr(owner, name, replaced)

at({owner}, "{name}", {count})
sys.exit(script.main(sys.argv[1:]))
"""
MOMENTS = {  # name: (owner, function, which call)
    "in a step": ("script.CTCTraining", "training_step", 6),
    "while a checkpoint is written": ("transformers.Trainer", "_save_optimizer_and_scheduler", 2),
    "in an evaluation": ("script.DevSet", "rates", 2),
    "in the final scoring": ("script.Job", "write_down", 2),
    "while final/ is saved": ("script", "write_model_card", 1),
}
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture(scope="module")
def folder(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "audio").symlink_to(demo.audio)
    return folder


@pytest.fixture(scope="module")
def again(folder, warm):
    """again(output, flag, ...) -> (exit status, stdout, stderr) of the same command in a process of its own."""

    def again(output, *flags):
        done = warm.run(*kills.command(folder / "audio", output, *flags)[2:])
        return done.returncode, done.stdout, done.stderr

    return again


@pytest.fixture(scope="module")
def run_at(folder, warm):
    """run_at(moment, output) -> the process of a run in which `action` happens at a moment, or those of `start`."""

    def run_at(moment, output, action=KILL, start=warm.run, flags=()):
        owner, name, count = moment
        program = folder / "moment.py"
        program.write_text(AT_A_MOMENT.format(owner=owner, name=name, count=count, action=action))
        return start(*kills.command(folder / "audio", output, *flags)[2:], program=program, cwd=folder)

    return run_at


def with_torchrun(*arguments, program, cwd):
    env = {**kills.ENV, "PYTHONPATH": str(kills.SCRIPT.parent)}
    return run_script(*arguments, cwd=cwd, env=env, script=program, launcher=TWO_PROCESSES)


@pytest.fixture(scope="module")
def timed(folder):
    """(output folder, seconds) of a run that nothing disturbs, SpecAugment and dropout on, in a Python of its own."""
    return folder / "straight", kills.run_straight(folder / "audio", folder / "straight")


@pytest.fixture(scope="module")
def straight(timed):
    return timed[0]


def modified(output):
    return {path: path.stat().st_mtime_ns for path in output.rglob("*")}


# ---------------------------------------------------------------- going on


@pytest.mark.slow
def test_kills_at_random_moments_do_not_change_the_result(folder, timed, tmp_path):
    """In Pythons of their own: the first moments are those of the imports."""
    (tmp_path / "audio").symlink_to(folder / "audio")
    assert kills.survive(tmp_path, *timed, kills=3, seed=1)[0] == 3


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_a_moment_ends_as_if_it_had_not_been(folder, straight, moment, again, run_at):
    output = folder / moment.replace("/", "").replace(" ", "-")
    killed = run_at(MOMENTS[moment], output)
    assert killed.returncode == -signal.SIGKILL
    assert not (output / "final").exists(), "a half-written folder has its name"
    status, out, errors = again(output)
    assert status == 0, errors
    assert kills.result(output) == kills.result(straight)
    assert "as it is on the test split" not in out, "the baseline was there already"
    assert ("left aside" in errors) == (moment == "while a checkpoint is written")
    assert not list(output.glob("*.partial")) and not list(output.glob("*.old"))


@pytest.mark.slow
def test_an_older_checkpoint_stays_until_the_next_is_complete(run_at, tmp_path):
    """Killed when the list of its files, by which a checkpoint counts, is about to be written."""
    flags = ["--skip_baseline", "--save_total_limit", "1", "--metric_for_best_model", "loss"]  # the newest is best
    killed = run_at(("script", "write_text", 5), tmp_path / "out", flags=flags)
    assert killed.returncode == -signal.SIGKILL
    assert checkpoint_problem(tmp_path / "out/checkpoint-4") == "it was not finished"
    assert checkpoint_problem(tmp_path / "out/checkpoint-2") == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment, losses, evaluations",
    [
        (("script.ProgressLines", "on_log", 5), [1, 2, 3, 4], [2]),
        (("script.CTCTraining", "_save_checkpoint", 1), [1, 2], [2]),
    ],
)
def test_what_a_killed_run_has_logged_is_in_tensorboard(tmp_path, moment, losses, evaluations, run_at):
    """Killed right after a loss, and right after an evaluation, which writes texts too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = run_at(moment, tmp_path / "out", flags=["--skip_baseline"])
    assert killed.returncode == -signal.SIGKILL
    events = EventAccumulator(str(tmp_path / "out/runs")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == losses
    assert [event.step for event in events.Scalars("eval/wer")] == evaluations
    assert [event.step for event in events.Tensors("eval/transcriptions/text_summary")] == evaluations


@pytest.mark.slow
@pytest.mark.parametrize("number, moment", [(signal.SIGTERM, "in a step"), (signal.SIGINT, "in an evaluation")])
def test_a_signal_leaves_a_checkpoint_to_go_on_from(folder, straight, number, moment, again, run_at):
    output = folder / f"signal-{number}"
    stopped = run_at(MOMENTS[moment], output, f"os.kill(os.getpid(), {int(number)})")
    assert stopped.returncode == 128 + number
    message = error_line(stopped.stderr)
    assert signal.Signals(number).name in message and "the same command goes on" in message
    assert not (output / "final").exists()
    status, out, errors = again(output)
    assert status == 0 and re.search(r"going on from \S+, update \d of 8", out), errors
    assert kills.result(output) == kills.result(straight)


@pytest.mark.slow
def test_a_stopped_run_exits_in_seconds(folder):
    process = subprocess.Popen(
        kills.command(folder / "audio", folder / "timed", "--max_steps", "5000"),
        env=kills.ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if "dev WER" in line:
            break
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and time.monotonic() - start < 30, rest
    assert re.search(r"checkpoint-\d+ written", rest)


@pytest.mark.slow
def test_a_finished_run_says_so_and_touches_nothing(straight, again):
    before = modified(straight)
    start = time.monotonic()
    status, out, errors = again(straight)
    assert (status, errors) == (0, "") and time.monotonic() - start < 30
    assert "finished" in out and "| WER " in out
    assert modified(straight) == before


@pytest.mark.slow
def test_more_updates_go_on_and_overwrite_starts_anew(folder, straight, again):
    output = folder / "more"
    shutil.copytree(straight, output)
    status, out, _ = again(output, "--max_steps", "10")
    assert status == 0 and re.search(r"checkpoint-8, update 8 of 10", out)
    assert load_json(output / "checkpoint-10/trainer_state.json")["global_step"] == 10
    status, out, _ = again(output, "--overwrite_output_dir")
    assert status == 0 and "going on" not in out
    assert kills.result(output) == kills.result(straight)
    assert not (output / "checkpoint-10").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--accents", "zulu"], ["--accents", "zulu"]),
        (["--target_text", "words"], ["--target_text", "as_written", "words"]),
        (["--seed", "7"], ["--seed 42", "7"]),
        (["--max_train_samples", "12"], ["--max_train_samples 16", "12"]),
        (["--per_device_train_batch_size", "8"], ["batch x accumulation steps x processes of 4", "8"]),
    ],
)
def test_another_run_is_refused_with_the_difference(folder, straight, flags, parts, capfd):
    before = modified(straight)
    status = main([*kills.command(folder / "audio", straight)[2:], *flags])
    message = error_line(capfd.readouterr().err)
    assert status == 2 and all(part in message for part in (*parts, "--overwrite_output_dir")), message
    assert modified(straight) == before


@pytest.mark.parametrize("name", ["final/notes.txt", "checkpoint-500/pytorch_model.bin"])
def test_what_no_run_has_made_is_not_deleted(name, tmp_path, capfd):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    assert main(kills.command(tmp_path / "audio", tmp_path / "out")[2:]) == 2
    message = error_line(capfd.readouterr().err)
    assert f"out holds {file.parent.name}, which no run of this program has made" in message
    assert file.read_text() == "mine" and os.listdir(tmp_path / "out") == [file.parent.name]


# ---------------------------------------------------------------- checkpoints that are not whole


@pytest.mark.slow
def test_a_missing_or_cut_file_of_a_checkpoint_is_named(straight, tmp_path):
    names = [path.name for path in (straight / "checkpoint-8").iterdir()]
    needed = "model.safetensors optimizer.pt scheduler.pt rng_state.pth trainer_state.json config.json tokenizer.json"
    assert {MANIFEST, *needed.split()} <= set(names)
    for name in names:
        for cut in (False, True):
            folder = tmp_path / f"{name}-{cut}"
            shutil.copytree(straight / "checkpoint-8", folder)
            assert checkpoint_problem(folder) == ""
            content = (folder / name).read_bytes()
            (folder / name).unlink()
            if cut:
                (folder / name).write_bytes(content[: len(content) // 2])
            expected = "not finished" if name == MANIFEST else f"{name} is {'cut' if cut else 'missing'}"
            assert expected in checkpoint_problem(folder)


@pytest.mark.slow
def test_the_newest_complete_checkpoint_is_taken(folder, straight, again):
    output = folder / "damaged"
    shutil.copytree(straight, output)
    shutil.rmtree(output / "final")
    (output / "checkpoint-8/optimizer.pt").unlink()
    weights = (output / "checkpoint-6/model.safetensors").read_bytes()
    (output / "checkpoint-6/model.safetensors").write_bytes(weights[:1000])
    status, out, errors = again(output)
    assert status == 0, errors
    assert "checkpoint-8 is left aside: optimizer.pt is missing" in errors
    assert "checkpoint-6 is left aside: model.safetensors is cut" in errors
    assert "going on from" in out and "checkpoint-4, update 4 of 8" in out
    assert kills.result(output) == kills.result(straight)


@pytest.mark.slow
def test_a_moved_output_folder_keeps_its_best_model(folder, straight, again):
    output = folder / "elsewhere"
    shutil.copytree(straight, output)
    shutil.rmtree(output / "final")
    hidden = straight.rename(folder / "hidden")
    try:
        status, _, errors = again(output)
    finally:
        hidden.rename(straight)
    assert status == 0, errors
    assert kills.result(output) == kills.result(straight)


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(folder, straight, again):
    """A limit on the size of files, between that of the weights and that of the optimizer's state."""
    output = folder / "full"
    limited = ["bash", "-c", 'ulimit -f 4500; exec "$0" "$@"', sys.executable]
    done = run_script(*kills.command(folder / "audio", output)[2:], cwd=folder, env=kills.ENV, launcher=limited)
    assert done.returncode == 1
    message = error_line(done.stderr)
    assert "checkpoint-2 cannot be written" in message and "free some disk" in message
    assert not list(output.glob("checkpoint-*")) and not (output / "final").exists()
    assert again(output)[0] == 0
    assert kills.result(output) == kills.result(straight)


FULL_MOMENTS = {  # what is written then: (owner, function, which call)
    "run.json": ("script.RunState", "save", 1),
    "the baseline's texts": ("script.RunState", "save", 2),
    "a log": ("script.CTCTraining", "log", 3),
    "results/": ("script", "write_results", 1),
    "a picture": ("script", "draw_pictures", 1),
    "final/": ("script", "write_model_card", 1),
    "the test scores' curves": ("script", "write_test_scores_to_tensorboard", 1),
    "that it is done": ("script.RunState", "save", 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", FULL_MOMENTS)
def test_a_disk_that_is_full_from_a_moment_on_is_named(folder, straight, moment, again, run_at):
    """From then on no file can grow, as on a full disk; afterwards there is room again."""
    output = folder / f"full-{list(FULL_MOMENTS).index(moment)}"
    action = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))"
    full = run_at(FULL_MOMENTS[moment], output, action)
    assert full.returncode == 1
    message = error_line(full.stderr)
    assert "cannot be written" in message and "free some disk; the same command goes on" in message
    left = [path for path in output.rglob("*") if re.search("[.](tmp|partial)$", path.name)]
    assert not left, "what is half-written takes room"
    status, _, errors = again(output)
    assert status == 0, errors
    assert kills.result(output) == kills.result(straight)


@pytest.mark.slow
def test_a_run_that_filled_the_memory_goes_on_with_half_the_clips_a_step(tmp_path, again, run_at):
    flags = ["--per_device_train_batch_size", "auto", "--save_steps", "2"]
    full = "import torch; raise torch.OutOfMemoryError('CUDA out of memory')"
    done = run_at(("script.CTCTraining", "training_step", 5), tmp_path / "out", full, flags=flags)
    message = error_line(done.stderr)
    assert done.returncode == 1 and "the same command goes on with 4 a step and 2 accumulation steps" in message
    status, out, errors = again(tmp_path / "out", *flags)
    assert status == 0, errors
    assert re.search(r"going on from \S+, update 4 of 8", out)
    assert "8 clips an update and device: 4 a step x 2 accumulation steps" in out


# ---------------------------------------------------------------- what is not finite, and who else fails


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 8])
def test_a_model_that_is_not_finite_is_never_saved(folder, tmp_path, steps, capfd):
    flags = ["--learning_rate", "1e300", "--warmup_steps", "0", "--max_steps", str(steps), "--eval_steps", "8"]
    flags += ["--save_steps", "8", "--skip_baseline"]
    status = main([*kills.command(folder / "audio", tmp_path / "out")[2:], *flags])
    message = error_line(capfd.readouterr().err)
    assert status == 1 and "not finite at update" in message and "--learning_rate" in message
    assert not (tmp_path / "out/final").exists() and not list((tmp_path / "out").glob("checkpoint-*/model.safetensors"))


@pytest.mark.slow
def test_the_clips_of_a_gradient_that_is_not_finite_are_named(tmp_path, run_at):
    spoil = "script.CTCTraining._get_grad_norm.__globals__['np'].isfinite = lambda value: False"
    done = run_at(("script.CTCTraining", "training_step", 4), tmp_path / "out", spoil)
    assert done.returncode == 1
    message = error_line(done.stderr)
    assert "the gradient is not finite at update 4" in message
    assert len(re.findall(r"[0-9a-f-]{36}/[0-9a-f]{32}\.ogg", message)) == 4


IN_TWO = ["--per_device_train_batch_size", "2", "--ddp_backend", "gloo"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", [("script.CTCTraining", "training_step", 2), ("transformers.Trainer", "_save_rng_state", 1)]
)
def test_when_one_process_fails_all_end_with_its_message(moment, tmp_path, run_at):
    (tmp_path / "failed").mkdir()
    fail = f"""if os.environ["RANK"] == "1":
        import time
        open("{tmp_path}/failed/" + str(time.time()), "w")
        raise script.RunError("the second process cannot go on")"""
    done = run_at(moment, tmp_path / "out", fail, with_torchrun, [*IN_TWO, "--skip_baseline"])
    assert done.returncode != 0 and time.time() - float(os.listdir(tmp_path / "failed")[0]) < 60
    assert "error (process 1): the second process cannot go on" in done.stderr
    assert not re.search("unexpected|cannot be written", done.stderr), "the others say no more than that one is gone"


@pytest.mark.slow
def test_a_signal_to_the_launcher_leaves_a_checkpoint_to_go_on_from(folder, tmp_path, run_at, run_two):
    """As Slurm sends it: to the launcher, which passes it on, and to a process itself."""
    straight = kills.command(folder / "audio", tmp_path / "straight", *IN_TWO)[2:]
    assert [done.returncode for done in run_two(*straight)] == [0, 0]
    stop = """if os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getppid(), signal.SIGTERM)"""
    moment, output = ("script.CTCTraining", "training_step", 5), tmp_path / "stopped"
    stopped = run_at(moment, output, stop, with_torchrun, IN_TWO)
    assert "error: stopped by SIGTERM: the same command goes on" in stopped.stderr
    assert "checkpoint-5 written" in stopped.stdout and not checkpoint_problem(output / "checkpoint-5")
    done, second = run_two(*kills.command(folder / "audio", output, *IN_TWO)[2:])
    assert (done.returncode, second.returncode) == (0, 0) and "checkpoint-5, update 5 of 8" in done.stdout, done.stderr
    assert kills.result(output) == kills.result(tmp_path / "straight")


@pytest.mark.slow
def test_no_process_leaves_before_a_checkpoint_is_complete(tmp_path, run_at, run_two):
    """The second process writes its part late, the first one the list of all parts: neither may go ahead alone."""
    stop = f"""import atexit, time
    save, write = transformers.Trainer._save_rng_state, script.write_text
    manifest = "{tmp_path}/out/checkpoint-1/" + script.MANIFEST

    def save_late(*inputs):
        if os.environ["RANK"] == "1":
            time.sleep(3)
        save(*inputs)

    def write_late(path, text):
        if str(path) == manifest:
            time.sleep(3)
        write(path, text)

    transformers.Trainer._save_rng_state, script.write_text = save_late, write_late
    note = lambda: open("{tmp_path}/" + os.environ["RANK"], "w").write(str(os.path.exists(manifest)))
    atexit.register(note)
    os.kill(os.getpid(), signal.SIGTERM)"""
    moment = ("script.CTCTraining", "training_step", 1)
    stopped, _ = run_at(moment, tmp_path / "out", stop, run_two, [*IN_TWO, "--skip_baseline"])
    assert "checkpoint-1 written" in stopped.stdout, stopped.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["True", "True"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(load_json(tmp_path / "out/checkpoint-1" / MANIFEST))


@pytest.mark.slow
def test_nodes_that_do_not_share_the_output_folder_do_the_same(folder, tmp_path, run_two):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, finetune_medasr\nos.chdir(os.environ['RANK'])\nsys.exit(finetune_medasr.main(sys.argv[1:]))\n"
    )
    for rank in "01":
        (tmp_path / rank).mkdir()
    flags = kills.command(folder / "audio", "out", *IN_TWO, "--max_steps", "2")[2:]

    def again():
        done = run_two(*flags, program=program, cwd=tmp_path)
        return [process.returncode for process in done], done[0]

    assert again()[0] == [0, 0]
    status, done = again()
    assert status == [0, 0] and "finished" in done.stdout
    first = tmp_path / "0/out"
    shutil.rmtree(first / "final")
    status, done = again()
    assert status == [1, 1] and "nodes have to share it to go on from one" in error_line(done.stderr)
    shutil.rmtree(first / "checkpoint-2")
    status, done = again()  # with the baseline of run.json, which only the first node has
    assert status == [0, 0] and "going on" not in done.stdout and (first / "final/config.json").is_file(), done.stderr


@pytest.mark.slow
def test_processes_that_a_cluster_starts_end_with_143(folder, tmp_path):
    """Started without torchrun, as srun does, each with its rank in the environment."""
    processes = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": 29_900 + os.getpid() % 90}  # fmt: skip
        processes.append(subprocess.Popen(
            kills.command(folder / "audio", tmp_path / "out", *IN_TWO, "--skip_baseline", "--max_steps", "5000"),
            env={**kills.ENV, **{name: str(value) for name, value in place.items()}},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ))  # fmt: skip
    for line in processes[0].stdout:
        if "dev WER" in line:
            break
    for process in processes:
        process.send_signal(signal.SIGTERM)
    rest = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], rest
    assert re.search(r"checkpoint-\d+ written", rest[0])


@pytest.mark.parametrize("rank", ["0", None])
def test_a_second_signal_ends_the_program_unless_a_launcher_passes_it_on(rank):
    """Of two processes each gets a signal twice, from its terminal or cluster and from torchrun."""
    program = """
import os, signal
import finetune_medasr as script
script.STOP_SIGNALS.install()
with script.STOP_SIGNALS.deferring():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    print("went on", script.STOP_SIGNALS.number)
"""
    env = {**kills.ENV, "PYTHONPATH": str(kills.SCRIPT.parent), **({"RANK": rank} if rank else {})}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    if rank:
        assert (done.returncode, done.stdout) == (0, "went on 2\n"), done.stderr
    else:
        assert (done.returncode, done.stdout) == (130, "")
        assert error_line(done.stderr) == "ended by a second SIGINT"


def test_a_usage_error_is_one_line_for_all_processes(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    assert main(["--domains", "clinicl"]) == 2
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------- preparation


@pytest.mark.slow
def test_ctrl_c_stops_the_preparation_in_seconds(hub_corpus, tmp_path):
    command = [sys.executable, kills.SCRIPT, "--prepare_only", "--num_proc", 2, "--dataset", hub_corpus,
               "--data_dir", tmp_path / "audio", "--output_dir", tmp_path / "out"]  # fmt: skip
    process = subprocess.Popen(
        list(map(str, command)), start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list(tmp_path.glob("audio/*/*.tmp")):
        os.sched_yield()
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - start < 8
    assert "stopped by SIGINT" in error_line(errors)
    assert len(list(tmp_path.glob("audio/*/*.arrow"))) < len(list(hub_corpus.rglob("*.tar.gz")))


def test_a_local_archive_or_csv_that_was_repaired_is_converted_again(tmp_path, capfd):
    from datasets import Dataset

    corpus, audio = tmp_path / "corpus", tmp_path / "audio"
    for kind in ("audio", "transcripts"):
        shutil.copytree(kills.HERE / "fixtures/corpus" / kind / "damara", corpus / kind / "damara")
    archive = corpus / "audio/damara/dev/dev_damara_0.tar.gz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])

    def prepared():
        flags = ["--prepare_only", "--num_proc", "1", "--dataset", corpus, "--data_dir", audio]
        assert main([*map(str, flags), "--output_dir", str(tmp_path / "out")]) == 0, capfd.readouterr().err
        clips = Dataset.from_file(str(audio / "dev/dev_damara_0.arrow"))
        return {clip["clip"]: clip["text"] for clip in clips if not clip["problem"]}

    cut, others = prepared(), modified(audio / "train")
    archive.write_bytes(whole)
    mended = prepared()
    assert len(cut) < len(mended) and modified(audio / "train") == others
    csv_file = corpus / "transcripts/damara/dev.csv"
    first = next(iter(mended.values())).strip()
    csv_file.write_text(csv_file.read_text().replace(first, "Other words."))
    assert "Other words." in " ".join(prepared().values())
