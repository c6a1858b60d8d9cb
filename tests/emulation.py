"""csrc as g++ builds it for the CPU with cuda_emulation.h, for tests without a GPU."""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from rlsd_kernels import extension, logprob

TESTS = Path(__file__).parent
BUILD = TESTS.parent / "build" / "emulated"


def _compile(name, sources, options, headers):
    """Shared object from sources, kept in build/ until any of its inputs changes."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    digest = hashlib.sha256(torch.__version__.encode())
    for path in (*sources, *headers):
        digest.update(Path(path).read_bytes())
    path = BUILD / f"{name}-{digest.hexdigest()[:16]}.so"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        command = [
            compiler, "-std=c++17", "-O1", "-fno-strict-aliasing", "-fPIC", "-shared", *options,
            "-x", "c++", *map(str, sources), "-o", str(part),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        os.replace(part, path)
    return path


def cuda_headers():
    nvcc = extension.nvcc()
    if nvcc is None:
        pytest.skip("the CUDA toolkit, whose headers csrc includes, is not installed")
    # The nvcc on the PATH may be a script that starts another: ask it where it lies.
    told = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    return Path(re.search(r"TOP=(\S+)", told)[1]) / "include"


@functools.cache
def operators():
    """torch.ops.rlsd_cuda on CPU tensors, in the place of the extension's."""
    folder, stable = extension.source_folder(), Path(torch.__file__).parent
    headers = [*sorted(folder.iterdir()), TESTS / "cuda_emulation.h"]
    options = [
        "-isystem", str(cuda_headers()), "-isystem", str(stable / "include"),
        f"-DTORCH_TARGET_VERSION={extension.TARGET_TORCH}", "-include",
        str(TESTS / "cuda_emulation.h"), f"-L{stable / 'lib'}", "-Wl,--no-as-needed", "-ltorch",
        "-ltorch_cpu",
    ]
    path = _compile("kernels", extension.source_files(), options, headers)
    torch.ops.load_library(path)
    return torch.ops.rlsd_cuda


def stand_in(monkeypatch):
    """impl="cuda" takes CPU tensors and runs these operators, for one test."""
    if torch.cuda.is_available():
        pytest.skip("the extension itself runs here, and holds the name of its operators")
    emulated = operators()
    monkeypatch.setattr(extension, "load", lambda: emulated)
    real = logprob.available_impls
    monkeypatch.setattr(logprob, "available_impls", lambda x=None: real(x) | {"cuda": "ok"})


@functools.cache
def math_library():
    """rlsd_math.cuh by itself, through token_math.cpp."""
    folder = extension.source_folder()
    headers = [folder / "rlsd.h", folder / "rlsd_math.cuh"]
    path = _compile("math", [TESTS / "token_math.cpp"], [f"-I{folder}"], headers)
    return ctypes.CDLL(str(path))
