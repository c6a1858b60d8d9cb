"""The built-in reward functions, one completion at a time."""

import time

import pytest

from rlsd import UserError
from rlsd.tasks.data import load_rows
from rlsd.tasks.sandbox import Run, Sandbox, isolation
from rlsd.tasks.scorers import (
    code_tests,
    exact_match,
    format_reward,
    math_verify,
    reasoning_gym,
    soft_overlong_punishment,
    text_of,
)


def chat(text):
    return [{"role": "assistant", "content": text}]


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
    ("72", "<answer>72</answer>", 1),  # math-verify knows no tags
    ("72", "<answer>The sum is $72$.</answer> \\boxed{5}", 1),
    ("5", "<answer>72</answer> \\boxed{5}", 0),
    ("So it is.\n#### 72", "$72$", 1),
    ("10 dollars", "\\$10", 1),
    ("\\$10", "\\boxed{10 dollars}", 1),
    ("10", "\\boxed{\\$10}", 1),
    ("10 dollars", "\\boxed{11 dollars}", 0),
    ("1 000", "$1000$", 1),
    ("1000", "\\boxed{1 000}", 1),
    ("1000", "\\boxed{1\\,000}", 1),
    ("5 cm", "\\boxed{5\\text{ cm}}", 1),
    ("BADC", "\\boxed{BADC}", 1),
    ("BADC", "\\boxed{ABCD}", 0),
    ("east", "\\boxed{\\text{East}}.", 1),
    ("east", "The answer is **east**.", 1),
    ("east", "seat", 0),
    ("east", "\\boxed{seat}", 0),
    ("\\text{east}", "\\boxed{east}", 1),
    ("\\text{east}", "\\boxed{teas}", 0),
    ("no", "on", 0),
    ("B, A, C", "\\boxed{B,A,C}", 1),
    ("B, A, C", "\\boxed{A, B, C}", 0),
    ("1, 2", "\\boxed{2, 1}", 1),  # roots have no order
    ("No solution", "\\boxed{\\text{no solution}}", 1),
]


@pytest.mark.parametrize("solution, completion, want", MATHS, ids=lambda x: f"{x}"[:24])
def test_math_verify(solution, completion, want):
    pytest.importorskip("math_verify")
    for text in (completion, chat(completion)):
        assert math_verify(None, [text], solution=[solution]) == [want]


def test_math_verify_leaves_out_what_it_cannot_parse():
    pytest.importorskip("math_verify")
    assert math_verify(None, ["$4$", "$4$"], solution=["4", "$"]) == [1.0, None]


@pytest.mark.parametrize("solution", [m[0] for m in MATHS[:18]] + ["a\nb", "}{", "\\frac{1}{"])
def test_a_solution_equals_itself(solution):
    pytest.importorskip("math_verify")
    texts = [solution, f"<answer>{solution}</answer>", f"so #### {solution}"]
    assert math_verify(None, texts, solution=[solution] * 3) == [1.0] * 3


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


def test_an_expression_that_hangs_on_a_text_scores_it_0(caplog):
    texts = ["aaa", "a" * 40 + "b", "b"]
    assert format_reward(
        None, texts, format_pattern="(a+)+", verify_timeout=1.0, sources=["x", "line 7", "z"]
    ) == [1.0, 0.0, 0.0]
    assert "format_reward could not judge 1 of 3" in caplog.text and "row line 7" in caplog.text


@pytest.mark.parametrize("pattern", ["think_answer", "think", "boxed"])
def test_named_formats_are_linear(pattern):
    began = time.perf_counter()
    for mark in ("<think>", "</think>", "\\boxed{", "<answer>", "{", " "):
        format_reward(None, ["<think>" + mark * (200_000 // len(mark))], format_pattern=pattern)
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize("said", [
    "#### Final answer\n\\boxed{{{}}}", "<answer>\\boxed{{{}}}</answer>", "#### \\boxed{{{}}}",
    "#### {}\nSo it is.", "\\boxed {{{}}}", "\\fbox{{{}}}", "{}",
])
def test_a_right_answer_scores_in_every_form(said):
    assert exact_match(None, [said.format(42), said.format(43)], solution=["42"] * 2) == [1, 0]
    (given,) = load_rows("reasoning-gym:chain_sum", size=1)
    right, wrong = given["solution"], str(int(given["solution"]) + 1)
    got = reasoning_gym(None, [said.format(right), said.format(wrong)], entry=[given["entry"]] * 2,
                        task=["chain_sum"] * 2)
    assert got[0] == 1 and got[1] < 1


@pytest.mark.parametrize("length, want", [
    # L_max 20, L_cache 5: free up to 15, then (15 - |y|) / 5.
    (0, 0), (15, 0), (16, -0.2), (18, -0.6), (20, -1), (21, -1), (99, -1),
])
def test_soft_overlong_punishment_is_daposs_equation_13(length, want):
    got = soft_overlong_punishment(
        None, None, [[7] * length], max_completion_length=20, soft_punish_cache=5
    )
    assert got == pytest.approx([want])


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
