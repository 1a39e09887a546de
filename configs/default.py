"""The whole recipe: the specification's network on the embedded data set.

    cnn_jax train --config=configs/default.py --workdir=runs/first

Expect a test accuracy of 96.85 ± 0.83 % (three seeds) after 22 epochs, in two to four
minutes on two CPU cores, which includes making the data set on the first use.
"""

from ml_collections import ConfigDict

from cnn_jax.config.files import Config


def get_config() -> Config:
    config = ConfigDict()
    config.seed = 0  # Decides the division, the first weights and all random draws.
    config.precision = "auto"  # bfloat16 on GPU and TPU, float32 on CPU; or name one of them.

    config.data = data = ConfigDict()
    data.source = "shapes"  # Or {folder,classes,splits,csv}:PATH, tfds:NAME, shapes:N; see README.
    data.split = (0.7, 0.2, 0.1)  # Train, validation and test; of each class.
    data.stratify = "stable"  # Added images move no other ones; "exact" fractions move a few.
    data.group = ""  # A pattern such as "{class}/{track}" keeps images together.
    data.keep_splits = True  # Uses the train, validation and test parts that the data has.
    data.image_size = (32, 32)  # Height and width of the input in pixels; or one number.
    data.resize = "stretch"  # This, "crop" (the centre) or "pad" (with grey) to the image size.
    data.crop_ratio = 1.0  # Side of the centre crop, of the resized image's side; for "crop" only.
    data.interpolation = "bilinear"  # This or "bicubic".
    data.mean = (127.5, 127.5, 127.5)  # Subtracted from R, G and B: inputs are in [-1, 1].
    data.std = (127.5, 127.5, 127.5)  # The difference is divided by these.
    data.cache = "auto"  # Decoded images: on the "device", in "memory", on "disk" or "none".
    data.workers = -1  # Processes that decode and augment; -1: as many as help.
    data.max_pixels = 50_000_000  # A larger image is refused before it is decoded.
    data.white_level = 0.0  # The value that is white in 16-bit and float images; 0: by the file.
    data.max_unreadable = 0.01  # The fraction of unreadable images that may be left out.
    data.allow_outside = False  # Whether links and paths may lead out of the data's folder.

    config.augment = augment = ConfigDict()
    augment.flip = "horizontal"  # This, "vertical", "horizontal_and_vertical" or "none".
    augment.rotation = 0.2  # At most this fraction of a full turn, either way.
    augment.zoom = 0.2  # At most this fraction, in or out.
    augment.contrast = 0.2  # At most this fraction more or less.
    augment.mixup_probability = 0.0  # The fraction of images that are blended with another one.
    augment.mixup_alpha = 0.2  # Weights of the blend are drawn from Beta(alpha, alpha).
    augment.cutmix_probability = 0.0  # The fraction of images that get a box of another one.
    augment.cutmix_alpha = 1.0  # Areas of the box are drawn from Beta(alpha, alpha).
    augment.place = "auto"  # Pixels move on the "device", or on the "host" if the device is a CPU.

    config.model = model = ConfigDict()
    model.name = "cnn"  # The network; see cnn_jax/models.
    model.features = (32, 64, 128)  # Channels of each convolution.
    model.dense = 256  # Units of the hidden layer; 0: no hidden layer.
    model.dropout = 0.5  # The fraction of hidden units that a training step leaves out.
    # Its statistics are estimated after each epoch: in short runs a running average lags behind.
    model.batch_norm = True  # BatchNorm after each convolution.

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 1e-3  # Adam's, at the start of the cosine.
    optimizer.final_learning_rate = 1e-4  # At the end of the cosine.
    optimizer.decay_epochs = 0  # Length of the cosine; 0: train.epochs at the first start.
    optimizer.warmup_epochs = 0.0  # Epochs in which the learning rate rises from 0.
    optimizer.l2 = 1e-4  # Weight of the L2 term, of convolution and dense kernels only.

    config.train = train = ConfigDict()
    train.batch_size = 32  # Images in a step, on all devices together.
    train.steps_per_execution = 0  # Steps dispatched at once; 0: 8 if the data is on a GPU or TPU.
    train.accumulation_steps = 1  # Parts of a batch that are computed one after the other.
    train.epochs = 22  # Passes over the training images; the specification has 45.
    train.label_smoothing = 0.1  # The probability that the target spreads over all classes.
    train.balance = "none"  # "loss" or "sampling" makes rare classes count as much as others.
    train.patience = 10  # Epochs without a better `monitor` before training stops.
    train.monitor = "validation_accuracy"  # Decides the best epoch; also _f1, _loss, ...

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.keep = 2  # The latest ones; the best and the one before it are kept too.
    checkpoint.every_steps = 0  # Steps between checkpoints within an epoch; 0: none within.
    checkpoint.restore_step = 0  # Goes back, once, to the checkpoint of this step.
    checkpoint.init_from = ""  # A bundle or a run whose weights a new run starts from.

    config.report = report = ConfigDict()
    report.detail = "full"  # "figures" leaves out explanations and corruptions; "none" all.
    report.splits = ("train", "validation", "test")  # Measured at the end; a report needs all.

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # Devices that share a batch; -1: all there are.
    mesh.model = 1  # Devices that share the large parameters.
    return config
