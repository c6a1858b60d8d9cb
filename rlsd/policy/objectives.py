"""The objectives, what one micro-batch adds to each, and their check against the specification.

An objective is one function of the loss's arguments, named in LOSSES. They share rollouts, data,
teacher and evaluation; aggregation weights a_t come from the whole rollout, so every loss is a
sum over tokens that micro-batches may split. D is a divergence over the full vocabulary:

    rlsd, grpo        section 1 of the method; GRPO is RLSD with lambda 0, and runs no teacher
    opsd, sdpo, opd   sum_t a_t D(P_T, P_S), gradient through P_S alone; P_T is the model itself
                      after the hint, after a successful sibling, or another model after x
    grpo+opsd         grpo + c opsd, in one pass of the student
    sft               - sum_t a_t log P_S(y_t) on reference solutions
"""

import functools
import math
from typing import NamedTuple

import torch

from rlsd_kernels import (
    RLSDLossOutput,
    fused_linear_rlsd_loss,
    linear_distillation_loss,
    linear_log_probs,
    rlsd_advantages,
    rlsd_loss,
)

from ..config import DISTILLING, UserError
from ..tasks.prompts import encode, insert_hint
from .packing import completion_hidden

# Largest deviation from fp64 that each input dtype may show: log-probs absolute, gradients
# relative in the Frobenius norm (the precision contract).
CONTRACT = {
    torch.float64: (1e-9, 1e-9), torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-4, 4e-3), torch.float16: (1e-4, 4e-3),
}


class Batch(NamedTuple):
    """Live sequences of one rollout step. (B, T) tensors but for advantages (B,) and the lists."""

    prompts: list  # token lists, student
    teacher_prompts: list  # token lists or None where the teacher is not needed
    images: list  # PromptImages, or None where a prompt has none
    completion_ids: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor
    loss_weights: torch.Tensor
    ref_log_probs: torch.Tensor | None = None
    old_log_probs: torch.Tensor | None = None
    teacher_log_probs: torch.Tensor | None = None
    sampling_log_probs: torch.Tensor | None = None  # as the tokens were drawn; NaN: not known

    def lengths(self):
        """(longest prompt, completion) tokens of each sequence."""
        longest = [
            max(len(prompt), len(hinted or ()))
            for prompt, hinted in zip(self.prompts, self.teacher_prompts, strict=True)
        ]
        return list(zip(longest, self.mask.sum(1).tolist(), strict=True))

    def select(self, rows):
        """The sequences `rows` (index list), cut to their longest completion.

        No rows: the first one without weight, for a process that only keeps the others company.
        """
        if not rows:
            part = self.select([0])
            return part._replace(loss_weights=torch.zeros_like(part.loss_weights))
        width = int(self.mask[rows].sum(1).max())
        out = {}
        for name, value in self._asdict().items():
            if isinstance(value, list):
                out[name] = [value[i] for i in rows]
            elif value is not None:
                out[name] = value[rows] if value.dim() == 1 else value[rows, :width]
        return Batch(**out)


@torch.no_grad()
def teacher_hidden(teacher, batch, layout, *, always=False):
    """(B, T, H) hidden states in the privileged context; zeros where no token is re-weighted.

    always: run the teacher also where none is.
    """
    need = [i for i, prompt in enumerate(batch.teacher_prompts) if prompt is not None]
    need = need or [0] * always
    ids, layer = batch.completion_ids, teacher.get_output_embeddings()
    shape = (*ids.shape, layer.in_features)
    if not need:
        return torch.zeros(shape, dtype=layer.weight.dtype, device=ids.device)
    training = teacher.training
    teacher.eval()
    scored = completion_hidden(
        teacher, [batch.teacher_prompts[i] or batch.prompts[i] for i in need], ids[need],
        batch.mask[need], layout, images=[batch.images[i] for i in need],
    )
    teacher.train(training)
    hidden = scored.new_zeros(shape)
    hidden[need] = scored
    return hidden


def teacher_inputs(
    teacher, head, batch, layout, config, *, full_vocabulary=False, sharded=False
):
    """The loss's arguments on the teacher for one micro-batch, its forward included.

    Its head runs inside the fused op: with one guess of the log-sum-exp for both contexts, equal
    hidden states give equal log-probs to the bit, and dead rows cost nothing. A sharded head is
    whole only inside the teacher's own forward, and every process must run it.
    full_vocabulary: hidden states and head even where log-probs of the tokens would do.
    """
    if batch.teacher_log_probs is not None:
        return {"teacher_log_probs": batch.teacher_log_probs}

    def of_head(hidden, weight, bias):
        if full_vocabulary:
            return {"teacher_hidden": hidden, "teacher_weight": weight, "teacher_bias": bias}
        if bias is None and not sharded:
            return {"teacher_hidden": hidden, "teacher_weight": weight}
        return {"teacher_log_probs": linear_log_probs(  # the fused op has one bias, the student's
            hidden, weight, batch.completion_ids, bias=bias, temperature=config.temperature,
            **head._asdict(),
        )}

    with torch.no_grad():
        return teacher(compute=lambda model: model.get_output_embeddings()(
            teacher_hidden(model, batch, layout, always=sharded), compute=of_head
        ))


def batch_inputs(head, batch, rlsd_lambda, config):
    """The fused loss's arguments that need no forward pass."""
    return head._asdict() | {
        "completion_ids": batch.completion_ids, "advantages": batch.advantages,
        "loss_weights": batch.loss_weights, "old_log_probs": batch.old_log_probs,
        "ref_log_probs": batch.ref_log_probs, "rlsd_lambda": rlsd_lambda, "config": config,
        "reweight_mask": torch.tensor(
            [prompt is not None for prompt in batch.teacher_prompts], device=batch.mask.device
        )[:, None].expand(batch.mask.shape),
    }


def importance_ratio(log_probs, sampling_log_probs, clip_max):
    """(B, T) min(pi_train / pi_sampler, clip_max), without gradient; 1 where the latter is NaN.

    Truncated importance sampling: loss weights times it make a sum over tokens that another engine
    drew an estimate for the policy that is trained, at a bounded variance.
    """
    difference = torch.nan_to_num(log_probs.detach() - sampling_log_probs, nan=0.0)
    return difference.clamp(max=math.log(clip_max)).exp()


def sampling_metrics(batch, log_probs, clip_max):
    """How far the sampler's log-probs lie from (B, T) log_probs of the first training pass.

    Over unmasked tokens of live sequences; the ratio only where it is in the loss (clip_max given).
    """
    drawn = batch.sampling_log_probs
    if drawn is None:
        return {}
    known = batch.mask & ~drawn.isnan()
    if not known.any():
        return {}
    apart = (log_probs - drawn)[known].abs()
    metrics = {
        "sampling/sampling_logp_difference/mean": apart.mean().item(),
        "sampling/sampling_logp_difference/max": apart.max().item(),
    }
    if clip_max is not None:
        ratio = importance_ratio(log_probs, drawn, clip_max)[batch.mask]
        for name in ("min", "mean", "max"):
            metrics[f"sampling/importance_sampling_ratio/{name}"] = getattr(ratio, name)().item()
    return metrics


def policy_gradient(inputs, impl, options=None):
    """rlsd and grpo: the clipped surrogate with re-weighted advantages, method section 1."""
    given = {k: v for k, v in inputs.items() if k != "teacher_bias"}
    return fused_linear_rlsd_loss(impl=impl, return_entropy=True, **given)


def distillation(inputs, impl, options=None):
    """opsd, opd, sdpo: sum_t a_t D(P_T, P_S) over the tokens of sequences that have a teacher."""
    with torch.no_grad():
        out = measured(inputs, impl)
    return out._replace(loss=divergence(inputs, impl, options))


def policy_gradient_and_distillation(inputs, impl, options=None):
    """grpo+opsd: grpo + c * opsd on the same hidden states."""
    own = {k: v for k, v in inputs.items() if not k.startswith("teacher_")}
    out = policy_gradient(own, impl, options)
    extra = options.distillation_coef * divergence(inputs, impl, options)
    return out._replace(loss=out.loss + extra)


def cross_entropy(inputs, impl, options=None):
    """sft: - sum_t a_t log P_S(y_t)."""
    out = measured(inputs, impl)
    live = inputs["loss_weights"] != 0  # a masked log-prob may be -inf
    log_probs = torch.where(live, out.log_probs, 0.0)
    loss = -(inputs["loss_weights"].to(log_probs.dtype) * log_probs).sum()
    return out._replace(loss=loss, log_probs=out.log_probs.detach())


LOSSES = {
    "rlsd": policy_gradient, "grpo": policy_gradient, "opsd": distillation, "opd": distillation,
    "sdpo": distillation, "grpo+opsd": policy_gradient_and_distillation, "sft": cross_entropy,
}


def divergence(inputs, impl, options):
    """sum_t a_t D(P_T, P_S), with its gradient to hidden, weight and bias of the student."""
    names = (
        "hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias",
        "logit_scale", "final_logit_softcapping",
    )
    taught = torch.where(inputs["reweight_mask"], inputs["loss_weights"], 0.0)
    return linear_distillation_loss(
        **{name: inputs[name] for name in names}, loss_weights=taught,
        divergence=options.distillation_divergence, alpha=options.distillation_alpha,
        temperature=inputs["config"].temperature, impl="ref" if impl == "ref" else "auto",
    )


def measured(inputs, impl):
    """RLSDLossOutput of the student alone: log-probs, entropy, and metrics over all its tokens."""
    names = (
        "hidden", "weight", "completion_ids", "bias", "logit_scale", "final_logit_softcapping",
    )
    config = inputs["config"]
    log_probs, entropy = linear_log_probs(
        **{name: inputs[name] for name in names}, temperature=config.temperature,
        return_entropy=True, impl=impl,
    )
    ones = torch.ones_like(inputs["loss_weights"])
    out = rlsd_loss(
        log_probs.detach(), ones, teacher_log_probs=None, loss_weights=inputs["loss_weights"],
        old_log_probs=inputs["old_log_probs"], entropy=entropy.detach(), rlsd_lambda=0.0,
        config=config,
    )
    return out._replace(log_probs=log_probs)


def teacher_prompts(rollout, advantages, rlsd_lambda, step, tokenizer, config):
    """What the teacher reads before each of the B completions: token ids, None where nothing."""
    rows = rollout.rows
    if config.objective == "opd":
        return [row["prompt_ids"] for row in rows]
    if config.objective == "sdpo":
        return sibling_prompts(rollout, step, tokenizer, config)
    if config.objective in DISTILLING:
        return [row["teacher_prompt_ids"] for row in rows]
    weighted = advantages < 0 if config.rlsd_negative_only else advantages != 0
    return [
        row["teacher_prompt_ids"] if rlsd_lambda > 0 and weighs else None
        for row, weighs in zip(rows, weighted.tolist(), strict=True)
    ]


def sibling_prompts(rollout, step, tokenizer, config):
    """sdpo: each question with another completion of its group that succeeded as the hint.

    Which one is drawn by seed and step; None without one, or where the prompt gets over-long.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    good = [
        reward >= config.success_reward_threshold and bool(text.strip())
        for reward, text in zip(rollout.rewards.tolist(), rollout.texts, strict=True)
    ]
    size, limit, prompts = config.num_generations, config.max_teacher_prompt_length, []
    for i, row in enumerate(rollout.rows):
        first = i - i % size
        siblings = [j for j in range(first, first + size) if good[j] and j != i]
        if not siblings:
            prompts.append(None)
            continue
        chosen = siblings[int(torch.randint(len(siblings), (1,), generator=generator))]
        hinted = insert_hint(row["prompt"], rollout.texts[chosen], config.privileged_template)
        ids = encode(hinted, tokenizer, row.get("_images"))
        prompts.append(ids if limit is None or len(ids) <= limit else None)
    return prompts


def has_signal(prompts, advantages, config):
    """(B,) bool: sequences with a gradient; prompts: teacher_prompts of them."""
    taught = torch.tensor([p is not None for p in prompts], device=advantages.device)
    if config.objective == "sft" or config.beta or config.entropy_coef:
        return torch.ones_like(taught)
    if config.objective in DISTILLING and config.objective != "grpo+opsd":
        return taught
    if config.objective in DISTILLING and config.distillation_coef:
        return taught | (advantages != 0)
    return advantages != 0


class Terms(NamedTuple):
    """What one micro-batch contributes."""

    out: RLSDLossOutput
    aux_loss: torch.Tensor  # load-balancing loss of a mixture of experts, else 0
    errors: dict  # deviation_from_ref, if it was asked for


def student_terms(
    model, head, batch, layout, rlsd_lambda, config, teacher, *, impl, options=None, router=None,
    totals=None, check_at=None, sampling_clip_max=None,
):
    """Terms of one micro-batch, student forward included; teacher: its arguments of the loss.

    options: TrainConfig, whose objective is taken (None: rlsd). router, totals: models.Router and
    router_totals. check_at: the step, where the loss is also to be held against impl="ref".
    sampling_clip_max: importance_ratio's, where loss weights are to be multiplied by it; on the
    first pass the head then runs twice, for the ratio comes before the loss.
    """
    objective = functools.partial(LOSSES[options.objective if options else "rlsd"], options=options)
    recorded = [] if router else None
    inputs = teacher | batch_inputs(head, batch, rlsd_lambda, config)

    def of_head(hidden, weight, bias):
        given = inputs | {"hidden": hidden, "weight": weight, "bias": bias}
        if sampling_clip_max is not None and batch.sampling_log_probs is not None:
            old = batch.old_log_probs
            if old is None:
                with torch.no_grad():
                    old = linear_log_probs(
                        hidden, weight, batch.completion_ids, bias=bias, impl=impl,
                        temperature=config.temperature, **head._asdict(),
                    )
            ratio = importance_ratio(old, batch.sampling_log_probs, sampling_clip_max)
            given["loss_weights"] = torch.where(batch.mask, batch.loss_weights * ratio, 0.0)
        errors = {}
        if check_at is not None:
            errors = deviation_from_ref(given, impl, objective)
            require_contract(errors, hidden.dtype, check_at)
        return objective(given, impl), errors

    def terms(model):
        hidden = completion_hidden(
            model, batch.prompts, batch.completion_ids, batch.mask, layout, images=batch.images,
            router_logits=recorded,
        )
        out, errors = model.get_output_embeddings()(hidden, compute=of_head)
        aux = router.loss(recorded, totals) if router else torch.zeros_like(out.loss)
        return Terms(out, aux, errors)

    return model(compute=terms)


@torch.no_grad()
def log_probs_under(model, head, batch, parts, layout, temperature, impl):
    """(B, T) log-probs of the completions after the student's prompts, under any weights."""
    log_probs = torch.zeros_like(batch.loss_weights)
    for rows in parts:
        part = batch.select(rows)

        def of_head(hidden, weight, bias, ids=part.completion_ids):
            return linear_log_probs(
                hidden, weight, ids, bias=bias, temperature=temperature, impl=impl, **head._asdict()
            )

        scored = model(
            compute=lambda model, part=part, of_head=of_head: model.get_output_embeddings()(
                completion_hidden(
                    model, part.prompts, part.completion_ids, part.mask, layout, images=part.images
                ), compute=of_head,
            )
        )
        if rows:
            log_probs[rows, : part.mask.shape[1]] = scored
    return log_probs


@torch.no_grad()
def router_totals(router, model, batch, parts, layout):
    """(tokens sent to each expert, tokens) of all parts: a pass that several of them need."""
    sent, tokens = (torch.zeros(n, device=batch.mask.device) for n in (router.num_experts, ()))
    for rows in parts:
        part, recorded = batch.select(rows), []
        model(compute=lambda model, part=part, recorded=recorded: completion_hidden(
            model, part.prompts, part.completion_ids, part.mask, layout, images=part.images,
            router_logits=recorded,
        ))
        more_sent, _, more_tokens = router.sums(recorded)
        if rows:
            sent, tokens = sent + more_sent, tokens + more_tokens
    return sent, tokens


def token_weights(batch, log_probs, teacher_log_probs, rlsd_lambda, config):
    """(B, T) A_hat / A of the live sequences, 1 where a token is not re-weighted."""
    a_hat = rlsd_advantages(
        batch.advantages, log_probs, teacher_log_probs, rlsd_lambda=rlsd_lambda,
        rlsd_reweight_clip_range=config.rlsd_reweight_clip_range,
    )
    scored = torch.tensor([p is not None for p in batch.teacher_prompts], device=a_hat.device)
    return torch.where(scored[:, None] & batch.mask, a_hat / batch.advantages[:, None], 1.0)


def deviation_from_ref(inputs, impl, objective=policy_gradient):
    """Errors of an implementation against impl="ref" in fp64: loss, log_probs, dh, dw, in a dict.

    objective: one of LOSSES, its options bound. loss and log_probs are absolute, dh and dw relative
    in the Frobenius norm.
    """
    results = []
    for name, dtype in ((impl, None), ("ref", torch.float64)):
        cast = {
            k: v.detach().to(dtype or v.dtype)
            if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in inputs.items()
        }
        cast["hidden"] = cast["hidden"].clone().requires_grad_()
        cast["weight"] = cast["weight"].clone().requires_grad_()
        with torch.enable_grad():
            out = objective(cast, name)
            dh, dw = torch.autograd.grad(out.loss, (cast["hidden"], cast["weight"]))
        results.append((out.loss, out.log_probs, dh, dw))
    (loss, log_probs, *grads), (ref_loss, ref_log_probs, *ref_grads) = results
    errors = {
        "loss": (loss - ref_loss).abs().item(),
        "log_probs": (log_probs - ref_log_probs).abs().max().item() if log_probs.numel() else 0.0,
    }
    for name, got, want in zip(("dh", "dw"), grads, ref_grads, strict=True):
        scale = want.norm().item()
        errors[name] = (got.double() - want).norm().item() / (scale if scale > 0 else 1.0)
    return errors


def require_contract(errors, dtype, step):
    """Stop the run where the fused loss left the precision contract."""
    absolute, relative = CONTRACT[dtype]
    for name, error in errors.items():
        limit = relative if name in ("dh", "dw") else absolute
        if not error <= limit:
            raise UserError(
                f"Step {step}: {name} of the fused loss deviates from the reference by "
                f"{error:.3g}, more than the contract's {limit:g} for {dtype}."
            )
