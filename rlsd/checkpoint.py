"""Loading models, and checkpoints that either exist whole or not at all.

A checkpoint is written to a hidden folder beside its place, flushed to disk and renamed: a crash,
a kill or a full disk leaves the previous one as it was. checkpoint-N loads with from_pretrained;
trainer_state.pt beside the weights holds optimizer, scheduler, RNG, teacher, reference and step.
"""

import os
import random
import re
import shutil
from pathlib import Path

import numpy
import torch
import transformers

from .config import UserError

PARTIAL = ".partial-"
STATE = ("step", "rng", "optimizer", "scheduler", "teacher", "reference", "teacher_model_kind")


def rng_state():
    """The state of every random generator that a run may use."""
    name, keys, *rest = numpy.random.get_state()
    return {
        "python": random.getstate(), "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state):
    """Inverse of rng_state."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _flush(folder):
    """fsync every file and folder, so that the rename never precedes the bytes."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save(run_dir, step, model, tokenizer, state, *, limit=None, card=None):
    """Write run_dir/checkpoint-<step>; returns its path, or raises UserError with nothing lost."""
    run_dir = Path(run_dir)
    final, partial = run_dir / f"checkpoint-{step}", run_dir / f"{PARTIAL}checkpoint-{step}"
    replaced = run_dir / f"{PARTIAL}replaced-{step}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
        torch.save({"step": step, "rng": rng_state(), **state}, partial / "trainer_state.pt")
        _flush(partial)
        if final.exists():  # a run that went back to an older checkpoint comes by again
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(final, replaced)
        os.rename(partial, final)
        _flush(run_dir)
    except Exception as error:
        if replaced.exists() and not final.exists():
            os.rename(replaced, final)
        raise UserError(
            f"Could not save checkpoint-{step} in {run_dir} ({_reason(error)}); "
            f"{standing(run_dir)}."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    for old in checkpoints(run_dir)[: -limit if limit else 0]:
        if old != final:  # a run that went back may have newer ones
            shutil.rmtree(old, ignore_errors=True)
    return final


def _reason(error):
    """The first sentence of an error, without its full stop."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return re.split(r"\n|(?<=\S)\.\s", text)[0].rstrip(".")


def checkpoints(run_dir):
    """Whole checkpoints of a run, oldest first."""
    found = [
        p for p in Path(run_dir).glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()
    ]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def latest(run_dir):
    """The newest whole checkpoint of a run, or None."""
    found = checkpoints(run_dir)
    return found[-1] if found else None


def standing(run_dir):
    """What is safe on disk, as a clause that ends an error sentence."""
    last = latest(run_dir)
    return f"the last good checkpoint is {last}" if last else "no checkpoint exists yet"


def load_state(path):
    """The contents of trainer_state.pt."""
    try:
        state = torch.load(Path(path) / "trainer_state.pt", map_location="cpu", weights_only=True)
        missing = [name for name in STATE if name not in state]
    except Exception as error:
        raise UserError(
            f"The checkpoint {path} cannot be read (trainer_state.pt: {_reason(error)})."
        ) from None
    if missing:
        raise UserError(
            f"The checkpoint {path} is not whole: trainer_state.pt has no {missing[0]}."
        )
    return state


def load_tokenizer(path):
    """The tokenizer of a folder or hub id, with a pad token."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers and custom code raise their own kinds
        raise UserError(
            f"Cannot load the model {path!r} (its tokenizer: {_reason(error)})."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(path, device):
    """The model of a folder or hub id, in fp32 on the device, in eval mode."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except Exception as error:  # safetensors and custom code raise their own kinds
        raise UserError(f"Cannot load the model {path!r} ({_reason(error)}).") from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"Cannot use device {device!r} ({_reason(error)}).") from None
