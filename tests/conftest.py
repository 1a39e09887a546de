"""Setup of all tests: types are checked at run time, and the CPU appears as eight devices.

JAX_PLATFORMS=cuda,cpu runs the tests on a GPU. Tests that need several devices are then skipped
(`require_devices`). JAX_NUM_CPU_DEVICES=1 skips the same tests on the CPU.
"""

import os
import pathlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

# These variables must be set before JAX starts. Commands started by the tests inherit the path of
# the compilation cache.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path.home() / ".cache" / "cnn_jax" / "xla")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# pytest-xdist and readline set COLUMNS, the width of the terminal. Commands that the tests start
# would break their lines at this width, so COLUMNS is deleted. COLUMNS is set first, because `del`
# fails if `os.environ` does not contain COLUMNS, as after readline has set it.
os.environ["COLUMNS"] = ""
del os.environ["COLUMNS"]
if os.environ["JAX_PLATFORMS"] != "cpu":
    # By default, GPUs multiply float32 numbers as TF32. A mantissa of 10 bits is too inexact for
    # the tolerances of the tests.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook
from ml_collections import ConfigDict
from PIL import Image

REPOSITORY = pathlib.Path(__file__).parent.parent
# The tests import `configs` from the repository, because `configs` is not installed.
sys.path.insert(0, str(REPOSITORY))

# With this import hook, jaxtyping checks the shapes and dtypes in all signatures of the package.
install_import_hook("cnn_jax", "typechecker.check")

if os.environ["JAX_PLATFORMS"] == "cpu" and "JAX_NUM_CPU_DEVICES" not in os.environ:
    # This setting does not affect commands that the tests start: a command has one device.
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def free_port():
    """Returns a TCP port of this machine that no program uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def write_images(folder: pathlib.Path, per_class: int, seed: int = 0, side: int = 20) -> None:
    """Writes images of three classes that a small network can distinguish by colour."""
    rng = np.random.default_rng(seed)
    for channel, name in enumerate(("blue", "green", "red")):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            height, width = side + int(rng.integers(5)), side + int(rng.integers(5))
            pixels = rng.integers(0, 120, (height, width, 3), np.uint8)
            pixels[..., 2 - channel] += 100
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.png")


def require_devices(count: int) -> None:
    """Skips a test if JAX has fewer than `count` devices."""
    if jax.device_count() < count:
        pytest.skip(f"needs {count} devices, and there are {jax.device_count()}")


def require_cpu() -> None:
    """Skips a test that only applies to a CPU."""
    if jax.default_backend() != "cpu":
        pytest.skip(f"is about the CPU, and JAX computes on {jax.default_backend()}")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """The cache folder of the test session."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["CNN_JAX_CACHE"] = str(folder)
    yield folder
    del os.environ["CNN_JAX_CACHE"]


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with 3 classes of 20 images of about 20 x 20 pixels, in files `class/NNN.png`."""
    folder = tmp_path_factory.mktemp("data") / "images"
    write_images(folder, per_class=20)
    return folder


def make_tiny_config(images: str | os.PathLike[str], **changes: object) -> ConfigDict:
    """Returns the configuration of a run that takes about a second: 3 epochs of a small network.

    Args:
      images: A folder of images.
      **changes: Other values of keys, by the full name of the key.
    """
    from configs import default

    config = default.get_config()
    config.update_from_flattened_dict(
        {
            "data.source": f"folder:{images}",
            "data.image_size": (16, 16),
            "data.stratify": "exact",
            "model.features": (4, 8),
            "model.dense": 16,
            "train.batch_size": 8,
            "train.epochs": 3,
            **changes,
        }
    )
    return config


@pytest.fixture
def tiny_config(image_folder: pathlib.Path) -> ConfigDict:
    """The configuration of `make_tiny_config` for `image_folder`."""
    return make_tiny_config(image_folder)


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium browser."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("there is no chromium with chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver)
    browser = webdriver.Chrome(options=options, service=service)
    yield browser
    browser.quit()


def show_at(browser, url: str, width: int, scheme: str = "light") -> None:
    """Opens a page in a window of `width` pixels, in the colour scheme "light" or "dark".

    A window of less than 500 pixels simulates a phone.
    """
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        # With this setting, the page scrolls without animation.
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(url)


def imported_modules(*names: str) -> set[str]:
    """Imports modules in a new process; returns the names of all modules that are then loaded."""
    code = f"import sys, {', '.join(names)}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


# Modules that prediction and serving must not import, because these imports take seconds.
TRAINING_MODULES = {
    *("tensorflow_datasets", "tensorflow", "optax", "orbax", "grain", "cv2", "matplotlib"),
    *("torch", "tensorboardX", "tensorstore", "imagehash", "ml_collections"),
    *("cnn_jax.training.loop", "cnn_jax.training.step", "cnn_jax.training.optimizer"),
    "cnn_jax.data.pipeline",
}
