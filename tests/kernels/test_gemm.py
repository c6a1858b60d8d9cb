"""The GEMMs as PyTorch sees them on a GPU: dtypes and shapes on fake CUDA tensors, nothing runs."""

import pytest
import torch
from problems import NAMES
from torch._subclasses.fake_tensor import FakeTensorMode

from rlsd_kernels import gemm

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
