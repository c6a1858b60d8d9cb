"""Untrusted Python in a throwaway process, and the plumbing of children that can be cut off.

Isolation (Linux namespaces): no network interface, a root that holds the standard library
read-only and an empty /tmp (a tmpfs of bounded size and number of files), no /proc, no other
program, own process ids, no capability, an empty environment. Limits (rlimits): address space, CPU,
processes, open files, size of a file; wall time and output are cut from outside. Every run starts
from a fresh fork, and whatever it leaves behind is killed. No deeper defence: the kernel is shared.

The parent starts this very file as `python -I -S sandbox.py`, so it imports the standard library
alone. The child forks per run instead of starting Python again: 3 ms, not 20, per test. A prelude,
trusted code that imports packages, is executed before the child isolates itself; the folders of
those packages stay readable.
"""

import base64
import ctypes
import functools
import gc
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from typing import NamedTuple

NOBODY = 65534
GRACE = 10.0  # seconds beyond a run's own limit after which the child itself counts as dead
IMPORTS = 120.0  # seconds for a prelude


class Limits(NamedTuple):
    """What one run may use."""

    seconds: float = 6.0  # wall time; CPU time is cut one second later
    memory_mb: int = 1024  # address space of each process
    processes: int = 8  # at once, threads included
    open_files: int = 64
    file_mb: int = 16  # all files together
    files: int = 256
    output_kb: int = 1024  # standard output and error together


class Run(NamedTuple):
    """outcome: ok, failed (an exception or a non-zero exit status), time, output, died.

    Or unready, where what shall be done before raised `error`.
    """

    outcome: str
    output: str
    error: str


class SandboxError(RuntimeError):
    """The sandbox cannot be set up here; a clause that says why."""


class Child:
    """A process that answers one line of JSON per line of JSON, killed with its group if late."""

    def __init__(self, command, *, stderr=subprocess.DEVNULL, **options):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
            start_new_session=True, **options,
        )
        self.buffer = b""

    def ask(self, request, seconds):
        """The answer, or None if none came in time: then the child is dead."""
        deadline = time.monotonic() + seconds
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except (OSError, ValueError):  # it has died, or was closed
            self.close()
            return None
        return self.answer(deadline)

    def answer(self, deadline):
        """The next line as JSON; None as in ask."""
        out = self.process.stdout.fileno()
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            ready = left > 0 and select.select([out], [], [], left)[0]
            piece = os.read(out, 1 << 16) if ready else b""
            if not piece:
                self.close()
                return None
            self.buffer += piece
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def close(self):
        """Kill the whole process group."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                pipe.close()
            except OSError:
                pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


class Sandbox(Child):
    """Runs programs one after the other; a context manager.

    isolate False leaves namespaces out: limits, an empty environment and a temporary folder remain,
    but programs reach the network and whatever files and processes the user can (as root they run
    as nobody). prelude: trusted Python source, executed once, with what this process can import;
    runs find it as the module `prelude`. Raises SandboxError where the machine refuses namespaces.
    """

    def __init__(self, limits=None, *, isolate=True, prelude=None):
        limits = limits or Limits()
        if not sys.platform.startswith("linux"):
            raise SandboxError("it needs Linux")
        self.limits, self.folder = limits, None
        if not isolate:
            self.folder = tempfile.mkdtemp(prefix="rlsd-sandbox-")
        # -S would lose the packages of the environment.
        bare = ["-S"] if prelude is None else []
        super().__init__(
            [sys.executable, "-I", *bare, "-X", "utf8", os.path.abspath(__file__)],
            env={} if prelude is None else few_settings(), cwd="/",
        )
        hello = self.ask({
            "isolate": isolate, "limits": limits._asdict(), "prelude": prelude,
            "path": [os.path.abspath(folder) for folder in sys.path if folder],
        }, GRACE)
        patience = GRACE if prelude is None else IMPORTS
        if hello == "map my ids":
            self._map_ids()
            hello = self.ask("mapped", patience)
        elif hello == "wait":
            hello = self.answer(time.monotonic() + patience)
        if hello != "ready":
            self.close()
            raise SandboxError(hello or "its process died at the start")

    def _map_ids(self):
        """Root appears as root and nobody (whom programs run as), any other user as nobody."""
        ids = {"uid": os.geteuid(), "gid": os.getegid()}
        root = ids["uid"] == 0
        for kind, own in ids.items():
            lines = f"0 0 1\n{NOBODY} {NOBODY} 1" if root else f"{NOBODY} {own} 1"
            try:
                if kind == "gid" and not root:
                    with open(f"/proc/{self.process.pid}/setgroups", "w") as file:
                        file.write("deny")
                with open(f"/proc/{self.process.pid}/{kind}_map", "w") as file:
                    file.write(lines)
            except OSError as error:
                self.close()
                raise SandboxError(f"{kind}_map: {error.strerror}") from None

    def run(self, *programs, stdin="", name="__main__", before=None):
        """A Run of Python sources, one after the other in a module of this name.

        They start in an empty folder, with the text `stdin` on standard input. before: trusted
        source, executed in the prelude, which keeps what it does for later runs.
        """
        request = {
            "programs": programs, "stdin": stdin, "name": name, "folder": self.folder,
            "before": before,
        }
        got = self.ask(request, self.limits.seconds + GRACE)
        if got is None:
            return Run("died", "", "")
        texts = [base64.b64decode(got[k]).decode(errors="replace") for k in ("output", "error")]
        return Run(got["outcome"], *texts)

    def close(self):
        super().close()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def few_settings():
    """The environment of packages: threads would not outlive a fork, matplotlib asks for a home."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return threads | {"HOME": os.environ.get("HOME", "/")}


@functools.lru_cache
def isolation():
    """ "ok", or why programs cannot be isolated on this machine."""
    try:
        with Sandbox():
            return "ok"
    except SandboxError as error:
        return str(error)


# The child. Names and numbers as in sched.h, sys/mount.h, sys/prctl.h and linux/capability.h.
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18
)
MNT_DETACH = 2
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, CAPABILITY_VERSION_3 = 36, 38, 0x20080522


def _call(name, *arguments):
    """A libc function; OSError with its errno where it returns -1."""
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = [a.encode() if isinstance(a, str) else a for a in arguments]
    if getattr(libc, name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _mount(source, target, kind=None, flags=0, data=None):
    _call("mount", source, target, kind, ctypes.c_ulong(flags), data)


def _prelude(source, path):
    """Execute trusted source as the module `prelude`; the folders of packages that it loaded.

    Of a folder on the path that is no site-packages, the user's own as it may be, only what was
    imported.
    """
    sys.path += [folder for folder in path if folder not in sys.path]
    module = sys.modules["prelude"] = types.ModuleType("prelude")
    exec(compile(source, "prelude.py", "exec"), module.__dict__)
    gc.collect()
    gc.freeze()  # a collection in a run would copy every page
    folders = set()
    for name, loaded in list(sys.modules.items()):
        if "." not in name and (file := getattr(loaded, "__file__", None)):
            own = os.path.dirname(file)
            around = os.path.dirname(own)
            if shared := next((f for f in (own, around) if f.endswith("-packages")), None):
                folders.add(shared)
            elif os.path.basename(file) == "__init__.py":
                folders.add(own)
    library = os.path.dirname(os.__file__) + os.sep
    return sorted(f for f in folders if f.endswith("-packages") or not f.startswith(library))


def _new_root(packages):
    """A read-only root: the standard library, what it loads, packages, and a place for /tmp.

    Returns the place: /var/tmp where packages lie in /tmp, which it would hide.
    """
    root = "/proc"  # a folder that surely exists, holds nothing of the new root and should go
    wanted = [f"{sys.base_prefix}/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64", *packages]
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in filter(os.path.isdir, dict.fromkeys(wanted)):
        os.makedirs(root + path, exist_ok=True)
        _mount(path, root + path, None, MS_BIND | MS_REC)
        # A namespace may not clear what the mount was given, so repeat it.
        kept = os.statvfs(path).f_flag & MS_NOEXEC
        _mount(None, root + path, None,
               MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | kept)
    os.makedirs(f"{root}/dev")
    for path in ("/dev/null", "/dev/zero", "/dev/urandom"):
        open(root + path, "w").close()
        _mount(path, root + path, None, MS_BIND)
    folder = "/var/tmp" if any(p.startswith("/tmp/") for p in wanted) else "/tmp"
    os.makedirs(root + folder, exist_ok=True)
    _mount(None, root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chroot(root)
    os.chdir("/")
    return folder


def _mount_tmp(folder, limits):
    """An empty folder of this run alone; the last run's goes away unread, nothing is deleted."""
    # Its first inode is the folder itself.
    size = f"size={limits.file_mb}m,nr_inodes={limits.files + 1},mode=777"
    _mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, size)


def _give_up_everything(limits, isolate):
    """The rlimits of an untrusted process, then its rights."""
    megabyte = 1 << 20
    cpu = int(limits.seconds) + 1
    # A namespace counts its own: this one and, where they are the same user, its two watchers.
    others = 2 if isolate else _tasks_of(os.geteuid() or NOBODY)
    for name, value in (
        ("AS", limits.memory_mb * megabyte), ("CPU", cpu), ("FSIZE", limits.file_mb * megabyte),
        ("NOFILE", limits.open_files), ("NPROC", limits.processes + others), ("CORE", 0),
    ):
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    _call("prctl", PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    _call("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


def _watch(pid, pipes, limits):
    """(outcome, output, error) of a process: reads its pipes until it ends or breaks a limit."""
    deadline, left = time.monotonic() + limits.seconds, limits.output_kb << 10
    texts, outcome, ended = {fd: b"" for fd in pipes}, None, os.pidfd_open(pid)
    poll = select.poll()
    for fd in (ended, *pipes):
        poll.register(fd, select.POLLIN)
    while outcome is None:
        wait = deadline - time.monotonic()
        ready = [fd for fd, _ in poll.poll(1000 * wait)] if wait > 0 else []
        if not ready:
            outcome = "time"
        for fd in texts.keys() & set(ready):
            piece = os.read(fd, 1 << 16)
            texts[fd] += piece[:left]
            outcome = "output" if len(piece) > left else outcome
            left -= len(piece)
            if not piece:
                poll.unregister(fd)
        if outcome is None and ready == [ended]:
            outcome = "ended"
    os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for fd in (ended, *pipes):
        os.close(fd)
    if outcome == "ended":
        outcome = "ok" if status == 0 else "failed"
    return outcome, *texts.values()


def _kill_descendants(isolate):
    """Kill and reap all that a run left behind; orphans are this process's children."""
    while True:
        targets = [-1]  # all but the init of this process's own namespace, which it is
        if not isolate:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                targets = [int(pid) for pid in file.read().split()]
        for pid in targets:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _open_to_all(folder):
    """Whether every user can enter it."""
    while os.stat(folder).st_mode & 1:
        folder, below = os.path.dirname(folder), folder
        if folder == below:
            return True
    return False


def _tasks_of(uid):
    """How many threads a user has on this machine."""
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{pid}").st_uid == uid:
                count += len(os.listdir(f"/proc/{pid}/task"))
        except OSError:
            pass  # it has ended
    return count


def _serve(limits, place):
    """Answer requests until they end; in a forked child, return the request that it shall run.

    place: _new_root's, None without isolation.
    """
    isolate = place is not None
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        try:
            if request["before"]:
                exec(request["before"], sys.modules["prelude"].__dict__)
        except Exception as error:
            said = base64.b64encode(f"{type(error).__name__}: {error}".encode()).decode()
            _say({"outcome": "unready", "output": "", "error": said})
            continue
        pipes = [os.pipe(), os.pipe()]
        if isolate:
            _mount_tmp(place, limits)
            folder = place
        else:
            folder = tempfile.mkdtemp(dir=request["folder"])
            os.chmod(folder, 0o777)  # the folder around it is the user's alone
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.chdir(folder)
            given = os.memfd_create("stdin")
            with open(given, "wb", closefd=False) as file:
                file.write(request["stdin"].encode(errors="surrogatepass"))
            os.lseek(given, 0, os.SEEK_SET)
            for fd, source in enumerate((given, pipes[0][1], pipes[1][1])):
                os.dup2(source, fd)
            os.closerange(3, 1 << 16)
            _give_up_everything(limits, isolate)
            return request
        for _, writer in pipes:
            os.close(writer)

        outcome, *texts = _watch(pid, [reader for reader, _ in pipes], limits)
        _kill_descendants(isolate)
        if isolate:
            _call("umount2", place, MNT_DETACH)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        output, error = (base64.b64encode(text).decode() for text in texts)
        _say({"outcome": outcome, "output": output, "error": error})
    os._exit(0)


def _say(answer):
    text = json.dumps(answer).encode() + b"\n"
    while text:
        text = text[os.write(1, text) :]


def _child():
    """Set up what the first request asks for; returns the request of a run."""
    setup = json.loads(sys.stdin.buffer.readline())
    isolate, limits, place = setup["isolate"], Limits(**setup["limits"]), None
    os.umask(0o022)
    prelude, packages = setup["prelude"], []
    if isolate:
        try:
            _call("unshare", CLONE_NEWUSER)
            _say("map my ids")
            sys.stdin.buffer.readline()
            _call("unshare", CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID
                  | CLONE_NEWNET)
            pid = os.fork()
            if pid:
                os.waitpid(pid, 0)
                os._exit(0)
            if prelude is not None:
                packages = _prelude(prelude, setup["path"])
            place = _new_root(packages)
        except Exception as error:  # of a prelude, whatever it imports raises
            _say(getattr(error, "strerror", None) or f"{type(error).__name__}: {error}")
            os._exit(1)
    else:
        if prelude is not None:
            _say("wait")
            try:
                packages = _prelude(prelude, setup["path"])
            except Exception as error:
                _say(f"{type(error).__name__}: {error}")
                os._exit(1)
        for folder in (os.path.dirname(os.__file__), *packages):
            if os.geteuid() == 0 and not _open_to_all(folder):
                _say(f"the user nobody, as whom root's programs run, cannot read {folder}")
                os._exit(1)
        _call("prctl", PR_SET_CHILD_SUBREAPER, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    _say("ready")
    return _serve(limits, place)


def _main():
    """The child's life; of a run, the interpreter's ordinary end (threads, buffers) follows."""
    request = _child()
    module = types.ModuleType(request["name"])
    sys.modules[request["name"]] = module
    for k, source in enumerate(request["programs"]):
        exec(compile(source, f"program{k}.py", "exec"), module.__dict__)


if __name__ == "__main__":
    _main()
