"""Runs whose completions have several turns: tools' tokens are context, and nothing else."""

import copy
import json
import random

import pyarrow.parquet
import pytest
import torch
from runs import (
    assert_same,
    naive_log_probs,
    parameters,
    quick,  # noqa: F401
    recorded,
    relative_distance,
    without_times,
)

import rlsd.trainer
from rlsd.cli import main
from rlsd.config import make_config
from rlsd.demo import save_model, tiny_model
from rlsd.demo_agent import KEYS, agent_options, agent_tokenizer, question
from rlsd.policy.advantages import group_advantages
from rlsd.policy.update import student_terms, teacher_inputs
from rlsd.sampling.rollout import loss_mask, written
from rlsd.sampling.samplers import Samples
from rlsd.trainer import Trainer

HERE = __name__
CALL = '<call> {"name": "lookup", "arguments": {"key": "%s"}} </call> <eos>'
LINES = [CALL % key for key in KEYS] + [f"{key} <eos>" for key in KEYS] + ["<call> k1 <eos>"]


def scattered(prompts, completions, completion_ids, **columns):
    return [sum(ids) % 5 / 4 for ids in completion_ids]


def mixed_hint(prompt, completion, feedback, solution, **columns):
    """Of some completions what the environment saw, of others nothing."""
    return None if feedback is None else f"{feedback} {solution}"


def babbling(*_, **__):
    """Stands for choose_sampler: a sampler that calls, answers or babbles, by torch's generator."""
    def sample(model, tokenizer, prompts, config, *, greedy=False, images=None):
        chosen = torch.randint(len(LINES), (len(prompts),)).tolist()
        lists = [tokenizer(LINES[k])["input_ids"][: config.max_completion_length] for k in chosen]
        width = max(map(len, lists))
        mask = torch.arange(width) < torch.tensor([len(ids) for ids in lists])[:, None]
        ids = torch.zeros(mask.shape, dtype=torch.int64)
        ids[mask] = torch.tensor([t for line in lists for t in line])
        cut = torch.tensor([line[-1] != tokenizer.eos_token_id for line in lists])
        return Samples(ids, mask, cut, None if greedy else torch.where(mask, -1.0, 0.0))

    return sample


@pytest.fixture(autouse=True)
def babbles(monkeypatch):
    monkeypatch.setattr(rlsd.trainer, "choose_sampler", babbling)


def options(folder, **changed):
    if not (folder / "start").exists():
        tokenizer = agent_tokenizer()
        model = tiny_model(len(tokenizer), seed=3, hidden=16, layers=1)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p *= 5
        save_model(model, tokenizer, folder / "start")
        rng = random.Random(4)
        for name in ("train", "eval"):
            (folder / f"{name}.jsonl").write_text(
                "".join(json.dumps(question(rng)) + "\n" for _ in range(8)), encoding="utf-8"
            )
    return agent_options(folder) | {
        "model_name_or_path": str(folder / "start"), "output_dir": str(folder / "run"),
        "reward_funcs": [f"{HERE}.scattered"], "eval_size": 4, "generation_batch_size": 16,
        "num_generations": 4, "per_device_train_batch_size": 5, "learning_rate": 1e-2,
        "max_steps": 2, "eval_steps": 0, "report_to": "none", "device": "cpu",
        "max_completion_length": 40, **changed,
    }


def trainer_of(folder, *, resume_from=None, **changed):
    return Trainer(
        make_config(options(folder, **changed)), resume_from=resume_from, log=lambda *a: None
    )


def naive_train(trainer, model, rollouts):
    """A loop of sequences, every token but the tools' in the loss; the teacher stays as it was."""
    config, teacher = trainer.config, copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=0.0, betas=(0.9, 0.98)
    )
    for step, rollout in enumerate(rollouts, 1):
        lam = 0.0 if config.objective == "grpo" else config.rlsd_lambda * (1 - step / 50)
        advantages = group_advantages(rollout.rewards, config.num_generations)
        count, loss = loss_mask(rollout, config).sum(), 0.0
        for i, row in enumerate(rollout.rows):
            ids = rollout.completion_ids[i][rollout.mask[i]].tolist()
            mine = rollout.tool_mask[i][rollout.mask[i]]
            lp, a = naive_log_probs(model, row["prompt_ids"], ids, config), advantages[i].item()
            a_hat = torch.full_like(lp, a)
            if lam and a and row["teacher_prompt_ids"]:
                with torch.no_grad():
                    scored = naive_log_probs(teacher, row["teacher_prompt_ids"], ids, config)
                w = torch.exp((1 if a > 0 else -1) * (scored - lp.detach())).clamp(0.8, 1.2)
                a_hat = a * ((1 - lam) + lam * w)
            loss = loss - (torch.exp(lp - lp.detach()) * a_hat)[mine].sum() / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
    return parameters(model)


@pytest.mark.parametrize("changed", [
    {"objective": "grpo"}, {}, {"share_prompts": "false"}, {"padding_free": True},
    {"max_tokens_per_micro_batch": 120}, {"hint_func": f"{HERE}.mixed_hint"},
], ids=lambda changed: "-".join(changed) or "rlsd")
def test_two_steps_of_the_trainer_equal_a_naive_loop(changed, tmp_path, monkeypatch):
    rollouts = recorded(monkeypatch)
    trainer = trainer_of(tmp_path, **changed)
    start = copy.deepcopy(trainer.model)
    first = parameters(start)
    metrics = [trainer.train_step(step)[0] for step in (1, 2)]
    assert all(0 < (r.mask & ~r.tool_mask).sum() for r in rollouts)  # tools did speak
    if "hint_func" in changed:
        hints = [bool(row["teacher_prompt_ids"]) for r in rollouts for row in r.rows]
        assert any(hints) and not all(hints)
        assert 0 < metrics[0]["rlsd/hint_missing_frac"] < 1
    want = naive_train(trainer, start, rollouts)
    assert relative_distance(parameters(trainer.model), want, first) < 1e-3
    assert metrics[0]["tools/call_frequency"] > 0
    assert metrics[0]["completions/mean_length"] == pytest.approx(
        written(rollouts[0]).sum(1).double().mean().item()
    )


def test_what_a_tool_says_is_context_alone(tmp_path, monkeypatch):
    """A pass reads a tool's token, but no loss has it."""
    rollouts = recorded(monkeypatch)
    trainer = trainer_of(tmp_path)
    trainer.train_step(1)
    (rollout,) = rollouts
    advantages = torch.ones(len(rollout.rows), dtype=torch.float64)
    batch, _, _ = trainer.make_batch(rollout, advantages, 1)
    tools = rollout.mask & ~rollout.tool_mask
    assert tools.any() and not batch.loss_weights[tools].any() and not batch.mask[tools].any()
    assert batch.seen[tools].all()


def test_equal_weights_and_an_empty_hint_give_delta_0(tmp_path, monkeypatch):
    rollouts = recorded(monkeypatch)
    trainer = trainer_of(tmp_path)
    trainer.train_step(1)
    rows = [{**row, "teacher_prompt_ids": row["prompt_ids"]} for row in rollouts[0].rows]
    rollout = rollouts[0]._replace(rows=rows)
    advantages = torch.ones(len(rows), dtype=torch.float64)
    batch, _, _ = trainer.make_batch(rollout, advantages, 1)
    config = trainer.loss_config
    teacher = teacher_inputs(trainer.policy, batch, config)
    out = student_terms(trainer.policy, batch, teacher, 1.0, config, trainer.config).out
    assert torch.equal(out.log_probs[batch.mask], out.teacher_log_probs[batch.mask])


def test_a_run_with_tools_resumes_to_the_bit(tmp_path):
    whole = trainer_of(tmp_path, output_dir=str(tmp_path / "whole"), max_steps=3, save_steps=2)
    records = whole.train()
    again = trainer_of(
        tmp_path, output_dir=str(tmp_path / "whole2"), max_steps=2, save_steps=2
    )
    again.train()
    resumed = trainer_of(
        tmp_path, output_dir=str(tmp_path / "whole2"), max_steps=3, save_steps=2,
        resume_from=tmp_path / "whole2" / "checkpoint-2",
    )
    got = resumed.train()
    assert_same(parameters(resumed.model), parameters(whole.model))
    assert without_times(got) == without_times(records)


def test_evaluation_and_completions_show_the_turns(tmp_path):
    records = trainer_of(
        tmp_path, eval_steps=1, max_steps=1, log_completions_steps=1, num_generations_eval=2
    ).train()
    assert "eval/pass@1_greedy" in records[0] and "eval/pass@2_sampled" in records[-1]
    table = pyarrow.parquet.read_table(tmp_path / "run" / "completions" / "step-000001.parquet")
    roles = set()
    for sample in table.to_pylist():
        messages = json.loads(sample["messages"])
        roles |= {message["role"] for message in messages}
        said = sum(message["role"] == "tool" for message in messages)
        assert sample["tool_calls"] >= said
        assert len(sample["tool_mask"]) == len(sample["tokens"]) == len(sample["token_weights"])
        weights = [w for w, own in zip(sample["token_weights"], sample["tool_mask"], strict=True)
                   if not own]
        assert set(weights) <= {1.0}
    assert roles == {"assistant", "tool"}


def test_the_command_line_says_what_cannot_be_used(tmp_path, capsys):
    given = options(tmp_path, tools=["nowhere.tool"], environment_factory=None)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(given), encoding="utf-8")
    assert main(["train", "--config", str(config)]) == 2
    said = capsys.readouterr().err
    assert "Cannot import the tool 'nowhere.tool'" in said and "Traceback" not in said


@pytest.mark.parametrize("command, sentence", [
    (["hints", "--config"], "leave out rollout_func and environment_factory"),
    (["eval", "START", "--config"], "rlsd eval has no trainer to give rollout_func"),
])
def test_what_a_command_cannot_do_with_an_agent(command, sentence, tmp_path, capsys):
    given = options(tmp_path)
    if command[0] == "eval":
        given |= {"environment_factory": None, "rollout_func": "a.b"}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(given), encoding="utf-8")
    start = given["model_name_or_path"]
    assert main([start if x == "START" else x for x in command] + [str(config)]) == 2
    assert sentence in capsys.readouterr().err
