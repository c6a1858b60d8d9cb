"""The optional packages: which extra installs each, and which releases of the hosts are tested.

An install must have torch and numpy alone. What else a command needs is looked for before it works,
and what is missing or does not fit is one sentence that says how to install it.
"""

import importlib.metadata
import importlib.util
import re

from .config import UserError

# Name in an import: (name of the package, extra that installs it, what for).
OPTIONAL = {
    "transformers": ("transformers", "train", "train, eval"),
    "peft": ("peft", "train", "use_peft"),
    "accelerate": ("accelerate", "train", "several processes, use_vllm"),
    "yaml": ("pyyaml", "train", "configs"),
    "matplotlib": ("matplotlib", "train", "curves"),
    "rich": ("rich", "train", "sample tables"),
    "pyarrow": ("pyarrow", "train", "parquet, completions"),
    "gguf": ("gguf", "gguf", "models of .gguf files"),
    "PIL": ("pillow", "train", "images"),
    "reasoning_gym": ("reasoning-gym", "data", "reasoning-gym: tasks"),
    "datasets": ("datasets", "data", "hub datasets"),
    "math_verify": ("math-verify", "rewards", "reward math_verify"),
    "tensorboard": ("tensorboard", "log", "report_to: tensorboard"),
    "wandb": ("wandb", "wandb", "report_to: wandb"),
    "trackio": ("trackio", "trackio", "report_to: trackio"),
    "trl": ("trl", "trl", "its trainer, use_vllm"),
    "vllm": ("vllm", "vllm", "use_vllm"),
}
# First and last minor release that the scripts beside the tests of the hooks pass with.
RELEASES = {
    "transformers": ("5.17", "5.24"), "trl": ("1.14", "1.16"), "ms-swift": ("4.6", "4.6"),
    "verl": ("0.9", "0.9"),
}


def package(module):
    """What to install where a module of OPTIONAL cannot be imported, to end a sentence with."""
    name, extra, _ = OPTIONAL[module]
    return f"the package {name}: pip install 'rlsd[{extra}]'"


def missing(modules):
    """Those that are not installed."""
    return [module for module in modules if importlib.util.find_spec(module) is None]


def import_failure(error):
    """What an ImportError asks of the user, to follow `<command> `."""
    cause = error
    while cause is not None:  # transformers wraps what it could not import
        module = (getattr(cause, "name", None) or "").split(".")[0]
        if isinstance(cause, ModuleNotFoundError) and module in OPTIONAL:
            return f"needs {package(module)}."
        cause = cause.__cause__ or cause.__context__
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason")
    return f"cannot import what it needs ({said.rstrip('.')}); `rlsd doctor` lists what is there."


def releases_of(name):
    """The tested releases of a host, as text."""
    low, high = RELEASES[name]
    return f"{low}.x" if low == high else f"{low} to {high}"


def is_tested(name, version):
    """Whether a release of a host is one that the tests pass with."""
    low, minor, high = (
        tuple(map(int, re.findall(r"\d+", text)[:2]))
        for text in (RELEASES[name][0], version, RELEASES[name][1])
    )
    return low <= minor <= high


def require_release(name):
    """Refuse an installed release of a package of OPTIONAL that is outside of RELEASES."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return  # importing it says so
    if not is_tested(name, version):
        raise UserError(
            f"rlsd works with {name} {releases_of(name)}, but {version} is installed: "
            f"pip install 'rlsd[{OPTIONAL[name][1]}]'."
        )
