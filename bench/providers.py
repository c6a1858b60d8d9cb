"""Who is timed: one RLSD step by plain PyTorch, by other libraries' ops, and by this one.

Each maps a measure.Problem to (loss, log_probs, teacher_log_probs). Libraries have no RLSD; theirs
is composed of their own per-token log-prob op (teacher under no_grad, student differentiable) and
the same plain loss on top. NHV is 2 per GEMM over the head: an op that recomputes logits in
backward makes 10, one that keeps them, or forms the gradient at once, 8. linear_log_probs keeps
them where they fit its workspace: on a CPU at the shape of the tests, not at the main one. With a
gradient tolerance 8 is what a softmax without a peak costs. A name says what ran: a library's own
kernel, or what it falls back to on a CPU.
"""

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from rlsd.checks import measure
from rlsd.checks.measure import compose, eager, full_logits, fused
from rlsd_kernels import available_impls, linear_log_probs, rlsd_loss, tuning

from . import common

# Width of the vocabulary tile with which TRL's own trainers call the op.
TRL_CHUNK_SIZE = 32768


# Errors beyond which a provider computes something else: bf16 logits are off by 3e-2.
WRONG = {"log_prob": 0.1, "d_hidden": 0.05, "d_weight": 0.05}


@dataclass(frozen=True)
class Provider:
    """name; call: the entry point; package: distribution it comes from; logits: dtype that the
    log-softmax sees, "input's" for its; nhv, nhv_frozen: GEMM work of a step at the tests' shape;
    step: the step; modules: what it imports; compiled: by a C++ compiler on the CPU; impl: of this
    library; in_torch: whether PyTorch runs its GEMMs, where the profiler sees them; drops_dead:
    whether rows without effect are left out; gradient_tolerance: 0 for an exact gradient."""

    name: str
    call: str
    package: str
    logits: str
    nhv: int
    nhv_frozen: int
    step: Callable[[measure.Problem], tuple[Tensor, Tensor, Tensor]]
    modules: tuple[str, ...] = ()
    compiled: bool = False
    impl: str = ""
    in_torch: bool = True
    drops_dead: bool = False
    gradient_tolerance: float = 0.0

    def id(self):
        return self.name.replace(",", "").replace(" ", "-")

    def obstacle(self, device="cpu"):
        """None, or one sentence why this provider cannot run here."""
        case = common.CASES["tiny" if device == "cpu" else "probe"]
        for module in self.modules:
            try:
                importlib.import_module(module)
            except Exception as error:  # an ImportError, or whatever its own imports raise
                return f"{module} cannot be imported: {first_line(error)}"
        problem = measure.make_problem(case, device=device)
        if self.impl:
            status = available_impls(problem.hidden)[self.impl]
            if status != "ok":
                return status
        try:
            got = measure.gradients(problem, self.step)
        except Exception as error:  # whatever it is, the table says it and the others run
            return f"{type(error).__name__}: {first_line(error)}"
        found = measure.errors(got, measure.exact(problem), problem.live())
        wrong = {k: found[k] for k, limit in WRONG.items() if not found[k] <= limit}  # or NaN
        return f"it computes something else: errors {wrong}" if wrong else None

    def stated_nhv(self, frozen_head, live):
        """GEMM work where no profiler sees it."""
        return (self.nhv_frozen if frozen_head else self.nhv) * (live if self.drops_dead else 1)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


compiled_full_logits = torch.compile(full_logits, dynamic=False)


def torch_log_probs(hidden, weight, ids):
    return -torch.nn.functional.linear_cross_entropy(
        hidden, weight, ids, reduction="none", options=torch.nn.LinearCrossEntropyOptions()
    )


def trl_log_probs(hidden, weight, ids):
    from trl.kernels import ChunkedLogProbFunction

    # Entropy and the other metrics are left out: the task needs none.
    return ChunkedLogProbFunction.apply(
        hidden, weight, None, ids, 1.0, TRL_CHUNK_SIZE, None, 1.0, ()
    )[0]


def liger_scaled_ce(hidden, weight, ids):
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, ids)


def liger_grpo_log_probs(hidden, weight, ids):
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return LigerFusedLinearPPOBase.chunk_forward(hidden[None], weight, ids[None])[0]


def liger_fallback(hidden, weight, ids):
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as ops

    # What the public class runs on GPUs other than Hopper's, called directly.
    return -ops._FusedLinearPPOFallbackFunction.apply(hidden, weight, ids, 1.0, -100, False)


def liger_triton(hidden, weight, ids):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return -LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, ids, None, None, -100, 0.0, 0.0, "none"
    )[0]


CUTEDSL = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
CUTILE = "liger_kernel.ops.cutile.ops.fused_linear_scaled_cross_entropy"


def liger_cute(hidden, weight, ids):
    ops = importlib.import_module(CUTEDSL)
    return -ops.LigerFusedScaledCrossEntropySM90Function.apply(hidden, weight, ids)


def liger_cutile(hidden, weight, ids):
    ops = importlib.import_module(CUTILE)
    return -ops.LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, ids)


@functools.cache
def verl_kernel():
    """verl's op without what its packages' __init__ import, such as Ray: it needs none of that, so
    both become empty packages at their place on disk."""
    spec = importlib.util.find_spec("verl")
    if spec is None:
        raise ImportError("No module named 'verl'")
    (folder,) = spec.submodule_search_locations
    for name, path in (("verl", folder), ("verl.utils", f"{folder}/utils")):
        package = types.ModuleType(name)
        package.__path__ = [path]
        sys.modules[name] = package
    return importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy


def verl_log_probs(hidden, weight, ids):
    return verl_kernel()(hidden, weight, ids, 1.0, "none")[0]


def cut_cross_entropy(hidden, weight, ids, impl, filter_eps="high"):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(
        hidden, weight, ids, reduction="none", impl=impl, filter_eps=filter_eps
    )


def tier_b(problem):
    """The GEMM with the exp in its epilogue."""
    with mock.patch.object(tuning, "SCORE_TIER", "B"):
        return fused(problem, "triton")


def two_ops(problem, impl, gradient_tolerance):
    """For trainers with their own loss: differentiable log-probs, then any loss on top."""
    def log_probs(hidden):
        return linear_log_probs(
            hidden, problem.weight, problem.completion_ids, impl=impl,
            old_log_probs=problem.old_log_probs, gradient_tolerance=gradient_tolerance,
        )

    with torch.no_grad():
        teacher = log_probs(problem.teacher_hidden)
    student = log_probs(problem.hidden)
    loss = rlsd_loss(
        student, problem.advantages, teacher_log_probs=teacher,
        old_log_probs=problem.old_log_probs, loss_weights=problem.loss_weights,
        config=measure.CONFIG, impl=impl,
    ).loss
    return loss, student, teacher


EAGER = "PyTorch, full logits"
COMPILED = "torch.compile of it"
OURS, TWO_OPS = "RLSD fused", "RLSD two ops"
ITS_OPTIONS = "as its options choose; results the input's"
TOLERANT = ", tolerance "  # and the tolerance, after the name of the exact row
PLAIN = (
    Provider(
        EAGER, "(hidden @ W.T).float().log_softmax(-1)", "torch", "input's", 8, 6, eager,
    ),
    Provider(
        COMPILED, "torch.compile(full_logits)", "torch", "input's", 8, 6,
        lambda problem: compose(compiled_full_logits, problem), compiled=True,
    ),
    Provider(
        "PyTorch linear_cross_entropy",
        'linear_cross_entropy(reduction="none", options=LinearCrossEntropyOptions())', "torch",
        ITS_OPTIONS, 10, 8, lambda problem: compose(torch_log_probs, problem),
        ("torch.nn.modules.linear_cross_entropy",),  # absent from older releases
    ),
    Provider(
        "TRL", "trl.kernels.ChunkedLogProbFunction", "trl", "input's", 10, 8,
        lambda problem: compose(trl_log_probs, problem), ("trl.kernels", "trl.trainer.utils"),
    ),
)


FUSED = (fused, "fused_linear_rlsd_loss")
SPLIT = (two_ops, "linear_log_probs + rlsd_loss")


def ours(op, name, impl, tolerance="0", drops_dead=False):
    """FUSED or SPLIT of this library, exact or with a gradient tolerance."""
    (step, entry), value = op, float(tolerance)
    call = f'{entry}, impl="{impl}"'
    return Provider(
        f"{name}{TOLERANT}{tolerance}" if value else name,
        f"{call}, gradient_tolerance={tolerance}" if value else call, "rlsd", "fp32", 8, 6,
        lambda problem: step(problem, impl, value), impl=impl, gradient_tolerance=value,
        drops_dead=drops_dead,
    )


PROVIDERS = (
    *PLAIN,
    Provider(
        "Liger scaled CE, PyTorch fallback",
        "LigerFusedLinearScaledCrossEntropyFunction, its PyTorch fallback",
        "liger-kernel", "input's", 10, 10,  # computes dW even where nobody asks for it
        lambda problem: compose(liger_scaled_ce, problem),
        ("liger_kernel.ops.fused_linear_scaled_cross_entropy",),
    ),
    Provider(
        "Liger GRPO log-probs", "LigerFusedLinearPPOBase.chunk_forward", "liger-kernel",
        "input's", 10, 8, lambda problem: compose(liger_grpo_log_probs, problem),
        ("liger_kernel.chunked_loss.fused_linear_ppo",),
    ),
    Provider(
        "cut-cross-entropy, torch.compile",
        'linear_cross_entropy(impl="torch_compile", reduction="none")', "cut-cross-entropy",
        "input's", 8, 6,
        lambda problem: compose(
            functools.partial(cut_cross_entropy, impl="torch_compile"), problem
        ), ("cut_cross_entropy",), compiled=True,
    ),
    ours(SPLIT, TWO_OPS, "torch"),
    ours(SPLIT, TWO_OPS, "torch", "1e-3"),
    ours(FUSED, OURS, "torch"),
    ours(FUSED, OURS, "torch", "1e-3"),
    ours(FUSED, OURS, "torch", "1e-2"),
)


def cut_kernel(name, filter_eps):
    """cut-cross-entropy's own kernels, which need a GPU."""
    log_probs = functools.partial(cut_cross_entropy, impl="cce", filter_eps=filter_eps)
    call = f'linear_cross_entropy(impl="cce", reduction="none", filter_eps={filter_eps!r})'
    return Provider(
        name, call, "cut-cross-entropy", "fp32", 10, 10,
        lambda problem: compose(log_probs, problem), ("cut_cross_entropy",), in_torch=False,
    )


def ours_on_gpu(impl, tolerance="0"):
    return ours(FUSED, f"{OURS}, {impl}", impl, tolerance, drops_dead=True)


# Stated NHV of ops whose GEMMs PyTorch's profiler does not see: logits of both models, those of the
# student again in backward, dH, and dW, which all but Liger's Triton op also compute for a frozen
# head. Of cut-cross-entropy's gradient filter, which leaves out blocks whose entries of the softmax
# are all small (below 2^-12 in bf16), nothing is known beforehand: its 10 is the most it does.
GPU_PROVIDERS = (
    *PLAIN,
    Provider(
        "Liger CuTe", "LigerFusedScaledCrossEntropySM90Function", "liger-kernel", "fp16", 10, 10,
        lambda problem: compose(liger_cute, problem), (CUTEDSL,), in_torch=False,
    ),
    Provider(
        "Liger cuTile", "LigerFusedLinearScaledCrossEntropyFunction, cutile", "liger-kernel",
        "input's", 10, 10, lambda problem: compose(liger_cutile, problem), (CUTILE,),
    ),
    Provider(
        "Liger Triton", 'LigerFusedLinearCrossEntropyFunction, reduction="none"', "liger-kernel",
        "input's", 10, 8, lambda problem: compose(liger_triton, problem),
        ("liger_kernel.ops.fused_linear_cross_entropy",),
    ),
    Provider(
        "Liger scaled CE, PyTorch fallback",
        "LigerFusedLinearScaledCrossEntropyFunction, its PyTorch fallback", "liger-kernel",
        "input's", 10, 10, lambda problem: compose(liger_fallback, problem),
        ("liger_kernel.ops.fused_linear_scaled_cross_entropy",),
    ),
    Provider(
        "verl Triton", "verl.utils.kernel.linear_cross_entropy", "verl", "fp32", 10, 10,
        lambda problem: compose(verl_log_probs, problem), in_torch=False,
    ),
    cut_kernel("cut-cross-entropy, gradient filter", "high"),
    cut_kernel("cut-cross-entropy, no filter", None),
    ours(SPLIT, f"{TWO_OPS}, triton", "triton"),
    ours(SPLIT, f"{TWO_OPS}, triton", "triton", "1e-3"),
    ours_on_gpu("torch"),
    Provider(
        f"{OURS}, triton tier B", 'fused_linear_rlsd_loss, impl="triton", GEMM with exp', "rlsd",
        "fp32", 8, 6, tier_b, impl="triton", in_torch=False, drops_dead=True,
    ),
    ours_on_gpu("triton"),
    ours_on_gpu("triton", "1e-3"),
    ours_on_gpu("cuda"),
    ours_on_gpu("cuda", "1e-3"),
    ours_on_gpu("cuda", "1e-2"),
)


def providers_for(device):
    return PROVIDERS if device == "cpu" else GPU_PROVIDERS
