"""TRL's trainers beside ours: time and peak memory of one update's forward and backward.

    python -m bench.bench_trl [--rounds 9] [--out bench/results/trl]

GRPOTrainer and RLSDTrainer get the same rollout (prompts, completions, advantages), for generation
and rewards are the same code; `live` is the share of sequences with A != 0. Then both with the
options whose loss is TRL's own formula; with one long prompt for all rows, computed for each or
once; and SFTTrainer with either head. On a CPU TRL's head also scores the prompt's positions, which
it leaves out on a GPU.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOTrainer, SFTConfig, SFTTrainer

from bench.common import MIB, environment
from rlsd.checks.measure import interleave, peak_extra_bytes, summary
from rlsd.demo import word_tokenizer
from rlsd.integrations.trl import RLSDConfig, RLSDTrainer
from rlsd.integrations.trl_sft import use_fused_head

VOCAB, HIDDEN, LAYERS, BATCH, PROMPT, HINT, LENGTH = 16384, 256, 2, 8, 32, 32, 96
LONG = 512  # the prompt of a group
ARMS = {
    "GRPOTrainer": (GRPOTrainer, 0.0),
    "RLSDTrainer, lambda 0": (RLSDTrainer, 0.0),
    "RLSDTrainer, hook A": (RLSDTrainer, 0.5),
    "RLSDTrainer": (RLSDTrainer, 0.5),
}
# Of one prompt for all rows.
SHARING = {
    "GRPOTrainer": (GRPOTrainer, 0.0, {}),
    "RLSDTrainer, lambda 0, for each": (RLSDTrainer, 0.0, {"share_prompts": "false"}),
    "RLSDTrainer, lambda 0, once": (RLSDTrainer, 0.0, {"share_prompts": "true"}),
    "RLSDTrainer, for each": (RLSDTrainer, 0.5, {"share_prompts": "false"}),
    "RLSDTrainer, once": (RLSDTrainer, 0.5, {"share_prompts": "true"}),
}
OPTIONS = {
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "sequence-level ratio": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "beta, corrected KL": {"beta": 0.1},
    "entropy_coef": {"entropy_coef": 0.01},
    "top_entropy_quantile": {"top_entropy_quantile": 0.2},
}


def save_model(folder):
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, head_dim=HIDDEN // 4, intermediate_size=3 * HIDDEN,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )).save_pretrained(folder)


def make_trainer(cls, lam, folder, **options):
    args = RLSDConfig(
        folder, use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=BATCH,
        num_generations=4, max_completion_length=LENGTH, gradient_checkpointing=False,
        rlsd_lambda=lam, teacher_model_kind="live", **options,
    )
    trainer = cls(
        folder, lambda completions, **columns: [0.0] * len(completions), args,
        Dataset.from_list([{"prompt": "a", "solution": "b"}] * 8),
        processing_class=word_tokenizer(["a", "b"]),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def make_arms(folder):
    arms = {name: make_trainer(cls, lam, folder) for name, (cls, lam) in ARMS.items()}
    arms["RLSDTrainer, hook A"].obstacle = "the benchmark asks for it"
    return arms


def sft_steps(folder):
    """One micro-batch by SFTTrainer, with TRL's fused head and with ours."""
    ids, steps = rollout(1.0), {}
    ids = torch.cat([ids["prompt_ids"], ids["completion_ids"]], 1)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    for name in ("SFTTrainer", "SFTTrainer, use_fused_head"):
        trainer = SFTTrainer(
            folder, args=SFTConfig(folder, use_cpu=True, bf16=False, report_to="none",
                                   gradient_checkpointing=False),
            train_dataset=Dataset.from_list([{"prompt": "a", "completion": " b"}] * 8),
            processing_class=word_tokenizer(["a", "b"]),
        )
        if "use" in name:
            use_fused_head(trainer)
        trainer.model.train()

        def step(trainer=trainer):
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            trainer.compute_loss(trainer.model, inputs).backward()

        steps[name] = step, trainer.model
    return steps


def rollout(live, prompt=PROMPT, same=False):
    """The tensors of one micro-batch, `live` of whose sequences have A != 0.

    same: all rows have one prompt, and so one hint.
    """
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCAB, (BATCH, HINT + prompt + LENGTH), generator=rng)
    if same:
        ids[:, :-LENGTH] = ids[0, :-LENGTH]
    advantages = torch.tensor([1.0, -1.0] * (BATCH // 2))
    advantages[round(live * BATCH):] = 0
    mask = torch.ones_like(ids)
    return {
        "prompt_ids": ids[:, HINT:-LENGTH], "prompt_mask": mask[:, HINT:-LENGTH],
        "completion_ids": ids[:, -LENGTH:], "completion_mask": mask[:, -LENGTH:],
        "advantages": advantages, "num_items_in_batch": torch.tensor(BATCH * LENGTH),
        "teacher_prompt_ids": ids[:, :-LENGTH], "teacher_prompt_mask": mask[:, :-LENGTH],
        "has_hint": torch.ones(BATCH, dtype=torch.bool),
        "ref_per_token_logps": torch.full((BATCH, LENGTH), -9.0),
    }


def step_of(trainer, *of_rollout):
    inputs = rollout(*of_rollout) | {"rlsd_lambda": torch.tensor(trainer.args.rlsd_lambda)}

    def step():
        trainer._compute_loss(trainer.model, dict(inputs)).backward()

    return step


def measure(case, steps, rounds):
    """Rows of the steps {name: (function, model)}, in turns, beside the first of them."""
    def clear():
        for _, model in steps.values():
            model.zero_grad(set_to_none=True)

    seconds = interleave({name: step for name, (step, _) in steps.items()}, rounds, 0.0, clear)
    rows = []
    for name, (step, _) in steps.items():
        clear()
        rows.append({"case": case, "arm": name, **summary(seconds[name]),
                     "peak_mib": peak_extra_bytes(step) / MIB})
    for row in rows:
        row["of_first"] = row["ms"] / rows[0]["ms"]
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--live", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--out", default=None, help="folder for trl.json and trl.md")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        arms = make_arms(folder)
        for live in options.live:
            steps = {name: (step_of(x, live), x.model) for name, x in arms.items()}
            rows += measure(f"{live:.0%} live", steps, options.rounds)
        for case, changed in OPTIONS.items():
            arms = {"GRPOTrainer": GRPOTrainer, "RLSDTrainer, lambda 0": RLSDTrainer}
            arms = {name: make_trainer(cls, 0.0, folder, **changed) for name, cls in arms.items()}
            steps = {name: (step_of(x, 1.0), x.model) for name, x in arms.items()}
            rows += measure(case, steps, options.rounds)
        arms = {
            name: make_trainer(cls, lam, folder, **changed)
            for name, (cls, lam, changed) in SHARING.items()
        }
        steps = {name: (step_of(x, 1.0, LONG, True), x.model) for name, x in arms.items()}
        rows += measure(f"one prompt of {LONG}", steps, options.rounds)
        rows += measure("SFT", sft_steps(folder), options.rounds)
    lines = [
        f"Qwen3 architecture, {LAYERS} layers, H={HIDDEN}, V={VOCAB}, fp32; {BATCH} sequences of "
        f"{PROMPT} + {LENGTH} tokens, hint {HINT}; median of {options.rounds} rounds. Arms of a "
        "case take turns; `of TRL` is their time over that of its first.", "",
        "| case | trainer | ms | p20 to p80 | of TRL | peak MiB |", "|---|---|---|---|---|---|",
        *(f"| {r['case']} | {r['arm']} | {r['ms']:.0f} | {r['p20']:.0f} to {r['p80']:.0f} "
          f"| {r['of_first']:.2f} | {r['peak_mib']:.0f} |" for r in rows),
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
