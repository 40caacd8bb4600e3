"""PNGs hold the pixels they were given; grids have their geometry."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from score_sde.tasks.pictures import first_of_each, grid, histogram, layout, write_png


def random(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_pngs_come_back_bit_by_bit(tmp_path, channels):
    image = random(channels, 5, 7)
    write_png(image, tmp_path / "a.png")
    read = np.array(Image.open(tmp_path / "a.png")).reshape(5, 7, channels)
    np.testing.assert_array_equal(read, image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("n, columns, rows", [(1, None, 1), (5, None, 3), (9, None, 3), (5, 5, 1), (5, 2, 3)])
@pytest.mark.parametrize("zoom", [1, 3])
def test_grids_place_images_row_by_row_with_black_between(tmp_path, n, columns, rows, zoom):
    images = random(n, 3, 4, 6)
    write_png(grid(images, columns, zoom), tmp_path / "g.png")
    picture = np.array(Image.open(tmp_path / "g.png"))
    across = columns or {1: 1, 5: 2, 9: 3}[n]  # 5: 2 across and 3 down is nearer to a square, as they are wide
    assert picture.shape == (rows * (4 * zoom + 2) + 2, across * (6 * zoom + 2) + 2, 3)
    for i in range(n):
        top, left = i // across * (4 * zoom + 2) + 2, i % across * (6 * zoom + 2) + 2
        tile = picture[top : top + 4 * zoom, left : left + 6 * zoom]
        np.testing.assert_array_equal(tile, images[i].permute(1, 2, 0).numpy().repeat(zoom, 0).repeat(zoom, 1))
        tile[:] = 0
    assert not picture.any()  # what is left is black


@pytest.mark.parametrize("groups", [2, 3, 10, 16, 32, 64])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_grids_of_groups_are_nearly_square_and_have_room_for_all(groups, ratio):
    """64 samples of 2 classes once were a strip of 2 by 32."""
    most = math.ceil(64 / groups)
    across, down, wide = layout(groups, most, ratio)
    rows, columns = math.ceil(groups / across) * down * ratio, across * wide
    assert down * wide >= most and max(rows, columns) <= 2.4 * min(rows, columns)
    assert layout(1, 64) == (1, 8, 8) and layout(1, 5) == (1, 2, 3) and layout(2, 32) == (1, 4, 8)
    assert layout(3, 4) == (1, 1, 4) and layout(10, 7) == (1, 1, 7)  # a row for each


def test_the_images_of_a_group_stand_together_behind_its_name():
    groups = [2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    images = random(10, 3, 4, 6)
    plain = grid(images, groups=groups, zoom=3)
    named = grid(images, groups=groups, zoom=3, names=["automobile", "cat", "a name that is much too long for a grid"])
    for picture in (plain, named):
        assert picture.shape[1] == 3 * 14 + 2
        margin = picture.shape[2] - (4 * 20 + 2)
        for group in range(3):
            for j, i in enumerate(k for k, of in enumerate(groups) if of == group):
                tile = picture[:, group * 14 + 2 :, margin + j * 20 + 2 :][:, :12:3, :18:3]
                assert torch.equal(tile, images[i])
    written = [named[:, group * 14 + 2 : group * 14 + 14, : named.shape[2] - 82] for group in range(3)]
    lengths = [int(text.amax((0, 1)).nonzero().max()) for text in written]
    assert plain.shape[2] == 82 and 10 < lengths[1] < lengths[0] < lengths[2] < 200
    assert torch.equal(plain[:, :, 2:], named[:, :, -80:])


def test_names_in_any_script_are_written():
    assert grid(random(2, 1, 8, 8), groups=[0, 1], names=["猫", "Ż\n"]).shape[0] == 1


def test_a_crowd_of_groups_shows_as_many_of_each():
    assert first_of_each([0, 1, 0, 1, 0, 1, 1], 5) == [0, 1, 2, 3]
    assert first_of_each([0] * 5 + [1] * 5, 6) == [0, 1, 2, 5, 6, 7]
    assert first_of_each([3, 1, 2], 2) == [0, 1] and first_of_each([], 2) == []


def test_points_become_a_picture_with_y_upwards():
    x = torch.tensor([[0.9, 0.9], [0.9, 0.9], [0.9, 0.9], [0.9, 0.9], [-0.9, -0.1], [5.0, 5.0]])
    picture = histogram(x, size=10, extent=1.0)
    assert picture.shape == (1, 10, 10)
    assert picture.nonzero().tolist() == [[0, 0, 9], [0, 5, 0]]
    assert picture[0, 0, 9] == 255
    assert picture[0, 5, 0] == 127  # the root of a quarter
    assert grid(picture[None], zoom=1).shape == (1, 14, 14)


def test_a_picture_is_whole_or_absent(tmp_path, monkeypatch):
    def breaks(self, file, format):
        file.write(b"begun")
        raise OSError("full")

    monkeypatch.setattr(Image.Image, "save", breaks)
    with pytest.raises(OSError, match="full"):
        write_png(random(1, 4, 4), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_picture_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"uint8 \(1 or 3, H, W\), got torch.float32 \(3, 4, 4\)"):
        write_png(torch.zeros(3, 4, 4), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"got torch.uint8 \(2, 4, 4\)"):
        write_png(torch.zeros(2, 4, 4, dtype=torch.uint8), tmp_path / "a.png")
