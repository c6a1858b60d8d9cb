"""Every implementation against fp64 on the GPU, over real vocabularies and past 2^31 logits."""

import functools

import pytest
import torch
from on_gpu import (
    CONTRACT,
    DEVICE,
    DTYPES,
    KERNELS,
    OPTIONS,
    assert_contract,
    big,
    check_accuracy,
    problem,
    relative,
    require,
    share_of,
    size,
    truth_of,
)
from problems import NAMES, cast, make_problem, run_fused, run_log_probs, worst

from rlsd_kernels import gemm, linear_distillation_loss, linear_log_probs
from rlsd_kernels.ref import linear_distillation_loss as specified_distillation

# Qwen3, Llama 3, Gemma 3; odd, so that rows of the head's logits start unaligned; even, but no
# multiple of 16, which tier B and its stores leave to tier A.
VOCABS = size((151936, 128256, 262208, 32003, 50258), (304, 303, 258))


@functools.lru_cache(maxsize=1)
def case(options, dtype, v, n=None, h=64):
    """A problem and its truth, kept for the implementations that follow each other on it."""
    p, call = problem(options, n or size(257, 21), v, h, dtype)
    return p, call, truth_of(p, call)


@pytest.fixture(scope="module", autouse=True)
def _forget():
    yield
    case.cache_clear()


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("v", VOCABS, ids="V{}".format)
def test_vocabularies(v, dtype, impl):
    require(impl, dtype)
    p, options, truth = case("off-policy", dtype, v)
    check_accuracy(p, options, impl, dtype, truth)


@pytest.mark.parametrize("rows", [None, 100], ids=["at-once", "in-groups"])
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options, dtype, impl, rows):
    require(impl, dtype)
    v = size(32003, 303)
    p, call, truth = case(options, dtype, v)
    workspace = rows and size(rows, 7) * 8 * v
    check_accuracy(p, call, impl, dtype, truth, max_workspace_bytes=workspace)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_gemms_of_both_widths(dtype, impl):
    """cuBLAS with 16-bit operands and fp32 results: into a padded chunk, and adding to dW. Tensor
    cores truncate as they accumulate, which shows over the 50258 terms of dx; so does fp32 where
    they are summed one after another."""
    if impl != "torch":
        pytest.skip("the GEMMs are the same for every implementation")
    n, v, h = size(300, 9), size(50258, 130), size(128, 16)
    rng = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.randn(v, h, generator=rng, device=DEVICE).to(dtype)
    operand = gemm.operand_dtype(weight)
    x = torch.randn(n, h, generator=rng, device=DEVICE).to(operand)
    e = torch.rand(n, v, generator=rng, device=DEVICE).to(operand)
    z = torch.full((n, v + 14), torch.nan, device=DEVICE)
    gemm.logits(x, weight, z[:, :v])
    short, long = 1e-5, 3e-4
    if operand == torch.float32:
        short, long = 1e-6, max(1e-6, share_of(operand, n, v))
    assert z[:, v:].isnan().all() and relative(z[:, :v], x.double() @ weight.double().T) < short
    assert relative(gemm.dx(e, weight), e.double() @ weight.double()) < long
    start = torch.randn(v, h, generator=rng, device=DEVICE)
    exact = start.double() + e.double().T @ x.double()
    assert relative(gemm.add_dw(start.clone(), e, x), exact) < short
    if operand == torch.bfloat16:  # all rows in one GEMM: rounded once
        zeros = torch.zeros(v, h, dtype=operand, device=DEVICE)
        assert relative(gemm.add_dw(zeros, e, x), e.double().T @ x.double()) < 2.5e-3


@big
@pytest.mark.cuda_only
@pytest.mark.parametrize("gib", [3.5, 16], ids=["in-groups", "E-of-all-rows"])
@pytest.mark.parametrize("impl", KERNELS)
def test_more_than_two_billion_logits(impl, gib):
    """16384 x 151936 entries of one E where the workspace holds them: 32-bit offsets would wrap."""
    require(impl, torch.bfloat16)
    p, options, truth = case("off-policy", torch.bfloat16, 151936, n=16384, h=64)
    got = run_fused(p, impl, max_workspace_bytes=int(gib * 2**30), **options)
    assert_contract(got, truth, torch.bfloat16)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "anew"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_log_probs(dtype, keep, impl):
    require(impl, dtype)
    n, v = size(257, 21), size(151936, 303)
    p = make_problem(n, v, 64, dtype, device=DEVICE)
    upstream = torch.randn(n, device=DEVICE)
    upstream[::4] = 0
    results = []
    for name, width in ((impl, dtype), ("ref", torch.float64)):
        leaves = [p[k].to(width).requires_grad_() for k in ("hidden", "weight")]
        lp, entropy = linear_log_probs(
            *leaves, p["completion_ids"], impl=name, old_log_probs=p["old_log_probs"],
            return_entropy=True, max_workspace_bytes=None if keep else size(50, 5) * 8 * v,
        )
        grads = torch.autograd.grad((lp * upstream).sum(), leaves)
        results.append((lp.detach(), entropy.detach(), *grads))
    absolute, _ = CONTRACT[dtype]
    (lp, entropy, *grads), (want, want_entropy, *exact) = results
    error, sentence = worst(lp, want)
    assert error <= absolute, sentence
    error, sentence = worst(entropy, want_entropy)
    assert error <= 4 * absolute, sentence
    for got, truth, terms in zip(grads, exact, (v, 1), strict=True):
        assert relative(got, truth) <= share_of(dtype, int((upstream != 0).sum()), terms)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("asked", ["smoothed", "top-k", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_what_else_a_row_gives(dtype, asked, impl):
    require(impl, dtype)
    n, v = size(257, 21), size(151936, 303)
    p = make_problem(n, v, 64, dtype, device=DEVICE)
    inputs = {k: p[k] for k in ("hidden", "weight", "completion_ids")}
    names = ("log_probs",) if asked == "top-k" else ("log_probs", "lse", "mean_logits")
    if asked == "top-k":
        inputs["completion_ids"] = torch.randint(0, v, (n, 20), device=DEVICE)
    upstream = {k: torch.randn(inputs["completion_ids"].shape if k == "log_probs" else (n,),
                               device=DEVICE) for k in names}
    options = {"final_logit_softcapping": 3.0 if asked == "softcap" else None}
    got = run_log_probs(inputs, impl, upstream, **options)
    truth = run_log_probs(cast(inputs, torch.float64), "ref", upstream, **options)
    absolute, _ = CONTRACT[dtype]
    for name, want in truth.items():
        if name.startswith("d_"):
            share = share_of(dtype, n, v if name == "d_hidden" else 1)
            assert relative(got[name], want) <= share, name
        elif name != "greedy_ids":  # of nearly equal logits either may win
            error, sentence = worst(got[name], want)
            assert error <= 4 * absolute, f"{name}: {sentence}"
    assert (got["greedy_ids"] == truth["greedy_ids"]).float().mean() > 0.95


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("offset", [-300.0, -30.0, 30.0, 300.0], ids="off{:+g}".format)
def test_a_wrong_guess_is_redone(offset, dtype, impl):
    """Half of the rows take the exact path; the guess never shows in the result."""
    require(impl, dtype)
    p = make_problem(size(64, 6), size(151936, 303), 64, dtype, device=DEVICE)
    old = p["old_log_probs"].clone()
    old[::2] += offset
    lp = linear_log_probs(p["hidden"], p["weight"], p["completion_ids"], old_log_probs=old,
                          impl=impl)
    want = linear_log_probs(
        p["hidden"].double(), p["weight"].double(), p["completion_ids"], impl="ref"
    )
    error, sentence = worst(lp, want)
    assert error <= CONTRACT[dtype][0], sentence


@big
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_the_head_of_an_8b_model(dtype, impl):
    """H = 4096 summed by tensor cores, half of the targets at a logit of 20 and p near 1; no logit
    is beyond the range that the contract is given for."""
    require(impl, dtype)
    n, v, h = size(512, 16), size(151936, 303), size(4096, 256)
    p, options = problem("off-policy", n, v, h, dtype, std=2.0)
    half, ids = n // 2, p["completion_ids"][: n // 2]
    x, w = p["hidden"][:half].double(), p["weight"][ids].double()
    z = (x * w).sum(-1, keepdim=True)
    p["hidden"][:half] = (x + (20 - z) * w / w.square().sum(-1, keepdim=True)).to(dtype)
    exact = linear_log_probs(
        p["hidden"].double(), p["weight"].double(), p["completion_ids"], impl="ref"
    )
    assert exact[:half].exp().min() > 0.9
    p["old_log_probs"] = (exact - 0.1).to(p["old_log_probs"].dtype)
    check_accuracy(p, options, impl, dtype)


@pytest.mark.parametrize("rows", [None, 100], ids=["at-once", "in-groups"])
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_gradient_tolerance(dtype, impl, rows):
    """Both ops on peaked logits: nothing but the gradients moves, and they no further than said."""
    require(impl, dtype)
    n, v, tolerance = size(512, 48), size(151936, 515), 1e-2
    p, options = problem("off-policy", n, v, 64, dtype, std=14.0)
    call = {"max_workspace_bytes": rows and size(rows, 7) * 8 * v}
    truth = truth_of(p, options)
    exact = run_fused(p, impl, **options, **call)
    got = run_fused(p, impl, **options, **call, gradient_tolerance=tolerance)
    for name in ("loss", "log_probs", "teacher_log_probs"):
        assert torch.equal(got[name], exact[name]), name
    grads, absolute = [], []
    for width in (dtype, torch.float64):
        leaves = [p[k].to(width).requires_grad_() for k in ("hidden", "weight")]
        lp = linear_log_probs(
            *leaves, p["completion_ids"], impl=impl if width == dtype else "ref",
            gradient_tolerance=tolerance * (width == dtype), **call,
        )
        absolute.append(lp.detach())
        grads.append(torch.autograd.grad((lp * p["advantages"]).sum(), leaves))
    assert worst(*absolute)[0] <= CONTRACT[dtype][0] * 20
    for dh, dw, exact_dh, exact_dw in (
        (got["d_hidden"], got["d_weight"], truth["d_hidden"], truth["d_weight"]),
        (*grads[0], *grads[1]),
    ):
        assert relative(dw, exact_dw) <= 2 * tolerance + share_of(dtype, n)
        assert relative(dh, exact_dh) <= 5 * tolerance + share_of(dtype, n, v)
        assert (dw == 0).all(1).double().mean() > 0.1


@pytest.mark.parametrize("shift", [-100.0, 100.0], ids="{:+g}".format)
@pytest.mark.parametrize("impl", KERNELS)
def test_shifted_logits(impl, shift):
    require(impl, torch.bfloat16)
    p, options = problem("softcap", size(129, 9), size(50258, 303), 64, torch.bfloat16)
    options.pop("final_logit_softcapping")
    p["bias"] = torch.full_like(p["bias"], shift)
    check_accuracy(p, options, impl, torch.bfloat16)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_equal_hidden_states_give_weight_exactly_one(dtype, impl):
    require(impl, dtype)
    p, options = problem("off-policy", size(257, 21), size(151936, 303), 64, dtype)
    p["teacher_hidden"] = p["hidden"]
    got = run_fused(p, impl, **options)
    assert torch.equal(got["log_probs"], got["teacher_log_probs"])
    p["old_log_probs"] = got["log_probs"]
    again = run_fused(p, impl, **options)
    ratio = (again["log_probs"] - got["log_probs"]).exp()
    assert (ratio - 1).abs().max() <= 1e-5


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_distillation(dtype, divergence):
    n, v = size(257, 21), size(151936, 303)
    p = make_problem(n, v, 64, dtype, device=DEVICE)
    loss_weights = p["loss_weights"]
    leaves = [p[k].clone().requires_grad_() for k in ("hidden", "weight")]
    loss = linear_distillation_loss(
        *leaves, p["teacher_hidden"], divergence=divergence, alpha=0.3, loss_weights=loss_weights,
        max_workspace_bytes=size(60, 6) * 8 * v,
    )
    exact = [p[k].double().requires_grad_() for k in ("hidden", "weight")]
    want = specified_distillation(
        *exact, p["teacher_hidden"].double(), loss_weights.double(), teacher_weight=None,
        bias=None, teacher_bias=None, divergence=divergence, alpha=0.3, temperature=1.0,
        logit_scale=1.0, final_logit_softcapping=None,
    )
    assert relative(loss.detach(), want.detach()) <= CONTRACT[dtype][0]
    scale = 2.0**14 if dtype == torch.float16 else 1.0  # unscaled they are subnormal in fp16
    for got, truth in zip(torch.autograd.grad(loss * scale, leaves),
                          torch.autograd.grad(want * scale, exact), strict=True):
        assert relative(got, truth) <= share_of(dtype, int((loss_weights != 0).sum()), v)
