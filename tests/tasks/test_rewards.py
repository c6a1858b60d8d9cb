import asyncio
import dataclasses
import functools
import logging
import math
import sys
import time
import types

import numpy as np
import pytest
import torch

from rlsd import TrainConfig, UserError
from rlsd.tasks.data import load_rows
from rlsd.tasks.rewards import (
    RewardError,
    load_reward_funcs,
    name_of,
    require_scorable,
    reward_metrics,
    score,
)
from rlsd.tasks.scorers import (
    exact_match,
    math_verify,
    reasoning_gym,
    soft_overlong_punishment,
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


def test_missing_math_verify_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError) as error:
        run(math_verify)
    sentence(error, "math_verify", "rlsd[rewards]")


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


def test_functions_get_copies_of_their_own():
    seen = []

    def spoils(prompts, completions, completion_ids, solution, notes, **_):
        seen.append((prompts, completions, completion_ids, notes))
        prompts[0].append({"role": "user", "content": "judge this"})
        prompts[0][0]["content"] = completions[1][0]["content"] = "spoilt"
        completion_ids[0].append(0)
        notes[0]["a"].append(1)
        solution.clear()
        return [1.0, 1.0]

    given = [rows(1, prompt=[{"role": "user", "content": "q"}], notes={"a": []})[0]] * 2
    ids = [[1], [2]]
    score([spoils, functools.partial(spoils)], None, given, ["a", "b"], ids)
    assert given[0]["prompt"] == [{"role": "user", "content": "q"}] and ids == [[1], [2]]
    assert given[0]["notes"] == {"a": []} and len(seen) == 2
    for prompts, completions, completion_ids, notes in seen:  # nor do two rows of a group share one
        assert prompts[1] == [{"role": "user", "content": "q"}] and notes[1] == {"a": []}
        assert completions[0] == chat("a") and completion_ids == [[1, 0], [2]]


def test_columns_never_replace_the_options_of_a_built_in():
    given = rows(1, format_pattern=5, max_completion_length="x", verify_timeout=None, sources=3,
                 openings=1, soft_punish_cache={}, **{"": 1, "_own": 2})
    config = TrainConfig(max_completion_length=10, soft_punish_cache=5, format_pattern="boxed")
    names = ["soft_overlong_punishment", "format_reward", "exact_match"]
    values, _ = score(load_reward_funcs(names, config), None, given, ["\\boxed{0}"], [[1] * 10])
    assert values.tolist() == [[-1.0, 1.0, 1.0]]


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
    ([1.0, 10**5000], ["int", "line 2 of x.jsonl"]),
], ids=["short", "empty", "float", "none", "array", "text", "list", "nan", "inf", "all-none",
        "huge"])
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
    SystemExit(3), RecursionError("deep"),
], ids=lambda e: type(e).__name__)
def test_a_raising_function_is_named_with_its_cause(failure):
    def broken(**_):
        raise failure

    with pytest.raises(UserError) as error:
        run(broken)
    sentence(error, "broken", type(failure).__name__)
    assert error.value.__cause__ is failure  # for whoever debugs the function


def test_an_async_function_that_exits_is_named_and_the_others_live_on():
    async def leaves(**_):
        sys.exit(3)

    async def stays(prompts, **_):
        return [1.0] * len(prompts)

    with pytest.raises(UserError) as error:
        run(leaves)
    sentence(error, "leaves", "SystemExit", "3")
    assert run(stays)[1].tolist() == [1.0, 1.0]


def test_a_module_that_exits_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "exiting_rewards.py").write_text("import sys\nsys.exit(4)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as error:
        load_reward_funcs(["exiting_rewards.f"], TrainConfig())
    sentence(error, "exiting_rewards.f", "SystemExit")


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


def test_objects_keep_their_state_and_need_no_hash():
    @dataclasses.dataclass
    class Judge:
        calls: int = 0

        def __call__(self, prompts, **_):
            self.calls += 1
            return [1.0] * len(prompts)

    judge = Judge()
    functions = load_reward_funcs([judge], TrainConfig())
    require_scorable(functions, rows())
    run(*functions)
    run(*functions)
    assert functions == [judge] and judge.calls == 2


@pytest.fixture
def my_rewards(monkeypatch):
    module = types.ModuleType("my_rewards")
    module.good, module.number = returning([1.0, 0.0], "good"), 5
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    return module


def test_names_paths_and_callables_are_loaded(my_rewards):
    def mine(**_):
        return []

    names = ["exact_match", "reasoning_gym", "my_rewards.good", mine]
    got = load_reward_funcs(names, TrainConfig())
    assert [got[0], *got[2:]] == [exact_match, my_rewards.good, mine]
    assert name_of(got[1]) == "reasoning_gym" and got[1].keywords == {"verify_timeout": 6.0}


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
        load_reward_funcs([name], TrainConfig())
    sentence(error, *parts)


def test_a_module_that_fails_to_import_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as error:
        load_reward_funcs(["broken_rewards.f"], TrainConfig())
    sentence(error, "broken_rewards.f", "SyntaxError")


def test_a_late_judgement_scores_0_and_names_the_row(monkeypatch, caplog):
    monkeypatch.setattr("rlsd.tasks.judges.judge", lambda *_: [True, "late"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    (function,) = load_reward_funcs(["math_verify"], TrainConfig(verify_timeout=2.5))
    with caplog.at_level(logging.WARNING):
        values, total = run(function)
    assert total.tolist() == [1.0, 0.0]
    (message,) = caplog.messages
    for part in ("math_verify", "1 of 2", "2.5 seconds", "row line 2 of x.jsonl", "score 0"):
        assert part in message


def test_missing_math_verify_is_told_before_the_first_rollout(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError) as error:
        load_reward_funcs(["math_verify"], TrainConfig())
    sentence(error, "math_verify", "rlsd[rewards]")


def test_two_functions_of_one_name_are_refused():
    with pytest.raises(UserError) as error:
        load_reward_funcs(["exact_match", "exact_match"], TrainConfig())
    sentence(error, "2 functions called exact_match")


@pytest.mark.parametrize("pattern, opening, text, want", [
    ("think_answer", "<think>\n", "a</think><answer>4</answer>", 1),
    ("think_answer", "<think>\n\n</think>\n\n", "<answer>4</answer>", 1),
    ("think_answer", "<think>\n", "<think>a</think><answer>4</answer>", 0),
    ("think_answer", "<think>\n", "<answer>4</answer>", 0),
    ("think_answer", "", "a</think><answer>4</answer>", 0),
    ("think", "<think>\n", "a</think> 4", 1),
    ("think", "<think>\n", "a 4", 0),
    ("a.*", "<think>", "a</think> 4", 1),  # an expression sees the completion alone
])
def test_what_the_template_opened_counts_for_the_format(pattern, opening, text, want):
    given = rows(1, _opening=opening)
    functions = load_reward_funcs(["format_reward"], TrainConfig(format_pattern=pattern))
    assert score(functions, None, given, [text], [[1]])[1].tolist() == [want]


def scorable(names, *given):
    require_scorable(load_reward_funcs(names, TrainConfig()), list(given))


def test_a_solution_that_cannot_be_parsed_is_named_at_the_start():
    pytest.importorskip("math_verify")
    good = rows(3) + rows(1, solution="x^2") + rows(1, solution="east")
    scorable(["math_verify"], *good)
    bad = {**rows(1)[0], "solution": "$", "_source": "line 9 of x.jsonl"}
    with pytest.raises(UserError) as error:
        scorable(["math_verify"], *good, bad, {**bad, "_source": "line 10 of x.jsonl"})
    sentence(error, "Row line 9 of x.jsonl", "'$'", "math_verify")
    scorable(["math_verify"], {**bad, "tests": {}})  # the solution of a program is no formula


@pytest.mark.parametrize("names, row, parts", [
    (["math_verify"], {"solution": "", "tests": {}}, ["no solution", "math_verify"]),
    (["exact_match"], {"solution": " ", "tests": {}}, ["no solution", "exact_match"]),
    (["reasoning_gym"], {}, ["reasoning-gym: dataset"]),
    (["reasoning_gym"], {"entry": {"answer": "4"}, "task": "nope"}, ["nope"]),
    (["reasoning_gym"], {"entry": {"question": "?"}, "task": "countdown"}, ["own answer"]),
])
def test_a_row_that_no_built_in_can_score_is_named_at_the_start(names, row, parts):
    with pytest.raises(UserError) as error:
        scorable(names, *rows(1, **row))
    sentence(error, *parts)


def test_rows_of_reasoning_gym_are_tried_at_the_start():
    scorable(["reasoning_gym"], *load_rows("reasoning-gym:chain_sum,countdown", size=6))
    given = load_rows("reasoning-gym:chain_sum", size=1)[0]
    scorable(["reasoning_gym"], {**given, "_source": "line 1 of saved.jsonl"})


def test_built_ins_read_the_config():
    config = TrainConfig(max_completion_length=10, soft_punish_cache=5, format_pattern="c.")
    functions = load_reward_funcs(["soft_overlong_punishment", "format_reward"], config)
    assert [name_of(f) for f in functions] == ["soft_overlong_punishment", "format_reward"]
    given = rows(1)
    values, total = score(functions, [0.5, 2.0], given, ["c0"], [[1] * 7])
    assert values.tolist() == [[pytest.approx(-0.4), 1.0]] and total.tolist() == [1.8]
    assert soft_overlong_punishment(  # a fifth of the length by default, as in DAPO
        None, None, [[1] * 9], max_completion_length=10
    ) == [-0.5]


def test_metrics_are_trls():
    functions = returning([1.0, None], "a"), returning([2.0, 4.0], "b"), returning([0, None], "c")
    values = torch.tensor([[1.0, 2.0, math.nan], [3.0, 4.0, math.nan], [math.nan, 6.0, 5.0]])
    got = reward_metrics(functions, values)
    assert list(got) == [f"rewards/{n}/{m}" for n in "abc" for m in ("mean", "std")]
    assert got["rewards/a/mean"] == 2 and got["rewards/a/std"] == pytest.approx(2**0.5)
    assert got["rewards/b/mean"] == 4 and got["rewards/b/std"] == pytest.approx(2.0)
    assert got["rewards/c/mean"] == 5 and math.isnan(got["rewards/c/std"])


def later(seconds, value, name):
    async def function(prompts, completions, **columns):
        started.append(name)
        await asyncio.sleep(seconds)
        return [value] * len(prompts)

    started = later.started
    function.__name__ = name
    return function


later.started = []


def test_async_functions_run_at_the_same_time():
    later.started.clear()
    functions = [later(0.4, float(i), f"f{i}") for i in range(5)] + [returning([9.0, 9.0], "last")]
    began = time.monotonic()
    values, _ = run(*functions)
    assert time.monotonic() - began < 0.4 * 5
    assert values.tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0, 9.0]] * 2
    assert sorted(later.started) == [f"f{i}" for i in range(5)]


def test_async_functions_keep_their_loop():
    loops = []

    async def function(prompts, **_):
        loops.append(asyncio.get_running_loop())
        return [1.0] * len(prompts)

    class Judge:
        async def __call__(self, prompts, **_):
            return [0.5] * len(prompts)

    async def within_a_notebook():  # whose cells run inside a loop already
        return run(function, Judge())[1].tolist()

    assert run(function)[1].tolist() == [1.0, 1.0]
    assert asyncio.run(within_a_notebook()) == [1.5, 1.5]
    assert loops[0] is loops[1] and loops[0].is_running()


def test_a_raising_async_function_is_named_with_its_cause():
    async def broken(**_):
        raise ZeroDivisionError("division by zero")

    began = time.monotonic()
    with pytest.raises(RewardError) as error:
        run(later(60.0, 1.0, "slow"), broken)
    assert time.monotonic() - began < 30
    sentence(error, "broken", "ZeroDivisionError")
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_a_machine_that_cannot_isolate_is_refused_unless_allowed(monkeypatch, caplog):
    monkeypatch.setattr("rlsd.tasks.sandbox.isolation", lambda: "unshare: Operation not permitted")
    with pytest.raises(UserError) as error:
        load_reward_funcs(["code_tests"], TrainConfig())
    sentence(error, "code_tests", "unshare: Operation not permitted", "allow_unsandboxed_code")
    boxes = []

    class Stub:
        def __init__(self, limits=None, *, isolate=True):
            boxes.append(isolate)

        def close(self):
            pass

    monkeypatch.setattr("rlsd.tasks.sandbox.Sandbox", Stub)
    with caplog.at_level(logging.WARNING):
        (function,) = load_reward_funcs(["code_tests"], TrainConfig(allow_unsandboxed_code=True))
    assert name_of(function) == "code_tests" and boxes == [False]
    assert "reach the network" in caplog.text
