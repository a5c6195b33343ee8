"""What stands between the large matrices of a step, compiled: hidden layers after their products, the posterior's draw.

n cells, h units, k latent dimensions, o rows of covariates' weights. By one thread: two, of which each takes half of
the units, disturb each other's caches for longer than they save. Batch norm's sums are in double precision: a minibatch
may be large.
"""

import math

import numba
import numpy as np

LOOPS = {"cache": True, "nogil": True, "error_model": "numpy"}
ZERO, f32 = np.float32(0), np.float32

Array = np.ndarray
Arrays = tuple[Array, ...]
Dropout = tuple[Array, int, float]


@numba.njit(**LOOPS)
def hidden(
    h: Array, told: Arrays, norm: Arrays, momentum_eps: tuple[float, float], dropout: Dropout, out: Arrays
) -> None:
    """Write what a layer gives, (n, h), and 1 / standard deviation, (h,), to out; h becomes the normalised units.

    told: rows (r, n) of a weight (o, h) that are added to a cell. norm: gain and shift; running mean and variance,
    which move, and the number of minibatches. dropout: bits (n, h), the least with which a unit is kept, and what it is
    multiplied by then; no bits, no dropout. Errors: IndexError for a row that is not there. Batch norm: Ioffe, Szegedy
    2015, algorithm 1; its gradient, below: section 3.
    """
    (rows, weight), (gain, shift, running_mean, running_var, n_batches), (momentum, eps) = told, norm, momentum_eps
    (result, inverse), (n_obs, n_hidden) = out, h.shape
    total, square, mean = np.zeros(n_hidden), np.zeros(n_hidden), np.empty(n_hidden, f32)
    for n in range(n_obs):
        cell = h[n]
        for r in range(len(rows)):
            if not 0 <= rows[r, n] < len(weight):
                raise IndexError("the code of a batch or category is beyond the numbers that the model was made for")
            added = weight[rows[r, n]]
            for j in range(n_hidden):
                cell[j] += added[j]
        for j in range(n_hidden):
            total[j] += cell[j]
    mean[:] = total / n_obs
    for n in range(n_obs):
        cell = h[n]
        for j in range(n_hidden):
            cell[j] -= mean[j]
            square[j] += cell[j] * cell[j]
    n_batches[()] += 1
    for j in range(n_hidden):
        running_mean[j] += momentum * (mean[j] - running_mean[j])
        running_var[j] += momentum * (square[j] / (n_obs - 1) - running_var[j])
        inverse[j] = 1 / math.sqrt(square[j] / n_obs + eps)
    for n in range(n_obs):
        cell, row = h[n], result[n]
        for j in range(n_hidden):
            cell[j] *= inverse[j]
            y = gain[j] * cell[j] + shift[j]
            row[j] = ZERO if y <= ZERO else y  # what is not a number stays so
    _drop(result, dropout)


@numba.njit(**LOOPS)
def _drop(h: Array, dropout: Dropout) -> None:
    bits, least, kept = dropout
    for n in range(len(bits)):
        row, drawn = h[n], bits[n]
        for j in range(len(row)):
            row[j] = row[j] * f32(kept) if drawn[j] >= least else ZERO


@numba.njit(**LOOPS)
def hidden_backward(upstream: Array, saved: Arrays, kept: float, rows: Array, out: Arrays) -> None:
    """Write the gradients by the product (n, h), gain and shift (h,), and weight (o, h) to out.

    saved: what `hidden` gave, the normalised units, 1 / their standard deviation, and gain. The product's bias has no
    gradient: the mean takes it out.
    """
    (result, units, inverse, gain), (dproduct, dgain, dshift, dweight) = saved, out
    n_obs, n_hidden = units.shape
    of_gain, of_shift = np.zeros(n_hidden), np.zeros(n_hidden)
    for n in range(n_obs):
        up, y, x, d = upstream[n], result[n], units[n], dproduct[n]
        for j in range(n_hidden):
            d[j] = up[j] * f32(kept) if y[j] > ZERO else ZERO
            of_shift[j] += d[j]
            of_gain[j] += d[j] * x[j]
    dgain[:], dshift[:] = of_gain, of_shift
    scale, mean, slope = gain * inverse, (of_shift / n_obs).astype(f32), (of_gain / n_obs).astype(f32)
    dweight[:] = ZERO
    for n in range(n_obs):
        x, d = units[n], dproduct[n]
        for j in range(n_hidden):
            d[j] = scale[j] * (d[j] - mean[j] - x[j] * slope[j])
        for r in range(len(rows)):
            row = dweight[rows[r, n]]
            for j in range(n_hidden):
                row[j] += d[j]


@numba.njit(**LOOPS)
def draw(q: Arrays, noise: Array, z: Array, kl: Array) -> None:
    """Write z = loc + scale noise, (n, k), and KL(q || N(0, I)) in nats, (n,); q: loc, scale, log of the variance.

    Kingma, Welling 2014, section 2.4 and appendix B.
    """
    loc, scale, log_variance = q
    for n in range(len(z)):
        found = 0.0
        for k in range(z.shape[1]):
            a, s = loc[n, k], scale[n, k]
            z[n, k] = a + s * noise[n, k]
            found += a * a + s * s - 1.0 - log_variance[n, k]
        kl[n] = 0.5 * found


@numba.njit(**LOOPS)
def draw_backward(dz: Array, kl_weight: float, q: Arrays, noise: Array, out: Arrays) -> None:
    """Write the gradients by loc and by log of `above`, (n, k), which is what the variance is above its least.

    Of dz (n, k) and kl_weight times the sum of KL. q: loc, scale, above.
    """
    (loc, scale, above), (dloc, dlog), w = q, out, f32(kl_weight)
    for n in range(len(dz)):
        for k in range(dz.shape[1]):
            s = scale[n, k]
            dloc[n, k] = dz[n, k] + w * loc[n, k]
            dlog[n, k] = (dz[n, k] * noise[n, k] + w * (s - 1 / s)) * above[n, k] / (2 * s)
