"""How many rows would need the teacher at all, were it skipped where it cannot matter.

    python -m bench.teacher_rows [--profiles trained smollm2] > bench/results/cpu/teacher_rows.txt

|A_hat / A - 1| <= lambda eps_w, so a row without a teacher is off by at most that share of its own
gradient. Rows of smallest energy |D_i|^2 (D = dL/dlogits without a teacher) may go unscored as long
as together they carry at most (tolerance / (lambda eps_w))^2 of the whole.
"""

import argparse

import torch

from rlsd.checks import measure
from rlsd.config import UserError

TOLERANCE, SETTINGS = 1e-3, (0.1, 1.0)  # lambda eps_w: the paper's, and the largest there is
TEMPERATURES = {"trained": (0.6, 0.8, 1.0, 1.3), "smollm2": (0.4, 0.6, 1.0)}
CASES = {"trained": measure.Case(2048, 768, 49152), "smollm2": measure.Case(2048, 576, 49152)}
COLUMNS = ("profile", "temperature", "entropy, nats", "lambda eps_w", "rows to score",
           "head's work left", "mean delta of all", "of those scored", "gradient error")


def rows_of(problem, temperature, chunk=256):
    """Per token (N,): entropy, energy of p - onehot, delta, under ids drawn at the temperature."""
    rng, parts = torch.Generator().manual_seed(1), []
    for h, t in zip(problem.hidden.split(chunk), problem.teacher_hidden.split(chunk), strict=True):
        logits = h.double() @ problem.weight.double().T / temperature
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        ids = torch.multinomial(p, 1, generator=rng)
        taught = (t.double() @ problem.weight.double().T / temperature).log_softmax(-1)
        at, entropy = p.gather(1, ids), -(p * log_p).sum(-1, keepdim=True)
        energy = p.square().sum(-1, keepdim=True) - at.square() + (1 - at).square()
        parts.append(torch.cat([entropy, energy, (taught - log_p).gather(1, ids)], -1))
    return torch.cat(parts).unbind(-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profiles", nargs="+", default=["trained", "smollm2"])
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for profile in parser.parse_args().profiles:
        try:
            problem = measure.make_problem(CASES[profile], profile=profile)
        except UserError as error:
            print(f"{profile}: {error}")
            continue
        advantages = problem.advantages.double()
        for temperature in TEMPERATURES[profile]:
            with torch.no_grad():
                entropy, energy, delta = rows_of(problem, temperature)
            live = advantages != 0
            size = (energy * advantages.square())[live]
            for reach in SETTINGS:
                order = size.argsort()
                out = size[order].cumsum(0) <= (TOLERANCE / reach) ** 2 * size.sum()
                scored = torch.ones_like(live[live])
                scored[order[out]] = False
                # eps_w = 0.2, or 1 where that is what makes the reach
                eps = 0.2 if reach < 0.2 else 1.0
                weight = (advantages.sign() * delta)[live].exp().clamp(1 - eps, 1 + eps)
                off = ((reach / eps) * (weight - 1)).square() * size
                error = (off[~scored].sum() / size.sum()).sqrt()
                share = float(scored.double().mean())
                print(
                    f"| {profile} | {temperature} | {float(entropy.mean()):.2f} | {reach} | "
                    f"{share:.3f} | {(2 + 2 * share) / 4:.3f} | {float(delta[live].mean()):.4f} | "
                    f"{float(delta[live][scored].mean()):.4f} | {float(error):.1e} |", flush=True,
                )


if __name__ == "__main__":
    main()
