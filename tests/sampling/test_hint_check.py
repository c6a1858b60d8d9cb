"""`rlsd hints`: gaps against a naive loop, 0 for an empty hint, and what it says of them."""

import dataclasses
import json

import pytest
import torch
from runs import naive_log_probs, options, problems, quick, write_rows  # noqa: F401

from rlsd.cli import main
from rlsd.config import make_config
from rlsd.policy.advantages import group_advantages
from rlsd.policy.checkpoint import load_model, load_tokenizer
from rlsd.policy.distributed import Processes
from rlsd.policy.hints import contrast_hints, teacher_prompts
from rlsd.policy.models import open_policy
from rlsd.sampling import hint_check
from rlsd.sampling.hint_check import (
    auc,
    check_hints,
    first_leaving,
    gap_metrics,
    gaps,
    hint_table,
    sibling_gaps,
)
from rlsd.sampling.rollout import Rollout, roll_out
from rlsd.tasks.data import load_data


@pytest.fixture
def parts(tmp_path):
    """config, tokenizer, model of save_tiny, opened policy, tokenised rows"""
    config = make_config(options(tmp_path))
    tokenizer = load_tokenizer(config.model_name_or_path)
    model = load_model(config.model_name_or_path, "cpu")
    rows, _ = load_data(config, tokenizer)
    policy = open_policy(model, tokenizer.pad_token_id, config)
    return config, tokenizer, model, policy, rows


def constant(prompts, completions, completion_ids, **columns):
    return [float(sum(ids) % 2) for ids in completion_ids]


def rolled(parts, rows):
    config, tokenizer, model, _, _ = parts
    torch.manual_seed(0)
    return roll_out(model, tokenizer, rows, config, [constant], Processes(config))


def test_gaps_equal_a_naive_loop_over_the_same_ids(parts):
    config, tokenizer, model, policy, rows = parts
    out = rolled(parts, rows)
    got = gaps(policy, out, config)
    largest = 0.0
    for i, row in enumerate(out.rows):
        ids = out.completion_ids[i][out.mask[i]].tolist()
        with torch.no_grad():
            teacher, student = (
                naive_log_probs(model, row[name], ids, config)
                for name in ("teacher_prompt_ids", "prompt_ids")
            )
        want = (teacher - student).double()
        torch.testing.assert_close(got[i][out.mask[i]], want, rtol=1e-4, atol=1e-4)
        assert (got[i][~out.mask[i]] == 0).all()
        largest = max(largest, want.abs().max().item())
    assert largest > 0.1  # the hint matters to this model


@pytest.mark.parametrize("source, count", [("data", 2), ("rollout", 2), ("rollout", 0)])
def test_by_siblings_as_the_options_say(source, count, parts):
    """Against naive passes after the hints that a training step would take."""
    config, tokenizer, model, policy, rows = parts
    config = dataclasses.replace(config, hint_source=source, rlsd_contrast_hints=count)
    out = rolled(parts, [row for row in rows[:2] for _ in range(config.num_generations)])
    assert 0 < sum(out.rewards.tolist()) < len(out.rows)
    gap, given = sibling_gaps(policy, tokenizer, out, config)
    advantages = group_advantages(out.rewards, config.num_generations, config.scale_rewards)
    read = out, advantages, config.rlsd_lambda, 1, tokenizer, config
    hints = contrast_hints(*read) or [p and [p] for p in teacher_prompts(*read)]
    assert given == [bool(h) for h in hints] and any(given)
    for i, (prompts, row) in enumerate(zip(hints, out.rows, strict=True)):
        ids = out.completion_ids[i][out.mask[i]].tolist()
        if not prompts:
            continue
        with torch.no_grad():
            right, *wrong = (naive_log_probs(model, p, ids, config) for p in prompts)
            against = naive_log_probs(model, row["prompt_ids"], ids, config)
        if wrong:
            against = torch.stack(wrong).exp().mean(0).log()
        want = (right - against).double()
        torch.testing.assert_close(gap[i][out.mask[i]], want, rtol=1e-4, atol=1e-4)
    m = check_hints(policy, tokenizer, rows, config, [constant], Processes(config))
    assert m["sibling_right_samples"] + m["sibling_wrong_samples"] <= 16
    assert "By siblings" in "\n".join(hint_table(m))


def test_an_empty_hint_leaves_no_gap(parts):
    config, _, _, policy, rows = parts
    same = [{**row, "teacher_prompt_ids": row["prompt_ids"]} for row in rows]
    assert (gaps(policy, rolled(parts, same), config) == 0).all()


def test_auc_and_where_an_answer_leaves():
    assert auc([2.0, 3.0], [1.0, 0.0]) == 1.0 and auc([1.0], [1.0]) == 0.5
    assert auc([0.0, 2.0], [1.0, 3.0]) == 0.25 and auc([], [1.0]) is None
    assert first_leaving([1, 2, 3], [1, 2, 4]) == 2 and first_leaving([1, 2], [1, 2, 3]) is None
    assert first_leaving([1, 2, 3], [1, 2]) == 2 and first_leaving([9], [1]) == 0


def test_metrics_of_known_gaps():
    """Two questions with two answers: right without leaving, wrong from its second token on."""
    ids = torch.tensor([[5, 6, 1], [5, 7, 1], [5, 6, 1], [8, 6, 1]])
    gap = torch.tensor([[0.3, 0, 0], [0.3, -3, 0.6], [0, 0, -0.9], [-0.6, 0, 0]]).double()
    rewards = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    out = Rollout(
        [None] * 4, ids, torch.ones(4, 3, dtype=torch.bool), [""] * 4,
        torch.zeros(4, dtype=torch.bool), rewards[:, 0], rewards, None,
    )
    m = gap_metrics(gap, out, [[5, 6, 1]] * 4, 2)
    assert m["auc"] == 0.75 and m["auc_within_question"] == 0.5 and m["questions_with_both"] == 2
    assert m["right_gap"] == pytest.approx(-0.1) and m["wrong_gap"] == pytest.approx(-0.45)
    assert m["right_leaving"] == 0 and m["right_gap_first_leaving"] is None
    assert m["wrong_leaving"] == 2 and m["wrong_gap_first_leaving"] == pytest.approx(-1.8)
    assert m["wrong_gap_before_leaving"] == pytest.approx(0.3)
    assert m["wrong_gap_after_leaving"] == pytest.approx(0.2)
    assert m["wrong_first_leaving_negative"] == 1.0


def test_check_hints_counts_what_was_sampled(parts):
    config, tokenizer, _, policy, rows = parts
    m = check_hints(policy, tokenizer, rows, config, [constant], Processes(config))
    assert m["questions"] == 4 and m["samples_each"] == 4
    assert m["right_samples"] + m["wrong_samples"] == 16
    assert m["student_pass@1"] == pytest.approx(m["right_samples"] / 16)
    assert m["teacher_prompt_mean"] > m["student_prompt_mean"]
    assert m["student_pass@1_low"] <= m["student_pass@1"] <= m["student_pass@1_high"]


def test_shorter_answers_after_the_hint_are_said(parts):
    config, tokenizer, _, policy, rows = parts
    m = check_hints(policy, tokenizer, rows, config, [constant], Processes(config))
    for share, said in ((0.7, "30% shorter"), (0.9, None), (1.2, None)):
        m["teacher_completion_mean"] = share * m["student_completion_mean"]
        text = "\n".join(hint_table(m))
        assert ("shorter" in text) == bool(said) and (said or "") in text


def test_the_command(tmp_path, capsys):
    given = options(tmp_path)
    arguments = [x for name in ("model_name_or_path", "train_dataset", "privileged_template")
                 for x in (f"--{name}", given[name])]
    arguments += ["--device", "cpu", "--eval_size", "4", "--max_completion_length", "6",
                  "--num_generations", "2", "--reward_funcs", "exact_match"]
    output = tmp_path / "hints.json"
    assert main(["hints", *arguments, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    saved = json.loads(output.read_text())
    assert "4 questions, 2 answers to each" in printed
    assert saved["hint_placement"] == "text" and saved["versions"]["torch"] == torch.__version__
    for name in ("student", "teacher"):
        assert f"{saved[f'{name}_pass@1']:.3f}" in printed


@pytest.mark.parametrize("changed, sentence", [
    ({"model_name_or_path": ""}, "rlsd hints needs --model_name_or_path"),
    ({"train_dataset": ""}, "rlsd hints needs --train_dataset"),
    ({"eval_size": "0"}, "eval_size is 0"),
    ({"output": "missing/x.json"}, "--output missing/x.json names a folder that does not exist"),
])
def test_mistakes_are_one_sentence(changed, sentence, tmp_path, capsys):
    given = {k: options(tmp_path)[k] for k in ("model_name_or_path", "train_dataset")} | changed
    assert main(["hints", *[f"--{k}={v}" for k, v in given.items()]]) == 2
    assert sentence in capsys.readouterr().err


def test_rows_without_hints_are_named(parts):
    config, tokenizer, _, policy, rows = parts
    bare = [{**row, "teacher_prompt_ids": None} for row in rows]
    with pytest.raises(hint_check.UserError, match="No row has a hint"):
        check_hints(policy, tokenizer, bare, config, [constant], Processes(config))
