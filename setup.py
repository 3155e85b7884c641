"""Packaging: makes the completions, which setup.cfg installs; all else there is to say is there."""

import pathlib
import subprocess
import sys

from setuptools import setup

HERE = pathlib.Path(__file__).resolve().parent
COMPLETIONS = HERE / "build" / "completions"

COMPLETIONS.mkdir(parents=True, exist_ok=True)
for shell, name in (("bash", "kapowctl"), ("zsh", "_kapowctl")):
    script = subprocess.run([sys.executable, HERE / "kapowctl.py", "completion", shell],
                            stdout=subprocess.PIPE, check=True).stdout
    (COMPLETIONS / name).write_bytes(script)

setup()
