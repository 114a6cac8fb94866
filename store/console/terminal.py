"""Defines the console that all tables and reports are printed on."""

from typing import Any

from rich.console import Console
from rich.text import Text

from store.console.visible import visible


class Terminal(Console):
    """A rich console without markup: [brackets] are plain text, and control characters are printed as codes."""

    def render_str(self, text: str, **options: Any) -> Text:
        """See `Console`; cells and titles of tables are rendered here too."""
        return super().render_str(visible(text), **{**options, "markup": False, "emoji": False})
