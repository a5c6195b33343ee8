"""What changes with the steps of a run as planned: the weight of the KL term and the learning rate.

Both are functions of the step, counted from 0, and of the number of steps of all planned epochs.
"""

from cohortvi.config import Model

REFERENCE_BATCH = 128  # cells of a minibatch that takes `learning_rate` as it is


def kl_weight(step: int, planned_steps: int, warmup: float) -> float:
    """Return the weight of the KL term at `step` of a run planned to take `planned_steps`.

    It climbs linearly over the first `warmup` (a share of the steps) and is exactly 1 from there on; the last planned
    step has weight 1 whatever the length of the run. (Warm-up by a fixed number of epochs, as in scvi-tools, leaves
    large cohorts with a weight far below 1 at their end, hence with an autoencoder.)
    """
    return min(1.0, (step + 1) / max(1, round(warmup * planned_steps)))


def learning_rate(step: int, planned_steps: int, model: Model) -> float:
    """Return the learning rate at `step`: in proportion to the batch size, with a linear warm-up and a linear decay.

    The more cells a minibatch has, the fewer steps an epoch and the quieter its gradient: Goyal et al. 2017, section
    2.1; the warm-up, section 2.2, keeps its first steps from leaving the region where that holds.
    """
    climbing = (step + 1) / max(1, round(model.learning_rate_warmup * planned_steps))
    falling = (planned_steps - step) / max(1, round(model.learning_rate_decay * planned_steps))
    return model.learning_rate * model.batch_size / REFERENCE_BATCH * min(1.0, climbing, falling)
