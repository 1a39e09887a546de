"""The errors that a program may catch; the message of each error is one line."""

from cnn_jax.system.errors import BundleError as BundleError
from cnn_jax.system.errors import ConfigError as ConfigError
from cnn_jax.system.errors import DataError as DataError
from cnn_jax.system.errors import Interrupted as Interrupted
from cnn_jax.system.errors import TrainingError as TrainingError
from cnn_jax.system.errors import UserError as UserError
