"""Verifiable rewards with TRL's signature: f(prompts, completions, **columns) -> list[float|None].

Built in: exact_match, reasoning_gym (the task's own scorer), math_verify (symbolic equality),
format_reward, soft_overlong_punishment (DAPO), code_tests (programs against tests, sandboxed).
Anything else is a dotted path such as my_package.rewards.my_reward, `async def` or not. A built-in
scores a completion 0 that is wrong in any way; what is wrong with a row is an error that names it.
"""

import asyncio
import concurrent.futures
import contextlib
import copy
import functools
import importlib
import importlib.util
import inspect
import logging
import math
import numbers
import os
import re
import sys
import threading

import torch

from ..config import UserError
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
from .data import GENERATED, INTERNAL, SOURCE, read_tests
from .deadline import Late, Watched, limited


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
            requests.append(("equal", _solution_readings(plain), _answer_readings(text)))
    told = sources and [sources[i] for i in asked]
    verdicts = _judged("math_verify", requests, verify_timeout, told)
    for i, verdict in zip(asked, verdicts, strict=True):
        scores[i] = None if verdict == judges.UNREADABLE else float(verdict is True)
    return scores


def _solution_readings(plain):
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
        return _solution_readings(readings(text)[-1])
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


LOG = logging.getLogger(__name__)
MATH_MISSING = "it needs the math-verify package: pip install '.[rewards]'"
GYM_MISSING = "it needs the reasoning-gym package: pip install '.[data]'"
NOT_ISOLATED = (
    "it cannot isolate programs on this machine ({}), so that they would reach the network and "
    "your files; allow user namespaces here, or set allow_unsandboxed_code to run them with limits "
    "alone"
)
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


def load_reward_funcs(names, config):
    """Functions from built-in names, dotted paths, or callables taken as they are.

    Built-ins get their options from the config, and are checked to run on this machine.
    """
    found = [name if callable(name) else BUILT_IN.get(name) or _import(name) for name in names]
    functions = []
    for function in found:
        why_not = _why_not(function, config)
        if why_not:
            raise UserError(f"The reward function {name_of(function)} failed: {why_not}.")
        given = {name: getattr(config, name) for name in OPTIONS.get(function, ())}
        functions.append(
            functools.update_wrapper(functools.partial(function, **given), function)
            if given else function
        )
    called = [name_of(function) for function in functions]
    for name in called:
        if called.count(name) > 1:
            raise UserError(
                f"reward_funcs has {called.count(name)} functions called {name}; give each a name "
                "of its own, as metrics go by it."
            )
    return functions


def require_scorable(functions, rows):
    """UserError that names a row which the built-in functions could not judge, before any step."""
    functions = [getattr(f, "__wrapped__", f) for f in functions]
    for row in rows:
        solved, tested = bool(row["solution"].strip()), row.get("tests") is not None
        scored = {exact_match: solved, math_verify: solved, code_tests: tested}
        if not any(scored.get(f, True) for f in functions):
            raise UserError(
                f"Row {row[SOURCE]} has {'no solution' if tested else 'no tests'}, so that "
                f"{' and '.join(map(name_of, functions))} cannot score it."
            )
        if reasoning_gym in functions and None in (row.get("entry"), row.get("task")):
            raise UserError(
                f"Row {row[SOURCE]} is of no reasoning-gym: dataset, which the reward function "
                "reasoning_gym needs."
            )
    if math_verify in functions:
        _require_readable([row for row in rows if row.get("tests") is None])
    if reasoning_gym in functions:
        _require_entries(rows)


def _require_readable(rows):
    rows = {row["solution"]: row for row in reversed(rows) if row["solution"].strip()}
    plain = {text: readings(text)[-1] for text in reversed(rows)}
    asked = [t for t, p in plain.items() if not is_wording(p) and quantity(p) is None]
    chunks = [asked[i : i + 64] for i in range(0, len(asked), 64)]
    told = _judged("math_verify", [
        ("readable", [_solution_readings(plain[text]) for text in chunk]) for chunk in chunks
    ], 60.0)
    for chunk, known in zip(chunks, told, strict=True):
        # Of a chunk that took too long nothing is known before its steps.
        for text, good in zip(chunk, known, strict=True) if isinstance(known, list) else ():
            if not good:
                raise UserError(
                    f"Row {rows[text][SOURCE]} has the solution {text!r:.80}, which math_verify "
                    "cannot parse; correct it or leave the row out."
                )


def _require_entries(rows):
    """Those that a file brought, and one of each task that was generated, by their own answers."""
    tried, requests = {}, []
    for row in rows:
        tried[row["task"] if GENERATED in row[SOURCE] else row[SOURCE]] = row
    for row in tried.values():
        entry = row["entry"]
        answer = entry.get("answer") if isinstance(entry, dict) else None
        requests.append(("gym", row["task"], entry, [answer]))
    for row, got in zip(tried.values(), _judged("reasoning_gym", requests, 60.0), strict=True):
        if isinstance(got, list):
            raise UserError(
                f"Row {row[SOURCE]} has an entry that the reasoning-gym task {row['task']} cannot "
                f"score by its own answer ({got[0]})."
            )


def _why_not(function, config):
    """Why a built-in cannot run here, as a clause, or None."""
    if function is math_verify and importlib.util.find_spec("math_verify") is None:
        return MATH_MISSING
    if function is reasoning_gym and importlib.util.find_spec("reasoning_gym") is None:
        return GYM_MISSING
    if function is code_tests:
        from .sandbox import Sandbox, SandboxError, isolation

        if isolation() == "ok":
            return None
        if not config.allow_unsandboxed_code:
            return NOT_ISOLATED.format(isolation())
        try:
            Sandbox(isolate=False).close()
        except SandboxError as error:
            return f"it cannot run programs on this machine ({error})"
        LOG.warning(
            "code_tests runs programs that reach the network and your files, as "
            "allow_unsandboxed_code says (%s).", isolation()
        )
    return None


def _import(path):
    module, _, name = path.rpartition(".")
    if not module:
        raise UserError(
            f"Unknown reward function {path!r}; built in are {', '.join(BUILT_IN)}, others need a "
            "dotted path such as my_package.rewards.my_reward."
        )
    try:
        function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # importing runs the user's module
        raise UserError(
            f"Cannot import the reward function {path!r}: {_reason(error)}."
        ) from error
    if not callable(function):
        raise UserError(f"The reward function {path!r} is not callable.")
    return function


def name_of(function):
    """What errors and metrics call a reward function; an object goes by its type."""
    return getattr(function, "__name__", type(function).__name__)


def _reason(error):
    """The type and first line of an exception, without a full stop."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".rstrip(": .")


def _shown(value):
    """Its repr, or its type where it has none, as numbers of more than 4300 digits."""
    try:
        return f"{value!r:.80}"
    except Exception:
        return f"a {type(value).__name__} that cannot be printed"


class RewardError(UserError):
    """A reward function failed: the rollout is lost, the model is as it was before."""


_RESCUES = []


@contextlib.contextmanager
def rescued_by(save):
    """Where a reward function cannot be ended, save(error) tells the sentence of the run's end."""
    _RESCUES.append(save)
    try:
        yield
    finally:
        _RESCUES.pop()


def _end(error):
    """Say why the run ends, from inside a reward function that does not."""
    try:
        error = _RESCUES[-1](error) if _RESCUES else error
    except Exception as failure:
        error = f"{error} Saving failed: {_reason(failure)}."
    rank = os.environ.get("RANK", "0")
    print(f"\nrlsd{f' (process {rank})' * (rank != '0')}: {error}", file=sys.stderr, flush=True)


@functools.lru_cache
def _event_loop():
    """The loop, in a thread of its own, of all async rewards: sessions they keep stay usable."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    return loop, thread


async def _awaited(awaitable):
    try:
        return await awaitable
    except SystemExit as error:  # it would end the loop, and all other async rewards
        raise RuntimeError(_reason(error)) from error


def _arguments(function, rows, shown, completion_ids):
    """What a function is called with: its own copies of everything, unless it is built in."""
    plain = getattr(function, "__wrapped__", function)
    names = {name for row in rows for name in row if name[:1] != "_"} - INTERNAL
    if plain in BUILT_IN.values():
        names -= set(OPTIONS.get(plain, ()))
    given = {
        "prompts": [row["prompt"] for row in rows], "completions": shown,
        "completion_ids": completion_ids,
        **{name: [row.get(name) for row in rows] for name in sorted(names - {"prompt"})},
    }
    if plain in BOUNDED:
        given["sources"] = [row[SOURCE] for row in rows]
    if plain is format_reward:
        given["openings"] = [row.get("_opening") or "" for row in rows]
    if plain in BUILT_IN.values():
        return given
    # One by one: the rows of a group are the same object.
    return {name: [copy.deepcopy(value) for value in values] for name, values in given.items()}


def _call_all(functions, rows, shown, completion_ids, seconds):
    """What each function returns; async ones run at the same time, after the others."""
    results, futures = [None] * len(functions), {}

    def late(function):
        return _failure(function, Late(), rows, seconds)

    for k, function in enumerate(functions):
        bounded = getattr(function, "__wrapped__", function) in BOUNDED
        try:
            given = _arguments(function, rows, shown, completion_ids)
            call = functools.partial(function, **given)
            results[k] = call() if bounded else limited(
                call, seconds, functools.partial(lambda f: _end(late(f)), function),
                str(late(function)),
            )
        except (Exception, SystemExit, Late) as error:
            raise _failure(function, error, rows, seconds) from _cause(error)
    waiting = [k for k, got in enumerate(results) if inspect.isawaitable(got)]
    if not waiting:
        return results
    loop, thread = _event_loop()

    def first_late():
        undone = [k for k in waiting if k not in futures or not futures[k].done()]
        return late(functions[[*undone, *waiting][0]])

    with Watched(seconds, thread.native_id, lambda: _end(first_late()), str(first_late())):
        for k in waiting:
            futures[k] = asyncio.run_coroutine_threadsafe(_awaited(results[k]), loop)
        finished, unfinished = concurrent.futures.wait(
            futures.values(), timeout=seconds, return_when=concurrent.futures.FIRST_EXCEPTION
        )
    errors = {k: f.exception() for k, f in futures.items() if f in finished and f.exception()}
    for k in [*errors, *(k for k, f in futures.items() if f in unfinished)][:1]:
        for future in unfinished:
            future.cancel()
        error = errors.get(k, Late())
        raise _failure(functions[k], error, rows, seconds) from _cause(error)
    return [futures[k].result() if k in futures else got for k, got in enumerate(results)]


def _cause(error):
    return None if isinstance(error, UserError | Late) else error


def _failure(function, error, rows, seconds):
    """The sentence for what a reward function raised."""
    name = name_of(function)
    if isinstance(error, Late):
        sources = list(dict.fromkeys(row[SOURCE] for row in rows))
        others = f" and {len(sources) - 1} others" if len(sources) > 1 else ""
        return RewardError(
            f"The reward function {name} did not return within reward_timeout = {seconds:g} "
            f"seconds on {len(rows)} completions of row {sources[0]}{others}; bound what it waits "
            "for, or raise reward_timeout."
        )
    if isinstance(error, UserError):
        return RewardError(f"The reward function {name} failed: {error}.")
    return RewardError(f"The reward function {name} raised {_reason(error)}.")


def score(functions, weights, rows, completions, completion_ids, timeout=300.0):
    """(B, F) rewards of each function and their weighted sum (B,), both fp64.

    rows: the B rows, one per completion; completions: B texts; completion_ids: B lists of ids;
    timeout: seconds that one function, or all async ones together, may take.
    """
    shown = [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for row, text in zip(rows, completions, strict=True)
    ]
    values = torch.full((len(rows), len(functions)), math.nan, dtype=torch.float64)
    results = _call_all(functions, rows, shown, completion_ids, timeout)
    for k, (function, got) in enumerate(zip(functions, results, strict=True)):
        name = name_of(function)
        if not isinstance(got, list | tuple) or len(got) != len(rows):
            size = f"{len(got)} values" if isinstance(got, list | tuple) else type(got).__name__
            raise RewardError(
                f"The reward function {name} must return a list of {len(rows)} numbers, one per "
                f"completion, but returned {size}."
            )
        for i, value in enumerate(got):
            if value is None:
                continue
            try:
                number = float(value) if isinstance(value, numbers.Real) else math.nan
            except OverflowError:
                number = math.inf
            if not math.isfinite(number):
                raise RewardError(
                    f"The reward function {name} returned {_shown(value)} for row "
                    f"{rows[i][SOURCE]}; it must be a finite number or None."
                )
            values[i, k] = number
    unscored = torch.isnan(values).all(1).nonzero()
    if len(unscored):
        raise RewardError(
            f"Every reward function returned None for row {rows[int(unscored[0])][SOURCE]}."
        )
    scale = torch.tensor(weights or [1.0] * len(functions), dtype=torch.float64)
    return values, torch.nansum(values * scale, dim=1)


def reward_metrics(functions, values):
    """rewards/<name>/mean and /std (unbiased) of a (B, F) score, without what is None: TRL's."""
    metrics = {}
    for function, column in zip(functions, values.T, strict=True):
        known = column[~column.isnan()]
        metrics[f"rewards/{name_of(function)}/mean"] = known.mean().item()
        metrics[f"rewards/{name_of(function)}/std"] = (
            known.std().item() if len(known) > 1 else math.nan
        )
    return metrics
