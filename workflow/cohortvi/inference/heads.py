"""The likelihoods' heads, compiled: from the decoder's logits to minus the log-likelihood of sparse counts, and back.

n cells, g genes. A head takes logits, of which softmax makes fractions, and gives minus the log-likelihood of each cell
and, in the logits' own memory, its gradient: one pass over a row that is in the cache. Gamma functions are evaluated at
non-zero counts alone (at 0 their terms cancel). With r = mu / theta and p = r / (1 + r):

    nb     log p(x) = rising(x, theta) + x log p - theta log1p r
           d / d log mu = x - (x + theta) p
           d / d log theta = theta (psi(x + theta) - psi(theta)) - x / (1 + r) + theta p - theta log1p r

Lopez et al. 2018 (Nature Methods 15:1053), equation 5, in log mu and log theta.
"""

import math

import numba
import numpy as np

from cohortvi.inference.arithmetic import (
    FEW,
    LEAST,
    MOST,
    ONE,
    ROWS,
    Array,
    Arrays,
    aligned,
    decayed,
    dot,
    exp,
    exponentials,
    f32,
    f64,
    few,
    log,
    log1p,
    log_p,
    rising,
    sum_of_logs,
    total,
)

# The digest of arithmetic.py. numba keeps compiled loops on disk until the file that they stand in changes, and notices
# no other: so this one has to change with that one (tests/test_fused.py).
ARITHMETIC = "c85d223e49bf"

# OpenMP first: it is torch's own pool of threads; a second one would wait for cores on which the first one spins.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

LOOPS = {"parallel": True, "cache": True, "nogil": True, "error_model": "numpy"}
FEWEST = 4.0  # counts up to here by vectors


# A row: logits s, and d of zero inflation; ids and counts of the non-zeros; log of the library; weight of the cell in
# the sum whose gradient is wanted; memory. Returns minus the log-likelihood and its weighted derivative by log library.


@numba.njit(**ROWS)
def _poisson_row(
    s: Array, nonzero: Arrays, log_library: float, weight: float, scratch: Array, is_trained: bool
) -> tuple[float, float]:
    """log p(x) = x log mu - mu - log x!; d / d log mu = x - mu."""
    (ids, counts), e, library = nonzero, scratch[0][: len(s)], math.exp(log_library)
    z, log_z = exponentials(s, e)
    counted, found = 0.0, -library
    for j in range(len(ids)):
        x = f64(counts[j])
        found += x * (s[ids[j]] - log_z + log_library) - math.lgamma(x + 1.0)
        counted += x
    if is_trained:
        scale = f32(weight * counted / z)
        for g in range(len(s)):
            s[g] = e[g] * scale
        for j in range(len(ids)):
            s[ids[j]] -= f32(weight * counts[j])
    return -found, -weight * (counted - library)


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
                found += rise + x[j] * log_p(s[g] - log_z + log_library - log_theta[g], inverse[j])
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
    z, log_z = exponentials(s, e)
    scale = f32(math.exp(log_library) / z)
    for g in range(n):  # as if all counts were 0
        r = e[g] * scale * inverse_theta[g]
        i = ONE / (ONE + r)
        t[g], a[g] = theta[g] * log1p(r, i), theta[g] * (r * i)
    found = _counted(s, nonzero, e, scale, (log_z, log_library), thetas, wide)
    x, value, psi, inverse = wide[0][:m], wide[2][:m], wide[3][:m], wide[4][:m]
    found += sum_of_logs(value) - f64(total(t))
    slope = dot(x, inverse) - f64(total(a))
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
    z, log_z = exponentials(s, e)
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
    found -= f64(total(own_t))
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
    found += sum_of_logs(value) + f64(total(zero))
    slope = -f64(total(a))
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
        scratch = aligned(1, logits.shape[1])
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
        scratch = (aligned(9, logits.shape[1]), np.empty((6, logits.shape[1])))
        for n in range(len(nll) * part // parts, len(nll) * (part + 1) // parts):
            row, nonzero = rows[n], (ids[indptr[n] : indptr[n + 1]], counts[indptr[n] : indptr[n + 1]])
            thetas = (theta[row], inverse[row], log_theta[row])
            given = (f64(log_library[n]), f64(weights[n]), thetas, dtheta[part, row], scratch, is_trained)
            if zi_logits is None:
                nll[n], dlibrary[n] = _nb_row(logits[n], nonzero, *given)
            else:
                nll[n], dlibrary[n] = _zinb_row((logits[n], zi_logits[n]), nonzero, *given)
