"""Every answer Stripe documents, given by a real server on loopback through the real SDK."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs

import pytest

from meterline.billing.clock import StripeClock
from meterline.billing.outcomes import Answer
from meterline.billing.pace import Pace
from meterline.billing.send import FRESH_S, StripeSender, stripe_client
from meterline.domain.usage_records import UsageRecord
from meterline.settings import StripeSettings

CLOCK = StripeClock()
OURS = "mlur_0123"
EXISTS = "An event already exists with identifier "
RECORD = UsageRecord(
    identifier=OURS,
    client_id="acme",
    meter="credits",
    map_version=1,
    period_start=0,
    period_end=10**13,
    window_id="00" * 16,
    window_start=0,
    window_end=60_000,
    source_topic_id="t",
    source_partition=0,
    cutoff_offset=7,
    event_name="meterline_credits",
    customer="cus_1",
    value=-3,
    event_timestamp=1_700_000_000,
    attempt_key=2,
)
EVENT = {"object": "billing.meter_event", "identifier": OURS, "event_name": "meterline_credits"}


def error(kind="invalid_request_error", message="no", **more):
    return {"error": {"type": kind, "message": message, **more}}


class Stripe(ThreadingHTTPServer):
    """Gives the one answer it is told to, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = (200, json.dumps(EVENT).encode())
        self.mode = "whole"
        self.requests = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers), parse_qs(body.decode())))
        status, data = self.server.answer
        if self.server.mode == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if self.server.mode == "slow":
            time.sleep(0.6)
        self.send_response(status)
        self.send_header("Request-Id", "req_7")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if self.server.mode == "truncate" else data)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def stripe_server():
    with Stripe() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def sender(stripe_server):
    sender = sender_of(stripe_server, per_second=1000)
    yield sender
    sender.close()


def sender_of(stripe_server, per_second):
    """It owns the only partition there is."""
    settings = StripeSettings(sandbox_url=f"http://127.0.0.1:{stripe_server.server_port}", timeout_s=0.3)
    sender = StripeSender(stripe_client(settings, CLOCK), Pace(per_second), clock=CLOCK)
    sender.own(0)
    return sender


def request(sender):
    return sender._request(RECORD, CLOCK.boot_s())


class Case(NamedTuple):
    """One answer and what it means."""

    name: str
    status: int
    body: dict | bytes
    mode: str
    answer: Answer
    new_key: bool = False
    request_id: str = "req_7"


# Of an answer that is no Stripe error in JSON the SDK keeps no headers: there is no request id to write down.
TABLE = [
    Case("accepted", 200, EVENT, "whole", Answer.ACCEPTED),
    Case("200 of somebody else", 200, EVENT | {"identifier": "x"}, "whole", Answer.UNKNOWN, request_id=""),
    Case("200 without JSON", 200, b"<html>ok</html>", "whole", Answer.UNKNOWN, request_id=""),
    Case("200 without body", 200, b"", "whole", Answer.UNKNOWN, request_id=""),
    Case("truncated", 200, EVENT, "truncate", Answer.UNKNOWN, request_id=""),
    Case("connection dropped", 200, EVENT, "drop", Answer.UNKNOWN, request_id=""),
    Case("timeout", 200, EVENT, "slow", Answer.UNKNOWN, request_id=""),
    Case("duplicate of ours", 400, error(message=EXISTS + f"{OURS}."), "whole", Answer.DUPLICATE),
    Case("duplicate of another", 400, error(message=EXISTS + f"{OURS}4."), "whole", Answer.REFUSED),
    Case("no meter", 400, error(message='No active meter found for event name "x"'), "whole", Answer.REFUSED),
    Case("not found", 404, error(), "whole", Answer.REFUSED),
    Case("400 that is no JSON", 400, b"Bad Request", "whole", Answer.REFUSED, request_id=""),
    Case("idempotency error", 400, error("idempotency_error"), "whole", Answer.MUTATED),
    Case("wrong key", 401, error(), "whole", Answer.STOP),
    Case("no permission", 403, error(), "whole", Answer.STOP),
    Case("key in use", 409, error(code="idempotency_key_in_use"), "whole", Answer.RETRY_LATER),
    Case("rate limit", 429, error(code="rate_limit"), "whole", Answer.RETRY_LATER),
    Case("lock timeout", 429, error(code="lock_timeout"), "whole", Answer.RETRY_LATER),
    Case("500", 500, error("api_error"), "whole", Answer.UNKNOWN, new_key=True),
    Case(
        "502 of a proxy",
        502,
        b"<html>bad gateway</html>",
        "whole",
        Answer.UNKNOWN,
        new_key=True,
        request_id="",
    ),
    Case("503", 503, error("api_error"), "whole", Answer.UNKNOWN, new_key=True),
]


@pytest.mark.parametrize("case", TABLE, ids=[case.name for case in TABLE])
def test_an_answer_has_one_meaning(stripe_server, sender, case):
    """Nothing is guessed: what may have arrived is unknown, what can't have arrived is tried again."""
    body = case.body if isinstance(case.body, bytes) else json.dumps(case.body).encode()
    stripe_server.answer, stripe_server.mode = (case.status, body), case.mode

    outcome = request(sender)

    assert (case.answer, case.new_key, case.request_id) == (
        outcome.answer,
        outcome.new_key,
        outcome.request_id,
    )
    assert len(stripe_server.requests) == 1, "the SDK must not retry behind our back"
    assert bool(outcome.detail) == (case.answer is not Answer.ACCEPTED)


def test_a_request_says_exactly_what_the_record_says(stripe_server, sender):
    """Payload, timestamp, identifier and idempotency key are the committed ones."""
    request(sender)

    ((path, headers, form),) = stripe_server.requests
    assert path == "/v1/billing/meter_events"
    assert headers["Idempotency-Key"] == f"{OURS}:2"
    assert form == {
        "event_name": ["meterline_credits"],
        "identifier": [OURS],
        "timestamp": ["1700000000"],
        "payload[stripe_customer_id]": ["cus_1"],
        "payload[value]": ["-3"],
    }


def test_a_stale_owner_sends_nothing(stripe_server, sender):
    """A process that stalled after its commit may have lost the partition: no byte leaves it."""
    outcome = sender._request(RECORD, CLOCK.boot_s() - FRESH_S - 0.1)

    assert outcome.answer is Answer.NOT_SENT
    assert stripe_server.requests == []


async def _send(sender, record=RECORD):
    assert sender.reserve(record.lane)
    return await sender.send(record, CLOCK.boot_s())


def run(coroutine):
    return asyncio.run(coroutine)


def test_a_refused_key_stops_sending(stripe_server, sender):
    """Every further request would be refused too; consuming goes on elsewhere."""
    stripe_server.answer = (401, json.dumps(error(message="Invalid API Key provided")).encode())

    run(_send(sender))

    assert sender.room() == 0
    assert "Invalid API Key provided" in sender.stopped


def test_one_request_at_a_time_for_a_customer_and_meter(stripe_server, sender):
    """Stripe answers 409 to the second; other customers don't wait."""

    async def overlap():
        stripe_server.mode = "slow"
        assert sender.reserve(RECORD.lane)
        call = sender.send(RECORD, CLOCK.boot_s())
        assert not sender.reserve(RECORD.lane)
        assert sender.reserve(("cus_2", RECORD.event_name))
        await call
        return sender.reserve(RECORD.lane)

    assert run(overlap())


def test_a_lost_partition_s_request_that_waits_for_its_turn_is_not_made(stripe_server):
    """Its lane is free again, and nothing has left."""
    sender = sender_of(stripe_server, per_second=0.1)

    async def lose():
        other = replace(RECORD, customer="cus_2")
        await _send(sender)
        assert sender.reserve(other.lane)
        waiting = asyncio.ensure_future(sender.send(other, CLOCK.boot_s()))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        return sender.reserve(other.lane)

    assert run(lose())
    assert len(stripe_server.requests) == 1
    sender.close()


def test_a_sender_has_room_for_the_partitions_it_owns(stripe_server):
    """And none when they are gone."""
    sender = sender_of(stripe_server, per_second=1000)
    assert sender.room() > 0

    sender.disown(0)

    assert sender.room() == 0
    sender.close()


def test_a_paused_sender_has_no_room():
    """`sending_paused` keeps usage records as intents."""
    sender = StripeSender(stripe_client(StripeSettings(), CLOCK), Pace(25.0), clock=CLOCK, paused=True)
    sender.own(0)

    assert sender.room() == 0
    sender.close()
