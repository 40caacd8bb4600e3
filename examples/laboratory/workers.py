"""Experiments side by side: processes of one thread each, under one bar that shows the time left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import torch

from score_sde.machine.progress import Progress

from .experiment import Job, run

STEPS_OF_DIGITS = 8  # what a step of the digits' U-Net weighs on the bar, in steps of the plane's network

_done: Synchronized | None = None  # in a worker: what all workers have done, in steps of the plane's network


def weight(job: Job) -> int:
    return job.steps * (STEPS_OF_DIGITS if job.data == "digits" else 1)


def run_all(jobs: Sequence[Job], base: Path, workers: int, total: int) -> float:
    """Run the jobs in processes of one thread each, under one bar; return the CPU seconds that they took."""
    context = get_context("spawn")
    done = context.Value("q", 0)
    spent = 0.0
    with (
        Progress("laboratory", total) as bar,
        ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(done,)) as pool,
    ):
        bar.start(total - sum(map(weight, jobs)))
        running = {pool.submit(_work, job, base): job for job in jobs}
        try:
            while running:
                finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.update(total - sum(map(weight, jobs)) + done.value - bar.n)
                for future in finished:
                    spent += future.result()
                    bar.note("{0.data}, {0.objective}".format(running.pop(future)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return spent


def _begin(done: Synchronized) -> None:
    global _done
    _done = done
    torch.set_num_threads(1)


def _work(job: Job, base: Path) -> float:
    """One job in a worker; its CPU seconds."""
    share = weight(job) // job.steps

    def step() -> None:
        assert _done is not None
        with _done.get_lock():
            _done.value += share

    begin = time.process_time()
    run(job, base, step)
    return time.process_time() - begin
