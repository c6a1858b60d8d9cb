"""roll_out: prompts that fit, a reward for each completion, and the text of each token."""

import math

import pytest
import torch
import transformers
from families import EOS, build, sequences
from test_samplers import ONE, TOKENIZER, canned, config, rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rlsd import UserError
from rlsd.sampling.rollout import roll_out, token_texts
from rlsd.sampling.samplers import require_room


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
    options = config(reward_weights=[2.0, 0.1], reward_funcs=["exact_match", "exact_match"])
    out = roll_out(
        model, TOKENIZER, given, options, [reward, length_reward], ONE
    )
    assert seen == [(["w0 w1", "w2 w4 w5", "w3"], [[3, 4, EOS], [5, 7, 8], [6, EOS]], [0, 1, 2])]
    assert out.texts == seen[0][0] and out.rows is given
    assert out.truncated.tolist() == [False, True, False]
    assert out.rewards.tolist() == pytest.approx([1.3, 0.3, 2.2])
    assert out.rewards_per_func[1].isnan().tolist() == [True, False]
    assert out.mask.sum(1).tolist() == [3, 3, 2]
    want = [[math.log(x / 2016) if x else 0.0 for x in line]
            for line in ([3, 4, EOS], [5, 7, 8], [6, EOS, 0])]
    torch.testing.assert_close(out.sampling_log_probs, torch.tensor(want))


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


@pytest.mark.parametrize("column", ["prompt_ids", "teacher_prompt_ids", "_reference_ids"])
def test_tokens_beyond_the_embedding_name_the_row(qwen, column):
    known = rows([[5], [63]], teacher_prompt_ids=[63], _reference_ids=[63])
    require_room(qwen, known, config())
    known[1][column] = [3, 64, 4]
    with pytest.raises(UserError, match="Row 1 of x has a token with id 64, past the 64 rows of"):
        require_room(qwen, known, config())
