"""The study's report: every verdict follows its rule, and the committed document its data."""

import json
import random
import re

import pytest

import bench.study_report as report
from bench import free_length
from bench.study import PARTS
from rlsd.reports.tables import ACCURACY, ENTROPY, LEAK, LENGTH

ARMS = ("GRPO", "RLSD, paper", "RLSD, strong", "OPSD", "GRPO+OPSD", "SDPO",
        "RLSD, shuffled hints", "RLSD, answer-only hints")


def run(accuracy, leak=0.0, entropy=1.0, clipped=0.05, step=0.1):
    return {
        "steps": [0, 10, 20, 80],
        "curves": {ACCURACY: accuracy, LEAK: [0.0, 0.0, leak / 2, leak],
                   ENTROPY: [None, entropy, entropy, entropy]},
        "seconds": 10.0, "clipped": clipped, "peak_memory_gb": 0.25,
        "times": {"rollout": step, "update": step, "teacher": 0.0, "loss": step, "optim": 0.0},
    }


def part(name, **changed):
    """Five seeds of every arm, one curve with noise of mean 0; changed: arm -> run arguments."""
    runs = {}
    for arm in ARMS:
        given = {"accuracy": [0.3, 0.5, 0.6, 0.8], **changed.get(arm, {})}
        k = 1 + len(arm) % 4
        runs[arm] = {
            s: run(**{**given, "accuracy": [a + 0.002 * ((s * k + k) % 5 - 2)
                                            for a in given["accuracy"]]})
            for s in range(5)
        }
    return {
        "part": name, "runs": runs, "baseline": "GRPO", "goals": [0.6], "seeds": [0, 1, 2, 3, 4],
        "base": {"max_steps": 80}, "missing": [],
        "about": {"seconds_of_all_runs": 1800, "processes": 1, "git": "0123456789", "dirty": False,
                  "load_before": 1.0, "cores": 2, "cpu": "x"},
    }


def verdicts(**changed):
    parts = {name: part(name, **changed) for name in report.CHAINS}
    return {claim: verdict for claim, _, verdict, _ in report.claims(parts)}


def test_equal_arms_confirm_nothing_but_what_is_of_equality():
    found = verdicts()
    assert found["RLSD does not leak"] == "confirmed"
    assert found["3 to 6 % of the token weights are clipped"] == "confirmed"
    rest = [v for c, v in found.items() if "leak" not in c and "clipped" not in c]
    assert set(rest) == {"not confirmed", "not testable here"}


@pytest.mark.parametrize("claim, changed", [
    ("RLSD ends above GRPO (+2.32 points on average); RLSD, paper",
     {"RLSD, paper": {"accuracy": [0.3, 0.5, 0.6, 0.9]}}),
    ("RLSD is twice as fast: above GRPO's end in half its steps; RLSD, strong",
     {"RLSD, strong": {"accuracy": [0.3, 0.5, 0.9, 0.9]}}),
    ("OPSD peaks after 10 to 20 steps, then falls while it leaks",
     {"OPSD": {"accuracy": [0.3, 0.5, 0.6, 0.2], "leak": 0.9}}),
    ("RLSD keeps more entropy than GRPO",
     {a: {"entropy": 1.2} for a in ("RLSD, paper", "RLSD, strong")}),
    ("RLSD keeps more entropy than GRPO at equal accuracy",
     {a: {"entropy": 1.2} for a in ("RLSD, paper", "RLSD, strong")}),
    ("RLSD ends above SDPO", {"SDPO": {"accuracy": [0.3, 0.4, 0.5, 0.6]}}),
    ("SDPO ends below GRPO", {"SDPO": {"accuracy": [0.3, 0.4, 0.5, 0.6]}}),
    ("the gain comes from what the reference says (control)",
     {"RLSD, shuffled hints": {"accuracy": [0.3, 0.4, 0.5, 0.6]}}),
], ids=["end", "speed", "opsd", "entropy", "entropy-at", "above", "below", "control"])
def test_a_claim_is_confirmed_by_its_own_numbers_alone(claim, changed):
    assert verdicts()[claim] == "not confirmed"
    assert verdicts(**changed)[claim] == "confirmed"


def test_settings_that_differ_are_judged_apart():
    found = verdicts(**{"RLSD, strong": {"entropy": 1.2}})
    assert found["RLSD keeps more entropy than GRPO"] == (
        "confirmed: RLSD, strong; not confirmed: RLSD, paper"
    )


@pytest.mark.parametrize("claim, changed", [
    ("RLSD does not leak", {"RLSD, strong": {"leak": 0.02}}),
    ("3 to 6 % of the token weights are clipped", {"RLSD, paper": {"clipped": 0.3}}),
], ids=["leak", "clipped"])
def test_a_claim_fails_by_its_own_numbers(claim, changed):
    assert verdicts(**changed)[claim] == "not confirmed"


def test_pairs_are_pooled_over_warm_starts():
    changed = {"SDPO": {"accuracy": [0.3, 0.5, 0.6, 0.9]}}
    parts = [part("chain0"), part("chain1", **changed)]
    gain = report.pooled(parts, "SDPO", "GRPO", report.final)
    assert gain["n"] == 10 and gain["mean"] == pytest.approx(0.05)
    assert gain["se"] == pytest.approx((10 * 0.05**2 / 9) ** 0.5 / 10**0.5)
    line = next(x for x in report.pooled_table(parts).splitlines() if x.startswith("| SDPO"))
    assert "| 10 | +0.050 +- 0.017 |" in line and line.endswith("| 5/10 |")


def test_filling_replaces_a_block_and_nothing_else():
    text = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n"
    assert report.fill(text, {"one": "| 1 |"}) == (
        "a\n<!-- one -->\n| 1 |\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n"
    )
    with pytest.raises(SystemExit, match="0 places for the block three"):
        report.fill(text, {"three": ""})


def test_the_document_is_what_the_committed_data_gives():
    parts = report.load_all()
    text = report.DOCUMENT.read_text(encoding="utf-8")
    assert parts and report.fill(text, report.blocks(parts)) == text
    for name in parts:
        assert name in PARTS and not parts[name]["about"]["dirty"], name
        raw = (report.RESULTS / f"{name}.json").read_text(encoding="utf-8")
        assert "/tmp/" not in raw and "/home/" not in raw
        assert json.loads(raw)["about"]["git"]


def test_numbers_in_the_prose_are_in_the_tables():
    """Decimals outside of the generated blocks must occur in one of them, or be an option's."""
    text = report.DOCUMENT.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"<!-- [\w-]+ -->\n(.*?)<!-- end -->", text, flags=re.DOTALL))
    prose = re.sub(r"<!-- [\w-]+ -->\n.*?<!-- end -->|`[^`]*`", "", text, flags=re.DOTALL)
    options = {"0.1", "0.2", "0.5", "0.6", "0.11", "2.32"}
    quoted = set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", prose))
    known = set(re.findall(r"\d+\.\d+", blocks))
    assert quoted - known <= options, sorted(quoted - known - options)


def style_verdicts(share=0.4, length=None, **accuracy):
    """Of two parts whose arms are alike but for what is given; length: arm -> tokens at the end."""
    arms = ("GRPO", "RLSD, paper", "RLSD, strong", "RLSD, own hints", "RLCSD",
            "RLSD, contrast, data's hints", "RLSD, contrast, own hints")
    parts = []
    for _ in range(2):
        runs = {}
        for k, arm in enumerate(arms):
            runs[arm] = {}
            for s in range(5):
                noise = 0.002 * ((s * (1 + k % 4) + k) % 5 - 2)
                one = run([0.3, 0.5, 0.6, accuracy.get(arm, 0.8) + noise])
                one["curves"][LENGTH] = [14, 14, 14, (length or {}).get(arm, 14) + noise]
                runs[arm][s] = one
        gap = {"share": 0.3, "share_of_gap": share, "mean_delta": -1.0}
        parts.append({"runs": runs, "about": {"style_gap": {"style": gap}}})
    return {claim: verdict for claim, _, verdict, _ in report.style_claims(parts)}


def test_claims_of_style_follow_the_task_of_free_length():
    assert set(style_verdicts().values()) == {"not confirmed"}
    assert style_verdicts(share=0.6)["the gap sits on tokens of style"] == "confirmed"
    short = {"RLSD, strong": 10, "RLSD, own hints": 10}
    found = style_verdicts(length=short, **{"RLSD, strong": 0.4})
    assert found["responses shrink"] == (
        "confirmed: RLSD, strong, RLSD, own hints; not confirmed: RLSD, paper"
    )
    for arm in ("data's hints", "own hints"):
        assert found[f"a contrast keeps them long; RLSD, contrast, {arm}"] == "confirmed"
    below = found["RLSD ends below GRPO, where answers have a free length"]
    assert below.startswith("confirmed: RLSD, strong; not confirmed: ")
    untested = {verdict for _, _, verdict, _ in report.style_claims([])}
    assert untested == {"not testable here"}


def test_terse_answers_keep_the_results_alone():
    rng = random.Random(0)
    for _ in range(20):
        _, x, steps = free_length.make_problem(rng)
        free, terse = free_length.answer(x, steps, rng=rng), free_length.answer(x, steps)
        assert free_length.terse(free) == terse == free_length.terse(terse)
        assert len(free.split()) + 1 <= free_length.LONGEST
        worked = free.split().count(free_length.BETWEEN)
        assert len(free.split()) == len(terse.split()) + 2 * worked
