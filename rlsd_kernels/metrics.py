"""Training metrics from per-token tensors, written on the specification's own functions.

Every metric is a sum over a set of tokens divided by that set's size; `merge_stats` adds the sets
of micro-batches or ranks. Cost: a few elementwise passes over N scalars.
"""

import math

import torch

from . import ref
from .config import MAX_LOG_RATIO

# metric -> the count it is a mean over; rlsd/delta_std is handled apart.
_MEAN_OVER = {
    "rlsd/delta_mean": "tokens/reweighted",
    "rlsd/delta_mean_pos": "tokens/reweighted_pos",
    "rlsd/delta_mean_neg": "tokens/reweighted_neg",
    "rlsd/weight_mean_pos": "tokens/active_pos",
    "rlsd/weight_mean_neg": "tokens/active_neg",
    "rlsd/clip_low_frac": "tokens/reweighted",
    "rlsd/clip_high_frac": "tokens/reweighted",
    "rlsd/effective_lambda": "tokens/unmasked",
    "rlsd/active_token_frac": "tokens/unmasked",
    "clip_ratio/low_mean": "tokens/active",
    "clip_ratio/high_mean": "tokens/active",
    "clip_ratio/dual_mean": "tokens/active",
    "kl": "tokens/active",
    "entropy": "tokens/active",
    "policy_kl": "tokens/active",
}
_COUNTS = tuple(dict.fromkeys(_MEAN_OVER.values()))


def token_stats(
    log_probs, advantages, loss_weights, *, teacher_log_probs, old_log_probs, ref_log_probs,
    reweight_mask, entropy, rlsd_lambda, config,
):
    """Metrics of method section 5 from (N,) tensors: sums over token sets, divided by counts."""
    old = log_probs if old_log_probs is None else old_log_probs
    unmasked = loss_weights != 0
    active = unmasked & (advantages != 0)
    chosen = active & ref.reweighted_tokens(
        advantages, rlsd_negative_only=config.rlsd_negative_only, reweight_mask=reweight_mask
    )
    if teacher_log_probs is None:
        chosen = torch.zeros_like(chosen)
    positive = advantages > 0
    counts = {
        "tokens/reweighted": chosen,
        "tokens/reweighted_pos": chosen & positive,
        "tokens/reweighted_neg": chosen & ~positive,
        "tokens/active_pos": active & positive,
        "tokens/active_neg": active & ~positive,
        "tokens/unmasked": unmasked,
        "tokens/active": active,
    }
    zero = torch.zeros_like(log_probs)
    delta, a_hat = zero, advantages
    if teacher_log_probs is not None:
        student = old if config.rlsd_delta_source == "old_log_probs" else log_probs
        delta = teacher_log_probs - student
        a_hat = ref.rlsd_advantages(
            advantages, student, teacher_log_probs, rlsd_lambda=rlsd_lambda,
            rlsd_reweight_clip_range=config.rlsd_reweight_clip_range,
            rlsd_negative_only=config.rlsd_negative_only, reweight_mask=reweight_mask,
        )
    signed = torch.sign(advantages) * delta
    eps_w = config.rlsd_reweight_clip_range
    low, high = math.log1p(-eps_w) if eps_w < 1 else -math.inf, math.log1p(eps_w)
    ratio = torch.exp((log_probs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    capped = (advantages < 0) & (ratio > (math.inf if config.delta is None else config.delta))
    values = {
        "rlsd/delta_mean": delta,
        "rlsd/delta_mean_pos": delta,
        "rlsd/delta_mean_neg": delta,
        "rlsd/weight_mean_pos": a_hat / advantages,
        "rlsd/weight_mean_neg": a_hat / advantages,
        "rlsd/clip_low_frac": signed < low,
        "rlsd/clip_high_frac": signed > high,
        "rlsd/effective_lambda": zero + rlsd_lambda,
        "rlsd/active_token_frac": active,
        "clip_ratio/low_mean": (advantages < 0) & (ratio < 1 - config.epsilon),
        "clip_ratio/high_mean": positive & (ratio > 1 + config.epsilon_high),
        "clip_ratio/dual_mean": capped,
        "kl": zero if ref_log_probs is None else ref.k3_kl(log_probs, ref_log_probs),
        "entropy": zero if entropy is None else entropy,
        "policy_kl": old - log_probs,
    }
    if ref_log_probs is None:
        del values["kl"]
    if entropy is None:
        del values["entropy"]
    stats = {name: mask.sum() for name, mask in counts.items()}
    for name, value in values.items():
        where = counts[_MEAN_OVER[name]]
        stats[name] = torch.where(where, value.to(zero.dtype), zero).sum() / where.sum()
    deviation = torch.where(chosen, delta - stats["rlsd/delta_mean"], zero)
    stats["rlsd/delta_std"] = ((deviation**2).sum() / chosen.sum()).sqrt()
    return stats


def merge_stats(many):
    """Combine the stats dicts of micro-batches or ranks as if their tokens had been one batch.

    many: non-empty list of RLSDLossOutput.stats. Every mean is weighted by its own token count;
    counts add up; a mean over no token is NaN. Returns a dict of 0-dim tensors.
    """
    merged = {name: sum(s[name] for s in many) for name in _COUNTS}
    for name, count in _MEAN_OVER.items():
        if name in many[0]:
            total = sum(torch.where(s[count] > 0, s[name] * s[count], 0) for s in many)
            merged[name] = total / merged[count]
    variance = sum(
        torch.where(
            s["tokens/reweighted"] > 0,
            s["tokens/reweighted"]
            * (s["rlsd/delta_std"] ** 2 + (s["rlsd/delta_mean"] - merged["rlsd/delta_mean"]) ** 2),
            0,
        )
        for s in many
    )
    merged["rlsd/delta_std"] = (variance / merged["tokens/reweighted"]).sqrt()
    return merged
