"""The gate of schema changes, as an engineer meets it: `meterline schemas check --schemas-dir FOLDER`."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from meterline.cli.schemas import app
from meterline.contracts.files import schemas_dir
from meterline.errors import UserError


@pytest.fixture
def schemas(tmp_path):
    """A copy of all schemas, to change."""
    return shutil.copytree(schemas_dir(), tmp_path / "schemas")


def add_version(schemas, change):
    """Version 2 of the client record, made of version 1."""
    schema = json.loads((schemas / "client/v1.avsc").read_text())
    change(schema["fields"])
    (schemas / "client/v2.avsc").write_text(json.dumps(schema))


def check(schemas, *more):
    result = CliRunner().invoke(app, ["check", "--schemas-dir", str(schemas), *more])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def add_field_without_default(fields):
    fields.append({"name": "tax_id", "type": "string", "doc": "Of the client."})


def remove_type_from_union(fields):
    next(f for f in fields if f["name"] == "stripe_customer_id").update(type="null", default=None)


def change_type(fields):
    next(f for f in fields if f["name"] == "test").update(type="string", default="")


def remove_enum_symbol(fields):
    unit = next(f for f in fields if f["name"] == "period_unit")
    unit["type"]["symbols"].remove("day")


def test_the_schemas_as_they_are_pass(schemas):
    """The copy is good before it is changed: what fails below fails because of the change."""
    assert "compatible, examples and golden vectors hold" in check(schemas)


@pytest.mark.parametrize(
    "change", [add_field_without_default, remove_type_from_union, change_type, remove_enum_symbol]
)
def test_a_change_that_cannot_read_what_was_written_is_refused(schemas, change):
    """A new reader meets years of old records: a version that can't read them names its schema and stops."""
    add_version(schemas, change)

    with pytest.raises(UserError, match="must not be published") as refused:
        check(schemas)
    assert "client: v2 can't read what v1 wrote" in str(refused.value)


def test_a_field_with_a_default_is_accepted(schemas):
    """Old records are read with the default."""
    before = check(schemas)
    tax_id = {"name": "tax_id", "type": ["null", "string"], "default": None, "doc": "Of the client."}
    add_version(schemas, lambda fields: fields.append(tax_id))
    for example in (schemas / "client/examples").iterdir():  # they show all fields of the newest version
        example.write_text(json.dumps(json.loads(example.read_text()) | {"tax_id": None}))

    after = check(schemas)
    assert "compatible, examples and golden vectors hold" in after
    assert after != before  # one version more was looked at


def test_a_program_reads_the_refusal_as_json(schemas):
    """For CI: what is wrong, by schema."""
    add_version(schemas, add_field_without_default)
    result = CliRunner().invoke(app, ["check", "--schemas-dir", str(schemas), "--json"])

    report = json.loads(result.stdout)
    assert not report["ok"]
    assert {problem["schema"].split("/")[0].split(" ")[0] for problem in report["problems"]} == {"client"}
