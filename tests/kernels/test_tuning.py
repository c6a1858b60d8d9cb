"""Row plans: what is held and scored at once fits the workspace and covers every row."""

from hypothesis import given, settings
from hypothesis import strategies as st

from rlsd_kernels.tuning import (
    MIN_CHUNK,
    WORKSPACE_BYTES,
    default_workspace_bytes,
    plan_rows,
    rows_per_chunk,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 10**6), st.integers(1, 10**7), st.integers(1, 2**33))
def test_chunks_fit_the_workspace_and_are_even(n, row, workspace):
    step = rows_per_chunk(n, row, workspace)
    assert 1 <= step <= n and (step * row <= workspace or step == 1)
    chunks = -(-n // step)
    if row <= workspace:
        assert chunks == -(-n // min(n, workspace // row))
    assert step == -(-n // chunks)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.integers(1, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 2**33),
    st.integers(1, 10**5),
)
def test_plans_fit_the_workspace(n, stored, scratch, workspace, max_chunk):
    group, chunk = plan_rows(n, stored, scratch, workspace, max_chunk)
    assert 1 <= chunk <= group <= n and chunk <= max_chunk
    assert group * stored + chunk * scratch <= workspace or (group == 1 and chunk == 1)
    if n * stored + min(n, MIN_CHUNK) * scratch <= workspace:
        assert group == n


def test_the_default_workspace_holds_441_rows_of_a_qwen_head_on_the_cpu():
    # 256 MiB / (151936 * 4) = 441.7
    assert rows_per_chunk(441, 151936 * 4, default_workspace_bytes("cpu")) == 441
    assert rows_per_chunk(442, 151936 * 4, default_workspace_bytes("cpu")) == 221


def test_the_default_workspace_of_a_gpu_holds_8192_rows_of_a_qwen_head_in_bf16():
    # E 2.3 GiB, beside it fp32 logits of at least MIN_CHUNK rows
    group, chunk = plan_rows(8192, 151936 * 2, 151936 * 4, default_workspace_bytes("cuda"), 8192)
    assert (group, chunk) == (8192, 2048)


def test_an_unknown_device_gets_the_smaller_workspace():
    assert default_workspace_bytes("xpu") == min(WORKSPACE_BYTES.values())


def test_what_does_not_fit_at_once_goes_in_the_fewest_groups():
    """32768 rows of a Qwen head in bf16: E of 8192 beside a full chunk, not of 4096 beside as many
    rows of logits."""
    plan = plan_rows(32768, 151936 * 2, 151936 * 4, default_workspace_bytes("cuda"), 8192)
    assert plan == (8192, 2048)
    # where not even a chunk's rows of E fit beside it, both are as tall as they can be
    assert plan_rows(32768, 2, 4, 6 * 1000, 8192) == (993, 993)
