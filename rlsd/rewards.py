"""Verifiable rewards with TRL's signature: f(prompts, completions, **columns) -> list[float|None].

Built in: exact_match, reasoning_gym (the task's own scorer), math_verify (symbolic equality).
Anything else is a dotted path such as my_package.rewards.my_reward.
"""

import functools
import importlib
import math
import numbers
import re

import torch

from .config import UserError

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


def math_verify(prompts, completions, solution, **columns):
    """1.0 where math-verify finds the answer equal to the solution; None if it cannot parse that.

    TRL leaves out samples that score None; here another reward function must cover them.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UserError("it needs the math-verify package: pip install '.[rewards]'") from None
    scores = []
    for completion, gold_text in zip(completions, solution, strict=True):
        # Outside of delimiters only numbers are read: the solution 3x+1 would become 3.
        delimited = any(mark in gold_text for mark in ("$", "\\boxed", "\\(", "\\["))
        readings = (gold_text, f"${gold_text}$")[:: 1 if delimited else -1]
        gold = parse(readings[0]) or parse(readings[1])
        scores.append(float(verify(gold, parse(text_of(completion)))) if gold else None)
    return scores


BUILT_IN = {f.__name__: f for f in (exact_match, reasoning_gym, math_verify)}


def load_reward_funcs(names):
    """Functions from built-in names, dotted paths, or callables taken as they are."""
    return [name if callable(name) else BUILT_IN.get(name) or _import(name) for name in names]


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


def score(functions, weights, rows, completions, completion_ids):
    """(B, F) rewards of each function and their weighted sum (B,), both fp64.

    rows: the B rows, one per completion; completions: B texts; completion_ids: B lists of ids.
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
    for k, function in enumerate(functions):
        name = name_of(function)
        try:
            got = function(
                prompts=prompts, completions=shown, completion_ids=completion_ids, **columns
            )
        except UserError as error:
            raise UserError(f"The reward function {name} failed: {error}.") from None
        except Exception as error:
            raise UserError(f"The reward function {name} raised {_reason(error)}.") from error
        if not isinstance(got, list | tuple) or len(got) != len(rows):
            size = f"{len(got)} values" if isinstance(got, list | tuple) else type(got).__name__
            raise UserError(
                f"The reward function {name} must return a list of {len(rows)} numbers, one per "
                f"completion, but returned {size}."
            )
        for i, value in enumerate(got):
            if value is None:
                continue
            if not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise UserError(
                    f"The reward function {name} returned {value!r} for row "
                    f"{rows[i]['_source']}; it must be a finite number or None."
                )
            values[i, k] = float(value)
    unscored = torch.isnan(values).all(1).nonzero()
    if len(unscored):
        raise UserError(
            f"Every reward function returned None for row {rows[int(unscored[0])]['_source']}."
        )
    scale = torch.tensor(weights or [1.0] * len(functions), dtype=torch.float64)
    return values, torch.nansum(values * scale, dim=1)
