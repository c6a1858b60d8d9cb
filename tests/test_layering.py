"""Data flows down: the imports of both packages, parsed, and what importing them loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted((ROOT / "rlsd_kernels").rglob("*.py"))
TRAINER = sorted((ROOT / "rlsd").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
IMPLS = {"ref", "torch_impl", "triton_impl", "cuda_impl"}
# A file imports only files of a later row.
KERNEL_ORDER = [
    ["distillation", "loss"], ["logprob"], ["metrics"], ["pipeline"], ["rows"],
    ["triton_distillation"], sorted(IMPLS), ["streaming", "triton_tokens"], ["gradients"],
    ["gemm"], ["ops", "shards"], ["config"], ["tuning"], ["extension"],
]
# Folders, and files beside them, import only what stands in a later row; folders of one row know
# nothing of each other. So do the files inside a folder.
FLOORS = [
    ["__main__"], ["cli"], ["compare"], ["demo_agent"], ["demo"], ["trainer"], ["reports"],
    ["sampling", "checks", "integrations"], ["policy"], ["rewards"], ["tasks"], ["packages"],
    ["config"], ["objectives", "options"],
]
ROOMS = {
    "tasks": [["tools"], ["rewards"], ["scorers"], ["data"], ["grader"], ["judges"], ["deadline"],
              ["sandbox"], ["worked", "prompts"], ["images"], ["answers"]],
    "policy": [["update"], ["teacher"], ["models"], ["packing"], ["checkpoint"], ["gguf_file"],
               ["prompt_cache"],
               ["distributed"], ["hints"], ["advantages"]],
    "sampling": [["hint_check"], ["evaluation"], ["leak"], ["rollout"], ["agents"], ["samplers"],
                 ["vllm_sampler"]],
    "checks": [["validate"], ["bench"], ["measure"], ["profiles"]],
    "integrations": [["trl", "trl_sft", "liger", "ms_swift", "verl"],
                     ["trl_teacher", "trl_sharing"],
                     ["trl_siblings", "head", "trl_config", "verl_teacher"]],
    "reports": [["tables"], ["report"]],
}
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
            if node.level > 1:  # one dot more is one folder up
                prefix = ".".join(package.split(".")[: 1 - node.level])
            base = ".".join(x for x in (prefix, node.module) if x)
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def siblings(path, package):
    """Names of what lies beside it in its package, files and folders, that a file imports.

    package: dotted, the folder of whose contents names are returned; imports are resolved from the
    folder that the file is in.
    """
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    found = {n for n in imports(path.read_text(), own) if n.startswith(package + ".")}
    folder = ROOT.joinpath(*package.split("."))
    stems = {p.stem for p in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/*.py")}
    return {n.removeprefix(package + ".").split(".")[0] for n in found} & stems


def ids(paths):
    return [str(p.relative_to(ROOT)) for p in paths]


def test_the_parser_sees_every_form_of_import():
    source = """
import a.b
from c import d
from . import e
from .f import g
from ..k import l
try:
    import h
except ImportError:
    pass
def function():
    import i
    from .j import k
"""
    top = {"a.b", "c.d", "o.p.e", "o.p.f.g", "o.k.l", "h"}
    assert imports(source, "o.p", module_level=True) == top
    assert imports(source, "o.p") == top | {"i", "o.p.j.k"}


def upward(paths, package, order):
    """(file, import) pairs that do not go down in order; a folder's files stand on its floor."""
    rank = {stem: i for i, row in enumerate(order) for stem in row}
    depth = len(package.split("."))
    pairs = set()
    for path in paths:
        own = path.relative_to(ROOT).with_suffix("").parts[depth]
        for other in siblings(path, package) - {own}:
            if own in rank and rank.get(other, -1) <= rank[own]:
                pairs.add((own, other))
    return pairs


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


def test_folders_import_downwards():
    assert upward(TRAINER, "rlsd", FLOORS) == set()
    known = {name for row in FLOORS for name in row} | {"__init__"}
    assert {p.relative_to(ROOT / "rlsd").with_suffix("").parts[0] for p in TRAINER} == known


@pytest.mark.parametrize("room", ROOMS)
def test_files_of_a_folder_import_downwards(room):
    files = sorted((ROOT / "rlsd" / room).glob("*.py"))
    assert upward(files, f"rlsd.{room}", ROOMS[room]) == set()
    assert {p.stem for p in files} == {name for row in ROOMS[room] for name in row} | {"__init__"}


def test_public_paths_lead_to_the_files_in_the_folders():
    import rlsd
    from rlsd.policy.advantages import group_advantages, rlsd_lambda_at
    from rlsd.tasks import scorers
    from rlsd.tasks.rewards import load_reward_funcs

    assert rlsd.group_advantages is group_advantages and rlsd.rlsd_lambda_at is rlsd_lambda_at
    (function,) = load_reward_funcs(["rlsd.rewards.exact_match"], rlsd.TrainConfig())
    assert function is scorers.exact_match


def test_every_folder_has_its_order():
    assert set(ROOMS) == {p.parent.name for p in (ROOT / "rlsd").glob("*/*.py")}


def test_the_order_is_not_vacuous():
    assert siblings(ROOT / "rlsd_kernels" / "loss.py", "rlsd_kernels") >= {"ref", "config"}
    swapped = [["config"], ["loss"]]
    assert ("loss", "config") in upward(KERNELS, "rlsd_kernels", swapped)
    trainer = ROOT / "rlsd" / "trainer.py"
    assert siblings(trainer, "rlsd") >= {"tasks", "policy", "sampling", "reports", "config"}
    assert ("trainer", "reports") in upward([trainer], "rlsd", [["reports"], ["trainer"]])
    teacher = ROOT / "rlsd" / "policy" / "teacher.py"
    assert siblings(teacher, "rlsd") == {"config", "policy"}
    assert siblings(teacher, "rlsd.policy") >= {"models", "checkpoint"}
    assert ("policy", "config") in upward([teacher], "rlsd", [["config"], ["policy"]])
    assert ("teacher", "models") in upward([teacher], "rlsd.policy", [["models"], ["teacher"]])


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
    # Triton's own files need it to define kernels; they are loaded lazily.
    assert extra <= ({"triton"} if path.stem.startswith("triton_") else set())


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


@pytest.mark.parametrize("path", KERNELS + TRAINER + TESTS, ids=ids(KERNELS + TRAINER + TESTS))
def test_file_sizes(path):
    limits = {"trainer.py": 400, "trl.py": 400, "ms_swift.py": 150, "verl.py": 150,
              "verl_teacher.py": 150}
    limit = 690 if path == ROOT / "rlsd" / "config.py" else limits.get(path.name, 600)
    assert len(path.read_text().splitlines()) <= limit


def test_no_utils():
    files = [*KERNELS, *TRAINER, *TESTS, *(ROOT / "bench").rglob("*.py")]
    assert files and not [str(p) for p in files if p.stem in ("utils", "util", "helpers", "misc")]
