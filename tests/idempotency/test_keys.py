"""Idempotency keys from what an actor was called with."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import dramatiq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dramatiq_policies import ConfigurationError, Idempotency, Timeout, TimeoutExceeded, current_job
from dramatiq_policies.common.callables import unwrapped
from dramatiq_policies.idempotency.keys import checked_key, encodable, signature_of, template_key, text_key, typed_name
from dramatiq_policies.idempotency.options import register_of
from dramatiq_policies.testing import drain

from ..support import Stage

#: Values from JSON, with texts that look like something else.
VALUES = (
    st.text(st.sampled_from("a1:-0 \\\ud83d"))
    | st.integers(-20, 20)
    | st.booleans()
    | st.none()
    | st.floats(allow_nan=False)
    | st.sampled_from(["None", "True", "1.0", "[]", "-1", "01"])
    | st.lists(st.integers(0, 2), max_size=2)
)
TEMPLATES = ["{a}:{b}", "{a}{b}", "{a}-{b}", "x{a}1{b}y", "{b} {a}", "{a}::{b}:{a}"]


def key_of(template, fn, *args, **kwargs):
    return template_key("actor 'job'", template, signature_of(fn))(args, kwargs)


@pytest.mark.parametrize(
    ("template", "key"),
    [
        ("{a}", "1"),
        ("{a}:{b}", "1:2"),
        ("{c[id]}", "9"),
        ("{d.name}", "x"),
        ("{a:04d}", "0001"),
        ("{a:0{b}d}", "01"),
        ("{{{a}}}", "{1}"),
        ("{d.name!r}", "'x'"),
    ],
)
def test_a_template_reads_items_attributes_formats_and_defaults(template, key):
    def job(a, b=2, *, c=None, d=None):
        pass

    c, d = {"id": 9}, SimpleNamespace(name="x")
    assert key_of(template, job, 1, c=c, d=d) == key_of(template, job, a=1, d=d, c=c) == key


def test_the_rest_of_the_arguments_may_be_part_of_a_key():
    def job(a, *rest, **options):
        pass

    assert key_of("{a}:{rest[1]}", job, 1, 2, 3) == "1:3"
    assert key_of("{rest}", job, 1) == "()"
    with pytest.raises(ConfigurationError, match="options"):
        key_of("{options}", job, 1)


def test_an_argument_by_position_only_may_be_part_of_a_key():
    def job(a, /, b):
        pass

    assert key_of("{a}{b}", job, 1, b=2) == "12"


def test_an_argument_by_position_only_is_not_mistaken_for_an_option_of_the_same_name():
    def job(a, /, **options):
        pass

    assert key_of("{a}", job, 1, a=2) == "1"


@pytest.mark.parametrize("template", ["{}", "{0}", "{nope}", "{a:{nope}}", "{nope[a]}", "{nope.a}", "{a", "none", ""])
def test_a_template_that_can_not_be_filled_is_refused_at_declaration(template):
    with pytest.raises(ConfigurationError, match=r"^actor 'job': idempotency_key: expected "):
        template_key("actor 'job'", template, signature_of(lambda a: None))


def test_where_there_are_no_arguments_a_key_may_be_a_constant():
    assert key_of("nightly", lambda: None) == "nightly"
    for template in ("{a}", ""):
        with pytest.raises(ConfigurationError, match=r"^actor 'job': idempotency_key: expected "):
            key_of(template, lambda: None)
    for takes_some in (lambda *rest: None, lambda **options: None, lambda a=1: None):
        with pytest.raises(ConfigurationError, match="Without a field every call has the same key"):
            key_of("nightly", takes_some)


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2), {}), ((), {"b": 1})])
def test_a_call_that_the_actor_does_not_take_makes_no_key(args, kwargs):
    with pytest.raises(TypeError):
        key_of("{a}", lambda a: None, *args, **kwargs)


def test_a_call_by_position_of_keyword_only_arguments_makes_no_key():
    with pytest.raises(TypeError):
        key_of("{a}", lambda *, a: None, 1)


def test_a_class_based_actor_is_called_as_its_perform_is():
    stage = Stage()
    keys = []

    class Ship(dramatiq.GenericActor):
        class Meta:
            abstract = True

        def perform(self, order_id, *, kind="a"):
            keys.append(current_job().idempotency_key)

    class Meta:
        broker = stage.broker
        idempotency_key = "{order_id}:{kind}"
        max_retries = 0

    actor = type("ShipNow", (Ship,), {"Meta": Meta})
    assert list(signature_of(unwrapped(actor.fn)).parameters) == ["order_id", "kind"]
    actor.send(7)
    actor.send(7)
    actor.send(7, kind="b")
    stage.run()
    assert keys == ["7:a", "7:b"]
    assert stage.outcomes() == ["succeeded", "duplicate", "succeeded"]


@pytest.mark.parametrize(
    ("key", "got"),
    [
        ("", "an empty key"),
        (None, "a NoneType"),
        (1.5, "a float"),
        (True, "a bool"),
        (b"x", "a bytes"),
        (["x"], "a list"),
    ],
)
def test_nothing_but_a_text_or_a_number_is_a_key(key, got):
    with pytest.raises(TypeError, match=f"^idempotency_key: expected a non-empty str or an int, got {got}$"):
        checked_key(key)


def test_a_number_is_the_key_that_its_digits_are():
    assert [checked_key(key) for key in ("7", 7, 0, -1)] == ["7", "7", "0", "-1"]


def test_half_a_character_from_json_makes_a_key_all_the_same():
    assert encodable("é\ud83d").encode() == "é\\ud83d".encode()
    assert encodable("é\0") == "é\0"
    stage = Stage()
    runs = []
    ship = stage.actor(lambda name: runs.append(name), actor_name="ship", idempotency_key="{name}")  # noqa: PLW0108
    ship.send("\ud83d")
    ship.send("\ud83d")
    stage.run()
    assert runs == ["\ud83d"]
    assert stage.outcomes() == ["succeeded", "duplicate"]


# Coroutine functions on an async actor.


@pytest.fixture
def loop_stage():
    from dramatiq.middleware import AsyncIO

    return Stage(middleware=[AsyncIO()])


def test_done_when_and_the_key_of_an_async_actor_may_be_coroutine_functions(loop_stage):
    done, seen = set(), []

    async def key(order_id):
        await asyncio.sleep(0)
        return f"order:{order_id}"

    async def shipped(order_id):
        await asyncio.sleep(0)
        seen.append(current_job().idempotency_key)
        return order_id in done

    @loop_stage.actor(idempotency_key=key, done_when=shipped)
    async def ship(order_id):
        await asyncio.sleep(0)
        done.add(order_id)

    ship.send(7)
    ship.send(7)
    ship.send_with_options(args=(7,), idempotency_key="another")
    loop_stage.run()
    assert loop_stage.outcomes() == ["succeeded", "duplicate", "duplicate"]
    assert loop_stage.reasons() == [None, "completed", "done"]
    assert seen == ["order:7", "another"]
    assert [event.duration_ms is None for event in loop_stage.events] == [False, True, True]


@pytest.mark.parametrize("option", ["done_when", "idempotency_key"])
def test_the_key_and_done_when_of_an_async_actor_run_inside_the_timeout(loop_stage, option):
    runs = []

    async def hang(order_id):
        await asyncio.sleep(60)

    @loop_stage.actor(timeout=100, max_retries=0, **{option: hang})
    async def ship(order_id):
        runs.append(order_id)

    ship.send(7)
    loop_stage.run()
    assert runs == []
    assert loop_stage.outcomes() == ["dead"]
    assert isinstance(loop_stage.events[0].exception, TimeoutExceeded)


@pytest.mark.parametrize("option", ["done_when", "idempotency_key"])
def test_the_key_and_done_when_of_a_plain_actor_run_inside_the_timeout(option):
    import time

    stage = Stage()
    runs = []

    def hang(order_id):
        while True:
            time.sleep(0.01)

    stage.actor(runs.append, actor_name="ship", timeout=100, max_retries=0, **{option: hang}).send(7)
    stage.run()
    assert runs == []
    assert isinstance(stage.events[0].exception, TimeoutExceeded)


def test_an_async_actor_may_be_declared_before_the_rest_of_dramatiq_policies_is_on_its_broker():
    from dramatiq.brokers.stub import StubBroker
    from dramatiq.middleware import AsyncIO

    broker = StubBroker()
    broker.add_middleware(AsyncIO())
    broker.add_middleware(Idempotency())
    asked = []

    async def shipped(order_id):
        await asyncio.sleep(0)
        asked.append(order_id)
        return True

    @dramatiq.actor(broker=broker, done_when=shipped)
    async def ship(order_id): ...

    broker.add_middleware(Timeout())
    ship.send(7)
    assert drain(broker).outcomes("ship") == ["duplicate"]
    assert asked == [7]


# Keys whose text is the same.


def register(template, fn, *args, **kwargs):
    key = key_of(template, fn, *args, **kwargs)
    return str(key), register_of("job", key).name


def two(a, b):
    pass


AMBIGUOUS = [
    ("{a}:{b}", [("a", "b:c"), ("a:b", "c")]),
    ("{a}{b}", [(1, 23), (12, 3), ("1", 23), ("12", "3")]),
    ("{a}-{b}", [(-1, 2), ("", "1-2"), ("-1", 2), ("-1", "2")]),
    ("{a}::{b}", [(":", ""), ("", ":"), ("", "::")][:2]),
    ("{a}{b!s}", [(1, "2"), ("1", 2), ("", "12")]),
]


@pytest.mark.parametrize(("template", "calls"), AMBIGUOUS)
def test_values_that_give_the_same_text_have_different_registers(template, calls):
    found = [register(template, two, *call) for call in calls]
    assert len({text for text, _ in found}) == 1
    assert len({name for _, name in found}) == len(calls)


ALIKE = [
    [1, "1"],
    [-1, "-1"],
    [0, "0"],
    [None, "None"],
    [True, "True"],
    [1.0, "1.0"],
    [1e16, "1e+16"],
    [[1], (1,)[0:1], "[1]"][::2],
    [["a"], "['a']"],
    [{"a": 1}, "{'a': 1}"],
    ["\ud83d", "\\ud83d"],
]


@pytest.mark.parametrize("values", ALIKE, ids=repr)
def test_a_value_and_its_text_are_two_keys(values):
    found = [register("user:{a}", lambda a: None, value) for value in values]
    assert len({name for _, name in found}) == len(values)
    for _, name in found:
        name.encode()


@given(st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=2, unique_by=repr), st.sampled_from(TEMPLATES))
def test_two_calls_never_share_a_register(calls, template):
    one, other = (register(template, two, *call)[1] for call in calls)
    assert one != other


@given(VALUES, VALUES, st.sampled_from(TEMPLATES))
def test_a_key_s_text_is_the_template_filled(a, b, template):
    key = key_of(template, two, a, b)
    assert str(key) == template.format(a=a, b=b)
    assert type(str(key)) is str


@pytest.mark.parametrize("values", [(7, "ann"), ("ann", 7), ("", "x"), ("6f1c7a52-3a35", "ann@example.com")])
def test_the_usual_values_keep_the_register_of_0_1_0(values):
    key = key_of("{a}:{b}", two, *values)
    assert register_of("job", key) == (f"job\0{key}", None)


def test_the_text_alone_counts_where_the_template_asks_for_text():
    names = {register("user:{a!s}", lambda a: None, value) for value in (1, "1")}
    assert names == {("user:1", "job\0user:1")}


def test_a_key_that_a_message_or_a_callable_gives_is_an_int_or_text_as_a_whole():
    assert checked_key(7) == checked_key("7") == "7"
    names = [register_of("job", checked_key(key)).name for key in (7, "7", "\ud83d", "\\ud83d", "07", "-0")]
    assert len(set(names)) == 6
    assert register_of("job", text_key("7")) == register_of("job", checked_key("7"))
    assert register_of("job", text_key(""))  # A message id may be empty.


def test_the_names_of_tagged_texts_can_be_read_again():
    parts = [(("s", "a"), ("s", "b")), (("s", "as1:b"),), (("s", "a"), ("sb", "")), (("s", "ab"),), (("i", "ab"),)]
    assert len({typed_name(*one) for one in parts}) == len(parts)


def test_a_job_sees_its_key_as_plain_text():
    stage = Stage()
    seen = []

    @stage.actor(idempotency_key="user:{number}")
    def job(number):
        seen.append(current_job().idempotency_key)

    job.send("1")
    stage.run()
    assert seen == ["user:1"]
    assert type(seen[0]) is str


@pytest.mark.parametrize("sent", [(1, 2), [1, 2], {"a": (1,)}], ids=repr)
def test_arguments_are_looked_up_as_they_arrive(sent):
    stage = Stage()
    job = stage.actor(lambda value: None, actor_name="job", idempotency_key="{value}")
    message = job.send(sent)
    drain(stage.broker)
    assert Idempotency.state(job, sent).message_id == message.message_id
    assert Idempotency.state(job, value=sent).message_id == message.message_id
    assert Idempotency.forget(job, sent)
    assert Idempotency.state(job, sent).state == "none"


def test_arguments_that_can_not_be_sent_are_refused_when_they_are_looked_up():
    stage = Stage()
    job = stage.actor(lambda value: None, actor_name="job", idempotency_key="{value}")
    for ask in (Idempotency.state, Idempotency.forget):
        with pytest.raises(ConfigurationError, match=r"^actor 'job': the arguments can't be encoded.*send\(\)"):
            ask(job, object())
