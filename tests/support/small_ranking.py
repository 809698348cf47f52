# SPDX-License-Identifier: Apache-2.0
"""Small inputs of hisac.torch: three users, one without a history, and nine candidates. Imports torch."""

import numpy as np
import torch

import hisac

OFFSETS = torch.tensor([0, 7, 7, 20])  # the user in the middle has no history
CANDIDATES = torch.tensor([0, 4, 5, 9])


def make_book(seed=0, sizes=(6, 5), width=8):
    rng = np.random.default_rng(seed)
    return hisac.Codebook([rng.normal(size=(c, width)).astype("f4") / 2**n for n, c in enumerate(sizes)])


def rows(seed=0, n=20, width=8, value=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=g), torch.randn(n, value, generator=g)


def wanted(t):
    return t.clone().requires_grad_()
