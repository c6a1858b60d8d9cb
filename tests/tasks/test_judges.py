"""Judgements by math-verify and reasoning-gym: those that hang, raise, cheat or write files."""

import os
import signal
import sys
import threading
import time

import pytest

from rlsd.tasks import judges
from rlsd.tasks.data import UNUSABLE_TASKS, load_rows
from rlsd.tasks.judges import LATE, UNREADABLE, JudgeError, judge
from rlsd.tasks.sandbox import Sandbox, SandboxError, isolation
from rlsd.tasks.scorers import reasoning_gym

needs_isolation = pytest.mark.skipif(
    isolation() != "ok", reason=f"programs cannot be isolated here: {isolation()}"
)
PLENTY = 60.0  # seconds, for machines that are busy
# They evaluate an answer as Python, by eval or by sympy.
EVALUATING = (
    "binary_matrix", "countdown", "intermediate_integration", "n_queens",
    "polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix",
    "string_insertion",
)


def equal(gold, text):
    return "equal", [f"${gold}$"], [text]


def test_verdicts_keep_their_order():
    pytest.importorskip("math_verify")
    requests = [equal("72", "$72$"), equal("72", "$73$"), ("equal", ["$"], ["$4$"]),
                equal("0.5", "\\boxed{\\frac{1}{2}}")]
    assert judge("math_verify", requests * 3, PLENTY) == [True, False, UNREADABLE, True] * 3


def test_it_works_off_the_main_thread():
    pytest.importorskip("math_verify")
    got = []
    thread = threading.Thread(
        target=lambda: got.extend(judge("math_verify", [equal("72", "$72$")], PLENTY))
    )
    thread.start()
    thread.join()
    assert got == [True]


def test_what_hangs_is_cut_and_the_rest_is_judged():
    pytest.importorskip("math_verify")
    # Powers are computed in one operation of C code, which no alarm interrupts.
    hanging = [equal("7", "$7^{7^{7^{7}}}+0$"), equal("7", "$9^{9^{9^{9^{9}}}}$")]
    judge("math_verify", [equal("1", "$1$")] * 4, 2.0)  # started
    began = time.monotonic()
    got = judge("math_verify", [equal("7", "$7$"), *hanging, equal("7", "$7$")], 2.0)
    assert got[0] is got[3] is True and time.monotonic() - began < PLENTY
    assert all(verdict in (False, None, LATE) for verdict in got[1:3]) and LATE in got


def test_a_worker_that_dies_is_replaced():
    worker = judges._Worker("re", PLENTY)
    assert worker.ask(("match", "a+", ["aa", "b"]), PLENTY) == [True, False]
    os.killpg(worker.process.process.pid, signal.SIGKILL)
    assert worker.ask(("match", "a+", ["aa"]), PLENTY) is None
    assert worker.ask(("match", "a+", ["aa"]), PLENTY) == [True]
    worker.close()


def entries(*tasks, size=1):
    pytest.importorskip("reasoning_gym")
    return [(row["task"], row["entry"]) for task in tasks
            for row in load_rows(f"reasoning-gym:{task}", size=size)]


def usable():
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - {*UNUSABLE_TASKS, "composite"})


def payloads(path):
    """What writes a file wherever it is evaluated, also as a list or by sympy."""
    call = f"__import__('pathlib').Path({str(path)!r}).write_text('x')"
    return [call, f"[{call}]", f"[[{call}]]", f"({call})"]


@needs_isolation
@pytest.mark.parametrize("tasks", [
    EVALUATING, pytest.param(None, marks=pytest.mark.slow, id="all"),
])
def test_no_answer_writes_a_file(tmp_path, tasks):
    for task, entry in entries(*tasks or usable()):
        texts = [f"<answer>{text}</answer>" for text in payloads(tmp_path / task)]
        got = reasoning_gym(None, texts, entry=[entry] * 4, task=[task] * 4, verify_timeout=PLENTY)
        # Some take everything but one word for "no".
        assert tasks is None or all(0 <= score < 1 for score in got), (task, got)
    assert list(tmp_path.iterdir()) == []


@needs_isolation
def test_an_answer_changes_no_later_judgement():
    # It would make every number equal to 24 wherever it outlived its own judgement.
    change = "__import__('builtins').__dict__.update(int=lambda *_: 24, float=lambda *_: 24.0)"
    ((task, entry),) = entries("puzzle24")
    for _ in range(2):
        got = reasoning_gym(None, [change, "1"] * 3, entry=[entry] * 6, task=[task] * 6,
                            verify_timeout=PLENTY)
        assert got[1::2] == [got[1]] * 3 and got[1] < 1


def test_what_hangs_or_ends_the_process_scores_0():
    ((task, entry),) = entries("countdown")
    texts = ["9**9**9", "exit()", "__import__('os')._exit(0)", "__import__('os').abort()",
             entry["answer"]]
    judge("reasoning_gym", [("gym", task, entry, ["1"])] * 4, 3.0)  # started
    began = time.monotonic()
    got = reasoning_gym(
        None, texts, entry=[entry] * 5, task=[task] * 5, verify_timeout=3.0
    )
    assert time.monotonic() - began < PLENTY
    assert max(got[:4]) < 0.1 and got[4] == 1


def test_a_scorer_that_raises_scores_0_and_a_broken_entry_is_named():
    tasks = entries("prime_factorization", "rectangle_count")
    wrong = ["east", "", "1 x two", "[[1, 2], {}]", "\\frac{1}{2}", "1" * 5000]
    for task, entry in tasks:
        got = judge("reasoning_gym", [("gym", task, entry, [text]) for text in wrong], PLENTY)
        assert all(isinstance(score, float) and score < 1 for score in got), (task, got)
        assert judge("reasoning_gym", [("gym", task, entry, [entry["answer"]])], PLENTY) == [1.0]
    task, _ = tasks[0]
    for broken in ({}, "2", {"question": "?"}):
        ((why,),) = judge("reasoning_gym", [("gym", task, broken, ["x"])], PLENTY)
        assert "Error" in why


@pytest.mark.slow
def test_every_task_bears_the_answers_of_others_and_damaged_ones():
    tried = entries(*usable())
    answers = [str(entry["answer"]) for _, entry in tried]
    requests = []
    for i, (task, entry) in enumerate(tried):
        own = answers[i]
        texts = [*answers[i::7], own[:-1], own[1:], own + ")", own[::-1], own.upper(), "[", "{}"]
        requests += [("gym", task, entry, [text]) for text in texts]
    got = judge("reasoning_gym", requests, PLENTY)
    bad = [(r[1], r[3], x) for r, x in zip(requests, got, strict=True) if not isinstance(x, float)]
    assert bad == [] and all(0 <= score <= 1 for score in got)


@pytest.mark.parametrize("refused", [
    pytest.param((True,), id="limits-alone", marks=pytest.mark.slow),
    pytest.param((True, False), id="process"),
])
def test_without_isolation_it_is_said_once_and_still_no_answer_runs_here(
    monkeypatch, caplog, refused
):
    ((task, entry),) = entries("countdown")
    real = Sandbox.__init__

    def refusing(self, limits=None, *, isolate=True, prelude=None):
        if isolate in refused:
            raise SandboxError("unshare: Operation not permitted")
        real(self, limits, isolate=isolate, prelude=prelude)

    monkeypatch.setattr(Sandbox, "__init__", refusing)
    judges._say_once.cache_clear()
    worker = judges._Worker("reasoning_gym", 3.0)
    assert worker.ask(("gym", task, entry, [entry["answer"]]), 20.0) == 1.0
    for text in (f"__import__('os').kill({os.getpid()}, 0)", "exit()", "["):
        assert worker.ask(("gym", task, entry, [text]), 20.0) < 0.1
    assert [m for m in caplog.messages if "cannot be isolated" in m] == caplog.messages[:1]
    assert worker.ask(("gym", task, entry, ["9**9**9"]), 3.0) == LATE
    assert worker.ask(("gym", task, entry, [entry["answer"]]), 20.0) == 1.0
    assert worker.ask(("gym", "nope", entry, ["1"]), 20.0) == [
        "ValueError: Dataset 'nope' not registered"
    ]
    worker.close()


def test_missing_packages_are_told(monkeypatch):
    from rlsd import UserError
    from rlsd.tasks.scorers import math_verify

    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match="pip install"):
        math_verify(None, ["$4$"], solution=["4"])
    with pytest.raises(JudgeError, match="no_such_package"):
        judges._Worker("no_such_package", PLENTY).ask(("match", "a", ["a"]), PLENTY)
