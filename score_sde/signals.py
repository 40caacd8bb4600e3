"""Recordings: a folder of .wav files as examples (1, length) of floats in [-1, 1], and samples back into such files.

They lie as images do (`files`): at any depth, sub-folders are classes, `train/` and `test/` are splits. All have one
sample rate and 16 bits (PCM); several channels are averaged. A set is held in memory.
"""

from __future__ import annotations

import os
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .files import IMAGES, Part, class_folders, named_labels, parts_of


def recordings(path: Path) -> list[str]:
    """The .wav files in a folder, by their names relative to it, sorted; none where there are images too."""
    found = (Path(folder, name) for folder, _, inside in os.walk(path, followlinks=True) for name in inside)
    names = [file.relative_to(path).as_posix() for file in found]
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    if any(name.lower().endswith(IMAGES) for name in names):
        return []
    return sorted(name for name in names if name.lower().endswith(".wav"))


def read(path: Path, length: int | None = None) -> tuple[Part, Part | None, int]:
    """(train, test, sample rate) of a folder of .wav files; test is None where nothing says what is held out.

    Examples are float32 (N, 1, length): the first `length` samples of each recording, with silence behind shorter ones;
    without a length all must have the same.

    Raises ValueError for files that are no 16-bit PCM, or that differ in sample rate or length.
    """
    names = recordings(path)
    train, test = parts_of(names)
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
    label, classes = class_folders(train, test, path)

    def part(chosen: list[str]) -> Part:
        x = torch.zeros(len(chosen), 1, size)
        for row, name in zip(x, chosen, strict=True):
            row[0, : len(signals[name])] = torch.from_numpy(signals[name][:size])
        return Part(x, named_labels(label, chosen, path) if label else None, class_names=classes)

    return part(train), part(test) if test else None, rates[names[0]]


def write(signal: Tensor, path: str | Path, rate: int) -> None:
    """A signal (1, length) of floats as a .wav file of 16 bits; what exceeds [-1, 1] is cut off."""
    if signal.ndim != 2 or signal.shape[0] != 1:
        raise ValueError(f"a recording must have shape (1, length), got {tuple(signal.shape)}")
    pcm = (signal[0].detach().cpu().to(torch.float64).clamp(-1, 1) * 32767).round().numpy().astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(pcm.tobytes())


def _recording(path: Path) -> tuple[np.ndarray, int]:
    """float32 (length,) in [-1, 1] and the sample rate of a .wav file."""
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            contents = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a PCM recording ({error})") from error
    if width != 2:
        raise ValueError(f"{path} has {8 * width} bits per sample: save it with 16")
    pcm = np.frombuffer(contents[: len(contents) // (2 * channels) * 2 * channels], dtype="<i2")
    if len(pcm) == 0:
        raise ValueError(f"{path} holds no sound")
    return (pcm.reshape(-1, channels).mean(1) / 32767).clip(-1, 1).astype(np.float32), rate
