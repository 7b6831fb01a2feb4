"""The stages without torch, built once; tests are skipped where there is nothing to build or to run them with."""

import library
import pytest
from card import Card


@pytest.fixture(scope="session")
def stages():
    try:
        return library.load()
    except library.Unavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture
def card(stages):
    with Card(stages) as card:
        yield card
