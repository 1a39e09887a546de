"""A registry of bundles with names, versions and aliases, and a log of every change."""
