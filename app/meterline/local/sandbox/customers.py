"""Customers: create, retrieve, list."""

from __future__ import annotations

from dataclasses import dataclass

from meterline.local.sandbox.command import Call, Outcome
from meterline.local.sandbox.errors import found
from meterline.local.sandbox.form import Params
from meterline.local.sandbox.metadata import take_metadata
from meterline.local.sandbox.pagination import PageQuery
from meterline.local.sandbox.state import JsonObject, State

__all__ = ["CreateCustomer", "list_customers", "retrieve_customer"]


@dataclass(frozen=True, slots=True)
class CreateCustomer:
    """`POST /v1/customers`; everything is optional."""

    name: str | None
    email: str | None
    description: str | None
    phone: str | None
    metadata: dict[str, str]

    @classmethod
    def parse(cls, params: Params, _object_id: str) -> CreateCustomer:
        """Take the parameters; raises StripeError 400."""
        return cls(
            name=params.text("name", length_max=256),
            email=params.text("email", length_max=512),
            description=params.text("description"),
            phone=params.text("phone", length_max=50),
            metadata=take_metadata(params),
        )

    def lock(self, _state: State) -> None:
        """A new object is nobody else's."""

    def execute(self, _state: State, call: Call) -> Outcome:
        """Always accepted."""
        customer: JsonObject = {
            "id": f"cus_{call.token}",
            "object": "customer",
            "created": call.now,
            "description": self.description,
            "email": self.email,
            "livemode": False,
            "metadata": self.metadata,
            "name": self.name,
            "phone": self.phone,
        }
        return Outcome(customer, ({"kind": "customer", "object": customer},))


def retrieve_customer(state: State, params: Params, object_id: str, _now: int) -> JsonObject:
    """`GET /v1/customers/{id}`; raises StripeError 404."""
    params.finish()
    return found(state.customers, "customer", object_id)


def list_customers(state: State, params: Params, _object_id: str, _now: int) -> JsonObject:
    """`GET /v1/customers`, filtered by the exact `email` if given."""
    query = PageQuery.parse(params)
    email = params.text("email")
    params.finish()
    newest_first = [
        customer for customer in reversed(state.customers.values()) if email in (None, customer["email"])
    ]
    return query.page("/v1/customers", newest_first)
