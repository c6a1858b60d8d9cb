"""Everything that is made from results.json: table.md, times.png, scaling.png, tolerance.png, the
README's rows.

    python -m bench.plot bench/results/cpu              # table and plots
    python -m bench.plot bench/results/cpu --readme     # and the block of that folder in README

Speed is work per time: "% of bare GEMMs" is the time of the matrix products alone, measured in the
same loop, divided by the provider's; TFLOP/s counts the 8 NHV of a full step (6 with a frozen head)
whatever a provider really computes.
"""

import argparse
import json
from pathlib import Path

from bench.common import MIB, ROOT
from bench.providers import EAGER, OURS, TOLERANT

BARE = "bare GEMMs"
COLUMNS = (
    "profile, nats", "step, ms (p20-p80)", "speed, x of eager", "speed, % of bare GEMMs",
    "peak extra, MiB", "% of eager's",
)
ACCURACY = ("NHV", "max log-prob error", "ratios off > 1 %", "dH error", "dW error")
MARKERS = ("<!-- bench/results/{} -->", "<!-- end of bench/results/{} -->")
# Lines of a plot, ours first.
COLORS = ("tab:blue", "tab:cyan", "tab:purple", "tab:green", "tab:olive", "tab:orange", "tab:red",
          "tab:brown", "tab:pink", "0.4", "0.6", "0.8")


def heading(block):
    live = "all rows live" if block["live"] == 1 else f"{block['live']:.0%} of the rows live"
    head = "frozen head" if block["frozen_head"] else "full head"
    return f"{block['shape']}, {block['profile']}, {head}, {live}"


def softmax(block):
    """The profile and the mean entropy of its softmax."""
    return f"{block['profile']}, {block['entropy']:.2f}"


def rows_of(lines):
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ms(t):
    digits = 0 if t["ms"] >= 200 else 1 if t["ms"] >= 10 else 2
    return digits, f"{t['ms']:.{digits}f} ({t['p20']:.{digits}f}-{t['p80']:.{digits}f})"


def tflops(block, ms):
    """TFLOP/s on the 8 NHV (6 with a frozen head) of all rows, computed or not."""
    nhv = 6 if block["frozen_head"] else 8
    return nhv * block["rows"] * block["hidden"] * block["vocab"] / ms / 1e9


def _times(block, found):
    eager = block["providers"].get(EAGER)
    t, mib = found["time"], found["peak_bytes"] / MIB
    on_gpu = "model" in block
    cells = [softmax(block),
             _ms(t)[1] if on_gpu else f"{t['ms']:.0f} ({t['p20']:.0f}-{t['p80']:.0f})"]
    cells.append(f"{eager['time']['ms'] / t['ms']:.2f}" if eager else "")
    cells += [f"{block['bare']['ms'] / t['ms']:.0%}", f"{mib:.0f}"]
    cells.append(f"{found['peak_bytes'] / eager['peak_bytes']:.0%}" if eager else "")
    return [*cells, f"{tflops(block, t['ms']):.0f}"] if on_gpu else cells


def _accuracy(found):
    e = found["errors"]
    dw = "" if e["d_weight"] is None else f"{e['d_weight']:.1e}"
    return [
        f"{found['nhv']:.1f}", f"{e['log_prob']:.1e}", f"{e['ratio_off']:.1%}",
        f"{e['d_hidden']:.1e}", dw,
    ]


def block_table(results, block):
    """Heading and Markdown table of one block; a provider that did not run says why."""
    on_gpu = "model" in block
    timed = (*COLUMNS, "TFLOP/s on the step") if on_gpu else COLUMNS
    columns = (*(timed if block["timed"] else COLUMNS[:1]), *ACCURACY)
    lines = [["provider", *columns], ["---", *["--:"] * len(columns)]]
    for provider in results["providers"]:
        if block["only"] and provider["name"] not in block["only"]:
            continue
        found = block["providers"].get(provider["name"])
        if found is None:
            why = block.get("not_run", {}).get(provider["name"]) or provider["not_run"]
            cells = [f"not run: {why}", *[""] * (len(columns) - 1)]
        else:
            cells = _times(block, found) if block["timed"] else [softmax(block)]
            cells += _accuracy(found)
        lines.append([provider["name"], *(cell.replace("|", "/") for cell in cells)])
    if block["timed"]:
        t = block["bare"]
        cells = [softmax(block),
                 _ms(t)[1] if on_gpu else f"{t['ms']:.0f} ({t['p20']:.0f}-{t['p80']:.0f})"]
        cells += [""] * (len(columns) - 2)
        if on_gpu:
            cells[len(COLUMNS)] = f"{tflops(block, t['ms']):.0f}"
        lines.append([BARE, *cells])
    return f"### {heading(block)}\n\n{rows_of(lines)}\n"


def tolerance_rows(results):
    """[(block, name, its result, that of the exact row, fastest other library and its ms)]: what a
    tolerance does to a full step."""
    rows = []
    for block in results["blocks"]:
        if not block["timed"] or block["frozen_head"] or block["live"] < 1:
            continue
        found = block["providers"]
        others = [(f["time"]["ms"], name) for name, f in found.items() 
                  if not name.startswith("RLSD")]
        for name, f in found.items():
            exact = found.get(name.split(TOLERANT)[0])
            if TOLERANT in name and exact:
                rows.append((block, name, f, exact, min(others, default=None)))
    return rows


def tolerance_table(results):
    """What each tolerance saves, and the errors of more of them."""
    columns = ("shape", "profile, nats", "time, x of the exact row's", "fastest other library here",
               "its time, x of ours", "peak, x of the exact row's", "NHV", "dH error", "dW error")
    lines = [["row", *columns], ["---"] * 3 + ["--:"] * (len(columns) - 2)]
    for block, name, f, exact, other in tolerance_rows(results):
        lines.append([
            name, block["shape"], softmax(block), f"{f['time']['ms'] / exact['time']['ms']:.2f}",
            *((other[1], f"{other[0] / f['time']['ms']:.2f}") if other else ("", "")),
            f"{f['peak_bytes'] / max(1, exact['peak_bytes']):.2f}", f"{f['nhv']:.1f}",
            *_accuracy(f)[-2:],
        ])
    text = ""
    if len(lines) > 2:
        text = f"### Full head, all rows live: a tolerance against exact\n\n{rows_of(lines)}\n\n"
    columns = ("shape", "tolerance", "NHV", "dH error", "dW error", "loss, log-probs")
    lines = [["profile, nats", *columns], ["---"] * 2 + ["--:"] * 4 + ["---"]]
    for block in results["blocks"]:
        for row in block["by_tolerance"]:
            lines.append([
                softmax(block), block["shape"], f"{row['tolerance']:g}", f"{row['nhv']:.2f}",
                *_accuracy(row)[-2:], "bit for bit" if row["same_bits"] else "CHANGED",
            ])
    return text + (f"### Error by tolerance\n\n{rows_of(lines)}\n" if len(lines) > 2 else "")


def _machine(env, rounds):
    """The closing line: hardware, software, commit."""
    versions = ", ".join(f"{k} {v}" for k, v in env["versions"].items() if v)
    commit = (env["git"] or "unknown")[:12] + (" with uncommitted changes" if env["dirty"] else "")
    gpu = ""
    if "gpu" in env:
        gpu = "; ".join(f"{k.replace('_', ' ')} {v}" for k, v in env["gpu"].items()) + ". "
    return (
        f"{gpu}{env['cpu']}, {env['threads']} threads of {env['cores']} cores, "
        f"{env['cpu_capability']};"
        f" load before {env['load_before']}. Python {env['python']}; {versions}. Commit {commit}.\n"
    )


def table(results):
    """table.md: one table per block, who the providers are, and the machine."""
    env = results["environment"]
    on_gpu = "gpu" in env
    memory = (
        "memory of PyTorch's allocator beyond the inputs, gradients included. NHV: GEMM FLOPs /"
        " (rows x H x V), read off the profiler where PyTorch runs the GEMMs, else as stated in"
        " providers.py. TFLOP/s: 8 NHV (6 with a frozen head) of all rows over the time"
        if on_gpu else
        "resident memory beyond the inputs, gradients included. NHV: GEMM FLOPs / (rows x H x V),"
        " read off the profiler"
    )
    text = [
        f"# One RLSD step on {env['gpu']['name'] if on_gpu else 'a CPU'}\n",
        "hidden, teacher hidden, W, ids, old log-probs, A, loss weights -> loss, dH, dW; providers"
        f" interleaved over {results['rounds']} rounds in one process, medians. Speeds: the time"
        " of eager (the first row) or of the bare GEMMs divided by the provider's. Bare GEMMs: the"
        f" 8 NHV (6 with a frozen head) of the live rows alone, which a tolerance can beat. Nats:"
        f" mean entropy of the profile's softmax. Peak extra: {memory}."
        " Errors: against fp64 on the same inputs; dH, dW relative (Frobenius).\n",
        tolerance_table(results),
        *(block_table(results, block) for block in results["blocks"]),
    ]
    if results.get("not_reached"):
        missing = "; ".join(f"{label} ({why})" for label, why in results["not_reached"])
        text.append(f"Not measured: {missing}.\n")
    text.append("### Providers\n")
    lines = [["provider", "call", "version", "logits rounded to"], ["---"] * 4]
    for p in results["providers"]:
        version = f"{p['package']} {env['versions'].get(p['package']) or '(absent)'}"
        logits = "the input's dtype" if p["logits"] == "input's" else p["logits"]
        lines.append([p["name"], f"`{p['call']}`", version, logits])
    text.append(rows_of(lines) + "\n")
    text.append(_machine(env, results["rounds"]))
    return "\n".join(text)


def readme_rows(results):
    """What the README quotes: of the first block time, memory, work and error, one short line each;
    beside them the time of those that ran on other profiles, too."""
    block = results["blocks"][0]
    others = [b for b in results["blocks"] if b["timed"] and b["profile"] != block["profile"]]
    others = _like(others, block, "rows", "frozen_head", "live")

    def ms(block, name):
        found = block["providers"].get(name)
        digits = _ms(found["time"])[0] if found and "model" in block else 0
        return f"{found['time']['ms']:.{digits}f}" if found else ""

    columns = ("speed, % of bare GEMMs", "peak extra, MiB", "NHV", "dH error",
               *(f"ms, {b['profile']}" for b in others))
    lines = [["", f"ms, {block['profile']}", *columns], ["---", *["--:"] * (1 + len(columns))]]
    for name, found in block["providers"].items():
        _, _, _, bare, mib, *_ = _times(block, found)
        lines.append([
            f"**{name}**" if name.startswith(OURS) else name, ms(block, name), bare, mib,
            f"{found['nhv']:.1f}", _accuracy(found)[-2], *(ms(b, name) for b in others),
        ])
    env = results["environment"]
    machine = env["gpu"]["name"] if "gpu" in env else f"{env['cpu']}, {env['threads']} threads"
    shapes = "; ".join(
        f"{b['profile']}: {b['entropy']:.2f} nats, H={b['hidden']}, V={b['vocab']}"
        for b in (block, *others)
    )
    return (
        f"{rows_of(lines)}\n\n{heading(block)}; {machine}, medians of"
        f" {results['rounds']} rounds. Profiles: {shapes}.\n"
    )


def _around(readme, name):
    """The README up to the end of a folder's first marker, what is quoted, and the rest."""
    first, last = (marker.format(name) for marker in MARKERS)
    before, rest = readme.split(first)
    return before + first, rest.split(last)[0], last + rest.split(last)[1]


def quoted_in(readme, name):
    """The text between the README's markers of a folder of results."""
    return _around(readme, name)[1].strip()


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_times(results, path):
    """Time and peak memory per provider, one row of panels per timed block."""
    plt = _pyplot()
    blocks = [block for block in results["blocks"] if block["timed"]]
    heights = [max(3.0, 0.28 * len(block["providers"])) for block in blocks]
    figure, axes = plt.subplots(
        len(blocks), 2, figsize=(12, 0.6 + sum(heights)), sharey="row", squeeze=False,
        layout="constrained", height_ratios=heights,
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
        left.bar_label(bars, fmt="%.0f" if max(ms) >= 200 else "%.1f", padding=6)
        left.axvline(block["bare"]["ms"], color="tab:red", linestyle="--")
        left.set(xlabel=f"forward + backward, ms (median, p20 to p80); dashed: {BARE}")
        right.bar_label(right.barh(names, mib, color=colors), fmt="%.0f", padding=3)
        right.set(xlabel="peak memory beyond the inputs, MiB")
        left.set_title(f"{heading(block)} ({block['entropy']:.2f} nats)", loc="left", fontsize=10)
        for axis, top in ((left, max(f["time"]["p80"] for f in found)), (right, max(mib))):
            axis.set_xlim(0, 1.15 * max(top, 1e-9))
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def series(blocks, x, y):
    """{provider: sorted [(x(block), y(block, found))]} over blocks, bare GEMMs aside."""
    lines = {}
    for block in blocks:
        for name, found in block["providers"].items():
            lines.setdefault(name, []).append((x(block), y(block, found)))
    return {name: sorted(points) for name, points in lines.items()}


def _like(blocks, first, *keys):
    """Blocks that agree with `first` in these keys."""
    return [b for b in blocks if all(b[k] == first[k] for k in keys)]


def scaling(results):
    """What scaling.png shows: {title: (x label, y label, {provider: points})}, from the blocks that
    differ from the first in one thing only; panels of a single point are left out."""
    blocks = [b for b in results["blocks"] if b["timed"]]
    if not blocks:
        return {}
    first = blocks[0]
    rows = _like(blocks, first, "hidden", "vocab", "profile", "frozen_head", "live")
    whole = _like(blocks, first, "rows", "profile", "frozen_head", "live")
    shares = _like(blocks, first, "rows", "hidden", "vocab", "profile", "frozen_head")
    softmaxes = _like(blocks, first, "rows", "frozen_head", "live")
    if "model" in first:
        softmaxes = _like(softmaxes, first, "model")
    full = next((b["providers"] for b in shares if b["live"] == 1), {})

    def ms(block, found):
        return found["time"]["ms"]

    def mib(block, found):
        return found["peak_bytes"] / MIB

    def of_bare(block, found):
        return 100 * block["bare"]["ms"] / found["time"]["ms"]

    place = {id(b): i + 1 for i, b in enumerate(blocks)}
    panels = {
        "time against N": ("rows N", "ms", series(rows, lambda b: b["rows"], ms)),
        "memory against N": ("rows N", "peak beyond the inputs, MiB",
                             series(rows, lambda b: b["rows"], mib)),
        "time per N x H x V against V": (
            "vocabulary V", "ms / (N H V 1e-9)",
            series(whole, lambda b: b["vocab"],
                   lambda b, f: 1e9 * ms(b, f) / (b["rows"] * b["hidden"] * b["vocab"])),
        ),
        "memory against V": ("vocabulary V", "peak beyond the inputs, MiB",
                             series(whole, lambda b: b["vocab"], mib)),
        "speed by what the softmax is like": (
            "mean entropy, nats", f"% of {BARE}",
            series(softmaxes, lambda b: b["entropy"], of_bare)),
        "speed by block, in the table's order": (
            "block", f"% of {BARE}", series(blocks, lambda b: place[id(b)], of_bare)),
        "dead rows": (
            "live rows, %", "time, % of all rows live",
            {
                name: sorted(
                    (100 * b["live"], 100 * ms(b, b["providers"][name]) / ms(b, found))
                    for b in shares if name in b["providers"]
                )
                for name, found in full.items()
            },
        ),
    }
    return {
        title: panel for title, panel in panels.items()
        if any(len({x for x, _ in points}) > 1 for points in panel[2].values())
    }


def plot_scaling(results, path):
    """Time and memory against N and V, share of the limit, and what dead rows save."""
    panels = scaling(results)
    if not panels:
        return
    plt = _pyplot()
    columns = min(2, len(panels))
    figure, axes = plt.subplots(
        -(-len(panels) // columns), columns, figsize=(7 * columns, 4 * -(-len(panels) // columns)),
        squeeze=False, layout="constrained",
    )
    names = {n for _, _, lines in panels.values() for n in lines}
    order = [p["name"] for p in results["providers"] if p["name"] in names]
    order.sort(key=lambda name: not name.startswith("RLSD"))
    style = {
        name: {"color": COLORS[i % len(COLORS)], "label": name} | (
            {"linewidth": 2, "marker": "o"} if name.startswith("RLSD")
            else {"linewidth": 1, "linestyle": "--", "marker": "s"}
        )
        for i, name in enumerate(order)
    }
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    for axis, (title, (xlabel, ylabel, lines)) in zip(axes.flat, panels.items(), strict=False):
        for name in order:
            if name in lines:
                x, y = zip(*lines[name], strict=True)
                axis.plot(x, y, **style[name])
        axis.set_title(title, loc="left", fontsize=10)
        axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9")
    handles = [plt.Line2D([], [], **style[n]) for n in order]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(order)), fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_tolerance(results, path):
    """Error and work by tolerance, one line per profile."""
    blocks = [b for b in results["blocks"] if b["by_tolerance"]]
    if not blocks:
        return
    plt = _pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for block in blocks:
        rows = [r for r in block["by_tolerance"] if r["tolerance"] > 0]
        x = [r["tolerance"] for r in rows]
        for axis, y in zip(axes, ([r["errors"]["d_hidden"] for r in rows],
                                  [r["errors"]["d_weight"] for r in rows],
                                  [r["nhv"] for r in rows]), strict=True):
            axis.plot(x, y, marker="o", label=f"{softmax(block)} nats, H={block['hidden']}")
    for axis, title in zip(axes, ("dH, relative error", "dW, relative error", "NHV"), strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set(xscale="log", xlabel="gradient_tolerance")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.9")
    for axis in axes[:2]:
        axis.set(yscale="log")
        axis.plot(x, x, color="0.6", linestyle=":", label="the tolerance")
    axes[2].set(ylim=(0, None))
    axes[0].legend(fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(folder, readme=False):
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    (folder / "table.md").write_text(table(results), encoding="utf-8")
    plot_times(results, folder / "times.png")
    plot_scaling(results, folder / "scaling.png")
    plot_tolerance(results, folder / "tolerance.png")
    if readme:
        path = ROOT / "README.md"
        before, _, after = _around(path.read_text(encoding="utf-8"), folder.name)
        path.write_text(f"{before}\n{readme_rows(results)}{after}", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--readme", action="store_true", help="rewrite the README's block too")
    args = parser.parse_args()
    draw(args.folder, args.readme)


if __name__ == "__main__":
    main()
