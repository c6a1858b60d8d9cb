"""The layouts of a pass: alignment with the model's own logits, equality, and how batches are cut.
"""

import pytest
import torch
import transformers
from families import EOS, FAMILIES, PAD, SIZES, build, right_pad, sequences
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rlsd import TrainConfig, UserError
from rlsd.policy.models import head_of, require_own_positions
from rlsd.policy.packing import Layout, completion_hidden, left_pad, micro_batches
from rlsd.sampling.samplers import require_room
from rlsd_kernels import linear_log_probs

LAYOUTS = {"padded": Layout(PAD), "packed": Layout(PAD, padding_free=True)}


def naive_log_probs(model, prompt, completion, temperature):
    """One sequence, no padding, the model's own logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double()
    log_probs = torch.log_softmax(logits / temperature, -1)
    return [log_probs[len(prompt) - 1 + t, y].item() for t, y in enumerate(completion)]


@pytest.mark.parametrize("layout, temperature", [("padded", 1.0), ("packed", 0.7)])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_align_with_the_models_own_logits_eos_included(family, layout, temperature):
    model = build(family)
    # One-token prompts and completions, and both paddings at once.
    prompts = sequences([1, 7, 3, 12])
    completions = [c + [EOS] for c in sequences([4, 0, 9, 2], seed=1)]
    ids, mask = right_pad(completions)
    head, layer = head_of(model), model.get_output_embeddings()
    with torch.no_grad():
        hidden = completion_hidden(model, prompts, ids, mask, LAYOUTS[layout])
        got = linear_log_probs(
            hidden, layer.weight, ids, bias=layer.bias, temperature=temperature, **head._asdict(),
        )
    assert hidden.shape[:2] == ids.shape
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        want = naive_log_probs(model, prompt, completion, temperature)
        assert got[i, : len(completion)].tolist() == pytest.approx(want, abs=3e-5)
    assert len({round(x, 3) for x in got[mask].tolist()}) > 15  # nothing is constant


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_lies_in_the_padding_changes_nothing(layout):
    model, layout = build("qwen3"), LAYOUTS[layout]
    prompts, completions = sequences([2, 5]), sequences([3, 6], seed=1)
    ids, mask = right_pad(completions)
    other = ids.masked_fill(~mask, 17)
    with torch.no_grad():
        a = completion_hidden(model, prompts, ids, mask, layout)
        b = completion_hidden(model, prompts, other, mask, layout._replace(pad_id=9))
    assert torch.equal(a[mask], b[mask])


def test_packing_forwards_every_token_once_and_no_padding(monkeypatch):
    model, seen = build("qwen3"), {}
    forward = model.base_model.forward

    def recorded(**arguments):
        seen.update(arguments)
        return forward(**arguments)

    monkeypatch.setattr(model.base_model, "forward", recorded)
    ids, mask = right_pad([[7, 8, 9], [6]])
    completion_hidden(model, [[3], [4, 5]], ids, mask, LAYOUTS["packed"])
    assert seen["input_ids"].tolist() == [[3, 7, 8, 9, 4, 5, 6]]
    assert seen["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert seen["attention_mask"] is None


def test_left_pad():
    ids, mask = left_pad([[5], [6, 7, 8], [9, 4]], PAD, "cpu")
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8], [0, 9, 4]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]]


def cut(lengths, size, budget, layout):
    """micro_batches of (prompt, completion) lengths, all prompts different."""
    own = [(i, prompt) for i, (prompt, _) in enumerate(lengths)]
    return micro_batches([own], [n for _, n in lengths], size, budget, layout)


def test_micro_batches_of_so_many_sequences_keep_the_order():
    lengths = [(3, 1)] * 5
    assert cut(lengths, 2, None, LAYOUTS["padded"]) == [[0, 1], [2, 3], [4]]
    assert cut([], 2, None, LAYOUTS["padded"]) == cut([], 2, 9, LAYOUTS["packed"]) == []


def cost(part, lengths, layout):
    rows = [lengths[i] for i in part]
    if layout.padding_free:
        return sum(map(sum, rows))
    return len(rows) * (max(p for p, _ in rows) + max(c for _, c in rows))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", [1, 20, 57, 10_000])
def test_micro_batches_by_tokens_cover_all_within_the_budget(budget, layout):
    rng, layout = torch.Generator().manual_seed(1), LAYOUTS[layout]
    lengths = [tuple(x) for x in torch.randint(1, 20, (40, 2), generator=rng).tolist()]
    parts = cut(lengths, 8, budget, layout)
    assert sorted(i for part in parts for i in part) == list(range(40))
    for part in parts:
        assert len(part) == 1 or cost(part, lengths, layout) <= budget
    if budget == 10_000:
        assert len(parts) == 1
    if budget == 57:  # like lengths come together: far fewer parts than one sequence each
        assert len(parts) < 30


# Positions


ROPES = {
    "default": {}, "linear": {"factor": 4.0}, "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0], "factor": 4.0,
                 "original_max_position_embeddings": 16},
    "llama3": {"factor": 4.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0},
    "proportional": {"factor": 4.0},
}


def scaled(rope_type, positions=64):
    torch.manual_seed(0)
    sizes = SIZES | {"max_position_embeddings": positions}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rope_parameters={
        "rope_type": rope_type, "rope_theta": 1e4, **ROPES[rope_type],
    })).eval()


def test_every_scaling_of_transformers_is_known():
    assert {"default", *ROPE_INIT_FUNCTIONS} == set(ROPES)


@pytest.mark.parametrize("rope_type, positions, limit", [
    *((name, 64, 16 if name == "longrope" else None) for name in ROPES), ("dynamic", 16, 16),
])
def test_a_row_whose_scaling_hangs_on_its_neighbours_is_refused(rope_type, positions, limit):
    model = scaled(rope_type, positions)
    prompts, (ids, mask) = sequences([4, 40]), right_pad(sequences([5, 5], seed=1))
    with torch.no_grad():
        beside = completion_hidden(model, prompts, ids, mask, Layout(PAD))[0]
        alone = completion_hidden(model, prompts[:1], ids[:1], mask[:1], Layout(PAD))[0]
    assert torch.allclose(alone, beside, atol=1e-5) == (limit is None)
    require_own_positions(model, limit or 45)
    if limit:
        for furthest in (limit + 1, 45):
            with pytest.raises(UserError, match=f"of a whole pass by its longest row, here up to "
                               f"{furthest} tokens.*lower max_comp") as error:
                require_own_positions(model, furthest)
        assert ("at most 16." in str(error.value)) == (rope_type == "longrope")
        require_own_positions(model, limit)  # nothing is left behind


def test_a_run_that_would_reach_another_scaling_is_refused_at_the_start():
    row = {"prompt_ids": [5], "teacher_prompt_ids": [5] * 10, "_source": "0 of x"}
    require_room(scaled("longrope"), [row], TrainConfig(max_completion_length=6))
    with pytest.raises(UserError, match="here up to 17 tokens.* their sum to at most 16\\.$"):
        require_room(scaled("longrope"), [row], TrainConfig(max_completion_length=7))
