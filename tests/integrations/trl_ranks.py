"""One rank of test_two_processes: our trainer against the reference, both under DDP."""

import sys
from pathlib import Path

import torch
from trl import GRPOTrainer
from trl_runs import OFF, PlainHookA, differences, run

from rlsd.integrations.trl import RLSDTrainer

folder, case = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
reference, options = {"ddp-grpo": (GRPOTrainer, OFF), "ddp-rlsd": (PlainHookA, {})}[case]
options = {**options, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
_, want = run(reference, folder, **options)
trainer, got = run(RLSDTrainer, folder, **options)
assert trainer.obstacle is None and trainer.accelerator.num_processes == 2
loss, gradient = differences(got, want)
print(case, loss, gradient)
assert loss < 2e-6 and gradient < 2e-5, (loss, gradient)
