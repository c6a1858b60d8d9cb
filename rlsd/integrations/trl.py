"""RLSD in TRL: RLSDConfig and RLSDTrainer stand in for GRPOConfig and GRPOTrainer.

TRL generates, rewards, normalises, logs and saves as ever. Added are the privileged pass and the
loss. Hook B, the usual one: `model(..., rlsd_head=f)` runs f on the last hidden states and the head
inside forward, where DDP and FSDP hooks fire; there the fused loss never holds (B, T, V) logits,
drops tokens with A = 0 and forms all gradients in one pass. Hook A, for what the fused loss does
not cover: TRL's own `_compute_loss` on (B, T) advantages A_hat, over log-probs and entropies of
linear_log_probs, which also answers every other pass of TRL's (old and reference policy).
"""

import logging
import os
from dataclasses import replace

from ..packages import require_release

for host in ("trl", "transformers"):  # first: of another release the imports below may fail
    require_release(host)

import torch
import trl
from accelerate.utils import gather_object
from datasets import IterableDataset
from packaging.version import Version
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from rlsd_kernels import (
    aggregation_weights,
    fused_linear_rlsd_loss,
    linear_log_probs,
    merge_stats,
    rlsd_advantages,
    rlsd_loss,
)

from ..config import UserError
from ..policy.advantages import rlsd_lambda_at
from ..policy.models import head_of
from ..policy.packing import left_pad
from ..policy.teacher import Teacher
from ..tasks.prompts import teacher_prompt
from .head import add_rlsd_head, answer_trl, base_of
from .trl_config import RLSDConfig

logger = logging.getLogger(__name__)
LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo")
HINT_COLUMNS = ("teacher_prompt", "privileged_context", "solution")
CONTEXT = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
TEACHER_CONTEXT = ("teacher_prompt_ids", "teacher_prompt_mask", *CONTEXT[2:])
IMAGES = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes",
          "token_type_ids", "mm_token_type_ids", "image_position_ids")
TEACHER_FILE = "rlsd_teacher.pt"


class _FollowStudent(TrainerCallback):
    """Lets the teacher follow after the optimizer step that ends a rollout."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        done = self.trainer.rollouts_done(state.global_step)
        if done > self.trainer.rollouts_done(state.global_step - 1):
            self.trainer.teacher.after_step(done)


class RLSDTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages a privileged self-teacher re-weights per token.

    Arguments are GRPOTrainer's, with args an RLSDConfig. A row's `teacher_prompt`, or its prompt
    with `privileged_context` (default: `solution`) inserted, is what the teacher reads; one of
    these columns must be there unless rlsd_lambda is 0. Evaluation logs GRPO's loss.
    Raises UserError (a ValueError), in one sentence, on what it cannot do as asked.
    """

    _tag_names = ["trl", "rlsd"]
    _name = "RLSD"
    _paper = {"title": "Self-Distilled RLVR", "id": "2604.03128"}

    def __init__(self, model, reward_funcs=None, args=None, *more, **named):
        args = RLSDConfig("RLSD") if args is None else args
        if not isinstance(args, RLSDConfig):
            raise UserError(f"args must be an RLSDConfig, but is a {type(args).__name__}.")
        self.teacher, self._scored, self._stats = None, None, []
        super().__init__(model, reward_funcs, args, *more, **named)
        base = base_of(self.model)
        missing = self._find_head(base)
        self.obstacle = missing or self._find_obstacle()
        if self.obstacle and not missing and Version(trl.__version__) < Version("1.15"):
            missing = f"{self.obstacle}, and TRL {trl.__version__} has no fused head to replace"
        if missing:
            logger.warning("The loss is TRL's formula over TRL's own head, because %s.", missing)
        elif self.obstacle:
            logger.info("The loss is TRL's formula on log-probs of the fused head, because %s.",
                        self.obstacle)
        if args.rlsd_lambda > 0:
            self._require_teachable(args)
            # Only what is trained is copied, an adapter say; the model borrows it for its pass.
            trained = torch.nn.ParameterList(p for p in self.model.parameters() if p.requires_grad)
            rates = {"sync_steps": args.teacher_sync_steps, "ema_rate": args.teacher_ema_rate}
            self.teacher = Teacher(trained, args.teacher_model_kind, **rates)
            self.add_callback(_FollowStudent(self))

    def _find_head(self, model):
        """Give policy and reference the fused head, or say why not (a clause)."""
        plugin = self.args.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3:
            return "ZeRO-3 partitions the head"
        try:
            scale = head_of(model)
        except UserError as error:
            return str(error).rstrip(".")
        args, self._scale = self.args, scale._asdict()
        for each in filter(None, (model, self.ref_model)):
            each = self.accelerator.unwrap_model(each)
            add_rlsd_head(each, args.cast_lm_head_to_fp32)
            answer_trl(each, scale, temperature=self.temperature, impl=args.rlsd_impl,
                       gradient_tolerance=args.gradient_tolerance, metrics=False)

    def _find_obstacle(self):
        """Why the loss is not one fused pass (a clause), or None."""
        args = self.args
        for applies, reason in (
            (self.loss_type not in LOSS_TYPES, f"loss_type={self.loss_type!r} has another formula"),
            (self.importance_sampling_level != "token", "importance_sampling_level is not 'token'"),
            (args.delta is not None and args.loss_config().delta is None,
             f"TRL's delta={args.delta} is below 1 + epsilon_high and so caps praise as well"),
            (self.beta != 0 and args.use_bias_correction_kl,
             "use_bias_correction_kl multiplies the KL by the ratio (without it, beta is fused)"),
            (self.top_entropy_quantile < 1, "top_entropy_quantile needs entropies before the loss"),
            (self._entropy_bonus_enabled, "TRL's entropy bonus is a mean of its own"),
            (self.off_policy_mask_threshold is not None,
             "off_policy_mask_threshold needs log-probs before the loss"),
        ):
            if applies:
                return reason

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
            context = [inputs[name][need] for name in TEACHER_CONTEXT]
            with self.teacher.lent_to(self.model):
                log_probs[need] = self._score(*context)
        if self.teacher.kind != "live":  # which moves on between the iterations over a rollout
            inputs["teacher_log_probs"] = log_probs
        return log_probs

    def _score(self, prompt_ids, prompt_mask, ids, mask):
        """(B, T) log-probs by the head that the loss uses: equal contexts must give delta 0."""
        if self.obstacle:
            return self._trl_score(self.model, prompt_ids, prompt_mask, ids, mask)[0]

        def head(hidden, weight, bias):
            options = {"temperature": self.temperature, "impl": self.args.rlsd_impl, **self._scale}
            return linear_log_probs(hidden, weight, ids, bias=bias, **options)

        return self._forward(self.model, prompt_ids, prompt_mask, ids, mask, head)[0]

    def _forward(self, model, prompt_ids, prompt_mask, ids, mask, head, **more):
        """(head(hidden, weight, bias), auxiliary loss); hidden (B, T, H) predict the ids."""
        with self.accelerator.autocast():
            return model(
                input_ids=torch.cat([prompt_ids, ids], 1),
                attention_mask=torch.cat([prompt_mask, mask], 1),
                rlsd_head=lambda h, *rest: head(h[:, -ids.shape[1] - 1 : -1], *rest), **more,
            )

    def _trl_score(self, model, prompt_ids, prompt_mask, ids, mask, **more):
        input_ids, mask = torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1)
        return self._get_per_token_logps_and_entropies(model, input_ids, mask, ids.shape[1], **more)

    def _compute_loss(self, model, inputs):
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        lam, mask = float(inputs.get("rlsd_lambda", 0.0)), inputs["completion_mask"]
        config, old = self.args.loss_config(), inputs.get("old_per_token_logps")
        if old is None:  # on-policy: both sources are this forward
            config = replace(config, rlsd_delta_source="current")
        token_inputs = {
            "old_log_probs": old, "config": config, "impl": self.args.rlsd_impl,
            "rlsd_lambda": lam, "teacher_log_probs": None, "reweight_mask": None,
        }
        if lam > 0:
            token_inputs["teacher_log_probs"] = self._teacher_log_probs(inputs)
            hinted = inputs["has_hint"].to(mask.device)[:, None]
            token_inputs["reweight_mask"] = hinted.expand(mask.shape)
        hook = self._hook_a if self.obstacle else self._hook_b
        return hook(model, inputs, mask * inputs.get("tool_mask", 1), token_inputs)

    def _hook_b(self, model, inputs, mask, token_inputs):
        """The fused loss; its log-probs then go through TRL's `_compute_loss` for TRL's metrics."""
        ids, advantages = inputs["completion_ids"], inputs["advantages"]
        advantages = advantages.view(len(ids), -1).expand_as(mask)  # TRL's are (B,) or (B, T)
        if "importance_sampling_ratio" in inputs:  # the loss is linear in |A|, and the KL free of A
            advantages = advantages * inputs["importance_sampling_ratio"]
        accumulation = self.current_gradient_accumulation_steps
        items = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        weights = aggregation_weights(
            mask, self.loss_type, max_completion_length=self.max_completion_length,
            num_items_in_batch=items / self.args.steps_per_generation,
        ) / accumulation

        def head(hidden, weight, bias):
            return fused_linear_rlsd_loss(
                hidden, weight, ids, advantages, bias=bias, loss_weights=weights,
                ref_log_probs=inputs.get("ref_per_token_logps"), return_entropy=True,
                gradient_tolerance=self.args.gradient_tolerance, **self._scale, **token_inputs,
            )

        more = {name: inputs[name] for name in IMAGES if inputs.get(name) is not None}
        if self.aux_loss_enabled:
            more["output_router_logits"] = True
        out, aux_loss = self._forward(model, *(inputs[name] for name in CONTEXT), head, **more)
        self._stats.append(out.stats)
        # Tokens with A = 0 were not computed: TRL's mean entropy becomes that of the others.
        done = (advantages != 0) | (self.beta != 0)
        entropy = torch.where(done, out.entropy, out.stats["entropy"])
        with torch.no_grad():
            self._trl_loss(model, inputs, (out.log_probs, entropy, aux_loss))
        aux = 0.0 if aux_loss is None else self.router_aux_loss_coef * aux_loss / accumulation
        return out.loss + aux

    def _hook_a(self, model, inputs, mask, token_inputs):
        """TRL's loss on A_hat."""
        if token_inputs["teacher_log_probs"] is None:
            return super()._compute_loss(model, inputs)
        scored = self._trl_score(
            model, *(inputs[name] for name in CONTEXT), compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
        )
        student, config = scored[0].detach(), replace(token_inputs["config"], beta=0.0)
        measure = {**token_inputs, "config": config, "loss_weights": mask.float()}
        self._stats.append(rlsd_loss(student, inputs["advantages"], **measure).stats)
        if config.rlsd_delta_source == "old_log_probs":
            student = token_inputs["old_log_probs"]
        a_hat = rlsd_advantages(
            inputs["advantages"], student, token_inputs["teacher_log_probs"],
            rlsd_lambda=token_inputs["rlsd_lambda"],
            rlsd_reweight_clip_range=config.rlsd_reweight_clip_range,
            rlsd_negative_only=config.rlsd_negative_only,
            reweight_mask=token_inputs["reweight_mask"],
        )
        return self._trl_loss(model, {**inputs, "advantages": a_hat}, scored)

    def _trl_loss(self, model, inputs, scored):
        """TRL's `_compute_loss` on `scored`, what `_trl_score` would return."""
        self._scored = scored
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._scored = None

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if self._scored is not None:
            return self._scored
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def get_high_entropy_mask(self, entropies, mask, threshold):
        # Tokens of one context, as the first of a group, tie in TRL; here an ulp lies between them.
        return super().get_high_entropy_mask(entropies.round(decimals=4), mask, threshold)

    def log(self, logs, start_time=None):
        if self.model.training and self._stats:
            own = {name: x.cpu() for name, x in merge_stats(self._stats).items()}
            self._stats.clear()
            for name, x in merge_stats(gather_object([own])).items():
                if name == "entropy" and torch.tensor(self._metrics["train"][name]).isnan().any():
                    self._metrics["train"][name] = [x.item()]  # a process had no live token
                if name.startswith(("rlsd/", "policy_kl", "clip_ratio/dual")) and not x.isnan():
                    self._metrics["train"][name].append(x.item())
        super().log(logs, start_time)

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
