"""linear_distillation_loss in Triton and over vocabulary shards, against the fp64 specification."""

import math
import socket
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from problems import NAMES, assert_as_accurate, cast, make_problem

from rlsd_kernels import fused_linear_rlsd_loss, gemm, linear_distillation_loss

pytest.importorskip("triton")
# numpy, under the interpreter, warns of what forbidden tokens are there to provoke
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
# name -> extra inputs, options
CASES = {
    "plain": ((), {}),
    "bias": (("bias",), {"temperature": 0.7, "logit_scale": 1.3}),
    "softcap": ((), {"final_logit_softcapping": 3.0, "temperature": 1.4}),
    "own-head": (("teacher_weight", "bias", "teacher_bias"),
                 {"final_logit_softcapping": 3.0, "logit_scale": 0.7, "alpha": 0.2}),
    "teacher-bias": (("teacher_weight", "teacher_bias"), {"alpha": 0.9}),
}


def make(case, dtype=torch.float32, n=7, v=2311, h=16):
    """V of one whole tile and an odd tail; two masked rows."""
    extra, options = CASES[case]
    p = make_problem(n, v, h, dtype, teacher_h=24 if "teacher_weight" in extra else None)
    names = ("hidden", "weight", "teacher_hidden", "loss_weights", "teacher_weight")
    p = {k: p[k] for k in names if k in p}
    p["loss_weights"][1::4] = 0
    for i, name in enumerate(("bias", "teacher_bias")):
        if name in extra:
            p[name] = torch.randn(v, generator=torch.Generator().manual_seed(i)).to(dtype)
    return {k: x.to(DEVICE) for k, x in p.items()}, dict(options)


def run(problem, impl, *, upstream=1.0, **options):
    inputs = {k: x.clone() for k, x in problem.items()}
    leaves = {k: inputs[k].requires_grad_() for k in ("hidden", "weight", "bias") if k in inputs}
    positional = [inputs.pop(k) for k in ("hidden", "weight", "teacher_hidden")]
    loss = linear_distillation_loss(*positional, **inputs, **options, impl=impl)
    (loss * upstream).backward()
    return {"loss": loss.detach()} | {f"d_{k}": x.grad for k, x in leaves.items()}


# Bytes for: all rows in a chunk; two rows.
@pytest.mark.parametrize("workspace", [None, 2 * 10 * 2320], ids=["whole", "chunks"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=NAMES.get)
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_specification(case, dtype, divergence, workspace):
    p, options = make(case, dtype)
    options = {"divergence": divergence, **options}
    got = run(p, "triton", max_workspace_bytes=workspace, upstream=-2.0, **options)
    same = run(p, "ref", upstream=-2.0, **options)
    assert_as_accurate(got, same, run(cast(p, torch.float64), "ref", upstream=-2.0, **options))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
def test_precision_contract_on_16_bit_operands(dtype, divergence, monkeypatch):
    """As on a GPU: 16-bit dz beside fp32 logits."""
    def logits(h, weight, out):
        return out.copy_(h.float() @ weight.float().T)

    def add_dw(dw, e, x, *, first=False):
        assert e.dtype == x.dtype == dtype
        return dw.copy_((0 if first else dw) + e.float().T @ x.float())

    monkeypatch.setattr(gemm, "operand_dtype", lambda weight: weight.dtype)
    monkeypatch.setattr(gemm, "logits", logits)
    monkeypatch.setattr(gemm, "dx", lambda e, weight: e.float() @ weight.float())
    monkeypatch.setattr(gemm, "add_dw", add_dw)
    p, options = make("bias", dtype)
    truth = run(cast(p, torch.float64), "ref", divergence=divergence, **options)
    for impl in ("triton", "torch"):
        got = run(p, impl, divergence=divergence, **options)
        assert abs(got["loss"] - truth["loss"]) < 1e-4
        for name in ("d_hidden", "d_weight", "d_bias"):
            error = (got[name].double() - truth[name]).norm() / truth[name].norm()
            assert error < 4e-3, (impl, name, error)


@pytest.mark.parametrize("alpha", [1e-9, 1e-3, 0.999, 1 - 1e-9])
def test_alpha_keeps_relative_precision(alpha):
    p, _ = make("plain")
    got, truth = (run(cast(p, dtype), impl, alpha=alpha) for dtype, impl in
                  ((torch.float32, "triton"), (torch.float64, "ref")))
    for name, value in truth.items():
        assert (got[name] - value).norm() <= 2e-5 * value.norm(), name


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_small_divergences_keep_their_digits(divergence):
    p, _ = make("plain")
    p["teacher_hidden"] = p["hidden"].clone()
    zero = run(p, "triton", divergence=divergence)
    assert not any(x.any() for x in zero.values())
    p["teacher_hidden"] += 1e-3 * torch.randn_like(p["hidden"])
    truth = run(cast(p, torch.float64), "ref", divergence=divergence)
    got = run(p, "triton", divergence=divergence)
    assert 1e-9 < truth["loss"] < 1e-5
    assert abs(got["loss"] - truth["loss"]) < 3e-3 * truth["loss"]  # naive fp32: off by 1e-7


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_forbidden_tokens(divergence):
    """-inf for both models, and for one: as in PyTorch, huge but never NaN."""
    p, options = make("own-head", v=300)
    p["bias"][::3] = p["teacher_bias"][::3] = -math.inf
    p["teacher_bias"][1] = -math.inf
    options["final_logit_softcapping"] = None
    for side in (False, True):
        if side:
            p["bias"][4] = -math.inf
        got, want = (run(p, impl, divergence=divergence, **options) for impl in ("triton", "torch"))
        for name, value in want.items():
            assert value.isfinite().all() and got[name].isfinite().all()
            # Beside 1e30 the other entries are rounding noise.
            assert (got[name] - value).norm() <= 1e-4 * value.norm() + 1e-6, name


def test_all_rows_masked_and_no_row():
    p, _ = make("bias")
    p["loss_weights"][:] = 0
    assert not any(x.any() for x in run(p, "triton").values())
    p = p | {k: p[k][:0] for k in ("hidden", "teacher_hidden", "loss_weights")}
    assert not any(x.any() for x in run(p, "triton").values())


def test_an_fp64_teacher_is_refused_in_a_sentence():
    p, _ = make("own-head")
    p["teacher_hidden"], p["teacher_weight"] = (
        p[k].double() for k in ("teacher_hidden", "teacher_weight")
    )
    with pytest.raises(ValueError, match="computes in fp32, but the inputs are fp64"):
        run(p, "triton")
    ids = torch.zeros(len(p["hidden"]), dtype=torch.int64, device=DEVICE)
    p = {k: p[k] for k in ("hidden", "weight", "teacher_hidden", "teacher_weight")}
    loss = partial(
        fused_linear_rlsd_loss, **p, completion_ids=ids, advantages=torch.ones_like(ids).float()
    )
    with pytest.raises(ValueError, match="computes in fp32, but the inputs are fp64"):
        loss(impl="triton")
    assert loss(impl="torch").loss.isfinite()


SHARDED = ("plain", "own-head")


def _shard_worker(rank, world, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    try:
        bounds = [0, 20, 53]  # uneven; V = 53 is odd
        mine, results = slice(bounds[rank], bounds[rank + 1]), {}
        for case in SHARDED:
            p, options = make(case, n=9, v=53, h=8)
            p = {k: x[mine] if "weight" in k and k != "loss_weights" or "bias" in k else x
                 for k, x in p.items()}
            for divergence in DIVERGENCES:
                for impl in ("torch", "triton", "ref"):
                    results[case, divergence, impl] = run(
                        p, impl, divergence=divergence, tp_group=dist.group.WORLD,
                        max_workspace_bytes=5 * 8 * 48, **options,
                    )
        torch.save(results, folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_vocabulary_shards_equal_the_whole_head(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_shard_worker, args=(2, port, tmp_path), nprocs=2)
    for case in SHARDED:
        p, options = make(case, n=9, v=53, h=8)
        for divergence in DIVERGENCES:
            whole = run(p, "ref", divergence=divergence, **options)
            for rank, rows in enumerate((slice(0, 20), slice(20, 53))):
                results = torch.load(tmp_path / f"{rank}.pt")
                for impl in ("torch", "triton", "ref"):
                    for name, value in results[case, divergence, impl].items():
                        want = whole[name][rows] if name in ("d_weight", "d_bias") else whole[name]
                        torch.testing.assert_close(
                            value, want, rtol=2e-5, atol=2e-6,
                            msg=lambda m, at=(case, divergence, impl, rank, name): f"{at}: {m}",
                        )
