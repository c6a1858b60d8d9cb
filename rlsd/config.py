"""Training options: one flat dataclass, read from YAML and `--key value`, checked once.

Names follow TRL's GRPOConfig where it has one and ms-swift's for RLSD.
"""

import dataclasses
import difflib
import math
import os
import re
import typing
from dataclasses import dataclass

from rlsd_kernels import RLSDLossConfig

from .objectives import OBJECTIVES
from .options import UserError, coerce, option, shown

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
TEACHER_MODEL_KINDS = ("live", "base", "snapshot", "ema")
SCALE_REWARDS = ("group", "batch", "none")
FORMATS = ("think_answer", "think", "boxed")
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")
DEFAULT_PRIVILEGED_TEMPLATE = "Reference solution:\n{privileged_context}\n\n{prompt}"


@dataclass
class TrainConfig:
    """Options of `rlsd train`. Steps are rollout steps, lengths are tokens, sizes are sequences.

    Raises UserError in one sentence on a value that is not allowed.
    """

    model_name_or_path: str = option(
        "", "folder, hub id or .gguf file; scratch builds and warms up a tiny model",
        group="Model and run",
    )
    scratch_steps: int = option(300, "supervised warm-up steps of model_name_or_path: scratch")
    output_dir: str = option("runs/rlsd", "the run folder; must not exist")
    seed: int = option(
        0, "fixes questions, samples and scratch model; the same seed gives the same run"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    impl: str = option(
        "auto", "implementation of the fused loss",
        choices=("auto", "cuda", "triton", "torch", "ref"),
    )
    attn_implementation: str | None = option(
        None, "sdpa, flash_attention_2, eager; default: flash attention in bf16 where installed"
    )
    bf16: bool = option(False, "bf16 weights with fp32 masters; under LoRA a bf16 frozen model")

    use_peft: bool = option(
        False, "train LoRA adapters and freeze the model; needs peft", group="LoRA"
    )
    lora_r: int = option(16, "rank of the adapters")
    lora_alpha: int = option(32, "the adapters are scaled by lora_alpha / lora_r")
    lora_dropout: float = option(0.0, "must be 0: dropout would score another policy than sampled")
    lora_target_modules: list[str] = option(
        lambda: ["all-linear"], "names of the layers that get one; never the LM head"
    )

    train_dataset: str = option(
        "", ".jsonl, .parquet, hub id[:config][@split], reasoning-gym:task[,task...], or "
        "worked:add3, worked:seqadd[:solved turns]",
        group="Data",
    )
    eval_dataset: str | None = option(None, "default: rows held out of train_dataset")
    dataset_size: int = option(1000, "rows of a generated dataset, if it has so many")
    dataset_seed: int | None = option(
        None, "of generated datasets and of eval_split_size; default: seed"
    )
    eval_size: int = option(128, "held-out questions, train_dataset's last; 0 turns evaluation off")
    eval_split_size: float | None = option(
        None, "hold out so many rows, or this share below 1, drawn by seed, instead of eval_size"
    )
    max_prompt_length: int | None = option(
        None, "longer prompts are dropped and counted, never cut"
    )
    max_teacher_prompt_length: int | None = option(None, "the same for the privileged prompt")
    chat_template_kwargs: dict = option(
        dict, "further arguments of the chat template, as {enable_thinking: false}; a column of "
        "this name adds to them and wins"
    )
    privileged_template: str = option(
        DEFAULT_PRIVILEGED_TEMPLATE, "the one insertion that makes the teacher's prompt"
    )
    hint_placement: str = option(
        "text", "text: privileged_template inserts it; turn: one more exchange before the last "
        "user turn, the same question solved by it", choices=("text", "turn"),
    )
    allow_missing_privileged_context: bool = option(False, "rows without it train as plain GRPO")
    shuffle_privileged_context: bool = option(False, "control: every row gets another row's hint")
    answer_only_privileged_context: bool = option(
        False, "control: the hint is the solution column, without the privileged context's steps"
    )

    num_generations: int = option(8, "group size: completions per question", group="Rollouts")
    generation_batch_size: int | None = option(
        None, "completions per rollout step, all questions together; default: what "
        "gradient_accumulation_steps says, or 64"
    )
    rollout_batch_size: int = option(
        256, "sequences generated at once (memory), also in evaluation"
    )
    max_completion_length: int = option(256, "longer completions end without EOS")
    temperature: float = option(1.0, "of sampling, and of the log-probs of both contexts")
    top_p: float = option(
        1.0, "sample from the most probable tokens, as many as hold this probability; 1 keeps all"
    )
    top_k: int = option(0, "sample from so many of the most probable tokens; 0 keeps all")
    min_p: float | None = option(
        None, "sample from tokens with at least this share of the most probable one's probability"
    )
    repetition_penalty: float = option(
        1.0, "above 1, tokens that prompt or completion already have get less probable; below, more"
    )
    use_transformers_continuous_batching: bool | None = option(
        None, "transformers' continuous batching; default: on a GPU, where it can run the model"
    )
    transformers_continuous_batching_config: dict = option(
        dict, "options of its ContinuousBatchingConfig, as max_memory_percent of the free memory"
    )
    use_vllm: bool = option(
        False, "sample by vLLM; needs trl and vllm, see docs/training.md", group="Rollouts by vLLM"
    )
    vllm_mode: str = option(
        "colocate", "colocate: in this process; server: a running vllm serve",
        choices=("colocate", "server"),
    )
    vllm_server_base_url: str | None = option(
        None, "of the server, as http://host:8000; replaces host and port"
    )
    vllm_server_host: str = option("0.0.0.0", "of the server")
    vllm_server_port: int = option(8000, "of the server")
    vllm_server_timeout: float = option(240.0, "seconds to wait for the server to be up")
    vllm_group_port: int = option(51216, "of the group that sends weights to the server")
    vllm_gpu_memory_utilization: float = option(0.3, "share of the GPU for colocated vLLM")
    vllm_max_model_length: int | None = option(
        None, "tokens of prompt and completion in colocated vLLM; default: the model's"
    )
    vllm_enable_sleep_mode: bool = option(
        False, "free the memory of colocated vLLM while the model is updated"
    )
    vllm_importance_sampling_correction: bool | None = option(
        None, "weigh every token's loss by pi_train / pi_sampler; default: where they differ by "
        "design, with vLLM, top_p, top_k, min_p or repetition_penalty"
    )
    vllm_importance_sampling_clip_max: float = option(
        3.0, "upper bound of that weight (token_truncate in TRL)"
    )
    tools: list[str] = option(
        list, "functions that the model may call: dotted paths, or run_python, which runs a "
        "program isolated; see docs/agents.md", group="Agents",
    )
    environment_factory: str | None = option(
        None, "dotted path of what makes an environment, whose methods are tools, or of a mapping "
        "of such by the column environment"
    )
    rollout_func: str | None = option(
        None, "dotted path of a function(prompts, trainer) that samples in place of the trainer"
    )
    hint_func: str | None = option(
        None, "dotted path of a function(prompt, completion, feedback, **columns) that gives the "
        "teacher's hint for a completion, or None"
    )
    max_tool_calling_iterations: int | None = option(
        None, "turns in which tools are called; default: as many as max_completion_length holds"
    )
    max_tool_response_length: int = option(256, "a longer result of a tool is cut, and says so")
    tool_timeout: float = option(
        30.0, "seconds until a call of a tool counts as hung; the model is told"
    )
    reward_funcs: list[str] = option(
        lambda: ["exact_match"],
        "exact_match, reasoning_gym, math_verify, format_reward, soft_overlong_punishment, "
        "code_tests, dotted paths; pass@1 is the first's", group="Rewards",
    )
    reward_weights: list[float] | None = option(None, "one per reward function; default: all 1")
    reward_timeout: float = option(
        300.0, "seconds until a call of a reward function counts as hung and ends the run"
    )
    verify_timeout: float = option(
        6.0, "seconds for one answer in math_verify, reasoning_gym and under your own "
        "format_pattern, and for one test in code_tests; then it scores 0"
    )
    format_pattern: str = option(
        "think_answer", "of format_reward: think_answer, think, boxed, or a regular expression "
        "that the whole completion must match"
    )
    soft_punish_cache: int | None = option(
        None, "soft_overlong_punishment falls from 0 to -1 over the last so many tokens of "
        "max_completion_length; default: a fifth of it"
    )
    code_memory_mb: int = option(1024, "address space of a program under code_tests, in MiB")
    allow_unsandboxed_code: bool = option(
        False, "code_tests without namespaces, where the machine refuses them: programs then reach "
        "the network and your files"
    )
    scale_rewards: str = option(
        "group", "whose standard deviation centred rewards are divided by", choices=SCALE_REWARDS
    )
    mask_truncated_completions: bool = option(
        False, "leave completions without EOS out of the loss"
    )
    leak_markers: list[str] = option(
        list, "texts that betray the hint; the share of answers with one is the leak rate"
    )
    leak_phrases: bool = option(
        False, "also count answers that refer to a reference which the student cannot see, such as "
        "'the reference solution' (rlsd/sampling/leak.py has the rule)"
    )

    objective: str = option(
        "rlsd", "; ".join(f"{name}: {row.summary}" for name, row in OBJECTIVES.items()),
        choices=tuple(OBJECTIVES), group="Objective and teacher",
    )
    teacher_model_name_or_path: str | None = option(
        None, "the external teacher of objective opd; it must have the student's vocabulary"
    )
    distillation_divergence: str = option(
        "jsd", "of opsd, opd, grpo+opsd, sdpo; forward_kl is KL(P_T||P_S)", choices=DIVERGENCES
    )
    distillation_alpha: float = option(0.5, "weight of the teacher in jsd's mixture, in (0, 1)")
    distillation_coef: float = option(1.0, "c of grpo+opsd, the loss grpo + c * opsd")
    success_reward_threshold: float = option(
        1.0, "completions with at least this reward are right, as hints of sdpo and hint_source "
        "rollout, and those below are wrong"
    )
    hint_source: str = option(
        "data", "what the teacher of rlsd and rlcsd reads: data, the privileged context; rollout, "
        "a right completion of the same group", choices=("data", "rollout"),
    )
    rlsd_contrast_hints: int | None = option(
        None, "up to so many wrong completions of the group, against which the hint is held in "
        "place of the student; 0: none; default: 4 for rlcsd, else 0"
    )
    rlcsd_beta: float = option(
        1.0, "rlcsd adds r = clip(beta lambda tanh(e / tau), -c, c) to A, e the contrast"
    )
    rlcsd_tau: float = option(0.02, "tau of rlcsd, in nats")
    rlcsd_clip: float = option(2.0, "c of rlcsd")
    rlcsd_threshold: float = option(0.02, "rlcsd adds r to A where |r| is above this, selected")
    rlcsd_eta: float = option(1.0, "weight of the mean over selected tokens beside that of others")
    rlsd_lambda: float = option(
        0.5, "mix of the token weight into the advantage, 0 to 1; 0 is GRPO"
    )
    rlsd_lambda_warmup_steps: int = option(0, "steps over which lambda rises from 0")
    rlsd_lambda_decay_steps: int = option(50, "steps over which lambda then falls to 0; 0 keeps it")
    rlsd_reweight_clip_range: float = option(0.2, "eps_w: token weights stay in 1 -+ eps_w, 0 to 1")
    rlsd_delta_source: str = option(
        "current", "which log-prob of the student is in delta",
        choices=("current", "old_log_probs"),
    )
    rlsd_negative_only: bool = option(False, "re-weight only where the advantage is negative")
    teacher_model_kind: str = option(
        "snapshot", "live (no memory), base, snapshot (a copy each), ema (a copy and a mean)",
        choices=TEACHER_MODEL_KINDS,
    )
    teacher_sync_steps: int = option(10, "a snapshot teacher follows after every so many steps")
    teacher_ema_rate: float = option(0.05, "an ema teacher moves this share per step")
    loss_type: str = option(
        "dapo", "TRL's aggregations over tokens", choices=("grpo", "bnpo", "dapo", "dr_grpo")
    )
    epsilon: float = option(0.2, "PPO clip below 1")
    epsilon_high: float = option(0.28, "PPO clip above 1")
    delta: float | None = option(
        3.0, "dual clip: bound of the ratio where A < 0; none turns it off"
    )
    beta: float = option(
        0.0, "coefficient of the KL to the starting policy; > 0 keeps a copy of it"
    )
    entropy_coef: float = option(0.0, "coefficient of an entropy bonus")
    num_iterations: int = option(1, "optimizer steps per rollout")

    max_steps: int | None = option(
        None, "rollout steps; default: those of num_train_epochs, or 200", group="Optimizer"
    )
    num_train_epochs: float | None = option(
        None, "how often every training question is asked; max_steps wins where both are given"
    )
    per_device_train_batch_size: int = option(
        8, "sequences per micro-batch; never changes the result"
    )
    gradient_accumulation_steps: int | None = option(
        None, "micro-batches of an optimizer step, which takes the whole rollout: this times "
        "per_device_train_batch_size and processes is generation_batch_size"
    )
    max_tokens_per_micro_batch: int | None = option(
        None, "cut micro-batches by their tokens, padding included, instead of by sequences"
    )
    gradient_tolerance: float = option(
        0.0, "relative error that the gradient at the logits may have, in [0, 1); 1e-3 spares a "
        "trained policy most of the head's backward; 0 is exact"
    )
    padding_free: bool = option(
        False, "pack a micro-batch into one row; wants flash attention, or short rows under SDPA"
    )
    share_prompts: str = option(
        "auto", "compute a group's prompt once, in student and teacher: auto, where the model "
        "proves to give the same", choices=("auto", "true", "false"),
    )
    gradient_checkpointing: bool = option(False, "recompute layers in backward: memory for time")
    router_aux_loss_coef: float | None = option(
        None, "weight of the experts' load-balancing loss; default: the model's, if it puts it out"
    )
    learning_rate: float = option(1e-6, "of AdamW")
    lr_scheduler_type: str = option(
        "constant", "how the learning rate goes on", choices=LR_SCHEDULERS
    )
    warmup_steps: int = option(0, "of the learning rate, in optimizer steps")
    adam_beta1: float = option(0.9, "of AdamW")
    adam_beta2: float = option(0.999, "of AdamW")
    weight_decay: float = option(0.0, "of AdamW")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")

    num_generations_eval: int = option(
        1, "sampled completions per held-out question; n > 1 adds pass@k for k = 2, 4, 8, .., n",
        group="Evaluation, logging, checkpoints",
    )
    eval_steps: int = option(50, "held-out evaluation every so many steps; 0: never")
    logging_steps: int = option(1, "a progress line every so many steps; metrics.jsonl has all")
    save_steps: int = option(50, "a checkpoint every so many steps and at the end; 0: at the end")
    save_total_limit: int | None = option(None, "keep only so many checkpoints, the newest")
    sharded_checkpoints: bool = option(
        False, "every process writes its shards of optimizer, masters and teacher, instead of "
        "the main one all of them; any number of processes resumes from either"
    )
    log_completions_steps: int = option(
        50, "samples to the terminal and completions/*.parquet; 0: never"
    )
    validate_every: int = option(
        0, "hold the fused loss of a micro-batch against the reference; 0: never"
    )
    plot_curves: bool = option(True, "draw curves.png at the end")
    push_to_hub: bool = option(
        False, "upload the last checkpoint, without optimizer and teacher, when the run is done"
    )
    hub_model_id: str | None = option(
        None, "the repository of push_to_hub, as me/my-model; default: the run folder's name"
    )
    report_to: list[str] = option(
        lambda: ["tensorboard"], "where metrics go beside metrics.jsonl; wandb and trackio are "
        "packages of their own, with project rlsd (or WANDB_PROJECT)",
        choices=("tensorboard", "wandb", "trackio", "none"),
    )

    def __post_init__(self):
        for f in dataclasses.fields(self):
            setattr(self, f.name, coerce(
                f.name, getattr(self, f.name), _HINTS[f.name], _CHOICES.get(f.name, ())
            ))
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            for item in value if isinstance(value, list) else [value]:
                if item not in allowed:
                    known = ", ".join(allowed)
                    raise UserError(f"{name} must be one of {known}, but got {shown(item)}.")
        for f in dataclasses.fields(self):  # torch, numpy and the operating system count in 64 bits
            value, most = getattr(self, f.name), 2**(32 if f.name.endswith("seed") else 63) - 1
            if isinstance(value, int) and value > most:
                raise UserError(f"{f.name} must be at most {most}, but got {shown(value)}.")
        for name, low in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"{name} must be at least {low}, but got {shown(value)}.")
        self._fill_in_sizes()
        if self.generation_batch_size % self.num_generations:
            raise UserError(
                f"generation_batch_size ({self.generation_batch_size}) must be a multiple of "
                f"num_generations ({self.num_generations}), so that every group is whole."
            )
        if not 0 < self.teacher_ema_rate <= 1:
            raise UserError(f"teacher_ema_rate must be in (0, 1], but got {self.teacher_ema_rate}.")
        if self.lora_dropout:
            raise UserError(
                f"lora_dropout must be 0, but got {self.lora_dropout}: the student scores its "
                "samples without dropout, because with it the ratio to the sampler is not 1."
            )
        if not 0 < self.learning_rate < math.inf or self.max_grad_norm <= 0:
            raise UserError(
                "learning_rate and max_grad_norm must be positive, and learning_rate finite."
            )
        if not 0 <= self.adam_beta1 < 1 or not 0 <= self.adam_beta2 < 1:
            raise UserError(
                f"adam_beta1 and adam_beta2 must be in [0, 1), but got {self.adam_beta1} and "
                f"{self.adam_beta2}."
            )
        if "none" in self.report_to:
            if len(self.report_to) > 1:
                raise UserError("report_to is none or names trackers, but not both.")
            self.report_to = []
        if not all(marker.strip() for marker in self.leak_markers):
            raise UserError("leak_markers must not hold an empty text, which every answer holds.")
        if not self.reward_funcs and not self.environment_factory:
            raise UserError("reward_funcs must name at least one reward function.")
        if self.reward_weights and len(self.reward_weights) != len(self.reward_funcs):
            raise UserError(
                f"reward_weights has {len(self.reward_weights)} entries but reward_funcs has "
                f"{len(self.reward_funcs)}; give one weight per function."
            )
        for name in ("reward_timeout", "verify_timeout", "tool_timeout", *_RLCSD):
            if not 0 < (got := getattr(self, name)) < math.inf:
                unit = " of seconds" if name.endswith("timeout") else ""
                raise UserError(f"{name} must be a positive number{unit}, but got {got}.")
        self._check_split_and_format()
        self._check_sampler()
        self._check_objective()
        if not 0 <= self.gradient_tolerance < 1:
            raise UserError(
                f"gradient_tolerance must be in [0, 1), but got {self.gradient_tolerance:g}."
            )
        for part in ("{prompt}", "{privileged_context}"):
            if self.privileged_template.count(part) != 1:
                raise UserError(f"privileged_template must contain {part} exactly once.")
        if self.hint_placement == "turn" and (
            self.privileged_template != DEFAULT_PRIVILEGED_TEMPLATE
        ):
            raise UserError(
                "privileged_template is for hint_placement text, but hint_placement is turn, which "
                "adds the hint as it is; leave one of them out."
            )
        if self.hint_placement == "turn" and self.model_name_or_path == "scratch":
            raise UserError(
                "model_name_or_path: scratch reads plain texts, in which hint_placement turn finds "
                "no turns; set it to text."
            )
        self.loss_config()

    def _fill_in_sizes(self):
        if self.num_train_epochs is not None and not 0 < self.num_train_epochs < math.inf:
            raise UserError(
                f"num_train_epochs must be a positive number, but got {self.num_train_epochs}."
            )
        if self.max_steps is None and self.num_train_epochs is None:
            self.max_steps = 200
        if self.gradient_accumulation_steps is None:
            self.generation_batch_size = self.generation_batch_size or 64
            return
        processes = int(os.environ.get("WORLD_SIZE", 1))
        size = self.per_device_train_batch_size * processes * self.gradient_accumulation_steps
        if self.generation_batch_size not in (None, size):
            raise UserError(
                "An optimizer step takes the whole rollout, so generation_batch_size "
                f"({self.generation_batch_size}) must be per_device_train_batch_size "
                f"({self.per_device_train_batch_size}) x {processes} process"
                f"{'es' * (processes > 1)} x gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps}); set one of them to none."
            )
        self.generation_batch_size = size

    def steps_over(self, count):
        """Rollout steps over so many training questions; the last may begin a new epoch."""
        if self.max_steps is not None:
            return self.max_steps
        questions = self.generation_batch_size // self.num_generations
        return max(1, math.ceil(self.num_train_epochs * count / questions))

    def _check_split_and_format(self):
        share = self.eval_split_size
        if share is not None and not (0 < share < 1 or share >= 1 and share % 1 == 0):
            raise UserError(
                "eval_split_size must be a whole number of rows or a share between 0 and 1, but "
                f"got {share}."
            )
        if share is not None and self.eval_dataset:
            raise UserError("Give eval_dataset or eval_split_size, but not both.")
        cache = self.soft_punish_cache
        if cache is not None and cache > self.max_completion_length:
            raise UserError(
                f"soft_punish_cache ({cache}) must not exceed max_completion_length "
                f"({self.max_completion_length})."
            )
        pattern = self.format_pattern
        try:
            re.compile(pattern)
            known = pattern in FORMATS or not re.fullmatch(r"\w*", pattern)
        except re.error:
            known = False
        if not known:
            raise UserError(
                f"format_pattern must be one of {', '.join(FORMATS)} or a valid regular "
                f"expression, but got {pattern!r}."
            )

    def _check_sampler(self):
        if self.use_vllm and self.use_transformers_continuous_batching:
            raise UserError("Set use_vllm or use_transformers_continuous_batching, but not both.")
        if not 0 < self.vllm_gpu_memory_utilization <= 1:
            raise UserError(
                "vllm_gpu_memory_utilization must be in (0, 1], but got "
                f"{self.vllm_gpu_memory_utilization}."
            )
        for name, inside, words in (
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a positive number"),
        ):
            if not inside:
                raise UserError(f"{name} must be {words}, but got {getattr(self, name)}.")

    def reshapes_sampling(self):
        """Whether tokens are drawn from another distribution than the softmax that is trained."""
        return self.top_p < 1 or bool(self.top_k or self.min_p) or self.repetition_penalty != 1

    def unfiltered(self):
        """The same, drawing from that softmax."""
        return dataclasses.replace(self, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0)

    def sampling_clip_max(self):
        """Upper bound of pi_train / pi_sampler in the loss, or None where it is not corrected."""
        wanted = self.vllm_importance_sampling_correction
        wanted = self.use_vllm or self.reshapes_sampling() if wanted is None else wanted
        return self.vllm_importance_sampling_clip_max if wanted else None

    def _check_objective(self):
        name, path = self.objective, self.teacher_model_name_or_path
        external = self.method.teacher_reads == "question"
        if external and not path:
            raise UserError(
                f"objective {name} needs an external teacher; name it in "
                "teacher_model_name_or_path."
            )
        if path and not external:
            taking = [n for n, row in OBJECTIVES.items() if row.teacher_reads == "question"]
            raise UserError(
                f"teacher_model_name_or_path is set, but objective {name} has no external teacher; "
                f"leave it out or set objective to {' or '.join(taking)}."
            )
        if not 0 < self.distillation_alpha < 1:
            raise UserError(
                f"distillation_alpha must lie strictly between 0 and 1, but got "
                f"{self.distillation_alpha}; for the KL divergences at the ends set "
                "distillation_divergence."
            )
        if not self.method.policy_gradient and (self.beta or self.entropy_coef):
            raise UserError(
                f"beta and entropy_coef are terms of the policy gradient, which objective {name} "
                "does not have; set both to 0."
            )
        self._check_contrast()
        self._check_agent()
        if self.shuffle_privileged_context and self.answer_only_privileged_context:
            raise UserError(
                "Give shuffle_privileged_context or answer_only_privileged_context, but not both."
            )

    def _check_contrast(self):
        if self.rlsd_contrast_hints is None:
            self.rlsd_contrast_hints = 4 if self.method.selects else 0
        of_rollout, hints = self.hint_source == "rollout", self.rlsd_contrast_hints
        if (of_rollout or hints) and not self.method.reweights:
            raise UserError(
                "hint_source rollout and rlsd_contrast_hints are for objectives rlsd and rlcsd, "
                f"but objective is {self.objective}; leave them out."
            )
        if self.method.selects and not hints:
            raise UserError("objective rlcsd needs rlsd_contrast_hints of 1 or more, but got 0.")
        if of_rollout and (self.shuffle_privileged_context or self.answer_only_privileged_context):
            raise UserError(
                "shuffle_privileged_context and answer_only_privileged_context change the data's "
                "hints, which hint_source rollout does not read; leave them out."
            )

    def _check_agent(self):
        if self.rollout_func and (self.tools or self.environment_factory):
            raise UserError(
                "Give rollout_func, which plays all turns itself, or tools and "
                "environment_factory, but not both."
            )
        sampled = self.tools or self.environment_factory or self.rollout_func or self.hint_func
        if sampled and self.method.supervised:
            raise UserError(
                f"objective {self.objective} samples nothing that could use tools, "
                "environment_factory, rollout_func or hint_func; leave them out."
            )
        if not self.hint_func:
            return
        if self.method.teacher_reads != "hint":
            raise UserError(
                f"hint_func makes a hint for the teacher, but that of objective {self.objective} "
                "reads none; leave it out."
            )
        if self.hint_source == "rollout" or self.shuffle_privileged_context or (
            self.answer_only_privileged_context
        ):
            raise UserError(
                "hint_func makes the hint; leave out hint_source rollout, "
                "shuffle_privileged_context and answer_only_privileged_context, which choose "
                "another."
            )

    @property
    def method(self):
        """The row of OBJECTIVES."""
        return OBJECTIVES[self.objective]

    def data_seed(self):
        """What fixes the questions."""
        return self.seed if self.dataset_seed is None else self.dataset_seed

    def reads_hints(self):
        """Whether a teacher reads the privileged context of the data."""
        return self.hint_source == "data" and not self.hint_func and self.reads_context()

    def reads_context(self):
        """Whether a teacher reads a privileged context, whoever made it."""
        method = self.method
        return method.teacher_reads == "hint" and (not method.reweights or self.rlsd_lambda > 0)

    def reads_siblings(self):
        """Whether a teacher reads completions of the group that it scores."""
        if self.method.reweights:
            from_group = self.hint_source == "rollout" or self.rlsd_contrast_hints > 0
            return from_group and self.rlsd_lambda > 0
        return self.method.teacher_reads == "sibling"

    def loss_config(self):
        """The scalars of the loss; lambda is 0 where the objective weighs no token."""
        names = [f.name for f in dataclasses.fields(RLSDLossConfig)]
        try:
            config = RLSDLossConfig(**{name: getattr(self, name) for name in names})
        except ValueError as error:
            raise UserError(str(error)) from None
        return config if self.method.reweights else dataclasses.replace(config, rlsd_lambda=0.0)


_RLCSD = "rlcsd_beta", "rlcsd_tau", "rlcsd_clip", "rlcsd_eta"
_HINTS = typing.get_type_hints(TrainConfig)
_CHOICES = {
    f.name: f.metadata["choices"]
    for f in dataclasses.fields(TrainConfig) if f.metadata["choices"]
}
_AT_LEAST = {
    "scratch_steps": 1, "seed": 0, "dataset_seed": 0, "dataset_size": 1, "eval_size": 0,
    "max_prompt_length": 1, "max_teacher_prompt_length": 1, "num_generations": 2,
    "generation_batch_size": 2, "rollout_batch_size": 1, "max_completion_length": 1,
    "rlsd_lambda_warmup_steps": 0, "rlsd_lambda_decay_steps": 0, "teacher_sync_steps": 1,
    "num_iterations": 1, "max_steps": 1,
    "per_device_train_batch_size": 1, "max_tokens_per_micro_batch": 1, "lora_r": 1,
    "lora_alpha": 1, "router_aux_loss_coef": 0, "warmup_steps": 0, "weight_decay": 0,
    "eval_steps": 0, "logging_steps": 1, "save_steps": 0, "save_total_limit": 1,
    "log_completions_steps": 0, "validate_every": 0, "num_generations_eval": 1,
    "soft_punish_cache": 1, "code_memory_mb": 16, "vllm_server_port": 1, "vllm_group_port": 1,
    "vllm_server_timeout": 0, "vllm_max_model_length": 1, "vllm_importance_sampling_clip_max": 1,
    "distillation_coef": 0, "top_k": 0, "gradient_accumulation_steps": 1, "rlsd_contrast_hints": 0,
    "rlcsd_threshold": 0, "max_tool_calling_iterations": 0, "max_tool_response_length": 1,
}


def make_config(options):
    """TrainConfig from a dict; an unknown option is an error that names the nearest known one."""
    known = [f.name for f in dataclasses.fields(TrainConfig)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; see `rlsd train --help`."
            raise UserError(f"Unknown option {name!r}{hint}")
    return TrainConfig(**options)
