"""What a report page is made of: sections of parts, and in these tables and figures; the template lays them out."""

from dataclasses import dataclass, field

import plotly.graph_objects as go


@dataclass(frozen=True)
class Figure:
    """A plotly figure in light colours, and a caption above it."""

    chart: go.Figure
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """Cells as text; the first of a row is its name. recorded: settings as YAML, folded away below."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    recorded: str = ""


@dataclass(frozen=True)
class Part:
    """Figures side by side in so many columns, with a title, a text and tables above them."""

    figures: list[Figure] = field(default_factory=list)
    title: str = ""
    text: str = ""
    columns: int = 1
    tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """A section of the page; name: of its anchor."""

    name: str
    title: str
    text: str
    parts: list[Part]


@dataclass(frozen=True)
class Sentences:
    """A list of verdicts, folded away or not."""

    title: str
    items_: list[str]
    folded: bool = False
