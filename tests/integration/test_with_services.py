"""scripts/with_services.py starting real servers beside those of the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pika
import pika.exceptions
import pytest
import redis

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "with_services.py"


@pytest.mark.timeout(300)
def test_two_private_runs_at_once_get_servers_of_their_own_which_are_gone_after_an_interrupt(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--private", "sh", "-c", 'echo "$REDIS_URL $RABBITMQ_URL"; exec sleep 600']
    with ExitStack() as stack:
        runs = []
        for _ in range(2):
            run = stack.enter_context(
                subprocess.Popen(
                    command, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, text=True
                )
            )
            stack.callback(run.terminate)
            runs.append(run)
        urls = [run.stdout.readline().split() for run in runs if run.stdout is not None]
        assert len({url for pair in urls for url in pair}) == 4

        for redis_url, rabbitmq_url in urls:
            with redis.Redis.from_url(redis_url) as client:
                assert client.keys() == []
            pika.BlockingConnection(pika.URLParameters(rabbitmq_url)).close()

        for run in runs:
            run.send_signal(signal.SIGTERM)
        assert [run.wait() for run in runs] == [128 + signal.SIGTERM] * 2

        for redis_url, rabbitmq_url in urls:
            with redis.Redis.from_url(redis_url) as client, pytest.raises(redis.ConnectionError):
                client.ping()
            with pytest.raises(pika.exceptions.AMQPConnectionError):
                pika.BlockingConnection(pika.URLParameters(rabbitmq_url))
    assert list(tmp_path.iterdir()) == []
