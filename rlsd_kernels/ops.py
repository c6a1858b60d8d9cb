"""torch.library custom ops that take one nested NamedTuple.

Its class is the only list of an op's arguments: schema, call, fake implementation and autograd all
read them by name. The dispatcher sees the fields flat and in order.
"""

import functools
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .config import compute_dtype, stored_dtype

_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", int: "SymInt", float: "float",
    float | None: "float?", str: "str", str | None: "str?", list[int]: "SymInt[]",
}


class Need(NamedTuple):
    """Which gradients are formed."""

    dx: bool
    dw: bool
    db: bool


@functools.cache
def _fields(kind):
    """Types of a NamedTuple's fields, by name."""
    return get_type_hints(kind)


def _parameters(kind, prefix=""):
    """The schema's flat parameters: "Tensor head_weight"."""
    for name, field in _fields(kind).items():
        if field in _TYPES:
            yield f"{_TYPES[field]} {prefix}{name}"
        else:
            yield from _parameters(field, f"{prefix}{name}_")


def flatten(arguments):
    """The list of what an op is called with."""
    flat = []
    for x in arguments:
        flat += flatten(x) if isinstance(x, tuple) else [_without_tangent(x)]
    return flat


def _without_tangent(x):
    """x, which no op of PyTorch's library differentiates forwards: the tangent would be lost."""
    if forward_ad._current_level >= 0 and isinstance(x, Tensor):
        if forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                "The fused ops have no forward-mode derivative (torch.func.jvp); use impl='ref'."
            )
    return x


def unflatten(kind, flat):
    """The NamedTuple `kind` whose flattened fields these are; also of an op's input gradients."""
    return _build(kind, iter(flat))


def _build(kind, flat):
    # No closure that calls itself: such a cycle would hold every tensor until Python collects it.
    return kind(*(next(flat) if x in _TYPES else _build(x, flat) for x in _fields(kind).values()))


def custom_op(name, kind, *, outputs, fake):
    """Decorates function(kind) -> `outputs` tensors; the op is called with *flatten(kind(...)).

    fake(kind) returns empty tensors of the outputs' shapes and dtypes.
    """
    def decorate(function):
        op = torch.library.custom_op(
            name, lambda *flat: function(unflatten(kind, flat)), mutates_args=(),
            schema=f"({', '.join(_parameters(kind))}) -> ({', '.join(['Tensor'] * outputs)})",
        )
        op.register_fake(lambda *flat: fake(unflatten(kind, flat)))
        return op

    return decorate


def differentiable_once(backward):
    """Decorates an op's backward, whose gradients were formed in forward: PyTorch would take their
    own derivatives for 0."""

    @functools.wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "This loss has no second differentiation, which create_graph=True prepares; leave "
                "that out, or use impl='ref'."
            )
        return backward(ctx, *grads)

    return checked


def empty_gradients(hidden, head, need, *, stored=False):
    """Fake dh, dW, db: what the real ops return, an empty tensor for each that is not needed."""
    weight, bias = head.weight, head.bias
    db_dtype = compute_dtype(hidden.dtype) if bias is None else bias.dtype
    shapes = (
        (hidden.shape if need.dx else 0, hidden.dtype),
        (weight.shape if need.dw else 0, weight.dtype),
        (weight.shape[:1] if need.db else 0, db_dtype),
    )
    return tuple(
        hidden.new_empty(shape, dtype=stored_dtype(dtype) if stored else dtype)
        for shape, dtype in shapes
    )
