"""The GPU of fake_gpu.cpp for Python: builds it, and gives `torch.cuda` or `torch.mps` what they ask a driver.

`install` comes before the first `import torch` of its process. What a run's GPU is, the environment says, when it is
first used: FAKE_GPU cuda or mps, FAKE_GPU_BYTES its memory, FAKE_GPU_CAPABILITY 8.0 or another, FAKE_GPU_ERROR the text
of the RuntimeError with which full memory shows instead of torch.OutOfMemoryError. FAKE_GPU_LOG is a file that gets a
line of JSON whenever the cache is emptied and at the end: the memory taken, the blocks of memory pinned so far, the
matrix products and convolutions so far in each precision.
"""

import atexit
import ctypes
import importlib.util
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

SOURCE = Path(__file__).with_suffix(".cpp")
LIBRARY = "fake_gpu.so"
# The first line of a program whose GPU it is.
INSTALL = f"import os, sys; sys.path.insert(0, {str(SOURCE.parent)!r}); import fake_gpu; "
INSTALL += "fake_gpu.install(os.environ['FAKE_GPU_LIBRARY'])\n"


def build_in(folder):
    """Compile the device into a folder; takes half a minute of one core."""
    folder.mkdir()
    torch = Path(importlib.util.find_spec("torch").origin).parent
    command = f"g++ -std=c++20 -O1 -fPIC -shared {SOURCE} -o {folder / LIBRARY}"
    command += f" -I{torch}/include -L{torch}/lib -ltorch_cpu -lc10 -Wl,-rpath,{torch}/lib"
    done = subprocess.run(command.split(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]


def install(library):
    """Put the device into this process."""
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import torch
    import torch._dynamo  # which optimizers import, and finds the stand-ins below strange

    device = torch.ops.fake_gpu
    names = ("limit", "allocated", "peak", "reserved")

    def memory(name):
        return lambda *_: dict(zip(names, device.memory()))[name]

    def note_memory():
        if path := os.environ.get("FAKE_GPU_LOG"):
            with open(path, "a") as file:
                print(json.dumps(dict(zip(names, device.memory())) | device.counts()), file=file)

    def empty_cache():
        device.empty_cache()
        note_memory()

    def capability(*_):
        return tuple(map(int, os.environ.get("FAKE_GPU_CAPABILITY", "8.0").split(".")))

    def properties(*_):
        major, minor = capability()
        total = memory("limit")() or 80 << 30
        return SimpleNamespace(name="Fake GPU", major=major, minor=minor, total_memory=total, multi_processor_count=1)

    def mem_get_info(*_):
        total = properties().total_memory
        return total - memory("reserved")(), total

    begun = []  # in which processes the device was used

    def lazy_init():
        if is_in_bad_fork():
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
        begun.append(os.getpid())
        torch.cuda._initialized = True

    def is_in_bad_fork():
        return bool(begun) and begun[0] != os.getpid()

    def manual_seed(seed):
        device.seed(seed % 2**63)

    def set_rng_state(state, *_):
        assert state.device.type == "cpu", "a state is a CPU tensor"
        device.set_random_state(state)

    make_storage = torch.UntypedStorage.__new__

    def new_storage(cls, *sizes, device="cpu", **options):
        # This PyTorch makes storages of the devices that it was built for.
        if torch.device(device).type == "cpu":
            return make_storage(cls, *sizes, **options)
        return torch.empty(*sizes, dtype=torch.uint8, device=device).untyped_storage()

    def nothing(*_, **__):
        pass

    torch.UntypedStorage.__new__ = new_storage
    atexit.register(note_memory)

    def rng_state(*_):
        return device.random_state()

    exchanges = ("_exchange_device", "_maybe_exchange_device")
    common = dict(
        is_available=lambda: True, device_count=lambda: 1, synchronize=nothing, empty_cache=empty_cache,
        manual_seed=manual_seed, get_rng_state=rng_state, set_rng_state=set_rng_state, _is_in_bad_fork=is_in_bad_fork,
    )  # fmt: skip
    cuda = dict(
        is_initialized=lambda: bool(begun), _lazy_init=lazy_init, init=lazy_init,
        current_device=lambda: 0, set_device=nothing, **dict.fromkeys(exchanges, lambda *_: 0),
        get_device_properties=properties, get_device_capability=capability, get_device_name=lambda *_: "Fake GPU",
        memory_allocated=memory("allocated"), max_memory_allocated=memory("peak"), memory_reserved=memory("reserved"),
        mem_get_info=mem_get_info, reset_peak_memory_stats=lambda *_: device.reset_peak(),
        manual_seed_all=manual_seed, get_rng_state_all=lambda: [rng_state()],
        set_rng_state_all=lambda states: list(map(set_rng_state, states)),
    )  # fmt: skip
    if os.environ.get("FAKE_GPU") == "mps":
        for name, value in common.items():
            setattr(torch.mps, name, value)
        torch.backends.mps.is_available = torch.backends.mps.is_built = lambda: True
    else:
        for name, value in (common | cuda).items():
            for module in (torch.cuda, torch.cuda.random, torch.cuda.memory):
                if hasattr(module, name):
                    setattr(module, name, value)
        torch.version.cuda = "12.8"
    return torch
