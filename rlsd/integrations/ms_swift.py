"""RLSD's fused loss in ms-swift's GRPO trainer, installed by importing this file in a plugin.

    rlsd_plugin.py:  import rlsd.integrations.ms_swift
    swift rlhf --rlhf_type grpo --advantage_reweight rlsd --external_plugins rlsd_plugin.py ...

ms-swift keeps its options, advantages, teacher, schedule and metrics. Log-probs come from the fused
head; the clipped surrogate without KL is one fused pass, other losses are ms-swift's formula.
"""

import logging

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from swift import __version__
from swift.rlhf_trainers import GRPOTrainer
from swift.trainers import TrainerFactory

import rlsd_kernels
from rlsd.config import UserError
from rlsd.integrations.head import add_rlsd_head, base_of
from rlsd.policy.models import head_of

logger = logging.getLogger("swift.rlsd")  # a child of ms-swift's logger, which prints INFO


class RLSDGRPOTrainer(GRPOTrainer):
    """ms-swift's GRPOTrainer over the fused head; UserError, a sentence, on what it cannot do."""
    gradient_tolerance, _scored = 0.0, None  # the first is for the plugin to set, in [0, 1)

    def __init__(self, *args, **kwargs):
        rlsd_kernels.logprob.check_tolerance(self.gradient_tolerance)
        super().__init__(*args, **kwargs)
        args, data, missing = self.args, self.train_dataset, None
        self.reweights = self.advantage_reweight == "rlsd"
        if self.reweights and self.rlsd_lambda > 0 and isinstance(data, Dataset):  # no stream
            prompts = data["teacher_prompt"] if "teacher_prompt" in data.column_names else [None]
            missing = next((i for i, prompt in enumerate(prompts) if not prompt), None)
        for applies, why in (
            (args.use_liger_kernel, "use_liger_kernel puts Liger's loss in its place"),
            (self.is_multimodal, "the model takes images"),
            (self.template.sequence_parallel_size > 1, "sequence_parallel_size is above 1"),
            (args.deepspeed and args.deepspeed_plugin.zero_stage == 3, "ZeRO-3 shards the head"),
            (missing is not None, f"row {missing} of the dataset has no teacher_prompt"),
        ):
            if applies:
                raise UserError(f"The fused RLSD loss cannot run because {why}.")
        delta = args.delta if (args.delta or 0) >= 1 + self.epsilon_high else None
        self.loss_config = rlsd_kernels.RLSDLossConfig(
            0.0, self.rlsd_reweight_clip_range, "old_log_probs", self.rlsd_negative_only,
            self.epsilon_low, self.epsilon_high, delta, temperature=self.temperature,
        )
        obstacles = {  # to the one fused pass
            "loss_type": self.loss_type not in ("grpo", "bnpo", "dapo", "dr_grpo"),
            "importance_sampling_level": self.importance_sampling_level != "token",
            "beta, whose KL ms-swift clamps": self.beta != 0 and not self.kl_in_reward,
            "entropies of all tokens": self.compute_entropy, "sdar_loss_coef": self.sdar_loss_coef,
            "off_policy_sequence_mask_delta": self.off_policy_sequence_mask_delta is not None,
            "rollout correction": self.rollout_importance_sampling_mode is not None
            or self.log_rollout_offpolicy_metrics, "multi-turn": self.dynamic_num_samples,
            "chord": self.chord_sft_dataset is not None, "padding_free": self.template.padding_free,
            "delta below 1 + epsilon_high": delta != args.delta,
        }
        self.obstacle = next((name for name, applies in obstacles.items() if applies), None)
        self._scale = self._install_heads()
        logger.info("RLSD: log-probs come from the fused head of rlsd_kernels, and the loss is %s.",
                    f"ms-swift's on them because of {self.obstacle}" if self.obstacle else "fused")

    def _install_heads(self):
        """Give policy, reference and teacher the fused head; return their scale and softcap."""
        scales = set()
        for model in filter(None, (self.model, self.ref_model, self.teacher_model)):
            base = base_of(self.accelerator.unwrap_model(model))
            scales.add(head_of(base))
            add_rlsd_head(base, cast_lm_head_to_fp32=False)
        if len(scales) > 1:
            raise UserError(f"Policy, reference and teacher scale logits differently: {scales}.")
        return scales.pop()._asdict()

    def _forward(self, model, model_inputs, head, *tensors, **options):
        """head(hidden, weight, *tensors) inside forward; hidden (B, T, H) predict tensors[0]."""
        tokens = tensors[0].shape[1]
        with self.accelerator.autocast():
            return model(**model_inputs, rlsd_head=lambda h, w, bias: head(
                h[:, -tokens - 1 : -1], w, *tensors, bias=bias, **self._scale, **options,
                gradient_tolerance=self.gradient_tolerance,
            ))[0]

    def _get_logps_via_local_forward(self, model, inputs, tokens, ids, compute_entropy=False):
        out = self._forward(model, inputs, rlsd_kernels.linear_log_probs, ids[:, -tokens:],
                            temperature=self.temperature, return_entropy=compute_entropy)
        return out if compute_entropy else (out, None)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self._scored or super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _prepare_batch_inputs(self, samples):
        for sample in samples if self.reweights and self.model.training else ():
            if self.rlsd_lambda > 0 and not sample.teacher_prompt:
                raise UserError(f"The row with messages {sample.messages!r:.80} has no "
                                "teacher_prompt, so it would silently train as plain GRPO.")
        return super()._prepare_batch_inputs(samples)

    def _rlsd_effective_lambda(self):  # 0 in evaluation: held-out rows need no hint
        return super()._rlsd_effective_lambda() if self.model.training else 0.0

    def _compute_teacher_logps(self, *args, **kwargs):
        unread = self.reweights and self._rlsd_effective_lambda() == 0
        return None if unread else super()._compute_teacher_logps(*args, **kwargs)

    def _postprocess_batch(self, samples, batches):
        super()._postprocess_batch(samples, batches)
        parts = self.split_by_mini_batches(samples)
        for part, batch in () if self.obstacle else zip(parts, batches, strict=True):
            batch = batch["grpo_batch"]
            batch.rlsd_lambda = self._rlsd_effective_lambda() if self.reweights else 0.0
            if self.reweights:  # plain A: the fused loss weights its tokens, in log space
                plain = torch.stack([sample.advantages for sample in part]).to(batch.advantages)
                batch.advantages = plain[:, None].expand_as(batch.advantages)

    def _compute_loss_and_metrics(self, model, model_inputs, batch):
        if self.obstacle:
            return super()._compute_loss_and_metrics(model, model_inputs, batch)
        keep = ~(batch.truncated_mask & self.overlong_filter)[:, None]
        items = batch.num_items_in_batch.clamp(min=1) / self.accelerator.num_processes
        weights = rlsd_kernels.aggregation_weights(
            batch.completion_mask & keep, self.loss_type, num_items_in_batch=items,
            max_completion_length=self.max_completion_length,
        )
        out = self._forward(
            model, model_inputs, rlsd_kernels.fused_linear_rlsd_loss,
            model_inputs["input_ids"][:, -batch.logits_to_keep :], batch.advantages,
            teacher_log_probs=batch.teacher_per_token_logps, rlsd_lambda=batch.rlsd_lambda,
            old_log_probs=batch.old_per_token_logps, loss_weights=weights, config=self.loss_config,
        )
        stats = {name: x.cpu() for name, x in out.stats.items()}
        for name, x in rlsd_kernels.merge_stats(gather_object([stats])).items():
            if name.startswith(("rlsd/", "policy_kl", "clip_ratio/dual")) and not x.isnan():
                self._metrics["train" if self.model.training else "eval"][name].append(x.item())
        self._scored = out.log_probs, None
        with torch.no_grad():  # for ms-swift's own metrics
            metrics = super()._compute_loss_and_metrics(model, model_inputs, batch)[1]
        self._scored = None
        return self._undo_gradient_accumulation_scaling(out.loss), metrics


if not __version__.startswith("4.6."):
    raise UserError(f"The RLSD plugin needs ms-swift 4.6.x, but {__version__} is installed.")
TrainerFactory.TRAINER_MAPPING["grpo"] = f"{__name__}.RLSDGRPOTrainer"
logger.info("RLSD: GRPO trains with %s.RLSDGRPOTrainer instead of ms-swift's.", __name__)
