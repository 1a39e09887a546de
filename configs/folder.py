"""Your own images: a folder with one sub-folder for each class.

    python -m cnn_jax.main --config=configs/folder.py --workdir=runs/mine \
        --config.data.source=folder:PATH

EXPECT
"""

from cnn_jax.configuration import Config
from configs import default


def get_config() -> Config:
    config = default.get_config()
    config.data.source = "folder:PATH"
    config.data.image_size = (64, 64)
    config.train.epochs = 45
    return config
