"""How form fields become parameters."""

from __future__ import annotations

import pytest

from meterline.local.sandbox.errors import StripeError
from meterline.local.sandbox.form import FIELDS_MAX, Params, decode_form


def test_brackets_nest():
    """`payload[value]`, percent-encoded or not, is the key `value` of the map `payload`."""
    fields = decode_form("payload[value]=1&payload%5Bstripe_customer_id%5D=cus_1&a[b][0]=x+y&empty=")

    assert fields == {
        "payload": {"value": "1", "stripe_customer_id": "cus_1"},
        "a": {"b": {"0": "x y"}},
        "empty": "",
    }


@pytest.mark.parametrize("text", ["a=1&a=2", "a=1&a[b]=2", "a[b]=2&a=1", "a[=1", "[b]=1", "a[b]c=1", "a=%FF"])
def test_a_field_has_one_meaning_or_is_refused(text):
    """Given twice, both value and map, broken brackets, broken UTF-8."""
    with pytest.raises(StripeError):
        decode_form(text)


def test_the_number_of_fields_is_bounded():
    """More fields than any endpoint has are refused before they are looked at."""
    with pytest.raises(StripeError):
        decode_form("&".join(f"f{number}=1" for number in range(FIELDS_MAX + 1)))


@pytest.mark.parametrize(
    ("read", "code", "param"),
    [
        (lambda params: params.required_text("absent"), "parameter_missing", "outer[absent]"),
        (lambda params: params.text("empty"), "parameter_invalid_empty", "outer[empty]"),
        (lambda params: params.text("word", length_max=3), "parameter_invalid_string", "outer[word]"),
        (lambda params: params.integer("word"), "parameter_invalid_integer", "outer[word]"),
        (lambda params: params.choice("word", ("a", "b")), None, "outer[word]"),
        (lambda params: params.text("map"), None, "outer[map]"),
        (lambda params: params.nested("word"), None, "outer[word]"),
        (lambda params: params.finish(), "parameter_unknown", "outer[empty]"),
    ],
)
def test_a_refusal_names_the_whole_parameter(read, code, param):
    """The sender learns which field is wrong, with Stripe's code where there is one."""
    params = Params({"empty": "", "word": "four", "map": {"a": "1"}}, "outer")

    with pytest.raises(StripeError) as refused:
        read(params)

    assert (400, code, param) == (refused.value.status, refused.value.code, refused.value.param)


def test_what_was_read_is_no_longer_unknown():
    """`finish` is silent once every field has been taken."""
    params = Params(decode_form("limit=5&name=Ada"))

    assert params.integer("limit") == 5
    assert params.text("name") == "Ada"
    params.finish()
