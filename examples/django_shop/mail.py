"""A fake mail service with a list in memory."""

from __future__ import annotations

sent: list[tuple[str, str, str]] = []


class MailTimeout(Exception):
    """The service did not answer in time. Perhaps the mail is out."""


class AddressRefused(Exception):
    """The mailbox does not exist."""


def send(to: str, text: str, *, key: str) -> None:
    """Send a mail, unless a mail with the same key is out already."""
    if not any(known == key for _, _, known in sent):
        sent.append((to, text, key))
