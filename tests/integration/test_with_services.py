"""scripts/with_services.py starting real servers beside those of the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pika
import pika.exceptions
import psycopg
import pymysql
import pytest
import redis
import sqlalchemy as sa

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "with_services.py"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users may pass through: databases run as users of their own. pytest's are closed."""
    with tempfile.TemporaryDirectory(prefix="dp-test-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.mark.timeout(300)
def test_two_private_runs_at_once_get_servers_of_their_own_which_are_gone_after_an_interrupt(open_folder: Path) -> None:
    urls_of_all = 'echo "$REDIS_URL $RABBITMQ_URL $POSTGRESQL_URL $MARIADB_URL"; exec sleep 600'
    command = [sys.executable, SCRIPT, "--private", "sh", "-c", urls_of_all]
    with ExitStack() as stack:
        runs = []
        for _ in range(2):
            run = stack.enter_context(
                subprocess.Popen(
                    command, env={**os.environ, "TMPDIR": str(open_folder)}, stdout=subprocess.PIPE, text=True
                )
            )
            stack.callback(run.terminate)
            runs.append(run)
        urls = [run.stdout.readline().split() for run in runs if run.stdout is not None]
        assert len({url for four in urls for url in four}) == 8

        for redis_url, rabbitmq_url, postgresql_url, mariadb_url in urls:
            with redis.Redis.from_url(redis_url) as client:
                assert client.keys() == []
            pika.BlockingConnection(pika.URLParameters(rabbitmq_url)).close()
            with psycopg.connect(postgresql_url) as connection:
                assert connection.execute("SELECT datname FROM pg_database WHERE datname LIKE 'dp%'").fetchall() == []
            connect_to_mariadb(mariadb_url).close()

        for run in runs:
            run.send_signal(signal.SIGTERM)
        assert [run.wait() for run in runs] == [128 + signal.SIGTERM] * 2

        for redis_url, rabbitmq_url, postgresql_url, mariadb_url in urls:
            with redis.Redis.from_url(redis_url) as client, pytest.raises(redis.ConnectionError):
                client.ping()
            with pytest.raises(pika.exceptions.AMQPConnectionError):
                pika.BlockingConnection(pika.URLParameters(rabbitmq_url))
            with pytest.raises(psycopg.OperationalError):
                psycopg.connect(postgresql_url)
            with pytest.raises(pymysql.OperationalError):
                connect_to_mariadb(mariadb_url)
    assert list(open_folder.iterdir()) == []


def connect_to_mariadb(url: str) -> pymysql.Connection:
    parts = sa.make_url(url)
    return pymysql.connect(host=parts.host, port=parts.port, user=parts.username, database=parts.database)
