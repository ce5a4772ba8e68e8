"""`python -m int8convert`."""

from int8convert.cli.app import main

if __name__ == "__main__":
    main()
