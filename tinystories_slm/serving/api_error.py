"""Errors of a request, in the format of OpenAI's interface."""

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """A request that is rejected or fails, with an HTTP status and a body in OpenAI's format."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        error = {"message": self.message, "type": self._type(), "param": self.param, "code": self.code}
        return {"error": error}

    def _type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"


def field_error(param: str, message: str, *, code: str | None = None) -> ApiError:
    """Return the error of a field with an invalid value: status 400."""
    return ApiError(400, message, param=param, code=code)
