"""Forward and backward of the loss by every provider, interleaved in one process.

    make bench        pytest-benchmark at a small shape, checked against the specification
    make bench-cpu    python -m bench.bench_loss: all providers, JSON, table and plot
    python -m bench.bench_loss --device cuda --out ...     named models on a GPU, see gpu_run.sh

A run on a CPU that stopped, or whose --seconds were over, goes on with --resume. Quote ratios
within one run, never times of a shared machine.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from bench import common, plot
from bench.providers import (
    COMPILED,
    EAGER,
    OURS,
    PROVIDERS,
    TOLERANT,
    Provider,
    first_line,
    providers_for,
)
from rlsd.checks import measure, profiles
from rlsd.config import UserError


class Block(NamedTuple):
    """One table. live: share of live rows; timed: or accuracy alone; only: names of providers, none
    for all; tolerances: of a second table, of errors."""

    case: measure.Case
    profile: str = "trained"
    frozen_head: bool = False
    live: float = 1.0
    timed: bool = True
    only: tuple[str, ...] = ()
    tolerances: tuple[float, ...] = ()

    def label(self):
        return plot.heading({"shape": self.case.label(), "profile": self.profile,
                             "frozen_head": self.frozen_head, "live": self.live})


# No other library's op that runs on a CPU looks at the data: all of them are timed on one profile,
# and two on the others, to show it.
TOLERANT_ROWS = tuple(f"{OURS}{TOLERANT}{t}" for t in ("1e-3", "1e-2"))
FEW = (EAGER, COMPILED, OURS, *TOLERANT_ROWS)
LONG = 4  # times the rows: whether memory grows with them
TOLERANCES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
# Model, rows, profile, head frozen or not, share of live rows; what a GPU's budget should buy comes
# first.
GPU_BLOCKS = (
    ("Qwen3-8B", 8192, "trained", False, 1.0), ("Qwen3-8B", 8192, "uniform", False, 1.0),
    ("Qwen3-8B", 8192, "trained", False, 0.3), ("Qwen3-1.7B", 8192, "trained", False, 1.0),
    ("Qwen3-8B", 8192, "trained", True, 1.0), ("Qwen3-8B", 2048, "trained", False, 1.0),
    ("Llama-3-8B", 8192, "trained", False, 1.0), ("Gemma-3-4B", 8192, "trained", False, 1.0),
    ("Qwen3-8B", 8192, "trained", False, 0.5), ("Qwen3-4B", 8192, "trained", False, 1.0),
    ("Qwen3-8B", 32768, "trained", False, 1.0),
)
NEAR = (
    EAGER, COMPILED, "TRL", "Liger CuTe", "cut-cross-entropy, gradient filter",
    *(f"{OURS}, {impl}{tolerance}" for impl in ("triton", "cuda")
      for tolerance in ("", f"{TOLERANT}1e-3")),
)
GPU_MODELS = ("Qwen3-8B", "Qwen3-1.7B", "Qwen3-4B", "Llama-3-8B", "Gemma-3-4B")
GPU_ROWS, LIVE, HEADS = (8192, 2048, 32768), (1.0, 0.5, 0.3), (False, True)
GPU_PROFILES = ("trained",)
PACKAGES = ("torch", "trl", "liger-kernel", "cut-cross-entropy", "transformers", "triton", "numpy")
GPU_PACKAGES = (*PACKAGES, "verl", "nvidia-cutlass-dsl", "cuda-tile")
ROUNDS = {"cpu": 5, "cuda": 30}
PROBE_S = 150  # compiling a CuTe kernel takes tens of seconds


@pytest.mark.parametrize("provider", PROVIDERS, ids=Provider.id)
@pytest.mark.parametrize("head", ["full", "frozen"])
def test_step(benchmark, provider, head):
    reason = provider.obstacle()
    if reason:
        pytest.skip(reason)
    problem = measure.make_problem(
        common.CASES["small"], profile="trained", frozen_head=head == "frozen", live=0.8
    )
    got = measure.gradients(problem, provider.step)
    wrong = measure.errors(got, measure.exact(problem), problem.live())
    limit = 1e-4 + 4 * provider.gradient_tolerance
    assert all(wrong[k] < limit for k in wrong if wrong[k] is not None), wrong

    def step():
        measure.clear(problem)
        loss, *_ = provider.step(problem)
        loss.backward()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


def gpu_plan(full):
    """Blocks in the order in which a budget is spent on them; full: every combination. All peers
    are in the first, those that come near its fastest in the others."""
    rest = itertools.product(GPU_MODELS, GPU_ROWS, GPU_PROFILES, HEADS, LIVE) if full else ()
    plan = [
        Block(common.model_case(model, rows), *what)
        for model, rows, *what in dict.fromkeys([*GPU_BLOCKS, *rest])
    ]
    main, uniform, *others = [block._replace(only=NEAR) for block in plan]
    return [
        main._replace(only=(), tolerances=TOLERANCES), uniform._replace(tolerances=TOLERANCES),
        *others,
    ]


def cpu_plan(case, bf16_case):
    """Three profiles first, then what is asked of one of them."""
    def sized(profile):
        hidden, vocab = profiles.SIZES.get(profile, (case.hidden, case.vocab))
        return dataclasses.replace(case, hidden=hidden, vocab=vocab)

    return [
        Block(case, tolerances=TOLERANCES),
        *(Block(sized(profile), profile, only=FEW, tolerances=TOLERANCES)
          for profile in ("uniform", "smollm2")),
        Block(dataclasses.replace(case, rows=LONG * case.rows), only=(OURS, *TOLERANT_ROWS)),
        Block(case, frozen_head=True), Block(case, live=0.5), Block(bf16_case, timed=False),
    ]


class Attempts:
    """Runs functions of providers; one that fails is dropped with its reason, the others go on,
    unless failures are fatal."""

    def __init__(self, fatal):
        self.fatal, self.failed = fatal, {}

    def __call__(self, name, function):
        """function(), or None if it fails now or failed before."""
        if name in self.failed:
            return None
        try:
            return function()
        except Exception as error:  # out of memory at this size, or a peer's own limit
            if self.fatal:
                raise
            kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else (
                f"{type(error).__name__}: {first_line(error)}")
            self.failed[name] = kind
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def judge(block, problem, providers, attempt):
    """{name: GEMM work and errors}, and the same by tolerance, against one fp64 truth, which is
    freed on return."""
    truth, live_rows, found, kept = measure.exact(problem), problem.live(), {}, {}

    def measured(step):
        kept.clear()
        nhv = measure.measured_nhv(
            block.case, lambda: kept.update(measure.gradients(problem, step))
        )
        return {"nhv": round(nhv, 2), "errors": measure.errors(kept, truth, live_rows)}

    def one(provider):
        if provider.in_torch and not provider.compiled:
            return measured(provider.step)
        wrong = measure.errors(measure.gradients(problem, provider.step), truth, live_rows)
        if provider.in_torch:  # compiled by now: the profiler sees what runs, not what is traced
            return measured(provider.step)
        nhv = provider.stated_nhv(block.frozen_head, len(live_rows) / block.case.rows)
        return {"nhv": round(nhv, 2), "errors": wrong}

    for provider in providers:
        result = attempt(provider.name, lambda provider=provider: one(provider))
        if result is not None:
            found[provider.name] = result
    rows, exact = [], {}
    for tolerance in (0.0, *block.tolerances) if block.tolerances else ():
        def step(problem, tolerance=tolerance):
            return measure.fused(problem, "auto", tolerance)

        row = attempt(f"tolerance {tolerance:g}", lambda step=step: measured(step))
        if row is not None:
            outputs = {k: kept[k] for k in ("loss", "log_probs", "teacher_log_probs")}
            exact = exact or outputs
            same = all(torch.equal(outputs[k], exact[k]) for k in exact)
            rows.append({"tolerance": tolerance, **row, "same_bits": same})
    return found, rows


def run_block(block, providers, *, rounds, warmup_s, device="cpu"):
    """One table: all providers on one problem."""
    torch._dynamo.reset()  # compiled code of another block's shape does not use up its limit
    on_gpu, case = device != "cpu", block.case
    problem = measure.make_problem(
        case, profile=block.profile, frozen_head=block.frozen_head, live=block.live, device=device
    )
    attempt = Attempts(fatal=not on_gpu)
    providers = [p for p in providers if not block.only or p.name in block.only]
    found, by_tolerance = judge(block, problem, providers, attempt)
    live_rows = problem.live()
    result = {
        "asked": block.label(), "shape": case.label(), "rows": case.rows, "hidden": case.hidden,
        "vocab": case.vocab, "profile": problem.profile, "entropy": problem.entropy,
        "frozen_head": block.frozen_head, "live": len(live_rows) / case.rows,
        "timed": block.timed, "only": block.only, "providers": found, "by_tolerance": by_tolerance,
    }
    if on_gpu:
        result |= {"model": case.model, "not_run": attempt.failed}
    if not block.timed:
        return result

    def whole_step(step):
        loss, *_ = step(problem)
        loss.backward()

    flush = None
    if on_gpu:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        flush = torch.empty(4 * max(cache, common.MIB), dtype=torch.int8, device=device)

    def between():
        measure.clear(problem)
        if flush is not None:  # nothing of an earlier call is left in the L2 cache
            flush.zero_()

    clock = measure.CLOCKS[torch.device(device).type]
    steps = {p.name: lambda step=p.step: whole_step(step) for p in providers if p.name in found}
    for name, step in list(steps.items()) if on_gpu else ():
        # Memory first: a provider that fails here does not stop the rounds.
        between()
        attempt(name, step)
        between()
        peak = attempt(name, lambda step=step: measure.peak_extra_bytes(step, device))
        if peak is None:
            del steps[name], found[name]
        else:
            found[name]["peak_bytes"] = peak
    bare = measure.BareGEMMs(problem)
    seconds = measure.interleave(steps | {plot.BARE: bare}, rounds, warmup_s, between, clock)
    result["bare"] = measure.summary(seconds.pop(plot.BARE))
    del bare  # before memory is measured
    for name, values in seconds.items():
        measure.clear(problem)
        found[name]["time"] = measure.summary(values)
        if not on_gpu:
            found[name]["peak_bytes"] = measure.peak_extra_bytes(steps[name])
    return result


def probe(providers, device, limit_s=PROBE_S):
    """Why each provider cannot run, or None, each tried in a process of its own: a crash, a hang or
    an illegal access of one leaves the others alone. All run side by side."""
    command = [sys.executable, "-m", "bench.bench_loss", "--device", device, "--probe"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(common.ROOT), *sys.path[1:]])}
    running = {
        p.name: subprocess.Popen(
            [*command, p.name], cwd=common.ROOT, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )
        for p in providers
    }
    end, reasons = time.monotonic() + limit_s, {}
    for name, process in running.items():
        try:
            out, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
            lines = out.strip().splitlines()
            if lines and lines[-1].startswith("probe: "):
                said = lines[-1].removeprefix("probe: ")
                reasons[name] = None if said == "ok" else said
            else:
                reasons[name] = f"its process ended with status {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            reasons[name] = f"it did not finish a small problem in {limit_s} s"
    return reasons


def affordable(block_work, done_work, spent_s, left_s):
    """Whether a block fits the time left, judged by the seconds per unit of work so far."""
    return done_work == 0 or spent_s / done_work * block_work <= left_s


def resumed(path, fresh):
    """The results at `path`, to go on with, or `fresh` where there are none; UserError where a
    block of one would not go with a block of the other."""
    if not path.exists():
        return fresh
    found = json.loads(path.read_text(encoding="utf-8"))

    def fixed(results):
        return {k: results["environment"][k] for k in ("cpu", "threads", "git", "dirty", "versions")
                } | {k: results[k] for k in ("rounds", "warmup_s", "providers")}

    old, new = fixed(found), fixed(fresh)
    if differing := [k for k in old if old[k] != new[k]]:
        raise UserError(
            f"--resume cannot add to {path}: {', '.join(differing)} differ from this run's. Leave "
            "--resume out to measure all of it anew."
        )
    found.pop("not_reached", None)
    return found


def main(argv=None):
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--case", default="main", choices=common.CASES, help="on a CPU")
    parser.add_argument("--bf16_case", default="bf16", choices=common.CASES, help="on a CPU")
    parser.add_argument("--full", action="store_true", help="on a GPU: every model, N, head, live")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="budget")
    parser.add_argument("--resume", action="store_true", help="add the blocks that --out lacks")
    parser.add_argument("--rounds", type=int, help="at least 5 for figures to quote, 30 on a GPU")
    parser.add_argument("--warmup", type=float, help="seconds per provider and block")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="leave out")
    parser.add_argument("--probe", metavar="NAME", help="only say whether this provider runs")
    args = parser.parse_args(argv)
    on_gpu = args.device == "cuda"
    everyone = providers_for(args.device)
    names = [p.name for p in everyone]
    for name in (*args.without, *([args.probe] if args.probe else [])):
        if name not in names:
            parser.error(f"there is no provider {name!r}, only: {'; '.join(names)}")
    if args.probe:
        provider = everyone[names.index(args.probe)]
        print(f"probe: {provider.obstacle(args.device) or 'ok'}", flush=True)
        return
    if args.out is None:
        parser.error("--out is needed")
    rounds = ROUNDS[args.device] if args.rounds is None else args.rounds
    warmup_s = (0.5 if on_gpu else 1.0) if args.warmup is None else args.warmup
    if on_gpu:
        reasons = probe(everyone, args.device)
    else:
        torch.set_num_threads(args.threads)
        reasons = {p.name: p.obstacle() for p in everyone}
    reasons |= dict.fromkeys(args.without, "left out by --without")
    providers = [p for p in everyone if reasons[p.name] is None]
    results = {
        "environment": common.environment(GPU_PACKAGES if on_gpu else PACKAGES, args.device),
        "rounds": rounds, "warmup_s": warmup_s,
        "providers": [
            {
                "name": p.name, "call": p.call, "package": p.package, "logits": p.logits,
                "not_run": reasons[p.name],
            }
            for p in everyone
        ],
        "blocks": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    if args.resume:
        try:
            results = resumed(path, results)
        except UserError as error:
            parser.error(str(error))
    if on_gpu:
        plan = gpu_plan(args.full)
    else:
        plan = cpu_plan(common.CASES[args.case], common.CASES[args.bf16_case])
    there = {block["asked"] for block in results["blocks"]}

    def save():
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    done, first = 0, time.monotonic()
    for block in plan:
        if block.label() in there:
            continue
        now, case = time.monotonic(), block.case
        work = case.rows * case.hidden * case.vocab * (len(block.only) or len(providers))
        missing = "the time was over"
        if affordable(work, done, now - first, args.seconds - (now - start)):
            try:
                found = run_block(
                    block, providers, rounds=rounds, warmup_s=warmup_s, device=args.device
                )
                missing = ""
            except UserError as error:  # a profile without its packages
                missing = str(error)
        if missing:
            results.setdefault("not_reached", []).append([block.label(), missing])
        else:
            done += work
            results["blocks"].append(found)
            print(plot.block_table(results, found), flush=True)
        save()  # after each block: a late failure costs one
    plot.draw(args.out)


if __name__ == "__main__":
    main()
