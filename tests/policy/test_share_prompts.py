"""One prompt for all of its completions: exact against whole rows, cut by groups, refused in words.

`python tests/policy/test_share_prompts.py` prints the table family x (full, LoRA) of differences
between the shared and the padded layout, and which models fall back.
"""

import math

import pytest
import torch
import transformers
from families import (
    EOS,
    EXPERT_FAMILIES,
    FAMILIES,
    PAD,
    SIZES,
    build,
    right_pad,
    sequences,
)
from runs import WORDS, options
from test_models import ours
from torch.utils.flop_counter import FlopCounterMode

import rlsd.policy.prompt_cache
from rlsd import TrainConfig, UserError
from rlsd.config import make_config
from rlsd.demo import save_model, word_tokenizer
from rlsd.policy.models import (
    STUDENT,
    Flops,
    Policy,
    adapter_weights,
    add_lora,
    checkpoint_layers,
    head_of,
    open_policy,
    router_of,
    sharing,
)
from rlsd.policy.packing import Layout, completion_hidden, forwarded, labels, micro_batches
from rlsd.policy.teacher import Teacher
from rlsd.policy.update import (
    Batch,
    log_probs_under,
    teacher_hidden,
)
from rlsd.trainer import Trainer
from rlsd_kernels import RLSDLossConfig, aggregation_weights

PADDED, SHARED = Layout(PAD), Layout(PAD, share_prompts=True)
LAYOUTS = {
    "shared": SHARED, "packed": SHARED._replace(padding_free=True),
    "uniform": SHARED._replace(uniform=True),
}
CONFIG, OPTIONS = RLSDLossConfig(), TrainConfig(impl="torch")
ALL = [list(range(7))]


def grouped_batch():
    """Groups of four, two and one; one prompt of a single token, one member without a teacher."""
    own, hints = sequences([9, 1, 5]), sequences([3, 4, 2], seed=3)
    of = [0, 0, 0, 0, 1, 1, 2]
    ids, mask = right_pad([c + [EOS] for c in sequences([4, 0, 9, 2, 1, 5, 3], seed=1)])
    teacher = [hints[i] + own[i] for i in of]
    teacher[2] = None
    return Batch(
        prompts=[list(own[i]) for i in of], teacher_prompts=teacher, images=[None] * 7,
        completion_ids=ids, mask=mask, loss_weights=aggregation_weights(mask),
        advantages=torch.tensor([1.2, -0.7, 0.4, -1.5, 0.9, -0.3, 0.6]),
    )


def prepared(family, lora):
    """(student, teacher of other weights)."""
    model = build(family)
    if lora:
        add_lora(model, TrainConfig(use_peft=True, lora_r=4, lora_alpha=8))
    teacher = Teacher(model, "base")
    with torch.no_grad():
        for name, p in (adapter_weights(model, STUDENT) if lora else dict(
            model.named_parameters()
        )).items():
            p.add_((0.1 if "lora_B" in name else 0.01) * torch.randn(p.shape))
    return model, teacher


def update(model, teacher, batch, layout, *, parts=ALL, router=None):
    return ours(model, teacher, batch, parts, layout, router=router)


def apart(got, want):
    """Relative distance of two dicts of gradients, or of two tensors."""
    if isinstance(want, torch.Tensor):
        got, want = {"": got}, {"": want}
    assert got.keys() == want.keys()
    norm = math.sqrt(sum(g.norm().item() ** 2 for g in want.values()))
    assert norm > 1e-2
    return math.sqrt(sum((got[n] - g).norm().item() ** 2 for n, g in want.items())) / norm


def student_hidden(model, batch, layout):
    return completion_hidden(model, batch.prompts, batch.completion_ids, batch.mask, layout)


def differences(family, lora, layout=SHARED):
    """Relative: hidden states of student and teacher, gradient; absolute: the loss."""
    model, teacher = prepared(family, lora)
    batch = grouped_batch()
    hidden = []
    with torch.no_grad():
        for each in (layout, PADDED):
            own = student_hidden(model, batch, each)[batch.mask]
            with teacher.scoring() as scorer:
                theirs = teacher_hidden(scorer, batch, each)[batch.mask]
            hidden.append((own, theirs))
    (loss, grads), (want, wanted) = (update(model, teacher, batch, x) for x in (layout, PADDED))
    assert all((".lora_" in name) == lora for name in grads)
    return (*(apart(*pair) for pair in zip(*hidden, strict=True)), abs(loss - want),
            apart(grads, wanted))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_loss_and_gradient_equal_the_padded_layout(family, lora):
    student, teacher, loss, gradient = differences(family, lora)
    assert student < 2e-6 and teacher < 2e-6 and loss < 1e-6 and gradient < 1e-5


@pytest.mark.parametrize("layout", ["packed", "uniform"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt2", "mixtral"])
def test_other_layouts_of_shared_prompts_are_exact_too(family, layout):
    student, teacher, loss, gradient = differences(family, False, LAYOUTS[layout])
    assert student < 2e-6 and teacher < 2e-6 and loss < 1e-6 and gradient < 1e-5


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt2", "qwen3-moe"])
def test_bf16_stays_as_near_to_fp32_as_the_padded_layout(family):
    batch, errors = grouped_batch(), {}
    with torch.no_grad():
        want = student_hidden(build(family), batch, PADDED)[batch.mask]
        for name, layout in (("padded", PADDED), ("shared", SHARED)):
            got = student_hidden(build(family).bfloat16(), batch, layout)[batch.mask]
            errors[name] = apart(got.float(), want)
    assert errors["shared"] <= 1.5 * errors["padded"] + 1e-3, errors


def tokens_of(model, batch, layout):
    """Shapes of the ids in each pass of the trunk."""
    shapes = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: shapes.append(tuple(args[0].shape))
    )
    completion_hidden(model, batch.prompts, batch.completion_ids, batch.mask, layout)
    hook.remove()
    return shapes


def test_a_prompt_passes_the_trunk_once():
    model, batch = build("qwen3"), grouped_batch()
    assert tokens_of(model, batch, PADDED) == [(7, 19)]
    assert tokens_of(model, batch, SHARED) == [(3, 9), (7, 10)]
    alone = batch.select([0, 4, 6])  # nothing to share
    assert tokens_of(model, alone, SHARED) == [(3, 14)]
    assert tokens_of(model, alone, LAYOUTS["uniform"]) == [(3, 9), (3, 5)]
    # One row without padding, or the prompt once and completions that are padded: what is less.
    assert tokens_of(model, batch, LAYOUTS["packed"]) == [(1, 74)]
    group = batch.select([0, 1, 2, 3])
    assert tokens_of(model, group, LAYOUTS["packed"]) == [(1, 9), (4, 10)]


def test_equal_tokens_are_shared_and_other_images_are_not():
    one, other = object(), object()
    assert labels([[5, 6], [5, 6], None, [5], [5, 6]], [None] * 5) == [
        (0, 2), (0, 2), None, (3, 1), (0, 2)
    ]
    assert labels([[5]] * 4, [one, other, one, None]) == [(0, 1), (1, 1), (0, 1), (3, 1)]


def test_rows_without_a_completion_keep_the_others_right():
    model, batch = build("qwen3"), grouped_batch()
    mask = batch.mask.clone()
    mask[1] = False
    with torch.no_grad():
        got, want = (
            completion_hidden(model, batch.prompts, batch.completion_ids, mask, layout)
            for layout in (SHARED, PADDED)
        )
        nothing = completion_hidden(
            model, batch.prompts, batch.completion_ids[:, :0], mask[:, :0], SHARED
        )
    assert got.isfinite().all() and apart(got[mask], want[mask]) < 2e-6
    assert nothing.shape == (7, 0, 32)


def test_log_probs_of_a_reference_are_the_same():
    model, batch = build("llama3"), grouped_batch()
    got, want = (
        log_probs_under(Policy(model, head_of(model), x), batch, ALL, 0.7, "torch")
        for x in (SHARED, PADDED)
    )
    assert torch.allclose(got[batch.mask], want[batch.mask], atol=1e-5)


# Recomputation


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3", "qwen3-moe"])
def test_recomputed_layers_give_the_same_gradients(family):
    batch, results = grouped_batch(), []
    for switched_on in (False, True):
        model, teacher = prepared(family, False)
        router = router_of(model, None)
        if switched_on:
            checkpoint_layers(model)
        results.append(update(model, teacher, batch, SHARED, router=router))
    (want, grads), (got, again) = results
    assert got == pytest.approx(want, abs=1e-6) and apart(again, grads) < 1e-6


def test_recomputation_holds_no_layer_beyond_its_own_backward():
    kept = {}
    for switched_on in (False, True):
        model, batch, sizes = build("qwen3"), grouped_batch(), []
        if switched_on:
            checkpoint_layers(model)

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        made = []
        real = rlsd.policy.prompt_cache.Cache

        def noted(*args, made=made, real=real, **kwargs):
            made.append(real(*args, **kwargs))
            return made[-1]

        rlsd.policy.prompt_cache.Cache = noted
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                hidden = student_hidden(model, batch, SHARED)
        finally:
            rlsd.policy.prompt_cache.Cache = real
        before = [layer.keys for layer in made[0].layers]
        hidden[batch.mask].square().sum().backward()
        # A recomputed pass leaves nothing in the cache: its graph would live to the end.
        assert all(a is b for a, b in zip(
            before, (layer.keys for layer in made[0].layers), strict=True
        ))
        kept[switched_on] = sum(sizes)
    assert kept[True] < kept[False] / 3


# Experts


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_auxiliary_loss_counts_a_shared_prompt_for_each_completion(family):
    model, batch = build(family), grouped_batch()
    router, teacher = router_of(model, 0.7), Teacher(model, "live")
    want, grads = update(model, teacher, batch, PADDED, router=router)
    without, _ = update(model, teacher, batch, PADDED)
    assert want - without > 0.1
    for parts in (ALL, [[0, 1, 2], [3, 4], [5, 6]]):
        got, shared = update(model, teacher, batch, SHARED, parts=parts, router=router)
        assert got == pytest.approx(want, abs=1e-5) and apart(shared, grads) < 2e-5


# Micro-batches


def groups(*sizes, prompt=10):
    """Labels of groups of so many sequences each."""
    return [(first, prompt) for first, size in enumerate(sizes) for _ in range(size)]


def test_micro_batches_keep_groups_whole_where_they_fit():
    assert micro_batches([groups(3, 3, 2)], [5] * 8, 4, None, SHARED) == [
        [0, 1, 2], [3, 4, 5], [6, 7]
    ]
    assert micro_batches([groups(2, 2, 1)], [5] * 5, 4, None, SHARED) == [[0, 1, 2, 3], [4]]
    assert micro_batches([groups(5, 2)], [5] * 7, 2, None, SHARED) == [
        [0, 1], [2, 3], [4], [5, 6]
    ]
    assert micro_batches([groups(3, 3)], [5] * 6, 4, None, PADDED) == [[0, 1, 2, 3], [4, 5]]
    assert micro_batches([], [], 2, None, SHARED) == micro_batches([[]], [], 2, 9, SHARED) == []


@pytest.mark.parametrize("budget", [1, 40, 75, 100, 10_000])
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_a_budget_counts_what_is_forwarded_in_either_context(layout, budget):
    layout, rng = LAYOUTS[layout], torch.Generator().manual_seed(1)
    student = groups(*[4] * 6, prompt=20)
    teacher = [(i, 30 + n) for i, n in student]
    teacher[5] = None
    completions = torch.randint(1, 9, (24,), generator=rng).tolist()
    parts = micro_batches([student, teacher], completions, 8, budget, layout)
    assert sorted(i for part in parts for i in part) == list(range(24))
    for part in parts:
        for own in (student, teacher):
            rows = [i for i in part if own[i]]
            tokens = forwarded([own[i] for i in rows], [completions[i] for i in rows], layout)[0]
            assert tokens <= budget or len(part) == 1
    whole = sum(
        {4} == {sum(student[i] == own for i in part) for own in {student[i] for i in part}}
        for part in parts
    )
    if budget in (100, 10_000):
        assert whole == len(parts)  # each group fits, so none is cut
    if budget == 75:  # whole rows of 50 and more would go alone
        assert max(map(len, parts)) >= 3
    if budget == 1:
        assert len(parts) == 24
    if budget == 10_000:
        assert len(parts) == 1


# Cost


def test_what_is_spared_is_what_the_passes_leave_out():
    batch = grouped_batch()
    for size, layout in ((4, SHARED), (8, SHARED), (2, SHARED), (8, PADDED)):
        options = TrainConfig(per_device_train_batch_size=size)
        parts = batch.micro_batches(options, layout)
        student, teacher = batch.spared(options, layout)
        for spared, prompts in ((student, batch.prompts), (teacher, batch.teacher_prompts)):
            want = 0
            for rows in parts:
                held = [tuple(prompts[i]) for i in rows if prompts[i]]
                want += sum(map(len, held)) - sum(map(len, set(held))) if layout is SHARED else 0
            assert sum(spared) == want
    assert sum(student) == 0 and sum(batch.spared(OPTIONS, SHARED)[0]) == 28


@pytest.mark.parametrize("family", ["qwen3", "llama3"])
def test_flops_of_shared_prompts_are_those_that_pytorch_counts(family):
    model = build(family)
    model.set_attn_implementation("eager")  # PyTorch does not count SDPA on the CPU
    flops, counted = Flops(model), {}
    prompts, (ids, mask) = [sequences([30])[0]] * 4, right_pad(sequences([10] * 4, seed=1))
    for layout in (PADDED, SHARED):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            completion_hidden(model, prompts, ids, mask, layout)
        counted[layout] = counter.get_total_flops()
    # The masked half of attention is computed here, and not counted by ours.
    pairs = {PADDED: (4 * 40**2, 4 * 40**2), SHARED: (30**2 + 4 * 10 * 40, 4 * 40**2 - 3 * 30**2)}
    spared = {PADDED: [], SHARED: [30] * 3}
    for layout, (computed, half) in pairs.items():
        want = counted[layout] - flops.per_pair * (2 * computed - half)
        got = flops.scoring([40] * 4, 0) - flops.scoring(spared[layout], 0)
        assert got == pytest.approx(want, rel=0.02)
    assert counted[SHARED] < 0.5 * counted[PADDED]


def test_flops_of_an_update_leave_out_what_is_spared():
    model, batch = build("qwen3"), grouped_batch()
    flops, config = Flops(model), TrainConfig()
    spared = batch.spared(config, SHARED)
    less = flops.update(batch, config) - flops.update(batch, config, spared)
    assert less == 3 * flops.scoring(spared[0], 0) + flops.scoring(spared[1], 0) > 0


# Refusals


def lfm2():
    """Half of its layers are convolutions."""
    torch.manual_seed(0)
    return transformers.Lfm2ForCausalLM(transformers.Lfm2Config(
        **SIZES, layer_types=["conv", "full_attention"],
    )).eval()


def mamba2():
    torch.manual_seed(0)
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=1,
        state_size=16,
    )).eval()


def qwen3_5():
    """Half of its layers are linear attention."""
    torch.manual_seed(0)
    return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(
        **{k: v for k, v in SIZES.items() if k != "bos_token_id"}, head_dim=8,
        linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
    )).eval()


FALL_BACK = {
    "qwen3.5": (qwen3_5, r"cannot go on from .*are of type linear_attention too\)"),
    "lfm2": (lfm2, r"cannot go on from the keys .*its layers are of type conv too\)"),
    "mamba2": (mamba2, r"cannot go on from .*no gradient arrives there; its layers are of type li"),
}


@pytest.mark.parametrize("made, words", FALL_BACK.values(), ids=FALL_BACK)
def test_a_model_that_keeps_more_than_keys_and_values_falls_back(made, words):
    model, said = made(), []
    assert sharing(model, PADDED, "auto", said.append) == PADDED
    assert sharing(model, PADDED, "false", said.append) == PADDED
    with pytest.raises(UserError, match=f"^share_prompts is true, but {type(model).__name__} "
                       f"{words}.*; set it to auto or false.$"):
        sharing(model, PADDED, "true")
    (line,) = said
    name = type(model).__name__
    assert line.startswith(f"Every completion computes its prompt anew, since {name} ")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_shares_and_is_left_as_it_was(family):
    for dtype in (torch.float32, torch.bfloat16):
        model = build(family).to(dtype).train()
        assert sharing(model, PADDED, "true") == SHARED
        assert model.training and not model.get_input_embeddings()._forward_hooks
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("change, words", [
    (lambda keys, values: (keys.detach(), values), "gradients differ by"),
    (lambda keys, values: (keys.detach(), values.detach()), "no gradient arrives there"),
    (lambda keys, values: (keys, 1.5 * values), "hidden states differ by"),
    (lambda keys, values: (keys[:, :1], values), "cannot go on from the keys and values"),
], ids=["half-detached", "detached", "scaled", "cut"])
def test_the_check_sees_wrong_values_and_wrong_gradients(change, words, monkeypatch):
    real = rlsd.policy.prompt_cache._Kept.update

    def wrong(self, key_states, value_states, *args, **kwargs):
        out = real(self, key_states, value_states, *args, **kwargs)
        self.keys, self.values = change(key_states, value_states)
        return out

    monkeypatch.setattr(rlsd.policy.prompt_cache._Kept, "update", wrong)
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.float32 or words != "gradients differ by":
            with pytest.raises(UserError, match=words):
                sharing(build("qwen3").to(dtype), PADDED, "true")


def test_gradients_that_16_bits_make_noise_are_no_refusal(monkeypatch):
    """As those of a deep model at tokens that it never saw in training."""
    real, noise = torch.autograd.grad, torch.Generator().manual_seed(0)

    def noisy(loss, seen):
        return [
            g + 2.0 * g.norm() / g.numel() ** 0.5 * torch.randn(g.shape, generator=noise).to(g)
            for g in real(loss, seen)
        ]

    monkeypatch.setattr(torch.autograd, "grad", noisy)
    assert sharing(build("qwen3").bfloat16(), PADDED, "true") == SHARED
    with pytest.raises(UserError, match="gradients differ by"):
        sharing(build("qwen3"), PADDED, "true")


def test_a_policy_says_that_it_shares():
    config = TrainConfig(share_prompts=True)  # YAML's word
    assert config.share_prompts == "true" == TrainConfig(share_prompts="true").share_prompts
    assert TrainConfig(share_prompts=False).share_prompts == "false"
    for layout, choice in ((SHARED, "auto"), (PADDED, "false"), (SHARED, "true")):
        policy = open_policy(build("qwen3"), PAD, TrainConfig(share_prompts=choice))
        assert policy.layout == layout
    for wrong in ("yes", 1, None):
        with pytest.raises(UserError, match="^share_prompts must be "):
            TrainConfig(share_prompts=wrong)


def test_an_external_teacher_that_cannot_share_keeps_both_from_it(tmp_path):
    said = []
    config = options(tmp_path, objective="opd", teacher_model_name_or_path=str(tmp_path / "conv"))
    save_model(lfm2(), word_tokenizer(WORDS), tmp_path / "conv")
    trainer = Trainer(make_config(config), log=said.append)
    assert not trainer.policy.layout.share_prompts and "Lfm2ForCausalLM cannot go on" in said[-1]
    trained = trainer.train_step(1)[0]
    assert trained["prompt_sharing/tokens_saved"] == 0 and trained["grad_norm"] > 0
    config["output_dir"] += "-true"
    with pytest.raises(UserError, match="^share_prompts is true, but Lfm2ForCausalLM cannot go on"):
        Trainer(make_config(config | {"share_prompts": "true"}), log=said.append)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("Shared against padded layout, fp32. Relative: hidden states of student and teacher, "
          "gradient;\nabsolute: loss.")
    print(f"{'model':<16}{'mode':<6}{'student':>10}{'teacher':>10}{'loss':>10}{'gradient':>10}")
    for shown in FAMILIES:
        for mode in ("full", "LoRA"):
            cells = differences(shown, mode == "LoRA")
            print(f"{shown:<16}{mode:<6}" + "".join(f"{cell:>10.1e}" for cell in cells))
    for made, _ in FALL_BACK.values():
        sharing(made(), PADDED, "auto")
