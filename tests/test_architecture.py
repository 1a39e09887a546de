"""Tests that a module imports only modules that are below it in docs/architecture.md."""

import ast
import pathlib
import re
import subprocess
import sys

from conftest import REPOSITORY

PACKAGE = REPOSITORY / "cnn_jax"
DOCUMENT = (REPOSITORY / "docs" / "architecture.md").read_text()


def _layers() -> list[str]:
    """Returns the modules in docs/architecture.md; each module may import only earlier modules."""
    _, _, table = DOCUMENT.partition("| layer | modules |")
    rows = table.partition("\n\n")[0].splitlines()[2:]
    layers = [re.findall(r"`([\w/]+)\.py`", row.split("|")[2]) for row in rows]
    return [name.replace("/", ".") for layer in reversed(layers) for name in layer]


LAYERS = _layers()


def _imports(path: pathlib.Path) -> set[str]:
    """Returns the modules of this package that a module imports, also inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("cnn_jax").lstrip(".") for name in modules if "cnn_jax" in name}


def _name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def test_imports_go_down():
    paths = {_name(path): path for path in PACKAGE.rglob("*.py")}
    assert sorted(paths) == sorted(LAYERS), "docs/architecture.md must have each module once"
    for name, path in paths.items():
        for imported in _imports(path):
            module = next(
                (m for m in (imported, f"{imported}.__init__".lstrip(".")) if m in paths), None
            )
            if module is not None and module != name:
                assert LAYERS.index(module) < LAYERS.index(name), f"{name} imports {module}"


def test_the_reading_order_names_existing_functions():
    table = DOCUMENT.partition("| file | read |")[2].partition("\n\n")[0]
    cells = [row.split("|")[1:3] for row in table.splitlines()[2:]]
    rows = [re.findall(r"`([^`]+)`", file + names) for file, names in cells]
    assert len(rows) > 10
    for file, *names in rows:
        path = (REPOSITORY if file.startswith("configs/") else PACKAGE) / file
        for name in names:
            pattern = rf"^(def |class )?{name}\b"
            assert re.search(pattern, path.read_text(), re.MULTILINE), f"{file} has no {name}"


def test_only_models_defines_linen_modules():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        subclasses = [
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and "nn.Module" in map(ast.unparse, node.bases)
        ]
        assert not subclasses or path.parent.name == "models"


def test_networks_use_the_batch_norm_of_this_package():
    """Training would leave the statistics of `nn.BatchNorm` near their initial values."""
    for path in (PACKAGE / "models").glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        used = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
        assert "nn.BatchNorm" not in used, f"{path.name}: use layers.BatchNorm"


def test_nothing_happens_at_import():
    """An import of the package uses no device and defines no command-line flag."""
    code = (
        "import sys; from absl import flags; before = set(flags.FLAGS)\n"
        "import cnn_jax.main, cnn_jax.evaluate, cnn_jax.predict, cnn_jax.api\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized(), 'a device was touched'\n"
        "unused = {'cv2', 'tensorflow_datasets', 'obstore', 'mlflow'} & set(sys.modules)\n"
        "assert not unused, unused\n"
        "own = [f.name for m in flags.FLAGS.flags_by_module_dict() for f in "
        "flags.FLAGS.flags_by_module_dict()[m] if 'cnn_jax' in m]\n"
        "assert not own, own\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
