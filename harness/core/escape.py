"""Text from outside (names, paths, errors), made harmless for each form that it is written in.

HTML has no function here: jinja's autoescape does it. Every other form that this package writes has one.
"""

from __future__ import annotations

import codecs
import hashlib
import re
import unicodedata
from typing import IO

from rich.text import Text

_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"  # format characters that scripts and emoji need
_UNSEEN = ("Cc", "Cf", "Cs", "Cn")  # control, format, lone surrogate, no character
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # spreadsheets take a cell that begins so for a formula
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"})
_LATEX = {character: "\\" + character for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    "±": r"$\pm$",
    "\N{MINUS SIGN}": "$-$",
    "†": r"\dag{}",
    "‡": r"\ddag{}",
}
_LIKE = {"±": "+/-", "\N{MINUS SIGN}": "-", "†": "+", "‡": "++", "…": "...", "•": "*", "━": "-", "╸": "-", "╺": "-"}
_LONGEST_NAME = 200  # bytes of a file name; file systems take 255, and suffixes follow


def plain(text: object) -> str:
    r"""One line of characters that can be seen and encoded: breaks become spaces, others escapes such as \x1b.

    Terminals obey control characters, SVG and LaTeX break at them, and UTF-8 cannot hold the lone surrogates by which
    Python shows file names of another encoding.
    """
    shown = str(text)
    return shown if shown.isprintable() else "".join(map(_visible, shown))


def _visible(character: str) -> str:
    if character.isprintable() or character in _JOINERS:
        return character
    if character.isspace():
        return " "
    if unicodedata.category(character) not in _UNSEEN:
        return character
    return character.encode("unicode_escape").decode()


def markdown(text: object) -> str:
    """For a cell of a table, a list item or a heading of GitHub's Markdown."""
    shown = re.sub(r"[\\`*~$#]", r"\\\g<0>", plain(text).strip())
    shown = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\_", shown)  # within a word it is an underscore anyway
    shown = re.sub(r"\](?=[(\[:])", r"\]", shown)  # a link
    shown = re.sub(r"^(\[|[-+](?=\s|-)|=)", r"\\\1", shown)  # a tick box or an address, a list, a line below a heading
    shown = re.sub(r"^(\d+)(?=[.)](\s|$))", r"\1\\", shown)  # a numbered list
    return shown.translate(_ENTITIES)


def latex(text: object) -> str:
    """For running text or a cell of a table in LaTeX."""
    escaped = "".join(_LATEX.get(character, character) for character in plain(text).strip())
    # At the beginning of a row these two would be an option of the \\ before it.
    return f"{{{escaped[0]}}}{escaped[1:]}" if escaped.startswith(("[", "*")) else escaped


def csv_cell(text: str) -> str:
    """For a cell of a CSV file that a spreadsheet may open: what would be a formula gets an apostrophe before it."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "'" + text if text.startswith(_FORMULA) else text


def literal(text: object, encoding: str = "utf-8") -> Text:
    """For rich: the text itself, no markup, in characters that the terminal's encoding has."""
    return Text(encodable(plain(text), encoding))


def figure_label(text: object, longest: int = 60) -> str:
    """For matplotlib, without mathematics; shortened so that the panels keep their room."""
    shown = plain(text)
    shown = shown if len(shown) <= longest else shown[: longest - 3] + "..."
    return shown.replace("$", r"\$")


def file_name(text: str) -> str:
    """For a file or folder: [A-Za-z0-9_.-] alone; a long one ends in a part of its hash."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", text)
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 11]}-{hashlib.sha256(text.encode('utf-8', 'backslashreplace')).hexdigest()[:10]}"


def encodable(text: str, encoding: str) -> str:
    """The text with what the encoding lacks replaced by what looks like it, or by escapes."""
    return text.encode(encoding, _ERRORS).decode(encoding)


def _look_alike(error: UnicodeError) -> tuple[str, int]:
    """A handler of `codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_LIKE.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing), error.end


_ERRORS = "ssodbench.look_alike"
codecs.register_error(_ERRORS, _look_alike)


def never_refuse(stream: IO[str]) -> None:
    """Lets an output replace what its encoding lacks, instead of ending the command that writes to it."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors=_ERRORS)
