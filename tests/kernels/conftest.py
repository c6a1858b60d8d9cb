"""Fixtures that several of the kernels' test files share."""

import pytest

from rlsd_kernels import gemm


@pytest.fixture
def gpu_operands(monkeypatch):
    """GEMMs as cuBLAS does them: 16-bit operands, fp32 accumulators and result."""

    def logits(h, weight, out):
        assert h.dtype == weight.dtype
        return out.copy_(h.float() @ weight.float().T)

    def dx(e, weight):
        assert e.dtype == weight.dtype
        return e.float() @ weight.float()

    def add_dw(dw, e, x, *, first=False):
        assert e.dtype == x.dtype
        return dw.copy_((0 if first else dw.float()) + e.float().T @ x.float())

    monkeypatch.setattr(gemm, "operand_dtype", lambda weight: weight.dtype)
    for function in (logits, dx, add_dw):
        monkeypatch.setattr(gemm, function.__name__, function)
