"""Forward and backward of the fused loss, side by side in one process: `make bench`.

The same RLSD step (student and privileged teacher over the head) by every implementation that
runs here. Quote ratios within one run, never times of a shared machine.
"""

import pytest
import torch

from rlsd.validate import make_inputs
from rlsd_kernels import available_impls, fused_linear_rlsd_loss

IMPLS = [name for name, state in available_impls().items() if state == "ok"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("head", ["full", "frozen"])
@pytest.mark.parametrize("shape", [(512, 256, 16384)], ids=["fp32-N512-H256-V16384"])
def test_step(benchmark, impl, head, shape):
    rows, hidden, vocab = shape
    inputs = make_inputs(torch.float32, {}, rows=rows, hidden=hidden, vocab=vocab)
    inputs["hidden"].requires_grad_()
    inputs["weight"].requires_grad_(head == "full")

    def step():
        inputs["hidden"].grad = inputs["weight"].grad = None
        out = fused_linear_rlsd_loss(impl=impl, **inputs)
        out.loss.backward()
        return out.loss.detach()

    loss = benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    with torch.no_grad():
        want = fused_linear_rlsd_loss(impl="ref", **inputs).loss
    torch.testing.assert_close(loss, want)
