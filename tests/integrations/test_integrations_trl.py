"""RLSDTrainer's behaviour: what it refuses, the teacher's life, metrics, resume, adapters."""

import copy
import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="the TRL integration needs trl: pip install '.[trl]'")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl_runs import DATA, OFF, PlainHookA, differences, make, run  # noqa: E402

import rlsd.integrations.trl  # noqa: E402
from rlsd.config import UserError  # noqa: E402
from rlsd.integrations.trl import RLSDConfig, RLSDTrainer  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def one_sentence(error):
    text = str(error.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text, text


def without(*columns):
    return [{k: v for k, v in row.items() if k not in columns} for row in DATA]


def changed(i, **values):
    return [{**row, **(values if k == i else {})} for k, row in enumerate(DATA)]


CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}" \
       "{% if add_generation_prompt %}<a> {% if messages|length > 1 %}# {% endif %}{% endif %}"


def chats(**columns):
    return [{"prompt": [{"role": "user", "content": row["prompt"]}], "solution": row["solution"],
             **columns} for row in DATA]


@pytest.mark.parametrize("data, complaint", [
    (without("solution"), "none of the columns teacher_prompt, privileged_context, solution"),
    (changed(3, solution=" "), "^Row 3 of train_dataset has no privileged context"),
    ([{**r, "privileged_context": None} for r in DATA], "^Row 0 .* plain GRPO"),
    ([{**r, "teacher_prompt": 7 if i == 2 else None} for i, r in enumerate(DATA)],
     "Row 2 .* teacher_prompt is neither a text nor a chat"),
    ([{"prompt": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
       "solution": "# 1"}] * 12, "neither a text nor messages with text content"),
    (changed(5, solution="# <eos> 4"),
     "^Row 5 of train_dataset cannot be used: its privileged context spells .* '<eos>', which"),
    ([{**r, "prompt": [{"role": "user", "content": "<q> <eos>"}]} for r in DATA],
     "^Row 0 .*: its prompt spells .* '<eos>', which"),
], ids=["no-column", "empty-hint", "null-hint", "odd-teacher-prompt", "blocks", "forged-hint",
        "forged-question"])
def test_bad_data_is_refused_at_construction(folder, data, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        make(RLSDTrainer, folder, data=data)
    one_sentence(error)


def test_a_shifted_assistant_turn_is_refused(folder):
    trainer, _ = make(RLSDTrainer, folder)
    trainer._tokenizer.chat_template = CHAT
    longer = [{"role": "system", "content": "<h> 1"}, {"role": "user", "content": "<q> 1"}]
    row = chats(teacher_prompt=longer)[0]
    with pytest.raises(UserError, match="row X cannot be used: the assistant turn starts") as error:
        trainer._teacher_prompt(row, "row X")
    one_sentence(error)
    assert trainer._teacher_prompt(chats()[0], "row X")[-1]["content"].startswith("<h> #")


def test_arguments_of_another_trainer(folder):
    with pytest.raises(UserError, match="args must be an RLSDConfig, but is a GRPOConfig"):
        RLSDTrainer("model", [], GRPOConfig(str(folder / "x"), use_cpu=True, bf16=False))


@pytest.mark.parametrize("host, version", [
    ("trl", "1.13.2"), ("trl", "1.17.0.dev0"), ("transformers", "5.16.1"),
    ("transformers", "6.0.0"),
])
def test_other_releases_are_refused_at_import(host, version, monkeypatch):
    installed = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version if name == host else installed(name)
    )
    wanted = f"^rlsd works with {host} .* to .*, but {version} is installed: pip install 'rlsd"
    with pytest.raises(UserError, match=wanted) as error:
        importlib.reload(rlsd.integrations.trl)
    one_sentence(error)


@pytest.mark.parametrize("option, value", [
    ("rlsd_lambda", 1.5), ("rlsd_reweight_clip_range", -0.1), ("rlsd_delta_source", "now"),
    ("rlsd_lambda_warmup_steps", -1), ("rlsd_lambda_decay_steps", -1), ("teacher_sync_steps", 0),
    ("teacher_ema_rate", 0.0), ("teacher_model_kind", "other"), ("privileged_template", "{prompt}"),
    ("gradient_tolerance", 1.0), ("gradient_tolerance", -1e-3), ("gradient_tolerance", "a little"),
    ("gradient_tolerance", float("nan")), ("share_prompts", "never"), ("hint_placement", "system"),
])
def test_bad_options_are_refused(folder, option, value):
    with pytest.raises(ValueError, match=option) as error:
        RLSDConfig(str(folder / "x"), use_cpu=True, bf16=False, **{option: value})
    one_sentence(error)


def test_a_template_has_no_part_in_a_turn(folder):
    options = {"use_cpu": True, "bf16": False, "hint_placement": "turn"}
    assert RLSDConfig(str(folder / "x"), **options).hint_placement == "turn"
    with pytest.raises(UserError, match="privileged_template is for hint_placement text") as error:
        RLSDConfig(str(folder / "x"), privileged_template="{prompt}{privileged_context}", **options)
    one_sentence(error)


@pytest.mark.parametrize("accumulation, per_generation, iterations, done", [
    (1, None, 1, [0, 1, 2, 3, 4]), (4, None, 1, [0, 1, 2, 3, 4]), (2, 4, 1, [0, 0, 1, 1, 2]),
    (2, 4, 2, [0, 0, 0, 0, 1]), (4, 1, 1, [0, 1, 2, 3, 4]), (1, None, 3, [0, 0, 0, 1, 1]),
])
def test_rollouts_done(folder, accumulation, per_generation, iterations, done):
    trainer, _ = make(
        RLSDTrainer, folder, gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation, num_iterations=iterations,
    )
    assert [trainer.rollouts_done(step) for step in range(5)] == done


def test_lambda_follows_the_schedule(folder):
    trainer, _ = run(
        RLSDTrainer, folder, max_steps=5, rlsd_lambda_warmup_steps=2, rlsd_lambda_decay_steps=2,
        num_iterations=1,
    )
    lams = [r.get("rlsd/effective_lambda") for r in trainer.state.log_history[:5]]
    assert lams == [0.25, 0.5, 0.25, 0.0, 0.0]


def counted(trainer):
    calls, score = [], trainer._score

    def counting(*context):
        calls.append(len(context[2]))
        return score(*context)

    trainer._score = counting
    return calls


def test_the_teacher_runs_only_where_it_matters(folder):
    def rewards(completions, **columns):  # the first group is constant
        return [0.9] * 4 + [0.9, 0.1, 0.9, 0.1]

    trainer, recorder = make(
        RLSDTrainer, folder, reward=rewards, max_steps=2, rlsd_lambda_decay_steps=2
    )
    calls = counted(trainer)
    trainer.train()
    assert calls == [4]  # lambda is 0 at the second step
    assert recorder.losses[0] != 0
    trainer, recorder = make(
        RLSDTrainer, folder, reward=rewards, max_steps=1, rlsd_negative_only=True
    )
    calls = counted(trainer)
    trainer.train()
    assert calls == [2]


def test_equal_rewards_of_a_group_are_exactly_zero(folder):
    """TRL's fp32 mean of 0.9 is off by an ulp, and eps 1e-4 turns that into A = -6e-4."""
    def rewards(completions, **columns):
        return [0.9] * 8

    results = {}
    for cls in (GRPOTrainer, RLSDTrainer):
        _, recorder = run(cls, folder, reward=rewards, max_steps=1, num_generations=8)
        results[cls] = max(g.abs().max().item() for g in recorder.gradients[0].values())
    assert results == {GRPOTrainer: pytest.approx(results[GRPOTrainer]), RLSDTrainer: 0.0}


@pytest.mark.parametrize("kind, scorings", [("snapshot", 4), ("live", 8)])
def test_a_frozen_teacher_scores_a_rollout_once(folder, kind, scorings):
    trainer, _ = make(
        RLSDTrainer, folder, max_steps=4, teacher_model_kind=kind, gradient_accumulation_steps=2,
        num_iterations=2,
    )
    calls = counted(trainer)
    trainer.train()
    assert len(calls) == scorings


def test_the_same_prompt_gives_delta_zero(folder):
    data = [{**row, "teacher_prompt": row["prompt"]} for row in DATA]
    trainer, _ = run(RLSDTrainer, folder, data=data, teacher_sync_steps=1, max_steps=3)
    for record in trainer.state.log_history[:3]:
        assert abs(record["rlsd/delta_mean"]) < 1e-6 and record["rlsd/delta_std"] < 1e-5


def test_rows_without_a_hint_may_be_allowed(folder):
    data = [{**row, "solution": ""} for row in DATA]
    options = {"allow_missing_privileged_context": True}
    _, got = run(RLSDTrainer, folder, data=data, **options)
    _, want = run(GRPOTrainer, folder, data=data, **options)
    loss, gradient = differences(got, want)
    assert loss < 2e-6 and gradient < 2e-5


@pytest.mark.parametrize("kind", ["snapshot", "ema", "base", "live"])
def test_sync_is_visible_in_every_parameter(folder, kind):
    trainer, _ = make(
        RLSDTrainer, folder, teacher_model_kind=kind, teacher_sync_steps=1, teacher_ema_rate=1.0,
        optim="adamw_torch", learning_rate=1e-2,
    )
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    with trainer.teacher.lent_to(trainer.model):
        lent = copy.deepcopy(trainer.model.state_dict())
    own = trainer.model.state_dict()
    for name in own:
        assert not torch.equal(own[name], start[name])
        assert torch.equal(lent[name], start[name] if kind == "base" else own[name]), name
    assert trainer.model.training


def test_metrics_stand_beside_trls(folder):
    def first_of_four(completions, **columns):
        """No advantage is 0: the entropy of all tokens is that of the live ones."""
        return [float(i % 4 == 0) for i in range(len(completions))]

    options = {"reward": first_of_four, "gradient_accumulation_steps": 2}
    ours, _ = run(RLSDTrainer, folder, **options)
    theirs, _ = run(GRPOTrainer, folder, **options)
    got, want = (set(t.state.log_history[0]) for t in (ours, theirs))
    assert want <= got
    assert {name for name in got - want if not name.startswith("rlsd/")} == {
        "policy_kl", "clip_ratio/dual_mean", "prompt_sharing/tokens_saved"
    }
    assert len([name for name in got if name.startswith("rlsd/")]) == 11
    assert ours.state.log_history[0]["entropy"] == pytest.approx(
        theirs.state.log_history[0]["entropy"], abs=1e-4
    )


def test_evaluation_needs_no_hints(folder):
    held_out = Dataset.from_list(without("solution"))
    trainer, _ = run(
        RLSDTrainer, folder, more={"eval_dataset": held_out}, eval_strategy="steps", eval_steps=1,
        per_device_eval_batch_size=8, max_steps=1,
    )
    (record,) = [r for r in trainer.state.log_history if "eval_loss" in r]
    assert "eval_reward" in record and "eval_rlsd/delta_mean" not in record


def test_unused_columns_may_be_removed(folder):
    trainer, _ = run(RLSDTrainer, folder, remove_unused_columns=True, max_steps=1)
    assert "rlsd/delta_mean" in trainer.state.log_history[0]


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-2,
          "optim": "adamw_torch", "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("kind", ["snapshot", "ema", pytest.param("base", marks=pytest.mark.slow)])
def test_resume_is_exact(folder, tmp_path, kind):
    options = {**SAVING, "teacher_model_kind": kind, "teacher_sync_steps": 3,
               "output_dir": str(tmp_path)}
    whole, _ = run(RLSDTrainer, folder, **options)
    trainer, _ = make(RLSDTrainer, folder, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, p in parameters(whole).items():
        assert torch.equal(parameters(trainer)[name], p), name
    for ours, theirs in zip(trainer.teacher.model, whole.teacher.model, strict=True):
        assert torch.equal(ours, theirs)
    last = [t.state.log_history[3]["rlsd/delta_mean"] for t in (trainer, whole)]
    assert last[0] == last[1]


def test_resume_needs_the_teacher(folder, tmp_path):
    options = {**SAVING, "output_dir": str(tmp_path), "max_steps": 2}
    run(RLSDTrainer, folder, **options)
    for complaint, kind in (("snapshot teacher, but .* 'ema'", "ema"), ("no teacher", "snapshot")):
        trainer, _ = make(RLSDTrainer, folder, **{**options, "teacher_model_kind": kind})
        with pytest.raises(UserError, match=complaint) as error:
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        one_sentence(error)
        os.remove(tmp_path / "checkpoint-2" / "rlsd_teacher.pt") if kind == "ema" else None


LORA = LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.mark.parametrize("reference", [GRPOTrainer, PlainHookA], ids=["grpo", "rlsd"])
def test_an_adapter_trains_alike_and_is_all_that_is_copied(folder, reference):
    options = {
        "more": {"peft_config": LORA}, "max_steps": 3, "gradient_accumulation_steps": 2,
        "teacher_sync_steps": 2, "rlsd_lambda_decay_steps": 9,
        **(OFF if reference is GRPOTrainer else {}),
    }
    _, want = run(reference, folder, **options)
    trainer, got = run(RLSDTrainer, folder, **options)
    loss, gradient = differences(got, want)
    assert loss < 2e-6 and gradient < 5e-5 and trainer.obstacle is None
    if trainer.teacher:
        copied = sum(p.numel() for p in trainer.teacher.model)
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        assert copied == sum(p.numel() for p in trained) < trainer.model.num_parameters() / 4


def test_resume_with_an_adapter(folder, tmp_path):
    options = {**SAVING, "output_dir": str(tmp_path), "more": {"peft_config": LORA},
               "teacher_sync_steps": 3}
    whole, _ = run(RLSDTrainer, folder, **options)
    trainer, _ = make(RLSDTrainer, folder, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, p in parameters(whole).items():
        assert torch.equal(parameters(trainer)[name], p), name


def test_shards_need_a_live_teacher(folder):
    trainer, _ = make(RLSDTrainer, folder)
    trainer.is_fsdp_enabled = True
    with pytest.raises(UserError, match="FSDP and DeepSpeed shard .* use 'live'") as error:
        trainer._require_teachable(trainer.args)
    one_sentence(error)


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    spec = importlib.util.spec_from_file_location("trl_rlsd", ROOT / "examples" / "trl_rlsd.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    trainer = example.main(warm_up_steps=20, max_steps=5)
    assert trainer.obstacle is None and "rlsd/delta_mean" in trainer.state.log_history[0]


@pytest.mark.slow
@pytest.mark.parametrize("options", ["ddp-grpo", "ddp-rlsd"])
def test_two_processes(folder, options):
    """DDP over gloo: each rank's losses and gradients are the reference trainer's."""
    make(RLSDTrainer, folder)
    script = Path(__file__).with_name("trl_ranks.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), options],
            env=os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "MASTER_ADDR": "localhost", "MASTER_PORT": "29613", "OMP_NUM_THREADS": "1",
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            }, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)
