"""What one micro-batch adds to the update, and its check against the specification.

The way through it: teacher_inputs (a pass of the teacher in the privileged context), then
student_terms (a pass of the student, and the objective's loss over its head). A pass is
model(trunk=..., head=...): two functions that run in this order inside the forward of the model and
of its head (models.open_forward says why).
"""

import contextlib
import math
from typing import NamedTuple

import torch

from rlsd_kernels import (
    RLSDLossConfig,
    RLSDLossOutput,
    aggregation_weights,
    linear_log_probs,
    rlsd_advantages,
)

from ..config import UserError
from ..objectives import policy_gradient
from .advantages import (
    contrast,
    contrast_advantages,
    lambda_of,
    rlcsd_advantages,
    rlcsd_loss_weights,
)
from .hints import contrast_hints, teacher_prompts, weighed
from .packing import completion_hidden, labels, micro_batches, spared

# Largest deviation from fp64 that each input dtype may show at small logits: log-probs absolute,
# gradients relative in the Frobenius norm (the precision contract).
CONTRACT = {
    torch.float64: (1e-9, 1e-9), torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-4, 4e-3), torch.float16: (1e-4, 4e-3),
}
# A log-prob is a difference of numbers as large as the largest logit, so its rounding grows like
# eps |z|; H hardly matters. In that unit, for |z| of 5 to 100, H of 64 to 4096, spiky activations
# too: plain fp32 PyTorch up to 4.2 (4.6 on SmolLM2-135M, |z| = 46), ours 3.5; bf16 logits 12,000.
ROUNDINGS = 8


class Stopped(UserError):
    """Raised in every process of a run, before an update: nothing need be lost."""


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
    hints: list | None = None  # prompts that a contrast reads, [correct, wrong, ..] of each, or []
    a_hat: torch.Tensor | None = None  # where it is known before the loss, which has lambda 0 then
    completion_mask: torch.Tensor | None = None  # tools' tokens too, which are context; None: mask

    @property
    def seen(self):
        """(B, T) bool: the tokens that a pass over the completions reads."""
        return self.mask if self.completion_mask is None else self.completion_mask

    def contexts(self):
        """([labels of the student's prompts, of the teacher's], tokens of the completions)."""
        prompts = [labels(own, self.images) for own in (self.prompts, self.teacher_prompts)]
        return prompts, self.seen.sum(1).tolist()

    def micro_batches(self, config, layout):
        """Those of all processes."""
        return micro_batches(
            *self.contexts(), config.per_device_train_batch_size,
            config.max_tokens_per_micro_batch, layout,
        )

    def spared(self, config, layout):
        """[Lengths of prompts that the student's, the teacher's passes need not forward again], and
        those of the passes that a contrast needs before the loss."""
        prompts, completions = self.contexts()
        parts = self.micro_batches(config, layout)
        found = [spared(own, completions, parts, layout) for own in prompts]
        if any(self.hints or ()):
            found.append(self.under_hints()[0]._replace(hints=None).spared(config, layout)[0])
        return found

    def under_hints(self):
        """(Batch of every sequence after every hint of it, its sequence, its place in hints).

        The same prompts lie side by side, so that passes can share them.
        """
        pairs = [(i, k) for i, prompts in enumerate(self.hints) for k in range(len(prompts))]
        order = {}
        for i, k in pairs:
            order.setdefault(tuple(self.hints[i][k]), len(order))
        pairs.sort(key=lambda pair: order[tuple(self.hints[pair[0]][pair[1]])])
        rows, places = [i for i, _ in pairs], [k for _, k in pairs]
        part = self.select(rows)
        return part._replace(prompts=[self.hints[i][k] for i, k in pairs]), rows, places

    def select(self, rows):
        """The sequences `rows` (index list), cut to their longest completion.

        No rows: the first one without weight, for a process that only keeps the others company.
        """
        if not rows:
            part = self.select([0])
            return part._replace(loss_weights=torch.zeros_like(part.loss_weights))
        width = int(self.seen[rows].sum(1).max())
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
        batch.seen[need], layout, images=[batch.images[i] for i in need],
    )
    teacher.train(training)
    hidden = scored.new_zeros(shape)
    hidden[need] = scored
    return hidden


@torch.no_grad()
def teacher_inputs(policy, batch, config, *, full_vocabulary=False, sharded=False):
    """The loss's arguments on the teacher for one micro-batch, its forward included.

    policy: the student's with the teacher's model. Its head runs inside the fused op: with one
    guess of the log-sum-exp for both contexts, equal hidden states give equal log-probs to the bit,
    and dead rows cost nothing. A sharded head is whole only inside the teacher's own forward, and
    every process must run it. full_vocabulary: hidden states and head even where log-probs of the
    tokens would do.
    """
    if batch.teacher_log_probs is not None:
        return {"teacher_log_probs": batch.teacher_log_probs}

    def trunk(model):
        return teacher_hidden(model, batch, policy.layout, always=sharded)

    def head(hidden, weight, bias):
        if full_vocabulary:
            return {"teacher_hidden": hidden, "teacher_weight": weight, "teacher_bias": bias}
        if bias is None and not sharded:
            return {"teacher_hidden": hidden, "teacher_weight": weight}
        return {"teacher_log_probs": linear_log_probs(  # the fused op has one bias, the student's
            hidden, weight, batch.completion_ids, bias=bias, temperature=config.temperature,
            **policy.head._asdict(),
        )}

    return policy.model(trunk=trunk, head=head)


def batch_inputs(head, batch, rlsd_lambda, config):
    """The fused loss's arguments that need no forward pass."""
    return head._asdict() | {
        "completion_ids": batch.completion_ids,
        "advantages": batch.advantages if batch.a_hat is None else batch.a_hat,
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


def training_batch(rollout, mask, advantages, step, tokenizer, config, score):
    """(Batch of the sequences with a gradient, their indices, metrics of their hints).

    mask: (B, T) loss_mask of the rollout. score: as of reweighted.
    """
    lam = lambda_of(config, step)
    read = rollout, advantages, lam, step, tokenizer, config
    batch, live = live_batch(
        rollout, mask, advantages, teacher_prompts(*read), config, contrast_hints(*read)
    )
    batch, metrics = reweighted(batch, live, mask, score, lam, config)
    return batch, live, metrics


def has_signal(prompts, advantages, config):
    """(B,) bool: sequences with a gradient; prompts: teacher_prompts of them."""
    taught = torch.tensor([p is not None for p in prompts], device=advantages.device)
    method = config.method
    if method.supervised or config.beta or config.entropy_coef:
        return torch.ones_like(taught)
    if not method.policy_gradient:
        return taught
    if method.distils and config.distillation_coef:
        return taught | (advantages != 0)
    return advantages != 0


def live_batch(rollout, mask, advantages, privileged, config, hints=None):
    """(Batch of the sequences with a gradient, their indices).

    mask: (B, T) loss_mask of the rollout; privileged, hints: teacher_prompts and contrast_hints of
    it. Aggregation weights come from the whole rollout, so dropping and micro-batching are exact.
    """
    weights = aggregation_weights(
        mask, config.loss_type, max_completion_length=config.max_completion_length
    )
    alive = mask.any(1) & has_signal(privileged, advantages, config)
    live, drawn = alive.nonzero().squeeze(1).tolist(), rollout.sampling_log_probs
    return Batch(
        prompts=[rollout.rows[i]["prompt_ids"] for i in live],
        teacher_prompts=[privileged[i] for i in live],
        images=[rollout.rows[i].get("_images") for i in live],
        completion_ids=rollout.completion_ids[live], mask=mask[live],
        advantages=advantages[live], loss_weights=weights[live],
        sampling_log_probs=None if drawn is None else drawn[live],
        hints=None if hints is None else [hints[i] for i in live],
        completion_mask=rollout.mask[live],
    ), live


@torch.no_grad()
def reweighted(batch, live, mask, score, rlsd_lambda, config):
    """(batch, metrics): what siblings as hints do before the loss; without them, as it came.

    batch, live: live_batch's of a rollout with loss_mask `mask`. score: Batch -> (B, T) log-probs
    after its prompts, by the teacher. A contrast fills in a_hat, and rlcsd loss_weights too, from
    the selected tokens of the whole rollout.
    """
    a, wanted = batch.advantages[:, None], weighed(batch.advantages, config)
    if not rlsd_lambda or not config.reads_siblings() or not config.method.reweights:
        return batch, {}
    given = batch.teacher_prompts if batch.hints is None else batch.hints
    given = torch.tensor([bool(ids) for ids in given], dtype=torch.bool, device=wanted.device)
    metrics = {"rlsd/contrast_missing_frac": _mean((~given).double(), wanted)}
    if batch.hints is None:
        return batch, metrics
    evidence = evidence_of(batch, score, config.rlsd_contrast_hints)
    alive = batch.mask & (a != 0)
    chosen = alive & (wanted & given)[:, None]
    common = {
        "rlsd_lambda": rlsd_lambda, "rlsd_negative_only": config.rlsd_negative_only,
        "reweight_mask": chosen,
    }
    if config.method.selects:
        names = ("rlcsd_beta", "rlcsd_tau", "rlcsd_clip", "rlcsd_threshold")
        a_hat, selected = rlcsd_advantages(
            batch.advantages, evidence, **{name: getattr(config, name) for name in names}, **common
        )
        of_all = torch.zeros_like(mask)
        of_all[live] = selected
        batch = batch._replace(loss_weights=rlcsd_loss_weights(
            mask, of_all, config.rlcsd_eta, config.loss_type,
            max_completion_length=config.max_completion_length,
        )[live])
        metrics["rlcsd/selected_frac"] = _mean(selected.double(), alive)
    else:
        eps_w = config.rlsd_reweight_clip_range
        a_hat = contrast_advantages(
            batch.advantages, evidence, rlsd_reweight_clip_range=eps_w, **common
        )
        low, high = config.loss_config().log_weight_bounds
        signed = torch.sign(a) * evidence
        metrics["rlsd/clip_low_frac"] = _mean((signed < low).double(), chosen)
        metrics["rlsd/clip_high_frac"] = _mean((signed > high).double(), chosen)
    for name, value, tokens in (("contrast", evidence, chosen), ("weight", a_hat / a, alive)):
        metrics[f"rlsd/{name}_mean_pos"] = _mean(value, tokens & (a > 0))
        metrics[f"rlsd/{name}_mean_neg"] = _mean(value, tokens & (a < 0))
    # At exactly 0 a token would leave the log-probs and metrics; this is 0 to every gradient.
    stopped = (a_hat == 0) & (a != 0)
    a_hat = torch.where(stopped, torch.sign(a) * torch.finfo(a_hat.dtype).tiny, a_hat)
    return batch._replace(a_hat=a_hat), metrics | {"rlsd/effective_lambda": rlsd_lambda}


def evidence_of(batch, score, count):
    """(B, T) e_t of a Batch with 1 + at most `count` hints each; 0 without. score: of reweighted.
    """
    log_probs = batch.loss_weights.new_zeros((1 + count, *batch.mask.shape))
    present = torch.zeros_like(log_probs[:, :, :1], dtype=torch.bool)
    if any(batch.hints):
        asked, rows, places = batch.under_hints()
        scored = score(asked)
        log_probs[places, rows, : scored.shape[1]] = scored.to(log_probs.dtype)
        present[places, rows] = True
    return contrast(log_probs[0], log_probs[1:], present[1:])


def _mean(values, where):
    """Over a bool mask; NaN over nothing."""
    return values.double()[where].mean().item()


class Terms(NamedTuple):
    """What one micro-batch contributes."""

    out: RLSDLossOutput
    aux_loss: torch.Tensor  # load-balancing loss of a mixture of experts, else 0
    deviation: tuple | None  # deviation_from_ref, if it was asked for


class Passed(NamedTuple):
    """What one pass over a batch gave: sums of all processes, (B, T) outputs of this one's rows."""

    loss: float
    aux_loss: float
    log_probs: torch.Tensor
    teacher_log_probs: torch.Tensor
    stats: list  # of each micro-batch
    errors: dict


def student_terms(
    policy, batch, teacher, rlsd_lambda, loss_config, options, *, totals=None, check=False
):
    """Terms of one micro-batch, student forward included.

    teacher: teacher_inputs of it, {} without one. options: TrainConfig, whose objective is taken.
    totals: router_totals of the batch. check: whether to hold the loss against impl="ref" too.
    """
    recorded = [] if policy.router else None
    inputs = teacher | batch_inputs(policy.head, batch, rlsd_lambda, loss_config)

    def trunk(model):
        return completion_hidden(
            model, batch.prompts, batch.completion_ids, batch.seen, policy.layout,
            images=batch.images, router_logits=recorded,
        )

    def head(hidden, weight, bias):
        given = inputs | {"hidden": hidden, "weight": weight, "bias": bias}
        given["loss_weights"] = corrected_weights(given, batch, options)
        given["gradient_tolerance"] = options.gradient_tolerance
        objective, deviation = options.method.loss, None
        if check:
            deviation = deviation_from_ref(given, options.impl, objective, options)
        out = objective(given, options.impl, options)
        aux = policy.router.loss(recorded, totals) if policy.router else out.loss.new_zeros(())
        return Terms(out, aux, deviation)

    return policy.model(trunk=trunk, head=head)


def corrected_weights(inputs, batch, options):
    """(B, T) loss weights, times importance_ratio where the run corrects for its sampler.

    On the first pass over a batch the head then runs twice, for the ratio comes before the loss.
    """
    clip_max = options.sampling_clip_max()
    if clip_max is None or batch.sampling_log_probs is None:
        return inputs["loss_weights"]
    old = inputs["old_log_probs"]
    if old is None:
        names = (
            "hidden", "weight", "completion_ids", "bias", "logit_scale", "final_logit_softcapping",
        )
        with torch.no_grad():
            old = linear_log_probs(
                **{name: inputs[name] for name in names}, impl=options.impl,
                temperature=inputs["config"].temperature,
            )
    ratio = importance_ratio(old, batch.sampling_log_probs, clip_max)
    return torch.where(batch.mask, inputs["loss_weights"] * ratio, 0.0)


@torch.no_grad()
def log_probs_under(policy, batch, parts, temperature, impl):
    """(B, T) log-probs of the completions after the student's prompts, under any weights."""
    log_probs = torch.zeros_like(batch.loss_weights)
    for rows in parts:
        scored = _log_probs(policy, batch.select(rows), temperature, impl)
        if rows:
            log_probs[rows, : scored.shape[1]] = scored
    return log_probs


def _log_probs(policy, part, temperature, impl):
    """(B, T) of one micro-batch."""
    def trunk(model):
        return completion_hidden(
            model, part.prompts, part.completion_ids, part.seen, policy.layout, images=part.images
        )

    def head(hidden, weight, bias):
        return linear_log_probs(
            hidden, weight, part.completion_ids, bias=bias, temperature=temperature, impl=impl,
            **policy.head._asdict(),
        )

    return policy.model(trunk=trunk, head=head)


@torch.no_grad()
def router_totals(policy, batch, parts):
    """(tokens sent to each expert, tokens) of all parts: a pass that several of them need."""
    router, device = policy.router, batch.mask.device
    sent, tokens = (torch.zeros(n, device=device) for n in (router.num_experts, ()))
    for rows in parts:
        part, recorded = batch.select(rows), []

        def trunk(model, part=part, recorded=recorded):
            return completion_hidden(
                model, part.prompts, part.completion_ids, part.seen, policy.layout,
                images=part.images, router_logits=recorded,
            )

        policy.model(trunk=trunk)
        more_sent, _, more_tokens = router.sums(recorded)
        if rows:
            sent, tokens = sent + more_sent, tokens + more_tokens
    return sent, tokens


def token_weights(batch, log_probs, teacher_log_probs, rlsd_lambda, config):
    """(B, T) A_hat / A of the live sequences, 1 where a token is not re-weighted."""
    if batch.a_hat is not None:
        a = batch.advantages[:, None]
        return torch.where(batch.mask & (a != 0), batch.a_hat / a, 1.0)
    a_hat = rlsd_advantages(
        batch.advantages, log_probs, teacher_log_probs, rlsd_lambda=rlsd_lambda,
        rlsd_reweight_clip_range=config.rlsd_reweight_clip_range,
    )
    scored = torch.tensor([p is not None for p in batch.teacher_prompts], device=a_hat.device)
    return torch.where(scored[:, None] & batch.mask, a_hat / batch.advantages[:, None], 1.0)


def deviation_from_ref(inputs, impl, objective=policy_gradient, options=None):
    """(errors, limits) of an implementation against impl="ref" in fp64, each a dict of four.

    loss and log_probs are absolute, dh and dw relative in the Frobenius norm; limits are
    contract_limits. objective, options: Objective.loss and what it takes.
    """
    results = []
    for name, dtype in ((impl, None), ("ref", torch.float64)):
        cast = {
            k: v.detach().to(dtype or v.dtype)
            if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in inputs.items()
        }
        if name == "ref":
            cast["gradient_tolerance"] = 0.0
        cast["hidden"] = cast["hidden"].clone().requires_grad_()
        cast["weight"] = cast["weight"].clone().requires_grad_()
        with torch.enable_grad():
            out = objective(cast, name, options)
            dh, dw = torch.autograd.grad(out.loss, (cast["hidden"], cast["weight"]))
        results.append((out.loss, out.log_probs, dh, dw))
    (loss, log_probs, *grads), (ref_loss, ref_log_probs, *ref_grads) = results
    errors = {
        "loss": (loss - ref_loss).abs().item(),
        "log_probs": (log_probs - ref_log_probs).abs().max().item() if log_probs.numel() else 0.0,
    }
    norms = [want.norm().item() or 1.0 for want in ref_grads]
    for name, got, want, norm in zip(("dh", "dw"), grads, ref_grads, norms, strict=True):
        errors[name] = (got.double() - want).norm().item() / norm
    coef = options.distillation_coef if options else 0.0
    limits = contract_limits(cast, inputs["hidden"].dtype, norms, coef)
    for name in ("dh", "dw"):  # of D's error; W's common directions let dh's come out larger
        limits[name] += 5 * inputs.get("gradient_tolerance", 0.0)
    return errors, limits


@torch.no_grad()
def contract_limits(inputs, dtype, norms, distillation_coef=0.0):
    """How far loss, log_probs, dh and dw of inputs in this dtype may lie from fp64, in a dict.

    inputs: the loss's arguments in fp64; norms: of dh and dw. Where p(y) is nearly 1, dlogits =
    a g (p - onehot) is a small difference too, so gradients may always be off by what the error of
    p, at most that of a log-prob, makes of them.
    """
    absolute, relative = CONTRACT[dtype]
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    weights, advantages = inputs["loss_weights"].abs(), inputs["advantages"].abs()
    live = weights != 0
    if advantages.dim() < weights.dim():
        advantages = advantages[:, None].expand_as(weights)
    coefficients = (weights * advantages.clamp(min=max(1.0, distillation_coef)))[live]
    config = inputs.get("config", RLSDLossConfig())
    per_logit = inputs.get("logit_scale", 1.0) / config.temperature
    rounding = max(absolute, ROUNDINGS * eps * per_logit * _largest_product(inputs, live))
    targets = inputs["weight"][inputs["completion_ids"][live]].norm(dim=-1)
    carried = targets, inputs["hidden"][live].norm(dim=-1)  # by one wrong p, into dh and dw
    return {
        "loss": rounding * max(1.0, coefficients.sum().item()), "log_probs": rounding,
    } | {
        name: max(relative, rounding * per_logit * (coefficients * by).norm().item() / norm)
        for name, by, norm in zip(("dh", "dw"), carried, norms, strict=True)
    }


def _largest_product(inputs, live):
    """Largest |h W^T + b| of live rows in both contexts, before scale, softcap and temperature."""
    largest = 0.0
    for context in ("", "teacher_"):
        hidden = inputs.get(f"{context}hidden")
        if hidden is None or not live.any():
            continue
        weight, bias = (
            inputs.get(name) if inputs.get(f"{context}{name}") is None
            else inputs[f"{context}{name}"] for name in ("weight", "bias")
        )
        for rows in hidden[live].split(128):
            logits = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
            largest = max(largest, logits.abs().max().item())
    return largest


def require_contract(errors, limits, step):
    """Stop the run where the fused loss left the precision contract."""
    for name, error in errors.items():
        if not error <= limits[name]:  # NaN is not
            raise Stopped(
                f"Step {step}: {name} of the fused loss deviates from the reference by "
                f"{error:.3g}, more than the {limits[name]:.3g} that the precision contract allows "
                "for inputs of this kind and size, so training stopped before this update; report "
                "it, and train on with another impl."
            )


@contextlib.contextmanager
def memory_named(doing, lower):
    """Out of memory becomes a sentence that says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not full and "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(f"Out of memory while {doing}; lower {lower}.") from error
