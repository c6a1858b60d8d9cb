"""Runs of the trainer in worlds of several gloo processes, on given rollouts.

    python distributed_run.py FOLDER

The rollouts are made from the questions alone, so that every world trains on the same. Each world
runs each case from the start, saves, and goes on from the checkpoint of another world; what its
process r ends with is FOLDER/<world>/<case>-<r>.pt.
"""

import os
import socket
import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp
from families import architecture
from runs import WORDS, make_trainer, options

import rlsd.trainer
from rlsd.demo import save_model, word_tokenizer
from rlsd.policy.distributed import whole
from rlsd.reports.report import number
from rlsd.sampling.rollout import Rollout

WORLDS = {"plain": 0, "ddp-2": 2, "ddp-4": 4, "fsdp-1": 1, "fsdp-2": 2, "fsdp-4": 4}
BASE = {
    "max_steps": 3, "teacher_sync_steps": 2, "per_device_train_batch_size": 3, "rlsd_lambda": 1.0,
}
CASES = {
    "dense": {"beta": 0.1, "num_iterations": 2, "vllm_importance_sampling_correction": True},
    "ema": {"teacher_model_kind": "ema", "teacher_ema_rate": 0.5, "gradient_checkpointing": True,
            "sharded_checkpoints": True},
    "lora": {
        # Rank 1: processes without a row of A hold empty shards.
        "use_peft": True, "lora_r": 1, "teacher_sync_steps": 1,
    },
    "opsd": {"objective": "opsd", "teacher_model_kind": "ema"},
    "rlcsd": {"objective": "rlcsd", "hint_source": "rollout", "success_reward_threshold": 0.5,
              "rlcsd_tau": 1.0},
    "sft": {"objective": "sft"},
    "moe": {
        "model_name_or_path": "qwen3-moe", "padding_free": True, "rlsd_negative_only": True,
        "teacher_model_kind": "live",
    },
    "untied": {"model_name_or_path": "llama3", "teacher_model_kind": "base"},
    "bf16": {"bf16": True, "teacher_sync_steps": 1, "sharded_checkpoints": True},
}
# The worlds of two and of one run every case, the others those that share the most.
CASES_OF = {world: CASES if size in (0, 2) else ("dense", "moe") for world, size in WORLDS.items()}
CASES_OF["fsdp-2"] = [case for case in CASES if case not in ("opsd", "sft")]  # refused
# Where a world goes on from; every kind of world reads what another kind, or size, has written.
SAVED_BY = {
    "plain": "fsdp-2", "ddp-2": "plain", "ddp-4": "fsdp-2", "fsdp-1": "ddp-2", "fsdp-2": "plain",
    "fsdp-4": "fsdp-2",
}
PLAIN_FROM_DDP = ("opsd", "sft")  # which FSDP2 does not run


def made_up(rows, config):
    """A Rollout that depends on the rows alone: lengths 1 to 6, five rewards, EOS at the end, and
    tools' tokens between."""
    rng = torch.Generator().manual_seed(sum(map(sum, (row["prompt_ids"] for row in rows))))
    lengths = torch.randint(1, 7, (len(rows),), generator=rng)
    ids = torch.randint(3, 40, (len(rows), 6), generator=rng)
    mask = torch.arange(6) < lengths[:, None]
    ids[torch.arange(len(rows)), lengths - 1] = 1
    rewards = torch.randint(0, 5, (len(rows),), generator=rng).double() / 4
    rewards[: config.num_generations] = 1.0  # a group without signal
    said = [y[keep][:-1] for y, keep in zip(ids, mask, strict=True)]
    texts = [" ".join(WORDS[i - 3] for i in y) for y in said]
    return Rollout(
        rows, ids, mask, texts, torch.zeros(len(rows), dtype=torch.bool), rewards,
        rewards[:, None], -(ids % 7).float(), tool_mask=ids % 5 != 0,
    )


def with_made_up(real):
    def roll_out(model, tokenizer, rows, config, *rest, **kwargs):
        sampled = real(model, tokenizer, rows, config, *rest, **kwargs)
        assert len(sampled.texts) == len(rows) == len(sampled.mask)
        return made_up(rows, config)

    return roll_out


def run(folder, world, case, resume_from=None):
    changed = {**BASE, **CASES[case], "save_steps": 1}
    changed["output_dir"] = str(folder / world / f"{case}-run{'-on' if resume_from else ''}")
    if resume_from:
        (folder / world / f"{case}-run-on").mkdir(exist_ok=True)
    if "model_name_or_path" in changed:
        changed["model_name_or_path"] = str(folder / changed["model_name_or_path"])
    trainer = make_trainer(folder, resume_from=resume_from, **changed)
    (trainer.run_dir / "metrics.jsonl").parent.mkdir(exist_ok=True)
    (trainer.run_dir / "metrics.jsonl").touch()
    records = []
    while trainer.step < trainer.config.max_steps:
        metrics, _ = trainer.train_step(trainer.step + 1)
        trainer.step += 1
        records.append({name: number(value) for name, value in metrics.items()})
        if trainer.step == 2 and not resume_from:
            trainer.save()
    teacher = trainer.teacher.state_dict() if trainer.teacher else {}
    name = f"{case}{'-on' if resume_from else ''}-{trainer.processes.rank}.pt"
    torch.save({
        "records": records, "student": whole(dict(trainer.model.named_parameters())),
        "teacher": whole(teacher.get("model") or teacher.get("adapter") or {}),
        "kinds": sorted({type(p.data).__name__ for p in trainer.model.parameters()}),
    }, folder / world / name)


def process(rank, folder, world, port, resuming):
    torch.set_num_threads(1)
    rlsd.trainer.roll_out = with_made_up(rlsd.trainer.roll_out)
    if WORLDS[world]:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLDS[world]),
            "LOCAL_WORLD_SIZE": str(WORLDS[world]), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        }
    if world.startswith("fsdp"):
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        }
    for case in CASES_OF[world]:
        saver = "ddp-2" if (world, case in PLAIN_FROM_DDP) == ("plain", True) else SAVED_BY[world]
        saved = folder / saver / f"{case}-run" / "checkpoint-2"
        run(folder, world, case, str(saved) if resuming else None)


def main(folder):
    folder = Path(folder)
    options(folder)
    for family in ("qwen3-moe", "llama3"):
        save_model(architecture(family), word_tokenizer(WORDS), folder / family)
    for resuming in (False, True):
        for world, size in WORLDS.items():
            (folder / world).mkdir(exist_ok=True)
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            mp.start_processes(
                process, (folder, world, port, resuming), nprocs=max(1, size), start_method="fork"
            )


if __name__ == "__main__":
    main(sys.argv[1])
