"""Siblings as hints in RLSDTrainer, and their contrast, against the method in plain PyTorch."""

import pytest
import torch

pytest.importorskip("trl", reason="the TRL integration needs trl: pip install '.[trl]'")

from runs import naive_log_probs  # noqa: E402
from test_integrations_trl import one_sentence  # noqa: E402
from trl_runs import DATA, PlainHookA, differences, log_probs_of, make  # noqa: E402

import rlsd.integrations.trl_teacher  # noqa: E402
from rlsd.config import UserError  # noqa: E402
from rlsd.integrations.trl import RLSDConfig, RLSDTrainer  # noqa: E402
from rlsd.integrations.trl_siblings import require_siblings  # noqa: E402

OPTIONS = {"success_reward_threshold": 0.5, "rlsd_lambda_decay_steps": 0}


@pytest.fixture
def read(monkeypatch):
    """What sibling_contexts returned, a list of every rollout's."""
    found, real = [], rlsd.integrations.trl_teacher.sibling_contexts

    def noted(*args):
        found.append(real(*args))
        return found[-1]

    monkeypatch.setattr(rlsd.integrations.trl_teacher, "sibling_contexts", noted)
    return found


def rollouts(trainer):
    """(rows, rewards, what the loss gets) of every rollout of a run."""
    kept, generate = [], trainer._generate_and_score_completions

    def noted(inputs):
        out = generate(inputs)
        kept.append((inputs, trainer._rewards, {k: v.clone() for k, v in out.items()}))
        return out

    trainer._generate_and_score_completions = noted
    trainer.train()
    return kept


@pytest.mark.parametrize("source", ["data", "rollout"])
def test_which_siblings_are_read(folder, read, source):
    trainer, _ = make(
        RLSDTrainer, folder, hint_source=source, max_steps=3, rlsd_contrast_hints=2, **OPTIONS,
        data=DATA if source == "data" else [{"prompt": row["prompt"]} for row in DATA],
    )
    encode, seen = trainer._tokenizer, 0
    for (rows, rewards, out), hints in zip(rollouts(trainer), read, strict=True):
        texts = [encode.decode(ids[mask.bool()], skip_special_tokens=True) for ids, mask in zip(
            out["completion_ids"], out["completion_mask"], strict=True
        )]

        def after(text, row):
            return encode(f"<h> {text} {row['prompt']}")["input_ids"]

        for i, (row, own) in enumerate(zip(rows, hints, strict=True)):
            group = [j for j in range(i - i % 4, i - i % 4 + 4) if j != i and texts[j].strip()]
            right, wrong = ([after(texts[j], row) for j in group if (rewards[j] >= 0.5) == good]
                            for good in (True, False))
            if source == "data":
                right = [after(row["solution"], row)]
            weighed = rewards[i] != rewards[i - i % 4 : i - i % 4 + 4].mean()  # of quarters: exact
            if not (weighed and right and wrong):
                assert own == []
                continue
            seen += 1
            assert own[0] in right and 1 <= len(own) - 1 <= 2 and len(own) - 1 <= len(wrong)
            assert all(x in wrong for x in own[1:])
    assert seen > 8


class PlainContrast(PlainHookA):
    """Section 7 in plain PyTorch after given contexts; rlcsd's weights where it selects."""

    hints = objective = None

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        args, ids, mask = self.args, out["completion_ids"], out["completion_mask"]
        a_hat = out["advantages"][:, None].repeat(1, ids.shape[1])
        chosen = torch.zeros_like(mask, dtype=torch.bool)
        for i, own in enumerate(self.hints[self.rollouts - 1]):
            if not own:
                continue
            a = out["advantages"][i]
            right, *wrong = (log_probs_of(self.teacher, [x], ids[i : i + 1], mask[i : i + 1], args)
                             for x in own)
            e = (right - torch.stack(wrong).exp().mean(0).log())[0]
            if self.objective == "rlcsd":
                r = (args.rlcsd_beta * args.rlsd_lambda * torch.tanh(e / args.rlcsd_tau)).clamp(
                    -args.rlcsd_clip, args.rlcsd_clip
                )
                pick = (r.abs() > args.rlcsd_threshold) & mask[i].bool()
                moved = (a + r).clamp(min=0) if a > 0 else (a + r).clamp(max=0)
                a_hat[i], chosen[i] = torch.where(pick, moved, a), pick
            else:
                eps = args.rlsd_reweight_clip_range
                w = torch.exp(a.sign() * e).clamp(1 - eps, 1 + eps)
                a_hat[i] = a * ((1 - args.rlsd_lambda) + args.rlsd_lambda * w)
        return {**out, "advantages": a_hat, "chosen": chosen}

    def _compute_loss(self, model, inputs):
        if self.objective != "rlcsd":
            return super(PlainHookA, self)._compute_loss(model, inputs)
        loss, chosen, mask = 0.0, inputs["chosen"], inputs["completion_mask"].bool()
        parts = ((mask & ~chosen, 1.0), (mask & chosen, self.args.rlcsd_eta))
        weights = sum(part * (scale / part.sum().clamp(min=1)) for part, scale in parts)
        for i, prompt in enumerate(inputs["questions"]):
            y = inputs["completion_ids"][i][mask[i]].tolist()
            lp = naive_log_probs(model, prompt, y, self.args)
            rho = torch.exp(lp - lp.detach())
            loss = loss - (rho * (weights * inputs["advantages"])[i][mask[i]]).sum()
        return loss


@pytest.mark.parametrize("objective", ["rlsd", "rlcsd"])
@pytest.mark.parametrize("source", ["data", "rollout"])
def test_the_contrast_is_section_7_in_plain_pytorch(folder, read, source, objective):
    options = {**OPTIONS, "hint_source": source, "rlsd_contrast_hints": 2, "objective": objective,
               "rlcsd_tau": 0.2, "rlcsd_eta": 0.5, "max_steps": 2}
    trainer, got = make(RLSDTrainer, folder, **options)
    trainer.train()
    plain, want = make(PlainContrast, folder, **options)
    plain.hints, plain.objective = read, objective
    plain.train()
    loss, gradient = differences(got, want)
    assert loss < 2e-6 and gradient < 2e-5, (loss, gradient)
    logged = trainer.state.log_history[0]
    assert logged["rlsd/effective_lambda"] == 0.5 and "rlsd/contrast_missing_frac" in logged
    assert ("rlcsd/selected_frac" in logged) == (objective == "rlcsd")
    assert "rlsd/contrast_mean_pos" in logged and "rlsd/delta_mean" not in logged


def test_a_right_sibling_as_the_hint_is_hook_a_in_plain_pytorch(folder, read):
    class Plain(PlainHookA):
        hints = read

        def _generate_and_score_completions(self, inputs):
            out = super()._generate_and_score_completions(inputs)
            own = self.hints[self.rollouts - 1]
            out["hinted"] = [x[0] if x else q for x, q in zip(own, out["questions"], strict=True)]
            return out

    # A teacher that is the student, to which no hint is delta 0: plain A.
    options = {**OPTIONS, "hint_source": "rollout", "rlsd_lambda_decay_steps": 5,
               "teacher_sync_steps": 1}
    trainer, got = make(RLSDTrainer, folder, **options)
    trainer.train()
    plain, want = make(Plain, folder, **options)
    plain.train()
    loss, gradient = differences(got, want)
    assert loss < 2e-6 and gradient < 2e-5, (loss, gradient)
    assert 0 <= trainer.state.log_history[0]["rlsd/contrast_missing_frac"] <= 1


@pytest.mark.parametrize("options, complaint", [
    ({"more": {"hint_func": lambda *a, **b: "x"}, "hint_source": "rollout"},
     "hint_func would not be asked"),
    ({"more": {"rollout_func": lambda *a: {}}}, "several turns are no hints"),
    ({"objective": "rlcsd", "loss_type": "sapo"}, "objective='rlcsd' weighs tokens, but loss_type"),
], ids=["hint_func", "turns", "formula"])
def test_refused_at_construction(folder, options, complaint, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    with pytest.raises(UserError, match=f"^Siblings cannot be hints because .*{complaint}") as said:
        make(RLSDTrainer, folder, **{"rlsd_contrast_hints": 1, **options})
    one_sentence(said)


def test_a_process_must_hold_whole_groups(folder):
    """Of one process TRL itself demands it."""
    trainer, _ = make(RLSDTrainer, folder)
    trainer.num_generations = 3
    with pytest.raises(UserError, match="8 sequences at once, which are no whole groups") as said:
        require_siblings(trainer)
    one_sentence(said)


@pytest.mark.parametrize("option, value", [
    ("objective", "grpo"), ("hint_source", "web"), ("rlsd_contrast_hints", -1),
    ("success_reward_threshold", float("nan")), ("rlcsd_tau", 0.0), ("rlcsd_threshold", -1.0),
])
def test_bad_options_are_refused(folder, option, value):
    with pytest.raises(UserError, match=option) as error:
        RLSDConfig(str(folder / "x"), use_cpu=True, bf16=False, **{option: value})
    one_sentence(error)
    assert RLSDConfig("x", use_cpu=True, bf16=False, objective="rlcsd").rlsd_contrast_hints == 4
