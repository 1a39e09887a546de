"""Parts that all commands share: runtime options, signals, the terminal, errors."""
