"""A run folder has one run: the lock, and what is said where it or the folder cannot be had."""

import errno
import gc
import multiprocessing
import os
import socket

import pytest
from runs import make_trainer, one_sentence, quick, write_config  # noqa: F401

from rlsd import UserError
from rlsd.cli import main
from rlsd.policy import checkpoint
from rlsd.policy.checkpoint import RunLock

FORK = multiprocessing.get_context("fork")  # a fork holds no lock, and imports nothing anew


def _hold(folder, pipe):
    try:
        lock = RunLock(folder)
        pipe.send("inside")
        pipe.recv()
        del lock
    except UserError as error:
        pipe.send(str(error))


def holder(folder):
    """(process, its pipe, what it said) of one that takes the lock until something is sent."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_hold, args=(folder, theirs), daemon=True)
    process.start()
    return process, ours, ours.recv()


def leave(process, pipe):
    pipe.send("go")
    process.join()


def test_a_run_folder_has_one_run_from_its_first_moment(tmp_path, capsys):
    run = tmp_path / "run"
    other, _, said = holder(run)
    assert said == "inside"
    config = write_config(tmp_path)
    capsys.readouterr()
    assert main(["train", "--config", config]) == 2
    assert one_sentence(capsys.readouterr().err) == (
        f"rlsd: The run folder {run} is in use by process {other.pid} on {socket.gethostname()}; "
        "wait for its end, or choose another --output_dir."
    )
    other.kill()  # a dead process holds nothing, though its file stays
    other.join()
    assert (run / ".lock").exists()
    assert main(["train", "--config", config]) == 0
    assert not (run / ".lock").exists()
    other, pipe, said = holder(run)
    assert said == "inside"
    capsys.readouterr()
    assert main(["train", "--resume_from_checkpoint", str(run), "--max_steps", "3"]) == 2
    assert "is in use by process" in one_sentence(capsys.readouterr().err)
    leave(other, pipe)
    assert not (run / ".lock").exists()
    assert main(["train", "--resume_from_checkpoint", str(run), "--max_steps", "3"]) == 0


def test_a_trainer_holds_its_folder_until_it_has_trained(tmp_path):
    run = tmp_path / "run"
    trainer = make_trainer(tmp_path, max_steps=1)
    assert f"process {os.getpid()} on " in holder(run)[2]
    again = make_trainer(tmp_path, max_steps=1)  # in one process it is one lock
    del again
    gc.collect()
    assert "in use" in holder(run)[2]
    if (child_pid := os.fork()) == 0:  # neither holds nor removes it
        del trainer
        gc.collect()
        os._exit(0)
    os.waitpid(child_pid, 0)
    assert "in use" in holder(run)[2]
    trainer.train()
    process, pipe, said = holder(run)
    assert said == "inside"
    leave(process, pipe)


def test_a_run_that_does_not_start_leaves_no_folder(tmp_path):
    for output_dir in ("run", "deep/run"):
        with pytest.raises(UserError):
            make_trainer(
                tmp_path, output_dir=str(tmp_path / output_dir), reward_funcs=["nowhere.at_all"]
            )
        gc.collect()
        assert not (tmp_path / output_dir).exists()


def _come_and_go(folder):
    inside = folder.with_name("inside")
    for _ in range(200):
        try:
            lock = RunLock(folder)
        except UserError:
            continue
        inside.touch(exist_ok=False)  # FileExistsError where another is in as well
        inside.unlink()
        del lock


def test_only_one_of_many_that_come_and_go_is_inside(tmp_path):
    """Removing the file, and the folder, must not let two in."""
    processes = [FORK.Process(target=_come_and_go, args=(tmp_path / "run",)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(checkpoint.fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match=r"cannot be locked \(No locks available\); keep other"):
        checkpoint.RunLock(tmp_path)


def test_advice_never_is_to_remove_what_a_run_did_not_write(tmp_path, monkeypatch):
    (tmp_path / "thesis.tex").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    for folder in (".", str(tmp_path)):
        with pytest.raises(UserError) as error:
            checkpoint.require_new_run(folder)
        assert str(error.value) == (
            f"The run folder {folder} already exists; choose another --output_dir, a new or empty "
            "folder."
        )


def test_a_run_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "x", "/proc/no-such-run"):
        with pytest.raises(UserError, match=(
            f"^The run folder {folder} cannot be made \\(.*\\); choose another --output_dir\\.$"
        )):
            checkpoint.RunLock(folder)
