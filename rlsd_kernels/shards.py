"""A head whose rows are spread over ranks: which part is here, and sums over all of them.

Only (N,) numbers per row and dh cross ranks; logits, E and dW stay with their rows of the head.
"""

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist

from .config import constant_when_compiled


def _resolve(group_name):
    return dist.distributed_c10d._resolve_process_group(group_name)


def _all_reduce(group_name, op, x):
    dist.all_reduce(x, op=op, group=_resolve(group_name))
    return x


class Shard(NamedTuple):
    """This rank's part of the vocabulary: its rows from `offset` on of `vocab`. Plans count with
    `rows` of the largest shard, so that every rank joins the same collectives."""

    layout: list[int]  # offset, vocab, rows
    group_name: str | None

    @property
    def offset(self):
        return self.layout[0]

    @property
    def vocab(self):
        return self.layout[1]

    @property
    def rows(self):
        return self.layout[2]

    @property
    def sum(self):
        """All-reduce of a tensor in place, or None where no other rank has a part."""
        return self._reduce(dist.ReduceOp.SUM)

    @property
    def max(self):
        return self._reduce(dist.ReduceOp.MAX)

    def any(self, flag, like):
        """Whether flag holds on any rank; like: a tensor on the device that ranks talk through."""
        if self.group_name is None:
            return flag
        return bool(self.max(like.new_full((), flag, dtype=torch.float32)))

    def _reduce(self, op):
        return self.group_name and functools.partial(_all_reduce, self.group_name, op)


_captured_layouts = {}


@constant_when_compiled
def _layout(group_name, rows, device):
    """[offset, vocab, rows of the largest shard]; ranks hold the vocabulary in order.

    It is asked anew each time, because any key that one rank remembers it by may stand for another
    vocabulary; only a CUDA graph being captured, which cannot ask, takes the last answer.
    """
    key = group_name, rows
    if torch.device(device).type == "cuda" and torch.cuda.is_current_stream_capturing():
        if key not in _captured_layouts:
            raise ValueError("Run the step once with this tp_group before capturing a CUDA graph.")
        return _captured_layouts[key]
    group = _resolve(group_name)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())]
    dist.all_gather(sizes, torch.full_like(sizes[0], rows), group=group)
    sizes = torch.cat(sizes).tolist()
    if 0 in sizes:
        raise ValueError(
            f"Every rank of tp_group must hold at least one row of weight, but they hold {sizes}; "
            "use a smaller group."
        )
    layout = [sum(sizes[: group.rank()]), sum(sizes), max(sizes)]
    _captured_layouts[key] = layout
    return layout


def shard_of(weight, tp_group):
    """This rank's Shard; a custom op finds the process group by its name."""
    rows = weight.shape[0]
    if tp_group is None:
        return Shard([0, rows, rows], None)
    return Shard(
        _layout(tp_group.group_name, rows, str(weight.device)), tp_group.group_name
    )
