"""All settings, from environment variables, validated together at start.

A variable is `METERLINE_` + section + `__` + field in capitals: `METERLINE_KAFKA__BOOTSTRAP_SERVERS`. The
defaults are the local stack, so that every command works after `meterline up` with no setting at all.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from meterline.errors import UserError

__all__ = [
    "SANDBOX_API_KEY",
    "BillingSettings",
    "ClickHouseSettings",
    "KafkaSettings",
    "MeteringSettings",
    "QuotaSettings",
    "RedisSettings",
    "Settings",
    "StripeSettings",
    "WorkerSettings",
    "load_settings",
]

SANDBOX_API_KEY = "sk_test_meterline_sandbox"
"""The one key the local Stripe sandbox accepts. It opens nothing anywhere else."""

MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS
EPOCH = datetime.fromtimestamp(0, UTC)


class KafkaSettings(BaseModel):
    """Where Kafka is and how to speak to it."""

    bootstrap_servers: str = "127.0.0.1:19092"
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: str = "SCRAM-SHA-512"
    sasl_username: str = ""
    sasl_password: SecretStr = SecretStr("")
    ssl_ca_location: str = ""
    registry_url: str = ""
    """Schema registry; empty: producers write Avro single-object encoding and need no registry."""

    def client_config(self) -> dict[str, str]:
        """The settings every confluent-kafka client needs, in librdkafka's words."""
        config = {"bootstrap.servers": self.bootstrap_servers, "security.protocol": self.security_protocol}
        if self.security_protocol.startswith("SASL"):
            config |= {
                "sasl.mechanism": self.sasl_mechanism,
                "sasl.username": self.sasl_username,
                "sasl.password": self.sasl_password.get_secret_value(),
            }
        if self.ssl_ca_location:
            config["ssl.ca.location"] = self.ssl_ca_location
        return config


class ClickHouseSettings(BaseModel):
    """Where the ledger is."""

    host: str = "127.0.0.1"
    port: int = 19000
    database: str = "meterline"
    user: str = "default"
    password: SecretStr = SecretStr("")
    secure: bool = False
    connect_timeout_s: float = 2.0
    send_receive_timeout_s: float = 30.0


class RedisSettings(BaseModel):
    """Where the credit buckets are."""

    url: str = "redis://127.0.0.1:16379/0"
    namespace: str = Field("meterline", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """First part of every key, so that two installations can share a server."""


class StripeSettings(BaseModel):
    """How billing speaks to Stripe.

    With the sandbox's key requests go to the local sandbox; with a real `sk_test_` or `rk_test_` key they
    go to Stripe's own test mode. A live key needs `live` beside it, so that real customers are never billed
    by a key that was pasted into the wrong place.
    """

    live: bool = False
    """Bill real customers. Comes with a live key, or the worker doesn't start."""
    api_key: SecretStr = Field(SecretStr(SANDBOX_API_KEY), validate_default=True)
    sandbox_url: str = "http://127.0.0.1:12111"
    timeout_s: float = 15.0

    @field_validator("api_key", mode="after")
    @classmethod
    def _live_on_purpose(cls, key: SecretStr, info: ValidationInfo) -> SecretStr:
        is_live, live = "_live_" in key.get_secret_value(), info.data.get("live")
        if is_live and live is False:
            raise ValueError(
                "a live key bills real customers. If that is meant, set METERLINE_STRIPE__LIVE=true as well; "
                "otherwise use an sk_test_ key"
            )
        if live and not is_live:
            raise ValueError("METERLINE_STRIPE__LIVE is set, but this is no live key")
        return key

    @property
    def api_base(self) -> str | None:
        """The address to speak to; None means Stripe's own."""
        return self.sandbox_url if self.api_key.get_secret_value() == SANDBOX_API_KEY else None


class MeteringSettings(BaseModel):
    """How usage is folded into windows. Units are in the names."""

    window_length_ms: int = Field(HOUR_MS, ge=1_000, le=31 * DAY_MS)
    window_length_since: AwareDatetime = EPOCH
    """From which event time on windows are so long. To change the length, set both, this one to a later time
    than before; a worker that still has the old settings goes on with the newer ones."""
    allowed_lateness_ms: int = Field(5 * MINUTE_MS, ge=0, le=7 * DAY_MS)
    grace_ms: int = Field(0, ge=0, le=7 * DAY_MS)
    flush_interval_ms: int = Field(150, ge=5, le=60_000)
    idle_after_ms: int = Field(2_000, ge=500)
    """An idle, caught-up partition lets wall time move its watermark after this long."""
    dedupe_horizon_ms: int = Field(DAY_MS, ge=MINUTE_MS)
    """How long, in broker append time, a second copy of an event is recognised."""
    dedupe_dir: str = ""
    """Where the index of ids lies, all of it but its newest slice; empty: the system's folder for temporary
    files. A real disk: a folder that is held in memory saves none."""
    dedupe_disk_bytes_max: int = Field(16 * 1024**3, ge=1024 * 1024)
    """The most a partition's index may take there, 23 bytes an id; at this limit the partition halts. The
    default is 740 million ids."""
    late_snapshot_interval_ms: int = Field(5_000, ge=0)
    """At most one new snapshot of an already published window in this time."""
    keep_closed_windows_ms: int = Field(6 * HOUR_MS, ge=0)
    """Closed windows stay in memory this long (event time); late events for older ones read the ledger."""
    pending_events_max: int | None = Field(None, ge=1_000)
    """Unflushed events of one worker; at this limit it stops taking records until a flush ends, at half of it
    the next flush begins. They wait in memory: 1 KB each on the plain path, 0.4 KB on the fast one. None: as
    many as take 60 to 80 MB, which is 60,000 there and 200,000 here. Who is behind pays by the flush (state,
    transaction, insert): with 60,000 a fast worker takes a sixth more CPU time."""
    brake_dead_letters_max: int = Field(100, ge=1, le=1_000)
    """More dead letters than this among 1,000 offsets of a partition, of many clients, stop it: a tenth of
    the records is no accident. 1,000: never."""
    brake_clients_min: int = Field(5, ge=2, le=1_000)
    """So many clients are "many": fewer of them never stop a partition, however often they are refused."""
    fast_path: bool = True
    """Read whole record batches natively where the extra `fast` is installed. What a worker does with an
    event is the same with and without."""

    @property
    def window_length_since_ms(self) -> int:
        """The same in milliseconds since the epoch."""
        return round(self.window_length_since.timestamp() * 1000)


class BillingSettings(BaseModel):
    """How closed windows become Stripe usage records."""

    installation_id: str = Field("local", min_length=1, max_length=64)
    """Part of every identifier, so that two installations on one Stripe account never collide."""
    sending_paused: bool = False
    requests_per_second: float = Field(25.0, gt=0, le=1_000)
    """Of the whole account: each worker takes the share of the partitions of usage.windows it owns. Stripe
    allows 25/s in test mode, reads included, and 1,000 meter events a second live. Leave something to other
    installations and programs on the account."""
    meters_file: str = ""
    """Which SKU counts on which Stripe meter; empty: the packaged file, every SKU on the meter `credits`."""
    flush_interval_ms: int = Field(150, ge=5, le=60_000)
    pending_windows_max: int = Field(20_000, ge=1_000)
    """Snapshots read and not yet committed; at this limit a worker stops reading until a flush ends."""
    verify_retries: int = Field(20, ge=0, le=1_000)
    """How often a window that doesn't equal the ledger is compared again, each flush, before it is held. Its
    rows were acknowledged before its snapshot was committed: only a lagging replica needs a few seconds."""
    held_recheck_interval_ms: int = Field(10_000, ge=100)
    """How often a held window is looked at again."""
    invoice_grace_ms: int = Field(HOUR_MS, ge=HOUR_MS, le=72 * HOUR_MS)
    """How long after a period's end Stripe finalises its invoice: as the Stripe account is set (dashboard,
    rules for subscription invoices). Longer leaves time for what Stripe didn't take at once."""


class QuotaSettings(BaseModel):
    """How credit buckets guard the work. Units are in the names."""

    timeout_ms: int = Field(250, ge=1, le=60_000)
    """How long one decision waits for Redis before the client's policy decides."""
    batch_window_us: int = Field(500, ge=0, le=100_000)
    """Concurrent calls of a process are collected this long into one call to Redis."""
    reservation_ttl_s: float = Field(30.0, gt=0, le=3_600)
    """How long a task's hold stands without being renewed; running tasks renew."""
    reservation_ttl_max_s: float = Field(60.0, gt=0, le=86_400)
    """No hold may ask for more; after a lost Redis the buckets stay closed this long (log time)."""
    clock_skew_ms: int = Field(1_000, ge=0, le=60_000)
    """How far the clocks of Redis, the brokers and the workers may differ: a hold expires this much later."""
    spool_dir: str = ""
    """Where finished usage waits for Kafka; empty: `meterline-spool` in the working directory."""
    spool_bytes_max: int = Field(1024 * 1024 * 1024, ge=1024 * 1024)
    """Finished usage not yet published; at this limit new work is refused."""
    webhook_url: str = ""
    """Alerts are also posted here; empty: nowhere."""
    webhook_secret: SecretStr = SecretStr("")
    """Key of the HMAC-SHA256 signature of each post."""
    webhook_allow_private: bool = False
    """Addresses inside the own network are refused unless this is set."""


class WorkerSettings(BaseModel):
    """What every worker process shares."""

    web_host: str = "127.0.0.1"
    web_port: int = Field(0, ge=0, le=65_535)
    """Health and metrics; 0: metering 6066, billing 6067, quota 6068."""
    session_timeout_ms: int = Field(10_000, ge=6_000)
    instance_id: str = ""
    """Static membership: one stable name per worker slot; empty: dynamic membership."""
    data_dir: str = ""
    metadata_max_age_ms: int = Field(60_000, ge=1_000)
    """How old a worker's view of its topics gets: so long nobody reads a partition that was just added."""


class Settings(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(
        env_prefix="METERLINE_", env_nested_delimiter="__", extra="ignore", frozen=True
    )

    kafka: KafkaSettings = KafkaSettings()
    clickhouse: ClickHouseSettings = ClickHouseSettings()
    redis: RedisSettings = RedisSettings()  # type: ignore[call-arg]  # defaults stand in Field()
    stripe: StripeSettings = StripeSettings()  # type: ignore[call-arg]  # defaults stand in Field()
    metering: MeteringSettings = MeteringSettings()  # type: ignore[call-arg]  # defaults stand in Field()
    billing: BillingSettings = BillingSettings()  # type: ignore[call-arg]  # defaults stand in Field()
    quota: QuotaSettings = QuotaSettings()  # type: ignore[call-arg]  # defaults stand in Field()
    worker: WorkerSettings = WorkerSettings()  # type: ignore[call-arg]  # defaults stand in Field()


def load_settings() -> Settings:
    """Read the environment.

    Raises:
        UserError: one line for each wrong setting, all of them at once.
    """
    try:
        return Settings()
    except ValidationError as error:
        lines = [
            f"  METERLINE_{'__'.join(str(part) for part in problem['loc']).upper()}: {problem['msg']}"
            for problem in error.errors()
        ]
        raise UserError("These settings are wrong:\n" + "\n".join(lines)) from None
