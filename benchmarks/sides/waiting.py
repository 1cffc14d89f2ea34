"""What a stream costs that waits: memory of the server with many streams in line, over that with few.

python waiting.py MODEL DTYPE RUNNING WAITING

Best with a small model, whose own memory does not hide the difference. Each process tells only once: what a
stream has used is used again by the next.
"""

import sys

import anyio
from child import say
from msgspec.structs import astuple
from sidecar_python import COMMAND

from mlx_sidecar.client import Sidecar
from mlx_sidecar.client.generation import Generation

MAX_TOKENS = 8000
"""Of each stream: more than are made while this looks."""


async def main() -> None:
    """Print the KiB per waiting stream."""
    model, dtype, running, waiting = sys.argv[1:]
    command = (*COMMAND, "--max-sequences", running)
    async with Sidecar.spawn(command, start_timeout=120) as sidecar:
        await sidecar.load(model, dtype=dtype)

        def begin(number: int) -> Generation:
            # No two alike: identical requests may be run as one.
            prompt = [1000 + number, *range(1000, 1015)]
            return sidecar.generate(model, tokens=prompt, maxTokens=MAX_TOKENS)

        streams = [begin(number) for number in range(int(running))]
        for stream in streams:
            await stream.take()
        before = await sidecar.stats()
        streams += [begin(len(streams) + number) for number in range(int(waiting))]
        after = await sidecar.stats()
        while after.engine.sequences < len(streams):
            await anyio.sleep(0.01)
            after = await sidecar.stats()
    in_line = sum(astuple(after.engine.waiting))
    if in_line != int(waiting):
        sys.exit(f"{in_line} streams wait, and not {waiting}: the others ended, or run")
    grown = after.memory.resident_bytes - before.memory.resident_bytes
    say({"kibPerStream": grown / 1024 / int(waiting)})


if __name__ == "__main__":
    anyio.run(main)
