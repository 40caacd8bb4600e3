"""Splits and classes of a folder or zip: which files are for training, which are held out, and each file's class.

If all files lie in one top folder, its name is dropped. Below it, `train` or `training` is the training split, and
`test` or `testing` is held out, or, if there is neither, `val`, `valid` or `validation`; case does not matter. Other
files are then not read. Without such folders all files are one set. A folder with a held-out name anywhere else is
refused, because its images would be used for training; so is a `test_set` beside a `train_set`. Each real folder is
read once.
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
    """Sorted names of files, relative to a folder and with slashes, and how many of each kind were skipped."""

    names: list[str]
    skipped: Counter[str]


@dataclass(frozen=True)
class Layout:
    """Names of the training and the held-out files, the top folder that all share, and notes for the user."""

    train: list[str]
    test: list[str]
    top: str
    notes: list[str]

    def class_folder(self, name: str) -> str | None:
        """The first folder of a file below the top and its split's folder, or None."""
        first, *inside = name.removeprefix(self.top).split("/")
        folders = inside if self.test or first.lower() in TRAIN else [first, *inside]
        return folders[0] if len(folders) > 1 else None


def root_of(path: Path) -> Path:
    """The root folder of a data set: `path`, or its parent if `path` is a `train` with held-out files beside it."""
    siblings = [p.name.lower() for p in path.parent.iterdir() if p.is_dir()] if path.name.lower() in TRAIN else []
    return path.parent if set(siblings) & {*_HELD_OUT} else path


def listing(root: Path) -> Listing:
    """List all files below a folder except hidden ones, each real folder once, by its own name before any link to it.

    Raises ValueError for a folder that cannot be read.
    """
    names: list[str] = []
    skipped: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    links: list[tuple[Path, str]] = []

    def walk(folder: Path, prefix: str) -> None:
        try:
            status = folder.stat()
            entries = sorted(folder.iterdir(), key=lambda path: (not _is_split(path.name), path.name))
        except OSError as error:
            raise ValueError(f"the folder {folder} cannot be read ({error.strerror})") from None
        if (status.st_dev, status.st_ino) in seen:
            skipped["links to folders that are already read"] += 1
            return
        seen.add((status.st_dev, status.st_ino))
        for path in entries:
            if hidden(path.name):
                continue
            if os.path.isdir(path):
                # a split may be a link into a larger folder; other links wait until all real folders are read
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
    """Split files into training and held-out ones by their folders. Raises ValueError where that is ambiguous."""
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
            f"{where} has a folder {test[0].removeprefix(top).split('/')[0]} but no folder train: put the data for "
            f"training into train, or rename that folder if it is a class"
        )
    rest = sorted(n for others in by_split.values() for n in others)
    hidden_test = _hidden_test(train or rest, {folder for n in test for folder in n.removeprefix(top).split("/")[1:-1]})
    if hidden_test is not None:
        raise ValueError(
            f"{hidden_test} in {where} lies in a folder of held-out data but would be used for training: put train and "
            f"test at the top, or rename that folder if it is a class"
        )
    if not train:
        return Layout(rest, [], top, [])
    folders = (n.removeprefix(top).rpartition("/")[0].split("/")[0] for n in rest)
    unread = Counter(f"in {folder}/" if folder else "at the top" for folder in folders)
    reason = "because there is a train folder"
    return Layout(train, test, top, [f"not read: {n} files {place}, {reason}" for place, n in sorted(unread.items())])


def once_each(root: Path, layout: Layout) -> Layout:
    """The layout without links to files that it already has.

    Raises ValueError for a file that a link puts into both splits.
    """
    if not any(os.path.islink(root / name) for name in layout.train + layout.test):
        return layout
    first: dict[tuple[int, int], tuple[str, bool]] = {}
    kept: tuple[list[str], list[str]] = [], []
    files = [(name, held_out) for held_out, names in enumerate((layout.train, layout.test)) for name in names]
    for name, held_out in sorted(files, key=lambda pair: os.path.islink(root / pair[0])):
        status = (root / name).stat()
        before, was_held_out = first.setdefault((status.st_dev, status.st_ino), (name, bool(held_out)))
        if was_held_out != held_out:
            raise ValueError(f"{name} and {before} in {root} are one file in both splits: remove one of them")
        if before == name:
            kept[held_out].append(name)
    train, test = (sorted(names) for names in kept)
    count = len(files) - len(train) - len(test)
    notes = [f"not read: {count} links to files that are already read"] if count else []
    return Layout(train, test, layout.top, [*layout.notes, *notes])


def classes_of(layout: Layout, where: str) -> tuple[dict[str, int], tuple[str, ...], list[str]]:
    """The class of every file by its folder, and the classes' names, both empty if the folders are not classes.

    There is a note for the user if they are not only because some files lie outside of them. Raises ValueError for a
    held-out file outside of the class folders.
    """
    folder = {n: layout.class_folder(n) for n in layout.train + layout.test}
    classes = sorted({f for n in layout.train if (f := folder[n]) is not None})
    outside = next((n for n in layout.train if folder[n] is None), None)
    if len(classes) < 2:
        return {}, (), []
    if outside is not None:
        return {}, (), [f"{len(classes)} folders are not used as classes, because {outside} lies in none of them"]
    odd = next((n for n in layout.test if folder[n] not in classes), None)
    if odd is not None:
        raise ValueError(
            f"{odd} in {where} lies in none of train's class folders: move it into one of {', '.join(classes)}"
        )
    number = {name: i for i, name in enumerate(classes)}
    return {n: number[f] for n, f in folder.items() if f is not None}, tuple(classes), []


def hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or one that macOS adds to zips."""
    return name.startswith((".", "__MACOSX"))


def _top(names: Sequence[str]) -> str:
    """The top folder that all names share, "" or "a/b/", up to a split's folder."""
    first, *others = {name.rpartition("/")[0]: None for name in names}
    shared = first.split("/") if first else []
    for folder in others:
        shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(shared, folder.split("/")))]
    return "".join(f"{folder}/" for folder in takewhile(lambda folder: not _is_split(folder), shared))


def _hidden_test(names: Sequence[str], classes: Container[str]) -> str | None:
    """The first file that lies in a folder of held-out data: `test`, or `test_set` where there is a `train_set`."""
    folders = {name: [f.lower() for f in name.split("/")[:-1] if f not in classes] for name in names}
    known = {f for path in folders.values() for f in path}
    twins = {f for f in known for a in _HELD_OUT for b in TRAIN if a in f and f.replace(a, b) in known}
    return next((name for name, path in folders.items() if twins.union(_HELD_OUT) & set(path)), None)


def _is_split(folder: str) -> bool:
    return folder.lower() in (*TRAIN, *_HELD_OUT)
