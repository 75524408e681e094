"""`dape --completion`: a script to complete commands and options in bash and zsh."""

from collections.abc import Iterable
from importlib import import_module

from dape.cli.arguments import options_of

SCRIPT = """\
# Completion of dape, made by `dape --completion`: source this file in ~/.bashrc or ~/.zshrc.
if [ -n "$ZSH_VERSION" ]; then
  autoload -U +X compinit && compinit
  autoload -U +X bashcompinit && bashcompinit
fi
_dape() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{first}"
  else
    case "${{COMP_WORDS[1]}}" in
{second}
    esac
    [ "$COMP_CWORD" -gt 2 ] && words=""
    case "${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}}" in
{options}
    esac
  fi
  COMPREPLY=( $(compgen -W "$words" -- "$word") )
}}
complete -o default -F _dape dape
"""


def script(commands: Iterable[str]) -> str:
    """Return the script, for commands of up to two words."""
    pairs = [(first, rest) for first, _, rest in (name.partition(" ") for name in commands)]
    firsts = dict.fromkeys(first for first, _ in pairs)
    seconds = {first: [rest for one, rest in pairs if one == first and rest] for first in firsts}
    # A command of two words stands before the command of its first word, a prefix.
    ordered = sorted(pairs, key=lambda pair: not pair[1])
    return SCRIPT.format(
        first=" ".join([*firsts, "--help", "--version", "--completion"]),
        second="\n".join(_case(first, rest) for first, rest in seconds.items() if rest),
        options="\n".join(
            _case(
                f'"{first} {rest}"' if rest else f'"{first} "*', ["$words", *_options(first, rest)]
            )
            for first, rest in ordered
        ),
    )


def _case(pattern: str, words: Iterable[str]) -> str:
    return f'      {pattern}) words="{" ".join(words)}" ;;'


def _options(first: str, rest: str) -> list[str]:
    name = f"{first}_{rest}" if rest else first
    return [*options_of(import_module(f"dape.cli.{name}").Arguments), "--help"]
