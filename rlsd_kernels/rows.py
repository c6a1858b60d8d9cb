"""Rows of one head under a plan: scored chunk by chunk, differentiated group by group.

    c = log-sum-exp guessed from the rollout's log-prob      E = exp(z - c), s = sum_j E_j
    log p_k = z_k - c - log s at the ids k of a row          dL/dz = g_k at k, - G p_j everywhere
    G = sum_k g_k - dL/dlse                                  E_k := (p_k - g_k / G) s,  v = -G / s

2 HV FLOP a row. One token's log-prob alone has G = g: E_y := (p_y - 1) s needs no g, so E is kept
before it is known. Entropy, and a softcapped mean, need the logits themselves.
"""

import math
from typing import NamedTuple

import torch

from . import gemm, tuning
from .config import LOG_FLOOR, compute_dtype
from .gradients import FP16_SCALE

MAX_GUESS = 40.0  # the rollout's log-prob as a guess is trusted down to e^-40
NO_GUESS = 8.0  # without one the target is taken to lie 8 nats below the log-sum-exp
PAIRS = 2**22  # of ids of a row compared at once


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

    def cap_slope(self, z):
        """The softcap's factor of it at z."""
        slope = torch.ones_like(z)
        if self.softcap is not None:
            slope -= (z * (self.temperature / self.softcap)).square()
        return slope


class Scored(NamedTuple):
    """What a row's pass over the head leaves, in compute dtype; (0,) where it was not wanted."""

    log_probs: torch.Tensor  # (M,) or (M, K), as the ids
    lse: torch.Tensor  # (M,), like all but slope
    s: torch.Tensor  # row sum of E
    slope: torch.Tensor  # of the softcap at the ids
    entropy: torch.Tensor
    mean_logits: torch.Tensor
    greedy_ids: torch.Tensor  # int64
    greedy_log_probs: torch.Tensor


class Upstream(NamedTuple):
    """dL by what a pass left of M rows; None: it does not depend on that."""

    log_probs: torch.Tensor  # (M,) or (M, K)
    entropy: torch.Tensor | None = None  # (M,)
    lse: torch.Tensor | None = None  # (M,)
    mean_logits: torch.Tensor | None = None  # (M,)

    def take(self, rows):
        """Those of an index (or slice) of rows; all for None."""
        return Upstream(*(take(x, rows) for x in self))

    @property
    def alone(self):
        """Whether one token's log-prob is all that L depends on, but for the entropy."""
        return self.log_probs.dim() == 1 and self.lse is None and self.mean_logits is None

    @property
    def live(self):
        """(M,) bool: any of a row's is not 0."""
        live = self.log_probs != 0
        live = live.any(-1) if live.dim() == 2 else live
        for x in self[1:]:
            live = live if x is None else live | (x != 0)
        return live

    @property
    def size(self):
        """(M,) sum of a row's absolute values."""
        size = self.log_probs.abs()
        size = size.sum(-1) if size.dim() == 2 else size
        for x in self[1:]:
            size = size if x is None else size + x.abs()
        return size

    @property
    def of_softmax(self):
        """G (M,), the negative coefficient of p in dL/dz."""
        g = self.log_probs
        g = g.sum(-1) if g.dim() == 2 else g
        return g if self.lse is None else g - self.lse

    def at_ids(self, ids, log_probs):
        """dL/dz at the ids, of their shape; the entropy's and the mean's part left out."""
        g, total = self.log_probs, per_id(self.of_softmax, ids)
        if ids.dim() == 2:
            g = _shared(ids, g)
        rest = g - total
        # g - G p where it is no difference of nearly equal numbers, as it is with p near 1.
        return torch.where(
            rest.abs() <= g.abs(), rest - total * torch.expm1(log_probs),
            g - total * log_probs.exp(),
        )

    def of_exp(self, ids, log_probs, s, cap_slope):
        """-v (M,) before the head's slope, and E at the ids, for which dL/dz = v E."""
        total = self.of_softmax
        # Where all but nothing of the row is left beside the ids, too little of it to be seen.
        least = torch.finfo(s.dtype).eps ** 2 * self.size
        total = torch.where(total.abs() < least, least, total)
        e = per_id(-s / torch.where(total == 0, 1, total), ids) * cap_slope
        return total / s, self.at_ids(ids, log_probs) * e


def per_id(x, ids):
    """x (M,), ready to meet what has the shape of the ids, (M,) or (M, K)."""
    return x.unsqueeze(-1) if ids.dim() == 2 else x


def _shared(ids, g):
    """g (M, K) summed over the ids of a row that are the same."""
    rows = max(1, PAIRS // max(1, ids.shape[1] ** 2))
    parts = [
        torch.where(i.unsqueeze(2) == i.unsqueeze(1), x.unsqueeze(1), 0).sum(-1)
        for i, x in zip(ids.split(rows), g.split(rows), strict=True)
    ]
    return torch.cat(parts)


def even_part(up, head, shard):
    """What the mean adds to dL by every raw logit of a row without a softcap, (M,) or None."""
    return None if up.mean_logits is None else up.mean_logits * (head.slope / shard.vocab)


def take(x, index):
    return x if x is None or index is None else x[index]


def slices(start, stop, step):
    return [slice(i, min(i + step, stop)) for i in range(start, stop, max(1, step))]


def concatenate(parts, ids, dtype):
    """Scored of all parts, or of no row where there are none."""
    if parts:
        return Scored(*(torch.cat(x) for x in zip(*parts, strict=True)))
    shapes = dict.fromkeys(("log_probs", "slope"), ids[:0].shape)
    dtypes = {"greedy_ids": torch.int64}
    return Scored(*(
        ids.new_empty(shapes.get(x, 0), dtype=dtypes.get(x, dtype)) for x in Scored._fields
    ))


def gradient_source(weight, strict):
    """What dlogits are formed from: E as it is, or the logits kept for the strict row stage."""
    return "logits" if strict or gemm.operand_dtype(weight) == torch.float16 else "exp"


def row_bytes(kernels, weight, vocab, keep, with_teacher=False):
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


def plan_of(kernels, weight, vocab, n, keep, max_workspace_bytes, with_teacher=False):
    """Rows held for their gradient and rows scored at once; vocab: rows of the largest shard."""
    return tuning.plan_rows(
        max(n, 1), *row_bytes(kernels, weight, vocab, keep, with_teacher), max_workspace_bytes,
        tuning.max_chunk(weight.device.type),
    )


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
            plan = plan_of(
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
        self.begun = None  # (start of a slice, its states)

    def slices(self, n):
        """Of n rows: those held at once. No group is cut elsewhere than into its chunks."""
        return [
            q for r in slices(0, n, self.group) for q in slices(r.start, r.stop, self.held)
        ]

    def pairs(self, n):
        """Each of these slices with the one that follows it, None after the last."""
        found = self.slices(n)
        return list(zip(found, [*found[1:], None], strict=False))

    def states(
        self,
        hidden,  # (N, H)
        index,  # of the rows that count, or None for all
        q,  # a slice of those
    ):
        """(M, H) of a slice, in the GEMMs' dtype."""
        if self.begun is not None and self.begun[0] == q.start:
            h, self.begun = self.begun[1], None
            return h
        return hidden[q if index is None else index[q]].to(self.operand)

    def begin(self, hidden, index, q):
        """Starts the GEMM of the slice whose states `score` gets next, if there is one and it
        overwrites nothing: the device has work while the host waits for what was asked before."""
        if q is not None and self.keep == "exp" and self.operand != self.dtype:
            h = self.states(hidden, index, q)
            self.begun = q.start, h
            self.scorer.begin(h)

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
        ids,  # (M,) or (M, K)
        old_log_probs,  # as ids, or None
        *, want_entropy=False, want_logits=False,
    ):
        """Scored of rows h, at most a group; E or logits stay in the buffers.

        want_logits: the mean of a row's logits and the largest too.
        """
        local, several = ids - self.shard.offset, ids.dim() == 2
        stored = {None: None, "exp": self.e, "logits": self.z}[self.keep]
        z_y = self.targets(h, local[:, 0] if several else local)
        if old_log_probs is None:
            c = z_y + NO_GUESS
        else:
            old = old_log_probs[:, 0] if several else old_log_probs
            c = z_y - old.clamp(-MAX_GUESS, 0).nan_to_num(nan=-NO_GUESS)
        # From here on z_y of the GEMM that s comes from: what tensor cores lose in summing H
        # products (some 1e-4 nats at H = 4096) cancels where p is near 1.
        z_y = z_y.new_empty(ids.shape) if several else z_y
        mean, top, top_ids = (z_y.new_empty(len(h) * want_logits) for _ in range(3))
        top_ids = top_ids.long()
        parts = [
            self.scorer.score(
                h[r].to(self.operand), c[r], out=None if stored is None else stored[r],
                keep=self.keep, want_entropy=want_entropy, ids=local[r], z_y=z_y[r],
                logits=(mean[r], top[r], top_ids[r]) if want_logits else None,
            )
            for r in slices(0, len(h), self.chunk)
        ] or [(c, c, c)]
        c, s, t = (
            x[0] if len(x) == 1 or x[0] is None else torch.cat(x)
            for x in zip(*parts, strict=True)
        )
        log_s = s.log()
        log_probs = ((z_y - per_id(c, ids)) - per_id(log_s, ids)).clamp_(max=0)
        log_probs.masked_fill_((ids < 0) | (ids >= self.shard.vocab), math.nan)
        entropy = log_s - t / s if want_entropy else s.new_empty(0)
        if want_logits:
            mean /= self.shard.vocab
            top, top_ids = self._largest(top, top_ids)
            top = ((top - c) - log_s).clamp_(max=0)
        return Scored(
            log_probs, c + log_s, s, self.head.cap_slope(z_y), entropy, mean, top_ids, top
        )

    def score_all(self, h, ids, old_log_probs):
        """Scored of any number of rows, in the same groups and chunks as a gradient would take."""
        return concatenate(
            [self.score(h[r], ids[r], take(old_log_probs, r)) for r in self.slices(len(h))],
            ids, self.dtype,
        )

    def _largest(
        self,
        top,  # (M,)
        ids,  # (M,) as this shard counts
    ):
        """The largest z over all shards, and the lowest id that has it."""
        ids = ids + self.shard.offset
        if self.shard.max is None:
            return top, ids
        best = self.shard.max(top.clone())
        last = self.shard.vocab - 1  # where nothing equals a NaN
        return best, -self.shard.max(torch.where(top == best, -ids, -last))

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
        ids,  # (M,) or (M, K)
        scored,
        up,
    ):
        """The gradient at the raw logits of the rows just scored, as v (M,), e (M, V) and even (M,)
        or None: v e + even."""
        n, head = len(ids), self.head
        e, local = self.e[:n], ids - self.shard.offset
        if self.keep == "exp":
            if up.alone:
                self.fix_targets(e, ids, scored)
                return -up.log_probs / scored.s * head.slope, e, None
            total, at_ids = up.of_exp(ids, scored.log_probs, scored.s, scored.slope)
            self.kernels.fix_targets(e, local, at_ids)
            return -total * head.slope, e, even_part(up, head, self.shard)
        # fp16 holds neither small coefficients nor small probabilities.
        size, scale = torch.ones_like(scored.s), 1.0
        if self.operand == torch.float16:
            size, scale = up.size, FP16_SCALE
            size = torch.where(size > 0, size, 1)
        g_entropy, mean = up.entropy, up.mean_logits
        even = None if mean is None else mean / self.shard.vocab
        self.scorer.logit_gradient(
            self.z[:n], e, local[:, 0] if ids.dim() == 2 else local, scored.lse,
            -up.of_softmax / size, None if g_entropy is None else -g_entropy / size,
            None if g_entropy is None else scored.entropy, None if even is None else even / size,
            scale,
        )
        if not up.alone:
            log_p = scored.log_probs.clamp(min=LOG_FLOOR)
            at_ids = up.at_ids(ids, scored.log_probs)
            if g_entropy is not None:
                slope = log_p + per_id(scored.entropy, ids)
                at_ids = at_ids - per_id(g_entropy, ids) * log_p.exp() * slope
            if even is not None:
                at_ids = at_ids + per_id(even, ids)
            at_ids = at_ids * scored.slope * per_id(scale / size, ids)
            self.kernels.fix_targets(e, local, at_ids)
        return size * (head.slope / scale), e, None
