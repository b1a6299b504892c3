"""Two workers share the tests (make test): one has those of whole meshes, whose timing suffers in company; one the others."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # two workers on two cores: torch's threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

MESHES = ("mesh", "chaos")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        place = item.path.relative_to(Path(__file__).parent).parts[0]
        item.add_marker(pytest.mark.xdist_group("meshes" if place in MESHES else "others"))
