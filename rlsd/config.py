"""Training options: one flat dataclass, read from YAML and `--key value`, checked once.

Names follow TRL's GRPOConfig where it has one and ms-swift's for RLSD.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field

from rlsd_kernels import RLSDLossConfig


class UserError(Exception):
    """A mistake the user can fix, told in one sentence; the command line prints it and exits 2."""


OBJECTIVES = ("rlsd", "grpo")
TEACHER_MODEL_KINDS = ("live", "base", "snapshot", "ema")
SCALE_REWARDS = ("group", "batch", "none")
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")
DEFAULT_PRIVILEGED_TEMPLATE = "Reference solution:\n{privileged_context}\n\n{prompt}"


@dataclass
class TrainConfig:
    """Options of `rlsd train`. Steps are rollout steps, lengths are tokens, sizes are sequences.

    Raises UserError in one sentence on a value that is not allowed.
    """

    # Model and run
    model_name_or_path: str = ""  # folder or hub id; "scratch" builds and warms up a tiny model
    scratch_steps: int = 300  # supervised warm-up steps of model_name_or_path: scratch
    output_dir: str = "runs/rlsd"  # the run folder; must not exist
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    impl: str = "auto"  # implementation of the fused loss

    # Data
    train_dataset: str = ""  # .jsonl, .parquet, hub id, or reasoning-gym:task[,task...]
    eval_dataset: str | None = None  # default: eval_size rows held out of train_dataset
    dataset_size: int = 1000  # rows generated per reasoning-gym dataset
    eval_size: int = 128  # held-out questions; 0 turns evaluation off
    max_prompt_length: int | None = None  # longer prompts are dropped and counted, never cut
    max_teacher_prompt_length: int | None = None  # the same for the privileged prompt
    privileged_template: str = DEFAULT_PRIVILEGED_TEMPLATE
    allow_missing_privileged_context: bool = False  # rows without it train as plain GRPO
    shuffle_privileged_context: bool = False  # control: every row gets another row's hint

    # Rollouts and rewards
    num_generations: int = 8  # group size: completions per question
    generation_batch_size: int = 64  # completions per rollout step, all questions together
    rollout_batch_size: int = 256  # sequences generated at once (memory), also in evaluation
    max_completion_length: int = 256
    temperature: float = 1.0
    reward_funcs: list[str] = field(default_factory=lambda: ["exact_match"])
    reward_weights: list[float] | None = None
    scale_rewards: str = "group"  # group, batch, none
    mask_truncated_completions: bool = False
    leak_markers: list[str] = field(default_factory=list)  # texts that betray the hint

    # Objective
    objective: str = "rlsd"
    rlsd_lambda: float = 0.5
    rlsd_lambda_warmup_steps: int = 0
    rlsd_lambda_decay_steps: int = 50
    rlsd_reweight_clip_range: float = 0.2
    rlsd_delta_source: str = "current"
    rlsd_negative_only: bool = False
    teacher_model_kind: str = "snapshot"  # live, base, snapshot, ema
    teacher_sync_steps: int = 10
    teacher_ema_rate: float = 0.05
    loss_type: str = "dapo"
    epsilon: float = 0.2
    epsilon_high: float = 0.28
    delta: float | None = 3.0
    beta: float = 0.0
    entropy_coef: float = 0.0
    num_iterations: int = 1  # optimizer steps per rollout

    # Optimizer
    max_steps: int = 200
    per_device_train_batch_size: int = 8  # sequences per micro-batch; never changes the result
    learning_rate: float = 1e-6
    lr_scheduler_type: str = "constant"
    warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    # Evaluation, logging, checkpoints; 0 turns each off
    eval_steps: int = 50
    logging_steps: int = 1
    save_steps: int = 50  # the last step is always saved
    save_total_limit: int | None = None
    log_completions_steps: int = 50
    validate_every: int = 0  # compare fused loss and gradients with the reference, stop if off
    report_to: str = "tensorboard"  # tensorboard, none

    def __post_init__(self):
        for f in dataclasses.fields(self):
            setattr(self, f.name, _coerce(f.name, getattr(self, f.name), _HINTS[f.name]))
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} must be one of {', '.join(allowed)}, but got {getattr(self, name)!r}."
                )
        for name, low in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"{name} must be at least {low}, but got {value}.")
        if self.generation_batch_size % self.num_generations:
            raise UserError(
                f"generation_batch_size ({self.generation_batch_size}) must be a multiple of "
                f"num_generations ({self.num_generations}), so that every group is whole."
            )
        if not 0 < self.teacher_ema_rate <= 1:
            raise UserError(f"teacher_ema_rate must be in (0, 1], but got {self.teacher_ema_rate}.")
        if not 0 < self.learning_rate < math.inf or self.max_grad_norm <= 0:
            raise UserError(
                "learning_rate and max_grad_norm must be positive, and learning_rate finite."
            )
        if not 0 <= self.adam_beta1 < 1 or not 0 <= self.adam_beta2 < 1:
            raise UserError(
                f"adam_beta1 and adam_beta2 must be in [0, 1), but got {self.adam_beta1} and "
                f"{self.adam_beta2}."
            )
        if not self.reward_funcs:
            raise UserError("reward_funcs must name at least one reward function.")
        if self.reward_weights and len(self.reward_weights) != len(self.reward_funcs):
            raise UserError(
                f"reward_weights has {len(self.reward_weights)} entries but reward_funcs has "
                f"{len(self.reward_funcs)}; give one weight per function."
            )
        for part in ("{prompt}", "{privileged_context}"):
            if self.privileged_template.count(part) != 1:
                raise UserError(f"privileged_template must contain {part} exactly once.")
        self.loss_config()

    def loss_config(self):
        """The scalars of the loss; lambda of the GRPO objective is 0."""
        names = [f.name for f in dataclasses.fields(RLSDLossConfig)]
        try:
            config = RLSDLossConfig(**{name: getattr(self, name) for name in names})
        except ValueError as error:
            raise UserError(str(error)) from None
        return dataclasses.replace(config, rlsd_lambda=0.0) if self.objective == "grpo" else config


_HINTS = typing.get_type_hints(TrainConfig)
_CHOICES = {
    "objective": OBJECTIVES,
    "teacher_model_kind": TEACHER_MODEL_KINDS,
    "scale_rewards": SCALE_REWARDS,
    "loss_type": ("grpo", "bnpo", "dapo", "dr_grpo"),
    "lr_scheduler_type": LR_SCHEDULERS,
    "impl": ("auto", "cuda", "triton", "torch", "ref"),
    "report_to": ("tensorboard", "none"),
}
_AT_LEAST = {
    "scratch_steps": 1, "seed": 0, "dataset_size": 1, "eval_size": 0, "max_prompt_length": 1,
    "max_teacher_prompt_length": 1, "num_generations": 2, "generation_batch_size": 2,
    "rollout_batch_size": 1, "max_completion_length": 1, "rlsd_lambda_warmup_steps": 0,
    "rlsd_lambda_decay_steps": 0, "teacher_sync_steps": 1, "num_iterations": 1, "max_steps": 1,
    "per_device_train_batch_size": 1, "warmup_steps": 0, "weight_decay": 0, "eval_steps": 0,
    "logging_steps": 1, "save_steps": 0, "save_total_limit": 1, "log_completions_steps": 0,
    "validate_every": 0,
}


def _coerce(name, value, hint):
    """The value in the option's type, or UserError; a text may be a float (YAML reads 1e-6 so)."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is list:
        items = value if isinstance(value, list | tuple) else [value]
        (item,) = typing.get_args(hint)
        return [_coerce(name, v, item) for v in items]
    if hint is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            value = float(value)
        except (ValueError, OverflowError):
            pass
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    nan = isinstance(value, float) and math.isnan(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)) and not nan:
        return value
    raise UserError(f"{name} must be {_NAMES.get(hint, hint)}, but got {value!r}.")


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def make_config(options):
    """TrainConfig from a dict; an unknown option is an error that names the nearest known one."""
    known = [f.name for f in dataclasses.fields(TrainConfig)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; see `rlsd train --help`."
            raise UserError(f"Unknown option {name!r}{hint}")
    return TrainConfig(**options)


def load_yaml(path):
    """The options in a YAML file, as a dict."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            options = yaml.safe_load(file)
    except OSError as error:
        raise UserError(f"Cannot read the config {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise UserError(f"The config {path} is not valid YAML{line}.") from None
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise UserError(f"The config {path} must be a list of `option: value` lines.")
    return options
