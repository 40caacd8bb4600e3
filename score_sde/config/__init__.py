"""Configs: what one holds, what must hold between its keys, and what is built from it."""

from .keys import default_config, explain
from .reading import differences, from_json, from_text, load, overridden, split_arguments, to_json, validate

__all__ = ["default_config", "differences", "explain", "from_json", "from_text", "load", "overridden"]
__all__ += ["split_arguments", "to_json", "validate"]
