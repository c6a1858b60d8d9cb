"""Resume: bitwise the run that was never interrupted, and no start from what does not fit."""

import random
import shutil

import pytest
import torch
import transformers
from runs import assert_same, make_trainer, parameters, quick, without_times  # noqa: F401

from rlsd import UserError
from rlsd.cli import main
from rlsd.policy.models import TEACHER, adapter_weights


def noisy_reward(prompts, completions, completion_ids, **columns):
    """Draws from Python's generator: its state must come back with a checkpoint."""
    return [sum(ids) % 5 / 4 + 0.1 * random.random() for ids in completion_ids]


RESUMED = {
    **{kind: {"teacher_model_kind": kind} for kind in ("live", "base", "snapshot", "ema")},
    "snapshot-beta-iterations-2": {"beta": 0.1, "num_iterations": 2},
    **{f"lora-{kind}": {"use_peft": True, "lora_r": 4, "teacher_model_kind": kind}
       for kind in ("base", "snapshot", "ema")},
    "lora-bf16-beta": {"use_peft": True, "lora_r": 4, "bf16": True, "beta": 0.1},
    "bf16-ema": {"bf16": True, "teacher_model_kind": "ema", "beta": 0.1},
    "packed-recomputed": {
        "padding_free": True, "gradient_checkpointing": True, "max_tokens_per_micro_batch": 50,
    },
    "grpo-beta-linear": {
        "objective": "grpo", "beta": 0.1, "lr_scheduler_type": "linear", "warmup_steps": 2
    },
}


@pytest.mark.parametrize("changed", RESUMED.values(), ids=RESUMED)
def test_resume_equals_an_uninterrupted_run(changed, tmp_path):
    # A sync at step 2 and none until 4: the teacher at the checkpoint is neither base nor student.
    common = {
        "max_steps": 6, "save_steps": 3, "teacher_sync_steps": 2, "eval_steps": 3,
        "reward": noisy_reward, "log_completions_steps": 5, **changed,
    }
    trainer = make_trainer(tmp_path, **common)
    whole = trainer.train()
    want, run = parameters(trainer.model), tmp_path / "run"
    shutil.rmtree(run / "checkpoint-6")
    random.seed(99)
    torch.manual_seed(99)
    resumed = make_trainer(tmp_path, resume_from=run / "checkpoint-3", **common)
    assert resumed.step == 3
    records = resumed.train()
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4, 5, 6]
    assert without_times(records) == without_times(whole)
    assert_same(parameters(resumed.model), want)
    if trainer.teacher:
        assert_same(parameters(resumed.teacher.model), parameters(trainer.teacher.model))


def test_resume_from_an_older_checkpoint_replaces_the_newer_one(tmp_path):
    common = {"max_steps": 4, "save_steps": 2}
    trainer = make_trainer(tmp_path, **common)
    trainer.train()
    run = tmp_path / "run"
    (run / "checkpoint-4" / "stale").write_text("x")
    make_trainer(tmp_path, resume_from=run / "checkpoint-2", **common).train()
    assert sorted(p.name for p in run.glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-4"]
    assert not (run / "checkpoint-4" / "stale").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoint-4")
    assert_same(parameters(model), parameters(trainer.model))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_checkpoint_of_another_shape_is_one_sentence(lora, tmp_path):
    make_trainer(tmp_path, max_steps=1, use_peft=lora).train()
    saved = tmp_path / "run" / "checkpoint-1"
    state = torch.load(saved / "trainer_state.pt", weights_only=True)
    moments = state["optimizer"]["state"][0]
    moments["exp_avg"] = moments["exp_avg"][:, :-1].clone()
    torch.save(state, saved / "trainer_state.pt")
    (saved / "SHA256SUMS").unlink()  # else it is damaged, whatever its shape
    with pytest.raises(UserError, match="^The checkpoint .* is of another shape .*\\.$"):
        make_trainer(tmp_path, resume_from=saved, max_steps=2, use_peft=lora)


def test_lora_checkpoint_loads_is_small_and_starts_no_other_run(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, use_peft=True, lora_r=2)
    trainer.train()
    saved = tmp_path / "run" / "checkpoint-1"
    assert not (saved / "model.safetensors").exists()
    state = torch.load(saved / "trainer_state.pt", weights_only=True)
    assert state["teacher"]["adapter"].keys() == adapter_weights(trainer.model, TEACHER).keys()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits)
    assert main(["eval", str(saved.parent)]) == 0
    with pytest.raises(UserError, match="is a LoRA adapter; merge it .*\\.$"):
        make_trainer(
            tmp_path, model_name_or_path=str(saved), output_dir=str(tmp_path / "other")
        )
    with pytest.raises(UserError, match="is a LoRA adapter; resume it with use_peft\\.$"):
        make_trainer(tmp_path, resume_from=saved, max_steps=2)


def kind(name):
    return {"teacher_model_kind": name}


@pytest.mark.parametrize(
    "saved, wanted, words",
    [
        ({"objective": "grpo"}, {"objective": "rlsd"}, "holds no teacher"),
        ({}, {"beta": 0.1}, "holds no reference"),
        (kind("base"), kind("ema"), "holds a base teacher"),
        (kind("live"), kind("snapshot"), "holds a live teacher"),
        (kind("snapshot"), kind("live"), "holds a snapshot teacher"),
        ({}, {"use_peft": True}, "holds no LoRA adapter"),
        ({"use_peft": True}, {"use_peft": True, "lora_r": 8}, "holds an adapter with lora_r 16"),
        ({}, {"bf16": True}, "is of another shape"),
    ],
    ids=["no-teacher", "no-reference", "base-as-ema", "live-as-snapshot", "snapshot-as-live",
         "full-as-lora", "other-rank", "fp32-as-bf16"],
)
def test_resume_never_falls_back_to_another_teacher(saved, wanted, words, tmp_path):
    make_trainer(tmp_path, max_steps=1, **saved).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    with pytest.raises(UserError, match=f"^The checkpoint .*checkpoint-1 {words}.*\\.$"):
        make_trainer(tmp_path, resume_from=checkpoint, **saved | wanted)


def test_finished_run_is_not_resumed(tmp_path):
    make_trainer(tmp_path, max_steps=1).train()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = make_trainer(tmp_path, max_steps=1, resume_from=tmp_path / "run" / "checkpoint-1")
    with pytest.raises(UserError, match="already at step 1; raise max_steps to go on"):
        again.train()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
