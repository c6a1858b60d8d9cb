"""What `rlsd doctor` finds installed, and what it tries."""

import contextlib
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
import transformers

import rlsd
from rlsd import __version__
from rlsd.cli import lora_state, main
from rlsd.packages import RELEASES


def test_doctor_says_what_is_installed_and_what_runs(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"rlsd {__version__}, Python 3." in out
    assert re.search(rf"^  transformers +{re.escape(transformers.__version__)} ", out, re.M)
    assert re.search(r"^  torch +ok$", out, re.M)
    assert re.search(r"^  LoRA +works$", out, re.M)
    assert re.search(r"^  impl='auto' runs '\w+'", out, re.M)


def test_doctor_tries_lora(capsys, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("please use\na version >= 99")

    monkeypatch.setattr("peft.functional.inject_adapter_in_model", refuse)
    assert main(["doctor"]) == 0
    assert "  LoRA            does not work: LoRA does not fit Qwen3ForCausalLM (please use" in (
        capsys.readouterr().out
    )
    monkeypatch.undo()
    monkeypatch.setattr("rlsd.policy.models.using_adapter", lambda *_: contextlib.nullcontext())
    assert lora_state() == "does not work: its passes are not those of its weights"
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "peft.functional", None)
    assert lora_state() == "needs the package peft: pip install 'rlsd[train]'"


@pytest.mark.parametrize("versions, lines", [
    ({}, ["transformers +missing", "trl +missing", "ms-swift +missing", "verl +missing"]),
    ({"transformers": "5.25.0", "trl": "1.14.3", "ms-swift": "4.5.0", "verl": "0.9.1"},
     ["transformers +5.25.0 +outside the tested range, 5.17 to 5.24", "trl +1.14.3 +tested",
      "ms-swift +4.5.0 +outside the tested range, 4.6.x", "verl +0.9.1 +tested"]),
], ids=["missing", "installed"])
def test_doctor_says_which_hosts_are_tested(capsys, monkeypatch, versions, lines):
    installed = importlib.metadata.version

    def version(name):
        if name not in RELEASES:
            return installed(name)
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out.split("\nHosts\n")[1].splitlines()
    assert len(out) == len(lines)
    for line, pattern in zip(out, lines, strict=True):
        assert re.fullmatch(f"  {pattern}", line), line


def test_doctor_and_the_hooks_name_the_same_versions():
    hooks = Path(rlsd.__file__).parent / "integrations"
    for name in ("ms-swift", "verl"):
        low, high = RELEASES[name]
        assert low == high
        assert f'"{low}."' in (hooks / f"{name.replace('-', '_')}.py").read_text()
