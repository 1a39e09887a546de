"""The JSON response and the request ids that all protocols use."""

import secrets
import time
from typing import Any

import starlette.responses


class JSONResponse(starlette.responses.JSONResponse):
    """A JSON response whose body ends with a newline, so that a shell prompt is on a new line."""

    def render(self, content: Any) -> bytes:
        return super().render(content) + b"\n"


def new_request_id() -> str:
    """Returns a new id of 32 hexadecimal digits; the first 12 are the time in milliseconds."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"
