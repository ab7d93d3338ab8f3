"""The callables around a job."""

from __future__ import annotations

from dramatiq.brokers.stub import StubBroker

from dramatiq_policies.delivery.broker_state import state_of


def test_each_callable_runs_once_around_a_job_in_its_order_however_often_it_is_added():
    state, ran = state_of(StubBroker()), []

    class Inner:
        def around_job(self, delivery, proceed):
            ran.append("inner")

    def outer(delivery, proceed):
        ran.append("outer")
        return proceed(delivery)

    inner = Inner()
    for _ in range(2):
        # Each access makes another bound method.
        state.add_around_job(inner.around_job, order=2)
        state.add_around_job(outer, order=1)
    state.run_around_job(None)
    assert ran == ["outer", "inner"]
