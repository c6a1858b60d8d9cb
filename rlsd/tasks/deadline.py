"""Time limits for code that must run in this process: users' rewards, whose state lives here.

A thread cannot keep them, because code in C may hold the interpreter's lock for ever. The clock is
a process of its own, which this file is when run as a script (it imports the standard library
alone). When time is up it sends signals, a second apart:

1. twice one that raises Late in the main thread: loops, sleep, sockets, locks, the engine of `re`;
2. the same for code that swallows it: the handler now ends the run from inside of the call;
3. one that C handles without waiting for the interpreter, for code in C that never returns to it:
   the end of the run, from the thread that is stuck;
4. SIGKILL, with the sentence from outside, where even that hangs.
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import gc
import json
import os
import select
import signal
import sys
import threading
import time

SAVING = 900.0  # seconds that the end of a run may take
HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


class Late(BaseException):
    """Raised inside code that took too long; no `except Exception` swallows it."""


def _stuck(end):
    """End the run from inside of a call."""
    gc.disable()  # the interpreter may be anywhere
    try:
        _watchdog().ask("saving", 5)
        end()
    finally:
        os._exit(2)


@functools.lru_cache
def _started():
    from .sandbox import Child

    return Child([sys.executable, "-I", "-S", os.path.abspath(__file__)], stderr=None)


def _watchdog():
    if _started().process.poll() is not None:
        _started.cache_clear()
    return _started()


class Watched:
    """A context: code in a thread may take so many seconds, or end() is called where it is stuck.

    tid: of the thread, the system's id. end: a function that does what can be done before the
    process ends. sentence: what is said should that hang too.
    """

    def __init__(self, seconds, tid, end, sentence):
        self.order = {
            "seconds": seconds, "pid": os.getpid(), "tid": tid, "sentence": sentence,
            "interrupt": threading.current_thread() is threading.main_thread()
            and tid == threading.get_native_id(),
        }
        self.end, self.done, self.rings = end, False, 0
        self.claim = threading.Lock()  # of two threads, whose the call is: one waits, one is stuck

    def _interrupt(self, _, frame):
        if not self.done:
            self.rings += 1
            # Code in C let the first ring wait until _in_c is entered, where raising ends nothing.
            if self.rings > 2 or frame.f_code is Watched._in_c.__code__:
                _stuck(self.end)
            raise Late

    def _in_c(self, _):
        if self.order["interrupt"]:
            if not self.done:
                _stuck(self.end)
            return
        if self.claim.acquire(blocking=False):
            _stuck(self.end)
        while True:  # nobody waits any more, and going on would keep the interpreter's lock
            time.sleep(3600)

    def __enter__(self):
        self.kept = HANDLER(self._in_c)
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        self.restore = functools.partial(
            libc.signal, signal.SIGPROF,
            ctypes.c_void_p(libc.signal(signal.SIGPROF, self.kept)),
        )
        if self.order["interrupt"]:  # users' alarms keep SIGALRM
            self.before = signal.signal(signal.SIGVTALRM, self._interrupt)
        _watchdog().ask(self.order, 60)
        return self

    def __exit__(self, *raised):
        self.done = True
        while not self.order["interrupt"] and not self.claim.acquire(blocking=False):
            time.sleep(1)  # the run ends
        _watchdog().ask("off", 60)  # after its answer no signal comes
        if self.order["interrupt"]:
            signal.signal(signal.SIGVTALRM, self.before or signal.SIG_DFL)
        self.restore()


def limited(call, seconds, end, sentence):
    """call(), or Late after so many seconds; end() and the end of the process if it cannot be cut.

    Outside of the main thread, where nothing can be raised from elsewhere, it is left to a thread
    of its own.
    """
    if threading.current_thread() is threading.main_thread():
        with Watched(seconds, threading.get_native_id(), end, sentence) as watched:
            try:
                return call()
            finally:
                watched.done = True
    future, watched = concurrent.futures.Future(), threading.Event()

    def run():
        watched.wait()  # code in C would not let go of the interpreter any more
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    with Watched(seconds, thread.native_id, end, sentence):
        watched.set()
        if not concurrent.futures.wait([future], timeout=seconds).done:
            raise Late
    return future.result()


# The watchdog.
def _signal(order, number):
    try:
        try:
            ctypes.CDLL(None).tgkill(order["pid"], order["tid"], number)
        except AttributeError:  # not on a Mac, where the main thread is the likely one
            os.kill(order["pid"], number)
    except ProcessLookupError:
        pass


def _watch():
    order, due = None, []
    while True:
        wait = max(0.0, due[0][0] - time.monotonic()) if due else None
        if select.select([0], [], [], wait)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            said, now = json.loads(line), time.monotonic()
            if said == "off":
                due = []
            elif said == "saving":
                due = [(now + SAVING, signal.SIGKILL)]
            else:
                order, end = said, now + said["seconds"]
                rings = [signal.SIGVTALRM] * 3 if order["interrupt"] else [None] * 3
                due = [
                    (end + k, number)
                    for k, number in enumerate([*rings, signal.SIGPROF, signal.SIGKILL])
                ]
            os.write(1, b'"yes"\n')
            continue
        _, number = due.pop(0)
        if number == signal.SIGKILL:
            print(f"\nrlsd: {order['sentence']}", file=sys.stderr, flush=True)
        if number is not None:
            _signal(order, number)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        _watch()
