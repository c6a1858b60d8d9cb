"""Tables from runs: every statistic against numbers worked out by hand."""

import csv
import io

import pytest

from rlsd.reports.report import series
from rlsd.reports.tables import (
    ACCURACY,
    ENTROPY,
    LEAK,
    LENGTH,
    Spread,
    arm_statistics,
    columns_of,
    csv_table,
    first_step,
    markdown_table,
    mean_curve,
    paired,
    records_of,
    run_summary,
    shown_gain,
    spread,
    spread_of,
    text_table,
)


def record(step, **values):
    names = {"accuracy": ACCURACY, "leak": LEAK, "length": LENGTH, "entropy": ENTROPY}
    return {"step": step, **{names.get(k, k): v for k, v in values.items()}}


RECORDS = [
    record(0, accuracy=0.25, leak=0.0, length=10.0),
    record(1, entropy=2.0, reward=0.5, **{"time/rollout": 1.0, "time/update": 0.5,
           "perf/peak_memory_gb": 1.5, "rlsd/effective_lambda": 0.5, "rlsd/clip_low_frac": 0.02,
           "rlsd/clip_high_frac": 0.03}),
    record(2, entropy=1.0, reward=0.25, accuracy=0.5, leak=0.25, length=8.0,
           **{"time/rollout": 3.0, "time/update": 0.5, "perf/peak_memory_gb": 2.0,
              "rlsd/effective_lambda": 0.25, "rlsd/clip_low_frac": None,
              "rlsd/clip_high_frac": None}),
    record(3, entropy=0.5, **{"time/rollout": 2.0, "time/update": 0.75,
           "rlsd/effective_lambda": 0.0, "rlsd/clip_low_frac": 1.0, "rlsd/clip_high_frac": 0.0}),
    record(4, entropy=None, accuracy=0.75, leak=0.125, length=6.0),
]


def test_summary_of_a_run():
    s = run_summary(RECORDS, seconds=12.345)
    assert s["steps"] == [0, 2, 4] and s["seconds"] in (12.34, 12.35)
    assert s["curves"][ACCURACY] == [0.25, 0.5, 0.75]
    assert s["curves"][LEAK] == [0.0, 0.25, 0.125]
    assert s["curves"][ENTROPY] == [None, 1.5, 0.5]  # the mean since the evaluation before
    assert s["curves"]["reward"] == [None, 0.375, None]
    assert s["times"] == {"rollout": 2.0, "update": 0.5}  # medians
    assert s["clipped"] == 0.05  # only where lambda > 0 and a token was re-weighted
    assert s["peak_memory_gb"] == 2.0
    again = records_of(s)
    assert series(again, ACCURACY) == ([0, 2, 4], [0.25, 0.5, 0.75])
    assert series(again, ENTROPY) == ([2, 4], [1.5, 0.5])


def test_summary_of_a_run_without_evaluation_and_of_a_bare_one():
    s = run_summary([record(1, reward=0.5), record(2, reward=0.75)])
    assert s["steps"] == [1, 2] and s["curves"] == {"reward": [0.5, 0.75]}
    unweighted = record(1, **{"rlsd/weight_mean_pos": 1.0, "rlsd/effective_lambda": 0.0})
    weighted = record(1, **{"rlsd/weight_mean_pos": 1.5, "rlsd/effective_lambda": 0.5})
    assert run_summary([unweighted])["curves"] == {}  # no token was re-weighted: 1 by definition
    assert run_summary([weighted])["curves"] == {"rlsd/weight_mean_pos": [1.5]}
    assert s["times"] == {} and s["clipped"] is s["peak_memory_gb"] is s["seconds"] is None


def summary(values, leaks=None, seconds=None, entropy=None):
    leaks = leaks or [0.0] * len(values)
    made = run_summary([
        record(10 * i, accuracy=v, leak=x, length=5.0 + i)
        for i, (v, x) in enumerate(zip(values, leaks, strict=True))
    ], seconds)
    if entropy is not None:
        made["curves"][ENTROPY] = [None] * (len(values) - 1) + [entropy]
    return made


RUNS = {
    "GRPO": {0: summary([0.1, 0.2, 0.5], seconds=10), 1: summary([0.1, 0.4, 0.7], seconds=20)},
    "RLSD": {
        0: summary([0.1, 0.7, 0.8], [0, 0.25, 0.125], entropy=0.5),
        1: summary([0.1, 0.1, 0.7], entropy=1.0), 2: summary([0.1, 0.1, 0.3], entropy=1.5),
    },
    "empty": {},
    "slow": {1: summary([0.1, 0.2, 0.3])},
}


def test_statistics_of_arms():
    grpo, rlsd, slow = arm_statistics(RUNS, "GRPO", [0.55, 0.3])
    assert grpo["n"] == 2 and grpo["after"] == Spread(0.6, pytest.approx(0.02**0.5), 2)
    assert grpo["curve_mean"].mean == pytest.approx(1 / 3)
    assert grpo["after_gain"] is grpo["curve_gain"] is None
    assert grpo["steps_to"] == {0.55: 20, 0.3: 10} and grpo["steps_to_baseline"] == 20
    assert grpo["seconds"].mean == 15 and grpo["length"].mean == 7.0
    assert rlsd["n"] == 3 and rlsd["after"].mean == pytest.approx(0.6)
    # Seeds 0 and 1 are paired: gains 0.3 and 0 after, 1.6/3 - 0.8/3 and 0.9/3 - 1.2/3 of the curve.
    assert rlsd["after_gain"]["each"] == pytest.approx([0.3, 0.0]) and rlsd["after_gain"]["n"] == 2
    assert rlsd["after_gain"]["mean"] == pytest.approx(0.15)
    assert rlsd["after_gain"]["se"] == pytest.approx(0.15)
    assert rlsd["curve_gain"]["each"] == pytest.approx([0.8 / 3, -0.1])
    assert rlsd["steps_to_baseline"] == 20 and rlsd["steps_to"][0.3] == 10
    assert rlsd["leak"].mean == pytest.approx(0.125 / 3) and rlsd["leak_peak"] == 0.25
    assert rlsd["entropy"] == Spread(1.0, 0.5, 3) and grpo["entropy"] is None
    assert slow["after_gain"]["se"] is None and slow["steps_to"][0.55] is None
    assert slow["best"] == 0.3 and slow["best_step"] == 20


def test_without_a_baseline_nothing_is_compared():
    rows = arm_statistics(RUNS)
    assert all(r["after_gain"] is None and r["steps_to_baseline"] is None for r in rows)
    assert "minus" not in text_table(rows, columns_of(rows, None, []))


def test_tables_show_the_statistics():
    rows = arm_statistics(RUNS, "GRPO", [0.55])
    columns = columns_of(rows, "GRPO", [0.55])
    text = text_table(rows, columns).splitlines()
    assert len(text) == 5 and text[1].split()[0] == "arm"
    assert text[3].split() == (
        "RLSD 3 0.100 0.600 +- 0.265 0.333 +- 0.186 +0.150 +- 0.150 +0.083 +- 0.183 20 20 "
        "1.000 7.0 0.042 0.250 - -"
    ).split()
    assert " never " in text[4] and "+0.000 +- " not in text[4]
    markdown = markdown_table(rows, columns).splitlines()
    assert markdown[1].startswith("| --- | --: |") and len(markdown) == 5
    assert {line.count("|") for line in markdown} == {len(columns) + 2}
    assert "| 0.600 +- 0.265 |" in markdown[3]
    assert "| after | curve mean | after, minus GRPO | curve mean, minus GRPO |" in markdown[0]
    (grpo, rlsd, slow) = csv.DictReader(io.StringIO(csv_table(rows)))
    assert float(rlsd["after_mean"]) == pytest.approx(0.6) and float(rlsd["curve_gain_se"]) > 0
    assert grpo["curve_gain"] == "" and slow["steps_to_0.55"] == "" and rlsd["n"] == "3"


@pytest.mark.parametrize("values, want", [([0.5], "0.500"), ([0.4, 0.6], "0.500 +- 0.141")])
def test_spread(values, want):
    assert spread(values) == want


def test_spread_of_what_was_not_measured():
    assert spread_of([]) is spread_of([1.0, None]) is None and spread([]) == "-"


def test_gain_has_its_sign():
    assert shown_gain({"mean": -0.01, "se": 0.0051}) == "-0.010 +- 0.005"
    assert shown_gain({"mean": 0.5, "se": None}) == "+0.500" and shown_gain(None) == "-"


def test_pairs_are_of_one_seed():
    a = {0: summary([0.5]), 3: summary([0.9])}
    b = {3: summary([0.4]), 5: summary([0.0])}
    assert paired(a, b, lambda s: s["curves"][ACCURACY][-1])["each"] == [pytest.approx(0.5)]
    assert paired({0: summary([0.5])}, b, lambda s: 0) is None


def test_first_step_and_mean_curve_of_unequal_runs():
    assert first_step([0, 5, 10], [0.1, 0.5, 0.4], 0.45) == 5
    assert first_step([0, 5], [0.1, 0.2], 0.9) is None
    assert mean_curve([summary([0.2, 0.4, 0.9]), summary([0.4, 0.6])]) == pytest.approx([0.3, 0.5])
