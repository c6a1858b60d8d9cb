"""Triton kernels of distillation: rows of two models' logits to D(P_T, P_S) and its gradient.

    z = softcap(logit_scale (x + bias)) / temperature,   log p = z - lse,   d = log q - log p

Three passes over both chunks of fp32 logits, a program per row: log-sum-exps (4V bytes each), D and
the mean of r (8V), the gradient at x (8V read, 2V or 4V written); forward KL needs two. PyTorch's
elementwise kernels take some thirty. Between passes (N,) numbers are summed over vocabulary shards.
Formulas, and why each keeps its digits at equality, are in distillation.row_divergence.
"""

import torch
import triton
import triton.language as tl

from . import tuning
from .config import LOG_FLOOR, MAX_LOG_RATIO
from .streaming import padded
from .triton_impl import _epilogue, _ordered_sum
from .triton_tokens import _exp_minus_line

FORWARD_KL, REVERSE_KL, JSD = (tl.constexpr(i) for i in range(3))
LIMIT, FLOOR, LOWEST = (tl.constexpr(x) for x in (MAX_LOG_RATIO, LOG_FLOOR, -3e38))
KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}


@triton.jit
def _expm1(x):
    return tl.where(tl.abs(x) < 0.5, x + _exp_minus_line(x), tl.exp(x) - 1.0)


@triton.jit
def _log1p(x):
    """log(1 + x) to fp32's relative precision: the rounding of 1 + x divides out."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _finished(x, bias, offs, V, P, pre, post, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """z and dz/dx of one tile; a bias of -inf gives the floor, and no gradient. P >= V columns may
    be touched: a multiple of 16, so that loads and stores are vectors at any V."""
    raw = tl.load(x + offs, mask=offs < P, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias + offs, mask=offs < V, other=0.0).to(tl.float32)
    z, slope = _epilogue(raw, pre, post, HAS_CAP)
    if HAS_BIAS:
        if not HAS_CAP:
            slope = tl.where(z <= FLOOR, 0.0, slope)
        z = tl.maximum(z, FLOOR)
    return z, slope


@triton.jit
def _lse_kernel(
    x,  # (M, V)
    bias,  # (V,)
    top,  # (M,) out: the row's maximum
    total,  # (M,) out: sum of exp(z - top)
    V, P, stride_x, pre, post, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * stride_x
    m = tl.full([BLOCK_V], LOWEST, tl.float32)
    s = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        z, _ = _finished(x, bias, offs, V, P, pre, post, HAS_BIAS, HAS_CAP)
        inside = offs < V
        higher = tl.where(inside & (z > m), z, m)
        s = s * tl.exp(m - higher) + tl.where(inside, tl.exp(z - higher), 0.0)
        m = higher
    peak = tl.max(m, 0)
    tl.store(top + row, peak)
    tl.store(total + row, _ordered_sum(s * tl.exp(m - peak)))


@triton.jit
def _pair(
    student, teacher, s_bias, t_bias, offs, V, P, lse_s, lse_t, pre, post, HAS_BIAS: tl.constexpr,
    HAS_T_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
):
    """log p, log q and dz/dx of the student."""
    zs, slope = _finished(student, s_bias, offs, V, P, pre, post, HAS_BIAS, HAS_CAP)
    zt, _ = _finished(teacher, t_bias, offs, V, P, pre, post, HAS_T_BIAS, HAS_CAP)
    return zs - lse_s, zt - lse_t, slope


@triton.jit
def _log_p_over_m(d, alpha):
    return -_log1p(_expm1(tl.minimum(d, LIMIT)) * alpha)


@triton.jit
def _divergence_kernel(
    student,  # (M, V)
    teacher,  # (M, V)
    s_bias, t_bias,  # (V,)
    lse_s, lse_t,  # (M,)
    value,  # (M,) out
    mean,  # (M,) out, of JSD only: sum of p r
    alpha, rest, V, P, stride_s, stride_t, pre, post, KIND: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_T_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """D of a row; rest is 1 - alpha, which fp32 alphas near 1 would lose."""
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    teacher += row * stride_t
    here_s, here_t = tl.load(lse_s + row), tl.load(lse_t + row)
    total = tl.zeros([BLOCK_V], tl.float32)
    total_r = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        log_p, log_q, _ = _pair(student, teacher, s_bias, t_bias, offs, V, P, here_s, here_t, pre,
                                post, HAS_BIAS, HAS_T_BIAS, HAS_CAP)
        p, q, d = tl.exp(log_p), tl.exp(log_q), log_q - log_p
        if KIND == FORWARD_KL:
            term = q * d + (p - q)
        elif KIND == REVERSE_KL:
            term = (q - p) - p * d
        else:
            p_r = p * _log_p_over_m(d, alpha)
            term = rest * p_r - alpha * (q * _log1p(_expm1(tl.minimum(-d, LIMIT)) * rest))
            total_r += tl.where(offs < V, p_r, 0.0)
        total += tl.where(offs < V, term, 0.0)
    tl.store(value + row, _ordered_sum(total))
    if KIND == JSD:
        tl.store(mean + row, _ordered_sum(total_r))


@triton.jit
def _divergence_gradient_kernel(
    student,  # (M, V)
    teacher,  # (M, V)
    s_bias, t_bias,  # (V,)
    lse_s, lse_t, mean, share,  # (M,)
    out,  # (M, V); may be student
    alpha, rest, V, P, stride_s, stride_t, stride_out, pre, post, KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_T_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """share dD/dx, up to the scale of the logits, which share holds."""
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    teacher += row * stride_t
    out += row * stride_out
    here_s, here_t = tl.load(lse_s + row), tl.load(lse_t + row)
    centre, scale = tl.load(mean + row), tl.load(share + row)
    for start in range(0, V, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        log_p, log_q, slope = _pair(student, teacher, s_bias, t_bias, offs, V, P, here_s, here_t,
                                    pre, post, HAS_BIAS, HAS_T_BIAS, HAS_CAP)
        p = tl.exp(log_p)
        if KIND == FORWARD_KL:
            dz = p - tl.exp(log_q)
        elif KIND == REVERSE_KL:
            dz = p * ((log_p - log_q) - centre)
        else:
            dz = rest * p * (_log_p_over_m(log_q - log_p, alpha) - centre)
        tl.store(out + offs, (dz * slope * scale).to(out.dtype.element_ty), mask=offs < P)


def _lse(x, head, shard, flags, tiles):
    """log-sum-exp of each row over the whole vocabulary, (M,)."""
    top = torch.empty(len(x), dtype=torch.float32, device=x.device)
    total = torch.empty_like(top)
    bias = x if head.bias is None else head.bias
    _lse_kernel[(len(x),)](
        x, bias, top, total, x.shape[1], padded(x.shape[1]), x.stride(0), *flags,
        HAS_BIAS=head.bias is not None, HAS_CAP=head.softcap is not None, **tiles,
    )
    if shard.max is not None:
        peak = shard.max(top.clone())
        top, total = peak, shard.sum(total * (top - peak).exp())
    return top + total.log()


def rows(zs, zt, out, head, teacher_head, shard, divergence, alpha, share, need_dz):
    """D of each row (M,), and share dD/dx into out (M, V), from raw fp32 logits of both models,
    (M, V) with padded rows like out's."""
    m, vocab = zs.shape
    if not m:
        return zs.new_empty(0)
    capped = head.softcap is not None
    pre = head.logit_scale / (head.softcap if capped else head.temperature)
    flags = (pre, head.softcap / head.temperature if capped else 1.0)
    tiles = tuning.exp_tiles(vocab)
    almost_one = 1 - torch.finfo(torch.float32).eps  # log1p(-1) would be -inf
    weights = (min(alpha, almost_one), min(1 - alpha, almost_one))
    heads = [zs if x.bias is None else x.bias.contiguous() for x in (head, teacher_head)]
    switches = {
        "KIND": KINDS[divergence], "HAS_BIAS": head.bias is not None,
        "HAS_T_BIAS": teacher_head.bias is not None, "HAS_CAP": capped, **tiles,
    }
    with torch.cuda.device_of(zs):
        lse = [
            _lse(x, h._replace(bias=None if h.bias is None else b), shard, flags, tiles)
            for x, h, b in zip((zs, zt), (head, teacher_head), heads, strict=True)
        ]
        value = torch.empty_like(lse[0])
        mean = torch.empty_like(value) if divergence == "jsd" else value
        _divergence_kernel[(m,)](
            zs, zt, *heads, *lse, value, mean, *weights, vocab, padded(vocab), zs.stride(0),
            zt.stride(0), *flags, **switches,
        )
        if shard.sum is not None:
            value = shard.sum(value)
            mean = shard.sum(mean) if divergence == "jsd" else value
        if need_dz:
            # Under a softcap _epilogue's slope is that of tanh alone.
            scaled = share * (head.logit_scale / head.temperature)
            _divergence_gradient_kernel[(m,)](
                zs, zt, *heads, *lse, mean, scaled, out, *weights, vocab, padded(vocab),
                zs.stride(0), zt.stride(0), out.stride(0), *flags, **switches,
            )
    return value
