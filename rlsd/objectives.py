"""The objectives: one function of the loss's arguments and one row of OBJECTIVES each.

They share rollouts, data, teacher and evaluation; aggregation weights a_t come from the whole
rollout, so every loss is a sum over tokens that micro-batches may split:

    rlsd, grpo        section 1 of the method; GRPO is RLSD with lambda 0, and runs no teacher
    rlcsd             section 7: the same surrogate with A + r_t on selected tokens, which have a
                      mean of their own (policy/advantages.py)
    opsd, sdpo, opd   sum_t a_t D(P_T, P_S) over the full vocabulary, gradient through P_S alone
    grpo+opsd         grpo + c opsd, in one pass of the student
    sft               - sum_t a_t log P_S(y_t) on reference solutions
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from rlsd_kernels import (
    fused_linear_rlsd_loss,
    linear_distillation_loss,
    linear_log_probs,
    rlsd_loss,
)


class Objective(NamedTuple):
    """What the trainer, the options and the documents know of an objective.

    loss: (inputs, impl, options) -> RLSDLossOutput. inputs: the keywords of fused_linear_rlsd_loss,
    with teacher_bias where there is a teacher; options: TrainConfig, None for the defaults. A run
    with validate_every holds it against itself with impl="ref" in fp64, so all it calls takes impl.
    """

    loss: Callable
    summary: str
    # What its teacher reads before the completion: "hint", the privileged context of the data;
    # "sibling", a successful completion of the group; "question" alone, of an external teacher.
    teacher_reads: str | None = None
    distils: bool = False  # reads the teacher's whole distribution, not the tokens' log-probs
    reweights: bool = False  # lambda weighs its tokens; 0 for all others
    selects: bool = False  # by what a contrast adds to A, instead of a weight on it
    policy_gradient: bool = True  # has a term in the advantages, so that beta, entropy_coef apply
    supervised: bool = False  # trains on the references of the data instead of completions


def policy_gradient(inputs, impl, options=None):
    """rlsd and grpo: the clipped surrogate with re-weighted advantages, method section 1."""
    given = {k: v for k, v in inputs.items() if k != "teacher_bias"}
    return fused_linear_rlsd_loss(impl=impl, return_entropy=True, **given)


def distillation(inputs, impl, options=None):
    """opsd, opd, sdpo: sum_t a_t D(P_T, P_S) over the tokens of sequences that have a teacher."""
    with torch.no_grad():
        out = measured(inputs, impl)
    return out._replace(loss=divergence(inputs, impl, options))


def policy_gradient_and_distillation(inputs, impl, options=None):
    """grpo+opsd: grpo + c * opsd on the same hidden states."""
    own = {k: v for k, v in inputs.items() if not k.startswith("teacher_")}
    out = policy_gradient(own, impl, options)
    extra = options.distillation_coef * divergence(inputs, impl, options)
    return out._replace(loss=out.loss + extra)


def cross_entropy(inputs, impl, options=None):
    """sft: - sum_t a_t log P_S(y_t)."""
    out = measured(inputs, impl)
    live = inputs["loss_weights"] != 0  # a masked log-prob may be -inf
    log_probs = torch.where(live, out.log_probs, 0.0)
    loss = -(inputs["loss_weights"].to(log_probs.dtype) * log_probs).sum()
    return out._replace(loss=loss, log_probs=out.log_probs.detach())


def divergence(inputs, impl, options):
    """sum_t a_t D(P_T, P_S), with its gradient to hidden, weight and bias of the student."""
    names = (
        "hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias",
        "logit_scale", "final_logit_softcapping",
    )
    taught = torch.where(inputs["reweight_mask"], inputs["loss_weights"], 0.0)
    return linear_distillation_loss(
        **{name: inputs[name] for name in names}, loss_weights=taught,
        divergence=options.distillation_divergence, alpha=options.distillation_alpha,
        temperature=inputs["config"].temperature, impl="ref" if impl == "ref" else "auto",
    )


def measured(inputs, impl):
    """RLSDLossOutput of the student alone: log-probs, entropy, and metrics over all its tokens."""
    names = (
        "hidden", "weight", "completion_ids", "bias", "logit_scale", "final_logit_softcapping",
    )
    config = inputs["config"]
    log_probs, entropy = linear_log_probs(
        **{name: inputs[name] for name in names}, temperature=config.temperature,
        return_entropy=True, impl=impl, gradient_tolerance=inputs.get("gradient_tolerance", 0.0),
    )
    ones = torch.ones_like(inputs["loss_weights"])
    out = rlsd_loss(
        log_probs.detach(), ones, teacher_log_probs=None, loss_weights=inputs["loss_weights"],
        old_log_probs=inputs["old_log_probs"], entropy=entropy.detach(), rlsd_lambda=0.0,
        config=config,
    )
    return out._replace(log_probs=log_probs)


OBJECTIVES = {
    "rlsd": Objective(
        policy_gradient, "GRPO whose token weights come from the model under the hint",
        teacher_reads="hint", reweights=True,
    ),
    "rlcsd": Objective(
        policy_gradient, "GRPO plus what right hints say against wrong ones, on selected tokens",
        teacher_reads="hint", reweights=True, selects=True,
    ),
    "grpo": Objective(policy_gradient, "group-relative policy gradient, no teacher"),
    "opsd": Objective(
        distillation, "distillation from the model itself under the hint",
        teacher_reads="hint", distils=True, policy_gradient=False,
    ),
    "opd": Objective(
        distillation, "distillation from an external teacher",
        teacher_reads="question", distils=True, policy_gradient=False,
    ),
    "grpo+opsd": Objective(
        policy_gradient_and_distillation, "the sum of both", teacher_reads="hint", distils=True,
    ),
    "sdpo": Objective(
        distillation, "opsd with a successful sibling as the hint",
        teacher_reads="sibling", distils=True, policy_gradient=False,
    ),
    "sft": Objective(
        cross_entropy, "cross entropy on the privileged context",
        policy_gradient=False, supervised=True,
    ),
}
