import jax
import pytest

from cnn_jax.config import files
from cnn_jax.models.cnn import CNN
from cnn_jax.training import summary
from cnn_jax.training.sharding import Layout
from configs import default


@pytest.mark.parametrize(
    ("images", "rule", "words"),
    [
        (120, "stable", "± 9 points (more precise with data.stratify=exact or several seeds)"),
        (120, "exact", "± 9 points (more precise with several seeds)"),
        (1, "exact", "1 test image: accuracy will be known to"),
    ],
)
def test_the_plan_warns_about_a_small_test_split(images, rule, words):
    config = default.get_config()
    config.data.stratify = rule
    lines = summary._interval_width(images, config)
    assert words in " ".join(lines)


@pytest.mark.parametrize("images", [0, 2500])
def test_the_plan_does_not_warn_about_a_large_test_split(images):
    assert summary._interval_width(images, default.get_config()) == []


@pytest.mark.parametrize(
    ("options", "is_named"),
    [
        ({"batch_norm": False}, False),
        ({"batch_norm": True}, True),
        ({"batch_norm": True, "train_from": "logits"}, False),
    ],
)
def test_accumulation_asks_the_network_for_batch_norm(options, is_named):
    """The line mentions BatchNorm if it uses batches, even without the key `batch_norm`."""
    config = default.get_config()
    config.train.accumulation_steps = 4
    with config.unlocked():
        del config.model.batch_norm
    model = CNN(num_classes=3, features=(4, 8), dense=16, **options)
    line = summary._accumulation(config, model, (8, 8))
    assert "4 parts of 8 images" in line
    assert ("BatchNorm" in line) == is_named


def test_the_plan_names_the_options_of_training():
    config = default.get_config()
    assert summary._options(config) == ""
    config.update_from_flattened_dict(
        {
            "optimizer.algorithm": "sgd",
            "optimizer.schedule": "one_cycle",
            "train.ema": 0.999,
            "distill.bundles": "runs/a,runs/b",
        }
    )
    assert summary._options(config) == (
        "\nsgd with the one-cycle schedule\naveraged weights (decay 0.999)"
        "\n2 teachers with weight 0.5"
    )


@pytest.mark.parametrize(
    ("source", "images", "changes", "expected"),
    [
        ("folder:photos", 1_000, {}, True),
        ("folder:photos", 50_000, {}, False),
        ("shapes", 1_000, {}, False),
        ("folder:photos", 1_000, {"checkpoint.init_from": "runs/other"}, False),
        ("folder:photos", 1_000, {"model.name": "resnet18", "model.pretrained": "auto"}, False),
        ("folder:photos", 1_000, {"model.name": "resnet18"}, True),
    ],
)
def test_the_plan_advises_pretrained_weights_for_few_images(source, images, changes, expected):
    config = files.load("folder", {"data.source": source, **changes})
    assert summary._needs_pretraining(config, images) == expected


def test_the_plan_advises_full_groups_of_images_on_tpus(monkeypatch):
    config = default.get_config()
    config.train.batch_size = 8 * len(jax.devices())
    assert summary._batch_advice(config, jax.devices()) == ""
    monkeypatch.setattr(Layout, "batch_multiple", 1024)
    assert summary._batch_advice(config, jax.devices()) == (
        " (TPUs are the fastest with multiples of 1,024)"
    )
    config.train.accumulation_steps = 4
    assert "multiples of 4,096" in summary._batch_advice(config, jax.devices())
    config.train.batch_size = 4096
    assert summary._batch_advice(config, jax.devices()) == ""
