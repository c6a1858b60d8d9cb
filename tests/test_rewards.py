import functools
import math
import sys
import types

import numpy as np
import pytest
import torch

from rlsd import UserError
from rlsd.data import load_rows
from rlsd.rewards import (
    BUILT_IN,
    exact_match,
    final_answer,
    load_reward_funcs,
    math_verify,
    name_of,
    reasoning_gym,
    score,
    text_of,
)


def chat(text):
    return [{"role": "assistant", "content": text}]


def rows(n=2, **columns):
    return [
        {"prompt": f"q{i}", "solution": str(i), "_source": f"line {i + 1} of x.jsonl",
         "prompt_ids": [7], "teacher_prompt_ids": None, **columns}
        for i in range(n)
    ]


def run(*functions, weights=None, given=None):
    given = rows() if given is None else given
    texts = [f"c{i}" for i in range(len(given))]
    return score(functions, weights, given, texts, [[i] for i in range(len(given))])


def returning(value, name="mine"):
    def function(prompts, completions, **columns):
        return value

    function.__name__ = name
    return function


def sentence(error, *parts):
    message = str(error.value)
    assert message.endswith(".") and not message.endswith("..") and "\n" not in message, message
    for part in parts:
        assert str(part) in message, message


@pytest.mark.parametrize("text, want", [
    ("42", "42"),
    ("  42\n", "42"),
    ("so <answer> 42 </answer>", "42"),
    ("<answer>1</answer> no, <answer>2</answer>", "2"),
    ("<answer>two\nlines</answer>", "two\nlines"),
    ("<answer>1</answer> #### 2", "1"),  # the tag wins
    ("a #### 1 #### 2", "2"),
    ("#### 1 \\boxed{3}", "1 \\boxed{3}"),  # then the marker
    ("\\boxed{1} then \\boxed{2}", "2"),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{x^{2}} or \\boxed{\\frac{\\sqrt{3}}{2}}.", "\\frac{\\sqrt{3}}{2}"),
    ("<answer>unclosed", "<answer>unclosed"),
    ("\\boxed{unclosed", "\\boxed{unclosed"),
    ("", ""),
])
def test_final_answer(text, want):
    assert final_answer(text) == want


def test_text_of_a_chat_is_its_last_message():
    assert text_of("a") == "a" and text_of([*chat("a"), *chat("b")]) == "b"


@pytest.mark.parametrize("wrap", [str, chat], ids=["text", "chat"])
def test_exact_match(wrap):
    cases = [("#### 4", "4", 1), ("4", " 4 ", 1), ("4.0", "4", 0), ("four", "4", 0), ("", "4", 0)]
    got = exact_match(None, [wrap(c) for c, _, _ in cases], solution=[s for _, s, _ in cases])
    assert got == [w for _, _, w in cases] and all(type(x) is float for x in got)


@pytest.mark.parametrize("wrap", [str, chat], ids=["text", "chat"])
def test_reasoning_gym_uses_the_tasks_own_scorer(wrap):
    given = load_rows("reasoning-gym:chain_sum,spell_backward", size=4)
    right = [row["solution"] for row in given]
    columns = {"entry": [r["entry"] for r in given], "task": [r["task"] for r in given]}
    wrong = ["<answer>#</answer>"] * 4
    tagged = [wrap(f"I say <answer>{s}</answer>") for s in right]
    assert reasoning_gym(None, tagged, **columns) == [1.0] * 4
    assert max(reasoning_gym(None, [wrap(w) for w in wrong], **columns)) < 1
    assert reasoning_gym(None, tagged[::-1], **columns) != [1.0] * 4


@pytest.mark.parametrize("columns", [{}, {"entry": [None, None]}, {"entry": [{"a": 1}, None]}])
def test_reasoning_gym_needs_its_own_rows(columns):
    with pytest.raises(UserError, match="reasoning-gym: dataset"):
        reasoning_gym(None, ["4", "4"], **columns)


MATHS = [  # (solution, completion, score)
    ("72", "The answer is $72$.", 1),
    ("72", "The answer is $73$.", 0),
    ("0.5", "so $\\boxed{\\frac{1}{2}}$", 1),
    ("\\frac{1}{2}", "$0.5$", 1),
    ("x^2+1", "$1+x^2$", 1),
    ("3x+1", "$1+3x$", 1),
    ("3x+1", "$3$", 0),  # read as plain text, the solution 3x+1 would be 3
    ("\\sqrt{2}", "$\\sqrt{2}$", 1),
    ("$\\frac{3}{4}$", "$0.75$", 1),
    ("\\boxed{12}", "$12$", 1),
    ("x=3", "$3$", 1),
    ("1,000", "$1000$", 1),
    ("$5", "$5$", 1),  # a price, not an open formula
    ("50%", "$50\\%$", 1),
    ("(1,2)", "$(1,2)$", 1),
    ("(1,2)", "$(2,1)$", 0),
    ("72", "no idea", 0),
    ("72", "", 0),
]


@pytest.mark.parametrize("solution, completion, want", MATHS, ids=lambda x: f"{x}"[:24])
def test_math_verify(solution, completion, want):
    pytest.importorskip("math_verify")
    for text in (completion, chat(completion)):
        assert math_verify(None, [text], solution=[solution]) == [want]


def test_math_verify_leaves_out_what_it_cannot_parse():
    pytest.importorskip("math_verify")
    assert math_verify(None, ["$4$", "$4$"], solution=["4", "$"]) == [1.0, None]


def test_missing_math_verify_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError) as error:
        run(math_verify)
    sentence(error, "math_verify", ".[rewards]")


def test_functions_get_trls_arguments_by_keyword():
    seen = {}

    def reward(*args, **kwargs):
        assert not args
        seen.update(kwargs)
        return [0.0, 1.0]

    given = rows()
    given[0]["level"], given[1]["_hidden"] = 3, "x"
    score([reward], None, given, ["a", "b"], [[5, 1], [6]])
    assert seen == {
        "prompts": ["q0", "q1"], "completions": ["a", "b"], "completion_ids": [[5, 1], [6]],
        "solution": ["0", "1"], "level": [3, None],
    }


def test_chat_prompts_get_chat_completions():
    seen = []
    given = rows()
    given[1]["prompt"] = [{"role": "user", "content": "q1"}]

    def reward(completions, **_):
        seen.extend(completions)
        return [1.0, 1.0]

    score([reward], None, given, ["a", "b"], [[1], [1]])
    assert seen == ["a", chat("b")]


def test_weighted_sum_of_several_functions():
    functions = returning([1, 0.5], "a"), returning([0.0, 2.0], "b")
    values, total = run(*functions, weights=[1.0, 0.1])
    assert values.dtype == total.dtype == torch.float64
    assert values.tolist() == [[1.0, 0.0], [0.5, 2.0]]
    assert total.tolist() == [1.0, 0.7]
    assert run(*functions)[1].tolist() == [1.0, 2.5]  # no weights: all 1


def test_none_counts_nothing_and_shows_as_nan():
    values, total = run(returning([None, 1.0]), returning([2.0, None]), weights=[1.0, 3.0])
    assert values.isnan().tolist() == [[True, False], [False, True]]
    assert total.tolist() == [6.0, 1.0]


@pytest.mark.parametrize("got", [
    [True, False], (1.0, 0.0), [np.float32(1), np.int64(0)], [1, 0],
], ids=["bool", "tuple", "numpy", "int"])
def test_any_real_number_is_a_reward(got):
    assert run(returning(got))[1].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("got, parts", [
    ([1.0], ["list of 2 numbers", "1 values"]),
    ([], ["list of 2 numbers", "0 values"]),
    (1.0, ["list of 2 numbers", "float"]),
    (None, ["list of 2 numbers", "NoneType"]),
    (np.ones(2), ["list of 2 numbers", "ndarray"]),
    ([1.0, "1"], ["'1'", "line 2 of x.jsonl"]),
    ([[1.0], 1.0], ["[1.0]", "line 1 of x.jsonl"]),
    ([1.0, math.nan], ["nan", "line 2 of x.jsonl", "None"]),
    ([math.inf, 1.0], ["inf", "line 1 of x.jsonl"]),
    ([1.0, None], ["Every reward function", "line 2 of x.jsonl"]),
], ids=["short", "empty", "float", "none", "array", "text", "list", "nan", "inf", "all-none"])
def test_a_bad_result_is_one_sentence(got, parts):
    with pytest.raises(UserError) as error:
        run(returning(got))
    sentence(error, *parts)
    assert ("mine" in str(error.value)) == ("Every reward function" not in parts)


def test_all_none_needs_every_function_to_be_none():
    values, total = run(returning([1.0, None]), returning([None, 0.0]))
    assert total.tolist() == [1.0, 0.0]
    with pytest.raises(UserError, match="line 2 of x.jsonl"):
        run(returning([1.0, None]), returning([0.0, None]))


@pytest.mark.parametrize("failure", [
    ZeroDivisionError("division by zero"), ValueError("two\nlines."), KeyError("x"), RuntimeError(),
], ids=lambda e: type(e).__name__)
def test_a_raising_function_is_named_with_its_cause(failure):
    def broken(**_):
        raise failure

    with pytest.raises(UserError) as error:
        run(broken)
    sentence(error, "broken", type(failure).__name__)
    assert error.value.__cause__ is failure  # for whoever debugs the function


def test_a_function_that_takes_no_columns_is_named():
    def narrow(prompts, completions):
        return [1.0, 1.0]

    with pytest.raises(UserError) as error:
        run(narrow)
    sentence(error, "narrow", "TypeError", "completion_ids")


def test_a_user_error_keeps_its_sentence():
    with pytest.raises(UserError) as error:
        run(reasoning_gym)
    sentence(error, "reasoning_gym failed", "reasoning-gym: dataset")


def test_objects_are_named_by_their_type():
    class Judge:
        def __call__(self, **_):
            return [1.0]

    assert name_of(Judge()) == "Judge" and name_of(exact_match) == "exact_match"
    assert name_of(functools.partial(exact_match)) == "partial"
    with pytest.raises(UserError) as error:
        run(Judge())
    sentence(error, "Judge", "1 values")


@pytest.fixture
def my_rewards(monkeypatch):
    module = types.ModuleType("my_rewards")
    module.good, module.number = returning([1.0, 0.0]), 5
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    return module


def test_names_paths_and_callables_are_loaded(my_rewards):
    def mine(**_):
        return []

    got = load_reward_funcs([*BUILT_IN, "my_rewards.good", mine])
    assert got == [exact_match, reasoning_gym, math_verify, my_rewards.good, mine]


@pytest.mark.parametrize("name, parts", [
    ("exact_mach", ["exact_match", "reasoning_gym", "math_verify", "dotted path"]),
    ("my_rewards.bad", ["my_rewards.bad", "bad"]),
    ("no_such_module.f", ["no_such_module.f", "No module named"]),
    ("my_rewards.number", ["my_rewards.number", "not callable"]),
    (".good", [".good"]),
    ("my_rewards.", ["my_rewards."]),
])
def test_a_name_that_cannot_be_loaded_is_one_sentence(my_rewards, name, parts):
    with pytest.raises(UserError) as error:
        load_reward_funcs([name])
    sentence(error, *parts)


def test_a_module_that_fails_to_import_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as error:
        load_reward_funcs(["broken_rewards.f"])
    sentence(error, "broken_rewards.f", "SyntaxError")
