"""The long form: ``python -m tests.chaos``, each fault alone and all of them mixed, on each broker.

CHAOS_JOBS: jobs of each scenario (default 600: a few minutes in all). CHAOS_SEED: the seed that an earlier run printed.
CHAOS_ONLY: scenarios, as ``redis/mixed,rabbitmq/kill``. Exit code 1 if anything is wrong; then the ledger, the data and
the logs of that scenario are kept.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from .run import Chaos, Report, Scenario
from .transactional import TransactionalChaos

KILLS = ("kill_worker", "kill_group")
NETWORK = ("slow_network", "cut_network")
ANYWHERE = (
    Scenario("kill", KILLS),
    Scenario("terminate", ("terminate",)),
    Scenario("late", ("terminate",), late=2.5),
    Scenario("pause", ("pause",), (0.5, 1.5)),
    Scenario("freeze", ("freeze",)),
    Scenario("restart", ("restart_broker",)),
    Scenario("hang", ("hang_store",)),
    Scenario("full", ("fill_store",)),
    Scenario("snapshot", ("fail_snapshot",)),
    Scenario("evict", ("evict_from_store",), loses="maxmemory-policy allkeys-lru"),
    Scenario("slow", ("slow_network",)),
    Scenario("cut", ("cut_network",)),
    Scenario("clock", ("step_clock",)),
)
MIXED = (*KILLS, "terminate", "pause", "freeze", "restart_broker", "hang_store", *NETWORK, "step_clock")
#: The broker's data lies on a disk that is mounted for it.
DISK = (Scenario("disk", ("fill_disk",)),) if os.geteuid() == 0 else ()
INTERRUPTIONS = (*KILLS, "terminate", "pause", "freeze", "kill_sender")
RESTARTS = ("restart_broker", "restart_database", "kill_sender")
TRANSACTIONS = (
    Scenario("transactions", INTERRUPTIONS, database="postgresql"),
    Scenario("transactions-restart", RESTARTS, database="postgresql"),
    Scenario("mariadb", INTERRUPTIONS, database="mariadb"),
    Scenario("mariadb-restart", RESTARTS, database="mariadb"),
)
SCENARIOS = {
    "redis": (
        *ANYWHERE,
        *DISK,
        Scenario("mixed", MIXED),
        *TRANSACTIONS,
    ),
    "sentinel": (
        Scenario("failover", ("fail_over",), replicas=1),
        Scenario("unwaited", ("fail_over",), loses="sends that wait for no replica"),
        Scenario("split", ("hang_master",), replicas=1, min_replicas=1),
        Scenario("two-masters", ("hang_master",), replicas=1, loses="no min-replicas-to-write"),
        Scenario("mixed", (*KILLS, "terminate", "pause", "fail_over", "hang_master"), replicas=1, min_replicas=1),
    ),
    "rabbitmq": (
        *ANYWHERE,
        Scenario("store", ("restart_store",)),
        *DISK,
        Scenario("alarm", ("raise_disk_alarm",)),
        Scenario("mixed", (*MIXED, "restart_store")),
        *TRANSACTIONS,
    ),
    "cluster": (
        Scenario("node", ("kill_node",)),
        Scenario("partition", ("cut_off_node",)),
        Scenario("mixed", (*KILLS, "terminate", "pause", "freeze", "kill_node", "restart_store")),
    ),
}


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are stopped, too
    jobs = int(os.environ.get("CHAOS_JOBS") or 600)
    seed = int(os.environ.get("CHAOS_SEED") or random.randrange(1_000_000))
    only = os.environ.get("CHAOS_ONLY", "").split(",") if os.environ.get("CHAOS_ONLY") else None
    print(f"CHAOS_SEED={seed} CHAOS_JOBS={jobs}", flush=True)
    print(Report.HEADER, flush=True)
    all_well = True
    for broker, scenarios in SCENARIOS.items():
        for scenario in scenarios:
            if only is not None and f"{broker}/{scenario.name}" not in only:
                continue
            folder = Path(tempfile.mkdtemp(prefix=f"dp-chaos-{broker}-{scenario.name}-"))
            kind = TransactionalChaos if scenario.database else Chaos
            report = kind(broker, folder / "run", seed, processes=2).run(scenario, jobs)
            print(report.row(), flush=True)
            if scenario.loses:
                print(f"  as the docs say of {scenario.loses}: {list(report.wrong)}", flush=True)
            if report.wrong and not scenario.loses:
                all_well = False
                print(f"  WRONG: {report.wrong}\n  kept: {folder}", flush=True)
            else:
                shutil.rmtree(folder, ignore_errors=True)
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
