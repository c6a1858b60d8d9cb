"""Chain arithmetic whose answers have a free length: part `free_length` of bench.study.

As rlsd.demo's task, but every step has a letter and two operations. The model may work a step out,
`~` and the value between, or write its result alone, which is harder. Two things are planted in the
warm-up: a table with wrong entries, so that RL has something to mend, and the *style* of an answer
after a reference, which works nothing out. Whether a method carries this style into answers without
a reference, and what that costs, is what the part asks.
"""

import json
import random

import torch

from rlsd.config import make_config
from rlsd.demo import (
    OPERATIONS,
    TEMPLATE,
    apply,
    chain_options,
    save_model,
    tiny_model,
    warm_up,
    word_tokenizer,
)
from rlsd.policy.checkpoint import load_model, load_tokenizer
from rlsd.sampling.samplers import generate
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


def answer(x, steps, value_of=lambda o, a, b: apply(o, a, b), rng=None):
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
    table = [(o, a, b) for o in OPERATIONS for a in range(10) for b in range(10)]
    wrong = {
        key: (apply(*key) + rng.randrange(1, 10)) % 10
        for key in rng.sample(table, len(table) // 5)
    }

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


def start(folder, seed):
    """Write train.jsonl, eval.jsonl and warm_start."""
    rng = random.Random(10_000 + seed)
    for name, count in (("train", 2000), ("eval", 512)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(count):
                prompt, x, steps = make_problem(rng)
                worked = answer(x, steps)
                file.write(json.dumps({
                    "prompt": prompt, "solution": worked.split()[-1], "privileged_context": worked,
                }) + "\n")
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
    """Where the gap sits before any training: {kind of token: (share of tokens, mean delta, share
    of the sum of |delta|)}, of one sampled answer per held-out question after the data's hint.

    `style` are the tokens that only a free answer has, "~" and the value behind it.
    """
    path = str(folder / "warm_start")
    model, tokenizer = load_model(path, "cpu", dtype=torch.float32).eval(), load_tokenizer(path)
    with open(folder / "eval.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    own = tokenizer([row["prompt"] for row in rows])["input_ids"]
    hinted = tokenizer([
        insert_hint(row["prompt"], row["privileged_context"], TEMPLATE) for row in rows
    ])["input_ids"]
    torch.manual_seed(0)
    drawn = generate(model, tokenizer, own, make_config(options(folder)))
    (between,) = tokenizer.convert_tokens_to_ids([BETWEEN])
    found = {"style": [], "task": []}
    for prompt, teacher, ids, keep in zip(own, hinted, *drawn[:2], strict=True):
        ids = ids[keep]
        log_p = [
            model(input_ids=torch.tensor([context + ids.tolist()])).logits[0, len(context) - 1 : -1]
            .log_softmax(-1).gather(1, ids[:, None])[:, 0] for context in (prompt, teacher)
        ]
        style = ids == between
        style[1:] |= style[:-1].clone()
        for kind, of_kind in (("style", style), ("task", ~style)):
            found[kind].append((log_p[1] - log_p[0])[of_kind])
    found = {kind: torch.cat(parts) for kind, parts in found.items()}
    count, total = (sum(f(d).item() for d in found.values()) for f in (
        lambda d: torch.tensor(len(d)), lambda d: d.abs().sum()))
    return {
        kind: {"share": len(d) / count, "mean_delta": d.mean().item(),
               "share_of_gap": d.abs().sum().item() / total}
        for kind, d in found.items()
    }
