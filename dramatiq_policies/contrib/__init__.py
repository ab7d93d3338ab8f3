"""Integrations with frameworks. Nothing here is imported by the rest of the package."""
