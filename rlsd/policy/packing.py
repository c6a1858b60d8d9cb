"""How sequences lie in one forward pass of the trunk, and how a batch is cut into such passes.

Padded: prompts end and completions begin at one column, in the student's and the teacher's context.
Padding-free: one row of all tokens; positions that start again at 0 mark the borders, by which
transformers gives flash attention its cu_seqlens and SDPA a block-diagonal mask. SDPA then spends
on masked pairs what it saves on padding. Shared: rows with the same prompt, a group's in either
context, compute it once; its keys and values go to their completions, and gradients back through
them. Of G (P + T) tokens P + G T remain. All give the same hidden states to rounding.
"""

import math
from collections import Counter
from typing import NamedTuple

import torch

from ..tasks.images import image_inputs

# Layers whose whole state of a prompt is its keys and values, by transformers' names.
ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


class Layout(NamedTuple):
    """What the forward passes of a model need to know beside the tokens."""

    pad_id: int
    padding_free: bool = False
    image_token_id: int | None = None  # of models that take images
    share_prompts: bool = False
    uniform: bool = False  # all passes alike, as FSDP2 needs: share where no prompt repeats too


def labels(prompts, images):
    """(row where it stands first, tokens) of each prompt, None where there is none.

    Equal are equal tokens with the same images, so a group's prompts have one label.
    """
    first = {}
    return [
        None if prompt is None else (
            first.setdefault((tuple(prompt), None if picture is None else id(picture)), i),
            len(prompt),
        ) for i, (prompt, picture) in enumerate(zip(prompts, images, strict=True))
    ]


def forwarded(prompts, completions, layout):
    """(tokens that a pass over rows holds, whether it shares prompts to hold no more).

    prompts: labels of the rows; completions: their tokens.
    """
    if not prompts:
        return 0, False
    longest, widest = max(completions), max(n for _, n in prompts)
    alone = len(prompts) * (widest + longest)
    if layout.padding_free:
        alone = sum(completions) + sum(n for _, n in prompts)
    shared = len(set(prompts)) * widest + len(prompts) * longest
    if layout.share_prompts and (layout.uniform or shared < alone):
        return shared, True
    return alone, False


def spared(prompts, completions, parts, layout):
    """Lengths of the prompts that passes over parts (index lists) need not forward again."""
    out = []
    for rows in parts:
        rows = [i for i in rows if prompts[i] is not None]
        own = [prompts[i] for i in rows]
        if forwarded(own, [completions[i] for i in rows], layout)[1]:
            out += [n for (_, n), times in Counter(own).items() for _ in range(times - 1)]
    return out


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
    """(4, B, L): where a token stands in the text, and its time, height and width in M-RoPE.

    With them (B, 1): by how much later text is ahead of its place.
    """
    grid = {name: value for name, value in inputs.items() if not name.startswith("pixel_values")}
    rotary, ahead = model.base_model.get_rope_index(ids, attention_mask=real.long(), **grid)
    return torch.cat([positions[None], rotary]), ahead.view(-1, 1)


def completion_hidden(
    model, prompts, completion_ids, mask, layout, *, images=None, router_logits=None
):
    """Hidden states (B, T, H) that predict each completion token after each prompt (token lists).

    Completion ids are taken as they are, never re-tokenised. images: PromptImages or None of each
    prompt. router_logits: a list that gets, of a mixture of experts, ((tokens, experts) of each
    layer, (tokens,) how often each stands in the batch, 0 for padding) of each pass.
    """
    images, width = images or [None] * len(prompts), completion_ids.shape[1]
    if layout.share_prompts and width:
        known, counts = labels(prompts, images), mask.sum(1).tolist()
        if forwarded(known, counts, layout)[1]:
            first = sorted({row for row, _ in known})
            owners = torch.tensor([first.index(row) for row, _ in known], device=mask.device)
            return _shared_hidden(
                model, [prompts[i] for i in first], owners, completion_ids, mask, layout,
                [images[i] for i in first], router_logits,
            )
    prompt_ids, prompt_mask = left_pad(prompts, layout.pad_id, completion_ids.device)
    ids = torch.cat([prompt_ids, completion_ids], 1)
    real = torch.cat([prompt_mask.bool(), mask], 1)
    start = prompt_ids.shape[1] - 1
    positions = (real.cumsum(1) - 1).clamp(min=0)
    extra = {} if router_logits is None else {"output_router_logits": True}
    if any(images):
        inputs = image_inputs(images, ids, layout.image_token_id)
        positions, _ = _image_positions(model, ids, real, positions, inputs)
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


def _shared_hidden(model, prompts, owners, completion_ids, mask, layout, images, router_logits):
    """completion_hidden in two passes, over distinct prompts and over completions.

    owners: (B,) the prompt of each completion.
    """
    from .prompt_cache import kept_cache, shared_cache  # transformers, without which checks run

    prompt_ids, real = left_pad(prompts, layout.pad_id, completion_ids.device)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    later = real.sum(1)[owners, None] + (mask.cumsum(1) - 1).clamp(min=0)
    extra = {} if router_logits is None else {"output_router_logits": True}
    inputs = {}
    if any(images):
        inputs = image_inputs(images, prompt_ids, layout.image_token_id)
        positions, ahead = _image_positions(model, prompt_ids, real, positions, inputs)
        later = torch.stack([later, *[later + ahead[owners]] * 3])
    kept = kept_cache()
    before = hidden_states(
        model, prompt_ids, real, position_ids=positions, past_key_values=kept, **extra, **inputs
    )
    after = hidden_states(
        model, completion_ids, torch.cat([real[owners], mask.long()], 1), position_ids=later,
        past_key_values=shared_cache(kept, owners), **extra,
    )
    if router_logits is not None:
        times = owners.bincount(minlength=len(prompts))[:, None] * real
        router_logits += [
            (before.router_logits, times.flatten()), (after.router_logits, mask.flatten())
        ]
    last = before.last_hidden_state[owners, -1:]
    return torch.cat([last, after.last_hidden_state[:, :-1]], 1)


def sharing_refusal(model, layout, tolerance):
    """Why completions cannot share the pass over their prompt, or None; the model is in eval mode.

    Hidden states of a group, and gradients at its embedded tokens, must be those of whole rows but
    for a relative error of tolerance. In bf16 the latter are noise at rare tokens, in any layout
    (off by their own size on SmolLM2-135M), so in 16 bits they must only arrive, and by way of keys
    and values alone.
    """
    from .checkpoint import reason

    embedding = model.get_input_embeddings()
    device = embedding.weight.device
    limits = tolerance, tolerance if embedding.weight.dtype.itemsize > 2 else math.inf
    ids = torch.tensor([[5, 6, 7], [4, 3, 0], [6, 3, 5]], device=device)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]], device=device).bool()
    prompts, owners = [[7, 6, 5, 4, 3]] * 2 + [[3, 4]], torch.tensor([0, 0, 1], device=device)

    def outcome(share):
        """Hidden states, and gradients of the tokens of (two prompts, completions)."""
        seen = []

        def noted(module, args, out):
            seen.append(out.detach().requires_grad_())
            return seen[-1]

        hook = embedding.register_forward_hook(noted)
        try:
            with torch.enable_grad():
                hidden = completion_hidden(model, prompts, ids, mask, layout._replace(
                    padding_free=False, share_prompts=share, uniform=False
                ))
                later = hidden[:, 1:][mask[:, 1:]].float()  # the first come from the prompt's pass
                along = torch.linspace(-1, 1, later.numel(), device=device).view_as(later)
                found = torch.autograd.grad((later * along).sum(), seen)
            if not found[0].any():
                raise RuntimeError("no gradient arrives there")
        finally:
            hook.remove()
        if not share:
            whole = found[0].float()
            sums = whole.new_zeros(2, 5, whole.shape[-1]).index_add_(0, owners, whole[:, :5])
            found = sums, whole[:, 5:]
        return hidden[mask].detach().float(), torch.cat([g.float().flatten() for g in found])

    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    other = sorted({kind for kind in kinds if kind not in ATTENTION})
    why = f"; its layers are of type {', '.join(other)} too" if other else ""
    try:
        for what, limit, got, want in zip(
            ("hidden states", "gradients"), limits, outcome(True), outcome(False), strict=True
        ):
            error = ((got - want).norm() / want.norm()).item()
            if not error <= limit:
                return (f"computes something else where completions share a prompt ({what} differ "
                        f"by {error:.1%}{why})")
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError) as error:
        said = f"{type(error).__name__}: {reason(error)}{why}"
        return f"cannot go on from the keys and values of a prompt ({said})"
    return None


def micro_batches(contexts, completions, size, max_tokens, layout):
    """Index lists that cover all sequences: `size` each, or by the tokens that a pass holds.

    contexts: labels of the prompts of each pass, the student's first; completions: tokens. With
    max_tokens, sequences of like length come together, padding counts unless there is none, and a
    longer sequence goes alone. Sequences that share a prompt stay together where they fit.
    """
    def fits(part):
        if max_tokens is None or len(part) == 1:
            return len(part) <= size or max_tokens is not None
        for prompts in contexts:
            rows = [i for i in part if prompts[i] is not None]
            held = [[values[i] for i in rows] for values in (prompts, completions)]
            if forwarded(*held, layout)[0] > max_tokens:
                return False
        return True

    order = list(range(len(completions)))
    if max_tokens is not None:
        longest = [
            max(prompt[1] for prompt in own if prompt) for own in zip(*contexts, strict=True)
        ]
        order.sort(key=lambda i: (-longest[i] - completions[i], i))
    groups = {}
    for i in order:
        groups.setdefault(contexts[0][i] if layout.share_prompts else i, []).append(i)
    parts = []
    for group in groups.values():
        for rows in [group] if fits(group) else [[i] for i in group]:
            if parts and fits([*parts[-1], *rows]):
                parts[-1] += rows
            else:
                parts.append(rows)
    return parts
