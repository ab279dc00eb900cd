"""The map from SKUs to Stripe meters and units, read from `meters.yaml` and validated strictly."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from meterline.domain.account_books import MeterTerms
from meterline.domain.credits import to_micro
from meterline.domain.encoding import hash_hex
from meterline.domain.windows import SkuTotal
from meterline.errors import UserError

__all__ = ["Meter", "MeterMap", "UnmappedSkuError", "load_meters"]

UNIT_MICRO_MIN = 10_000
"""0.01 credits: the largest total of an int64 then has 15 digits in units, the most Stripe takes."""
METERS_MAX = 100
"""More is a price list put into the wrong file; each meter costs a read at every start."""

_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
_Pattern = Annotated[str, Field(min_length=1, max_length=200)]
_WILDCARDS = frozenset("*?[")


class UnmappedSkuError(Exception):
    """A SKU has no meter and isn't free."""

    def __init__(self, sku: str) -> None:
        super().__init__(f"no meter takes SKU {sku!r}")
        self.sku = sku


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Meter(_Strict):
    """One Stripe meter. `unit_micro`: micro-credits of one unit."""

    name: _Name
    event_name: Annotated[str, Field(min_length=1, max_length=100)]
    display_name: Annotated[str, Field(min_length=1, max_length=250)]
    unit_credits: str
    skus: list[_Pattern]
    """May be empty: a meter that was ever used stays in the file, or what it counted had no unit."""

    @field_validator("unit_credits")
    @classmethod
    def _unit_in_range(cls, unit: str) -> str:
        if to_micro(unit) < UNIT_MICRO_MIN:
            raise ValueError("a unit is at least 0.01 credits")
        return unit

    @cached_property
    def unit_micro(self) -> int:
        """Micro-credits of one unit."""
        return to_micro(self.unit_credits)


class MeterMap(_Strict):
    """All meters under one version number."""

    version: Annotated[int, Field(ge=1, le=2**31 - 1, strict=True)]
    free_skus: list[_Pattern] = []
    meters: Annotated[list[Meter], Field(min_length=1, max_length=METERS_MAX)]

    @model_validator(mode="after")
    def _no_ambiguity(self) -> Self:
        for what, values in {
            "meter name": [meter.name for meter in self.meters],
            "event_name": [meter.event_name for meter in self.meters],
            "SKU or pattern": [*self.free_skus, *(sku for meter in self.meters for sku in meter.skus)],
        }.items():
            if twice := sorted({value for value in values if values.count(value) > 1}):
                raise ValueError(f"{what} {', '.join(twice)} is listed more than once")
        return self

    @cached_property
    def terms(self) -> Mapping[str, MeterTerms]:
        """What of each meter must never change."""
        return {meter.name: MeterTerms(meter.event_name, meter.unit_micro) for meter in self.meters}

    @cached_property
    def digest(self) -> str:
        """Of all that decides an amount: another digest under the same version is a mistake."""
        fields: list[str | int] = [*self.free_skus]
        for meter in self.meters:
            fields += ["", meter.name, meter.event_name, meter.unit_micro, *meter.skus]
        return hash_hex("meterline.meters.1", *fields)

    @cached_property
    def _exact(self) -> Mapping[str, str | None]:
        rules: list[tuple[str, str | None]] = [(sku, None) for sku in self.free_skus]
        rules += [(sku, meter.name) for meter in self.meters for sku in meter.skus]
        return {sku: name for sku, name in rules if not _WILDCARDS & set(sku)}

    def meter_of(self, sku: str) -> str | None:
        """The meter a SKU counts on; None: it is free.

        Raises:
            UnmappedSkuError: the file doesn't say.
        """
        if sku in self._exact:
            return self._exact[sku]
        if any(fnmatchcase(sku, pattern) for pattern in self.free_skus):
            return None
        for meter in self.meters:
            if any(fnmatchcase(sku, pattern) for pattern in meter.skus):
                return meter.name
        raise UnmappedSkuError(sku)

    def credits_by_meter(self, skus: Mapping[str, SkuTotal]) -> dict[str, int]:
        """Billable micro-credits of a window by meter; a meter appears when one of its SKUs was used.

        Raises:
            UnmappedSkuError: a SKU with billable events has no meter.
        """
        totals: dict[str, int] = {}
        for sku, total in skus.items():
            if (total.count or total.credits_micro) and (name := self.meter_of(sku)) is not None:
                totals[name] = totals.get(name, 0) + total.credits_micro
        return totals


class _UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys in silence; a price list must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002 - PyYAML's signature
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            problem = f"{twice[0]!r} is given twice"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def load_meters(path: str = "") -> MeterMap:
    """Read a meters file; without a path the packaged one: every SKU on the meter `credits`.

    Raises:
        UserError: the file can't be read, or every rule it breaks.
    """
    source = Path(path) if path else files("meterline.billing") / "meters.yaml"
    try:
        data = yaml.load(source.read_text("utf-8"), _UniqueKeys)  # noqa: S506 - a SafeLoader
        return MeterMap.model_validate(data)
    except OSError as error:
        raise UserError(f"meters file {source} can't be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"meters file {source} is not YAML: {error}") from None
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(part) for part in problem['loc']) or 'file'}: {problem['msg']}"
            for problem in error.errors()
        ]
        raise UserError(f"meters file {source} is wrong:\n" + "\n".join(lines)) from None
