"""csrc reads and writes nothing outside its rows: emulated beside pages that nobody may touch."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

GUARDED = """
import ctypes, itertools, mmap, sys
import torch
import emulation

ops, libc, page = emulation.operators(), ctypes.CDLL(None), mmap.PAGESIZE
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 5]

def guarded(x, at_end, beyond=0):
    \"\"\"A copy of x whose first or last byte lies beside a page that nobody may touch.\"\"\"
    size, flat = x.nbytes, x.contiguous().view(-1)
    pages = -(-size // page) * page
    area = libc.mmap(None, pages + 2 * page, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    libc.mprotect(ctypes.c_void_p(area + page), ctypes.c_size_t(pages), 3)
    start = area + page + (pages - size if at_end else 0)
    data = (ctypes.c_char * (size + beyond * x.itemsize)).from_address(start)
    copy = torch.frombuffer(data, dtype=x.dtype)
    copy[: flat.numel()] = flat
    return copy if beyond else copy.view(x.shape)

if sys.argv[1:] == ["beyond"]:  # the guard works: one element too many is a crash
    x = guarded(torch.zeros(1, 7), True, beyond=1).view(1, 8)
    ops.exp_rows(x, None, torch.zeros(1), torch.zeros(1), None, None, None, 1.0, 1.0, False, 0)
for v, rows, at_end in itertools.product((1, 2, 3, 5, 8, 31, 4099, 8200), (1, 3), (0, 1)):
    x, bias = torch.randn(rows, v), torch.randn(v)
    want = (x + bias).double().exp()
    zero = torch.zeros(rows)
    c, ids = guarded(zero, at_end), guarded(torch.full((rows,), v - 1), at_end)
    for store, dtype in ((0, None), (1, torch.bfloat16), (1, torch.float32), (2, torch.float32)):
        s, t = guarded(zero, at_end), guarded(zero, at_end)
        out = None if dtype is None else guarded(torch.zeros(rows, v).to(dtype), at_end)
        ops.exp_rows(guarded(x, at_end), guarded(bias, at_end), c, s, t, out, None, 1.0, 1.0, False,
                     store)
        assert torch.allclose(s.double(), want.sum(-1), rtol=1e-5), (v, rows, store)
        if store == 1:
            assert torch.allclose(out.double(), want, rtol=5e-3), (v, rows, dtype)
    top = guarded(zero, at_end)
    ops.row_max(guarded(x, at_end), guarded(bias, at_end), top, guarded(zero, at_end), 1.0, 1.0,
                False)
    assert torch.equal(top, (x + bias).amax(-1))
    place = guarded(torch.zeros(rows).long(), at_end)
    ops.row_logits(guarded(x, at_end), guarded(bias, at_end), top, place, 1.0, 1.0, False)
    assert torch.equal(place, (x + bias).argmax(-1))
    for dtype in (torch.bfloat16, torch.float32):
        out = guarded(torch.zeros(rows, v).to(dtype), at_end)
        ops.logit_gradient(guarded(x, at_end), out, ids, c, guarded(zero + 1, at_end), None, None,
                           guarded(zero, at_end), 1.0, 1.0, False)
        ops.fix_targets(out, ids, guarded(zero + 2, at_end))
        pairs = guarded(torch.stack([zero, zero], 1).long(), at_end)
        ops.fix_targets(out, pairs, guarded(pairs + 3.0, at_end))
        assert (out[:, -1] == (2 if v > 1 else 3)).all() and (out[:, 0] == 3).all()
        strips, tall = -(-v // 256), -(-rows // 2)
        columns, parts = (guarded(torch.zeros(n), at_end) for n in (tall * v, strips * rows))
        ops.energies(out, guarded(zero + 3, at_end), columns, parts, 2)
        squares = 9 * out.double().square()
        for sums, dim in ((columns.view(tall, v), 0), (parts.view(strips, rows), 1)):
            assert torch.allclose(sums.double().sum(0), squares.sum(dim), rtol=1e-5)
        for factor in (1.0, 0.5):
            flat = guarded(out.contiguous().view(-1).clone(), at_end)
            ops.scale(flat, torch.tensor([factor]))
            assert torch.equal(flat, out.reshape(-1) * factor)
        h, weight = torch.randn(rows, v).to(dtype), torch.randn(2, v).to(dtype)
        for kind in (dtype, torch.float32):
            z = guarded(zero, at_end)
            ops.target_logits(guarded(h.to(kind), at_end), guarded(weight, at_end),
                              guarded(torch.ones(rows, dtype=torch.int64), at_end), z)
            assert torch.allclose(z.double(), h.double() @ weight[1].double(), atol=1e-2)
print("fine")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU compute-sanitizer does this")
def test_nothing_outside_the_rows_is_touched():
    emulation.operators()  # built, or the reason to skip

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-c", GUARDED, *arguments], capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        )

    done = run()
    assert done.stdout == "fine\n", done.stderr[-2000:]
    assert run("beyond").returncode == -signal.SIGSEGV
