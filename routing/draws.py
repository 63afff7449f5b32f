"""Random numbers that depend only on one seed per sample.

A sample gets the same numbers alone, in a batch and on every device, and there is no state to save. The generator is
SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators"), counted from the seed.

Shape legend: B samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STEP, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685  # as signed numbers
_BITS = 24  # significant bits of a float32


def uniform(draw_B: Tensor, *shape: int) -> Tensor:
    """Draw numbers [B,*shape] uniformly from [0,1), float32, from the seeds int64 [B]."""
    counter = torch.arange(1, math.prod(shape) + 1, device=draw_B.device)
    mixed = _mix(_mix(draw_B)[:, None] + counter * _STEP)
    return (((mixed >> (64 - _BITS)) & (2**_BITS - 1)).float() / 2**_BITS).unflatten(1, shape)


def normal(draw_B: Tensor, *shape: int) -> Tensor:
    """Draw numbers [B,*shape] from the standard normal distribution, float32, from the seeds int64 [B]."""
    inside = (uniform(draw_B, *shape) + 2.0 ** -(_BITS + 1)).clamp(max=1 - 2.0**-_BITS)
    return torch.erfinv(2 * inside - 1) * math.sqrt(2)


def seeds_of(x_BS: Tensor, seed: int) -> Tensor:
    """Return one seed per sample, int64 [B], from its content: equal observations get equal seeds.

    Args:
        x_BS: the samples' numbers.
        seed: added to all seeds.
    """
    bits_BS = _bits(x_BS.float())
    order_S = torch.arange(1, bits_BS.shape[1] + 1, device=x_BS.device)
    return _mix(bits_BS + order_S * _STEP).sum(1) + seed


def children(draw_B: Tensor, count: int) -> Tensor:
    """Derive `count` seeds [B,count] from each seed, for example one per view."""
    return _mix(draw_B[:, None] + torch.arange(1, count + 1, device=draw_B.device) * _FIRST)


def child(draw_B: Tensor, number: int) -> Tensor:
    """Derive one seed [B] from each seed; numbers from 1 on are those of `children`, and negative ones are others."""
    return _mix(draw_B + torch.full_like(draw_B, number) * _FIRST)


def _bits(x: Tensor) -> Tensor:
    """Return the bits of float32 numbers as int64, as `x.view(torch.int32)` does, which torch.jit cannot record.

    Numbers below 2**-126 count as zero.
    """
    fraction, exponent = torch.frexp(x.abs())
    bits = ((exponent.long() + 126) << 23) + (fraction * 2.0**24).long() - 2**23
    bits = torch.where(x.abs() < 2.0**-126, torch.zeros_like(bits), bits)
    return bits - (torch.signbit(x).long() << 31)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift to the right and fill with zeros."""
    return (z >> bits) & (2 ** (64 - bits) - 1)
