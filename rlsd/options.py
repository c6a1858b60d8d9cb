"""Options in general: how a field declares itself, its type is kept, a file of them is read."""

import math
import os
import types
import typing
from dataclasses import field


class UserError(ValueError):
    """A mistake the user can fix, told in one sentence; the command line prints it and exits 2."""


def option(default, text, *, choices=(), group=None):
    """A dataclass field with its help; a callable default makes a fresh value each time.

    choices: the only values of it, or of its items. group: what it and those after it are about.
    """
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, metadata={"help": text, "choices": choices, "group": group})


def coerce(name, value, hint, choices=()):
    """The value in the option's type, or UserError; a text may be a float (YAML reads 1e-6 so)."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None or isinstance(value, str) and value in ("none", "None"):  # YAML has null
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is list:
        items = value if isinstance(value, list | tuple) else [value]
        (item,) = typing.get_args(hint)
        return [coerce(name, v, item) for v in items]
    if hint is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            value = float(value)
        except (ValueError, OverflowError):
            pass
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, bool) and str(value).lower() in choices:  # YAML's true
        return str(value).lower()
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{name} must not contain a null byte, but got {shown(value)}.")
    if hint is str and isinstance(value, str) and value.startswith("~/"):  # no shell expands a file
        return os.path.expanduser(value)
    nan = isinstance(value, float) and math.isnan(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)) and not nan:
        return value
    raise UserError(f"{name} must be {KINDS.get(hint, hint)}, but got {shown(value)}.")


def shown(value):
    """A value as it stands in a sentence."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of 4,300 digits
        text = f"a value of type {type(value).__name__} that is too large to show"
    return text if len(text) <= 100 else f"{text[:100]}..."


KINDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text",
    dict: "a mapping of options",
}


def load_yaml(path):
    """The options in a YAML file, as a dict."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Of a key that stands twice, YAML would take the last without a word."""

        def construct_mapping(self, node, deep=False):
            names = [key.value for key, _ in node.value if isinstance(key.value, str)]
            for i, name in enumerate(names):
                if name in names[:i] and name != "<<":
                    raise UserError(f"The config {path} gives {name} twice.")
            return super().construct_mapping(node, deep)

    try:
        with open(path, encoding="utf-8") as file:
            options = yaml.load(file, Loader)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"Cannot read the config {path}: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also bytes, dates, nesting
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise UserError(f"The config {path} is not valid YAML{line}.") from None
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise UserError(f"The config {path} must be a list of `option: value` lines.")
    return options
