"""``python -m dramatiq_policies``, and the entry point of ``dramatiq-policies``."""

from __future__ import annotations

import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> None:
    """Run the command; without the extra `cli`, print the pip command."""
    try:
        from .cli import main as command
    except KeyboardInterrupt:
        _fail("Interrupted.", 130)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in ("click", "rich", "tomli"):
            raise
        _fail(f'Error: the command needs {name}: pip install "dramatiq-policies[cli]"', 2)
    command(prog_name="dramatiq-policies")


def _fail(text: str, code: int) -> NoReturn:
    sys.stderr.write(f"{text}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
