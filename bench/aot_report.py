"""Compiles every Triton kernel without a GPU and reads what the machine code costs.

    python bench/aot_report.py                 # writes bench/results/aot/report.{json,md}
    python bench/aot_report.py --print exp     # JSON of the builds named so

One row per build and architecture: registers per thread, bytes of spills (local memory and stack),
shared memory, and the matrix instructions in the PTX. The tiles are the heuristic ones at
V = 151936.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.pop("TRITON_INTERPRET", None)

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from rlsd_kernels import triton_distillation, triton_impl, triton_tokens, tuning  # noqa: E402

ARCHS = (80, 90, 100)
VOCAB = 151936
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
# Pointers and integers by argument name; scalars that are not named here are fp32.
POINTERS = {
    name: "*fp32" for name in (
        "x", "bias", "c", "s", "t", "total", "z", "lse", "g", "g_entropy", "entropy", "log_probs",
        "advantages", "loss_weights", "teacher", "old", "ref", "rlsd_lambda", "loss", "values",
        "partial", "factor", "v", "columns", "rows",
        "student", "teacher", "s_bias", "t_bias", "lse_s", "lse_t", "value", "mean", "share", "top",
        "even",
    )
} | {"ids": "*i64", "top_ids": "*i64", "mask": "*i1", "sums": "*fp64"}
INTEGERS = {"V", "P", "H", "M", "K"} | {f"stride_{x}" for x in ("x", "out", *"zhwest")}
ODD = {"V"}  # no multiple of 16 at an odd vocabulary; rows are padded


@dataclass
class Build:
    """What the machine code of a kernel costs; spills and shared memory in bytes."""

    kernel: str
    arch: str
    registers: int
    spills: int
    shared: int


@dataclass
class Row(Build):
    matrix: str


def builds(arch):
    """name -> (kernel, pointer types, flags and tiles, odd sizes) of all shipped builds."""
    def exp(store=0, out="*fp32", odd=False, **flags):
        flags = {"HAS_BIAS": False, "HAS_CAP": False, "WANT_ENTROPY": False, "STORE": store,
                 "ONLY_FLAGGED": False} | flags | tuning.exp_tiles(VOCAB)
        return triton_impl._exp_kernel, {"out": out}, flags, odd

    def row_max(**flags):
        return triton_impl._row_max_kernel, {}, flags | tuning.exp_tiles(VOCAB), False

    def row_logits(**flags):
        return triton_impl._row_logits_kernel, {}, flags | tuning.exp_tiles(VOCAB), False

    def gradient(out, **flags):
        flags = {"HAS_EVEN": False} | flags | tuning.exp_tiles(VOCAB)
        return triton_impl._logit_gradient_kernel, {"out": out}, flags, False

    def target(dtype):
        pointers = {"h": dtype, "weight": dtype, "out": "*fp32"}
        return (triton_impl._target_logits_kernel, pointers,
                {"BLOCK_H": 1024, "num_warps": 4}, False)

    def fix(dtype):
        return (triton_impl._fix_targets_kernel, {"e": dtype},
                {"BLOCK_M": 128, "num_warps": 4}, False)

    def token(on, **flags):
        names = ("HAS_TEACHER", "HAS_OLD", "HAS_REF", "HAS_MASK", "HAS_ENTROPY", "HAS_KL_LOSS")
        flags = dict.fromkeys(names, on) | {"DELTA_FROM_OLD": False, "NEGATIVE_ONLY": False} | flags
        return triton_tokens._token_kernel, {}, flags | tuning.TOKEN_TILES, False

    def gemm(dtype, **flags):
        flags = {"HAS_BIAS": False, "HAS_CAP": False, "STORE": True} | flags
        flags |= tuning.gemm_tiles(arch, 2, flags["HAS_CAP"])
        return (triton_impl._gemm_exp_kernel, {"h": dtype, "weight": dtype, "out": "*bf16"},
                flags, False)

    def energies(dtype):
        tiles = tuning.ENERGY_TILES | {"STRIP": tuning.ENERGY_ROWS}
        return triton_impl._energies_kernel, {"e": dtype}, tiles, False

    def scale(dtype):
        return triton_impl._scale_kernel, {"x": dtype}, {"BLOCK": 4096, "num_warps": 8}, False

    def distill(kernel, kind=None, out=None, odd=False, **flags):
        names = ("HAS_BIAS", "HAS_CAP") if kind is None else ("HAS_BIAS", "HAS_T_BIAS", "HAS_CAP")
        flags = dict.fromkeys(names, False) | flags | tuning.exp_tiles(VOCAB)
        if kind is not None:
            flags["KIND"] = triton_distillation.KINDS[kind]
        return kernel, {} if out is None else {"out": out}, flags, odd

    lse, value, slope = (getattr(triton_distillation, f"_{x}_kernel") for x in
                         ("lse", "divergence", "divergence_gradient"))
    both = {"HAS_BIAS": True, "HAS_CAP": True}
    return {
        "exp": exp(),
        "exp-entropy": exp(WANT_ENTROPY=True),
        "exp-bias-softcap-entropy": exp(WANT_ENTROPY=True, **both),
        "exp-flagged": exp(ONLY_FLAGGED=True),
        "exp-store-bf16": exp(1, "*bf16"),
        "exp-store-bf16-odd-V": exp(1, "*bf16", odd=True),
        "exp-store-bf16-bias": exp(1, "*bf16", HAS_BIAS=True),
        "exp-store-bf16-bias-softcap-entropy": exp(1, "*bf16", WANT_ENTROPY=True, **both),
        "exp-store-bf16-flagged": exp(1, "*bf16", ONLY_FLAGGED=True),
        "exp-store-fp32-softcap": exp(1, HAS_CAP=True),
        "exp-logits-entropy": exp(2, WANT_ENTROPY=True),
        "exp-logits-bias-softcap": exp(2, **both),
        "row-max": row_max(HAS_BIAS=False, HAS_CAP=False),
        "row-max-bias-softcap": row_max(**both),
        "row-logits": row_logits(HAS_BIAS=False, HAS_CAP=False),
        "row-logits-bias-softcap": row_logits(**both),
        "gradient-fp32": gradient("*fp32", HAS_CAP=False, HAS_ENTROPY=False),
        "gradient-bf16-softcap": gradient("*bf16", HAS_CAP=True, HAS_ENTROPY=False),
        "gradient-fp16-entropy": gradient("*fp16", HAS_CAP=False, HAS_ENTROPY=True),
        "gradient-fp16-softcap-entropy-even": gradient(
            "*fp16", HAS_CAP=True, HAS_ENTROPY=True, HAS_EVEN=True),
        "target-logits-fp32": target("*fp32"),
        "target-logits-bf16": target("*bf16"),
        "target-logits-fp16": target("*fp16"),
        "fix-targets-bf16": fix("*bf16"),
        "fix-targets-fp32": fix("*fp32"),
        "energies-bf16": energies("*bf16"),
        "energies-fp32": energies("*fp32"),
        "distill-lse": distill(lse),
        "distill-lse-odd-V-bias-softcap": distill(lse, odd=True, **both),
        "distill-forward-kl": distill(value, "forward_kl"),
        "distill-jsd": distill(value, "jsd"),
        "distill-jsd-biases-softcap": distill(value, "jsd", HAS_T_BIAS=True, **both),
        "distill-gradient-forward-kl-bf16": distill(slope, "forward_kl", "*bf16"),
        "distill-gradient-reverse-kl-fp32": distill(slope, "reverse_kl", "*fp32"),
        "distill-gradient-jsd-bf16": distill(slope, "jsd", "*bf16"),
        "distill-gradient-jsd-bf16-odd-V-biases-softcap": distill(
            slope, "jsd", "*bf16", True, HAS_T_BIAS=True, **both),
        "scale-bf16": scale("*bf16"),
        "scale-fp32": scale("*fp32"),
        "token-grpo": token(False),
        "token-all": token(True),
        "token-old-negative-only": token(True, DELTA_FROM_OLD=True, NEGATIVE_ONLY=True),
        "gemm-exp-bf16": gemm("*bf16", STORE=False),
        "gemm-exp-bf16-store": gemm("*bf16"),
        "gemm-exp-fp16-store": gemm("*fp16"),
        "gemm-exp-bf16-store-bias-softcap": gemm("*bf16", **both),
        "gemm-exp-fp16-softcap": gemm("*fp16", STORE=False, HAS_CAP=True),
    }


def build(name, arch, kernel, pointers, flags, odd):
    """Compile one build and read its cubin and PTX."""
    flags = dict(flags)
    options = {k: flags.pop(k) for k in ("num_warps", "num_stages") if k in flags}
    types = {n: "i32" if n in INTEGERS else "fp32" for n in kernel.arg_names}
    types |= {n: t for n, t in (POINTERS | pointers).items() if n in types}
    types |= dict.fromkeys(flags, "constexpr")
    # What the launcher finds out by itself: aligned pointers, sizes that are multiples of 16.
    even = [i for i, n in enumerate(kernel.arg_names)
            if types[n][0] == "*" or (n in INTEGERS - ({"M", "K"} | (ODD if odd else set())))]
    source = ASTSource(kernel, types, flags, {(i,): [["tt.divisibility", 16]] for i in even})
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options=options | {"enable_fp_fusion": True}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [BIN / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True,
            text=True, check=True,
        ).stdout
    def read(word):
        return int(re.search(rf"\b{word}:(\d+)", usage)[1])
    matrix = "+".join(short for short, full in MATRIX.items() if full in compiled.asm["ptx"])
    return Row(name, f"sm_{arch}", read("REG"), read("STACK") + read("LOCAL"),
               compiled.metadata.shared, matrix)


def table(rows):
    head = "| kernel | arch | registers | spills (bytes) | shared (bytes) | matrix instructions |"
    lines = [
        f"Compiled ahead of time by Triton {triton.__version__}, without a GPU; "
        "regenerate with `python bench/aot_report.py`.", "", head, "|---|---|--:|--:|--:|---|",
    ]
    for r in rows:
        lines.append(f"| {r.kernel} | {r.arch} | {r.registers} | {r.spills} | {r.shared} | "
                     f"{r.matrix or '-'} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--print", nargs="+", metavar="NAME", help="only these, to stdout")
    parser.add_argument("--list", action="store_true", help="only the names, nothing compiled")
    args = parser.parse_args()
    wanted = [(name, arch, *parts) for arch in ARCHS for name, parts in builds(arch).items()
              if not args.print or name in args.print]
    if args.list:
        print(json.dumps([[name, f"sm_{arch}"] for name, arch, *_ in wanted]))
        return
    rows = sorted((build(*w) for w in wanted), key=lambda r: r.kernel)
    report = {"triton": triton.__version__, "rows": [asdict(r) for r in rows]}
    if args.print:
        print(json.dumps(report))
        return
    write("aot", report, table(rows))


def write(name, report, text):
    """bench/results/<name>/report.{json,md}."""
    folder = ROOT / "bench" / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(text)


if __name__ == "__main__":
    main()
