"""A measured number with its error, and how numbers are written, everywhere."""

import math
from typing import NamedTuple

from torch import Tensor


class Estimate(NamedTuple):
    """A mean and its error, in the units of what was averaged; NaN where there is none.

    >>> print(Estimate(2.34519, 0.0117))
    2.345 ± 0.012
    >>> f"{Estimate(2.34519, 0.0117):.1f}"
    '2.3 ± 0.0'
    """

    value: float
    error: float

    @classmethod
    def of(cls, draws: Tensor, weight: Tensor | None = None) -> "Estimate":
        """Mean and standard error of independent draws; a NaN among them makes it NaN.

        Args:
            draws: Of any shape; the error of a single one is NaN.
            weight: Of each draw, where they are weighted.
        """
        draws = draws.detach().double().flatten()
        if weight is not None:
            shares = weight.to(draws) / weight.double().sum().to(draws.device)
            mean = shares @ draws
            return cls(mean.item(), (shares * (draws - mean)).norm().item())
        error = (draws.std() / math.sqrt(len(draws))).item() if len(draws) > 1 else math.nan
        return cls(draws.mean().item(), error)

    def __str__(self) -> str:
        return number(self.value, self.error)

    def __format__(self, spec: str) -> str:
        """The format of both numbers, such as ".3f"; as `str` without one."""
        return f"{self.value:{spec}} ± {self.error:{spec}}" if spec else str(self)


def number(value: float, error: float = math.nan) -> str:
    """A number as a person reads it: three digits, or as many as its error supports.

    >>> number(0.30000000004), number(12345.6), number(0.01234, 0.0031), number(float("nan"))
    ('0.3', '12,346', '0.012 ± 0.003', '–')
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if math.isfinite(error) and error > 0 and abs(value) < 1e4 and error >= 1e-5:
        # One digit of the error, two where it starts with 1: 0.012 ± 0.003, 2.50 ± 0.14.
        exponent = math.floor(math.log10(error))
        leading = error / 10**exponent
        digits = 3 - math.floor(math.log10(max(abs(value), error)))  # of four digits in all
        places = max(0, min(5, -exponent + (leading < 1.95), digits))
        small = round(error, places) == 0
        return f"{_signed(value, places)} ± {'<' * small}{max(error, 10**-places):,.{places}f}"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-4:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits.replace('-', '−')}·10{_superscript(int(exponent))}"
    places = max(0, 2 - math.floor(math.log10(size)))
    text = _signed(value, places)
    return text.rstrip("0").rstrip(".") if "." in text and size < 100 else text


def _signed(value: float, places: int) -> str:
    text = f"{value:,.{places}f}".replace("-", "−")
    return text.lstrip("−") if not any(digit in text for digit in "123456789") else text


def _superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
