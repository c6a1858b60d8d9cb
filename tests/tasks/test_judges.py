"""Judgements by math-verify from any thread, and those that hang."""

import os
import sys
import threading
import time

import pytest

pytest.importorskip("math_verify")

from rlsd.tasks import math_judge
from rlsd.tasks.math_judge import judge

PLENTY = 60.0  # seconds, for machines that are busy


def test_verdicts_keep_their_order():
    pairs = [("72", "$72$"), ("72", "$73$"), ("$", "$4$"), ("0.5", "\\boxed{\\frac{1}{2}}")]
    assert judge(pairs * 3, PLENTY) == [True, False, None, True] * 3


def test_it_works_off_the_main_thread():
    got = []
    thread = threading.Thread(target=lambda: got.extend(judge([("72", "$72$")], PLENTY)))
    thread.start()
    thread.join()
    assert got == [True]


def test_what_hangs_is_cut_and_the_rest_is_judged():
    # Powers are computed in one operation of C code, which no alarm interrupts.
    tower = "$9^{9^{9^{9^{9}}}}$"
    judge([("1", "$1$")] * 4, PLENTY)  # started
    began = time.monotonic()
    got = judge([("7", "$7$"), ("7", "$7^{7^{7^{7}}}+0$"), ("7", tower), ("7", "$7$")], 5.0)
    assert got[0] is got[3] is True and time.monotonic() - began < PLENTY
    assert all(verdict in (False, "time") for verdict in got[1:3])


def test_a_late_judge_is_replaced(monkeypatch):
    one = math_judge._Judge()
    assert one.ask(["4", "$4$"], PLENTY) is True
    first = one.child.process.pid
    assert one.ask(["4", "$4$"], 0.0) == "time"
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert one.ask(["4", "$5$"], PLENTY) is False and one.child.process.pid != first
    one.child.close()


def test_a_judge_that_dies_counts_as_late():
    one = math_judge._Judge()
    one.ask(["4", "$4$"], PLENTY)
    one.child.process.kill()
    assert one.ask(["4", "$4$"], PLENTY) == "time"
    assert one.ask(["4", "$4$"], PLENTY) is True
    one.child.close()


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError):
        judge([("4", "$4$")], PLENTY)
