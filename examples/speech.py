"""``python -m examples.speech --out FOLDER``: the ten digits spoken by espeak-ng, as a folder of .wav files.

Each in several voices, pitches and speeds, 8,000 samples per second, a sub-folder per word. espeak-ng is in Debian and
Ubuntu, ``apt install espeak-ng``. What it says goes through ``configs/speech.py``:

    python -m examples.speech --out speech
    python main.py --config configs/speech.py --mode train --config.data.path=speech
    python main.py --config configs/speech.py --mode sample --config.data.path=speech
    python -m examples.speech --out speech --judge runs/speech

The last judges the newest samples of a workdir: how many a classifier of spectrograms, fitted to the recordings trained
on, takes for their word, and how far their mean spectrum is from that of the held-out recordings; beside both, noise of
the recordings' loudness.
"""

from __future__ import annotations

import argparse
import io
import itertools
import shutil
import subprocess
import wave
from pathlib import Path

import numpy as np
import torch
from scipy.signal import resample_poly, stft
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from score_sde.data import load_data
from score_sde.data import recordings as signals
from score_sde.machine.progress import with_progress

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOICES = ("en-us+m1", "en-us+m3", "en-us+m7", "en-gb+f2", "en-gb+f4")
PITCHES = (35, 45, 55, 65)  # of 0 to 99
SPEEDS = (150, 165, 180, 195)  # words per minute
RATE = 8000


def spoken(word: str, voice: str, pitch: int, speed: int) -> np.ndarray:
    """A word as floats in [-1, 1] at `RATE` samples per second, without the silence in front."""
    command = ["espeak-ng", "-v", voice, "-p", str(pitch), "-s", str(speed), "--stdout", word]
    sound = subprocess.run(command, check=True, capture_output=True).stdout
    with wave.open(io.BytesIO(sound)) as file:
        rate, contents = file.getframerate(), file.readframes(len(sound))
    x = np.frombuffer(contents[: len(contents) // 2 * 2], dtype="<i2") / 32768
    x = resample_poly(x, RATE, rate)
    return x[np.argmax(np.abs(x) > 0.01 * np.abs(x).max()) :]


def spectrogram(x: Tensor) -> np.ndarray:
    """Signals (N, 1, length) to decibels (N, 16, 16): 16 bands of frequency by 16 stretches of time."""
    _, _, z = stft(x[:, 0].numpy(), nperseg=256)
    power = torch.from_numpy(np.abs(z) ** 2)[:, None, 1:]
    return 10 * torch.log10(adaptive_avg_pool2d(power, (16, 16))[:, 0] + 1e-9).numpy()


def judge(folder: Path, workdir: Path) -> str:
    """What the newest samples of a workdir are like, beside held-out recordings of the folder and noise."""
    files = sorted(workdir.glob("samples/*/samples.npz"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise SystemExit(f"there are no samples in {workdir}: run --mode sample first")
    with np.load(files[-1]) as found:
        samples, labels = torch.from_numpy(found["arr_0"]), found["arr_1"]
    data = load_data("files", folder, length=samples.shape[-1])
    (x, y), (held_out, words) = (split[torch.arange(len(split))] for split in (data.train, data.test))
    assert y is not None and words is not None
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(spectrogram(x).reshape(len(x), -1), y)
    noise = x.std() * torch.randn(samples.shape, generator=torch.Generator().manual_seed(0))
    real = spectrogram(held_out).mean((0, 2))
    lines = ["|  | taken for their word | mean spectrum off by |", "| --- | --- | --- |"]
    for name, signal, wanted in [
        ("held-out recordings", held_out, words.numpy()),
        (f"{len(samples)} samples", samples, labels),
        ("noise", noise, labels),
    ]:
        decibels = spectrogram(signal)
        right = (classifier.predict(decibels.reshape(len(signal), -1)) == wanted).mean()
        off = np.sqrt(np.mean((decibels.mean((0, 2)) - real) ** 2))
        lines.append(f"| {name} | {100 * right:.0f} % | {off:.1f} dB |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--judge", type=Path, metavar="WORKDIR", help="a workdir whose newest samples are judged")
    chosen = parser.parse_args(arguments)
    folder = chosen.out
    if chosen.judge is not None:
        print(judge(folder, chosen.judge))
        return
    if shutil.which("espeak-ng") is None:
        parser.error("there is no espeak-ng: install it, as by apt install espeak-ng")
    for word in with_progress(WORDS, "words", len(WORDS), "word"):
        (folder / word).mkdir(parents=True, exist_ok=True)
        for voice, pitch, speed in itertools.product(VOICES, PITCHES, SPEEDS):
            path = folder / word / f"{voice}-{pitch}-{speed}.wav"
            signals.write(torch.from_numpy(spoken(word, voice, pitch, speed))[None], path, RATE)
    print(f"{len(WORDS) * len(VOICES) * len(PITCHES) * len(SPEEDS)} recordings of {len(WORDS)} words: {folder}")


if __name__ == "__main__":
    main()
