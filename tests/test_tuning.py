from hypothesis import given, settings
from hypothesis import strategies as st

from rlsd_kernels.tuning import DEFAULT_WORKSPACE_BYTES, rows_per_chunk


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.integers(1, 10**6), st.integers(1, 300_000), st.sampled_from([4, 8]), st.integers(1, 2),
    st.integers(1, 2**33),
)
def test_chunks_fit_the_workspace_and_are_even(n, vocab, itemsize, buffers, workspace):
    step = rows_per_chunk(n, vocab, itemsize, buffers, workspace)
    row = buffers * vocab * itemsize
    assert 1 <= step <= n and (step * row <= workspace or step == 1)
    chunks = -(-n // step)
    if row <= workspace:
        assert chunks == -(-n // min(n, workspace // row))
    assert step == -(-n // chunks)


def test_default_workspace_holds_441_rows_of_a_qwen_head():
    # 256 MiB / (151936 * 4) = 441.7
    assert rows_per_chunk(441, 151936, 4, 1, DEFAULT_WORKSPACE_BYTES) == 441
    assert rows_per_chunk(442, 151936, 4, 1, DEFAULT_WORKSPACE_BYTES) == 221
