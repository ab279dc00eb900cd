"""Where accounts stand, in a few dictionaries: for tests of the rules alone."""

from __future__ import annotations

from meterline.domain.accounts import Account

__all__ = ["AccountStore"]


class AccountStore:
    """A `Store` of `domain.account_books` that is copied to commit it."""

    def __init__(self):
        self.accounts, self.day_of, self.records, self.steps = {}, {}, {}, []

    def copy(self):
        """Nothing in it is ever changed in place but the dictionaries themselves."""
        twin = AccountStore()
        twin.accounts, twin.records = dict(self.accounts), dict(self.records)
        twin.day_of = {key: dict(days) for key, days in self.day_of.items()}
        twin.steps = list(self.steps)
        return twin

    def account(self, key):
        return self.accounts.get(key, Account())

    def days(self, key):
        return self.day_of.get(key, {})

    def open_records(self, key):
        return [record for record in self.records.values() if record.account == key]

    def open_record(self, identifier):
        return self.records.get(identifier)

    def set_account(self, key, account):
        self.accounts[key] = account

    def set_day(self, key, day, what):
        self.day_of.setdefault(key, {})[day] = what

    def drop_days(self, key):
        self.day_of.pop(key, None)

    def set_record(self, record):
        self.records[record.identifier] = record

    def drop_record(self, identifier):
        del self.records[identifier]

    def add_step(self, step, now_ms):
        self.steps.append((now_ms, step))
