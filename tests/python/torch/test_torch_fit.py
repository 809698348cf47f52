# SPDX-License-Identifier: Apache-2.0
"""`fit` by two processes of torch.distributed."""

import subprocess
import sys

import numpy as np
import pytest

import hisac

torch = pytest.importorskip("torch")

SCRIPT = """
import sys
import numpy as np
import torch
import hisac
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
x = np.load(f"{folder}/x.npy", mmap_mode="r")
mine = x[:700] if rank == 0 else x[700:]
book = hisac.fit(mine, (40, 8), iterations=6, process_group=torch.distributed.group.WORLD)
book.save(f"{folder}/{rank}.safetensors")
torch.distributed.destroy_process_group()
"""


def test_two_processes_fit_as_one(tmp_path):
    x = np.exp(np.random.default_rng(0).normal(size=(2000, 6))).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-c", SCRIPT]
    running = [subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE) for rank in range(2)]
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()
    expected = hisac.fit(x, (40, 8), iterations=6)
    for rank in range(2):
        book = hisac.Codebook.load(tmp_path / f"{rank}.safetensors")
        assert book == expected and book.report == expected.report
