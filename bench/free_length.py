"""Chain arithmetic whose answers have a free length: part `free_length` of bench.study.

As rlsd.demo's task, but every step has a letter and two operations. The model may work a step out,
`~` and the value between, or write its result alone, which is harder. Two things are planted in the
warm-up: a table with wrong entries, so that RL has something to mend, and the *style* of an answer
after a reference, which works nothing out. Whether a method carries this style into answers without
a reference, and what that costs, is what the part asks.
"""

import random

import torch

from rlsd.config import make_config
from rlsd.demo import (
    OPERATIONS,
    TEMPLATE,
    apply,
    chain_options,
    chain_reward,
    save_model,
    tiny_model,
    warm_up,
    word_tokenizer,
    write_problems,
    wrong_entries,
)
from rlsd.policy.checkpoint import load_model, load_tokenizer
from rlsd.policy.distributed import Processes
from rlsd.policy.models import open_policy
from rlsd.sampling.hint_check import gaps
from rlsd.sampling.rollout import roll_out
from rlsd.tasks.data import load_data
from rlsd.tasks.prompts import insert_hint

BETWEEN, LETTERS = "~", "abcd"
WORKED_OUT = 0.5  # share of the steps in the warm-up
LONGEST = 1 + 4 * len(LETTERS) + 1  # "#"; letter, "~" and two values of each step; EOS
WARM_UP_STEPS = 2000


def make_tokenizer():
    words = ["#", BETWEEN, "<q>", "<a>", "<h>", *LETTERS, *map(str, range(10))]
    return word_tokenizer([*words, *[f"{o}{b}" for o in OPERATIONS for b in range(10)]])


def make_problem(rng):
    """(prompt, first digit, steps): a step is a letter and two (operation, operand)."""
    def operation():
        return rng.choice(OPERATIONS), rng.randrange(10)

    x, steps = rng.randrange(10), [(letter, operation(), operation()) for letter in LETTERS]
    words = [w for letter, *pair in steps for w in (letter, *(f"{o}{b}" for o, b in pair))]
    return " ".join(["<q>", str(x), *words, "<a>"]), x, steps


def answer(x, steps, value_of=apply, rng=None):
    """A solution: by default right and terse, with `rng` in the free style."""
    words = ["#"]
    for letter, (o, b), (p, c) in steps:
        between = value_of(o, x, b)
        x = value_of(p, between, c)
        words.append(letter)
        if rng is not None and rng.random() < WORKED_OUT:
            words += [BETWEEN, str(between)]
        words.append(str(x))
    return " ".join(words)


def terse(text):
    """The results alone."""
    kept, words = [], iter(text.split())
    for word in words:
        if word == BETWEEN:
            next(words)
        else:
            kept.append(word)
    return " ".join(kept)


def demonstrations_of(seed):
    """demonstrations(step) for warm_up: free and partly wrong, or terse and right after a hint.

    A fixed fifth of the (operation, a, b) table is wrong with probability 0.6, and 2 % of the
    values are noise. A third of the hints is itself in the free style, as a sibling's answer is.
    """
    rng = random.Random(seed)
    wrong = wrong_entries(rng)

    def value_of(*key):
        if rng.random() < 0.02:
            return rng.randrange(10)
        return wrong[key] if key in wrong and rng.random() < 0.6 else apply(*key)

    def demonstrations(step):
        pairs = []
        for _ in range(64):
            prompt, x, steps = make_problem(rng)
            pairs.append((prompt, answer(x, steps, value_of, rng)))
        for _ in range(64):
            prompt, x, steps = make_problem(rng)
            free = rng.random() < 1 / 3
            hint = answer(x, steps, value_of, rng) if free else answer(x, steps)
            pairs.append((insert_hint(prompt, hint, TEMPLATE), terse(hint)))
        return pairs

    return demonstrations


def solved(rng):
    """(prompt, worked solution) of a random problem."""
    prompt, x, steps = make_problem(rng)
    return prompt, answer(x, steps)


def start(folder, seed):
    """Write train.jsonl, eval.jsonl and warm_start."""
    rng = random.Random(10_000 + seed)
    for name, count in (("train", 2000), ("eval", 512)):
        write_problems(folder / f"{name}.jsonl", count, rng, solved)
    tokenizer = make_tokenizer()
    model = tiny_model(len(tokenizer), seed=seed, positions=256)
    warm_up(model, tokenizer, demonstrations_of(seed), WARM_UP_STEPS, seed=seed)
    save_model(model, tokenizer, folder / "warm_start")


def options(folder):
    """The demo's options, with room for working every step out."""
    return chain_options(folder) | {
        "max_completion_length": LONGEST, "leak_markers": [], "validate_every": 0,
        "logging_steps": 80,
    }


@torch.no_grad()
def style_gap(folder):
    """Where the gap sits before any training, on an answer to each of the held-out questions.

    Returns {kind of token: share of all tokens, mean delta in nats, share of the sum of |delta|}.
    `style` are the tokens that only a free answer has, "~" and the value behind it.
    """
    held_out = {"train_dataset": str(folder / "eval.jsonl"), "eval_dataset": None, "eval_size": 0}
    config = make_config(options(folder) | held_out)  # whose rows keep their hints
    path = config.model_name_or_path
    model, tokenizer = load_model(path, "cpu", dtype=torch.float32), load_tokenizer(path)
    rows, _ = load_data(config, tokenizer, lambda *_: None)
    torch.manual_seed(0)
    out = roll_out(model, tokenizer, rows, config, [chain_reward], Processes(config))
    gap = gaps(open_policy(model, tokenizer.pad_token_id, config), out, config)
    (between,) = tokenizer.convert_tokens_to_ids([BETWEEN])
    style = out.completion_ids == between
    style[:, 1:] |= style[:, :-1].clone()
    total, count = gap.abs().sum(), out.mask.sum()
    return {
        kind: {"share": (at.sum() / count).item(), "mean_delta": gap[at].mean().item(),
               "share_of_gap": (gap[at].abs().sum() / total).item()}
        for kind, at in (("style", style & out.mask), ("task", ~style & out.mask))
    }
