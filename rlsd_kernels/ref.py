"""The specification: RLSD in plain PyTorch, naive, differentiable by autograd, any float dtype.

    delta_t = sg(log P_T(y_t | x, r, y_<t) - log P_S(y_t | x, y_<t))
    w_t     = clip(exp(sign(A) delta_t), 1 - eps_w, 1 + eps_w)
    A_hat_t = sg(A ((1 - lambda) + lambda w_t))
    loss_t  = -min(rho_t A_hat_t, clip(rho_t, 1 - epsilon, 1 + epsilon_high) A_hat_t)
    L       = sum_t a_t (loss_t + beta kl_t - entropy_coef H_t)

Materialises all N x V logits (about 10 NV float bytes with gradients): the yardstick for every
other implementation, never the fast path. Half-precision inputs are computed in fp32, fp64 in fp64.
"""

import math

import torch

from .config import LOG_FLOOR, MAX_LOG_RATIO, TAIL_FLOOR, TOKEN_SUMS, compute_dtype


def left_out(d, tolerance):
    """Bool masks of the rows (N,) and columns (V,) of d = dL/dlogits that a tolerance leaves out.

    The smallest ones, which together carry at most tolerance^2 / 2 of the energy |d|^2 each; none
    where it is not finite.
    """
    def smallest(energy):
        ordered, index = energy.sort()
        out = torch.zeros_like(energy, dtype=torch.bool)
        out[index] = ordered.cumsum(0) <= tolerance**2 / 2 * energy.sum()
        return out

    squares = (d / d.abs().amax().clamp(min=torch.finfo(d.dtype).tiny)).square()
    return smallest(squares.sum(1)), smallest(squares.sum(0))


class _ToleratedHead(torch.autograd.Function):
    """h W^T + b whose gradient does without the rows and columns that are left out of d.

    dh of a kept row gets back the mean of the dropped rows of W, times the sum of what it lost.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, tolerance):
        ctx.save_for_backward(hidden, weight)
        ctx.tolerance = tolerance
        logits = hidden @ weight.T
        return logits if bias is None else logits + bias

    @staticmethod
    def backward(ctx, d):
        hidden, weight = ctx.saved_tensors
        rows, columns = left_out(d, ctx.tolerance)
        share = d.norm(dim=0).masked_fill(~columns, 0)
        d = d.masked_fill(rows[:, None], 0)
        kept, dropped = d.masked_fill(columns, 0), d.masked_fill(~columns, 0)
        mean = (share / share.sum().clamp(min=torch.finfo(d.dtype).tiny)) @ weight
        dh = kept @ weight + dropped.sum(1, keepdim=True) * mean
        return dh, kept.T @ hidden, kept.sum(0) if ctx.needs_input_grad[2] else None, None


def head_logits(
    hidden, weight, *, bias=None, temperature=1.0, logit_scale=1.0, final_logit_softcapping=None,
    gradient_tolerance=0.0,
):
    """z of rows (N, H) under the head (V, H), (N, V)."""
    dtype = compute_dtype(hidden.dtype)
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):  # it would make 16-bit logits
        if gradient_tolerance:
            logits = _ToleratedHead.apply(
                hidden.to(dtype), weight.to(dtype), bias, gradient_tolerance
            )
        else:
            logits = hidden.to(dtype) @ weight.to(dtype).T
            logits = logits if bias is None else logits + bias
    logits = logit_scale * logits
    if final_logit_softcapping is not None:
        logits = final_logit_softcapping * torch.tanh(logits / final_logit_softcapping)
    return logits / temperature


def log_probs_of(z, completion_ids):
    """log p at ids (N,) or (N, K), and entropies (N,), from logits (N, V)."""
    log_p = torch.log_softmax(z, dim=-1)
    entropy = -(log_p.exp() * log_p.clamp(min=LOG_FLOOR)).sum(-1)
    ids = completion_ids.view(len(z), -1) if len(z) else completion_ids.new_empty(0, 1)
    return log_p.gather(-1, ids).view_as(completion_ids), entropy


def logit_statistics(z):
    """Log-sum-exp, mean, greedy token and its log-prob of logits (N, V), each (N,)."""
    lse = z.logsumexp(-1)
    top, greedy_ids = z.detach().max(-1)
    return lse, z.mean(-1), greedy_ids, top - lse.detach()


def linear_log_probs(
    hidden, weight, completion_ids, *, bias=None, temperature=1.0, logit_scale=1.0,
    final_logit_softcapping=None, gradient_tolerance=0.0,
):
    """log p(y) and entropy of rows (N, H) under the head (V, H); returns two (N,) tensors."""
    z = head_logits(
        hidden, weight, bias=bias, temperature=temperature, logit_scale=logit_scale,
        final_logit_softcapping=final_logit_softcapping, gradient_tolerance=gradient_tolerance,
    )
    return log_probs_of(z, completion_ids)


def reweighted_tokens(advantages, *, rlsd_negative_only=False, reweight_mask=None):
    """Bool mask of the tokens whose advantage the teacher scales; all others keep plain A."""
    chosen = advantages < 0 if rlsd_negative_only else advantages != 0
    return chosen if reweight_mask is None else chosen & reweight_mask


def token_weights(advantages, delta, *, rlsd_reweight_clip_range=0.2):
    """w_t, clipped in log space before the exp so that no delta can overflow."""
    eps_w = rlsd_reweight_clip_range
    low = math.log1p(-eps_w) if eps_w < 1 else -math.inf
    return torch.exp((torch.sign(advantages) * delta).clamp(low, math.log1p(eps_w)))


def evidence(teacher_log_probs, student_log_probs):
    """delta_t; 0 where the two are equal, also at -inf, where their difference would be NaN."""
    delta = (teacher_log_probs - student_log_probs).detach()
    return torch.where(teacher_log_probs == student_log_probs, 0, delta)


def rlsd_advantages(
    advantages, log_probs, teacher_log_probs, *, rlsd_lambda=0.5, rlsd_reweight_clip_range=0.2,
    rlsd_negative_only=False, reweight_mask=None,
):
    """A_hat_t, detached; `where` selects, so an infinite delta cannot leak into A = 0 tokens."""
    delta = evidence(teacher_log_probs, log_probs)
    w = token_weights(advantages, delta, rlsd_reweight_clip_range=rlsd_reweight_clip_range)
    chosen = reweighted_tokens(
        advantages, rlsd_negative_only=rlsd_negative_only, reweight_mask=reweight_mask
    )
    scaled = advantages * ((1 - rlsd_lambda) + rlsd_lambda * w)
    return torch.where(chosen, scaled, advantages).detach()


def surrogate(log_probs, old_log_probs, a_hat, *, epsilon, epsilon_high, delta):
    """loss_t: PPO's clipped surrogate with asymmetric clip and optional dual clip."""
    log_ratio = (log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    rho = torch.exp(log_ratio)
    loss = -torch.minimum(rho * a_hat, rho.clamp(1 - epsilon, 1 + epsilon_high) * a_hat)
    if delta is not None:
        loss = torch.where(a_hat < 0, torch.minimum(loss, -a_hat * delta), loss)
    return loss


def k3_kl(log_probs, ref_log_probs):
    """Schulman's k3 estimate of KL(P_S || P_ref): exp(d) - d - 1 with d = log P_ref - log P_S."""
    d = (ref_log_probs - log_probs).clamp(max=MAX_LOG_RATIO)
    return torch.exp(d) - d - 1


def live_tokens(loss_weights, advantages, config):
    """Bool mask of the tokens that can contribute; the rest are never computed."""
    live = loss_weights != 0
    if config.beta == 0 and config.entropy_coef == 0:
        live = live & (advantages != 0)
    return live


def token_sums(
    log_probs, advantages, loss_weights, *, teacher_log_probs, old_log_probs, ref_log_probs,
    reweight_mask, entropy, rlsd_lambda, config,
):
    """What the metrics are made of: config.TOKEN_SUMS over tokens (N,), fp64."""
    old = log_probs if old_log_probs is None else old_log_probs
    active = (loss_weights != 0) & (advantages != 0)
    pos, neg = active & (advantages > 0), active & (advantages < 0)
    delta, a_hat, chosen = torch.zeros_like(log_probs), advantages, torch.zeros_like(active)
    if teacher_log_probs is not None:
        chosen = active & reweighted_tokens(
            advantages, rlsd_negative_only=config.rlsd_negative_only, reweight_mask=reweight_mask
        )
        student = old if config.rlsd_delta_source == "old_log_probs" else log_probs
        delta = evidence(teacher_log_probs, student)
        a_hat = rlsd_advantages(
            advantages, student, teacher_log_probs, rlsd_lambda=rlsd_lambda,
            rlsd_reweight_clip_range=config.rlsd_reweight_clip_range,
            rlsd_negative_only=config.rlsd_negative_only, reweight_mask=reweight_mask,
        )
    eps_w = config.rlsd_reweight_clip_range
    signed = torch.sign(advantages) * delta
    low, high = math.log1p(-eps_w) if eps_w < 1 else -math.inf, math.log1p(eps_w)
    ratio = torch.exp((log_probs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    dual = math.inf if config.delta is None else config.delta
    kl = torch.zeros_like(log_probs) if ref_log_probs is None else k3_kl(log_probs, ref_log_probs)
    ones = torch.ones_like(log_probs)
    terms = {
        "reweighted_pos": (chosen & pos, ones), "reweighted_neg": (chosen & neg, ones),
        "active_pos": (pos, ones), "active_neg": (neg, ones),
        "delta_pos": (chosen & pos, delta), "delta_neg": (chosen & neg, delta),
        "delta_squared": (chosen, delta.double() ** 2),
        "weight_pos": (pos, a_hat / advantages), "weight_neg": (neg, a_hat / advantages),
        "weight_clip_low": (chosen & (signed < low), ones),
        "weight_clip_high": (chosen & (signed > high), ones),
        "ratio_clip_low": (neg & (ratio < 1 - config.epsilon), ones),
        "ratio_clip_high": (pos & (ratio > 1 + config.epsilon_high), ones),
        "ratio_clip_dual": (neg & (ratio > dual), ones),
        "kl": (active, kl), "entropy": (active, ones * 0 if entropy is None else entropy),
        "policy_kl": (active, old - log_probs),
    }
    return torch.stack(
        [torch.where(terms[name][0], terms[name][1], 0).double().sum() for name in TOKEN_SUMS]
    )


def rlsd_loss(
    log_probs, advantages, loss_weights, *, teacher_log_probs, old_log_probs, ref_log_probs,
    reweight_mask, entropy, rlsd_lambda, config,
):
    """L from inputs (N,); returns a scalar that autograd differentiates.

    Tokens that are not live are replaced by zeros: whatever they hold, they add exactly 0.
    """
    live = live_tokens(loss_weights, advantages, config)

    def pick(per_token):
        return None if per_token is None else torch.where(live, per_token, 0)

    log_probs, advantages, loss_weights = pick(log_probs), pick(advantages), pick(loss_weights)
    old = log_probs.detach() if old_log_probs is None else pick(old_log_probs)
    a_hat = advantages
    if teacher_log_probs is not None:
        a_hat = rlsd_advantages(
            advantages,
            old if config.rlsd_delta_source == "old_log_probs" else log_probs,
            pick(teacher_log_probs),
            rlsd_lambda=rlsd_lambda,
            rlsd_reweight_clip_range=config.rlsd_reweight_clip_range,
            rlsd_negative_only=config.rlsd_negative_only,
            reweight_mask=reweight_mask,
        )
    per_token = surrogate(
        log_probs, old, a_hat,
        epsilon=config.epsilon, epsilon_high=config.epsilon_high, delta=config.delta,
    )
    if config.beta > 0:
        per_token = per_token + config.beta * k3_kl(log_probs, pick(ref_log_probs))
    if config.entropy_coef > 0:
        per_token = per_token - config.entropy_coef * pick(entropy)
    return (loss_weights * per_token).sum()


def linear_rlsd_loss(
    hidden, weight, completion_ids, advantages, loss_weights, *, teacher_hidden,
    teacher_log_probs, teacher_weight, old_log_probs, ref_log_probs, reweight_mask, bias,
    rlsd_lambda, use_teacher, config, logit_scale, softcap, gradient_tolerance=0.0,
):
    """Both passes over the head, then L: loss, log_probs, teacher_log_probs, entropy.

    Rows that are not live enter as zeros and keep 0 in every output; so does the teacher where no
    token is re-weighted. An id outside [0, V) gives NaN for its row.
    """
    safe = completion_ids.clamp(0, weight.shape[0] - 1)
    head = {
        "bias": bias, "temperature": config.temperature, "logit_scale": logit_scale,
        "final_logit_softcapping": softcap, "gradient_tolerance": gradient_tolerance,
    }

    def score(h, w, rows):
        lp, ent = linear_log_probs(torch.where(rows.unsqueeze(-1), h, 0), w, safe, **head)
        lp = lp.masked_fill(safe != completion_ids, math.nan)
        return torch.where(rows, lp, 0), torch.where(rows, ent, 0)

    live = live_tokens(loss_weights, advantages, config)
    log_probs, entropy = score(hidden, weight, live)
    teacher = teacher_log_probs if use_teacher else None
    if use_teacher and teacher_hidden is not None:
        scored = live & reweighted_tokens(
            advantages, rlsd_negative_only=config.rlsd_negative_only, reweight_mask=reweight_mask
        )
        with torch.no_grad():
            t_weight = weight if teacher_weight is None else teacher_weight
            teacher = score(teacher_hidden, t_weight, scored)[0].to(log_probs.dtype)
    loss = rlsd_loss(
        log_probs, advantages, loss_weights, teacher_log_probs=teacher,
        old_log_probs=old_log_probs, ref_log_probs=ref_log_probs, reweight_mask=reweight_mask,
        entropy=entropy, rlsd_lambda=rlsd_lambda, config=config,
    )
    return loss, log_probs, teacher, entropy


def _buckets(log_p, add_tail):
    """log-probs of some tokens as a distribution of their own."""
    log_mass = log_p.logsumexp(-1, keepdim=True)
    if not add_tail:
        return log_p - log_mass
    return torch.cat([log_p, torch.log(-torch.expm1(log_mass.clamp(max=-TAIL_FLOOR)))], -1)


def linear_distillation_loss(
    hidden, weight, teacher_hidden, loss_weights, *, teacher_weight, bias, teacher_bias,
    divergence, alpha, temperature, logit_scale, final_logit_softcapping, topk=None,
    add_tail=False,
):
    """sum_t a_t D(P_T, P_S) over the full vocabulary, gradient through the student only.

    D is KL(P_T||P_S), KL(P_S||P_T) or alpha KL(P_T||M) + (1 - alpha) KL(P_S||M) with
    M = alpha P_T + (1 - alpha) P_S. Without teacher_weight the teacher has the student's head.
    With topk, over the student's topk most likely tokens: renormalised, or beside a bucket that
    holds the rest.
    """
    live = loss_weights != 0

    def log_softmax(h, w, b):
        dtype = compute_dtype(w.dtype)
        with torch.autocast(h.device.type, enabled=False):
            z = h[live].to(dtype) @ w.to(dtype).T
        z = logit_scale * (z if b is None else z + b.to(dtype))
        if final_logit_softcapping is not None:
            z = final_logit_softcapping * torch.tanh(z / final_logit_softcapping)
        z = z / temperature
        return torch.log_softmax(z if b is None else z.clamp(min=LOG_FLOOR), dim=-1)

    def kl(log_a, log_b):
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    s = log_softmax(hidden, weight, bias)
    with torch.no_grad():
        if teacher_weight is None:
            teacher_weight, teacher_bias = weight, bias
        t = log_softmax(teacher_hidden, teacher_weight, teacher_bias).to(s.dtype)
    if topk is not None:
        index = s.topk(topk).indices
        s, t = (_buckets(x.gather(-1, index), add_tail) for x in (s, t))
    if divergence == "forward_kl":
        value = kl(t, s)
    elif divergence == "reverse_kl":
        value = kl(s, t)
    else:
        m = torch.logaddexp(t + math.log(alpha), s + math.log1p(-alpha))
        value = alpha * kl(t, m) + (1 - alpha) * kl(s, m)
    return (loss_weights[live] * value).sum()
