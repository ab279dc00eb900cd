"""The stock Faust idiom: an Avro codec, a Record, a tumbling table, one event at a time.

As the documentation of faust-streaming has it, with its best settings: memory store, Cython streams (used by
itself when they are built), the model's fields without conversions, the window's time from the Kafka message,
no log lines. It is what `make bench` compares a metering worker with; Meterline doesn't use it.
"""

from __future__ import annotations

import os
from io import BytesIO
from typing import Any

import fastavro
import faust
from faust.serializers import codecs

from meterline.contracts.codec import SINGLE_OBJECT_HEAD_BYTES
from meterline.contracts.versions import load_versions

SCHEMA = load_versions("usage-event")[-1].parsed
NAME = os.environ["BENCH_STOCK_NAME"]
WINDOW_S = float(os.environ["BENCH_STOCK_WINDOW_S"])
PARTITIONS = int(os.environ["BENCH_STOCK_PARTITIONS"])


class UsageAvro(codecs.Codec):
    """Avro single-object encoding; the schema is taken for granted."""

    def _loads(self, s: bytes) -> Any:
        return fastavro.schemaless_reader(BytesIO(s[SINGLE_OBJECT_HEAD_BYTES:]), SCHEMA, None)


codecs.register("usage_avro", UsageAvro())


class Usage(faust.Record, serializer="usage_avro"):
    event_id: str
    client_id: str
    correlation_id: str
    sku: str
    credits_micro: int
    occurred_at: int
    source: str
    # Any: Faust would convert a typed mapping element by element, and the sums don't need it.
    attributes: Any
    reservation_id: Any
    billable: bool
    corrects: Any


app = faust.App(
    NAME,
    broker=f"kafka://{os.environ['BENCH_STOCK_BROKER']}",
    store="memory://",
    datadir=os.environ["BENCH_STOCK_DATA_DIR"],
    topic_partitions=PARTITIONS,
    topic_allow_declare=False,
    topic_disable_leader=True,
    table_standby_replicas=0,
    consumer_auto_offset_reset="earliest",
    worker_redirect_stdouts=False,
)
events = app.topic(NAME, key_type=bytes, key_serializer="raw", value_type=Usage)
totals = (
    app.Table("totals", default=int, partitions=PARTITIONS)
    .tumbling(WINDOW_S, expires=86_400.0)
    .relative_to_stream()
)


@app.agent(events)
async def count(stream: Any) -> None:
    async for event in stream:
        totals[f"{event.client_id}|{event.sku}"] += event.credits_micro


if __name__ == "__main__":
    app.main()
