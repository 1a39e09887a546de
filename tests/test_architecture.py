"""Imports go down the floors that docs/architecture.md shows, and nothing happens at import."""

import ast
import pathlib
import subprocess
import sys

from conftest import REPOSITORY

PACKAGE = REPOSITORY / "cnn_jax"
# From the ground. A module may import those of lower floors, and of its own
# floor those that stand before it.
FLOORS = [
    *("commands", "__init__", "errors", "preprocessing", "data.__init__"),
    *(
        "loss",
        "metrics",
        "calibration",
        "optimizer",
        "models.layers",
        "models.cnn",
        "models.__init__",
        "data.augment",
        "data.mix",
        "data.corruptions",
    ),
    "step",
    *(
        "data.decode",
        "data.cache",
        "data.source",
        "data.layout",
        "data.files",
        "data.tfds",
        "data.shapes",
    ),
    *("data.sources", "data.scan", "data.splits", "data.findings", "data.pipeline"),
    *("data.dataset", "data.survey"),
    *("config_files", "configuration"),
    *(
        "runtime",
        "compiled",
        "sharding",
        "checkpoint",
        "bundle",
        "cli",
        "console",
        "interruption",
        "run_directory",
    ),
    *("profiling", "initial_weights", "programs"),
    *("report.__init__", "report.style", "report.thumbnails", "report.inspection"),
    *("cache", "inspect", "predict", "evaluate", "robustness"),
    *("registry.__init__", "registry.store", "registry.ledger", "registry.registry"),
    *("registry.mlflow", "registry.__main__"),
    *("explain.__init__", "explain.maps", "explain.checks", "explain.features"),
    "explain.overlay",
    *("explain.pictures", "explain.__main__"),
    *("serve.__init__", "serve.engine", "serve.limits", "serve.tokens", "serve.images"),
    *("serve.measures", "serve.versions", "serve.request_log", "serve.service", "serve.loader"),
    *("serve.admin", "serve.open_inference", "serve.page", "serve.plain", "serve.tf_serving"),
    *("serve.app", "serve.http", "serve.logs", "serve.server", "serve.__main__"),
    *("report.label_errors", "report.charts", "report.run", "report.words", "report.verdicts"),
    *("report.sections", "report.explanations", "report.qualities"),
    *("report.study_values", "report.study_charts", "report.parallel", "report.study"),
    *("report.run_report", "report.__main__"),
    *("summary", "results", "loop"),
    *("tune.__init__", "tune.space", "tune.search", "tune.storage", "tune.study"),
    *("tune.outcome", "tune.__main__"),
    *("main", "api", "__main__"),
]


def _imports(path: pathlib.Path) -> set[str]:
    """The modules of this package that a module imports, anywhere in it."""
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
    assert set(paths) == set(FLOORS), "a new module needs a floor"
    for name, path in paths.items():
        for imported in _imports(path):
            module = next(
                (m for m in (imported, f"{imported}.__init__".lstrip(".")) if m in paths), None
            )
            if module is not None and module != name:
                assert FLOORS.index(module) < FLOORS.index(name), f"{name} imports {module}"


def test_linen_is_used_under_models_alone_to_build_networks():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        subclasses = [
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and "nn.Module" in map(ast.unparse, node.bases)
        ]
        assert not subclasses or path.parent.name == "models"


def test_nothing_happens_at_import():
    """No device is touched and no flag is defined."""
    code = (
        "import sys; from absl import flags; before = set(flags.FLAGS)\n"
        "import cnn_jax.main, cnn_jax.evaluate, cnn_jax.predict\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized(), 'a device was touched'\n"
        "assert 'cv2' not in sys.modules and 'tensorflow_datasets' not in sys.modules\n"
        "own = [f.name for m in flags.FLAGS.flags_by_module_dict() for f in "
        "flags.FLAGS.flags_by_module_dict()[m] if 'cnn_jax' in m]\n"
        "assert not own, own\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_the_architecture_document_names_every_module():
    document = (REPOSITORY / "docs" / "architecture.md").read_text()
    for path in PACKAGE.rglob("*.py"):
        if path.name != "__init__.py":
            assert path.name in document, f"docs/architecture.md does not show {path.name}"
