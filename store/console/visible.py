"""Foreign text made fit to be shown.

A name from a data set or a file may hold characters that a terminal obeys, that turn the text around them from left to
right (so that 90.12 reads 21.09), or that UTF-8 cannot encode. These are written out.
"""

import re

# Controls but for tab and line feed, the marks and overrides of writing direction, line separators, surrogates.
_HIDDEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with every such character as its code, such as \\u202e."""
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str) -> str:
    """As `visible`, with line feeds and tabs written out too: for a name in a line or a column of its own."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")
