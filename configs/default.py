"""The whole recipe: the specification's network on the embedded data set.

    python -m cnn_jax.main --config=configs/default.py --workdir=runs/first

Expect a test accuracy of 96.85 ± 0.83 % (three seeds) after 22 epochs, in two to four
minutes on two CPU cores, which includes making the data set on the first use.
"""

from ml_collections import ConfigDict

from cnn_jax.configuration import Config


def get_config() -> Config:
    config = ConfigDict()
    config.seed = 0
    config.precision = "auto"  # bfloat16 arithmetic on GPU and TPU, float32 on CPU.

    config.data = data = ConfigDict()
    data.source = "shapes"
    data.split = (0.7, 0.2, 0.1)  # Train, validation, test; by class.
    data.stratify = "stable"  # Added images move no other; "exact" shares move a few.
    data.group = ""  # Such as "{class}/{track}": what has these in common stays together.
    data.keep_splits = True  # Of a data set that has train, validation or test already.
    data.image_size = (32, 32)  # The specification's is 224; this one suits a CPU.
    data.mean = (127.5, 127.5, 127.5)  # Grey levels, R G B: inputs lie in [-1, 1].
    data.std = (127.5, 127.5, 127.5)
    data.cache = "auto"  # Decoded images on the device, in memory or on disk, as they fit.
    data.workers = -1  # As many processes as help.
    data.max_pixels = 50_000_000  # A larger image is refused before it is decoded.
    data.white_level = 0.0  # Value that is white in 16-bit and float images; 0: by the file.
    data.max_unreadable = 0.01  # The share of images that may be left out as unreadable.
    data.allow_outside = False  # Whether links and paths may lead out of the data's folder.

    config.augment = augment = ConfigDict()
    augment.flip = "horizontal"
    augment.rotation = 0.2  # Either way, of a full turn.
    augment.zoom = 0.2
    augment.contrast = 0.2
    augment.mixup_probability = 0.0  # Of an image to be blended with another of its batch.
    augment.mixup_alpha = 0.2  # In shares drawn from Beta(alpha, alpha).
    augment.cutmix_probability = 0.0  # Of an image to get a box of another.
    augment.cutmix_alpha = 1.0  # The same, of the area.
    augment.place = "auto"  # The pixels move on the device, or beside it if it is a CPU.

    config.model = model = ConfigDict()
    model.name = "cnn"
    model.features = (32, 64, 128)
    model.dense = 256  # 0: no hidden layer.
    model.dropout = 0.5
    # Its statistics for inference are estimated anew from training images after each epoch: a
    # running average lags behind in short runs (experiments/RESULTS.md, "BatchNorm").
    model.batch_norm = True

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 1e-3
    optimizer.final_learning_rate = 1e-4  # Where the cosine ends.
    optimizer.decay_epochs = 0  # The cosine's length; 0: train.epochs as the run started with.
    optimizer.warmup_epochs = 0.0
    optimizer.l2 = 1e-4  # Of convolution and dense kernels alone.

    config.train = train = ConfigDict()
    train.batch_size = 32  # Of all devices together.
    train.steps_per_execution = 0  # Dispatched at a time; 0: some, if the data is on a GPU or TPU.
    train.accumulation_steps = 1  # In how many parts a batch goes through, one after the other.
    train.epochs = 22  # The specification's 45 would take more than five minutes on a CPU.
    train.label_smoothing = 0.1
    train.balance = "none"  # Or "loss" or "sampling": rare classes count for as much.
    train.patience = 10  # Epochs without a better `monitor` before training stops.
    train.monitor = "validation_accuracy"

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.keep = 2  # The latest, beside that of the best epoch and the one before it.
    checkpoint.every_steps = 0  # Within epochs as well, after an execution; 0: at their ends alone.
    checkpoint.restore_step = 0  # Goes back, once, to the checkpoint of this step.
    checkpoint.init_from = ""  # A bundle or a run, whose weights a new run starts from.

    config.report = report = ConfigDict()
    report.detail = "full"  # Or "figures", without explanations and corruptions; or "none".
    report.splits = ("train", "validation", "test")  # What is measured; detail needs all.

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # Devices that share a batch; -1: all there are.
    mesh.model = 1  # Devices that share the large parameters.
    return config
