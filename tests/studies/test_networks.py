"""The study of networks: equal operations, and every network is one that a config can describe."""

from pathlib import Path

import pytest
from torch import nn

from score_sde import config as configs
from score_sde.config.build import build_network
from studies import networks
from studies.networks import STUDIES, Found, measure, page, size_of


@pytest.mark.parametrize("data", STUDIES)
def test_every_network_can_be_built_and_differs_from_the_others(data: str) -> None:
    study, shape = STUDIES[data], (1, 8, 8) if data == "digits" else (3, 32, 32)
    made: dict[str, nn.Module] = {}
    for name, changes in study.networks.items():
        config = configs.load(f"configs/{study.config}.py", {**study.shared, **changes})
        made[name] = build_network(config, shape)
        assert size_of(config, shape)[0] == sum(p.numel() for p in made[name].parameters())
    assert len(
        {str(network) + str(sorted(changes)) for network, changes in zip(made.values(), study.networks.values())}
    ) == len(made)


def test_operations_are_those_of_a_training_step() -> None:
    """A block of width w on n tokens: 3 times the forward pass, 2 n w² (3 + 1 + 8) for layers; not what attends."""
    costs = []
    for depth in (1, 2):
        changes = {"model.name": "dit", "model.hidden": "8", "model.depth": f"{depth}", "model.num_heads": "2"}
        costs.append(size_of(configs.load("configs/vp_digits.py", changes), (1, 8, 8))[1])
    assert costs[1] - costs[0] == 3 * (2 * 16 * 8**2 * (3 + 1 + 8) + 2 * 8 * 48)


def test_all_networks_get_the_operations_of_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(networks, "bits", lambda study, changes, folder, data: asked.append(changes) or 2.0)
    found = measure(STUDIES["digits"], tmp_path, (0, 1), 1000, None, ("ncsnpp", "dit"))
    assert list(found) == ["ncsnpp", "dit"] and found["ncsnpp"].cost == 1 and found["ncsnpp"].steps == 1000
    assert found["dit"].steps * found["dit"].cost == pytest.approx(1000, rel=1e-3)
    assert [changes["training.n_iters"] for changes in asked] == ["1000"] * 2 + [str(found["dit"].steps)] * 2
    assert [changes["seed"] for changes in asked] == ["0", "1"] * 2


def test_differences_are_paired_by_seed() -> None:
    found = {"a": Found(1000, 1.0, 10, [2.0, 3.0]), "b": Found(2000, 0.5, 20, [1.5, 2.7])}
    assert "| b | 2 | 0.50 | 20 | 2.100 ± 0.849 | -0.400 ± 0.141 |" in page(found, STUDIES["digits"], 10)
