"""``python -m examples.speech --out FOLDER``: the ten digits spoken by espeak-ng, as a folder of .wav files.

Each in several voices, pitches and speeds, 8,000 samples per second, a sub-folder per word. espeak-ng is in Debian and
Ubuntu, ``apt install espeak-ng``. What it says goes through ``configs/speech.py``:

    python -m examples.speech --out speech
    python main.py --config configs/speech.py --mode train --config.data.path=speech
    python main.py --config configs/speech.py --mode sample --config.data.path=speech
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
from scipy.signal import resample_poly

from score_sde import signals

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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    folder = parser.parse_args(arguments).out
    if shutil.which("espeak-ng") is None:
        parser.error("there is no espeak-ng: install it, as by apt install espeak-ng")
    for word in WORDS:
        (folder / word).mkdir(parents=True, exist_ok=True)
        for voice, pitch, speed in itertools.product(VOICES, PITCHES, SPEEDS):
            path = folder / word / f"{voice}-{pitch}-{speed}.wav"
            signals.write(torch.from_numpy(spoken(word, voice, pitch, speed))[None], path, RATE)
    print(f"{len(WORDS) * len(VOICES) * len(PITCHES) * len(SPEEDS)} recordings of {len(WORDS)} words: {folder}")


if __name__ == "__main__":
    main()
