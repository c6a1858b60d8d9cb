"""What the teacher reads before each completion: the data's hint, or completions of its own group.

A completion stands as the hint in the very template of the data's hints, and never before itself.
None serves that is blank or over-long, spells a control token, which would end its turn, or writes
what starts an assistant's. All of it is a function of the rollout, the seed and the step, so that
every process finds the same.
"""

import itertools

import torch

from ..config import UserError
from ..tasks.prompts import control_token, encode, insert_hint, require_same_start


def teacher_prompts(rollout, advantages, rlsd_lambda, step, tokenizer, config):
    """What the teacher reads in the loss, before each of the B completions: token ids, or None.

    Nothing where a contrast says it all: contrast_hints are read before the loss.
    """
    rows = rollout.rows
    method = config.method
    if method.teacher_reads == "question":
        return [row["prompt_ids"] for row in rows]
    if method.teacher_reads == "sibling":
        return sibling_prompts(rollout, step, tokenizer, config)
    if method.distils:
        return [row["teacher_prompt_ids"] for row in rows]
    if not rlsd_lambda or config.rlsd_contrast_hints:
        return [None] * len(rows)
    if config.hint_source == "rollout":
        found = group_hints(rollout, advantages, step, tokenizer, config)
        return [contexts[0] if contexts else None for contexts in found]
    return [
        row["teacher_prompt_ids"] if weighs else None
        for row, weighs in zip(rows, weighed(advantages, config).tolist(), strict=True)
    ]


def contrast_hints(rollout, advantages, rlsd_lambda, step, tokenizer, config):
    """Of each of the B completions what a contrast reads: [correct, wrong, wrong, ..], token ids.

    Empty where it has none; None where the step is no contrast.
    """
    if not rlsd_lambda or not config.rlsd_contrast_hints:
        return None
    return group_hints(rollout, advantages, step, tokenizer, config)


def weighed(advantages, config):
    """(B,) bool: the sequences whose tokens a hint weighs."""
    return advantages < 0 if config.rlsd_negative_only else advantages != 0


def can_be_reference(rewards, config):
    """(B,) bool: right enough to serve as one; weights .7, .2, .1 add up to 0.9999999999999999."""
    return rewards >= config.success_reward_threshold - 1e-6


def group_hints(rollout, advantages, step, tokenizer, config):
    """[correct hint, wrong hints ..] of each completion that is weighed, else, or without one, [].

    One order is drawn per group, in which each takes the first that are not itself: nearly all of a
    group then read the same few prompts, which their passes can share.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    size, count, found = config.num_generations, config.rlsd_contrast_hints, []
    good = can_be_reference(rollout.rewards, config).tolist()
    weighs = weighed(advantages, config).tolist()
    for first in range(0, len(rollout.rows), size):
        order = (torch.randperm(size, generator=generator) + first).tolist()
        group, of_data = range(first, first + size), config.hint_source == "data"
        right, wrong = [], []
        if any(weighs[i] for i in group):  # one more than needed: a hint is no hint for itself
            right, wrong = (
                list(itertools.islice(
                    _usable([j for j in order if good[j] == kind], rollout, tokenizer, config), most
                )) for kind, most in ((True, 0 if of_data else 2), (False, count and count + 1))
            )
        for i in group:
            correct = [ids for j, ids in right if j != i][:1]
            if of_data and rollout.rows[i]["teacher_prompt_ids"]:
                correct = [rollout.rows[i]["teacher_prompt_ids"]]
            others = [ids for j, ids in wrong if j != i][:count]
            whole = weighs[i] and correct and (others or not count)
            found.append(correct + others if whole else [])
    return found


def _usable(members, rollout, tokenizer, config):
    """(index, prompt with it as the hint) of the completions that can be one."""
    for j in members:
        if can_hint(rollout.texts[j], tokenizer):
            ids = hinted_ids(rollout.rows[j], rollout.texts[j], tokenizer, config)
            if ids is not None:
                yield j, ids


def can_hint(text, tokenizer):
    return bool(text.strip()) and control_token(text, tokenizer) is None


def hinted_ids(row, text, tokenizer, config):
    """Token ids of a row's question with a text as its hint, None where it cannot be one."""
    limit = config.max_teacher_prompt_length
    hinted = insert_hint(
        row["prompt"], text, config.privileged_template, tokenizer.bos_token, config.hint_placement
    )
    read = {**row, "privileged_context": text, "teacher_prompt": None}
    try:
        require_same_start(
            read, hinted, tokenizer, row.get("_template_options"), config.hint_placement
        )
    except UserError:
        return None
    ids = encode(hinted, tokenizer, row)
    return ids if limit is None or len(ids) <= limit else None


def sibling_prompts(rollout, step, tokenizer, config):
    """sdpo: each question with another completion of its group that succeeded as the hint.

    Which one is drawn by seed and step for each; None without one, or where the prompt gets
    over-long.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    right = can_be_reference(rollout.rewards, config).tolist()
    good = [
        marks and can_hint(text, tokenizer)
        for marks, text in zip(right, rollout.texts, strict=True)
    ]
    size, prompts = config.num_generations, []
    for i, row in enumerate(rollout.rows):
        first = i - i % size
        siblings = [j for j in range(first, first + size) if good[j] and j != i]
        if not siblings:
            prompts.append(None)
            continue
        chosen = siblings[int(torch.randint(len(siblings), (1,), generator=generator))]
        prompts.append(hinted_ids(row, rollout.texts[chosen], tokenizer, config))
    return prompts
