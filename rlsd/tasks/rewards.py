"""Verifiable rewards with TRL's signature: f(prompts, completions, **columns) -> list[float|None].

Built in: exact_match, reasoning_gym (the task's own scorer), math_verify (symbolic equality),
format_reward, soft_overlong_punishment (DAPO), code_tests (programs against tests, sandboxed).
Anything else is a dotted path such as my_package.rewards.my_reward, `async def` or not.
"""

import asyncio
import concurrent.futures
import functools
import importlib
import importlib.util
import inspect
import logging
import math
import numbers
import os
import re
import signal
import threading

import torch

from ..config import UserError
from .data import read_tests

# With braces up to two deep inside, as in \boxed{\frac{\sqrt{3}}{2}}.
BOXED = r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"


def text_of(completion):
    """A completion's text: TRL passes chats as [{"role": "assistant", "content": ...}]."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def final_answer(text):
    """The last <answer>...</answer>, else after the last ####, else the last boxed, else all."""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    if tagged:
        return tagged[-1].strip()
    if "####" in text:
        return text.rpartition("####")[2].strip()
    boxed = re.findall(BOXED, text)
    return boxed[-1].strip() if boxed else text.strip()


def exact_match(prompts, completions, solution, **columns):
    """1.0 where the final answer equals the solution, character for character."""
    return [
        float(final_answer(text_of(c)) == s.strip())
        for c, s in zip(completions, solution, strict=True)
    ]


def reasoning_gym(prompts, completions, entry=None, task=None, **columns):
    """The score, 0 to 1, of the reasoning-gym task that made the row."""
    if not entry or any(e is None for e in entry):
        raise UserError("it needs rows from a reasoning-gym: dataset")
    return [
        float(_scorer(name)(answer=final_answer(text_of(c)), entry=e))
        for c, e, name in zip(completions, entry, task, strict=True)
    ]


@functools.lru_cache
def _scorer(task):
    """The scorer of a reasoning-gym task; looking it up builds a dataset, so it is kept."""
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn(task)


def math_verify(
    prompts, completions, solution, *, verify_timeout=6.0, sources=None, **columns
):
    """1.0 where math-verify finds the answer equal to the solution; None if it cannot parse that.

    It judges in processes of its own, from any thread. What it cannot judge within verify_timeout
    seconds scores 0, as in verl, and is told: None would let a completion dodge its score. TRL
    leaves out samples that score None; here another reward function must cover them.
    """
    from .math_judge import judge

    texts = [text_of(c) for c in completions]
    try:
        verdicts = judge(list(zip(solution, texts, strict=True)), verify_timeout)
    except ImportError:
        raise UserError(MATH_MISSING) from None
    late = [i for i, verdict in enumerate(verdicts) if verdict == "time"]
    if late:
        where = f"row {sources[late[0]]}" if sources else f"completion {late[0]}"
        LOG.warning(
            "The reward function math_verify could not judge %d of %d completions within "
            "verify_timeout = %g seconds, first for %s; they score 0.",
            len(late), len(texts), verify_timeout, where,
        )
    return [None if v is None else float(v is True) for v in verdicts]


# A tag or marker in its place and nowhere else. TRL's think_format_reward is "think".
_REST = r"(?:(?!</?think>|</?answer>).)*"
PATTERNS = {
    "think_answer": rf"\s*<think>{_REST}</think>\s*<answer>{_REST}</answer>\s*",
    "think": r"\s*<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)*",
    "boxed": rf".*{BOXED}.*",
}


def format_reward(prompts, completions, *, format_pattern="think_answer", **columns):
    """1.0 where the whole completion has the format: a name in PATTERNS or a regular expression."""
    pattern = re.compile(PATTERNS.get(format_pattern, format_pattern), flags=re.DOTALL)
    return [float(pattern.fullmatch(text_of(c)) is not None) for c in completions]


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
        program = program_of(text_of(completion))
        return float(passes(program, read_tests(given), limits, isolate))

    try:
        with concurrent.futures.ThreadPoolExecutor(min(16, cores)) as pool:
            return list(pool.map(one, completions, tests, timeout=None))
    except SandboxError as error:
        raise UserError(f"it cannot run programs on this machine ({error})") from None


LOG = logging.getLogger(__name__)
MATH_MISSING = "it needs the math-verify package: pip install '.[rewards]'"
NOT_ISOLATED = (
    "it cannot isolate programs on this machine ({}), so that they would reach the network and "
    "your files; allow user namespaces here, or set allow_unsandboxed_code to run them with limits "
    "alone"
)
BUILT_IN = {f.__name__: f for f in (
    exact_match, reasoning_gym, math_verify, format_reward, soft_overlong_punishment, code_tests
)}
# They bound every completion themselves, and may well take longer than reward_timeout for all.
BOUNDED = (math_verify, code_tests)
# What a built-in reads of the config.
OPTIONS = {
    math_verify: ("verify_timeout",), format_reward: ("format_pattern",),
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


def _why_not(function, config):
    """Why a built-in cannot run here, as a clause, or None."""
    if function is math_verify and importlib.util.find_spec("math_verify") is None:
        return MATH_MISSING
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
    except Exception as error:  # importing runs the user's module
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


class RewardError(UserError):
    """A reward function failed: the rollout is lost, the model is as it was before."""


class _Late(BaseException):
    """Raised inside a reward function that took too long; no `except Exception` swallows it."""


def _limited(call, seconds):
    """call(), or _Late after so many seconds.

    In the main thread a signal interrupts it (loops, sleep, sockets, locks, regular expressions;
    not one long operation of C code). In another it is left to a thread of its own.
    """
    if threading.current_thread() is not threading.main_thread() or os.name == "nt":
        future = concurrent.futures.Future()

        def run():
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        if not concurrent.futures.wait([future], timeout=seconds).done:
            raise _Late
        return future.result()
    done, main = threading.Event(), threading.get_ident()

    def interrupt(*_):
        if not done.is_set():
            raise _Late

    def watch():
        wait = seconds
        while not done.wait(wait):
            signal.pthread_kill(main, signal.SIGVTALRM)
            wait = 1.0  # again, should the function have swallowed it

    # Reward functions that use alarms of their own keep SIGALRM.
    before = signal.signal(signal.SIGVTALRM, interrupt)
    watcher = threading.Thread(target=watch, daemon=True)
    try:
        watcher.start()
        try:
            return call()
        finally:
            done.set()
    finally:
        done.set()
        watcher.join()
        signal.signal(signal.SIGVTALRM, before)


@functools.lru_cache
def _event_loop():
    """The loop, in a thread of its own, of all async rewards: sessions they keep stay usable."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


async def _awaited(awaitable):
    return await awaitable


def _call_all(functions, arguments, rows, seconds):
    """What each function returns; async ones run at the same time, after the others."""
    results, futures = [None] * len(functions), {}
    for k, function in enumerate(functions):
        given, limit = arguments, seconds
        if getattr(function, "__wrapped__", function) in BOUNDED:
            given = arguments | {"sources": [row["_source"] for row in rows]}
            limit = None
        call = functools.partial(function, **given)
        try:
            results[k] = call() if limit is None else _limited(call, limit)
        except (Exception, _Late) as error:
            raise _failure(function, error, rows, seconds) from _cause(error)
        if inspect.isawaitable(results[k]):
            futures[k] = asyncio.run_coroutine_threadsafe(_awaited(results[k]), _event_loop())
    finished, late = concurrent.futures.wait(
        futures.values(), timeout=seconds, return_when=concurrent.futures.FIRST_EXCEPTION
    )
    errors = {k: f.exception() for k, f in futures.items() if f in finished and f.exception()}
    for k in [*errors, *(k for k, f in futures.items() if f in late)][:1]:
        for future in late:
            future.cancel()
        error = errors.get(k, _Late())
        raise _failure(functions[k], error, rows, seconds) from _cause(error)
    return [futures[k].result() if k in futures else got for k, got in enumerate(results)]


def _cause(error):
    return None if isinstance(error, UserError | _Late) else error


def _failure(function, error, rows, seconds):
    """The sentence for what a reward function raised."""
    name = name_of(function)
    if isinstance(error, _Late):
        sources = list(dict.fromkeys(row["_source"] for row in rows))
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
    prompts = [row["prompt"] for row in rows]
    shown = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, completions, strict=True)
    ]
    hidden = ("prompt", "prompt_ids", "teacher_prompt_ids")
    names = {name for row in rows for name in row if name not in hidden and name[0] != "_"}
    columns = {name: [row.get(name) for row in rows] for name in sorted(names)}
    values = torch.full((len(rows), len(functions)), math.nan, dtype=torch.float64)
    arguments = {
        "prompts": prompts, "completions": shown, "completion_ids": completion_ids, **columns
    }
    results = _call_all(functions, arguments, rows, timeout)
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
            if not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise RewardError(
                    f"The reward function {name} returned {value!r} for row "
                    f"{rows[i]['_source']}; it must be a finite number or None."
                )
            values[i, k] = float(value)
    unscored = torch.isnan(values).all(1).nonzero()
    if len(unscored):
        raise RewardError(
            f"Every reward function returned None for row {rows[int(unscored[0])]['_source']}."
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
