"""`python -m jaxbkgd` is the command `jaxbkgd`."""

from ._cli.app import main


if __name__ == "__main__":
    main()
