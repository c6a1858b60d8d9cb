#!/usr/bin/env python3
"""CPU tensors that pose as cuda:0, so that all that needs a GPU runs, with numbers, without one.

    tests/gpu/posing.py -m pytest tests/gpu -q       # or a script, in the place of python
    PYTHON=tests/gpu/posing.py bench/gpu_run.sh

What the library and its tests ask about a GPU is answered as on an H100: is_cuda, device, dtypes of
operands, plans of rows, 16-bit GEMMs with fp32 results. Triton's kernels run in its interpreter,
CUDA's emulated. A tensor is posed if it was made on "cuda" or from one that was; a mix with others
is an error, as on a GPU. Nothing here says anything about time, memory, streams or the hardware.
"""

import contextlib
import functools
import os
import runpy
import sys
import time
import types
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "gpu")]
os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("RLSD_TEST_DEVICE", "posing")

import conftest  # noqa: E402, F401  has the interpreter round as a GPU does
import emulation  # noqa: E402
import torch  # noqa: E402
from torch._library.custom_ops import OPDEFS  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from rlsd_kernels import extension, logprob  # noqa: E402

COPIES = {"aten::copy_", "aten::_to_copy"}
FACTORIES = ("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full",
             "full_like", "linspace", "logspace", "ones", "ones_like", "rand", "rand_like",
             "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like")
METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")
WIDE = {torch.bfloat16, torch.float16}
FROM_HOST = {"as_tensor", "new_tensor", "tensor"}
TO_HOST = {"aten::_local_scalar_dense", "aten::masked_select", "aten::nonzero"}
_posed = {}  # address of a storage -> weak reference, which keeps the address from another's use


def posed(x):
    return type(x).__name__ != "FakeTensor" and x.untyped_storage()._cdata in _posed


def pose(x, yes=True):
    """x, from now on a tensor of cuda:0, or of the CPU again."""
    storage = x.untyped_storage()
    if not yes:
        _posed.pop(storage._cdata, None)
    elif storage._cdata not in _posed:
        _posed[storage._cdata] = StorageWeakRef(storage)
        if len(_posed) % 4096 == 0:
            for key in [k for k, ref in _posed.items() if ref.expired()]:
                del _posed[key]
    return x


def is_gpu(device):
    """None of a device that is neither a GPU nor the CPU."""
    kind = "cuda" if isinstance(device, int) else torch.device(device).type
    return {"cuda": True, "cpu": False}.get(kind)


@contextlib.contextmanager
def capture():
    """As if a CUDA graph were captured, where nothing may come from the host or go there."""
    real, Posing.capturing = torch.cuda.is_current_stream_capturing, True
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing, Posing.capturing = real, False


def refuse(what):
    if Posing.capturing:
        raise RuntimeError(f"{what} between host and device while a CUDA graph is captured")


class Posing(TorchDispatchMode):
    """Results of posed tensors are posed; the bodies of custom ops run under the mode as well."""

    capturing = False

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        if name in OPDEFS:
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = [posed(x) for x in given]
        if any(here) and not all(here) and name not in COPIES:
            aten, index = name.startswith("aten::"), name.startswith("aten::index")
            for i, x in enumerate(given):  # a GPU takes numbers, and indices, from the CPU
                if not here[i] and not (aten and (x.dim() == 0 or (index and i > 0))):
                    raise RuntimeError(
                        f"Expected all tensors to be on the same device, but {name} has "
                        f"{tuple(x.shape)} on the CPU beside cuda:0."
                    )
        masked = name.startswith("aten::index") and any(x.dtype == torch.bool for x in given[1:])
        if any(here) and (name in TO_HOST or masked or (name in COPIES and not all(here))):
            refuse(name)
        result = func(*args, **kwargs)
        if any(here):
            for x in tree_leaves(result):
                if isinstance(x, torch.Tensor) and (name != "aten::copy_" or here[0]):
                    pose(x)
        return result


def move(x, device):
    if is_gpu(device) != posed(x):
        refuse("a move")
    return x if is_gpu(device) == posed(x) else pose(x.clone(), is_gpu(device))


def factory(real):
    @functools.wraps(real)
    def made(*args, device=None, pin_memory=False, **kwargs):
        there = device is None and isinstance(args[0], torch.Tensor) and posed(args[0])
        if real.__name__ in FROM_HOST and (there or (device is not None and is_gpu(device))):
            refuse(real.__name__)
        if device is None or is_gpu(device) is None:
            return real(*args, device=device, **kwargs)
        return pose(real(*args, device="cpu", **kwargs), is_gpu(device))

    return made


def to(real):
    @functools.wraps(real)
    def moved(x, *args, device=None, **kwargs):
        first = args[0] if args else None
        if isinstance(first, torch.Tensor):
            device, args = first.device, (first.dtype, *args[1:])
        elif isinstance(first, (str, torch.device, int)):
            device, args = first, args[1:]
            args = args[1:] if args[:1] == (None,) else args  # as nn.Module gives no dtype
        if device is not None and is_gpu(device) is None:
            return real(x, device, *args, **kwargs)
        x = x if device is None else move(x, device)
        return real(x, *args, **kwargs) if args or kwargs else x

    return moved


def product(real):
    """mm, addmm, bmm with out_dtype, or of 16 bits: summed in fp32 and rounded once."""
    @functools.wraps(real)
    def multiplied(*args, out_dtype=None, out=None, **kwargs):
        if not (args[0].dtype in WIDE or args[-1].dtype in WIDE) or not posed(args[0]):
            return real(*args, **({} if out is None else {"out": out}), **kwargs)
        found = real(*(x.float() for x in args), **kwargs).to(out_dtype or args[-1].dtype)
        return found if out is None else out.copy_(found)

    return multiplied


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


class Event:
    def __init__(self, **_):
        self.at = 0.0

    def record(self, *_):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def install():
    """From here on this process has a GPU."""
    cpu = torch.device("cpu")
    device_of = torch.Tensor.device.__get__
    torch.Tensor.is_cuda = property(posed)
    torch.Tensor.device = property(
        lambda x: torch.device("cuda", 0) if posed(x) else device_of(x))
    torch.Tensor.get_device = lambda x: x.device.index if posed(x) else -1
    for name in FACTORIES:
        setattr(torch, name, factory(getattr(torch, name)))
    for name in METHODS:
        setattr(torch.Tensor, name, factory(getattr(torch.Tensor, name)))
    torch.Tensor.to = to(torch.Tensor.to)
    tolist = torch.Tensor.tolist

    def listed(x):
        if posed(x):
            refuse("tolist")
        return tolist(x)

    torch.Tensor.tolist = listed
    torch.Tensor.cuda = lambda x, *_, **__: move(x, "cuda")
    torch.Tensor.cpu = lambda x, *_, **__: move(x, cpu)
    for name in ("mm", "addmm", "bmm"):
        setattr(torch, name, product(getattr(torch, name)))
    torch.Generator = Generator

    enter = torch.autocast.__init__

    def autocast(self, device_type, *args, **kwargs):
        enter(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    torch.autocast.__init__ = autocast
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        real = getattr(torch, name)
        setattr(torch, name, lambda *_, real=real: real("cpu"))

    properties = types.SimpleNamespace(
        name="a CPU that poses as an H100", major=9, minor=0, multi_processor_count=3,
        total_memory=80 * 2**30, L2_cache_size=2**20,
    )
    nothing = {"synchronize", "empty_cache", "set_sync_debug_mode", "reset_peak_memory_stats",
               "manual_seed", "manual_seed_all", "set_rng_state_all", "init"}
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "get_device_name": properties.name, "get_device_properties": properties,
        "get_device_capability": (9, 0), "is_current_stream_capturing": False,
        "is_bf16_supported": True, "get_rng_state_all": [], "max_memory_allocated": 0,
        "memory_allocated": 0, "current_stream": None,
    } | dict.fromkeys(nothing)
    for name, answer in answers.items():
        assert hasattr(torch.cuda, name), f"PyTorch has no torch.cuda.{name}"
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.device = torch.cuda.device_of = lambda *_: contextlib.nullcontext()
    torch.cuda.Event = Event
    torch.version.cuda = torch.version.cuda or "13.0"

    from rlsd_kernels import triton_impl  # noqa: F401  its kernels, for the interpreter

    logprob._triton_interpreted = lambda: False  # tensors of the CPU are as far off as on a GPU
    extension.status, extension.load = lambda: "ok", emulation.operators
    Posing().__enter__()


def main():
    sys.modules["posing"] = sys.modules[__name__]  # for what is run in the place of __main__
    install()
    if sys.argv[1:2] == ["-m"]:
        sys.argv = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif sys.argv[1:2] == ["-c"]:
        code, sys.argv = sys.argv[2], ["-c", *sys.argv[3:]]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
