"""Reports as HTML: one file each, nothing is loaded from elsewhere. `page.html` is the frame that every report extends."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kvcomm.report import facts

__all__ = ["ms", "percent", "render"]


def render(template: Path, **values: object) -> str:
    """The file `template`, filled in; text in `values` is escaped. A name that is not in `values` is an error."""
    env = Environment(
        autoescape=True,
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(percent=percent, ms=ms, facts=facts)
    return env.get_template(template.name).render(values)


def percent(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.1f} %"


def ms(x: float | None) -> str:
    return "-" if x is None else f"{x:.1f}"
