"""What `--help`, `COMMAND --help` and `--completion` print. Imports neither Hydra nor torch: help has to be quick."""

from __future__ import annotations

import shutil
import textwrap

from harness.commands.usage import COMMANDS
from harness.config import reference
from harness.core.types import UserError

SHELLS = ("bash", "zsh")

_HEAD = """\
ssodbench COMMAND [--config-dir DIR] [key=value | group=option ...]

Which semi-supervised detector gives how much mAP, at which label ratio, for how much compute.

commands
"""
_FOOT = """
`ssodbench COMMAND --help` lists that command's keys with their defaults, and two examples.
`ssodbench config` prints every key with its value, `ssodbench config --sources` where each value comes from.
`ssodbench --version` says which version this is; eval "$(ssodbench --completion bash)" completes (zsh too).
exit code 0 ok, 1 failed, 2 a mistake in what was given, 129, 130 and 143 interrupted (start again to continue)
"""
_WIDEST = 110


def overview() -> str:
    """The help of the whole program."""
    rows = [f"  {name:<10} {command.does:<50} {command.example}" for name, command in COMMANDS.items()]
    groups = f"\ngroups    {', '.join(reference.GROUPS)}\n"
    return _HEAD + "\n".join(rows) + "\n" + groups + _FOOT


def command_help(name: str) -> str:
    """The help of one command."""
    command = COMMANDS[name]
    usage = f"ssodbench {name} {'DIR ' if command.positional else ''}[--config-dir DIR] [key=value ...]"
    parts = [usage, "", _sentence(command.does), "", *_examples(name), ""]
    rows = reference.command_keys(command.takes or _everything())
    parts += ["keys, with their defaults (preset=small)" if command.takes else "keys: all of them", ""]
    parts += _columns(rows)
    return "\n".join(parts) + "\n"


def _everything() -> tuple[str, ...]:
    sections = dict.fromkeys(key.split(".")[0] for key in reference.general())
    return (*reference.GROUPS, *sections)


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def _examples(name: str) -> list[str]:
    lines = ["examples"]
    for says, given in COMMANDS[name].examples:
        lines += [f"  # {says}", f"  ssodbench {name} {given}".rstrip()]
    return lines


def _columns(rows: list[tuple[str, str, str]]) -> list[str]:
    """key = default, and the meaning beside it, wrapped at the terminal's width."""
    width = min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns)
    left = [f"  {key}={value}" for key, value, _ in rows]
    room = min(max(map(len, left), default=0) + 2, 40)
    lines = []
    for start, (_, _, meaning) in zip(left, rows, strict=True):
        wrapped = textwrap.wrap(meaning, max(20, width - room)) or [""]
        if len(start) + 2 > room:
            lines.append(start)
            start = ""
        lines += [f"{start:<{room}}{wrapped[0]}".rstrip(), *(" " * room + more for more in wrapped[1:])]
    return lines


def completion(shell: str) -> str:
    """A script that makes a shell complete commands, keys, groups and their options.

    Raises:
        UserError: an unknown shell.
    """
    if shell not in SHELLS:
        raise UserError(f"--completion {shell} is not known: choose {' or '.join(SHELLS)}")
    keys = [f"{key}=" for key in reference.general()]
    groups = [f"{group}={option}" for group in reference.GROUPS for option in reference.options(group)]
    words = " ".join([*keys, *groups, "--config-dir", "--help"])
    zsh = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return f"""{zsh}_ssodbench() {{
  local line="${{COMP_LINE:0:$COMP_POINT}}" word start
  word="${{line##*[[:space:]]}}"
  if [ "$COMP_CWORD" -le 1 ]; then
    COMPREPLY=($(compgen -W "{" ".join(COMMANDS)} --help --version" -- "$word"))
    return
  fi
  COMPREPLY=($(compgen -W "{words}" -- "$word"))
  case "$word" in *=*)
    start="${{word%%=*}}="
    [ ${{#COMPREPLY[@]}} -eq 0 ] && COMPREPLY=($(compgen -f -P "$start" -- "${{word#*=}}"))
    [[ "$COMP_WORDBREAKS" == *=* ]] && COMPREPLY=("${{COMPREPLY[@]#"$start"}}")
  ;; esac
  [[ "${{COMPREPLY[0]}}" == *= ]] && compopt -o nospace 2>/dev/null
}}
complete -o nosort -F _ssodbench ssodbench 2>/dev/null || complete -F _ssodbench ssodbench
"""
