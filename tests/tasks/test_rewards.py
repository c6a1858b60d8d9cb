import asyncio
import functools
import logging
import math
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch

from rlsd import TrainConfig, UserError
from rlsd.tasks.data import load_rows
from rlsd.tasks.rewards import (
    RewardError,
    code_tests,
    exact_match,
    format_reward,
    load_reward_funcs,
    math_verify,
    name_of,
    reasoning_gym,
    reward_metrics,
    score,
    soft_overlong_punishment,
    text_of,
)
from rlsd.tasks.sandbox import Run, Sandbox, isolation


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
    sentence(error, "math_verify", ".[rewards]")


def test_two_functions_of_one_name_are_refused():
    with pytest.raises(UserError) as error:
        load_reward_funcs(["exact_match", "exact_match"], TrainConfig())
    sentence(error, "2 functions called exact_match")


@pytest.mark.parametrize("pattern, text, want", [
    ("think_answer", "<think>a\nb</think>\n<answer>4</answer>", 1),
    ("think_answer", " <think></think><answer>4</answer>\n", 1),
    ("think_answer", "<think>a</think> so <answer>4</answer>", 0),
    ("think_answer", "<think>a</think><answer>4</answer><answer>5</answer>", 0),
    ("think_answer", "<think><think>a</think></think><answer>4</answer>", 0),
    ("think_answer", "<answer>4</answer><think>a</think>", 0),
    ("think_answer", "x<think>a</think><answer>4</answer>", 0),
    ("think_answer", "", 0),
    ("think", "<think>a</think> 4", 1),
    ("think", "<think>a 4", 0),
    ("think", "<think>a</think> <think>b</think>", 0),
    ("boxed", "so\n\\boxed{\\frac{1}{2}}.", 1),
    ("boxed", "so \\boxed{1", 0),
    (r"#### -?\d+", "#### 12", 1),
    (r"#### -?\d+", "so #### 12", 0),
])
def test_format_reward(pattern, text, want):
    for completion in (text, chat(text)):
        assert format_reward(None, [completion], format_pattern=pattern) == [want]


@pytest.mark.parametrize("length, want", [
    # L_max 20, L_cache 5: free up to 15, then (15 - |y|) / 5.
    (0, 0), (15, 0), (16, -0.2), (18, -0.6), (20, -1), (21, -1), (99, -1),
])
def test_soft_overlong_punishment_is_daposs_equation_13(length, want):
    got = soft_overlong_punishment(
        None, None, [[7] * length], max_completion_length=20, soft_punish_cache=5
    )
    assert got == pytest.approx([want])


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


needs_sandbox = pytest.mark.skipif(
    isolation() != "ok", reason=f"programs cannot be isolated here: {isolation()}"
)
ECHO = "import sys\nprint(sum(map(int, sys.stdin.read().split())))"
STREAMS = {"inputs": ["1 2\n", "3\n4\n"], "outputs": ["3\n", "7"]}


@needs_sandbox
def test_code_tests_grades_the_program_in_each_completion():
    assert code_tests(None, [chat(f"```python\n{ECHO}\n```"), "print(3)"], tests=[
        STREAMS, {"inputs": [""], "outputs": ["3"]}
    ], verify_timeout=30.0) == [1.0, 1.0]


@needs_sandbox
def test_a_program_that_hangs_fails_and_its_neighbours_do_not():
    programs = ["```python\nwhile True: pass\n```", f"```python\n{ECHO}\n```", "no code here"]
    got = code_tests(None, programs * 2, tests=[STREAMS] * 6, verify_timeout=5.0)
    assert got == [0.0, 1.0, 0.0] * 2


def test_rows_without_tests_have_no_score(monkeypatch):
    monkeypatch.setattr(Sandbox, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(Sandbox, "close", lambda self: None)
    monkeypatch.setattr(Sandbox, "run", lambda *_, **__: Run("ok", "3", ""))
    given = {"inputs": ["1"], "outputs": ["3"]}
    assert code_tests(None, ["x", "y"], tests=[None, given]) == [None, 1.0]
    for tests in (None, [None, None]):
        with pytest.raises(UserError, match="needs rows with tests"):
            code_tests(None, ["x", "y"], tests=tests)


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
