"""The mode dequantize, and the file of the flow that it fits."""

from __future__ import annotations

import json
from pathlib import Path

from ..data.codecs import PixelCodec
from ..likelihood.dequantisation import VariationalDequantiser
from ..machine.whole_files import read_header, read_tensors, write_tensors

FORMAT = "score_sde dequantiser 1"


def save_dequantiser(path: Path, dequantiser: VariationalDequantiser, **about: str) -> None:
    """Write a safetensors file, whole or absent, which says in its header how it was built, and what is in `about`."""
    d = dequantiser
    built = {"levels": d.codec.levels, "centered": d.codec.centered, "shape": d.shape, "hidden": d.hidden}
    built |= {"layers": len(d.couplings), "t_min": d.t_min}
    write_tensors(path, d.state_dict(), {"format": FORMAT, "built": json.dumps(built), **about})


def was_made_from(path: Path, made_from: str) -> bool:
    """Whether there is a dequantiser's file, whole, whose header says this of what it was made from."""
    try:
        return load_dequantiser(path)[1].get("made_from") == made_from
    except (FileNotFoundError, ValueError):
        return False


def load_dequantiser(path: Path) -> tuple[VariationalDequantiser, dict[str, str]]:
    """(dequantiser, its file's header). Raises FileNotFoundError, or ValueError for a file that is none."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no dequantiser {path}; fit one with --mode dequantize")
    header, tensors = read_header(path), read_tensors(path)
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} holds no dequantiser (format {header.get('format')!r}, not {FORMAT!r})")
    try:
        built = json.loads(header["built"])
        codec, shape = PixelCodec(built.pop("levels"), built.pop("centered")), tuple(built.pop("shape"))
        dequantiser = VariationalDequantiser(codec, shape, **built)
        dequantiser.load_state_dict(tensors)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not describe the dequantiser that it holds ({error}); fit it again") from error
    return dequantiser.eval().requires_grad_(False), header


def dequantiser_path(workdir: Path, checkpoint: Path, weights: str) -> Path:
    """Where --mode dequantize leaves the flow that it fitted to a checkpoint."""
    return workdir / "dequantizers" / f"{checkpoint.stem}-{weights}.safetensors"
