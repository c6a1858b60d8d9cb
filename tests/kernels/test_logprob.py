import logging
import math
from dataclasses import astuple

import pytest
import torch
from problems import DTYPES, NAMES, assert_as_accurate, cast, make_problem

import rlsd_kernels
from rlsd_kernels import (
    RLSDLossConfig,
    fused_linear_rlsd_loss,
    linear_log_probs,
    logprob,
    loss,
    pipeline,
    rlsd_loss,
    tuning,
)
from rlsd_kernels.gradients import Kept
from rlsd_kernels.ops import Need, flatten, unflatten
from rlsd_kernels.pipeline import Tokens
from rlsd_kernels.rows import Head, Upstream
from rlsd_kernels.shards import Shard

RUNNING = [x for x, status in logprob.available_impls(torch.empty(0)).items() if status == "ok"]
HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale": {"logit_scale": 0.3},
    "softcap": {"final_logit_softcapping": 3.0},
    "all": {"temperature": 1.6, "logit_scale": 0.5, "final_logit_softcapping": 2.0, "bias": True},
}


def run(inputs, impl, upstream, **options):
    """Values and gradients of linear_log_probs under one upstream gradient per output."""
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if v.is_floating_point()}
    out = linear_log_probs(
        leaves["hidden"], leaves["weight"], inputs["completion_ids"], bias=leaves.get("bias"),
        impl=impl, return_entropy=len(upstream) > 1, **options,
    )
    out = out if isinstance(out, tuple) else (out,)
    total = sum((o * u.to(o.dtype)).sum() for o, u in zip(out, upstream, strict=True))
    grads = torch.autograd.grad(total, list(leaves.values()))
    result = dict(zip(("log_probs", "entropy"), (o.detach() for o in out), strict=False))
    return result | {f"d_{k}": g for k, g in zip(leaves, grads, strict=True)}


def check(n, v, h, dtype, *, with_entropy, head="plain", rows=None):
    options = dict(HEADS[head])
    problem = make_problem(n, v, h, dtype)
    inputs = {k: problem[k] for k in ("hidden", "weight", "completion_ids")}
    if options.pop("bias", False):
        inputs["bias"] = torch.randn(v).to(dtype)
    upstream = [torch.randn(n) for _ in range(1 + with_entropy)]
    upstream[0][1::3] = 0
    got = run(inputs, "torch", upstream, max_workspace_bytes=rows and rows * v * 4, **options)
    same = run(inputs, "ref", upstream, **options)
    assert_as_accurate(got, same, run(cast(inputs, torch.float64), "ref", upstream, **options))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("with_entropy", [False, True], ids=["log-probs", "entropy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_values_and_gradients(dtype, with_entropy, head):
    check(67, 301, 24, dtype, with_entropy=with_entropy, head=head)


# V = 4133 is a full and a short block of a 16-bit head; rows: one per chunk, 13 x 5 + 2, one chunk.
@pytest.mark.parametrize("rows", [1, 5, 67], ids="rows{}".format)
@pytest.mark.parametrize("with_entropy", [False, True], ids=["log-probs", "entropy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_chunks(dtype, with_entropy, rows):
    check(67, 4133, 16, dtype, with_entropy=with_entropy, rows=rows)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 37, 8), (2, 5, 3)], ids=str)
def test_small_shapes(shape):
    check(*shape, torch.float32, with_entropy=True)


@pytest.mark.parametrize("which", [0, 1], ids=["log-probs", "entropy"])
def test_gradient_of_one_output_alone(which):
    p = make_problem(20, 51, 8)
    grads = []
    for impl in ("torch", "ref"):
        hidden = p["hidden"].clone().requires_grad_()
        out = linear_log_probs(
            hidden, p["weight"], p["completion_ids"], return_entropy=True, impl=impl
        )
        grads.append(torch.autograd.grad(out[which].square().sum(), hidden)[0])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
    assert grads[1].abs().max() > 0.1


@pytest.mark.parametrize("workspace", [None, 1], ids=["kept", "anew"])
@pytest.mark.parametrize("with_entropy", [False, True], ids=["log-probs", "entropy"])
@pytest.mark.parametrize("impl", ["torch", "ref"])
def test_upstream_gradients_of_zero_give_zero(impl, with_entropy, workspace):
    p = make_problem(5, 31, 8)
    inputs = {k: p[k] for k in ("hidden", "weight", "completion_ids")}
    got = run(inputs, impl, [torch.zeros(5)] * (1 + with_entropy), max_workspace_bytes=workspace)
    for name in ("d_hidden", "d_weight"):
        assert torch.equal(got[name], torch.zeros_like(got[name])), name


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_entropy_gradients_of_more_rows_than_are_scored_at_once(softcap, monkeypatch):
    monkeypatch.setitem(tuning.MAX_CHUNK, "cpu", 7)
    p = make_problem(23, 31, 8)
    inputs = {k: p[k] for k in ("hidden", "weight", "completion_ids")}
    upstream = [torch.randn(23), torch.randn(23)]
    got, want = (
        run(inputs, impl, upstream, final_logit_softcapping=softcap) for impl in ("torch", "ref")
    )
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("part", ["hidden", "weight", "bias"])
def test_frozen_parts_get_no_gradient_and_cost_no_work(part, monkeypatch):
    sizes = []
    real = pipeline.linear_log_probs_bwd

    def spy(*args):
        out = real(*args)
        sizes.append([x.numel() for x in out])
        return out

    monkeypatch.setattr(pipeline, "linear_log_probs_bwd", spy)
    p = make_problem(9, 31, 8)
    inputs = {"hidden": p["hidden"], "weight": p["weight"], "bias": torch.randn(31)}
    inputs[part] = inputs[part].clone().requires_grad_()
    linear_log_probs(**inputs, completion_ids=p["completion_ids"], impl="torch").sum().backward()
    expected = {"hidden": [72, 0, 0], "weight": [0, 248, 0], "bias": [0, 0, 31]}
    assert sizes == [expected[part]] and inputs[part].grad.any()


@pytest.mark.parametrize("impl", ["torch", "ref"])
def test_shapes_dtypes_and_empty_input(impl):
    weight = torch.randn(31, 8, dtype=torch.bfloat16)
    hidden = torch.randn(2, 0, 8, dtype=torch.bfloat16).requires_grad_()
    out, entropy = linear_log_probs(
        hidden, weight, torch.zeros(2, 0, dtype=torch.int64), return_entropy=True, impl=impl
    )
    (out.sum() + entropy.sum()).backward()
    assert out.shape == entropy.shape == (2, 0) and out.dtype == torch.float32
    assert hidden.grad.shape == hidden.shape
    hidden = torch.randn(2, 3, 4, 8, dtype=torch.bfloat16)
    out = linear_log_probs(hidden, weight, torch.zeros(2, 3, 4, dtype=torch.int64), impl=impl)
    assert out.shape == (2, 3, 4) and out.dtype == torch.float32 and (out < 0).all()


@pytest.mark.parametrize("impl", ["auto", "torch", "ref"])
def test_old_log_probs_never_change_the_result(impl):
    p = make_problem(20, 51, 8)
    args = (p["hidden"], p["weight"], p["completion_ids"])
    plain = linear_log_probs(*args, impl=impl)
    for old in (p["old_log_probs"], p["old_log_probs"] + 10, torch.full((20,), -1e4),
                torch.full((20,), math.nan), torch.full((20,), -math.inf), torch.zeros(20)):
        got = linear_log_probs(*args, old_log_probs=old, impl=impl)
        torch.testing.assert_close(got, plain, atol=5e-6, rtol=0)


@pytest.mark.parametrize("workspace", [2**30, 1], ids=["kept", "anew"])
def test_the_result_may_be_changed_in_place(workspace):
    hidden, weight, ids = small()
    got, want = [], []
    for grads, edit in (
        (got, lambda x: x.masked_fill_(ids > 2, 0.0).mul_(3.0)),
        (want, lambda x: x.masked_fill(ids > 2, 0.0) * 3.0),
    ):
        log_probs = linear_log_probs(hidden, weight, ids, max_workspace_bytes=workspace)
        grads += torch.autograd.grad(edit(log_probs).square().sum(), (hidden, weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_no_grad_builds_no_graph():
    p = make_problem(20, 51, 8)
    hidden = p["hidden"].clone().requires_grad_()
    with torch.no_grad():
        assert not linear_log_probs(hidden, p["weight"], p["completion_ids"]).requires_grad
    assert linear_log_probs(hidden, p["weight"], p["completion_ids"]).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("impl", ["torch", "ref"])
def test_autocast_changes_nothing(impl, dtype):
    problem = make_problem(20, 51, 8, dtype)
    inputs = {k: problem[k] for k in ("hidden", "weight", "completion_ids")}
    upstream = [torch.randn(20), torch.randn(20)]
    expected = run(inputs, impl, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        values = linear_log_probs(**inputs, impl=impl, return_entropy=True)
    assert torch.equal(values[0], expected["log_probs"])
    assert torch.equal(values[1], expected["entropy"])
    if impl == "torch":  # autograd's own backward of ref must run outside autocast, as PyTorch says
        with torch.autocast("cpu", torch.bfloat16):
            got = run(inputs, impl, upstream)
        assert all(torch.equal(got[k], v) for k, v in expected.items())


def test_available_impls():
    status = rlsd_kernels.available_impls()
    assert list(status) == ["cuda", "triton", "torch", "ref"]
    assert status["torch"] == status["ref"] == "ok"
    for name in ("cuda", "triton"):
        assert status[name] == "ok" or (status[name].endswith(".") and len(status[name]) > 20)


CPU, FP64 = torch.empty(0), torch.empty(0, dtype=torch.float64)


class OnGPU:
    """What choose_impl reads of a CUDA tensor."""

    is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)


@pytest.mark.parametrize("impl", ["torch", "ref"])
def test_choose_impl_returns_what_was_asked(impl):
    assert logprob.choose_impl(impl, CPU) == logprob.choose_impl(impl, OnGPU) == impl


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_an_impl_that_cannot_run_says_why(impl, monkeypatch):
    monkeypatch.setattr(
        logprob, "available_impls",
        lambda tensor: {"cuda": "No CUDA here.", "triton": "No GPU here.", "torch": "ok"},
    )
    reason = logprob.available_impls(OnGPU)[impl]
    with pytest.raises(ValueError) as error:
        logprob.choose_impl(impl, OnGPU)
    assert str(error.value) == f"impl={impl!r} cannot run: {reason}"


@pytest.mark.parametrize("tensor, reason", [(CPU, "on a GPU, but got cpu"), (FP64, "are fp64")],
                         ids=["cpu", "fp64"])
def test_kernels_refuse_tensors_they_cannot_take(tensor, reason, monkeypatch):
    monkeypatch.setattr(logprob, "_triton_status", lambda device: "ok")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"^impl='triton' cannot run: .*{reason}.*\\.$"):
        logprob.choose_impl("triton", tensor)
    assert logprob.choose_impl("auto", tensor) == "torch"
    if tensor is CPU:  # the interpreter runs the kernels there, when they are asked for by name
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert logprob.choose_impl("triton", tensor) == "triton"
        assert logprob.choose_impl("auto", tensor) == "torch"


@pytest.mark.parametrize("impl", ["CUDA", "", None, "numpy"])
def test_unknown_impl(impl):
    with pytest.raises(ValueError, match="^impl must be one of auto, cuda, triton, torch, ref"):
        logprob.choose_impl(impl, CPU)


def test_auto_takes_the_first_that_runs_and_says_it_once(monkeypatch, caplog):
    monkeypatch.setattr(logprob, "_announced", set())
    status = {"cuda": "No nvcc.", "triton": "Not installed.", "torch": "ok", "ref": "ok"}
    monkeypatch.setattr(logprob, "available_impls", lambda tensor: status)
    with caplog.at_level(logging.INFO, "rlsd_kernels"):
        assert [logprob.choose_impl("auto", OnGPU) for _ in range(3)] == ["torch"] * 3
        status["triton"] = "ok"
        assert logprob.choose_impl("auto", OnGPU) == "triton"
        assert [logprob.choose_impl("auto", CPU) for _ in range(2)] == ["torch"] * 2
    assert [r.message for r in caplog.records] == [
        "impl='auto' runs 'torch' for torch.bfloat16 inputs on cuda. Passed over "
        "triton: Not installed. cuda: No nvcc.",
        "impl='auto' runs 'triton' for torch.bfloat16 inputs on cuda.",
        "impl='auto' runs 'torch' for torch.float32 inputs on cpu.",
    ]


def small(dtype=torch.float32, n=5, v=7, h=3):
    hidden = torch.randn(n, h).to(dtype).requires_grad_()
    weight = torch.randn(v, h).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, v, (n,))


OPCHECKS = {
    "fp32": (torch.float32, False, None, False, 5),
    "entropy": (torch.float32, False, None, True, 5),
    "bias-softcap": (torch.float32, True, 2.0, True, 5),
    "bf16": (torch.bfloat16, True, None, False, 5),
    "fp16": (torch.float16, True, 2.0, True, 5),
    "fp64": (torch.float64, False, None, True, 5),
    "one-row": (torch.float32, False, None, False, 1),
}


@pytest.mark.parametrize("keep", ["exp", None], ids=["kept", "anew"])
@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck_log_probs(case, keep):
    dtype, bias, softcap, entropy, n = OPCHECKS[case]
    hidden, weight, ids = small(dtype, n)
    b = torch.randn(7).to(dtype).requires_grad_() if bias else None
    torch.library.opcheck(
        torch.ops.rlsd.linear_log_probs.default,
        flatten(logprob.LogProbsInputs(
            hidden, Head(weight, b, 1.3, 0.7, softcap), ids, None, entropy, entropy, keep,
            Shard([0, 7, 7], None), "torch", 2**20, 0.0,
        )),
    )


@pytest.mark.parametrize("case", OPCHECKS)
@pytest.mark.parametrize("need", [(True, True, True), (False, True, False), (True, False, False)],
                         ids=["all", "weight", "hidden"])
def test_opcheck_log_probs_backward(case, need):
    dtype, bias, softcap, entropy, n = OPCHECKS[case]
    hidden, weight, ids = (x.detach() for x in small(dtype, n))
    out = torch.float64 if dtype == torch.float64 else torch.float32
    left = Kept.nothing(hidden, out, out)
    torch.library.opcheck(
        torch.ops.rlsd.linear_log_probs_backward.default,
        flatten(logprob.LogProbsBackwardInputs(
            Upstream(torch.randn(n, dtype=out), torch.randn(n, dtype=out) if entropy else None),
            hidden,
            Head(weight, torch.randn(7).to(dtype) if bias else None, 1.3, 0.7, softcap), ids,
            -torch.ones(n, dtype=out), torch.ones(n, dtype=out),
            left._replace(e=torch.rand(n, 7, dtype=out), s=torch.ones(n, dtype=out))
            if need[0] else left,
            Need(need[0], need[1], bias and need[2]), Shard([0, 7, 7], None), "torch", 2**20,
            0.0,
        )),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("case", OPCHECKS)
@pytest.mark.parametrize("teacher", ["hidden", "log-probs", "none"])
def test_opcheck_fused(case, teacher):
    dtype, bias, softcap, entropy, n = OPCHECKS[case]
    hidden, weight, ids = small(dtype, n)
    b = torch.randn(7).to(dtype).requires_grad_() if bias else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    per_token = [torch.randn(n, dtype=wide) for _ in range(4)]
    torch.library.opcheck(
        torch.ops.rlsd.fused_linear_rlsd_loss.default,
        flatten(loss.FusedInputs(
            hidden, Head(weight, b, 1.3, 0.7, softcap), ids,
            Tokens(
                per_token[0], per_token[1].abs(), per_token[3] if teacher == "log-probs" else None,
                per_token[2], None, torch.rand(n) < 0.5,
            ),
            hidden.detach().clone() if teacher == "hidden" else None, None,
            torch.tensor(0.5, dtype=wide), teacher != "none",
            loss.Scalars(*astuple(RLSDLossConfig(entropy_coef=0.1 if entropy else 0.0))), entropy,
            Need(True, True, bias), False, Shard([0, 7, 7], None), "torch", 2**20,
            0.0,
        )),
    )


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=NAMES.get)
def test_opcheck_rlsd_loss(dtype, entropy_coef):
    lp, entropy = (-torch.rand(5, dtype=dtype)).requires_grad_(), torch.rand(5, dtype=dtype)
    per_token = [torch.randn(5, dtype=dtype) for _ in range(4)]
    torch.library.opcheck(
        torch.ops.rlsd.rlsd_loss.default,
        flatten(loss.LossInputs(
            lp, entropy.requires_grad_() if entropy_coef else None,
            Tokens(per_token[0], torch.rand(5, dtype=dtype), *per_token[1:], None),
            torch.tensor(0.5, dtype=dtype),
            loss.Scalars(*astuple(RLSDLossConfig(delta=None, beta=0.3, entropy_coef=entropy_coef))),
            "torch",
        )),
    )


def test_an_op_is_called_by_the_names_of_its_arguments():
    """One class gives schema and call, in one order, and what is flattened comes back."""
    names = [a.name for a in torch.ops.rlsd.fused_linear_rlsd_loss.default._schema.arguments]
    assert names[:5] == ["hidden", "head_weight", "head_bias", "head_temperature",
                         "head_logit_scale"]
    assert len(set(names)) == len(names)
    config = loss.Scalars(*astuple(RLSDLossConfig()))
    inputs = loss.LossInputs(torch.ones(1), None, Tokens(*range(6)), torch.ones(()), config, "ref")
    flat = flatten(inputs)
    assert unflatten(loss.LossInputs, flat) == inputs and len(flat) == 2 + 6 + 1 + 10 + 1
    assert RLSDLossConfig(*loss.Scalars(*astuple(RLSDLossConfig(beta=0.5)))).beta == 0.5


@pytest.fixture
def fresh_compiler(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(logprob, "_announced", set())
    yield
    torch._dynamo.reset()


def compare_compiled(f, *leaves):
    """Values and gradients of f equal those of fullgraph-compiled f."""
    results = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        inputs = [x.detach().clone().requires_grad_() for x in leaves]
        total, values = g(*inputs)
        results.append([total.detach(), *values, *torch.autograd.grad(total * 3.7, inputs)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    assert all(x.any() for x in results[0][-len(leaves):])


def test_compiled_linear_log_probs(fresh_compiler):
    p = make_problem(12, 51, 8)
    upstream = torch.randn(12)

    def f(hidden, weight):
        lp, entropy = linear_log_probs(
            hidden, weight, p["completion_ids"], return_entropy=True, temperature=0.7
        )
        return (lp * upstream).sum() + entropy.square().sum(), [lp.detach(), entropy.detach()]

    compare_compiled(f, p["hidden"], p["weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=NAMES.get)
def test_compiled_fused(dtype, fresh_compiler):
    p = make_problem(12, 51, 8, dtype)
    config = RLSDLossConfig(beta=0.1, entropy_coef=0.1, temperature=0.7)

    def f(hidden, weight):
        out = fused_linear_rlsd_loss(**(p | {"hidden": hidden, "weight": weight}), config=config)
        return out.loss, [out.log_probs, out.teacher_log_probs, out.stats["rlsd/delta_mean"]]

    compare_compiled(f, p["hidden"], p["weight"])


def test_compiled_rlsd_loss(fresh_compiler):
    lp, a, teacher = -torch.rand(12), torch.randn(12), -torch.rand(12)
    config = RLSDLossConfig(entropy_coef=0.1)

    def f(log_probs, entropy):
        out = rlsd_loss(
            log_probs, a, teacher_log_probs=teacher, old_log_probs=lp - 0.1, entropy=entropy,
            config=config,
        )
        return out.loss, [out.stats["rlsd/weight_mean_pos"], out.stats["clip_ratio/low_mean"]]

    compare_compiled(f, lp, torch.rand(12))


def count_compilations(sizes, lambdas):
    """Compile the fused loss once per (N, lambda), check its values, count the graphs."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def f(hidden, weight, ids, a, teacher, lam):
        return fused_linear_rlsd_loss(
            hidden, weight, ids, a, teacher_hidden=teacher, rlsd_lambda=lam
        ).loss

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for n, lam in zip(sizes, lambdas, strict=True):
        p = make_problem(n, 51, 8)
        args = (p["hidden"], p["weight"], p["completion_ids"], p["advantages"], p["teacher_hidden"])
        torch.testing.assert_close(compiled(*args, lam), f(*args, lam), rtol=0, atol=0)
    return counter.frame_count


@pytest.mark.parametrize("impl", RUNNING)
def test_every_implementation_compiles_whole(impl, fresh_compiler):
    p = make_problem(12, 51, 8)

    def f(hidden, weight):
        out = fused_linear_rlsd_loss(**(p | {"hidden": hidden, "weight": weight}), impl=impl)
        lp = linear_log_probs(hidden, weight, p["completion_ids"], impl=impl)
        return out.loss + lp.sum(), [out.log_probs]

    compare_compiled(f, p["hidden"], p["weight"])


def test_the_choice_of_an_implementation_compiles(fresh_compiler, monkeypatch):
    """What asks the driver and the file system is no part of the graph."""

    def find_spec(name):
        torch._dynamo.graph_break()  # an error under fullgraph, nothing outside

    monkeypatch.setattr(logprob.importlib.util, "find_spec", find_spec)

    def f(x):
        return x + len(logprob.available_impls(x)["triton"])

    x = torch.zeros(2)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


def test_new_lengths_do_not_recompile(fresh_compiler):
    assert count_compilations([12, 15, 9, 20, 31], [0.5] * 5) == 2  # static, then dynamic


def test_a_lambda_schedule_does_not_recompile(fresh_compiler):
    assert count_compilations([12] * 5, [0.5, 0.4, 0.3, 0.2, 0.1]) <= 2


@pytest.mark.parametrize("impl", ["ref", "torch"])
def test_a_forbidden_token_leaves_entropy_and_gradients_finite(impl):
    hidden = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(11, dtype=torch.float64)
    bias[[3, 7]] = -math.inf
    ids = torch.tensor([0, 1, 2, 4, 10])
    log_probs, entropy = linear_log_probs(
        hidden, weight, ids, bias=bias, return_entropy=True, impl=impl
    )
    kept = [i for i in range(11) if i not in (3, 7)]
    log_p = (hidden @ weight.T)[:, kept].log_softmax(-1)
    want = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(entropy, want)
    got = torch.autograd.grad(log_probs.sum() + entropy.sum(), (hidden, weight))
    picked = log_p[torch.arange(5), [kept.index(i) for i in ids]]
    expected = torch.autograd.grad(picked.sum() + want.sum(), (hidden, weight))
    torch.testing.assert_close(got, expected)
