"""Forward and backward of the loss by every provider, interleaved in one process.

    make bench        pytest-benchmark at a small shape, checked against the specification
    make bench-cpu    python -m bench.bench_loss: all providers, JSON, table and plot

Quote ratios within one run, never times of a shared machine.
"""

import argparse
import json
from pathlib import Path

import pytest
import torch

from bench import common, plot
from bench.providers import PROVIDERS, Provider

# Head frozen or not, share of live rows.
BLOCKS = ((False, 1.0), (True, 1.0), (False, 0.5))
PACKAGES = ("torch", "trl", "liger-kernel", "cut-cross-entropy", "transformers", "triton", "numpy")


@pytest.mark.parametrize("provider", PROVIDERS, ids=Provider.id)
@pytest.mark.parametrize("head", ["full", "frozen"])
def test_step(benchmark, provider, head):
    reason = provider.obstacle()
    if reason:
        pytest.skip(reason)
    problem = common.make_problem(common.CASES["small"], frozen_head=head == "frozen", live=0.8)
    got = common.gradients(problem, provider.step)
    wrong = common.errors(got, common.exact(problem), problem.live())
    assert all(wrong[k] < 1e-4 for k in wrong if wrong[k] is not None), wrong

    def step():
        common.clear(problem)
        loss, *_ = provider.step(problem)
        loss.backward()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


def run_block(case, providers, *, frozen_head, live, rounds, warmup_s):
    """One table: all providers on one problem. rounds=0 measures accuracy alone."""
    torch._dynamo.reset()  # compiled code of another block's shape does not use up its limit
    problem = common.make_problem(case, frozen_head=frozen_head, live=live)
    truth, live_rows = common.exact(problem), problem.live()
    found = {}
    for provider in providers:
        wrong = common.errors(common.gradients(problem, provider.step), truth, live_rows)
        step = provider.step
        nhv = common.measured_nhv(case, lambda step=step: common.gradients(problem, step))
        found[provider.name] = {"nhv": round(nhv, 2), "errors": wrong}
    del truth
    block = {
        "shape": case.label(), "rows": case.rows, "hidden": case.hidden, "vocab": case.vocab,
        "frozen_head": frozen_head, "live": len(live_rows) / case.rows, "timed": rounds > 0,
        "providers": found,
    }
    if not rounds:
        return block

    def whole_step(step):
        loss, *_ = step(problem)
        loss.backward()

    steps = {p.name: lambda step=p.step: whole_step(step) for p in providers}
    bare = common.BareGEMMs(problem)
    seconds = common.interleave(
        steps | {plot.BARE: bare}, rounds, warmup_s, lambda: common.clear(problem)
    )
    block["bare"] = common.summary(seconds.pop(plot.BARE))
    del bare  # before memory is measured
    for name, values in seconds.items():
        common.clear(problem)
        found[name]["time"] = common.summary(values)
        found[name]["peak_bytes"] = common.peak_extra_bytes(steps[name])
    return block


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="main", choices=common.CASES)
    parser.add_argument("--bf16_case", default="bf16", choices=common.CASES)
    parser.add_argument("--rounds", type=int, default=9, help="at least 5 for figures to quote")
    parser.add_argument("--warmup", type=float, default=1.0, help="seconds per provider and block")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    reasons = {p.name: p.obstacle() for p in PROVIDERS}
    providers = [p for p in PROVIDERS if reasons[p.name] is None]
    results = {
        "environment": common.environment(PACKAGES), "rounds": args.rounds,
        "warmup_s": args.warmup,
        "providers": [
            {
                "name": p.name, "call": p.call, "package": p.package, "logits": p.logits,
                "not_run": reasons[p.name],
            }
            for p in PROVIDERS
        ],
        "blocks": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    plan = [(args.case, *block, args.rounds) for block in BLOCKS]
    plan.append((args.bf16_case, False, 1.0, 0))
    for name, frozen_head, live, rounds in plan:
        block = run_block(
            common.CASES[name], providers, frozen_head=frozen_head, live=live, rounds=rounds,
            warmup_s=args.warmup,
        )
        results["blocks"].append(block)
        print(plot.block_table(results, block), flush=True)
        text = json.dumps(results, indent=1) + "\n"  # after each block: a late failure costs one
        (args.out / "results.json").write_text(text, encoding="utf-8")
    plot.draw(args.out)


if __name__ == "__main__":
    main()
