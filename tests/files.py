"""Files of data that tests write: images, CIFAR-10's official batches, a small text encoder."""

import io
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def pixels(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="PNG")
    return out.getvalue()


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(image))


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "an", "red", "cat", "dog", "airbus", "tabby"]
SMALL = dict(num_hidden_layers=2, num_attention_heads=2, vocab_size=len(WORDS), attention_dropout=0.0)


def bert(folder: Path, seed: int = 0) -> Path:
    """A small BERT with a vocabulary of words, as transformers saves it."""
    import transformers

    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.BertConfig(hidden_size=16, intermediate_size=32, max_position_embeddings=16, **SMALL)
        transformers.BertModel(config).save_pretrained(folder)
    return folder


PY, BIN = "cifar-10-batches-py", "cifar-10-batches-bin"
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
SIZE = 4  # images per batch


def contents() -> dict[str, tuple[np.ndarray, list[int]]]:
    """Batch -> its images and labels."""
    random = np.random.default_rng(0)
    return {
        n: (random.integers(0, 256, (SIZE, 3072), np.uint8), random.integers(0, 10, SIZE).tolist()) for n in BATCHES
    }


def python2_pickle(images: np.ndarray, labels: list[int]) -> bytes:
    """Opcodes as Python 2's cPickle and its numpy wrote them (protocol 2), which Python 3 no longer can."""

    def text(b: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(b)) + b  # BINSTRING, Python 2's str

    def number(i: int) -> bytes:
        return b"J" + struct.pack("<i", i)  # BININT

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
    shape = b"".join(map(number, images.shape)) + b"\x86"
    array += b"(" + number(1) + shape + dtype + b"\x89" + text(images.tobytes()) + b"tb"
    label_list = b"](" + b"".join(map(number, labels)) + b"e"
    names = b"](" + b"".join(text(b"cat_s_%06d.png" % i) for i in range(len(labels))) + b"e"
    fields = {b"batch_label": text(b"a batch"), b"labels": label_list, b"data": array, b"filenames": names}
    return b"\x80\x02}(" + b"".join(text(k) + v for k, v in fields.items()) + b"u."


def binary(images: np.ndarray, labels: list[int]) -> bytes:
    return b"".join(bytes([label]) + image.tobytes() for image, label in zip(images, labels))


def write(folder: Path, encode=python2_pickle, ending: str = "") -> Path:
    folder.mkdir(parents=True)
    for name, batch in contents().items():
        (folder / f"{name}{ending}").write_bytes(encode(*batch))
    return folder
