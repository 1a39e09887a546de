"""A configuration for your own images: a folder with one sub-folder for each class.

    cnn_jax train --config=configs/folder.py --workdir=runs/mine \
        --config.data.source=folder:PATH

The accuracy depends on the images. For example, traffic signs (GTSRB: 26,638 images of 43
classes) reached a test accuracy of 71 % after 6 epochs, which took 11 minutes on two busy CPU
cores, with these keys: --config.augment.flip=none --config.augment.rotation=0.03, because a
mirrored or rotated sign is another sign; and --config.data.group='{class}/{track}', because
the frames of one video show the same sign. (Without the group, frames of the same sign are in
train and test, and the test accuracy is 93 %.)
"""

from cnn_jax.config.schema import Config
from configs import default


def get_config() -> Config:
    config = default.get_config()
    config.data.source = "folder:PATH"
    config.data.image_size = (64, 64)
    config.train.epochs = 45
    return config
