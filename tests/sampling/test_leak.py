"""The leak probe: what counts, what does not, and where it is counted."""

import pytest
import torch

from rlsd import TrainConfig
from rlsd.sampling.leak import leak_metrics, leak_rate, leaks, question_text
from rlsd.sampling.rollout import Rollout

QUESTION = "What is 3 * 4 + 2?"
LEAKING = [
    "According to the reference solution, 3 * 4 = 12.",
    "The REFERENCE\nANSWER is 14.",
    "The answer key says 14.",
    "This agrees with the ground truth answer.",
    "We compute 14, matching the solution.",
    "From the provided solution we read 14.",
    "The given answer is 14, so we work backwards.",
    "As shown in the solution, the product comes first.",
    "The hint says to multiply first.",
    "I was given the answer, 14.",
    "the solution above gives 14",
    "The gold answer: 14",
]
HONEST = [
    "The answer is 14.",
    "The solution is 14: multiply first, then add.",
    "So the final answer is \\boxed{14}.",
    "Let us check our answer: 12 + 2 = 14, which matches.",
    "A hint of doubt: is it 14 or 18? The product comes first.",
    "We are given the numbers 3, 4 and 2.",
    "The solution set of the equation is {14}.",
    "Among the given answer choices, B fits.",
    "Substituting the known values gives 14.",
    "The expected value is 14.",
    "As shown in the first step, 3 * 4 = 12.",
    "",
]


@pytest.mark.parametrize("text", LEAKING)
def test_phrases_that_refer_to_a_reference_leak(text):
    assert leaks(text, [], QUESTION)
    assert not leaks(text, [])  # unless only markers are looked for


@pytest.mark.parametrize("text", HONEST)
def test_honest_answers_do_not_leak(text):
    assert not leaks(text, ["REF"], QUESTION)


def test_a_phrase_of_the_question_itself_does_not_count():
    question = "The given answer is 15. Is it right?"
    assert not leaks("The given answer is wrong: it is 14.", [], question)
    assert leaks("The given answer is wrong, as the answer key shows.", [], question)


@pytest.mark.parametrize("texts, markers, want", [
    (["a REF b", "b", "REF", "ref"], ["REF"], 0.5),
    (["x", "y"], ["x", "y"], 1.0),
    (["x y"], ["x", "y"], 1.0),  # a text counts once
    (["x"], [], 0.0),
    ([], ["x"], 0.0),
])
def test_leak_rate_of_markers(texts, markers, want):
    assert leak_rate(texts, markers) == want


def test_leak_rate_of_both():
    texts = ["REF 14", "by the answer key, 14", "14", "REF, by the answer key"]
    assert leak_rate(texts, ["REF"], [QUESTION] * 4) == 0.75
    assert leak_rate(texts, [], ["no answer key?"] * 4) == 0.0


@pytest.mark.parametrize("changed, want", [
    ({}, {}),
    ({"leak_markers": ["REF"]}, {"leak": 1 / 3}),
    ({"leak_phrases": True}, {"leak": 1 / 3}),
    ({"leak_markers": ["REF"], "leak_phrases": True}, {"leak": 2 / 3}),
], ids=["nothing", "markers", "phrases", "both"])
def test_metric_of_a_rollout(changed, want):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    rollout = Rollout(
        [{"prompt": QUESTION}, {"prompt": chat}, {"prompt": chat}], None, None,
        ["REF", "see the reference solution", "14"], None, torch.zeros(3), None,
    )
    assert leak_metrics(rollout, TrainConfig(**changed), "leak") == pytest.approx(want)
    assert question_text(chat) == f"Be brief.\n{QUESTION}"
