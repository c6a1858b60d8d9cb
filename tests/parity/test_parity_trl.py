"""RLSDTrainer against TRL: GRPOTrainer at lambda 0, hook A in plain PyTorch above it."""

import pytest
import torch
import transformers
from peft import PrefixTuningConfig, PromptTuningConfig
from vision import load_processor, picture, save_qwen3_vl

trl = pytest.importorskip("trl", reason="the TRL integration needs trl: pip install '.[trl]'")

from trl import GRPOTrainer  # noqa: E402
from trl_runs import (  # noqa: E402
    ACCUMULATION,
    HEAD_OF_TRL,
    MOE,
    OFF,
    PlainHookA,
    differences,
    make,
    run,
    tiny,
)

from rlsd.integrations.trl import RLSDTrainer  # noqa: E402

LOSS_TYPES = ["grpo", "bnpo", "dapo", "dr_grpo"]
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


# Where the loss is TRL's own formula, with the reason that is announced.
FORMULAS = {
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, "loss_type='cispo'"),
    "sapo": ({"loss_type": "sapo"}, "loss_type='sapo'"),
    "vespo": ({"loss_type": "vespo"}, "loss_type='vespo'"),
    "luspo": ({"loss_type": "luspo", "importance_sampling_level": "sequence"},
              "loss_type='luspo'"),
    "luspo-token": ({"loss_type": "luspo"}, "loss_type='luspo'"),
    "sequence": ({"importance_sampling_level": "sequence", "loss_type": "grpo"},
                 "importance_sampling_level"),
    "sequence-dapo": ({"importance_sampling_level": "sequence"}, "importance_sampling_level"),
    "delta": ({"delta": 1.1, "epsilon_high": 0.28}, "delta=1.1"),
    "kl": ({"beta": 0.3}, "use_bias_correction_kl"),
    # Of the first tokens of a group, whose context is one, several tie with this quantile.
    "quantile": ({"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
    "entropy": ({"entropy_coef": 0.1}, "entropy bonus"),
    "adaptive-entropy": ({"use_adaptive_entropy": True, "entropy_coef": 0.1}, "entropy bonus"),
    "entropy-quantile": ({"entropy_coef": 0.1, "top_entropy_quantile": 0.4}, "entropy"),
    "off-policy": ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold"),
}


def forbid(*args):
    raise AssertionError("TRL's own head ran")


@pytest.fixture
def fused_only(monkeypatch):
    """Call it: from then on no pass may go through TRL's own head."""
    if HEAD_OF_TRL:
        function = trl.trainer.utils._ChunkedLogProbFunction
        return lambda: monkeypatch.setattr(function, "apply", forbid)
    return lambda: None


@pytest.mark.parametrize("case", FORMULAS)
@pytest.mark.parametrize(
    "reference", [pytest.param(GRPOTrainer, marks=pytest.mark.slow), PlainHookA],
    ids=["grpo", "rlsd"],
)
def test_trls_formula_over_the_fused_head(folder, case, reference, caplog, fused_only):
    options, reason = FORMULAS[case]
    options = {**ACCUMULATION["reused"], **options, **(OFF if reference is GRPOTrainer else {})}
    _, want = run(reference, folder, **options)
    fused_only()
    caplog.set_level("INFO", "rlsd.integrations.trl")
    trainer, got = run(RLSDTrainer, folder, **options)
    loss, gradient = differences(got, want)
    assert loss < 2e-6 and gradient < 2e-5, (loss, gradient)
    (said,) = [r for r in caplog.records if "The loss is TRL's formula" in r.message]
    assert reason in said.getMessage() and reason in trainer.obstacle
    assert said.levelname == ("INFO" if HEAD_OF_TRL else "WARNING")
    if reference is PlainHookA:
        assert history(trainer, "rlsd/delta_mean") and history(trainer, "rlsd/weight_mean_pos")


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


@pytest.mark.skipif(not HEAD_OF_TRL, reason="TRL 1.14 makes the logits of old log-probs itself")
@pytest.mark.parametrize("options", [{}, {"loss_type": "sapo"}], ids=["one-pass", "formula"])
def test_equal_weights_have_ratio_one_in_bf16(folder, options):
    """TRL's head rounds logits to bf16: a ratio of its old log-probs to ours would be noise."""
    options = {**ACCUMULATION["reused"], "max_steps": 1, "bf16": True, "beta": 0.1, **options}
    trainer, _ = run(RLSDTrainer, folder, use_bias_correction_kl=False, **options)
    assert abs(history(trainer, "policy_kl")[0]) < 1e-5 and history(trainer, "kl")[0] < 1e-5


@pytest.mark.parametrize("loss_type", ["dapo", "sapo"])
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_prompt_learning(folder, kind, loss_type, fused_only):
    """Virtual tokens lengthen the sequence, or the cache before it."""
    adapter = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    options = {"more": {"peft_config": adapter}, "loss_type": loss_type, "num_iterations": 2, **OFF}
    _, want = run(GRPOTrainer, folder, **options)
    fused_only()
    trainer, got = run(RLSDTrainer, folder, **options)
    loss, gradient = differences(got, want)
    assert loss < 2e-6 and gradient < 2e-5, (loss, gradient)
    assert (trainer.obstacle is None) == (loss_type == "dapo")


@pytest.mark.parametrize("options", [
    {}, {"loss_type": "sapo"}, {**ACCUMULATION["reused"], "beta": 0.1},
], ids=["one-pass", "formula", "reused"])
def test_images(folder, tmp_path, options, fused_only):
    """A tiny Qwen3-VL; without the picture, or at the wrong position, the loss is another."""
    save_qwen3_vl(tmp_path)
    processor = load_processor(tmp_path)
    processor.tokenizer.padding_side = "left"
    sizes = [(16, 24), (32, 16), (24, 32), (16, 16)]
    data = [{"prompt": [{"role": "user", "content": f"w{i} w2"[i % 2 * 3 :]}],
             "images": [picture(i, *size)]} for i, size in enumerate(2 * sizes)]
    options = {"data": data, "more": {"processing_class": processor}, "num_iterations": 2,
               "generation_kwargs": {"suppress_tokens": list(range(42, 64))}, **options, **OFF}
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path)
    _, want = run(GRPOTrainer, folder, model=model, **options)
    fused_only()
    trainer, got = run(RLSDTrainer, folder, model=model, **options)
    loss, gradient = differences(got, want)
    assert loss < 2e-6 and gradient < 2e-5, (loss, gradient)
    assert (trainer.obstacle is None) == (not {"beta", "loss_type"} & options.keys())


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


@pytest.mark.parametrize("ratio", [None, "token", "sequence"])
@pytest.mark.parametrize("reference", [GRPOTrainer, PlainHookA], ids=["grpo", "rlsd"])
def test_advantages_of_tokens(folder, reference, ratio):
    """A subclass may make TRL's (B,) advantages (B, T), with A = 0 at some tokens."""
    def extra(trainer, output):
        b, t = output["completion_ids"].shape
        draw = torch.rand(3, b, t, generator=torch.Generator().manual_seed(0))
        more = {"advantages": output["advantages"][:, None] * draw[0] * (draw[1] < 0.7)}
        if ratio:
            trainer.use_vllm = True  # only now: it would generate with vLLM
            more["importance_sampling_ratio"] = draw[2] if ratio == "token" else draw[2][:, :1]
        return more

    results = []
    for cls in (reference, RLSDTrainer):
        options = OFF if reference is GRPOTrainer else {}
        trainer, recorder = make(inject(extra)(cls), folder, max_steps=1, **options)
        trainer.train()
        results.append(recorder)
    loss, gradient = differences(results[1], results[0])
    assert loss < 2e-6 and gradient < 2e-5, (loss, gradient)


@pytest.mark.parametrize("options", [
    {}, {"loss_type": "sapo"}, {"entropy_coef": 0.5},
], ids=["one-pass", "formula", "entropy"])
def test_gradient_tolerance(folder, options):
    """The loss keeps every bit, and the gradient moves, by no more than the tolerance at logits."""
    if options and not HEAD_OF_TRL:
        pytest.skip("the formula runs over TRL 1.14's own logits")
    tolerance = 0.3
    runs = [run(RLSDTrainer, folder, max_steps=1, gradient_tolerance=x, **options)[1]
            for x in (0.0, tolerance)]
    loss, gradient = differences(runs[1], runs[0])
    assert loss == 0 and 1e-3 < gradient < tolerance, (loss, gradient)


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
