"""The teacher's pass in verl's trainers: the actor's own log-probs after the privileged prompts.

    RayPPOTrainer:   _compute_old_log_prob puts teacher_log_probs and rlsd_lambda into the batch
    v1 PPOTrainer:   _compute_advantage puts them into what compute_advantage is given

A v1 batch lies in a TransferQueue, of which _compute_advantage reads a fixed list of fields and
hands on their tensors alone; what the teacher gives waits in this process meanwhile.
"""

import contextvars
import functools
import importlib.util

import numpy as np
import torch
import verl
from verl.trainer.ppo import ray_trainer

from ..config import UserError
from ..policy.advantages import rlsd_lambda_at
from ..policy.packing import left_pad

OPTIONS = {"rlsd_lambda": 0.5, "rlsd_lambda_warmup_steps": 0, "rlsd_lambda_decay_steps": 0,
           "rlsd_reweight_clip_range": 0.2, "rlsd_negative_only": False}


# Fields of the queue: what teacher_batch reads.
FIELDS = ["responses", "response_mask", "extra_info", "multi_modal_inputs"]
_given = contextvars.ContextVar("given", default=None)


def options_of(algorithm):
    return {name: (algorithm or {}).get(name, default) for name, default in OPTIONS.items()}


def teacher_batch(batch, tokenizer, template_options):
    """The batch with the teacher's prompts before the very same response tokens."""
    prompts, old, responses = [], batch.batch, batch.batch["responses"]
    if any(map(len, batch.non_tensor_batch.get("multi_modal_inputs", ()))):
        raise UserError("The RLSD teacher takes no images, but the batch has some.")
    for i, extra in enumerate(batch.non_tensor_batch.get("extra_info", [{}])):
        chat = extra.get("teacher_prompt")
        if chat is None or isinstance(chat, str) or len(chat) == 0:
            raise UserError(f"extra_info['teacher_prompt'] of row {i} must be a chat, but is "
                            f"{chat!r:.80}, so the row would silently train as plain GRPO.")
        prompts.append(tokenizer.apply_chat_template(
            list(chat), add_generation_prompt=True, return_dict=False, **template_options
        ))
    ids, mask = left_pad(prompts, tokenizer.pad_token_id, responses.device)
    mask = torch.cat([mask, old["attention_mask"][:, -responses.shape[1] :]], 1)
    return verl.DataProto.from_dict({
        "prompts": ids, "responses": responses, "response_mask": old["response_mask"],
        "input_ids": torch.cat([ids, responses], 1), "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }, meta_info=batch.meta_info)


def teacher_of(score, trainer, batch):
    """This step's lambda, and the teacher's log-probs (B, T) by today's policy unless it is 0."""
    config = trainer.config
    lam = rlsd_lambda_at(trainer.global_steps, *list(options_of(config.algorithm).values())[:3])
    if lam == 0:
        return lam, None
    options = config.data.get("apply_chat_template_kwargs") or {}
    scored, _ = score(trainer, teacher_batch(batch, trainer.tokenizer, options))
    return lam, scored.batch["old_log_probs"]


def _with_teacher(original, trainer, batch):
    scored = original(trainer, batch)
    if trainer.config.algorithm.adv_estimator == "rlsd":
        lam, log_probs = teacher_of(original, trainer, batch)
        scored[0].meta_info["rlsd_lambda"] = lam
        if log_probs is not None:
            scored[0].batch["teacher_log_probs"] = log_probs
    return scored


def rows_of(trainer, batch):
    """What teacher_batch reads of a batch in the queue; responses are padded on the right."""
    import transfer_queue

    if any(not key.endswith("_0") for key in batch.keys):  # {uid}_{session}_{output}
        raise UserError("adv_estimator=rlsd takes one output of a session, but an agent loop of "
                        "this batch gave several.")
    data = transfer_queue.kv_batch_get(
        keys=batch.keys, partition_id=batch.partition_id, select_fields=FIELDS
    )
    other = {name: data.pop(name).tolist() for name in FIELDS[2:]}
    sizes = data["responses"].offsets().diff()
    data = data.to_padded_tensor()
    mask = torch.arange(data["responses"].shape[1]) < sizes.cpu()[:, None]
    return verl.DataProto.from_dict(
        {"responses": data["responses"], "response_mask": data["response_mask"],
         "attention_mask": mask.long()},
        non_tensors={name: np.array(values, dtype=object) for name, values in other.items()},
        meta_info={"temperature": trainer.config.actor_rollout_ref.rollout.temperature,
                   "global_token_num": sizes.tolist()},
    )


def _before_advantage(original, score, trainer, batch, metrics):
    if trainer.config.algorithm.adv_estimator != "rlsd":
        return original(trainer, batch, metrics)
    token = _given.set(teacher_of(score, trainer, rows_of(trainer, batch)))
    try:
        return original(trainer, batch, metrics)
    finally:
        _given.reset(token)


def _advantage(original, data, *args, **named):
    if _given.get() is not None:
        data.meta_info["rlsd_lambda"], log_probs = _given.get()
        if log_probs is not None:
            data.batch["teacher_log_probs"] = log_probs
    return original(data, *args, **named)


def install():
    """In RayPPOTrainer, and in the v1 trainers where there are any."""
    score = ray_trainer.RayPPOTrainer._compute_old_log_prob
    wrap(ray_trainer.RayPPOTrainer, "_compute_old_log_prob", _with_teacher)
    if importlib.util.find_spec("transfer_queue") is None:
        return
    from verl.trainer.ppo.v1 import trainer_base, utils

    wrap(trainer_base.PPOTrainer, "_compute_advantage", _before_advantage, score)
    utils.compute_advantage = functools.partial(_advantage, ray_trainer.compute_advantage)


def wrap(place, name, wrapper, *first):
    """Let place.name be wrapper(what it was, *first, ...)."""
    original = getattr(place, name)

    @functools.wraps(original)
    def wrapped(*args, **named):
        return wrapper(original, *first, *args, **named)

    setattr(place, name, wrapped)
