"""Histograms that take many values at once count as prometheus_client's own do."""

from __future__ import annotations

import numpy as np
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from service.metrics import SECONDS, BatchHistogram


def test_a_batch_is_counted_as_its_values_one_by_one_would_be() -> None:
    values = np.concatenate([np.random.default_rng(0).exponential(0.2, 1_000), SECONDS, [0.0, 99.0]])
    batched, single = CollectorRegistry(), CollectorRegistry()
    BatchHistogram("seconds", "Help.", SECONDS, batched).observe(values)
    reference = Histogram("seconds", "Help.", buckets=SECONDS, registry=single)
    for value in values:
        reference.observe(value)

    def samples(registry: CollectorRegistry) -> dict[str, float]:
        lines = [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
        return {line.split()[0]: round(float(line.split()[1]), 6) for line in lines if "_created" not in line}

    assert samples(batched) == samples(single)
