"""RLSD in TRL: RLSDConfig and RLSDTrainer stand in for GRPOConfig and GRPOTrainer.

TRL generates, rewards, normalises, logs and saves as ever. Added are the privileged pass and the
loss. Hook B, the usual one: `model(..., rlsd_head=f)` runs f on the last hidden states and the head
inside forward, where DDP and FSDP hooks fire; there the fused loss never holds (B, T, V) logits,
drops tokens with A = 0 and forms all gradients in one pass. Hook A, for what the fused loss does
not cover: TRL's own `_compute_loss` on (B, T) advantages A_hat, over log-probs and entropies of
linear_log_probs, which also answers every other pass of TRL's (old and reference policy).
"""

import logging
from dataclasses import replace

from ..packages import require_release

for host in ("trl", "transformers"):  # first: of another release the imports below may fail
    require_release(host)

import torch
import trl
from accelerate.utils import gather_object
from packaging.version import Version

from rlsd_kernels import (
    aggregation_weights,
    fused_linear_rlsd_loss,
    linear_log_probs,
    merge_stats,
    rlsd_advantages,
    rlsd_loss,
)

from ..config import UserError
from ..policy.models import head_of
from .head import add_rlsd_head, answer_trl, base_of
from .trl_config import RLSDConfig
from .trl_sharing import shared_prompts
from .trl_teacher import TaughtTrainer

logger = logging.getLogger(__name__)
LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo")
CONTEXT = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
IMAGES = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes",
          "token_type_ids", "mm_token_type_ids", "image_position_ids")


class RLSDTrainer(TaughtTrainer):
    """GRPOTrainer whose advantages a privileged self-teacher re-weights per token.

    Arguments are GRPOTrainer's, with args an RLSDConfig. A row's `teacher_prompt`, or its prompt
    with `privileged_context` (default: `solution`) inserted, is what the teacher reads; one of
    these columns must be there unless rlsd_lambda is 0 or another source brings the hints:

    - hint_func(prompt, completion, feedback, **columns) -> str or None, also a coroutine function.
      Asked once for each sequence of a training rollout, while lambda is above 0. prompt and
      completion are what reward functions get, one of each; feedback is the attribute `feedback` of
      the sequence's environment, or what rollout_func returned under that name, else None. Its text
      is the hint. A sequence keeps plain A where it is None or blank, spells a control token or
      writes what starts an assistant's turn.
    - rollout_func may return `teacher_prompt_ids`: for each sequence a list of token ids, or None.

    Evaluation logs GRPO's loss.
    Raises UserError (a ValueError), in one sentence, on what it cannot do as asked.
    """

    _tag_names = ["trl", "rlsd"]
    _name = "RLSD"
    _paper = {"title": "Self-Distilled RLVR", "id": "2604.03128"}

    def __init__(self, model, reward_funcs=None, args=None, *more, hint_func=None, **named):
        args = RLSDConfig("RLSD") if args is None else args
        if not isinstance(args, RLSDConfig):
            raise UserError(f"args must be an RLSDConfig, but is a {type(args).__name__}.")
        self.hint_func, self._scored, self._stats, self._tokens_saved = hint_func, None, [], 0
        super().__init__(model, reward_funcs, args, *more, **named)
        base = base_of(self.model)
        scale, missing = self._find_head(base)
        self.obstacle = missing or self._find_obstacle()
        if self.obstacle and not missing and Version(trl.__version__) < Version("1.15"):
            missing = f"{self.obstacle}, and TRL {trl.__version__} has no fused head to replace"
        if missing:
            logger.warning("The loss is TRL's formula over TRL's own head, because %s.", missing)
        elif self.obstacle:
            logger.info("The loss is TRL's formula on log-probs of the fused head, because %s.",
                        self.obstacle)
        self.shared = shared_prompts(self, base, self.obstacle)
        if scale is not None:
            self._add_heads(scale, base)
        if args.rlsd_lambda > 0:
            self._add_teacher()

    def _find_head(self, model):
        """(its Head, None), or (None, why the fused head cannot have its place, a clause)."""
        plugin = self.args.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3:
            return None, "ZeRO-3 partitions the head"
        try:
            return head_of(model), None
        except UserError as error:
            return None, str(error).rstrip(".")

    def _add_heads(self, scale, model):
        """Give policy and reference the fused head."""
        args, self._scale = self.args, scale._asdict()
        for each in filter(None, (model, self.ref_model)):
            each = self.accelerator.unwrap_model(each)
            add_rlsd_head(each, args.cast_lm_head_to_fp32)
            answer_trl(each, scale, temperature=self.temperature, impl=args.rlsd_impl,
                       gradient_tolerance=args.gradient_tolerance, metrics=False,
                       shared=self.shared)

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
            if self.shared is not None:
                trunk, saved = self.shared.trunk(
                    prompt_ids, prompt_mask, ids, mask, with_router="output_router_logits" in more
                )
                self._tokens_saved += saved
                if trunk is not None:
                    return model(rlsd_trunk=trunk, rlsd_head=head)
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
        if "rlcsd_weights" in inputs:  # of the whole rollout
            weights = inputs["rlcsd_weights"] * (self.args.steps_per_generation / accumulation)

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
            if self.shared is not None:
                saved = sum(gather_object([self._tokens_saved]))
                self._metrics["train"]["prompt_sharing/tokens_saved"].append(saved)
            self._stats.clear()
            self._tokens_saved = 0
            for name, x in merge_stats(gather_object([own])).items():
                if name == "entropy" and torch.tensor(self._metrics["train"][name]).isnan().any():
                    self._metrics["train"][name] = [x.item()]  # a process had no live token
                if name in self._metrics["train"]:  # of a contrast, which is over before the loss
                    continue
                if name.startswith(("rlsd/", "policy_kl", "clip_ratio/dual")) and not x.isnan():
                    self._metrics["train"][name].append(x.item())
        super().log(logs, start_time)
