"""The loss inside a model's own forward, where DDP and FSDP hooks fire and weights are gathered.

    model(input_ids, attention_mask, rlsd_head=f)  ->  (f(hidden, weight, bias), auxiliary loss)

f is a fused op over the LM head: the (B, L, V) logits of the plain forward are never made.
"""

import functools
import types
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func


class Scores(NamedTuple):
    """What TRL reads of a pass with its fused head."""

    log_probs: torch.Tensor  # (B, L - 1), 0 where not labelled
    entropy: torch.Tensor  # (B, L - 1)
    aux_loss: torch.Tensor | None  # ()


def add_rlsd_head(model, cast_lm_head_to_fp32):
    """Let `model(..., rlsd_head=f)` return (f(hidden, weight, bias), MoE auxiliary loss or None).

    hidden (B, L, H), weight (V, H) and bias (V,) or None have one dtype, autocast's where it is
    on, as in TRL's fused head. Without rlsd_head, forward is what it was.
    """
    forward = model.forward

    @functools.wraps(type(model).forward)  # generate checks its arguments against the signature
    def with_head(self, *args, rlsd_head=None, **kwargs):
        if rlsd_head is None:
            return forward(*args, **kwargs)
        kwargs.pop("labels", None)  # PEFT passes None
        kwargs["use_cache"] = False
        out, layer = self.base_model(*args, **kwargs), self.get_output_embeddings()
        hidden = out.last_hidden_state.to(layer.weight.device)
        dtype, device = hidden.dtype, hidden.device.type
        if cast_lm_head_to_fp32:
            dtype = torch.float32
        elif torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        head = [
            None if x is None else (x.full_tensor() if isinstance(x, DTensor) else x).to(dtype)
            for x in (layer.weight, layer.bias)
        ]
        with torch.autocast(device, enabled=False):
            result = rlsd_head(hidden.to(dtype), *head)
        aux_loss = None
        if kwargs.get("output_router_logits"):
            config = self.config.get_text_config()
            aux_loss = load_balancing_loss_func(
                out.router_logits, config.num_experts, config.num_experts_per_tok,
                kwargs.get("attention_mask"),
            )
        return result, aux_loss

    model.forward = types.MethodType(with_head, model)


def answer_trl(model, score):
    """Let TRL's passes over a model with the rlsd_head, `model(..., labels=y, fused_lm_head=True)`,
    return Scores of score(y, hidden, weight, bias) -> (log-probs, entropies) (B, L - 1)."""
    forward = model.forward

    @functools.wraps(type(model).forward)
    def answering(self, *args, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return forward(*args, **kwargs)
        head = functools.partial(score, kwargs.pop("labels"))
        scored, aux_loss = forward(*args, rlsd_head=head, **kwargs)
        return Scores(*scored, aux_loss)

    model.forward = types.MethodType(answering, model)
