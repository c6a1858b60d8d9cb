"""The pass over the head with each implementation's kernels: on a GPU's 16-bit operands, without
host synchronisation, and over vocabulary shards."""

import itertools
import math
import socket
import weakref

import emulation
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from problems import NAMES, assert_as_accurate, cast, make_problem, run_fused, run_log_probs
from torch.utils._python_dispatch import TorchDispatchMode

from rlsd_kernels import (
    RLSDLossConfig,
    available_impls,
    fused_linear_rlsd_loss,
    gemm,
    linear_log_probs,
    logprob,
    pipeline,
    rlsd_loss,
    rows,
    tuning,
)
from rlsd_kernels.ops import Need
from rlsd_kernels.shards import Shard

# The tensors here are on the CPU, whatever else the machine has.
STATUS = available_impls(torch.empty(0))
KERNELS = [name for name in ("torch", "triton") if STATUS[name] == "ok"]
PER_TOKEN = ("hidden", "weight", "completion_ids", "advantages", "loss_weights", "teacher_hidden")
# name -> optional inputs, loss options, call options
CASES = {
    "on-policy": ((), {}, {}),
    "off-policy": (("old_log_probs",), {}, {}),
    "all": (
        ("old_log_probs", "ref_log_probs", "reweight_mask", "bias"),
        {"beta": 0.1, "entropy_coef": 0.05, "temperature": 0.7, "rlsd_negative_only": True},
        {"logit_scale": 0.4, "final_logit_softcapping": 3.0, "return_entropy": True},
    ),
    "softcap": (("old_log_probs", "bias"), {}, {"final_logit_softcapping": 2.0}),
    "no-dual-clip": (("old_log_probs",), {"delta": None, "rlsd_delta_source": "old_log_probs"},
                     {"return_entropy": True, "logit_scale": 1.7}),
}


@pytest.fixture(autouse=True)
def _kernels_of_the_test(request, monkeypatch):
    """impl="cuda" runs emulated: the tensors here are on the CPU."""
    impl = getattr(request.node, "callspec", None) and request.node.callspec.params.get("impl")
    if impl == "triton" and STATUS[impl] != "ok":
        pytest.skip(STATUS[impl])
    elif impl == "cuda":
        emulation.stand_in(monkeypatch)


def make(case, dtype, n=37, v=1003, h=24):
    keep, loss, call = CASES[case]
    p = make_problem(n, v, h, dtype)
    p["bias"] = torch.randn(v, generator=torch.Generator().manual_seed(1)).to(dtype)
    options = {"config": RLSDLossConfig(**loss), **call}
    return {k: x for k, x in p.items() if k in PER_TOKEN or k in keep}, options


def relative(got, truth):
    return float((got.double() - truth.double()).norm() / truth.double().norm())


# Rows of logits that fit: a few rows a chunk, all at once. V = 1003 is odd and spans two tiles of
# the Triton kernels' smallest launch.
@pytest.mark.parametrize("rows", [7, None], ids="rows{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=NAMES.get)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_kernels_end_to_end(impl, case, dtype, rows):
    p, options = make(case, dtype)
    got = run_fused(p, impl, max_workspace_bytes=rows and rows * 8 * 1003, **options)
    same = run_fused(p, "ref", **options)
    assert_as_accurate(got, same, run_fused(cast(p, torch.float64), "ref", **options))


@pytest.mark.parametrize("rows", [7, None], ids="rows{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_kernels_log_probs(impl, dtype, rows):
    p, _ = make("softcap", dtype)
    results = []
    for name, width in ((impl, dtype), ("ref", dtype), ("ref", torch.float64)):
        leaves = [p[k].to(width).requires_grad_() for k in ("hidden", "weight", "bias")]
        lp, entropy = linear_log_probs(
            leaves[0], leaves[1], p["completion_ids"], bias=leaves[2], return_entropy=True,
            old_log_probs=p["old_log_probs"], final_logit_softcapping=2.0, impl=name,
            max_workspace_bytes=rows and rows * 8 * 1003,
        )
        grads = torch.autograd.grad((lp * p["advantages"]).sum() + entropy.sum(), leaves)
        results.append(dict(zip(("lp", "entropy", "d_h", "d_w", "d_b"),
                                (lp.detach(), entropy.detach(), *grads), strict=True)))
    assert_as_accurate(*results)


def torch_at_16_bits(p, options):
    """The step as PyTorch users write it, logits and their gradient in the input dtype."""
    leaves = {k: p[k].clone().requires_grad_() for k in ("hidden", "weight")}
    z = (leaves["hidden"] @ leaves["weight"].T).float()
    lp = z.log_softmax(-1).gather(-1, p["completion_ids"][:, None]).squeeze(-1)
    t = (p["teacher_hidden"] @ p["weight"].T).float().log_softmax(-1)
    t = t.gather(-1, p["completion_ids"][:, None]).squeeze(-1)
    out = rlsd_loss(
        lp, p["advantages"], teacher_log_probs=t, old_log_probs=p.get("old_log_probs"),
        loss_weights=p["loss_weights"], impl="ref", **options,
    )
    out.loss.backward()
    return {f"d_{k}": x.grad for k, x in leaves.items()} | {"log_probs": lp.detach()}


@pytest.mark.parametrize("rows", [7, 37], ids="rows{}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", [*KERNELS, "cuda"])
def test_precision_contract_on_16_bit_operands(impl, case, dtype, rows, gpu_operands):
    p, options = make(case, dtype, v=2003)
    # E and a chunk of logits of `rows` rows: 2 + 4 bytes, and the kernels' scratch
    got = run_fused(p, impl, max_workspace_bytes=rows * 20 * 2003, **options)
    truth = run_fused(cast(p, torch.float64), "ref", **options)
    live = truth["log_probs"] != 0
    assert (got["log_probs"] - truth["log_probs"]).abs().max() < 1e-4
    assert ((got["teacher_log_probs"] - truth["teacher_log_probs"]).abs().max()) < 1e-4
    assert live.sum() > 20 and got["d_hidden"].dtype == got["d_weight"].dtype == dtype
    peers = torch_at_16_bits(p, options) if case in ("on-policy", "off-policy") else {}
    for name in ("d_hidden", "d_weight") + (("d_bias",) if "bias" in p else ()):
        error = relative(got[name], truth[name])
        assert error < 4e-3, f"{name}: {error:.2g}"
        if name in peers:
            peer = relative(peers[name], truth[name])
            assert error < 2 * peer, f"{name}: {error:.2g}, PyTorch {peer:.2g}"


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "anew"])
@pytest.mark.parametrize("impl", [*KERNELS, "cuda"])
def test_log_probs_on_16_bit_operands(impl, keep, gpu_operands):
    p, _ = make("off-policy", torch.bfloat16, v=2003)
    upstream = torch.randn(37)
    upstream[::4] = 0
    results = []
    for name, width in ((impl, torch.bfloat16), ("ref", torch.float64)):
        leaves = [p[k].to(width).requires_grad_() for k in ("hidden", "weight")]
        lp = linear_log_probs(
            *leaves, p["completion_ids"], impl=name, old_log_probs=p["old_log_probs"],
            max_workspace_bytes=None if keep else 5 * 20 * 2003,
        )
        results.append([lp.detach(), *torch.autograd.grad((lp * upstream).sum(), leaves)])
    (lp, *grads), (want, *truth) = results
    assert (lp - want).abs().max() < 1e-4
    for got, exact in zip(grads, truth, strict=True):
        assert relative(got, exact) < 4e-3


def test_kept_exponentials_save_the_second_logits_gemm(monkeypatch):
    rows = []
    real = gemm.logits
    monkeypatch.setattr(
        gemm, "logits", lambda h, w, out: rows.append(len(h) * len(w)) or real(h, w, out)
    )
    p = make_problem(37, 1003, 24)
    hidden = p["hidden"].clone().requires_grad_()
    need = 37 * 4 * (1003 + 3 * 1003)  # E, and three tiles of scratch
    for workspace, passes in ((need, 1), (need - 1, 2)):
        rows.clear()
        lp = linear_log_probs(
            hidden, p["weight"], p["completion_ids"], impl="torch", max_workspace_bytes=workspace
        )
        lp.sum().backward()
        assert sum(rows) == passes * 37 * 1003


@pytest.mark.parametrize("impl", [*KERNELS, "cuda"])
@pytest.mark.parametrize("offset", [-300.0, -30.0, 30.0, 300.0], ids="off{:+g}".format)
def test_a_wrong_guess_never_changes_the_result(impl, offset):
    p, _ = make("off-policy", torch.float32, n=19)
    # Only the guess is off: delta, ratio and clip read other tensors.
    for name in ("plain", "guessed"):
        p["old_log_probs"] = None if name == "plain" else p["teacher_hidden"].sum(-1) * 0 + offset
        hidden = p["hidden"].clone().requires_grad_()
        lp = linear_log_probs(
            hidden, p["weight"], p["completion_ids"], old_log_probs=p["old_log_probs"], impl=impl
        )
        (dx,) = torch.autograd.grad((lp * p["advantages"]).sum(), hidden)
        if name == "plain":
            want, want_dx = lp, dx
    torch.testing.assert_close(lp, want, atol=5e-6, rtol=0)
    torch.testing.assert_close(dx, want_dx, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", [*KERNELS, "cuda"])
@pytest.mark.parametrize("case", CASES)
def test_nothing_comes_back_to_the_host_while_a_graph_is_captured(impl, case, monkeypatch):
    p, options = make(case, torch.float32)
    expected = run_fused(p, impl, **options)
    for module in (pipeline, logprob.load_impl(impl)):
        monkeypatch.setattr(module, "capturing", lambda x: True, raising=module is pipeline)
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda self: pytest.fail("nonzero synchronises"))
    live = (p["loss_weights"] != 0) & (p["advantages"] != 0)
    if case != "all":  # where neither KL nor entropy reads them, dead rows may hold anything
        for name in ("hidden", "teacher_hidden", "old_log_probs"):
            if name in p:
                p[name][~live] = math.nan
    got = run_fused(p, impl, **options)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=2e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("impl", [*KERNELS, "ref"])
def test_lambda_as_a_tensor(impl):
    p, _ = make("on-policy", torch.float32, v=53)
    expected = run_fused(p, impl, rlsd_lambda=0.3)
    for lam in (torch.tensor(0.3), torch.tensor([0.3], dtype=torch.float64)):
        got = run_fused(p, impl, rlsd_lambda=lam)
        assert all(torch.equal(got[k], v) for k, v in expected.items())
    for bad in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="^rlsd_lambda must be a finite number"):
            run_fused(p, impl, rlsd_lambda=torch.tensor(bad))
    with pytest.raises(ValueError, match=r"one element, but got shape \(2,\)"):
        run_fused(p, impl, rlsd_lambda=torch.ones(2))
    with pytest.raises(ValueError, match="^rlsd_lambda is on meta but the rest is on cpu; move"):
        run_fused(p, impl, rlsd_lambda=torch.ones((), device="meta"))
    del p["teacher_hidden"]
    got = run_fused(p, impl, rlsd_lambda=torch.tensor(0.0))
    grpo = run_fused(p, impl, rlsd_lambda=0.0)
    assert all(torch.equal(got[k], v) for k, v in grpo.items()) and got.keys() == grpo.keys()


@pytest.mark.parametrize("impl", [*KERNELS, "ref"])
def test_a_live_nan_is_in_loss_and_gradient(impl):
    p, _ = make("off-policy", torch.float32, v=53)
    p["advantages"][1] = math.nan
    got = run_fused(p, impl)
    assert got["loss"].isnan() and got["d_weight"].isnan().any()
    assert got["d_hidden"][1].isnan().all() and not got["d_hidden"][0].isnan().any()


@pytest.mark.parametrize("source", ["current", "old_log_probs"])
@pytest.mark.parametrize("impl", [*KERNELS, "cuda", "ref"])
def test_equal_infinite_log_probs_have_weight_one(impl, source):
    """Where both contexts give -inf, in every implementation's token stage and its metrics."""
    lp, old = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -2.0, -math.inf])
    teacher = torch.tensor([-1.0, -1.5, -math.inf])
    if source == "current":
        lp, old = old, lp
    out = rlsd_loss(
        lp, torch.tensor([1.0, -1.0, 2.0]), teacher_log_probs=teacher, old_log_probs=old,
        impl=impl, config=RLSDLossConfig(1.0, 0.2, source),
    )
    torch.testing.assert_close(out.stats["rlsd/weight_mean_pos"], torch.tensor(1.0))
    torch.testing.assert_close(out.stats["rlsd/delta_mean_pos"], torch.tensor(0.0))
    torch.testing.assert_close(out.stats["rlsd/weight_mean_neg"], torch.tensor(0.8))
    assert out.loss.isfinite()


@pytest.mark.parametrize("impl", [*KERNELS, "ref"])
def test_a_masked_bad_id_stays_in_its_row(impl, monkeypatch):
    """Ids are not checked on a GPU, and -100 is everybody's padding."""
    monkeypatch.setattr(logprob, "check_ids", lambda *args, **kwargs: None)
    p, _ = make("off-policy", torch.float32, v=53)
    hidden, weight = p["hidden"].requires_grad_(), p["weight"].requires_grad_()
    padded = p["completion_ids"].index_fill(0, torch.tensor([2, 9]), -100)
    results = []
    for ids in (padded, p["completion_ids"]):
        lp = linear_log_probs(hidden, weight, ids, impl=impl)
        masked = torch.where(padded >= 0, lp, 0)
        results.append(torch.autograd.grad((masked * p["advantages"]).sum(), (hidden, weight)))
        assert lp.isnan().tolist() == (ids < 0).tolist()
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    if impl != "ref":  # unmasked it is not hidden; autograd of the reference has no such rule
        lp = linear_log_probs(hidden, weight, padded, impl=impl)
        assert torch.autograd.grad(lp.sum(), weight)[0].isnan().any()


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("bias", ["strided", "expanded"])
def test_a_bias_with_any_strides(impl, bias):
    p, options = make("softcap", torch.float32, v=300)
    if bias == "strided":
        p["bias"] = torch.stack([p["bias"], p["bias"] + 100], 1)[:, 0]
    else:
        p["bias"] = torch.tensor(0.5).expand(300)
    call = {k: p[k] for k in ("hidden", "weight", "completion_ids", "bias")}
    got = linear_log_probs(**call, impl=impl)
    torch.testing.assert_close(got, linear_log_probs(**call, impl="ref"), atol=1e-5, rtol=0)


class Held(TorchDispatchMode):
    """The most bytes that tensors of at least `least` bytes held at once."""

    def __init__(self, least):
        super().__init__()
        self.least, self.live, self.most = least, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if torch.is_tensor(x) and x.untyped_storage().nbytes() >= self.least:
                storage = x.untyped_storage()
                self.live.append((weakref.ref(x), storage.data_ptr(), storage.nbytes()))
        self.live = [entry for entry in self.live if entry[0]() is not None]
        self.most = max(self.most, sum({place: size for _, place, size in self.live}.values()))
        return out


@pytest.mark.parametrize("guess", ["good", "bad"])
@pytest.mark.parametrize("case", ["plain", "softcap", "entropy", "frozen head"])
@pytest.mark.parametrize("impl", KERNELS)
def test_logits_held_at_once_fit_the_workspace(impl, case, guess):
    v, h = 4000, 8
    p, _ = make("off-policy", torch.float32, n=64, v=v, h=h)
    if guess == "bad":
        p["old_log_probs"] -= 30
    room = 40 * v * 4
    held = Held(v * h * 4 + 1)  # larger than W and dW
    with held:
        pipeline.linear_rlsd_loss(
            logprob.load_impl(impl), p["hidden"],
            rows.Head(p["weight"], None, 1.0, 1.0, 5.0 if case == "softcap" else None),
            p["completion_ids"],
            pipeline.Tokens(
                p["advantages"], p["loss_weights"], None, p["old_log_probs"], None, None
            ),
            teacher_hidden=p["teacher_hidden"], teacher_weight=None,
            rlsd_lambda=torch.tensor(0.5), use_teacher=True,
            config=RLSDLossConfig(entropy_coef=0.1 if case == "entropy" else 0.0),
            shard=Shard([0, v, v], None), want_entropy=False,
            need=Need(True, case != "frozen head", False), max_workspace_bytes=room,
        )
    # Rows of a bad guess are copied, an eighth of a chunk at a time.
    assert 0.5 * room < held.most <= (1 if guess == "good" else 1.15) * room


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
def test_confident_tokens_on_16_bit_operands(impl, dtype, gpu_operands):
    """p - 1 would cancel in 16 bits where p is near 1, as late in training."""
    p, _ = make("on-policy", dtype, n=24, v=211, h=64)
    ids = p["completion_ids"]
    p["hidden"] = (p["weight"].float()[ids] * 4).to(dtype)
    p["hidden"] += (0.3 * torch.randn(24, 64)).to(dtype)
    truth = run_fused(cast(p, torch.float64), "ref")
    assert -1e-1 < truth["log_probs"].median() < -1e-7
    got, same = run_fused(p, impl), run_fused(p, "ref")
    for name in ("d_hidden", "d_weight"):
        allowed = max(4e-3, 2 * relative(same[name], truth[name]))
        assert relative(got[name], truth[name]) <= allowed, name


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
def test_an_empty_batch_on_16_bit_operands(impl, dtype, gpu_operands):
    p, _ = make("on-policy", dtype, v=53)
    hidden, weight = p["hidden"][:0].requires_grad_(), p["weight"].requires_grad_()
    lp, entropy = linear_log_probs(
        hidden, weight, p["completion_ids"][:0], return_entropy=True, impl=impl
    )
    (lp.sum() + entropy.sum()).backward()
    assert lp.shape == hidden.grad.shape[:1] == (0,) and not weight.grad.any()


def test_a_device_of_another_kind_takes_the_sizes_of_a_cpu():
    assert tuning.max_chunk("xpu") == tuning.MAX_CHUNK["cpu"]
    assert tuning.default_workspace_bytes("xpu") == tuning.WORKSPACE_BYTES["cpu"]


@pytest.mark.parametrize("impl", [*KERNELS, "cuda", "ref"])
def test_autocast_brings_an_fp32_head_to_bf16_hidden_states(impl):
    p = make_problem(20, 51, 8)
    p = {k: p[k] for k in PER_TOKEN}
    p["hidden"], p["teacher_hidden"] = p["hidden"].bfloat16(), p["teacher_hidden"].bfloat16()
    with pytest.raises(ValueError, match="^weight is torch.float32 but hidden is torch.bfloat16"):
        run_fused(p, impl)
    with torch.autocast("cpu", torch.bfloat16):
        got = run_fused(p, impl)
    expected = run_fused(p | {"weight": p["weight"].bfloat16()}, impl)
    assert got["d_weight"].dtype == torch.float32 and got["d_hidden"].dtype == torch.bfloat16
    for name, value in expected.items():
        # PyTorch's own backward of the reference rounds in autocast, as everybody's does there.
        if impl != "ref" or not name.startswith("d_"):
            assert torch.equal(got[name].to(value.dtype), value), name


def test_the_chunk_of_a_gpu_holds_e_of_all_rows(monkeypatch):
    """plan_rows by the kernels' own bytes: Qwen3-8B's head, 8192 rows, bf16 on a GPU."""
    pytest.importorskip("triton")
    triton_impl = pytest.importorskip("rlsd_kernels.triton_impl")
    weight = torch.empty(151936, 4096, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(gemm, "operand_dtype", lambda weight: weight.dtype)
    stored, scratch = rows.row_bytes(triton_impl, weight, 151936, "exp", with_teacher=True)
    plan = tuning.plan_rows(8192, stored, scratch, tuning.WORKSPACE_BYTES["cuda"], 8192)
    assert (stored, scratch) == (2 * 151936, 4 * 151936) and plan == (8192, 2048)


SHARDED = ("off-policy", "all")
# Bytes of workspace: all 17 rows of the largest shard (at least 14 of 53) fit, or 10 to 12 of 14.
ROOM = (None, 17 * 10 * 4)


def _shard_worker(rank, world, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    try:
        torch.save(_sharded_results(rank, world), folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _sharded_results(rank, world):
    """SHARDED cases by every implementation on this rank's shard; uneven shards, V = 53, and room
    for all rows on any rank, or for all rows on none but the smaller ones."""
    bounds = [0, *sorted(torch.randperm(52, generator=torch.Generator().manual_seed(3))[
        : world - 1].add(1).tolist()), 53]
    mine = slice(bounds[rank], bounds[rank + 1])
    results = {"rows": (mine.start, mine.stop)}
    group = dist.group.WORLD
    for case, room in itertools.product(SHARDED, ROOM):
        for impl in (*KERNELS, "ref"):
            p, options = make(case, torch.float32, n=17, v=53, h=8)
            p = {k: x[mine] if k in ("weight", "bias") else x for k, x in p.items()}
            out = run_fused(
                p, impl, tp_group=group, max_workspace_bytes=room, check_inputs=True, **options
            )
            results[case, room, impl] = {k: v.clone() for k, v in out.items()}
    p, _ = make("off-policy", torch.float32, n=17, v=53, h=8)
    for impl, room in itertools.product((*KERNELS, "ref"), ROOM):
        # a guess so wrong that every row takes the exact path
        old = torch.full((17,), -40.0)
        leaves = [p["hidden"].clone().requires_grad_(), p["weight"][mine].clone().requires_grad_()]
        lp, entropy = linear_log_probs(
            *leaves, p["completion_ids"], old_log_probs=old, return_entropy=True, impl=impl,
            tp_group=group, max_workspace_bytes=room,
        )
        loss = (lp * p["advantages"]).sum() + (entropy.sum() if room is None else 0)
        names = ("log_probs", "entropy", "d_hidden", "d_weight")
        values = (lp.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves))
        results["log_probs", room, impl] = dict(zip(names, values, strict=True))
    results["outputs"] = {impl: _outputs(p, impl, mine, group) for impl in (*KERNELS, "ref")}
    results["tolerance"] = {impl: _within_a_tolerance(p, impl, mine, group) for impl in KERNELS}
    # another vocabulary, whose shard differs on the last rank alone
    longer = torch.cat([p["weight"], p["weight"][:1]])[mine.start : mine.stop + (rank == world - 1)]
    results["longer"] = linear_log_probs(
        p["hidden"], longer, p["completion_ids"] * 0 + 53, impl="torch", tp_group=group
    )
    try:
        linear_log_probs(
            p["hidden"], p["weight"] if rank == 0 else p["weight"][:0], p["completion_ids"],
            impl="torch", tp_group=group,
        )
    except ValueError as error:
        results["empty"] = str(error)
    try:
        fused_linear_rlsd_loss(
            p["hidden"], p["weight"][mine], p["completion_ids"] * 0 + 53, p["advantages"],
            rlsd_lambda=0.0, tp_group=group,
        )
    except ValueError as error:
        results["error"] = str(error)
    return results


def _outputs(p, impl, mine, group=None):
    """All that linear_log_probs returns, and gradients of what is differentiable."""
    ids = torch.stack([p["completion_ids"], p["completion_ids"].flip(0)], 1)
    inputs = {"hidden": p["hidden"], "weight": p["weight"][mine], "completion_ids": ids}
    upstream = {"log_probs": torch.stack([p["advantages"], p["loss_weights"]], 1),
                "lse": p["advantages"], "mean_logits": p["advantages"].flip(0)}
    return run_log_probs(inputs, impl, upstream, tp_group=group)


def _within_a_tolerance(p, impl, mine, group):
    """dh and this shard's dW from peaked logits, by both ops, with room for all rows or for few."""
    found = []
    for room in (None, 17 * 10 * 4):
        shard = {"max_workspace_bytes": room, "tp_group": group, "gradient_tolerance": 0.05}
        leaves = [p["hidden"].clone().requires_grad_(),
                  (6 * p["weight"])[mine].clone().requires_grad_()]
        lp = linear_log_probs(*leaves, p["completion_ids"], impl=impl, **shard)
        found.append(torch.autograd.grad((lp * p["advantages"]).sum(), leaves))
        loss = fused_linear_rlsd_loss(
            *leaves, p["completion_ids"], p["advantages"], rlsd_lambda=0.0, impl=impl, **shard,
            loss_weights=torch.ones(17),
        ).loss
        found.append(torch.autograd.grad(loss, leaves))
    return found


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("world", [2, 4], ids="ranks{}".format)
def test_vocabulary_shards_equal_the_whole_head(world, tmp_path):
    mp.spawn(_shard_worker, args=(world, _free_port(), tmp_path), nprocs=world)
    ranks = {rank: torch.load(tmp_path / f"{rank}.pt") for rank in range(world)}
    assert all("[0, 53)" in r["error"] for r in ranks.values())
    assert all("at least one row of weight, but they hold [53, 0" in r["empty"]
               for r in ranks.values())
    p, _ = make("off-policy", torch.float32, n=17, v=53, h=8)
    longer = torch.cat([p["weight"], p["weight"][:1]])
    want = linear_log_probs(p["hidden"], longer, p["completion_ids"] * 0 + 53, impl="ref")
    for r in ranks.values():
        torch.testing.assert_close(r["longer"], want)

    whole = _outputs(p, "ref", slice(None))
    for r, impl in itertools.product(ranks.values(), (*KERNELS, "ref")):
        got = r["outputs"][impl]
        want = whole | {"d_weight": whole["d_weight"][slice(*r["rows"])]}
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=2e-5, atol=2e-6, msg=name)

    leaves = [p["hidden"].clone().requires_grad_(), (6 * p["weight"]).requires_grad_()]
    lp = linear_log_probs(*leaves, p["completion_ids"], impl="ref")
    d_hidden, d_weight = torch.autograd.grad((lp * p["advantages"]).sum(), leaves)
    for r, impl in itertools.product(ranks.values(), KERNELS):
        for k, (dh, dw) in enumerate(r["tolerance"][impl]):
            sign = 1 - 2 * (k % 2)  # a loss is what is made small
            want = d_weight[slice(*r["rows"])]
            assert (sign * dh - d_hidden).norm() <= 0.2 * d_hidden.norm(), (impl, k)
            assert (sign * dw - want).norm() <= 0.1 * d_weight.norm(), (impl, k)
    firsts = [r["tolerance"]["torch"][0] for r in ranks.values()]
    found = itertools.chain(*(r["tolerance"]["torch"] for r in ranks.values()))
    assert any((dw == 0).all(1).any() for _, dw in found)  # columns were left out
    assert all(torch.equal(dh, firsts[0][0]) for dh, _ in firsts)

    for case, room in itertools.product((*SHARDED, "log_probs"), ROOM):
        if case == "log_probs":
            p, _ = make("off-policy", torch.float32, n=17, v=53, h=8)
            leaves = [p["hidden"].requires_grad_(), p["weight"].requires_grad_()]
            lp, entropy = linear_log_probs(
                *leaves, p["completion_ids"], return_entropy=True, impl="ref"
            )
            loss = (lp * p["advantages"]).sum() + (entropy.sum() if room is None else 0)
            grads = torch.autograd.grad(loss, leaves)
            whole = dict(zip(("log_probs", "entropy", "d_hidden", "d_weight"),
                             (lp.detach(), entropy.detach(), *grads), strict=True))
        else:
            p, options = make(case, torch.float32, n=17, v=53, h=8)
            whole = run_fused(p, "ref", **options)
        for impl in (*KERNELS, "ref"):
            for rank, results in ranks.items():
                got, rows = results[case, room, impl], slice(*results["rows"])
                assert got.keys() == whole.keys()
                for name, value in whole.items():
                    if name in ("d_weight", "d_bias"):
                        value = value[rows]
                    torch.testing.assert_close(
                        got[name], value, rtol=2e-5, atol=2e-6,
                        msg=lambda m, where=(case, room, impl, rank, name): f"{where}: {m}",
                    )


def test_dtensors_are_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.tensor import distribute_tensor, init_device_mesh

        p, _ = make("on-policy", torch.float32, n=5, v=53, h=8)
        sharded = distribute_tensor(p["weight"], init_device_mesh("cpu", (1,)))
        sentence = r"^weight is a DTensor; call this inside .* FSDP2 .* tp_group\.$"
        with pytest.raises(TypeError, match=sentence):
            linear_log_probs(p["hidden"], sharded, p["completion_ids"])
        with pytest.raises(TypeError, match=sentence):
            run_fused(p | {"weight": sharded}, "auto", grads=())
    finally:
        dist.destroy_process_group()
