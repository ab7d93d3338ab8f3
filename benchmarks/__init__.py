"""What the library costs, measured beside bare and stock Dramatiq. See README.md."""
