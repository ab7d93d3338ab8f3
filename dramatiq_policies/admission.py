"""Whether a job may begin: its key, its claim, and what becomes of the message if not.

Called by the wrapper of ``actor.fn``, after every other middleware's before-hook. It either returns, with the claim on the
delivery, or raises SkipMessage with the decision on it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dramatiq import Message
from dramatiq.asyncio import async_to_sync
from dramatiq.broker import MessageProxy
from dramatiq.middleware import GroupCallbacks, Pipelines, SkipMessage
from dramatiq.results import ResultFailure, ResultMissing, Results

from . import coroutines, interrupts, records
from .backoff import bounds_of
from .callables import is_coroutine_callable
from .claims import Claim, Claims, Quarantined, StoreDown, is_dead, uncounted_name
from .consumer import REDELIVERED
from .delivery import Delivery, Send, Settlement
from .durations import WEEK_MS
from .errors import ConfigurationError, Crashed, NoResult, UnknownRecord, checked_duration
from .history import POLICIES, History, now_ms, run_of
from .keys import checked_key, encodable, template_key
from .outcomes import Outcome, logger
from .rules import RuleSet

if TYPE_CHECKING:
    from dramatiq import Actor

    from .interrupts import Caller
    from .wiring import Wiring

__all__ = ["OPTIONS", "Admission", "Guard", "resolve_guard"]

#: The shortest wait of a message that is put back unrun, in milliseconds; it doubles with each.
_FIRST_WAIT = 1_000
_LEAST_WAIT = 20


class Guard:
    """What an actor declares about running once.

    Attributes:
      asked: Whether it asks for anything at all.
      keyed: Whether it has a key; without one only ``done_when`` and the count of crashes are left.
      key_of: Makes the key; None for the message id. If ``call_key`` is given, it takes what the actor takes.
      claims_at_once: Whether nothing of the user's runs before the claim.
      call_key: How a ``key_of`` that is code of the user's is called; None for a template.
      job, call: The actor's function with ``done_when`` before it, and how it is called; None without one.
      ttl: How long a completed key is remembered, in milliseconds.
      max_crashes: See `Idempotency`.
    """

    __slots__ = ("asked", "call", "call_key", "claims_at_once", "job", "key_of", "keyed", "max_crashes", "ttl")

    def __init__(self) -> None:
        self.asked = self.keyed = self.claims_at_once = False
        self.key_of: Callable[..., Any] | None = None
        self.call_key: Caller | None = None
        self.job: Callable[..., Any] | None = None
        self.call: Caller | None = None
        self.ttl = 0
        self.max_crashes: int | None = None


class Done(SkipMessage):
    """``done_when`` said that there is nothing left to do."""


class Admission:
    """Lets the jobs of one broker begin.

    Parameters:
      claims: Where keys are claimed.
      run_without_store: Whether a job runs unguarded while the store is down; otherwise its message waits.
    """

    def __init__(self, wiring: Wiring, claims: Claims, *, run_without_store: bool) -> None:
        self.wiring = wiring
        self.claims = claims
        self.run_without_store = run_without_store

    def admit(self, delivery: Delivery, guard: Guard, key: str | None) -> None:
        """Claim the key, or count a start.

        Raises:
          SkipMessage: The job is not to run now; the decision is on the delivery.
        """
        message = delivery.message
        if key is None:
            if not delivery.redelivered or guard.max_crashes is None:
                return
            # The start that was not counted is the first, if there was one: a single start is never refused for it.
            name, keep = uncounted_name(message.message_id), guard.ttl
            starts = min(2, guard.max_crashes)
        else:
            name, starts, keep = name_of(message.actor_name, key), 1, guard.ttl
        request = records.Request(message.message_id, run_of(message.options), is_dead, guard.max_crashes, starts)
        try:
            answer = self.claims.claim(name, request, keyed=key is not None, keep=keep)
            if isinstance(answer, records.Take):
                self.claims.solitude.make_alone(delivery)
                request = records.Request(
                    message.message_id, request.run, is_dead, guard.max_crashes, starts, alone=True
                )
                answer = self.claims.claim(name, request, keyed=key is not None, keep=keep)
        except UnknownRecord as error:
            logger.error("Message %s of actor %s waits: %s", message.message_id, message.actor_name, error)
            self._defer(delivery, "store_down", None)
        except StoreDown:
            if key is None:
                return
            if not self.run_without_store:
                self._defer(delivery, "store_down", None)
            logger.warning(
                "Message %s of actor %s runs without a claim: the idempotency store is down.",
                message.message_id,
                message.actor_name,
            )
            return
        if isinstance(answer, Claim):
            delivery.claim = answer
        else:
            self._refuse(delivery, answer)

    def _refuse(self, delivery: Delivery, answer: records.Action | Quarantined) -> None:
        message = delivery.message
        if isinstance(answer, Quarantined):
            delivery.claim = answer.claim
            error = Crashed(
                f"began {answer.starts} times and never ended: its worker was killed, or crashed, each time"
            )
            self._skip(delivery, Settlement(Outcome.DEAD, "crashed", exception=error, dead_letter=True))
        if isinstance(answer, records.Defer):
            self._defer(delivery, "running", answer.left)
        if isinstance(answer, records.HandOnAgain):
            follow = answer.follow
            again = message.copy(options=follow.get("options", {}))
            due = follow.get("due")
            delivery.hand_on(Send(again, None if due is None else max(1, due - now_ms())))
            self._skip(delivery, Settlement(Outcome.DUPLICATE, "stale"))
        assert isinstance(answer, records.Skip)
        if answer.twin is not None:
            self.settle_place(delivery, answer.twin)
        self._skip(delivery, Settlement(Outcome.DUPLICATE, answer.reason))

    def done(self, delivery: Delivery) -> None:
        """``done_when`` said so: settle this message's place, as if its job had just succeeded."""
        self.settle_place(delivery, delivery.message.message_id)
        delivery.settlement = Settlement(Outcome.DUPLICATE, "done")
        delivery.message.options["store_results"] = False

    def settle_place(self, delivery: Delivery, twin: str) -> None:
        """Move on this message's pipeline and its group, with the result of the one that did its work.

        Raises:
          SkipMessage: That can't be done now, or never.
        """
        message, broker = delivery.message, self.wiring.broker
        options = message.options
        target = options.get("pipe_target")
        results = next((m for m in broker.middleware if isinstance(m, Results)), None)
        result, found, missed = None, False, False
        if results is not None:
            stored, ttl = results._lookup_options(broker, message)  # noqa: SLF001
            if stored:
                origin = message.copy(message_id=twin)
                try:
                    result, found = results.backend.get_result(origin), True
                    if twin != message.message_id:
                        results.backend.store_result(message, result, ttl)
                except ResultMissing:
                    missed = True
                except ResultFailure:
                    pass
                except Exception as error:
                    logger.warning("The result of message %s can't be read now: %s", twin, error)
                    self._defer(delivery, "store_down", None)
        if target is not None and not found and not self._ignores_result(target, message.actor_name):
            missing = NoResult(f"the next stage needs the result of message {twin}, which is not stored")
            self._skip(delivery, Settlement(Outcome.DEAD, "no_result", exception=missing, dead_letter=True))
        if missed:
            _settle_result(results, message, twin, ttl)
        proxy: Any = MessageProxy(message)
        proxy.delivery = delivery
        movers: list[Any] = [m for m in broker.middleware if isinstance(m, (Pipelines, GroupCallbacks))]
        for middleware in movers:
            middleware.after_process_message(broker, proxy, result=result)

    def _ignores_result(self, target: Any, actor_name: str) -> bool:
        actor = self.wiring.broker.actors.get(actor_name)
        return bool(
            target.get("options", {}).get("pipe_ignore") or (actor is not None and actor.options.get("pipe_ignore"))
        )

    def _defer(self, delivery: Delivery, reason: str, left: int | None) -> None:
        message = delivery.message
        history = History(message.options)
        lease = self.claims.lease
        wait = min(_FIRST_WAIT << min(history.deferrals, 20), lease // 4)
        wait = max(_LEAST_WAIT, wait if left is None else min(wait, left))
        history.deferrals += 1
        again: Message[Any] = message.copy(options={POLICIES: history.option()})
        again.options.pop("eta", None)
        if delivery.redelivered:
            # Still what counts a start of a message without a key.
            again.options[REDELIVERED] = True
        delivery.hand_on(Send(again, wait))
        self._skip(delivery, Settlement(Outcome.DEFERRED, reason, delay_ms=wait))

    def _skip(self, delivery: Delivery, decided: Settlement) -> None:
        delivery.settlement = decided
        if not decided.dead_letter:
            # Dramatiq would store None over the real result.
            delivery.message.options["store_results"] = False
        raise SkipMessage(f"{decided.outcome.value} ({decided.reason})")


def _settle_result(results: Any, message: Message[Any], twin: str, ttl: int) -> None:
    """Tell whoever waits for a skipped message's result that there is none, for none will come."""
    try:
        if twin == message.message_id:
            # Nobody ran it: as stock stores for what is skipped.
            results.backend.store_result(message, None, ttl)
        else:
            error = NoResult(f"duplicate: the result of message {twin} is not stored")
            results.backend.store_exception(message, error, ttl)
    except Exception:
        logger.warning("The result of message %s can't be settled.", message.message_id, exc_info=True)


def name_of(actor_name: str, key: str) -> str:
    """The register of an actor's key."""
    return encodable(f"{actor_name}\0{key}")


def key_of(message: Message[Any], guard: Guard, call: Callable[..., Any]) -> str | None:
    """The key of a message: its own, or what the actor's makes of its arguments; None if it has none.

    ``call`` calls code of the user's with what the actor was called with.
    """
    own = message.options.get("idempotency_key")
    if own is not None:
        return checked_key(own)
    if not guard.keyed:
        return None
    if guard.key_of is None:
        return message.message_id
    if guard.call_key is not None:
        return checked_key(call(guard.key_of))
    return checked_key(guard.key_of(message.args, message.kwargs))


def resolve_guard(
    where: str, actor: Actor[..., Any], rules: RuleSet, defaults: tuple[int, int | None] | None
) -> Guard | None:
    """Check an actor's options of idempotency.

    Parameters:
      defaults: The broker's ttl and max_crashes; None if it has no Idempotency.

    Raises:
      ConfigurationError: An option makes no sense, or there is no Idempotency to serve it.
    """
    options = actor.options
    if defaults is None:
        _refuse_any(where, options)
        return None
    guard = Guard()
    fn: Any = getattr(actor.fn, "dramatiq_policies_wraps", actor.fn)
    idempotent = options.get("idempotent")
    if not (idempotent is None or isinstance(idempotent, bool)):
        raise ConfigurationError.of_option(where, "idempotent", "True or False", idempotent)
    given = options.get("idempotency_key")
    if given is not None:
        if isinstance(given, str):
            guard.key_of = template_key(where, given, fn)
        elif callable(given):
            guard.key_of, guard.call_key = _of_users(where, "idempotency_key", given, fn)
        else:
            raise ConfigurationError.of_option(where, "idempotency_key", "a template or a callable", given)
    guard.keyed = bool(idempotent) or given is not None
    guard.claims_at_once = guard.keyed and guard.call_key is None
    done_when = options.get("done_when")
    guard.asked = guard.keyed or done_when is not None
    if done_when is not None:
        if not callable(done_when):
            raise ConfigurationError.of_option(where, "done_when", "a callable", done_when)
        _refuse_async(where, "done_when", done_when, fn)
        guard.job = _with_done_when(fn, done_when)
        guard.call = interrupts.caller(guard.job)
    ttl, max_crashes = defaults
    declared = options.get("idempotency_ttl")
    if declared is not None:
        ttl = checked_duration(where, "idempotency_ttl", declared, least=1)
    guard.ttl = max(ttl, _longest_wait(rules))
    if "max_crashes" in options:
        max_crashes = checked_crashes(where, options["max_crashes"])
    guard.max_crashes = max_crashes
    return guard


#: The actor options of idempotency.
OPTIONS = ("idempotent", "idempotency_key", "done_when", "idempotency_ttl", "max_crashes")


def _refuse_any(where: str, options: Mapping[str, Any]) -> None:
    for name in OPTIONS:
        if options.get(name) not in (None, False):
            raise ConfigurationError(
                f"{where}: {name}: the broker has no Idempotency with a store. Pass one to install(): on RabbitMQ "
                "install(broker, idempotency=Idempotency(RedisStore.from_url(…)))."
            )


def checked_crashes(where: str, value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigurationError.of_option(where, "max_crashes", "an int of at least 1, or None", value)
    return value


def _longest_wait(rules: RuleSet) -> int:
    """The longest wait between two runs that rules which retry allow, in milliseconds."""
    longest = 0
    for policy in rules.retry_policies():
        bounds = [bounds_of(policy.wait, attempt)[1] for attempt in range(1, min(policy.attempts, 100))]
        longest = max([longest, *bounds])
    return min(longest, WEEK_MS)


def _refuse_async(where: str, option: str, given: Any, fn: Any) -> None:
    if is_coroutine_callable(given) and not coroutines.is_async(fn):
        raise ConfigurationError.of_option(
            where, option, "a plain function", given, "A coroutine function works on an async actor only"
        )


def _of_users(where: str, option: str, given: Callable[..., Any], fn: Any) -> tuple[Callable[..., Any], Caller]:
    _refuse_async(where, option, given, fn)
    run = async_to_sync(given) if is_coroutine_callable(given) else given
    return run, interrupts.caller(run)


def _with_done_when(fn: Any, done_when: Callable[..., Any]) -> Callable[..., Any]:
    """The job, which asks first whether it has been done: inside its timeout, and on the loop of an async actor."""
    if coroutines.is_async(fn):
        coroutine = fn.__wrapped__

        @functools.wraps(coroutine)
        async def ask_and_run(*args: Any, **kwargs: Any) -> Any:
            done = done_when(*args, **kwargs)
            if inspect.isawaitable(done):
                done = await done
            if done:
                raise Done
            return await coroutine(*args, **kwargs)

        return async_to_sync(ask_and_run)

    def run(*args: Any, **kwargs: Any) -> Any:
        if done_when(*args, **kwargs):
            raise Done
        return fn(*args, **kwargs)

    return run
