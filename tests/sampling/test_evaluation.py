"""Held-out evaluation: pass@k, its interval, and what a run reports of them."""

import itertools
import math
import random

import pytest
import torch
from test_samplers import EOS, TOKENIZER, canned, config, rows, sequences

from rlsd.policy.distributed import Processes
from rlsd.sampling.evaluation import evaluate, interval, is_right, ks_of, pass_at_k, summary


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        want = sum(any(s) for s in subsets) / len(subsets)
        assert pass_at_k(n, c, k) == pytest.approx(want, abs=1e-12)


def test_pass_at_k_is_unbiased():
    rng, p, n = random.Random(0), 0.3, 6
    for k in (1, 2, 4):
        counts = [sum(rng.random() < p for _ in range(n)) for _ in range(20_000)]
        mean = sum(pass_at_k(n, c, k) for c in counts) / len(counts)
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=0.01)


@pytest.mark.parametrize("right, count, want", [
    # Published values of Wilson's interval.
    (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (5, 10, (0.2366, 0.7634)),
    (1, 20, (0.0089, 0.2361)),
])
def test_one_sample_gives_wilsons_interval(right, count, want):
    got = interval([1.0] * right + [0.0] * (count - right))
    assert got == pytest.approx(want, abs=2e-4)


def test_equal_samples_of_a_question_do_not_narrow_the_interval():
    once = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert interval(once, samples=16) == interval(once, samples=1)


def test_samples_narrow_the_interval_as_far_as_questions_agree():
    halves, mixed = [0.5] * 20, [0.25, 0.75] * 10
    widths = [high - low for low, high in (interval([0.0, 1.0] * 10), interval(mixed, 16),
                                           interval(halves, 16))]
    assert widths[0] > widths[1] > widths[2] > 0
    assert interval(halves, 16) == interval([0.0, 1.0] * 160)  # as many trials as samples
    assert interval([0.0] * 20, 16) == interval([0.0] * 20)


@pytest.mark.parametrize("questions, samples", [(40, 1), (40, 8), (100, 4)])
def test_the_interval_covers_the_truth_19_times_in_20(questions, samples):
    rng, covered, trials = random.Random(1), 0, 600
    for _ in range(trials):
        values = []
        for _ in range(questions):
            p = rng.choice([0.05, 0.3, 0.9])  # questions differ in difficulty
            values.append(sum(rng.random() < p for _ in range(samples)) / samples)
        low, high = interval(values, samples)
        covered += low <= (0.05 + 0.3 + 0.9) / 3 <= high
    assert 0.93 <= covered / trials <= 0.985


@pytest.mark.parametrize("n, want", [
    (1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (10, [1, 2, 4, 8, 10]),
])
def test_ks(n, want):
    assert ks_of(n) == want


def test_evaluate_leaves_the_random_state_and_mode_unchanged(qwen):
    given, options = rows(sequences([3, 5, 2] * 10)), config(leak_markers=["w3", "never"])
    qwen.train()
    torch.manual_seed(7)
    before = torch.get_rng_state()

    def reward(completion_ids, **_):
        return [float(sum(ids)) for ids in completion_ids]

    first = evaluate(qwen, TOKENIZER, given, options, [reward], 3, Processes(options))
    assert torch.equal(torch.get_rng_state(), before) and qwen.training
    torch.rand(5)
    assert evaluate(qwen, TOKENIZER, given, options, [reward], 3, Processes(options)) == first
    other = evaluate(qwen, TOKENIZER, given, options, [reward], 4, Processes(options))
    assert other["eval/reward_greedy"] == first["eval/reward_greedy"]
    assert other["eval/reward_sampled"] != first["eval/reward_sampled"]
    names = {f"{name}_{how}" for name in ("pass@1", "reward", "leak_rate")
             for how in ("greedy", "sampled")} | {"completion_length"}
    names |= {f"pass@1_{how}_{end}" for how in ("greedy", "sampled") for end in ("low", "high")}
    assert set(first) == {f"eval/{name}" for name in names}


def test_right_is_full_marks_of_the_first_function_that_scores_a_question():
    nan = math.nan
    marks = torch.tensor([
        [1.0, 0.0], [0.5, 1.0],  # the first scores both
        [nan, 1.0], [nan, 0.0],  # code beside mathematics
        [nan, 1.0], [1.0, nan],  # the first scores one: the other is wrong
    ], dtype=torch.float64)
    assert is_right(marks, 2).tolist() == [True, False, True, False, False, True]
    assert is_right(marks, 1).tolist() == [True, False, True, False, True, True]


def test_pass_at_1_counts_full_marks_of_the_first_function(monkeypatch, qwen):
    canned(monkeypatch, qwen, [[3, EOS]] * 8)
    marks = iter([[1.0, 0.5, 0.99, None], [0.0, 1.0, 2.0, 1.0]])

    def first(**_):
        return next(marks)

    def second(**_):
        return [1.0] * 4

    options = config()
    got = evaluate(
        qwen, TOKENIZER, rows([[5]] * 4), options, [first, second], 0, Processes(options)
    )
    bare = {name: v for name, v in got.items() if not name.endswith(("_low", "_high"))}
    assert bare == {
        "eval/pass@1_greedy": 0.5, "eval/pass@1_sampled": 0.75, "eval/completion_length": 2.0,
        "eval/reward_greedy": (2.49 + 4) / 4, "eval/reward_sampled": 2.0,
    }
    assert (got["eval/pass@1_greedy_low"], got["eval/pass@1_greedy_high"]) == interval([1, 0, 0, 1])


def test_several_samples_give_pass_at_k(monkeypatch, qwen):
    canned(monkeypatch, qwen, [[3, EOS]] * (2 + 8))
    # Question 0 is right in one of four samples, question 1 in two.
    marks = iter([[1.0, 0.0], [0, 0, 1, 0, 1, 1, 0, 0]])

    def reward(prompts, **_):
        asked.append(prompts)
        return next(marks)

    asked, given = [], rows([[5]] * 2)
    given[1]["prompt"] = "r"
    options = config(num_generations_eval=4)
    got = evaluate(qwen, TOKENIZER, given, options, [reward], 0, Processes(options))
    assert asked == [["q", "r"], ["q"] * 4 + ["r"] * 4]
    assert got["eval/pass@1_greedy"] == 0.5 and "eval/pass@2_greedy" not in got
    assert got["eval/pass@1_sampled"] == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert got["eval/pass@2_sampled"] == pytest.approx((3 / 6 + 5 / 6) / 2)
    assert got["eval/pass@4_sampled"] == 1.0
    for k in (1, 2, 4):
        value = got[f"eval/pass@{k}_sampled"]
        assert got[f"eval/pass@{k}_sampled_low"] <= value <= got[f"eval/pass@{k}_sampled_high"]


def test_summary_joins_a_value_and_its_interval():
    metrics = {"eval/pass@1_greedy": 0.5, "eval/pass@1_greedy_low": 0.25, "reward": 1.0,
               "eval/pass@1_greedy_high": 0.75, "eval/reward_greedy": 2.0, "eval/x": None}
    assert summary(metrics) == [
        ("pass@1_greedy", "0.5000  [0.2500, 0.7500]"), ("reward_greedy", "2.0000"),
    ]
    assert math.isclose(interval([1, 0])[0] + interval([1, 0])[1], 1)
