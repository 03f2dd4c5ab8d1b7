"""The version, in one place: pyproject.toml, the build and `pyaccel.__version__` read it here."""

__version__ = "0.1.0"
