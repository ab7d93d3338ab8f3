"""The service that sends mails; a list in memory stands in for it."""

from __future__ import annotations

sent: list[tuple[str, str, str]] = []


class MailTimeout(Exception):
    """It did not answer in time; perhaps it has sent the mail."""


class AddressRefused(Exception):
    """There is no such mailbox."""


def send(to: str, text: str, *, key: str) -> None:
    """Send a mail; a second one with the same key is not sent."""
    if not any(known == key for _, _, known in sent):
        sent.append((to, text, key))
