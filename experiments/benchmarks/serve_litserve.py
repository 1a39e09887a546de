"""The LitServe server of serve_peers.py, in a module that LitServe's processes can import."""

from typing import Any

import litserve  # pyright: ignore
import numpy as np
from fastapi import Request
from serve_peers import LITSERVE, TorchModel


class Api(litserve.LitAPI):
    """A LitServe API that classifies images with PyTorch or with this project's predictor."""

    def __init__(self, bundle: str, is_jax: bool, largest: int, seconds: float):
        super().__init__(max_batch_size=largest, batch_timeout=seconds)
        self._largest = largest
        self._bundle = bundle
        self._is_jax = is_jax

    def setup(self, device: str) -> None:
        if not self._is_jax:
            model = TorchModel(self._bundle)
            self._decode, self._run = model.decode, model.probabilities
            return
        from cnn_jax.inference.images import preprocess_for_inference
        from cnn_jax.inference.predictor import BundlePredictor

        predictor = BundlePredictor.load(self._bundle)
        for size in (1, 2, 4, 8):
            image = np.zeros((size, *predictor.preprocessing.image_size, 3), np.uint8)
            predictor(image)  # Each batch size is compiled before the server answers requests.
        self._decode = lambda content: preprocess_for_inference(content, predictor.preprocessing)
        self._run = predictor

    def decode_request(self, request: Request, **kwargs: Any) -> Any:
        # LitServe has already read the whole form, so this `read` does not wait.
        return self._decode(request["file"].file.read())

    def batch(self, inputs: list[Any]) -> Any:
        self._count = len(inputs)
        if self._is_jax:
            # The batch is padded to the next power of two, for which `setup` compiled a program.
            size = 1 << (len(inputs) - 1).bit_length()
            return np.stack([*inputs, *inputs[-1:] * (size - len(inputs))])
        import torch  # pyright: ignore

        return torch.stack(inputs)

    def predict(self, x: Any, **kwargs: Any) -> Any:
        if self._largest == 1:  # If the maximum batch size is 1, LitServe passes a single image.
            return self._run(x[None])[0]
        return self._run(x)[: self._count]

    def unbatch(self, output: Any) -> list[Any]:
        return list(output)

    def encode_response(self, output: Any, **kwargs: Any) -> dict[str, list[float]]:
        return {"probabilities": output.tolist()}


def serve(bundle: str, port: int, name: str) -> None:
    """Runs the server until the process is killed."""
    largest, seconds, workers = LITSERVE[name]
    api = Api(bundle, name.endswith("jax"), largest, seconds)
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=workers)
    server.run(port=port, host="127.0.0.1", generate_client_file=False, log_level="warning")
