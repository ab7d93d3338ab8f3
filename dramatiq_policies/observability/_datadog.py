"""A client of our own beside a client of the ``datadog`` package.

``open_buffer`` of a DogStatsD client drops what the application has in the buffer (datadog 0.47), or sends the application's values
into ours. So values are packed by a client that nobody else has, which sends to the same place under the same names and tags.
"""

from __future__ import annotations

import os
import socket
from typing import Any

__all__ = ["Twin", "can_have_twin"]

#: What says where values go and what they are called; all public but the container's id.
_COPIED = ("host", "port", "socket_path", "namespace", "constant_tags", "use_ms", "default_sample_rate", "cardinality")
_COPIED_TOO = ("_container_id", "_enabled")
_METHODS = ("increment", "timing", "gauge", "_report")


def can_have_twin(client: Any) -> bool:
    """Whether it is a plain client of ``datadog``'s, with sockets and methods of its own class."""
    cls = type(client)
    own = vars(client) if hasattr(client, "__dict__") else {}
    return (
        cls.__name__ == "DogStatsd"
        and cls.__module__.partition(".")[0] == "datadog"
        and hasattr(cls, "open_buffer")
        and not any(name in own for name in _METHODS)
        and isinstance(getattr(client, "socket", None), (socket.socket, type(None)))
    )


class Twin:
    """The client of our own, made anew when the application's has been set up otherwise, and after a fork."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self._own: Any = None
        self._like: Any = None

    def get(self) -> Any:
        """The client, to be used by one thread."""
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
        """Close the socket; the next `get` makes another client."""
        own, self._own, self._like = self._own, None, None
        if own is not None:
            own.close_socket()

    __del__ = close
