"""The toy server's work: requests that take their time, and a "model" that repeats what it is given."""

import time
from collections.abc import Callable
from typing import Any, Protocol

MODEL = "toy"
CONTEXT = 1024
CHARACTERS_PER_STEP = 50_000

Json = dict[str, Any]
Answer = Callable[[Any], None]


class Failed(Exception):
    """What an error response says."""

    def __init__(self, code: int, kind: str, *, retryable: bool = False, **data: Any) -> None:
        super().__init__(kind)
        data = {"kind": kind, "retryable": retryable, **data}
        self.wire = {"code": code, "message": f"This is a case of {kind}.", "data": data}


class Server(Protocol):
    """What the work needs of the server."""

    window: int | None
    works: "dict[str, Work]"

    def broken(self, name: str) -> bool: ...
    def send(self, message: Json) -> None: ...


class Work:
    """A request in flight. `step` does a little; the request is answered once `result` is not None."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.result: Any = None

    def step(self) -> None:
        """Come a little closer to the result."""

    def cancel(self) -> None:
        """Come to the result now."""
        self.result = Failed(-32800, "cancelled")


class Tokenizing(Work):
    """Takes time in proportion to the text."""

    def __init__(self, answer: Answer, text: str) -> None:
        super().__init__(answer)
        self._text = text
        self._steps = len(text) // CHARACTERS_PER_STEP

    def step(self) -> None:
        """Count down."""
        if self._steps == 0:
            self.result = {"tokens": [ord(character) for character in self._text]}
        self._steps -= 1


class Generating(Work):
    """Says a token in every step: the one that `logitBias` wants, or the prompt over and over."""

    def __init__(self, answer: Answer, server: Server, params: Json, prompt: list[int]) -> None:
        super().__init__(answer)
        self.token = params.get("partialResultToken")
        self.adapter = params.get("adapter")
        self.said: list[int] = []
        self._server = server
        self._prompt = prompt
        self._most = min(params.get("maxTokens", 1024), CONTEXT - len(prompt))
        self._forced = [int(name) for name in params.get("logitBias", {})]
        self._stop_tokens: list[int] = params.get("stopTokenIds", [])
        self._stops: list[str] = params.get("stop", [])
        self._log_probs: int | None = params.get("logProbs")
        self._sent = self._acked = 0
        self._deadline_ms: int | None = params.get("deadlineMs")
        self._began = time.monotonic()

    def step(self) -> None:
        """Say one token, or end."""
        if self._too_late():
            self.result = Failed(
                1010, "deadline_exceeded", deadlineMs=self._deadline_ms, neverStarted=not self.said
            )
            return
        token = (self._forced or self._prompt)[len(self.said) % len(self._forced or self._prompt)]
        if token in self._stop_tokens or any(stop in _text([*self.said, token]) for stop in self._stops):
            self._end("stop")
            return
        self.said.append(token)
        window = None if self._server.broken("ignores-the-window") else self._server.window
        if window is None or _size(self.said[self._acked : self._sent]) < window:
            self._send()
        if len(self.said) >= self._most:
            self._end("length")

    def cancel(self) -> None:
        """End with what there is."""
        while self._server.broken("ignores-cancel") and self.result is None:
            self.step()
        if self.result is None:
            self._end("cancelled")

    def acked(self, seq: int) -> None:
        """Note that the client has dealt with everything up to `seq`."""
        self._acked = max(self._acked, min(seq, self._sent))

    def after(self) -> None:
        """Say what comes too late."""
        if self._server.broken("progress-after-the-response"):
            self.said += self.said[:1]
            self._send()

    def _too_late(self) -> bool:
        if self._deadline_ms is None or self._server.broken("ignores-deadlines"):
            return False
        return time.monotonic() >= self._began + self._deadline_ms / 1000

    def _send(self) -> None:
        tokens = self.said[self._sent :]
        if self.token is None or not tokens:
            return
        self._sent += len(tokens)
        merged = {"merged": len(tokens)} if len(tokens) > 1 else {}
        value = {"seq": self._sent, "text": _text(tokens), "tokens": tokens, **merged, **self._told(tokens)}
        self._server.send({"method": "$/progress", "params": {"token": self.token, "value": value}})

    def _told(self, tokens: list[int]) -> Json:
        if self._log_probs is None:
            return {}
        # It is sure of what it says, and of nothing else.
        others = [{"token": 0, "logProb": None}] * (self._log_probs - 1)
        tops = [[{"token": token, "logProb": 0.0}, *others][: self._log_probs] for token in tokens]
        return {"logProbs": [{"logProb": 0.0, "top": top} for top in tops]}

    def _end(self, reason: str) -> None:
        self._send()
        timings = ("queueMs", "prefillMs", "ttftMs", "decodeMs", "tokensPerSecond")
        self.result = {
            "finishReason": reason,
            "usage": {"promptTokens": len(self._prompt), "completionTokens": len(self.said)},
            "timings": dict.fromkeys(timings, 0.5),
        }
        if self.token is None:
            self.result |= {"text": _text(self.said), "tokens": self.said, **self._told(self.said)}
        else:
            surplus = self._server.broken("miscounts-bytes")
            self.result |= {"lastSeq": self._sent, "textBytes": _size(self.said) + surplus}


def ids(params: Json) -> list[int]:
    """Return the tokens of whatever prompt or text is in `params`: the code points of its characters."""
    if "tokens" in params:
        return params["tokens"]
    said = [message["content"] for message in params.get("messages", [])]
    text = "".join([*said, params.get("prompt", ""), params.get("text", "")])
    return [ord(character) for character in text]


def _text(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


def _size(tokens: list[int]) -> int:
    return len(_text(tokens).encode())
