import dataclasses
import math
import os

import pytest

from rlsd import TrainConfig, UserError, load_yaml, make_config
from rlsd.config import DEFAULT_PRIVILEGED_TEMPLATE, LR_SCHEDULERS, TEACHER_MODEL_KINDS
from rlsd.tasks.data import rows_of_step

# option -> values that must be refused
BAD = {
    "objective": ["ppo", "", "RLSD", None],
    "teacher_model_kind": ["frozen", "EMA"],
    "scale_rewards": ["std", True],
    "loss_type": ["sum", "dr-grpo"],
    "lr_scheduler_type": ["step"],
    "impl": ["gpu"],
    "report_to": ["mlflow", ["wandb", "none"], ["none", "none"], True],
    "num_generations": [1, 0, 2.0, "8", True, None],
    "generation_batch_size": [12, 1, -8],
    "max_steps": [0, 1.5, "ten", [1]],
    "num_train_epochs": [0, -1, math.inf, math.nan, "some"],
    "gradient_accumulation_steps": [0, 1.5],
    "push_to_hub": ["yes"],
    "seed": [-1],
    "eval_size": [-1],
    "max_prompt_length": [0, "long"],
    "max_teacher_prompt_length": [0],
    "rollout_batch_size": [0],
    "max_completion_length": [0],
    "per_device_train_batch_size": [0],
    "num_iterations": [0],
    "max_tokens_per_micro_batch": [0, 1.5],
    "router_aux_loss_coef": [-0.1, math.nan],
    "lora_r": [0],
    "lora_alpha": [0],
    "lora_dropout": [0.05],
    "lora_target_modules": [[None], {"q_proj": 1}],
    "bf16": [1],
    "teacher_sync_steps": [0],
    "teacher_model_name_or_path": ["folder", 1.5, True],
    "distillation_divergence": ["kl", "JSD"],
    "distillation_alpha": [0, 1, -0.5, math.nan],
    "distillation_coef": [-1, math.nan],
    "success_reward_threshold": ["high", math.nan],
    "hint_source": ["rollouts", None],
    "rlsd_contrast_hints": [-1, 1.5, True],
    "rlcsd_beta": [0, -1, math.inf, math.nan],
    "rlcsd_tau": [0, -0.1, math.inf],
    "rlcsd_clip": [0, "wide"],
    "rlcsd_threshold": [-0.1, math.nan],
    "rlcsd_eta": [0, -1, None],
    "leak_phrases": ["yes"],
    "logging_steps": [0],
    "save_total_limit": [0],
    "rlsd_lambda_warmup_steps": [-1],
    "rlsd_lambda_decay_steps": [-1],
    "weight_decay": [-0.1, math.nan],
    "teacher_ema_rate": [0.0, 1.01, math.nan],
    "learning_rate": [0.0, -1e-6, "fast", True, None, math.nan, math.inf],
    "max_grad_norm": [0, -1, math.nan],
    "adam_beta1": [1.0, -0.1, math.nan],
    "adam_beta2": [1.0, -0.1],
    "reward_funcs": [[], [["exact_match"]], {"exact_match": 1}, [None]],
    "reward_timeout": [0, -1, math.nan, math.inf, "soon", None],
    "verify_timeout": [0, -1, math.inf],
    "format_pattern": ["think_anwser", "(", ""],
    "soft_punish_cache": [0, 257, 1.5],
    "code_memory_mb": [0, 15],
    "allow_unsandboxed_code": ["yes", 1],
    "num_generations_eval": [0, 1.5],
    "eval_split_size": [0, -1, 1.5, math.nan],
    "reward_weights": [[1.0, 2.0], ["heavy"], [math.nan]],
    "leak_markers": [[True], ["REF", " "]],
    "output_dir": [None, True, ["runs"]],
    "allow_missing_privileged_context": ["yes", 1, None],
    "rlsd_negative_only": [0],
    "rlsd_lambda": [1.5, -0.1, "half"],
    "rlsd_reweight_clip_range": [1.5],
    "rlsd_delta_source": ["teacher"],
    "epsilon": [-0.1],
    "delta": [1.0],
    "beta": [-1],
    "temperature": [0, math.nan],
    "top_p": [0, 1.01, -0.1, math.nan],
    "top_k": [-1, 2.5],
    "min_p": [-0.1, 1.01, math.nan],
    "repetition_penalty": [0, -1, math.inf, math.nan],
    "use_vllm": ["yes"],
    "vllm_mode": ["colocated"],
    "vllm_server_port": [0, "http"],
    "vllm_gpu_memory_utilization": [0, 1.1],
    "vllm_importance_sampling_clip_max": [0.9, None, math.nan],
    "use_transformers_continuous_batching": ["maybe"],
    "transformers_continuous_batching_config": [["num_blocks"], None],
    "chat_template_kwargs": [["enable_thinking"], None],
    "privileged_template": ["{prompt}", "{privileged_context}", "{prompt} {prompt} "
                            "{privileged_context}", ""],
}


def case_id(value):
    return value if isinstance(value, str) and value else repr(value)


def one_sentence(error, *parts):
    """The message, after checking that it is one sentence with each part."""
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message and ". " not in message, message
    for part in parts:
        assert str(part) in message, message
    return message


@pytest.mark.parametrize(
    "name, value", [(n, v) for n, vs in BAD.items() for v in vs], ids=case_id
)
def test_a_bad_value_is_one_sentence_naming_the_option(name, value):
    with pytest.raises(UserError) as error:
        TrainConfig(**{name: value})
    one_sentence(error, name)


@pytest.mark.parametrize("name, allowed", [
    ("objective", ("rlsd", "grpo", "opsd", "grpo+opsd", "sdpo", "sft")),
    ("teacher_model_kind", TEACHER_MODEL_KINDS),
    ("lr_scheduler_type", LR_SCHEDULERS), ("loss_type", ("grpo", "bnpo", "dapo", "dr_grpo")),
])
def test_choices_are_kept_and_listed_in_the_error(name, allowed):
    for value in allowed:
        assert getattr(TrainConfig(**{name: value}), name) == value
    with pytest.raises(UserError) as error:
        TrainConfig(**{name: "nonsense"})
    one_sentence(error, *allowed, "'nonsense'")


def test_defaults_are_the_papers_and_valid():
    config = TrainConfig()
    assert (config.num_generations, config.temperature, config.learning_rate) == (8, 1.0, 1e-6)
    assert (config.teacher_model_kind, config.teacher_sync_steps) == ("snapshot", 10)
    assert (config.rlsd_lambda_warmup_steps, config.rlsd_lambda_decay_steps) == (0, 50)
    assert config.privileged_template == DEFAULT_PRIVILEGED_TEMPLATE
    loss = config.loss_config()
    assert (loss.rlsd_lambda, loss.rlsd_reweight_clip_range) == (0.5, 0.2)
    assert (loss.epsilon, loss.epsilon_high, loss.delta, loss.beta) == (0.2, 0.28, 3.0, 0.0)


def test_mutable_defaults_are_not_shared():
    TrainConfig().reward_funcs.append("other")
    assert TrainConfig().reward_funcs == ["exact_match"]


@pytest.mark.parametrize("given, kept", [
    ({"learning_rate": "1e-6"}, 1e-6),  # YAML 1.1 reads 1e-6 as a text
    ({"learning_rate": 1}, 1.0),
    ({"delta": None}, None),
    ({"max_prompt_length": None}, None),
    ({"max_prompt_length": 7}, 7),
    ({"reward_weights": None}, None),
    ({"reward_weights": 2}, [2.0]),
    ({"reward_funcs": "math_verify"}, ["math_verify"]),
    ({"leak_markers": ("REF", 5)}, ["REF", "5"]),
    ({"output_dir": 5}, "5"),
    ({"output_dir": "~/runs"}, os.path.expanduser("~/runs")),
    ({"seed": 3}, 3),
    ({"rlsd_lambda": 0}, 0.0),
], ids=str)
def test_coercion(given, kept):
    (name,) = given
    value = getattr(TrainConfig(**given), name)
    assert value == kept and type(value) is type(kept)


@pytest.mark.parametrize("given, want", [
    ({}, None), ({"use_vllm": True}, 3.0),  # TRL's default corrects what vLLM sampled, alone
    ({"vllm_importance_sampling_correction": True}, 3.0),
    ({"use_vllm": True, "vllm_importance_sampling_correction": False}, None),
    ({"use_vllm": True, "vllm_importance_sampling_clip_max": 2}, 2.0),
    ({"top_p": 0.9}, 3.0), ({"top_k": 50}, 3.0), ({"min_p": 0.1}, 3.0),
    ({"repetition_penalty": 1.1}, 3.0), ({"repetition_penalty": 0.9}, 3.0),
    ({"top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "temperature": 0.5}, None),
    ({"top_p": 0.9, "vllm_importance_sampling_correction": False}, None),
])
def test_a_sampler_that_is_another_policy_is_corrected_by_default(given, want):
    assert TrainConfig(**given).sampling_clip_max() == want


@pytest.mark.parametrize("given, count, want", [
    ({}, 10, 200), ({"max_steps": 7}, 10, 7), ({"num_train_epochs": 2}, 100, 25),
    ({"num_train_epochs": 1}, 101, 13),  # 8 questions a step: the last asks three anew
    ({"num_train_epochs": 0.5}, 8, 1), ({"num_train_epochs": 0.01}, 8, 1),
    ({"num_train_epochs": 3, "max_steps": 7}, 100, 7),  # as in TRL
    ({"num_train_epochs": 1, "generation_batch_size": 16}, 10, 5),
])
def test_steps_of_a_run(given, count, want):
    config = TrainConfig(**given)
    assert config.steps_over(count) == want
    assert dataclasses.replace(config, seed=1).steps_over(count) == want


@pytest.mark.parametrize("given, processes, want", [
    ({}, 1, 64), ({"gradient_accumulation_steps": 4}, 1, 32),
    ({"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}, 3, 24),
    ({"gradient_accumulation_steps": 8, "generation_batch_size": 64}, 1, 64),
    ({"generation_batch_size": 16}, 2, 16),
])
def test_accumulation_steps_make_the_rollout(given, processes, want, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config = TrainConfig(**given)
    assert config.generation_batch_size == want
    assert dataclasses.replace(config, seed=1).generation_batch_size == want


def test_accumulation_steps_that_split_a_rollout_are_refused():
    with pytest.raises(UserError) as error:
        TrainConfig(gradient_accumulation_steps=4, generation_batch_size=64)
    one_sentence(error, "generation_batch_size (64)", "(8) x 1 process x", "steps (4)", "to none")


def test_two_samplers_are_one_too_many():
    with pytest.raises(UserError) as error:
        TrainConfig(use_vllm=True, use_transformers_continuous_batching=True)
    one_sentence(error, "use_vllm", "use_transformers_continuous_batching")


def test_groups_must_be_whole():
    assert TrainConfig(generation_batch_size=24, num_generations=6).generation_batch_size == 24
    with pytest.raises(UserError) as error:
        TrainConfig(generation_batch_size=64, num_generations=6)
    one_sentence(error, "generation_batch_size (64)", "num_generations (6)")


def test_reward_weights_need_one_entry_per_function():
    funcs = ["exact_match", "math_verify"]
    config = TrainConfig(reward_funcs=funcs, reward_weights=[1, 0.5])
    assert config.reward_weights == [1.0, 0.5]
    with pytest.raises(UserError) as error:
        TrainConfig(reward_funcs=funcs, reward_weights=[1.0])
    one_sentence(error, "reward_weights has 1", "reward_funcs has 2")


@pytest.mark.parametrize("missing", ["{prompt}", "{privileged_context}"])
def test_template_error_names_the_missing_placeholder(missing):
    with pytest.raises(UserError) as error:
        TrainConfig(privileged_template=DEFAULT_PRIVILEGED_TEMPLATE.replace(missing, ""))
    one_sentence(error, "privileged_template", missing)


def test_objective_grpo_is_lambda_zero_and_nothing_else():
    options = {"rlsd_lambda": 0.7, "epsilon": 0.1, "delta": None, "temperature": 0.9}
    rlsd = TrainConfig(objective="rlsd", **options).loss_config()
    grpo = TrainConfig(objective="grpo", **options).loss_config()
    assert rlsd.rlsd_lambda == 0.7 and grpo.rlsd_lambda == 0.0
    assert vars(rlsd) | {"rlsd_lambda": 0} == vars(grpo) | {"rlsd_lambda": 0}
    assert (grpo.epsilon, grpo.delta, grpo.temperature) == (0.1, None, 0.9)


@pytest.mark.parametrize("typo, near", [
    ("rlsd_lamda", "rlsd_lambda"), ("learning_rat", "learning_rate"),
    ("num_generation", "num_generations"),
])
def test_unknown_option_names_the_near_one(typo, near):
    with pytest.raises(UserError) as error:
        make_config({typo: 1})
    assert str(error.value) == f"Unknown option {typo!r}; did you mean {near}?"


@pytest.mark.parametrize("name", ["xyzzy", 3])
def test_unknown_option_without_a_near_one_points_to_the_help(name):
    with pytest.raises(UserError) as error:
        make_config({name: 1})
    one_sentence(error, repr(name), "--help")


def test_make_config_keeps_the_options():
    assert make_config({"max_steps": 3, "objective": "grpo"}) == TrainConfig(
        max_steps=3, objective="grpo"
    )


def test_yaml_round_trip(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-6\ndelta: null\nreward_funcs: [exact_match]\nseed: 4\n")
    config = make_config(load_yaml(path))
    assert (config.learning_rate, config.delta, config.seed) == (1e-6, None, 4)


def test_empty_yaml_is_no_option(tmp_path):
    (tmp_path / "x.yaml").write_text("# nothing yet\n")
    assert load_yaml(tmp_path / "x.yaml") == {}


@pytest.mark.parametrize("content, parts", [
    (b"seed: 1\nobjective: [rlsd\nmax_steps: 3\n", ["not valid YAML", "line 3"]),
    (b"\xff\xfe\x00", ["not valid YAML"]),
    (b"seed: !!python/object:os.system {}\n", ["not valid YAML", "line 1"]),
    (b"- seed\n- 3\n", ["option: value"]),
    (b"seed\n", ["option: value"]),
], ids=["syntax", "not-utf8", "python-object", "list", "scalar"])
def test_bad_yaml_names_the_file(tmp_path, content, parts):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_yaml(path)
    one_sentence(error, path, *parts)


def test_missing_yaml_names_the_file(tmp_path):
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(UserError) as error:
            load_yaml(path)
        one_sentence(error, path)


@pytest.mark.parametrize("name, value, most", [
    ("seed", 2**32, 2**32 - 1), ("seed", 2**70, 2**32 - 1), ("dataset_seed", 10**5000, 2**32 - 1),
    ("max_steps", 2**63, 2**63 - 1), ("generation_batch_size", 10**5000, 2**63 - 1),
], ids=["seed", "huge-seed", "dataset-seed", "steps", "batch"])
def test_numbers_beyond_the_machine_s_are_one_sentence(name, value, most):
    with pytest.raises(UserError) as error:
        make_config({name: value})
    assert str(error.value).startswith(f"{name} must be at most {most}, but got ")
    one_sentence(error)
    with pytest.raises(UserError, match=f"^{name} must be at least "):
        make_config({name: -value})


@pytest.mark.parametrize("value", ["1e400", math.inf, 1.5])
def test_a_split_that_is_no_number_of_rows(value):
    with pytest.raises(UserError, match="^eval_split_size must be a whole number of rows or a sh"):
        make_config({"eval_split_size": value})


def test_a_null_byte_is_one_sentence():
    for options in ({"output_dir": "a\0b"}, {"reward_funcs": ["a\0"]}):
        with pytest.raises(UserError, match=f"^{next(iter(options))} must not contain a null byte"):
            make_config(options)


def test_the_largest_seed_reaches_every_generator():
    config = make_config({"seed": 2**32 - 1})
    assert len(rows_of_step([{}] * 5, 3, 10**6, config.seed)) == 3
    assert 2**32 * 1_000_003 + 10**6 < 2**63  # the largest that torch is seeded with


def test_a_wrong_value_of_any_length_stays_one_line():
    for value in ("x" * 5000, [10**5000], {"a": "b\nc" * 900}):
        with pytest.raises(UserError) as error:
            make_config({"learning_rate": value})
        assert len(str(error.value)) < 200 and "\n" not in str(error.value)


@pytest.mark.parametrize("text", [
    "[" * 5000, f"seed: {'9' * 5000}", "date: 2024-13-45", "a: !!int x", "a: !!python/none",
], ids=lambda text: text[:12])
def test_yaml_that_python_cannot_hold_is_one_sentence(text, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^The config {path} is not valid YAML"):
        load_yaml(path)
