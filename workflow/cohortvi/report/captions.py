"""The words under figures and over tables: what one sees and how it was computed."""

SAMPLES = (
    "The cells that came in and those that passed quality control, the medians of detected genes and of UMI counts "
    "over the cells that passed, the verdict of the gate, and what the sheet says of each sample. A quarantined "
    "sample takes part in nothing that follows."
)
LEDGER = (
    "Cells in are those kept plus those removed, each by the first reason that applied; every later stage holds "
    "exactly the cells kept. low, high: fixed thresholds; (MAD): thresholds by median absolute deviations from the "
    "sample's median."
)
QUALITY = (
    "All cells that came in, a row for each of {n}. {rows} Vertical red strokes: the tighter one of the fixed "
    "threshold and that by median absolute deviations. Doublet scores exist for cells that pass the other "
    "thresholds; their stroke is scrublet's threshold, where it found one. The axes leave out the outermost {tail:g} "
    "% of the cells on each side, and thresholds far from all cells."
)
RIDGES = (
    "Blue: cells within the thresholds of their sample; red: cells outside. Each ridge is a histogram, smoothed over "
    "half a percent of the metric's range, and has its own height. Names in red: quarantined samples."
)
RANKS = (
    "Rows are ranked by their median (dot): thick from the 25th to the 75th percentile of the cells, thin from the "
    "5th to the 95th. Red rows: quarantined samples."
)
GENES = (
    "A point a gene, blue if it is one of the {n} selected ({how}); both axes are logarithmic.{trend} Dashed: "
    "variance = mean, which Poisson counts would have.{left_out}"
)
TREND = " Line: the trend fitted by loess; genes rank by how far they rise above it."
LEFT_OUT = " The {shown} batches with most cells; {n:,} more are not shown."
COMPARISON = (
    "Held-out ELBO: nats per cell over the validation cells; higher is better, and models of the same counts can be "
    "compared by it, but for those mapped onto a reference, whose ELBO is that of the cells with something new to it, "
    "if there are any. Clusters, silhouette and agreement: {shown}. Batch mixing: entropy of the batches among a "
    "cell's neighbours over their entropy in the cohort; 1 says that neighbourhoods mirror the cohort, 0 that they "
    "never cross batches."
)
MODEL = (
    "What training came to, then the settings under their names in the config. Of a model mapped onto a reference, the "
    "held-out ELBO is that of cells of batches and categories that are new to it (of all, if none are); before: with "
    "each of these at the mean of the known ones. Cells of fewer counts have a higher ELBO whatever the model: compare "
    "that of the reference's own cells where depths are alike."
)
UNTRAINED = "Nothing was trained: the model is its reference, with new batches and categories at the mean of the known."
TRAINING = (
    "ELBO = E[log p(x | z)] − KL(q(z | x) ‖ p(z)); here its negative and the two terms it is made of, means over "
    "cells, with KL weight 1 in the sum. Validation cells are never trained on and are seen without dropout. Grey "
    "ground: warm-up of the KL weight. Training {end}; dashed: epoch {best}, whose weights have the best held-out "
    "ELBO and were kept.{first}"
)
FIRST_EPOCH = " The axes span all epochs but the first."
GAPS = (
    "Over {held} held-out and {trained} training cells, with the decoder fixed; best: the diagonal or full-covariance "
    "Gaussian of largest ELBO for each cell alone; log p(x): by importance sampling. Amortization gap: what the shared "
    "encoder costs against the best of its own kind, diagonal, or full if it is full or a flow. Approximation gap: "
    "what a Gaussian costs against the true posterior. Inference gap: both (Cremer, Li, Duvenaud 2018). Sample size: "
    "the effective one of gap.draws draws."
)
GAP_FIGURE = (
    "First: importance-weighted bounds (Burda et al. 2016), which rise to log p(x) with the number of draws, by the "
    "encoder's posterior and by the refined one as proposal. Second: training cells filled, held-out cells as a line; "
    "a line further right says that the encoder is fitted to the training cells. Third: KL to N(0, I), "
    "whatever the prior; {active} dimensions vary over the cells, others are not used."
)
LIMITS = (
    "Of gap.limits. k-hat: Pareto shape of the largest importance weights of the refined proposal (Vehtari et al.). "
    "Excess gap: the mean, less three standard errors, of a sample, batch or kept value; see the groups below."
)

GAP_GROUPS = (
    "Held-out cells by sample, batch and kept columns, at least 5 each. Excess: the amortization gap beyond that of "
    "training cells with as many counts. A group of large excess is one that the encoder has hardly seen: refine it, "
    "or train again with it."
)
LABELS = (
    "The {cells} held-out cells whose {column} is known, which the model was not told of: {accuracy} have the label "
    "that it finds likeliest, to which it gives {confidence} on average; expected calibration error {error} (Guo et "
    "al. 2017, 15 bins). A point a bin, its area by its cells; on the line, probabilities are frequencies. Cells of a "
    "sample without any label may be further from what was trained on than these."
)
LABEL_TABLE = (
    "Held-out cells that have each label, those to which the model gives it, and those of which both are true."
)
NO_LABELS = "No held-out cell has a known {column}: how far the predicted labels can be trusted cannot be told."
CHECKS = (
    "Counts drawn anew for the held-out cells from what the model says of each, 20 times, beside those observed; of up "
    "to 5 batches, those furthest off. Within: between the 5th and the 95th percentile of the simulations."
)
CALIBRATION = (
    "Latent values were drawn from the prior, cells simulated from them, and each value ranked among 99 draws of the "
    "cell's posterior; a line a dimension. A true posterior gives even ranks (grey: 95 % of the noise); a hump in the "
    "middle, one that is too wide, a dip, too narrow. Of central 50 % intervals {half} hold the value, of 90 % "
    "intervals {most}."
)
MAPS = (
    "{which}, laid out by UMAP of the neighbour graph in the latent space and drawn in random order. The axes have "
    "no unit; distances between groups mean little. Numbers stand at the median of their cluster's "
    "cells.{repeated}{same}"
)
REPEATED = " Colours repeat after 20 categories."
SAME = " Not drawn, being the same in all cells: {names}."
RESOLUTIONS = (
    "Leiden clusters of the neighbour graph; {shown} is the one shown on this page. Silhouette: mean width in the "
    "latent space over a seeded sample of the cells, from −1 to 1. ARI and NMI: agreement with labels over the cells "
    "that bear one; 1 is identity."
)
COMPOSITION = "The clusters' shares in each sample."
COMPOSITION_BOTH = (
    "First the clusters' shares in each sample; then each cluster by {column}, as if every {column} had as many "
    "cells, so that a cluster found everywhere alike is parted evenly."
)
COUNTS = "The ground is as dark as the cluster's share of the sample's cells is large."
MANY_COUNTS = (
    "The counts of {n:,} samples are too many for a table; they follow from cells.parquet and clusters.parquet."
)
DOTS = (
    "The first {n_markers} genes of each cluster by Welch's t, each gene once, under the cluster that it marks "
    "first. Area of a dot: share of the cluster's cells that express the gene. Colour: mean of log1p counts per "
    "10,000, from 0 to {top}."
)
NO_MARKERS = "No gene is higher in one cluster than in the rest."
MARKERS = (
    "By Welch's t on log1p counts per 10,000 of the selected genes, each cluster against the rest. Expressing: share "
    "of the cluster's cells with a count. Clusters were found in the same counts, so the p-values, adjusted after "
    "Benjamini and Hochberg, rank genes and prove nothing."
)
RECOVERED = "Doublets: over the cells that were scored. Dying cells: in samples that were not quarantined."
TYPES = "ARI and NMI over the cells that are no simulated doublets; 1 is identity."
EFFECT = (
    "A point a selected gene: its log fold change from batch {first} to batch {last}, as simulated, and as the model "
    "decodes it when the same latent points are decoded in both batches. Both are centred over the genes; dashed: "
    "identity."
)
DIGESTS = "Equal digests say equal content; every random draw descends from the seed."
VERSIONS = "Of the packages that wrote this page, and of those that trained each model."
RESOURCES = (
    "As Snakemake measured them the last time each job ran: wall time over all jobs and of the longest, peak "
    "resident memory of the largest, processor time over wall time (100 % is one core). It is the one table that "
    "differs between two equal runs."
)

CHANGES = (
    "The {n} likeliest changes of each comparison. P(change): that the fold change between a cell of the group and "
    "one of the reference is above 2^{delta:g}, over cells and draws from their posteriors; sd: of that fold "
    "change. Changed: the largest set of genes whose expected share of false ones is at most {fdr:g}. Of "
    "pseudobulk, replicates, adjusted p: the same groups compared by sums over each {replicate}, a paired t-test "
    "where replicates have both groups, Benjamini-Hochberg over genes. The model speaks of cells and pseudobulk of "
    "replicates: trust a gene that has both."
)

LIKELIHOOD = (
    "In nats per cell, of all cells, training and held-out ones: by {draws} importance samples of each, with the "
    "encoder's posterior as proposal (Burda et al. 2016). s.e.: of the mean, over cells. Monte Carlo error: root mean "
    "square of that of single cells. Sample size: the mean effective one; where it is but a few draws, log p(x) is "
    "underestimated."
)

NO_CHANGES = "No comparison has enough cells of both groups."
