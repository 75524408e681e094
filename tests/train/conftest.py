import pytest
from small import prepare


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("corpus"))
