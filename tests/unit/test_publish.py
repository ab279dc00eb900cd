"""`meterline publish FILE`, with a producer that only remembers."""

from __future__ import annotations

import io
import json
import sys

import pytest

from meterline.cli import publish as command
from meterline.cli.main import main
from meterline.producer import DeliveryFailed

HEADER = "client_id,correlation_id,sku,credits\n"
GOOD = HEADER + "acme,t1,gpu,1.5\nacme,t2,gpu,2\n"
MIXED = GOOD + "acme,t3,gpu,-1\nacme,t4\n"


class RememberingProducer:
    """Stands for the real one, which tests/integration runs: acknowledges all, or does what it is told to."""

    made: list[RememberingProducer] = []  # noqa: RUF012 - emptied for each test
    on_publish = staticmethod(lambda _event: None)
    on_close = staticmethod(lambda: None)

    def __init__(self, _settings):
        self.events = []
        self.closed = False
        self.made.append(self)

    @property
    def acknowledged(self):
        return len(self.events)

    def check(self):
        pass

    def publish_event(self, event):
        type(self).on_publish(event)
        self.events.append(event)

    def close(self, _timeout_s=0.0):
        if not self.closed:
            self.closed = True
            type(self).on_close()


@pytest.fixture
def producer(monkeypatch):
    kind = type("Producer", (RememberingProducer,), {"made": []})
    monkeypatch.setattr(command, "UsageProducer", kind)
    return kind


@pytest.fixture
def run(producer, tmp_path, monkeypatch, capsys):
    """Run the command on a text, with `producer` in place; its exit code, output and errors."""
    assert command.UsageProducer is producer

    def run_on(text, *options, name="usage.csv", stdin=b""):
        if text is not None:
            (tmp_path / name).write_text(text)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["meterline", "publish", name, *options])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        else:
            code = 0
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run_on


def published(producer):
    return [event.correlation_id for made in producer.made for event in made.events]


def test_a_good_file_is_published_whole(run, producer):
    """Every row is one event, with its credits."""
    assert run(GOOD) == (0, "Published 2 events (3.5 credits).\n", "")
    assert published(producer) == ["t1", "t2"]
    assert [event.credits_micro for event in producer.made[0].events] == [1_500_000, 2_000_000]


def test_twice_gives_the_same_ids(run, producer):
    """Running it again is safe: metering finds the same events."""
    run(GOOD)
    run(GOOD)
    first, second = producer.made

    assert [event.event_id for event in first.events] == [event.event_id for event in second.events]


def test_a_bad_row_stops_the_whole_file_before_anything_is_sent(run, producer):
    """Nobody has to find out which half of a file was published."""
    code, out, err = run(MIXED)

    assert code == 1
    assert published(producer) == []
    assert out.startswith("Nothing was published: 2 of 4 rows are bad.")
    assert "line 4: credits are -1000000 micro-credits" in err
    assert "line 5: 2 cells where the header has 4" in err


def test_bad_rows_are_skipped_only_when_asked_to(run, producer):
    """The exit code still says that something was left out."""
    code, out, err = run(MIXED, "--skip-bad")

    assert (code, out) == (1, "Published 2 events (3.5 credits). Skipped 2 bad rows.\n")
    assert published(producer) == ["t1", "t2"]
    assert "line 5:" in err


def test_equal_rows_are_told_by_their_lines_and_published(run, producer):
    """A row that stands twice may be a mistake of the export: it is never merged in silence."""
    code, out, err = run(GOOD + "acme,t1,gpu,1.50\n")

    assert code == 0
    assert published(producer) == ["t1", "t2", "t1"]
    assert "Published 3 events (3.5 credits). 1 rows are equal to earlier ones" in out
    assert "line 4: equal to line 2" in err


def test_rows_that_contradict_each_other_are_bad(run, producer):
    """The same four (client, correlation id, SKU, item) with other credits: only one would be billed."""
    code, _, err = run(GOOD + "acme,t1,gpu,7\n")

    assert code == 1
    assert published(producer) == []
    assert "line 4: contradicts line 2" in err


def test_a_dry_run_publishes_nothing(run, producer):
    """It only judges; with bad rows its exit code says so."""
    assert run(GOOD, "--dry-run") == (0, "Dry run: 2 of 2 rows can be published (3.5 credits).\n", "")
    assert run(MIXED, "--dry-run")[0] == 1
    assert producer.made == []


def test_the_summary_as_json(run):
    """For programs: standard output holds nothing but JSON."""
    code, out, _ = run(MIXED + "acme,t2,gpu,2\n", "--json", "--skip-bad")
    summary = json.loads(out)

    assert code == 1
    assert {name: value for name, value in summary.items() if name != "bad_rows"} == {
        "file": "usage.csv",
        "dry_run": False,
        "rows": 5,
        "good": 3,
        "equal": 1,
        "bad": 2,
        "published": 3,
        "credits_micro": 3_500_000,
        "equal_rows": [{"line": 6, "equals_line": 3}],
    }
    assert [row["line"] for row in summary["bad_rows"]] == [4, 5]


def test_standard_input_and_json_lines(run, producer):
    """`-` reads a pipe; the format is said, because there is no name to tell it."""
    line = b'{"client_id": "acme", "correlation_id": "t9", "sku": "gpu", "credits": 0.25}\n'

    assert run(None, "--format", "jsonl", name="-", stdin=line)[0] == 0
    assert published(producer) == ["t9"]
    assert producer.made[0].events[0].credits_micro == 250_000


def test_a_byte_that_is_no_utf8_is_a_bad_row(run, tmp_path):
    """Latin-1 in one row is told with its line."""
    (tmp_path / "usage.csv").write_bytes(GOOD.encode() + b"acm\xe9,t5,gpu,1\n")
    code, _, err = run(None)

    assert code == 1
    assert "line 4: client_id" in err
    assert "decode the input as UTF-8" in err


@pytest.mark.parametrize(
    ("text", "name", "why"),
    [
        (None, "missing.csv", "missing.csv cannot be read: No such file"),
        ("", "usage.csv", "usage.csv is empty"),
        ("", "usage.jsonl", "usage.jsonl is empty"),
        (
            "id,amount\n1,2\n",
            "usage.csv",
            "usage.csv, header: unknown column 'id', 'amount'. Known: client_id",
        ),
        ("client_id\nacme\n", "usage.csv", "header: missing column 'correlation_id', 'sku', 'credits'"),
        (GOOD, "usage.txt", "give --format csv or --format jsonl"),
    ],
)
def test_what_is_no_usage_file_is_one_sentence(run, producer, text, name, why):
    """A person's mistake: exit code 2, what to do, no traceback."""
    code, out, err = run(text, name=name)

    assert (code, out) == (2, "")
    assert why in err
    assert producer.made == []


def test_a_long_list_of_bad_rows_is_cut(run):
    """A file that is bad throughout doesn't fill the screen; the number is still told."""
    _, _, err = run(HEADER + "acme\n" * 30)

    assert len(err.splitlines()) == command.ROWS_SHOWN + 1
    assert "... and 10 more bad rows" in err


def test_ctrl_c_says_what_arrived(run, producer):
    """130, as the shell expects, and the promise that a second run is safe."""

    def interrupt(event):
        if event.correlation_id == "t2":
            raise KeyboardInterrupt

    producer.on_publish = staticmethod(interrupt)
    code, _, err = run(GOOD)

    assert code == command.INTERRUPTED
    assert "Interrupted: 1 of 2 events were acknowledged by Kafka." in err
    assert producer.made[0].closed


def test_what_kafka_did_not_acknowledge_fails_the_command(run, producer):
    """Never "Published" when it isn't so."""

    def fail():
        raise DeliveryFailed((("e1", "timed out"),))

    producer.on_close = staticmethod(fail)
    code, out, err = run(GOOD)

    assert (code, out) == (1, "")
    assert "1 event(s) were not acknowledged by Kafka: e1 (timed out)" in err
    assert "running the command again is safe" in err


def test_a_file_that_changed_after_it_was_judged_stops(run, producer, tmp_path):
    """The second reading is judged too: what nobody has checked is not published."""
    kept = producer.__init__

    def append(self, settings):
        kept(self, settings)
        with (tmp_path / "usage.csv").open("a") as file:
            file.write("acme,t3,gpu,-1\n")

    producer.__init__ = append
    code, _, err = run(GOOD)

    assert code == 2
    assert "line 4: credits are -1000000" in err
    assert "The file has changed since it was checked" in err
    assert "2 of 2 events were acknowledged" in err
    assert producer.made[0].closed
