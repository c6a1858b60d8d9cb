import pytest
import torch
import transformers
from families import EOS, PAD, build, right_pad, sequences
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rlsd import TrainConfig, UserError
from rlsd.demo import word_tokenizer
from rlsd.rollout import (
    eos_ids,
    generate,
    require_room,
    roll_out,
    token_texts,
)

TOKENIZER = word_tokenizer([f"w{i}" for i in range(40)])


@pytest.fixture(scope="module")
def qwen():
    return build("qwen3")


def config(**options):
    return TrainConfig(**{"max_completion_length": 6, "report_to": "none", **options})


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


def canned(monkeypatch, model, completions):
    """model.generate returns these ids; the arguments of each call are collected."""
    calls, left = [], list(completions)

    def fake(input_ids, **arguments):
        calls.append({"input_ids": input_ids, "training": model.training, **arguments})
        out, left[:] = left[: len(input_ids)], left[len(input_ids) :]
        return torch.cat([input_ids, right_pad(out)[0]], 1)

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
    ids, mask, truncated = generate(model, TOKENIZER, [[7, 8]] * 6, config())
    assert mask.tolist() == [[t < n for t in range(6)] for _, n, _ in CANNED]
    assert truncated.tolist() == [t for _, _, t in CANNED]
    assert ids[mask].tolist() == [x for c, n, _ in CANNED for x in c[:n]]
    assert not calls[0]["training"] and model.training
    assert calls[0]["eos_token_id"] == [EOS, 5] and calls[0]["max_new_tokens"] == 6


def test_rollout_batch_size_splits_the_work_and_joins_the_shapes(monkeypatch):
    model = build("llama3")
    calls = canned(monkeypatch, model, [c for c, _, _ in CANNED])
    prompts = sequences([3, 1, 2, 5, 4, 2])
    ids, mask, truncated = generate(model, TOKENIZER, prompts, config(rollout_batch_size=2))
    assert [tuple(c["input_ids"].shape) for c in calls] == [(2, 3), (2, 5), (2, 4)]
    assert ids.shape == mask.shape == (6, 6) and truncated.shape == (6,)
    assert mask.sum(1).tolist() == [3, 1, 6, 2, 4, 6]
    assert ids[1].tolist() == [EOS, PAD, PAD, PAD, PAD, PAD]


def test_greedy_completions_do_not_depend_on_the_split(qwen):
    prompts = sequences([3, 9, 1, 6, 2])
    whole = generate(qwen, TOKENIZER, prompts, config(), greedy=True)
    for size in (1, 2):
        split = generate(qwen, TOKENIZER, prompts, config(rollout_batch_size=size), greedy=True)
        for a, b in zip(whole, split, strict=True):
            assert torch.equal(a, b)
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


@pytest.mark.parametrize("temperature", [1.0, 0.6, 4.0])  # at 4 every id has a real share
def test_samples_follow_the_policy_that_is_scored(temperature):
    model = build("llama3")
    # What some models ship with must not bend the policy.
    own = transformers.GenerationConfig(**DISTORTING, eos_token_id=EOS)
    model.generation_config = own
    prompt, n = sequences([4])[0], 4000
    ids, _, _ = generate(
        model, TOKENIZER, [prompt] * n,
        config(max_completion_length=1, temperature=temperature, rollout_batch_size=n),
    )
    assert ids.shape == (n, 1) and model.generation_config is own
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    want = torch.softmax(logits / temperature, -1)
    got = torch.bincount(ids[:, 0], minlength=64) / n
    # 5 standard deviations of a frequency, plus one sample
    assert ((got - want).abs() < 5 * (want * (1 - want) / n).sqrt() + 1 / n).all()
    assert want.max() < 0.9 and (got > 0).sum() > 10


def test_greedy_ignores_the_models_own_generation_config():
    model = build("llama3")
    prompts = sequences([4, 2])
    want = generate(model, TOKENIZER, prompts, config(), greedy=True)[0]
    model.generation_config = transformers.GenerationConfig(**DISTORTING, eos_token_id=EOS)
    assert torch.equal(generate(model, TOKENIZER, prompts, config(), greedy=True)[0], want)


def test_a_failing_generate_leaves_the_model_as_it_was(monkeypatch):
    model = build("llama3").train()
    own = model.generation_config

    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, TOKENIZER, [[5]], config())
    assert model.training and model.generation_config is own


def length_reward(prompts, completions, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


def test_roll_out_scores_each_completion_with_its_row(monkeypatch):
    model = build("llama3")
    canned(monkeypatch, model, [[3, 4, EOS], [5, 7, 8], [6, EOS, 9]])
    seen = []

    def reward(completions, completion_ids, level, **_):
        seen.append((completions, completion_ids, level))
        return [0.5, None, 1.0]

    given = [r | {"level": i} for i, r in enumerate(rows(sequences([2, 2, 3])))]
    out = roll_out(model, TOKENIZER, given, config(reward_weights=[2.0, 0.1], reward_funcs=[
        "exact_match", "exact_match"]), [reward, length_reward])
    assert seen == [(["w0 w1", "w2 w4 w5", "w3"], [[3, 4, EOS], [5, 7, 8], [6, EOS]], [0, 1, 2])]
    assert out.texts == seen[0][0] and out.rows is given
    assert out.truncated.tolist() == [False, True, False]
    assert out.rewards.tolist() == pytest.approx([1.3, 0.3, 2.2])
    assert out.rewards_per_func[1].isnan().tolist() == [True, False]
    assert out.mask.sum(1).tolist() == [3, 3, 2]


def byte_tokenizer():
    """One id per byte, so that most characters span several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(["<eos>", *alphabet])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


TEXTS = ["plain", " two  spaces ", "é", "naïve café", "日本 and €", "🙂🙂x", "a\ufffdb", ""]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_token_texts_join_to_the_completion(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"] + [0]
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == len(ids) == len(text.encode()) + 1
    assert "".join(pieces) == tokenizer.decode(ids) == text + "<eos>"


def test_a_character_belongs_to_its_last_token():
    tokenizer = byte_tokenizer()
    assert token_texts(tokenizer, tokenizer("xé日y")["input_ids"]) == [
        "x", "", "é", "", "", "日", "y"
    ]


def test_a_completion_cut_inside_a_character_still_joins():
    tokenizer = byte_tokenizer()
    ids = tokenizer("ab🙂")["input_ids"][:-1]
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == 5 and "".join(pieces) == tokenizer.decode(ids)


def test_token_texts_of_a_word_tokenizer_keep_the_spaces():
    ids = TOKENIZER("w0 w1 w2")["input_ids"] + [EOS]
    assert token_texts(TOKENIZER, ids) == ["w0", " w1", " w2", " <eos>"]


def test_prompts_that_leave_no_room_name_the_row(qwen):
    limit = qwen.config.max_position_embeddings
    fits = rows([[5] * (limit - 6)], teacher_prompt_ids=[5] * (limit - 6))
    require_room(qwen, fits, config())
    for prompt, teacher in ((limit - 5, 1), (1, limit - 5)):
        long = rows([[5], [5] * prompt])
        long[1]["teacher_prompt_ids"] = [5] * teacher
        with pytest.raises(UserError) as error:
            require_room(qwen, long, config())
        for part in ("1 of x", str(limit - 5), str(limit), "max_completion_length 6"):
            assert part in str(error.value)
