"""Nested settings among the words of a command line: `--surrogate.high 0.3`, `--surrogate.high=0.3`, `--policy.shared`."""

from __future__ import annotations

from polopt.errors import CallError

#: Options of `train` that argparse reads; every other option is a setting. True: it takes a value.
OWN = {
    "--out": True,
    "--config": True,
    "--dry-run": False,
    "--quiet": False,
    "--no-report": False,
    "--debug": False,
    "--help": False,
    "-h": False,
}

#: The same for `compare`.
COMPARE = {
    **dict.fromkeys(
        (
            "--task", "--budget", "--seeds", "--out", "--jobs", "--baseline", "--metric", "--points", "--episodes", "--external",
            "--tune", "--tune-seeds", "--search", "--timeout",
        ),
        True,
    ),
    **dict.fromkeys(("--lower-is-better", "--dry-run", "--quiet", "--debug", "--help", "-h"), False),
}  # fmt: skip
#: Commands that take settings besides their own options.
TAKING = {"train": OWN, "compare": COMPARE}


def split_settings(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Separate the settings of `polopt train ...` and `polopt compare ...` from the words that argparse reads.

    A setting without a value, at the end or before another option, is `true`.
    """
    if not words or words[0] not in TAKING:
        return words, {}
    own = TAKING[words[0]]
    rest: list[str] = [words[0]]
    settings: dict[str, str] = {}
    todo = words[1:]
    while todo:
        word = todo.pop(0)
        name, equals, value = word.partition("=")
        if name in own:
            rest.append(word)
            if own[name] and not equals and todo:
                rest.append(todo.pop(0))
        elif word.startswith("--") and len(word) > 2:
            if not equals:
                value = todo.pop(0) if todo and not todo[0].startswith("--") else "true"
            if (path := name[2:]) in settings:
                raise CallError(f"{name} is given twice: {settings[path]} and {value}")
            settings[path] = value
        else:
            rest.append(word)
    return rest, settings


__all__ = ["COMPARE", "OWN", "TAKING", "split_settings"]
