"""Autoencoders from their training to data sets of their codes, and models of these by the command line."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from score_sde import AutoencoderCodec, load, load_autoencoder, load_classifier
from score_sde.cli import run
from score_sde.config import load as load_config
from score_sde.config.build import build_autoencoder
from score_sde.config.kinds import kind_of
from score_sde.data import Data, load_data, shrink
from score_sde.data.codecs import PixelCodec, Statistics, codec_of
from score_sde.tasks import codes
from score_sde.tasks.codes import Source, as_asked, codec_from, codes_of, open_autoencoder
from score_sde.tasks.step import Batches, evaluate_loss, make_state, train_step
from tests.runs import Halves, halves

SMALL = {
    "data.dataset": "digits",
    "data.image_size": "8",
    "model.nf": "8",
    "model.ch_mult": "1,2",
    "model.num_res_blocks": "1",
    "model.code_channels": "2",
    "training.batch_size": "32",
    "training.channels_last": "false",
}
CODE = (2, 4, 4)
TINY = [
    *(f"--config.{key}={value}" for key, value in SMALL.items()),
    "--config.model.attn_resolutions=4",
    "--config.training.n_iters=3",
    "--config.training.eval_freq=3",
    "--config.training.snapshot_freq=2",
    "--config.training.snapshot_sampling=false",
    "--config.sampling.steps=3",
    "--config.sampling.num_samples=6",
    "--config.sampling.batch_size=4",
    "--config.eval.num_images=4",
    "--config.eval.batch_size=3",
    "--config.eval.check_images=0",
    "--config.eval.rtol=1e-2",
    "--config.eval.atol=1e-2",
    "--config.interpolation.pairs=1",
    "--config.interpolation.steps=3",
]


def command(config: str, mode: str, workdir: Path, *more: str) -> int:
    one = ["--config.model.ch_mult=1"] if config.startswith("latent") else []
    return run(["--config", f"configs/{config}.py", "--mode", mode, "--workdir", str(workdir), *TINY, *one, *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Workdirs of a tiny autoencoder of digits and of a model of its codes, after three steps each."""
    folder = tmp_path_factory.mktemp("latent")
    drawn = "--config.training.snapshot_sampling=true"
    assert command("autoencoder_digits32", "train", folder / "autoencoder", drawn) == 0
    assert command("latent_digits32", "train", folder / "model", of(folder / "autoencoder"), drawn) == 0
    return folder / "autoencoder", folder / "model"


@pytest.fixture(scope="module")
def changed(trained: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The autoencoder after a step more."""
    workdir = tmp_path_factory.mktemp("latent") / "changed"
    shutil.copytree(trained[0], workdir)
    assert command("autoencoder_digits32", "train", workdir, "--config.training.n_iters=4") == 0
    return workdir


def first(count: int) -> Data:
    """The first digits of both splits, so many."""
    data = load_data("digits")
    train, test = (replace(split, x=split.x[:count], y=split.y[:count]) for split in (data.train, data.test))  # type: ignore[index]
    return replace(data, train=train, test=test)


def of(autoencoder: Path) -> str:
    return f"--config.data.autoencoder={autoencoder}"


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


# The autoencoder and its training.


def test_digits32_are_digits_four_times_as_large() -> None:
    small, large = load_data("digits"), load_data("digits32")
    assert large.shape == (1, 32, 32) and large.levels == 17 and len(large.train) == len(small.train)
    assert isinstance(small.test.x, Tensor) and isinstance(large.test.x, Tensor)
    # bilinear: a mean over a digit's pixel is 3/4 of it and 1/8 of each neighbour, in both directions, to rounding
    padded = torch.nn.functional.pad(small.test.x.float(), (1, 1, 1, 1), mode="replicate")
    line = torch.tensor([1 / 8, 3 / 4, 1 / 8])
    wanted = torch.nn.functional.conv2d(padded, torch.outer(line, line)[None, None])
    off = (shrink(large.test.x, 4).float() - wanted).abs()
    assert off.max() <= 1 and off.mean() < 0.25  # rounded twice, to half a level each


def test_training_lowers_the_bound_whose_parts_are_reported() -> None:
    config = load_config("configs/autoencoder_digits32.py", {**SMALL, "training.kl_weight": "0.25"})
    data = first(100)
    codec = codec_of(data.levels)
    state = make_state(config, data.shape, torch.device("cpu"))
    objective, sde = kind_of(config).objective(state.model, config, codec), kind_of(config).sde(state.model, config)
    before = evaluate_loss(state, config, data.test, codec)
    for step in range(15):
        b = Batches(config, codec, sde).draw(data.train, step)
        assert b.z.shape == (32, *CODE)
        record = train_step(state, objective, b, config)
    reconstruction, kl, psnr = record.measure.T
    torch.testing.assert_close(record.loss, reconstruction + 0.25 * kl)
    after = evaluate_loss(state, config, data.test, codec)
    assert after["eval_loss"] < before["eval_loss"] - 0.5 and after["eval_psnr"] > before["eval_psnr"]
    assert after == evaluate_loss(state, config, data.test, codec)  # the same noise at every call
    assert bool((psnr > 0).all()) and not torch.equal(state.ema.log_deviation, state.model.log_deviation)


def test_reported_psnr_is_that_of_the_decoded_images() -> None:
    config = load_config("configs/autoencoder_digits32.py", SMALL)
    data, codec = load_data("digits"), PixelCodec(17)
    model = build_autoencoder(config, data.shape)
    k = data.test[torch.arange(5)][0]
    noise = torch.randn(5, *CODE)
    _, measure = kind_of(config).objective(model, config, codec)(codec.encode(k), torch.zeros(5), noise, noise)
    mean, std = model.encode(codec.encode(k))
    mse = ((model.decode(mean + std * noise) - codec.encode(k)) / 2).square().flatten(1).mean(1)
    torch.testing.assert_close(measure[:, 2], -10 * mse.log10(), atol=1e-3, rtol=0)


def test_a_resumed_autoencoder_is_the_uninterrupted_one(trained: tuple[Path, Path], tmp_path: Path) -> None:
    workdir = tmp_path / "again"
    shutil.copytree(trained[0], workdir)
    (workdir / "checkpoints" / "000000003.safetensors").unlink()
    assert command("autoencoder_digits32", "train", workdir) == 0
    one, two = (load_autoencoder(path).state_dict() for path in (trained[0], workdir))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (workdir / "samples" / "step-000000003" / "ema.png").is_file()
    assert "eval_psnr" in (workdir / "log.txt").read_text()


def test_what_a_checkpoint_is_not_is_said(trained: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"is an autoencoder: train a model of its codes, with --config.data.auto"):
        load(trained[0])
    with pytest.raises(ValueError, match="is no autoencoder: train one with training.objective=autoencoder"):
        load_autoencoder(trained[1])
    with pytest.raises(ValueError, match="is no classifier"):
        load_classifier(trained[0])


# Data sets of codes.


def test_codes_have_the_statistics_of_their_draws_and_are_kept(tmp_path: Path) -> None:
    data, source = load_data("digits"), halves()
    coded, statistics = codes_of(source, data, tmp_path, mirror=False)
    split = coded.train
    assert coded.shape == (1, 4, 4) and coded.levels is None and coded.num_classes == 10
    assert isinstance(split.x, Tensor) and split.std is not None and torch.equal(split.y, data.train.y)  # type: ignore[arg-type]
    draws = split.x + split.std * torch.randn(split.x.shape, generator=torch.Generator().manual_seed(0))
    assert abs(float(draws.mean())) < 4 / draws.numel() ** 0.5 and abs(float(draws.std()) - 1) < 0.02
    own_mean, own_std = source.autoencoder.encode(source.pixels.encode(data.train.x))  # type: ignore[arg-type]
    torch.testing.assert_close(split.x * statistics.std[0] + statistics.mean[0], own_mean)
    torch.testing.assert_close(split.std * statistics.std[0], own_std)

    asked = source.autoencoder.asked  # type: ignore[attr-defined]
    again, same = codes_of(source, data, tmp_path, mirror=False)
    assert source.autoencoder.asked == asked and same == statistics  # type: ignore[attr-defined]
    assert torch.equal(again.train.x, split.x) and torch.equal(again.test.std, coded.test.std)  # type: ignore[arg-type]
    assert Statistics.from_json(statistics.to_json()) == statistics


def test_the_decoder_s_deviation_is_measured_where_it_has_none(tmp_path: Path) -> None:
    data, source = load_data("digits"), halves()
    _, statistics = codes_of(source, data, tmp_path, mirror=False)
    x = source.pixels.encode(data.train.x[:1000])  # type: ignore[index]
    mean, std = source.autoencoder.encode(x)
    squares = [(source.autoencoder.decode(mean + std * torch.randn(mean.shape)) - x).square().mean() for _ in range(5)]
    assert statistics.deviation == pytest.approx(float(torch.stack(squares).mean().sqrt()), rel=0.01)
    source.autoencoder.deviation = 0.123  # type: ignore[attr-defined]
    assert codes_of(source, data, tmp_path / "told", mirror=False)[1].deviation == 0.123


def test_codes_of_another_autoencoder_other_images_or_a_broken_file_are_made_anew(tmp_path: Path) -> None:
    data, source = load_data("digits"), halves()
    codes_of(source, data, tmp_path, mirror=False)

    def count(of_source: Source, of_data: object = data, mirror: bool = False) -> int:
        before = of_source.autoencoder.asked  # type: ignore[attr-defined]
        codes_of(of_source, of_data, tmp_path, mirror)  # type: ignore[arg-type]
        return of_source.autoencoder.asked - before  # type: ignore[attr-defined]

    assert count(source) == 0
    assert count(halves("b" * 64)) == 1797
    other = replace(data, test=replace(data.test, x=data.test.x.flip(0)))  # type: ignore[union-attr]
    assert count(source, other) == 1797
    assert count(source, mirror=True) == 1797 + 1497 and count(source, mirror=True) == 0
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])
    assert count(source) == 1797 and count(source) == 0


def test_mirrored_images_are_encoded_too(tmp_path: Path) -> None:
    data, source = load_data("digits"), halves()
    coded, _ = codes_of(source, data, tmp_path, mirror=True)
    n = len(data.train)
    assert len(coded.train) == 2 * n and len(coded.test) == len(data.test)
    torch.testing.assert_close(coded.train.x[n:], coded.train.x[:n].flip(-1))  # type: ignore[index]
    assert torch.equal(coded.train.y[n:], coded.train.y[:n])  # type: ignore[index]


def test_the_codec_goes_there_and_back(tmp_path: Path) -> None:
    data, source = load_data("digits"), halves()
    coded, statistics = codes_of(source, data, tmp_path, mirror=False)
    codec = AutoencoderCodec(source.autoencoder, statistics, source.pixels)
    k = data.test[torch.arange(20)][0]
    mean, std = codec.posterior(k)
    torch.testing.assert_close(mean, coded.test.x[:20])  # type: ignore[index]
    torch.testing.assert_close(std, coded.test.std[:20])  # type: ignore[index]
    squares = k.repeat_interleave(2, 2)[:, :, ::2].float()  # only that decode is of the pixels' kind and shape
    back = codec.decode(mean)
    assert back.dtype == torch.uint8 and back.shape == squares.shape
    even = torch.full((1, 1, 8, 8), 9, dtype=torch.uint8)
    assert torch.equal(codec.decode(codec.posterior(even)[0]), even)
    asked = as_asked(data, codec, "cpu")
    assert asked.shape == (1, 4, 4) and len(asked.test) == 300
    torch.testing.assert_close(asked.test[torch.tensor([3, 1])][0], mean[[3, 1]])


def test_a_step_s_codes_are_its_own_draws(tmp_path: Path) -> None:
    config = load_config("configs/latent_digits32.py", {**SMALL, "training.batch_size": "64"})
    coded, _ = codes_of(halves(), load_data("digits"), tmp_path, mirror=False)
    codec, model = codec_of(None), make_state(config, coded.shape, torch.device("cpu")).model
    sde = kind_of(config).sde(model, config)

    def x0(step: int, part: slice = slice(None), split: object = coded.train) -> Tensor:
        return Batches(config, codec, sde, part).draw(split, step).x0  # type: ignore[arg-type]

    assert torch.equal(x0(5), x0(5)) and torch.equal(x0(5), torch.cat([x0(5, slice(0, 20)), x0(5, slice(20, 64))]))
    # the same example has another code in another epoch, from the law that its split says
    one = replace(coded.train, x=coded.train.x[:1], std=coded.train.std[:1])  # type: ignore[index]
    numbers = torch.cat([x0(step, split=one) for step in range(30)])  # 30 * 64 draws
    z = (numbers - one.x) / one.std  # type: ignore[operator]
    assert abs(float(z.mean())) < 0.03 and abs(float(z.std()) - 1) < 0.03
    plain = Batches(config, codec, sde).draw(replace(coded.train, std=None), 5)
    whole = Batches(config, codec, sde).draw(coded.train, 5)
    assert torch.equal(plain.z, whole.z) and torch.equal(plain.t, whole.t)


def test_codes_that_do_not_vary_are_refused(tmp_path: Path) -> None:
    class Constant(Halves):
        def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
            zero = torch.zeros(len(x), 1, 4, 4)
            return zero, zero

    source = replace(halves(), autoencoder=Constant())
    with pytest.raises(ValueError, match="channel 0 of its codes is the same number everywhere"):
        codes_of(source, load_data("digits"), tmp_path, mirror=False)


# Where autoencoders come from.


def test_an_autoencoder_from_a_python_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    text = "from tests.runs import Halves as Mine\ndef get_autoencoder():\n    return Mine()\n"
    path.write_text(text)
    source = open_autoencoder(path, 17, (1, 8, 8))
    assert source.shape == (1, 4, 4) and source.pixels == PixelCodec(17)
    path.write_text(text.replace("Mine()", "Mine().half().float()"))
    assert open_autoencoder(path, 17, (1, 8, 8)).sha256 != source.sha256
    path.write_text("x = 1")
    with pytest.raises(ValueError, match=r"mine.py defines no get_autoencoder\(\)"):
        open_autoencoder(path, 17, (1, 8, 8))
    path.write_text("import torch\ndef get_autoencoder():\n    return torch.nn.Identity()\n")
    with pytest.raises(ValueError, match="must return a torch.nn.Module with encode and decode"):
        open_autoencoder(path, 17, (1, 8, 8))


def test_an_autoencoder_of_other_images_is_refused(trained: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data.autoencoder=.*nothing: there is no such .*autoencoder_digits32"):
        open_autoencoder(tmp_path / "nothing", 17, (1, 8, 8))
    with pytest.raises(ValueError, match=r"cannot encode and decode images of shape \(3, 8, 8\)"):
        open_autoencoder(trained[0], 17, (3, 8, 8))
    with pytest.raises(ValueError, match=r"is for images, and the data are floats of shape \(2,\)"):
        open_autoencoder(trained[0], None, (2,))
    path = tmp_path / "mine.py"
    path.write_text(
        "from tests.runs import Halves\nclass Odd(Halves):\n    def decode(self, z):\n        return z\n"
        "def get_autoencoder():\n    return Odd()\n"
    )
    with pytest.raises(ValueError, match=r"of that \(1, 4, 4\): .*images come back in their shape"):
        open_autoencoder(path, 17, (1, 8, 8))


def test_diffusers_autoencoder_is_read_from_its_folder(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=2,
        norm_num_groups=4,
        sample_size=8,
    ).eval()
    theirs.save_pretrained(tmp_path / "kl")
    source = open_autoencoder(tmp_path / "kl", 17, (1, 8, 8))
    x = torch.rand(3, 1, 8, 8) * 2 - 1
    with torch.no_grad():
        mean, std = source.autoencoder.encode(x)
        moments = theirs.quant_conv(theirs.encoder(x))
        torch.testing.assert_close(torch.cat([mean, 2 * std.log()], 1), moments, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(source.autoencoder.decode(mean), theirs.decoder(theirs.post_quant_conv(mean)))
    assert source.shape == (2, 4, 4)
    coded, _ = codes_of(source, first(20), tmp_path / "codes", mirror=False)
    assert coded.shape == (2, 4, 4)
    config = tmp_path / "kl" / "config.json"
    config.write_text(config.read_text().replace("AutoencoderKL", "UNet2DModel"))
    with pytest.raises(ValueError, match="holds a UNet2DModel, and data.autoencoder takes diffusers' AutoencoderKL"):
        open_autoencoder(tmp_path / "kl", 17, (1, 8, 8))


# The command line.


def test_a_model_of_codes_has_every_mode_that_makes_sense(trained: tuple[Path, Path], tmp_path: Path) -> None:
    autoencoder, model = trained
    workdir = tmp_path / "model"
    shutil.copytree(model, workdir)
    assert command("latent_digits32", "sample", workdir, of(autoencoder), "--config.sampling.single_png") == 0
    folder = only(workdir, "samples/000000003-*")
    x = np.load(folder / "samples.npz")["arr_0"]
    assert x.shape == (6, 8, 8, 1) and x.dtype == np.uint8 and x.max() <= 16
    assert (folder / "grid.png").is_file() and (folder / "000005.png").is_file()
    assert only(workdir, "samples/step-000000003/ema.png").is_file()  # what training drew

    assert command("latent_digits32", "encode", workdir, of(autoencoder)) == 0
    latents = only(workdir, "latents/*/latents.npz")
    assert np.load(latents)["latents"].shape == (4, *CODE)
    assert (latents.parent / "grid.png").is_file()
    assert command("latent_digits32", "decode", workdir, of(autoencoder), "--input", str(latents)) == 0
    decoded = np.load(only(workdir, "decoded/*/samples.npz"))["arr_0"]
    source = open_autoencoder(autoencoder, 17, (1, 8, 8))
    codec = codec_from(workdir, source)
    own = codec.decode(codec.posterior(load_data("digits").test[torch.arange(4)][0])[0])
    off = np.abs(decoded.transpose(0, 3, 1, 2).astype(int) - own.numpy())
    assert off.mean() < 0.2  # decoding comes back to the code, to the solver's tolerance
    loose = ["--config.eval.rtol=0.5", "--config.eval.atol=0.5"]
    assert command("latent_digits32", "interpolate", workdir, of(autoencoder), *loose) == 0
    assert np.load(only(workdir, "interpolations/*/interpolations.npz"))["arr_0"].shape == (1, 3, 8, 8, 1)
    np.save(tmp_path / "two.npy", x[:2])
    mine = ["--input", str(tmp_path / "two.npy")]
    assert command("latent_digits32", "encode", workdir, of(autoencoder), *mine, *loose) == 0
    assert np.load(only(workdir, "latents/*input*/latents.npz"))["latents"].shape == (2, *CODE)
    # changed images begin at their codes, with little noise here
    assert command("latent_digits32", "sample", workdir, of(autoencoder), *mine, "--config.sampling.start=0.002") == 0
    (made,) = {path.parent for path in (workdir / "samples").glob("*/samples.npz")} - {folder}
    arrays = np.load(made / "samples.npz")
    own = codec.decode(codec.posterior(torch.from_numpy(x[[0, 1, 0, 1, 0, 1]]).permute(0, 3, 1, 2))[0])
    assert np.array_equal(arrays["given"], own.permute(0, 2, 3, 1).numpy())
    assert np.abs(arrays["arr_0"].astype(int) - arrays["given"]).mean() < 0.2


@pytest.mark.parametrize("estimate, error", [("ode", "solver"), ("sde_bound", "draws"), ("bound", "images")])
def test_its_bits_are_of_pixels_and_have_their_parts(
    trained: tuple[Path, Path], tmp_path: Path, estimate: str, error: str
) -> None:
    autoencoder, model = trained
    workdir = tmp_path / "model"
    shutil.copytree(model, workdir)
    more = [of(autoencoder), f"--config.eval.estimate={estimate}", "--config.eval.draws=4", "--config.eval.steps=5"]
    more += ["--config.eval.rtol=1", "--config.eval.atol=1", "--config.eval.check_images=2"]
    assert command("latent_digits32", "likelihood", workdir, *more, "--config.eval.dequantizations=2") == 0
    folder = only(workdir, "likelihood/*")
    stamp, arrays = json.loads((folder / "stamp.json").read_text()), np.load(folder / "likelihood.npz")
    parts = [stamp[name] for name in ("reconstruction", "latent", "entropy")]
    assert stamp["mean"] == pytest.approx(parts[0] + parts[1] - parts[2]) and stamp["unit"] == "bits/dim"
    assert "a bound with the autoencoder's" in stamp["estimate"] and stamp["levels"] == 17
    assert {"images", "codes", error} <= stamp["errors"].keys() and stamp["errors"]["codes"] > 0
    assert arrays["bits_per_dim"].shape == arrays["latent"].shape == (4, 2)
    nats = arrays["log_prob"] / (64 * np.log(2))  # 64 pixels
    np.testing.assert_allclose(arrays["bits_per_dim"], -nats, rtol=1e-6)
    assert "at most so many: the reconstruction's" in (workdir / "log.txt").read_text()


def test_a_resumed_model_of_codes_is_the_uninterrupted_one(trained: tuple[Path, Path], tmp_path: Path) -> None:
    autoencoder, model = trained
    workdir = tmp_path / "model"
    shutil.copytree(model, workdir)
    (workdir / "checkpoints" / "000000003.safetensors").unlink()
    shutil.rmtree(workdir / "codes")
    assert command("latent_digits32", "train", workdir, of(autoencoder)) == 0
    one, two = (load(path).state_dict() for path in (model, workdir))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_configs_for_cifar_run_on_colours_and_mirrored_codes(tmp_path: Path) -> None:
    k = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", x=k)
    files = ["--config.data.dataset=files", f"--config.data.path={tmp_path / 'images.npz'}", "--config.model.nf=8"]
    files.append("--config.training.n_iters=1")
    assert command("autoencoder_cifar", "train", tmp_path / "autoencoder", *files) == 0
    more = [*files, of(tmp_path / "autoencoder")]
    assert command("latent_cifar", "train", tmp_path / "model", *more) == 0
    assert command("latent_cifar", "sample", tmp_path / "model", *more) == 0
    assert np.load(only(tmp_path, "model/samples/0*/samples.npz"))["arr_0"].shape == (6, 8, 8, 3)
    with safe_open(only(tmp_path, "model/codes/*.safetensors"), "pt") as file:
        assert file.get_tensor("train/mean").shape == (72, *CODE) and file.get_tensor("test/mean").shape == (4, *CODE)


def test_classes_and_classifiers_are_of_codes_too(trained: tuple[Path, Path], changed: Path, tmp_path: Path) -> None:
    autoencoder, one = trained[0], "--config.training.n_iters=1"
    for name in ("model", "judge"):
        shutil.copytree(trained[1] / "codes", tmp_path / name / "codes")
    classes = [of(autoencoder), one, "--config.model.class_conditional=true"]
    assert command("latent_digits32", "train", tmp_path / "model", *classes) == 0
    judge = [of(autoencoder), one, "--config.training.objective=cross_entropy"]
    assert command("latent_digits32", "train", tmp_path / "judge", *judge) == 0
    wanted = ["--config.sampling.labels=3,5", "--config.sampling.guidance=2"]
    assert command("latent_digits32", "sample", tmp_path / "model", *classes, *wanted) == 0
    drawn = np.load(only(tmp_path, "model/samples/0*/samples.npz"))
    assert drawn["arr_0"].shape == (6, 8, 8, 1) and drawn["arr_1"].tolist() == [3, 5] * 3
    guided = [of(autoencoder), *wanted, f"--config.sampling.classifier={tmp_path / 'judge'}"]
    workdir = tmp_path / "unconditional"
    shutil.copytree(trained[1], workdir)
    assert command("latent_digits32", "sample", workdir, *guided) == 0
    assert command("latent_digits32", "train", tmp_path / "other", of(changed), *judge[1:]) == 0
    guided[-1] = f"--config.sampling.classifier={tmp_path / 'other'}"
    assert "has codes of data.autoencoder" in refused("latent_digits32", "sample", workdir, *guided)


def refused(config: str, mode: str, workdir: Path, *more: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        assert command(config, mode, workdir, *more) == 2
    return said[-1]


def test_an_autoencoder_that_changed_since_is_refused(
    trained: tuple[Path, Path], changed: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "model"
    shutil.copytree(trained[1], workdir)
    for mode in ("sample", "likelihood", "train"):
        words = refused("latent_digits32", mode, workdir, of(changed), "--config.training.n_iters=4")
        assert re.search("codes of another autoencoder, sha256 .* restore the first one", words)
    words = refused("latent_digits32", "sample", workdir, "--config.data.autoencoder=")
    assert re.search("is a model of codes, and the config says pixels: set data.autoencoder=", words)


def test_a_model_resumed_on_other_images_is_refused(trained: tuple[Path, Path], tmp_path: Path) -> None:
    autoencoder, model = trained
    workdir = tmp_path / "model"
    shutil.copytree(model, workdir)
    images = np.random.default_rng(0).integers(0, 17, (40, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "other.npz", x=images)
    other = ["--config.data.dataset=files", f"--config.data.path={tmp_path / 'other.npz'}"]
    words = refused("latent_digits32", "train", workdir, of(autoencoder), *other, "--config.training.n_iters=4")
    assert "was trained on codes with other statistics" in words


@pytest.mark.parametrize(
    "config, mode, more, answer",
    [
        ("autoencoder_digits32", "sample", [], "is of an autoencoder, and --mode sample of models"),
        ("autoencoder_digits32", "likelihood", [], "its held-out loss is eval_loss in its log"),
        ("latent_digits32", "inpaint", ["--mask", "x.png"], "--mode inpaint works on pixels"),
        ("latent_digits32", "dequantize", [], "--mode dequantize works on pixels"),
        ("latent_digits32", "train", [], "there is no such file or folder; train one there first"),
        (
            "latent_digits32",
            "train",
            ["--config.data.uniform_dequantization=1"],
            "data.uniform_dequantization=False",
        ),
        ("latent_digits32", "train", ["--config.data.centered=false"], "codes, which have no levels and lie around 0"),
        ("latent_digits32", "sample", ["--config.sampling.clip_denoised=true"], "no range to be clipped to"),
        ("latent_digits32", "likelihood", ["--config.eval.importance_samples=2"], "bound does not split into pixels"),
        ("latent_digits32", "train", ["--config.model.super_resolution=2"], "for models of an image's codes"),
        ("autoencoder_digits32", "train", ["--config.model.ch_mult=2"], "give model.ch_mult 2 numbers or more"),
        ("autoencoder_digits32", "train", ["--config.training.time=log_snr"], "has no noise levels"),
        ("autoencoder_digits32", "train", ["--config.model.name=ddpm"], "set model.name=ncsnpp"),
        ("autoencoder_digits32", "train", ["--config.model.class_conditional=true"], "takes no condition"),
        ("autoencoder_digits32", "train", ["--config.model.ch_mult=1,1,1,1,1"], "are multiples of 16, but the data"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    config: str, mode: str, more: list[str], answer: str, tmp_path: Path
) -> None:
    missing = [f"--config.data.autoencoder={tmp_path / 'none'}"] if config.startswith("latent") else []
    assert answer in refused(config, mode, tmp_path / "run", *missing, *more)


def test_a_command_opens_the_autoencoder_once(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    real = codes.opened
    monkeypatch.setattr("score_sde.tasks.job.opened", lambda *args: (seen.append(args), real(*args))[1])
    monkeypatch.setattr(codes, "opened", lambda *args: pytest.fail("it is opened again"))
    assert command("latent_digits32", "sample", tmp_path, of(trained[0]), "--checkpoint", str(trained[1])) == 0
    assert len(seen) == 1
