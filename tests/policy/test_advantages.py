import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsd import UserError, group_advantages, rlsd_lambda_at

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)
# Steps of 1e-3 keep differences far from the smallest float, where A would round to 0.
REWARDS = st.integers(-2000, 2000).map(lambda k: k * 1e-3)


def naive(rewards, size, scale):
    out = []
    for i in range(0, len(rewards), size):
        group = rewards[i : i + size]
        mean, sd = statistics.fmean(group), 1 - 1e-6
        if scale == "group":
            sd = statistics.stdev(group)
        elif scale == "batch":
            sd = statistics.stdev(rewards)
        out += [0.0 if len(set(group)) == 1 else (r - mean) / (sd + 1e-6) for r in group]
    return out


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("rewards, size", [
    ([1.0, 0.0], 2),
    ([1, 0, 0, 0, 1, 1, 1, 0], 4),
    ([0.3, 0.7, 0.7, 5.0, 5.0, 5.0, -2.0, 1.5, 0.1], 3),
    ([0.0] * 7 + [1.0] + [1.0] * 8, 8),  # the second group is dead
], ids=["G2", "G4", "G3-floats", "G8-dead-group"])
def test_formula_with_unbiased_std(rewards, size, scale):
    got = group_advantages(rewards, size, scale)
    assert got.dtype == torch.float32 and got.shape == (len(rewards),)
    assert got.tolist() == pytest.approx(naive(rewards, size, scale), abs=1e-6)


def test_std_is_the_unbiased_one():
    # biased: +-1; unbiased: +-1/sqrt(2)
    assert group_advantages([1.0, 0.0], 2).tolist() == pytest.approx(
        [math.sqrt(0.5), -math.sqrt(0.5)], abs=1e-5
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.9, 0.1, 1 / 3, 1e8, -0.7, 0.0, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_rewards_give_exactly_zero(value, dtype, scale):
    rewards = torch.full((8,), value, dtype=dtype)
    assert (group_advantages(rewards, 8, scale) == 0).all()


def test_rewards_that_differ_below_fp32_still_rank():
    got = group_advantages(torch.tensor([1.0, 1.0 + 1e-9], dtype=torch.float64), 2)
    assert got.tolist() == pytest.approx([-5e-4, 5e-4], rel=1e-2)


def test_a_dead_group_is_zero_beside_a_live_one():
    got = group_advantages([0.9] * 8 + [0.9] * 7 + [0.1], 8)
    assert (got[:8] == 0).all() and (got[8:15] > 0).all() and got[15] < -2


@PROPERTY
@given(st.floats(-1e12, 1e12), st.integers(2, 9), st.sampled_from(["group", "batch", "none"]))
def test_any_constant_group_is_exactly_zero(value, size, scale):
    assert (group_advantages([value] * size + [0.0] * size, size, scale)[:size] == 0).all()


@PROPERTY
@given(st.lists(REWARDS, min_size=2, max_size=9).filter(lambda r: len(set(r)) > 1))
def test_a_live_group_has_mean_zero_and_keeps_the_order(rewards):
    got = group_advantages(rewards, len(rewards)).double()
    assert abs(got.mean()) < 1e-6 and got.max() > 0 > got.min()
    order = sorted(range(len(rewards)), key=lambda i: rewards[i])
    assert (got[order].diff() >= 0).all()
    assert abs(got.std() - 1) < 0.01  # eps 1e-6 beside a std of at least 3e-4


@PROPERTY
@given(st.lists(REWARDS, min_size=4, max_size=4), st.floats(-10, 10))
def test_a_shift_of_all_rewards_changes_nothing(rewards, shift):
    got = group_advantages([r + shift for r in rewards], 4, "none")
    assert torch.allclose(got, group_advantages(rewards, 4, "none"), atol=1e-6)


@pytest.mark.parametrize("rewards, size, scale, parts", [
    ([1.0, 0.0, 1.0], 2, "group", ["(3,)", "num_generations=2"]),
    ([1.0], 1, "group", ["num_generations=1"]),
    ([[1.0, 0.0]], 2, "group", ["(1, 2)"]),
    ([1.0, 0.0], 2, "std", ["scale_rewards", "group, batch, none", "'std'"]),
    ([1.0, math.nan], 2, "group", ["completion 1", "nan"]),
    ([math.inf, 0.0], 2, "none", ["completion 0", "inf"]),
], ids=["not-a-multiple", "G1", "2d", "scale", "nan", "inf"])
def test_errors_are_one_sentence(rewards, size, scale, parts):
    with pytest.raises(UserError) as error:
        group_advantages(rewards, size, scale)
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message
    for part in parts:
        assert part in message


L = 0.5
SCHEDULE = [  # (s, W, D, lambda)
    (1, 0, 50, L * 49 / 50),  # no hold: the decay starts at s = W
    (25, 0, 50, L / 2),
    (50, 0, 50, 0.0),
    (51, 0, 50, 0.0),
    (1, 10, 40, L / 10),
    (5, 10, 40, L / 2),
    (9, 10, 40, L * 9 / 10),
    (10, 10, 40, L),  # s = W, the peak
    (11, 10, 40, L * 39 / 40),
    (30, 10, 40, L / 2),
    (50, 10, 40, 0.0),  # s = W + D
    (1000, 10, 40, 0.0),
    (1, 0, 0, L),
    (1000, 0, 0, L),
    (3, 4, 0, L * 3 / 4),
    (4, 4, 0, L),
    (400, 4, 0, L),  # D = 0 never decays
    (1, 1, 1, L),
    (2, 1, 1, 0.0),
]


@pytest.mark.parametrize("s, w, d, want", SCHEDULE, ids=lambda x: f"{x:g}")
def test_schedule_table(s, w, d, want):
    assert rlsd_lambda_at(s, L, w, d) == pytest.approx(want, abs=1e-15)


@pytest.mark.parametrize("w, d", [(0, 50), (7, 13), (5, 0), (0, 0)])
def test_schedule_stays_within_zero_and_lambda(w, d):
    values = [rlsd_lambda_at(s, L, w, d) for s in range(1, 80)]
    assert all(0 <= v <= L for v in values)
    assert values[: max(w, 1)] == sorted(values[: max(w, 1)])
    assert values[max(w - 1, 0) :] == sorted(values[max(w - 1, 0) :], reverse=True)


@pytest.mark.parametrize("step", [0, -3])
def test_step_is_one_based(step):
    with pytest.raises(UserError, match="1-based"):
        rlsd_lambda_at(step, L, 0, 50)
