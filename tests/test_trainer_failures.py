"""A run that fails says what failed in one sentence, and loses no step."""

import json
import math
import types

import pytest
import torch
import transformers
from runs import (
    assert_same,
    make_trainer,
    parameters,
    quick,  # noqa: F401
    without_times,
    write_rows,
)

import rlsd.trainer
from rlsd import UserError
from rlsd.policy import checkpoint
from rlsd.tasks.rewards import RewardError
from rlsd_kernels import torch_impl


@pytest.mark.parametrize("phase, hint", [
    ("roll_out", "sampling; lower rollout_batch_size"),
    ("student_terms", "training; lower per_device_train_batch_size"),
])
def test_out_of_memory_names_what_to_lower(phase, hint, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=3)
    real_step = trainer.train_step

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def train_step(step):
        if step == 2:
            monkeypatch.setattr(rlsd.trainer, phase, full)
        return real_step(step)

    trainer.train_step = train_step
    with pytest.raises(UserError) as error:
        trainer.train()
    assert str(error.value).startswith(f"Out of memory while {hint}")
    saved = tmp_path / "run" / "checkpoint-1"
    assert str(error.value).endswith(f"; all 1 steps before are safe in {saved}.")
    assert "\n" not in str(error.value) and checkpoint.load_state(saved)["step"] == 1


@pytest.mark.parametrize("wrong", [0, 1], ids=["loss", "gradient"])
def test_validate_every_stops_a_wrong_implementation(wrong, tmp_path, monkeypatch):
    right = torch_impl.token_rows

    def off_by_one_percent(*args, **kwargs):
        out = list(right(*args, **kwargs))
        out[wrong] = out[wrong] * 1.01
        return out

    trainer = make_trainer(tmp_path, max_steps=3, validate_every=2)
    real_step = trainer.train_step

    def train_step(step):
        if step == 2:
            monkeypatch.setattr(torch_impl, "token_rows", off_by_one_percent)
        return real_step(step)

    trainer.train_step = train_step
    name = ("loss", "dh")[wrong]
    with pytest.raises(UserError, match=(
        f"^Step 2: {name} of the fused loss deviates .*; all 1 steps before are safe in .*\\.$"
    )):
        trainer.train()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1")
    assert_same(parameters(model), parameters(trainer.model))


def poisoned_reward(trainer_of, at_call):
    """A reward whose n-th call puts a NaN into the model, after sampling and before the update."""
    calls = []

    def reward(completion_ids, **columns):
        calls.append(1)
        if len(calls) == at_call:
            norm = trainer_of[0].model.base_model.norm.weight
            norm.data[0] = math.nan
        return [sum(ids) % 5 / 4 for ids in completion_ids]

    return reward


def test_nan_in_the_weights_is_not_saved(tmp_path):
    """Over the last good checkpoint, save_total_limit would put one that is worth nothing."""
    box = []
    box.append(make_trainer(
        tmp_path, max_steps=4, save_steps=2, save_total_limit=1,
        reward=poisoned_reward(box, at_call=4),
    ))
    with pytest.raises(UserError) as error:
        box[0].train()
    run = tmp_path / "run"
    message = str(error.value)
    assert message.startswith("Step 4: loss is nan")
    assert message.endswith(f"; the last good checkpoint is {run}/checkpoint-2.")
    saved = parameters(transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoint-2"))
    assert all(p.isfinite().all() for p in saved.values())
    now = parameters(box[0].model)
    assert [name for name in now if not now[name].isfinite().all()] == ["model.norm.weight"]
    assert [json.loads(line)["step"] for line in open(run / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
def test_a_step_that_is_not_finite_loses_no_step(what, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=5)
    real_accumulate, real_norm = trainer.accumulate, rlsd.trainer.clip_grad_norm_

    def accumulate(batch, step, *args):
        passed = real_accumulate(batch, step, *args)
        return passed._replace(loss=math.inf) if step == 4 and what == "loss" else passed

    def norm(weights, most):
        found = real_norm(weights, most)
        return found * math.nan if trainer.step == 3 and what == "grad_norm" else found

    monkeypatch.setattr(trainer, "accumulate", accumulate)
    monkeypatch.setattr(rlsd.trainer, "clip_grad_norm_", norm)
    saved = tmp_path / "run" / "checkpoint-3"
    with pytest.raises(UserError, match=(
        f"^Step 4: loss is .*so training stopped before this update; .*; all 3 steps before are "
        f"safe in {saved}\\.$"
    )):
        trainer.train()
    monkeypatch.undo()
    resumed = make_trainer(tmp_path, max_steps=5, resume_from=saved)
    records = resumed.train()
    whole = make_trainer(tmp_path, max_steps=5, output_dir=str(tmp_path / "whole"))
    assert without_times(whole.train()) == without_times(records)
    assert_same(parameters(whole.model), parameters(resumed.model))


def test_half_a_step_is_never_saved(tmp_path, monkeypatch):
    """The second of two iterations fails: the weights are no longer those of the step before."""
    trainer = make_trainer(tmp_path, max_steps=4, save_steps=2, num_iterations=2)
    real, calls = trainer.accumulate, []

    def accumulate(batch, step, *args):
        calls.append(step)
        passed = real(batch, step, *args)
        return passed._replace(loss=math.inf) if calls == [1, 1, 2, 2, 3, 3, 4, 4] else passed

    monkeypatch.setattr(trainer, "accumulate", accumulate)
    with pytest.raises(UserError, match="^Step 4: loss is inf") as error:
        trainer.train()
    assert not (tmp_path / "run" / "checkpoint-3").exists()
    assert str(tmp_path / "run" / "checkpoint-2") in str(error.value)
    assert "3 steps before are safe" not in str(error.value)


def test_a_failing_evaluation_loses_no_step(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=5, eval_steps=2)

    def away(*args):
        if trainer.step == 4:
            raise RewardError("The reward function judge is away.")
        return {"eval/pass@1": 0.5}

    monkeypatch.setattr(rlsd.trainer, "evaluate", away)
    run = tmp_path / "run"
    with pytest.raises(UserError) as error:
        trainer.train()
    assert str(error.value) == (
        f"The reward function judge is away; all 4 steps before are safe in {run}/checkpoint-4."
    )
    assert checkpoint.load_state(run / "checkpoint-4")["step"] == 4
    assert [json.loads(line)["step"] for line in open(run / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_nan_weights_stop_the_rollout_in_one_sentence(tmp_path):
    box = []
    box.append(make_trainer(tmp_path, max_steps=2, reward=poisoned_reward(box, at_call=99)))
    box[0].model.base_model.norm.weight.data[0] = math.nan
    with pytest.raises(UserError, match="^[^\n]*(NaN|nan|finite)[^\n]*\\.$"):
        box[0].train()


@pytest.mark.parametrize("bad", [math.nan, math.inf, "high"])
def test_bad_reward_names_function_and_row(bad, tmp_path):
    def my_reward(completions, **columns):
        return [0.0, bad, *[0.0] * (len(completions) - 2)]

    trainer = make_trainer(tmp_path, reward=my_reward)
    with pytest.raises(UserError, match=r"my_reward returned .* for row line \d+ of .*jsonl"):
        trainer.train()


def test_a_solution_that_no_reward_can_judge_stops_before_the_first_step(tmp_path):
    pytest.importorskip("math_verify")
    rows = [{"prompt": f"<q> {i} <a>", "solution": s} for i, s in enumerate(("1", "x^2", "$", "3"))]
    path = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UserError, match=r"^Row line 3 of .*bad.jsonl has the solution '\$'"):
        make_trainer(tmp_path, train_dataset=path, eval_size=1, reward_funcs=["math_verify"])


def test_a_failing_reward_loses_no_step(tmp_path):
    calls = []

    def my_reward(completion_ids, **columns):
        calls.append(1)
        if len(calls) == 4:
            raise ConnectionError("the judge is away")
        return [sum(ids) % 5 / 4 for ids in completion_ids]

    common = {"max_steps": 5, "reward": my_reward}
    trainer, saved = make_trainer(tmp_path, **common), tmp_path / "run" / "checkpoint-3"
    with pytest.raises(UserError) as error:
        trainer.train()
    assert str(error.value) == (
        "The reward function my_reward raised ConnectionError: the judge is away; all 3 steps "
        f"before are safe in {saved}."
    )
    resumed = make_trainer(tmp_path, resume_from=saved, **common)
    records = resumed.train()
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    whole = make_trainer(tmp_path, output_dir=str(tmp_path / "whole"), **common)
    assert without_times(whole.train()) == without_times(records)
    assert_same(parameters(whole.model), parameters(resumed.model))


def test_a_reward_that_fails_in_an_evaluation_loses_no_step(tmp_path):
    calls = []

    def my_reward(completion_ids, **columns):
        calls.append(1)
        if len(calls) == 6:  # two of the evaluation before step 1, then two steps, then another
            raise ConnectionError("the judge is away")
        return [sum(ids) % 5 / 4 for ids in completion_ids]

    trainer = make_trainer(tmp_path, reward=my_reward, max_steps=4, eval_steps=2)
    with pytest.raises(UserError) as error:
        trainer.train()
    saved = tmp_path / "run" / "checkpoint-2"
    assert str(error.value).endswith(f"all 2 steps before are safe in {saved}.")
    transformers.AutoModelForCausalLM.from_pretrained(saved)


class Hub:
    """huggingface_hub.HfApi, which makes the repository and then loses its network."""

    def create_repo(self, name, *, exist_ok):
        return types.SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, **_):
        raise ConnectionError("Name or service not known")


def test_a_push_that_fails_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    drawn = []
    monkeypatch.setattr(rlsd.trainer, "plot_runs", lambda *_: drawn.append(True))
    trainer = make_trainer(tmp_path, push_to_hub=True)
    with pytest.raises(UserError, match="^The run is done and whole in .*checkpoint-2, but could "
                                        "not be pushed to me/run .Name or service not known.; "):
        trainer.train()
    assert drawn and [r["step"] for r in rlsd.trainer.read_metrics(tmp_path / "run")] == [1, 2]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert_same(parameters(loaded), parameters(trainer.model))
