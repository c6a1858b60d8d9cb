"""One process of a distributed run with given rollouts; tests/test_distributed.py starts several.

    python distributed_run.py FOLDER OPTIONS.json [CHECKPOINT]

The rollouts are made from the questions alone, so that every number of processes trains on the
same. Writes FOLDER/result-<rank>.pt: the records of the steps, and the whole weights of student
and teacher.
"""

import json
import sys
from pathlib import Path

import torch
from runs import make_trainer

import rlsd.trainer
from rlsd.distributed import whole
from rlsd.report import number
from rlsd.rollout import Rollout


def made_up(rows, config):
    """A Rollout that depends on the rows alone: lengths 1 to 6, five rewards, EOS at the end."""
    rng = torch.Generator().manual_seed(sum(map(sum, (row["prompt_ids"] for row in rows))))
    lengths = torch.randint(1, 7, (len(rows),), generator=rng)
    ids = torch.randint(3, 40, (len(rows), 6), generator=rng)
    mask = torch.arange(6) < lengths[:, None]
    ids[torch.arange(len(rows)), lengths - 1] = 1
    rewards = torch.randint(0, 5, (len(rows),), generator=rng).double() / 4
    rewards[: config.num_generations] = 1.0  # a group without signal
    return Rollout(
        rows, ids, mask, [""] * len(rows), torch.zeros(len(rows), dtype=torch.bool), rewards,
        rewards[:, None],
    )


def main(folder, options, resume_from=None):
    torch.set_num_threads(1)
    real = rlsd.trainer.roll_out

    def rolled(model, tokenizer, rows, config, reward_funcs, processes, **kwargs):
        shares = real(model, tokenizer, rows, config, reward_funcs, processes, **kwargs)
        assert len(shares.texts) == len(rows)  # sampled too, but not trained on
        return made_up(rows, config)

    rlsd.trainer.roll_out = rolled
    rlsd.trainer.plot_runs = lambda *_: None
    trainer = make_trainer(Path(folder), resume_from=resume_from, **options)
    records = []
    while trainer.step < trainer.config.max_steps:
        metrics, _ = trainer.train_step(trainer.step + 1)
        trainer.step += 1
        records.append({name: number(value) for name, value in metrics.items()})
    if trainer.config.save_steps:
        trainer.run_dir.mkdir(exist_ok=True)
        (trainer.run_dir / "metrics.jsonl").touch()
        trainer.save()
    torch.save({
        "records": records, "student": whole(trainer.model.state_dict()),
        "teacher": whole(trainer.teacher.state_dict()) if trainer.teacher else None,
        "sharded": type(next(trainer.model.parameters()).data).__name__,
    }, Path(folder) / f"result-{trainer.processes.rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), *sys.argv[3:])
