"""Run `snakemake --lint` and fail on every message but those that are not followed.

python tests/lint/snakemake_lint.py
"""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

NOT_FOLLOWED = {
    "Specify a conda environment or container for each rule.": (
        "All rules run the functions of one Python package, installed by pip with its "
        "dependencies (pyproject.toml) in the environment that Snakemake itself runs in; an "
        "environment per rule would be the same one a dozen times, and cost its activation in "
        "every job."
    ),
}
"""Messages that are not followed, and why."""


def messages_of_lint(text: str) -> list[tuple[str, str]]:
    """Return what each message is about and its first line."""
    about, found = "", []
    for line in text.splitlines():
        if line.startswith("Lints for "):
            about = line.removeprefix("Lints for ").rstrip(":")
        elif match := re.match(r"    \* (.*?):?$", line):
            found.append((about, match[1]))
    return found


def main() -> int:
    """Return the exit code: 0 if nothing is left to be followed."""
    snakefile = HERE.parents[1] / "Snakefile"
    command = [sys.executable, "-m", "snakemake", "--lint", "-s", str(snakefile), "-d", str(HERE)]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    text = run.stdout + run.stderr
    found = messages_of_lint(text)
    if run.returncode != 0 and not found:
        print(text)
        return 1
    to_follow = [(about, message) for about, message in found if message not in NOT_FOLLOWED]
    for about, message in to_follow:
        print(f"{about}: {message}")
    n_known = len(found) - len(to_follow)
    print(f"snakemake --lint: {len(to_follow)} messages to follow, {n_known} not followed because:")
    for message, reason in NOT_FOLLOWED.items():
        print(f"  {message} {reason}")
    return 1 if to_follow else 0


if __name__ == "__main__":
    sys.exit(main())
