"""Sizes that were chosen by measurement or arithmetic, in one place."""

# Columns of the head that the PyTorch implementation takes at a time.
SCORE_TILE = 2048
# Entries of h and of gathered rows of the head that it holds for the targets' logits: 16 MiB each.
TARGET_ENTRIES = 2**22
# Fewest rows worth a logits GEMM of their own beside E for all rows: at 2048 rows of V = 151936 the
# fp32 chunk is 1.2 GB and the GEMM still fills the device.
MIN_CHUNK = 2048
# Rows beyond which a taller logits GEMM gains nothing. CPU: with a gradient tolerance no more than
# these are held, and fewer rows have fewer columns in common that count.
MAX_CHUNK = {"cpu": 512, "cuda": 8192}
# Beyond the gradients an op holds E = exp(z - c) and a chunk of logits.
# CPU: 256 MiB are 441 rows of V = 151936 in fp32, tall enough that the head is read a few dozen
# times, not thousands. CUDA: 3.5 GiB hold E of 8192 x 151936 in bf16 (2.3 GiB), which makes dW one
# GEMM without an fp32 copy, and 2000 rows of fp32 logits; with gradients that stays below 5 GiB.
WORKSPACE_BYTES = {"cpu": 256 * 1024**2, "cuda": 3584 * 1024**2}
# Triton: "A" is cuBLAS into an fp32 chunk and a streaming exp; "B" one GEMM with the exp inside.
SCORE_TIER = "A"
# Energies of E: 1024 columns are 2 KB of a bf16 row. On an H100 0.26 ms for 2048 x 151936 of them;
# 512 columns take 0.50, 128 columns and 32 rows 0.83 (bench/results/nvidia_h100_80gb_hbm3).
ENERGY_TILES = {"BLOCK_M": 8, "BLOCK_V": 1024, "num_warps": 4}
# Rows that one program adds up: with all 2048 there are little more programs than an H100 runs at
# once, and the last few have it to themselves.
ENERGY_ROWS = 256
# One token per thread and step, 18 fp64 accumulators in registers, 16 steps for 8192 tokens.
TOKEN_TILES = {"BLOCK_M": 512, "num_warps": 16}


def default_workspace_bytes(device_type):
    """max_workspace_bytes where the caller names none."""
    return WORKSPACE_BYTES.get(device_type, WORKSPACE_BYTES["cpu"])


def max_chunk(device_type):
    """Most rows scored at once."""
    return MAX_CHUNK.get(device_type, MAX_CHUNK["cpu"])


def rows_per_chunk(num_rows, row_bytes, max_workspace_bytes):
    """Rows of row_bytes that fit the workspace; at least one row, evenly filled chunks."""
    fit = max(1, max_workspace_bytes // max(1, row_bytes))
    chunks = -(-num_rows // fit)
    return -(-num_rows // max(1, chunks))


def fits_at_once(num_rows, stored, scratch, max_workspace_bytes):
    """Whether `stored` bytes of all rows and `scratch` bytes of MIN_CHUNK rows fit."""
    return num_rows * stored + min(num_rows, MIN_CHUNK) * scratch <= max_workspace_bytes


def plan_rows(num_rows, stored, scratch, max_workspace_bytes, max_chunk):
    """Rows held at once for their gradient, and rows scored at once, from their bytes per row."""
    group, rest = num_rows, max_workspace_bytes - MIN_CHUNK * scratch
    if not fits_at_once(num_rows, stored, scratch, max_workspace_bytes):
        group = rows_per_chunk(num_rows, stored + scratch, max_workspace_bytes)
        if rest >= MIN_CHUNK * stored:  # the fewest groups that leave room for a full chunk
            group = rows_per_chunk(num_rows, stored, rest)
    left = max_workspace_bytes - group * stored
    return group, min(max_chunk, rows_per_chunk(group, scratch, left))


def exp_tiles(vocab_size):
    """Launch of a kernel that streams one row: 16 fp32 per thread are four 16-byte loads in flight.
    One size with and without a store, so that both add a row up in one order; the registers of a
    store allow 2048."""
    block = min(2048, max(128, 1 << (vocab_size - 1).bit_length()))
    return {"BLOCK_V": block, "num_warps": max(1, min(8, block // 512))}


def gemm_tiles(arch, itemsize, softcap):
    """Launch of the GEMM with the exp epilogue, by compute capability (80, 90, 100).

    A 128 x 256 tile fills the registers of two warpgroups and needs 48 KiB of shared memory per
    stage of 128 bytes of H. The tanh of a softcap would spill there (bench/results/aot), so it gets
    half the width; sm_80 and consumer parts (99 KiB of shared memory) get 128 x 128 x 64 bytes.
    """
    tiles = {"BLOCK_M": 128, "BLOCK_V": 128, "BLOCK_H": 64 // itemsize, "GROUP_M": 8,
             "num_warps": 8, "num_stages": 4}
    if 90 <= arch < 120:
        tiles |= {"BLOCK_H": 128 // itemsize, "GROUP_M": 16}
        if not softcap:
            tiles["BLOCK_V"] = 256
    return tiles
