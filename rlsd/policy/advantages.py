"""Group-relative advantages, the lambda schedule, and what a contrast of hints makes of them.

The contrast, section 7 of the method, needs teacher passes alone, no student:

    e_t    = log P_T(y_t | x, y_c, y_<t) - log(1/K sum_k P_T(y_t | x, y_w,k, y_<t))
    rlsd:    A_hat_t = A ((1 - lambda) + lambda clip(exp(sign(A) e_t), 1 - eps_w, 1 + eps_w))
    rlcsd:   r_t     = clip(beta_r lambda tanh(e_t / tau), -c, c), selected where |r_t| > d
             A_hat_t = A + r_t where selected, A elsewhere, never across 0
             a_t     = those of the unselected tokens, plus eta times those of the selected ones

Source: RLCSD, arXiv 2606.11709, equations 7 to 15.
"""

import torch

from rlsd_kernels import aggregation_weights, rlsd_advantages

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


def contrast(correct_log_probs, wrong_log_probs, present=None):
    """e_t of each token: by how much a correct hint makes it likelier than wrong ones do.

    Equals `correct_log_probs - wrong_log_probs.exp().mean(0).log()`, without underflow.

    Args:
        correct_log_probs: (...) of the tokens after the correct hint, in nats, by the teacher.
        wrong_log_probs: (K, ...), the same tokens after each wrong hint.
        present: bool that broadcasts to (K, ...): which wrong hints there are; default: all. What
            stands in the place of an absent one is never read.
    Returns: (...), detached; 0 where no wrong hint is present, or both sides are log 0.
    """
    correct, wrong = correct_log_probs.detach(), wrong_log_probs.detach()
    present = torch.ones_like(wrong, dtype=torch.bool) if present is None else present
    present = present.expand_as(wrong)
    count = present.sum(0).to(wrong.dtype)
    mean = torch.where(present, wrong, -torch.inf).logsumexp(0) - count.clamp(min=1).log()
    return torch.where((count == 0) | (correct == mean), 0.0, correct - mean)


def contrast_advantages(
    advantages, evidence, *, rlsd_lambda=0.5, rlsd_reweight_clip_range=0.2,
    rlsd_negative_only=False, reweight_mask=None,
):
    """A_hat of rlsd with e_t in place of delta_t: rlsd_kernels.rlsd_advantages, no student in it.

    Args: advantages (...), or (B,) for (B, T); evidence (...), contrast's; the others as there.
    Returns: (...) in fp32 (fp64 if evidence is), detached, exactly A outside of reweight_mask.
    """
    return rlsd_advantages(
        advantages, torch.zeros_like(evidence), evidence, rlsd_lambda=rlsd_lambda,
        rlsd_reweight_clip_range=rlsd_reweight_clip_range, rlsd_negative_only=rlsd_negative_only,
        reweight_mask=reweight_mask,
    )


def rlcsd_advantages(
    advantages, evidence, *, rlsd_lambda=0.5, rlcsd_beta=1.0, rlcsd_tau=0.02, rlcsd_clip=2.0,
    rlcsd_threshold=0.02, rlsd_negative_only=False, reweight_mask=None,
):
    """(A_hat, selected) of rlcsd: what is added to A is bounded, and stops at 0.

    Args:
        advantages: (...), or (B,) for (B, T); 0 stays 0.
        evidence: (...), contrast's.
        rlsd_lambda, rlcsd_beta, rlcsd_tau, rlcsd_clip, rlcsd_threshold: lambda, beta_r, tau, c, d.
        rlsd_negative_only, reweight_mask: which tokens may be selected, as in rlsd.
    Returns: (...) in evidence's dtype, and (...) bool; both detached.
    """
    if advantages.dim() < evidence.dim():
        advantages = advantages[..., None]
    a = advantages.detach().to(evidence.dtype).expand_as(evidence)
    added = rlcsd_beta * rlsd_lambda * torch.tanh(evidence.detach() / rlcsd_tau)
    added = added.clamp(-rlcsd_clip, rlcsd_clip)
    chosen = a < 0 if rlsd_negative_only else a != 0
    if reweight_mask is not None:
        chosen = chosen & reweight_mask
    selected = chosen & ~(added.abs() <= rlcsd_threshold)  # NaN must show
    moved = a + added
    moved = torch.where(a > 0, moved.clamp(min=0), moved.clamp(max=0))
    return torch.where(selected, moved, a), selected


def rlcsd_loss_weights(
    mask, selected, rlcsd_eta=1.0, loss_type="dapo", *, max_completion_length=None
):
    """a_t of rlcsd: unselected and selected tokens are aggregated apart, the latter times eta.

    Args: mask, selected (B, T) bool of the whole batch; loss_type, max_completion_length as in
        rlsd_kernels.aggregation_weights.
    Returns: (B, T) fp32; with nothing selected aggregation_weights(mask).
    """
    kept, chosen = (
        aggregation_weights(part, loss_type, max_completion_length=max_completion_length)
        for part in (mask & ~selected, mask & selected)
    )
    return kept + rlcsd_eta * chosen
