"""Loss, gradient and weights do not depend on the number of processes, nor on how they share."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_run import CASES, WORLDS

HERE = Path(__file__).parent
SIZES = {world: max(1, size) for world, size in WORLDS.items()}
TOLERANCE = 5e-6  # sums in another order


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{(world, case, rank): what it ended with}; case-on: resumed from another world."""
    folder = tmp_path_factory.mktemp("worlds")
    done = subprocess.run(
        [sys.executable, str(HERE / "distributed_run.py"), str(folder)], text=True,
        capture_output=True, timeout=600,
        env=os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return {
        (world, case, rank): torch.load(folder / world / f"{case}-{rank}.pt")
        for world, size in SIZES.items() for rank in range(size)
        for one in CASES for case in (one, f"{one}-on")
    }


def distance(got, want):
    """|got - want| over |want|, Frobenius over all tensors, in want's precision."""
    assert got.keys() == want.keys()
    error = sum((got[n].to(want[n].dtype) - want[n]).double().norm().item() ** 2 for n in want)
    norm = sum(want[n].double().norm().item() ** 2 for n in want)
    return math.sqrt(error / norm) if norm else error


@pytest.mark.parametrize("case", [*CASES, *(f"{case}-on" for case in CASES)])
@pytest.mark.parametrize("world", [world for world in WORLDS if world != "plain"])
def test_a_world_of_processes_trains_as_one(world, case, results):
    want = results["plain", case.removesuffix("-on"), 0]
    for rank in range(SIZES[world]):
        got = results[world, case, rank]
        assert got["kinds"] == (["DTensor" if world.startswith("fsdp") else "Tensor"])
        assert distance(got["student"], want["student"]) < TOLERANCE
        assert distance(got["teacher"], want["teacher"]) < TOLERANCE
        wanted = want["records"][-len(got["records"]):]
        for a, b in zip(got["records"], wanted, strict=True):
            for name in ("loss", "grad_norm", "aux_loss", "rlsd/delta_mean", "entropy", "kl"):
                if b.get(name) is not None:
                    assert a[name] == pytest.approx(b[name], rel=TOLERANCE, abs=TOLERANCE), name


def test_the_cases_are_not_vacuous(results):
    for case in CASES:
        result = results["plain", case, 0]
        for record in result["records"]:
            assert record["grad_norm"] > 0.1 and record["live_sequences"] >= 12
        assert result["records"][0]["aux_loss"] > 0 or case != "moe"
        assert bool(result["teacher"]) == (case != "moe")
