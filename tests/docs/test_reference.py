"""The reference pages say what the code says."""

from pathlib import Path

import pytest

from ollamamax_p2p.api import reference as api_reference
from ollamamax_p2p.config import rendering
from omx_cli import reference as cli_reference

PAGES = {
    "settings.md": (rendering.reference_page, "ollamamax_p2p.config.rendering"),
    "http-api.md": (api_reference.api_page, "ollamamax_p2p.api.reference"),
    "errors.md": (api_reference.errors_page, "ollamamax_p2p.api.reference"),
    "cli.md": (cli_reference.reference_page, "omx_cli.reference"),
}
FOLDER = Path(__file__).parents[2] / "docs" / "reference"


@pytest.mark.parametrize("name", PAGES)
def test_a_reference_page_is_current(name):
    page, module = PAGES[name]
    assert (FOLDER / name).read_text() == page(), f"run: python -m {module}"


def test_every_setting_has_a_text_of_its_own():
    page = rendering.reference_page()
    for key in rendering.all_settings():
        assert f"### {key}\n\n" in page
