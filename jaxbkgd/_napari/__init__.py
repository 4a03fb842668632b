"""The napari plugin; its packages are those of the extra `napari`."""
