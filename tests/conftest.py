"""Shared by all tests: examples drawn by hypothesis are the same every time, and none of them races a clock."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("project", deadline=None, derandomize=True, database=None)
settings.load_profile("project")

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script(tmp_path):
    """Run a script of the project as a user would: script("main.py", "--M", 2) -> the finished process."""

    def run(name, *arguments, cwd=ROOT):
        command = [sys.executable, str(ROOT / name), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)

    return run
