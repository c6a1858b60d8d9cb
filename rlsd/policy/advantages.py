"""Group-relative advantages and the lambda schedule: the scalars above the token level."""

import torch

from ..config import SCALE_REWARDS, UserError

EPS = 1e-6


def group_advantages(rewards, num_generations, scale_rewards="group"):
    """A = (R - mean_group) / (std + eps), exactly 0 for a group whose rewards are all equal.

    Args:
        rewards: (B,) float; groups of num_generations lie contiguously, B a multiple of it.
        num_generations: completions per question, at least 2.
        scale_rewards: group (unbiased std of the group), batch (of all rewards), none.
    Returns: (B,) float32. Computed in fp64: in fp32 eight rewards of 0.9 give -0.056, not 0.
    Raises: UserError on a bad shape or option; source: GRPO, arXiv 2402.03300.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    if rewards.dim() != 1 or num_generations < 2 or len(rewards) % num_generations:
        raise UserError(
            f"rewards must have shape (B,) with B a multiple of num_generations >= 2, but got "
            f"{tuple(rewards.shape)} and num_generations={num_generations}."
        )
    if scale_rewards not in SCALE_REWARDS:
        raise UserError(
            f"scale_rewards must be one of {', '.join(SCALE_REWARDS)}, but got {scale_rewards!r}."
        )
    if not torch.isfinite(rewards).all():
        row = int((~torch.isfinite(rewards)).nonzero()[0])
        raise UserError(f"The reward of completion {row} is {rewards[row].item()}, not finite.")
    groups = rewards.view(-1, num_generations)
    centred = groups - groups.mean(1, keepdim=True)
    if scale_rewards == "group":
        centred = centred / (groups.std(1, keepdim=True) + EPS)
    elif scale_rewards == "batch":
        centred = centred / (rewards.std() + EPS)
    constant = (groups == groups[:, :1]).all(1, keepdim=True)
    return torch.where(constant, 0.0, centred).view(-1).float()


def rlsd_lambda_at(step, rlsd_lambda, warmup_steps, decay_steps):
    """lambda at 1-based rollout step s: L s/W for s < W, then L max(1 - (s - W)/D, 0); D = 0: L."""
    if step < 1:
        raise UserError(f"step is 1-based, but got {step}.")
    if step < warmup_steps:
        return rlsd_lambda * step / warmup_steps
    if decay_steps > 0:
        return rlsd_lambda * max(1 - (step - warmup_steps) / decay_steps, 0.0)
    return rlsd_lambda


def lambda_of(config, step):
    """Lambda of a run (TrainConfig) at 1-based rollout step `step`; 0 where nothing is weighed."""
    return rlsd_lambda_at(
        step, config.loss_config().rlsd_lambda, config.rlsd_lambda_warmup_steps,
        config.rlsd_lambda_decay_steps,
    )
