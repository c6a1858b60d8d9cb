"""How sequences lie in one forward pass of the trunk, and how a batch is cut into such passes.

Padded: prompts end and completions begin at one column, in the student's and the teacher's context.
Padding-free: one row of all tokens; positions that start again at 0 mark the borders, by which
transformers gives flash attention its cu_seqlens and SDPA a block-diagonal mask. Both give the same
hidden states to rounding; SDPA then spends on masked pairs what it saves on padding.
"""

from typing import NamedTuple

import torch

from ..tasks.images import image_inputs


class Layout(NamedTuple):
    """What the forward passes of a model need to know beside the tokens."""

    pad_id: int
    padding_free: bool = False
    image_token_id: int | None = None  # of models that take images


def left_pad(sequences, pad_id, device):
    """(B, P) ids and mask of token lists, right-aligned."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, tokens in enumerate(sequences):
        ids[i, width - len(tokens) :] = torch.tensor(tokens)
        mask[i, width - len(tokens) :] = 1
    return ids.to(device), mask.to(device)


def hidden_states(model, input_ids, attention_mask, **extra):
    """Output of the trunk, last hidden states (B, L, H); positions count unpadded tokens."""
    if "position_ids" not in extra:
        extra["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **extra
    )


def _image_positions(model, ids, real, positions, inputs):
    """(4, B, L): where a token stands in the text, and its time, height and width in M-RoPE."""
    grid = {name: value for name, value in inputs.items() if not name.startswith("pixel_values")}
    rotary, _ = model.base_model.get_rope_index(ids, attention_mask=real.long(), **grid)
    return torch.cat([positions[None], rotary])


def completion_hidden(
    model, prompts, completion_ids, mask, layout, *, images=None, router_logits=None
):
    """Hidden states (B, T, H) that predict each completion token after each prompt (token lists).

    Completion ids are taken as they are, never re-tokenised. images: PromptImages or None of each
    prompt. router_logits: a list that gets, of a mixture of experts, ((tokens, experts) of each
    layer, (tokens,) mask of the real ones).
    """
    prompt_ids, prompt_mask = left_pad(prompts, layout.pad_id, completion_ids.device)
    ids = torch.cat([prompt_ids, completion_ids], 1)
    real = torch.cat([prompt_mask.bool(), mask], 1)
    start, width = prompt_ids.shape[1] - 1, completion_ids.shape[1]
    positions = (real.cumsum(1) - 1).clamp(min=0)
    extra = {} if router_logits is None else {"output_router_logits": True}
    if images is not None and any(images):
        inputs = image_inputs(images, ids, layout.image_token_id)
        positions = _image_positions(model, ids, real, positions, inputs)
        extra |= inputs
    if not layout.padding_free:
        out = hidden_states(model, ids, real.long(), position_ids=positions, **extra)
        hidden = out.last_hidden_state[:, start : start + width]
    else:
        if "mm_token_type_ids" in extra:
            extra["mm_token_type_ids"] = extra["mm_token_type_ids"][real][None]
        out = hidden_states(
            model, ids[real][None], None, position_ids=positions[..., real].unsqueeze(-2), **extra
        )
        at = (real.flatten().cumsum(0) - 1).view(real.shape)[:, start : start + width]
        hidden = out.last_hidden_state[0][at.clamp(min=0)]
        real = torch.ones_like(ids[real], dtype=torch.bool)
    if router_logits is not None:
        router_logits.append((out.router_logits, real.flatten()))
    return hidden


def micro_batches(lengths, size, max_tokens, padding_free):
    """Index lists that cover all sequences: `size` each, or by the tokens that a pass holds.

    lengths: (prompt, completion) tokens of each sequence. With max_tokens, sequences of like length
    come together, padding counts unless there is none, and a longer sequence goes alone.
    """
    if max_tokens is None:
        return [list(range(i, min(i + size, len(lengths)))) for i in range(0, len(lengths), size)]
    parts, room = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: (-sum(lengths[i]), i)):
        if parts:
            trial = [lengths[k] for k in [*parts[-1], i]]
            room = max_tokens - (
                sum(map(sum, trial)) if padding_free
                else len(trial) * sum(max(column) for column in zip(*trial, strict=True))
            )
        if not parts or room < 0:
            parts.append([])
        parts[-1].append(i)
    return parts
