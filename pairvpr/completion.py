"""`pairvpr completion bash|zsh|fish`: a script that completes jobs, their keys and the choices of a key.

The script is made from the schema once, so that pressing Tab starts no Python. Load it when a shell starts:

    eval "$(pairvpr completion bash)"       # in ~/.bashrc; with zsh in ~/.zshrc, behind compinit
    pairvpr completion fish | source        # in ~/.config/fish/config.fish
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pairvpr.cli import JOBS, LOOKS
from pairvpr.config.compose import choices_by_key

BASH = """\
_pairvpr() {{
    local typed="${{COMP_LINE:0:COMP_POINT}}" keys="" choices=""
    local current="${{typed##*[[:space:]]}}" words
    read -ra words <<< "$typed"
    if [[ "$typed" == "${{words[0]}} $current" ]]; then
        keys="{jobs}"
    else
        case "${{words[1]}} " in
{cases}
        esac
    fi
    if [[ "$current" == *=* ]]; then
        COMPREPLY=($(compgen -W "$choices" -- "$current"))
        COMPREPLY=("${{COMPREPLY[@]#*=}}")  # readline completes behind the equals sign
    else
        COMPREPLY=($(compgen -W "$keys" -- "$current"))
        [[ "${{COMPREPLY[*]}}" != *=* ]] || compopt -o nospace
    fi
}}
complete -o default -F _pairvpr pairvpr"""
ZSH = """\
_pairvpr() {{
    local -a keys choices
    if (( CURRENT == 2 )); then
        compadd -- {jobs}
        return
    fi
    case "${{words[2]}} " in
{cases}
    esac
    if [[ "$PREFIX" != *=* ]]; then
        compadd -S '' -- $keys
    elif ! compadd -- $choices; then
        compset -P '*=' && _files
    fi
}}
compdef _pairvpr pairvpr"""
SHELLS = ("bash", "zsh", "fish")


def script(shell: str) -> str:
    """What a shell of `SHELLS` is to load."""
    about = {name: job.about for name, job in JOBS.items()} | {name: about for name, (_, about) in LOOKS.items()}
    keys = {name: choices_by_key(job.config) for name, job in JOBS.items()}
    words = {
        name: (
            " ".join(f"{key}=" for key in its),
            " ".join(f"{key}={choice}" for key, choices in its.items() for choice in choices),
        )
        for name, its in keys.items()
    }
    jobs = " ".join(about)
    if shell == "bash":
        cases = [f'            "{name} ") keys="{its}" choices="{values}" ;;' for name, (its, values) in words.items()]
        return BASH.format(jobs=jobs, cases="\n".join(cases))
    if shell == "zsh":
        cases = [f'        "{name} ") keys=({its}) choices=({values}) ;;' for name, (its, values) in words.items()]
        return ZSH.format(jobs=jobs, cases="\n".join(cases))
    lines = [
        f"complete -c pairvpr -n __fish_use_subcommand -f -a {name} -d {_quoted(its)}" for name, its in about.items()
    ]
    lines += [
        f"complete -c pairvpr -n '__fish_seen_subcommand_from {name}' -a {_quoted(' '.join(both))}"
        for name, both in words.items()
    ]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def main(arguments: Sequence[str]) -> int:
    """Print the script. Exit codes: 0 done, 2 a user's mistake."""
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        print(f"error: completion {' '.join(arguments)}: expected one of {', '.join(SHELLS)}", file=sys.stderr)
        return 2
    print(script(arguments[0]))
    return 0
