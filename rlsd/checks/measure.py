"""One RLSD step under the clock: the problem, its fp64 truth, time, peak memory and GEMM work.

A step is hidden, teacher hidden, W, ids, old log-probs, A, a -> loss, dH, dW. FLOPs are in NHV,
N tokens x H hidden x V vocabulary: one GEMM over the head is 2 NHV, and an exact full step cannot
do with less than 8 (logits of student and teacher, dH, dW), 6 with a frozen head. `rlsd bench` and
the repository's benchmark share this file: both time the same thing on the same inputs.
"""

import ctypes
import gc
import math
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from rlsd_kernels import RLSDLossConfig, fused_linear_rlsd_loss, ref

from ..config import UserError
from .profiles import PROFILES

CONFIG = RLSDLossConfig()
SEQUENCES, GROUP = 16, 4
# Rows of N x V that the problem and its truth hold at a time: cache-sized, or enough for a GPU.
CHUNK = {"cpu": 128, "cuda": 512}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Case:
    """N, H, V and dtype of a problem; model: whose head it is, if anybody's."""

    rows: int
    hidden: int
    vocab: int
    dtype: torch.dtype = torch.float32
    model: str = ""

    def label(self):
        shape = f"{NAMES[self.dtype]}, N={self.rows}, H={self.hidden}, V={self.vocab}"
        return f"{self.model}, {shape}" if self.model else shape


@dataclass(frozen=True)
class Problem:
    """Inputs of one step, rows flat. hidden, teacher_hidden (N, H); weight (V, H); completion_ids
    (N,) int64; old_log_probs (nats), advantages, loss_weights (N,) fp32."""

    hidden: torch.Tensor
    teacher_hidden: torch.Tensor
    weight: torch.Tensor
    completion_ids: torch.Tensor
    old_log_probs: torch.Tensor
    advantages: torch.Tensor
    loss_weights: torch.Tensor
    profile: str = "uniform"
    entropy: float = math.nan  # mean of the student's softmax over all rows, nats

    def live(self):
        """Indices of the rows that the loss depends on."""
        return ref.live_tokens(self.loss_weights, self.advantages, CONFIG).nonzero().squeeze(-1)


def make_problem(case, *, profile="uniform", frozen_head=False, live=1.0, seed=0, device="cpu"):
    """A rollout that the model itself sampled: ids from its own softmax, an old policy 0.05 nats
    away, A relative to groups of four sequences.

    profile: one of profiles.PROFILES, whose hidden states and head they are. live: share of rows
    with a_t != 0 and A != 0, exact to one row. About half of the dead rows are groups of equal
    rewards (A = 0, which only this library drops), the others masked padding.
    """
    rng = torch.Generator(device).manual_seed(seed)
    n = case.rows

    def randn(*shape):
        return torch.randn(*shape, generator=rng, device=device)

    if profile not in PROFILES:
        raise UserError(f"profile must be one of {', '.join(PROFILES)}, but got {profile!r}.")
    *made, drawn = PROFILES[profile](case, rng)
    # A profile may give the same tensors again: whether they require a gradient is ours to say.
    hidden, teacher, weight = (x.to(device, case.dtype).detach() for x in made)

    head, ids, log_probs, entropy = weight.float(), [], [], 0.0
    for r in torch.arange(n, device=device).split(CHUNK[hidden.device.type]):
        log_p = (hidden[r].float() @ head.T).log_softmax(-1)
        p = log_p.exp()
        entropy -= float((p * log_p).sum()) / n
        if drawn is None:
            ids.append(torch.multinomial(p, 1, generator=rng))
        else:
            ids.append(drawn.to(device)[r, None])
        log_probs.append(log_p.gather(-1, ids[-1]))
    del head, log_p, p
    old = torch.cat(log_probs)[:, 0] + 0.05 * randn(n)

    sequence = torch.arange(n, device=device) * SEQUENCES // n
    rewards = randn(SEQUENCES // GROUP, GROUP)
    a = (rewards - rewards.mean(-1, keepdim=True)) / rewards.std(-1, keepdim=True)
    a[: round((1 - live) / 2 * len(a))] = 0
    advantages = a.flatten()[sequence]
    mask = torch.ones(n, device=device)
    first = (sequence * n + SEQUENCES - 1) // SEQUENCES
    position = torch.arange(n, device=device) - first
    candidates = advantages.nonzero().squeeze(-1)
    candidates = candidates[position[candidates].argsort(stable=True)]
    mask[candidates[round(live * n):]] = 0  # the ends of the responses
    return Problem(
        hidden.requires_grad_(), teacher, weight.requires_grad_(not frozen_head),
        torch.cat(ids)[:, 0], old, advantages, mask / mask.sum(), profile, entropy,
    )


def clear(problem):
    problem.hidden.grad = problem.weight.grad = None


def gradients(problem, step):
    """Run step(problem) -> (loss, log_probs, teacher_log_probs) and its backward; returns those
    with dH and dW (None for a frozen head), and leaves no gradient on the problem."""
    clear(problem)
    loss, log_probs, teacher = step(problem)
    loss.backward()
    out = {
        "loss": loss.detach(), "log_probs": log_probs.detach(), "teacher_log_probs": teacher,
        "d_hidden": problem.hidden.grad, "d_weight": problem.weight.grad,
    }
    clear(problem)
    return out


def token_loss(problem, log_probs, teacher_log_probs):
    """The RLSD loss in plain PyTorch on (N,) log-probs: what stands on top of every peer."""
    keep = log_probs.dtype
    return ref.rlsd_loss(
        log_probs, problem.advantages.to(keep), problem.loss_weights.to(keep),
        teacher_log_probs=teacher_log_probs, old_log_probs=problem.old_log_probs.to(keep),
        ref_log_probs=None, reweight_mask=None, entropy=None, rlsd_lambda=CONFIG.rlsd_lambda,
        config=CONFIG,
    )


def compose(log_probs, problem):
    """An RLSD step from a differentiable log_probs(hidden, weight, ids)."""
    with torch.no_grad():
        teacher = log_probs(problem.teacher_hidden, problem.weight, problem.completion_ids)
    student = log_probs(problem.hidden, problem.weight, problem.completion_ids)
    return token_loss(problem, student, teacher), student, teacher


def full_logits(hidden, weight, ids):
    """What most trainers write, with the usual cast to fp32 after the GEMM."""
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    return log_p.gather(-1, ids[:, None])[:, 0]


def eager(problem):
    """The step as plain PyTorch, all logits at once."""
    return compose(full_logits, problem)


def fused(problem, impl, gradient_tolerance=0.0):
    """The step as one call of this library."""
    out = fused_linear_rlsd_loss(
        problem.hidden, problem.weight, problem.completion_ids, problem.advantages,
        teacher_hidden=problem.teacher_hidden, old_log_probs=problem.old_log_probs,
        loss_weights=problem.loss_weights, config=CONFIG, impl=impl,
        gradient_tolerance=gradient_tolerance,
    )
    return out.loss, out.log_probs, out.teacher_log_probs


def exact(problem, chunk=None):
    """What `gradients` returns, in fp64 from the same inputs, holding (chunk, V) at a time."""
    head = problem.weight.detach().double()
    ids, device = problem.completion_ids, head.device

    def log_softmax(hidden, rows):
        return (hidden.detach()[rows].double() @ head.T).log_softmax(-1)

    chunks = torch.arange(len(ids), device=device).split(chunk or CHUNK[device.type])
    student, teacher = (
        torch.cat([log_softmax(h, r).gather(-1, ids[r, None])[:, 0] for r in chunks])
        for h in (problem.hidden, problem.teacher_hidden)
    )
    student.requires_grad_()
    loss = token_loss(problem, student, teacher)
    (g,) = torch.autograd.grad(loss, student)
    d_hidden = torch.zeros_like(problem.hidden, dtype=torch.float64, requires_grad=False)
    d_weight = torch.zeros_like(head) if problem.weight.requires_grad else None
    for rows in chunks:
        dz = log_softmax(problem.hidden, rows).exp_().mul_(-g[rows, None])
        dz[torch.arange(len(rows), device=device), ids[rows]] += g[rows]
        d_hidden[rows] = dz @ head
        if d_weight is not None:
            d_weight.addmm_(dz.T, problem.hidden.detach()[rows].double())
    return {
        "loss": loss.detach(), "log_probs": student.detach(), "teacher_log_probs": teacher,
        "d_hidden": d_hidden, "d_weight": d_weight,
    }


def errors(got, truth, live):
    """Deviations from fp64 over the live rows: log_prob (max, nats, student and teacher),
    ratio_off (share of ratios exp(log p - truth) outside 1 +- 1 %), loss (absolute: both signs of
    A cancel in it), d_hidden and d_weight (relative, Frobenius; d_weight None if frozen)."""
    off = torch.stack(
        [(got[k].double() - truth[k])[live] for k in ("log_probs", "teacher_log_probs")]
    )

    def relative(key):
        if truth[key] is None:
            return None
        return float((got[key].double() - truth[key]).norm() / truth[key].norm())

    return {
        "log_prob": float(off.abs().max()),
        "ratio_off": float((off[0].exp() - 1).abs().gt(0.01).double().mean()),
        "loss": float((got["loss"] - truth["loss"]).abs()), "d_hidden": relative("d_hidden"),
        "d_weight": relative("d_weight"),
    }


def measured_nhv(case, function):
    """GEMM FLOPs of one call in NHV, read off the matrix products that PyTorch runs."""
    operands = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1,
                "aten::baddbmm": 1}
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, record_shapes=True) as profile:
        function()
    flops = 0
    for event in profile.events():
        if event.name in operands:
            a, b = event.input_shapes[operands[event.name]:][:2]
            flops += 2 * b[-1] * torch.Size(a).numel()
    return flops / (case.rows * case.hidden * case.vocab)


class BareGEMMs:
    """The matrix products that an exact step over the live rows cannot do without, and nothing
    else: two logits, dH, and dW unless the head is frozen, each a full-size call into memory at
    hand."""

    def __init__(self, problem):
        live = problem.live()
        self.h, self.t = (x.detach()[live] for x in (problem.hidden, problem.teacher_hidden))
        self.weight = problem.weight.detach()
        self.z = self.h.new_empty(len(live), len(self.weight))
        self.dh = torch.empty_like(self.h)
        self.dw = torch.empty_like(self.weight) if problem.weight.requires_grad else None

    def __call__(self):
        torch.mm(self.t, self.weight.T, out=self.z)
        torch.mm(self.h, self.weight.T, out=self.z)
        torch.mm(self.z, self.weight, out=self.dh)
        if self.dw is not None:
            torch.mm(self.z.T, self.h, out=self.dw)


def balanced_order(names, round_index):
    """The order of one round. In len(names) consecutive rounds (twice as many if odd) each name
    stands once (twice) at each place and follows each other name equally often (a Williams
    design), so that no provider always runs in the wake of the same other."""
    k = len(names)
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(k)]
    order = [names[(z + round_index) % k] for z in zigzag]
    return order[::-1] if k % 2 and round_index // k % 2 else order


def host_clock(function):
    """Seconds of one call on the CPU."""
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    del result
    return seconds


def event_clock(function):
    """Seconds between two CUDA events around one call, whatever the host does meanwhile."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = function()
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end) / 1e3


CLOCKS = {"cpu": host_clock, "cuda": event_clock}


def warm_up(step, seconds, between, clock=host_clock):
    """Call step until so many seconds of it are over, at least once."""
    while True:
        between()
        seconds -= clock(step)
        if seconds <= 0:
            return


def interleave(steps, rounds, warmup_s, between, clock=host_clock):
    """Seconds per round of each step, side by side: {name: [rounds values]}.

    steps: {name: function of no argument}, each first warmed up. between() runs before every call,
    outside the clock.
    """
    for step in steps.values():
        warm_up(step, warmup_s, between, clock)
    seconds = {name: [] for name in steps}
    for i in range(rounds):
        for name in balanced_order(list(steps), i):
            between()
            seconds[name].append(clock(steps[name]))
    return seconds


def summary(seconds):
    """Median, 20th and 80th percentile in ms, and all rounds in ms."""
    ms = [1e3 * s for s in seconds]
    if len(ms) == 1:
        return {"ms": ms[0], "p20": ms[0], "p80": ms[0], "rounds": ms}
    p20, *_, p80 = statistics.quantiles(ms, n=5, method="inclusive")
    return {"ms": statistics.median(ms), "p20": p20, "p80": p80, "rounds": ms}


def _status_kib(field):
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))


def peak_extra_bytes(function, device="cpu"):
    """Largest memory in use during one call beyond what was in use before it, in bytes.

    On a GPU what tensors occupy, by PyTorch's allocator. On a CPU resident memory, Linux only: the
    kernel's own high-water mark, reset first. Freed pages go back beforehand, so that memory
    cached by an earlier call is not handed out for nothing.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    if platform.system() != "Linux":
        raise RuntimeError(
            f"Peak memory is read from Linux's /proc, but this is {platform.system()}; run there."
        )
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc; musl returns memory by itself
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status_kib("VmRSS")
    result = function()
    peak = _status_kib("VmHWM")
    del result
    return 1024 * (peak - before)
