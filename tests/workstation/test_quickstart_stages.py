"""The quickstart's bar knows every stage that an export of its own settings can tell of."""

import ast
import inspect

from edge_tcur.quickstart import run as quickstart
from edge_tcur_export import bundle


def test_every_stage_of_the_export_has_its_place_on_the_bar():
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(bundle))) if isinstance(node, ast.Call)]
    begun = [c.args[0] for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "begin"]
    stages = {arg.value for arg in begun if isinstance(arg, ast.Constant) and arg.value is not None}
    assert "writing the manifest" in stages
    assert stages <= set(quickstart._EXPORT), stages - set(quickstart._EXPORT)
    assert list(quickstart._EXPORT.values()) == sorted(quickstart._EXPORT.values())
