import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsd import UserError, group_advantages, rlsd_lambda_at
from rlsd.policy.advantages import (
    contrast,
    contrast_advantages,
    rlcsd_advantages,
    rlcsd_loss_weights,
)
from rlsd_kernels import aggregation_weights

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


# The contrast of hints


def naive_contrast(correct, wrong):
    return math.log(math.exp(correct) / (sum(map(math.exp, wrong)) / len(wrong)))


def contrasted(count=3, shape=(4, 5), seed=0):
    rng = torch.Generator().manual_seed(seed)
    correct, wrong = (
        -3 * torch.rand(size, generator=rng, dtype=torch.float64)
        for size in (shape, (count, *shape))
    )
    return correct, wrong


def test_contrast_is_its_formula_and_leaves_out_what_is_absent():
    correct, wrong = contrasted()
    present = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]]).bool()[..., None]
    wrong[2][~present[2].expand(4, 5)] = math.nan  # never read
    got, whole = contrast(correct, wrong, present), contrast(correct, wrong[:2])
    for i in range(4):
        for t in range(5):
            those = [wrong[k, i, t].item() for k in range(3) if present[k, i]]
            want = naive_contrast(correct[i, t].item(), those) if those else 0.0
            assert got[i, t].item() == pytest.approx(want, abs=1e-12)
            both = naive_contrast(correct[i, t].item(), wrong[:2, i, t].tolist())
            assert whole[i, t].item() == pytest.approx(both, abs=1e-12)
    # A mean of log-probs would be another number.
    assert (whole - (correct - wrong[:2].mean(0))).abs().max() > 0.1


def test_contrast_of_impossible_and_tiny_probabilities():
    inf = math.inf
    correct = torch.tensor([-2000.0, -inf, -1.0, -inf, math.nan])
    wrong = torch.tensor([[-2001.0, -1.0, -inf, -inf, -1.0], [-2003.0, -1.0, -inf, -inf, -1.0]])
    got = contrast(correct, wrong)
    assert got[0].item() == pytest.approx(1 - math.log((1 + math.exp(-2)) / 2), abs=1e-3)
    assert got[1:4].tolist() == [-inf, inf, 0.0] and got[4].isnan()  # a broken teacher shows


def test_contrast_and_what_it_makes_of_advantages_are_detached():
    correct, wrong = (x.requires_grad_() for x in contrasted())
    evidence = contrast(correct, wrong)
    a = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    assert not evidence.requires_grad
    assert not contrast_advantages(a, evidence).requires_grad
    assert not rlcsd_advantages(a, evidence)[0].requires_grad


EXTREME = torch.tensor([[-math.inf, -700.0, -0.3, 0.0, 0.3, 700.0, math.inf]]).double().repeat(4, 1)
SIGNED = torch.tensor([1.2, -0.7, 0.0, -2.0]).double()


@pytest.mark.parametrize("lam, eps_w", [(0.7, 0.2), (1.0, 1.0), (0.5, 0.0)])
def test_a_contrast_weighs_as_delta_does(lam, eps_w):
    got = contrast_advantages(
        SIGNED, EXTREME, rlsd_lambda=lam, rlsd_reweight_clip_range=eps_w
    )
    for i, a in enumerate(SIGNED.tolist()):
        for t, e in enumerate(EXTREME[i].tolist()):
            signed = e if a > 0 else -e
            w = min(max(math.exp(min(signed, 700.0)), 1 - eps_w), 1 + eps_w)
            want = a * ((1 - lam) + lam * w) if a else 0.0
            assert got[i, t].item() == pytest.approx(want, abs=1e-12)
            assert got[i, t].item() * a >= 0 and (a or got[i, t].item() == 0.0)
    mask = torch.tensor([[True], [False], [True], [False]]).expand(4, 7)
    masked = contrast_advantages(
        SIGNED, EXTREME, rlsd_lambda=lam, rlsd_reweight_clip_range=eps_w, reweight_mask=mask
    )
    assert torch.equal(masked[0], got[0]) and (masked[1] == SIGNED[1]).all()  # A to the bit
    only = contrast_advantages(SIGNED, EXTREME, rlsd_lambda=lam, rlsd_negative_only=True)
    assert (only[0] == SIGNED[0]).all()


RLCSD = {"rlsd_lambda": 0.5, "rlcsd_beta": 1.0, "rlcsd_tau": 0.02, "rlcsd_clip": 2.0,
         "rlcsd_threshold": 0.02}


@pytest.mark.parametrize("changed", [
    {}, {"rlcsd_beta": 10.0}, {"rlcsd_beta": 10.0, "rlcsd_clip": 0.4}, {"rlcsd_threshold": 0.45},
    {"rlcsd_tau": 1.0}, {"rlcsd_threshold": 0.0}, {"rlsd_lambda": 0.0},
], ids=str)
def test_rlcsd_adds_what_its_formula_says_and_stops_at_0(changed):
    given = RLCSD | changed
    small = torch.tensor([[-0.03, -0.001, 0.0, 0.0005, 0.01, 0.02, 2.0]]).double().repeat(4, 1)
    crossed = 0
    for evidence in (EXTREME, small):
        a_hat, selected = rlcsd_advantages(SIGNED, evidence, **given)
        for i, a in enumerate(SIGNED.tolist()):
            for t, e in enumerate(evidence[i].tolist()):
                r = given["rlcsd_beta"] * given["rlsd_lambda"] * math.tanh(e / given["rlcsd_tau"])
                r = max(-given["rlcsd_clip"], min(given["rlcsd_clip"], r))
                want, chosen = a, a != 0 and abs(r) > given["rlcsd_threshold"]
                if chosen:
                    want = max(a + r, 0.0) if a > 0 else min(a + r, 0.0)
                    crossed += (a + r) * a < 0
                assert selected[i, t].item() == chosen
                assert a_hat[i, t].item() == pytest.approx(want, abs=1e-12)
                assert a_hat[i, t].item() * a >= 0 and (a or a_hat[i, t].item() == 0.0)
    assert (crossed > 0) == (given["rlcsd_beta"] == 10.0 and given["rlcsd_clip"] > 1)


def test_rlcsd_selects_only_what_it_may():
    evidence = torch.ones(4, 3, dtype=torch.float64)
    a_hat, selected = rlcsd_advantages(SIGNED, evidence, rlsd_negative_only=True)
    assert selected.any(1).tolist() == [False, True, False, True]
    mask = torch.tensor([[True, False, True]]).expand(4, 3)
    a_hat, selected = rlcsd_advantages(SIGNED, evidence, reweight_mask=mask)
    assert selected.tolist() == [[True, False, True]] * 2 + [[False] * 3] + [[True, False, True]]
    assert (a_hat[:, 1] == SIGNED).all()
    broken = rlcsd_advantages(SIGNED, evidence * math.nan)[0]
    assert broken[0].isnan().all() and (broken[2] == 0).all()  # no plain A in silence


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_rlcsd_aggregates_the_selected_tokens_apart(loss_type):
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    selected = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1], [1, 0, 0, 0]]).bool()
    got = rlcsd_loss_weights(mask, selected, 0.3, loss_type, max_completion_length=4)
    want = torch.zeros(4, 4)
    for factor, part in ((1.0, mask & ~selected), (0.3, mask & selected)):
        for i, t in part.nonzero().tolist():
            each = {
                "grpo": 1 / 4 / part[i].sum(), "bnpo": 1 / part.sum(), "dapo": 1 / part.sum(),
                "dr_grpo": 1 / (4 * 4),
            }[loss_type]
            want[i, t] += factor * each
    torch.testing.assert_close(got, want)
    nothing = rlcsd_loss_weights(mask, selected & False, 0.3, loss_type, max_completion_length=4)
    plain = aggregation_weights(mask, loss_type, max_completion_length=4)
    assert torch.equal(nothing, plain)
