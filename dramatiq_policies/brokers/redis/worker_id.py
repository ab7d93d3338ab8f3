"""The id under which the workers of one process hold messages on Redis, and the clock of its heartbeats.

Dramatiq makes the id with the broker and takes the heartbeat's time from the worker's clock. A fork then shares the id with
its parent, so that each puts the other's messages back; and a clock that is wrong has a living worker taken for dead. With
this library each process has an id of its own, and every command of Dramatiq's takes the server's time.
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from ...common.forks import after_fork

__all__ = ["BY_SERVER_CLOCK", "WorkerId"]

#: The end of an id whose heartbeats are by the server's clock.
BY_SERVER_CLOCK = "+server-clock"
#: Comes before Dramatiq's own script, whose second argument is the worker's time.
_SERVER_CLOCK = b"""\
local server_time = redis.call('time')
ARGV[2] = string.format('%d', server_time[1] * 1000 + math.floor(server_time[2] / 1000))
"""


class WorkerId:
    """Gives a RedisBroker its id, and a child of this process another.

    Dramatiq's maintenance is switched off: it calls ``KEYS``, and `recovery.Recovery` does the same work.
    """

    def __init__(self, broker: Any) -> None:
        self.broker = broker
        script = broker.scripts["dispatch"].script
        text = script if isinstance(script, bytes) else script.encode()
        broker.scripts["dispatch"] = broker.client.register_script(_SERVER_CLOCK + text)
        broker.maintenance_chance = 0
        self.reset_after_fork()
        after_fork(self)

    def reset_after_fork(self) -> None:
        """In a new process nothing is held."""
        self.broker.broker_id = f"{uuid4()}{BY_SERVER_CLOCK}"
