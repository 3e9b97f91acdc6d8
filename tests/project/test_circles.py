"""No module of the package imports itself by a way round, not even inside a function."""

from collections.abc import Iterator

import grimp
import pytest

import labkit
from labkit.models import pocket


@pytest.fixture
def graph() -> grimp.ImportGraph:
    """All imports but those for type checkers; with what packages import on first use."""
    graph = grimp.build_graph("labkit", exclude_type_checking_imports=True, cache_dir=None)
    for module in pocket._HOMES.values():
        graph.add_import(importer="labkit.models.pocket", imported=f"labkit.models.pocket.{module}")
    return graph


def circles(graph: grimp.ImportGraph) -> Iterator[str]:
    """Each import that closes a circle, with the way back, as ``a -> b -> a``."""
    for importer in sorted(graph.modules):
        for imported in sorted(graph.find_modules_directly_imported_by(importer)):
            if back := graph.find_shortest_chain(importer=imported, imported=importer):
                yield " -> ".join((importer, *back))


def test_no_imports_form_a_circle(graph):
    assert list(circles(graph)) == []


def test_a_circle_is_seen(graph):
    graph.add_import(importer="labkit.common.errors", imported="labkit.plans.quantize")
    assert any("labkit.common.errors -> labkit.plans.quantize -> " in circle for circle in circles(graph))


def test_modules_need_only_the_version_of_the_package_above_all(graph):
    """What it offers it imports on first use: a module that used that would come back to itself unseen."""
    names = {
        detail["line_contents"].strip()
        for importer in graph.find_modules_that_directly_import("labkit")
        for detail in graph.get_import_details(importer=importer, imported="labkit")
    }
    assert names == {"from labkit import __version__"}
    assert "__version__" not in {*labkit._HOME, *labkit._MODULES}
