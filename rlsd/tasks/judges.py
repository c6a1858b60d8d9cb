"""Scorers of third parties on untrusted texts, math-verify and reasoning-gym: never in here.

Both compute what a completion says, and tasks of reasoning-gym evaluate it as Python. A worker
imports the package once; every judgement is a fork of it, isolated and limited as a program under
code_tests is (sandbox.py), so that none can touch files, hang, or change the next. Where the
machine allows no isolation the limits remain, and where it allows neither, a process that is killed
when it is late.

This file is the prelude of the sandbox, and a script where there is none: it imports the standard
library alone. Requests travel as pickles, to the worker only; answers come back as JSON.
"""

import base64
import concurrent.futures
import functools
import importlib
import json
import logging
import math
import os
import pickle
import queue
import re
import resource
import secrets
import sys

MEMORY_MB = 4096  # a tower of powers asks for all there is
LATE, UNREADABLE = "late", "unreadable"
LOG = logging.getLogger(__name__)
RUN = "import prelude\nprelude.answer_once({mark!r})"


class JudgeError(RuntimeError):
    """No worker can judge on this machine, whatever the text; a clause that says why."""


def judge(package, requests, seconds):
    """What the scorer of a package says to each request, within `seconds` of wall time each.

    package: math_verify, reasoning_gym, or re for regular expressions. requests: tuples of a
    function's name (equal, readable, gym, match) and its arguments. Returns their results; LATE
    where time was up, None where the process died or the scorer raised; gym gives [why] for a task
    or an entry that cannot be scored at all. Raises JudgeError.
    """
    pool, idle = _pool(package, seconds)

    def one(request):
        worker = idle.get()
        try:
            return worker.ask(request, seconds)
        finally:
            idle.put(worker)

    return list(pool.map(one, requests))


class _Worker:
    """A process that holds a package, started when it is first asked and after it was killed."""

    def __init__(self, package, seconds):
        from .sandbox import Limits  # not at the top: a script has no package

        self.package, self.process = package, None
        self.limits = Limits(seconds=seconds, memory_mb=MEMORY_MB)

    def ask(self, request, seconds):
        from .sandbox import Sandbox

        if self.process is None:
            self.process = self._started()
        pickled = base64.b64encode(pickle.dumps(request)).decode()
        before = f"prepare({request[1]!r})" if request[0] == "gym" else None
        if isinstance(self.process, Sandbox):
            mark = secrets.token_hex(16)
            run = self.process.run(RUN.format(mark=mark), stdin=pickled, before=before)
            if run.outcome == "died":
                self.close()
            if run.outcome == "unready":
                return [run.error]
            told = [x for x in run.output.split("\n") if x.startswith(mark)]
            got = json.loads(told[0].removeprefix(mark)) if len(told) == 1 else None
            return LATE if run.outcome == "time" else got
        got = self.process.ask([before, pickled], seconds)
        if got is None:
            self.close()
            return LATE
        return got[0]

    def close(self):
        self.process.close()
        self.process = None

    def _started(self):
        from .sandbox import IMPORTS, Child, Sandbox, SandboxError, few_settings

        with open(__file__, encoding="utf-8") as file:
            prelude = f"{file.read()}\nload({self.package!r})"
        for isolate in (True, False):
            try:
                return Sandbox(self.limits, isolate=isolate, prelude=prelude)
            except SandboxError as error:
                if isolate:
                    _say_once(str(error))
        path = [os.path.abspath(folder) for folder in sys.path if folder]
        child = Child([sys.executable, "-I", "-X", "utf8", __file__], env=few_settings())
        hello = child.ask([self.package, path], IMPORTS)
        if hello != "ready":
            child.close()
            raise JudgeError(hello or "its process died at the start")
        return child


@functools.lru_cache
def _say_once(reason):
    LOG.warning(
        "Scorers of other packages run in processes of their own, but cannot be isolated on this "
        "machine (%s): what a completion makes them evaluate could reach the network and your "
        "files.", reason,
    )


@functools.lru_cache
def _pool(package, seconds):
    """Threads, and as many workers, kept for the life of this process; they end with its pipes."""
    count = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
    idle = queue.SimpleQueue()
    for _ in range(count):
        idle.put(_Worker(package, seconds))
    return concurrent.futures.ThreadPoolExecutor(count), idle


# In the worker.
def load(package):
    """Import what judgements need, and make the slow first ones."""
    logging.disable()
    if package == "math_verify":
        for text in ("$\\frac{1}{2}$", "$x^2+1$", "$(1,2)$", "\\boxed{0.5}", "1,000", "$x=3$"):
            equal([text], [text])
    else:
        importlib.import_module(package)


def parsed(text):
    from math_verify import parse

    return parse(text, parsing_timeout=None)  # its own limits are alarms, which C code outlasts


def equal(golds, texts):
    """Whether a reading of a text equals a solution by its first reading that can be parsed."""
    from math_verify import verify

    gold = next(filter(None, map(parsed, golds)), None)
    if gold is None:
        return UNREADABLE
    return any(verify(gold, parsed(text), timeout_seconds=None) for text in texts)


def readable(solutions):
    """For each solution, a list of readings, whether one can be parsed."""
    return [any(map(parsed, golds)) for golds in solutions]


@functools.lru_cache
def prepare(task):
    """The scorer of a reasoning-gym task; looking it up builds a data set, so it is kept."""
    return importlib.import_module("reasoning_gym").get_score_answer_fn(task)


def gym(task, entry, texts):
    """The best score of some readings of an answer, 0 to 1; [why] where the entry is broken."""
    try:
        best = max(float(prepare(task)(answer=text, entry=entry)) for text in texts)
        return min(max(best, 0.0), 1.0) if math.isfinite(best) else 0.0
    except BaseException:  # what an answer evaluates to may raise anything
        try:
            prepare(task)(answer=entry["answer"], entry=entry)
        except BaseException as error:
            return [f"{type(error).__name__}: {error}"]
        return 0.0


def match(pattern, texts):
    """Whether each text as a whole matches a regular expression."""
    compiled = re.compile(pattern, flags=re.DOTALL)
    return [compiled.fullmatch(text) is not None for text in texts]


def answer(pickled):
    """What the function that a request names returns; None where it raises."""
    name, *arguments = pickle.loads(base64.b64decode(pickled))
    try:
        return {"equal": equal, "readable": readable, "gym": gym, "match": match}[name](*arguments)
    except BaseException:
        return None


def answer_once(mark):
    """Answer the request on standard input by a line that starts with the mark, and end."""
    said = json.dumps(answer(sys.stdin.read()))
    os.write(1, f"\n{mark}{said}\n".encode())
    os._exit(0)


def _serve():
    """Answer lines of JSON, each in a fork, on what was standard output when this began."""
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def say(value):
        os.write(answers, json.dumps(value).encode() + b"\n")

    package, path = json.loads(sys.stdin.readline())
    sys.path[:] = path  # of the trainer; this file's own folder would hide top-level modules
    if sys.platform == "linux":
        limit = MEMORY_MB << 20, resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, limit)
    try:
        load(package)
    except Exception as error:
        return say(f"{type(error).__name__}: {error}")
    say("ready")
    for line in sys.stdin:
        before, pickled = json.loads(line)
        try:
            exec(before or "", globals())
        except Exception as error:
            say([[f"{type(error).__name__}: {error}"]])
            continue
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(answers)
            os.write(writer, json.dumps(answer(pickled)).encode())
            os._exit(0)
        os.close(writer)
        with open(reader, "rb") as file:
            said = file.read()
        os.waitpid(pid, 0)
        try:
            say([json.loads(said)])
        except ValueError:  # it died, or what it evaluated wrote here
            say([None])


if __name__ == "__main__":
    _serve()
