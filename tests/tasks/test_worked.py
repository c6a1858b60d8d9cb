"""Sums with worked solutions: right, deterministic, and never a question that is shown solved."""

import re

import pytest

from rlsd import TrainConfig, UserError
from rlsd.tasks.data import load_rows, question
from rlsd.tasks.rewards import load_reward_funcs, require_scorable
from rlsd.tasks.scorers import exact_match
from rlsd.tasks.worked import MOST_TURNS, TASKS

EVERY = pytest.mark.parametrize("task", TASKS)


def asked(row):
    return row["prompt"][-1]["content"]


@EVERY
def test_the_worked_solutions_are_right(task):
    rows = load_rows(f"worked:{task}", size=10**6)
    assert len(rows) == {"add3": 729, "seqadd": 72}[task] - MOST_TURNS
    for row in rows:
        numbers = list(map(int, re.findall(r"\d+", asked(row))))
        if task == "seqadd":
            assert asked(row).endswith("three times.")
            numbers = [numbers[0], *[numbers[1]] * 3]
        assert row["solution"] == str(sum(numbers))
        *steps, last = row["privileged_context"].splitlines()
        assert last == f"#### {row['solution']}" and len(steps) == len(numbers) - 1
        total = numbers[0]
        for step, number in zip(steps, numbers[1:], strict=True):
            assert step == f"{total} + {number} = {total + number}"
            total += number
    functions = load_reward_funcs(["exact_match"], TrainConfig())
    require_scorable(functions, rows[:20])
    answers = [row["privileged_context"] for row in rows]
    wrong = [f"#### {int(row['solution']) + 1}" for row in rows]
    solutions = [row["solution"] for row in rows]
    assert set(exact_match(None, answers, solutions)) == {1.0}
    assert set(exact_match(None, wrong, solutions)) == {0.0}


@EVERY
def test_solved_questions_are_never_asked(task):
    for turns in (0, 1, MOST_TURNS):
        rows = load_rows(f"worked:{task}:{turns}", size=10**6, seed=turns)
        chats = {str(row["prompt"][:-1]) for row in rows}
        assert len(chats) == 1  # the same solved turns before every question, under any seed
        solved = [m["content"] for m in rows[0]["prompt"][1:-1]]
        assert [m["role"] for m in rows[0]["prompt"]] == [
            "system", *["user", "assistant"] * turns, "user"
        ]
        everyone = [asked(row) for row in rows]
        assert len(solved) == 2 * turns and not set(solved[::2]) & set(everyone)
        assert len(set(everyone)) == len({question(row) for row in rows}) == len(rows)


def test_the_seed_fixes_the_rows():
    first, again, other = (load_rows("worked:add3", size=50, seed=s) for s in (1, 1, 2))
    assert first == again and len(first) == 50
    assert [asked(r) for r in first] != [asked(r) for r in other]


@pytest.mark.parametrize("spec, sentence", [
    ("worked:add4", "knows the tasks add3, seqadd, but not 'add4'"),
    ("worked:", "knows the tasks add3, seqadd, but not ''"),
    ("worked:add3:x", "from 0 to 8, but got 'x'"), ("worked:add3:9", "from 0 to 8, but got '9'"),
    ("worked:add3:-1", "from 0 to 8, but got '-1'"), ("worked:add3:²", "from 0 to 8, but got '²'"),
])
def test_what_is_not_there_is_one_sentence(spec, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_rows(spec)
