"""The round trip of `ping` over a socket pair, with and without the native pulse.

    .venv/bin/python benchmarks/ping.py [ROUNDS]

Once with nothing else to do, once while somebody takes the interpreter's lock for 200 ms again and again, as
a tokenizer does that loads; there in both framings.
"""

import ctypes
import os
import subprocess
import sys
import time
from socket import socketpair

from report import publish

from mlx_sidecar.native.pulse import SWITCH
from mlx_sidecar.protocol.framing import Framing
from mlx_sidecar.runtime.api.presence import PresenceApi
from mlx_sidecar.runtime.server.channel import Channel
from mlx_sidecar.runtime.server.peer import Peer
from mlx_sidecar.runtime.telemetry.vitals import Vitals

HOLD_SECONDS = 0.2
PINGS = {"idle": 2000, "lock held": 60}
PAUSE_SECONDS = {"idle": 0.0, "lock held": 0.05}
SIDES = {
    "Python": ("off", Framing.NDJSON),
    "pulse": ("on", Framing.NDJSON),
    "pulse, LSP": ("on", Framing.LSP),
}


def serve(situation: str) -> None:
    """Answer on stdin, which is a socket, until it ends."""
    vitals = Vitals()
    peer = Peer(Channel(0, 0), PresenceApi(vitals).methods(), None, vitals.pulses)
    peer.start()
    libc = ctypes.PyDLL(None)  # keeps the lock during a call
    while situation == "lock held":
        libc.usleep(int(HOLD_SECONDS * 1e6))
        time.sleep(HOLD_SECONDS / 20)
    time.sleep(3600)


def measure(situation: str, switch: str, framing: Framing) -> list[float]:
    """Return round trips in milliseconds, sorted."""
    ours, theirs = socketpair()
    command = [sys.executable, __file__, "serve", situation]
    with ours, subprocess.Popen(command, stdin=theirs.fileno(), env=os.environ | {SWITCH: switch}) as server:
        theirs.close()
        trips: list[float] = []
        for number in range(PINGS[situation] + 1):
            time.sleep(PAUSE_SECONDS[situation])
            began = time.perf_counter()
            ours.sendall(framing.wrap(b'{"jsonrpc":"2.0","id":%d,"method":"ping"}' % number))
            ours.recv(4096)
            trips.append((time.perf_counter() - began) * 1000)
        server.terminate()
    return sorted(trips[1:])  # The first waits for the start.


def main() -> None:
    """Measure everything, both sides in turn."""
    figures: dict[str, list[float]] = {}
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5):
        for situation in PINGS:
            for name, (switch, framing) in SIDES.items():
                trips = measure(situation, switch, framing)
                median, worst = trips[len(trips) // 2], trips[-1]
                figures.setdefault(f"{situation}, {name}: median", []).append(median)
                figures.setdefault(f"{situation}, {name}: worst", []).append(worst)
    publish("ping", "benchmarks/ping.py", "ms", figures)


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1:2] == ["serve"] else main()
