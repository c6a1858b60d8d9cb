"""Reward functions that hang: in Python, in regular expressions, in C, with every exception eaten.

What cannot be interrupted ends its process, so those run in one of their own.
"""

import asyncio
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlsd.tasks.rewards import RewardError, score

ROOT = Path(__file__).resolve().parents[2]


def rows(n=2):
    return [
        {"prompt": f"q{i}", "solution": str(i), "_source": f"line {i + 1} of x.jsonl"}
        for i in range(n)
    ]


def spins(**_):
    while True:
        pass


def sleeps(**_):
    time.sleep(600)


def swallows(**_):
    while True:
        try:
            time.sleep(600)
        except Exception:
            pass


def waits(**_):
    threading.Event().wait()


def matches(**_):
    re.match(r"(a+)+$", "a" * 40 + "b")


def powers(**_):
    return 9 ** 9 ** 9


async def sleeps_async(**_):
    await asyncio.sleep(600)


async def blocks_async(**_):
    time.sleep(3)  # and with it the loop of all async rewards


HANGING = [spins, sleeps, swallows, waits, matches, powers, sleeps_async, blocks_async]


@pytest.mark.parametrize("function", HANGING, ids=lambda f: f.__name__)
@pytest.mark.parametrize("where", ["main", "thread"])
def test_a_hanging_function_is_cut_and_named_with_its_rows(function, where):
    if where == "thread" and function in (spins, matches, powers):
        pytest.skip("the thread would go on to the end of the tests, or end them")
    caught = []

    def attempt():
        try:
            score([function], None, rows(3), ["a"] * 3, [[1]] * 3, timeout=0.3)
        except BaseException as error:
            caught.append(error)

    began = time.monotonic()
    if where == "main":
        attempt()
    else:
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert time.monotonic() - began < 30
    (error,) = caught
    assert type(error) is RewardError and str(error) == (
        f"The reward function {function.__name__} did not return within reward_timeout = 0.3 "
        "seconds on 3 completions of row line 1 of x.jsonl and 2 others; bound what it waits for, "
        "or raise reward_timeout."
    )
    if function is blocks_async:
        time.sleep(3)  # it frees the loop


def test_functions_may_use_alarms_of_their_own():
    import signal

    def alarmed(prompts, **_):
        rang = []
        before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        time.sleep(0.2)
        signal.signal(signal.SIGALRM, before)
        return [float(len(rang))] * len(prompts)

    assert score([alarmed], None, rows(), ["a"] * 2, [[1]] * 2)[1].tolist() == [1.0, 1.0]
    assert signal.getsignal(signal.SIGVTALRM) == signal.SIG_DFL


STUCK = """
import itertools, os, re, sys, threading, time
from rlsd.tasks.rewards import RewardError, rescued_by, score

def eats(**_):
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass

def counts(**_):
    return -1 in itertools.count()  # never returns to the interpreter

async def matches(**_):
    re.match(r"(a+)+$", "a" * 40 + "b")

def save(error):
    return f"{error} Saved."

row = {"prompt": "q", "solution": "1", "_source": "line 1 of x.jsonl"}
def run():
    try:
        with rescued_by(save):
            score([globals()[sys.argv[1]]], None, [row], ["a"], [[1]], timeout=1.0)
    except RewardError as error:
        print(f"rlsd: {save(error)}", file=sys.stderr, flush=True)
        os._exit(2)

if sys.argv[2] == "main":
    run()
else:
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
"""


def ended(name, where="main", code=STUCK):
    return subprocess.run(
        [sys.executable, "-c", code, name, where], cwd=ROOT, capture_output=True, text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name, where", [
    ("eats", "main"), ("counts", "main"),
    pytest.param("matches", "main", marks=pytest.mark.slow),
    pytest.param("counts", "thread", marks=pytest.mark.slow),
])
def test_what_cannot_be_interrupted_ends_the_run_with_its_sentence(name, where):
    run = ended(name, where)
    assert run.returncode == 2 and run.stderr.strip() == (
        f"rlsd: The reward function {name} did not return within reward_timeout = 1 seconds on 1 "
        "completions of row line 1 of x.jsonl; bound what it waits for, or raise reward_timeout. "
        "Saved."
    )


@pytest.mark.slow
def test_where_saving_hangs_too_the_process_is_killed():
    source = (ROOT / "rlsd" / "tasks" / "deadline.py").read_text()
    assert "SAVING = 900.0" in source
    code = (
        "import functools, sys\n"
        "from rlsd.tasks import deadline\n"
        "from rlsd.tasks.sandbox import Child\n"
        f"hasty = {source.replace('SAVING = 900.0', 'SAVING = 1.0')!r}\n"
        "command = [sys.executable, '-I', '-S', '-c', hasty]\n"
        "deadline._started = functools.lru_cache(lambda: Child(command, stderr=None))\n"
    )
    run = ended("counts", code=code + STUCK.replace('return f"{error} Saved."', "counts()"))
    assert run.returncode == -9
    assert run.stderr.startswith("\nrlsd: The reward function counts did not return within")


RUN = """
import itertools, sys
from pathlib import Path
sys.path.insert(0, "tests")
from runs import make_trainer

calls = []

def stuck(completion_ids, **columns):
    calls.append(1)
    if len(calls) == 3:
        -1 in itertools.count()
    return [sum(ids) % 5 / 4 for ids in completion_ids]

make_trainer(Path(sys.argv[1]), reward=stuck, max_steps=5, reward_timeout=1.0).train()
"""


def test_a_run_whose_reward_is_stuck_in_c_loses_no_step(tmp_path):
    import transformers

    run = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        timeout=120,
    )
    saved = tmp_path / "run" / "checkpoint-2"
    assert run.returncode == 2
    assert f"all 2 steps before are safe in {saved}." in run.stderr.strip().splitlines()[-1]
    transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert (saved / "trainer_state.pt").exists()
