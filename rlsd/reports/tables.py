"""Arms x seeds as one table: means with deviations, paired differences, steps to an accuracy.

A run is summarised once (`run_summary`), and every table is computed from summaries, so that a
table can be made again from what was committed. Accuracy is the share of held-out questions whose
one sampled answer gets full marks; its curve mean is the mean over all evaluations, step 0
included, which rewards speed. Differences pair the runs of one seed: mean, and standard error
sd / sqrt(n).
"""

import csv
import io
import statistics
from typing import NamedTuple

from .report import series

ACCURACY, LEAK = "eval/pass@1_sampled", "eval/leak_rate_sampled"
LENGTH, ENTROPY = "eval/completion_length", "entropy"
AT_EVALUATIONS = (ACCURACY, "eval/pass@1_greedy", LEAK, LENGTH)
# Measured at every step of training; a summary has their mean since the evaluation before.
BETWEEN = (ENTROPY, "reward", "completions/mean_length", "leak_rate", "rlsd/weight_mean_pos",
           "rlsd/weight_mean_neg")
PARTS = ("rollout", "teacher", "loss", "optim", "update")


def run_summary(records, seconds=None):
    """What tables and plots need of a run's records; seconds: wall clock of all of it.

    "steps" are those of the evaluations, "curves" holds one value per evaluation, None where
    nothing was measured. Times are medians over steps, in seconds; memory is the peak, in GiB.
    """
    steps = series(records, ACCURACY)[0]
    if not steps:  # no evaluation: the training steps themselves
        steps = [r["step"] for r in records]
    curves = {}
    for name in AT_EVALUATIONS:
        known = dict(zip(*series(records, name), strict=True))
        if known:
            curves[name] = [known.get(s) for s in steps]
    weighted = any(r.get("rlsd/effective_lambda") for r in records)
    for name in BETWEEN:
        if name.startswith("rlsd/") and not weighted:
            continue  # 1 by definition
        known, values, last = list(zip(*series(records, name), strict=True)), [], -1
        for s in steps:
            inside = [v for at, v in known if last < at <= s]
            values.append(round(statistics.fmean(inside), 6) if inside else None)
            last = s
        if known:
            curves[name] = values
    times = {
        part: statistics.median(series(records, f"time/{part}")[1])
        for part in PARTS if series(records, f"time/{part}")[1]
    }
    clipped = [
        r["rlsd/clip_low_frac"] + r["rlsd/clip_high_frac"] for r in records
        if r.get("rlsd/effective_lambda") and r.get("rlsd/clip_low_frac") is not None
    ]
    memory = series(records, "perf/peak_memory_gb")[1]
    return {
        "steps": steps, "curves": curves,
        "seconds": None if seconds is None else round(seconds, 2),
        "times": {part: round(value, 5) for part, value in times.items()},
        "clipped": round(statistics.fmean(clipped), 5) if clipped else None,
        "peak_memory_gb": round(max(memory), 4) if memory else None,
    }


def records_of(summary):
    """Records that plot_runs can draw, from a summary."""
    return [
        {"step": s, **{name: values[i] for name, values in summary["curves"].items()}}
        for i, s in enumerate(summary["steps"])
    ]


class Spread(NamedTuple):
    """Mean and standard deviation of `n` values; sd None for one."""

    mean: float
    sd: float | None
    n: int


def spread_of(values):
    """Spread of a list, None where it is empty or holds a None."""
    if not values or any(v is None for v in values):
        return None
    return Spread(
        statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)
    )


def mean_curve(summaries, name=ACCURACY):
    """Mean over runs at each evaluation that all of them have."""
    return [
        statistics.fmean(values)
        for values in zip(*(s["curves"][name] for s in summaries), strict=False)
        if None not in values
    ]


def first_step(steps, curve, goal):
    """The first step at which the curve is at least the goal, or None."""
    return next((s for s, v in zip(steps, curve, strict=False) if v >= goal), None)


def paired(summaries, baseline, value):
    """Mean difference and its standard error over the seeds that both arms have, or None."""
    return difference([
        value(summaries[s]) - value(baseline[s]) for s in summaries if s in baseline
    ])


def difference(gains):
    """Mean of paired differences and its standard error, None for one; None without any."""
    if not gains:
        return None
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
    return {"mean": statistics.fmean(gains), "se": error, "n": len(gains), "each": gains}


def final(summary, name=ACCURACY):
    return summary["curves"][name][-1]


def curve_mean(summary, name=ACCURACY):
    return statistics.fmean(v for v in summary["curves"][name] if v is not None)


def arm_statistics(runs, baseline=None, goals=()):
    """One dict per arm from {arm: {seed: summary}}, in the order given; arms without runs left out.

    baseline: the arm that the others are compared with. goals: accuracies for "steps to". Steps
    are those of the mean curve's first evaluation that reaches a goal.
    """
    base = runs.get(baseline) or {}
    end = None
    if base:
        end = statistics.fmean(final(s) for s in base.values())
    rows = []
    for arm, seeds in runs.items():
        if not seeds:
            continue
        summaries = list(seeds.values())
        curve, steps = mean_curve(summaries), summaries[0]["steps"]
        leaks = [s["curves"].get(LEAK) for s in summaries]
        times = [s["times"] for s in summaries]
        rows.append({
            "arm": arm, "n": len(summaries), "before": curve[0],
            "after": spread_of([final(s) for s in summaries]),
            "best": max(curve), "best_step": steps[curve.index(max(curve))],
            "curve_mean": spread_of([curve_mean(s) for s in summaries]),
            "after_gain": None if arm == baseline else paired(seeds, base, final),
            "curve_gain": None if arm == baseline else paired(seeds, base, curve_mean),
            "steps_to": {goal: first_step(steps, curve, goal) for goal in goals},
            "steps_to_baseline": first_step(steps, curve, end) if base else None,
            "baseline_end": end,
            "entropy": _last(summaries, ENTROPY), "length": _last(summaries, LENGTH),
            "leak": spread_of([x[-1] for x in leaks]) if all(leaks) else None,
            "leak_peak": max(map(max, leaks)) if all(leaks) else None,
            "clipped": spread_of([s["clipped"] for s in summaries]),
            "seconds": spread_of([s["seconds"] for s in summaries]),
            "step_seconds": spread_of([
                t["rollout"] + t["update"] if "update" in t else None for t in times
            ]),
            "peak_memory_gb": spread_of([s["peak_memory_gb"] for s in summaries]),
        })
    return rows


def _last(summaries, name):
    """Spread of the last value that each run measured."""
    values = [[v for v in s["curves"].get(name, []) if v is not None] for s in summaries]
    return spread_of([v[-1] for v in values]) if all(values) else None


def spread(values):
    """mean +- sd, the sd only where there are several."""
    return shown_spread(spread_of(values))


def shown_spread(s, digits=3):
    if s is None:
        return "-"
    sd = f" +- {s.sd:.{digits}f}" if s.sd is not None else ""
    return f"{s.mean:.{digits}f}{sd}"


def shown_gain(gain, digits=3):
    """mean +- standard error of a paired difference, signed."""
    if gain is None:
        return "-"
    error = f" +- {gain['se']:.{digits}f}" if gain["se"] is not None else ""
    return f"{gain['mean']:+.{digits}f}{error}"


def shown_number(value, digits=3):
    return "-" if value is None else f"{value:.{digits}f}"


def shown_mean(s, digits=3):
    return "-" if s is None else f"{s.mean:.{digits}f}"


def shown_step(step):
    return "never" if step is None else str(step)


class Column(NamedTuple):
    """One column: two lines of heading, width in the text table, what it shows of a row, and its
    heading where there is one line (None: both lines)."""

    group: str
    name: str
    width: int
    show: object
    title: str | None = None


BEFORE = Column("", "before", 7, lambda r: shown_number(r["before"]))
AFTER = Column("held-out pass@1", "after", 16, lambda r: shown_spread(r["after"]), "after")
CURVE_MEAN = Column(
    "sampled", "curve mean", 16, lambda r: shown_spread(r["curve_mean"]), "curve mean"
)
LEAK_AFTER = Column("leak", "after", 8, lambda r: shown_mean(r["leak"]))
LEAK_PEAK = Column("rate", "peak", 7, lambda r: shown_number(r["leak_peak"]), "leak peak")


def steps_to_baseline(baseline):
    return Column(
        "steps to", f"{baseline} end", 6 + len(baseline),
        lambda r: shown_step(r["steps_to_baseline"]),
    )


def columns_of(rows, baseline, goals):
    """The columns of a comparison; what no arm measured is left out."""
    columns = [Column("", "n", 4, lambda r: str(r["n"])), BEFORE, AFTER, CURVE_MEAN]
    if baseline:
        columns += [
            Column(
                f"minus {baseline} +- se", "after", 17, lambda r: shown_gain(r["after_gain"]),
                f"after, minus {baseline}",
            ),
            Column(
                "", "curve mean", 17, lambda r: shown_gain(r["curve_gain"]),
                f"curve mean, minus {baseline}",
            ),
        ]
    for goal in goals:
        columns.append(Column(
            "steps to", f"{goal:g}", 9, lambda r, g=goal: shown_step(r["steps_to"][g])
        ))
    if baseline:
        columns.append(steps_to_baseline(baseline))
    columns += [
        Column("", "entropy", 9, lambda r: shown_mean(r["entropy"])),
        Column("", "length", 8, lambda r: shown_mean(r["length"], 1)),
    ]
    if any(r["leak"] for r in rows):
        columns += [LEAK_AFTER, LEAK_PEAK]
    return columns + [
        Column("per step", "ms", 9, lambda r: shown_number(
            r["step_seconds"] and 1000 * r["step_seconds"].mean, 0), "ms per step"),
        Column("peak", "MiB", 7, lambda r: shown_number(
            r["peak_memory_gb"] and 1024 * r["peak_memory_gb"].mean, 0)),
    ]


def text_table(rows, columns):
    """Two lines of headings and one line per arm."""
    width = max([22, *(len(r["arm"]) + 1 for r in rows)])
    lines = [
        f"{'':<{width}}" + "".join(f"{c.group:>{c.width}}" for c in columns),
        f"{'arm':<{width}}" + "".join(f"{c.name:>{c.width}}" for c in columns),
    ]
    lines += [
        f"{r['arm']:<{width}}" + "".join(f"{c.show(r):>{c.width}}" for c in columns) for r in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cells(rows, columns):
    heads = [c.title or f"{c.group} {c.name}".strip() for c in columns]
    return ["arm", *heads], [[r["arm"], *(c.show(r) for c in columns)] for r in rows]


def markdown_table(rows, columns):
    head, body = _cells(rows, columns)
    lines = [head, ["---", *["--:"] * len(columns)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def csv_table(rows):
    """Every statistic of every arm as plain numbers."""
    flat = []
    for row in rows:
        line = {}
        for name, value in row.items():
            if isinstance(value, Spread):
                line[f"{name}_mean"], line[f"{name}_sd"] = value.mean, value.sd
            elif name.endswith("_gain") and value is not None:
                line[name], line[f"{name}_se"] = value["mean"], value["se"]
                line[f"{name}_n"] = value["n"]
            elif name == "steps_to":
                line |= {f"steps_to_{goal:g}": step for goal, step in value.items()}
            else:
                line[name] = value
        flat.append(line)
    names = list(dict.fromkeys(name for line in flat for name in line))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()
