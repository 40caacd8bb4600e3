"""Conditions from the data to the model: class labels, examples without, guidance, and their way through the modes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from score_sde import Observation, ScoreModel, classifier, guide, load, load_classifier, sample, times
from score_sde.cli import run
from score_sde.config import load as load_config
from score_sde.config.build import build_times
from score_sde.data import load_data
from score_sde.data.codecs import codec_of
from score_sde.inverse import Mask
from score_sde.models.base import absent, of_examples
from score_sde.models.closed_form import Mixture
from score_sde.models.guidance import Guided, both
from score_sde.models.rules import Preconditioned
from score_sde.networks import EDM2, MLP, Encoder, UNet
from score_sde.samplers import EmbeddedODE, Heun
from score_sde.tasks.conditions import Guides, conditional, left_out
from score_sde.tasks.latents import as_in_training
from score_sde.tasks.restore import restore
from score_sde.tasks.step import Batches
from tests.oracles import MIXTURE, T, awake
from tests.runs import image_config

SDE = MIXTURE.sde


NETWORKS = {
    "unet": (lambda: UNet(2, width=8, multipliers=(1, 2), blocks=1, attention=(), image_size=8, classes=3), (2, 8, 8)),
    "edm2": (
        lambda: EDM2(2, width=8, multipliers=(1, 2), blocks=1, attention=(), image_size=8, head_channels=8, classes=3),
        (2, 8, 8),
    ),
    "mlp": (lambda: MLP(4, width=16, depth=2, classes=3), (4,)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_answers_each_example_by_its_own_label(name: str) -> None:
    make, shape = NETWORKS[name]
    network = awake(make()).double().eval()
    x, t = torch.randn(4, *shape, dtype=torch.float64), torch.rand(4, dtype=torch.float64) * 999
    labels = torch.tensor([2, -1, 0, 2])
    y = network(x, t, label=labels)
    for i, label in enumerate(labels.tolist()):
        torch.testing.assert_close(y[i : i + 1], network(x[i : i + 1], t[i : i + 1], label=label))
    torch.testing.assert_close(y[1:2], network(x[1:2], t[1:2]))  # -1 is no label
    answers = torch.stack([network(x, t, label=label) for label in (-1, 0, 1, 2)])
    assert bool((answers.diff(dim=0).abs().amax((1, 2)) > 1e-3).all())


@pytest.mark.parametrize("label", [3, -2, 1.0, torch.tensor([0, 1, 2]), torch.zeros(1, 1, dtype=torch.int64)])
def test_a_label_that_is_no_class_is_refused(label: object) -> None:
    with pytest.raises(ValueError, match="label must"):
        MLP(4, classes=3)(torch.zeros(2, 4), torch.zeros(2), label=label)
    with pytest.raises(ValueError, match="takes no condition label: .* model.class_conditional=True"):
        MLP(4)(torch.zeros(2, 4), torch.zeros(2), label=label)


def test_what_stands_for_no_condition() -> None:
    assert absent(torch.tensor([3, 0])).tolist() == [-1, -1]
    assert absent(torch.tensor([True, False])).tolist() == [False, False]
    assert absent(torch.tensor([1.5])).tolist() == [0.0]
    value = torch.arange(1.0, 7.0).reshape(3, 2)
    found = left_out({"pooled": value}, torch.tensor([True, False, True]))
    assert found["pooled"].tolist() == [[0, 0], [3, 4], [0, 0]]


def test_no_label_is_all_of_the_mixture() -> None:
    x = torch.randn(5, 2, dtype=torch.float64)
    label = torch.tensor([-1, 0, -1, 2, 1])
    got, whole = MIXTURE(x, T, label=label), MIXTURE(x, T)
    for i, k in enumerate(label.tolist()):
        torch.testing.assert_close(got.data[i], whole.data[i] if k < 0 else MIXTURE(x, T, label=k).data[i])
    torch.testing.assert_close(MIXTURE.log_prob(x, T, label=-1), MIXTURE.log_prob(x, T))


class Sizes(Mixture):
    """The mixture, with the sizes of what it was asked."""

    def forward(self, x: Tensor, t: Tensor, label: object = None):  # type: ignore[no-untyped-def]
        self.sizes = [*getattr(self, "sizes", []), len(x)]
        return super().forward(x, t, label)


def counting() -> Sizes:
    return Sizes(SDE, [0.2, 0.5, 0.3], torch.tensor([[-1.0, 0.0], [0.5, 1.0], [1.0, -1.0]]), [0.02, 0.05, 0.1])


@pytest.mark.parametrize("t", [T, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)])
@pytest.mark.parametrize(
    ("first", "second"), [(None, [2, 0, 1]), (1, [2, 0, 1]), ([0, 1, 2], [2, 2, -1]), (None, 2), (0, 1)]
)
def test_two_conditions_of_one_model_are_one_batch(t: Tensor, first: object, second: object) -> None:
    model, x = counting(), torch.randn(3, 2, dtype=torch.float64)
    conditions = [torch.tensor(c) if isinstance(c, list) else c for c in (first, second)]
    alone = [MIXTURE(x, t, label=c) for c in conditions]
    got = both(*(model.given(label=c) for c in conditions), x, t)
    assert model.sizes == [6]
    for one, wanted in zip(got, alone, strict=True):
        torch.testing.assert_close(one.data, wanted.data)
        torch.testing.assert_close(one.noise, wanted.noise)
        torch.testing.assert_close(one.score, wanted.score)


def test_of_different_models_each_is_asked() -> None:
    a, b, x = counting(), counting(), torch.randn(3, 2, dtype=torch.float64)
    guide(a.given(label=0), b, 2.0)(x, T)
    assert (a.sizes, b.sizes) == ([3], [3])
    guide(a.given(label=0), a, 2.0)(x, T)  # a model without conditions is its own unconditional one
    assert a.sizes == [3, 6]


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_a_guided_score_is_the_line_through_both(scale: float) -> None:
    x = torch.randn(4, 2, dtype=torch.float64)
    guided = guide(MIXTURE.given(label=1), MIXTURE.given(label=None), scale)
    whole, one = MIXTURE.score(x, T), MIXTURE.given(label=1).score(x, T)
    torch.testing.assert_close(guided.score(x, T), whole + scale * (one - whole))


def test_guidance_keeps_to_its_interval() -> None:
    model, x = counting(), torch.randn(3, 2, dtype=torch.float64)
    told = model.given(label=0)
    ratio = lambda t: float(SDE.sigma(torch.tensor(t).double()) / SDE.alpha(torch.tensor(t).double()))
    guided = guide(told, model.given(label=None), 4.0, low=ratio(0.3), high=ratio(0.6))
    always = guide(told, model.given(label=None), 4.0)
    t = torch.tensor([0.2, 0.45, 0.8], dtype=torch.float64)
    wanted = torch.stack([told.score(x, t)[0], always.score(x, t)[1], told.score(x, t)[2]])
    torch.testing.assert_close(guided.score(x, t), wanted)
    model.sizes = []
    guided(x, t[0])
    assert model.sizes == [3]  # outside of it a step costs one evaluation
    with pytest.raises(ValueError, match="low"):
        guide(told, model, 2.0, low=1.0, high=0.5)


def test_a_condition_goes_with_its_example_through_a_solver_that_drops_some() -> None:
    labels = torch.tensor([0, 2, 1, 0])
    model = guide(MIXTURE.given(label=labels), MIXTURE.given(label=None), 1.5)
    ends = torch.tensor([1.0, 0.01], dtype=torch.float64)
    together = sample(model, EmbeddedODE(), (4, 2), ends, dtype=torch.float64)
    for i, label in enumerate(labels.tolist()):
        own = guide(MIXTURE.given(label=label), MIXTURE.given(label=None), 1.5)
        one = sample(own, EmbeddedODE(), (1, 2), ends, first=i, dtype=torch.float64)
        torch.testing.assert_close(together[i : i + 1], one)
    assert isinstance(model, Guided)
    with of_examples(model, torch.tensor([1, 3]), 4):
        assert model.model.condition["label"].tolist() == [2, 0]  # type: ignore[union-attr,operator]


@pytest.mark.parametrize(("scale", "wanted"), [(0.0, None), (1.0, 2)])
def test_scale_0_samples_all_and_scale_1_one_class(scale: float, wanted: int | None) -> None:
    guided = guide(MIXTURE.given(label=2), MIXTURE.given(label=None), scale)
    grid = times.log_snr(SDE, 30)
    x = sample(guided, Heun(), (64, 2), grid, dtype=torch.float64)
    torch.testing.assert_close(x, sample(MIXTURE.given(label=wanted), Heun(), (64, 2), grid, dtype=torch.float64))


def test_training_draws_labels_and_leaves_some_out() -> None:
    config, data = image_config(model__class_conditional=True, training__batch_size=500), load_data("digits")
    codec = codec_of(data.levels, True)
    label = Batches(config, codec, SDE).draw(data.train, 3).condition["label"]
    config.training.condition_dropout = 0.0
    all_of = Batches(config, codec, SDE).draw(data.train, 3)
    known = label >= 0
    assert 0.05 < 1 - known.double().mean() < 0.15  # a tenth, to four standard deviations
    assert torch.equal(label[known], all_of.condition["label"][known])
    config.training.condition_dropout = 1.0
    assert bool((Batches(config, codec, SDE).draw(data.train, 3).condition["label"] == -1).all())
    held_out = Batches(config, codec, SDE).draw(data.test, 3, held_out=True)
    assert bool((held_out.condition["label"] >= 0).all())
    config.training.objective, config.model.class_conditional = "cross_entropy", False
    of_classifier = Batches(config, codec, SDE).draw(data.train, 3).condition["label"]
    assert torch.equal(of_classifier, all_of.condition["label"])  # none left out, though condition_dropout is 1
    config.training.objective, config.model.class_conditional = "denoising", True
    parts = Batches(config, codec, SDE).draw(data.train, 3).parts(4)
    assert [len(p.condition["label"]) for p in parts] == [125] * 4
    assert torch.equal(torch.cat([p.x0 for p in parts]), all_of.x0)


TINY = [
    "--config.model.nf=8",
    "--config.model.ch_mult=1",
    "--config.model.attn_resolutions=",
    "--config.training.n_iters=3",
    "--config.training.batch_size=8",
    "--config.eval.num_images=4",
    "--config.training.snapshot_sampling=false",
    "--config.model.class_conditional",
    "--config.sampling.steps=2",
    "--config.sampling.method=heun",
    "--config.sampling.num_samples=20",
    "--config.eval.check_images=0",
    "--config.optim.warmup=0",  # three steps, and labels matter
    "--config.optim.lr=0.05",
    "--config.model.init_scale=1",
    "--config.eval.rtol=1e-2",
    "--config.eval.atol=1e-2",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("conditional")
    assert run(["--config", "configs/vp_digits.py", "--mode", "train", "--workdir", str(workdir), *TINY]) == 0
    return workdir


def modes(workdir: Path, mode: str, *more: str) -> int:
    return run(["--config", "configs/vp_digits.py", "--mode", mode, "--workdir", str(workdir), *TINY, *more])


def results(workdir: Path, kind: str, file: str) -> list[Path]:
    return sorted((workdir / kind).glob(f"*/{file}"), key=lambda p: p.stat().st_mtime)


def test_classes_are_sampled_in_turn_and_kept(trained: Path) -> None:
    assert modes(trained, "sample") == 0
    with np.load(results(trained, "samples", "samples.npz")[-1]) as found:
        assert found["arr_0"].shape == (20, 8, 8, 1)
        assert found["arr_1"].tolist() == [*range(10), *range(10)]
    assert modes(trained, "sample", "--config.sampling.labels=3,7", "--config.sampling.guidance=2") == 0
    folder = results(trained, "samples", "samples.npz")[-1].parent
    with np.load(folder / "samples.npz") as found:
        assert found["arr_1"].tolist() == [3, 7] * 10
        x = np.round(found["arr_0"][..., 0] * (255 / 16)).astype(np.uint8)
    picture = np.asarray(Image.open(folder / "grid.png"))  # no strip: two rows of five for each class, behind its name
    assert picture.shape[0] == 4 * 34 + 2 and picture[:, : -(5 * 34 + 2)].any()
    tiles = picture[2:, -5 * 34 :].reshape(4, 34, 5, 34)[:, :32:4, :, :32:4].swapaxes(1, 2).reshape(20, 8, 8)
    assert np.array_equal(tiles, np.concatenate([x[::2], x[1::2]]))
    stamp = json.loads((folder / "stamp.json").read_text())
    assert (stamp["labels"], stamp["guidance"]) == ([3, 7], [2.0])


@pytest.mark.parametrize("by", ["label", "classifier", "weaker"])
def test_a_config_s_interval_and_rescaling_are_those_of_guidance(by: str) -> None:
    settings = {"model.class_conditional": "true", "sampling.guidance_low": "0.5", "sampling.guidance_high": "2"}
    if by != "classifier":
        settings["sampling.guidance_rescale"] = "0.7"
    config, label = load_config("configs/vp_digits.py", settings), torch.tensor([1, 0, 2, 1])
    told, interval = MIXTURE.given(label=label), {"low": 0.5, "high": 2.0}
    weak = Mixture(SDE, [0.4, 0.3, 0.3], MIXTURE.means, 0.3)

    def judge(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return MIXTURE.log_prob(x, t, label=label) - MIXTURE.log_prob(x, t)

    guides, wanted = {
        "label": (Guides(), guide(told, MIXTURE, 3.0, **interval, rescale=0.7)),
        "classifier": (Guides(classifier=judge), classifier(told, judge, 3.0, **interval, label=label)),  # type: ignore[arg-type]
        "weaker": (
            Guides(reference=weak, shared=("label",)),
            guide(told, weak.given(label=label), 3.0, **interval, rescale=0.7),
        ),
    }[by]
    found = conditional(MIXTURE, ({"label": label}, {"label": None}), label, config, guides, 3.0)
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ratios = (0.3, 1.0, 3.0)  # below the interval, in it and above it
    for ratio, guided in zip(ratios, (False, True, False), strict=True):
        t = SDE.time(-2 * torch.tensor(ratio, dtype=torch.float64).log())
        torch.testing.assert_close(found.score(x, t), wanted.score(x, t))
        assert torch.allclose(found.score(x, t), told.score(x, t)) != guided


def test_guidance_leads_away_from_another_class(trained: Path) -> None:
    """In place of no label, as `guide` says."""
    settings = ["--config.sampling.labels=3,5", "--config.sampling.num_samples=4", "--config.sampling.guidance=3"]
    assert modes(trained, "sample", *settings, "--config.sampling.negative_label=7") == 0
    folder = results(trained, "samples", "samples.npz")[-1].parent
    model, label = load(trained), torch.tensor([3, 5, 3, 5])
    guided = guide(model.given(label=label), model.given(label=7), 3.0)
    found = np.load(folder / "samples.npz")["arr_0"]
    assert np.array_equal(found, drawn_by(guided))
    assert not np.array_equal(found, drawn_by(guide(model.given(label=label), model.given(label=None), 3.0)))
    assert json.loads((folder / "stamp.json").read_text())["config"]["sampling.negative_label"] == 7


def drawn_by(model: ScoreModel) -> np.ndarray:
    """Four images by the sampler of TINY."""
    config = load_config("configs/vp_digits.py", {"sampling.steps": "2"})
    x = sample(model, Heun(), (4, 1, 8, 8), build_times(config, model.sde), denoise=True)
    return codec_of(17, True).decode(x).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def mask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Known above, hidden below."""
    path = tmp_path_factory.mktemp("mask") / "mask.png"
    Image.fromarray((255 * (np.arange(64).reshape(8, 8) < 32)).astype(np.uint8)).save(path)
    return path


RESTORE = ("--config.eval.num_images=3", "--config.eval.batch_size=2", "--config.inverse.method=pigdm")


def restored_by(model: ScoreModel) -> np.ndarray:
    """The first three held-out digits' lower halves, by the library."""
    config = load_config("configs/vp_digits.py", {"sampling.steps": "2", "sampling.method": "heun"})
    codec = codec_of(17, True)
    operator = Mask(torch.arange(64).reshape(8, 8) < 32)
    seen = Observation(operator, operator.apply(as_in_training(load_data("digits").test.x[:3], codec, config, 0)), 0.0)
    x = restore(model, config, seen, (1, 8, 8), build_times(config, model.sde), 0)
    return codec.decode(x).permute(0, 2, 3, 1).numpy()


def nearly(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for numbers on the edge of a level, which a batch of another size may round to the other side."""
    return bool((a == b).mean() > 0.98)


def test_images_are_restored_by_a_model_told_a_class_and_guided(trained: Path, mask: Path) -> None:
    model, label, found = load(trained), torch.tensor([3, 7, 5]), {}
    asked = {
        "none": ([], model),
        "told": (["labels=3,7,5"], model.given(label=label)),
        "guided": (
            ["labels=3,7,5", "guidance=3"],
            guide(model.given(label=label), model.given(label=None), 3.0),
        ),
        "away": (
            ["labels=3,7,5", "guidance=3", "negative_label=8"],
            guide(model.given(label=label), model.given(label=8), 3.0),
        ),
    }
    for name, (settings, by) in asked.items():
        settings = [f"--config.sampling.{setting}" for setting in settings]
        assert modes(trained, "inpaint", f"--mask={mask}", *RESTORE, *settings) == 0
        with np.load(results(trained, "restored", "restored.npz")[-1]) as file:
            found[name] = file["restored"]
            assert name == "none" or file["labels"].tolist() == [3, 7, 5]
        assert nearly(found[name], restored_by(by)), name
    names = list(found)
    assert not any(nearly(found[a], found[b]) for i, a in enumerate(names) for b in names[:i])
    stamp = json.loads((results(trained, "restored", "stamp.json")[-1]).read_text())
    assert (
        stamp["labels"] == [3, 7, 5] and stamp["guidance"][0] == 3 and stamp["config"]["sampling.negative_label"] == 8
    )


@pytest.mark.parametrize("method", ["twisted", "repaint", "ddnm"])
def test_every_method_restores_by_a_model_told_a_class(method: str, trained: Path, mask: Path) -> None:
    found = []
    for settings in (
        [],
        ["--config.sampling.labels=3"],
        ["--config.sampling.labels=3", "--config.sampling.guidance=2"],
    ):
        settings = [*settings, f"--config.inverse.method={method}", "--config.sampling.method=pc"]
        settings += ["--config.inverse.resamplings=2", "--config.inverse.particles=2"]
        assert modes(trained, "inpaint", f"--mask={mask}", *RESTORE, *settings) == 0
        found.append(np.load(results(trained, "restored", "restored.npz")[-1])["restored"])
    assert not nearly(found[0], found[1]) and not nearly(found[1], found[2])


def test_likelihood_is_given_the_labels_or_not(trained: Path) -> None:
    loose = ("--config.eval.rtol=1", "--config.eval.atol=1")
    for choice in ("true", "false"):
        assert modes(trained, "likelihood", *loose, f"--config.eval.conditional={choice}") == 0
    values = [np.load(p)["bits_per_dim"] for p in results(trained, "likelihood", "likelihood.npz")]
    assert np.abs(values[0] - values[1]).max() > 1e-6
    assert modes(trained, "likelihood", *loose, "--config.eval.heat_map=1", "--config.eval.num_images=1") == 0


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("there is no class '10'", ["--config.sampling.labels=3,10"]),
        (
            "negative_label: there is no class '10'",
            ["--config.sampling.negative_label=10", "--config.sampling.guidance=2"],
        ),
        ("negative_label=3 has no effect without guidance", ["--config.sampling.negative_label=3"]),
        ("negative_label=3 has no effect without guidance", ["--config.sampling.negative_label=3", "--scales=1"]),
        ("classifier-free", ["--config.sampling.negative_label=3", "--config.sampling.guidance_checkpoint=runs/x"]),
        ("classifier-free", ["--config.model.class_conditional=false", "--config.sampling.negative_label=3"]),
        ("model.class_conditional", ["--config.model.class_conditional=false", "--config.sampling.labels=3"]),
        ("model.class_conditional", ["--config.model.class_conditional=false", "--config.sampling.guidance=2"]),
        ("trained with model.class_conditional=True", ["--config.model.class_conditional=false"]),
        (
            "guidance=2 has no effect on samples without class",
            ["--config.sampling.guidance=2", "--config.sampling.labels=-1"],
        ),
        ("--scales 0,2 has no effect on", ["--scales=0,2", "--config.sampling.labels=-1"]),
        ("guidance_low", ["--config.sampling.guidance_low=2", "--config.sampling.guidance_high=1"]),
        ("has no classes", ["--mode=train", "--config.data.dataset=ring", "--config.model.name=mlp"]),
        ("has 10 classes: leave it 0", ["--config.model.num_classes=7"]),
        ("networks that take the time", ["--config.model.name=ncsnv2"]),
    ],
)
def test_what_a_model_of_classes_cannot_do_is_said(
    trained: Path, words: str, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert modes(trained, "sample", *settings) == 2
    assert words in capsys.readouterr().err


def test_what_was_trained_without_dropout_knows_no_examples_without_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert modes(tmp_path, "train", "--config.training.condition_dropout=0") == 0
    asked = {"sampling.guidance=2": "sample", "sampling.labels=3,-1": "sample", "eval.conditional=false": "encode"}
    orders = [(mode, f"--config.{setting}", setting.split("=")[0]) for setting, mode in asked.items()]
    orders += [
        ("sample", "--scales=1,2", "guidance"),
        ("deblur", "--config.eval.num_images=1", "without sampling.labels"),
    ]
    for mode, order, words in orders:
        assert modes(tmp_path, mode, order) == 2  # whatever the command's own condition_dropout
        error = capsys.readouterr().err
        assert words in error and "condition_dropout=0: train one with 0.1" in error
    away = ("--config.sampling.negative_label=3", "--config.sampling.guidance=2", "--config.sampling.num_samples=2")
    assert modes(tmp_path, "sample", *away) == 0  # between two labels
    assert modes(tmp_path, "sample", "--config.sampling.num_samples=2") == 0


def test_labels_go_with_latents_and_back(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tight = ("--config.eval.rtol=5e-3", "--config.eval.atol=5e-3")
    assert modes(trained, "encode", *tight) == 0
    file = results(trained, "latents", "latents.npz")[-1]
    test = load_data("digits").test
    with np.load(file) as found:
        kept = dict(found)
    assert test.y is not None and kept["labels"].tolist() == test.y[:4].tolist()
    assert kept["rms_error"].max() < 0.2  # in levels: there and back by the same labels
    assert modes(trained, "decode", "--input", str(file), *tight) == 0
    again = np.load(results(trained, "decoded", "samples.npz")[-1])["arr_0"]
    other = trained / "other.npz"
    np.savez(other, latents=kept["latents"], labels=(kept["labels"] + 1) % 10)
    assert modes(trained, "decode", "--input", str(other), *tight) == 0
    changed = np.load(results(trained, "decoded", "samples.npz")[-1])["arr_0"]
    originals = test[torch.arange(4)][0].permute(0, 2, 3, 1).numpy()
    assert np.abs(again.astype(int) - originals).mean() < 0.05
    assert np.abs(changed.astype(int) - originals).mean() > 0.1
    np.savez(other, latents=kept["latents"])
    assert modes(trained, "decode", "--input", str(other)) == 2
    assert "holds no labels" in capsys.readouterr().err
    assert modes(trained, "decode", "--input", str(other), "--config.eval.conditional=false") == 0
    np.savez(other, latents=kept["latents"], labels=kept["labels"][:2])
    assert modes(trained, "decode", "--input", str(other)) == 2
    assert "for 4 latents" in capsys.readouterr().err


def test_an_interpolation_goes_from_label_to_label(trained: Path) -> None:
    """Its ends are the images, of different classes, and come back only by their own labels."""
    tight = ("--config.eval.rtol=1e-3", "--config.eval.atol=1e-3", "--config.interpolation.steps=3")
    assert modes(trained, "interpolate", *tight, "--config.interpolation.pairs=2") == 0
    stamp = json.loads(results(trained, "interpolations", "stamp.json")[-1].read_text())
    assert stamp["ends_rms_error"] < 0.2 and stamp["given_labels"]
    drawn = ("--config.interpolation.between=seeds", "--config.interpolation.pairs=1", "--config.sampling.labels=3,7")
    assert modes(trained, "interpolate", *tight, *drawn) == 0
    rows = np.load(results(trained, "interpolations", "interpolations.npz")[-1])["arr_0"]
    ends = ("--config.sampling.method=ode", "--config.sampling.rtol=1e-3", "--config.sampling.atol=1e-3")
    ends += ("--config.sampling.noise_removal=false", "--config.sampling.t_min=1e-5", "--config.sampling.num_samples=2")
    assert modes(trained, "sample", *ends, "--config.sampling.labels=3,7") == 0
    images = np.load(results(trained, "samples", "samples.npz")[-1])["arr_0"]
    assert np.abs(rows[0, [0, 2]].astype(int) - images).mean() < 0.1


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An unconditional model, a weaker one, and a classifier of their data."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("model", "weak", "classifier")}
    settings = {"model": [], "weak": ["--config.model.nf=4"], "classifier": ["--config.training.eval_freq=2"]}
    for name, workdir in found.items():
        config = "classifier_digits" if name == "classifier" else "vp_digits"
        tiny = [word for word in TINY if "class_conditional" not in word]
        order = ["--config", f"configs/{config}.py", "--mode", "train", "--workdir", str(workdir)]
        assert run([*order, *tiny, *settings[name]]) == 0
    return found


def unconditional(judged: dict[str, Path], *more: str, mode: str = "sample") -> int:
    return modes(judged["model"], mode, "--config.model.class_conditional=false", *more)


def test_a_classifier_is_trained_by_the_same_loop(judged: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    log = (judged["classifier"] / "log.txt").read_text()
    assert "accuracy/sigma" in log and "of held-out examples" in log and "eval_accuracy" in log
    assert not (judged["classifier"] / "samples").exists()
    model = load_classifier(judged["classifier"])
    assert isinstance(model.network, Encoder) and model.classes == 10 and not model.training
    order = ["--config", "configs/classifier_digits.py", "--workdir", str(judged["classifier"]), *TINY[:7]]
    for mode in ("sample", "likelihood", "demo"):
        assert run([*order, "--mode", mode]) == 2
        assert "is of a classifier, and --mode" in capsys.readouterr().err
    assert run([*order, "--mode", "train", "--config.training.n_iters=5"]) == 0
    assert "going on from step 3" in (judged["classifier"] / "log.txt").read_text()


def test_a_classifier_guides_a_model_that_knows_no_classes(judged: dict[str, Path]) -> None:
    settings = ["--config.sampling.labels=3,7", "--config.sampling.num_samples=4"]
    settings.append(f"--config.sampling.classifier={judged['classifier']}")
    found = {}
    for scale in (0, 2):
        assert unconditional(judged, *settings, f"--config.sampling.guidance={scale}") == 0
        folder = results(judged["model"], "samples", "samples.npz")[-1].parent
        with np.load(folder / "samples.npz") as file:
            found[scale] = file["arr_0"]
            assert file["arr_1"].tolist() == [3, 7, 3, 7]
    stamp = json.loads((folder / "stamp.json").read_text())
    assert stamp["guidance"] == [2.0] and len(stamp["classifier_sha256"]) == 64
    assert unconditional(judged, "--config.sampling.num_samples=4") == 0
    plain = np.load(results(judged["model"], "samples", "samples.npz")[-1])["arr_0"]
    assert np.array_equal(found[0], plain) and not np.array_equal(found[2], plain)


def test_a_classifier_and_a_weaker_model_guide_what_is_restored(judged: dict[str, Path], mask: Path) -> None:
    model, label = load(judged["model"]), torch.tensor([3, 7, 3])
    asked = {
        f"classifier={judged['classifier']}": classifier(
            model, load_classifier(judged["classifier"]), 5.0, label=label
        ),
        f"guidance_checkpoint={judged['weak']}": guide(model, load(judged["weak"]), 5.0),
    }
    plain = restored_by(model)
    for guide_by, guided in asked.items():
        labels = ["--config.sampling.labels=3,7"] if "classifier" in guide_by else []
        settings = [f"--config.sampling.{guide_by}", "--config.sampling.guidance=5", *labels]
        assert unconditional(judged, f"--mask={mask}", *RESTORE, *settings, mode="inpaint") == 0
        found = np.load(results(judged["model"], "restored", "restored.npz")[-1])["restored"]
        assert nearly(found, restored_by(guided)) and not nearly(found, plain)


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("sampling.guidance=2 has no class to guide by: set sampling.labels", ["--config.sampling.guidance=2"]),
        ("there is no class '10'", ["--config.sampling.labels=10"]),
        ("--prompt 'a cat' is for a model of text", ["--prompt=a cat"]),
    ],
)
def test_what_cannot_restore_is_said(
    trained: Path, mask: Path, words: str, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert modes(trained, "inpaint", f"--mask={mask}", *RESTORE, *settings) == 2
    assert words in capsys.readouterr().err


def test_a_classifier_restores_to_classes_alone(
    judged: dict[str, Path], mask: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = (f"--mask={mask}", f"--config.sampling.classifier={judged['classifier']}")
    assert unconditional(judged, *order, mode="inpaint") == 2
    assert "has no class to guide to in --mode inpaint: set sampling.labels" in capsys.readouterr().err


def test_a_weaker_model_guides(judged: dict[str, Path], trained: Path) -> None:
    """As `guide` says; a class-conditional model may have a weaker one with labels or without."""
    settings = ["--config.sampling.num_samples=4", "--config.sampling.guidance=3"]
    assert unconditional(judged, *settings, f"--config.sampling.guidance_checkpoint={judged['weak']}") == 0
    file = results(judged["model"], "samples", "samples.npz")[-1]
    assert len(json.loads((file.parent / "stamp.json").read_text())["reference_sha256"]) == 64
    config = load_config("configs/vp_digits.py")
    config.sampling.steps = 2
    guided = guide(load(judged["model"]), load(judged["weak"]), 3.0)
    x = sample(guided, Heun(), (4, 1, 8, 8), build_times(config, guided.sde), denoise=True)
    images = codec_of(17, True).decode(x).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.load(file)["arr_0"], images)
    rows = (settings[0], "--scales=1,3", f"--config.sampling.guidance_checkpoint={judged['weak']}")
    assert unconditional(judged, *rows) == 0
    both = np.load(results(judged["model"], "samples", "samples.npz")[-1])["arr_0"]
    assert np.array_equal(both[4:], images) and not np.array_equal(both[:4], images)
    reference = [f"--config.sampling.guidance_checkpoint={w}" for w in (trained, judged["weak"])]
    for words in reference:
        assert modes(trained, "sample", *settings, words) == 0
    itself, other = (np.load(p)["arr_0"] for p in results(trained, "samples", "samples.npz")[-2:])
    assert modes(trained, "sample", settings[0]) == 0
    unguided = np.load(results(trained, "samples", "samples.npz")[-1])["arr_0"]
    # by itself, told the same labels, a model is not moved, at most over the edge of a level here and there
    assert np.abs(itself.astype(int) - unguided).mean() < 0.02 < np.abs(other.astype(int) - unguided).mean()


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("there is no class '10'", ["--config.sampling.labels=10", "{classifier}"]),
        ("has no effect without a condition", ["--config.sampling.guidance=2"]),
        ("excludes other guidance", ["{classifier}", "--config.sampling.guidance_rescale=0.5"]),
        ("sampling.classifier=nowhere", ["--config.sampling.classifier=nowhere"]),
        ("guidance_checkpoint=nowhere: there is no", ["--config.sampling.guidance_checkpoint=nowhere"]),
        ("is no classifier", ["--config.sampling.classifier={model}"]),
        ("is a classifier", ["--config.sampling.guidance_checkpoint={judge}", "--config.sampling.guidance=2"]),
        (
            "is conditioned on labels, and the",
            ["--config.sampling.guidance_checkpoint={told}", "--config.sampling.guidance=2"],
        ),
        (
            "was trained with model.class_conditional=False",
            ["--config.model.class_conditional=true", "--config.sampling.labels=3"],
        ),
        ("sampling.labels need a class-conditional model or", ["--config.sampling.labels=3"]),
    ],
)
def test_what_cannot_guide_is_said(
    judged: dict[str, Path], trained: Path, words: str, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = {
        "classifier": f"--config.sampling.classifier={judged['classifier']}",
        "model": judged["model"],
        "judge": judged["classifier"],
        "told": trained,
    }
    assert unconditional(judged, *(s.format(**names) for s in settings)) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("another SDE", ["--config.training.sde=subvpsde"]),
        ("data.centered", ["--config.data.centered=false", "--config.model.rule=noise"]),
    ],
)
def test_a_classifier_of_other_states_is_refused(
    judged: dict[str, Path], tmp_path: Path, words: str, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    order = ["--config", "configs/classifier_digits.py", "--mode", "train", "--workdir", str(tmp_path), *TINY[:7]]
    assert run([*order, *settings]) == 0
    assert unconditional(judged, f"--config.sampling.classifier={tmp_path}") == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("model.class_conditional=False", {"model.class_conditional": "true"}),
        ("model.conditional=True", {"model.conditional": "false"}),
        ("ncsnpp", {"model.name": "ddpm"}),
        ("learns no noise schedule", {"training.sde": "learned"}),
    ],
)
def test_a_classifier_that_cannot_be_is_refused(words: str, settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=words):
        load_config("configs/classifier_digits.py", settings)


def test_a_checkpoint_knows_its_classes(trained: Path) -> None:
    model = load(trained)
    assert isinstance(model, Preconditioned)
    x = torch.randn(2, 1, 8, 8)
    assert not torch.equal(model(x, T, label=3).data, model(x, T, label=4).data)
