"""Triton kernels: rows of logits through exp, their sum and largest, the strict logit gradient.

    x = h W^T,   z = softcap(logit_scale (x + bias)) / temperature,   s = sum_j exp(z_j - c)

c is a guess of the log-sum-exp, so one pass needs no row maximum: per row 4V bytes are read and 2V
(bf16 E) written, or none. Rows whose sum a bad guess spoiled are redone with the true maximum by
kernels that are always launched and return at once elsewhere: nothing waits for the host. Tier A
takes x from cuBLAS (2 M H V FLOP) through an fp32 chunk; tier B has the exp as the epilogue of its
own GEMM and needs no chunk. Sums are in a fixed order: results repeat bitwise on a device.
"""

import torch
import triton
import triton.language as tl

from . import tuning
from .config import ROW_SUM_BOUNDS, capturing, trusted_rows
from .streaming import STORE_NONE, StreamingScorer, padded, scratch_bytes, unit_stride
from .triton_tokens import token_rows

__all__ = ["Scorer", "energies", "fix_targets", "padded", "scale", "scratch_bytes", "target_logits",
           "token_rows"]
SUM_MIN, SUM_MAX = (tl.constexpr(x) for x in ROW_SUM_BOUNDS)


@triton.jit
def _trusted(s):
    """False for NaN and for the sums of a bad guess."""
    return (s >= SUM_MIN) & (s <= SUM_MAX)


@triton.jit
def _tanh(a):
    """tanh to 1e-7 and 1 - tanh^2, by q = exp(-2|a|); a series where 1 - q would cancel."""
    q = tl.exp(-2.0 * tl.abs(a))
    tanh = (1.0 - q) / (1.0 + q)
    b = tl.minimum(a * a, 1.0)
    series = 1.0 + b * (-1 / 3 + b * (2 / 15 + b * (-17 / 315 + b * (62 / 2835))))
    tanh = tl.where(tl.abs(a) < 0.25, a * series, tl.where(a < 0, -tanh, tanh))
    return tanh, 4.0 * q / ((1.0 + q) * (1.0 + q))


@triton.jit
def _epilogue(x, pre, post, HAS_CAP: tl.constexpr):
    """Raw logits (bias added) to z and dz/dx of the softcap."""
    if HAS_CAP:
        tanh, dcap = _tanh(x * pre)
        return tanh * post, dcap
    else:
        return x * pre, 1.0


@triton.jit
def _load_logits(x, bias, offs, V, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        logits = tl.load(x + offs, mask=offs < V, other=0.0)
        if HAS_BIAS:
            logits += tl.load(bias + offs, mask=offs < V, other=0.0).to(tl.float32)
    else:
        logits = tl.load(x + offs)
        if HAS_BIAS:
            logits += tl.load(bias + offs).to(tl.float32)
    return logits


@triton.jit
def _ordered_sum(x):
    """tl.sum of a power of two of elements in one order, halves added, where tl.sum's follows the
    layout and so what a kernel stores: student and teacher get equal bits from equal logits."""
    for _ in tl.static_range(16):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, [2, x.shape[0] // 2]), 0)
    return tl.sum(x, 0)


@triton.jit
def _exp_tile(
    x, bias, out, offs, V, c, pre, post, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr, STORE: tl.constexpr, MASKED: tl.constexpr,
):
    """exp(z - c) and exp(z - c) (z - c) of one tile; stores what STORE says."""
    z, dcap = _epilogue(_load_logits(x, bias, offs, V, HAS_BIAS, MASKED), pre, post, HAS_CAP)
    d = z - c
    e = tl.exp(d)
    if MASKED:
        e = tl.where(offs < V, e, 0.0)
    if STORE != 0:
        kept = e * dcap if STORE == 1 else z
        if MASKED:
            tl.store(out + offs, kept.to(out.dtype.element_ty), mask=offs < V)
        else:
            tl.store(out + offs, kept.to(out.dtype.element_ty))
    if WANT_ENTROPY:
        ed = tl.where(e == 0.0, 0.0, e * d)  # a forbidden token has d = -inf
    else:
        ed = e
    return e, ed


@triton.jit
def _exp_kernel(
    x, bias, c, s, t, out, total, V, stride_x, stride_out, pre, post, HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr, WANT_ENTROPY: tl.constexpr, STORE: tl.constexpr,
    ONLY_FLAGGED: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """One row per program; ONLY_FLAGGED leaves rows alone whose sum in `total` is trusted."""
    row = tl.program_id(0).to(tl.int64)
    if ONLY_FLAGGED:
        if _trusted(tl.load(total + row)):
            return
    x += row * stride_x
    out += row * stride_out
    shift = tl.load(c + row)
    offs = tl.arange(0, BLOCK_V)
    sum_e = tl.zeros([BLOCK_V], tl.float32)
    sum_ed = tl.zeros([BLOCK_V], tl.float32)
    full = V // BLOCK_V * BLOCK_V
    for start in range(0, full, BLOCK_V):  # whole tiles need no mask: 16-byte loads at any V
        e, ed = _exp_tile(x, bias, out, start + offs, V, shift, pre, post, HAS_BIAS, HAS_CAP,
                          WANT_ENTROPY, STORE, False)
        sum_e += e
        if WANT_ENTROPY:
            sum_ed += ed
    if full < V:
        e, ed = _exp_tile(x, bias, out, full + offs, V, shift, pre, post, HAS_BIAS, HAS_CAP,
                          WANT_ENTROPY, STORE, True)
        sum_e += e
        if WANT_ENTROPY:
            sum_ed += ed
    tl.store(s + row, _ordered_sum(sum_e))
    if WANT_ENTROPY:
        tl.store(t + row, _ordered_sum(sum_ed))


@triton.jit
def _row_max_kernel(
    x, bias, c, total, V, stride_x, pre, post, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """c := the row's largest z, for rows whose sum in `total` is not trusted."""
    row = tl.program_id(0).to(tl.int64)
    if _trusted(tl.load(total + row)):
        return
    x += row * stride_x
    offs = tl.arange(0, BLOCK_V)
    top = tl.full([BLOCK_V], -float("inf"), tl.float32)
    for start in range(0, V, BLOCK_V):
        z, _ = _epilogue(
            _load_logits(x, bias, start + offs, V, HAS_BIAS, True), pre, post, HAS_CAP
        )
        top = tl.maximum(top, tl.where(start + offs < V, z, -float("inf")))
    tl.store(c + row, tl.max(top, 0))


@triton.jit
def _row_logits_kernel(
    x, bias, total, top_ids, V, stride_x, pre, post, HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """The sum of a row's z, and where the first of its largest is."""
    row = tl.program_id(0).to(tl.int64)
    x += row * stride_x
    offs = tl.arange(0, BLOCK_V)
    sums = tl.zeros([BLOCK_V], tl.float32)
    top = tl.full([BLOCK_V], -float("inf"), tl.float32)
    place = tl.zeros([BLOCK_V], tl.int32)
    for start in range(0, V, BLOCK_V):
        z, _ = _epilogue(
            _load_logits(x, bias, start + offs, V, HAS_BIAS, True), pre, post, HAS_CAP
        )
        inside = start + offs < V
        sums += tl.where(inside, z, 0.0)
        larger = inside & (z > top)
        place = tl.where(larger, start + offs, place)
        top = tl.where(larger, z, top)
    tl.store(total + row, _ordered_sum(sums))
    tl.store(top_ids + row, tl.min(tl.where(top == tl.max(top, 0), place, V), 0).to(tl.int64))


@triton.jit
def _gradient_tile(
    z, out, offs, V, target, lse, g, g_entropy, entropy, even, scale, inv_post,
    HAS_CAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_EVEN: tl.constexpr, MASKED: tl.constexpr,
):
    logits = tl.load(z + offs, mask=offs < V, other=0.0) if MASKED else tl.load(z + offs)
    log_p = logits - lse
    p = tl.exp(log_p)
    dz = g * (p - tl.where(offs == target, 1.0, 0.0))
    if HAS_ENTROPY:
        dz += g_entropy * tl.where(p == 0.0, 0.0, p * (log_p + entropy))
    if HAS_EVEN:
        dz += even
    if HAS_CAP:
        tanh = logits * inv_post
        dz *= (1.0 - tanh) * (1.0 + tanh)
    dz = tl.where((g == 0.0) & (g_entropy == 0.0) & (even == 0.0), 0.0, dz * scale)
    if MASKED:
        tl.store(out + offs, dz.to(out.dtype.element_ty), mask=offs < V)
    else:
        tl.store(out + offs, dz.to(out.dtype.element_ty))


@triton.jit
def _logit_gradient_kernel(
    z, out, ids, lse, g, g_entropy, entropy, even, V, stride_z, stride_out, scale, inv_post,
    HAS_CAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_EVEN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """scale (g (p - onehot) + g_entropy p (log p + H) + even) dcap, a row per program; out may be
    z."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride_z
    out += row * stride_out
    target = tl.load(ids + row)
    lse_i, g_i = tl.load(lse + row), tl.load(g + row)
    ge_i, h_i, even_i = 0.0, 0.0, 0.0
    if HAS_EVEN:
        even_i = tl.load(even + row)
    if HAS_ENTROPY:
        ge_i, h_i = tl.load(g_entropy + row), tl.load(entropy + row)
    offs = tl.arange(0, BLOCK_V)
    full = V // BLOCK_V * BLOCK_V
    for start in range(0, full, BLOCK_V):
        _gradient_tile(z, out, start + offs, V, target, lse_i, g_i, ge_i, h_i, even_i, scale,
                       inv_post, HAS_CAP, HAS_ENTROPY, HAS_EVEN, False)
    if full < V:
        _gradient_tile(z, out, full + offs, V, target, lse_i, g_i, ge_i, h_i, even_i, scale,
                       inv_post, HAS_CAP, HAS_ENTROPY, HAS_EVEN, True)


@triton.jit
def _target_logits_kernel(
    h, weight, ids, out, V, H, stride_h, stride_w, BLOCK_H: tl.constexpr
):
    """h_i . W[ids_i] in fp32; 0 for an id that this head (or shard) does not hold."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(ids + row).to(tl.int64)
    held = (target >= 0) & (target < V)
    h += row * stride_h
    weight += tl.where(held, target, 0) * stride_w
    acc = tl.zeros([BLOCK_H], tl.float32)
    end = tl.where(held, H, 0)
    for start in range(0, H, BLOCK_H):
        offs = start + tl.arange(0, BLOCK_H)
        a = tl.load(h + offs, mask=offs < end, other=0.0).to(tl.float32)
        acc += a * tl.load(weight + offs, mask=offs < end, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(acc, 0))


@triton.jit(do_not_specialize=["M", "K"])
def _fix_targets_kernel(e, ids, values, M, K, V, stride_e, BLOCK_M: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(ids + i, mask=i < M * K, other=-1).to(tl.int64)
    held = (target >= 0) & (target < V)
    value = tl.load(values + i, mask=i < M * K, other=0.0)
    tl.store(e + i // K * stride_e + target, value.to(e.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=["M"])
def _scale_kernel(x, factor, M, BLOCK: tl.constexpr):
    value = tl.load(factor).to(tl.float32)
    if value == 1.0:
        return
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scaled = tl.load(x + offs, mask=offs < M, other=0.0).to(tl.float32) * value
    tl.store(x + offs, scaled.to(x.dtype.element_ty), mask=offs < M)


@triton.jit(do_not_specialize=["M"])
def _gemm_exp_kernel(
    h, weight, bias, c, partial, out, M, V, H, stride_h, stride_w, stride_out, pre, post,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, STORE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP_M: tl.constexpr,
):
    """Persistent: each program takes every num_programs-th tile of exp(h W^T - c); row sums go to
    partial (vocabulary tiles, M), E to out. H is a multiple of BLOCK_H."""
    tiles_m, tiles_v = tl.cdiv(M, BLOCK_M), tl.cdiv(V, BLOCK_V)
    for tile in range(tl.program_id(0), tiles_m * tiles_v, tl.num_programs(0)):
        # GROUP_M row tiles share each tile of W while it is in L2.
        group = tile // (GROUP_M * tiles_v)
        height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        inner = tile % (GROUP_M * tiles_v)
        tile_m, tile_v = group * GROUP_M + inner % height, inner // height
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
        offs_h = tl.arange(0, BLOCK_H)
        # Beyond the edge: the last row and column again, so that the loads need no mask.
        safe_rows, safe_columns = tl.minimum(rows, M - 1), tl.minimum(columns, V - 1)
        h_tile = h + safe_rows.to(tl.int64)[:, None] * stride_h + offs_h[None, :]
        w_tile = weight + safe_columns.to(tl.int64)[:, None] * stride_w + offs_h[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for _ in range(0, H, BLOCK_H):
            a, b = tl.load(h_tile), tl.load(w_tile)
            acc = tl.dot(a, b.to(a.dtype).T, acc, input_precision="ieee")
            h_tile += BLOCK_H
            w_tile += BLOCK_H
        if HAS_BIAS:
            acc += tl.load(bias + safe_columns).to(tl.float32)[None, :]
        z, dcap = _epilogue(acc, pre, post, HAS_CAP)
        e = tl.exp(z - tl.load(c + safe_rows)[:, None])
        e = tl.where((columns < V)[None, :], e, 0.0)
        tl.store(partial + tile_v.to(tl.int64) * M + rows, tl.sum(e, 1), mask=rows < M)
        if STORE:
            place = out + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
            inside = (rows < M)[:, None] & (columns < V)[None, :]
            tl.store(place, (e * dcap).to(out.dtype.element_ty), mask=inside)


def target_logits(h, weight, ids):
    """Raw h_i . W[ids_i] in fp32, (M,); 0 where the id is outside [0, V)."""
    h, weight, ids = unit_stride(h), unit_stride(weight), ids.contiguous()
    (m, hidden), vocab = h.shape, weight.shape[0]
    out = torch.empty(m, dtype=torch.float32, device=h.device)
    if m:
        block = min(1024, max(16, triton.next_power_of_2(hidden)))
        with torch.cuda.device_of(h):
            _target_logits_kernel[(m,)](
                h, weight, ids, out, vocab, hidden, h.stride(0), weight.stride(0), BLOCK_H=block,
                num_warps=4,
            )
    return out


@triton.jit(do_not_specialize=["M"])
def _energies_kernel(
    e, v, columns, rows, M, V, stride_e, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Squares of v e: over STRIP rows for each of BLOCK_V columns, and over them for each row."""
    j = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = j < V
    total = tl.zeros((BLOCK_V,), tl.float32)
    rows += tl.program_id(0).to(tl.int64) * M
    begin = tl.program_id(1) * STRIP
    end = tl.minimum(begin + STRIP, M)
    for first in range(begin, end, BLOCK_M):
        i = first + tl.arange(0, BLOCK_M)
        here = (i < end)[:, None] & inside[None, :]
        x = tl.load(e + i.to(tl.int64)[:, None] * stride_e + j[None, :], mask=here, other=0.0)
        x = x.to(tl.float32) * tl.load(v + i, mask=i < end, other=0.0)[:, None]
        x = x * x
        total += tl.sum(x, 0)
        tl.store(rows + i, tl.sum(x, 1), mask=i < end)
    tl.store(columns + tl.program_id(1).to(tl.int64) * V + j, total, mask=inside)


def energies(e, v):
    """Sums of (v_i e_ij)^2 down the columns (V,) and along the rows (M,): one read of e."""
    m, vocab = e.shape
    tiles, strip = tuning.ENERGY_TILES, tuning.ENERGY_ROWS
    strips = triton.cdiv(vocab, tiles["BLOCK_V"]), triton.cdiv(m, strip)
    columns = torch.empty(strips[1], vocab, dtype=torch.float32, device=e.device)
    parts = torch.empty(strips[0], m, dtype=torch.float32, device=e.device)
    if m:
        with torch.cuda.device_of(e):
            _energies_kernel[strips](
                e, v.contiguous(), columns, parts, m, vocab, e.stride(0), STRIP=strip, **tiles
            )
    return columns.sum(0), parts.sum(0)


def fix_targets(e, ids, values):
    """In place e[i, ids_ik] = values_ik where 0 <= ids_ik < V; ids (M,) or (M, K)."""
    m, vocab = e.shape
    if m:
        with torch.cuda.device_of(e):
            _fix_targets_kernel[(triton.cdiv(ids.numel(), 128),)](
                e, ids.contiguous(), values.contiguous(), m, ids.numel() // m, vocab, e.stride(0),
                BLOCK_M=128, num_warps=4,
            )


def scale(x, factor):
    """In place x *= factor, (1,); nothing is read or written where it is 1."""
    if x.numel():
        with torch.cuda.device_of(x):
            _scale_kernel[(triton.cdiv(x.numel(), 4096),)](
                x, factor, x.numel(), BLOCK=4096, num_warps=8
            )


class Scorer(StreamingScorer):
    """Tier A by streaming kernels, tier B by the GEMM with the exp inside.

    tier and tiles override tuning.py, for benchmarks.
    """

    def __init__(self, *head, tier=None, tiles=None):
        super().__init__(*head)
        self.tier, self.tiles = tier or tuning.SCORE_TIER, tiles

    def score(
        self, h, c, *, out=None, keep=None, want_entropy=False, ids=None, z_y=None, logits=None
    ):
        # Tier B reads its flags back, and other shards of the head may have to take tier A; it
        # leaves z_y as it came, for its logits never leave the registers.
        alone = not self.sharded and not capturing(h) and logits is None
        alone = alone and (ids is None or ids.dim() == 1)
        if self.tier == "B" and alone and keep != "logits" and not want_entropy and len(h):
            tiles = self._gemm_tiles(h, out)
            if tiles is not None:
                return self._score_in_gemm(h, c, out, tiles)
        return super().score(
            h, c, out=out, keep=keep, want_entropy=want_entropy, ids=ids, z_y=z_y, logits=logits
        )

    def begin(self, h):
        if self.tier != "B":  # which has its own GEMM
            super().begin(h)

    def _gemm_tiles(self, h, out):
        """Tiles of the tier B kernel; None for what only tier A takes: fp32 weights, and sizes at
        which its loads would need masks and its stores would be scalar (the registers spill)."""
        tiles = self.tiles or tuning.gemm_tiles(_arch(h), self.weight.itemsize, self.capped)
        even = self.hidden % tiles["BLOCK_H"] == 0 and self.vocab % 16 == 0
        even = even and (out is None or out.stride(0) % 16 == 0)
        return tiles if even and self.weight.itemsize == 2 else None

    def _row_max(self, x, epilogue, c, total):
        bias, pre, post, capped = epilogue
        if not len(c):
            return
        with torch.cuda.device_of(x):
            _row_max_kernel[(len(c),)](
                x, x if bias is None else bias, c, total, self.vocab, x.stride(0), pre, post,
                HAS_BIAS=bias is not None, HAS_CAP=capped, **tuning.exp_tiles(self.vocab),
            )

    def _row_logits(self, x, epilogue, total, top_ids):
        bias, pre, post, capped = epilogue
        if not len(total):
            return
        with torch.cuda.device_of(x):
            _row_logits_kernel[(len(total),)](
                x, x if bias is None else bias, total, top_ids, self.vocab, x.stride(0), pre, post,
                HAS_BIAS=bias is not None, HAS_CAP=capped, **tuning.exp_tiles(self.vocab),
            )

    def _exp(self, x, epilogue, c, s, t, out, store, total=None):
        bias, pre, post, capped = epilogue
        if not len(c):
            return
        out = x if store == STORE_NONE else out
        with torch.cuda.device_of(x):
            _exp_kernel[(len(c),)](
                x, x if bias is None else bias, c, s, s if t is None else t, out,
                s if total is None else total, self.vocab, x.stride(0), out.stride(0), pre, post,
                HAS_BIAS=bias is not None, HAS_CAP=capped, WANT_ENTROPY=t is not None,
                STORE=store, ONLY_FLAGGED=total is not None,
                **tuning.exp_tiles(self.vocab),
            )

    def _score_in_gemm(self, h, c, out, tiles):
        """Tier B. It asks the host once whether any row is flagged, so no CUDA graph can hold it;
        flagged rows go through tier A."""
        h, weight = unit_stride(h), unit_stride(self.weight)
        c = c.clone(memory_format=torch.contiguous_format)
        m = len(h)
        tiles_v = triton.cdiv(self.vocab, tiles["BLOCK_V"])
        partial = torch.empty(tiles_v, m, dtype=torch.float32, device=h.device)
        e = partial if out is None else out
        grid = (min(_processors(h), tiles_v * triton.cdiv(m, tiles["BLOCK_M"])),)
        with torch.cuda.device_of(h):
            _gemm_exp_kernel[grid](
                h, weight, partial if self.bias is None else self.bias, c, partial, e, m,
                self.vocab, self.hidden, h.stride(0), weight.stride(0), e.stride(0), self.pre,
                self.post, HAS_BIAS=self.bias is not None, HAS_CAP=self.capped,
                STORE=out is not None, **tiles,
            )
        s = partial.sum(0)
        flagged = (~trusted_rows(s)).nonzero().squeeze(-1)
        if len(flagged):
            redone = None if out is None else out[flagged]
            c[flagged], s[flagged], _ = super().score(
                h[flagged], c[flagged], out=redone, keep=None if out is None else "exp"
            )
            if out is not None:
                out[flagged] = redone
        return c, s, None

    def logit_gradient(self, z, out, ids, lse, g, g_entropy, entropy, even, scale):
        """out = scale (g (p - onehot) + g_entropy p (log p + H) + even) dcap, p = exp(z - lse)."""
        m, vocab = z.shape
        if not m:
            return
        has_entropy = g_entropy is not None and entropy is not None
        rows = (ids, lse, g, g_entropy if has_entropy else g, entropy if has_entropy else g,
                g if even is None else even)
        rows = [x.contiguous() for x in rows]
        with torch.cuda.device_of(z):
            _logit_gradient_kernel[(m,)](
                z, out, *rows, vocab, z.stride(0), out.stride(0), scale, 1 / self.post,
                HAS_CAP=self.capped, HAS_ENTROPY=has_entropy, HAS_EVEN=even is not None,
                **tuning.exp_tiles(vocab),
            )


def _arch(x):
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)
    return 10 * major + minor


def _processors(x):
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
