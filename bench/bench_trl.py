"""TRL's GRPOTrainer beside RLSDTrainer: time and peak memory of one update's forward and backward.

    python -m bench.bench_trl [--rounds 9] [--out bench/results/trl]

Every arm gets the same rollout (prompts, completions, advantages), for generation and rewards are
the same code; `live` is the share of sequences with A != 0. On a CPU TRL's head also scores the
prompt's positions, which it leaves out on a GPU.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOTrainer

from bench.common import MIB, environment
from rlsd.checks.measure import interleave, peak_extra_bytes, summary
from rlsd.demo import word_tokenizer
from rlsd.integrations.trl import RLSDConfig, RLSDTrainer

VOCAB, HIDDEN, LAYERS, BATCH, PROMPT, HINT, LENGTH = 16384, 256, 2, 8, 32, 32, 96
ARMS = {
    "GRPOTrainer": (GRPOTrainer, 0.0),
    "RLSDTrainer, lambda 0": (RLSDTrainer, 0.0),
    "RLSDTrainer, hook A": (RLSDTrainer, 0.5),
    "RLSDTrainer": (RLSDTrainer, 0.5),
}


def make_trainer(name, folder):
    cls, lam = ARMS[name]
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, head_dim=HIDDEN // 4, intermediate_size=3 * HIDDEN,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    ))
    args = RLSDConfig(
        folder, use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=BATCH,
        num_generations=4, max_completion_length=LENGTH, gradient_checkpointing=False,
        rlsd_lambda=lam, teacher_model_kind="live",
    )
    trainer = cls(
        model, lambda completions, **columns: [0.0] * len(completions), args,
        Dataset.from_list([{"prompt": "a", "solution": "b"}] * 8),
        processing_class=word_tokenizer(["a", "b"]),
    )
    if name.endswith("hook A"):
        trainer.obstacle = "the benchmark asks for it"
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def rollout(live):
    """The tensors of one micro-batch, `live` of whose sequences have A != 0."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCAB, (BATCH, HINT + PROMPT + LENGTH), generator=rng)
    advantages = torch.tensor([1.0, -1.0] * (BATCH // 2))
    advantages[round(live * BATCH):] = 0
    mask = torch.ones_like(ids)
    return {
        "prompt_ids": ids[:, HINT:-LENGTH], "prompt_mask": mask[:, HINT:-LENGTH],
        "completion_ids": ids[:, -LENGTH:], "completion_mask": mask[:, -LENGTH:],
        "advantages": advantages, "num_items_in_batch": torch.tensor(BATCH * LENGTH),
        "teacher_prompt_ids": ids[:, :-LENGTH], "teacher_prompt_mask": mask[:, :-LENGTH],
        "has_hint": torch.ones(BATCH, dtype=torch.bool),
    }


def step_of(trainer, live):
    inputs = rollout(live) | {"rlsd_lambda": torch.tensor(trainer.args.rlsd_lambda)}

    def step():
        trainer._compute_loss(trainer.model, dict(inputs)).backward()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--live", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--out", default=None, help="folder for trl.json and trl.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: make_trainer(name, folder) for name in ARMS}
    rows = []
    for live in options.live:
        steps = {name: step_of(trainer, live) for name, trainer in trainers.items()}

        def clear():
            for trainer in trainers.values():
                trainer.model.zero_grad(set_to_none=True)

        seconds = interleave(steps, options.rounds, 0.0, clear)
        for name, step in steps.items():
            clear()
            rows.append({"arm": name, "live": live, **summary(seconds[name]),
                         "peak_mib": peak_extra_bytes(step) / MIB})
    lines = [
        f"Qwen3 architecture, {LAYERS} layers, H={HIDDEN}, V={VOCAB}, fp32; {BATCH} sequences of "
        f"{PROMPT} + {LENGTH} tokens, hint {HINT}; median of {options.rounds} rounds.", "",
        "| live | trainer | ms | p20 to p80 | peak MiB |", "|---|---|---|---|---|",
        *(f"| {r['live']:.0%} | {r['arm']} | {r['ms']:.0f} | {r['p20']:.0f} to {r['p80']:.0f} "
          f"| {r['peak_mib']:.0f} |" for r in rows),
    ]
    print("\n".join(lines))
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        about = environment(["torch", "trl", "transformers", "accelerate"])
        (out / "trl.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        (out / "trl.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
