"""Meterline: usage metering and billing that loses nothing and counts nothing twice."""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("meterline")
