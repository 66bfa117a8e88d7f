"""The range of activations for static quantization to int8, from as many tensors as there are.

Memory     a histogram of |x|: BINS counts, whatever is added. Its bins are powers of two wide and double
           where a larger value comes: what a bin held lies in one of the new ones, so the counts do not
           depend on the order or the parts in which values are added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxaccel.errors import OptionError

TOP = 127.0  # of int8, of both signs
LEAST = torch.finfo(torch.float32).smallest_normal  # of scales; values that are smaller count as zeros
BINS = 2048
METHODS = ("absmax", "percentile", "mse")
AT_ONCE = 2**22  # values that are binned together
TRIED, OCTAVE = 320, 32  # ranges that "mse" compares, and how many of them to a factor of two: down to 2**-10


@dataclass
class Observer:
    """What is seen of a value, and the scale that suits it: q = round(x / scale), of -127 .. 127.

    method     "absmax": reaches the largest; "percentile": reaches a share of all values, to the width of a
               bin; "mse": least mean square of x - q * scale, as if values were spread evenly in their bin
    share      of "percentile"
    bins       of the histogram, a power of two
    """

    method: str = "mse"
    share: float = 0.9999
    bins: int = BINS
    largest: float = field(default=0.0, init=False)
    count: int = field(default=0, init=False)
    zeros: int = field(default=0, init=False)
    counts: Tensor = field(init=False, repr=False)
    _exponent: int | None = field(default=None, init=False, repr=False)  # the histogram ends at 2**_exponent

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(f"the method is {self.method!r}, expected one of {', '.join(METHODS)}")
        if not 0 < self.share <= 1:
            raise OptionError(f"the share is {self.share!r}, expected a number above 0 and up to 1")
        if not isinstance(self.bins, int) or self.bins < 2 or self.bins & (self.bins - 1):
            raise OptionError(f"there are {self.bins!r} bins, expected a power of two from 2")
        self.counts = torch.zeros(self.bins, dtype=torch.int64)

    @torch.no_grad()
    def add(self, values: Tensor) -> None:
        """Takes values into account; OptionError where one is not finite."""
        for part in values.detach().flatten().split(AT_ONCE):
            sizes = part.double().abs_()
            if not bool(torch.isfinite(sizes).all()):
                raise OptionError("the values to observe hold some that are not finite, expected finite ones")
            largest = float(sizes.max()) if sizes.numel() else 0.0
            self.largest, self.count = max(self.largest, largest), self.count + sizes.numel()
            sizes = sizes[sizes >= LEAST]
            seen = sizes.numel()
            self.zeros += part.numel() - seen
            if seen and self.method != "absmax":
                self._widen(math.frexp(largest)[1])
                self._bin(sizes)

    def _widen(self, exponent: int) -> None:
        """Doubles the bins until the histogram ends at 2**exponent at least."""
        if self._exponent is None:
            self._exponent = exponent
        doublings = min(exponent - self._exponent, self.bins.bit_length() - 1)
        if doublings > 0:
            kept = self.counts.reshape(-1, 2**doublings).sum(1)
            self.counts = torch.nn.functional.pad(kept, (0, self.bins - len(kept)))
        self._exponent = max(self._exponent, exponent)

    def _bin(self, sizes: Tensor) -> None:
        assert self._exponent is not None, "what is binned has widened the histogram"
        # to 2**0 and then to bins: each is exact, and neither power is out of float64's range
        places = sizes.div_(2.0 ** (self._exponent - 1)).mul_(self.bins // 2).long()
        self.counts += places.bincount(minlength=self.bins).cpu()

    def scale(self) -> float:
        """The scale; 1 where only zeros were seen. OptionError where nothing was."""
        if not self.count:
            raise OptionError("nothing was observed, expected values", "run the model on calibration data")
        if self.largest == 0:
            return 1.0
        return max(LEAST, self.range() / TOP)

    def range(self) -> float:
        """The largest absolute value that is not clipped."""
        if self.method == "absmax" or self._exponent is None:
            return self.largest
        return self._percentile() if self.method == "percentile" else self._least()

    def _percentile(self) -> float:
        wanted = math.ceil(self.share * self.count) - self.zeros
        if wanted <= 0:
            return self.largest  # so many are zero that the share says nothing of the others
        place = int((self.counts.cumsum(0) < wanted).sum())
        return min(self.largest, (place + 1) * self._width)

    @property
    def _width(self) -> float:
        """Of a bin."""
        assert self._exponent is not None, "no bin has a width before a value is seen"
        return math.ldexp(1.0 / self.bins, self._exponent)

    def _least(self) -> float:
        tried = [self.largest * 2 ** (-i / OCTAVE) for i in range(TRIED)]
        return min(tried, key=self.square)

    def square(self, reach: float) -> float:
        """The mean of (x - q * scale)^2 where values up to `reach` are not clipped.

        In units of the scale values in a bin from a to b add the integral of (t - q(t))^2 / (b - a): with n =
        q(t) it is n / 12 + (t - n)^3 / 3 from 0, also where n stays at TOP.
        """
        if self._exponent is None:
            return 0.0
        scale = reach / TOP
        edges = torch.arange(self.bins + 1, dtype=torch.float64) * (self._width / scale)
        n = edges.round().clamp_max_(TOP)
        integral = n / 12 + (edges - n) ** 3 / 3
        each = integral.diff() / (self._width / scale)
        return float((self.counts * each).sum()) * scale**2 / self.count
