"""Show defaults of the reference as numbers: ``max_samples=8192``, not ``max_samples=MAX_SAMPLES``."""

from typing import Any

import griffe


class ShowDefaults(griffe.Extension):
    """Replace a parameter's default that names a constant by the constant's value."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Run once the package is loaded, when names can be looked up."""
        visit(pkg, set())


def visit(one: griffe.Object, seen: set[str]) -> None:
    """Replace the defaults of all functions below ``one``."""
    if one.path in seen:
        return
    seen.add(one.path)
    for member in one.members.values():
        if member.is_alias:
            continue
        if member.is_function:
            for parameter in member.parameters:
                if isinstance(parameter.default, griffe.ExprName):
                    parameter.default = find_number(parameter.default)
        elif member.is_module or member.is_class:
            visit(member, seen)


def find_number(name: griffe.ExprName) -> str | griffe.Expr:
    """The value behind a name where it is a number or a string; else the name itself."""
    try:
        target = name.resolved
        value = str(target.final_target.value if target.is_alias else target.value)
    except (AttributeError, griffe.GriffeError):
        return name
    return value if value[0].isdigit() or value[0] in "-'\"" else name
