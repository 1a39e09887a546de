"""A search space for the training settings of the default network; the network size is fixed.

    python -m cnn_jax.tune --config=configs/eurosat.py --config.data.source=folder:PATH \
        --study=NAME --space=experiments/spaces/recipe.py

The space is meant for aerial images, which have no upper side. It allows all flips and rotations.
"""

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution


def get_space() -> dict[str, BaseDistribution]:
    return {
        "optimizer.learning_rate": FloatDistribution(5e-4, 1e-2, log=True),
        "optimizer.final_learning_rate": FloatDistribution(1e-6, 3e-4, log=True),
        "optimizer.l2": FloatDistribution(1e-6, 1e-3, log=True),
        "train.batch_size": CategoricalDistribution([16, 32, 64]),
        "train.label_smoothing": FloatDistribution(0.0, 0.2),
        "model.dropout": FloatDistribution(0.0, 0.6),
        "augment.flip": CategoricalDistribution(["none", "horizontal", "horizontal_and_vertical"]),
        "augment.rotation": FloatDistribution(0.0, 0.5),
        "augment.zoom": FloatDistribution(0.0, 0.3),
        "augment.contrast": FloatDistribution(0.0, 0.4),
        "augment.mixup_probability": FloatDistribution(0.0, 0.5),
        "augment.cutmix_probability": FloatDistribution(0.0, 0.5),
    }
