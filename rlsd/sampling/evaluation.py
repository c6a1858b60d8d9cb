"""Held-out pass@1 and pass@k with 95 % intervals that count questions, not samples.

pass@k of a question with c of n samples right is 1 - C(n - c, k) / C(n, k), the unbiased estimate
(Chen et al. 2021, arXiv 2107.03374, equation 1), and the metric is its mean over questions.
Samples of one question are alike, so the interval takes its spread between questions (clustering,
Miller 2024, arXiv 2411.00640): Wilson's, with the number of independent trials that would spread as
much (as for surveys, Franco et al. 2019). It stays inside [0, 1] and has a width at 0 and 1.
"""

import math
from pathlib import Path

import torch

from ..config import UserError, make_config
from ..options import load_yaml
from ..tasks.data import question, split_data
from .leak import leak_metrics
from .rollout import roll_out, written
from .samplers import generate

Z = 1.959964  # of a two-sided 95 % interval


def pass_at_k(n, c, k):
    """1 - C(n - c, k) / C(n, k): chance that k of n samples, c of them right, hold a right one."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def interval(values, samples=1):
    """(low, high) of the mean of per-question values in [0, 1], each from so many samples.

    With one sample per question this is Wilson's interval. Equal questions show no spread; they
    count as at most all samples, and as mere questions where all are 0 or all are 1.
    """
    count = len(values)
    mean = sum(values) / count
    spread = sum((v - mean) ** 2 for v in values) / count
    trials = count
    if 0 < mean < 1:
        most = count * samples
        trials = most if spread == 0 else min(most, count * mean * (1 - mean) / spread)
    centre = mean + Z * Z / (2 * trials)
    half = Z * math.sqrt(mean * (1 - mean) / trials + Z * Z / (4 * trials * trials))
    scale = 1 + Z * Z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def ks_of(n):
    """1, 2, 4, .. below n, and n."""
    return sorted({*(2**i for i in range(n.bit_length()) if 2**i < n), n})


def is_right(rewards_per_func, size):
    """(B,) bool: full marks, 1, of the first function that scores a question's `size` completions.

    rewards_per_func: (B, F), NaN where a function says None. A completion that this function does
    not score beside others of its question is wrong.
    """
    by_question = rewards_per_func.view(-1, size, rewards_per_func.shape[1])
    judge = (~by_question.isnan()).any(1).int().argmax(1)
    return (by_question[torch.arange(len(judge)), :, judge] >= 1).flatten()


def evaluate(
    model, tokenizer, rows, config, reward_funcs, seed, processes, sample=generate, agent=None
):
    """Held-out metrics, greedy and sampled: the share of right answers, see is_right.

    Samples num_generations_eval completions per question. Every eval/pass@* has its interval in
    eval/pass@*_low and eval/pass@*_high. sample: what choose_sampler returned. agent: of
    agents.agent_of; its rollout_func knows no greedy sampling, so that there is none then.
    The random state of training is left as it was.
    """
    metrics = {}
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        for name, greedy in (("greedy", True), ("sampled", False)):
            if greedy and config.rollout_func:
                continue
            n = 1 if greedy else config.num_generations_eval
            out = roll_out(
                model, tokenizer, [row for row in rows for _ in range(n)], config, reward_funcs,
                processes, greedy=greedy, sample=sample, agent=agent,
            )
            right = is_right(out.rewards_per_func, n).view(len(rows), n).sum(1).tolist()
            for k in ks_of(n):
                values = [pass_at_k(n, c, k) for c in right]
                metric = f"eval/pass@{k}_{name}"
                metrics[metric] = sum(values) / len(values)
                metrics[f"{metric}_low"], metrics[f"{metric}_high"] = interval(values, n)
            metrics[f"eval/reward_{name}"] = out.rewards.mean().item()
            metrics |= leak_metrics(out, config, f"eval/leak_rate_{name}")
    metrics["eval/completion_length"] = written(out).sum(1).double().mean().item()
    return metrics


def summary(metrics):
    """(name, text) of each eval/ metric, a pass@k with its interval: 0.5000  [0.4038, 0.5962]."""
    lines = []
    for name, value in metrics.items():
        if not name.startswith("eval/") or value is None or name.endswith(("_low", "_high")):
            continue
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        text = f"{value:.4f}" if low is None else f"{value:.4f}  [{low:.4f}, {high:.4f}]"
        lines.append((name.removeprefix("eval/"), text))
    return lines


def trained_on(run_dir, config):
    """Questions that a run trained on and that config, unlike it, may hold out."""
    was = make_config(load_yaml(Path(run_dir) / "config.yaml"))
    names = "train_dataset", "eval_dataset", "dataset_size", "eval_size", "eval_split_size"
    drawn = [[c.data_seed(), *(getattr(c, name) for name in names)] for c in (was, config)]
    if drawn[0] == drawn[1]:
        return set()
    try:
        rows, _ = split_data(was)
    except UserError as error:
        print(f"Held-out questions that {run_dir} trained on cannot be left out: {error}")
        return set()
    return {question(row, bool(config.environment_factory)) for row in rows}


def require_held_out(run_dir, config):
    """A resumed run must not evaluate on what it has trained on before."""
    if not (trained := trained_on(run_dir, config)):
        return
    asked = [question(row, bool(config.environment_factory)) for row in split_data(config)[1]]
    if known := sum(q in trained for q in asked):
        raise UserError(
            f"{known} of {len(asked)} questions that would be held out are among those that "
            f"{run_dir} has trained on; resume it with its own eval_size, eval_split_size and "
            "dataset_seed, or name an eval_dataset."
        )
