"""The benchmark: every provider computes the same function, and tables say what was measured."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from bench import bench_loss, common, plot, prediction, stages
from bench.providers import (
    EAGER,
    GPU_PROVIDERS,
    ITS_OPTIONS,
    OURS,
    PROVIDERS,
    TOLERANT,
    TWO_OPS,
)
from rlsd.checks import measure, profiles
from rlsd.config import UserError
from rlsd_kernels import available_impls

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
    # Log-probs of 6 in 16 bits instead of logits of 1; loss and gradients are made of them.
    coarse = 4 if provider.logits == ITS_OPTIONS else 1
    rounded = dtype == torch.bfloat16 and provider.logits != "fp32"
    assert wrong["log_prob"] < (1e-2 * coarse if rounded else 1e-5)
    assert wrong["loss"] < (1e-3 * coarse if rounded else 1e-6)
    for key in ("d_hidden", "d_weight"):
        assert (wrong[key] or 0) < (5e-3 * coarse if dtype == torch.bfloat16 else 1e-5), key


def same_bits(one, other):
    return all(torch.equal(one[k], other[k]) for k in ("loss", "log_probs", "teacher_log_probs"))


TOLERANT_PROVIDERS = [p for p in PROVIDERS if p.gradient_tolerance]


@pytest.mark.parametrize("provider", TOLERANT_PROVIDERS, ids=lambda p: p.id())
def test_a_tolerant_row_is_its_exact_one_but_for_the_gradient(provider):
    name, _, tolerance = provider.name.partition(TOLERANT)
    assert float(tolerance) == provider.gradient_tolerance
    assert provider.call.endswith(f"gradient_tolerance={tolerance}")
    problem = measure.make_problem(CASE, profile="trained")
    got, exact = (measure.gradients(problem, p.step) for p in (provider, BY_NAME[name]))
    assert same_bits(got, exact)
    off = (got["d_hidden"] - exact["d_hidden"]).norm() / exact["d_hidden"].norm()
    assert 0.3 * provider.gradient_tolerance < off < 3 * provider.gradient_tolerance
    work = gemm_work(CASE, provider, False, 1.0, profile="trained")
    assert 4 < work < 7.5 < gemm_work(CASE, BY_NAME[name], False, 1.0, profile="trained")


def test_rows_are_named_for_what_runs():
    assert {p.name for p in TOLERANT_PROVIDERS} == {
        f"{OURS}{TOLERANT}1e-3", f"{OURS}{TOLERANT}1e-2", f"{TWO_OPS}{TOLERANT}1e-3",
    }
    assert "PyTorch fallback" in next(n for n in BY_NAME if n.startswith("Liger scaled CE"))
    assert 'impl="torch_compile"' in BY_NAME["cut-cross-entropy, torch.compile"].call
    cut = {p.name: p.call for p in GPU_PROVIDERS if p.package == "cut-cross-entropy"}
    assert "filter_eps='high'" in cut["cut-cross-entropy, gradient filter"]
    assert "filter_eps=None" in cut["cut-cross-entropy, no filter"]
    assert all('impl="cce"' in call for call in cut.values())


def gemm_work(case, provider, frozen_head, live, **profile):
    problem = measure.make_problem(case, frozen_head=frozen_head, live=live, **profile)
    measure.gradients(problem, provider.step)  # torch.compile traces now, not under the profiler
    return measure.measured_nhv(case, lambda: measure.gradients(problem, provider.step))


@pytest.mark.parametrize("frozen_head", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("provider", MARKED)
def test_stated_gemm_work_is_what_runs(provider, frozen_head):
    skip_if_absent(provider)
    torch._dynamo.reset()
    stated = provider.nhv_frozen if frozen_head else provider.nhv
    rank_one = 2 / CASE.rows if provider.gradient_tolerance else 0  # a GEMV at most
    assert stated <= gemm_work(CASE, provider, frozen_head, 1.0) <= stated + rank_one


def test_only_the_fused_loss_drops_dead_rows():
    assert gemm_work(CASE, BY_NAME[OURS], False, 0.5) == 4
    assert gemm_work(CASE, BY_NAME[EAGER], False, 0.5) == 8


@pytest.fixture(scope="module")
def results():
    """A run at the tiny shape: two providers, a third that cannot."""
    providers = [BY_NAME[EAGER], BY_NAME[OURS]]
    absent = dataclasses.replace(BY_NAME["TRL"], modules=("no_such_module",))
    block = bench_loss.Block(CASE, live=0.5, tolerances=(1e-2, 0.1))
    bf16 = bench_loss.Block(common.CASES["tiny-bf16"], live=0.5, timed=False)
    data = {
        "environment": common.environment(bench_loss.PACKAGES), "rounds": 5, "warmup_s": 0.0,
        "providers": [
            {"name": p.name, "call": p.call, "package": p.package, "logits": p.logits,
             "not_run": p.obstacle() if p is absent else None}
            for p in (*providers, absent)
        ],
        "blocks": [
            bench_loss.run_block(block, providers, rounds=5, warmup_s=0.0),
            bench_loss.run_block(bf16, providers, rounds=5, warmup_s=0.0),
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
    nats = results["blocks"][0]["entropy"]
    assert 0.3 < nats < 0.9
    assert row.startswith(
        f"| {OURS} | trained, {nats:.2f} | 40 (40-60) | 1.25 | 75% | 1 | 33% | 4.0 |"
    )
    assert "not run: no_such_module cannot be imported: No module named" in text
    assert "### fp32, N=64, H=32, V=301, trained, full head, 50% of the rows live" in text
    timed, accuracy = plot.block_table(results, results["blocks"][1]), plot.readme_rows(results)
    assert "step, ms" not in timed and f"| **{OURS}** | 40 | 75% | 1 | 4.0 |" in accuracy
    assert f"| {OURS} | trained, {results['blocks'][1]['entropy']:.2f} | 4.0 |" in timed
    for block in results["blocks"]:
        for line in plot.block_table(results, block).splitlines()[2:]:
            assert line.count("|") == plot.block_table(results, block).splitlines()[2].count("|")


@needs_proc
def test_errors_by_tolerance_are_measured(results):
    exact, fine, coarse = results["blocks"][0]["by_tolerance"]
    assert [r["tolerance"] for r in (exact, fine, coarse)] == [0, 1e-2, 0.1]
    assert all(r["same_bits"] for r in (exact, fine, coarse))
    assert exact["nhv"] == 4 > fine["nhv"] > coarse["nhv"] > 2  # half of the rows are live
    assert exact["errors"]["d_hidden"] < 1e-5 < 5e-3 < fine["errors"]["d_hidden"] < 2e-2
    assert 0.05 < coarse["errors"]["d_hidden"] < 0.2
    nats = results["blocks"][0]["entropy"]
    row = f"| trained, {nats:.2f} | fp32, N=64, H=32, V=301 | 0.01 | {fine['nhv']:.2f} |"
    assert row in plot.table(results) and results["blocks"][1]["by_tolerance"] == []


@needs_proc
def test_plots_are_drawn(results, tmp_path):
    plot.plot_times(results, tmp_path / "times.png")
    plot.plot_tolerance(results, tmp_path / "tolerance.png")
    for name in ("times.png", "tolerance.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_tolerance_is_held_against_exact_and_the_fastest_other():
    def result(ms, mib, nhv, d_hidden):
        errors = {"log_prob": 0, "ratio_off": 0, "d_hidden": d_hidden, "d_weight": d_hidden}
        return {"time": {"ms": ms}, "peak_bytes": mib * 2**20, "nhv": nhv, "errors": errors}

    block = {
        "shape": "fp32", "profile": "trained", "entropy": 0.4, "frozen_head": False, "live": 1.0,
        "timed": True, "by_tolerance": [], "providers": {
            EAGER: result(120, 9, 8, 0), "TRL": result(90, 9, 10, 0), OURS: result(100, 8, 8, 0),
            f"{OURS}{TOLERANT}1e-3": result(50, 4, 4.1, 1e-3),
        },
    }
    skipped = [block | {"frozen_head": True}, block | {"live": 0.5}, block | {"timed": False}]
    text = plot.tolerance_table({"blocks": [block, *skipped]})
    assert text.count(TOLERANT) == 1
    assert (f"| {OURS}{TOLERANT}1e-3 | fp32 | trained, 0.40 | 0.50 | TRL | 1.80 | 0.50 | 4.1 |"
            " 1.0e-03 | 1.0e-03 |") in text


def test_profiles_come_first_and_alone_with_what_depends_on_them():
    plan = bench_loss.cpu_plan(common.CASES["main"], common.CASES["bf16"])
    assert [b.profile for b in plan[:3]] == ["trained", "uniform", "smollm2"]
    assert not plan[0].only and {OURS, EAGER} < set(plan[1].only) <= set(BY_NAME)
    assert (plan[2].case.hidden, plan[2].case.vocab) == (576, 49152)
    assert plan[3].case.rows == 4 * plan[0].case.rows
    assert len({b.label() for b in plan}) == len(plan)  # by which a resumed run knows them
    gpu = bench_loss.gpu_plan(False)
    assert [b.profile for b in gpu[:2]] == ["trained", "uniform"] and not gpu[0].only
    assert {OURS + ", cuda", EAGER} < set(gpu[1].only) <= {p.name for p in GPU_PROVIDERS}


@pytest.fixture
def short_run(monkeypatch, tmp_path):
    """run(*arguments) of bench_loss with two providers and two blocks; returns the results."""
    def run(*arguments):
        bench_loss.main(["--out", str(tmp_path), "--rounds", "1", "--warmup", "0", *arguments])
        return json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))

    blocks = [bench_loss.Block(CASE), bench_loss.Block(CASE, "smollm2")]
    threads = torch.get_num_threads()
    monkeypatch.setattr(bench_loss, "cpu_plan", lambda case, bf16_case: blocks)
    monkeypatch.setattr(bench_loss, "providers_for", lambda device: [BY_NAME[EAGER], BY_NAME[OURS]])
    yield run
    torch.set_num_threads(threads)


@needs_proc
def test_a_run_that_stopped_goes_on(short_run, monkeypatch, tmp_path, capsys):
    first = short_run()
    assert len(first["blocks"]) == 1
    (missing,) = first["not_reached"]
    assert missing[0].endswith("smollm2, full head, all rows live")
    assert missing[1].startswith("Profile smollm2 ")  # lacks its package, or has other sizes
    assert "Not measured: fp32, N=64, H=32, V=301, smollm2" in (tmp_path / "table.md").read_text()
    monkeypatch.setitem(profiles.PROFILES, "smollm2", profiles.trained)
    second = short_run("--resume")
    assert second["blocks"][0] == first["blocks"][0] and "not_reached" not in second
    assert [b["profile"] for b in second["blocks"]] == ["trained", "smollm2"]
    with pytest.raises(SystemExit):
        short_run("--resume", "--rounds", "2")
    assert "rounds differ from this run's" in capsys.readouterr().err
    with pytest.raises(UserError, match="environment|git differ"):
        bench_loss.resumed(tmp_path / "results.json", second | {
            "environment": second["environment"] | {"git": "0" * 40}})
    assert len(short_run()["blocks"]) == 2


@needs_proc
def test_a_budget_that_is_over_is_told_in_the_results(short_run, monkeypatch):
    monkeypatch.setitem(profiles.PROFILES, "smollm2", profiles.trained)
    found = short_run("--seconds", "0")
    assert len(found["blocks"]) == 1 and found["not_reached"][0][1] == "the time was over"


FAKE_MS = {EAGER: 80.0, "TRL": 73.0, f"{OURS}, triton": 56.0}


def fake_block(case, profile, frozen_head, live, *_):
    """A block as a GPU would give it; times in proportion to the work."""
    model, rows = case.model, case.rows
    share = case.rows * case.hidden * case.vocab / (8192 * 4096 * 151936)
    providers = {}
    for name, ms in FAKE_MS.items():
        ms *= share * (live if name.startswith(OURS) else 1)
        providers[name] = {
            "nhv": 8, "peak_bytes": 2**30,
            "errors": {"log_prob": 1e-5, "ratio_off": 0.0, "loss": 0.0, "d_hidden": 2e-3,
                       "d_weight": None if frozen_head else 2e-3},
            "time": {"ms": ms, "p20": 0.99 * ms, "p80": 1.01 * ms, "rounds": [ms]},
        }
    not_run = {}
    if rows > 8192:
        not_run[EAGER] = "out of memory"
        del providers[EAGER]
    bare = 52 * share * live
    return {
        "shape": case.label(), "model": model, "rows": rows, "hidden": case.hidden,
        "vocab": case.vocab, "profile": profile, "only": (), "by_tolerance": [],
        "entropy": 0.43 if profile == "trained" else 10.65,
        "frozen_head": frozen_head, "live": live, "timed": True,
        "providers": providers, "not_run": not_run,
        "bare": {"ms": bare, "p20": bare, "p80": bare, "rounds": [bare]},
    }


@pytest.fixture(scope="module")
def gpu_results():
    providers = [p for p in GPU_PROVIDERS if p.name in FAKE_MS or p.name == "verl Triton"]
    return {
        "environment": {
            "cpu": "a CPU", "cpu_capability": "AVX512", "threads": 8, "cores": 16,
            "load_before": 0.1, "python": "3.12", "versions": {"rlsd": "0", "trl": "1.16.0"},
            "git": "0" * 40, "dirty": False,
            "gpu": {"name": "NVIDIA H200", "processors": 132, "driver_version": "580"},
        },
        "rounds": 30, "warmup_s": 0.5, "not_reached": [["Qwen3-4B", "the time was over"]],
        "providers": [
            {"name": p.name, "call": p.call, "package": p.package, "logits": p.logits,
             "not_run": None if p.name in FAKE_MS else "no wheel"}
            for p in providers
        ],
        "blocks": [fake_block(*block) for block in bench_loss.gpu_plan(False)],
    }


def test_gpu_table(gpu_results):
    text = plot.table(gpu_results)
    row = next(line for line in text.splitlines() if line.startswith(f"| {OURS}, triton |"))
    # 8 x 8192 x 4096 x 151936 FLOP in 56 ms
    assert row.startswith(
        f"| {OURS}, triton | trained, 0.43 | 56.0 (55.4-56.6) | 1.43 | 93% | 1024 | 100% | 728 |"
    )
    assert "| verl Triton | not run: no wheel |" in text
    assert f"| {EAGER} | not run: out of memory |" in text
    assert "Not measured: Qwen3-4B (the time was over)." in text
    assert text.startswith("# One RLSD step on NVIDIA H200\n") and "driver version 580" in text
    frozen = plot.block_table(gpu_results, gpu_results["blocks"][4])
    assert "frozen head" in frozen and "| bare GEMMs | trained, 0.43 | 52.0 (52.0-52.0) |" in frozen
    for block in gpu_results["blocks"]:
        lines = plot.block_table(gpu_results, block).splitlines()[2:]
        assert len({line.count("|") for line in lines}) == 1
    quoted = plot.readme_rows(gpu_results)
    assert "NVIDIA H200, medians of 30 rounds" in quoted and "ms, trained" in quoted
    assert f"| **{OURS}, triton** | 56.0 | 93% | 1024 | 8.0 | 2.0e-03 | 56.0 |" in quoted


def test_scaling_panels_compare_blocks_that_differ_in_one_thing(gpu_results, tmp_path):
    panels = plot.scaling(gpu_results)
    name = f"{OURS}, triton"
    _, _, lines = panels["time against N"]
    assert lines[name] == [(2048, 14.0), (8192, 56.0), (32768, 224.0)]
    assert [x for x, _ in lines[EAGER]] == [2048, 8192]
    _, _, lines = panels["memory against V"]
    assert [x for x, _ in lines[name]] == [128256, 151936, 151936, 151936, 262208]
    _, _, lines = panels["dead rows"]
    assert lines[name] == [(30, pytest.approx(30)), (50, pytest.approx(50)), (100, 100)]
    assert lines[EAGER] == [(30, 100), (50, 100), (100, 100)]
    _, _, lines = panels["speed by what the softmax is like"]
    assert [x for x, _ in lines[name]] == [0.43, 10.65]
    _, _, lines = panels["speed by block, in the table's order"]
    assert lines[name][0] == (1, pytest.approx(100 * 52 / 56)) and len(lines[name]) == 11
    plot.plot_scaling(gpu_results, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    one = gpu_results | {"blocks": gpu_results["blocks"][:1]}
    assert plot.scaling(one) == {}
    plot.plot_scaling(one, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_gpu_plan_spends_a_budget_on_the_main_blocks_first():
    short, full = bench_loss.gpu_plan(False), bench_loss.gpu_plan(True)
    assert full[: len(short)] == short
    assert [(b.case.model, b.case.rows, *b[1:4]) for b in short] == list(bench_loss.GPU_BLOCKS)
    models, rows, live = (bench_loss.GPU_MODELS, bench_loss.GPU_ROWS, bench_loss.LIVE)
    all_trained = 2 * len(models) * len(rows) * len(live)
    assert len(full) == len({b.label() for b in full}) == all_trained + 1  # one is uniform
    assert set(bench_loss.GPU_MODELS) <= set(common.HEADS)


def test_a_block_starts_only_if_it_fits():
    assert bench_loss.affordable(4, 0, 0, 1)  # nothing is known yet
    assert bench_loss.affordable(2, 4, 20, 10) and not bench_loss.affordable(4, 4, 20, 10)


def test_one_provider_that_fails_leaves_the_others():
    attempt = bench_loss.Attempts(fatal=False)

    def fail(error):
        raise error

    assert attempt("a", lambda: fail(torch.OutOfMemoryError("CUDA out of memory"))) is None
    assert attempt("b", lambda: fail(ValueError("no\nwhy"))) is None
    assert attempt("a", lambda: 1) is None and attempt("c", lambda: 2) == 2
    assert attempt.failed == {"a": "out of memory", "b": "ValueError: no"}
    with pytest.raises(ValueError, match="no"):
        bench_loss.Attempts(fatal=True)("b", lambda: fail(ValueError("no")))


def test_stated_work_counts_the_rows_that_are_computed():
    by_name = {p.name: p for p in GPU_PROVIDERS}
    assert len(by_name) == len(GPU_PROVIDERS)
    tier_b, cute = by_name[f"{OURS}, triton tier B"], by_name["Liger CuTe"]
    assert tier_b.stated_nhv(False, 0.5) == 4 and tier_b.stated_nhv(True, 1.0) == 6
    assert cute.stated_nhv(True, 0.3) == 10 and not cute.in_torch


def test_a_provider_that_computes_something_else_is_left_out():
    wrong = dataclasses.replace(
        BY_NAME[EAGER], step=lambda problem: measure.compose(
            lambda *args: 1.3 * measure.full_logits(*args), problem)
    )
    assert wrong.obstacle().startswith("it computes something else: errors {")
    assert BY_NAME[EAGER].obstacle() is None
    refused = dataclasses.replace(BY_NAME[EAGER], impl="cuda")
    assert refused.obstacle() == available_impls(torch.empty(0))["cuda"] != "ok"


@pytest.mark.slow
def test_probes_run_in_processes_of_their_own():
    absent = dataclasses.replace(BY_NAME[EAGER], name="nobody")
    reasons = bench_loss.probe([BY_NAME[EAGER], absent], "cpu")
    assert reasons[EAGER] is None and reasons["nobody"].startswith("its process ended with status")
    assert "did not finish" in bench_loss.probe([BY_NAME[EAGER]], "cpu", limit_s=0.1)[EAGER]


@needs_proc
def test_every_stage_is_measured(tmp_path):
    lines = []
    results = stages.run(
        stages.TINY, "cpu", tmp_path / "stages.json", log=lambda line, **_: lines.append(line)
    )
    assert json.loads((tmp_path / "stages.json").read_text(encoding="utf-8")) == results
    parts = results["parts"]
    assert set(parts) == set(stages.PARTS) and all(isinstance(x, list) for x in parts.values())
    assert {row["product"] for row in parts["gemm"]} == {
        "logits", "logits of a chunk", "dx", "dw"
    }
    assert {row["stage"] for row in parts["exp"]} >= {"exp, no store", "exp, E stored"}
    ours, quack = parts["teacher"]
    assert ours["error"] < 1e-5 and "quack" in quack["not_run"]
    assert all(row["ms"] > 0 for name in ("copy", "exp", "split") for row in parts[name])
    over = stages.run(stages.TINY, "cpu", tmp_path / "late.json", seconds=-1, log=lines.append)
    assert {x["not_run"] for x in over["parts"].values()} == {"the -1 s were over"}


@pytest.mark.parametrize("given, commit, dirty", [
    ("0123abc", "0123abc", False), ("0123abc-dirty", "0123abc", True), ("", None, False),
])
@needs_proc
def test_a_copy_without_git_is_told_its_commit(given, commit, dirty, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_HASH", given)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = common.environment(())
    assert (found["git"], found["dirty"]) == (commit, dirty) and "gpu" not in found


@needs_proc
def test_a_copy_is_of_the_commit_that_it_is_told(monkeypatch, tmp_path):
    """Whatever repository lies around it."""
    for command in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a", "commit", "-q",
                                     "--allow-empty", "-m", "a"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    (tmp_path / "changed.py").touch()
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_HASH", "0123abc")
    found = common.environment(())
    assert (found["git"], found["dirty"]) == ("0123abc", False)


@pytest.mark.parametrize("name", ["cpu", "nvidia_h100_80gb_hbm3"])
def test_committed_table_and_readme_are_generated(name):
    quoted, path = plot.quoted_in(README, name), RESULTS.parents[1] / name / "results.json"
    if not path.exists():
        assert quoted == ""
        pytest.skip(f"bench/results/{name} is not committed")
    data = json.loads(path.read_text(encoding="utf-8"))
    assert (path.parent / "table.md").read_text(encoding="utf-8") == plot.table(data)
    assert quoted == plot.readme_rows(data).strip()


def test_committed_results_can_be_traced():
    if not RESULTS.exists():
        pytest.skip("bench/results/cpu is not committed; `make bench-cpu` makes it")
    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert not data["environment"]["dirty"] and data["rounds"] >= 5
    assert {p["name"] for p in data["providers"]} == set(BY_NAME)


def test_the_prediction_is_arithmetic_and_says_so():
    text = prediction.table()
    assert text.startswith("# A prediction for an H100: nothing here was measured\n")
    assert prediction.PATH.read_text(encoding="utf-8") == text
    dense, none_left = prediction.total(0.0)
    assert dense == pytest.approx(66.2) and prediction.chunks() == 4
    assert none_left > dense - prediction.DH - prediction.DW  # choosing is not free
    assert prediction.total(0.1)[1] > none_left + 0.1 * (prediction.DH + prediction.DW)


# -- gpu_run.sh ------------------------------------------------------------------------------------


@pytest.fixture
def gpu_run(tmp_path):
    """run(script, *parts, **environment) with a Python that is a shell script, and as a job in the
    background: shells have those ignore INT."""
    def run(script, *parts, **environment):
        python = tmp_path / "python"
        python.write_text("#!/bin/sh\n" + script)
        python.chmod(0o755)
        return subprocess.run(
            ["bash", "-c", 'trap "" INT; exec "$0" "$@"', common.ROOT / "bench/gpu_run.sh", *parts],
            capture_output=True, text=True,
            env=os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out")} | environment,
        )

    return run


def test_an_unknown_part_is_refused_before_any_runs(gpu_run, tmp_path):
    done = gpu_run("exit 0\n", "tests", "benhc")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stdout.startswith("There is no part benhc, only: environment build tests kernels ")


def test_names_with_spaces_reach_the_benchmark(gpu_run, tmp_path):
    script = f'for x in "$@"; do echo "$x" >> {tmp_path}/told; done\n'
    done = gpu_run(script, "bench", BENCH_ARGS='--full --without "verl Triton" TRL',
                   RLSD_CUDA_ARCHS="90a")
    told = (tmp_path / "told").read_text().splitlines()
    assert done.returncode == 0 and told[-4:] == ["--full", "--without", "verl Triton", "TRL"]


@pytest.mark.parametrize("option", ["--without", "--probe"])
def test_an_unknown_provider_is_refused(option, capsys, tmp_path):
    with pytest.raises(SystemExit):
        bench_loss.main([option, "verl", "Triton", "--out", str(tmp_path), "--device", "cuda"]
                        if option == "--without" else [option, "verl Trition"])
    assert "there is no provider 'verl" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_a_part_that_fails_makes_the_run_fail(gpu_run, tmp_path):
    assert gpu_run("exit 0\n", "stages", RLSD_CUDA_ARCHS="90a").returncode == 0
    assert gpu_run("exit 3\n", "stages", RLSD_CUDA_ARCHS="90a").returncode == 1
    assert "== stages: status 3" in (tmp_path / "out/log.txt").read_text()


@pytest.mark.slow
def test_a_time_out_keeps_what_failed_before_it(gpu_run, tmp_path):
    tests = tmp_path / "test_some.py"
    tests.write_text("""
import signal
def test_one():
    assert 1 == 2, "the reason"
def test_two():
    signal.pause()
""")
    script = f"exec {sys.executable} -m pytest -q -p no:cacheprovider {tests}\n"
    done = gpu_run(script, "tests", SECONDS_TOTAL="12", RLSD_CUDA_ARCHS="90a")
    log = (tmp_path / "out/log.txt").read_text()
    assert done.returncode == 1 and "AssertionError: the reason" in log, log
    assert "KeyboardInterrupt" in log and "== tests: status 124" in log


# Not the reports: they turn Triton's interpreter off for the whole process, and have tests.
SCRIPTS = [p.stem for p in sorted(common.ROOT.glob("bench/*.py")) if "_report" not in p.stem]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_can_be_imported(script):
    if script == "bench_trl":
        pytest.importorskip("trl")
    importlib.import_module("bench" if script == "__init__" else f"bench.{script}")
