"""Count the matches of a filter, and suggest names if nothing matches."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...common.plurals import counted
from ..app import OperationError, did_you_mean
from .commands import dead_letters
from .dead_letter import DeadLetter, Filter, argument_names

if TYPE_CHECKING:
    from dramatiq import Actor
    from dramatiq.broker import Broker

__all__ = ["Tally", "newest", "resolve_ids"]

_SHOWN = 3


class Tally:
    """A filter that counts its matches.

    Attributes:
      seen: The number of dead letters read.
      matched: The number of matches by actor and queue.
      unreadable: The number of further matches with unreadable bodies.
    """

    def __init__(self, where: Filter) -> None:
        self.where = where
        self.seen = 0
        self.unreadable = 0
        self.matched: Counter[tuple[str, str]] = Counter()
        self._values: dict[str, Counter[str]] = {
            name: Counter() for name in ("actor", "error", "outcome", "reason", "tag", "where")
        }

    def __call__(self, dead_letter: DeadLetter) -> bool:
        self.seen += 1
        for name, value in (
            ("actor", dead_letter.actor),
            ("error", dead_letter.exception and dead_letter.exception.rpartition(".")[2]),
            ("error", dead_letter.exception),
            ("outcome", dead_letter.outcome),
            ("reason", dead_letter.reason),
            *(("tag", f"{name}={value}") for name, value in dead_letter.tags.items()),
            *(("where", name) for name in (argument_names(dead_letter, self.where) if self.where.arguments else ())),
        ):
            if value:
                self._values[name][value] += 1
        if not self.where(dead_letter):
            return False
        if dead_letter.message is None:
            self.unreadable += 1
        else:
            self.matched[dead_letter.message.actor_name, dead_letter.queue] += 1
        return True

    def breakdown(self, count: int) -> str:
        """Describe the matches by actor and queue: ``20 of send_mail in mail, 3 of import_batch in import``."""
        most = self.matched.most_common()
        parts = [f"{count} of {actor} in {queue}" for (actor, queue), count in most[:_SHOWN]]
        rest = sum(count for _, count in most[_SHOWN:])
        parts += [f"{rest} of others"] if rest else []
        unreadable = count - self.matched.total()
        return ", ".join([*parts, f"{unreadable} that can't be read"] if unreadable > 0 else parts)

    def no_match(self, actors: Mapping[str, Actor[..., Any]]) -> str | None:
        """Return a sentence on filters without a match, with the nearest name; None if there were no dead letters, and the
        application knows all names.

        Parameters:
          actors: The application's actors.
        """
        where, given, hint = self.where, [], "."
        for option, text, name, known in self._conditions(actors):
            given.append(f"--{option} {text}")
            if hint == "." and name not in known:
                hint = did_you_mean(name, sorted(known))
        given += [f"--id {value}" for value in where.message_ids]
        given += ["--older-than"] if where.older_than_ms is not None else []
        given += ["--newer-than"] if where.newer_than_ms is not None else []
        misspelt = where.actor is not None and where.actor not in [*self._values["actor"], *actors]
        if not given or not (self.seen or misspelt or hint != "."):
            return None
        return f"Nothing matches {' '.join(given)}: 0 of {counted(self.seen, 'dead letter')}{hint}"

    def _conditions(self, actors: Mapping[str, Actor[..., Any]]) -> Iterator[tuple[str, str, str, set[str]]]:
        """Yield the option and the text of each condition, and the name in the condition with all known names."""
        where, seen = self.where, self._values
        if where.actor is not None:
            yield "actor", where.actor, where.actor, {*seen["actor"], *actors}
        for option in ("error", "outcome", "reason"):
            value = getattr(where, option)
            if value is not None:
                yield option, value, value, {*seen[option]}
        declared = [actor.options.get("tags") or {} for actor in actors.values()]
        tags = {*seen["tag"], *(f"{name}={value}" for one in declared for name, value in one.items())}
        names = {one.partition("=")[0] for one in tags}
        for name, value in where.tags.items():
            text = f"{name}={value}"
            yield ("tag", text, text, tags) if name in names else ("tag", text, name, names)
        chosen = where.parameters.values() if where.actor is None else [where.parameters.get(where.actor, ())]
        for name, value in where.arguments.items():
            known = {*seen["where"], *(one for names in chosen for one in names)}
            # A number is a position.
            yield "where", f"{name}={value}", name, {name} if name.isdigit() else known


def newest(letters: Iterable[DeadLetter], limit: int | None) -> list[DeadLetter]:
    """Return the latest dead letters, the newest first."""

    def failed_at(dead_letter: DeadLetter) -> int:
        return dead_letter.failed_at or 0

    if limit is None:
        return sorted(letters, key=failed_at, reverse=True)
    return heapq.nlargest(limit, letters, key=failed_at)


def resolve_ids(broker: Broker, queues: Iterable[str], given: Iterable[str]) -> tuple[str, ...]:
    """Return the full ids of dead letters, each given in full or by a unique prefix.

    Raises:
      OperationError: A prefix fits several ids.
    """
    found: dict[str, set[str]] = {one: set() for one in given}
    if not found:
        return ()
    for dead_letter in dead_letters(broker, queues):
        for one, ids in found.items():
            if dead_letter.message_id is not None and dead_letter.message_id.startswith(one):
                ids.add(dead_letter.message_id)
    return tuple(_only(one, ids) for one, ids in found.items())


def _only(given: str, ids: set[str]) -> str:
    if given in ids or len(ids) == 1:
        return given if given in ids else next(iter(ids))
    if not ids:
        return given
    several = ", ".join(sorted(ids)[:_SHOWN])
    raise OperationError(
        f"{len(ids)} dead letters begin with {given!r} ({several}{(', …' if len(ids) > _SHOWN else '')}); "
        "write more characters."
    )
