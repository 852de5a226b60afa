"""`ApiError`: an answer that is not 200, in the shape that OpenAI's clients read; and our own errors as such."""

from __future__ import annotations

import json
from collections.abc import Mapping

from minicpm.engine import ContextLengthError, QueueFullError
from minicpm.errors import EngineError, MiniCPMError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """Ends a request with `status` and a message for people, `code` and `param` for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, object]:
        """The JSON of the answer."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def encode(self) -> bytes:
        """The bytes of the answer."""
        return json.dumps(self.body, ensure_ascii=False).encode("utf-8", "replace")


class RequestFailure(EngineError):
    """A reply failed, and the request is why."""


def from_failure(error: MiniCPMError) -> ApiError:
    """The answer for a reply that failed on its way."""
    if isinstance(error, RequestFailure):
        return ApiError(400, str(error), code="reply_failed")
    return ApiError(500, f"the reply failed: {error}", code="engine_failed")


def from_engine(error: MiniCPMError, retry_seconds: int = 1) -> ApiError:
    """The answer for an error of ours that a request caused."""
    message = " ".join(str(error).split())
    if isinstance(error, QueueFullError):
        headers = {"retry-after": str(retry_seconds)}
        return ApiError(429, message, code="queue_full", headers=headers)
    if isinstance(error, ContextLengthError):
        return ApiError(400, message, code="context_length_exceeded", param="messages")
    return ApiError(400, message, code="invalid_value")
