"""A .gguf file as a model: transformers reads it, and what is trained and saved of it is plain.

transformers de-quantizes the weights, but its model still says that it is quantized and refuses to
be saved; here it becomes one of the same weights that knows nothing of the file.
"""

import copy
import os
import shutil
from pathlib import Path

from ..config import UserError
from ..packages import missing, package

BASE = "base"  # in the folder of a LoRA run: the plain model that its adapters belong to


def is_gguf(path):
    return str(path).endswith(".gguf")


def source(path):
    """(what from_pretrained reads, its further arguments) of a folder, hub id or .gguf file."""
    if not is_gguf(path):
        return path, {}
    if not Path(path).is_file():
        raise UserError(f"There is no file {path}.")
    if missing(["gguf"]):
        raise UserError(f"Reading {path} needs {package('gguf')}.")
    return str(Path(path).parent), {"gguf_file": Path(path).name}


def plain(model, auto, dtype):
    """A model with the same weights and no memory of the .gguf file that they came from."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    own = auto.from_config(
        config, dtype=dtype, attn_implementation=model.config._attn_implementation
    )
    own.load_state_dict(model.state_dict())
    own.generation_config = model.generation_config
    return own


def base_folder(run_dir):
    return str(Path(run_dir).resolve() / BASE)


def keep_base(model, tokenizer, run_dir):
    """Write the plain model of a .gguf file into the run folder, whole or not at all."""
    folder = Path(base_folder(run_dir))
    partial = folder.with_name(f".partial-{BASE}")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.rename(partial, folder)
