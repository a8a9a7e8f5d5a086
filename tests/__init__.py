"""The tests. A package, as torch-fidelity installs one of the same name."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
