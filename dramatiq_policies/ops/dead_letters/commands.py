"""Dead letters: counted, listed, replayed, purged; and ready messages moved to another queue by the same mover."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

from dramatiq import Message

from ...brokers.readers import Item, QueueBrowser, browse
from ..app import OperationError, find_queue, known_queues
from ..undeclared import find_any_queue, undeclared_queues
from .dead_letter import DeadLetter, Filter, for_replay, read_dead_letter

if TYPE_CHECKING:
    from dramatiq.broker import Broker

__all__ = ["Group", "MoveResult", "dead_letters", "move", "purge", "replay", "summarise"]

#: A `Filter` or a `Tally`.
Where = Callable[[DeadLetter], bool]
Progress = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class Group:
    """Dead letters with the same actor, exception, outcome and reason.

    Attributes:
      first_seen, last_seen: The times of the first and last failure, in ms since the epoch.
    """

    actor: str | None
    exception: str | None
    outcome: str
    reason: str | None
    count: int
    first_seen: int | None
    last_seen: int | None

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(slots=True)
class MoveResult:
    """The result of a replay, a purge or a move, or of its dry run.

    Attributes:
      count: The number of messages.
      seen: The number of messages that the operation has read.
      unreadable: The number of matching messages with unreadable bodies. They stay.
    """

    count: int = 0
    seen: int = 0
    unreadable: int = 0


def dead_letters(
    broker: Broker, queues: Iterable[str] = (), where: Where | None = None, *, limit: int | None = None
) -> Generator[DeadLetter, None, None]:
    """Yield dead letters, the oldest of each queue first.

    Parameters:
      broker: The broker from `load_broker`.
      queues: The queues to read. Default: all declared queues, and on Redis also undeclared queues with messages.
      where: A filter. Default: all dead letters.
      limit: The largest number of dead letters.

    On RabbitMQ the dead letters are hidden from other consumers until you close the iterator.

    Raises:
      OperationError: If a queue is unknown or the broker can't be reached.
    """
    left = limit
    for queue in _chosen(broker, queues):
        with browse(broker, queue, dead=True) as browser:
            for item in _looked_at(browser, limit):
                dead_letter = read_dead_letter(broker, queue, item)
                if where is None or where(dead_letter):
                    yield dead_letter
                    if left is not None:
                        left -= 1
                        if left <= 0:
                            return


def _looked_at(browser: QueueBrowser, limit: int | None) -> Iterable[Item]:
    """Read all at once, but with a limit take no more messages from RabbitMQ than the limit needs."""
    return browser.read_all() if limit is None and len(browser) else browser


def summarise(broker: Broker, queues: Iterable[str] = (), where: Where | None = None) -> list[Group]:
    """Count dead letters by actor, exception and outcome, the most frequent first. Arguments and errors as `dead_letters`."""
    counts: dict[Any, list[Any]] = {}
    for dead_letter in dead_letters(broker, queues, where):
        key = (dead_letter.actor, dead_letter.exception, dead_letter.outcome, dead_letter.reason)
        count = counts.setdefault(key, [0, None, None])
        count[0] += 1
        if dead_letter.failed_at is not None:
            count[1] = dead_letter.failed_at if count[1] is None else min(count[1], dead_letter.failed_at)
            count[2] = dead_letter.failed_at if count[2] is None else max(count[2], dead_letter.failed_at)
    return sorted(
        (Group(*key, *count) for key, count in counts.items()), key=lambda group: (-group.count, str(group.actor))
    )


def replay(
    broker: Broker,
    queues: Iterable[str] = (),
    where: Where | None = None,
    *,
    to_queue: str | None = None,
    new_id: bool = False,
    rate: float | None = None,
    limit: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    moved: MoveResult | None = None,
) -> MoveResult:
    """Send dead letters again, each to its own queue, without the history of earlier attempts.

    An interruption at any moment loses no message: on Redis each is either a dead letter or in its queue; on RabbitMQ
    one message may be both. Call the function again for the rest. A replay ignores dead letters that arrive later.

    Parameters:
      broker, queues, where, limit: As for `dead_letters`.
      to_queue: Send all messages to this queue instead.
      new_id: Give each message a new id. By default a message keeps its id.
      rate: The largest number of messages per second.
      dry_run: Count the messages and change nothing.
      progress: Called with the number of messages read, and the number in the queue.
      moved: Updated during the replay, for a caller that may be interrupted.

    Raises:
      OperationError: If a queue is unknown or the broker can't be reached.
    """
    if to_queue is not None:
        find_queue(broker, to_queue)
    else:
        for queue in queues:
            if queue not in known_queues(broker) and find_any_queue(broker, queue):
                raise OperationError(
                    f"No actor uses the queue {queue!r} any more; name a target queue with --to-queue."
                )
        queues = [*queues] or known_queues(broker)

    def successor(dead_letter: DeadLetter) -> Message[Any] | None:
        if dead_letter.message is None:
            return None
        return for_replay(dead_letter.message, dead_letter.queue if to_queue is None else to_queue, new_id=new_id)

    moved = MoveResult() if moved is None else moved
    for queue in _chosen(broker, queues):
        _work(broker, queue, True, where, successor, moved, limit, progress, rate=rate, dry_run=dry_run)
    return moved


def purge(
    broker: Broker,
    queues: Iterable[str] = (),
    where: Where | None = None,
    *,
    limit: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    moved: MoveResult | None = None,
) -> MoveResult:
    """Delete dead letters permanently. Arguments and errors as for `replay`."""
    moved = MoveResult() if moved is None else moved
    for queue in _chosen(broker, queues):
        _work(broker, queue, True, where, None, moved, limit, progress, dry_run=dry_run)
    return moved


def move(
    broker: Broker,
    queue: str,
    to_queue: str,
    *,
    actor: str | None = None,
    limit: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    moved: MoveResult | None = None,
    where: Where | None = None,
) -> MoveResult:
    """Move ready messages from one queue to another, in their order and as safely as `replay`.

    Delayed messages and messages that a worker has received stay. On RabbitMQ, messages of other actors (with
    ``actor``) stay and are marked as redelivered.

    Raises:
      OperationError: A queue is unknown, both queues are the same, or the broker can't be reached.
    """
    find_any_queue(broker, queue)
    find_queue(broker, to_queue)
    if queue == to_queue:
        raise OperationError(f"The messages are in {queue!r} already: name another target queue.")
    moved = MoveResult() if moved is None else moved

    def successor(dead_letter: DeadLetter) -> Message[Any] | None:
        return None if dead_letter.message is None else dead_letter.message.copy(queue_name=to_queue)

    wanted = Filter(actor=actor) if where is None else where
    _work(broker, queue, False, wanted, successor, moved, limit, progress, dry_run=dry_run)
    return moved


def _work(
    broker: Broker,
    queue: str,
    dead: bool,
    where: Where | None,
    successor: Callable[[DeadLetter], Message[Any] | None] | None,
    moved: MoveResult,
    limit: int | None,
    progress: Progress | None,
    *,
    rate: float | None = None,
    dry_run: bool = False,
) -> None:
    """Send the successor of each matching message of a queue, or delete the message if there is no ``successor``."""
    with browse(broker, queue, dead=dead) as browser:
        next_at = monotonic()
        if limit is not None and moved.count >= limit:
            return
        for item in _looked_at(browser, limit) if dry_run else browser:
            dead_letter = read_dead_letter(broker, queue, item)
            moved.seen += 1
            if where is None or where(dead_letter):
                message = None if successor is None else successor(dead_letter)
                if successor is not None and message is None:
                    moved.unreadable += 1
                elif dry_run or (browser.drop(item) if message is None else browser.send(item, message)):
                    moved.count += 1
                    if limit is not None and moved.count >= limit:
                        return
                    if rate is not None and not dry_run:
                        next_at = max(next_at + 1 / rate, monotonic())
                        browser.wait(max(0.0, next_at - monotonic()))
            if progress is not None:
                progress(moved.seen, len(browser))


def _chosen(broker: Broker, queues: Iterable[str]) -> list[str]:
    chosen = [find_any_queue(broker, queue) for queue in queues]
    return chosen or [*known_queues(broker), *undeclared_queues(broker)]
