"""Tiny agents for TRL's trainers: what is said in several turns, environments, and RLSD after such
turns in plain PyTorch to compare with."""

import copy
import functools
import importlib.resources
import json
import random

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from trl_runs import PlainHookA, Recorder

from rlsd.integrations.trl import RLSDConfig

TEMPLATE = "Known: {privileged_context}\n{prompt}"
MARKS = {
    "qwen3": ["<|im_end|>", "<|endoftext|>", "<|im_start|>"],
    "llama3_1": ["<|eot_id|>", "<|finetune_right_pad_id|>", "<|start_header_id|>",
                 "<|end_header_id|>", "<|begin_of_text|>", "<|eom_id|>"],
}
OF_TOOL = {"qwen3": "<tool_response>", "llama3_1": "<|start_header_id|>ipython"}  # in later turns


def call(template, name, **arguments):
    if template == "qwen3":
        said = json.dumps({"name": name, "arguments": arguments})
        return f"<tool_call>\n{said}\n</tool_call>"
    return json.dumps({"name": name, "parameters": arguments})


@functools.cache
def tokenizer_of(template):
    """Bytes and the commonest pairs of the template, which it renders as the hub's own would."""
    text = (importlib.resources.files("trl") / "chat_templates" / f"{template}.jinja").read_text()
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    ))
    end, pad, *others = MARKS[template]
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=end, pad_token=pad, padding_side="left",
        bos_token="<|begin_of_text|>" if "<|begin_of_text|>" in others else None,
        additional_special_tokens=others,
    )
    made.add_tokens(["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
                     "<think>", "</think>"])
    made.chat_template = text
    return made


@functools.cache
def model_of(template):
    """Sharpened, so that the hint matters."""
    tokenizer = tokenizer_of(template)
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, intermediate_size=32, max_position_embeddings=4096,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    ))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p *= 12
    return model


def questions(count=4):
    return [
        {"prompt": [{"role": "user", "content": f"What is {i}?"}], "solution": f"It is {7 * i}."}
        for i in range(count)
    ]


def look(where: str) -> str:
    """
    Looks somewhere.

    Args:
        where: The place.
    """
    return f"seen at {where}"


class Shop:
    """Counts its episodes, so that no two sequences read the same."""

    opened = 0

    def reset(self, **row):
        Shop.opened += 1
        self.seen, self.feedback = f" Shelf {Shop.opened}.", None
        return self.seen

    def buy(self, what: str) -> str:
        """
        Buys a thing.

        Args:
            what: The thing.
        """
        self.feedback = f"bought {what}"
        return f"sold {what} from{self.seen}"


class Quiet:
    """Adds nothing to the prompt."""

    def reset(self, **row):
        return None

    def ring(self, times: int) -> str:
        """
        Rings the bell.

        Args:
            times: How often.
        """
        return "ding " * times


def speaking(cls, template, tool="look", **arguments):
    """A trainer class that says what is written here: every third sequence calls no tool.

    tool: a name, or of a prompt (name, arguments).
    """
    tokenizer = tokenizer_of(template)

    def says(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]

    class Speaking(cls):
        def _generate_single_turn(self, prompt_ids, *more, **named):
            rng, turns = random.Random(sum(map(sum, prompt_ids))), []
            for i, ids in enumerate(prompt_ids):
                text, answer = tokenizer.decode(ids), f"So it is {rng.randrange(99)}."
                if OF_TOOL[template] not in text and i % 3:
                    name, given = tool(text) if callable(tool) else (tool, arguments)
                    answer = call(template, name, **given)
                turns.append(says(answer))
            return turns, None

    return Speaking


def rewards(completions, completion_ids, **columns):
    return [len(ids) % 3 + (sum(ids) % 5) / 4 for ids in completion_ids]


def make_agent(cls, folder, template, *, tool="look", arguments=None, data=None, more=None,
               **changed):
    """(trainer, recorder) of a run of scripted turns; `more` are arguments of the trainer.

    data: rows, default questions(); none with [].
    """
    args = RLSDConfig(**{
        "output_dir": str(folder / "run"), "use_cpu": True, "bf16": False, "report_to": "none",
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 200,
        "max_steps": 2, "logging_steps": 1, "learning_rate": 0.02, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "save_strategy": "no",
        "gradient_checkpointing": False, "disable_tqdm": True, "privileged_template": TEMPLATE,
        **changed,
    })
    model = copy.deepcopy(model_of(template))
    trainer = speaking(cls, template, tool, **(arguments or {}))(
        model, rewards, args, None if data == [] else Dataset.from_list(data or questions()),
        processing_class=copy.deepcopy(tokenizer_of(template)), **(more or {}),
    )
    return trainer, Recorder(trainer)


def run_agent(cls, folder, template, **options):
    Shop.opened = 0
    trainer, recorder = make_agent(cls, folder, template, **options)
    trainer.train()
    return trainer, recorder


class PlainAgent(PlainHookA):
    """PlainHookA after the messages of several turns, its contexts rendered here."""

    def hint(self, i, row):
        return row["solution"]

    def _generate_and_score_completions(self, inputs):
        out = super(PlainHookA, self)._generate_and_score_completions(inputs)
        if self.rollouts:
            self._follow()
        self.rollouts += 1
        out["questions"], out["hinted"] = [], []
        for i, row in enumerate(inputs):
            text, tools = row["prompt"][0]["content"], self.tools
            if self.environments is not None:
                text += getattr(self.environments[i], "seen", "")
                tools = self._env_tools[self._batch_environments[i]]
            hint = self.hint(i, row)
            for name, content in (
                ("questions", text), ("hinted", f"Known: {hint}\n{text}" if hint else text)
            ):
                out[name].append(self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": content}], tools=tools or None, return_dict=False,
                    chat_template=self.chat_template, add_generation_prompt=True,
                ))
        return out
