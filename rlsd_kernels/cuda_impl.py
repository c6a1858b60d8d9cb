"""CUDA kernels (csrc/): rows of logits through exp, the strict logit gradient, and the RLSD tokens.

    x = h W^T,   z = softcap(logit_scale (x + bias)) / temperature,   s = sum_j exp(z_j - c)

The stages of triton_impl from one compiled extension, which needs no Triton and no compiler at run
time. x comes from cuBLAS in an fp32 chunk (streaming.py); per row 4V bytes are read and 2V (bf16 E)
written, or none. Sums are in a fixed order: results repeat bitwise on a device.
"""

import torch

from . import extension, tuning
from .config import TOKEN_SUMS
from .streaming import (
    STORE_NONE,
    StreamingScorer,
    padded,
    scratch_bytes,
    unit_stride,
)

__all__ = ["Scorer", "energies", "fix_targets", "padded", "scale", "scratch_bytes",
           "target_logits", "token_rows"]
ENERGY_COLUMNS = 256  # kEnergyColumns of csrc/rlsd.h


def target_logits(h, weight, ids):
    """Raw h_i . W[ids_i] in fp32, (M,); 0 where the id is outside [0, V)."""
    out = torch.empty(len(h), dtype=torch.float32, device=h.device)
    extension.load().target_logits(unit_stride(h), unit_stride(weight), ids.contiguous(), out)
    return out


def fix_targets(e, ids, values):
    """In place e[i, ids_ik] = values_ik where 0 <= ids_ik < V; ids (M,) or (M, K)."""
    extension.load().fix_targets(e, ids.contiguous(), values.contiguous())


def energies(e, v):
    """Sums of (v_i e_ij)^2 down the columns (V,) and along the rows (M,): one read of e."""
    (m, vocab), strip = e.shape, tuning.ENERGY_ROWS
    columns = v.new_empty(-(-m // strip), vocab)
    parts = v.new_empty(-(-vocab // ENERGY_COLUMNS), m)
    extension.load().energies(e, v.contiguous(), columns, parts, strip)
    return columns.sum(0), parts.sum(0)


def scale(x, factor):
    """In place x *= factor, (1,); nothing is read or written where it is 1."""
    if x.dtype == torch.float64:  # an fp64 bias
        x.mul_(factor)
    else:
        extension.load().scale(x, factor.float())


def token_rows(
    log_probs, advantages, loss_weights, rlsd_lambda, config, *, teacher_log_probs=None,
    old_log_probs=None, ref_log_probs=None, reweight_mask=None, entropy=None,
):
    """loss (), g (M,) and the TOKEN_SUMS in fp64; entropy only feeds its sum."""
    given = [log_probs, advantages, loss_weights, teacher_log_probs, old_log_probs, ref_log_probs,
             reweight_mask, entropy]
    given = [None if x is None else x.contiguous() for x in given]
    g = torch.empty_like(given[0])
    loss = g.new_empty(())
    sums = g.new_empty(len(TOKEN_SUMS), dtype=torch.float64)
    extension.load().token_rows(
        *given, rlsd_lambda.float(), loss, g, sums, *config.token_bounds,
        config.rlsd_delta_source == "old_log_probs", config.rlsd_negative_only,
    )
    return loss, g, sums


class Scorer(StreamingScorer):
    def __init__(self, *head):
        super().__init__(*head)
        if self.bias is not None:
            self.bias = self.bias.float().contiguous()  # one dtype of bias in the kernels

    def _exp(self, x, epilogue, c, s, t, out, store, total=None):
        bias, pre, post, capped = epilogue
        extension.load().exp_rows(
            x, bias, c, s, t, None if store == STORE_NONE else out, total, pre, post, capped, store
        )

    def _row_max(self, x, epilogue, c, total):
        bias, pre, post, capped = epilogue
        extension.load().row_max(x, bias, c, total, pre, post, capped)

    def _row_logits(self, x, epilogue, total, top_ids):
        bias, pre, post, capped = epilogue
        extension.load().row_logits(x, bias, total, top_ids, pre, post, capped)

    def logit_gradient(self, z, out, ids, lse, g, g_entropy, entropy, even, scale):
        """out = scale (g (p - onehot) + g_entropy p (log p + H) + even) dcap, p = exp(z - lse)."""
        rows = [ids, lse, g, None, None, even]
        if g_entropy is not None and entropy is not None:
            rows[3:5] = [g_entropy, entropy]
        rows = [None if x is None else x.contiguous() for x in rows]
        extension.load().logit_gradient(z, out, *rows, scale, 1 / self.post, self.capped)
