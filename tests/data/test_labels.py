"""Labels and captions that somebody else wrote: each mistake is told with its file and place."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from score_sde.cli import run
from score_sde.data import Data, load_data


def folder(root: Path, n: int = 10) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.new("L", (2, 2), i).save(root / f"{i}.png")
    return root


def load(path: Path) -> Data:
    return load_data("files", path)


def by_name(data: Data) -> dict[int, object]:
    """Labels by the image's number."""
    pairs = [(s.x[:, 0, 0, 0].tolist(), s.y.tolist()) for s in (data.train, data.test)]
    return {x: y for xs, ys in pairs for x, y in zip(xs, ys, strict=True)}


@pytest.mark.parametrize("dtype", [np.int8, np.uint64, np.float16, np.float64, bool])
def test_whole_numbers_are_classes_of_whatever_type(tmp_path, dtype):
    y = np.arange(20) % (2 if dtype is bool else 3)
    np.savez(tmp_path / "a.npz", x=np.arange(20, dtype=np.float32)[:, None], y=y.astype(dtype))
    data = load(tmp_path / "a.npz")
    assert data.num_classes == y.max() + 1 and data.train.y.dtype == torch.int64
    assert torch.equal(data.train.y, torch.from_numpy(y)[data.train.x[:, 0].long()])


def test_classes_may_have_no_examples_and_other_floats_are_conditions(tmp_path, capsys):
    x = np.zeros((6, 2), np.float32)
    np.savez(tmp_path / "a.npz", x=x, y=np.array([1, 2, 4, 1, 2, 4]))
    data = load(tmp_path / "a.npz")
    assert data.num_classes == 5 and data.empty_classes == (0, 3)
    np.savez(tmp_path / "b.npz", x=x, y=np.array([0, 1, 2, 0.5, 1, 2]))
    data = load(tmp_path / "b.npz")
    assert data.num_classes == 0 and data.train.y.shape == (5, 1) and data.empty_classes == ()
    assert data.notes == ("labels are rows of 1 floats: they are not used, because no network here takes them",)
    command = ["--config", "configs/vp_toy.py", "--mode", "train", "--workdir", str(tmp_path / "run")]
    command += ["--config.data.dataset=files", f"--config.data.path={tmp_path / 'b.npz'}"]
    assert run([*command, "--config.model.class_conditional=true"]) == 2
    assert "has no classes, which are whole numbers from 0 or folders" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("y", "words"),
    [
        ([0, 1, 2, -1], r"from 0, got label -1 in row 3 \(from 0\)"),
        ([0, 1, 10**9, 1], r"has the label 1000000000 in row 2 \(from 0\), too large for a class of 4 examples"),
        ([0.0, 1.0, 1e9, 1.0], "has the label 1000000000 in row 2"),
        ([0, np.nan, 1, 0], r"labels, row 1 \(from 0\), holds nan, which is not finite"),
        ([[0.5, 1], [0, 1e39], [0, 1], [1, 1]], r"labels, row 1 \(from 0\), holds 1e\+39, which float32 cannot hold"),
        ([[0, 1], [1, 0], [0, 1], [1, 0]], r"4 labels, ints or rows of floats, got int64 of shape \(4, 2\)"),
        (["a", "b", "a", "b"], "4 labels, ints or rows of floats, got <U1"),
        (3, r"must hold 4 labels, .* of shape \(\)"),
    ],
)
def test_labels_that_cannot_be_meant_are_refused(tmp_path, y, words):
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 2), np.float32), y=np.array(y))
    with pytest.raises(ValueError, match=words):
        load(tmp_path / "a.npz")
    if not isinstance(y, int):
        x = np.zeros((4, 2), np.float32)
        np.savez(tmp_path / "b.npz", x_train=x, y_train=np.arange(4), x_test=x, y_test=np.array(y))
        with pytest.raises(ValueError, match=words):
            load(tmp_path / "b.npz")


def test_up_to_10000_classes_may_be_more_than_examples(tmp_path):
    x = np.zeros((4, 2), np.float32)
    np.savez(tmp_path / "a.npz", x=x, y=np.array([0, 1, 9_999, 1]))
    assert load(tmp_path / "a.npz").num_classes == 10_000
    np.savez(tmp_path / "a.npz", x=x, y=np.array([0, 1, 10_000, 1]))
    with pytest.raises(ValueError, match="has the label 10000 in row 2"):
        load(tmp_path / "a.npz")


def test_both_parts_are_labelled_alike(tmp_path):
    x, y = np.zeros((4, 2), np.float32), np.arange(4)
    for more, words in (({}, "no labels"), ({"y_test": y + 0.5}, "rows of 1 floats")):
        np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, **more)
        with pytest.raises(ValueError, match=f"has classes for training but {words} for the held-out examples"):
            load(tmp_path / "a.npz")


def test_dataset_json_is_below_a_top_folder_too(tmp_path):
    folder(tmp_path / "top")
    (tmp_path / "top" / "dataset.json").write_text(json.dumps({"labels": [[f"{i}.png", i % 3] for i in range(10)]}))
    assert by_name(load(tmp_path)) == {i: i % 3 for i in range(10)}
    (tmp_path / "top" / "dataset.json").write_text("\ufeff" + json.dumps({"labels": None}))
    assert load(tmp_path).num_classes == 0


def test_dataset_json_is_above_the_only_folder_of_images_too(tmp_path):
    folder(tmp_path / "mine" / "00000")
    (tmp_path / "mine" / "dataset.json").write_text(
        json.dumps({"labels": [[f"./00000/{i}.png", i % 3] for i in range(10)]})
    )
    for path in (tmp_path, tmp_path / "mine"):
        assert by_name(load(path)) == {i: i % 3 for i in range(10)}
        assert load(path).notes == ()


def test_lists_of_whole_numbers_are_conditions(tmp_path):
    folder(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [[f"{i}.png", [i, 1]] for i in range(10)]}))
    assert load(tmp_path).train.y.dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[["0.png", 0]]', "must look like .* got a list at the top"),
        ('{"labels": [[["0.png", 0]]', r"is not JSON \(line 1, column 27"),
        ('{"labels": {"0.png": 1}}', "labels must be a list"),
        (
            '{"labels": [["0.png", 1], ["1.png", 1, 0, 0]]}',
            r"entry 1 of labels .* must be \[name, label\], got \[\"1",
        ),
        ('{"labels": [["0.png", "cat"]]}', 'entry 0 of labels .* must give 0.png an integer .*, got "cat"'),
        ('{"labels": [["0.png", true]]}', "entry 0 of labels .* got true"),
        ('{"labels": [["0.png", 1.5]]}', "entry 0 of labels .* got 1.5"),
        ('{"labels": [["0.png", [NaN]]]}', "entry 0 of labels .* got .NaN."),
        ('{"labels": [["0.png", null]]}', "entry 0 of labels .* got null"),
        ('{"labels": [["0.png", 1], ["1.png", [1.0]]]}', r"entry 1 of labels .* is \[1.0\], but the first is 1: give"),
        ('{"labels": [["0.png", 1], ["0.png", 2]]}', r"entry 1 of labels .* names 0.png a second time"),
        ('{"labels": [["0.png", 1]]}', "has no label for 1.png"),
        ('{"labels": [["0.png", 99999999999999999999]]}', "entry 0 of labels"),
        ('{"labels": "\\udcff"}', "dataset.json in .*, line 1, is not UTF-8"),
    ],
)
def test_a_wrong_dataset_json_is_told_with_its_entry(tmp_path, text, words):
    (folder(tmp_path) / "dataset.json").write_bytes(text.encode("utf-8").replace(b"\\udcff", b"\xff"))
    with pytest.raises(ValueError, match="dataset.json in .*" + words.removeprefix("dataset.json in .*")):
        load(tmp_path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2, must look like .* is not JSON"),
        ('["1.png", "b"]', r"line 2, must look like .* got \["),
        ('{"text": "b"}', 'line 2, must look like .* got {"text": "b"}'),
        ('{"file_name": "1.png", "text": ["b"]}', "line 2, must look like"),
        ('{"file_name": "0.png", "text": "b"}', "line 2, names 0.png a second time"),
        ('{"file_name": "1.png", "text": "\xe9"}', r"line 2, is not UTF-8 \(byte 0xe9\): save it as UTF-8"),
    ],
)
def test_a_wrong_metadata_jsonl_is_told_with_its_line(tmp_path, line, words):
    text = '{"file_name": "0.png", "text": "a"}\n' + line + "\n"
    (folder(tmp_path, 2) / "metadata.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"metadata\.jsonl in .*, " + words):
        load(tmp_path)


def test_captions_are_utf_8(tmp_path):
    for i in range(10):
        (folder(tmp_path) / f"{i}.txt").write_text("caf\xe9 \u732b", "utf-8-sig")
    assert load(tmp_path).captions == ("caf\xe9 \u732b",)
    (tmp_path / "3.txt").write_bytes("a\ncaf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"3\.txt in .*, line 2, is not UTF-8 \(byte 0xe9\): save it as UTF-8"):
        load(tmp_path)


def test_lines_of_metadata_jsonl_end_at_line_feeds_alone(tmp_path):
    text = "one\u2028two\x85"
    rows = [{"file_name": f"./{i}.png", "text": text} for i in range(10)]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder(tmp_path) / "metadata.jsonl").write_bytes(lines.encode())
    assert load(tmp_path).captions == (text,)
