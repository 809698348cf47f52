# SPDX-License-Identifier: Apache-2.0
"""What sparse routing loses on the histories of the bundled sample, at a temperature that models learn."""

import numpy as np
import pytest

import hisac
from hisac.app import demo, protocol

TEMPERATURE = 0.013


@pytest.fixture(scope="module")
def world():
    return demo.fit_world(protocol.load(), demo.FULL, 0)


def test_few_agents_a_behaviour_lose_a_hundredth(world):
    """With v = x: sum of mass_a |t_a - exact t_a| over sum of mass_a |exact t_a|, by 32 of 200 agents. Over all 150
    households the mean is 0.0081 and the worst 0.0199."""
    x, offsets, lost = world.x, world.events.offsets, []
    for b in range(0, 150, 6):
        rows = slice(int(offsets[b]), int(offsets[b + 1]))
        h = hisac.Histories(x[rows], x[rows], np.array([0, rows.stop - rows.start]), world.codes[rows])
        exact = hisac.compress(world.book, h, budget=200, temperature=TEMPERATURE)
        found = hisac.compress(world.book, h, agents=exact.agents, temperature=TEMPERATURE, sparse=32)
        assert np.array_equal(np.isneginf(found.lse), np.isneginf(exact.lse))  # no agent is in no list
        assert np.isclose(np.exp(found.lse).sum(), len(h.x), rtol=1e-4)
        mass, moved, size = np.exp(exact.lse[0]), found.tokens[0] - exact.tokens[0], exact.tokens[0]
        lost.append((mass @ np.linalg.norm(moved, axis=1)) / (mass @ np.linalg.norm(size, axis=1)))
    assert 0 < min(lost) and np.mean(lost) <= 0.01 and max(lost) <= 0.03
