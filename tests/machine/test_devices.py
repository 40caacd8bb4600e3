"""The package on a pretend GPU: nothing that CUDA refuses, and no wait for the device from step to step."""

import json
import subprocess
import sys

import pytest

from tests import ROOT
from tests.machine.on_pretend_gpu import CASES


@pytest.fixture(scope="module")
def walked() -> dict[str, dict[str, object]]:
    """All cases, in one process of its own, as the pretend GPU changes torch."""
    command = [sys.executable, "-m", "tests.machine.on_pretend_gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_on_a_device_nothing_is_refused_and_steps_do_not_wait(walked: dict[str, dict[str, object]], name: str) -> None:
    assert walked[name]["refused"] is None, walked[name]["refused"]
    assert walked[name]["waits"] == []


def test_the_pretend_gpu_refuses_what_cuda_does(walked: dict[str, dict[str, object]]) -> None:
    assert walked["pretend"] == {"refused": None, "waits": []}
