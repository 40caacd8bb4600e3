"""Names of classes: from sampling.labels=cat,dog to numbers of classes, and from numbers to the names on grids."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from ..data.sets import Data
from ..machine.log import log


def resolve_labels(config: ConfigDict, data: Data, restores: bool = False) -> None:
    """Replace names of classes in the config by numbers. Raises ValueError for an unknown class, with the nearest name.

    A config without labels means all classes, and here those with training examples; with `restores` it means none.
    """
    s, names = config.sampling, data.class_names
    with s.ignore_type():
        s.labels = tuple(class_number(label, "sampling.labels", names) for label in s.labels)
        s.negative_label = class_number(s.negative_label, "sampling.negative_label", names)
    conditional = config.model.class_conditional or s.classifier
    if s.labels and names and conditional:
        log.info("classes: %s", ", ".join(f"{i} is {class_name(i, names)}" for i in dict.fromkeys(s.labels)))
    if not s.labels and conditional and not restores and data.empty_classes:
        full = [i for i in range(data.num_classes) if i not in data.empty_classes]
        s.labels = tuple(full[: s.num_samples])
        empty = [f"{i} ({names[i]})" if names else str(i) for i in data.empty_classes]
        log.info("classes without training examples are not sampled: %s", some(empty))


def class_number(label: int | str, key: str, names: Sequence[str]) -> int:
    """The number of a class, from its name or its number; -1 is no class.

    If all names are whole numbers, such as of folders 1, 2, ..., 10, a number is read as a name; otherwise only if it
    is no class's number. Raises ValueError, which names the `key`, for an unknown class.
    """
    if isinstance(label, str) and label not in names and re.fullmatch(r"-?\d+", label):
        label = int(label)
    digits = bool(names) and all(name.isascii() and name.isdigit() for name in names)
    text = str(label)
    if isinstance(label, int) and (label == -1 or not (digits or (label >= len(names) and text in names))):
        return label
    if text in names:
        return list(names).index(text)
    if digits and isinstance(label, int):
        same = [i for i, name in enumerate(names) if int(name) == label]
        if len(same) == 1:
            return same[0]
    if not names:
        raise ValueError(f"{key}: nothing names the classes of these data, so {text!r} is none: give numbers from 0")
    near = difflib.get_close_matches(text, names, n=1, cutoff=0.0)
    hint = f"the nearest name is {near[0]!r}, and " if near else ""
    raise ValueError(f"{key}: there is no class {text!r}: {hint}there are {some(names)}, -1 for none")


def class_name(label: int, names: Sequence[str]) -> str:
    """A class in pictures: its name, its number if it has none, and "no label" for -1."""
    if label < 0:
        return "no label"
    return names[label] if label < len(names) else str(label)


def some(words: Sequence[str], most: int = 20) -> str:
    """A list of the first words, and how many more there are."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
