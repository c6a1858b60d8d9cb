"""Heads, LoRA, experts, masters, recomputation: each against the model's own outputs.

`python tests/policy/test_models.py` prints the table model x (full, LoRA) x (padded, packed).
"""

import copy
import math

import peft
import pytest
import torch
from families import (
    EXPERT_FAMILIES,
    FAMILIES,
    PAD,
    SHOWN,
    build,
    gradients,
    make_batch,
    naive_loss,
    sequences,
)
from torch.utils.flop_counter import FlopCounterMode

import rlsd.policy.models
from rlsd import TrainConfig, UserError
from rlsd.policy import checkpoint
from rlsd.policy.models import (
    STUDENT,
    TEACHER,
    Flops,
    MasterWeights,
    Policy,
    adapter_weights,
    add_lora,
    checkpoint_layers,
    head_of,
    layout_of,
    peak_flops,
    require_layout,
    router_of,
    train_lora,
    using_adapter,
)
from rlsd.policy.packing import Layout, completion_hidden
from rlsd.policy.teacher import Teacher
from rlsd.policy.update import memory_named, router_totals, student_terms, teacher_inputs
from rlsd_kernels import RLSDLossConfig

LAYOUTS = {"padded": Layout(PAD), "packed": Layout(PAD, padding_free=True)}
CONFIG, OPTIONS = RLSDLossConfig(), TrainConfig(impl="torch")


def with_lora(model, **options):
    """The model with an adapter whose B is far from 0, so that it matters."""
    add_lora(model, TrainConfig(use_peft=True, lora_r=4, lora_alpha=8, **options))
    with torch.no_grad():
        for name, p in adapter_weights(model, STUDENT).items():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    return model


def ours(model, teacher, batch, parts, layout, lam=0.5, router=None):
    """(loss, gradients) as the trainer forms them, summed over micro-batches."""
    model.zero_grad(set_to_none=True)
    policy, total, totals = Policy(model, head_of(model), layout, router), 0.0, None
    if router and len(parts) > 1:
        totals = router_totals(policy, batch, parts)
    for rows in parts:
        part = batch.select(rows)
        with teacher.scoring() as scorer:
            inputs = teacher_inputs(policy._replace(model=scorer), part, CONFIG)
        terms = student_terms(policy, part, inputs, lam, CONFIG, OPTIONS, totals=totals)
        loss = terms.out.loss + terms.aux_loss
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def differences(family, lora, layout):
    """(loss, gradient) differences from the naive loop, the latter over its norm."""
    model = build(family)
    if lora:
        model = with_lora(model)
        teacher = Teacher(model, "base")
    else:
        teacher = Teacher(model, "base")
        with torch.no_grad():  # the student has moved on
            for p in model.parameters():
                p.add_(0.01 * torch.randn(p.shape))
    batch = make_batch()
    loss, grads = ours(model, teacher, batch, [[0, 1, 2], [3, 4, 5]], LAYOUTS[layout])
    model.zero_grad(set_to_none=True)
    want = naive_loss(model, teacher, batch, 0.5)
    want.backward()
    wanted = gradients(model)
    assert grads.keys() == wanted.keys()
    assert all((".lora_" in name) == lora for name in grads)
    norm = math.sqrt(sum(g.norm().item() ** 2 for g in wanted.values()))
    assert norm > 1e-2
    error = math.sqrt(sum((grads[n] - g).norm().item() ** 2 for n, g in wanted.items()))
    return abs(loss - want.item()), error / norm


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", SHOWN)
def test_loss_and_gradient_equal_a_naive_loop(family, lora, layout):
    loss, gradient = differences(family, lora, layout)
    assert loss < 1e-5 and gradient < 2e-5, (loss, gradient)


@pytest.mark.parametrize("family", FAMILIES)
def test_head_is_found(family):
    model = build(family).train()
    head = head_of(model)
    assert head.logit_scale == (0.25 if family in ("granite", "cohere") else 1.0)
    capped = family in ("gemma2", "gemma3-softcap")
    assert head.final_logit_softcapping == (5.0 if capped else None)
    assert model.training  # the check leaves the mode as it was


@pytest.mark.parametrize("family", ["qwen3", "gemma3-softcap", "granite"])
def test_head_is_verified_in_bf16_too(family):
    model = build(family).bfloat16()
    head_of(model)
    model.lm_head.register_forward_hook(lambda module, args, out: 1.1 * out)
    with pytest.raises(UserError, match="computes something beyond"):
        head_of(model)


@pytest.mark.parametrize("change", [
    lambda z: z + 1.0, lambda z: 1.01 * z, lambda z: 30 * torch.tanh(z / 30),
    lambda z: z.masked_fill(torch.arange(64) > 60, -1e9), lambda z: z * float("nan"),
], ids=["shift", "scale", "softcap", "masked-ids", "nan"])
def test_head_that_does_something_else_is_refused(change):
    model = build("llama3")
    model.lm_head.register_forward_hook(lambda module, args, out: change(out))
    with pytest.raises(UserError, match="LM head of LlamaForCausalLM computes something beyond"):
        head_of(model)


@pytest.mark.parametrize("option", [{"logits_scaling": 2.0}, {"final_logit_softcapping": 1.0}])
def test_config_that_promises_what_the_model_does_not_do_is_refused(option):
    model = build("llama3")
    for name, value in option.items():
        setattr(model.config, name, value)
    with pytest.raises(UserError, match="LM head"):
        head_of(model)


def test_model_without_a_head_is_refused():
    with pytest.raises(UserError, match="no linear LM head"):
        head_of(build("llama3").model)


def test_model_that_takes_no_positions_is_refused_in_a_sentence(monkeypatch):
    model = build("llama3")
    forward = model.base_model.forward

    def no_positions(input_ids, attention_mask=None, use_cache=None):
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(model.base_model, "forward", no_positions)
    with pytest.raises(UserError, match="^LlamaForCausalLM cannot be verified .*position_ids"):
        head_of(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_sequences_apart(family):
    for layout in LAYOUTS.values():
        require_layout(build(family), layout)


def test_layout_that_mixes_sequences_is_refused(monkeypatch):
    import transformers.masking_utils as masking

    monkeypatch.setattr(masking, "find_packed_sequence_indices", lambda position_ids: None)
    model = build("qwen3")
    require_layout(model, LAYOUTS["padded"])
    with pytest.raises(UserError, match="does not keep the sequences .* padding_free to false"):
        require_layout(model, LAYOUTS["packed"])


# LoRA


def test_a_fresh_adapter_changes_nothing_and_freezes_the_model():
    model, plain = build("qwen3"), build("qwen3")
    add_lora(model, TrainConfig(use_peft=True))
    ids = torch.tensor([sequences([9])[0]])
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in n for n in trained)
    head_of(model)
    assert not model.get_output_embeddings().weight.requires_grad


def test_lora_needs_no_release_of_peft_that_transformers_asks_for(monkeypatch, tmp_path):
    """transformers 5.24.0 refuses peft 0.21.2, which does all that its adapters need."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0")
    build("qwen3").save_pretrained(tmp_path / "base")
    model = with_lora(checkpoint.load_model(str(tmp_path / "base"), "cpu"))
    rlsd.policy.models.add_teacher_adapter(model)
    ids = torch.tensor([sequences([9])[0]])
    with torch.no_grad():
        want = model(input_ids=ids).logits
        with using_adapter(model, None):
            assert torch.equal(model(input_ids=ids).logits, build("qwen3")(input_ids=ids).logits)
        with using_adapter(model, TEACHER):
            assert torch.equal(model(input_ids=ids).logits, want)
        for p in adapter_weights(model, TEACHER).values():
            p.zero_()
    checkpoint.save_weights(model, tmp_path / "adapter", model.state_dict())
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "generation_config.json",
    }
    loaded = checkpoint.load_model(str(tmp_path / "adapter"), "cpu")
    assert torch.equal(loaded(input_ids=ids).logits, want)
    train_lora(loaded, TrainConfig(use_peft=True, lora_r=4, lora_alpha=8), tmp_path)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    wrapped = peft.PeftModel.from_pretrained(build("qwen3"), tmp_path / "adapter")  # peft reads it
    assert torch.equal(wrapped(input_ids=ids).logits, want)


def test_frozen_head_forms_no_dw(monkeypatch):
    seen = []
    model = with_lora(build("llama3"))
    import rlsd_kernels.pipeline as pipeline

    real = pipeline.linear_rlsd_loss

    def recorded(*args, need, **kwargs):
        seen.append(need)
        return real(*args, need=need, **kwargs)

    monkeypatch.setattr(pipeline, "linear_rlsd_loss", recorded)
    policy = Policy(model, head_of(model), LAYOUTS["padded"])
    student_terms(policy, make_batch(), {}, 0.0, CONFIG, OPTIONS)
    assert seen == [(True, False, False)]


def test_adapters_depend_on_the_seed_alone():
    first, again, other = (
        adapter_weights(with_lora(build("qwen3"), seed=s), STUDENT) for s in (1, 1, 2)
    )
    assert all(torch.equal(first[n], again[n]) for n in first if "lora_A" in n)
    assert not any(torch.equal(first[n], other[n]) for n in first if "lora_A" in n)


def test_lora_on_the_head_is_refused():
    model = build("llama3")
    add_lora(model, TrainConfig(use_peft=True, lora_target_modules=["lm_head"]))
    with pytest.raises(UserError, match="LoRA must leave the head out"):
        head_of(model)


def test_unknown_target_module_is_one_sentence():
    with pytest.raises(UserError, match="LoRA does not fit Qwen3ForCausalLM .*linear layers\\.$"):
        add_lora(build("qwen3"), TrainConfig(use_peft=True, lora_target_modules=["nonesuch"]))


def test_using_adapter_gives_back_the_students_also_after_an_error():
    model = with_lora(build("qwen3"))
    rlsd.policy.models.add_teacher_adapter(model)
    with torch.no_grad():
        for p in adapter_weights(model, TEACHER).values():
            p.mul_(2)
    ids = torch.tensor([sequences([9])[0]])

    def logits():
        return model(input_ids=ids).logits.detach()

    want, base = logits(), build("qwen3")(input_ids=ids).logits
    for name in (None, TEACHER):
        with pytest.raises(KeyError), using_adapter(model, name):
            inside = logits()
            raise KeyError
        assert not torch.equal(inside, want)
        if name is None:
            assert torch.allclose(inside, base, atol=1e-6)
        assert torch.equal(logits(), want)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, _ in model.named_parameters() if f".{STUDENT}." in n
        }


def test_a_pad_token_beyond_the_embedding_is_refused():
    with pytest.raises(UserError, match="pads with id 64, past the 64 rows of the embedding of Q"):
        layout_of(build("qwen3"), 64, False)
    assert layout_of(build("qwen3"), 63, False).pad_id == 63


@pytest.mark.parametrize("damage, part", [
    (lambda model: model.model.layers[1].mlp.up_proj.weight.data.mul_(1e38),
     "The logits of LlamaForCausalLM are not finite in float32, though its weights are; set bf16"),
    (lambda model: [p.data.zero_() for p in model.parameters()],
     "computes the same for every token, since 16 of its weights hold zeros only, first model.emb"),
    (lambda model: model.model.norm.weight.data.zero_(),
     "LlamaForCausalLM computes the same for every token; load trained weights.$"),
], ids=["overflow", "zeros", "zero-norm"])
def test_a_dead_model_is_told_as_what_it_is(damage, part):
    model = build("llama3")
    damage(model)
    with pytest.raises(UserError, match=part):
        head_of(model)


# Experts


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_auxiliary_loss_is_transformers_own_over_the_live_tokens(family, layout):
    model, batch = build(family), make_batch()
    router = router_of(model, None)
    assert router.coefficient == 0.1  # the model's, whose config puts the router's logits out
    teacher = Teacher(model, "live")
    with_aux, plain = (
        ours(model, teacher, batch, [[0, 1, 2, 3, 4, 5]], LAYOUTS[layout], router=r)
        for r in (router, None)
    )
    # All live tokens as one row: attention then mixes sequences, so the model is fed per sequence.
    logits = None
    model.zero_grad(set_to_none=True)
    for i, prompt in enumerate(batch.prompts):
        ids = torch.tensor([prompt + batch.completion_ids[i][batch.mask[i]].tolist()])
        more = model(input_ids=ids, output_router_logits=True).router_logits
        logits = more if logits is None else [
            torch.cat(pair) for pair in zip(logits, more, strict=True)
        ]
    module = __import__(type(model).__module__, fromlist=["load_balancing_loss_func"])
    aux = 0.1 * module.load_balancing_loss_func(
        tuple(logits), model.num_experts, model.num_experts_per_tok
    )
    aux.backward()
    assert with_aux[0] - plain[0] == pytest.approx(aux.item(), rel=1e-4)
    for name, want in gradients(model).items():
        got = with_aux[1][name] - plain[1][name]
        assert (got - want).norm() <= 1e-4 * with_aux[1][name].norm() + 1e-6, name
    assert any("gate" in name for name in gradients(model))


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_auxiliary_loss_does_not_depend_on_the_split(family):
    model, batch = build(family), make_batch()
    router, teacher = router_of(model, 0.7), Teacher(model, "live")
    want, grads = ours(model, teacher, batch, [list(range(6))], LAYOUTS["padded"], router=router)
    for parts, layout in (([[0, 1], [2, 3, 4], [5]], "padded"), ([[4, 1, 0], [5, 2, 3]], "packed")):
        got, split = ours(model, teacher, batch, parts, LAYOUTS[layout], router=router)
        assert got == pytest.approx(want, abs=1e-5)
        for name, grad in grads.items():
            assert (split[name] - grad).norm() <= 5e-5 * grad.norm() + 1e-7, name


def test_auxiliary_loss_is_off_where_the_model_does_not_put_it_out():
    model = build("mixtral")
    model.config.output_router_logits = False
    assert router_of(model, None) is None and router_of(model, 0.0) is None
    assert router_of(model, 0.02).coefficient == 0.02
    assert router_of(build("qwen3"), None) is None


def test_auxiliary_loss_of_a_dense_model_is_refused():
    with pytest.raises(UserError, match="Qwen3ForCausalLM has no router"):
        router_of(build("qwen3"), 0.1)


def test_another_auxiliary_loss_is_refused():
    model = build("qwen3-moe")
    model.num_experts_per_tok = 1

    def doubled(module, arguments, out):
        out["aux_loss"] = 2 * out.aux_loss
        return out

    model.register_forward_hook(doubled)
    with pytest.raises(UserError, match="load-balancing loss of Qwen3MoeForCausalLM"):
        router_of(model, 0.1)


# Masters


def test_fp32_parameters_are_their_own_masters():
    model = build("qwen3")
    weights = MasterWeights(model, False)
    assert [id(p) for p in weights.masters] == [id(p) for p in model.parameters()]
    assert weights.state_dict() is None


def test_bf16_masters_sum_gradients_in_fp32_and_keep_small_steps():
    model, reference = build("qwen3"), build("qwen3")
    weights = MasterWeights(model, True)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(m.dtype == torch.float32 for m in weights.masters)
    for master, p in zip(weights.masters, reference.parameters(), strict=True):
        assert torch.equal(master, p)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # tied
    rotary = [b for name, b in model.named_buffers() if "inv_freq" in name]
    assert rotary and all(b.dtype == torch.float32 for b in rotary)
    # 64 equal contributions add up to 64 of them; in bf16 a sum stalls long before.
    p, master = next(zip(model.parameters(), weights.masters, strict=True))
    for _ in range(64):
        (p.float() * 0.001).sum().backward()
        assert p.grad is None
    part = torch.tensor(0.001, dtype=torch.bfloat16).float()
    assert torch.allclose(master.grad, 64 * part, rtol=1e-6)
    before = p.detach().clone()
    with torch.no_grad():
        for _ in range(2000):
            master.add_(1e-6)
            weights.publish()
    assert torch.allclose(p.float(), before.float() + 2e-3, atol=2e-3)
    assert not torch.equal(p, before)


def test_masters_come_back_from_their_state():
    weights, other = MasterWeights(build("qwen3"), True), MasterWeights(build("qwen3"), True)
    with torch.no_grad():
        for master in weights.masters:
            master.add_(1e-5 * torch.randn(master.shape))
    weights.publish()
    other.load_state_dict(weights.state_dict())
    for (p, master), (q, copied) in zip(weights.pairs, other.pairs, strict=True):
        assert torch.equal(master, copied) and torch.equal(p, q) and master is not copied
    with pytest.raises(ValueError):
        other.load_state_dict(None)


def test_frozen_copy_of_a_bf16_student_has_no_hooks():
    model = build("qwen3")
    MasterWeights(model, True)
    teacher = Teacher(model, "base")
    p = next(teacher.model.parameters()).requires_grad_()
    p.float().sum().backward()
    assert p.grad is not None


# Recomputation


def dropped(family):
    """A model with dropout everywhere, which eval mode must keep off."""
    model = build(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.5)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3", "qwen3-moe"])
def test_recomputed_layers_give_the_same_gradients_with_dropout_off(family, layout):
    results, calls = [], []
    for switched_on in (False, True):
        model = dropped(family)
        layer = model.base_model.h if family == "gpt2" else model.base_model.layers
        layer[0].register_forward_hook(lambda *_: None)
        inner = next(m for m in layer[0].modules() if isinstance(m, torch.nn.LayerNorm)
                     or type(m).__name__.endswith("RMSNorm"))
        count = []
        inner.register_forward_hook(lambda *_, count=count: count.append(1))
        if switched_on:
            checkpoint_layers(model)
        router = router_of(model, None)
        teacher = Teacher(model, "live")
        results.append(ours(
            model, teacher, make_batch(), [[0, 1, 2, 3, 4, 5]], LAYOUTS[layout], router=router
        ))
        calls.append(len(count))
    assert calls[1] == calls[0] + 1  # once more, in backward, and not for the teacher
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    for name, grad in results[0][1].items():
        assert (results[1][1][name] - grad).norm() <= 1e-6 * grad.norm() + 1e-8, name


def test_recomputation_keeps_less_for_backward():
    kept = []
    for switched_on in (False, True):
        model, sizes = build("qwen3"), []
        if switched_on:
            checkpoint_layers(model)
        ids, mask = make_batch().completion_ids, make_batch().mask

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            completion_hidden(model, make_batch().prompts, ids, mask, LAYOUTS["padded"])
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


def test_copies_of_a_recomputed_model_do_not_call_the_original():
    model = build("qwen3")
    checkpoint_layers(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in copied.base_model.layers.parameters():
            p.zero_()
    ids = torch.tensor([sequences([9])[0]])
    assert not torch.equal(copied(input_ids=ids).logits, model(input_ids=ids).logits)


def test_model_without_layers_to_recompute_is_refused(monkeypatch):
    monkeypatch.setattr(rlsd.policy.models, "GradientCheckpointingLayer", torch.nn.Bilinear)
    with pytest.raises(UserError, match="gradient_checkpointing to false"):
        checkpoint_layers(build("qwen3"))


# Cost


@pytest.mark.parametrize("family", ["qwen3", "llama3", "gpt2"])
def test_flops_are_those_that_pytorch_counts(family):
    model = build(family)
    model.set_attn_implementation("eager")  # PyTorch does not count SDPA on the CPU
    flops, ids = Flops(model), torch.tensor([sequences([40])[0]])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    # The masked half of attention is computed here, and not counted by ours.
    want = counter.get_total_flops() - 40 * 40 * flops.per_pair
    assert flops.scoring([40], 40) == pytest.approx(want, rel=0.02)


def test_flops_of_experts_count_those_that_are_chosen():
    dense = Flops(build("llama3")).per_token
    flops = Flops(build("mixtral"))
    expert = 3 * 32 * 48 * 2  # gate, up and down of one expert, multiply and add
    attention = dense - 2 * 2 * 3 * 32 * 48
    router = 2 * 2 * 32 * 4
    assert flops.per_token == attention + 2 * 2 * expert + router


def test_peak_of_a_cpu_is_unknown():
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
], ids=["cuda", "python", "cpu"])
def test_out_of_memory_says_what_to_lower(error):
    with pytest.raises(UserError) as caught, memory_named("training", "this"):
        raise error
    assert str(caught.value) == "Out of memory while training; lower this."
    with pytest.raises(RuntimeError, match="other"), memory_named("training", "this"):
        raise RuntimeError("other")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("Largest difference from a naive loop, fp32: loss (absolute) and gradient (relative).")
    print(f"{'model':<16}" + "".join(
        f"{f'{mode}, {layout}':>22}" for mode in ("full", "LoRA") for layout in LAYOUTS
    ))
    for shown in SHOWN:
        cells = [differences(shown, lora, name) for lora in (False, True) for name in LAYOUTS]
        print(f"{shown:<16}" + "".join(f"{f'{a:.1e} {b:.1e}':>22}" for a, b in cells))
