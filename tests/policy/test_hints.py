"""Which completions of a group serve as hints, for whom, and in which words."""

import pytest
import torch

from rlsd import TrainConfig
from rlsd.demo import word_tokenizer
from rlsd.policy.hints import contrast_hints, group_hints, teacher_prompts
from rlsd.sampling.rollout import Rollout
from rlsd.tasks.prompts import encode, insert_hint
from rlsd.tasks.rewards import score

TEMPLATE = "<h> {privileged_context} {prompt}"
TOKENIZER = word_tokenizer(["#", "<q>", "<a>", "<h>", "d", *map(str, range(10))])


def rollout_of(rewards, texts=None):
    """Groups of 4; completion i says "# i", and the data's hint is "# d"."""
    rows = []
    for i in range(len(rewards)):
        prompt = f"<q> {i // 4} <a>"
        hinted = insert_hint(prompt, "# d", TEMPLATE)
        rows.append({
            "prompt": prompt, "prompt_ids": encode(prompt, TOKENIZER),
            "teacher_prompt_ids": encode(hinted, TOKENIZER),
        })
    return Rollout(
        rows, None, None, texts or [f"# {i % 10}" for i in range(len(rewards))], None,
        torch.tensor(rewards, dtype=torch.float64), None,
    )


def config_of(**changed):
    given = {"hint_source": "rollout", "rlsd_contrast_hints": 2, "num_generations": 4,
             "generation_batch_size": 8, "privileged_template": TEMPLATE, **changed}
    return TrainConfig(**given)


def advantages_of(rollout):
    groups = rollout.rewards.view(-1, 4)
    return (groups - groups.mean(1, keepdim=True)).flatten().float()


def read(rollout, step=1, advantages=None, **changed):
    """For each completion [who is the right hint, who the wrong ones], d for the data's hint."""
    advantages = advantages_of(rollout) if advantages is None else advantages
    found = []
    for i, contexts in enumerate(
        group_hints(rollout, advantages, step, TOKENIZER, config_of(**changed))
    ):
        said = []
        for ids in contexts:
            _, mark, digit, *question = TOKENIZER.decode(ids).split()
            assert mark == "#" and question == ["<q>", str(i // 4), "<a>"]
            said.append(digit if digit == "d" else int(digit))
        found.append(said)
    return found


def test_right_hint_first_then_wrong_ones_of_the_same_group_and_never_itself():
    rollout = rollout_of([1, 0, 1, 0, 0, 0, 1, 0])
    seen = [read(rollout, step) for step in range(1, 60)]
    for found in seen:
        for i, (right, *wrong) in enumerate(found[:6] + found[7:]):
            i = i if i < 6 else 7
            group = {0: ({0, 2}, {1, 3}), 1: ({6}, {4, 5, 7})}[i // 4]
            assert right in group[0] - {i} and set(wrong) <= group[1] - {i}
            assert len(set(wrong)) == len(wrong) == min(2, len(group[1] - {i}))
        assert found[6] == []  # the only right one of its group
    assert {tuple(found[4]) for found in seen} == {(6, 5, 7), (6, 7, 5)}
    assert {found[1][0] for found in seen} == {0, 2}  # each step draws anew


def test_hints_are_a_function_of_seed_and_step():
    rollout = rollout_of([1, 0, 1, 0, 0, 1, 1, 0])
    drawn = [read(rollout, step) for step in range(1, 20)]
    assert [read(rollout, step) for step in range(1, 20)] == drawn
    assert [read(rollout, step, seed=1) for step in range(1, 20)] != drawn


def test_a_group_reads_few_different_prompts():
    rollout = rollout_of([1, 1, 1, 1, 0, 0, 0, 0] * 2)
    config = config_of(num_generations=8, generation_batch_size=16)
    found = group_hints(
        rollout, rollout.rewards.float() - 0.5, 1, TOKENIZER, config
    )
    assert all(len(contexts) == 3 for contexts in found)
    for group in (found[:8], found[8:]):
        assert len({tuple(contexts[0]) for contexts in group}) == 2
        assert len({tuple(ids) for contexts in group for ids in contexts[1:]}) == 3


def test_fewer_wrong_ones_than_asked_are_all_of_them():
    assert read(rollout_of([1, 1, 0, 1] * 2), rlsd_contrast_hints=9)[0][1:] == [2]
    found = read(rollout_of([1, 0, 0, 0] * 2), rlsd_contrast_hints=9)
    assert found[0] == [] and sorted(found[1][1:]) == [2, 3] and found[1][0] == 0


def test_the_data_gives_the_right_hint_and_the_group_the_wrong_ones():
    rollout = rollout_of([1, 0, 0, 0, 0, 1, 1, 1])
    found = read(rollout, hint_source="data")
    assert [hint[0] for hint in found[:4]] == ["d"] * 4 and found[4] == []
    assert sorted(found[0][1:]) == sorted(set(found[0][1:])) and set(found[0][1:]) <= {1, 2, 3}
    assert all(hint == ["d", 4] for hint in found[5:])  # whose only wrong one is the fifth
    rollout.rows[1]["teacher_prompt_ids"] = None  # which data may lack where it is allowed to
    assert read(rollout, hint_source="data")[1] == []


def test_only_sequences_that_are_weighed_read_anything():
    rollout = rollout_of([1, 1, 1, 1, 1, 0, 0, 1])
    found = read(rollout)
    assert found[:4] == [[]] * 4 and all(found[4:])  # a group without signal
    found = read(rollout, rlsd_negative_only=True)
    assert [bool(hint) for hint in found] == [False] * 5 + [True] * 2 + [False]
    assert read(rollout_of([0.5, 0.2, 0.9, 0.1] * 2)) == [[]] * 8  # graded, none right
    found = read(rollout_of([0.5, 0.2, 0.9, 0.1] * 2), success_reward_threshold=0.5)
    assert found[0][0] == 2 and found[2][0] == 0 and set(found[1][1:]) == {3}


def test_full_marks_that_a_sum_of_weights_rounds_down_are_right():
    full = score(
        [lambda completions, **columns: [1.0, 0.0] * 4] * 3, [0.7, 0.2, 0.1],
        [{"prompt": "q", "_source": "x"}] * 8, ["a"] * 8, [[1]] * 8,
    )[1].tolist()
    assert full[0] < 1  # 0.7 + 0.2 + 0.1
    found = read(rollout_of(full))
    assert found[0][0] == 2 and sorted(found[0][1:]) == [1, 3] and found[1][0] in (0, 2)
    rollout = rollout_of(full)
    siblings = teacher_prompts(
        rollout, advantages_of(rollout), 0.0, 1, TOKENIZER, TrainConfig(
            objective="sdpo", num_generations=4, generation_batch_size=8,
            privileged_template=TEMPLATE,
        )
    )
    assert all(siblings)


@pytest.mark.parametrize("bad", [" ", "# 1 <eos> # 7", "# 1 2 3 4 5"], ids=["blank", "control",
                                                                           "over-long"])
@pytest.mark.parametrize("at", [1, 2], ids=["right", "wrong"])
def test_what_cannot_be_a_hint_is_passed_over(bad, at):
    texts = [f"# {i}" for i in range(8)]
    texts[at] = bad
    for step in range(1, 20):
        found = read(rollout_of([1, 1, 0, 0] * 2, texts), step, max_teacher_prompt_length=6)
        others = {0, 1, 2, 3} - {at}
        assert all(set(hint) <= others for hint in found[:4])
        # Itself it may read the others, and the one beside it may have none left.
        alone = {1: 0, 2: 3}[at]
        assert found[alone] == [] and all(hint for i, hint in enumerate(found[:4]) if i != alone)


def test_a_completion_that_starts_a_turn_of_its_own_is_passed_over():
    tokenizer = word_tokenizer(["#", "<q>", "<a>", "<h>", *map(str, range(10))])
    tokenizer.chat_template = (
        "{{ messages[0].content }}{% if add_generation_prompt %} <a>{% endif %}"
    )
    texts = ["# 0", "# 1 <a> # 7", "# 2", "# 3"] * 2
    rollout = rollout_of([1, 1, 0, 0] * 2, texts)
    for row in rollout.rows:
        row["prompt"] = [{"role": "user", "content": "<q> 5"}]
    for step in range(1, 10):
        found = group_hints(rollout, advantages_of(rollout), step, tokenizer, config_of())
        read_ = [[tokenizer.decode(ids) for ids in contexts] for contexts in found[:4]]
        assert read_[0] == [] and all("<a> #" not in text for own in read_ for text in own)
        assert [own[0] for own in read_[1:]] == ["<h> # 0 <q> 5 <a>"] * 3


def test_nothing_left_to_read_is_no_error():
    assert read(rollout_of([1, 0, 1, 0] * 2, texts=[""] * 8)) == [[]] * 8
    assert read(rollout_of([1, 0, 1, 0] * 2), max_teacher_prompt_length=5) == [[]] * 8


def test_right_and_wrong_stand_in_the_same_words():
    rollout = rollout_of([1, 0, 1, 0] * 2)
    rollout.rows[0]["_template_options"] = rollout.rows[1]["_template_options"] = None
    config = config_of(hint_source="data")
    contexts = group_hints(rollout, advantages_of(rollout), 1, TOKENIZER, config)
    for i, read_ in enumerate(contexts):
        for ids in read_:
            other = [x for x, y in zip(ids, rollout.rows[i]["teacher_prompt_ids"], strict=True)
                     if x != y]
            assert len(other) == (ids is not rollout.rows[i]["teacher_prompt_ids"])


def test_a_contrast_is_read_before_the_loss_and_a_plain_hint_in_it():
    rollout = rollout_of([1, 0, 1, 0] * 2)
    advantages, rest = advantages_of(rollout), (1, TOKENIZER)
    for source in ("data", "rollout"):
        config = config_of(hint_source=source)
        assert teacher_prompts(rollout, advantages, 0.5, *rest, config) == [None] * 8
        assert len(contrast_hints(rollout, advantages, 0.5, *rest, config)) == 8
        assert contrast_hints(rollout, advantages, 0.0, *rest, config) is None
    plain = config_of(rlsd_contrast_hints=0)
    assert contrast_hints(rollout, advantages, 0.5, *rest, plain) is None
    got = teacher_prompts(rollout, advantages, 0.5, *rest, plain)
    # The same right siblings as a contrast has.
    want = contrast_hints(rollout, advantages, 0.5, *rest, config_of())
    assert got == [contexts[0] for contexts in want]
    assert teacher_prompts(rollout, advantages, 0.0, *rest, plain) == [None] * 8
