"""Which implementation runs, the shared argument checks, and the differentiable log-prob op.

    linear_log_probs(h, W, y) = log_softmax(softcap(logit_scale (h W^T + b)) / temperature)[y]

Forward 2 NHV FLOP and 4 N bytes of result instead of N x V logits. If exp(z - c) of all rows fits
the workspace it is kept and backward only forms dh and dW (4 NHV), for any loss on top; otherwise
backward recomputes logits by chunk (another 2 NHV).
"""

import importlib
import importlib.util
import logging
import math
import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import extension, gemm, pipeline, ref, torch_impl
from .config import check_flags, check_number, compute_dtype, constant_when_compiled
from .gradients import Kept
from .ops import (
    Need,
    custom_op,
    differentiable_once,
    empty_gradients,
    flatten,
    unflatten,
)
from .rows import Head, Upstream
from .shards import Shard, shard_of
from .tuning import default_workspace_bytes

logger = logging.getLogger("rlsd_kernels")
IMPLS = ("auto", "cuda", "triton", "torch", "ref")
_announced = set()


def _triton_interpreted():
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@constant_when_compiled
def _triton_status(device_index):
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install triton`, or use impl='torch'."
    if _triton_interpreted():
        return "ok"
    if not torch.cuda.is_available():
        return (
            "the Triton implementation needs a GPU and none is available here; use impl='torch', "
            "or set TRITON_INTERPRET=1 to test the kernels on the CPU."
        )
    if torch.version.hip is None and torch.cuda.get_device_capability(device_index) < (8, 0):
        return "the Triton implementation needs an NVIDIA GPU of sm_80 or later; use impl='torch'."
    return "ok"


@constant_when_compiled
def _cuda_status():
    return extension.status()


def available_impls(tensor=None):
    """Dict of implementation name -> "ok", or the reason in one sentence why it cannot run here.

    With a tensor: on its device, for its dtype.
    """
    status = {
        "cuda": _cuda_status(),
        "triton": _triton_status(None if tensor is None else tensor.device.index),
        "torch": "ok",
        "ref": "ok",
    }
    if tensor is None:
        return status
    for name, interpreted in (("cuda", False), ("triton", _triton_interpreted())):
        if status[name] != "ok":
            continue
        if tensor.dtype == torch.float64:
            status[name] = "it computes in fp32, but the inputs are fp64; use impl='torch'."
        elif not tensor.is_cuda and not interpreted:
            status[name] = (
                f"its kernels need tensors on a GPU, but got {tensor.device}; use impl='torch'."
            )
    return status


# Triton before CUDA, which does the same passes: it needs no nvcc on the machine, and neither is
# the faster in every table of bench/results/nvidia_h100_80gb_hbm3.
ON_GPU = ("triton", "cuda", "torch")


def choose_impl(impl, tensor, on_gpu=ON_GPU):
    """The name of the implementation that runs on tensor's device and dtype.

    on_gpu: those that the op has there, the best first. `auto` takes the first that can run and
    logs which, once: a WARNING that says why if a better one cannot, else at level INFO.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, but got {impl!r}.")
    status = available_impls(tensor)
    if impl != "auto":
        if status[impl] != "ok":
            raise ValueError(f"impl={impl!r} cannot run: {status[impl]}")
        return impl
    # Triton's interpreter is a debugger, never chosen.
    ranked = on_gpu if tensor.is_cuda else ("torch",)
    chosen = next(name for name in ranked if status[name] == "ok")
    if (chosen, tensor.is_cuda) not in _announced and not torch.compiler.is_compiling():
        _announced.add((chosen, tensor.is_cuda))
        passed = [f"{x}: {status[x]}" for x in ranked[: ranked.index(chosen)]]
        logger.log(
            logging.WARNING if passed else logging.INFO,
            "impl='auto' runs %r for %s inputs on %s.%s", chosen, tensor.dtype,
            tensor.device.type, " Passed over " + " ".join(passed) if passed else "",
        )
    return chosen


def load_impl(name):
    """The module that holds the kernels of an implementation; Triton is imported on first use."""
    # Import statements: torch.compile refuses to trace importlib.
    if name == "triton":
        from . import triton_impl as module
    elif name == "cuda":
        from . import cuda_impl as module
    else:
        module = torch_impl
    return module


def check_tensor(name, value, *, shape=None, like=None, kind="float", why=""):
    """Raise TypeError or ValueError in one sentence unless value is the tensor that is needed."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, but got {type(value).__name__}.")
    if type(value).__name__ == "DTensor":  # importing its class takes seconds
        raise TypeError(
            f"{name} is a DTensor; call this inside the module's forward, where FSDP2 has gathered "
            "it, or pass full_tensor(), or a vocabulary shard's to_local() with tp_group."
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be dense, but its layout is {value.layout}; call to_dense().")
    kinds = {
        "float": value.is_floating_point(),
        "int64": value.dtype == torch.int64,
        "bool": value.dtype == torch.bool,
    }
    if not kinds[kind]:
        raise TypeError(f"{name} must have a {kind} dtype, but got {value.dtype}; convert it.")
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name} must have shape {tuple(shape)}{why}, but got {tuple(value.shape)}."
        )
    if like is not None:
        other, tensor = like
        if value.device != tensor.device:
            raise ValueError(
                f"{name} is on {value.device} but {other} is on {tensor.device}; "
                "move them to one device."
            )


def check_head(
    hidden, weight, completion_ids, bias, temperature, logit_scale, final_logit_softcapping,
    max_workspace_bytes, tp_group, *, several=False,
):
    """Checks that linear_log_probs and fused_linear_rlsd_loss share; returns the workspace size."""
    check_tensor("hidden", hidden)
    if hidden.dim() < 2:
        raise ValueError(
            f"hidden must have shape (..., H) with at least two dimensions, but got "
            f"{tuple(hidden.shape)}."
        )
    check_tensor("weight", weight, like=("hidden", hidden))
    check_weight("weight", weight, hidden, sharded=tp_group is not None)
    shape, why = hidden.shape[:-1], " (hidden's without its last dimension)"
    if several:
        why = f"{why[:-1]}, or with a last dimension of K >= 1 ids)"
        if isinstance(completion_ids, Tensor) and completion_ids.dim() == hidden.dim():
            shape = (*shape, completion_ids.shape[-1]) if completion_ids.shape[-1] else shape
    check_tensor(
        "completion_ids", completion_ids, shape=shape, like=("hidden", hidden), kind="int64",
        why=why,
    )
    if bias is not None:
        check_tensor(
            "bias", bias, shape=weight.shape[:1], like=("hidden", hidden), why=" (V,)"
        )
    check_logit_scalars(temperature, logit_scale, final_logit_softcapping)
    check_group(tp_group)
    return check_workspace(max_workspace_bytes, hidden)


def check_group(tp_group):
    if tp_group is not None and not isinstance(tp_group, dist.ProcessGroup):
        raise TypeError(
            "tp_group must be a torch.distributed.ProcessGroup whose ranks hold the head's rows "
            f"in order, or None, but got {type(tp_group).__name__}."
        )


def check_logit_scalars(temperature, logit_scale, final_logit_softcapping):
    check_number("temperature", temperature, 0, low_open=True)
    check_number("logit_scale", logit_scale)
    if final_logit_softcapping is not None:
        check_number("final_logit_softcapping", final_logit_softcapping, 0, low_open=True)


def check_tolerance(gradient_tolerance):
    check_number("gradient_tolerance", gradient_tolerance, 0, 1, high_open=True)


def check_workspace(max_workspace_bytes, tensor):
    """The bound in bytes, the device's default for None."""
    if max_workspace_bytes is None:
        return default_workspace_bytes(tensor.device.type)
    if isinstance(max_workspace_bytes, bool) or not isinstance(max_workspace_bytes, int):
        raise TypeError(
            f"max_workspace_bytes must be an int or None, but got {max_workspace_bytes!r}."
        )
    check_number("max_workspace_bytes", max_workspace_bytes, 1, 2**63 - 1)
    return max_workspace_bytes


def check_finite(tensors):
    """check_inputs=True: no NaN or infinity in any of the named tensors."""
    for name, value in tensors.items():
        if value is not None and not torch.isfinite(value).all():
            raise ValueError(
                f"{name} has non-finite values; find the row with torch.isfinite before the loss."
            )


def check_weight(name, weight, hidden, hidden_name="hidden", *, sharded=False):
    """(V, H) with hidden's H and dtype, whole or this rank's vocabulary shard, of which shard_of
    refuses an empty one on every rank at once."""
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        hint = (
            "; it looks like an FSDP or ZeRO-3 shard, so call this inside the module's forward, "
            "where the parameter is gathered" if weight.dim() < 2 else ""
        )
        raise ValueError(
            f"{name} must have shape (V, {hidden.shape[-1]}) to match {hidden_name} "
            f"{tuple(hidden.shape)}, but got {tuple(weight.shape)}{hint}."
        )
    if 0 in weight.shape[1 if sharded else 0 :]:
        raise ValueError(
            f"{name} must have at least one row and one column, but its shape is "
            f"{tuple(weight.shape)}."
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(
            f"{name} is {weight.dtype} but {hidden_name} is {hidden.dtype}; cast one to the "
            "other's dtype."
        )


def check_ids(completion_ids, vocab_size, *, force=False):
    """Ids outside [0, V): always checked on the CPU, elsewhere only when forced (it syncs)."""
    if not (force or completion_ids.device.type == "cpu") or completion_ids.numel() == 0:
        return
    low, high = completion_ids.aminmax()
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"completion_ids must lie in [0, {vocab_size}), but range from {int(low)} to "
            f"{int(high)}; replace padding ids and set loss_weights to 0 there."
        )


@torch.library.custom_op("rlsd::checked_ids", mutates_args=())
def checked_ids(completion_ids: Tensor, vocab_size: int) -> Tensor:
    """check_ids as an op, for the reference under torch.compile."""
    check_ids(completion_ids, vocab_size)
    return completion_ids.clone()


@checked_ids.register_fake
def _(completion_ids, vocab_size):
    return torch.empty_like(completion_ids)


def autocast_head(hidden, weight, *others):
    """Under autocast a head and hidden states of two dtypes meet in autocast's, as in nn.Linear."""
    if not (isinstance(hidden, Tensor) and isinstance(weight, Tensor)):
        return hidden, weight, *others  # for the checks to refuse
    device = hidden.device.type
    if hidden.dtype == weight.dtype or not (
        torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    ):
        return hidden, weight, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if x is None else x.to(dtype) for x in (hidden, weight, *others))


def needs_grad(*tensors):
    """Whether autograd will ask for the gradient of any of them."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def gather_head(weight, bias, tp_group):
    """The whole head on every rank, for the reference; gradients reach this rank's rows."""
    if tp_group is None:
        return weight, bias
    rank = dist.get_rank(tp_group)

    def gather(x):
        parts = [None] * dist.get_world_size(tp_group)
        dist.all_gather_object(parts, x.detach(), group=tp_group)
        return torch.cat([*parts[:rank], x, *parts[rank + 1 :]])

    return gather(weight), None if bias is None else gather(bias)


def register_gradients(op, kind, gradients):
    """Autograd of an op whose first output is the loss and whose outputs [gradients] are dh, dW and
    db of its first three inputs, formed in forward: backward is one scaling."""

    def setup(ctx, inputs, output):
        ctx.save_for_backward(*output[gradients])
        ctx.num_inputs, call = len(inputs), unflatten(kind, inputs)
        ctx.impl, ctx.private = call.impl, call.private
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
        ctx.set_materialize_grads(False)

    @differentiable_once
    def backward(ctx, grad_loss, *unused):
        if grad_loss is None:
            return (None,) * ctx.num_inputs
        upstream = grad_loss.reshape(1)  # not 0-dim: the product is fp32 and rounded once
        # A graph that is not retained lets go of what it saved: where nobody else holds it, it is
        # scaled in place and becomes .grad itself. Tracers of torch.compile are not plain tensors.
        mine = ctx.private and not torch._C._autograd._get_current_graph_task_keep_graph()
        grads = [None] * ctx.num_inputs
        for i, (x, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
            if not ctx.needs_input_grad[i]:
                continue
            if not mine or x.dtype != dtype or type(x) is not Tensor:
                grads[i] = torch.mul(x, upstream, out=torch.empty_like(x, dtype=dtype))
                continue
            grads[i] = x
            if x.is_cuda or x.is_meta or upstream.item() != 1:  # kernels find a 1 themselves
                load_impl(ctx.impl).scale(x, upstream)
        return tuple(grads)

    op.register_autograd(backward, setup_context=setup)


class LogProbsInputs(NamedTuple):
    """Of the op below."""

    hidden: Tensor  # (N, H)
    head: Head
    completion_ids: Tensor  # (N,) or (N, K)
    old_log_probs: Tensor | None  # the same
    want_entropy: bool
    want_logits: bool  # the mean and the largest
    keep: str | None  # for backward: "exp" E and s, "columns" those of E that count
    shard: Shard
    impl: str
    max_workspace_bytes: int
    gradient_tolerance: float


def _log_probs_fake(x):
    """Sizes of "columns" are those of the data; no tracer asks for it."""
    dtype, n, weight = compute_dtype(x.hidden.dtype), x.hidden.shape[0], x.head.weight
    left = Kept.nothing(x.hidden, gemm.operand_dtype(weight), dtype)
    if x.keep == "exp":
        e = left.e.new_empty(n, load_impl(x.impl).padded(weight.shape[0]))
        left = left._replace(e=e, s=left.s.new_empty(n))
    some = n if x.want_logits else 0
    return (
        x.hidden.new_empty(x.completion_ids.shape, dtype=dtype),
        x.hidden.new_empty(n if x.want_entropy else 0, dtype=dtype),
        x.hidden.new_empty(n, dtype=dtype), x.hidden.new_empty(some, dtype=dtype),
        x.completion_ids.new_empty(some), x.hidden.new_empty(some, dtype=dtype), *left,
    )


@custom_op(
    "rlsd::linear_log_probs", LogProbsInputs, outputs=6 + len(Kept._fields), fake=_log_probs_fake
)
def _log_probs_op(x):
    check_ids(x.completion_ids, x.shard.vocab)
    scored, left = pipeline.linear_log_probs_fwd(
        load_impl(x.impl), x.hidden, x.head, x.completion_ids, x.old_log_probs, x.shard,
        x.want_entropy, x.want_logits, x.keep, x.max_workspace_bytes, x.gradient_tolerance,
    )
    return (
        scored.log_probs, scored.entropy, scored.lse, scored.mean_logits, scored.greedy_ids,
        scored.greedy_log_probs, *left,
    )


class LogProbsBackwardInputs(NamedTuple):
    """Of the op below."""

    up: Upstream
    hidden: Tensor  # (N, H)
    head: Head
    completion_ids: Tensor  # (N,) or (N, K)
    log_probs: Tensor  # the same
    lse: Tensor  # (N,)
    left: Kept
    need: Need
    shard: Shard
    impl: str
    max_workspace_bytes: int
    gradient_tolerance: float


@custom_op(
    "rlsd::linear_log_probs_backward", LogProbsBackwardInputs, outputs=3,
    fake=lambda x: empty_gradients(x.hidden, x.head, x.need),
)
def _log_probs_backward_op(x):
    return pipeline.linear_log_probs_bwd(
        load_impl(x.impl), x.hidden, x.up, x.head, x.completion_ids, x.log_probs, x.lse, x.left,
        x.shard, x.need, x.max_workspace_bytes, x.gradient_tolerance,
    )


def _setup_context(ctx, inputs, output):
    x = unflatten(LogProbsInputs, inputs)
    log_probs, _, lse, _, _, _, *left = output
    ctx.save_for_backward(  # a clone: the caller may change the result in place
        x.hidden, x.head.weight, x.head.bias, x.completion_ids, log_probs.clone(), lse, *left
    )
    ctx.inputs = x._replace(
        hidden=None, head=x.head._replace(weight=None, bias=None), completion_ids=None,
        old_log_probs=None,
    )
    ctx.num_inputs = len(inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_log_probs, grad_entropy, grad_lse, grad_mean, *unused):
    hidden, weight, bias, completion_ids, log_probs, lse, *left = ctx.saved_tensors
    x = ctx.inputs
    up = Upstream(
        grad_log_probs, grad_entropy if x.want_entropy else None, grad_lse,
        grad_mean if x.want_logits else None,
    )
    if all(g is None for g in up):
        return (None,) * ctx.num_inputs
    if grad_log_probs is None:
        up = up._replace(log_probs=torch.zeros_like(log_probs))
    need = Need(*ctx.needs_input_grad[:3])
    grads = _log_probs_backward_op(*flatten(LogProbsBackwardInputs(
        up, hidden, x.head._replace(weight=weight, bias=bias), completion_ids, log_probs, lse,
        Kept(*left), need, x.shard, x.impl, x.max_workspace_bytes, x.gradient_tolerance,
    )))
    grads = (g if wanted else None for g, wanted in zip(grads, need, strict=True))
    return (*grads, *[None] * (ctx.num_inputs - 3))


_log_probs_op.register_autograd(_backward, setup_context=_setup_context)


class LinearLogProbsOutput(NamedTuple):
    """What linear_log_probs returns where more than entropies is asked for; None: not asked for.

    fp32, fp64 for fp64; greedy_ids int64. Gradients flow through all but the last two.
    """

    log_probs: Tensor  # as completion_ids
    entropy: Tensor | None  # (...), like all that follow
    lse: Tensor | None
    mean_logits: Tensor | None
    greedy_ids: Tensor | None
    greedy_log_probs: Tensor | None


def linear_log_probs(
    hidden, weight, completion_ids, *, old_log_probs=None, bias=None, temperature=1.0,
    logit_scale=1.0, final_logit_softcapping=None, return_entropy=False, return_lse=False,
    return_mean_logits=False, return_greedy=False, tp_group=None, impl="auto",
    max_workspace_bytes=None, gradient_tolerance=0.0,
):
    """Log-probabilities of given tokens under an LM head, without the N x V logits.

    Equals `((hidden @ weight.T).float() / temperature).log_softmax(-1)` gathered at
    completion_ids, with fp32 logits whatever the input dtype.

    Args:
        hidden: (..., H) last hidden states, fp64, fp32, bf16 or fp16; gets a gradient if needed.
            State t is the one that predicts completion_ids[t], one position before that token.
        weight: (V, H) LM head of the same dtype; gets a gradient if needed.
        completion_ids: (...) int64 in [0, V), or (..., K) for the log-probs of K ids of each row,
            such as a teacher's top k; ids may repeat.
        old_log_probs: of completion_ids' shape, log-probs of the sampler: a guess (by the first of
            K ids) of the log-sum-exp that places the exponential. A wrong guess costs time on the
            rows concerned, never accuracy.
        bias: (V,) added to the logits before logit_scale.
        temperature, logit_scale, final_logit_softcapping: scalars of
            `softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature`.
        return_entropy: also return the entropy of each row in nats, differentiable.
        return_lse: also the log-sum-exp of each row's logits (as for a z-loss), differentiable.
        return_mean_logits: also the mean over the vocabulary of each row's logits, differentiable;
            label smoothing by e is `-(1 - e) * log_probs + e * (lse - mean_logits)`.
        return_greedy: also each row's most likely id (of equals the lowest) and its log-prob, no
            gradient.
        tp_group: process group whose ranks hold the rows of weight (and bias) in order; hidden and
            everything per token are the same on every rank, ids count over the whole vocabulary,
            and hidden's gradient comes out summed over ranks.
        max_workspace_bytes: bound on logits held at once, and on what is kept for backward;
            default: tuning.WORKSPACE_BYTES of the device.
        gradient_tolerance: in [0, 1), 0 is exact; as of fused_linear_rlsd_loss, but columns are
            chosen before the upstream gradient is known, for rows that weigh the same; rows that
            turn out to weigh more than their columns allow are formed anew: the bound holds.
            Backward needs no other logits again, and what is kept for it is a few per cent of
            (N, V) where the softmax is peaked. Gradients of anything but one log-prob a row need
            them again; columns are then chosen on the true gradient.

    All come from one pass over the head. Backward takes a second one for the gradient of an
    entropy or of a softcapped mean, of fp16 on a GPU, and where E does not fit the workspace.
    Under autocast, hidden and weight of different dtypes are cast to autocast's dtype.
    Returns: log_probs in completion_ids' shape, fp32 (fp64 for fp64); (log_probs, entropy) with
        return_entropy; a LinearLogProbsOutput with any of the other three.
    Raises: TypeError or ValueError in one sentence on wrong types, shapes, dtypes, devices or ids.
    """
    hidden, weight, bias = autocast_head(hidden, weight, bias)
    workspace = check_head(
        hidden, weight, completion_ids, bias, temperature, logit_scale, final_logit_softcapping,
        max_workspace_bytes, tp_group, several=True,
    )
    check_tolerance(gradient_tolerance)
    check_flags(
        return_entropy=return_entropy, return_lse=return_lse,
        return_mean_logits=return_mean_logits, return_greedy=return_greedy,
    )
    shape, want_logits = completion_ids.shape, return_mean_logits or return_greedy
    if old_log_probs is not None:
        check_tensor("old_log_probs", old_log_probs, shape=shape, like=("hidden", hidden))
        old_log_probs = old_log_probs.detach().to(compute_dtype(hidden.dtype))
    rows, ids = hidden.reshape(-1, hidden.shape[-1]), completion_ids.reshape(-1)
    if len(shape) == hidden.dim():
        ids = ids.view(len(rows), shape[-1])
    if old_log_probs is not None:
        old_log_probs = old_log_probs.reshape(ids.shape)
    impl = choose_impl(impl, hidden)
    if impl == "ref":
        weight, bias = gather_head(weight, bias, tp_group)
        ids = checked_ids(ids, weight.shape[0])
        safe = ids.clamp(0, weight.shape[0] - 1)
        z = ref.head_logits(
            rows, weight, bias=bias, temperature=temperature, logit_scale=logit_scale,
            final_logit_softcapping=final_logit_softcapping,
            gradient_tolerance=float(gradient_tolerance),
        )
        log_probs, entropy = ref.log_probs_of(z, safe)
        more = ref.logit_statistics(z) if return_lse or want_logits else (None,) * 4
        log_probs = log_probs.masked_fill(safe != ids, math.nan)
    else:
        shard = shard_of(weight, tp_group)
        keep = None
        if needs_grad(rows, weight, bias):
            keep = pipeline.what_is_kept(
                load_impl(impl), weight, shard, ids, workspace, gradient_tolerance
            )
        head = Head(
            weight, bias, float(temperature), float(logit_scale), final_logit_softcapping
        )
        log_probs, entropy, *more = _log_probs_op(*flatten(LogProbsInputs(
            rows, head, ids, old_log_probs, return_entropy, want_logits, keep, shard, impl,
            workspace, float(gradient_tolerance),
        )))
    log_probs, per_row = log_probs.reshape(shape), hidden.shape[:-1]
    if not (return_lse or want_logits):
        return (log_probs, entropy.reshape(per_row)) if return_entropy else log_probs
    lse, mean_logits, greedy_ids, greedy_log_probs = more[:4]
    asked = (
        (return_entropy, entropy), (return_lse, lse), (return_mean_logits, mean_logits),
        (return_greedy, greedy_ids), (return_greedy, greedy_log_probs.detach()),
    )
    return LinearLogProbsOutput(
        log_probs, *(x.reshape(per_row) if wanted else None for wanted, x in asked)
    )
