from tests.api.serving import served  # noqa: F401 - a fixture
from tests.cli.running_omx import omx  # noqa: F401 - a fixture
from tests.cli.serving_models import talking  # noqa: F401 - a fixture
