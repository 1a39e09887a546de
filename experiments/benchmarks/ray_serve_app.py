"""An image classification server on Ray Serve, which runs replicas on the machines of a cluster.

    pip install -e . 'ray[serve]'
    BUNDLE=RUN/bundle serve run experiments.benchmarks.ray_serve_app:app
    curl --data-binary @cat.jpg http://127.0.0.1:8000/

Ray forms the batches, starts replicas when requests increase, and restarts dead replicas.
"""

import os

from ray import serve  # pyright: ignore
from starlette.requests import Request
from starlette.responses import JSONResponse

from cnn_jax.inference.predictor import BundlePredictor, Prediction, predict_batch


@serve.deployment(
    max_ongoing_requests=64,
    max_queued_requests=256,
    autoscaling_config={"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 16},
)
class Classifier:
    """A Ray Serve replica that holds a predictor and combines requests into batches."""

    def __init__(self, bundle: str):
        self._predictor = BundlePredictor.load(bundle)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.002)
    async def classify(self, images: list[bytes]) -> list[Prediction]:
        return predict_batch(self._predictor, images)

    async def __call__(self, request: Request) -> JSONResponse:
        image = await request.body()
        found: Prediction = await self.classify(image)  # type: ignore[assignment,arg-type]
        if found.error is not None:
            return JSONResponse({"error": found.error}, 422)
        return JSONResponse({"class": found.predicted, "probability": found.confidence})


app = Classifier.bind(os.environ["BUNDLE"])  # type: ignore[attr-defined]
