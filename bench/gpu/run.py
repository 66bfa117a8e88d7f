"""One command for a machine with a GPU and nothing installed: python bench/gpu/run.py [--out FOLDER]

Lays the package out of the tree (`passes/` and `kernels/` under their import names), runs every test marked
`gpu`, then the benchmarks beside this file, each next to its peers. Figures are appended to
bench/results/gpu.csv; `--out` gets a copy of that file and of all output.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BENCHES = sorted(p for p in HERE.glob("*.py") if p.name not in ("run.py", "measure.py"))


def lay_out(folder: Path) -> Path:
    """The package as an install would make it, of links into the tree."""
    package = folder / "fxaccel"
    package.mkdir()
    for entry in (ROOT / "fxaccel").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for part in ("passes", "kernels"):
        (package / part).symlink_to(ROOT / part)
    return folder


def tests() -> list[str]:
    """Where tests marked `gpu` are: those of the kernels are by their fixture."""
    folder = ROOT / "tests"
    marked = {p for p in folder.rglob("test_*.py") if "mark.gpu" in p.read_text()}
    return [str(folder / "kernels"), *sorted(str(p) for p in marked if p.parent.name != "kernels")]


def main() -> int:
    """Exit code 0 where tests and benches ran without an error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out")
    parser.add_argument("--tests-only", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA GPU here; the kernels' other tests run under make test")
        return 2
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    with tempfile.TemporaryDirectory() as folder, (out / "gpu.log").open("w") as log:
        path = os.pathsep.join([str(lay_out(Path(folder))), str(HERE), os.environ.get("PYTHONPATH", "")])
        commands = [[sys.executable, "-m", "pytest", "-m", "gpu", "-q", *tests()]]
        if not options.tests_only:
            commands += [[sys.executable, str(bench)] for bench in BENCHES]
        for command in commands:
            print("$", *command, flush=True)
            process = subprocess.Popen(
                command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            assert process.stdout is not None, "it was opened above"
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
            failed += process.wait() != 0
    results = ROOT / "bench" / "results" / "gpu.csv"
    if results.exists():
        shutil.copy(results, out / results.name)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
