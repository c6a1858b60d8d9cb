"""Contrast hints and rlcsd against loops in fp64 written from section 7 of the method."""

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
    relative_distance,
    without_times,
    write_rows,
)

import rlsd.trainer
from rlsd import TrainConfig, UserError, group_advantages
from rlsd.demo import tiny_model
from rlsd.policy.hints import group_hints
from rlsd.policy.models import Policy, head_of, open_forward
from rlsd.policy.packing import Layout
from rlsd.policy.update import (
    live_batch,
    log_probs_under,
    require_contract,
    reweighted,
    student_terms,
    token_weights,
)
from rlsd.sampling.rollout import Rollout

PAD, EOS = 0, 1
RLSD, RLCSD = {"objective": "rlsd", "rlsd_contrast_hints": 3}, {"objective": "rlcsd"}
REWARDS = [1, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1]  # the last group has no signal


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


def config_of(**changed):
    return TrainConfig(**{
        "num_generations": 4, "generation_batch_size": 12, "max_completion_length": 9, **changed,
    })


def rollout_of():
    """Three groups of four, lengths 1 to 9 with EOS; one completion says nothing but EOS."""
    prompts = [p for p in lists([3, 7, 2], 0) for _ in range(4)]
    completions = [c + [EOS] for c in lists([4, 8, 0, 2, 1, 5, 3, 6, 2, 2, 2, 2], 1)]
    mask = torch.tensor([[t < len(c) for t in range(9)] for c in completions])
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    return Rollout(
        [{"prompt_ids": p} for p in prompts],
        torch.tensor([c + [PAD] * (9 - len(c)) for c in completions]), mask, [""] * 12,
        torch.zeros(12, dtype=torch.bool), rewards, rewards[:, None],
    )


def contexts_of(rollout):
    """[correct, wrong ..] as the groups have them, by hand; none where one side is missing."""
    hints, found = lists([2, 5, 3, 4, 2, 6, 3, 4, 2, 3, 4, 5], 3), []
    for i, row in enumerate(rollout.rows):
        group = [j for j in range(i - i % 4, i - i % 4 + 4) if j != i]
        sides = [[hints[j] + row["prompt_ids"] for j in group if REWARDS[j] == kind]
                 for kind in (1, 0)]
        found.append([sides[0][0], *sides[1]] if all(sides) else [])
    return found


def log_softmax_of(scorer, prompt, completion, config):
    logits = scorer(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    log_p = torch.log_softmax(logits / config.temperature, -1)
    return log_p[torch.arange(len(completion)), completion]


def naive_weights(lengths, config):
    """a_t of each sequence for sets of tokens with these sizes, TRL's definitions."""
    if config.loss_type == "grpo":
        return [1 / max(1, n) / len(lengths) for n in lengths]
    if config.loss_type == "dr_grpo":
        return [1 / (len(lengths) * config.max_completion_length)] * len(lengths)
    return [1 / max(1, sum(lengths))] * len(lengths)


def naive_loss(student, teacher, rollout, contexts, old, lam, config):
    """(loss, {name: metric}): section 7, a sequence and a token at a time."""
    advantages = []
    for first in range(0, 12, 4):
        group = REWARDS[first : first + 4]
        mean = sum(group) / 4
        sd = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        advantages += [(r - mean) / (sd + 1e-6) for r in group]
    tokens = []  # (sequence, A, e or None, A_hat, selected, log-prob, old log-prob)
    for i, row in enumerate(rollout.rows):
        y = rollout.completion_ids[i][rollout.mask[i]].tolist()
        lp = log_softmax_of(student, row["prompt_ids"], y, config)
        a, scored = advantages[i], None
        if contexts[i] and not (config.rlsd_negative_only and a > 0) and a:
            with torch.no_grad():
                scored = [log_softmax_of(teacher, c, y, config).tolist() for c in contexts[i]]
        for t in range(len(y)):
            e, a_hat, selected = None, a, False
            if scored:
                wrong = [math.exp(line[t]) for line in scored[1:]]
                e = scored[0][t] - math.log(sum(wrong) / len(wrong))
            if scored and config.objective == "rlsd":
                eps = config.rlsd_reweight_clip_range
                w = min(max(math.exp(e if a > 0 else -e), 1 - eps), 1 + eps)
                a_hat = a * ((1 - lam) + lam * w)
            if scored and config.objective == "rlcsd":
                r = config.rlcsd_beta * lam * math.tanh(e / config.rlcsd_tau)
                r = min(max(r, -config.rlcsd_clip), config.rlcsd_clip)
                selected = abs(r) > config.rlcsd_threshold
                if selected:
                    a_hat = max(a + r, 0.0) if a > 0 else min(a + r, 0.0)
            before = lp[t].item() if old is None else old[i, t].item()
            tokens.append((i, a, e, a_hat, selected, lp[t], before))
    loss = 0.0
    for kind in (False, True):
        lengths = [sum(x[0] == i and x[4] == kind for x in tokens) for i in range(12)]
        weights = naive_weights(lengths, config)
        for i, _, _, a_hat, selected, lp, before in tokens:
            if selected == kind:
                rho = torch.exp(lp - before)
                clipped = rho.clamp(1 - config.epsilon, 1 + config.epsilon_high)
                one = -torch.minimum(rho * a_hat, clipped * a_hat)
                if a_hat < 0 and config.delta is not None:
                    one = torch.minimum(one, torch.tensor(-a_hat * config.delta).double())
                loss = loss + weights[i] * (config.rlcsd_eta if kind else 1.0) * one
    live = [x for x in tokens if x[1]]
    told = [x for x in live if x[2] is not None]
    wanted = [i for i in range(12) if advantages[i] and not (
        config.rlsd_negative_only and advantages[i] > 0)]

    def mean(values):
        values = list(values)
        return sum(values) / len(values) if values else math.nan

    metrics = {
        "rlsd/contrast_missing_frac": mean(not contexts[i] for i in wanted),
        "rlsd/contrast_mean_pos": mean(x[2] for x in told if x[1] > 0),
        "rlsd/contrast_mean_neg": mean(x[2] for x in told if x[1] < 0),
        "rlsd/weight_mean_pos": mean(x[3] / x[1] for x in live if x[1] > 0),
        "rlsd/weight_mean_neg": mean(x[3] / x[1] for x in live if x[1] < 0),
        "rlsd/effective_lambda": lam,
    }
    if config.objective == "rlcsd":
        metrics["rlcsd/selected_frac"] = mean(x[4] for x in live)
    else:
        signed = [x[2] if x[1] > 0 else -x[2] for x in told]
        eps = config.rlsd_reweight_clip_range
        metrics["rlsd/clip_low_frac"] = mean(
            s < (math.log1p(-eps) if eps < 1 else -math.inf) for s in signed
        )
        metrics["rlsd/clip_high_frac"] = mean(s > math.log1p(eps) for s in signed)
    return loss, metrics


def prepared(teacher, rollout, contexts, lam, config, size=5):
    """(batch, metrics, batches that the teacher scored) as the trainer forms them, in fp64."""
    policy, seen = Policy(teacher, head_of(teacher), Layout(PAD)), []

    def score(part):
        seen.append(part)
        count = len(part.prompts)
        parts = [list(range(i, min(i + size, count))) for i in range(0, count, size)]
        return log_probs_under(policy, part, parts, config.temperature, "torch")

    advantages = group_advantages(rollout.rewards, 4).double()
    # In fp32 as the trainer has them, A would differ from the loop's by its rounding.
    groups = rollout.rewards.view(-1, 4)
    exact = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
    advantages = torch.where(advantages == 0, 0.0, exact.flatten())
    batch, live = live_batch(rollout, rollout.mask, advantages, [None] * 12, config, contexts)
    batch = batch._replace(loss_weights=batch.loss_weights.double())
    batch, metrics = reweighted(batch, live, rollout.mask, score, lam, config)
    return batch._replace(loss_weights=batch.loss_weights.double()), live, metrics, seen


def ours(student, batch, config, parts):
    """(loss, gradients) of micro-batches, each held against impl="ref" in fp64."""
    student.zero_grad(set_to_none=True)
    policy, loss = Policy(student, head_of(student), Layout(PAD)), 0.0
    for rows in parts:
        terms = student_terms(
            policy, batch.select(rows), {}, 0.0, config.loss_config(), config, check=True
        )
        require_contract(*terms.deviation, 1)
        terms.out.loss.backward()
        loss += terms.out.loss.item()
    return loss, {n: p.grad.clone() for n, p in student.named_parameters()}


CASES = {
    "rlsd": RLSD, "rlcsd": RLCSD,
    "rlsd-strong": {**RLSD, "rlsd_reweight_clip_range": 1.0},
    "rlsd-temperature": {**RLSD, "temperature": 0.7},
    "rlsd-negative": {**RLSD, "rlsd_negative_only": True},
    "rlsd-dr_grpo": {**RLSD, "loss_type": "dr_grpo"},
    "rlcsd-grpo": {**RLCSD, "loss_type": "grpo", "rlcsd_tau": 0.5},
    "rlcsd-dr_grpo": {**RLCSD, "loss_type": "dr_grpo", "rlcsd_eta": 0.3},
    "rlcsd-soft": {**RLCSD, "rlcsd_tau": 2.0, "rlcsd_threshold": 0.2, "rlcsd_eta": 2.0},
    "rlcsd-crossing": {**RLCSD, "rlcsd_beta": 6.0, "rlcsd_clip": 1.0, "rlcsd_tau": 0.5},
    "rlcsd-negative": {**RLCSD, "rlsd_negative_only": True, "temperature": 1.4},
}


@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("changed", CASES.values(), ids=CASES)
def test_loss_gradient_and_metrics_equal_a_naive_loop(changed, off_policy):
    config, lam = config_of(**changed), 0.8
    student, teacher, rollout = model(0), model(1), rollout_of()
    contexts = contexts_of(rollout)
    batch, live, metrics, _ = prepared(teacher, rollout, contexts, lam, config)
    old = None
    if off_policy:  # ratios on both sides of every clip
        rng = torch.Generator().manual_seed(5)
        with torch.no_grad():
            old = torch.randn((12, 9), generator=rng, dtype=torch.float64)
            for i, row in enumerate(rollout.rows):
                y = rollout.completion_ids[i][rollout.mask[i]].tolist()
                old[i, : len(y)] += log_softmax_of(student, row["prompt_ids"], y, config)
        batch = batch._replace(old_log_probs=old[live])
    got = [ours(student, batch, config, parts) for parts in ([list(range(8))], [[3, 0, 7], [1],
           [2, 4, 5, 6]])]
    student.zero_grad(set_to_none=True)
    want, measured = naive_loss(student, teacher, rollout, contexts, old, lam, config)
    want.backward()
    for loss, gradients in got:
        # a_t are fp32, and so is what the model's norms keep for their backward.
        assert loss == pytest.approx(want.item(), abs=1e-7)
        for name, p in student.named_parameters():
            assert (gradients[name] - p.grad).norm() <= 1e-6 * p.grad.norm(), name
    assert metrics == pytest.approx(measured, abs=1e-9, nan_ok=True)
    # Nothing above is empty, and A_hat keeps the sign of A.
    assert 0 < metrics["rlsd/contrast_missing_frac"] < 1 and len(live) == 8
    assert 0 < metrics.get("rlcsd/selected_frac", 0.5) < 1
    assert (batch.a_hat * batch.advantages[:, None] > 0).all()
    if "crossing" in str(changed) or changed.get("rlcsd_beta"):
        assert (batch.a_hat.abs() < 1e-30).any()


def test_every_context_is_followed_by_the_very_tokens_and_their_eos():
    config, rollout, teacher = config_of(**RLSD), rollout_of(), model(1)
    contexts = contexts_of(rollout)
    batch, live, _, (asked,) = prepared(teacher, rollout, contexts, 1.0, config)
    pairs = [(i, c) for i in live for c in contexts[i]]
    assert len(asked.prompts) == len(pairs) > 10
    found = []
    for prompt, ids, mask in zip(asked.prompts, asked.completion_ids, asked.mask, strict=True):
        y = ids[mask].tolist()
        assert y[-1] == EOS
        found.append((prompt, y))
    want = [(c, rollout.completion_ids[i][rollout.mask[i]].tolist()) for i, c in pairs]
    assert sorted(found) == sorted(want)
    # The same prompts side by side, for layouts that share them.
    borders = sum(a != b for a, b in zip(asked.prompts, asked.prompts[1:], strict=False))
    assert borders + 1 == len({tuple(p) for p in asked.prompts}) < len(pairs)


def test_a_shift_by_one_token_or_a_swap_of_contexts_would_show():
    """The e_t that A_hat holds is that of its own token: recovered from it, one by one."""
    config = config_of(**RLSD, rlsd_reweight_clip_range=1.0)
    rollout, teacher = rollout_of(), model(1)
    contexts = contexts_of(rollout)
    batch, live, _, _ = prepared(teacher, rollout, contexts, 1.0, config, size=3)
    checked = 0
    for row, i in enumerate(live):
        if not contexts[i]:
            assert (batch.a_hat[row] == batch.advantages[row]).all()  # plain A, to the bit
            continue
        y = rollout.completion_ids[i][rollout.mask[i]].tolist()
        a = batch.advantages[row].item()
        with torch.no_grad():
            scored = torch.stack([log_softmax_of(teacher, c, y, config) for c in contexts[i]])
        e = scored[0] - scored[1:].exp().mean(0).log()
        want = (math.copysign(1, a) * e).exp().clamp(max=2)
        got = batch.a_hat[row, : len(y)] / a
        assert got.tolist() == pytest.approx(want.tolist(), abs=1e-9)
        checked += len(y)
    assert checked > 15


def test_equal_hints_on_both_sides_are_grpo_whatever_they_say():
    rollout, teacher = rollout_of(), model(1)
    same = [[c[0]] * 3 if c else [] for c in contexts_of(rollout)]
    for changed in (RLSD, RLCSD):
        batch, *_ = prepared(teacher, rollout, same, 1.0, config_of(**changed))
        want = batch.advantages[:, None].expand_as(batch.a_hat)
        torch.testing.assert_close(batch.a_hat, want, atol=1e-12, rtol=0)


def test_an_impossible_token_stays_finite():
    rollout, config = rollout_of(), config_of(**RLCSD)
    contexts = contexts_of(rollout)
    advantages = group_advantages(rollout.rewards, 4)
    batch, live = live_batch(rollout, rollout.mask, advantages, [None] * 12, config, contexts)
    for changed in (RLCSD, RLSD):
        for value in (-math.inf, 0.0):
            def score(part, value=value):
                scored = torch.full(part.mask.shape, -1.0)
                scored[::2] = value
                return scored

            got, metrics = reweighted(
                batch, live, rollout.mask, score, 1.0, config_of(**changed)
            )
            assert got.a_hat.isfinite().all() and got.loss_weights.isfinite().all()


def test_weights_of_the_samples_are_a_hat_over_a():
    rollout = rollout_of()
    batch, *_ = prepared(model(1), rollout, contexts_of(rollout), 1.0, config_of(**RLCSD))
    got = token_weights(batch, None, None, 1.0, None)
    want = torch.where(batch.mask, batch.a_hat / batch.advantages[:, None], 1.0)
    assert torch.equal(got, want) and (got[~batch.mask] == 1).all() and (got != 1).any()


def test_a_rollout_without_signal_scores_nothing():
    rollout = rollout_of()._replace(rewards=torch.ones(12, dtype=torch.float64))
    for changed in (RLSD, RLCSD):
        batch, live = live_batch(
            rollout, rollout.mask, torch.zeros(12), [None] * 12, config_of(), [[]] * 12
        )
        batch, metrics = reweighted(
            batch, live, rollout.mask, pytest.fail, 0.5, config_of(**changed)
        )
        assert live == [] and batch.a_hat.shape == (0, 9)
        assert math.isnan(metrics["rlsd/contrast_missing_frac"])


# Through the trainer

RUN = {"hint_source": "rollout", "success_reward_threshold": 0.5}
ARMS = {
    "rlsd-rollout": {"rlsd_contrast_hints": 2}, "rlsd-data": {"rlsd_contrast_hints": 2,
                                                              "hint_source": "data"},
    "rlcsd": {"objective": "rlcsd"}, "rlcsd-data": {"objective": "rlcsd", "hint_source": "data"},
    "one-sided": {},
}


def run_of(folder, arm, **changed):
    return make_trainer(folder, **{**RUN, **ARMS[arm], **changed})


def recorded(monkeypatch):
    rollouts, real = [], rlsd.trainer.roll_out
    monkeypatch.setattr(
        rlsd.trainer, "roll_out",
        lambda *args, **kwargs: rollouts.append(real(*args, **kwargs)) or rollouts[-1],
    )
    return rollouts


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
    results = []
    for changed in ({}, {"padding_free": True, "max_tokens_per_micro_batch": 40},
                    {"per_device_train_batch_size": 3}):
        trainer = run_of(tmp_path, "rlcsd", **changed)
        start = parameters(trainer.model)
        metrics = trainer.train_step(1)[0]
        results.append((metrics["rlsd/contrast_mean_neg"], parameters(trainer.model)))
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


def passes(trainer):
    """Sequences of every pass of the teacher, appended as they run."""
    counted, real = [], trainer.teacher.model.base_model.forward

    def forward(*args, **kwargs):
        counted.append(len(kwargs["input_ids"]))
        return real(*args, **kwargs)

    trainer.teacher.model.base_model.forward = forward
    return counted


def test_the_teacher_scores_each_context_once_and_nothing_else(tmp_path, monkeypatch):
    def half_right(prompts, completions, completion_ids, **columns):
        return [float(i % 2) for i in range(len(prompts))]

    rollouts = recorded(monkeypatch)
    trainer = run_of(tmp_path, "rlsd-data", num_iterations=2, reward=half_right)
    counted = passes(trainer)
    trainer.train_step(1)
    found = group_hints(
        rollouts[0], group_advantages(rollouts[0].rewards, 4), 1, trainer.tokenizer, trainer.config
    )
    assert sum(counted) == sum(map(len, found)) > 16
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
        config_of(**changed)
    message = str(error.value)
    assert words in message and message.endswith(".") and ". " not in message


def test_how_many_wrong_hints_where_nothing_is_said():
    assert config_of().rlsd_contrast_hints == 0
    assert config_of(objective="rlcsd").rlsd_contrast_hints == 4
    assert config_of(objective="rlcsd", rlsd_contrast_hints=1).rlsd_contrast_hints == 1


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
