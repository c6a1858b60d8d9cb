"""What a run shows and leaves: metrics.jsonl, TensorBoard, progress, samples, plots, card."""

import contextlib
import json
import logging
import math
import os
import re
import resource
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers
import yaml

from ..config import UserError
from ..packages import missing, package, require_release
from ..policy.checkpoint import reason
from ..sampling.evaluation import summary
from ..sampling.rollout import token_texts

METRICS = "metrics.jsonl"
PARTS = ("rollout", "teacher", "loss", "optim")
PROGRESS = (
    ("reward", "reward", ".3f"), ("loss", "loss", "+.4f"),
    ("lambda", "rlsd/effective_lambda", ".2f"),
    ("live", "rlsd/active_token_frac", ".0%"), ("length", "completions/mean_length", ".0f"),
)
PANELS = (
    ("held-out pass@1, sampled", "eval/pass@1_sampled"), ("training reward", "reward"),
    ("entropy (nats)", "entropy"), ("mean token weight, A > 0", "rlsd/weight_mean_pos"),
    ("mean token weight, A < 0", "rlsd/weight_mean_neg"),
    ("leak rate, training samples", "leak_rate"),
)


class Clock:
    """Seconds of the named parts of a step; it waits for the GPU at their borders."""

    def __init__(self, device):
        self.device, self.seconds = device, {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextlib.contextmanager
    def __call__(self, name):
        self._wait()
        began = time.monotonic()
        try:
            yield
        finally:
            self._wait()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def metrics(self, tokens, flops, peak):
        """time/<part>, and perf/: tokens per second of the step, peak memory, MFU of the update.

        tokens: of prompts and completions; flops of the update; peak: FLOP/s or None.
        """
        parts = {name: self.seconds.get(name, 0.0) for name in PARTS}
        update = sum(parts.values()) - parts["rollout"]
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:  # the most the process ever held, in kB
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        mfu = {"perf/mfu": flops / update / peak} if peak and update else {}
        return {f"time/{name}": seconds for name, seconds in parts.items()} | mfu | {
            "perf/tokens_per_second": tokens / sum(parts.values()),
            "perf/peak_memory_gb": memory / 2**30,
        }


def require_packages(config):
    """Say before the first rollout, not after the last, which package of a run is missing."""
    require_release("transformers")
    needed = {"accelerate": "training"}  # transformers' schedules import it
    if config.plot_curves:
        needed["matplotlib"] = "curves.png"
    if config.log_completions_steps:
        needed |= {name: "log_completions_steps" for name in ("pyarrow", "rich")}
    if config.use_peft:
        needed["peft"] = "use_peft"
    needed |= {name: f"report_to: {name}" for name in config.report_to}
    for module in missing(needed):
        raise UserError(f"{needed[module]} needs {package(module)}.")


def start_tracker(name, run_dir, options, start_step):
    """One of accelerate's trackers, going on from start_step where that is not 0.

    options: what the run was started with. Raises UserError, one sentence, before anything is lost.
    """
    from accelerate import PartialState, tracking

    PartialState()  # its loggers, which the trackers call, want one
    project = "rlsd"
    run = {"name": "/".join(run_dir.resolve().parts[-2:]), "config": options}
    if name == "tensorboard":
        tracker = tracking.TensorBoardTracker(
            name, run_dir, purge_step=start_step + 1 if start_step else None
        )
    elif name == "wandb":
        # wandb links the folder of the last one, [offline-]run-<date>_<time>-<id>.
        last = re.search(r"run-\d+_\d+-(.+)", (run_dir / "wandb" / "latest-run").resolve().name)
        if start_step and last:
            run |= {"id": last[1], "resume": "allow"}
        project = os.environ.get("WANDB_PROJECT", project)
        tracker = tracking.WandBTracker(project, dir=str(run_dir), **run)
    else:
        how = "allow" if start_step else "never"
        tracker = tracking.TrackioTracker(project, resume=how, **run)
    try:
        tracker.start()
    except Exception as error:  # services have their own kinds
        raise UserError(
            f"report_to: {name} cannot start ({reason(error)}); set it up, or leave it out."
        ) from error
    return tracker


def quiet_libraries():
    """Keep the terminal for our own lines."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # The schedule counts rollout steps, and one without signal makes no optimizer step.
    warnings.filterwarnings("ignore", message="Detected call of .lr_scheduler.step")
    logging.getLogger("rlsd_kernels").addHandler(logging.StreamHandler(sys.stdout))
    main = os.environ.get("RANK", "0") == "0"
    logging.getLogger("rlsd_kernels").setLevel(logging.INFO if main else logging.WARNING)


def number(value):
    """A plain float for JSON, None where it is not finite (a mean over no token)."""
    value = float(value)
    return value if math.isfinite(value) else None


class Reporter:
    """Appends metrics to a run folder and shows progress; a context manager.

    silent: of a process that is not the main one: it writes and shows nothing.
    """

    def __init__(self, run_dir, config_dict, report_to, max_steps, start_step=0, *, silent=False):
        self.run_dir, self.max_steps, self.start_step = Path(run_dir), max_steps, start_step
        self.began, self.shown, self.silent = time.monotonic(), 0, silent
        if silent:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._replace("config.yaml", yaml.safe_dump(config_dict, sort_keys=False))
        kept = [r for r in read_metrics(run_dir) if r["step"] <= start_step] if start_step else []
        self._replace(METRICS, "".join(json.dumps(r) + "\n" for r in kept))
        self.file = open(self.run_dir / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        self.report_to, self.options, self.trackers = report_to, config_dict, {}

    def _replace(self, name, text):
        """Whole or as before: of a config that a full disk cut, a resume would take defaults."""
        partial = self.run_dir / f".partial-{name}"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.run_dir / name)

    def start_trackers(self):
        """For the main process; apart from __init__, so that all hear where one cannot start."""
        for name in self.report_to:
            self.trackers[name] = start_tracker(
                name, self.run_dir, self.options, self.start_step
            )
        self.began = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.silent:
            return
        if sys.stdout.isatty() and self.shown:
            print()
        self.file.close()
        for name in list(self.trackers):
            self._tell(name, lambda tracker: tracker.finish())

    def _write(self, record):
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def log(self, step, metrics):
        """Append one line of metrics for a step."""
        record = {"step": step, **{name: number(v) for name, v in metrics.items()}}
        if self.silent:
            return record
        self._write(record)
        values = {k: v for k, v in record.items() if v is not None and k != "step"}
        for name in list(self.trackers):
            self._tell(name, lambda tracker: tracker.log(values, step=step))
        return record

    def _tell(self, name, what):
        """A tracker whose service is gone is left out; it does not end a run that goes well."""
        try:
            what(self.trackers[name])
        except Exception as error:
            del self.trackers[name]
            print(f"\n{name} failed ({reason(error)}); {METRICS} has what it misses.", flush=True)

    def progress(self, step, metrics):
        """One line: step, key metrics, seconds per step, time left; redrawn on a terminal."""
        if self.silent:
            return
        done, times = step - self.start_step, []
        if done:
            seconds = (time.monotonic() - self.began) / done
            left = round(seconds * (self.max_steps - step))
            times = [f"{seconds:.2f} s/step", f"ETA {left // 60}:{left % 60:02d}"]
        shown = [
            f"{label} {metrics[name]:{form}}" for label, name, form in PROGRESS
            if metrics.get(name) is not None
        ]
        evals = []
        for name, value in metrics.items():
            if name.startswith("eval/pass@") and not name.endswith(("_low", "_high")):
                ends = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
                shown_interval = "" if None in ends else " [{:.3f}, {:.3f}]".format(*ends)
                evals.append(f"{name.removeprefix('eval/')} {value:.3f}{shown_interval}")
        if not done and not evals:  # a baseline without held-out questions
            return
        line = "  ".join([f"step {step}/{self.max_steps}", *shown, *evals, *times])
        if sys.stdout.isatty() and not evals:
            print(f"\r\x1b[2K{line}", end="", flush=True)
        else:
            print(f"\r\x1b[2K{line}" if sys.stdout.isatty() else line, flush=True)
        self.shown += 1


def samples_of(tokenizer, rollout, advantages, weights):
    """One dict per completion; weights: (B, T) A_hat / A, 1 where it is not re-weighted."""
    samples = []
    for i, row in enumerate(rollout.rows):
        keep = rollout.mask[i]
        samples.append({
            "prompt": tokenizer.decode(row["prompt_ids"], skip_special_tokens=True),
            "completion": rollout.texts[i], "solution": row["solution"],
            "reward": rollout.rewards[i].item(), "advantage": advantages[i].item(),
            "tokens": token_texts(tokenizer, rollout.completion_ids[i][keep].tolist()),
            "token_weights": weights[i][keep].tolist(),
        })
        if rollout.messages is not None:
            samples[-1] |= {
                "messages": json.dumps(rollout.messages[i], ensure_ascii=False, default=str),
                "tool_mask": rollout.tool_mask[i][keep].tolist(),
            }
        if rollout.calls is not None:
            calls, failures = rollout.calls[i].tolist()
            samples[-1] |= {"tool_calls": calls, "tool_failures": failures}
    return samples


def write_completions(run_dir, step, samples):
    """completions/step-N.parquet: one row per completion of a rollout step."""
    import pyarrow
    import pyarrow.parquet

    folder = Path(run_dir) / "completions"
    folder.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(samples), folder / f"step-{step:06d}.parquet"
    )


def print_samples(samples, step, most=4):
    """A table of completions whose tokens are coloured by A_hat / A: green above 1, red below."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"step {step}: samples, tokens coloured by weight (green > 1 > red)")
    for name in ("prompt", "completion", "reward", "advantage"):
        table.add_column(name, justify="right" if name in ("reward", "advantage") else "left")
    ranked = sorted(samples, key=lambda s: -abs(s["advantage"]))
    for sample in ranked[:most]:
        text = Text()
        for token, weight in zip(sample["tokens"], sample["token_weights"], strict=True):
            strength = min(1.0, abs(weight - 1))
            shade = int(70 + 185 * strength)
            colour = f"rgb(0,{shade},0)" if weight > 1 else f"rgb({shade},0,0)"
            text.append(token, style=f"bold {colour}" if strength > 1e-3 else "")
        table.add_row(
            Text(sample["prompt"][-60:]), text, f"{sample['reward']:.2f}",
            f"{sample['advantage']:+.2f}",
        )
    Console().print(table)


def read_metrics(run_dir):
    """The records of a run's metrics.jsonl, oldest first."""
    path = Path(run_dir) / METRICS
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        raise UserError(f"{run_dir} is not a run folder: it has no {METRICS}.") from None
    records = []
    for number_, line in enumerate(lines, 1):
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number_ < len(lines):  # the last line may be cut by a crash
            raise UserError(f"Line {number_} of {path} is damaged.")
    return records


def _record(line):
    """The metrics on a line, or None where it is not one that Reporter.log writes."""
    try:
        record = json.loads(line)
        step = record.pop("step")
        values = {name: value if value is None else number(value) for name, value in record.items()}
    # No JSON, too deep or too long a number; no dict; no step; no numbers.
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError, OverflowError):
        return None
    texts = any(isinstance(value, str) for value in record.values())
    if texts or type(step) is not int or not 0 <= step < 2**63:
        return None
    return {"step": step, **values}


def series(records, name):
    """Steps and values of one metric, where it was measured."""
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    return [p[0] for p in points], [p[1] for p in points]


def plot_runs(runs, path, title=None, *, panels=PANELS, bands=False):
    """Draw curves into one PNG; runs: {label: [run folder or records of each seed]}.

    Several seeds of a label show as thin lines under their mean, or as a band of mean +- sd.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = {
        label: [seed if isinstance(seed, list) else read_metrics(seed) for seed in seeds]
        for label, seeds in runs.items()
    }
    panels = [
        p for p in panels if any(series(r, p[1])[0] for seeds in data.values() for r in seeds)
    ]
    if not panels:
        raise UserError("There is nothing to plot yet: no step has been logged.")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.2 * rows), squeeze=False, layout="constrained"
    )
    for axis, (label, name) in zip(axes.flat, panels, strict=False):
        for k, (run, seeds) in enumerate(data.items()):
            by_step = {}
            for records in seeds:
                points = series(records, name)
                if len(seeds) > 1 and not bands:
                    axis.plot(*points, color=f"C{k}", alpha=0.25, lw=0.7)
                for step, value in zip(*points, strict=True):
                    by_step.setdefault(step, []).append(value)
            means = [sum(by_step[s]) / len(by_step[s]) for s in sorted(by_step)]
            if bands:
                sds = [statistics.stdev(v) if len(v) > 1 else 0 for _, v in sorted(by_step.items())]
                ends = ([m + sign * sd for m, sd in zip(means, sds, strict=True)]
                        for sign in (-1, 1))
                axis.fill_between(sorted(by_step), *ends, color=f"C{k}", alpha=0.15, lw=0)
            marker = "o" if name.startswith("eval/") else None
            axis.plot(
                sorted(by_step), means, label=run, color=f"C{k}", marker=marker, markersize=3,
                lw=1.6,
            )
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("rollout step")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    if len(data) > 4:  # would cover the curves
        lines, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(lines, labels, fontsize=8, loc="outside lower center", ncols=5)
    elif len(data) > 1:
        axes.flat[0].legend(fontsize=8)
    if title:
        figure.suptitle(title)
    path = Path(path)
    path = path if path.suffix else path.with_suffix(".png")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"Cannot write the plot {path}: {reason}.") from None
    finally:
        plt.close(figure)
    return path


def write_card(run_dir, config, step):
    """README.md of a run folder, and the same text for its checkpoint."""
    text = model_card(config, step, read_metrics(run_dir))
    (run_dir / "README.md").write_text(text, encoding="utf-8")
    return text


def model_card(config, step, records):
    """README.md of a checkpoint: what was trained, on what, how, and what was measured."""
    measured = {}
    for record in records:
        measured.update({
            name: value for name, value in record.items()
            if name.startswith("eval/") and value is not None
        })
    rows = "\n".join(f"| {name} | {text} |" for name, text in sorted(summary(measured)))
    table = f"| held-out metric | value |\n|---|--:|\n{rows}" if rows else "No evaluation was run."
    method = config.method.summary
    if config.method.reweights:
        named, setting = "RLSD (Self-Distilled RLVR, arXiv 2604.03128)", (
            f"eps_w {config.rlsd_reweight_clip_range:g}"
        )
        if config.method.selects:
            named, setting = "RLCSD (arXiv 2606.11709)", (
                f"beta {config.rlcsd_beta:g}, tau {config.rlcsd_tau:g}, eta {config.rlcsd_eta:g}"
            )
        if config.rlsd_contrast_hints:
            setting += f", up to {config.rlsd_contrast_hints} contrast hints"
        method = (
            f"{named}, lambda {config.rlsd_lambda:g} decaying over "
            f"{config.rlsd_lambda_decay_steps} steps,\n{setting}, hints of `{config.hint_source}`, "
            f"teacher `{config.teacher_model_kind}`"
        )
    base, planned = config.model_name_or_path, f"{config.max_steps} rollout steps"
    if config.max_steps is None:
        planned = f"{config.num_train_epochs:g} epochs"
    front = {"library_name": "peft" if config.use_peft else "transformers"}
    if not Path(base).exists():  # the Hub takes ids alone
        front["base_model"] = base
    front["tags"] = ["rlsd", "rlvr", "reinforcement-learning"] + ["lora"] * config.use_peft
    what, loading = "Started from", ""
    if config.use_peft:
        what = f"LoRA adapters of rank {config.lora_r}, not a whole model, for the base model"
        loading = ",\nwhich loads the base model too and needs peft"
    return f"""---
{yaml.safe_dump(front, sort_keys=False, default_flow_style=None)}---
# {config.objective.upper()} checkpoint, step {step}

{what} `{base}`, trained on `{config.train_dataset}` with the rlsd package:
{method},
{planned} planned, {config.generation_batch_size} completions a step in
groups of {config.num_generations}, learning rate {config.learning_rate:g}, seed {config.seed}.

{table}

Load it with `AutoModelForCausalLM.from_pretrained(this_folder)`{loading}.
"""


def hub_repository(config):
    """The id of the repository that push_to_hub uploads to at the end, made now; None without.

    Raises UserError, one sentence, where it cannot be made: better now than after the last step.
    """
    if not config.push_to_hub:
        return None
    import huggingface_hub

    name = config.hub_model_id or Path(config.output_dir).resolve().name
    try:
        return huggingface_hub.HfApi().create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # of the network, the login, the name
        raise UserError(
            f"push_to_hub cannot make the repository {name} ({reason(error)}); log in with hf auth "
            "login, set hub_model_id, or leave push_to_hub out."
        ) from error


def push(repository, checkpoint):
    """Upload a checkpoint, without what only a resumed run needs; UserError says what is safe."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().upload_folder(
            repo_id=repository, folder_path=checkpoint, commit_message=checkpoint.name,
            ignore_patterns=["trainer_state.pt", "shards/*", "SHA256SUMS"],
        )
    except Exception as error:
        raise UserError(
            f"The run is done and whole in {checkpoint}, but could not be pushed to {repository} "
            f"({reason(error)}); push it with hf upload {repository} {checkpoint} --exclude "
            "trainer_state.pt."
        ) from error
    print(f"Pushed {checkpoint} to {repository}.")
