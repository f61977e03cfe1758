"""``python -m edgediff``: the same as the ``edgediff`` script."""

import sys

if __name__ == "__main__":
    try:
        from edgediff.cli import main
    except KeyboardInterrupt:  # before there is anything to interrupt
        sys.exit(130)
    main()
