"""Recordings: .wav files in and out, their refusals, and tones that a trained U-Net of signals draws by class."""

import math
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.speech import judge
from score_sde.cli import run
from score_sde.data import load_data
from score_sde.data import recordings as signals


def save(path: Path, pcm: np.ndarray, rate: int = 8000, width: int = 2, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(pcm.astype({1: "u1", 2: "<i2"}[width]).tobytes())


def random(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-32767, 32768, n)


def test_what_is_written_is_read_back_to_the_bit(tmp_path: Path) -> None:
    pcm = np.concatenate([random(61), [-32767, 0, 32767]])
    for i in range(10):
        save(tmp_path / f"{i}.wav", np.roll(pcm, i), rate=11025)
    data = load_data("files", tmp_path)
    assert (data.shape, data.levels, data.num_classes, data.rate) == ((1, 64), None, 0, 11025)
    assert (len(data.train), len(data.test)) == (9, 1)
    x = torch.cat([data.train.x, data.test.x])  # type: ignore[list-item]
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    for i, signal in enumerate(x):
        signals.write(signal, tmp_path / f"again-{i}.wav", 11025)
    originals = {(tmp_path / f"{i}.wav").read_bytes() for i in range(10)}
    assert {(tmp_path / f"again-{i}.wav").read_bytes() for i in range(10)} == originals
    signals.write(torch.tensor([[-3.0, 0.5, 2.0]]), tmp_path / "loud.wav", 8000)
    with wave.open(str(tmp_path / "loud.wav")) as file:
        assert np.frombuffer(file.readframes(3), "<i2").tolist() == [-32767, 16384, 32767]


def test_recordings_are_cut_or_followed_by_silence_and_channels_averaged(tmp_path: Path) -> None:
    long, short, both = random(50), random(20, 1), random(60, 2)
    for name, pcm, channels in [("a", long, 1), ("b", short, 1), ("c", both, 2)]:
        save(tmp_path / "train" / f"{name}.wav", pcm, channels=channels)
        save(tmp_path / "test" / f"{name}.wav", pcm, channels=channels)
    assert len(load_data("files", tmp_path / "train", length=32).test) == 3  # with what is held out beside
    x = load_data("files", tmp_path, length=32).train.x[:, 0] * 32767  # type: ignore[index]
    expected = [long[:32], np.r_[short, np.zeros(12)], np.r_[both.reshape(-1, 2).mean(1), 0, 0]]
    np.testing.assert_allclose(x, np.stack(expected), atol=2e-3)  # float32


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    for word, value in (("yes", 900), ("no", 100)):
        for i in range(10):
            save(tmp_path / word / f"{i}.wav", np.full(8, value))
    data = load_data("files", tmp_path)
    assert data.num_classes == 2
    loud = data.train.x[:, 0, 0] > 0.01  # type: ignore[index]
    assert torch.equal(loud.long(), data.train.y)  # in alphabetical order


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (
            {"pcm": random(64), "rate": 16000},
            "b.wav in .* has 16000 samples per second, but a.wav has 8000: convert all",
        ),
        (
            {"pcm": random(63)},
            "b.wav in .* has 63 samples, but a.wav has 64: cut or pad all with --config.data.length=SAMPLES",
        ),
        ({"pcm": random(64) % 256, "width": 1}, "b.wav has 8 bits per sample: save it with 16"),
        ({"pcm": random(0)}, "b.wav holds no sound"),
        (None, "b.wav cannot be read as a PCM recording"),
        ({"pcm": random(64), "lost": 20}, "b.wav is truncated: it has 108 of 128 bytes of sound"),
    ],
)
def test_recordings_that_do_not_fit_are_refused(tmp_path: Path, second: dict | None, words: str) -> None:
    save(tmp_path / "a.wav", random(64))
    if second is None:
        (tmp_path / "b.wav").write_bytes(b"RIFF....")
    else:
        lost = second.pop("lost", 0)
        save(tmp_path / "b.wav", **second)
        (tmp_path / "b.wav").write_bytes((tmp_path / "b.wav").read_bytes()[: -lost or None])
    with pytest.raises(ValueError, match=words):
        load_data("files", tmp_path)
    with pytest.raises(ValueError, match=r"must have shape \(1, length\), got \(8,\)"):
        signals.write(torch.zeros(8), tmp_path / "c.wav", 8000)


TONES = {"high": 7, "low": 2}  # periods in 32 samples


def test_a_model_of_tones_draws_each_class_s_tone_as_recordings(tmp_path: Path) -> None:
    """Sines of any phase: the sample rate, the classes and the 1-D network all the way through the commands."""
    generator = np.random.default_rng(0)
    for name, periods in TONES.items():
        for i in range(100):
            phase = generator.uniform(0, 2 * math.pi)
            tone = 0.5 * np.sin(2 * math.pi * periods * np.arange(32) / 32 + phase)
            save(tmp_path / "tones" / name / f"{i}.wav", (32767 * tone).round(), rate=4000)
    settings = {
        "data.path": tmp_path / "tones", "data.length": 0, "training.n_iters": 100, "training.batch_size": 24,
        "training.eval_freq": 100, "training.snapshot_sampling": "false", "training.condition_dropout": 0,
        "model.sigma_data": 0.35, "model.sigma_min": 0.01, "model.sigma_max": 6, "model.nf": 8,
        "model.ch_mult": "1,2", "model.attn_resolutions": "16",
        "model.ema_halflife": 500, "optim.lr": 1e-2, "optim.warmup": 10, "sampling.num_samples": 20,
        "sampling.steps": 8, "eval.num_images": 2, "eval.check_images": 0, "eval.rtol": 1, "eval.atol": 1,
    }  # fmt: skip
    command = ["--config", "configs/speech.py", "--workdir", str(tmp_path / "run")]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    assert run([*command, "--mode", "train"]) == 0
    assert run([*command, "--mode", "sample"]) == 0
    (folder,) = (tmp_path / "run" / "samples").glob("*/samples.npz")
    right = 0
    for i in range(20):
        with wave.open(str(folder.parent / f"{i:06d}.wav")) as file:
            assert (file.getframerate(), file.getnframes(), file.getsampwidth()) == (4000, 32, 2)
            power = np.abs(np.fft.rfft(np.frombuffer(file.readframes(32), "<i2") / 32767)) ** 2
        wanted = list(TONES.values())[i % 2]  # samples take the classes in turn
        right += abs(int(power.argmax()) - wanted) <= 1
    assert right >= 16  # of noise three in 17 would have their greatest power there, without classes half
    assert run([*command, "--mode", "likelihood"]) == 0


def test_samples_are_judged_by_their_words_and_their_spectrum(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)

    def tones(periods: int, n: int) -> np.ndarray:
        phase = generator.uniform(0, 2 * math.pi, (n, 1))
        loud = generator.uniform(0.2, 0.6, (n, 1))
        x = loud * np.sin(2 * math.pi * periods * np.arange(2048) / 2048 + phase)
        return x + 0.01 * generator.standard_normal(x.shape)

    for label, (name, periods) in enumerate({"high": 700, "low": 200}.items()):
        for i, tone in enumerate(tones(periods, 20)):
            save(tmp_path / "tones" / name / f"{i}.wav", (32767 * tone).round())
        x = tones(periods, 6).astype(np.float32)[:, None]
        for kind, told in (("right", label), ("wrong", 1 - label)):
            folder = tmp_path / f"{kind}-{label}" / "samples" / "1"
            folder.mkdir(parents=True)
            np.savez(folder / "samples.npz", arr_0=x, arr_1=np.full(6, told))
    rows = {kind: judge(tmp_path / "tones", tmp_path / kind).splitlines() for kind in ("right-0", "wrong-1")}
    held_out, samples, noise = (row.split("|") for row in rows["right-0"][2:])
    assert held_out[2].strip() == samples[2].strip() == "100 %"
    assert float(held_out[3].split()[0]) == 0 < float(samples[3].split()[0]) < float(noise[3].split()[0])
    assert rows["wrong-1"][3].split("|")[2].strip() == "0 %"
    with pytest.raises(SystemExit, match="run --mode sample first"):
        judge(tmp_path / "tones", tmp_path)
