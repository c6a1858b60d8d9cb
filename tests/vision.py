"""A tiny Qwen3-VL with its own processor of images, and pictures for it."""

import random

import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rlsd.demo import word_tokenizer
from rlsd.policy.checkpoint import load_tokenizer

WORDS = [f"w{i}" for i in range(40)]
MARKS = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
CHAT = (
    "{% for m in messages %}{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|>"
    "<|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


class Processor(transformers.Qwen3VLProcessor):
    """Without the part for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name != "video_processor":
            super().check_argument_for_proper_class(argument_name, argument)

    def save_pretrained(self, folder):
        self.tokenizer.save_pretrained(folder)


def load_processor(path):
    """What rlsd.policy.checkpoint.load_processor finds where torchvision is installed."""
    return Processor(
        image_processor=Qwen2VLImageProcessorPil(
            size={"shortest_edge": 64, "longest_edge": 16 * 64}, patch_size=4, merge_size=2,
            temporal_patch_size=2,
        ),
        tokenizer=load_tokenizer(str(path)), video_processor=None, chat_template=CHAT,
    )


def save_qwen3_vl(path):
    tokenizer = word_tokenizer([*WORDS, "user", "assistant"])
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = CHAT
    start, image, end, video = tokenizer.convert_tokens_to_ids(MARKS)
    torch.manual_seed(0)
    model = transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48,
            "max_position_embeddings": 256, "initializer_range": 0.3, "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
            "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
            "initializer_range": 0.3,
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=start,
        vision_end_token_id=end, tie_word_embeddings=True, eos_token_id=1,
    ))
    model.generation_config.eos_token_id = [1, *range(8, 20)]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def picture(seed, width=16, height=24):
    rng = random.Random(seed)
    image = Image.new("RGB", (width, height))
    image.putdata([tuple(rng.randrange(256) for _ in range(3)) for _ in range(width * height)])
    return image
