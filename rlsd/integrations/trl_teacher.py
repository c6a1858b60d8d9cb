"""The privileged teacher of RLSDTrainer: what it reads, when it scores, where it is saved.

It reads the student's prompt with a hint inserted, tokenised by TRL, and then the very tokens of
the rollout.
"""

import os

import torch
from datasets import IterableDataset
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from ..config import UserError
from ..policy.advantages import rlsd_lambda_at
from ..policy.packing import left_pad
from ..policy.teacher import Teacher
from ..tasks.prompts import teacher_prompt

HINT_COLUMNS = ("teacher_prompt", "privileged_context", "solution")
CONTEXT = ("teacher_prompt_ids", "teacher_prompt_mask", "completion_ids", "completion_mask")
TEACHER_FILE = "rlsd_teacher.pt"


class _FollowStudent(TrainerCallback):
    """Lets the teacher follow after the optimizer step that ends a rollout."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        done = self.trainer.rollouts_done(state.global_step)
        if done > self.trainer.rollouts_done(state.global_step - 1):
            self.trainer.teacher.after_step(done)


class TaughtTrainer(GRPOTrainer):
    """GRPOTrainer beside a privileged teacher of the policy; RLSDTrainer adds passes and loss."""

    teacher = None

    def _add_teacher(self):
        args = self.args
        self._require_teachable(args)
        # Only what is trained is copied, an adapter say; the model borrows it for its pass.
        trained = torch.nn.ParameterList(p for p in self.model.parameters() if p.requires_grad)
        rates = {"sync_steps": args.teacher_sync_steps, "ema_rate": args.teacher_ema_rate}
        self.teacher = Teacher(trained, args.teacher_model_kind, **rates)
        self.add_callback(_FollowStudent(self))

    def _require_teachable(self, args):
        """Refuse, before the first step, what would leave the teacher blind or wrong."""
        data = self.train_dataset
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        for applies, what in (
            (self.rollout_func is not None, "the teacher cannot see what rollout_func prompts"),
            (self.environment_factories, "the teacher cannot see what environment_factory adds"),
            (self._is_vlm, "the teacher takes no images, but processing_class is a processor"),
            (sharded and args.teacher_model_kind != "live", "FSDP and DeepSpeed shard the weights "
             f"of which teacher_model_kind={args.teacher_model_kind!r} keeps a copy; use 'live'"),
            (data.column_names is not None and not set(HINT_COLUMNS) & set(data.column_names),
             f"train_dataset has none of the columns {', '.join(HINT_COLUMNS)}, so the teacher "
             "would know no more than the student; add one"),
        ):
            if applies:
                raise UserError(f"{what[0].upper()}{what[1:]}, or set rlsd_lambda to 0.")
        if not isinstance(data, IterableDataset):
            present = [c for c in data.column_names if c in ("prompt", *HINT_COLUMNS)]
            for i, row in enumerate(data.select_columns(present)):
                self._teacher_prompt(row, f"Row {i} of train_dataset", check_start=i == 0)

    def rollouts_done(self, global_step):
        """Rollouts completed after so many optimizer steps; a resumed run counts on from them."""
        accumulation = self.args.gradient_accumulation_steps
        every = self.args.steps_per_generation * self.num_iterations  # micro-batches per rollout
        return global_step * accumulation // max(every, accumulation)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [c for c in HINT_COLUMNS if c not in self._signature_columns]

    def _teacher_prompt(self, row, name, *, check_start=True):
        """What the teacher reads for a row, or None where a hint may be missing."""
        if "privileged_context" not in row:
            row = {**row, "privileged_context": row.get("solution")}
        return teacher_prompt(
            row, name, self._tokenizer, self.args.privileged_template, check_start=check_start,
            allow_missing=self.args.allow_missing_privileged_context,
            template_options={"tools": self.tools or None, "chat_template": self.chat_template,
                              **self.chat_template_kwargs},
        )

    def _calculate_rewards(self, *args):
        rewards = super()._calculate_rewards(*args)
        if self.model.training:
            total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
            groups = total.view(-1, self.num_generations)
            constant = (groups == groups[:, :1]).all(1).repeat_interleave(self.num_generations)
            parts = constant.chunk(self.accelerator.num_processes)
            self._constant = parts[self.accelerator.process_index]
        return rewards

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.teacher is None or not self.model.training:
            return output
        if self.multi_objective_aggregation == "sum_then_normalize":
            # TRL's fp32 mean of equal rewards is not always theirs: eight of 0.9 give A = -6e-4.
            output["advantages"] = output["advantages"].masked_fill(self._constant, 0)
        args, step = self.args, self.rollouts_done(self.state.global_step) + 1
        lam = rlsd_lambda_at(
            step, args.rlsd_lambda, args.rlsd_lambda_warmup_steps, args.rlsd_lambda_decay_steps
        )
        output["rlsd_lambda"] = torch.tensor(lam, dtype=torch.float64)
        if lam > 0:
            name = "The row of train_dataset with the prompt {!r:.80}"
            prompts = [self._teacher_prompt(x, name.format(x["prompt"])) for x in inputs]
            output["has_hint"] = torch.tensor([p is not None for p in prompts])
            prompts = [p or x["prompt"] for p, x in zip(prompts, inputs, strict=True)]
            output["teacher_prompt_ids"], output["teacher_prompt_mask"] = left_pad(
                self._tokenize_prompts(prompts)[0], self._tokenizer.pad_token_id,
                output["completion_ids"].device,
            )
        return output

    @torch.no_grad()
    def _teacher_log_probs(self, inputs):
        """(B, T) log-probs after the privileged prompts, 0 where no token is re-weighted."""
        if "teacher_log_probs" in inputs:
            return inputs["teacher_log_probs"]
        ids, advantages = inputs["completion_ids"], inputs["advantages"]
        need = advantages < 0 if self.args.rlsd_negative_only else advantages != 0
        need = need.view(len(ids), -1).any(1)
        need = need & inputs["has_hint"].to(need.device) & inputs["completion_mask"].any(1)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            need = torch.ones_like(need)  # every rank must run forward, which gathers weights
        log_probs = torch.zeros(ids.shape, device=ids.device)
        if need.any():
            context = [inputs[name][need] for name in CONTEXT]
            with self.teacher.lent_to(self.model):
                log_probs[need] = self._score(*context)
        if self.teacher.kind != "live":  # which moves on between the iterations over a rollout
            inputs["teacher_log_probs"] = log_probs
        return log_probs

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.teacher is not None and self.teacher.kind != "live" and self.args.should_save:
            folder = os.path.join(self._get_output_dir(trial=trial),
                                  f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            state = {"kind": self.teacher.kind, **self.teacher.state_dict()}
            torch.save(state, os.path.join(folder, TEACHER_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.teacher is None or self.teacher.kind == "live":
            return
        path, state = os.path.join(checkpoint, TEACHER_FILE), {"kind": "no"}
        if os.path.exists(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
        if state["kind"] != self.teacher.kind:
            raise UserError(f"{checkpoint} holds {state['kind']} teacher, but this run's "
                            f"teacher_model_kind is {self.teacher.kind!r}.")
        self.teacher.load_state_dict(state)
