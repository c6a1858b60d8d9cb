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
from rlsd.cli import TESTED_HOSTS, lora_state, main


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
    assert lora_state() == "needs peft"


@pytest.mark.parametrize("versions, lines", [
    ({}, ["trl +missing", "ms-swift +missing", "verl +missing"]),
    ({"trl": "1.16.3", "ms-swift": "4.5.0", "verl": "0.9.1"},
     ["trl +1.16.3 +tested", "ms-swift +4.5.0 +outside the tested range, 4.6.x",
      "verl +0.9.1 +tested"]),
], ids=["missing", "installed"])
def test_doctor_says_which_integrations_load(capsys, monkeypatch, versions, lines):
    installed = importlib.metadata.version

    def version(name):
        if name not in TESTED_HOSTS:
            return installed(name)
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out.split("\nIntegrations\n")[1].splitlines()
    assert len(out) == len(lines)
    for line, pattern in zip(out, lines, strict=True):
        assert re.fullmatch(f"  {pattern}", line), line


def test_doctor_and_the_hooks_name_the_same_versions():
    for name, tested in TESTED_HOSTS.items():
        hook = Path(rlsd.__file__).parent / "integrations" / f"{name.replace('-', '_')}.py"
        assert f'"{tested}"' in hook.read_text()
