"""ops: what an op is given is let go of when it returns; no derivative is silently 0:
neither the second nor one in forward mode; meta tensors and default devices."""

import gc
import weakref

import pytest
import torch
from problems import make_problem

from rlsd_kernels import (
    fused_linear_rlsd_loss,
    linear_distillation_loss,
    linear_log_probs,
    rlsd_loss,
)

OPS = {
    "loss": lambda p: fused_linear_rlsd_loss(**p, impl="torch").loss,
    "log-probs": lambda p: linear_log_probs(
        p["hidden"], p["weight"], p["completion_ids"], impl="torch"
    ).sum(),
    "distillation": lambda p: linear_distillation_loss(
        p["hidden"], p["weight"], p["teacher_hidden"], impl="torch"
    ),
}


@pytest.mark.parametrize("op", OPS)
def test_nothing_waits_for_the_garbage_collector(op):
    p = make_problem(20, 51, 8)
    p["weight"].requires_grad_()
    OPS[op](p).backward()  # what is cached once
    p["weight"].grad = None
    gc.collect()
    gc.disable()
    try:
        hidden = p["hidden"].clone().requires_grad_()
        gone = weakref.ref(hidden)
        OPS[op](p | {"hidden": hidden}).backward()
        del hidden
        p["weight"].grad = None
        left = gc.collect()
    finally:
        gc.enable()
    assert gone() is None
    assert left == 0


@pytest.mark.parametrize("retain", [True, False])
@pytest.mark.parametrize("op", ["loss", "distillation", "of-log-probs"])
def test_second_derivatives_are_refused(op, retain):
    p = make_problem(20, 51, 8)
    x = p["hidden"].requires_grad_()
    if op == "of-log-probs":
        x = p["old_log_probs"].clone().requires_grad_()
        loss = rlsd_loss(
            x, p["advantages"], teacher_log_probs=p["old_log_probs"] - 0.1,
            old_log_probs=p["old_log_probs"], impl="torch",
        ).loss
    else:
        loss = OPS[op](p)
    with pytest.raises(RuntimeError, match=r"second differentiation.*impl='ref'\.$"):
        torch.autograd.grad(loss, x, retain_graph=retain, create_graph=True)


@pytest.mark.parametrize("op", OPS)
def test_meta_tensors(op):
    """A dry run of a training step."""
    p = {k: x.to("meta") for k, x in make_problem(20, 51, 8).items()}
    leaves = {k: p[k].requires_grad_() for k in ("hidden", "weight")}
    OPS[op](p).backward()
    for x in leaves.values():
        assert x.grad.is_meta and x.grad.shape == x.shape


@pytest.mark.parametrize("impl", ["torch", "ref"])
def test_another_default_device(impl):
    p = make_problem(20, 51, 8)
    expected = fused_linear_rlsd_loss(**p, impl=impl).loss
    with torch.device("meta"):
        assert torch.equal(fused_linear_rlsd_loss(**p, impl=impl).loss, expected)


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_is_refused(op):
    p = make_problem(20, 51, 8)
    with pytest.raises(RuntimeError, match=r"forward-mode derivative .*impl='ref'\.$"):
        torch.func.jvp(
            lambda h: OPS[op](p | {"hidden": h}), (p["hidden"],), (torch.ones_like(p["hidden"]),)
        )
