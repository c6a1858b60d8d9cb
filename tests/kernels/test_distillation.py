"""linear_distillation_loss against the fp64 specification, by the error rule in problems.py."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from problems import DTYPES, NAMES, assert_as_accurate, cast, make_problem
from torch.utils._python_dispatch import TorchDispatchMode

from rlsd_kernels import distillation, gemm, linear_distillation_loss
from rlsd_kernels.ops import Need
from rlsd_kernels.rows import Head
from rlsd_kernels.shards import Shard

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
GRADS = ("hidden", "weight", "bias")


def make(n, v, h, dtype=torch.float32, **options):
    """hidden, weight, teacher_hidden, loss_weights (some 0), teacher_weight if it has its own H."""
    problem = make_problem(n, v, h, dtype, **options)
    names = ("hidden", "weight", "teacher_hidden", "loss_weights", "teacher_weight")
    return {k: problem[k] for k in names if k in problem}


def run(problem, impl="torch", *, grads=GRADS, upstream=1.0, **options):
    """Loss and gradients by name; the problem's tensors are not touched."""
    inputs = {k: x.clone() for k, x in problem.items()}
    leaves = {k: inputs[k].requires_grad_() for k in grads if k in inputs}
    positional = [inputs.pop(k) for k in ("hidden", "weight", "teacher_hidden")]
    loss = linear_distillation_loss(*positional, **inputs, **options, impl=impl)
    result = {"loss": loss.detach()}
    if leaves:
        (loss * upstream).backward()
        result |= {f"d_{k}": x.grad for k, x in leaves.items()}
    return result


def check(problem, *, workspace=None, **options):
    got = run(problem, max_workspace_bytes=workspace, **options)
    same = run(problem, "ref", **options)
    truth = run(cast(problem, torch.float64), "ref", **options)
    assert_as_accurate(got, same, truth)
    return got, truth


SHAPES = [
    (1, 1, 1),  # one row, one id: equal distributions, all gradients 0
    (1, 37, 8),  # one row: matrix-vector products
    (65, 1000, 33),  # odd H: rows of the head are not aligned
    (97, 4133, 16),  # a 16-bit head in two blocks, rows in two groups of 63 and a few
    (3, 8193, 5),  # a 16-bit head with a last block of a single row
]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-V{}-H{}".format(*s))
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_shapes(dtype, shape, divergence):
    got, truth = check(make(*shape, dtype), divergence=divergence, alpha=0.3)
    if shape[1] > 1:
        assert got["loss"] > 0 and truth["d_hidden"].any() and truth["d_weight"].any()
    else:
        assert not any(x.any() for x in got.values())


# name -> what is added to the problem, options
CASES = {
    "bias": (["bias"], {}),
    "softcap": ([], {"final_logit_softcapping": 2.0}),
    "scale": ([], {"logit_scale": 0.4}),
    "temperature": ([], {"temperature": 0.6}),
    "teacher-head": (["teacher_weight"], {}),
    "teacher-bias": (["teacher_weight", "bias", "teacher_bias"], {}),
    "bias-teacher-none": (["teacher_weight", "bias"], {}),
    "all": (
        ["teacher_weight", "bias", "teacher_bias"],
        {"final_logit_softcapping": 3.0, "logit_scale": 0.7, "temperature": 1.4, "upstream": -4.0},
    ),
}


def make_case(case, dtype):
    keep, options = CASES[case]
    problem = make(35, 301, 24, dtype, teacher_h=40 if "teacher_weight" in keep else None)
    for name in ("bias", "teacher_bias"):
        if name in keep:
            problem[name] = torch.randn(301).to(dtype)
    return problem, options


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_options(dtype, case, divergence):
    problem, options = make_case(case, dtype)
    check(problem, divergence=divergence, alpha=0.7, **options)


# Bytes for: one row per chunk; five rows, the last chunk shorter.
@pytest.mark.parametrize("workspace", [1, 2 * 301 * 4 * 5], ids="bytes{}".format)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_chunks(dtype, divergence, workspace):
    problem, options = make_case("all", dtype)
    check(problem, workspace=workspace, divergence=divergence, **options)


@pytest.mark.parametrize("elements", [1, 301 * 4], ids="group{}".format)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_groups(divergence, elements, monkeypatch):
    monkeypatch.setitem(distillation.GROUP_ELEMENTS, "cpu", elements)
    problem, options = make_case("all", torch.float64)
    check(problem, workspace=2 * 301 * 8 * 7, divergence=divergence, **options)


@pytest.mark.parametrize(
    "grads", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias"), ()],
    ids=lambda g: "+".join(g) or "none",
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_frozen_parts(divergence, grads):
    problem, options = make_case("all", torch.bfloat16)
    got, _ = check(problem, grads=grads, divergence=divergence, **options)
    assert {k for k in got if k.startswith("d_")} == {f"d_{g}" for g in grads}


@pytest.mark.parametrize("alpha", [1e-9, 1e-3, 0.5, 0.999, 1 - 1e-9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=NAMES.get)
def test_alpha_keeps_relative_precision(dtype, alpha):
    # Loss and gradients are proportional to alpha or 1 - alpha at its ends, where fp32 rounds it
    # to 0 or 1; the specification's own logaddexp is off by 1e-16 / alpha.
    problem = make(35, 301, 24, dtype, std=4.0)
    got = run(problem, alpha=alpha)
    truth = run(cast(problem, torch.float64), "ref", alpha=alpha)
    allowed = 1e-5 if dtype == torch.float32 else 1e-14 + 1e-15 / min(alpha, 1 - alpha)
    for name, expected in truth.items():
        error = (got[name] - expected).norm() / expected.norm()
        assert error < allowed, f"{name}: {error:.2g}"


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("upstream", [3.7, -1.0, 0.0, 1e-3], ids="upstream{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_upstream_gradient(dtype, upstream, divergence):
    check(make(67, 301, 24, dtype), upstream=upstream, divergence=divergence)


CONTRACT = {  # dtype -> loss absolute, gradient relative (Frobenius)
    torch.float64: (1e-13, 1e-12), torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-6, 4e-3),
    torch.float16: (1e-6, 4e-3),
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_precision_contract(dtype, divergence):
    problem = make(129, 4133, 64, dtype)
    got = run(problem, divergence=divergence)
    truth = run(cast(problem, torch.float64), "ref", divergence=divergence)
    absolute, relative = CONTRACT[dtype]
    assert (got["loss"].double() - truth["loss"]).abs() <= absolute
    for name in ("d_hidden", "d_weight"):
        error = (got[name].double() - truth[name]).norm() / truth[name].norm()
        assert error <= relative, f"{name}: {error:.3g}"


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_small_divergences_keep_their_digits(divergence):
    # About 1e-6 nats, as for a teacher that is an average of the student: fp32 log-sum-exps are
    # off by as much as 1e-7 each.
    problem = make(35, 4133, 24)
    problem["teacher_hidden"] = problem["hidden"] + 1e-3 * torch.randn(35, 24)
    got = run(problem, divergence=divergence)
    truth = run(cast(problem, torch.float64), "ref", divergence=divergence)
    assert 1e-8 < truth["loss"] < 1e-5
    assert abs(got["loss"] / truth["loss"] - 1) < 0.01


def plain(problem, divergence, alpha):
    """From F.kl_div, not from ref.py: the expression that the docstring promises."""
    p = cast(problem, torch.float64)
    s = (p["hidden"] @ p["weight"].T).log_softmax(-1)
    t = (p["teacher_hidden"] @ p.get("teacher_weight", p["weight"]).T).log_softmax(-1)

    def kl(a, b):
        return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    m = (alpha * t.exp() + (1 - alpha) * s.exp()).log()
    value = {"forward_kl": kl(t, s), "reverse_kl": kl(s, t),
             "jsd": alpha * kl(t, m) + (1 - alpha) * kl(s, m)}[divergence]
    return (p["loss_weights"] * value).sum()


@pytest.mark.parametrize("impl", ["auto", "torch", "ref"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_it_is_the_promised_expression(divergence, impl):
    problem = make(9, 31, 8, torch.float64, teacher_h=5)
    expected = plain(problem, divergence, 0.3)
    got = run(problem, impl, divergence=divergence, alpha=0.3)["loss"]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    del problem["loss_weights"]
    mean = plain(problem | {"loss_weights": torch.full((9,), 1 / 9)}, divergence, 0.3)
    got = run(problem, impl, divergence=divergence, alpha=0.3)["loss"]
    torch.testing.assert_close(got, mean, rtol=1e-7, atol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(divergence, softcap):
    p = make(5, 11, 4, torch.float64, teacher_h=3)
    bias = torch.randn(11, dtype=torch.float64).requires_grad_()

    def f(hidden, weight, bias):
        return linear_distillation_loss(
            hidden, weight, p["teacher_hidden"], teacher_weight=p["teacher_weight"], bias=bias,
            divergence=divergence, alpha=0.3, temperature=0.7, logit_scale=0.9,
            final_logit_softcapping=softcap, max_workspace_bytes=1,
        )

    leaves = (p["hidden"].requires_grad_(), p["weight"].requires_grad_(), bias)
    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("own", [True, False], ids=["own-head", "shared-head"])
def test_the_teacher_gets_no_gradient(own):
    p = make(9, 31, 8, torch.float64, teacher_h=8)
    teacher = {k: p[k].requires_grad_() for k in ("teacher_hidden", "teacher_weight")}
    weight, bias = (x.double().requires_grad_() for x in (torch.randn(31, 8), torch.randn(31)))
    grads = []
    for impl in ("torch", "ref"):
        kwargs = {"teacher_weight": teacher["teacher_weight"]} if own else {}
        loss = linear_distillation_loss(
            p["hidden"], weight, teacher["teacher_hidden"], bias=bias, impl=impl, **kwargs
        )
        grads.append(torch.autograd.grad(
            loss, [weight, bias, *teacher.values()], allow_unused=True
        ))
    # Equal to a teacher whose copied head is detached, so nothing flows through it.
    if not own:
        kwargs = {"teacher_weight": weight.detach(), "teacher_bias": bias.detach()}
    loss = linear_distillation_loss(
        p["hidden"], weight, teacher["teacher_hidden"].detach(), bias=bias, **kwargs
    )
    expected = torch.autograd.grad(loss, (weight, bias))
    for got in grads:
        torch.testing.assert_close(got[:2], expected)
        assert got[2:] == (None, None)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_zero_at_equality(dtype, divergence):
    p = make(35, 4133, 24, dtype, std=3.0)
    p["teacher_hidden"] = p["hidden"]
    for workspace in (None, 2 * 4133 * 4 * 8):
        got = run(p, divergence=divergence, alpha=0.3, max_workspace_bytes=workspace)
        assert not any(x.any() for x in got.values())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_never_negative(divergence):
    # Each row alone: a sum over rows could hide a negative one.
    p = make(65, 1000, 24)
    for scale in (1e-4, 1e-2, 1.0):
        teacher = p["hidden"] + scale * torch.randn(65, 24)
        for row in range(0, 65, 8):
            one = linear_distillation_loss(
                p["hidden"][row : row + 1], p["weight"], teacher[row : row + 1],
                divergence=divergence,
            )
            assert one > -1e-9


def swapped(p):
    return {"hidden": p["teacher_hidden"], "weight": p["teacher_weight"],
            "teacher_hidden": p["hidden"], "teacher_weight": p["weight"],
            "loss_weights": p["loss_weights"]}


def test_symmetries_and_bounds():
    p = make(35, 301, 24, torch.float64, teacher_h=10, std=9.0)
    q = swapped(p)

    def loss(problem, divergence, alpha=0.5):
        return run(problem, divergence=divergence, alpha=alpha)["loss"]

    close = {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(loss(p, "forward_kl"), loss(q, "reverse_kl"), **close)
    torch.testing.assert_close(loss(p, "jsd"), loss(q, "jsd"), **close)
    torch.testing.assert_close(loss(p, "jsd", 0.2), loss(q, "jsd", 0.8), **close)
    assert not torch.isclose(loss(p, "jsd", 0.2), loss(q, "jsd", 0.2))
    assert not torch.isclose(loss(p, "forward_kl"), loss(p, "reverse_kl"))
    total = float(p["loss_weights"].sum())
    assert 0.5 * total * math.log(2) < loss(p, "jsd") < total * math.log(2)


@pytest.mark.parametrize("alpha, name", [(1e-7, "forward_kl"), (1 - 1e-7, "reverse_kl")])
def test_ends_of_alpha(alpha, name):
    # To first order the JSD is alpha or 1 - alpha times the KL that others run at its ends.
    p = make(35, 301, 24, torch.float64)
    ratio = run(p, alpha=alpha)["loss"] / run(p, divergence=name)["loss"] / min(alpha, 1 - alpha)
    assert abs(ratio - 1) < 1e-3


def forbid(problem, names, tokens):
    for name in names:
        problem[name] = torch.randn(problem["weight"].shape[0]).to(problem["weight"].dtype)
        problem[name][tokens] = -math.inf
    return problem


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("head", [{}, {"temperature": 0.7, "logit_scale": 0.5}], ids=["", "scaled"])
def test_forbidden_tokens(dtype, divergence, head):
    p = forbid(make(9, 31, 8, dtype, teacher_h=5), ["bias", "teacher_bias"], [3, 7])
    got, _ = check(p, divergence=divergence, **head)
    assert all(torch.isfinite(x).all() for x in got.values())
    assert not got["d_weight"][[3, 7]].any() and not got["d_bias"][[3, 7]].any()
    kept = [i for i in range(31) if i not in (3, 7)]
    narrow = {k: v[kept] if k in ("weight", "teacher_weight", "bias", "teacher_bias") else v
              for k, v in p.items()}
    torch.testing.assert_close(got["loss"], run(narrow, divergence=divergence, **head)["loss"])


@pytest.mark.parametrize("side", ["bias", "teacher_bias"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=NAMES.get)
def test_tokens_forbidden_to_one_model(dtype, divergence, side):
    p = forbid(make(9, 31, 8, dtype, teacher_h=5), [side], [3, 7])
    got, truth = check(p, divergence=divergence)
    infinite = (divergence, side) in (("forward_kl", "bias"), ("reverse_kl", "teacher_bias"))
    assert not any(x.isnan().any() for x in got.values())
    assert (truth["loss"] > 1e20) == infinite
    if side == "bias":
        assert not got["d_bias"][[3, 7]].any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_extreme_logits(divergence, softcap):
    # Most probabilities are 0 in fp32, the log-ratios hundreds of nats.
    p = make(35, 301, 24, std=100.0)
    got, truth = check(p, divergence=divergence, final_logit_softcapping=softcap)
    assert all(torch.isfinite(x).all() for x in got.values()) and truth["d_weight"].any()


@pytest.mark.parametrize("alpha", [1e-9, 1 - 1e-9])
def test_extreme_logits_with_extreme_alpha_stay_finite(alpha):
    # 1 - alpha is 1 in fp32 and expm1(-|d|) is -1: together the log of 0.
    p = make(35, 301, 24, std=100.0)
    got = run(p, alpha=alpha)
    truth = run(cast(p, torch.float64), "ref", alpha=alpha)
    assert all(torch.isfinite(x).all() for x in got.values())
    assert abs(got["loss"] / truth["loss"] - 1) < 0.5


@pytest.mark.parametrize("shift", [100.0, -100.0])
def test_shifted_logits(shift):
    p = make(35, 301, 24)
    p["bias"] = torch.full((301,), shift)
    check(p)


@pytest.mark.parametrize("impl", ["torch", "ref"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_dead_rows_never_leak(divergence, impl):
    p = make(35, 301, 24)
    clean = run(p, impl, divergence=divergence)
    dead = p["loss_weights"] == 0
    for name in ("hidden", "teacher_hidden"):
        p[name][dead] = math.nan
    poisoned = run(p, impl, divergence=divergence)
    assert 2 < dead.sum() and not poisoned["d_hidden"][dead].any()
    for name, value in clean.items():
        assert torch.equal(poisoned[name], value), name


def test_flops(monkeypatch):
    """Rows per GEMM: dead ones never enter, and no GEMM runs for a gradient nobody needs."""
    calls = {}
    for name, operand in (("logits", 0), ("dx", 0), ("add_dw", 1)):
        real = getattr(gemm, name)

        def counting(*args, name=name, operand=operand, real=real):
            calls.setdefault(name, []).append(args[operand].shape[0])
            return real(*args)

        monkeypatch.setattr(gemm, name, counting)
    p = make(35, 301, 24)
    live = int((p["loss_weights"] != 0).sum())
    for grads, expected in [
        (("hidden", "weight"), {"logits": 2 * live, "dx": live, "add_dw": live}),
        (("hidden",), {"logits": 2 * live, "dx": live}),
        (("weight",), {"logits": 2 * live, "add_dw": live}),
        ((), {"logits": 2 * live}),
    ]:
        calls.clear()
        run(p, grads=grads, max_workspace_bytes=2 * 301 * 4 * 7)
        assert {k: sum(v) for k, v in calls.items()} == expected and live < 35
        assert max(max(v) for v in calls.values()) <= 7
    calls.clear()
    with torch.no_grad():
        linear_distillation_loss(*(p[k].requires_grad_() for k in ("hidden", "weight")),
                                 p["teacher_hidden"])
    assert calls == {"logits": [35, 35]}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("options", [{}, {"final_logit_softcapping": 5.0}], ids=["", "softcap"])
def test_logits_stay_within_the_workspace(divergence, options, monkeypatch):
    """Bytes of V-wide tensors alive at any operation: the two chunks, and a few rows besides."""
    vocab, rows, live, peak, stores = 4000, 16, [], 0, set()
    monkeypatch.setitem(distillation.GROUP_ELEMENTS, "cpu", vocab)
    p = make(64, vocab, 8)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal peak
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor) and x.dim() == 2 and x.shape[1] == vocab:
                    storage = x.untyped_storage()
                    if storage.data_ptr() == p["weight"].data_ptr():  # its transpose
                        continue
                    live.append((weakref.ref(x), storage.data_ptr(), storage.nbytes()))
                    if storage.nbytes() > vocab * 4:
                        stores.add(storage.data_ptr())
            live[:] = [entry for entry in live if entry[0]() is not None]
            peak = max(peak, sum({start: size for _, start, size in live}.values()))
            return out

    with Count():
        head = Head(p["weight"], None, 1.0, 1.0, options.get("final_logit_softcapping"))
        distillation.distill(
            p["hidden"], head, p["teacher_hidden"], head, p["loss_weights"],
            divergence=divergence, alpha=0.5, topk=0, add_tail=False, need=Need(True, True, True),
            shard=Shard([0, vocab, vocab], None), impl="torch",
            max_workspace_bytes=2 * rows * vocab * 4,
        )
    chunks = 2 * 15 * vocab * 4  # 57 live rows: four even chunks
    assert chunks < peak <= chunks + 10 * vocab * 4
    assert len(stores) == 2  # allocated once


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
@pytest.mark.parametrize("impl", ["torch", "ref"])
def test_empty_batch(shape, impl):
    hidden, weight = torch.zeros(*shape, 8).requires_grad_(), torch.randn(11, 8).requires_grad_()
    bias = torch.randn(11).requires_grad_()
    loss = linear_distillation_loss(hidden, weight, hidden.detach(), bias=bias, impl=impl)
    loss.backward()
    assert loss == 0 and loss.shape == () and hidden.grad.shape == (*shape, 8)
    assert not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("impl", ["torch", "ref"])
def test_all_rows_masked(impl, dtype):
    p = make(9, 31, 8, dtype)
    p["loss_weights"].zero_()
    p["hidden"].fill_(math.nan)
    got = run(p, impl)
    assert not any(x.any() for x in got.values()) and got["d_weight"].dtype == dtype


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 24)], ids=str)
def test_any_leading_shape(shape):
    flat = make(24, 51, 8)
    folded = {k: v if k == "weight" else v.reshape(*shape, *v.shape[1:]) for k, v in flat.items()}
    for name, value in run(flat).items():
        assert torch.equal(run(folded)[name].reshape(value.shape), value), name


def test_non_contiguous_and_stride_zero_inputs():
    p = make(30, 301, 24, torch.float64)
    p["loss_weights"].fill_(0.25)
    p["teacher_hidden"] = p["teacher_hidden"][:1].repeat(30, 1)
    expected = run(p)
    inputs = {k: torch.stack([v, v], dim=-1)[..., 0] for k, v in p.items()}
    inputs["loss_weights"] = torch.tensor(0.25, dtype=torch.float64).expand(30)
    inputs["teacher_hidden"] = p["teacher_hidden"][:1].expand(30, 24)
    assert not any(x.is_contiguous() for x in inputs.values())
    leaves = [inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()]
    loss = linear_distillation_loss(**inputs)
    torch.testing.assert_close(loss, expected["loss"])
    for got, name in zip(torch.autograd.grad(loss, leaves), ("d_hidden", "d_weight"), strict=True):
        torch.testing.assert_close(got, expected[name])
    row = torch.randn(1, 24, dtype=torch.float64).requires_grad_()
    inputs = inputs | {"hidden": row.expand(30, 24), "weight": p["weight"].T.contiguous().T}
    repeated = p | {"hidden": row.detach().repeat(30, 1)}
    (d_row,) = torch.autograd.grad(linear_distillation_loss(**inputs), row)
    torch.testing.assert_close(d_row, run(repeated)["d_hidden"].sum(0, keepdim=True))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32),
                                    (torch.bfloat16, torch.float32)],
                         ids=lambda d: "-".join(map(NAMES.get, d)))
@pytest.mark.parametrize("impl", ["torch", "ref"])
def test_teacher_of_another_dtype(dtypes, impl):
    p = make(20, 51, 8, torch.float64, teacher_h=6)
    p = {k: v.to(dtypes["teacher" in k]) for k, v in p.items()}
    p["bias"], p["teacher_bias"] = torch.randn(51).bfloat16(), torch.randn(51).double()
    got = run(p, impl)
    truth = run(cast(p, torch.float64), "ref")
    assert got["d_hidden"].dtype == dtypes[0] and got["d_bias"].dtype == torch.bfloat16
    torch.testing.assert_close(got["loss"].double(), truth["loss"], rtol=1e-5, atol=1e-6)
    tolerance = {"rtol": 2e-2, "atol": 1e-5} if dtypes[0] == torch.bfloat16 else {
        "rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(got["d_hidden"].double(), truth["d_hidden"], **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_autocast_changes_nothing(dtype):
    p = make(35, 4133, 24, dtype)
    expected = {impl: run(p, impl) for impl in ("torch", "ref")}
    with torch.autocast("cpu", torch.bfloat16):
        got = run(p)
        assert torch.equal(run(p, "ref")["loss"], expected["ref"]["loss"])
    for name, value in expected["torch"].items():
        assert torch.equal(got[name], value), name


def test_fp16_loss_scale_reaches_gradients_that_fp16_cannot_hold():
    # 1e6 tokens: |d_hidden| is below fp16's 6e-8; GradScaler starts at 65536.
    p = make(67, 301, 24, torch.float16)
    p["bias"] = torch.randn(301).half()
    p["loss_weights"] = p["loss_weights"] * 67e-6
    got, truth = check(p, upstream=65536.0)
    for name in ("d_hidden", "d_weight", "d_bias"):
        error = (got[name].double() - truth[name]).norm() / truth[name].norm()
        assert error < 4e-3, f"{name}: {error:.2g}"


def test_bf16_head_gradient_is_accumulated_in_fp32():
    # 512 chunks of one row each add the same number: a bf16 sum stalls at 256 of them.
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16)
    p = {"hidden": hidden, "weight": weight, "teacher_hidden": hidden,
         "teacher_weight": torch.tensor([[60.0], [-60.0]]).bfloat16(),
         "loss_weights": torch.ones(512)}
    assert run(p, divergence="forward_kl", max_workspace_bytes=1)["d_weight"].tolist() == [
        [-256.0], [256.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_bitwise_equal_from_run_to_run(dtype):
    p = make(35, 4133, 24, dtype)
    torch.use_deterministic_algorithms(False)  # it must hold without PyTorch's help
    runs = [run(p, max_workspace_bytes=2 * 4133 * 4 * 8) for _ in range(3)]
    for name, value in runs[0].items():
        assert all(torch.equal(other[name], value) for other in runs), name


def test_retain_graph_and_accumulation():
    p = make(20, 51, 8)
    expected = run(p)
    leaves = {k: p[k].clone().requires_grad_() for k in ("hidden", "weight")}
    loss = linear_distillation_loss(**(p | leaves))
    loss.backward(retain_graph=True)
    assert torch.equal(leaves["weight"].grad, expected["d_weight"])
    loss.backward()
    again = linear_distillation_loss(**(p | leaves))
    (again * 2).backward()
    for k, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 4 * expected[f"d_{k}"])
    with pytest.raises(RuntimeError, match="second time"):
        again.backward()
    with pytest.raises(RuntimeError, match="differentiation"):
        torch.autograd.grad(
            linear_distillation_loss(**(p | leaves)), leaves["hidden"], create_graph=True
        )


def test_micro_batches_add_up():
    p = make(48, 51, 8, torch.float64)
    whole = run(p)
    parts = [
        run({k: v if k == "weight" else v[rows] for k, v in p.items()})
        for rows in (slice(0, 20), slice(20, 21), slice(21, 48))
    ]
    for name in ("loss", "d_weight"):
        torch.testing.assert_close(sum(q[name] for q in parts), whole[name])
    torch.testing.assert_close(torch.cat([q["d_hidden"] for q in parts]), whole["d_hidden"])
