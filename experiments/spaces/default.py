"""A search space for any image data set: a range around each number of the default configuration.

    python -m cnn_jax.tune --config=configs/folder.py --config.data.source=folder:PATH \
        --study=NAME --space=experiments/spaces/default.py

Each configuration key has a distribution of its values. A tuple is written as text.
"""

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)


def get_space() -> dict[str, BaseDistribution]:
    return {
        "optimizer.learning_rate": FloatDistribution(3e-4, 1e-2, log=True),
        "optimizer.final_learning_rate": FloatDistribution(1e-6, 3e-4, log=True),
        "optimizer.l2": FloatDistribution(1e-6, 1e-3, log=True),
        "train.batch_size": CategoricalDistribution([16, 32, 64, 128]),
        "train.label_smoothing": FloatDistribution(0.0, 0.2),
        "augment.rotation": FloatDistribution(0.0, 0.5),
        "augment.zoom": FloatDistribution(0.0, 0.4),
        "augment.contrast": FloatDistribution(0.0, 0.4),
        "model.features": CategoricalDistribution(
            ["(16, 32, 64)", "(32, 64, 128)", "(64, 128, 256)"]
        ),
        "model.dense": IntDistribution(64, 512, log=True),
        "model.dropout": FloatDistribution(0.0, 0.7),
    }
