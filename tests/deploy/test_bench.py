"""The benchmark measures what it names, each beside the worker."""

from __future__ import annotations

from rich.console import Console

from deploy.bench import WORKER, BenchConfig, run


def test_every_measurement_is_made_in_one_run_and_told_beside_the_worker(bootstrap_servers: str) -> None:
    console = Console(record=True, width=120)
    figures = run(BenchConfig(streams=20, steps=30, bootstrap_servers=bootstrap_servers), console)
    assert all(figure.per_second > 0 for figure in figures)
    said = console.export_text()
    for named in ("limit: the model's step", "limit: kafka-python", WORKER, "engine alone", "rival: a step a message"):
        assert named in said
    assert "1.00 x" in next(row for row in said.splitlines() if WORKER in row)
