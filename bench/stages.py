"""What the pipeline's plan rests on, measured: ceilings of the device, and each stage on its own.

    python -m bench.stages --device cuda --out FOLDER     # writes FOLDER/stages.json

copy     device-to-device bandwidth, bytes read plus written
gemm     the head's products, 16-bit and fp32 results: a burst after a pause, and sustained
exp      the streaming kernels alone (4V bytes a row read, 2V written with a store), their GEMM left
         out; target logits, target fix and token kernel
split    dH over few rows, the vocabulary split into S parts that are summed
tier     GEMM, then exp (A) against one GEMM with the exp inside (B), per rows and H
teacher  log-probs without gradient, whole: this library beside QuACK's kernel
step     whole steps, exact and with a tolerance, and the device's time in them by kernel

Medians in ms; every part is written when it is done and starts only within --seconds.
"""

import argparse
import importlib
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from bench import common
from bench.bench_loss import GPU_PACKAGES
from bench.providers import first_line
from rlsd.checks import measure
from rlsd_kernels import RLSDLossConfig, available_impls, gemm, linear_log_probs
from rlsd_kernels.logprob import load_impl

LARGEST = 20  # kernels of a step that are listed


@dataclass(frozen=True)
class Sizes:
    """What is measured: rows of a step and of a chunk, hidden sizes, vocabulary, dtype, rounds,
    seconds of a sustained run and of the pause before a burst."""

    rows: int = 8192
    chunk: int = 2048
    hidden: tuple[int, ...] = (4096, 2048)
    tier_hidden: tuple[int, ...] = (4096, 2560, 2048, 1024)
    tier_rows: tuple[int, ...] = (1024, 2048, 4096, 8192)
    split_rows: tuple[int, ...] = (1024, 2048, 8192)
    splits: tuple[int, ...] = (1, 2, 4)
    vocab: int = 151936
    dtype: torch.dtype = torch.bfloat16
    copy_bytes: int = 4 * 2**30
    rounds: int = 15
    sustained_s: float = 1.0
    pause_s: float = 0.3


# Enough to run every line: for tests.
TINY = Sizes(
    rows=48, chunk=16, hidden=(24,), tier_hidden=(24,), tier_rows=(16, 32), split_rows=(16,),
    splits=(1, 2), vocab=304, dtype=torch.float32, copy_bytes=2**16, rounds=2, sustained_s=0.01,
    pause_s=0.0,
)


class Bench:
    """Operands on one device, and its clock."""

    def __init__(self, sizes, device):
        self.sizes, self.device = sizes, device
        self.clock = measure.CLOCKS[torch.device(device).type]
        self.rng = torch.Generator(device).manual_seed(0)

    def randn(self, *shape, scale=1.0):
        x = torch.randn(*shape, generator=self.rng, device=self.device)
        return x.mul_(scale).to(self.sizes.dtype)

    def time(self, function, rounds=None):
        """Median, 20th and 80th percentile in ms."""
        measure.warm_up(function, 0.05, lambda: None, self.clock)
        seconds = [self.clock(function) for _ in range(rounds or self.sizes.rounds)]
        return {k: v for k, v in measure.summary(seconds).items() if k != "rounds"}

    def out_dtypes(self):
        """Results that the products are asked for: as the operands, and in fp32."""
        dtype = self.sizes.dtype
        on_gpu = torch.device(self.device).type == "cuda"
        return [dtype, torch.float32] if on_gpu and dtype != torch.float32 else [dtype]

    def impls(self):
        """Implementations whose kernels run here; the interpreter is none."""
        status = available_impls(torch.empty(0, dtype=self.sizes.dtype, device=self.device))
        names = ("triton", "cuda", "torch") if self.device != "cpu" else ("torch",)
        return [name for name in names if status[name] == "ok"]


def mm(a, b, out):
    """a @ b into out, with the fp32 result that PyTorch only gives on request."""
    wide = {"out_dtype": out.dtype} if out.dtype != a.dtype else {}
    return torch.mm(a, b, out=out, **wide)


def copy(bench):
    source = torch.empty(bench.sizes.copy_bytes, dtype=torch.int8, device=bench.device).fill_(1)
    target = torch.empty_like(source)
    found = bench.time(lambda: target.copy_(source))
    return [found | {"tb_per_s": 2 * bench.sizes.copy_bytes / found["ms"] / 1e9}]


def products(bench, hidden):
    """name -> (a, b) of the step's GEMMs."""
    n, m, vocab = bench.sizes.rows, bench.sizes.chunk, bench.sizes.vocab
    h, weight = bench.randn(n, hidden), bench.randn(vocab, hidden, scale=0.02)
    e = bench.randn(n, vocab, scale=1e-3)
    return {"logits": (h, weight.T), "logits of a chunk": (h[:m], weight.T), "dx": (e, weight),
            "dw": (e.T, h)}


def sustained(bench, function):
    """ms of one call in a loop of sustained_s seconds, the first half left out."""
    halves = []
    for _ in range(2):
        start, calls = time.monotonic(), []
        while not calls or time.monotonic() - start < bench.sizes.sustained_s / 2:
            calls.append(bench.clock(lambda: [function() for _ in range(8)]) / 8)
        halves.append(calls)
    return measure.summary(halves[1])["ms"]


def gemms(bench):
    rows = []
    for hidden in bench.sizes.hidden:
        for name, (a, b) in products(bench, hidden).items():
            for dtype in bench.out_dtypes():
                out = torch.empty(len(a), b.shape[1], dtype=dtype, device=bench.device)
                flop = 2 * a.shape[0] * a.shape[1] * b.shape[1]
                bench.time(lambda a=a, b=b, out=out: mm(a, b, out), 2)
                time.sleep(bench.sizes.pause_s)
                burst = [bench.clock(lambda a=a, b=b, out=out: mm(a, b, out)) for _ in range(8)]
                burst = measure.summary(burst)["ms"]
                steady = sustained(bench, lambda a=a, b=b, out=out: mm(a, b, out))
                rows.append({
                    "product": name, "hidden": hidden, "result": measure.NAMES[dtype],
                    "burst_ms": burst, "sustained_ms": steady,
                    "burst_tflops": flop / burst / 1e9, "sustained_tflops": flop / steady / 1e9,
                })
                del out
    return rows


def kernels(bench):
    """The stages around the GEMMs, for a chunk of rows (token kernel: all rows)."""
    sizes, rows = bench.sizes, []
    m, vocab, hidden = sizes.chunk, sizes.vocab, sizes.hidden[0]
    h, weight = bench.randn(m, hidden), bench.randn(vocab, hidden, scale=0.02)
    h = h.to(gemm.operand_dtype(weight))
    ids = torch.randint(vocab, (m,), generator=bench.rng, device=bench.device)
    c = (h.float() @ weight.float().T).logsumexp(-1)
    e = torch.empty(m, vocab, dtype=gemm.operand_dtype(weight), device=bench.device)
    tokens = [torch.rand(sizes.rows, generator=bench.rng, device=bench.device) for _ in range(5)]
    advantages, weights, *three = tokens
    log_probs, teacher, old = (-x for x in three)
    lam = torch.tensor(0.5, device=bench.device)
    for impl in bench.impls():
        module = load_impl(impl)
        scorer = module.Scorer(weight, None, 1.0, 1.0, None, m)
        scorer.score(h, c)  # the chunk is filled with real logits, which stay for the kernels
        stages = {
            "exp, no store": (lambda s=scorer: s.score(h, c), 4 * vocab),
            "exp, E stored": (lambda s=scorer: s.score(h, c, out=e, keep="exp"),
                              (4 + e.itemsize) * vocab),
            "target logits": (lambda k=module: k.target_logits(h, weight, ids),
                              2 * hidden * h.itemsize),
            "fix targets": (lambda k=module: k.fix_targets(e, ids, c), 0),
            "token kernel": (lambda k=module: k.token_rows(
                log_probs, advantages, weights, lam, RLSDLossConfig(), teacher_log_probs=teacher,
                old_log_probs=old), 0),
        }
        for name, (function, row_bytes) in stages.items():
            # Only the stage: the GEMM leaves what is there.
            with mock.patch.object(gemm, "logits", lambda h, weight, out: out):
                found = bench.time(function)
            n = sizes.rows if name == "token kernel" else m
            rows.append(found | {
                "impl": impl, "stage": name, "rows": n,
                "tb_per_s": n * row_bytes / found["ms"] / 1e9 if row_bytes else None,
            })
    return rows


def split_dx(bench):
    """dH in fp32 by one product, and by S products over parts of the vocabulary."""
    rows, vocab = [], bench.sizes.vocab
    dtype = bench.out_dtypes()[-1]
    wide = {"out_dtype": dtype} if dtype != bench.sizes.dtype else {}
    for hidden in bench.sizes.hidden:
        weight = bench.randn(vocab, hidden, scale=0.02)
        for m in bench.sizes.split_rows:
            e = bench.randn(m, vocab, scale=1e-3)
            for s in bench.sizes.splits:
                a, b = e.view(m, s, vocab // s).transpose(0, 1), weight.view(s, vocab // s, hidden)

                def call(a=a, b=b, s=s, e=e, weight=weight):
                    if s == 1:
                        return torch.mm(e, weight, **wide)
                    return torch.bmm(a, b, **wide).sum(0)

                found = bench.time(call)
                rows.append(found | {"rows": m, "hidden": hidden, "split": s,
                                     "tflops": 2 * m * vocab * hidden / found["ms"] / 1e9})
    return rows


def tiers(bench):
    """Scoring whole: logits and exp, with and without a store; A by chunks, B all rows at once."""
    if "triton" not in bench.impls():
        return []
    scorer_of, rows, sizes = load_impl("triton").Scorer, [], bench.sizes
    for hidden in sizes.tier_hidden:
        weight = bench.randn(sizes.vocab, hidden, scale=0.02)
        for m in sizes.tier_rows:
            h = bench.randn(m, hidden)
            c = torch.cat([(x.float() @ weight.float().T).logsumexp(-1) for x in h.split(1024)])
            out = torch.empty(m, sizes.vocab, dtype=sizes.dtype, device=bench.device)
            for keep in (None, "exp"):
                for tier in ("A", "B"):
                    step = min(m, sizes.chunk) if tier == "A" else m
                    scorer = scorer_of(weight, None, 1.0, 1.0, None, step, tier=tier)

                    def call(scorer=scorer, step=step, keep=keep, h=h, c=c, out=out):
                        for i in range(0, len(h), step):
                            r = slice(i, i + step)
                            scorer.score(h[r], c[r], out=out[r] if keep else None, keep=keep)

                    found = bench.time(call)
                    rows.append(found | {
                        "rows": m, "hidden": hidden, "keep": keep or "none", "tier": tier,
                        "tflops": 2 * m * hidden * sizes.vocab / found["ms"] / 1e9,
                    })
    return rows


def quack_log_probs(hidden, weight, ids):
    """QuACK's GEMM whose epilogue keeps log-sum-exp partials and the target's logit alone."""
    epilogue = importlib.import_module("quack.epilogue.library").lse_target_epi
    found = epilogue(hidden, weight.mT, store_d=False, target=ids, tuned=False)
    return found["target_logit"] - found["lse"]


def teacher(bench):
    """Log-probs of all rows without gradient, and their largest error on the first chunk."""
    sizes, hidden, rows = bench.sizes, bench.sizes.hidden[0], []
    case = measure.Case(sizes.rows, hidden, sizes.vocab, sizes.dtype)
    problem = measure.make_problem(case, device=bench.device)
    h, weight, ids = problem.teacher_hidden, problem.weight.detach(), problem.completion_ids
    head = h[: sizes.chunk // 4].double() @ weight.double().T
    exact = head.log_softmax(-1).gather(-1, ids[: len(head), None])[:, 0]
    del head
    calls = {
        f"RLSD, {impl}": lambda impl=impl: linear_log_probs(
            h, weight, ids, old_log_probs=problem.old_log_probs, impl=impl)
        for impl in bench.impls()
    } | {"QuACK": lambda: quack_log_probs(h, weight, ids)}
    for name, call in calls.items():
        try:
            with torch.no_grad():
                error = float((call()[: len(exact)].double() - exact).abs().max())
                found = bench.time(call)
        except Exception as error:  # absent, or it refuses this GPU
            rows.append({"name": name, "not_run": f"{type(error).__name__}: {first_line(error)}"})
            continue
        rows.append(found | {
            "name": name, "error": error,
            "tflops": 2 * sizes.rows * hidden * sizes.vocab / found["ms"] / 1e9,
        })
    return rows


def steps(bench):
    """What the device does in a step, under PyTorch's profiler, beside the step's time without."""
    sizes, rows = bench.sizes, []
    case = measure.Case(sizes.rows, sizes.hidden[0], sizes.vocab, sizes.dtype)
    problem = measure.make_problem(case, profile="trained", device=bench.device)
    for impl, tolerance in itertools.product(bench.impls(), (0.0, 1e-3)):

        def call(impl=impl, tolerance=tolerance):
            measure.clear(problem)
            loss, *_ = measure.fused(problem, impl, tolerance)
            loss.backward()

        found = bench.time(call)
        with torch.profiler.profile() as profile:
            call()
        kernels = sorted(
            ((e.self_device_time_total / 1e3, e.key) for e in profile.key_averages()
             if e.device_type != torch.autograd.DeviceType.CPU), reverse=True,
        )
        rows.append(found | {
            "impl": impl, "tolerance": tolerance, "kernels_ms": sum(ms for ms, _ in kernels),
            "largest": {name[:100]: round(ms, 3) for ms, name in kernels[:LARGEST]},
        })
    return rows


PARTS = {
    "copy": copy, "gemm": gemms, "exp": kernels, "tier": tiers, "split": split_dx,
    "teacher": teacher, "step": steps,
}


def run(sizes, device, path, seconds=float("inf"), log=print, parts=tuple(PARTS)):
    """These parts into path; one that fails leaves its reason and the others go on."""
    start, bench = time.monotonic(), Bench(sizes, device)
    results = {"environment": common.environment(GPU_PACKAGES, device), "parts": {}}
    for name in parts:
        if time.monotonic() - start > seconds:
            results["parts"][name] = {"not_run": f"the {seconds:g} s were over"}
            continue
        began = time.monotonic()
        try:
            rows = PARTS[name](bench)
        except Exception as error:
            rows = {"not_run": f"{type(error).__name__}: {first_line(error)}"}
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
        results["parts"][name] = rows
        log(f"{name}: {time.monotonic() - began:.1f} s")
        for row in rows if isinstance(rows, list) else [rows]:
            shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            log("  " + "  ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes of a test")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no part later")
    parser.add_argument("--parts", nargs="+", default=tuple(PARTS), choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="folder for stages.json")
    args = parser.parse_args(argv)
    run(
        TINY if args.tiny else Sizes(), args.device, args.out / "stages.json", args.seconds,
        parts=args.parts,
    )


if __name__ == "__main__":
    main()
