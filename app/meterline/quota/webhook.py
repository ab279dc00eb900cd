"""Alerts to a webhook: signed, retried, never to an address inside the own network unless that is allowed.

A post is a JSON object with the fields of `schemas/credit-alert` and this header, so that the receiver knows
who sent it and when:

    Meterline-Signature: t=<seconds since the epoch>,v1=<hex HMAC-SHA256 of "<t>." and the body>

A receiver may get an alert twice and ignores a known `alert_id`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import http.client
import ipaddress
import json
import socket
import ssl
import time
from dataclasses import asdict
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

from aiokafka import AIOKafkaConsumer, TopicPartition

from meterline.contracts.codec import RecordCodec
from meterline.contracts.records import alert_from_record
from meterline.contracts.topics import CREDIT_ALERTS
from meterline.domain.alerts import CreditAlert
from meterline.errors import DeadLetterError, RetryLater, UserError
from meterline.logs import get_logger
from meterline.metrics import WEBHOOK_POSTS
from meterline.settings import KafkaSettings, QuotaSettings
from meterline.streaming.transactions import aiokafka_config

__all__ = ["SIGNATURE_HEADER", "Webhook", "checked_address", "follow_alerts", "signature"]

SIGNATURE_HEADER: Final = "Meterline-Signature"
GROUP: Final = "quota-webhook"
"""Name under which the place in credit.alerts is kept. Nobody joins it: one guardian reads at a time."""

TIMEOUT_S: Final = 10.0
"""Of one connection or answer: a receiver that takes longer is treated as away."""
ANSWER_BYTES_MAX: Final = 4_096
"""Read of an answer, for the log line; the status alone counts."""
BACKOFF_S_MIN: Final = 1.0
BACKOFF_S_MAX: Final = 60.0
"""A receiver that comes back has its alerts within a minute."""
GIVE_UP_S: Final = 86_400.0
"""An alert that was refused for a day is passed by, logged as an error: those behind it are newer news."""
POLL_MS: Final = 1_000

log = get_logger(__name__)


class Webhook:
    """One receiver.

    Raises:
        UserError: the address is no http(s) URL, or the signature has no key.
    """

    def __init__(self, settings: QuotaSettings) -> None:
        self._url = urlsplit(settings.webhook_url)
        if self._url.scheme not in {"http", "https"} or not self._url.hostname:
            raise UserError("METERLINE_QUOTA__WEBHOOK_URL must be an http or https address")
        self._secret = settings.webhook_secret.get_secret_value().encode()
        if not self._secret:
            raise UserError(
                "METERLINE_QUOTA__WEBHOOK_SECRET must be set: a receiver must know who is posting"
            )
        self._allow_private = settings.webhook_allow_private

    def post(self, alert: CreditAlert) -> None:
        """Deliver one alert. Blocks, at most a few times `TIMEOUT_S`.

        Raises:
            RetryLater: not delivered.
        """
        body = json.dumps(asdict(alert), separators=(",", ":")).encode()
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "meterline",
            "Connection": "close",
            SIGNATURE_HEADER: signature(self._secret, int(time.time()), body),
        }
        try:
            connection = _connection(self._url, allow_private=self._allow_private)
            try:
                path = (self._url.path or "/") + (f"?{self._url.query}" if self._url.query else "")
                connection.request("POST", path, body, headers)
                answer = connection.getresponse()
                text = answer.read(ANSWER_BYTES_MAX)
            finally:
                connection.close()
        except (OSError, http.client.HTTPException) as error:
            raise RetryLater(f"the webhook does not answer: {error or type(error).__name__}") from error
        # A redirect is a refusal too: it could lead anywhere, also inside.
        if not 200 <= answer.status < 300:
            raise RetryLater(f"the webhook answered {answer.status}: {text[:200]!r}")


def signature(secret: bytes, timestamp_s: int, body: bytes) -> str:
    """The value of the signature's header."""
    signed = hmac.new(secret, b"%d." % timestamp_s + body, hashlib.sha256).hexdigest()
    return f"t={timestamp_s},v1={signed}"


def checked_address(host: str, port: int, *, allow_private: bool) -> tuple[str, int]:
    """Resolve a host to an address that may be posted to: the one to connect to, asked once.

    Raises:
        RetryLater: no such host, or every address of it is inside: private, loopback, link-local, reserved.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise RetryLater(f"the webhook's host {host} is not known: {error}") from error
    for *_, place in found:
        address = ipaddress.ip_address(str(place[0]).partition("%")[0])
        inside = getattr(address, "ipv4_mapped", None) or address
        if allow_private or (inside.is_global and not inside.is_multicast):
            return str(place[0]), port
    raise RetryLater(
        f"the webhook's host {host} is inside the own network, which is refused. "
        "METERLINE_QUOTA__WEBHOOK_ALLOW_PRIVATE=true allows it"
    )


def _connection(url: SplitResult, *, allow_private: bool) -> http.client.HTTPConnection:
    """A connection to the checked address; the certificate is the host's, the address is not asked again."""
    assert url.hostname is not None
    tls = url.scheme == "https"
    port = url.port or (443 if tls else 80)
    address = checked_address(url.hostname, port, allow_private=allow_private)
    connection = http.client.HTTPConnection(url.hostname, port, timeout=TIMEOUT_S)
    plain = socket.create_connection(address, timeout=TIMEOUT_S)
    try:
        connection.sock = (
            ssl.create_default_context().wrap_socket(plain, server_hostname=url.hostname) if tls else plain
        )
    except BaseException:  # whatever it was: no socket stays open
        plain.close()
        raise
    connection.auto_open = False  # else a closed socket would be opened anew, to an address nobody checked
    return connection


async def follow_alerts(kafka: KafkaSettings, webhook: Webhook, partitions: int) -> None:
    """Post every alert, in the order of its partition, and remember how far; until cancelled."""
    codec = RecordCodec("credit-alert", kafka.registry_url)
    places = [TopicPartition(CREDIT_ALERTS, number) for number in range(partitions)]
    consumer: Any = AIOKafkaConsumer(
        **aiokafka_config(kafka),
        group_id=GROUP,
        isolation_level="read_committed",
        auto_offset_reset="earliest",
        enable_auto_commit=False,
    )
    await consumer.start()
    try:
        consumer.assign(places)
        while True:
            batches = await consumer.getmany(timeout_ms=POLL_MS, max_records=100)
            for place, records in batches.items():
                for record in records:
                    await _deliver(webhook, codec, record)
                    await consumer.commit({place: record.offset + 1})
    finally:
        await consumer.stop()


async def _deliver(webhook: Webhook, codec: RecordCodec, record: Any) -> None:
    """Post one record of credit.alerts; returns when it is delivered, or given up."""
    try:
        alert = alert_from_record(await asyncio.to_thread(codec.decode, record.value))
    except DeadLetterError as error:
        log.error("no alert of ours", partition=record.partition, offset=record.offset, why=str(error))  # noqa: TRY400 - the record says it all
        return
    backoff_s, give_up_at = BACKOFF_S_MIN, time.monotonic() + GIVE_UP_S
    while True:
        try:
            await asyncio.to_thread(webhook.post, alert)
        except RetryLater as error:
            WEBHOOK_POSTS.labels("failed").inc()
            if time.monotonic() > give_up_at:
                log.error(  # noqa: TRY400 - the receiver is at fault; a traceback would say nothing more
                    "alert not delivered", alert=alert.alert_id, why=str(error)
                )
                return
            log.warning("alert not delivered yet", alert=alert.alert_id, retry_in_s=backoff_s, why=str(error))
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, BACKOFF_S_MAX)
        else:
            WEBHOOK_POSTS.labels("delivered").inc()
            return
