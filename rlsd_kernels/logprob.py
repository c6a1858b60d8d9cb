"""Which implementation runs, the shared argument checks, and the differentiable log-prob op.

    linear_log_probs(h, W, y) = log_softmax(softcap(logit_scale (h W^T + b)) / temperature)[y]

Forward 2 NHV FLOP and 4 N bytes of result instead of N x V logits; backward recomputes logits by
chunk (another 2 NHV) and forms dh and dW (4 NHV).
"""

import logging
import math

import torch
from torch import Tensor

from . import ref, torch_impl
from .config import check_number, compute_dtype
from .tuning import DEFAULT_WORKSPACE_BYTES

logger = logging.getLogger("rlsd_kernels")
IMPLS = ("auto", "cuda", "triton", "torch", "ref")
_announced = set()


def available_impls():
    """Dict of implementation name -> "ok", or the reason in one sentence why it cannot run here."""
    missing = "is not part of this version of rlsd_kernels; use impl='torch', which runs anywhere."
    return {
        "cuda": f"The CUDA implementation {missing}",
        "triton": f"The Triton implementation {missing}",
        "torch": "ok",
        "ref": "ok",
    }


def choose_impl(impl):
    """The name of the implementation that runs; `auto` takes the fastest and says so once."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, but got {impl!r}.")
    status = available_impls()
    if impl != "auto":
        if status[impl] != "ok":
            raise ValueError(f"impl={impl!r} cannot run: {status[impl]}")
        return impl
    chosen = next(name for name, state in status.items() if state == "ok")
    if chosen not in _announced and not torch.compiler.is_compiling():
        _announced.add(chosen)
        logger.info("impl='auto' runs %r, the fastest implementation available here.", chosen)
    return chosen


def check_tensor(name, value, *, shape=None, like=None, kind="float", why=""):
    """Raise TypeError or ValueError in one sentence unless value is the tensor that is needed."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, but got {type(value).__name__}.")
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
    max_workspace_bytes, tp_group,
):
    """Checks that linear_log_probs and fused_linear_rlsd_loss share; returns the workspace size."""
    check_tensor("hidden", hidden)
    if hidden.dim() < 2:
        raise ValueError(
            f"hidden must have shape (..., H) with at least two dimensions, but got "
            f"{tuple(hidden.shape)}."
        )
    check_tensor("weight", weight, like=("hidden", hidden))
    check_weight("weight", weight, hidden)
    check_tensor(
        "completion_ids", completion_ids, shape=hidden.shape[:-1], like=("hidden", hidden),
        kind="int64", why=" (hidden's without its last dimension)",
    )
    if bias is not None:
        check_tensor(
            "bias", bias, shape=weight.shape[:1], like=("hidden", hidden), why=" (V,)"
        )
    check_number("temperature", temperature, 0, low_open=True)
    check_number("logit_scale", logit_scale)
    if final_logit_softcapping is not None:
        check_number("final_logit_softcapping", final_logit_softcapping, 0, low_open=True)
    if tp_group is not None:
        raise ValueError(
            "tp_group (a vocabulary-sharded head) is not part of this version of rlsd_kernels; "
            "gather the head and pass tp_group=None."
        )
    if max_workspace_bytes is None:
        return DEFAULT_WORKSPACE_BYTES
    if isinstance(max_workspace_bytes, bool) or not isinstance(max_workspace_bytes, int):
        raise TypeError(
            f"max_workspace_bytes must be an int or None, but got {max_workspace_bytes!r}."
        )
    check_number("max_workspace_bytes", max_workspace_bytes, 1)
    return max_workspace_bytes


def check_weight(name, weight, hidden, hidden_name="hidden"):
    """(V, H) with hidden's H and dtype."""
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{name} must have shape (V, {hidden.shape[-1]}) to match {hidden_name} "
            f"{tuple(hidden.shape)}, but got {tuple(weight.shape)}."
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


@torch.library.custom_op("rlsd::linear_log_probs", mutates_args=())
def _log_probs_op(
    hidden: Tensor, weight: Tensor, completion_ids: Tensor, bias: Tensor | None,
    temperature: float, logit_scale: float, softcap: float | None, want_entropy: bool,
    max_workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    check_ids(completion_ids, weight.shape[0])
    return torch_impl.linear_log_probs_fwd(
        hidden, weight, completion_ids, bias, temperature, logit_scale, softcap, want_entropy,
        max_workspace_bytes,
    )


@_log_probs_op.register_fake
def _(hidden, weight, completion_ids, bias, temperature, logit_scale, softcap, want_entropy, ws):
    dtype = compute_dtype(hidden.dtype)
    n = hidden.shape[0]
    return (
        hidden.new_empty(n, dtype=dtype), hidden.new_empty(n if want_entropy else 0, dtype=dtype)
    )


@torch.library.custom_op("rlsd::linear_log_probs_backward", mutates_args=())
def _log_probs_backward_op(
    grad_log_probs: Tensor, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor,
    completion_ids: Tensor, bias: Tensor | None, temperature: float, logit_scale: float,
    softcap: float | None, need_dx: bool, need_dw: bool, need_db: bool, max_workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch_impl.linear_log_probs_bwd(
        grad_log_probs, grad_entropy, hidden, weight, completion_ids, bias, temperature,
        logit_scale, softcap, need_dx, need_dw, need_db, max_workspace_bytes,
    )


def empty_gradients(hidden, weight, bias, need_dx, need_dw, need_db):
    """Fake dh, dW, db: what the real ops return, an empty tensor for each that is not needed."""
    return (
        torch.empty_like(hidden) if need_dx else hidden.new_empty(0),
        weight.new_empty(weight.shape if need_dw else 0),
        (weight if bias is None else bias).new_empty(weight.shape[0] if need_db else 0,
            dtype=compute_dtype(hidden.dtype) if bias is None else bias.dtype),
    )


@_log_probs_backward_op.register_fake
def _(grad_lp, grad_entropy, hidden, weight, ids, bias, temp, scale, cap, dx, dw, db, ws):
    return empty_gradients(hidden, weight, bias, dx, dw, db)


def _setup_context(ctx, inputs, output):
    hidden, weight, completion_ids, bias, *scalars = inputs
    ctx.save_for_backward(hidden, weight, completion_ids, bias)
    ctx.scalars = scalars


def _backward(ctx, grad_log_probs, grad_entropy):
    hidden, weight, completion_ids, bias = ctx.saved_tensors
    temperature, logit_scale, softcap, want_entropy, max_workspace_bytes = ctx.scalars
    need_dx, need_dw, _, need_db = ctx.needs_input_grad[:4]
    dx, dw, db = _log_probs_backward_op(
        grad_log_probs, grad_entropy if want_entropy else None, hidden, weight, completion_ids,
        bias, temperature, logit_scale, softcap, need_dx, need_dw, need_db, max_workspace_bytes,
    )
    return (
        dx if need_dx else None, dw if need_dw else None, None, db if need_db else None,
        *[None] * 5,
    )


_log_probs_op.register_autograd(_backward, setup_context=_setup_context)


def linear_log_probs(
    hidden, weight, completion_ids, *, old_log_probs=None, bias=None, temperature=1.0,
    logit_scale=1.0, final_logit_softcapping=None, return_entropy=False, tp_group=None,
    impl="auto", max_workspace_bytes=None,
):
    """Log-probabilities of given tokens under an LM head, without the N x V logits.

    Equals `((hidden @ weight.T).float() / temperature).log_softmax(-1)` gathered at
    completion_ids, with fp32 logits whatever the input dtype.

    Args:
        hidden: (..., H) last hidden states, fp64, fp32, bf16 or fp16; gets a gradient if needed.
            State t is the one that predicts completion_ids[t], one position before that token.
        weight: (V, H) LM head of the same dtype; gets a gradient if needed.
        completion_ids: (...) int64 in [0, V).
        old_log_probs: (...) log-probs of the sampler, an estimate that faster implementations
            use to place the exponential; it never changes the result and is unused by this one.
        bias: (V,) added to the logits before logit_scale.
        temperature, logit_scale, final_logit_softcapping: scalars of
            `softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature`.
        return_entropy: also return the entropy of each row in nats, differentiable.
        max_workspace_bytes: bound on the logit chunks held at once.

    Returns: log_probs (...) in fp32 (fp64 for fp64), or (log_probs, entropy).
    Raises: TypeError or ValueError in one sentence on wrong types, shapes, dtypes, devices or ids.
    """
    workspace = check_head(
        hidden, weight, completion_ids, bias, temperature, logit_scale, final_logit_softcapping,
        max_workspace_bytes, tp_group,
    )
    if old_log_probs is not None:
        check_tensor(
            "old_log_probs", old_log_probs, shape=completion_ids.shape, like=("hidden", hidden)
        )
    shape = completion_ids.shape
    rows, ids = hidden.reshape(-1, hidden.shape[-1]), completion_ids.reshape(-1)
    if choose_impl(impl) == "ref":
        check_ids(ids, weight.shape[0])
        safe = ids.clamp(0, weight.shape[0] - 1)
        log_probs, entropy = ref.linear_log_probs(
            rows, weight, safe, bias=bias, temperature=temperature, logit_scale=logit_scale,
            final_logit_softcapping=final_logit_softcapping,
        )
        log_probs = log_probs.masked_fill(safe != ids, math.nan)
    else:
        log_probs, entropy = _log_probs_op(
            rows, weight, ids, bias, float(temperature), float(logit_scale),
            final_logit_softcapping, return_entropy, workspace,
        )
    log_probs = log_probs.reshape(shape)
    return (log_probs, entropy.reshape(shape)) if return_entropy else log_probs
