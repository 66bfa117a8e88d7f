"""Kernel tests run on a GPU where there is one, and everywhere under Triton's interpreter."""

import importlib

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

OURS = [importlib.import_module(f"fxaccel.kernels.{name}") for name in ("_rows", "_flash")]


@pytest.fixture(scope="module")
def interpreter():
    """Turn our kernels, and the parts of Triton's language written in itself, to the interpreter.

    TRITON_INTERPRET acts when a kernel is defined, so it would have to be set before anything imports
    Triton, and would then make it impossible to compile in the same process.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for module in (*OURS, tl, tl.standard):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    patch.setattr(module, name, InterpretedFunction(value.fn))
        yield


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where `launch` runs: the interpreter on the CPU, or a GPU."""
    if request.param == "cpu":
        request.getfixturevalue("interpreter")
    elif not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device(request.param)


@pytest.fixture
def near():
    """Check a result against fp64, allowing for what the same mathematics loses in eager mode."""

    def check(got, eager, exact, ulps=4):
        """Twice eager's error, and 4 eps of the largest value: 1 for the rounding of the result, 1 for the
        interpreter's bfloat16, which truncates, 2 for rsqrt and exp2, which the GPU approximates."""
        assert got.dtype == eager.dtype
        assert got.shape == eager.shape == exact.shape
        if not got.numel():
            return
        eps = torch.finfo(got.dtype).eps
        got, eager, exact = (t.detach().double().cpu() for t in (got, eager, exact))
        assert torch.isfinite(got).all()
        allowed = 2 * (eager - exact).abs().max() + ulps * eps * exact.abs().max()
        error = (got - exact).abs().max()
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"

    return check
