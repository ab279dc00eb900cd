"""Stripe's error answers, as exceptions that anything below the HTTP layer may raise."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

__all__ = ["StripeError", "found"]

Object = TypeVar("Object")


class StripeError(Exception):
    """One error answer.

    Attributes:
        status: HTTP status.
        kind: the `type` of the error object.
        code, param: None leaves the key out, as Stripe does.
        should_retry: the `Stripe-Should-Retry` header, which outranks the status in Stripe's SDKs; None: no
            header.
        report_code: what Stripe's reports call it where the same is found after a 200.
        headers: further ones of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        should_retry: bool | None = None,
        report_code: str | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.should_retry = should_retry
        self.report_code = report_code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The JSON answer: `{"error": {"type", "message", "code"?, "param"?}}`."""
        error = {"type": self.kind, "message": self.message}
        if self.code is not None:
            error["code"] = self.code
        if self.param is not None:
            error["param"] = self.param
        return {"error": error}

    @classmethod
    def missing_object(cls, noun: str, object_id: str, *, param: str = "id") -> StripeError:
        """An id nobody knows: 404 where it stands in the path, 400 where it is a parameter."""
        return cls(
            404 if param == "id" else 400,
            f"No such {noun}: '{object_id}'",
            code="resource_missing",
            param=param,
        )


def found(objects: Mapping[str, Object], noun: str, object_id: str, *, param: str = "id") -> Object:
    """The object of an id; raises StripeError as `missing_object`."""
    if object_id not in objects:
        raise StripeError.missing_object(noun, object_id, param=param)
    return objects[object_id]
