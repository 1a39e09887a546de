"""Tests of the page in a browser: upload, result, map, errors, versions, and external requests."""

import numpy as np
import pytest
from bundles import make_bundle
from conftest import show_at
from PIL import Image
from servers import Served

from cnn_jax.inference.bundle import write_bundle
from cnn_jax.inference.predictor import BundlePredictor, predict_batch
from cnn_jax.registry.registry import Registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A registry with two versions of a model, which make different predictions."""
    folder = tmp_path_factory.mktemp("page")
    registry = Registry(folder / "registry")
    for seed in (0, 1):
        write_bundle(make_bundle(seed=seed), folder / f"bundle-{seed}")
        registry.add("shapes", folder / f"bundle-{seed}")
    registry.promote("shapes", 1)
    return registry


@pytest.fixture(scope="module")
def server(registry, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with Served(folder, f"--registry={registry.url}", "--max_batch=2", "--poll=0.2") as server:
        yield server
        assert server.end() == 0


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "a picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def wait_for(browser, script):
    """Waits until a JavaScript expression is true, and returns its value."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 60).until(lambda _: browser.execute_script(f"return {script}"))


def text(browser, name):
    return browser.execute_script(f"return document.getElementById('{name}').textContent")


def choose(browser, path):
    browser.find_element("id", "file").send_keys(str(path))


def complaints(browser):
    """Returns the messages in the browser's log since the last call, without debug messages."""
    return [line for line in browser.get_log("browser") if line["level"] != "DEBUG"]


def open_page(browser, server, width=1000, scheme="light"):
    complaints(browser)
    show_at(browser, f"{server.url}/", width, scheme)
    wait_for(browser, "document.getElementById('about').textContent.includes('version')")


def expected_of(registry, number, image):
    version = registry.resolve("shapes", number)
    predictor = BundlePredictor.load(registry.fetch(version, image.parent))
    (prediction,) = predict_batch(predictor, [image.read_bytes()])
    best = int(prediction.probabilities.argmax())
    return predictor.class_names[best], prediction.probabilities


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1000, "light")])
def test_the_page_shows_classes_and_map(browser, server, registry, image, width, scheme):
    open_page(browser, server, width, scheme)
    choose(browser, image)
    wait_for(browser, "!document.getElementById('result').hidden")
    wait_for(browser, "document.getElementById('shown').complete")
    name, probabilities = expected_of(registry, 1, image)
    assert text(browser, "result-title") == f"{name}, {100 * probabilities.max():.1f} %"
    shares = browser.execute_script(
        "return [...document.querySelectorAll('#bars .probability')].map((one) => one.textContent)"
    )
    assert shares == [f"{100 * share:.1f} %" for share in sorted(probabilities, reverse=True)]
    widths = browser.execute_script(
        "return [...document.querySelectorAll('#bars .bar span')]"
        ".map((one) => one.offsetWidth / one.parentNode.offsetWidth)"
    )
    np.testing.assert_allclose(widths, sorted(probabilities, reverse=True), atol=0.02)
    # For screen readers, the result gets the focus, and the picture has a description.
    assert browser.execute_script("return document.activeElement.id") == "result-title"
    source, alt, is_there = browser.execute_script(
        "const shown = document.getElementById('shown');"
        "return [shown.src, shown.alt, shown.naturalWidth > 0]"
    )
    assert source.startswith("data:image/png;base64,")
    assert name in alt
    assert is_there
    shape = "const box = document.getElementById('shown').getBoundingClientRect();"
    shape += "return [box.width, box.height]"
    map_shape = browser.execute_script(shape)
    assert map_shape[0] / map_shape[1] == pytest.approx(80 / 60, rel=0.02)
    browser.find_element("id", "show-image").send_keys("\ue007")  # This is the Enter key.
    wait_for(browser, "document.getElementById('shown').complete")
    assert browser.execute_script(shape) == map_shape
    assert browser.execute_script("return document.getElementById('shown').src").startswith("blob:")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    others = [name for name in loaded if not name.startswith((server.url, "data:", "blob:"))]
    assert not others
    assert not complaints(browser)


def test_the_page_shows_and_clears_errors(browser, server, image, tmp_path):
    open_page(browser, server)
    (tmp_path / "note.png").write_text("no image")
    choose(browser, tmp_path / "note.png")
    wait_for(browser, "!document.getElementById('problem').hidden")
    assert "not an image of a known format" in text(browser, "problem")
    assert browser.execute_script("return document.getElementById('result').hidden")
    choose(browser, image)
    wait_for(browser, "!document.getElementById('result').hidden")
    assert browser.execute_script("return document.getElementById('problem').hidden")


def test_images_can_be_dropped_and_pasted(browser, server, image):
    for kind, holder in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        open_page(browser, server)
        browser.execute_script(
            "const [kind, holder, bytes] = arguments; const held = new DataTransfer();"
            "held.items.add(new File([new Uint8Array(bytes)], 'a.png', {type: 'image/png'}));"
            "const event = new Event(kind, {bubbles: true, cancelable: true});"
            "Object.defineProperty(event, holder, {value: held});"
            "document.body.dispatchEvent(event);",
            *(kind, holder, list(image.read_bytes())),
        )
        wait_for(browser, "!document.getElementById('result').hidden")


def test_the_page_follows_the_served_version(browser, server, registry, image):
    open_page(browser, server)
    registry.promote("shapes", 2)
    server.wait_for_log("version 1: no longer served")
    # The page is not reloaded before this request.
    choose(browser, image)
    wait_for(browser, "document.getElementById('took').textContent.includes('version 2')")
    wait_for(browser, "document.getElementById('about').textContent.includes('version 2')")
    name, probabilities = expected_of(registry, 2, image)
    assert text(browser, "result-title") == f"{name}, {100 * probabilities.max():.1f} %"


def test_all_controls_work_by_keyboard(browser, server, image):
    """The Tab key reaches all controls, starting from the result."""
    from selenium.webdriver import ActionChains, Keys

    open_page(browser, server)
    choose(browser, image)
    wait_for(browser, "!document.getElementById('result').hidden")
    reached = []
    # Six presses of Tab go through all controls, including the browser's own controls.
    for _ in range(6):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        reached.append(
            browser.execute_script(
                "const one = document.activeElement; return one.id || one.getAttribute('href')"
            )
        )
    reached = [one for one in reached if one]
    assert reached[:4] == ["show-image", "show-map", "docs", "file"]


def test_the_api_page_lists_all_paths(browser, server):
    complaints(browser)
    show_at(browser, f"{server.url}/docs", 360)
    shown = browser.execute_script("return document.body.textContent")
    for path in ("/predict", "/v1/models/{model}:predict", "/v2/models/{model}/infer"):
        assert path in shown
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    assert not complaints(browser)
