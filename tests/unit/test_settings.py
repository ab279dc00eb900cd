"""A wrong setting is one clear line at the start; money needs two settings that agree."""

from __future__ import annotations

import pytest

from meterline.errors import UserError
from meterline.settings import load_settings

LIVE_KEY = "rk_live_0123456789"


@pytest.fixture
def settings_with(monkeypatch):
    """Settings of an environment with these, by the last part of their name."""

    def load(**values):
        for name, value in values.items():
            monkeypatch.setenv(f"METERLINE_STRIPE__{name.upper()}", value)
        return load_settings()

    return load


def test_a_live_key_alone_is_refused(settings_with):
    """It may have been pasted into the wrong place; the text says what to set, and not the key."""
    with pytest.raises(UserError, match="METERLINE_STRIPE__LIVE=true as well") as refused:
        settings_with(api_key=LIVE_KEY)

    assert "METERLINE_STRIPE__API_KEY: " in str(refused.value)
    assert "0123456789" not in str(refused.value)


def test_a_live_key_on_purpose_goes_to_stripe(settings_with):
    """Never to the sandbox."""
    settings = settings_with(api_key=LIVE_KEY, live="true")

    assert (settings.stripe.api_key.get_secret_value(), settings.stripe.api_base) == (LIVE_KEY, None)


@pytest.mark.parametrize("more", [{}, {"api_key": "sk_test_of_stripe"}])
def test_live_mode_without_a_live_key_is_refused(settings_with, more):
    """Nobody believes to bill who only tries."""
    with pytest.raises(UserError, match="is set, but this is no live key"):
        settings_with(live="true", **more)


def test_a_live_word_that_is_none_is_the_one_complaint(settings_with):
    """The key is judged when it is known whether live is meant."""
    with pytest.raises(UserError, match="METERLINE_STRIPE__LIVE: ") as refused:
        settings_with(api_key=LIVE_KEY, live="perhaps")

    assert "API_KEY" not in str(refused.value)
