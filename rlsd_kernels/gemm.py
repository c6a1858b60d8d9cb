"""The head's three GEMMs with fp32 accumulators and fp32 results, whatever the input dtype.

    logits = h W^T (M, V)      dx = E W (M, H)      dw += E^T x (V, H)

Each is 2 M H V FLOP. On CUDA, 16-bit operands go to cuBLAS with an fp32 output. Elsewhere a 16-bit
matmul would round its result (bf16 logits are off by up to 3e-2), so the weight is upcast
CAST_BLOCK rows at a time and h, E, x come in compute dtype.
"""

import contextlib
import threading

import torch

from .config import compute_dtype

# 4096 rows of H = 4096 in fp32 are 64 MiB: the copy stays small beside the logits.
CAST_BLOCK = 4096
# torch.backends flags that trade accuracy for speed, and what they are here: TF32 or bf16 in place
# of fp32 (set_float32_matmul_precision sets both), and 16-bit sums across the parts of a split K.
_EXACT = {
    (torch.backends.cuda.matmul, "fp32_precision"): "ieee",
    (torch.backends.mkldnn.matmul, "fp32_precision"): "ieee",
    (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"): False,
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"): False,
    (torch.backends.cuda.matmul, "allow_fp16_accumulation"): False,
}


# The flags are the process's: the last thread to leave puts them back.
_lock, _inside, _changed = threading.Lock(), [], {}


@contextlib.contextmanager
def full_precision(device):
    """GEMMs as this file promises them, whatever autocast and the process's flags say."""
    with _lock:
        _inside.append(device)
        for (backend, name), exact in _EXACT.items():
            value = getattr(backend, name)
            if value not in (exact, "none"):
                _changed.setdefault((backend, name), value)
                setattr(backend, name, exact)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _lock:
            _inside.pop()
            while _changed and not _inside:
                (backend, name), value = _changed.popitem()
                setattr(backend, name, value)


def operand_dtype(weight):
    """Dtype that h, E and x must have: the weight's own on CUDA, else the compute dtype."""
    return weight.dtype if weight.is_cuda else compute_dtype(weight.dtype)


def multiple(weight):
    """What the inner size of a GEMM that this weight is gathered for should be a multiple of: on
    CUDA rows of 16 bits on 16-byte boundaries, without which cuBLAS takes kernels of old cards."""
    return 64 if weight.is_cuda and weight.itemsize == 2 else 1


def _blocks(weight):
    dtype = operand_dtype(weight)
    step = len(weight) if weight.dtype == dtype else CAST_BLOCK
    for j in range(0, len(weight), step):
        yield slice(j, j + step), weight[j : j + step].to(dtype)


def _out_dtype(x, out=None):
    """Keyword that asks cuBLAS for an fp32 result of a 16-bit GEMM; PyTorch refuses it for an `out`
    of 16 bits, which is rounded once from the fp32 accumulator anyway."""
    wide = out is None or out.dtype == torch.float32
    return {"out_dtype": torch.float32} if wide and x.itemsize == 2 else {}


def logits(h, weight, out):
    """out = h W^T, (M, V) in compute dtype."""
    for columns, w in _blocks(weight):
        torch.mm(h, w.T, out=out[:, columns], **_out_dtype(h))
    return out


def dx(e, weight):
    """E W, (M, H) in compute dtype."""
    out = None
    for columns, w in _blocks(weight):
        if out is None:
            out = torch.mm(e[:, columns], w, **_out_dtype(e))
        else:
            out.addmm_(e[:, columns], w)
    return out


def add_dw(dw, e, x, *, first=False):
    """dw += E^T x, (V, H) in compute or operand dtype, in place; first: dw = E^T x, never read."""
    if first:
        return torch.mm(e.T, x, out=dw, **_out_dtype(e, dw))
    return torch.addmm(dw, e.T, x, out=dw, **_out_dtype(e, dw))
