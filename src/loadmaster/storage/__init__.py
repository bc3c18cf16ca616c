"""Where files are kept: one module per kind of storage, all behind the protocols in `base`."""
