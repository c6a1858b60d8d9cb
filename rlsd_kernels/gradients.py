"""dh, dW and db of rows from D = dL/dlogits (M, V): whole, or what a tolerance keeps of it.

    dh = D W (M, H)                             dW = D^T h (V, H)

4 NHV FLOP, on a matrix that is all but empty once a policy is trained. With a tolerance:

    column energies c_j = sum_i D_ij^2,  row energies r_i = sum_j D_ij^2
    left out: the columns that carry at most tolerance^2 / 2 of the whole, and the rows likewise,
    so that |D - D_kept| <= tolerance |D| in the Frobenius norm

    dW[kept] += D_kept^T h[kept]                dh[kept] = D_kept W[kept] + m w^T
    m_i = sum of row i's dropped entries        w = mean of the dropped rows of W by sqrt(c_j)

The rank-one term takes up that rows of W share a mean: without it dh errs ten times as much at 2.4
nats. Both GEMMs shrink from M V to kept rows x kept columns; log-probs and loss never change.
Where v is only known in backward, columns are chosen on rows of p - onehot scaled to energy 1, so
that no row hides behind a louder one, and rows once v is there. What each row's columns leave out
is kept too: rows on which v puts more weight than that allows are formed anew: the bound holds.
"""

from typing import NamedTuple

import torch

from . import gemm
from .config import capturing, compute_dtype

FP16_SCALE = 2048.0  # times p (1 + |log p + H|) <= 14 stays below fp16's 65504
WAITING = 8  # chunks whose dx is held in fp32 for one reading of the head
GATHERED_SHARE = 0.25  # of dW's rows: more are summed in a matrix of all
DENSE_SHARE = 0.5  # a chunk that keeps more of its entries is not worth gathering them
ROUNDING = 1e-3  # of an allowed energy: what sums in fp32 may differ by
UNIT = 2**52  # energies are summed as integers of this fraction: exact, in whatever order


def _order(energy, tolerance):
    """Indices by ascending energy (n,), and how many of the first carry at most tolerance^2 / 2 of
    it; none where it has a NaN or an infinity, which must stay in the gradient."""
    energy = energy.double()
    total = energy.sum()
    parts, order = (energy * (UNIT / total)).sort()
    # All of them where nothing has energy.
    carried = parts.nan_to_num(0).ceil().long().cumsum(0)
    out = (carried <= tolerance * tolerance / 2 * UNIT).sum()
    return order, torch.where(total.isfinite(), out, 0)


def nothing():
    """To do while the host waits."""


def on_host(counts, meanwhile=nothing):
    """The list of an integer tensor. The host waits for it; what meanwhile() queues keeps a GPU
    busy until the host has gone on and queued more."""
    if not counts.is_cuda:
        meanwhile()
        return counts.tolist()
    host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
    with torch.cuda.device_of(counts):
        host.copy_(counts, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        meanwhile()
        copied.synchronize()
    return host.tolist()


def carrying(energy, tolerance, meanwhile=nothing):
    """Indices (K,), ascending, that carry all but tolerance^2 / 2 of the energy (n,); all where it
    has a NaN, which must stay in the gradient. The host waits for their number."""
    order, out = _order(energy, tolerance)
    return order[on_host(out, meanwhile) :].sort().values


def exceeding(energy, share, tolerance):
    """(n,) bool: the fewest rows without whose part the columns left out carry at most
    tolerance^2 / 2 of the energy (n,) of all the others; share (n,): of each row's own energy.

    A row that goes takes its own tolerance^2 / 2 with it. None where the energy has a NaN.
    """
    allowed = tolerance * tolerance / 2 * (1 + ROUNDING)
    parts = energy.double() * (share.double() - allowed)
    total = parts.abs().sum()
    parts, order = (parts * (UNIT / total)).sort(descending=True)
    parts = parts.nan_to_num(0).ceil().long()
    rest = parts.sum() - (parts.cumsum(0) - parts)  # of this row and those after it
    more = (rest > 0) & total.isfinite()
    return torch.zeros_like(more).index_copy(0, order, more)


def selection(columns, rows, tolerance, multiple=1, meanwhile=nothing):
    """(kept rows, kept columns), ascending, by their energies (M,) and (V,).

    multiple: some more columns are kept, so that their number is one of it where V is. None where
    the whole matrix is taken: nearly all of it is kept, or a NaN must stay in it.
    """
    i, rows_out = _order(rows, tolerance)
    j, columns_out = _order(columns, tolerance)
    rows_out, columns_out = on_host(torch.stack([rows_out, columns_out]), meanwhile)
    columns_out -= (columns_out - len(j)) % multiple
    i, j = i[rows_out:], j[max(0, columns_out):]
    if len(i) * len(j) > DENSE_SHARE * len(rows) * len(columns):
        return None
    return i.sort().values, j.sort().values


def dropped_share(energy, j):
    """(V,) summing to 1: sqrt(energy) (V,) of all columns but j."""
    share = energy.sqrt().index_fill(0, j, 0)
    total = share.sum()
    return share / torch.where(total > 0, total, 1)


def dropped_directions(weight, shares):
    """w (K, H): means of the rows of weight (V, H), weighed by each of `shares`, K of (V,); the
    head is read once for all of them."""
    return gemm.dx(torch.stack(shares).to(gemm.operand_dtype(weight)), weight)


def lost_mass(e, d, shard, balanced):
    """Sums of the rows of e (M, V) over the columns that d (M, J) leaves out."""
    dtype = compute_dtype(e.dtype)
    lost = -d.sum(1, dtype=dtype)  # balanced: rows of the whole D sum to 0
    if not balanced or shard.sum is not None:
        lost += e.sum(1, dtype=dtype)
    return lost


def _rows(index, i):
    """Rows i of an index, or of a slice."""
    return i + index.start if isinstance(index, slice) else index[i]


class Kept(NamedTuple):
    """What a forward pass over N rows in K chunks leaves for their gradient; empty is nothing."""

    e: torch.Tensor  # (N, V or more, rows are padded), or the chunks' kept columns, flat
    s: torch.Tensor  # (N,) row sums of exp(z - c)
    columns: torch.Tensor  # the chunks' columns, one after another
    sizes: torch.Tensor  # (K, 2) on the CPU: rows, kept columns or -1: to be formed anew
    energy: torch.Tensor  # (N,) of p - onehot
    lost: torch.Tensor  # (N,) sums of e over the columns that are not kept
    share: torch.Tensor  # (N,) their share of the row's energy
    direction: torch.Tensor  # (K, H) dropped_direction

    @classmethod
    def nothing(cls, x, operand, dtype):
        """On x's device."""
        count, number = x.new_empty(0, dtype=torch.int64), x.new_empty(0, dtype=dtype)
        return cls(
            x.new_empty(0, dtype=operand), number, count, count.new_empty(0, device="cpu"),
            *(number.clone() for _ in range(4)),
        )


class Columns:
    """Collects Kept of rows whose coefficients are not known yet, chunk by chunk."""

    def __init__(self, kernels, head, shard, tolerance, max_bytes):
        self.kernels, self.head, self.shard = kernels, head, shard
        self.tolerance, self.left, self.parts = tolerance, max_bytes, []

    def add(
        self,
        e,  # (M, V) with fixed targets, in a buffer that will be overwritten
        s,  # (M,)
        meanwhile=nothing,
    ):
        weight, size = self.head.weight, len(e) * e.itemsize
        energy = (torch.linalg.vector_norm(e, dim=1, dtype=s.dtype) / s).square()
        if self.shard.sum is not None:
            energy = self.shard.sum(energy)
        norm = s * energy.sqrt()
        scale = torch.where(norm > 0, 1 / norm, 0)
        columns, _ = self.kernels.energies(e, scale)
        j = carrying(columns, self.tolerance, meanwhile)
        if len(j) > DENSE_SHARE * len(columns):
            j = carrying(columns, 0.0)
        fits = not self.shard.any(len(j) * size > self.left, s)
        width = len(j) if fits else -1
        if not fits:
            j = j[:0]
        self.left -= len(j) * size
        d = e.index_select(1, j)
        if fits:
            w = dropped_directions(weight, [dropped_share(columns, j)])
        else:
            w = weight.new_zeros(1, weight.shape[1], dtype=s.dtype)
        lost = lost_mass(e, d, self.shard, self.head.softcap is None)
        _, share = self.kernels.energies(e.index_fill_(1, j, 0), scale)
        if self.shard.sum is not None:
            share = self.shard.sum(share)
        sizes = torch.tensor([[len(e), width]])
        self.parts.append((d.view(-1), s, j, sizes, energy, lost, share, w))

    def kept(self):
        return Kept(*map(torch.cat, zip(*self.parts, strict=True)))


class Gradients:
    """dh by rows; dW and db summed over groups of rows and rounded once, at the end."""

    def __init__(
        self, kernels, hidden, head, shard, dx_dtype, need, one_group, size=None,
        gradient_tolerance=0.0, sums_to_0=True,
    ):
        """size: 0-dim, the rough size of the rows' coefficients where e comes in fp16;
        sums_to_0: whether rows of dL/dlogits do, as those of log p and of an entropy do."""
        self.kernels, self.tolerance = kernels, gradient_tolerance
        self.weight, self.shard, self.size = head.weight, shard, None
        self.balanced, self.work = sums_to_0 and head.softcap is None, 0.0
        if size is not None:
            self.size = torch.where(size > 0, size, 1) / FP16_SCALE
        self.need_dx, self.need_dw, self.need_db = need
        dtype, operand = compute_dtype(self.weight.dtype), gemm.operand_dtype(self.weight)
        # One GEMM over all rows accumulates in fp32 by itself: no fp32 copy of dW.
        one_group = one_group and not gradient_tolerance
        self.sums = operand if one_group and operand == torch.bfloat16 else dtype
        self.dx = hidden.new_zeros(hidden.shape if self.need_dx else 0, dtype=dx_dtype)
        self.db = self.weight.new_zeros(len(self.weight) if self.need_db else 0, dtype=dtype)
        self.dw, self.parts = None, []  # (V, H) in `sums`, or (J,) and those rows of it
        self.waiting = []  # rows whose dx lacks the rank-one term
        self.every_row = None

    def add(
        self,
        index,  # (M,) rows of hidden, or a slice
        h,  # (M, H) those rows in the GEMMs' dtype
        v,  # (M,)
        e,  # (M, V)
        even=None,  # (M,)
        *, meanwhile=nothing,
    ):
        """Rows whose gradient at the raw logits is v e, or v e + even with a tolerance of 0."""
        if self.tolerance and not capturing(h):
            largest = v.abs().amax()  # whose square may be no number of fp32
            columns, rows = self.kernels.energies(e, v / torch.where(largest > 0, largest, 1))
            if self.shard.sum is not None:
                rows = self.shard.sum(rows)
            chosen = selection(
                columns, rows, self.tolerance, gemm.multiple(self.weight), meanwhile
            )
            if not self.shard.any(chosen is None, v):
                i, j = chosen
                d = e.index_select(1, j)
                lost = lost_mass(e, d, self.shard, self.balanced)[i]
                share = dropped_share(columns, j) if self.need_dx else None
                return self.add_columns(
                    _rows(index, i), h[i], v[i], d[i], j, lost, share=share
                )
        self.work += len(h)
        if self.need_dx:
            dx = gemm.dx(e, self.weight).mul_(v.unsqueeze(-1))
            if even is not None:
                dx.addr_(even, self.weight.sum(0, dtype=dx.dtype))
            if self.shard.sum is not None:
                dx = self.shard.sum(dx)
            self.dx[index] = dx.to(self.dx.dtype)
            del dx  # a chunk of it in fp32, before dW takes its own
        if self.size is not None:
            v = v / self.size
        if self.need_dw:
            first = self.dw is None and not self.parts
            gemm.add_dw(self._whole_dw(), e, (v.unsqueeze(-1) * h).to(e.dtype), first=first)
        if self.need_db:
            # In two parts: v rounded to 16 bits alone would add 2^-9 to the error of E.
            high = v.to(e.dtype)
            parts = torch.stack([high, (v - high).to(e.dtype)], -1)
            sums = self.db.new_empty(len(self.db), 2)
            self.db += gemm.add_dw(sums, e, parts, first=True).sum(-1)
        if even is not None and self.need_dw:
            row = even @ h.to(even.dtype)
            self.every_row = row if self.every_row is None else self.every_row + row
        if even is not None and self.need_db:
            self.db += even.sum()

    def add_columns(
        self,
        index,  # (K,) rows of hidden
        h,  # (K, H)
        v,  # (K,)
        d,  # (K, J) of e
        j,  # (J,) its columns
        lost,  # (K,) sums of what is left out of e
        w=None,  # (H,) dropped_directions of the rows, or
        share=None,  # (V,) the dropped_share that gives it
    ):
        """`add` of some columns alone, with the rank-one term for the others."""
        self.work += len(h) * len(j) / len(self.weight)
        if len(h) == 0:
            return
        if self.need_dx:
            dx = gemm.dx(d, self.weight[j]) if len(j) else lost.new_zeros(h.shape)
            if share is None:
                self._put_dx(index, dx, v, lost, w)
            else:
                self.waiting.append((index, dx, v, lost, share))
                if len(self.waiting) == WAITING:
                    self._put_waiting()
        if self.size is not None:
            v = v / self.size
        if self.need_dw and len(j):
            x = (v.unsqueeze(-1) * h).to(d.dtype)
            part = x.new_empty(len(j), h.shape[1], dtype=self.sums)
            gemm.add_dw(part, d, x, first=True)
            if self.dw is None:
                self.parts.append((j, part))
                if sum(len(j) for j, _ in self.parts) > GATHERED_SHARE * len(self.weight):
                    self._whole_dw()
            else:
                self.dw.index_add_(0, j, part)
        if self.need_db:
            self.db[j] += (d.to(v.dtype) * v.unsqueeze(-1)).sum(0)

    def _put_dx(self, index, dx, v, lost, w):
        dx = dx.addr_(lost, w).mul_(v.unsqueeze(-1))
        if self.shard.sum is not None:
            dx = self.shard.sum(dx)
        self.dx[index] = dx.to(self.dx.dtype)

    def _put_waiting(self):
        """Several at a time: each reading of the head for a direction costs as much as them all."""
        if self.waiting:
            ws = dropped_directions(self.weight, [share for *_, share in self.waiting])
            for (*rows, _), w in zip(self.waiting, ws, strict=True):
                self._put_dx(*rows, w)
        self.waiting = []

    def _whole_dw(self):
        """dW as one matrix: the rows gathered so far, or not yet written where there are none."""
        if self.dw is None:
            new = self.weight.new_zeros if self.parts else self.weight.new_empty
            self.dw = new(self.weight.shape, dtype=self.sums)
            for j, part in self.parts:
                self.dw.index_add_(0, j, part)
            self.parts = []
        return self.dw

    def _gathered_dw(self, dtype):
        """dW of which only some rows were written, summed in a matrix of their number."""
        dw = self.weight.new_zeros(self.weight.shape if self.need_dw else 0, dtype=dtype)
        if not self.parts:
            return dw
        touched = dw.new_zeros(len(dw), dtype=torch.int64)
        for j, _ in self.parts:
            touched.index_fill_(0, j, 1)  # touched[j] = 1 would copy the 1, and wait
        place = touched.cumsum(0) - 1
        rows = sum(len(j) for j, _ in self.parts)
        total = dw.new_zeros(rows, dw.shape[1], dtype=self.sums)
        for j, part in self.parts:
            total.index_add_(0, place[j], part)
        if self.size is not None:
            total *= self.size
        for j, _ in self.parts:
            dw[j] = total[place[j]].to(dtype)
        return dw

    def cast(self, dw_dtype, db_dtype):
        self._put_waiting()
        if self.dw is None:
            dw = self._gathered_dw(dw_dtype)
        else:
            dw = self.dw
            if self.every_row is not None:
                dw += self.every_row
            if self.size is not None:
                dw *= self.size
            dw = dw.to(dw_dtype)
        db = self.db if self.size is None else self.db.mul_(self.size)
        return self.dx, dw, db.to(db_dtype)
