"""Benchmarks, each a script. `pip install -e .`, or PYTHONPATH=., lets them find the packages of this repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
