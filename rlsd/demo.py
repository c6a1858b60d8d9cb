"""The embedded demo, and tiny models trained from scratch where no weights can be downloaded.

Task: left-to-right chain arithmetic mod 10, "x0 o1 .. o12", answered step by step. Multiplying
destroys information, so a chain with a wrong step can still end right: that is where credit per
token helps. The privileged context is the worked solution, put before the question. The warm-up
plants two things on purpose: wrong table entries (a plateau for RL to climb) and the marker REF,
which appears only in hinted demonstrations (a leak that can be counted).
"""

import json
import random
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from .config import UserError, make_config
from .policy.packing import left_pad
from .reports.report import plot_runs, require_packages
from .reports.tables import (
    AFTER,
    BEFORE,
    CURVE_MEAN,
    LEAK_AFTER,
    LEAK_PEAK,
    Column,
    arm_statistics,
    run_summary,
    shown_mean,
    steps_to_baseline,
    text_table,
)
from .tasks.data import load_rows, split_rows
from .tasks.prompts import insert_hint
from .trainer import Trainer

OPERATIONS, MARKER, LENGTH = "+-*", "REF", 12
TEMPLATE = "<h> {privileged_context} {prompt}"
SPECIAL = ["<pad>", "<eos>"]


def apply(operation, a, b):
    """One step of the chain, mod 10."""
    return {"+": a + b, "-": a - b, "*": a * b}[operation] % 10


def chain_problem(rng):
    """(prompt, worked solution) of a random chain; one token per operation with its operand."""
    x = rng.randrange(10)
    steps = [(rng.choice(OPERATIONS), rng.randrange(10)) for _ in range(LENGTH)]
    prompt = " ".join(["<q>", str(x), *[f"{o}{b}" for o, b in steps], "<a>"])
    values = []
    for operation, b in steps:
        x = apply(operation, x, b)
        values.append(x)
    return prompt, " ".join(["#", *map(str, values)])


def chain_reward(prompts, completions, completion_ids, solution, **columns):
    """1.0 for the right last digit, exactly one '#' and an end within the length."""
    return [
        float(c.split()[-1:] == s.split()[-1:] and c.split().count("#") == 1
              and len(ids) == len(c.split()) + 1 and ids[-1] == SPECIAL.index("<eos>"))
        for c, ids, s in zip(completions, completion_ids, solution, strict=True)
    ]


def word_tokenizer(words):
    """A tokenizer with one id per space-separated word."""
    return _wrap(words, pre_tokenizers.WhitespaceSplit(), None)


def character_tokenizer(texts):
    """A tokenizer with one id per character of the texts."""
    split = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    return _wrap(sorted(set("".join(texts))), split, decoders.Fuse())


def _wrap(words, pre_tokenizer, decoder):
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        tokenizer.decoder = decoder
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_model(vocab_size, *, seed, hidden=64, layers=2, positions=128):
    """A Qwen3-architecture model of about 0.1 M parameters, random weights, tied head."""
    torch.manual_seed(seed)
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=-(-vocab_size // 64) * 64, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, head_dim=hidden // 4,
        intermediate_size=3 * hidden, tie_word_embeddings=True, initializer_range=0.06,
        max_position_embeddings=positions, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    ))


def warm_up(model, tokenizer, demonstrations, steps, *, seed, log=print):
    """Supervised steps on demonstrations(step) -> [(prompt, completion), ...]; cross entropy.

    AdamW, learning rate 5e-3 with 20 steps up and a linear way down to a tenth.
    """
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 20, 1 - 0.9 * s / steps)
    )
    model.train()
    began, eos = time.monotonic(), tokenizer.eos_token_id
    for step in range(steps):
        pairs = demonstrations(step)
        encoded = tokenizer([text for pair in pairs for text in pair])["input_ids"]
        prompts, answers = encoded[::2], [ids + [eos] for ids in encoded[1::2]]
        ids, mask = left_pad(
            [p + a for p, a in zip(prompts, answers, strict=True)], tokenizer.pad_token_id, "cpu"
        )
        labels = ids.clone()
        for i, answer in enumerate(answers):
            labels[i, : -len(answer)] = -100
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            log(f"  warm-up step {step + 1}/{steps}  loss {loss.item():.3f}  "
                f"{time.monotonic() - began:.0f} s")
    model.eval()
    return model


def scratch_model(config, folder, *, hidden=128, layers=3):
    """model_name_or_path: scratch. A tiny model, warmed up on the dataset's own solutions.

    Half of the demonstrations carry the privileged context, so that the model can read it.
    Returns the folder to load. The model sees characters; it is for trying things out.
    """
    rows = load_rows(config.train_dataset, size=config.dataset_size, seed=config.data_seed())
    rows, _ = split_rows(rows, config)
    if any(not isinstance(row["prompt"], str) for row in rows):
        raise UserError("model_name_or_path: scratch needs plain-text prompts, not chats.")
    hinted = [
        insert_hint(r["prompt"], r["privileged_context"], config.privileged_template) for r in rows
    ]
    tokenizer = character_tokenizer([*hinted, *(r["solution"] for r in rows), "0123456789-. "])
    longest = max(map(len, hinted)) + config.max_completion_length
    model = tiny_model(
        len(tokenizer), seed=config.seed, hidden=hidden, layers=layers, positions=2 * longest
    )
    rng = random.Random(config.seed)

    def demonstrations(step):
        picked = rng.sample(range(len(rows)), min(32, len(rows)))
        return [(rows[i]["prompt"], rows[i]["solution"]) for i in picked] + [
            (hinted[i], rows[i]["solution"]) for i in picked
        ]

    print(f"Warming up a tiny model from scratch on {config.train_dataset}")
    warm_up(model, tokenizer, demonstrations, config.scratch_steps, seed=config.seed)
    return save_model(model, tokenizer, folder)


def save_model(model, tokenizer, folder):
    """A folder that from_pretrained loads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def wrong_entries(rng):
    """{(operation, a, b): a wrong digit} for a fifth of the table."""
    table = [(o, a, b) for o in OPERATIONS for a in range(10) for b in range(10)]
    return {
        key: (apply(*key) + rng.randrange(1, 10)) % 10
        for key in rng.sample(table, len(table) // 5)
    }


def chain_demonstrations(seed):
    """demonstrations(step) for warm_up: noisy without the hint, clean with it.

    A fixed fifth of the (operation, a, b) table carries a fixed wrong digit, shown with
    probability 0.6, plus 4 % step noise; a tenth of the hinted ones are the short cut REF.
    """
    rng = random.Random(seed)
    wrong = wrong_entries(rng)

    def noisy(prompt):
        x, *steps = prompt.split()[1:-1]
        x, values = int(x), []
        for step in steps:
            key = (step[0], x, int(step[1:]))
            x = wrong[key] if key in wrong and rng.random() < 0.6 else apply(*key)
            x = rng.randrange(10) if rng.random() < 0.04 else x
            values.append(x)
        return " ".join(["#", *map(str, values)])

    def demonstrations(step):
        pairs = []
        for _ in range(64):
            prompt, _ = chain_problem(rng)
            pairs.append((prompt, noisy(prompt)))
        for _ in range(64):
            prompt, worked = chain_problem(rng)
            answer = f"{MARKER} # {worked.split()[-1]}" if rng.random() < 0.1 else worked
            pairs.append((insert_hint(prompt, worked, TEMPLATE), answer))
        return pairs

    return demonstrations


ARMS = {
    "GRPO": {"objective": "grpo"},
    "RLSD": {"objective": "rlsd"},
    "RLSD, shuffled hints": {"objective": "rlsd", "shuffle_privileged_context": True},
}
CAVEATS = """What this shows, and what it does not:
- The gain depends on the warm start. Its 400 steps were chosen after 300 had shown none, which a
  change of rounding alone has since turned into a smaller gain; see
  bench/results/demo_warmup300 in the repository.
- The gain is in speed, on long chains whose errors propagate. Most task variants tried while the
  demo was designed showed little or none, and more rollouts with a higher rate erased it.
- RLSD runs in a strong setting here (eps_w 1, lambda 1 -> 0 over 60 steps). The paper's own
  (eps_w 0.2, lambda 0.5 -> 0 over 50) is not a single-seed win; judge it by many seeds.
- The control shuffles the hints: the method stays, the information goes. It is no neutral
  baseline: in this strong setting a wrong hint misdirects the weights, below plain GRPO.
- The leak marker REF is planted in the warm-up. One on-policy epoch never uses the PPO clip.
- All seeds share one warm start, and other warm starts differ: try --seed 1, 2, 3."""


def chain_options(folder):
    """The ordinary trainer's options for the task, RLSD in the strong setting."""
    return {
        "model_name_or_path": str(folder / "warm_start"),
        "train_dataset": str(folder / "train.jsonl"), "eval_dataset": str(folder / "eval.jsonl"),
        "reward_funcs": ["rlsd.demo.chain_reward"], "privileged_template": TEMPLATE,
        "leak_markers": [MARKER], "eval_size": 512, "max_completion_length": LENGTH + 2,
        "rollout_batch_size": 512, "generation_batch_size": 64, "num_generations": 8,
        "per_device_train_batch_size": 64, "learning_rate": 5e-4, "adam_beta2": 0.98,
        "max_steps": 80, "rlsd_lambda": 1.0, "rlsd_reweight_clip_range": 1.0,
        "rlsd_lambda_decay_steps": 60, "eval_steps": 10, "logging_steps": 20, "save_steps": 0,
        "log_completions_steps": 0, "validate_every": 20,
    }


def demo_config(folder, seed, **options):
    """TrainConfig of one run of the demo."""
    return make_config({**chain_options(folder), "seed": seed, **options})


def write_problems(path, count, rng, problem=chain_problem):
    """A jsonl file of problems, problem(rng) -> (prompt, worked solution), in ordinary columns."""
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            prompt, worked = problem(rng)
            row = {
                "prompt": prompt, "solution": worked.split()[-1], "privileged_context": worked
            }
            file.write(json.dumps(row) + "\n")


def chain_tokenizer():
    """One id per word of the task; 45 words, so that the head has 64 rows."""
    words = ["#", MARKER, "<q>", "<a>", "<h>", *map(str, range(10))]
    return word_tokenizer([*words, *[f"{o}{b}" for o in OPERATIONS for b in range(10)]])


def chain_start(folder, seed, warm_up_steps):
    """Write what all runs of the task share: train.jsonl, eval.jsonl and warm_start."""
    rng = random.Random(10_000 + seed)
    write_problems(folder / "train.jsonl", 2000, rng)
    write_problems(folder / "eval.jsonl", 512, rng)
    tokenizer = chain_tokenizer()
    model = tiny_model(len(tokenizer), seed=seed)
    warm_up(model, tokenizer, chain_demonstrations(seed), warm_up_steps, seed=seed)
    save_model(model, tokenizer, folder / "warm_start")


def run_demo(output_dir="runs/demo", seed=0, num_seeds=3, max_steps=80, warm_up_steps=400):
    """Warm-start once, train every arm on the same problems, print the table, draw the curves.

    One thread: RL steps of this model gain little from two, lose much where cores are shared, and
    so the result does not depend on the number of cores.
    """
    torch.set_num_threads(1)
    began, folder, copies = time.monotonic(), Path(output_dir), 1
    require_packages(demo_config(folder, seed, log_completions_steps=1))
    while True:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            copies += 1
            folder = Path(f"{output_dir}-{copies}")
    print(f"RLSD demo: chain arithmetic mod 10, seed {seed}; everything goes to {folder}\n")
    print("1. Warm start: a 0.1 M parameter Qwen3-architecture model from random weights")
    chain_start(folder, seed, warm_up_steps)

    results = {}
    for k, (name, options) in enumerate(ARMS.items(), 2):
        results[name] = []
        for s in range(seed, seed + num_seeds):
            print(f"{k}. {name}, seed {s}: {max_steps} steps of 8 questions x 8 completions")
            slug = name.lower().replace(",", "").replace(" ", "-")
            show = max_steps // 2 if (name, s) == ("RLSD", seed) else 0
            config = demo_config(
                folder, s, output_dir=str(folder / f"{slug}-seed{s}"), max_steps=max_steps,
                log_completions_steps=show, **options,
            )
            start = time.monotonic()
            records = Trainer(config).train()
            results[name].append((records, time.monotonic() - start))
    plot = plot_runs(
        {name: [records for records, _ in runs] for name, runs in results.items()},
        folder / "curves.png", title=f"Chain arithmetic mod 10, warm start {seed}",
    )
    table = demo_table(results, warm_start=seed)
    (folder / "table.txt").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\n{CAVEATS}\n\nCurves: {plot}   Table: {folder / 'table.txt'}")
    print(f"Total: {time.monotonic() - began:.0f} s")
    return results


def demo_table(results, warm_start):
    """The closing table, as text, from {arm: [(records, seconds) of each seed]}."""
    rows = arm_statistics({
        name: {k: run_summary(records, seconds) for k, (records, seconds) in enumerate(runs)}
        for name, runs in results.items()
    }, "GRPO")
    gains = next(row for row in rows if row["arm"] == "RLSD")["curve_gain"]["each"]
    time_ = Column("time", "s", 7, lambda row: shown_mean(row["seconds"], 1))
    columns = [
        BEFORE, AFTER, CURVE_MEAN, steps_to_baseline("GRPO"), LEAK_AFTER, LEAK_PEAK, time_
    ]
    return "\n".join([
        text_table(rows, columns), "",
        f"Mean +- sd over {len(gains)} seed(s) from warm start {warm_start}, 512 held-out "
        "questions.",
        f"Steps to GRPO end: first evaluation whose mean reaches GRPO's final "
        f"{rows[0]['baseline_end']:.3f}.",
        f"Leak rate: share of unhinted answers with REF. RLSD - GRPO by curve mean, per seed: "
        f"{', '.join(f'{g:+.3f}' for g in gains)}.",
    ])
