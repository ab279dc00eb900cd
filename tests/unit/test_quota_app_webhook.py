"""Alerts to a webhook: signed, to the address that was checked, never inside unless that is allowed."""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from meterline.domain.alerts import CreditAlert
from meterline.errors import RetryLater, UserError
from meterline.quota import webhook
from meterline.quota.webhook import Webhook, checked_address, signature
from meterline.settings import QuotaSettings

ALERT = CreditAlert("id", "acme", 80, None, 100, 80, 0, 0, 20, 5)


def resolve_to(monkeypatch, *addresses):
    asked, really = [], socket.getaddrinfo

    def getaddrinfo(host, port, *more, **named):
        if host in addresses:  # a number is nobody's name
            return really(host, port, *more, **named)
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(webhook.socket, "getaddrinfo", getaddrinfo)
    return asked


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fe80::1%eth0",
        "fd00::1",
        "::ffff:10.0.0.1",
        "::ffff:127.0.0.1",
    ],
)
def test_an_address_inside_is_refused(monkeypatch, address):
    """A webhook must not be a way to ask our own services."""
    resolve_to(monkeypatch, address)

    with pytest.raises(RetryLater, match="inside the own network"):
        checked_address("hooks.example", 443, allow_private=False)
    assert checked_address("hooks.example", 443, allow_private=True) == (address, 443)


def test_a_public_address_is_taken(monkeypatch):
    """Of several the first that may be posted to."""
    resolve_to(monkeypatch, "10.0.0.1", "93.184.216.34")

    assert checked_address("hooks.example", 80, allow_private=False) == ("93.184.216.34", 80)


class Receiver:
    """Answers each post with the next status; 3xx leads to /elsewhere."""

    def __init__(self, *statuses):
        self.posts = posts = []
        left = list(statuses)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                posts.append((self.path, self.headers, self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(left.pop(0))
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            do_GET = do_POST  # noqa: N815 - as http.server calls it

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def hook(port, *, host="127.0.0.1", private=True):
    return Webhook(
        QuotaSettings(
            webhook_url=f"http://{host}:{port}/hook?a=1", webhook_secret="key", webhook_allow_private=private
        )
    )


def test_a_post_carries_the_alert_and_its_signature():
    """Over time and body: a receiver can refuse old copies."""
    with Receiver(204) as receiver:
        hook(receiver.port).post(ALERT)

    ((path, headers, body),) = receiver.posts
    assert path == "/hook?a=1"
    assert json.loads(body)["available_credits_micro"] == 20
    stamp, signed = (part.split("=")[1] for part in headers["Meterline-Signature"].split(","))
    assert signed == hmac.new(b"key", f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()
    assert headers["Meterline-Signature"] == signature(b"key", int(stamp), body)


@pytest.mark.parametrize("status", [302, 307, 400, 500])
def test_anything_but_success_is_no_delivery_and_redirects_are_not_followed(status):
    """A redirect could lead inside."""
    with Receiver(status, 200) as receiver, pytest.raises(RetryLater, match=str(status)):
        hook(receiver.port).post(ALERT)

    assert len(receiver.posts) == 1


def test_the_checked_address_is_the_one_connected_to(monkeypatch):
    """The name is asked once: a second answer could be another one."""
    with Receiver(200) as receiver:
        asked = resolve_to(monkeypatch, "127.0.0.1")
        hook(receiver.port, host="hooks.example").post(ALERT)

    assert asked == ["hooks.example"]
    assert receiver.posts[0][1]["Host"] == f"hooks.example:{receiver.port}"


def test_a_receiver_that_is_away_is_retried():
    with Receiver() as receiver:
        pass

    with pytest.raises(RetryLater, match="does not answer"):
        hook(receiver.port).post(ALERT)


@pytest.mark.parametrize(
    ("url", "secret", "why"),
    [("ftp://x.example", "key", "http"), ("https://", "key", "http"), ("https://x.example", "", "SECRET")],
)
def test_wrong_settings_are_told_at_the_start(url, secret, why):
    with pytest.raises(UserError, match=why):
        Webhook(QuotaSettings(webhook_url=url, webhook_secret=secret))
