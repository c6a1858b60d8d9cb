"""The Liger-shaped loss against Liger's formula, and against Liger itself where it is installed."""

import inspect
import math

import pytest
import torch

from rlsd.integrations.liger import LigerFusedLinearRLSDLoss

B, T, H, V = 4, 7, 12, 53
ONE_PASS = ["grpo", "bnpo", "dapo", "dr_grpo"]
TOKEN_LEVEL = ["cispo", "sapo", "vespo"]
LOSS_TYPES = [*ONE_PASS, "luspo", *TOKEN_LEVEL]


def problem(seed=0, **more):
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    x = {
        "_input": draw(B, T, H).requires_grad_(), "lin_weight": draw(V, H).requires_grad_(),
        "bias": draw(V).requires_grad_(),
        "selected_token_ids": torch.randint(0, V, (B, T), generator=rng),
        "attention_mask": torch.tensor([[1] * T, [1] * 3 + [0] * (T - 3), [1] * T, [0] * T]),
        "advantages": torch.tensor([1.2, -0.7, 0.0, 0.4], dtype=torch.float64),
    }
    log_probs = plain_log_probs(x["_input"], x["lin_weight"], x["bias"], x["selected_token_ids"])
    return {**x, **{name: make(draw, log_probs.detach()) for name, make in more.items()}}


def near(draw, log_probs):
    return log_probs + 0.4 * draw(B, T)


def plain_log_probs(hidden, weight, bias, ids, temperature=1.0):
    logits = (hidden @ weight.T + (0 if bias is None else bias)) / temperature
    return logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


def plain(x, *, beta=0.0, epsilon_low=0.2, epsilon_high=0.2, loss_type="dapo", delta=None,
          max_completion_length=None, temperature=1.0, rlsd_lambda=0.0, eps_w=0.2,
          importance_sampling_level="token", use_bias_correction_kl=False):
    """Liger's ppo_loss_fn, written out, on the re-weighted advantages."""
    lp = plain_log_probs(
        x["_input"], x["lin_weight"], x["bias"], x["selected_token_ids"], temperature
    )
    mask, a = x["attention_mask"], x["advantages"]
    a = a if a.dim() == 2 else a[:, None]
    if rlsd_lambda:
        w = (a.sign() * (x["teacher_per_token_logps"] - lp.detach())).exp()
        a = a * ((1 - rlsd_lambda) + rlsd_lambda * w.clamp(1 - eps_w, 1 + eps_w))
    old, ratio = x.get("old_per_token_logps"), x.get("vllm_is_ratio", torch.ones(1, 1))
    ratio = ratio[:, None] if ratio.dim() == 1 else ratio
    log_rho = lp - (lp.detach() if old is None else old)
    if importance_sampling_level == "sequence":
        log_rho = (log_rho * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    rho, bad = log_rho.exp(), torch.zeros(B, T, dtype=torch.bool)
    if loss_type == "cispo":
        loss = -rho.detach().clamp(max=epsilon_high) * a * lp
        bad = (rho > epsilon_high) & (a > 0)
    elif loss_type == "sapo":
        gate = [torch.sigmoid(t * (rho - 1)) * 4 / t for t in (1.0, 1.05)]
        loss = -torch.where(a > 0, *gate) * a
    elif loss_type == "vespo":
        log_w = (log_rho.detach().clamp(-20, 20) * mask).sum(1, keepdim=True)
        if "vllm_is_ratio" in x:
            log_w = log_w + ratio.log().clamp(math.log(1e-8), 20).sum(1, keepdim=True)
        log_w = log_w.clamp(math.log(1e-8), 20)
        phi = torch.where(
            a >= 0, (3 + 2 * log_w - 3 * log_w.exp()).exp(), (2 + 3 * log_w - 2 * log_w.exp()).exp()
        )
        loss, ratio = -phi * a * lp, torch.ones(1, 1)
    else:
        clipped = rho.clamp(1 - epsilon_low, 1 + epsilon_high)
        loss = -torch.min((rho if delta is None else rho.clamp(max=delta)) * a, clipped * a)
        bad = ((rho < 1 - epsilon_low) & (a < 0)) | ((rho > 1 + epsilon_high) & (a > 0))
    loss, metrics = loss * ratio, []
    if beta:
        gap = x["ref_per_token_logps"] - lp
        kl = (gap.exp() - gap - 1) * (rho if use_bias_correction_kl else 1)
        loss = loss + beta * kl
        metrics.append((kl * mask).sum() / mask.sum())
    metrics.append((bad * mask).sum() / mask.sum())
    if loss_type == "luspo":
        return (loss * mask.sum(1, keepdim=True)).mean(), metrics
    loss = loss * mask
    if loss_type in ("grpo", "sapo"):
        return (loss.sum(1) / mask.sum(1).clamp(min=1)).mean(), metrics
    if loss_type == "dr_grpo":
        return loss.sum() / (B * max_completion_length), metrics
    items = mask.sum() if loss_type == "bnpo" else x.get("num_items_in_batch", mask.sum())
    return loss.sum() / items, metrics


def gradients(loss, x):
    return torch.autograd.grad(loss, [x["_input"], x["lin_weight"], x["bias"]])


CASES = {
    "on-policy": ({}, {}),
    "off-policy": ({"old_per_token_logps": near}, {}),
    "kl": ({"old_per_token_logps": near, "ref_per_token_logps": near}, {"beta": 0.3}),
    "dual-clip": ({"old_per_token_logps": near}, {"delta": 1.25}),
    "temperature": ({"old_per_token_logps": near}, {"temperature": 0.7, "epsilon_high": 0.28}),
    "items": ({"num_items_in_batch": lambda *_: torch.tensor(29)}, {}),
    "token-ratio": ({"vllm_is_ratio": lambda draw, _: draw(B, T).abs()}, {}),
    "sequence-ratio-kl": ({"vllm_is_ratio": lambda draw, _: draw(B, 1).abs(),
                           "ref_per_token_logps": near}, {"beta": 0.3}),
    "flat-sequence-ratio": ({"vllm_is_ratio": lambda draw, _: draw(B).abs()}, {}),
    "per-token": ({"advantages": lambda draw, _: draw(B, T), "old_per_token_logps": near}, {}),
    "low-delta": ({"old_per_token_logps": near}, {"delta": 1.1}),
    "corrected-kl": ({"old_per_token_logps": near, "ref_per_token_logps": near},
                     {"beta": 0.3, "use_bias_correction_kl": True}),
}
LEVELS = [*(("token", name) for name in LOSS_TYPES),
          *(("sequence", name) for name in LOSS_TYPES if name not in TOKEN_LEVEL)]


@pytest.mark.parametrize("rlsd_lambda", [0.0, 0.5], ids=["grpo", "rlsd"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("level, loss_type", LEVELS)
def test_equals_ligers_formula(level, loss_type, case, rlsd_lambda):
    more, options = CASES[case]
    x = problem(**more, **({"teacher_per_token_logps": near} if rlsd_lambda else {}))
    options = {"beta": 0.0, "loss_type": loss_type, "max_completion_length": 9,
               "importance_sampling_level": level, "rlsd_lambda": rlsd_lambda, **options}
    module = LigerFusedLinearRLSDLoss(**options)
    assert module.one_pass == (level == "token" and loss_type in ONE_PASS
                               and case not in ("low-delta", "corrected-kl"))
    loss, metrics = module(**x)
    want, want_metrics = plain(x, **options)
    assert loss.item() == pytest.approx(want.item(), abs=1e-6, rel=1e-6)
    assert [m.item() for m in metrics] == pytest.approx([m.item() for m in want_metrics])
    for got, expected in zip(gradients(loss, x), gradients(want, x), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)  # a_t is fp32


def test_reference_and_teacher_from_hidden_states():
    x = problem()
    ref, teacher = torch.randn(2, B, T, H, dtype=torch.float64)
    head = torch.randn(V, H, dtype=torch.float64)
    ids = x["selected_token_ids"]
    loss, _ = LigerFusedLinearRLSDLoss(beta=0.1)(
        **x, ref_input=ref, ref_weight=head, ref_bias=x["bias"].detach(), teacher_input=teacher
    )
    given = {
        "ref_per_token_logps": plain_log_probs(ref, head, x["bias"], ids).detach(),
        "teacher_per_token_logps":
            plain_log_probs(teacher, x["lin_weight"], x["bias"], ids).detach(),
    }
    want, _ = plain({**x, **given}, beta=0.1, rlsd_lambda=0.5)
    assert loss.item() == pytest.approx(want.item(), abs=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("level, loss_type", LEVELS)
def test_equals_liger(level, loss_type, case):
    """One code path of both: the same keywords go to both classes."""
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason="needs liger-kernel")
    more, options = CASES[case]
    if case == "per-token":
        pytest.skip("Liger's advantages are (B,)")
    x = problem(**more)
    cast = {n: v.detach().float() if v.is_floating_point() else v for n, v in x.items()}
    options = {"beta": 0.0, "loss_type": loss_type, "max_completion_length": 9,
               "compiled": False, "use_ref_model": "beta" in options,
               "importance_sampling_level": level, **options}
    results = []
    for loss in (liger.LigerFusedLinearGRPOLoss(**options),
                 LigerFusedLinearRLSDLoss(**options, rlsd_lambda=0.0)):
        for name in ("_input", "lin_weight", "bias"):
            cast[name].requires_grad_()
        value, metrics = loss(**cast)
        results.append((value, *metrics, *gradients(value, cast)))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got.float(), want.float(), atol=2e-6, rtol=2e-5)


def test_keywords_are_ligers():
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason="needs liger-kernel")
    for method in ("__init__", "forward"):
        theirs = inspect.signature(getattr(liger.LigerFusedLinearGRPOLoss, method)).parameters
        ours = inspect.signature(getattr(LigerFusedLinearRLSDLoss, method)).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        for name, parameter in theirs.items():
            assert ours[name].default == parameter.default, name


@pytest.mark.parametrize("options, complaint", [
    ({"loss_type": "ppo"}, "loss_type must be one of"),
    ({"importance_sampling_level": "word"}, "must be 'token' or 'sequence'"),
    ({"importance_sampling_level": "sequence", "loss_type": "sapo"}, "no sequence-level ratio"),
    ({"sapo_temperature_pos": 0}, "sapo_temperature_pos"),
    ({"sapo_temperature_neg": -1.0}, "sapo_temperature_neg"),
    ({"delta": 0.0}, "delta"),
    ({"loss_type": "dr_grpo"}, "max_completion_length"),
    ({"rlsd_lambda": 2.0}, "rlsd_lambda"),
    ({"gradient_tolerance": 1.0}, "gradient_tolerance"),
    ({"gradient_tolerance": "some"}, "gradient_tolerance"),
], ids=lambda x: "" if isinstance(x, str) else "-".join(x))
def test_refuses_in_a_sentence(options, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        LigerFusedLinearRLSDLoss(**options)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


FORMULA = {"loss_type": "sapo", "beta": 0.0}


@pytest.mark.parametrize("more, complaint", [
    ({}, "is needed because lambda is 0.5"),
    ({"teacher_per_token_logps": near, "teacher_input": lambda draw, _: draw(B, T, H)}, "not both"),
    ({"teacher_per_token_logps": near, "rlsd_lambda": lambda *_: 1.5}, "rlsd_lambda must be"),
], ids=["no-teacher", "two-teachers", "lambda"])
@pytest.mark.parametrize("options", [{"beta": 0.0}, FORMULA], ids=["one-pass", "formula"])
def test_a_bad_teacher_is_refused_by_both_ways(options, more, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        LigerFusedLinearRLSDLoss(**options)(**problem(**more))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_the_formula_takes_a_teacher_from_hidden_states():
    x, teacher = problem(), torch.randn(B, T, H, dtype=torch.float64)
    loss, _ = LigerFusedLinearRLSDLoss(**FORMULA)(**x, teacher_input=teacher)
    given = plain_log_probs(teacher, x["lin_weight"], x["bias"], x["selected_token_ids"]).detach()
    want, _ = plain({**x, "teacher_per_token_logps": given}, loss_type="sapo", rlsd_lambda=0.5)
    assert loss.item() == pytest.approx(want.item(), abs=1e-6)


@pytest.mark.parametrize("level, loss_type", LEVELS)
def test_masked_tokens_may_hold_anything(level, loss_type):
    if loss_type == "luspo":
        pytest.skip("Liger's luspo counts masked tokens")
    x = problem(old_per_token_logps=near, ref_per_token_logps=near, teacher_per_token_logps=near)
    module = LigerFusedLinearRLSDLoss(
        beta=0.1, loss_type=loss_type, importance_sampling_level=level, max_completion_length=9,
        use_bias_correction_kl=True,
    )
    want = module(**x)[0]
    bad = {n: v.masked_fill(x["attention_mask"] == 0, v.new_tensor(math.nan))
           for n, v in x.items() if n.endswith("per_token_logps")}
    got = module(**{**x, **bad})[0]
    assert got.item() == want.item()
    for ours, theirs in zip(gradients(got, x), gradients(want, x), strict=True):
        assert torch.equal(ours, theirs)


def test_two_references_are_told():
    x = problem(ref_per_token_logps=near, teacher_per_token_logps=near)
    loss = LigerFusedLinearRLSDLoss(beta=0.1)
    with pytest.warns(UserWarning, match="ref_input .* Using ref_per_token_logps[.]"):
        got = loss(**x, ref_input=torch.zeros(B, T, H), ref_weight=x["lin_weight"].detach())[0]
    assert got.item() == loss(**x)[0].item()


@pytest.mark.parametrize("options", [{"beta": 0.0}, FORMULA], ids=["one-pass", "formula"])
def test_gradient_tolerance(options):
    x, tolerance = problem(old_per_token_logps=near), 0.3
    results = []
    for value in (0.0, tolerance):
        module = LigerFusedLinearRLSDLoss(rlsd_lambda=0.0, gradient_tolerance=value, **options)
        loss, _ = module(**x)
        results.append((loss.item(), torch.cat([g.flatten() for g in gradients(loss, x)])))
    error = (results[1][1] - results[0][1]).norm() / results[0][1].norm()
    assert results[0][0] == results[1][0] and 1e-3 < error < tolerance, error


def test_needs_a_reference():
    with pytest.raises(ValueError, match="ref_per_token_logps"):
        LigerFusedLinearRLSDLoss(rlsd_lambda=0.0)(**problem())
    loss = LigerFusedLinearRLSDLoss(rlsd_lambda=0.0, use_ref_model=False)
    assert [m.item() for m in loss(**problem())[1]] == [0, 0]


@pytest.mark.parametrize("rlsd_lambda", [0.0, 0.5], ids=["grpo", "rlsd"])
def test_a_ratio_per_sequence_where_batch_and_length_agree(rlsd_lambda):
    """(B,) broadcast over the last dimension would be taken for (T,)."""
    x = problem(teacher_per_token_logps=near)
    square = {n: v[:, :B] if v.dim() > 1 and v.shape[:2] == (B, T) else v for n, v in x.items()}
    loss = LigerFusedLinearRLSDLoss(beta=0.0, rlsd_lambda=rlsd_lambda)
    ratio = torch.tensor([0.3, 1.7, 0.9, 2.0], dtype=torch.float64)
    got, want = (loss(**square, vllm_is_ratio=r)[0] for r in (ratio, ratio[:, None].expand(B, B)))
    assert got.item() == want.item() != loss(**square)[0].item()


@pytest.mark.parametrize("name, shapes", [
    ("vllm_is_ratio", [(), (1,), (T,), (1, T), (1, 1), (B, 2), (B, T, 1)]),
    ("advantages", [(), (T,), (B, 1), (1, T), (1, 1)]),
    ("attention_mask", [(), (B,), (T,), (B, 1), (1, T)]),
    ("num_items_in_batch", [(B,), (T,), (B, 1), (1, T)]),
    ("old_per_token_logps", [(), (B,), (B, 1), (1, T)]),
    ("ref_per_token_logps", [(), (B,), (B, 1), (1, T)]),
    ("teacher_per_token_logps", [(), (B,), (B, 1), (1, T)]),
])
@pytest.mark.parametrize("ratio", [False, True], ids=["", "ratio"])
@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_a_shape_that_would_broadcast_is_refused(name, shapes, loss_type, ratio):
    """Also where B == T, at which (B,) and (T,) cannot be told apart by a later check."""
    for t in (T, B):
        x = problem(old_per_token_logps=near, ref_per_token_logps=near,
                    teacher_per_token_logps=near)
        x = {n: v[:, :t] if v.dim() > 1 and v.shape[:2] == (B, T) else v for n, v in x.items()}
        if ratio and name != "vllm_is_ratio":
            x["vllm_is_ratio"] = torch.ones(B, 1, dtype=torch.float64)
        for shape in shapes:
            shape = tuple(t if size == T else size for size in shape)
            if t == B and shape == (B,) and name in ("vllm_is_ratio", "advantages"):
                continue  # per sequence
            bad = torch.ones(shape, dtype=torch.float64)
            with pytest.raises((TypeError, ValueError), match="must have shape|one element") as e:
                LigerFusedLinearRLSDLoss(beta=0.1, loss_type=loss_type)(**{**x, name: bad})
            assert str(e.value).endswith(".") and "\n" not in str(e.value), (t, shape)
