"""docker-compose.yml, read without Docker, and by Compose if installed."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

COMPOSE_FILE = Path(__file__).parents[2] / "docker-compose.yml"


@pytest.fixture
def compose() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE_FILE.read_text())


def test_both_brokers_say_when_they_are_healthy_and_the_worker_waits_for_it(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert {name for name, service in services.items() if "profiles" not in service} == {"redis", "rabbitmq", "worker"}
    for broker in ("redis", "rabbitmq"):
        assert services[broker]["healthcheck"]["test"][0] == "CMD"
        assert services["worker"]["depends_on"][broker] == {"condition": "service_healthy"}


def test_the_data_of_the_servers_is_in_named_volumes(compose: dict[str, Any]) -> None:
    named = set(compose["volumes"])
    for server in ("redis", "rabbitmq", "postgresql", "mariadb"):
        assert {volume.partition(":")[0] for volume in compose["services"][server]["volumes"]} <= named


def test_the_databases_of_the_tests_are_a_profile_and_say_when_they_are_healthy(compose: dict[str, Any]) -> None:
    databases = {name for name, service in compose["services"].items() if service.get("profiles") == ["databases"]}
    assert databases == {"postgresql", "mariadb"}
    for database in databases:
        assert compose["services"][database]["healthcheck"]["test"][0] == "CMD"


def test_no_port_is_open_to_other_machines(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_worker_runs_the_example_and_reloads_it(compose: dict[str, Any]) -> None:
    worker = compose["services"]["worker"]
    assert "dramatiq --watch examples examples.orders.app" in worker["command"][-1]
    assert "BROKER_URL" in worker["environment"]


def test_the_worker_is_healthy_while_its_heartbeat_is_fresh(compose: dict[str, Any], tmp_path: Path) -> None:
    worker = compose["services"]["worker"]
    kind, probe = worker["healthcheck"]["test"]
    alive = tmp_path / "alive"
    probe = probe.replace("$$", "$").replace(worker["environment"]["HEARTBEAT_FILE"], str(alive))

    def healthy() -> bool:
        return subprocess.run(["sh", "-c", probe], check=False, capture_output=True).returncode == 0

    assert kind == "CMD-SHELL"
    assert not healthy()
    alive.touch()
    assert healthy()
    os.utime(alive, (time.time() - 90,) * 2)
    assert not healthy()


def test_the_dashboard_is_a_profile_and_every_image_has_a_version(compose: dict[str, Any]) -> None:
    observing = {name for name, service in compose["services"].items() if service.get("profiles") == ["observability"]}
    assert observing == {"statsd-exporter", "prometheus", "grafana"}
    assert all(":" in service["image"] for service in compose["services"].values())
    worker = compose["services"]["worker"]["environment"]
    assert {"STATSD_HOST", "SENTRY_DSN"} <= worker.keys()


def test_compose_finds_nothing_wrong() -> None:
    command = ["docker", "compose", "--file", COMPOSE_FILE]
    try:
        subprocess.run([*command, "version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("Docker Compose is not installed")
    config = subprocess.run([*command, "config", "--quiet"], check=False, capture_output=True, text=True)
    assert (config.returncode, config.stderr) == (0, "")
