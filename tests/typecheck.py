"""mypy over the package as it is on import: strict on the core, plain on passes and kernels.

mypy cannot see through setuptools' `package-dir`, so the three folders are laid out first.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Exit code of mypy."""
    with tempfile.TemporaryDirectory() as folder:
        laid = Path(folder) / "fxaccel"
        shutil.copytree(ROOT / "fxaccel", laid, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("passes", "kernels"):
            shutil.copytree(ROOT / part, laid / part, ignore=shutil.ignore_patterns("__pycache__"))
        command = [
            sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"),
            "--cache-dir", str(ROOT / ".mypy_cache"), "-p", "fxaccel",
        ]  # fmt: skip
        return subprocess.run(command, cwd=folder, env={**os.environ, "MYPYPATH": folder}).returncode


if __name__ == "__main__":
    sys.exit(main())
