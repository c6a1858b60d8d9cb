"""linear_distillation_loss under opcheck and torch.compile."""

import pytest
import torch
from problems import NAMES
from test_distillation import DIVERGENCES, make

from rlsd_kernels import distillation, linear_distillation_loss
from rlsd_kernels.ops import Need, flatten
from rlsd_kernels.rows import Head
from rlsd_kernels.shards import Shard

OPCHECKS = {
    "fp32": (torch.float32, False, False, None, (True, True)),
    "bias-softcap": (torch.float32, True, True, 2.0, (True, True)),
    "frozen-head": (torch.float32, True, False, None, (True, False)),
    "frozen-hidden": (torch.float64, False, True, None, (False, True)),
    "bf16": (torch.bfloat16, True, False, None, (True, True)),
    "fp16": (torch.float16, True, True, None, (True, True)),
}


@pytest.mark.parametrize("case", OPCHECKS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_opcheck(case, divergence):
    dtype, bias, own, softcap, (dx, dw) = OPCHECKS[case]
    p = make(5, 7, 3, dtype, teacher_h=4 if own else None)
    b = torch.randn(7).to(dtype).requires_grad_() if bias else None
    torch.library.opcheck(
        torch.ops.rlsd.linear_distillation_loss.default,
        flatten(distillation.DistillationInputs(
            p["hidden"].requires_grad_(dx),
            Head(p["weight"].requires_grad_(dw), b, 1.3, 0.7, softcap), p["teacher_hidden"],
            p.get("teacher_weight"), torch.randn(7).to(dtype) if own and bias else None,
            p["loss_weights"], torch.tensor(0.3, dtype=torch.float64), divergence,
            0, False, Need(dx, dw, bias), False, Shard([0, 7, 7], None), "torch",
            2**20,
        )),
    )


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=NAMES.get)
def test_compiled(dtype, divergence, fresh_compiler):
    p = make(12, 51, 8, dtype)

    def f(hidden, weight):
        return linear_distillation_loss(
            **(p | {"hidden": hidden, "weight": weight}), divergence=divergence, temperature=0.7
        )

    results = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaves = [p[k].clone().requires_grad_() for k in ("hidden", "weight")]
        loss = g(*leaves)
        results.append([loss.detach(), *torch.autograd.grad(loss * 3.7, leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled) and eager.any()


def count_compilations(sizes, alphas):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def f(hidden, weight, teacher_hidden, alpha):
        return linear_distillation_loss(hidden, weight, teacher_hidden, alpha=alpha)

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for n, alpha in zip(sizes, alphas, strict=True):
        p = make(n, 51, 8)
        args = (p["hidden"], p["weight"], p["teacher_hidden"], alpha)
        torch.testing.assert_close(compiled(*args), f(*args), rtol=0, atol=0)
    return counter.frame_count


def test_new_lengths_and_an_alpha_schedule_do_not_recompile(fresh_compiler):
    assert count_compilations([12, 15, 9, 20, 31], [0.5] * 5) == 2  # static, then dynamic
    torch._dynamo.reset()
    assert count_compilations([12] * 5, [0.5, 0.4, 0.3, 0.2, 0.1]) <= 2
