"""The token weight against the published formulas: the authors' and ms-swift's, in plain PyTorch.

Both are written from the method's section 1 as those projects compute it: clamp after exp, a mix
as a product, the student either of this forward (authors) or of the sampling policy (ms-swift).
"""

import pytest
import torch

from rlsd_kernels import (
    RLSDLossConfig,
    fused_linear_rlsd_loss,
    rlsd_advantages,
    rlsd_loss,
)

B, T, H, V = 6, 9, 16, 61


def authors_weights(advantages, log_probs, teacher_log_probs, eps_w):
    """w = clamp(exp(sign(A) (log P_T - log P_S)), 1 - eps_w, 1 + eps_w), P_S this forward."""
    delta = (teacher_log_probs - log_probs).detach()
    return torch.exp(torch.sign(advantages) * delta).clamp(min=1 - eps_w, max=1 + eps_w)


def ms_swift_advantages(advantages, old_log_probs, teacher_log_probs, lam, eps_w):
    """A ((1 - lambda) + lambda w), with P_S the policy that sampled."""
    delta = teacher_log_probs - old_log_probs
    ratio = torch.where(advantages >= 0, torch.exp(delta), torch.exp(-delta))
    return advantages * (1 - lam + lam * torch.clamp(ratio, 1 - eps_w, 1 + eps_w))


@pytest.fixture
def x():
    torch.manual_seed(0)
    hidden = torch.randn(B, T, H, dtype=torch.float64)
    weight = torch.randn(V, H, dtype=torch.float64) * 0.3
    ids = torch.randint(0, V, (B, T))
    log_probs = (hidden @ weight.T).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    return {
        "hidden": hidden, "weight": weight, "ids": ids, "log_probs": log_probs,
        "teacher": log_probs + 0.5 * torch.randn(B, T, dtype=torch.float64),
        "old": log_probs + 0.3 * torch.randn(B, T, dtype=torch.float64),
        "a": torch.tensor([1.3, -0.8, 0.0, 0.2, -2.0, 0.6], dtype=torch.float64),
        "mask": torch.arange(T) < torch.tensor([[9], [4], [9], [1], [7], [9]]),
    }


SETTINGS = pytest.mark.parametrize("lam, eps_w", [(0.5, 0.2), (1.0, 1.0), (0.1, 0.05), (0.0, 0.2)])


def mixed(x, lam, eps_w):
    a = x["a"][:, None].expand(B, T)
    return a * ((1 - lam) + lam * authors_weights(a, x["log_probs"], x["teacher"], eps_w))


@SETTINGS
def test_advantages_are_the_authors(x, lam, eps_w):
    got = rlsd_advantages(
        x["a"], x["log_probs"], x["teacher"], rlsd_lambda=lam, rlsd_reweight_clip_range=eps_w
    )
    torch.testing.assert_close(got, mixed(x, lam, eps_w), rtol=1e-12, atol=0)


@SETTINGS
def test_advantages_are_ms_swifts(x, lam, eps_w):
    got = rlsd_advantages(
        x["a"], x["old"], x["teacher"], rlsd_lambda=lam, rlsd_reweight_clip_range=eps_w
    )
    want = ms_swift_advantages(x["a"][:, None], x["old"], x["teacher"], lam, eps_w)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def surrogate(x, log_probs, a_hat):
    """PPO with dual clip on A_hat, token mean: TRL's and the authors' policy loss."""
    rho = (log_probs - x["old"]).exp()
    loss = -torch.min(rho * a_hat, rho.clamp(0.8, 1.28) * a_hat)
    loss = torch.where(a_hat < 0, torch.min(loss, -3.0 * a_hat), loss)
    return (loss * x["mask"]).sum() / x["mask"].sum()


@SETTINGS
@pytest.mark.parametrize("source", ["current", "old_log_probs"], ids=["authors", "ms-swift"])
def test_losses_on_them(x, source, lam, eps_w):
    """The whole loss and its gradient, from log-probs and from hidden states."""
    x["old"][0, 0] = x["log_probs"][0, 0] - 2  # a ratio beyond the dual clip
    x["old"][1, 0] = x["log_probs"][1, 0] - 2
    if source == "current":
        a_hat = mixed(x, lam, eps_w)
    else:
        a_hat = ms_swift_advantages(x["a"][:, None], x["old"], x["teacher"], lam, eps_w)
    log_probs = x["log_probs"].clone().requires_grad_()
    want = surrogate(x, log_probs, a_hat)
    (want_grad,) = torch.autograd.grad(want, log_probs)
    shared = {
        "teacher_log_probs": x["teacher"], "old_log_probs": x["old"],
        "loss_weights": x["mask"].double() / x["mask"].sum(),
        "config": RLSDLossConfig(lam, eps_w, source),
    }
    got = rlsd_loss(log_probs, x["a"], **shared).loss
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    (grad,) = torch.autograd.grad(got, log_probs)
    torch.testing.assert_close(grad, want_grad, rtol=1e-11, atol=1e-14)

    hidden = x["hidden"].clone().requires_grad_()
    plain = (hidden @ x["weight"].T).log_softmax(-1).gather(-1, x["ids"][..., None]).squeeze(-1)
    (want_grad,) = torch.autograd.grad(surrogate(x, plain, a_hat), hidden)
    got = fused_linear_rlsd_loss(hidden, x["weight"], x["ids"], x["a"], **shared).loss
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    (grad,) = torch.autograd.grad(got, hidden)
    torch.testing.assert_close(grad, want_grad, rtol=1e-8, atol=1e-11)
