"""The mode demo: train, sample and likelihood in one go, and a plain report in which a classifier judges the digits."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ..data.codecs import Codec
from ..data.sets import Data
from ..machine.parallel import Processes
from .conditions import load_guides
from .inputs import read_for_training
from .job import open_job
from .likelihood import run_likelihood
from .sample import run_sampling
from .scan import scan
from .train import reserve, run_training


def command(options: argparse.Namespace, config: ConfigDict, workdir: Path, processes: Processes) -> int:
    """--mode demo: train, sample and likelihood one after the other, and a report of the results."""
    begin = time.perf_counter()
    with ExitStack() as stack:
        reserve(stack, options, config, workdir, processes)
        data, codec = read_for_training(config, processes)
        code = run_training(config, workdir, data, codec, processes)
        if code:
            return code
        plain = argparse.Namespace(mode="sample", checkpoint=None, input=None, scales="")
        job, _ = open_job(plain, config, None, workdir, processes)
        folder, _ = run_sampling(job, load_guides(config, job.model, job.shape, processes.device))
        _, result = run_likelihood(job, data.test)
    if processes.main:
        seconds, samples = time.perf_counter() - begin, np.load(folder / "samples.npz")
        print(summary(data, codec, workdir, samples["arr_0"], folder, result, seconds))
    return 0


def confidence(data: Data, samples: np.ndarray, threshold: float = 0.9) -> tuple[float, float, int]:
    """Shares of samples and of held-out images that a classifier is sure of, and the number of the samples' classes.

    Sure means a probability above `threshold`. The classifier, fitted to the real training images, is a support vector
    machine for each pair of classes with coupled probabilities: far from all digits it is unsure, unlike calibrated
    one-against-rest machines. `samples` are (N, H, W, C) levels.
    """
    assert data.train.y is not None and data.levels is not None
    scale = data.levels - 1
    train, test = (split.x[:].flatten(1).numpy() / scale for split in (data.train, data.test))  # type: ignore[index]
    images = samples.transpose(0, 3, 1, 2).reshape(len(samples), -1) / scale
    from sklearn.svm import SVC  # slow to import, and needed here alone

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # scikit-learn 1.9 means to drop pairwise coupling in 1.11
        judge = SVC(gamma=0.256, probability=True, random_state=0).fit(train, data.train.y.numpy())
    sure, real = (judge.predict_proba(x).max(1) > threshold for x in (images, test))
    return float(sure.mean()), float(real.mean()), len(set(judge.predict(images).tolist()))


def summary(
    data: Data, codec: Codec, workdir: Path, samples: np.ndarray, where: Path, result: dict[str, Any], seconds: float
) -> str:
    """The report: the results, how good they are, where they lie and what to try next."""
    sure, real, classes = confidence(data, samples)
    report = scan(data, codec)
    assert report.gaussian is not None and data.levels is not None
    programs = Path(sys.executable).parent
    if programs.is_relative_to(Path.cwd()):
        programs = programs.relative_to(Path.cwd())
    return f"""
What was made, in {seconds / 60:.1f} minutes
  A score model was trained on {len(data.train)} images of handwritten digits, and it then drew {len(samples)} new ones:
    {where / "grid.png"}
  A classifier fitted to real digits is more than 90 % sure of {100 * sure:.1f} % of them, and of
  {100 * real:.1f} % of real held-out digits; {classes} of the 10 digits occur.
  Bits per pixel of the {result["images"]} held-out digits, fewer being better:
    {result["mean"]:.3f} ± {result["standard_error"]:.3f}   this model
    {report.gaussian[0]:.3f} ± {report.gaussian[1]:.3f}   the Gaussian fitted to the same training images
    {np.log2(data.levels):.3f}           every pixel's {data.levels} levels equally likely

Look at it
  {programs / "tensorboard"} --logdir {workdir / "tensorboard"}     losses by noise level, samples during training

Try next
  {programs / "score_sde"} sample --workdir {workdir} --config.sampling.seed=1
  {programs / "score_sde"} train ve_toy
  {programs / "score_sde"} train vp_cifar_small      an hour on CIFAR-10, without a GPU
"""
