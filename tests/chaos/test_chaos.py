"""The short form of ``make chaos``: faults mixed, for some seconds on each broker."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from .run import Chaos, Scenario
from .transactional import TransactionalChaos

SHORT = {
    "redis": Scenario("mixed", ("kill_worker", "kill_group", "terminate", "pause", "restart_broker"), (0.4, 1.0)),
    "rabbitmq": Scenario("mixed", ("kill_worker", "kill_group", "terminate", "pause", "restart_store"), (0.4, 1.0)),
}
TRANSACTIONS = Scenario(
    "transactions", ("kill_worker", "kill_group", "freeze", "kill_sender"), (0.3, 0.8), database="postgresql"
)
SEED = int(os.environ.get("CHAOS_SEED") or random.randrange(1_000_000))


@pytest.mark.parametrize("broker", SHORT)
def test_no_job_is_lost_and_none_is_doubled_but_for_those_that_a_kill_cut_short(broker: str, tmp_path: Path) -> None:
    report = Chaos(broker, tmp_path, SEED).run(SHORT[broker], jobs=200)
    print(f"CHAOS_SEED={SEED}", report.HEADER, report.row(), sep="\n")
    assert not report.wrong, (f"CHAOS_SEED={SEED}", report.faults, report.outcomes)
    assert sum(report.faults.values()) > 0


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_each_effect_of_a_transactional_job_is_made_exactly_once(broker: str, tmp_path: Path) -> None:
    report = TransactionalChaos(broker, tmp_path, SEED).run(TRANSACTIONS, jobs=60)
    print(f"CHAOS_SEED={SEED}", report.HEADER, report.row(), sep="\n")
    assert not report.wrong, (f"CHAOS_SEED={SEED}", report.faults)
    assert sum(report.faults.values()) >= len(TRANSACTIONS.faults)
