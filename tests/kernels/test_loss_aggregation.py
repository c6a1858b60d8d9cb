"""Loss weights: TRL's aggregations, their errors, and micro-batches that add up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import make_problem, run_fused

from rlsd_kernels import RLSDLossConfig, aggregation_weights, rlsd_loss


def test_default_loss_weights_are_the_token_mean():
    a = torch.randn(3, 5)
    out = rlsd_loss(torch.zeros(3, 5), a, teacher_log_probs=None, rlsd_lambda=0.0)
    torch.testing.assert_close(out.loss, -a.mean())
    assert out.teacher_log_probs is None


def trl_loss(per_token_loss, mask, loss_type, num_items, max_completion_length):
    """GRPOTrainer._compute_loss, the lines that aggregate (one process)."""
    if loss_type == "grpo":
        return ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if loss_type == "bnpo":
        return (per_token_loss * mask).sum() / mask.sum().clamp(min=1.0)
    if loss_type == "dr_grpo":
        return (per_token_loss * mask).sum() / (per_token_loss.size(0) * max_completion_length)
    return (per_token_loss * mask).sum() / num_items


LOSS_TYPES = ["grpo", "bnpo", "dapo", "dr_grpo"]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.sampled_from(LOSS_TYPES), st.data())
def test_aggregation_weights_are_trls(loss_type, data):
    rows, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    bits = data.draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width))
    mask = torch.tensor(bits).reshape(rows, width)
    items = data.draw(st.integers(1, 1000))
    per_token = torch.randn(rows, width)
    for m in (mask, mask.int(), mask.float()):
        a_t = aggregation_weights(
            m, loss_type, num_items_in_batch=items, max_completion_length=width + 3
        )
        expected = trl_loss(per_token, mask.float(), loss_type, items, width + 3)
        torch.testing.assert_close((a_t * per_token).sum(), expected)
        assert a_t.dtype == torch.float32 and (a_t[~mask] == 0).all() and a_t.shape == mask.shape


def test_aggregation_defaults():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert torch.equal(aggregation_weights(mask), mask / 3)
    items = torch.tensor(6)
    assert torch.equal(aggregation_weights(mask, num_items_in_batch=items), mask / 6)
    assert not aggregation_weights(mask & False, "grpo").any()
    assert aggregation_weights(torch.zeros(0, 5), "grpo").shape == (0, 5)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((torch.ones(3),), {}, r"^mask must be a tensor of shape \(B, T\), but got \(3,\)"),
        (([[1]],), {}, r"^mask must be a tensor of shape \(B, T\), but got list"),
        ((torch.ones(2, 2), "mean"), {}, r"^loss_type must be one of grpo, bnpo, dapo, dr_grpo"),
        ((torch.ones(2, 2), "dr_grpo"), {}, r"^loss_type='dr_grpo' needs max_completion_length"),
        ((torch.ones(2, 2), "dr_grpo"), {"max_completion_length": 0}, "^max_completion"),
        ((torch.ones(2, 2),), {"num_items_in_batch": 0}, r"^num_items_in_batch must be positive"),
        # would broadcast over tokens, or over sequences
        ((torch.ones(2, 2),), {"num_items_in_batch": torch.ones(2)}, r"^num_.* element.*\(2,\)\.$"),
        ((torch.ones(2, 2),), {"num_items_in_batch": torch.ones(2, 1)}, r"^num_.*\(2, 1\)\.$"),
        ((torch.ones(2, 2), "dr_grpo"), {"max_completion_length": torch.ones(2)}, r"one element"),
    ],
)
def test_aggregation_errors(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        aggregation_weights(*args, **kwargs)


# Trap 12: uneven micro-batches of sequences, one of them fully masked.
@pytest.mark.parametrize("impl", ["torch", "ref"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradient_do_not_depend_on_micro_batches(loss_type, impl):
    p = make_problem(48, 51, 8, torch.float64)
    p = {k: v if k == "weight" else v.reshape(8, 6, *v.shape[1:]) for k, v in p.items()}
    p["advantages"] = p["advantages"][:, 0]
    mask = torch.arange(6) < torch.tensor([6, 1, 3, 0, 0, 5, 2, 6])[:, None]
    p["loss_weights"] = aggregation_weights(
        mask, loss_type, num_items_in_batch=37, max_completion_length=9
    ).double()
    config = RLSDLossConfig(beta=0.1, entropy_coef=0.05)
    whole = run_fused(p, impl, config=config)
    parts = [
        run_fused({k: v if k == "weight" else v[rows] for k, v in p.items()}, impl, config=config)
        for rows in (slice(0, 3), slice(3, 5), slice(5, 8))
    ]
    for name in ("loss", "d_weight"):
        torch.testing.assert_close(sum(q[name] for q in parts), whole[name], rtol=1e-12, atol=1e-15)
    for name in ("d_hidden", "log_probs", "teacher_log_probs"):
        torch.testing.assert_close(
            torch.cat([q[name] for q in parts]), whole[name], rtol=1e-12, atol=1e-15
        )
    assert whole["d_weight"].abs().max() > 1e-3 and not parts[1]["d_weight"].any()
