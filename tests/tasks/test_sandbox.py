"""Every limit of the sandbox, from inside: what a program tries and what it gets."""

import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from rlsd.tasks.sandbox import GRACE, Child, Limits, Sandbox, SandboxError, isolation

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
isolated = pytest.mark.skipif(
    sys.platform.startswith("linux") and isolation() != "ok", reason=f"no namespaces: {isolation()}"
)
# As root, programs without namespaces run as nobody, who cannot read a Python in /root.
READABLE = next((
    python for python in (sys.executable, "/usr/bin/python3") if os.path.exists(python)
    and not (os.geteuid() == 0 and os.path.realpath(python).startswith("/root/"))
), None)
WALL = 20.0  # of programs that end by themselves: machines that run tests may be busy


def open_box(limits, isolate):
    """A sandbox; without namespaces on a Python that nobody can read."""
    own = sys.executable
    try:
        sys.executable = own if isolate else READABLE
        return Sandbox(limits, isolate=isolate)
    finally:
        sys.executable = own


BOTH = [
    pytest.param(True, marks=isolated, id="isolated"),
    pytest.param(False, id="limits-alone", marks=pytest.mark.skipif(
        READABLE is None, reason="no Python that the user nobody can read"
    )),
]


@pytest.fixture(scope="module", params=BOTH)
def box(request):
    limits = Limits(seconds=WALL, memory_mb=256, file_mb=2, files=20, output_kb=64)
    with open_box(limits, request.param) as made:
        yield made


@pytest.fixture(scope="module")
def jail():
    """An isolated box."""
    with Sandbox(Limits(seconds=WALL)) as made:
        yield made


@pytest.fixture(params=BOTH)
def hasty(request):
    """A box that waits no longer than a second."""
    with open_box(Limits(seconds=1.0, output_kb=64), request.param) as made:
        yield made


def test_streams_and_exit_status(box):
    assert box.run("print(input()[::-1])\nprint(input())", stdin="abc\nd\n") == (
        "ok", "cba\nd\n", ""
    )
    assert box.run("import sys; print('half'); sys.exit(3)")[:2] == ("failed", "half\n")
    assert box.run("import sys; sys.exit()").outcome == "ok"
    failed = box.run("print(1)\n1/0")
    assert failed.outcome == "failed" and failed.output == "1\n"
    assert failed.error.endswith("ZeroDivisionError: division by zero\n")
    assert "SyntaxError" in box.run("def f(:").error
    assert box.run("print('é', '\\ud800'.encode('utf8', 'ignore'))").output == "é b''\n"


def test_input_ends(box):
    assert "EOFError" in box.run("input()").error
    assert box.run("import sys; print(repr(sys.stdin.read()))").output == "''\n"


def test_programs_run_in_one_module_one_after_the_other(box):
    run = box.run("x = 1", "print(x + 1, __name__)", name="solution")
    assert run == ("ok", "2 solution\n", "")
    assert box.run("print(__name__)").output == "__main__\n"
    # A program that ends early ends all of them, whatever status it gives.
    assert box.run("import sys; sys.exit(0)", "print('passed')").output == ""
    assert box.run("import os; os._exit(0)", "print('passed')").output == ""


def test_threads_are_waited_for(box):
    program = "import threading, time\ndef f():\n  time.sleep(.2); print('late')\n"
    assert box.run(program + "threading.Thread(target=f).start()") == ("ok", "late\n", "")


def test_the_standard_library_loads(box):
    assert box.run("import heapq, decimal, sqlite3, json, random; print(3)").output == "3\n"
    assert "ModuleNotFoundError" in box.run("import torch").error


def test_infinite_loop_is_cut(hasty):
    began = time.monotonic()
    assert hasty.run("print('x', flush=True)\nwhile True: pass") == ("time", "x\n", "")
    assert time.monotonic() - began < 1 + GRACE
    assert hasty.run("import time; time.sleep(99)").outcome == "time"
    ignored = "import signal\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n"
    assert hasty.run(ignored + "  except (OSError, ValueError): pass\nwhile True: pass") == (
        "time", "", ""
    )
    assert hasty.run("print(1)").outcome in ("ok", "time")  # the box goes on


FORK_BOMB = """
import os, sys, time
count = 0
try:
    while True:
        if os.fork() == 0:
            {child}
            time.sleep(600)
        count += 1
except OSError as error:
    print(count, type(error).__name__)
"""


@pytest.mark.parametrize("child", ["pass", "os.setsid()"], ids=["group", "own-session"])
def test_fork_bomb_is_bounded_and_cleared_away(box, child):
    for _ in range(2):  # what is left of the first would leave no room for the second
        run = box.run(FORK_BOMB.format(child=child))
        count, error = run.output.split()
        assert run.outcome == "ok" and error == "BlockingIOError"
        assert 1 <= int(count) <= box.limits.processes + 2


def test_memory_is_bounded(box):
    assert "MemoryError" in box.run("x = bytearray(300 << 20)").error
    run = box.run("x = []\nwhile True: x.append(bytearray(1 << 20))")
    assert run.outcome == "failed" and "MemoryError" in run.error
    assert box.run("x = bytearray(64 << 20); print(len(x))").outcome == "ok"


def test_huge_file_is_cut(box):
    run = box.run("f = open('x', 'wb')\nwhile True: f.write(b'a' * 65536)")
    assert run.outcome == "failed" and "OSError" in run.error
    assert box.run("import os; print(os.listdir())").output == "[]\n"


@isolated
def test_all_files_together_and_their_number_are_bounded(jail):
    several = "for i in range(9):\n  with open(str(i), 'wb') as f: f.write(b'a' * (4 << 20))"
    assert "No space left" in jail.run(several).error
    assert "No space left" in jail.run("for i in range(999): open(str(i), 'w').close()").error
    assert jail.run("open('x', 'w').close()").outcome == "ok"


def test_open_files_are_bounded(box):
    assert "Too many open files" in box.run("x = [open('x', 'w') for _ in range(200)]").error


def test_output_flood_is_cut(box):
    for stream in ("stdout", "stderr"):
        run = box.run(f"import sys\nwhile True: sys.{stream}.write('x' * 1000)")
        assert run.outcome == "output"
        assert len(run.output) + len(run.error) <= box.limits.output_kb << 10


def test_every_run_starts_in_an_empty_folder_and_leaves_none(box, tmp_path):
    (tmp_path / "kept").write_text("x")
    box.run(f"import os; os.symlink({str(tmp_path)!r}, 'link')")
    assert (tmp_path / "kept").exists()  # a link is removed, not what it leads to
    run = box.run("import os; os.makedirs('a/b'); open('a/b/c', 'w').close(); os.symlink('a', 'l')")
    assert run.outcome == "ok"
    assert box.run("import os; print(os.listdir('.'))").output == "[]\n"


@isolated
def test_no_network(jail):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)"
        assert "unreachable" in jail.run(program).error or "refused" in jail.run(program).error
    assert "unreachable" in jail.run(
        "import socket\nsocket.create_connection(('192.0.2.1', 80), 5)"
    ).error
    # No abstract Unix socket of the machine either.
    name = f"\0rlsd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        run = jail.run(f"import socket\nsocket.socket(socket.AF_UNIX).connect({name!r})")
    assert "ConnectionRefusedError" in run.error


def test_the_environment_is_empty(box, monkeypatch):
    monkeypatch.setenv("RLSD_TEST_SECRET", "swordfish")
    with open_box(Limits(seconds=WALL), box.folder is None) as fresh:
        run = fresh.run("import os; print(sorted(os.environ))")
    assert run.output in ("[]\n", "['LC_CTYPE']\n")


@isolated
def test_the_parents_environment_cannot_be_read(jail):
    run = jail.run(f"print(open('/proc/{os.getpid()}/environ', 'rb').read())")
    assert "FileNotFoundError" in run.error
    assert jail.run("import os; print(os.path.exists('/proc'))").output == "False\n"


@isolated
def test_no_file_of_the_machine_can_be_read_or_changed(jail, tmp_path):
    secret = tmp_path / "tests.json"
    secret.write_text("the tests")
    secret.chmod(0o666)
    for path in (secret, Path(__file__), "/etc/passwd", "/dev/mem"):
        assert "FileNotFoundError" in jail.run(f"open({str(path)!r})").error, path
    # Neither the root nor the standard library can be written to.
    for path in ("/x", "/dev/x", os.path.join(os.path.dirname(os.__file__), "heapq.py")):
        run = jail.run(f"open({path!r}, 'w')")
        assert "Read-only" in run.error or "PermissionError" in run.error, path
    assert jail.run("import os; print(sorted(os.listdir('/dev')))").output == (
        "['null', 'urandom', 'zero']\n"
    )


@isolated
@pytest.mark.parametrize("program", [
    "import subprocess; subprocess.run(['sh', '-c', 'echo hi'])",
    "import os, sys; os.execv('/bin/sh', ['sh'])",
], ids=["sh", "exec"])
def test_there_is_no_other_program(jail, program):
    assert "FileNotFoundError" in jail.run(program).error


KILLER = """
import os, signal
for pid in (os.getppid(), 1, {parent}):
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            pass
try:
    os.kill(-1, signal.SIGKILL)
except (ProcessLookupError, PermissionError):
    pass
print('alive')
"""


@isolated
def test_the_parent_and_the_watcher_cannot_be_killed(jail):
    for _ in range(2):
        run = jail.run(KILLER.format(parent=os.getpid()))
        assert run == ("ok", "alive\n", "")


@isolated
def test_rights_cannot_be_regained(jail):
    run = jail.run(
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "flags = 0x10000000, 0x20000, 0x40000000\n"
        "print(os.getuid() != 0, [libc.unshare(flag) for flag in flags])\n"
        "try: os.setuid(0)\nexcept OSError: print('no')\n"
        "try: os.chroot('.')\nexcept OSError: print('no')\n"
        "print(libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None))"
    )
    assert run.output == "True [-1, -1, -1]\nno\nno\n-1\n", run


@isolated
def test_the_next_run_knows_nothing_of_the_last(jail):
    jail.run("import builtins, sys; builtins.x = 1; sys.modules['heapq'] = None")
    run = jail.run("import heapq; print('x' in dir(__builtins__))")
    assert run.output == "False\n"


PRELUDE = """
import numpy
kept, count = numpy.arange(3), 0
def more():
    global count
    count += 1
"""


@isolated
def test_a_prelude_imports_packages_and_leaves_nothing_else_open(monkeypatch, tmp_path):
    monkeypatch.setenv("RLSD_TEST_SECRET", "swordfish")
    (tmp_path / "mine.py").write_text("secret = 1")
    monkeypatch.syspath_prepend(tmp_path)  # a folder of the user's, from which nothing is imported
    with Sandbox(Limits(seconds=WALL, memory_mb=4096), prelude=PRELUDE) as made:
        assert made.run("import prelude; print(prelude.kept.sum())").output == "3\n"
        # What its functions import later can be read, and not changed.
        assert made.run("import numpy.linalg, numpy.ma.testutils; print(1)").output == "1\n"
        run = made.run("import numpy; open(numpy.__file__, 'a')")
        assert "Read-only" in run.error or "PermissionError" in run.error
        for path in (__file__, tmp_path / "mine.py", "/etc/passwd", f"/proc/{os.getpid()}/environ"):
            assert "FileNotFoundError" in made.run(f"open({str(path)!r})").error, path
        assert "swordfish" not in made.run("import os; print(dict(os.environ))").output
        assert "unreachable" in made.run(
            "import socket\nsocket.create_connection(('192.0.2.1', 80), 5)"
        ).error
        # Trusted source lasts, what a run does to the prelude does not.
        show = "import prelude; print(prelude.count)"
        assert made.run(show, before="more()").output == "1\n"
        assert made.run("import prelude; prelude.more(); prelude.more()", show).output == "3\n"
        assert made.run(show, before="more()").output == "2\n"
        assert made.run(show, before="1 / 0")[::2] == (
            "unready", "ZeroDivisionError: division by zero"
        )
        assert made.run(show).output == "2\n"


@isolated
def test_a_prelude_that_fails_is_said():
    with pytest.raises(SandboxError, match="^ModuleNotFoundError: .*no_such_package"):
        Sandbox(prelude="import no_such_package")


def test_closing_ends_every_process_and_removes_the_folder():
    with open_box(Limits(seconds=WALL), False) as made:
        folder, pid = made.folder, made.process.pid
        assert os.path.isdir(folder)
    assert not os.path.exists(folder)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@isolated
def test_boxes_run_at_the_same_time():
    outputs = {}

    def one(i):
        with Sandbox(Limits(seconds=WALL)) as made:
            outputs[i] = made.run(f"import time; time.sleep(.1); print({i})").output

    threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {i: f"{i}\n" for i in range(4)}


def test_a_refusing_machine_is_an_error_and_limits_alone_still_work(monkeypatch):
    # A seccomp or sysctl refusal looks like this from the child's side.
    monkeypatch.setattr(Sandbox, "ask", lambda *_: "unshare: Operation not permitted")
    with pytest.raises(SandboxError, match="^unshare: Operation not permitted$"):
        Sandbox()
    monkeypatch.undo()
    with open_box(Limits(seconds=WALL), False) as made:
        assert made.run("print(1)").output == "1\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_python_that_nobody_can_read_is_refused(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    code = (
        "import sys; sys.argv = [sys.argv[1]]; import os; os.__file__ = sys.argv[0] + '/os.py'\n"
        "exec(compile(open(sys.orig_argv[-1]).read(), 'sandbox.py', 'exec'))"
    )
    real = Child.__init__

    def started(self, command, **options):
        real(self, [*command[:-1], "-c", code, str(home), command[-1]], **options)

    monkeypatch.setattr(Child, "__init__", started)
    with pytest.raises(SandboxError, match=f"nobody.* cannot read {home}"):
        open_box(Limits(), False)


def test_a_dead_box_says_so():
    with open_box(Limits(seconds=WALL), False) as made:
        made.process.kill()
        made.process.wait()
        assert made.run("print(1)") == made.run("print(1)") == ("died", "", "")


def test_a_late_child_is_killed_with_its_group():
    program = "import os, time\nos.write(1, b'%d\\n' % os.fork())\ntime.sleep(600)"
    with Child([sys.executable, "-c", program]) as child:
        forked = max(child.ask({}, 60), child.ask({}, 60))  # each prints what fork returned
        assert child.ask({}, 0.2) is None
        assert child.process.returncode is not None and child.ask({}, 9) is None
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{forked}/fd/0") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{forked}/fd/0")  # gone, or at most not yet reaped


def test_a_child_answers_lines_of_json_in_order():
    echo = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"
    with Child([sys.executable, "-c", echo]) as child:
        for value in ({"a": "é\n"}, [1, "x" * 200_000], None, "y"):
            assert child.ask(value, 60) == value
