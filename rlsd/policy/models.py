"""What the trainer needs to know of a causal LM beyond its forward pass.

Its head in the terms of the fused loss and the layout of its passes, both held once against the
model's own outputs; LoRA adapters, fp32 masters of bf16 weights, gradient checkpointing in eval
mode, the load-balancing loss of a mixture of experts, the FLOPs of a step, and running out of
memory as a sentence.
"""

import contextlib
import copy
import functools
import types
import warnings
from typing import NamedTuple

import torch
from torch.utils import checkpoint as recompute
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_flash_attn_2_available

from ..config import UserError
from . import checkpoint, gguf_file
from .distributed import placed
from .packing import Layout, completion_hidden, hidden_states, sharing_refusal

STUDENT, TEACHER = "default", "teacher"  # names of the LoRA adapters; "default" is peft's
# Largest relative deviation of a pass from the model's own: one order of GEMMs against another.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
# Dense bf16 FLOP/s of the vendors' data sheets, by a part of the device's name, longest first.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "H100": 989e12, "H200": 989e12,
    "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12, "L4": 121e12,
}


class Head(NamedTuple):
    """What an LM head does beside weight and bias, as keywords of the fused loss."""

    logit_scale: float
    final_logit_softcapping: float | None


class Policy(NamedTuple):
    """A causal LM with an open forward, and what was verified of it."""

    model: torch.nn.Module
    head: Head
    layout: Layout
    router: "Router | None" = None


def open_policy(model, pad_id, config, *, uniform=False, log=print):
    """The Policy of a model; raises UserError where it computes something else than it promises.

    uniform: Layout's. log: gets one line where prompts cannot be shared.
    """
    head = head_of(model)
    layout = layout_of(model, pad_id, config.padding_free)._replace(uniform=uniform)
    layout = sharing(model, layout, config.share_prompts, log)
    policy = Policy(model, head, layout, router_of(model, config.router_aux_loss_coef))
    open_forward(model)
    return policy


def open_forward(model):
    """Let `model(trunk=f, head=g)` return g(f(model), weight, bias) of its LM head.

    f runs inside the model's forward and g inside the head's, where data-parallel engines gather
    the weights and hook the gradients. Without head it returns f(model).
    """
    @functools.wraps(type(model).forward)  # generate checks its arguments against the signature
    def forward(self, *args, trunk=None, head=None, **kwargs):
        if trunk is None:
            return type(self).forward(self, *args, **kwargs)
        hidden = trunk(self)
        return hidden if head is None else self.get_output_embeddings()(hidden, head=head)

    def head_forward(self, hidden, head=None):
        if head is None:
            return type(self).forward(self, hidden)
        return head(hidden, self.weight, self.bias)

    layer = model.get_output_embeddings()
    model.forward = types.MethodType(forward, model)
    layer.forward = types.MethodType(head_forward, layer)


def load_student(config, path, *, resuming):
    """The model of a run, with a LoRA adapter if it trains one.

    The model stays in eval mode: dropout would score another network than the one that sampled.
    """
    attention = config.attn_implementation
    on_gpu = torch.cuda.is_available() and not config.device.startswith("cpu")
    if attention is None and config.bf16 and on_gpu and is_flash_attn_2_available():
        attention = "flash_attention_2"
    frozen_bf16 = config.bf16 and config.use_peft
    model = checkpoint.load_model(
        path, config.device, dtype=torch.bfloat16 if frozen_bf16 else torch.float32,
        attn_implementation=attention,
    )
    if gguf_file.is_gguf(path):
        model.name_or_path = gguf_file.base_folder(config.output_dir)
    if has_lora(model) and not (resuming and config.use_peft):
        then = "resume it with use_peft" if resuming else "merge it into its model first"
        raise UserError(f"{path} is a LoRA adapter; {then}.")
    if has_lora(model):
        train_lora(model, config, path)
    elif config.use_peft and resuming:
        raise UserError(f"The checkpoint {path} holds no LoRA adapter, but use_peft is set.")
    elif config.use_peft:
        add_lora(model, config)
    if config.use_peft:
        with torch.no_grad():
            for p in adapter_weights(model, STUDENT).values():
                p.data = p.data.float()
    return model


def keep_base(config):
    """The base of the adapters of a run that starts from a .gguf file, as a plain model in its
    folder: its checkpoints then load without the file."""
    path = config.model_name_or_path
    if config.use_peft and gguf_file.is_gguf(path):
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        gguf_file.keep_base(
            checkpoint.load_model(path, "cpu", dtype=dtype), checkpoint.load_tokenizer(path),
            config.output_dir,
        )


def head_terms(config):
    """The Head that a model's config promises."""
    config = config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(scale, getattr(config, "final_logit_softcapping", None))


def head_of(model):
    """The model's head, verified against its own logits; refuses what it cannot reproduce."""
    name, layer = type(model).__name__, model.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        raise UserError(
            f"{name} has no linear LM head to fuse the loss over, but "
            f"{'none' if layer is None else type(layer).__name__}; LoRA must leave the head out."
        )
    head, weight = head_terms(model.config), layer.weight
    ids = torch.arange(1, 9, device=layer.weight.device).remainder(layer.weight.shape[0])[None]
    with torch.no_grad(), _eval_mode(model), _verifying(name):
        want = model(input_ids=ids, use_cache=False).logits.float()
        hidden = hidden_states(model, ids, torch.ones_like(ids)).last_hidden_state
        hidden = hidden.to(weight.dtype)  # a head may be wider than its trunk
        got = torch.nn.functional.linear(hidden, weight, layer.bias).float() * head.logit_scale
        if (cap := head.final_logit_softcapping) is not None:
            got = cap * torch.tanh(got / cap)
    _require_alive(model, got, hidden)
    error = (want - got).abs().max().item()
    if not error <= TOLERANCE[layer.weight.dtype] * max(1.0, want.abs().max().item()):
        raise UserError(
            f"The LM head of {name} computes something beyond weight, bias, scale and softcap "
            f"(its logits differ by {error:.3g}), so the fused loss cannot stand in."
        )
    return head


def _require_alive(model, logits, hidden):
    """Logits of finite weights that overflow, and zeros for weights, are told as what they are."""
    name = type(model).__name__
    if not logits.isfinite().all():
        raise UserError(
            f"The logits of {name} are not finite in {str(hidden.dtype).removeprefix('torch.')}, "
            "though its weights are; set bf16, or take another model."
        )
    if (hidden == hidden[:, :1]).all():
        zero = [n for n, p in model.named_parameters() if p.dim() > 1 and not p.any()]
        why = f", since {len(zero)} of its weights hold zeros only, first {zero[0]}" if zero else ""
        raise UserError(f"{name} computes the same for every token{why}; load trained weights.")


def layout_of(model, pad_id, padding_free):
    """The layout of the passes, verified to keep the sequences of one pass apart."""
    rows = len(model.get_input_embeddings().weight)
    if pad_id >= rows:
        raise UserError(
            f"The tokenizer pads with id {pad_id}, past the {rows} rows of the embedding of "
            f"{type(model).__name__}; name another token as its pad_token, its EOS say, or resize "
            "the embedding and save the model."
        )
    layout = Layout(pad_id, padding_free, getattr(model.config, "image_token_id", None))
    require_layout(model, layout)
    return layout


def require_layout(model, layout):
    """Two sequences in one pass, padded or packed, must be to the model what each is alone."""
    name, device = type(model).__name__, model.get_input_embeddings().weight.device
    completions = torch.tensor([[5, 6, 7], [4, 3, 0]], device=device)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]], device=device).bool()
    prompts = [[3, 4], [7, 6, 5, 4, 3]]
    with torch.no_grad(), _eval_mode(model), _verifying(name):
        got = completion_hidden(model, prompts, completions, mask, layout)
        for i, prompt in enumerate(prompts):
            ids = torch.tensor([[*prompt, *completions[i][mask[i]].tolist()]], device=device)
            out = hidden_states(model, ids, torch.ones_like(ids)).last_hidden_state
            want = out[0, len(prompt) - 1 : -1]
            error = ((got[i][mask[i]] - want).norm() / want.norm()).item()
            if not error <= _tolerance(want.dtype):
                raise UserError(
                    f"{name} does not keep the sequences of one pass apart (hidden states differ "
                    f"by {error:.1%} when {'packed' if layout.padding_free else 'padded'}); "
                    + ("set padding_free to false." if layout.padding_free else
                       "train with per_device_train_batch_size 1 is not enough, since prompts are "
                       "sampled in padded batches; choose another model.")
                )


def sharing(model, layout, share_prompts, log=print):
    """The layout, with prompts shared if that is wanted and the model proves to compute the same.

    share_prompts: auto, which logs one line where it does not; true, which raises UserError; false.
    """
    if share_prompts == "false":
        return layout
    with _eval_mode(model):
        reason = sharing_refusal(model, layout, _tolerance(model.dtype))
    if reason is None:
        return layout._replace(share_prompts=True)
    said = f"{type(model).__name__} {reason}"
    if share_prompts == "true":
        raise UserError(f"share_prompts is true, but {said}; set it to auto or false.")
    log(f"Every completion computes its prompt anew, since {said}.")
    return layout._replace(share_prompts=False)


def require_own_positions(model, furthest):
    """What positions do to a row may not depend on the longest row of its pass.

    longrope changes all frequencies of a pass that reaches original_max_position_embeddings, and a
    row's gradient would then hang on its micro-batch. furthest: how many positions a row may have.
    """
    name, weight = type(model).__name__, model.get_input_embeddings().weight
    ids = torch.arange(3, 9, device=weight.device).remainder(len(weight))[None].expand(2, -1)
    near = torch.arange(6, device=weight.device)
    positions = torch.stack([near, near + max(0, furthest - 6)])
    with torch.no_grad(), _eval_mode(model), _verifying(name):
        alone, beside = (
            hidden_states(
                model, ids[:rows], torch.ones_like(ids[:rows]), position_ids=positions[:rows]
            ).last_hidden_state[0] for rows in (1, 2)
        )
    error = ((alone - beside).norm() / alone.norm()).item()
    if not error <= _tolerance(alone.dtype):
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        limits = [r.get("original_max_position_embeddings") for r in (rope, *rope.values())
                  if isinstance(r, dict)]  # one dict, or one for each type of layer
        within = f", their sum to at most {min(filter(None, limits))}" if any(limits) else ""
        raise UserError(
            f"{name} scales the positions of a whole pass by its longest row, here up to "
            f"{furthest} tokens, so a row's log-probs would depend on those beside it; lower "
            f"max_completion_length, max_prompt_length or max_teacher_prompt_length{within}."
        )


def _tolerance(dtype):
    """In 16 bits a near tie may send a token to another expert; a leak is of order 1."""
    return max(TOLERANCE[dtype], 0.1 if dtype.itemsize == 2 else 0)


@contextlib.contextmanager
def _eval_mode(model):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _verifying(name):
    """A model that cannot run the passes of the trainer is refused in a sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{name} cannot be verified to run as a causal LM with input_ids, attention_mask and "
            f"position_ids ({type(error).__name__}: {checkpoint.reason(error)})."
        ) from error


def add_lora(model, config):
    """Freeze the model and add the student's adapter, in fp32; its B is 0, so nothing changes."""
    from peft import LoraConfig

    targets = config.lora_target_modules
    torch.manual_seed(config.seed)
    try:
        _add_adapter(model, LoraConfig(
            r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=0.0, bias="none",
            target_modules=targets[0] if targets == ["all-linear"] else targets,
            task_type="CAUSAL_LM", base_model_name_or_path=model.name_or_path,
        ), STUDENT)
    except ValueError as error:
        raise UserError(
            f"LoRA does not fit {type(model).__name__} ({checkpoint.reason(error)}); choose "
            "lora_target_modules among its linear layers."
        ) from None


def _add_adapter(model, config, name):
    """By peft itself: transformers' own method refuses releases of peft that fit it."""
    from peft.functional import inject_adapter_in_model, set_adapter

    inject_adapter_in_model(config, model, name)
    model._hf_peft_config_loaded = True  # transformers' mark of a model with adapters
    set_adapter(model, name)


def train_lora(model, config, path):
    """Make the loaded adapter of a checkpoint trainable, after checking that it is the run's."""
    saved = model.peft_config[STUDENT]
    for name, of_checkpoint in (("lora_r", saved.r), ("lora_alpha", saved.lora_alpha)):
        if getattr(config, name) != of_checkpoint:
            raise UserError(
                f"The checkpoint {path} holds an adapter with {name} {of_checkpoint}, but {name} "
                f"is {getattr(config, name)}; a resumed run keeps it."
            )
    from peft.functional import set_adapter

    model.requires_grad_(False)
    set_adapter(model, STUDENT)


def has_lora(model):
    return bool(getattr(model, "peft_config", None))


def adapter_weights(model, name):
    """{parameter name without the adapter's: parameter} of one LoRA adapter."""
    return {
        key.replace(f".{name}.", "."): p for key, p in model.named_parameters()
        if f".{name}." in key and ".lora_" in key
    }


def add_teacher_adapter(model):
    """A second adapter, equal to the student's now; megabytes beside one model for both."""
    from peft.functional import set_adapter

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        _add_adapter(model, copy.deepcopy(model.peft_config[STUDENT]), TEACHER)
    set_adapter(model, STUDENT)
    student, teacher = (adapter_weights(model, name) for name in (STUDENT, TEACHER))
    with torch.no_grad():
        for name, p in teacher.items():
            p.data = student[name].detach().clone()


@contextlib.contextmanager
def using_adapter(model, name):
    """Run the model with another adapter, or with none; the student's comes back after."""
    from peft.functional import set_adapter
    from peft.tuners.tuners_utils import BaseTunerLayer

    def enable(enabled):
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(enabled)

    if name is None:
        enable(False)
    else:
        set_adapter(model, name)
    try:
        yield model
    finally:
        enable(True)
        set_adapter(model, STUDENT)


class MasterWeights:
    """What the optimizer moves: fp32 weights, of which a bf16 model holds rounded copies.

    Per trained parameter 2 bytes run the passes and the rollout, 4 are the master, 4 its gradient,
    summed in fp32 over micro-batches, 8 the moments: 18, as autocast with its cache of casts, but
    teacher and reference copies then take 2 bytes, not 4, and generation casts nothing. In fp32,
    and for the adapters of LoRA, the parameters are their own masters; sharded too, because FSDP2
    rounds what it gathers.
    """

    def __init__(self, model, to_bf16, *, sharded=False):
        self.pairs, self.masters, self.hooks, self.bf16 = [], [], [], to_bf16
        for p in model.parameters():
            master = p
            if to_bf16 and p.dtype == torch.float32 and not sharded and not has_lora(model):
                # The rounded copy is made per parameter: buffers as of rotary positions stay fp32.
                master = torch.nn.Parameter(p.data, requires_grad=p.requires_grad)
                p.data = p.data.bfloat16()
                self.hooks.append(p.register_post_accumulate_grad_hook(
                    functools.partial(_hand_over, master)
                ))
                self.pairs.append((p, master))
            if p.requires_grad:
                self.masters.append(master)

    def undo(self):
        """The model gets its fp32 weights back, as if it had no masters."""
        for hook in self.hooks:
            hook.remove()
        for p, master in self.pairs:
            p.data = master.data
        self.pairs, self.masters = [], []  # which would keep them on the device

    @torch.no_grad()
    def publish(self):
        """The model's copies follow their masters."""
        for p, master in self.pairs:
            p.copy_(master)

    def state_dict(self):
        """The masters under bf16, where the model's files are rounded; else None."""
        return [master.detach() for master in self.masters] if self.bf16 else None

    @torch.no_grad()
    def load_state_dict(self, saved):
        """Inverse of state_dict."""
        if (saved is not None) != self.bf16:
            raise ValueError(f"it was written {'without' if saved is None else 'with'} bf16")
        for master, value in zip(self.masters, saved or self.masters, strict=True):
            master.copy_(placed(value, master))
        self.publish()

    def files(self, weights):
        """The model's weights, {name: tensor}, as its files hold them: rounded where it is bf16."""
        if not self.bf16:
            return weights
        return {
            name: w.bfloat16() if w is not None and w.is_floating_point() else w
            for name, w in weights.items()
        }


def _hand_over(master, p):
    """A gradient leaves the bf16 parameter for its master, where micro-batches add up in fp32."""
    if master.grad is None:
        master.grad = p.grad.float()
    else:
        master.grad.add_(p.grad)
    p.grad = None


def checkpoint_layers(model):
    """Recompute every layer in backward, in eval mode too.

    transformers' own switch acts in train mode only, where dropout would score another network.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no layers that could be recomputed; set "
            "gradient_checkpointing to false."
        )
    for layer in layers:
        layer.forward = functools.partial(_recomputed, layer.forward)


def _recomputed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return recompute.checkpoint(
        forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
    )


class Router(NamedTuple):
    """Load-balancing loss of a mixture of experts, transformers' load_balancing_loss_func:

        coefficient * E * sum_e f_e P_e,    f_e = share of tokens sent to e, P_e = mean probability

    over all layers and all tokens of the live sequences. Only P has a gradient, and with f of the
    whole batch the loss is a sum over tokens, so that micro-batches add up exactly.
    """

    coefficient: float
    num_experts: int
    top_k: int

    def sums(self, recorded):
        """(tokens sent, probabilities, tokens), summed over [(logits per layer, how often), ...].

        How often: (tokens,) in the batch, where a shared prompt counts for each of its rows.
        """
        sent = probabilities = tokens = 0.0
        for layers, times in recorded:
            for logits in layers:
                probs = logits.softmax(-1)
                chosen = torch.zeros_like(probs).scatter_(1, probs.topk(self.top_k).indices, 1.0)
                sent = sent + (chosen.float() * times[:, None]).sum(0)
                probabilities = probabilities + (probs.float() * times[:, None]).sum(0)
                tokens = tokens + times.sum()
        return sent.detach(), probabilities, tokens

    def loss(self, recorded, totals=None):
        """The part of one micro-batch; totals: (sent, tokens) of the batch unless that is all."""
        sent, probabilities, tokens = self.sums(recorded)
        sent, tokens = totals or (sent, tokens)
        return self.coefficient * self.num_experts * (sent * probabilities).sum() / tokens**2


def router_of(model, coefficient):
    """The model's load-balancing loss, verified against its own, or None where it has no weight."""
    config, name = model.config.get_text_config(), type(model).__name__
    if coefficient is None:
        own = getattr(config, "output_router_logits", False)
        coefficient = getattr(config, "router_aux_loss_coef", 0.0) if own else 0.0
    if not coefficient:
        return None
    if getattr(config, "router_aux_loss_coef", None) is None:
        raise UserError(
            f"router_aux_loss_coef is {coefficient:g}, but {name} has no router with a "
            "load-balancing loss; leave it out."
        )
    with torch.no_grad(), _eval_mode(model), _verifying(name):
        router = Router(float(coefficient), model.num_experts, model.num_experts_per_tok)
        ids = torch.arange(3, 9, device=model.get_input_embeddings().weight.device)[None]
        out = model(input_ids=ids, use_cache=False, output_router_logits=True)
        mask = torch.ones_like(ids[0], dtype=torch.bool)
        got = router.loss([(out.router_logits, mask)]).item()
    want = coefficient * float(out.aux_loss)
    if not abs(got - want) <= 1e-2 * abs(want):
        raise UserError(
            f"The load-balancing loss of {name} is {want:.3g} where ours is {got:.3g}; set "
            "router_aux_loss_coef to 0."
        )
    return router


class Flops:
    """Multiply-adds, counted as two, of the passes over given sequences; nothing recomputed."""

    def __init__(self, model):
        config = model.config.get_text_config()
        looked_up = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
        skip = {id(m.weight) for m in [*looked_up, model.get_output_embeddings()]}
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        share = config.num_experts_per_tok / experts if experts else 1.0
        self.per_token = 2 * sum(
            p.numel() * (share if ".experts." in name else 1.0)
            for name, p in model.base_model.named_parameters() if p.dim() > 1 and id(p) not in skip
        )
        width = config.hidden_size
        if getattr(config, "head_dim", None):
            width = config.num_attention_heads * config.head_dim
        self.per_pair = 2 * config.num_hidden_layers * width  # q k and p v, half of them masked
        self.head = 2 * model.get_output_embeddings().weight.numel()
        self.backward = 1 if has_lora(model) else 2  # dx, and dw unless the weights are frozen
        self.head_backward = 2 if model.get_output_embeddings().weight.requires_grad else 1

    def scoring(self, lengths, completion_tokens):
        """Of one forward pass over sequences, and of the head on their completions."""
        trunk = sum(self.per_token * n + self.per_pair * n * n for n in lengths)
        return trunk + self.head * completion_tokens

    def update(self, batch, config, spared=((), ())):
        """Of all passes of an update; an external teacher counts as if it were the student.

        spared: Batch.spared.
        """
        tokens, own = batch.seen.sum(1).tolist(), batch.mask.sum(1).tolist()
        lengths = [len(p) + n for p, n in zip(batch.prompts, tokens, strict=True)]
        hinted = [
            (len(p) + n, k) for p, n, k in zip(batch.teacher_prompts, tokens, own, strict=True) if p
        ]
        student = (
            (self.scoring(lengths, 0) - self.scoring(spared[0], 0)) * (1 + self.backward)
            + self.head * sum(own) * (1 + self.head_backward)
        )
        teacher = self.scoring([n for n, _ in hinted], sum(k for _, k in hinted))
        teacher -= self.scoring(spared[1], 0)
        again = config.teacher_model_kind == "live" or config.method.distils
        passes = config.num_iterations if again else 1
        hints = batch.hints or [()] * len(tokens)
        before = [(len(p), n) for ps, n in zip(hints, tokens, strict=True) for p in ps]
        contrast = self.scoring([p + n for p, n in before], sum(n for _, n in before))
        contrast -= sum(self.scoring(lengths, 0) for lengths in spared[2:])
        return config.num_iterations * student + passes * teacher + contrast


def peak_flops(device):
    """Dense bf16 FLOP/s of a GPU by its name, or None where no data sheet is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
