"""The meters file: which SKU counts where, and every way to write it wrong."""

from __future__ import annotations

import pytest

from meterline.billing.meters import UnmappedSkuError, load_meters
from meterline.domain.windows import SkuTotal
from meterline.errors import UserError

GOOD = """
version: 3
free_skus: [health-check, "free-*"]
meters:
  - {name: tokens, event_name: tokens_1k, display_name: Tokens, unit_credits: "0.5", skus: ["tok-*", special]}
  - {name: rest, event_name: rest, display_name: Rest, unit_credits: "1", skus: ["*"]}
"""


@pytest.fixture
def load(tmp_path):
    def load_text(text):
        path = tmp_path / "meters.yaml"
        path.write_text(text)
        return load_meters(str(path))

    return load_text


def test_the_packaged_file_counts_every_sku_on_credits():
    """One meter, one credit a unit: right for everybody who has no file."""
    meters = load_meters()

    assert meters.meter_of("anything at all") == "credits"
    assert [(m.name, m.event_name, m.unit_micro) for m in meters.meters] == [
        ("credits", "meterline_credits", 1_000_000)
    ]


@pytest.mark.parametrize(
    ("sku", "meter"),
    [
        ("tok-in", "tokens"),
        ("special", "tokens"),
        ("gpu", "rest"),
        ("health-check", None),
        ("free-tok-in", None),
    ],
)
def test_a_sku_counts_on_the_first_rule_that_fits(load, sku, meter):
    """Full names before patterns, free ones first, then the file's order."""
    assert load(GOOD).meter_of(sku) == meter


def test_free_skus_and_free_events_are_in_no_meter(load):
    """What is free is metered in the ledger and never reaches Stripe."""
    skus = {
        "tok-in": SkuTotal(2, 700_000, 1, 99),
        "gpu": SkuTotal(1, 5),
        "health-check": SkuTotal(9, 9),
        "special": SkuTotal(0, 0, 4, 4_000_000),
    }

    assert load(GOOD).credits_by_meter(skus) == {"tokens": 700_000, "rest": 5}


def test_a_sku_nobody_decided_about_is_an_error(load):
    """Never a silent zero: the window is held until the file says where the SKU belongs."""
    meters = load(GOOD.replace('["*"]', "[gpu]"))

    with pytest.raises(UnmappedSkuError, match="cpu"):
        meters.credits_by_meter({"cpu": SkuTotal(1, 1)})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("version: 3", "version: 0"), "version"),
        (("version: 3", 'version: "3"'), "version"),
        (("version: 3\n", ""), "version"),
        (("name: rest,", "name: tokens,"), "meter name tokens is listed more than once"),
        (("event_name: rest", "event_name: tokens_1k"), "event_name tokens_1k is listed more than once"),
        (('["*"]', '["*", special]'), "SKU or pattern special is listed more than once"),
        (('["*"]', '["*", health-check]'), "SKU or pattern health-check is listed more than once"),
        (('unit_credits: "1"', 'unit_credits: "0"'), "at least 0.01 credits"),
        (('unit_credits: "1"', 'unit_credits: "-1"'), "at least 0.01 credits"),
        (('unit_credits: "1"', "unit_credits: 1.5"), "unit_credits"),
        (('unit_credits: "1"', 'unit_credits: "0.0100001"'), "finer than a micro-credit"),
        (("name: rest,", "name: rest, colour: red,"), "colour"),
        (("meters:", "meters: []\nextra:"), "extra"),
        (("version: 3", "version: 3\nversion: 4"), "'version' is given twice"),
        (("version: 3", "version: ["), "is not YAML"),
    ],
)
def test_a_wrong_file_is_one_clear_message(load, change, text):
    """A price list that isn't understood to the last word is not used at all."""
    assert change[0] in GOOD

    with pytest.raises(UserError, match=text.replace("'", ".").replace(".", r".")):
        load(GOOD.replace(*change))


def test_a_missing_file_is_named(tmp_path):
    """The path in the message is the one in the setting."""
    with pytest.raises(UserError, match=r"nowhere\.yaml can't be read"):
        load_meters(str(tmp_path / "nowhere.yaml"))


def test_the_digest_follows_what_decides_amounts(load):
    """Another price needs another version; another display name doesn't."""
    digest = load(GOOD).digest

    assert digest == load(GOOD.replace("Tokens", "Words")).digest
    assert digest != load(GOOD.replace('"0.5"', '"0.6"')).digest
    assert digest != load(GOOD.replace("special", "specials")).digest
    assert digest != load(GOOD.replace("[health-check, ", "[")).digest
