"""Errors whose own code raises when they are read."""

from __future__ import annotations

import traceback

import pytest
from dramatiq.errors import Retry

from dramatiq_policies import Discard, Metrics, Outcome, RetryPolicy, UnreadableError, constant, retry_after, when
from dramatiq_policies._job_errors import is_a, stand_in_for
from dramatiq_policies.middleware.metrics import Nowhere
from dramatiq_policies.outcomes import class_path, text_of
from dramatiq_policies.rules.wait import safe_wait

from ..support import Stage

RAISED = [ValueError, RecursionError, SystemExit, KeyboardInterrupt, GeneratorExit]


def hostile(part: str, raised: type[BaseException], base: type[BaseException] = Exception) -> BaseException:
    """An error one part of which raises when it is read."""

    def read(self: object, *args: object) -> object:
        raise raised

    if part in ("__str__", "__repr__", "__getattr__", "__bool__", "__eq__"):
        return type("Hostile", (base,), {part: read, "__hash__": object.__hash__})("text")
    if part == "str subclass":
        text = type("Text", (str,), {"__len__": read, "__getitem__": read, "__format__": read, "encode": read})("text")
        return type("Hostile", (base,), {"__str__": lambda self: text})("text")
    unreadable = property(read, lambda self, value: None)
    if part == "__getattribute__":
        return type("Hostile", (base,), {part: read})("text")
    return type("Hostile", (base,), {part: unreadable})("text")


PARTS = [
    *("__str__", "__repr__", "__getattr__", "__bool__", "__eq__", "str subclass", "__notes__", "args"),
    *(
        "__traceback__",
        "__cause__",
        "__context__",
        "__class__",
        "__getattribute__",
        "response",
        "headers",
        "retry_after",
    ),
]
#: The fate of an error, by the rules of its actor.
RULES = {
    "retried": {"retry_on": {Exception: RetryPolicy(attempts=2, wait=retry_after(fallback=0))}},
    "discarded": {"discard_on": (Exception,)},
    "alerted": {"alert_on": Exception},
    "narrowed": {
        "discard_on": when(Exception, lambda error: str(error) or error.response.status_code),
        "max_retries": 0,
    },
    "stock": {"max_retries": 1, "min_backoff": 0, "max_backoff": 0},
    "thrown": {"throws": Exception},
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("raised", RAISED)
def test_an_error_that_raises_when_read_ends_its_message_and_no_worker(raised, rules):
    stage = Stage(bundle={"metrics": Metrics(Nowhere())})

    @stage.actor(**RULES[rules])
    def pay(part):
        raise hostile(part, raised)

    ids = {pay.send(part).message_id: part for part in PARTS}
    stage.run()
    ended = {
        ids[event.message_id]: event.outcome.value
        for event in stage.events
        if event.outcome in {Outcome.DEAD, Outcome.DISCARDED, Outcome.ALERTED}
    }
    assert set(ended) == set(PARTS)
    readable = {"retried": "dead", "discarded": "discarded", "alerted": "alerted", "stock": "dead", "thrown": "dead"}
    if rules in readable:
        usual = {part for part, outcome in ended.items() if outcome == readable[rules]}
        assert usual >= {"__str__", "__getattr__", "args", "response", "retry_after", "str subclass"}
    for failure in stage.failures():
        assert "Hostile" in str(failure["exception"]) + failure["message"]
        assert "raise hostile(part, raised)" in failure["traceback"] or "UnreadableError" in failure["exception"]


def test_an_error_whose_getattr_recurses_is_decided_by_its_rule():
    class ApiError(Exception):
        def __getattr__(self, name):
            return getattr(self.response, name)

    stage = Stage()

    @stage.actor(retry_on={ApiError: RetryPolicy(attempts=2, wait=constant(0))})
    def pay():
        raise ApiError("refused")

    pay.send()
    assert stage.run().outcomes() == ["retried", "dead"]
    failure = stage.dead[0].options["failure"]
    assert failure["message"] == "refused"
    assert "raise ApiError" in failure["traceback"]


def test_an_error_whose_cause_can_not_be_read_is_replaced_by_one_that_names_both():
    error = KeyError("order")
    error.__cause__ = hostile("__class__", SystemExit)
    stand_in = stand_in_for(error)
    assert isinstance(stand_in, UnreadableError)
    assert str(stand_in) == "KeyError: reading this error or one of its causes raised SystemExit"
    assert stand_in.__context__ is stand_in.__cause__ is None


def test_a_readable_error_is_left_as_it_is():
    error = KeyError("order")
    error.__context__ = error.__cause__ = ValueError()
    error.__cause__.__context__ = error  # a cycle
    assert stand_in_for(error) is None
    assert not hasattr(error, "__notes__")
    traceback.format_exception(error)


@pytest.mark.parametrize("raised", RAISED)
def test_a_predicate_a_wait_and_retry_when_that_raise_even_an_exit_leave_the_worker_alone(raised, caplog):
    def broken(*args):
        raise raised

    stage = Stage()

    @stage.actor(retry_on=when(ValueError, broken), max_retries=0)
    def narrowed():
        raise ValueError

    @stage.actor(retry_when=broken)
    def by_stock_options():
        raise OSError

    narrowed.send()
    by_stock_options.send()
    assert sorted(stage.run().reasons()) == ["handoff_failed", "unclassified"]
    assert safe_wait(broken, 1, ValueError()) >= 15_000
    assert "the job waits by exponential()" in caplog.text


@pytest.mark.parametrize("raised", RAISED)
def test_verdicts_that_can_not_be_read_are_obeyed_by_their_class(raised):
    stage = Stage()

    @stage.actor(actor_name="discards")
    def discards():
        raise hostile("__str__", raised, Discard)

    @stage.actor(actor_name="retries", retry_on={Retry: RetryPolicy(attempts=2, wait=0)})
    def retries():
        raise hostile("delay", raised, Retry)

    discards.send()
    retries.send()
    assert sorted(stage.run().outcomes()) == ["dead", "discarded", "retried"]


def test_a_text_of_an_unreadable_error_names_its_readable_parts():
    assert text_of(hostile("__str__", SystemExit)) == "<Hostile: str() raised SystemExit>"
    assert type(text_of(hostile("str subclass", SystemExit))) is str
    meta = type("Meta", (type,), {"__getattribute__": lambda cls, name: {}[name]})
    assert class_path(meta("Hostile", (Exception,), {})) == "an unreadable class"
    assert is_a(hostile("__class__", SystemExit), Exception)
    assert not is_a(hostile("__class__", SystemExit), ValueError)
