"""A group's prompt once in RLSDTrainer: exact against whole rows, or refused in a sentence."""

import pytest
import torch
import transformers

pytest.importorskip("trl", reason="the TRL integration needs trl: pip install '.[trl]'")

from families import architecture  # noqa: E402
from peft import LoraConfig, PromptTuningConfig  # noqa: E402
from test_integrations_trl import one_sentence  # noqa: E402
from trl_runs import (  # noqa: E402
    ACCUMULATION,
    DATA,
    HEAD_OF_TRL,
    MOE,
    OFF,
    differences,
    make,
    run,
    tiny,
)

from rlsd.config import UserError  # noqa: E402
from rlsd.integrations.trl import RLSDTrainer  # noqa: E402
from rlsd.integrations.trl_sharing import shared_prompts  # noqa: E402

LORA = LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"])
CASES = {
    "plain": {},
    "lora": {"more": {"peft_config": LORA}},
    "checkpoints": {"gradient_checkpointing": True},
    "lora-checkpoints": {"more": {"peft_config": LORA}, "gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True,
                  "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "reused": {**ACCUMULATION["reused"], "beta": 0.1, "use_bias_correction_kl": False},
    "masked": {"mask_truncated_completions": True, "loss_type": "grpo"},
    "live": {"teacher_model_kind": "live", "num_iterations": 2},
    "padded": {"pad_to_multiple_of": 8},
}


def seen_by(trainer):
    """Tokens of each pass of the trunk from now on."""
    shapes = []
    trainer.model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: shapes.append(args[0].numel())
    )
    return shapes


def compared(folder, **options):
    """Runs with "true" and "false": the first trainer and both's tokens, after the comparison."""
    found = []
    for share in ("true", "false"):
        trainer, recorder = make(RLSDTrainer, folder, share_prompts=share, **options)
        tokens = seen_by(trainer)
        trainer.train()
        found.append((trainer, recorder, sum(tokens)))
    (trainer, got, less), (_, want, more) = found
    loss, gradient = differences(got, want)
    assert loss < 1e-6 * max(1, *want.losses) and gradient < 1e-5, (loss, gradient)
    saved = sum(x.get("prompt_sharing/tokens_saved", 0) for x in trainer.state.log_history)
    assert saved > 0 and less < more
    return trainer


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_shared_prompts_are_exact(folder, options):
    trainer = compared(folder, rlsd_lambda_decay_steps=9, **options)
    assert trainer.obstacle is None and trainer.state.log_history[0]["rlsd/delta_std"] > 0


@pytest.mark.parametrize("family", ["llama3", "gemma3", "gemma2", "mixtral", "qwen3-moe", "phi"])
def test_families(folder, family):
    model = architecture(family)
    model.generation_config.eos_token_id = [1, *range(8, 20)]
    trainer = compared(folder, model=model, max_steps=1, gradient_checkpointing=True)
    logged = trainer.state.log_history[0]
    assert ("aux_loss" in logged) == (family in ("mixtral", "qwen3-moe"))


def test_experts_count_a_shared_prompt_for_each_row(folder):
    """The auxiliary loss is most of this gradient; a prompt counted once would change it."""
    trainer = compared(folder, model=tiny("Qwen3Moe", **{**MOE, "router_aux_loss_coef": 20.0}))
    assert trainer.state.log_history[0]["aux_loss"] > 0


def test_what_is_saved_is_what_the_passes_leave_out(folder):
    """Of prompts of one length, so that no padding counts."""
    data = [{"prompt": f"<q> {i} +{i} <a>", "solution": f"# {i}"} for i in range(6)]
    tokens, saved = {}, {}
    for share in ("true", "false"):
        trainer, _ = make(RLSDTrainer, folder, max_steps=1, share_prompts=share, data=data)
        passes = seen_by(trainer)
        trainer.train()
        tokens[share] = sum(passes)
        saved[share] = trainer.state.log_history[0].get("prompt_sharing/tokens_saved", 0)
    assert saved["true"] == tokens["false"] - tokens["true"] > 0 == saved["false"]


def test_checkpointed_layers_run_again_in_backward(folder):
    """As often as without sharing, in which each layer has two passes."""
    counts = {}
    for switch in (False, True):
        trainer, _ = make(RLSDTrainer, folder, max_steps=1, share_prompts="true",
                          gradient_checkpointing=switch, **OFF)
        calls = []
        layer = trainer.model.model.layers[0]
        layer.self_attn.register_forward_hook(
            lambda *_, calls=calls: calls.append(torch.is_grad_enabled())
        )
        trainer.train()
        assert "forward" not in vars(layer) and layer.gradient_checkpointing == switch
        counts[switch] = sum(calls)
    assert counts == {False: 2, True: 4}


def test_the_same_prompt_gives_delta_zero(folder):
    data = [{**row, "teacher_prompt": row["prompt"]} for row in DATA]
    trainer, _ = run(RLSDTrainer, folder, data=data, teacher_sync_steps=1, share_prompts="true")
    for record in trainer.state.log_history[:2]:
        assert abs(record["rlsd/delta_mean"]) < 1e-6 and record["rlsd/delta_std"] < 1e-5


@pytest.mark.skipif(not HEAD_OF_TRL, reason="TRL 1.14 computes old log-probs by itself")
@pytest.mark.parametrize("size", [2, 8])
def test_equal_weights_have_ratio_one_in_bf16(folder, size):
    """Old, reference and new log-probs come from passes of one layout, whatever repeats in them."""
    trainer, _ = run(
        RLSDTrainer, folder, share_prompts="true", use_bias_correction_kl=False, max_steps=1,
        bf16=True, beta=0.1, per_device_train_batch_size=size,
        gradient_accumulation_steps=8 // size, steps_per_generation=16 // size,
    )
    first = trainer.state.log_history[0]
    assert abs(first["policy_kl"]) < 1e-5 and first["kl"] < 1e-5


def gpt2():
    model = architecture("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def with_dropout():
    return tiny("Qwen3", head_dim=4, attention_dropout=0.1)


def lfm2():
    torch.manual_seed(0)
    return transformers.Lfm2ForCausalLM(transformers.Lfm2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64, pad_token_id=0,
        eos_token_id=1, bos_token_id=None, layer_types=["conv", "full_attention"],
    ))


OBSTACLES = {
    "rows": ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
             "per_device_train_batch_size is 1"),
    "formula": ({"loss_type": "sapo"}, "loss_type='sapo' has another formula"),
    "positions": ({"model": gpt2}, "GPT2LMHeadModel places tokens by their column"),
    "dropout": ({"model": with_dropout}, "dropout is on"),
    "convolutions": ({"model": lfm2}, "are of type conv too"),
    "virtual": ({"more": {"peft_config": PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3)}}, "virtual tokens"),
}


@pytest.mark.parametrize("options, words", OBSTACLES.values(), ids=OBSTACLES)
def test_where_rows_cannot_share(folder, options, words, caplog):
    options = {**options, **({"model": options["model"]()} if "model" in options else {})}
    caplog.set_level("INFO", "rlsd.integrations")
    trainer, _ = make(RLSDTrainer, folder, **options)
    (said,) = [x.getMessage() for x in caplog.records if "its prompt anew" in x.message]
    assert trainer.shared is None and words in said
    with pytest.raises(UserError, match="^share_prompts is true, but .*; set it to auto") as error:
        make(RLSDTrainer, folder, share_prompts="true", **options)
    one_sentence(error)
    assert words in str(error.value)
    caplog.clear()
    make(RLSDTrainer, folder, share_prompts="false", **options)
    assert not [x for x in caplog.records if "its prompt anew" in x.message]


def test_shards_cannot_share(folder):
    trainer, _ = make(RLSDTrainer, folder)
    trainer.is_fsdp_enabled, trainer.args.share_prompts = True, "true"
    with pytest.raises(UserError, match="share_prompts is true, but FSDP gathers") as error:
        shared_prompts(trainer, trainer.model, None)
    one_sentence(error)
