"""Text embeddings of captions by a frozen text encoder: tokens, and one pooled vector per caption.

An encoder is any callable from captions to `Text`. `HuggingFaceEncoder` reads one from a folder in the format of
`transformers`, such as CLIP, T5 or MiniLM; `pip install score_sde[text]` installs the library.
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
    """Embeddings of N captions: tokens (N, L, D), mask (N, L), True at tokens, and pooled (N, P), one per caption."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    def condition(self, index: Tensor) -> dict[str, Tensor]:
        """The conditions for the captions at `index`, (B,): ``model.given(**text.condition(index))``."""
        return {"text": self.tokens[index], "mask": self.mask[index], "pooled": self.pooled[index]}

    def to(self, device: torch.device | str) -> Text:
        """The same embeddings on another device."""
        return Text(*(value.to(device) for value in self))


class TextEncoder(Protocol):
    """A function from captions to `Text`, the same for the same captions; `sha256` identifies the encoder."""

    sha256: str

    def __call__(self, captions: Sequence[str]) -> Text: ...


class HuggingFaceEncoder:
    """A text encoder from a folder that `transformers` saved: CLIP, T5, or a BERT-like model such as MiniLM.

    Tokens are the last hidden states. `pooled` is CLIP's projection of its last token; for other models it is the mean
    over tokens, the pooling that sentence encoders are trained with. Weights are read only from safetensors, and no
    code in the folder is run. Captions are cut to `length` tokens.

    The first call loads the model and raises ValueError if the folder holds no text encoder. The constructor raises
    FileNotFoundError for a missing folder, and ImportError without `transformers`.
    """

    def __init__(self, folder: str | Path, *, length: int = 32, device: torch.device | str = "cpu") -> None:
        self.folder, self.length, self.device = Path(folder), length, torch.device(device)
        self.kind: str = _config(self.folder).model_type
        self.sha256 = encoder_hash(self.folder)

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """The tokenizer and the model."""
        import transformers

        kinds = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
        kinds |= {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"}
        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, **options)
            cls = getattr(transformers, kinds.get(self.kind, "AutoModel"))
            model = cls.from_pretrained(self.folder, use_safetensors=True, **options)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ValueError(f"{self.folder} holds no text encoder that transformers can read: {error}") from error
        return tokenizer, model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Text:
        tokenizer, model = self.loaded
        positions = getattr(model.config, "max_position_embeddings", self.length)
        length = min(self.length, tokenizer.model_max_length, positions)
        options = dict(padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        batch = tokenizer(list(captions), **options).to(self.device)
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        tokens, mask = output.last_hidden_state, batch["attention_mask"].bool()
        if self.kind.startswith("clip"):
            pooled = output.pooler_output
        else:
            pooled = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return Text(tokens * mask[..., None], mask, pooled)


def widths(folder: str | Path) -> tuple[int, int]:
    """Widths (D, P) of an encoder's tokens and pooled vector, from its config. Raises as `HuggingFaceEncoder` does."""
    width = int(_config(Path(folder)).get_text_config().hidden_size)
    return width, width


def encoder_hash(folder: Path) -> str:
    """sha256 of an encoder's weights, config and tokenizer."""
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
            f"there is no text encoder in {folder}: it needs config.json, a tokenizer and model.safetensors; "
            "`huggingface-cli download NAME --local-dir FOLDER` fetches one from Hugging Face"
        )
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ImportError("text conditions need transformers: pip install score_sde[text]") from error
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def embed(encoder: TextEncoder, captions: Sequence[str], cache: Path | None = None) -> Text:
    """Encode captions to `Text` on the CPU, each once; the file `cache` keeps embeddings for later calls.

    L is the number of tokens of the longest caption. Raises ValueError for an empty list or for what is no string.
    """
    captions = list(captions)
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"captions must be a list of at least one string, got {captions[:3]!r}")
    known = _read(cache, encoder.sha256) if cache is not None else {}
    new = [caption for caption in dict.fromkeys(captions) if caption not in known]
    for first in range(0, len(new), _BATCH):
        batch = new[first : first + _BATCH]
        text = encoder(batch).to("cpu")
        for i, caption in enumerate(batch):
            known[caption] = (text.tokens[i][text.mask[i]].float(), text.pooled[i].float())
    if new and cache is not None:
        _write(cache, encoder.sha256, known)
    chosen = [known[caption] for caption in captions]
    tokens = torch.nn.utils.rnn.pad_sequence([tokens for tokens, _ in chosen], batch_first=True)
    lengths = torch.tensor([len(tokens) for tokens, _ in chosen])
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    return Text(tokens, mask, torch.stack([pooled for _, pooled in chosen]))


Known = dict[str, tuple[Tensor, Tensor]]  # caption -> its tokens (L, D) and pooled (P,)


def _read(path: Path, sha256: str) -> Known:
    """Embeddings from a cache file; {} if another encoder wrote it or it cannot be read."""
    try:
        if read_header(path).get("encoder") != sha256:
            return {}
        saved = read_tensors(path)
        tokens, pooled = saved["tokens"], saved["pooled"]
        lengths, text = saved["lengths"].tolist(), bytes(saved["captions"].numpy()).decode()
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
