"""Tiny runs of the real trainer, made-up data and rewards, and the naive loop a run must equal."""

import copy
import json
import logging
import math
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import rlsd.trainer
from rlsd.cli import main
from rlsd.config import make_config
from rlsd.demo import OPERATIONS, save_model, tiny_model, word_tokenizer
from rlsd.trainer import Trainer

WORDS = ["#", "<q>", "<a>", "<h>", *map(str, range(10))]
WORDS += [f"{o}{b}" for o in OPERATIONS for b in range(10)]
TEMPLATE = "<h> {privileged_context} {prompt}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread: two on shared cores make a step of this model 30 times slower. No curves.png:
    drawing takes longer than the run; a test of it puts rlsd.reports.report.plot_runs back."""
    monkeypatch.setattr(rlsd.trainer, "plot_runs", lambda *_: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def clean_logging():
    """main() logs to the standard output of its test, which is closed in the next one."""
    yield
    logging.getLogger("rlsd_kernels").handlers.clear()


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


def recorded(monkeypatch):
    """A list that gets every rollout of trainers from now on."""
    rollouts, real = [], rlsd.trainer.roll_out
    monkeypatch.setattr(
        rlsd.trainer, "roll_out",
        lambda *args, **kwargs: rollouts.append(real(*args, **kwargs)) or rollouts[-1],
    )
    return rollouts


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


def naive_log_probs(model, prompt, completion, config):
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    log_p = torch.log_softmax(logits / config.temperature, -1)
    return log_p[torch.arange(len(completion)), completion]


def naive_weight(length, lengths, config):
    """a_t of every token of a sequence of `length` unmasked tokens, TRL's definitions."""
    if config.loss_type == "grpo":
        return 1 / max(1, length) / len(lengths)
    if config.loss_type == "dr_grpo":
        return 1 / (len(lengths) * config.max_completion_length)
    return 1 / sum(lengths)


def naive_lambda(step, config):
    if config.objective == "grpo":
        return 0.0
    return config.rlsd_lambda * max(1 - step / config.rlsd_lambda_decay_steps, 0)


def naive_correction(old, drawn, config):
    """min(pi_old / pi_sampler, bound) of each token; 1 where the sampler gave none."""
    if config.sampling_clip_max() is None:
        return 1.0
    ratio = [math.exp(o - d) if d == d else 1.0
             for o, d in zip(old.tolist(), drawn.tolist(), strict=True)]
    return torch.tensor([min(r, config.vllm_importance_sampling_clip_max) for r in ratio])


def naive_step(model, teacher, reference, optimizer, tokenizer, rollout, step, config):
    """Section 1 of the method, one sequence at a time; returns parameters per optimizer step."""
    lam = naive_lambda(step, config)
    groups = rollout.rewards.view(-1, config.num_generations)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6))
    advantages = advantages.flatten().tolist()
    sequences = []
    drawn = []
    for row, ids, mask, truncated, log_probs in zip(
        rollout.rows, rollout.completion_ids, rollout.mask, rollout.truncated,
        rollout.sampling_log_probs, strict=True,
    ):
        drop = config.mask_truncated_completions and bool(truncated)
        sequences.append((row, [] if drop else ids[mask].tolist()))
        drawn.append(log_probs[mask])
    lengths = [len(completion) for _, completion in sequences]
    hinted, ref, old, after = {}, {}, {}, []
    with torch.no_grad():
        for i, (row, y) in enumerate(sequences):
            question = tokenizer(row["prompt"])["input_ids"]
            ref[i] = naive_log_probs(reference, question, y, config)
    for iteration in range(config.num_iterations):
        loss = 0.0
        for i, (row, y) in enumerate(sequences):
            lp = naive_log_probs(model, tokenizer(row["prompt"])["input_ids"], y, config)
            if iteration == 0:
                old[i] = lp.detach()
            if row["privileged_context"]:  # a live teacher moves between the iterations
                text = f"<h> {row['privileged_context']} {row['prompt']}"
                with torch.no_grad():
                    hinted[i] = naive_log_probs(teacher, tokenizer(text)["input_ids"], y, config)
            a_hat = torch.full_like(lp, advantages[i])
            if i in hinted and not (config.rlsd_negative_only and advantages[i] > 0):
                student = old[i] if config.rlsd_delta_source == "old_log_probs" else lp.detach()
                eps = config.rlsd_reweight_clip_range
                w = torch.exp(a_hat.sign() * (hinted[i] - student)).clamp(1 - eps, 1 + eps)
                a_hat = a_hat * ((1 - lam) + lam * w)
            rho = torch.exp(lp - old[i])
            clipped = rho.clamp(1 - config.epsilon, 1 + config.epsilon_high)
            token = -torch.minimum(rho * a_hat, clipped * a_hat)
            if advantages[i] < 0 and config.delta is not None:
                token = torch.minimum(token, -a_hat * config.delta)
            kl = torch.exp(ref[i] - lp) - (ref[i] - lp) - 1
            token = naive_correction(old[i], drawn[i], config) * (token + config.beta * kl)
            loss = loss + naive_weight(len(y), lengths, config) * token.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        after.append(parameters(model))
    return after


def naive_run(trainer, start, rollouts):
    """The trainer's own rollouts through the naive loop; the teacher stays at the start."""
    config = trainer.config
    model, teacher = start, copy.deepcopy(start)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
    )
    after = []
    for step, rollout in enumerate(rollouts, 1):
        scorer = model if config.teacher_model_kind == "live" else teacher
        after += naive_step(
            model, scorer, teacher, optimizer, trainer.tokenizer, rollout, step, config
        )
    return after


def without_times(records):
    return [
        {k: v for k, v in r.items() if not k.startswith(("time/", "perf/"))} for r in records
    ]


def write_config(folder, **changed):
    """folder/config.yaml with the options of a tiny run; returns its path."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(options(folder, **changed)), encoding="utf-8")
    return str(path)


def child(*arguments, environment=()):
    """A Python process that imports the repository and all that its test can, with one thread."""
    here = Path(__file__).parent
    paths = [str(here.parent), *(path for path in sys.path if path.startswith(str(here)))]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments], env=variables | dict(environment), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A suite that a shell started in the background ignores SIGINT, and so would the child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def one_sentence(stderr):
    """The only line on standard error, checked to be one sentence without a traceback."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("rlsd: ") and lines[0][-1] in ".?", stderr
    assert not re.search(r"[.!?] [A-Z]|\.\.$", lines[0]), stderr
    return lines[0]


def fails(capsys, *arguments, status=2):
    """The one sentence on standard error of a command that must fail."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == status
    return one_sentence(capsys.readouterr().err)
