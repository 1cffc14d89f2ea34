import subprocess
import sys

from support.wire import COMMAND

NOISE = """
import ctypes, os, subprocess, sys
from mlx_sidecar.runtime.server.stdio import claim_stdio
wire = claim_stdio()
print("from print", flush=True)
os.write(1, b"from descriptor 1\\n")
ctypes.CDLL(None).puts(b"from C")
ctypes.CDLL(None).fflush(None)
subprocess.run(["echo", "from a child"], check=True)
assert sys.stdin.read() == "", "stdin must be empty for everybody else"
assert subprocess.run(["cat"], capture_output=True, check=True).stdout == b""
os.write(wire.write, b"got " + os.read(wire.read, 100))
"""


def test_nothing_but_the_wire_reaches_stdout_and_nothing_but_the_wire_reads_stdin() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOISE], input=b"hello", capture_output=True, check=True, timeout=60
    )
    assert done.stdout == b"got hello"
    for source in (b"from print", b"from descriptor 1", b"from C", b"from a child"):
        assert source in done.stderr


def test_the_wire_is_closed_in_child_processes() -> None:
    script = (
        "import os, subprocess, sys\n"
        "from mlx_sidecar.runtime.server.stdio import claim_stdio\n"
        "wire = claim_stdio()\n"
        "held = subprocess.run(['ls', '/dev/fd/'], stdout=subprocess.PIPE, close_fds=False).stdout.split()\n"
        "os.write(wire.write, b'leaked' if str(wire.write).encode() in held else b'closed')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=b"", capture_output=True, check=True, timeout=60
    )
    assert done.stdout == b"closed"


def test_a_closed_stderr_is_survived() -> None:
    script = (
        "import os\n"
        "os.close(2)\n"
        "from mlx_sidecar.runtime.server.stdio import claim_stdio\n"
        "wire = claim_stdio()\n"
        "print('noise', flush=True)\n"
        "os.write(wire.write, b'fine')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    )
    assert done.stdout == b"fine"


def test_standard_descriptors_that_were_closed_read_as_ended_and_swallow_what_is_written() -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec "{COMMAND}" serve <&- >&-'], capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
