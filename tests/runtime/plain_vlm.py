"""VLMs without a model, importable by a worker process: the mean of the pictures as one token."""

import os
import time

import torch


def tokens_of(pictures, instruction):
    """(1, 2) tokens: mean of all pictures, length of the instruction."""
    mean = sum(float(picture.mean()) for picture in pictures.values()) / max(len(pictures), 1)
    return torch.tensor([[mean, float(len(instruction))]]), torch.ones(1, dtype=torch.bool)


def make_quick():
    """A VLM that answers at once."""
    return tokens_of


def make_slow():
    """A VLM that works for 100 ms of processor time."""

    def compute(pictures, instruction):
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
        return tokens_of(pictures, instruction)

    return compute


def make_mortal():
    """A VLM whose process ends at its third tick."""
    calls = []

    def compute(pictures, instruction):
        calls.append(1)
        if len(calls) == 3:
            os._exit(7)
        return tokens_of(pictures, instruction)

    return compute


def make_broken():
    """A VLM that cannot be made."""
    raise ValueError("no such weights")
