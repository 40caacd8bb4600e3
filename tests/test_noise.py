"""Streams of random numbers: those of one key are the same for ever, those of two keys are not."""

import numpy as np
import torch

from score_sde.noise import ExampleStream, StepStream, example_generators, example_numbers, generator, noise_source


def test_an_example_s_numbers_are_those_of_versions_before_streams_had_names() -> None:
    state = np.random.SeedSequence([3, 5]).generate_state(1, np.uint64)[0]
    before = torch.Generator().manual_seed(int(state >> 1))
    (now,) = example_generators(3, 5, 1)
    torch.testing.assert_close(torch.randn(9, generator=now), torch.randn(9, generator=before), rtol=0, atol=0)
    (numbers,) = example_numbers(3, 5, 1)
    np.testing.assert_array_equal(numbers.random(9), np.random.default_rng([3, 5]).random(9))
    (numbers,) = example_numbers(3, 5, 1, ExampleStream.TERMS)
    np.testing.assert_array_equal(numbers.random(9), np.random.default_rng([3, 5, 1]).random(9))


def test_no_two_streams_share_their_numbers() -> None:
    def first(stream: int) -> float:
        return torch.rand((), generator=generator(7, 2, stream), dtype=torch.float64).item()

    of_steps = [s for s in StepStream if s != StepStream.HELD_OUT]
    held_out = ("TIMES", "NOISE", "AUGMENTATION", "AUGMENTATION_NOISE", "CODES")
    of_steps += [StepStream[name] + StepStream.HELD_OUT for name in held_out]
    for streams in (list(ExampleStream), of_steps):
        assert len({first(stream) for stream in streams}) == len(streams)


def test_a_source_s_stream_is_its_own() -> None:
    def draw(stream: ExampleStream, seed: int = 0) -> torch.Tensor:
        source = noise_source((2, 3), seed, 4, torch.float64, torch.device("cpu"), stream)
        return source(torch.empty(0))

    assert torch.equal(draw(ExampleStream.START), draw(ExampleStream.START))
    assert not (draw(ExampleStream.START) == draw(ExampleStream.STATE)).any()
    assert not (draw(ExampleStream.START) == draw(ExampleStream.START, seed=1)).any()
