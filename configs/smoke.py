"""A quick check that everything runs: the default network on 1,000 images of `shapes`.

    cnn_jax train --config=configs/smoke.py --workdir=runs/smoke

Expect half a minute on two CPU cores after its 1,000 images are generated, half of it for the
report, and an accuracy near chance, because there are only three epochs of 22 steps.
"""

from cnn_jax.config.schema import Config
from configs import default


def get_config() -> Config:
    config = default.get_config()
    config.data.source = "shapes:1000"
    config.train.epochs = 3
    return config
