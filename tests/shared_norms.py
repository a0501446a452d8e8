"""The norms that the tests of the mathematics run over. Apart from conftest, which must not import nblora."""

from __future__ import annotations

import torch

from nblora.bounds import Gauge, KyFan, Norm, Schatten, Spectral


def capped(spectrum: torch.Tensor) -> torch.Tensor:
    """A gauge of its own: the larger of the spectral norm and half the nuclear norm."""
    return torch.maximum(spectrum.amax(-1), spectrum.sum(-1) / 2)


NORMS: dict[str, Norm] = {
    "spectral": Spectral(),
    "nuclear": Schatten(1.0),
    "schatten-1.5": Schatten(1.5),
    "frobenius": Schatten(2.0),
    "schatten-3.7": Schatten(3.7),
    "schatten-50": Schatten(50.0),
    "ky-fan-1": KyFan(1),
    "ky-fan-3": KyFan(3),
    "ky-fan-100": KyFan(100),
    "capped": Gauge(capped, label="capped"),
}
