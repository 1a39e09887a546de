"""The specification's network on a tenth of `shapes`: a check that all of it runs.

    cnn_jax train --config=configs/smoke.py --workdir=runs/smoke

Expect it to end within half a minute on two CPU cores once its 1,000 images are made, half
of it for the report, and an accuracy near chance: three epochs of 22 steps teach little.
"""

from cnn_jax.config.schema import Config
from configs import default


def get_config() -> Config:
    config = default.get_config()
    config.data.source = "shapes:1000"
    config.train.epochs = 3
    return config
