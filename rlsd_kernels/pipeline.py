"""One pass over the head, written once for every implementation: what runs, and on which rows.

    c = log-sum-exp guessed from the rollout's log-prob      E = exp(z - c), s = sum_j E_j
    log p(y) = z_y - c - log s                               g = dL/dlog p(y), N scalars
    E_y := (p_y - 1) s,  v = -g / s                          dh = v (E W),  dW = E^T (v h)

8 NHV FLOP with a teacher (6 with a frozen head) where recomputing ops need 10; E is held for as
many rows as the workspace allows. Rows without effect on loss or gradient never reach a GEMM. With
a vocabulary shard only (N,) sums and dh cross ranks. `kernels` is an implementation module.
"""

import functools
import math
from typing import NamedTuple

import torch

from . import gemm, tuning
from .config import (
    TOKEN_SUMS,
    RLSDLossConfig,
    capturing,
    check_number,
    compute_dtype,
    stored_dtype,
)
from .gradients import Columns, Gradients, Kept, carrying, exceeding
from .rows import (
    Rows,
    Upstream,
    concatenate,
    even_part,
    gradient_source,
    per_id,
    plan_of,
    slices,
    take,
)


class Tokens(NamedTuple):
    """Per-token inputs of the loss, each (N,) and, but for the mask, in compute dtype."""

    advantages: torch.Tensor
    loss_weights: torch.Tensor  # a_t, 0 = masked
    teacher_log_probs: torch.Tensor | None
    old_log_probs: torch.Tensor | None
    ref_log_probs: torch.Tensor | None
    reweight_mask: torch.Tensor | None  # bool

    def take(self, rows):
        """Those of an index (or slice) of rows; all for None."""
        return Tokens(*(take(x, rows) for x in self))


def full_precision(function):
    """Runs a stage under gemm.full_precision."""

    @functools.wraps(function)
    def wrapped(kernels, hidden, *args, **kwargs):
        with gemm.full_precision(hidden.device):
            return function(kernels, hidden, *args, **kwargs)

    return wrapped


def _lambda_here(rlsd_lambda, device):
    """lambda on the device, and whether it may differ from 0; one on a GPU is never read back."""
    if rlsd_lambda.is_cuda:
        return rlsd_lambda, True
    value = rlsd_lambda.item()
    check_number("rlsd_lambda", value, 0, 1)
    return torch.full_like(rlsd_lambda, value, device=device), value > 0


def _indices(*masks):
    """Indices of the True rows of each mask, or None for all: if all are, or while a CUDA graph is
    captured, when no count may come back to the host. It waits once for all of them."""
    if capturing(masks[0]):
        return [None] * len(masks)
    counts = torch.stack([x.sum() for x in masks]).tolist()
    return [
        None if size == len(x) else x.nonzero_static(size=size).squeeze(-1)
        for x, size in zip(masks, counts, strict=True)
    ]


def what_is_kept(kernels, weight, shard, ids, max_workspace_bytes, gradient_tolerance):
    """linear_log_probs_fwd's `keep` where a gradient is needed; None: it is formed anew."""
    if gradient_source(weight, False) != "exp":
        return None
    # How many columns count depends on the data, which only eager mode can follow, and on one
    # upstream gradient per row, where there are several.
    if gradient_tolerance and not torch.compiler.is_compiling() and not capturing(weight):
        return "columns" if ids.dim() == 1 else None
    n = len(ids)
    group, _ = plan_of(
        kernels, weight, shard.rows, n, "exp", max_workspace_bytes, with_teacher=True
    )
    return "exp" if group >= n else None


def _largest(x):
    return x.amax() if len(x) else x.sum()


@full_precision
def linear_log_probs_fwd(
    kernels,
    hidden,  # (N, H)
    head,
    completion_ids,  # (N,) or (N, K)
    old_log_probs,  # the same, or None
    shard, want_entropy, want_logits, keep, max_workspace_bytes, gradient_tolerance=0.0,
):
    """Scored of all rows, and what Kept says for keep None, "exp" or "columns"."""
    n = len(hidden)
    # Chunks as if E were kept, also where it is not: log-probs are then equal to the bit.
    plan = plan_of(
        kernels, head.weight, shard.rows, n, "exp", max_workspace_bytes, with_teacher=True
    )
    rows = Rows(
        kernels, head, shard, n, keep="exp" if keep else None,
        max_workspace_bytes=max_workspace_bytes, plan=plan, by_chunk=keep == "columns",
    )
    left = Kept.nothing(hidden, rows.operand, rows.dtype)
    # Chunks are there twice while they are put together.
    columns = Columns(kernels, head, shard, gradient_tolerance, max_workspace_bytes // 2)
    parts = []
    for r, after in rows.pairs(n):
        ids = completion_ids[r]
        scored = rows.score(
            rows.states(hidden, None, r), ids, take(old_log_probs, r), want_entropy=want_entropy,
            want_logits=want_logits,
        )
        parts.append(scored)
        if keep and ids.dim() == 1:
            rows.fix_targets(rows.e[: len(ids)], ids, scored)
        if keep == "columns":
            columns.add(
                rows.e[: len(ids)], scored.s, functools.partial(rows.begin, hidden, None, after)
            )
    scored = concatenate(parts, completion_ids, rows.dtype)
    if keep == "exp":
        left = left._replace(e=rows.padded_e[:n], s=scored.s)
    elif columns.parts:
        left = columns.kept()
    return scored, left


@full_precision
def linear_log_probs_bwd(
    kernels,
    hidden,  # (N, H)
    up: Upstream,
    head,
    completion_ids,  # (N,) or (N, K)
    log_probs,  # the same
    lse,  # (N,)
    left: Kept, shard, need, max_workspace_bytes, gradient_tolerance=0.0,
):
    """dh, dW, db of what `up` is the gradient by, from Kept or by chunk anew."""
    dtype, weight = log_probs.dtype, head.weight
    up = Upstream(*(None if x is None else x.to(dtype) for x in up))
    g = up.log_probs
    up = up._replace(log_probs=g.masked_fill(log_probs.isnan() & (g != 0), math.nan))
    (index,) = _indices(up.live)
    n = len(hidden) if index is None else len(index)
    db_dtype = dtype if head.bias is None else head.bias.dtype
    size = _largest(up.size) if gemm.operand_dtype(weight) == torch.float16 else None
    # Columns are chosen on the whole of dlogits, the mean's part of it too.
    strict = up.entropy is not None or (
        up.mean_logits is not None and (head.softcap is not None or gradient_tolerance > 0)
    )

    def gradients(one_group):
        return Gradients(
            kernels, hidden, head, shard, hidden.dtype, need, one_group, size, gradient_tolerance,
            sums_to_0=up.lse is None and up.mean_logits is None,
        )

    e = left.e.data  # no version of it is another's: what is written below is put back
    if e.dim() == 2 and not strict:
        step, row_bytes = n, shard.rows * e.itemsize
        if index is not None:  # copies of rows beside E: what it leaves free, or an eighth
            free = max(max_workspace_bytes - len(e) * row_bytes, max_workspace_bytes // 8)
            step = tuning.rows_per_chunk(n, row_bytes, free)
        if gradient_tolerance:
            step = min(step, tuning.max_chunk(weight.device.type))
        grads = gradients(step >= n)
        for r in slices(0, n, step):
            i = r if index is None else index[r]
            h, d, s = hidden[i].to(e.dtype), e[i][:, : len(weight)], left.s[i]
            if up.alone:
                grads.add(i, h, -up.log_probs[i] / s * head.slope, d)
                continue
            ids, part = completion_ids[i], up.take(i)
            total, at_ids = part.of_exp(
                ids, log_probs[i], s, head.cap_slope(log_probs[i] + per_id(lse[i], ids))
            )
            ids = ids - shard.offset
            # E has to be what it was for a backward pass that follows.
            safe = ids.clamp(0, len(weight) - 1).view(len(ids), -1)
            before = d.gather(1, safe).to(dtype).view_as(at_ids)
            kernels.fix_targets(d, ids, at_ids)
            grads.add(i, h, -total * head.slope, d, even_part(part, head, shard))
            kernels.fix_targets(d, ids, before)
        return grads.cast(weight.dtype, db_dtype)
    grads = None
    if len(left.sizes) and not strict and up.alone:
        grads = gradients(False)
        (index,) = _indices(
            up.live & _add_columns(grads, hidden, up.log_probs, head.slope, left)
        )
        # Beside them each has to do with half of the energy that may be left out.
        grads.tolerance *= math.sqrt(0.5)
        n = len(hidden) if index is None else len(index)
    rows = Rows(
        kernels, head, shard, n, keep=gradient_source(weight, strict),
        max_workspace_bytes=max_workspace_bytes, by_chunk=gradient_tolerance > 0,
    )
    grads = grads or gradients(rows.held >= n)
    for r, after in rows.pairs(n):
        i = r if index is None else index[r]
        h, ids = rows.states(hidden, index, r), completion_ids[i]
        scored = rows.score(h, ids, log_probs[i], want_entropy=up.entropy is not None)
        grads.add(
            i, h, *rows.logit_gradient(ids, scored, up.take(i)),
            meanwhile=functools.partial(rows.begin, hidden, index, after),
        )
    return grads.cast(weight.dtype, db_dtype)


def _add_columns(grads, hidden, g, slope, left):
    """Adds the rows whose columns were kept; a mask (N,) of those that were not."""
    largest = _largest(g.abs())  # whose square may be no number of fp32
    energy = (g / torch.where(largest > 0, largest, 1)).square() * left.energy
    index, v = carrying(energy, grads.tolerance), -g / left.s * slope
    sizes, gone = left.sizes.tolist(), torch.ones_like(g, dtype=torch.bool)
    gone.index_fill_(0, index, False)
    without = torch.repeat_interleave(*left.sizes.T.flip(0)).to(g.device) < 0
    # Dropped rows leave nothing out by their columns, rows without columns all of what they may.
    share = left.share.masked_fill(gone, 0).masked_fill(without, grads.tolerance**2 / 2)
    anew = exceeding(energy, share, grads.tolerance) & ~gone
    index = index[~anew[index]]
    anew |= without
    bounds = torch.cat([left.sizes.new_zeros(1), left.sizes[:, 0].cumsum(0)])
    places = torch.searchsorted(index, bounds.to(g.device)).tolist()
    bounds, at, column = bounds.tolist(), 0, 0
    for k, (rows, width) in enumerate(sizes):
        if width < 0:
            continue
        d = left.e[at : at + rows * width].view(rows, width)
        i, j = index[places[k] : places[k + 1]], left.columns[column : column + width]
        grads.add_columns(
            i, hidden[i].to(d.dtype), v[i], d[i - bounds[k]], j, left.lost[i], left.direction[k]
        )
        at, column = at + rows * width, column + width
    return anew


@full_precision
def linear_rlsd_loss(
    kernels,
    hidden,  # (N, H)
    head,
    completion_ids,  # (N,)
    tokens: Tokens,
    *,
    teacher_hidden,  # (N, H_t) or None
    teacher_weight,  # (V, H_t) or None for the student's
    rlsd_lambda,  # ()
    use_teacher, config: RLSDLossConfig, shard, want_entropy, need, max_workspace_bytes,
    gradient_tolerance=0.0,
):
    """loss (), log_probs (N,), teacher_log_probs (N,), entropy (N,) or (0,), dh, dW, db, sums,
    work (2,): rows' worth of the gradient GEMMs that was done, and rows.

    Gradients are those of the loss itself (upstream gradient 1), in stored_dtype. Rows that are
    not live keep 0 in every output, and so does the teacher where no token is re-weighted.
    """
    weight, dtype = head.weight, compute_dtype(head.weight.dtype)
    rlsd_lambda, nonzero = _lambda_here(rlsd_lambda, hidden.device)
    use_teacher = use_teacher and nonzero
    bonus = config.entropy_coef > 0
    want_entropy = want_entropy or bonus
    live = tokens.loss_weights != 0
    if config.beta == 0 and not bonus:
        live = live & (tokens.advantages != 0)
    scores_teacher, chosen = use_teacher and teacher_hidden is not None, live
    if scores_teacher:
        a = tokens.advantages
        chosen = live & (a < 0 if config.rlsd_negative_only else a != 0)
        if tokens.reweight_mask is not None:
            chosen = chosen & tokens.reweight_mask
    index, i = _indices(live, chosen)
    n = len(hidden) if index is None else len(index)
    rows = Rows(
        kernels, head, shard, n, keep=gradient_source(weight, bonus) if any(need) else None,
        max_workspace_bytes=max_workspace_bytes,
        with_teacher=scores_teacher, by_chunk=gradient_tolerance > 0,
    )
    teacher = torch.zeros_like(tokens.loss_weights)
    if use_teacher and not scores_teacher:
        teacher = tokens.teacher_log_probs.clone()  # an op may not return its input
    elif scores_teacher:
        # Chunks as tall as the student's and the same guesses: equal hidden states then give
        # equal bits.
        t_head = head if teacher_weight is None else head._replace(weight=teacher_weight)
        scored = Rows(
            kernels, t_head, shard, n, keep=None, max_workspace_bytes=max_workspace_bytes,
            plan=rows.plan,
        ).score_all(
            take(teacher_hidden, i), take(completion_ids, i), take(tokens.old_log_probs, i)
        )
        t_log_probs = scored.log_probs.to(dtype)
        if i is None:
            teacher = torch.where(chosen, t_log_probs, 0)
        else:
            teacher[i] = t_log_probs

    tokens = tokens._replace(teacher_log_probs=teacher if use_teacher else None).take(index)
    g_entropy = -config.entropy_coef * tokens.loss_weights if bonus else None
    size = None
    if rows.operand == torch.float16:
        size = 2 * tokens.advantages.abs() + config.beta + config.entropy_coef
        size = _largest(tokens.loss_weights.abs() * size)

    def of_tokens(scored, some):
        return kernels.token_rows(
            scored.log_probs, rlsd_lambda=rlsd_lambda, config=config,
            entropy=scored.entropy if want_entropy else None, **some._asdict(),
        )

    grads = Gradients(
        kernels, hidden, head, shard, stored_dtype(hidden.dtype), need, rows.held >= n, size,
        gradient_tolerance,
    )
    loss = hidden.new_zeros((), dtype=dtype)
    sums = hidden.new_zeros(len(TOKEN_SUMS), dtype=torch.float64)
    log_probs, entropy = [hidden.new_empty(0, dtype=dtype)], [hidden.new_empty(0, dtype=dtype)]
    pairs = rows.pairs(n)
    for r in slices(0, n, rows.group):
        group = []
        for q, after in (x for x in pairs if r.start <= x[0].start < r.stop):
            i = q if index is None else index[q]
            h, ids = rows.states(hidden, index, q), completion_ids[i]
            if capturing(h):  # rows without effect are still there, and may hold anything
                h = torch.where(live[q].unsqueeze(-1), h, 0)
            some = tokens.take(q)
            scored = rows.score(h, ids, some.old_log_probs, want_entropy=want_entropy)
            token, g, token_sums = of_tokens(scored, some)
            if q.stop >= n and rows.keep == "exp":
                rows.scorer = None  # its chunk of logits, before the gradients take their memory
            group.append(scored)
            if any(need):
                grads.add(
                    i, h, *rows.logit_gradient(ids, scored, Upstream(g, take(g_entropy, q))),
                    meanwhile=functools.partial(rows.begin, hidden, index, after),
                )
        scored = concatenate(group, completion_ids, dtype)
        if len(group) > 1:  # summed as if the rows had been held together, to the bit
            token, _, token_sums = of_tokens(scored, tokens.take(r))
        loss, sums = loss + token, sums + token_sums
        if bonus:
            loss = loss + (g_entropy[r] * scored.entropy).sum()
        log_probs.append(scored.log_probs)
        entropy.append(scored.entropy)

    def spread(parts):
        values = torch.cat(parts)
        if index is not None:
            return values.new_zeros(len(live)).index_copy(0, index, values)
        return torch.where(live, values, 0)

    return (
        loss, spread(log_probs), teacher, spread(entropy) if want_entropy else entropy[0],
        *grads.cast(stored_dtype(weight.dtype), dtype if head.bias is None else
                    stored_dtype(head.bias.dtype)), sums,
        torch.stack([
            sums.new_full((), x) for x in (grads.work, n if any(need) else 0)
        ]),  # filled by kernels: a copy from the host would wait for all of the above
    )


def rlsd_loss(
    kernels,
    log_probs,  # (N,)
    tokens: Tokens,
    *,
    entropy,  # (N,) or None
    rlsd_lambda,  # ()
    config: RLSDLossConfig,
):
    """loss (), its gradients by log_probs (N,) and by entropy (N,) or (0,), and the sums."""
    rlsd_lambda, nonzero = _lambda_here(rlsd_lambda, log_probs.device)
    if not nonzero:
        tokens = tokens._replace(teacher_log_probs=None)
    loss, g, sums = kernels.token_rows(
        log_probs, rlsd_lambda=rlsd_lambda, config=config, entropy=entropy, **tokens._asdict()
    )
    if config.entropy_coef == 0:
        return loss, g, log_probs.new_empty(0), sums
    slope = -config.entropy_coef * tokens.loss_weights
    bonus = torch.where(tokens.loss_weights != 0, slope * entropy, 0).sum()
    return loss + bonus, g, slope, sums
