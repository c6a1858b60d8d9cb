"""`rlsd compare`: arms x seeds of the ordinary trainer from one start, on the same questions.

A config names what all runs share and what each arm changes:

    output_dir: runs/compare
    seeds: [0, 1, 2]
    processes: 1                     # runs at a time, each in a process of its own
    goals: [0.8]                     # accuracies for the columns "steps to"
    base: {model_name_or_path: ..., train_dataset: ..., max_steps: 80}
    arms:
      grpo: {objective: grpo}        # the first GRPO arm is the baseline, unless `baseline` is set
      rlsd: {objective: rlsd}
      rlsd, shuffled: {objective: rlsd, shuffle_privileged_context: true}

A run is an ordinary run folder, output_dir/<arm>/seed-<seed>, beside its log. Started again, a
comparison skips what is finished and goes on with the rest; a crashed run is reported, the others
go on, and --arm NAME --seed N runs it alone.
"""

import dataclasses
import difflib
import functools
import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import torch
import yaml

from .config import UserError, make_config
from .options import load_yaml
from .policy import checkpoint
from .policy.teacher import require_same_vocabulary
from .reports.report import plot_runs, quiet_libraries, read_metrics, require_packages
from .reports.tables import (
    ACCURACY,
    ENTROPY,
    LEAK,
    LENGTH,
    arm_statistics,
    columns_of,
    csv_table,
    markdown_table,
    records_of,
    run_summary,
    text_table,
)
from .tasks.data import load_data
from .tasks.tools import load_tools

# What a model from scratch depends on.
SCRATCH = ("train_dataset", "dataset_size", "dataset_seed", "seed", "scratch_steps", "eval_size",
           "eval_split_size", "privileged_template", "max_completion_length")
PANELS = (
    ("held-out pass@1, sampled", ACCURACY), ("training reward", "reward"),
    ("entropy (nats)", ENTROPY), ("response length (tokens)", LENGTH),
    ("leak rate, held-out", LEAK), ("mean token weight, A > 0", "rlsd/weight_mean_pos"),
)
NOTES = """Mean +- sd over seeds of one sampled answer per held-out question; "curve mean" is over
all evaluations, step 0 included. Differences pair the runs of one seed, +- standard error. "steps
to" is the first evaluation at which the mean over seeds is there. Entropy (nats) is that of the
training samples before the last evaluation; length in tokens; ms without evaluation."""


@dataclass
class Plan:
    """A comparison as its config says; raises UserError in one sentence on what is not allowed."""

    output_dir: str = ""
    seeds: list = field(default_factory=lambda: [0, 1, 2])
    processes: int = 1
    goals: list = field(default_factory=list)
    baseline: str | None = None
    base: dict = field(default_factory=dict)
    arms: dict = field(default_factory=dict)

    def __post_init__(self):
        if isinstance(self.seeds, int) and not isinstance(self.seeds, bool):
            self.seeds = list(range(self.seeds))
        for name, kind, what in (
            ("output_dir", str, "a folder"), ("seeds", list, "a list of whole numbers"),
            ("goals", list, "a list of numbers"), ("base", dict, "a mapping of train options"),
            ("arms", dict, "a mapping of arms to train options"),
        ):
            if not isinstance(getattr(self, name), kind) or not getattr(self, name) and (
                name not in ("goals", "base")
            ):
                raise UserError(f"{name} must be {what}, but got {getattr(self, name)!r}.")
        if any(type(s) is not int or s < 0 for s in self.seeds) or (
            len(set(self.seeds)) < len(self.seeds)
        ):
            raise UserError(f"seeds must be different whole numbers from 0, but got {self.seeds}.")
        if any(isinstance(g, bool) or not isinstance(g, int | float) for g in self.goals):
            raise UserError(f"goals must be a list of numbers, but got {self.goals}.")
        if type(self.processes) is not int or self.processes < 1:
            raise UserError(f"processes must be a whole number from 1, but got {self.processes}.")
        self.arms = {str(name): options or {} for name, options in self.arms.items()}
        folders = {}
        for arm, options in self.arms.items():
            if not isinstance(options, dict):
                raise UserError(f"arm {arm} must be a mapping of train options, but is {options}.")
            other = folders.setdefault(slug(arm), arm)
            if other != arm or not slug(arm):
                raise UserError(
                    f"arm {arm} has no folder name of its own beside {other}; use other letters."
                )
        if self.baseline is None:
            found = [a for a in self.arms if self.options(a).get("objective") == "grpo"]
            self.baseline = found[0] if found else None
        elif self.baseline not in self.arms:
            raise UserError(
                f"baseline must be one of {', '.join(self.arms)}, but got {self.baseline!r}."
            )

    def options(self, arm):
        """The train options of an arm, without those of the run."""
        for options in (self.base, self.arms[arm]):
            for name in ("seed", "output_dir"):
                if name in options:
                    raise UserError(
                        f"{name} is set by the comparison; leave it out of base and arms."
                    )
        defaults = {
            "log_completions_steps": 0, "report_to": "none", "save_steps": 0,
            "plot_curves": False, "dataset_seed": self.seeds[0],
        }
        return {**defaults, **self.base, **self.arms[arm]}

    def folder(self, arm, seed):
        return Path(self.output_dir) / slug(arm) / f"seed-{seed}"

    def config(self, arm, seed, model=None):
        """TrainConfig of one run; model: what stands in for `scratch`."""
        options = self.options(arm) | ({"model_name_or_path": model} if model else {})
        try:
            config = make_config({
                **options, "seed": seed, "output_dir": str(self.folder(arm, seed))
            })
            if config.max_steps is None:
                raise UserError("a comparison counts in rollout steps; set max_steps.")
            if config.push_to_hub:
                raise UserError("a comparison pushes nothing; leave push_to_hub out.")
            return config
        except UserError as error:
            raise UserError(f"arm {arm}: {error}") from None


def slug(arm):
    return re.sub(r"[^a-z0-9.]+", "-", arm.lower().replace("+", " and ")).strip("-.")


def load_plan(path, **overrides):
    """Plan from a YAML file; overrides replace its entries."""
    given = {**load_yaml(path), **overrides}
    known = [f.name for f in dataclasses.fields(Plan)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise UserError(
                f"Unknown entry {name!r} of a comparison; "
                + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}.")
            )
    return Plan(**given)


def beside(folder, suffix):
    """seed-0.log beside seed-0: a new run's own folder must be empty."""
    return folder.with_name(folder.name + suffix)


def is_finished(config):
    """Whether the run folder holds this very run to its last step; UserError if another run."""
    folder = Path(config.output_dir)
    if not (folder / "config.yaml").exists():
        return False
    was, now = load_yaml(folder / "config.yaml"), dataclasses.asdict(config)
    changed = [
        n for n in now if n in was and was[n] != now[n] and n != "output_dir"
        and not (n == "model_name_or_path" and Path(was[n]).resolve() == Path(now[n]).resolve())
    ]
    if changed:
        raise UserError(
            f"{folder} was run with another {changed[0]} ({was[changed[0]]!r}, now "
            f"{now[changed[0]]!r}); choose another output_dir or remove that folder."
        )
    steps = [r["step"] for r in read_metrics(folder)] if (folder / "metrics.jsonl").exists() else []
    last = checkpoint.latest(folder)
    return bool(steps) and steps[-1] == config.max_steps and last is not None and (
        last.name == f"checkpoint-{config.max_steps}"
    )


def require_data(config):
    """What the arm's objective asks of data and teacher, before anything is sampled.

    Returns the sources of the rows that it trains on.
    """
    tokenizer = checkpoint.load_tokenizer(config.model_name_or_path)
    processor = checkpoint.load_processor(config.model_name_or_path)
    rows, held_out = load_data(config, tokenizer, lambda *_: None, processor, load_tools(config))
    if not held_out or not config.eval_steps:
        raise UserError("A comparison needs held-out questions; set eval_size and eval_steps.")
    if config.method.teacher_reads == "question":
        require_same_vocabulary(config.teacher_model_name_or_path, tokenizer)
    return [row["_source"] for row in rows]


def warm_start(plan):
    """The folder of the one start of all arms, made here where it is `scratch`; None otherwise."""
    models = {plan.options(arm).get("model_name_or_path") for arm in plan.arms}
    if models != {"scratch"}:
        if "scratch" in models:
            raise UserError("model_name_or_path: scratch must be in base, for all arms.")
        return None
    folder, config = Path(plan.output_dir) / "warm-start", plan.config(
        next(iter(plan.arms)), plan.seeds[0]
    )
    made = {name: getattr(config, name) for name in SCRATCH}
    if not folder.exists():
        from .demo import scratch_model

        partial = beside(folder, ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        scratch_model(config, partial)
        (partial / "options.yaml").write_text(yaml.safe_dump(made), encoding="utf-8")
        os.rename(partial, folder)
    was = load_yaml(folder / "options.yaml")
    changed = [name for name in SCRATCH if was.get(name) != made[name]]
    if changed:
        raise UserError(
            f"{folder} was made with another {changed[0]} ({was.get(changed[0])!r}, now "
            f"{made[changed[0]]!r}); choose another output_dir or remove that folder."
        )
    return str(folder)


def run_one(config, threads):
    """One run to its end in this process, its output in a file; the reason of a crash in another.

    Goes on from the newest checkpoint; without one the run starts again.
    """
    from .trainer import Trainer

    folder = Path(config.output_dir)
    failure = beside(folder, ".error")
    failure.unlink(missing_ok=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    with open(beside(folder, ".log"), "a", encoding="utf-8", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = log
        quiet_libraries()
        began, resume = time.monotonic(), None
        try:
            lock = checkpoint.RunLock(folder)  # noqa: F841  (before anything is removed)
            resume = checkpoint.latest(folder)
            if resume is None:
                checkpoint.clear(folder)
            Trainer(config, resume_from=resume).train()
        except BaseException as error:
            traceback.print_exc()
            if isinstance(error, Exception):
                said = str(error) if isinstance(error, UserError) else (
                    f"{type(error).__name__}: {checkpoint.reason(error)}."
                )
                failure.write_text(said + "\n", encoding="utf-8")
            sys.exit(1)
        finally:  # of a run that was killed, its time is lost
            seconds = beside(folder, ".seconds")
            before = float(seconds.read_text()) if resume and seconds.exists() else 0.0
            seconds.write_text(f"{before + time.monotonic() - began:.2f}\n", encoding="utf-8")


def _end_with_parent():
    """A comparison that was killed must not leave a run behind, which the next would collide with.
    """
    multiprocessing.parent_process().join()
    os._exit(1)


@functools.lru_cache
def _context():
    """Children of a server that has imported everything once; none inherits the caller's state."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlsd.trainer"])
    return context


def run_all(configs, processes, log):
    """{name: reason of its crash} after running {name: TrainConfig}, so many at a time."""
    waiting, running, crashed, done = list(configs.items()), {}, {}, 0
    threads = max(1, torch.get_num_threads() // processes)
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                name, config = waiting.pop(0)
                Path(config.output_dir).parent.mkdir(parents=True, exist_ok=True)
                process = _context().Process(target=run_one, args=(config, threads))
                process.start()
                running[process.sentinel] = name, process, time.monotonic()
            for sentinel in wait(list(running)):
                name, process, began = running.pop(sentinel)
                process.join()
                done += 1
                folder, said = Path(configs[name].output_dir), "finished"
                if process.exitcode:
                    failure = beside(folder, ".error")
                    crashed[name] = (
                        failure.read_text(encoding="utf-8").strip() if failure.exists()
                        else f"its process ended with exit code {process.exitcode}."
                    )
                    said = f"crashed: {crashed[name]}"
                log(f"[{done}/{len(configs)}] {name[0]}, seed {name[1]}: {said} "
                    f"({time.monotonic() - began:.0f} s)")
    finally:
        for _, process, _ in running.values():
            process.terminate()
            process.join()
    return crashed


def compare(plan, *, arm=None, seed=None, log=print):
    """Run what is not finished, write tables and curves; {"runs", "crashed", "missing"}.

    arm, seed: only these. runs: {arm: {seed: summary}} of all that is finished, crashed:
    {(arm, seed): reason} of this call.
    """
    if arm is not None and arm not in plan.arms:
        raise UserError(f"--arm must be one of {', '.join(plan.arms)}, but got {arm!r}.")
    if seed is not None and seed not in plan.seeds:
        raise UserError(f"--seed must be one of {plan.seeds}, but got {seed!r}.")
    chosen = [
        (a, s) for s in plan.seeds for a in plan.arms
        if (arm is None or a == arm) and (seed is None or s == seed)
    ]
    for a, s in chosen:  # every option of every arm, before anything runs
        require_packages(dataclasses.replace(plan.config(a, s), plot_curves=True))
    model = warm_start(plan)
    configs = {name: plan.config(*name, model) for name in chosen}
    kept = {}
    for a in dict.fromkeys(a for a, _ in chosen):
        try:
            kept[a] = require_data(plan.config(a, plan.seeds[0], model))
        except UserError as error:
            raise UserError(f"arm {a}: {error}") from None
    first, *others = kept
    for a in others:  # a row more or less reorders the questions of every step
        if kept[a] != kept[first]:
            raise UserError(
                f"arm {a} keeps {len(kept[a])} training rows and arm {first} {len(kept[first])}, "
                "so they would see other questions; raise max_completion_length or "
                "max_teacher_prompt_length until none is dropped."
            )
    finished = {
        (a, s): is_finished(plan.config(a, s, model)) for a in plan.arms for s in plan.seeds
    }
    todo = {name: config for name, config in configs.items() if not finished[name]}
    log(f"{len(plan.arms)} arms x {len(plan.seeds)} seeds: {len(todo)} runs to do, "
        f"{len(configs) - len(todo)} finished before, in {plan.output_dir}")
    crashed = run_all(todo, plan.processes, log)
    runs = {
        a: {s: summary_of(plan.folder(a, s)) for s in plan.seeds
            if is_finished(plan.config(a, s, model))}
        for a in plan.arms
    }
    missing = [(a, s) for a in plan.arms for s in plan.seeds if s not in runs[a]]
    write_results(plan, runs, crashed, missing, log)
    return {"runs": runs, "crashed": crashed, "missing": missing}


def summary_of(folder):
    seconds = beside(folder, ".seconds")
    return run_summary(
        read_metrics(folder), float(seconds.read_text()) if seconds.exists() else None
    )


def write_results(plan, runs, crashed, missing, log):
    """results.json, table.txt, table.md, table.csv and curves.png of what is finished."""
    folder = Path(plan.output_dir)
    base = plan.baseline if runs.get(plan.baseline) else None
    rows = arm_statistics(runs, base, plan.goals)
    if not rows:
        log("No run is finished, so there is no table.")
    else:
        columns = columns_of(rows, base, plan.goals)
        text = f"{text_table(rows, columns)}\n\n{NOTES}\n"
        (folder / "table.txt").write_text(text, encoding="utf-8")
        (folder / "table.md").write_text(markdown_table(rows, columns) + "\n", encoding="utf-8")
        (folder / "table.csv").write_text(csv_table(rows), encoding="utf-8")
        (folder / "results.json").write_text(
            json.dumps({"plan": dataclasses.asdict(plan), "runs": runs}) + "\n", encoding="utf-8"
        )
        plot = plot_runs(
            {a: [records_of(s) for s in seeds.values()] for a, seeds in runs.items() if seeds},
            folder / "curves.png", panels=PANELS, bands=True,
        )
        log(f"\n{text}\nTables and data: {folder}/table.txt, .md, .csv, results.json   "
            f"Curves: {plot}")
    for (a, s), reason in crashed.items():
        log(f"Crashed: {a}, seed {s}: {reason} Its log: {beside(plan.folder(a, s), '.log')}; "
            f"run it alone with --arm '{a}' --seed {s}")
    others = [name for name in missing if name not in crashed]
    if others:
        log("Not run yet: " + ", ".join(f"{a} seed {s}" for a, s in others))


def main(options):
    """`rlsd compare`: options of the command line; returns the exit status."""
    given = {name: options.pop(name) for name in ("arm", "seed") if name in options}
    path = options.pop("config", None)
    if path is None or set(options) - {"output_dir", "processes"}:
        raise UserError(
            "Usage: rlsd compare --config x.yaml [--arm NAME] [--seed N] [--processes N] "
            "[--output_dir DIR]."
        )
    plan = load_plan(path, **options)
    found = compare(plan, **given)
    Path(plan.output_dir, "plan.yaml").write_text(
        yaml.safe_dump(dataclasses.asdict(plan), sort_keys=False), encoding="utf-8"
    )
    return 1 if found["crashed"] else 0
