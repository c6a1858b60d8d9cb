"""What can be proven of the GPU path without a GPU, by a CUDA build of torch; see rehearse.sh.

    python tests/gpu/rehearse.py [build kernels memory]

build    csrc for sm_80, 90a and 100 by nvcc, linked, loaded, its schemas
kernels  every public op on fake CUDA tensors: dtypes, options, shapes, workspaces, implementations.
         PyTorch checks dtypes, shapes and devices of each of its own ops, GEMMs with fp32 results
         included; each launch of Triton goes through its real front end (binding, specialisation,
         compilation to machine code), each op of csrc through its schema
memory   peak bytes beyond the inputs and the GEMMs of a step, counted on the storages of such
         tensors: no caching allocator, no workspace of cuBLAS
"""

import collections
import contextlib
import itertools
import logging
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton  # noqa: E402
from torch._library.custom_ops import OPDEFS  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from rlsd_kernels import (  # noqa: E402
    RLSDLossConfig,
    extension,
    fused_linear_rlsd_loss,
    linear_distillation_loss,
    linear_log_probs,
    logprob,
    rlsd_loss,
    triton_impl,
)

ARCHS = (80, 90, 100)
IMPLS = ("torch", "triton", "cuda")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GIB = 2**30


def asked_by(*names):
    """Whether the innermost file of the library on the stack is one of these."""
    frame = sys._getframe()
    while Path(frame.f_code.co_filename).parent != ROOT / "rlsd_kernels":
        frame = frame.f_back
    return Path(frame.f_code.co_filename).stem in names


def addmm_is_misread():
    """Fake tensors of torch 2.11 take the dtype that addmm is asked for to be its factor beta."""
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    with FakeTensorMode():
        a, b = gpu(2, 2), gpu(2, 2, dtype=torch.bfloat16)
        try:
            torch.addmm(a, b, b, out=a, out_dtype=torch.float32)
        except TypeError:
            return True
    return False


class Ledger(TorchDispatchMode):
    """Fake CUDA tensors under the ops: runs their bodies, stands in for what a device would tell
    the host, counts bytes and GEMMs."""

    def __init__(self, live=1.0):
        super().__init__()
        self.live, self.held, self.now, self.peak = live, {}, 0, 0
        self.gemms, self.flop, self.kernels = collections.Counter(), 0, collections.Counter()
        self.counted = 0  # rows of the mask that was summed last

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        if name in OPDEFS:
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if name.startswith("rlsd_cuda::"):
            assert all(x.is_cuda for x in tensors), f"{name} got a tensor of the CPU"
            self.kernels[name] += 1
            return None
        if name == "aten::nonzero":  # live rows; or, to an implementation, rows to do again: none
            (x,) = tensors
            rows = round(len(x) * self.live) if asked_by("pipeline", "distillation") else 0
            result = torch.empty(rows, 1, dtype=torch.int64, device=x.device)
        elif name in ("aten::item", "aten::_local_scalar_dense"):
            if tensors[0].is_cuda and asked_by("pipeline"):  # the one wait: how many rows are live
                return round(self.counted * self.live)
            assert not tensors[0].is_cuda, "a number of the device is read by the host"
            return 0.5 if tensors[0].is_floating_point() else 0
        elif ADDMM_IS_MISREAD and func is torch.ops.aten.addmm.dtype_out:
            result = kwargs["out"]
        else:
            result = func(*args, **kwargs)
            if name == "aten::sum" and tensors[0].dtype == torch.bool:
                self.counted = len(tensors[0])
        if name.split("::")[1] in ("mm", "addmm", "addmm_", "bmm"):
            a, b = args[:2] if name.split("::")[1] in ("mm", "bmm") else args[1:3]
            m, k, n = (*a.shape[-2:], b.shape[-1])
            self.flop += 2 * m * k * n
            self.gemms[m, k, n] += 1
        self.count(result)
        return result

    def count(self, result):
        for key in [k for k, (ref, _) in self.held.items() if ref.expired()]:
            self.now -= self.held.pop(key)[1]
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.is_cuda:
                storage = x.untyped_storage()
                if storage._cdata not in self.held:
                    self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)


class Pointer:
    """What Triton reads of a tensor: its dtype and where it lies."""

    def __init__(self, x):
        self.dtype, self.offset = x.dtype, x.storage_offset() * x.itemsize

    def data_ptr(self):
        return 2**20 + self.offset  # allocations start at multiples of 512

    def ptr_range(self):
        return 2**31


class Launches:
    """Triton's launches on fake tensors: each is bound, specialised and compiled for the arch."""

    def __init__(self):
        self.arch, self.compiled, self.count = 90, {}, 0
        # A device's number is its architecture: Triton caches by device.
        driver.set_active(types.SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", self.arch, 32),
            get_current_device=lambda: self.arch, get_current_stream=lambda device: 0,
        ))
        real = JITFunction.run

        def run(kernel, *args, grid, warmup, **kwargs):
            for x in args:
                assert not isinstance(x, torch.Tensor) or x.is_cuda, f"{kernel} on a CPU tensor"
            given = [Pointer(x) if isinstance(x, torch.Tensor) else x for x in args]
            assert 0 < grid[0] < 2**31 and all(0 < n < 2**16 for n in grid[1:]), grid
            built = real(kernel, *given, grid=grid, warmup=True, **kwargs)
            self.count += 1
            self.compiled[self.arch, id(built)] = kernel.__name__, built
            return built

        JITFunction.run = run


def ready():
    """Patches under which the ops take fake tensors as those of a GPU, as available as can be."""
    stack = contextlib.ExitStack()
    for target, name, value in (
        (logprob, "_triton_status", lambda device: "ok"), (extension, "status", lambda: "ok"),
        (extension, "load", lambda: torch.ops.rlsd_cuda),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "device_of", lambda x: contextlib.nullcontext()),
        (triton_impl, "_arch", lambda x: LAUNCHES.arch),
        (triton_impl, "_processors", lambda x: 132),
    ):
        stack.enter_context(mock.patch.object(target, name, value))
    return stack


def gpu(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


def backward(output, *upstream):
    """The gradients of an op's inputs, by its own backward: autograd's engine wants a real GPU."""
    node = output.grad_fn
    while not hasattr(node, "apply"):
        node = node.next_functions[0][0]
    with torch.no_grad():
        return node.apply(*upstream)


def fused(impl, dtype, n, v, h, *, frozen=False, config=None, optional=(), workspace=None, **call):
    """One step of fused_linear_rlsd_loss, gradients included."""
    weight = gpu(v, h, dtype=dtype).requires_grad_(not frozen)
    tokens = {k: gpu(n) for k in ("old_log_probs", "ref_log_probs", "loss_weights")
              if k in (*optional, "loss_weights")}
    if "reweight_mask" in optional:
        tokens["reweight_mask"] = gpu(n, dtype=torch.bool)
    if "bias" in optional:
        tokens["bias"] = gpu(v, dtype=dtype).requires_grad_()
    if "teacher_weight" in optional:
        tokens["teacher_weight"] = gpu(v, h + 16, dtype=dtype)
    wide = h + 16 if "teacher_weight" in optional else h
    if "teacher_log_probs" in optional:
        tokens["teacher_log_probs"] = gpu(n)
    else:
        tokens["teacher_hidden"] = gpu(n, wide, dtype=dtype)
    hidden = gpu(n, h, dtype=dtype).requires_grad_()
    ids, advantages = gpu(n, dtype=torch.int64), gpu(n)
    lam = gpu(1)

    def step():
        out = fused_linear_rlsd_loss(
            hidden, weight, ids, advantages, **tokens, rlsd_lambda=lam, impl=impl,
            max_workspace_bytes=workspace, config=config or RLSDLossConfig(), **call,
        )
        return out, backward(out.loss, gpu())

    return step, hidden, weight


OPTIONS = {
    "on-policy": {},
    "off-policy": {"optional": ("old_log_probs",)},
    "softcap": {"optional": ("old_log_probs", "bias"), "final_logit_softcapping": 30.0},
    "all": {
        "optional": ("old_log_probs", "ref_log_probs", "reweight_mask", "bias"),
        "config": RLSDLossConfig(beta=0.1, entropy_coef=0.05, temperature=0.7,
                                 rlsd_negative_only=True),
        "logit_scale": 0.4, "final_logit_softcapping": 3.0, "return_entropy": True,
    },
    "delta from old": {"optional": ("old_log_probs",),
                       "config": RLSDLossConfig(rlsd_delta_source="old_log_probs", delta=None)},
    "teacher scored": {"optional": ("teacher_log_probs",)},
    "teacher's own head": {"optional": ("teacher_weight", "old_log_probs")},
    "frozen head": {"frozen": True, "optional": ("old_log_probs",)},
}
# N, V, H: an 8B head, an odd vocabulary, odd everything, one row
SHAPES = {"8B": (2048, 151936, 4096), "odd V": (300, 50257, 768), "odd": (37, 4099, 33),
          "one row": (1, 32000, 64)}
SMALL = ("odd V", "odd", "one row")


def check_step(out, grads, hidden, weight, label):
    dx, dw, *_ = grads
    assert out.loss.is_cuda and out.log_probs.shape == hidden.shape[:1], label
    assert dx.shape == hidden.shape and dx.dtype == hidden.dtype, label
    assert (dw is None) == (not weight.requires_grad), label
    assert dw is None or (dw.shape == weight.shape and dw.dtype == weight.dtype), label


def steps(impl):
    """Every combination of the fused op once: (dtype, options, shape, workspace, live rows)."""
    some = {"off-policy", "all"}
    for dtype, options, shape in itertools.product(DTYPES, OPTIONS, SHAPES):
        if (shape == "8B" and dtype != "bf16") or (impl == "torch" and SHAPES[shape][1] > 32000):
            continue
        n, v, h = SHAPES[shape]
        workspaces = {"default": None, "a few rows": 12 * v * max(7, n // 5)}
        for workspace, live in itertools.product(workspaces, (1.0, 0.3)):
            if (workspace, live) != ("default", 1.0) and options not in some:
                continue
            yield dtype, options, shape, (workspace, workspaces[workspace]), live


def run_ops(impl):
    """How many calls of public ops went through."""
    calls = 0
    for dtype, options, shape, (workspace, size), live in steps(impl):
        label = f"{impl} {dtype} {options} {shape} workspace {workspace} live {live}"
        with FakeTensorMode(), Ledger(live):
            step, hidden, weight = fused(
                impl, DTYPES[dtype], *SHAPES[shape], workspace=size, **OPTIONS[options])
            try:
                out, grads = step()
            except Exception as error:
                raise AssertionError(f"{label}: {type(error).__name__}: {error}") from error
            check_step(out, grads, hidden, weight, label)
            calls += 1
    shapes = SMALL[1:] if impl == "torch" else SMALL
    asked = ((), ("entropy",), ("lse", "mean_logits"), ("entropy", "lse", "mean_logits", "ids"))
    for dtype, shape, names, keep in itertools.product(DTYPES, shapes, asked, (0, 1)):
        with FakeTensorMode(), Ledger(0.7):
            n, v, h = SHAPES[shape]
            hidden, weight, bias = (gpu(*s, dtype=DTYPES[dtype]).requires_grad_()
                                    for s in ((n, h), (v, h), (v,)))
            ids = (n, 3) if "ids" in names else (n,)
            out = linear_log_probs(
                hidden, weight, gpu(*ids, dtype=torch.int64), bias=bias, old_log_probs=gpu(*ids),
                return_entropy="entropy" in names, return_lse="lse" in names,
                return_mean_logits="mean_logits" in names, return_greedy="lse" in names,
                impl=impl, max_workspace_bytes=None if keep else 20 * v,
            )
            lp = out[0] if names else out
            upstream = [gpu(n) if x in names else None for x in ("entropy", "lse", "mean_logits")]
            dx, dw, db, *_ = backward(lp, gpu(*ids), *upstream, *[None] * 10)
            assert dx.shape == hidden.shape and dw.dtype == weight.dtype and db.shape == (v,)
            calls += 1
    for terms in ({}, {"entropy": 1, "config": RLSDLossConfig(entropy_coef=0.1)},
                  {"old_log_probs": 1, "ref_log_probs": 1, "config": RLSDLossConfig(beta=0.1)}):
        with FakeTensorMode(), Ledger():
            given = {k: gpu(300) if k != "config" else x for k, x in terms.items()}
            lp = gpu(300).requires_grad_()
            out = rlsd_loss(lp, gpu(300), teacher_log_probs=gpu(300), impl=impl,
                            rlsd_lambda=gpu(1), **given)
            assert backward(out.loss, gpu(), None, None, None)[0].shape == lp.shape
            calls += 1
    return calls


def run_distillation():
    calls = 0
    for dtype, divergence, shape in itertools.product(
        DTYPES, ("forward_kl", "reverse_kl", "jsd"), SMALL
    ):
        with FakeTensorMode(), Ledger(0.7):
            n, v, h = SHAPES[shape]
            hidden, weight, bias = (gpu(*s, dtype=DTYPES[dtype]).requires_grad_()
                                    for s in ((n, h), (v, h), (v,)))
            loss = linear_distillation_loss(
                hidden, weight, gpu(n, h, dtype=DTYPES[dtype]), bias=bias, divergence=divergence,
                loss_weights=gpu(n), final_logit_softcapping=30.0,
            )
            dx, dw, db, *_ = backward(loss, gpu())
            assert dx.shape == hidden.shape and dw.shape == weight.shape and db.shape == (v,)
            calls += 1
    return calls


def run_energies(impl):
    """The one stage of gradient_tolerance that is no op of PyTorch: what it selects, and the sizes
    of all that follows, is only known from numbers."""
    kernels, calls = logprob.load_impl(impl), 0
    for dtype, (n, v, _) in itertools.product(DTYPES.values(), SHAPES.values()):
        with FakeTensorMode(), Ledger():
            e = gpu(n, kernels.padded(v), dtype=dtype)[:, :v]
            columns, rows = kernels.energies(e, gpu(n))
            assert columns.shape == (v,) and rows.shape == (n,) and rows.dtype == torch.float32
            calls += 1
    return calls


def build_once():
    if not hasattr(torch.ops.rlsd_cuda, "exp_rows"):
        build()


def build():
    """csrc as an install would build it; its ops stay loaded."""
    began = time.monotonic()
    archs = extension.parse_archs(extension.DEFAULT_ARCHS)
    path = Path(tempfile.mkdtemp()) / extension.PREBUILT
    extension.build(path, archs)
    torch.ops.load_library(path)
    needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True).stdout
    assert "[libtorch.so]" in needed, needed
    names = ("exp_rows", "row_max", "row_logits", "logit_gradient", "target_logits", "fix_targets",
             "energies", "scale", "token_rows")
    schemas = [getattr(torch.ops.rlsd_cuda, name).default._schema for name in names]
    try:
        torch.ops.rlsd_cuda.fix_targets(torch.zeros(1, 1), torch.zeros(1).long(), torch.zeros(1))
    except NotImplementedError as error:
        assert "CUDA" in str(error), error
    else:
        raise AssertionError("an op of csrc took tensors of the CPU")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listed = subprocess.run([tool, "--list-elf", path], capture_output=True, text=True).stdout
    print(f"built by nvcc {'.'.join(map(str, extension.nvcc_version(extension.nvcc())))} for "
          f"{';'.join(archs)} and loaded: {len(schemas)} ops; machine code: "
          f"{', '.join(sorted({x.split('.')[-2] for x in listed.split() if '.cubin' in x}))}; "
          f"{time.monotonic() - began:.0f} s")


def kernels():
    build_once()
    began = time.monotonic()
    with ready():
        for impl in ("torch", "cuda"):
            print(f"{impl}: {run_ops(impl)} calls of the public ops and {run_energies(impl)} of "
                  "energies, all accepted", flush=True)
        print(f"distillation: {run_distillation()} calls, all accepted", flush=True)
        for LAUNCHES.arch in ARCHS:
            before, launches = len(LAUNCHES.compiled), LAUNCHES.count
            calls = run_ops("triton") + run_energies("triton")
            print(f"triton, sm_{LAUNCHES.arch}: {calls} calls, {LAUNCHES.count - launches} "
                  f"launches, {len(LAUNCHES.compiled) - before} binaries", flush=True)
    names = collections.Counter(name for name, _ in LAUNCHES.compiled.values())
    print("binaries by kernel, all architectures: " +
          ", ".join(f"{k} {n}" for k, n in sorted(names.items())))
    for (arch, _), (name, built) in LAUNCHES.compiled.items():
        limit = {80: 99, 90: 227, 100: 227}[arch] * 1024  # 99 KiB on sm_86 and sm_89
        assert built.asm["cubin"] and built.metadata.shared <= limit, (name, arch)
    print(f"took {time.monotonic() - began:.0f} s")


HEADS = {"Qwen3-8B": (4096, 151936, None), "Gemma-3-4B, softcap 30": (2560, 262208, 30.0)}


def memory():
    """By the kernels of csrc; Triton's take the same plan and buffers."""
    build_once()
    print("| head, bf16 | N | dW | peak beyond inputs, GiB | gradients, GiB | GEMM work, NHV | "
          "logits GEMMs |")
    print("|---|--:|---|--:|--:|--:|---|")
    with ready():
        for (head, (h, v, cap)), n, frozen in itertools.product(
            HEADS.items(), (8192, 16384, 32768), (False, True)
        ):
            ledger = Ledger()
            with FakeTensorMode(), ledger:
                step, *_ = fused("cuda", torch.bfloat16, n, v, h, frozen=frozen,
                                 optional=("old_log_probs",), final_logit_softcapping=cap)
                inputs = ledger.peak = ledger.now
                out, grads = step()
                size = sum(x.nbytes for x in grads if isinstance(x, FakeTensor))
            logits = collections.Counter(
                {m: c for (m, k, w), c in ledger.gemms.items() if k == h and w == v})
            shown = " + ".join(f"{c} x {m} rows" for m, c in sorted(logits.items(), reverse=True))
            print(f"| {head} | {n} | {'frozen' if frozen else 'yes'} | "
                  f"{(ledger.peak - inputs) / GIB:.2f} | {size / GIB:.2f} | "
                  f"{ledger.flop / (n * h * v):.2f} | {shown} |", flush=True)


PARTS = {"build": build, "kernels": kernels, "memory": memory}
LAUNCHES = Launches()
ADDMM_IS_MISREAD = addmm_is_misread()


def main():
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton.__version__}, "
          f"Python {sys.version.split()[0]}")
    assert torch.version.cuda, "this needs a CUDA build of torch"
    if ADDMM_IS_MISREAD:
        print("This release's fake tensors misread addmm with an output dtype: its shapes and "
              "dtypes are not checked by PyTorch, but taken from its output.")
    for name in sys.argv[1:] or PARTS:
        print(f"\n== {name}")
        PARTS[name]()


if __name__ == "__main__":
    main()
