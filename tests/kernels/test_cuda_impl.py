"""How impl="cuda" is found, built and refused, its interface, and what csrc compiles to.

What its kernels compute is in test_triton_impl.py, and their formulas are in test_cuda_math.py.
"""

import inspect
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import emulation
import pytest
import torch

from rlsd_kernels import (
    available_impls,
    cuda_impl,
    extension,
    fused_linear_rlsd_loss,
    linear_log_probs,
    logprob,
)
from rlsd_kernels import config as settings
from rlsd_kernels.streaming import STORE_EXP, STORE_LOGITS, STORE_NONE

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "bench" / "results" / "cuda"
needs_nvcc = pytest.mark.skipif(extension.nvcc() is None, reason="nvcc is not installed")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No remembered status and no settings of the caller's."""
    for name in ("RLSD_BUILD_CUDA", "RLSD_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    extension._found.cache_clear()
    monkeypatch.setattr(extension, "_failed", [])
    yield
    extension._found.cache_clear()


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A machine with one Hopper GPU, a CUDA 13 driver, an nvcc and nothing built."""
    monkeypatch.setattr(extension, "_check_device", lambda: ([(9, 0)], 13))
    monkeypatch.setattr(extension, "HERE", tmp_path / "package")
    monkeypatch.setattr(extension, "source_folder", lambda: ROOT / "csrc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "package").mkdir()
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    monkeypatch.setattr(extension, "nvcc", lambda: str(compiler))
    monkeypatch.setattr(extension, "nvcc_version", lambda path: (13, 0))

    def script(text):
        compiler.write_text("#!/bin/sh\n" + text)
        compiler.chmod(0o755)

    # What nvcc is called with, and an output that no loader takes.
    script(f'echo "$@" >> {tmp_path}/calls\n'
           'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo text > "$2"; shift; done\n')
    return tmp_path, script


def prebuilt(tmp_path, **info):
    built = {"archs": ["80", "90a"], "sources": extension.source_hash(), "cuda": [13, 0]} | info
    (tmp_path / "package" / "_cuda.json").write_text(json.dumps(built))
    (tmp_path / "package" / "_cuda.so").write_text("text")


# -- the interface ---------------------------------------------------------------------------------


def test_the_stages_are_those_of_triton():
    triton_impl = pytest.importorskip("rlsd_kernels.triton_impl")
    assert cuda_impl.__all__ == triton_impl.__all__
    for name in cuda_impl.__all__:
        ours, theirs = getattr(cuda_impl, name), getattr(triton_impl, name)
        if name == "Scorer":
            for method in ("score", "logit_gradient"):
                assert inspect.signature(getattr(ours, method)) == inspect.signature(
                    getattr(theirs, method)
                ), method
        else:
            assert inspect.signature(ours) == inspect.signature(theirs), name


def test_the_constants_of_csrc_are_those_of_python():
    header, maths = ((ROOT / "csrc" / x).read_text() for x in ("rlsd.h", "rlsd_math.cuh"))
    names = re.search(r"enum TokenSum \{(.*?)kTokenSums", header, re.S)[1]
    names = [x.strip()[1:] for x in names.split(",") if x.strip()]
    snake = [re.sub(r"(?<=.)([A-Z])", r"_\1", x).lower() for x in names]
    assert tuple(snake) == settings.TOKEN_SUMS
    value = dict(re.findall(r"(k\w+) = ([\d.e+-]+)", header + maths))
    assert [value[x] for x in ("kNone", "kExp", "kLogits")] == [
        str(x) for x in (STORE_NONE, STORE_EXP, STORE_LOGITS)
    ]
    assert float(value["kMaxLogRatio"]) == settings.MAX_LOG_RATIO
    assert (float(value["kRowSumMin"]), float(value["kRowSumMax"])) == settings.ROW_SUM_BOUNDS
    bounds = re.search(r"struct TokenBounds \{\s*T (.*?);", header, re.S)[1]
    order = [x.strip() for x in bounds.split(",")]
    config = settings.RLSDLossConfig(beta=0.7)
    given = dict(zip(order, config.token_bounds, strict=True))
    assert (given["weight_low"], given["weight_high"]) == config.log_weight_bounds
    assert (given["blame_low"], given["praise_high"], given["blame_high"]) == (
        config.log_ratio_bounds
    )
    assert (given["ratio_low"], given["ratio_high"], given["ratio_dual"], given["beta"]) == (
        0.8, 1.28, 3.0, 0.7
    )


# -- why it cannot run, without compiling or loading anything --------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can run here")
def test_it_says_why_it_cannot_run_here():
    reason = available_impls()["cuda"]
    assert re.match(r"the CUDA implementation needs .*NVIDIA GPU.*use impl='torch'\.$", reason)
    h = torch.randn(2, 4)
    with pytest.raises(ValueError) as error:
        fused_linear_rlsd_loss(
            h, torch.randn(9, 4), torch.tensor([1, 2]), torch.ones(2), teacher_hidden=h, impl="cuda"
        )
    assert str(error.value) == f"impl='cuda' cannot run: {reason}"


class Properties:
    """torch.cuda of a machine with these GPUs."""

    def __init__(self, monkeypatch, *capabilities, version="13.0", driver=13000):
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: capabilities[i])
        monkeypatch.setattr(extension, "driver_version", lambda: driver)


def test_the_driver_itself_says_its_version(monkeypatch):
    class Library:
        result = 0

        def __init__(self, name):
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, out):  # noqa: N802
            out._obj.value = 13010
            return self.result

    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(extension.ctypes, "CDLL", Library)
    assert extension.driver_version() == 13010
    Library.result = 3
    with pytest.raises(extension.Unavailable, match="does not say its version: error 3"):
        extension.driver_version()
    monkeypatch.setattr(extension.ctypes, "CDLL", absent)
    with pytest.raises(extension.Unavailable, match=r"libcuda.so.1: cannot open .*impl='torch'"):
        extension.driver_version()


def test_an_fp64_bias_gets_its_gradient_scaled(monkeypatch):
    emulation.stand_in(monkeypatch)
    h, w = torch.randn(4, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    grads = []
    for dtype in (torch.float32, torch.float64):
        bias = torch.zeros(50, dtype=dtype, requires_grad=True)
        out = fused_linear_rlsd_loss(
            h, w, torch.zeros(4, dtype=torch.long), torch.ones(4), rlsd_lambda=0.0, bias=bias,
            impl="cuda",
        )
        (2 * out.loss).backward()
        grads.append(bias.grad)
    assert grads[1].dtype == torch.float64
    torch.testing.assert_close(grads[1].float(), grads[0])


def test_devices(monkeypatch):
    Properties(monkeypatch, (9, 0), (8, 0), (9, 0), driver=12080)
    assert extension._check_device() == ([(8, 0), (9, 0)], 12)
    for capabilities, version, reason in (
        ([(9, 0), (7, 5)], "13.0", "sm_80 or later"), ([], "13.0", "none is available here"),
        ([(9, 0)], None, "built for NVIDIA GPUs"),
    ):
        Properties(monkeypatch, *capabilities, version=version)
        with pytest.raises(extension.Unavailable, match=reason):
            extension._check_device()


@pytest.mark.parametrize("archs, capability, fits", [
    (["80", "90a", "100"], (8, 6), True),  # machine code of the same major version
    (["80", "90a", "100"], (9, 0), True),
    (["80", "90a", "100"], (12, 0), True),  # PTX of the last
    (["90a"], (8, 0), False),
    (["100"], (9, 0), False),
    (["86", "100"], (8, 0), False),
    (["80", "90a"], (10, 0), True),
])
def test_what_a_build_covers(archs, capability, fits):
    info = {"archs": archs, "sources": extension.source_hash(), "cuda": [13, 0]}
    reason = extension._mismatch(info, [capability], 13)
    major, minor = capability
    assert reason == (None if fits else
                      f"was built for {';'.join(archs)}, not for sm_{major}{minor}")


def test_status_never_builds(hopper, monkeypatch):
    tmp_path, _ = hopper
    assert extension.status() == "ok" and available_impls()["cuda"] == "ok"
    assert not (tmp_path / "calls").exists() and not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="^impl='cuda' cannot run: .*on a GPU, but got cpu"):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        logprob.choose_impl("cuda", torch.empty(0))


@pytest.mark.parametrize("problem, sentence", [
    ("no nvcc", "no built extension came with the package, and nvcc is not found to build it; "),
    ("forbidden", "no built extension came with the package, and RLSD_BUILD_CUDA=0 forbids"),
    ("no sources", "no built extension came with the package, and there are no sources in .*empty"),
    ("setting", "RLSD_BUILD_CUDA must be 0 or 1, but is 'yes'."),
    ("archs", "RLSD_CUDA_ARCHS must list architectures from 80 on, such as '80;90a;100', but has "
              "'hopper'."),
    ("old arch", "RLSD_CUDA_ARCHS must list architectures from 80 on, .*but has '75'."),
    ("other arch", "the extension that came with the package was built for 100, not for sm_90, and "
                   "nvcc is not found"),
    ("other sources", "the extension that came with the package was built from other sources, and"),
    ("driver", "the extension that came with the package was built with CUDA 14.1, but the driver "
               "only knows CUDA 13, and nvcc is not found"),
    ("own driver", "the extension that would be loaded was built with CUDA 14.0, but the driver "
                   "only knows CUDA 13; use impl='triton'."),
])
def test_why_not(problem, sentence, hopper, monkeypatch):
    tmp_path, _ = hopper
    given = {
        "other arch": {"archs": ["100"]}, "other sources": {"sources": "0"},
        "driver": {"cuda": [14, 1]},
    }
    if problem in given:
        prebuilt(tmp_path, **given[problem])
    if problem in ("no nvcc", *given):
        monkeypatch.setattr(extension, "nvcc", lambda: None)
    elif problem == "no sources":
        monkeypatch.setattr(extension, "source_folder", lambda: tmp_path / "empty")
    elif problem in ("forbidden", "setting"):
        monkeypatch.setenv("RLSD_BUILD_CUDA", "0" if problem == "forbidden" else "yes")
    elif "arch" in problem:
        monkeypatch.setenv("RLSD_CUDA_ARCHS", "80;75" if problem == "old arch" else "hopper")
    else:
        monkeypatch.setattr(extension, "nvcc_version", lambda path: (14, 0))
    reason = extension.status()
    assert re.match(sentence, reason) and reason.endswith("."), reason
    assert "\n" not in reason and reason.count(". ") == 0


def test_a_build_that_came_with_the_package_is_taken(hopper, monkeypatch):
    tmp_path, _ = hopper
    prebuilt(tmp_path)
    monkeypatch.setattr(extension, "nvcc", lambda: None)
    assert extension.status() == "ok"
    assert extension._find() == (tmp_path / "package" / "_cuda.so", None)


def test_the_choice_is_no_obstacle_to_torch_compile(monkeypatch):
    """fullgraph: neither the files that status() reads nor the late import break the graph."""
    emulation.stand_in(monkeypatch)
    torch._dynamo.reset()
    files = ROOT / "csrc"
    monkeypatch.setattr(extension, "status", lambda: "ok" if any(files.iterdir()) else "empty.")
    h, weight, ids = torch.randn(3, 8), torch.randn(40, 8), torch.tensor([1, 39, 0])
    leaves = [h.requires_grad_(), weight.requires_grad_()]

    def step(h, weight):
        return linear_log_probs(h, weight, ids, impl="cuda")

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        lp = f(*leaves)
        results.append((lp.detach(), *torch.autograd.grad(lp.sum(), leaves)))
    assert all(map(torch.equal, *results))


# -- building --------------------------------------------------------------------------------------


def test_it_is_built_once_and_kept(hopper, monkeypatch, capsys):
    tmp_path, _ = hopper
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    for _ in range(2):
        extension.load.__wrapped__()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 1 and len(loaded) == 2 and loaded[0] == loaded[1]
    assert "arch=compute_90a,code=sm_90a" in calls[0]
    assert "arch=compute_90,code=compute_90" in calls[0] and "-DUSE_CUDA" in calls[0]
    assert all(x.name in calls[0] for x in (ROOT / "csrc").glob("*.c*") if x.suffix != ".cuh")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "building the CUDA extension for sm_90a with" in said[0]
    folder = Path(loaded[0]).parent
    assert extension.source_hash() in folder.name and torch.__version__ in folder.name
    assert folder.name.endswith("sm90a") and folder.parent == tmp_path / "cache" / "rlsd"
    monkeypatch.setenv("RLSD_CUDA_ARCHS", "80;90a")
    extension.load.__wrapped__()
    assert loaded[2] != loaded[0] and len((tmp_path / "calls").read_text().splitlines()) == 2


def test_a_source_that_does_not_compile(hopper):
    tmp_path, script = hopper
    script("echo 'exp_rows.cu(7): warning: dull'; echo 'exp_rows.cu(9): error: no such thing'\n"
           "exit 2\n")
    with pytest.raises(extension.Unavailable) as error:
        extension.load.__wrapped__()
    sentence = str(error.value)
    assert re.match(r"The CUDA extension did not compile for 90a: exp_rows.cu\(9\): error: no such "
                    r"thing \(all of it in .*\.log\)\.$", sentence)
    log = re.search(r"in (\S+\.log)", sentence)[1]
    assert "dull" in Path(log).read_text()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_failed_build_is_not_tried_again_and_status_says_it(hopper):
    tmp_path, script = hopper
    script(f"echo x >> {tmp_path}/calls; echo 'exp_rows.cu(9): error: no such thing'; exit 2\n")
    assert extension.status() == "ok"
    sentences = set()
    for _ in range(3):
        with pytest.raises(extension.Unavailable) as error:
            extension.load()
        sentences |= {str(error.value), extension.status(), available_impls()["cuda"]}
    assert len(sentences) == 1 and "error: no such thing" in sentences.pop()
    assert (tmp_path / "calls").read_text() == "x\n"


def test_a_build_that_failed_while_others_waited_is_not_theirs_to_try(hopper):
    """Eight ranks of one machine: one nvcc, eight sentences."""
    tmp_path, script = hopper
    script(f"echo x >> {tmp_path}/calls; sleep 0.3; echo 'fatal: no space left'; exit 2\n")
    folder = tmp_path / "cache" / "key"
    said = []

    def rank():
        try:
            extension._build_once(folder / "_cuda.so", ["90a"])
        except extension.Unavailable as error:
            said.append(str(error))

    ranks = [threading.Thread(target=rank) for _ in range(3)]
    for x in ranks:
        x.start()
    for x in ranks:
        x.join()
    assert len(said) == 3 and len(set(said)) == 1 and "no space left" in said[0]
    assert (tmp_path / "calls").read_text() == "x\n"
    rank()  # one that comes later tries anew: the machine may have been put right
    assert (tmp_path / "calls").read_text() == "x\nx\n"


def test_a_cache_that_cannot_be_written(hopper, monkeypatch):
    tmp_path, _ = hopper
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(extension.Unavailable) as error:
        extension.load()
    assert re.match(r"The CUDA extension cannot be built in .*file.*: .*Not a directory.*; set "
                    r"XDG_CACHE_HOME to a folder that can be written\.$", str(error.value))
    assert extension.status() == str(error.value)


def test_a_library_that_does_not_load(hopper):
    with pytest.raises(extension.Unavailable, match="does not load: .*_cuda.so") as error:
        extension.load.__wrapped__()
    assert extension.status() == str(error.value)


def test_installing_without_a_compiler(hopper, monkeypatch, capsys):
    monkeypatch.setattr(extension, "nvcc", lambda: None)
    extension.install(extension.HERE)
    assert "left to its first use: nvcc is not found" in capsys.readouterr().err
    monkeypatch.setenv("RLSD_BUILD_CUDA", "1")
    with pytest.raises(extension.Unavailable, match="nvcc is not found; install the CUDA toolkit"):
        extension.install(extension.HERE)
    monkeypatch.setenv("RLSD_BUILD_CUDA", "0")
    extension.install(extension.HERE)
    assert "RLSD_BUILD_CUDA=0" in capsys.readouterr().err and not list(extension.HERE.iterdir())


def test_installing_with_a_compiler(hopper, monkeypatch):
    tmp_path, _ = hopper
    monkeypatch.setenv("RLSD_CUDA_ARCHS", "80;90a")
    assert extension.why_not_installed() is None
    extension.install(extension.HERE)
    assert (extension.HERE / "_cuda.so").exists() and extension._find()[1] is None
    info = json.loads((extension.HERE / "_cuda.json").read_text())
    assert info == {"archs": ["80", "90a"], "sources": extension.source_hash(), "cuda": [13, 0]}


def test_a_wheel_carries_the_sources(tmp_path):
    """From a copy of the tree, as pip builds one; RLSD_BUILD_CUDA=0 leaves the compiler out."""
    pytest.importorskip("setuptools", minversion="77")
    names = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "csrc", "rlsd",
             "rlsd_kernels"]
    subprocess.run(["cp", "-r", *(ROOT / x for x in names), tmp_path], check=True)
    code = "from setuptools.build_meta import *; print(build_wheel('out'), build_sdist('out'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"RLSD_BUILD_CUDA": "0"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "left to its first use: RLSD_BUILD_CUDA=0" in done.stderr
    wheel, sdist = done.stdout.split()[-2:]
    assert wheel.endswith("-none-any.whl")
    carried = zipfile.ZipFile(tmp_path / "out" / wheel).namelist()
    wanted = {x.name for x in (ROOT / "csrc").iterdir()}
    assert {Path(x).name for x in carried if x.startswith("rlsd_kernels/csrc/")} == wanted
    listing = subprocess.run(["tar", "tzf", tmp_path / "out" / sdist], capture_output=True,
                             text=True, check=True).stdout
    assert {Path(x).name for x in listing.split() if "/csrc/" in x and x[-1] != "/"} == wanted


def test_a_wheel_with_the_extension_serves_every_python_of_its_platform(hopper):
    """The extension links no Python. The compiler is a stand-in."""
    pytest.importorskip("setuptools", minversion="77")
    tmp_path, _ = hopper
    names = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "rlsd", "rlsd_kernels"]
    tree = tmp_path / "tree"
    tree.mkdir()
    subprocess.run(["cp", "-r", *(ROOT / x for x in names), tree], check=True)
    done = subprocess.run(
        [sys.executable, "-c", "from setuptools.build_meta import *; print(build_wheel('out'))"],
        cwd=tree, capture_output=True, text=True, env=os.environ | {
            "RLSD_BUILD_CUDA": "1", "RLSD_CUDA_ARCHS": "90a", "CUDA_HOME": str(tmp_path),
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    wheel = done.stdout.split()[-1]
    assert re.search(r"-py3-none-(?!any)\w+\.whl$", wheel), wheel
    carried = zipfile.ZipFile(tree / "out" / wheel).namelist()
    assert {"rlsd_kernels/_cuda.so", "rlsd_kernels/_cuda.json"} <= set(carried)


# -- the oldest torch ------------------------------------------------------------------------------

# What torch 2.10 has of the names that api.cpp may use: a later one fails on users' machines alone.
TORCH_2_10 = {
    "torch/csrc/stable/accelerator.h", "torch/csrc/stable/library.h", "torch/csrc/stable/tensor.h",
    "torch/headeronly/core/ScalarType.h", "torch/headeronly/util/Exception.h",
    "torch::headeronly::ScalarType", "torch::stable::Tensor",
    "torch::stable::accelerator::DeviceGuard", "STD_TORCH_CHECK", "STABLE_TORCH_LIBRARY",
    "STABLE_TORCH_LIBRARY_IMPL", "TORCH_BOX", "TORCH_ERROR_CODE_CHECK",
    "aoti_torch_get_current_cuda_stream", "data_ptr(", "dim(", "get_device_index(",
    "is_contiguous(", "is_cuda(", "numel(", "scalar_type(", "size(", "stride(",
    "def(", "impl(",  # of a library
}
OURS = {"has_value(", "stream("}


def test_api_uses_names_of_the_oldest_torch_alone():
    text = re.sub(r"//.*", "", (ROOT / "csrc" / "api.cpp").read_text())
    names = (r"(?<=#include <)torch/[^>]+|\btorch::[\w:]+|\b(?:\w+_)?TORCH_\w+|\baoti_\w+"
             r"|(?:(?<=\.)|(?<=->))[a-z]\w+\(")
    assert set(re.findall(names, text)) - OURS == TORCH_2_10
    assert extension.TARGET_TORCH == "0x020a000000000000"
    assert '"torch>=2.10"' in (ROOT / "pyproject.toml").read_text()


@needs_nvcc
def test_api_compiles_as_for_a_gpu():
    """Against the headers of this torch, and of those that RLSD_TORCH_HEADERS names."""
    folders = [Path(torch.__file__).parent / "include",
               *filter(None, os.environ.get("RLSD_TORCH_HEADERS", "").split(os.pathsep))]
    for folder in folders:
        done = subprocess.run(
            ["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-DUSE_CUDA",
             f"-DTORCH_TARGET_VERSION={extension.TARGET_TORCH}", "-isystem", str(folder),
             "-isystem", str(emulation.cuda_headers()), str(ROOT / "csrc" / "api.cpp")],
            capture_output=True, text=True,
        )
        assert done.returncode == 0, f"{folder}: {done.stderr[-2000:]}"


# -- what nvcc makes of it -------------------------------------------------------------------------


def check(rows):
    """What must hold of every kernel on every architecture."""
    assert [r for r in rows if r["spills"]] == []
    for row in rows:
        name = row["kernel"]
        if name.startswith(("rlsd-exp", "rlsd-row-max", "rlsd-logit-gradient")):
            assert row["registers"] <= 85, row  # three blocks of 256 threads on an SM
            # four fp32 vectors in flight, or eight elements twice, and as many again for a bias
            assert row["loads"] >= 4, row
        if name.startswith(("rlsd-exp", "rlsd-logit-gradient")) and "none" not in name:
            assert row["stores"] >= 2, row
        assert row["registers"] * (512 if name == "rlsd-rows" else 256) <= 65536, row


@needs_nvcc
def test_one_architecture_compiles_without_spills():
    pytest.importorskip("triton")  # its cuobjdump
    done = subprocess.run(
        [sys.executable, "bench/cuda_report.py", "--print", "90a"], cwd=ROOT, capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)["rows"]
    committed = json.loads((REPORT / "report.json").read_text())["rows"]
    assert {r["kernel"] for r in rows} == {r["kernel"] for r in committed}
    check(rows)


@needs_nvcc
@pytest.mark.slow
def test_the_extension_builds_and_registers(tmp_path):
    """All of csrc for every architecture, linked, loaded and asked for its schemas."""
    code = f"""
import torch
from rlsd_kernels import extension
extension.build({str(tmp_path / "_cuda.so")!r}, extension.install_archs())
torch.ops.load_library({str(tmp_path / "_cuda.so")!r})
names = ["exp_rows", "row_max", "row_logits", "logit_gradient", "target_logits", "fix_targets",
         "energies", "scale", "token_rows"]
print([len(getattr(torch.ops.rlsd_cuda, n).default._schema.arguments) for n in names])
try:
    torch.ops.rlsd_cuda.fix_targets(torch.zeros(1, 1), torch.zeros(1).long(), torch.zeros(1))
except NotImplementedError as error:
    print("CUDA" in str(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    if torch.version.cuda is None and "undefined symbol" in done.stderr:
        pytest.skip("this torch has no CUDA to load it into")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["[11, 7, 7, 11, 4, 3, 5, 2, 23]", "True"]


def test_the_committed_report_is_of_these_sources():
    report = json.loads((REPORT / "report.json").read_text())
    assert report["sources"] == extension.source_hash(), "run python bench/cuda_report.py"
    assert {r["arch"] for r in report["rows"]} == {"sm_80", "sm_90a", "sm_100"}
    ends = r"rlsd-\w+(-max|-gradient|-logits|-targets)?"
    kernels = {re.search(ends, r["kernel"])[0].replace("-", "_") for r in report["rows"]}
    sources = "".join(p.read_text() for p in (ROOT / "csrc").glob("*.cu"))
    assert kernels == set(re.findall(r"\b(rlsd_\w+)_kernel\(", sources)) and len(kernels) == 9
    check(report["rows"])
    text = (REPORT / "report.md").read_text()
    for r in report["rows"]:
        assert "| " + " | ".join(map(str, r.values())) + " |" in text
