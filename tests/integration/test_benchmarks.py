"""The benchmarks run and are drawn: a few jobs, whose figures say nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import plots

ROOT = Path(__file__).parents[2]


def run(module: str, *arguments: str, redis_url: str, rabbitmq_url: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=ROOT,
        env={**os.environ, "REDIS_URL": redis_url, "RABBITMQ_URL": rabbitmq_url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_outbox_is_measured_on_every_database(redis_url, rabbitmq_url):
    arguments = ("--rows", "20", "--transactions", "3", "--rounds", "1", "--brokers", "redis", "rabbitmq with confirms")
    tables = run("outbox", *arguments, redis_url=redis_url, rabbitmq_url=rabbitmq_url)
    for database in ("postgresql", "mariadb", "sqlite"):
        assert tables.count(f"| redis | {database} |") == 2
        assert tables.count(f"| rabbitmq with confirms | {database} |") == 2


def text_of(drawing: Path) -> str:
    return re.sub(r"<[^>]*>", " ", drawing.read_text())


def test_the_comparison_measures_every_variant_beside_stock_and_is_drawn(redis_url, rabbitmq_url, tmp_path):
    written = tmp_path / "drain.json"
    variants = ("stock", "idempotent", "celery")
    arguments = (
        "--variants",
        *variants,
        "--failures",
        "mixed",
        "--jobs",
        "30",
        "--rounds",
        "1",
        "--prefetch",
        "64",
        "--json",
        str(written),
    )
    table = run("drain", *arguments, redis_url=redis_url, rabbitmq_url=rabbitmq_url)
    record = json.loads(written.read_text())
    measured = {(one["broker"], one["variant"]) for one in record["measurements"]}
    assert measured == {(broker, variant) for broker in ("redis", "rabbitmq") for variant in variants}
    assert all(one["rate"] > 0 for one in record["measurements"])
    assert table.count("celery") == 2
    caption = text_of(plots.draw(written, tmp_path))
    for part in (record["machine"]["cpu"], record["versions"]["dramatiq"], record["versions"]["rabbitmq_server"]):
        assert part in caption


@pytest.mark.parametrize(
    ("curve", "points"),
    [
        ("queue", ["20", "60"]),
        ("keys", ["20", "2000"]),
        ("processes", ["2"]),
        ("memory", ["80"]),
        ("confirms", ["yes"]),
    ],
)
def test_a_curve_is_measured_at_its_points_and_drawn(curve, points, redis_url, rabbitmq_url, tmp_path):
    arguments = (curve, "--points", *points, "--rounds", "1", "--json-dir", str(tmp_path))
    jobs = () if curve == "memory" else ("--jobs", "20")
    run("curves", *arguments, *jobs, redis_url=redis_url, rabbitmq_url=rabbitmq_url)
    record = json.loads((tmp_path / f"{curve}.json").read_text())
    assert {str(one["point"]) for one in record["measurements"]} == set(points)
    assert record["versions"]["dramatiq"] in text_of(plots.draw(tmp_path / f"{curve}.json", tmp_path))


def test_a_transactional_job_is_measured_beside_the_same_job_with_a_key(
    redis_url, rabbitmq_url, postgresql_url, tmp_path
):
    written = tmp_path / "transactional.json"
    options = (
        "--jobs",
        "20",
        "--rounds",
        "1",
        "--databases",
        "postgresql",
        "--brokers",
        "redis",
        "--json",
        str(written),
    )
    table = run("transactional", *options, redis_url=redis_url, rabbitmq_url=rabbitmq_url)
    measured = json.loads(written.read_text())["measurements"]
    assert [one["variant"] for one in measured][:2] == ["no key", "key on Redis"]
    assert all(one["rate"] > 0 for one in measured)
    assert table.count("transactional") == 2
