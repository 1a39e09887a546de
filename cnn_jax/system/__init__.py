"""Modules that all commands share: runtime options, signals, terminal output and errors."""
