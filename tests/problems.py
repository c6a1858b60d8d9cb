"""Random RLSD problems and the error rule, shared by the test files."""

import torch

import rlsd_kernels
from rlsd_kernels import RLSDLossConfig, fused_linear_rlsd_loss, ref
from rlsd_kernels.ref import linear_log_probs

NAMES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"
}
DTYPES = list(NAMES)


def make_problem(
    n, v, h, dtype=torch.float32, *, seed=0, teacher_h=None, std=1.5, device="cpu",
):
    """All inputs of fused_linear_rlsd_loss but bias: A of both signs and 0, some masked tokens,
    ratios on both sides of every clip, ids at both ends of the vocabulary."""
    rng = torch.Generator(device).manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64, device=device)

    hidden, weight = randn(n, h).to(dtype), (std * h**-0.5 * randn(v, h)).to(dtype)
    ids = torch.randint(0, v, (n,), generator=rng, device=device)
    ids[:1], ids[1:2] = v - 1, 0
    head = weight.double()
    log_probs = torch.cat([  # rows of N x V logits at a time
        linear_log_probs(x.double(), head, i)[0]
        for x, i in zip(hidden.split(1024), ids.split(1024), strict=True)
    ])
    advantages = randn(n)
    advantages[3::7] = 0
    loss_weights = torch.rand(n, generator=rng, dtype=torch.float64, device=device) / n
    loss_weights[4::9] = 0
    keep = torch.promote_types(dtype, torch.float32)
    problem = {
        "hidden": hidden, "weight": weight, "completion_ids": ids,
        "advantages": advantages.to(keep), "loss_weights": loss_weights.to(keep),
        "old_log_probs": (log_probs + 0.4 * randn(n)).to(keep),
        "ref_log_probs": (log_probs + 0.4 * randn(n)).to(keep),
        "reweight_mask": torch.rand(n, generator=rng, device=device) < 0.6,
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


def run_log_probs(inputs, impl, upstream, **options):
    """All that linear_log_probs returns, and the gradients of hidden, weight and bias by the
    outputs that upstream names, {name: gradient}."""
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if v.is_floating_point()}
    out = rlsd_kernels.linear_log_probs(
        leaves["hidden"], leaves["weight"], inputs["completion_ids"], bias=leaves.get("bias"),
        impl=impl, return_entropy=True, return_lse=True, return_mean_logits=True,
        return_greedy=True, **options,
    )
    values = out._asdict()
    total = sum((values[k] * u.to(values[k].dtype)).sum() for k, u in upstream.items())
    grads = torch.autograd.grad(total, list(leaves.values()))
    result = {k: v.detach() for k, v in values.items()}
    return result | {f"d_{k}": g for k, g in zip(leaves, grads, strict=True)}


def chunked_reference(
    problem, *, rows, config=RLSDLossConfig(), logit_scale=1.0,  # noqa: B008
    final_logit_softcapping=None, return_entropy=False,
):
    """run_fused(cast(problem, torch.float64), "ref", ...), holding (rows, V) logits at a time.

    Both passes over the head first, then the loss on (N,) values, then each chunk once more for
    its gradient: autograd never sees more than a chunk.
    """
    p = cast(problem, torch.float64)
    ids, advantages = p["completion_ids"], p["advantages"]
    leaves = {k: p[k].clone().requires_grad_() for k in ("hidden", "weight", "bias") if k in p}
    head = {"bias": leaves.get("bias"), "temperature": config.temperature,
            "logit_scale": logit_scale, "final_logit_softcapping": final_logit_softcapping}
    live = ref.live_tokens(p["loss_weights"], advantages, config)
    chosen = live & ref.reweighted_tokens(
        advantages, rlsd_negative_only=config.rlsd_negative_only,
        reweight_mask=p.get("reweight_mask"),
    )

    def chunks(which):
        return which.nonzero().squeeze(-1).split(rows)

    @torch.no_grad()
    def score(h, w, which):
        log_probs, entropy = torch.zeros_like(advantages), torch.zeros_like(advantages)
        for r in chunks(which):
            log_probs[r], entropy[r] = linear_log_probs(h[r], w, ids[r], **head)
        return log_probs, entropy

    log_probs, entropy = score(leaves["hidden"], leaves["weight"], live)
    teacher, _ = score(p["teacher_hidden"], p.get("teacher_weight", leaves["weight"]), chosen)
    loss = ref.rlsd_loss(
        log_probs.requires_grad_(), advantages, p["loss_weights"], teacher_log_probs=teacher,
        old_log_probs=p.get("old_log_probs"), ref_log_probs=p.get("ref_log_probs"),
        reweight_mask=p.get("reweight_mask"), entropy=entropy.requires_grad_(),
        rlsd_lambda=config.rlsd_lambda, config=config,
    )
    upstream = torch.autograd.grad(loss, (log_probs, entropy), allow_unused=True)
    for r in chunks(live):
        again = linear_log_probs(leaves["hidden"][r], leaves["weight"], ids[r], **head)
        pairs = [(y, g[r]) for y, g in zip(again, upstream, strict=True) if g is not None]
        torch.autograd.backward(*zip(*pairs, strict=True))
    out = {"loss": loss, "log_probs": log_probs, "teacher_log_probs": teacher}
    out |= {"entropy": entropy} if return_entropy else {}
    return {k: x.detach() for k, x in out.items()} | {f"d_{k}": x.grad for k, x in leaves.items()}


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


def assert_as_accurate(got, same_dtype, truth, *, terms=1):
    """err(got, truth) <= 2 err(same_dtype, truth) + the reference's rounding noise, per output.

    terms: of a sum that the implementation may form one term after another and the reference not.
    """
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
        units = max(32, 2 * (terms / 2) ** 0.5) if gradient else 4
        noise = (units * eps + 32 * torch.finfo(torch.float64).eps) * scale
        noise += own.smallest_normal * own.eps  # the spacing of fp16 below 6e-5
        allowed = 2 * peer + noise
        assert error <= allowed, (
            f"{name}: {sentence}; error {error:.3g} > 2 * {peer:.3g} + noise {noise:.3g}"
        )

