"""A stand-in for the StatsD exporter, which turns datagrams into what Prometheus reads, by the mapping of the example.

It knows what that mapping uses: regular expressions, counters, gauges, and histograms of timers, in seconds.
"""

from __future__ import annotations

import re
import socket
import threading
from collections import defaultdict
from pathlib import Path

import yaml

Labels = tuple[tuple[str, str], ...]


class Mapping:
    """One entry of the mapping."""

    def __init__(self, entry: dict) -> None:
        assert entry["match_type"] == "regex", entry
        # As Go has it: it matches anywhere unless it is anchored.
        self.match = re.compile(entry["match"])
        self.name = self._template(entry["name"])
        self.labels = {label: self._template(value) for label, value in entry.get("labels", {}).items()}

    @staticmethod
    def _template(text: str) -> str:
        return re.sub(r"\$\{?(\d)\}?", r"\\\1", text)

    def names(self) -> list[str]:
        """An example of each StatsD name that this entry speaks of: its choices written out, any other part an x."""
        pattern = self.match.pattern.removeprefix("^").removesuffix("$").replace("\\.", ".").replace("(.+)", "x")
        choice = re.search(r"\(([a-z_|]+)\)", pattern)
        if choice is None:
            return [pattern]
        return [pattern.replace(choice[0], one) for one in choice[1].split("|")]


class Exporter:
    """Takes datagrams, by ``receive`` or on a UDP port, and knows the series that they make."""

    def __init__(self, mapping: Path) -> None:
        config = yaml.safe_load(mapping.read_text())
        self.buckets: list[float] = config["defaults"]["histogram_options"]["buckets"]
        self.mappings = [Mapping(entry) for entry in config["mappings"]]
        self.counters: dict[tuple[str, Labels], float] = defaultdict(float)
        self.gauges: dict[tuple[str, Labels], float] = {}
        self.timers: dict[tuple[str, Labels], list[float]] = defaultdict(list)
        #: The StatsD names that came and that no entry matches.
        self.unmapped: set[str] = set()
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            datagram = self._socket.recv(65_536)
            if not datagram:
                return
            self.receive(datagram)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join()
        self._socket.close()

    def receive(self, datagram: bytes) -> None:
        with self._lock:
            for line in datagram.decode().splitlines():
                name, _, rest = line.rpartition(":")
                value, kind = rest.split("|")[:2]
                series = self.series_of(name)
                if series is None:
                    self.unmapped.add(name)
                elif kind == "c":
                    self.counters[series] += float(value)
                elif kind == "g":
                    self.gauges[series] = float(value)
                else:
                    self.timers[series].append(float(value) / 1_000)

    def series_of(self, name: str) -> tuple[str, Labels] | None:
        """The Prometheus name and labels of a StatsD name; None if no entry matches."""
        for mapping in self.mappings:
            found = mapping.match.search(name)
            if found is not None:
                return found.expand(mapping.name), tuple(
                    (label, found.expand(value)) for label, value in mapping.labels.items()
                )
        return None

    def series(self) -> set[tuple[str, Labels]]:
        with self._lock:
            return {*self.counters, *self.gauges, *self.timers}

    def text(self) -> str:
        """Everything in Prometheus's format."""
        lines = []
        with self._lock:
            for kind, values in (("counter", self.counters), ("gauge", self.gauges)):
                for name in sorted({name for name, _ in values}):
                    lines.append(f"# TYPE {name} {kind}")
                    lines += [_line(name, labels, value) for (one, labels), value in values.items() if one == name]
            for name in sorted({name for name, _ in self.timers}):
                lines.append(f"# TYPE {name} histogram")
                for (one, labels), seconds in self.timers.items():
                    if one == name:
                        for bound in (*self.buckets, float("inf")):
                            le = "+Inf" if bound == float("inf") else str(bound)
                            count = sum(value <= bound for value in seconds)
                            lines.append(_line(f"{name}_bucket", (*labels, ("le", le)), count))
                        lines.append(_line(f"{name}_sum", labels, sum(seconds)))
                        lines.append(_line(f"{name}_count", labels, len(seconds)))
        return "\n".join([*lines, ""])


def _line(name: str, labels: Labels, value: float) -> str:
    inner = ",".join(f'{label}="{text}"' for label, text in labels)
    return f"{name}{{{inner}}} {value}"
