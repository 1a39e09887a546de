"""The configuration `spec_224` with batches of 256 images instead of 32, for GPUs.

    cnn_jax train --config=configs/fast.py --workdir=runs/fast \
        --config.data.source=folder:PATH

The batch and the initial learning rate are eight times as large (Goyal et al. 2017), after a
warm-up of one epoch; the final learning rate is unchanged. On EuroSAT at 32 x 32 pixels for
12 epochs (means of three seeds) this was as accurate as batch 32. A learning rate multiplied
by the square root of eight, or unchanged, was less accurate
(experiments/studies/ablation.py --grid=large_batch; the table is in experiments/RESULTS.md).
"""

from cnn_jax.config.schema import Config
from configs import spec_224


def get_config() -> Config:
    config = spec_224.get_config()
    config.train.batch_size = 256
    config.optimizer.learning_rate = 8e-3
    config.optimizer.warmup_epochs = 1.0
    return config
