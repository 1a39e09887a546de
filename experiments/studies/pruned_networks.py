"""Compares ways to compress a network: the ranking of the channels, distillation and dropout.

    cnn_jax train --workdir=runs/first
    python experiments/studies/pruned_networks.py --bundle=runs/first --workdir=runs/compression
        [--keep=0.3] [--epochs=8] [--variants taylor random ...]

Each variant is `cnn_jax.compress.compressor.compress` with one change, in a separate run, and
prints the accuracies after pruning and after training. The same command continues.

    taylor        no change: the channels are ranked by their effect on the loss, to first order
    norm          the channels are ranked by the L2 norm of their kernel
    random        the channels are ranked at random
    distillation  half of the loss is the divergence from the original network's predictions, with
                  temperature 2 (Hinton et al. 2015)
    dropout       the dropout of the original network
"""

import argparse
import contextlib
from typing import Any
from unittest import mock

import numpy as np
from flax.traverse_util import flatten_dict

from cnn_jax.compress import prune
from cnn_jax.compress.compressor import compress
from cnn_jax.inference.bundle import Bundle, find_bundle, read_bundle
from cnn_jax.system.compilation_cache import keep_compiled

_VARIANTS = ("taylor", "norm", "random", "distillation", "dropout")


def rank(variant: str, bundle: Bundle) -> dict[str, np.ndarray]:
    """Returns the importance of each channel by the variant "norm" or "random"."""
    rng = np.random.default_rng(bundle.data["division"]["seed"])
    scores, params = {}, flatten_dict(bundle.variables["params"], sep="/")
    for name, width in prune.widths(bundle.model).items():
        layer = "dense" if name == "embedding" else name
        kernel = np.asarray(params[f"{layer}/kernel"], np.float64)
        norms = np.sqrt((kernel**2).reshape(-1, width).sum(axis=0))
        scores[name] = norms if variant == "norm" else rng.random(width)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--variants", nargs="+", default=_VARIANTS, choices=_VARIANTS)
    flags = parser.parse_args()
    keep_compiled()
    bundle = read_bundle(find_bundle(flags.bundle))
    for variant in flags.variants:
        overrides: dict[str, Any] = {"report.detail": "none"}
        patch: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if variant in ("norm", "random"):
            scores = rank(variant, bundle)
            patch = mock.patch.object(prune, "importance", lambda *_, s=scores: s)
        elif variant == "distillation":
            overrides |= {"distill.bundles": flags.bundle, "distill.temperature": "2"}
        elif variant == "dropout":
            overrides["model.dropout"] = str(bundle.model["dropout"])
        with patch:
            _, record = compress(
                flags.bundle,
                f"{flags.workdir}/{variant}",
                flags.keep,
                epochs=flags.epochs,
                overrides=overrides,
            )
        cells = [f"{record[name]['test']:.2%}" for name in ("before", "narrowed", "after")]
        print(" | ".join([variant, *cells, f"{record['after']['validation']:.2%}"]), flush=True)


if __name__ == "__main__":
    main()
