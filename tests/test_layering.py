"""Data flows down: the imports of both packages, parsed, and what importing them loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted((ROOT / "rlsd_kernels").rglob("*.py"))
TRAINER = sorted((ROOT / "rlsd").rglob("*.py"))
IMPLS = {"ref", "torch_impl", "triton_impl", "cuda_impl"}
# A file imports only files of a later row.
KERNEL_ORDER = [
    ["distillation", "loss"], ["logprob"], ["metrics"], ["pipeline"], sorted(IMPLS), ["streaming"],
    ["gemm"], ["config"], ["tuning"], ["extension"],
]
TRAINER_ORDER = [
    ["cli"], ["validate", "bench"], ["compare"], ["demo"], ["trainer"], ["tables"], ["report"],
    ["objectives"], ["teacher"], ["models"], ["evaluation"], ["leak"], ["rollout"],
    ["vllm_sampler"], ["packing"], ["checkpoint"], ["rewards"], ["data"], ["grader"],
    ["math_judge"], ["sandbox"], ["prompts"], ["images"], ["advantages"], ["distributed"],
    ["config"], ["measure"],
]
TORCH_ONLY = {"torch", "rlsd_kernels"} | sys.stdlib_module_names


def imports(source, package, *, module_level=False):
    """Dotted names of what the source text imports; relative ones start with the package."""
    tree = ast.parse(source)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    roots = [n for n in tree.body if not (module_level and isinstance(n, functions))]
    nodes = [n for root in roots for n in ast.walk(root)]
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = package if node.level else ""
            base = ".".join(x for x in (prefix, node.module) if x)
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def siblings(path, package):
    """Stems of the files of its own package that a file imports."""
    found = {n for n in imports(path.read_text(), package) if n.startswith(package + ".")}
    stems = {p.stem for p in (ROOT / package).glob("*.py")}
    stems |= {p.name for p in (ROOT / package).glob("*/") if any(p.glob("*.py"))}
    return {n.split(".")[1] for n in found} & stems


def ids(paths):
    return [str(p.relative_to(ROOT)) for p in paths]


def test_the_parser_sees_every_form_of_import():
    source = """
import a.b
from c import d
from . import e
from .f import g
try:
    import h
except ImportError:
    pass
def function():
    import i
    from .j import k
"""
    top = {"a.b", "c.d", "p.e", "p.f.g", "h"}
    assert imports(source, "p", module_level=True) == top
    assert imports(source, "p") == top | {"i", "p.j.k"}


def upward(paths, package, order):
    rank = {stem: i for i, row in enumerate(order) for stem in row}
    return {
        (path.stem, other)
        for path in paths
        for other in siblings(path, package) - {path.stem}
        if path.stem in rank and rank.get(other, -1) <= rank[path.stem]
    }


INTEGRATIONS = sorted((ROOT / "rlsd" / "integrations").rglob("*.py"))


def test_nothing_imports_the_integrations():
    below = [p for p in [*KERNELS, *TRAINER] if p not in INTEGRATIONS]
    assert below and not [p for p in below if "integrations" in p.read_text()]


@pytest.mark.parametrize("package", ["rlsd", "rlsd.integrations", "rlsd.integrations.liger"])
def test_importing_loads_no_host(package):
    hosts = ["trl", "liger_kernel", "transformers", "swift", "verl"]
    assert loaded_by(f"import {package}", hosts) == []


def test_kernels_import_downwards():
    assert upward(KERNELS, "rlsd_kernels", KERNEL_ORDER) == set()
    known = {stem for row in KERNEL_ORDER for stem in row} | {"__init__"}
    assert {p.stem for p in KERNELS} <= known


def test_trainer_imports_downwards():
    assert upward(TRAINER, "rlsd", TRAINER_ORDER) == set()
    known = {stem for row in TRAINER_ORDER for stem in row} | {"__init__", "__main__"}
    assert {p.stem for p in TRAINER if p.parent.name == "rlsd"} <= known


def test_the_order_is_not_vacuous():
    assert siblings(ROOT / "rlsd_kernels" / "loss.py", "rlsd_kernels") >= {"ref", "config"}
    swapped = [["config"], ["loss"]]
    assert ("loss", "config") in upward(KERNELS, "rlsd_kernels", swapped)


@pytest.mark.parametrize("path", [p for p in KERNELS if p.stem in IMPLS], ids=lambda p: p.stem)
def test_implementations_never_import_each_other(path):
    assert siblings(path, "rlsd_kernels") & IMPLS == set()


def test_only_the_package_imports_loss():
    users = {p.stem for p in KERNELS if "loss" in siblings(p, "rlsd_kernels")}
    assert users == {"__init__"}


@pytest.mark.parametrize("path", KERNELS, ids=ids(KERNELS))
def test_kernels_need_torch_alone(path):
    everywhere = {n.split(".")[0] for n in imports(path.read_text(), "rlsd_kernels")}
    assert not everywhere & {"rlsd", "transformers", "trl"}
    top = imports(path.read_text(), "rlsd_kernels", module_level=True)
    extra = {n.split(".")[0] for n in top} - TORCH_ONLY
    # Triton's own file needs it to define kernels; the file itself is loaded lazily.
    assert extra <= ({"triton"} if path.stem == "triton_impl" else set())


def loaded_by(statement, names):
    """Which of the modules an import statement loads, in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint([m for m in {names!r} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return ast.literal_eval(run.stdout)


def test_importing_the_kernels_loads_no_extras():
    extras = ["rlsd", "transformers", "triton", "trl", "datasets", "pandas", "matplotlib",
              "rlsd_kernels.triton_impl", "rlsd_kernels.cuda_impl"]
    assert loaded_by("import rlsd_kernels", extras) == []
    assert loaded_by("import json", ["json", "triton"]) == ["json"]


@pytest.mark.parametrize("path", KERNELS + TRAINER, ids=ids(KERNELS + TRAINER))
def test_file_sizes(path):
    limits = {"trainer.py": 400, "trl.py": 400, "ms_swift.py": 150, "verl.py": 150}
    limit = limits.get(path.name, 600)
    assert len(path.read_text().splitlines()) <= limit


def test_no_utils():
    files = [*KERNELS, *TRAINER, *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    assert files and not [str(p) for p in files if p.stem in ("utils", "util", "helpers", "misc")]
