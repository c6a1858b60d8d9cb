"""The trainer against a naive loop, and what a run promises: teachers, metrics, files."""

import copy
import gc
import json
import math
import warnings
import weakref

import pyarrow.parquet
import pytest
import torch
import transformers
import yaml
from families import build
from runs import (
    TEMPLATE,
    assert_same,
    make_trainer,
    naive_run,
    parameters,
    problems,
    quick,  # noqa: F401
    relative_distance,
    without_times,
    write_rows,
)

import rlsd.reports.report
import rlsd.sampling.samplers
import rlsd.trainer
from rlsd.config import make_config
from rlsd.policy.models import STUDENT, TEACHER, adapter_weights
from rlsd.tasks.data import rows_of_step

# Measured over the cases below: 1e-6, once 1e-4 where Adam normalises a gradient that is nearly 0;
# a lambda that is off by 2 % gives 8e-3 and more.
NOISE = 1e-3


def record_rollouts(monkeypatch):
    rollouts, real = [], rlsd.trainer.roll_out

    def recorded(*args, **kwargs):
        rollouts.append(real(*args, **kwargs))
        return rollouts[-1]

    monkeypatch.setattr(rlsd.trainer, "roll_out", recorded)
    return rollouts


def run_steps(trainer, count):
    """Parameters after every optimizer step of `count` rollout steps, and the metrics."""
    after, metrics = [], []
    trainer.optimizer.register_step_post_hook(lambda *_: after.append(parameters(trainer.model)))
    for step in range(1, count + 1):
        metrics.append(trainer.train_step(step)[0])
        trainer.step = step
    return after, metrics


CASES = {
    "rlsd": {},
    "grpo": {"objective": "grpo"},
    "rlsd-lambda1-eps1": {"rlsd_lambda": 1.0, "rlsd_reweight_clip_range": 1.0},
    "loss-grpo": {"loss_type": "grpo"},
    "loss-bnpo": {"loss_type": "bnpo"},
    "loss-dr_grpo": {"loss_type": "dr_grpo"},
    "beta": {"beta": 0.3},
    "grpo-beta": {"objective": "grpo", "beta": 0.3, "temperature": 0.7},
    "temperature": {"temperature": 0.7},
    "live-teacher": {"teacher_model_kind": "live"},
    # The second pass is off-policy, so that the ratio, its clips and the dual clip act.
    "iterations-2": {"num_iterations": 2, "epsilon": 0.05, "epsilon_high": 0.08, "delta": 1.1},
    "iterations-2-live": {"num_iterations": 2, "teacher_model_kind": "live", "epsilon": 0.05},
    "iterations-2-old-delta": {"num_iterations": 2, "rlsd_delta_source": "old_log_probs"},
    "iterations-2-beta": {"num_iterations": 2, "beta": 0.3, "loss_type": "grpo"},
    "old-delta": {"rlsd_delta_source": "old_log_probs"},
    "negative-only": {"rlsd_negative_only": True},
    "negative-only-iterations-2": {"rlsd_negative_only": True, "num_iterations": 2},
    "masked-truncated": {"mask_truncated_completions": True},
    "masked-truncated-grpo": {"mask_truncated_completions": True, "loss_type": "grpo"},
    "unshared-prompts": {"share_prompts": "false"},
    "shared-prompts-micro-batches": {"share_prompts": "true", "per_device_train_batch_size": 3},
    "weight-decay-micro-batches": {"weight_decay": 0.1, "per_device_train_batch_size": 3},
    "padding-free": {"padding_free": True, "per_device_train_batch_size": 5},
    "padding-free-tokens": {"padding_free": True, "max_tokens_per_micro_batch": 50, "beta": 0.1},
    "tokens": {"max_tokens_per_micro_batch": 60, "num_iterations": 2},
    "gradient-checkpointing": {"gradient_checkpointing": True, "beta": 0.1},
    "gradient-checkpointing-live": {"gradient_checkpointing": True, "teacher_model_kind": "live"},
    "lora": {"use_peft": True, "lora_r": 4},
    "lora-base-beta": {"use_peft": True, "lora_r": 4, "teacher_model_kind": "base", "beta": 0.3},
    "lora-live-iterations-2": {
        "use_peft": True, "lora_r": 4, "teacher_model_kind": "live", "num_iterations": 2,
    },
    "lora-all-at-once": {
        "use_peft": True, "lora_r": 4, "padding_free": True, "gradient_checkpointing": True,
        "max_tokens_per_micro_batch": 50, "weight_decay": 0.1,
    },
}


@pytest.mark.parametrize("changed", CASES.values(), ids=CASES)
def test_two_steps_equal_a_naive_loop(changed, tmp_path, monkeypatch):
    rollouts = record_rollouts(monkeypatch)
    trainer = make_trainer(tmp_path, **changed)
    start = copy.deepcopy(trainer.model)
    first = parameters(start)
    got, _ = run_steps(trainer, 2)
    want = naive_run(trainer, start, rollouts)
    assert len(got) == len(want) == 2 * trainer.config.num_iterations
    for k, (ours, naive) in enumerate(zip(got, want, strict=True)):
        error = relative_distance(ours, naive, first)
        assert error < NOISE, f"optimizer step {k + 1}: {error:.2g} of the distance moved"


def test_absolute_positions_and_dropout_equal_a_naive_loop(tmp_path, monkeypatch):
    # Rotary positions hide a wrong count of left padding, and the model above has no dropout.
    make_trainer(tmp_path)
    torch.manual_seed(5)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5,
        eos_token_id=1, bos_token_id=None, pad_token_id=0, attn_pdrop=0.5, resid_pdrop=0.5,
        embd_pdrop=0.5,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    rollouts = record_rollouts(monkeypatch)
    trainer = make_trainer(tmp_path, beta=0.1, num_iterations=2)
    start = copy.deepcopy(trainer.model).eval()
    first = parameters(start)
    got, _ = run_steps(trainer, 2)
    want = naive_run(trainer, start, rollouts)
    for ours, naive in zip(got, want, strict=True):
        # A key's bias has no gradient under softmax, and Adam makes steps of its rounding noise.
        naive.pop("transformer.h.0.attn.c_attn.bias")
        assert relative_distance(ours, naive, first) < NOISE


def test_naive_loop_covers_rows_without_privileged_context(tmp_path, monkeypatch):
    rows = [row | ({"privileged_context": ""} if i % 2 else {})
            for i, row in enumerate(problems(12))]
    write_rows(tmp_path / "train.jsonl", rows)
    rollouts = record_rollouts(monkeypatch)
    trainer = make_trainer(tmp_path, allow_missing_privileged_context=True)
    start = copy.deepcopy(trainer.model)
    first = parameters(start)
    got, _ = run_steps(trainer, 2)
    want = naive_run(trainer, start, rollouts)
    assert {bool(row["privileged_context"]) for row in rollouts[0].rows} == {True, False}
    assert relative_distance(got[-1], want[-1], first) < NOISE


def test_rows_without_privileged_context_train_as_plain_grpo(tmp_path):
    write_rows(
        tmp_path / "train.jsonl", [row | {"privileged_context": " "} for row in problems(12)]
    )
    rlsd_run = make_trainer(tmp_path, allow_missing_privileged_context=True)
    grpo_run = make_trainer(tmp_path, objective="grpo")
    assert_same(run_steps(rlsd_run, 2)[0][-1], run_steps(grpo_run, 2)[0][-1])


@pytest.mark.parametrize(
    "changed",
    [{}, {"loss_type": "grpo", "beta": 0.1}, {"num_iterations": 2},
     {"mask_truncated_completions": True, "loss_type": "dr_grpo"}],
    ids=["rlsd", "loss-grpo-beta", "iterations-2", "masked-dr_grpo"],
)
def test_micro_batch_size_does_not_change_the_update(changed, tmp_path):
    results = {}
    for size in (1, 3, 64):  # one by one, an uneven last part, all at once
        trainer = make_trainer(tmp_path, per_device_train_batch_size=size, **changed)
        start = parameters(trainer.model)
        after, metrics = run_steps(trainer, 2)
        results[size] = after, metrics
    for size in (1, 3):
        assert relative_distance(results[size][0][-1], results[64][0][-1], start) < NOISE
        for name in ("loss", "grad_norm", "entropy", "rlsd/delta_std", "rlsd/weight_mean_neg"):
            got, want = (results[k][1][0][name] for k in (size, 64))
            assert got == pytest.approx(want, rel=1e-4, abs=1e-6), name


def count_teacher_forwards(trainer):
    calls = []
    trainer.teacher.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_no_teacher_forward_after_lambda_has_decayed(tmp_path):
    trainer = make_trainer(tmp_path, rlsd_lambda_decay_steps=2, teacher_model_kind="base")
    calls, counts = count_teacher_forwards(trainer), []
    _, metrics = run_steps(trainer, 3)
    trainer.step = 0
    for step in (1, 2, 3):
        calls.clear()
        trainer.train_step(step)
        counts.append(len(calls))
    assert counts == [2, 0, 0]  # over prompts and over completions
    assert [m["rlsd/effective_lambda"] for m in metrics] == [0.25, 0.0, 0.0]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_no_teacher_forward_without_signal(beta, tmp_path):
    trainer = make_trainer(
        tmp_path, reward=lambda completions, **columns: [0.9] * len(completions), beta=beta
    )
    calls = count_teacher_forwards(trainer)
    run_steps(trainer, 1)
    assert not calls


def test_teacher_scores_only_blamed_sequences_when_negative_only(tmp_path, monkeypatch):
    rollouts = record_rollouts(monkeypatch)
    trainer = make_trainer(tmp_path, rlsd_negative_only=True)
    sizes = []
    trainer.teacher.model.base_model.register_forward_hook(
        lambda module, arguments, output: sizes.append(len(output.last_hidden_state))
    )
    run_steps(trainer, 1)
    groups = rollouts[0].rewards.view(-1, 4)
    assert sizes[-1] == (groups < groups.mean(1, keepdim=True)).sum()  # after their prompts


@pytest.mark.parametrize("changed", [{"objective": "grpo"}, {"rlsd_lambda": 0.0}],
                         ids=["grpo", "lambda-0"])
def test_no_teacher_is_built_where_none_is_used(changed, tmp_path):
    trainer = make_trainer(tmp_path, **changed)
    assert trainer.teacher is None
    assert all(row["teacher_prompt_ids"] is None for row in trainer.rows)


def test_rollout_without_signal_makes_no_step(tmp_path):
    trainer = make_trainer(
        tmp_path, reward=lambda completions, **columns: [0.9] * len(completions),
        weight_decay=0.5,
    )
    before = parameters(trainer.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PyTorch complains that the schedule moves on although no optimizer step was made.
        warnings.filterwarnings("ignore", message="Detected call of .lr_scheduler.step")
        after, metrics = run_steps(trainer, 2)
    assert after == [] and not trainer.optimizer.state
    assert_same(parameters(trainer.model), before)
    assert metrics[0]["frac_reward_zero_std"] == 1 and metrics[0]["live_sequences"] == 0
    assert all(math.isfinite(value) for value in metrics[0].values())


def test_all_truncated_and_masked_makes_no_step(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, mask_truncated_completions=True, beta=0.1)
    # An end that never comes.
    monkeypatch.setattr(rlsd.sampling.samplers, "eos_ids", lambda *_: [1000])
    before = parameters(trainer.model)
    _, metrics = run_steps(trainer, 1)
    assert metrics[0]["completions/clipped_ratio"] == 1 and metrics[0]["live_sequences"] == 0
    assert metrics[0]["rlsd/active_token_frac"] == metrics[0]["loss"] == 0
    assert_same(parameters(trainer.model), before)


def scoring_weights(trainer, adapter=None):
    """What the teacher runs with; of one adapter under its plain names."""
    if adapter is None:
        return parameters(trainer.teacher.model)
    named = adapter_weights(trainer.model, adapter)
    return {name: p.detach().clone() for name, p in named.items()}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["live", "base", "snapshot", "ema"])
def test_teacher_follows_its_rule_through_the_trainer(kind, lora, tmp_path):
    trainer = make_trainer(
        tmp_path, teacher_model_kind=kind, teacher_sync_steps=2, teacher_ema_rate=0.25,
        use_peft=lora, lora_r=2,
    )
    assert (trainer.teacher.model is trainer.model) == (lora or kind == "live")
    if lora:
        frozen = {n: p for n, p in parameters(trainer.model).items() if ".lora_" not in n}
    own = STUDENT if lora else None
    theirs = {"base": None, "live": own}.get(kind, TEACHER) if lora else None
    want = start = scoring_weights(trainer, own) if lora else parameters(trainer.model)
    for step in range(1, 6):
        trainer.train_step(step)
        student = scoring_weights(trainer, own) if lora else parameters(trainer.model)
        if kind == "snapshot" and step % 2 == 0 or kind == "live":
            want = student
        elif kind == "ema":
            want = {n: want[n] + 0.25 * (student[n] - want[n]) for n in want}
        if lora and kind == "base":
            continue  # no weights of its own: the naive loop covers it
        got = scoring_weights(trainer, theirs)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-6, msg=name)
            assert step == 1 or not torch.equal(student[name], start[name]), name
    if lora:
        now = parameters(trainer.model)
        assert_same({name: now[name] for name in frozen}, frozen)


def test_load_balancing_of_experts_does_not_depend_on_micro_batches(tmp_path):
    make_trainer(tmp_path)
    model = build("qwen3-moe")
    model.config.output_router_logits = False
    model.save_pretrained(tmp_path / "model")
    results = []
    for coefficient, changed in (
        (0.5, {}), (0.5, {"per_device_train_batch_size": 3}),
        (0.5, {"max_tokens_per_micro_batch": 50, "padding_free": True, "num_iterations": 1}),
        (None, {}),
    ):
        trainer = make_trainer(tmp_path, router_aux_loss_coef=coefficient, **changed)
        start = parameters(trainer.model)
        after, metrics = run_steps(trainer, 2)
        results.append((after[-1], metrics[0]))
    for after, metrics in results[1:3]:
        assert relative_distance(after, results[0][0], start) < NOISE
        assert metrics["aux_loss"] == pytest.approx(results[0][1]["aux_loss"], rel=1e-4)
        assert metrics["loss"] == pytest.approx(results[0][1]["loss"], abs=1e-5)
    assert results[0][1]["aux_loss"] > 0.5 and results[3][1]["aux_loss"] == 0
    assert relative_distance(results[3][0], results[0][0], start) > 0.1


def test_bf16_micro_batches_agree_and_masters_are_saved(tmp_path):
    results = []
    for size in (3, 64):
        trainer = make_trainer(
            tmp_path, bf16=True, per_device_train_batch_size=size, max_steps=1,
            output_dir=str(tmp_path / str(size)), validate_every=1,
        )
        masters = trainer.weights.masters
        start = [m.detach().clone() for m in masters]
        trainer.train()
        results.append([m.detach() - s for m, s in zip(masters, start, strict=True)])
    error = sum((a - b).norm() ** 2 for a, b in zip(*results, strict=True)) ** 0.5
    # Adam's first step is the gradient's sign: only those that round to either side differ.
    assert error < 0.2 * sum(a.norm() ** 2 for a in results[0]) ** 0.5
    state = torch.load(tmp_path / "64" / "checkpoint-1" / "trainer_state.pt", weights_only=True)
    assert all(m.dtype == torch.float32 for m in state["masters"])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "64" / "checkpoint-1", dtype="auto"
    )
    assert_same(parameters(loaded), parameters(trainer.model))


def test_time_is_split_and_throughput_logged(tmp_path):
    for record in make_trainer(tmp_path, beta=0.1, max_steps=2).train():
        parts = [record[f"time/{name}"] for name in ("rollout", "teacher", "loss", "optim")]
        assert all(part > 0 for part in parts)
        assert sum(parts[1:]) <= record["time/update"]
        assert record["perf/tokens_per_second"] > 0 and record["perf/peak_memory_gb"] > 0.05
        assert "perf/mfu" not in record  # no data sheet for a CPU


def test_seed_fixes_the_run(tmp_path):
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trainer = make_trainer(tmp_path, seed=seed, output_dir=str(tmp_path / name))
        runs[name] = without_times(trainer.train()), parameters(trainer.model)
    assert runs["a"][0] == runs["b"][0] != runs["c"][0]
    assert_same(runs["a"][1], runs["b"][1])
    assert any(not torch.equal(runs["a"][1][n], runs["c"][1][n]) for n in runs["a"][1])


def test_evaluation_does_not_change_training(tmp_path):
    final = []
    for every in (0, 1):
        trainer = make_trainer(tmp_path, eval_steps=every, output_dir=str(tmp_path / str(every)))
        trainer.train()
        final.append(parameters(trainer.model))
    assert_same(*final)


def test_validate_every_logs_deviations(tmp_path):
    records = make_trainer(tmp_path, max_steps=4, validate_every=2).train()
    names = {f"validate/{part}" for part in ("loss", "log_probs", "dh", "dw")}
    for record in records:
        assert names & record.keys() == (names if record["step"] % 2 == 0 else set())
    assert 0 < records[1]["validate/log_probs"] < 1e-5 and records[1]["validate/dw"] < 1e-5


SECTION_5 = {
    *(f"rlsd/{name}" for name in (
        "delta_mean", "delta_std", "delta_mean_pos", "delta_mean_neg", "weight_mean_pos",
        "weight_mean_neg", "clip_low_frac", "clip_high_frac", "effective_lambda",
        "active_token_frac",
    )),
    "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/dual_mean", "kl", "entropy",
    "policy_kl",
}


def test_run_folder_holds_what_it_promises(tmp_path, monkeypatch):
    monkeypatch.setattr(rlsd.trainer, "plot_runs", rlsd.reports.report.plot_runs)
    trainer = make_trainer(
        tmp_path, max_steps=3, eval_steps=2, log_completions_steps=1, save_steps=2, beta=0.1,
        report_to="tensorboard", leak_markers=["#"], rlsd_lambda_decay_steps=10,
    )
    records, run = trainer.train(), tmp_path / "run"
    assert records == [json.loads(line) for line in open(run / "metrics.jsonl")]
    assert [r["step"] for r in records] == [0, 1, 2, 3]
    for record in records[1:]:
        assert record.keys() >= SECTION_5 | {"reward", "loss", "grad_norm", "leak_rate"}
        assert None not in record.values()
        assert record["rlsd/effective_lambda"] == pytest.approx(0.5 * (1 - record["step"] / 10))
        assert record["policy_kl"] == record["clip_ratio/dual_mean"] == 0  # one on-policy pass
    assert records[1]["kl"] == pytest.approx(0, abs=1e-6) and records[3]["kl"] > 1e-4
    assert {r["step"] for r in records if "eval/pass@1_sampled" in r} == {0, 2, 3}

    rows = pyarrow.parquet.read_table(run / "completions" / "step-000001.parquet").to_pylist()
    assert len(rows) == 16 and len(list((run / "completions").iterdir())) == 3
    bound = 0.45 * 0.2 + 1e-6
    by_sign = {1: [], -1: []}
    for row in rows:
        assert "".join(row["tokens"]).startswith(row["completion"][:1])
        assert all(abs(w - 1) <= bound for w in row["token_weights"])
        if row["advantage"]:
            by_sign[1 if row["advantage"] > 0 else -1] += row["token_weights"]
        else:
            assert set(row["token_weights"]) == {1.0}
    for sign, name in ((1, "pos"), (-1, "neg")):
        mean = sum(by_sign[sign]) / len(by_sign[sign])
        assert mean == pytest.approx(records[1][f"rlsd/weight_mean_{name}"], abs=1e-5)
    assert sum(r["reward"] for r in rows) / 16 == pytest.approx(records[1]["reward"])

    assert yaml.safe_load((run / "config.yaml").read_text())["beta"] == 0.1
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((run / "tensorboard").glob("events.*"))[0].stat().st_size > 1000
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    card = (run / "checkpoint-3" / "README.md").read_text()
    assert "RLSD checkpoint, step 3" in card and "| pass@1_sampled |" in card
    loaded = transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoint-3")
    assert_same(parameters(loaded), parameters(trainer.model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "checkpoint-3")
    assert tokenizer("<q> 3 +4")["input_ids"] == trainer.tokenizer("<q> 3 +4")["input_ids"]


def test_epochs_ask_every_question_so_often(tmp_path):
    """8 questions, 4 a step: 1.5 epochs are 3 steps, and a resumed run can be given more."""
    asked, trainer = [], make_trainer(tmp_path, max_steps=None, num_train_epochs=1.5)
    step = trainer.train_step

    def noted(number):
        asked.extend(row["_source"] for row in rlsd.trainer.rows_of_step(
            trainer.rows, trainer.questions, number, trainer.config.seed
        ))
        return step(number)

    trainer.train_step = noted
    assert [r["step"] for r in trainer.train()] == [1, 2, 3]
    assert set(asked[:8]) == {row["_source"] for row in trainer.rows} and len(asked) == 12
    given = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (given["max_steps"], given["num_train_epochs"]) == (None, 1.5)
    resumed = rlsd.trainer.Trainer(
        make_config(given | {"num_train_epochs": 2}), log=lambda *_: None,
        resume_from=tmp_path / "run" / "checkpoint-3",
    )
    assert [r["step"] for r in resumed.train()] == [1, 2, 3, 4]


def test_token_weights_of_negative_only_spare_praised_completions(tmp_path):
    trainer = make_trainer(tmp_path, rlsd_negative_only=True, log_completions_steps=1)
    _, samples = trainer.train_step(1)
    assert all(set(s["token_weights"]) == {1.0} for s in samples if s["advantage"] > 0)
    assert any(set(s["token_weights"]) != {1.0} for s in samples if s["advantage"] < 0)


def test_shuffled_control_gives_every_row_another_hint(tmp_path):
    plain = make_trainer(tmp_path)
    shuffled = make_trainer(tmp_path, shuffle_privileged_context=True)
    for k, (a, b) in enumerate(zip(plain.rows, shuffled.rows, strict=True)):
        other = plain.rows[(k + 1) % len(plain.rows)]["privileged_context"]
        text = TEMPLATE.format(privileged_context=other, prompt=a["prompt"])
        assert b["teacher_prompt_ids"] == plain.tokenizer(text)["input_ids"]
        assert a["prompt_ids"] == b["prompt_ids"] and a["solution"] == b["solution"]
    one, other = run_steps(plain, 1)[1][0], run_steps(shuffled, 1)[1][0]
    assert one["reward"] == other["reward"]  # the same samples, scored with other hints
    assert one["rlsd/delta_mean"] != other["rlsd/delta_mean"]


def test_held_out_questions_are_not_trained_on(tmp_path):
    trainer = make_trainer(tmp_path)
    prompts = [row["prompt"] for row in trainer.rows + trainer.held_out]
    assert prompts == [row["prompt"] for row in problems(12)]
    trained = [rows_of_step(trainer.rows, 4, step, seed=0) for step in range(1, 9)]
    seen = {row["prompt"] for rows in trained for row in rows}
    assert seen == {row["prompt"] for row in trainer.rows}


def test_every_epoch_shows_every_question_once(tmp_path):
    trainer = make_trainer(tmp_path)  # 8 questions, 4 a step
    epochs = [
        [row["prompt"] for step in steps for row in rows_of_step(trainer.rows, 4, step, seed=0)]
        for steps in ((1, 2), (3, 4))
    ]
    assert [len(set(e)) for e in epochs] == [8, 8] and epochs[0] != epochs[1]


def test_finished_trainer_is_freed(tmp_path):
    trainer = make_trainer(tmp_path)
    run_steps(trainer, 1)
    reference = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert reference() is None  # two models and the moments would stay on the device


def first_word_is_seven(completions, **columns):
    return [float(c.split()[:1] == ["7"]) for c in completions]


@pytest.mark.parametrize("objective", ["grpo", "rlsd"])
def test_learning_happens(objective, tmp_path):
    trainer = make_trainer(
        tmp_path, objective=objective, reward=first_word_is_seven, max_steps=16,
        generation_batch_size=128, num_generations=32, per_device_train_batch_size=128,
        learning_rate=3e-2, max_completion_length=2,
    )
    rewards = [r["reward"] for r in trainer.train()]
    assert rewards[0] < 0.2 and sum(rewards[-3:]) / 3 > 0.7, rewards
