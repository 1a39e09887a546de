"""The JSON response that all protocols use."""

from typing import Any

import starlette.responses


class JSONResponse(starlette.responses.JSONResponse):
    """A JSON response whose body ends with a newline, so that a shell prompt is on a new line."""

    def render(self, content: Any) -> bytes:
        return super().render(content) + b"\n"
