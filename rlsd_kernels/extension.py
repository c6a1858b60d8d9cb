"""Finds, builds and loads csrc as torch.ops.rlsd_cuda.

One shared object in PyTorch's stable ABI. Either setup.py built it into this folder, or one nvcc
command builds it on first use into a cache folder, keyed by sources, torch and architectures.
Settings: RLSD_BUILD_CUDA=0 (never build) or 1 (an install that cannot build fails), and
RLSD_CUDA_ARCHS, such as "80;90a;100". setup.py runs this file without torch: it is imported where
it is used.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PREBUILT = "_cuda.so"
DEFAULT_ARCHS = "80;90a;100"
TARGET_TORCH = "0x020a000000000000"  # 2.10, the first whose stable ABI has what api.cpp uses


class Unavailable(RuntimeError):
    """One sentence: why the extension cannot be built or loaded."""


def source_folder():
    """csrc of the checkout, or the copy inside an installed package."""
    inside = HERE / "csrc"
    return inside if inside.is_dir() else HERE.parent / "csrc"


def source_files():
    folder = source_folder()
    return sorted(folder.glob("*.cu")) + sorted(folder.glob("*.cpp"))


def source_hash():
    digest = hashlib.sha256()
    for path in sorted(source_folder().glob("*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def nvcc():
    """Path of the CUDA compiler, or None: $CUDA_HOME, the PATH, /usr/local/cuda."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    paths = [os.path.join(x, "bin") for x in places if x]
    if not places[0]:
        paths.insert(0, os.environ.get("PATH", ""))
    return shutil.which("nvcc", path=os.pathsep.join(paths))


@functools.cache
def nvcc_version(path):
    text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def build_setting():
    """None, False or True: RLSD_BUILD_CUDA unset, 0 or 1."""
    value = os.environ.get("RLSD_BUILD_CUDA", "")
    if value not in ("", "0", "1"):
        raise Unavailable(f"RLSD_BUILD_CUDA must be 0 or 1, but is {value!r}.")
    return {"": None, "0": False, "1": True}[value]


def parse_archs(text):
    """["80", "90a"] of "80;90a"."""
    archs = [x.strip() for x in text.split(";") if x.strip()]
    for arch in archs or [text]:
        if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(arch.rstrip("af")) < 80:
            raise Unavailable(
                f"RLSD_CUDA_ARCHS must list architectures from 80 on, such as {DEFAULT_ARCHS!r}, "
                f"but has {arch!r}."
            )
    return archs


def _arch_flags(archs):
    """Machine code of each, and PTX of the last for GPUs yet to come."""
    newest = archs[-1].rstrip("af")
    flags = [f"arch=compute_{x},code=sm_{x}" for x in archs]
    return [y for x in (*flags, f"arch=compute_{newest},code=compute_{newest}")
            for y in ("-gencode", x)]


def _torch_folder():
    spec = importlib.util.find_spec("torch")
    return None if spec is None else Path(spec.submodule_search_locations[0])


def command(compiler, output, archs, sources, *options):
    """The one nvcc command. libtorch.so brings in libtorch_cuda.so where torch has it, and defines
    nothing itself: linkers that drop such a library by default, as Ubuntu's, are told not to."""
    torch = _torch_folder()
    return [
        compiler, "-shared", "-std=c++17", "-O3", "-Xcompiler", "-fPIC",
        "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TARGET_TORCH}", f"-I{torch / 'include'}",
        *_arch_flags(archs), *options, *map(str, sources), "-Xlinker", "--no-as-needed",
        f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-o", str(output),
    ]


def _did_not_compile(archs, log):
    """What to raise, by the output that a failed build left in log."""
    lines = log.read_text().splitlines()
    errors = [x for x in lines if re.search(r"\berror\b|fatal", x, re.I)] or lines[-1:]
    return Unavailable(
        f"The CUDA extension did not compile for {';'.join(archs)}: "
        f"{errors[0].strip() if errors else 'no output'} (all of it in {log})."
    )


def build(output, archs):
    """Compile csrc to output, and beside it in .json what it was compiled for."""
    compiler, output = nvcc(), Path(output)
    missing = None
    if compiler is None:
        missing = "nvcc is not found; install the CUDA toolkit or set CUDA_HOME"
    elif _torch_folder() is None:
        missing = "torch is not installed where it is built; use pip's --no-build-isolation"
    elif not source_files():
        missing = f"its sources are not in {source_folder()}"
    if missing:
        raise Unavailable(f"The CUDA extension cannot be built: {missing}.")
    print(
        f"rlsd_kernels: building the CUDA extension for sm_{', sm_'.join(archs)} with {compiler} "
        "(a minute or two, once)", file=sys.stderr, flush=True,
    )
    part, log = output.with_suffix(f".{os.getpid()}.so"), output.with_suffix(".log")
    done = subprocess.run(
        command(compiler, part, archs, source_files(), "--threads", "0"), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    log.write_text(done.stdout)
    if done.returncode != 0:
        part.unlink(missing_ok=True)
        raise _did_not_compile(archs, log)
    log.unlink()
    major, minor = nvcc_version(compiler)
    info = {"archs": archs, "sources": source_hash(), "cuda": [major, minor]}
    output.with_suffix(".json").write_text(json.dumps(info) + "\n")
    os.replace(part, output)


def install_archs():
    """Architectures of an installed build: RLSD_CUDA_ARCHS, else those nvcc knows of the usual."""
    chosen = os.environ.get("RLSD_CUDA_ARCHS")
    if chosen:
        return parse_archs(chosen)
    known = subprocess.run([nvcc(), "--list-gpu-arch"], capture_output=True, text=True).stdout
    archs = parse_archs(DEFAULT_ARCHS)
    return [x for x in archs if f"compute_{x.rstrip('af')}" in known.split()] or archs


def why_not_installed():
    """None if an install is to build the extension, else the reason why it does not."""
    if build_setting() is False:
        return "RLSD_BUILD_CUDA=0"
    if build_setting() is None and nvcc() is None:
        return "nvcc is not found"
    if build_setting() is None and _torch_folder() is None:
        return "torch is not installed where it is built (pip's --no-build-isolation shows it)"
    return None


def install(folder):
    """setup.py: build into folder, or say why not; RLSD_BUILD_CUDA=1 makes that an error."""
    reason = why_not_installed()
    if reason is None:
        try:
            return build(Path(folder) / PREBUILT, install_archs() if nvcc() else [])
        except Unavailable as error:
            if build_setting():
                raise
            reason = str(error)
    print(f"rlsd_kernels: the CUDA extension is left to its first use: {reason}", file=sys.stderr)


def _covers(arch, capability):
    """Whether machine code for arch runs on a device of this capability."""
    number = int(arch.rstrip("af"))
    major, minor = divmod(number, 10)
    if arch.endswith("a"):
        return (major, minor) == capability
    return major == capability[0] and minor <= capability[1]


def _mismatch(info, capabilities, driver):
    """Why a shared object with this info does not serve the devices, or None."""
    archs, (major, minor) = info["archs"], info["cuda"]
    if info["sources"] != source_hash():
        return "was built from other sources"
    ptx = divmod(int(archs[-1].rstrip("af")), 10)
    for capability in capabilities:
        if not any(_covers(x, capability) for x in archs) and capability < ptx:
            return f"was built for {';'.join(archs)}, not for sm_{capability[0]}{capability[1]}"
    if driver < major:
        return f"was built with CUDA {major}.{minor}, but the driver only knows CUDA {driver}"
    return None


def _device_arch(capability):
    """The architecture to build on the spot: 90a has what Hopper alone has."""
    return "90a" if capability == (9, 0) else f"{capability[0]}{capability[1]}"


def _cache_folder():
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "rlsd"


def driver_version():
    """Newest CUDA that the driver runs, 1000 * major + 10 * minor. PyTorch gives none."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError as error:
        raise Unavailable(
            f"the CUDA implementation needs NVIDIA's driver for Linux ({error}); use impl='torch'."
        ) from None
    if failed:
        raise Unavailable(f"NVIDIA's driver does not say its version: error {failed}.")
    return version.value


def _check_device():
    import torch

    advice = "use impl='torch'."
    if torch.version.cuda is None:
        raise Unavailable(
            f"the CUDA implementation needs a torch built for NVIDIA GPUs, but this is "
            f"torch {torch.__version__}; {advice}"
        )
    if not torch.cuda.is_available():
        raise Unavailable(
            f"the CUDA implementation needs an NVIDIA GPU and none is available here; {advice}"
        )
    capabilities = sorted(
        {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    )
    if capabilities[0] < (8, 0):
        raise Unavailable(
            f"the CUDA implementation needs an NVIDIA GPU of sm_80 or later; {advice}"
        )
    return capabilities, driver_version() // 1000


def _find():
    """The shared object for the GPUs here, and the archs to build it for (None: it is there)."""
    import torch

    capabilities, driver = _check_device()
    problem = "no built extension came with the package"
    prebuilt = HERE / PREBUILT
    if prebuilt.exists():
        info = json.loads(prebuilt.with_suffix(".json").read_text())
        problem = _mismatch(info, capabilities, driver)
        if problem is None:
            return prebuilt, None
        problem = f"the extension that came with the package {problem}"
    chosen = os.environ.get("RLSD_CUDA_ARCHS")
    archs = parse_archs(chosen) if chosen else [_device_arch(x) for x in capabilities]
    key = f"{source_hash()}-torch{torch.__version__}-sm{'-'.join(archs)}"
    cached = _cache_folder() / key / PREBUILT
    wanted = {"archs": archs, "sources": source_hash(), "cuda": [0, 0]}
    if cached.exists():
        wanted = json.loads(cached.with_suffix(".json").read_text())
    elif build_setting() is False:
        raise Unavailable(f"{problem}, and RLSD_BUILD_CUDA=0 forbids to build it; unset it.")
    elif not source_files():
        raise Unavailable(f"{problem}, and there are no sources in {source_folder()} to build.")
    elif nvcc() is None:
        raise Unavailable(
            f"{problem}, and nvcc is not found to build it; install the CUDA toolkit or set "
            "CUDA_HOME, or use impl='triton'."
        )
    else:
        wanted["cuda"] = list(nvcc_version(nvcc()))
    mismatch = _mismatch(wanted, capabilities, driver)
    if mismatch is not None:
        raise Unavailable(f"the extension that would be loaded {mismatch}; use impl='triton'.")
    return cached, None if cached.exists() else archs


_failed = []  # why this process could not build or load it: it is not tried again


@functools.cache
def _found():
    try:
        _find()
    except Unavailable as reason:
        return str(reason)
    return "ok"


def status():
    """"ok", or in one sentence why impl='cuda' cannot run here. Compiles and loads nothing."""
    return _failed[0] if _failed else _found()


@contextlib.contextmanager
def _locked(path):
    """One process at a time builds into a cache folder; the others wait and find it done."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build_once(path, archs):
    """Build into the cache unless another process does so meanwhile, or has just failed to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, log = path.with_suffix(".lock"), path.with_suffix(".log")
    began = time.time_ns()
    with _locked(lock):
        if path.exists():
            return
        if log.exists() and log.stat().st_mtime_ns >= began:
            raise _did_not_compile(archs, log)
        build(path, archs)


def _build_and_load():
    import torch

    path, archs = _find()
    if archs is not None:
        try:
            _build_once(path, archs)
        except OSError as error:
            raise Unavailable(
                f"The CUDA extension cannot be built in {path.parent}: {error}; set XDG_CACHE_HOME "
                "to a folder that can be written."
            ) from None
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise Unavailable(f"The CUDA extension {path} does not load: {error}.") from None
    return torch.ops.rlsd_cuda


@functools.cache
def load():
    """torch.ops.rlsd_cuda, built if it must be. A failure is final for this process."""
    if status() != "ok":
        raise Unavailable(status())
    try:
        return _build_and_load()
    except Unavailable as error:
        _failed.append(str(error))
        raise
