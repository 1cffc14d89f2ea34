"""Our sidecar through its Python client over stdio: one round for every line on stdin.

python sidecar_python.py MODEL DTYPE FIRST_REQUEST
"""

import sys
import time
from collections.abc import Callable
from functools import partial

import anyio
import msgspec
from child import first_request, say
from rounds import Answer, Ready, Request, Round

from mlx_sidecar.client import Sidecar

COMMAND = (sys.executable, "-P", "-m", "mlx_sidecar.runtime", "serve", "--log-level", "error")


class Streams:
    """The streams of one round."""

    def __init__(self, sidecar: Sidecar, model: str, asked: Round) -> None:
        self._sidecar = sidecar
        self._model = model
        self._requests = asked.requests
        self._answers: dict[int, Answer] = {}
        self._counts = {number: 0 for number, one in enumerate(asked.requests) if not one.after_tokens}
        self._grown = anyio.Event()
        self._began = time.perf_counter()

    async def run(self) -> list[Answer]:
        """Ask for all of them and return their answers, in order."""
        async with anyio.create_task_group() as tasks:
            for number in range(len(self._requests)):
                tasks.start_soon(self._run_one, number)
        return [self._answers[number] for number in range(len(self._requests))]

    async def _run_one(self, number: int) -> None:
        request = self._requests[number]
        while min(self._counts.values()) < request.after_tokens:
            await self._grown.wait()
        self._answers[number] = await ask(
            self._sidecar, self._model, request, self._began, partial(self._count, number)
        )

    def _count(self, number: int, tokens: int) -> None:
        if number in self._counts:
            self._counts[number] += tokens
            self._grown.set()
            self._grown = anyio.Event()


async def ask(
    sidecar: Sidecar, model: str, request: Request, began: float, on_tokens: Callable[[int], None]
) -> Answer:
    """Ask for one stream and return it whole."""
    answer = Answer(sent=(time.perf_counter() - began) * 1000, parts=[], ids=[], text="")
    async for part in sidecar.generate(model, tokens=request.tokens, maxTokens=request.max_tokens):
        answer.parts.append(((time.perf_counter() - began) * 1000, len(part.tokens)))
        answer.ids.extend(part.tokens)
        answer.text = (answer.text or "") + part.text
        on_tokens(len(part.tokens))
    return answer


async def main() -> None:
    """Start, load, answer the first request, then every line."""
    model, dtype, first = sys.argv[1:]
    spawned = time.perf_counter()
    async with Sidecar.spawn(COMMAND, start_timeout=120) as sidecar:
        began = time.perf_counter()
        await sidecar.load(model, dtype=dtype)
        ready = Ready(sidecar.process_id or 0, load_ms=(time.perf_counter() - began) * 1000)
        if (request := first_request(first)) is not None:
            ready.first_token_ms = (await ask(sidecar, model, request, spawned, _ignore)).parts[0][0]
        say(ready)
        while line := await anyio.to_thread.run_sync(sys.stdin.readline):
            asked = msgspec.json.decode(line, type=Round)
            say(await sidecar.stats() if asked.how == "stats" else await Streams(sidecar, model, asked).run())


def _ignore(_: int) -> None:
    """Count nothing."""


if __name__ == "__main__":
    anyio.run(main, backend_options={"use_uvloop": True})
