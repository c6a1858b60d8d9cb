"""Programs found in completions, and judged by tests of every form."""

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
])
def test_program_of(text, want):
    assert program_of(text) == want
