"""What the two gradient GEMMs may leave out of D = dL/dlogits (M, V), all but empty once trained.

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
