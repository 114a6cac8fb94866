"""The terminal, as all tables and reports are printed on it."""

from typing import Any

from rich.console import Console
from rich.text import Text

from store.console.visible import visible


class Terminal(Console):
    """A rich console that takes every string as text: [brackets] are no markup, and control characters are codes."""

    def render_str(self, text: str, **options: Any) -> Text:
        """See `Console`; cells and titles of tables come through here too."""
        return super().render_str(visible(text), **{**options, "markup": False, "emoji": False})
