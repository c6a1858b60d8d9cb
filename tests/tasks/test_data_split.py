"""Questions held out of the training data: how many, which, and none of them in both."""

import dataclasses
import json
import random

import pytest
from test_data import ROW, columns, numbered, options, sentence, tokenizer, write

from rlsd import TrainConfig, UserError
from rlsd.demo_agent import agent_tokenizer
from rlsd.tasks.data import load_data, question


def test_the_tail_is_held_out(tmp_path):
    path = write(tmp_path / "x.jsonl", numbered(10))
    rows, held_out = load_data(options(path, eval_size=3), tokenizer(), pytest.fail)
    assert [row["prompt"] for row in rows] == [f"q{i}" for i in range(7)]
    assert [row["prompt"] for row in held_out] == ["q7", "q8", "q9"]
    assert all(row["teacher_prompt_ids"] is None for row in held_out)


@pytest.mark.parametrize("seed", range(5))
def test_no_held_out_question_occurs_in_training(tmp_path, seed):
    rng = random.Random(seed)
    rows = [{"prompt": f"q{rng.randrange(30)}", "solution": "4"} for _ in range(40)]
    notes = []
    path = write(tmp_path / "x.jsonl", rows)
    train, held_out = load_data(options(path, eval_size=15), tokenizer(), notes.append)
    seen = {row["prompt"] for row in train}
    assert held_out and not seen & {row["prompt"] for row in held_out}
    tail = [row["prompt"] for row in rows[25:]]
    assert [row["prompt"] for row in held_out] == [p for p in tail if p not in seen]
    assert notes == [f"Left out {15 - len(held_out)} held-out questions that occur in training."]


def test_eval_dataset_is_cut_to_eval_size_and_cleaned_of_training_questions(tmp_path):
    train = write(tmp_path / "train.jsonl", numbered(4))
    other = write(tmp_path / "eval.jsonl", numbered(9)[3:])
    notes = []
    config = options(train, eval_dataset=other, eval_size=3)
    rows, held_out = load_data(config, tokenizer(), notes.append)
    assert len(rows) == 4 and [row["prompt"] for row in held_out] == ["q4", "q5"]
    assert notes == ["Left out 1 held-out questions that occur in training."]


def test_reasoning_gym_evaluates_on_other_questions_than_it_trains_on():
    config = TrainConfig(
        train_dataset="reasoning-gym:chain_sum", eval_dataset="reasoning-gym:chain_sum",
        dataset_size=6, eval_size=4,
    )
    rows, held_out = load_data(config, tokenizer())
    # Entry i is seeded with seed + i, so that the next seed would give the same ones, shifted.
    assert len(rows) == 6 and len(held_out) == 4
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in held_out}


@pytest.mark.parametrize("n", [1, 3])
def test_too_few_rows_to_hold_out(tmp_path, n):
    path = write(tmp_path / "x.jsonl", numbered(n))
    with pytest.raises(UserError) as error:
        load_data(options(path, eval_size=3), tokenizer())
    sentence(error, f"{n} rows", "eval_size = 3")


def test_only_training_questions_held_out_is_an_error(tmp_path):
    path = write(tmp_path / "x.jsonl", [ROW] * 4)
    with pytest.raises(UserError) as error:
        load_data(options(path, eval_size=2), tokenizer())
    sentence(error, "Every held-out question")


def test_shuffling_never_brings_a_held_out_hint_into_training(tmp_path):
    rows = [row | {"privileged_context": f"hint{i}"} for i, row in enumerate(numbered(6))]
    path = write(tmp_path / "x.jsonl", rows)
    config = options(path, eval_size=2, shuffle_privileged_context=True)
    train, _ = load_data(config, tokenizer())
    assert sorted(row["privileged_context"] for row in train) == [f"hint{i}" for i in range(4)]


@pytest.mark.parametrize("size, held", [(3, 3), (0.3, 3), (0.01, 1), (9, 9)])
def test_eval_split_size_draws_by_the_seed(tmp_path, size, held):
    path = write(tmp_path / "x.jsonl", numbered(10))
    splits = {}
    for seed in (0, 0, 1):
        rows, held_out = load_data(
            options(path, eval_split_size=size, seed=seed), tokenizer(), pytest.fail
        )
        prompts = columns(rows, "prompt"), columns(held_out, "prompt")
        assert len(prompts[1]) == held and sorted(prompts[0] + prompts[1]) == [
            (f"q{i}",) for i in range(10)
        ]
        assert splits.setdefault(seed, prompts) == prompts
    if size == 3:
        assert splits[0] != splits[1]


@pytest.mark.parametrize("seed", range(5))
def test_repeats_of_a_question_stay_on_one_side(tmp_path, seed):
    rng = random.Random(seed)
    rows = [{"prompt": f"q{' ' * (i % 3)} {rng.randrange(20)}", "solution": "4"} for i in range(40)]
    path, notes = write(tmp_path / "x.jsonl", rows), []
    train, held_out = load_data(
        options(path, eval_split_size=10, seed=seed), tokenizer(), notes.append
    )
    sides = {question(r) for r in train}, {question(r) for r in held_out}
    assert not sides[0] & sides[1] and len(train) + len(held_out) == 40
    assert 7 <= len(held_out) <= 10
    repeated = 40 - len(sides[0]) - len(sides[1])
    assert notes == [
        f"{repeated} of 40 rows repeat another's question; repeats stay on one side of the split."
    ]


def test_a_question_is_the_same_as_a_text_and_as_a_chat():
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2 + 2?\n"}]
    assert question({"prompt": chat}) == question({"prompt": " 2 +  2?"}) == "2 + 2?"
    assert question({"prompt": "2 + 2"}) != question({"prompt": "2 + 3"})


def test_eval_split_size_too_large(tmp_path):
    path = write(tmp_path / "x.jsonl", numbered(4))
    with pytest.raises(UserError) as error:
        load_data(options(path, eval_split_size=4), tokenizer())
    sentence(error, "4 rows", "eval_split_size = 4")
    same = write(tmp_path / "same.jsonl", [ROW] * 4)
    with pytest.raises(UserError) as error:
        load_data(options(same, eval_split_size=2), tokenizer())
    sentence(error, "eval_split_size = 2", "same question")


def test_an_environment_makes_two_questions_of_one_prompt(tmp_path):
    """Its episode hangs on the other columns; without one, equal prompts are one question."""
    rows = [{"prompt": [{"role": "user", "content": "go"}], "solution": "x", "place": k % 3}
            for k in range(6)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "y.jsonl").write_text(
        "".join(json.dumps({**row, "place": 2 + k}) + "\n" for k, row in enumerate(rows[:2])),
        encoding="utf-8",
    )
    run = TrainConfig(
        train_dataset=str(path), eval_dataset=str(tmp_path / "y.jsonl"), objective="grpo",
        environment_factory="rlsd.demo_agent.Store",
    )
    tokenizer = agent_tokenizer()
    kept = [len(part) for part in load_data(run, tokenizer, lambda *_: None)]
    assert kept == [6, 1]
    with pytest.raises(UserError, match="Every held-out question also occurs"):
        load_data(dataclasses.replace(run, environment_factory=None), tokenizer, lambda *_: None)
