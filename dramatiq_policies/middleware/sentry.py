"""Send a Sentry event for each message that failed permanently."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Literal

from .. import _dramatiq
from ..common.durations import format_duration
from ..common.texts import encodable_all
from ..errors import ConfigurationError
from ..observability.sentry_patches import drop_our_lines, forget_last_seen, job_scope, quieten
from ..outcomes import BAD_ENDINGS, Outcome, OutcomeEvent, StuckJob, class_path, traceparent_of
from .base import PolicyMiddleware

if TYPE_CHECKING:
    from dramatiq import Worker
    from dramatiq.broker import Broker, MessageProxy

    from ..delivery.broker_state import BrokerState

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
#: The time to send the last events before the worker, or its process, ends, in seconds.
_FLUSH_WITHIN: Final = 2.0


class SentryReporter(PolicyMiddleware):
    """Send permanent failures to Sentry, with the client from ``sentry_sdk.init``::

        sentry_sdk.init(dsn=DSN)
        install(broker, sentry=SentryReporter())

    Sentry groups the events by actor, exception type and outcome. An alert is fatal, dead and expired messages are errors,
    discarded messages and retried attempts are warnings. The tags are ``actor``, ``queue``, ``outcome``, ``reason``, ``attempt``,
    ``rule``, the message's ``traceparent``, and the actor's ``tags``. A stuck job is an event with its current stack.

    Each job has its own isolation scope: breadcrumbs and tags of a job never appear in the events of another. Log lines of failed
    jobs become no events. You may use Sentry's DramatiqIntegration beside: it keeps transactions and scopes, and leaves the events
    of jobs to the SentryReporter.

    Parameters:
      report: ``"final"`` (default): one event per permanent failure. ``"first"``: one event at the first failed attempt of a
        message, and one for each alert. ``"every"``: one event per failed attempt.

    Sentry receives the message's arguments only with ``send_default_pii``. Local variables in frames may contain arguments, too:
    Sentry's ``include_local_variables`` controls them.

    Raises:
      ConfigurationError: ``report`` has another value.
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
        # Looked up here and not for each message.
        self._get_scope: Any = sentry_sdk.Scope.get_isolation_scope
        self._set_scope: Any = sentry_sdk.Scope.set_isolation_scope
        self._job_scope = job_scope(sentry_sdk.Scope)
        self._state: BrokerState | None = None

    def attach(self, state: BrokerState) -> None:
        from sentry_sdk.integrations.logging import ignore_logger

        self._state = state
        # Before the log lines: Sentry drops a second event with the same exception.
        state.outcomes.observe(self, self._record, self, successes=False, first=True)
        state.outcomes.stuck_subscribers.append(self._stuck)
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

    # Scopes. These hooks run for every message.

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        scope = message.sentry_scope = object.__new__(self._job_scope)  # type: ignore[attr-defined]
        around = self._get_scope()
        if type(around) is self._job_scope:
            # Left by a job whose after-hooks did not run.
            around = getattr(around, "around", around)
        scope.around = around
        self._set_scope(scope)

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        try:
            scope = message.sentry_scope
        except AttributeError:  # Another middleware skipped the message before our hook.
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
            # A strict JSON server refuses lone surrogates.
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
        policy = None if self._state is None else self._state.policies.get(job.actor)
        frames = [
            {"filename": file, "abs_path": file, "lineno": int(line), "function": function, "in_app": True}
            for file, line, function in _FRAME.findall(job.stack)
        ]
        text = f"stuck for {format_duration(job.elapsed_ms)}; can't be interrupted"
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
        # The process may end at once.
        self._sdk.flush(timeout=_FLUSH_WITHIN)


def _tags(own: Any, **ours: Any) -> dict[str, str]:
    return {**(own or {}), **{name: str(value) for name, value in ours.items() if value is not None}}


def _without_arguments(event: Any, hint: Any) -> Any:
    """Remove the message's arguments, which Sentry's integration adds to each event."""
    event.get("contexts", {}).pop("dramatiq", None)
    return event
