"""The RLSD token maths in Triton: loss, its slope and what the metrics add up, over (M,) numbers.

One program takes all tokens, so that every sum has one order; 30 bytes a token, some microseconds.
"""

import torch
import triton
import triton.language as tl

from . import tuning
from .config import MAX_LOG_RATIO, TOKEN_SUMS

LOG_RATIO_LIMIT = tl.constexpr(MAX_LOG_RATIO)


@triton.jit
def _clamp(x, low, high):
    """NaN stays NaN, unlike with tl.minimum."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _exp_minus_line(d):
    """exp(d) - 1 - d without cancellation near 0."""
    s = 1 + d / 8
    s = 1 + d / 7 * s
    s = 1 + d / 6 * s
    s = 1 + d / 5 * s
    s = 1 + d / 4 * s
    s = 1 + d / 3 * s
    return tl.where(tl.abs(d) < 0.5, 0.5 * d * d * s, tl.exp(d) - 1 - d)


@triton.jit
def _add(total, chosen, value):
    """Selects before it adds, so that a NaN outside the set cannot enter."""
    return total + tl.where(chosen, value, 0.0).to(tl.float64)


@triton.jit(do_not_specialize=["M"])
def _token_kernel(
    log_probs, advantages, loss_weights, teacher, old, ref, mask, entropy, rlsd_lambda, loss, g,
    sums, M, weight_low, weight_high, blame_low, blame_high, praise_high, ratio_low, ratio_high,
    ratio_dual, beta, HAS_TEACHER: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_KL_LOSS: tl.constexpr,
    DELTA_FROM_OLD: tl.constexpr, NEGATIVE_ONLY: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """All tokens in one program: loss, g = dloss/dlog p(y), and config.TOKEN_SUMS in fp64."""
    zero = tl.zeros([BLOCK_M], tl.float64)
    reweighted_pos, reweighted_neg, active_pos, active_neg = zero, zero, zero, zero
    delta_pos, delta_neg, delta_squared, weight_pos, weight_neg = zero, zero, zero, zero, zero
    clip_low, clip_high, below, above, dual = zero, zero, zero, zero, zero
    sum_kl, sum_entropy, sum_policy_kl, sum_loss = zero, zero, zero, zero
    for start in range(0, M, BLOCK_M):
        # M < 2^31 tokens, one fp32 each: the offsets fit 32 bits
        offs = start + tl.arange(0, BLOCK_M)
        inside = offs < M
        lp = tl.load(log_probs + offs, mask=inside, other=0.0)
        a = tl.load(advantages + offs, mask=inside, other=0.0)
        w = tl.load(loss_weights + offs, mask=inside, other=0.0)
        active, pos, neg = (w != 0.0) & (a != 0.0), a > 0.0, a < 0.0
        active_pos = _add(active_pos, active & pos, 1.0)
        active_neg = _add(active_neg, active & neg, 1.0)
        before = lp
        if HAS_OLD:
            before = tl.load(old + offs, mask=inside, other=0.0)
            sum_policy_kl = _add(sum_policy_kl, active, before - lp)
        a_hat = a
        if HAS_TEACHER:
            lam = tl.load(rlsd_lambda).to(tl.float32)
            chosen = neg if NEGATIVE_ONLY else a != 0.0
            if HAS_MASK:
                chosen = chosen & (tl.load(mask + offs, mask=inside, other=0) != 0)
            scored = tl.load(teacher + offs, mask=inside, other=0.0)
            student = before if DELTA_FROM_OLD else lp
            delta = tl.where(scored == student, 0.0, scored - student)  # both may be -inf
            signed = tl.where(neg, -delta, delta)
            factor = (1.0 - lam) + lam * tl.exp(_clamp(signed, weight_low, weight_high))
            a_hat = tl.where(chosen, a * factor, a)
            chosen = chosen & active
            reweighted_pos = _add(reweighted_pos, chosen & pos, 1.0)
            reweighted_neg = _add(reweighted_neg, chosen & neg, 1.0)
            delta_pos = _add(delta_pos, chosen & pos, delta)
            delta_neg = _add(delta_neg, chosen & neg, delta)
            delta_squared = _add(delta_squared, chosen, delta * delta)
            clip_low = _add(clip_low, chosen & (signed < weight_low), 1.0)
            clip_high = _add(clip_high, chosen & (signed > weight_high), 1.0)
        weight = a_hat / tl.where(a == 0.0, 1.0, a)
        weight_pos = _add(weight_pos, active & pos, weight)
        weight_neg = _add(weight_neg, active & neg, weight)

        # A_hat keeps A's sign, so PPO's min and the dual clip are one clamp of the log-ratio.
        log_ratio = lp - before
        praised = a_hat > 0.0
        low = tl.where(praised, -LOG_RATIO_LIMIT, blame_low)
        high = tl.where(praised, praise_high, blame_high)
        token = -a_hat * tl.exp(_clamp(log_ratio, low, high))
        slope = tl.where((log_ratio < low) | (log_ratio > high), 0.0 * a_hat, token)
        ratio = tl.exp(_clamp(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
        below = _add(below, active & neg & (ratio < ratio_low), 1.0)
        above = _add(above, active & pos & (ratio > ratio_high), 1.0)
        dual = _add(dual, active & neg & (ratio > ratio_dual), 1.0)
        live = active
        if HAS_REF:
            d = tl.load(ref + offs, mask=inside, other=0.0) - lp
            bounded = tl.where(d > LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, d)
            kl = _exp_minus_line(bounded)
            sum_kl = _add(sum_kl, active, kl)
            if HAS_KL_LOSS:
                live = w != 0.0
                token += beta * kl
                slope -= beta * tl.where(d > LOG_RATIO_LIMIT, 0.0, kl + bounded)
        if HAS_ENTROPY:
            h = tl.load(entropy + offs, mask=inside, other=0.0)
            sum_entropy = _add(sum_entropy, active, h)
        sum_loss = _add(sum_loss, live, w * token)
        tl.store(g + offs, tl.where(live, w * slope, 0.0), mask=inside)
    tl.store(loss, tl.sum(sum_loss, 0).to(tl.float32))
    tl.store(sums, tl.sum(reweighted_pos, 0))
    tl.store(sums + 1, tl.sum(reweighted_neg, 0))
    tl.store(sums + 2, tl.sum(active_pos, 0))
    tl.store(sums + 3, tl.sum(active_neg, 0))
    tl.store(sums + 4, tl.sum(delta_pos, 0))
    tl.store(sums + 5, tl.sum(delta_neg, 0))
    tl.store(sums + 6, tl.sum(delta_squared, 0))
    tl.store(sums + 7, tl.sum(weight_pos, 0))
    tl.store(sums + 8, tl.sum(weight_neg, 0))
    tl.store(sums + 9, tl.sum(clip_low, 0))
    tl.store(sums + 10, tl.sum(clip_high, 0))
    tl.store(sums + 11, tl.sum(below, 0))
    tl.store(sums + 12, tl.sum(above, 0))
    tl.store(sums + 13, tl.sum(dual, 0))
    tl.store(sums + 14, tl.sum(sum_kl, 0))
    tl.store(sums + 15, tl.sum(sum_entropy, 0))
    tl.store(sums + 16, tl.sum(sum_policy_kl, 0))


def token_rows(
    log_probs, advantages, loss_weights, rlsd_lambda, config, *, teacher_log_probs=None,
    old_log_probs=None, ref_log_probs=None, reweight_mask=None, entropy=None,
):
    """loss (), g (M,) and the TOKEN_SUMS in fp64; entropy only feeds its sum."""
    given = [log_probs, advantages, loss_weights, teacher_log_probs, old_log_probs, ref_log_probs,
             reweight_mask, entropy]
    given = [log_probs if x is None else x.contiguous() for x in given]
    g = torch.empty_like(given[0])
    loss = g.new_empty(())
    sums = g.new_empty(len(TOKEN_SUMS), dtype=torch.float64)
    with torch.cuda.device_of(g):
        _token_kernel[(1,)](
            *given, rlsd_lambda, loss, g, sums, len(g), *config.token_bounds,
            HAS_TEACHER=teacher_log_probs is not None, HAS_OLD=old_log_probs is not None,
            HAS_REF=ref_log_probs is not None, HAS_MASK=reweight_mask is not None,
            HAS_ENTROPY=entropy is not None, HAS_KL_LOSS=config.beta > 0,
            DELTA_FROM_OLD=config.rlsd_delta_source == "old_log_probs",
            NEGATIVE_ONLY=config.rlsd_negative_only, **tuning.TOKEN_TILES,
        )
    return loss, g, sums
