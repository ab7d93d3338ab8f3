"""One Sentry event for each message that ends badly."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Literal

from .. import _dramatiq
from ..common.texts import encodable_all
from ..errors import ConfigurationError
from ..observability._sentry_sdk import drop_our_lines, forget_last_seen, job_scope, quieten
from ..outcomes import BAD_ENDINGS, Outcome, OutcomeEvent, class_path, traceparent_of
from .base import PolicyMiddleware

if TYPE_CHECKING:
    from dramatiq import Worker
    from dramatiq.broker import Broker, MessageProxy

    from ..delivery.broker_state import BrokerState
    from .timeout import StuckJob

__all__ = ["SentryReporter"]

Report = Literal["final", "first", "every"]

_LEVELS: Final = {
    Outcome.ALERTED: "fatal",
    Outcome.DEAD: "error",
    Outcome.EXPIRED: "error",
    Outcome.DISCARDED: "warning",
    Outcome.RETRIED: "warning",
}
_FRAME: Final = re.compile(r'^ *File "(.*)", line (\d+), in (.*)$', re.MULTILINE)
#: Seconds that an event has to leave before the worker, or its process, ends.
_FLUSH_WITHIN: Final = 2.0


class SentryReporter(PolicyMiddleware):
    """Reports bad endings to Sentry, through the client that ``sentry_sdk.init`` has set up.

    An event has the error with its own stack, and is grouped by actor, exception type and outcome. An alert is fatal,
    dead and expired messages are errors, a discarded one and a retried attempt are warnings. Its tags are ``actor``,
    ``queue``, ``outcome``, ``reason``, ``attempt``, ``rule``, the message's ``traceparent``, and the actor's own. A stuck
    job is reported too, with the stack of where it is.

    Each job has an isolation scope of its own, so that breadcrumbs and tags of one never show up in another's event. The
    log lines of failing jobs, the worker's and the bundle's, become no events. Beside Sentry's DramatiqIntegration, that one
    keeps its transactions and scopes, and leaves the events of jobs to this one.

    Parameters:
      report: ``"final"``, the default: one event per bad ending. ``"first"``: one at the first failed attempt of a
        message, and none for the attempts after it, except that an alert is always reported. ``"every"``: one per failed
        attempt.

    Arguments are sent only with Sentry's ``send_default_pii``. Whether frames carry local variables, which may hold
    arguments, is Sentry's ``include_local_variables``.

    Raises:
      ConfigurationError: ``report`` is none of the three.
      ImportError: ``sentry-sdk`` is not installed.
    """

    def __init__(self, report: Report = "final") -> None:
        if report not in ("final", "first", "every"):
            raise ConfigurationError.of_option("SentryReporter", "report", "'final', 'first' or 'every'", report)
        try:
            import sentry_sdk
        except ImportError as error:
            raise ImportError('SentryReporter needs sentry-sdk: pip install "dramatiq-policies[sentry]"') from error
        self.report = report
        self._sdk = sentry_sdk
        self._get_client = sentry_sdk.get_client
        # Looked up once, and not for every message.
        self._get_scope: Any = sentry_sdk.Scope.get_isolation_scope
        self._set_scope: Any = sentry_sdk.Scope.set_isolation_scope
        self._job_scope = job_scope(sentry_sdk.Scope)
        self._wiring: BrokerState | None = None

    def attach(self, state: BrokerState) -> None:
        from sentry_sdk.integrations.logging import ignore_logger

        self._wiring = state
        # Before the log lines: Sentry takes the second event with one exception for a repetition.
        state.observe(self, self._record, self, successes=False, first=True)
        state.stuck_subscribers.append(self._stuck)
        ignore_logger(_dramatiq.WORKER_LOGGER)
        drop_our_lines()
        for middleware in state.broker.middleware:
            quieten(middleware)

    def before_worker_boot(self, broker: Broker, worker: Worker) -> None:
        super().before_worker_boot(broker, worker)
        for middleware in broker.middleware:
            quieten(middleware)

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        self._sdk.flush(timeout=_FLUSH_WITHIN)

    # Scopes. On every message's way.

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        scope = message.sentry_scope = object.__new__(self._job_scope)  # type: ignore[attr-defined]
        around = self._get_scope()
        if type(around) is self._job_scope:
            # Of a job whose after-hooks never ran.
            around = getattr(around, "around", around)
        scope.around = around
        self._set_scope(scope)

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        try:
            scope = message.sentry_scope
        except AttributeError:  # Skipped before it was this one's turn.
            return
        self._set_scope(scope.around)

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:
        self.after_process_message(broker, message)

    # Events.

    def _record(self, event: OutcomeEvent, message: MessageProxy | None) -> None:
        client = self._get_client()
        if not self._wanted(event) or not client.is_active():
            return
        scope = None if message is None else vars(message).pop("sentry_scope", None)
        if scope is None:
            scope = self._get_scope().fork()
            scope.clear_breadcrumbs()
        with self._sdk.scope.use_isolation_scope(scope), self._sdk.new_scope() as current:
            if not client.options["send_default_pii"]:
                current.add_event_processor(_without_arguments)
            forget_last_seen(client)
            report, hint = self._event(client, event, message)
            # A server that reads JSON strictly takes no event with half a character.
            self._sdk.capture_event(encodable_all(report), hint)

    def _wanted(self, event: OutcomeEvent) -> bool:
        outcome = event.outcome
        if outcome is Outcome.RETRIED:
            return self.report == "every" or (self.report == "first" and event.attempt == 1)
        if outcome not in BAD_ENDINGS:
            return False
        return self.report != "first" or outcome is Outcome.ALERTED or event.attempt in (None, 1)

    def _event(self, client: Any, event: OutcomeEvent, message: MessageProxy | None) -> tuple[Any, Any]:
        from sentry_sdk.utils import event_from_exception

        error, outcome = event.exception, event.outcome.value
        report: dict[str, Any] = {"message": f"{outcome}: a message of actor {event.actor}"}
        hint: dict[str, Any] = {}
        if error is not None:
            mechanism = {"type": "dramatiq_policies", "handled": event.outcome is Outcome.RETRIED}
            stack, hint = event_from_exception(error, client_options=client.options, mechanism=mechanism)
            report = dict(stack)
        report["level"] = _LEVELS[event.outcome]
        report["logger"] = "dramatiq_policies"
        report["transaction"] = event.actor
        report["fingerprint"] = [str(event.actor), "" if error is None else class_path(type(error)), outcome]
        report["tags"] = _tags(
            event.tags,
            actor=event.actor,
            queue=event.queue,
            outcome=outcome,
            reason=event.reason,
            attempt=event.attempt,
            rule=event.rule,
            traceparent=traceparent_of(message),
        )
        report["contexts"] = {
            "job": {
                "message_id": event.message_id,
                "wait_ms": event.wait_ms,
                "duration_ms": event.duration_ms,
                "delay_ms": event.delay_ms,
            }
        }
        if message is not None and client.options["send_default_pii"]:
            report["extra"] = {"job_args": list(message.args), "job_kwargs": dict(message.kwargs)}
        return report, hint

    def _stuck(self, job: StuckJob) -> None:
        if not self._get_client().is_active():
            return
        policy = None if self._wiring is None else self._wiring.policies.get(job.actor)
        frames = [
            {"filename": file, "abs_path": file, "lineno": int(line), "function": function, "in_app": True}
            for file, line, function in _FRAME.findall(job.stack)
        ]
        text = f"stuck for {job.elapsed_ms:.0f} ms, and can't be interrupted"
        self._sdk.capture_event(
            {
                "level": "fatal",
                "logger": "dramatiq_policies",
                "transaction": job.actor,
                "exception": {"values": [{"type": "StuckJob", "value": text, "stacktrace": {"frames": frames}}]},
                "fingerprint": [job.actor, "StuckJob", "stuck"],
                "tags": _tags(
                    None if policy is None else policy.tags, actor=job.actor, queue=job.queue, outcome="stuck"
                ),
                "contexts": {"job": {"message_id": job.message_id, "duration_ms": job.elapsed_ms}},
            }
        )
        # The process may be about to end.
        self._sdk.flush(timeout=_FLUSH_WITHIN)


def _tags(own: Any, **ours: Any) -> dict[str, str]:
    return {**(own or {}), **{name: str(value) for name, value in ours.items() if value is not None}}


def _without_arguments(event: Any, hint: Any) -> Any:
    """Sentry's own integration adds the whole message to what is captured in its scope."""
    event.get("contexts", {}).pop("dramatiq", None)
    return event
