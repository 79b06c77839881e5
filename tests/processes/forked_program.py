"""What the tests of the fork server run as `python -m forked_program WHAT`."""

import atexit
import gc
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import preloaded


def report() -> None:
    print("argv", *sys.argv[1:], "main", sys.modules["__main__"].__spec__.name)
    print(
        "mark",
        os.environ.get("MARK"),
        "path",
        "PATH" in os.environ,
        "server's",
        os.environ.get("SERVERS"),
        "preloaded in",
        os.getpid() != preloaded.PID,
    )
    print("session", os.getsid(0) == os.getpid(), "parent", os.getppid())
    temporary = os.path.samefile(tempfile.gettempdir(), os.environ["TMPDIR"])
    print("collects", gc.isenabled(), "own temporary", temporary, "unbuffered", sys.stdout.write_through)
    with os.fdopen(int(os.environ["EXPRL_HEARTBEAT"]), "w") as file:
        file.write("through the descriptor")
    atexit.register(print, "at the end")


def write() -> None:
    made = Path(sys.argv[2])
    made.mkdir()
    (made / "file").touch()


def idle() -> None:
    print("ready", os.getpid(), flush=True)
    time.sleep(600)


def wait() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    idle()


def fail() -> None:
    raise ValueError("as it should")


if __name__ == "__main__":
    programs = {"report": report, "write": write, "wait": wait, "idle": idle, "fail": fail}
    (programs | {"exit": lambda: sys.exit("a sentence")})[sys.argv[1]]()
