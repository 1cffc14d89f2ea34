"""Threads for work that would keep the event loop waiting: templates, tokenizing, reading folders."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
ResultT = TypeVar("ResultT")


class Pool:
    """At most `threads` pieces of work at a time, in the order in which they were asked for.

    Cancelling whoever waits drops work that has not begun. Work that has keeps its thread until it ends: no
    more may begin in its place, or cancelled requests could fill the memory.
    """

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, "pool")

    async def run(self, work: Callable[P, ResultT], *args: P.args, **kwargs: P.kwargs) -> ResultT:
        """Return what `work` returns."""
        return await asyncio.wrap_future(self._executor.submit(work, *args, **kwargs))
