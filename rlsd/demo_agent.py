"""The agent task: follow links in a store that only a tool can read. `python -m rlsd.demo_agent`.

"follow 5 from k7" asks where five links lead; which key links to which is drawn anew for every
question and stands behind the tool `lookup`. The warm-up plants two faults: a fixed half of the
keys is often asked for wrongly, and turns are sometimes counted wrongly. The privileged context is
the path, so the teacher knows which key a call should name and when to stop.
"""

import json
import random
import sys
from pathlib import Path

from .demo import save_model, tiny_model, warm_up, word_tokenizer

KEYS = [f"k{i}" for i in range(12)]
HOPS = (4, 5, 6)
ROLES = ["<user>", "<tool>", "<assistant>"]
HINTED = "path {privileged_context} . {prompt}"
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}"
    "{% for c in m.tool_calls or [] %} <call> "
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}} </call>'
    "{% endfor %} <eos> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
CALLS = {
    "defaults": {"role": "assistant"}, "start_anchor": "<assistant>",
    "fields": {
        "tool_calls": {
            "open": "<call>", "close_pattern": r"</call>\s*", "repeats": True, "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<eos>\s*", "content": "text"},
    },
}


class Store:
    """An environment by TRL's contract: `lookup` is its tool, `links` a column of the data."""

    def reset(self, links, **columns):
        """Begin an episode: the links of one question, as JSON."""
        self.links, self.asked = json.loads(links), []
        self.feedback = None

    def lookup(self, key: str) -> str:
        """The key that a key links to.

        Args:
            key: The key to look up, such as k7.
        """
        self.asked.append(key)
        self.feedback = " ".join(self.asked)
        return self.links[key]


def question(rng):
    """A row: prompt, solution, the path as privileged context, and what the store holds."""
    links = dict(zip(KEYS, rng.choices(KEYS, k=len(KEYS)), strict=True))
    key, hops = rng.choice(KEYS), rng.choice(HOPS)
    path = [key]
    for _ in range(hops):
        path.append(links[path[-1]])
    return {
        "prompt": [{"role": "user", "content": f"follow {hops} from {key}"}],
        "solution": path[-1], "privileged_context": " ".join(path), "links": json.dumps(links),
    }


def reached(prompts, completions, solution, **columns):
    """1.0 where the last turn is the key that the path ends with, alone."""
    return [
        float(c[-1]["role"] == "assistant" and c[-1]["content"].strip() == s)
        for c, s in zip(completions, solution, strict=True)
    ]


def agent_tokenizer():
    """One id per word; the parts of a call are words, and roles are control tokens."""
    words = ["<call>", "</call>", '{"name":', '"lookup",', '"arguments":', '{"key":']
    words += ["follow", "from", "path", ".", *map(str, HOPS), *KEYS]
    tokenizer = word_tokenizer([*words, *[f'"{key}"}}}}' for key in KEYS]])
    tokenizer.add_special_tokens({"additional_special_tokens": ROLES})
    tokenizer.chat_template, tokenizer.response_template = CHAT, CALLS
    return tokenizer


def _call(key):
    call = {"name": "lookup", "arguments": {"key": key}}
    return f"<call> {json.dumps(call)} </call> <eos>"


def demonstrations(seed, count=64):
    """demonstrations(step) for warm_up: faulty without the path, right with it."""
    rng = random.Random(seed)
    weak = {key: rng.choice(KEYS) for key in rng.sample(KEYS, len(KEYS) // 2)}

    def played(row, faulty):
        links, path = json.loads(row["links"]), row["privileged_context"].split()
        hops, key, turns = len(path) - 1, path[0], []
        if faulty and rng.random() < 0.2:
            hops += rng.choice((-1, 1))
        for _ in range(hops):
            asked = weak[key] if faulty and key in weak and rng.random() < 0.7 else key
            key = links[asked]
            turns.append(f"{_call(asked)} <tool> {key} <eos> <assistant>")
        return " ".join([*turns, key])

    def of_step(step):
        pairs = []
        for k in range(2 * count):
            row, hinted = question(rng), k % 2 == 1
            text = row["prompt"][0]["content"]
            if hinted:
                text = HINTED.format(privileged_context=row["privileged_context"], prompt=text)
            pairs.append((f"<user> {text} <eos> <assistant>", played(row, not hinted)))
        return pairs

    return of_step


def agent_start(folder, seed=0, warm_up_steps=600, log=print):
    """Write what all runs share: train.jsonl, eval.jsonl and warm_start."""
    folder, rng = Path(folder), random.Random(20_000 + seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 2000), ("eval", 256)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(question(rng)) + "\n" for _ in range(count))
    tokenizer = agent_tokenizer()
    model = tiny_model(len(tokenizer), seed=seed)
    warm_up(model, tokenizer, demonstrations(seed), warm_up_steps, seed=seed, log=log)
    save_model(model, tokenizer, folder / "warm_start")


def agent_options(folder):
    """TrainConfig options of the task, as in examples/agent.yaml."""
    folder = Path(folder)
    return {
        "model_name_or_path": str(folder / "warm_start"),
        "train_dataset": str(folder / "train.jsonl"), "eval_dataset": str(folder / "eval.jsonl"),
        "environment_factory": "rlsd.demo_agent.Store",
        "reward_funcs": ["rlsd.demo_agent.reached"], "privileged_template": HINTED,
        "eval_size": 256, "max_completion_length": 96, "rollout_batch_size": 512,
        "generation_batch_size": 64, "num_generations": 8, "per_device_train_batch_size": 64,
        "learning_rate": 2e-4, "adam_beta2": 0.98, "max_steps": 40, "eval_steps": 5,
        "logging_steps": 10, "save_steps": 0, "log_completions_steps": 0,
    }


if __name__ == "__main__":
    agent_start(*sys.argv[1:2] or ["runs/agent"])
