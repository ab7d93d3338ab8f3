"""The models and their migrations. tests/integration/test_django_tables.py compares the tables."""

from __future__ import annotations

from django.core.management import call_command


def test_the_migrations_are_those_of_the_models():
    # SystemExit if there is anything to make.
    call_command("makemigrations", "dramatiq_policies", check=True, dry_run=True, verbosity=0)
