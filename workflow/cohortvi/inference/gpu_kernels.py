"""Kernels for GPUs, in Triton: compact counts made dense, and the likelihoods' heads with their gradients.

n cells, g genes. All arithmetic is in single precision, whatever type the logits have. With r = mu / theta and
p = r / (1 + r), as in heads.py:

    nb     log p(x) = rising(x, theta) + x log p - theta log1p r
           d / d log mu = x (1 - p) - theta p
           d / d log theta = theta (psi(x + theta) - psi(theta)) - x (1 - p) + theta p - theta log1p r

Imported where there is a GPU, or with TRITON_INTERPRET=1 in the environment, which runs it on CPUs for tests.
"""

import triton
import triton.language as tl

POISSON, ZINB = tl.constexpr(0), tl.constexpr(2)  # kinds of heads, by number of heads; NB is 1
HALF_LOG_2PI = tl.constexpr(0.9189385332046727)
SHIFT = tl.constexpr(4)  # by so much gamma functions are moved to where few terms of their series are exact
LARGEST = tl.constexpr(1e30)  # of mu / theta: single precision goes to 3e38
SERIES = tl.constexpr(0.05)  # below, four terms of a series are exact to single precision


@triton.jit
def densify_kernel(indptr, ids, data, counts_ng, log1p_ng, library_n, n_genes, BLOCK: tl.constexpr):
    """Write a cell's counts (g,), their log1p, and their sum; one cell a program."""
    n, lanes = tl.program_id(0), tl.arange(0, BLOCK)
    counts, log1p = counts_ng + n.to(tl.int64) * n_genes, log1p_ng + n.to(tl.int64) * n_genes
    for start in range(0, n_genes, BLOCK):
        g = start + lanes
        tl.store(counts + g, tl.zeros([BLOCK], counts.dtype.element_ty), mask=g < n_genes)
        tl.store(log1p + g, tl.zeros([BLOCK], log1p.dtype.element_ty), mask=g < n_genes)
    tl.debug_barrier()  # zeros before values
    total, begin, end = tl.zeros([BLOCK], tl.float32), tl.load(indptr + n), tl.load(indptr + n + 1)
    for start in range(begin, end, BLOCK):
        at = start + lanes
        inside = at < end
        g = tl.load(ids + at, mask=inside, other=0).to(tl.int32)
        count = tl.load(data + at, mask=inside, other=0)
        x = count.to(tl.float32)
        total += x
        tl.store(counts + g, count, mask=inside)
        tl.store(log1p + g, tl.log(1.0 + x).to(log1p.dtype.element_ty), mask=inside)
    tl.store(library_n + n, tl.sum(total, 0))


@triton.jit
def _log1p(x):
    """log(1 + x), x > -1: what 1 + x rounds off is put back to first order."""
    y = 1.0 + x
    return tl.log(y) + (x - (y - 1.0)) / y


@triton.jit
def _decayed(t):
    """1 - e^-t for t >= 0: of a small t by its series, for 1 - e^-t has no digits."""
    series = t * (1.0 - t * (1 / 2 - t * (1 / 6 - t * (1 / 24))))
    return tl.where(t < SERIES, series, 1.0 - tl.exp(-t))


@triton.jit
def _stirling(a):
    """log G(a) - (a - 1/2) log a + a - 1/2 log 2 pi, for a >= 4."""
    inverse = 1.0 / a
    square = inverse * inverse
    return inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square * (1 / 1680))))


@triton.jit
def _psi(a):
    """The digamma of a >= 4, but for log a - 1 / (2 a)."""
    square = 1.0 / (a * a)
    return -square * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square * (1 / 240))))


@triton.jit
def _rising(x, theta):
    """log G(x + theta) - log G(theta) - log x! and theta (psi(x + theta) - psi(theta)), for x > 0.

    G(x + theta) is taken beside the larger of G(x + 1) and G(theta), so that no digits cancel at any theta:
    log G(B) - log G(A) = (B - 1/2) log(1 + d/A) + d (log A - 1) + s(B) - s(A), with d = B - A and Stirling's series s.
    """
    is_large = theta >= x + 1.0
    large, small = tl.where(is_large, theta, x + 1.0), tl.where(is_large, x + 1.0, theta)
    d = tl.where(is_large, x, theta - 1.0)
    a, b, c = large + SHIFT, (large + SHIFT) + d, small + SHIFT
    log_a, log_c, log_ab = tl.log(a), tl.log(c), _log1p(d / a)
    product, slope = tl.full(x.shape, 1.0, tl.float32), tl.zeros(x.shape, tl.float32)
    for k in tl.static_range(SHIFT):
        of_sum = x + theta + k
        product *= (large + k) / of_sum * (small + k)
        slope += x / ((theta + k) * of_sum)
    above = (b - 0.5) * log_ab + d * (log_a - 1.0) + (_stirling(b) - _stirling(a))
    below = (c - 0.5) * log_c - c + HALF_LOG_2PI + _stirling(c)
    shifted = theta + SHIFT
    log_ratio = tl.where(is_large, log_ab, log_ab + (log_a - log_c))  # of x + theta to theta, both shifted
    slope += log_ratio + x / (2.0 * shifted * b) + (_psi(b) - _psi(shifted))
    return above - below + tl.log(product), theta * slope


@triton.jit
def _log_factorial(x):
    """log x!."""
    a = x + (1.0 + SHIFT)
    shifts = ((x + 1.0) * (x + 2.0)) * ((x + 3.0) * (x + 4.0))
    return (a - 0.5) * tl.log(a) - a + HALF_LOG_2PI + _stirling(a) - tl.log(shifts)


@triton.jit
def _zero(e, scale, theta, zi_logits, KIND: tl.constexpr):
    """Return 1 / (1 + r), theta p, theta log1p r, and the probability that a zero is one of the NB's."""
    r = tl.minimum(e * scale / theta, LARGEST)
    inverse = 1.0 / (1.0 + r)
    t = theta * _log1p(r)
    c = tl.full(r.shape, 1.0, tl.float32)
    if KIND == ZINB:
        c = 1.0 / (1.0 + tl.exp(t + zi_logits))
    return inverse, theta * (r * inverse), t, c


@triton.jit
def _poisson_terms(log_mu, mu, x):
    """Return log p(x), and its derivative by log mu."""
    value = tl.where(x > 0, x * log_mu - _log_factorial(tl.maximum(x, 1.0)), 0.0)
    return value - mu, x - mu


@triton.jit
def _nb_terms(log_mu, e, scale, x, log_theta, zi_logits, KIND: tl.constexpr):
    """Return log p(x), and its derivatives by log mu and by log theta."""
    theta, is_count, d = tl.exp(log_theta), x > 0, zi_logits
    inverse, tp, t, c = _zero(e, scale, theta, d, KIND)
    c = tl.where(is_count, 1.0, c)
    value, psi = _rising(tl.maximum(x, 1.0), theta)
    # Of large r the difference of logarithms has no digits left.
    log_p = tl.where(inverse < 0.5, _log1p(-tl.minimum(inverse, 0.5)), log_mu - log_theta - t / theta)
    found = tl.where(is_count, value + x * log_p, 0.0) - t
    if KIND == ZINB:
        above, high, low = tl.maximum(d, 0.0), tl.maximum(d, -t), tl.minimum(d, -t)
        zero = high - above + _log1p(tl.exp(low - high))
        found = tl.where(is_count, found - above, zero) - _log1p(tl.exp(-tl.abs(d)))
    return found, x * inverse - c * tp, tl.where(is_count, psi - x * inverse, 0.0) + c * (tp - t)


@triton.jit
def _nb_gradients(e, scale, x, log_theta, zi_logits, KIND: tl.constexpr):
    """Return the derivatives of -log p(x) by log mu and by the logit of zero inflation."""
    d = zi_logits
    inverse, tp, t, c = _zero(e, scale, tl.exp(log_theta), d, KIND)
    inflated = 1.0 / (1.0 + tl.exp(-t - d)) / (1.0 + tl.exp(d)) * _decayed(t)
    return tl.where(x > 0, tp - x * inverse, c * tp), tl.where(x > 0, 1.0 / (1.0 + tl.exp(-d)), -inflated)


@triton.jit
def _normaliser(logits, n_genes, BLOCK: tl.constexpr):
    """Return the largest of a cell's logits, and the sum of e^(logit - it)."""
    m, z, lanes = -float("inf"), 0.0, tl.arange(0, BLOCK)
    for start in range(0, n_genes, BLOCK):
        s = tl.load(logits + start + lanes, mask=start + lanes < n_genes, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(m, tl.max(s, 0))
        z = z * tl.exp(m - higher) + tl.sum(tl.exp(s - higher), 0)
        m = higher
    return m, z


@triton.jit
def _given(logits, zi_logits, counts, theta_g, g, inside, KIND: tl.constexpr):
    """Return some genes' logits, those of zero inflation, counts, and log theta: 0 where a head has none."""
    s = tl.load(logits + g, mask=inside, other=-float("inf")).to(tl.float32)
    x = tl.load(counts + g, mask=inside, other=0).to(tl.float32)
    d, log_theta = tl.zeros(s.shape, tl.float32), tl.zeros(s.shape, tl.float32)
    if KIND != POISSON:
        log_theta = tl.load(theta_g + g, mask=inside, other=0.0)
    if KIND == ZINB:
        d = tl.load(zi_logits + g, mask=inside, other=0.0).to(tl.float32)
    return s, d, x, log_theta


@triton.jit
def head_kernel(
    logits_ng, zi_logits_ng, counts_ng, log_library_n, weight_n, log_theta_rg,  # given
    order_n, first_p, end_p, row_p,  # which cells a program has, if they are sorted by their row of log_theta
    nll_n, dlibrary_n, dtheta_pg,  # found
    n_obs, n_genes,
    KIND: tl.constexpr, CELLS: tl.constexpr, BLOCK: tl.constexpr, IS_SORTED: tl.constexpr, IS_TRAINED: tl.constexpr,
):  # fmt: skip
    """Write minus the log-likelihood of some cells; with IS_TRAINED the gradients of its weighted sum as well.

    Logits are overwritten by their gradients, those of zero inflation too. A program goes through its cells one after
    the other, three times over the genes of each: for the normaliser of the softmax, for the likelihood, for the
    gradient. Its part of the gradient by log_theta, zeros before, is its own: sums do not depend on who comes first.
    """
    program, lanes = tl.program_id(0), tl.arange(0, BLOCK)
    first, end, row = program * CELLS, tl.minimum(program * CELLS + CELLS, n_obs), 0
    if IS_SORTED:
        first, end, row = tl.load(first_p + program), tl.load(end_p + program), tl.load(row_p + program)
    theta_g, dtheta_g = log_theta_rg + row * n_genes, dtheta_pg + program.to(tl.int64) * n_genes
    for at in range(first, end):
        n = at
        if IS_SORTED:
            n = tl.load(order_n + at)
        offset = tl.cast(n, tl.int64) * n_genes
        logits, zi_logits, counts = logits_ng + offset, zi_logits_ng + offset, counts_ng + offset
        log_library, w = tl.load(log_library_n + n), tl.load(weight_n + n)
        m, z = _normaliser(logits, n_genes, BLOCK)
        shift, scale = log_library - m - tl.log(z), tl.exp(log_library) / z

        found, slope = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for start in range(0, n_genes, BLOCK):
            g = start + lanes
            s, d, x, log_theta = _given(logits, zi_logits, counts, theta_g, g, g < n_genes, KIND)
            e = tl.exp(s - m)
            if KIND == POISSON:
                value, dlog_mu = _poisson_terms(s + shift, e * scale, x)
            else:
                value, dlog_mu, dlog_theta = _nb_terms(s + shift, e, scale, x, log_theta, d, KIND)
                if IS_TRAINED:
                    before = tl.load(dtheta_g + g, mask=g < n_genes, other=0.0)
                    tl.store(dtheta_g + g, before - w * dlog_theta, mask=g < n_genes)
            found += value
            slope += dlog_mu
        slope_n = tl.sum(slope, 0)
        tl.store(nll_n + n, -tl.sum(found, 0))
        tl.store(dlibrary_n + n, -w * slope_n)

        if IS_TRAINED:
            for start in range(0, n_genes, BLOCK):
                g = start + lanes
                s, d, x, log_theta = _given(logits, zi_logits, counts, theta_g, g, g < n_genes, KIND)
                e = tl.exp(s - m)
                if KIND == POISSON:
                    dlog_mu = e * scale - x
                else:
                    dlog_mu, dzi = _nb_gradients(e, scale, x, log_theta, d, KIND)
                    if KIND == ZINB:
                        tl.store(zi_logits + g, (w * dzi).to(zi_logits.dtype.element_ty), mask=g < n_genes)
                ds = w * (dlog_mu + e * (slope_n / z))
                tl.store(logits + g, ds.to(logits.dtype.element_ty), mask=g < n_genes)
            tl.debug_barrier()  # the next cell adds to the same gradient by log_theta
