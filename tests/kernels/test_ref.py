"""The specification against formulas written independently here, token by token, in fp64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import make_problem
from torch.autograd import gradcheck

import rlsd_kernels
from rlsd_kernels import RLSDLossConfig, ref

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
INF = math.inf


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def naive_log_probs(hidden, weight, ids, bias, temperature, scale, cap):
    """Loops over tokens and vocabulary entries."""
    log_probs, entropies = [], []
    for row, y in zip(hidden, ids, strict=True):
        z = [sum(a * b for a, b in zip(row, w, strict=True)) for w in weight]
        z = [scale * (x + b) for x, b in zip(z, bias, strict=True)]
        z = [x if cap is None else cap * math.tanh(x / cap) for x in z]
        z = [x / temperature for x in z]
        total = sum(math.exp(x) for x in z)
        p = [math.exp(x) / total for x in z]
        log_probs.append(math.log(p[y]))
        entropies.append(-sum(q * math.log(q) for q in p))
    return log_probs, entropies


def naive_weight(a, delta, eps_w):
    sign = (a > 0) - (a < 0)
    x = 0.0 if sign == 0 else sign * delta
    return min(max(math.exp(min(x, 700.0)), 1 - eps_w), 1 + eps_w)


def naive_token(lp, a, *, teacher, old, reference, entropy, chosen, lam, config):
    """loss_t + beta kl_t - entropy_coef H_t as method.md writes them."""
    student = old if config.rlsd_delta_source == "old_log_probs" else lp
    a_hat = a
    if lam > 0 and chosen and (a < 0 or not config.rlsd_negative_only):
        w = naive_weight(a, teacher - student, config.rlsd_reweight_clip_range)
        a_hat = a * ((1 - lam) + lam * w)
    rho = math.exp(lp - old)
    clipped = min(max(rho, 1 - config.epsilon), 1 + config.epsilon_high)
    loss = -min(rho * a_hat, clipped * a_hat)
    if a < 0 and config.delta is not None:
        loss = min(loss, -a_hat * config.delta)
    if config.beta > 0:
        loss += config.beta * (math.exp(reference - lp) - (reference - lp) - 1)
    return loss - config.entropy_coef * entropy


HEADS = {
    "plain": (0.0, 1.0, 1.0, None),
    "temperature": (0.0, 0.7, 1.0, None),
    "scale": (0.0, 1.0, 0.4, None),
    "bias": (1.0, 1.0, 1.0, None),
    "softcap": (0.0, 1.0, 1.0, 2.0),
    "all": (1.0, 1.6, 0.7, 1.5),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 3), (6, 11, 4)], ids=str)
def test_log_probs_and_entropy_against_loops(head, shape):
    (n, v, h), (b, temperature, scale, cap) = shape, HEADS[head]
    hidden, weight = torch.randn(n, h).double(), torch.randn(v, h).double()
    bias, ids = b * torch.randn(v).double(), torch.randint(0, v, (n,))
    got = ref.linear_log_probs(
        hidden, weight, ids, bias=bias if b else None, temperature=temperature,
        logit_scale=scale, final_logit_softcapping=cap,
    )
    expected = naive_log_probs(
        hidden.tolist(), weight.tolist(), ids.tolist(), bias.tolist(), temperature, scale, cap
    )
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, f64(e), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    hidden, weight = torch.randn(5, 8).to(dtype), torch.randn(13, 8).to(dtype)
    ids = torch.randint(0, 13, (5,))
    got = ref.linear_log_probs(hidden, weight, ids)
    expected = ref.linear_log_probs(hidden.float(), weight.float(), ids)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == torch.float32 and torch.equal(g, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_touch_the_specification(dtype):
    hidden, weight = torch.randn(5, 8).to(dtype), torch.randn(13, 8).to(dtype)
    ids = torch.randint(0, 13, (5,))
    expected = ref.linear_log_probs(hidden, weight, ids)
    with torch.autocast("cpu", torch.bfloat16):
        got = ref.linear_log_probs(hidden, weight, ids)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == torch.float32 and torch.equal(g, e)


# delta, sign of A -> w at eps_w = 0.2: inside, at and beyond both bounds.
@pytest.mark.parametrize(
    "a, delta, w",
    [
        (1.0, 0.1, math.exp(0.1)), (1.0, -0.1, math.exp(-0.1)), (-1.0, 0.1, math.exp(-0.1)),
        (-1.0, -0.1, math.exp(0.1)), (1.0, 5.0, 1.2), (1.0, -5.0, 0.8), (-1.0, 5.0, 0.8),
        (-1.0, -5.0, 1.2), (2.0, INF, 1.2), (2.0, -INF, 0.8), (-2.0, INF, 0.8),
        (-2.0, -INF, 1.2), (1.0, 1e4, 1.2), (-1.0, 1e4, 0.8), (1.0, 0.0, 1.0), (-1.0, 0.0, 1.0),
    ],
)
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_weight_table(a, delta, w, lam):
    got = ref.token_weights(f64([a]), f64([delta]))
    torch.testing.assert_close(got, f64([w]), atol=1e-15, rtol=0)
    a_hat = ref.rlsd_advantages(f64([a]), f64([0.0]), f64([delta]), rlsd_lambda=lam)
    torch.testing.assert_close(a_hat, f64([a * ((1 - lam) + lam * w)]), atol=1e-15, rtol=0)


ADVANTAGES = st.one_of(
    st.sampled_from([0.0, 1e-30, -1e-30, 1e-8, -1e-8]), st.floats(-5, 5, allow_subnormal=False)
)
DELTAS = st.one_of(st.sampled_from([0.0, INF, -INF, 1e4, -1e4, 80.0]), st.floats(-2, 2))
UNIT = st.floats(0, 1, allow_subnormal=False)


@PROPERTY
@given(st.lists(st.tuples(ADVANTAGES, DELTAS), max_size=8), UNIT, UNIT, st.booleans())
def test_a_hat_properties(pairs, lam, eps_w, fp32):
    dtype = torch.float32 if fp32 else torch.float64
    a = torch.tensor([p[0] for p in pairs], dtype=dtype)
    delta = torch.tensor([p[1] for p in pairs], dtype=dtype)
    options = {"rlsd_lambda": lam, "rlsd_reweight_clip_range": eps_w}
    a_hat = ref.rlsd_advantages(a, torch.zeros_like(a), delta, **options)
    rounding = 4 * torch.finfo(dtype).eps
    assert torch.isfinite(a_hat).all()
    assert ((a_hat * a.sign()) >= 0).all()
    if lam < 1 - 1e-6 or eps_w < 1 - 1e-6:
        assert torch.equal(a_hat.sign(), a.sign())
    ratio = (a_hat / a)[a != 0]
    assert ((ratio - 1).abs() <= lam * eps_w + rounding).all()
    assert (a_hat[a == 0] == 0).all()
    assert torch.equal(a_hat[delta == 0], (a * ((1 - lam) + lam))[delta == 0])
    swapped = ref.rlsd_advantages(-a, delta, torch.zeros_like(a), **options)
    finite = torch.isfinite(delta)
    assert torch.equal(swapped[finite], -a_hat[finite])
    if lam == 0 or eps_w == 0:
        torch.testing.assert_close(a_hat, a, rtol=rounding, atol=0)


@pytest.mark.parametrize("lam", [0.0, 0.25, 0.5, 1.0])
def test_delta_zero_gives_exactly_a(lam):
    a, lp = torch.randn(50), -torch.rand(50)
    assert torch.equal(ref.rlsd_advantages(a, lp, lp, rlsd_lambda=lam), a)


@pytest.mark.parametrize("delta", [INF, -INF, 1e4, 0.0])
def test_zero_advantage_stays_exactly_zero(delta):
    got = ref.rlsd_advantages(f64([0.0, -0.0]), f64([0.0, 0.0]), f64([delta, delta]))
    assert (got == 0).all()


def test_swapping_teacher_and_student_with_minus_a_gives_the_same_weight():
    a, s, t = torch.randn(100).double(), torch.randn(100).double(), torch.randn(100).double()
    t = s + 0.1 * t
    w = ref.token_weights(a, t - s)
    assert torch.equal(w, ref.token_weights(-a, s - t))
    assert len(w.unique()) > 20


@pytest.mark.parametrize("lam", [0.5, 0.99])
def test_eps_w_one_has_no_lower_clip_and_stays_positive(lam):
    delta = f64([-50.0, -5.0, 0.5, 5.0])
    a_hat = ref.rlsd_advantages(
        f64([1.0] * 4), f64([0.0] * 4), delta, rlsd_lambda=lam, rlsd_reweight_clip_range=1.0
    )
    w = [math.exp(-50), math.exp(-5), math.exp(0.5), 2.0]
    torch.testing.assert_close(a_hat, f64([1 - lam + lam * x for x in w]), atol=1e-15, rtol=0)
    assert (a_hat > 0).all()


def test_negative_only_and_mask_leave_other_tokens_alone():
    a, delta = f64([2.0, 2.0, -2.0, -2.0, 0.0]), f64([1.0] * 5)
    mask = torch.tensor([True, False, True, False, True])
    zero = torch.zeros_like(a)

    def a_hat(**kwargs):
        return ref.rlsd_advantages(a, zero, delta, rlsd_lambda=1.0, **kwargs).tolist()

    assert a_hat() == pytest.approx([2.4, 2.4, -1.6, -1.6, 0])
    assert a_hat(reweight_mask=mask) == pytest.approx([2.4, 2, -1.6, -2, 0])
    assert a_hat(rlsd_negative_only=True) == pytest.approx([2, 2, -1.6, -1.6, 0])
    both = a_hat(rlsd_negative_only=True, reweight_mask=mask)
    assert both == pytest.approx([2, 2, -1.6, -2, 0])


def loss_of(lp, a, *, old=None, teacher=None, weights=None, lam=0.0, **options):
    """ref.rlsd_loss from lists, with the gradient by log-prob."""
    lp = f64(lp).requires_grad_()
    a = f64(a)
    per_token = {
        k: None if options.get(k) is None else f64(options.pop(k)) for k in ("reference", "entropy")
    }
    mask = options.pop("mask", None)
    loss = ref.rlsd_loss(
        lp, a, torch.ones_like(a) if weights is None else f64(weights),
        teacher_log_probs=None if teacher is None else f64(teacher),
        old_log_probs=None if old is None else f64(old),
        ref_log_probs=per_token["reference"], entropy=per_token["entropy"],
        reweight_mask=None if mask is None else torch.tensor(mask, dtype=torch.bool),
        rlsd_lambda=lam, config=RLSDLossConfig(**options),
    )
    loss.backward()
    return loss.item(), lp.grad.tolist()


# (A, rho, delta) -> loss, d loss / d log p: every branch of min and of the dual clip.
@pytest.mark.parametrize(
    "a, rho, delta, loss, grad",
    [
        (1.0, 0.5, 3.0, -0.5, -0.5),
        (1.0, 1.27, 3.0, -1.27, -1.27),
        (1.0, 1.3, 3.0, -1.28, 0.0),
        (1.0, 9.0, 3.0, -1.28, 0.0),
        (-1.0, 0.5, 3.0, 0.8, 0.0),
        (-1.0, 0.9, 3.0, 0.9, 0.9),
        (-1.0, 1.5, 3.0, 1.5, 1.5),
        (-1.0, 2.9, 3.0, 2.9, 2.9),
        (-1.0, 3.5, 3.0, 3.0, 0.0),
        (-1.0, 3.5, None, 3.5, 3.5),
        (-2.0, 3.5, 3.0, 6.0, 0.0),
    ],
)
def test_ppo_and_dual_clip_table(a, rho, delta, loss, grad):
    got, slope = loss_of([-1.0], [a], old=[-1.0 - math.log(rho)], delta=delta)
    assert got == pytest.approx(loss, abs=1e-12) and slope == pytest.approx([grad], abs=1e-12)


def test_dual_clip_caps_the_reweighted_advantage():
    # w = 1.2 from a teacher that finds the token much worse; cap = -A_hat * delta.
    got, slope = loss_of([-1.0], [-1.0], old=[-3.0], teacher=[-9.0], lam=1.0)
    assert got == pytest.approx(1.2 * 3.0) and slope == [0.0]


def test_default_old_log_probs_give_ratio_one_with_its_gradient():
    got, slope = loss_of([-1.0, -2.0], [1.5, -0.5])
    assert got == pytest.approx(-1.0) and slope == pytest.approx([-1.5, 0.5])


def test_delta_source():
    point = {"old": [-1.1], "teacher": [-1.05], "lam": 1.0}
    current, _ = loss_of([-1.0], [1.0], **point)
    old, _ = loss_of([-1.0], [1.0], rlsd_delta_source="old_log_probs", **point)
    assert current == pytest.approx(-math.exp(0.1) * math.exp(-0.05))
    assert old == pytest.approx(-math.exp(0.1) * math.exp(0.05))


def test_k3_kl():
    d = f64([-3.0, -0.1, 0.0, 0.2, 2.0])
    kl = ref.k3_kl(torch.zeros_like(d), d)
    torch.testing.assert_close(kl, f64([math.exp(x) - x - 1 for x in d.tolist()]))
    assert (kl >= 0).all() and kl[2] == 0
    base, _ = loss_of([-1.0], [0.0])
    got, slope = loss_of([-1.0], [0.0], reference=[-0.5], beta=0.1)
    assert base == 0 and got == pytest.approx(0.1 * (math.exp(0.5) - 1.5))
    assert slope == pytest.approx([-0.1 * (math.exp(0.5) - 1)])


def test_entropy_bonus():
    got, _ = loss_of([-1.0, -1.0], [1.0, 0.0], entropy=[2.0, 3.0], entropy_coef=0.1,
                     weights=[0.5, 0.25])
    assert got == pytest.approx(-0.5 - 0.1 * (0.5 * 2 + 0.25 * 3))


def test_sum_over_a_token_that_does_not_carry_weight_is_zero():
    lp, old = [-INF, -1.0, -INF, -1.0], [-1.0, INF, -INF, -1.0]
    got, slope = loss_of(
        lp, [1.0, 0.0, -1.0, 2.0], old=old, teacher=[INF, -INF, math.nan, -1.0],
        weights=[0.0, 1.0, 0.0, 0.5], lam=0.5,
    )
    assert got == -1.0 and slope == [0.0, 0.0, 0.0, -1.0]


@pytest.mark.parametrize("a", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [1e4, -1e4, 700.0, -INF])
@pytest.mark.parametrize("dual", [3.0, None])
def test_exp_overflow_leaves_loss_and_gradient_finite(a, log_ratio, dual):
    got, slope = loss_of(
        [log_ratio], [a], old=[0.0], teacher=[-1e4], reference=[1e4], lam=0.5, delta=dual,
        beta=0.1,
    )
    assert math.isfinite(got) and math.isfinite(slope[0])


TOKEN = st.fixed_dictionaries(
    {
        "lp": st.floats(-12, -1e-3), "a": ADVANTAGES, "weight": st.sampled_from([0.0, 0.1, 2.0]),
        "delta": DELTAS, "log_ratio": st.floats(-3, 3), "kl": st.floats(-3, 3),
        "entropy": st.floats(0, 10), "chosen": st.booleans(),
    }
)
CONFIGS = st.fixed_dictionaries(
    {
        "rlsd_reweight_clip_range": UNIT, "epsilon": UNIT, "epsilon_high": st.floats(0, 3),
        "rlsd_delta_source": st.sampled_from(["current", "old_log_probs"]),
        "rlsd_negative_only": st.booleans(), "delta": st.one_of(st.none(), st.floats(1.01, 5)),
        "beta": st.sampled_from([0.0, 0.3]), "entropy_coef": st.sampled_from([0.0, 0.2]),
    }
)


@PROPERTY
@given(st.lists(TOKEN, max_size=9), UNIT, CONFIGS)
def test_loss_against_loops(tokens, lam, options):
    config = RLSDLossConfig(**options)
    expected = size = 0.0
    for t in tokens:
        old = t["lp"] - t["log_ratio"]
        student = old if config.rlsd_delta_source == "old_log_probs" else t["lp"]
        if t["weight"]:
            term = t["weight"] * naive_token(
                t["lp"], t["a"], teacher=student + t["delta"], old=old,
                reference=t["lp"] + t["kl"], entropy=t["entropy"], chosen=t["chosen"], lam=lam,
                config=config,
            )
            expected, size = expected + term, size + abs(term)
    lp = [t["lp"] for t in tokens]
    old = [t["lp"] - t["log_ratio"] for t in tokens]
    student = old if config.rlsd_delta_source == "old_log_probs" else lp
    got, slope = loss_of(
        lp, [t["a"] for t in tokens], old=old, weights=[t["weight"] for t in tokens],
        teacher=[s + t["delta"] for s, t in zip(student, tokens, strict=True)],
        reference=[t["lp"] + t["kl"] for t in tokens], mask=[t["chosen"] for t in tokens],
        entropy=[t["entropy"] for t in tokens], lam=lam, **options,
    )
    assert got == pytest.approx(expected, abs=1e-12 * (1 + size))
    dead = [t["weight"] == 0 or (t["a"] == 0 and not config.beta) for t in tokens]
    assert all(g == 0 for g, off in zip(slope, dead, strict=True) if off)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("teacher", [True, False])
def test_lambda_zero_equals_grpo(teacher):
    lp, a = -3 * torch.rand(40).double(), torch.randn(40).double()
    old, rho = lp - 0.4 * torch.randn(40).double(), None
    rho = (lp - old).exp()
    grpo = -torch.minimum(rho * a, rho.clamp(0.8, 1.28) * a)
    grpo = torch.where(a < 0, torch.minimum(grpo, -3 * a), grpo).sum().item()
    t = (lp + 5 * torch.randn(40).double()).tolist() if teacher else None
    got, _ = loss_of(lp.tolist(), a.tolist(), old=old.tolist(), teacher=t, lam=0.0)
    assert got == pytest.approx(grpo, abs=1e-12)
    if teacher:
        rlsd, _ = loss_of(lp.tolist(), a.tolist(), old=old.tolist(), teacher=t, lam=0.5)
        assert abs(rlsd - grpo) > 1e-3


def test_no_gradient_through_the_weight():
    lp = (-3 * torch.rand(30)).double().requires_grad_()
    teacher = (lp.detach() + 0.1 * torch.randn(30)).requires_grad_()
    a, weights = torch.randn(30).double(), torch.rand(30).double()
    old = lp.detach() - 0.1
    common = {
        "old_log_probs": old, "ref_log_probs": None, "reweight_mask": None, "entropy": None,
    }
    ref.rlsd_loss(
        lp, a, weights, teacher_log_probs=teacher, rlsd_lambda=0.7, config=RLSDLossConfig(),
        **common,
    ).backward()
    frozen = ref.rlsd_advantages(a, lp.detach(), teacher.detach(), rlsd_lambda=0.7)
    again = lp.detach().clone().requires_grad_()
    ref.rlsd_loss(
        again, frozen, weights, teacher_log_probs=None, rlsd_lambda=0.0,
        config=RLSDLossConfig(), **common,
    ).backward()
    assert teacher.grad is None
    torch.testing.assert_close(lp.grad, again.grad, atol=1e-15, rtol=1e-14)
    assert (frozen / a - 1).abs().max() > 0.05


def test_a_hat_is_detached_from_every_input():
    inputs = [torch.randn(5).requires_grad_() for _ in range(3)]
    assert not ref.rlsd_advantages(*inputs).requires_grad


@PROPERTY
@given(st.lists(st.tuples(ADVANTAGES, st.booleans()), max_size=6), st.booleans(), st.booleans())
def test_live_tokens(pairs, kl, entropy):
    config = RLSDLossConfig(beta=0.1 * kl, entropy_coef=0.1 * entropy)
    live = ref.live_tokens(
        f64([0.3 * m for _, m in pairs]), f64([a for a, _ in pairs]), config
    )
    assert live.tolist() == [m and (a != 0 or kl or entropy) for a, m in pairs]


GRADCHECKS = {
    "plain": {},
    "softcap": {"final_logit_softcapping": 2.0, "logit_scale": 0.7},
    "bias-T": {"bias": True, "temperature": 1.7},
}


@pytest.mark.parametrize("head", GRADCHECKS)
def test_gradcheck_linear_log_probs(head):
    options = dict(GRADCHECKS[head])
    bias = torch.randn(7).double().requires_grad_() if options.pop("bias", False) else None
    inputs = [torch.randn(n, 3).double().requires_grad_() for n in (4, 7)]
    inputs += [] if bias is None else [bias]

    def f(hidden, weight, bias=None):
        return rlsd_kernels.linear_log_probs(
            hidden, weight, torch.tensor([0, 6, 3, 3]), bias=bias, return_entropy=True,
            impl="ref", **options,
        )

    assert gradcheck(f, inputs)


def test_gradcheck_rlsd_loss():
    lp, entropy = -3 * torch.rand(12).double(), torch.rand(12).double()
    old = lp - 0.4 * torch.randn(12).double()
    config = RLSDLossConfig(rlsd_delta_source="old_log_probs", beta=0.2, entropy_coef=0.3)
    a, other = torch.randn(12).double(), lp + 0.2 * torch.randn(12).double()

    def f(lp, entropy):
        return rlsd_kernels.rlsd_loss(
            lp, a, teacher_log_probs=other, old_log_probs=old, ref_log_probs=other,
            entropy=entropy, config=config, impl="ref",
        ).loss

    assert gradcheck(f, (lp.requires_grad_(), entropy.requires_grad_()))


@pytest.mark.parametrize("head", GRADCHECKS)
def test_gradcheck_fused(head):
    options = dict(GRADCHECKS[head])
    config = RLSDLossConfig(
        rlsd_delta_source="old_log_probs", beta=0.2, entropy_coef=0.3,
        temperature=options.pop("temperature", 1.0),
    )
    problem = make_problem(7, 5, 3, torch.float64, teacher_h=2)
    with_bias = options.pop("bias", False)
    leaves = [problem.pop("hidden"), problem.pop("weight"), torch.randn(5).double()]

    def f(hidden, weight, bias=None):
        return rlsd_kernels.fused_linear_rlsd_loss(
            hidden, weight, bias=bias, config=config, impl="ref", **problem, **options
        ).loss

    assert gradcheck(f, [x.requires_grad_() for x in leaves[: 3 if with_bias else 2]])


def test_fused_is_the_composition_of_its_parts():
    p = make_problem(23, 17, 6, torch.float64)
    config = RLSDLossConfig(temperature=1.3)
    out = rlsd_kernels.fused_linear_rlsd_loss(**p, config=config, impl="ref")
    lp, _ = ref.linear_log_probs(p["hidden"], p["weight"], p["completion_ids"], temperature=1.3)
    t, _ = ref.linear_log_probs(
        p["teacher_hidden"], p["weight"], p["completion_ids"], temperature=1.3
    )
    expected = sum(
        p["loss_weights"][i].item() * naive_token(
            lp[i].item(), p["advantages"][i].item(), teacher=t[i].item(),
            old=p["old_log_probs"][i].item(), reference=0.0, entropy=0.0,
            chosen=bool(p["reweight_mask"][i]), lam=0.5, config=config,
        )
        for i in range(23)
    )
    live = (p["loss_weights"] != 0) & (p["advantages"] != 0)
    assert out.loss.item() == pytest.approx(expected, abs=1e-13)
    torch.testing.assert_close(out.log_probs, torch.where(live, lp, 0), atol=1e-12, rtol=0)
    scored = live & p["reweight_mask"]
    torch.testing.assert_close(out.teacher_log_probs, torch.where(scored, t, 0), atol=1e-12, rtol=0)


TEACHER = ("teacher_hidden", "teacher_weight")


def test_teacher_of_another_dtype_is_scored_in_its_own():
    p = make_problem(30, 11, 4)
    teacher = {k: p[k.removeprefix("teacher_")].double() for k in TEACHER}
    del p["teacher_hidden"]
    out = rlsd_kernels.fused_linear_rlsd_loss(**p, **teacher, impl="ref")
    assert out.teacher_log_probs.dtype == torch.float32
    scored = out.teacher_log_probs != 0
    torch.testing.assert_close(out.teacher_log_probs[scored], out.log_probs[scored])
    assert scored.sum() >= 3


@pytest.mark.parametrize("weights, advantages", [([], []), ([0.0] * 3, [1.0] * 3),
                                                 ([1.0] * 3, [0.0] * 3)])
def test_no_live_token_is_zero_with_zero_gradient(weights, advantages):
    got, slope = loss_of([-1.0] * len(weights), advantages, weights=weights, lam=0.5,
                         teacher=[-2.0] * len(weights))
    assert got == 0 and slope == [0.0] * len(weights)
