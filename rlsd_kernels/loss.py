"""The RLSD loss as PyTorch sees it: checks, choice of implementation, custom ops, autograd, module.

    L = sum_t a_t (loss_t + beta kl_t - entropy_coef H_t),   formulas in ref.py

`fused_linear_rlsd_loss` takes hidden states and the head, never holds N x V logits, and forms all
gradients in the forward pass, so backward is one scaling. `rlsd_loss` takes log-probs.
"""

import math
from numbers import Real
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor, nn

from . import pipeline, ref
from .config import (
    TOKEN_SUMS,
    RLSDLossConfig,
    check_config,
    check_flags,
    check_number,
    compute_dtype,
)
from .logprob import (
    autocast_head,
    check_finite,
    check_head,
    check_ids,
    check_tensor,
    check_tolerance,
    check_weight,
    checked_ids,
    choose_impl,
    gather_head,
    load_impl,
    needs_grad,
    register_gradients,
)
from .metrics import token_stats
from .ops import Need, custom_op, differentiable_once, empty_gradients, flatten
from .rows import Head
from .shards import Shard, shard_of

LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo")


class RLSDLossOutput(NamedTuple):
    """loss: scalar. log_probs, teacher_log_probs, entropy: (...), detached, 0 on tokens that were
    not computed (masked, or A = 0 without KL and entropy terms); teacher_log_probs is None when
    lambda is 0, entropy unless asked for. stats: metrics and token counts, see `merge_stats`."""

    loss: Tensor
    log_probs: Tensor
    teacher_log_probs: Tensor | None
    entropy: Tensor | None
    stats: dict[str, Tensor]


# The fields of RLSDLossConfig, as an op takes them.
Scalars = NamedTuple("Scalars", [(name, t) for name, t in get_type_hints(RLSDLossConfig).items()])


def _scalars(config):
    # lambda comes as a tensor: a schedule would compile anew at each of its values.
    return Scalars(0.0, *(getattr(config, name) for name in Scalars._fields[1:]))


class FusedInputs(NamedTuple):
    """Of the op below; hidden, weight and bias come first and get gradients."""

    hidden: Tensor  # (N, H)
    head: Head
    completion_ids: Tensor  # (N,)
    tokens: pipeline.Tokens
    teacher_hidden: Tensor | None  # (N, H_t)
    teacher_weight: Tensor | None  # (V, H_t)
    rlsd_lambda: Tensor  # ()
    use_teacher: bool
    config: Scalars
    want_entropy: bool
    need: Need
    private: bool  # the caller lets go of the gradients among the outputs
    shard: Shard
    impl: str
    max_workspace_bytes: int
    gradient_tolerance: float


def _fused_fake(x):
    dtype, n = compute_dtype(x.hidden.dtype), x.hidden.shape[0]
    with_entropy = x.want_entropy or x.config.entropy_coef > 0
    return (
        x.hidden.new_empty((), dtype=dtype),
        x.hidden.new_empty(n, dtype=dtype),
        x.hidden.new_empty(n, dtype=dtype),
        x.hidden.new_empty(n if with_entropy else 0, dtype=dtype),
        *empty_gradients(x.hidden, x.head, x.need, stored=True),
        x.hidden.new_empty(len(TOKEN_SUMS), dtype=torch.float64),
        x.hidden.new_empty(2, dtype=torch.float64),
    )


@custom_op("rlsd::fused_linear_rlsd_loss", FusedInputs, outputs=9, fake=_fused_fake)
def _fused_op(x):
    check_ids(x.completion_ids, x.shard.vocab)
    return pipeline.linear_rlsd_loss(
        load_impl(x.impl), x.hidden, x.head, x.completion_ids, x.tokens,
        teacher_hidden=x.teacher_hidden, teacher_weight=x.teacher_weight,
        rlsd_lambda=x.rlsd_lambda, use_teacher=x.use_teacher, config=RLSDLossConfig(*x.config),
        shard=x.shard, want_entropy=x.want_entropy, need=x.need,
        max_workspace_bytes=x.max_workspace_bytes, gradient_tolerance=x.gradient_tolerance,
    )


register_gradients(_fused_op, FusedInputs, slice(4, 7))


class LossInputs(NamedTuple):
    """Of the op below."""

    log_probs: Tensor  # (N,)
    entropy: Tensor | None  # (N,)
    tokens: pipeline.Tokens
    rlsd_lambda: Tensor  # ()
    config: Scalars
    impl: str


def _loss_fake(x):
    return (
        x.log_probs.new_empty(()), torch.empty_like(x.log_probs),
        x.log_probs.new_empty(x.log_probs.shape if x.config.entropy_coef > 0 else 0),
        x.log_probs.new_empty(len(TOKEN_SUMS), dtype=torch.float64),
    )


@custom_op("rlsd::rlsd_loss", LossInputs, outputs=4, fake=_loss_fake)
def _loss_op(x):
    return pipeline.rlsd_loss(
        load_impl(x.impl), x.log_probs, x.tokens, entropy=x.entropy, rlsd_lambda=x.rlsd_lambda,
        config=RLSDLossConfig(*x.config),
    )


def _loss_setup(ctx, inputs, output):
    ctx.save_for_backward(*output[1:3])
    ctx.num_inputs = len(inputs)
    ctx.set_materialize_grads(False)


@differentiable_once
def _loss_backward(ctx, grad_loss, *unused):
    if grad_loss is None:
        return (None,) * ctx.num_inputs
    d_log_probs, d_entropy = ctx.saved_tensors
    grad_entropy = d_entropy * grad_loss if ctx.needs_input_grad[1] and len(d_entropy) else None
    return (d_log_probs * grad_loss, grad_entropy, *[None] * (ctx.num_inputs - 2))


_loss_op.register_autograd(_loss_backward, setup_context=_loss_setup)


def _effective_lambda(rlsd_lambda, config, dtype, device, has_teacher):
    """0-dim tensor and whether the teacher may matter.

    A number stays on the CPU, where the op reads it without synchronising. Under torch.compile it
    is not compared with anything: that would compile anew for every step of a schedule. A tensor on
    the GPU is read by the kernels alone.
    """
    value = config.rlsd_lambda if rlsd_lambda is None else rlsd_lambda
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"rlsd_lambda must be a number or a tensor of one element, but got shape "
                f"{tuple(value.shape)}."
            )
        if value.device.type != "cpu" and value.device != device:
            raise ValueError(
                f"rlsd_lambda is on {value.device} but the rest is on {device}; move it there, or "
                "to the CPU."
            )
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return value.detach().reshape(()).to(dtype), True
        value = value.item()
    if torch.compiler.is_compiling() and rlsd_lambda is not None and has_teacher:
        return torch.ones((), dtype=dtype, device="cpu") * value, True
    check_number("rlsd_lambda", value, 0, 1)
    return torch.full((), value, dtype=dtype, device="cpu"), value > 0


def _check_tokens(
    shape, reference, advantages, loss_weights, teacher_log_probs, old_log_probs, ref_log_probs,
    reweight_mask, config,
):
    """pipeline.Tokens, checked against `reference` = (name, tensor that fixes the device)."""
    check_tensor("advantages", advantages, like=reference)
    if len(shape) == 2 and advantages.shape == shape[:1]:
        advantages = advantages.unsqueeze(-1).expand(shape)
    check_tensor("advantages", advantages, shape=shape, why=" or (B,) for sequences")
    if config.beta > 0 and ref_log_probs is None:
        raise ValueError(
            f"ref_log_probs is needed because beta is {config.beta:g}; pass the reference "
            "policy's log-probs or set beta to 0."
        )
    if config.rlsd_delta_source == "old_log_probs" and old_log_probs is None:
        raise ValueError(
            "old_log_probs is needed because rlsd_delta_source is 'old_log_probs'; pass it or use "
            "rlsd_delta_source='current'."
        )
    per_token = {
        "loss_weights": loss_weights, "teacher_log_probs": teacher_log_probs,
        "old_log_probs": old_log_probs, "ref_log_probs": ref_log_probs,
    }
    for name, value in per_token.items():
        if value is not None:
            check_tensor(name, value, shape=shape, like=reference)
    if reweight_mask is not None:
        check_tensor("reweight_mask", reweight_mask, shape=shape, like=reference, kind="bool")
        reweight_mask = reweight_mask.reshape(-1)
    dtype = compute_dtype(reference[1].dtype)
    if loss_weights is None:
        per_token["loss_weights"] = reference[1].new_full(
            shape, 1 / max(1, math.prod(shape)), dtype=dtype
        )
    flat = {
        name: None if value is None else value.detach().reshape(-1).to(dtype)
        for name, value in per_token.items()
    }
    return pipeline.Tokens(
        advantages=advantages.detach().reshape(-1).to(dtype), reweight_mask=reweight_mask, **flat
    )


def _check_finite(tensors, tokens):
    """check_inputs=True: every dense input, and per-token inputs wherever the loss reads them."""
    live = tokens.loss_weights != 0
    per_token = {
        name: value[live]
        for name, value in tokens._asdict().items()
        if value is not None and value.is_floating_point()
    }
    check_finite({**tensors, **per_token})


def fused_linear_rlsd_loss(
    hidden, weight, completion_ids, advantages, *, teacher_hidden=None, teacher_log_probs=None,
    teacher_weight=None, old_log_probs=None, ref_log_probs=None, loss_weights=None,
    reweight_mask=None, rlsd_lambda=None, bias=None, logit_scale=1.0,
    final_logit_softcapping=None, return_entropy=False, tp_group=None,
    config=RLSDLossConfig(), impl="auto", max_workspace_bytes=None, check_inputs=False,  # noqa: B008
    gradient_tolerance=0.0,
):
    """RLSD loss from hidden states: both LM-head passes, token weights and PPO clip in one op.

    Equals `rlsd_loss(log_softmax(hidden @ weight.T)[completion_ids], ...)` with the teacher's
    log-probs from teacher_hidden, without ever holding the (N, V) logits.

    Args:
        hidden: (..., H) student's last hidden states; gets a gradient if it requires one. State
            t is the one that predicts completion_ids[t], from one position before that token.
        weight: (V, H) LM head, hidden's dtype; no work is done for it unless it needs a gradient.
        completion_ids: (...) int64 sampled tokens in [0, V).
        advantages: (...), or (B,) when the leading shape is (B, T).
        teacher_hidden: (..., H) states that predict the same tokens in the privileged context; or
        teacher_log_probs: (...) their log-probs in nats. One of the two unless lambda is 0.
        teacher_weight: (V, H) the teacher's head; default: weight.
        old_log_probs: (...) of the sampling policy; default: on-policy, ratio 1 with its gradient.
            Per-token inputs may be of any float dtype and are cast to fp32 (fp64 for fp64).
        ref_log_probs: (...) of the reference policy; needed when config.beta > 0.
        loss_weights: (...) aggregation weight a_t >= 0, 0 = masked; default: 1 / number of tokens.
        reweight_mask: (...) bool, tokens that the teacher may re-weight; default: all.
        rlsd_lambda: overrides config.rlsd_lambda, for schedules: a number, or a tensor of one
            element; one on the GPU is not checked, and a captured CUDA graph reads it anew at
            every replay.
        bias, logit_scale, final_logit_softcapping: z = softcap(logit_scale (h W^T + bias)).
        return_entropy: also return the entropy (nats) of live tokens.
        tp_group: process group whose ranks hold the rows of weight, teacher_weight and bias in
            order; everything else is the same on every rank, ids count over the whole vocabulary,
            and hidden's gradient comes out summed over ranks.
        max_workspace_bytes: bound on logits held at once; default: tuning.WORKSPACE_BYTES.
        check_inputs: also reject non-finite inputs, and bad ids on CUDA (synchronises).
        gradient_tolerance: in [0, 1); the relative error (Frobenius) that the gradient at the
            logits may have. Rows and columns of it that carry less than its square of the energy
            are left out of the two GEMMs that form dh and dW, which for a trained policy is nearly
            all of them; dh gets the mean of what it lost. dW of a column left out is exactly 0.
            Loss, log-probs, entropy and other stats do not change by a bit. 0 is exact. While a
            CUDA graph is captured nothing is left out.

    Under autocast, hidden and weight of different dtypes are cast to autocast's dtype. While a
    CUDA graph is captured no row is dropped, because no count may come back to the host.
    Returns: RLSDLossOutput. Nothing but `loss` carries a gradient; teacher inputs never get one.
    Raises: TypeError or ValueError in one sentence on wrong types, shapes, dtypes, devices, ids,
        or a missing teacher or reference.
    Source: arXiv 2604.03128, equations 13 to 15 and algorithm 1.
    """
    check_config(config)
    hidden, weight, bias, teacher_hidden, teacher_weight = autocast_head(
        hidden, weight, bias, teacher_hidden, teacher_weight
    )
    workspace = check_head(
        hidden, weight, completion_ids, bias, config.temperature, logit_scale,
        final_logit_softcapping, max_workspace_bytes, tp_group,
    )
    check_tolerance(gradient_tolerance)
    check_flags(return_entropy=return_entropy, check_inputs=check_inputs)
    dtype = compute_dtype(hidden.dtype)
    lam, use_teacher = _effective_lambda(
        rlsd_lambda, config, dtype, hidden.device,
        teacher_hidden is not None or teacher_log_probs is not None,
    )
    shape = completion_ids.shape
    tokens = _check_tokens(
        shape, ("hidden", hidden), advantages, loss_weights, teacher_log_probs, old_log_probs,
        ref_log_probs, reweight_mask, config,
    )
    if teacher_hidden is not None and teacher_log_probs is not None:
        raise ValueError("Pass teacher_hidden or teacher_log_probs, not both.")
    if use_teacher and teacher_hidden is None and teacher_log_probs is None:
        raise ValueError(
            f"teacher_hidden or teacher_log_probs is needed because lambda is {float(lam):g}; pass "
            "one, or set rlsd_lambda to 0 for GRPO."
        )
    if teacher_weight is not None and teacher_hidden is None:
        raise ValueError(
            "teacher_weight is given without teacher_hidden, which it would score; pass both, or "
            "neither."
        )
    if teacher_hidden is not None:
        check_tensor("teacher_hidden", teacher_hidden, like=("hidden", hidden))
        if teacher_hidden.shape[:-1] != shape:
            raise ValueError(
                f"teacher_hidden must have leading shape {tuple(shape)} like completion_ids, but "
                f"got {tuple(teacher_hidden.shape)}; score the very same response tokens."
            )
        t_weight = weight if teacher_weight is None else teacher_weight
        t_name = "weight" if teacher_weight is None else "teacher_weight"
        check_tensor(t_name, t_weight, like=("hidden", hidden))
        check_weight(
            t_name, t_weight, teacher_hidden, "teacher_hidden", sharded=tp_group is not None
        )
        if t_weight.shape[0] != weight.shape[0]:
            raise ValueError(
                f"teacher_weight has {t_weight.shape[0]} rows but weight has {weight.shape[0]}; "
                "student and teacher need one vocabulary."
            )
    shard = shard_of(weight, tp_group)
    if check_inputs:
        check_ids(completion_ids, shard.vocab, force=True)
        _check_finite(
            {"hidden": hidden, "weight": weight, "bias": bias, "teacher_hidden": teacher_hidden,
             "teacher_weight": teacher_weight}, tokens,
        )
    if not use_teacher:
        teacher_hidden = teacher_weight = None
        tokens = tokens._replace(teacher_log_probs=None)
    rows, ids = hidden.reshape(-1, hidden.shape[-1]), completion_ids.reshape(-1)
    t_rows = None
    if teacher_hidden is not None:
        t_rows = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
    t_weight = None if teacher_weight is None else teacher_weight.detach()
    # fp64 of either model is beyond the GPU's kernels.
    wide = t_weight is not None and t_weight.dtype == torch.float64
    impl = choose_impl(impl, t_weight if wide else hidden)
    if impl == "ref":
        weight, bias = gather_head(weight, bias, tp_group)
        if t_weight is not None:
            t_weight, _ = gather_head(t_weight, None, tp_group)
        ids = checked_ids(ids, weight.shape[0])
        loss, log_probs, teacher, entropy = ref.linear_rlsd_loss(
            rows, weight, ids, teacher_hidden=t_rows, teacher_weight=t_weight, bias=bias,
            rlsd_lambda=lam, use_teacher=use_teacher, config=config, logit_scale=logit_scale,
            softcap=final_logit_softcapping, gradient_tolerance=float(gradient_tolerance),
            **tokens._asdict(),
        )
        live = ref.live_tokens(tokens.loss_weights, tokens.advantages, config).sum()
        work = torch.stack([live, live]).double() * needs_grad(rows, weight, bias)
        log_probs, entropy = log_probs.detach(), entropy.detach()
        sums = ref.token_sums(
            log_probs, rlsd_lambda=lam, config=config, entropy=entropy,
            **tokens._replace(teacher_log_probs=teacher)._asdict(),
        )
    else:
        head = Head(
            weight, bias, config.temperature, float(logit_scale), final_logit_softcapping
        )
        loss, log_probs, teacher, entropy, _, _, _, sums, work = _fused_op(*flatten(FusedInputs(
            rows, head, ids, tokens, t_rows, t_weight, lam, use_teacher, _scalars(config),
            return_entropy, Need(*(needs_grad(x) for x in (rows, weight, bias))), True, shard,
            impl, workspace, float(gradient_tolerance),
        )))
    stats = token_stats(
        sums.detach(), (tokens.loss_weights != 0).sum(), lam, dtype,
        with_kl=ref_log_probs is not None,
        with_entropy=return_entropy or config.entropy_coef > 0, work=work.detach(),
    )
    return RLSDLossOutput(
        loss, log_probs.detach().reshape(shape),
        teacher.detach().reshape(shape) if use_teacher else None,
        entropy.detach().reshape(shape) if return_entropy else None, stats,
    )


def rlsd_loss(
    log_probs, advantages, *, teacher_log_probs, old_log_probs=None, ref_log_probs=None,
    loss_weights=None, reweight_mask=None, entropy=None, rlsd_lambda=None,
    config=RLSDLossConfig(), impl="auto",  # noqa: B008
):
    """RLSD loss for trainers that already have log-probs.

    Equals `-(loss_weights * torch.minimum(rho * a_hat, rho.clamp(1 - eps, 1 + eps_high) * a_hat))
    .sum()` with `a_hat = rlsd_advantages(...)`, plus dual clip, KL and entropy terms.

    Args:
        log_probs: (...) of the student in nats; gets a gradient.
        advantages: (...), or (B,) when log_probs is (B, T).
        teacher_log_probs: (...) in the privileged context; may be None only when lambda is 0.
        old_log_probs, ref_log_probs, loss_weights, reweight_mask, rlsd_lambda: as in
            fused_linear_rlsd_loss.
        entropy: (...) in nats; needed, and gets a gradient, when config.entropy_coef > 0.

    Returns: RLSDLossOutput. Raises: TypeError or ValueError in one sentence.
    config.temperature is not used: log-probs are taken as they come.
    Source: arXiv 2604.03128, equations 13 to 15 and algorithm 1.
    """
    check_config(config)
    check_tensor("log_probs", log_probs)
    dtype, shape = compute_dtype(log_probs.dtype), log_probs.shape
    lam, use_teacher = _effective_lambda(
        rlsd_lambda, config, dtype, log_probs.device, teacher_log_probs is not None
    )
    tokens = _check_tokens(
        shape, ("log_probs", log_probs), advantages, loss_weights, teacher_log_probs,
        old_log_probs, ref_log_probs, reweight_mask, config,
    )
    if use_teacher and teacher_log_probs is None:
        raise ValueError(
            f"teacher_log_probs is needed because lambda is {float(lam):g}; pass it, or set "
            "rlsd_lambda to 0 for GRPO."
        )
    if config.entropy_coef > 0 and entropy is None:
        raise ValueError(
            f"entropy is needed because entropy_coef is {config.entropy_coef:g}; pass it or set "
            "entropy_coef to 0."
        )
    flat, flat_entropy = log_probs.reshape(-1).to(dtype), None
    if entropy is not None:
        check_tensor("entropy", entropy, shape=shape, like=("log_probs", log_probs))
        flat_entropy = entropy.reshape(-1).to(dtype)
    if not use_teacher:
        tokens = tokens._replace(teacher_log_probs=None)
    impl = choose_impl(impl, log_probs)
    if impl == "ref":
        arguments = {"rlsd_lambda": lam, "config": config, **tokens._asdict()}
        loss = ref.rlsd_loss(flat, entropy=flat_entropy, **arguments)
        sums = ref.token_sums(flat.detach(), entropy=flat_entropy, **arguments)
    else:
        loss, _, _, sums = _loss_op(*flatten(LossInputs(
            flat, flat_entropy, tokens, lam, _scalars(config), impl
        )))
    stats = token_stats(
        sums.detach(), (tokens.loss_weights != 0).sum(), lam, dtype,
        with_kl=ref_log_probs is not None, with_entropy=entropy is not None,
    )
    teacher = tokens.teacher_log_probs
    return RLSDLossOutput(
        loss, flat.detach().reshape(shape), None if teacher is None else teacher.reshape(shape),
        None if entropy is None else entropy.detach(), stats,
    )


def rlsd_advantages(
    advantages, log_probs, teacher_log_probs, *, rlsd_lambda=0.5, rlsd_reweight_clip_range=0.2,
    rlsd_negative_only=False, reweight_mask=None,
):
    """The re-weighted advantage A_hat of each token, detached.

    Equals `A * ((1 - lam) + lam * (A.sign() * (teacher_log_probs - log_probs)).exp().clip(1 - e,
    1 + e))`, clipped in log space so that nothing overflows, and exactly 0 where A is 0.

    Args: advantages (...) or (B,) for log_probs (B, T); log_probs and teacher_log_probs (...) in
        nats; rlsd_lambda and rlsd_reweight_clip_range in [0, 1]; reweight_mask (...) bool.
    Returns: (...) in fp32 (fp64 if log_probs is fp64).
    Raises: TypeError or ValueError in one sentence. Source: arXiv 2604.03128, equation 14.
    """
    config = RLSDLossConfig(
        rlsd_lambda, rlsd_reweight_clip_range, rlsd_negative_only=rlsd_negative_only
    )
    check_tensor("log_probs", log_probs)
    shape, dtype = log_probs.shape, compute_dtype(log_probs.dtype)
    if teacher_log_probs is None:
        raise TypeError("teacher_log_probs must be a torch.Tensor, but got None.")
    tokens = _check_tokens(
        shape, ("log_probs", log_probs), advantages, None, teacher_log_probs, None, None,
        reweight_mask, config,
    )
    return ref.rlsd_advantages(
        tokens.advantages, log_probs.detach().reshape(-1).to(dtype), tokens.teacher_log_probs,
        rlsd_lambda=rlsd_lambda, rlsd_reweight_clip_range=rlsd_reweight_clip_range,
        rlsd_negative_only=rlsd_negative_only, reweight_mask=tokens.reweight_mask,
    ).reshape(shape)


def _positive(name, value):
    """A number, or a tensor of one element as 0-dim; any other shape would broadcast."""
    if not isinstance(value, Real | Tensor):
        raise TypeError(
            f"{name} must be a number or a tensor of one element, but got {type(value).__name__}."
        )
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{name} must be a number or a tensor of one element, but got shape "
                f"{tuple(value.shape)}."
            )
        value = value.reshape(())
    if not value > 0:
        raise ValueError(f"{name} must be positive, but got {value}.")
    return value


def aggregation_weights(
    mask, loss_type="dapo", *, num_items_in_batch=None, max_completion_length=None
):
    """a_t of each token, so that the loss is `(a_t * per_token_loss).sum()`.

    Args:
        mask: (B, T) bool or 0/1; computed on the whole batch and then sliced, it makes loss and
            gradient independent of micro-batches.
        loss_type: grpo (mean of per-sequence means), bnpo (mean over this batch's tokens), dapo
            (sum / num_items_in_batch, default: this batch's tokens), dr_grpo
            (sum / (B * max_completion_length)); TRL's definitions.
    Returns: (B, T) fp32, 0 where masked. Raises: ValueError in one sentence.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be a tensor of shape (B, T), but got {got}.")
    mask = mask.bool()
    ones = mask.float()
    if loss_type == "grpo":
        return ones / ones.sum(1, keepdim=True).clamp(min=1) / max(1, mask.shape[0])
    if loss_type == "bnpo":
        return ones / ones.sum().clamp(min=1)
    if loss_type == "dapo":
        if num_items_in_batch is None:
            return ones / ones.sum().clamp(min=1)
        return ones / _positive("num_items_in_batch", num_items_in_batch)
    if loss_type == "dr_grpo":
        if max_completion_length is None:
            raise ValueError("loss_type='dr_grpo' needs max_completion_length > 0, but got None.")
        length = _positive("max_completion_length", max_completion_length)
        return ones / (max(1, mask.shape[0]) * length)
    raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, but got {loss_type!r}.")


class FusedLinearRLSDLoss(nn.Module):
    """fused_linear_rlsd_loss as a module; keyword arguments fixed here apply to every call.

    forward(hidden, weight, completion_ids, advantages, **per_call) -> RLSDLossOutput.
    """

    def __init__(self, config=RLSDLossConfig(), **fixed):  # noqa: B008
        super().__init__()
        check_config(config)
        self.config, self.fixed = config, fixed

    def forward(self, hidden, weight, completion_ids, advantages, **per_call):
        return fused_linear_rlsd_loss(
            hidden, weight, completion_ids, advantages,
            **{"config": self.config, **self.fixed, **per_call},
        )
