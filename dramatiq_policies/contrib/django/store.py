"""An idempotency store in a database of Django's settings."""

from __future__ import annotations

from ...transactions.key_table import DEFAULT_NAMESPACE, KeyTable
from .database import DjangoDatabase, checked_using, how_to_migrate

__all__ = ["DjangoStore"]


class DjangoStore(KeyTable):
    """Keeps keys in a table of your database: PostgreSQL, MariaDB, MySQL or SQLite. `manage.py migrate` makes the table.

    Example::

        DRAMATIQ_BROKER = {
            ...
            "MIDDLEWARE": [
                ...
                Idempotency(DjangoStore()),
            ],
        }

    With a `DjangoOutbox` on the same database, the store also serves actors with ``transactional=True``. Otherwise prefer
    `RedisStore`: a key on Redis is cheaper.

    The store opens at most four connections in each process, beside the connections of requests and jobs. A call raises after
    three seconds at most, and waits one second for a lock. A writing process also deletes expired keys, up to 500 for every 100
    writes.

    Parameters:
      using: The alias of the database. Default: ``"default"``. For another one run ``manage.py migrate --database``.
      namespace: Separates the keys of services that share the database. Default: ``"idem"``.

    Raises:
      ConfigurationError: An argument is invalid.
    """

    def __init__(self, using: str = "default", *, namespace: str = DEFAULT_NAMESPACE) -> None:
        self.using = checked_using("DjangoStore", using)
        self.how_to_create = how_to_migrate(self.using)
        super().__init__(DjangoDatabase(self.using), namespace)
