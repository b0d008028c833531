"""The layers and front doors hold; the public names are what they say."""

import importlib
import subprocess
import sys
from pathlib import Path

import grimp

ROOT = "ollamamax_p2p"
PROJECT = Path(__file__).parents[2]


def test_imports_point_down_the_page() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-cache"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_import_that_crosses_packages_enters_by_the_front_door() -> None:
    def package(module: str) -> str:
        return ".".join(module.split(".")[:2])

    def is_front_door(module: str) -> bool:
        home = package(module)
        # A module that its package exports by name (wire.protocol_ids) is part of the front door.
        exported = getattr(importlib.import_module(home), "__all__", ())
        return (
            module == home
            or module.startswith(home + ".core")
            or module.removeprefix(home + ".") in exported
        )

    graph = grimp.build_graph(ROOT, cache_dir=None)
    side_doors = [
        f"{importer} -> {imported}"
        for importer in sorted(graph.modules)
        for imported in sorted(graph.find_modules_directly_imported_by(importer))
        if package(importer) != package(imported)
        and not is_front_door(imported)
        and importer != ROOT
    ]
    assert side_doors == []


def test_every_public_name_can_be_had() -> None:
    import ollamamax_p2p

    missing = [name for name in ollamamax_p2p.__all__ if not hasattr(ollamamax_p2p, name)]
    assert missing == []


def test_importing_the_library_loads_neither_libp2p_nor_a_web_server() -> None:
    program = (
        "import sys, ollamamax_p2p;"
        "print([m for m in ('libp2p', 'starlette', 'anycorn', 'httpx2', 'zeroconf') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
