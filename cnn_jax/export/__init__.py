"""Exports of bundles to ONNX and other formats, each with a certificate of its accuracy."""
