"""Kernel tests run on a GPU where there is one, and everywhere under Triton's interpreter."""

import importlib

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl
from quick_interpreter import quicken
from triton.language import random
from triton.runtime import interpreter as runtime
from triton.runtime.interpreter import InterpretedFunction, _LangPatchScope, _patch_lang
from triton.runtime.jit import JITFunction

from fxaccel.kernels import _flash_source, _flash_spans

FLASH = ("backward", "bias", "forward", "lists", "source", "tiles")
QUANTIZED = ("rows", "gemm", "weights")
KERNELS = (
    "_rows", "_butterfly", "_gemm", "_monarch", "_flash", *(f"_flash_{name}" for name in FLASH),
    *(f"_quantized_{name}" for name in QUANTIZED), "_fake_tiles", "_norm_quantize", "_activations", "_glu",
    "glu_quantize", "bias_activation", "rope", "_loss_rows",
)  # fmt: skip
OURS = [importlib.import_module(f"fxaccel.kernels.{name}") for name in KERNELS]
GENERATED = (_flash_source.keep, _flash_source.bias, _flash_source.flat, _flash_spans.blocks)


class _Interpreted(InterpretedFunction):
    """Interpreted, without patching Triton's language anew on each call from another kernel."""

    def __call__(self, *args, **kwargs):
        return self.rewrite()(*args, **kwargs)


def _forget_generated():
    """Forget functions made for one way to run, and rewrites that miss names which are taken back below."""
    for function in GENERATED:
        function.cache_clear()
    InterpretedFunction.rewritten_fn.clear()


@pytest.fixture(scope="module")
def interpreter():
    """Turn our kernels, and the parts of Triton's language written in itself, to the interpreter.

    TRITON_INTERPRET acts when a kernel is defined, so it would have to be set before anything imports
    Triton, and would then make it impossible to compile in the same process.
    """
    classes = (tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)
    scopes = (*OURS, tl, tl.core, tl.math, tl.standard, random, *classes)
    before = [dict(vars(scope)) for scope in scopes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        quicken(patch)
        for function in (tl.sum.fn, OURS[0].forward_kernel.fn):  # what they see: tl.core, tl
            _patch_lang(function)
        patch.setattr(runtime, "_patch_lang", lambda fn: _LangPatchScope())  # and for no launch again
        _forget_generated()  # what was made before was made to be compiled
        patch.setattr(triton, "jit", _Interpreted)
        for module in (*OURS, tl, tl.standard, random):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    setattr(module, name, _Interpreted(value.fn))
        yield
    _forget_generated()
    for scope, names in zip(scopes, before, strict=True):  # the interpreter leaves its own changes behind
        for name in vars(scope).keys() - names.keys():
            delattr(scope, name)
        for name, value in names.items():
            if vars(scope)[name] is not value:
                setattr(scope, name, value)


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

    def check(got, eager, exact, terms=None, dtype=None, ulps=4):
        """Twice eager's error, and 4 eps: 1 for the rounding of the result, 1 for the interpreter's bfloat16,
        which truncates, 2 for rsqrt and exp2, which a GPU approximates. Eps of the largest sum of absolute
        terms, for a sum's error goes with these; `terms` has these sums where they are not the values."""
        assert got.dtype == eager.dtype
        assert got.shape == eager.shape == exact.shape
        if not got.numel():
            return
        eps = torch.finfo(dtype or got.dtype).eps
        got, eager, exact = (t.detach().double().cpu() for t in (got, eager, exact))
        assert torch.isfinite(got).all()
        largest = (exact if terms is None else terms).abs().max().item()
        allowed = 2 * (eager - exact).abs().max().item() + ulps * eps * largest
        error = (got - exact).abs().max().item()
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"

    return check


@pytest.fixture
def gradient_terms():
    """What the rounding errors of a norm's gradients go with: see `near`."""

    def sums(h, w, dy, centred):
        """The gradients of h and w with every term's absolute value."""
        h, w, dy = (t.detach().double() for t in (h, w, dy))
        mean = h.mean(-1, keepdim=True) * centred
        rstd = torch.rsqrt((h - mean).square().mean(-1, keepdim=True) + 1e-5)
        u, z = (w * dy).abs(), (h.abs() + mean.abs()) * rstd
        dh = rstd * (u + u.mean(-1, keepdim=True) * centred + z * (u * z).mean(-1, keepdim=True))
        return dh, (dy.abs() * z).sum_to_size(w.shape)

    return sums
