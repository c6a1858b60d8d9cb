"""RLSD in verl 0.9: a fused LM head, and the advantage estimator `rlsd`, installed by import.

    VERL_USE_EXTERNAL_MODULES=rlsd.integrations.verl python -m verl.trainer.main_ppo \
        algorithm.adv_estimator=rlsd ...

With use_fused_kernels, actors get log-probs and entropies without (N, V) logits. verl's GRPO
advantages are re-weighted by log-probs of today's policy shown extra_info["teacher_prompt"], in
either of verl's trainers (verl_teacher.py). OPTIONS are algorithm's, named as in ms-swift.
"""

import logging

import numpy as np
import torch
import verl
from verl.models.transformers import dense_common
from verl.trainer.ppo import core_algos, ray_trainer
from verl.utils import config as verl_config

import rlsd_kernels
from rlsd.config import UserError
from rlsd.policy.models import head_terms

from . import verl_teacher
from .verl_teacher import OPTIONS, options_of, wrap


def fused_forward(self, input_ids=None, labels=None, shift_labels=None, temperature=1.0, **inputs):
    """fp32 log-probs (B, L) and entropies, by the head with its bias, scale and softcap."""
    head, scale, _ = self.lm_head, head_terms(self.config), inputs.pop("logits_to_keep", None)
    if not isinstance(head, torch.nn.Linear):
        raise UserError(f"The fused head needs a torch.nn.Linear, but lm_head is {type(head)}.")
    hidden = dense_common.forward_base_model(self, input_ids=input_ids, **inputs).last_hidden_state
    ids = torch.roll(input_ids if labels is None else labels, -1, -1)
    log_probs, entropy = rlsd_kernels.linear_log_probs(
        hidden, head.weight, ids if shift_labels is None else shift_labels, bias=head.bias,
        temperature=temperature, return_entropy=True, **scale._asdict(),
        gradient_tolerance=getattr(self.config, "rlsd_gradient_tolerance", 0.0),  # override_config
    )
    return dense_common.CausalLMOutputForPPO(log_probs=log_probs, entropy=entropy)


@core_algos.register_adv_est("rlsd")
def rlsd_estimator(
    token_level_rewards, response_mask, index, config=None, teacher_log_probs=None,
    old_log_probs=None, rlsd_lambda=None, norm_adv_by_std_in_grpo=True, **unused,
):
    """(advantages, returns), both (B, T) A_hat: verl's GRPO advantages, re-weighted by token.
    Rewards, mask, log-probs (nats): (B, T); index: (B,) group ids; rlsd_lambda: this step's. Equal
    rewards have A = 0. Raises UserError if lambda is above 0 and log-probs are missing."""
    lam, _, _, clip_range, negative_only = options_of(config).values()
    lam = lam if rlsd_lambda is None else rlsd_lambda
    a, _ = core_algos.compute_grpo_outcome_advantage(
        token_level_rewards, response_mask, index, norm_adv_by_std_in_grpo=norm_adv_by_std_in_grpo
    )
    for group in np.unique(index):  # verl's fp32 mean of equal rewards is not always theirs
        rows = torch.from_numpy(index == group).to(a.device)
        if rows.sum() > 1 and token_level_rewards[rows].sum(-1).unique().numel() == 1:
            a[rows] = 0
    if lam > 0:
        if teacher_log_probs is None or old_log_probs is None:
            raise UserError("adv_estimator=rlsd needs teacher_log_probs and old_log_probs, which "
                            "verl's own trainers put into the batch once this hook is loaded.")
        a = rlsd_kernels.rlsd_advantages(
            a, old_log_probs, teacher_log_probs, rlsd_lambda=lam, reweight_mask=response_mask != 0,
            rlsd_reweight_clip_range=clip_range, rlsd_negative_only=negative_only,
        )
    return a, a


def _advantage(original, data, adv_estimator, **named):
    if adv_estimator != "rlsd":
        return original(data, adv_estimator, **named)
    names = ("token_level_rewards", "response_mask", "old_log_probs", "teacher_log_probs")
    data.batch["advantages"], data.batch["returns"] = rlsd_estimator(
        **{name: data.batch.get(name, None) for name in names}, **named,
        index=data.non_tensor_batch["uid"], rlsd_lambda=data.meta_info.get("rlsd_lambda"),
    )
    return data


def _validate(original, config, *args, **named):
    algorithm = config.algorithm
    if algorithm.adv_estimator == "rlsd":
        lam, _, _, clip_range, _ = options_of(algorithm).values()
        rlsd_kernels.RLSDLossConfig(lam, clip_range)
        unknown = {n for n in algorithm if n.startswith("rlsd_")} - {*OPTIONS}
        bypass = (algorithm.get("rollout_correction") or {}).get("bypass_mode")
        if unknown or bypass:
            why = "bypass_mode leaves out the pass of old_log_probs"
            why = f"algorithm has none of {sorted(unknown)}" if unknown else why
            raise UserError(f"adv_estimator=rlsd cannot run because {why}.")
    return original(config, *args, **named)


if not verl.__version__.startswith("0.9."):
    raise UserError(f"The RLSD hook needs verl 0.9.x, but {verl.__version__} is installed.")
dense_common.forward_with_torch_backend = dense_common.forward_with_triton_backend = fused_forward
wrap(ray_trainer, "compute_advantage", _advantage)
wrap(verl_config, "validate_config", _validate)
verl_teacher.install()  # it takes compute_advantage as it is by now
logger = logging.getLogger(__name__)
logger.setLevel(logging.INFO)
logger.info("RLSD: replaced verl's fused heads of text models (they run with use_fused_kernels), "
            "compute_advantage, validate_config, RayPPOTrainer._compute_old_log_prob and "
            "PPOTrainer._compute_advantage.")
