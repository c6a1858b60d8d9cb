"""Group rollouts: completions drawn by a sampler, decoded and scored by the reward functions."""

from typing import NamedTuple

import torch

from ..tasks.rewards import score
from .samplers import Samples, generate, widen


class Rollout(NamedTuple):
    """B completions; completion_ids and mask are (B, T), mask covers the first EOS and no more."""

    rows: list
    completion_ids: torch.Tensor
    mask: torch.Tensor
    texts: list
    truncated: torch.Tensor  # (B,) bool: no EOS within max_completion_length
    rewards: torch.Tensor  # (B,) fp64, weighted sum over reward functions
    rewards_per_func: torch.Tensor  # (B, F) fp64, NaN where a function returned None
    sampling_log_probs: torch.Tensor | None = None  # of Samples


def roll_out(
    model, tokenizer, rows, config, reward_funcs, processes, *, greedy=False, sample=generate
):
    """Sample and score one completion per row (repeat a row to get a group).

    Each process samples and scores its share of the rows, and all hold the whole result.
    sample: what choose_sampler returned.
    """
    def of_share():
        mine = processes.share(rows)
        if processes.rank:  # a stream of its own, far from those of other steps, below 2^32
            torch.manual_seed(torch.initial_seed() + (processes.rank << 40))
        drawn = sample(
            model, tokenizer, [row["prompt_ids"] for row in mine], config, greedy=greedy,
            images=[row.get("_images") for row in mine],
        )
        drawn = Samples(*(x if x is None else x.cpu() for x in drawn))
        lists = [
            ids[keep].tolist() for ids, keep in zip(drawn.completion_ids, drawn.mask, strict=True)
        ]
        texts = tokenizer.batch_decode(lists, skip_special_tokens=True)
        per_func, rewards = score(
            reward_funcs, config.reward_weights, mine, texts, lists, config.reward_timeout
        )
        return drawn, texts, rewards, per_func

    device = model.get_input_embeddings().weight.device
    with processes.gathered(model):
        shares = processes.everywhere(of_share)
    drawn, texts, rewards, per_func = zip(*shares, strict=True)
    width, count = max(part.completion_ids.shape[1] for part in drawn), len(rows)

    def joined(name, value):
        parts = [getattr(part, name) for part in drawn]
        if parts[0] is None:
            return None
        return torch.cat([widen(part, width, value) for part in parts])[:count].to(device)

    return Rollout(
        rows, joined("completion_ids", tokenizer.pad_token_id), joined("mask", False),
        sum(texts, [])[:count],
        torch.cat([part.truncated for part in drawn])[:count].to(device),
        torch.cat(rewards)[:count], torch.cat(per_func)[:count], joined("log_probs", 0.0),
    )


def loss_mask(rollout, config):
    """(B, T) bool: the tokens that the loss may see."""
    if not config.mask_truncated_completions:
        return rollout.mask
    return rollout.mask & ~rollout.truncated[:, None]


def references(rows, tokenizer, config, reward_funcs, device, processes):
    """The rows' reference solutions as a Rollout, for supervised steps; scored like samples."""
    lists = [row["_reference_ids"] for row in rows]
    width = max(map(len, lists))
    ids = torch.tensor([y + [tokenizer.pad_token_id] * (width - len(y)) for y in lists])
    mask = torch.tensor([[t < len(y) for t in range(width)] for y in lists])
    texts = tokenizer.batch_decode(lists, skip_special_tokens=True)
    per_func, rewards = processes.once(lambda: score(
        reward_funcs, config.reward_weights, rows, texts, lists, config.reward_timeout
    ))
    return Rollout(
        rows, ids.to(device), mask.to(device), texts,
        torch.zeros(len(rows), dtype=torch.bool, device=device), rewards, per_func, None,
    )


def rollout_metrics(rollout, advantages, num_generations, config):
    """What one rollout shows before the update.

    num_generations 1 means references: what they score is no achievement of the model.
    """
    mask = loss_mask(rollout, config)
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
