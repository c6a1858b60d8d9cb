"""PyTorch implementation of the pipeline's stages, for any device; the CPU path.

    s_i = sum_j exp(z_ij - c_i),   z = softcap(logit_scale (h W^T + b)) / temperature

The vocabulary goes by in tiles that stay in cache, and c_i is a guess of the log-sum-exp, so one
pass gives the row sums and, in place, E = exp(z - c): no row maximum, no second read of the logits.
Rows whose guess was bad (ROW_SUM_BOUNDS) are redone with their true maximum.
"""

import itertools
import math

import torch

from . import gemm
from .config import LOG_FLOOR, MAX_LOG_RATIO, capturing, compute_dtype, trusted_rows
from .tuning import SCORE_TILE, TARGET_ENTRIES


def padded(vocab):
    """Columns of E: on a CPU aligned rows gain nothing."""
    return vocab


def scratch_bytes(vocab, itemsize, keep, in_place):
    """Bytes per row that a Scorer holds beside what it stores: three tiles."""
    return 3 * min(vocab, SCORE_TILE) * itemsize


def _in_shard(ids, vocab):
    """Bool mask of the ids in [0, V), and ids that are safe to index with."""
    return (ids >= 0) & (ids < vocab), ids.clamp(0, vocab - 1)


def target_logits(h, weight, ids):
    """h_i . W[ids_i] in compute dtype, (M,); 0 where the id is outside [0, V)."""
    hit, safe = _in_shard(ids, len(weight))
    dtype = compute_dtype(weight.dtype)
    z = h.new_zeros(len(h), dtype=dtype)
    step = max(1, TARGET_ENTRIES // max(1, h.shape[1]))
    for r in (slice(i, i + step) for i in range(0, len(h), step)):
        z[r] = torch.linalg.vecdot(h[r].to(dtype), weight[safe[r]].to(dtype))
    return torch.where(hit, z, 0)


class Scorer:
    """Streams rows of one head through exp, tile by tile."""

    def __init__(
        self, weight, bias, temperature, logit_scale, softcap, chunk_rows, reduce_sum=None,
        reduce_max=None,
    ):
        self.weight, self.bias, self.softcap = weight, bias, softcap
        self.temperature, self.logit_scale = temperature, logit_scale
        self.chunk_rows, self.scratch = chunk_rows, None
        self.reduce_sum, self.reduce_max = reduce_sum, reduce_max
        self.dtype = compute_dtype(weight.dtype)

    def _scratch(self, rows, columns):
        """Three contiguous tiles (rows, columns), allocated once."""
        if self.scratch is None:
            size = self.chunk_rows * min(len(self.weight), SCORE_TILE)
            self.scratch = self.weight.new_empty(3, size, dtype=self.dtype)
        return [x[: rows * columns].view(rows, columns) for x in self.scratch]

    def _tiles(self, h, out=None):
        """Columns, logits z of each tile in `out` (or scratch), and two spare tiles."""
        for j in range(0, len(self.weight), SCORE_TILE):
            w = self.weight[j : j + SCORE_TILE]
            columns = slice(j, j + len(w))
            first, *spare = self._scratch(len(h), len(w))
            z = first if out is None else out[:, columns]
            gemm.logits(h, w, z)
            if self.bias is not None:
                z += self.bias[columns]
            if self.softcap is not None:
                z.mul_(self.logit_scale / self.softcap).tanh_()
                z *= self.softcap / self.temperature
            elif self.logit_scale != self.temperature:
                z *= self.logit_scale / self.temperature
            yield columns, z, *spare

    def _cap_slope(self, z, out):
        """1 - tanh^2, from the capped logits."""
        torch.mul(z, self.temperature / self.softcap, out=out)
        return out.square_().neg_().add_(1)

    def _pass(self, h, c, out, keep, want_entropy, ids=None, z_y=None, logits=None):
        """One pass with the levels c; s and t as `score` returns them, the rest as it writes it."""
        s = c.new_zeros(len(c))
        t = torch.zeros_like(s) if want_entropy else None
        in_place = out is not None and out.dtype == self.dtype
        for columns, z, spare, level in self._tiles(h, out if in_place else None):
            slope = None
            if ids is not None:
                hit, safe = _in_shard(ids - columns.start, z.shape[1])
                here = z.gather(1, safe.view(len(z), -1)).view_as(z_y)
                z_y.copy_(torch.where(hit, here, z_y))
            if logits is not None:
                total, top, top_ids = logits
                total += z.sum(-1)
                value, index = z.max(-1)
                top_ids.copy_(torch.where(value > top, index + columns.start, top_ids))
                torch.maximum(value, top, out=top)
            if keep == "logits":
                if not in_place:
                    out[:, columns] = z
                e = torch.sub(z, c.unsqueeze(-1), out=spare)
            else:
                if keep == "exp" and self.softcap is not None:
                    slope = self._cap_slope(z, spare)
                e = z.sub_(c.unsqueeze(-1))
            if want_entropy:  # a bias of -inf forbids a token: keep 0 * inf out
                torch.clamp(e, min=LOG_FLOOR, out=level)
            e.exp_()
            if want_entropy:
                t += level.mul_(e).sum(-1)
            s += e.sum(-1)
            if keep == "exp":
                if slope is not None:
                    e *= slope
                if not in_place:
                    out[:, columns] = e
        if self.reduce_sum is not None:
            self.reduce_sum(s)
            if ids is not None:
                self.reduce_sum(z_y)
            if logits is not None:
                self.reduce_sum(logits[0])
            if want_entropy:
                self.reduce_sum(t)
        return s, t

    def begin(self, h):
        """Nothing: the logits of all columns are never there at once."""

    def _row_max(self, h):
        m = h.new_full((len(h),), -math.inf, dtype=self.dtype)
        for _, z, *_ in self._tiles(h):
            m = torch.maximum(m, z.amax(-1))
        if self.reduce_max is not None:
            self.reduce_max(m)
        return torch.where(m.isfinite(), m, 0)

    def score(
        self,
        h,  # (M, H)
        c,  # (M,)
        *,
        out=None,  # (M, V)
        keep=None, want_entropy=False,
        ids=None,  # (M,) or (M, K)
        z_y=None,  # the same
        logits=None,  # three (M,), the last int64
    ):
        """c, s, t, each (M,): the level used, sum e and (if wanted) sum e (z - c), e = exp(z - c).

        keep "exp" stores e times the softcap's slope in out, "logits" stores z. With ids, z_y
        becomes the logit there as this GEMM rounds it; `logits` become the sum of a row's, its
        largest and where it is, the first of equals, the last two on this shard.
        """
        if capturing(h):  # no host may look at the flags: take the true maximum of every row
            c = self._row_max(h)
        if ids is not None:
            z_y.zero_()
        if logits is not None:
            for x, start in zip(logits, (0, -math.inf, 0), strict=True):
                x.fill_(start)
        s, t = self._pass(h, c, out, keep, want_entropy, ids, z_y, logits)
        if capturing(h):
            return c, s, t
        rows = (~trusted_rows(s)).nonzero().squeeze(-1)
        if len(rows) == 0:
            return c, s, t
        c = c.clone()
        for i in rows.split(max(1, self.chunk_rows // 8)):  # a copy that the workspace hardly feels
            redone = None if out is None else out.new_empty(len(i), out.shape[1])
            c[i] = self._row_max(h[i])
            s[i], t_exact = self._pass(h[i], c[i], redone, keep, want_entropy)
            if want_entropy:
                t[i] = t_exact
            if out is not None:
                out[i] = redone
        return c, s, t

    def logit_gradient(self, z, out, ids, lse, g, g_entropy, entropy, even, scale):
        """out = scale (g (p - onehot(y)) + g_entropy p (log p + H) + even) slope, p = exp(z - lse),
        but at y without `even`: with it, the caller has y's entry to set."""
        # In compute dtype, for p - 1 cancels where p is near 1; from z before `out` overwrites it.
        _, safe = _in_shard(ids, z.shape[1])
        z_y = z.gather(1, safe.unsqueeze(-1)).squeeze(-1)
        at_target = g * torch.expm1(z_y - lse)
        if g_entropy is not None:
            log_p = (z_y - lse).clamp(min=LOG_FLOOR)
            at_target += g_entropy * log_p.exp() * (log_p + entropy)
        if self.softcap is not None:
            at_target *= self._cap_slope(z_y, torch.empty_like(z_y))
        column = [
            None if x is None else x.unsqueeze(-1) for x in (lse, g, g_entropy, entropy, even)
        ]
        for i, j in itertools.product(  # a group may hold more rows than are scored at once
            range(0, len(z), self.chunk_rows), range(0, z.shape[1], SCORE_TILE)
        ):
            rows, columns = slice(i, i + self.chunk_rows), slice(j, j + SCORE_TILE)
            here, g_here, g_h, h, m = (None if x is None else x[rows] for x in column)
            tile = z[rows, columns]
            p, log_p, _ = self._scratch(*tile.shape)
            torch.sub(tile, here, out=log_p)
            torch.exp(log_p, out=p)
            if g_h is None:
                p *= scale * g_here
            else:
                log_p.clamp_(min=LOG_FLOOR).add_(h)
                p *= log_p.mul_(g_h).add_(g_here).mul_(scale)
            if m is not None:
                p += scale * m
            if self.softcap is not None:
                p *= self._cap_slope(tile, log_p)
            out[rows, columns] = p
        fix_targets(out, ids, scale * at_target)


def energies(e, v):
    """Sums of (v_i e_ij)^2 down the columns (V,) and along the rows (M,)."""
    columns, rows = v.new_empty(e.shape[1]), torch.zeros_like(v)
    for j in range(0, e.shape[1], SCORE_TILE):
        tile = e[:, j : j + SCORE_TILE].to(v.dtype) * v.unsqueeze(-1)
        tile.square_()
        torch.sum(tile, 0, out=columns[j : j + SCORE_TILE])
        rows += tile.sum(1)
    return columns, rows


def fix_targets(e, ids, values):
    """In place e[i, ids_ik] = values_ik where 0 <= ids_ik < V; ids (M,) or (M, K)."""
    row = torch.arange(len(ids), device=ids.device)
    columns = ((ids, values),) if ids.dim() == 1 else zip(ids.T, values.T, strict=True)
    for i, value in columns:  # ids that are not in [0, V) must not meet others where they land
        hit, safe = _in_shard(i, e.shape[1])
        e[row, safe] = torch.where(hit, value.to(e.dtype), e[row, safe])


def scale(x, factor):
    """In place x *= factor, (1,)."""
    x.mul_(factor)


def token_rows(
    log_probs, advantages, loss_weights, rlsd_lambda, config, *, teacher_log_probs=None,
    old_log_probs=None, ref_log_probs=None, reweight_mask=None, entropy=None,
):
    """loss (), g = dL/dlog p(y) (M,), sums (len(TOKEN_SUMS),) fp64; no entropy bonus in the loss.

    PPO's min and the dual clip are one clamp of the log-ratio, because A_hat keeps A's sign:
    A > 0: loss = -A_hat min(rho, 1 + epsilon_high);  A < 0: -A_hat clamp(rho, 1 - epsilon, delta).
    """
    positive, negative = advantages > 0, advantages < 0
    active = (loss_weights != 0) & (advantages != 0)
    live = loss_weights != 0 if config.beta > 0 else active
    zero = log_probs.new_zeros(())
    old = log_probs if old_log_probs is None else old_log_probs
    a_hat, delta, signed = advantages, zero, zero
    chosen = torch.zeros_like(active)
    low_w, high_w = config.log_weight_bounds
    if teacher_log_probs is not None:
        chosen = active & negative if config.rlsd_negative_only else active
        if reweight_mask is not None:
            chosen = chosen & reweight_mask
        student = old if config.rlsd_delta_source == "old_log_probs" else log_probs
        # Equal contexts have weight 1, also where both log-probs are -inf.
        delta = torch.where(teacher_log_probs == student, 0, teacher_log_probs - student)
        signed = torch.sign(advantages) * delta
        weight = signed.clamp(low_w, high_w).exp()
        mixed = advantages * ((1 - rlsd_lambda) + rlsd_lambda * weight)
        a_hat = torch.where(chosen, mixed, advantages)
    low_ratio, high_ratio, dual_ratio = config.log_ratio_bounds
    # From `zero`: where() of two Python floats would be fp32, which fp64 tokens notice.
    low = torch.where(positive, zero - MAX_LOG_RATIO, zero + low_ratio)
    high = torch.where(positive, zero + high_ratio, zero + dual_ratio)
    log_ratio = log_probs - old
    loss = -a_hat * torch.minimum(torch.maximum(log_ratio, low), high).exp()
    g = torch.where((log_ratio < low) | (log_ratio > high), 0 * a_hat, loss)  # NaN stays NaN
    kl = zero
    if ref_log_probs is not None:
        d = ref_log_probs - log_probs
        slope = torch.expm1(d.clamp(max=MAX_LOG_RATIO))
        kl = slope - d.clamp(max=MAX_LOG_RATIO)
        if config.beta > 0:
            loss = loss + config.beta * kl
            g = g - config.beta * torch.where(d > MAX_LOG_RATIO, 0, slope)
    loss, g = torch.where(live, loss_weights * loss, 0), torch.where(live, loss_weights * g, 0)

    ratio = torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    dual = math.inf if config.delta is None else config.delta
    multiplier = a_hat / advantages
    summed = (
        (chosen & positive, 1), (chosen & negative, 1), (active & positive, 1),
        (active & negative, 1), (chosen & positive, delta), (chosen & negative, delta),
        (chosen, delta.double() ** 2), (active & positive, multiplier),
        (active & negative, multiplier), (chosen & (signed < low_w), 1),
        (chosen & (signed > high_w), 1), (active & negative & (ratio < 1 - config.epsilon), 1),
        (active & positive & (ratio > 1 + config.epsilon_high), 1),
        (active & negative & (ratio > dual), 1), (active, kl),
        (active, zero if entropy is None else entropy), (active, old - log_probs),
    )
    sums = torch.stack([torch.where(where, x, 0).double().sum() for where, x in summed])
    return loss.sum(), g, sums
