"""RLSDTrainer against TRL: GRPOTrainer at lambda 0, hook A in plain PyTorch above it."""

import pytest
import torch
import transformers

pytest.importorskip("trl", reason="the TRL integration needs trl: pip install '.[trl]'")

from trl import GRPOTrainer  # noqa: E402
from trl_runs import OFF, PlainHookA, differences, make, run  # noqa: E402

from rlsd.integrations.trl import RLSDTrainer  # noqa: E402

LOSS_TYPES = ["grpo", "bnpo", "dapo", "dr_grpo"]
ACCUMULATION = {
    "whole": {},
    "accumulated": {"gradient_accumulation_steps": 3},
    # Rollouts of 4 micro-batches for 2 optimizer steps, read twice: old log-probs, ratios off 1.
    # The third step is the first of the second reading.
    "reused": {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2,
               "max_steps": 3},
}
MASKS = {"unmasked": {}, "truncated-masked": {"mask_truncated_completions": True}}


def assert_parity(folder, reference, *, loss=2e-6, gradient=2e-5, **options):
    """Same samples, micro-batch losses and gradients; returns our trainer."""
    _, want = run(reference, folder, **options)
    trainer, got = run(RLSDTrainer, folder, **options)
    loss_error, gradient_error = differences(got, want)
    assert loss_error < loss and gradient_error < gradient, (loss_error, gradient_error)
    return trainer


def history(trainer, name):
    return [record[name] for record in trainer.state.log_history if name in record]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("accumulation", ACCUMULATION)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_lambda_zero_is_grpo_trainer(folder, loss_type, accumulation, mask):
    options = {"loss_type": loss_type, **ACCUMULATION[accumulation], **MASKS[mask], **OFF}
    trainer = assert_parity(folder, GRPOTrainer, **options)
    assert trainer.obstacle is None and trainer.teacher is None
    if accumulation == "reused" and mask == "unmasked":  # masked, few tokens are left to clip
        assert max(history(trainer, "clip_ratio/region_mean")) > 0


@pytest.mark.parametrize("accumulation", ACCUMULATION)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_rlsd_is_hook_a_in_plain_pytorch(folder, loss_type, accumulation):
    options = {"loss_type": loss_type, **ACCUMULATION[accumulation]}
    trainer = assert_parity(folder, PlainHookA, rlsd_lambda_decay_steps=5, **options)
    assert min(history(trainer, "rlsd/clip_low_frac")) > 0


RLSD_OPTIONS = {
    "live": {"teacher_model_kind": "live"},
    "base": {"teacher_model_kind": "base"},
    "snapshot-2": {"teacher_sync_steps": 2},
    "ema": {"teacher_model_kind": "ema", "teacher_ema_rate": 0.3},
    "old-log-probs": {"rlsd_delta_source": "old_log_probs"},
    "negative-only": {"rlsd_negative_only": True},
    "full-weight": {"rlsd_lambda": 1.0, "rlsd_reweight_clip_range": 1.0},
    "masked": {"mask_truncated_completions": True},
    "temperature": {"temperature": 0.7},
    "dual-clip": {"delta": 1.1, "epsilon_high": 0.05},
    "kl": {"beta": 0.3, "use_bias_correction_kl": False},
}


@pytest.mark.parametrize("options", RLSD_OPTIONS.values(), ids=RLSD_OPTIONS)
def test_options_are_hook_a_in_plain_pytorch(folder, options):
    # The fifth step is the first of the second rollout.
    options = {**ACCUMULATION["reused"], "max_steps": 5, **options}
    trainer = assert_parity(folder, PlainHookA, **options)
    assert trainer.obstacle is None
    if "delta" in options:
        assert max(history(trainer, "clip_ratio/dual_mean")) > 0
    if "beta" in options:
        assert max(history(trainer, "kl")) > 0


# What hook B leaves to TRL's own loss, with the reason that is announced.
FALLBACKS = {
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, "loss_type='cispo'"),
    "sapo": ({"loss_type": "sapo"}, "loss_type='sapo'"),
    "sequence": ({"importance_sampling_level": "sequence", "loss_type": "grpo"},
                 "importance_sampling_level"),
    "delta": ({"delta": 1.1, "epsilon_high": 0.28}, "delta=1.1"),
    "kl": ({"beta": 0.3}, "use_bias_correction_kl"),
    "quantile": ({"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
    "entropy": ({"entropy_coef": 0.1}, "entropy bonus"),
    "off-policy": ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold"),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_fallback_is_hook_a_and_is_announced(folder, case, caplog):
    options, reason = FALLBACKS[case]
    trainer = assert_parity(folder, PlainHookA, **ACCUMULATION["reused"], **options)
    (said,) = [r.getMessage() for r in caplog.records if "re-weighted advantages" in r.message]
    assert reason in said and reason in trainer.obstacle
    assert history(trainer, "rlsd/delta_mean") and history(trainer, "rlsd/weight_mean_pos")


def tiny(name, **config):
    """A tiny model of another architecture over the same vocabulary, sharpened."""
    torch.manual_seed(5)
    sizes = {
        "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4, "intermediate_size": 32, "max_position_embeddings": 128,
        "pad_token_id": 0, "eos_token_id": [1, *range(8, 20)], "bos_token_id": None,
    }
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**{**sizes, **config})
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p *= 5
            elif "lm_head" in str(p.shape):
                p.normal_()
    return model


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 4,
       "router_aux_loss_coef": 0.5, "decoder_sparse_step": 1}
MODELS = {
    "softcap": lambda: tiny("Gemma2", head_dim=4, final_logit_softcapping=2.0),
    "scale": lambda: tiny("Cohere", logit_scale=0.3),
    "inverse-scale": lambda: tiny("Granite", logits_scaling=2.0),
    "bias": lambda: tiny("Phi"),
    "untied": lambda: tiny("Qwen3", head_dim=4, tie_word_embeddings=False),
    "moe": lambda: tiny("Qwen3Moe", **MOE),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "reference", [pytest.param(GRPOTrainer, marks=pytest.mark.slow), PlainHookA],
    ids=["grpo", "rlsd"],
)
def test_heads(folder, name, reference):
    model = MODELS[name]()
    if name == "bias":
        torch.nn.init.normal_(model.lm_head.bias)
    options = {"gradient_accumulation_steps": 2, **(OFF if reference is GRPOTrainer else {})}
    trainer = assert_parity(folder, reference, model=model, **options)
    assert trainer.obstacle is None
    assert bool(history(trainer, "aux_loss")) == (name == "moe")


def test_a_head_that_cannot_be_reproduced_goes_to_trl(folder):
    model = tiny("Qwen3", head_dim=4)
    model.lm_head.register_forward_hook(lambda layer, inputs, logits: logits + logits.mean())
    trainer, _ = make(RLSDTrainer, folder, model=model)
    assert "computes something beyond" in trainer.obstacle


@pytest.mark.parametrize("reference", [GRPOTrainer, PlainHookA], ids=["grpo", "rlsd"])
def test_checkpointed_activations(folder, reference):
    options = OFF if reference is GRPOTrainer else {}
    assert_parity(folder, reference, gradient_checkpointing=True, **options)


def test_bf16_autocast(folder):
    """TRL rounds logits to bf16, the fused loss does not: equal to bf16's precision."""
    assert_parity(folder, GRPOTrainer, bf16=True, loss=2e-2, gradient=5e-2, max_steps=1, **OFF)


def test_fp32_head_of_a_bf16_model(folder):
    model = tiny("Qwen3", head_dim=4, tie_word_embeddings=False).bfloat16()
    assert_parity(
        folder, GRPOTrainer, model=model, cast_lm_head_to_fp32=True, loss=1e-5, gradient=1e-2,
        max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, **OFF,
    )  # the loss of whole groups would be 0


def inject(extra):
    """A trainer class whose rollouts carry more tensors, made by extra(output)."""
    def decorate(cls):
        class Injected(cls):
            def _generate_and_score_completions(self, inputs):
                output = super()._generate_and_score_completions(inputs)
                return {**output, **extra(self, output)}
        return Injected
    return decorate


@pytest.mark.parametrize("mode", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.3], ids=["no-kl", "kl"])
def test_vllm_importance_sampling_ratio(folder, mode, beta):
    """The correction as vLLM mode hands it over, without a vLLM to sample with."""
    def ratios(trainer, output):
        trainer.use_vllm = True  # only now: it would generate with vLLM
        shape = output["completion_ids"].shape
        shape = shape if mode == "token" else (shape[0], 1)
        ratio = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(0))
        return {"importance_sampling_ratio": torch.where(ratio < 0.4, 0, ratio)}

    results = []
    for cls in (GRPOTrainer, RLSDTrainer):
        trainer, recorder = make(
            inject(ratios)(cls), folder, max_steps=1, gradient_accumulation_steps=2, beta=beta,
            use_bias_correction_kl=False, **OFF,
        )
        trainer.train()
        results.append(recorder)
    loss, gradient = differences(results[1], results[0])
    assert trainer.obstacle is None and loss < 2e-6 and gradient < 2e-5


def test_tool_mask(folder):
    def tools(trainer, output):
        mask = torch.ones_like(output["completion_ids"])
        mask[:, 1] = 0  # as if the second token were a tool's
        return {"tool_mask": mask, "num_items_in_batch": (mask * output["completion_mask"]).sum()}

    results = []
    for cls in (GRPOTrainer, RLSDTrainer):
        trainer, recorder = make(inject(tools)(cls), folder, max_steps=1, **OFF)
        trainer.train()
        results.append(recorder)
    loss, gradient = differences(results[1], results[0])
    assert loss < 2e-6 and gradient < 2e-5
