"""Who is timed: one RLSD step by plain PyTorch, by other libraries' ops, and by this one.

Each maps a common.Problem to (loss, log_probs, teacher_log_probs). Libraries have no RLSD; theirs
is composed of their own per-token log-prob op (teacher under no_grad, student differentiable) and
the same plain loss on top. NHV is 2 per GEMM over the head: an op that recomputes logits in
backward makes 10, one that keeps them, or forms the gradient at once, 8. linear_log_probs keeps
them where they fit its workspace: at the shape of the tests, not at the main one.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsd_kernels import fused_linear_rlsd_loss, linear_log_probs, rlsd_loss

from . import common

# Width of the vocabulary tile with which TRL's own trainers call the op.
TRL_CHUNK_SIZE = 32768


@dataclass(frozen=True)
class Provider:
    """name; call: the entry point; package: distribution it comes from; logits: dtype that the
    log-softmax sees; nhv, nhv_frozen: GEMM work of a step at the tests' shape; step: the step."""

    name: str
    call: str
    package: str
    logits: str
    nhv: int
    nhv_frozen: int
    step: Callable[[common.Problem], tuple[Tensor, Tensor, Tensor]]
    modules: tuple[str, ...] = ()
    compiled: bool = False

    def id(self):
        return self.name.replace(",", "").replace(" ", "-")

    def obstacle(self):
        """None, or one sentence why this provider cannot run here."""
        for module in self.modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                return f"{module} cannot be imported: {first_line(error)}"
        problem = common.make_problem(common.CASES["tiny"])
        try:
            common.gradients(problem, self.step)
        except Exception as error:  # whatever it is, the table says it and the others run
            return f"{type(error).__name__}: {first_line(error)}"
        return None


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def compose(log_probs, problem):
    """An RLSD step from a differentiable log_probs(hidden, weight, ids)."""
    with torch.no_grad():
        teacher = log_probs(problem.teacher_hidden, problem.weight, problem.completion_ids)
    student = log_probs(problem.hidden, problem.weight, problem.completion_ids)
    return common.token_loss(problem, student, teacher), student, teacher


def full_logits(hidden, weight, ids):
    """What most trainers write, with the usual cast to fp32 after the GEMM."""
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    return log_p.gather(-1, ids[:, None])[:, 0]


compiled_full_logits = torch.compile(full_logits, dynamic=False)


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


def cut_cross_entropy(hidden, weight, ids):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, ids, reduction="none", impl="torch_compile")


def fused(problem):
    out = fused_linear_rlsd_loss(
        problem.hidden, problem.weight, problem.completion_ids, problem.advantages,
        teacher_hidden=problem.teacher_hidden, old_log_probs=problem.old_log_probs,
        loss_weights=problem.loss_weights, config=common.CONFIG, impl="torch",
    )
    return out.loss, out.log_probs, out.teacher_log_probs


def two_ops(problem):
    """For trainers with their own loss: differentiable log-probs, then any loss on top."""
    def log_probs(hidden):
        return linear_log_probs(
            hidden, problem.weight, problem.completion_ids, impl="torch",
            old_log_probs=problem.old_log_probs,
        )

    with torch.no_grad():
        teacher = log_probs(problem.teacher_hidden)
    student = log_probs(problem.hidden)
    loss = rlsd_loss(
        student, problem.advantages, teacher_log_probs=teacher,
        old_log_probs=problem.old_log_probs, loss_weights=problem.loss_weights,
        config=common.CONFIG, impl="torch",
    ).loss
    return loss, student, teacher


EAGER = "PyTorch, full logits"
OURS = "RLSD fused"
PROVIDERS = (
    Provider(
        EAGER, "(hidden @ W.T).float().log_softmax(-1)", "torch", "input's", 8, 6,
        lambda problem: compose(full_logits, problem),
    ),
    Provider(
        "torch.compile of it", "torch.compile(full_logits)", "torch", "input's", 8, 6,
        lambda problem: compose(compiled_full_logits, problem), compiled=True,
    ),
    Provider(
        "TRL", "trl.kernels.ChunkedLogProbFunction", "trl", "input's", 10, 8,
        lambda problem: compose(trl_log_probs, problem), ("trl.kernels", "trl.trainer.utils"),
    ),
    Provider(
        "Liger scaled CE", "LigerFusedLinearScaledCrossEntropyFunction, its PyTorch fallback",
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
        "cut-cross-entropy", 'linear_cross_entropy(impl="torch_compile", reduction="none")',
        "cut-cross-entropy", "input's", 8, 6,
        lambda problem: compose(cut_cross_entropy, problem), ("cut_cross_entropy",),
        compiled=True,
    ),
    Provider(
        "RLSD two ops", 'linear_log_probs + rlsd_loss, impl="torch"', "rlsd", "fp32", 8, 6, two_ops,
    ),
    Provider(
        OURS, 'fused_linear_rlsd_loss, impl="torch"', "rlsd", "fp32", 8, 6, fused,
    ),
)
