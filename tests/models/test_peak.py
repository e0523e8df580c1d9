"""The peak of a device: told, measured, or not known."""

from __future__ import annotations

import time

import torch

from curate.models.peak import device_peak, measured

CPU = torch.device("cpu")


def test_a_cpu_has_the_peak_that_it_is_told():
    assert device_peak(CPU, torch.float32) is None
    assert device_peak(CPU, torch.float32, 0.05) == 5e10


def test_no_product_of_that_size_is_faster_than_what_was_measured():
    found = measured(CPU, torch.float32, 256)
    a = torch.randn(256, 256)
    began = time.perf_counter()
    for _ in range(20):
        a @ a
    mean = 20 * 2 * 256**3 / (time.perf_counter() - began)
    assert found > 0.3 * mean  # the best of some against a mean, on a machine with other work
    assert measured(CPU, torch.float32, 256) is found  # measured once
