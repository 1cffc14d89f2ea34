"""A small server of the protocol over stdio, in NDJSON only, on one thread.

It keeps every promise of the conformance suite that NDJSON allows. The name of a break as its argument makes
it break one of them, so that a test can see the suite find out. It shares no code with the real server, and
imports little, because a test starts it many times.
"""

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn, cast

from toy_model import CONTEXT, Answer, Failed, Generating, Json, Tokenizing, Work, ids
from toy_params import PARAMS, SAFE_INTEGER
from toy_registry import Registry

BREAKS = (
    "adapters-ignored",
    "aliases-outlive-models",
    "answers-notifications",
    "answers-twice",
    "batch-answered-apart",
    "dies-on-garbage",
    "empty-batch-answered-with-array",
    "exits-with-zero",
    "force-is-quiet",
    "force-spreads",
    "ids-become-strings",
    "ignores-cancel",
    "ignores-deadlines",
    "ignores-the-window",
    "load-goes-back",
    "loses-work-at-the-end",
    "miscounts-bytes",
    "no-jsonrpc-member",
    "null-result-left-out",
    "progress-after-the-response",
    "reload-cancels",
    "repairs-bad-utf-8",
    "separators-end-lines",
    "separators-not-escaped",
    "settings-forgotten",
    "unknown-method-is-invalid",
)
LIMITS = {
    "maxFrameBytes": 2 << 20,
    "maxSentFrameBytes": 256 << 10,
    "maxBatchMembers": 16,
    "maxInFlight": 1024,
    "maxUnsentBytes": 1 << 20,
}
BEFORE_INITIALIZE = ("initialize", "ping", "server/info", "rpc.discover", "shutdown")
OF_A_LOADED_MODEL = (
    *("reload", "unload", "alias", "loadAdapter", "unloadAdapter"),
    *("tokenize", "detokenize", "generate"),
)
REQUESTS = ("started", "finished", "cancelled", "failed", "shared", "overloaded", "deadlineExceeded")
ENGINE = ("steps", "sequences", "prefilling", "running", "decodeGroups")
LONGEST_ID = 1000
STEP_SECONDS = 0.001
BOM = b"\xef\xbb\xbf"

Send = Callable[[Json], None]


class Lines:
    """Cuts what is read into lines."""

    def __init__(self, *, cut_at_separators: bool) -> None:
        self._cut_at_separators = cut_at_separators
        self._held = bytearray()
        self._searched = 0
        self._begun = self._skipping = False

    def feed(self, chunk: bytes) -> list[bytes | None]:
        """Return the lines that `chunk` completes, and None for each that is too long."""
        if self._cut_at_separators:
            chunk = chunk.replace("\u2028".encode(), b"\n")
        self._held += chunk
        if not self._begun and len(self._held) >= len(BOM):
            self._held = self._held.removeprefix(BOM)
            self._begun = True
        lines: list[bytes | None] = []
        while (end := self._held.find(b"\n", self._searched)) >= 0:
            lines += self._line(bytes(self._held[:end]))
            del self._held[: end + 1]
            self._searched = 0
        self._searched = len(self._held)
        if len(self._held) > LIMITS["maxFrameBytes"]:
            self._held.clear()
            self._searched, self._skipping = 0, True
        return lines

    def close(self) -> list[bytes | None]:
        """Return what the end of the input completes."""
        return self._line(bytes(self._held))

    def _line(self, line: bytes) -> list[bytes | None]:
        too_long = self._skipping or len(line) > LIMITS["maxFrameBytes"]
        self._skipping = False
        if too_long:
            return [None]
        return [line] if line.strip(b" \t\r") else []


class Toy:
    """One connection and everything about it."""

    def __init__(self, broken: str | None) -> None:
        self._broken = broken
        self._started = time.monotonic()
        self._lines = Lines(cut_at_separators=self.broken("separators-end-lines"))
        self._initialized = self._shut_down = False
        self._finished = self._completion = 0
        self.window: int | None = None
        self.works: dict[str, Work] = {}
        self._registry = Registry(self)

    def broken(self, name: str) -> bool:
        """Whether to break the promise called `name`."""
        assert name in BREAKS
        return self._broken == name

    def run(self) -> int:
        """Serve until the end of the input and of the work; return the exit code."""
        signal.signal(signal.SIGTERM, self._on_signal)
        more = True
        poll = select.poll()
        poll.register(0, select.POLLIN)
        while more or self.works:
            if not more:
                time.sleep(STEP_SECONDS)
            elif poll.poll(STEP_SECONDS * 1000 if self.works else None):
                chunk = os.read(0, 65536)
                more = bool(chunk)
                for line in self._lines.feed(chunk) if more else self._lines.close():
                    self._take(line)
                if not more and self.broken("loses-work-at-the-end"):
                    break
            self._step()
        return 0

    def send(self, message: Json | list[Json]) -> None:
        """Write one frame."""
        text = json.dumps(message if isinstance(message, list) else self._signed(message), ensure_ascii=False)
        if not self.broken("separators-not-escaped"):
            for separator in "\u2028\u2029\u0085":
                text = text.replace(separator, f"\\u{ord(separator):04x}")
        data = text.encode() + b"\n"
        while data:
            data = data[os.write(1, data) :]

    def _signed(self, message: Json) -> Json:
        return message if self.broken("no-jsonrpc-member") else {"jsonrpc": "2.0", **message}

    def _on_signal(self, number: int, _: object) -> NoReturn:
        self._cancel_all()
        os._exit(128 + number)

    def _cancel_all(self) -> None:
        for work in self.works.values():
            work.cancel()
        self._step()

    def _step(self) -> None:
        for key, work in list(self.works.items()):
            if work.result is None:
                work.step()
            if work.result is not None:
                del self.works[key]
                if isinstance(work, Generating):
                    self._finished += 1
                    self._completion += len(work.said)
                work.answer(work.result)
                if isinstance(work, Generating):
                    work.after()

    # -- from a line to a call --

    def _take(self, line: bytes | None) -> None:
        if line is None:
            self._refuse(Failed(-32600, "invalid_request"))
            return
        try:
            errors = "replace" if self.broken("repairs-bad-utf-8") else "strict"
            message = json.loads(line.decode("utf-8", errors), parse_constant=_refuse)
            json.dumps(message, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            if self.broken("dies-on-garbage"):
                os._exit(1)
            self._refuse(Failed(-32700, "parse_error"))
            return
        if isinstance(message, list):
            self._take_batch(cast(list[Any], message))
        else:
            self._take_one(message, self._answer, batched=False)

    def _take_batch(self, batch: list[Any]) -> None:
        if not batch or len(batch) > LIMITS["maxBatchMembers"]:
            refusal: Json = {"id": None, "error": Failed(-32600, "invalid_request").wire}
            as_array = self.broken("empty-batch-answered-with-array")
            self.send([self._signed(refusal)] if as_array else refusal)
            return
        answers: list[Json] = []
        expected = sum("id" in one or "jsonrpc" not in one for one in map(_members, batch))

        def collect(answer: Json) -> None:
            answers.append(self._signed(answer))
            if self.broken("batch-answered-apart"):
                self.send(answer)
            elif len(answers) == expected:
                self.send(answers)

        for member in batch:
            self._take_one(member, collect, batched=True)

    def _take_one(self, message: Any, send: Send, *, batched: bool) -> None:
        members = _members(message)
        request_id, method, params = members.get("id"), members.get("method"), members.get("params")
        usable = isinstance(request_id, str) and len(request_id) <= LONGEST_ID
        usable = usable or (type(request_id) is int and abs(request_id) <= SAFE_INTEGER)
        good = members.get("jsonrpc") == "2.0" and isinstance(method, str)
        good = good and isinstance(params, dict | list | None) and (usable or "id" not in members)
        if not good:
            shown = request_id if usable else None
            send({"id": shown, "error": Failed(-32600, "invalid_request").wire})
        elif "id" in members:
            self._call(request_id, str(method), {} if params is None else params, send, batched=batched)
        else:
            self._notified(str(method), _members(params))

    def _answer(self, answer: Json) -> None:
        self.send(answer)
        if self.broken("answers-twice") and answer.get("error", {}).get("code") == -32601:
            self.send(answer)

    def _refuse(self, error: Failed) -> None:
        self.send({"id": None, "error": error.wire})

    def _notified(self, method: str, params: Json) -> None:
        if method == "exit":
            os._exit(0 if self._shut_down or self.broken("exits-with-zero") else 1)
        elif method == "$/cancelRequest":
            if (work := self.works.get(json.dumps(params.get("id")))) is not None:
                work.cancel()
        elif method == "$/streamAck":
            token, seq = json.dumps(params.get("token")), params.get("seq")
            for work in self.works.values():
                if isinstance(work, Generating) and json.dumps(work.token) == token and isinstance(seq, int):
                    work.acked(seq)
        elif self.broken("answers-notifications"):
            self._refuse(Failed(-32601, "method_not_found"))

    def _call(self, request_id: Any, method: str, params: Any, send: Send, *, batched: bool) -> None:
        shown = str(request_id) if self.broken("ids-become-strings") else request_id

        def answer(outcome: Any) -> None:
            limit = LIMITS["maxSentFrameBytes"]
            if not isinstance(outcome, Failed) and len(json.dumps(outcome)) > limit:
                outcome = Failed(1008, "response_too_large", maxSentFrameBytes=limit)
            if isinstance(outcome, Failed):
                send({"id": shown, "error": outcome.wire})
            elif outcome is None and self.broken("null-result-left-out"):
                send({"id": shown})
            else:
                send({"id": shown, "result": outcome})

        try:
            self._check(request_id, method, params, batched=batched)
            handler = getattr(self, "_do_" + method.replace("/", "_").replace(".", "_"))
            outcome = handler(params, answer)
        except Failed as failed:
            outcome = failed
        if isinstance(outcome, Work):
            self.works[json.dumps(request_id)] = outcome
        else:
            answer(outcome)

    def _check(self, request_id: Any, method: str, params: Any, *, batched: bool) -> None:
        if self._shut_down:
            raise Failed(-32600, "shutting_down", retryable=True)
        if json.dumps(request_id) in self.works:
            raise Failed(-32600, "duplicate_id", id=request_id)
        if batched and (method in ("initialize", "shutdown") or "partialResultToken" in params):
            raise Failed(-32600, "invalid_request")
        if method not in PARAMS:
            wrong = self.broken("unknown-method-is-invalid")
            raise Failed(-32600 if wrong else -32601, "method_not_found", method=method)
        if not self._initialized and method not in BEFORE_INITIALIZE:
            raise Failed(-32002, "not_initialized")
        path = PARAMS[method](params)
        if path is not None:
            raise Failed(-32602, "invalid_params", path=path.lstrip("."))
        if method in OF_A_LOADED_MODEL and params["model"] is not None:
            self._registry.find(params["model"])

    # -- methods --

    def _do_initialize(self, params: Json, _: Answer) -> Json:
        if params["protocolVersion"] != 1:
            raise Failed(-32602, "invalid_params", path="protocolVersion")
        if self._initialized:
            raise Failed(-32600, "invalid_request")
        self._initialized = True
        self.window = params.get("flowControl", {}).get("windowBytes")
        return self._info()

    def _do_shutdown(self, _: Json, __: Answer) -> None:
        self._cancel_all()
        self._shut_down = True

    def _do_ping(self, _: Json, __: Answer) -> Json:
        return {**self._vitals(), "inFlight": len(self.works), "lastStepAgeMs": None}

    def _do_server_info(self, _: Json, __: Answer) -> Json:
        return {**self._info(), **self._vitals(), "processId": os.getpid(), "platform": sys.platform}

    def _do_rpc_discover(self, _: Json, __: Answer) -> Json:
        methods = [{"name": name} for name in PARAMS]
        return {"openrpc": "1.4.1", "info": {"title": "toy", "version": "0"}, "methods": methods}

    def _do_load(self, params: Json, _: Answer) -> Json:
        return self._registry.load(params)

    def _do_reload(self, params: Json, _: Answer) -> Json:
        return self._registry.reload(params)

    def _do_unload(self, params: Json, answer: Answer) -> Work:
        return self._registry.unload(params, answer)

    def _do_alias(self, params: Json, _: Answer) -> Json:
        return self._registry.alias(params)

    def _do_models(self, _: Json, __: Answer) -> Json:
        return {"models": self._registry.infos()}

    def _do_pull(self, params: Json, _: Answer) -> Json:
        raise Failed(1018, "pull_failed", model=params["model"])

    def _do_loadAdapter(self, params: Json, _: Answer) -> Json:  # noqa: N802
        return self._registry.load_adapter(params)

    def _do_unloadAdapter(self, params: Json, answer: Answer) -> Work:  # noqa: N802
        return self._registry.unload_adapter(params, answer)

    def _do_tokenize(self, params: Json, answer: Answer) -> Work:
        return Tokenizing(answer, "".join(map(chr, ids(params))))

    def _do_detokenize(self, params: Json, _: Answer) -> Json:
        return {"text": "".join(map(chr, _known(params["tokens"])))}

    def _do_generate(self, params: Json, answer: Answer) -> Work:
        given = [name for name in ("prompt", "tokens", "messages") if name in params]
        if len(given) != 1 or not params[given[0]]:
            raise Failed(-32602, "invalid_params", path=given[-1] if given else "messages")
        self._registry.use(params)
        prompt = _known(ids(params))
        if len(prompt) >= CONTEXT:
            raise Failed(1004, "context_overflow", promptTokens=len(prompt), contextLength=CONTEXT)
        return Generating(answer, self, params, prompt)

    def _do_stats(self, _: Json, __: Answer) -> Json:
        memory = ("residentBytes", "peakResidentBytes", "mlxActiveBytes", "mlxCacheBytes", "mlxPeakBytes")
        pressure = {"level": "none", **dict.fromkeys(("caches", "models", "requests", "restored"), 0)}
        absent = {"active": False, "reason": "a toy has none"}
        return {
            "uptimeMs": 0,
            "memory": {**dict.fromkeys(memory, 0), "pressure": pressure},
            "requests": dict.fromkeys(REQUESTS, 0) | {"finished": self._finished},
            "tokens": {"prompt": 0, "completion": self._completion},
            "engine": {"state": "ready", **dict.fromkeys(ENGINE, 0), "sequences": len(self.works)}
            | {"waiting": dict.fromkeys(("critical", "high", "normal", "low"), 0)},
            "models": self._registry.infos(),
            "residency": dict.fromkeys(("evicted", "expired", "broughtBack"), 0),
            "prediction": {**absent, **dict.fromkeys(("predictions", "hits", "misses"), 0)},
            "native": {"blas": absent, "pages": absent, "pulse": absent},
        }

    def _info(self) -> Json:
        return {
            "protocolVersion": 1,
            "serverInfo": {"name": "toy", "version": "0"},
            "capabilities": {"streaming": True, "cancel": True},
            "limits": LIMITS,
            "instanceId": f"toy-{os.getpid()}",
        }

    def _vitals(self) -> Json:
        return {"state": "ready", "uptimeMs": (time.monotonic() - self._started) * 1000}


def _members(value: Any) -> Json:
    return cast(Json, value) if isinstance(value, dict) else {}


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)


def _known(tokens: list[int]) -> list[int]:
    for at, token in enumerate(tokens):
        if token > sys.maxunicode:
            raise Failed(-32602, "invalid_params", path=f"tokens[{at}]")
    return tokens


def main() -> NoReturn:
    """Serve on stdin and stdout."""
    os._exit(Toy(sys.argv[1] if len(sys.argv) > 1 else None).run())


if __name__ == "__main__":
    main()
