import pytest

from cnn_jax.training import summary
from configs import default


@pytest.mark.parametrize(
    ("images", "rule", "words"),
    [
        (120, "stable", "± 9 points (for less: data.stratify=exact, several"),
        (120, "exact", "± 9 points (for less: several values of seed)"),
        (1, "exact", "1 test image: accuracy will be known to"),
    ],
)
def test_a_small_test_split_is_told_before_training(images, rule, words):
    config = default.get_config()
    config.data.stratify = rule
    lines = summary._width_of_interval(images, config)
    assert words in " ".join(lines)


@pytest.mark.parametrize("images", [0, 2500])
def test_a_large_test_split_needs_no_line(images):
    assert summary._width_of_interval(images, default.get_config()) == []
