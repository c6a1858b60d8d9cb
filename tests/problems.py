"""Random RLSD problems and the error rule, shared by the test files."""

import torch

from rlsd_kernels import fused_linear_rlsd_loss
from rlsd_kernels.ref import linear_log_probs

NAMES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"
}
DTYPES = list(NAMES)


def make_problem(n, v, h, dtype=torch.float32, *, seed=0, teacher_h=None, std=1.5):
    """All inputs of fused_linear_rlsd_loss but bias: A of both signs and 0, some masked tokens,
    ratios on both sides of every clip, ids at both ends of the vocabulary."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    hidden, weight = randn(n, h).to(dtype), (std * h**-0.5 * randn(v, h)).to(dtype)
    ids = torch.randint(0, v, (n,), generator=rng)
    ids[:1], ids[1:2] = v - 1, 0
    log_probs, _ = linear_log_probs(hidden.double(), weight.double(), ids)
    advantages = randn(n)
    advantages[3::7] = 0
    loss_weights = torch.rand(n, generator=rng, dtype=torch.float64) / n
    loss_weights[4::9] = 0
    keep = torch.promote_types(dtype, torch.float32)
    problem = {
        "hidden": hidden, "weight": weight, "completion_ids": ids,
        "advantages": advantages.to(keep), "loss_weights": loss_weights.to(keep),
        "old_log_probs": (log_probs + 0.4 * randn(n)).to(keep),
        "ref_log_probs": (log_probs + 0.4 * randn(n)).to(keep),
        "reweight_mask": torch.rand(n, generator=rng) < 0.6,
        "teacher_hidden": (hidden + 0.3 * randn(n, h)).to(dtype),
    }
    if teacher_h is not None:
        problem["teacher_hidden"] = randn(n, teacher_h).to(dtype)
        problem["teacher_weight"] = (std * teacher_h**-0.5 * randn(v, teacher_h)).to(dtype)
    return problem


def cast(problem, dtype):
    """The same values with every float tensor in dtype."""
    return {
        name: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in problem.items()
    }


def run_fused(problem, impl, *, upstream=1.0, grads=("hidden", "weight", "bias"), **options):
    """Outputs and gradients of one call, by name; the problem's tensors are not touched."""
    inputs = {name: x.clone() if torch.is_tensor(x) else x for name, x in problem.items()}
    leaves = {k: inputs[k].requires_grad_() for k in grads if inputs.get(k) is not None}
    positional = [inputs.pop(k) for k in ("hidden", "weight", "completion_ids", "advantages")]
    out = fused_linear_rlsd_loss(*positional, **inputs, **options, impl=impl)
    result = {k: v for k, v in out._asdict().items() if k != "stats" and v is not None}
    if leaves:
        (out.loss * upstream).backward()
        result |= {f"d_{k}": x.grad for k, x in leaves.items()}
    return {k: v.detach() for k, v in result.items()}


def worst(got, truth):
    """Largest |got - truth| and a sentence about the element where it is."""
    error = (got.double() - truth.double()).abs()
    if error.numel() == 0:
        return 0.0, "no elements"
    error = error.nan_to_num(nan=torch.inf)
    i = int(error.argmax())
    where = tuple(int(x) for x in torch.unravel_index(torch.tensor(i), error.shape))
    g, t = got.double().flatten()[i], truth.double().flatten()[i]
    return float(error.flatten()[i]), f"worst element {where}: got {g:.9g}, expected {t:.9g}"


def assert_as_accurate(got, same_dtype, truth):
    """err(got, truth) <= 2 err(same_dtype, truth) + the reference's rounding noise, per output."""
    assert got.keys() == truth.keys() == same_dtype.keys()
    for name, value in got.items():
        expected = truth[name]
        assert value.shape == expected.shape and value.dtype == same_dtype[name].dtype, name
        if expected.numel() == 0:
            continue
        error, sentence = worst(value, expected)
        peer, _ = worst(same_dtype[name], expected)
        gradient = name.startswith("d_")
        scale = float(expected.abs().max()) if gradient else max(1, float(expected.abs().max()))
        own = torch.finfo(value.dtype)
        eps = torch.finfo(torch.promote_types(value.dtype, torch.float32)).eps
        # Gradients are sums over V or N, whose order depends on the chunk's height, times a ratio
        # exp(log p - log p_old), whose relative error is eps |log p|, |log p| up to 16 here.
        noise = ((32 if gradient else 4) * eps + 32 * torch.finfo(torch.float64).eps) * scale
        noise += own.smallest_normal * own.eps  # the spacing of fp16 below 6e-5
        allowed = 2 * peer + noise
        assert error <= allowed, (
            f"{name}: {sentence}; error {error:.3g} > 2 * {peer:.3g} + noise {noise:.3g}"
        )

