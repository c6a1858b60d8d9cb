"""What the two GPU implementations share: aligned rows, one order of sums, one GEMM per row."""

import math

import emulation
import pytest
import torch
from problems import NAMES

from rlsd_kernels import available_impls, cuda_impl, gemm, linear_log_probs, rows, torch_impl
from rlsd_kernels.logprob import load_impl
from rlsd_kernels.shards import Shard

KERNELS = ["torch", *(["triton"] if available_impls()["triton"] == "ok" else []), "cuda"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(impl, monkeypatch):
    """The module of the implementation, ready to run here."""
    if impl == "cuda" and DEVICE == "cpu":
        emulation.stand_in(monkeypatch)
    return load_impl(impl)


@pytest.mark.parametrize("impl", KERNELS[1:])
def test_what_is_stored_never_changes_a_sum(kernels):
    """The teacher's pass stores nothing and the student's does: equal logits, equal bits."""
    # Small logits: thousands of terms of one size, whose order shows in the last bits.
    h, weight = 0.2 * torch.randn(3, 8, device=DEVICE), torch.randn(9001, 8, device=DEVICE)
    c = torch.full((3,), 9.0, device=DEVICE)
    results = []
    for keep, dtype in ((None, None), ("exp", torch.bfloat16), ("exp", torch.float32),
                        ("logits", torch.float32)):
        scorer = kernels.Scorer(weight, None, 0.7, 1.3, None, 3)
        out = None if keep is None else torch.empty(
            3, kernels.padded(9001), dtype=dtype, device=DEVICE
        )[:, :9001]
        results.append(scorer.score(h, c, out=out, keep=keep, want_entropy=True))
    for got in results[1:]:
        for x, want in zip(got, results[0], strict=True):
            assert torch.equal(x, want)


@pytest.mark.parametrize("softcap", [None, 40.0], ids=["", "softcap"])
@pytest.mark.parametrize("impl", KERNELS)
def test_the_target_logit_comes_from_the_gemm_of_the_sum(kernels, impl, softcap, monkeypatch):
    """A GEMM that is off by 1e-4, as tensor cores are in sums of many products, would put a dot
    product of the target 2e-3 nats away from the log-sum-exp of logits near 20."""
    real = gemm.logits
    monkeypatch.setattr(gemm, "logits", lambda h, w, out: real(h, w, out).mul_(1 + 1e-4))
    weight = torch.nn.functional.normalize(torch.randn(301, 64), dim=-1).to(DEVICE)
    bias = (0.1 * torch.randn(301)).to(DEVICE)
    ids = torch.arange(0, 300, 20, device=DEVICE)
    for off in (0, 1):  # the token that is nearly certain, and one that nothing favours
        z = 20 * weight[ids].double() @ weight.double().T + bias
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        exact = z.log_softmax(-1).gather(-1, (ids + off)[:, None])[:, 0]
        lp = linear_log_probs(
            20 * weight[ids], weight, ids + off, bias=bias, final_logit_softcapping=softcap,
            impl=impl,
        )
        assert ((lp - exact).abs() < 1.1e-4 * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("keep", ["exp", "logits"])
@pytest.mark.parametrize("impl", KERNELS)
def test_rows_of_e_and_z_are_aligned_at_any_vocabulary(kernels, impl, keep):
    weight = torch.randn(1003, 4, device=DEVICE)
    found = rows.Rows(
        kernels, rows.Head(weight, None, 1.0, 1.0, None), Shard([0, 1003, 1003], None), 7,
        keep=keep, max_workspace_bytes=2**20,
    )
    for x in (found.e, found.z) if keep == "logits" else (found.e,):
        assert x.shape == (7, 1003) and x.stride() == (1003 if impl == "torch" else 1008, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("impl", KERNELS)
def test_gradients_are_scaled_in_place(kernels, dtype):
    x = torch.randn(5, 1001, device=DEVICE).to(dtype)
    for factor in (1.0, -2.5, 0.0):
        scaled = x.clone()
        kernels.scale(scaled, torch.full((1,), factor, device=DEVICE))
        torch.testing.assert_close(scaled, (x.float() * factor).to(dtype), rtol=0, atol=0)


def test_every_implementation_has_the_same_stages():
    names = {n for n in cuda_impl.__all__ if n != "Scorer"}
    assert all(callable(getattr(torch_impl, n)) for n in names)


@pytest.mark.parametrize("m", [1, 43])  # 43 x 3: a second, partly masked block
@pytest.mark.parametrize("impl", KERNELS)
def test_several_targets_of_a_row_are_fixed(kernels, m):
    e = torch.randn(m, 77, device=DEVICE)[:, :50]
    ids = torch.randint(-3, 53, (m, 3), device=DEVICE)
    ids[:, 1] = 0  # beside ids that are nowhere
    values = ids.float() * 2 + torch.arange(m, device=DEVICE)[:, None]
    expected = e.clone()
    for i, row in enumerate(ids.tolist()):
        for target in row:
            if 0 <= target < 50:
                expected[i, target] = 2 * target + i
    kernels.fix_targets(e, ids, values)
    assert torch.equal(e, expected)


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["", "softcap"])
@pytest.mark.parametrize("bias", [0.0, 1.0, -math.inf], ids=["", "bias", "forbidden"])
@pytest.mark.parametrize("v", [1, 129, 9001])  # a tile of mask, one past a tile, tiles and a tail
@pytest.mark.parametrize("impl", KERNELS)
def test_the_sum_of_a_rows_logits_and_the_first_of_its_largest(kernels, v, bias, softcap):
    h, weight = torch.randn(3, 8, device=DEVICE), torch.randn(v, 8, device=DEVICE)
    b = None
    if bias:
        b = torch.randn(v, device=DEVICE)
        b[1::3] = b[1::3] if bias == 1 else bias
    if v > 1000:  # equals, in one tile and in several
        best = int((h[0] @ weight.T + (0 if b is None else b)).argmax())
        for j in (v - 1, 70, 3):
            weight[j] = weight[best]
            if b is not None:
                b[j] = b[best]
    scorer = kernels.Scorer(weight, b, 0.7, 1.3, softcap, 3)
    total, top, z_y = (torch.full((3,), math.nan, device=DEVICE) for _ in range(3))
    place, c, z = total.long(), torch.zeros(3, device=DEVICE), torch.empty(3, v, device=DEVICE)
    scorer.score(h, c, logits=(total, top, place))
    scorer.score(h, c, out=z, keep="logits", ids=place, z_y=z_y)
    assert torch.equal(place, z.max(-1).indices) and torch.equal(top, z_y)
    want = z.double().sum(-1)
    assert torch.equal(total.isinf(), want.isinf())
    if want.isfinite().all():
        assert ((total - want).abs() <= 3e-7 * z.abs().double().sum(-1) + 1e-6).all()
