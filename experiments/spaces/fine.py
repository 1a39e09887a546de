"""A second look, around what a first one has found for pictures from above.

    python -m cnn_jax.tune --config=configs/eurosat.py --config.data.source=folder:PATH \
        --config.augment.flip=horizontal_and_vertical --config.augment.rotation=0.02 \
        --config.augment.zoom=0.05 --config.augment.contrast=0.02 --config.model.dropout=0.3 \
        --config.optimizer.learning_rate=0.002 --config.optimizer.final_learning_rate=1e-5 \
        --config.optimizer.l2=1e-5 --config.train.label_smoothing=0.05 \
        --study=NAME --space=experiments/spaces/fine.py

Little augmentation, for a small network that is far from learning its images by heart.
"""

from optuna.distributions import BaseDistribution, FloatDistribution


def get_space() -> dict[str, BaseDistribution]:
    return {
        "optimizer.learning_rate": FloatDistribution(1e-3, 4e-3, log=True),
        "optimizer.final_learning_rate": FloatDistribution(1e-6, 1e-4, log=True),
        "optimizer.l2": FloatDistribution(1e-6, 1e-4, log=True),
        "train.label_smoothing": FloatDistribution(0.0, 0.1),
        "model.dropout": FloatDistribution(0.1, 0.5),
        "augment.rotation": FloatDistribution(0.0, 0.06),
        "augment.zoom": FloatDistribution(0.0, 0.15),
        "augment.contrast": FloatDistribution(0.0, 0.06),
    }
