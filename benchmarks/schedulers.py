"""diffusers' schedulers beside us: each as a sampler, on our models and our grids.

A scheduler builds its grid from a table of betas; here the grid is given to it instead, as the noise levels sigma/alpha
that `set_timesteps` would have found, so that two solvers on one grid differ in nothing else. They know one schedule,
the variance-preserving one: at a level r its alpha is 1/sqrt(1 + r²). The flow of x/alpha depends on r alone, so every
SDE of ours is walked by rescaling the state. All is computed in the state's dtype.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import torch
from diffusers.utils import logging
from torch import Tensor

from score_sde import Sampler, ScoreModel
from score_sde.noise import Noise
from score_sde.sdes import like

logging.set_verbosity_error()  # they tell of settings that they change

Form = Literal["preserving", "exploding", "table"]


@dataclass(frozen=True)
class Scheduled(Sampler):
    """A scheduler of diffusers, walking the grid from its first time to its last; it yields once, at the end.

    `form` says what the scheduler holds: x with alpha = 1/sqrt(1 + r²) and `sigmas` ("preserving"), x/alpha and
    `sigmas` ("exploding"), or x and the table `alphas_cumprod` at integer times ("table").
    """

    scheduler: str
    form: Form = "preserving"
    settings: tuple[tuple[str, Any], ...] = ()
    doubled: bool = False  # every level but the ends is held twice, for methods of two evaluations per step

    def walk(self, model: ScoreModel, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
        sde, n = model.sde, len(times) - 1
        levels = sde.sigma(times) / sde.alpha(times)
        scheduler = self._on(levels)
        random = {"generator": torch.Generator().manual_seed(seed_of(x))} if _draws(scheduler) else {}
        y = x * like(self._scale(levels[0]) / sde.alpha(times[0]), x)
        for i, step in enumerate(scheduler.timesteps):
            level: Tensor = levels[n - 1 - int(step)] if self.form == "table" else scheduler.sigmas[i]
            t = sde.time(-2 * torch.log(level))
            noisy = model(y * like(sde.alpha(t) / self._scale(level), y), t).noise
            y = scheduler.step(noisy, step, y, **random).prev_sample
        yield y * like(sde.alpha(times[-1]) / self._scale(levels[-1]), y)

    def made(self, **settings: Any) -> Any:
        """The scheduler as its class makes it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that it means to drop
            return getattr(diffusers, self.scheduler)(**dict(self.settings), **settings)

    def _scale(self, level: Tensor) -> Tensor:
        """The scheduler's alpha at a level."""
        return torch.ones_like(level) if self.form == "exploding" else torch.rsqrt(1 + level**2)

    def _on(self, levels: Tensor) -> Any:
        """The scheduler on these levels, in place of its own choice."""
        n = len(levels) - 1
        if self.form == "table":
            scheduler, table = self.made(num_train_timesteps=n), 1 / (1 + levels.flip(0) ** 2)
            scheduler.alphas_cumprod, scheduler.final_alpha_cumprod, scheduler.one = table[1:], table[0], table[0]
            scheduler.set_timesteps(n)
            return scheduler
        scheduler = self.made()
        scheduler.set_timesteps(n)
        if self.doubled:
            levels = levels.repeat_interleave(2)[1:]
        scheduler.timesteps = torch.arange(2 * n if self.doubled else n, 0, -1, dtype=torch.float64)
        scheduler.sigmas = levels
        scheduler.is_scale_input_called = True  # the model here takes x as it is
        scheduler.set_begin_index(0)
        return scheduler


def seed_of(x: Tensor) -> int:
    """A seed for schedulers that draw their own noise; another start gives another seed."""
    return int(x.double().square().sum() * 1e6) % 2**31


def _draws(scheduler: Any) -> bool:
    """Whether the scheduler's step takes a generator."""
    return "generator" in inspect.signature(scheduler.step).parameters


_END = (("final_sigmas_type", "sigma_min"),)  # at the grid's last level, as ours do


def _multistep(*settings: tuple[str, Any]) -> Scheduled:
    return Scheduled("DPMSolverMultistepScheduler", settings=(*_END, *settings))


def _singlestep(order: int) -> Scheduled:
    settings = (*_END, ("solver_order", order), ("lower_order_final", True))
    return Scheduled("DPMSolverSinglestepScheduler", settings=settings)


def _unipc(order: int, *settings: tuple[str, Any]) -> Scheduled:
    return Scheduled("UniPCMultistepScheduler", settings=(*_END, ("solver_order", order), *settings))


def _deis(order: int) -> Scheduled:
    return Scheduled("DEISMultistepScheduler", settings=(("solver_order", order),))


def _still(t: object) -> float:
    """SA-Solver's tau, the noise that it adds."""
    return 0.0


def _noisy(t: object) -> float:
    return 1.0


DETERMINISTIC: dict[str, Scheduled] = {
    "DDIM": Scheduled("DDIMScheduler", "table", (("clip_sample", False),)),
    "PNDM (PLMS)": Scheduled("PNDMScheduler", "table", (("skip_prk_steps", True),)),
    "LMS": Scheduled("LMSDiscreteScheduler", "exploding"),
    "Heun": Scheduled("HeunDiscreteScheduler", "exploding", doubled=True),
    "DEIS 2": _deis(2),
    "DEIS 3": _deis(3),
    "DPM-Solver++ 2S": _singlestep(2),
    "DPM-Solver++ 3S": _singlestep(3),
    "DPM-Solver++ 2M": _multistep(),
    "DPM-Solver++ 2M, heun": _multistep(("solver_type", "heun")),
    "DPM-Solver++ 3M": _multistep(("solver_order", 3)),
    "UniPC 2": _unipc(2),
    "UniPC 3": _unipc(3),
    "UniPC 2, noise": _unipc(2, ("predict_x0", False)),
    "UniPC 3, noise": _unipc(3, ("predict_x0", False)),
    "SA-Solver, no noise": Scheduled("SASolverScheduler", settings=(("tau_func", _still),)),
}
STOCHASTIC: dict[str, Scheduled] = {
    "DDPM": Scheduled("DDPMScheduler", "table", (("clip_sample", False),)),
    "Euler ancestral": Scheduled("EulerAncestralDiscreteScheduler", "exploding"),
    "SDE-DPM-Solver++ 2M": _multistep(("algorithm_type", "sde-dpmsolver++")),
    "SA-Solver": Scheduled("SASolverScheduler", settings=(("tau_func", _noisy),)),
}
