"""Every objective against a naive loop in fp64, its invariances, and what it asks of the data."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from families import build
from runs import (
    TEMPLATE,
    assert_same,
    make_trainer,
    options,
    parameters,
    problems,
    quick,  # noqa: F401
    relative_distance,
    write_rows,
)

import rlsd.config
import rlsd.policy.update
import rlsd.trainer
from rlsd import TrainConfig, UserError
from rlsd.demo import save_model, tiny_model, word_tokenizer
from rlsd.objectives import OBJECTIVES
from rlsd.policy.hints import sibling_prompts
from rlsd.policy.models import Policy, head_of, open_forward
from rlsd.policy.packing import Layout
from rlsd.policy.update import (
    Batch,
    has_signal,
    require_contract,
    student_terms,
    teacher_inputs,
)
from rlsd.sampling.rollout import Rollout
from rlsd_kernels import RLSDLossConfig, aggregation_weights

PAD, EOS = 0, 1
ADVANTAGES = [1.2, -0.7, 0.0, 0.4, -1.5, 0.9]
TEACHER_PATH = {"teacher_model_name_or_path": "other"}


def config_of(objective, **changed):
    return TrainConfig(objective=objective, **(TEACHER_PATH if objective == "opd" else {}),
                       **changed)


def model(seed):
    made = tiny_model(64, seed=seed, hidden=32).double().eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p *= 3  # far enough from uniform that contexts matter
    open_forward(made)
    return made


def lists(lengths, seed):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 43, (n,), generator=rng).tolist() for n in lengths]


def make_batch(untaught=(), loss_type="dapo"):
    """Six sequences; those in `untaught` have no teacher prompt. Aggregation over all of them."""
    prompts, hints = lists([3, 9, 1, 4, 2, 6], 0), lists([3, 1, 4, 2, 5, 3], 3)
    completions = [c + [EOS] for c in lists([4, 0, 9, 2, 1, 5], 1)]
    width = max(map(len, completions))
    mask = torch.tensor([[t < len(c) for t in range(width)] for c in completions])
    return Batch(
        prompts=prompts, images=[None] * 6,
        teacher_prompts=[
            None if i in untaught else h + p
            for i, (h, p) in enumerate(zip(hints, prompts, strict=True))
        ],
        completion_ids=torch.tensor([c + [PAD] * (width - len(c)) for c in completions]),
        mask=mask, advantages=torch.tensor(ADVANTAGES, dtype=torch.float64),
        loss_weights=aggregation_weights(
            mask, loss_type, max_completion_length=width
        ).double(),
    )


def log_softmax_of(scorer, prompt, completion, temperature):
    ids = torch.tensor([prompt + completion])
    logits = scorer(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1)


def naive_divergence(log_q, log_p, config):
    """D(P_T, P_S) of each token, textbook form, from teacher log_q and student log_p."""
    p, q = log_p.exp(), log_q.exp()
    if config.distillation_divergence == "forward_kl":
        return (q * (log_q - log_p)).sum(-1)
    if config.distillation_divergence == "reverse_kl":
        return (p * (log_p - log_q)).sum(-1)
    a = config.distillation_alpha
    log_m = (a * q + (1 - a) * p).log()
    return (a * q * (log_q - log_m) + (1 - a) * p * (log_p - log_m)).sum(-1)


def naive_loss(student, teacher, batch, config):
    """Section 4 of the method, a sequence and a term at a time."""
    loss, name = 0.0, config.objective
    for i, prompt in enumerate(batch.prompts):
        y = batch.completion_ids[i][batch.mask[i]].tolist()
        weights = batch.loss_weights[i][batch.mask[i]]
        log_p = log_softmax_of(student, prompt, y, config.temperature)
        lp = log_p[torch.arange(len(y)), y]
        if name == "sft":
            loss = loss - (weights * lp).sum()
        if name in ("grpo", "rlsd", "rlcsd", "grpo+opsd"):  # a contrast comes before the loss
            multiplier = torch.ones_like(lp)
            if name == "rlsd" and batch.teacher_prompts[i] is not None:
                log_q = log_softmax_of(teacher, batch.teacher_prompts[i], y, config.temperature)
                delta = (log_q[torch.arange(len(y)), y] - lp).detach()
                w = torch.exp(batch.advantages[i].sign() * delta).clamp(0.8, 1.2)
                multiplier = 0.5 + 0.5 * w
            ratio = torch.exp(lp - lp.detach())
            loss = loss - (weights * ratio * multiplier * batch.advantages[i]).sum()
        if name in ("opsd", "opd", "sdpo", "grpo+opsd") and batch.teacher_prompts[i] is not None:
            with torch.no_grad():
                log_q = log_softmax_of(teacher, batch.teacher_prompts[i], y, config.temperature)
            coef = config.distillation_coef if name == "grpo+opsd" else 1.0
            loss = loss + coef * (weights * naive_divergence(log_q, log_p, config)).sum()
    return loss


def ours(student, teacher, batch, config, parts):
    """(loss, gradients, last terms) as the trainer forms them, summed over micro-batches."""
    student.zero_grad(set_to_none=True)
    policy = Policy(student, head_of(student), Layout(PAD))
    loss, lam = 0.0, 0.5 if config.objective == "rlsd" else 0.0
    loss_config = RLSDLossConfig(temperature=config.temperature)
    distilling = config.objective in ("opsd", "opd", "grpo+opsd", "sdpo")
    for rows in parts:
        part, given = batch.select(rows), {}
        if lam or distilling:
            given = teacher_inputs(
                policy._replace(model=teacher), part, loss_config, full_vocabulary=distilling
            )
        terms = student_terms(policy, part, given, lam, loss_config, config, check=True)
        require_contract(*terms.deviation, 1)
        terms.out.loss.backward()
        loss += terms.out.loss.item()
    return loss, {n: p.grad.clone() for n, p in student.named_parameters()}, terms


ALL_AT_ONCE = [[0, 1, 2, 3, 4, 5]]
CASES = [
    *[(name, {}) for name in OBJECTIVES],
    *[("opsd", {"distillation_divergence": d}) for d in ("forward_kl", "reverse_kl")],
    ("opsd", {"distillation_alpha": 0.1}), ("opd", {"temperature": 0.7}),
    ("sft", {"temperature": 0.7}), ("grpo+opsd", {"distillation_coef": 0.3}),
    ("grpo+opsd", {"distillation_divergence": "reverse_kl", "temperature": 1.3}),
    ("sdpo", {"distillation_divergence": "forward_kl"}),
]


def case_id(case):
    return "-".join([case[0], *(f"{v}" for v in case[1].values())])


@pytest.mark.parametrize("untaught", [(), (1, 4)], ids=["all-taught", "two-untaught"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_loss_and_gradient_equal_a_naive_loop(case, untaught):
    config, batch = config_of(case[0], **case[1]), make_batch(untaught)
    student, teacher = model(0), model(1)
    got = ours(student, teacher, batch, config, ALL_AT_ONCE)
    student.zero_grad(set_to_none=True)
    want = naive_loss(student, teacher, batch, config)
    want.backward()
    assert got[0] == pytest.approx(want.item(), abs=1e-12)
    for name, p in student.named_parameters():
        assert (got[1][name] - p.grad).norm() <= 1e-9 * p.grad.norm() and p.grad.norm() > 0, name
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_change_neither_loss_nor_gradient(name, loss_type):
    config, batch = config_of(name), make_batch((1,), loss_type)
    student, teacher = model(0), model(1)
    want = ours(student, teacher, batch, config, ALL_AT_ONCE)
    for parts in ([[5, 0], [1, 2, 4], [3]], [[i] for i in range(6)]):
        got = ours(student, teacher, batch, config, parts)
        assert got[0] == pytest.approx(want[0], abs=1e-12)
        for key, grad in want[1].items():
            assert (got[1][key] - grad).norm() <= 1e-9 * grad.norm(), key


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("family", ["phi", "gemma3-softcap", "granite"])  # bias, softcap, scale
def test_other_heads_equal_a_naive_loop(family, name):
    student, teacher, batch = build(family).double(), build(family).double(), make_batch((2,))
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.05 * torch.randn(p.shape, dtype=p.dtype))
    config = config_of(name)
    got = ours(student, teacher, batch, config, [[0, 1, 2, 3], [4, 5]])
    student.zero_grad(set_to_none=True)
    want = naive_loss(student, teacher, batch, config)
    want.backward()
    # Rotary positions and softmax of the models stay in fp32.
    assert got[0] == pytest.approx(want.item(), abs=1e-5)
    for key, p in student.named_parameters():
        assert (got[1][key] - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-7, key


@pytest.mark.parametrize("name", ["opsd", "sft"])
def test_log_probs_and_entropy_are_the_students(name):
    student, batch = model(0), make_batch()
    _, _, terms = ours(student, model(1), batch, config_of(name), ALL_AT_ONCE)
    entropies = []
    for i, prompt in enumerate(batch.prompts):
        y = batch.completion_ids[i][batch.mask[i]].tolist()
        log_p = log_softmax_of(student, prompt, y, 1.0).detach()
        entropies += (-(log_p.exp() * log_p).sum(-1)).tolist()
        got = terms.out.log_probs[i][batch.mask[i]]
        assert got.tolist() == pytest.approx(log_p[torch.arange(len(y)), y].tolist(), abs=1e-9)
    assert not terms.out.log_probs.requires_grad
    want = sum(entropies) / len(entropies)  # over all tokens, not only where A != 0
    assert terms.out.stats["entropy"].item() == pytest.approx(want, abs=1e-9)


def test_validation_covers_the_distillation_losses(monkeypatch):
    real = rlsd.objectives.linear_distillation_loss

    def wrong(*args, impl, **kwargs):
        return real(*args, impl=impl, **kwargs) * (1.0 if impl == "ref" else 1.001)

    monkeypatch.setattr(rlsd.objectives, "linear_distillation_loss", wrong)
    with pytest.raises(UserError, match="deviates from the reference"):
        ours(model(0), model(1), make_batch(), config_of("opsd"), ALL_AT_ONCE)


# Which sequences have a gradient


@pytest.mark.parametrize("name, want", [
    ("rlsd", [True, False, True, False]), ("grpo", [True, False, True, False]),
    ("opsd", [True, True, False, False]), ("opd", [True, True, False, False]),
    ("sdpo", [True, True, False, False]), ("grpo+opsd", [True, True, True, False]),
    ("sft", [True] * 4),
])
def test_sequences_with_a_gradient(name, want):
    advantages = torch.tensor([0.5, 0.0, -1.0, 0.0])
    assert has_signal([[3], [4], None, None], advantages, config_of(name)).tolist() == want


def test_sequences_with_a_gradient_beside_extra_terms():
    advantages, prompts = torch.tensor([0.5, 0.0]), [[3], [4]]
    for changed in ({"beta": 0.1}, {"entropy_coef": 0.1}):
        assert has_signal(prompts, advantages, config_of("grpo", **changed)).all()
    plain = config_of("grpo+opsd", distillation_coef=0)
    assert has_signal(prompts, advantages, plain).tolist() == [True, False]


# sdpo


def rollout_of(rewards, texts=None):
    count = len(rewards)
    rows = [{"prompt": f"<q> {i // 4} <a>", "prompt_ids": [3]} for i in range(count)]
    return Rollout(
        rows, None, None, texts or [f"# {i % 10}" for i in range(count)], None,
        torch.tensor(rewards, dtype=torch.float64), None,
    )


def siblings(rollout, step=1, **changed):
    """For each completion the text after "<h>" in its privileged prompt, or None."""
    tokenizer = word_tokenizer(["#", "<q>", "<a>", "<h>", *map(str, range(10))])
    config = TrainConfig(
        objective="sdpo", num_generations=4, generation_batch_size=8,
        privileged_template=TEMPLATE, **changed,
    )
    found = []
    for i, ids in enumerate(sibling_prompts(rollout, step, tokenizer, config)):
        if ids is None:
            found.append(None)
            continue
        _, hint, digit, *question = tokenizer.decode(ids).split()
        assert question == ["<q>", str(i // 4), "<a>"] and hint == "#"
        found.append(int(digit))
    return found


def test_a_siblings_prompt_has_the_template_options_of_its_row():
    tokenizer = word_tokenizer(["#", "<q>", "<h>", *map(str, range(10))])
    tokenizer.chat_template = "{{ messages[0].content }}{{ ending }}"
    rollout = rollout_of([1] * 8)
    for i, row in enumerate(rollout.rows):
        row |= {"prompt": [{"role": "user", "content": "<q>"}],
                "_template_options": {"ending": f" {i}"}}
    config = TrainConfig(
        objective="sdpo", num_generations=4, generation_batch_size=8, privileged_template=TEMPLATE
    )
    prompts = [tokenizer.decode(ids) for ids in sibling_prompts(rollout, 1, tokenizer, config)]
    assert [text.split()[-2:] for text in prompts] == [["<q>", str(i)] for i in range(8)]


def test_sdpo_takes_a_successful_sibling_of_the_same_group_and_never_itself():
    rollout = rollout_of([1, 0, 1, 0.5, 0, 1, 0, 0])
    seen = [siblings(rollout, step) for step in range(1, 40)]
    for row in seen:
        assert row[0] == 2 and row[2] == 0  # the only other success
        assert row[1] in (0, 2) and row[3] in (0, 2)
        assert row[4:] == [5, None, 5, 5]  # the only success has no sibling
    assert {row[1] for row in seen} == {0, 2}
    assert siblings(rollout, 7) == seen[6]  # a function of seed and step
    assert [siblings(rollout, s, seed=1) for s in range(1, 40)] != seen


def test_sdpo_without_success_has_no_hint():
    assert siblings(rollout_of([0.9] * 8)) == [None] * 8
    assert None not in siblings(rollout_of([0.9] * 8), success_reward_threshold=0.9)
    assert siblings(rollout_of([1, 1, 0, 0] * 2, texts=[" "] * 8)) == [None] * 8
    over_long = siblings(rollout_of([1] * 8), max_teacher_prompt_length=5)
    assert over_long == [None] * 8
    assert None not in siblings(rollout_of([1] * 8), max_teacher_prompt_length=6)


def test_sdpo_passes_over_a_sibling_that_would_end_its_turn():
    texts = ["# 0", "# 1 <eos> # 7", "# 2", "# 3"] * 2
    for step in range(1, 20):
        assert siblings(rollout_of([1, 1, 0, 0] * 2, texts), step) == [None, 0, 0, 0] * 2


# Through the trainer


def save_teacher(folder, words=None, hidden=32):
    from runs import WORDS

    tokenizer = word_tokenizer(words or WORDS)
    return save_model(tiny_model(len(tokenizer), seed=9, hidden=hidden), tokenizer, folder)


def of_objective(name, folder):
    changed = {"objective": name}
    if name == "opd":
        changed["teacher_model_name_or_path"] = save_teacher(folder / "teacher")
    if name in ("sdpo", "rlcsd"):
        changed["success_reward_threshold"] = 0.75
    return changed


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_of_every_objective_does_not_depend_on_micro_batches(name, tmp_path):
    results = []
    for size in (3, 64):
        trainer = make_trainer(
            tmp_path, per_device_train_batch_size=size, validate_every=1,
            **of_objective(name, tmp_path),
        )
        start = parameters(trainer.model)
        metrics = [trainer.train_step(step)[0] for step in (1, 2)]
        results.append((parameters(trainer.model), metrics))
    assert relative_distance(results[0][0], results[1][0], start) < 1e-3
    for got, want in zip(*(metrics for _, metrics in results), strict=True):
        for key in ("loss", "grad_norm", "entropy", "live_sequences"):
            assert got[key] == pytest.approx(want[key], rel=1e-3, abs=1e-6), key
        assert got["grad_norm"] > 0 and math.isfinite(got["entropy"])
        assert got["validate/dh"] < 1e-5
    if name not in ("rlsd", "rlcsd", "grpo", "sdpo"):
        assert results[0][1][0]["live_sequences"] == (4 if name == "sft" else 16)


@pytest.mark.parametrize("name", ["opsd", "grpo+opsd", "opd", "sft"])
@pytest.mark.parametrize("changed", [
    {"bf16": True}, {"use_peft": True, "lora_r": 4}, {"num_iterations": 2},
    {"padding_free": True, "max_tokens_per_micro_batch": 50}, {"mask_truncated_completions": True},
    {"teacher_model_kind": "live", "gradient_checkpointing": True},
], ids=["bf16", "lora", "iterations-2", "packed", "masked", "live-recomputed"])
def test_objectives_run_with_the_trainers_options(name, changed, tmp_path):
    trainer = make_trainer(tmp_path, **of_objective(name, tmp_path), **changed)
    before = parameters(trainer.model)
    metrics, _ = trainer.train_step(1)
    assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    assert any(not torch.equal(p, before[n]) for n, p in parameters(trainer.model).items())


def test_lambda_zero_is_grpo_to_the_bit(tmp_path):
    results = []
    for changed in ({"objective": "grpo"}, {"objective": "rlsd", "rlsd_lambda": 0.0},
                    {"objective": "grpo+opsd", "distillation_coef": 0.0}):
        trainer = make_trainer(tmp_path, **changed)
        for step in (1, 2):
            trainer.train_step(step)
        results.append(parameters(trainer.model))
    assert_same(results[1], results[0])
    for name, p in results[2].items():  # its loss adds 0 * D
        torch.testing.assert_close(p, results[0][name], atol=1e-6, rtol=1e-5, msg=name)


def test_sft_is_cross_entropy_on_the_reference_solutions(tmp_path):
    trainer = make_trainer(tmp_path, objective="sft", learning_rate=1e-2)
    copied = copy.deepcopy(trainer.model)
    start = parameters(copied)
    metrics, _ = trainer.train_step(1)
    optimizer = torch.optim.AdamW(copied.parameters(), lr=1e-2, weight_decay=0.0)
    rows = rlsd.trainer.rows_of_step(trainer.rows, 4, 1, 0)
    log_p, count = 0.0, 0
    for row in rows:
        prompt = trainer.tokenizer(row["prompt"])["input_ids"]
        y = trainer.tokenizer(row["solution"])["input_ids"] + [EOS]
        out = copied(
            input_ids=torch.tensor([prompt + y]),
            labels=torch.tensor([[-100] * len(prompt) + y]),
        )
        log_p, count = log_p + out.loss * len(y), count + len(y)
    loss = log_p / count
    loss.backward()
    torch.nn.utils.clip_grad_norm_(copied.parameters(), 1.0)
    optimizer.step()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["live_sequences"] == 4 and "leak_rate" not in metrics
    assert "reward" not in metrics and 0 <= metrics["reference_reward"] <= 1
    assert relative_distance(parameters(trainer.model), parameters(copied), start) < 1e-3


def test_sft_samples_nothing(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, objective="sft")
    monkeypatch.setattr(rlsd.trainer, "roll_out", pytest.fail)
    trainer.train_step(1)


@pytest.mark.parametrize("name", ["opd", "sdpo", "grpo+opsd"])
def test_resume_equals_an_uninterrupted_run(name, tmp_path):
    changed = of_objective(name, tmp_path) | {"max_steps": 4, "save_steps": 2}
    trainer = make_trainer(tmp_path, **changed)
    trainer.train()
    want = parameters(trainer.model)
    again = make_trainer(
        tmp_path, resume_from=tmp_path / "run" / "checkpoint-2", **changed
    )
    again.train()
    assert_same(parameters(again.model), want)


def test_an_external_teacher_sees_the_question_alone_and_never_moves(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **of_objective("opd", tmp_path))
    seen, real = [], rlsd.trainer.teacher_inputs

    def recorded(policy, part, *args, **kwargs):
        seen.append((policy.model, part))
        return real(policy, part, *args, **kwargs)

    monkeypatch.setattr(rlsd.trainer, "teacher_inputs", recorded)
    before = parameters(trainer.teacher.model)
    trainer.train_step(1)
    assert len(seen) == 1 and seen[0][0] is trainer.teacher.model is not trainer.model
    assert seen[0][1].teacher_prompts == seen[0][1].prompts
    assert_same(parameters(trainer.teacher.model), before)
    assert all(row["teacher_prompt_ids"] is None for row in trainer.rows)


def test_the_documented_way_to_add_an_objective(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.setitem(OBJECTIVES, "praised", None)  # the text adds this row; removed afterwards
    scope = vars(rlsd.objectives).copy()
    exec(source, scope)
    monkeypatch.setitem(rlsd.config._CHOICES, "objective", tuple(OBJECTIVES))
    trainer = make_trainer(tmp_path, objective="praised")
    made = []
    real = rlsd.trainer.student_terms

    def recorded(policy, batch, *args, **kwargs):
        made.append((batch, real(policy, batch, *args, **kwargs)))
        return made[-1][1]

    monkeypatch.setattr(rlsd.trainer, "student_terms", recorded)
    assert trainer.teacher is None and trainer.train_step(1)[0]["grad_norm"] > 0
    (batch, terms), = made
    praised = batch.advantages.clamp(min=0)[:, None] * batch.loss_weights
    assert terms.out.loss.item() == pytest.approx(-praised.sum().item(), rel=1e-5)


# What an objective asks for, told before the first rollout


def refusal(folder, **changed):
    with pytest.raises(UserError) as error:
        make_trainer(folder, **changed)
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message and ". " not in message, message
    return message


@pytest.mark.parametrize("changed, words", [
    ({"objective": "opd"}, "opd needs an external teacher"),
    ({"objective": "opsd", "teacher_model_name_or_path": "x"}, "opsd has no external teacher"),
    ({"objective": "opsd", "beta": 0.1}, "objective opsd does not have"),
    ({"objective": "sft", "entropy_coef": 0.1}, "objective sft does not have"),
    ({"shuffle_privileged_context": True, "answer_only_privileged_context": True}, "not both"),
], ids=["opd-no-teacher", "teacher-unused", "beta", "entropy", "two-controls"])
def test_options_that_do_not_fit_an_objective(changed, words, tmp_path):
    assert words in refusal(tmp_path, **changed)


@pytest.mark.parametrize("name, words", [
    ("sft", "has no reference solution, which objective sft trains on"),
    ("opsd", "has no privileged context"), ("grpo+opsd", "has no privileged context"),
])
def test_rows_without_a_reference_are_named(name, words, tmp_path):
    rows = problems(12)
    rows[3]["privileged_context"] = " "
    write_rows(tmp_path / "train.jsonl", rows)
    message = refusal(tmp_path, objective=name)
    assert words in message and f"line 4 of {tmp_path / 'train.jsonl'}" in message


def test_rows_without_a_reference_do_for_objectives_that_read_none(tmp_path):
    write_rows(tmp_path / "train.jsonl", [r | {"privileged_context": ""} for r in problems(12)])
    for name in ("grpo", "sdpo", "opd"):
        trainer = make_trainer(tmp_path, **of_objective(name, tmp_path))
        assert all(row["teacher_prompt_ids"] is None for row in trainer.rows)


def test_references_longer_than_a_completion_are_dropped_and_counted(tmp_path):
    options(tmp_path)  # writes the data: solutions of 2 to 6 tokens
    trainer = make_trainer(tmp_path, objective="sft", max_completion_length=5)
    assert trainer.rows and all(len(row["_reference_ids"]) <= 5 for row in trainer.rows)
    assert all(row["_reference_ids"][-1] == EOS for row in trainer.rows)
    assert len(trainer.rows) < 8


@pytest.mark.parametrize("words, hidden, said", [
    (["#", "other"], 32, "has another vocabulary than the student"),
    (None, 32, None),
], ids=["other-words", "same"])
def test_the_external_teacher_must_share_the_vocabulary(words, hidden, said, tmp_path):
    path = save_teacher(tmp_path / "teacher", words, hidden)
    changed = {"objective": "opd", "teacher_model_name_or_path": path}
    if said is None:
        assert make_trainer(tmp_path, **changed).teacher.model is not None
    else:
        message = refusal(tmp_path, **changed)
        assert said in message and path in message and "first difference at id 4" in message


def test_the_external_teacher_must_have_as_many_rows(tmp_path):
    from runs import WORDS

    tokenizer = word_tokenizer(WORDS)
    path = save_model(tiny_model(100, seed=1, hidden=16), tokenizer, tmp_path / "teacher")
    message = refusal(tmp_path, objective="opd", teacher_model_name_or_path=path)
    assert "128 rows" in message and "the student 64" in message


def test_the_external_teacher_must_hold_the_rows(tmp_path):
    from runs import WORDS

    path = save_model(tiny_model(64, seed=1, positions=12), word_tokenizer(WORDS), tmp_path / "t")
    message = refusal(tmp_path, objective="opd", teacher_model_name_or_path=path)
    assert "exceeds the 12 positions of Qwen3ForCausalLM" in message


def test_a_missing_external_teacher_is_one_sentence(tmp_path):
    assert "nowhere" in refusal(
        tmp_path, objective="opd", teacher_model_name_or_path=str(tmp_path / "nowhere")
    )


# Controls


def test_answer_only_hints_are_the_solutions(tmp_path):
    rows = [
        {"prompt": r["prompt"], "solution": r["solution"].split()[-1],
         "privileged_context": r["solution"], "teacher_prompt": "<h> 1 <q> 2 <a>"}
        for r in problems(12)
    ]
    write_rows(tmp_path / "train.jsonl", rows)
    trainer = make_trainer(tmp_path, answer_only_privileged_context=True)
    for row, source in zip(trainer.rows, rows, strict=False):
        want = f"<h> {source['solution']} {source['prompt']}"
        assert trainer.tokenizer.decode(row["teacher_prompt_ids"]) == want
