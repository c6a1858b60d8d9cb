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
"""

import torch

from . import gemm
from .config import capturing, compute_dtype

FP16_SCALE = 2048.0  # times p (1 + |log p + H|) <= 14 stays below fp16's 65504
DENSE_SHARE = 0.5  # a chunk that keeps more of its entries is not worth gathering them
UNIT = 2**52  # energies are summed as integers of this fraction: exact, in whatever order


def _order(energy, share):
    """Indices by ascending energy (n,), and how many of the first carry at most `share` of it."""
    energy = energy.double()
    parts, order = (energy * (UNIT / energy.sum())).sort()
    # All of them where nothing has energy.
    carried = parts.nan_to_num(0).ceil().long().cumsum(0)
    return order, (carried <= share * UNIT).sum()


def selection(columns, rows, tolerance):
    """(kept rows, kept columns), ascending, by their energies (M,) and (V,).

    None where the whole matrix is taken: nearly all of it is kept, or a NaN must stay in it.
    """
    share = tolerance * tolerance / 2
    i, rows_out = _order(rows, share)
    j, columns_out = _order(columns, share)
    finite = columns.sum().isfinite()
    rows_out, columns_out, finite = torch.stack([rows_out, columns_out, finite]).tolist()
    i, j = i[rows_out:], j[columns_out:]
    if not finite or len(i) * len(j) > DENSE_SHARE * len(rows) * len(columns):
        return None
    return i.sort().values, j.sort().values


def dropped_direction(weight, energy, j):
    """w (H,): the mean of all rows of weight (V, H) but j, weighed by their sqrt(energy) (V,)."""
    share = energy.sqrt().index_fill(0, j, 0)
    total = share.sum()
    share = share / torch.where(total > 0, total, 1)
    return gemm.dx(share[None].to(gemm.operand_dtype(weight)), weight)[0]


class Gradients:
    """dh by rows; dW and db summed over groups of rows and rounded once, at the end."""

    def __init__(
        self, kernels, hidden, head, shard, dx_dtype, need, one_group, size=None,
        gradient_tolerance=0.0,
    ):
        """size: 0-dim, the rough size of the rows' coefficients where e comes in fp16."""
        self.kernels, self.tolerance = kernels, gradient_tolerance
        self.weight, self.shard, self.size = head.weight, shard, None
        self.capped, self.work = head.softcap is not None, 0.0
        if size is not None:
            self.size = torch.where(size > 0, size, 1) / FP16_SCALE
        self.need_dx, self.need_dw, self.need_db = need
        dtype, operand = compute_dtype(self.weight.dtype), gemm.operand_dtype(self.weight)
        # One GEMM over all rows accumulates in fp32 by itself: no fp32 copy of dW.
        one_group = one_group and not gradient_tolerance
        sums = operand if one_group and operand == torch.bfloat16 else dtype
        self.dx = hidden.new_zeros(hidden.shape if self.need_dx else 0, dtype=dx_dtype)
        self.dw = self.weight.new_empty(self.weight.shape if self.need_dw else 0, dtype=sums)
        self.db = self.weight.new_zeros(len(self.weight) if self.need_db else 0, dtype=dtype)
        self.empty = True
        if gradient_tolerance:  # columns are added where they are kept
            self.dw.zero_()
            self.empty = False

    def add(
        self,
        index,  # (M,) rows of hidden, or a slice
        h,  # (M, H) those rows in the GEMMs' dtype
        v,  # (M,)
        e,  # (M, V)
    ):
        """Rows whose gradient at the raw logits is v e."""
        if self.tolerance and not capturing(h):
            largest = v.abs().amax()  # whose square may be no number of fp32
            columns, rows = self.kernels.energies(e, v / torch.where(largest > 0, largest, 1))
            if self.shard.sum is not None:
                rows = self.shard.sum(rows)
            chosen = self._agreed(selection(columns, rows, self.tolerance))
            if chosen is not None:
                return self._add_kept(index, h, v, e, columns, *chosen)
        self.work += len(h)
        if self.need_dx:
            dx = gemm.dx(e, self.weight).mul_(v.unsqueeze(-1))
            if self.shard.sum is not None:
                dx = self.shard.sum(dx)
            self.dx[index] = dx.to(self.dx.dtype)
            del dx  # a chunk of it in fp32, before dW takes its own
        if self.size is not None:
            v = v / self.size
        if self.need_dw:
            gemm.add_dw(self.dw, e, (v.unsqueeze(-1) * h).to(e.dtype), first=self.empty)
        if self.need_db:
            # In two parts: v rounded to 16 bits alone would add 2^-9 to the error of E.
            high = v.to(e.dtype)
            parts = torch.stack([high, (v - high).to(e.dtype)], -1)
            sums = self.db.new_empty(len(self.db), 2)
            self.db += gemm.add_dw(sums, e, parts, first=True).sum(-1)
        self.empty = False

    def _agreed(self, chosen):
        """The selection, None for all ranks of a sharded head where one takes the whole matrix."""
        if self.shard.sum is None:
            return chosen
        whole = self.weight.new_full((), chosen is None, dtype=torch.float32)
        return None if self.shard.sum(whole).item() else chosen

    def _add_kept(self, index, h, v, e, energy, i, j):
        """`add` of rows i and columns j alone, with the rank-one term for what is left out."""
        self.work += len(i) * len(j) / e.shape[1]
        if len(i) == 0:
            return
        d = e.index_select(1, j).index_select(0, i)  # kept rows x kept columns, to be scaled by v
        h, v = h[i], v[i]
        if self.need_dx:
            dx = v.new_zeros(len(e), self.weight.shape[1])
            lost = -d.sum(1, dtype=v.dtype)  # rows of the whole D sum to 0
            if self.capped or self.shard.sum is not None:
                lost += e.sum(1, dtype=v.dtype)[i]
            w = dropped_direction(self.weight, energy, j)
            part = torch.outer(lost, w)
            if len(j):
                part += gemm.dx(d, self.weight[j])
            dx[i] = part.mul_(v.unsqueeze(-1))
            if self.shard.sum is not None:
                dx = self.shard.sum(dx)
            self.dx[index] = dx.to(self.dx.dtype)
        if self.size is not None:
            v = v / self.size
        if self.need_dw and len(j):
            x = (v.unsqueeze(-1) * h).to(e.dtype)
            part = self.dw.new_empty(len(j), self.dw.shape[1])
            self.dw[j] += gemm.add_dw(part, d, x, first=True)
        if self.need_db:
            self.db[j] += (d.to(v.dtype) * v.unsqueeze(-1)).sum(0)

    def cast(self, dw_dtype, db_dtype):
        dw, db = self.dw, self.db
        if self.empty:
            dw.zero_()
        if self.size is not None:
            dw, db = dw.mul_(self.size), db.mul_(self.size)
        return self.dx, dw.to(dw_dtype), db.to(db_dtype)
