"""What attention says that it gives, dtype, shape and strides, is what it gives: on the CPU and in Triton."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fxaccel.kernels import _flash
from fxaccel.kernels import attention as kernel
from tests.helpers import thinned

B, H, G, S, T, D, E = 2, 4, 2, 5, 7, 8, 6
FORMS = {
    "t0[k - q + S - 1, h]": (S + T - 1, H),
    "t0[q, k, b, h]": (S, T, B, H),
    "t0[0, h, q, k]": (1, H, S, T),
    "t0[k, q] + t0[k, 0]": (T + 2, S + 1),  # larger than what is read
}
MASK = "(k < q - 1) & t1[b, k]"  # rows 0 and 1 keep no key


def facts(results):
    """What a compiler plans with."""
    return [(x.dtype, x.shape, x.stride(), x.device) for x in tree_leaves(results)]


def check(dtype, kind, bias, device, empty="zero", softcap=0.0, dropout=0.0):
    """Table and sinks are of `kind`, the table is strided; with sinks all rows have something to look at."""
    torch.manual_seed(3)
    shapes = ((B, S, H, D), (B, T, G, D), (B, T, G, E))
    q, k, v = (torch.randn(shape, dtype=dtype, device=device).transpose(1, 2) for shape in shapes)
    table = torch.randn(FORMS[bias], dtype=kind, device=device).mT.contiguous().mT
    keep = torch.ones(B, T, dtype=torch.bool, device=device)
    for sinks in (None, torch.randn(H, dtype=kind, device=device)):
        options = (0.3, softcap, sinks, dropout, empty)
        args = (q, k, v, [table, keep], MASK, bias, *options)
        saved = kernel._save(*args)
        assert facts(saved) == facts(kernel._save_fake(*args))
        for wanted in ([True, False, sinks is not None], [False] * 3):
            args = (torch.randn_like(saved[0]), q, k, v, [table, keep], MASK, bias, *saved, *options, wanted)
            assert facts(kernel._backward(*args)) == facts(kernel._backward_fake(*args))


@pytest.mark.parametrize(("softcap", "dropout"), [(0.0, 0.0), (2.0, 0.5)])
@pytest.mark.parametrize("empty", kernel.EMPTY)
@pytest.mark.parametrize("bias", FORMS)
@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.bfloat16, torch.float32), (torch.float64, torch.bfloat16)], ids=str
)
def test_on_the_cpu(dtype, kind, bias, empty, softcap, dropout):
    check(dtype, kind, bias, "cpu", empty, softcap, dropout)


@thinned(
    2, dtype=[torch.float32, torch.bfloat16], bias=["t0[k - q + S - 1, h]", "t0[q, k, b, h]"],
    empty=["zero", "nan", "mean"],
)  # fmt: skip
def test_in_triton(dtype, bias, empty, device, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel, "_kernels", lambda q: _flash)
    check(dtype, dtype, bias, device, empty)
