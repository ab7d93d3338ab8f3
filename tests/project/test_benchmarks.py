"""The summaries of measurements; tests/integration/test_benchmarks.py measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import benchmarks
from benchmarks import rounds
from benchmarks.drain import summarise
from benchmarks.variants import deaf_server

RESULTS = sorted((Path(benchmarks.__file__).parent / "results").glob("*.json"))


def measured(number, variant, rate):
    scenario = {"broker": "redis", "failures": "none", "prefetch": "64", "log": "critical"}
    return {**scenario, "round": number, "variant": variant, "rate": rate, "cpu_us": 1e6 / rate, "enqueue_rate": rate}


def test_a_ratio_is_taken_between_neighbours_of_one_round():
    slow_then_fast = [(0, "stock", 100), (0, "bundle", 200), (1, "stock", 1_000), (1, "bundle", 1_000)]
    summary = {entry["variant"]: entry for entry in summarise([measured(*one) for one in slow_then_fast])}
    assert summary["bundle"]["rate_ratio"].median == 1.5
    assert summary["stock"]["of_bundle"].median == 0.75


def test_every_variant_is_first_equally_often():
    orders = [order for _, order in rounds.interleave(["a", "b", "c"], 6)]
    assert sorted(order[0] for order in orders) == ["a", "a", "b", "b", "c", "c"]


def test_measurements_before_an_interrupt_are_kept():
    def stopped():
        yield {"rate": 1}
        raise KeyboardInterrupt

    assert rounds.collect(stopped()) == [{"rate": 1}]


def test_each_process_and_each_call_has_a_statsd_server_of_its_own_on_this_machine():
    servers = {deaf_server() for _ in range(3)}
    assert len(servers) == 3
    assert {host for host, _ in servers} == {"127.0.0.1"}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_each_drawing_in_the_docs_is_that_of_the_figures_kept(path, tmp_path):
    from benchmarks import plots  # Imported here: Matplotlib takes two seconds of CPU.

    drawn = plots.draw(path, tmp_path)
    kept = plots.ROOT / "docs" / "images" / drawn.name
    record = json.loads(path.read_text())
    assert record["versions"]["commit"] in kept.read_text()
    assert drawn.stat().st_size == pytest.approx(kept.stat().st_size, rel=0.2)
