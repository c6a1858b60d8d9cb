"""The named problems of the benchmark, and what its results say of the machine they ran on."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from rlsd.checks.measure import Case
from rlsd_kernels import __version__

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20

# H and V of the LM heads of named models.
HEADS = {
    "Qwen3-0.6B": (1024, 151936), "Qwen3-1.7B": (2048, 151936), "Qwen3-4B": (2560, 151936),
    "Qwen3-8B": (4096, 151936), "Llama-3-8B": (4096, 128256), "Gemma-3-4B": (2560, 262208),
}


def model_case(model, rows, dtype=torch.bfloat16):
    return Case(rows, *HEADS[model], dtype, model)


CASES = {
    "main": Case(2048, 768, 49152),  # a 135 M model's vocabulary, 2048 response tokens
    "small": Case(512, 256, 16384),  # `make bench`: seconds
    "tiny": Case(64, 32, 301),  # tests
    # Accuracy only: a CPU without bf16 instructions multiplies bf16 100 times slower than fp32.
    "bf16": Case(512, 768, 16384, torch.bfloat16),
    "tiny-bf16": Case(64, 32, 301, torch.bfloat16),
    # Whether a provider runs on this GPU at all, and computes the right function.
    "probe": Case(256, 256, 4096, torch.bfloat16),
}


def environment(packages, device="cpu"):
    """What a reader needs to judge the numbers: processor, load, versions, commit (Linux).

    A copy of the repository takes the commit from the variable GIT_HASH, which ends in -dirty if
    files had been changed.
    """

    def git(*args):
        run = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else None  # an unpacked archive has none

    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next(
            (line.split(":")[1].strip() for line in file if line.startswith("model name")),
            platform.processor(),
        )
    # Results of an earlier run and the README's copy of them do not change what is measured.
    changed = git("status", "--porcelain", "--", ".", ":!bench/results", ":!README.md")
    commit, given = git("rev-parse", "HEAD"), os.environ.get("GIT_HASH", "")
    if given:
        commit, changed = given.removesuffix("-dirty"), given.endswith("-dirty")
    versions = {"rlsd": __version__}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    found = {
        "cpu": model, "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2), "platform": platform.platform(),
        "python": platform.python_version(), "versions": versions, "git": commit,
        "dirty": bool(changed),
    }
    return found | {"gpu": gpu_state()} if torch.device(device).type == "cuda" else found


def gpu_state():
    """Name, sizes, driver, clocks and temperature of the current GPU."""
    p = torch.cuda.get_device_properties()
    state = {
        "name": p.name, "capability": f"{p.major}.{p.minor}", "processors": p.multi_processor_count,
        "memory_mib": p.total_memory // MIB, "l2_mib": p.L2_cache_size / MIB,
        "cuda": torch.version.cuda,
    }
    fields = ("driver_version", "clocks.sm", "clocks.mem", "power.limit", "temperature.gpu")
    try:
        run = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader",
             f"--id={torch.cuda.current_device()}"], capture_output=True, text=True, timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return state
    values = [x.strip() for x in run.stdout.split(",")]
    return state | dict(zip(fields, values, strict=True)) if len(values) == len(fields) else state
