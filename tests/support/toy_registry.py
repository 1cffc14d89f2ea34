"""The toy server's one model: how it is called, what it was told, and the one adapter that it can have."""

import sys
from collections.abc import Callable

from toy_model import CONTEXT, MODEL, Answer, Failed, Generating, Json, Server, Work

ADAPTER = "/toy-adapter"
FACTS = {"dtype": "none", "parameters": 1, "contextLength": CONTEXT, "bytes": 1}
READY = {"model": MODEL, "state": "ready", **FACTS}


class Leaving(Work):
    """Waits until nobody uses what is to leave."""

    def __init__(self, answer: Answer, in_use: Callable[[], object], leave: Callable[[], Json]) -> None:
        super().__init__(answer)
        self._in_use = in_use
        self._leave = leave

    def step(self) -> None:
        """Look whether it is free."""
        if not self._in_use():
            self.result = self._leave()


class Registry:
    """What the toy holds."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loads = self._uses = 0
        self._pinned = False
        self._ttl_ms: int | None = None
        self._aliases: set[str] = set()
        self._adapters: set[str] = set()
        self.loaded = False

    def find(self, name: str) -> None:
        """Refuse a name that nothing loaded has."""
        if not self.loaded or name not in {MODEL, *self._aliases}:
            raise Failed(1002, "model_not_loaded", model=name)

    def use(self, params: Json) -> None:
        """Refuse a request for an adapter that is not there."""
        self._uses += 1
        adapter = params.get("adapter")
        if adapter is not None and not self._server.broken("adapters-ignored"):
            self._find_adapter(adapter)

    def infos(self) -> list[Json]:
        """Return the lines of `models`."""
        if not self.loaded:
            return []
        told = {"uses": self._uses, "loads": self._loads, "pinned": self._pinned, "ttlMs": self._ttl_ms}
        adapters = [self._adapter(name) for name in sorted(self._adapters)]
        named = {"aliases": sorted(self._aliases), "adapters": adapters}
        return [{**READY, "inUse": len(self._using()), **told, **named}]

    def load(self, params: Json) -> Json:
        """Load the model, or apply what is said of it."""
        name = params["model"]
        if name not in {MODEL, *self._aliases} or "revision" in params:
            code, kind = (1003, "invalid_model") if name == "/" else (1001, "model_not_found")
            raise Failed(code, kind, model=name)
        if not self.loaded or self._server.broken("settings-forgotten"):
            self._pinned, self._ttl_ms = False, None
        self._loads += not self.loaded
        self.loaded = True
        self._pinned = params.get("pin", self._pinned)
        self._ttl_ms = params.get("ttlMs", self._ttl_ms)
        if "alias" in params:
            self.alias(params)
        return self._told(params)

    def reload(self, params: Json) -> Json:
        """Say that it is as it was."""
        if self._server.broken("reload-cancels"):
            self._end(self._using(), Failed(-32800, "cancelled"))
        return self._told(params)

    def unload(self, params: Json, answer: Answer) -> Work:
        """Let the model go once nobody uses it."""
        if params.get("force"):
            self._end(self._using(), Failed(1017, "unloaded", model=MODEL))
        return Leaving(answer, self._using, self._leave)

    def alias(self, params: Json) -> Json:
        """Give the model another name, or take one away."""
        alias, model = params["alias"], params["model"]
        if alias == MODEL:
            raise Failed(-32602, "invalid_params", path="alias")
        previous = MODEL if alias in self._aliases else None
        self._aliases.discard(alias)
        if model is not None:
            self._aliases.add(alias)
        return {"alias": alias, "model": model and MODEL, "previous": previous}

    def load_adapter(self, params: Json) -> Json:
        """Load the adapter under a name of its own."""
        name = params["adapter"]
        if params["path"] != ADAPTER or name in self._adapters:
            raise Failed(1016, "invalid_adapter", model=MODEL, adapter=name)
        self._adapters.add(name)
        return {"model": MODEL, **self._adapter(name), "modules": 1, "loadMs": 0}

    def unload_adapter(self, params: Json, answer: Answer) -> Work:
        """Let an adapter go once nobody uses it."""
        name = params["adapter"]
        self._find_adapter(name)
        if params.get("force"):
            users = self._using(None if self._server.broken("force-spreads") else name)
            self._end(users, Failed(1017, "unloaded", model=MODEL, adapter=name))

        def leave() -> Json:
            self._adapters.discard(name)
            return {"model": MODEL, "adapter": name}

        return Leaving(answer, lambda: self._using(name), leave)

    def _leave(self) -> Json:
        self.loaded = False
        self._adapters.clear()
        if not self._server.broken("aliases-outlive-models"):
            self._aliases.clear()
        return {"model": MODEL, "state": "unloaded"}

    def _find_adapter(self, name: str) -> None:
        if name not in self._adapters:
            raise Failed(1015, "adapter_not_loaded", model=MODEL, adapter=name)

    def _adapter(self, name: str) -> Json:
        return {"adapter": name, "rank": 1, "bytes": 1, "inUse": len(self._using(name))}

    def _using(self, adapter: str | None = None) -> list[Generating]:
        works = [work for work in self._server.works.values() if isinstance(work, Generating)]
        return [work for work in works if adapter in (None, work.adapter)]

    def _end(self, works: list[Generating], failed: Failed) -> None:
        for work in works:
            if self._server.broken("force-is-quiet"):
                work.cancel()
            else:
                work.result = failed

    def _told(self, params: Json) -> Json:
        if (token := params.get("partialResultToken")) is not None:
            second = 1 if self._server.broken("load-goes-back") else 2
            for seq, phase, done in ((1, "queued", 0), (second, "weights", 1)):
                far = {"doneBytes": done, "totalBytes": 1, "tensors": done, "totalTensors": 1}
                value = {"seq": seq, "phase": phase, **far}
                self._server.send({"method": "$/progress", "params": {"token": token, "value": value}})
        phases = {"runtimeMs": 0, "weightsMs": 0, "warmupMs": 0}
        return {**READY, "vocabulary": sys.maxunicode + 1, "loadMs": 0, "phases": phases}
