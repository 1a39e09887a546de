"""The configuration of the project's specification: 224 x 224 pixels, batch size 32, 45 epochs.

    cnn_jax train --config=configs/spec_224.py --workdir=runs/spec_224 \
        --config.data.source=folder:PATH

Use a GPU: at this size, two CPU cores train on 40 images per second
(experiments/RESULTS.md), so 7,000 images take three minutes per epoch.
"""

from cnn_jax.config.schema import Config
from configs import default


def get_config() -> Config:
    config = default.get_config()
    config.data.image_size = (224, 224)
    config.train.epochs = 45
    return config
