"""csrc/rlsd_math.cuh compiled for the host, against ref.py in fp32 and in fp64.

Inputs are multiples of 2^-10, so that differences are exact and an error is the formula's own:
where no exp is involved results agree bit for bit, elsewhere to the few roundings that both make.
"""

import ctypes
import itertools
import math

import emulation
import pytest
import torch
from problems import worst

from rlsd_kernels import RLSDLossConfig, ref
from rlsd_kernels.config import MAX_LOG_RATIO, ROW_SUM_BOUNDS, TOKEN_SUMS

FP = {"fp32": (torch.float32, ctypes.c_float), "fp64": (torch.float64, ctypes.c_double)}
NAN, INF = math.nan, math.inf
CONFIGS = {
    "default": {},
    "no-dual": {"delta": None, "beta": 0.25},
    "dual-binds": {"delta": 1.125, "rlsd_lambda": 1.0},
    "open-weights": {"rlsd_reweight_clip_range": 1.0, "rlsd_lambda": 1.0, "beta": 0.25},
    "open-ratio": {"epsilon": 1.0, "rlsd_lambda": 0.25},
    "negative-only": {"rlsd_negative_only": True, "beta": 0.25},
    "old-deltas": {"rlsd_delta_source": "old_log_probs"},
}


def call(name, fp, *arguments):
    """A function of token_math.cpp; tensors go as pointers, numbers in the precision's type."""
    number = FP[fp][1]
    given = [
        ctypes.c_void_p(x.data_ptr()) if torch.is_tensor(x)
        else ctypes.c_int64(x) if type(x) is int
        else ctypes.c_bool(x) if type(x) is bool
        else number(x)
        for x in arguments
    ]
    getattr(emulation.math_library(), f"{name}_{fp}")(*given)


def grid(dtype, *, extremes):
    """Every combination of advantage, delta, log-ratio and d = log P_ref - log P_S; or extremes."""
    exact = 2.0**-10
    advantages = [0.0, 0.75, -0.75, 2.0, -1.25]
    deltas = [0.0, 51 * exact, -51 * exact, 0.5, -0.5, 100.0, -100.0]
    ratios = [0.0, 0.125, -0.125, 0.5, -0.5, 1.5, -1.5, 100.0, -100.0]
    kls = [0.0, exact, -exact, 0.375, -0.375, 2.0, -3.0, 90.0, -90.0]
    if extremes:
        deltas, ratios, kls = [0.5, INF, -INF, NAN], [0.125, INF, -INF, NAN], [0.5, -INF, NAN]
    rows = torch.tensor(
        list(itertools.product(advantages, deltas, ratios, kls, [0.0, 0.375])), dtype=dtype
    )
    a, delta, log_ratio, d, weight = rows.T.contiguous()
    lp = torch.full_like(a, -1.5)
    n = len(a)
    return {
        "log_probs": lp, "advantages": a, "loss_weights": weight, "teacher": lp + delta,
        "old": lp - log_ratio, "ref": lp + d, "entropy": torch.arange(n, dtype=dtype) / 64,
        "mask": torch.arange(n) % 3 > 0,
    }


def run(fp, tokens, config, flags=None):
    """loss (N,), g (N,) and terms (N, len(TOKEN_SUMS)) of the C++ function."""
    dtype, n = FP[fp][0], len(tokens["log_probs"])
    loss, g = torch.empty(2, n, dtype=dtype)
    terms = torch.zeros(n, len(TOKEN_SUMS), dtype=torch.float64)
    bounds = torch.tensor(config.token_bounds, dtype=dtype)
    flags = torch.tensor(flags or [
        True, True, config.beta > 0, config.rlsd_delta_source == "old_log_probs",
        config.rlsd_negative_only,
    ])
    call("tokens", fp, n, *tokens.values(), float(config.rlsd_lambda), bounds, flags, loss, g,
         terms)
    return loss, g, dict(zip(TOKEN_SUMS, terms.T, strict=True))


def ulps(got, expected):
    """Largest distance in units of the last place of `expected`; NaN and inf must agree."""
    assert torch.equal(got.isnan(), expected.isnan()), "NaN where none is expected, or none"
    finite = expected.isfinite()
    assert torch.equal(got[~finite & ~expected.isnan()], expected[~finite & ~expected.isnan()])
    got, expected = got[finite], expected[finite]
    size = expected.abs().clamp(min=torch.finfo(expected.dtype).smallest_normal)
    unit = torch.finfo(expected.dtype).eps * 2 ** size.log2().floor()
    return float(((got - expected).abs() / unit).max()) if len(got) else 0.0


@pytest.mark.parametrize("options", CONFIGS)
@pytest.mark.parametrize("fp", FP)
def test_tokens(fp, options):
    config = RLSDLossConfig(**CONFIGS[options])
    tokens = grid(FP[fp][0], extremes=False)
    loss, g, terms = run(fp, tokens, config)
    lp, a, weight, teacher, old, prior, entropy, mask = tokens.values()
    active = (a != 0) & (weight != 0)

    student = old if config.rlsd_delta_source == "old_log_probs" else lp
    a_hat = ref.rlsd_advantages(
        a, student, teacher, rlsd_lambda=config.rlsd_lambda,
        rlsd_reweight_clip_range=config.rlsd_reweight_clip_range,
        rlsd_negative_only=config.rlsd_negative_only, reweight_mask=mask,
    )
    multiplier = (terms["weight_pos"] + terms["weight_neg"]).to(a.dtype)
    assert ulps(multiplier[active], (a_hat / a)[active]) <= 2
    chosen = ref.reweighted_tokens(
        a, rlsd_negative_only=config.rlsd_negative_only, reweight_mask=mask
    )
    plain = active & (~chosen | (teacher == student))
    assert plain.any() and (multiplier[plain] == 1).all()  # bit for bit

    leaf, weights = lp.clone().requires_grad_(), weight.clone().requires_grad_()
    value = ref.surrogate(
        leaf, old, a_hat, epsilon=config.epsilon, epsilon_high=config.epsilon_high,
        delta=config.delta,
    )
    if config.beta > 0:
        value = value + config.beta * ref.k3_kl(leaf, prior)
    live = ref.live_tokens(weight, a, config)
    value = torch.where(live, weights * value, 0)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    # ref's exp(d) - d - 1 cancels near 0: hold its value to that rounding, not to its size.
    noise = 16 * torch.finfo(a.dtype).eps if config.beta > 0 else 0
    eps = torch.finfo(a.dtype).eps
    for name, got, expected in (("loss", loss, value.detach()), ("g", g, slope)):
        # exp beyond the clip of 80 amplifies nothing: both clamp the log-ratio itself
        allowed = 8 * eps * expected.abs() + noise * (1 + expected.abs())
        if fp == "fp64" and config.beta > 0:
            allowed = allowed + 5e-8 * expected.abs()  # the series of exp_minus_line is fp32's
        excess = (got - expected).abs() - allowed
        assert (excess <= 0).all(), f"{name}: {worst(got, expected)[1]}"
        assert (got[~live] == 0).all()

    # Counts and differences: bit for bit, against the sums that ref takes over the same tokens.
    sums = ref.token_sums(
        lp, a, weight, teacher_log_probs=teacher, old_log_probs=old, ref_log_probs=prior,
        reweight_mask=mask, entropy=entropy, rlsd_lambda=config.rlsd_lambda, config=config,
    )
    for name, expected in zip(TOKEN_SUMS, sums, strict=True):
        got = terms[name].sum()
        if name in ("weight_pos", "weight_neg", "kl"):
            assert abs(got - expected) <= 4e-7 * abs(expected) + 1e-5, name
        else:
            assert got == expected, f"{name}: got {got}, expected {expected}"
    reached = {n for n in TOKEN_SUMS if terms[n].any()}
    assert reached >= {"reweighted_neg", "delta_neg", "kl", "entropy", "policy_kl", "active_pos"}


@pytest.mark.parametrize("options", CONFIGS)
@pytest.mark.parametrize("fp", FP)
def test_tokens_at_the_extremes(fp, options):
    """NaN and infinities: they reach the loss where they matter, and nothing where they do not."""
    config = RLSDLossConfig(**CONFIGS[options])
    tokens = grid(FP[fp][0], extremes=True)
    loss, g, terms = run(fp, tokens, config)
    lp, a, weight, teacher, old, prior, entropy, mask = tokens.values()
    live = ref.live_tokens(weight, a, config)
    assert (loss[~live] == 0).all() and (g[~live] == 0).all()
    assert not any(terms[name][(a == 0) | (weight == 0)].any() for name in TOKEN_SUMS)
    chosen = (a != 0) & mask & ((a < 0) | (not config.rlsd_negative_only))
    student = old if config.rlsd_delta_source == "old_log_probs" else lp
    delta = torch.where(teacher == student, 0, teacher - student)
    log_ratio, d = lp - old, prior - lp
    poisoned = (chosen & delta.isnan()) | log_ratio.isnan()
    # An infinite k3 estimate is an infinite loss; a = 0 has no surrogate to poison.
    spoiled = poisoned & (a != 0)
    if config.beta > 0:
        spoiled = spoiled | d.isnan()
        bottomless = live & ~spoiled & ~(poisoned & (a == 0)) & (d == -INF)
        assert bottomless.any() and (loss[bottomless] == INF).all()
    assert (live & spoiled).any() and loss[live & spoiled].isnan().all()
    fine = live & ~poisoned & d.isfinite()
    assert fine.any() and loss[fine].isfinite().all() and g[fine].isfinite().all()
    # An infinite delta is clipped: the multiplier sits at a bound.
    low, high = (math.exp(x) for x in config.log_weight_bounds)
    lam, active = config.rlsd_lambda, live & (a != 0)
    multiplier = terms["weight_pos"] + terms["weight_neg"]
    for sign, bound in ((1, high), (-1, low)):
        there = active & chosen & (torch.sign(a) * delta == sign * INF)
        if there.any():
            expected = torch.full_like(multiplier[there], 1 - lam + lam * bound)
            assert torch.allclose(multiplier[there], expected, rtol=1e-6, atol=1e-7)
    assert (active & chosen & delta.isinf()).any()


def test_the_shape_of_the_token_loss():
    """The clips by hand: praise stops at 1 + epsilon_high, blame below 1 - epsilon and at delta."""
    config = RLSDLossConfig(rlsd_lambda=0.5)
    dtype = torch.float64
    a = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, -1.0], dtype=dtype)
    log_ratio = torch.tensor([-100, 1, -1, 0.5, 2, 100], dtype=dtype)
    zero = torch.zeros_like(a)
    tokens = dict(zip(
        ("log_probs", "advantages", "loss_weights", "teacher", "old", "ref", "entropy", "mask"),
        (zero, a, zero + 1, zero + math.log(1.1), -log_ratio, zero, zero, zero == 0), strict=True,
    ))
    loss, g, terms = run("fp64", tokens, config, [True, False, False, False, False])
    up, down = 0.5 + 0.5 * 1.1, 0.5 + 0.5 / 1.1
    expected = torch.tensor(
        [0, -up * 1.28, down * 0.8, down * math.exp(0.5), down * 3, down * 3], dtype=dtype
    )
    assert torch.allclose(loss, expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(g, torch.tensor([0, 0, 0, expected[3], 0, 0], dtype=dtype))
    assert terms["ratio_clip_dual"].tolist() == [0, 0, 0, 0, 1, 1]
    assert terms["ratio_clip_high"].tolist() == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("fp", FP)
def test_clamp_keeps_nan(fp):
    x = torch.tensor([NAN, INF, -INF, 0.5, -0.0, 2.0, -2.0], dtype=FP[fp][0])
    out = torch.empty_like(x)
    call("clamp", fp, len(x), x, -1.0, 1.0, out)
    assert torch.equal(out[1:], x[1:].clamp(-1, 1)) and out[0].isnan()
    call("clamp", fp, len(x), x, -INF, 1.0, out)
    assert out[2] == -INF


@pytest.mark.parametrize("fp", FP)
def test_exp_minus_line(fp):
    d = torch.cat([torch.linspace(-80, 80, 2001), torch.logspace(-6, 0, 300), torch.zeros(1)])
    d = torch.cat([d, -d]).to(FP[fp][0])
    out = torch.empty_like(d)
    call("exp_minus_line", fp, len(d), d, out)
    exact = torch.expm1(d.double()) - d.double()
    small = d.abs().double() < 1e-3
    exact[small] = (d.double() ** 2 / 2 * (1 + d.double() / 3 + d.double() ** 2 / 12))[small]
    tolerance = 2e-6 if fp == "fp32" else 6e-8
    assert ((out - exact).abs() <= tolerance * exact).all(), worst(out, exact)[1]
    assert out[d == 0].eq(0).all() and (out >= 0).all()


@pytest.mark.parametrize("fp", FP)
def test_epilogue(fp):
    dtype = FP[fp][0]
    x = torch.cat([torch.linspace(-300, 300, 4001), torch.logspace(-6, 0, 300), torch.zeros(1)])
    x = torch.cat([x, -x, torch.tensor([INF, -INF, NAN])]).to(dtype)
    z, slope = torch.empty_like(x), torch.empty_like(x)
    call("epilogue", fp, len(x), x, 1.75, 1.0, False, z, slope)
    assert ulps(z, 1.75 * x) == 0 and (slope == 1).all()
    cap, temperature, scale = 30.0, 0.5, 1.5
    call("epilogue", fp, len(x), x, scale / cap, cap / temperature, True, z, slope)
    pre = torch.tensor(scale / cap, dtype=dtype).double()
    tanh = torch.tanh(x.double() * pre)
    tolerance = 4e-7 if fp == "fp32" else 1e-8
    kept = x.isfinite()
    error = (z.double() / (cap / temperature) - tanh).abs()
    assert (error <= tolerance * tanh.abs())[kept].all(), worst(z[kept], tanh[kept])[1]
    exact = 1 / torch.cosh(x.double() * pre) ** 2
    allowed = (2e-6 if fp == "fp32" else 1e-12) * exact
    assert ((slope - exact).abs() <= allowed)[kept].all(), worst(slope[kept], exact[kept])[1]
    assert z[-3] == cap / temperature and z[-2] == -cap / temperature and z[-1].isnan()
    assert slope[-3] == 0 and slope[-2] == 0 and slope[-1].isnan()


def test_trusted():
    trusted = emulation.math_library().trusted
    trusted.argtypes, trusted.restype = [ctypes.c_float], ctypes.c_bool
    low, high = ROW_SUM_BOUNDS
    assert [trusted(x) for x in (NAN, INF, 0.0, -1.0, low / 2, high * 2)] == [False] * 6
    assert [trusted(x) for x in (2 * low, 1.0, high / 2)] == [True] * 3
    assert MAX_LOG_RATIO == 80.0
