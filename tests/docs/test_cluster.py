"""The job script of docs/cluster.md, with stand-ins for the commands of the cluster."""

import os
import re
import signal
import subprocess

import pytest
from conftest import ROOT

SCRIPT = re.findall(r"```bash\n(#!/bin/bash.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)[0]

# A run that saves when it is told to stop, or finishes, and notes how it was started.
TORCHRUN = """#!/bin/bash
echo "$@" >> started
mkdir -p logs/wresnet28x10_cifar10_0 && touch logs/wresnet28x10_cifar10_0/config.yaml
trap 'sleep 0.2; echo saved > saved; exit 1' TERM
echo ready > ready
[ -e finish ] && exit 0
[ -e fail ] && exit 1
while true; do sleep 0.05; done
"""


@pytest.fixture
def job(tmp_path):
    """Start the script in a folder with the stand-ins; requeued jobs are noted in `requeued`."""
    commands = {"srun": 'exec "$@"', "torchrun": TORCHRUN, "scontrol": 'echo "$@" >> requeued'}
    for name, text in commands.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text if text.startswith("#!") else f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    (tmp_path / "run.sbatch").write_text(SCRIPT)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    return lambda: subprocess.Popen(["bash", "run.sbatch"], cwd=tmp_path, env=environment)


def test_a_job_that_is_told_to_stop_is_saved_and_requeued(job, tmp_path):
    process = job()
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    assert (tmp_path / "saved").exists(), "the script waits until the run has saved"
    assert (tmp_path / "requeued").read_text().split() == ["requeue", "7"]
    (tmp_path / "finish").touch()
    assert job().wait(30) == 0
    first, second = (tmp_path / "started").read_text().splitlines()
    assert "--resume" not in first
    assert second == f"{first} --resume"
    assert (tmp_path / "requeued").read_text().count("requeue") == 1, "a run that has finished is not queued again"


def test_a_job_that_fails_is_not_requeued(job, tmp_path):
    (tmp_path / "fail").touch()
    assert job().wait(30) == 1
    assert not (tmp_path / "requeued").exists()
