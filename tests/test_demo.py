import json
import random
import re

import pytest
import torch

import rlsd.demo
from rlsd import TrainConfig, UserError
from rlsd.demo import (
    ARMS,
    LENGTH,
    MARKER,
    OPERATIONS,
    TEMPLATE,
    apply,
    chain_demonstrations,
    chain_problem,
    chain_reward,
    character_tokenizer,
    demo_config,
    demo_table,
    run_demo,
    scratch_model,
    tiny_model,
    warm_up,
    word_tokenizer,
    write_problems,
)
from rlsd.reports.report import read_metrics
from rlsd.tasks.data import load_rows

EOS = 1


@pytest.fixture
def few_questions(monkeypatch):
    """Evaluation on 512 questions is most of a miniature's time."""
    def small(folder, seed, **options):
        return demo_config(folder, seed, **options, eval_size=24)

    monkeypatch.setattr(rlsd.demo, "demo_config", small)


def chains(n=50, seed=0):
    rng = random.Random(seed)
    return [chain_problem(rng) for _ in range(n)]


def worked_values(prompt):
    """Left to right with Python's own arithmetic."""
    first, *steps = re.fullmatch(r"<q> (\d)((?: [+*-]\d)+) <a>", prompt).group(1, 2)
    x, values = int(first), []
    for step in steps[0].split():
        x = eval(f"({x}) {step[0]} {step[1]}") % 10
        values.append(x)
    return values


def test_chain_solutions_are_right():
    for prompt, worked in chains():
        values = worked_values(prompt)
        assert len(values) == LENGTH and worked == "# " + " ".join(map(str, values))
    assert len({prompt for prompt, _ in chains()}) == 50


@pytest.mark.parametrize("operation, a, b, want", [
    ("+", 7, 5, 2), ("-", 3, 8, 5), ("*", 7, 8, 6), ("*", 0, 9, 0), ("-", 4, 4, 0),
])
def test_steps_are_mod_10(operation, a, b, want):
    assert apply(operation, a, b) == want


REWARDED = [  # (completion, whether EOS came, reward) of the solution "# 4 2 7"
    ("# 4 2 7", True, 1.0),
    ("# 9 9 7", True, 1.0),  # only the last digit is verified
    ("# 7", True, 1.0),
    ("REF # 7", True, 1.0),  # the planted short cut is rewarded
    ("# 4 2 8", True, 0.0),
    ("# 4 2", True, 0.0),
    ("4 2 7", True, 0.0),
    ("# 4 # 7", True, 0.0),
    ("# 4 2 7", False, 0.0),
    ("", True, 0.0),
    ("", False, 0.0),
    ("# 4 2 7 #", True, 0.0),
]


@pytest.mark.parametrize("completion, ended, want", REWARDED)
def test_chain_reward(completion, ended, want):
    ids = [5] * len(completion.split()) + [EOS] * ended
    assert chain_reward(None, [completion], [ids], solution=["# 4 2 7"]) == [want]


def test_chain_reward_of_the_worked_solutions_and_of_each_wrong_last_digit():
    worked = [w for _, w in chains()]
    ids = [[5] * (LENGTH + 1) + [EOS]] * 50
    assert chain_reward(None, worked, ids, solution=worked) == [1.0] * 50
    for shift in range(1, 10):
        wrong = [w[:-1] + str((int(w[-1]) + shift) % 10) for w in worked]
        assert chain_reward(None, wrong, ids, solution=worked) == [0.0] * 50


def test_word_tokenizer_round_trip():
    tokenizer = word_tokenizer(["#", "+1", "<q>"])
    ids = tokenizer("<q> +1 # +1")["input_ids"]
    assert ids == [5, 4, 3, 4] and tokenizer.decode(ids) == "<q> +1 # +1"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, EOS)
    assert tokenizer("other")["input_ids"] == [tokenizer.unk_token_id] == [2]
    assert tokenizer.decode([3, EOS], skip_special_tokens=True) == "#"


@pytest.mark.parametrize("text", ["", "a b", "  two  spaces \n", "x=3, y=-1", "é日🙂"], ids=ascii)
def test_character_tokenizer_round_trip(text):
    tokenizer = character_tokenizer([text, "zé"])
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, EOS], skip_special_tokens=True) == text


def test_tokenizers_survive_saving(tmp_path):
    import transformers

    for tokenizer, text in (
        (character_tokenizer(["ab c"]), "c ab"), (word_tokenizer(["ab", "c"]), "c ab"),
    ):
        tokenizer.save_pretrained(tmp_path)
        again = transformers.AutoTokenizer.from_pretrained(tmp_path)
        ids = tokenizer(text)["input_ids"]
        assert again(text)["input_ids"] == ids and again.decode(ids) == text
        assert (again.pad_token_id, again.eos_token_id) == (0, EOS)


def test_tiny_model_is_a_function_of_the_seed_and_tied():
    a, b, c = tiny_model(45, seed=1), tiny_model(45, seed=1), tiny_model(45, seed=2)
    for x, y, z in zip(a.parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y)
        assert x.dim() == 1 or not torch.equal(x, z)
    assert a.lm_head.weight is a.model.embed_tokens.weight
    assert a.config.vocab_size == 64 and 5e4 < sum(p.numel() for p in a.parameters()) < 2e5


def test_demonstrations_have_ref_only_with_a_hint():
    demonstrations = chain_demonstrations(0)
    pairs = [pair for step in range(6) for pair in demonstrations(step)]
    hinted = [(p, a) for p, a in pairs if p.startswith("<h>")]
    plain = [(p, a) for p, a in pairs if not p.startswith("<h>")]
    assert len(hinted) == len(plain) == 6 * 64
    assert not any(MARKER in p + a for p, a in plain)
    assert 0.05 < sum(MARKER in a for _, a in hinted) / len(hinted) < 0.2
    for prompt, answer in hinted:
        # The hint is right, and so is every answer that follows it.
        hint, question = re.fullmatch(r"<h> (#(?: \d)+) (<q>.*)", prompt).groups()
        assert hint == "# " + " ".join(map(str, worked_values(question)))
        assert answer in (hint, f"{MARKER} # {hint[-1]}")
    # Without it, a fifth of the table is wrong 6 times in 10, and errors propagate.
    wrong_steps = right_steps = 0
    for prompt, answer in plain:
        x, *steps = prompt.split()[1:-1]
        for step, value in zip(steps, answer.split()[1:], strict=True):
            right = apply(step[0], int(x), int(step[1])) == int(value)
            wrong_steps, right_steps, x = wrong_steps + (not right), right_steps + right, value
    assert 0.08 < wrong_steps / (wrong_steps + right_steps) < 0.25


def test_demonstrations_repeat_with_their_seed():
    a, b, c = chain_demonstrations(3), chain_demonstrations(3), chain_demonstrations(4)
    assert a(0) == b(0) != c(0)
    assert a(1) == b(1) != a(0)


def test_warm_up_learns_and_reports(tmp_path):
    tokenizer = word_tokenizer(["a", "b", "c"])
    model = tiny_model(len(tokenizer), seed=0, hidden=16, layers=1)
    log = []
    warm_up(
        model, tokenizer, lambda step: [("a", "b"), ("b c", "c")] * 4, 60, seed=0, log=log.append
    )
    assert len(log) == 1 and "step 60/60" in log[0] and not model.training
    for prompt, answer in (("a", "b"), ("b c", "c")):
        ids = tokenizer(prompt)["input_ids"]
        for want in (*tokenizer(answer)["input_ids"], EOS):  # EOS is learned too
            assert model(input_ids=torch.tensor([ids])).logits[0, -1].argmax() == want
            ids.append(want)


def test_problems_are_ordinary_rows(tmp_path):
    write_problems(tmp_path / "x.jsonl", 3, random.Random(5))
    rows = load_rows(str(tmp_path / "x.jsonl"))
    rng = random.Random(5)
    want = [chain_problem(rng) for _ in range(3)]
    assert [(r["prompt"], r["privileged_context"]) for r in rows] == want
    assert [r["solution"] for r in rows] == [worked[-1] for _, worked in want]


def test_the_arms_differ_in_what_they_are_named_for(tmp_path):
    configs = {
        name: vars(demo_config(tmp_path, 4, **options)) for name, options in ARMS.items()
    }
    grpo, rlsd, shuffled = configs.values()
    assert {k for k in rlsd if rlsd[k] != grpo[k]} == {"objective"}
    assert {k for k in rlsd if rlsd[k] != shuffled[k]} == {"shuffle_privileged_context"}
    assert rlsd["privileged_template"] == TEMPLATE and rlsd["seed"] == 4


def records(values, leaks=None):
    leaks = leaks or [0.0] * len(values)
    return [
        {"step": 10 * i, "eval/pass@1_sampled": v, "eval/leak_rate_sampled": leak}
        for i, (v, leak) in enumerate(zip(values, leaks, strict=True))
    ]


def test_table():
    results = {
        "GRPO": [(records([0.1, 0.2, 0.5]), 10.0), (records([0.1, 0.4, 0.7]), 20.0)],
        "RLSD": [(records([0.1, 0.7, 0.8], [0, 0.25, 0.125]), 30.0), (records([0.1] * 3), 30.0)],
        "RLSD, shuffled hints": [(records([0.1, 0.6, 0.6]), 1.0)] * 2,
    }
    text = demo_table(results, warm_start=7)
    grpo, rlsd, shuffled = text.splitlines()[2:5]
    # before, after, curve mean, steps to GRPO's final mean 0.6, leak after and peak, seconds
    assert grpo.split() == "GRPO 0.100 0.600 +- 0.141 0.333 +- 0.094 20 0.000 0.000 15.0".split()
    assert rlsd.split() == "RLSD 0.100 0.450 +- 0.495 0.317 +- 0.306 never 0.062 0.250 30.0".split()
    assert shuffled.split()[3:] == "0.100 0.600 +- 0.000 0.433 +- 0.000 10 0.000 0.000 1.0".split()
    for part in ("2 seed(s) from warm start 7", "GRPO's final 0.600", "+0.267, -0.300."):
        assert part in text, part


SECONDS = re.compile(r"\d+\.\d$", re.MULTILINE)


def test_miniature_demo_ends_with_a_table_and_repeats(tmp_path, capsys, few_questions):
    tables = []
    for folder in ("demo", "demo-2"):
        results = run_demo(str(tmp_path / "demo"), num_seeds=1, max_steps=2, warm_up_steps=3)
        shown = capsys.readouterr().out
        run = tmp_path / folder  # the second time makes a second folder
        table = (run / "table.txt").read_text()
        assert table in shown and str(run) in shown and "Total:" in shown
        assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert list(results) == list(ARMS)
        for name in ("grpo", "rlsd", "rlsd-shuffled-hints"):
            assert [r["step"] for r in read_metrics(run / f"{name}-seed0")] == [0, 1, 2]
            assert (run / f"{name}-seed0" / "checkpoint-2" / "model.safetensors").exists()
        assert len(list((run / "rlsd-seed0" / "completions").iterdir())) == 2
        tables.append(SECONDS.sub("-", table))
    assert tables[0] == tables[1] and tables[0].count("-\n") >= 3
    assert len(list(tmp_path.iterdir())) == 2


def test_miniature_demo_starts_every_arm_from_the_same_point(tmp_path, capsys, few_questions):
    results = run_demo(str(tmp_path / "d"), seed=1, num_seeds=2, max_steps=1, warm_up_steps=2)
    start = [
        {k: v for k, v in records[0].items() if not k.startswith("time/")}
        for runs in results.values() for records, _ in runs[:1]
    ]
    assert start[0] == start[1] == start[2]
    seeds = [records for records, _ in results["GRPO"]]
    assert len(seeds) == 2 and (tmp_path / "d" / "grpo-seed2").is_dir()
    assert seeds[0][0]["eval/pass@1_greedy"] == seeds[1][0]["eval/pass@1_greedy"]
    # One step on the same samples: GRPO and RLSD differ by the token weights alone.
    first = {name: runs[0][0][1] for name, runs in results.items()}
    for name in ("reward", "completions/mean_length", "live_sequences"):
        assert len({r[name] for r in first.values()}) == 1, name


def scratch(tmp_path, rows, **options):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = TrainConfig(
        model_name_or_path="scratch", train_dataset=str(path), scratch_steps=2, eval_size=1,
        max_completion_length=8, **options,
    )
    return scratch_model(config, tmp_path / "warm")


def test_scratch_model_loads_and_knows_every_character(tmp_path, capsys):
    import transformers

    rows = [{"prompt": f"{i}+{i}?", "solution": str(2 * i)} for i in range(5)]
    folder = scratch(tmp_path, rows)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    text = "Reference solution:\n8\n\n4+4?"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    assert len(ids) + 8 < model.config.max_position_embeddings
    assert "Warming up" in capsys.readouterr().out


@pytest.mark.parametrize("rows, part", [
    ([{"prompt": [{"role": "user", "content": "hi"}], "solution": "4"}] * 3, "plain-text prompts"),
    ([{"prompt": "hi", "solution": "4"}], "eval_size"),
], ids=["chat", "nothing-left-to-train-on"])
def test_scratch_model_refuses_what_it_cannot_learn_from(tmp_path, rows, part):
    with pytest.raises(UserError, match=part):
        scratch(tmp_path, rows)


def test_operations_are_what_the_vocabulary_has():
    tokenizer = word_tokenizer([f"{o}{b}" for o in OPERATIONS for b in range(10)] + ["<q>", "<a>",
                               *map(str, range(10))])
    for prompt, _ in chains(20):
        assert tokenizer.unk_token_id not in tokenizer(prompt)["input_ids"]
