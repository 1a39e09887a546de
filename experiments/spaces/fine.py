"""A second look, around what a first one has found for pictures from above.

    python -m cnn_jax.tune --config=configs/eurosat.py --config.data.source=folder:PATH \
        --config.augment.flip=horizontal_and_vertical --config.augment.rotation=0.05 \
        --config.augment.zoom=0.1 --config.augment.contrast=0.05 --config.model.dropout=0.3 \
        --config.optimizer.learning_rate=0.002 --config.optimizer.final_learning_rate=1e-5 \
        --study=NAME --space=experiments/spaces/fine.py

Little augmentation, for a small network that is far from learning its images by heart.
"""

from optuna.distributions import BaseDistribution, FloatDistribution


def get_space() -> dict[str, BaseDistribution]:
    return {
        "optimizer.learning_rate": FloatDistribution(1e-3, 5e-3, log=True),
        "optimizer.final_learning_rate": FloatDistribution(1e-6, 1e-4, log=True),
        "optimizer.l2": FloatDistribution(1e-6, 2e-4, log=True),
        "train.label_smoothing": FloatDistribution(0.0, 0.15),
        "model.dropout": FloatDistribution(0.0, 0.6),
        "augment.rotation": FloatDistribution(0.0, 0.15),
        "augment.zoom": FloatDistribution(0.0, 0.25),
        "augment.contrast": FloatDistribution(0.0, 0.15),
        "augment.mixup_probability": FloatDistribution(0.0, 0.3),
        "augment.cutmix_probability": FloatDistribution(0.0, 0.3),
    }
