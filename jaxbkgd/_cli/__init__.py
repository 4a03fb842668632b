"""The command `jaxbkgd`; its packages are those of the extra `cli`."""
