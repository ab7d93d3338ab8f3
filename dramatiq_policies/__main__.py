"""``python -m dramatiq_policies``, and the entry point of ``dramatiq-policies``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command; without its extra, say what to install."""
    try:
        from .cli import main as command
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in ("click", "rich", "tomli"):
            raise
        sys.exit(f'Error: the command needs {name}: pip install "dramatiq-policies[cli]"')
    command(prog_name="dramatiq-policies")


if __name__ == "__main__":
    main()
