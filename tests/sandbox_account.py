"""The sandbox over plain HTTP, with nothing of ours or Stripe's between: for tests of its rules.

`SandboxClient` is one connection; `Account` one customer with one meter, whose names nobody else uses.
"""

from __future__ import annotations

import http.client
import json
import uuid
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

from meterline.settings import SANDBOX_API_KEY

MINUTE_S, HOUR_S, DAY_S = 60, 3_600, 86_400


@dataclass(frozen=True)
class Answer:
    status: int
    body: dict
    headers: dict

    @property
    def error(self):
        return self.body["error"]


class SandboxClient:
    def __init__(self, url):
        self._address = urlsplit(url).netloc
        self._connection = http.client.HTTPConnection(self._address, timeout=30)

    def request(self, method, path, *, body=None, content_type=None, key=None, headers=()):
        sent = {"Authorization": f"Bearer {SANDBOX_API_KEY}", **dict(headers)}
        if content_type:
            sent["Content-Type"] = content_type
        if key:
            sent["Idempotency-Key"] = key
        try:
            self._connection.request(method, path, body=body, headers=sent)
            answer = self._connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()  # the next request opens another
            raise
        return Answer(answer.status, json.loads(data), {k.lower(): v for k, v in answer.getheaders()})

    def post(self, path, params=None, *, key=None):
        """Form-encoded, as API v1 wants it: `{"recurring[interval]": "day"}`."""
        form = urlencode(params or {})
        return self.request(
            "POST", path, body=form, content_type="application/x-www-form-urlencoded", key=key
        )

    def post_json(self, path, body, *, key=None):
        return self.request("POST", path, body=json.dumps(body), content_type="application/json", key=key)

    def get(self, path, **params):
        return self.request("GET", f"{path}?{urlencode(params)}" if params else path)

    def made(self, path, params):
        """Of something that must succeed: the object."""
        answer = self.post(path, params)
        assert answer.status == 200, answer.body
        return answer.body

    def metered_price(self, meter, *, interval="month", unit_amount="1"):
        """A new price of a meter's units: its id."""
        return self.made(
            "/v1/prices",
            {
                "currency": "usd",
                "product_data[name]": "Credits",
                "unit_amount_decimal": unit_amount,
                "recurring[interval]": interval,
                "recurring[usage_type]": "metered",
                "recurring[meter]": meter,
            },
        )["id"]

    def control(self, name, **wish):
        answer = self.post_json(f"/_sandbox/{name}", wish)
        assert answer.status == 200, answer.body
        return answer.body

    def now(self):
        return self.get("/_sandbox/clock").body["now"]

    def advance(self, seconds):
        return self.control("clock", advance_s=seconds)["now"]

    def advance_to(self, moment):
        return self.control("clock", set=moment)["now"]


class Account:
    """One customer and one meter; with `subscribe`, also a subscription of one metered price."""

    def __init__(self, client, *, formula="sum", window=None):
        self.client = client
        self.event_name = f"credits_{uuid.uuid4().hex[:8]}"
        self.customer = client.made("/v1/customers", {"name": "Acme"})["id"]
        params = {
            "display_name": "Credits",
            "event_name": self.event_name,
            "default_aggregation[formula]": formula,
        }
        if window:
            params["event_time_window"] = window
        self.meter = client.made("/v1/billing/meters", params)["id"]

    def params(self, identifier, value="1", *, timestamp=None, customer=None):
        params = {
            "event_name": self.event_name,
            "payload[stripe_customer_id]": customer or self.customer,
            "payload[value]": value,
            "identifier": f"{self.event_name} {identifier}",
        }
        return params if timestamp is None else params | {"timestamp": timestamp}

    def send(self, identifier, value="1", *, timestamp=None, customer=None, key=None):
        params = self.params(identifier, value, timestamp=timestamp, customer=customer)
        return self.client.post("/v1/billing/meter_events", params, key=key)

    def use(self, identifier, value="1", *, timestamp=None):
        """Send what must be accepted."""
        answer = self.send(identifier, value, timestamp=timestamp)
        assert answer.status == 200, answer.body

    def total(self):
        """What the summaries add up to; None where there are none."""
        now = self.client.now()
        start = now // DAY_S * DAY_S - 40 * DAY_S
        answer = self.client.get(
            f"/v1/billing/meters/{self.meter}/event_summaries",
            customer=self.customer,
            start_time=start,
            end_time=start + 80 * DAY_S,
        )
        assert answer.status == 200, answer.body
        return answer.body["data"][0]["aggregated_value"] if answer.body["data"] else None

    def price(self, *, interval="month", unit_amount="1"):
        return self.client.metered_price(self.meter, interval=interval, unit_amount=unit_amount)

    def subscribe(self, *, interval="month", unit_amount="1", **more):
        self.price_id = self.price(interval=interval, unit_amount=unit_amount)
        self.subscription = self.client.made(
            "/v1/subscriptions", {"customer": self.customer, "items[0][price]": self.price_id, **more}
        )["id"]
        return self

    def period(self):
        """The current period of its subscription, `(start, end)`."""
        item = self.client.get(f"/v1/subscriptions/{self.subscription}").body["items"]["data"][0]
        return item["current_period_start"], item["current_period_end"]

    def invoices(self, **query):
        """Its invoices of whole periods, oldest first."""
        found = self.client.get("/v1/invoices", subscription=self.subscription, limit=100, **query).body
        assert not found["has_more"]
        return [one for one in reversed(found["data"]) if one["billing_reason"] == "subscription_cycle"]

    def quantities(self):
        """What each of them bills, oldest first."""
        return [one["lines"]["data"][0]["quantity"] for one in self.invoices()]
