import pytest

from cnn_jax.training import summary
from configs import default


@pytest.mark.parametrize(
    ("images", "rule", "words"),
    [
        (120, "stable", "± 9 points (more precise: data.stratify=exact, several"),
        (120, "exact", "± 9 points (more precise: several values of seed)"),
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
