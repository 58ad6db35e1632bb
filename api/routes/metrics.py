"""GET /metrics: the figures of all processes, added up, as Prometheus text.

Names, kinds and help texts follow from the fields of core/stats.py: a new field there is a new metric here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_type_hints

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.requests import Request
from starlette.responses import Response

from api.families import aliases, exposed, histogram, machine
from api.routes.stats import decode_all, supervisor_of
from api.service import Service
from core.messages import StatsReply
from core.stats import (
    ApiSnapshot,
    EngineSnapshot,
    Histogram,
    Snapshot,
    TokenizerSnapshot,
    WorkerSnapshot,
    merge,
)

STATES = ("loading", "ready", "draining", "failed")


async def metrics(service: Service, request: Request) -> Response:
    """The text that a Prometheus server scrapes."""
    registry = CollectorRegistry()
    registry.register(Figures(await service.figures.query(), service.model.name))
    return Response(exposed(generate_latest(registry)), media_type=CONTENT_TYPE_LATEST)


class Figures:
    """A collector over one StatsReply."""

    def __init__(self, reply: StatsReply, model: str) -> None:
        self._reply = reply
        self._model = model

    def describe(self) -> list[Metric]:
        """Nothing is known before it is collected."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One family per field of each kind of snapshot."""
        state = GaugeMetricFamily("quire_state", "1 for the state that the server is in", labels=["state"])
        for name in STATES:
            state.add_metric([name], float(name == self._reply.state))
        yield state
        by_name = decode_all(self._reply)
        snapshots = list(by_name.values())
        yield CounterMetricFamily("quire_restarts", "processes started again", value=self._restarts())
        totals: dict[Any, Any] = {}
        for kind in (EngineSnapshot, TokenizerSnapshot, ApiSnapshot, WorkerSnapshot):
            total: Any = merge([item for item in snapshots if isinstance(item, kind)])
            if total is not None:
                totals[kind] = total
                yield from _families(total)
        engine = totals.get(EngineSnapshot, EngineSnapshot())
        yield from machine(supervisor_of(by_name), engine.output_tokens)
        yield from aliases(engine, totals.get(ApiSnapshot, ApiSnapshot()), self._model)

    def _restarts(self) -> float:
        return float(self._reply.server.get("restarts", 0))


def _families(snapshot: Snapshot) -> Iterator[Metric]:
    group = type(snapshot).__struct_config__.tag
    hints = get_type_hints(type(snapshot), include_extras=True)
    for field in msgspec.structs.fields(snapshot):
        meta = next(iter(getattr(hints[field.name], "__metadata__", ())), None)
        if meta is None or meta.extra is None:  # a text, such as a device's name, is no figure
            continue
        value = getattr(snapshot, field.name)
        name = f"quire_{group}_{field.name}"
        if name.endswith("_s"):
            name = name[:-2] + "_seconds"
        text = meta.description or field.name
        if isinstance(value, Histogram):
            yield histogram(f"{name}_{value.unit}" if value.unit else name, text, value)
        elif isinstance(value, dict):
            kind = CounterMetricFamily if meta.extra["kind"] == "counter" else GaugeMetricFamily
            family = kind(name, text, labels=[meta.extra["label"]])
            for key, count in value.items():
                family.add_metric([key], count)
            yield family
        elif meta.extra["kind"] == "counter":
            yield CounterMetricFamily(name, text, value=value)
        else:
            yield GaugeMetricFamily(name, text, value=value)
