from tests.api.serving import served  # noqa: F401 - a fixture
