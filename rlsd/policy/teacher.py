"""The privileged teacher: the same model at another time, shown the hint.

live: today's weights. base: the weights at the start. snapshot: a hard copy after the optimizer
step of every step s with s % teacher_sync_steps == 0. ema: a running mean after every step, held
in fp32 because a bf16 mean stalls (1e-3 of shift moved 1.1e-4 in 200 steps at rate 0.05).

Under LoRA base is the model without its adapter, and snapshot and ema are a second adapter:
megabytes instead of a second model.
"""

import contextlib
import copy

import torch

from ..config import UserError
from . import checkpoint
from .distributed import placed
from .models import (
    STUDENT,
    TEACHER,
    adapter_weights,
    add_teacher_adapter,
    has_lora,
    head_of,
    open_forward,
    require_layout,
    using_adapter,
)


class Teacher:
    """Weights that score responses in the privileged context; `scoring` gives what to run.

    shard(model): spreads a copy of the student over the processes of the run.
    """

    def __init__(self, student, kind, *, sync_steps=10, ema_rate=0.05, shard=lambda model: model):
        self.kind, self.sync_steps, self.ema_rate = kind, sync_steps, ema_rate
        self.student, self.mean = student, None
        self.lora = kind != "live" and has_lora(student)
        self.model = student if kind == "live" or self.lora else shard(frozen_copy(student))
        if self.lora and kind != "base":
            add_teacher_adapter(student)
        elif kind == "ema":
            self.mean = [p.detach().float().clone() for p in self.model.parameters()]

    def scoring(self):
        """Context manager: the model to run forward as the teacher."""
        if not self.lora:
            return contextlib.nullcontext(self.model)
        return using_adapter(self.student, None if self.kind == "base" else TEACHER)

    @torch.no_grad()
    def after_step(self, step):
        """Follow the student after the optimizer step of 1-based rollout step `step`."""
        if self.kind == "snapshot" and step % self.sync_steps == 0:
            if self.lora:
                for own, p in self._adapters():
                    own.copy_(p)
            else:
                copy_weights(self.student, self.model)
        elif self.kind == "ema" and self.lora:
            for own, p in self._adapters():  # adapters are fp32: their own mean
                own.lerp_(p, self.ema_rate)
        elif self.kind == "ema":
            for mean, own, p in zip(
                self.mean, self.model.parameters(), self.student.parameters(), strict=True
            ):
                mean.lerp_(p.float(), self.ema_rate)
                own.copy_(mean)

    def _adapters(self):
        """(teacher's, student's) weights of every adapter."""
        student = adapter_weights(self.student, STUDENT)
        return [(own, student[name]) for name, own in self._adapter().items()]

    def _adapter(self):
        return {} if self.kind == "base" else adapter_weights(self.student, TEACHER)

    @contextlib.contextmanager
    def lent_to(self, model):
        """`model`, which holds the student's parameters, has the teacher's and is in eval mode."""
        pairs = []
        if self.kind != "live":
            pairs = list(zip(self.student.parameters(), self.model.parameters(), strict=True))
        training = model.training
        for own, lent in pairs:
            own.data, lent.data = lent.data, own.data
        model.eval()
        try:
            yield
        finally:
            model.train(training)
            for own, lent in pairs:
                own.data, lent.data = lent.data, own.data

    def state_dict(self):
        """Everything a resumed run needs; empty for live."""
        if self.kind == "live":
            return {}
        if self.lora:
            return {"adapter": {name: p.detach() for name, p in self._adapter().items()}}
        return {"model": self.model.state_dict(), "mean": self.mean}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Inverse of state_dict, strict about missing or unexpected weights."""
        if self.kind == "live":
            return
        if self.lora:
            own = self._adapter()
            if own.keys() != state["adapter"].keys():
                raise RuntimeError("its teacher's adapter has other layers")
            for name, p in own.items():
                p.copy_(placed(state["adapter"][name], p))
            return
        now = self.model.state_dict()
        self.model.load_state_dict({
            name: placed(w, now.get(name)) for name, w in state["model"].items()
        })
        if self.kind == "ema":
            for mean, saved in zip(self.mean, state["mean"], strict=True):
                mean.copy_(placed(saved, mean))


def teacher_of(config, policy, tokenizer, shard=lambda model: model):
    """The Teacher of a run, None where its objective reads none."""
    method = config.method
    if method.teacher_reads == "question":
        return external_teacher(config, policy, tokenizer)
    if not method.distils and config.loss_config().rlsd_lambda == 0:
        return None
    return Teacher(
        policy.model, config.teacher_model_kind, sync_steps=config.teacher_sync_steps,
        ema_rate=config.teacher_ema_rate, shard=shard,
    )


def external_teacher(config, policy, tokenizer):
    """A Teacher of other weights than the student's; it never changes.

    Raises UserError in a sentence where it does not load or does not speak the student's tokens.
    """
    path = config.teacher_model_name_or_path
    require_same_vocabulary(path, tokenizer)
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    model = checkpoint.load_model(
        path, config.device, dtype=dtype, attn_implementation=config.attn_implementation
    ).requires_grad_(False)
    student, own = policy.model, head_of(model)
    rows = [len(m.get_output_embeddings().weight) for m in (model, student)]
    if rows[0] != rows[1]:
        raise UserError(
            f"The teacher {path} has {rows[0]} rows in its head, the student {rows[1]}, so their "
            "distributions cannot be compared; choose a teacher of the same family."
        )
    if own != policy.head:
        raise UserError(
            f"The teacher {path} has a head with {own}, the student one with {policy.head}; the "
            "fused divergence takes one scale and softcap for both."
        )
    require_layout(model, policy.layout)
    open_forward(model)
    return Teacher(model, "live")  # as it is, no copy: its own weights stay where they are


def require_same_vocabulary(path, tokenizer):
    """Every token of the student must be the teacher's under the same id."""
    theirs, ours = checkpoint.load_tokenizer(path).get_vocab(), tokenizer.get_vocab()
    if theirs != ours:
        other = min(set(ours.items()) ^ set(theirs.items()), key=lambda pair: pair[1])
        raise UserError(
            f"The teacher {path} has another vocabulary than the student ({len(theirs)} tokens "
            f"against {len(ours)}, first difference at id {other[1]}), so their distributions "
            "cannot be compared; choose a teacher of the same family."
        )


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
