"""Make a virtual environment with this project, once, also for several calls at the same time.

python3 scripts/make_venv.py .venv ".[dev]"
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make_venv(venv: Path, requirement: str) -> None:
    stamp = venv / "installed"
    with Path(f"{venv}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.stat().st_mtime >= (ROOT / "pyproject.toml").stat().st_mtime:
            return  # another make was faster
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        pip = [venv / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "--editable", requirement], check=True, cwd=ROOT)
        stamp.touch()


if __name__ == "__main__":
    try:
        make_venv(ROOT / sys.argv[1], sys.argv[2])
    except subprocess.CalledProcessError as error:
        sys.exit(f"make_venv: could not make {sys.argv[1]}: {error}")
