"""Data: sets and their order, the files that they are read from, and the codecs between stored values and a model's.

Names are imported when they are first asked for: a likelihood needs the codecs, and not what reads images.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sets import Data, Split, batch, batch_indices, digest, leave_out, load_data, shrink

__all__ = ["Data", "Split", "batch", "batch_indices", "digest", "leave_out", "load_data", "shrink"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".sets", __name__), name)
