"""Group rollouts with the model's own generate, scored by the reward functions.

Prompts are padded on the left, completions on the right.
"""

from typing import NamedTuple

import torch

from .config import UserError
from .images import image_inputs
from .packing import left_pad
from .rewards import score


class Rollout(NamedTuple):
    """B completions; completion_ids and mask are (B, T), mask covers the first EOS and no more."""

    rows: list
    completion_ids: torch.Tensor
    mask: torch.Tensor
    texts: list
    truncated: torch.Tensor  # (B,) bool: no EOS within max_completion_length
    rewards: torch.Tensor  # (B,) fp64, weighted sum over reward functions
    rewards_per_func: torch.Tensor  # (B, F) fp64, NaN where a function returned None


def eos_ids(model, tokenizer):
    """Every token id that ends a completion."""
    ids = model.generation_config.eos_token_id
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids = [*ids, tokenizer.eos_token_id]
    if not ids:
        raise UserError("Neither model nor tokenizer names an EOS token, so no completion can end.")
    return ids


def require_room(model, rows, config):
    """A prompt and its completion must fit the positions that the model was made for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for row in rows:
        longest = max(len(row["prompt_ids"]), len(row["teacher_prompt_ids"] or []))
        if config.objective == "sdpo":  # a sibling may come before the question
            longest = len(row["prompt_ids"]) + config.max_completion_length
        if limit is not None and longest + config.max_completion_length > limit:
            raise UserError(
                f"Row {row['_source']} has a prompt of {longest} tokens, which with "
                f"max_completion_length {config.max_completion_length} exceeds the model's "
                f"{limit} positions; lower max_completion_length, max_prompt_length or "
                "max_teacher_prompt_length."
            )


@torch.no_grad()
def generate(model, tokenizer, prompts, config, *, images=None, greedy=False):
    """One completion per prompt: ids (B, T) right-padded, mask (B, T), truncated (B,).

    images: PromptImages or None of each prompt. Placeholders of images are never sampled: no pass
    over such a completion could be made.
    """
    ends = eos_ids(model, tokenizer)
    names = ("image_token_id", "video_token_id")
    placeholders = [getattr(model.config, n) for n in names if getattr(model.config, n, None)]
    pad_id = tokenizer.pad_token_id
    temperature = 1.0 if greedy else config.temperature
    device = model.get_input_embeddings().weight.device
    training, own = model.training, model.generation_config
    model.eval()
    # The model's own penalties and filters would sample another policy than the one we score.
    model.generation_config = type(own)()
    pieces = []
    try:
        for i in range(0, len(prompts), config.rollout_batch_size):
            ids, mask = left_pad(prompts[i : i + config.rollout_batch_size], pad_id, device)
            seen = (images or [None])[i : i + config.rollout_batch_size]
            extra = {"suppress_tokens": placeholders} if placeholders else {}
            if any(seen):
                extra |= image_inputs(seen, ids, placeholders[0])
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=config.max_completion_length,
                **extra,
                pad_token_id=pad_id, eos_token_id=ends, do_sample=not greedy,
                temperature=temperature, top_k=0,
            )
            pieces.append(out[:, ids.shape[1] :])
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise UserError(
            "The model's token probabilities are not finite, so it cannot be sampled from; lower "
            "learning_rate and continue from an earlier checkpoint."
        ) from error
    finally:
        model.generation_config = own
        model.train(training)
    width = max(p.shape[1] for p in pieces)
    ids = torch.cat([
        torch.nn.functional.pad(p, (0, width - p.shape[1]), value=pad_id) for p in pieces
    ])
    is_end = torch.isin(ids, torch.tensor(ends, device=device))
    return ids, is_end.cumsum(1) - is_end.long() == 0, ~is_end.any(1)


def roll_out(model, tokenizer, rows, config, reward_funcs, *, greedy=False):
    """Sample and score one completion per row (repeat a row to get a group)."""
    ids, mask, truncated = generate(
        model, tokenizer, [row["prompt_ids"] for row in rows], config, greedy=greedy,
        images=[row.get("_images") for row in rows],
    )
    lists = [line[keep].tolist() for line, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
    texts = tokenizer.batch_decode(lists, skip_special_tokens=True)
    per_func, rewards = score(
        reward_funcs, config.reward_weights, rows, texts, lists, config.reward_timeout
    )
    return Rollout(rows, ids, mask, texts, truncated, rewards, per_func)


def references(rows, tokenizer, config, reward_funcs, device):
    """The rows' reference solutions as a Rollout, for supervised steps; scored like samples."""
    lists = [row["_reference_ids"] for row in rows]
    width = max(map(len, lists))
    ids = torch.tensor([y + [tokenizer.pad_token_id] * (width - len(y)) for y in lists])
    mask = torch.tensor([[t < len(y) for t in range(width)] for y in lists])
    texts = tokenizer.batch_decode(lists, skip_special_tokens=True)
    per_func, rewards = score(
        reward_funcs, config.reward_weights, rows, texts, lists, config.reward_timeout
    )
    return Rollout(
        rows, ids.to(device), mask.to(device), texts, torch.zeros(len(rows), dtype=torch.bool),
        rewards, per_func,
    )


def rollout_metrics(rollout, advantages, mask, num_generations):
    """What one rollout shows before the update; mask: (B, T) of the tokens that may be trained.

    num_generations 1 means references: what they score is no achievement of the model.
    """
    active = (mask & (advantages != 0)[:, None]).sum()
    metrics = {
        "reward" if num_generations > 1 else "reference_reward": rollout.rewards.mean().item(),
        "completions/mean_length": rollout.mask.sum(1).double().mean().item(),
        "completions/clipped_ratio": rollout.truncated.double().mean().item(),
        "rlsd/active_token_frac": (active / mask.sum().clamp(min=1)).item(),
    }
    if num_generations > 1:
        groups = rollout.rewards.view(-1, num_generations)
        equal = (groups == groups[:, :1]).all(1)
        metrics["reward_std"] = groups.std(1).mean().item()
        metrics["frac_reward_zero_std"] = equal.double().mean().item()
    return metrics


def token_texts(tokenizer, ids):
    """Text of each token, so that the pieces joined read like the completion.

    A character that spans several tokens belongs to the last of them, the others are empty.
    """
    pieces, start, shown = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, text = tokenizer.decode(ids[start:shown]), tokenizer.decode(ids[start:end])
        if text.endswith("\ufffd") and end < len(ids):
            pieces.append("")
        else:
            pieces.append(text[len(before) :])
            start, shown = shown, end
    return pieces
