"""The costs of the library beside bare and stock Dramatiq. See README.md."""
