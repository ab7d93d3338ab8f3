"""The long form: ``python -m tests.chaos``, each fault alone and all of them mixed, on both brokers.

CHAOS_JOBS: jobs of each scenario (default 600: a few minutes in all). CHAOS_SEED: the seed that an earlier run printed.
CHAOS_ONLY: scenarios, as ``redis/mixed,rabbitmq/kill``. Exit code 1 if anything is wrong; then the ledger, the data and
the logs of that scenario are kept.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

from .run import Chaos, Report, Scenario

KILLS = ("kill_worker", "kill_group")
SCENARIOS = {
    "redis": (
        Scenario("kill", KILLS),
        Scenario("terminate", ("terminate",)),
        Scenario("pause", ("pause",), (0.5, 1.5)),
        Scenario("freeze", ("freeze",)),
        Scenario("restart", ("restart_broker",)),
        Scenario("hang", ("hang_store",)),
        Scenario("full", ("fill_store",)),
        Scenario("mixed", (*KILLS, "terminate", "pause", "freeze", "restart_broker", "hang_store")),
    ),
    "rabbitmq": (
        Scenario("kill", KILLS),
        Scenario("terminate", ("terminate",)),
        Scenario("pause", ("pause",), (0.5, 1.5)),
        Scenario("freeze", ("freeze",)),
        Scenario("restart", ("restart_broker",)),
        Scenario("store", ("restart_store",)),
        Scenario("hang", ("hang_store",)),
        Scenario("full", ("fill_store",)),
        Scenario("mixed", (*KILLS, "terminate", "pause", "freeze", "restart_broker", "restart_store", "hang_store")),
    ),
}


def main() -> int:
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
            report = Chaos(broker, folder / "run", seed, processes=2).run(scenario, jobs)
            print(report.row(), flush=True)
            if report.wrong:
                all_well = False
                print(f"  WRONG: {report.wrong}\n  kept: {folder}", flush=True)
            else:
                shutil.rmtree(folder, ignore_errors=True)
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
