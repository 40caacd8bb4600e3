"""Models of text and of smaller images, and cascades, from training to samples by the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from PIL import Image

from score_sde import VPSDE, Heun, ScoreModel, load, sample
from score_sde.cli import run
from score_sde.config import from_json as config_from_json
from score_sde.config import load as load_config
from score_sde.config.build import build_times
from score_sde.data import digest, leave_out, load_data, shrink
from score_sde.data.captions import Text
from score_sde.data.codecs import PixelCodec, codec_of
from score_sde.tasks.conditions import Wanted, augmented, conditional, load_guides, low_resolution
from score_sde.tasks.step import Batches
from tests.files import bert, pixels, save

pytest.importorskip("transformers")

SDE = VPSDE()
TINY = [
    "--config.model.nf=8",
    "--config.model.ch_mult=1",
    "--config.model.attn_resolutions=",
    "--config.training.n_iters=2",
    "--config.training.batch_size=8",
    "--config.training.eval_freq=1",
    "--config.training.snapshot_sampling=false",
    "--config.sampling.method=heun",
    "--config.sampling.steps=2",
    "--config.sampling.num_samples=6",
    "--config.sampling.batch_size=4",
    "--config.eval.num_images=3",
    "--config.eval.check_images=0",
    "--config.eval.rtol=1e-2",
    "--config.eval.atol=1e-2",
]
# Two steps of training, and what a model is told matters.
AWAKE = ("--config.optim.warmup=0", "--config.optim.lr=0.05", "--config.model.init_scale=1")


def modes(mode: str, workdir: Path, *more: str, config: str = "configs/vp_digits.py") -> int:
    return run(["--config", config, "--mode", mode, "--workdir", str(workdir), *TINY, *more])


def latest(workdir: Path, kind: str = "samples") -> Path:
    return max((workdir / kind).glob("*/stamp.json"), key=lambda p: p.stat().st_mtime).parent


def test_images_shrink_to_rounded_means() -> None:
    k = torch.tensor([[[[0, 1, 10, 20], [2, 3, 30, 41]]]], dtype=torch.uint8)
    assert shrink(k, 2).tolist() == [[[[2, 25]]]]  # of 1.5 (to even) and 25.25
    with pytest.raises(ValueError, match="2 x 4 cannot be shrunk by a factor of 4"):
        shrink(k, 4)
    small = load_data("digits", image_size=4)
    assert small.shape == (1, 4, 4) and torch.equal(small.test.x, shrink(load_data("digits").test.x, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data.image_size=3 must divide the images' size, 8"):
        load_data("digits", image_size=3)


def test_a_smaller_image_is_noised_as_the_sde_says_and_time_0_leaves_it() -> None:
    codec, level = PixelCodec(17), torch.tensor([0.0, 0.3, 0.8], dtype=torch.float64)
    k = torch.randint(0, 17, (3, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    z = torch.randn(3, 1, 4, 4)
    found = low_resolution(k, 2, codec, SDE, level, lambda like: z)
    small = codec.encode(shrink(k, 2))
    wanted = torch.stack([small[i] * SDE.alpha(t).float() + SDE.sigma(t).float() * z[i] for i, t in enumerate(level)])
    torch.testing.assert_close(found["image"][1:], wanted[1:])
    assert torch.equal(found["image"][0], small[0])
    assert found["augmentation"].tolist() == pytest.approx([0.0, 0.3, 0.8])
    assert augmented(small, SDE, level, lambda like: z)["image"].dtype == torch.float32


def test_training_s_smaller_images_are_of_the_batch_s_own_and_split_by_processes() -> None:
    config = load_config("configs/vp_digits.py", {"model.super_resolution": "2", "training.batch_size": "16"})
    data = load_data("digits")
    codec = codec_of(data.levels)
    whole = Batches(config, codec, SDE).draw(data.train, 5)
    small = codec.encode(shrink(codec.decode(whole.x0), 2))
    torch.testing.assert_close(whole.condition["image"], small)
    assert not whole.condition["augmentation"].any()
    config.training.augmentation = 0.5
    whole = Batches(config, codec, SDE).draw(data.train, 5)
    halves = [Batches(config, codec, SDE, part).draw(data.train, 5) for part in (slice(0, 8), slice(8, 16))]
    for name, value in whole.condition.items():
        assert torch.equal(value, torch.cat([half.condition[name] for half in halves]))
    level = whole.condition["augmentation"]
    assert level.min() > 0 and 0.3 < level.max() <= 0.5
    noise = (whole.condition["image"] - small * SDE.alpha(level.double()).float()[:, None, None, None]).flatten(1)
    scaled = noise / SDE.sigma(level.double()).float()[:, None]
    assert abs(float(scaled.std()) - 1) < 0.1  # 256 numbers, to two standard errors


def test_what_is_asked_for_is_the_same_in_any_batch() -> None:
    config = load_config("configs/vp_digits.py", {"model.super_resolution": "2", "sampling.augmentation": "0.4"})
    text = Text(torch.randn(3, 2, 4), torch.ones(3, 2, dtype=torch.bool), torch.randn(3, 5))
    images = torch.randint(0, 17, (7, 1, 4, 4), dtype=torch.uint8)
    wanted, codec = Wanted([], ("a", "b"), text, images), PixelCodec(17)
    told, beside = wanted.of(0, 7, config, codec, SDE)
    assert torch.equal(told["pooled"], text.pooled[[0, 1, 0, 1, 0, 1, 0]])
    assert torch.equal(beside["pooled"], text.pooled[2].expand(7, -1))  # what is not wanted
    assert torch.equal(told["image"], beside["image"])
    assert not torch.equal(told["image"], codec.encode(images))
    for first, count in ((0, 3), (3, 4)):
        for name, value in wanted.of(first, count, config, codec, SDE)[0].items():
            assert torch.equal(value, told[name][first : first + count])
    nothing = Wanted([], ("a", "b", "c"), text, None).of(0, 4, config, codec, SDE)
    assert nothing[1] == {"text": None, "mask": None, "pooled": None}


# Cascades


LARGE = ("--config.model.super_resolution=2", "--config.model.class_conditional")


def test_a_cascade_runs_and_writes_all_stages(stages: tuple[Path, Path]) -> None:
    base, large = stages
    more = (f"--config.sampling.base={base}", "--config.sampling.augmentation=0.2", "--config.sampling.labels=3,5")
    assert modes("sample", large, *LARGE, *more) == 0
    with np.load(latest(base) / "samples.npz") as small, np.load(latest(large) / "samples.npz") as whole:
        assert small["arr_0"].shape == (6, 4, 4, 1) and whole["arr_0"].shape == (6, 8, 8, 1)
        assert small["arr_1"].tolist() == whole["arr_1"].tolist() == [3, 5] * 3
    stamp = json.loads((latest(large) / "stamp.json").read_text())
    assert stamp["config"]["sampling.augmentation"] == 0.2 and len(stamp["images_sha256"]) == 64
    other = (f"--config.sampling.base={base}", "--config.sampling.labels=3,5")
    assert modes("sample", large, *LARGE, *other) == 0  # without noise
    assert len(list((base / "samples").glob("*/stamp.json"))) == 1  # the base's samples are there already
    stamps = [json.loads(path.read_text()) for path in (large / "samples").glob("*/stamp.json")]
    assert sorted(stamp["config"]["sampling.augmentation"] for stamp in stamps) == [0.0, 0.2]
    with np.load(latest(base) / "samples.npz") as small:
        drawn = torch.from_numpy(small["arr_0"]).permute(0, 3, 1, 2).contiguous()
    assert {stamp["images_sha256"] for stamp in stamps} == {digest(drawn)}


def test_one_s_own_images_are_enlarged(stages: tuple[Path, Path], tmp_path: Path) -> None:
    small = shrink(load_data("digits").test.x[:4], 2)  # type: ignore[index]
    np.savez(tmp_path / "small.npz", arr_0=small.numpy())
    assert modes("sample", stages[1], *LARGE, f"--input={tmp_path / 'small.npz'}") == 0
    found = np.load(latest(stages[1]) / "samples.npz")["arr_0"]
    model, codec, label = load(stages[1]), codec_of(17, True), torch.arange(4)
    config = config_from_json(stages[1] / "config.json")
    config.sampling.steps = 2
    wanted = [
        codec.decode(sample(told, Heun(), (4, 1, 8, 8), build_times(config, model.sde), denoise=True))
        for k in (small, 16 - small)
        for told in [model.given(label=label, image=codec.encode(k), augmentation=torch.zeros(4))]
    ]
    same = [(found == k.permute(0, 2, 3, 1).numpy()).mean() for k in wanted]
    assert same[0] > 0.98 > same[1]  # and not those of other images


def test_a_weaker_model_is_told_the_smaller_image_too(stages: tuple[Path, Path]) -> None:
    """By itself, told the same, a model is not moved, at most over the edge of a level."""
    rows = (*LARGE, f"--config.sampling.base={stages[0]}", f"--config.sampling.guidance_checkpoint={stages[1]}")
    assert modes("sample", stages[1], *rows, "--scales=1,3") == 0
    with np.load(latest(stages[1]) / "samples.npz") as found:
        assert (found["arr_0"][:6] == found["arr_0"][6:]).mean() > 0.98
    guides = load_guides(*(guided := with_weaker(stages[1])), (1, 8, 8), torch.device("cpu"))
    assert guides.reference is not None and guides.shared == ("label", "image", "augmentation")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor(0.9)
    told = {"label": torch.tensor([1, 2]), "image": torch.randn(2, 1, 4, 4), "augmentation": torch.tensor([0.1, 0.4])}
    model = conditional(guided[1], (told, {}), told["label"], guided[0], guides, 3.0)
    torch.testing.assert_close(model(x, t).data, guided[1](x, t, **told).data)


def with_weaker(workdir: Path) -> tuple[ConfigDict, ScoreModel]:
    """The config and the raw model of a workdir, guided by itself."""
    config = config_from_json(workdir / "config.json")
    config.sampling.guidance_checkpoint, config.sampling.weights = str(workdir), "raw"
    return config, load(workdir, ema=False)


def test_a_model_of_smaller_images_is_no_model_to_restore_by(
    stages: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert modes("deblur", stages[1], *LARGE) == 2
    assert "--mode sample --input FILE_OR_FOLDER enlarges by it" in capsys.readouterr().err


def test_a_model_of_smaller_images_has_a_likelihood(stages: tuple[Path, Path]) -> None:
    assert modes("likelihood", stages[1], *LARGE) == 0
    assert np.isfinite(np.load(latest(stages[1], "likelihood") / "likelihood.npz")["bits_per_dim"]).all()


def test_the_network_uses_the_image_and_its_noise_level(stages: tuple[Path, Path]) -> None:
    model, x, t = load(stages[1], ema=False), torch.randn(2, 1, 8, 8), torch.tensor(0.5)
    image = torch.randn(2, 1, 4, 4)
    answers = [model(x, t, image=image, augmentation=torch.full((2,), level)).data for level in (0.0, 0.4)]
    answers.append(model(x, t, image=-image).data)
    assert min(float((answers[0] - other).abs().max()) for other in answers[1:]) > 1e-7


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("give it some, --input FILE_OR_FOLDER, or the stage before", LARGE),
        ("sampling.base are for super-resolution models", ("--config.sampling.base=runs/nothing",)),
        (
            ": train it first with --mode train; train the stage before (a model of images of 4 x 4) there first",
            (*LARGE, "--config.sampling.base=BASE/nothing"),
        ),
        (
            r"makes examples of shape (1, 8, 8), and (1, 4, 4) are to be enlarged",
            (*LARGE, "--config.sampling.base=LARGE"),
        ),
        ("is for a model of text", (*LARGE, "--config.sampling.base=BASE", "--prompt=a cat")),
        ("--negative", (*LARGE, "--negative=a cat")),
        ("reads no --input", ("--config.model.class_conditional", "--input=x.png")),
        ("to be enlarged: name the workdir of a model", (*LARGE, "--config.sampling.base=LARGE")),
        ("there is no file or folder no.png: name what is to be read, --input", (*LARGE, "--input=no.png")),
        ("--scales must be numbers", (*LARGE, "--config.sampling.base=BASE", "--scales=1,two")),
        ("--scales 1,2 has no effect without a condition", ("--scales=1,2",)),
    ],
)
def test_what_a_model_of_images_cannot_do_is_said(
    stages: tuple[Path, Path], words: str, settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    named = [s.replace("BASE", str(stages[0])).replace("LARGE", str(stages[1])) for s in settings]
    assert modes("sample", stages[1], *named) == 2
    assert words in capsys.readouterr().err


SMALLER = {
    "cascade_digits_4": 4,
    "cascade_digits_8": 8,
    "cascade_cifar_8": 4,
    "cascade_cifar_16": 8,
    "cascade_cifar_32": 16,
}


@pytest.mark.parametrize(
    "names", [("cascade_digits_4", "cascade_digits_8"), ("cascade_cifar_8", "cascade_cifar_16", "cascade_cifar_32")]
)
def test_the_configs_of_a_cascade_run_as_one(names: tuple[str, ...], tmp_path: Path) -> None:
    for i, image in enumerate(pixels(12, 16, 16, 3)):
        save(tmp_path / "images" / str(i % 3) / f"{i}.png", image)
    for i, name in enumerate(names):
        more = [f"--config.data.image_size={SMALLER[name]}", f"--config.sampling.base={tmp_path / names[i - 1]}"]
        more = [*more[: i + 1], "--config.model.attn_resolutions=4", "--config.model.num_res_blocks=1"]
        more += ["--config.training.n_iters=1", "--config.training.batch_size=4", "--config.sampling.steps=2"]
        if name == names[-1]:
            more.append("--config.training.snapshot_sampling=true")
        if "cifar" in name:
            more += ["--config.data.dataset=files", f"--config.data.path={tmp_path / 'images'}"]
        where = dict(workdir=tmp_path / name, config=f"configs/{name}.py")
        assert modes("train", where["workdir"], *more, config=where["config"]) == 0
    assert modes("sample", where["workdir"], *more, config=where["config"]) == 0
    for name in names:
        with np.load(latest(tmp_path / name) / "samples.npz") as found:
            assert found["arr_0"].shape[:3] == (6, SMALLER[name], SMALLER[name])


# Text


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder of images with captions, an encoder, and a model of both; the settings that go with it."""
    data, workdir = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("text")
    for i, image in enumerate(pixels(20, 8, 8)):
        save(data / f"{i:02d}.png", image)
        (data / f"{i:02d}.txt").write_text(("a red cat", "a dog", "an airbus")[i % 3])
    encoder = bert(tmp_path_factory.mktemp("encoder") / "bert")
    settings = [
        "--config.data.dataset=files",
        f"--config.data.path={data}",
        f"--config.model.text_encoder={encoder}",
        "--config.model.attn_resolutions=8",
        "--config.data.leave_out=an airbus",
    ]
    assert modes("train", workdir, *settings, *AWAKE) == 0
    return workdir, settings


def test_a_caption_left_out_is_not_trained_on(captioned: tuple[Path, list[str]]) -> None:
    path = next(s for s in captioned[1] if "data.path" in s).split("=")[1]
    data = load_data("files", path)
    kept = leave_out(data, ["an airbus"])
    names = [kept.captions[i] for i in kept.train.caption]  # type: ignore[union-attr]
    assert set(names) == {"a red cat", "a dog"} and kept.captions == data.captions
    assert len(kept.test) == len(data.test)
    with pytest.raises(ValueError, match=r"no example has the caption 'airbus': the nearest is 'an airbus'"):
        leave_out(data, ["airbus"])


def test_prompts_are_sampled_in_turn_at_each_scale(captioned: tuple[Path, list[str]]) -> None:
    workdir, settings = captioned
    asked = ("--prompt=a red cat", "--prompt=a dog", "--scales=0,1,3")
    assert modes("sample", workdir, *settings, *asked) == 0
    with np.load(latest(workdir) / "samples.npz") as found:
        rows = found["arr_0"].reshape(3, 6, 8, 8, 1)
    stamp = json.loads((latest(workdir) / "stamp.json").read_text())
    assert stamp["prompts"] == ["a red cat", "a dog"] and stamp["guidance"] == [0, 1, 3]
    for i, scale in enumerate((0, 1, 3)):
        assert modes("sample", workdir, *settings, *asked[:2], f"--config.sampling.guidance={scale}") == 0
        with np.load(latest(workdir) / "samples.npz") as found:
            assert np.array_equal(found["arr_0"], rows[i])
    width, height = Image.open(latest(workdir) / "grid.png").size
    assert width > 3 * 34 + 2 + 5 and height == 2 * 34 + 2  # a row for each prompt, which stands before it


def test_at_scale_0_a_sample_is_what_the_negative_prompt_says(captioned: tuple[Path, list[str]]) -> None:
    workdir, settings = captioned
    assert modes("sample", workdir, *settings, "--prompt=a red cat", "--negative=a dog", "--scales=0,3") == 0
    with np.load(latest(workdir) / "samples.npz") as found:
        negative, guided = found["arr_0"].reshape(2, 6, 8, 8, 1).astype(int)
    width, height = Image.open(latest(workdir) / "grid.png").size
    assert width > 6 * 34 + 2 + 5 and height == 2 * 34 + 2  # a row for each scale, of images 4 times larger
    plain = {}
    for prompt in ("a dog", "a red cat"):
        assert modes("sample", workdir, *settings, f"--prompt={prompt}") == 0
        plain[prompt] = np.load(latest(workdir) / "samples.npz")["arr_0"].astype(int)
    assert (negative == plain["a dog"]).mean() > 0.98 > (plain["a red cat"] == plain["a dog"]).mean()
    assert np.abs(guided - plain["a red cat"]).mean() > 0.1


def test_a_cascade_of_prompts_tells_them_to_every_stage(captioned: tuple[Path, list[str]], tmp_path: Path) -> None:
    base, settings = tmp_path / "base", [s for s in captioned[1] if "leave_out" not in s]
    large = (*settings, "--config.model.super_resolution=2", f"--config.sampling.base={base}")
    assert modes("train", base, *settings, "--config.data.image_size=4") == 0
    assert modes("train", tmp_path / "large", *large) == 0
    assert modes("sample", tmp_path / "large", *large, "--prompt=a dog", "--prompt=a red cat") == 0
    for workdir, size in ((base, 4), (tmp_path / "large", 8)):
        assert json.loads((latest(workdir) / "stamp.json").read_text())["prompts"] == ["a dog", "a red cat"]
        assert np.load(latest(workdir) / "samples.npz")["arr_0"].shape == (6, size, size, 1)


def test_images_are_restored_by_what_a_prompt_says(captioned: tuple[Path, list[str]]) -> None:
    workdir, settings = captioned
    found, guided = [], ("--prompt=a dog", "--config.sampling.guidance=3")
    for asked in ([], ["--prompt=a dog"], guided, [*guided, "--negative=a red cat"]):
        more = ("--config.eval.weights=raw", "--config.inverse.variance=0.1", "--config.inverse.factor=2")
        assert modes("superresolve", workdir, *settings, *more, *asked) == 0
        folder = latest(workdir, "restored")
        found.append(np.load(folder / "restored.npz")["restored"].astype(int))
    assert json.loads((folder / "stamp.json").read_text())["prompts"] == ["a dog"]
    assert all(np.abs(a - b).mean() > 0.1 for i, a in enumerate(found) for b in found[:i])


def test_the_network_is_told_the_caption(captioned: tuple[Path, list[str]]) -> None:
    model, x, t = load(captioned[0], ema=False), torch.randn(1, 1, 8, 8), torch.tensor(0.5)
    text = Text(torch.randn(2, 3, 16), torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 16))
    one, other = (model(x, t, **text.condition(torch.tensor([i]))).data for i in (0, 1))
    assert float((one - other).abs().max()) > 1e-7


def test_a_likelihood_is_given_the_captions(captioned: tuple[Path, list[str]]) -> None:
    workdir, settings = captioned
    assert modes("likelihood", workdir, *settings) == 0
    assert modes("likelihood", workdir, *settings, "--config.eval.conditional=false") == 0
    values = [np.load(path)["bits_per_dim"] for path in (workdir / "likelihood").glob("*/likelihood.npz")]
    assert len(values) == 2 and np.abs(values[0] - values[1]).min() > 1e-4


def test_another_encoder_or_data_without_captions_are_refused(
    captioned: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir, settings = captioned
    other = bert(tmp_path / "other", seed=1)
    changed = [s for s in settings if "text_encoder" not in s] + [f"--config.model.text_encoder={other}"]
    assert modes("sample", workdir, *changed, "--prompt=a dog") == 2
    assert "another text encoder" in capsys.readouterr().err
    encoder = next(s for s in settings if "text_encoder" in s)
    assert modes("train", tmp_path / "new", encoder) == 2
    assert "data.dataset=digits has none" in capsys.readouterr().err
    assert modes("sample", workdir, *settings, "--prompt=a cat", "--negative=a dog") == 2
    assert "--negative 'a dog' has no effect without guidance: set sampling.guidance above" in capsys.readouterr().err
    weaker = (f"--config.sampling.guidance_checkpoint={workdir}", "--config.sampling.guidance=2")
    assert modes("sample", workdir, *settings, "--prompt=a cat", "--negative=a dog", *weaker) == 2
    assert "--negative 'a dog' is for classifier-free guidance" in capsys.readouterr().err
    assert modes("deblur", workdir, *settings, "--config.sampling.guidance=2") == 2
    assert "has no prompt to guide by: give one, --prompt TEXT" in capsys.readouterr().err
    assert modes("sample", workdir, *settings, "--config.sampling.guidance=2") == 2
    assert "has no prompt to guide by: give one, --prompt TEXT" in capsys.readouterr().err
    assert modes("encode", workdir, *settings) == 2
    assert "keeps no captions" in capsys.readouterr().err
    assert modes("sample", workdir, "--config.model.text_encoder=nothing", "--prompt=a dog") == 2
    assert "there is no text encoder in nothing" in capsys.readouterr().err
    assert modes("sample", tmp_path / "untrained", *settings, "--prompt=a dog") == 2
    assert f"there is no checkpoint or workdir {tmp_path / 'untrained'}: train it first" in capsys.readouterr().err


def test_the_config_of_text_runs(tmp_path: Path) -> None:
    left_out = load_config("configs/text_cifar_16.py").data.leave_out.split(",")
    for i, image in enumerate(pixels(24, 8, 8, 3)):
        save(tmp_path / "images" / f"{i:02d}.png", image)
        (tmp_path / "images" / f"{i:02d}.txt").write_text([*left_out, "a cat"][i % 21])
    more = ["--config.data.dataset=files", f"--config.data.path={tmp_path / 'images'}", "--config.data.image_size=8"]
    more += [f"--config.model.text_encoder={bert(tmp_path / 'bert')}", "--config.model.attn_resolutions=4"]
    more += ["--config.training.snapshot_sampling=true", "--config.model.ch_mult=1,2"]
    more += ["--config.model.num_res_blocks=1", "--config.training.n_iters=1", "--config.sampling.steps=2"]
    config = "configs/text_cifar_16.py"
    assert modes("train", tmp_path / "run", *more, config=config) == 0
    assert modes("sample", tmp_path / "run", *more, "--prompt=a moving van", config=config) == 0
