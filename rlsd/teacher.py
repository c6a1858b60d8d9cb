"""The privileged teacher: the same model at another time, shown the hint.

live: today's weights. base: the weights at the start. snapshot: a hard copy after the optimizer
step of every step s with s % teacher_sync_steps == 0. ema: a running mean after every step, held
in fp32 because a bf16 mean stalls (1e-3 of shift moved 1.1e-4 in 200 steps at rate 0.05).
"""

import copy

import torch


class Teacher:
    """Weights that score responses in the privileged context; `model` is what to run forward."""

    def __init__(self, student, kind, *, sync_steps=10, ema_rate=0.05):
        self.kind, self.sync_steps, self.ema_rate = kind, sync_steps, ema_rate
        self.student = student
        self.model = student if kind == "live" else frozen_copy(student)
        self.mean = None
        if kind == "ema":
            self.mean = [p.detach().float().clone() for p in student.parameters()]

    @torch.no_grad()
    def after_step(self, step):
        """Follow the student after the optimizer step of 1-based rollout step `step`."""
        if self.kind == "snapshot" and step % self.sync_steps == 0:
            copy_weights(self.student, self.model)
        elif self.kind == "ema":
            for mean, own, p in zip(
                self.mean, self.model.parameters(), self.student.parameters(), strict=True
            ):
                mean.lerp_(p.float(), self.ema_rate)
                own.copy_(mean)

    def state_dict(self):
        """Everything a resumed run needs; empty for live."""
        if self.kind == "live":
            return {}
        return {"model": self.model.state_dict(), "mean": self.mean}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Inverse of state_dict, strict about missing or unexpected weights."""
        if self.kind == "live":
            return
        self.model.load_state_dict(state["model"])
        if self.kind == "ema":
            for mean, saved in zip(self.mean, state["mean"], strict=True):
                mean.copy_(saved)


def frozen_copy(model):
    """A copy without gradients, in eval mode."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def copy_weights(source, target):
    """Every parameter and buffer of target becomes source's, sharded or not."""
    for kind in ("named_parameters", "named_buffers"):
        new = dict(getattr(source, kind)())
        for name, tensor in getattr(target, kind)():
            tensor.copy_(new[name])
