"""``python -m distillm_cli`` is ``distillm``: here the program begins."""

import sys

from distillm_cli.cli import garbage
from distillm_cli.cli.interrupts import heard
from distillm_cli.errors import Interrupted, signal_number, tell


def main() -> int:
    """Runs the process's own command line and returns its exit code.

    Ctrl-C has its one line and its code from here on, also while the commands are being imported.
    """
    garbage.put_off()
    try:
        with heard():
            from distillm_cli.cli.app import main as run

            return run()
    except KeyboardInterrupt as stop:
        return tell(Interrupted("interrupted", signal_number=signal_number(stop)), sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
