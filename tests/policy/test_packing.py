"""The layouts of a pass: alignment with the model's own logits, equality, and how batches are cut.
"""

import pytest
import torch
from families import EOS, FAMILIES, PAD, build, right_pad, sequences

from rlsd.policy.models import head_of
from rlsd.policy.packing import Layout, completion_hidden, left_pad, micro_batches
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


def test_micro_batches_of_so_many_sequences_keep_the_order():
    lengths = [(3, 1)] * 5
    assert micro_batches(lengths, 2, None, False) == [[0, 1], [2, 3], [4]]
    assert micro_batches([], 2, None, False) == micro_batches([], 2, 9, True) == []


def cost(part, lengths, padding_free):
    rows = [lengths[i] for i in part]
    if padding_free:
        return sum(map(sum, rows))
    return len(rows) * (max(p for p, _ in rows) + max(c for _, c in rows))


@pytest.mark.parametrize("padding_free", [False, True], ids=LAYOUTS)
@pytest.mark.parametrize("budget", [1, 20, 57, 10_000])
def test_micro_batches_by_tokens_cover_all_within_the_budget(budget, padding_free):
    rng = torch.Generator().manual_seed(1)
    lengths = [tuple(x) for x in torch.randint(1, 20, (40, 2), generator=rng).tolist()]
    parts = micro_batches(lengths, 8, budget, padding_free)
    assert sorted(i for part in parts for i in part) == list(range(40))
    for part in parts:
        assert len(part) == 1 or cost(part, lengths, padding_free) <= budget
    if budget == 10_000:
        assert len(parts) == 1
    if budget == 57:  # like lengths come together: far fewer parts than one sequence each
        assert len(parts) < 30
