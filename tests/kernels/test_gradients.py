"""gradient_tolerance: what is left out is bounded, what is not a gradient does not change."""

import itertools
import math

import emulation
import pytest
import torch
from problems import NAMES, cast, make_problem, run_fused

from rlsd.checks import measure
from rlsd_kernels import (
    FusedLinearRLSDLoss,
    RLSDLossConfig,
    fused_linear_rlsd_loss,
    gradients,
    linear_log_probs,
    ref,
    rows,
    torch_impl,
    tuning,
)
from rlsd_kernels.logprob import load_impl

BASE = {"std": 14.0}  # peaked: some entries count and most do not
FEATURES = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"final_logit_softcapping": 20.0},
    "scale": {"logit_scale": 0.7, "config": RLSDLossConfig(temperature=0.8)},
    "entropy": {"config": RLSDLossConfig(entropy_coef=0.1)},
    "kl": {"config": RLSDLossConfig(beta=0.2)},
    "chunks": {"max_workspace_bytes": 40_000},
}


def problem_of(features, dtype=torch.float32, n=96, v=512, h=32):
    options = dict(FEATURES[features])
    problem = make_problem(n, v, h, dtype, **BASE)
    del problem["old_log_probs"]  # of a head without the features: every ratio would be clipped
    if options.pop("bias", False):
        problem["bias"] = torch.linspace(-2, 2, v).to(dtype)
    if options.get("config", RLSDLossConfig()).beta == 0:
        del problem["ref_log_probs"]
    return problem, options


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def installed(impl):
    if impl == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("features, allowed, impl", [
    *itertools.product(FEATURES, [1e-3, 3e-2], ["ref", "torch"]), ("bias", 3e-2, "triton"),
])
def test_gradients_are_within_it_and_nothing_else_moves(features, allowed, impl):
    installed(impl)
    problem, options = problem_of(features)
    exact = run_fused(problem, impl, **options)
    truth = run_fused(cast(problem, torch.float64), "ref", **options)
    got = run_fused(problem, impl, gradient_tolerance=allowed, **options)
    for name in ("loss", "log_probs", "teacher_log_probs"):
        assert torch.equal(got[name], exact[name]), name
    # dh and dW are products of D with W and h: their relative errors are those of D to a factor.
    assert relative(got["d_weight"], truth["d_weight"]) <= 2 * allowed
    assert relative(got["d_hidden"], truth["d_hidden"]) <= 5 * allowed
    if "d_bias" in truth:
        assert relative(got["d_bias"], truth["d_bias"]) <= 2 * allowed
    assert torch.equal(got["d_weight"], exact["d_weight"]) == (
        features == "softcap" and allowed == 1e-3 and impl != "ref"  # most of it is kept, so all
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=NAMES.get)
def test_other_dtypes(dtype):
    problem, _ = problem_of("plain", dtype)
    truth = run_fused(cast(problem, torch.float64), "ref")
    exact = run_fused(problem, "torch")
    got = run_fused(problem, "torch", gradient_tolerance=1e-2)
    assert torch.equal(got["log_probs"], exact["log_probs"])
    for name in ("d_weight", "d_hidden"):
        assert relative(got[name], truth[name]) <= 5e-2
        assert got[name].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("stage", ["torch", "triton", "cuda"])
# Rows and columns beyond a tile, and less than one.
@pytest.mark.parametrize("shape", [(33, 129), (1, 1), (70, 304), (3, 9000)], ids=str)
def test_energies(shape, stage, dtype, monkeypatch):
    installed(stage)
    if stage == "cuda":
        emulation.stand_in(monkeypatch)
    kernels = load_impl(stage)
    e, v = torch.randn(shape[0], shape[1] + 3).to(dtype)[:, : shape[1]], torch.randn(shape[0])
    squares = (e.double() * v.double()[:, None]).square()
    for got, dim in zip(kernels.energies(e, v), (0, 1), strict=True):
        torch.testing.assert_close(got.double(), squares.sum(dim), rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_chunk_leaves_out_what_the_reference_does(impl):
    installed(impl)
    problem, _ = problem_of("plain")
    got, want = (
        run_fused(problem, name, gradient_tolerance=2e-2) for name in (impl, "ref")
    )
    zero = {name: (x["d_weight"] == 0).all(1) for name, x in (("got", got), ("want", want))}
    assert torch.equal(zero["got"], zero["want"]) and 0.2 < zero["got"].double().mean() < 0.99
    assert relative(got["d_weight"], want["d_weight"]) < 1e-5
    assert relative(got["d_hidden"], want["d_hidden"]) < 1e-5


def test_the_rank_one_term_takes_up_what_dropped_rows_of_the_head_share():
    problem, _ = problem_of("plain", torch.float64)
    problem["weight"] = problem["weight"] + 30.0  # a common mean
    truth = run_fused(problem, "ref")["d_hidden"]
    got = run_fused(problem, "torch", gradient_tolerance=2e-2)["d_hidden"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gradients, "dropped_directions",
            lambda weight, shares: weight.new_zeros(len(shares), weight.shape[1]),
        )
        without = run_fused(problem, "torch", gradient_tolerance=2e-2)["d_hidden"]
    assert relative(got, truth) < 0.25 * relative(without, truth)


def test_work_is_what_was_done_and_less_than_all_of_it():
    case = measure.Case(256, 256, 8192)
    for profile, low, high in (("trained", 0.0, 0.2), ("uniform", 1.0, 1.0)):
        p = measure.make_problem(case, profile=profile)
        out = fused_linear_rlsd_loss(
            p.hidden, p.weight, p.completion_ids, p.advantages, teacher_hidden=p.teacher_hidden,
            loss_weights=p.loss_weights, gradient_tolerance=1e-3, impl="torch",
        )
        assert low <= out.stats["head/gradient_work"] <= high and out.stats[
            "tokens/differentiated"
        ] == len(p.live())
        nhv = measure.measured_nhv(case, lambda p=p: measure.gradients(p, lambda p: (
            fused_linear_rlsd_loss(
                p.hidden, p.weight, p.completion_ids, p.advantages,
                teacher_hidden=p.teacher_hidden, loss_weights=p.loss_weights,
                gradient_tolerance=1e-3, impl="torch",
            )[:3]
        )))
        # 4 for the two forward passes and 4 times the work, but for one GEMV over the head.
        assert nhv == pytest.approx(4 + 4 * float(out.stats["head/gradient_work"]), abs=0.05)


def test_the_bound_holds_at_the_logits():
    torch.manual_seed(0)
    d = torch.randn(64, 300, dtype=torch.float64) * torch.rand(300, dtype=torch.float64) ** 9
    for allowed in (1e-4, 1e-2, 0.3, 0.9):
        i, j = gradients.selection(d.square().sum(0), d.square().sum(1), allowed) or (
            torch.arange(64), torch.arange(300))
        left = d.clone()
        left[i[:, None], j] = 0
        assert left.norm() <= allowed * d.norm() * (1 + 1e-12)


@pytest.mark.parametrize("impl", ["torch"])
def test_rows_that_matter_little_cost_nothing(impl):
    """Advantages so small that their squares underflow: relative sizes decide, not absolute."""
    installed(impl)
    problem, _ = problem_of("plain")
    problem["loss_weights"] = problem["loss_weights"] * 1e-30
    truth = run_fused(cast(problem, torch.float64), "ref")
    got = run_fused(problem, impl, gradient_tolerance=1e-2)
    assert relative(got["d_weight"] * 1e30, truth["d_weight"] * 1e30) <= 5e-2


@pytest.mark.parametrize("impl", ["ref", "torch"])
def test_zero_coefficients_give_zero_gradients(impl):
    installed(impl)
    problem, options = problem_of("plain")
    problem["advantages"] = torch.zeros_like(problem["advantages"])
    got = run_fused(problem, impl, gradient_tolerance=1e-3, **options)
    assert not got["d_weight"].any() and not got["d_hidden"].any()


@pytest.mark.parametrize("impl", ["ref", "torch"])
def test_nan_stays(impl):
    installed(impl)
    problem, options = problem_of("plain")
    problem["hidden"][5] = math.nan
    got = run_fused(problem, impl, gradient_tolerance=1e-3, **options)
    assert got["d_hidden"][5].isnan().all() and got["d_weight"].isnan().any()


@pytest.mark.parametrize("shape", [(1, 512, 32), (96, 1, 32), (1, 1, 4), (0, 64, 8)], ids=str)
def test_edges(shape):
    n, v, h = shape
    problem = make_problem(n, v, h) if n else {
        **make_problem(1, v, h), **{k: x[:0] for k, x in make_problem(1, v, h).items()
                                    if k not in ("weight", "teacher_weight")},
    }
    truth = run_fused(cast(problem, torch.float64), "ref")
    got = run_fused(problem, "torch", gradient_tolerance=1e-3)
    for name in ("d_weight", "d_hidden"):
        assert (got[name] - truth[name]).norm() <= 5e-3 * truth[name].norm() + 1e-7


def test_all_energy_in_one_column():
    e = torch.zeros(8, 100)
    e[:, 7] = 1.0
    i, j = gradients.selection(*torch_impl.energies(e, torch.ones(8)), 1e-3)
    assert i.tolist() == list(range(8)) and j.tolist() == [7]


@pytest.mark.parametrize("bad", [-0.1, 1.0, 2, math.nan, math.inf, True, None, "1e-3"])
def test_bad_tolerances_are_one_sentence(bad):
    problem, _ = problem_of("plain")
    arguments = [problem[k] for k in ("hidden", "weight", "completion_ids")]
    for call in (
        lambda: linear_log_probs(*arguments, gradient_tolerance=bad),
        lambda: fused_linear_rlsd_loss(
            *arguments, problem["advantages"], teacher_hidden=problem["teacher_hidden"],
            gradient_tolerance=bad,
        ),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith("gradient_tolerance must be a finite number in [0, 1)")


def log_probs_of(problem, impl, upstream, with_entropy=False, **options):
    """log p(y) and the gradients of any loss on top of them."""
    names = [k for k in ("hidden", "weight", "bias") if k in problem]
    leaves = {k: problem[k].clone().requires_grad_() for k in names}
    out = linear_log_probs(
        **leaves, completion_ids=problem["completion_ids"], impl=impl, return_entropy=with_entropy,
        **options,
    )
    log_probs = out[0] if with_entropy else out
    loss = (log_probs * upstream).sum() + (0.1 * out[1].sum() if with_entropy else 0)
    loss.backward()
    return {"log_probs": log_probs.detach(), **{f"d_{k}": x.grad for k, x in leaves.items()}}


HEADS = {k: FEATURES[k] for k in ("plain", "bias", "softcap")} | {
    "scale": {"logit_scale": 0.7, "temperature": 0.8}
}
# Room for E of all rows; for columns of all chunks; for those of some; for none.
ROOM = {"kept": None, "columns": 60_000, "some": 12_000, "none": 500}


@pytest.mark.parametrize("impl, head, room, with_entropy", [
    *itertools.product(["torch"], HEADS, ROOM, [False]), ("torch", "plain", "kept", True),
    *itertools.product(["ref", "triton"], ["plain"], ["columns"], [False, True]),
    ("triton", "bias", "some", False), ("cuda", "plain", "columns", False),
])
def test_log_probs_take_any_loss_on_top(impl, head, room, with_entropy, monkeypatch):
    installed(impl)
    if impl == "cuda":
        emulation.stand_in(monkeypatch)
    problem, _ = problem_of("plain")
    options = dict(HEADS[head])
    if options.pop("bias", False):
        problem["bias"] = torch.linspace(-2, 2, 512)
    upstream = torch.linspace(-1, 1, 96) ** 3
    run = {"max_workspace_bytes": ROOM[room], "with_entropy": with_entropy, **options}
    truth = log_probs_of(cast(problem, torch.float64), "ref", upstream.double(), **run)
    exact = log_probs_of(problem, impl, upstream, **run)
    got = log_probs_of(problem, impl, upstream, gradient_tolerance=1e-2, **run)
    again = log_probs_of(problem, impl, upstream, gradient_tolerance=1e-2, **run)
    assert torch.equal(got["log_probs"], exact["log_probs"])
    assert all(torch.equal(again[k], x) for k, x in got.items())
    for name, bound in (("d_hidden", 5e-2), ("d_weight", 2e-2), ("d_bias", 2e-2)):
        if name in truth:
            assert relative(got[name], truth[name]) <= bound, name
    assert not torch.equal(got["d_weight"], exact["d_weight"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=NAMES.get)
def test_log_probs_of_other_dtypes(dtype):
    problem, _ = problem_of("plain", dtype)
    upstream = torch.linspace(-1, 1, 96) ** 3
    truth = log_probs_of(cast(problem, torch.float64), "ref", upstream.double())
    got = log_probs_of(problem, "torch", upstream, gradient_tolerance=1e-2)
    assert relative(got["d_weight"], truth["d_weight"]) <= 2e-2
    assert relative(got["d_hidden"], truth["d_hidden"]) <= 5e-2


def saved(output):
    """Bytes that the op of log-probs keeps for backward, but for its inputs."""
    node = output.grad_fn
    while not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    return sum(x.nbytes for x in node.saved_tensors[4:])


def test_backward_of_log_probs_holds_and_forms_little():
    case = measure.Case(256, 64, 16384)
    p = measure.make_problem(case, profile="trained")
    upstream = torch.randn(256)

    def forward(tolerance):
        for x in (p.hidden, p.weight):
            x.grad = None
        return linear_log_probs(
            p.hidden, p.weight, p.completion_ids, impl="torch", gradient_tolerance=tolerance,
            max_workspace_bytes=4 * 16384 * 100,
        )

    out = forward(1e-3)
    assert saved(out) < 0.4 * case.rows * case.vocab * 4
    # The loudest rows are formed anew, so that the bound holds: 2 NHV of theirs for logits.
    assert measure.measured_nhv(case, lambda: (out * upstream).sum().backward()) < 1.9
    out = forward(0.0)
    assert measure.measured_nhv(case, lambda: (out * upstream).sum().backward()) > 5.9


def test_no_row_of_log_probs_hides_behind_louder_ones():
    problem, _ = problem_of("plain", n=256)
    for row in (0, 100, 255):
        upstream = torch.zeros(256)
        upstream[row] = 1.0
        truth = log_probs_of(cast(problem, torch.float64), "ref", upstream.double())
        got = log_probs_of(problem, "torch", upstream, gradient_tolerance=1e-3)
        assert relative(got["d_weight"], truth["d_weight"]) <= 2e-2
        assert (got["d_hidden"] != 0).any(1).nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("room", ["columns", "none"])
def test_log_probs_without_or_beyond_numbers(room):
    problem, _ = problem_of("plain")
    options = {"gradient_tolerance": 1e-3, "max_workspace_bytes": ROOM[room]}
    got = log_probs_of(problem, "torch", torch.zeros(96), **options)
    assert not got["d_weight"].any() and not got["d_hidden"].any()
    problem["hidden"][5] = math.nan
    got = log_probs_of(problem, "torch", torch.ones(96), **options)
    assert got["d_hidden"][5].isnan().all() and got["d_weight"].isnan().any()
    assert got["d_hidden"][6].isfinite().all()
    tiny = log_probs_of(problem_of("plain")[0], "torch", torch.full((96,), 1e-30), **options)
    assert tiny["d_weight"].any() and tiny["d_weight"].isfinite().all()


def test_runs_repeat_to_the_bit_and_the_module_passes_it_on():
    problem, _ = problem_of("chunks")
    module = FusedLinearRLSDLoss(gradient_tolerance=1e-2)
    results = []
    for _ in range(2):
        hidden, weight = (problem[k].clone().requires_grad_() for k in ("hidden", "weight"))
        out = module(
            hidden, weight, problem["completion_ids"], problem["advantages"],
            teacher_hidden=problem["teacher_hidden"], loss_weights=problem["loss_weights"],
        )
        out.loss.backward()
        results.append((hidden.grad, weight.grad))
        assert out.stats["head/gradient_work"] < 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiles_whole():
    problem, _ = problem_of("plain")
    leaves = [problem[k].clone().requires_grad_() for k in ("hidden", "weight")]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(hidden, weight):
        return fused_linear_rlsd_loss(
            hidden, weight, problem["completion_ids"], problem["advantages"],
            teacher_hidden=problem["teacher_hidden"], loss_weights=problem["loss_weights"],
            reweight_mask=problem["reweight_mask"],
            gradient_tolerance=1e-2, impl="torch",
        ).loss

    step(*leaves).backward()
    want = run_fused(problem, "torch", gradient_tolerance=1e-2)
    assert torch.equal(leaves[1].grad, want["d_weight"])
    assert torch.equal(leaves[0].grad, want["d_hidden"])


def test_left_out_of_the_reference_is_the_smallest():
    d = torch.tensor([[3.0, 1e-3, 0.0], [1e-4, 0.0, 0.0]], dtype=torch.float64)
    rows, columns = ref.left_out(d, 1e-2)
    assert rows.tolist() == [False, True] and columns.tolist() == [False, True, True]


# From the rows by what columns for equal ones leave out of them, the most first.
LOUD = {
    "equal": lambda order: torch.ones(256),
    "one-row": lambda order: torch.ones(256).index_fill(0, order[:1], 1000.0),
    "some-rows": lambda order: torch.ones(256).index_fill(0, order[:60], 30.0),
    "both-signs": lambda order: torch.linspace(-1, 1, 256) ** 5,
}


@pytest.mark.parametrize("room", ["kept", "some"])
@pytest.mark.parametrize("upstream", LOUD)
def test_the_bound_of_log_probs_holds_for_any_upstream_gradient(upstream, room, monkeypatch):
    """Columns are chosen for rows of one energy; D as the GEMMs take it is told by its entries."""
    monkeypatch.setitem(tuning.MAX_CHUNK, "cpu", 96)
    problem, _ = problem_of("plain", n=256)
    kept, anew, add, add_columns, score = (
        torch.zeros(256, 512, dtype=torch.bool), [], gradients.Gradients.add,
        gradients.Gradients.add_columns, rows.Rows.score,
    )

    def dense(grads, index, h, *args, **named):
        work = grads.work
        add(grads, index, h, *args, **named)
        if grads.work - work == len(h):
            kept[index] = True

    def some(grads, index, h, v, d, j, *args, **named):
        kept[index[:, None], j] = True
        add_columns(grads, index, h, v, d, j, *args, **named)

    def scored(found, h, *args, **named):
        anew.append(len(h))
        return score(found, h, *args, **named)

    z = problem["hidden"].double() @ problem["weight"].double().T
    d = torch.nn.functional.one_hot(problem["completion_ids"], 512) - z.softmax(-1)
    leaves = [problem[k].clone().requires_grad_() for k in ("hidden", "weight")]
    lp = linear_log_probs(
        *leaves, problem["completion_ids"], impl="torch", gradient_tolerance=0.05,
        max_workspace_bytes={"kept": None, "some": 200_000}[room],
    )
    with monkeypatch.context() as patch:
        patch.setattr(gradients.Gradients, "add", dense)
        patch.setattr(gradients.Gradients, "add_columns", some)
        patch.setattr(rows.Rows, "score", scored)
        lp.sum().backward(retain_graph=True)
        share = d.masked_fill(kept, 0).norm(dim=1) / d.norm(dim=1)
        assert share.max() > 0.05 and sum(anew) <= (0 if room == "kept" else 200)
        g = LOUD[upstream](share.argsort(descending=True))
        d = d * g.double()[:, None]
        kept.zero_()
        anew.clear()
        (lp * g).sum().backward()
    assert 0.5 * kept.numel() > kept.sum() > 0
    assert d[~kept].norm() <= 0.05 * d.norm() * (1 + 1e-3)
    if room == "kept":  # a few rows where they count, none for energies alike
        assert sum(anew) <= 100 and (sum(anew) > 0) == (upstream in ("one-row", "some-rows"))


def test_rows_that_go_are_the_fewest():
    share = torch.tensor([0.0, 1e-2, 4e-3, 0.0])
    for energy, want in (
        ([1.0, 1.0, 1.0, 1.0], [False] * 4), ([1.0, 9.0, 1.0, 1.0], [False, True, False, False]),
        ([1e-3, 9.0, 9.0, 1e-3], [False, True, False, False]),
        ([0.0, 1e-9, 9.0, 0.0], [False] * 4), ([0.0] * 4, [False] * 4),
        ([math.nan, 9.0, 1.0, 1.0], [False] * 4),
    ):
        got = gradients.exceeding(torch.tensor(energy), share, 0.1)
        assert got.tolist() == want, energy


def test_sums_that_select_are_of_integers(monkeypatch):
    """On a GPU a cumsum of floats differs from run to run; deterministic mode refuses it."""
    real, seen = torch.Tensor.cumsum, []
    monkeypatch.setattr(
        torch.Tensor, "cumsum", lambda x, *a, **k: seen.append(x.dtype) or real(x, *a, **k)
    )
    p = make_problem(20, 51, 8)
    h, w = (p[k].requires_grad_() for k in ("hidden", "weight"))
    linear_log_probs(h, w, p["completion_ids"], gradient_tolerance=0.1).sum().backward()
    assert len(seen) >= 3 and set(seen) == {torch.int64}
