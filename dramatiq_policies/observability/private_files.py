"""Files shared by the processes of one user in the temporary directory, where other users may write.

Each file is in a private folder (mode ``0700``). Opening follows no links and never blocks on a FIFO. Only regular files of this
user are accepted.
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
    """Check for file locks.

    Raises:
      ConfigurationError: This platform has no ``fcntl``.
    """
    if fcntl is None:
        raise ConfigurationError(
            f"{where} needs locks on files (Python's fcntl module), which this platform lacks. Run your "
            f"workers on Linux, macOS or in WSL, or leave {where} out."
        )


def private_folder() -> Path:
    """Return the path of the private folder of this user. `make_private` creates the folder."""
    import tempfile

    return Path(tempfile.gettempdir(), f"dramatiq-policies-{os.getuid()}")


def make_private(path: Path) -> None:
    """Create a folder with mode 0700, if missing.

    Raises:
      OSError: The folder can't be created, is a link, or belongs to another user.
    """
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise OSError(f"{path} is a link, not a folder, or owned by another user (uid {found.st_uid})")
    if stat.S_IMODE(found.st_mode) != 0o700:
        path.chmod(0o700)


def open_own(path: Path, flags: int, mode: int = 0o600) -> int:
    """Like ``os.open``, but only for a regular file of this user.

    Raises:
      OSError: The file is missing, is a link, a FIFO, a folder or a device, or belongs to another user.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
        os.close(descriptor)
        kind = f"a file of user {found.st_uid}" if stat.S_ISREG(found.st_mode) else "not a regular file"
        raise OSError(f"{path} is {kind}")
    return descriptor


def lock(descriptor: int) -> bool:
    """Lock the whole file for this process. Return False if another process holds the lock.

    Unlike ``flock``, a forked child does not keep the lock after the end of this process.
    """
    locks: Any = fcntl
    try:
        locks.lockf(descriptor, locks.LOCK_EX | locks.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
