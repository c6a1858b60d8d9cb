"""transformers' caches, by which a prompt's keys and values reach completions, with autograd."""

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer


def kept_cache():
    """Of the pass over prompts."""
    return Cache(layer_class_to_replicate=_Kept)


def shared_cache(kept, owners):
    """Of the pass over completions; owners: (B,) the row of `kept` that each continues."""
    return Cache(layers=[_Shared(layer, owners) for layer in kept.layers])


class _Kept(DynamicLayer):
    """A layer of the pass over prompts: keys and values stay as they are."""

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:  # recomputed in backward, they would keep that graph alive
            self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class _Shared(DynamicLayer):
    """A layer of the pass over completions: each row's come behind those of its prompt.

    Nothing is stored, so that recomputation sees what the first pass saw.
    """

    def __init__(self, kept, owners):
        super().__init__()
        self.keys, self.values, self.owners = kept.keys, kept.values, owners
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        return tuple(
            torch.cat([self._of_rows(kept), new], -2)
            for kept, new in ((self.keys, key_states), (self.values, value_states))
        )

    def _of_rows(self, kept):
        if len(kept) == 1:  # a view; an index takes three times as long, backward too
            return kept.expand(len(self.owners), *kept.shape[1:])
        return kept[self.owners]
