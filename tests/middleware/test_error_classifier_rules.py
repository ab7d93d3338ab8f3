"""Which rule decides: the actor's or the broker's, the nearer class, a leaf of a group."""

from __future__ import annotations

import sys

import pytest

from dramatiq_policies import (
    ConfigurationError,
    RetryPolicy,
    when,
)

from ..support import Stage
from .scenarios import (
    SOON,
    CardDeclined,
    MissingKey,
    PaymentError,
    always,
    failing,
)


@pytest.mark.parametrize(
    "named", [CardDeclined, f"{CardDeclined.__module__}.CardDeclined", f"{CardDeclined.__module__}:CardDeclined"]
)
def test_a_brokers_rule_holds_for_every_actor_also_as_a_dotted_string(named):
    stage = Stage(discard_on=named)
    always(stage, CardDeclined()).send()
    assert stage.run().outcomes() == ["discarded"]


def test_a_brokers_rule_for_the_nearer_class_beats_the_actors_for_a_wider_one():
    stage = Stage(discard_on=CardDeclined)
    always(stage, CardDeclined(), retry_on=PaymentError).send()
    assert stage.run().outcomes() == ["discarded"]


def test_an_actor_without_broker_rules_has_only_its_own():
    stage = Stage(discard_on=CardDeclined)
    always(stage, CardDeclined(), retry_on={PaymentError: SOON}, broker_rules=False).send()
    assert stage.run().outcomes() == ["retried", "retried", "dead"]


def test_when_narrows_a_class():
    stage = Stage()
    pay = stage.actor(
        lambda code: (_ for _ in ()).throw(OSError(code, "x")),
        actor_name="pay",
        discard_on=when(OSError, lambda error: error.errno == 28),
        alert_on=OSError,
    )
    pay.send(28)
    pay.send(5)
    assert sorted(stage.run().outcomes()) == ["alerted", "discarded"]


def test_a_dotted_path_that_leads_nowhere_keeps_a_worker_from_booting():
    stage = Stage(discard_on="no.such.Error")
    failing(stage)
    with pytest.raises(ConfigurationError, match=r"no\.such\.Error"):
        stage.run()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups are new in 3.11")
def test_a_group_goes_by_its_leaves():
    def grouped(*errors):
        return ExceptionGroup("several", errors)  # noqa: F821

    stage = Stage()
    options = {"retry_on": {PaymentError: SOON, OSError: 2}, "discard_on": CardDeclined, "alert_on": MissingKey}
    always(stage, grouped(PaymentError(), CardDeclined(), MissingKey()), name="alerts", **options).send()
    always(stage, grouped(PaymentError(), CardDeclined()), name="discards", **options).send()
    fewest = RetryPolicy(attempts=2, wait=0)
    always(
        stage, grouped(PaymentError(), OSError()), name="retries", retry_on={PaymentError: SOON, OSError: fewest}
    ).send()
    stage.run()
    assert stage.outcomes("alerts") == ["alerted"]
    assert stage.outcomes("discards") == ["discarded"]
    assert stage.outcomes("retries") == ["retried", "dead"]
