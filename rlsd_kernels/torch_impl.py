"""Chunked PyTorch implementation for any device: one pass over the head, gradients in forward.

Per chunk of M live rows: z = h W^T in fp32, log p(y), the RLSD coefficient g = dL/dlog p(y), then
    dz = g (onehot(y) - p),   dh = dz W,   dW += dz^T h
while the chunk is still at hand: 8 NHV FLOP with a teacher (6 with a frozen head) instead of the
10 of recomputing ops, and O(M V) workspace instead of O(N V). Rows with loss weight 0, or with
A = 0 where neither KL nor entropy acts, never reach the GEMMs. Logits are fp32 for 16-bit inputs.
"""

import math

import torch

from .config import LOG_FLOOR, MAX_LOG_RATIO, RLSDLossConfig
from .tuning import rows_per_chunk

CAST_BLOCK = 4096  # head rows upcast at a time for 16-bit weights


def live_rows(loss_weights, advantages, keep_zero_advantage):
    """Indices of the rows that can contribute to loss or gradient."""
    live = loss_weights != 0
    if not keep_zero_advantage:
        live = live & (advantages != 0)
    return live.nonzero().squeeze(-1)


def reweighted(advantages, reweight_mask, config):
    """Bool mask of the tokens whose advantage the teacher scales."""
    chosen = advantages < 0 if config.rlsd_negative_only else advantages != 0
    return chosen if reweight_mask is None else chosen & reweight_mask


def token_loss(
    log_probs, advantages, loss_weights, config, rlsd_lambda, *,
    teacher_log_probs=None, old_log_probs=None, ref_log_probs=None, reweight_mask=None,
):
    """Weighted loss per token and g = dL/dlog p(y), both (M,); entropy is not included.

    PPO's min and the dual clip are one clamp of the log-ratio, because A_hat keeps A's sign:
    A > 0: loss = -A_hat min(rho, 1 + epsilon_high);  A < 0: -A_hat clamp(rho, 1 - epsilon, delta).
    """
    a_hat = advantages
    old = log_probs if old_log_probs is None else old_log_probs
    if teacher_log_probs is not None:
        student = old if config.rlsd_delta_source == "old_log_probs" else log_probs
        eps_w = config.rlsd_reweight_clip_range
        low = math.log1p(-eps_w) if eps_w < 1 else -math.inf
        log_w = (torch.sign(advantages) * (teacher_log_probs - student)).clamp(
            low, math.log1p(eps_w)
        )
        chosen = reweighted(advantages, reweight_mask, config)
        a_hat = torch.where(
            chosen, advantages * ((1 - rlsd_lambda) + rlsd_lambda * log_w.exp()), advantages
        )
    positive = a_hat > 0
    blame_low = math.log1p(-config.epsilon) if config.epsilon < 1 else -MAX_LOG_RATIO
    blame_high = MAX_LOG_RATIO
    if config.delta is not None:
        blame_high = min(math.log(config.delta), MAX_LOG_RATIO)
    low = torch.full_like(a_hat, blame_low).masked_fill_(positive, -MAX_LOG_RATIO)
    high = torch.full_like(a_hat, blame_high).masked_fill_(
        positive, math.log1p(config.epsilon_high)
    )
    log_ratio = log_probs - old
    loss = -a_hat * torch.minimum(torch.maximum(log_ratio, low), high).exp()
    g = torch.where((log_ratio < low) | (log_ratio > high), 0, loss)
    if config.beta > 0:
        d = ref_log_probs - log_probs
        kl_slope = torch.expm1(d.clamp(max=MAX_LOG_RATIO))
        loss = loss + config.beta * (kl_slope - d.clamp(max=MAX_LOG_RATIO))
        g = g - config.beta * torch.where(d > MAX_LOG_RATIO, 0, kl_slope)
    return loss_weights * loss, loss_weights * g


class Head:
    """The LM head as fp32 (or fp64) GEMMs over row chunks, whatever the dtype of its weight."""

    def __init__(self, weight, bias, temperature, logit_scale, softcap):
        self.weight, self.bias = weight, bias
        self.temperature, self.logit_scale, self.softcap = temperature, logit_scale, softcap
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.exact = weight.dtype == self.dtype

    def _blocks(self):
        vocab = self.weight.shape[0]
        step = vocab if self.exact else CAST_BLOCK
        for j in range(0, vocab, step):
            yield slice(j, j + step), self.weight[j : j + step].to(self.dtype)

    def logits(self, h):
        """softcap(logit_scale (h W^T + bias)) / temperature, (M, V)."""
        z = h.new_empty(h.shape[0], self.weight.shape[0])
        for columns, w in self._blocks():
            torch.mm(h, w.T, out=z[:, columns])
        if self.bias is not None:
            z += self.bias
        if self.softcap is not None:
            z.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        elif self.logit_scale != self.temperature:
            z *= self.logit_scale / self.temperature
        return z

    def through_logits(self, dz, z):
        """In place: gradient at the logits z to the gradient at h W^T + bias."""
        if self.softcap is not None:
            dz.addcmul_(dz, (z * (self.temperature / self.softcap)).square_(), value=-1)
        if self.logit_scale != self.temperature:
            dz *= self.logit_scale / self.temperature
        return dz

    def dx(self, dz):
        """dz W, (M, H)."""
        out = dz.new_zeros(dz.shape[0], self.weight.shape[1])
        for columns, w in self._blocks():
            out.addmm_(dz[:, columns], w)
        return out


def chunk_log_probs(head, h, ids, *, keep_logits=False, want_entropy=False):
    """One chunk: log p(y), entropy or None, probabilities p (M, V), and the logits if kept.

    Kept logits are shifted by their row maximum, which no caller can tell, except under softcap.
    """
    z = head.logits(h)
    row = torch.arange(len(ids), device=ids.device)
    z_y = z[row, ids]
    z_max = z.amax(-1, keepdim=True)
    if keep_logits and head.softcap is not None:
        e, level = (z - z_max).exp_(), z_max
    else:  # sum(p z) of shifted logits does not cancel against their level
        z -= z_max
        e, level = z.exp() if keep_logits or want_entropy else z.exp_(), 0
    total = e.sum(-1, keepdim=True)
    log_total = total.log()
    log_probs = z_y - z_max.squeeze(-1) - log_total.squeeze(-1)
    p = e.div_(total)
    entropy = None
    if want_entropy:
        if head.bias is not None:  # a bias of -inf forbids a token: keep 0 * inf out
            z.clamp_(min=LOG_FLOOR)
        with torch.autocast(z.device.type, enabled=False):  # it would round p and z to 16 bits
            entropy = (level + log_total).squeeze(-1) - torch.linalg.vecdot(p, z)
    return log_probs, entropy, p, z if keep_logits else None


def logit_gradient(p, z, ids, log_probs, g, entropy=None, g_entropy=None):
    """In place on p: dz = g (onehot - p) - g_entropy p (log p + H)."""
    row = torch.arange(len(ids), device=ids.device)
    if g_entropy is None:
        p.mul_(-g.unsqueeze(-1))
    else:
        # log p = z - lse with lse = z_y - log p(y)
        shift = (log_probs - z[row, ids] + entropy).unsqueeze(-1)
        p.mul_((z + shift).mul_(g_entropy.unsqueeze(-1)).add_(g.unsqueeze(-1)).neg_())
    p[row, ids] += g
    return p


def _bad_to_nan(log_probs, ids, vocab):
    return log_probs.masked_fill((ids < 0) | (ids >= vocab), math.nan)


def _chunks(num_rows, vocab, dtype, buffers, max_workspace_bytes):
    if num_rows == 0:
        return
    step = rows_per_chunk(num_rows, vocab, dtype.itemsize, buffers, max_workspace_bytes)
    for i in range(0, num_rows, step):
        yield slice(i, i + step)


def linear_log_probs_fwd(
    hidden, weight, completion_ids, bias, temperature, logit_scale, softcap, want_entropy,
    max_workspace_bytes,
):
    """log p(y) (N,) and entropy (N,) (empty unless wanted), in compute dtype."""
    head = Head(weight, bias, temperature, logit_scale, softcap)
    n, vocab = hidden.shape[0], weight.shape[0]
    log_probs = hidden.new_zeros(n, dtype=head.dtype)
    entropy = hidden.new_zeros(n if want_entropy else 0, dtype=head.dtype)
    buffers = 2 if want_entropy else 1
    for rows in _chunks(n, vocab, head.dtype, buffers, max_workspace_bytes):
        ids = completion_ids[rows]
        lp, ent, _, _ = chunk_log_probs(
            head, hidden[rows].to(head.dtype), ids.clamp(0, vocab - 1), want_entropy=want_entropy
        )
        log_probs[rows] = _bad_to_nan(lp, ids, vocab)
        if want_entropy:
            entropy[rows] = ent
    return log_probs, entropy


def linear_log_probs_bwd(
    grad_log_probs, grad_entropy, hidden, weight, completion_ids, bias, temperature, logit_scale,
    softcap, need_dx, need_dw, need_db, max_workspace_bytes,
):
    """dh, dW, db of sum(grad_log_probs log p(y) + grad_entropy H), logits recomputed by chunk."""
    head = Head(weight, bias, temperature, logit_scale, softcap)
    n, vocab = hidden.shape[0], weight.shape[0]
    grads = _Gradients(hidden, weight, head.dtype, hidden.dtype, need_dx, need_dw, need_db)
    keep = softcap is not None or grad_entropy is not None
    for rows in _chunks(n, vocab, head.dtype, 3 if keep else 1, max_workspace_bytes):
        ids, h = completion_ids[rows].clamp(0, vocab - 1), hidden[rows].to(head.dtype)
        lp, ent, p, z = chunk_log_probs(
            head, h, ids, keep_logits=keep, want_entropy=grad_entropy is not None
        )
        g = _bad_to_nan(grad_log_probs[rows].to(head.dtype), completion_ids[rows], vocab)
        g_ent = None if grad_entropy is None else grad_entropy[rows].to(head.dtype)
        grads.add(rows, head, h, logit_gradient(p, z, ids, lp, g, ent, g_ent), z)
        del p, z  # before the next chunk is formed
    return grads.cast(weight.dtype, head.dtype if bias is None else bias.dtype)


class _Gradients:
    """dh by rows, dW and db accumulated in compute dtype and cast once at the end."""

    def __init__(self, hidden, weight, dtype, dx_dtype, need_dx, need_dw, need_db):
        self.dx = torch.zeros_like(hidden if need_dx else hidden.new_empty(0), dtype=dx_dtype)
        self.dw = weight.new_zeros(weight.shape if need_dw else 0, dtype=dtype)
        self.db = weight.new_zeros(weight.shape[0] if need_db else 0, dtype=dtype)
        self.need_dx, self.need_dw, self.need_db = need_dx, need_dw, need_db

    def add(self, rows, head, h, dz, z):
        dz = head.through_logits(dz, z)
        if self.need_dx:
            self.dx[rows] = head.dx(dz).to(self.dx.dtype)
        if self.need_dw:
            self.dw.addmm_(dz.T, h)
        if self.need_db:
            self.db += dz.sum(0)

    def cast(self, dw_dtype, db_dtype):
        return self.dx, self.dw.to(dw_dtype), self.db.to(db_dtype)


def stored_dtype(dtype):
    """Dtype of gradients formed before the upstream gradient is known: fp16 would flush those that
    a loss scale is about to lift."""
    return torch.float32 if dtype == torch.float16 else dtype


def linear_rlsd_loss(
    hidden, weight, completion_ids, advantages, loss_weights, *, teacher_hidden,
    teacher_log_probs, teacher_weight, old_log_probs, ref_log_probs, reweight_mask, bias,
    rlsd_lambda, config: RLSDLossConfig, logit_scale, softcap, want_entropy, need_dx, need_dw,
    need_db, max_workspace_bytes,
):
    """loss (), log_probs (N,), teacher_log_probs (N,), entropy (N,) or (0,), dh, dW, db.

    Gradients are those of the loss itself (upstream gradient 1), in stored_dtype. Rows that are
    not live keep 0 in every output, and so does the teacher where no token is re-weighted.
    """
    head = Head(weight, bias, config.temperature, logit_scale, softcap)
    use_teacher = rlsd_lambda > 0
    n, vocab = hidden.shape[0], weight.shape[0]
    want_entropy = want_entropy or config.entropy_coef > 0
    index = live_rows(loss_weights, advantages, config.beta > 0 or config.entropy_coef > 0)
    need_grad = need_dx or need_dw or need_db
    keep = need_grad and (softcap is not None or config.entropy_coef > 0)
    buffers = 3 if keep else 2 if want_entropy else 1

    log_probs = hidden.new_zeros(n, dtype=head.dtype)
    entropy = hidden.new_zeros(n if want_entropy else 0, dtype=head.dtype)
    teacher = hidden.new_zeros(n, dtype=head.dtype)
    if use_teacher and teacher_log_probs is not None:
        teacher.copy_(teacher_log_probs)
    elif use_teacher:
        rows = index[reweighted(advantages, reweight_mask, config)[index]]
        t_head = weight if teacher_weight is None else teacher_weight
        # Chunks as tall as the student's: equal hidden states then give equal bits.
        t_lp, _ = linear_log_probs_fwd(
            teacher_hidden[rows], t_head, completion_ids[rows], bias, config.temperature,
            logit_scale, softcap, False, max_workspace_bytes // buffers,
        )
        teacher[rows] = t_lp.to(head.dtype)

    dx_dtype, dw_dtype = stored_dtype(hidden.dtype), stored_dtype(weight.dtype)
    db_dtype = head.dtype if bias is None else stored_dtype(bias.dtype)
    grads = _Gradients(hidden, weight, head.dtype, dx_dtype, need_dx, need_dw, need_db)
    loss = hidden.new_zeros((), dtype=head.dtype)
    for rows in _chunks(len(index), vocab, head.dtype, buffers, max_workspace_bytes):
        rows = index[rows]
        h, ids = hidden[rows].to(head.dtype), completion_ids[rows].clamp(0, vocab - 1)
        lp, ent, p, z = chunk_log_probs(
            head, h, ids, keep_logits=keep, want_entropy=want_entropy
        )
        lp = _bad_to_nan(lp, completion_ids[rows], vocab)
        log_probs[rows] = lp

        def pick(per_token, rows=rows):
            return None if per_token is None else per_token[rows]

        weights = loss_weights[rows]
        token, g = token_loss(
            lp, advantages[rows], weights, config, rlsd_lambda,
            teacher_log_probs=teacher[rows] if use_teacher else None,
            old_log_probs=pick(old_log_probs),
            ref_log_probs=pick(ref_log_probs),
            reweight_mask=pick(reweight_mask),
        )
        loss += token.sum()
        g_entropy = None
        if want_entropy:
            entropy[rows] = ent
        if config.entropy_coef > 0:
            g_entropy = -config.entropy_coef * weights
            loss += (g_entropy * ent).sum()
        if need_grad:
            grads.add(rows, head, h, logit_gradient(p, z, ids, lp, g, ent, g_entropy), z)
        del p, z  # before the next chunk is formed
    return (loss, log_probs, teacher, entropy, *grads.cast(dw_dtype, db_dtype))


def rlsd_loss(
    log_probs, advantages, loss_weights, *, teacher_log_probs, old_log_probs, ref_log_probs,
    reweight_mask, entropy, rlsd_lambda, config: RLSDLossConfig,
):
    """loss () and its gradients by log_probs (N,) and by entropy (N,) or (0,)."""
    index = live_rows(loss_weights, advantages, config.beta > 0 or config.entropy_coef > 0)

    def pick(per_token):
        return None if per_token is None else per_token[index]

    token, g = token_loss(
        log_probs[index], advantages[index], loss_weights[index], config, rlsd_lambda,
        teacher_log_probs=pick(teacher_log_probs) if rlsd_lambda > 0 else None,
        old_log_probs=pick(old_log_probs),
        ref_log_probs=pick(ref_log_probs),
        reweight_mask=pick(reweight_mask),
    )
    loss, d_log_probs = token.sum(), torch.zeros_like(log_probs).index_copy(0, index, g)
    if config.entropy_coef == 0:
        return loss, d_log_probs, log_probs.new_empty(0)
    slope = -config.entropy_coef * loss_weights
    d_entropy = torch.zeros_like(log_probs).index_copy(0, index, slope[index])
    return loss + (slope[index] * entropy[index]).sum(), d_log_probs, d_entropy
