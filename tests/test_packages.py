"""What is optional: its extra, the sentence where it is missing, the releases of hosts."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from runs import one_sentence, options

from rlsd.config import UserError, make_config
from rlsd.demo import run_demo
from rlsd.packages import (
    OPTIONAL,
    RELEASES,
    import_failure,
    is_tested,
    missing,
    releases_of,
    require_release,
)
from rlsd.policy.checkpoint import load_tokenizer
from rlsd.reports.report import require_packages

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def required(extra):
    """{package: requirement} of an extra of pyproject.toml."""
    return {r.name: r for r in map(Requirement, EXTRAS[extra])}


def test_every_optional_package_is_in_its_extra():
    for module, (name, extra, _) in OPTIONAL.items():
        names = set(required(extra)) | {f for r in required(extra).values() for f in r.extras}
        assert name in names, module
    known = {name for name, _, _ in OPTIONAL.values()}
    for extra in EXTRAS.keys() - {"dev", "trl", "vllm"}:
        assert set(required(extra)) <= known, extra


def test_the_extras_allow_the_tested_releases_and_no_others():
    found = [(r.name, r.specifier) for extra in EXTRAS for r in required(extra).values()
             if r.name in RELEASES]
    assert {name for name, _ in found} == {"transformers", "trl"} and len(found) == 4
    for name, allowed in found:
        (major, low), (_, high) = (map(int, text.split(".")) for text in RELEASES[name])
        for minor in range(low - 2, high + 3):
            version = f"{major}.{minor}.1"
            assert allowed.contains(version) == is_tested(name, version) == (low <= minor <= high)
        assert not allowed.contains(f"{major + 1}.0.0")


@pytest.mark.parametrize("name, version, fits", [
    ("transformers", "5.17.0", True), ("transformers", "5.24.9", True),
    ("transformers", "5.16.1", False), ("transformers", "5.25.0.dev0", False),
    ("transformers", "4.57.1", False), ("transformers", "6.17.0", False),
    ("trl", "1.14.0", True), ("trl", "1.16.3rc1", True), ("trl", "0.29.1", False),
    ("trl", "1.17.0", False), ("verl", "0.9.1", True), ("verl", "0.10.0", False),
])
def test_what_is_tested(name, version, fits, monkeypatch):
    assert is_tested(name, version) is fits
    if name not in OPTIONAL:
        return
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    if fits:
        return require_release(name)
    extra = OPTIONAL[name][1]
    with pytest.raises(UserError) as error:
        require_release(name)
    assert str(error.value) == (
        f"rlsd works with {name} {releases_of(name)}, but {version} is installed: "
        f"pip install 'rlsd[{extra}]'."
    )


def hide(monkeypatch, *modules):
    """Let the modules look as if they were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in modules else find(name)
    )


@pytest.mark.parametrize("module, changed, what", [
    ("accelerate", {}, "training"),
    ("matplotlib", {}, "curves.png"),
    ("rich", {"log_completions_steps": 1}, "log_completions_steps"),
    ("pyarrow", {"log_completions_steps": 1}, "log_completions_steps"),
    ("peft", {"use_peft": True}, "use_peft"),
    ("tensorboard", {"report_to": "tensorboard"}, "report_to: tensorboard"),
])
def test_a_run_asks_for_its_packages_at_the_start(module, changed, what, tmp_path, monkeypatch):
    config = make_config(options(tmp_path, **changed))
    require_packages(config)
    hide(monkeypatch, module)
    name, extra, _ = OPTIONAL[module]
    wanted = f"{what} needs the package {name}: pip install 'rlsd[{extra}]'."
    with pytest.raises(UserError, match=f"^{re.escape(wanted)}$"):
        require_packages(config)


def test_the_demo_asks_before_its_warm_start(tmp_path, monkeypatch):
    hide(monkeypatch, "matplotlib")
    with pytest.raises(UserError, match="curves.png needs the package matplotlib"):
        run_demo(str(tmp_path / "demo"))
    assert not (tmp_path / "demo").exists()


def test_an_adapter_needs_peft(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    hide(monkeypatch, "peft")
    with pytest.raises(UserError, match="holds a LoRA adapter and needs the package peft: pip"):
        load_tokenizer(str(tmp_path))


def chained(*errors):
    for outer, inner in zip(errors, errors[1:], strict=False):
        outer.__cause__ = inner
    return errors[0]


@pytest.mark.parametrize("error, sentence", [
    (ModuleNotFoundError("No module named 'yaml'", name="yaml"),
     "needs the package pyyaml: pip install 'rlsd[train]'."),
    (ModuleNotFoundError("No module named 'x'", name="tensorboard.compat"),
     "needs the package tensorboard: pip install 'rlsd[log]'."),
    (chained(ModuleNotFoundError("Could not import module 'get_scheduler'."),
             ModuleNotFoundError("No module named 'accelerate'", name="accelerate")),
     "needs the package accelerate: pip install 'rlsd[train]'."),
    (ImportError("\n Qwen3VLVideoProcessor requires torchvision.\nInstall it."),
     "cannot import what it needs (Qwen3VLVideoProcessor requires torchvision); `rlsd doctor` "
     "lists what is there."),
    (ImportError("cannot import name 'a' from 'transformers'", name="transformers"),
     "cannot import what it needs (cannot import name 'a' from 'transformers'); `rlsd doctor` "
     "lists what is there."),
])
def test_an_import_that_fails_is_one_sentence(error, sentence):
    assert import_failure(error) == sentence
    one_sentence(f"rlsd: train {sentence}")


def bare_site(folder):
    """Links to torch, numpy and what they require, as an environment without the rest has them."""
    wanted, taken = ["torch", "numpy"], set()
    while wanted:
        name = wanted.pop()
        if name in taken:
            continue
        taken.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        wanted += [
            r.name for r in map(Requirement, found.requires or ())
            if r.marker is None or r.marker.evaluate({"extra": ""})
        ]
        for top in {path.parts[0] for path in found.files} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))
    return folder


def test_torch_and_numpy_are_enough_for_every_command(tmp_path):
    """In an interpreter that finds nothing else: no traceback; sentences name the extra."""
    code = (
        "import runpy, sys; site, script = sys.argv[1:3]; sys.path += [site, sys.argv[3]]; "
        "sys.argv[1:] = [sys.argv[4]]; runpy.run_path(script, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, bare_site(tmp_path),
         ROOT / "tests" / "bare_install.py", ROOT, ROOT / "README.md"],
        cwd=tmp_path, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert re.search(r"1[2-9] commands, 0 wrong", done.stdout)
    assert missing(OPTIONAL) != list(OPTIONAL)  # here there is more
