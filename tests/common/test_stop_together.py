"""A signal to one of several processes stops all of them after the same step. Run as a script it is one of the processes."""

import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from common.gpu import device, processes
from common.runs import cli
from common.runs.run import Run
from tests.common.test_moved_run import CELL

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_all_processes_stop_after_the_same_step(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        __file__,
        str(tmp_path),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert [(tmp_path / f"steps{rank}").read_text() for rank in (0, 1)] == ["3", "3"], done.stderr
    assert done.stderr.count("SIGTERM: stopped; the same command resumes after epoch 0\n") == 1


@cli.script
def train(folder: Path) -> None:
    args = Namespace(
        out=str(folder / "run"), resume="auto", num_epochs=3, seed=1, fidelity="paper", preset=None
    )
    run = Run(args, device.pick("cpu", several=True), paper="sfa", method="SFA", name="name", cell=CELL)
    run.resume({"weights": {"w": torch.zeros(1)}})
    batches = [((torch.zeros(2),), torch.arange(2))] * 8
    for _ in run.epochs(1):
        for step, _ in enumerate(run.progress(batches, "training"), start=1):
            (folder / f"steps{processes.rank()}").write_text(str(step))
            if step == 3 and processes.rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            processes.wait()


if __name__ == "__main__":
    cli.exit_cleanly(train, Path(sys.argv[1]))
