"""Images of 16 bits and with transparency: every level arrives, and no hidden colour does."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from score_sde.cli import run
from score_sde.data import Data, load_data
from score_sde.data.codecs import PixelCodec
from score_sde.data.images import Pixels, decode, grey_and_alpha
from score_sde.tasks.inputs import read_examples

PNG_COLOUR = {1: 0, 2: 4, 3: 2, 4: 6}  # colour type by channels


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 65536, shape, dtype=np.uint16)


def chunk(name: bytes, data: bytes) -> bytes:
    """A part of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(head: bytes, transparent: bytes, rows: bytes) -> bytes:
    """A PNG with this header, and these rows behind their filters."""
    parts = [
        chunk(b"IHDR", head),
        chunk(b"tRNS", transparent),
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png16(a: np.ndarray, transparent: bytes = b"", orientation: int = 1) -> bytes:
    """uint16 (H, W, C) as a PNG whose rows have the five filters in turn (PNG specification, 9.2)."""
    (h, w, c), step = a.shape, 2 * a.shape[2]
    rows, above = b"", np.zeros(w * step, int)
    for y, row in enumerate(np.ascontiguousarray(a, ">u2").reshape(h, -1).view(np.uint8).astype(int)):
        left, corner = (np.r_[np.zeros(step, int), line[:-step]] for line in (row, above))
        p = left + above - corner
        far = np.stack([abs(p - left), abs(p - above), abs(p - corner)])
        paeth = np.choose(far.argmin(0), [left, above, corner])
        rows += (
            bytes([y % 5]) + ((row - [0, left, above, (left + above) // 2, paeth][y % 5]) % 256).astype("u1").tobytes()
        )
        above = row

    exif = b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1" + struct.pack(">HHI", orientation, 0, 0)
    middle = chunk(b"tRNS", transparent) if transparent else b""
    middle += chunk(b"eXIf", exif) if orientation > 1 else b""
    head = struct.pack(">IIBBBBB", w, h, 16, PNG_COLOUR[c], 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + middle + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def tiff16(a: np.ndarray, order: str = "<", deflate: bool = False, planes: int = 1, light: int = 1) -> bytes:
    """uint16 (H, W, C) as a TIFF of one strip (TIFF 6.0)."""
    h, w, c = a.shape
    data = a.astype(order + "u2").tobytes()
    data = zlib.compress(data) if deflate else data
    data += b"\0" * (len(data) % 2)
    bits = struct.pack(f"{order}{c}H", *[16] * c)
    tags = [(256, w), (257, h), (258, 0), (259, 8 if deflate else 1), (262, 2 if c > 2 else light), (273, 8), (277, c)]
    tags += [(278, h), (279, len(data)), (284, planes)] + ([(338, 2)] if c in (2, 4) else [])
    directory = struct.pack(order + "H", len(tags))
    for tag, value in tags:
        if tag == 258:
            where = struct.pack(order + "I", 8 + len(data)) if c > 2 else bits.ljust(4, b"\0")
            directory += struct.pack(order + "HHI", tag, 3, c) + where
        else:
            directory += struct.pack(order + "HHII", tag, 4, 1, value)
    start = struct.pack(order + "HI", 42, 8 + len(data) + len(bits))
    return (b"II" if order == "<" else b"MM") + start + data + bits + directory + bytes(4)


def load(path: Path, **options) -> Data:
    return load_data("files", path, **options)


def both(data: Data) -> torch.Tensor:
    x = torch.cat([data.train.x, data.test.x])
    return x[np.lexsort(x.flatten(1).numpy().T)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["png", "tiff", "tiff of the other order", "deflated tiff", "npy"])
def test_all_65536_levels_arrive(tmp_path, kind, channels):
    a = np.random.default_rng(1).permutation(65536).astype(np.uint16).reshape(2, 64, 512, 1)
    a = np.concatenate([a, np.roll(a, 7, 1), a[::-1]][:channels], -1)
    save = {
        "png": png16, "tiff": tiff16, "tiff of the other order": lambda v: tiff16(v, ">"),
        "deflated tiff": lambda v: tiff16(v, ">", deflate=True),
    }.get(kind)  # fmt: skip
    if save is None:
        np.save(tmp_path / "a.npy", a)
    else:
        for i, image in enumerate(a):
            (tmp_path / f"{i}.{kind[-4:].strip()[:4] if 'png' in kind else 'tif'}").write_bytes(save(image))
    data = load(tmp_path / "a.npy" if save is None else tmp_path)
    assert (data.shape, data.levels, data.train.x.dtype) == ((channels, 64, 512), 65536, torch.int32)
    want = torch.from_numpy(a.astype(np.int32)).permute(0, 3, 1, 2)
    assert torch.equal(both(data), want[np.lexsort(want.flatten(1).numpy().T)])
    assert data.notes == ("pixels have 16 bits in the files: 65536 levels",)


def test_a_png_of_16_bits_lies_over_the_background(tmp_path):
    for channels, background in ((2, "#808080"), (4, "#0a141e")):
        a = random(9, 7, channels)
        a[0, :, -1], a[1, :, -1] = 0, 65535
        under = np.array(Pixels(background=background).colour, np.int64) * 257
        alpha = a[..., -1:].astype(np.int64)
        want = (alpha * a[..., :-1] + (65535 - alpha) * under[: channels - 1] + 32767) // 65535
        found = decode(png16(a), channels == 2, Pixels(background=background).colour)
        assert found.transparent and found.bits == 16
        np.testing.assert_array_equal(found.array, want)
    a = random(5, 5, 3)
    # the second differs in its high byte alone, and the third in its low one
    a[2, 2], a[3, 3], a[4, 4] = (1, 2, 3), (1, 2, 259), (1, 2, 4)
    found = decode(png16(a, struct.pack(">HHH", 1, 2, 3)), False)
    a[2, 2] = 65535
    np.testing.assert_array_equal(found.array, a)
    grey = random(5, 5, 1)
    grey[1, 1] = 300
    found = decode(png16(grey, struct.pack(">H", 300)), True)
    grey[1, 1] = 65535
    np.testing.assert_array_equal(found.array, grey)


def test_images_of_16_bits_are_upright_grey_and_square(tmp_path):
    a = random(6, 4, 3)
    np.testing.assert_array_equal(decode(png16(a, orientation=6), False).array, np.rot90(a, -1))
    grey = decode(png16(a), True).array[..., 0]
    np.testing.assert_allclose(grey, a @ [0.299, 0.587, 0.114], atol=1)
    np.testing.assert_array_equal(decode(png16(a[..., :1]), False).array, a[..., [0, 0, 0]])
    ramp = np.broadcast_to((np.arange(32, dtype=np.uint16) * 2001)[None, :, None], (16, 32, 1))
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png16(ramp))
    x = load(tmp_path, image_size=8, num_channels=1).train.x
    inner = 2001 * (8.5 + 2 * np.arange(1, 7))  # of a ramp any filter's means are the ramp
    np.testing.assert_allclose(x[0, 0, :, 1:-1], np.broadcast_to(inner, (8, 6)), atol=70)
    assert x.max() > 256


def test_bits_are_kept_from_the_top_of_those_that_are_used(tmp_path):
    a = random(3, 8, 8, 3)
    for i, image in enumerate(a):
        (tmp_path / f"{i}.png").write_bytes(png16(image))
    for bits, dtype in ((8, torch.uint8), (12, torch.int32), (1, torch.uint8)):
        data = load(tmp_path, pixels=Pixels(bits=bits))
        assert (data.levels, data.train.x.dtype) == (2**bits, dtype)
        want = torch.from_numpy((a >> (16 - bits)).astype(np.int32)).permute(0, 3, 1, 2)
        assert torch.equal(both(data).int().sum((1, 2, 3)).sort().values, want.sum((1, 2, 3)).sort().values)
        assert data.notes == (f"pixels have 16 bits in the files, reduced to {bits} (data.bits): {2**bits} levels",)
    twelve = a >> 4
    for i, image in enumerate(twelve):
        (tmp_path / f"{i}.png").write_bytes(png16(image))
    data = load(tmp_path, pixels=Pixels(file_bits=12))
    assert data.levels == 4096 and data.train.x.max() == twelve.max()
    assert load(tmp_path, pixels=Pixels(file_bits=12, bits=8)).train.x.max() == twelve.max() >> 4
    np.save(tmp_path / "a.npy", twelve)
    assert load(tmp_path / "a.npy", pixels=Pixels(file_bits=12, bits=8)).train.x.max() == twelve.max() >> 4
    with pytest.raises(
        ValueError, match=r"0\.png in .* holds the value \d+, which needs more than 11 bits: raise data\.file_bits"
    ):
        load(tmp_path, pixels=Pixels(file_bits=11))
    with pytest.raises(ValueError, match=r"data\.bits=9 must not exceed data\.file_bits=8"):
        Pixels(file_bits=8, bits=9)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png in .* has 8 bits per number: reduce data\.bits=9 to that or less"):
        load_data("files", tmp_path / "b.png", pixels=Pixels(bits=9))


def test_a_set_of_16_bits_that_stays_on_disk_is_the_same(tmp_path):
    a = random(20, 6, 5, 3)
    np.save(tmp_path / "a.npy", a)
    (tmp_path / "images").mkdir()
    for i, image in enumerate(a):
        (tmp_path / "images" / f"{i:02d}.png").write_bytes(png16(image))
    for path in (tmp_path / "images", tmp_path / "a.npy"):
        for pixels in (Pixels(), Pixels(bits=8)):
            whole, streamed = load(path, pixels=pixels), load(path, pixels=pixels, memory=100)
            x = streamed.train[torch.tensor([3, 0])][0]
            assert x.dtype == whole.train.x.dtype and torch.equal(x, whole.train.x[[3, 0]])
            assert whole.levels == streamed.levels and whole.notes == streamed.notes


@pytest.mark.parametrize("deflate", [False, True])
def test_tiffs_in_which_0_is_white_are_no_negatives(deflate):
    a = random(5, 6, 1)
    assert np.array_equal(decode(tiff16(a, deflate=deflate, light=0), True).array, 65535 - a)


def test_what_has_other_bits_is_refused():
    def refused(content: bytes, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            decode(content, False)

    def saved(image: Image.Image, form: str, **options) -> bytes:
        out = io.BytesIO()
        image.save(out, form, **options)
        return out.getvalue()

    refused(saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "numbers of 32 bits or signed ones")
    refused(saved(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"), "numbers of 32 bits or signed ones")
    for deflate in (False, True):
        refused(tiff16(random(4, 4, 3), planes=2, deflate=deflate), "has 16 bits per number in separate planes or in")
    refused(png16(random(4, 4, 3))[:90], r"cannot be read as an image \(")
    refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read as an image")


def page(mode: str, hidden: int) -> Image.Image:
    """Red on a transparent page, whose hidden colour is another in each image."""
    if mode in ("LA", "RGBA"):
        image = Image.new(mode, (6, 6), (hidden, 0) if mode == "LA" else (hidden, 255 - hidden, 7, 0))
        image.paste((90, 255) if mode == "LA" else (200, 30, 30, 255), (2, 2, 4, 4))
        return image
    image = Image.new("P", (6, 6), hidden % 3)
    image.putpalette([9, 8, 7, 99, 98, 97, 250, 1, 2, 200, 30, 30])
    image.paste(3, (2, 2, 4, 4))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L with a transparent shade", "RGB with a transparent colour"])
def test_hidden_colours_never_become_data(tmp_path, mode):
    for i in range(12):
        options = {"transparency": 20 * i % 3} if mode == "P" else {}
        image = page(mode if mode in ("RGBA", "LA") else "P", 20 * i)
        if "with" in mode:
            kind = mode.split()[0]
            image = Image.new(kind, (6, 6), i if kind == "L" else (i, 0, 0))
            image.paste(90 if kind == "L" else (200, 30, 30), (2, 2, 4, 4))
            options = {"transparency": i if kind == "L" else (i, 0, 0)}
        image.save(tmp_path / f"{i:02d}.png", **options)
    for background, colour in (("white", (255, 255, 255)), ("#102030", (16, 32, 48))):
        data = load(tmp_path, pixels=Pixels(background=background))
        x = both(data)
        grey = x.shape[1] == 1
        want = [round(np.dot(colour, [0.299, 0.587, 0.114]))] if grey else list(colour)
        assert x[:, :, 0, 0].unique(dim=0).tolist() == [want]
        assert x[:, :, 3, 3].unique(dim=0).tolist() == [[90] if grey else [200, 30, 30]]
        assert data.notes == (
            f"12 of 12 images have transparent pixels: data.background={background} shows through them",
        )
    with pytest.raises(ValueError, match=r"data\.background='marble' is not a colour"):
        Pixels(background="marble")


def test_half_transparent_pixels_are_mixed(tmp_path):
    for i, alpha in enumerate((0, 51, 255)):
        Image.new("RGBA", (4, 4), (100, 200, 0, alpha)).save(tmp_path / f"{i}.png")
    x = both(load(tmp_path))[:, :, 0, 0].tolist()
    assert sorted(x) == sorted([[255, 255, 255], [224, 244, 204], [100, 200, 0]])  # 0.2 of it and 0.8 of white


def test_shades_and_opacity_of_a_mask():
    image = Image.new("RGBA", (2, 1), (10, 10, 10, 255))
    image.putpixel((1, 0), (200, 200, 200, 0))
    out = io.BytesIO()
    image.save(out, "PNG")
    grey, alpha = grey_and_alpha(out.getvalue())
    assert grey.tolist() == [[10, 200]] and alpha.tolist() == [[255, 0]]
    grey, alpha = grey_and_alpha(png16(np.array([[[65535], [0]]], np.uint16)))
    assert grey.tolist() == [[255, 0]] and alpha.tolist() == [[255, 255]]


def test_of_several_frames_the_first_is_read_and_that_is_said(tmp_path):
    frames = [Image.new("L", (4, 4), shade) for shade in (10, 20)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    Image.new("L", (4, 4), 30).save(tmp_path / "b.tif")
    data = load(tmp_path)
    assert sorted(both(data)[:, 0, 0, 0].tolist()) == [10, 30]
    assert data.notes == ("1 of 2 images have several frames: only the first is read",)


def test_a_model_of_16_bits_is_trained_sampled_and_evaluated(tmp_path):
    (tmp_path / "data").mkdir()
    for i, image in enumerate(random(20, 8, 8, 1)):
        (tmp_path / "data" / f"{i}.png").write_bytes(png16(image))
    settings = {
        "data.dataset": "files", "data.path": tmp_path / "data", "data.num_channels": 1, "data.image_size": 8,
        "data.uniform_dequantization": "false",
        "training.batch_size": 4, "training.n_iters": 2, "training.eval_freq": 2, "training.snapshot_sampling": "false",
        "model.nf": 8, "model.ch_mult": 1, "model.num_res_blocks": 1, "model.attn_resolutions": "",
        "sampling.method": "heun", "sampling.steps": 2, "sampling.num_samples": 3, "eval.num_images": 2,
        "eval.check_images": 0, "eval.rtol": 0.1, "eval.atol": 0.1, "eval.steps": 3, "sampling.single_png": "true",
    }  # fmt: skip
    words = ["--config", "configs/vp_digits.py", "--workdir", str(tmp_path / "run")]
    words += [f"--config.{key}={value}" for key, value in settings.items()]
    for mode in ("train", "sample", "likelihood"):
        assert run([*words, "--mode", mode]) == 0
    for estimate, law in (("ode", "truncated_normal"), ("bound", "uniform"), ("sde_bound", "uniform")):
        more = [f"--config.eval.estimate={estimate}", f"--config.eval.dequantization={law}"]
        assert run([*words, "--mode", "likelihood", *more]) == 0
    (samples,) = (tmp_path / "run" / "samples").glob("*/samples.npz")
    x = np.load(samples)["arr_0"]
    assert x.dtype == np.uint16 and x.shape == (3, 8, 8, 1) and x.max() > 255
    with Image.open(samples.parent / "000000.png") as picture:  # a picture for people, of 8 bits
        np.testing.assert_allclose(np.array(picture), x[0, :, :, 0] / 257, atol=0.51)
    stamps = [json.loads(path.read_text()) for path in (tmp_path / "run" / "likelihood").glob("*/stamp.json")]
    assert [stamp["levels"] for stamp in stamps] == [65536] * 4
    means = [stamp["mean"] for stamp in stamps]
    assert min(means) > 16, means  # white noise has 16 bits, and a model that knows nothing needs more
    user = png16(random(8, 8, 1, seed=1))
    (tmp_path / "mine.png").write_bytes(user)
    assert (
        run([*words, "--mode", "superresolve", "--input", str(tmp_path / "mine.png"), "--config.inverse.factor=2"]) == 0
    )
    (restored,) = (tmp_path / "run" / "restored").glob("*/restored.npz")
    assert np.load(restored)["restored"].dtype == np.uint16


def test_the_user_s_images_become_the_model_s_levels(tmp_path):
    deep = random(8, 8, 1)
    (tmp_path / "deep.png").write_bytes(png16(deep))
    plain = (deep >> 8).astype(np.uint8)
    Image.fromarray(plain[..., 0]).save(tmp_path / "plain.png")
    for name, levels, want in (
        ("deep", 65536, deep), ("deep", 256, plain), ("deep", 4096, deep >> 4),
        ("plain", 65536, plain.astype(int) * 257), ("plain", 256, plain),
        ("plain", 17, (plain * (16 / 255)).round()),
    ):  # fmt: skip
        codec = PixelCodec(levels)
        x = read_examples(tmp_path / f"{name}.png", (1, 8, 8), codec).x
        assert x.dtype == codec.dtype
        np.testing.assert_array_equal(x[0, 0].numpy(), want[..., 0])
    Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    assert read_examples(
        tmp_path / "clear.png", (1, 8, 8), PixelCodec(), Pixels(background="#0a0a0a")
    ).x.unique().tolist() == [10]


def test_files_to_begin_with_use_the_bits_that_those_of_the_data_do(tmp_path):
    (tmp_path / "a").mkdir()
    k = random(8, 8, 1) >> 4
    (tmp_path / "a" / "0.png").write_bytes(png16(k))
    codec, pixels = PixelCodec(4096), Pixels(file_bits=12)
    assert torch.equal(
        read_examples(tmp_path / "a", (1, 8, 8), codec, pixels).x[0, 0], torch.tensor(k[..., 0].tolist())
    )
    assert read_examples(tmp_path / "a", (1, 8, 8), PixelCodec(), Pixels(12, 8)).x.max() == k.max() >> 4
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "white.png")
    assert (read_examples(tmp_path / "white.png", (1, 8, 8), codec, pixels).x == 4095).all()
    with pytest.raises(
        ValueError, match=r"white\.png in .* has 8 bits per number, but a/0\.png has 16: read them separately"
    ):
        read_examples(tmp_path, (1, 8, 8), codec, pixels)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_shade_that_is_transparent_is_so_at_any_depth(depth):
    top, shades = 2**depth - 1, 8 // depth
    for shade in (top, 1):
        row = bytes([0, sum((shade if i == 0 else 0) << 8 - depth * (i + 1) for i in range(shades))])
        head = struct.pack(">IIBBBBB", shades, 1, depth, 0, 0, 0, 0)
        found = decode(png_of(head, struct.pack(">H", shade), row), False, (255, 0, 0))
        assert found.transparent
        assert (found.array[0] == [76] * 3).all(1).tolist() == [True] + [False] * (shades - 1)
