"""Makes untrusted text safe to print.

A name from a data set or a file may have characters that control a terminal, that reverse the direction of the text
around them (so that 90.12 reads 21.09), or that UTF-8 cannot encode. They are replaced by their codes.
"""

import re

# Control characters except tab and line feed, marks and overrides of writing direction, line separators, surrogates.
_HIDDEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with each such character replaced by its code, such as \\u202e."""
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str) -> str:
    """As `visible`, with codes for line feeds and tabs too: for a name in a line or in a column of a table."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")
