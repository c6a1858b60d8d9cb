"""Each stage of triton_impl and cuda_impl against naive fp64. Without a GPU Triton's kernels run in
its interpreter, CUDA's emulated (emulation.py)."""

import math
from functools import partial

import emulation
import pytest
import torch
from problems import NAMES, make_problem, worst

pytest.importorskip("triton")

from rlsd_kernels import (  # noqa: E402
    RLSDLossConfig,
    cuda_impl,
    extension,
    ref,
    triton_impl,
    tuning,
)
from rlsd_kernels.config import TOKEN_SUMS  # noqa: E402

# numpy, under the interpreter, warns of what bad guesses are there to provoke
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1, 1),  # one row, one token: a tile of nothing but mask
    (1, 128, 8),  # V is the smallest tile: no masked tail
    (3, 129, 16),  # one past a tile
    (5, 1000, 33),  # odd H: rows of the head are not aligned
    (2, 4096, 16),  # exactly one tile without a store, two with one
    (3, 9001, 7),  # whole tiles and a tail, rows of the chunk padded
]
# temperature, logit_scale, softcap, bias
HEADS = {
    "plain": (1.0, 1.0, None, None),
    "temperature-scale": (0.7, 1.3, None, None),
    "bias": (1.0, 1.0, None, "normal"),
    "forbidden": (0.9, 1.0, None, "-inf"),
    "shift+100": (1.0, 1.0, None, 100.0),
    "shift-100": (1.0, 1.0, None, -100.0),
    "softcap": (1.0, 1.0, 30.0, None),
    "softcap-all": (0.8, 1.7, 3.0, "normal"),  # most logits near the cap
}
KEEPS = {
    "none": (None, None), "exp-bf16": ("exp", torch.bfloat16), "exp-fp32": ("exp", torch.float32),
    "logits": ("logits", torch.float32),
}


@pytest.fixture(params=["triton", "cuda"])
def kernels(request, monkeypatch):
    """An implementation module, ready to run on DEVICE."""
    if request.param == "triton":
        return triton_impl
    if DEVICE == "cpu":
        emulation.stand_in(monkeypatch)
    elif extension.status() != "ok":
        pytest.skip(extension.status())
    return cuda_impl


def shape_id(shape):
    return "M{}-V{}-H{}".format(*shape)


class Case:
    """Rows and a head in one dtype, and their exact z, dcap and log-sum-exp."""

    def __init__(
        self, kernels, shape, dtype=torch.float32, head="plain", chunk_rows=None, **tier
    ):
        m, v, hidden = shape
        temperature, scale, cap, bias = HEADS[head]
        self.h = torch.randn(m, hidden).to(dtype).to(DEVICE)
        self.weight = (2 * hidden**-0.5 * torch.randn(v, hidden)).to(dtype).to(DEVICE)
        self.bias = None
        if bias is not None:
            self.bias = torch.randn(v) if isinstance(bias, str) else torch.full((v,), bias)
            if bias == "-inf":
                self.bias[: v - 1 : 3] = -math.inf
            self.bias = self.bias.to(DEVICE)
        x = self.h.double() @ self.weight.double().T
        if self.bias is not None:
            x = x + self.bias.double()
        x, self.dcap = scale * x, torch.ones_like(x)
        if cap is not None:
            self.dcap = 1 - torch.tanh(x / cap) ** 2
            x = cap * torch.tanh(x / cap)
        self.z = x / temperature
        self.lse = self.z.logsumexp(-1)
        if DEVICE == "cpu":
            self.h = self.h.float()
        self.options = (temperature, scale, cap, chunk_rows or m)
        self.scorer = kernels.Scorer(self.weight, self.bias, *self.options, **tier)
        self.tolerance = 1e-5 if dtype == torch.float32 else 1e-4

    def score(self, c, keep="none", **options):
        keep, dtype = KEEPS[keep]
        out = None if keep is None else torch.empty(self.z.shape, dtype=dtype, device=DEVICE)
        return *self.scorer.score(self.h, c, out=out, keep=keep, **options), out

    def check(self, c, s, t, out, keep):
        """log-sum-exp, entropy sum and what was kept, against fp64 with the c that came back."""
        error, sentence = worst(c.double() + s.double().log(), self.lse)
        assert error <= self.tolerance, f"log-sum-exp: {sentence}"
        d = self.z - c.double()[:, None]
        e = d.exp()
        if t is not None:
            expected = torch.where(e == 0, 0, e * d).sum(-1) / e.sum(-1)
            error, sentence = worst(t.double() / s.double(), expected)
            assert error <= 4 * self.tolerance, f"entropy sum: {sentence}"
        keep, dtype = KEEPS[keep]
        if keep == "exp":
            # One rounding: half a unit in the last place, and the error of z in the exponent.
            expected = e * self.dcap
            allowed = torch.finfo(dtype).eps / 2 + 2 * self.tolerance
            excess = (out.double() - expected).abs() - allowed * expected - 1e-7 * e
            assert excess.max() <= 1e-37, worst(out, expected)[1]
        elif keep == "logits":
            assert not out.isnan().any() and (out == -math.inf).equal(self.z == -math.inf)
            error, sentence = worst(out.nan_to_num(neginf=0), self.z.nan_to_num(neginf=0))
            assert error <= self.tolerance * 2, f"logits: {sentence}"


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_score_shapes(kernels, dtype, shape):
    case = Case(kernels, shape, dtype, "bias")
    guess = case.lse.float()
    c, s, t, out = case.score(guess, "exp-bf16")
    assert torch.equal(c, guess) and t is None
    case.check(c, s, t, out, "exp-bf16")


@pytest.mark.parametrize("want_entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("head", HEADS)
def test_score_heads(kernels, head, keep, want_entropy):
    case = Case(kernels, (5, 2311, 24), head=head)  # rows 1 and 3 are redone
    off = torch.tensor([0, 200, 10, -200, -10.0], device=DEVICE)
    guess = (case.lse + off).float()
    c, s, t, out = case.score(guess, keep, want_entropy=want_entropy)
    assert (t is not None) == want_entropy
    assert torch.equal(c[::2], guess[::2])
    assert worst(c[1::2], case.z.amax(-1)[1::2])[0] <= case.tolerance
    case.check(c, s, t, out, keep)


def test_softcap_is_exact_to_fp32(kernels):
    """Both branches of tanh and its slope, at logits that are exact: H = 1 and h = 1."""
    x = torch.cat([torch.linspace(-12, 12, 3001), torch.logspace(-6, 0, 500), torch.zeros(1)])
    x = x.to(DEVICE)
    one = torch.ones(1, 1, device=DEVICE)
    scorer = kernels.Scorer(x[:, None].contiguous(), None, 1.0, 1.0, 1.0, 1)
    out, e = torch.empty(1, len(x), device=DEVICE), torch.empty(1, len(x), device=DEVICE)
    exact = torch.tanh(x.double())
    scorer.score(one, one[0] * 8, out=out, keep="logits")
    assert ((out[0] - exact).abs() <= 3e-7 * exact.abs()).all(), worst(out[0], exact)[1]
    scorer.score(one, one[0] * 8, out=e, keep="exp")
    slope = e[0].double() / (exact - 8).exp()
    error, sentence = worst(slope, 1 - exact**2)
    assert error <= 2e-6, sentence


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("off", [-200, -80, -10, 0, 10, 80, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_guesses(kernels, dtype, off, keep):
    """80 nats off, the sum is finite but no longer exact: fp32 flushes below exp(-87)."""
    case = Case(kernels, (2, 300, 16), dtype, "temperature-scale")
    guess = (case.lse + off).float()
    c, s, t, out = case.score(guess, keep, want_entropy=True)
    assert torch.equal(c, guess) == (abs(off) <= 10)
    case.check(c, s, t, out, keep)


@pytest.mark.parametrize("keep", KEEPS)
def test_redone_rows_leave_the_others_alone(kernels, keep):
    case = Case(kernels, (6, 2500, 16), head="softcap-all")
    guess = case.lse.float()
    c, s, t, out = case.score(guess, keep, want_entropy=True)
    bad = guess.clone()
    bad[1], bad[3], bad[4] = math.nan, math.inf, -math.inf
    c2, s2, t2, out2 = case.score(bad, keep, want_entropy=True)
    good = [0, 2, 5]
    for first, second in ((c, c2), (s, s2), (t, t2), (out, out2)):
        assert first is second is None or torch.equal(first[good], second[good])
    case.check(c2, s2, t2, out2, keep)


@pytest.mark.parametrize("keep", KEEPS)
def test_nan_rows_end_as_nan(kernels, keep):
    case = Case(kernels, (4, 2500, 16), head="bias")
    guess = case.lse.float()
    c, s, t, out = case.score(guess, keep, want_entropy=True)
    case.h = case.h.clone()
    case.h[2, 3] = math.nan
    c2, s2, t2, out2 = case.score(guess, keep, want_entropy=True)
    assert s2[2].isnan() and t2[2].isnan() and (out is None or out2[2].isnan().all())
    good = [0, 1, 3]
    for first, second in ((c, c2), (s, s2), (t, t2), (out, out2)):
        assert first is second is None or torch.equal(first[good], second[good])


def test_the_chunk_is_allocated_once_and_only_where_needed(kernels):
    case = Case(kernels, (3, 130, 8), chunk_rows=5)
    guess = case.lse.float()
    case.score(guess, "exp-fp32")
    case.score(guess, "logits")
    assert case.scorer._scratch is None  # fp32 results hold the logits themselves
    case.score(guess)
    scratch = case.scorer._scratch
    assert scratch.shape == (5, 144)  # rows start at multiples of 16 elements
    case.score(guess, "exp-bf16")
    assert case.scorer._scratch is scratch
    with pytest.raises(ValueError, match="at most 5 rows at a time, not 6"):
        case.scorer.score(case.h.repeat(2, 1), guess.repeat(2))
    case.h, guess = case.h[:0], guess[:0]
    assert [x.shape for x in case.score(guess, want_entropy=True)[:3]] == [(0,)] * 3


@pytest.mark.parametrize("keep", KEEPS)
def test_strided_rows(kernels, keep):
    case = Case(kernels, (4, 2100, 16), head="bias")
    wide = torch.randn(8, 40, device=DEVICE)
    wide[::2, 3:19] = case.h
    case.h = wide[::2, 3:19]
    guess = torch.stack([case.lse.float(), case.lse.float()], 1)[:, 0]
    kind, dtype = KEEPS[keep]
    out = None if kind is None else torch.full((8, 3000), 7, dtype=dtype, device=DEVICE)
    rows = None if kind is None else out[1::2, 100:2200]
    c, s, t = case.scorer.score(case.h, guess, out=rows, keep=kind)
    case.check(c, s, t, rows, keep)
    if out is not None:
        assert (out[::2] == 7).all() and (out[:, 2200:] == 7).all() and (out[:, :100] == 7).all()


class _Waiting(Exception):
    pass


def lockstep(runs):
    """Calls each of `runs` with (reduce_sum, reduce_max) over all of them, as ranks would be.

    A run stops at the first reduction whose result is not known yet and is repeated once it is.
    """
    results = []
    while True:
        outputs, local, counts = [], [], []
        for run in runs:
            calls = []

            def reduce(op, x, calls=calls, local=local):
                calls.append(op)
                if len(calls) > len(results):
                    local.append((op, x.clone()))
                    raise _Waiting
                return x.copy_(results[len(calls) - 1])

            try:
                outputs.append(run(partial(reduce, "sum"), partial(reduce, "max")))
            except _Waiting:
                outputs.append(None)
            counts.append(tuple(calls))
        assert len(set(counts)) == 1, f"the ranks reduce differently: {counts}"
        if not local:
            return outputs, counts[0]
        assert len(local) == len(runs)
        stacked = torch.stack([x for _, x in local])
        results.append(stacked.sum(0) if local[0][0] == "sum" else stacked.amax(0))


@pytest.mark.parametrize("keep", ["none", "exp-bf16", "logits"])
@pytest.mark.parametrize("head", ["plain", "forbidden", "softcap-all"])
def test_two_vocabulary_shards(kernels, head, keep):
    case = Case(kernels, (5, 400, 16), head=head)
    guess = (case.lse + torch.tensor([0, 200, 3, -200, -3.0], device=DEVICE)).float()
    if head == "forbidden":
        case.bias[150:] = -math.inf  # the second shard adds nothing
        case.z[:, 150:] = -math.inf
        case.lse = case.z.logsumexp(-1)
    kind, dtype = KEEPS[keep]

    def shard(part):
        bias = None if case.bias is None else case.bias[part]

        def run(reduce_sum, reduce_max):
            scorer = kernels.Scorer(
                case.weight[part], bias, *case.options, reduce_sum, reduce_max
            )
            out = None if kind is None else torch.empty(5, part.stop - part.start, dtype=dtype,
                                                        device=DEVICE)
            return *scorer.score(case.h, guess, out=out, keep=kind, want_entropy=True), out
        return run

    outputs, calls = lockstep([shard(slice(0, 151)), shard(slice(151, 400))])
    (c, s, t, out), (c2, s2, t2, out2) = outputs
    assert torch.equal(c, c2) and torch.equal(s, s2) and torch.equal(t, t2)
    assert torch.equal(c[::2], guess[::2]) and not torch.equal(c[1::2], guess[1::2])
    case.check(c, s, t, out if out is None else torch.cat([out, out2], 1), keep)
    assert calls == ("sum", "max", "sum", "sum")  # with or without a bad row, see below
    if keep == "none":
        guess = case.lse.float()
        assert lockstep([shard(slice(0, 151)), shard(slice(151, 400))])[1] == calls


@pytest.mark.parametrize("layout", ["dense", "strided", "transposed"])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 5, 2500)], ids=shape_id)  # three steps over H
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_target_logits(kernels, dtype, shape, layout):
    case = Case(kernels, shape, dtype)
    h, weight = case.h, case.weight
    m, v, _ = shape
    ids = torch.randint(0, v, (m,), device=DEVICE)
    ids[0] = v - 1
    exact = h.double() @ weight.double().T
    if layout == "strided":
        h, weight = torch.cat([h, h], 1)[:, : h.shape[1]], weight.repeat_interleave(2, 0)[::2]
    elif layout == "transposed":
        h, weight = h.T.contiguous().T, weight.T.contiguous().T
    got = kernels.target_logits(h, weight, ids)
    assert got.dtype == torch.float32
    error, sentence = worst(got, exact.gather(1, ids[:, None])[:, 0])
    assert error <= 3e-6, sentence
    if m > 2:
        ids[0], ids[1], ids[2] = v, -1, 2**40
        held = kernels.target_logits(h, weight, ids)
        assert (held[:3] == 0).all() and torch.equal(held[3:], got[3:])


def test_target_logits_never_reads_what_is_no_token(kernels):
    h, weight = torch.ones(2, 4, device=DEVICE), torch.full((3, 4), math.nan, device=DEVICE)
    got = kernels.target_logits(h, weight, torch.tensor([-1, 3], device=DEVICE))
    assert (got == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("m", [0, 1, 300])  # 300: a second, partly masked block of rows
def test_fix_targets(kernels, m, dtype):
    e = torch.randn(m, 77, device=DEVICE).to(dtype)[:, :50]
    ids = torch.randint(-3, 53, (m,), device=DEVICE)
    values, expected = torch.randn(m, device=DEVICE), e.clone()
    for i, target in enumerate(ids.tolist()):
        if 0 <= target < 50:
            expected[i, target] = values[i].to(dtype)
    kernels.fix_targets(e, ids, values)
    assert torch.equal(e, expected)


GRADIENT_OUT = {"in-place": None, "fp32": torch.float32, "bf16": torch.bfloat16,
                "fp16": torch.float16}


@pytest.mark.parametrize("out", GRADIENT_OUT)
@pytest.mark.parametrize("entropy, even", [(False, False), (True, False), (True, True)],
                         ids=["", "entropy", "entropy-even"])
@pytest.mark.parametrize("head", ["plain", "forbidden", "softcap-all"])
# 5000: two whole tiles and a tail; 1: only a tail
@pytest.mark.parametrize("v", [1, 5000])
def test_logit_gradient(kernels, v, head, entropy, even, out):
    m, scale = 4, -0.6
    case = Case(kernels, (m, v, 16), head=head)
    ids = torch.tensor([v - 1, 0, -1, v], device=DEVICE)  # the last two live in other shards
    x = case.z.clone().requires_grad_()  # at z itself: dcap is held apart below
    log_p = x - case.lse[:, None]
    g = torch.randn(m, dtype=torch.float64, device=DEVICE)
    g_entropy = torch.randn(m, dtype=torch.float64, device=DEVICE)
    held = (ids >= 0) & (ids < v)
    p = log_p.exp()
    h_rows = -(p * log_p.clamp(min=-1e30)).sum(-1)
    expected = g[:, None] * p.detach()
    rows = held.nonzero()[:, 0]
    expected[rows, ids[rows]] -= g[rows]
    if entropy:
        # dH/dz_j = -p_j (log p_j + H), by autograd of the softmax
        y = torch.where(case.z == -math.inf, -1e4, case.z).requires_grad_()
        lp = torch.log_softmax(y, -1)
        expected -= torch.autograd.grad((g_entropy * -(lp.exp() * lp).sum(-1)).sum(), y)[0]
    expected = scale * expected * case.dcap
    z = case.z.float()
    buffer = z if out == "in-place" else torch.empty(m, v, dtype=GRADIENT_OUT[out], device=DEVICE)
    pair = (g_entropy.float(), h_rows.detach().float()) if entropy else (None, None)
    m_rows = None
    if even:
        m_rows = torch.randn(m, dtype=torch.float64, device=DEVICE)
        expected = expected + scale * m_rows[:, None] * case.dcap
        m_rows = m_rows.float()
    case.scorer.logit_gradient(z, buffer, ids, case.lse.float(), g.float(), *pair, m_rows, scale)
    eps = torch.finfo(buffer.dtype).eps
    allowed = (eps / 2 + 2e-5) * expected.abs() + 2e-6
    excess = (buffer.double() - expected).abs() - allowed
    assert (excess <= 0).all(), worst(buffer, expected)[1]


def test_logit_gradient_of_a_row_without_coefficient_is_zero(kernels):
    case = Case(kernels, (3, 200, 8))
    z = case.z.float()
    z[1] = math.nan
    g, ids = torch.tensor([1, 0, 1.0], device=DEVICE), torch.zeros(3, dtype=torch.int64).to(DEVICE)
    z[2] = math.nan
    case.scorer.logit_gradient(z, z, ids, case.lse.float(), g, None, None, None, 1.0)
    assert (z[1] == 0).all() and z[2].isnan().all() and z[0].isfinite().all() and (z[0] != 0).any()


CONFIGS = {
    "default": {},
    "grpo": {"rlsd_lambda": 0.0},
    "beta": {"beta": 0.3},
    "old-deltas": {"rlsd_delta_source": "old_log_probs", "epsilon": 0.1},
    "negative-only": {"rlsd_negative_only": True},
    "no-dual": {"delta": None, "epsilon_high": 0.1},
    "dual-binds": {"delta": 1.1},
    "open-weights": {"rlsd_reweight_clip_range": 1.0, "rlsd_lambda": 1.0},
    "open-ratio": {"epsilon": 1.0, "rlsd_reweight_clip_range": 0.01},
}
OPTIONAL = ("teacher_log_probs", "old_log_probs", "ref_log_probs", "reweight_mask", "entropy")
INPUTS = {
    "all": OPTIONAL, "no-teacher": OPTIONAL[1:], "no-old": ("teacher_log_probs", "ref_log_probs"),
    "no-mask": ("teacher_log_probs", "old_log_probs", "ref_log_probs", "entropy"),
}


def tokens(m, seed=0):
    """Per-token inputs in fp32 that reach both sides of every bound."""
    problem = make_problem(m, 50, 8, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    log_probs = problem["old_log_probs"] + 0.5 * torch.randn(m, generator=rng)
    log_probs[5::50] += 100  # ratios beyond exp(80)
    log_probs[6::50] -= 100
    given = {
        "teacher_log_probs": log_probs + torch.randn(m, generator=rng),
        "old_log_probs": problem["old_log_probs"],
        "ref_log_probs": log_probs + 0.4 * torch.randn(m, generator=rng),
        "reweight_mask": problem["reweight_mask"], "entropy": torch.rand(m, generator=rng),
    }
    given["ref_log_probs"][8::50] += 90  # beyond the bound of the k3 estimate
    given["ref_log_probs"][9::50] = log_probs[9::50] + 1e-4  # and where it would cancel
    base = (log_probs, problem["advantages"], problem["loss_weights"])
    return tuple(x.to(DEVICE) for x in base), {k: x.to(DEVICE) for k, x in given.items()}


def double(x):
    return x.double() if torch.is_tensor(x) and x.is_floating_point() else x


def specification(base, given, lam, config):
    """a_t loss_t and g_t of each token, and TOKEN_SUMS, by the reference and autograd in fp64."""
    given = {k: double(given.get(k)) for k in OPTIONAL} | {"rlsd_lambda": lam, "config": config}
    log_probs, advantages, weights = (x.double() for x in base)
    sums = ref.token_sums(log_probs, advantages, weights, **given)
    leaves = (log_probs.requires_grad_(), weights.requires_grad_())
    g, token = torch.autograd.grad(ref.rlsd_loss(leaves[0], advantages, leaves[1], **given), leaves)
    return weights.detach() * token, g, sums


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("options", CONFIGS)
@pytest.mark.parametrize("m", [1, 1300])  # 1300: two whole blocks of tokens and a masked one
def test_token_rows(kernels, m, options, inputs):
    config = RLSDLossConfig(**CONFIGS[options])
    base, given = tokens(m)
    given = {k: given[k] for k in INPUTS[inputs]}
    lam = torch.tensor(config.rlsd_lambda, device=DEVICE)
    loss, g, sums = kernels.token_rows(*base, lam, config, **given)
    assert (loss.shape, g.shape, sums.shape) == ((), (m,), (len(TOKEN_SUMS),))
    assert (loss.dtype, g.dtype, sums.dtype) == (torch.float32, torch.float32, torch.float64)
    again = kernels.token_rows(*base, lam, config, **given)
    assert all(map(torch.equal, (loss, g, sums), again))

    token, slope, expected = specification(base, given, lam.double(), config)
    size = token.abs().sum()
    assert (loss - token.sum()).abs() <= 2e-5 * size, (loss, token.sum())
    # exp at 100 nats loses 1e-5 of its value in fp32; near 0 the log-probs' own rounding is left
    excess = (g.double() - slope).abs() - 2e-5 * slope.abs() - 2e-6 * base[2].double()
    assert (excess <= 0).all(), worst(g, slope)[1]
    for name, value, want in zip(TOKEN_SUMS, sums.tolist(), expected.tolist(), strict=True):
        assert abs(value - want) <= 2e-5 * abs(want) + 1e-5, f"{name}: got {value}, want {want}"


def test_the_problem_reaches_every_sum():
    base, given = tokens(1300)
    config = RLSDLossConfig(delta=1.5)
    *_, sums = specification(base, given, 0.5, config)
    assert not [name for name, value in zip(TOKEN_SUMS, sums, strict=True) if value == 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_dead_tokens_are_exactly_zero_whatever_they_hold(kernels, bad):
    config = RLSDLossConfig()
    base, given = tokens(600)
    lam = torch.tensor(0.5, device=DEVICE)
    expected = kernels.token_rows(*base, lam, config, **given)
    dead = (base[2] == 0) | (base[1] == 0)
    assert 0 < dead.sum() < 600
    given = {k: x if k == "reweight_mask" else x.masked_fill(dead, bad) for k, x in given.items()}
    base = (base[0].masked_fill(dead, bad), *base[1:])
    got = kernels.token_rows(*base, lam, config, **given)
    assert all(map(torch.equal, got, expected)) and (got[1][dead] == 0).all()


def test_a_live_nan_is_not_hidden(kernels):
    config = RLSDLossConfig()
    base, given = tokens(10)
    base[0][0] = math.nan
    assert base[1][0] != 0 and base[2][0] != 0
    loss, g, _ = kernels.token_rows(*base, torch.tensor(0.5, device=DEVICE), config, **given)
    assert loss.isnan() and g[0].isnan() and not g[1:].isnan().any()


@pytest.mark.parametrize("delta", [math.inf, -math.inf], ids=str)
def test_infinite_deltas_are_clipped(kernels, delta):
    config = RLSDLossConfig(rlsd_lambda=1.0)
    lp = torch.full((2,), -1.0, device=DEVICE)
    advantages, ones = torch.tensor([2.0, -2.0], device=DEVICE), torch.ones(2, device=DEVICE)
    _, g, _ = kernels.token_rows(
        lp, advantages, ones, torch.tensor(1.0, device=DEVICE), config, old_log_probs=lp,
        teacher_log_probs=torch.full_like(lp, delta),
    )
    up, down = (1.2, 0.8) if delta > 0 else (0.8, 1.2)
    assert torch.allclose(g, torch.tensor([-2 * up, 2 * down], device=DEVICE))


def test_token_rows_of_nothing(kernels):
    nothing = torch.empty(0, device=DEVICE)
    loss, g, sums = kernels.token_rows(
        nothing, nothing, nothing, torch.tensor(0.5, device=DEVICE), RLSDLossConfig()
    )
    assert loss == 0 and g.shape == (0,) and (sums == 0).all()


# Tier B: tiles of 128 x 128 x 32 in the interpreter.
GEMM_SHAPES = [
    (1, 16, 32),  # one row, one step over H, a tile that is mostly edge
    (130, 272, 96),  # two row tiles and three vocabulary tiles, both with edges, on 3 programs
]


@pytest.mark.parametrize("keep", ["none", "exp-bf16", "exp-fp32"])
@pytest.mark.parametrize("head", ["plain", "forbidden", "softcap-all"])
@pytest.mark.parametrize("shape", GEMM_SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
def test_gemm_with_exp_epilogue(dtype, shape, head, keep):
    case = Case(triton_impl, shape, dtype, head, tier="B")
    off = torch.zeros(shape[0], dtype=torch.float64, device=DEVICE)
    off[1::13], off[2::13] = 200, -200  # redone through tier A
    guess = (case.lse + off).float()
    c, s, t, out = case.score(guess, keep)
    assert torch.equal(c[off == 0], guess[off == 0]) and t is None
    assert not (off != 0).any() or not torch.equal(c, guess)
    case.check(c, s, t, out, keep)


def test_gemm_tier_takes_only_what_it_can(monkeypatch):
    def taken(shape=(2, 32, 32), dtype=torch.bfloat16, keep="exp-bf16", **options):
        seen = []
        real = triton_impl.Scorer._score_in_gemm
        monkeypatch.setattr(triton_impl.Scorer, "_score_in_gemm",
                            lambda *args: seen.append(1) or real(*args))
        case = Case(triton_impl, shape, dtype, tier="B")
        case.check(*case.score(case.lse.float(), keep, **options), keep)
        monkeypatch.undo()
        return bool(seen)

    assert taken() and taken(keep="none") and taken(dtype=torch.float16)
    assert not taken(dtype=torch.float32)
    assert not taken(shape=(2, 33, 32)) and not taken(shape=(2, 32, 33))
    assert not taken(keep="logits") and not taken(keep="none", want_entropy=True)
    assert triton_impl.Scorer(torch.zeros(2, 2), None, 1.0, 1.0, None, 1).tier == tuning.SCORE_TIER


def test_offsets_past_two_billion_elements(kernels, tmp_path):
    """Rows 0 and 2 of a sparse file lie 2^31 elements apart."""
    if DEVICE == "cuda":
        pytest.skip("the file is host memory")
    v, stride = 300, 2**30 + 16
    size = 2 * stride + v
    storage = torch.from_file(str(tmp_path / "e"), shared=True, size=size, dtype=torch.bfloat16)
    e = storage.as_strided((3, v), (stride, 1))
    case = Case(kernels, (3, v, 16), torch.bfloat16)
    guess = (case.lse + torch.tensor([0, 0, 200])).float()
    c, s, t = case.scorer.score(case.h, guess, out=e, keep="exp")
    case.check(c, s, t, e, "exp-bf16")
    kernels.fix_targets(e, torch.tensor([5, 6, 7]), torch.full((3,), 9.0))
    assert e[0, 5] == e[1, 6] == e[2, 7] == 9
    weight = storage.as_strided((3, 16), (stride, 1))
    weight.copy_(case.weight[:3])
    got = kernels.target_logits(case.h, weight, torch.tensor([0, 1, 2]))
    expected = (case.h.double() * weight.double()).sum(-1)
    assert worst(got, expected)[0] <= 1e-5
