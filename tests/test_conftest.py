import os
import random
import socket
import threading

import numpy as np
import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_uninitialised_memory_is_nan(dtype):
    x = torch.ones(3, dtype=dtype)
    fresh = [torch.empty(1000, dtype=dtype), x.new_empty(1000), torch.empty_like(x)]
    fresh.append(torch.empty_strided((10, 10), (1, 10), dtype=dtype))
    assert all(f.isnan().all() for f in fresh)
    assert (torch.empty(5, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_poison_reaches_inside_custom_ops():
    @torch.library.custom_op("rlsd_test::uninitialised", mutates_args=())
    def op(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(7)

    assert op(torch.ones(1)).isnan().all()


@pytest.mark.parametrize("again", [0, 1])
def test_every_test_starts_from_the_same_seed(again):
    drawn = (random.random(), float(np.random.rand()), float(torch.rand(())))
    assert drawn == pytest.approx((0.8444218515250481, 0.5488135039273248, 0.4962565899), abs=1e-6)


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.org", 443)])
@pytest.mark.parametrize("method", ["connect", "connect_ex"])
def test_network_is_blocked(address, method):
    with socket.socket() as s, pytest.raises(RuntimeError, match="must not use the network"):
        getattr(s, method)(address)


def test_ipv6_network_is_blocked():
    with socket.socket(socket.AF_INET6) as s, pytest.raises(RuntimeError, match="network"):
        s.connect(("2001:db8::1", 80, 0, 0))


def test_create_connection_is_blocked():
    with pytest.raises(RuntimeError, match="network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)


def test_loopback_is_allowed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].sendall(b"x"))
        thread.start()
        with socket.create_connection(server.getsockname(), timeout=5) as client:
            assert client.recv(1) == b"x"
        thread.join()


def test_hub_is_offline():
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"
