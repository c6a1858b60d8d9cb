"""TRL's own tests with RLSDTrainer where they say GRPOTrainer; see run_trl_suite.sh.

    python trl_suite.py make FOLDER            tiny stand-ins for the hub's models and data
    python trl_suite.py compare THEIRS OURS    two junit files, test for test

Loaded by pytest as a plugin it puts our classes in TRL's place, at lambda 0, where the variable
RLSD_SUITE is `ours`. A path that exists is no name of the hub to transformers and datasets, so in
FOLDER the names that the tests use are paths.
"""

import collections
import importlib
import importlib.resources
import json
import os
import sys
import xml.etree.ElementTree as xml
from dataclasses import dataclass
from pathlib import Path

HUB, OURS = "trl-internal-testing", os.environ.get("RLSD_SUITE") == "ours"
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 4096}
# Name on the hub: (classes, chat template, more of the config).
MODELS = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2", "qwen2_5", {}),
    "tiny-Qwen2ForSequenceClassification-2.5": ("Qwen2", "qwen2_5", {"num_labels": 1}),
    "tiny-Qwen3ForCausalLM": ("Qwen3", "qwen3", {"head_dim": 4}),
    "tiny-Qwen3ForSequenceClassification": ("Qwen3", "qwen3", {"head_dim": 4, "num_labels": 1}),
    "tiny-Qwen3MoeForCausalLM": ("Qwen3Moe", "qwen3", {
        "head_dim": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    }),
    "tiny-LlamaForCausalLM-3.2": ("Llama", "llama3_2", {}),
    "tiny-LlamaForSequenceClassification-3.2": ("Llama", "llama3_2", {"num_labels": 1}),
    "tiny-MistralForCausalLM-0.2": ("Mistral", "qwen2_5", {}),
    "tiny-Gemma2ForCausalLM": ("Gemma2", "qwen2_5", {"head_dim": 4}),
    "tiny-Cohere2ForCausalLM": ("Cohere2", "qwen2_5", {}),
    "tiny-GptOssForCausalLM": ("GptOss", "qwen2_5", {
        "head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    }),
    "tiny-Glm4MoeForCausalLM": ("Glm4Moe", "qwen2_5", {
        "head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "moe_intermediate_size": 16,
    }),
}


def save_tokenizer(folder, template):
    """Bytes, and the special tokens of the templates."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({x: i for i, x in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    llama = template.startswith("llama")
    end = "<|eot_id|>" if llama else "<|im_end|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=end, pad_token="<|endoftext|>", padding_side="left",
        bos_token="<|begin_of_text|>" if llama else None,
        additional_special_tokens=["<|im_start|>", "<|start_header_id|>", "<|end_header_id|>"],
    )
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
                          "<think>", "</think>"])
    templates = importlib.resources.files("trl") / "chat_templates"
    tokenizer.chat_template = (templates / f"{template}.jinja").read_text()
    tokenizer.save_pretrained(folder)
    return tokenizer


def make(folder):
    import torch
    import transformers

    for name, (classes, template, more) in MODELS.items():
        path = folder / HUB / name
        tokenizer = save_tokenizer(path, template)
        config = getattr(transformers, f"{classes}Config")(
            **SIZES, **more, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        )
        torch.manual_seed(0)
        kind = name.split("-")[1].removeprefix(classes)
        model = getattr(transformers, classes + kind)(config)
        model.save_pretrained(path)
    questions = [f"What is {i} plus {3 * i}?" for i in range(19)]
    for kind in ("standard", "conversational"):
        path = folder / HUB / "zen" / f"{kind}_prompt_only"
        path.mkdir(parents=True)
        for split, part in (("train", questions[:17]), ("test", questions[17:])):
            rows = [x if kind == "standard" else [{"role": "user", "content": x}] for x in part]
            lines = (json.dumps({"prompt": row}) + "\n" for row in rows)
            (path / f"{split}.jsonl").write_text("".join(lines))
    configs = "".join(
        f"- config_name: {kind}_prompt_only\n  data_files:\n"
        + "".join(f"  - split: {x}\n    path: {kind}_prompt_only/{x}.jsonl\n"
                  for x in ("train", "test"))
        for kind in ("standard", "conversational")
    )
    (folder / HUB / "zen" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


def outcomes(path):
    """Test -> passed, failed or skipped."""
    found = {}
    for case in xml.parse(path).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "skipped" if "skipped" in kinds else "passed"
        outcome = "failed" if {"failure", "error"} & kinds else outcome
        found[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return found


def compare(theirs, ours):
    """Print both counts and what differs; 1 if a test passes with TRL's classes alone."""
    theirs, ours = outcomes(theirs), outcomes(ours)
    for name, found in (("GRPOTrainer", theirs), ("RLSDTrainer", ours)):
        counts = collections.Counter(found.values())
        print(f"{name}: " + ", ".join(f"{counts[x]} {x}" for x in ("passed", "failed", "skipped")))
    lost = [x for x in theirs if theirs[x] == "passed" != ours.get(x)]
    for test in [x for x in theirs if theirs[x] != ours.get(x)]:
        print(f"{test}: {theirs[test]} with GRPOTrainer, {ours.get(test)} with RLSDTrainer")
    if not lost:
        print("Whatever passes with GRPOTrainer passes with RLSDTrainer.")
    return int(bool(lost) or not theirs)


def absent(name):
    if name.startswith("is_") and name.endswith("_available"):
        return lambda: False
    raise AttributeError(name)


def pytest_configure(config):
    import trl

    # Tests of another release ask whether packages are there that this one knows nothing of.
    importlib.import_module("trl.import_utils").__getattr__ = absent
    if OURS:
        for place in (trl, trl.trainer):
            place.GRPOConfig, place.GRPOTrainer = Config, Trainer


if OURS:  # of the module, for checkpoints pickle their class
    from rlsd.integrations.trl import RLSDConfig, RLSDTrainer

    @dataclass
    class Config(RLSDConfig):
        rlsd_lambda: float = 0.0

    class Trainer(RLSDTrainer):
        def __init__(self, model, reward_funcs=None, args=None, *more, **named):
            super().__init__(model, reward_funcs, args or Config("GRPO"), *more, **named)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        sys.exit(compare(*sys.argv[2:]))
