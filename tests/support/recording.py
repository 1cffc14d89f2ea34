"""The sidecar as a client that we did not write starts it, with everything it says held up to the schema."""

import fcntl
import shlex
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from support.eavesdropper import Eavesdropper
from support.wire import COMMAND

RECORDER = Path(__file__).with_name("recorder.py")


@contextmanager
def recorded(folder: Path, command: Sequence[str] = (COMMAND,)) -> Generator[str]:
    """Yield a program that is `command`; at the end of the block check what was said by all that it started.

    It takes arguments as `command` does, speaks over what it speaks over, and ends as it ends.
    """
    folder.mkdir()
    program = folder / "program"
    recorder = shlex.join([sys.executable, "-IS", str(RECORDER), str(folder), *command])
    program.write_text(f'#!/bin/sh\nexec {recorder} "$@"\n')
    program.chmod(0o700)
    yield str(program)
    # Whoever still records holds it.
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
    recordings = sorted(folder.glob("*.heard"))
    assert any(heard.stat().st_size for heard in recordings), "Nothing was said that could be checked."
    for heard in recordings:
        check(heard.with_suffix(".said").read_bytes(), heard.read_bytes())


def check(said: bytes, heard: bytes) -> None:
    """Check all that a server said on one connection against all that it was asked."""
    eavesdropper = Eavesdropper()
    eavesdropper.said(said)
    eavesdropper.heard(heard)
    eavesdropper.ended()
