"""Loss, gradient and weights do not depend on the number of processes, nor on how they share."""

import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from distributed_run import CASES, CASES_OF, WORLDS
from runs import child, write_config

from rlsd import TrainConfig, UserError
from rlsd.policy import checkpoint
from rlsd.policy.distributed import Processes

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SIZES = {world: max(1, size) for world, size in WORLDS.items()}
TOLERANCE = 5e-6  # sums in another order


def run_all(folder):
    """{(world, case, rank): what it ended with}; case-on: resumed from another world."""
    done = subprocess.run(
        [sys.executable, str(HERE / "distributed_run.py"), str(folder)], text=True,
        capture_output=True, timeout=900,
        env=os.environ | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return {
        (world, case, rank): torch.load(folder / world / f"{case}-{rank}.pt")
        for world, size in SIZES.items() for rank in range(size)
        for one in CASES_OF[world] for case in (one, f"{one}-on")
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("worlds"))


def distance(got, want):
    """|got - want| over |want|, Frobenius over all tensors, in want's precision."""
    assert got.keys() == want.keys()
    error = sum((got[n].to(want[n].dtype) - want[n]).double().norm().item() ** 2 for n in want)
    norm = sum(want[n].double().norm().item() ** 2 for n in want)
    return math.sqrt(error / norm) if norm else error


@pytest.mark.parametrize("world, case", [
    (world, f"{case}{on}") for world in WORLDS for case in CASES_OF[world] for on in ("", "-on")
    if (world, on) != ("plain", "")
])
def test_a_world_of_processes_trains_as_one(world, case, results):
    want = results["plain", case.removesuffix("-on"), 0]
    for rank in range(SIZES[world]):
        got = results[world, case, rank]
        assert got["kinds"] == (["DTensor" if world.startswith("fsdp") else "Tensor"])
        assert distance(got["student"], want["student"]) < TOLERANCE
        assert distance(got["teacher"], want["teacher"]) < TOLERANCE
        wanted = want["records"][-len(got["records"]):]
        for a, b in zip(got["records"], wanted, strict=True):
            for name in ("loss", "grad_norm", "aux_loss", "rlsd/delta_mean", "entropy", "kl",
                         "rlsd/contrast_missing_frac", "rlcsd/selected_frac"):
                if b.get(name) is not None:
                    assert a[name] == pytest.approx(b[name], rel=TOLERANCE, abs=TOLERANCE), name


def test_the_cases_are_not_vacuous(results):
    for case in CASES:
        result = results["plain", case, 0]
        for record in result["records"]:
            assert record["grad_norm"] > 0.1 and record["live_sequences"] >= (
                4 if case == "sft" else 12
            )
        assert result["records"][0]["aux_loss"] > 0 or case != "moe"
        selected = [record.get("rlcsd/selected_frac") for record in result["records"]]
        assert all(0 < share < 1 for share in selected) if case == "rlcsd" else not any(selected)
        saved = result["records"][0]["prompt_sharing/tokens_saved"]
        assert saved > 50 or case == "sft"  # one completion a prompt
        assert bool(result["teacher"]) == (case not in ("moe", "sft"))


def dying_reward(prompts, completions, completion_ids, **columns):
    """Kills the second process at its third call."""
    dying_reward.calls += 1
    if os.environ["RANK"] == "1" and dying_reward.calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum(ids) % 5 / 4 for ids in completion_ids]


dying_reward.calls = 0


def failing_reward(prompts, completions, completion_ids, **columns):
    """Fails on the second process alone, at its third call."""
    failing_reward.calls += 1
    if os.environ["RANK"] == "1" and failing_reward.calls == 3:
        raise ValueError("the judge is out")
    return [sum(ids) % 5 / 4 for ids in completion_ids]


failing_reward.calls = 0


def stuck_reward(prompts, completions, completion_ids, **columns):
    """failing_reward, but that it never returns to the interpreter."""
    try:
        return failing_reward(prompts, completions, completion_ids, **columns)
    except ValueError:
        return -1 in itertools.count()


def launch(folder, accelerate_config, **changed):
    """`rlsd train` on two gloo processes; returns (exit status, stdout, stderr).

    With the environment that `accelerate launch` makes of a file; on the CPU it starts no two.
    """
    configs = ROOT / "configs" / "accelerate"
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(
        ["--config_file", str(configs / accelerate_config), "-m", "rlsd.cli"]
    ))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        args.main_process_port = free.getsockname()[1]
    made = prepare_multi_gpu_env(args)
    ours = {k: v for k, v in made.items() if k.startswith(("ACCELERATE_", "FSDP_"))}
    done = child(
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
        str(args.main_process_port), "-m", "rlsd.cli", "train", "--config",
        write_config(folder, max_steps=4, save_steps=1, **changed),
        environment=ours | {"ACCELERATE_USE_CPU": "true"},
    )
    out, err = done.communicate(timeout=600)
    return done.returncode, out, err


def test_the_shipped_configuration_shards(tmp_path):
    status, out, err = launch(tmp_path, "fsdp2.yaml", eval_steps=4)
    assert status == 0, err
    assert "on 2 processes, sharded by FSDP2" in out and out.count("Done: ") == 1
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert (tmp_path / "run" / "checkpoint-4" / "model.safetensors").exists()


@pytest.mark.parametrize("reward, words", [
    ("dying_reward", r"Another process of the run has ended.*checkpoint-2"),
    ("failing_reward", r"rlsd: .*the judge is out.*all 2 steps before are safe in .*checkpoint-2"),
    pytest.param(
        "stuck_reward", r"rlsd \(process 1\): .* did not return .*all 2 steps before are safe",
        marks=pytest.mark.slow,
    ),
])
def test_the_end_of_one_process_ends_the_run_and_loses_nothing(reward, words, tmp_path):
    status, _, err = launch(
        tmp_path, "ddp.yaml", reward_funcs=[f"test_distributed.{reward}"], reward_timeout=8.0
    )
    assert status != 0
    assert re.search(words, err), err
    assert "rlsd/trainer.py" not in err, err  # the only traceback is the launcher's own
    folder = tmp_path / "run" / "checkpoint-2"
    assert checkpoint.latest(tmp_path / "run") == folder
    assert checkpoint.load_state(folder)["step"] == 2


@pytest.mark.parametrize("variables, words", [
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed's engine .* shard with FSDP2 instead"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "set fsdp_version: 2"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "set it to false"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
     "Set gradient_checkpointing here"),
    ({"WORLD_SIZE": "2"}, "make generation_batch_size a multiple of num_generations times 2"),
])
def test_what_cannot_be_honoured_is_one_sentence(variables, words, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if "WORLD_SIZE" in variables:
        ours = Processes.__new__(Processes)
        ours.size, ours.sharded = 2, False
        with pytest.raises(UserError, match=words):
            ours.require_room_for(3, [])
        return
    for name, value in {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        Processes(TrainConfig(device="cpu"))


def table(results):
    """Largest differences from one process, over ranks, steps, and runs resumed elsewhere."""
    lines = [f"{'world':<8}{'case':<8}{'student':>10}{'teacher':>10}{'loss':>10}{'grad norm':>11}"]
    for world, case in [(w, case) for w in WORLDS for case in CASES_OF[w]]:
        want, worst = results["plain", case, 0], [0.0] * 4
        for rank, on in itertools.product(range(SIZES[world]), ("", "-on")):
            got = results[world, f"{case}{on}", rank]
            wanted = want["records"][-len(got["records"]):]
            pairs = list(zip(got["records"], wanted, strict=True))
            worst = list(map(max, worst, (
                distance(got["student"], want["student"]),
                distance(got["teacher"], want["teacher"]),
                max(abs(a["loss"] - b["loss"]) for a, b in pairs),
                max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in pairs),
            )))
        lines.append(f"{world:<8}{case:<8}" + "".join(
            f"{x:>{width}.1e}" for x, width in zip(worst, (10, 10, 10, 11), strict=True)
        ))
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        print(table(run_all(Path(made))))
