"""Every file of configs/ loads, explains each line, and claims no figure that is not computed."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from runs import make_trainer, quick  # noqa: F401

from rlsd.config import make_config
from rlsd.options import load_yaml
from rlsd.sampling.evaluation import interval
from rlsd.tasks.data import load_rows

ROOT = Path(__file__).parent.parent
PATHS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}
EVERY = pytest.mark.parametrize("name", PATHS)
SIZES = {  # config.json of each on the hub: hidden, layers, heads, MLP, tied embeddings
    "Qwen/Qwen3-0.6B": (1024, 28, 16, 3072, True), "Qwen/Qwen3-1.7B": (2048, 28, 16, 6144, True),
    "Qwen/Qwen3-4B": (2560, 36, 32, 9728, True), "Qwen/Qwen3-8B": (4096, 36, 32, 12288, False),
}
SIZES["Qwen/Qwen3-VL-8B-Instruct"] = SIZES["Qwen/Qwen3-8B"]  # its language model
COLUMNS = {
    "openai/gsm8k": {"question": "2 + 2?", "answer": "2 and 2 are <<2+2=4>>4.\n#### 4"},
    "DigitalLearningGmbH/MATH-lighteval": {
        "problem": "$2 + 2$?", "level": "Level 1", "type": "Algebra",
        "solution": r"2 and 2 are $\boxed{4}$.",
    },
    "HuggingFaceH4/MATH-500": {
        "problem": "$2 + 2$?", "solution": r"2 and 2 are $\boxed{4}$.", "answer": "4",
        "subject": "Algebra", "level": 1, "unique_id": "x",
    },
    "hiyouga/geometry3k": {"images": [None], "problem": "<image>Find $x$.", "answer": "4"},
}


def options(name):
    return load_yaml(PATHS[name])


def text(name):
    """The file with its comment lines joined."""
    return re.sub(r"\n# +", " ", PATHS[name].read_text(encoding="utf-8"))


def comments(name):
    """{option: comment of its line}"""
    lines = PATHS[name].read_text(encoding="utf-8").splitlines()
    pairs = [re.fullmatch(r"(\w+): .*?(?:  # (.+))?", line) for line in lines]
    return {pair[1]: pair[2] for pair in pairs if pair}


@pytest.fixture(scope="module")
def language_model():
    """name -> Qwen3 of that size, without memory."""
    def build(name):
        hidden, layers, heads, mlp, tied = SIZES[name]
        with torch.device("meta"):
            return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
                vocab_size=151936, hidden_size=hidden, num_hidden_layers=layers, head_dim=128,
                num_attention_heads=heads, num_key_value_heads=8, intermediate_size=mlp,
                tie_word_embeddings=tied,
            ))

    return build


def test_every_size_of_the_issue_has_a_file():
    assert set(PATHS) == {
        "qwen3_0.6b_gsm8k", "qwen3_1.7b_gsm8k", "qwen3_4b_math", "qwen3_8b_math",
        "qwen3_8b_lora_24gb", "qwen3_vl_8b_paper", "qwen3_8b_multi_node",
    }


@EVERY
def test_it_loads_and_explains_every_line(name):
    given, said = options(name), comments(name)
    config = make_config(given)
    assert config.output_dir == f"runs/{name}" and f"--config configs/{name}.yaml" in text(name)
    assert list(said) == list(given)
    assert [option for option, comment in said.items() if not comment] == []
    longest = max(config.max_prompt_length, config.max_teacher_prompt_length)
    assert longest + config.max_completion_length <= 40960  # positions of Qwen3
    most = config.max_prompt_length + config.max_completion_length
    assert most <= config.max_tokens_per_micro_batch  # else one sequence passes the limit


@EVERY
def test_comments_state_what_the_options_give(name):
    config, said = make_config(options(name)), comments(name)
    groups = config.generation_batch_size // config.num_generations
    assert re.search(rf"\b{groups} questions\b", said["generation_batch_size"])
    low, high = (1 + sign * config.rlsd_reweight_clip_range for sign in (-1, 1))
    assert f"{low:g} to {high:g}" in said["rlsd_reweight_clip_range"]
    ends = interval([0.0, 1.0] * (config.eval_size // 2))
    points = re.search(r"up to (\d+) points wide", said["eval_size"])
    assert int(points[1]) == round(100 * (ends[1] - ends[0]))


def lora_parameters(model, rank):
    layers = {k: m for k, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return sum(rank * (m.in_features + m.out_features) for k, m in layers.items() if k != "lm_head")


@EVERY
def test_figures_of_memory_are_computed(name, language_model):
    config, said = make_config(options(name)), text(name)
    model = language_model(config.model_name_or_path)
    count = sum(p.numel() for p in model.parameters())
    if config.use_peft:
        states = 2 * count + 20 * lora_parameters(model, config.lora_r)
    else:
        states = 20 * count
    cached = 2 * 2 * model.config.num_hidden_layers * 8 * 128  # K and V of 8 heads, 2 bytes each
    assert config.bf16 and config.teacher_model_kind == "snapshot"
    allowed = {f"{states / 2**30:.1f} GiB", f"{cached // 1024} KiB"}
    for n, tokens, gib in re.findall(r"(\d+) sequences of (\d+) tokens take ([\d.]+ GiB)", said):
        assert int(n) == config.rollout_batch_size
        assert int(tokens) == config.max_prompt_length + config.max_completion_length
        assert gib == f"{int(n) * int(tokens) * cached / 2**30:.1f} GiB"
        allowed.add(gib)
    assert set(re.findall(r"[\d.]+ [KMG]iB", said)) == allowed


@pytest.mark.parametrize("changed, frozen", [
    ({"bf16": True}, 0), ({"bf16": True, "use_peft": True, "lora_r": 4}, 2),
], ids=["full", "lora"])
def test_a_trained_parameter_takes_twenty_bytes(tmp_path, changed, frozen):
    """The 20 and the 2 of the test before this, of the trainer's own tensors after an update."""
    trainer, grads = make_trainer(tmp_path, **changed), []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: grads.extend(p.grad.nbytes for p in trainer.weights.masters)
    )
    trainer.train_step(1)
    taken, trained = {}, sum(p.numel() for p in trainer.weights.masters)
    for p in [*trainer.model.parameters(), *trainer.weights.masters,
              *trainer.teacher.model.parameters()]:
        taken[id(p)] = p.nbytes  # under LoRA teacher and student are one model
    moments = sum(
        v.nbytes for state in trainer.optimizer.state.values() for v in state.values()
        if torch.is_tensor(v) and v.dim()
    )
    base = sum(p.numel() for n, p in trainer.model.named_parameters() if ".lora_" not in n)
    assert sum(taken.values()) + sum(grads) + moments == 20 * trained + frozen * base


def test_the_papers_setting():
    config = make_config(options("qwen3_vl_8b_paper"))
    assert config.model_name_or_path == "Qwen/Qwen3-VL-8B-Instruct"
    assert config.generation_batch_size == 256 * config.num_generations == 256 * 8
    assert (config.learning_rate, config.max_completion_length) == (1e-6, 4096)
    assert (config.teacher_sync_steps, config.rlsd_lambda_decay_steps) == (10, 50)
    assert (config.rlsd_lambda, config.rlsd_reweight_clip_range) == (0.5, 0.2)
    assert (config.epsilon, config.epsilon_high, config.beta) == (0.2, 0.28, 0.0)


@EVERY
def test_columns_of_its_datasets_are_read(name, monkeypatch):
    import datasets

    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config, split: [dict(COLUMNS[name])]
    )
    config = make_config(options(name))
    for spec in (config.train_dataset, config.eval_dataset):
        (row,) = load_rows(spec)
        assert row["solution"] == "4" and row["_as_chat"]
        worked = COLUMNS[spec.partition(":")[0].partition("@")[0]]
        assert row["privileged_context"] in worked.values()
    assert config.eval_dataset.endswith("@test")
