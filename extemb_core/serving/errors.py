"""Report errors to clients in OpenAI's form, with the status that docs/server.md lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from extemb_core.errors import BudgetError, ConfigError, DocumentError

_IN_WORDS = {
    400: "bad_request", 401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 408: "body_timeout",
    413: "body_too_large", 429: "too_many_requests", 500: "internal_error", 503: "out_of_memory", 504: "timeout",
}  # fmt: skip
_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    """An error: a sentence for people, and a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every answer with a status of 400 or more."""

    error: ErrorDetail


class ApiError(Exception):
    """An error with its HTTP status.

    Args:
        status: HTTP status of the answer.
        message: One sentence: value, rule, remedy.
        code: Code for programs; chosen by the status when not given.
        param: The field of the request that is wrong.
        headers: More headers of the answer.
    """

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
        self.headers = dict(headers or {})
        kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        detail = ErrorDetail(message=message, type=kind, param=param, code=code or _IN_WORDS.get(status))
        self.body = ErrorBody(error=detail).model_dump()

    def response(self) -> JSONResponse:
        """Make the HTTP response for the error."""
        return JSONResponse(self.body, self.status, self.headers)


def as_api_error(error: BaseException) -> ApiError:
    """Return the error that a client sees: all about its own mistakes, nothing about the inside of the server."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BudgetError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, ConfigError | DocumentError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    if isinstance(error, HTTPException):  # for unknown routes and methods
        return ApiError(error.status_code, f"{error.detail}; docs/server.md lists what there is", headers=error.headers)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return ApiError(503, "there is no memory for this request; send a smaller one", headers={"Retry-After": "1"})
    return ApiError(500, "the server failed; its log has the reason under the x-request-id of this answer")


def _place_of(error: Mapping[str, Any], body: Any) -> list[str]:
    """Return the place of an error in a request, without the variants of unions that pydantic also names."""
    start, *parts = error["loc"]
    if start != "body":
        return [str(part) for part in parts]
    place = []
    for at, part in enumerate(parts, 1):
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int)):
            body = body[part]
        elif error["type"] != "missing" or at < len(parts):
            continue
        place.append(str(part))
    return place


def _of_validation(error: RequestValidationError) -> ApiError:
    """Say which field is wrong, but never quote its value, which may be a document's text."""
    first = error.errors()[0]
    place = _place_of(first, error.body)
    for other in error.errors()[1:]:  # the variant of a union with the deepest error was meant
        inside = _place_of(other, error.body)
        if len(inside) > len(place) and inside[: len(place)] == place:
            first, place = other, inside
    param = ".".join(place) or None
    if isinstance(error.body, bytes):  # the body was not declared as JSON
        return ApiError(400, "the body is not said to be JSON; send it with the header Content-Type: application/json")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no valid JSON ({first['ctx']['error']}); send a JSON object")
    if first["type"] == "extra_forbidden":
        message, code = f"unknown field {param!r:.200}; leave it out, or correct its name", "unknown_parameter"
    elif first["type"] == "missing":
        message, code = f"{param or 'the body'} is missing; add it", "missing_required_parameter"
    else:
        rule = str(first["msg"])
        message, code = f"{param or 'the body'} is not legal: {rule[0].lower()}{rule[1:]}", "invalid_value"
    return ApiError(400, message, code=code, param=param)
