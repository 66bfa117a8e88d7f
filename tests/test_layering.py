"""Kernels know no graphs; the core knows neither kernels nor passes. Only reads imports and text."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BANNED = {
    "kernels": ("fxaccel", "torch.fx", "torch.export"),  # kernels import no part of the compiler
    "fxaccel": ("fxaccel.passes", "fxaccel.kernels", "triton"),  # the core finds passes by name
    "passes": ("triton", "torch._inductor"),
}
SELF_OK = {"kernels": ("fxaccel.kernels",)}  # a kernel file may use its own package's helpers
CLI_ONLY = ("typer", "rich")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{a.name}" for a in node.names)


def under(name, roots):
    return any(name == r or name.startswith(r + ".") for r in roots)


def relative(paths):
    return sorted(str(p.relative_to(ROOT)) for p in paths)


@pytest.mark.parametrize("path", relative(p for d in BANNED for p in (ROOT / d).rglob("*.py")))
def test_imports_point_downwards(path):
    layer = path.split("/")[0]
    names = list(imports(ROOT / path))
    bad = [n for n in names if under(n, BANNED[layer]) and not under(n, SELF_OK.get(layer, ()))]
    assert not bad, f"{layer}/ may not import {bad}"
    if path not in ("fxaccel/cli.py", "fxaccel/progress.py"):
        assert not [n for n in names if under(n, CLI_ONLY)], "the CLI and the bar alone import typer and rich"


def refusals(path):
    """The longest fixed part of every sentence that a `refuse` of this file can yield, as it is or as a
    Refusal."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef) and "refuse" in function.name:
            for node in ast.walk(function):
                said = node.value if isinstance(node, ast.Yield) else None
                if isinstance(said, ast.Call) and getattr(said.func, "id", "") == "Refusal":
                    said = said.args[0]
                if isinstance(said, (ast.Constant, ast.JoinedStr)):
                    parts = getattr(said, "values", [said])
                    yield max((p.value for p in parts if isinstance(p, ast.Constant)), key=len)


@pytest.mark.parametrize("path", relative((ROOT / "passes").glob("[!_]*.py")))
def test_every_pass_has_a_test_that_reaches_every_sentence_of_its_refuse(path):
    test = ROOT / "tests" / "passes" / f"test_{pathlib.Path(path).name}"
    text = " ".join(test.read_text().split())
    missing = [s for s in refusals(ROOT / path) if s.strip(" ;") not in text]
    assert not missing, f"{test.name} does not reach {missing}"
