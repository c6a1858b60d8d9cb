"""Every metric against a loop over tokens, and merging against the undivided batch."""

import math

import pytest
import torch
from problems import make_problem

from rlsd_kernels import RLSDLossConfig, fused_linear_rlsd_loss, merge_stats, rlsd_loss

CONFIGS = {
    "default": {},
    "eps1": {"rlsd_reweight_clip_range": 1.0},
    "eps0": {"rlsd_reweight_clip_range": 0.0},
    "old": {"rlsd_delta_source": "old_log_probs"},
    "negative-only": {"rlsd_negative_only": True},
    "tight-clips": {"epsilon": 0.05, "epsilon_high": 0.05, "delta": 1.1},
    "no-dual": {"delta": None},
    "kl": {"beta": 0.1},
}


def tokens(n, dtype=torch.float64):
    lp = -6 * torch.rand(n, dtype=dtype)
    a = torch.randn(n, dtype=dtype)
    a[::4] = 0
    weights = torch.rand(n, dtype=dtype)
    weights[::5] = 0
    return {
        "log_probs": lp, "advantages": a, "loss_weights": weights,
        "teacher_log_probs": lp + 0.3 * torch.randn(n, dtype=dtype),
        "old_log_probs": lp + 0.3 * torch.randn(n, dtype=dtype),
        "ref_log_probs": lp + 0.3 * torch.randn(n, dtype=dtype),
        "entropy": torch.rand(n, dtype=dtype), "reweight_mask": torch.rand(n) < 0.7,
    }


def naive_stats(t, lam, config):
    """method.md section 5, one token at a time."""
    seen = {}

    def add(name, value):
        seen.setdefault(name, []).append(float(value))

    eps_w = config.rlsd_reweight_clip_range
    for i in range(len(t["log_probs"])):
        x = {k: v[i].item() for k, v in t.items()}
        if x["loss_weights"] == 0:
            continue
        a, positive = x["advantages"], x["advantages"] > 0
        add("rlsd/active_token_frac", a != 0)
        add("rlsd/effective_lambda", lam)
        if a == 0:
            continue
        student = x["old_log_probs" if config.rlsd_delta_source == "old_log_probs" else "log_probs"]
        delta, side = x["teacher_log_probs"] - student, "pos" if positive else "neg"
        multiplier = 1.0
        if lam > 0 and x["reweight_mask"] and not (positive and config.rlsd_negative_only):
            signed = delta if positive else -delta
            w = min(max(math.exp(signed), 1 - eps_w), 1 + eps_w)
            multiplier = 1 - lam + lam * w
            add("rlsd/delta_mean", delta)
            add(f"rlsd/delta_mean_{side}", delta)
            add("rlsd/clip_low_frac", math.exp(signed) < 1 - eps_w)
            add("rlsd/clip_high_frac", math.exp(signed) > 1 + eps_w)
        add(f"rlsd/weight_mean_{side}", multiplier)
        ratio = math.exp(x["log_probs"] - x["old_log_probs"])
        add("clip_ratio/low_mean", not positive and ratio < 1 - config.epsilon)
        add("clip_ratio/high_mean", positive and ratio > 1 + config.epsilon_high)
        capped = not positive and config.delta is not None and ratio > config.delta
        add("clip_ratio/dual_mean", capped)
        d = x["ref_log_probs"] - x["log_probs"]
        add("kl", math.exp(d) - d - 1)
        add("entropy", x["entropy"])
        add("policy_kl", x["old_log_probs"] - x["log_probs"])
    result = {name: sum(values) / len(values) for name, values in seen.items()}
    deltas = seen.get("rlsd/delta_mean", [])
    if deltas:
        mean = result["rlsd/delta_mean"]
        result["rlsd/delta_std"] = (sum((d - mean) ** 2 for d in deltas) / len(deltas)) ** 0.5
    return result


SPEC_NAMES = {
    "rlsd/delta_mean", "rlsd/delta_std", "rlsd/delta_mean_pos", "rlsd/delta_mean_neg",
    "rlsd/weight_mean_pos", "rlsd/weight_mean_neg", "rlsd/clip_low_frac", "rlsd/clip_high_frac",
    "rlsd/effective_lambda", "rlsd/active_token_frac", "clip_ratio/low_mean",
    "clip_ratio/high_mean", "clip_ratio/dual_mean", "kl", "entropy", "policy_kl",
}


def stats_of(t, lam, config):
    return rlsd_loss(**t, rlsd_lambda=lam, config=config).stats


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_each_metric_against_a_loop(name, lam):
    config = RLSDLossConfig(**CONFIGS[name])
    t = tokens(203)
    got, expected = stats_of(t, lam, config), naive_stats(t, lam, config)
    assert set(got) >= SPEC_NAMES
    for metric in sorted(SPEC_NAMES):
        value = expected.get(metric, math.nan)
        assert got[metric].item() == pytest.approx(value, abs=1e-12, nan_ok=True), metric
    if lam and name == "default":
        assert SPEC_NAMES == set(expected)
        assert {k for k, v in expected.items() if v == 0} <= {"clip_ratio/dual_mean"}


def test_counts():
    t = tokens(203)
    stats = stats_of(t, 0.5, RLSDLossConfig())
    live, a = t["loss_weights"] != 0, t["advantages"]
    chosen = live & (a != 0) & t["reweight_mask"]
    expected = {
        "unmasked": live, "active": live & (a != 0), "active_pos": live & (a > 0),
        "active_neg": live & (a < 0), "reweighted": chosen, "reweighted_pos": chosen & (a > 0),
        "reweighted_neg": chosen & (a < 0),
    }
    assert {k: v.item() for k, v in stats.items() if k.startswith("tokens/")} == {
        f"tokens/{k}": int(v.sum()) for k, v in expected.items()
    }


def test_tokens_without_advantage_dilute_nothing():
    # Trap 11: clipped tokens with A = 0, and masked ones, must leave every metric as it is.
    config, t = RLSDLossConfig(), tokens(60)
    before = stats_of(t, 0.5, config)
    extra = {k: v.clone() for k, v in t.items()}
    extra["old_log_probs"] += 5
    extra["teacher_log_probs"] += 5
    extra["advantages"][:] = 0
    after = stats_of({k: torch.cat([v, extra[k]]) for k, v in t.items()}, 0.5, config)
    for name in SPEC_NAMES - {"rlsd/active_token_frac"}:
        assert after[name].item() == pytest.approx(before[name].item(), abs=1e-12), name
    assert after["rlsd/active_token_frac"] < before["rlsd/active_token_frac"]


@pytest.mark.parametrize("sizes", [[203], [1] * 203, [3, 100, 0, 100], [101, 102]],
                         ids=lambda s: f"{len(s)}-parts")
@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_merging_micro_batches_equals_the_whole_batch(lam, sizes):
    config, t = RLSDLossConfig(beta=0.1), tokens(203)
    whole = stats_of(t, lam, config)
    split = [
        dict(zip(t, parts, strict=True))
        for parts in zip(*(v.split(sizes) for v in t.values()), strict=True)
    ]
    merged = merge_stats([stats_of(s, lam, config) for s in split])
    assert merged.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(
            merged[name].double(), value.double(), rtol=1e-10, atol=1e-12, equal_nan=True
        )
    assert not math.isnan(merged["policy_kl"])


def test_merging_is_a_fold():
    config = RLSDLossConfig()
    parts = [stats_of(tokens(n), 0.5, config) for n in (7, 20, 33)]
    at_once, folded = merge_stats(parts), merge_stats([merge_stats(parts[:2]), parts[2]])
    for name, value in at_once.items():
        torch.testing.assert_close(folded[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", ["empty", "masked", "no-advantage", "only-positive", "grpo"])
def test_nan_where_there_is_no_token(case):
    t, lam = tokens(0 if case == "empty" else 20), 0.5
    if case == "masked":
        t["loss_weights"][:] = 0
    elif case == "no-advantage":
        t["advantages"][:] = 0
    elif case == "only-positive":
        t["advantages"] = t["advantages"].abs()
    elif case == "grpo":
        t["teacher_log_probs"], lam = None, 0.0
    stats = stats_of(t, lam, RLSDLossConfig())
    nan = {k for k, v in stats.items() if math.isnan(v)}
    unmasked = {"rlsd/effective_lambda", "rlsd/active_token_frac"}
    deltas = {f"rlsd/delta_{x}" for x in ("mean", "std", "mean_pos", "mean_neg")}
    expected = {
        "empty": SPEC_NAMES, "masked": SPEC_NAMES, "no-advantage": SPEC_NAMES - unmasked,
        "only-positive": {"rlsd/delta_mean_neg", "rlsd/weight_mean_neg"},
        "grpo": deltas | {"rlsd/clip_low_frac", "rlsd/clip_high_frac"},
    }
    assert nan == expected[case]
    if case == "no-advantage":
        assert stats["rlsd/active_token_frac"] == 0 and stats["rlsd/effective_lambda"] == 0.5
    if case == "grpo":
        assert stats["rlsd/weight_mean_pos"] == 1 and stats["rlsd/effective_lambda"] == 0


def test_kl_and_entropy_are_reported_only_when_given():
    t = tokens(20)
    t["ref_log_probs"] = t["entropy"] = None
    assert SPEC_NAMES - set(stats_of(t, 0.5, RLSDLossConfig())) == {"kl", "entropy"}


def test_infinite_deltas_are_counted_as_clipped():
    lp = torch.full((4,), -1.0)
    inf = math.inf
    stats = rlsd_loss(
        lp, torch.tensor([1.0, 1.0, -1.0, -1.0]), rlsd_lambda=1.0,
        teacher_log_probs=torch.tensor([inf, -inf, inf, -inf]),
    ).stats
    assert stats["rlsd/clip_low_frac"] == stats["rlsd/clip_high_frac"] == 0.5
    assert stats["rlsd/weight_mean_pos"] == stats["rlsd/weight_mean_neg"] == 1


@pytest.mark.parametrize("impl", ["torch", "ref"])
def test_metrics_of_the_fused_loss(impl):
    p = make_problem(67, 51, 8, torch.float64)
    config = RLSDLossConfig()
    out = fused_linear_rlsd_loss(**p, impl=impl, return_entropy=True)
    t = {k: p[k] for k in (
        "advantages", "loss_weights", "old_log_probs", "ref_log_probs", "reweight_mask"
    )} | {"log_probs": out.log_probs, "teacher_log_probs": out.teacher_log_probs,
          "entropy": out.entropy}
    expected = naive_stats(t, 0.5, config)
    for metric in sorted(SPEC_NAMES):
        assert out.stats[metric].item() == pytest.approx(expected[metric], abs=1e-10), metric


def test_on_policy_metrics_are_neutral():
    p = make_problem(67, 51, 8)
    del p["old_log_probs"], p["ref_log_probs"]
    p["teacher_hidden"] = p["hidden"]
    stats = fused_linear_rlsd_loss(**p).stats
    for name in ("policy_kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/dual_mean",
                 "rlsd/clip_low_frac", "rlsd/clip_high_frac"):
        assert stats[name] == 0, name
    assert stats["rlsd/weight_mean_pos"].item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("order", [1, -1])
def test_what_some_stats_lack_is_left_out(order):
    p = make_problem(20, 51, 8)
    with_entropy = fused_linear_rlsd_loss(**p, return_entropy=True).stats
    plain = fused_linear_rlsd_loss(**p).stats
    lp = p["old_log_probs"]
    of_log_probs = rlsd_loss(lp, p["advantages"], teacher_log_probs=lp).stats
    assert "entropy" not in merge_stats([with_entropy, plain][::order])
    assert "head/gradient_work" not in merge_stats([plain, of_log_probs][::order])
