"""The bundle as a model of MLflow's `python_function` flavor.

MLflow loads the model with `_load_pyfunc`. The model's folder contains the bundle, and no pickle.
"""

from typing import Any

from cnn_jax.inference.predictor import BundlePredictor, predict_batch
from cnn_jax.system.errors import DataError

COLUMN = "image"


def _load_pyfunc(path: str) -> "PyfuncModel":
    """Loads a bundle; `mlflow.pyfunc.load_model` calls this function."""
    return PyfuncModel(BundlePredictor.load(path))


class PyfuncModel:
    """A model that returns the class probabilities of encoded images."""

    def __init__(self, predictor: BundlePredictor):
        self._predictor = predictor

    def predict(self, model_input: Any, params: Any = None) -> Any:
        """Predicts the class probabilities of images.

        Args:
          model_input: A pandas.DataFrame with the column "image": the bytes of an image file in
            each row.
          params: Ignored.

        Returns:
          A pandas.DataFrame with one column for each class: probabilities, 0 to 1.

        Raises:
          DataError: An image cannot be read.
        """
        import pandas  # pyright: ignore[reportMissingImports]

        predictions = predict_batch(self._predictor, list(model_input[COLUMN]))
        for row, prediction in enumerate(predictions):
            if prediction.error is not None:
                raise DataError(f"the image in row {row} {prediction.error}")
        return pandas.DataFrame(
            [prediction.probabilities.tolist() for prediction in predictions],  # type: ignore[union-attr]
            columns=self._predictor.class_names,
            dtype="float64",
        )
