"""The benchmark: every provider computes the same function, and tables say what was measured."""

import dataclasses
import json
import sys

import pytest
import torch

from bench import bench_loss, common, plot
from bench.providers import EAGER, OURS, PROVIDERS
from rlsd import measure

CASE = common.CASES["tiny"]
RESULTS = common.ROOT / "bench/results/cpu/results.json"
README = (common.ROOT / "README.md").read_text(encoding="utf-8")
BY_NAME = {provider.name: provider for provider in PROVIDERS}


def marked(provider):
    marks = [pytest.mark.slow] if provider.compiled else []  # a C++ compiler runs for each
    return pytest.param(provider, id=provider.id(), marks=marks)


def skip_if_absent(provider):
    if reason := provider.obstacle():
        assert provider.modules or provider.compiled, reason  # these need nothing but torch
        pytest.skip(reason)


needs_proc = pytest.mark.skipif(
    sys.platform != "linux", reason="the benchmark reads memory and CPU from Linux's /proc"
)
MARKED = [marked(provider) for provider in PROVIDERS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("frozen_head", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("live", [1.0, 0.5])
@pytest.mark.parametrize("provider", MARKED)
def test_every_provider_computes_the_specification(provider, live, frozen_head, dtype):
    skip_if_absent(provider)
    torch._dynamo.reset()
    case = dataclasses.replace(CASE, dtype=dtype)
    problem = measure.make_problem(case, frozen_head=frozen_head, live=live)
    truth = measure.exact(problem)
    got = measure.gradients(problem, provider.step)
    assert (got["d_weight"] is None) == frozen_head
    wrong = measure.errors(got, truth, problem.live())
    logits_rounded = dtype == torch.bfloat16 and provider.logits == "input's"
    assert wrong["log_prob"] < (1e-2 if logits_rounded else 1e-5)
    assert wrong["loss"] < (1e-3 if logits_rounded else 1e-6)
    for key in ("d_hidden", "d_weight"):
        assert (wrong[key] or 0) < (5e-3 if dtype == torch.bfloat16 else 1e-5), key


def gemm_work(case, provider, frozen_head, live):
    problem = measure.make_problem(case, frozen_head=frozen_head, live=live)
    measure.gradients(problem, provider.step)  # torch.compile traces now, not under the profiler
    return measure.measured_nhv(case, lambda: measure.gradients(problem, provider.step))


@pytest.mark.parametrize("frozen_head", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("provider", MARKED)
def test_stated_gemm_work_is_what_runs(provider, frozen_head):
    skip_if_absent(provider)
    torch._dynamo.reset()
    stated = provider.nhv_frozen if frozen_head else provider.nhv
    assert gemm_work(CASE, provider, frozen_head, 1.0) == stated


def test_only_the_fused_loss_drops_dead_rows():
    assert gemm_work(CASE, BY_NAME[OURS], False, 0.5) == 4
    assert gemm_work(CASE, BY_NAME[EAGER], False, 0.5) == 8


@pytest.fixture(scope="module")
def results():
    """A run at the tiny shape: two providers, a third that cannot."""
    providers = [BY_NAME[EAGER], BY_NAME[OURS]]
    absent = dataclasses.replace(BY_NAME["TRL"], modules=("no_such_module",))
    options = {"frozen_head": False, "live": 0.5, "warmup_s": 0.0}
    data = {
        "environment": common.environment(bench_loss.PACKAGES), "rounds": 5, "warmup_s": 0.0,
        "providers": [
            {"name": p.name, "call": p.call, "package": p.package, "logits": p.logits,
             "not_run": p.obstacle() if p is absent else None}
            for p in (*providers, absent)
        ],
        "blocks": [
            bench_loss.run_block(CASE, providers, rounds=5, **options),
            bench_loss.run_block(common.CASES["tiny-bf16"], providers, rounds=0, **options),
        ],
    }
    return json.loads(json.dumps(data))


@needs_proc
def test_table_is_derived_from_the_results(results):
    for found in results["blocks"][0]["providers"].values():
        assert len(found["time"]["rounds"]) == 5 and found["peak_bytes"] >= 0
        found["time"] |= {"ms": 50.0, "p20": 40.0, "p80": 60.0}
        found["peak_bytes"] = 3 * 2**20
    ours = results["blocks"][0]["providers"][OURS]
    ours["time"]["ms"], ours["peak_bytes"] = 40.0, 2**20
    results["blocks"][0]["bare"]["ms"] = 30.0
    text = plot.table(results)
    row = next(line for line in text.splitlines() if line.startswith(f"| {OURS} |"))
    assert row.startswith(f"| {OURS} | 40 (40-60) | 1.25 | 75% | 1 | 33% | 4.0 |")
    assert "not run: no_such_module cannot be imported: No module named" in text
    assert "fp32, N=64, H=32, V=301, full head, 50% of the rows live" in text
    timed, accuracy = plot.block_table(results, results["blocks"][1]), plot.readme_rows(results)
    assert "step, ms" not in timed and f"| **{OURS}** | 40 | 75% | 1 | 4 |" in accuracy
    for block in results["blocks"]:
        for line in plot.block_table(results, block).splitlines()[2:]:
            assert line.count("|") == plot.block_table(results, block).splitlines()[2].count("|")


@needs_proc
def test_plot_is_drawn(results, tmp_path):
    plot.plot_times(results, tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


def test_committed_table_and_readme_are_generated():
    quoted = plot.quoted_in(README)
    if not RESULTS.exists():
        assert quoted == ""
        pytest.skip("bench/results/cpu is not committed; `make bench-cpu` makes it")
    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert (RESULTS.parent / "table.md").read_text(encoding="utf-8") == plot.table(data)
    assert quoted == plot.readme_rows(data).strip()


def test_committed_results_can_be_traced():
    if not RESULTS.exists():
        pytest.skip("bench/results/cpu is not committed; `make bench-cpu` makes it")
    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert not data["environment"]["dirty"] and data["rounds"] >= 5
    assert {p["name"] for p in data["providers"]} == set(BY_NAME)
