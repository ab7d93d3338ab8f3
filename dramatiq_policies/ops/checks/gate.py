"""Sort findings: exemptions with reasons, and a baseline for an existing application."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...delivery.broker_state import state_of
from ..app import OperationError, did_you_mean
from .actor_checks import check_actor, check_broker
from .checked_job import Settings
from .findings import CODES, Finding

if TYPE_CHECKING:
    from dramatiq import Actor
    from dramatiq.broker import Broker

__all__ = [
    "BASELINE",
    "Report",
    "assert_job_ready",
    "gate",
    "missing_extra",
    "read_baseline",
    "read_exemptions",
    "write_baseline",
]

#: Where the baseline is kept.
BASELINE = ".dramatiq-policies-baseline.json"

#: For each actor's name, or "" for all, the reason for each code.
Exemptions = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Report:
    """The result of the gate.

    Attributes:
      findings: The findings that count.
      exempt: Findings with the reason of an exemption.
      baseline: Findings that the baseline lists.
      fixed: Entries (code, actor) of the baseline without a finding now.
    """

    findings: tuple[Finding, ...]
    exempt: tuple[Finding, ...] = ()
    baseline: tuple[Finding, ...] = ()
    fixed: tuple[tuple[str, str | None], ...] = ()

    def failed(self, *, strict: bool = False) -> bool:
        """Whether the gate stays shut: at an error, with ``strict`` at a warning too."""
        return any(strict or finding.severity == "error" for finding in self.findings)


def gate(
    broker: Broker,
    settings: Settings | None = None,
    *,
    exemptions: Exemptions | None = None,
    baseline: frozenset[tuple[str, str | None]] = frozenset(),
    live: tuple[Finding, ...] = (),
) -> Report:
    """Check a broker's actors and sort the findings. Nothing connects.

    Parameters:
      broker: The broker from `load_broker`.
      settings: The settings that no application declares.
      exemptions: Added to each actor's own ``policy_exempt={"DP005": "reason"}``.
      baseline: Known findings as (code, actor); they don't count.
      live: Findings of `check_live`.
    """
    found = [*check_broker(broker, settings), *live]
    reasons = {"": {}, **(exemptions or {})}
    counting, exempt, known = [], [], []
    for finding in found:
        reason = _reason(broker, finding, reasons)
        if reason is not None:
            exempt.append(replace(finding, exempt=reason))
        elif (finding.code, finding.actor) in baseline:
            known.append(finding)
        else:
            counting.append(finding)
    fixed = baseline - {(finding.code, finding.actor) for finding in found}
    return Report(tuple(counting), tuple(exempt), tuple(known), tuple(sorted(fixed, key=str)))


def missing_extra(error: OperationError) -> Report | None:
    """Return the report for an application that can't be imported without an extra; None for other errors."""
    if 'pip install "dramatiq-policies[' not in str(error):
        return None
    code = CODES["DP021"]
    return Report((Finding(code=code.code, severity=code.severity, actor=None, message=str(error), fix=code.fix),))


def _reason(broker: Broker, finding: Finding, reasons: Exemptions) -> str | None:
    if finding.actor is not None:
        policy = state_of(broker).policies.get(finding.actor)
        own = {} if policy is None else policy.exempt
        for given in (own, reasons.get(finding.actor, {})):
            if finding.code in given:
                return given[finding.code]
    return reasons[""].get(finding.code)


def assert_job_ready(actor: Actor[..., Any], *, required_tags: tuple[str, ...] = ()) -> None:
    """Check an actor in a unit test, as ``dramatiq-policies check`` does::

        def test_the_job_is_ready_for_production():
            assert_job_ready(send_confirmation, required_tags=("team",))

    Warnings, and findings with a reason in ``policy_exempt``, don't count.

    Parameters:
      actor: The actor.
      required_tags: The tags to require. Default: none.

    Raises:
      AssertionError: The actor has errors without an exemption; the text lists them.
    """
    found = [
        finding
        for finding in check_actor(actor, Settings(required_tags=required_tags))
        if finding.severity == "error" and _reason(actor.broker, finding, {"": {}}) is None
    ]
    if found:
        lines = "\n".join(f"  {finding.code} {finding.message}. {finding.fix}." for finding in found)
        raise AssertionError(f"The job {actor.actor_name} is not ready:\n{lines}")


def read_exemptions(pyproject: Path) -> dict[str, dict[str, str]]:
    """``[tool.dramatiq_policies.exempt]`` of a ``pyproject.toml``: a reason for each code, or a table of reasons for an
    actor.

    Raises:
      OperationError: If the file can't be read, a code is unknown or a reason is missing.
    """
    if not pyproject.exists():
        return {}
    table: Any = read_toml(pyproject)
    for name in ("tool", "dramatiq_policies", "exempt"):
        table = table.get(name, {}) if isinstance(table, dict) else {}
    found: dict[str, dict[str, str]] = {"": {}}
    for name, value in table.items():
        for code, reason in value.items() if isinstance(value, dict) else ((name, value),):
            checked_reason(f"{pyproject}", code, reason)
            found.setdefault(name if isinstance(value, dict) else "", {})[code] = reason
    return found


def read_toml(file: Path) -> dict[str, Any]:
    """A TOML file.

    Raises:
      OperationError: If it can't be read.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        found: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OperationError(f"{file} can't be read: {error}") from None
    return found


def checked_reason(where: str, code: str, reason: object) -> None:
    """Check that an exemption has a known code and a reason.

    Raises:
      OperationError: If not.
    """
    if code not in CODES:
        raise OperationError(f"{where}: there is no finding {code!r}{did_you_mean(code, CODES)}")
    if not isinstance(reason, str) or not reason.strip():
        raise OperationError(f"{where}: {code}: an exemption needs a reason.")


def read_baseline(file: Path) -> frozenset[tuple[str, str | None]]:
    """Return the entries of a baseline; an empty set without a file.

    Raises:
      OperationError: If it can't be read.
    """
    if not file.exists():
        return frozenset()
    try:
        return frozenset(
            (entry["code"], entry["actor"]) for entry in json.loads(file.read_text(encoding="utf-8"))["findings"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OperationError(f"The baseline {file} can't be read: {error}") from None


def write_baseline(file: Path, report: Report) -> int:
    """Write the counting findings and the known ones into a baseline, and return their number."""
    entries = sorted(
        {(finding.code, finding.actor) for finding in (*report.findings, *report.baseline)},
        key=lambda e: (e[1] or "", e[0]),
    )
    listed = ",\n".join(f"  {json.dumps({'code': code, 'actor': actor})}" for code, actor in entries)
    file.write_text(f'{{"findings": [\n{listed}\n]}}\n' if entries else '{"findings": []}\n', encoding="utf-8")
    return len(entries)
