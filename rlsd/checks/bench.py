"""`rlsd bench`: one RLSD step on this machine, by plain PyTorch and by every implementation.

Forward and backward on one problem, interleaved, medians; beside the time the peak memory beyond
the inputs, the GEMM work in NHV (see measure.py) and the deviation from fp64, exact and with a
gradient tolerance. The repository's bench/ has the long version, beside other libraries.
"""

import os
import platform

import torch

from rlsd_kernels import available_impls

from ..config import UserError
from . import measure
from .profiles import PROFILES, SIZES

EAGER, BARE = "PyTorch, full logits", "its GEMMs alone"
# Half a minute on two cores; on a GPU the head of a 1.7 B model, 1.2 GB of bf16 logits.
CASES = {
    "cpu": measure.Case(512, 768, 16384),
    "cuda": measure.Case(4096, 2048, 151936, torch.bfloat16),
}
ROUNDS = {"cpu": 5, "cuda": 30}
DTYPES = {name: dtype for dtype, name in measure.NAMES.items()}
TOLERANCE = 1e-3
OPTIONS = ("device", "profile", "rows", "hidden_size", "vocab_size", "dtype", "live", "rounds")
COLUMNS = ("profile", "nats", "ms", "p20", "p80", "x eager", "% of GEMMs", "peak MiB", "NHV",
           "log-prob", "dH", "dW")


def settings(options):
    """(device, case, profile, live, rounds) from the command's options, UserError for one that is
    wrong."""
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise UserError(
            f"rlsd bench has no option --{unknown[0]}; there are --{', --'.join(OPTIONS)}."
        )
    device = options.get("device", "auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in CASES:
        raise UserError(f"--device must be auto, cpu or cuda, but got {device}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU and PyTorch sees none; use --device cpu.")
    profile = options.get("profile", "trained")
    if profile not in PROFILES:
        raise UserError(f"--profile must be one of {', '.join(PROFILES)}, but got {profile}.")
    case = CASES[device]
    hidden, vocab = SIZES.get(profile, (case.hidden, case.vocab))
    numbers = {"rows": case.rows, "hidden_size": hidden, "vocab_size": vocab,
               "rounds": ROUNDS[device]}
    for name in numbers:
        value = numbers[name] = options.get(name, numbers[name])
        low = 16 if name == "rows" else 1  # the problem has 16 sequences
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise UserError(f"--{name} must be a whole number of at least {low}, but got {value}.")
        if value >= 2**31:
            raise UserError(f"--{name} must be less than {2**31}.")
    dtype = options.get("dtype", measure.NAMES[case.dtype])
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, but got {dtype}.")
    live = options.get("live", 1.0)
    if not isinstance(live, (int, float)) or isinstance(live, bool) or not 0 < live <= 1:
        raise UserError(f"--live must be a share of rows in (0, 1], but got {live}.")
    case = measure.Case(
        numbers["rows"], numbers["hidden_size"], numbers["vocab_size"], DTYPES[dtype]
    )
    return device, case, profile, float(live), numbers["rounds"]


def steps_here(device, dtype):
    """{name: step} of what runs here, and {name: reason} of what does not."""
    status = available_impls(torch.empty(0, dtype=dtype, device=device))
    impls = [impl for impl in ("cuda", "triton", "torch") if impl in status]
    if device == "cpu":  # Triton's interpreter is a debugger
        status |= {impl: "for a GPU" for impl in ("cuda", "triton")}
    steps = {EAGER: measure.eager}
    for impl in impls:
        if status[impl] == "ok":
            steps[f"rlsd, impl='{impl}'"] = lambda problem, impl=impl: measure.fused(problem, impl)
            steps[f"rlsd, impl='{impl}', {TOLERANCE}"] = (
                lambda problem, impl=impl: measure.fused(problem, impl, TOLERANCE)
            )
    return steps, {f"rlsd, impl='{i}'": status[i] for i in impls if status[i] != "ok"}


def run(options, log=print):
    """Print the table; returns {name: {"profile", "entropy" (nats), "ms", "p20", "p80", "peak",
    "nhv", "errors"}}."""
    device, case, profile, live, rounds = settings(options)
    steps, absent = steps_here(device, case.dtype)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    threads = "" if device == "cuda" else f", {torch.get_num_threads()} threads"
    share = "" if live == 1 else f", {live:.0%} of the rows live"
    log(f"One RLSD step, forward and backward: {case.label()}{share}; {name}{threads}.")
    problem = measure.make_problem(case, profile=profile, live=live, device=device)
    truth, rows = measure.exact(problem), problem.live()

    def whole_step(step):
        loss, *_ = step(problem)
        loss.backward()

    # The profiler of a CUDA build complains where there is no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    results, calls = {}, {}
    for label, step in steps.items():
        results[label] = {
            "profile": problem.profile, "entropy": problem.entropy,
            "errors": measure.errors(measure.gradients(problem, step), truth, rows),
            "nhv": measure.measured_nhv(case, lambda step=step: measure.gradients(problem, step)),
        }
        calls[label] = lambda step=step: whole_step(step)
    del truth
    seconds = measure.interleave(
        calls | {BARE: measure.BareGEMMs(problem)}, rounds, 0.2, lambda: measure.clear(problem),
        measure.CLOCKS[device],
    )
    bare = measure.summary(seconds.pop(BARE))["ms"]
    log(f"\n{'':<28}" + "".join(f"{column:>11}" for column in COLUMNS))
    for label, values in seconds.items():
        measure.clear(problem)
        found = results[label] | measure.summary(values)
        found["peak"] = None
        if device == "cuda" or platform.system() == "Linux":
            found["peak"] = measure.peak_extra_bytes(calls[label], device) / 2**20
        results[label] = found
        e = found["errors"]
        cells = (
            found["profile"], *(f"{found[k]:.2f}" for k in ("entropy", "ms", "p20", "p80")),
            f"{results[EAGER]['ms'] / found['ms']:.2f}", f"{100 * bare / found['ms']:.0f}",
            "-" if found["peak"] is None else f"{found['peak']:.0f}", f"{found['nhv']:.1f}",
            f"{e['log_prob']:.1e}", f"{e['d_hidden']:.1e}", f"{e['d_weight']:.1e}",
        )
        log(f"{label:<28}" + "".join(f"{cell:>11}" for cell in cells))
    for label, reason in absent.items():
        log(f"{label:<28}not run: {reason}")
    log(
        f"\nMedians of {rounds} rounds, interleaved. {TOLERANCE}: gradient_tolerance, else exact. "
        "Nats: mean entropy of\nthe profile. % of GEMMs: time of an exact step's products (8 NHV) "
        "over the step's. Peak: beyond the\ninputs, gradients included. NHV: GEMM FLOPs / "
        "(rows x H x V). Errors against fp64: log-probs in nats\n(largest), dH and dW relative."
    )
    return results
