"""Programs against tests: finding one in a completion, and judging what it does in the sandbox.

What a program prints, or what the function it defines returns (as JSON), is compared outside of the
sandbox. Assertions run inside, after the program and in its module; they count when the line after
the last of them is reached, so that code which replaces what they call can cheat them.
"""

import json
import math
import re
import secrets

from .answers import tagged
from .sandbox import Sandbox

FENCE = re.compile(r"(?P<indent>[ \t]*)(?:<answer>[ \t]*)?(?P<fence>`{3,}|~{3,})(?P<tag>[^\n`]*)")
PYTHON = ("python", "py", "python3", "{.python}")


def blocks_of(text):
    """(tag, source) of every fenced block that is closed: by CommonMark's rules, but for any
    indentation, which the lines of the block lose."""
    found, opened, lines = [], None, []
    for line in text.split("\n"):
        mark = FENCE.match(line)
        if opened is None:
            if mark:
                opened, lines = mark, []
        elif (
            mark and mark["fence"].startswith(opened["fence"])
            and mark["tag"].strip() in ("", "</answer>")
        ):
            tag = (opened["tag"].split() or [""])[0].lower()
            found.append((tag, "".join(lines)))
            opened = None
        else:
            lines.append(line.removeprefix(opened["indent"]) + "\n")
    return found


def program_of(text, tests=None):
    """The program in a completion: a fenced block, preferably of Python, else all of its answer.

    Of several it is the last that defines what the tests (see data.read_tests) call, or reads
    standard input where they feed it, as an example of its use may follow; else the last.
    """
    text = text.rpartition("</think>")[2]
    blocks = blocks_of(text)
    blocks = [code for tag, code in blocks if tag in PYTHON] or [code for _, code in blocks]
    if not blocks:
        answer = tagged(text)
        return text if answer is None else answer
    return max(enumerate(blocks), key=lambda block: (_fits(block[1], tests or {}), block[0]))[1]


def _fits(code, tests):
    """How many of the names that tests need a block defines; whether it reads standard input."""
    if "cases" in tests and not tests.get("fn_name"):
        return any(sign in code for sign in ("input(", "stdin", "open(0"))
    wanted = {tests.get("fn_name") or tests.get("entry_point")} - {None}
    if not wanted:
        wanted = set(re.findall(r"[^\W\d]\w*(?=\()", tests.get("asserts") or ""))
    defined = re.findall(r"^[ \t]*(?:async[ \t]+def|def|class)[ \t]+(\w+)", code, re.MULTILINE)
    return len(wanted & {*defined, *re.findall(r"^(\w+)[ \t]*=", code, re.MULTILINE)})


# What LeetCode, where tests that name a function come from, imports before a solution.
LEETCODE = "".join(
    f"from {module} import *\n" for module in
    ("math", "itertools", "functools", "bisect", "heapq", "collections", "typing")
) + "import bisect, collections, functools, heapq, itertools, math, random, re, string\n"
CALL = """
import json, os
found = globals().get({name!r}) or getattr(Solution(), {name!r})
result = json.dumps(found(*json.loads({arguments!r})))
os.write(1, ("\\n" + {mark!r} + result + "\\n").encode())
"""


def passes(program, tests, limits, isolate=True):
    """Whether Python source passes all tests (see data.read_tests); stops at the first failure.

    limits: sandbox.Limits of each test. Raises SandboxError where programs cannot run.
    """
    # The random mark tells our line from what the program prints.
    mark, name = secrets.token_hex(16), tests.get("fn_name")
    with Sandbox(limits, isolate=isolate) as box:
        if "asserts" in tests:
            if tests.get("entry_point") and f"def {tests['entry_point']}(" not in program:
                program = (tests.get("prefix") or "") + program
            end = f"import os\nos.write(1, b'\\n{mark}\\n')"
            run = box.run(program, tests["asserts"], end, name="solution")
            return run.outcome == "ok" and mark in run.output.split("\n")
        for given, wanted in tests["cases"]:
            if name is None:
                run = box.run(program, stdin=given)
                good = run.outcome == "ok" and _same_text(run.output, wanted)
            else:
                call = CALL.format(name=name, arguments=json.dumps(given), mark=mark)
                run = box.run(LEETCODE, program, call, name="solution")
                told = [x for x in run.output.split("\n") if x.startswith(mark)]
                good = run.outcome == "ok" and len(told) == 1 and _returned(
                    told[0].removeprefix(mark), wanted
                )
            if not good:
                return False
    return True


def _same_text(got, wanted):
    """Equal up to white space, and to 1e-6 where a number with a fraction is wanted."""
    got, wanted = got.split(), wanted.split()
    return len(got) == len(wanted) and all(
        a == b or "." in b and _near(a, b) for a, b in zip(got, wanted, strict=True)
    )


def _near(a, b):
    try:
        return math.isclose(float(a), float(b), rel_tol=1e-6, abs_tol=1e-6)
    except ValueError:
        return False


def _returned(text, wanted):
    """Whether JSON says the value that is wanted; APPS wraps that in a list of one."""
    wanted = json.loads(json.dumps(wanted))
    try:
        got = json.loads(text)
        return _equal(got, wanted) or (
            isinstance(wanted, list) and len(wanted) == 1 and _equal(got, wanted[0])
        )
    except (ValueError, RecursionError):  # a number or a nesting that no test wants
        return False


def _equal(a, b):
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(b, float) and isinstance(a, int | float) and not isinstance(a, bool):
        return _near(a, b)
    return type(a) is type(b) and a == b
