"""`meterline billing held|release|resolve|pause|resume|shadow` and the views of periods, on a real ledger."""

from __future__ import annotations

import asyncio
import json
import sys
from decimal import Decimal

import pytest
from tests.ledger_rows import columns_of, step

from meterline.cli.main import main
from meterline.ledger.billing_orders import newest_switches, orders_since
from meterline.ledger.client import connect
from meterline.ledger.tables import USAGE_RECORD_LOG
from meterline.ledger.writer import LedgerWriter

pytestmark = pytest.mark.stack


@pytest.fixture
def client(ledger):
    with connect(ledger) as client:
        yield client


@pytest.fixture
def command(ledger, monkeypatch, capsys):
    """Runs a command against this ledger: exit code and what it printed."""
    for name in ("host", "port", "database"):
        monkeypatch.setenv(f"METERLINE_CLICKHOUSE__{name.upper()}", str(getattr(ledger, name)))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["meterline", "billing", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out + err

    return run


def insert(settings, rows):
    async def run():
        writer = LedgerWriter(settings)
        await writer.insert(USAGE_RECORD_LOG, *columns_of(rows))
        await writer.close()

    asyncio.run(run())


def test_what_is_held_is_listed_with_what_to_do(ledger, command):
    """Windows, records and accounts alike; not what was released or settled meanwhile."""
    told = {"value": 7, "event_name": "c", "stripe_customer": "cus_1"}
    held = {"state": "held", "credits_micro": 2_500_000}
    insert(
        ledger,
        [
            step(1, "record", identifier="mlur_1", state="intent", **told),
            step(2, "outcome", identifier="mlur_1", state="refused", reason="refused", detail="no", **told),
            step(3, "held", window_id="w1", reason="no_customer", **held),
            step(4, "held", window_id="w2", reason="unverified", **held),
            step(5, "released", window_id="w2", state="released", reason="unverified"),
            step(6, "record", identifier="mlur_2", state="intent", **told),
            step(7, "held", identifier="mlur_2", state="held", reason="unknown_outcome", **told),
            step(8, "settled", identifier="mlur_2", state="settled", reason="reconciled", **told),
        ],
    )
    code, out = command("held", "--json")
    found = [(item["target"], item["reason"], item["units"], item["credits"]) for item in json.loads(out)]

    assert (code, found) == (0, [("mlur_1", "refused", 7, "0"), ("w1", "no_customer", 0, "2.5")])
    assert "meterline billing release TARGET" in command("held")[1]


def test_an_order_is_kept_with_who_and_why(ledger, client, command):
    """A release names what is held; a switch holds until the next one."""
    insert(ledger, [step(1, "outcome", identifier="mlur_1", state="refused", reason="refused", value=7)])
    assert command("release", "mlur_1", "--by", "ann", "--reason", "customer is back")[0] == 0
    for action in ("pause", "resume", "shadow"):
        assert command(action, "--client", "acme", "--by", "ann", "--reason", "trial")[0] == 0
    assert command("pause", "--by", "ann", "--reason", "wrong price")[0] == 0
    (order,) = orders_since(client, 0)

    assert (order.action, order.client_id, order.target) == ("release", "acme", "mlur_1")
    assert (order.ordered_by, order.reason) == ("ann", "customer is back")
    assert dict(newest_switches(client)) == {"acme": "shadow", "": "pause"}


def test_an_order_that_can_come_to_nothing_is_refused(command):
    """Nothing is held under the name; or nobody says why."""
    code, out = command("release", "mlur_9", "--by", "ann", "--reason", "x")

    assert code == 2
    assert "Nothing of that name is held" in out
    assert "Say why" in command("pause", "--by", "ann", "--reason", " ")[1]


def test_a_closed_period_adds_up(ledger, client):
    """Usage + moved in + carried in = invoiced units * unit + carried out, and the parts make the carry."""
    account = {"window_id": "account", "stripe_customer": "cus_1"}
    insert(
        ledger,
        [
            step(1, "advance", credits_micro=9_000_000, value=9, identifier="a", stripe_customer="cus_1"),
            step(2, "advance", credits_micro=1_200_000, value=1, identifier="b", reason="moved", **account),
            step(3, "advance", credits_micro=300_000, reason="carry", **account),
            step(4, "close", credits_micro=-3_500_000, value=7, **account),
            step(5, "carry_part", credits_micro=500_000, reason="remainder", **account),
            step(6, "carry_part", credits_micro=3_000_000, reason="not_landed", **account),
        ],
    )

    assert client.execute(
        "SELECT usage, moved_in, carried_in, units, closed, invoice_units, carried_out,"
        " remainder, not_landed, late, clipped FROM billing_periods"
    ) == [(*map(Decimal, ("9", "1.2", "0.3")), 10, True, 7, *map(Decimal, ("3.5", "0.5", "3", "0", "0")))]
