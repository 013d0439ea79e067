"""A tower for one fault at a time, on each database; a module shares its database and starts its own processes."""

from collections.abc import Iterator

import pytest

from tests.chaos.lab import Lab, lab


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab(tmp_path_factory.mktemp("lab"), request.param) as made:
        yield made


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab(tmp_path_factory.mktemp("lab"), "postgres") as made:
        yield made


@pytest.fixture(autouse=True)
def _no_life_outlives_its_test(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in {"bench", "services"} & set(request.fixturenames):
        request.getfixturevalue(name).end_lives()
