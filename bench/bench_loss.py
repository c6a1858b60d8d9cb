"""Forward and backward of the loss by every provider, interleaved in one process.

    make bench        pytest-benchmark at a small shape, checked against the specification
    make bench-cpu    python -m bench.bench_loss: all providers, JSON, table and plot
    python -m bench.bench_loss --device cuda --out ...     named models on a GPU, see gpu_run.sh

Quote ratios within one run, never times of a shared machine.
"""

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import common, plot
from bench.providers import PROVIDERS, Provider, first_line, providers_for
from rlsd.checks import measure

# Head frozen or not, share of live rows.
BLOCKS = ((False, 1.0), (True, 1.0), (False, 0.5))
# Model, rows, head frozen or not, share of live rows; what a GPU's budget should buy comes first.
GPU_BLOCKS = (
    ("Qwen3-8B", 8192, False, 1.0), ("Qwen3-8B", 8192, False, 0.3),
    ("Qwen3-1.7B", 8192, False, 1.0), ("Qwen3-8B", 8192, True, 1.0),
    ("Qwen3-8B", 2048, False, 1.0), ("Llama-3-8B", 8192, False, 1.0),
    ("Gemma-3-4B", 8192, False, 1.0), ("Qwen3-8B", 8192, False, 0.5),
    ("Qwen3-4B", 8192, False, 1.0), ("Qwen3-8B", 32768, False, 1.0),
)
GPU_MODELS = ("Qwen3-8B", "Qwen3-1.7B", "Qwen3-4B", "Llama-3-8B", "Gemma-3-4B")
GPU_ROWS, LIVE, HEADS = (8192, 2048, 32768), (1.0, 0.5, 0.3), (False, True)
PACKAGES = ("torch", "trl", "liger-kernel", "cut-cross-entropy", "transformers", "triton", "numpy")
GPU_PACKAGES = (*PACKAGES, "verl", "nvidia-cutlass-dsl", "cuda-tile")
ROUNDS = {"cpu": 9, "cuda": 30}
PROBE_S = 150  # compiling a CuTe kernel takes tens of seconds


@pytest.mark.parametrize("provider", PROVIDERS, ids=Provider.id)
@pytest.mark.parametrize("head", ["full", "frozen"])
def test_step(benchmark, provider, head):
    reason = provider.obstacle()
    if reason:
        pytest.skip(reason)
    problem = measure.make_problem(common.CASES["small"], frozen_head=head == "frozen", live=0.8)
    got = measure.gradients(problem, provider.step)
    wrong = measure.errors(got, measure.exact(problem), problem.live())
    assert all(wrong[k] < 1e-4 for k in wrong if wrong[k] is not None), wrong

    def step():
        measure.clear(problem)
        loss, *_ = provider.step(problem)
        loss.backward()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


def gpu_plan(full):
    """Blocks in the order in which a budget is spent on them; full: every combination."""
    rest = itertools.product(GPU_MODELS, GPU_ROWS, HEADS, LIVE) if full else ()
    return list(dict.fromkeys([*GPU_BLOCKS, *rest]))


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


def judge(case, problem, providers, frozen_head, attempt):
    """{name: GEMM work and errors} against one fp64 truth, which is freed on return."""
    truth, live_rows, found = measure.exact(problem), problem.live(), {}

    def one(provider):
        def gradients():
            return measure.gradients(problem, provider.step)

        wrong = measure.errors(gradients(), truth, live_rows)
        if provider.in_torch:
            nhv = measure.measured_nhv(case, gradients)
        else:
            nhv = provider.stated_nhv(frozen_head, len(live_rows) / case.rows)
        return {"nhv": round(nhv, 2), "errors": wrong}

    for provider in providers:
        result = attempt(provider.name, lambda provider=provider: one(provider))
        if result is not None:
            found[provider.name] = result
    return found


def run_block(case, providers, *, frozen_head, live, rounds, warmup_s, device="cpu"):
    """One table: all providers on one problem. rounds=0 measures accuracy alone."""
    torch._dynamo.reset()  # compiled code of another block's shape does not use up its limit
    on_gpu = device != "cpu"
    problem = measure.make_problem(case, frozen_head=frozen_head, live=live, device=device)
    attempt = Attempts(fatal=not on_gpu)
    found = judge(case, problem, providers, frozen_head, attempt)
    live_rows = problem.live()
    block = {
        "shape": case.label(), "rows": case.rows, "hidden": case.hidden, "vocab": case.vocab,
        "frozen_head": frozen_head, "live": len(live_rows) / case.rows, "timed": rounds > 0,
        "providers": found,
    }
    if on_gpu:
        block |= {"model": case.model, "not_run": attempt.failed}
    if not rounds:
        return block

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
    block["bare"] = measure.summary(seconds.pop(plot.BARE))
    del bare  # before memory is measured
    for name, values in seconds.items():
        measure.clear(problem)
        found[name]["time"] = measure.summary(values)
        if not on_gpu:
            found[name]["peak_bytes"] = measure.peak_extra_bytes(steps[name])
    return block


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


def main(argv=None):
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--case", default="main", choices=common.CASES, help="on a CPU")
    parser.add_argument("--bf16_case", default="bf16", choices=common.CASES, help="on a CPU")
    parser.add_argument("--full", action="store_true", help="on a GPU: every model, N, head, live")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="on a GPU: budget")
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
    if on_gpu:
        plan = [(common.model_case(m, n), head, live, rounds)
                for m, n, head, live in gpu_plan(args.full)]
    else:
        plan = [(common.CASES[args.case], *block, rounds) for block in BLOCKS]
        plan.append((common.CASES[args.bf16_case], False, 1.0, 0))
    done, first = 0, time.monotonic()
    for case, frozen_head, live, block_rounds in plan:
        now, work = time.monotonic(), case.rows * case.hidden * case.vocab
        if not affordable(work, done, now - first, args.seconds - (now - start)):
            results.setdefault("not_reached", []).append([case.label(), frozen_head, live])
            continue
        block = run_block(
            case, providers, frozen_head=frozen_head, live=live, rounds=block_rounds,
            warmup_s=warmup_s, device=args.device,
        )
        done += work
        results["blocks"].append(block)
        print(plot.block_table(results, block), flush=True)
        text = json.dumps(results, indent=1) + "\n"  # after each block: a late failure costs one
        (args.out / "results.json").write_text(text, encoding="utf-8")
    plot.draw(args.out)


if __name__ == "__main__":
    main()
