"""The arithmetic of compiled loops: functions of single numbers, and sums over arrays; used by heads.py.

exp and log are inlined, in single precision, to about two units in the last place: they become vector instructions.
Sums over arrays may be reassociated; elsewhere that would undo the steps that keep the digits.
"""

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

f32, f64, i32 = np.float32, np.float64, np.int32  # in compiled code `float` leaves single precision as it is
ONE, HALF, THIRD, QUARTER = f32(1), f32(1 / 2), f32(1 / 3), f32(1 / 4)
SMALL = f32(0.05)  # below, four terms of a series are exact to single precision

# Cephes' expf and logf (Moshier 1984-2000): range reduction by powers of two, then a polynomial.
LOG2_E, LN2_HIGH, LN2_LOW = f32(1.44269504088896), f32(0.693359375), f32(-2.12194440e-4)
EXP_MIN, EXP_MAX = f32(-87.3), f32(88.0)  # beyond, single precision has no normal numbers
E0, E1, E2, E3, E4, E5 = map(
    f32, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)
L0, L1, L2, L3, L4, L5, L6, L7, L8 = map(
    f32,
    (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
     2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)  # fmt: skip
SQRT_HALF_BITS, MANTISSA_BITS, BIAS = i32(0x3F3504F3), i32(23), i32(127)
SQRT_HALF_BITS_64, MANTISSA_BITS_64, LN2 = 0x3FE6A09E667F3BCD, 52, math.log(2)  # in double precision
SIGN, MAGNITUDE = i32(31), i32(0x7FFFFFFF)

FACTORS = 8  # of a product before its logarithm is taken: no factor is above 1e30
SUMMED = 1_000.0  # counts up to here by products, larger ones by lgamma
FEW = 16.0  # counts up to here as factors of the cell's product
MULTIPLIED = 1024  # factors from sqrt(1/2) to sqrt(2) of a product, which is a normal number
OVER_FACTORIAL = np.cumprod(1 / np.arange(1, FEW + 1))  # 1 / x!, from x = 1
LEAST, MOST = 1e-100, 1e100  # a number in between times any of single precision is a normal number


def _cast(source: types.Type, to: types.Type, kind: ir.Type) -> Any:
    """Return a function that takes the bits of a number for those of another type."""

    @intrinsic
    def bits(typingctx: Any, value: Any) -> tuple:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], kind)

        return to(source), generate

    return bits


_as_int = _cast(types.float32, types.int32, ir.IntType(32))
_as_float = _cast(types.int32, types.float32, ir.FloatType())
_as_int_64 = _cast(types.float64, types.int64, ir.IntType(64))
_as_float_64 = _cast(types.int64, types.float64, ir.DoubleType())


@numba.njit(inline="always")
def exp(x: float) -> float:
    """e^x in single precision; the smallest and the largest normal number beyond its range."""
    x = min(max(x, EXP_MIN), EXP_MAX)
    n = f32(math.floor(x * LOG2_E + HALF))
    r = x - n * LN2_HIGH
    r = r - n * LN2_LOW
    y = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    return (y * (r * r) + r + ONE) * _as_float((i32(n) + BIAS) << MANTISSA_BITS)


@numba.njit(inline="always")
def log(x: float) -> float:
    """log x of a positive normal number in single precision."""
    bits = _as_int(x)
    e = (bits - SQRT_HALF_BITS) >> MANTISSA_BITS
    r = _as_float(bits - (e << MANTISSA_BITS)) - ONE
    n, z = f32(e), r * r
    y = (((((((L0 * r + L1) * r + L2) * r + L3) * r + L4) * r + L5) * r + L6) * r + L7) * r + L8
    return r + (y * r * z + n * LN2_LOW - HALF * z) + n * LN2_HIGH


@numba.njit(inline="always")
def log1p(x: float, inverse: float) -> float:
    """log(1 + x) for x >= 0, given `inverse` = 1 / (1 + x): what 1 + x rounds off is put back to first order."""
    y = ONE + x
    return log(y) + (x - (y - ONE)) * inverse


@numba.njit(inline="always")
def decayed(t: float, v: float) -> float:
    """1 - e^-t for t >= 0, given v = e^-t: of a small t by its series, for 1 - v has no digits."""
    series = t * (ONE - t * (HALF - t * (THIRD * HALF - t * (QUARTER * THIRD * HALF))))
    return series if t < SMALL else ONE - v


@numba.njit(nogil=True)
def digamma(x: float) -> float:
    """The derivative of log Gamma at x > 0, in double precision: recurrence to 6, then the asymptotic series."""
    r = 0.0
    while x < 6.0:
        r -= 1.0 / x
        x += 1.0
    f = 1.0 / (x * x)
    return r + math.log(x) - 0.5 / x - f * (1 / 12 - f * (1 / 120 - f * (1 / 252 - f * (1 / 240 - f / 132))))


@numba.njit(inline="always")
def few(x: float, theta: float, p: float) -> tuple[float, float]:
    """Return G(x + theta) / (G(theta) x!) p^x and the slope of `rising`, for a whole number 0 < x <= FEW.

    Of numbers (theta + k) / (k + 1) one product, and one fraction of the sum of 1 / (theta + k), over k < x.
    """
    value, above, below = theta * p, 0.0, 1.0
    for k in range(1, int(x)):
        above = above * (theta + k) + below
        below *= theta + k
        value *= p
    return value * below * OVER_FACTORIAL[int(x) - 1], 1.0 + theta * above / below


@numba.njit(nogil=True)
def rising(x: float, theta: float, log_theta: float) -> tuple[float, float]:
    """Return log G(x + theta) - log G(theta) - log x! and theta times the digammas' difference, in double precision.

    For a whole number x > 0 the first is the sum of log((theta + k) / (k + 1)), the second that of theta / (theta + k),
    over k < x: no digit is lost however large theta is.
    """
    if x > SUMMED:
        value = math.lgamma(x + theta) - math.lgamma(theta) - math.lgamma(x + 1.0)
        return value, theta * (digamma(x + theta) - digamma(theta))
    value, slope, product, factors = log_theta, 1.0, 1.0, 0
    for k in range(1, int(x)):
        product *= (theta + k) / (k + 1.0)
        slope += theta / (theta + k)
        factors += 1
        if factors == FACTORS:
            value, product, factors = value + math.log(product), 1.0, 0
    return value + math.log(product), slope


SUMS = {"fastmath": {"reassoc", "contract", "nsz", "nnan", "ninf"}, "nogil": True, "error_model": "numpy"}
ROWS = {"fastmath": {"contract", "nsz"}, "nogil": True, "error_model": "numpy"}

LINE = 16  # float32 in 64 bytes

Array = np.ndarray
Arrays = tuple[np.ndarray, ...]


@numba.njit(nogil=True)
def aligned(rows: int, columns: int) -> Array:
    """Return uninitialised memory (rows, columns) whose rows begin at multiples of 64 bytes: a vector is one load."""
    stride = -(-columns // LINE) * LINE
    memory = np.empty(rows * stride + LINE, np.float32)
    start = (-memory.ctypes.data % (4 * LINE)) // 4
    return memory[start : start + rows * stride].reshape(rows, stride)


@numba.njit(**SUMS)
def total(values: Array) -> float:
    """Return the sum of numbers in single precision."""
    found = f32(0)
    for g in range(len(values)):  # over the values themselves it would be no vector loop
        found += values[g]
    return found


@numba.njit(**SUMS)
def dot(a: Array, b: Array) -> float:
    """Return the sum of products of numbers in double precision."""
    found = 0.0
    for j in range(len(a)):
        found += a[j] * b[j]
    return found


@numba.njit(**SUMS)
def sum_of_logs(values: Array) -> float:
    """Return the sum of the logarithms of positive normal numbers: of their exponents, and of one product's."""
    found = 0.0
    for start in range(0, len(values), MULTIPLIED):
        exponents, product = 0, 1.0
        for j in range(start, min(start + MULTIPLIED, len(values))):
            bits = _as_int_64(f64(values[j]))
            exponent = (bits - SQRT_HALF_BITS_64) >> MANTISSA_BITS_64
            exponents += exponent
            product *= _as_float_64(bits - (exponent << MANTISSA_BITS_64))
        found += exponents * LN2 + math.log(product)
    return found


@numba.njit(inline="always")
def _ordered(bits: int) -> int:
    """Return integers in the order of the numbers that these are the bits of; twice, the bits again."""
    return bits ^ ((bits >> SIGN) & MAGNITUDE)


@numba.njit(**ROWS)
def _max(values: Array) -> float:
    """Return the largest number, by integers: of floats the loop takes one at a time, since one might be NaN."""
    largest = _ordered(_as_int(values[0]))
    for g in range(len(values)):
        largest = max(largest, _ordered(_as_int(values[g])))
    return _as_float(_ordered(largest))


@numba.njit(**ROWS)
def exponentials(s: Array, e: Array) -> tuple[float, float]:
    """Write e^(s - max s) into `e`; return its sum, and the logarithm of the sum of e^s."""
    m = _max(s)
    for g in range(len(s)):
        e[g] = exp(s[g] - m)
    z = f64(total(e))
    return z, m + math.log(z)


@numba.njit(**ROWS)
def log_p(log_r: float, inverse: float) -> float:
    """log(r / (1 + r)) in double precision, given log r and 1 / (1 + r): of large r, log r has no digits of it left."""
    return math.log1p(-inverse) if inverse < HALF else log_r + math.log(inverse)
