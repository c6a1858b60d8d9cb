"""Problems on the device under test, their fp64 truth, and what the precision contract allows."""

import os

import pytest
import torch
from problems import assert_as_accurate, chunked_reference, make_problem, run_fused, worst

from rlsd_kernels import RLSDLossConfig, available_impls

DEVICE = os.environ.get("RLSD_TEST_DEVICE", "cuda")
SMALL = DEVICE != "cuda"
if DEVICE == "posing":
    DEVICE = "cuda"
KERNELS = ("triton", "cuda", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Largest error against fp64: log-probs in nats, gradients relative in the Frobenius norm.
CONTRACT = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-4, 4e-3), torch.float16: (1e-4, 4e-3)}
# One after another, where the others run side by side: ten of these would fill any card.
big = pytest.mark.xdist_group("big")
ALWAYS = ("hidden", "weight", "completion_ids", "advantages", "loss_weights", "teacher_hidden")
# name -> optional inputs, loss options, call options
OPTIONS = {
    "on-policy": ((), {}, {}),
    "off-policy": (("old_log_probs",), {}, {}),
    "softcap": (("old_log_probs", "bias"), {}, {"final_logit_softcapping": 2.0}),
    "all": (
        ("old_log_probs", "ref_log_probs", "reweight_mask", "bias"),
        {"beta": 0.1, "entropy_coef": 0.05, "temperature": 0.7, "rlsd_negative_only": True},
        {"logit_scale": 0.4, "final_logit_softcapping": 3.0, "return_entropy": True},
    ),
}


def size(large, small):
    """What a test takes on a GPU, and in the trial run on a CPU."""
    return small if SMALL else large


def require(impl, dtype=torch.float32):
    """Skip with the reason unless this implementation runs on the device under test."""
    status = available_impls(torch.empty(0, dtype=dtype, device=DEVICE))[impl]
    if status != "ok":
        pytest.skip(f"impl={impl!r}: {status}")


def problem(options, n, v, h, dtype=torch.float32, **kwargs):
    """(inputs of fused_linear_rlsd_loss, its options) of one entry of OPTIONS."""
    keep, loss, call = OPTIONS[options]
    p = make_problem(n, v, h, dtype, device=DEVICE, **kwargs)
    rng = torch.Generator(DEVICE).manual_seed(1)
    p["bias"] = torch.randn(v, generator=rng, device=DEVICE).to(dtype)
    options = {"config": RLSDLossConfig(**loss), **call}
    return {k: x for k, x in p.items() if k in (*ALWAYS, *keep)}, options


def truth_of(p, options):
    return chunked_reference(p, rows=size(512, 11), **options)


def relative(got, truth):
    return float((got.double() - truth.double()).norm() / truth.double().norm())


def share_of(dtype, rows, terms=1):
    """Relative error that gradients may have: the contract, where chance has averaged out.

    16 bits: the roundings of a few rows do not. Alone, one bf16 row of V = 303 was over 4e-3 in 4 %
    of 300 seeds and at most at 4.8e-3. fp32: a sum of `terms` products one after another is off by
    some eps / 2 sqrt(terms / 2) of its size (1.8e-5 measured over 262208), and cuBLAS chooses how
    many of them it sums side by side.
    """
    share = CONTRACT[dtype][1]
    if dtype == torch.float32:
        return max(share, torch.finfo(dtype).eps * (terms / 2) ** 0.5)
    return share * (1 + max(rows, 1) ** -0.5)


def run_scaled(p, impl, dtype, **call):
    """run_fused under the loss scale that fp16 needs, taken out of its gradients again: unscaled,
    those of many tokens lie among fp16's subnormals, whatever computes them."""
    if dtype != torch.float16:
        return run_fused(p, impl, **call)
    scale = 2.0**14
    got = run_fused(p, impl, upstream=scale, **call)
    return {k: x.double() / scale if k.startswith("d_") else x for k, x in got.items()}


def assert_contract(got, truth, dtype):
    """Every output of run_fused within the precision contract of its input dtype."""
    absolute, _ = CONTRACT[dtype]
    if dtype == torch.float32:  # cuBLAS sums H products one after another: 1.34e-5 at H = 4096
        absolute *= max(1.0, (truth["d_hidden"].shape[1] / 1024) ** 0.5)
    live = truth["log_probs"] != 0
    assert got.keys() == truth.keys()
    for name, value in got.items():
        assert value.shape == truth[name].shape, name
        if name.startswith("d_"):
            terms = len(truth["d_weight"]) if name == "d_hidden" else 1
            error, share = relative(value, truth[name]), share_of(dtype, int(live.sum()), terms)
            assert error <= share, f"{name}: relative error {error:.3g} > {share:g}"
        elif name != "loss":
            limit = 4 * absolute if name == "entropy" else absolute
            error, sentence = worst(value, truth[name])
            assert error <= limit, f"{name}: {sentence}; error {error:.3g} > {limit:g}"
    # Ratios carry the log-probs' error, and the terms of the sum have both signs.
    error, sentence = worst(got["loss"], truth["loss"])
    assert error <= 20 * absolute, f"loss: {sentence}; error {error:.3g}"
    assert live.any() and (got["log_probs"] <= 0).all()


def check_accuracy(p, options, impl, dtype, truth=None, **call):
    """One fused step against fp64: the error rule in fp32, the contract below."""
    truth = truth_of(p, options) if truth is None else truth
    got = run_scaled(p, impl, dtype, **options, **call)
    assert_contract(got, truth, dtype)
    if dtype == torch.float32:
        assert_as_accurate(got, run_fused(p, "ref", **options), truth, terms=len(p["weight"]))
    return got


def compiled_variants(module):
    """Binaries that Triton holds for the kernels of a module, over all devices."""
    total = 0
    for kernel in vars(module).values():
        for entry in getattr(kernel, "device_caches", {}).values():
            cache = entry[0] if isinstance(entry, tuple) else entry
            total += len(cache)
    return total
