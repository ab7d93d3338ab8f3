"""Columns as in `dramatiq_policies.sql.tables`, where Django's own fields would make other ones."""

from __future__ import annotations

from typing import Any

from django.db import models

__all__ = ["DigestField", "MediumBinaryField"]


class DigestField(models.CharField):  # type: ignore[misc]
    """A text as a primary key, without Django's second index for LIKE on PostgreSQL."""

    def db_type(self, connection: Any) -> str | None:
        if connection.vendor == "postgresql":
            return f"character varying({self.max_length})"
        found: str | None = super().db_type(connection)
        return found


class MediumBinaryField(models.BinaryField):  # type: ignore[misc]
    """Bytes: at most 16 MB on MariaDB and MySQL."""

    def db_type(self, connection: Any) -> str | None:
        if connection.vendor == "mysql":
            return "mediumblob"
        found: str | None = super().db_type(connection)
        return found
