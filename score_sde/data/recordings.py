"""Audio: a folder of .wav files as examples (1, length) of floats in [-1, 1], and samples written as .wav files.

The folder has the layout of images (`files`): any depth, sub-folders are classes, `train/` and `test/` are splits. All
files have one sample rate and 16 bits (PCM); several channels are averaged. The set is held in memory.
"""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..machine.whole_files import whole
from .files import IMAGES, FileData, FileSplit, unread_notes
from .folders import Listing, classes_of, lay_out, listing, once_each, root_of
from .labels import named_labels

_STREAMED = 0x7FFF0000  # bytes; a header with this many or more was written before the length was known


def recordings(path: Path) -> Listing | None:
    """List the files of a folder that holds .wav files and no images; None for any other folder."""
    files = listing(root_of(path))
    has_images = any(name.lower().endswith(IMAGES) for name in files.names)
    return files if not has_images and any(_is_recording(name) for name in files.names) else None


def read(path: Path, files: Listing, length: int | None = None) -> tuple[FileData, int]:
    """Read the .wav files of a folder, listed in `files`; returns the data and their sample rate.

    Examples are float32 (N, 1, length): the first `length` samples of each recording, shorter ones padded with silence;
    without `length` all must have the same. Raises ValueError for files that are not 16-bit PCM, or that differ in
    sample rate or length.
    """
    path = root_of(path)
    layout = once_each(path, lay_out([name for name in files.names if _is_recording(name)], str(path)))
    names = sorted(layout.train + layout.test)
    signals, rates = {}, {}
    for name in names:
        signals[name], rates[name] = _recording(path / name)
    odd = next((name for name in names if rates[name] != rates[names[0]]), None)
    if odd is not None:
        raise ValueError(
            f"{odd} in {path} has {rates[odd]} samples per second, but {names[0]} has {rates[names[0]]}: "
            f"convert all to one rate"
        )
    odd = next((name for name in names if len(signals[name]) != len(signals[names[0]])), None)
    if odd is not None and not length:
        raise ValueError(
            f"{odd} in {path} has {len(signals[odd])} samples, but {names[0]} has {len(signals[names[0]])}: "
            f"cut or pad all with --config.data.length=SAMPLES"
        )
    size = length or len(signals[names[0]])
    label, classes, class_notes = classes_of(layout, str(path))

    def split(chosen: list[str]) -> FileSplit:
        x = torch.zeros(len(chosen), 1, size)
        for row, name in zip(x, chosen, strict=True):
            row[0, : len(signals[name])] = torch.from_numpy(signals[name][:size])
        return FileSplit(x, named_labels(label, chosen, str(path)) if label else None, class_names=classes)

    others = [name for name in files.names if not _is_recording(name)]
    notes = (*layout.notes, *class_notes, *unread_notes(others, files.skipped))
    return FileData(split(layout.train), split(layout.test) if layout.test else None, None, notes), rates[names[0]]


def write(signal: Tensor, path: str | Path, rate: int) -> None:
    """Write a signal (1, length) of floats as a 16-bit .wav file, clipped to [-1, 1]."""
    if signal.ndim != 2 or signal.shape[0] != 1:
        raise ValueError(f"a recording must have shape (1, length), got {tuple(signal.shape)}")
    pcm = (signal[0].detach().cpu().to(torch.float64).clamp(-1, 1) * 32767).round().numpy().astype("<i2")
    with whole(Path(path)) as sink, wave.open(sink, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(pcm.tobytes())


def _is_recording(name: str) -> bool:
    return name.lower().endswith(".wav")


def _recording(path: Path) -> tuple[np.ndarray, int]:
    """Read a .wav file: float32 (length,) in [-1, 1], and its sample rate."""
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            size = width * channels * file.getnframes()
            contents = file.readframes(file.getnframes())
    except Exception as error:  # among them wave.Error, EOFError and struct.error
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} cannot be read as a PCM recording ({reason})") from error
    if width != 2:
        raise ValueError(f"{path} has {8 * width} bits per sample: save it with 16 bits")
    if len(contents) < size < _STREAMED:
        raise ValueError(f"{path} is truncated: it has {len(contents)} of {size} bytes of sound; copy it again")
    pcm = np.frombuffer(contents[: len(contents) // (2 * channels) * 2 * channels], dtype="<i2")
    if len(pcm) == 0:
        raise ValueError(f"{path} holds no sound: remove it")
    return (pcm.reshape(-1, channels).mean(1) / 32767).clip(-1, 1).astype(np.float32), rate
