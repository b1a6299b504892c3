"""What `python -m services.up` is told about sizes."""

import pytest

from services.up.options import parse


@pytest.mark.parametrize(("text", "size"), [("0", 0), ("512M", 512), ("8g", 8192)])
def test_prefix_cache(text: str, size: int) -> None:
    options = parse(["--prefix-cache", text])
    assert options.prefix_cache_mb == size
    assert ("prefix_cache" in options.counts) == bool(size)


@pytest.mark.parametrize("text", ["", "8", "G", "-1G", "1.5G", "8T", "8GB"])
def test_a_size_that_is_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--prefix-cache", text])
    assert "--prefix-cache" in capsys.readouterr().err
