"""The HTTP server for bundles. This package imports no training code."""
