"""LigerFusedLinearRLSDLoss: the RLSD loss under the keywords of LigerFusedLinearGRPOLoss.

A drop-in for liger-kernel's class (0.8.5), which it neither imports nor needs. Equal to it with
rlsd_lambda 0; besides, advantages may be (B, T) and a privileged teacher re-weights them. The
clipped surrogate with ratios of tokens is one fused pass; other losses are a formula on the
log-probs of linear_log_probs, without logits either.
"""

import math
import warnings

import torch
from torch import nn

from rlsd_kernels import (
    RLSDLossConfig,
    aggregation_weights,
    fused_linear_rlsd_loss,
    linear_log_probs,
    rlsd_advantages,
)
from rlsd_kernels.config import check_number

ONE_PASS = ("grpo", "bnpo", "dapo", "dr_grpo")
TOKEN_LEVEL = ("cispo", "sapo", "vespo")  # of which Liger has no form with one ratio per sequence
LOSS_TYPES = (*ONE_PASS, "luspo", *TOKEN_LEVEL)
AGGREGATED_LIKE = {"sapo": "grpo", "cispo": "dapo", "vespo": "dapo"}


def _check_shape(name, value, ids, allowed):
    """Raise in one sentence unless value has one of the allowed shapes: others may broadcast."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, but got {type(value).__name__}.")
    b, t = ids.shape
    shapes = {"(B,)": (b,), "(B, 1)": (b, 1), "(B, T)": (b, t)}
    if tuple(value.shape) not in [shapes[x] for x in allowed]:
        raise ValueError(
            f"{name} must have shape {' or '.join(allowed)} with B = {b} and T = {t}, but got "
            f"{tuple(value.shape)}."
        )


def _columns(per_sequence):
    """(B,) as (B, 1), which broadcasts over tokens and never over sequences."""
    return per_sequence if per_sequence.dim() == 2 else per_sequence[:, None]


def vespo_weights(a, log_ratio, ratio, k_pos, lambda_pos, k_neg, lambda_neg):
    """phi(w) = e^lambda w^k e^(-lambda w) with w the ratio of a sequence, (B, 1) or (B, T).

    log_ratio (B, T): 0 where masked. ratio: the sampler's, (B, T) or (B, 1), or None.
    """
    log_w = log_ratio.detach().clamp(-20, 20).sum(1, keepdim=True)
    if ratio is not None:
        log_w = log_w + ratio.log().clamp(math.log(1e-8), 20).sum(1, keepdim=True)
    log_w = log_w.clamp(math.log(1e-8), 20)
    k, lam = torch.where(a >= 0, k_pos, k_neg), torch.where(a >= 0, lambda_pos, lambda_neg)
    lam = lam.clamp(min=1e-4)
    return (lam + k * log_w - lam * log_w.exp()).exp()


class LigerFusedLinearRLSDLoss(nn.Module):
    """Fused LM head and RLSD loss with Liger's constructor and call.

    Args:
        beta: coefficient of the k3 KL; 0 without a reference.
        compiled, chunk_size: taken for compatibility, without effect: nothing is compiled, and
            rlsd_kernels sizes its own chunks.
        use_ref_model: whether the KL has a reference; without one it is 0.
        epsilon_low, epsilon_high, delta: PPO clip, and the bound of the ratio or None. cispo
            bounds its ratio by epsilon_high itself.
        loss_type: grpo, bnpo, dapo, dr_grpo, luspo, cispo, sapo or vespo, with sapo_temperature_*
            and vespo_* as shapes of the last two. max_completion_length: tokens, for dr_grpo.
        temperature: divides the logits of student, reference and teacher.
        importance_sampling_level: "token" or "sequence", one ratio for each token or sequence.
        use_bias_correction_kl: multiply the KL by the ratio.
        rlsd_lambda: default of the call's; 0 is GRPO. rlsd_reweight_clip_range,
            rlsd_delta_source, rlsd_negative_only: see RLSDLossConfig. impl, gradient_tolerance: of
            rlsd_kernels.

    Raises: ValueError in one sentence on an option that cannot be honoured.
    """

    def __init__(
        self, beta=0.04, compiled=True, use_ref_model=True, chunk_size=1, epsilon_low=0.2,
        epsilon_high=0.2, loss_type="dapo", max_completion_length=None,
        importance_sampling_level="token", sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        temperature=1.0, delta=None, use_bias_correction_kl=False, vespo_k_pos=2.0,
        vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0, *, rlsd_lambda=0.5,
        rlsd_reweight_clip_range=0.2, rlsd_delta_source="current", rlsd_negative_only=False,
        impl="auto", gradient_tolerance=0.0,
    ):
        super().__init__()
        check_number("gradient_tolerance", gradient_tolerance, 0, 1, high_open=True)
        check_number("sapo_temperature_pos", sapo_temperature_pos, 0, low_open=True)
        check_number("sapo_temperature_neg", sapo_temperature_neg, 0, low_open=True)
        if delta is not None:
            check_number("delta", delta, 0, low_open=True)
        sequence = importance_sampling_level == "sequence"
        for applies, why in (
            (loss_type not in LOSS_TYPES,
             f"loss_type must be one of {', '.join(LOSS_TYPES)}, but got {loss_type!r}."),
            (importance_sampling_level not in ("token", "sequence"),
             "importance_sampling_level must be 'token' or 'sequence', but got "
             f"{importance_sampling_level!r}."),
            (sequence and loss_type in TOKEN_LEVEL,
             f"loss_type={loss_type!r} has no sequence-level ratio; set importance_sampling_level "
             "to 'token'."),
            (loss_type == "dr_grpo" and not max_completion_length,
             "loss_type='dr_grpo' needs max_completion_length > 0."),
        ):
            if applies:
                raise ValueError(why)
        self.use_ref_model = use_ref_model and beta != 0
        self.beta, self.loss_type, self.sequence = beta, loss_type, sequence
        self.delta, self.bias_correction = delta, use_bias_correction_kl and self.use_ref_model
        self.max_completion_length = max_completion_length
        self.sapo_temperatures = sapo_temperature_pos, sapo_temperature_neg
        self.vespo_shape = vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg
        self.head = {"impl": impl, "gradient_tolerance": gradient_tolerance}
        low_delta = delta is not None and delta < 1 + epsilon_high  # which caps praise as well
        self.one_pass = not (
            loss_type not in ONE_PASS or sequence or self.bias_correction or low_delta
        )
        self.config = RLSDLossConfig(
            rlsd_lambda, rlsd_reweight_clip_range, rlsd_delta_source, rlsd_negative_only,
            epsilon_low, epsilon_high, delta if self.one_pass else None,
            beta if self.use_ref_model else 0.0, temperature=temperature,
        )

    def forward(
        self, _input, lin_weight, selected_token_ids, attention_mask, advantages, bias=None,
        ref_per_token_logps=None, old_per_token_logps=None, ref_input=None, ref_weight=None,
        ref_bias=None, vllm_is_ratio=None, num_items_in_batch=None, *,
        teacher_per_token_logps=None, teacher_input=None, teacher_weight=None, rlsd_lambda=None,
        reweight_mask=None,
    ):
        """(loss, metrics) as Liger returns them; gradients reach _input, lin_weight and bias.

        Args:
            _input: (B, T, H) hidden states that predict selected_token_ids. lin_weight: (V, H).
            selected_token_ids: (B, T) int64. attention_mask: (B, T) bool or 0/1, 0 = no loss.
            advantages: (B,) or (B, T) float. bias, ref_bias: (V,).
            ref_per_token_logps, old_per_token_logps, teacher_per_token_logps: (B, T) in nats;
                without old ones the ratio is 1 with its gradient.
            ref_input, teacher_input: (B, T, H) to score with ref_weight, teacher_weight (V, H),
                by default lin_weight (the teacher with bias too).
            vllm_is_ratio: (B, T), (B, 1) or (B,) factor >= 0 of the policy term.
            num_items_in_batch: tokens over all processes that dapo divides by; default: of this
                batch, over all processes.
            rlsd_lambda: overrides the constructor's. reweight_mask: (B, T) bool.

        metrics: ([KL,] share of clipped tokens), means over attention_mask; without the KL when
        beta is 0. Raises: TypeError or ValueError in one sentence.
        """
        ids = selected_token_ids
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
            got = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise ValueError(f"selected_token_ids must be a tensor (B, T), but got {got}.")
        _check_shape("attention_mask", attention_mask, ids, ("(B, T)",))
        _check_shape("advantages", advantages, ids, ("(B,)", "(B, T)"))
        mask = attention_mask.bool()
        if vllm_is_ratio is not None:
            _check_shape("vllm_is_ratio", vllm_is_ratio, ids, ("(B,)", "(B, 1)", "(B, T)"))
            vllm_is_ratio = _columns(vllm_is_ratio)
        if self.use_ref_model and ref_per_token_logps is None:
            if ref_input is None or ref_weight is None:
                raise ValueError(
                    f"beta is {self.beta:g}, so ref_per_token_logps, or ref_input with ref_weight, "
                    "is needed; pass one, or set use_ref_model=False."
                )
            ref_per_token_logps = self._log_probs(ref_input, ref_weight, ids, ref_bias)
        elif self.use_ref_model and ref_input is not None:
            warnings.warn(
                "ref_input came beside the log-probs it would give. Using ref_per_token_logps.",
                stacklevel=2,
            )
        old = old_per_token_logps
        teacher = {"rlsd_lambda": rlsd_lambda, "reweight_mask": reweight_mask,
                   "teacher_log_probs": teacher_per_token_logps}
        if not self.one_pass:
            if teacher_input is not None and teacher_per_token_logps is not None:
                raise ValueError("Pass teacher_input or teacher_per_token_logps, not both.")
            if teacher_input is not None:
                head = lin_weight if teacher_weight is None else teacher_weight
                teacher["teacher_log_probs"] = self._log_probs(teacher_input, head, ids, bias)
            return self._by_formula(
                (_input, lin_weight, ids, bias), mask, advantages, old, ref_per_token_logps,
                vllm_is_ratio, num_items_in_batch, **teacher,
            )
        if vllm_is_ratio is not None:  # the policy term is linear in |A|, and the KL free of A
            advantages = _columns(advantages) * vllm_is_ratio.expand(ids.shape)
        out = fused_linear_rlsd_loss(
            _input, lin_weight, ids, advantages, bias=bias, teacher_hidden=teacher_input,
            teacher_weight=teacher_weight, old_log_probs=old, config=self.config,
            loss_weights=self._weights(mask, num_items_in_batch),
            ref_log_probs=ref_per_token_logps if self.use_ref_model else None,
            **teacher, **self.head,
        )
        a, ratio = _columns(advantages), None if old is None else (out.log_probs - old).exp()
        clipped = torch.zeros_like(mask) if old is None else self._clipped(ratio, a)
        gap = ref_per_token_logps - out.log_probs if self.use_ref_model else None
        kl = None if gap is None else gap.exp() - gap - 1
        return out.loss, self._metrics(mask, clipped, kl)

    @torch.no_grad()
    def _log_probs(self, hidden, weight, ids, bias):
        return linear_log_probs(
            hidden, weight, ids, bias=bias, temperature=self.config.temperature, **self.head
        )

    def _by_formula(
        self, head, mask, advantages, old, ref, sampler, items, *, rlsd_lambda, reweight_mask,
        teacher_log_probs,
    ):
        """(loss, metrics) of what the fused pass does not cover, on (B, T) log-probs."""
        hidden, weight, ids, bias = head
        for name, x in (("old_per_token_logps", old), ("ref_per_token_logps", ref),
                        ("teacher_per_token_logps", teacher_log_probs)):
            if x is not None:
                _check_shape(name, x, ids, ("(B, T)",))
        a, config = _columns(advantages), self.config
        live = mask.clone()
        if self.loss_type == "luspo":  # Liger's mean is over padded tokens too
            live[:] = True
        elif not self.use_ref_model:  # sequences without advantage add nothing
            live &= (a != 0).any(1, keepdim=True)
        got = linear_log_probs(
            hidden[live], weight, ids[live], bias=bias, temperature=config.temperature, **self.head
        )
        lp = got.new_zeros(ids.shape).masked_scatter(live, got)

        def where_live(x):  # what is not computed may hold anything
            return lp.detach() if x is None else torch.where(live, x.to(lp), 0)

        log_ratio = lp - where_live(old)
        lam = float(config.rlsd_lambda if rlsd_lambda is None else rlsd_lambda)
        check_number("rlsd_lambda", lam, 0, 1)
        if lam > 0:
            if teacher_log_probs is None:
                raise ValueError(
                    f"teacher_per_token_logps or teacher_input is needed because lambda is {lam:g};"
                    " pass one, or set rlsd_lambda to 0 for GRPO."
                )
            student = where_live(old if config.rlsd_delta_source == "old_log_probs" else None)
            a = rlsd_advantages(
                a.expand(ids.shape).to(lp), student, where_live(teacher_log_probs),
                rlsd_lambda=lam, rlsd_reweight_clip_range=config.rlsd_reweight_clip_range,
                rlsd_negative_only=config.rlsd_negative_only, reweight_mask=reweight_mask,
            )
        log_ratios = log_ratio
        if self.sequence:
            count = mask.sum(1, keepdim=True).clamp(min=1)
            log_ratios = torch.where(mask, log_ratio, 0).sum(1, keepdim=True) / count
        ratio = log_ratios.exp()
        loss = self._token_loss(lp, ratio, torch.where(mask, log_ratio, 0), a, sampler)
        if sampler is not None and self.loss_type != "vespo":
            loss = loss * sampler
        kl = None
        if self.use_ref_model:
            gap = where_live(ref) - lp
            kl = gap.exp() - gap - 1
            kl = kl * ratio if self.bias_correction else kl
            loss = loss + self.beta * kl
        clipped = self._clipped(ratio.detach(), a)
        if self.loss_type == "luspo":
            loss = (loss * mask.sum(1, keepdim=True)).mean()
        else:
            loss = (torch.where(mask, loss, 0) * self._weights(mask, items)).sum()
        return loss, self._metrics(mask, clipped, kl)

    def _token_loss(self, lp, ratio, log_ratio, a, sampler):
        """The policy term, (B, T) or (B, 1), of one loss type."""
        config = self.config
        if self.loss_type == "cispo":
            return -ratio.detach().clamp(max=config.epsilon_high) * a * lp
        if self.loss_type == "vespo":
            return -vespo_weights(a, log_ratio, sampler, *self.vespo_shape) * a * lp
        if self.loss_type == "sapo":
            t = torch.where(a > 0, *self.sapo_temperatures)
            return -torch.sigmoid(t * (ratio - 1)) * 4 / t * a
        bounded = ratio if self.delta is None else ratio.clamp(max=self.delta)
        kept = ratio.clamp(1 - config.epsilon, 1 + config.epsilon_high)
        return -torch.min(bounded * a, kept * a)

    def _weights(self, mask, num_items_in_batch):
        """(B, T) a_t; Liger divides dapo's token count by the number of processes."""
        items = None
        kind = AGGREGATED_LIKE.get(self.loss_type, self.loss_type)
        if kind == "dapo":
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            items = mask.sum().float() if num_items_in_batch is None else num_items_in_batch
            items = torch.as_tensor(items, dtype=torch.float32, device=mask.device).clone()
            if distributed:
                if num_items_in_batch is None:
                    torch.distributed.all_reduce(items)
                items /= torch.distributed.get_world_size()
            items = items.clamp(min=1)
        return aggregation_weights(
            mask, kind, num_items_in_batch=items,
            max_completion_length=self.max_completion_length,
        )

    def _clipped(self, ratio, a):
        """Where the clip binds; ratio and a are (B, T) or (B, 1)."""
        if self.loss_type == "cispo":
            return (ratio > self.config.epsilon_high) & (a > 0)
        if self.loss_type in TOKEN_LEVEL:
            return torch.zeros_like(ratio, dtype=torch.bool)
        low, high = 1 - self.config.epsilon, 1 + self.config.epsilon_high
        return (ratio < low) & (a < 0) | (ratio > high) & (a > 0)

    def _metrics(self, mask, clipped, kl):
        count, metrics = mask.sum().clamp(min=1), [(clipped & mask).sum() / mask.sum().clamp(min=1)]
        if self.beta != 0:
            kl = torch.zeros_like(count) if kl is None else torch.where(mask, kl.detach(), 0).sum()
            metrics.insert(0, kl / count)
        return tuple(metrics)
