"""Everything that is made from results.json: table.md, times.png and the README's rows.

    python -m bench.plot bench/results/cpu              # table and plot
    python -m bench.plot bench/results/cpu --readme     # and the block between README's markers
"""

import argparse
import json
from pathlib import Path

from bench.common import MIB, ROOT
from bench.providers import EAGER, OURS

BARE = "bare GEMMs"
COLUMNS = (
    "step, ms (p20-p80)", "speed, x of eager", "speed, % of bare GEMMs", "peak extra, MiB",
    "% of eager's",
)
ACCURACY = ("NHV", "max log-prob error", "ratios off > 1 %", "dH error", "dW error")
MARKERS = ("<!-- bench/results/cpu -->", "<!-- end of bench/results/cpu -->")


def heading(block):
    live = "all rows live" if block["live"] == 1 else f"{block['live']:.0%} of the rows live"
    head = "frozen head" if block["frozen_head"] else "full head"
    return f"{block['shape']}, {head}, {live}"


def rows_of(lines):
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _times(block, found):
    eager = block["providers"].get(EAGER)
    t, mib = found["time"], found["peak_bytes"] / MIB
    cells = [f"{t['ms']:.0f} ({t['p20']:.0f}-{t['p80']:.0f})"]
    cells.append(f"{eager['time']['ms'] / t['ms']:.2f}" if eager else "")
    cells += [f"{block['bare']['ms'] / t['ms']:.0%}", f"{mib:.0f}"]
    cells.append(f"{found['peak_bytes'] / eager['peak_bytes']:.0%}" if eager else "")
    return cells


def _accuracy(found):
    e = found["errors"]
    dw = "" if e["d_weight"] is None else f"{e['d_weight']:.1e}"
    return [
        f"{found['nhv']:.1f}", f"{e['log_prob']:.1e}", f"{e['ratio_off']:.1%}",
        f"{e['d_hidden']:.1e}", dw,
    ]


def block_table(results, block):
    """Heading and Markdown table of one block; a provider that did not run says why."""
    columns = (*(COLUMNS if block["timed"] else ()), *ACCURACY)
    lines = [["provider", *columns], ["---", *["--:"] * len(columns)]]
    for provider in results["providers"]:
        found = block["providers"].get(provider["name"])
        if found is None:
            cells = [f"not run: {provider['not_run']}", *[""] * (len(columns) - 1)]
        else:
            cells = [*(_times(block, found) if block["timed"] else ()), *_accuracy(found)]
        lines.append([provider["name"], *(cell.replace("|", "/") for cell in cells)])
    if block["timed"]:
        t = block["bare"]
        cells = [f"{t['ms']:.0f} ({t['p20']:.0f}-{t['p80']:.0f})"]
        lines.append([BARE, *cells, *[""] * (len(columns) - 1)])
    return f"### {heading(block)}\n\n{rows_of(lines)}\n"


def table(results):
    """table.md: one table per block, who the providers are, and the machine."""
    env = results["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in env["versions"].items() if v)
    text = [
        "# One RLSD step on a CPU\n",
        "hidden, teacher hidden, W, ids, old log-probs, A, loss weights -> loss, dH, dW; providers"
        f" interleaved over {results['rounds']} rounds in one process, medians. Speeds: the time"
        " of eager (the first row) or of the bare GEMMs divided by the provider's. Bare GEMMs: the"
        " 8 NHV (6 with a frozen head) of the live rows alone. Peak extra: resident memory beyond"
        " the inputs, gradients included. NHV: GEMM FLOPs / (rows x H x V), read off the profiler."
        " Errors: against fp64 on the same inputs; dH, dW relative (Frobenius).\n",
        *(block_table(results, block) for block in results["blocks"]),
        "### Providers\n",
    ]
    lines = [["provider", "call", "version", "logits rounded to"], ["---"] * 4]
    for p in results["providers"]:
        version = f"{p['package']} {env['versions'].get(p['package']) or '(absent)'}"
        logits = "the input's dtype" if p["logits"] == "input's" else p["logits"]
        lines.append([p["name"], f"`{p['call']}`", version, logits])
    text.append(rows_of(lines) + "\n")
    commit = (env["git"] or "unknown")[:12] + (" with uncommitted changes" if env["dirty"] else "")
    text.append(
        f"{env['cpu']}, {env['threads']} threads of {env['cores']} cores, {env['cpu_capability']};"
        f" load before {env['load_before']}. Python {env['python']}; {versions}. Commit {commit}.\n"
    )
    return "\n".join(text)


def readme_rows(results):
    """What the README quotes: time and memory of the first block, one short line each."""
    block = results["blocks"][0]
    lines = [["", "step, ms", "speed, % of bare GEMMs", "peak extra, MiB", "NHV"],
             ["---", *["--:"] * 4]]
    for name, found in block["providers"].items():
        _, _, bare, mib, _ = _times(block, found)
        shown = f"**{name}**" if name == OURS else name
        lines.append([shown, f"{found['time']['ms']:.0f}", bare, mib, f"{found['nhv']:.0f}"])
    env = results["environment"]
    return (
        f"{rows_of(lines)}\n\n{heading(block)}; {env['cpu']}, {env['threads']} threads, medians of"
        f" {results['rounds']} rounds.\n"
    )


def quoted_in(readme):
    """The text between the README's markers."""
    return readme.split(MARKERS[0])[1].split(MARKERS[1])[0].strip()


def plot_times(results, path):
    """Time and peak memory per provider, one row of panels per timed block."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blocks = [block for block in results["blocks"] if block["timed"]]
    figure, axes = plt.subplots(
        len(blocks), 2, figsize=(12, 0.6 + 3 * len(blocks)), sharey="row", squeeze=False,
        layout="constrained",
    )
    for (left, right), block in zip(axes, blocks, strict=True):
        names = list(block["providers"])[::-1]
        found = [block["providers"][name] for name in names]
        colors = ["tab:blue" if name.startswith("RLSD") else "0.7" for name in names]
        ms = [f["time"]["ms"] for f in found]
        spread = [[f["time"]["ms"] - f["time"]["p20"] for f in found],
                  [f["time"]["p80"] - f["time"]["ms"] for f in found]]
        mib = [f["peak_bytes"] / MIB for f in found]
        bars = left.barh(names, ms, xerr=spread, color=colors, ecolor="0.3")
        left.bar_label(bars, fmt="%.0f", padding=6)
        left.axvline(block["bare"]["ms"], color="tab:red", linestyle="--")
        left.set(xlabel=f"forward + backward, ms (median, p20 to p80); dashed: {BARE}")
        right.bar_label(right.barh(names, mib, color=colors), fmt="%.0f", padding=3)
        right.set(xlabel="peak memory beyond the inputs, MiB")
        left.set_title(heading(block), loc="left", fontsize=10)
        for axis, top in ((left, max(f["time"]["p80"] for f in found)), (right, max(mib))):
            axis.set_xlim(0, 1.15 * max(top, 1e-9))
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(folder, readme=False):
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    (folder / "table.md").write_text(table(results), encoding="utf-8")
    plot_times(results, folder / "times.png")
    if readme:
        path = ROOT / "README.md"
        before, rest = path.read_text(encoding="utf-8").split(MARKERS[0])
        _, after = rest.split(MARKERS[1])
        text = f"{before}{MARKERS[0]}\n{readme_rows(results)}{MARKERS[1]}{after}"
        path.write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--readme", action="store_true", help="rewrite the README's block too")
    args = parser.parse_args()
    draw(args.folder, args.readme)


if __name__ == "__main__":
    main()
