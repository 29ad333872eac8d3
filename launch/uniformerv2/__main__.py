"""`python -m uniformerv2` is the command `uniformerv2`."""

from launch.cli import main

if __name__ == "__main__":
    main()
