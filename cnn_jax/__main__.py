"""The entry point of `python -m cnn_jax COMMAND`; see `cnn_jax.commands`."""

from cnn_jax.commands import main

if __name__ == "__main__":
    main()
