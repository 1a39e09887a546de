import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import require_devices

from cnn_jax.data import augment, mix
from cnn_jax.data.mix import NO_MIXING, Mixing
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.models.cnn import CNN
from cnn_jax.training import sharding
from cnn_jax.training.optimizer import make_optimizer
from cnn_jax.training.step import (
    MIX,
    Statistics,
    TrainStep,
    eval_step,
    random_key,
    update_statistics,
)

MODEL = CNN(num_classes=3, features=(4, 8), dense=16)
PREPROCESSING = Preprocessing(image_size=(8, 8))
OPTIMIZER = make_optimizer(optax.constant_schedule(1e-2), l2=1e-3)
# With these probabilities, a fifth of the images is not mixed.
MIXING = Mixing(mixup_probability=0.5, mixup_alpha=0.8, cutmix_probability=0.3)


def _state(seed=0):
    return _train_step(seed=seed).init_state()


def _batch(size=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.array(rng.integers(0, 256, (size, 8, 8, 3), np.uint8)),
        "label": jnp.array(rng.integers(0, 3, size), jnp.int32),
        "mask": jnp.ones(size, bool),
    }


def _train_step(model=MODEL, **changes):
    step = TrainStep(
        model=model,
        optimizer=OPTIMIZER,
        preprocessing=PREPROCESSING,
        seed=7,
        label_smoothing=0.1,
    )
    return dataclasses.replace(step, **changes)


def assert_trees_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def _run(steps, state=None, step=None):
    state = state or _state()
    step = step or jax.jit(_train_step())
    losses = []
    for i in range(steps):
        state, metrics = step(state, _batch(seed=i))
        losses.append(metrics.compute()["loss"])
    return state, losses


# If the assertion below fails, its message has the new values of these constants.
GOLDEN_LOSSES = [1.127901, 1.153979, 1.107676, 1.154224, 1.161832]
GOLDEN_PARAMETER_NORM = 8.181040


def test_golden_numbers():
    state, losses = _run(5)
    norm = float(optax.tree.norm(state.params))
    message = (
        "The training step computes different numbers than before. Earlier results cannot be "
        "reproduced, and runs do not resume bit for bit. If that is intended, put these numbers "
        "into the test, mention it in CHANGELOG.md and measure the results in RESULTS.md again: "
        f"GOLDEN_LOSSES = {[round(loss, 6) for loss in losses]}, "
        f"GOLDEN_PARAMETER_NORM = {norm:.6f}"
    )
    assert [norm, *losses] == pytest.approx([GOLDEN_PARAMETER_NORM, *GOLDEN_LOSSES], rel=1e-4), (
        message
    )


def test_a_step_is_a_function_of_state_batch_and_seed():
    first, losses = _run(3)
    second, same_losses = _run(3)
    assert losses == same_losses
    assert_trees_equal(first, second)


def test_dropout_depends_on_step_and_seed():
    state, batch = _state(), _batch()
    losses = set()
    for step in range(3):
        at_step = state.replace(step=jnp.array(step, jnp.int32))
        losses.add(float(_train_step()(at_step, batch)[1].loss_sum.sum()))
    other_seed = _train_step(seed=8)
    losses.add(float(other_seed(state, batch)[1].loss_sum.sum()))
    assert len(losses) == 4


def test_class_weights_multiply_the_losses_of_their_examples():
    batch = _batch(size=12)
    labels = np.asarray(batch["label"])
    optimizer = optax.sgd(1.0)
    state = _state().replace(opt_state=optimizer.init(_state().params))

    def update(class_weights=None, mask=None):
        step = _train_step(optimizer=optimizer, class_weights=class_weights)
        after, _ = step(state, batch | {"mask": batch["mask"] if mask is None else mask})
        return jax.tree.map(lambda new, old: new - old, after.params, state.params)

    def class_update(label):
        """Returns the part of an update that comes from the examples of one class."""
        fraction = np.mean(labels == label)
        return jax.tree.map(lambda g: g * fraction, update(mask=jnp.array(labels == label)))

    weights = (1.0, 3.0, 0.25)
    expected = jax.tree.map(
        lambda *parts: sum(w * part for w, part in zip(weights, parts, strict=True)),
        *(class_update(label) for label in range(3)),
    )
    for actual, wanted in zip(
        jax.tree.leaves(update(weights)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-6)


def test_one_step_applies_the_gradient_of_the_smoothed_loss():
    model = MODEL.clone(dropout=0.0)
    state, batch = _state(), _batch()

    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        images = (batch["image"].astype(np.float32) - 127.5) / 127.5
        logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        targets = 0.9 * jax.nn.one_hot(batch["label"], 3) + 0.1 / 3
        return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))

    grads = jax.grad(loss)(state.params)
    updates, _ = OPTIMIZER.update(grads, state.opt_state, state.params)
    expected = optax.apply_updates(state.params, updates)
    new_state, _ = jax.jit(_train_step(model))(state, batch)
    assert int(new_state.step) == 1
    assert_trees_equal(new_state.batch_stats, state.batch_stats)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), new_state.params, expected
    )


@pytest.mark.parametrize("mixing", [NO_MIXING, MIXING])
def test_labels_of_masked_rows_have_no_effect(mixing):
    step = jax.jit(_train_step(mixing=mixing))
    batch = _batch() | {"mask": jnp.arange(8) < 6}
    other = batch | {"label": jnp.where(batch["mask"], batch["label"], 2 - batch["label"])}
    state, metrics = step(_state(), batch)
    other_state, other_metrics = step(_state(), other)
    assert_trees_equal(state.params, other_state.params)
    np.testing.assert_array_equal(metrics.confusion, other_metrics.confusion)
    assert int(metrics.confusion.sum()) == 6


def test_augmentation_draws_are_applied_on_the_device():
    batch = _batch()
    rng = np.random.default_rng(0)
    draws = augment.draw(rng, augment.Augmentation("horizontal", 0.2, 0.2, 0.2), 8, (8, 8))
    draws = jax.tree.map(jnp.array, draws)
    moved = augment.apply_on_device(batch["image"], **draws)
    rounded = jnp.rint(moved).astype(jnp.uint8)
    _, on_device = _train_step()(_state(), batch | draws)
    _, on_host = _train_step()(_state(), batch | {"image": rounded})
    np.testing.assert_allclose(on_device.loss_sum.sum(), on_host.loss_sum.sum(), rtol=0.02)
    _, unmoved = _train_step()(_state(), batch)
    assert abs(float(unmoved.loss_sum.sum()) - float(on_device.loss_sum.sum())) > 0.05


def test_evaluation_of_a_padded_batch_ignores_the_padding():
    variables = _state().variables
    step = jax.jit(functools.partial(eval_step, model=MODEL, preprocessing=PREPROCESSING))
    whole = step(variables, _batch(5))
    padded = {key: jnp.concatenate([rows, rows[:3]]) for key, rows in _batch(5).items()}
    padded["mask"] = jnp.arange(8) < 5
    metrics = step(variables, padded)
    np.testing.assert_array_equal(metrics.confusion, whole.confusion)
    np.testing.assert_allclose(metrics.loss_sum, whole.loss_sum, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "mixing"),
    [
        *((shape, NO_MIXING) for shape in [(2, 1), (4, 1), (8, 1), (4, 2), (2, 4)]),
        ((4, 2), MIXING),
    ],
)
def test_many_devices_train_like_one_device(shape, mixing, monkeypatch):
    """Batch statistics and metrics are those of the whole batch, not of the rows of one device."""
    monkeypatch.setattr(sharding, "_LEAST_DIVIDED", 64)
    data, model = shape
    require_devices(data * model)
    mesh = sharding.make_mesh(model, jax.devices()[: data * model])
    layout = sharding.Layout(mesh, 8)
    replicated, batch_sharding = layout.replicated, layout.batch_sharding
    state_sharding = sharding.split_large(mesh, jax.eval_shape(_state))
    train = _train_step(mixing=mixing)
    jitted = jax.jit(
        train,
        in_shardings=(state_sharding, batch_sharding),
        out_shardings=(state_sharding, replicated),
    )

    def step(state, batch):
        rows = jax.tree.map(np.asarray, batch)
        return jitted(state, layout.to_devices(rows))

    many, many_losses = _run(20, jax.device_put(_state(), state_sharding), step)
    one, losses = _run(20, step=jax.jit(train))
    np.testing.assert_allclose(many_losses, losses, rtol=2e-5)
    add = functools.partial(update_statistics, model=MODEL, preprocessing=PREPROCESSING)
    add_on_many = jax.jit(
        add,
        in_shardings=(replicated, state_sharding.variables, batch_sharding),
        out_shardings=replicated,
    )
    empty, batch = Statistics.empty(one.batch_stats), jax.tree.map(np.asarray, _batch())
    batch_on_many = layout.to_devices(batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        add_on_many(empty, many.variables, batch_on_many),
        jax.jit(add)(empty, one.variables, batch),
    )
    head, conv = many.params["head"]["kernel"], many.params["conv2"]["kernel"]
    assert len(head.sharding.device_set) == data * model
    # The head is replicated, because 3 classes cannot be divided among the devices.
    assert head.sharding.is_fully_replicated
    assert conv.sharding.shard_shape(conv.shape) == (3, 3, 4, 8 // model)
    (adam,) = (part for part in many.opt_state[1] if hasattr(part, "mu"))
    assert adam.mu["conv2"]["kernel"].sharding == conv.sharding


def _statistics(batches, variables, model=MODEL):
    statistics = Statistics.empty(variables.get("batch_stats", {}))
    add = jax.jit(functools.partial(update_statistics, model=model, preprocessing=PREPROCESSING))
    for batch in batches:
        statistics = add(statistics, variables, batch)
    assert int(statistics.batches) == len(batches)
    return statistics.batch_stats


def test_statistics_are_mean_and_variance_over_all_batches():
    """Compares the statistics of the first layer with a computation in NumPy.

    The input of the first layer does not depend on statistics.
    """
    state, _ = _run(3)
    batches = [_batch(seed=seed) for seed in range(5)]
    # The batches differ in brightness, so that most of the variance is between batches.
    for i, batch in enumerate(batches):
        batch["image"] = batch["image"] // 4 + jnp.uint8(48 * i)
    found = _statistics(batches, state.variables)
    images = jnp.concatenate([batch["image"] for batch in batches]).astype(jnp.float32)
    kernel, bias = (state.params["conv1"][name] for name in ("kernel", "bias"))
    convolved = jax.lax.conv_general_dilated(
        (images - 127.5) / 127.5, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    activations = np.maximum(np.asarray(convolved, np.float64) + np.asarray(bias, np.float64), 0)
    np.testing.assert_allclose(found["norm1"]["mean"], activations.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(found["norm1"]["var"], activations.var((0, 1, 2)), rtol=1e-4)


def test_statistics_do_not_depend_on_earlier_statistics():
    """Initial statistics and statistics of earlier parameters have no effect on new statistics."""
    state = _state()
    batches = [_batch(seed=seed) for seed in range(2)]
    other = jax.tree.map(lambda leaf: leaf + 100, state.batch_stats)
    assert_trees_equal(
        _statistics(batches, state.variables),
        _statistics(batches, {"params": state.params, "batch_stats": other}),
    )


def test_inference_with_batch_statistics_equals_training_mode():
    model = MODEL.clone(dropout=0.0)
    state, batch = _state(), _batch()
    found = _statistics([batch], state.variables)
    images = (batch["image"].astype(jnp.float32) - 127.5) / 127.5
    in_training, _ = model.apply(state.variables, images, train=True, mutable=["batch_stats"])
    in_inference = model.apply({"params": state.params, "batch_stats": found}, images)
    np.testing.assert_allclose(in_inference, in_training, rtol=1e-4, atol=1e-5)


def test_a_network_without_batch_norm_has_no_statistics():
    variables = _plain_state().variables
    assert _statistics([_batch()], {"params": variables["params"]}, PLAIN) == {}


PLAIN = CNN(num_classes=3, features=(4, 8), dense=16, dropout=0.0, batch_norm=False)


def _plain_state():
    return _train_step(PLAIN, seed=0).init_state()


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_batch_in_parts_trains_like_the_whole_batch(parts):
    """Without BatchNorm and dropout, a batch that is split into parts gives the same update."""
    weights = (0.5, 1.0, 1.5)
    whole = jax.jit(_train_step(PLAIN, class_weights=weights))
    in_parts = jax.jit(_train_step(PLAIN, class_weights=weights, accumulation_steps=parts))
    first, second = _plain_state(), _plain_state()
    for i in range(5):
        # Because of the mask, the parts have different numbers of valid examples.
        batch = _batch(16, seed=i) | {"mask": jnp.arange(16) < 11}
        first, metrics = whole(first, batch)
        second, metrics_of_parts = in_parts(second, batch)
        np.testing.assert_array_equal(metrics.confusion, metrics_of_parts.confusion)
        np.testing.assert_allclose(metrics.loss_sum, metrics_of_parts.loss_sum, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), first.params, second.params
    )
    assert int(second.step) == 5


def test_each_part_of_a_batch_has_its_own_dropout():
    """Two equal parts of a batch have different losses: each part has its own dropout mask."""
    model = CNN(num_classes=3, features=(4, 8), dense=64, dropout=0.5, batch_norm=False)
    state = _train_step(model, seed=0).init_state()
    twice = jax.tree.map(lambda rows: jnp.repeat(rows, 2, axis=0), _batch(4))
    _, metrics = _train_step(model, accumulation_steps=2)(state, twice)
    _, half = _train_step(model)(state, _batch(4))
    assert not np.allclose(metrics.loss_sum, 2 * half.loss_sum, rtol=1e-3)


def test_division_into_parts_moves_no_row_between_devices():
    require_devices(2)
    mesh = sharding.make_mesh()
    batch_sharding = sharding.Layout(mesh, 8).batch_sharding
    step = _train_step(PLAIN, accumulation_steps=2)
    replicated = sharding.replicated(mesh)
    lowered = jax.jit(
        step, in_shardings=(replicated, batch_sharding), out_shardings=replicated
    ).lower(_plain_state(), _batch(16))
    program = lowered.compile().as_text()
    assert "all-reduce" in program
    assert "all-to-all" not in program
    assert "all-gather" not in program


def test_the_donated_state_is_reused():
    step = jax.jit(_train_step(), donate_argnums=0)
    state = _state()
    step(state, _batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


# Tests of training with mixed images.


def _mixed_by_hand(batch, key):
    """Returns the expected mixed images of a batch, normalised, and the expected soft targets."""
    images = (batch["image"].astype(jnp.float32) - 127.5) / 127.5
    one_hot = jax.nn.one_hot(batch["label"], 3)
    return mix.mix_batch(key, images, one_hot, batch["mask"], MIXING)


def _mix_key(step):
    return jax.random.fold_in(random_key(7, MIX), step)


def test_one_step_applies_the_gradient_of_the_mixed_loss():
    model = MODEL.clone(dropout=0.0)
    state, batch = _state().replace(step=jnp.array(4, jnp.int32)), _batch()
    images, targets = _mixed_by_hand(batch, _mix_key(4))
    # This test needs images that are mixed and images that are not mixed.
    assert 0 < np.isin(targets, (0, 1)).all(axis=1).sum() < 8
    weights = (0.5, 1.0, 3.0)

    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        smoothed = 0.9 * targets + 0.1 / 3
        losses = -jnp.sum(smoothed * jax.nn.log_softmax(logits), axis=-1)
        return jnp.mean(losses * jnp.sum(targets * jnp.array([weights]), axis=-1)), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
    updates, _ = OPTIMIZER.update(grads, state.opt_state, state.params)
    expected = optax.apply_updates(state.params, updates)
    step = _train_step(model, mixing=MIXING, class_weights=weights)
    new_state, metrics = jax.jit(step)(state, batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), new_state.params, expected
    )
    # In the metrics, the class of a mixed image is the class with the larger weight.
    largest = np.argmax(targets, axis=-1)
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (largest, np.argmax(logits, axis=-1)), 1)
    np.testing.assert_array_equal(metrics.confusion, confusion)
    losses = -jax.nn.log_softmax(logits)[np.arange(8), largest]
    np.testing.assert_allclose(metrics.loss_sum.sum(), losses.sum(), rtol=1e-5)


def test_mixing_depends_on_step_and_seed_only():
    """The network has no dropout, so that only mixing uses random numbers."""
    step = jax.jit(_train_step(PLAIN, mixing=MIXING))
    state, batch = _plain_state(), _batch()
    first, _ = step(state, batch)
    same, _ = step(state, batch)
    assert_trees_equal(first, same)
    later, _ = step(state.replace(step=jnp.array(1, jnp.int32)), batch)
    with_other_seed = _train_step(PLAIN, mixing=MIXING, seed=8)
    other_seed, _ = jax.jit(with_other_seed)(state, batch)
    kernels = {np.asarray(s.params["head"]["kernel"]).tobytes() for s in (first, later, other_seed)}
    assert len(kernels) == 3


def test_without_mixing_nothing_is_computed_for_it():
    """If MixUp and CutMix are off, the values of alpha have no effect on the program."""
    idle = Mixing(mixup_alpha=3.0, cutmix_alpha=5.0)
    plain, same, mixed = (
        jax.jit(_train_step(mixing=mixing)).lower(_state(), _batch()).as_text()
        for mixing in (NO_MIXING, idle, MIXING)
    )
    assert plain == same
    assert len(mixed) > 1.1 * len(plain)


def test_each_part_of_a_batch_is_mixed_within_itself():
    """MixUp and CutMix combine an image only with images of the same microbatch.

    Part 0 has the even rows, and part 1 has the odd rows; the network has no BatchNorm.
    """
    state, batch = _plain_state(), _batch(16)
    images, targets = jnp.zeros((16, 8, 8, 3)), jnp.zeros((16, 3))
    for part, key in enumerate(jax.random.split(_mix_key(0), 2)):
        rows = jax.tree.map(lambda values, part=part: values[part::2], batch)
        mixed, labels = _mixed_by_hand(rows, key)
        images, targets = images.at[part::2].set(mixed), targets.at[part::2].set(labels)

    def loss(params):
        logits = PLAIN.apply({"params": params}, images, train=True)
        smoothed = 0.9 * targets + 0.1 / 3
        return -jnp.mean(jnp.sum(smoothed * jax.nn.log_softmax(logits), axis=-1))

    updates, _ = OPTIMIZER.update(
        jax.jit(jax.grad(loss))(state.params), state.opt_state, state.params
    )
    expected = optax.apply_updates(state.params, updates)
    step = _train_step(PLAIN, mixing=MIXING, accumulation_steps=2)
    after, _ = jax.jit(step)(state, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), after.params, expected)


# Tests of the moving average of the parameters.


def test_the_average_is_computed_from_the_parameters_of_each_step():
    """The decays of three steps with a limit of 0.15 are 1/10, 0.15 and 0.15."""
    step = jax.jit(_train_step(ema=0.15))
    state = _train_step(ema=0.15).init_state()
    assert_trees_equal(state.average, state.params)
    expected = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    for i, decay in enumerate((0.1, 0.15, 0.15)):
        state, _ = step(state, _batch(seed=i))
        expected = jax.tree.map(
            lambda old, new, d=decay: d * old + (1 - d) * np.asarray(new), expected, state.params
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        state.average,
        expected,
    )
    assert state.variables["params"] is state.average


def test_an_average_does_not_change_the_training():
    averaged, losses = _run(
        3, _train_step(ema=0.9, seed=0).init_state(), jax.jit(_train_step(ema=0.9))
    )
    plain, plain_losses = _run(3)
    assert losses == plain_losses
    assert_trees_equal(averaged.params, plain.params)
    assert plain.variables["params"] is plain.params


def test_the_average_starts_from_replaced_parameters_in_other_memory():
    """The state is donated, and a buffer cannot be donated twice."""
    state = _train_step(ema=0.9).init_state()
    params = jax.tree.map(lambda leaf: leaf + 1, state.params)
    state = state.with_params(params)
    assert_trees_equal(state.average, params)
    jax.jit(_train_step(ema=0.9), donate_argnums=0)(state, _batch())


# Tests of frozen parameters and of additional loss terms.


def test_frozen_parameters_do_not_change_the_training_of_others():
    """The optimizer has state only for the parameters that are trained."""
    step = _train_step(is_trainable=lambda path: not path.startswith("conv1/"))
    state = step.init_state()
    assert_trees_equal(state.params, _train_step().init_state().params)
    after, metrics = jax.jit(step)(state, _batch())
    whole, whole_metrics = jax.jit(_train_step())(_train_step().init_state(), _batch())
    assert_trees_equal(after.params["conv1"], state.params["conv1"])
    np.testing.assert_array_equal(metrics.confusion, whole_metrics.confusion)
    for name in state.params.keys() - {"conv1"}:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            after.params[name],
            whole.params[name],
        )
    sizes = [leaf.size for leaf in jax.tree.leaves(state.opt_state)]
    trained = sum(
        leaf.size
        for name in state.params.keys() - {"conv1"}
        for leaf in jax.tree.leaves(state.params[name])
    )
    # The state has Adam's two moments of each trained parameter, and two counts.
    assert sum(sizes) == 2 * trained + 2


def test_gradients_of_frozen_parameters_are_not_computed():
    """Training only the head needs less than half of the operations of a full training step."""
    head_only = _train_step(is_trainable=lambda path: path.startswith("head/"))

    lowered = jax.jit(head_only).lower(head_only.init_state(), _batch()).compile()
    whole = jax.jit(_train_step()).lower(_state(), _batch()).compile()
    assert lowered.cost_analysis()["flops"] < 0.5 * whole.cost_analysis()["flops"]


def test_an_extra_loss_is_added_for_each_example():
    """The extra loss is distillation: the cross-entropy with the predictions of a teacher."""
    model = MODEL.clone(dropout=0.0)
    teacher_kernel = np.random.default_rng(0).normal(size=(8 * 8 * 3, 3)).astype(np.float32)

    def distil(images, logits, _):
        teacher = jax.nn.softmax(images.reshape(len(images), -1) @ teacher_kernel)
        return -0.7 * jnp.sum(teacher * jax.nn.log_softmax(logits), axis=-1)

    optimizer = optax.sgd(1.0)
    plain = _train_step(model, optimizer=optimizer)
    state, batch = plain.init_state(), _batch() | {"mask": jnp.arange(8) < 6}

    def update(step):
        after, metrics = jax.jit(step)(state, batch)
        return jax.tree.map(jnp.subtract, after.params, state.params), metrics

    both, metrics = update(dataclasses.replace(plain, extra_loss=distil))
    plain_update, plain_metrics = update(plain)
    # The extra loss does not change the metrics.
    np.testing.assert_allclose(metrics.loss_sum, plain_metrics.loss_sum)

    def extra(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        images = (batch["image"].astype(np.float32) - 127.5) / 127.5
        logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.where(batch["mask"], distil(images, logits, None), 0)) / 6

    expected = jax.tree.map(
        lambda a, g: a - g, plain_update, jax.jit(jax.grad(extra))(state.params)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), both, expected)
