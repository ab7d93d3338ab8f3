"""The outbox, keys and transactional jobs with SQLAlchemy 2: PostgreSQL, MariaDB, MySQL and SQLite.

Install the extra ``sql`` and a driver of your database, and create the tables::

    pip install "dramatiq-policies[sql]"

    create_tables(engine)                           # or let Alembic do it, from `metadata`

    outbox = SqlOutbox(engine)
    install(broker, outbox=outbox, idempotency=Idempotency(SqlStore(engine)))

With both, you may declare actors with ``transactional=True``: the effects of the job, the completion of its key and its messages
are committed together.
"""

from __future__ import annotations

try:
    import sqlalchemy
except ImportError as error:
    raise ImportError('dramatiq_policies.sql needs SQLAlchemy 2: pip install "dramatiq-policies[sql]"') from error
if int(sqlalchemy.__version__.partition(".")[0]) < 2:
    raise ImportError(
        f"dramatiq_policies.sql needs SQLAlchemy 2, and {sqlalchemy.__version__} is installed: "
        'pip install "dramatiq-policies[sql]"'
    )

from .outbox import SqlOutbox
from .store import SqlStore
from .tables import create_tables, metadata

__all__ = ["SqlOutbox", "SqlStore", "create_tables", "metadata"]
