"""The built-in reward functions, with TRL's signature: f(prompts, completions, **columns).

exact_match, reasoning_gym (the task's own scorer), math_verify (symbolic equality), format_reward,
soft_overlong_punishment (DAPO), code_tests (programs against tests, sandboxed). A completion that
is wrong in any way scores 0; what is wrong with a row is an error.
"""

import concurrent.futures
import importlib.util
import logging
import os
import re

from ..config import UserError
from ..packages import package
from . import judges
from .answers import (
    is_wording,
    last_boxed,
    quantity,
    readings,
    stated,
    states,
    tagged,
    wording,
)
from .data import read_tests

LOG = logging.getLogger(__name__)
MATH_MISSING = f"it needs {package('math_verify')}"
GYM_MISSING = f"it needs {package('reasoning_gym')}"


def text_of(completion):
    """A completion's text: TRL passes chats as [{"role": "assistant", "content": ...}]."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    if isinstance(text, list):
        text = "".join(part.get("text") or "" for part in text)
    return text or ""


def exact_match(prompts, completions, solution, **columns):
    """1.0 where the answer is the solution or what that ends with, character for character.

    None for a row without solution.
    """
    return [
        None if s is None or not str(s).strip() else float(states(text_of(c), str(s)))
        for c, s in zip(completions, solution, strict=True)
    ]


def reasoning_gym(
    prompts, completions, entry=None, task=None, *, verify_timeout=6.0, sources=None, **columns
):
    """The score, 0 to 1, of the reasoning-gym task that made the row.

    Its scorers, of which some run what a completion says as Python, work in isolated processes.
    What one cannot judge within verify_timeout seconds scores 0 and is told.
    """
    if not entry or not task or any(e is None for e in [*entry, *task]):
        raise UserError("it needs rows from a reasoning-gym: dataset")
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(GYM_MISSING)
    requests = []
    for c, e, name in zip(completions, entry, task, strict=True):
        text = text_of(c)
        wanted = e.get("answer") if isinstance(e, dict) else None
        whole = isinstance(wanted, str) and text.strip() == wanted.strip()
        requests.append(("gym", name, e, [text] if whole else readings(text)))
    scores = _judged("reasoning_gym", requests, verify_timeout, sources)
    for i, got in enumerate(scores):
        if isinstance(got, list):
            where = f"row {sources[i]}" if sources else f"entry {i}"
            raise UserError(f"it cannot score {where} by its own answer ({got[0]})")
    return [got if isinstance(got, float) else 0.0 for got in scores]


def math_verify(
    prompts, completions, solution, *, verify_timeout=6.0, sources=None, **columns
):
    """1.0 where math-verify finds the answer equal to the solution; None if it cannot parse that.

    An answer in words is compared as words, in order. math-verify judges in processes of its own,
    from any thread. What it cannot judge within verify_timeout seconds scores 0, as in verl, and is
    told: None would let a completion dodge its score. TRL leaves out samples that score None; here
    another reward function must cover them.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(MATH_MISSING)
    scores, asked, requests = [None] * len(completions), [], []
    for i, (c, s) in enumerate(zip(completions, solution, strict=True)):
        text, s = text_of(c), "" if s is None else str(s)
        if not s.strip():
            continue
        plain = readings(s)[-1]
        if states(text, s):
            scores[i] = 1.0
        elif is_wording(plain):
            scores[i] = float(wording(plain) in map(wording, stated(text)))
        else:
            asked.append(i)
            requests.append(("equal", solution_readings(plain), _answer_readings(text)))
    told = sources and [sources[i] for i in asked]
    verdicts = _judged("math_verify", requests, verify_timeout, told)
    for i, verdict in zip(asked, verdicts, strict=True):
        scores[i] = None if verdict == judges.UNREADABLE else float(verdict is True)
    return scores


def solution_readings(plain):
    """A solution in the forms that math-verify may parse, the likeliest first."""
    number = quantity(plain)
    if number is not None:
        return [f"${number}$"]
    # Outside of delimiters only numbers are read: the solution 3x+1 would become 3.
    delimited = any(mark in plain for mark in ("$", "\\boxed", "\\(", "\\["))
    return [plain, f"${plain}$"][:: 1 if delimited else -1]


def _answer_readings(text):
    """A completion for math-verify, which knows boxes and formulas but no tags."""
    answer = tagged(text)
    if answer is not None:
        return solution_readings(readings(text)[-1])
    boxed = last_boxed(text)
    number = None if boxed is None else quantity(boxed)
    if number is not None:
        return [f"\\boxed{{{number}}}"]
    return [re.sub(r"\\\$(?=\s?\d)", "", text)]  # a price


def _judged(package, requests, seconds, sources=None):
    """judges.judge, which names the first row of what took too long; UserError where it cannot."""
    try:
        answers = judges.judge(package, requests, seconds)
    except judges.JudgeError as error:
        raise UserError(f"it cannot judge on this machine ({error})") from None
    late = [i for i, got in enumerate(answers) if got == judges.LATE]
    if late:
        where = f"row {sources[late[0]]}" if sources else f"completion {late[0]}"
        LOG.warning(
            "The reward function %s could not judge %d of %d completions within verify_timeout = "
            "%g seconds, first for %s; they score 0.",
            "format_reward" if package == "re" else package, len(late), len(requests), seconds,
            where,
        )
    return answers


# A tag in its place and nowhere else. TRL's think_format_reward is "think".
_REST = r"(?:(?!</?think>|</?answer>).)*"
PATTERNS = {
    "think_answer": rf"\s*<think>{_REST}</think>\s*<answer>{_REST}</answer>\s*",
    "think": r"\s*<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)*",
}


def format_reward(
    prompts, completions, *, format_pattern="think_answer", verify_timeout=6.0, openings=None,
    sources=None, **columns,
):
    """1.0 where the whole completion has the format: a name in PATTERNS, boxed, or a regular
    expression, which scores 0 where it takes more than verify_timeout seconds.

    openings: what a chat template has already written of each turn's thoughts, such as <think>;
    the named formats count it as part of the completion.
    """
    texts = [text_of(c) for c in completions]
    if format_pattern == "boxed":
        return [float(last_boxed(text) is not None) for text in texts]
    if format_pattern in PATTERNS:
        pattern = re.compile(PATTERNS[format_pattern], flags=re.DOTALL)
        turns = [a + b for a, b in zip(openings or [""] * len(texts), texts, strict=True)]
        return [float(pattern.fullmatch(turn) is not None) for turn in turns]
    # All at once, and one by one where some text among them takes too long.
    (found,) = judges.judge("re", [("match", format_pattern, texts)], verify_timeout)
    if not isinstance(found, list):
        requests = [("match", format_pattern, [text]) for text in texts]
        found = [got == [True] for got in _judged("re", requests, verify_timeout, sources)]
    return [float(matched) for matched in found]


def soft_overlong_punishment(
    prompts, completions, completion_ids, *, max_completion_length, soft_punish_cache=None,
    **columns,
):
    """0 for a length |y| <= L_max - L_cache, then (L_max - L_cache - |y|) / L_cache down to -1.

    Equation 13 of DAPO (arXiv 2503.14476), lengths in tokens: L_max is max_completion_length,
    L_cache soft_punish_cache (default: a fifth of L_max, DAPO's 4096 of 20480).
    """
    cache = soft_punish_cache or max(1, max_completion_length // 5)
    free = max_completion_length - cache
    return [min(0.0, max(-1.0, (free - len(ids)) / cache)) for ids in completion_ids]


def code_tests(
    prompts, completions, tests=None, *, verify_timeout=6.0, code_memory_mb=1024,
    allow_unsandboxed_code=False, **columns,
):
    """1.0 where the completion's program passes all tests of its row; None for a row without.

    tests: per row, a form of data.read_tests. A test is one run in the sandbox with the
    standard library alone. What a program prints or a function returns is compared outside of it;
    assertions run inside, and count when the last of them is passed, so that code written to cheat
    them (by replacing what they call) can.
    """
    from .grader import passes, program_of
    from .sandbox import Limits, SandboxError, isolation

    if tests is None or all(t is None for t in tests):
        raise UserError("it needs rows with tests: a tests column, or MBPP, HumanEval or verl rows")
    limits = Limits(seconds=verify_timeout, memory_mb=code_memory_mb)
    isolate = not allow_unsandboxed_code or isolation() == "ok"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1

    def one(completion, given):
        if given is None:
            return None
        wanted = read_tests(given)
        return float(passes(program_of(text_of(completion), wanted), wanted, limits, isolate))

    try:
        with concurrent.futures.ThreadPoolExecutor(min(16, cores)) as pool:
            return list(pool.map(one, completions, tests, timeout=None))
    except SandboxError as error:
        raise UserError(f"it cannot run programs on this machine ({error})") from None


BUILT_IN = {f.__name__: f for f in (
    exact_match, reasoning_gym, math_verify, format_reward, soft_overlong_punishment, code_tests
)}
# They bound every completion themselves, and may well take longer than reward_timeout for all.
BOUNDED = (math_verify, reasoning_gym, format_reward, code_tests)
# What a built-in reads of the config.
OPTIONS = {
    math_verify: ("verify_timeout",), reasoning_gym: ("verify_timeout",),
    format_reward: ("format_pattern", "verify_timeout"),
    soft_overlong_punishment: ("max_completion_length", "soft_punish_cache"),
    code_tests: ("verify_timeout", "code_memory_mb", "allow_unsandboxed_code"),
}
