import copy
import math

import pytest
import torch
import transformers

import rlsd.objectives
from rlsd.config import DEFAULT_PRIVILEGED_TEMPLATE
from rlsd.demo import tiny_model, word_tokenizer
from rlsd.policy.models import Policy, head_of, open_forward
from rlsd.policy.packing import Layout, completion_hidden
from rlsd.policy.update import (
    ROUNDINGS,
    Batch,
    Stopped,
    batch_inputs,
    deviation_from_ref,
    importance_ratio,
    require_contract,
    sampling_metrics,
    teacher_hidden,
    teacher_inputs,
)
from rlsd.tasks.prompts import encode_pair
from rlsd_kernels import (
    RLSDLossConfig,
    aggregation_weights,
    fused_linear_rlsd_loss,
    merge_stats,
    rlsd_advantages,
    rlsd_loss,
)

PAD, EOS = 0, 1
PROMPTS = [3, 5, 1, 4, 2, 6, 3, 2]
COMPLETIONS = [4, 1, 6, 3, 2, 5, 1, 3]  # EOS included
ADVANTAGES = [1.2, -0.7, 0.0, 0.4, -1.5, 0.9, 0.0, -0.3]  # rows 2 and 6 are dead
LIVE = [0, 1, 3, 4, 5, 7]
CONFIG = RLSDLossConfig()


def loss_inputs(student, head, teacher, batch, pad_id, lam, config):
    """All arguments of the fused loss, as the trainer joins them."""
    layout = Layout(pad_id)
    inputs = teacher_inputs(Policy(teacher, head, layout), batch, config) if lam > 0 else {}
    layer = student.get_output_embeddings()
    hidden = completion_hidden(student, batch.prompts, batch.completion_ids, batch.mask, layout)
    return inputs | batch_inputs(head, batch, lam, config) | {
        "hidden": hidden, "weight": layer.weight, "bias": layer.bias,
    }


def model(seed=0):
    made = tiny_model(64, seed=seed, hidden=32)
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p *= 3  # far enough from uniform that contexts matter
    open_forward(made)
    return made.train()


def tokens(lengths, seed, end=()):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (n - len(end),), generator=rng).tolist() + [*end] for n in lengths]


def make_batch(loss_type="dapo", **extra):
    """Eight sequences of many lengths; teachers only where A != 0."""
    prompts, completions = tokens(PROMPTS, 1), tokens(COMPLETIONS, 2, end=[EOS])
    hints = tokens([3] * 8, 3)
    width = max(COMPLETIONS)
    ids = torch.tensor([c + [PAD] * (width - len(c)) for c in completions])
    mask = torch.tensor([[t < n for t in range(width)] for n in COMPLETIONS])
    return Batch(
        prompts=prompts,
        teacher_prompts=[
            h + p if a else None for h, p, a in zip(hints, prompts, ADVANTAGES, strict=True)
        ],
        images=[None] * 8, completion_ids=ids, mask=mask, advantages=torch.tensor(ADVANTAGES),
        loss_weights=aggregation_weights(mask, loss_type, max_completion_length=width), **extra,
    )


def off_policy(batch, *, teacher=False):
    """The same batch with old, reference and, if asked for, teacher log-probs of each token."""
    rng = torch.Generator().manual_seed(5)

    def noise(mean):
        return mean + 0.5 * torch.randn(batch.mask.shape, generator=rng)

    return batch._replace(
        old_log_probs=noise(-4.0), ref_log_probs=noise(-4.0),
        teacher_log_probs=noise(-4.0) if teacher else None,
    )


def step(student, teacher, batch, parts, *, lam=0.5, config=CONFIG):
    """(loss, {parameter: gradient}, stats) summed over micro-batches of row indices."""
    student.zero_grad(set_to_none=True)
    head, loss, stats = head_of(student), 0.0, []
    for rows in parts:
        inputs = loss_inputs(student, head, teacher, batch.select(rows), PAD, lam, config)
        out = fused_linear_rlsd_loss(impl="torch", **inputs)
        out.loss.backward()
        loss += out.loss.item()
        stats.append(out.stats)
    return loss, {n: p.grad.clone() for n, p in student.named_parameters()}, merge_stats(stats)


def assert_same(got, want, *, stats=True):
    assert got[0] == pytest.approx(want[0], abs=1e-6)
    assert got[1].keys() == want[1].keys()
    for name, grad in want[1].items():
        assert grad.norm() > 0, name
        assert (got[1][name] - grad).norm() <= 2e-5 * grad.norm(), name
    if stats:
        for name, value in want[2].items():
            assert got[2][name].item() == pytest.approx(value.item(), abs=1e-5, nan_ok=True), name


def run(batch, lam=0.5, config=CONFIG, impl="torch", teacher=None, student=None):
    student = student or model()
    inputs = loss_inputs(student, head_of(student), teacher or model(1), batch, PAD, lam, config)
    return fused_linear_rlsd_loss(impl=impl, **inputs)


def splits(size, count=8):
    return [list(range(i, min(i + size, count))) for i in range(0, count, size)]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_split_into_micro_batches_changes_neither_loss_nor_gradient(loss_type, size):
    student, teacher, batch = model(), model(1), make_batch(loss_type)
    want = step(student, teacher, batch, splits(8))
    assert_same(step(student, teacher, batch, splits(size)), want)


@pytest.mark.parametrize("scored", [False, True], ids=["teacher-forward", "teacher-log-probs"])
def test_split_is_exact_off_policy_with_a_reference(scored):
    config = RLSDLossConfig(beta=0.1, entropy_coef=0.02, rlsd_delta_source="old_log_probs")
    student, teacher, batch = model(), model(1), off_policy(make_batch(), teacher=scored)
    want = step(student, teacher, batch, splits(8), config=config)
    assert_same(step(student, teacher, batch, splits(3), config=config), want)


def test_order_of_the_rows_changes_nothing():
    student, teacher, batch = model(), model(1), make_batch()
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    assert_same(
        step(student, teacher, batch, [order]), step(student, teacher, batch, splits(8))
    )


def test_dropping_dead_rows_changes_neither_loss_nor_gradient():
    student, teacher, batch = model(), model(1), make_batch()
    want = step(student, teacher, batch, splits(8))
    # Stats per unmasked token do see the dead rows, so the trainer measures those itself.
    assert_same(step(student, teacher, batch, [LIVE]), want, stats=False)
    assert_same(step(student, teacher, batch, [LIVE[:2], LIVE[2:]]), want, stats=False)


@pytest.mark.parametrize("fill", [PAD, 17])
def test_padding_to_another_width_changes_nothing(fill):
    student, teacher, batch = model(), model(1), off_policy(make_batch(), teacher=False)
    config = RLSDLossConfig(beta=0.1)

    def widen(x, value):
        return torch.nn.functional.pad(x, (0, 4), value=value)

    wide = batch._replace(
        completion_ids=widen(batch.completion_ids, fill), mask=widen(batch.mask, False),
        loss_weights=widen(batch.loss_weights, 0.0),
        old_log_probs=widen(batch.old_log_probs, -math.inf),
        ref_log_probs=widen(batch.ref_log_probs, math.nan),
    )
    results = []
    for each in (batch, wide):
        student.zero_grad(set_to_none=True)
        # No select: it would cut the padding off again.
        inputs = loss_inputs(student, head_of(student), teacher, each, PAD, 0.5, config)
        out = fused_linear_rlsd_loss(impl="torch", **inputs)
        out.loss.backward()
        grads = {n: p.grad.clone() for n, p in student.named_parameters()}
        results.append((out.loss.item(), grads, out.stats))
    assert_same(results[1], results[0])


def test_select_cuts_to_the_longest_completion_and_keeps_rows_together():
    batch = off_policy(make_batch(), teacher=True)
    part = batch.select([3, 1])
    assert part.prompts == [batch.prompts[3], batch.prompts[1]]
    assert part.teacher_prompts == [batch.teacher_prompts[3], batch.teacher_prompts[1]]
    assert part.advantages.tolist() == [pytest.approx(0.4), pytest.approx(-0.7)]
    for name in ("completion_ids", "mask", "loss_weights", "old_log_probs", "ref_log_probs",
                 "teacher_log_probs"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[[3, 1], :3]), name
    assert part.mask.tolist() == [[True] * 3, [True, False, False]]
    assert make_batch().select([0]).old_log_probs is None


def rendered_batch(hint):
    """Prompts that went through the default template."""
    tokenizer = word_tokenizer([f"w{i}" for i in range(50)] + ["Reference", "solution:"])
    pairs = [
        encode_pair(
            {"prompt": " ".join(f"w{i}" for i in p[:5]), "privileged_context": hint}, tokenizer,
            DEFAULT_PRIVILEGED_TEMPLATE,
        )
        for p in tokens(PROMPTS, 1)
    ]
    return make_batch()._replace(
        prompts=[s for s, _ in pairs], teacher_prompts=[t for _, t in pairs]
    )


def multipliers(out, batch, eps_w=1.0):
    a = batch.advantages[:, None].expand(batch.mask.shape)
    live = batch.mask & (a != 0)
    a_hat = rlsd_advantages(
        a, out.log_probs, out.teacher_log_probs, rlsd_lambda=1.0, rlsd_reweight_clip_range=eps_w
    )
    return (a_hat / a)[live]


def test_without_a_hint_and_with_equal_weights_delta_is_zero():
    batch, student = rendered_batch(""), model()
    out = run(batch, lam=1.0, teacher=student, student=student)
    assert (out.teacher_log_probs - out.log_probs)[batch.mask].abs().max() < 1e-6
    assert (multipliers(out, batch) - 1).abs().max() < 1e-6
    # With a hint the same weights do disagree, so the above is not empty.
    hinted = rendered_batch("w3 w1 w4")
    out = run(hinted, lam=1.0, teacher=student, student=student)
    assert (multipliers(out, hinted) - 1).abs().max() > 0.05


def test_without_a_hint_and_with_equal_weights_rlsd_is_grpo():
    student, batch = model(), rendered_batch("")
    want = step(student, None, batch, splits(8), lam=0.0)
    assert_same(step(student, student, batch, splits(8), lam=1.0), want, stats=False)


def test_teacher_scores_the_same_tokens_after_the_privileged_prompt():
    batch, teacher = make_batch(), model(1)
    out = run(batch, teacher=teacher)
    for i, n in enumerate(COMPLETIONS):
        if batch.teacher_prompts[i] is None:
            continue
        prompt, completion = batch.teacher_prompts[i], batch.completion_ids[i, :n].tolist()
        assert completion[-1] == EOS
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor([prompt + completion])).logits[0]
        log_probs = torch.log_softmax(logits.double(), -1)[len(prompt) - 1 : -1]
        want = log_probs[torch.arange(n), torch.tensor(completion)]
        assert out.teacher_log_probs[i, :n].tolist() == pytest.approx(want.tolist(), abs=2e-5)


def test_rows_without_a_privileged_prompt_keep_plain_advantages():
    batch = make_batch()
    plain = batch._replace(teacher_prompts=[None, *batch.teacher_prompts[1:4], *[None] * 4])
    # Rows 0, 5 and 7 are live but not scored: they must count as in GRPO.
    got = run(plain.select([0, 5, 7, 3]), lam=1.0).loss
    grpo = run(plain.select([0, 5, 7]), lam=0.0).loss + run(plain.select([3]), lam=1.0).loss
    assert got.item() == pytest.approx(grpo.item(), abs=1e-6)
    assert got.item() != pytest.approx(run(plain.select([0, 5, 7, 3]), lam=0.0).loss.item())


@pytest.fixture
def counted(monkeypatch):
    """A teacher and the batch sizes of its forward passes."""
    teacher, sizes = model(1), []
    forward = teacher.base_model.forward

    def counting(input_ids, **arguments):
        sizes.append(len(input_ids))
        assert not teacher.training
        return forward(input_ids=input_ids, **arguments)

    monkeypatch.setattr(teacher.base_model, "forward", counting)
    return teacher, sizes


@pytest.mark.parametrize("case, want", [
    ("lambda-0", []), ("no-row-needs-it", []), ("scored-before", []), ("six-rows-need-it", [6]),
])
def test_teacher_runs_only_where_it_is_needed(counted, case, want):
    teacher, sizes = counted
    batch = make_batch()
    if case == "no-row-needs-it":
        batch = batch._replace(teacher_prompts=[None] * 8)
    if case == "scored-before":
        batch = off_policy(batch, teacher=True)
    out = run(batch, lam=0.0 if case == "lambda-0" else 0.5, teacher=teacher)
    assert sizes == want and torch.isfinite(out.loss)
    assert teacher.training  # as it was


def test_lambda_zero_needs_no_teacher_at_all():
    student = model()
    inputs = loss_inputs(student, head_of(student), None, make_batch(), PAD, 0.0, CONFIG)
    assert not {"teacher_hidden", "teacher_weight", "teacher_log_probs"} & inputs.keys()


def test_no_gradient_reaches_the_teacher():
    teacher, batch = model(1), make_batch()
    hidden = teacher_hidden(teacher, batch, Layout(PAD))
    assert not hidden.requires_grad and hidden.shape == (8, 6, 32)
    assert (hidden[[2, 6]] == 0).all() and (hidden[LIVE].abs().sum((1, 2)) > 0).all()
    run(batch, teacher=teacher).loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_deviation_is_within_the_contract_and_leaves_the_graph():
    student, batch = model(), off_policy(make_batch())
    config = RLSDLossConfig(beta=0.1, entropy_coef=0.01)
    inputs = loss_inputs(student, head_of(student), model(1), batch, PAD, 0.5, config)
    errors, limits = deviation_from_ref(inputs, "torch")
    assert errors.keys() == {"loss", "log_probs", "dh", "dw"}
    assert all(0 <= e <= 1e-5 for e in errors.values()) and max(errors.values()) > 0
    require_contract(errors, limits, 1)
    assert all(p.grad is None for p in student.parameters())
    fused_linear_rlsd_loss(impl="torch", **inputs).loss.backward()
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("what, change", [
    ("dh", lambda out: out._replace(loss=out.loss * 1.001 - out.loss.detach() * 0.001)),
    ("loss", lambda out: out._replace(loss=out.loss + 1e-3)),
    ("log_probs", lambda out: out._replace(log_probs=out.log_probs + 1e-3)),
    ("loss", lambda out: out._replace(loss=out.loss * math.nan)),
], ids=["gradient", "loss", "log-probs", "nan"])
def test_a_wrong_implementation_is_caught(monkeypatch, what, change):
    def wrong(impl, **inputs):
        out = fused_linear_rlsd_loss(impl=impl, **inputs)
        return out if impl == "ref" else change(out)

    student = model()
    inputs = loss_inputs(student, head_of(student), model(1), make_batch(), PAD, 0.5, CONFIG)
    monkeypatch.setattr(rlsd.objectives, "fused_linear_rlsd_loss", wrong)
    errors, limits = deviation_from_ref(inputs, "torch")
    with pytest.raises(Stopped) as error:
        require_contract(errors, limits, 7)
    message = str(error.value)
    assert message.startswith("Step 7: ") and f" {what} " in f" {message} ", message
    assert not errors[what] < 1e-4


@pytest.mark.parametrize("name", ["loss", "log_probs", "dh", "dw"])
def test_each_output_has_a_limit_of_its_own(name):
    fine, limits = dict.fromkeys(("loss", "log_probs", "dh", "dw"), 0.0), {
        "loss": 2e-5, "log_probs": 1e-5, "dh": 3e-5, "dw": 4e-5,
    }
    require_contract(fine | {name: limits[name]}, limits, 3)
    for bad in (1.01 * limits[name], math.nan, math.inf):
        with pytest.raises(Stopped) as error:
            require_contract(fine | {name: bad}, limits, 3)
        message = str(error.value)
        for part in ("Step 3", name, f"{bad:.3g}", f"{limits[name]:.3g}"):
            assert part in message
        assert message.endswith(".") and "\n" not in message


def plain_pytorch(dtype):
    """The loss by full logits in this dtype, on the hidden states as they are."""
    def objective(inputs, impl, options=None):
        if inputs["hidden"].dtype == torch.float64:  # the reference
            return rlsd.objectives.policy_gradient(inputs, impl, options)
        logits = (inputs["hidden"] @ inputs["weight"].T).to(dtype).float()
        log_probs = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][:, None])[:, 0]
        return rlsd_loss(
            log_probs, inputs["advantages"], teacher_log_probs=None, rlsd_lambda=0.0,
            loss_weights=inputs["loss_weights"], old_log_probs=inputs["old_log_probs"],
        )._replace(log_probs=log_probs.detach())

    return objective


def head_problem(largest, *, certain=0.0, dtype=torch.float32, rows=64, hidden=96, vocab=2003):
    """GRPO's arguments whose largest logit is given; certain > 0: every token has p near 1."""
    rng = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, hidden, generator=rng, dtype=torch.float64) for n in (rows, vocab))
    w *= largest / (h @ w.T).abs().max()
    top = (h @ w.T).argmax(-1)
    h += certain * w[top] / w[top].square().sum(-1, keepdim=True)
    logits = h @ w.T
    ids = torch.multinomial(logits.softmax(-1), 1, generator=rng)[:, 0]
    log_probs = logits.log_softmax(-1)[range(rows), ids]
    noise, advantages = torch.randn(2, rows, generator=rng, dtype=torch.float64)
    return {
        "hidden": h.to(dtype), "weight": w.to(dtype), "completion_ids": ids,
        "advantages": advantages, "loss_weights": torch.full_like(noise, 1 / rows),
        "old_log_probs": log_probs + 0.1 * noise, "rlsd_lambda": 0.0,
    }


@pytest.mark.parametrize("case", [
    {"largest": 5}, {"largest": 46}, {"largest": 100}, {"largest": 20, "certain": 15},
], ids=["small", "smollm2", "huge", "certain"])
def test_the_contract_grows_with_the_logits(case):
    inputs = head_problem(**case)
    for objective, impl in (
        (plain_pytorch(torch.float32), "torch"), (rlsd.objectives.policy_gradient, "torch"),
    ):
        errors, limits = deviation_from_ref(inputs, impl, objective)
        for name, error in errors.items():  # with a margin of two
            assert 0 < error <= limits[name] / 2, (name, error, limits[name])
    assert limits["log_probs"] >= 1e-5
    if "certain" not in case:
        rounded, limits = deviation_from_ref(inputs, "torch", plain_pytorch(torch.bfloat16))
        assert rounded["log_probs"] > 100 * limits["log_probs"]
        assert rounded["dh"] > 5 * limits["dh"] and rounded["dw"] > 5 * limits["dw"]


def test_the_contract_is_a_number_of_roundings_of_the_largest_logit():
    eps = 2.0**-23
    for largest, want in ((5, 1e-5), (46, ROUNDINGS * eps * 46), (100, ROUNDINGS * eps * 100)):
        _, limits = deviation_from_ref(head_problem(largest), "torch")
        assert limits["log_probs"] == pytest.approx(want, rel=1e-5)
    # Masked rows do not count, the teacher's context, scale and temperature do.
    inputs = head_problem(46)
    masked = inputs["hidden"].clone()
    masked[3] *= 100
    weights = inputs["loss_weights"].clone()
    weights[3] = 0
    def limit(changed):
        return deviation_from_ref(inputs | changed, "torch")[1]["log_probs"] / (ROUNDINGS * eps)

    assert limit({"hidden": masked, "loss_weights": weights}) <= 46.1
    assert limit({"teacher_hidden": 2 * inputs["hidden"], "rlsd_lambda": 0.5}) == (
        pytest.approx(92, rel=1e-5)
    )
    assert limit({"logit_scale": 0.5, "config": RLSDLossConfig(temperature=0.25)}) == (
        pytest.approx(92, rel=1e-5)
    )


def test_rewards_of_any_size_are_held_to_the_same_contract():
    inputs = head_problem(46)
    _, limits = deviation_from_ref(inputs, "torch")
    large = inputs | {"advantages": 1000 * inputs["advantages"]}
    errors, scaled = deviation_from_ref(large, "torch")
    require_contract(errors, scaled, 1)
    mean = inputs["advantages"].abs().clamp(min=1e-3).mean().item()
    assert scaled["loss"] == pytest.approx(1000 * mean * limits["log_probs"], rel=1e-3)
    assert scaled["log_probs"] == limits["log_probs"]


def test_a_biased_head_scores_the_teacher_with_its_own_bias():
    config = transformers.PhiConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64,
    )
    torch.manual_seed(0)
    student = transformers.PhiForCausalLM(config).eval()
    open_forward(student)
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        student.lm_head.bias.copy_(torch.linspace(-2, 2, 64))
    batch = make_batch()
    inputs = loss_inputs(student, head_of(student), teacher, batch, PAD, 0.5, CONFIG)
    got = fused_linear_rlsd_loss(impl="torch", **inputs).teacher_log_probs
    for i, prompt in enumerate(batch.teacher_prompts):
        if prompt is None:
            continue
        y = batch.completion_ids[i][batch.mask[i]]
        logits = teacher(input_ids=torch.tensor([prompt + y.tolist()])).logits[0]
        want = logits[len(prompt) - 1 : -1].log_softmax(-1)[torch.arange(len(y)), y]
        torch.testing.assert_close(got[i][batch.mask[i]], want.detach(), atol=1e-4, rtol=0)


def test_importance_ratio_is_truncated_above_and_has_no_gradient():
    nan = float("nan")
    log_probs = torch.tensor([-1.0, -1.0, -1.0, -90.0, -2.0], requires_grad=True)
    drawn = torch.tensor([-1.5, -9.0, -0.5, -1.0, nan])
    got = importance_ratio(log_probs, drawn, 2.0)
    assert got.tolist() == pytest.approx([math.exp(0.5), 2.0, math.exp(-0.5), 0.0, 1.0])
    assert not got.requires_grad


def test_sampling_metrics_are_over_known_unmasked_tokens():
    nan = float("nan")
    made = Batch(
        prompts=[], teacher_prompts=[], images=[], advantages=None, loss_weights=None,
        completion_ids=None, mask=torch.tensor([[True, True, True], [True, False, False]]),
        sampling_log_probs=torch.tensor([[-1.0, -2.0, nan], [-4.0, 0.0, 0.0]]),
    )
    log_probs = torch.tensor([[-1.5, -1.0, -7.0], [-4.25, 55.0, -55.0]])
    want = {
        "sampling/sampling_logp_difference/mean": (0.5 + 1.0 + 0.25) / 3,
        "sampling/sampling_logp_difference/max": 1.0,
    }
    assert sampling_metrics(made, log_probs, None) == pytest.approx(want)
    ratios = [math.exp(-0.5), 2.0, 1.0, math.exp(-0.25)]  # exp(1) is cut; no log-prob, no weight
    assert sampling_metrics(made, log_probs, 2.0) == pytest.approx(want | {
        "sampling/importance_sampling_ratio/min": min(ratios),
        "sampling/importance_sampling_ratio/mean": sum(ratios) / 4,
        "sampling/importance_sampling_ratio/max": 2.0,
    })
    assert sampling_metrics(made._replace(sampling_log_probs=None), log_probs, None) == {}
