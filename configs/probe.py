"""Linear probing: trains only the head of a pretrained network, on fixed features.

    cnn_jax train --config=configs/probe.py --config.data.source=folder:PATH --workdir=runs/mine

The features are the embedding of the network, and the mean and the standard deviation of each
feature map of all stages but the first and the last. The features of each image are computed once,
without augmentation, and kept in the cache. The head is a logistic regression on these features, so
training takes little more time than one pass over the images. Weights and networks are selected as
in `finetune.py`.
"""

from cnn_jax.config.schema import Config
from configs import finetune


def get_config() -> Config:
    config = finetune.get_config()
    config.model.embedding = "stages"
    config.train.from_stage = "head"
    config.train.epochs = 0
    return config
