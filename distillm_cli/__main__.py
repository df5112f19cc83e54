"""``python -m distillm_cli`` is ``distillm``: here the program begins."""

import atexit
import sys

from distillm_cli.cli.streams import open_streams, report
from distillm_cli.errors import Interrupted, signal_number
from distillm_cli.utils import garbage
from distillm_cli.utils.interrupts import heard, hurry, stop_the_shell_too


def main() -> int:
    """Runs the process's own command line and returns its exit code.

    Ctrl-C has its one line and its code from here on, also while the commands are being imported.
    """
    open_streams()
    garbage.put_off()
    code = 0
    atexit.register(lambda: stop_the_shell_too(code))  # the first to be registered is the last to be called
    try:
        with heard():
            from distillm_cli.cli.app import main as run

            code = run()
    except KeyboardInterrupt as stop:
        code = report(Interrupted("interrupted", signal_number=signal_number(stop)), sys.argv[1:])
    hurry(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
