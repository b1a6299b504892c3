"""Two workers share the tests (make test): one has those of whole meshes, whose timing suffers in company; one the others."""

from pathlib import Path

import pytest

MESHES = ("mesh", "chaos", "prefix_cache")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        place = item.path.relative_to(Path(__file__).parent).parts[0]
        item.add_marker(pytest.mark.xdist_group("meshes" if place in MESHES else "others"))
