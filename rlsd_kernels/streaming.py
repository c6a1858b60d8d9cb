"""The control flow that GPU implementations share: rows of logits through exp, on one fp32 chunk.

    x = h W^T,   z = softcap(logit_scale (x + bias)) / temperature,   s = sum_j exp(z_j - c)

cuBLAS writes x (2 M H V FLOP); kernels stream over it: exp with the guess c, then for the rows
whose sum the guess spoiled the row maximum and exp anew. All three are always launched and return
at once for the other rows: nothing waits for the host. An implementation supplies the kernels.
"""

import abc

import torch

from . import gemm
from .config import trusted_rows

STORE_NONE, STORE_EXP, STORE_LOGITS = 0, 1, 2


def padded(vocab):
    """Columns of a matrix of logits or of E: rows are aligned at any V, so that kernels load and
    store vectors and cuBLAS keeps its fast path."""
    return -(-vocab // 16) * 16


def scratch_bytes(vocab, itemsize, keep, in_place):
    """Bytes per row of the fp32 chunk; none where an fp32 `out` takes the logits itself."""
    stored_there = keep == "logits" or (keep == "exp" and in_place)
    return 0 if stored_there else padded(vocab) * itemsize


def unit_stride(x):
    """x itself unless the elements of a row lie apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


class StreamingScorer(abc.ABC):
    """Streams rows of one head through exp; owns the fp32 logit chunk.

    reduce_sum and reduce_max all-reduce an (M,) tensor in place over the holders of the other
    vocabulary shards and return it. A subclass has the launches: _exp, _row_max, logit_gradient.
    """

    def __init__(
        self, weight, bias, temperature, logit_scale, softcap, chunk_rows, reduce_sum=None,
        reduce_max=None,
    ):
        self.weight, self.chunk_rows = weight, chunk_rows
        self.bias = None if bias is None else bias.contiguous()
        self.vocab, self.hidden = weight.shape
        self.capped = softcap is not None
        # z = post tanh(pre x) under softcap, else pre x
        self.pre = logit_scale / (softcap if self.capped else temperature)
        self.post = softcap / temperature if self.capped else 1.0
        self.sharded = reduce_sum is not None
        self.reduce_sum = reduce_sum or (lambda x: x)
        self.reduce_max = reduce_max or (lambda x: x)
        self._scratch = self._begun = None

    def begin(self, h):
        """Queues the logits GEMM of rows h (M, H), which the next `score` is to find done; not for
        an fp32 `out`, which holds them itself."""
        self._begun = h, gemm.logits(h, self.weight, self._chunk(len(h)))

    def _logits(self, h, x):
        """x = h W^T, (M, V) in fp32, unless it was begun."""
        begun, self._begun = self._begun, None
        if begun is not None and begun[0].data_ptr() == h.data_ptr() and len(begun[0]) == len(h):
            return begun[1]
        return gemm.logits(h, self.weight, self._chunk(len(h)) if x is None else x)

    def score(
        self,
        h,  # (M, H)
        c,  # (M,)
        *,
        out=None,  # (M, V)
        keep=None, want_entropy=False,
        ids=None,  # (M,) or (M, K)
        z_y=None,  # the same
        logits=None,  # three (M,), the last int64
    ):
        """c, s, t, each (M,): three or four passes over the chunk, no host sync.

        t is None unless wanted; keep "exp" stores e times the softcap's slope in out, "logits"
        stores z, in fp32. With ids, z_y becomes the logit there as this GEMM rounds it; `logits`
        become the sum of a row's, its largest and where it is, the first of equals, the last two on
        this shard.
        """
        c = c.clone(memory_format=torch.contiguous_format)
        s = torch.empty_like(c)
        t = torch.empty_like(c) if want_entropy else None
        store = {None: STORE_NONE, "exp": STORE_EXP, "logits": STORE_LOGITS}[keep]
        # An fp32 `out` holds the logits itself; its exp waits until every c is settled.
        in_place = keep is not None and out.dtype == torch.float32
        deferred = in_place and store == STORE_EXP
        x = self._logits(h, out if in_place else None)
        if ids is not None:
            self.reduce_sum(z_y.copy_(self._at(x, ids)))
        row = (self.bias, self.pre, self.post, self.capped)
        if logits is not None:
            total, top, top_ids = logits
            self._row_logits(x, row, total, top_ids)
            self.reduce_sum(total)
            top.copy_(self._at(x, top_ids))
        again = (None, 1.0, 1.0, False) if store == STORE_LOGITS else row  # x is z by then
        first = STORE_NONE if deferred else store
        self._exp(x, row, c, s, t, out, first)
        s = self.reduce_sum(s)
        self._row_max(x, again, c, s)
        c = self.reduce_max(c)
        second = STORE_EXP if first == STORE_EXP else STORE_NONE
        # Where a row is one kernel's alone, its sum takes the place of the one that flagged it.
        exact = torch.zeros_like(s) if self.sharded else s
        self._exp(x, again, c, exact, t, out, second, total=s)
        if self.sharded:
            s = torch.where(trusted_rows(s), s, self.reduce_sum(exact))
        if deferred:
            self._exp(x, row, c, torch.empty_like(s), None, out, STORE_EXP)
        return c, s, self.reduce_sum(t) if want_entropy else None

    def _at(self, x, ids):
        """z at the ids, of their shape, from raw logits x (M, V); 0 for those of other shards."""
        safe = ids.clamp(0, self.vocab - 1)
        z = x.gather(1, safe.view(len(x), -1)).view_as(safe)
        if self.bias is not None:
            z = z + self.bias[safe]
        if self.capped:
            z = torch.tanh(z * self.pre) * self.post
        elif self.pre != 1.0:
            z = z * self.pre
        return torch.where((ids >= 0) & (ids < self.vocab), z, 0) if self.sharded else z

    def _chunk(self, rows):
        if rows > self.chunk_rows:
            raise ValueError(f"score takes at most {self.chunk_rows} rows at a time, not {rows}.")
        if self._scratch is None:
            self._scratch = torch.empty(
                self.chunk_rows, padded(self.vocab), dtype=torch.float32,
                device=self.weight.device,
            )
        return self._scratch[:rows, : self.vocab]

    @abc.abstractmethod
    def _exp(self, x, epilogue, c, s, t, out, store, total=None):
        """s, t and what `store` says of rows x; with `total`, of rows whose sum there is bad."""

    @abc.abstractmethod
    def _row_max(self, x, epilogue, c, total):
        """c := the row's largest z, for rows whose sum in `total` is not trusted."""

    @abc.abstractmethod
    def _row_logits(self, x, epilogue, total, top_ids):
        """total := the sum of the row's z, top_ids := where the first of its largest is."""
