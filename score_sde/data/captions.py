"""Captions, and what a network is told of them: the tokens of a frozen text encoder, and one vector for the whole.

Any callable from captions to `Text` is an encoder. `HuggingFaceEncoder` makes one of a folder that `transformers`
reads, such as those of CLIP, T5 or MiniLM; `pip install score_sde[text]` brings the library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..machine.whole_files import read_header, read_tensors, write_tensors

_BATCH = 64  # captions encoded together


class Text(NamedTuple):
    """Of N captions: tokens (N, L, D), mask (N, L), True where there is a token, and pooled (N, P), of the whole."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    def condition(self, index: Tensor) -> dict[str, Tensor]:
        """What a model is given of the captions at `index`, (B,): ``model.given(**text.condition(index))``."""
        return {"text": self.tokens[index], "mask": self.mask[index], "pooled": self.pooled[index]}

    def to(self, device: torch.device | str) -> Text:
        """The same there."""
        return Text(*(value.to(device) for value in self))


class TextEncoder(Protocol):
    """Captions to `Text`, always the same for the same captions; `sha256` tells encoders apart."""

    sha256: str

    def __call__(self, captions: Sequence[str]) -> Text: ...


class HuggingFaceEncoder:
    """The text encoder in a folder as `transformers` saves them: CLIP's, T5's, or one of BERT's kind such as MiniLM.

    Tokens are the last hidden states. `pooled` is what CLIP makes of its last token, and of others the mean over
    tokens, as sentence encoders are trained with. Weights are read from safetensors alone; no code of the folder is
    run. Captions longer than `length` tokens are cut.

    The model is read when it is first asked, and a folder that holds no text encoder is then refused with ValueError.
    Raises FileNotFoundError for a folder that is not there, and ImportError without `transformers`.
    """

    def __init__(self, folder: str | Path, *, length: int = 32, device: torch.device | str = "cpu") -> None:
        self.folder, self.length, self.device = Path(folder), length, torch.device(device)
        self.kind: str = _config(self.folder).model_type
        self.sha256 = encoder_hash(self.folder)

    @cached_property
    def parts(self) -> tuple[Any, Any]:
        """The tokenizer and the model."""
        import transformers

        kinds = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
        kinds |= {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"}
        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, **options)
            made = getattr(transformers, kinds.get(self.kind, "AutoModel"))
            model = made.from_pretrained(self.folder, use_safetensors=True, **options)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ValueError(f"{self.folder} holds no text encoder that transformers can read: {error}") from error
        return tokenizer, model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Text:
        tokenizer, model = self.parts
        places = getattr(model.config, "max_position_embeddings", self.length)
        length = min(self.length, tokenizer.model_max_length, places)
        batch = tokenizer(
            list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.device)
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        tokens, mask = found.last_hidden_state, batch["attention_mask"].bool()
        if self.kind.startswith("clip"):
            pooled = found.pooler_output
        else:
            pooled = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return Text(tokens * mask[..., None], mask, pooled)


def widths(folder: str | Path) -> tuple[int, int]:
    """(D, P) of the encoder in a folder, read from its config alone. Raises what `HuggingFaceEncoder` does."""
    config = _config(Path(folder)).get_text_config()
    width = int(config.hidden_size)
    return width, width


def encoder_hash(folder: Path) -> str:
    """sha256 over an encoder's weights, config and tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".txt", ".model")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"there is no text encoder in {folder}: it is a folder with config.json, tokenizer and model.safetensors, "
            "as `huggingface-cli download NAME --local-dir FOLDER` makes of those of Hugging Face"
        )
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ImportError("text conditions need transformers: pip install score_sde[text]") from error
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def embed(encoder: TextEncoder, captions: Sequence[str], cache: Path | None = None) -> Text:
    """`Text` of the captions, on the CPU, each encoded once: those in the file `cache` are read, new ones join it.

    As many tokens are kept as the longest caption has. Raises ValueError for no captions, or what is not text.
    """
    captions = list(captions)
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"captions must be one string or more, got {captions[:3]!r}")
    known = _read(cache, encoder.sha256) if cache is not None else {}
    new = [caption for caption in dict.fromkeys(captions) if caption not in known]
    for first in range(0, len(new), _BATCH):
        part = new[first : first + _BATCH]
        found = encoder(part).to("cpu")
        for i, caption in enumerate(part):
            known[caption] = (found.tokens[i][found.mask[i]].float(), found.pooled[i].float())
    if new and cache is not None:
        _write(cache, encoder.sha256, known)
    chosen = [known[caption] for caption in captions]
    tokens = torch.nn.utils.rnn.pad_sequence([tokens for tokens, _ in chosen], batch_first=True)
    lengths = torch.tensor([len(tokens) for tokens, _ in chosen])
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    return Text(tokens, mask, torch.stack([pooled for _, pooled in chosen]))


Known = dict[str, tuple[Tensor, Tensor]]


def _read(path: Path, sha256: str) -> Known:
    """The captions in a cache that this encoder wrote; none of another's, or where it cannot be read."""
    try:
        if read_header(path).get("encoder") != sha256:
            return {}
        found = read_tensors(path)
        tokens, pooled = found["tokens"], found["pooled"]
        lengths, text = found["lengths"].tolist(), bytes(found["captions"].numpy()).decode()
    except (FileNotFoundError, ValueError, KeyError):
        return {}
    return dict(zip(text.split("\0"), zip(tokens.split(lengths), pooled, strict=True), strict=True))


def _write(path: Path, sha256: str, known: Known) -> None:
    tensors = {
        "tokens": torch.cat([tokens for tokens, _ in known.values()]),
        "pooled": torch.stack([pooled for _, pooled in known.values()]),
        "lengths": torch.tensor([len(tokens) for tokens, _ in known.values()]),
        "captions": torch.frombuffer(bytearray("\0".join(known).encode()), dtype=torch.uint8),
    }
    write_tensors(path, tensors, {"encoder": sha256})
