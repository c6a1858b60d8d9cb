"""The public API: errors, rlsd_loss, advantages, the module, flags."""

import math

import pytest
import torch
from problems import make_problem, run_fused

from rlsd_kernels import (
    FusedLinearRLSDLoss,
    RLSDLossConfig,
    RLSDLossOutput,
    fused_linear_rlsd_loss,
    gemm,
    linear_distillation_loss,
    linear_log_probs,
    logprob,
    merge_stats,
    ref,
    rlsd_advantages,
    rlsd_loss,
)
from rlsd_kernels import loss as loss_module

N, V, H = 6, 11, 4
HIDDEN, WEIGHT = torch.ones(N, H), torch.ones(V, H)
IDS, A, LP = torch.zeros(N, dtype=torch.int64), torch.ones(N), -torch.ones(N)


def at(tensor, index, value):
    changed = tensor.clone()
    changed[index] = value
    return changed


def fused(**changes):
    inputs = {"hidden": HIDDEN, "weight": WEIGHT, "completion_ids": IDS, "advantages": A,
              "teacher_hidden": HIDDEN}
    return fused_linear_rlsd_loss(**(inputs | changes))


def log_probs(**changes):
    inputs = {"hidden": HIDDEN, "weight": WEIGHT, "completion_ids": IDS}
    return linear_log_probs(**(inputs | changes))


def loss(**changes):
    return rlsd_loss(**({"log_probs": LP, "advantages": A, "teacher_log_probs": LP} | changes))


def a_hat(**changes):
    return rlsd_advantages(
        **({"log_probs": LP, "advantages": A, "teacher_log_probs": LP} | changes)
    )


# Arguments that linear_log_probs and the fused loss check in the same words.
HEAD_ERRORS = [
    ({"hidden": [1.0]}, TypeError, r"^hidden must be a torch.Tensor, but got list"),
    ({"hidden": torch.ones(H)}, ValueError, r"^hidden must have shape \(..., H\).*got \(4,\)"),
    ({"hidden": IDS}, TypeError, r"^hidden must have a float dtype, but got torch.int64"),
    ({"weight": None}, TypeError, r"^weight must be a torch.Tensor, but got NoneType"),
    ({"weight": torch.ones(V, H + 1)}, ValueError, r"^weight must have shape \(V, 4\).*\(11, 5\)"),
    ({"weight": torch.ones(H)}, ValueError, r"^weight must have shape \(V, 4\)"),
    ({"weight": WEIGHT.bfloat16()}, ValueError,
     r"^weight is torch.bfloat16 but hidden is torch.float32; cast"),
    ({"weight": WEIGHT.to("meta")}, ValueError, r"^weight is on meta but hidden is on cpu; move"),
    ({"completion_ids": IDS[:3]}, ValueError, r"^completion_ids must have shape \(6,\).*\(3,\)"),
    ({"completion_ids": IDS.int()}, TypeError, r"^completion_ids must have a int64 dtype"),
    ({"completion_ids": IDS.to("meta")}, ValueError, r"^completion_ids is on meta"),
    ({"completion_ids": at(IDS, 2, V)}, ValueError,
     r"^completion_ids must lie in \[0, 11\), but range from 0 to 11"),
    ({"completion_ids": at(IDS, 5, -100)}, ValueError,
     r"^completion_ids must lie in \[0, 11\), but range from -100 to 0; .*loss_weights"),
    ({"bias": torch.ones(V + 1)}, ValueError, r"^bias must have shape \(11,\)"),
    ({"bias": torch.ones(V).to("meta")}, ValueError, r"^bias is on meta"),
    ({"bias": 1.0}, TypeError, r"^bias must be a torch.Tensor"),
    ({"logit_scale": math.nan}, ValueError, r"^logit_scale must be a finite number"),
    ({"logit_scale": torch.ones(())}, ValueError, r"^logit_scale must be a finite number"),
    ({"final_logit_softcapping": 0.0}, ValueError, r"^final_logit_softcapping must be a finite"),
    ({"final_logit_softcapping": -1.0}, ValueError, r"^final_logit_softcapping must be a finite"),
    ({"max_workspace_bytes": 0}, ValueError, r"^max_workspace_bytes must be a finite number in"),
    ({"max_workspace_bytes": 1e6}, TypeError, r"^max_workspace_bytes must be an int or None"),
    ({"max_workspace_bytes": True}, TypeError, r"^max_workspace_bytes must be an int or None"),
    ({"tp_group": "all ranks"}, TypeError, r"^tp_group must be a torch.distributed.ProcessGroup"),
    ({"weight": torch.ones(V * H // 2)}, ValueError, r"^weight .* FSDP or ZeRO-3 shard"),
    ({"impl": "numpy"}, ValueError, r"^impl must be one of auto, cuda, triton, torch, ref, but"),
    ({"old_log_probs": LP[:2]}, ValueError, r"^old_log_probs must have shape \(6,\).*\(2,\)"),
    ({"old_log_probs": IDS}, TypeError, r"^old_log_probs must have a float dtype"),
    ({"old_log_probs": LP.to("meta")}, ValueError, r"^old_log_probs is on meta"),
]
# Arguments that both losses check.
TOKEN_ERRORS = [
    ({"advantages": 1.0}, TypeError, r"^advantages must be a torch.Tensor, but got float"),
    ({"advantages": A[:2]}, ValueError, r"^advantages must have shape \(6,\) or \(B,\).*\(2,\)"),
    ({"advantages": IDS}, TypeError, r"^advantages must have a float dtype"),
    ({"advantages": A.to("meta")}, ValueError, r"^advantages is on meta"),
    ({"loss_weights": A[:2]}, ValueError, r"^loss_weights must have shape \(6,\)"),
    ({"loss_weights": A.bool()}, TypeError, r"^loss_weights must have a float dtype.*bool"),
    ({"ref_log_probs": LP[:2]}, ValueError, r"^ref_log_probs must have shape \(6,\)"),
    ({"reweight_mask": A}, TypeError, r"^reweight_mask must have a bool dtype"),
    ({"reweight_mask": A.bool()[:2]}, ValueError, r"^reweight_mask must have shape \(6,\)"),
    ({"rlsd_lambda": 1.5}, ValueError, r"^rlsd_lambda must be a finite number in \[0, 1\]"),
    ({"rlsd_lambda": "0.5"}, ValueError, r"^rlsd_lambda must be a finite number"),
    ({"config": RLSDLossConfig(beta=0.1)}, ValueError,
     r"^ref_log_probs is needed because beta is 0.1; pass"),
    ({"config": RLSDLossConfig(rlsd_delta_source="old_log_probs")}, ValueError,
     r"^old_log_probs is needed because rlsd_delta_source is 'old_log_probs'"),
    ({"impl": "numpy"}, ValueError, r"^impl must be one of"),
]
FUSED_ERRORS = [
    ({"teacher_log_probs": LP}, ValueError, r"^Pass teacher_hidden or teacher_log_probs, not both"),
    ({"teacher_hidden": None}, ValueError,
     r"^teacher_hidden or teacher_log_probs is needed because lambda is 0.5; pass one"),
    ({"teacher_hidden": None, "teacher_log_probs": LP[:1]}, ValueError,
     r"^teacher_log_probs must have shape \(6,\)"),
    ({"teacher_hidden": HIDDEN[:2]}, ValueError,
     r"^teacher_hidden must have leading shape \(6,\) like completion_ids, but got \(2, 4\)"),
    ({"teacher_hidden": torch.ones(N, 3)}, ValueError, r"^weight must have shape \(V, 3\)"),
    ({"teacher_hidden": HIDDEN.bfloat16()}, ValueError, r"^weight is torch.float32 but"),
    ({"teacher_hidden": None, "teacher_log_probs": LP, "teacher_weight": WEIGHT}, ValueError,
     r"^teacher_weight is given without teacher_hidden"),
    ({"teacher_hidden": HIDDEN.to("meta")}, ValueError, r"^teacher_hidden is on meta"),
    ({"teacher_weight": torch.ones(V + 1, H)}, ValueError,
     r"^teacher_weight has 12 rows but weight has 11; .* one vocabulary"),
    ({"teacher_weight": WEIGHT.to("meta")}, ValueError, r"^teacher_weight is on meta"),
]
LOSS_ERRORS = [
    ({"log_probs": None}, TypeError, r"^log_probs must be a torch.Tensor"),
    ({"log_probs": IDS}, TypeError, r"^log_probs must have a float dtype"),
    ({"teacher_log_probs": None}, ValueError,
     r"^teacher_log_probs is needed because lambda is 0.5; pass it, or set rlsd_lambda to 0"),
    ({"teacher_log_probs": LP[:1]}, ValueError, r"^teacher_log_probs must have shape \(6,\)"),
    ({"config": RLSDLossConfig(entropy_coef=0.1)}, ValueError,
     r"^entropy is needed because entropy_coef is 0.1"),
    ({"entropy": LP[:1]}, ValueError, r"^entropy must have shape \(6,\)"),
]
A_HAT_ERRORS = [
    ({"teacher_log_probs": None}, TypeError, r"^teacher_log_probs must be a torch.Tensor"),
    ({"advantages": A[:2]}, ValueError, r"^advantages must have shape \(6,\)"),
    ({"teacher_log_probs": LP[:2]}, ValueError, r"^teacher_log_probs must have shape \(6,\)"),
    ({"reweight_mask": A}, TypeError, r"^reweight_mask must have a bool dtype"),
    ({"rlsd_lambda": -1.0}, ValueError, r"^rlsd_lambda must be a finite number"),
    ({"rlsd_reweight_clip_range": 2.0}, ValueError, r"^rlsd_reweight_clip_range must be a finite"),
    ({"rlsd_negative_only": 1}, ValueError, r"^rlsd_negative_only must be True or False"),
]
ERRORS = [
    *[(log_probs, *e) for e in HEAD_ERRORS], *[(fused, *e) for e in HEAD_ERRORS],
    (log_probs, {"temperature": 0.0}, ValueError, r"^temperature must be a finite number"),
    *[(fused, *e) for e in TOKEN_ERRORS], *[(loss, *e) for e in TOKEN_ERRORS],
    *[(fused, *e) for e in FUSED_ERRORS], *[(loss, *e) for e in LOSS_ERRORS],
    *[(a_hat, *e) for e in A_HAT_ERRORS],
]


def error_id(case):
    call, changes, *_ = case
    name, value = next(iter(changes.items()))
    if torch.is_tensor(value):
        value = f"{tuple(value.shape)}-{value.dtype}-{value.device}".replace("torch.", "")
    return f"{call.__name__}-{name}-{str(value)[:30]}"


@pytest.mark.parametrize("call, changes, kind, message", ERRORS, ids=map(error_id, ERRORS))
def test_error_sentences(call, changes, kind, message):
    with pytest.raises(kind, match=message) as error:
        call(**changes)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize("call", [fused, log_probs, loss, a_hat])
def test_the_unchanged_call_is_valid(call):
    result = call()
    value = result.loss if isinstance(result, RLSDLossOutput) else result
    assert torch.isfinite(value).all()


@pytest.mark.parametrize("impl", ["auto", "torch", "ref"])
@pytest.mark.parametrize("bad", [-1, V, 2**40, -(2**40)])
def test_ids_out_of_range_never_reach_an_implementation(bad, impl):
    for call in (fused, log_probs):
        with pytest.raises(ValueError, match=r"^completion_ids must lie in \[0, 11\)"):
            call(completion_ids=at(IDS, 1, bad), impl=impl)


@pytest.mark.parametrize("impl", ["torch", "ref"])
def test_an_unchecked_bad_id_is_nan_for_its_row_only(impl, monkeypatch):
    # The contract on CUDA, where ids are not checked; seen here without the check.
    monkeypatch.setattr(logprob, "check_ids", lambda *a: None)  # of the reference
    monkeypatch.setattr(loss_module, "check_ids", lambda *a: None)
    p = make_problem(4, V, H)
    hidden = p["hidden"].clone().requires_grad_()
    out = fused_linear_rlsd_loss(
        hidden, p["weight"], torch.tensor([0, V, -1, 3]), torch.ones(4),
        teacher_hidden=p["hidden"], impl=impl,
    )
    assert out.log_probs.isnan().tolist() == [False, True, True, False]
    if impl == "torch":
        out.loss.backward()
        assert hidden.grad.isnan().any(1).tolist() == [False, True, True, False]


NON_FINITE = {
    "hidden": at(HIDDEN, (1, 2), math.nan), "weight": at(WEIGHT, (3, 1), math.inf),
    "teacher_hidden": at(HIDDEN, (0, 0), -math.inf), "bias": at(torch.ones(V), 2, math.nan),
    "teacher_weight": at(WEIGHT, (0, 0), math.nan), "advantages": at(A, 1, math.nan),
    "old_log_probs": at(LP, 1, -math.inf), "ref_log_probs": at(LP, 1, math.inf),
    "loss_weights": at(A, 1, math.nan),
}


@pytest.mark.parametrize("name", NON_FINITE)
def test_check_inputs_rejects_non_finite(name):
    with pytest.raises(ValueError, match=f"^{name} has non-finite values; find the row"):
        fused(**{name: NON_FINITE[name]}, check_inputs=True)


def test_check_inputs_rejects_non_finite_teacher_log_probs():
    with pytest.raises(ValueError, match="^teacher_log_probs has non-finite values"):
        fused(teacher_hidden=None, teacher_log_probs=at(LP, 0, math.nan), check_inputs=True)


def test_check_inputs_allows_non_finite_values_on_masked_tokens():
    out = fused(
        loss_weights=at(A, 1, 0.0), old_log_probs=at(LP, 1, -math.inf),
        advantages=at(A, 1, math.nan), check_inputs=True,
    )
    assert torch.isfinite(out.loss)


@pytest.mark.parametrize("impl", ["torch", "ref"])
def test_infinite_log_probs_on_masked_tokens_leave_no_nan(impl):
    # Trap 2: inf * 0.
    lp = at(LP, 1, -math.inf).requires_grad_()
    entropy = at(A, 1, math.inf).requires_grad_()
    out = rlsd_loss(
        lp, A, teacher_log_probs=at(LP, 1, math.inf), old_log_probs=at(LP, 1, -math.inf),
        ref_log_probs=at(LP, 1, math.nan), loss_weights=at(A, 1, 0.0), entropy=entropy, impl=impl,
        config=RLSDLossConfig(beta=0.1, entropy_coef=0.1),
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx(5 * (-1 - 0.1))
    assert lp.grad.tolist() == pytest.approx([-1, 0, -1, -1, -1, -1])
    assert entropy.grad.tolist() == pytest.approx([-0.1, 0, -0.1, -0.1, -0.1, -0.1])
    assert all(torch.isfinite(x) for k, x in out.stats.items() if "neg" not in k)


@pytest.mark.parametrize("impl", ["torch", "ref"])
@pytest.mark.parametrize("coef", [0.0, 0.1])
def test_rlsd_loss_gradients_to_log_probs_and_entropy(impl, coef):
    lp = (-torch.rand(2, 9)).requires_grad_()
    entropy, a = torch.rand(2, 9).requires_grad_(), torch.tensor([1.0, -2.0])
    weights = torch.rand(2, 9)
    out = rlsd_loss(
        lp, a, teacher_log_probs=lp.detach(), loss_weights=weights, entropy=entropy, impl=impl,
        config=RLSDLossConfig(entropy_coef=coef),
    )
    (out.loss * 3).backward()
    torch.testing.assert_close(lp.grad, -3 * a[:, None] * weights)
    expected = (-a[:, None] * weights - coef * weights * entropy).sum()
    torch.testing.assert_close(out.loss, expected.detach())
    if coef:
        torch.testing.assert_close(entropy.grad, -3 * coef * weights)
    else:
        assert entropy.grad is None or not entropy.grad.any()
    assert torch.equal(out.entropy, entropy) and not out.entropy.requires_grad
    assert torch.equal(out.log_probs, lp) and out.log_probs.shape == (2, 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("impl", ["torch", "ref"])
def test_rlsd_loss_dtypes(dtype, impl):
    lp = (-torch.rand(9)).to(dtype).requires_grad_()
    out = rlsd_loss(lp, torch.ones(9), teacher_log_probs=lp.detach(), impl=impl)
    out.loss.backward()
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert lp.grad.dtype == dtype
    torch.testing.assert_close(lp.grad, torch.full_like(lp, -1 / 9))


def test_rlsd_loss_equals_the_fused_one():
    p = make_problem(40, 51, 8, torch.float64)
    config = RLSDLossConfig(beta=0.1)
    out = fused_linear_rlsd_loss(**p, config=config)
    teacher = linear_log_probs(p["teacher_hidden"], p["weight"], p["completion_ids"])
    lp, _ = ref.linear_log_probs(p["hidden"], p["weight"], p["completion_ids"])
    again = rlsd_loss(
        lp, p["advantages"], teacher_log_probs=teacher, config=config,
        **{k: p[k] for k in ("old_log_probs", "ref_log_probs", "loss_weights", "reweight_mask")},
    )
    torch.testing.assert_close(out.loss, again.loss)
    assert out.stats.keys() - again.stats.keys() == {
        "head/gradient_work", "tokens/differentiated"
    }
    for name, value in again.stats.items():
        torch.testing.assert_close(out.stats[name], value, equal_nan=True)


@pytest.mark.parametrize("impl", ["torch", "ref"])
def test_lambda_argument_overrides_the_config(impl):
    p = make_problem(30, 51, 8)
    config = RLSDLossConfig(rlsd_lambda=0.9)

    def value(**kwargs):
        return run_fused(p, impl, **kwargs)["loss"]

    assert torch.equal(value(config=config, rlsd_lambda=0.5), value())
    assert torch.equal(value(config=config), value(rlsd_lambda=0.9))
    assert torch.equal(value(config=config, rlsd_lambda=0), value(rlsd_lambda=0.0))
    assert len({v.item() for v in (value(), value(config=config), value(rlsd_lambda=0))}) == 3


@pytest.mark.parametrize("impl", ["torch", "ref"])
def test_lambda_zero_equals_grpo_without_a_teacher(impl):
    p = make_problem(30, 51, 8)
    with_teacher = run_fused(p, impl, rlsd_lambda=0.0)
    del p["teacher_hidden"]
    without = run_fused(p, impl, rlsd_lambda=0.0)
    assert with_teacher.keys() == without.keys() and "teacher_log_probs" not in without
    assert all(torch.equal(without[k], v) for k, v in with_teacher.items())


@pytest.mark.parametrize(
    "name, changes",
    [
        ("lambda 0", {"rlsd_lambda": 0.0}),
        ("no A", {"advantages": 0 * A}),
        ("no A with KL", {"advantages": 0 * A, "ref_log_probs": LP,
                          "config": RLSDLossConfig(beta=0.1)}),
        ("mask", {"reweight_mask": A < 0}),
        ("negative only", {"config": RLSDLossConfig(rlsd_negative_only=True)}),
        ("masked", {"loss_weights": 0 * A}),
        ("scored", {"teacher_hidden": None, "teacher_log_probs": LP, "teacher_weight": None}),
    ],
)
def test_no_teacher_forward_where_no_token_needs_it(name, changes, monkeypatch):
    # Trap 3. A teacher of another hidden size is seen by the shape of what the head receives.
    teacher_rows = []
    real = gemm.logits
    monkeypatch.setattr(
        gemm, "logits",
        lambda h, w, out: teacher_rows.append(len(h) * (h.shape[1] == 3)) or real(h, w, out),
    )
    teacher = {"teacher_hidden": torch.ones(N, 3), "teacher_weight": torch.ones(V, 3)}
    fused(**(teacher | changes), impl="torch")
    assert sum(teacher_rows) == 0
    fused(**teacher, impl="torch")
    assert sum(teacher_rows) == N


def test_rlsd_advantages():
    a, lp, t = torch.randn(4, 7), -torch.rand(4, 7), -torch.rand(4, 7)
    got = rlsd_advantages(a, lp.requires_grad_(), t, rlsd_lambda=0.7)
    w = (a.sign() * (t - lp)).exp().clip(0.8, 1.2)
    torch.testing.assert_close(got, (a * (0.3 + 0.7 * w)).detach())
    assert not got.requires_grad
    sequences = rlsd_advantages(a[:, 0], lp, t)
    assert torch.equal(sequences, rlsd_advantages(a[:, :1].expand(4, 7), lp, t))
    assert rlsd_advantages(a, lp.bfloat16(), t).dtype == torch.float32
    assert rlsd_advantages(a, lp.double(), t).dtype == torch.float64
    mask = torch.rand(4, 7) < 0.5
    some = rlsd_advantages(a, lp, t, reweight_mask=mask, rlsd_negative_only=True)
    kept = ~mask | (a > 0)
    assert torch.equal(some[kept], a[kept]) and not torch.equal(some[~kept], a[~kept])


@pytest.mark.parametrize("config", [None, {}, "rlsd", 0.5, RLSDLossConfig])
def test_a_config_of_another_kind_is_one_sentence(config):
    p = make_problem(4, 7, 3)
    h, w, ids, a = (p[k] for k in ("hidden", "weight", "completion_ids", "advantages"))
    for call in (
        lambda: fused_linear_rlsd_loss(h, w, ids, a, teacher_hidden=h, config=config),
        lambda: rlsd_loss(a, a, teacher_log_probs=a, config=config),
        lambda: FusedLinearRLSDLoss(config),
        lambda: FusedLinearRLSDLoss()(h, w, ids, a, teacher_hidden=h, config=config),
    ):
        with pytest.raises(TypeError, match=r"^config must be an RLSDLossConfig, but got \w+; "):
            call()


def test_sparse_and_empty_heads_are_one_sentence():
    p = make_problem(4, 7, 3)
    h, w, ids = (p[k] for k in ("hidden", "weight", "completion_ids"))
    for bad in (w[:0], torch.zeros(7, 0)):
        states = h[:, : bad.shape[1]]
        with pytest.raises(ValueError, match="^weight must have at least one row and one column"):
            linear_log_probs(states, bad, ids)
        with pytest.raises(ValueError, match="^weight must have at least one row and one column"):
            linear_distillation_loss(states, bad, states)
        with pytest.raises(ValueError, match="^teacher_weight must have at least one row and one"):
            linear_distillation_loss(h, w, states, teacher_weight=bad)
    with pytest.raises(TypeError, match="^old_log_probs must be dense, but its layout is torch.sp"):
        linear_log_probs(h, w, ids, old_log_probs=p["old_log_probs"].to_sparse())


@pytest.mark.parametrize("many", [None, [], {}, [{}], ["x"], [1], torch.ones(2)])
def test_merge_stats_of_something_else_is_one_sentence(many):
    with pytest.raises(ValueError, match=r"^many must be a list of RLSDLossOutput\.stats, with"):
        merge_stats(many)


def test_module_is_the_function():
    p = make_problem(20, 51, 8)
    config = RLSDLossConfig(rlsd_lambda=0.3, temperature=0.8)
    module = FusedLinearRLSDLoss(config, return_entropy=True, logit_scale=0.5)
    positional = [p.pop(k) for k in ("hidden", "weight", "completion_ids", "advantages")]
    got = module(*positional, **p)
    expected = fused_linear_rlsd_loss(
        *positional, **p, config=config, return_entropy=True, logit_scale=0.5
    )
    assert isinstance(module, torch.nn.Module) and not list(module.parameters())
    for g, e in zip(got[:4], expected[:4], strict=True):
        assert torch.equal(g, e)
    per_call = module(*positional, **p, logit_scale=1.0)
    assert not torch.equal(per_call.loss, got.loss)
    default = FusedLinearRLSDLoss()(*positional, **p)
    assert torch.equal(default.loss, fused_linear_rlsd_loss(*positional, **p).loss)


def test_output_fields():
    p = make_problem(20, 51, 8)
    out = fused_linear_rlsd_loss(**p)
    assert out._fields == ("loss", "log_probs", "teacher_log_probs", "entropy", "stats")
    assert out.loss.shape == () and out.entropy is None
    assert all(torch.is_tensor(v) and v.dim() == 0 for v in out.stats.values())
    dead = (p["loss_weights"] == 0) | (p["advantages"] == 0)
    assert (out.log_probs[dead] == 0).all() and (out.log_probs[~dead] < 0).all()


SHAPED = {
    "advantages", "loss_weights", "teacher_log_probs", "old_log_probs", "ref_log_probs",
    "reweight_mask", "entropy", "log_probs", "completion_ids",
}


# A square batch, in which (B,) and (T,) cannot be told apart, and another.
@pytest.mark.parametrize("b, t", [(4, 4), (3, 5)], ids=lambda n: f"{n}")
@pytest.mark.parametrize("call", [fused, log_probs, loss, a_hat, "distill"],
                         ids=lambda f: getattr(f, "__name__", f))
def test_no_per_token_argument_broadcasts(call, b, t):
    lp = -torch.ones(b, t)
    hidden, ids = torch.randn(b, t, H), torch.zeros(b, t, dtype=torch.int64)
    config = RLSDLossConfig(beta=0.1, entropy_coef=0.1)
    own = {"advantages": torch.randn(b, t), "teacher_log_probs": lp - 1, "reweight_mask": lp < 0}
    more = {"loss_weights": torch.rand(b, t), "old_log_probs": lp, "ref_log_probs": lp}
    function, inputs, options = {
        fused: (fused_linear_rlsd_loss, {"completion_ids": ids, **own, **more},
                {"hidden": hidden, "weight": WEIGHT, "config": config}),
        log_probs: (linear_log_probs, {"completion_ids": ids, "old_log_probs": lp},
                    {"hidden": hidden, "weight": WEIGHT}),
        loss: (rlsd_loss, {**own, **more, "entropy": -lp}, {"log_probs": lp, "config": config}),
        a_hat: (rlsd_advantages, own, {"log_probs": lp}),
        "distill": (linear_distillation_loss, {"loss_weights": more["loss_weights"]},
                    {"hidden": hidden, "weight": WEIGHT, "teacher_hidden": hidden}),
    }[call]
    function(**inputs, **options)
    for name, value in inputs.items():
        assert name in SHAPED
        shapes = [(), (1,), (t,), (b,), (b, 1), (1, t), (1, 1), (t, b), (1, b, t)]
        for shape in {x for x in shapes if x != (b, t)}:
            if name == "advantages" and shape == (b,):
                continue
            bad = value.flatten()[0].expand(shape)
            with pytest.raises(ValueError, match=rf"^{name} must have shape .*\.$"):
                function(**inputs | {name: bad}, **options)


@pytest.mark.parametrize("call", [fused, loss, a_hat], ids=lambda f: f.__name__)
def test_advantages_of_a_square_batch_belong_to_sequences(call):
    per_sequence, hidden = torch.tensor([1.0, -2.0, 0.5]), torch.randn(3, 3, H)
    lp, teacher = (-torch.rand(2, 3, 3)).unbind()
    changes = {
        fused: {"hidden": hidden, "teacher_hidden": hidden + 1,
                "completion_ids": torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8]])},
        loss: {"log_probs": lp, "teacher_log_probs": teacher},
        a_hat: {"log_probs": lp, "teacher_log_probs": teacher},
    }[call]
    got, want = (
        call(**changes, advantages=a) for a in (per_sequence, per_sequence[:, None].expand(3, 3))
    )
    got, want = (x if call is a_hat else x.loss for x in (got, want))
    assert torch.equal(got, want)


def test_equal_infinite_log_probs_are_no_evidence():
    """-inf minus -inf is NaN; the multiplier there is 1, and at one -inf the clip's."""
    student = torch.tensor([-math.inf, -math.inf, -1.0, -1.0, -2.0])
    teacher = torch.tensor([-math.inf, -1.0, -math.inf, -1.0, math.nan])
    for sign in (1.0, -1.0):
        got = a_hat(log_probs=student, teacher_log_probs=teacher, advantages=sign * torch.ones(5))
        up, down = (1.1, 0.9) if sign > 0 else (0.9, 1.1)
        torch.testing.assert_close(got[:4], sign * torch.tensor([1, up, down, 1]))
        assert got[4].isnan()  # not an answer where there is none


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_handed_over_without_a_copy(dtype, monkeypatch):
    """The gradients formed in forward become .grad, unless the graph is kept for another pass."""
    formed, real = [], loss_module.pipeline.linear_rlsd_loss
    monkeypatch.setattr(
        loss_module.pipeline, "linear_rlsd_loss",
        lambda *a, **k: formed.append(real(*a, **k)) or formed[-1],
    )
    grads = {}
    for upstream, retain in ((1.0, False), (3.0, False), (1.0, True), (3.0, True)):
        p = make_problem(N, V, H, dtype)
        hidden, weight = p["hidden"].requires_grad_(), p["weight"].requires_grad_()
        out = fused_linear_rlsd_loss(
            hidden, weight, p["completion_ids"], p["advantages"], teacher_hidden=hidden,
            impl="torch",
        )
        (out.loss * upstream).backward(retain_graph=retain)
        own = [x.data_ptr() for x in formed.pop()[4:6]]
        shared = [x.grad.data_ptr() == y for x, y in zip((hidden, weight), own, strict=True)]
        assert shared == [not retain and dtype != torch.float16] * 2
        grads[upstream, retain] = [hidden.grad.clone(), weight.grad.clone()]
        if retain:
            (out.loss * upstream).backward()
            for x, once in zip((hidden, weight), grads[upstream, retain], strict=True):
                torch.testing.assert_close(x.grad, 2 * once)
    for upstream in (1.0, 3.0):
        for x, y in zip(grads[upstream, False], grads[upstream, True], strict=True):
            assert torch.equal(x, y)
        for x, one in zip(grads[upstream, False], grads[1.0, False], strict=True):
            torch.testing.assert_close(x, upstream * one)


@pytest.mark.parametrize("flag", [torch.ones(3), torch.tensor(True), 1, "yes", None], ids=repr)
def test_flags_are_bools(flag):
    p = make_problem(6, 17, 4)
    head = [p[k] for k in ("hidden", "weight", "completion_ids")]
    for name, call in (
        ("return_entropy", lambda **f: fused_linear_rlsd_loss(
            *head, p["advantages"], rlsd_lambda=0.0, **f)),
        ("check_inputs", lambda **f: fused_linear_rlsd_loss(
            *head, p["advantages"], rlsd_lambda=0.0, **f)),
        ("return_entropy", lambda **f: linear_log_probs(*head, **f)),
        ("check_inputs", lambda **f: linear_distillation_loss(*head[:2], head[0], **f)),
    ):
        with pytest.raises(TypeError, match=f"^{name} must be True or False, but got"):
            call(**{name: flag})
