"""linear_distillation_loss on bad arguments: one sentence each."""

import math

import pytest
import torch

from rlsd_kernels import linear_distillation_loss

N, V, H = 6, 11, 4
ONES, WEIGHT = torch.ones(N, H), torch.ones(V, H)
INF, NAN = torch.full((V,), -math.inf), torch.full((N, H), math.nan)
ERRORS = [
    ({"hidden": [1.0]}, TypeError, r"^hidden must be a torch.Tensor, but got list"),
    ({"hidden": torch.ones(H)}, ValueError, r"^hidden must have shape \(..., H\).*got \(4,\)"),
    ({"hidden": ONES.long()}, TypeError, r"^hidden must have a float dtype"),
    ({"weight": None}, TypeError, r"^weight must be a torch.Tensor, but got NoneType"),
    ({"weight": torch.ones(V, 5)}, ValueError, r"^weight must have shape \(V, 4\).*\(11, 5\)"),
    ({"weight": WEIGHT.bfloat16()}, ValueError, r"^weight is torch.bfloat16 but hidden is"),
    ({"weight": WEIGHT.to("meta")}, ValueError, r"^weight is on meta but hidden is on cpu"),
    ({"teacher_hidden": None}, TypeError, r"^teacher_hidden must be a torch.Tensor"),
    ({"teacher_hidden": ONES[:2]}, ValueError, r"^teacher_hidden must have leading shape \(6,\)"),
    ({"teacher_hidden": torch.ones(N, 3)}, ValueError, r"^weight must have shape \(V, 3\)"),
    ({"teacher_hidden": ONES.double()}, ValueError, r"^weight is torch.float32 but teacher_hid"),
    ({"teacher_hidden": ONES.to("meta")}, ValueError, r"^teacher_hidden is on meta"),
    ({"teacher_weight": torch.ones(V, 3)}, ValueError, r"^teacher_weight must have shape"),
    ({"teacher_weight": torch.ones(V + 1, H)}, ValueError,
     r"^teacher_weight has 12 rows but weight has 11; .* one vocabulary"),
    ({"teacher_weight": WEIGHT.to("meta")}, ValueError, r"^teacher_weight is on meta"),
    ({"teacher_bias": torch.ones(V)}, ValueError, r"^teacher_bias is given without teacher_wei"),
    ({"teacher_weight": WEIGHT, "teacher_bias": torch.ones(3)}, ValueError,
     r"^teacher_bias must have shape \(11,\) \(V,\), but got \(3,\)"),
    ({"bias": torch.ones(3)}, ValueError, r"^bias must have shape \(11,\)"),
    ({"bias": 1.0}, TypeError, r"^bias must be a torch.Tensor"),
    ({"loss_weights": torch.ones(2)}, ValueError, r"^loss_weights must have shape \(6,\)"),
    ({"loss_weights": torch.ones(N).bool()}, TypeError, r"^loss_weights must have a float dtype"),
    ({"divergence": "kl"}, ValueError, r"^divergence must be one of forward_kl, .*got 'kl'"),
    ({"alpha": 0.0}, ValueError, r"^alpha must lie strictly .*forward_kl.*reverse_kl"),
    ({"alpha": 1}, ValueError, r"^alpha must lie strictly between 0 and 1 .*vanishes at 1"),
    ({"alpha": 1.5}, ValueError, r"^alpha must be a finite number in \[0, 1\]"),
    ({"alpha": torch.ones(())}, ValueError, r"^alpha must be a finite number"),
    ({"temperature": 0.0}, ValueError, r"^temperature must be a finite number in \(0"),
    ({"logit_scale": math.nan}, ValueError, r"^logit_scale must be a finite number"),
    ({"final_logit_softcapping": 0.0}, ValueError, r"^final_logit_softcapping must be a finite"),
    ({"max_workspace_bytes": 0}, ValueError, r"^max_workspace_bytes must be a finite number in"),
    ({"max_workspace_bytes": 1e6}, TypeError, r"^max_workspace_bytes must be an int or None"),
    ({"max_workspace_bytes": True}, TypeError, r"^max_workspace_bytes must be an int or None"),
    ({"tp_group": object()}, TypeError, r"^tp_group must be a torch.distributed.ProcessGroup"),
    ({"impl": "numpy"}, ValueError, r"^impl must be one of auto, cuda, triton, torch, ref, but"),
    ({"impl": "cuda"}, ValueError, r"^impl='cuda' cannot run: linear_distillation_loss has no"),
    ({"hidden": NAN, "check_inputs": True}, ValueError, r"^hidden has non-finite values"),
    ({"bias": INF, "check_inputs": True}, ValueError, r"^bias has non-finite values"),
    ({"teacher_hidden": NAN, "check_inputs": True}, ValueError, r"^teacher_hidden has non-finite"),
    ({"loss_weights": NAN[:, 0], "check_inputs": True}, ValueError, r"^loss_weights has non-fin"),
]


def call(**changes):
    inputs = {"hidden": ONES, "weight": WEIGHT, "teacher_hidden": ONES}
    return linear_distillation_loss(**(inputs | changes))


@pytest.mark.parametrize(
    "changes, kind, message", ERRORS, ids=[f"{next(iter(e[0]))}-{e[2][1:25]}" for e in ERRORS]
)
def test_error_sentences(changes, kind, message):
    with pytest.raises(kind, match=message) as error:
        call(**changes)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_valid_calls():
    assert call() == call(check_inputs=True) == 0
    for divergence in ("forward_kl", "reverse_kl"):  # alpha is not read
        assert call(divergence=divergence, alpha=0.0) == call(divergence=divergence, alpha=1) == 0


def test_dtensors_are_refused():
    import torch.distributed as dist
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(WEIGHT, init_device_mesh("cpu", (1,)))
        for name in ("weight", "teacher_weight"):
            with pytest.raises(TypeError, match=rf"^{name} is a DTensor.*full_tensor\(\)"):
                call(**{name: sharded})
    finally:
        dist.destroy_process_group()
