"""Captions from files, and their embeddings: encoders of transformers' folders, and the cache."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from score_sde.data import cifar10, load_data
from score_sde.data.captions import HuggingFaceEncoder, Text, embed, encoder_hash, widths
from tests.files import BATCHES, BIN, PY, SMALL, WORDS, bert, binary, contents, pixels, python2_pickle, save, write

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert(tmp_path_factory.mktemp("encoders") / "bert")


def test_tokens_are_the_last_hidden_states_and_pooled_is_their_mean(folder: Path) -> None:
    encoder = HuggingFaceEncoder(folder, length=8)
    found = encoder(["a cat", "a red dog", ""])
    assert (found.tokens.shape, found.pooled.shape) == ((3, 8, 16), (3, 16))
    assert found.mask.sum(1).tolist() == [4, 5, 2]  # with [CLS] and [SEP]
    ids = torch.tensor([[2, 5, 8, 3]])
    alone = transformers.BertModel.from_pretrained(folder)(input_ids=ids).last_hidden_state.detach()
    torch.testing.assert_close(found.tokens[:1, :4], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.pooled[0], alone[0].mean(0), atol=1e-5, rtol=1e-4)
    assert not found.tokens[0, 4:].any()
    assert encoder(["a cat " * 20]).mask.sum() == 8  # cut
    assert widths(folder) == (16, 16)


def clip(folder: Path) -> Path:
    """A small CLIP text model; its tokenizer is bert's, for what is tested is what is taken from the model."""
    bert(folder)
    for old in ("model.safetensors", "config.json"):
        (folder / old).unlink()
    config = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=32, max_position_embeddings=16, eos_token_id=3, projection_dim=16, **SMALL
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.CLIPTextModel(config).save_pretrained(folder)
    return folder


def t5(folder: Path) -> Path:
    bert(folder)
    for old in ("model.safetensors", "config.json"):
        (folder / old).unlink()
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=len(WORDS), dropout_rate=0.0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder


def test_clip_s_last_token_is_pooled(tmp_path: Path) -> None:
    encoder = HuggingFaceEncoder(clip(tmp_path / "clip"), length=8)
    found = encoder(["a cat"])
    torch.testing.assert_close(found.pooled[0], found.tokens[0, 3])  # [SEP], its end of text
    assert widths(tmp_path / "clip") == (16, 16)


def test_t5_is_its_encoder(tmp_path: Path) -> None:
    encoder = HuggingFaceEncoder(t5(tmp_path / "t5"), length=8)
    found = encoder(["a cat"])
    torch.testing.assert_close(found.pooled[0], found.tokens[0, :4].mean(0))
    assert widths(tmp_path / "t5") == (16, 16)


def test_a_folder_without_an_encoder_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no text encoder in .*nothing.*huggingface-cli download"):
        HuggingFaceEncoder(tmp_path / "nothing")
    broken = bert(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="broken holds no text encoder that transformers can read"):
        HuggingFaceEncoder(broken)(["a cat"])


class Letters:
    """An encoder whose answers are plain: a token for each letter; it remembers what it was asked."""

    def __init__(self, sha256: str = "letters") -> None:
        self.sha256, self.asked = sha256, list[str]()

    def __call__(self, captions: Sequence[str]) -> Text:
        self.asked += captions
        longest = max(map(len, captions))
        codes = torch.tensor([[float(ord(c)) for c in s.ljust(longest)] for s in captions])
        mask = torch.arange(longest) < torch.tensor([len(s) for s in captions])[:, None]
        tokens = torch.stack([codes, codes**2], 2) * mask[..., None]
        return Text(tokens, mask, tokens.sum(1))


def test_each_caption_is_encoded_once_and_kept(tmp_path: Path) -> None:
    encoder, cache = Letters(), tmp_path / "text" / "cache.safetensors"
    captions = ["cat", "a dog", "cat", "é"]
    found = embed(encoder, captions, cache)
    assert sorted(encoder.asked) == ["a dog", "cat", "é"]
    for i, caption in enumerate(captions):
        alone = Letters()([caption])
        assert torch.equal(found.tokens[i][found.mask[i]], alone.tokens[0])
        assert torch.equal(found.pooled[i], alone.pooled[0])
    assert found.tokens.shape == (4, 5, 2) and not found.tokens[~found.mask].any()
    again, more = Letters(), [*captions, "a longer one"]
    assert torch.equal(embed(again, captions, cache).tokens, found.tokens) and again.asked == []
    embed(again, more, cache)
    assert again.asked == ["a longer one"]
    other = Letters("another encoder")
    embed(other, captions, cache)
    assert len(other.asked) == 3  # a cache of another encoder is not believed
    cache.write_bytes(b"broken")
    assert torch.equal(embed(Letters(), captions, cache).tokens, found.tokens)
    with pytest.raises(ValueError, match="captions must be"):
        embed(encoder, [])


def test_encoders_are_told_apart_by_their_files(tmp_path: Path, folder: Path) -> None:
    assert encoder_hash(folder) == encoder_hash(bert(tmp_path / "same"))
    assert encoder_hash(folder) != encoder_hash(bert(tmp_path / "other", seed=1))


def test_cifar_10_s_file_names_are_captions(tmp_path: Path) -> None:
    assert cifar10.caption("tabby_cat_s_000001.png") == "a tabby cat"
    assert cifar10.caption("airbus_s_001234.png") == "an airbus"
    words = ("elk", "icebreaker", "oil_tanker", "umbrella_bird", "european_elk", "unicycle", "yacht")
    assert [cifar10.caption(f"{word}_s_1.png").split()[0] for word in words] == ["an"] * 4 + ["a"] * 3
    assert cifar10.caption("leptodactylus_pentadactylus_s_000004.png") == "a leptodactylus pentadactylus"
    data = load_data("cifar10", write(tmp_path / PY, python2_pickle))
    assert data.captions == ("a cat",)
    assert data.train.caption is not None and len(data.train.caption) == 5 * len(contents()[BATCHES[0]][1])
    plain = load_data("cifar10", write(tmp_path / BIN, binary, ".bin"))
    assert plain.captions == () and plain.train.caption is None


def captions_of(data) -> list[tuple[int, str]]:  # type: ignore[no-untyped-def]
    """(first pixel, caption) of every example."""
    return sorted(
        (int(split.x[i].flatten()[0]), data.captions[int(split.caption[i])])
        for split in (data.train, data.test)
        for i in range(len(split))
    )


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_captions_lie_beside_images(tmp_path: Path, kind: str) -> None:
    images = pixels(12, 4, 4)
    wanted, lines = [], []
    for i, image in enumerate(images):
        image[0, 0] = i
        name, caption = f"{i % 2}/{i:02d}.png", f"a thing of kind {i % 5}"
        save(tmp_path / name, image)
        wanted.append((i, caption))
        if kind == "txt":
            (tmp_path / name).with_suffix(".txt").write_text(f" {caption}\n")
        lines.append(json.dumps({"file_name": name, "text": caption}))
    if kind == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    data = load_data("files", tmp_path)
    assert len(data.captions) == 5 and captions_of(data) == wanted
    assert data.train.y is not None  # sub-folders are classes still
    moved = data.train.to("cpu")
    assert moved.caption is not None


def test_some_images_without_captions_are_named(tmp_path: Path) -> None:
    for i, image in enumerate(pixels(3, 4, 4)):
        save(tmp_path / f"{i}.png", image)
    (tmp_path / "0.txt").write_text("one")
    with pytest.raises(ValueError, match=r"1\.png in .* has no caption, but other images do: write one in 1\.txt"):
        load_data("files", tmp_path)
    (tmp_path / "0.txt").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n{"text": "b"}')
    with pytest.raises(ValueError, match=r"metadata\.jsonl in .*, line 2, must look like"):
        load_data("files", tmp_path)


def test_held_out_and_training_captions_are_those_of_their_images(tmp_path: Path) -> None:
    for part, count in (("train", 6), ("test", 3)):
        for i, image in enumerate(pixels(count, 4, 4, seed=count)):
            save(tmp_path / part / f"{i}.png", image)
            (tmp_path / part / f"{i}.txt").write_text(f"{part} {i}")
    data = load_data("files", tmp_path)
    assert [data.captions[k] for k in data.test.caption] == [f"test {i}" for i in range(3)]  # type: ignore[union-attr]
    assert np.array_equal(data.train.caption, [data.captions.index(f"train {i}") for i in range(6)])  # type: ignore[arg-type]
