"""The Triton kernels as machine code, compiled without a GPU, and the committed report of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "aot_report.py"
REPORT = ROOT / "bench" / "results" / "aot"
# One build of each family; the whole matrix takes a minute.
FEW = ["exp-store-bf16-bias-softcap-entropy", "token-all", "gemm-exp-bf16-store",
       "distill-gradient-jsd-bf16-odd-V-biases-softcap"]


def run(tmp_path, *arguments):
    """Standard output of a process in which kernels are compiled, not interpreted."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def check(rows):
    """What must hold of every build."""
    assert [r for r in rows if r["spills"]] == []
    for row in rows:
        name, arch = row["kernel"], row["arch"]
        wanted = ""
        if name.startswith("gemm"):
            wanted = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}[arch]
            limit = {"sm_80": 99, "sm_90": 227, "sm_100": 227}[arch]  # KiB; 99 on sm_86 and sm_89
            assert row["shared"] <= limit * 1024, row
        elif name.startswith(("exp", "row-max", "gradient", "distill")):
            assert row["registers"] <= 128, row  # two blocks of 256 threads on an SM
        assert row["matrix"] == wanted, row


def test_a_few_builds(tmp_path):
    rows = json.loads(run(tmp_path, str(SCRIPT), "--print", *FEW))["rows"]
    assert [(r["kernel"], r["arch"]) for r in rows] == [
        (name, arch) for name in sorted(FEW) for arch in ("sm_80", "sm_90", "sm_100")
    ]
    check(rows)


@pytest.mark.slow
def test_every_build(tmp_path):
    names = sorted({name for name, _ in json.loads(run(tmp_path, str(SCRIPT), "--list"))})
    check(json.loads(run(tmp_path, str(SCRIPT), "--print", *names))["rows"])


def test_the_committed_report_is_of_these_builds(tmp_path):
    report = json.loads((REPORT / "report.json").read_text())
    listed = json.loads(run(tmp_path, str(SCRIPT), "--list"))
    assert sorted([r["kernel"], r["arch"]] for r in report["rows"]) == sorted(listed)
    check(report["rows"])
    table = (REPORT / "report.md").read_text()
    assert f"Triton {report['triton']}" in table
    for r in report["rows"]:
        cells = (r["kernel"], r["arch"], r["registers"], r["spills"], r["shared"],
                 r["matrix"] or "-")
        assert "| " + " | ".join(map(str, cells)) + " |" in table


def test_the_report_covers_every_kernel(tmp_path):
    code = """
import json
from triton.runtime import JITFunction
from rlsd_kernels import triton_distillation, triton_impl, triton_tokens
from bench import aot_report
kernels = {n: f for m in (triton_impl, triton_tokens, triton_distillation)
           for n, f in vars(m).items()
           if isinstance(f, JITFunction) and n.endswith("_kernel")}
built = {parts[0].__name__ for parts in aot_report.builds(90).values()}
sizes = {p.name: p.do_not_specialize for f in kernels.values() for p in f.params
         if p.name == "M"}
print(json.dumps([sorted(kernels), sorted(built), sizes]))
"""
    kernels, built, sizes = json.loads(run(tmp_path, "-c", code))
    assert kernels == built and len(kernels) == 13
    assert sizes == {"M": True}  # else a batch of one token, or of 16, would compile anew
