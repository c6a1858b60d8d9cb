"""Checkpoints survive a kill, a full disk and damage: whole, or not there at all. Loading."""

import errno
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from families import FAMILIES, build
from runs import (
    assert_same,
    child,
    make_trainer,
    one_sentence,
    parameters,
    quick,  # noqa: F401
    sum_reward,
    without_times,
    write_config,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import rlsd.reports.report
from rlsd import UserError
from rlsd.cli import main
from rlsd.demo import word_tokenizer
from rlsd.policy import checkpoint


def digest(folder):
    """Name and hash of every file below a folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*") if p.is_file()
    }


def names(run):
    return sorted(p.name for p in run.iterdir() if "checkpoint" in p.name or "partial" in p.name)


KILL = """
import os, signal, sys
import torch
import rlsd.policy.checkpoint
from rlsd.cli import main

victim, config = sys.argv[1:]
real = {"rename": os.rename, "save": torch.save}

def rename(source, target):
    if str(target).endswith("checkpoint-4"):
        os.kill(os.getpid(), signal.SIGKILL)
    real["rename"](source, target)

def save(state, path):
    real["save"](state, path)
    if "checkpoint-4" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

if victim == "rename":
    os.rename = rename
else:
    torch.save = save
sys.exit(main(["train", "--config", config]))
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Records and parameters of the run that the kills interrupt."""
    torch.set_num_threads(1)
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), **INTERRUPTED)
    return without_times(trainer.train()), parameters(trainer.model)


INTERRUPTED = {"max_steps": 6, "save_steps": 2, "teacher_sync_steps": 3}


@pytest.mark.parametrize("victim", ["rename", "save"])
def test_kill_in_the_middle_of_a_checkpoint(victim, uninterrupted, tmp_path):
    process = child("-c", KILL, victim, write_config(tmp_path, **INTERRUPTED))
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    run = tmp_path / "run"
    assert names(run) == [".partial-checkpoint-4", "checkpoint-2"]
    assert checkpoint.latest(run) == run / "checkpoint-2"
    before = digest(run / "checkpoint-2")
    assert main(["train", "--resume_from_checkpoint", str(run)]) == 0
    assert names(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert digest(run / "checkpoint-2") == before
    records, want = uninterrupted
    assert without_times(rlsd.reports.report.read_metrics(run)) == records
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoint-6")
    assert_same(parameters(model), want)


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["weights", "state", "metrics"])
def test_full_disk_is_one_sentence(what, tmp_path, monkeypatch, capsys):
    run, digests = tmp_path / "run", []
    owner, name = {
        "weights": (transformers.PreTrainedModel, "save_pretrained"),
        "state": (torch, "save"), "metrics": (rlsd.reports.report.Reporter, "_write"),
    }[what]

    def reward(completions, **columns):
        if (run / "checkpoint-1").exists() and not digests:
            digests.append(digest(run / "checkpoint-1"))
            monkeypatch.setattr(owner, name, full)
        return [float(i % 3) for i in range(len(completions))]

    monkeypatch.setattr("runs.sum_reward", reward)
    config = write_config(tmp_path, max_steps=3, save_steps=1)
    capsys.readouterr()
    assert main(["train", "--config", config]) == 2
    message = one_sentence(capsys.readouterr().err)
    assert "No space left on device" in message
    if what != "metrics":
        assert "checkpoint-2" in message and f"{run}/checkpoint-1." in message
    assert names(run) == ["checkpoint-1"]
    assert digest(run / "checkpoint-1") == digests[0]
    checkpoint.load_state(run / "checkpoint-1")


def limited_reward(prompts, completions, completion_ids, **columns):
    """From the third call on no file may grow past 40 kB: less than trainer_state.pt needs."""
    import resource

    limited_reward.calls = getattr(limited_reward, "calls", 0) + 1
    if limited_reward.calls == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    return sum_reward(prompts, completions, completion_ids)


def test_real_file_size_limit_is_one_sentence(tmp_path):
    config = write_config(
        tmp_path, max_steps=4, save_steps=2, reward_funcs=["test_checkpoint.limited_reward"]
    )
    here = os.pathsep.join([*sys.path, os.path.dirname(__file__)])
    process = child(
        "-m", "rlsd.cli", "train", "--config", config, environment={"PYTHONPATH": here}
    )
    _, stderr = process.communicate(timeout=120)
    run = tmp_path / "run"
    assert process.returncode == 2
    message = one_sentence(stderr)
    assert f"Could not save checkpoint-4 in {run} (File too large)" in message
    assert f"{run}/checkpoint-2." in message
    assert names(run) == ["checkpoint-2"]
    size = (run / "checkpoint-2" / "trainer_state.pt").stat().st_size
    assert size > 40_000 > (run / "checkpoint-2" / "model.safetensors").stat().st_size
    checkpoint.load_state(run / "checkpoint-2")


def test_bytes_are_flushed_before_the_rename_and_the_rename_after_it(tmp_path, monkeypatch):
    trainer, events = make_trainer(tmp_path, max_steps=1), []
    sync, rename = os.fsync, os.rename

    def recorded_sync(handle):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        sync(handle)

    def recorded_rename(source, target):
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    trainer.train()
    before, after = events[: events.index("rename")], events[events.index("rename") :]
    assert {"model.safetensors", "trainer_state.pt", ".partial-checkpoint-1"} <= set(before)
    assert "run" in after


def test_failed_replacement_puts_the_old_checkpoint_back(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    run, rename = tmp_path / "run", checkpoint.os.rename
    before = digest(run / "checkpoint-1")

    def second_fails(source, target):
        if target == run / "checkpoint-1" and "replaced" not in source.name:
            full()
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", second_fails)
    with pytest.raises(UserError, match="No space left on device.*checkpoint-1\\.$"):
        trainer.save()
    assert names(run) == ["checkpoint-1"] and digest(run / "checkpoint-1") == before


@pytest.mark.parametrize("limit, kept", [(None, [1, 2, 3, 4, 5]), (2, [4, 5]), (1, [5])])
def test_save_total_limit_keeps_the_newest(limit, kept, tmp_path):
    make_trainer(tmp_path, max_steps=5, save_steps=1, save_total_limit=limit).train()
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run")] == [
        f"checkpoint-{step}" for step in kept
    ]


def test_save_total_limit_never_removes_what_was_just_written(tmp_path):
    # A run that went back to an older checkpoint writes lower numbers than those that lie there.
    trainer = make_trainer(tmp_path, max_steps=3, save_total_limit=1)
    (tmp_path / "run" / "checkpoint-9").mkdir(parents=True)
    trainer.step = 3
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert (trainer.save() / "trainer_state.pt").exists()


def test_latest_ignores_partial_and_odd_names(tmp_path):
    assert checkpoint.latest(tmp_path) is None and checkpoint.latest(tmp_path / "none") is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-", "checkpoint-x", "mycheckpoint-40",
                 "checkpoint-99.bak", "checkpoint-old-50", ".partial-checkpoint-20"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-60").write_text("a file")
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-10"


def damage(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "empty-dict":
        torch.save({}, path)
    else:
        path.write_bytes(
            {"truncated": data[: len(data) // 2], "garbage": b"garbage", "empty": b""}[how]
        )


@pytest.mark.parametrize(
    "file, how",
    [("trainer_state.pt", how)
     for how in ("truncated", "garbage", "empty", "missing", "empty-dict")]
    + [("model.safetensors", how) for how in ("truncated", "garbage", "missing")]
    + [("config.json", "garbage"), ("tokenizer.json", "truncated")],
)
def test_damaged_checkpoint_is_one_sentence(file, how, tmp_path, capsys):
    make_trainer(tmp_path, max_steps=1).train()
    saved = tmp_path / "run" / "checkpoint-1"
    damage(saved / file, how)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert main(["train", "--resume_from_checkpoint", str(saved), "--max_steps", "2"]) == 2
    message = one_sentence(capsys.readouterr().err)
    assert str(saved) in message
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics


def draws():
    return [
        random.random(), random.gauss(0, 1), numpy.random.rand(), numpy.random.randn(),
        torch.rand(3).tolist(), torch.randn(3).tolist(),
    ]


def test_rng_state_round_trip_through_a_file(tmp_path):
    draws()  # leaves one spare Gaussian in Python's and in numpy's generator
    torch.save(checkpoint.rng_state(), tmp_path / "rng.pt")
    want = draws()
    assert draws() != want
    checkpoint.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draws() == want


def test_interrupt_while_saving_leaves_no_partial_folder(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=1)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert names(tmp_path / "run") == []


def test_interrupt_between_the_renames_keeps_a_checkpoint(tmp_path, monkeypatch):
    trainer, run, rename = make_trainer(tmp_path, max_steps=1), tmp_path / "run", os.rename
    trainer.train()
    before = digest(run / "checkpoint-1")

    def interrupted(source, target):
        rename(source, target)
        if Path(target).name == ".partial-replaced-1":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.save()
    assert names(run) == ["checkpoint-1"] and digest(run / "checkpoint-1") == before


def test_after_going_back_the_newest_checkpoint_is_the_runs_own(tmp_path, capsys):
    make_trainer(tmp_path, max_steps=4, save_steps=1).train()
    run = tmp_path / "run"
    want = digest(run / "checkpoint-4")
    back = make_trainer(tmp_path, max_steps=2, resume_from=run / "checkpoint-1", learning_rate=0.1)
    back.train()
    assert [p.name for p in checkpoint.checkpoints(run)] == ["checkpoint-1", "checkpoint-2"]
    loaded = checkpoint.load_model(str(checkpoint.latest(run)), "cpu")
    assert_same(parameters(loaded), parameters(back.model))  # what eval, push and a resume take
    assert digest(run / "left-checkpoint-4") == want


# Loading


def test_unknown_architecture_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    with pytest.raises(UserError, match="^Cannot load the model .*nonesuch.*\\.$") as error:
        checkpoint.load_model(str(tmp_path), "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["flash_attention_2", "nonesuch"])
def test_attention_that_cannot_run_is_one_sentence(name, tmp_path):
    build("llama3").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="^Cannot load the model .*\\.$") as error:
        checkpoint.load_model(str(tmp_path), "cpu", attn_implementation=name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["missing", "shape"])
def test_weights_that_do_not_fit_are_refused(how, tmp_path):
    build("llama3").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "missing":
        del weights[name]
    else:
        weights[name] = weights[name][:-1].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        checkpoint.load_model(str(tmp_path), "cpu")
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    if how == "missing":
        assert "lack 1 of the weights" in str(error.value) and name in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    model = build("llama3")
    with torch.no_grad():  # of a token that no check at the start would meet
        model.model.embed_tokens.weight[50, 3] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not finite, first model.embed_tokens.weight: its run div"):
        checkpoint.load_model(str(tmp_path), "cpu")


def test_a_tokenizer_without_pad_and_eos_is_refused(tmp_path):
    tokenizer = word_tokenizer(["a"])
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert checkpoint.load_tokenizer(str(tmp_path)).pad_token == "<eos>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="names neither a pad nor an EOS token.*set eos_token"):
        checkpoint.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models_load(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path)
    loaded = checkpoint.load_model(str(tmp_path), "cpu")
    for (name, p), q in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q), name


# Full disks, checksums, locks


@pytest.mark.parametrize("layer", [
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    SafetensorError("Error while serializing: I/O error"),
    OSError("Error writing bytes to file"),
], ids=["torch", "safetensors", "arrow"])
@pytest.mark.parametrize("refused", [errno.ENOSPC, errno.EDQUOT, None])
def test_a_full_disk_has_its_name_whatever_layer_reports_it(layer, refused, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=1)

    def fails(*args, **kwargs):
        raise layer

    def no_room(*args, **kwargs):
        raise OSError(refused, os.strerror(refused))

    monkeypatch.setattr(torch, "save", fails)
    if refused:
        monkeypatch.setattr(checkpoint.tempfile, "TemporaryFile", no_room)
    with pytest.raises(UserError) as error:
        trainer.train()
    reason = os.strerror(refused) if refused else checkpoint.reason(layer)
    assert str(error.value) == (
        f"Could not save checkpoint-1 in {tmp_path / 'run'} ({reason}); no checkpoint exists yet."
    )


def test_a_disk_that_is_really_full_has_its_name(tmp_path):
    """A file system of its own, of half a megabyte, where the machine lends one."""
    code = (
        "import sys, torch\nfrom rlsd.policy import checkpoint\n"
        "def write(folder): torch.save(torch.zeros(2**20), folder / 'x.pt')\n"
        "try: checkpoint._write_whole(checkpoint.Path(sys.argv[1]), 1, write, None)\n"
        "except checkpoint.UserError as error: print(error)"
    )
    mount = f"mount -t tmpfs -o size=512k none {tmp_path} && exec \"$@\""
    run = ["unshare", "-Urm", "sh", "-c", mount, "sh"]
    if not shutil.which("unshare") or subprocess.run([*run, "true"], stderr=-3).returncode:
        pytest.skip("no file system of its own here")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*run, sys.executable, "-c", code, tmp_path], cwd=root, capture_output=True, text=True
    )
    assert done.stdout == (
        f"Could not save checkpoint-1 in {tmp_path} (No space left on device); no checkpoint "
        "exists yet.\n"
    ), done.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with two checkpoints."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("saved")
    make_trainer(folder, max_steps=2, save_steps=1).train()
    return folder / "run"


def test_checksums_are_those_of_sha256sum(saved):
    done = subprocess.run(
        ["sha256sum", "-c", checkpoint.CHECKSUMS], cwd=saved / "checkpoint-2", text=True,
        capture_output=True,
    )
    assert done.returncode == 0
    assert done.stdout == "model.safetensors: OK\ntrainer_state.pt: OK\n"


@pytest.mark.parametrize("file", ["model.safetensors", "trainer_state.pt"])
@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_flipped_bit_is_found(file, command, saved, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    path = run / "checkpoint-2" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    metrics = (run / "metrics.jsonl").read_bytes()
    arguments = {
        "train": ["train", "--resume_from_checkpoint", str(run), "--max_steps", "3"],
        "eval": ["eval", str(run)],
    }[command]
    capsys.readouterr()
    assert main(arguments) == 2
    assert one_sentence(capsys.readouterr().err) == (
        f"rlsd: The checkpoint {run}/checkpoint-2 is damaged: {file} is not what was written "
        f"(SHA256SUMS); take {run}/checkpoint-1 instead."
    )
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_a_checkpoint_without_checksums_still_loads(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-2" / "SHA256SUMS").unlink()
    assert main(["train", "--resume_from_checkpoint", str(tmp_path / "run"), "--max_steps", "3",
                 "--output_dir", str(tmp_path / "run")]) == 0


def test_every_shard_has_its_checksum(tmp_path):
    make_trainer(tmp_path, max_steps=1, sharded_checkpoints=True).train()
    folder = tmp_path / "run" / "checkpoint-1"
    listed = {x.split("  ")[1] for x in (folder / "SHA256SUMS").read_text().splitlines()}
    shards = {str(p.relative_to(folder)) for p in (folder / "shards").iterdir()}
    assert len(shards) >= 2 and shards <= listed
    (folder / "shards" / ".metadata").unlink()
    with pytest.raises(UserError, match=r"is damaged: \.metadata is not what was written"):
        checkpoint.verify(folder)
