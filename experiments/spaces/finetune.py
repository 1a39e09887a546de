"""A search space for the fine-tuning of a pretrained network.

    python -m cnn_jax.tune --config=configs/finetune.py --config.data.source=folder:PATH \
        --study=NAME --space=experiments/spaces/finetune.py

Trials with the same value of `model.embedding` start from the same probe, whose features are in
the cache.
"""

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution


def get_space() -> dict[str, BaseDistribution]:
    return {
        "optimizer.learning_rate": FloatDistribution(1e-4, 5e-3, log=True),
        "optimizer.stage_decay": FloatDistribution(0.4, 1.0),
        "optimizer.weight_decay": FloatDistribution(1e-4, 0.3, log=True),
        "train.batch_size": CategoricalDistribution([16, 32, 64]),
        "train.label_smoothing": FloatDistribution(0.0, 0.2),
        "model.embedding": CategoricalDistribution(["last", "stages"]),
        "model.dropout": FloatDistribution(0.0, 0.5),
        "augment.rotation": FloatDistribution(0.0, 0.25),
        "augment.zoom": FloatDistribution(0.0, 0.4),
        "augment.contrast": FloatDistribution(0.0, 0.4),
    }
