"""Loading models, and checkpoints that either exist whole or not at all.

A checkpoint is written to a hidden folder beside its place, flushed to disk and renamed: a crash,
a kill or a full disk leaves the previous one as it was. checkpoint-N loads with from_pretrained;
trainer_state.pt beside the weights holds optimizer, scheduler, RNG, teacher, reference and step,
whole tensors that any number of processes reads. With sharded_checkpoints the large ones lie in
shards/ (torch.distributed.checkpoint), each written by the process that has it. SHA256SUMS, in the
form of sha256sum, has the hash of every file of tensors.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import socket
import tempfile
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.api import CheckpointException

from ..config import UserError
from ..packages import missing, package
from . import gguf_file
from .distributed import placed, whole, whole_weights

PARTIAL = ".partial-"
LEFT = "left-"  # before the name of a checkpoint that a run went back behind
LOCK = ".lock"
CHECKSUMS = "SHA256SUMS"
STATE = ("step", "rng", "optimizer", "scheduler", "teacher", "reference", "teacher_model_kind")
LARGE = ("optimizer", "teacher", "reference", "masters")
SHARDS = "shards"


class Parts(NamedTuple):
    """What a run holds beside the model: an optimizer and its schedule, masters, teachers."""

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    weights: object  # models.MasterWeights
    teacher: object  # teacher.Teacher, or None
    reference: object  # the same

    def state_dict(self):
        return {
            "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
            "teacher": self.teacher.state_dict() if self.teacher else None,
            "reference": self.reference.state_dict() if self.reference else None,
            "masters": self.weights.state_dict(),
            "teacher_model_kind": self.teacher.kind if self.teacher else None,
        }

    def load(self, path):
        """Take everything from a checkpoint, the RNG too; returns its step."""
        state = load_state(path)
        owners = {"teacher": self.teacher, "reference": self.reference}
        for name, owner in owners.items():
            if owner is not None and state[name] is None:
                raise UserError(f"The checkpoint {path} holds no {name}, which this run needs.")
        if self.teacher and state["teacher_model_kind"] != self.teacher.kind:
            raise UserError(
                f"The checkpoint {path} holds a {state['teacher_model_kind']} teacher, but "
                f"teacher_model_kind is {self.teacher.kind}."
            )
        with fitting(path):
            if (Path(path) / SHARDS).is_dir():
                state |= self._read_shards(Path(path) / SHARDS, state)
            for name, owner in owners.items():
                if owner is not None:
                    owner.load_state_dict(state[name])
            self.weights.load_state_dict(state.get("masters"))
            load_optimizer(self.optimizer, self.scheduler, state)
        set_rng_state(state["rng"])
        return state["step"]

    def _read_shards(self, folder, state):
        """The large parts; every process reads what it holds, however many had written."""
        into = {name: part for name, part in self.state_dict().items() if state.get(name) == SHARDS}
        saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        into["optimizer"]["state"] = {
            i: {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p)}
            for i, p in enumerate(self.optimizer.param_groups[0]["params"])
            if f"optimizer.state.{i}.exp_avg" in saved
        }
        into["optimizer"].pop("param_groups")
        dcp.load(into, checkpoint_id=folder)
        return into


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
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def _flush(folder):
    """fsync every file and folder, so that the rename never precedes the bytes."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save(run_dir, step, model, tokenizer, parts, processes, *, sharded=False, limit=None, card=""):
    """Write run_dir/checkpoint-<step>; returns its path, or raises UserError with nothing lost.

    parts: Parts; processes: all of them call this, and the main one writes; sharded: each writes
    what it has of the large parts. limit: how many checkpoints to keep.
    """
    run_dir, state = Path(run_dir), parts.state_dict()
    shards = run_dir / f"{PARTIAL}shards-{step}"
    weights = parts.weights.files(whole_weights(model, keep=processes.main))
    if sharded:
        large = {name: state[name] for name in LARGE if state[name]}
        state |= dict.fromkeys(large, SHARDS)
        large["optimizer"] = {"state": large["optimizer"]["state"]}
        processes.once(lambda: shutil.rmtree(shards, ignore_errors=True))
        try:
            processes.everywhere(lambda: dcp.save(large, checkpoint_id=shards))
        except (CheckpointException, OSError, RuntimeError) as error:
            raise _unsaved(run_dir, step, error) from error
    state = whole(state, keep=processes.main)

    def write(partial):
        save_weights(model, partial, weights)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if sharded:
            os.rename(shards, partial / SHARDS)
        torch.save({"step": step, "rng": rng_state(), **state}, partial / "trainer_state.pt")
        _write_checksums(partial)

    return processes.once(lambda: _write_whole(run_dir, step, write, limit))


def save_weights(model, folder, weights):
    """The model's files, or those of its adapter alone, which transformers writes only with some
    releases of peft."""
    if not getattr(model, "peft_config", None):
        model.save_pretrained(folder, state_dict=weights)
        return
    from peft.functional import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    own = get_peft_model_state_dict(model, state_dict=weights)
    save_file(
        {f"base_model.model.{name}": w.contiguous() for name, w in own.items()},
        folder / "adapter_model.safetensors", metadata={"format": "pt"},
    )
    model.peft_config["default"].save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def _unsaved(run_dir, step, error):
    said = _refusal(run_dir) or reason(error)
    return UserError(
        f"Could not save checkpoint-{step} in {run_dir} ({said}); {standing(run_dir)}."
    )


def _refusal(folder):
    """What the system says to one more MiB in a folder, None if it takes it.

    The layers above hide a full disk or quota: to torch.save it is an "enforce fail".
    """
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=PARTIAL) as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    return None


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _checksums(paths):
    with ThreadPoolExecutor() as threads:  # hashing lets go of the interpreter
        return list(threads.map(_sha256, paths))


def _write_checksums(folder):
    files = sorted(
        p for p in folder.rglob("*")
        if p.suffix in (".safetensors", ".pt", ".distcp") or p.parent.name == SHARDS
    )
    lines = [
        f"{digest}  {path.relative_to(folder)}\n"
        for digest, path in zip(_checksums(files), files, strict=True)
    ]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def verify(path):
    """Refuse a checkpoint with a file of tensors that is not, to the bit, the one written.

    Without SHA256SUMS, as an earlier version wrote it, there is nothing to hold it against.
    """
    path = Path(path)
    try:
        lines = (path / CHECKSUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):  # a .gguf file is none
        return
    wanted = [(path / name, digest) for digest, _, name in (x.partition("  ") for x in lines)]
    missing = [file.name for file, _ in wanted if not file.is_file()]
    found = _checksums([file for file, _ in wanted]) if not missing else []
    damaged = missing + [
        file.name for (file, want), got in zip(wanted, found, strict=False) if got != want
    ]
    if damaged:
        others = [p for p in checkpoints(path.parent) if p.resolve() != path.resolve()]
        instead = f"; take {others[-1]} instead" if others else ""
        raise UserError(
            f"The checkpoint {path} is damaged: {damaged[0]} is not what was written "
            f"({CHECKSUMS}){instead}."
        )


def _write_whole(run_dir, step, write, limit):
    """run_dir/checkpoint-<step> with what write(folder) puts there, or UserError and as before."""
    final, partial = run_dir / f"checkpoint-{step}", run_dir / f"{PARTIAL}checkpoint-{step}"
    replaced = run_dir / f"{PARTIAL}replaced-{step}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        _flush(partial)
        if final.exists():  # a run that went back to an older checkpoint comes by again
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(final, replaced)
        os.rename(partial, final)
        _flush(run_dir)
    except BaseException as error:
        if replaced.exists() and not final.exists():
            os.rename(replaced, final)
        if not isinstance(error, Exception):  # an interrupt
            raise
        raise _unsaved(run_dir, step, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    for left in checkpoints(run_dir):  # a run that went back left later ones, of other weights
        if _step_of(left) > step:
            aside = left.with_name(f"{LEFT}{left.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(left, aside)
    for old in checkpoints(run_dir)[: -limit if limit else 0]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def reason(error):
    """The first sentence of an error, without its full stop."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return re.split(r"\n|(?<=\S)\.\s", text)[0].rstrip(".")


def checkpoints(run_dir):
    """Whole checkpoints of a run, oldest first."""
    found = [
        p for p in Path(run_dir).glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()
    ]
    return sorted(found, key=_step_of)


def _step_of(path):
    return int(path.name.rpartition("-")[2])


def latest(run_dir):
    """The newest whole checkpoint of a run, or None."""
    found = checkpoints(run_dir)
    return found[-1] if found else None


def require_new_run(run_dir):
    """A run never writes into the folder of another."""
    run_dir = Path(run_dir)
    if run_dir.exists() and any(p.name != LOCK for p in run_dir.iterdir()):
        going_on = ", a new or empty folder"  # whose files these are is not known
        if latest(run_dir) is not None:
            going_on = f" or continue it with --resume_from_checkpoint {run_dir}"
        raise UserError(
            f"The run folder {run_dir} already exists; choose another --output_dir{going_on}."
        )


def enter(run_dir, resume_from=None):
    """A RunLock, after checking that a run may start there, or go on from a checkpoint."""
    lock = RunLock(run_dir)
    if resume_from is None:
        require_new_run(run_dir)
    else:
        verify(resume_from)
    return lock


def clear(run_dir):
    """Remove what a run folder holds, but its lock."""
    for path in Path(run_dir).iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink()


class RunLock:
    """Keeps other processes out of a run folder, from before its first byte, while it is referred
    to; UserError where one is inside.

    The kernel lets go when a process ends, however it ends: no lock is ever stale, though its file
    may stay. All RunLocks of a folder in one process are the same, and forked children hold none.
    """

    _held = weakref.WeakValueDictionary()

    def __new__(cls, run_dir):
        folder = Path(run_dir).resolve()
        held = cls._held.get(folder)
        if held is None:
            held, made = super().__new__(cls), not folder.exists()
            held.file = cls._take(folder, run_dir)
            weakref.finalize(held, cls._release, held.file, folder, made, os.getpid())
            cls._held[folder] = held
        return held

    @staticmethod
    def _take(folder, shown):
        while True:
            made = False
            try:
                folder.mkdir(parents=True, exist_ok=True)
                made = True
                file = open(folder / LOCK, "a+", encoding="utf-8", errors="replace")
            except OSError as error:
                if made and isinstance(error, FileNotFoundError):
                    continue  # another run just removed the folder that it had made
                raise UserError(
                    f"The run folder {shown} cannot be made ({error.strerror}); choose another "
                    "--output_dir."
                ) from None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UserError(
                    f"The run folder {shown} is in use by {holder}; wait for its end, or choose "
                    "another --output_dir."
                ) from None
            except OSError as error:
                warnings.warn(
                    f"{shown} lies where files cannot be locked ({error.strerror}); keep other "
                    "runs out of it.", stacklevel=4,
                )
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                    break  # else its run has just ended and removed it
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return file

    @staticmethod
    def _release(file, folder, made, process):
        if os.getpid() == process:
            (folder / LOCK).unlink(missing_ok=True)
            if made:
                with contextlib.suppress(OSError):  # the run is in it
                    folder.rmdir()
        file.close()


def _let_go():
    for held in list(RunLock._held.values()):
        held.file.close()
    RunLock._held.clear()


os.register_at_fork(after_in_child=_let_go)


def standing(run_dir):
    """What is safe on disk, as a clause that ends an error sentence."""
    last = latest(run_dir)
    return f"the last good checkpoint is {last}" if last else "no checkpoint exists yet"


def load_state(path):
    """The contents of trainer_state.pt."""
    try:
        state = torch.load(  # mapped: processes of one machine share its pages
            Path(path) / "trainer_state.pt", map_location="cpu", weights_only=True, mmap=True
        )
        missing = [name for name in STATE if name not in state]
    except Exception as error:
        raise UserError(
            f"The checkpoint {path} cannot be read (trainer_state.pt: {reason(error)})."
        ) from None
    if missing:
        raise UserError(
            f"The checkpoint {path} is not whole: trainer_state.pt has no {missing[0]}."
        )
    return state


@contextlib.contextmanager
def fitting(path):
    """State of a model of another shape, or of damaged bytes, is refused in a sentence."""
    try:
        yield
    except (
        RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError, CheckpointException
    ) as error:
        raise UserError(
            f"The checkpoint {path} is of another shape than this run ({reason(error)}); resume "
            "it with the options that it was written with."
        ) from error


def load_optimizer(optimizer, scheduler, state):
    """Moments and position come from the checkpoint, rates and decay from today's options."""
    groups, rates = optimizer.state_dict()["param_groups"], scheduler.base_lrs
    parameters = optimizer.param_groups[0]["params"]
    moments = {
        i: {name: placed(v, parameters[i]) if v.dim() else v for name, v in of_one.items()}
        for i, of_one in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    for p, moments in optimizer.state.items():  # load_state_dict does not compare shapes
        for value in moments.values():
            if value.dim() and value.shape != p.shape:
                raise ValueError(f"a moment is {tuple(value.shape)}, its weight {tuple(p.shape)}")
    scheduler.load_state_dict({**state["scheduler"], "base_lrs": rates})
    lr = rates[0] * scheduler.lr_lambdas[0](scheduler.last_epoch)
    optimizer.param_groups[0]["lr"], scheduler._last_lr = lr, [lr]


def load_tokenizer(path):
    """The tokenizer of a folder, hub id or .gguf file, with a pad token."""
    if (Path(path) / "adapter_config.json").exists() and missing(["peft"]):
        raise UserError(f"{path} holds a LoRA adapter and needs {package('peft')}.")
    place, options = gguf_file.source(path)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:  # tokenizers and custom code raise their own kinds
        raise UserError(
            f"Cannot load the model {path!r} (its tokenizer: {reason(error)})."
        ) from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer of {path!r} names neither a pad nor an EOS token, so nothing can fill "
            "a batch or end a completion; set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _config_of(path):
    """The config of a model, also of the one under a LoRA adapter."""
    adapter = Path(path) / "adapter_config.json"
    if adapter.exists():
        path = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    path, options = gguf_file.source(path)
    return transformers.AutoConfig.from_pretrained(path, **options)


def load_processor(path):
    """What turns images into inputs, of a model that takes some; else None."""
    try:
        if getattr(_config_of(path), "vision_config", None) is None:
            return None
        if gguf_file.is_gguf(path):
            raise UserError("a .gguf file holds none; take the model's own folder or hub id")
        return transformers.AutoProcessor.from_pretrained(path)
    except Exception as error:  # as for tokenizers
        raise UserError(
            f"Cannot load the model {path!r} (its processor of images: {reason(error)})."
        ) from error


def load_model(path, device, *, dtype=torch.float32, attn_implementation=None):
    """The model of a folder, hub id or .gguf file on the device in eval mode, its LoRA adapter
    with it.

    A weight that the files lack is an error: transformers would draw it at random.
    """
    place, options = gguf_file.source(path)
    try:
        # Some vision-language models are causal LMs to transformers, others are not.
        kind, auto = type(_config_of(path)), transformers.AutoModelForCausalLM
        if kind not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and (
            kind in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        ):
            auto = transformers.AutoModelForImageTextToText
        model, info = auto.from_pretrained(
            place, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True,
            **options,
        )
        if options:
            model = gguf_file.plain(model, auto, dtype)
    except Exception as error:  # safetensors and custom code raise their own kinds
        raise UserError(f"Cannot load the model {path!r} ({reason(error)}).") from error
    absent = sorted(info["missing_keys"])
    if absent:
        raise UserError(
            f"The model {path!r} is not whole: its files lack {len(absent)} of the weights that "
            f"{type(model).__name__} has, first {absent[0]}."
        )
    for name, p in model.named_parameters():  # a sum, which needs no memory, keeps NaN and inf
        if p.dtype.itemsize > 1 and not p.detach().sum().isfinite():
            raise UserError(
                f"The model {path!r} has weights that are not finite, first {name}: its run "
                "diverged or its files are damaged; take an earlier checkpoint or fetch it anew."
            )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device).eval()
    except torch.OutOfMemoryError:
        raise UserError(
            f"The model {path!r} does not fit the memory of {device}; set bf16 and use_peft, or "
            "take a smaller model."
        ) from None
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"Cannot use device {device!r} ({reason(error)}).") from None
