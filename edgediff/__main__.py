"""``python -m edgediff``: the same as the ``edgediff`` script."""

from edgediff.cli import main

if __name__ == "__main__":
    main()
