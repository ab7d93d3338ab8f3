"""A second client beside a client of the ``datadog`` package.

``open_buffer`` of a DogStatsD client drops the buffered values of the application (datadog 0.47), or mixes the values of the
application with ours. So a private client, with the address, names and tags of the application's client, batches our values.
"""

from __future__ import annotations

import os
import socket
from typing import Any

__all__ = ["PrivateClient", "needs_private_client"]

#: The settings for address, names and tags. All public except the container id.
_COPIED = ("host", "port", "socket_path", "namespace", "constant_tags", "use_ms", "default_sample_rate", "cardinality")
_COPIED_TOO = ("_container_id", "_enabled")
_METHODS = ("increment", "timing", "gauge", "_report")


def needs_private_client(client: Any) -> bool:
    """Return whether this is an unmodified client of the ``datadog`` package."""
    cls = type(client)
    own = vars(client) if hasattr(client, "__dict__") else {}
    return (
        cls.__name__ == "DogStatsd"
        and cls.__module__.partition(".")[0] == "datadog"
        and hasattr(cls, "open_buffer")
        and not any(name in own for name in _METHODS)
        and isinstance(getattr(client, "socket", None), (socket.socket, type(None)))
    )


class PrivateClient:
    """Makes the private client: anew after a fork, and after a change in the settings of the application's client."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self._own: Any = None
        self._like: Any = None

    def get(self) -> Any:
        """Return the private client, for a single thread."""
        client = self.client
        settings = {name: getattr(client, name) for name in (*_COPIED, *_COPIED_TOO) if hasattr(client, name)}
        settings["constant_tags"] = list(settings.get("constant_tags") or ())
        like = (os.getpid(), settings)
        if like != self._like:
            self.close()
            own = type(client)(socket_path=settings.get("socket_path"), disable_telemetry=True)
            for name, value in settings.items():
                if getattr(own, name) != value:
                    setattr(own, name, value)
            self._own, self._like = own, like
        return self._own

    def close(self) -> None:
        """Close the socket. The next `get` makes another client."""
        own, self._own, self._like = self._own, None, None
        if own is not None:
            own.close_socket()

    __del__ = close
