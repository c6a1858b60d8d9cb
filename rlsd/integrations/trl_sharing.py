"""A prompt once for all rows of a pass that have it, in the passes of TRL's trainers.

Of B rows of P + T tokens with D different prompts D P + B T are left (policy/packing.py); of a
micro-batch that holds whole groups of G rows, P + G T for each. Hidden states and gradients are
those of whole rows to rounding.
"""

import contextlib
import functools
import logging

import torch
from accelerate.utils import is_peft_model
from transformers.modeling_layers import GradientCheckpointingLayer

from ..config import UserError
from ..policy.models import TOLERANCE, Router, sharing
from ..policy.packing import Layout, completion_hidden, forwarded, hidden_states, labels, spared

logger = logging.getLogger(__name__)


class SharedPrompts:
    """How the passes of a model share prompts; router: of a mixture of experts, or None."""

    def __init__(self, layout, router):
        self.layout, self.router = layout, router

    def trunk(self, prompt_ids, prompt_mask, ids, mask, *, with_router):
        """(what model(rlsd_trunk=..) runs, tokens that it spares), or (None, 0): nothing to share.

        prompt_ids, prompt_mask (B, P), ids, mask (B, T), as TRL pads them. It gives hidden states
        (B, T, H) that predict the ids, and the load-balancing loss or None.
        """
        real = zip(prompt_ids, prompt_mask > 0, strict=True)
        prompts = [row[keep].tolist() for row, keep in real]
        known, counts = labels(prompts, [None] * len(prompts)), mask.sum(1).tolist()
        if not forwarded(known, counts, self.layout)[1]:
            return None, 0

        def run(model):
            routed = [] if with_router else None
            with recomputing_beside_a_cache(model):
                hidden = completion_hidden(
                    model, prompts, ids, mask > 0, self.layout, router_logits=routed
                )
            return hidden, self.router.loss(routed) if with_router else None

        return run, sum(spared(known, counts, [range(len(prompts))], self.layout))


def shared_prompts(trainer, model, obstacle):
    """SharedPrompts of a trainer by its share_prompts, or None.

    model: the causal LM inside trainer.model; obstacle: why the loss is not one fused pass.
    """
    args = trainer.args
    if args.share_prompts == "false":
        return None
    config = model.config.get_text_config()
    layout = Layout(trainer._tokenizer.pad_token_id)
    reason = obstacle or _find_reason(trainer, model, config)
    if reason is None:
        layout = sharing(model, layout, args.share_prompts, logger.info)
    elif args.share_prompts == "true":
        raise UserError(f"share_prompts is true, but {reason}; set it to auto or false.")
    else:
        logger.info("Every completion computes its prompt anew, since %s.", reason)
    if not layout.share_prompts:
        return None
    # In 16 bits both layouts round otherwise: ratios and delta compare passes of one layout.
    rounds = args.bf16 or args.fp16 or model.dtype.itemsize == 2
    router = None
    if trainer.aux_loss_enabled:
        router = Router(1.0, config.num_experts, config.num_experts_per_tok)
    return SharedPrompts(layout._replace(uniform=rounds), router)


def _find_reason(trainer, model, config):
    """Why rows cannot share their prompt (a clause), or None; the model itself is checked later."""
    args = trainer.args
    dropout = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    learned = is_peft_model(trainer.model) and trainer.model.active_peft_config.is_prompt_learning
    for applies, reason in (
        (args.per_device_train_batch_size == 1, "per_device_train_batch_size is 1, so that no two "
         "rows of a micro-batch have one prompt"),
        (trainer.is_fsdp_enabled, "FSDP gathers weights for one pass of each layer"),
        (trainer._is_vlm, "the model takes images"),
        (learned, "an adapter of virtual tokens goes before every row"),
        (max([0, *dropout, getattr(config, "attention_dropout", None) or 0]) > 0,
         "dropout is on, which would fall on a shared prompt once"),
    ):
        if applies:
            return reason
    if _counts_padding(model):
        return (f"{type(model).__name__} places tokens by their column, padding included, where "
                "TRL gives no positions")


@torch.no_grad()
def _counts_padding(model):
    """Whether padding before a row changes its hidden states."""
    device, training = model.get_input_embeddings().weight.device, model.training
    ids = torch.tensor([[3, 3, 3, 5, 6, 7]], device=device)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1]], device=device)
    model.eval()
    try:
        want = hidden_states(model, ids, mask).last_hidden_state[:, 3:].float()
        out = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        model.train(training)
    error = (out.last_hidden_state[:, 3:].float() - want).norm() / want.norm()
    return not error <= max(TOLERANCE[model.dtype], 0.1 if model.dtype.itemsize == 2 else 0)


@contextlib.contextmanager
def recomputing_beside_a_cache(model):
    """transformers' checkpoints drop a cache, since most are written to; ours may be read anew."""
    layers = [
        (layer, vars(layer).get("forward")) for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer) and layer.training
        and layer.gradient_checkpointing
    ]
    for layer, _ in layers:
        layer.forward = functools.partial(_checkpointed, layer, layer.forward)
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer, own in layers:
            layer.gradient_checkpointing = True
            del layer.forward
            if own is not None:
                layer.forward = own


def _checkpointed(layer, forward, *args, **kwargs):
    run = functools.partial(_unswitched, layer, forward, **kwargs)
    # With re-entry the cache, no positional argument, would get no gradient.
    return layer._gradient_checkpointing_func(run, *args, use_reentrant=False)


def _unswitched(layer, forward, *args, **kwargs):
    """The layer itself, also when backward runs it again and its switch is back on."""
    switch, layer.gradient_checkpointing = layer.gradient_checkpointing, False
    try:
        return forward(*args, **kwargs)
    finally:
        layer.gradient_checkpointing = switch
