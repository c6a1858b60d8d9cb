"""Everything that is made from the study's data: tables, plots, and the blocks of docs/results.md.

    python -m bench.study_report

A verdict is a rule on the data, so that it cannot be kinder than the numbers: a difference counts
where its mean over paired runs is more than two standard errors from 0.
"""

import json
import re
import statistics

from bench.common import ROOT
from rlsd.compare import PANELS
from rlsd.reports.report import plot_runs
from rlsd.reports.tables import (
    ACCURACY,
    ENTROPY,
    LEAK,
    LENGTH,
    Column,
    arm_statistics,
    columns_of,
    csv_table,
    curve_mean,
    difference,
    final,
    first_step,
    markdown_table,
    records_of,
    shown_gain,
    shown_mean,
    shown_step,
)

RESULTS, DOCUMENT = ROOT / "bench" / "results" / "study", ROOT / "docs" / "results.md"
CHAINS, GYM = ("chain0", "chain1"), ("number_sequence", "spell_backward")
CONTRASTS = ("contrast0", "contrast1")  # the same task and seeds
FREE = ("free_length0", "free_length1")
SHOWN = (*CHAINS, *CONTRASTS, *FREE, "tolerance", *GYM, "agent", "smollm2", "smollm2_short",
         "smollm2_tolerance")
PARTS = (*SHOWN, "sensitivity", "cost")
PAPER, STRONG = "RLSD, paper", "RLSD, strong"


def load(part):
    """The data of a part with seeds as numbers, or None where it was not run."""
    path = RESULTS / f"{part}.json"
    if not path.exists():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    data["runs"] = {
        arm: {int(seed): run for seed, run in seeds.items()} for arm, seeds in data["runs"].items()
    }
    return data


def load_all():
    found = {name: load(name) for name in PARTS}
    return {name: data for name, data in found.items() if data}


def pooled(parts, arm, other, value):
    """Paired differences arm - other over the seeds of several parts: mean, se, n, each."""
    gains = []
    for data in parts:
        a, b = data["runs"].get(arm, {}), data["runs"].get(other, {})
        pairs = [(value(a[s]), value(b[s])) for s in a if s in b]
        gains += [x - y for x, y in pairs if x is not None and y is not None]
    if len(gains) < 2:
        raise SystemExit(f"{arm} and {other} have fewer than two pairs: run the study further.")
    return difference(gains)


def clear(gain, sign=1):
    """Whether a paired difference has this sign by more than two standard errors."""
    return sign * gain["mean"] > 2 * gain["se"]


def entropy_of(summary):
    """Mean entropy of the training samples over the run."""
    return curve_mean(summary, ENTROPY)


def entropy_at(summary, goal=0.6):
    """Entropy before the first evaluation that reaches the goal; None where none does."""
    curves = summary["curves"]
    reached = first_step(range(len(curves[ACCURACY])), curves[ACCURACY], goal)
    return curves[ENTROPY][reached] if reached else None


def rows_of(data):
    return arm_statistics(data["runs"], data["baseline"], data["goals"])


def row(data, arm):
    return next((r for r in rows_of(data) if r["arm"] == arm), None)


# Tables


def comparison_table(data):
    rows = rows_of(data)
    return markdown_table(rows, columns_of(rows, data["baseline"], data["goals"]))


def pooled_table(parts):
    """Every arm minus GRPO, over the pairs of all warm starts."""
    lines = ["| arm | pairs | after, minus GRPO | curve mean, minus GRPO | pairs above GRPO |",
             "| --- | --: | --: | --: | --: |"]
    for arm in parts[0]["runs"]:
        if arm == "GRPO":
            continue
        after = pooled(parts, arm, "GRPO", final)
        curve = pooled(parts, arm, "GRPO", curve_mean)
        above = sum(g > 0 for g in curve["each"])
        lines.append(
            f"| {arm} | {after['n']} | {shown_gain(after)} | {shown_gain(curve)} | "
            f"{above}/{after['n']} |"
        )
    return "\n".join(lines)


def sensitivity_table(chain, data):
    """Variants of the strong setting minus it; it and GRPO come from chain0 with the same seeds."""
    seeds = data["seeds"]
    runs = {
        arm: {s: chain["runs"][arm][s] for s in seeds} for arm in (STRONG, "GRPO")
    } | data["runs"]
    rows = arm_statistics(runs, STRONG, data["goals"])
    columns = [
        c for c in columns_of(rows, STRONG, data["goals"]) if c.group not in ("per step", "peak")
    ]
    columns.append(Column("weights clipped", "share", 8, lambda r: shown_mean(r["clipped"])))
    return markdown_table(rows, columns)


def step_costs(data):
    """{arm: seconds of each part of a step, of "all", and "memory" in MiB}.

    Of the seeds' medians the least: what other programs on the machine took only ever adds.
    """
    found = {}
    for arm, seeds in data["runs"].items():
        times = [s["times"] for s in seeds.values()]
        found[arm] = {
            part: min(t[part] for t in times)
            for part in ("rollout", "teacher", "loss", "optim", "update")
        }
        found[arm]["all"] = min(t["rollout"] + t["update"] for t in times)
        found[arm]["memory"] = statistics.median(
            1024 * s["peak_memory_gb"] for s in seeds.values()
        )
    return found


def cost_table(data):
    costs = step_costs(data)
    unit = costs["GRPO"]
    lines = ["| arm | s per step | x GRPO | update alone, x GRPO | rollout | teacher | "
             "student and loss | optimizer | peak MiB |",
             "| --- | --: | --: | --: | --: | --: | --: | --: | --: |"]
    for arm, c in costs.items():
        parts = " | ".join(f"{c[p]:.2f}" for p in ("rollout", "teacher", "loss", "optim"))
        lines.append(
            f"| {arm} | {c['all']:.2f} | {c['all'] / unit['all']:.2f} | "
            f"{c['update'] / unit['update']:.2f} | {parts} | {c['memory']:.0f} |"
        )
    return "\n".join(lines)


def compute_table(parts):
    lines = ["| part | runs | hours of runs | processes | commit | load before | machine |",
             "| --- | --: | --: | --: | --- | --: | --- |"]
    total = 0
    for name, data in parts.items():
        about, count = data["about"], sum(map(len, data["runs"].values()))
        total += about["seconds_of_all_runs"]
        lines.append(
            f"| {name} | {count} | {about['seconds_of_all_runs'] / 3600:.2f} | "
            f"{about['processes']} | {about['git'][:7]}{'-dirty' if about['dirty'] else ''} | "
            f"{about['load_before']:.1f} | {about['cores']} cores, {about['cpu']} |"
        )
    return "\n".join([*lines, f"| all | | {total / 3600:.2f} | | | | |"])


# Claims: (what is claimed, what was measured, verdict, reason)


def verdict(holds):
    return "confirmed" if holds else "not confirmed"


def verdicts(holds):
    """One verdict from {arm: bool}, by arm where they differ."""
    if len(set(holds.values())) == 1:
        return verdict(all(holds.values()))
    yes, no = (", ".join(arm for arm, h in holds.items() if h is want) for want in (True, False))
    return f"confirmed: {yes}; not confirmed: {no}"


def claims(parts):
    """Rows of the claims table, from the data of the chain task and the cost part."""
    chains = [parts[name] for name in CHAINS if name in parts]
    if not chains:
        return []
    rows = []
    for arm in (PAPER, STRONG):
        after, curve = (pooled(chains, arm, "GRPO", v) for v in (final, curve_mean))
        rows.append((
            f"RLSD ends above GRPO (+2.32 points on average); {arm}",
            f"after: {shown_gain(after)}, curve mean: {shown_gain(curve)} ({after['n']} pairs)",
            verdict(clear(after)),
            "by the accuracy after the last step; the curve mean is a matter of speed",
        ))
        reached = [row(c, arm)["steps_to_baseline"] for c in chains]
        last = chains[0]["base"]["max_steps"]
        rows.append((
            f"RLSD is twice as fast: above GRPO's end in half its steps; {arm}",
            f"GRPO's accuracy after {last} steps is reached at step "
            + ", ".join(shown_step(s) for s in reached),
            verdict(all(s is not None and s <= last / 2 for s in reached)),
            "first evaluation of the mean curve, per warm start, at or before half the steps",
        ))
    falls = [
        (row(c, "OPSD")["best"], row(c, "OPSD")["best_step"], row(c, "OPSD")["after"].mean,
         row(c, "OPSD")["leak"].mean) for c in chains
    ]
    rows.append((
        "OPSD peaks after 10 to 20 steps, then falls while it leaks",
        "; ".join(f"best {b:.3f} at step {s}, {a:.3f} after, leak {x:.3f}"
                  for b, s, a, x in falls),
        verdict(all(10 <= s <= 20 and b - a > 0.1 and x > 0.1 for b, s, a, x in falls)),
        "best at step 10 or 20, at least 0.1 lower after, leak rate above 0.1, on each warm start; "
        "the marker is planted in the warm-up, so that a leak can show at all",
    ))
    leaks = [
        (arm, pooled(chains, arm, "GRPO", lambda s: final(s, LEAK)),
         max(row(c, arm)["leak_peak"] for c in chains)) for arm in (PAPER, STRONG)
    ]
    rows.append((
        "RLSD does not leak",
        "; ".join(f"{arm}: leak rate minus GRPO's {shown_gain(g)}, peak {p:.3f}"
                  for arm, g, p in leaks),
        verdict(all(g["mean"] < 0.005 for _, g, _ in leaks)),
        "leak rate after the last step less than half a point above GRPO's",
    ))
    for value, when, how in (
        (entropy_of, "", "mean over the run; RLSD is further at every step"),
        (entropy_at, " at equal accuracy", "before the first evaluation at 0.6 or more"),
    ):
        gains = [(arm, pooled(chains, arm, "GRPO", value)) for arm in (PAPER, STRONG)]
        rows.append((
            f"RLSD keeps more entropy than GRPO{when}",
            "; ".join(f"{arm} - GRPO, nats: {shown_gain(g)} ({g['n']} pairs)" for arm, g in gains),
            verdicts({arm: clear(g) for arm, g in gains}), how,
        ))
    clipped = [row(c, PAPER)["clipped"].mean for c in chains]
    rows.append((
        "3 to 6 % of the token weights are clipped",
        ", ".join(f"{x:.1%}" for x in clipped) + " in the paper's setting",
        verdict(all(0.03 <= x <= 0.06 for x in clipped)),
        "mean over steps, on each warm start; here the hint tells every step",
    ))
    for other in ("GRPO+OPSD", "OPSD", "SDPO"):
        both = {arm: pooled(chains, arm, other, final) for arm in (PAPER, STRONG)}
        rows.append((
            f"RLSD ends above {other}",
            "; ".join(f"{arm} - {other}: {shown_gain(g)}" for arm, g in both.items()),
            verdicts({arm: clear(g) for arm, g in both.items()}), "after the last step",
        ))
    for other in ("GRPO+OPSD", "SDPO"):
        gain = pooled(chains, other, "GRPO", final)
        rows.append((
            f"{other} ends below GRPO", f"{shown_gain(gain)} ({gain['n']} pairs)",
            verdict(clear(gain, -1)), "after the last step; JSD, equal learning rates",
        ))
    gain = pooled(chains, STRONG, "RLSD, shuffled hints", curve_mean)
    rows.append((
        "the gain comes from what the reference says (control)",
        f"{STRONG} - shuffled hints, curve mean: {shown_gain(gain)} ({gain['n']} pairs)",
        verdict(clear(gain)), "shuffled hints keep the method and take the information",
    ))
    if "cost" in parts:
        step = {arm: c["update"] for arm, c in step_costs(parts["cost"]).items()}
        rows.append((
            "RLSD needs no second model and costs less than OPD",
            f"an update takes {step['RLSD'] / step['GRPO']:.2f} x GRPO's, OPD's with a teacher of "
            f"twice the layers {step['OPD'] / step['GRPO']:.2f} x",
            verdict(step["RLSD"] < step["OPD"]),
            "the least of three medians, without an error; a snapshot or EMA teacher is a second "
            "copy of the weights, a live one is not",
        ))
    rows += contrast_claims(parts)
    untestable = "no weights of that size, and no GPU for a run of that length"
    rows += [
        ("56.18 against 53.86 (GRPO) on five benchmarks, Qwen3-VL-8B", "-", "not testable here",
         untestable),
        ("responses of 4096 tokens, batch 256, learning rate 1e-6", "-", "not testable here",
         untestable),
    ]
    return rows


def contrast_claims(parts):
    """What an independent group measured (arXiv 2606.11709), where the chains can say it."""
    both = [parts[name] for name in CONTRASTS if name in parts]
    chains = [parts[name] for name in CHAINS if name in parts]
    if not both:
        return []
    below = {arm: pooled(chains, arm, "GRPO", final) for arm in (PAPER, STRONG)}
    rows = [(
        "RLSD ends below GRPO (6 of 8 settings of arXiv 2606.11709)",
        "; ".join(f"{arm}: {shown_gain(g)}" for arm, g in below.items()),
        verdicts({arm: clear(g, -1) for arm, g in below.items()}), "after the last step",
    )]
    for arm in ("RLSD, contrast, data's hints", "RLSD, contrast, own hints"):
        gains = [pooled(both, arm, STRONG, v) for v in (final, curve_mean)]
        rows.append((
            f"a contrast mends RLSD; {arm}, against the hint alone",
            f"minus {STRONG}, after: {shown_gain(gains[0])}, curve mean: {shown_gain(gains[1])} "
            f"({gains[0]['n']} pairs)",
            verdict(clear(gains[0])), "after the last step; lambda and clip of the strong setting",
        ))
    gain = pooled(both, "RLCSD", "GRPO", final)
    rows.append((
        "RLCSD ends above GRPO", f"{shown_gain(gain)} ({gain['n']} pairs)", verdict(clear(gain)),
        "after the last step; its authors' scalars",
    ))
    return [*rows, *style_claims([parts[name] for name in FREE if name in parts])]


def style_claims(free):
    """The same group's diagnosis, on the task whose answers have a free length."""
    if not free:
        fixed = "every right answer of these tasks has one form and one length"
        return [(claim, "-", "not testable here", fixed)
                for claim in ("the gap sits on tokens of style", "responses shrink")]

    def length(summary):
        return final(summary, LENGTH)

    gaps = [data["about"]["style_gap"]["style"] for data in free]
    rows = [(
        "the gap sits on tokens of style",
        "; ".join(f"{g['share_of_gap']:.0%} of it on {g['share']:.0%} of the tokens, delta there "
                  f"{g['mean_delta']:+.2f}" for g in gaps),
        verdict(all(g["share_of_gap"] > 0.5 for g in gaps)),
        "free length, before training: most of the sum of absolute deltas; a style was planted",
    )]
    shrunk = {arm: pooled(free, arm, "GRPO", length) for arm in (PAPER, STRONG, "RLSD, own hints")}
    rows.append((
        "responses shrink", "; ".join(
            f"{arm}: {shown_gain(g)} tokens beside GRPO's" for arm, g in shrunk.items()
        ), verdicts({arm: clear(g, -1) for arm, g in shrunk.items()}),
        "free length, after the last step",
    ))
    for arm, alone in (("RLSD, contrast, data's hints", STRONG),
                       ("RLSD, contrast, own hints", "RLSD, own hints")):
        longer, better = (pooled(free, arm, alone, v) for v in (length, final))
        rows.append((
            f"a contrast keeps them long; {arm}",
            f"minus {alone}: {shown_gain(longer)} tokens, accuracy {shown_gain(better)}",
            verdict(clear(longer)), "free length, after the last step",
        ))
    ends = {arm: pooled(free, arm, "GRPO", final) for arm in (*shrunk, "RLCSD")}
    rows.append((
        "RLSD ends below GRPO, where answers have a free length",
        "; ".join(f"{arm}: {shown_gain(g)}" for arm, g in ends.items()),
        verdicts({arm: clear(g, -1) for arm, g in ends.items()}), "after the last step",
    ))
    return rows


def claims_table(parts):
    lines = ["| claim | measured | verdict | how it was judged |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *("| " + " | ".join(r) + " |" for r in claims(parts))])


# The document


def plot(name, data):
    plot_runs(
        {arm: [records_of(s) for s in seeds.values()]
         for arm, seeds in data["runs"].items() if seeds},
        RESULTS / f"{name}.png", panels=PANELS, bands=True,
    )


def blocks(parts):
    """{name: markdown} of everything that docs/results.md shows of the data."""
    made = {
        name: comparison_table(parts[name]) for name in SHOWN if name in parts
    }
    chains = [parts[name] for name in CHAINS if name in parts]
    if chains:
        made["pooled"] = pooled_table(chains)
        made["claims"] = claims_table(parts)
    if "sensitivity" in parts and "chain0" in parts:
        made["sensitivity"] = sensitivity_table(parts["chain0"], parts["sensitivity"])
    if "cost" in parts:
        made["cost"] = cost_table(parts["cost"])
    made["compute"] = compute_table(parts)
    return made


def fill(text, made):
    """The document with the text between <!-- name --> and <!-- end --> replaced by its block."""
    for name, block in made.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(
            pattern, lambda m, block=block: f"{m[1]}{block}\n{m[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"{DOCUMENT} has {count} places for the block {name}.")
    return text


def main():
    parts = load_all()
    for name, data in parts.items():
        if name in (*CHAINS, *FREE, *GYM, "agent", "smollm2"):
            plot(name, data)
        (RESULTS / f"{name}.csv").write_text(csv_table(rows_of(data)), encoding="utf-8")
    made = blocks(parts)
    DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8"), made), encoding="utf-8")
    print(f"{DOCUMENT}: {', '.join(made)}")


if __name__ == "__main__":
    main()
