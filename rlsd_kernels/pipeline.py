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
from .gradients import FP16_SCALE, Columns, Gradients, Kept, carrying

MAX_GUESS = 40.0  # the rollout's log-prob as a guess is trusted down to e^-40
NO_GUESS = 8.0  # without one the target is taken to lie 8 nats below the log-sum-exp


class Head(NamedTuple):
    """z = softcap(logit_scale (h W^T + b)) / temperature; weight may be one rank's shard."""

    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    temperature: float
    logit_scale: float
    softcap: float | None

    @property
    def slope(self):
        """dz / d(h W^T), without the softcap's factor."""
        return self.logit_scale / self.temperature


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
        return Tokens(*(_take(x, rows) for x in self))


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


def _indices(rows):
    """Indices of the True rows, or None for all: if all are, or while a CUDA graph is captured,
    when no count may come back to the host."""
    if capturing(rows):
        return None
    index = rows.nonzero().squeeze(-1)
    return None if len(index) == len(rows) else index


def _take(x, index):
    return x if x is None or index is None else x[index]


def _slices(start, stop, step):
    return [slice(i, min(i + step, stop)) for i in range(start, stop, max(1, step))]


class Scored(NamedTuple):
    """What a row's pass over the head leaves, each (M,) in compute dtype."""

    log_probs: torch.Tensor
    lse: torch.Tensor
    s: torch.Tensor  # row sum of E
    slope: torch.Tensor  # of the softcap at the target
    entropy: torch.Tensor  # (0,) unless wanted


def _concatenate(parts, empty):
    if not parts:
        return Scored(*(torch.empty_like(empty) for _ in Scored._fields))
    return Scored(*(torch.cat(x) for x in zip(*parts, strict=True)))


def gradient_source(weight, entropy_gradient):
    """What dlogits are formed from: E as it is, or the logits kept for the strict row stage."""
    return "logits" if entropy_gradient or gemm.operand_dtype(weight) == torch.float16 else "exp"


def _row_bytes(kernels, weight, vocab, keep, with_teacher=False):
    """Bytes per row held for the gradient, and bytes per row of a chunk being scored."""
    dtype, operand = compute_dtype(weight.dtype), gemm.operand_dtype(weight)
    columns = kernels.padded(vocab)
    stored = 0 if keep is None else columns * operand.itemsize
    if keep == "logits" and operand != dtype:
        stored += columns * dtype.itemsize
    scratch = max(
        kernels.scratch_bytes(vocab, dtype.itemsize, kept, operand == dtype)
        for kept in ((keep, None) if with_teacher else (keep,))
    )
    return stored, scratch


def _plan(kernels, weight, vocab, n, keep, max_workspace_bytes, with_teacher=False):
    """Rows held for their gradient and rows scored at once; vocab: rows of the largest shard."""
    return tuning.plan_rows(
        max(n, 1), *_row_bytes(kernels, weight, vocab, keep, with_teacher), max_workspace_bytes,
        tuning.max_chunk(weight.device.type),
    )


def what_is_kept(kernels, weight, vocab, n, max_workspace_bytes, gradient_tolerance):
    """linear_log_probs_fwd's `keep` where a gradient is needed; None: it is formed anew."""
    if gradient_source(weight, False) != "exp":
        return None
    # How many columns count depends on the data, which only eager mode can follow.
    if gradient_tolerance and not torch.compiler.is_compiling() and not capturing(weight):
        return "columns"
    group, _ = _plan(kernels, weight, vocab, n, "exp", max_workspace_bytes, with_teacher=True)
    return "exp" if group >= n else None


def _largest(x):
    return x.amax() if len(x) else x.sum()


class Rows:
    """Rows of one head under a plan: scored chunk by chunk, differentiated group by group."""

    def __init__(
        self, kernels, head, shard, n, *, keep, max_workspace_bytes, with_teacher=False, plan=None,
        by_chunk=False,
    ):
        """keep: None, "exp" or "logits", what the gradient of these n rows is formed from;
        with_teacher: the plan serves a teacher too, scored while these rows hold their memory;
        by_chunk: hold no more than the rows scored at once, in the same slices as otherwise."""
        self.kernels, self.head, self.shard, self.keep = kernels, head, shard, keep
        weight = head.weight
        self.dtype, self.operand = compute_dtype(weight.dtype), gemm.operand_dtype(weight)
        if plan is None:
            plan = _plan(
                kernels, weight, shard.rows, n, keep, max_workspace_bytes, with_teacher
            )
        self.group, self.chunk = self.plan = plan
        self.held = self.chunk if by_chunk else self.group
        self.padded_e = self.e = self.z = None
        size, vocab = (self.held, kernels.padded(len(weight))), len(weight)
        if keep is not None:
            self.padded_e = weight.new_empty(size, dtype=self.operand)
            self.e = self.padded_e[:, :vocab]
        if keep == "logits":
            in_place = self.operand == self.dtype
            self.z = self.e if in_place else weight.new_empty(size, dtype=self.dtype)[:, :vocab]
        self.scorer = kernels.Scorer(*head, self.chunk, shard.sum, shard.max)

    def slices(self, n):
        """Of n rows: those held at once. No group is cut elsewhere than into its chunks."""
        return [
            q for r in _slices(0, n, self.group) for q in _slices(r.start, r.stop, self.held)
        ]

    def targets(
        self,
        h,  # (M, H)
        local,  # (M,) ids as this shard counts
    ):
        """z_y, (M,), as an fp32 dot product."""
        head = self.head
        x = self.kernels.target_logits(h, head.weight, local)
        if head.bias is not None:
            hit = (local >= 0) & (local < len(head.bias))
            b = head.bias[local.clamp(0, len(head.bias) - 1)].to(self.dtype)
            x = x + torch.where(hit, b, 0)
        if self.shard.sum is not None:
            x = self.shard.sum(x)
        if head.softcap is None:
            return x * head.slope
        tanh = torch.tanh(x * (head.logit_scale / head.softcap))
        return tanh * (head.softcap / head.temperature)

    def score(
        self,
        h,  # (M, H)
        ids,  # (M,)
        old_log_probs,  # (M,) or None
        *, want_entropy=False,
    ):
        """Scored of rows h, at most a group; E or logits stay in the buffers."""
        stored = {None: None, "exp": self.e, "logits": self.z}[self.keep]
        return _concatenate(
            [
                self._score(
                    h[r].to(self.operand), ids[r], _take(old_log_probs, r),
                    None if stored is None else stored[r], want_entropy,
                )
                for r in _slices(0, len(h), self.chunk)
            ], h.new_empty(0, dtype=self.dtype),
        )

    def score_all(self, h, ids, old_log_probs, *, want_entropy=False):
        """Scored of any number of rows, in the same groups and chunks as a gradient would take."""
        return _concatenate(
            [
                self.score(h[r], ids[r], _take(old_log_probs, r), want_entropy=want_entropy)
                for r in self.slices(len(h))
            ], h.new_empty(0, dtype=self.dtype),
        )

    def _score(self, h, ids, old_log_probs, out, want_entropy):
        head, local = self.head, ids - self.shard.offset
        z_y = self.targets(h, local)
        if old_log_probs is None:
            c = z_y + NO_GUESS
        else:
            c = z_y - old_log_probs.clamp(-MAX_GUESS, 0).nan_to_num(nan=-NO_GUESS)
        # From here on z_y of the GEMM that s comes from: what tensor cores lose in summing H
        # products (some 1e-4 nats at H = 4096) cancels where p is near 1.
        c, s, t = self.scorer.score(
            h, c, out=out, keep=self.keep, want_entropy=want_entropy, ids=local, z_y=z_y
        )
        slope = torch.ones_like(z_y)  # of the softcap, 1 - tanh^2
        if head.softcap is not None:
            slope -= (z_y * (head.temperature / head.softcap)).square()
        log_s = s.log()
        log_probs = ((z_y - c) - log_s).clamp_(max=0)
        log_probs.masked_fill_((ids < 0) | (ids >= self.shard.vocab), math.nan)
        entropy = log_s - t / s if want_entropy else s.new_empty(0)
        return Scored(log_probs, c + log_s, s, slope, entropy)

    def fix_targets(
        self,
        e,  # (M, V)
        ids,  # (M,)
        scored,
    ):
        """E_y := (p_y - 1) s, with the softcap's slope like the rest of the row."""
        at_target = torch.expm1(scored.log_probs) * scored.s * scored.slope
        self.kernels.fix_targets(e, ids - self.shard.offset, at_target)

    def logit_gradient(
        self,
        ids,  # (M,)
        scored,
        g,  # (M,) dL/dlog p(y)
        g_entropy,  # (M,) dL/dH, or None
    ):
        """The gradient at the raw logits of the rows just scored, as v (M,) and e (M, V): v e."""
        n, slope = len(ids), self.head.slope
        e = self.e[:n]
        if self.keep == "exp":
            self.fix_targets(e, ids, scored)
            return -g / scored.s * slope, e
        # fp16 holds neither small coefficients nor small probabilities.
        size, scale = torch.ones_like(g), 1.0
        if self.operand == torch.float16:
            size = g.abs() if g_entropy is None else g.abs() + g_entropy.abs()
            size, scale = torch.where(size > 0, size, 1), FP16_SCALE
        self.scorer.logit_gradient(
            self.z[:n], e, ids - self.shard.offset, scored.lse, -g / size,
            None if g_entropy is None else -g_entropy / size,
            None if g_entropy is None else scored.entropy, scale,
        )
        return size * (slope / scale), e


@full_precision
def linear_log_probs_fwd(
    kernels,
    hidden,  # (N, H)
    head,
    completion_ids,  # (N,)
    old_log_probs,  # (N,) or None
    shard, want_entropy, keep, max_workspace_bytes, gradient_tolerance=0.0,
):
    """log p(y) (N,), entropy (N,) or (0,), and what Kept says for keep None, "exp" or "columns"."""
    n = len(hidden)
    # Chunks as if E were kept, also where it is not: log-probs are then equal to the bit.
    plan = _plan(
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
    for r in rows.slices(n):
        ids = completion_ids[r]
        scored = rows.score(hidden[r], ids, _take(old_log_probs, r), want_entropy=want_entropy)
        parts.append(scored)
        if keep:
            rows.fix_targets(rows.e[: len(ids)], ids, scored)
        if keep == "columns":
            columns.add(rows.e[: len(ids)], scored.s)
    scored = _concatenate(parts, hidden.new_empty(0, dtype=rows.dtype))
    if keep == "exp":
        left = left._replace(e=rows.padded_e[:n], s=scored.s)
    elif columns.parts:
        left = columns.kept()
    return scored.log_probs, scored.entropy, left


@full_precision
def linear_log_probs_bwd(
    kernels,
    hidden,  # (N, H)
    grad_log_probs,  # (N,)
    grad_entropy,  # (N,) or None
    head,
    completion_ids,  # (N,)
    log_probs,  # (N,)
    left: Kept, shard, need, max_workspace_bytes, gradient_tolerance=0.0,
):
    """dh, dW, db of sum(grad_log_probs log p(y) + grad_entropy H), from Kept or by chunk anew."""
    dtype, weight = log_probs.dtype, head.weight
    g = grad_log_probs.to(dtype)
    g_entropy = None if grad_entropy is None else grad_entropy.to(dtype)
    g = g.masked_fill(log_probs.isnan() & (g != 0), math.nan)
    index = _indices(g != 0 if g_entropy is None else (g != 0) | (g_entropy != 0))
    n = len(hidden) if index is None else len(index)
    db_dtype = dtype if head.bias is None else head.bias.dtype
    size = None
    if gemm.operand_dtype(weight) == torch.float16:
        size = _largest(g.abs() if g_entropy is None else g.abs() + g_entropy.abs())

    def gradients(one_group):
        return Gradients(
            kernels, hidden, head, shard, hidden.dtype, need, one_group, size, gradient_tolerance
        )

    e = left.e
    if e.dim() == 2 and g_entropy is None:
        step, row_bytes = n, shard.rows * e.itemsize
        if index is not None:  # copies of rows beside E: what it leaves free, or an eighth
            free = max(max_workspace_bytes - len(e) * row_bytes, max_workspace_bytes // 8)
            step = tuning.rows_per_chunk(n, row_bytes, free)
        if gradient_tolerance:
            step = min(step, tuning.max_chunk(weight.device.type))
        grads = gradients(step >= n)
        v = -g / left.s * head.slope
        for r in _slices(0, n, step):
            i = r if index is None else index[r]
            grads.add(i, hidden[i].to(e.dtype), v[i], e[i][:, : len(weight)])
        return grads.cast(weight.dtype, db_dtype)
    grads = None
    if len(left.sizes) and g_entropy is None:
        grads = gradients(False)
        index = _indices((g != 0) & _add_columns(grads, hidden, g, head.slope, left))
        n = len(g) if index is None else len(index)
    rows = Rows(
        kernels, head, shard, n, keep=gradient_source(weight, g_entropy is not None),
        max_workspace_bytes=max_workspace_bytes, by_chunk=gradient_tolerance > 0,
    )
    grads = grads or gradients(rows.held >= n)
    for r in rows.slices(n):
        i = r if index is None else index[r]
        h, ids = hidden[i].to(rows.operand), completion_ids[i]
        scored = rows.score(h, ids, log_probs[i], want_entropy=g_entropy is not None)
        v, dlogits = rows.logit_gradient(ids, scored, g[i], _take(g_entropy, i))
        grads.add(i, h, v, dlogits)
    return grads.cast(weight.dtype, db_dtype)


def _add_columns(grads, hidden, g, slope, left):
    """Adds the rows whose columns were kept; a mask (N,) of those that were not."""
    largest = _largest(g.abs())  # whose square may be no number of fp32
    energy = (g / torch.where(largest > 0, largest, 1)).square() * left.energy
    index, v = carrying(energy, grads.tolerance), -g / left.s * slope
    sizes, anew = left.sizes.tolist(), torch.zeros_like(g, dtype=torch.bool)
    bounds = torch.cat([left.sizes.new_zeros(1), left.sizes[:, 0].cumsum(0)])
    places = torch.searchsorted(index, bounds.to(g.device)).tolist()
    bounds, at, column = bounds.tolist(), 0, 0
    for k, (rows, width) in enumerate(sizes):
        if width < 0:
            anew[bounds[k] : bounds[k + 1]] = True
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
    index = _indices(live)
    n = len(hidden) if index is None else len(index)
    rows = Rows(
        kernels, head, shard, n, keep=gradient_source(weight, bonus) if any(need) else None,
        max_workspace_bytes=max_workspace_bytes,
        with_teacher=use_teacher and teacher_hidden is not None, by_chunk=gradient_tolerance > 0,
    )
    teacher = torch.zeros_like(tokens.loss_weights)
    if use_teacher and teacher_hidden is None:
        teacher = tokens.teacher_log_probs.clone()  # an op may not return its input
    elif use_teacher:
        a = tokens.advantages
        chosen = live & (a < 0 if config.rlsd_negative_only else a != 0)
        if tokens.reweight_mask is not None:
            chosen = chosen & tokens.reweight_mask
        i = _indices(chosen)
        # Chunks as tall as the student's and the same guesses: equal hidden states then give
        # equal bits.
        t_head = head if teacher_weight is None else head._replace(weight=teacher_weight)
        scored = Rows(
            kernels, t_head, shard, n, keep=None, max_workspace_bytes=max_workspace_bytes,
            plan=rows.plan,
        ).score_all(
            _take(teacher_hidden, i), _take(completion_ids, i), _take(tokens.old_log_probs, i)
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
    for r in _slices(0, n, rows.group):
        group = []
        for q in _slices(r.start, r.stop, rows.held):
            i = q if index is None else index[q]
            h, ids = hidden[i].to(rows.operand), completion_ids[i]
            if capturing(h):  # rows without effect are still there, and may hold anything
                h = torch.where(live[q].unsqueeze(-1), h, 0)
            some = tokens.take(q)
            scored = rows.score(h, ids, some.old_log_probs, want_entropy=want_entropy)
            token, g, token_sums = of_tokens(scored, some)
            if q.stop >= n and rows.keep == "exp":
                rows.scorer = None  # its chunk of logits, before the gradients take their memory
            group.append(scored)
            if any(need):
                grads.add(i, h, *rows.logit_gradient(ids, scored, g, _take(g_entropy, q)))
        scored = _concatenate(group, loss)
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
        sums.new_tensor([grads.work, n if any(need) else 0]),
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
