"""A sampler that is not quite the trained policy: the trainer's correction, and what it logs."""

import copy
import math

import pytest
import torch
from runs import (
    assert_same,
    make_trainer,
    naive_log_probs,
    naive_run,
    parameters,
    quick,  # noqa: F401
    relative_distance,
)

import rlsd.trainer
from rlsd.sampling.samplers import generate

NOISE = 1e-3  # as in test_trainer.py
TRUNCATED = {
    "vllm_importance_sampling_correction": True, "vllm_importance_sampling_clip_max": 1.1,
}


def off_by_noise(*args, **kwargs):
    """generate, with log-probs moved at random, one of them lost."""
    got = generate(*args, **kwargs)
    noise = 0.3 * torch.randn(got.log_probs.shape, generator=torch.Generator().manual_seed(0))
    moved = torch.where(got.mask, got.log_probs + noise, 0.0)
    moved[1, 0] = float("nan")
    return got._replace(log_probs=moved)


def run(folder, monkeypatch, sampler, **changed):
    """(trainer, its first model, its rollouts, parameters after each update, metrics)."""
    rollouts, after, metrics, real = [], [], [], rlsd.trainer.roll_out

    def recorded(*args, **kwargs):
        rollouts.append(real(*args, **kwargs))
        return rollouts[-1]

    with monkeypatch.context() as patch:
        patch.setattr(rlsd.trainer, "roll_out", recorded)
        trainer = make_trainer(folder, **changed)
        trainer.sample, start = sampler, copy.deepcopy(trainer.model)
        trainer.optimizer.register_step_post_hook(
            lambda *_: after.append(parameters(trainer.model))
        )
        for step in (1, 2):
            metrics.append(trainer.train_step(step)[0])
    return trainer, start, rollouts, after, metrics


@pytest.mark.parametrize("changed", [
    {}, {"per_device_train_batch_size": 3, "beta": 0.3},
    {"num_iterations": 2, "epsilon": 0.05, "max_tokens_per_micro_batch": 50, "padding_free": True},
    {"loss_type": "dr_grpo", "temperature": 0.7, "objective": "grpo"},
], ids=["rlsd", "micro-batches-beta", "iterations-2-packed", "grpo-temperature"])
def test_truncated_importance_sampling_equals_a_naive_loop(changed, tmp_path, monkeypatch):
    trainer, start, rollouts, got, metrics = run(
        tmp_path, monkeypatch, off_by_noise, **TRUNCATED, **changed
    )
    first, config = parameters(start), trainer.config
    ratios, apart, rollout = [], [], rollouts[0]
    groups = rollout.rewards.view(-1, 4)
    live = (groups != groups.mean(1, keepdim=True)).flatten() | (config.beta > 0)
    for i in live.nonzero().flatten().tolist():
        y = rollout.completion_ids[i][rollout.mask[i]].tolist()
        drawn = rollout.sampling_log_probs[i][rollout.mask[i]].tolist()
        with torch.no_grad():
            lp = naive_log_probs(start, rollout.rows[i]["prompt_ids"], y, config).tolist()
        known = [d == d for d in drawn]
        apart += [abs(a - d) for a, d, k in zip(lp, drawn, known, strict=True) if k]
        ratios += [min(math.exp(a - d), 1.1) if k else 1.0
                   for a, d, k in zip(lp, drawn, known, strict=True)]
    want = naive_run(trainer, start, rollouts)
    assert len(got) == len(want) == 2 * config.num_iterations
    for ours, naive in zip(got, want, strict=True):
        assert relative_distance(ours, naive, first) < NOISE
    name = "sampling/importance_sampling_ratio"
    want = {
        "sampling/sampling_logp_difference/mean": sum(apart) / len(apart),
        "sampling/sampling_logp_difference/max": max(apart),
        f"{name}/min": min(ratios), f"{name}/max": 1.1,
        f"{name}/mean": sum(ratios) / len(ratios),
    }
    assert {k: metrics[0][k] for k in want} == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("filters", [
    {"top_p": 0.7}, {"top_k": 3, "temperature": 1.3, "num_iterations": 2},
    {"min_p": 0.3, "per_device_train_batch_size": 3}, {"repetition_penalty": 1.4, "beta": 0.3},
], ids=["top_p", "top_k", "min_p", "repetition_penalty"])
def test_filtered_rollouts_are_weighed_by_the_policy_over_what_they_were_drawn_from(
    filters, tmp_path, monkeypatch
):
    trainer, start, rollouts, got, metrics = run(tmp_path, monkeypatch, generate, **filters)
    first = parameters(start)
    want = naive_run(trainer, start, rollouts)
    assert len(got) == len(want) == 2 * trainer.config.num_iterations
    for ours, naive in zip(got, want, strict=True):
        assert relative_distance(ours, naive, first) < NOISE
    ratio = {k: metrics[0][f"sampling/importance_sampling_ratio/{k}"] for k in ("min", "max")}
    if "repetition_penalty" in filters:
        assert ratio["min"] < 0.9 and 1.1 < ratio["max"] <= 3
    else:  # the share of probability that the filters kept
        assert 0 < ratio["min"] < 0.95 and ratio["max"] < 1 + 1e-5
    plain = run(
        tmp_path, monkeypatch, generate, vllm_importance_sampling_correction=False, **filters
    )
    assert relative_distance(plain[3][-1], got[-1], first) > 10 * NOISE
    name = "sampling/sampling_logp_difference/mean"
    assert plain[4][0][name] == metrics[0][name] > 0.02
    assert not any("ratio" in k for k in plain[4][0] if k.startswith("sampling/"))


def test_without_the_correction_only_the_metrics_tell(tmp_path, monkeypatch):
    exact = run(tmp_path, monkeypatch, generate)
    noisy = run(tmp_path, monkeypatch, off_by_noise)
    assert_same(noisy[3][-1], exact[3][-1])
    mean = "sampling/sampling_logp_difference/mean"
    assert exact[4][0][mean] < 1e-6 < 0.2 < noisy[4][0][mean] < 0.3  # 0.3 sqrt(2 / pi) = 0.24
    assert not any("ratio" in k for k in noisy[4][0] if k.startswith("sampling/"))
    corrected = run(tmp_path, monkeypatch, off_by_noise, **TRUNCATED)
    start = parameters(exact[1])
    assert relative_distance(corrected[3][-1], exact[3][-1], start) > 10 * NOISE
    # An exact sampler has ratio 1, so that nothing is corrected.
    same = run(tmp_path, monkeypatch, generate, **TRUNCATED)
    assert relative_distance(same[3][-1], exact[3][-1], start) < NOISE


def test_a_training_run_samples_by_continuous_batching(tmp_path, monkeypatch):
    """One optimizer step from the samples of the other engine is the naive loop's."""
    trainer = make_trainer(
        tmp_path, use_transformers_continuous_batching=True, eval_steps=1, max_steps=1,
        transformers_continuous_batching_config={"num_blocks": 64, "max_batch_tokens": 512},
        vllm_importance_sampling_correction=True,
    )
    assert trainer.sample.__name__ == "generate_batch"
    records = trainer.train()
    difference = records[-1]["sampling/sampling_logp_difference/max"]
    assert 0 < difference < 1e-4
    assert records[-1]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-5)
    assert {"eval/pass@1_greedy", "eval/pass@1_sampled"} <= records[-1].keys()
