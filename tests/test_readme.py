"""README.md is a program: its Python blocks run from top to bottom, its two-file pass passes its own test."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
FILES = {b.splitlines()[0].removeprefix("# "): b for b in BLOCKS if b.startswith("# ")}


def test_the_page_runs_from_top_to_bottom(tmp_path):
    script = tmp_path / "README.py"
    script.write_text("\n".join(b for b in BLOCKS if not b.startswith("# ")))
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "fuse-norm" in done.stdout


def test_a_pass_is_two_files_and_under_sixty_lines(tmp_path):
    assert sorted(FILES) == ["relu_squared.py", "test_relu_squared.py"]
    assert sum(len(text.splitlines()) for text in FILES.values()) < 60
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.splitlines()[0])
def test_blocks_are_whole(block):
    ast.parse(block)
