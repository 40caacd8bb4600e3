"""One's own data: folders, zips and arrays in every layout, labels, held-out parts, and clear errors."""

import json
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from score_sde.data import Data, load_data
from score_sde.data.files import Stream
from score_sde.data.images import Pixels
from tests.files import pixels, png, save


def load(path: Path, **options) -> Data:
    return load_data("files", str(path), **options)


def everything(data: Data) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All examples and labels of both splits, in the order of their first pixels."""
    x = torch.cat([data.train[torch.arange(len(data.train))][0], data.test[torch.arange(len(data.test))][0]])
    order = np.lexsort(x.flatten(1).numpy().T[::-1])
    y = None if data.train.y is None else torch.cat([data.train.y, data.test.y])[order]
    return x[order], y


def expected(images: np.ndarray) -> torch.Tensor:
    """The same order for images (N, C, H, W)."""
    return torch.from_numpy(images[np.lexsort(images.reshape(len(images), -1).T[::-1])])


def test_a_folder_of_images_at_any_depth(tmp_path):
    images = pixels(23, 6, 5, 3)
    for i, image in enumerate(images):
        save(tmp_path / ("deep/er" if i == 7 else "") / f"{i}.png", image)
    (tmp_path / "notes.txt").write_text("not an image")
    save(tmp_path / ".hidden.png", images[0])
    data = load(tmp_path)
    assert (data.shape, data.levels, data.num_classes) == ((3, 6, 5), 256, 0)
    assert (len(data.train), len(data.test)) == (21, 2)
    assert torch.equal(everything(data)[0], expected(images.transpose(0, 3, 1, 2)))
    assert torch.equal(load(tmp_path).test.x, data.test.x)


def test_sub_folders_are_classes(tmp_path):
    images = pixels(12, 4, 4, 3)
    for i, image in enumerate(images):
        save(tmp_path / ("ant", "bee", "cat")[i % 3] / "more" / f"{i}.png", image)
    data = load(tmp_path)
    x, y = everything(data)
    where = {image.tobytes(): i for i, image in enumerate(images)}
    assert y.tolist() == [where[row.permute(1, 2, 0).numpy().tobytes()] % 3 for row in x]
    assert data.num_classes == 3
    assert data.class_names == ("ant", "bee", "cat")


def test_train_and_test_folders_are_kept_apart(tmp_path):
    images = pixels(8, 4, 4, 3)
    for i, image in enumerate(images):
        save(tmp_path / ("train", "test")[i // 6] / ("a", "b")[i % 2] / f"{i}.png", image)
    for path in (tmp_path, tmp_path / "train"):
        data = load(path)
        assert torch.equal(data.train.x, torch.from_numpy(images[[0, 2, 4, 1, 3, 5]].transpose(0, 3, 1, 2)))
        assert torch.equal(data.test.x, torch.from_numpy(images[6:].transpose(0, 3, 1, 2)))
        assert data.train.y.tolist() == [0, 0, 0, 1, 1, 1]
        assert data.test.y.tolist() == [0, 1]
    save(tmp_path / "test" / "c" / "9.png", images[0])
    with pytest.raises(
        ValueError, match=r"test/c/9\.png .* in none of train's class folders: move it into one of a, b"
    ):
        load(tmp_path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("labels", ["int", "float", "null", "absent"])
def test_edms_zip(tmp_path, labels, compression):
    images, path = pixels(11, 4, 4, 3), tmp_path / "data.zip"
    names = [f"{i // 5:05d}/img{i:08d}.png" for i in range(11)]
    value = {"int": lambda i: i % 4, "float": lambda i: [i / 2, -i]}.get(labels)
    with zipfile.ZipFile(path, "w", compression) as out:
        for name, image in zip(names, images):
            out.writestr(name, png(image))
        if labels != "absent":
            listed = [[name, value(i)] for i, name in enumerate(names)] if value else None
            out.writestr("dataset.json", json.dumps({"labels": listed}))
    data = load(path)
    x, y = everything(data)
    assert torch.equal(x, expected(images.transpose(0, 3, 1, 2)))
    index = [next(i for i in range(11) if (images[i].transpose(2, 0, 1) == row.numpy()).all()) for row in x]
    if labels == "int":
        assert y.tolist() == [i % 4 for i in index]
        assert data.num_classes == 4
    elif labels == "float":
        assert torch.equal(y, torch.tensor([[i / 2, -i] for i in index]))
        assert data.num_classes == 0
    else:  # then its folders are the classes
        assert y.tolist() == [i // 5 for i in index]


def test_unequal_sizes_need_image_size(tmp_path):
    for i, shape in enumerate([(6, 8, 3), (6, 8, 3), (7, 8, 3)]):
        save(tmp_path / f"{i}.png", pixels(1, *shape)[0])
    with pytest.raises(ValueError, match=r"2\.png in .* is 7 x 8, but .* is 6 x 8: .*--config\.data\.image_size=SIZE"):
        load(tmp_path)
    assert load(tmp_path, image_size=4).shape == (3, 4, 4)


def test_images_are_cropped_at_their_centre_before_resizing(tmp_path):
    image = np.zeros((8, 20, 3), np.uint8)
    image[:, 6:14] = 255  # the central square is white
    for i in range(2):
        save(tmp_path / f"{i}.png", image)
    assert (load(tmp_path, image_size=4).train.x == 255).all()
    exact = pixels(2, 4, 4, 3)
    for i in range(2):
        save(tmp_path / f"{i}.png", exact[i])
    assert torch.equal(everything(load(tmp_path, image_size=4))[0], expected(exact.transpose(0, 3, 1, 2)))


def test_grey_and_rgb(tmp_path):
    for i, image in enumerate(pixels(4, 4, 4)):
        save(tmp_path / f"{i}.png", image)
    grey, colour = load(tmp_path), load(tmp_path, num_channels=3)
    assert grey.shape == (1, 4, 4)
    assert colour.shape == (3, 4, 4)
    assert torch.equal(grey.train.x.expand(-1, 3, -1, -1), colour.train.x)
    with pytest.raises(ValueError, match="1 or 3 channels, got 2: "):
        load(tmp_path, num_channels=2)


def test_formats_and_transparency(tmp_path):
    image = np.full((4, 4, 3), (200, 100, 50), np.uint8)
    for ending in ("png", "jpg", "webp", "bmp"):
        Image.fromarray(image).save(tmp_path / f"plain.{ending}")
    Image.fromarray(np.dstack([image, np.full((4, 4), 9, np.uint8)])).save(tmp_path / "transparent.PNG")
    x, _ = everything(load(tmp_path))
    assert len(x) == 5
    white = [(9 * value + 246 * 255 + 127) // 255 for value in (200, 100, 50)]
    seen = [(x.int() - torch.tensor(colour)[:, None, None]).abs().amax((1, 2, 3)) for colour in ((200, 100, 50), white)]
    # jpg and webp lose a little
    assert (seen[0] <= 4).sum() == 4 and (seen[1] == 0).sum() == 1


def test_image_errors_name_the_file(tmp_path):
    with pytest.raises(ValueError, match="there are no images"):
        load(tmp_path)
    save(tmp_path / "only.png", pixels(1, 4, 4, 3)[0])
    with pytest.raises(ValueError, match="holds one example, but training needs at least two"):
        load(tmp_path)
    (tmp_path / "broken.png").write_bytes(png(pixels(1, 4, 4, 3)[0])[:60])
    with pytest.raises(ValueError, match=r"broken\.png in .* cannot be read as an image"):
        load(tmp_path)
    (tmp_path / "broken.png").unlink()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"only\.png in .* has 8 bits per number, but deep\.png has 16: .*bits=8"):
        load(tmp_path)
    assert load(tmp_path, pixels=Pixels(bits=8)).levels == 256
    (tmp_path / "not.zip").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"not\.zip is damaged or no zip file"):
        load(tmp_path / "not.zip")


def test_labels_must_name_every_image(tmp_path):
    save(tmp_path / "a.png", pixels(1, 4, 4)[0])
    save(tmp_path / "b.png", pixels(1, 4, 4)[0])
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["a.png", 1]]}))
    with pytest.raises(ValueError, match=r"no label for b\.png"):
        load(tmp_path)


@pytest.mark.parametrize(
    "shape, channels, expected_shape",
    [
        ((11, 5, 6, 3), None, (3, 5, 6)),
        ((11, 3, 5, 6), None, (3, 5, 6)),
        ((11, 5, 6, 1), None, (1, 5, 6)),
        ((11, 1, 5, 6), None, (1, 5, 6)),
        ((11, 5, 6), None, (1, 5, 6)),
        ((11, 5, 6), 3, (1, 5, 6)),
        ((11, 6, 4), None, (1, 6, 4)),
        ((11, 5, 6, 7), 5, (5, 6, 7)),
        ((11, 5, 6, 7), 7, (7, 5, 6)),
    ],
)
def test_npy_of_bytes(tmp_path, shape, channels, expected_shape):
    array = pixels(*shape)
    np.save(tmp_path / "a.npy", array)
    data = load(tmp_path / "a.npy", num_channels=channels)
    assert (data.shape, data.levels) == (expected_shape, 256)
    assert data.train.x.dtype == torch.uint8
    last = expected_shape not in (shape[1:], (1, *shape[1:]))
    first = array[0].transpose(2, 0, 1) if last else array[0].reshape(expected_shape)
    assert any(torch.equal(row, torch.from_numpy(np.ascontiguousarray(first))) for row in everything(data)[0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npy_of_floats_are_vectors(tmp_path, dtype):
    array = np.random.default_rng(0).standard_normal((40, 3)).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    data = load(tmp_path / "a.npy")
    assert (data.shape, data.levels, len(data.test)) == ((3,), None, 4)
    assert torch.equal(everything(data)[0], expected(array.astype(np.float32)))


@pytest.mark.parametrize("x_key", ["arr_0", "x", "images", "data"])
@pytest.mark.parametrize("y_key", ["arr_1", "y", "labels", None])
def test_npz_by_its_keys(tmp_path, x_key, y_key):
    images = pixels(10, 4, 4, 3)
    arrays = {x_key: images, "unrelated": np.zeros(2)} | ({y_key: np.arange(10)} if y_key else {})
    np.savez(tmp_path / "a.npz", **arrays)
    data = load(tmp_path / "a.npz")
    assert torch.equal(everything(data)[0], expected(images.transpose(0, 3, 1, 2)))
    assert data.num_classes == (10 if y_key else 0)
    assert data.notes == ("not read: the arrays unrelated",)
    for x, y in zip(data.train.x, data.train.y if y_key else []):
        np.testing.assert_array_equal(x.numpy(), images[y].transpose(2, 0, 1))


def test_npz_with_its_own_split(tmp_path):
    train, test = pixels(6, 5, 5), pixels(3, 5, 5, seed=1)
    np.savez(
        tmp_path / "a.npz", x_train=train, y_train=np.arange(6)[:, None], x_test=test, y_test=np.arange(3)[:, None]
    )
    data = load(tmp_path / "a.npz")
    np.testing.assert_array_equal(data.train.x[:, 0].numpy(), train)
    np.testing.assert_array_equal(data.test.x[:, 0].numpy(), test)
    assert data.train.y.tolist() == list(range(6))
    np.savez(tmp_path / "b.npz", x_train=train, x_test=pixels(3, 5, 6))
    with pytest.raises(ValueError, match=r"\(1, 5, 5\) but held-out ones of shape \(1, 5, 6\)"):
        load(tmp_path / "b.npz")


def test_arrays_that_do_not_fit_say_why(tmp_path):
    def refused(match: str, **arrays: np.ndarray) -> None:
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(ValueError, match=match):
            load(tmp_path / "a.npz")

    images = pixels(4, 4, 4, 3)
    refused("holds mu, sigma: name the examples arr_0 or x or images or data", mu=images, sigma=images)
    refused("holds x_test: name the examples arr_0", x_test=images)  # which would be trained on
    refused("holds y: name the examples arr_0", y=images)
    refused("holds int64: save pixels as uint8", x=images.astype(np.int64))
    refused(r"must hold examples of shape \(N, \.\.\.\), got shape \(4,\)", x=np.zeros(4))
    refused(r"holds uint8 of shape \(4, 9\), not images: save vectors as float32", x=pixels(4, 9))
    refused(r"must hold 4 labels, .* got int64 of shape \(3,\)", x=images, y=np.arange(3))
    refused("number its classes from 0, got label -1", x=images, y=np.array([0, -1, 1, 2]))
    refused(r"nor its second axis has 1 or 3 or 4 channels: .*data\.num_channels=C", x=pixels(4, 5, 6, 7))
    refused(r"a\.npz cannot be read as arrays of numbers", x=np.array([{}, {}, {}, {}]))
    np.save(tmp_path / "a.npy", np.array([{}, {}]))
    with pytest.raises(ValueError, match=r"a\.npy cannot be read as arrays of numbers"):
        load(tmp_path / "a.npy")
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*none: .*--config\.data\.path=PATH"):
        load(tmp_path / "none")
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"a\.csv is no folder, image, \.zip, \.npy or \.npz file"):
        load(tmp_path / "a.csv")


@pytest.mark.parametrize("kind", ["folder", "zip", "npy images", "npy vectors"])
def test_large_sets_stay_on_disk_and_give_the_same(tmp_path, kind):
    images, path = pixels(30, 4, 5, 3), tmp_path / "data"
    if kind == "folder":
        for i, image in enumerate(images):
            save(path / ("a", "b")[i % 2] / f"{i}.png", image)
    elif kind == "zip":
        path = tmp_path / "data.zip"
        with zipfile.ZipFile(path, "w") as out:
            for i, image in enumerate(images):
                out.writestr(f"{i}.png", png(image))
    else:
        path = tmp_path / "data.npy"
        np.save(path, images if kind == "npy images" else images.reshape(30, 60) / 255)
    whole, streamed = load(path), load(path, memory=100)
    assert isinstance(streamed.train.x, Stream)
    assert isinstance(whole.train.x, torch.Tensor)
    for a, b in ((whole.train, streamed.train), (whole.test, streamed.test)):
        assert (len(a), a.shape) == (len(b), b.shape)
        index = torch.tensor([len(a) - 1, 0, 1, 1])
        for x, y in zip(a[index], b[index]):
            assert x.dtype == y.dtype if x is not None else y is None
            assert x is None or torch.equal(x, y)
    assert (whole.levels, whole.num_classes) == (streamed.levels, streamed.num_classes)


def values(tmp_path: Path, **arrays: np.ndarray) -> Path:
    np.savez(tmp_path / "a.npz", **arrays)
    return tmp_path / "a.npz"


def test_values_that_cannot_be_meant_are_refused_with_their_row(tmp_path):
    good = np.random.default_rng(0).standard_normal((40, 3))
    for row, value, why in ((7, np.nan, "not finite"), (39, -np.inf, "not finite"), (0, 1e39, "float32 cannot hold")):
        wrong = good.copy()
        wrong[row, 1] = value
        words = rf"row {row} \(from 0\), holds {re.escape(str(np.float64(value)))}, which (is )?{why}"
        np.save(tmp_path / "a.npy", wrong)
        for memory in (4 << 30, 100):
            with pytest.raises(ValueError, match=words):
                load(tmp_path / "a.npy", memory=memory)
        with pytest.raises(ValueError, match=words):
            load(values(tmp_path, x=wrong))
        with pytest.raises(ValueError, match="a.npz, x_test " + words):
            load(values(tmp_path, x_train=good, x_test=wrong))


def test_the_row_is_right_in_later_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("score_sde.data.arrays._CHUNK", 8 * 3 * 10)
    wrong = np.zeros((40, 3), np.float32)
    wrong[33] = np.nan
    with pytest.raises(ValueError, match=r"row 33 \(from 0\)"):
        load(values(tmp_path, x=wrong))


def test_float_images_with_channels_last_are_recognised_and_that_is_said(tmp_path):
    array = np.random.default_rng(0).random((20, 8, 8, 3)).astype(np.float32)
    for channels in (None, 3, 1):
        data = load(values(tmp_path, x=array), num_channels=channels)
        assert torch.equal(everything(data)[0], expected(array.transpose(0, 3, 1, 2)))
        assert data.notes == ("floats of shape (20, 8, 8, 3) are read as images with channels last",)
    for kept in (array.transpose(0, 3, 1, 2), np.zeros((20, 4, 4, 4)), np.zeros((20, 16, 5, 7))):
        data = load(values(tmp_path, x=kept))
        assert data.shape == kept.shape[1:] and data.notes == ()
    assert load(values(tmp_path, x=array), num_channels=8).shape == (8, 8, 3)
    assert load(values(tmp_path, x=array[..., :2]), num_channels=2).shape == (2, 8, 8)
    assert "save grey images as (N, 1, 8, 3)" in load(values(tmp_path, x=array[:, 0])).notes[0]
    assert "save grey images as (N, 1, 8, 8)" in load(values(tmp_path, x=array[..., 0])).notes[0]


def test_floats_that_float32_cannot_tell_apart_are_refused(tmp_path):
    x = np.random.default_rng(0).random((40, 3))
    with pytest.raises(
        ValueError, match=r"values from 1\.7e\+09 to 1\.7e\+09, which float32 cannot tell apart: subtract"
    ):
        load(values(tmp_path, x=1.7e9 + x))
    for fine in (1e3 + x, np.full((40, 3), 0.1), 1.7e9 * x):
        assert load(values(tmp_path, x=fine)).shape == (3,)


def test_arrays_of_the_other_byte_order_and_of_the_other_ending(tmp_path):
    a = np.random.default_rng(0).integers(0, 65536, (10, 4, 4))
    assert torch.equal(*(load(values(tmp_path, x=a.astype(kind))).train.x for kind in (">u2", "<u2")))
    np.save(tmp_path / "b.npy", a)
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    with pytest.raises(ValueError, match=r"b\.npz holds one array: rename it to \.npy"):
        load(tmp_path / "b.npz")
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(ValueError, match=r"a\.npy holds several arrays: rename it to \.npz"):
        load(tmp_path / "a.npy")


def test_parts_of_unlike_type_are_refused(tmp_path):
    images = pixels(6, 4, 4)
    for other in (np.zeros((3, 1, 4, 4), np.float32), images.astype(np.uint16)):
        with pytest.raises(ValueError, match=rf"has uint8 for training but {other.dtype} held out: save both as one"):
            load(values(tmp_path, x_train=images, x_test=other))
    assert load(values(tmp_path, x_train=np.zeros((3, 2), np.float32), x_test=np.zeros((3, 2)))).shape == (2,)


def test_upper_case_endings_are_read(tmp_path):
    images = pixels(6, 4, 4)
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "a.npz", images)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        for i, image in enumerate(images):
            out.writestr(f"{i}.PNG", png(image))
    for name in ("a.npy", "a.npz", "a.zip"):
        (tmp_path / name).rename(tmp_path / name.upper())
        assert load(tmp_path / name.upper()).shape == (1, 4, 4)


def test_what_is_wrong_with_a_zip_is_told_with_the_member(tmp_path, monkeypatch):
    path, image = tmp_path / "a.zip", png(pixels(1, 9, 9)[0])

    def refused(words: str) -> None:
        with pytest.raises(ValueError, match=words):
            load(path)

    def pack(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytearray:
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as out:
            warnings.simplefilter("ignore")  # of names that come twice
            for name, content in members:
                out.writestr(name, content)
        return bytearray(path.read_bytes())

    whole = pack(("0.png", image), ("1.png", image))
    whole[whole.index(b"IDAT") + 6] ^= 1
    path.write_bytes(whole)
    refused(r"0\.png in .*a\.zip is damaged or cannot be unpacked \(Bad CRC-32 for file '0\.png'\)")
    whole = pack(("0.png", image), ("1.png", image))
    for mark in (b"PK\x03\x04", b"PK\x01\x02"):  # the flag of encryption, in both headers
        whole[whole.index(mark) + (6 if mark[2] == 3 else 8)] |= 1
    path.write_bytes(whole)
    refused(r"0\.png in .*a\.zip is encrypted: create the zip again without a password")
    whole = pack(("0.png", image), ("1.png", image))
    for mark in (b"PK\x03\x04", b"PK\x01\x02"):
        whole[whole.index(mark) + (8 if mark[2] == 3 else 10)] = 99
    path.write_bytes(whole)
    refused(r"0\.png in .*a\.zip is damaged or cannot be unpacked \(That compression method is not supported\)")
    whole = pack(("0.png", image * 50), ("1.png", image), compression=zipfile.ZIP_DEFLATED)
    whole[45] ^= 0xFF
    path.write_bytes(whole)
    refused(r"0\.png in .*a\.zip is damaged or cannot be unpacked")
    pack(("0.png", image), ("0.png", image))
    refused(r"a\.zip holds 0\.png twice: create the zip again")
    pack(("0.png", image), ("1.png", image[:50]))
    refused(r"1\.png in .*a\.zip cannot be read as an image")
    monkeypatch.setattr("score_sde.data.files._LARGEST", 300)
    pack(("0.png", image), ("1.txt", bytes(400)), ("0.txt", bytes(400)), compression=zipfile.ZIP_DEFLATED)
    refused(r"0\.txt in .*a\.zip has .* GiB unpacked")


def test_oversized_images_and_arrays_are_refused(tmp_path):
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 14000, 14000, 8, 0, 0, 0, 0))
    (tmp_path / "big.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(
        ValueError, match=r"big\.png in .* cannot be read as an image \(Image size \(196000000 pixels\)"
    ):
        load(tmp_path)
    np.save(tmp_path / "a.npy", np.zeros((4, 2), np.float32))
    content = (tmp_path / "a.npy").read_bytes().replace(b"(4, 2), }      ", b"(4" + b"0" * 6 + b", 2), }")
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npy cannot be read as arrays of numbers"):
        load(tmp_path / "a.npy")


def test_the_digest_of_a_stream_knows_how_pixels_are_read(tmp_path):
    for i in range(20):
        Image.new("RGBA", (4, 4), (i, 0, 0, 10 * i)).save(tmp_path / f"{i}.png")
    seen = {
        load(tmp_path, memory=10, pixels=p).train.digest() for p in (Pixels(), Pixels(bits=4), Pixels(background="red"))
    }
    assert len(seen) == 3
