"""The likelihoods' heads, compiled: from the decoder's logits to minus the log-likelihood of sparse counts, and back.

n cells, g genes. A head takes logits, of which softmax makes fractions, and gives minus the log-likelihood of each cell
and, in the logits' own memory, its gradient: one pass over a row that is in the cache. Gamma functions are evaluated at
non-zero counts alone (at 0 their terms cancel). With r = mu / theta and p = r / (1 + r):

    nb     log p(x) = rising(x, theta) + x log p - theta log1p r
           d / d log mu = x - (x + theta) p
           d / d log theta = theta (psi(x + theta) - psi(theta)) - x / (1 + r) + theta p - theta log1p r

Lopez et al. 2018 (Nature Methods 15:1053), equation 5, in log mu and log theta. exp and log are inlined arithmetic,
which becomes vector instructions, to about two units in the last place. Sums over genes may be reassociated; elsewhere
that would undo the steps that keep the digits. All loops stand in this file, since numba does not notice that those of
others have changed.
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
FEWEST = 4.0  # counts up to here by vectors
MULTIPLIED = 1024  # factors from sqrt(1/2) to sqrt(2) of a product, which is a normal number
OVER_FACTORIAL = np.cumprod(1 / np.arange(1, FEW + 1))  # 1 / x!, from x = 1
LEAST, MOST = 1e-100, 1e100  # a product of two factors in between is a normal number


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


# OpenMP first: it is torch's own pool of threads; a second one would wait for cores on which the first one spins.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

SUMS = {"fastmath": {"reassoc", "contract", "nsz", "nnan", "ninf"}, "nogil": True, "error_model": "numpy"}
ROWS = {"fastmath": {"contract", "nsz"}, "nogil": True, "error_model": "numpy"}
LOOPS = {"parallel": True, "cache": True, "nogil": True, "error_model": "numpy"}

LINE = 16  # float32 in 64 bytes

Array = np.ndarray
Arrays = tuple[np.ndarray, ...]


@numba.njit(nogil=True)
def _aligned(rows: int, columns: int) -> Array:
    """Return uninitialised memory (rows, columns) whose rows begin at multiples of 64 bytes: a vector is one load."""
    stride = -(-columns // LINE) * LINE
    memory = np.empty(rows * stride + LINE, np.float32)
    start = (-memory.ctypes.data % (4 * LINE)) // 4
    return memory[start : start + rows * stride].reshape(rows, stride)


@numba.njit(**SUMS)
def _sum(values: Array) -> float:
    total = f32(0)
    for g in range(len(values)):  # over the values themselves it would be no vector loop
        total += values[g]
    return total


@numba.njit(**SUMS)
def _dot(a: Array, b: Array) -> float:
    total = 0.0
    for j in range(len(a)):
        total += a[j] * b[j]
    return total


@numba.njit(**SUMS)
def _sum_of_logs(values: Array) -> float:
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
def _exponentials(s: Array, e: Array) -> tuple[float, float]:
    """Write e^(s - max s) into `e`; return its sum, and the logarithm of the sum of e^s."""
    m = _max(s)
    for g in range(len(s)):
        e[g] = exp(s[g] - m)
    z = f64(_sum(e))
    return z, m + math.log(z)


@numba.njit(**ROWS)
def _log_p(log_r: float, inverse: float) -> float:
    """log(r / (1 + r)) in double precision, given log r and 1 / (1 + r): of large r, log r has no digits of it left."""
    return math.log1p(-inverse) if inverse < HALF else log_r + math.log(inverse)


# A row: logits s, and d of zero inflation; ids and counts of the non-zeros; log of the library; weight of the cell in
# the sum whose gradient is wanted; memory. Returns minus the log-likelihood and its weighted derivative by log library.


@numba.njit(**ROWS)
def _poisson_row(
    s: Array, nonzero: Arrays, log_library: float, weight: float, scratch: Array, is_trained: bool
) -> tuple[float, float]:
    """log p(x) = x log mu - mu - log x!; d / d log mu = x - mu."""
    (ids, counts), e, library = nonzero, scratch[0][: len(s)], math.exp(log_library)
    z, log_z = _exponentials(s, e)
    total, found = 0.0, -library
    for j in range(len(ids)):
        x = f64(counts[j])
        found += x * (s[ids[j]] - log_z + log_library) - math.lgamma(x + 1.0)
        total += x
    if is_trained:
        scale = f32(weight * total / z)
        for g in range(len(s)):
            s[g] = e[g] * scale
        for j in range(len(ids)):
            s[ids[j]] -= f32(weight * counts[j])
    return -found, -weight * (total - library)


@numba.njit(**ROWS)
def _fewest(x: Array, theta: Array, r: Array, found: Arrays) -> None:
    """Write `few` of counts up to FEWEST and 1 / (1 + r), p being r / (1 + r), in vector instructions.

    What it writes for larger counts is of no use.
    """
    value, psi, inverse = found
    for j in range(len(x)):
        a, y, above, below = theta[j], 1.0 + r[j], 0.0, 1.0
        numerator, denominator = a * r[j], y
        second, third, fourth = (a + 1.0) * r[j] * (1 / 2), (a + 2.0) * r[j] * (1 / 3), (a + 3.0) * r[j] * (1 / 4)
        if x[j] > 1.0:
            numerator, denominator, above, below = numerator * second, denominator * y, 1.0, a + 1.0
        if x[j] > 2.0:
            numerator, denominator = numerator * third, denominator * y
            above, below = above * (a + 2.0) + below, below * (a + 2.0)
        if x[j] > 3.0:
            numerator, denominator = numerator * fourth, denominator * y
            above, below = above * (a + 3.0) + below, below * (a + 3.0)
        both = 1.0 / (denominator * below)  # one division for two
        value[j], psi[j] = numerator * below * both, 1.0 + a * above * (denominator * both)
        inverse[j] = 1.0 / y


@numba.njit(**ROWS)
def _counted(
    s: Array, nonzero: Arrays, e: Array, scale: float, logs: tuple[float, float], thetas: Arrays, wide: Array
) -> float:
    """Write x, theta, value, psi and 1 / (1 + r) of the non-zero counts into `wide`.

    The sum of log(value) and of what is returned is that of `rising` + x log p; psi is `rising`'s slope.
    """
    (ids, counts), (theta, inverse_theta, log_theta), (log_z, log_library) = nonzero, thetas, logs
    m, found = len(ids), 0.0
    x, a, value, psi, inverse, r = wide[0][:m], wide[1][:m], wide[2][:m], wide[3][:m], wide[4][:m], wide[5][:m]
    for j in range(m):
        g = ids[j]
        x[j], a[j], r[j] = f64(counts[j]), f64(theta[g]), f64(e[g] * scale * inverse_theta[g])
    _fewest(x, a, r, (value, psi, inverse))
    for j in range(m):
        if x[j] > FEWEST or not LEAST < value[j] < MOST:
            value[j], psi[j] = few(x[j], a[j], r[j] * inverse[j]) if x[j] <= FEW else (0.0, 0.0)
            if not LEAST < value[j] < MOST:
                g = ids[j]
                rise, psi[j] = rising(x[j], a[j], f64(log_theta[g]))
                found += rise + x[j] * _log_p(s[g] - log_z + log_library - log_theta[g], inverse[j])
                value[j] = 1.0
    return found


@numba.njit(**ROWS)
def _nb_row(
    s: Array,
    nonzero: Arrays,
    log_library: float,
    weight: float,
    thetas: Arrays,
    dtheta: Array,
    scratch: Arrays,
    is_trained: bool,
) -> tuple[float, float]:
    """`thetas`: theta, 1 / theta and log theta; to `dtheta` the gradient by log theta is added."""
    ids, (theta, inverse_theta, _), (narrow, wide) = nonzero[0], thetas, scratch
    n, m = len(s), len(ids)
    e, a, t = narrow[0][:n], narrow[1][:n], narrow[2][:n]
    z, log_z = _exponentials(s, e)
    scale = f32(math.exp(log_library) / z)
    for g in range(n):  # as if all counts were 0
        r = e[g] * scale * inverse_theta[g]
        i = ONE / (ONE + r)
        t[g], a[g] = theta[g] * log1p(r, i), theta[g] * (r * i)
    found = _counted(s, nonzero, e, scale, (log_z, log_library), thetas, wide)
    x, value, psi, inverse = wide[0][:m], wide[2][:m], wide[3][:m], wide[4][:m]
    found += _sum_of_logs(value) - f64(_sum(t))
    slope = _dot(x, inverse) - f64(_sum(a))
    if is_trained:
        w, q = f32(weight), f32(slope / z)
        for g in range(n):
            dtheta[g] -= w * (a[g] - t[g])
            s[g] = w * (a[g] + e[g] * q)
        for j in range(m):
            dtheta[ids[j]] -= f32(weight * (psi[j] - x[j] * inverse[j]))
            s[ids[j]] -= f32(weight * x[j] * inverse[j])
    return -found, -weight * slope


@numba.njit(**ROWS)
def _zinb_row(
    s: Arrays,
    nonzero: Arrays,
    log_library: float,
    weight: float,
    thetas: Arrays,
    dtheta: Array,
    scratch: Arrays,
    is_trained: bool,
) -> tuple[float, float]:
    """log(pi [x = 0] + (1 - pi) NB(x)), logit of pi d.

    With u = e^-|d| and v = NB(0), a zero has log((u + v) / (1 + u)) for d <= 0 and log((1 + u v) / (1 + u)) above.
    """
    (s, d), ids, (theta, inverse_theta, _), (narrow, wide) = s, nonzero[0], thetas, scratch
    n, m = len(s), len(ids)
    e, a, t, p = narrow[0][:n], narrow[1][:n], narrow[2][:n], narrow[3][:n]
    c, zero, zi = narrow[4][:n], narrow[5][:n], narrow[6][:n]
    z, log_z = _exponentials(s, e)
    scale = f32(math.exp(log_library) / z)
    for g in range(n):
        r = e[g] * scale * inverse_theta[g]
        i = ONE / (ONE + r)
        t[g], p[g] = theta[g] * log1p(r, i), theta[g] * (r * i)
    for g in range(n):  # as if all counts were 0
        v, u = exp(-t[g]), exp(-abs(d[g]))
        inflated, counted = (u, v) if d[g] <= 0 else (ONE, u * v)
        both, alone = ONE / (inflated + counted), ONE / (ONE + u)
        c[g] = counted * both  # the probability that the zero is one of the NB's
        a[g], zero[g], zi[g] = c[g] * p[g], alone * (inflated + counted), -u * alone * both * decayed(t[g], v)
    found = _counted(s, nonzero, e, scale, (log_z, log_library), thetas, wide)
    x, value, psi, inverse = wide[0][:m], wide[2][:m], wide[3][:m], wide[4][:m]
    pi, own_t = narrow[7][:m], narrow[8][:m]
    for j in range(m):
        pi[j], own_t[j] = d[ids[j]], t[ids[j]]
    found -= f64(_sum(own_t))
    for j in range(m):
        u = exp(-abs(pi[j]))
        alone = ONE / (ONE + u)
        rest = alone if pi[j] <= 0 else u * alone  # 1 - pi, with all its digits
        pi[j] = u * alone if pi[j] <= 0 else alone
        value[j] *= f64(rest)
    for j in range(m):
        g = ids[j]
        a[g], c[g], zero[g], zi[g] = p[g] - f32(x[j] * inverse[j]), ONE, ONE, pi[j]
    for g in range(n):
        zero[g] = log(zero[g])
    found += _sum_of_logs(value) + f64(_sum(zero))
    slope = -f64(_sum(a))
    if is_trained:
        w, q = f32(weight), f32(slope / z)
        for g in range(n):
            s[g], d[g] = w * (a[g] + e[g] * q), w * zi[g]
            dtheta[g] -= w * c[g] * (p[g] - t[g])
        for j in range(m):
            dtheta[ids[j]] -= f32(weight * (psi[j] - x[j] * inverse[j]))
    return -found, -weight * slope


@numba.njit(**LOOPS)
def poisson_head(logits: Array, csr: Arrays, cells: Arrays, out: Arrays, parts: int, is_trained: bool) -> None:
    """As `nb_head`, without dispersions; cells are dealt to so many parts."""
    (indptr, ids, counts), (log_library, weights), (nll, dlibrary) = csr, cells, out
    for part in numba.prange(parts):
        scratch = _aligned(1, logits.shape[1])
        for n in range(len(nll) * part // parts, len(nll) * (part + 1) // parts):
            nonzero = (ids[indptr[n] : indptr[n + 1]], counts[indptr[n] : indptr[n + 1]])
            given = (f64(log_library[n]), f64(weights[n]), scratch, is_trained)
            nll[n], dlibrary[n] = _poisson_row(logits[n], nonzero, *given)


@numba.njit(**LOOPS)
def nb_head(
    logits: Array,
    zi_logits: Array | None,
    csr: Arrays,
    cells: Arrays,
    out: Arrays,
    dispersion: Arrays,
    is_trained: bool,
) -> None:
    """Write minus the log-likelihood of each cell; with `is_trained`, the gradients of its weighted sum as well.

    logits (n, g): overwritten, by their gradient if `is_trained`, and so are zi_logits, of a ZINB (None: an NB).
    csr: indptr (n + 1,), ids, counts. cells: log of the library and weight, (n,). out: minus the log-likelihood and the
    gradient by log library, (n,). dispersion: log_theta (r, g); rows (n,), which of its rows a cell has; dtheta
    (t, r, g), zeros, to whose parts cells are dealt: the gradient by log_theta is their sum.
    """
    (indptr, ids, counts), (log_library, weights), (nll, dlibrary) = csr, cells, out
    log_theta, rows, dtheta = dispersion
    theta, parts = np.exp(log_theta), len(dtheta)
    inverse = ONE / theta
    for part in numba.prange(parts):
        scratch = (_aligned(9, logits.shape[1]), np.empty((6, logits.shape[1])))
        for n in range(len(nll) * part // parts, len(nll) * (part + 1) // parts):
            row, nonzero = rows[n], (ids[indptr[n] : indptr[n + 1]], counts[indptr[n] : indptr[n + 1]])
            thetas = (theta[row], inverse[row], log_theta[row])
            given = (f64(log_library[n]), f64(weights[n]), thetas, dtheta[part, row], scratch, is_trained)
            if zi_logits is None:
                nll[n], dlibrary[n] = _nb_row(logits[n], nonzero, *given)
            else:
                nll[n], dlibrary[n] = _zinb_row((logits[n], zi_logits[n]), nonzero, *given)
