"""Fine-tunes a pretrained network: first only the head, on fixed features, then all stages.

    cnn_jax train --config=configs/finetune.py --config.data.source=folder:PATH --workdir=runs/mine

The weights are downloaded from the Hugging Face hub (`pip install 'cnn_jax[hub]'`), or read
from a safetensors file: --config.model.pretrained=FILE. Another network is selected by
--config.model.name=NAME, for example resnet50. The weights determine the image size, the crop and
the normalisation. A smaller --config.data.image_size, such as 128, is faster.
"""

from cnn_jax.config.schema import Config, default_config


def get_config() -> Config:
    config = default_config("tf_efficientnet_lite0")
    config.model.pretrained = "auto"
    config.model.dropout = 0.2
    config.augment.rotation = 0.03
    config.augment.zoom = 0.2
    config.augment.contrast = 0.2
    config.optimizer.learning_rate = 1e-3
    config.optimizer.final_learning_rate = 1e-5
    config.optimizer.warmup_epochs = 0.5
    config.optimizer.stage_decay = 0.7
    config.optimizer.l2 = 0.0
    config.optimizer.weight_decay = 0.01
    config.train.probe = True
    config.train.epochs = 5
    return config
