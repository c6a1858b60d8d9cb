"""What an agent is made of: users' tools and environments by TRL's contracts, called with limits.

A tool is a function with type hints and a docstring in Google's style, of which transformers makes
the JSON schema that a chat template shows to the model. An environment's public methods are tools
of its episode; reset(**columns) begins one, and may return a text that is put at the end of the
question. Whatever a tool does, raises or returns becomes a message for the model: it never ends the
run. Programs that the model wrote run isolated alone, by the tool run_python.
"""

import asyncio
import contextlib
import functools
import inspect
from typing import NamedTuple

from transformers.utils import get_json_schema

from ..config import UserError
from .deadline import Late, limited
from .prompts import control_token
from .rewards import (
    NOT_ISOLATED,
    RewardError,
    awaited,
    end_run,
    event_loop,
    imported,
    name_of,
    reason,
    told,
    visible,
)
from .sandbox import Limits, Sandbox, SandboxError, isolation

NO_TOOLS = ("reset", "get_reward")  # methods of an environment that the trainer calls
UNKNOWN = "unknown"  # the name of a call whose own cannot be read


def run_python(code: str) -> str:
    """Run a Python program, with the standard library alone, and return what it prints.

    Args:
        code: The source of the program.
    """
    return _run_python(code, Limits(), True)


class Episode(NamedTuple):
    """What one completion may use."""

    tools: dict  # name -> callable
    environment: object = None
    observation: str | None = None  # what reset returned

    @property
    def feedback(self):
        """The environment's attribute of this name; an attribute is no tool."""
        return getattr(self.environment, "feedback", None)


class Toolbox:
    """The tools and environments of a config; None of both means an ordinary run (load_tools)."""

    def __init__(self, config):
        self.config = config
        self.tools = [self._tool(path) for path in config.tools]
        factory = config.environment_factory and imported(
            config.environment_factory, "environment_factory", mapping=True
        )
        self.by_column = isinstance(factory, dict)  # which one, a row's column environment says
        self.factories = factory if self.by_column else {None: factory} if factory else {}
        for name, make in self.factories.items():
            if not callable(make):
                raise UserError(f"The environment_factory {name!r} is not callable.")
        self.idle = {name: [self._made(name)] for name in self.factories}
        self.schemas = {
            name: _schemas([*self.tools, *_methods(pool[0])]) for name, pool in self.idle.items()
        } or {None: _schemas(self.tools)}
        self.reward_funcs = [
            _reward_of(kind) for kind in dict.fromkeys(type(p[0]) for p in self.idle.values())
            if callable(getattr(kind, "get_reward", None))
        ]

    def _tool(self, path):
        if path != run_python.__name__:
            return imported(path, "tool", [run_python.__name__])
        if isolation() != "ok" and not self.config.allow_unsandboxed_code:
            raise UserError(f"The tool run_python cannot run: {NOT_ISOLATED.format(isolation())}.")
        limits = Limits(self.config.verify_timeout, self.config.code_memory_mb)

        @functools.wraps(run_python)
        def run(code):
            return _run_python(code, limits, isolation() == "ok")

        return run

    def _made(self, name):
        try:
            made = self.factories[name]()
        except (Exception, SystemExit) as error:
            raise UserError(f"The environment_factory raised {reason(error)}.") from error
        if not callable(getattr(made, "reset", None)):
            raise UserError(
                f"The environment_factory made a {type(made).__name__}, which has no method reset."
            )
        return made

    def kind(self, row):
        """Which environment a row is of; UserError, a clause, for one that is not known."""
        name = row.get("environment") if self.by_column else None
        if self.by_column and not (isinstance(name, str) and name in self.factories):
            raise UserError(
                f"its column environment is {name!r:.80}, but must be one of "
                f"{', '.join(map(str, self.factories))}"
            )
        return name

    def template_options(self, row):
        """What the chat template of a row is given of its tools."""
        schemas = self.schemas[self.kind(row)]
        return {"tools": list(schemas.values())} if schemas else {}

    @contextlib.contextmanager
    def episodes(self, rows):
        """One Episode for each row; an environment is made once, and reset for every episode."""
        taken = []
        try:
            for row in rows:
                name = self.kind(row)
                if not self.factories:
                    taken.append((name, Episode({name_of(f): f for f in self.tools})))
                    continue
                pool = self.idle[name]
                environment = pool.pop() if pool else self._made(name)
                tools = {name_of(f): f for f in (*self.tools, *_methods(environment))}
                taken.append((name, Episode(tools, environment)))
            yield [
                episode._replace(observation=self._reset(episode.environment, row))
                for (_, episode), row in zip(taken, rows, strict=True)
            ]
        finally:
            for name, episode in reversed(taken):
                if episode.environment is not None:
                    self.idle[name].append(episode.environment)

    def _reset(self, environment, row):
        if environment is None:
            return None
        name, seconds = f"{type(environment).__name__}.reset", self.config.reward_timeout
        late = RewardError(f"{name} did not return within reward_timeout = {seconds:g} seconds.")
        try:
            said = limited(
                lambda: environment.reset(**visible(row)), seconds, lambda: end_run(late), str(late)
            )
        except Late:
            raise late from None
        except (Exception, SystemExit) as error:
            raise told(name, error) from error
        if said is not None and not isinstance(said, str):
            raise RewardError(
                f"{name} must return a text or None, but returned a {type(said).__name__}."
            )
        return said

    def answer(self, episode, call, tokenizer):
        """(tool message, whether it failed) of one call: {"function": {"name", "arguments"}}."""
        name, result, failed = UNKNOWN, None, True
        try:
            name, function, arguments = _resolved(episode, call)
            result, failed = self._called(function, arguments), False
        except Late:
            result = f"{name} did not return within {self.config.tool_timeout:g} seconds"
        except (Exception, SystemExit) as error:
            result = _message(error)
        if failed:
            result = str({"error": result})
        text = self._cut(result.encode(errors="replace").decode(), tokenizer)
        if control_token(text, tokenizer):
            text, failed = str({"error": "the result spells a control token"}), True
        return {"role": "tool", "name": name, "content": text}, failed

    def _called(self, function, arguments):
        seconds = self.config.tool_timeout
        late = RewardError(
            f"The tool {name_of(function)} did not return within tool_timeout = {seconds:g} "
            "seconds, and cannot be ended."
        )
        if inspect.iscoroutinefunction(function):
            future = asyncio.run_coroutine_threadsafe(
                awaited(function(**arguments)), event_loop()[0]
            )
            try:
                return str(future.result(seconds))
            except TimeoutError:
                if not future.cancel():
                    raise
                raise Late from None
        return limited(
            lambda: str(function(**arguments)), seconds, lambda: end_run(late), str(late)
        )

    def _cut(self, text, tokenizer):
        most = self.config.max_tool_response_length
        ids = tokenizer(text[: 16 * most], add_special_tokens=False)["input_ids"]
        if len(ids) <= most and len(text) <= 16 * most:
            return text
        return f"{tokenizer.decode(ids[:most])} ... [cut off: {len(text)} characters]"


def load_tools(config):
    """The Toolbox of a config, None where it names neither tools nor an environment.

    UserError, before any step, for a function that cannot be imported, hint_func's too.
    """
    if config.hint_func:
        imported(config.hint_func, "hint_func")
    return Toolbox(config) if config.tools or config.environment_factory else None


def _run_python(code, limits, isolate):
    if not isinstance(code, str):
        raise TypeError("code must be a text")
    try:
        with Sandbox(limits, isolate=isolate) as sandbox:
            run = sandbox.run(code)
    except SandboxError as error:
        raise RuntimeError(f"programs cannot run here ({error})") from None
    if run.outcome == "time":
        raise RuntimeError(f"the program did not end within {limits.seconds:g} seconds")
    if run.outcome != "ok":
        raise RuntimeError(run.error.strip()[-500:] or f"the program ended: {run.outcome}")
    return run.output


def _message(error):
    """What an exception says, or its type where it says nothing or cannot."""
    try:
        return str(error) or type(error).__name__
    except Exception:
        return type(error).__name__


def _resolved(episode, call):
    """(name, function, arguments) of a call; ValueError says to the model what is wrong with it."""
    function = call.get("function") if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or name == UNKNOWN:
        raise ValueError("a call is a JSON object with a name and arguments")
    arguments = function.get("arguments") or {}
    if name not in episode.tools:
        raise ValueError(f"there is no tool {name!r:.80}, only {', '.join(episode.tools)}")
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {name} must be an object with their names")
    return name, episode.tools[name], arguments


def _methods(environment):
    return [
        method for name, method in inspect.getmembers(environment, inspect.ismethod)
        if name[:1] != "_" and name not in NO_TOOLS
    ]


def _schemas(functions):
    """{name: JSON schema} of tools; UserError, a sentence, for one that has none."""
    found = {}
    for function in functions:
        name = name_of(function)
        if name in found:
            raise UserError(f"Two tools are called {name}; the model could not tell them apart.")
        try:
            found[name] = get_json_schema(function)
        except Exception as error:  # its own exceptions, and what a strange signature raises
            raise UserError(
                f"The tool {name} cannot be shown to the model ({reason(error)}); give every "
                "argument a type hint and a line under Args: in its docstring."
            ) from error
    return found


def _reward_of(kind):
    """The reward function of environments that judge themselves; None for those of other types."""
    def get_reward(environments, **columns):
        return [e.get_reward() if type(e) is kind else None for e in environments]

    async def get_reward_async(environments, **columns):
        return [await e.get_reward() if type(e) is kind else None for e in environments]

    waits = inspect.iscoroutinefunction(kind.get_reward)
    function = get_reward_async if waits else get_reward
    function.__name__ = kind.__name__
    return function

