"""Everything here needs a CUDA device and says so where there is none.

    python -m pytest tests/gpu -q                              # on a machine with a GPU
    RLSD_TEST_DEVICE=cpu python -m pytest tests/gpu -q         # the bodies, tiny, without one
    tests/gpu/posing.py -m pytest tests/gpu -q                 # the same on the plans of a GPU

The last two check the tests themselves: what only exists on CUDA (marked `cuda_only`) is skipped,
everything else runs on the CPU at small sizes, Triton in its interpreter.
"""

from pathlib import Path

import pytest
import torch
from on_gpu import DEVICE, SMALL

HERE = Path(__file__).parent


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda_only: means nothing on a CPU")


def pytest_runtest_logreport(report):
    """At once: a run that hangs in a kernel and is killed never comes to its summary."""
    if report.failed and HERE.name in Path(report.fspath).parts:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = str(report.longrepr if crash is None else crash.message)
        print(f"\nFAILED {report.nodeid}: {reason[:400]}", flush=True)


def pytest_collection_modifyitems(items):
    reason = None
    if DEVICE == "cuda" and not torch.cuda.is_available():
        reason = "needs a CUDA device, and PyTorch sees none here"
    for item in items:
        if HERE not in Path(item.fspath).parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif SMALL and item.get_closest_marker("cuda_only"):
            item.add_marker(pytest.mark.skip(reason="means nothing on a CPU"))


@pytest.fixture
def production(_poisoned_memory):
    """As in use: no deterministic mode, whose indexing takes other kernels and more memory."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _freed_memory():
    """A test of 60 GB does not find what another left in the cache."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
