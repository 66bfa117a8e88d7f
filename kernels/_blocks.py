"""Products with block-diagonal matrices and the permutation between two of them, by torch's own operators.

Shapes     x: [N, (g a)]; w: [g, b, a], g blocks; y: [N, (g b)]. A shuffle turns [N, (g c)] into [N, (c g)].
Numerics   as torch.bmm: half precision is summed in fp32 and rounded once.
Cost       2 N g a b flop a product. Every operand is read where it lies: BLAS takes rows that are apart, and
           torch's bmm passes such strides on. The shuffle is PyTorch's channel shuffle, which transposes each
           row in the vector registers: [256, 2048] in fp32 takes 0.21 ms, where a copy of the permuted view
           takes 0.50 ms and a transposition of the whole 0.65 ms (bench/monarch.py).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fxaccel.kernels._norm import DTYPES

SMALL = 2**18  # multiply-adds of a block up to which a call of BLAS for each costs more than a copy does


def product(x: Tensor, w: Tensor, spent: Tensor | None = None) -> Tensor:
    """y[n, g, b] = sum_a w[g, b, a] x[n, g, a], flat and contiguous; in the memory of `spent` if that fits.

    Fresh memory costs: at [256, 2048] and 16 blocks, pages of a third buffer take a tenth of the whole layer.
    """
    n, (g, b, a) = len(x), w.shape
    blocks = x.view(n, g, a).transpose(0, 1)
    if n * a * b <= SMALL:
        return torch.bmm(blocks, w.mT).transpose(0, 1).contiguous().view(n, g * b)
    spent = x.new_empty(n * g * b) if spent is None or spent.numel() != n * g * b else spent
    y = spent.view(n, g, b)
    torch.bmm(blocks, w.mT, out=y.transpose(0, 1))  # torch calls BLAS for each block, in place
    return y.view(n, g * b)


def weight_gradient(dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """dw[g, b, a] = sum_n dy[n, g, b] x[n, g, a]."""
    n, (g, b, a) = len(x), w.shape
    return torch.bmm(dy.view(n, g, b).permute(1, 2, 0), x.view(n, g, a).transpose(0, 1))


def shuffle(x: Tensor, g: int) -> Tensor:
    """[N, (g c)] as [N, (c g)], contiguous; x itself where that is the same."""
    n, width = x.shape
    if g in (1, width):
        return x
    if (
        not x.is_cpu or n == 1
    ):  # elsewhere PyTorch has no such operator; of one row it does not see the layout
        return x.view(n, g, width // g).mT.contiguous().view(n, width)
    channels = x.view(1, n, 1, width).permute(0, 3, 1, 2)
    return torch.native_channel_shuffle(channels, g).permute(0, 2, 3, 1).view(n, width)


def pair(x: Tensor, first: Tensor, groups: int, second: Tensor, then: int) -> tuple[Tensor, Tensor]:
    """Product, shuffle, product, shuffle: the result, and what the second product read."""
    made = product(x, first)
    between = shuffle(made, groups)
    y = product(between, second, None if between is made else made)
    return shuffle(y, then), between


def chain(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`pair` by the groups of `second`, where nobody wants what it reads.

    That is made with the rows side by side, [(r l), N]: BLAS reads the features of a group apart, and no
    shuffle is needed between the products (bench/monarch.py: 1.0 to 1.9 times as fast as with one). Of one
    row nothing is apart.
    """
    n, (g, _, a), (groups, c, r) = len(x), first.shape, second.shape
    if n == 1:
        return pair(x, first, r, second, groups)[0]
    between = torch.bmm(first, x.view(n, g, a).permute(1, 2, 0)).view(r, groups, n).permute(1, 2, 0)
    if n * c * r <= SMALL:
        y = torch.bmm(between, second.mT).transpose(0, 1).contiguous()
    else:
        y = x.new_empty(n, groups, c)
        torch.bmm(between, second.mT, out=y.transpose(0, 1))
    del between  # its memory, still in the cache, becomes the result's: up to a fifth of the whole
    return shuffle(y.view(n, groups * c), groups)


def odd(x: Tensor, **factors: tuple[Tensor | None, int]) -> Iterator[str]:
    """Why the dtypes, or the numbers of dimensions, of x and its factors are not for our kernels."""
    if x.dtype not in DTYPES:
        yield f"dtype {x.dtype} is not one of {', '.join(map(str, DTYPES))}"
    if x.ndim == 0:
        yield "x has no dimension to multiply over"
    for name, (w, ndim) in factors.items():
        if w is not None and w.dtype != x.dtype:
            yield f"dtypes differ: x is {x.dtype}, {name} {w.dtype}"
        if w is not None and w.ndim != ndim:
            yield f"{name} has {w.ndim} dimensions; the kernel takes {ndim}"


def rows(x: Tensor, width: int) -> Tensor:
    """x [..., C] as [N, width], contiguous, with zeros on the right."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x.contiguous() if x.shape[1] == width else torch.nn.functional.pad(x, (0, width - x.shape[1]))
