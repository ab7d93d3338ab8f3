"""The outbox, keys and transactional jobs in SQL, without a driver: `dramatiq_policies.sql` and Django bring the connection."""
