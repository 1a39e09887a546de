"""The results of a finished run: metrics, predictions and the bundle of the best network."""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, PyTree

from cnn_jax.config.schema import Config
from cnn_jax.data import Track
from cnn_jax.data.dataset import Dataset
from cnn_jax.data.pipeline import Loader
from cnn_jax.data.splits import Division
from cnn_jax.inference.bundle import Bundle, write_bundle
from cnn_jax.inference.calibration import fit_temperature
from cnn_jax.inference.evaluation import bundle_metrics, predict_split, score
from cnn_jax.inference.predictor import BundlePredictor, Predictor
from cnn_jax.quality.reference import Predictions
from cnn_jax.quality.reference_fit import measure_samples
from cnn_jax.quality.trust import fit_reference
from cnn_jax.training import run_directory, sharding

logger = logging.getLogger(__name__)


def write_results(
    config: Config,
    workdir: pathlib.Path,
    dataset: Dataset,
    variables: PyTree,
    track: Track,
    features: Float[np.ndarray, "examples embedding"] | None = None,
    on_metrics: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Calibrates and evaluates the trained network; writes its metrics, predictions and bundle.

    The network is evaluated on the splits of the configuration key `report.splits`.

    Args:
      config: The resolved configuration of the run.
      workdir: The run's folder.
      dataset: The data set of the run.
      variables: {"params": ..., "batch_stats": ...}, arrays on the host.
      track: Shows the progress of a loop.
      features: The embedding of each example, if it is known; the predictions are then computed
        from the embeddings, and not from the images.
      on_metrics: A function of the returned value. It is called as soon as the metrics are
        written, because the reference statistics take longer.

    Returns:
      The content of `report/metrics.json`.
    """
    source = dataset.source
    bundle = Bundle(
        model=config.model.to_dict(),
        precision=config.precision,
        class_names=source.class_names,
        preprocessing=dataset.loader.preprocessing,
        temperature=1.0,
        data={
            "source": config.data.source,
            "division": Division.from_config(config.data, config.seed).to_dict(),
            "max_unreadable": config.data.max_unreadable,
            "allow_outside": config.data.allow_outside,
            "fingerprint": dataset.fingerprint,
        },
        metrics={},
        variables=variables,
        pretrained=run_directory.read_pretrained(workdir),
    )

    loader = dataclasses.replace(dataset.loader, on_device=False)

    def predict(
        bundle: Bundle, indices: Int[np.ndarray, " n"], description: str
    ) -> Float[np.ndarray, "n classes"]:
        if features is None:
            return _predict(BundlePredictor(bundle), loader, indices, track, description)
        head = bundle.variables["params"]["head"]
        logits = features[indices] @ head["kernel"] + head["bias"]
        return np.asarray(jax.nn.softmax(logits / np.float32(bundle.temperature)))

    validation = dataset.splits["validation"]
    uncalibrated = predict(bundle, validation, "calibrating")
    temperature = fit_temperature(uncalibrated, source.labels[validation])
    bundle = dataclasses.replace(bundle, temperature=temperature)

    report = {}
    for split in config.report.splits:
        indices = dataset.splits[split]
        probabilities = predict(bundle, indices, f"measuring {split}")
        report[split] = score(probabilities, source.labels[indices], source.class_names)
        if split == "test":
            ids = [source.ids[i] for i in indices]
            run_directory.write_predictions(
                workdir, ids, source.labels[indices], probabilities, source.class_names
            )
    run_directory.write_metrics(workdir, report)
    if on_metrics is not None:
        on_metrics(report)
    reference = None
    if config.report.reference and not sharding.is_true_in_all_processes(_has_opencv()):
        if sharding.is_primary():
            logger.warning(
                "OpenCV is not installed, so the bundle has no reference statistics; `cnn_jax "
                "monitor --bundle=%s --fit_reference=FILE` computes them on a machine with OpenCV",
                workdir,
            )
    elif config.report.reference:
        samples = measure_samples(
            BundlePredictor(bundle),
            loader,
            dataset.splits,
            source.labels,
            track,
            _share_predictions,
        )
        reference = fit_reference(**samples)
    if sharding.is_primary():
        write_bundle(
            dataclasses.replace(bundle, metrics=bundle_metrics(report)),
            workdir / "bundle",
            reference,
        )
    return report


def _has_opencv() -> bool:
    """Returns whether OpenCV is installed, which the statistics and corruptions of images need."""
    try:
        import cv2  # noqa: F401
    except ImportError:
        return False
    return True


def _predict(
    predictor: Predictor,
    loader: Loader,
    indices: Int[np.ndarray, " n"],
    track: Track,
    description: str,
) -> Float[np.ndarray, "n classes"]:
    """Returns the class probabilities of images; the processes of the run share the work."""

    def predict(positions: Int[np.ndarray, " k"]) -> Float[np.ndarray, "k classes"]:
        return predict_split(predictor, loader, indices[positions], track, description)

    return sharding.share_rows(lambda positions: [predict(positions)], len(indices))[0]


def _share_predictions(predict: Callable[[np.ndarray], Predictions], count: int) -> Predictions:
    """Returns the predictions for all positions below `count`; the processes share the work."""

    def arrays(positions: np.ndarray) -> list[np.ndarray]:
        predictions = predict(positions)
        return [predictions.probabilities, predictions.embeddings, predictions.images]

    return Predictions(*sharding.share_rows(arrays, count))
