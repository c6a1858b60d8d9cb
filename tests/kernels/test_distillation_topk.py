"""distillation_topk of linear_distillation_loss: values, gradients, and TRL's definition."""

import pytest
import torch
from problems import DTYPES, NAMES, assert_as_accurate, cast, make_problem

from rlsd_kernels import linear_distillation_loss

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def run(problem, impl, **options):
    inputs = {k: x.clone() for k, x in problem.items()}
    leaves = {k: inputs[k].requires_grad_() for k in ("hidden", "weight", "bias") if k in inputs}
    positional = [inputs.pop(k) for k in ("hidden", "weight", "teacher_hidden")]
    loss = linear_distillation_loss(*positional, **inputs, **options, impl=impl)
    loss.backward()
    return {"loss": loss.detach()} | {f"d_{k}": x.grad for k, x in leaves.items()}


def make(dtype, n=13, v=301, h=16):
    p = make_problem(n, v, h, dtype, teacher_h=24)
    names = ("hidden", "weight", "teacher_hidden", "loss_weights", "teacher_weight")
    p = {k: p[k] for k in names}
    return p | {"bias": torch.randn(v).to(dtype)}


# One token; some; all, where the tail is empty.
@pytest.mark.parametrize("k", [1, 20, 301])
@pytest.mark.parametrize("tail", [True, False], ids=["tail", "renormalised"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_it_is_the_specification(dtype, divergence, tail, k):
    options = {
        "divergence": divergence, "alpha": 0.3, "distillation_topk": k,
        "distillation_add_tail": tail, "temperature": 0.8, "final_logit_softcapping": 6.0,
    }
    p = make(dtype)
    got = run(p, "torch", max_workspace_bytes=5 * 2 * 301 * 4, **options)
    truth = run(cast(p, torch.float64), "ref", **options)
    if k == 1 and not tail:  # one bucket of mass 1
        assert not any(x.any() for x in got.values()) and abs(truth["loss"]) < 1e-12
    elif k == 301 and tail and dtype != torch.float64:
        # The tail is at its floor of 1e-7, which fp32 sums of p do not resolve.
        for name, value in truth.items():
            assert (got[name].double() - value).norm() < 4e-3 * value.norm(), name
    else:
        assert_as_accurate(got, run(p, "ref", **options), truth)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_tokens_equal_the_whole_vocabulary(divergence):
    p = make(torch.float64)
    whole = run(p, "torch", divergence=divergence)
    for tail in (False, True):
        got = run(p, "torch", divergence=divergence, distillation_topk=301,
                  distillation_add_tail=tail)
        for name, value in whole.items():
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_certain_student_leaves_no_tail(divergence):
    """The tail at TRL's floor is a constant: no gradient divided by almost nothing."""
    p = make(torch.float64, n=6)
    ids = torch.arange(6)
    p["hidden"] = 60 * p["weight"][ids]
    options = {"divergence": divergence, "distillation_topk": 3, "distillation_add_tail": True}
    got, want = run(p, "torch", **options), run(p, "ref", **options)
    for name, value in want.items():
        assert value.isfinite().all()
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tail", [True, False], ids=["tail", "renormalised"])
@pytest.mark.parametrize("divergence, alpha", [("forward_kl", 0.0), ("reverse_kl", 1.0),
                                               ("jsd", 0.3)])
def test_it_is_trls_definition(divergence, alpha, tail):
    theirs = pytest.importorskip("trl.experimental.sdpo.loss_utils", reason="needs TRL")
    p = make(torch.float64)
    z = p["hidden"] @ p["weight"].T + p["bias"]
    z.requires_grad_()
    t = p["teacher_hidden"] @ p["teacher_weight"].T
    want = theirs.compute_topk_self_distillation_loss(
        z, t, distillation_topk=20, distillation_alpha=alpha, distillation_add_tail=tail
    )
    want = (want * p["loss_weights"]).sum()
    (dz,) = torch.autograd.grad(want, z)
    got = run(p, "torch", divergence=divergence, alpha=alpha or 0.5, distillation_topk=20,
              distillation_add_tail=tail)
    torch.testing.assert_close(got["loss"], want.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got["d_bias"], dz.sum(0), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("changes, kind, message", [
    ({"distillation_topk": 0}, ValueError, r"None or a whole number in \[1, 301\], but got 0"),
    ({"distillation_topk": 302}, ValueError, r"in \[1, 301\], but got 302"),
    ({"distillation_topk": 2.0}, ValueError, r"but got 2.0"),
    ({"distillation_topk": True}, ValueError, r"but got True"),
    ({"distillation_add_tail": True}, ValueError, r"^distillation_add_tail is for"),
    ({"distillation_topk": 3, "distillation_add_tail": 1}, TypeError, r"must be True or False"),
    ({"distillation_topk": 3, "impl": "triton"}, ValueError, r"^impl='triton' cannot run: disti"),
])
def test_error_sentences(changes, kind, message):
    with pytest.raises(kind, match=message) as error:
        run(make(torch.float32), **{"impl": "torch", **changes})
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
