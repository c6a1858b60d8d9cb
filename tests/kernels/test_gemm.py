"""The GEMMs as PyTorch sees them on a GPU: dtypes and shapes on fake CUDA tensors, nothing runs."""

import pytest
import torch
from problems import NAMES, make_problem, run_fused
from torch._subclasses.fake_tensor import FakeTensorMode

from rlsd_kernels import gemm, linear_distillation_loss, linear_log_probs

ROWS, VOCAB, WIDTH = 24, 130, 16


@pytest.fixture
def on_gpu():
    """new(rows, columns, dtype): CUDA tensors without a GPU or memory."""
    if not torch.backends.cuda.is_built():
        pytest.skip("this torch is built for the CPU and makes no CUDA tensors, not even fake ones")
    with FakeTensorMode():
        yield lambda *shape, dtype: torch.empty(*shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=NAMES.get)
def test_pytorch_accepts_the_gemms_of_a_gpu(on_gpu, dtype):
    h, weight = on_gpu(ROWS, WIDTH, dtype=dtype), on_gpu(VOCAB, WIDTH, dtype=dtype)
    chunk = on_gpu(ROWS, 144, dtype=torch.float32)[:, :VOCAB]  # rows padded to 16 elements
    assert gemm.operand_dtype(weight) == dtype
    assert gemm.logits(h, weight, chunk) is chunk
    e = on_gpu(ROWS, VOCAB, dtype=dtype)
    assert gemm.dx(e, weight).dtype == torch.float32
    for dw_dtype in {torch.float32, dtype}:  # several groups of rows, or all rows at once
        dw = on_gpu(VOCAB, WIDTH, dtype=dw_dtype)
        assert gemm.add_dw(dw, e, h) is dw


def test_an_fp32_result_is_asked_for_where_it_is_fp32():
    """PyTorch refuses out_dtype=float32 with an `out` of 16 bits."""
    wide, narrow = torch.empty(2, 2), torch.empty(2, 2, dtype=torch.bfloat16)
    asked = {"out_dtype": torch.float32}
    assert gemm._out_dtype(narrow) == gemm._out_dtype(narrow, wide) == asked
    assert gemm._out_dtype(narrow, narrow) == gemm._out_dtype(wide) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=NAMES.get)
def test_the_first_group_of_rows_overwrites_dw(dtype):
    e, x = torch.randn(5, 7, dtype=dtype), torch.randn(5, 3, dtype=dtype)
    dw = torch.full((7, 3), torch.nan, dtype=dtype)
    gemm.add_dw(dw, e, x, first=True)
    torch.testing.assert_close(dw, e.T @ x)
    gemm.add_dw(dw, e, x)
    torch.testing.assert_close(dw, 2 * e.T @ x)


def test_only_the_first_group_does(monkeypatch):
    """No zero fill of an fp32 copy of the head, and nothing left of it if no row is live."""
    seen, real = [], gemm.add_dw
    monkeypatch.setattr(
        gemm, "add_dw", lambda *a, first=False: seen.append(first) or real(*a, first=first)
    )
    p = make_problem(24, 53, 8)
    p["loss_weights"][:], p["advantages"][:] = 1 / 24, 1.0
    run_fused(p, "torch", grads=("weight",), max_workspace_bytes=8 * 4 * 4 * 53)
    assert len(seen) == 3 and seen == [True, False, False]
    p["loss_weights"][:] = 0
    assert not run_fused(p, "torch", grads=("weight",))["d_weight"].any() and len(seen) == 3


# What a user may have set for the rest of the model.
FAST = {
    "fp32_precision": "tf32", "allow_bf16_reduced_precision_reduction": True,
    "allow_fp16_reduced_precision_reduction": True, "allow_fp16_accumulation": True,
}


@pytest.fixture
def fast_flags():
    backend = torch.backends.cuda.matmul
    before = {name: getattr(backend, name) for name in FAST}
    medium = torch.backends.mkldnn.matmul.fp32_precision
    for name, value in FAST.items():
        setattr(backend, name, value)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    yield lambda: ({n: getattr(backend, n) for n in FAST},
                   torch.backends.mkldnn.matmul.fp32_precision)
    for name, value in before.items():
        setattr(backend, name, value)
    torch.backends.mkldnn.matmul.fp32_precision = medium


def test_the_ops_never_compute_in_tf32(fast_flags, monkeypatch):
    """Nor in bf16 on a CPU, nor in 16-bit partial sums; the caller's flags come back."""
    seen = []
    for name in ("logits", "dx", "add_dw"):
        real = getattr(gemm, name)
        monkeypatch.setattr(
            gemm, name,
            lambda *a, _name=name, _real=real, **k: seen.append((_name, fast_flags())) or _real(
                *a, **k),
        )
    p = make_problem(9, 53, 8)
    before = fast_flags()
    run_fused(p, "torch")
    h, w = p["hidden"].requires_grad_(), p["weight"].requires_grad_()
    linear_log_probs(h, w, p["completion_ids"], impl="torch").sum().backward()
    linear_distillation_loss(h, w, p["teacher_hidden"], impl="torch").backward()
    assert {name for name, _ in seen} == {"logits", "dx", "add_dw"} and len(seen) >= 10
    for _, (cuda, cpu) in seen:
        assert cuda == {"fp32_precision": "ieee", "allow_bf16_reduced_precision_reduction": False,
                        "allow_fp16_reduced_precision_reduction": False,
                        "allow_fp16_accumulation": False} and cpu == "ieee"
    assert fast_flags() == before


def test_a_thread_that_leaves_keeps_the_flags_of_one_inside(fast_flags):
    """In place of two threads: two contexts, of which the first to open is the first to close."""
    first, second = (gemm.full_precision(torch.device("cpu")) for _ in range(2))
    before = fast_flags()
    first.__enter__()
    inside = fast_flags()
    second.__enter__()
    first.__exit__(None, None, None)
    assert fast_flags() == inside != before
    second.__exit__(None, None, None)
    assert fast_flags() == before
