"""The servers of other libraries that `bench_serve.py` compares with this project's server.

    python experiments/benchmarks/serve_peers.py NAME --bundle=BUNDLE --port=PORT

All servers run the same network. A request is a multipart form with one file; the answer is
JSON with all probabilities. Each server follows the documentation of its library:

    fastapi      FastAPI and PyTorch: one image a call, on FastAPI's threads
    litserve     LitServe and PyTorch, batches of up to 8, waits up to 5 ms for a batch
    litserve_1   without batches, which is the default of LitServe
    litserve_2   without batches, with two workers
    litserve_32  batches of up to 32, waits up to 10 ms for a batch
    litserve_jax as `litserve`, with this project's predictor
"""

import argparse
import io
from typing import Any

import numpy as np
import peers
from PIL import Image

from cnn_jax.inference.bundle import read_bundle

# Each LitServe server has a maximum batch size, a number of seconds that it waits for a batch, and
# a number of workers.
LITSERVE = {
    "litserve": (8, 0.005, 1),
    "litserve_1": (1, 0.0, 1),
    "litserve_2": (1, 0.0, 2),
    "litserve_32": (32, 0.01, 1),
    "litserve_jax": (8, 0.005, 1),
}


class TorchModel:
    """The bundle's network in PyTorch, in inference mode."""

    def __init__(self, path: str):
        import flax.traverse_util
        import torch  # pyright: ignore

        bundle = read_bundle(path)
        weights = flax.traverse_util.flatten_dict(bundle.variables, sep="/")
        self.size = bundle.preprocessing.image_size
        self.temperature = bundle.temperature
        self.network = peers.torch_network(peers.DROPOUT)
        peers.load_into_torch(self.network, {k: np.asarray(v) for k, v in weights.items()})
        self.network.eval().to(memory_format=torch.channels_last)

    def decode(self, content: bytes) -> Any:
        """Decodes an image to float32 [3, height, width], as torchvision's ToTensor does."""
        import torch  # pyright: ignore

        image = Image.open(io.BytesIO(content)).convert("RGB")
        height, width = self.size
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return (pixels.float() - peers.GREY) / peers.GREY

    def probabilities(self, images: Any) -> np.ndarray:
        import torch  # pyright: ignore

        with torch.inference_mode():
            images = images.contiguous(memory_format=torch.channels_last)
            return torch.softmax(self.network(images) / self.temperature, 1).numpy()


def _fastapi(bundle: str, port: int) -> None:
    import uvicorn
    from fastapi import FastAPI, UploadFile

    model = TorchModel(bundle)
    app = FastAPI()

    @app.post("/predict")
    def predict(file: UploadFile) -> dict[str, list[float]]:
        image = model.decode(file.file.read())
        return {"probabilities": model.probabilities(image[None])[0].tolist()}

    uvicorn.run(app, port=port, log_level="warning", access_log=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=("fastapi", *LITSERVE))
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--port", type=int, required=True)
    flags = parser.parse_args()
    if flags.name == "fastapi":
        _fastapi(flags.bundle, flags.port)
    else:
        import serve_litserve  # The FastAPI server must work without LitServe.

        serve_litserve.serve(flags.bundle, flags.port, flags.name)


if __name__ == "__main__":
    main()
