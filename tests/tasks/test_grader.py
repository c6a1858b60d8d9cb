"""Programs found in completions, and judged by tests of every form."""

import time

import pytest

from rlsd.tasks.data import read_tests
from rlsd.tasks.grader import passes, program_of
from rlsd.tasks.sandbox import Limits, isolation

needs_sandbox = pytest.mark.skipif(
    isolation() != "ok", reason=f"programs cannot be isolated here: {isolation()}"
)
ADD = "def add(a, b):\n    return a + b\n"
ECHO = "import sys\nprint(sum(map(int, sys.stdin.read().split())))"
STREAMS = {"inputs": ["1 2\n", "3\n4\n"], "outputs": ["3\n", "7"]}
CALLS = {"inputs": [[1, 2], [3, 4]], "outputs": [3, [7]], "fn_name": "add"}  # APPS wraps a 7


@needs_sandbox
@pytest.mark.parametrize("program, tests, want", [
    (ECHO, STREAMS, 1), ("print(3)", STREAMS, 0), ("print(input())", STREAMS, 0),
    (ECHO + "\nraise SystemExit(1)", STREAMS, 0),
    (ADD, CALLS, 1), (ADD.replace("+", "-"), CALLS, 0),
    # As LeetCode: the type is imported already.
    ("class Solution:\n    def add(self, a: int, b: int) -> List:\n        return a + b", CALLS, 1),
    (ADD + "if __name__ == '__main__':\n    print(add(input(), 1))", CALLS, 1),
    ("def add(a, b):\n    print('noise', end='')\n    return a + b", CALLS, 1),
    (ADD, ["assert add(1, 2) == 3", "assert add(2, 2) == 4"], 1),
    (ADD, ["assert add(1, 2) == 3", "assert add(2, 2) == 5"], 0),
    ("import sys; sys.exit(0)", ["assert add(1, 2) == 3"], 0),
    ("import os; os._exit(0)", ["assert add(1, 2) == 3"], 0),
    ("def f(:", ["assert True"], 0),
    ('x = """', ["assert True"], 0),  # an open text cannot swallow the tests
    ("    return a + b", {"asserts": "def check(f):\n    assert f(1, 2) == 3\ncheck(add)",
                          "prefix": "def add(a, b):\n", "entry_point": "add"}, 1),
    (ADD, {"asserts": "def check(f):\n    assert f(1, 2) == 3\ncheck(add)",
           "prefix": "def add(a, b):\n", "entry_point": "add"}, 1),
    ("print(1 / 3)", {"inputs": [""], "outputs": ["0.33333333"]}, 1),
    ("print(100000001)", {"inputs": [""], "outputs": ["100000000"]}, 0),
    ("class Any:\n    def __eq__(self, x): return True\ndef add(a, b): return Any()", CALLS, 0),
], ids=str)
def test_passes(program, tests, want):
    assert passes(program, read_tests(tests), Limits(seconds=30.0)) == want


@pytest.mark.parametrize("text, want", [
    ("a\n```python\nx = 1\n```\nb\n```\ny\n```\n", "x = 1\n"),
    ("```python\n1\n```\n```py\n2\n```", "2\n"),
    ("```\n1\n```", "1\n"),
    ("```cpp\n1\n```\n```python\n2\n```", "2\n"),
    ("<think>\n```python\n1\n```\n</think>\n```python\n2\n```", "2\n"),
    ("<think>```python\n1\n```</think>print(3)", "print(3)"),
    ("print(3)", "print(3)"),
    ("```python\nprint(1)", "```python\nprint(1)"),  # cut off: not a program
    ("~~~python\n1\n~~~", "1\n"),
    ("~~~~ python3\n```\n~~~\n~~~~", "```\n~~~\n"),  # closed by its own kind, as long
    ("````python\n```\n````", "```\n"),
    ("```{.python}\n1\n```\n```text\n2\n```", "1\n"),
    ("1. So:\n   ```python\n   if 1:\n       2\n   ```", "if 1:\n    2\n"),
    ("<answer>```python\n1\n```</answer>", "1\n"),
    ("<answer>print(3)</answer>", "print(3)"),
])
def test_program_of(text, want):
    assert program_of(text) == want


DEFINED = "```python\ndef add(a, b):\n    return a + b\n```\nUse it so:\n```python\n{}\n```\n"


@pytest.mark.parametrize("tests", [
    {"cases": [[[1, 2], 3]], "fn_name": "add"}, {"asserts": "assert add(1, 2) == 3"},
    {"asserts": "def check(f):\n    assert f(1, 2) == 3\ncheck(add)", "entry_point": "add"},
])
@pytest.mark.parametrize("example", ["print(add(1, 2))", "assert add(1, 2) == 3", "$ python x"])
def test_an_example_that_follows_the_solution_is_not_graded(tests, example):
    assert program_of(DEFINED.format(example), tests) == "def add(a, b):\n    return a + b\n"
    better = "def add(a, b):\n    return b + a"  # a second attempt is
    assert program_of(DEFINED.format(better), tests) == better + "\n"


def test_of_programs_that_are_fed_the_last_that_reads_counts():
    streams = {"cases": [["1", "2"]], "fn_name": None}
    text = "```python\nx = input()\n```\n```python\n{}\n```"
    assert program_of(text.format("main('1')"), streams) == "x = input()\n"
    assert program_of(text.format("y = input()"), streams) == "y = input()\n"
    assert program_of("```python\n1\n```\n```python\n2\n```", streams) == "2\n"


def test_finding_a_program_is_linear():
    began = time.perf_counter()
    for mark in ("```python\n", "```\n", "~~~\n", "```a`\n", " ", "<answer>", "def f(x):\n"):
        program_of(mark * (400_000 // len(mark)), {"asserts": "f(1)"})
    assert time.perf_counter() - began < 10


@needs_sandbox
@pytest.mark.parametrize("result", ["10 ** 5000", "deep"])
def test_a_value_that_no_json_holds_fails(result):
    program = (
        "import json, sys\nsys.set_int_max_str_digits(0)\nsys.setrecursionlimit(10**6)\n"
        f"deep = []\nfor _ in range(5000): deep = [deep]\ndef add(a, b):\n    return {result}\n"
    )
    assert not passes(program, read_tests(CALLS), Limits(seconds=30.0))


@needs_sandbox
def test_an_entry_point_needs_no_prefix():
    tests = read_tests({"asserts": "assert True", "entry_point": "add"})
    assert passes("x = 1", tests, Limits(seconds=30.0))
