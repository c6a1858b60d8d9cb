"""What it may take and must withstand: memory, bad ids, many rows, odd layouts, NaN and inf."""

import math

import pytest
import torch
from on_gpu import (
    DEVICE,
    DTYPES,
    KERNELS,
    assert_contract,
    big,
    check_accuracy,
    problem,
    relative,
    require,
    run_scaled,
    share_of,
    size,
    truth_of,
)
from problems import NAMES, make_problem, run_fused

from rlsd.checks.measure import peak_extra_bytes
from rlsd_kernels import fused_linear_rlsd_loss, linear_log_probs, tuning

BF16 = torch.bfloat16
GIB = 2**30


def random_step(n, v, h, impl, *, frozen_head=False, **options):
    """A function of no argument that runs one bf16 step, all rows live, on random inputs."""
    rng = torch.Generator(DEVICE).manual_seed(0)

    def randn(*shape, scale=1.0):
        x = torch.randn(*shape, generator=rng, device=DEVICE, dtype=BF16)
        return x.mul_(scale)

    hidden, weight = randn(n, h).requires_grad_(), randn(v, h, scale=0.02)
    weight.requires_grad_(not frozen_head)
    teacher = randn(n, h)
    ids = torch.randint(v, (n,), generator=rng, device=DEVICE)
    a = torch.randn(n, generator=rng, device=DEVICE)
    old = torch.full((n,), -math.log(v), device=DEVICE)

    def step():
        hidden.grad = weight.grad = None
        out = fused_linear_rlsd_loss(
            hidden, weight, ids, a, teacher_hidden=teacher, old_log_probs=old, impl=impl, **options
        )
        out.loss.backward()
        assert (weight.grad is None) == frozen_head
        return out.loss

    step.leaves = hidden, weight
    return step


def peak_of(step):
    """Bytes of one call beyond the inputs, gradients included, once everything is compiled."""
    step()
    hidden, weight = step.leaves
    hidden.grad = weight.grad = None
    return peak_extra_bytes(step, DEVICE)


@big
@pytest.mark.cuda_only
@pytest.mark.parametrize("impl", KERNELS)
def test_peak_memory_of_an_8b_model(impl, production):
    """8192 rows of Qwen3-8B's head: E of all rows, a chunk, both gradients."""
    require(impl, BF16)
    step = random_step(8192, 151936, 4096, impl)
    assert peak_of(step) <= 5 * GIB


@big
@pytest.mark.cuda_only
@pytest.mark.parametrize("frozen_head", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("mib", [256, 1024, None], ids="{}MiB".format)
@pytest.mark.parametrize("impl", KERNELS)
def test_peak_memory_keeps_to_the_workspace(impl, mib, frozen_head, production):
    require(impl, BF16)
    n, v, h = 4096, 151936, 256
    step = random_step(
        n, v, h, impl, frozen_head=frozen_head, max_workspace_bytes=mib and mib * 2**20
    )
    workspace = mib * 2**20 if mib else tuning.default_workspace_bytes("cuda")
    dw = 0 if frozen_head else v * h * (4 + 2)  # the sum over groups in fp32, and its rounding
    # Rows in fp32 and 16 bits, cuBLAS's own workspace, and what the allocator rounds up.
    assert peak_of(step) <= workspace + dw + 16 * n * h + 64 * 2**20


@big
@pytest.mark.cuda_only
@pytest.mark.parametrize("impl", KERNELS)
def test_a_frozen_head_allocates_no_dw(impl, production):
    """dW would be larger than E and the chunk together."""
    require(impl, BF16)
    n, v, h = 128, 151936, 2048
    assert peak_of(random_step(n, v, h, impl, frozen_head=True)) < v * h * 2 / 2


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_bad_ids_give_nan_for_their_row_alone(dtype, impl):
    """On CUDA only check_inputs looks at ids; without it nothing is read or written elsewhere."""
    require(impl, dtype)
    if DEVICE == "cpu":
        pytest.skip("on a CPU ids are always checked")
    n, v = size(130, 80), size(32003, 303)
    p, options = problem("off-policy", n, v, 64, dtype)
    p["advantages"] = torch.where(p["advantages"] == 0, 0.5, p["advantages"])
    p["loss_weights"] = torch.full_like(p["loss_weights"], 1 / n)
    good = run_fused(p, impl, **options)
    bad = torch.zeros(n, dtype=torch.bool, device=DEVICE)
    for row, value in ((3, -1), (17, v), (60, 2**40), (n - 1, -(2**40))):
        p["completion_ids"][row], bad[row] = value, True
    got = run_fused(p, impl, **options)
    torch.cuda.synchronize()
    for name in ("log_probs", "teacher_log_probs"):
        assert got[name][bad].isnan().all() and torch.equal(got[name][~bad], good[name][~bad])
    assert got["loss"].isnan() and got["d_hidden"][bad].isnan().any(-1).all()
    assert relative(got["d_hidden"][~bad], good["d_hidden"][~bad]) <= 1e-2
    with pytest.raises(ValueError, match=rf"^completion_ids must lie in \[0, {v}\)"):
        run_fused(p, impl, check_inputs=True, **options)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_more_rows_than_a_grid_dimension(dtype, impl):
    """Dimensions y and z of a launch end at 65535."""
    require(impl, dtype)
    p, options = problem("all", size(70001, 40), 160, 16, dtype)
    assert_contract(run_scaled(p, impl, dtype, **options), truth_of(p, options), dtype)


@pytest.mark.parametrize("impl", KERNELS)
def test_autocast_brings_an_fp32_head_to_bf16_hidden_states(impl):
    require(impl, BF16)
    p, options = problem("off-policy", size(257, 21), size(32003, 303), 64)
    p |= {k: p[k].bfloat16() for k in ("hidden", "teacher_hidden")}
    with torch.autocast(DEVICE, BF16):
        got = run_fused(p, impl, **options)
    expected = run_fused(p | {"weight": p["weight"].bfloat16()}, impl, **options)
    assert got["d_weight"].dtype == torch.float32 and got["d_hidden"].dtype == BF16
    for name, value in expected.items():
        assert torch.equal(got[name].to(value.dtype), value), name


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_strided_inputs(dtype, impl):
    """Transposed hidden states and head, every second row, one advantage for all tokens."""
    require(impl, dtype)
    n, v, h = size(130, 20), size(32003, 303), 64
    p, options = problem("off-policy", n, v, h, dtype)
    p["advantages"] = p["advantages"][:1].expand(n)
    assert p["advantages"].stride() == (0,) and p["advantages"][0] != 0
    strided = dict(p)
    strided["hidden"] = p["hidden"].T.contiguous().T
    strided["teacher_hidden"] = p["teacher_hidden"].repeat_interleave(2, 0)[::2]
    strided["weight"] = torch.cat([p["weight"], p["weight"]], 1)[:, :h]
    strided["old_log_probs"] = torch.stack([p["old_log_probs"]] * 2, 1)[:, 0]
    inputs = {k: x for k, x in strided.items() if torch.is_tensor(x)}
    assert not any(inputs[k].is_contiguous() for k in ("hidden", "teacher_hidden", "weight"))
    leaves = [inputs.pop(k).requires_grad_() for k in ("hidden", "weight")]
    out = fused_linear_rlsd_loss(
        *leaves, inputs.pop("completion_ids"), inputs.pop("advantages"), **inputs, **options,
        impl=impl,
    )
    grads = torch.autograd.grad(out.loss, leaves)
    got = {"loss": out.loss.detach(), "log_probs": out.log_probs,
           "teacher_log_probs": out.teacher_log_probs, "d_hidden": grads[0], "d_weight": grads[1]}
    assert_contract(got, truth_of(p, options), dtype)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_no_rows_one_row_and_dead_rows(dtype, impl):
    require(impl, dtype)
    v = size(32003, 303)
    p, options = problem("on-policy", 9, v, 64, dtype)  # ratio 1: the one row has a gradient
    one = {k: x if k == "weight" else x[:1] for k, x in p.items()}
    check_accuracy(one, options, impl, dtype)
    empty = run_fused({k: x if k == "weight" else x[:0] for k, x in p.items()}, impl, **options)
    dead = run_fused(p | {"loss_weights": torch.zeros_like(p["loss_weights"])}, impl, **options)
    for got in (empty, dead):
        assert got["loss"] == 0 and (got["d_weight"] == 0).all() and (got["d_hidden"] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("impl", KERNELS)
def test_non_finite_input_is_refused_or_shows_and_never_hangs(impl, bad):
    require(impl, BF16)
    p, options = problem("off-policy", size(64, 12), size(32003, 303), 64, BF16)
    assert p["advantages"][0] != 0 and p["loss_weights"][0] != 0
    p["hidden"] = p["hidden"].clone()
    p["hidden"][0, 3] = bad
    with pytest.raises(ValueError, match="^hidden has non-finite values"):
        run_fused(p, impl, check_inputs=True, **options)
    got = run_fused(p, impl, **options)
    assert not got["log_probs"][0].isfinite() and got["log_probs"][1:].isfinite().all()


@pytest.mark.parametrize("impl", KERNELS)
def test_per_token_upstream_gradients(impl):
    """Not one number for all rows, and zero for some."""
    require(impl, BF16)
    p = make_problem(size(257, 21), size(32003, 303), 64, BF16, device=DEVICE)
    upstream = torch.logspace(-3, 3, len(p["hidden"]), device=DEVICE)
    upstream[::5] = 0
    grads = []
    for name, width in ((impl, BF16), ("ref", torch.float64)):
        leaves = [p[k].to(width).requires_grad_() for k in ("hidden", "weight")]
        lp = linear_log_probs(*leaves, p["completion_ids"], impl=name)
        grads.append(torch.autograd.grad((lp * upstream).sum(), leaves))
    loud = int((upstream > upstream.max() / 10).sum())  # the rows that make the sum
    for got, truth in zip(*grads, strict=True):
        assert relative(got, truth) <= share_of(BF16, loud)
    assert (grads[0][0][::5] == 0).all()
