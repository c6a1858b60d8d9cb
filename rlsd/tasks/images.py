"""Images in prompts, for vision-language models whose placeholders stand for image tokens.

A row's `images` (or `image`) are paths, PIL images or {"bytes", "path"} as in parquet files. The
processor writes their placeholders into the prompt's tokens; pixels are made anew where a pass
needs them, because those of a whole data set would fill the memory.
"""

import hashlib
import io

import torch

from ..config import UserError


def apply_template(owner, messages, options=None, *, add_generation_prompt=True):
    """The text of a chat by the template of its owner, a tokenizer or processor.

    options: further arguments of the template. Raises UserError, a clause for the row's name.
    """
    try:
        return owner.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options or {}
        )
    except Exception as error:  # a template raises what it likes, as for roles that it refuses
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"its chat template fails with {type(error).__name__}: {reason}") from None


def listed(row):
    """The images of a row as its columns hold them."""
    raw = row.get("images", row.get("image"))
    return raw if isinstance(raw, list | tuple) else [raw]


def picture_of(value):
    """What tells an image of a row from another; None has no picture."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    data = value.tobytes() if hasattr(value, "tobytes") else value
    return hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else data


class PromptImages:
    """The images of one prompt, as the processor of its model sees them."""

    def __init__(self, row, processor):
        from PIL import Image

        self.processor, self.images = processor, []
        for value in listed(row):
            try:
                if isinstance(value, dict):
                    value = io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"]
                if not isinstance(value, Image.Image):
                    value = Image.open(value)
                self.images.append(value.convert("RGB"))
            except Exception as error:  # a broken file raises what it likes
                reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
                raise UserError(f"its image cannot be opened ({reason.rstrip('.')})") from None

    def encode(self, prompt, template_options=None):
        """Token ids of a chat. Images stand where its text says <image>, as in verl's files, or at
        the start of the first user turn, as in TRL."""
        first = next((i for i, m in enumerate(prompt) if m["role"] == "user"), None)
        if first is None:
            raise UserError("its chat has no user message that could carry the images")
        count, placed = len(self.images), sum(m["content"].count("<image>") for m in prompt)
        if placed not in (0, count):
            raise UserError(f"it has {count} images, but its text says <image> {placed} times")
        messages = []
        for i, message in enumerate(prompt):
            content = [{"type": "image"}] * (count if i == first and not placed else 0)
            for k, text in enumerate(message["content"].split("<image>")):
                content += [{"type": "image"}] * (k > 0)
                content += [{"type": "text", "text": text}] * bool(text)
            messages.append({**message, "content": content})
        text = apply_template(self.processor, messages, template_options)
        return list(self.processor(text=[text], images=self.images)["input_ids"][0])

    def pixels(self):
        """{argument of the model: tensor} of all images."""
        return dict(self.processor.image_processor(images=self.images, return_tensors="pt"))


def image_inputs(images, input_ids, image_token_id):
    """Arguments of a pass over rows of input_ids (B, L) whose prompts have these images or None."""
    parts = [prompt.pixels() for prompt in images if prompt is not None]
    joined = {
        name: torch.cat([part[name] for part in parts]).to(input_ids.device)
        for name in (parts[0] if parts else {})
    }
    return joined | {"mm_token_type_ids": (input_ids == image_token_id).long()}
