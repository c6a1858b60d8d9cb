"""impl="torch" against the fp64 specification, by the error rule in problems.py."""

import math

import pytest
import torch
from problems import DTYPES, NAMES, assert_as_accurate, cast, make_problem, run_fused

from rlsd_kernels import (
    RLSDLossConfig,
    fused_linear_rlsd_loss,
    gemm,
    linear_log_probs,
    pipeline,
    ref,
    rlsd_loss,
)

HALF = [torch.bfloat16, torch.float16]


def check(problem, *, keep=None, workspace=None, upstream=1.0, grads=("hidden", "weight", "bias"),
          **options):
    """The error rule on every output and gradient of one problem."""
    names = {"hidden", "weight", "completion_ids", "advantages", "loss_weights", *(keep or ())}
    problem = {k: v for k, v in problem.items() if k in names}
    options |= {"upstream": upstream, "grads": grads}
    got = run_fused(problem, "torch", max_workspace_bytes=workspace, **options)
    same = run_fused(problem, "ref", **options)
    truth = run_fused(cast(problem, torch.float64), "ref", **options)
    assert_as_accurate(got, same, truth)
    return got, truth


SHAPES = [
    (1, 1, 1),  # one row, one id: log p = 0, all gradients 0
    (1, 37, 8),  # one row: matrix-vector products
    (7, 129, 16),  # V one past a power of two
    (65, 1000, 33),  # odd H: rows of the head are not aligned
    (257, 4133, 64),  # 16-bit head: a full block of CAST_BLOCK rows and a short one of 37
    (33, 8192, 16),  # 16-bit head: exactly two blocks
    (3, 8193, 5),  # 16-bit head: a last block of a single row
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-V{}-H{}".format(*s))
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_shapes(dtype, shape):
    problem = make_problem(*shape, dtype)
    got, truth = check(problem, keep=["teacher_hidden", "old_log_probs"], return_entropy=True)
    if shape[1] > 1:
        assert truth["d_hidden"].abs().max() > 0 and truth["d_weight"].abs().max() > 0
    assert (got["log_probs"] <= 0).all()


# name -> per-token inputs used, loss options, head options
CASES = {
    "on-policy": (["teacher_hidden"], {}, {}),
    "off-policy": (["teacher_hidden", "old_log_probs"], {}, {}),
    "old-delta": (
        ["teacher_hidden", "old_log_probs"], {"rlsd_delta_source": "old_log_probs"}, {}
    ),
    "grpo": (["old_log_probs"], {"rlsd_lambda": 0.0}, {}),
    "lambda1-eps1": (
        ["teacher_hidden"], {"rlsd_lambda": 1.0, "rlsd_reweight_clip_range": 1.0}, {}
    ),
    "negative-only": (["teacher_hidden"], {"rlsd_negative_only": True}, {}),
    "mask": (["teacher_hidden", "reweight_mask"], {}, {}),
    "no-dual-clip": (["teacher_hidden", "old_log_probs"], {"delta": None}, {}),
    "tight-dual-clip": (["teacher_hidden", "old_log_probs"], {"delta": 1.1}, {}),
    "kl": (["teacher_hidden", "ref_log_probs"], {"beta": 0.3}, {}),
    "entropy": (["teacher_hidden"], {"entropy_coef": 0.2}, {}),
    "temperature": (["teacher_hidden"], {"temperature": 0.6}, {}),
    "scale": (["teacher_hidden"], {}, {"logit_scale": 0.25}),
    "softcap": (["teacher_hidden"], {}, {"final_logit_softcapping": 3.0}),
    "bias": (["teacher_hidden", "bias"], {}, {}),
    "all": (
        ["teacher_hidden", "old_log_probs", "ref_log_probs", "reweight_mask", "bias"],
        {"beta": 0.3, "entropy_coef": 0.2, "temperature": 1.4, "delta": 2.0},
        {"final_logit_softcapping": 3.0, "logit_scale": 0.7},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_options(dtype, case):
    keep, loss, head = CASES[case]
    problem = make_problem(67, 301, 24, dtype)
    problem["bias"] = torch.randn(301).to(dtype)
    check(problem, keep=keep, config=RLSDLossConfig(**loss), return_entropy=True, **head)


@pytest.mark.parametrize("workspace", [1, 301 * 4 * 5, 301 * 4 * 25], ids="bytes{}".format)
@pytest.mark.parametrize("case", ["off-policy", "mask", "bias", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_chunks(dtype, case, workspace):
    keep, loss, head = CASES[case]
    problem = make_problem(67, 301, 24, dtype)
    problem["bias"] = torch.randn(301).to(dtype)
    check(problem, keep=keep, workspace=workspace, config=RLSDLossConfig(**loss), **head)


@pytest.mark.parametrize("rows", [1, 5, 33], ids="rows{}".format)
def test_chunks_of_a_blocked_head(rows):
    problem = make_problem(67, 4133, 16, torch.bfloat16)
    check(problem, keep=["teacher_hidden", "old_log_probs"], workspace=rows * 4133 * 4)


@pytest.mark.parametrize("teacher_h", [8, 24, 40], ids="teacher-H{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_another_teacher_head(dtype, teacher_h):
    problem = make_problem(67, 301, 24, dtype, teacher_h=teacher_h)
    got, truth = check(problem, keep=["teacher_hidden", "teacher_weight"])
    assert (truth["teacher_log_probs"] - truth["log_probs"]).abs().max() > 1


def test_teacher_of_another_dtype():
    problem = make_problem(67, 301, 24)
    problem["teacher_hidden"] = problem["teacher_hidden"].double()
    problem["teacher_weight"] = problem["weight"].double()
    check(problem, keep=["teacher_hidden", "teacher_weight"])


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_precomputed_teacher_equals_the_fused_one(dtype):
    problem = make_problem(67, 301, 24, dtype)
    teacher = linear_log_probs(
        problem["teacher_hidden"], problem["weight"], problem["completion_ids"], impl="torch"
    )
    problem["teacher_log_probs"] = teacher
    got, _ = check(problem, keep=["teacher_log_probs"])
    fused, _ = check(problem, keep=["teacher_hidden"])
    torch.testing.assert_close(got["loss"], fused["loss"], atol=1e-6, rtol=1e-6)
    assert torch.equal(got["teacher_log_probs"], teacher)


@pytest.mark.parametrize(
    "grads", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias"), ()],
    ids=lambda g: "+".join(g) or "none",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_frozen_parts(dtype, grads):
    problem = make_problem(67, 301, 24, dtype)
    problem["bias"] = torch.randn(301).to(dtype)
    keep = ["teacher_hidden", "bias"]
    got, _ = check(problem, keep=keep, grads=grads)
    assert {k for k in got if k.startswith("d_")} == {f"d_{g}" for g in grads}


def test_no_work_for_a_frozen_head(monkeypatch):
    calls = []
    real = pipeline.linear_rlsd_loss
    monkeypatch.setattr(
        pipeline, "linear_rlsd_loss", lambda *a, **k: calls.append(real(*a, **k)) or calls[-1]
    )
    problem = make_problem(9, 31, 8)
    run_fused(problem, "torch", grads=("hidden",))
    run_fused(problem, "torch", grads=("weight",))
    assert [[x.numel() for x in call[4:7]] for call in calls] == [[72, 0, 0], [0, 248, 0]]


@pytest.mark.parametrize("upstream", [3.7, -1.0, 0.0, 1e-3], ids="upstream{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_upstream_gradient(dtype, upstream):
    problem = make_problem(67, 301, 24, dtype)
    problem["bias"] = torch.randn(301).to(dtype)
    check(problem, keep=["teacher_hidden", "bias"], upstream=upstream)


def test_fp16_loss_scale_reaches_gradients_that_fp16_cannot_hold():
    # 1e6 tokens: |d_hidden| is about 1e-8, below fp16's 6e-8; GradScaler starts at 65536.
    problem = make_problem(67, 301, 24, torch.float16)
    problem["loss_weights"] = problem["loss_weights"] * 67e-6
    got, truth = check(problem, keep=["teacher_hidden"], upstream=65536.0)
    for name in ("d_hidden", "d_weight"):
        error = (got[name].double() - truth[name]).norm() / truth[name].norm()
        assert error < 4e-3, f"{name}: {error:.2g}"


def test_batch_and_sequence_shape():
    flat = make_problem(60, 301, 24)
    sequence_a = torch.tensor([1.0, 0.0, -0.5, 2.0, -1.0])
    flat["advantages"] = sequence_a.repeat_interleave(12)
    folded = {
        k: v if k == "weight" else v.reshape(5, 12, *v.shape[1:]) for k, v in flat.items()
    } | {"advantages": sequence_a}
    expected, got = run_fused(flat, "torch"), run_fused(folded, "torch")
    assert got["log_probs"].shape == got["teacher_log_probs"].shape == (5, 12)
    for name, value in expected.items():
        assert torch.equal(got[name].reshape(value.shape), value), name


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 24), (24,)], ids=str)
def test_any_leading_shape(shape):
    flat = make_problem(24, 51, 8)
    folded = {k: v if k == "weight" else v.reshape(*shape, *v.shape[1:]) for k, v in flat.items()}
    expected, got = run_fused(flat, "torch"), run_fused(folded, "torch")
    for name, value in expected.items():
        assert torch.equal(got[name].reshape(value.shape), value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_non_contiguous_inputs(dtype):
    problem = make_problem(30, 301, 24, dtype)
    expected = run_fused(problem, "torch")
    strided = {}
    for name, x in problem.items():
        doubled = torch.stack([x, x], dim=-1)
        strided[name] = doubled[..., 0]
        assert not strided[name].is_contiguous()
    inputs = {k: strided.pop(k) for k in ("hidden", "weight", "completion_ids", "advantages")}
    leaves = [inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()]
    out = fused_linear_rlsd_loss(*inputs.values(), **strided, impl="torch")
    grads = torch.autograd.grad(out.loss, leaves)
    for got, name in zip(grads, ("d_hidden", "d_weight"), strict=True):
        torch.testing.assert_close(got, expected[name], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(out.loss, expected["loss"])


def test_transposed_head_of_tied_weights():
    problem = make_problem(30, 301, 24)
    expected = run_fused(problem, "torch")
    problem["weight"] = problem["weight"].T.contiguous().T
    got = run_fused(problem, "torch")
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-7)


def test_stride_zero_inputs():
    row, weight = torch.randn(1, 8).requires_grad_(), torch.randn(11, 8)
    ids, one = torch.tensor([3]).expand(6), torch.ones(1)
    out = fused_linear_rlsd_loss(
        row.expand(6, 8), weight, ids, one.expand(6), teacher_hidden=row.detach().expand(6, 8),
        loss_weights=(one / 6).expand(6), old_log_probs=(-one).expand(6),
        reweight_mask=torch.tensor([True]).expand(6), impl="torch",
    )
    (d_row,) = torch.autograd.grad(out.loss, row)
    again = row.detach().repeat(6, 1).requires_grad_()
    expected = fused_linear_rlsd_loss(
        again, weight, ids.clone(), torch.ones(6), teacher_hidden=again.detach(),
        old_log_probs=-torch.ones(6), impl="torch",
    )
    (d_again,) = torch.autograd.grad(expected.loss, again)
    assert torch.equal(out.loss, expected.loss)
    torch.testing.assert_close(d_row, d_again.sum(0, keepdim=True))


@pytest.mark.parametrize("shift", [100.0, -100.0], ids="shift{:+g}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=NAMES.get)
def test_shifted_logits(dtype, shift):
    problem = make_problem(67, 301, 24, dtype)
    plain = run_fused(problem, "torch", return_entropy=True)
    problem["bias"] = torch.full((301,), shift).to(dtype)
    got, _ = check(problem, keep=["teacher_hidden", "bias"], return_entropy=True)
    live = got["log_probs"] != 0
    torch.testing.assert_close(got["log_probs"], plain["log_probs"], atol=5e-5, rtol=0)
    torch.testing.assert_close(got["entropy"], plain["entropy"], atol=2e-4, rtol=0)
    assert live.sum() > 30


@pytest.mark.parametrize("std", [30.0, 1e3], ids="std{:g}".format)
def test_extreme_logits(std):
    # Most targets have p = 0 in fp32: only a maximum-subtracted sum keeps their log-probs.
    problem = make_problem(67, 301, 24, std=std)
    check(problem, keep=["teacher_hidden"], return_entropy=True)


@pytest.mark.parametrize("vocab", [2, 4096, 4097], ids="V{}".format)
@pytest.mark.parametrize("end", ["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_targets_at_the_ends_of_the_vocabulary(dtype, vocab, end):
    problem = make_problem(11, vocab, 8, dtype)
    problem["completion_ids"] = torch.full((11,), 0 if end == "first" else vocab - 1)
    _, truth = check(problem, keep=["teacher_hidden"])
    target = truth["d_weight"][problem["completion_ids"][0]]
    assert target.norm() > truth["d_weight"].norm() / 4


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_log_probs_are_never_positive(dtype):
    hidden = torch.randn(64, 16).to(dtype)
    weight = (20 * torch.randn(257, 16)).to(dtype)
    ids = (hidden.float() @ weight.float().T).argmax(-1)
    log_probs = linear_log_probs(hidden, weight, ids, impl="torch")
    assert (log_probs <= 0).all() and (log_probs > -1e-3).sum() > 20


MULTIPLIER_CASES = {
    "plain": {}, "entropy": {"return_entropy": True},
    "softcap-bonus": {"final_logit_softcapping": 3.0, "entropy": True},
    "off-policy": {"old": True},
}


@pytest.mark.parametrize("rows", [None, 1, 10, 33], ids="rows{}".format)
@pytest.mark.parametrize("case", MULTIPLIER_CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_equal_hidden_gives_multiplier_exactly_one(dtype, case, rows):
    options = dict(MULTIPLIER_CASES[case])
    config = RLSDLossConfig(entropy_coef=0.1 * options.pop("entropy", False), rlsd_lambda=1.0)
    p = make_problem(67, 4133, 24, dtype)
    if options.pop("old", False):
        options["old_log_probs"] = p["old_log_probs"]
    advantages = torch.where(p["advantages"] == 0, 1, p["advantages"])
    hidden = p["hidden"].clone().requires_grad_()
    out = fused_linear_rlsd_loss(
        hidden, p["weight"], p["completion_ids"], advantages, teacher_hidden=p["hidden"],
        config=config, impl="torch", max_workspace_bytes=rows and rows * 4133 * 4, **options,
    )
    assert torch.equal(out.teacher_log_probs, out.log_probs)
    assert out.stats["rlsd/weight_mean_pos"] == out.stats["rlsd/weight_mean_neg"] == 1
    assert out.stats["rlsd/delta_std"] == 0 and (out.log_probs < 0).sum() == 67


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_multiplier_of_a_masked_teacher_is_one_within_rounding(dtype):
    # The teacher scores fewer rows than the student, so its GEMM may round differently.
    p = make_problem(67, 4133, 24, dtype)
    p["teacher_hidden"] = p["hidden"]
    got = run_fused(p, "torch", max_workspace_bytes=4133 * 4 * 10)
    scored = got["teacher_log_probs"] != 0
    difference = (got["teacher_log_probs"] - got["log_probs"])[scored].abs()
    assert difference.max() < 1e-5 and 15 < scored.sum() < 67


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_equal_weights_give_ratio_one(dtype):
    # Rollout scoring and training see other batch sizes and chunks, never another policy.
    p = make_problem(67, 4133, 64, dtype)
    old = torch.cat([
        linear_log_probs(h, p["weight"], y, impl="torch")
        for h, y in zip(p["hidden"].split(9), p["completion_ids"].split(9), strict=True)
    ])
    hidden = p["hidden"].clone().requires_grad_()
    out = fused_linear_rlsd_loss(
        hidden, p["weight"], p["completion_ids"], torch.ones(67), rlsd_lambda=0.0,
        max_workspace_bytes=4133 * 4 * 10, impl="torch",
    )
    assert ((out.log_probs - old).exp() - 1).abs().max() < 1e-5


CONTRACT = {  # dtype -> log-prob absolute, gradient relative (Frobenius): engine.md section 4
    torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-4, 4e-3),
    torch.float16: (1e-4, 4e-3),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_precision_contract(dtype):
    problem = make_problem(257, 4133, 128, dtype)
    problem = {k: problem[k] for k in ("hidden", "weight", "completion_ids", "advantages",
                                       "teacher_hidden")}
    got = run_fused(problem, "torch", return_entropy=True)
    truth = run_fused(cast(problem, torch.float64), "ref", return_entropy=True)
    absolute, relative = CONTRACT[dtype]
    for name in ("log_probs", "teacher_log_probs"):
        assert (got[name].double() - truth[name]).abs().max() <= absolute, name
    for name in ("d_hidden", "d_weight"):
        error = (got[name].double() - truth[name]).norm() / truth[name].norm()
        assert error <= relative, f"{name}: {error:.3g}"


def test_bf16_head_gradient_is_accumulated_in_fp32():
    # 512 chunks of one row each add the same small number: a bf16 sum stalls at 256 of them.
    n = 512
    hidden, ids = torch.ones(n, 1, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.int64)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16).requires_grad_()
    out = fused_linear_rlsd_loss(
        hidden, weight, ids, torch.ones(n), rlsd_lambda=0.0, loss_weights=torch.ones(n),
        max_workspace_bytes=1, impl="torch",
    )
    out.loss.backward()
    assert weight.grad.flatten().tolist() == [-n / 2, n / 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_bitwise_equal_from_run_to_run(dtype):
    problem = make_problem(67, 4133, 24, dtype)
    problem["bias"] = torch.randn(4133).to(dtype)
    torch.use_deterministic_algorithms(False)  # it must hold without PyTorch's help
    runs = [
        run_fused(problem, "torch", max_workspace_bytes=4133 * 4 * 10, return_entropy=True)
        for _ in range(3)
    ]
    for name, value in runs[0].items():
        assert all(torch.equal(run[name], value) for run in runs), name


def test_retain_graph_and_accumulation():
    p = make_problem(20, 51, 8)
    expected = run_fused(p, "torch")
    leaves = {k: p[k].clone().requires_grad_() for k in ("hidden", "weight")}
    out = fused_linear_rlsd_loss(**(p | leaves), impl="torch")
    out.loss.backward(retain_graph=True)
    assert torch.equal(leaves["weight"].grad, expected["d_weight"])
    out.loss.backward()
    again = fused_linear_rlsd_loss(**(p | leaves), impl="torch")
    (again.loss * 2).backward()
    for k, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 4 * expected[f"d_{k}"])
    with pytest.raises(RuntimeError, match="second time"):
        again.loss.backward()


def test_second_order_gradients_are_refused():
    p = make_problem(20, 51, 8)
    leaf = p["hidden"].requires_grad_()
    loss = fused_linear_rlsd_loss(**p, impl="torch").loss
    with pytest.raises(RuntimeError, match="differentiation"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_only_the_loss_carries_a_gradient():
    p = make_problem(20, 51, 8)
    leaves = {
        k: p[k].clone().requires_grad_()
        for k in ("hidden", "weight", "teacher_hidden", "old_log_probs", "ref_log_probs",
                  "advantages", "loss_weights")
    }
    teacher_weight = p["weight"].clone().requires_grad_()
    out = fused_linear_rlsd_loss(
        **(p | leaves), teacher_weight=teacher_weight, return_entropy=True, impl="torch"
    )
    assert out.loss.requires_grad
    others = [out.log_probs, out.teacher_log_probs, out.entropy, *out.stats.values()]
    assert not any(x.requires_grad for x in others)
    out.loss.backward()
    assert {k for k, x in leaves.items() if x.grad is not None} == {"hidden", "weight"}
    assert teacher_weight.grad is None


def test_no_gradient_through_the_token_weight():
    p = make_problem(40, 51, 8, torch.float64)
    fused = run_fused(p, "torch")
    a_hat = ref.rlsd_advantages(
        p["advantages"], fused["log_probs"], fused["teacher_log_probs"],
        reweight_mask=p["reweight_mask"],
    )
    frozen = {k: v for k, v in p.items() if k != "teacher_hidden"} | {"advantages": a_hat}
    grpo = run_fused(frozen, "torch", rlsd_lambda=0.0)
    for name in ("d_hidden", "d_weight"):
        torch.testing.assert_close(fused[name], grpo[name], atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_work_without_grad_mode(mode, monkeypatch):
    for name in ("dx", "add_dw"):
        monkeypatch.setattr(gemm, name, lambda *a: pytest.fail("gradient computed"))
    p = make_problem(20, 51, 8)
    leaves = {k: p[k].clone().requires_grad_() for k in ("hidden", "weight")}
    with mode():
        out = fused_linear_rlsd_loss(**(p | leaves), impl="torch")
    assert not out.loss.requires_grad
    monkeypatch.undo()
    torch.testing.assert_close(out.loss, run_fused(p, "torch")["loss"])


DEAD = {
    "empty": (0, None, None), "masked": (9, 0.0, 1.0), "zero-advantages": (9, 1.0, 0.0),
}


@pytest.mark.parametrize("impl", ["torch", "ref"])
@pytest.mark.parametrize("case", DEAD)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_no_live_row(dtype, case, impl):
    n, weights, advantages = DEAD[case]
    p = make_problem(n, 31, 8, dtype)
    if n:
        p["loss_weights"].fill_(weights)
        p["advantages"].fill_(advantages)
    p["bias"] = torch.randn(31).to(dtype)
    got = run_fused(p, impl, return_entropy=True)
    assert got["loss"] == 0
    for k in ("hidden", "weight", "bias"):
        assert torch.equal(got[f"d_{k}"], torch.zeros_like(p[k])), k
    assert got["log_probs"].tolist() == got["entropy"].tolist() == [0.0] * n


def test_no_live_row_in_an_empty_batch_of_sequences():
    hidden = torch.zeros(3, 0, 8).requires_grad_()
    weight = torch.randn(31, 8).requires_grad_()
    out = fused_linear_rlsd_loss(
        hidden, weight, torch.zeros(3, 0, dtype=torch.int64), torch.ones(3),
        teacher_hidden=hidden.detach(), impl="torch",
    )
    out.loss.backward()
    assert out.loss == 0 and out.log_probs.shape == (3, 0) and not weight.grad.any()


@pytest.mark.parametrize("case", ["off-policy", "kl", "entropy", "all"])
def test_dead_rows_never_reach_the_result(case):
    keep, loss, head = CASES[case]
    p = make_problem(67, 301, 24)
    p["bias"] = torch.randn(301)
    config = RLSDLossConfig(**loss)
    live = ref.live_tokens(p["loss_weights"], p["advantages"], config)
    clean = run_fused({k: v for k, v in p.items() if k in (
        "hidden", "weight", "completion_ids", "advantages", "loss_weights", *keep)},
        "torch", config=config, return_entropy=True, **head)
    for name in ("hidden", "teacher_hidden", "old_log_probs", "ref_log_probs"):
        p[name][~live] = math.nan
    poisoned = run_fused({k: v for k, v in p.items() if k in (
        "hidden", "weight", "completion_ids", "advantages", "loss_weights", *keep)},
        "torch", config=config, return_entropy=True, **head)
    assert (~live).sum() > 5
    for name, value in clean.items():
        assert torch.equal(poisoned[name], value), name


def test_dead_rows_never_reach_the_head(monkeypatch):
    rows = []
    real = gemm.logits

    def counting(h, weight, out):
        rows.append(len(h))
        return real(h, weight, out)

    monkeypatch.setattr(gemm, "logits", counting)
    p = make_problem(67, 301, 24)
    live = int(((p["loss_weights"] != 0) & (p["advantages"] != 0)).sum())
    unmasked = int((p["loss_weights"] != 0).sum())
    scored = int(
        ((p["loss_weights"] != 0) & (p["advantages"] != 0) & p["reweight_mask"]).sum()
    )
    assert scored < live < unmasked < 67
    for config, lam, expected in [
        (RLSDLossConfig(), 0.5, live + scored),
        (RLSDLossConfig(), 0.0, live),
        (RLSDLossConfig(beta=0.1), 0.5, unmasked + scored),
        (RLSDLossConfig(entropy_coef=0.1), 0.0, unmasked),
    ]:
        rows.clear()
        run_fused(p, "torch", config=config, rlsd_lambda=lam, max_workspace_bytes=3 * 301 * 4 * 7)
        assert sum(rows) == expected
        assert max(rows) <= 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_autocast_changes_nothing(dtype):
    p = make_problem(67, 301, 24, dtype)
    options = {"config": RLSDLossConfig(entropy_coef=0.1, beta=0.1), "return_entropy": True}
    expected = run_fused(p, "torch", **options)
    with torch.autocast("cpu", torch.bfloat16):
        got = run_fused(p, "torch", **options)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=NAMES.get)
@pytest.mark.parametrize("case", ["off-policy", "old-delta", "no-dual-clip", "tight-dual-clip",
                                  "lambda1-eps1", "negative-only", "mask", "kl", "entropy"])
def test_rlsd_loss_on_log_probs(dtype, case):
    keep, loss, _ = CASES[case]
    n = 501
    lp = (-8 * torch.rand(n)).to(dtype)
    a = torch.randn(n).to(dtype)
    a[::5] = 0
    inputs = {
        "teacher_log_probs": lp + 0.3 * torch.randn(n), "old_log_probs": lp + torch.randn(n),
        "ref_log_probs": lp + torch.randn(n), "loss_weights": torch.rand(n) * (torch.rand(n) > 0.2),
        "reweight_mask": torch.rand(n) < 0.5 if "mask" in case else None,
    }

    def run(impl, cast_to):
        leaves = [lp.to(cast_to).requires_grad_(), torch.full_like(lp, 2.0).to(cast_to)]
        out = rlsd_loss(
            leaves[0], a.to(cast_to), entropy=leaves[1].requires_grad_(), impl=impl,
            config=RLSDLossConfig(**loss),
            **{k: v.to(cast_to) if v is not None and v.is_floating_point() else v
               for k, v in inputs.items()},
        )
        d_lp, d_ent = torch.autograd.grad(out.loss, leaves, allow_unused=True)
        d_ent = torch.zeros_like(d_lp) if d_ent is None else d_ent
        return {"loss": out.loss.detach(), "d_lp": d_lp, "d_entropy": d_ent}

    truth = run("ref", torch.float64)
    assert_as_accurate(run("torch", dtype), run("ref", dtype), truth)
    assert (truth["d_lp"] == 0).sum() > 90 and (truth["d_lp"] != 0).sum() > 90


# A zero A_hat from lambda = 1, eps_w = 1 and an infinite delta must not flip the clip branch.
@pytest.mark.parametrize("a, teacher", [(1.0, -math.inf), (-1.0, math.inf)])
@pytest.mark.parametrize("old", [-1e4, -1.0, 1e4])
def test_infinite_blame_and_overflowing_ratio(a, teacher, old):
    results = []
    for impl in ("torch", "ref"):
        lp = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
        out = rlsd_loss(
            lp, torch.tensor([a]), teacher_log_probs=torch.tensor([teacher]),
            old_log_probs=torch.tensor([old]), impl=impl,
            config=RLSDLossConfig(rlsd_lambda=1.0, rlsd_reweight_clip_range=1.0),
        )
        out.loss.backward()
        results.append((out.loss.item(), lp.grad.item()))
    assert results[0] == results[1] == (0.0, 0.0)
