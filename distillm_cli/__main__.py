"""``python -m distillm_cli`` is ``distillm``."""

import sys

from distillm_cli.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
