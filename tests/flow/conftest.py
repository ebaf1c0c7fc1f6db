import pytest

from megaflow.flow import channel
from tests.flow.small_heads import CODES


@pytest.fixture
def small_chunks(monkeypatch):
    """64 tokens a chunk, so that small tests go over several."""
    monkeypatch.setattr(channel, "CHUNK_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(channel, "CHUNK_TOKENS", 64)


@pytest.fixture(params=CODES)
def kind(request):
    return request.param
