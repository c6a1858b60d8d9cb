"""The model that the tests of this folder share."""

import pytest
from families import build


@pytest.fixture(scope="module")
def qwen():
    return build("qwen3")
