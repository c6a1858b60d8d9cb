import contextlib
import copy
import gc
import math
import sys
import types

import pytest
import torch
import transformers
from families import EOS, FAMILIES, PAD, build, right_pad, sequences
from runs import naive_log_probs

import rlsd.sampling.samplers
from rlsd import TrainConfig, UserError
from rlsd.demo import word_tokenizer
from rlsd.policy.distributed import Processes
from rlsd.sampling.samplers import (
    choose_sampler,
    eos_ids,
    generate,
    generate_batch,
    samples_of_lists,
)

TOKENIZER = word_tokenizer([f"w{i}" for i in range(40)])


@pytest.fixture(autouse=True)
def uncollected(monkeypatch):
    """Continuous batching collects garbage twice a call, half the time of these small ones."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


def config(**options):
    return TrainConfig(**{"max_completion_length": 6, "report_to": "none", **options})


ONE = Processes(config())


def rows(prompts, **columns):
    return [
        {"prompt": "q", "prompt_ids": p, "teacher_prompt_ids": None, "_source": f"{i} of x",
         **columns} for i, p in enumerate(prompts)
    ]


@pytest.mark.parametrize("of_model, of_tokenizer, want", [
    (1, "<eos>", [1]), ([5, 1], "<eos>", [5, 1]), ([5, 6], "<eos>", [5, 6, 1]),
    (None, "<eos>", [1]), (7, None, [7]),
])
def test_every_eos_id_ends_a_completion(of_model, of_tokenizer, want):
    model, tokenizer = build("llama3"), word_tokenizer(["a"])
    model.generation_config.eos_token_id, tokenizer.eos_token = of_model, of_tokenizer
    assert eos_ids(model, tokenizer) == want


def test_no_eos_anywhere_is_an_error():
    model, tokenizer = build("llama3"), word_tokenizer(["a"])
    model.generation_config.eos_token_id, tokenizer.eos_token = None, None
    with pytest.raises(UserError, match="EOS"):
        eos_ids(model, tokenizer)


def test_an_eos_that_the_head_never_says_is_an_error():
    model, tokenizer = build("llama3"), word_tokenizer(["a"])
    model.generation_config.eos_token_id, tokenizer.eos_token = 64, None
    with pytest.raises(UserError, match="head has 64 rows and so never says the EOS token, id 64"):
        eos_ids(model, tokenizer)
    model.generation_config.eos_token_id = [64, 63]
    assert eos_ids(model, tokenizer) == [64, 63]


def canned(monkeypatch, model, completions):
    """model.generate returns these ids; the arguments of each call are collected."""
    calls, left = [], list(completions)

    def fake(input_ids, **arguments):
        calls.append({"input_ids": input_ids, "training": model.training, **arguments})
        out, left[:] = left[: len(input_ids)], left[len(input_ids) :]
        ids = torch.cat([input_ids, right_pad(out)[0]], 1)
        for t in range(input_ids.shape[1], ids.shape[1]):
            for process in arguments["logits_processor"]:
                process(ids[:, :t], torch.arange(64.0).log().expand(len(ids), -1))
        return ids

    monkeypatch.setattr(model, "generate", fake)
    return calls


CANNED = [  # (ids as generated, length with the first EOS, truncated)
    ([10, 11, EOS], 3, False),
    ([EOS], 1, False),
    ([10, 11, 12, 13, 14, 15], 6, True),
    ([10, EOS, EOS, 11], 2, False),  # nothing after the first EOS counts
    ([10, 5, 11, EOS], 2, False),  # id 5 ends as well
    ([10, PAD, 11, 12, 13, EOS], 6, False),  # a sampled pad token is a token
]


def test_mask_covers_the_first_eos_and_nothing_after(monkeypatch):
    model = build("llama3").train()
    model.generation_config.eos_token_id = [EOS, 5]
    calls = canned(monkeypatch, model, [c for c, _, _ in CANNED])
    ids, mask, truncated, log_probs = generate(model, TOKENIZER, [[7, 8]] * 6, config())
    assert mask.tolist() == [[t < n for t in range(6)] for _, n, _ in CANNED]
    assert truncated.tolist() == [t for _, _, t in CANNED]
    assert ids[mask].tolist() == [x for c, n, _ in CANNED for x in c[:n]]
    # id k was drawn with probability k / (0 + 1 + .. + 63)
    want = [math.log(x / 2016) if x else -math.inf for c, n, _ in CANNED for x in c[:n]]
    assert log_probs[mask].tolist() == pytest.approx(want) and not log_probs[~mask].any()
    assert not calls[0]["training"] and model.training
    assert calls[0]["eos_token_id"] == [EOS, 5] and calls[0]["max_new_tokens"] == 6


def test_rollout_batch_size_splits_the_work_and_joins_the_shapes(monkeypatch):
    model = build("llama3")
    calls = canned(monkeypatch, model, [c for c, _, _ in CANNED])
    prompts = sequences([3, 1, 2, 5, 4, 2])
    ids, mask, truncated, log_probs = generate(
        model, TOKENIZER, prompts, config(rollout_batch_size=2)
    )
    assert [tuple(c["input_ids"].shape) for c in calls] == [(2, 3), (2, 5), (2, 4)]
    assert ids.shape == mask.shape == log_probs.shape == (6, 6) and truncated.shape == (6,)
    assert mask.sum(1).tolist() == [3, 1, 6, 2, 4, 6]
    assert ids[1].tolist() == [EOS, PAD, PAD, PAD, PAD, PAD]


def test_greedy_completions_do_not_depend_on_the_split(qwen):
    prompts = sequences([3, 9, 1, 6, 2])
    whole = generate(qwen, TOKENIZER, prompts, config(), greedy=True)
    for size in (1, 2):
        split = generate(qwen, TOKENIZER, prompts, config(rollout_batch_size=size), greedy=True)
        for a, b in zip(whole[:3], split[:3], strict=True):
            assert torch.equal(a, b)
        assert whole.log_probs is None and split.log_probs is None
    # and each is the argmax of the model's own logits
    for prompt, ids, mask in zip(prompts, *whole[:2], strict=True):
        sequence = list(prompt)
        for y in ids[mask].tolist():
            assert y == qwen(input_ids=torch.tensor([sequence])).logits[0, -1].argmax()
            sequence.append(y)


DISTORTING = {
    "do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.1, "min_p": 0.9,
    "typical_p": 0.1, "epsilon_cutoff": 0.9, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(3, 30)), "bad_words_ids": [[40]], "min_new_tokens": 3,
    "sequence_bias": [[[30], 50.0]], "forced_eos_token_id": EOS, "num_return_sequences": 2,
}


def batched(**options):
    """A configuration for generate_batch with a cache of some pages."""
    cache = {"num_blocks": 64, "max_batch_tokens": 512}
    return config(transformers_continuous_batching_config=cache, **options)


@pytest.mark.parametrize("sample, n, temperature", [
    (generate, 4000, 1.0), (generate, 4000, 0.6), (generate_batch, 1000, 0.6),
    (generate, 4000, 4.0), (generate_batch, 1000, 4.0),  # every id has a real share
])
def test_samples_follow_the_policy_that_is_scored(sample, n, temperature):
    model = build("llama3")
    # What some models ship with must not bend the policy.
    own = transformers.GenerationConfig(**DISTORTING, eos_token_id=EOS)
    model.generation_config = own
    prompt = sequences([4])[0]
    ids, _, _, log_probs = sample(
        model, TOKENIZER, [prompt] * n,
        batched(max_completion_length=1, temperature=temperature, rollout_batch_size=n),
    )
    assert ids.shape == (n, 1) and model.generation_config is own
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    want = torch.softmax(logits / temperature, -1)
    got = torch.bincount(ids[:, 0], minlength=64) / n
    # 5 standard deviations of a frequency, plus one sample
    assert ((got - want).abs() < 5 * (want * (1 - want) / n).sqrt() + 1 / n).all()
    assert want.max() < 0.9 and (got > 0).sum() > 10
    assert (log_probs[:, 0] - want.log()[ids[:, 0]]).abs().max() < 1e-5


def naive_sampling_log_prob(logits, before, y, config):
    """log q(y): penalty, temperature, top_k, top_p, min_p, each by its definition, in this order.
    """
    z = logits.double().tolist()
    z = [(v / config.repetition_penalty if v > 0 else v * config.repetition_penalty)
         if i in before else v for i, v in enumerate(z)]
    p = [math.exp(v / config.temperature) for v in z]
    order, kept = sorted(range(len(p)), key=lambda i: -p[i]), []
    order = order[: config.top_k or None]
    total, mass = sum(p[i] for i in order), 0.0
    for i in order:  # the fewest tokens that hold top_p
        if mass >= config.top_p * total:
            break
        kept.append(i)
        mass += p[i]
    kept = [i for i in kept if p[i] >= (config.min_p or 0.0) * p[order[0]]]
    return math.log(p[y] / sum(p[i] for i in kept)) if y in kept else -math.inf, len(kept)


FILTERS = {
    "top_p": {"top_p": 0.6}, "top_k": {"top_k": 5}, "min_p": {"min_p": 0.2},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "all-but-the-penalty": {"top_p": 0.8, "top_k": 9, "min_p": 0.1, "temperature": 1.5},
}
FILTERS["all"] = FILTERS["all-but-the-penalty"] | {"repetition_penalty": 0.5}


@pytest.mark.parametrize("sample, name", [
    *((generate, name) for name in FILTERS),
    *((generate_batch, name) for name in FILTERS if "repetition_penalty" not in FILTERS[name]),
])
def test_filtered_samples_carry_the_log_probs_they_were_drawn_with(qwen, sample, name):
    """Prompts of different lengths: their padding counts as no token that was said."""
    prompts, given = sequences([3, 9, 1, 6] * 8), batched(rollout_batch_size=4, **FILTERS[name])
    torch.manual_seed(0)
    got, widths = sample(qwen, TOKENIZER, prompts, given), []
    for prompt, ids, keep, log_probs in zip(prompts, *got[:2], got.log_probs, strict=True):
        said = list(prompt)
        for y, log_prob in zip(ids[keep].tolist(), log_probs[keep].tolist(), strict=True):
            with torch.no_grad():
                logits = qwen(input_ids=torch.tensor([said])).logits[0, -1]
            want, width = naive_sampling_log_prob(logits, set(said), y, given)
            assert log_prob == pytest.approx(want, abs=2e-5)
            widths.append(width)
            said.append(y)
    assert len(widths) > 100 and max(widths) > 1
    assert min(widths) < 64 or name == "repetition_penalty"
    plain = batched(temperature=given.temperature, rollout_batch_size=4)
    torch.manual_seed(0)
    unfiltered = sample(qwen, TOKENIZER, prompts, plain)
    assert unfiltered.completion_ids.tolist() != got.completion_ids.tolist()


def test_greedy_takes_the_most_probable_token_after_the_penalty(qwen):
    prompts = sequences([3, 9, 1, 6])
    given = config(repetition_penalty=3.0, top_k=2, top_p=0.5)
    got = generate(qwen, TOKENIZER, prompts, given, greedy=True)
    for prompt, ids, keep in zip(prompts, *got[:2], strict=True):
        said = list(prompt)
        for y in ids[keep].tolist():
            with torch.no_grad():
                logits = qwen(input_ids=torch.tensor([said])).logits[0, -1]
            z = [naive_sampling_log_prob(logits, set(said), i, config(repetition_penalty=3.0))[0]
                 for i in range(64)]
            assert z[y] == max(z)
            said.append(y)
    plain = generate(qwen, TOKENIZER, prompts, config(), greedy=True)
    assert plain.completion_ids.tolist() != got.completion_ids.tolist()


def test_greedy_ignores_the_models_own_generation_config():
    model = build("llama3")
    prompts = sequences([4, 2])
    want = generate(model, TOKENIZER, prompts, config(), greedy=True)[0]
    model.generation_config = transformers.GenerationConfig(**DISTORTING, eos_token_id=EOS)
    assert torch.equal(generate(model, TOKENIZER, prompts, config(), greedy=True)[0], want)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_groups_prompt_is_prefilled_once_and_the_same_tokens_are_drawn(family):
    model, own = build(family), sequences([5, 12, 1])
    prompts, drawn, seen = [own[i] for i in (0, 0, 1, 1, 1, 2)], [], []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: seen.append(tuple(args[0].shape))
    )
    for choice in ("false", "auto"):
        torch.manual_seed(3)
        drawn.append(generate(model, TOKENIZER, prompts, config(
            share_prompts=choice, temperature=2.0, max_completion_length=9,
        )))
    (ids, mask, _, want), (again, _, _, got) = drawn
    assert torch.equal(again, ids) and torch.allclose(got, want, atol=1e-4)
    assert seen[0] == (6, 12) and seen[len(seen) // 2 : len(seen) // 2 + 2] == [(3, 11), (6, 1)]
    assert len(set(map(tuple, ids[2:5].tolist()))) == 3


def test_a_cache_that_cannot_be_shared_is_said_and_not_used(qwen, monkeypatch):
    real, lines = transformers.DynamicCache.batch_select_indices, []

    def wrong(self, indices):
        return real(self, indices.flip(0))

    monkeypatch.setattr(transformers.DynamicCache, "batch_select_indices", wrong)
    sample = choose_sampler(qwen, TOKENIZER, config(), ONE, lines.append)
    assert sample.func is generate and sample.keywords == {"share": False}
    (line,) = lines
    assert line.startswith("Sampling computes a group's prompt for every completion: its log-probs")
    assert choose_sampler(qwen, TOKENIZER, config(share_prompts="false"), ONE) is generate
    punished = config(share_prompts="false", soft_punish_cache=5)  # above the trial's 4
    assert choose_sampler(qwen, TOKENIZER, punished, ONE) is generate


SAMPLERS = [generate, generate_batch]


class Bar(contextlib.nullcontext):
    """tqdm's surface, and what it was told."""

    made = []

    def __init__(self, total, **given):
        super().__init__(self)
        self.total, self.given, self.n, self.said = total, given, 0, []
        Bar.made.append(self)

    def update(self, n=1):
        self.n += n
        assert n >= 0 and self.n <= self.total

    def set_postfix_str(self, text, refresh):
        self.said.append((text, self.n))


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("sample", SAMPLERS)
def test_a_bar_counts_completions_on_a_terminal_and_changes_nothing(
    qwen, monkeypatch, sample, greedy
):
    model = copy.deepcopy(qwen)
    model.generation_config.eos_token_id = [EOS, *range(30, 50)]
    prompts, given = sequences([3, 9, 1, 6, 2]), batched(rollout_batch_size=2)

    def draw():
        torch.manual_seed(3)
        return sample(model, TOKENIZER, prompts, given, greedy=greedy)

    monkeypatch.setattr(rlsd.sampling.samplers, "tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    plain = draw()
    assert Bar.made == []  # what pytest captures is no terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = draw()
    for a, b in zip(plain, shown, strict=True):
        assert a is b is None or torch.equal(a, b)
    (bar,) = Bar.made
    assert bar.n == bar.total == 5 and not bar.given["leave"]
    if sample is generate:
        lengths = plain.mask.sum(1).tolist()
        batches = [lengths[i : i + 2] for i in (0, 2, 4)]
        want = [f"token {t}/6" for batch in batches for t in range(1, max(batch) + 1)]
        assert [text for text, _ in bar.said] == want
        counts = [n for _, n in bar.said]
        assert counts == sorted(counts) and plain.truncated.sum() < 5
    monkeypatch.setenv("RANK", "1")
    draw()
    assert len(Bar.made) == 1  # other processes stay silent


@pytest.mark.parametrize("family", ["qwen3", "gemma3-softcap", "granite", "mixtral"])
@pytest.mark.parametrize("sample", SAMPLERS)
def test_drawn_log_probs_are_the_models_own(sample, family):
    """Also over a sliding window, a softcap, scaled logits, and experts, whose load-balancing loss
    cannot be computed while sampling from padded prompts."""
    model = build(family)
    before = copy.deepcopy(model.config)
    prompts = sequences([3, 9, 1, 6, 2])
    got = sample(model, TOKENIZER, prompts, batched(temperature=0.7, rollout_batch_size=2))
    for prompt, ids, keep, log_probs in zip(prompts, *got[:2], got.log_probs, strict=True):
        y = ids[keep].tolist()
        with torch.no_grad():
            want = naive_log_probs(model, prompt, y, config(temperature=0.7))
        assert (log_probs[keep] - want).abs().max() < 2e-5 and not log_probs[~keep].any()
    assert got.mask.sum() > 15 and not model.training
    assert model.config.to_dict() == before.to_dict()
    assert model.config._attn_implementation == before._attn_implementation


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_continuous_batching_finds_the_greedy_completions(family):
    model = build(family).train()
    model.generation_config.eos_token_id = [EOS, *range(30, 40)]
    prompts = sequences([3, 9, 1, 6, 2, 7, 4])
    want = generate(model, TOKENIZER, prompts, config(), greedy=True)
    for size in (2, 256):  # two at a time, in whatever order they finish
        got = generate_batch(
            model, TOKENIZER, prompts, batched(rollout_batch_size=size), greedy=True
        )
        for a, b in zip(want[:3], got[:3], strict=True):
            assert torch.equal(a, b)
        assert got.log_probs is None and model.training
    assert 0 < want.truncated.sum() < 7


def test_continuous_batching_repeats_its_samples_from_the_seed(qwen):
    def draw(seed):
        torch.manual_seed(seed)
        return generate_batch(qwen, TOKENIZER, sequences([3, 9, 1, 6] * 4), batched())

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.completion_ids, other.completion_ids)


def eager(family):
    """A tiny model with eager attention, which is the default of some in some releases only."""
    model = build(family)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("sample", SAMPLERS)
def test_a_diverged_model_is_told_in_a_sentence(sample):
    model = eager("gemma2").train()  # which the engine renames
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="probabilities are not finite"):
        sample(model, TOKENIZER, [[5], [6, 7]], batched())
    assert model.training and model.config._attn_implementation == "eager"


def test_errors_of_the_engine_are_raised_here(monkeypatch):
    model = eager("gemma2")
    with pytest.raises((MemoryError, ValueError)):  # before its thread runs
        generate_batch(model, TOKENIZER, [[5]], config(
            transformers_continuous_batching_config={"num_blocks": 10**9}
        ))
    assert model.config._attn_implementation == "eager"

    def fail(*_, **__):
        raise RuntimeError("broken pass")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="broken pass"):
        generate_batch(model, TOKENIZER, [[5], [6]], batched())
    assert model.config._attn_implementation == "eager"


def test_lists_of_an_engine_become_samples():
    nan = float("nan")
    got = samples_of_lists(
        [[7, EOS], [8, PAD, 9, 10], [EOS, 3], [5]],
        [[-1.0, -2.0], [-0.5, -0.25, None, -3.0], [-4.0, -5.0], [-6.0]], [EOS], PAD, "cpu",
    )
    # After an EOS nothing counts; a sampled pad token does; the last one met another limit.
    assert got.completion_ids[got.mask].tolist() == [7, EOS, 8, PAD, 9, 10, EOS, 5]
    assert got.mask.sum(1).tolist() == [2, 4, 1, 1]
    assert got.truncated.tolist() == [False, True, False, True]
    want = [-1, -2, -0.5, -0.25, nan, -3, -4, -6]
    assert got.log_probs[got.mask].tolist() == pytest.approx(want, nan_ok=True)
    assert not got.log_probs[~got.mask].any()


class OnGpu:
    """What choose_sampler asks a model on a GPU."""

    config = transformers.Qwen3Config()

    def get_input_embeddings(self):
        return types.SimpleNamespace(
            weight=types.SimpleNamespace(device=torch.device("cuda"))
        )


@pytest.mark.parametrize("wanted, reason, want, said", [
    (None, None, generate_batch, "Sampling by transformers' continuous batching."),
    (None, "it is odd", generate,
     "Sampling by the model's own generate, as continuous batching cannot: it is odd."),
    (False, None, generate, "Sampling by the model's own generate."),
    (True, None, generate_batch, "Sampling by transformers' continuous batching."),
])
def test_continuous_batching_is_the_default_on_a_gpu(monkeypatch, wanted, reason, want, said):
    monkeypatch.setattr(rlsd.sampling.samplers, "continuous_batching_refusal", lambda *_: reason)
    monkeypatch.setattr(rlsd.sampling.samplers, "sampler_refusal", lambda *_: None)
    lines, given = [], config(use_transformers_continuous_batching=wanted)
    assert choose_sampler(OnGpu(), TOKENIZER, given, ONE, lines.append) is want and lines == [said]


def test_on_a_cpu_the_models_own_generate_samples_unless_told(qwen):
    lines = []
    assert choose_sampler(qwen, TOKENIZER, config(), ONE, lines.append) is generate
    told = batched(use_transformers_continuous_batching=True)
    assert choose_sampler(qwen, TOKENIZER, told, ONE, lines.append) is generate_batch
    assert lines == ["Sampling by transformers' continuous batching."]


def test_the_trial_of_continuous_batching_does_not_mind_filters(qwen):
    told = batched(
        use_transformers_continuous_batching=True, top_p=0.1, top_k=2, min_p=0.9, temperature=3.0
    )
    assert choose_sampler(qwen, TOKENIZER, told, ONE) is generate_batch


def test_continuous_batching_is_refused_where_it_would_drop_the_penalty(qwen):
    told = batched(use_transformers_continuous_batching=True, repetition_penalty=1.1)
    with pytest.raises(UserError, match="Qwen3ForCausalLM .it has no repetition_penalty.; set"):
        choose_sampler(qwen, TOKENIZER, told, ONE)


def test_continuous_batching_that_draws_from_another_policy_is_refused():
    told = batched(use_transformers_continuous_batching=True)
    model = build("llama3")
    plain = model.forward

    def stretched(*args, position_ids=None, **kwargs):  # the engine alone gives positions
        moved = {} if position_ids is None else {"position_ids": 2 * position_ids}
        return plain(*args, **moved, **kwargs)

    model.forward = stretched
    with pytest.raises(UserError, match="LlamaForCausalLM .its log-probs deviate .* by "):
        choose_sampler(model, TOKENIZER, told, ONE)
    capped = eager("gemma2")  # eager attention has its softcap, the engine's paged one has not
    for layer in capped.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.5
    with pytest.raises(UserError, match="Gemma2ForCausalLM .its log-probs deviate .* by "):
        choose_sampler(capped, TOKENIZER, told, ONE)
    broken = build("llama3")
    broken.forward = None
    with pytest.raises(UserError, match="TypeError: .*; set use_transformers_continuous_batching"):
        choose_sampler(broken, TOKENIZER, told, ONE)
    broken.config.image_token_id = 3
    with pytest.raises(UserError, match="it takes no images"):
        choose_sampler(broken, TOKENIZER, told, ONE)
    with pytest.raises(UserError, match="use_vllm samples from text alone"):
        choose_sampler(broken, TOKENIZER, config(use_vllm=True), ONE)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_generate_is_taken_where_it_is_the_policy(family):
    for model, temperature in (
        (build(family).train(), 1.0), (build(family), 0.02), (build(family).bfloat16(), 0.7),
    ):
        before, training = torch.get_rng_state(), model.training
        assert choose_sampler(model, TOKENIZER, config(temperature=temperature), ONE) is generate
        assert torch.equal(torch.get_rng_state(), before) and model.training == training


def test_tokens_that_are_never_sampled_are_no_deviation():
    model = build("llama3")
    model.config.image_token_id, model.config.video_token_id = 40, 41
    assert choose_sampler(model, TOKENIZER, config(), ONE) is generate


@pytest.mark.parametrize("what", ["mask", "cache", "error"])
def test_a_generate_that_draws_from_another_policy_is_refused(what):
    model = build("llama3")
    plain = model.forward

    def changed(input_ids, attention_mask=None, position_ids=None, **kwargs):
        if what == "mask":
            attention_mask = None
        elif input_ids.shape[1] == 1:  # the cache has the rest
            if what == "error":
                raise RuntimeError("no cache")
            position_ids = position_ids + 1
        return plain(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )

    model.forward = changed
    told = {"error": "RuntimeError: no cache"}.get(what, "its log-probs deviate from the model's")
    with pytest.raises(UserError, match=f"cannot be sampled from by its own generate .{told}"):
        choose_sampler(model, TOKENIZER, config(), ONE)


CHATML = (
    "{% for m in messages %}w1 {{ m['content'] }} END {% endfor %}"
    "{% if add_generation_prompt %}w1 {% endif %}"
)


@pytest.mark.parametrize("end, ends, said", [
    ("w7", [EOS], "The chat template ends a turn by 'w7', which is no control token: completions "
     "end at an EOS alone."),
    ("<stop>", [EOS, 43], "Completions end at '<stop>' too, the chat template's end of turn, which "
     "is no EOS of the model."),
    ("<eos>", [EOS], None), ("", [EOS], None),
])
def test_completions_end_at_the_templates_end_of_turn(qwen, end, ends, said):
    tokenizer, lines = word_tokenizer([f"w{i}" for i in range(40)]), []
    tokenizer.add_special_tokens({"extra_special_tokens": ["<stop>"]})
    tokenizer.chat_template = CHATML.replace("END", end)
    assert eos_ids(qwen, tokenizer) == ends
    assert choose_sampler(qwen, tokenizer, config(), ONE, lines.append) is generate
    assert lines == [said] * bool(said)
    drawn = generate(qwen, tokenizer, [[5]] * 64, config(temperature=3.0, max_completion_length=20))
    lasts = {ids[mask][-1].item() for ids, mask in zip(*drawn[:2], strict=True)}
    assert lasts & set(ends) == set(ends)
    assert not (drawn.completion_ids[:, :-1][drawn.mask[:, 1:]] == ends[-1]).any()


def test_a_failing_generate_leaves_the_model_as_it_was(monkeypatch):
    model = build("llama3").train()
    own = model.generation_config

    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, TOKENIZER, [[5]], config())
    assert model.training and model.generation_config is own
