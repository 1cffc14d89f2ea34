"""Who is let in, and when: the line, the rows that a model has, and the memory, looked at together.

Changed on the inference thread only. `retry_after_ms` and `first_token_seconds` may be asked on any thread;
they look at single numbers.
"""

from collections.abc import Callable
from typing import Generic

from mlx_sidecar.protocol.errors import OutOfMemory

from .forecast import Forecast
from .item import ItemT
from .memory import Footprint, MemoryBudget, MemoryReport, Shortfall
from .waiting import Waiting, WaitingReport


class _Desk:
    """One model's rows and measurements."""

    def __init__(self, most_rows: int, chunk_tokens: int) -> None:
        self.free_rows = most_rows
        self.forecast = Forecast(chunk_tokens)


class Admission(Generic[ItemT]):
    """Keeps the line and lets in whoever is next, as far as there are rows and memory."""

    def __init__(self, *, budget_bytes: int, most_waiting: int, ageing_seconds: float) -> None:
        self._memory: MemoryBudget[ItemT] = MemoryBudget(budget_bytes)
        self._waiting: Waiting[ItemT] = Waiting(ageing_seconds)
        self._most_waiting = most_waiting
        self._desks: dict[str, _Desk] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def open(self, model: str, footprint: Footprint, *, most_rows: int, chunk_tokens: int) -> None:
        """Let sequences of a model in from now on."""
        self._desks[model] = _Desk(most_rows, chunk_tokens)
        self._memory.set_model(model, footprint)

    def close(self, model: str) -> list[ItemT]:
        """Let nobody in any more, and return those who waited. Whoever ran must have left."""
        left = [item for item in self._waiting if item.model == model]
        for item in left:
            self._waiting.remove(item)
        self._memory.forget_model(model)
        self._desks.pop(model, None)
        return left

    def put(self, item: ItemT) -> bool:
        """Let an item wait; return whether it can run beside the models in memory. If not, one has to leave.

        Raises:
            OutOfMemory: it would wait for ever, even if every other model left.
        """
        if not self._memory.could_ever(item.model, len(item.prompt), item.max_tokens):
            raise self.out_of_memory(item)
        self._waiting.put(item)
        return self._can_ever(item)

    def needed(self, item: ItemT) -> int:
        """Return the bytes that an item needs when nothing else runs."""
        return self._memory.needed(item.model, len(item.prompt), item.max_tokens)

    def out_of_memory(self, item: ItemT) -> OutOfMemory:
        """Return the error for an item that there will be no memory for."""
        return OutOfMemory(self.needed(item), max(self._memory.available_bytes, 0))

    def hopeless(self) -> list[ItemT]:
        """Return those who wait and can never fit beside the models in memory now."""
        return [item for item in self._waiting if not self._can_ever(item)]

    def refuse(self, items: list[ItemT]) -> None:
        """Let items wait no longer."""
        for item in items:
            self._waiting.remove(item)

    def shortfall(self, needed_bytes: int, beside: str | None = None) -> Shortfall:
        """Return what is lacking for a model of so many bytes, so that whoever waits still has a chance.

        With `beside` it is for a request to that model, which is in memory.
        """
        hungriest = 0 if beside else max((self.needed(item) for item in self._waiting), default=0)
        now, ever = self._memory.shortfall(needed_bytes)
        return Shortfall(now, ever + hungriest)

    def claim(self, owner: str, needed_bytes: int) -> None:
        """Keep memory for a model that is about to come, from everybody who does not run yet."""
        self._memory.claim(owner, needed_bytes)

    def release_claim(self, owner: str) -> None:
        """Give up a claim; nothing if there is none."""
        self._memory.release_claim(owner)

    @property
    def is_overdrawn(self) -> bool:
        """Whether some of those who run must end before a claim can be used."""
        return self._memory.is_overdrawn

    def resize(self, model: str, footprint: Footprint) -> None:
        """Count a model anew that has got or lost an adapter."""
        self._memory.set_model(model, footprint)

    def footprint(self, model: str) -> Footprint | None:
        """Return what a model takes; None if it is not known."""
        return self._memory.footprint(model)

    def reconfigure(self, *, budget_bytes: int, most_waiting: int, ageing_seconds: float) -> None:
        """Go by other limits from now on; whoever runs goes on."""
        self._memory.budget_bytes = budget_bytes
        self._most_waiting = most_waiting
        self._waiting.ageing_seconds = ageing_seconds

    def withdraw(self, item: ItemT) -> bool:
        """Let an item wait no longer; return whether it waited."""
        return self._waiting.remove(item)

    def admit(self, let_in: Callable[[ItemT], None]) -> None:
        """Let in whoever can run now, the most urgent first."""
        while len(self._waiting):
            open_models = {model for model, desk in self._desks.items() if desk.free_rows}
            item = self._waiting.take(open_models, self._memory.reserve)
            if item is None:
                return
            self._desks[item.model].free_rows -= 1
            let_in(item)

    def left(self, item: ItemT, completion_tokens: int) -> None:
        """Take back the row and the memory of one that was let in; nothing if it was not."""
        desk = self._desks.get(item.model)
        if desk is None or not self._memory.release(item):
            return
        desk.free_rows += 1
        desk.forecast.note_finished(len(item.prompt), completion_tokens)
        self._waiting.charge(item, completion_tokens)

    def note_step(self, model: str, seconds: float, prefilled: int) -> None:
        """Take in a step of a model that waited for a decode step or for `prefilled` prompt tokens."""
        forecast = self._desks[model].forecast
        if prefilled:
            forecast.note_prefill(prefilled, seconds)
        else:
            forecast.note_decode(seconds)

    def retry_after_ms(self, model: str, running: int, coming: int) -> int | None:
        """Return None if there is room in the line, or when there will likely be.

        `coming` are on their way to the line.
        """
        places = len(self._waiting) + coming - self._most_waiting + 1
        if places <= 0 or (desk := self._desks.get(model)) is None:
            return None
        return desk.forecast.retry_after_ms(places, running)

    def first_token_seconds(self, model: str, prompt_tokens: int) -> float:
        """Return the least time in which a first token can come; 0 while nothing is known."""
        desk = self._desks.get(model)
        return 0.0 if desk is None else desk.forecast.first_token_seconds(0, prompt_tokens)

    def report(self) -> tuple[WaitingReport, MemoryReport]:
        """Return the state of the line and of the memory."""
        return self._waiting.report(), self._memory.report()

    def _can_ever(self, item: ItemT) -> bool:
        return self._memory.can_ever(item.model, len(item.prompt), item.max_tokens)
