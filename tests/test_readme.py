"""README.md is a program: its Python blocks run from top to bottom, its two-file pass passes its own test."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    files = {name: text for name, text in FILES.items() if "relu_squared" in name}
    assert sorted(files) == ["relu_squared.py", "test_relu_squared.py"]
    assert sum(len(text.splitlines()) for text in files.values()) < 60
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pipeline_trains_under_torchrun(tmp_path):
    (tmp_path / "train.py").write_text(FILES["train.py"])
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"step \d+: (\S+)", done.stdout)]
    assert len(losses) == 3
    assert losses[-1] < 0.8 * losses[0]
    names = [set(torch.load(tmp_path / f"stage{rank}.pt")) for rank in range(2)]
    assert names[0].isdisjoint(names[1])
    assert len(names[0] | names[1]) == 1 + 4 * 12 + 2


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.splitlines()[0])
def test_blocks_are_whole(block):
    ast.parse(block)
