"""Run the tests on both cores: those of the workflow beside all others, which take as long.

python tests/run_all.py ARGUMENTS...: arguments of pytest. If they name files or folders, only these
are run, by one pytest.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
WORKFLOW = HERE / "workflow"
NOTHING_COLLECTED = 5


def main(arguments):
    """Run the tests; return the exit code."""
    pytest = [sys.executable, "-m", "pytest"]
    if any(Path(one.partition("::")[0]).exists() for one in arguments):
        return subprocess.run([*pytest, *arguments], check=False).returncode
    others = [str(HERE), f"--ignore={WORKFLOW}"]
    with tempfile.TemporaryFile() as said:
        beside = subprocess.Popen([*pytest, *others, *arguments], stdout=said, stderr=said)
        try:
            codes = [subprocess.run([*pytest, str(WORKFLOW), *arguments], check=False).returncode]
            codes.append(beside.wait())
        finally:
            beside.terminate()
            said.seek(0)
            sys.stdout.buffer.write(said.read())
            sys.stdout.flush()
    ran = [code for code in codes if code != NOTHING_COLLECTED]
    return next((code for code in ran if code), 0) if ran else NOTHING_COLLECTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
