"""Tiny runs of TRL's trainers, recorded, and RLSD by hook A in plain PyTorch to compare with."""

import copy
import warnings

import torch
import transformers
import trl
from accelerate.utils import is_peft_model
from datasets import Dataset
from packaging.version import Version
from runs import TEMPLATE, naive_log_probs, problems, save_tiny, sum_reward
from transformers import TrainerCallback
from trl import GRPOTrainer

from rlsd.integrations.trl import RLSDConfig
from rlsd.policy.checkpoint import load_tokenizer

DATA = problems(12)
OFF = {"rlsd_lambda": 0.0}
HEAD_OF_TRL = Version(trl.__version__) >= Version("1.15")  # before, its passes make the logits
ACCUMULATION = {
    "whole": {},
    "accumulated": {"gradient_accumulation_steps": 3},
    # Rollouts of 4 micro-batches for 2 optimizer steps, read twice: old log-probs, ratios off 1.
    # The third step is the first of the second reading.
    "reused": {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2,
               "max_steps": 3},
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 4,
       "router_aux_loss_coef": 0.5, "decoder_sparse_step": 1}


def tiny(name, **config):
    """A tiny model of another architecture over the same vocabulary, sharpened."""
    torch.manual_seed(5)
    sizes = {
        "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4, "intermediate_size": 32, "max_position_embeddings": 128,
        "pad_token_id": 0, "eos_token_id": [1, *range(8, 20)], "bos_token_id": None,
    }
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**{**sizes, **config})
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p *= 5
            elif "lm_head" in str(p.shape):
                p.normal_()
    return model


class Recorder(TrainerCallback):
    """Losses of micro-batches, gradients of optimizer steps and completions of a run."""

    def __init__(self, trainer):
        self.losses, self.gradients, self.completions = [], [], []
        compute = trainer._compute_loss

        def recorded(model, inputs):
            loss = compute(model, inputs)
            self.losses.append(loss.item())
            self.completions.append(inputs["completion_ids"])
            return loss

        trainer._compute_loss = recorded
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        })


def make(cls, folder, *, model=None, reward=sum_reward, data=None, more=None, **changed):
    """A trainer with its recorder; `more` are arguments of the trainer, the rest of its config."""
    if not (folder / "model").exists():
        save_tiny(folder / "model")
    args = RLSDConfig(**{
        "output_dir": str(folder / "run"), "use_cpu": True, "bf16": False, "report_to": "none",
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6,
        "max_steps": 2, "logging_steps": 1, "learning_rate": 0.05, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "save_strategy": "no",
        "gradient_checkpointing": False, "disable_tqdm": True, "privileged_template": TEMPLATE,
        **changed,
    })
    # TRL keeps what it patches on the model: every trainer gets its own.
    model = copy.deepcopy(model) if model is not None else str(folder / "model")
    torch.manual_seed(args.seed)  # an adapter is drawn at random; TRL seeds before from 1.15 on
    more = {"processing_class": load_tokenizer(str(folder / "model")), **(more or {})}
    trainer = cls(model, reward, args, Dataset.from_list(DATA if data is None else data), **more)
    return trainer, Recorder(trainer)


def run(cls, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer, recorder = make(cls, folder, **options)
        trainer.train()
    return trainer, recorder


def differences(got, want):
    """(largest |loss difference|, largest relative Frobenius distance of a step's gradient)."""
    assert len(got.losses) == len(want.losses) > 0
    assert len(got.gradients) == len(want.gradients) > 0
    for ours, theirs in zip(got.completions, want.completions, strict=True):
        assert torch.equal(ours, theirs), "the runs sampled differently"
    loss = max(abs(a - b) for a, b in zip(got.losses, want.losses, strict=True))
    worst = 0.0
    for ours, theirs in zip(got.gradients, want.gradients, strict=True):
        assert ours.keys() == theirs.keys()
        error = sum((ours[n] - theirs[n]).double().square().sum() for n in theirs)
        size = sum(theirs[n].double().square().sum() for n in theirs)
        worst = max(worst, (error / size).sqrt().item())
    assert worst == worst and any(x != 0 for x in want.losses)
    return loss, worst


def log_probs_of(model, prompts, ids, mask, config):
    """(B, T) plain log-probs, one unpadded sequence at a time, 0 where masked."""
    out = torch.zeros(ids.shape)
    training = model.training
    model.eval()
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            y = ids[i][mask[i].bool()].tolist()
            if y:
                out[i, : len(y)] = naive_log_probs(model, prompt, y, config)
    model.train(training)
    return out


class PlainHookA(GRPOTrainer):
    """A_hat of the method, section 1, in plain PyTorch, handed to TRL's own loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rollouts, self.teacher = 0, copy.deepcopy(self.model)
        base = self.teacher.get_base_model() if is_peft_model(self.teacher) else self.teacher
        vars(base).pop("forward", None)  # the patch of TRL from 1.15 on is bound to the student

    def _follow(self):
        for own, new in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            if self.args.teacher_model_kind == "ema":
                own.data += self.args.teacher_ema_rate * (new.data - own.data)
            elif self.args.teacher_model_kind == "snapshot" and (
                self.rollouts % self.args.teacher_sync_steps == 0
            ):
                own.data.copy_(new.data)

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        if self.rollouts:
            self._follow()
        self.rollouts += 1
        ids = [self._tokenizer(row["prompt"])["input_ids"] for row in inputs]
        out["questions"] = ids
        out["hinted"] = [
            self._tokenizer(f"<h> {row['solution']} {row['prompt']}")["input_ids"]
            for row in inputs
        ]
        return out

    def _compute_loss(self, model, inputs):
        args, ids, mask = self.args, inputs["completion_ids"], inputs["completion_mask"]
        a = inputs["advantages"].view(len(ids), -1)
        lam = args.rlsd_lambda * max(1 - self.rollouts / args.rlsd_lambda_decay_steps, 0)
        teacher = self.model if args.teacher_model_kind == "live" else self.teacher
        hinted = log_probs_of(teacher, inputs["hinted"], ids, mask, args)
        student = log_probs_of(self.model, inputs["questions"], ids, mask, args)
        if args.rlsd_delta_source == "old_log_probs" and "old_per_token_logps" in inputs:
            student = inputs["old_per_token_logps"]
        eps = args.rlsd_reweight_clip_range
        w = torch.exp(a.sign() * (hinted - student)).clamp(1 - eps, 1 + eps)
        if args.rlsd_negative_only:
            w = torch.where(a < 0, w, 1)
        a_hat = torch.where(mask.bool(), a * ((1 - lam) + lam * w), 0)
        return super()._compute_loss(model, {**inputs, "advantages": a_hat})
