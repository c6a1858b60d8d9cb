"""Tiny runs of the real trainer: a random one-layer model, made-up chains, an arbitrary reward."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import rlsd.trainer
from rlsd.config import make_config
from rlsd.demo import OPERATIONS, save_model, tiny_model, word_tokenizer
from rlsd.trainer import Trainer

WORDS = ["#", "<q>", "<a>", "<h>", *map(str, range(10))]
WORDS += [f"{o}{b}" for o in OPERATIONS for b in range(10)]
TEMPLATE = "<h> {privileged_context} {prompt}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread: two on shared cores make a step of this model 30 times slower. No curves.png:
    drawing takes longer than the run; a test of it puts rlsd.report.plot_runs back."""
    monkeypatch.setattr(rlsd.trainer, "plot_runs", lambda *_: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sum_reward(prompts, completions, completion_ids, **columns):
    """Five values, unrelated to the text, so that groups nearly always have signal."""
    return [sum(ids) % 5 / 4 for ids in completion_ids]


def problems(count, seed=0):
    """Rows with prompts of 4 to 9 tokens and solutions of 2 to 6, so that padding happens."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        steps = [f"{rng.choice(OPERATIONS)}{rng.randrange(10)}" for _ in range(rng.randint(1, 6))]
        rows.append({
            "prompt": " ".join(["<q>", str(rng.randrange(10)), *steps, "<a>"]),
            "solution": " ".join(["#", *(str(rng.randrange(10)) for _ in range(len(steps)))]),
        })
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def save_tiny(folder):
    """A model folder. Sharpened, so that the hint matters; a fifth of all ids end a completion."""
    tokenizer = word_tokenizer(WORDS)
    model = tiny_model(len(tokenizer), seed=3, hidden=16, layers=1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p *= 5
    model.generation_config.eos_token_id = [1, *range(8, 20)]
    return save_model(model, tokenizer, folder)


def options(folder, **changed):
    """Options of a run in folder/run; the model and the data are written on first use."""
    if not (folder / "model").exists():
        save_tiny(folder / "model")
    if not (folder / "train.jsonl").exists():
        write_rows(folder / "train.jsonl", problems(12))
    return {
        "model_name_or_path": str(folder / "model"), "train_dataset": str(folder / "train.jsonl"),
        "output_dir": str(folder / "run"), "privileged_template": TEMPLATE,
        "reward_funcs": ["runs.sum_reward"], "eval_size": 4, "max_completion_length": 6,
        "generation_batch_size": 16, "num_generations": 4, "per_device_train_batch_size": 16,
        "learning_rate": 1e-2, "max_steps": 2, "eval_steps": 0, "save_steps": 0,
        "log_completions_steps": 0, "report_to": "none", "device": "cpu", **changed,
    }


def make_trainer(folder, *, reward=None, resume_from=None, **changed):
    return Trainer(
        make_config(options(folder, **changed)), resume_from=resume_from, log=lambda *a: None,
        reward_funcs=[reward] if reward else None,
    )


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(got, want):
    """Bitwise equality of two dicts of tensors."""
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), f"{name} differs"


def relative_distance(got, want, start):
    """|got - want| over |want - start|, Frobenius over all parameters: error per distance moved."""
    error = sum(((got[n] - want[n]).double() ** 2).sum() for n in want)
    moved = sum(((want[n] - start[n]).double() ** 2).sum() for n in want)
    return (error / moved).sqrt().item()


def without_times(records):
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in records]


def write_config(folder, **changed):
    """folder/config.yaml with the options of a tiny run; returns its path."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(options(folder, **changed)), encoding="utf-8")
    return str(path)


def child(*arguments):
    """A Python process that can import the repository and these helpers, with one thread."""
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def one_sentence(stderr):
    """The only line on standard error, checked to be one sentence without a traceback."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("rlsd: ") and lines[0][-1] in ".?", stderr
    assert not re.search(r"[.!?] [A-Z]|\.\.$", lines[0]), stderr
    return lines[0]
