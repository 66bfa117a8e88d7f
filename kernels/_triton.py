"""triton, or a stand-in where it is not installed: kernels are then defined but cannot be launched.

`from fxaccel.kernels._triton import tl, triton` stands in every file that holds a Triton kernel, so that
its operator, whose CPU kernel needs no triton, can be imported and registered on any machine.
"""

from collections.abc import Callable
from typing import Any


class _Absent:
    """Takes the place of both `triton` and `triton.language`."""

    def constexpr(self, value: Any) -> Any:
        """A constant of a kernel."""
        return value

    def jit(self, *function: Callable[..., Any], **options: Any) -> "_Absent":
        """Define nothing; the launch, if one comes, is what fails."""
        return self

    def __call__(self, function: Callable[..., Any]) -> "_Absent":
        """The decorator that `jit(...)` with options is."""
        return self

    def __getitem__(self, grid: object) -> Any:
        raise ModuleNotFoundError("this kernel needs triton\nhint: pip install triton")


try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # not a Linux machine, or a CPU-only installation
    triton = tl = _Absent()

__all__ = ["tl", "triton"]


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()
