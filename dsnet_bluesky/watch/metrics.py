"""What Prometheus and a load balancer ask a watcher: ``/metrics`` and ``/healthz``."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from .service import Watcher

__all__ = ["describe", "serve_metrics"]

REQUEST_TIMEOUT = 10.0
"""Seconds after which a client that says nothing is left."""

STALE = 300.0
"""Seconds without a turn of the watcher's loop after which it counts as hanging; a batch of long curves takes a minute."""


def describe(watcher: Watcher) -> dict[str, Any]:
    """Return the state of a watcher as plain values.

    It is healthy if it is not stuck. That the catalog is away is not its own fault, and a restart would not help: it is said
    under `catalog`.
    """
    statistics = watcher.statistics
    return {
        "healthy": time.monotonic() - watcher.last_turn < STALE,
        "catalog": watcher.away or "ok",
        "exposures": statistics.exposures,
        "runs": statistics.runs,
        "failed": statistics.failed,
        "errors": statistics.errors,
        "taken_by_others": statistics.stored_before,
        "in_hand": watcher.in_hand,
        "lag": watcher.lag,
        "seconds": dict(statistics.seconds),
    }


class _Collector(Collector):
    """The watcher's state as Prometheus wants it, read when it asks."""

    def __init__(self, watcher: Watcher):
        self._watcher = watcher

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yield the metrics."""
        said = describe(self._watcher)
        counters = {
            "exposures": "Exposures desmeared.",
            "runs": "Sample runs finished, failed ones included.",
            "failed": "Exposures and runs that could not be desmeared.",
            "errors": "Errors of the program, not of the input.",
            "taken_by_others": "Runs that another process had.",
        }
        for name, text in counters.items():
            yield CounterMetricFamily(f"dsnet_{name}", text, value=said[name])
        seconds = CounterMetricFamily("dsnet_seconds", "Where the time went.", labels=["stage"])
        for stage, value in said["seconds"].items():
            seconds.add_metric([stage], value)
        yield seconds
        yield GaugeMetricFamily("dsnet_in_hand", "Runs followed now, or waiting for their turn.", value=said["in_hand"])
        yield GaugeMetricFamily("dsnet_lag_seconds", "For which the oldest exposures have waited.", value=said["lag"])
        yield GaugeMetricFamily("dsnet_catalog_up", "1 if the catalog can be used.", value=said["catalog"] == "ok")


class _Server(ThreadingMixIn, WSGIServer):
    """Answers each client on a thread of its own: one that says nothing shall not hide the watcher from the others."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    timeout = REQUEST_TIMEOUT

    def handle(self) -> None:
        """Answer a request; a client that says nothing, or is gone, is no error of ours."""
        with suppress(OSError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: it is asked every few seconds."""


def serve_metrics(watcher: Watcher, port: int, host: str = "127.0.0.1") -> WSGIServer:
    """Serve ``/metrics`` and ``/healthz`` on a thread.

    Returns
    -------
    wsgiref.simple_server.WSGIServer
        Call its `shutdown` to end it; `server_port` is the port, if 0 was asked for.
    """
    registry = CollectorRegistry()
    registry.register(_Collector(watcher))
    metrics = make_wsgi_app(registry)

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/healthz":
            return metrics(environ, start_response)
        said = describe(watcher)
        status = "200 OK" if said["healthy"] else "503 Service Unavailable"
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps(said).encode()]

    server = make_server(host, port, application, server_class=_Server, handler_class=_Quiet)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
