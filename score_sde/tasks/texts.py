"""Embeddings of captions and prompts: each text is encoded once, and kept in a file of the workdir."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict
from torch import Tensor

from ..data.captions import HuggingFaceEncoder, Text, embed
from ..data.sets import Data
from ..machine.parallel import Processes
from . import failures
from .conditions import Wanted
from .job import Job


def embedded_captions(config: ConfigDict, data: Data, workdir: Path, processes: Processes) -> Text | None:
    """The embedded captions; None for a model without captions. Raises ValueError for data without captions."""
    if not config.model.text_encoder:
        return None
    if not data.captions:
        raise ValueError(f"model.text_encoder needs captions, and data.dataset={config.data.dataset} has none: put a "
                         "NAME.txt beside each image, or a metadata.jsonl; of CIFAR-10 take the python version")
    return _embedded(config, data.captions, workdir, processes)


def with_prompts(wanted: Wanted, options: argparse.Namespace, job: Job) -> Wanted:
    """`wanted` with the embedded prompts, if there are any, and after them the negative prompt."""
    if not options.prompt:
        return wanted
    unwanted = [options.negative] if options.negative else []
    text = _embedded(job.config, [*options.prompt, *unwanted], job.workdir, job.processes)
    return wanted._replace(prompts=tuple(options.prompt), text=text)


def _embedded(config: ConfigDict, texts: Sequence[str], workdir: Path, processes: Processes) -> Text:
    """The main process reads the embeddings from the workdir's file, or encodes the texts, for all processes."""
    m = config.model
    cache = workdir / "text" / f"{m.text_sha256[:16]}-{m.text_length}.safetensors"

    def work() -> dict[str, Tensor]:
        failures.writable(cache.parent)
        encoder = HuggingFaceEncoder(m.text_encoder, length=m.text_length, device=processes.device)
        return embed(encoder, texts, cache)._asdict()

    return Text(**processes.copies(work))
