"""What every test finds: the repository as the working folder, and trained runs that several files ask for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import ROOT

if TYPE_CHECKING:
    from benchmarks.judges import Judge  # scikit-learn is slow to import


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No test is named by where an object lies in memory, which differs between the processes that share the tests."""
    named = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if named:
        raise pytest.UsageError(f"give this test's parameters ids: {named[0]}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test starts from one state of torch's own generator, from which networks draw their first weights.

    So a number it is held to does not depend on which tests ran before it in its process.
    """
    import torch  # slow to import

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def in_the_repository() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_pictures() -> Iterator[None]:
    """What training draws to be looked at takes two steps of a sampler in place of eighteen."""
    from score_sde.tasks import show  # torch is slow to import

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(show, "_STEPS", 2)
        yield


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Workdirs of a model of digits of 4 x 4, and of one of 8 x 8 that is conditioned on these, both of classes."""
    from score_sde.cli import run
    from tests.runs import line

    base, large = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("large")
    few = {"training__n_iters": 2, "training__batch_size": 8, "model__class_conditional": True}
    few |= {"sampling__method": "heun", "sampling__steps": 3}
    assert run(line("vp_digits", "train", base, data__image_size=4, **few)) == 0
    few |= {"model__super_resolution": 2, "training__augmentation": 0.5}
    few |= {"optim__warmup": 0, "optim__lr": 0.05, "model__init_scale": 1}  # conditions matter after two steps
    assert run(line("vp_digits", "train", large, **few)) == 0
    return base, large


@pytest.fixture(scope="session")
def digits_judge() -> Judge:
    """The classifier of real digits by which studies measure samples."""
    from benchmarks.judges import judge

    return judge("digits")
