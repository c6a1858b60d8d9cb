"""Full-vocabulary distillation over the LM head: forward KL, reverse KL or generalised JSD.

    L = sum_t a_t D(P_T, P_S),   P = softmax(softcap(logit_scale (h W^T + b)) / temperature)
    D = KL(P_T||P_S),  KL(P_S||P_T),  or  alpha KL(P_T||M) + (1 - alpha) KL(P_S||M)
    with M = alpha P_T + (1 - alpha) P_S,  and at the student's logits
    dD/dz = p_S - p_T,   or   c p_S (r - sum(p_S r)) with r = log p_S/p_T, c = 1  (reverse KL)
                                                     and r = log p_S/m, c = 1 - alpha  (JSD)

One pass by chunks of rows, gradients formed in forward: student and teacher forward, dh and dW are
8 NHV FLOP (6 with a frozen head). One chunk of logits per model is held, where plain PyTorch keeps
several N x V tensors for backward, and masked rows never reach a GEMM.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import gemm, ref
from .config import (
    LOG_FLOOR,
    MAX_LOG_RATIO,
    TAIL_FLOOR,
    check_flags,
    check_number,
    compute_dtype,
    stored_dtype,
)
from .logprob import (
    autocast_head,
    check_finite,
    check_group,
    check_logit_scalars,
    check_tensor,
    check_weight,
    check_workspace,
    choose_impl,
    gather_head,
    load_impl,
    needs_grad,
    register_gradients,
)
from .ops import Need, custom_op, empty_gradients, flatten
from .rows import Head
from .shards import Shard, shard_of
from .tuning import rows_per_chunk

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
# Logits taken through the elementwise part at a time, whole rows. On a CPU 2**18 keeps its
# temporaries in the cache: 7 ns per logit for the KLs, against 21 for a chunk of 341 rows at once
# (one core, V = 49152). On a GPU a group must outweigh the launches of some thirty kernels.
GROUP_ELEMENTS = {"cpu": 2**18, "cuda": 2**23}
# Lifts small entries of dz off fp16's floor (6e-8); dz itself is seldom beyond a few nats.
FP16_LIFT = 256.0


def finish_logits(z, bias, temperature, logit_scale, softcap):
    """In place: h W^T to softcap(logit_scale (h W^T + bias)) / temperature, -inf to LOG_FLOOR."""
    if bias is not None:
        z += bias
    if softcap is not None:
        z.mul_(logit_scale / softcap).tanh_().mul_(softcap / temperature)
    elif logit_scale != temperature:
        z *= logit_scale / temperature
    if bias is not None:  # a bias of -inf forbids a token: keeps inf - inf out
        z.clamp_(min=LOG_FLOOR)
    return z


def through_logits(dz, z, bias, temperature, logit_scale, softcap):
    """In place: gradient at the finished logits z to the gradient at h W^T + bias."""
    if softcap is not None:
        top = softcap / temperature  # 1 - tanh^2 as (top - z)(top + z) / top^2: less cancellation
        dz.mul_((top - z).mul_(z + top)).mul_(1 / top**2)
    elif bias is not None:
        dz.masked_fill_(z == LOG_FLOOR, 0)
    if logit_scale != temperature:
        dz *= logit_scale / temperature
    return dz


def log_softmax(
    z,  # (R, V) of this shard
    shard,
):
    """Over the whole vocabulary."""
    if shard.sum is None:
        return z.log_softmax(-1)
    top = shard.max(z.amax(-1, keepdim=True))
    return z - (top + shard.sum((z - top).exp_().sum(-1, keepdim=True)).log_())


def row_divergence(
    log_p,  # (R, V) of the student; overwritten
    log_q,  # (R, V) of the teacher; overwritten
    divergence, alpha, need_dz, shard,
):
    """D of each row (R,) and dD/dz (R, V) or None.

    The KLs add the difference of both distributions, which sums to 0: every term is then >= 0 and
    rounded log-sum-exps cancel, so that a KL of 1e-6 keeps its digits in fp32.
    """
    total = shard.sum or (lambda x: x)
    p, q = log_p.exp(), log_q.exp()
    d = log_q.sub_(log_p)
    if divergence == "forward_kl":
        dz = p - q
        return total(q.mul_(d).add_(dz).sum(-1)), dz if need_dz else None
    if divergence == "reverse_kl":
        r = d.neg_()
        value = total(torch.addcmul(q.sub_(p), p, r).sum(-1))
        mean, slope = value, 1.0
    else:
        # r = log p/m and u = log q/m from d alone: exactly 0 at equality, and relative precision
        # for any alpha, where the logaddexp of M is off by the rounding of log p. Where the clamp
        # binds, the probability that the logarithm is multiplied by is below exp(-80).
        almost_one = 1 - torch.finfo(d.dtype).eps  # log1p(-1) would be -inf
        u = d.neg().clamp_(max=MAX_LOG_RATIO).expm1_().mul_(min(1 - alpha, almost_one)).log1p_()
        r = d.clamp_(max=MAX_LOG_RATIO).expm1_().mul_(min(alpha, almost_one)).log1p_().neg_()
        p_r = p * r
        value = total(q.mul_(u).mul_(-alpha).add_(p_r, alpha=1 - alpha).sum(-1))
        mean, slope = total(p_r.sum(-1)), 1 - alpha
    if not need_dz:
        return value, None
    return value, r.sub_(mean.unsqueeze(-1)).mul_(p).mul_(slope)


def topk_divergence(
    z,  # (R, V) of the student; overwritten if need_dz
    t,  # (R, V) of the teacher
    topk, add_tail, divergence, alpha, need_dz,
):
    """As row_divergence, over the student's topk tokens: renormalised, or beside the tail.

    With g_b = dD/dlog p_b of the buckets and G their sum, dz is g_b - p_b G at a token of its own,
    and p_j (g_tail / p_tail - G) at one in the tail.
    """
    index = z.topk(topk).indices
    if not add_tail:
        log_p, log_q = (x.gather(-1, index).log_softmax(-1) for x in (z, t))
    else:
        buckets = []
        for x in (t, z):
            lse = x.logsumexp(-1, keepdim=True)
            p = (x - lse).exp_()
            tail = p.scatter(-1, index, 0).sum(-1, keepdim=True)
            log_tail = tail.clamp(min=-math.expm1(-TAIL_FLOOR)).log_()
            buckets.append(torch.cat([x.gather(-1, index) - lse, log_tail], -1))
        log_q, log_p = buckets
    own = Shard([0, z.shape[-1], z.shape[-1]], None)
    value, _ = row_divergence(log_p.clone(), log_q.clone(), divergence, alpha, False, own)
    if not need_dz:
        return value, None
    p_b, d = log_p.exp(), log_q - log_p
    if divergence == "forward_kl":
        g = -log_q.exp()
    elif divergence == "reverse_kl":
        g = p_b * (1 - d)
    else:
        almost_one = 1 - torch.finfo(d.dtype).eps  # as in row_divergence
        r = d.clamp(max=MAX_LOG_RATIO).expm1_().mul_(min(alpha, almost_one)).log1p_().neg_()
        g = (1 - alpha) * p_b * r
    if add_tail:  # a tail at its floor is a constant
        g[:, -1:].masked_fill_(tail <= -math.expm1(-TAIL_FLOOR), 0)
    total = g.sum(-1, keepdim=True)
    at_top = (g - p_b * total)[:, :topk]
    dz = p.mul_(g[:, -1:] / p_b[:, -1:] - total) if add_tail else torch.zeros_like(z)
    return value, dz.scatter_(-1, index, at_top)


def torch_rows(
    zs,  # (M, V) raw logits of the student; overwritten
    zt,  # (M, V) raw logits of the teacher; overwritten
    out,  # (M, V)
    head, teacher_head, shard, divergence, alpha,
    share,  # (M,)
    need_dz, topk, add_tail,
):
    """D of each row (M,), and share dD/dx into out: zs itself, or 16 bits in the memory of zt."""
    values = []
    group = max(1, GROUP_ELEMENTS.get(zs.device.type, 2**23) // shard.rows)
    for z, t, a in zip(zs.split(group), zt.split(group), share.split(group), strict=True):
        finish_logits(z, *head[1:])
        finish_logits(t, *teacher_head[1:])
        if topk:
            value, dz = topk_divergence(
                z, t.to(z.dtype), topk, add_tail, divergence, alpha, need_dz
            )
        else:
            value, dz = row_divergence(
                log_softmax(z, shard), log_softmax(t, shard).to(z.dtype), divergence, alpha,
                need_dz, shard,
            )
        values.append(value)
        if need_dz:
            through_logits(dz, z, *head[1:])
            torch.mul(dz, a.unsqueeze(-1), out=z)
    if need_dz and out is not zs:
        out.copy_(zs)
    return torch.cat(values)


def distill(
    hidden,  # (N, H)
    head,
    teacher_hidden,  # (N, H_t)
    teacher_head,
    loss_weights,  # (N,)
    *, divergence, alpha, topk, add_tail, need, shard, impl, max_workspace_bytes,
):
    """loss (), dh, dW, db in stored_dtype, of upstream gradient 1; empty where not needed."""
    weight, bias, t_weight = head.weight, head.bias, teacher_head.weight
    dtype, t_dtype = compute_dtype(hidden.dtype), compute_dtype(t_weight.dtype)
    operand, vocab = gemm.operand_dtype(weight), len(weight)
    dx = hidden.new_zeros(hidden.shape if need.dx else 0, dtype=stored_dtype(hidden.dtype))
    dw = weight.new_zeros(weight.shape if need.dw else 0, dtype=dtype)
    db = weight.new_zeros(vocab if need.db else 0, dtype=dtype)
    values, streams = [], impl == "triton"
    if streams:
        from .triton_distillation import rows as rows_of
    else:
        rows_of = functools.partial(torch_rows, topk=topk, add_tail=add_tail)
    columns = load_impl(impl).padded(vocab)

    live = loss_weights.nonzero().squeeze(-1)
    if len(live):
        # Rows enter dz with weights of at most 1, which 16-bit operands can hold; the rest of
        # a_t, about 1 / N, is applied to fp32 results.
        rest = loss_weights.abs().amax()
        share = loss_weights / rest
        own_out = streams and operand != dtype
        row_bytes = 2 * max(dtype.itemsize, t_dtype.itemsize) + own_out * operand.itemsize
        step = rows_per_chunk(
            len(live), load_impl(impl).padded(shard.rows) * row_bytes, max_workspace_bytes
        )
        # Once for all chunks: on a CPU fresh pages cost 10 to 15 % of the GEMM that fills them.
        student = hidden.new_empty(step, columns, dtype=dtype)[:, :vocab]
        teacher = hidden.new_empty(step, columns, dtype=t_dtype)[:, :vocab]
        out = student
        if own_out:
            out = hidden.new_empty(step, columns, dtype=operand)[:, :vocab]
        elif operand != dtype:  # the teacher's logits are spent by then
            out = teacher.view(operand)[:, :vocab]
        if operand == torch.float16:
            share, rest = share * FP16_LIFT, rest / FP16_LIFT
        for rows in live.split(step):
            m, h = len(rows), hidden[rows].to(operand)
            zs = gemm.logits(h, weight, student[:m])
            zt = gemm.logits(
                teacher_hidden[rows].to(gemm.operand_dtype(t_weight)), t_weight, teacher[:m]
            )
            e = zs if out is student else out[:m]
            value = rows_of(
                zs, zt, e, head, teacher_head, shard, divergence, alpha, share[rows], any(need)
            )
            values.append(loss_weights[rows] * value)
            if not any(need):
                continue
            if need.db:
                db += e.sum(0, dtype=dtype)
            if need.dx:
                part = gemm.dx(e, weight)
                if shard.sum is not None:
                    shard.sum(part)
                dx[rows] = part.mul_(rest).to(dx.dtype)
            if need.dw:
                gemm.add_dw(dw, e, h)
        dw, db = dw.mul_(rest), db.mul_(rest)
    loss = torch.cat(values).sum() if values else hidden.new_zeros((), dtype=dtype)
    db_dtype = dtype if bias is None else bias.dtype
    return loss, dx, dw.to(stored_dtype(weight.dtype)), db.to(stored_dtype(db_dtype))


class DistillationInputs(NamedTuple):
    """Of the op below; hidden, weight and bias come first and get gradients."""

    hidden: Tensor  # (N, H)
    head: Head
    teacher_hidden: Tensor  # (N, H_t)
    teacher_weight: Tensor | None  # (V, H_t)
    teacher_bias: Tensor | None  # (V,)
    loss_weights: Tensor  # (N,)
    alpha: Tensor  # ()
    divergence: str
    topk: int  # 0 for the whole vocabulary
    add_tail: bool
    need: Need
    private: bool  # the caller lets go of the gradients among the outputs
    shard: Shard
    impl: str
    max_workspace_bytes: int


def _distillation_fake(x):
    return (
        x.hidden.new_empty((), dtype=compute_dtype(x.hidden.dtype)),
        *empty_gradients(x.hidden, x.head, x.need, stored=True),
    )


@custom_op(
    "rlsd::linear_distillation_loss", DistillationInputs, outputs=4, fake=_distillation_fake
)
def _distillation_op(x):
    teacher = x.head if x.teacher_weight is None else x.head._replace(
        weight=x.teacher_weight, bias=x.teacher_bias
    )
    with gemm.full_precision(x.hidden.device):
        return distill(
            x.hidden, x.head, x.teacher_hidden, teacher, x.loss_weights,
            divergence=x.divergence, alpha=x.alpha.item(), topk=x.topk, add_tail=x.add_tail,
            need=x.need, shard=x.shard, impl=x.impl,
            max_workspace_bytes=x.max_workspace_bytes,
        )


register_gradients(_distillation_op, DistillationInputs, slice(1, 4))


def _choose(impl, hidden, teacher_weight, topk):
    """The implementation: "triton", "torch" or "ref"; fp64 of either model is beyond Triton's."""
    if impl == "cuda":
        raise ValueError(
            "impl='cuda' cannot run: linear_distillation_loss has no such implementation; use "
            "impl='auto', 'triton' or 'torch'."
        )
    if impl == "triton" and topk is not None:
        raise ValueError(
            "impl='triton' cannot run: distillation_topk has no such implementation; use "
            "impl='auto' or 'torch'."
        )
    wide = teacher_weight is not None and teacher_weight.dtype == torch.float64
    on_gpu = ("triton", "torch") if topk is None else ("torch",)
    return choose_impl(impl, teacher_weight if wide else hidden, on_gpu)


def _check(
    tensors, divergence, alpha, loss_weights, temperature, logit_scale, softcap,
    max_workspace_bytes, tp_group,
):
    """Every check but finiteness on `tensors` = dict of the dense inputs; the workspace size."""
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = tensors.values()
    check_tensor("hidden", hidden)
    if hidden.dim() < 2:
        raise ValueError(
            f"hidden must have shape (..., H) with at least two dimensions, but got "
            f"{tuple(hidden.shape)}."
        )
    like = ("hidden", hidden)
    check_tensor("weight", weight, like=like)
    sharded = tp_group is not None
    check_weight("weight", weight, hidden, sharded=sharded)
    check_tensor("teacher_hidden", teacher_hidden, like=like)
    if teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden must have leading shape {tuple(hidden.shape[:-1])} like hidden, but "
            f"got {tuple(teacher_hidden.shape)}; score the very same tokens."
        )
    if teacher_weight is None:
        check_weight("weight", weight, teacher_hidden, "teacher_hidden", sharded=sharded)
    else:
        check_tensor("teacher_weight", teacher_weight, like=like)
        check_weight(
            "teacher_weight", teacher_weight, teacher_hidden, "teacher_hidden", sharded=sharded
        )
        if teacher_weight.shape[0] != weight.shape[0]:
            raise ValueError(
                f"teacher_weight has {teacher_weight.shape[0]} rows but weight has "
                f"{weight.shape[0]}; student and teacher need one vocabulary."
            )
    if teacher_bias is not None and teacher_weight is None:
        raise ValueError(
            "teacher_bias is given without teacher_weight, which it belongs to; pass both, or "
            "neither for a teacher with the student's head."
        )
    for name, value in (("bias", bias), ("teacher_bias", teacher_bias)):
        if value is not None:
            check_tensor(name, value, shape=weight.shape[:1], like=like, why=" (V,)")
    if loss_weights is not None:
        check_tensor(
            "loss_weights", loss_weights, shape=hidden.shape[:-1], like=like,
            why=" (hidden's without its last dimension)",
        )
    if divergence not in DIVERGENCES:
        raise ValueError(
            f"divergence must be one of {', '.join(DIVERGENCES)}, but got {divergence!r}."
        )
    check_number("alpha", alpha, 0, 1)
    if divergence == "jsd" and not 0 < alpha < 1:
        raise ValueError(
            f"alpha must lie strictly between 0 and 1 for divergence='jsd', which vanishes at "
            f"{alpha!r}; use divergence='forward_kl' (what others run at 0) or 'reverse_kl' (at 1)."
        )
    check_logit_scalars(temperature, logit_scale, softcap)
    check_group(tp_group)
    return check_workspace(max_workspace_bytes, hidden)


def _check_topk(topk, add_tail, vocab, tp_group):
    if not isinstance(add_tail, bool):
        raise TypeError(f"distillation_add_tail must be True or False, but got {add_tail!r}.")
    if topk is None:
        if add_tail:
            raise ValueError(
                "distillation_add_tail is for distillation_topk, which is None; pass both, or "
                "neither for the whole vocabulary."
            )
        return
    if isinstance(topk, bool) or not isinstance(topk, int) or not 1 <= topk <= vocab:
        raise ValueError(
            f"distillation_topk must be None or a whole number in [1, {vocab}], but got {topk!r}."
        )
    if tp_group is not None:
        raise ValueError(
            "distillation_topk does not work with tp_group, whose ranks see a part of the tokens "
            "each; gather the head, or leave one of the two out."
        )


def linear_distillation_loss(
    hidden, weight, teacher_hidden, *, teacher_weight=None, divergence="jsd", alpha=0.5,
    distillation_topk=None, distillation_add_tail=False, loss_weights=None, temperature=1.0,
    bias=None, teacher_bias=None, logit_scale=1.0, final_logit_softcapping=None, impl="auto",
    max_workspace_bytes=None, check_inputs=False, tp_group=None,
):
    """Full-vocabulary KL or JSD of a student from a teacher, without the N x V logits of either.

    For forward_kl, equals `(loss_weights[..., None] * F.kl_div((hidden @ weight.T).log_softmax(-1),
    (teacher_hidden @ teacher_weight.T).log_softmax(-1), reduction="none", log_target=True)).sum()`.

    Args:
        hidden: (..., H) student's last hidden states, fp64, fp32, bf16 or fp16; gets a gradient
            if it requires one.
        weight: (V, H) LM head, hidden's dtype; no work is done for it unless it needs a gradient.
        teacher_hidden: (..., H_t) the teacher's states at the same tokens; never gets a gradient.
        teacher_weight: (V, H_t) the teacher's head, teacher_hidden's dtype, over the student's
            vocabulary; default: weight and bias, detached.
        divergence: "forward_kl" is KL(P_T||P_S), "reverse_kl" is KL(P_S||P_T), "jsd" is
            alpha KL(P_T||M) + (1 - alpha) KL(P_S||M) with M = alpha P_T + (1 - alpha) P_S.
        alpha: strictly between 0 and 1, only used by jsd; the `beta` of TRL's GKD and of Liger's
            JSD. Their beta=0 and beta=1 run forward and reverse KL: ask for those by name here,
            because the JSD itself goes to 0 at both ends.
        distillation_topk: only over the student's most likely tokens, TRL's name and definition
            (SDPO): both models renormalised on them or, with distillation_add_tail, beside one
            bucket that holds the rest of the vocabulary, at least 1e-7.
        loss_weights: (...) aggregation weight a_t >= 0, 0 = masked; default: 1 / number of tokens.
        temperature, logit_scale, final_logit_softcapping: scalars of both models' logits,
            `softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature`. The loss is not
            multiplied by temperature squared.
        bias: (V,) of the student; gets a gradient if it requires one. teacher_bias: (V,), only
            with teacher_weight. A token that -inf forbids to both models adds nothing; forbidden
            to one alone it counts as a log-prob of -1e30, so an infinite KL is huge, not NaN.
        impl: "auto", "triton" (a GPU: three passes of kernels over the logits), "torch" (chunked,
            on any device), "ref" (the naive specification).
        max_workspace_bytes: bound on the logit chunks held at once.
        check_inputs: also reject non-finite inputs (synchronises).
        tp_group: process group whose ranks hold the rows of weight, teacher_weight and both biases
            in order; everything else is the same on every rank, and hidden's gradient comes out
            summed over ranks.

    Returns: loss, a scalar in nats in fp32 (fp64 for fp64).
    Raises: TypeError or ValueError in one sentence on wrong types, shapes, dtypes, devices, values.
    Source: arXiv 2306.13649 (GKD), with its generalised JSD; both models see the same tokens.
    """
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = autocast_head(
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias
    )
    tensors = {
        "hidden": hidden, "weight": weight, "bias": bias, "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight, "teacher_bias": teacher_bias,
    }
    workspace = _check(
        tensors, divergence, alpha, loss_weights, temperature, logit_scale,
        final_logit_softcapping, max_workspace_bytes, tp_group,
    )
    check_flags(check_inputs=check_inputs)
    _check_topk(distillation_topk, distillation_add_tail, len(weight), tp_group)
    impl, shape = _choose(impl, hidden, teacher_weight, distillation_topk), hidden.shape[:-1]
    if loss_weights is None:
        loss_weights = hidden.new_full(shape, 1 / max(1, math.prod(shape)), dtype=torch.float64)
    a_t = loss_weights.detach().reshape(-1).to(compute_dtype(hidden.dtype))
    if check_inputs:
        check_finite({**tensors, "loss_weights": a_t})
    rows = hidden.reshape(-1, hidden.shape[-1])
    t_rows = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
    t_weight, t_bias = (
        None if x is None else x.detach() for x in (teacher_weight, teacher_bias)
    )
    if impl == "ref":
        weight, bias = gather_head(weight, bias, tp_group)
        if t_weight is not None:
            t_weight, t_bias = gather_head(t_weight, t_bias, tp_group)
        return ref.linear_distillation_loss(
            rows, weight, t_rows, a_t, teacher_weight=t_weight, bias=bias, teacher_bias=t_bias,
            divergence=divergence, alpha=alpha, temperature=temperature, logit_scale=logit_scale,
            final_logit_softcapping=final_logit_softcapping, topk=distillation_topk,
            add_tail=distillation_add_tail,
        )
    need = Need(*(needs_grad(x) for x in (rows, weight, bias)))
    head = Head(weight, bias, float(temperature), float(logit_scale), final_logit_softcapping)
    # alpha as a tensor: torch.compile would specialise on each value of a float in a schedule.
    # A product, not torch.full, which it specialises on as well.
    alpha = torch.ones((), dtype=torch.float64, device="cpu") * alpha
    loss, *_ = _distillation_op(*flatten(DistillationInputs(
        rows, head, t_rows, t_weight, t_bias, a_t, alpha, divergence,
        distillation_topk or 0, distillation_add_tail, need, True, shard_of(weight, tp_group), impl,
        workspace,
    )))
    return loss
