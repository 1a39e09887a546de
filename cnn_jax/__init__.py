"""cnn_jax: a folder of labelled images becomes a trained, measured classifier."""

__version__ = "0.1.0"
