"""What a gradient tolerance would make of the step on an H100: arithmetic, nothing of it measured.

    python -m bench.prediction        writes bench/results/prediction/h100.md

8192 rows of Qwen3-8B's head (H = 4096, V = 151936), bf16. The dense stages are themselves a
prediction, from 700 TFLOP/s and 3 TB/s; what a tolerance adds is bytes over the bandwidth.
`bench.stages` measures such stages where there is a GPU.
"""

from bench import common
from bench.plot import rows_of
from rlsd_kernels import tuning

BANDWIDTH = 3e12  # bytes/s of streaming kernels
ROWS, (HIDDEN, VOCAB) = 8192, common.HEADS["Qwen3-8B"]
E, W = (2 * x * VOCAB / BANDWIDTH * 1e3 for x in (ROWS, HIDDEN))  # ms to read each once
LOGITS, EXP, DH, DW, SCALE, REST = 30.2, 4.2, 14.8, 15.5, 1.0, 0.5  # ms, of the dense step
SECTOR = 16  # a gathered column of bf16 moves 32 bytes for 2
SELECT = 0.15  # sorting V energies and waiting for the counts, per chunk; a guess
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2)  # of the gradient GEMMs that are done
COLUMNS = 2.0  # kept columns per kept entry: half of the rows are kept at a `trained` softmax
PATH = common.ROOT / "bench/results/prediction/h100.md"


def chunks():
    """Chunks whose columns are chosen at a time, by the plan that the op makes."""
    _, chunk = tuning.plan_rows(
        ROWS, 2 * VOCAB, 4 * VOCAB, tuning.default_workspace_bytes("cuda"),
        tuning.max_chunk("cuda"),
    )
    return -(-ROWS // chunk)


def stages(share):
    """{stage: (ms of the dense step, ms with a tolerance that leaves `share` of the GEMMs)}."""
    n = chunks()
    return {
        "logits of teacher and student": (LOGITS, LOGITS),
        "exp of both, E stored": (EXP, EXP),
        "dH, dW": (DH + DW, (DH + DW) * share),
        "dW in fp32: zeroed, cast": (0, 2 * W + 3 * W),
        "energies of E": (0, E),
        "choice of rows and columns": (0, n * SELECT),
        "columns gathered": (0, E * min(1, SECTOR * COLUMNS * share)),
        "rank-one term, W read per chunk": (0, n * W),
        "upstream scale of dW, the rest": (SCALE + REST, SCALE + REST),
    }


def total(share):
    """(ms of the dense step, ms with a tolerance)."""
    return [sum(column) for column in zip(*stages(share).values(), strict=True)]


def table():
    lines = [["stage, ms", "dense", *(f"{share:.0%} left" for share in SHARES)],
             ["---", *["--:"] * (1 + len(SHARES))]]
    columns = [stages(share) for share in SHARES]
    for stage, (dense, _) in columns[0].items():
        lines.append([stage, f"{dense:.1f}", *(f"{c[stage][1]:.1f}" for c in columns)])
    sums = [total(share) for share in SHARES]
    lines.append(["sum", f"{sums[0][0]:.1f}", *(f"{t:.1f}" for _, t in sums)])
    lines.append(["x of dense", "1.00", *(f"{t / d:.2f}" for d, t in sums)])
    return (
        "# A prediction for an H100: nothing here was measured\n\n"
        f"One step at N={ROWS}, H={HIDDEN}, V={VOCAB}, bf16, full head, in {chunks()} chunks, by"
        " bench/prediction.py; left: the share of the gradient GEMMs that a tolerance does, on a"
        " CPU (NHV - 4) / 4 of the benchmark's tables, and more the taller a chunk is.\n\n"
        f"{rows_of(lines)}\n"
    )


if __name__ == "__main__":
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(table(), encoding="utf-8")
    print(table())
