"""The tests; a package, because torch-fidelity installs one of this name."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
