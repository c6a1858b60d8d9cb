"""Contrast hints and rlcsd against loops in fp64 written from section 7 of the method."""

import math

import pytest
import torch
from runs import quick  # noqa: F401
from test_parity_objectives import lists, model

from rlsd import TrainConfig, group_advantages
from rlsd.policy.models import Policy, head_of
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
