"""The tables of `DjangoStore` and `DjangoOutbox`, for Django's migrations. Read `dramatiq_policies.sql.tables` for the columns."""

from __future__ import annotations

from typing import ClassVar

from django.db import models

from ...transactions.database import KEYS, OUTBOX
from .fields import DigestField, MediumBinaryField

__all__ = ["Key", "OutboxRow"]


class Key(models.Model):  # type: ignore[misc]
    """The register of an idempotency key."""

    name = DigestField(max_length=64, primary_key=True)
    value = MediumBinaryField()
    expires_at = models.BigIntegerField()

    class Meta:
        db_table = KEYS
        indexes: ClassVar = [models.Index(fields=["expires_at"], name="dramatiq_policies_keys_expires")]

    def __str__(self) -> str:
        return f"key {self.name}"


class OutboxRow(models.Model):  # type: ignore[misc]
    """A message that is committed and not yet published."""

    id = models.BigAutoField(primary_key=True)
    namespace = models.CharField(max_length=64)
    kind = models.CharField(max_length=16)
    message_id = models.CharField(max_length=255)
    actor = models.CharField(max_length=255)
    queue = models.CharField(max_length=255)
    body = models.BinaryField()
    delay = models.BigIntegerField(null=True)
    created_at = models.BigIntegerField()
    due_at = models.BigIntegerField()
    owner = models.CharField(max_length=64)
    failures = models.IntegerField()
    error = models.CharField(max_length=1000)

    class Meta:
        db_table = OUTBOX
        indexes: ClassVar = [models.Index(fields=["namespace", "due_at"], name="dramatiq_policies_outbox_due")]

    def __str__(self) -> str:
        return f"message {self.message_id} of {self.actor}"
