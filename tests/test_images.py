"""PNGs hold the pixels they were given; grids have their geometry."""

import numpy as np
import pytest
import torch
from PIL import Image

from score_sde.images import grid, histogram, write_grid, write_png


def random(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_pngs_come_back_bit_by_bit(tmp_path, channels):
    image = random(channels, 5, 7)
    write_png(image, tmp_path / "a.png")
    read = np.array(Image.open(tmp_path / "a.png")).reshape(5, 7, channels)
    np.testing.assert_array_equal(read, image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("n, columns, rows", [(1, None, 1), (5, None, 2), (9, None, 3), (5, 5, 1), (5, 2, 3)])
@pytest.mark.parametrize("zoom", [1, 3])
def test_grids_place_images_row_by_row_with_black_between(tmp_path, n, columns, rows, zoom):
    images = random(n, 3, 4, 6)
    write_grid(images, tmp_path / "g.png", columns, zoom)
    picture = np.array(Image.open(tmp_path / "g.png"))
    across = columns or int(np.ceil(np.sqrt(n)))
    assert picture.shape == (rows * (4 * zoom + 2) + 2, across * (6 * zoom + 2) + 2, 3)
    for i in range(n):
        top, left = i // across * (4 * zoom + 2) + 2, i % across * (6 * zoom + 2) + 2
        tile = picture[top : top + 4 * zoom, left : left + 6 * zoom]
        np.testing.assert_array_equal(tile, images[i].permute(1, 2, 0).numpy().repeat(zoom, 0).repeat(zoom, 1))
        tile[:] = 0
    assert not picture.any()  # what is left is black


def test_points_become_a_picture_with_y_upwards():
    x = torch.tensor([[0.9, 0.9], [0.9, 0.9], [0.9, 0.9], [0.9, 0.9], [-0.9, -0.1], [5.0, 5.0]])
    picture = histogram(x, size=10, extent=1.0)
    assert picture.shape == (1, 10, 10)
    assert picture.nonzero().tolist() == [[0, 0, 9], [0, 5, 0]]
    assert picture[0, 0, 9] == 255
    assert picture[0, 5, 0] == 127  # the root of a quarter
    assert grid(picture[None]).shape == (1, 14, 14)


def test_what_is_no_picture_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"uint8 \(1 or 3, H, W\), got torch.float32 \(3, 4, 4\)"):
        write_png(torch.zeros(3, 4, 4), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"got torch.uint8 \(2, 4, 4\)"):
        write_png(torch.zeros(2, 4, 4, dtype=torch.uint8), tmp_path / "a.png")
