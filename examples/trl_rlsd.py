"""RLSD in TRL's trainer, on a CPU in under two minutes: a tiny model learns chain arithmetic.

    python examples/trl_rlsd.py

Only three lines differ from a GRPO script: the import, the config's name and the trainer's. The
model and the task come from `rlsd.demo`; with weights at hand, pass their name as `model`.
"""

import random
import tempfile
from pathlib import Path

import torch
from datasets import Dataset

from rlsd.demo import (
    LENGTH,
    MARKER,
    OPERATIONS,
    TEMPLATE,
    chain_demonstrations,
    chain_problem,
    chain_reward,
    save_model,
    tiny_model,
    warm_up,
    word_tokenizer,
)
from rlsd.integrations.trl import RLSDConfig, RLSDTrainer
from rlsd.policy.checkpoint import load_tokenizer


def warm_start(folder, steps):
    """A 0.1 M parameter model that has seen the task, saved with its tokenizer."""
    words = ["#", MARKER, "<q>", "<a>", "<h>", *map(str, range(10))]
    tokenizer = word_tokenizer([*words, *[f"{o}{b}" for o in OPERATIONS for b in range(10)]])
    model = tiny_model(len(tokenizer), seed=0)
    warm_up(model, tokenizer, chain_demonstrations(0), steps, seed=0)
    return save_model(model, tokenizer, folder)


def main(warm_up_steps=300, max_steps=40):
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="trl_rlsd_"))
    model = warm_start(folder / "warm_start", warm_up_steps)
    rng = random.Random(1)
    pairs = [chain_problem(rng) for _ in range(500)]
    dataset = Dataset.from_list([{"prompt": p, "solution": s} for p, s in pairs])
    args = RLSDConfig(
        output_dir=str(folder / "run"), max_steps=max_steps, learning_rate=5e-4,
        lr_scheduler_type="constant", adam_beta2=0.98,
        per_device_train_batch_size=64, num_generations=8, max_completion_length=LENGTH + 2,
        rlsd_lambda=1.0, rlsd_reweight_clip_range=1.0, rlsd_lambda_decay_steps=60,
        privileged_template=TEMPLATE, logging_steps=5, save_strategy="no", report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
    )
    trainer = RLSDTrainer(
        model=model, reward_funcs=chain_reward, args=args, train_dataset=dataset,
        processing_class=load_tokenizer(model),
    )
    trainer.train()
    for record in trainer.state.log_history:
        if "reward" in record:
            shown = ("reward", "rlsd/effective_lambda", "rlsd/delta_mean", "rlsd/clip_high_frac")
            print(f"step {record['step']:>3}  " + "  ".join(
                f"{name} {record[name]:.3f}" for name in shown if name in record
            ))
    return trainer


if __name__ == "__main__":
    main()
