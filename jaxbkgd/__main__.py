"""`python -m jaxbkgd` is the command `jaxbkgd`."""

from ._cli.main import main


if __name__ == "__main__":
    main()
