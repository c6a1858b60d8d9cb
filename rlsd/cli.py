"""The `rlsd` command: train, eval, hints, compare, plot, validate, bench, doctor.

A user's mistake is one sentence on standard error and exit status 2; Ctrl-C exits with 130.
"""

import ast
import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import textwrap
import typing
from pathlib import Path

import torch

from rlsd_kernels import __version__, available_impls
from rlsd_kernels.logprob import choose_impl

from .config import TrainConfig, UserError, make_config
from .options import KINDS, load_yaml
from .packages import (
    OPTIONAL,
    RELEASES,
    import_failure,
    is_tested,
    releases_of,
    require_release,
)

USAGE = """rlsd {version}: self-distilled RL with verifiable rewards

  rlsd train [--seed N]                          the embedded demo
  rlsd train --config x.yaml [--key value ...]   train; see `rlsd train --help` for every option
  rlsd train --resume_from_checkpoint RUN        continue a run folder or a checkpoint in it
  rlsd eval RUN [--key value ...]                held-out pass@1, pass@k of its newest checkpoint
  rlsd eval MODEL --train_dataset x.jsonl        the same of a model: the baseline
  rlsd hints --model_name_or_path MODEL --train_dataset x.jsonl [--output x.json]
                                                 does the hint tell right answers from wrong ones
  rlsd compare --config x.yaml                   objectives x seeds: a table, curves; resumable
               [--arm NAME] [--seed N] [--processes N]
  rlsd plot RUN [RUN ...] [--output x.png]       draw the curves of runs
  rlsd validate                                  every implementation against the reference
  rlsd bench [--profile NAME] [--rows N]         time, memory and error of a step on this machine
  rlsd doctor                                    what is installed and which code will run
"""
# What a command's own --help adds to its lines above.
DETAILS = {
    "eval": "Any option of `rlsd train --help` overrides what the run was started with.",
    "hints": "Takes the options of `rlsd train --help`, or --config with them; nothing is trained.",
    "compare": "x.yaml: output_dir, base, arms, seeds, goals; docs/training.md has one. Also "
               "--output_dir DIR.",
    "plot": "Without --output: curves.png in the first folder.",
    "validate": "Takes no options. Exit status 1 if an implementation is outside its limits.",
    "bench": """Options, and their values here in brackets:
  --device auto      [auto | cpu | cuda]
  --profile trained  [trained | uniform | smollm2], how peaked the softmax is
  --dtype NAME       [fp32 | bf16 | fp16]
  --rows N, --hidden_size N, --vocab_size N
  --live 1.0         share of the rows whose advantage is not 0
  --rounds N         of which medians are shown""",
    "doctor": "Takes no options.",
}

HINTS = typing.get_type_hints(TrainConfig)
TEXTS = {"config", "resume_from_checkpoint", "output", "device", "dtype", "arm"} | {
    name for name, hint in HINTS.items() if hint is str
}
NAMING_NONE = {f.name for f in dataclasses.fields(TrainConfig) if "none" in f.metadata["choices"]}


def parse_options(arguments, read=None):
    """{key: value} from --key value pairs; `--key` alone is an error.

    read: (text, key) -> value, YAML by default. The text of an option that is one is never read:
    "A: {prompt}" would become a mapping.
    """
    read = read or yaml_value
    options, i = {}, 0
    while i < len(arguments):
        name = arguments[i]
        if not name.startswith("--"):
            raise UserError(f"Expected an option that starts with --, but got {name!r}.")
        key, equals, value = name[2:].partition("=")
        key = key.replace("-", "_")
        if not equals:
            if i + 1 >= len(arguments) or arguments[i + 1].startswith("--"):
                raise UserError(f"--{key} needs a value.")
            value, i = arguments[i + 1], i + 1
        if key in options:
            raise UserError(f"--{key} is given twice.")
        options[key] = read(value, key) if value and key not in TEXTS else value
        i += 1
    return options


def values_of(f):
    """What an option (a dataclass field) takes where its default does not say it, else ""."""
    hint, choices = HINTS[f.name], " | ".join(f.metadata["choices"])
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if typing.get_origin(hint) is list:
        return f"any of {choices}" if choices else ""
    if not kinds:
        return choices
    (item,) = typing.get_args(kinds[0]) or kinds
    words = choices or KINDS[item].replace(" or ", " | ")
    if kinds[0] is not item:
        words = f"each {words}"
    return words if f.default is None else f"{words}, or none"


def as_typed(value):
    """A default as one would type it, in YAML; pyyaml may not be there."""
    if isinstance(value, list):
        return f"[{', '.join(map(as_typed, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {as_typed(v)}' for k, v in value.items())}}}"
    if isinstance(value, str) and value and "\\" not in repr(value):
        return value
    return repr(value) if isinstance(value, str) else str(value).lower()


def option_lines(width):
    """The help of every option under the heading of its group, lines of at most so many columns."""
    lines = []
    for f in dataclasses.fields(TrainConfig):
        if f.metadata["group"]:
            lines += ["", f.metadata["group"]]
        value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        shown, values = as_typed(value), values_of(f)
        lines += textwrap.wrap(
            f"--{f.name} {shown}" + f"  [{values}]" * bool(values), width,
            initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False,
        )
        lines += textwrap.wrap(
            f.metadata["help"], width, initial_indent="      ", subsequent_indent="      ",
            break_on_hyphens=False,
        )
    return lines


def yaml_value(text, key):
    """The value of the text of an option in YAML, the text itself where it is none."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    return None if value in ("None", "none") and key not in NAMING_NONE else value


def python_value(text, key):
    """The number that a text is, or the text: what reads without pyyaml."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def find_checkpoint(path):
    """(run folder, checkpoint) from either of them; takes the newest of a run."""
    from .policy import checkpoint

    path = Path(path)
    if not path.is_dir():
        raise UserError(f"There is no run folder or checkpoint {path}.")
    if path.name.startswith("checkpoint-"):
        return path.parent, path
    found = checkpoint.latest(path)
    if found is None:
        raise UserError(f"{path} holds no checkpoint, so there is nothing to continue or evaluate.")
    return path, found


def run_options(run_dir, options):
    """The options that a run was started with, overridden; another seed draws no other data."""
    was = load_yaml(Path(run_dir) / "config.yaml")
    if options.get("seed", was.get("seed")) != was.get("seed") and was.get("dataset_seed") is None:
        was["dataset_seed"] = was.get("seed")
    return {**was, **options}


def train(arguments):
    if "--help" in arguments or "-h" in arguments:
        print(USAGE.format(version=__version__))
        print("Options of train with their defaults, and what else they take in brackets:")
        print("\n".join(option_lines(min(shutil.get_terminal_size().columns, 100))))
        return 0
    options = parse_options(arguments)
    _quiet()
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if not set(options) - {"seed", "output_dir", "max_steps", "num_seeds"}:
        if several:
            raise UserError("The demo runs in one process; start it as rlsd train.")
        from .demo import run_demo

        check_demo_options(options)
        run_demo(**options)
        return 0
    from .policy import checkpoint
    from .sampling.evaluation import require_held_out
    from .trainer import Trainer

    resume, resume_from = options.pop("resume_from_checkpoint", None), None
    path = options.pop("config", None)
    options = {**(load_yaml(path) if path else {}), **options}
    if resume is not None:
        run_dir, resume_from = find_checkpoint(resume)
        given = options.pop("output_dir", None)
        if given is not None and Path(str(given)).resolve() != run_dir.resolve():
            raise UserError(
                f"A resumed run goes on in its own folder {run_dir}, but output_dir is {given}; "
                "leave output_dir out."
            )
        if options.get("model_name_or_path") == "scratch":
            del options["model_name_or_path"]
        was = run_options(run_dir, {})
        options = {**run_options(run_dir, options), "output_dir": str(run_dir)}
        require_same_model(make_config(was), make_config(options))
        require_held_out(run_dir, make_config(options))
    config = make_config(options)
    if config.model_name_or_path == "scratch" and resume is None:
        if several:
            raise UserError(
                "model_name_or_path: scratch trains its model in one process; make it there, then "
                "give its folder to all."
            )
        from .demo import scratch_model
        from .reports.report import require_packages

        require_packages(config)
        warm = f"{Path(config.output_dir).resolve()}-warm-start"
        lock = checkpoint.RunLock(warm)
        for path in (config.output_dir, warm):
            checkpoint.require_new_run(path)
        config = dataclasses.replace(config, model_name_or_path=scratch_model(config, warm))
        del lock
    trainer = Trainer(config, resume_from=resume_from)
    main = trainer.processes.main
    if main and config.max_steps and config.num_train_epochs:
        print(f"max_steps {config.max_steps} wins over num_train_epochs; set it to none for those.")
    if main:
        print(
            f"{config.objective}: {len(trainer.rows)} training questions, {len(trainer.held_out)} "
            f"held out, steps {trainer.step + 1} to {trainer.max_steps}, in {config.output_dir}"
            f"{trainer.processes}"
        )
    try:
        trainer.train()
    except KeyboardInterrupt:
        safe = checkpoint.standing(config.output_dir)
        raise KeyboardInterrupt(f" after step {trainer.step}; {safe}") from None
    if main:
        curves = f", {Path(config.output_dir) / 'curves.png'}" if config.plot_curves else ""
        print(f"Done: {checkpoint.latest(config.output_dir)}{curves}")
    return 0


def require_same_model(was, now):
    """The weights of a resumed run are its checkpoint's; an option must not name others."""
    for name in ("model_name_or_path", "lora_target_modules"):
        before, given = getattr(was, name), getattr(now, name)
        if given != before and not (
            name == "model_name_or_path" and Path(given).resolve() == Path(before).resolve()
        ):
            raise UserError(
                "A resumed run goes on with the model of its checkpoint, which was made with "
                f"{name} {before}, but {name} is {given}; leave it out."
            )


def check_demo_options(options):
    for name in ("seed", "max_steps", "num_seeds"):
        low, most = (0, 2**31) if name == "seed" else (1, 2**63 - 1)
        value = options.get(name, low)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise UserError(f"--{name} must be a whole number of at least {low}, but got {value}.")
        if value > most:
            raise UserError(f"--{name} must be at most {most}.")
    options["output_dir"] = str(options.get("output_dir", "runs/demo"))


def to_evaluate(name, options):
    """(path of the weights, TrainConfig, run folder): a run's newest checkpoint with the run's
    options, or a plain model, a folder or hub id, with the given ones and no run folder."""
    folder, given = Path(name), options.pop("config", None)
    options = {**(load_yaml(given) if given else {}), **options}
    is_checkpoint = folder.name.startswith("checkpoint-")
    if ((folder.parent if is_checkpoint else folder) / "config.yaml").exists():
        run_dir, path = find_checkpoint(name)
        return path, make_config(run_options(run_dir, options)), run_dir
    made_of = ("config.json", "adapter_config.json")
    is_file = folder.suffix == ".gguf" and folder.is_file()
    if folder.exists() and not is_file and not any((folder / file).exists() for file in made_of):
        raise UserError(f"{name} holds no checkpoint of a run, and no model.")
    if not options.get("train_dataset") and not options.get("eval_dataset"):
        is_model = f"{name} is a model and no run, so"
        if not folder.exists():
            is_model = f"There is no run folder or checkpoint {name}; if it is a model's hub id,"
        raise UserError(
            f"{is_model} eval needs --train_dataset, --eval_dataset or the --config of a run."
        )
    return name, make_config({"objective": "grpo", **options, "model_name_or_path": name}), None


def evaluate(arguments):
    if not arguments or arguments[0].startswith("-"):
        raise UserError("rlsd eval needs a run folder, a checkpoint or a model: rlsd eval RUN.")
    path, config, run_dir = to_evaluate(arguments[0].rstrip("/"), parse_options(arguments[1:]))
    if config.rollout_func:
        raise UserError(
            "rlsd eval has no trainer to give rollout_func; set it to none to sample as usual."
        )
    _quiet()
    from .policy.checkpoint import load_model, load_processor, load_tokenizer, verify
    from .policy.distributed import Processes
    from .sampling.agents import agent_of
    from .sampling.evaluation import evaluate as run
    from .sampling.evaluation import summary, trained_on
    from .sampling.samplers import choose_sampler, require_room
    from .tasks.data import load_data
    from .tasks.rewards import load_reward_funcs, require_scorable
    from .tasks.tools import load_tools

    functions, tools = load_reward_funcs(config.reward_funcs, config), load_tools(config)
    tokenizer = load_tokenizer(str(path))
    agent = agent_of(config, tokenizer, tools)
    functions += agent.reward_funcs if agent else []
    processor = load_processor(str(path))
    trained = trained_on(run_dir, config) if run_dir else set()
    _, held_out = load_data(
        config, tokenizer, processor=processor, toolbox=tools, trained=trained
    )
    if not held_out:
        raise UserError(
            "There is nothing to evaluate: eval_size is 0, and neither eval_dataset nor "
            "eval_split_size is set."
        )
    require_scorable(functions, held_out)
    processes = Processes(config)  # it chooses the GPU
    processes.once(lambda: verify(path))
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    model = load_model(
        str(path), config.device, dtype=dtype, attn_implementation=config.attn_implementation
    )
    config = dataclasses.replace(config, use_vllm=False)
    require_room(model, held_out, config)
    sample = choose_sampler(model, tokenizer, config, processes)
    metrics = run(
        model, tokenizer, held_out, config, functions, config.seed, processes, sample, agent
    )
    if not processes.main:
        return 0
    print(f"{path} on {len(held_out)} held-out questions, [95 % interval]")
    for name, text in summary(metrics):
        print(f"  {name:<24}{text}")
    return 0


def hints(arguments):
    options = parse_options(arguments)
    output, given = options.pop("output", None), options.pop("config", None)
    config = make_config({**(load_yaml(given) if given else {}), **options})
    for name in ("model_name_or_path", "train_dataset"):
        if not getattr(config, name):
            raise UserError(f"rlsd hints needs --{name}.")
    if output and not Path(output).parent.is_dir():
        raise UserError(f"--output {output} names a folder that does not exist.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("rlsd hints runs in one process.")
    _quiet()
    from .sampling.hint_check import hint_table, measure_hints

    metrics = measure_hints(config)
    print("\n".join(hint_table(metrics)))
    if output:
        Path(output).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return 0


def compare(arguments):
    from .compare import main as run

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("rlsd compare runs in one process and starts its runs itself.")
    _quiet()
    return run(parse_options(arguments))


def plot(arguments):
    from .reports.report import plot_runs

    runs = []
    while arguments and not arguments[0].startswith("--"):
        runs.append(arguments.pop(0).rstrip("/"))
    options = parse_options(arguments)
    output = options.pop("output", None)
    if options or not runs:
        raise UserError("Usage: rlsd plot RUN [RUN ...] [--output x.png].")
    output = output or Path(runs[0]) / "curves.png"
    print(plot_runs({run: [run] for run in runs}, output))
    return 0


def validate(arguments):
    if arguments:
        raise UserError(f"rlsd validate takes no arguments, but got {' '.join(arguments)}.")
    from .checks.validate import validate as run

    return 1 if run() else 0


def bench(arguments):
    from .checks.bench import run
    from .policy.update import memory_named

    with memory_named("timing a step", "--rows, --hidden_size or --vocab_size"):
        run(parse_options(arguments, python_value))
    return 0


def doctor(arguments):
    if arguments:
        raise UserError(f"rlsd doctor takes no arguments, but got {' '.join(arguments)}.")
    print(f"rlsd {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("\nPackages")
    for name, use in (
        ("torch", "everything"), ("numpy", "everything"),
        *((name, use) for name, _, use in OPTIONAL.values()),
        ("flash-attn", "attention in bf16 on a GPU"), ("triton", "impl triton, on a GPU"),
    ):
        print(f"  {name:<16}{installed_version(name) or 'missing':<16}{use}")
    print(f"  {'LoRA':<16}{lora_state()}")
    print("\nDevice")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            print(f"  cuda:{i}  {torch.cuda.get_device_name(i)}")
    else:
        print("  no CUDA device; runs on the CPU")
    print(f"  {torch.get_num_threads()} CPU threads; nvcc: {shutil.which('nvcc') or 'not found'}")
    print("\nImplementations of the fused loss")
    for name, state in available_impls().items():
        print(f"  {name:<8}{state}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    auto = choose_impl("auto", torch.empty(0, device=device))
    print(f"  impl='auto' runs {auto!r} on {device}")
    print("\nHosts")
    for name in RELEASES:
        version, state = installed_version(name), "tested"
        if version and not is_tested(name, version):
            state = f"outside the tested range, {releases_of(name)}"
        print(f"  {name:<16}{f'{version:<16}{state}' if version else 'missing'}")
    return 0


def lora_state():
    """Whether transformers and peft, two releases that need not fit, train, save and load LoRA."""
    try:
        _quiet()
        from .demo import tiny_model
        from .policy.checkpoint import load_model, save_weights
        from .policy.models import STUDENT, adapter_weights, add_lora, using_adapter

        with tempfile.TemporaryDirectory() as folder:
            tiny_model(64, seed=0, hidden=16, layers=1).save_pretrained(folder)
            model, ids = load_model(folder, "cpu"), torch.arange(8)[None]
            base = model(input_ids=ids).logits
            add_lora(model, TrainConfig(use_peft=True, lora_r=2))
            for p in adapter_weights(model, STUDENT).values():
                torch.nn.init.ones_(p)
            adapted = model(input_ids=ids).logits
            adapted.sum().backward()
            with using_adapter(model, None):
                without = model(input_ids=ids).logits
            save_weights(model, Path(folder) / "adapter", model.state_dict())
            loaded = load_model(str(Path(folder) / "adapter"), "cpu")(input_ids=ids).logits
        right = torch.equal(base, without) and torch.equal(adapted, loaded)
        return "works" if right else "does not work: its passes are not those of its weights"
    except ImportError as error:
        return import_failure(error).rstrip(".")
    except Exception as error:  # whatever two releases that do not fit each other raise
        return f"does not work: {' '.join(str(error).split()) or type(error).__name__}"


def installed_version(name):
    """Of a package, None where it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _quiet():
    require_release("transformers")
    from .reports.report import quiet_libraries

    quiet_libraries()


COMMANDS = {
    "train": train, "eval": evaluate, "hints": hints, "compare": compare, "plot": plot,
    "validate": validate, "bench": bench, "doctor": doctor,
}


class Output(io.FileIO):
    """A standard stream whose reader may go away: what is written after that is lost, no more."""

    def write(self, data):
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def outlive_the_terminal():
    """Put an Output under sys.stdout and sys.stderr, which also show any text in any locale."""
    for handle, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed before the start
            os.dup2(os.open(os.devnull, os.O_WRONLY), handle)
        raw = io.BufferedWriter(Output(handle, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(
            raw, encoding=stream.encoding if stream else "utf-8", errors="backslashreplace",
            line_buffering=raw.isatty() or handle == 2,
        ))


def main(arguments=None):
    """Entry point; returns the exit status."""
    if arguments is None:  # from a shell
        outlive_the_terminal()
        arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(version=__version__))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    command, *rest = arguments
    if command in DETAILS and {"-h", "--help"} & set(rest):
        entry = rf"^  rlsd {command} .*(?:\n {{9,}}.*)*"
        print("\n".join(re.findall(entry, USAGE, re.M)), DETAILS[command], sep="\n\n")
        return 0
    try:
        if command not in COMMANDS:
            raise UserError(f"Unknown command {command!r}; there are {', '.join(COMMANDS)}.")
        return COMMANDS[command](rest)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"\nrlsd{f' (process {rank})' * (rank != '0')}: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        if (error.name or "").split(".")[0] in ("rlsd", "rlsd_kernels"):
            raise
        print(f"rlsd: {command} {import_failure(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"\nrlsd: {command} stopped: {error.strerror or error}{where}; the checkpoints already "
            "written are intact.", file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as stop:
        print(f"\nrlsd: interrupted{stop}.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
