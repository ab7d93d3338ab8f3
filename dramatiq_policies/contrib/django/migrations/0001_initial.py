from __future__ import annotations

from typing import ClassVar

from django.db import migrations, models

from ....transactions.database import KEYS, OUTBOX
from ..fields import DigestField, MediumBinaryField


class Migration(migrations.Migration):  # type: ignore[misc]
    initial = True
    dependencies: ClassVar[list[object]] = []
    operations: ClassVar[list[object]] = [
        migrations.CreateModel(
            name="Key",
            fields=[
                ("name", DigestField(max_length=64, primary_key=True, serialize=False)),
                ("value", MediumBinaryField()),
                ("expires_at", models.BigIntegerField()),
            ],
            options={
                "db_table": KEYS,
                "indexes": [models.Index(fields=["expires_at"], name="dramatiq_policies_keys_expires")],
            },
        ),
        migrations.CreateModel(
            name="OutboxRow",
            fields=[
                ("id", models.BigAutoField(primary_key=True, serialize=False)),
                ("namespace", models.CharField(max_length=64)),
                ("kind", models.CharField(max_length=16)),
                ("message_id", models.CharField(max_length=255)),
                ("actor", models.CharField(max_length=255)),
                ("queue", models.CharField(max_length=255)),
                ("body", models.BinaryField()),
                ("delay", models.BigIntegerField(null=True)),
                ("created_at", models.BigIntegerField()),
                ("due_at", models.BigIntegerField()),
                ("owner", models.CharField(max_length=64)),
                ("failures", models.IntegerField()),
                ("error", models.CharField(max_length=1000)),
            ],
            options={
                "db_table": OUTBOX,
                "indexes": [models.Index(fields=["namespace", "due_at"], name="dramatiq_policies_outbox_due")],
            },
        ),
    ]
