"""A fake mail gateway with realistic failures. Sends nothing.

The address selects the behaviour, like the test cards of a payment service:

======================= ==================================================================
``flaky@…``             times out at first, answers the second time
``down@…``              always times out
``busy@…``              limits its rate at first, and says for how long
``nobody@…``            is rejected
``hang@…``              holds the connection, whatever timeout it is given
anything else           is accepted
======================= ==================================================================
"""

from __future__ import annotations

import time
from collections import Counter


class EmailTimeout(Exception):
    """The gateway did not answer in time. The mail may have been accepted."""


class RateLimited(Exception):
    """Too many mails.

    Parameters:
      seconds: How long to wait, as the gateway's Retry-After says.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"retry after {seconds} s")
        self.retry_after = seconds


class InvalidEmail(Exception):
    """The address does not exist."""


class MissingCredentials(Exception):
    """The API key is missing or wrong."""


class MailGateway:
    """An account at the mail service.

    Parameters:
      api_key: The API key; None for a forgotten key.
      retry_after: The wait that a rate limit asks for, in seconds.

    Attributes:
      sent: The accepted mails by their idempotency key. A known key gets the same answer, and no second mail.
      asked: The number of calls for each key.
    """

    def __init__(self, api_key: str | None = "secret", retry_after: float = 0.5) -> None:
        self.api_key = api_key
        self.retry_after = retry_after
        self.sent: dict[str, tuple[str, str]] = {}
        self.asked: Counter[str] = Counter()
        self.timeouts: list[float] = []

    def send(self, to: str, subject: str, *, idempotency_key: str, timeout_ms: float) -> None:
        """Send a mail.

        Raises:
          EmailTimeout, RateLimited, InvalidEmail, MissingCredentials: As the address asks for.
        """
        if self.api_key is None:
            raise MissingCredentials("MAIL_API_KEY is not set")
        self.asked[idempotency_key] += 1
        self.timeouts.append(timeout_ms)
        who = to.partition("@")[0]
        if who == "nobody":
            raise InvalidEmail(to)
        if who == "busy" and self.asked[idempotency_key] == 1:
            raise RateLimited(self.retry_after)
        if who == "down" or (who == "flaky" and self.asked[idempotency_key] == 1):
            raise EmailTimeout(f"no answer within {timeout_ms:.0f} ms")
        while who == "hang":
            time.sleep(0.01)
        self.sent.setdefault(idempotency_key, (to, subject))
