import math

import pytest
import torch

import rlsd.checks.validate
from rlsd.checks.validate import FEATURES, make_inputs, validate
from rlsd.policy.update import CONTRACT
from rlsd_kernels import available_impls, fused_linear_rlsd_loss

FINE = {"loss": 0.0, "log_probs": 0.0, "dh": 0.0, "dw": 0.0}
LIMITS = {"loss": 1e-5, "log_probs": 2e-5, "dh": 3e-5, "dw": 4e-5}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNNING = [
    (name, dtype)
    for dtype in CONTRACT
    for name, status in available_impls(torch.empty(0, dtype=dtype, device=DEVICE)).items()
    if status == "ok"
]
CASES = len(RUNNING) * len(FEATURES)


def run(monkeypatch, deviation):
    """(failures, lines) of validate() with this in place of the measured errors."""
    lines = []
    monkeypatch.setattr(
        rlsd.checks.validate, "make_inputs",
        lambda dtype, *_: {"hidden": torch.zeros(1, dtype=dtype)},
    )
    monkeypatch.setattr(rlsd.checks.validate, "deviation_from_ref", deviation)
    return validate(log=lines.append), lines


def rows(lines):
    return [line for line in lines if line.endswith(("  ok", "  FAILED"))]


def test_every_implementation_here_is_within_the_contract():
    lines = []
    assert validate(log=lines.append) == 0
    assert lines[-1] == "All within the contract."
    shown = rows(lines)
    assert len(shown) == CASES and {("torch", dtype) for dtype in CONTRACT} <= set(RUNNING)
    for impl, dtype in RUNNING:
        dtype = str(dtype).removeprefix("torch.")
        for name in FEATURES:
            assert sum(x.startswith(f"{impl:<8}{dtype:<10}{name} ") for x in shown) == 1
    # The table holds measured numbers: bf16 gradients are rounded, fp64 ones are not.
    error = {x[:44].rstrip(): float(x.split()[-3]) for x in shown}
    assert error["torch   bfloat16  plain"] > 1e-4 > 1e-12 > error["torch   float64   plain"]


def test_implementations_that_cannot_run_say_why(monkeypatch):
    _, lines = run(monkeypatch, lambda inputs, impl: (FINE, LIMITS))
    for name, status in available_impls().items():
        if status != "ok":
            assert f"{name:<8}not run: {status}" in lines
        elif (name, torch.float64) not in RUNNING:
            assert f"{name:<8}float64   not run: it computes in fp32" in "\n".join(lines)


@pytest.mark.parametrize("name", FINE)
@pytest.mark.parametrize("bad", [1.0, math.nan, math.inf])
def test_large_errors_are_counted(monkeypatch, name, bad):
    failures, lines = run(monkeypatch, lambda inputs, impl: (FINE | {name: bad}, LIMITS))
    assert failures == CASES
    assert all(x.endswith("FAILED") for x in rows(lines))
    assert lines[-1] == f"{failures} rows broke the contract."


def test_one_bad_dtype_of_one_implementation_is_counted(monkeypatch):
    def deviation(inputs, impl):
        bad = impl == "torch" and inputs["hidden"].dtype == torch.float16
        return FINE | {"dw": 0.01 if bad else 0.0}, LIMITS

    failures, lines = run(monkeypatch, deviation)
    assert failures == len(FEATURES)
    assert {x[:18].split()[1] for x in rows(lines) if x.endswith("FAILED")} == {"float16"}


@pytest.mark.parametrize("name", FINE)
def test_each_output_has_its_own_limit_and_the_worst_is_shown(monkeypatch, name):
    failures, lines = run(monkeypatch, lambda *_: (FINE | {name: LIMITS[name]}, LIMITS))
    assert failures == 0 and all(x.endswith("     100%  ok") for x in rows(lines))
    failures, _ = run(monkeypatch, lambda *_: (FINE | {name: 1.001 * LIMITS[name]}, LIMITS))
    assert failures == CASES


def test_large_logits_are_as_large_as_those_of_a_real_model():
    inputs = make_inputs(torch.float64, FEATURES["large logits"])
    logits = inputs["hidden"] @ inputs["weight"].T
    assert logits.abs().max().item() == pytest.approx(46)


@pytest.mark.parametrize("dtype", CONTRACT, ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_inputs_reach_every_path(name, dtype):
    inputs = make_inputs(dtype, FEATURES[name])
    a, weights = inputs["advantages"], inputs["loss_weights"]
    assert (a > 0).any() and (a < 0).any() and (a == 0).any() and (weights == 0).any()
    assert inputs["hidden"].dtype == inputs["weight"].dtype == dtype
    if name == "softcap, scale, bias":
        assert inputs["bias"].shape == (1003,) and inputs["bias"].dtype == dtype
    if name == "own teacher head":
        assert not torch.equal(inputs["teacher_weight"], inputs["weight"])
    out = fused_linear_rlsd_loss(impl="ref", **inputs)
    ratio = (out.log_probs - inputs["old_log_probs"]).exp()
    assert (ratio < 0.8).any() and (ratio > 1.28).any()  # both PPO clips bind
    delta = (out.teacher_log_probs - out.log_probs) * a.sign()
    for low, high in ((-math.inf, -0.22), (-0.22, 0.18), (0.18, math.inf)):
        assert ((delta > low) & (delta < high) & (a != 0)).any()  # clipped low, not, high


def test_inputs_repeat_with_their_seed():
    a, b, c = (make_inputs(torch.float32, {}, seed=s) for s in (0, 0, 1))
    for name in ("hidden", "completion_ids", "advantages"):
        assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name]), name
