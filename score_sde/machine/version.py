"""The version of the package, which setup.cfg reads from here."""

__version__ = "0.2.0"
