"""Sizes that were chosen by measurement or arithmetic, in one place."""

# Beyond the gradients an op holds one or two row chunks of logits. 256 MiB is 441 rows of
# V = 151936 in fp32: tall enough that the head's weight is read a few dozen times, not thousands.
DEFAULT_WORKSPACE_BYTES = 256 * 1024**2


def rows_per_chunk(num_rows, vocab_size, itemsize, buffers, max_workspace_bytes):
    """Rows whose `buffers` logit buffers fit the workspace; at least one row, evenly filled."""
    fit = max(1, max_workspace_bytes // (buffers * vocab_size * itemsize))
    chunks = -(-num_rows // fit)
    return -(-num_rows // chunks)
