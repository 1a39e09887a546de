"""The spellings of the names of explanation methods; this module does not import JAX."""

from collections.abc import Iterable


def method_named(text: str, methods: Iterable[str]) -> str | None:
    """Finds a method by its name in any usual spelling: grad_cam, grad-cam, GradCAM, gradcam.

    Args:
      text: The name as a user wrote it.
      methods: The names of the methods, such as the keys of `maps.METHODS`.

    Returns:
      The name of the method; None if there is no such method.
    """

    def folded(name: str) -> str:
        return name.lower().replace("++", "plusplus").replace("-", "").replace("_", "")

    return next((name for name in methods if folded(name) == folded(text)), None)
