"""Completions of a sequence's own group as its hints in RLSDTrainer, and their contrast.

All teacher passes of a contrast are over before the loss, which gets A_hat as (B, T) advantages,
and of rlcsd its weights too (policy/hints.py, policy/update.py).
"""

from typing import NamedTuple

import torch

from ..config import UserError
from ..policy.hints import group_hints
from ..policy.packing import left_pad
from ..policy.update import Batch, reweighted


class Rollout(NamedTuple):
    """What group_hints reads of B sequences."""

    rows: list
    rewards: torch.Tensor  # (B,)
    texts: list


def require_siblings(trainer):
    """UserError where a process does not hold what its sequences would read."""
    args, agents = trainer.args, bool(trainer.tools or trainer.environments is not None)
    rows = args.per_device_train_batch_size * args.steps_per_generation
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    selects = args.method.selects
    for applies, what in (
        (rows % trainer.num_generations, f"a process generates {rows} sequences at once, which are "
         f"no whole groups of num_generations={trainer.num_generations}"),
        (agents or trainer.environment_factories or trainer.rollout_func is not None,
         "completions of several turns are no hints"),
        (trainer.hint_func is not None and args.hint_source == "rollout",
         "hint_func would not be asked beside hint_source='rollout'"),
        (sharded, "FSDP and DeepSpeed need as many teacher passes in every process"),
        (selects and trainer.accelerator.num_processes > 1, "objective='rlcsd' averages over a "
         "whole rollout, of which each process holds a part"),
        (selects and trainer.obstacle, f"objective='rlcsd' weighs tokens, but {trainer.obstacle}"),
    ):
        if applies:
            raise UserError(f"Siblings cannot be hints because {what}; change that, or leave "
                            "rlsd_contrast_hints, hint_source and objective out.")


def sibling_contexts(trainer, prompts, output, of_data, options, step):
    """[right hint, wrong hints ..] of each sequence, token ids of prompts with siblings in them.

    of_data: token ids after the data's hint, or None, which may be the right one.
    options: of the chat template, for each sequence.
    """
    rows = [
        {"prompt": prompt, "teacher_prompt_ids": ids, "_template_options": own}
        for prompt, ids, own in zip(prompts, of_data, options, strict=True)
    ]
    said = zip(output["completion_ids"], output["completion_mask"], strict=True)
    texts = [trainer._tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
             for ids, mask in said]
    rollout = Rollout(rows, trainer._rewards, texts)
    return group_hints(rollout, output["advantages"], step, trainer._tokenizer, trainer.args)


def contrasted(trainer, output, student, hints, rlsd_lambda):
    """(A_hat (B, T), loss weights of rlcsd (B, T) or None, metrics) of a rollout."""
    args, mask = trainer.args, output["completion_mask"].bool()
    batch = Batch(
        prompts=student, teacher_prompts=[None] * len(student), images=[None] * len(student),
        completion_ids=output["completion_ids"], mask=mask, advantages=output["advantages"],
        loss_weights=torch.zeros(mask.shape, device=mask.device), hints=hints,
    )

    def score(asked):
        size, found = args.per_device_train_batch_size, torch.zeros_like(asked.loss_weights)
        with trainer.teacher.lent_to(trainer.model):
            for first in range(0, len(asked.prompts), size):
                rows = list(range(first, min(first + size, len(asked.prompts))))
                part = asked.select(rows)
                context = left_pad(part.prompts, trainer._tokenizer.pad_token_id, mask.device)
                width = part.mask.shape[1]
                found[rows, :width] = trainer._score(
                    *context, part.completion_ids, part.mask.long()
                )
        return found

    batch, metrics = reweighted(batch, list(range(len(student))), mask, score, rlsd_lambda, args)
    a_hat = batch.advantages[:, None].expand(mask.shape) if batch.a_hat is None else batch.a_hat
    return a_hat, batch.loss_weights if args.method.selects else None, metrics
