"""The import law: who may import whom, and what stays importable in a bare interpreter."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for folder in ("services", "shared", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]
DEVICE = {
    "attention",
    "batch",
    "build",
    "calibrate",
    "checkpoint",
    "choose",
    "ferry",
    "form",
    "forward",
    "layers",
    "linear",
    "matrix",
    "model",
    "norm",
    "sample",
    "weights",
}
PURE = [
    "shared.blocks",
    "services.engine.pages",
    "services.engine.parts",
    "services.engine.apart",
    "services.engine.sequence",
    "services.engine.plan",
    "services.engine.spread",
    "services.engine.flight",
    "services.engine.schedule",
    "services.engine.job",
    "services.engine.spec",
    "services.engine.noise",
    "services.streamer.admission",
    "shared.messages",
    "shared.layout",
    "services.tokenizer.lay_out",
    "services.streamer.prompt_layout",
    "shared.codec",
    "services.engine.cancels",
    "shared.tokenlog",
    "shared.prefix",
    "shared.page",
    "services.tokenizer.public",
    "services.engine.prefix",
    "services.prefix_cache.index",
    "services.prefix_cache.evict",
    "services.prefix_cache.leases",
]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_law(path: Path) -> None:
    place = path.relative_to(ROOT).parts
    for module in imports(path):
        top, *rest = module.split(".")
        if place[0] in ("shared", "kernels"):
            assert top not in {"services", "shared", "kernels"} - {place[0]}, module
        if place[0] == "services" and len(place) > 2 and top == "services":
            assert rest[0] == place[1], f"{module}: no service imports another"
        if top == "kernels":
            assert place[0] == "kernels" or place[:2] == ("services", "engine"), module
        if top == "torch":
            device = place[:2] == ("services", "engine") and (path.stem in DEVICE or place[2] == "gpu")
            assert place[0] == "kernels" or device, module
        if top == "redis":
            assert place[0] == "shared" and path.stem in ("bus", "connection"), module
        assert top not in ("transformers", "pickle"), module


@pytest.mark.parametrize("module", PURE)
def test_policy_is_pure(module: str) -> None:
    """Importing it brings neither torch, nor a broker client, nor a web server, nor an event loop."""
    code = f"import sys, {module}; print(*(m for m in ('torch', 'redis', 'aiohttp', 'asyncio', 'uvloop') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_gpu_engine_needs_no_kernels_for_cpus() -> None:
    code = "import sys, services.engine.gpu.build; print(*(m for m in sys.modules if m.startswith('kernels.cpu')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_an_application_that_claims_no_names() -> None:
    """`kernels`, `services` and `shared` are generic names: nothing installed may provide them."""
    provided = importlib.metadata.packages_distributions()
    assert not {"services", "shared", "kernels"} & set(provided)
