"""Compares this project's augmentations with the corresponding Keras layers.

    pip install keras && KERAS_BACKEND=jax python experiments/benchmarks/compare_keras.py

This project and Keras apply the same fixed angle, zoom or contrast to the same random image.
Prints the mean difference in grey levels; exits with 1 if a difference is above 0.01.
"""

import sys

import jax
import jax.numpy as jnp
import keras  # type: ignore[import-not-found]
import numpy as np

from cnn_jax.data import augment

SIZE = (16, 20)


def _ours(image: np.ndarray, **changes: np.ndarray) -> np.ndarray:
    """Augments an image with the values in `changes`; all other augmentations have no effect."""
    draws = augment.identity_draws(1, SIZE) | changes
    return np.asarray(augment.apply_on_device(jnp.array(image), **jax.tree.map(jnp.array, draws)))


def _matrix(turns: float = 0.0, zoom: float = 0.0) -> np.ndarray:
    return augment.affine_matrix(
        mirror_x=np.array([False]),
        mirror_y=np.array([False]),
        angle=np.array([2 * np.pi * turns]),
        window=np.array([1 + zoom]),
        image_size=SIZE,
    )


def _keras(layer: keras.layers.Layer, image: np.ndarray) -> np.ndarray:
    return np.asarray(layer(image.astype(np.float32), training=True))


def main() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, *SIZE, 3), np.uint8)
    differences = {}
    for factor in (-0.2, -0.1, 0.05, 0.2):
        fill = {"fill_mode": "reflect", "interpolation": "bilinear"}
        rotated = _keras(keras.layers.RandomRotation((factor, factor), **fill), image)
        differences[f"rotation {factor:+}"] = rotated - _ours(image, matrix=_matrix(turns=factor))
        zoomed = _keras(keras.layers.RandomZoom((factor, factor), **fill), image)
        differences[f"zoom {factor:+}"] = zoomed - _ours(image, matrix=_matrix(zoom=factor))
    for seed in range(3):
        theirs = _keras(keras.layers.RandomContrast(0.2, value_range=(0, 255), seed=seed), image)
        # Keras does not return the random factor. So the factor is computed from a pixel whose
        # value is near the mean and therefore not clipped.
        mean = image.mean(axis=(1, 2))[0, 0]
        row = int(np.abs(image[0, :, 0, 0] - mean).argmin())
        factor = (theirs[0, row, 0, 0] - mean) / (image[0, row, 0, 0] - mean)
        ours = _ours(image, contrast=np.array([factor], np.float32))
        differences[f"contrast {factor:.3f}"] = theirs - ours

    print(f"keras {keras.__version__}")
    largest = 0.0
    for name, difference in differences.items():
        mean_difference = float(np.abs(difference).mean())
        print(f"{name:<16} {mean_difference:.6f}")
        largest = max(largest, mean_difference)
    sys.exit(1 if largest > 0.01 else 0)


if __name__ == "__main__":
    main()
