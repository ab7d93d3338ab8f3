"""docs/index.md, followed by copy and paste in an empty folder, on both brokers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import dramatiq_policies

from .places import until

PACKAGE = Path(dramatiq_policies.__file__).parents[1]
PAGE = (Path(__file__).parents[2] / "docs" / "index.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("server", ["redis", "rabbitmq"])
def test_the_commands_of_the_page_work(server, request, tmp_path, unique_queue):
    (_, install), (_, jobs), (_, command), (_, sends), (_, test), (_, checks), (_, rabbitmq) = BLOCK.findall(PAGE)
    assert install.startswith("pip install")
    if server == "rabbitmq":
        broker = re.compile(r"^broker = RedisBroker\(.*\)\ninstall\(.*\)$", re.MULTILINE)
        assert len(broker.findall(jobs)) == 1
        jobs = broker.sub(lambda _: rabbitmq, jobs)
        jobs = jobs.replace("amqp://guest:guest@localhost:5672", request.getfixturevalue("rabbitmq_url"))
    # The servers are shared: a queue and keys of our own are all that a reader types otherwise.
    jobs = jobs.replace('"mail"', repr(unique_queue)).replace('"order-confirmation:', f'"{unique_queue}:')
    jobs = jobs.replace("redis://localhost:6379/0", request.getfixturevalue("redis_url"))
    (tmp_path / "jobs.py").write_text(jobs)
    (tmp_path / "test_jobs.py").write_text(test)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{PACKAGE}:{tmp_path}",
    }
    log = tmp_path / "log"
    with log.open("wb") as stream:
        running = subprocess.Popen(
            command.split(), cwd=tmp_path, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        subprocess.run(sends, shell=True, cwd=tmp_path, env=environment, check=True)
        for shown in (
            "retried: .*EmailTimeout",
            "retried: .*OrderNotFound",
            "discarded .*OrderNotFound",
            "duplicate: ",
        ):
            until(lambda shown=shown: re.search(shown, log.read_text()), timeout=60, describe=log.read_text)
        until(lambda: re.findall(r"^sent 7$", log.read_text(), re.MULTILINE) == ["sent 7"], describe=log.read_text)
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(30)
    shown = [line for line in log.read_text().splitlines() if unique_queue not in line]
    assert not [line for line in shown if "ERROR" in line or "CRITICAL" in line]

    pytest_ = [
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "-p",
        "dramatiq_policies.testing.pytest_plugin",
    ]
    subprocess.run(checks, shell=True, cwd=tmp_path, env=environment, check=True)
    done = subprocess.run(
        [*pytest_, "-p", "no:dramatiq_policies", str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 passed" in done.stdout, done.stdout
