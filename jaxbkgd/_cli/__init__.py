"""The command `jaxbkgd`."""
