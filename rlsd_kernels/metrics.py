"""Training metrics from the token sums that every implementation returns (config.TOKEN_SUMS).

Every metric is a sum over a set of tokens divided by that set's size; `merge_stats` adds the sets
of micro-batches or ranks.
"""

import torch

from .config import TOKEN_SUMS

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
WORK, WORK_COUNT = "head/gradient_work", "tokens/differentiated"  # of ops that own a head


def token_stats(sums, unmasked, rlsd_lambda, dtype, *, with_kl, with_entropy, work=None):
    """Metrics of method section 5 as a dict of 0-dim tensors.

    sums: (len(TOKEN_SUMS),) fp64; unmasked: number of unmasked tokens, 0-dim; a mean over no token
    is NaN. The two flags leave out what no input was given for. work: (2,), rows' worth of the
    head's gradient GEMMs that was done, and rows with a gradient.
    """
    of = dict(zip(TOKEN_SUMS, sums.unbind(), strict=True))
    active = of["active_pos"] + of["active_neg"]
    reweighted = of["reweighted_pos"] + of["reweighted_neg"]
    counts = {
        "tokens/reweighted": reweighted, "tokens/reweighted_pos": of["reweighted_pos"],
        "tokens/reweighted_neg": of["reweighted_neg"], "tokens/active_pos": of["active_pos"],
        "tokens/active_neg": of["active_neg"], "tokens/unmasked": unmasked.to(sums.dtype),
        "tokens/active": active,
    }
    totals = {
        "rlsd/delta_mean": of["delta_pos"] + of["delta_neg"],
        "rlsd/delta_mean_pos": of["delta_pos"],
        "rlsd/delta_mean_neg": of["delta_neg"],
        "rlsd/weight_mean_pos": of["weight_pos"],
        "rlsd/weight_mean_neg": of["weight_neg"],
        "rlsd/clip_low_frac": of["weight_clip_low"],
        "rlsd/clip_high_frac": of["weight_clip_high"],
        "rlsd/effective_lambda": rlsd_lambda * counts["tokens/unmasked"],
        "rlsd/active_token_frac": active,
        "clip_ratio/low_mean": of["ratio_clip_low"],
        "clip_ratio/high_mean": of["ratio_clip_high"],
        "clip_ratio/dual_mean": of["ratio_clip_dual"],
        "policy_kl": of["policy_kl"],
    }
    totals |= {"kl": of["kl"]} if with_kl else {}
    totals |= {"entropy": of["entropy"]} if with_entropy else {}
    # All at once: a kernel for each would take longer to launch than to run.
    means = torch.stack([*totals.values()]) / torch.stack([counts[_MEAN_OVER[x]] for x in totals])
    stats = dict(zip(totals, means.unbind(), strict=True))
    variance = of["delta_squared"] / reweighted - stats["rlsd/delta_mean"] ** 2
    stats["rlsd/delta_std"] = variance.clamp(min=0).sqrt()
    if work is not None:
        stats[WORK], counts[WORK_COUNT] = work[0] / work[1], work[1]
    whole = torch.stack([*counts.values()]).long().unbind()
    values = torch.stack([*stats.values()]).to(dtype).unbind()
    return dict(zip(counts, whole, strict=True)) | dict(zip(stats, values, strict=True))


def merge_stats(many):
    """Combine the stats dicts of micro-batches or ranks as if their tokens had been one batch.

    many: non-empty list of RLSDLossOutput.stats. Every mean is weighted by its own token count;
    counts add up; a mean over no token is NaN. What some of them do not have, such as `entropy`,
    is left out. Returns a dict of 0-dim tensors.
    """
    if not isinstance(many, list | tuple) or not many or not all(
        isinstance(s, dict) and s.keys() >= set(_COUNTS) for s in many
    ):
        raise ValueError("many must be a list of RLSDLossOutput.stats, with at least one.")
    known = set.intersection(*(set(s) for s in many))
    of_heads = {WORK: WORK_COUNT} if WORK in known else {}
    merged = {name: sum(s[name] for s in many) for name in (*_COUNTS, *of_heads.values())}
    for name, count in (_MEAN_OVER | of_heads).items():
        if name in known:
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
