"""math-verify in processes of its own, so that a judgement that hangs can be cut off anywhere.

math-verify's own limits are alarms, which work in the main thread alone and never inside one long
operation of C code such as 9**9**9. The parent starts this very file as a script; it answers one
line of JSON per line of JSON, and is killed and started anew when an answer is late.
"""

import concurrent.futures
import functools
import importlib.util
import json
import os
import queue
import sys

MEMORY = 4 << 30  # bytes of address space: a tower of powers asks for all there is


def judge(pairs, seconds):
    """Judge (solution, completion) pairs of texts, each within `seconds` of wall time.

    Returns a list of True, False, None (the solution cannot be parsed) or "time". Raises
    ImportError without math-verify.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("math_verify", name="math_verify")
    pool, idle = _pool()

    def one(pair):
        child = idle.get()
        try:
            return child.ask(pair, seconds)
        finally:
            idle.put(child)

    return list(pool.map(one, pairs))


class _Judge:
    """A child process, started when it is first asked and after it was killed."""

    def __init__(self):
        self.child = None

    def ask(self, pair, seconds):
        from .sandbox import Child  # not at the top: a script has no package

        if self.child is None:
            # A first judgement keeps imports, a second and more, out of the time limit.
            self.child = Child([sys.executable, os.path.abspath(__file__)])
            if self.child.ask(["$1$", "$1$"], 120) != [True]:
                self.child = None
                raise RuntimeError("math-verify cannot be imported in a process of its own")
        answer = self.child.ask(pair, seconds)
        if answer is None:
            self.child = None
            return "time"
        return answer[0]


@functools.lru_cache
def _pool():
    """Threads, and as many judges, kept for the life of this process; they end with its pipes."""
    count = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
    idle = queue.SimpleQueue()
    for _ in range(count):
        idle.put(_Judge())
    return concurrent.futures.ThreadPoolExecutor(count), idle


def _verdict(gold_text, text, parse, verify):
    """One judgement, without math-verify's own alarms."""
    # Outside of delimiters only numbers are read: the solution 3x+1 would become 3.
    delimited = any(mark in gold_text for mark in ("$", "\\boxed", "\\(", "\\["))
    for reading in (gold_text, f"${gold_text}$")[:: 1 if delimited else -1]:
        gold = parse(reading, parsing_timeout=None)
        if gold:
            answer = parse(text, parsing_timeout=None)
            return bool(verify(gold, answer, timeout_seconds=None))
    return None


def _serve():
    del sys.path[0]  # this folder, whose names are not those of top-level modules
    import logging
    import resource

    from math_verify import parse, verify

    logging.disable()
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for line in sys.stdin:
        try:
            answer = _verdict(*json.loads(line), parse, verify)
        except Exception:  # as math-verify itself: what it cannot compare is not equal
            answer = False
        print(json.dumps([answer]), flush=True)


if __name__ == "__main__":
    _serve()
