"""LigerFusedLinearRLSDLoss: the RLSD loss under the keywords of LigerFusedLinearGRPOLoss.

A drop-in for liger-kernel's class (0.8.5), which it neither imports nor needs. Equal to it with
rlsd_lambda 0; besides, advantages may be (B, T) and a privileged teacher re-weights them.
"""

import torch
from torch import nn

from rlsd_kernels import (
    RLSDLossConfig,
    aggregation_weights,
    fused_linear_rlsd_loss,
    linear_log_probs,
)

LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo")


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


class LigerFusedLinearRLSDLoss(nn.Module):
    """Fused LM head and RLSD loss with Liger's constructor and call.

    Args:
        beta: coefficient of the k3 KL; 0 without a reference.
        compiled, chunk_size, sapo_*, vespo_*: taken for compatibility, without effect: nothing is
            compiled, rlsd_kernels sizes its own chunks, and those loss types are refused.
        use_ref_model: whether the KL has a reference; without one it is 0.
        epsilon_low, epsilon_high, delta: PPO clip, and the bound of the ratio or None. delta must
            be at least 1 + epsilon_high: below, Liger caps praise as well.
        loss_type: grpo, bnpo, dapo or dr_grpo. max_completion_length: tokens, for dr_grpo.
        temperature: divides the logits of student, reference and teacher.
        importance_sampling_level: "token". use_bias_correction_kl: False, or beta 0.
        rlsd_lambda: default of the call's; 0 is GRPO. rlsd_reweight_clip_range,
            rlsd_delta_source, rlsd_negative_only: see RLSDLossConfig. impl: of rlsd_kernels.

    Raises: ValueError in one sentence on an option that cannot be honoured.
    """

    def __init__(
        self, beta=0.04, compiled=True, use_ref_model=True, chunk_size=1, epsilon_low=0.2,
        epsilon_high=0.2, loss_type="dapo", max_completion_length=None,
        importance_sampling_level="token", sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        temperature=1.0, delta=None, use_bias_correction_kl=False, vespo_k_pos=2.0,
        vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0, *, rlsd_lambda=0.5,
        rlsd_reweight_clip_range=0.2, rlsd_delta_source="current", rlsd_negative_only=False,
        impl="auto",
    ):
        super().__init__()
        for applies, why in (
            (loss_type not in LOSS_TYPES,
             f"loss_type must be one of {', '.join(LOSS_TYPES)}, but got {loss_type!r}; use Liger's"
             " own class for others."),
            (importance_sampling_level != "token",
             f"importance_sampling_level must be 'token', but got {importance_sampling_level!r}."),
            (use_bias_correction_kl and beta != 0,
             "use_bias_correction_kl=True is not supported with beta > 0; turn one of them off."),
            (delta is not None and delta < 1 + epsilon_high,
             f"delta must be None or at least 1 + epsilon_high = {1 + epsilon_high:g}, but got "
             f"{delta}; below, it would cap praise as well."),
            (loss_type == "dr_grpo" and not max_completion_length,
             "loss_type='dr_grpo' needs max_completion_length > 0."),
        ):
            if applies:
                raise ValueError(why)
        self.use_ref_model, self.impl = use_ref_model and beta != 0, impl
        self.beta, self.loss_type = beta, loss_type
        self.max_completion_length = max_completion_length
        self.config = RLSDLossConfig(
            rlsd_lambda, rlsd_reweight_clip_range, rlsd_delta_source, rlsd_negative_only,
            epsilon_low, epsilon_high, delta, beta if self.use_ref_model else 0.0,
            temperature=temperature,
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
        if self.use_ref_model and ref_per_token_logps is None:
            if ref_input is None or ref_weight is None:
                raise ValueError(
                    f"beta is {self.beta:g}, so ref_per_token_logps, or ref_input with ref_weight, "
                    "is needed; pass one, or set use_ref_model=False."
                )
            with torch.no_grad():
                ref_per_token_logps = linear_log_probs(
                    ref_input, ref_weight, ids, bias=ref_bias, impl=self.impl,
                    temperature=self.config.temperature,
                )
        if vllm_is_ratio is not None:  # the policy term is linear in |A|, and the KL free of A
            _check_shape("vllm_is_ratio", vllm_is_ratio, ids, ("(B,)", "(B, 1)", "(B, T)"))
            advantages = _columns(advantages) * _columns(vllm_is_ratio).expand(ids.shape)
        out = fused_linear_rlsd_loss(
            _input, lin_weight, ids, advantages, bias=bias, teacher_hidden=teacher_input,
            teacher_weight=teacher_weight, teacher_log_probs=teacher_per_token_logps,
            old_log_probs=old_per_token_logps, loss_weights=self._weights(mask, num_items_in_batch),
            ref_log_probs=ref_per_token_logps if self.use_ref_model else None,
            reweight_mask=reweight_mask, rlsd_lambda=rlsd_lambda, config=self.config,
            impl=self.impl,
        )
        return out.loss, self._metrics(out, mask, advantages, old_per_token_logps,
                                       ref_per_token_logps)

    def _weights(self, mask, num_items_in_batch):
        """(B, T) a_t; Liger divides dapo's token count by the number of processes."""
        items = None
        if self.loss_type == "dapo":
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            items = mask.sum().float() if num_items_in_batch is None else num_items_in_batch
            items = torch.as_tensor(items, dtype=torch.float32, device=mask.device).clone()
            if distributed:
                if num_items_in_batch is None:
                    torch.distributed.all_reduce(items)
                items /= torch.distributed.get_world_size()
            items = items.clamp(min=1)
        return aggregation_weights(
            mask, self.loss_type, num_items_in_batch=items,
            max_completion_length=self.max_completion_length,
        )

    def _metrics(self, out, mask, advantages, old, ref):
        count, log_probs = mask.sum().clamp(min=1), out.log_probs
        metrics = []
        if self.beta != 0:
            gap = torch.zeros_like(log_probs) if not self.use_ref_model else ref - log_probs
            metrics.append(torch.where(mask, gap.exp() - gap - 1, 0).sum() / count)
        clipped = torch.zeros_like(mask)
        if old is not None:
            a = _columns(advantages)
            ratio = (log_probs - old).exp()
            clipped = (ratio < 1 - self.config.epsilon) & (a < 0)
            clipped |= (ratio > 1 + self.config.epsilon_high) & (a > 0)
        return (*metrics, (clipped & mask).sum() / count)
