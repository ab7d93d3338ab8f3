"""The worker id of a process on Redis, and the clock of the heartbeats.

In plain Dramatiq the broker makes the id, so a forked child shares the id of the parent, and each requeues the messages of the
other. Heartbeats carry the time of the worker, so a worker with a wrong clock looks dead. Here each process has a separate id, and
heartbeats carry the time of the server.
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from dramatiq.brokers.redis import RedisBroker

from ...common.forks import after_fork

__all__ = ["BY_SERVER_CLOCK", "WorkerId"]

#: The suffix of worker ids with heartbeats by the clock of the server.
BY_SERVER_CLOCK = "+server-clock"
#: Put in front of Dramatiq's script. The second argument of the script is the time of the worker.
_SERVER_CLOCK = b"""\
local server_time = redis.call('time')
ARGV[2] = string.format('%d', server_time[1] * 1000 + math.floor(server_time[2] / 1000))
"""


class WorkerId:
    """Gives a RedisBroker a worker id, and a new id in each forked child.

    Switches off Dramatiq's maintenance, which calls ``KEYS``. `recovery.Recovery` does the same work.
    """

    def __init__(self, broker: RedisBroker) -> None:
        self.broker = broker
        script: Any = broker.scripts["dispatch"].script
        text = script if isinstance(script, bytes) else script.encode()
        broker.scripts["dispatch"] = broker.client.register_script(_SERVER_CLOCK + text)
        broker.maintenance_chance = 0
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """Take a new id: the child holds no messages."""
        self.broker.broker_id = f"{uuid4()}{BY_SERVER_CLOCK}"
