"""Checks each explanation method (saliency maps) on the test images of a bundle's data set.

    python experiments/studies/judge_explanations.py --bundle=RUN/bundle [--images=512]
        [--methods=all]

Prints a row for each method: the largest rank correlation with the maps of shuffled networks;
the areas of deletion and insertion and the hits of the pointing game (only for `shapes`, which
has masks), each with the values of a random map and of the image's centre; and the verdict.
The exit code is 1 if Grad-CAM fails the randomization or the pointing game.
"""

import argparse
import sys
from typing import Any

import numpy as np

from cnn_jax.data import shapes
from cnn_jax.explain import checks
from cnn_jax.explain.pictures import choose_methods
from cnn_jax.inference.evaluation import open_as_trained
from cnn_jax.inference.predictor import BundlePredictor, predict_pixels
from cnn_jax.quality.robustness import load_images, stratified_sample
from cnn_jax.system import runtime
from cnn_jax.system.compilation_cache import keep_compiled


def row(name: str, verdict: dict[str, Any]) -> str:
    """Returns a row of a Markdown table with the check results of one explanation method."""
    cells = [name, f"{max(verdict['randomization']['rank_correlation'].values()):.2f}"]
    for check in ("deletion", "insertion", "pointing_game"):
        if check in verdict:
            found = verdict[check]
            cells.append(f"{found['mean']:.3f} ({found['random']:.3f}, {found['centre']:.3f})")
        else:
            cells.append("")
    return f"| {' | '.join([*cells, checks.describe(verdict)])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Check methods of explanation.")
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--methods", default="all")
    flags = parser.parse_args()
    runtime.keep_freed_memory()
    keep_compiled()
    predictor = BundlePredictor.load(flags.bundle)
    dataset = open_as_trained(predictor)
    source, positions = dataset.source, dataset.splits["test"]
    chosen = positions[stratified_sample(source.labels[positions], flags.images)]
    chosen = np.random.default_rng(0).permutation(chosen)
    images = load_images(dataset.loader, chosen)
    classes = predict_pixels(predictor, images).argmax(axis=1).astype(np.int32)
    masks = None
    if source.name.partition(":")[0] == "shapes":
        size = predictor.preprocessing.image_size
        masks = shapes.read_masks(source.name, [source.ids[i] for i in chosen], size)
    methods = choose_methods(predictor, flags.methods.split(","))
    found = checks.judge(predictor, images, classes, masks, methods)
    print("| method | shuffled, at worst | deletion (random, centre) | insertion | pointing | |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, verdict in found.items():
        print(row(name, verdict))
    if "grad_cam" in found:
        wanted = ("randomization", "pointing_game")
        results = [
            found["grad_cam"][check]["passes"] for check in wanted if check in found["grad_cam"]
        ]
        sys.exit(not all(results))


if __name__ == "__main__":
    main()
