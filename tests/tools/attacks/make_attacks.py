#!/usr/bin/env python3
"""Write the corpus of attacks: `python -m tests.tools.attacks.make_attacks DIR` gives `DIR/<attack>/checkpoint`.

The files are hostile to readers of checkpoints on purpose: links out of the folder, pipes, sparse files of gigabytes,
pickles that would run `touch`. Nothing in them harms beyond that.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Importing a module of attacks puts them into the list.
from tests.tools.attacks import configs, corners, directories, headers, pickles, zips  # noqa: F401
from tests.tools.attacks.registry import ATTACKS, Attack, prepare


def make_attack(attack: Attack, folder: Path) -> Path:
    """Write one attack into a new folder; the checkpoint's directory."""
    prepare(folder)
    attack.make(folder)
    return folder / "checkpoint"


def main(directory: Path) -> None:
    for attack in ATTACKS.values():
        make_attack(attack, directory / attack.name)
        expected = "works" if attack.error is None else attack.error.__name__
        print(f"{attack.name}: {expected}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
