"""Recordings: a folder of .wav files as examples (1, length) of floats in [-1, 1], and samples back into such files.

They lie as images do (`files`): at any depth, sub-folders are classes, `train/` and `test/` are splits. All have one
sample rate and 16 bits (PCM); several channels are averaged. A set is held in memory.
"""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..machine.whole_files import whole
from .files import IMAGES, Found, Part, unread
from .folders import Listing, about_classes, classes_of, lay_out, listing, once_each, root_of
from .labels import named_labels

_STREAMED = 0x7FFF0000  # bytes of sound from which on a header says that its writer did not know how many there are


def recordings(path: Path) -> Listing | None:
    """The files in a folder of .wav files, or None where there are none, or images too."""
    found = listing(root_of(path))
    has_images = any(name.lower().endswith(IMAGES) for name in found.names)
    return found if not has_images and any(_is_recording(name) for name in found.names) else None


def read(path: Path, found: Listing, length: int | None = None) -> tuple[Found, int]:
    """What a folder of .wav files holds, of which these were found, and its sample rate.

    Examples are float32 (N, 1, length): the first `length` samples of each recording, with silence behind shorter ones;
    without a length all must have the same.

    Raises ValueError for files that are no 16-bit PCM, or that differ in sample rate or length.
    """
    path = root_of(path)
    layout = once_each(path, lay_out([name for name in found.names if _is_recording(name)], str(path)))
    names = sorted(layout.train + layout.test)
    signals, rates = {}, {}
    for name in names:
        signals[name], rates[name] = _recording(path / name)
    odd = next((name for name in names if rates[name] != rates[names[0]]), None)
    if odd is not None:
        raise ValueError(
            f"{odd} in {path} has {rates[odd]} samples per second, but {names[0]} {rates[names[0]]}: bring all to one"
        )
    odd = next((name for name in names if len(signals[name]) != len(signals[names[0]])), None)
    if odd is not None and not length:
        raise ValueError(
            f"{odd} in {path} has {len(signals[odd])} samples, but {names[0]} {len(signals[names[0]])}: cut all with "
            f"--config.data.length=SAMPLES"
        )
    size = length or len(signals[names[0]])
    label, classes = classes_of(layout, str(path))

    def part(chosen: list[str]) -> Part:
        x = torch.zeros(len(chosen), 1, size)
        for row, name in zip(x, chosen, strict=True):
            row[0, : len(signals[name])] = torch.from_numpy(signals[name][:size])
        return Part(x, named_labels(label, chosen, str(path)) if label else None, class_names=classes)

    others = [name for name in found.names if not _is_recording(name)]
    notes = (*layout.notes, *about_classes(layout), *unread(others, found.skipped))
    return Found(part(layout.train), part(layout.test) if layout.test else None, None, notes), rates[names[0]]


def write(signal: Tensor, path: str | Path, rate: int) -> None:
    """A signal (1, length) of floats as a .wav file of 16 bits; what exceeds [-1, 1] is cut off."""
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
    """float32 (length,) in [-1, 1] and the sample rate of a .wav file."""
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            told = width * channels * file.getnframes()
            contents = file.readframes(file.getnframes())
    except Exception as error:  # among them wave.Error, EOFError and struct.error
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} cannot be read as a PCM recording ({reason})") from error
    if width != 2:
        raise ValueError(f"{path} has {8 * width} bits per sample: save it with 16")
    if len(contents) < told < _STREAMED:
        raise ValueError(f"{path} was cut short: it has {len(contents)} of its {told} bytes of sound")
    pcm = np.frombuffer(contents[: len(contents) // (2 * channels) * 2 * channels], dtype="<i2")
    if len(pcm) == 0:
        raise ValueError(f"{path} holds no sound")
    return (pcm.reshape(-1, channels).mean(1) / 32767).clip(-1, 1).astype(np.float32), rate
