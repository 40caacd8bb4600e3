"""Which files of a folder or a zip are read: each real folder once, what is for training and what is held out, classes.

Where all files lie in one top folder, that is taken off. What lies under `train` or `training` then is for training,
and under `test` or `testing` held out, or, where there is neither, under `val`, `valid` or `validation`, in upper or
lower case; nothing else is read. Without any of these all files are one set. A folder with a name of the held-out kind
anywhere else is refused, since its images would be trained on, and so is a `test_set` beside a `train_set`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

TRAIN = ("train", "training")
TEST = ("test", "testing")
VALIDATION = ("val", "valid", "validation")
_HELD_OUT = (*TEST, *VALIDATION)


@dataclass(frozen=True)
class Listing:
    """Names of files, relative to a folder and with slashes, sorted; and what was left out, by kind."""

    names: list[str]
    skipped: Counter[str]


@dataclass(frozen=True)
class Layout:
    """Names to train on and to hold out, the top folder that is taken off all of them, and sentences on the rest."""

    train: list[str]
    test: list[str]
    top: str
    notes: list[str]

    def class_folder(self, name: str) -> str | None:
        """The folder that a file lies in, below the top and a split's, or None."""
        inside = name.removeprefix(self.top).split("/")[1 if self.test or _is(name, self.top, TRAIN) else 0 :]
        return inside[0] if len(inside) > 1 else None


def root_of(path: Path) -> Path:
    """The folder that a data set's names are relative to: above a `train` with held-out files beside it."""
    beside = [p.name.lower() for p in path.parent.iterdir() if p.is_dir()] if path.name.lower() in TRAIN else []
    return path.parent if set(beside) & {*_HELD_OUT} else path


def listing(root: Path) -> Listing:
    """All files below a folder but hidden ones; each real folder once, under a name without links if it has one.

    Raises ValueError for a folder that may not be read.
    """
    names: list[str] = []
    skipped: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    links: list[tuple[Path, str]] = []

    def walk(folder: Path, prefix: str) -> None:
        try:
            status = folder.stat()
            inside = sorted(folder.iterdir(), key=lambda path: (not _is_split(path.name), path.name))
        except OSError as error:
            raise ValueError(f"the folder {folder} cannot be read ({error.strerror})") from None
        if (status.st_dev, status.st_ino) in seen:
            skipped["links to folders that are read already"] += 1
            return
        seen.add((status.st_dev, status.st_ino))
        for path in inside:
            if hidden(path.name):
                continue
            if os.path.isdir(path):
                # a split may be a link into a folder of everything; any other folder has its own name first
                if path.is_symlink() and not _is_split(path.name):
                    links.append((path, f"{prefix}{path.name}/"))
                else:
                    walk(path, f"{prefix}{path.name}/")
            elif os.path.isfile(path):
                names.append(prefix + path.name)
            else:
                skipped["broken links" if path.is_symlink() else "pipes, sockets and devices"] += 1

    walk(root, "")
    while links:
        walk(*links.pop(0))
    return Listing(sorted(names), skipped)


def lay_out(names: Sequence[str], where: str) -> Layout:
    """What is for training and what is held out of these files.

    Raises ValueError where that is not clear.
    """
    top = _top(names)
    by_split: dict[str, list[str]] = {}
    for name in names:
        first, slash, _ = name.removeprefix(top).partition("/")
        by_split.setdefault(first.lower() if slash and _is_split(first) else "", []).append(name)
    train = sorted(n for key in TRAIN for n in by_split.pop(key, []))
    kinds = [kind for kind in (TEST, VALIDATION) if any(key in by_split for key in kind)]
    test = sorted(n for key in (kinds[0] if kinds else ()) for n in by_split.pop(key, []))
    if test and not train:
        raise ValueError(
            f"{where} has the folder {test[0].removeprefix(top).split('/')[0]} and no train: put what is to be trained "
            f"on into train, or rename that folder if it is a class"
        )
    rest = sorted(n for left in by_split.values() for n in left)
    hidden_test = _hidden_test(train or rest, {part for n in test for part in n.removeprefix(top).split("/")[1:-1]})
    if hidden_test is not None:
        raise ValueError(
            f"{hidden_test} in {where} lies in a folder of held-out data that would be trained on: let train and "
            f"test be at the top, or rename that folder if it is a class"
        )
    if not train:
        return Layout(rest, [], top, [])
    left = Counter(_first_folder(n.removeprefix(top)) for n in rest)
    notes = [f"not read: {count} images {place}, since train is read" for place, count in sorted(left.items())]
    return Layout(train, test, top, notes)


def about_classes(layout: Layout) -> list[str]:
    """A sentence where folders would be classes if all files lay in them."""
    outside = [n for n in layout.train if layout.class_folder(n) is None]
    folders = {layout.class_folder(n) for n in layout.train} - {None}
    if not outside or len(folders) < 2:
        return []
    return [f"{len(folders)} folders are no classes, since {outside[0]} lies in none"]


def once_each(root: Path, layout: Layout) -> Layout:
    """The layout without links to files that are in it already.

    Raises ValueError where a file is for training and, by a link, held out.
    """
    if not any(os.path.islink(root / name) for name in layout.train + layout.test):
        return layout
    first: dict[tuple[int, int], tuple[str, bool]] = {}
    kept: tuple[list[str], list[str]] = [], []
    everything = [(name, held_out) for held_out, part in enumerate((layout.train, layout.test)) for name in part]
    for name, held_out in sorted(everything, key=lambda pair: os.path.islink(root / pair[0])):
        status = (root / name).stat()
        before, was_held_out = first.setdefault((status.st_dev, status.st_ino), (name, bool(held_out)))
        if was_held_out != held_out:
            raise ValueError(f"{name} and {before} in {root} are one file, to train on and held out: take one away")
        if before == name:
            kept[held_out].append(name)
    train, test = (sorted(part) for part in kept)
    count = len(everything) - len(train) - len(test)
    notes = [f"not read: {count} links to files that are read already"] if count else []
    return Layout(train, test, layout.top, [*layout.notes, *notes])


def classes_of(layout: Layout, where: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """The class of every file, from the folder it lies in, and their names; nothing where these are no classes.

    Raises ValueError for a held-out file that lies in no class's folder.
    """
    folder = {n: layout.class_folder(n) for n in layout.train + layout.test}
    classes = sorted({f for n in layout.train if (f := folder[n]) is not None})
    if len(classes) < 2 or any(folder[n] is None for n in layout.train):
        return {}, ()
    odd = next((n for n in layout.test if folder[n] not in classes), None)
    if odd is not None:
        raise ValueError(f"{odd} in {where} lies in none of train/'s class folders, which are {', '.join(classes)}")
    number = {name: i for i, name in enumerate(classes)}
    return {n: number[f] for n, f in folder.items() if f is not None}, tuple(classes)


def hidden(name: str) -> bool:
    """Whether a file or folder is no data: hidden, or what macOS leaves in zips."""
    return name.startswith((".", "__MACOSX"))


def _top(names: Sequence[str]) -> str:
    """The folders that all names begin with, "" or "a/b/"; a split's name ends them."""
    first, *others = {name.rpartition("/")[0]: None for name in names}
    shared = first.split("/") if first else []
    for folder in others:
        shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(shared, folder.split("/")))]
    whole = list(takewhile(lambda part: not _is_split(part), shared))
    return "".join(f"{part}/" for part in whole)


def _hidden_test(names: Sequence[str], classes: Container[str]) -> str | None:
    """The first file that lies in a folder of held-out data: `test`, or `test_set` where there is a `train_set`."""
    parts = {name: [p.lower() for p in name.split("/")[:-1] if p not in classes] for name in names}
    here = {p for inside in parts.values() for p in inside}
    twins = {p for p in here for a in _HELD_OUT for b in TRAIN if a in p and p.replace(a, b) in here}
    return next((name for name, inside in parts.items() if twins.union(_HELD_OUT) & set(inside)), None)


def _is(name: str, top: str, kind: Sequence[str]) -> bool:
    return name.removeprefix(top).split("/")[0].lower() in kind


def _is_held_out(folder: str) -> bool:
    return folder.lower() in _HELD_OUT


def _is_split(folder: str) -> bool:
    return folder.lower() in TRAIN or _is_held_out(folder)


def _first_folder(name: str) -> str:
    folder, slash, _ = name.partition("/")
    return f"in {folder}/" if slash else "beside them"
