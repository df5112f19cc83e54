"""Start the program: ``python -m distillm_cli`` is the same as ``distillm``."""

import atexit
import sys

from distillm_cli.cli.streams import open_streams, report
from distillm_cli.errors import Interrupted, signal_number
from distillm_cli.utils.memory import pause_garbage_collection
from distillm_cli.utils.signals import exit_by_signal, handle_signals, restore_interrupt


def main() -> int:
    """Run the command line of this process and return its exit code.

    Ctrl-C ends it with one line and an exit code, also during the import of the commands.
    """
    open_streams()
    pause_garbage_collection()
    code = 0
    atexit.register(lambda: exit_by_signal(code))  # registered first, so called last
    try:
        with handle_signals():
            from distillm_cli.cli.app import main as run

            code = run()
    except KeyboardInterrupt as stop:
        code = report(Interrupted("interrupted", signal_number=signal_number(stop)), sys.argv[1:])
    restore_interrupt(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
