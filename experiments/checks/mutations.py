"""Mutation testing: changes the code in one place at a time, and checks that a test then fails.

    python experiments/checks/mutations.py [FILE ...]

Without FILE (below cnn_jax/) all mutations are checked. The program prints a line for each
mutation and exits with 1 if no test noticed one. It works on a copy of the repository in a
temporary folder. A mutation that needs too much memory or never ends counts as noticed.

Use JAX 0.11 or later: a mutation of the convolutions changes only the choice of oneDNN, which
earlier versions of XLA do not use.
"""

import argparse
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile

# The maximum time (in seconds) and memory (in bytes) of the tests of one test file.
_SECONDS, _BYTES = 900, 12 * 2**30
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

# ruff: noqa: E501

# Each mutation consists of a file below cnn_jax/, a text that occurs once in that file, the
# replacement of the text, and the test file below tests/ in which a test must then fail.
MUTATIONS = [
    ("training/loss.py", "optax.smooth_labels(targets, label_smoothing)", "targets", "training/test_loss.py"),
    ("training/metrics.py", "jnp.where(mask, cross_entropy(logits, labels), 0)", "cross_entropy(logits, labels)", "training/test_metrics.py"),
    ("training/metrics.py", "at[labels, predictions]", "at[predictions, labels]", "training/test_metrics.py"),
    ("training/metrics.py", "2 * correct, predicted + support", "correct, predicted + support", "training/test_metrics.py"),
    ("training/metrics.py", "_per_class(correct, confusion.sum(axis=0), confusion.sum(axis=1))", "_per_class(correct, confusion.sum(axis=1), confusion.sum(axis=1))", "training/test_metrics.py"),
    ("training/metrics.py", "classes[\"recall\"].mean()", "classes[\"recall\"].max()", "training/test_metrics.py"),
    ("training/metrics.py", "+ z2 / (4 * count**2)", "", "training/test_metrics.py"),
    ("training/metrics.py", "for correct_row, predicted_row in zip(correct, predicted, strict=True)", "for correct_row, predicted_row in zip(correct, predicted[::-1], strict=True)", "training/test_metrics.py"),
    ("inference/calibration.py", "+ log_temperature**2 / 2", "", "inference/test_calibration.py"),
    ("inference/calibration.py", "log_probabilities(probabilities) / temperature", "log_probabilities(probabilities)", "inference/test_calibration.py"),
    ("inference/calibration.py", "np.ceil(confidence * num_bins).astype(int) - 1", "np.floor(confidence * num_bins).astype(int)", "inference/test_calibration.py"),
    ("inference/calibration.py", "confidence[1:] != confidence[:-1]", "confidence[1:] == confidence[1:]", "inference/test_calibration.py"),
    ("training/results.py", "dataclasses.replace(bundle, temperature=temperature)", "bundle", "training/test_loop.py"),
    ("explain/maps.py", "nn.relu(jnp.sum(weights * maps, axis=-1))\n\n\ndef _grad_cam_plus", "jnp.sum(weights * maps, axis=-1)\n\n\ndef _grad_cam_plus", "explain/test_maps.py"),
    ("explain/maps.py", "2 * squares + sums * gradients**3", "2 * squares", "explain/test_maps.py"),
    ("explain/maps.py", "nn.relu(gradients) * maps", "gradients * maps", "explain/test_maps.py"),
    ("explain/maps.py", "(np.arange(_STEPS) + 0.5) / _STEPS", "np.arange(_STEPS) / _STEPS", "explain/test_maps.py"),
    ("explain/maps.py", "np.maximum(loss, 0)", "loss", "explain/test_maps.py"),
    ("explain/checks.py", "names[:i]", "names[:1]", "explain/test_checks.py"),
    ("explain/checks.py", "better * difference - margin > 0", "better * difference > 0", "explain/test_checks.py"),
    ("explain/checks.py", "(self._blurred, self._images, self._blurred_scores", "(self._grey, self._images, self._blurred_scores", "explain/test_checks.py"),
    ("explain/checks.py", "is_largest &= np.ptp(maps, axis=1, keepdims=True) > 0\n", "", "explain/test_checks.py"),
    ("explain/features.py", "logits / predictor.temperature", "logits * 1", "explain/test_features.py"),
    ("explain/features.py", "after[1] - loss", "loss - after[1]", "explain/test_features.py"),
    ("quality/corruptions.py", "(60, 25, 12, 5, 3)", "(60, 25, 12, 6, 3)", "quality/test_corruptions.py"),
    ("quality/corruptions.py", "drawn < fraction / 2, np.uint8(255)", "drawn < fraction / 3, np.uint8(255)", "quality/test_corruptions.py"),
    ("quality/corruptions.py", "uniform(-45, 45)", "uniform(-90, 90)", "quality/test_corruptions.py"),
    ("quality/corruptions.py", "cut = math.ceil(side / factor)", "cut = round(side / factor)", "quality/test_corruptions.py"),
    ("quality/robustness.py", "clean - accuracy >= _FALL", "clean - accuracy > 2 * _FALL", "quality/test_robustness.py"),
    ("quality/robustness.py", "np.argsort(class_sizes - quotas", "np.argsort(quotas - class_sizes", "quality/test_robustness.py"),
    ("report/charts.py", "if fraction < 0.01", "if fraction < 0", "report/test_charts.py"),
    ("report/sections.py", "1 / temperature", "temperature", "report/test_run_report.py"),
    ("report/sections.py", "np.flatnonzero(is_right), confidence", "np.flatnonzero(is_right), -confidence", "report/test_run_report.py"),
    ("report/verdicts.py", "if p_value < _SIGNIFICANT else", "if p_value < 1 - _SIGNIFICANT else", "report/test_verdicts.py"),
    ("training/metrics.py", "mean - 0.5", "mean", "report/test_verdicts.py"),
    ("report/study.py", "if position <= _EDGE + 1e-9", "if position <= 2 * _EDGE", "report/test_study.py"),
    ("report/study.py", "enumerate(trial[\"curve\"], 1)", "enumerate(trial[\"curve\"])", "report/test_study.py"),
    ("report/style.py", "autoescape=True", "autoescape=False", "report/test_run_report.py"),
    ("training/probe.py", "l2 / 2 * jnp.sum(params", "l2 * jnp.sum(params", "training/test_probe.py"),
    ("training/probe.py", "- mean @ kernel", "", "training/test_probe.py"),
    ("training/probe.py", "mean(losses * weights)", "mean(losses)", "training/test_probe.py"),
    ("training/optimizer.py", "return stage_decay**distance", "return stage_decay", "training/test_optimizer.py"),
    ("training/optimizer.py", "end_value=final_learning_rate", "end_value=0.0", "training/test_optimizer.py"),
    ("training/optimizer.py", "init_value=0.0 if warmup_steps else learning_rate", "init_value=learning_rate", "training/test_optimizer.py"),
    ("training/optimizer.py", "path[-1].key == \"kernel\"", "path[-1].key != \"scale\"", "training/test_optimizer.py"),
    ("training/optimizer.py", "add_decayed_weights(l2,", "add_decayed_weights(l2 / 2,", "training/test_optimizer.py"),
    ("models/layers.py", "stored_mean.value, stored_variance.value = mean, variance", "pass", "models/test_layers.py"),
    ("models/pretrained.py", "round(255 * value, 4)", "round(256 * value, 4)", "models/test_pretrained.py"),
    ("models/pretrained.py", "tuple(size[1:])", "tuple(size[:0:-1])", "models/test_pretrained.py"),
    ("models/pretrained.py", "if resize == \"crop\" else 1.0", "if resize else 1.0", "models/test_pretrained.py"),
    ("models/pretrained.py", "len(names) == config.get(\"num_classes\")", "True", "models/test_pretrained.py"),
    ("models/pretrained.py", "*range(2, array.ndim), 1, 0", "*range(2, array.ndim), 0, 1", "models/test_pretrained.py"),
    ("config/resolve.py", "key != \"crop_ratio\" or resolved.data.resize == \"crop\"", "True", "config/test_resolve.py"),
    ("config/resolve.py", "if has_default and is_possible", "if is_possible", "config/test_resolve.py"),
    ("training/initial_weights.py", "list(their_classes) != list(own_classes)", "set(their_classes) != set(own_classes)", "training/test_initial_weights.py"),
    ("training/initial_weights.py", "sha256 not in (None, record[\"sha256\"])", "False", "training/test_initial_weights.py"),
    ("training/initial_weights.py", "source[name].shape != target[name].shape", "source[name].ndim != target[name].ndim", "training/test_initial_weights.py"),
    ("models/cnn.py", "epsilon=1e-3", "epsilon=1e-2", "models/test_cnn.py"),
    ("models/cnn.py", "axis=(1, 2)", "axis=(1,)).max(axis=(1,)", "models/test_cnn.py"),
    ("models/cnn.py", "name=\"dense\",\n            )(x)\n            x = nn.relu(x)", "name=\"dense\",\n            )(x)", "models/test_cnn.py"),
    ("models/cnn.py", "deterministic=not train", "deterministic=True", "models/test_cnn.py"),
    ("models/cnn.py", "dtype=jnp.float32, name=\"head\"", "dtype=self.dtype, name=\"head\"", "models/test_cnn.py"),
    ("models/layers.py", "cpu=_blockwise_sums", "cpu=_plain_sums", "training/test_programs.py"),
    ("models/layers.py", "for i in (0, 1) for j in (0, 1)]", "for i in (0, 1) for j in (0, 0)]", "models/test_layers.py"),
    ("models/layers.py", "squares_total / count - mean * mean", "squares_total / count", "models/test_layers.py"),
    ("models/layers.py", "constant = -slope * bias_gradient / count", "constant = 0 * bias_gradient", "models/test_layers.py"),
    ("models/layers.py", "projection = -slope * inverse * scale_gradient / count", "projection = -slope * scale_gradient / count", "models/test_layers.py"),
    ("models/layers.py", "    scale_gradient *= inverse\n", "", "models/test_layers.py"),
    ("models/layers.py", "return gradient, total.astype", "return gradient, 0 * total.astype", "models/test_layers.py"),
    ("models/layers.py", " | jnp.isnan(b[0])", "", "models/test_layers.py"),
    ("models/layers.py", "jnp.where(is_b, b[1], a[1])", "jnp.where(is_b, a[1], b[1])", "models/test_layers.py"),
    ("models/layers.py", "cpu=_input_gradient_on_cpu", "cpu=_input_gradient", "training/test_programs.py"),
    ("models/layers.py", "lax.rev(kernel, (0, 1)).transpose(0, 1, 3, 2)", "kernel.transpose(0, 1, 3, 2)", "models/test_layers.py"),
    ("models/layers.py", "return lax.rev(reversed_gradient, (3,)).transpose", "return reversed_gradient.transpose", "models/test_layers.py"),
    ("models/layers.py", "nn.LayerNorm, epsilon=1e-6", "nn.LayerNorm, epsilon=1e-5", "models/test_layers.py"),
    ("models/layers.py", "gelu(Dense(self.hidden", "nn.gelu(Dense(self.hidden", "models/test_timm.py"),
    ("models/layers.py", "in_float32 = x.astype(jnp.float32)\n    distribution", "in_float32 = x\n    distribution", "models/test_layers.py"),
    ("models/layers.py", "return factor, bias - mean.value * factor", "return factor, bias", "models/test_timm.py"),
    ("models/convolutions.py", "if padding == \"symmetric\":", "if False:", "models/test_timm.py"),
    ("models/convolutions.py", "if padding == \"symmetric\":", "if True:", "models/test_timm.py"),
    ("models/convolutions.py", "epsilon: float = 1e-5\n    batch", "epsilon: float = 1e-3\n    batch", "models/test_timm.py"),
    ("models/convolutions.py", "x[:, ::stride, ::stride]", "x[:, stride - 1 :: stride, stride - 1 :: stride]", "models/test_convolutions.py"),
    ("models/convolutions.py", "lax.rev(kernel, (0, 1))", "kernel", "models/test_convolutions.py"),
    ("models/convolutions.py", "(last - before, n - length + before)", "(last - before, before)", "models/test_convolutions.py"),
    ("models/convolutions.py", "0 <= y < x.shape[1] and 0 <= z", "0 <= y < x.shape[1] and 1 <= z", "models/test_convolutions.py"),
    ("models/convolutions.py", "cpu=functools.partial(on_cpu, stride=stride, pads=pads),", "cpu=functools.partial(on_cpu, stride=stride, pads=((0, 0), (0, 0))),", "models/test_convolutions.py"),
    ("models/convolutions.py", "default=functools.partial(_grouped,", "default=functools.partial(_sum_of_shifted_images,", "models/test_convolutions.py"),
    ("models/layers.py", "cast(Any, ((1, 1), (1, 1)))", "\"SAME\"", "models/test_timm.py"),
    ("models/layers.py", "constant_values=-jnp.inf", "constant_values=0", "models/test_layers.py"),
    ("models/layers.py", "(pixels > largest)", "(pixels >= largest)", "models/test_layers.py"),
    ("models/layers.py", "index == position", "index == 8 - position", "models/test_layers.py"),
    ("models/resnet.py", "x, width, 1, conv=\"conv1\", norm=\"bn1\")\n        x = self.conv_norm(nn.relu(x), width, 3, self.stride, conv", "x, width, 1, self.stride, conv=\"conv1\", norm=\"bn1\")\n        x = self.conv_norm(nn.relu(x), width, 3, conv", "models/test_timm.py"),
    ("models/convolutions.py", "self.is_training(stage, train) and", "train and", "models/test_backbones.py"),
    ("models/efficientnet.py", "\"epsilon\": 1e-3", "\"epsilon\": 1e-5", "models/test_timm.py"),
    ("models/efficientnet.py", "\"padding\": \"same\"", "\"padding\": \"symmetric\"", "models/test_timm.py"),
    ("models/efficientnet.py", "jax.nn.relu6", "nn.relu", "models/test_timm.py"),
    ("models/efficientnet.py", "else nn.silu", "else nn.relu", "models/test_timm.py"),
    ("models/efficientnet.py", "SqueezeExcite(channels // 4", "SqueezeExcite(expanded // 4", "models/test_timm.py"),
    ("models/efficientnet.py", "if self.is_lite and row in", "if False and row in", "models/test_timm.py"),
    ("models/efficientnet.py", "0.9 * scaled", "scaled", "models/test_timm.py"),
    ("models/efficientnet.py", "broadcast_dims=(1, 2, 3)", "broadcast_dims=(1, 2)", "models/test_backbones.py"),
    ("models/efficientnet.py", "self.drop_path * block / total", "self.drop_path", "models/test_backbones.py"),
    ("models/efficientnet.py", "is_training=self.is_training(f\"blocks_{i}\", train)", "is_training=train", "models/test_backbones.py"),
    ("models/convnext.py", "deterministic=not self.is_training", "deterministic=False", "models/test_convnext.py"),
    ("models/convnext.py", "broadcast_dims=(1, 2, 3)", "broadcast_dims=(1, 2)", "models/test_convnext.py"),
    ("models/convnext.py", "self.drop_path * i / max(total - 1, 1)", "self.drop_path", "models/test_networks.py"),
    ("models/vit.py", "query / math.sqrt(width)", "query", "models/test_vit.py"),
    ("models/vit.py", "\"bicubic\")", "\"bicubic\", antialias=False)", "models/test_timm.py"),
    ("models/vit.py", "\"bicubic\")", "\"bilinear\")", "models/test_timm.py"),
    ("models/vit.py", "(1, rows, columns, self.features)", "(1, columns, rows, self.features)", "models/test_timm.py"),
    ("models/vit.py", "deterministic=not self.is_training", "deterministic=False", "models/test_vit.py"),
    ("models/vit.py", "for i in range(self.depth - 1) if i % 3 == 2 or i == last", "for i in range(self.depth) if i % 3 == 2", "models/test_networks.py"),
    ("system/runtime.py", "in _CPU_OPTIONS.items() if _is_known(name, value)}", "in _CPU_OPTIONS.items() if not _is_known(name, value)}", "training/test_programs.py"),
    ("data/preprocessing.py", "jnp.float32) - mean) / std", "jnp.float32) - mean) * std", "training/test_step.py"),
    ("training/step.py", "random_key(self.seed, purpose), step)", "random_key(self.seed, purpose), 0)", "training/test_step.py"),
    ("training/step.py", "jnp.sum(jnp.where(mask, losses, 0))", "jnp.sum(losses)", "training/test_step.py"),
    ("training/step.py", "cross_entropy(logits, targets, self.label_smoothing)", "cross_entropy(logits, targets)", "training/test_step.py"),
    ("training/step.py", "cross_entropy(logits, targets, self.label_smoothing)", "cross_entropy(logits, labels, self.label_smoothing)", "training/test_step.py"),
    ("training/step.py", "purposes[\"mix\"] = MIX", "purposes[\"mix\"] = DROPOUT", "training/test_step.py"),
    ("training/step.py", "labels = jnp.argmax(targets, axis=-1)", "pass", "training/test_step.py"),
    ("training/step.py", "images = augment.apply_on_device(images, **draws)", "pass", "training/test_step.py"),
    ("training/step.py", "new[\"var\"] + distance * (new[\"mean\"] - mean)", "new[\"var\"]", "training/test_step.py"),
    ("training/step.py", "mean = old[\"mean\"] + distance / count", "mean = 0.99 * old[\"mean\"] + 0.01 * new[\"mean\"]", "training/test_step.py"),
    ("training/loop.py", "progress.state = _estimate_statistics(run, progress.state)\n", "", "training/test_loop.py"),
    ("data/augment.py", "-sign_x * sin", "sign_x * sin", "data/test_augment.py"),
    ("data/augment.py", "[(width - 1) / 2, (height - 1) / 2]", "[width / 2, height / 2]", "data/test_augment.py"),
    ("data/augment.py", "order=1, mode=\"reflect\"", "order=1, mode=\"mirror\"", "data/test_augment.py"),
    ("data/augment.py", "flags, cv2.BORDER_REFLECT)", "flags, cv2.BORDER_REFLECT_101)", "data/test_augment.py"),
    ("data/augment.py", "axis=(1, 2), keepdims=True", "axis=(1, 2, 3), keepdims=True", "data/test_augment.py"),
    ("data/augment.py", "1 + rng.uniform(-1, 1, batch_size) * augmentation.zoom", "1 + rng.uniform(0, 1, batch_size) * augmentation.zoom", "data/test_augment.py"),
    ("data/augment.py", "augmentation.rotation * 2 * math.pi", "augmentation.rotation * math.pi", "data/test_augment.py"),
    ("data/mix.py", "(1 - share)[:, None, None]", "share[:, None, None]", "data/test_mix.py"),
    ("data/mix.py", "jnp.sqrt(1 - share)", "(1 - share)", "data/test_mix.py"),
    ("data/mix.py", "jnp.arange(pixels)[None] + 0.5", "jnp.arange(pixels)[None]", "data/test_mix.py"),
    ("data/mix.py", "< side / 2", "< side", "data/test_mix.py"),
    ("data/mix.py", "centre[:, axis, None]", "centre[:, 1 - axis, None]", "data/test_mix.py"),
    ("data/mix.py", "jnp.mean(weights, axis=(1, 2))", "weights[:, 0, 0]", "data/test_mix.py"),
    ("data/mix.py", "(1 - weights) * rows + weights *", "weights * rows + (1 - weights) *", "data/test_mix.py"),
    ("data/mix.py", "jnp.roll(rows, 1, axis=0)", "jnp.roll(rows, -1, axis=0)", "data/test_mix.py"),
    ("data/mix.py", "jnp.roll(mask, 1)", "mask", "data/test_mix.py"),
    ("data/mix.py", "number < mixing.mixup_probability + mixing.cutmix_probability", "number < mixing.cutmix_probability", "data/test_mix.py"),
    ("data/mix.py", "is_mixed & ~is_mixup", "is_mixed", "data/test_mix.py"),
    ("data/mix.py", "jnp.where(is_mixup, mixing.mixup_alpha, mixing.cutmix_alpha)", "jnp.where(is_mixup, mixing.cutmix_alpha, mixing.mixup_alpha)", "data/test_mix.py"),
    ("data/splits.py", "f\"{seed}:{identity}\"", "f\"{identity}\"", "data/test_splits.py"),
    ("data/splits.py", "np.argsort(numbers[members], kind=\"stable\")", "np.arange(len(members))", "data/test_splits.py"),
    ("data/splits.py", "bounds = np.searchsorted(numbers[members], cuts)", "bounds = np.rint(cuts * len(members)).astype(int)", "data/test_splits.py"),
    ("data/splits.py", "return after - nearer_before", "return after", "data/test_splits.py"),
    ("data/splits.py", "bounds = _none_empty(bounds, len(members))", "pass", "data/test_splits.py"),
    ("data/splits.py", "for keys in (groups, contents):", "for keys in (groups, None):", "data/test_splits.py"),
    ("data/splits.py", "for keys in (groups, contents):", "for keys in (None, contents):", "data/test_splits.py"),
    ("data/splits.py", "(len(name), name)), (len(name), name)", "(-len(name), name)), (-len(name), name)", "data/test_splits.py"),
    ("data/splits.py", "shares[[name in given and name != \"train\" for name in SPLITS]] = 0", "pass", "data/test_splits.py"),
    ("data/splits.py", "np.maximum.at(unit_splits, units[~free], example_splits[~free])", "pass", "data/test_splits.py"),
    ("data/files.py", "if (status.st_dev, status.st_ino) in self._seen:", "if False:", "data/test_files.py"),
    ("data/files.py", "elif not (is_inside or self._allow_outside):", "elif False:", "data/test_files.py"),
    ("data/files.py", "[class_name for _, (class_name, _) in examples]", "[file.parts[0] for file, _ in examples]", "data/test_files.py"),
    ("data/scan.py", "and values[0] == version", "", "data/test_scan.py"),
    ("data/scan.py", "_digest(pixels.data, shape.encode())", "_digest(pixels.data)", "data/test_scan.py"),
    ("data/scan.py", "if record is not None and record.digest\n", "if record is not None\n", "data/test_scan.py"),
    ("data/cache.py", "_take_room(self._descriptor, self._start, count * self._row_bytes)", "pass", "data/test_cache.py"),
    ("data/scan.py", "rows = np.flatnonzero([record.error is None for record in records])", "rows = np.arange(len(records))", "data/test_dataset.py"),
    ("data/findings.py", "max_unreadable * total >= len(unreadable)", "1 + max_unreadable * total >= len(unreadable)", "data/test_dataset.py"),
    ("data/survey.py", "(1 << (high - low)) - 1", "(1 << (high - low)) - 2", "data/test_survey.py"),
    ("data/survey.py", "is_near = apart <=", "is_near = apart >=", "data/test_survey.py"),
    ("data/survey.py", "self.levels * deviation**2", "self.levels * abs(deviation)", "data/test_survey.py"),
    ("data/dataset.py", "if decoded <= device_bytes / 4:", "if decoded <= device_bytes:", "data/test_dataset.py"),
    ("data/findings.py", "labels[i]) for i in group}) > 1", "labels[i]) for i in group}) > 0", "data/test_findings.py"),
    ("data/findings.py", "example_splits[i]) for i in group}) > 1", "example_splits[i]) for i in group}) > 0", "data/test_findings.py"),
    ("data/pipeline.py", "images = np.asarray(self.pixels[rows])", "images = np.asarray(self.pixels[indices])", "data/test_pipeline.py"),
    ("data/pipeline.py", "self._turns(places)\n", "places % len(self._members)\n", "data/test_pipeline.py"),
    ("data/pipeline.py", "zip(self._members, seeds, strict=True)", "zip(self._members, seeds[:1] * len(seeds), strict=True)", "data/test_pipeline.py"),
    ("training/loss.py", "has_examples.sum() * class_counts[has_examples]", "class_counts[has_examples]", "training/test_loss.py"),
    ("training/metrics.py", "_divide(class_counts, host.confusion.sum(axis=1))", "_divide(class_counts, host.confusion.sum(axis=0))", "training/test_metrics.py"),
    ("training/step.py", "losses *= example_weights(jnp.array(self.class_weights, jnp.float32), targets)", "pass", "training/test_step.py"),
    ("training/loss.py", "return class_weights[targets]", "return class_weights[0 * targets]", "training/test_loss.py"),
    ("training/loss.py", "return jnp.matmul(targets, class_weights, precision=jax.lax.Precision.HIGHEST)", "return class_weights[jnp.argmax(targets, axis=1)]", "training/test_loss.py"),
    ("training/programs.py", "return batch if pixels is None else {**batch, \"image\": pixels[batch[\"row\"]]}", "return batch if pixels is None else {**batch, \"image\": pixels[: len(batch[\"row\"])]}", "training/test_loop.py"),
    ("training/loop.py", "if is_sampled else None", "if False else None", "training/test_loop.py"),
    ("training/loop.py", "balanced=config.train.balance == \"sampling\"", "balanced=False", "training/test_loop.py"),
    ("training/programs.py", "mixing=Mixing.from_config(config.augment)", "mixing=Mixing()", "training/test_loop.py"),
    ("config/schema.py", "if mixup + cutmix > 1:", "if False:", "config/test_schema.py"),
    ("training/run_directory.py", "for name, key in known_keys.items()} | dict(previous)", "for name, key in known_keys.items() if 0} | dict(previous)", "training/test_run_directory.py"),
    ("training/run_directory.py", " - _unused_keys(wanted)", "", "training/test_run_directory.py"),
    ("training/programs.py", "if train.balance == \"loss\":", "if False:", "training/test_loop.py"),
    ("data/decode.py", "if orientation in (3, 4, 7, 8):", "if orientation in (3, 4, 6, 8):", "data/test_decode.py"),
    ("data/decode.py", "if width * height > max_pixels:", "if False:", "data/test_dirty_folder.py"),
    ("data/decode.py", "if pixels > max_pixels:", "if False:", "data/test_dirty_folder.py"),
    ("data/decode.py", "for top in range(0, height, rows):\n        strip = image", "for top in range(rows, height, rows):\n        strip = image", "data/test_decode.py"),
    ("data/augment.py", "near[...] = image", "near[...] = images[0]", "data/test_augment.py"),
    ("data/source.py", "return example_id[len(folder) + 1 :]", "return example_id", "data/test_dataset.py"),
    ("report/inspection.py", "percents = 100 * counts", "percents = 10 * counts", "report/test_inspection.py"),
    ("inference/evaluation.py", "residency=choose_residency(\"auto\", listing, predictor.preprocessing, device_bytes=0)", "residency=\"none\"", "inference/test_evaluate.py"),
    ("data/decode.py", "return None, _upright(np.asarray(_strip_to_rgb(image)), orientation)", "return None, np.asarray(_strip_to_rgb(image))", "data/test_decode.py"),
    ("data/decode.py", "astype(np.float64) * 255 / white", "astype(np.float64) * 256 / white", "data/test_decode_values.py"),
    ("data/decode.py", "white = white_level or deep.white", "white = deep.white or white_level", "data/test_decode_values.py"),
    ("data/decode.py", "levels = 255 - levels", "pass", "data/test_decode_values.py"),
    ("data/decode.py", "if values.low < 0:", "if False:", "data/test_decode_values.py"),
    ("data/decode.py", "*= _SCALES[rawmode]", "*= 1", "data/test_decode_values.py"),
    ("data/scan.py", "limits = f\"{preprocessing.max_pixels} {preprocessing.white_level}\"\n    text", "limits = f\"{preprocessing.max_pixels}\"\n    text", "data/test_scan.py"),
    ("data/findings.py", "return self.dark >= _MIN_DARK_FRACTION * self.images", "return False", "data/test_findings.py"),
    ("data/decode.py", "\"white\"", "\"black\"", "data/test_decode.py"),
    ("data/resize.py", "Image.Resampling.BILINEAR", "Image.Resampling.NEAREST", "data/test_resize.py"),
    ("data/resize.py", "-round((scaled[0] - height) / 2)", "-((scaled[0] - height) // 2)", "data/test_resize.py"),
    ("data/resize.py", "(height - scaled[0]) // 2", "(height - scaled[0] + 1) // 2", "data/test_resize.py"),
    ("data/resize.py", "math.floor(height / preprocessing.crop_ratio)", "math.ceil(height / preprocessing.crop_ratio)", "data/test_resize.py"),
    ("data/scan.py", " {shape}\".encode()", "\".encode()", "data/test_scan.py"),
    ("data/pipeline.py", ".slice(slice(start, stop))", ".slice(slice(0, None))", "data/test_pipeline.py"),
    ("data/pipeline.py", "loader.load(indices[np.where(mask, positions, 0)])", "loader.load(indices[np.where(mask, positions, -1)][::-1])", "data/test_pipeline.py"),
    ("data/pipeline.py", "default_rng([self._seed, number])", "default_rng(self._seed)", "data/test_pipeline.py"),
    ("data/pipeline.py", "default_rng([self._seed, number])", "default_rng(number)", "data/test_pipeline.py"),
    ("data/pipeline.py", "positions[is_here] = self._order(number)[offsets[is_here]]", "positions[is_here] = self._order(number)[offsets[is_here] // 2]", "data/test_pipeline.py"),
    ("data/augment.py", "np.array(means, np.float32) * (1 - contrast[:, None])", "np.array(means, np.float32) * 0", "data/test_augment.py"),
    ("training/checkpoint.py", "return max(history,", "return max(history[::-1],", "training/test_checkpoint.py"),
    ("training/checkpoint.py", "return -value if monitor", "return value if monitor", "training/test_checkpoint.py"),
    ("inference/bundle.py", "!= sha256:", "== \"\":", "inference/test_bundle.py"),
    ("inference/predictor.py", "preprocessing) / temperature", "preprocessing) / 1", "inference/test_predict.py"),
    ("inference/images.py", "return iter([array])", "return iter(array)", "inference/test_predict.py"),
    ("inference/images.py", "isinstance(images, Mapping | Set)", "isinstance(images, Mapping)", "inference/test_predict.py"),
    ("inference/images.py", "list(dict.fromkeys(images))", "images", "inference/test_predict.py"),
    ("system/cli.py", "error.end = error.start + 1", "pass", "system/test_cli.py"),
    ("serve/engine.py", "self.seconds[size] / min(size, count)", "self.seconds[size]", "serve/test_engine.py"),
    ("serve/engine.py", "max(0.0, deadline - now)", "9.0", "serve/test_engine.py"),
    ("serve/engine.py", "if new and (total + new > most or exceeds_own_limit):", "if total + new > most or exceeds_own_limit:", "serve/test_engine.py"),
    ("serve/engine.py", "if new and (total + new > most or exceeds_own_limit):", "if new and total + new > most:", "serve/test_engine.py"),
    ("serve/engine.py", "exceeds_own_limit = own_total and", "exceeds_own_limit =", "serve/test_engine.py"),
    ("serve/engine.py", "chosen = [image for image in images if (image.index in large) == is_large]", "chosen = images if not is_large else []", "serve/test_engine.py"),
    ("serve/engine.py", "num_without_gain == 2", "num_without_gain == 1", "serve/test_engine.py"),
    ("serve/image_size.py", "(low_height + (high_height << 16) + 1)", "(low_height + (high_height << 16))", "serve/test_image_size.py"),
    ("serve/image_size.py", '_product(">HH", encoded, position + 5)', '_product(">HH", encoded, position + 3)', "serve/test_image_size.py"),
    ("serve/loader.py", "self._loads.keys() | self._threads", "self._loads.keys()", "serve/test_versions.py"),
    ("serve/loader.py", "all(load.is_slow for load in self._loads.values())", "not self._loads", "serve/test_versions.py"),
    ("serve/loader.py", "random.uniform(0.5, 1.5)", "1.0", "serve/test_versions.py"),
    ("serve/http.py", "head = self._protocol.head_without_upgrade()", 'head = b""', "serve/test_http.py"),
    ("serve/http.py", "or self._incomplete_bytes > _MAX_HEADER_BYTES", "", "serve/test_http.py"),
    ("serve/request_log.py", "if rows:\n                    self._write(rows)", "if False:\n                    self._write(rows)", "serve/test_request_log.py"),
    ("data/request_log.py", "os.ftruncate(self._file.fileno(), good)", "pass", "serve/test_request_log.py"),
    ("data/request_log.py", "if key in labelled]", "if key not in labelled]", "serve/test_request_log.py"),
    ("data/request_log.py", "if is_claimed(path) or not start", "if not start", "serve/test_request_log.py"),
    ("data/request_log.py", "tables[stem] = table", "tables[str(path)] = table", "serve/test_request_log.py"),
    ("serve/engine.py", "if not w.request.future.done())", ")", "serve/test_engine.py"),
    ("serve/engine.py", "if image.request.program is program]", "]", "serve/test_engine.py"),
    ("serve/engine.py", "                lane.clear()", "                pass", "serve/test_engine.py"),
    ("serve/engine.py", "        if lane:", "        if False:", "serve/test_engine.py"),
    ("serve/engine.py", "request.missing -= 1", "request.missing = 0", "serve/test_engine.py"),
    ("serve/engine.py", "            del batch  #", "            #", "serve/test_engine.py"),
    ("serve/engine.py", "self._last = weakref.ref(program)", "self._last = lambda: program", "serve/test_engine.py"),
    ("serve/limits.py", "is_disconnected and task.uncancel() <= cancelled_before", "is_disconnected", "serve/test_limits.py"),
    ("serve/limits.py", "        watcher.cancel()", "        pass", "serve/test_limits.py"),
    ("serve/service.py", "if version is None else version.hold():", "if True else version.hold():", "serve/test_service.py"),
    ("serve/images.py", "(array >= 0) & (array <= 255)", "(array >= 0) & (array <= 256)", "serve/test_serve_images.py"),
    ("serve/images.py", 'str.maketrans("-_", "+/")', 'str.maketrans("-_", "/+")', "serve/test_serve_images.py"),
    ("serve/images.py", "image.max(initial=0) == 1", "False", "serve/test_serve_images.py"),
    ("serve/images.py", "if not name and not content:", "if False:", "serve/test_serve_images.py"),
    ("serve/limits.py", "names.count(name) > 1", "False", "serve/test_server.py"),
    ("serve/tokens.py", 'role in found or "admin" in found', "True", "serve/test_tokens.py"),
    ("serve/versions.py", "_check_probabilities(next(iter(predict(image[None]))).probabilities)", "", "serve/test_versions.py"),
    ("registry/ledger.py", 'value <= limit if metric == "loss" else', "", "registry/test_registry_ledger.py"),
    ("registry/ledger.py", "history[-2]]", "history[-1]]", "registry/test_registry.py"),
    ("registry/store.py", 'mode="create"', 'mode="overwrite"', "registry/test_registry_store.py"),
    ("registry/store.py", "overwrite=False", "overwrite=True", "registry/test_registry_store.py"),
    ("registry/store.py", "sync(self._root / name)", "pass", "registry/test_registry_store.py"),
    ("registry/store.py", "_sync_folder(folder.parent)", "pass", "registry/test_registry_store.py"),
    ("registry/store.py", "if \"?\" in rest or", "if", "registry/test_registry_store.py"),
    ("registry/store.py", "waiting.clear()", "pass", "registry/test_registry_store.py"),
    ("registry/store.py", "daemon=True", "daemon=False", "registry/test_registry_store.py"),
    ("registry/registry.py", "len(self._entries) < self._last_marked", "False", "registry/test_registry.py"),
    ("registry/registry.py", "self._check_last_entry()", "pass", "registry/test_registry.py"),
    ("registry/registry.py", "except (FileExistsError, NoAnswerError):", "except NoAnswerError:", "registry/test_registry.py"),
    ("registry/ledger.py", "fields.get(\"skippable\") is True", "True", "registry/test_registry_ledger.py"),
    ("registry/ledger.py", "is_compared = pair == (version.number, current)", "is_compared = True", "registry/test_registry_ledger.py"),
    ("registry/ledger.py", "is_compared = current in (None, version.number)", "is_compared = True", "registry/test_registry_ledger.py"),
    ("registry/evidence.py", "if one in old_correct", "", "registry/test_registry_evidence.py"),
    ("quality/noninferiority.py", "margin * (2 * images - gains + losses)", "margin * (2 * images + gains - losses)", "quality/test_noninferiority.py"),
    ("quality/noninferiority.py", "2 * loss_rate - margin * (1 + margin)", "2 * loss_rate - margin**2", "quality/test_noninferiority.py"),
    ("quality/noninferiority.py", "binom.sf(losses - 1,", "binom.sf(losses,", "quality/test_noninferiority.py"),
    ("quality/noninferiority.py", "np.logical_and.accumulate(is_small, axis=-1)", "is_small", "quality/test_noninferiority.py"),
    ("quality/noninferiority.py", "and not worse,", ",", "quality/test_noninferiority.py"),
    ("inference/evaluation.py", "labels * num_classes + predictions", "predictions * num_classes + labels", "inference/test_evaluate.py"),
    ("evaluate.py", '(not item[1]["support"], item[1]["f1"])', 'item[1]["f1"]', "inference/test_evaluate.py"),
    ("inference/evaluation.py", "to_predictor[source.labels[indices]]", "source.labels[indices]", "inference/test_evaluate.py"),
    ("training/loop.py", "augmentation, progress.step)", "augmentation, 0)", "training/test_loop.py"),
    ("training/loop.py", "saved.state, saved.epoch_metrics, saved.history, clock)", "saved.state, totals, saved.history, clock)", "training/test_loop.py"),
    ("training/loop.py", "if not run.programs.is_finite(progress.state):", "if False:", "training/test_loop.py"),
    ("data/source.py", "\\t{digests[i]}\\t", "\\t", "data/test_dataset.py"),
    ("data/source.py", "\\t{example_splits[i]}", "", "data/test_dataset.py"),
    ("data/shapes.py", "rng.uniform(0.26, 0.42)", "rng.uniform(0.26, 0.43)", "data/test_shapes.py"),
    ("training/loop.py", ">= config.train.patience", "> config.train.patience", "training/test_loop.py"),
    ("training/step.py", "jnp.moveaxis(rows.reshape(-1, parts, *rows.shape[1:]), 1, 0)", "rows.reshape(parts, -1, *rows.shape[1:])", "training/test_step.py"),
    ("training/step.py", "losses, 0)) / count\n", "losses, 0)) / jnp.maximum(jnp.sum(mask), 1)\n", "training/test_step.py"),
    ("training/step.py", "jax.tree.map(jnp.add, sums, (grads, metrics)), None", "(jax.tree.map(jnp.add, sums[0], grads), metrics), None", "training/test_step.py"),
    ("training/step.py", "jax.tree.map(split_key, keys)", "jax.tree.map(lambda key: jnp.stack([key] * self.accumulation_steps), keys)", "training/test_step.py"),
    ("training/sharding.py", "PartitionSpec(*[None] * (leaf.ndim - 1), \"model\")", "PartitionSpec(\"model\")", "training/test_sharding.py"),
    ("training/sharding.py", "or leaf.shape[-1] % parts", "", "training/test_sharding.py"),
    ("training/checkpoint.py", "_mix(bits ^ _mix(position + jnp.uint32(1)))", "bits * (2 * position + jnp.uint32(1))", "training/test_checkpoint.py"),
    ("training/checkpoint.py", "!= progress[\"checksums\"]", "!= progress[\"checksums\"] and False", "training/test_checkpoint.py"),
    ("training/checkpoint.py", "if progress.get(\"sha256\") != _sha256(content):", "if False:", "training/test_checkpoint.py"),
    ("training/checkpoint.py", "\"history\": list(history)", "\"history\": history", "training/test_checkpoint.py"),
    ("training/checkpoint.py", "self.best in steps[i : i + 2]", "self.best == steps[i]", "training/test_checkpoint.py"),
    ("training/checkpoint.py", "                    self.restore(best[\"step\"], state, epoch_metrics)\n", "                    pass\n", "training/test_checkpoint.py"),
    ("training/checkpoint.py", "            self._move_aside(later)\n", "", "training/test_checkpoint.py"),
    ("training/run_directory.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "training/test_run_directory.py"),
    ("training/run_directory.py", "activity != self._activity or", "", "training/test_run_directory.py"),
    ("training/run_directory.py", "if key not in FREE_KEYS", "if False", "training/test_run_directory.py"),
    ("training/loop.py", "and restore_step != (previous or {}).get(\"checkpoint.restore_step\")", "", "training/test_loop.py"),
    ("training/loop.py", "if best[\"step\"] == progress.step:", "if best[\"step\"] == progress.history[-1][\"step\"]:", "training/test_loop.py"),
    ("system/signals.py", "reached_preemption_sync_point(count)", "reached_preemption_sync_point(count + 12)", "training/test_processes.py"),
    ("config/resolve.py", "previous.get(\"precision\", compute_dtype(\"auto\").name)", "compute_dtype(\"auto\").name", "config/test_schema.py"),
    ("system/signals.py", "            if not is_first:\n                os._exit(128 + signum[0])\n", "", "training/test_faults.py"),
    ("data/pipeline.py", "mp_prefetch\n        iterator = iter(prefetch(options, _end_with_the_main_process))", "mp_prefetch\n        iterator = iter(prefetch(options))", "training/test_faults.py"),
    ("data/pipeline.py", "draws = {name: values[rows] for name, values in draws.items()}", "pass", "data/test_pipeline.py"),
    ("data/pipeline.py", "positions = batch * batch_size + own_rows", "positions = batch * batch_size + np.arange(batch_size)[: len(own_rows)]", "data/test_pipeline.py"),
    ("training/results.py", "probabilities[part] = rows", "probabilities[: len(rows)] = rows", "training/test_processes.py"),
    ("tune/space.py", "return [distribution.low, distribution.high]", "return [distribution.low]", "tune/test_space.py"),
    ("tune/search.py", "trial.number, *name.encode()", "*name.encode()", "tune/test_search.py"),
    ("tune/search.py", "if trial.number == 0:", "if False:", "tune/test_tune_study.py"),
    ("tune/space.py", "and _is_in_range(value, distribution)", "", "tune/test_space.py"),
    ("tune/search.py", "(len(others) + 1) // REDUCTION", "len(others) // REDUCTION", "tune/test_search.py"),
    ("tune/search.py", "if step <= epoch}", "}", "tune/test_search.py"),
    ("tune/search.py", "math.ceil((last + 1)", "math.floor((last + 1)", "tune/test_search.py"),
    ("tune/storage.py", "re.sub(r\"(?i)(password=)[^&]*\", r\"\\1***\", url)", "url", "tune/test_storage.py"),
    ("tune/storage.py", "file.truncate(end)", "pass", "tune/test_storage.py"),
    ("tune/study.py", "judged = reported - {max(reported, default=0)}", "judged = set(reported)", "tune/test_tune_study.py"),
    ("tune/study.py", "\"report.splits\": (\"validation\",)", "\"report.splits\": (\"validation\", \"test\")", "tune/test_tune_study.py"),
    ("tune/study.py", "if not numbers():", "if True:", "tune/test_tune_study.py"),
    ("tune/study.py", "if counts(self._trials()[trial.number]):", "if True:", "tune/test_tune_study.py"),
    ("tune/outcome.py", "states=(TrialState.COMPLETE,)", "states=None", "tune/test_outcome.py"),
    ("export/function.py", "np.all(factor > 0)", "True", "export/test_function.py"),
    ("export/function.py", "if np.any(value.factor <= 0):", "if False:", "export/test_function.py"),
    ("export/function.py", "shift * count)", "shift)", "export/test_function.py"),
    ("export/function.py", "params[\"platforms\"].index(None)", "0", "export/test_function.py"),
    ("export/function.py", "_add_channels(base, quotient)", "_add_channels(base, shift)", "export/test_function.py"),
    ("export/translate.py", "and len(convolution.input) == 2", "", "export/test_translate.py"),
    ("export/translate.py", "or atom not in self._used_once", "", "export/test_translate.py"),
    ("export/translate.py", "and self._first.get(name) is atom", "", "export/test_translate.py"),
    ("export/translate.py", "permutation.index(axis) for axis in x.order", "permutation[axis] for axis in x.order", "export/test_translate.py"),
    ("export/translate.py", "order.index(equation.params[\"dimension\"])", "equation.params[\"dimension\"]", "export/test_translate.py"),
    ("export/quantize.py", "np.abs(kernel).max((1, 2, 3))", "np.abs(kernel).max() + np.zeros(len(kernel))", "export/test_quantize.py"),
    ("export/quantize.py", "smallest = np.abs(bias)", "smallest = 0.0 * np.abs(bias)", "export/test_quantize.py"),
    ("export/quantize.py", "scales * np.float32(x.scale)", "scales", "export/test_quantize.py"),
    ("export/certificate.py", "if not lost <= max_loss", "if lost > max_loss", "export/test_exporter.py"),
    ("export/certificate.py", "/ np.sqrt(len(differences))", "", "export/test_exporter.py"),
    ("export/onnx_model.py", "antialias=1", "antialias=0", "export/test_onnx_model.py"),
    ("export/onnx_model.py", "half = graph.add(\"Mul\"", "half = graph.add(\"Add\"", "export/test_onnx_model.py"),
    ("export/web.js", "difference <= LARGEST_DIFFERENCE", "difference <= 9", "export/test_web.py"),
]  # fmt: skip


def _survives(copy: pathlib.Path, file: str, old: str, new: str, test: str) -> bool:
    path = copy / "cnn_jax" / file
    original = path.read_text()
    path.write_text(original.replace(old, new))
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"tests/{test}"]
    try:
        result = subprocess.run(
            command, cwd=copy, capture_output=True, timeout=_SECONDS, preexec_fn=_limit_memory
        )
        return result.returncode == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        path.write_text(original)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (_BYTES, _BYTES))


def stale() -> list[str]:
    """Returns an error message for each mutation whose text does not occur once in its file."""
    counts = [
        (file, old, (REPOSITORY / "cnn_jax" / file).read_text().count(old))
        for file, old, _, _ in MUTATIONS
    ]
    return [f"{file} has {old!r} {count} times" for file, old, count in counts if count != 1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*", metavar="FILE", help="below cnn_jax/")
    files = parser.parse_args().files
    mutations = [mutation for mutation in MUTATIONS if not files or mutation[0] in files]
    if out_of_date := stale():
        sys.exit(f"the list is out of date: {'; '.join(out_of_date)}")
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "copy"
        ignore = shutil.ignore_patterns(".git", "runs", ".venv")
        shutil.copytree(REPOSITORY, copy, ignore=ignore)
        for mutation in mutations:
            survived = _survives(copy, *mutation)
            survivors += survived
            file, old, new, test = (text.replace("\n", " ") for text in mutation)
            print(f"{'SURVIVED' if survived else 'found'}  {file}: {old} -> {new}  ({test})")
            sys.stdout.flush()
    print(f"{len(mutations) - survivors} of {len(mutations)} found")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
