"""The truth that large GPU tests rest on is the specification's."""

import pytest
import torch
from problems import cast, chunked_reference, make_problem, run_fused

from rlsd_kernels import RLSDLossConfig

CASES = {
    "plain": ({}, {}, False),
    "all": (
        {"beta": 0.1, "entropy_coef": 0.05, "temperature": 0.7, "rlsd_negative_only": True},
        {"logit_scale": 0.4, "final_logit_softcapping": 3.0, "return_entropy": True}, True,
    ),
}


@pytest.mark.parametrize("teacher_h", [None, 6], ids=["same-head", "own-head"])
@pytest.mark.parametrize("case", CASES)
def test_chunked_reference_is_the_reference(case, teacher_h):
    loss, call, with_bias = CASES[case]
    p = make_problem(23, 57, 8, torch.bfloat16, teacher_h=teacher_h)
    if with_bias:
        p["bias"] = torch.randn(57).bfloat16()
    options = {"config": RLSDLossConfig(**loss), **call}
    got = chunked_reference(p, rows=5, **options)
    want = run_fused(cast(p, torch.float64), "ref", **options)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-14, msg=name)
