"""How large linear_log_probs' error at the logits becomes under upstream gradients of many shapes.

    python -m bench.upstream > bench/results/tolerance/upstream.txt

Columns are chosen in forward, for rows of one energy. Told are |D - D_kept| / (tolerance |D|), with
D = dL/dlogits in fp64: for that choice as it is, and with rows that need it formed anew in backward
as it ships; and the share of such rows.
"""

from unittest import mock

import torch

from rlsd.checks import measure
from rlsd_kernels import linear_log_probs, pipeline
from rlsd_kernels.gradients import Gradients

CASE, TOLERANCES = measure.Case(1024, 256, 8192), (1e-2, 1e-3)


def upstreams(p):
    """name -> dL/dlog p (N,) of losses on top."""
    rng, n = torch.Generator().manual_seed(1), len(p.advantages)
    lengths = torch.tensor([8, 24, 96, 384] * 2)
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
    ratio = torch.exp(0.5 * torch.randn(len(lengths), generator=rng))
    rewards = torch.randn(len(lengths), generator=rng)
    token = torch.zeros(n)
    token[: len(sequence)] = (rewards * ratio / lengths)[sequence]
    yield "equal", torch.ones(n)
    yield "advantages of groups", p.advantages * p.loss_weights
    yield "the same, ratios of tokens e^N(0, 0.5)", p.advantages * torch.exp(
        0.5 * torch.randn(n, generator=rng))
    yield "ratios of sequences, each a mean over 8 to 384 tokens", token
    for times in (10, 1000):
        for row in (100, 400, 900):
            loud = torch.ones(n)
            loud[row] = times
            yield f"row {row} {times} times as loud", loud


class Seen:
    """Which entries of D the gradient's GEMMs took, and how many rows were formed anew."""

    def __init__(self, rows, vocab):
        self.kept, self.rows, self.anew = torch.zeros(rows, vocab, dtype=torch.bool), rows, 0

    def patches(self):
        add, add_columns, bwd = Gradients.add, Gradients.add_columns, pipeline.Rows.score

        def dense(grads, index, h, *args, **named):
            work = grads.work
            add(grads, index, h, *args, **named)
            if grads.work - work == len(h):
                self.kept[index] = True

        def some(grads, index, h, v, d, j, *args, **named):
            self.kept[index[:, None], j] = True
            add_columns(grads, index, h, v, d, j, *args, **named)

        def score(rows, h, *args, **named):
            self.anew += len(h)
            return bwd(rows, h, *args, **named)

        return (mock.patch.object(Gradients, "add", dense),
                mock.patch.object(Gradients, "add_columns", some),
                mock.patch.object(pipeline.Rows, "score", score))


def error_of(p, upstream, tolerance):
    """|D - D_kept| / |D| and the share of rows formed anew."""
    hidden, weight = p.hidden.detach().requires_grad_(), p.weight.detach().requires_grad_()
    lp = linear_log_probs(
        hidden, weight, p.completion_ids, impl="torch", gradient_tolerance=tolerance,
        max_workspace_bytes=2**30,
    )
    seen = Seen(len(hidden), len(weight))
    first, second, third = seen.patches()
    with first, second, third:
        (lp * upstream).sum().backward()
    with torch.no_grad():
        d = -(hidden.double() @ weight.double().T).softmax(-1)
        d[torch.arange(len(d)), p.completion_ids] += 1
        d *= upstream.double()[:, None]
    return float(d[~seen.kept].norm() / d.norm()), seen.anew / len(hidden)


def main():
    names = ("profile", "tolerance", "upstream gradient", "as chosen", "as it ships", "rows anew")
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for profile in ("trained", "uniform"):
        p = measure.make_problem(CASE, profile=profile)
        for tolerance in TOLERANCES:
            for name, upstream in upstreams(p):
                error, anew = error_of(p, upstream, tolerance)
                with mock.patch.object(
                    pipeline, "exceeding", lambda energy, *_: torch.zeros_like(energy).bool()
                ):
                    before, _ = error_of(p, upstream, tolerance)
                print(f"| {profile} | {tolerance:g} | {name} | {before / tolerance:.2f} | "
                      f"{error / tolerance:.2f} | {anew:.1%} |", flush=True)


if __name__ == "__main__":
    main()
