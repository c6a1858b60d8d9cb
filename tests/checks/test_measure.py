"""What every timing rests on: the problem, its exact answer, the clock, the order, peak memory;
and `rlsd bench`, which prints a table of them."""

import dataclasses
import math
import sys
from collections import Counter

import pytest
import torch

from rlsd import UserError
from rlsd.checks import bench, measure, profiles
from rlsd_kernels import ref

CASE = measure.Case(64, 32, 301)
needs_proc = pytest.mark.skipif(
    sys.platform != "linux", reason="memory is read from Linux's /proc"
)


def specification(problem):
    """`measure.gradients` by ref.linear_rlsd_loss and autograd in fp64."""
    wide = dataclasses.replace(
        problem,
        **{k: v.detach().double() for k, v in vars(problem).items()
           if isinstance(v, torch.Tensor) and v.is_floating_point()},
    )
    wide.hidden.requires_grad_()
    wide.weight.requires_grad_(problem.weight.requires_grad)

    def step(p):
        loss, log_probs, teacher, _ = ref.linear_rlsd_loss(
            p.hidden, p.weight, p.completion_ids, p.advantages, p.loss_weights,
            teacher_hidden=p.teacher_hidden, teacher_log_probs=None, teacher_weight=None,
            old_log_probs=p.old_log_probs, ref_log_probs=None, reweight_mask=None, bias=None,
            rlsd_lambda=measure.CONFIG.rlsd_lambda, use_teacher=True, config=measure.CONFIG,
            logit_scale=1.0, softcap=None,
        )
        return loss, log_probs, teacher

    return measure.gradients(wide, step)


@pytest.mark.parametrize("frozen_head", [False, True], ids=["full", "frozen"])
def test_exact_is_the_specification(frozen_head):
    problem = measure.make_problem(CASE, frozen_head=frozen_head, live=0.7)
    truth = specification(problem)
    wrong = measure.errors(measure.exact(problem, chunk=17), truth, problem.live())
    assert all((value or 0) < 1e-13 for value in wrong.values()), wrong


def test_a_trained_problem_has_the_entropies_of_one():
    case = measure.Case(512, 512, 16384)
    problem = measure.make_problem(case, profile="trained")
    log_p = (problem.hidden @ problem.weight.T).detach().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    assert problem.entropy == pytest.approx(entropy.mean().item(), rel=1e-5)
    assert 0.45 < (entropy < 0.01).double().mean() < 0.55
    assert 0.15 < (entropy > 0.67).double().mean() < 0.25
    rms = problem.hidden.detach().square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones(case.rows))
    # Beyond its eight candidates a token leaves mass all over the vocabulary.
    tail = log_p.exp().sort(descending=True).values[:, 8:]
    assert (tail > 0).all() and tail.sum(-1).mean() > 1e-3
    flat = measure.make_problem(case).entropy
    assert flat > 0.97 * math.log(case.vocab) and problem.entropy < 0.6


def test_an_unknown_profile_is_one_sentence():
    with pytest.raises(UserError, match="uniform, trained, smollm2, but got 'flat'.$"):
        measure.make_problem(CASE, profile="flat")


def test_errors_are_seen():
    problem = measure.make_problem(CASE)
    truth = measure.exact(problem)
    off = {k: v.clone() for k, v in truth.items()}
    off["log_probs"][:16] += 0.02
    off["d_weight"] *= 1.001
    wrong = measure.errors(off, truth, problem.live())
    assert wrong["log_prob"] == pytest.approx(0.02)
    assert wrong["ratio_off"] == 16 / CASE.rows
    assert wrong["d_weight"] == pytest.approx(1e-3) and wrong["d_hidden"] == 0


@pytest.mark.parametrize("live", [1.0, 0.7, 0.5, 0.3])
@pytest.mark.parametrize("rows", [64, 101])  # 101: sequences of unequal length
def test_the_problem_is_a_rollout(rows, live):
    problem = measure.make_problem(dataclasses.replace(CASE, rows=rows), live=live)
    assert len(problem.live()) == round(live * rows)
    a = problem.advantages
    assert (a > 0).any() and (a < 0).any() and ((a == 0).any() == (live < 0.75))
    masked = problem.loss_weights == 0
    assert masked.any() == (live < 1) and float(problem.loss_weights.sum()) == pytest.approx(1)
    assert not (a[masked] == 0).any()  # the two kinds of dead rows do not overlap
    rms = problem.hidden.detach().square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones(rows))
    assert float(problem.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    truth = measure.exact(problem)
    assert (truth["log_probs"] - problem.old_log_probs).std() == pytest.approx(0.05, rel=0.5)
    assert (truth["log_probs"] - truth["teacher_log_probs"]).abs().max() > 1e-3


@pytest.mark.parametrize("k", [2, 5, 8, 9])
def test_order_is_balanced(k):
    names = list("abcdefghi")[:k]
    rounds = [measure.balanced_order(names, i) for i in range(2 * k)]
    places = Counter((name, i) for order in rounds for i, name in enumerate(order))
    assert set(places.values()) == {2} and len(places) == k * k
    follows = Counter(pair for order in rounds for pair in zip(order, order[1:], strict=False))
    assert set(follows.values()) == {2} and len(follows) == k * (k - 1)


def test_interleaving_warms_up_and_clears_before_each_call():
    log = []
    steps = {name: lambda name=name: log.append(name) for name in "abc"}
    seconds = measure.interleave(steps, 3, 0.0, lambda: log.append("clear"))
    assert log[::2] == ["clear"] * 12
    assert log[1:6:2] == list("abc")  # one warm-up each
    for i in range(3):
        assert log[7 + 6 * i:12 + 6 * i:2] == measure.balanced_order("abc", i)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_summary_is_in_ms():
    assert measure.summary([0.003, 0.001, 0.002]) == {
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
        assert measure.peak_extra_bytes(large_then_small) == pytest.approx(96 * 2**20, rel=0.1)
    assert measure.peak_extra_bytes(lambda: None) < 2**20


def test_bare_gemms_are_the_products():
    problem = measure.make_problem(CASE, live=0.5)
    bare = measure.BareGEMMs(problem)
    bare()
    h, w = problem.hidden.detach()[problem.live()], problem.weight.detach()
    torch.testing.assert_close(bare.z, h @ w.T)
    torch.testing.assert_close(bare.dh, h @ w.T @ w)
    torch.testing.assert_close(bare.dw, (h @ w.T).T @ h)
    assert measure.measured_nhv(CASE, bare) == 4
    frozen = measure.BareGEMMs(measure.make_problem(CASE, frozen_head=True))
    assert measure.measured_nhv(CASE, frozen) == 6


def test_warm_up_lasts_as_long_as_asked():
    log = []
    measure.warm_up(lambda: log.append("step"), 1.0, lambda: log.append("between"),
                    clock=lambda step: step() or 0.4)
    assert log == ["between", "step"] * 3


def test_labels():
    assert measure.Case(8, 4, 5).label() == "fp32, N=8, H=4, V=5"
    case = measure.Case(8, 4, 5, torch.bfloat16, "Qwen3-8B")
    assert case.label() == "Qwen3-8B, bf16, N=8, H=4, V=5"


TINY = {"device": "cpu", "rows": 64, "hidden_size": 32, "vocab_size": 301, "rounds": 2}


@needs_proc
def test_rlsd_bench_prints_what_it_measured():
    lines = []
    results = bench.run(TINY | {"live": 0.5}, log=lines.append)
    assert set(results) == {bench.EAGER, "rlsd, impl='torch'", "rlsd, impl='torch', 0.001"}
    eager, ours, tolerant = results.values()
    assert eager["nhv"] == 8 and ours["nhv"] == 4  # dead rows are dropped
    assert 2 < tolerant["nhv"] < 4
    for found in results.values():
        assert found["p20"] <= found["ms"] <= found["p80"] and len(found["rounds"]) == 2
        assert found["profile"] == "trained" and 0.1 < found["entropy"] < 1
        limit = 3e-3 if found is tolerant else 1e-5
        assert found["errors"]["log_prob"] < 1e-5 and found["errors"]["d_weight"] < limit
    assert tolerant["errors"]["d_weight"] > 1e-5
    text = "\n".join(lines)
    assert "fp32, N=64, H=32, V=301, 50% of the rows live" in lines[0]
    row = next(line for line in lines if line.startswith("rlsd, impl='torch'"))
    assert f"{ours['ms']:.2f}" in row and f"{ours['errors']['d_hidden']:.1e}" in row
    assert len(row.split()) == 2 + len(bench.COLUMNS)
    assert "rlsd, impl='triton'         not run: for a GPU" in text


@pytest.mark.parametrize(
    "options, words",
    [
        ({"columns": 7},
         "rlsd bench has no option --columns; there are --device, --profile, --rows"),
        ({"profile": "flat"},
         "--profile must be one of uniform, trained, smollm2, but got flat"),
        ({"device": "tpu"}, "--device must be auto, cpu or cuda, but got tpu"),
        ({"rows": 3}, "--rows must be a whole number of at least 16, but got 3"),
        ({"rounds": 0}, "--rounds must be a whole number of at least 1, but got 0"),
        ({"vocab_size": "many"}, "--vocab_size must be a whole number"),
        ({"dtype": "fp8"}, "--dtype must be one of fp32, bf16, fp16, but got fp8"),
        ({"live": 0}, r"--live must be a share of rows in \(0, 1\], but got 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_rlsd_bench_refuses(options, words):
    with pytest.raises(UserError, match=words):
        bench.settings({"device": "cpu"} | options)


def test_smollm2_brings_its_sizes():
    _, case, profile, *_ = bench.settings({"device": "cpu", "profile": "smollm2", "rows": 64})
    assert (case.rows, case.hidden, case.vocab, profile) == (64, 576, 49152, "smollm2")


def test_a_profile_may_give_its_tensors_again(monkeypatch):
    made = profiles.trained(CASE, torch.Generator().manual_seed(0))
    monkeypatch.setitem(profiles.PROFILES, "smollm2", lambda case, rng: made)
    for frozen_head in (False, True):
        problem = measure.make_problem(CASE, profile="smollm2", frozen_head=frozen_head)
        assert problem.hidden.requires_grad and problem.weight.requires_grad != frozen_head
        assert not problem.old_log_probs.requires_grad
    assert not any(x.requires_grad for x in made[:3])


def test_rlsd_bench_needs_nothing_of_the_repository():
    """It ships with the package: no import of bench/."""
    for module in (bench, measure):
        with open(module.__file__, encoding="utf-8") as file:
            assert "from bench" not in (text := file.read()) and "import bench" not in text
