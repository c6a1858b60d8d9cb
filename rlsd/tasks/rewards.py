"""Verifiable rewards with TRL's signature: f(prompts, completions, **columns) -> list[float|None].

The built-in ones of scorers.py by name; anything else is a dotted path such as
my_package.rewards.my_reward, `async def` or not. Loaded, held against the rows before any step,
called with a limit of time, summed.
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
import sys
import threading

import torch

from ..config import UserError
from . import judges
from .answers import is_wording, quantity, readings
from .data import GENERATED, INTERNAL, SOURCE
from .deadline import Late, Watched, limited
from .prompts import HINT_ARGUMENTS
from .scorers import (
    BOUNDED,
    BUILT_IN,
    GYM_MISSING,
    MATH_MISSING,
    OPTIONS,
    code_tests,
    exact_match,
    format_reward,
    math_verify,
    reasoning_gym,
    solution_readings,
)

LOG = logging.getLogger(__name__)
NOT_ISOLATED = (
    "it cannot isolate programs on this machine ({}), so that they would reach the network and "
    "your files; allow user namespaces here, or set allow_unsandboxed_code to run them with limits "
    "alone"
)


def load_reward_funcs(names, config):
    """Functions from built-in names, dotted paths, or callables taken as they are.

    Built-ins get their options from the config, and are checked to run on this machine.
    """
    found = [name if callable(name) else BUILT_IN.get(name)
             or imported(name, "reward function", BUILT_IN) for name in names]
    functions = []
    for function in found:
        why_not = _why_not(function, config)
        if why_not:
            raise UserError(f"The reward function {name_of(function)} failed: {why_not}.")
        given = {name: getattr(config, name) for name in _options(function)}
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


def _options(function):
    """Of a built-in; any object that can be called may lack a hash."""
    return next((names for built_in, names in OPTIONS.items() if built_in is function), ())


def require_scorable(functions, rows):
    """UserError that names a row which the built-in functions could not judge, before any step."""
    limits = [f.keywords["verify_timeout"] for f in functions if isinstance(f, functools.partial)
              and f.func in (math_verify, reasoning_gym)]
    seconds = max(limits, default=6.0)
    functions = [getattr(f, "__wrapped__", f) for f in functions]
    for row in rows:
        solved, tested = bool(row["solution"].strip()), row.get("tests") is not None
        if not any(
            solved if f in (exact_match, math_verify) else tested if f is code_tests else True
            for f in functions
        ):
            raise UserError(
                f"Row {row[SOURCE]} has {'no solution' if tested else 'no tests'}, so that "
                f"{' and '.join(map(name_of, functions))} cannot score it."
            )
        if reasoning_gym in functions and None in (row.get("entry"), row.get("task")):
            raise UserError(
                f"Row {row[SOURCE]} is of no reasoning-gym: dataset, which the reward function "
                "reasoning_gym needs."
            )
    try:
        if math_verify in functions:  # a solution beside tests is a program
            _require_readable([row for row in rows if row.get("tests") is None], seconds)
        if reasoning_gym in functions:
            _require_entries(rows, seconds)
    except judges.JudgeError as error:
        raise UserError(f"Answers cannot be judged on this machine: {error}.") from None


def _require_readable(rows, seconds):
    rows = {row["solution"]: row for row in reversed(rows) if row["solution"].strip()}
    plain = {text: readings(text)[-1] for text in reversed(rows)}
    asked = [t for t, p in plain.items() if not is_wording(p) and quantity(p) is None]

    def told(chunks):
        forms = [[solution_readings(plain[text]) for text in chunk] for chunk in chunks]
        answers = judges.judge("math_verify", [("readable", chunk) for chunk in forms], seconds)
        return list(zip(chunks, answers, strict=True))

    for chunk, known in told([asked[i : i + 64] for i in range(0, len(asked), 64)]):
        if not isinstance(known, list):  # too slow together
            known = [got == [True] for _, got in told([[text] for text in chunk])]
        for text, good in zip(chunk, known, strict=True):
            if not good:
                raise UserError(
                    f"Row {rows[text][SOURCE]} has the solution {text!r:.80}, which math_verify "
                    f"cannot parse within {seconds:g} seconds; correct it or leave the row out."
                )


def _require_entries(rows, seconds):
    """Those that a file brought, and one of each task that was generated, by their own answers."""
    tried, requests = {}, []
    for row in rows:
        tried[row["task"] if GENERATED in row[SOURCE] else row[SOURCE]] = row
    for row in tried.values():
        entry = row["entry"]
        answer = entry.get("answer") if isinstance(entry, dict) else None
        requests.append(("gym", row["task"], entry, [answer]))
    answers = judges.judge("reasoning_gym", requests, seconds)
    for row, got in zip(tried.values(), answers, strict=True):
        if not isinstance(row["entry"], dict) or "answer" not in row["entry"]:
            got = ["it has none"]
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


def imported(path, what, built_in=(), *, mapping=False):
    """What a dotted path names, a function or, if it may be, a mapping of them.

    what: how sentences call it; built_in: names that need no path.
    """
    module, _, name = path.rpartition(".")
    if not module:
        known = f"built in are {', '.join(built_in)}, others need" if built_in else "it needs"
        raise UserError(
            f"Unknown {what} {path!r}; {known} a dotted path such as my_package.rewards.my_reward."
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # importing runs the user's module
        raise UserError(f"Cannot import the {what} {path!r}: {reason(error)}.") from error
    if not callable(found) and not (mapping and isinstance(found, dict)):
        raise UserError(f"The {what} {path!r} is not callable.")
    return found


def name_of(function):
    """What errors and metrics call a reward function; an object goes by its type."""
    return getattr(function, "__name__", type(function).__name__)


def reason(error):
    """The type and first line of an exception, without a full stop."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".rstrip(": .")


def told(call, error):
    """RewardError of what `call`, a name, raised; those of ours as they are."""
    if isinstance(error, UserError):
        return error
    return RewardError(f"{call} raised {reason(error)}.")


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


def end_run(error):
    """Say why the run ends, from inside a reward function that does not."""
    try:
        error = _RESCUES[-1](error) if _RESCUES else error
    except Exception as failure:
        error = f"{error} Saving failed: {reason(failure)}."
    rank = os.environ.get("RANK", "0")
    print(f"\nrlsd{f' (process {rank})' * (rank != '0')}: {error}", file=sys.stderr, flush=True)


@functools.lru_cache
def event_loop():
    """The loop, in a thread of its own, of all async rewards: sessions they keep stay usable."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    return loop, thread


async def awaited(awaitable):
    try:
        return await awaitable
    except SystemExit as error:  # it would end the loop, and all other async rewards
        raise RuntimeError(reason(error)) from error


def is_column(name):
    """Whether what a row has under a name came with the data."""
    return name[:1] != "_" and name not in INTERNAL


def visible(row):
    """Copies of a row's columns, as functions of users get them."""
    return {name: copy.deepcopy(value) for name, value in row.items() if is_column(name)}


def _arguments(function, rows, shown, completion_ids, environments=None):
    """What a function is called with: its own copies of everything, unless it is built in."""
    plain = getattr(function, "__wrapped__", function)
    names = {name for row in rows for name in row if is_column(name)}
    if plain in BUILT_IN.values():
        names -= set(_options(plain))
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
    given["completion_ids"] = list(map(list, completion_ids))  # too many to copy one by one
    # Value by value: the rows of a group are the same object.
    given = {
        name: values if name == "completion_ids" else [copy.deepcopy(value) for value in values]
        for name, values in given.items()
    }
    return given if environments is None else given | {"environments": environments}


def _call_all(functions, rows, shown, completion_ids, seconds, environments):
    """What each function returns; async ones run at the same time, after the others."""
    results, futures = [None] * len(functions), {}

    def late(function):
        return _failure(function, Late(), rows, seconds)

    for k, function in enumerate(functions):
        bounded = getattr(function, "__wrapped__", function) in BOUNDED
        try:
            given = _arguments(function, rows, shown, completion_ids, environments)
            call = functools.partial(function, **given)
            results[k] = call() if bounded else limited(
                call, seconds, functools.partial(lambda f: end_run(late(f)), function),
                str(late(function)),
            )
        except (Exception, SystemExit, Late) as error:
            raise _failure(function, error, rows, seconds) from _cause(error)
    waiting = [k for k, got in enumerate(results) if inspect.isawaitable(got)]
    if not waiting:
        return results
    loop, thread = event_loop()

    def first_late():
        undone = [k for k in waiting if k not in futures or not futures[k].done()]
        return late(functions[[*undone, *waiting][0]])

    with Watched(seconds, thread.native_id, lambda: end_run(first_late()), str(first_late())):
        for k in waiting:
            futures[k] = asyncio.run_coroutine_threadsafe(awaited(results[k]), loop)
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
    return RewardError(f"The reward function {name} raised {reason(error)}.")


def shown_to(row, completion):
    """A completion as functions get it: a text, or messages where the row's prompt is a chat."""
    if isinstance(completion, list) or isinstance(row["prompt"], str):
        return completion
    return [{"role": "assistant", "content": completion}]


def score(
    functions, weights, rows, completions, completion_ids, timeout=300.0, environments=None
):
    """(B, F) rewards of each function and their weighted sum (B,), both fp64.

    rows: the B rows, one per completion; completions: B texts or lists of messages; completion_ids:
    B lists of ids; timeout: seconds that one function, or all async ones together, may take.
    weights: of the first functions, 1 for the others. environments: B of them, if there are any.
    """
    shown = [shown_to(row, text) for row, text in zip(rows, completions, strict=True)]
    values = torch.full((len(rows), len(functions)), math.nan, dtype=torch.float64)
    results = _call_all(functions, rows, shown, completion_ids, timeout, environments)
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
    weights = weights or []
    weights = [*weights, *[1.0] * (len(functions) - len(weights))]
    scale = torch.tensor(weights, dtype=torch.float64)
    return values, torch.nansum(values * scale, dim=1)


def hindsight(path, rows, completions, feedback, seconds=300.0):
    """What hint_func gives for each of B completions: a text, or None for no hint (a blank too)."""
    function = imported(path, "hint_func")
    shown = [shown_to(row, text) for row, text in zip(rows, completions, strict=True)]
    late = RewardError(f"hint_func did not return within reward_timeout = {seconds:g} seconds.")

    def ask():
        return [
            function(copy.deepcopy(row["prompt"]), copy.deepcopy(text), said,
                     **{k: v for k, v in visible(row).items() if k not in HINT_ARGUMENTS})
            for row, text, said in zip(rows, shown, feedback, strict=True)
        ]

    async def gathered(awaitables):
        return await asyncio.gather(*map(awaited, awaitables))

    try:
        hints = limited(ask, seconds, lambda: end_run(late), str(late))
        if any(map(inspect.isawaitable, hints)):
            future = asyncio.run_coroutine_threadsafe(gathered(hints), event_loop()[0])
            hints = future.result(seconds)
    except (Late, TimeoutError):
        raise late from None
    except (Exception, SystemExit) as error:
        raise told("hint_func", error) from error
    for row, hint in zip(rows, hints, strict=True):
        if hint is not None and not isinstance(hint, str):
            raise RewardError(
                f"hint_func must return a text or None, but returned a {type(hint).__name__} for "
                f"row {row[SOURCE]}."
            )
    return [hint if hint and hint.strip() else None for hint in hints]


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
