"""How it runs: repeatable bits, no recompilation, graphs, streams, devices, no host waits."""

import contextlib
import os
import sys

import pytest
import torch
import torch._dynamo.testing
from on_gpu import (
    DEVICE,
    KERNELS,
    OPTIONS,
    SMALL,
    big,
    compiled_variants,
    problem,
    relative,
    require,
    size,
)
from problems import make_problem, run_fused, worst

from rlsd_kernels import RLSDLossConfig, fused_linear_rlsd_loss, linear_log_probs, rlsd_loss
from rlsd_kernels.logprob import load_impl

pytestmark = pytest.mark.usefixtures("production")
BF16 = torch.bfloat16


@big
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("options", OPTIONS)
def test_bitwise_equal_from_run_to_run(options, impl):
    require(impl, BF16)
    p, call = problem(options, size(1537, 21), size(151936, 303), size(256, 16), BF16)
    first = run_fused(p, impl, **call)
    for _ in range(size(4, 2)):
        again = run_fused(p, impl, **call)
        assert [k for k, x in first.items() if not torch.equal(x, again[k])] == []


@pytest.mark.cuda_only
def test_values_at_run_time_compile_nothing_new():
    """N, lambda, temperature and the clip bounds are arguments of the kernels, not part of them."""
    require("triton", BF16)
    module = load_impl("triton")
    from rlsd_kernels import triton_tokens  # the token kernel's file

    def run(n, **changed):
        p, call = problem("off-policy", n, 32016, 64, BF16)
        call["config"] = RLSDLossConfig(**changed)
        run_fused(p, "triton", **call)

    for n in (512, 300, 37):  # rows that are multiples of 16 and not
        run(n)
    run(300, temperature=0.7)
    before = compiled_variants(module), compiled_variants(triton_tokens)
    assert min(before) > 0
    for n in (480, 511, 299, 36, 1000):
        run(n)
    for changed in (
        {"temperature": 1.3}, {"temperature": 0.25}, {"rlsd_lambda": 0.1}, {"rlsd_lambda": 1.0},
        {"epsilon": 0.1}, {"epsilon_high": 0.5}, {"delta": 5.0}, {"rlsd_reweight_clip_range": 0.9},
    ):
        run(300, **changed)
    assert (compiled_variants(module), compiled_variants(triton_tokens)) == before


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("impl", KERNELS)
def test_compiled_whole_and_once(impl, fresh_compiler):
    """fullgraph; a new N gives one dynamic graph, a lambda schedule none."""
    require(impl)
    if SMALL and DEVICE == "cuda":
        pytest.skip("torch.compile takes no dispatch mode, as posing.py has one")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def f(hidden, weight, ids, a, teacher, lam):
        return fused_linear_rlsd_loss(
            hidden, weight, ids, a, teacher_hidden=teacher, rlsd_lambda=lam, impl=impl
        ).loss

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for n, lam in ((40, 0.5), (48, 0.4), (33, 0.3), (64, 0.2), (52, 0.1)):
        p = make_problem(n, 1003, 32, device=DEVICE)
        hidden = p["hidden"].clone().requires_grad_()
        args = (hidden, p["weight"], p["completion_ids"], p["advantages"], p["teacher_hidden"], lam)
        losses = compiled(*args), f(*args)
        torch.testing.assert_close(*losses, rtol=0, atol=0)
        torch.testing.assert_close(
            *(torch.autograd.grad(x, hidden)[0] for x in losses), rtol=0, atol=0
        )
    assert counter.frame_count <= 3  # N or lambda static, then dynamic


def static_step(p, impl, config, lam):
    """One step into tensors that a captured graph writes anew at every replay."""
    hidden, weight = (p[k].requires_grad_() for k in ("hidden", "weight"))
    others = {k: x for k, x in p.items() if k not in ("hidden", "weight")}
    out = fused_linear_rlsd_loss(
        hidden, weight, others.pop("completion_ids"), others.pop("advantages"), **others,
        rlsd_lambda=lam, config=config, impl=impl,
    )
    grads = torch.autograd.grad(out.loss, (hidden, weight))
    return {"loss": out.loss, "log_probs": out.log_probs, "teacher": out.teacher_log_probs,
            "d_hidden": grads[0], "d_weight": grads[1], **out.stats}


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("options", ["off-policy", "all"])
def test_nothing_passes_between_host_and_device_in_a_graph(options, impl):
    """What a capture refuses, seen without a GPU too."""
    require(impl, BF16)
    if os.environ.get("RLSD_TEST_DEVICE") != "posing":
        pytest.skip("posing.py watches it; on a GPU the next test captures")
    p, call = problem(options, 21, 303, 16, BF16)
    lam = torch.full((), 0.5, device=DEVICE)
    posing = sys.modules["posing"]
    with posing.capture():
        captured = static_step(p, impl, call["config"], lam)
        x = captured["log_probs"]
        for wait in (lambda: x[0].item(), lambda: x.new_tensor([1.0]), x.tolist, x.cpu,
                     lambda: x[x > 0], lambda: torch.ones(2).to(DEVICE)):
            with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
                wait()
    assert captured["d_hidden"].any()


@pytest.mark.cuda_only
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("all_live", [True, False], ids=["all-live", "dead-rows"])
@pytest.mark.parametrize("options", ["off-policy", "all"])
def test_a_captured_graph_sees_new_inputs(options, all_live, impl):
    require(impl, BF16)

    def inputs(seed):
        p, call = problem(options, 300, 32003, 64, BF16, seed=seed)
        if all_live:
            p["advantages"] = torch.where(p["advantages"] == 0, 0.5, p["advantages"])
            p["loss_weights"] = torch.where(p["loss_weights"] == 0, 1e-3, p["loss_weights"])
        return p, call["config"]

    static, config = inputs(0)
    static = {k: x.clone() for k, x in static.items()}
    lam = torch.full((), 0.5, device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            static_step(static, impl, config, lam)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = static_step(static, impl, config, lam)
    for seed, value in ((1, 0.2), (2, 0.9)):
        fresh, _ = inputs(seed)
        with torch.no_grad():
            for name, x in fresh.items():
                static[name].copy_(x)
            lam.fill_(value)
        graph.replay()
        eager = static_step({k: x.clone() for k, x in fresh.items()}, impl, config, lam.clone())
        # Dead rows are dropped in eager mode only, and torch takes every row's true maximum in a
        # graph: other sums, the same values.
        for name in ("log_probs", "teacher"):
            error, sentence = worst(captured[name], eager[name])
            assert error <= 2e-5, f"{name}: {sentence}"
        for name in ("d_hidden", "d_weight"):
            assert relative(captured[name], eager[name]) <= 6e-3, name
        eager.pop("tokens/differentiated")  # dropped rows are not
        for name, x in eager.items():
            if "/" in name or name == "loss":
                torch.testing.assert_close(
                    captured[name], x, rtol=1e-3, atol=1e-2, equal_nan=True, msg=name
                )


@pytest.mark.cuda_only
@pytest.mark.parametrize("impl", KERNELS)
def test_a_second_stream(impl):
    """Kernels follow the current stream: the default one is busy meanwhile."""
    require(impl, BF16)
    p, options = problem("off-policy", 300, 32003, 64, BF16)
    expected = run_fused(p, impl, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    busy = torch.randn(4096, 4096, device=DEVICE)
    for _ in range(20):
        busy = busy @ busy * 1e-3
    with torch.cuda.stream(side):
        got = run_fused(p, impl, **options)
    side.synchronize()
    assert all(torch.equal(x, got[k]) for k, x in expected.items())


@pytest.mark.cuda_only
@pytest.mark.parametrize("impl", KERNELS)
def test_another_device_than_the_current_one(impl):
    require(impl, BF16)
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    p, options = problem("all", 300, 32003, 64, BF16)
    expected = run_fused(p, impl, **options)
    assert torch.cuda.current_device() == 0
    got = run_fused({k: x.to("cuda:1") for k, x in p.items()}, impl, **options)
    assert all(x.device.index == 1 for x in got.values())
    for name, x in expected.items():
        assert relative(got[name].to(DEVICE), x) <= 1e-5, name


@contextlib.contextmanager
def no_host_waits():
    """Any wait of the host for the device is an error inside."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda_only
def test_the_guard_sees_a_wait():
    with pytest.raises(RuntimeError), no_host_waits():
        torch.ones(3, device=DEVICE).nonzero()


@pytest.mark.cuda_only
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_nothing_waits_for_the_host(impl):
    """Scoring with its redone rows, the token kernel, and both ops without dropped rows; only
    finding the rows to drop asks the device, and the graph test above has the mode without it."""
    require(impl, BF16)
    p = make_problem(300, 32003, 64, BF16, device=DEVICE)
    old = p["old_log_probs"] + 300 * (torch.arange(300, device=DEVICE) % 7 == 0)
    config = RLSDLossConfig()

    def run():
        lp, _ = linear_log_probs(
            p["hidden"], p["weight"], p["completion_ids"], old_log_probs=old, impl=impl,
            return_entropy=True,
        )
        leaf = lp.detach().requires_grad_()
        out = rlsd_loss(
            leaf, p["advantages"], teacher_log_probs=lp, old_log_probs=p["old_log_probs"],
            loss_weights=p["loss_weights"], config=config, impl=impl,
        )
        out.loss.backward()
        return leaf.grad

    expected = run()  # compiles
    with no_host_waits():
        got = run()
    assert torch.equal(got, expected)


@pytest.mark.cuda_only
@pytest.mark.parametrize("impl", ["triton", "cuda"])
@pytest.mark.parametrize("tolerance", [0.0, 1e-2])
def test_the_gradient_of_live_rows_waits_once(impl, tolerance):
    """One count of the live rows of student and teacher; all else is queued behind it, the backward
    pass too."""
    require(impl, BF16)
    p, options = problem("off-policy", 300, 32003, 64, BF16, std=14.0)
    options["gradient_tolerance"] = tolerance  # which waits for an event per chunk, not for all
    run_fused(p, impl, **options)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as seen:
            run_fused(p, impl, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in seen if "synchronizing" in str(w.message)]) == 1
