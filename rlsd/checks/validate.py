"""`rlsd validate`: every implementation against the specification in fp64, on this machine.

One row per implementation, dtype and feature set: the largest deviation of log-probs (absolute)
and of dh and dw (relative, Frobenius), and which share of its limit the worst of all reaches. The
limits of the precision contract grow with the logits.
"""

import math

import torch

from rlsd_kernels import RLSDLossConfig, available_impls

from ..policy.update import CONTRACT, ROUNDINGS, deviation_from_ref

FEATURES = {
    "plain": {},
    "large logits": {"largest_logit": 46.0},  # as in SmolLM2-135M, whose policy is often certain
    "kl, entropy": {"config": RLSDLossConfig(beta=0.05, entropy_coef=0.01)},
    "softcap, scale, bias": {"bias": True, "final_logit_softcapping": 15.0, "logit_scale": 0.5},
    "own teacher head": {"teacher_weight": True},
    "temperature, A < 0 only": {
        "config": RLSDLossConfig(temperature=0.7, rlsd_negative_only=True, delta=None)
    },
}


def make_inputs(dtype, features, device="cpu", rows=97, hidden=64, vocab=1003, seed=0):
    """Fused-loss arguments: both signs of A, dead groups, masked tokens, off-policy ratios."""
    options = dict(features)
    largest = options.pop("largest_logit", None)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = 0.2 * normal(vocab, hidden)
    h = normal(rows, hidden)
    if largest:
        weight *= largest / (h @ weight.T).abs().max()
    log_probs = torch.log_softmax(h @ weight.T, -1)
    ids = torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0]
    log_probs = log_probs[torch.arange(rows), ids]
    advantages = normal(rows)
    advantages[::5] = 0
    weights = torch.rand(rows, generator=generator, dtype=torch.float64) / rows
    weights[3::7] = 0
    tensors = {
        "hidden": h.to(dtype), "weight": weight.to(dtype), "advantages": advantages,
        "teacher_hidden": (h + 0.2 * normal(rows, hidden)).to(dtype), "loss_weights": weights,
        "old_log_probs": log_probs + 0.3 * normal(rows),
        "ref_log_probs": log_probs + 0.3 * normal(rows), "completion_ids": ids,
    }
    if options.get("bias"):
        tensors["bias"] = normal(vocab).to(dtype)
    if options.get("teacher_weight"):
        tensors["teacher_weight"] = (weight + 0.02 * normal(vocab, hidden)).to(dtype)
    return {**options, **{name: tensor.to(device) for name, tensor in tensors.items()}}


def validate(log=print):
    """Print the table; returns the number of rows that broke the contract."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    log(f"Every implementation against ref in fp64 on {device}; limits are the precision contract.")
    log(f"{'impl':<8}{'dtype':<10}{'features':<26}{'log-probs':>11}{'dh':>11}{'dw':>11}"
        f"{'of limit':>10}  verdict")
    failures = 0
    for impl, status in available_impls().items():
        if status != "ok":
            log(f"{impl:<8}not run: {status}")
            continue
        for dtype in CONTRACT:
            status = available_impls(torch.empty(0, dtype=dtype, device=device))[impl]
            if status != "ok":
                log(f"{impl:<8}{str(dtype).removeprefix('torch.'):<10}not run: {status}")
                continue
            for name, features in FEATURES.items():
                errors, limits = deviation_from_ref(make_inputs(dtype, features, device), impl)
                share = max(
                    math.inf if math.isnan(error) else error / limits[part]
                    for part, error in errors.items()
                )
                failures += share > 1
                log(
                    f"{impl:<8}{str(dtype).removeprefix('torch.'):<10}{name:<26}"
                    f"{errors['log_probs']:>11.1e}{errors['dh']:>11.1e}{errors['dw']:>11.1e}"
                    f" {share:>9.0%}  {'FAILED' if share > 1 else 'ok'}"
                )
    log("Limits at small logits, log-probs / gradients: " + "; ".join(
        f"{str(d).removeprefix('torch.')} {a:g} / {r:g}" for d, (a, r) in CONTRACT.items()
    ) + f"; else {ROUNDINGS} eps of the largest logit.")
    log("All within the contract." if not failures else f"{failures} rows broke the contract.")
    return failures
