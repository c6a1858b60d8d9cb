"""What linear_log_probs gives beside one log-prob a row: several ids, log-sum-exp, mean, greedy."""

import math

import emulation
import pytest
import torch
from problems import DTYPES, NAMES, assert_as_accurate, make_problem, run_log_probs

from rlsd_kernels import LinearLogProbsOutput, linear_log_probs, logprob, pipeline, tuning
from rlsd_kernels.ops import flatten
from rlsd_kernels.rows import Head
from rlsd_kernels.shards import Shard

STATUS = logprob.available_impls(torch.empty(0))
KERNELS = [name for name in ("torch", "triton") if STATUS[name] == "ok"]
HEADS = {
    "plain": {},
    "scaled": {"temperature": 0.7, "logit_scale": 0.3, "bias": True},
    "softcap": {"temperature": 1.6, "final_logit_softcapping": 2.0, "bias": True},
}
# Which outputs have an upstream gradient, and how many ids a row has; 0 is the plain shape.
ASKED = {
    "lse": (("lse",), 0),
    "mean": (("mean_logits",), 0),
    "z-loss": (("log_probs", "lse"), 0),
    "smoothed": (("log_probs", "lse", "mean_logits"), 0),
    "one-of-many": (("log_probs",), 1),
    "top-k": (("log_probs",), 5),
    "all": (("log_probs", "entropy", "lse", "mean_logits"), 5),
}
# Bytes of workspace: E of all rows is kept, or a few rows at a time are formed anew.
ROOM = {"kept": None, "anew": 5 * 301 * 4}


def make(asked, head, dtype=torch.float32, n=23, v=301, h=16):
    """Inputs, upstream gradients and options; some rows without a gradient, ids that repeat."""
    names, k = ASKED[asked]
    problem, options = make_problem(n, v, h, dtype), dict(HEADS[head])
    inputs = {x: problem[x] for x in ("hidden", "weight", "completion_ids")}
    if options.pop("bias", False):
        inputs["bias"] = torch.randn(v).to(dtype)
    if k:
        ids = torch.randint(0, v, (n, k))
        ids[:, 0] = inputs["completion_ids"]
        ids[1::2, -1] = ids[1::2, 0]
        inputs["completion_ids"] = ids
    upstream = {x: torch.randn(inputs["completion_ids"].shape if x == "log_probs" else (n,))
                for x in names}
    for u in upstream.values():
        u[2::3] = 0
    return inputs, upstream, options


def written_out(inputs, upstream, *, temperature=1.0, logit_scale=1.0,
                final_logit_softcapping=None):
    """The same in plain PyTorch, fp64."""
    leaves = {k: v.double().requires_grad_() for k, v in inputs.items() if v.is_floating_point()}
    z = leaves["hidden"] @ leaves["weight"].T
    z = logit_scale * (z if "bias" not in leaves else z + leaves["bias"])
    if final_logit_softcapping is not None:
        z = final_logit_softcapping * torch.tanh(z / final_logit_softcapping)
    z = z / temperature
    log_p, ids = z.log_softmax(-1), inputs["completion_ids"]
    several = ids if ids.dim() == 2 else ids[:, None]
    out = {
        "log_probs": log_p.gather(1, several).view(ids.shape),
        "entropy": -(log_p.exp() * log_p).sum(-1), "lse": z.logsumexp(-1),
        "mean_logits": z.mean(-1), "greedy_ids": z.argmax(-1), "greedy_log_probs": log_p.amax(-1),
    }
    total = sum((out[k] * u).sum() for k, u in upstream.items())
    grads = torch.autograd.grad(total, list(leaves.values()))
    result = {k: v.detach() for k, v in out.items()}
    return result | {f"d_{k}": g for k, g in zip(leaves, grads, strict=True)}


def check(impl, inputs, upstream, options, *, truth_options=None, **call):
    got = run_log_probs(inputs, impl, upstream, **options, **call)
    same = run_log_probs(inputs, "ref", upstream, **options)
    truth = written_out(inputs, upstream, **options)
    assert torch.equal(got.pop("greedy_ids"), truth.pop("greedy_ids"))
    same.pop("greedy_ids")
    assert_as_accurate(got, same, truth)
    return got


@pytest.mark.parametrize("room", ROOM)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("asked", ASKED)
def test_values_and_gradients(asked, head, room):
    check("torch", *make(asked, head), max_workspace_bytes=ROOM[room])


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("asked", ["smoothed", "top-k", "all"])
def test_dtypes(asked, dtype):
    check("torch", *make(asked, "scaled", dtype))


@pytest.mark.parametrize("room", ROOM)
@pytest.mark.parametrize("asked, head", [
    ("smoothed", "scaled"), ("mean", "softcap"), ("top-k", "softcap"), ("all", "softcap"),
])
@pytest.mark.parametrize("impl", [*KERNELS[1:], "cuda"])
def test_kernels(impl, asked, head, room, monkeypatch):
    if impl == "cuda":
        emulation.stand_in(monkeypatch)
    check(impl, *make(asked, head, n=7), max_workspace_bytes=ROOM[room])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
@pytest.mark.parametrize("asked, head", [
    ("smoothed", "plain"), ("top-k", "plain"), ("all", "softcap"),
])
@pytest.mark.parametrize("impl", [*KERNELS, "cuda"])
def test_16_bit_operands(impl, asked, head, dtype, gpu_operands, monkeypatch):
    if impl == "cuda":
        emulation.stand_in(monkeypatch)
    inputs, upstream, options = make(asked, head, dtype, n=7)
    got = run_log_probs(inputs, impl, upstream, **options)
    truth = written_out(inputs, upstream, **options)
    for name, want in truth.items():
        if name.startswith("d_"):
            assert (got[name].double() - want).norm() <= 4e-3 * want.norm(), name
        elif name != "greedy_ids":
            torch.testing.assert_close(got[name].double(), want, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_a_student_that_has_converged(dtype, gpu_operands):
    """The gradient of a top-k distillation, q - p at its ids, is a small difference there."""
    inputs, _, options = make("top-k", "plain", dtype, n=7)
    ids = torch.stack([torch.randperm(301)[:40] for _ in range(7)])
    inputs["completion_ids"] = ids
    p = written_out(inputs, {"log_probs": ids.double()})["log_probs"].exp()
    upstream = {"log_probs": (p * (1 + 1e-2 * torch.randn(7, 40))).float()}
    upstream["log_probs"] /= upstream["log_probs"].sum(-1, keepdim=True)
    got = run_log_probs(inputs, "torch", upstream, **options)
    want = written_out(inputs, upstream, **options)
    for name in ("d_hidden", "d_weight"):
        error = (got[name].double() - want[name]).norm() / want[name].norm()
        assert error <= (2e-5 if dtype == torch.float32 else 4e-3), name


@pytest.mark.parametrize("asked", ["z-loss", "smoothed", "top-k"])
def test_a_row_whose_softmax_has_no_coefficient(asked):
    """log p + lse = z_y, and log p_1 - log p_2: dL/dz is 0 but at the ids."""
    inputs, upstream, options = make(asked, "scaled")
    if asked == "top-k":
        upstream["log_probs"] -= upstream["log_probs"].mean(-1, keepdim=True)
        upstream["log_probs"][:, 0] -= upstream["log_probs"].sum(-1)
    else:
        upstream["lse"] = upstream["log_probs"]
    check("torch", inputs, upstream, options)


@pytest.mark.parametrize("part", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("asked", ["smoothed", "top-k"])
def test_frozen_parts_cost_no_work(asked, part, monkeypatch):
    inputs, upstream, options = make(asked, "scaled")
    full, sizes, real = run_log_probs(inputs, "torch", upstream, **options), [], \
        pipeline.linear_log_probs_bwd

    def spy(*args):
        out = real(*args)
        sizes.append([x.numel() > 0 for x in out])
        return out

    monkeypatch.setattr(pipeline, "linear_log_probs_bwd", spy)
    leaf = inputs[part].clone().requires_grad_()
    out = linear_log_probs(
        **(inputs | {part: leaf}), impl="torch", return_lse=True, return_mean_logits=True,
        **options,
    )
    sum((getattr(out, k) * u).sum() for k, u in upstream.items()).backward()
    assert torch.equal(leaf.grad, full[f"d_{part}"])
    assert sizes == [[part == x for x in ("hidden", "weight", "bias")]]


@pytest.mark.parametrize("asked", ["smoothed", "top-k"])
def test_backward_leaves_what_it_reads(asked):
    """E holds other values at the ids while the GEMMs run."""
    inputs, upstream, options = make(asked, "scaled")
    leaf = inputs["weight"].clone().requires_grad_()
    out = linear_log_probs(
        **(inputs | {"weight": leaf}), impl="torch", return_lse=True, return_mean_logits=True,
        **options,
    )
    total = sum((getattr(out, k) * u).sum() for k, u in upstream.items())
    first = torch.autograd.grad(total, leaf, retain_graph=True)[0]
    if asked == "smoothed":  # that of the log-probs alone goes by E as the forward left it
        alone = torch.autograd.grad((out.log_probs * upstream["log_probs"]).sum(), leaf,
                                    retain_graph=True)[0]
        want = run_log_probs(inputs, "torch", {"log_probs": upstream["log_probs"]}, **options)
        assert torch.equal(alone, want["d_weight"])
    assert torch.equal(torch.autograd.grad(total, leaf)[0], first)


@pytest.mark.parametrize("head", ["scaled", "softcap"])
@pytest.mark.parametrize("asked", ["z-loss", "smoothed", "top-k"])
def test_gradient_tolerance(asked, head):
    inputs, upstream, options = make(asked, head, n=64)
    inputs["weight"] = inputs["weight"] * 4  # peaked
    exact = run_log_probs(inputs, "torch", upstream, **options)
    got = run_log_probs(inputs, "torch", upstream, gradient_tolerance=0.1, **options)
    for name, want in exact.items():
        if name.startswith("d_"):
            assert 0 < (got[name] - want).norm() <= 0.2 * want.norm(), name
        else:
            assert torch.equal(got[name], want), name


def test_values_are_the_same_bits_however_they_are_asked_for():
    inputs, _, options = make("top-k", "scaled")
    args = inputs["hidden"], inputs["weight"]
    options |= {"bias": inputs["bias"], "impl": "torch"}
    alone = linear_log_probs(*args, inputs["completion_ids"][:, 0], **options)
    lp, entropy = linear_log_probs(
        *args, inputs["completion_ids"][:, 0], return_entropy=True, **options
    )
    out = linear_log_probs(
        *args, inputs["completion_ids"], return_lse=True, return_mean_logits=True,
        return_greedy=True, return_entropy=True, **options
    )
    assert isinstance(out, LinearLogProbsOutput) and out.log_probs.shape == (23, 5)
    assert torch.equal(alone, lp) and torch.equal(alone, out.log_probs[:, 0])
    assert torch.equal(entropy, out.entropy)
    greedy = linear_log_probs(*args, out.greedy_ids, return_greedy=True, **options)
    assert torch.equal(greedy.log_probs, greedy.greedy_log_probs)
    assert greedy.entropy is greedy.lse is greedy.mean_logits is None
    assert not greedy.greedy_log_probs.requires_grad


@pytest.mark.parametrize("impl", [*KERNELS, "cuda", "ref"])
def test_greedy_of_equals_of_nan_and_of_forbidden_tokens(impl, monkeypatch):
    if impl == "cuda":
        emulation.stand_in(monkeypatch)
    v = 2 * tuning.SCORE_TILE + 900
    weight, hidden = torch.zeros(v, 2), torch.ones(3, 2)
    weight[[17, 1200, 4000]] = 1.0  # the same logit in every tile
    weight[5] = 7.0
    bias = torch.zeros(v)
    bias[5] = -math.inf
    hidden[1] *= -1  # a thousand equals of 0
    hidden[2, 0] = math.nan
    out = linear_log_probs(
        hidden, weight, torch.zeros(3, dtype=torch.int64), bias=bias, return_greedy=True,
        return_mean_logits=True, impl=impl,
    )
    assert out.greedy_ids[:2].tolist() == [17, 0] and 0 <= out.greedy_ids[2] < v
    assert out.greedy_log_probs[2].isnan() and out.mean_logits[:2].tolist() == [-math.inf] * 2
    z = torch.zeros(v - 1)
    z[:3] = 2
    torch.testing.assert_close(out.greedy_log_probs[0], 2 - z.logsumexp(-1))


def test_bad_guesses_do_not_matter():
    inputs, upstream, options = make("all", "softcap")
    for old in (-80.0, 0.0, math.nan):
        old = torch.full(inputs["completion_ids"].shape, old)
        check("torch", inputs, upstream, options, old_log_probs=old)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3)], ids=str)
@pytest.mark.parametrize("impl", ["torch", "ref"])
def test_shapes(impl, shape):
    weight = torch.randn(31, 8, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.randn(*shape, 8, dtype=torch.bfloat16)
    for k in ((), (4,)):
        ids = torch.zeros(*shape, *k, dtype=torch.int64)
        out = linear_log_probs(
            hidden, weight, ids, old_log_probs=torch.zeros(ids.shape), return_entropy=True,
            return_lse=True, return_mean_logits=True, return_greedy=True, impl=impl,
        )
        assert out.log_probs.shape == ids.shape
        assert all(x.shape == shape for x in out[1:])
        assert [x.dtype for x in out] == [torch.float32] * 4 + [torch.int64, torch.float32]
        weight.grad = None
        (out.log_probs.sum() + out.lse.sum() + out.mean_logits.sum()).backward()
        assert weight.grad.any() == (len(shape) == 2 and shape[1] > 0)


@pytest.mark.parametrize("changed, kind, complaint", [
    ({"completion_ids": torch.zeros(5, 2, 2).long()}, ValueError,
     r"completion_ids must have shape \(5,\) .*with a last dimension of K >= 1 ids\), but got"),
    ({"completion_ids": torch.zeros(5, 0).long()}, ValueError, r"shape \(5,\) .*K >= 1.*\(5, 0\)"),
    ({"completion_ids": torch.zeros(4, 2).long()}, ValueError, r"shape \(5, 2\) .*but got \(4, 2"),
    ({"completion_ids": torch.full((5, 2), 7)}, ValueError, r"in \[0, 7\), but range"),
    ({"completion_ids": torch.zeros(5, 2).long(), "old_log_probs": torch.zeros(5)}, ValueError,
     r"old_log_probs must have shape \(5, 2\)"),
    ({"return_lse": 1}, TypeError, "return_lse must be True or False"),
    ({"return_mean_logits": "yes"}, TypeError, "return_mean_logits must be True or False"),
    ({"return_greedy": None}, TypeError, "return_greedy must be True or False"),
])
def test_mistakes(changed, kind, complaint):
    inputs = {"hidden": torch.randn(5, 3), "weight": torch.randn(7, 3),
              "completion_ids": torch.zeros(5).long()}
    with pytest.raises(kind, match=complaint) as error:
        linear_log_probs(**(inputs | changed))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


OPCHECKS = {
    "one-id": ((5,), torch.float32, None, "exp"), "ids": ((5, 3), torch.float32, None, "exp"),
    "bf16": ((5, 3), torch.bfloat16, 2.0, None), "fp64": ((5, 1), torch.float64, 2.0, "exp"),
}


@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(case):
    """Autograd of all outputs, with what backward writes into E and puts back."""
    shape, dtype, softcap, keep = OPCHECKS[case]
    hidden, weight, bias = (torch.randn(x).to(dtype).requires_grad_() for x in ((5, 3), (7, 3), 7))
    torch.library.opcheck(
        torch.ops.rlsd.linear_log_probs.default,
        flatten(logprob.LogProbsInputs(
            hidden, Head(weight, bias, 1.3, 0.7, softcap), torch.randint(0, 7, shape), None, False,
            True, keep, Shard([0, 7, 7], None), "torch", 2**20, 0.0,
        )),
    )


@pytest.mark.parametrize("asked", ["smoothed", "top-k"])
def test_compiled(asked):
    torch._dynamo.reset()
    inputs, upstream, options = make(asked, "scaled", n=6)
    results = []

    def f(hidden, weight):
        out = linear_log_probs(
            hidden, weight, inputs["completion_ids"], bias=inputs["bias"], return_lse=True,
            return_mean_logits=True, return_greedy=True, impl="torch", **options,
        )
        return sum((getattr(out, k) * u).sum() for k, u in upstream.items()), out.greedy_ids

    for step in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaves = [inputs[k].clone().requires_grad_() for k in ("hidden", "weight")]
        total, greedy = step(*leaves)
        results.append([greedy, *torch.autograd.grad(total, leaves)])
    torch._dynamo.reset()
    assert all(map(torch.equal, *results)) and results[0][1].any()
