"""The specification to the letter: 224 x 224 pixels, batch 32, 45 epochs.

    cnn_jax train --config=configs/spec_224.py --workdir=runs/spec_224 \
        --config.data.source=folder:PATH

Meant for a GPU: the training step alone takes two CPU cores 40 images a second at this
size (experiments/RESULTS.md), which is three minutes an epoch for each 7,000 images.
"""

from cnn_jax.config.schema import Config
from configs import default


def get_config() -> Config:
    config = default.get_config()
    config.data.image_size = (224, 224)
    config.train.epochs = 45
    return config
