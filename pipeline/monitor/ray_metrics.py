"""The numbers of records as Ray's metrics, for its dashboard and Prometheus: `ray_hedgemix_<column>`.

Ray's agent of the node exports what a process of the node sets, every ten seconds, also where there is no dashboard.
"""

from __future__ import annotations

from ray.util.metrics import Gauge

PREFIX = "hedgemix_"
"""Ray puts its own before it."""
LABELS = ("record", "seed", "stage")


class Gauges:
    """Sets one gauge a column, made when its first value comes; `meanings` are their descriptions."""

    def __init__(self, meanings: dict[str, str]) -> None:
        self.meanings = meanings
        self.gauges: dict[str, Gauge] = {}

    def set(self, record: str, seed: int, stage: str, values: dict[str, float]) -> None:
        """Set the gauges of these columns for one seed and stage of a record."""
        labels = dict(zip(LABELS, (record, str(seed), stage), strict=True))
        for name, value in values.items():
            if name not in self.gauges:
                self.gauges[name] = Gauge(PREFIX + name, self.meanings.get(name, ""), LABELS)
            self.gauges[name].set(value, labels)
