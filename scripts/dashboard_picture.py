"""Draws docs/images/dashboard.png: the dashboard of examples/observability after a real run.

    pip install matplotlib && apt-get install prometheus
    REDIS_URL=redis://127.0.0.1:6379/9 python scripts/dashboard_picture.py

``examples/orders`` runs on Redis for about three minutes, under the ``dramatiq`` command: for a while without the mail gateway's
key, then for a while without a worker. A real Prometheus answers the queries of the dashboard. Debian has no package of the StatsD
exporter and of Grafana: ``tests/exporter.py`` and matplotlib replace the two.
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.exporter import Exporter  # noqa: E402

OBSERVABILITY = ROOT / "examples" / "observability"
PICTURE = ROOT / "docs" / "images" / "dashboard.png"
PORT = 19_090
MONITOR = """
from dramatiq_policies import QueueMonitor
from examples.orders.app import broker
next(one for one in broker.middleware if isinstance(one, QueueMonitor)).run_forever()
"""
#: Seconds with a worker, with a worker without the gateway's key, without a worker, and with a worker again.
PHASES = ((60, "key"), (25, "no key"), (30, "none"), (75, "key"))


def serve(exporter: Exporter) -> int:
    """Serve the metrics of the exporter over HTTP, and return the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = exporter.text().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address[1]


def prometheus(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """The example's own configuration, but for the address and a shorter interval."""
    config = (OBSERVABILITY / "prometheus.yml").read_text()
    config = config.replace("statsd-exporter:9102", f"127.0.0.1:{port}").replace("5s", "2s")
    (folder / "prometheus.yml").write_text(config)
    binary = os.environ.get("PROMETHEUS") or shutil.which("prometheus") or sys.exit("There is no prometheus.")
    return subprocess.Popen(
        [
            binary,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{PORT}",
            "--log.level=warn",
        ]
    )


def run(environment: dict[str, str]) -> None:
    """The story that the picture tells."""
    stop = threading.Event()

    def produce() -> None:
        while not stop.wait(0.6):
            subprocess.run([sys.executable, "-m", "examples.orders.produce"], env=environment, check=True, stdout=-3)

    monitor = subprocess.Popen([sys.executable, "-c", MONITOR], env=environment)
    producer = threading.Thread(target=produce)
    producer.start()
    try:
        for seconds, who in PHASES:
            print(f"{seconds} s: {who}", flush=True)
            if who == "none":
                time.sleep(seconds)
                continue
            worker = subprocess.Popen(
                [sys.executable, "-m", "dramatiq", "examples.orders.app", "--processes", "2", "--threads", "2"],
                env={**environment, "MAIL_API_KEY": "secret" if who == "key" else ""},
                stderr=subprocess.DEVNULL,
            )
            time.sleep(seconds)
            worker.send_signal(signal.SIGTERM)
            worker.wait(30)
    finally:
        stop.set()
        producer.join()
        monitor.terminate()
        monitor.wait()


def query(expression: str, start: float, end: float) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
    """Return Prometheus' answer to a panel's query."""
    expression = expression.replace("$actor", ".*").replace("$queue", ".*").replace("$__rate_interval", "15s")
    asked = urllib.parse.urlencode({"query": expression, "start": start, "end": end, "step": 2})
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/api/v1/query_range?{asked}") as answer:
        found = json.load(answer)["data"]["result"]
    return [(one["metric"], [(at, float(value)) for at, value in one["values"]]) for one in found]


def draw(start: float, end: float) -> None:
    """Every panel of the dashboard, in its place."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.dates
    import matplotlib.pyplot as plt

    dashboard = json.loads((OBSERVABILITY / "grafana" / "dashboards" / "jobs.json").read_text())
    panels = dashboard["panels"]
    plt.style.use("dark_background")
    plt.rcParams["axes.prop_cycle"] = plt.cycler(
        color=mpl.colormaps["tab20"].colors[::2] + mpl.colormaps["Set3"].colors
    )
    figure, axes = plt.subplots(len(panels) // 2, 2, figsize=(15, 16), facecolor="#111217")
    for panel, axis in zip(panels, axes.flat, strict=True):
        axis.set_facecolor("#181b1f")
        stacked = panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"
        scale = 1_000 if panel["fieldConfig"]["defaults"]["unit"] == "ms" else 1
        unit = {"ops": "per second", "s": "seconds", "ms": "seconds", "short": ""}[
            panel["fieldConfig"]["defaults"]["unit"]
        ]
        lines = []
        for target in panel["targets"]:
            for labels, values in query(target["expr"], start, end):
                legend = target["legendFormat"]
                for label, value in labels.items():
                    legend = legend.replace(f"{{{{{label}}}}}", value)
                lines.append((legend, {round(at - start): value for at, value in values}))
        lines.sort()
        steps = range(0, int(end - start), 2)
        clock = [datetime.fromtimestamp(start + at) for at in steps]  # noqa: DTZ006 - the axis shows the local time
        if stacked and lines:
            heights = [[values.get(at, 0.0) for at in steps] for _, values in lines]
            axis.stackplot(clock, heights, labels=[legend for legend, _ in lines], alpha=0.75)
        for legend, values in [] if stacked else lines:
            heights = [values.get(at, float("nan")) / scale for at in steps]
            axis.plot(clock, heights, label=legend, linewidth=1.2)
        axis.set_title(panel["title"], loc="left", fontsize=11, fontweight="bold")
        axis.set_ylabel(unit, fontsize=8)
        axis.set_ylim(bottom=0, top=(1.15 + 0.03 * len(lines)) * axis.get_ylim()[1])  # room for the legend
        axis.set_xlim(datetime.fromtimestamp(start), datetime.fromtimestamp(end))  # noqa: DTZ006
        axis.xaxis.set_major_formatter(matplotlib.dates.DateFormatter("%H:%M:%S"))
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.15)
        if lines:
            axis.legend(fontsize=7, ncols=3, frameon=False, loc="upper left")
        print(f"{panel['title']}: {len(lines)} lines")
    figure.tight_layout(pad=1.5)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=70, facecolor=figure.get_facecolor())


def main() -> None:
    exporter = Exporter(OBSERVABILITY / "statsd-mapping.yml")
    with tempfile.TemporaryDirectory() as folder:
        watching = prometheus(Path(folder), serve(exporter))
        try:
            start = time.time()
            run(
                {
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "BROKER_URL": os.environ["REDIS_URL"],
                    "STATSD_HOST": "127.0.0.1",
                    "STATSD_PORT": str(exporter.port),
                    "ORDERS_WAIT_MS": "500",
                }
            )
            time.sleep(3)
            draw(start, time.time())
        finally:
            watching.terminate()
            watching.wait()
            exporter.close()


if __name__ == "__main__":
    main()
