"""Runs with contrast hints: against a naive loop, with every option, resumed, and refused."""

import copy
import math

import pytest
import torch
from runs import (
    assert_same,
    make_trainer,
    naive_log_probs,
    parameters,
    problems,
    quick,  # noqa: F401
    recorded,
    relative_distance,
    without_times,
    write_rows,
)

import rlsd.trainer
from rlsd import TrainConfig, UserError, group_advantages
from rlsd.policy.hints import group_hints
from rlsd.sampling.rollout import Rollout

RUN = {"hint_source": "rollout", "success_reward_threshold": 0.5}
ARMS = {
    "rlsd-rollout": {"rlsd_contrast_hints": 2}, "rlsd-data": {"rlsd_contrast_hints": 2,
                                                              "hint_source": "data"},
    "rlcsd": {"objective": "rlcsd"}, "rlcsd-data": {"objective": "rlcsd", "hint_source": "data"},
    "one-sided": {},
}


def run_of(folder, arm, **changed):
    return make_trainer(folder, **{**RUN, **ARMS[arm], **changed})


def naive_train(trainer, start, rollouts):
    """The trainer's own rollouts through a loop of sequences; the teacher stays at the start."""
    config, tokenizer = trainer.config, trainer.tokenizer
    model, teacher = start, copy.deepcopy(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    for step, rollout in enumerate(rollouts, 1):
        lam = config.rlsd_lambda * (1 - step / config.rlsd_lambda_decay_steps)
        advantages = group_advantages(rollout.rewards, config.num_generations)
        found = group_hints(rollout, advantages, step, tokenizer, config)
        terms = []
        for i, row in enumerate(rollout.rows):
            y = rollout.completion_ids[i][rollout.mask[i]].tolist()
            question = tokenizer(row["prompt"])["input_ids"]
            a, lp = advantages[i].item(), naive_log_probs(model, question, y, config)
            a_hat, selected = torch.full_like(lp, a), torch.zeros_like(lp).bool()
            if a and found[i]:
                with torch.no_grad():
                    scored = torch.stack([
                        naive_log_probs(teacher, c, y, config) for c in found[i]
                    ])
                reference = lp.detach()
                if len(scored) > 1:
                    reference = scored[1:].exp().mean(0).log()
                e = scored[0] - reference
                if config.objective == "rlsd":
                    w = torch.exp(math.copysign(1, a) * e).clamp(0.8, 1.2)
                    a_hat = a * ((1 - lam) + lam * w)
                else:
                    r = (lam * torch.tanh(e / 0.02)).clamp(-2, 2)
                    selected = r.abs() > 0.02
                    moved = (a + r).clamp(min=0) if a > 0 else (a + r).clamp(max=0)
                    a_hat = torch.where(selected, moved, a_hat)
            terms.append((torch.exp(lp - lp.detach()) * a_hat, selected))
        loss = 0.0
        for kind in (False, True):
            count = sum((s == kind).sum() for _, s in terms)
            loss = loss - sum(x[s == kind].sum() for x, s in terms) / count.clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
    return parameters(model)


@pytest.mark.parametrize("arm", ARMS)
def test_two_steps_of_the_trainer_equal_a_naive_loop(arm, tmp_path, monkeypatch):
    rollouts = recorded(monkeypatch)
    trainer = run_of(tmp_path, arm, rlsd_lambda=0.9, per_device_train_batch_size=5)
    start = copy.deepcopy(trainer.model)
    first = parameters(start)
    metrics = [trainer.train_step(step)[0] for step in (1, 2)]
    want = naive_train(trainer, start, rollouts)
    # Not by its sign alone: a token whose r is as good as the threshold may fall on either side.
    assert relative_distance(parameters(trainer.model), want, first) < 1e-3
    assert all(0 <= m["rlsd/contrast_missing_frac"] < 1 for m in metrics)
    assert metrics[0]["rlsd/effective_lambda"] == pytest.approx(0.9 * 49 / 50)
    assert ("rlcsd/selected_frac" in metrics[0]) == arm.startswith("rlcsd")
    assert ("rlsd/contrast_mean_pos" in metrics[0]) == (arm != "one-sided")


@pytest.mark.parametrize("arm", ["rlsd-rollout", "rlcsd"])
@pytest.mark.parametrize("changed", [
    {"num_iterations": 2}, {"beta": 0.1, "entropy_coef": 0.01}, {"bf16": True},
    {"use_peft": True, "lora_r": 4}, {"teacher_model_kind": "live", "gradient_checkpointing": True},
    {"padding_free": True, "max_tokens_per_micro_batch": 60}, {"mask_truncated_completions": True},
    {"vllm_importance_sampling_correction": True}, {"gradient_tolerance": 1e-3},
], ids=["iterations-2", "beta-entropy", "bf16", "lora", "live", "packed", "masked", "corrected",
        "tolerance"])
def test_runs_with_the_trainers_options(arm, changed, tmp_path):
    trainer = run_of(tmp_path, arm, validate_every=1, **changed)
    before = parameters(trainer.model)
    metrics, _ = trainer.train_step(1)
    assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    assert metrics["rlsd/weight_mean_pos"] != 1 and math.isfinite(metrics["entropy"])
    difference = metrics.get("sampling/sampling_logp_difference/max", 0.0)
    assert difference < (0.5 if changed.get("bf16") else 1e-4)  # also where A_hat stopped at 0
    assert any(not torch.equal(p, before[n]) for n, p in parameters(trainer.model).items())


def test_packed_and_padded_contexts_score_alike(tmp_path):
    results, saved = [], []
    for changed in ({"share_prompts": "false"}, {"share_prompts": "true"},
                    {"padding_free": True, "max_tokens_per_micro_batch": 40},
                    {"per_device_train_batch_size": 3}):
        trainer = run_of(tmp_path, "rlcsd", **changed)
        start = parameters(trainer.model)
        metrics = trainer.train_step(1)[0]
        results.append((metrics["rlsd/contrast_mean_neg"], parameters(trainer.model)))
        saved.append(metrics["prompt_sharing/tokens_saved"])
    plain = make_trainer(tmp_path, objective="grpo", share_prompts="true").train_step(1)[0]
    assert saved[0] == 0 and saved[1] > 1.3 * plain["prompt_sharing/tokens_saved"]
    for mean, got in results[1:]:
        assert mean == pytest.approx(results[0][0], rel=1e-4)
        assert relative_distance(got, results[0][1], start) < 1e-3


@pytest.mark.parametrize("arm", ["rlsd-data", "rlcsd", "one-sided"])
def test_resume_equals_an_uninterrupted_run(arm, tmp_path):
    changed = {"max_steps": 4, "save_steps": 2, "teacher_sync_steps": 3, "log_completions_steps": 3}
    trainer = run_of(tmp_path, arm, **changed)
    records = trainer.train()
    want = parameters(trainer.model)
    again = run_of(tmp_path, arm, resume_from=tmp_path / "run" / "checkpoint-2", **changed)
    assert again.config.rlsd_contrast_hints == trainer.config.rlsd_contrast_hints
    assert without_times(again.train()) == without_times(records)
    assert_same(parameters(again.model), want)


def test_after_lambda_nothing_is_scored_and_it_is_grpo_to_the_bit(tmp_path):
    results = []
    for changed in ({"objective": "grpo"}, {**RUN, **ARMS["rlcsd"], "rlsd_lambda_decay_steps": 1},
                    {**RUN, **ARMS["rlsd-rollout"], "rlsd_lambda": 0.0}):
        trainer = make_trainer(tmp_path, **changed)
        for step in (1, 2):
            metrics = trainer.train_step(step)[0]
            assert "rlsd/contrast_missing_frac" not in metrics
            assert metrics["rlsd/effective_lambda"] == 0
        results.append(parameters(trainer.model))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_the_teacher_scores_each_context_once_and_nothing_else(tmp_path, monkeypatch):
    def half_right(prompts, completions, completion_ids, **columns):
        return [float(i % 2) for i in range(len(prompts))]

    rollouts = recorded(monkeypatch)
    trainer = run_of(tmp_path, "rlsd-data", num_iterations=2, reward=half_right)
    counted, real = [], trainer._scored
    with monkeypatch.context() as patched:
        patched.setattr(rlsd.trainer, "teacher_inputs", pytest.fail)
        patched.setattr(
            trainer, "_scored", lambda by, part: counted.append((by, part)) or real(by, part)
        )
        trainer.train_step(1)
    found = group_hints(
        rollouts[0], group_advantages(rollouts[0].rewards, 4), 1, trainer.tokenizer, trainer.config
    )
    ((scorer, part),) = counted
    assert scorer is trainer.teacher and len(part.prompts) == sum(map(len, found)) > 16
    plain = make_trainer(tmp_path, num_iterations=2, reward=half_right)
    spent = [t.flops.update(b, t.config) for t, b in (
        (trainer, trainer.make_batch(rollouts[0], group_advantages(rollouts[0].rewards, 4), 1)[0]),
        (plain, plain.make_batch(rollouts[0], group_advantages(rollouts[0].rewards, 4), 1)[0]),
    )]
    assert spent[0] > 1.1 * spent[1]  # three contexts where plain RLSD has one


def test_sequences_without_a_sibling_keep_plain_a_and_are_counted(tmp_path):
    def one_right(prompts, completions, completion_ids, **columns):
        return [float(i % 4 == 0) for i in range(len(prompts))]

    grpo = make_trainer(tmp_path, reward=one_right, objective="grpo")
    grpo.train_step(1)
    for arm, want in (("rlsd-rollout", 0.25), ("rlcsd", 0.25), ("rlsd-data", None),
                      ("one-sided", 0.25)):
        trainer = run_of(tmp_path, arm, reward=one_right)
        rows = [r for r in rlsd.trainer.rows_of_step(trainer.rows, 4, 1, 0) for _ in range(4)]
        rollout = Rollout(
            rows, torch.full((16, 2), 5), torch.ones(16, 2).bool(), ["# 1"] * 16,
            torch.zeros(16).bool(), torch.tensor(one_right(rows, None, None)).double(),
            torch.zeros(16, 1),
        )
        batch, live, noted = trainer.make_batch(
            rollout, group_advantages(rollout.rewards, 4), 1
        )
        alone = [i for i, prompts in enumerate(batch.hints or batch.teacher_prompts)
                 if not prompts]
        if want is None:
            assert noted["rlsd/contrast_missing_frac"] == 0 and alone == []
            continue
        assert noted["rlsd/contrast_missing_frac"] == want and alone == [0, 4, 8, 12]
        if batch.a_hat is not None:
            assert (batch.a_hat[alone] == batch.advantages[alone, None]).all()
    trainer = run_of(tmp_path, "rlcsd", reward=one_right, success_reward_threshold=2.0)
    metrics, _ = trainer.train_step(1)  # nothing counts as right: all of it is GRPO
    assert metrics["rlsd/contrast_missing_frac"] == 1 and metrics["rlcsd/selected_frac"] == 0
    assert_same(parameters(trainer.model), parameters(grpo.model))


def test_hints_of_rollouts_need_none_in_the_data(tmp_path):
    write_rows(tmp_path / "train.jsonl", [r | {"privileged_context": ""} for r in problems(12)])
    for arm in ("rlsd-rollout", "rlcsd", "one-sided"):
        trainer = run_of(tmp_path, arm)
        assert all(row["teacher_prompt_ids"] is None for row in trainer.rows)
        assert trainer.train_step(1)[0]["grad_norm"] > 0
    with pytest.raises(UserError, match="has no privileged context"):
        run_of(tmp_path, "rlcsd-data")
    trainer = run_of(tmp_path, "rlcsd-data", allow_missing_privileged_context=True)
    assert trainer.train_step(1)[0]["rlsd/contrast_missing_frac"] == 1


REFUSED = {
    "objective": ({"objective": "opsd", "rlsd_contrast_hints": 1}, "rlcsd, but objective is opsd"),
    "source": ({"objective": "grpo", "hint_source": "rollout"}, "rlcsd, but objective is grpo"),
    "no-wrong": ({"objective": "rlcsd", "rlsd_contrast_hints": 0}, "needs rlsd_contrast_hints"),
    "shuffled": ({"hint_source": "rollout", "shuffle_privileged_context": True}, "does not read"),
    "answers": ({"hint_source": "rollout", "answer_only_privileged_context": True},
                "does not read"),
}


@pytest.mark.parametrize("changed, words", REFUSED.values(), ids=REFUSED)
def test_options_that_do_not_go_together_are_one_sentence(changed, words):
    with pytest.raises(UserError) as error:
        TrainConfig(**changed)
    message = str(error.value)
    assert words in message and message.endswith(".") and ". " not in message


def test_how_many_wrong_hints_where_nothing_is_said():
    assert TrainConfig().rlsd_contrast_hints == 0
    assert TrainConfig(objective="rlcsd").rlsd_contrast_hints == 4
    assert TrainConfig(objective="rlcsd", rlsd_contrast_hints=1).rlsd_contrast_hints == 1


def test_a_teacher_prompt_has_no_wrong_counterpart(tmp_path):
    rows = problems(12)
    rows[2]["teacher_prompt"] = "<h> 1 <q> 2 <a>"
    write_rows(tmp_path / "train.jsonl", rows)
    with pytest.raises(UserError, match="line 3 of .* has a teacher_prompt.*no wrong solution"):
        run_of(tmp_path, "rlsd-data")
    run_of(tmp_path, "rlsd-rollout")  # which reads none of it


@pytest.mark.parametrize("arm", ["rlsd-data", "rlcsd", "one-sided", "sdpo"])
def test_a_sibling_must_find_room_in_its_template(arm, tmp_path):
    changed = {"objective": "sdpo"} if arm == "sdpo" else RUN | ARMS[arm]
    changed["max_completion_length"] = 55  # twice this and a prompt fit the 128 positions
    make_trainer(tmp_path, **changed)
    template = " ".join(["<h>"] * 12) + " {privileged_context} {prompt}"
    with pytest.raises(UserError, match="exceeds the 128 positions"):
        make_trainer(tmp_path, privileged_template=template, **changed)


def test_a_chat_that_no_sibling_can_enter_is_named(tmp_path, monkeypatch):
    rows = [r | {"prompt": [{"role": "user", "content": r["prompt"]}]} for r in problems(12)]
    rows[4]["prompt"][0]["role"] = "system"
    write_rows(tmp_path / "train.jsonl", rows)
    real = rlsd.trainer.checkpoint.load_tokenizer

    def with_template(path):
        tokenizer = real(path)
        tokenizer.chat_template = "{{ messages[0].content }}"
        return tokenizer

    monkeypatch.setattr(rlsd.trainer.checkpoint, "load_tokenizer", with_template)
    with pytest.raises(UserError, match="Row line 5 of .* its chat has no user message"):
        run_of(tmp_path, "rlcsd")
