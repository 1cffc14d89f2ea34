"""stats."""

from concurrent.futures import Future

from msgspec import UNSET

from mlx_sidecar.config.settings import Settings
from mlx_sidecar.native.blas import Blas
from mlx_sidecar.native.pages import Pages
from mlx_sidecar.protocol import messages as m

from ..engine.sequence import Device
from ..engine.thread import EngineReport, InferenceThread
from ..models.housekeeping import Housekeeping
from ..models.registry import ModelRegistry
from ..server.connection import Call
from ..telemetry.counters import Counters
from ..telemetry.vitals import Vitals


class StatsApi:
    """One document about everything, made of what the parts say of themselves."""

    def __init__(
        self,
        engine: InferenceThread,
        registry: ModelRegistry,
        counters: Counters,
        blas: Blas,
        pages: Pages,
        settings: Settings,
        vitals: Vitals,
        housekeeping: Housekeeping,
    ) -> None:
        self._housekeeping = housekeeping
        self._engine = engine
        self._registry = registry
        self._counters = counters
        self._blas = blas
        self._pages = pages
        self._settings = settings
        self._vitals = vitals

    def stats(self, _: m.NoParams, __: Call) -> m.StatsResult:
        """Collect the document; cheap, and never waits for the engine."""
        engine = self._engine.report()
        return m.StatsResult(
            uptime_ms=self._vitals.uptime_ms(),
            memory=self._memory(engine),
            requests=self._counters.requests(),
            tokens=self._counters.tokens(),
            engine=self._engine_stats(engine),
            models=self._models(engine),
            residency=self._residency(),
            prediction=self._prediction(),
            native=m.NativeStats(
                blas=self._blas_stats(), pages=self._pages_stats(), pulse=self._pulse_stats()
            ),
        )

    def _memory(self, engine: EngineReport) -> m.MemoryStats:
        resident, peak = self._pages.process_memory()
        mlx = self._engine.memory
        stats = m.MemoryStats(
            resident_bytes=resident,
            peak_resident_bytes=peak,
            mlx_active_bytes=mlx.active,
            mlx_cache_bytes=mlx.cached,
            mlx_peak_bytes=mlx.peak,
            pressure=self._housekeeping.pressure,
        )
        if (available := self._pages.available_memory()) is not None:
            stats.available_bytes = available
        if engine.memory.budget_bytes:
            stats.budget_bytes = engine.memory.budget_bytes
            stats.weights_bytes = engine.memory.weights_bytes
            stats.loading_bytes = engine.memory.claimed_bytes
            stats.reserved_bytes = engine.memory.reserved_bytes
            stats.cache_limit_bytes = mlx.cache_limit
        device = _device(self._engine.started())
        if device is not None and device.wired_limit_bytes is not None:
            stats.wired_limit_bytes = device.wired_limit_bytes
        return stats

    def _residency(self) -> m.ResidencyStats:
        residency = self._registry.residency
        return m.ResidencyStats(
            evicted=residency.evicted, expired=residency.expired, brought_back=residency.brought_back
        )

    def _prediction(self) -> m.PredictionStats:
        report = self._registry.residency.predictor.report()
        stats = m.PredictionStats(
            active=self._settings.predictive_preload,
            predictions=report.predictions,
            hits=report.hits,
            misses=report.misses,
        )
        if not stats.active:
            stats.reason = "the setting predictive_preload is off"
        if report.hit_rate is not None:
            stats.hit_rate = report.hit_rate
        return stats

    def _models(self, engine: EngineReport) -> list[m.ModelInfo]:
        infos = self._registry.infos()
        kv_bytes = dict(engine.memory.kv_bytes)
        for info in infos:
            key = self._registry.key_of(info.model)
            if key is not None and (batch := engine.batches.get(key)) is not None:
                info.kv_bytes = kv_bytes.get(key, 0)
                info.batching = m.Batching(active=batch.why_alone is None, reason=batch.why_alone or UNSET)
                info.compiled_steps = m.CompiledSteps(
                    active=batch.why_not_compiled is None, reason=batch.why_not_compiled or UNSET
                )
        return infos

    def _engine_stats(self, engine: EngineReport) -> m.EngineStats:
        batches = engine.batches.values()
        critical, high, normal, low = engine.waiting.counts
        stats = m.EngineStats(
            state=self._vitals.state,
            steps=engine.steps,
            sequences=self._engine.sequences,
            waiting=m.WaitingStats(critical=critical, high=high, normal=normal, low=low),
            prefilling=sum(batch.prefilling for batch in batches),
            running=sum(batch.running for batch in batches),
            decode_groups=sum(batch.groups for batch in batches),
        )
        if (device := _device(self._engine.started())) is not None:
            stats.device = device.kind
            stats.mlx_version = device.mlx_version
            stats.start_ms = device.start_ms
        return stats

    def _blas_stats(self) -> m.BlasStats:
        report = self._blas.report()
        if not report.active or report.library is None or report.threads is None:
            return m.BlasStats(active=False, reason=report.reason or "")
        return m.BlasStats(active=True, library=report.library, threads=report.threads, calls=report.calls)

    def _pages_stats(self) -> m.PagesStats:
        report = self._pages.report()
        if not report.active:
            return m.PagesStats(active=False, reason=report.reason or "")
        return m.PagesStats(active=True, queries=report.queries)

    def _pulse_stats(self) -> m.PulseStats:
        report = self._vitals.pulses.report()
        if not report.active:
            return m.PulseStats(active=False, reason=report.reason or "")
        return m.PulseStats(active=True, answered=report.answered, overtook=report.overtook)


def _device(started: "Future[Device]") -> Device | None:
    return started.result() if started.done() and started.exception() is None else None
