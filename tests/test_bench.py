"""The benchmark measures what it says: same function, balanced clock, true memory, true tables."""

import dataclasses
import json
import sys
from collections import Counter

import pytest
import torch

from bench import bench_loss, common, plot
from bench.providers import EAGER, OURS, PROVIDERS
from rlsd_kernels import ref

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


def specification(problem):
    """`common.gradients` by ref.linear_rlsd_loss and autograd in fp64."""
    wide = dataclasses.replace(
        problem,
        **{k: v.detach().double() for k, v in vars(problem).items() if v.is_floating_point()},
    )
    wide.hidden.requires_grad_()
    wide.weight.requires_grad_(problem.weight.requires_grad)

    def step(p):
        loss, log_probs, teacher, _ = ref.linear_rlsd_loss(
            p.hidden, p.weight, p.completion_ids, p.advantages, p.loss_weights,
            teacher_hidden=p.teacher_hidden, teacher_log_probs=None, teacher_weight=None,
            old_log_probs=p.old_log_probs, ref_log_probs=None, reweight_mask=None, bias=None,
            rlsd_lambda=common.CONFIG.rlsd_lambda, use_teacher=True, config=common.CONFIG,
            logit_scale=1.0, softcap=None,
        )
        return loss, log_probs, teacher

    return common.gradients(wide, step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("frozen_head", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("live", [1.0, 0.5])
@pytest.mark.parametrize("provider", MARKED)
def test_every_provider_computes_the_specification(provider, live, frozen_head, dtype):
    skip_if_absent(provider)
    torch._dynamo.reset()
    case = dataclasses.replace(CASE, dtype=dtype)
    problem = common.make_problem(case, frozen_head=frozen_head, live=live)
    truth = specification(problem)
    got = common.gradients(problem, provider.step)
    assert (got["d_weight"] is None) == frozen_head
    wrong = common.errors(got, truth, problem.live())
    logits_rounded = dtype == torch.bfloat16 and provider.logits == "input's"
    assert wrong["log_prob"] < (1e-2 if logits_rounded else 1e-5)
    assert wrong["loss"] < (1e-3 if logits_rounded else 1e-6)
    for key in ("d_hidden", "d_weight"):
        assert (wrong[key] or 0) < (5e-3 if dtype == torch.bfloat16 else 1e-5), key


def gemm_work(case, provider, frozen_head, live):
    problem = common.make_problem(case, frozen_head=frozen_head, live=live)
    common.gradients(problem, provider.step)  # torch.compile traces now, not under the profiler
    return common.measured_nhv(case, lambda: common.gradients(problem, provider.step))


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


@pytest.mark.parametrize("frozen_head", [False, True], ids=["full", "frozen"])
def test_exact_is_the_specification(frozen_head):
    problem = common.make_problem(CASE, frozen_head=frozen_head, live=0.7)
    truth = specification(problem)
    wrong = common.errors(common.exact(problem, chunk=17), truth, problem.live())
    assert all((value or 0) < 1e-13 for value in wrong.values()), wrong


def test_errors_are_seen():
    problem = common.make_problem(CASE)
    truth = common.exact(problem)
    off = {k: v.clone() for k, v in truth.items()}
    off["log_probs"][:16] += 0.02
    off["d_weight"] *= 1.001
    wrong = common.errors(off, truth, problem.live())
    assert wrong["log_prob"] == pytest.approx(0.02)
    assert wrong["ratio_off"] == 16 / CASE.rows
    assert wrong["d_weight"] == pytest.approx(1e-3) and wrong["d_hidden"] == 0


@pytest.mark.parametrize("live", [1.0, 0.7, 0.5, 0.3])
@pytest.mark.parametrize("rows", [64, 101])  # 101: sequences of unequal length
def test_the_problem_is_a_rollout(rows, live):
    problem = common.make_problem(dataclasses.replace(CASE, rows=rows), live=live)
    assert len(problem.live()) == round(live * rows)
    a = problem.advantages
    assert (a > 0).any() and (a < 0).any() and ((a == 0).any() == (live < 0.75))
    masked = problem.loss_weights == 0
    assert masked.any() == (live < 1) and float(problem.loss_weights.sum()) == pytest.approx(1)
    assert not (a[masked] == 0).any()  # the two kinds of dead rows do not overlap
    rms = problem.hidden.detach().square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones(rows))
    assert float(problem.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    truth = common.exact(problem)
    assert (truth["log_probs"] - problem.old_log_probs).std() == pytest.approx(0.05, rel=0.5)
    assert (truth["log_probs"] - truth["teacher_log_probs"]).abs().max() > 1e-3


@pytest.mark.parametrize("k", [2, 5, 8, 9])
def test_order_is_balanced(k):
    names = list("abcdefghi")[:k]
    rounds = [common.balanced_order(names, i) for i in range(2 * k)]
    places = Counter((name, i) for order in rounds for i, name in enumerate(order))
    assert set(places.values()) == {2} and len(places) == k * k
    follows = Counter(pair for order in rounds for pair in zip(order, order[1:], strict=False))
    assert set(follows.values()) == {2} and len(follows) == k * (k - 1)


def test_interleaving_warms_up_and_clears_before_each_call():
    log = []
    steps = {name: lambda name=name: log.append(name) for name in "abc"}
    seconds = common.interleave(steps, 3, 0.0, lambda: log.append("clear"))
    assert log[::2] == ["clear"] * 12
    assert log[1:6:2] == list("abc")  # one warm-up each
    for i in range(3):
        assert log[7 + 6 * i:12 + 6 * i:2] == common.balanced_order("abc", i)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_summary_is_in_ms():
    assert common.summary([0.003, 0.001, 0.002]) == {
        "ms": pytest.approx(2), "p20": pytest.approx(1.4), "p80": pytest.approx(2.6),
        "rounds": [3, 1, 2],
    }


@needs_proc
def test_peak_memory_of_a_known_allocation():
    mib = 262144  # fp32 elements
    resident = torch.ones(40 * mib)

    def large_then_small():
        del_me = torch.ones(96 * mib)
        total = del_me.sum() + resident.sum()
        del del_me
        return torch.ones(32 * mib), total

    for _ in range(2):  # what the first call freed is not free of charge in the second
        assert common.peak_extra_bytes(large_then_small) == pytest.approx(96 * 2**20, rel=0.1)
    assert common.peak_extra_bytes(lambda: None) < 2**20


def test_bare_gemms_are_the_products():
    problem = common.make_problem(CASE, live=0.5)
    bare = common.BareGEMMs(problem)
    bare()
    h, w = problem.hidden.detach()[problem.live()], problem.weight.detach()
    torch.testing.assert_close(bare.z, h @ w.T)
    torch.testing.assert_close(bare.dh, h @ w.T @ w)
    torch.testing.assert_close(bare.dw, (h @ w.T).T @ h)
    assert common.measured_nhv(CASE, bare) == 4
    frozen = common.BareGEMMs(common.make_problem(CASE, frozen_head=True))
    assert common.measured_nhv(CASE, frozen) == 6


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
