"""Files that the processes of one user share in a temporary folder, where other users may write.

Each file lies in a folder of the user's own (``0700``). Each is opened without following links, never waits for the other end of a
FIFO, and must be a regular file of this user.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["lock", "make_private", "open_own", "private_folder", "require_file_locks"]


def require_file_locks(where: str) -> None:
    """Refuse what needs locks on files where there are none.

    Raises:
      ConfigurationError: This platform has no ``fcntl``.
    """
    if fcntl is None:
        raise ConfigurationError(
            f"{where} needs locks on files (Python's fcntl module), and this platform has none. Run your workers on Linux, "
            f"macOS or in WSL, or leave {where} out."
        )


def private_folder() -> Path:
    """The path of the folder of this user in the temporary directory. `make_private` makes it."""
    import tempfile

    return Path(tempfile.gettempdir(), f"dramatiq-policies-{os.getuid()}")


def make_private(path: Path) -> None:
    """Make a folder that only this user can enter, if it is missing.

    Raises:
      OSError: It can't be made, is a link, or belongs to another user.
    """
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise OSError(f"{path} is a link, no folder, or belongs to another user (its owner: {found.st_uid})")
    if stat.S_IMODE(found.st_mode) != 0o700:
        path.chmod(0o700)


def open_own(path: Path, flags: int, mode: int = 0o600) -> int:
    """``os.open`` for a regular file of this user.

    Raises:
      OSError: It is missing, a link, a FIFO, a folder or a device, or belongs to another user.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
        os.close(descriptor)
        kind = f"a file of user {found.st_uid}" if stat.S_ISREG(found.st_mode) else "no regular file"
        raise OSError(f"{path} is {kind}")
    return descriptor


def lock(descriptor: int) -> bool:
    """Lock the whole file for this process; False if another process holds the lock.

    Unlike that of ``flock``, a forked child that outlives this process does not keep the lock.
    """
    locks: Any = fcntl
    try:
        locks.lockf(descriptor, locks.LOCK_EX | locks.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
