import pytest

from megaflow.parallel import mesh as meshes
from megaflow.train import engine
from tests.train.session import Session


@pytest.fixture
def mesh():
    with meshes.join() as joined:
        yield joined
        while Session.open:
            engine.close(Session.open.pop())
