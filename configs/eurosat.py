"""EuroSAT RGB (27,000 satellite images of 64 x 64 pixels, 10 classes) from TFDS.

    cnn_jax train --config=configs/eurosat.py --workdir=runs/eurosat

or, from the folder of its JPEGs, with --config.data.source=folder:PATH.

Expect a test accuracy of 97.06 ± 0.34 % (three seeds, --config.data.stratify=exact;
experiments/RESULTS.md has the command). Training takes about an hour on one CPU core that other
programs use too.
"""

from cnn_jax.config.schema import Config
from configs import default


def get_config() -> Config:
    config = default.get_config()
    config.data.source = "tfds:eurosat/rgb"
    config.data.image_size = (64, 64)
    config.train.epochs = 45
    return config
