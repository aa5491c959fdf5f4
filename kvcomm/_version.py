"""The version, in one place; setup.cfg reads it without importing anything."""

__all__ = ["__version__"]

__version__ = "0.1.0"
