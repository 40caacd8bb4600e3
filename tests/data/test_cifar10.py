"""CIFAR-10's official files in every form, the download, and what a pickle may not do."""

import hashlib
import io
import os
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from score_sde.data import cifar10, load_data
from score_sde.data.codecs import PixelCodec
from score_sde.machine import progress
from score_sde.machine import whole_files as tensor_file
from score_sde.tasks.scan import scan
from tests.files import BATCHES, BIN, PY, SIZE, binary, contents, python2_pickle, write


def python3_pickle(protocol: int):
    return lambda images, labels: pickle.dumps({b"data": images, b"labels": labels}, protocol)


def archive(path: Path, folder: Path) -> Path:
    with tarfile.open(path, "w:gz") as out:
        out.add(folder, arcname=folder.name)
    return path


def check(path: Path) -> None:
    (x, y, _), (test_x, test_y, _) = cifar10.read(path, url="file:///nowhere")
    batches = contents()
    images = np.concatenate([batches[n][0] for n in BATCHES[:5]])
    assert x.shape == (5 * SIZE, 3, 32, 32)
    assert x.dtype == torch.uint8
    # the first 1024 bytes of a row are its red plane, row by row
    np.testing.assert_array_equal(x[:, 0, 0, :].numpy(), images[:, :32])
    np.testing.assert_array_equal(x[:, 2, 31, 31].numpy(), images[:, -1])
    np.testing.assert_array_equal(x.flatten(1).numpy(), images)
    np.testing.assert_array_equal(test_x.flatten(1).numpy(), batches["test_batch"][0])
    assert y.tolist() == [label for n in BATCHES[:5] for label in batches[n][1]]
    assert test_y.tolist() == batches["test_batch"][1]


@pytest.mark.parametrize("encode", [python2_pickle, *map(python3_pickle, (2, 3, 4, 5))])
def test_python_folder(tmp_path, encode):
    folder = write(tmp_path / PY, encode)
    check(folder)
    check(tmp_path)


def test_binary_folder(tmp_path):
    folder = write(tmp_path / BIN, binary, ".bin")
    check(folder)
    check(tmp_path)


@pytest.mark.parametrize("folder, encode, ending", [(PY, python2_pickle, ""), (BIN, binary, ".bin")])
def test_archives_are_read_where_they_are(tmp_path, folder, encode, ending):
    name = "cifar-10-python.tar.gz" if folder == PY else "cifar-10-binary.tar.gz"
    path = archive(tmp_path / name, write(tmp_path / "unpacked" / folder, encode, ending))
    check(path)
    check(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [name, "unpacked"]


def test_load_data_names_it_and_its_classes(tmp_path):
    write(tmp_path / PY)
    data = load_data("CIFAR10", str(tmp_path))
    assert (data.shape, data.levels, data.num_classes) == ((3, 32, 32), 256, 10)
    assert (len(data.train), len(data.test)) == (5 * SIZE, SIZE)


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, getattr, np.load, np.fromfile, bytearray])
def test_a_pickle_that_calls_anything_else_is_refused_by_name(tmp_path, function):
    folder, ran = write(tmp_path / PY), tmp_path / "ran"
    attack = Calls(function, f"touch {ran}")
    (folder / "data_batch_3").write_bytes(pickle.dumps({b"data": attack, b"labels": []}))
    with pytest.raises(
        ValueError, match=rf"data_batch_3 asks to load .*{function.__name__}, .*: download https"
    ) as error:
        cifar10.read(tmp_path)
    assert "\n" not in str(error.value)
    assert not ran.exists()


def test_archived_pickles_are_refused_too(tmp_path):
    folder = write(tmp_path / "unpacked" / PY)
    (folder / "test_batch").write_bytes(pickle.dumps(Calls(os.system, "true")))
    with pytest.raises(ValueError, match=r"test_batch asks to load posix\.system"):
        cifar10.read(archive(tmp_path / "cifar-10-python.tar.gz", folder))


def test_damaged_files_are_named(tmp_path):
    folder = write(tmp_path / PY)
    whole = (folder / "data_batch_2").read_bytes()
    for damaged in (
        whole[:1000],
        b"",
        b"no pickle",
        pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [1, 2]}, 2),
    ):
        (folder / "data_batch_2").write_bytes(damaged)
        with pytest.raises(ValueError, match="data_batch_2"):
            cifar10.read(tmp_path)
    (folder / "data_batch_2").write_bytes(python2_pickle(np.zeros((2, 3072), np.uint8), [3, 10]))
    with pytest.raises(ValueError, match="labels 0 to 9, got 3 to 10"):
        cifar10.read(tmp_path)
    (folder / "data_batch_2").unlink()
    with pytest.raises(FileNotFoundError, match="holds no data_batch_2"):
        cifar10.read(tmp_path)


def test_damaged_binaries_and_archives_are_named(tmp_path):
    folder = write(tmp_path / "a" / BIN, binary, ".bin")
    path = archive(tmp_path / "cifar-10-binary.tar.gz", folder)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"binary\.tar\.gz is damaged or no archive .* delete it and download"):
        cifar10.read(path)
    (folder / "test_batch.bin").write_bytes(b"\0" * 3074)
    with pytest.raises(ValueError, match="3074 bytes are not a multiple of 3073"):
        cifar10.read(folder)


def served(tmp_path: Path) -> tuple[str, str]:
    """Address and md5 of an archive to download."""
    path = archive(tmp_path / "served.tar.gz", write(tmp_path / "unpacked" / PY))
    return path.as_uri(), hashlib.md5(path.read_bytes()).hexdigest()


def test_absent_data_are_downloaded_once_with_progress(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0)
    url, md5 = served(tmp_path)
    (tmp_path / "new" / "data").mkdir(parents=True)
    killed = tensor_file.temporary(tmp_path / "new" / "data" / "cifar-10-python.tar.gz")  # as it downloaded
    killed.with_name(killed.name.replace(f".{os.getpid()}.", ".999999999.")).write_bytes(b"half of it")
    cifar10.read(tmp_path / "new" / "data", url, md5)
    shown = capsys.readouterr().err
    assert "downloading cifar-10-python.tar.gz" in shown
    assert re.search(r"(\d\.\d) MB of \1 MB in 00:0", shown)
    assert [p.name for p in (tmp_path / "new" / "data").iterdir()] == ["cifar-10-python.tar.gz"]
    check(tmp_path / "new" / "data")  # from an address that does not answer


def test_a_wrong_checksum_is_refused_and_nothing_kept(tmp_path):
    url, md5 = served(tmp_path)
    with pytest.raises(ValueError, match=f"md5 {md5} instead of {'0' * 32}"):
        cifar10.read(tmp_path / "new", url, "0" * 32)
    assert list((tmp_path / "new").iterdir()) == []


def test_offline_says_in_one_sentence_what_to_put_where(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        cifar10.read(tmp_path / "new", "https://localhost:9/cifar-10-python.tar.gz")
    message = str(error.value)
    for part in (
        str(tmp_path / "new"),
        "cannot be downloaded",
        "put cifar-10-python.tar.gz from https://",
        PY,
        "data.path=",
    ):
        assert part in message
    assert "\n" not in message and "Errno" not in message
    assert list((tmp_path / "new").iterdir()) == []


def test_an_archive_that_is_not_there_is_not_downloaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*my\.tar\.gz"):
        cifar10.read(tmp_path / "my.tar.gz", *served(tmp_path))


def test_only_arrays_are_admitted():
    with pytest.raises(cifar10.Refused, match=r"numpy\.core\.multiarray\.scalar"):
        cifar10._ArrayUnpickler(io.BytesIO(b"cnumpy.core.multiarray\nscalar\n.")).load()


@pytest.mark.slow
@pytest.mark.skipif("SCORE_SDE_CIFAR10" not in os.environ, reason="set SCORE_SDE_CIFAR10 to where CIFAR-10 lies")
def test_gaussian_fitted_to_cifar10_gives_4_644_bits_per_dim():
    data = load_data("cifar10", os.environ["SCORE_SDE_CIFAR10"])
    assert data.train.x.shape == (50_000, 3, 32, 32)
    assert torch.equal(data.train.y.bincount(), torch.full((10,), 5000))
    assert torch.equal(data.test.y.bincount(), torch.full((10,), 1000))
    report = scan(data, PixelCodec())
    assert report.gaussian[0] == pytest.approx(4.644, abs=6e-4)  # its last digit
    assert report.gaussian[1] == pytest.approx(0.0085, abs=1e-4)
    assert (report.mean, report.rms) == (pytest.approx(-0.0533, abs=1e-4), pytest.approx(0.5060, abs=1e-4))
    assert report.distance_is_exact
    assert report.largest_distance == pytest.approx(106.83, abs=0.01)
