"""The sections that only the report of an ensemble has: its members and their disagreement."""

import numpy as np
from jaxtyping import Float, UInt8

from cnn_jax.inference import calibration
from cnn_jax.inference.ensemble import views
from cnn_jax.inference.evaluation import map_split
from cnn_jax.models.network import count_parameters
from cnn_jax.report.run import Ensemble
from cnn_jax.report.sections import Figures, common_facts, example

# The number of images with the largest disagreement on the page.
_NUM_DISPUTED = 12
# The test images are divided into at most this number of groups of increasing disagreement.
_NUM_GROUPS = 5


def members(ensemble: Ensemble) -> Figures:
    """Measures the members on the test images, and the disagreement of their predictions."""
    network, predictor = ensemble.need_network(), ensemble.predictor

    # The predictions for all views of a large split would not fit into memory.
    def predict(
        images: UInt8[np.ndarray, "batch height width 3"],
    ) -> Float[np.ndarray, "batch numbers"]:
        """Returns the probabilities of each member, the disagreement, and 1 for equal classes."""
        predictions = predictor.predict_members(images)
        classes = predictions.argmax(axis=2)
        # `predict_members` first returns the predictions of the members for the images themselves.
        own = predictions[: len(predictor.members)]
        return np.column_stack(
            [
                *own,
                calibration.mutual_information(predictions),
                (classes == classes[0]).all(axis=0),
            ]
        ).astype(np.float32)

    rows = map_split(predict, network.dataset.loader, network.dataset.splits["test"])
    labels, probabilities = network.labels("test"), network.probabilities["test"]
    is_right = probabilities.argmax(axis=1) == labels
    measured = []
    for number, member in enumerate(predictor.members):
        start = number * probabilities.shape[1]
        own = rows[:, start : start + probabilities.shape[1]]
        measured.append(
            {
                "name": f"members/{number}",
                "network": type(member.model).__name__,
                "parameters": count_parameters(member.model, member.preprocessing.image_size),
                "accuracy": float((own.argmax(axis=1) == labels).mean()),
                "loss": calibration.negative_log_likelihood(own, labels),
            }
        )
    pixel = np.zeros((1, 1, 1, 3), np.uint8)
    num_views = len(views(pixel, predictor.flip, predictor.shift))
    disagreement, is_unanimous = rows[:, -2], rows[:, -1] == 1
    order = np.argsort(disagreement, kind="stable")
    groups = np.array_split(order, min(_NUM_GROUPS, len(order)))
    return {
        "members": measured,
        "mean_accuracy": float(np.mean([member["accuracy"] for member in measured])),
        "accuracy": float(is_right.mean()),
        "loss": calibration.negative_log_likelihood(probabilities, labels),
        "predictions": num_views * len(predictor.members),
        "count": len(labels),
        "unanimous": int(is_unanimous.sum()),
        "unanimous_correct": int((is_unanimous & is_right).sum()),
        "disputed_correct": int((~is_unanimous & is_right).sum()),
        "groups": [
            {
                "images": len(group),
                "disagreement": float(disagreement[group].mean()),
                "accuracy": float(is_right[group].mean()),
            }
            for group in groups
        ],
        "examples": [
            {**example(network, "test", int(row)), "disagreement": float(disagreement[row])}
            for row in order[::-1][:_NUM_DISPUTED]
        ],
    }


def facts(ensemble: Ensemble) -> Figures:
    """Returns the data, the members, the views and the library versions of an ensemble."""
    predictor = ensemble.predictor
    return common_facts(ensemble) | {
        "source": predictor.data["source"],
        "members": len(predictor.members),
        "flip": predictor.flip,
        "shift": predictor.shift,
        "image_size": list(predictor.preprocessing.image_size),
    }
