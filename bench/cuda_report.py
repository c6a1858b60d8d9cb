"""Compiles csrc without a GPU and reads what the machine code of every kernel costs.

    python bench/cuda_report.py                 # writes bench/results/cuda/report.{json,md}
    python bench/cuda_report.py --print 90a     # JSON for the architectures named so

One row per kernel and architecture: registers per thread, bytes of spills and stack, shared memory,
and how many 16-byte loads and stores the code has.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.aot_report import BIN, Build, write  # noqa: E402  CUDA's cuobjdump comes with Triton
from rlsd_kernels import extension  # noqa: E402


@dataclass
class Row(Build):
    loads: int
    stores: int


def readable(symbols):
    """rlsd_exp_kernel<bf16, exp, capped=1, entropy=0> for each mangled name."""
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True)
    store = {"(rlsd::Store)0": "none", "(rlsd::Store)1": "exp", "(rlsd::Store)2": "logits"}
    short = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32", **store}
    names = {}
    for symbol, full in zip(symbols, done.stdout.splitlines(), strict=True):
        kernel, arguments = re.search(r"(rlsd_\w+)(?:<(.*?)>)?\(", full).groups()
        flags = {"rlsd_exp_kernel": ["softcap", "entropy"], "rlsd_row_max_kernel": ["softcap"],
                 "rlsd_row_logits_kernel": ["softcap"],
                 "rlsd_logit_gradient_kernel": ["softcap", "entropy"]}.get(kernel, [])
        words = [short.get(x, x) for x in (arguments or "").split(", ") if x]
        types = [x for x in words if x not in ("true", "false")]
        on = [name for name, x in zip(flags, words[len(types):], strict=True) if x == "true"]
        names[symbol] = "-".join([kernel.removesuffix("_kernel").replace("_", "-"), *types, *on])
    return names


def vectors(library):
    """(symbol, arch) -> number of 16-byte loads and stores of global memory."""
    listing = subprocess.run(
        [BIN / "cuobjdump", "-sass", library], capture_output=True, text=True, check=True
    ).stdout
    counts, arch, symbol = {}, None, None
    for line in listing.splitlines():
        if found := re.match(r"\s*arch = (sm_\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function : (\S+)", line):
            symbol = found[1]
            counts[symbol, arch] = [0, 0]
        elif symbol and (found := re.search(r"\b(LDG|STG)\.[\w.]*\b128\b", line)):
            counts[symbol, arch][found[1] == "STG"] += 1
    return counts


def build(archs, folder):
    """Compile the kernels for archs and read ptxas' account of them."""
    library = Path(folder) / "kernels.so"
    sources = [x for x in extension.source_files() if x.suffix == ".cu"]
    command = extension.command(extension.nvcc(), library, archs, sources, "-Xptxas", "-v")
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise SystemExit(done.stdout[-3000:])
    entry = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(.*?)\n"
    )
    found = re.findall(entry, done.stdout, re.S)
    names, wide = readable([x[0] for x in found]), vectors(library)
    rows = []
    for symbol, arch, stack, spill_out, spill_in, registers, rest in found:
        shared = re.search(r"(\d+) bytes smem", rest)
        rows.append(Row(
            names[symbol], arch, int(registers), int(stack) + int(spill_out) + int(spill_in),
            int(shared[1]) if shared else 0, *wide[symbol, arch],
        ))
    return sorted(rows, key=lambda r: (r.kernel, int(re.sub(r"\D", "", r.arch))))


def table(rows, version):
    head = ("| kernel | arch | registers | spills and stack (bytes) | shared (bytes) | "
            "16-byte loads | 16-byte stores |")
    lines = [
        f"Compiled ahead of time by nvcc {version}, without a GPU; regenerate with "
        "`python bench/cuda_report.py`.", "", head, "|---|---|--:|--:|--:|--:|--:|",
    ]
    lines += ["| " + " | ".join(map(str, asdict(r).values())) + " |" for r in rows]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--print", nargs="+", metavar="ARCH", help="only for these, to stdout")
    args = parser.parse_args()
    version = ".".join(map(str, extension.nvcc_version(extension.nvcc())))
    with tempfile.TemporaryDirectory() as folder:
        archs = args.print or extension.parse_archs(extension.DEFAULT_ARCHS)
        rows = build(archs, folder)
    report = {"nvcc": version, "sources": extension.source_hash(), "rows": [*map(asdict, rows)]}
    if args.print:
        print(json.dumps(report))
        return
    write("cuda", report, table(rows, version))


if __name__ == "__main__":
    main()
