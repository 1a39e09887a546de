"""The bundle as a model of MLflow's `python_function` flavor.

MLflow loads the model with `_load_pyfunc`. The model's folder contains the bundle, and no pickle.
"""

from typing import Any

from cnn_jax.inference.exported import load_predictor
from cnn_jax.inference.predictor import TrainedPredictor, predict_batch
from cnn_jax.system.errors import DataError

COLUMN = "image"


def _load_pyfunc(path: str) -> "PyfuncModel":
    """Loads a bundle; `mlflow.pyfunc.load_model` calls this function."""
    return PyfuncModel(load_predictor(path))


class PyfuncModel:
    """A model that returns the class probabilities of encoded images."""

    def __init__(self, predictor: TrainedPredictor):
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
          DataError: An image cannot be read, or is not given as bytes.
        """
        import pandas  # pyright: ignore[reportMissingImports]

        images = list(model_input[COLUMN])
        for row, image in enumerate(images):
            # `predict_batch` opens a text as a path. A client must not choose files of the server.
            if not isinstance(image, bytes):
                kind = type(image).__name__
                raise DataError(f"row {row} must be the bytes of an image file, got {kind}")
        predictions = predict_batch(self._predictor, images)
        for row, prediction in enumerate(predictions):
            if prediction.error is not None:
                raise DataError(f"the image in row {row} {prediction.error}")
        return pandas.DataFrame(
            [prediction.probabilities.tolist() for prediction in predictions],  # type: ignore[union-attr]
            columns=self._predictor.class_names,
            dtype="float64",
        )
