"""Orders: what is sent for each in its transaction, and which effects must be there in the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from dramatiq import Message, group, pipeline

from .ledger import Verdict

#: By the last digit of an order, where it is no plain job.
KINDS = {0: "pipeline", 1: "group", 2: "single", 3: "hopeless", 4: "flaky", 5: "parent", 6: "parent"}


def message(actor: str, *args: object) -> Message[Any]:
    return Message("jobs", actor, args, {}, {})


def kind_of(number: int) -> str:
    return KINDS.get(number % 10, "plain")


def send_for(number: int, broker: Any) -> None:
    kind = kind_of(number)
    if kind == "pipeline":
        pipeline([message("first", number), message("second")], broker=broker).run()
    elif kind == "group":
        some = group([message("member", one) for one in _members(number)], broker=broker)
        some.add_completion_callback(message("together", number))
        some.run()
    elif kind == "single":
        # A duplicate could replace a lost message; this message has none.
        broker.enqueue(message("flaky", number))
    else:
        for _ in range(2):
            broker.enqueue(message(kind, number))


def effects_of(number: int) -> list[str]:
    kind = kind_of(number)
    if kind == "group":
        return [f"together:{number}", *(f"member:{one}" for one in _members(number))]
    names = {"pipeline": ["first", "second"], "single": ["flaky"], "hopeless": [], "parent": ["parent", "child"]}
    return [f"{name}:{number}" for name in names.get(kind, [kind])]


def _members(number: int) -> range:
    return range(number * 1_000, number * 1_000 + 3)


def judge(numbers: Iterable[int], made: Counter[str], letters: Iterable[Message[Any]]) -> Verdict:
    """Compare the effects with the orders that were taken. Nothing excuses a lost, a doubled or an unexpected effect.

    Parameters:
      numbers: The orders.
      made: How often each effect was made.
      letters: The dead letters.
    """
    expected = {name for number in numbers for name in effects_of(number)}
    doomed = {number for number in numbers if kind_of(number) == "hopeless"}
    dead = {(letter.actor_name, letter.args[0]): letter.options["failure"]["reason"] for letter in letters}
    wrongly_dead = [f"{name}:{number} {reason}" for (name, number), reason in dead.items() if name != "hopeless"]
    missing = [f"no letter of hopeless:{number}" for number in doomed if ("hopeless", number) not in dead]
    return Verdict(
        lost=sorted(name for name in expected if not made[name]),
        doubled=sum(count - 1 for count in made.values()),
        bound=0,
        excess=sorted(name for name, count in made.items() if count > 1 or name not in expected),
        beside=[],
        dead=[*wrongly_dead, *missing],
        recovered=[],
    )
