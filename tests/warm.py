"""The program in a process of its own each time, without the five seconds that a process takes to import libraries.

One process imports them, and forks for each run. A run ends as it does by itself: with its exit status or a signal, and
with what it does at exit. Tests of a start itself, and of launchers, start Python anew.
"""

import contextlib
import fcntl
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "finetune_medasr.py"
STARTER = """
import gc, json, os, signal, socket, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
import datasets, evaluate, librosa, matplotlib.pyplot, torch.utils.tensorboard
import finetune_medasr
from accelerate.state import AcceleratorState
from transformers import AutoProcessor, LasrForCTC, Trainer
finetune_medasr.parse_settings(["--use_cpu", "true"])  # imports the rest
AcceleratorState._reset_state(reset_partial_state=True)  # how many processes a run has is its own affair
gc.collect()
gc.freeze()  # or each run walks through all that is imported here, and copies the memory of it, above all at its exit
channel = socket.socket(fileno=int(sys.argv[1]))
while True:
    message, outputs, *_ = socket.recv_fds(channel, 65_536, 2)
    if not message:
        break
    child = os.fork()
    if not child:
        channel.close()
        os.setsid()
        signal.alarm(300)  # a run that hangs is killed
        for target, source in enumerate([os.open(os.devnull, os.O_RDONLY), *outputs]):
            os.dup2(source, target)
            os.close(source)
        sys.stdout = open(1, "w")
        folder, variables, *sys.argv = json.loads(message)
        os.chdir(folder)
        os.environ.update(variables)
        main = vars(sys.modules["__main__"])  # not a module of its own: exceptions of worker processes name this one
        main["__file__"] = sys.argv[0]
        exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"), main)
        sys.exit()
    for output in outputs:
        os.close(output)
    channel.send(str(child).encode())
    channel.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
"""


def open_pipe():
    """(read end, write end) of a pipe that holds all that a run prints; a file could not grow on a full disk."""
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 1 << 20)
    os.set_blocking(ends[0], False)  # a worker that outlives its program keeps the pipe open
    return ends


def read_now(pipe):
    """What is in a pipe, as subprocess gives text."""
    with io.FileIO(pipe) as file:
        return (file.readall() or b"").decode().replace("\r\n", "\n").replace("\r", "\n")


class WarmStarts(contextlib.AbstractContextManager):
    """Starts one run after the other, each in a new process and process group."""

    def __init__(self, env):
        env = {**env, "PYTHONPATH": str(SCRIPT.parent)}
        self.channel, end = socket.socketpair(type=socket.SOCK_SEQPACKET)
        command = [sys.executable, "-c", STARTER, str(end.fileno())]
        self.process = subprocess.Popen(command, env=env, pass_fds=[end.fileno()], stdout=subprocess.DEVNULL)
        end.close()

    def __exit__(self, *_):
        self.channel.close()
        self.process.wait(60)

    def start(self, *arguments, program=SCRIPT, patch="", cwd=".", env=()):
        """The process id of `python PROGRAM ARGUMENTS`, which is its group's too; the program is changed by `patch`."""
        self.command = list(map(str, [__file__ if patch else program, *arguments]))
        pipes = [open_pipe() for _ in ("stdout", "stderr")]
        self.outputs, inputs = zip(*pipes)
        variables = {name: str(value) for name, value in {**dict(env), "PATCH": patch}.items()}
        message = json.dumps([os.path.abspath(cwd), variables, *self.command])
        socket.send_fds(self.channel, [message.encode()], inputs)
        for end in inputs:
            os.close(end)
        return int(self.channel.recv(32))

    def wait(self):
        """The CompletedProcess of what was started."""
        status = int(self.channel.recv(32))
        return subprocess.CompletedProcess(self.command, status, *map(read_now, self.outputs))

    def run(self, *arguments, **options):
        self.start(*arguments, **options)
        return self.wait()


if __name__ == "__main__":  # the program, which $PATCH, Python, changes; workers that convert audio stay as they are
    import finetune_medasr as script

    exec(os.environ["PATCH"])
    sys.exit(script.main(sys.argv[1:]))
