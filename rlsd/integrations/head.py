"""The loss inside a model's own forward, where DDP and FSDP hooks fire and weights are gathered.

    model(input_ids, attention_mask, rlsd_head=f)  ->  (f(hidden, weight, bias), auxiliary loss)
    model(rlsd_trunk=t, rlsd_head=f)               ->  with (hidden, auxiliary loss) = t(model)

f is a fused op over the LM head: the (B, L, V) logits of the plain forward are never made.
"""

import functools
import types
from typing import NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from rlsd_kernels import linear_log_probs


class Scores(NamedTuple):
    """What TRL's trainers read of a pass with a fused head; 0 where not labelled."""

    log_probs: torch.Tensor  # (B, L - 1)
    entropy: torch.Tensor  # (B, L - 1)
    label_mask: torch.Tensor  # (B, L - 1) bool
    is_top1: torch.Tensor | None  # (B, L - 1) bool
    mean_logits: torch.Tensor | None  # (B, L - 1)
    aux_loss: torch.Tensor | None  # ()


def base_of(model):
    """The causal LM inside a PEFT model, or the model."""
    return model.get_base_model() if is_peft_model(model) else model


def add_rlsd_head(model, cast_lm_head_to_fp32):
    """Let `model(..., rlsd_head=f)` return (f(hidden, weight, bias), MoE auxiliary loss or None).

    hidden (B, L, H), weight (V, H) and bias (V,) or None have one dtype, autocast's where it is
    on, as in TRL's fused head. With rlsd_trunk hidden and the loss are what it returns. Without
    rlsd_head, forward is what it was.
    """
    forward = model.forward

    @functools.wraps(type(model).forward)  # generate checks its arguments against the signature
    def with_head(self, *args, rlsd_head=None, rlsd_trunk=None, **kwargs):
        if rlsd_head is None:
            return forward(*args, **kwargs)
        hidden, aux_loss = rlsd_trunk(self) if rlsd_trunk else plain_trunk(self, *args, **kwargs)
        layer = self.get_output_embeddings()
        hidden = hidden.to(layer.weight.device)
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
            return rlsd_head(hidden.to(dtype), *head), aux_loss

    def plain_trunk(self, *args, labels=None, **kwargs):  # PEFT passes labels
        kwargs["use_cache"] = False
        out, aux_loss = self.base_model(*args, **kwargs), None
        if kwargs.get("output_router_logits"):
            config = self.config.get_text_config()
            aux_loss = load_balancing_loss_func(
                out.router_logits, config.num_experts, config.num_experts_per_tok,
                kwargs.get("attention_mask"),
            )
        return out.last_hidden_state, aux_loss

    model.forward = types.MethodType(with_head, model)


def answer_trl(model, scale, *, temperature, impl, gradient_tolerance, metrics, shared=None):
    """Let TRL's passes over a model with the rlsd_head, `model(..., labels=y, fused_lm_head=True)`,
    return Scores by linear_log_probs. scale: its Head; metrics: is_top1 and mean_logits too;
    shared: SharedPrompts of rows whose labels begin at one column."""
    forward = model.forward

    def scores(labels, hidden, weight, bias):
        labels = labels[:, 1:].to(hidden.device)
        live = labels != -100
        if hidden.shape[1] <= labels.shape[1]:  # the trunk gave those of the last tokens alone
            hidden = nn.functional.pad(hidden, (0, 0, labels.shape[1] - hidden.shape[1], 1))
        rows, ids = hidden[:, :-1][live], labels[live]
        found = linear_log_probs(
            rows, weight, ids, bias=bias, return_entropy=True, return_mean_logits=metrics,
            return_greedy=metrics, temperature=temperature, impl=impl,
            gradient_tolerance=gradient_tolerance, **scale._asdict(),
        )
        is_top1 = mean_logits = None
        if metrics:
            is_top1 = found.greedy_ids == ids
            mean_logits = found.mean_logits.detach() * temperature
        found = [*found[:2], live, is_top1, mean_logits]
        return [x if x is None or x is live else x.new_zeros(live.shape).masked_scatter(live, x)
                for x in found]

    @functools.wraps(type(model).forward)
    def answering(self, *args, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return forward(*args, **kwargs)
        labels, trunk = kwargs.pop("labels"), None
        if shared is not None and (labels != -100).any():
            start = int((labels != -100).any(0).nonzero()[0])
            ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
            trunk, _ = shared.trunk(
                ids[:, :start], mask[:, :start], ids[:, start:], mask[:, start:],
                with_router="output_router_logits" in kwargs,
            )
        head = functools.partial(scores, labels)
        scored, aux_loss = forward(*args, rlsd_head=head, rlsd_trunk=trunk, **kwargs)
        return Scores(*scored, aux_loss)

    model.forward = types.MethodType(answering, model)
