"""Load Prometheus for ``serve --metrics``, and add up the metrics of several workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Final

from incidentkit.observing import Observer

MULTIPROCESS: Final = "PROMETHEUS_MULTIPROC_DIR"
"""The variable with the folder in which several workers add up their metrics."""


def prometheus_observer() -> Observer:
    """Return the observer whose metrics ``/metrics`` serves.

    Raises:
        MissingDependency: If the extra ``metrics`` is not installed.
    """
    from incidentkit.observers.prometheus import PrometheusObserver  # noqa: PLC0415

    return PrometheusObserver()


@contextmanager
def shared_metrics() -> Iterator[None]:
    """Make a folder in which the workers add up their metrics, unless the environment names one."""
    if MULTIPROCESS in os.environ:
        yield
        return
    with TemporaryDirectory(prefix="incidentkit-metrics-") as folder:
        os.environ[MULTIPROCESS] = folder
        try:
            yield
        finally:
            del os.environ[MULTIPROCESS]
