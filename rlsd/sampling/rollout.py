"""Group rollouts: completions drawn by a sampler, decoded and scored by the reward functions."""

from typing import NamedTuple

import torch

from ..policy.hints import can_hint, hinted_ids
from ..tasks import rewards as judging
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
    tool_mask: torch.Tensor | None = None  # (B, T) bool: what the model wrote; None: all
    messages: list | None = None  # of an agent's completions
    calls: torch.Tensor | None = None  # (B, 2) calls of tools, those that failed; None: not known


def roll_out(
    model, tokenizer, rows, config, reward_funcs, processes, *, greedy=False, sample=generate,
    agent=None, hindsight=False,
):
    """Sample and score one completion per row (repeat a row to get a group).

    Each process samples and scores its share of the rows, and all hold the whole result.
    sample: what choose_sampler returned. agent: what plays turns with tools (agents.agent_of).
    hindsight: rows get the hints of hint_func, as in training.
    """
    changed = agent is not None or hindsight and bool(config.hint_func)

    def of_share():
        mine = processes.share(rows)
        if processes.rank:  # a stream of its own, far from those of other steps, below 2^32
            torch.manual_seed(torch.initial_seed() + (processes.rank << 40))
        if agent is None:
            return of_texts(mine)
        with agent.episodes(mine) as episodes:
            played = agent.play(
                episodes, sample, model, tokenizer, mine, config, greedy=greedy,
                need_hint=hindsight and config.reads_hints(),
            )
            return judged(
                played.rows, played.samples, played.texts, played.messages, played, episodes
            )

    def of_texts(mine):
        drawn = sample(
            model, tokenizer, [row["prompt_ids"] for row in mine], config, greedy=greedy,
            images=[row.get("_images") for row in mine],
        )
        drawn = Samples(*(x if x is None else x.cpu() for x in drawn))
        texts = tokenizer.batch_decode(_lists(drawn), skip_special_tokens=True)
        return judged(mine, drawn, texts, texts)

    def judged(mine, drawn, texts, completions, played=None, episodes=()):
        asked, environments = mine, [e.environment for e in episodes]
        if not any(e is not None for e in environments):
            environments = None
        if played:
            asked = [row | more for row, more in zip(mine, played.extra, strict=True)]
        per_func, rewards = judging.score(
            reward_funcs, config.reward_weights, asked, completions, _lists(drawn),
            config.reward_timeout, environments,
        )
        if hindsight and config.hint_func:
            feedback = [e.feedback for e in episodes] or [None] * len(mine)
            if played and played.feedback:
                feedback = played.feedback
            hints = judging.hindsight(
                config.hint_func, asked, completions, feedback, config.reward_timeout
            )
            mine = [_hinted(row, hint, model, tokenizer, config)
                    for row, hint in zip(mine, hints, strict=True)]
        if played:  # to the other processes goes what they need
            played = played._replace(rows=None, samples=None, texts=None, extra=None, feedback=None)
        return mine if changed else [], drawn, texts, rewards, per_func, played

    device = model.get_input_embeddings().weight.device
    with processes.gathered(model):
        shares = processes.everywhere(of_share)
    lists, drawn, texts, rewards, per_func, played = zip(*shares, strict=True)
    width, count = max(part.completion_ids.shape[1] for part in drawn), len(rows)

    def joined(parts, value):
        if parts[0] is None:
            return None
        return torch.cat([widen(part, width, value) for part in parts])[:count].to(device)

    of_agent = {}
    if agent is not None:
        of_agent = {
            "tool_mask": joined([part.tool_mask for part in played], False),
            "messages": sum((part.messages for part in played), [])[:count],
            "calls": None if agent.rollout_func else
            torch.cat([part.calls for part in played])[:count],
        }
    return Rollout(
        sum(lists, [])[:count] if changed else rows,
        joined([part.completion_ids for part in drawn], tokenizer.pad_token_id),
        joined([part.mask for part in drawn], False), sum(texts, [])[:count],
        torch.cat([part.truncated for part in drawn])[:count].to(device),
        torch.cat(rewards)[:count], torch.cat(per_func)[:count],
        joined([part.log_probs for part in drawn], 0.0), **of_agent,
    )


def _lists(drawn):
    """Token lists of Samples."""
    return [ids[keep].tolist() for ids, keep in zip(drawn.completion_ids, drawn.mask, strict=True)]


def _hinted(row, hint, model, tokenizer, config):
    """The row with the teacher's prompt that hint_func's text makes, None where it cannot."""
    ids = None
    if hint is not None and can_hint(hint, tokenizer):
        ids = hinted_ids(row, hint, tokenizer, config)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if ids is not None and most is not None and len(ids) + config.max_completion_length > most:
        ids = None
    return {**row, "privileged_context": hint or "", "teacher_prompt": None,
            "teacher_prompt_ids": ids}


def loss_mask(rollout, config):
    """(B, T) bool: the tokens that the loss may see."""
    mask = written(rollout)
    if not config.mask_truncated_completions:
        return mask
    return mask & ~rollout.truncated[:, None]


def written(rollout):
    """(B, T) bool: the tokens of the model, not of tools."""
    return rollout.mask if rollout.tool_mask is None else rollout.mask & rollout.tool_mask


def references(rows, tokenizer, config, reward_funcs, device, processes):
    """The rows' reference solutions as a Rollout, for supervised steps; scored like samples."""
    lists = [row["_reference_ids"] for row in rows]
    width = max(map(len, lists))
    ids = torch.tensor([y + [tokenizer.pad_token_id] * (width - len(y)) for y in lists])
    mask = torch.tensor([[t < len(y) for t in range(width)] for y in lists])
    texts = tokenizer.batch_decode(lists, skip_special_tokens=True)
    per_func, rewards = processes.once(lambda: judging.score(
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
        "completions/mean_length": written(rollout).sum(1).double().mean().item(),
        "completions/clipped_ratio": rollout.truncated.double().mean().item(),
        "rlsd/active_token_frac": (active / mask.sum().clamp(min=1)).item(),
    }
    if num_generations > 1:
        groups = rollout.rewards.view(-1, num_generations)
        equal = (groups == groups[:, :1]).all(1)
        metrics["reward_std"] = groups.std(1).mean().item()
        metrics["frac_reward_zero_std"] = equal.double().mean().item()
    if rollout.calls is not None:
        called, failed = rollout.calls.sum(0).tolist()
        metrics["tools/call_frequency"] = called / len(rollout.rows)
        metrics["tools/failure_frequency"] = failed / called if called else 0.0
    if config.hint_func:
        without = [not row["teacher_prompt_ids"] for row in rollout.rows]
        metrics["rlsd/hint_missing_frac"] = sum(without) / len(without)
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
