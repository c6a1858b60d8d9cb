"""One RLSD update of a group, its prompt computed once or once per completion: time, peak memory.

    python -m bench.bench_prompts [--rounds 3] [--out bench/results/prompts]

Teacher, student, fused loss and backward of one group in one process, side by side: `padded` rows,
`packed` ones (SDPA; rows of at most 4096 tokens), `shared`, and for the goals the other way that
was tried, `block mask`: one row [prompt, completion 1 .. G] under an explicit mask. All completions
are equally long, which favours `padded`: no padding, so its attention needs no mask and skips half.
Models are slices in the proportions of SmolLM2-135M (trunk : pair of tokens : head per token), with
random weights, of which neither time nor memory depends. Time is the process's on its processor,
which on one thread of an idle machine is the time that passes, and hardly grows on a busy one. A
cell that is in the output is not run again, so an interrupted run goes on; delete the folder to
start anew.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from bench.common import MIB, environment
from rlsd.checks.measure import balanced_order, peak_extra_bytes, summary
from rlsd.policy.packing import Layout, completion_hidden, labels, micro_batches
from rlsd_kernels import RLSDLossConfig, fused_linear_rlsd_loss

HINT, ROW, IMAGE, START = 256, 4096, 4, 5  # the last two are ids of tokens
CONFIG = RLSDLossConfig()
PROVIDERS = {
    "padded": Layout(0, image_token_id=IMAGE),
    "packed": Layout(0, padding_free=True, image_token_id=IMAGE),
    "shared": Layout(0, image_token_id=IMAGE, share_prompts=True),
}


class Cell(NamedTuple):
    """A group: completions of one prompt of so many tokens, or of 32 beside a picture of 256."""

    model: str
    prompt: int | str
    completion: int
    group: int


GOALS = [Cell("3 of 30 layers", 512, 128, 8), Cell("3 of 30 layers", 64, 512, 8)]
GRID = [
    Cell("one narrow layer", prompt, completion, group)
    for prompt in (64, 512, 2048, "image") for completion in (128, 512) for group in (4, 8, 16)
]
SIZES = {
    "3 of 30 layers": {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "num_hidden_layers": 3, "vocab_size": 4915,
    },
    "one narrow layer": {  # a wide MLP makes up for attention's share, which grows as H shrinks
        "hidden_size": 192, "intermediate_size": 1872, "num_attention_heads": 3,
        "num_key_value_heads": 1, "num_hidden_layers": 1, "vocab_size": 1664,
    },
}


class Picture:
    """32 x 32 patches of 16 x 16 pixels: 256 tokens."""

    def pixels(self):
        rng = torch.Generator().manual_seed(0)
        return {
            "pixel_values": torch.randn(1024, 3 * 2 * 16 * 16, generator=rng),
            "image_grid_thw": torch.tensor([[1, 32, 32]]),
        }


def make_model(cell):
    torch.manual_seed(0)
    common = {**SIZES[cell.model], "max_position_embeddings": 8192, "pad_token_id": 0}
    if cell.prompt != "image":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(
            **common, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        )).eval()
    return transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(
        text_config={**common, "head_dim": 64, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [12, 10, 10],
            "mrope_interleaved": True,
        }},
        vision_config={  # per patch a tenth of what the text model does per token, as in the 8B
            "depth": 1, "hidden_size": 96, "num_heads": 2, "intermediate_size": 256,
            "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "out_hidden_size": 192, "num_position_embeddings": 1024, "deepstack_visual_indexes": [],
        },
        image_token_id=IMAGE, vision_start_token_id=START, vision_end_token_id=6,
        video_token_id=7, tie_word_embeddings=True,
    )).eval()


def contexts(cell, vocab):
    """(student's prompt, teacher's, completions (G, T), pictures of the group)."""
    rng = torch.Generator().manual_seed(1)

    def text(*shape):
        return torch.randint(8, vocab, shape, generator=rng)

    picture = Picture() if cell.prompt == "image" else None
    prompt = text(32 if picture else cell.prompt).tolist()
    if picture:
        prompt = [START, *[IMAGE] * 256, 6, *prompt]
    return (
        prompt, [*prompt, *text(HINT).tolist()], text(cell.group, cell.completion),
        [picture] * cell.group,
    )


def block_masked(model, prompt, ids):
    """completion_hidden of a group as one row: completions see the prompt and themselves."""
    group, width = ids.shape
    row = torch.cat([torch.tensor(prompt), ids.flatten()])[None]
    own = torch.cat([torch.full((len(prompt),), -1), torch.arange(group).repeat_interleave(width)])
    place = torch.arange(len(own))
    later = (len(prompt) + torch.arange(width)).repeat(group)
    seen = (own[:, None] == own) | (own == -1)
    hidden = model.base_model(
        input_ids=row, position_ids=torch.cat([place[: len(prompt)], later])[None],
        attention_mask=(seen & (place[:, None] >= place))[None, None], use_cache=False,
    ).last_hidden_state[0]
    last = hidden[len(prompt) - 1].expand(group, 1, -1)
    return torch.cat([last, hidden[len(prompt) :].view(group, width, -1)[:, :-1]], 1)


def step_of(model, cell, provider):
    """One update of a group, gradients left in the model; returns the loss."""
    own, hinted, ids, images = contexts(cell, SIZES[cell.model]["vocab_size"])
    layout, mask = PROVIDERS.get(provider), torch.ones_like(ids, dtype=torch.bool)
    advantages = torch.linspace(-1, 1, cell.group)
    budget = ROW if provider == "packed" else None
    known = [labels([p] * cell.group, images) for p in (own, hinted)]
    parts = [list(range(cell.group))]
    if budget:
        parts = micro_batches(known, mask.sum(1).tolist(), 1, budget, layout)

    def hidden(prompt, rows):
        if layout is None:
            return block_masked(model, prompt, ids)
        return completion_hidden(
            model, [prompt] * len(rows), ids[rows], mask[rows], layout,
            images=[images[i] for i in rows],
        )

    def step():
        total = 0.0
        for rows in parts:
            with torch.no_grad():
                teacher = hidden(hinted, rows)
            out = fused_linear_rlsd_loss(
                hidden(own, rows), model.get_output_embeddings().weight, ids[rows],
                advantages[rows], teacher_hidden=teacher, rlsd_lambda=0.5, config=CONFIG,
                loss_weights=torch.full(ids[rows].shape, 1 / ids.numel()),
            )
            out.loss.backward()
            total += out.loss.item()
        return total

    return step


def processor_clock(function):
    """Seconds of all threads of this process in one call."""
    began = time.process_time()
    function()
    return time.process_time() - began


def measure(cell, rounds):
    """{provider: summary of its times, with loss and peak}; the rounds are interleaved."""
    model = make_model(cell)
    names = [*PROVIDERS, *(["block mask"] if cell in GOALS else [])]
    steps = {name: step_of(model, cell, name) for name in names}

    def clear():
        model.zero_grad(set_to_none=True)

    found, losses = {}, {}
    for name, step in steps.items():
        clear()
        peak = peak_extra_bytes(lambda name=name, step=step: losses.update({name: step()}))
        found[name] = {"loss": losses[name], "peak_mib": peak / MIB}
        if abs(losses[name] - losses["padded"]) > 1e-5:
            raise RuntimeError(f"{name} computes another loss than padded: {losses}")
    seconds = {name: [] for name in steps}
    for i in range(rounds):  # each has run once before
        for name in balanced_order(names, i):
            clear()
            seconds[name].append(processor_clock(steps[name]))
    return {name: one | summary(seconds[name]) for name, one in found.items()}


def ratios(row, key):
    """Of each provider to padded."""
    return {name: one[key] / row["found"]["padded"][key] for name, one in row["found"].items()}


def table(results):
    """Markdown of all cells."""
    about = results["about"]
    lines = [
        f"One update of a group, fp32, {about['threads']} thread, hint {HINT}; processor time, "
        f"median of {results['rounds']} interleaved rounds; x: to padded in the same rounds. Load "
        f"of the machine before: {about['load_before']} on {about['cores']} cores. Peak memory is "
        "what an update needs beyond the weights.", "",
        "| model | prompt | completion | G | padded, ms | packed, x | shared, x | block mask, x | "
        "padded, peak MiB | packed, x | shared, x | block mask, x |",
        "|---|" + "--:|" * 11,
    ]
    for row in results["rows"]:
        padded, cells = row["found"]["padded"], []
        for key in ("ms", "peak_mib"):
            found = ratios(row, key)
            cells += [f"{padded[key]:.0f}"] + [
                f"{found[name]:.2f}" if name in found else ""
                for name in ("packed", "shared", "block mask")
            ]
        lines.append("| " + " | ".join([*map(str, row["cell"]), *cells]) + " |")
    return "\n".join(lines) + "\n"


def plot(results, path):
    """Time and peak of shared prompts over G, one line per prompt and completion."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grid = [row for row in results["rows"] if Cell(*row["cell"]) in GRID]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for axis, key, title in zip(axes, ("ms", "peak_mib"), ("time", "peak memory"), strict=True):
        for k, prompt in enumerate((64, 512, 2048, "image")):
            for completion, style in ((128, "-"), (512, "--")):
                line = sorted(
                    (row["cell"][3], ratios(row, key)["shared"]) for row in grid
                    if tuple(row["cell"][1:3]) == (prompt, completion)
                )
                axis.plot([g for g, _ in line], [x for _, x in line], style, color=f"C{k}",
                          marker="o", label=f"prompt {prompt}, completion {completion}")
        axis.axhline(1, color="0.6", linewidth=1)
        axis.set(title=f"{title} of an update", xlabel="completions per prompt",
                 xticks=[4, 8, 16])
    axes[0].set(ylabel="shared / padded", ylim=(0, None))
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", fontsize=7, ncols=4, handlelength=4)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="bench/results/prompts", type=Path)
    parser.add_argument("--only", nargs="*", type=int, help="numbers of cells, the goals first")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path, cells = options.out / "prompts.json", [*GOALS, *GRID]
    results = {"about": environment(["torch", "transformers"]), "rounds": options.rounds,
               "rows": []}
    if path.exists():
        results = json.loads(path.read_text())
    for i in range(len(cells)) if options.only is None else options.only:
        if list(cells[i]) in [row["cell"] for row in results["rows"]]:
            continue
        row = {"cell": cells[i], "found": measure(cells[i], options.rounds)}
        results["rows"].append(row)
        shared = {key: ratios(row, key)["shared"] for key in ("ms", "peak_mib")}
        print(*cells[i], *(f"{key} {value:.2f} x padded" for key, value in shared.items()),
              sep=", ", flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    results["rows"].sort(key=lambda row: cells.index(Cell(*row["cell"])))
    (options.out / "prompts.md").write_text(table(results))
    plot(results, options.out / "prompts.png")


if __name__ == "__main__":
    main()
