"""One middleware a file."""
