"""What is trained on and what is held out: whatever the folders are called and however they are linked."""

import os
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from score_sde.data import Data, load_data
from tests.files import png


def save(root: Path, names: str) -> None:
    """Images under these names, each with a grey of its own: 10, 11, ..."""
    for i, name in enumerate(names.split()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((2, 2), 10 + i, np.uint8)).save(path)


def greys(data: Data) -> tuple[list[int], list[int]]:
    return tuple(sorted(split.x[:, 0, 0, 0].tolist()) for split in (data.train, data.test))  # type: ignore[return-value]


def load(root: Path) -> Data:
    return load_data("files", root)


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize("test", ["test", "Testing", "val", "Valid", "VALIDATION"])
@pytest.mark.parametrize("top", ["", "mine/", "a/b/"])
def test_test_images_are_never_trained_on(tmp_path, train, test, top):
    names = [f"{top}{split}/{label}.png" for split in (train, test) for label in ("cat/1", "cat/2", "dog/1")]
    with zipfile.ZipFile(tmp_path / "data.ZIP", "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name, png(np.full((2, 2), 10 + i, np.uint8)))
        archive.writestr(f"__MACOSX/{top}._{train}", b"")
    save(tmp_path / "folder", " ".join(names))
    for path in (tmp_path / "data.ZIP", tmp_path / "folder"):
        data = load(path)
        assert greys(data) == ([10, 11, 12], [13, 14, 15])
        assert data.class_names == ("cat", "dog") and data.test.y.tolist() == [0, 0, 1]
        assert data.notes == ()


@pytest.mark.parametrize("names", [("train\\1.png", "test\\2.png"), ("./train/1.png", "/test/2.png")])
def test_names_of_any_writer_are_folders(tmp_path, names):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name, png(np.full((2, 2), 10 + i, np.uint8)))
    assert greys(load(tmp_path / "a.zip")) == ([10], [11])


def test_what_is_not_read_is_counted_and_said(tmp_path):
    save(tmp_path, "train/1.png train/2.png test/3.png val/4.png val/5.png extra/6.png 7.png")
    for name in ("a.gif", "b.GIF", "train/notes.md", "README"):
        (tmp_path / name).write_text("")
    data = load(tmp_path)
    assert greys(data) == ([10, 11], [12])
    assert data.notes == (
        "not read: 1 files at the top, because there is a train folder",
        "not read: 1 files in extra/, because there is a train folder",
        "not read: 2 files in val/, because there is a train folder",
        "not read: 2 .gif, 1 .md, 1 files without ending",
    )


def test_train_alone_holds_out_a_tenth_and_its_folders_are_classes(tmp_path):
    save(tmp_path, " ".join(f"data/train/{'ab'[i % 2]}/{i}.png" for i in range(20)))
    data = load(tmp_path)
    assert (len(data.train), len(data.test), data.class_names) == (18, 2, ("a", "b"))
    save(tmp_path, "data/Val/a/1.png data/Val/b/1.png")
    for path in (tmp_path, tmp_path / "data" / "train"):
        assert (len(load(path).train), len(load(path).test)) == (20, 2)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("test/1.png test/2.png x/3.png", "has a folder test but no folder train: put the data for training"),
        ("VAL/1.png test/2.png", "has a folder test but no folder train"),
        ("cat/train/1.png cat/test/2.png dog/train/3.png", "cat/test/2.png in .* lies in a folder of held-out data"),
        ("top/train/1.png top/test/2.png 3.png", "top/test/2.png in .* lies in a folder of held-out data"),
        ("train/1.png train/a/Val/2.png test/3.png", "train/a/Val/2.png in .* lies in a folder of held-out data"),
        ("train/1.png train/test/2.png", "train/test/2.png in .* lies in a folder of held-out data"),
        ("train_set/1.png train_set/2.png test_set/3.png", "test_set/3.png in .* lies in a folder of held-out data"),
        ("coco/Val2017/1.png coco/train2017/2.png", "coco/Val2017/1.png in .* lies in a folder of held-out data"),
    ],
)
def test_unclear_splits_are_refused(tmp_path, names, words):
    save(tmp_path, names)
    with pytest.raises(ValueError, match=words):
        load(tmp_path)


def test_classes_of_both_splits_may_have_the_name_of_one(tmp_path):
    save(tmp_path, "train/valid/1.png train/other/2.png test/valid/3.png")
    data = load(tmp_path)
    assert (greys(data), data.class_names) == (([10, 11], [12]), ("other", "valid"))


def test_each_real_folder_is_read_once(tmp_path):
    save(tmp_path, "b/1.png b/2.png c/3.png")
    (tmp_path / "b" / "back").symlink_to(tmp_path)
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "c" / "self").symlink_to(".")
    (tmp_path / "c" / "ring").symlink_to("ring")
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    save(elsewhere, "4.png")
    (tmp_path / "d").symlink_to(elsewhere)
    data = load(tmp_path)
    assert sorted(greys(data)[0] + greys(data)[1]) == [10, 10, 11, 12]
    assert data.class_names == ("b", "c", "d")
    assert data.notes == ("not read: 1 broken links, 3 links to folders that are already read",)


def test_splits_may_be_links_into_a_folder_of_everything(tmp_path):
    save(tmp_path, "all/a/1.png all/b/2.png all/c/3.png")
    for name, where in (("train", "all/a"), ("test", "all/b")):
        (tmp_path / name).symlink_to(tmp_path / where)
    data = load(tmp_path)
    assert greys(data) == ([10], [11])
    assert "1 files in all/" in data.notes[0]


def test_a_file_is_read_once_and_never_in_both_splits(tmp_path):
    save(tmp_path, "1.png 2.png 3.png")
    (tmp_path / "0.png").symlink_to(tmp_path / "2.png")
    data = load(tmp_path)
    assert sorted(greys(data)[0] + greys(data)[1]) == [10, 11, 12]
    assert data.notes == ("not read: 1 links to files that are already read",)
    save(tmp_path / "split", "train/1.png train/2.png test/3.png")
    (tmp_path / "split" / "test" / "0.png").symlink_to(tmp_path / "split" / "train" / "2.png")
    with pytest.raises(ValueError, match=r"test/0\.png and train/2\.png in .* are one file in both splits"):
        load(tmp_path / "split")


def test_pipes_and_sockets_are_passed_by(tmp_path, monkeypatch):
    save(tmp_path, "1.png 2.png")
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.png")
        (tmp_path / "none.png").symlink_to("nowhere.png")
        data = load(tmp_path)
    assert data.notes == ("not read: 1 broken links, 2 pipes, sockets and devices",)
    with pytest.raises(ValueError, match=r"pipe\.png is no folder, image"):
        load(tmp_path / "pipe.png")


def test_no_images_but_others_says_which(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.gif").write_text("")
    with pytest.raises(ValueError, match=r"no images \(\.png, .*\) in .*, only 3 \.gif"):
        load(tmp_path)


def test_folders_that_are_no_classes_say_why(tmp_path):
    save(tmp_path, "a/1.png b/2.png 3.png")
    data = load(tmp_path)
    assert data.num_classes == 0 and data.notes == (
        "2 folders are not used as classes, because 3.png lies in none of them",
    )
