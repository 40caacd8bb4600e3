"""Old names of modules: imports that pages of version 0.1 showed, when all files lay in one folder, warn and work."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "bounds": ("likelihood.chain_bound", "models.reverse"), "build": ("config.build",),
    "checkpoint": ("tasks.checkpoint",), "closed_form": ("models.closed_form",), "codecs": ("data.codecs",),
    "codes": ("tasks.codes",), "demo": ("tasks.demo",), "dequantisation": ("likelihood.dequantisation",),
    "interop_diffusers": ("foreign.diffusers",), "latents": ("likelihood.latents",),
    "model": ("models.base", "models.rules", "models.reverse"), "outliers": ("likelihood.outliers",),
    "parallel": ("machine.parallel",), "progress": ("machine.progress",), "results": ("tasks.results",),
    "score_matching": ("losses.score_matching", "models.traces"), "signals": ("data.recordings",),
    "time_laws": ("losses.time_laws",), "toys": ("data.toys",), "train": ("tasks.train", "tasks.step"),
}  # fmt: skip


class Finder(MetaPathFinder, Loader):
    """Finds score_sde.NAME for the names in `MOVED`: a module whose names are those of the places it moved to."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "score_sde" and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        places = [f"score_sde.{place}" for place in MOVED[module.__name__.partition(".")[2]]]
        now = " and ".join(places)

        def look_up(name: str) -> Any:
            for place in map(import_module, places):
                if hasattr(place, name):
                    return getattr(place, name)
            raise AttributeError(f"{module.__name__}, which is {now} now, has no {name}")

        module.__getattr__ = look_up  # type: ignore[method-assign]
        warnings.warn(f"{module.__name__} is {now} since version 0.2", DeprecationWarning, stacklevel=2)


def install() -> None:
    """Let imports by old names reach the `Finder`, after all that exists was looked for."""
    sys.meta_path.append(Finder())
