"""Seeds, poisoned memory and no network for every test."""

import importlib.util
import ipaddress
import os
import random
import socket

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# Waiting threads sleep: test_torch_impl.py on 2 busy cores took 98 s by default, 12 to 16 s so.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    # Read when a kernel is defined, so before any test imports one.
    os.environ["TRITON_INTERPRET"] = "1"


def _round_to_bf16_like_a_gpu():
    """Triton's interpreter truncates fp32 to bf16, twice the error of the rounding on a GPU."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    plain = {("fp32", "bf16"), ("bf16", "fp32")}
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}

    def converted(x, source, target, rounding):
        if (source.name, target.name) not in plain:
            return convert(x, source, target, rounding)
        x = np.array(x, order="C")  # bits: the interpreter holds bf16 as uint16
        x = torch.from_numpy(x.view(np.uint16 if source.name == "bf16" else np.float32))
        y = x.view(torch_dtype[source.name]).to(torch_dtype[target.name])
        bits = torch.uint16 if target.name == "bf16" else torch.uint32
        return y.view(bits).numpy()

    interpreter._convert_float = converted


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    _round_to_bf16_like_a_gpu()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "gpu: needs a GPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For the runs of one test file, which take one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path_factory.mktemp("runs")
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Deterministic mode fills torch.empty with NaN (int: the maximum); warn_only keeps all ops."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _is_local(address):
    if not isinstance(address, tuple):
        return True  # a Unix socket path
    host = str(address[0])
    if host in ("localhost", ""):
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    for name in ("connect", "connect_ex"):
        original = getattr(socket.socket, name)

        def guarded(self, address, original=original):
            if not _is_local(address):
                raise RuntimeError(f"tests must not use the network, but connect to {address}")
            return original(self, address)

        monkeypatch.setattr(socket.socket, name, guarded)
