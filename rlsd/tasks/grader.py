"""Programs against tests: finding one in a completion, and judging what it does in the sandbox.

What a program prints, or what the function it defines returns (as JSON), is compared outside of the
sandbox. Assertions run inside, after the program and in its module; they count when the line after
the last of them is reached, so that code which replaces what they call can cheat them.
"""

import json
import math
import re
import secrets

from .sandbox import Sandbox


def program_of(text):
    """The last fenced block of a completion, preferably of Python, else all after its thoughts."""
    text = text.rpartition("</think>")[2]
    fence = r"^[ \t]*```([^\n`]*)\n(.*?)^[ \t]*```"
    blocks = re.findall(fence, text, flags=re.DOTALL | re.MULTILINE)
    python = [code for tag, code in blocks if tag.strip().lower() in ("python", "py", "python3")]
    return (python or [code for _, code in blocks] or [text])[-1]


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
                program = tests["prefix"] + program
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
                    json.loads(told[0].removeprefix(mark)), wanted
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


def _returned(got, wanted):
    """Equality of JSON values; APPS wraps what is wanted in a list of one."""
    wanted = json.loads(json.dumps(wanted))
    return _equal(got, wanted) or (
        isinstance(wanted, list) and len(wanted) == 1 and _equal(got, wanted[0])
    )


def _equal(a, b):
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(b, float) and isinstance(a, int | float) and not isinstance(a, bool):
        return _near(a, b)
    return type(a) is type(b) and a == b
